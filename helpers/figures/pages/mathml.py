"""Formulas as MathML, which browsers draw themselves: Sphinx's own way loads MathJax from the web.

The translation is that of docutils, ``docutils.utils.math.latex2mathml``.
"""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)  # a warning of it is one of Sphinx


def setup(app: Any) -> None:
    """A Sphinx extension, with a renderer of formulas called ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


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
