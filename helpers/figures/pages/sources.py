"""What Sphinx reads: a copy of what the pages show, and of what they link to."""

import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from helpers.errors import BadInput

ROOT = Path(__file__).parents[3]

# The pages behind the first, which is the README, by their headings in the sidebar.
GROUPS = {"Notebooks": "notebooks/*.ipynb", "Reference": "helpers/README.md"}
GROUPS |= {"Results": "assets/*.md"}

# What lies in the repository and may be linked to: a file that is no page is there to download.
COPIED = ("notebooks", "assets", "helpers", "tests", ".ci", ".github")
COPIED += ("requirements.txt", "pyproject.toml")

# [text](target), with an anchor behind the target or not, as in Markdown and in a notebook's JSON.
LINK = re.compile(r"(?<!!)\[([^][]+)\]\(([\w./ -]+)((?:#[^)\s]*)?)\)")


def copy(folder: Path, root: Path = ROOT) -> list[Path]:
    """Copy the sources of the pages from `root` to `folder`; returns those of pages, in the order
    in which they are read, relative to `folder`.

    Everything lies in `folder` as it does in the repository, so that links lead where they led, but
    for the README, which becomes the index. Raises `BadInput` where there is no README or notebook.
    """
    if not ((root / "README.md").is_file() and any(root.glob(GROUPS["Notebooks"]))):
        raise BadInput(
            f"{root}: expected README.md and notebooks/*.ipynb, found none, as in a package that"
            " is installed without them; run it in a clone of the repository"
        )
    for name in COPIED:
        if (root / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(root / name, folder / name, ignore=ignored)
        elif (root / name).is_file():
            shutil.copy2(root / name, folder / name)
    index = folder / "index.md"
    shutil.copy2(root / "README.md", index)
    groups = {name: sorted(folder.glob(pattern)) for name, pattern in GROUPS.items()}
    pages = [index, *(page for group in groups.values() for page in group)]
    for page in pages:
        beside = root / page.parent.relative_to(folder)
        at = functools.partial(_link, beside=beside, readme=root / "README.md")
        text = LINK.sub(at, page.read_text("utf-8"))
        page.write_text(text, encoding="utf-8")
    with index.open("a", encoding="utf-8") as file:
        file.writelines(_contents(groups, folder))
    return [page.relative_to(folder) for page in pages]


def _link(link: re.Match, beside: Path, readme: Path) -> str:
    """A link as the pages have it, from the folder that it is relative to, `beside`: the `readme`
    is the index, and a folder no page at all."""
    text, target, anchor = link.groups()
    if (beside / target).is_dir():
        return text
    if (beside / target).resolve() == readme.resolve():
        target = target.removesuffix("README.md") + "index.md"
    return f"[{text}]({target}{anchor})"


def _contents(groups: dict[str, list[Path]], folder: Path) -> Iterator[str]:
    """The table of contents in the sidebar, by short titles."""
    for name, pages in groups.items():
        yield f"\n\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n"
        for page in pages:
            yield f"{title(page)} <{page.relative_to(folder).with_suffix('').as_posix()}>\n"
        yield "```\n"


def title(page: Path) -> str:
    """A short title for a page, from its file's name ("01 wav2vec2" for 01_wav2vec2.ipynb), or
    where that says nothing, its first heading."""
    if page.stem == "README":
        return page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    words = page.stem.replace("_", " ")
    return words[:1].upper() + words[1:]
