"""A Sphinx extension: formulas without the web, and words for the pictures that cells draw.

Formulas are MathML, which browsers draw themselves; Sphinx's own way loads MathJax from the web.
The translation is that of docutils, ``docutils.utils.math.latex2mathml``.
"""

from pathlib import Path
from typing import Any
from xml.dom import minidom

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)  # a warning of it is one of Sphinx


def setup(app: Any) -> None:
    """What Sphinx calls: `app` gets a renderer of formulas called ``mathml``, and alt text."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("doctree-resolved", _describe_pictures)


def _inline(translator: Any, node: Any) -> None:
    translator.body.append(_markup(node, as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: Any) -> None:
    translator.body.append(f'<div class="formula">{_markup(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def _markup(node: Any, as_block: bool) -> str:
    try:
        return latex2mathml.tex2mathml(node.astext(), as_block)
    except MathError as error:
        logger.warning("%s: %s", node.astext(), error, location=node)
        return ""


def _describe_pictures(app: Any, page: Any, name: str) -> None:
    """Where a picture has no alt text, as those that cells draw, it is the title of the drawing."""
    for picture in page.findall(nodes.image):
        if picture.get("alt"):
            continue
        file = Path(app.srcdir) / picture["uri"]
        titles = []
        if file.suffix == ".svg":
            titles = minidom.parse(str(file)).getElementsByTagName("title")
        if titles:
            picture["alt"] = titles[0].firstChild.data
        else:
            logger.warning("a picture without alt text: %s", file.name, location=picture)
