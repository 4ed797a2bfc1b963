"""The pages that `python -m helpers pages` makes: what a reader meets there, in Chromium."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from helpers import files
from helpers.__main__ import main
from helpers.figures.pages import building
from helpers.view import browser

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOCAL = ("file:", "data:", "blob:")

# What axe-core looks for, by way: structure at both widths, contrast in both modes. What is serious
# or critical fails. Of lesser findings there are two, neither of them ours: `empty-table-header`,
# which pandas writes above an index, and `region`: the theme's title is outside its navigation.
STRUCTURE = {"rules": {"color-contrast": {"enabled": False}}}
CONTRAST = {"runOnly": ["color-contrast"]}
LOOKED_FOR = {
    (1280, "light"): [STRUCTURE, CONTRAST],
    (1280, "dark"): [CONTRAST],
    (390, "light"): [STRUCTURE],
    (390, "dark"): [],
}

# Contrast takes seconds a page, of thousands of elements that look alike: four of each kind do.
FOUR_OF_EACH_KIND = """() => {
    const seen = new Map();
    for (const one of document.querySelectorAll(".bd-article *")) {
        const { tagName, className } = one.parentNode;
        const kind = [one.tagName, one.className, tagName, className].join();
        seen.set(kind, (seen.get(kind) ?? 0) + 1);
        if (seen.get(kind) > 4) one.remove();
    }
}"""

# What is wider than its box, and cannot be reached by keyboard.
OUT_OF_REACH = """() => Array.from(document.querySelectorAll(".bd-article *")).filter((box) =>
    ["auto", "scroll"].includes(getComputedStyle(box).overflowX)
    && box.scrollWidth > box.clientWidth && box.tabIndex < 0).map((box) => box.outerHTML)"""

NOT_LOADED = """() => Array.from(document.images).filter((picture) =>
    !picture.complete || !picture.naturalWidth).map((picture) => picture.src)"""


def command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The pages of this repository, made by the command."""
    out = tmp_path_factory.mktemp("pages") / "out"
    ended = command("-m", "helpers", "pages", out, "--json")
    assert ended.returncode == 0, ended.stderr
    notebooks = [f"notebooks/{path.stem}.html" for path in NOTEBOOKS]
    made = json.loads(ended.stdout)
    assert made["folder"] == str(out)
    assert made["pages"][: len(notebooks) + 1] == ["index.html", *notebooks]
    assert "assets/results.html" in made["pages"]
    assert ended.stderr == f"making {len(made['pages'])} pages …\n"
    return out


@pytest.fixture(scope="session")
def pages(site: Path) -> list[str]:
    """All that can be read, the search among it."""
    inner = ("_static", "_sources")
    names = [path.relative_to(site).as_posix() for path in site.rglob("*.html")]
    return sorted(name for name in names if not name.startswith(inner))


@pytest.fixture(scope="module")
def chromium(program: str) -> Iterator[browser.Browser]:
    with browser.opened(program) as started:
        yield started


@contextmanager
def reading(chromium: Any, width: int, scheme: str) -> Iterator[tuple[Any, list[str]]]:
    """A page to be sent from one address to the next, and a list of what goes wrong there."""
    size = {"width": width, "height": 900}
    wrong: list[str] = []
    with browser.empty_page(chromium, viewport=size, color_scheme=scheme) as page:
        page.on("console", lambda told: told.type != "log" and wrong.append(told.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(LOCAL) or wrong.append(asked.url))
        yield page, wrong


# ── In a browser ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("width", "scheme"), LOOKED_FOR)
def test_each_page_is_whole_and_asks_nobody(width, scheme, site, pages, chromium):
    def read(started) -> dict[str, list[str]]:
        found = {}
        with reading(started, width, scheme) as (page, wrong):
            for name in pages:
                page.goto((site / name).as_uri())
                assert page.evaluate("document.documentElement.dataset.theme") == scheme
                assert page.locator(".search-button-field:visible").count() <= 1
                found[name] = [*seen(page, width), *wrong]
                for options in LOOKED_FOR[width, scheme]:
                    found[name] += serious(page, options)
                wrong.clear()
        return found

    assert not {name: wrong for name, wrong in chromium.run(read).items() if wrong}


def seen(page: Any, width: int) -> list[str]:
    """What is missing on a `page`, too wide for it, or cannot be reached."""
    page.wait_for_timeout(100)  # the theme waits before it looks at what scrolls
    wide = page.evaluate("document.documentElement.scrollWidth")
    return [
        *(f"not loaded: {picture}" for picture in page.evaluate(NOT_LOADED)),
        *(f"out of reach: {box[:100]}" for box in page.evaluate(OUT_OF_REACH)),
        *([f"{wide} pixels wide"] if wide > width else []),
    ]


def serious(page: Any, options: dict[str, Any]) -> list[str]:
    """What axe-core finds serious or critical on a `page`."""
    from axe_playwright_python.sync_playwright import Axe

    if options is CONTRAST:
        page.evaluate(FOUR_OF_EACH_KIND)
    quick = {"resultTypes": ["violations"], "preload": False}
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]}"
        for one in Axe().run(page, options=quick | options).response["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def rare_words() -> dict[str, str]:
    """For each notebook, the word of its text that the fewest other pages have."""
    texts = {path: path.read_text("utf-8") for path in (*NOTEBOOKS, ROOT / "README.md")}
    found = {}
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
        prose = re.sub(r"!\[.*?\]\(.*?\)|\$.*?\$|`.*?`|<.*?>", " ", prose, flags=re.S)
        words = Counter(re.findall(r"(?<![\w./-])[a-z]{7,}(?![\w./-])", prose))
        others = [text for one, text in texts.items() if one != path]
        # The search takes words of one stem for the same.
        found[path.stem] = min(words, key=lambda word: sum(word[:5] in text for text in others))
    return found


def test_the_search_finds_a_word_of_each_notebook(site, chromium):
    words = rare_words() | {"none": "xylophonequartz"}

    def results(started) -> dict[str, list[str]]:
        found = {}
        with reading(started, 1280, "light") as (page, wrong):
            for notebook, word in words.items():
                page.goto((site / "index.html").as_uri())
                page.keyboard.press("Control+k")
                page.keyboard.type(word)
                page.keyboard.press("Enter")
                page.wait_for_url("**/search.html*")
                page.get_by_text(re.compile("Search finished|did not match")).wait_for()
                links = page.locator("#search-results li a").all()
                found[notebook] = [link.get_attribute("href") for link in links]
            assert not wrong
        return found

    for notebook, links in chromium.run(results).items():
        paths = [urlsplit(link).path for link in links]
        assert (f"notebooks/{notebook}.html" in paths) == (notebook != "none"), words[notebook]
        assert len(paths) <= len(NOTEBOOKS), words[notebook]


def test_a_search_on_a_server_shows_where_the_word_stands(site, chromium):
    def answer(route: Any) -> None:
        route.fulfill(path=site / urlsplit(route.request.url).path.strip("/"))

    def summary(started, word: str) -> str:
        with browser.empty_page(started) as page:
            page.context.route("**/*", answer)
            page.goto(f"http://localhost/search.html?q={word}")
            return page.locator("#search-results p.context").first.inner_text()

    word = next(iter(rare_words().values()))
    assert word in chromium.run(summary, word).lower()


def test_the_mode_can_be_chosen(site, chromium):
    def chosen(started) -> str:
        with reading(started, 1280, "light") as (page, _):
            page.goto((site / "index.html").as_uri())
            page.get_by_label("Color mode").click()
            page.get_by_text("Dark").click()
            page.goto((site / f"notebooks/{NOTEBOOKS[0].stem}.html").as_uri())
            return page.evaluate("document.documentElement.dataset.theme")

    assert chromium.run(chosen) == "dark"


# ── As files ────────────────────────────────────────────────────────────────────────────────────


class Read(HTMLParser):
    """What a page links to, loads, and can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.pictures: dict[str, str] = {}  # the alt text of each
        self.next: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            self.pictures[given["src"]] = given["alt"]
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        self.loaded += [given["src"]] if given.get("src") else []
        if given.get("href"):
            (self.loaded if tag == "link" else self.links).append(given["href"])
        if "right-next" in (given.get("class") or ""):
            self.next = given["href"]


def test_no_link_is_dead(site, pages):
    read = {(site / name).resolve(): Read(site / name) for name in pages}
    dead = []
    for path, page in read.items():
        for link in (*page.links, *page.loaded):
            url = urlsplit(link)
            if url.scheme:
                assert link in page.links, f"{path.name} loads {link}"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            names = read[target].names if target in read else set()
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in names):
                dead.append(f"{path.name}: {link}")
    assert not dead


def test_pictures_have_words_for_who_does_not_see_them(site, pages):
    for name in pages:
        for source, words in Read(site / name).pictures.items():
            assert " " in words, f"{name}: {source}: {words!r}"


def test_from_page_to_page(site):
    page, order = site / "index.html", []
    while following := Read(page).next:
        page = (page.parent / following).resolve()
        order.append(page.stem)
    others = ["README", *(path.stem for path in sorted(ROOT.glob("assets/*.md")))]
    assert order == [*(path.stem for path in NOTEBOOKS), *others]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_can_be_downloaded_as_it_is(path, site):
    source = f"_sources/notebooks/{path.name}"
    assert f"../{source}" in Read(site / f"notebooks/{path.stem}.html").links
    assert (site / source).read_bytes() == path.read_bytes()


# ── Another repository ──────────────────────────────────────────────────────────────────────────

BUILD = "import sys; from pathlib import Path; from helpers.figures import pages"
BUILD += "\nprint(pages.build(sys.argv[1], Path(sys.argv[2])))"
README = """# Small: a repository

[One](notebooks/00_one.ipynb#last), the [code](helpers/), [a module](helpers/a.py).

<img src="assets/a.svg" alt="a square of red" width="20">
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """A README, a module, a picture; a notebook with a folded cell, a formula and a link back."""
    root = tmp_path / "repository"
    red = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    for name, text in {"README.md": README, "helpers/a.py": "A = 1\n", "assets/a.svg": red}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    cells = [
        nbformat.v4.new_markdown_cell("# One\n\nBack to [it](../README.md).\n\n$$\\frac{a}{b}$$"),
        nbformat.v4.new_code_cell("assert 1", metadata={"tags": ["hide-input"]}),
        nbformat.v4.new_markdown_cell("## Last"),
    ]
    (root / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, root / "notebooks" / "00_one.ipynb")
    return root


def test_links_to_what_is_no_page_and_cells_that_are_folded(repository, tmp_path):
    ended = command("-c", BUILD, tmp_path / "out", repository)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{tmp_path / 'out' / 'index.html'}: 2 pages\n"
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "the code, <a" in index
    read = Read(tmp_path / "out" / "index.html")
    assert read.pictures == {"_images/a.svg": "a square of red"}
    links = read.links
    [module] = [link for link in links if link.endswith("a.py")]
    assert (tmp_path / "out" / module).read_text(encoding="utf-8") == "A = 1\n"
    assert "notebooks/00_one.html#last" in links
    one = (tmp_path / "out" / "notebooks" / "00_one.html").read_text(encoding="utf-8")
    assert "../index.html" in Read(tmp_path / "out" / "notebooks" / "00_one.html").links
    assert re.search(r"<details class=[^>]*hide[^>]*>.*?assert.*?</details>", one, re.S)
    assert "<mfrac>" in one


def test_a_warning_of_sphinx_is_an_error(repository, tmp_path):
    (repository / "README.md").write_text(README.replace("#last", "#lost"), encoding="utf-8")
    ended = command("-c", BUILD, tmp_path / "out", repository)
    assert ended.returncode == 1
    line = ended.stderr.splitlines()[-1]
    assert "expected pages without a warning of Sphinx, found: README.md:3: WARNING: " in line
    assert "lost" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository"]


# ── Where they are put ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def quick(monkeypatch):
    """In place of Sphinx."""

    def run(source: Path, out: Path, doctrees: Path) -> None:
        for name in ("notebooks", "helpers", "assets"):
            (out / "_sources" / name).mkdir(parents=True)
        (out / "index.html").write_text("made", encoding="utf-8")

    monkeypatch.setattr(building, "_run_sphinx", run)


def refused(capfd, out: Path) -> str:
    before = {path: path.stat().st_mtime for path in out.parent.rglob("*")}
    assert main(["pages", str(out)]) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert {path: path.stat().st_mtime for path in out.parent.rglob("*")} == before
    [line] = [line for line in told.err.splitlines() if not line.endswith("…")]
    assert line.startswith(f"{out}: expected ")
    return line


def test_pages_are_replaced_and_nothing_else_is(quick, tmp_path, capfd):
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["pages", str(out)]) == 0
        assert [*tmp_path.iterdir()] == [out]
        capfd.readouterr()
    (out / "index.html").write_text("old", encoding="utf-8")
    assert main(["pages", str(out), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["folder"] == str(out)
    assert (out / "index.html").read_text(encoding="utf-8") == "made"
    (out / "CNAME").write_text("mine", encoding="utf-8")
    assert "found CNAME too; move it away" in refused(capfd, out)


@pytest.mark.parametrize("inside", [(), ("mine.txt",)])
def test_a_folder_of_others_is_refused(inside, quick, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    for name in inside:
        (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    assert "found another folder; choose another name" in refused(capfd, tmp_path / "out")


def test_a_file_and_a_missing_folder_are_refused(quick, tmp_path, capfd):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    assert "found another file; choose another name" in refused(capfd, tmp_path / "out")
    missing = tmp_path / "missing" / "out"
    assert main(["pages", str(missing)]) == 2
    assert f"found none; create {missing.parent}" in capfd.readouterr().err


def test_what_cannot_be_moved_leaves_the_old_pages(quick, tmp_path, monkeypatch):
    out = tmp_path / "out"
    building.build(out)
    before, replace = sorted(out.rglob("*")), Path.replace

    def fails(path: Path, target: Path) -> Path:
        if target == out and path.name == "out":
            raise OSError("full")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(files.BadInput, match="found: full; make room"):
        building.build(out)
    assert sorted(out.rglob("*")) == before
    assert [*tmp_path.iterdir()] == [out]


def test_without_sphinx_its_package_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    line = refused(capfd, tmp_path / "out")
    assert "expected the package myst_nb, found that it is not installed; pip install" in line


def test_without_a_readme_or_a_notebook(tmp_path):
    with pytest.raises(files.BadInput, match="in a clone of the repository"):
        building.build(tmp_path / "out", tmp_path)
    assert not [*tmp_path.iterdir()]
