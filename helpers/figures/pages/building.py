"""Build the pages by Sphinx, offline, and put them where they are wanted, whole or not at all."""

import io
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from helpers import files
from helpers.errors import BadInput
from helpers.figures.pages import sources

# In the folder of the pages: that they were made here, and what was made.
MARKER = ".made-by-helpers-pages"
STATIC = Path(__file__).parent / "static"

logger = logging.getLogger(__name__)


class Pages(NamedTuple):
    """Pages that were made: the folder, and the files of it to be read, the index first."""

    folder: Path
    files: list[Path]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "pages": [file.as_posix() for file in self.files]}

    def __str__(self) -> str:
        return f"{self.folder / self.files[0]}: {len(self.files)} pages"


def build(out: str | Path, root: Path = sources.ROOT) -> Pages:
    """Make the pages of the repository at `root` in the folder `out`, which appears whole or not at
    all; pages that were made before are replaced.

    Raises `BadInput` on an `out` that is there and has anything else in it, or cannot be written,
    on a warning of Sphinx, and where there is nothing to make pages of.
    """
    out = Path(out).resolve()
    _replaceable(out)
    if not out.parent.is_dir():
        raise BadInput(f"{out}: expected an existing folder, found none; create {out.parent}")
    try:
        with tempfile.TemporaryDirectory() as work, files.scratch(out) as draft:
            pages = _make(draft, root, Path(work))
            _replaceable(out)  # it took a while
            _put(draft, out)
    except OSError as error:
        raise BadInput(
            f"{out}: expected a folder that can be written, found: {error.strerror or error}; make"
            " room, or choose another"
        ) from None
    return Pages(out, [page.with_suffix(".html") for page in pages])


def _make(out: Path, root: Path, work: Path) -> list[Path]:
    """Make the pages in `out`, by way of the folder `work`; returns their sources, from `root`."""
    pages = sources.copy(work / "sources", root)
    logger.info("making %d pages …", len(pages))
    _run_sphinx(work / "sources", out, work / "doctrees")
    for page in pages:  # to be downloaded as they are, and not as Sphinx was given them
        original = "README.md" if page.stem == "index" else page
        shutil.copyfile(root / original, out / "_sources" / page)
    made = sorted(file.relative_to(out).as_posix() for file in out.rglob("*"))
    (out / MARKER).write_text("\n".join(made), encoding="utf-8")
    return pages


def _put(draft: Path, out: Path) -> None:
    """Move `draft` to `out`; what was there goes with the folder of `draft`, or comes back."""
    old = draft.with_name(f"{draft.name}.old")
    if out.exists():
        out.replace(old)
    try:
        draft.replace(out)
    except OSError:
        if old.exists():
            old.replace(out)
        raise


def _replaceable(out: Path) -> None:
    """Raise `BadInput` if there is something at `out` that was not made here."""
    if not out.exists():
        return
    if not (out / MARKER).is_file():
        raise BadInput(
            f"{out}: expected nothing, or a folder of pages that this command made, found another"
            f" {'folder' if out.is_dir() else 'file'}; choose another name"
        )
    made = {MARKER, *(out / MARKER).read_text(encoding="utf-8").splitlines()}
    for file in sorted(out.rglob("*")):
        if (name := file.relative_to(out).as_posix()) not in made:
            raise BadInput(
                f"{out}: expected only what this command made, found {name} too; move it away, or"
                " choose another name"
            )


def _run_sphinx(source: Path, out: Path, doctrees: Path) -> None:
    """Have Sphinx make HTML of `source` in `out`; raises `BadInput` on a warning."""
    import myst_nb  # noqa: F401  raises ModuleNotFoundError, as Sphinx does not
    import sphinx_book_theme  # noqa: F401
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.console import strip_escape_sequences
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    warnings = io.StringIO()
    folders = [str(folder) for folder in (source, out, doctrees)]
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(
                folders[0], None, *folders[1:], "html", configuration(source), None, warnings
            )
            app.build()
    except SphinxError as error:
        warnings.write(str(error))
    if found := strip_escape_sequences(warnings.getvalue()).strip():
        found = found.replace(f"{source}/index.md", "README.md").replace(f"{source}/", "")
        raise BadInput(
            f"{out.name}: expected pages without a warning of Sphinx, found: {found}; mend the page"
        )


def configuration(source: Path) -> dict[str, Any]:
    """What another project has in its conf.py; `source` has the index, whose title is the site's.

    Nothing may ask another machine for anything: formulas are MathML, and there are no widgets.
    """
    title = (source / "index.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    return {
        "project": title.partition(":")[0],
        "extensions": ["myst_nb", "helpers.figures.pages.extension"],
        "include_patterns": ["index.md", *sources.GROUPS.values()],
        "language": "en",
        "smartquotes": False,
        "highlight_language": "none",  # of code that does not say what it is
        "myst_enable_extensions": ["alert", "dollarmath", "html_image"],  # as GitHub has them
        "myst_heading_anchors": 4,  # as GitHub has them: links to headings
        "nb_execution_mode": "off",  # they are committed with their outputs
        "nb_merge_streams": True,
        "nb_code_prompt_show": "Show {type}",  # of cells that are tagged hide-input
        "nb_code_prompt_hide": "Hide {type}",
        "nb_ipywidgets_js": {},
        "html_theme": "sphinx_book_theme",
        "html_title": title.partition(":")[0],
        "html_math_renderer": "mathml",
        "html_static_path": [str(STATIC)],
        "html_css_files": ["pages.css"],
        "html_js_files": ["pages.js"],
        "html_show_sphinx": False,
        "html_use_index": False,
        "html_show_copyright": False,
        "html_sourcelink_suffix": "",
        # The theme's script that sets the mode fails where none is given.
        "html_context": {"default_mode": "auto"},
        "html_theme_options": {
            # The header has nothing that the sidebar has not: no second field to search in.
            **{f"navbar_{part}": [] for part in ("start", "center", "end", "persistent")},
            "use_fullscreen_button": False,
            "footer_content_items": [],
            "search_bar_text": "Search",
        },
    }
