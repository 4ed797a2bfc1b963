"""The pictures of the notebooks, made again by the command that makes them."""

import re
from pathlib import Path
from xml.dom import minidom

import nbformat
import pytest

from helpers.figures import pictures

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"


def shown() -> dict[str, tuple[nbformat.NotebookNode, str]]:
    """By file name, the notebook that shows a picture and its alt text."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        for alt, file in re.findall(r"!\[(.*?)\]\((.+?)\)", prose, re.S):
            assert (path.parent / file).resolve().parent == ASSETS
            found[Path(file).name] = notebook, alt
    return found


def text(file: Path) -> str:
    """The text alternative in the picture itself: all nodes, and which of them are marked."""
    return minidom.parse(str(file)).documentElement.getElementsByTagName("title")[0].firstChild.data


def printed(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )


def test_each_picture_is_shown_with_alt_text():
    assert set(shown()) == {file.name for file in ASSETS.glob("[0-9][0-9]_*.svg")}
    assert all(len(alt) > 80 for _, alt in shown().values())


@pytest.mark.usefixtures("program")
def test_they_still_show_what_the_notebook_names(tmp_path):
    drawn = pictures.draw(tmp_path)
    assert set(drawn) == set(shown())
    for name, (notebook, _) in shown().items():
        assert text(tmp_path / name) == text(ASSETS / name), "make the pictures again"
        marked = drawn[name].to_json()["marked"]
        names = [*marked["path"], marked["break"]]  # what `explain` has told
        said = printed(notebook)
        assert all(one in said for one in names if one), names
