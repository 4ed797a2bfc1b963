"""A graph drawn by Netron in headless Chromium, with marks that need no colour.

Nothing is served and nothing is sent: each request of the page is answered from Netron's package on
disk, or refused. The picture is Netron's own SVG export; a PNG is that SVG, rendered.
"""

import base64
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.dom import minidom

from helpers.files import BadInput, replacing

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SUFFIXES = (".svg", ".png")
TIMEOUT = 60  # seconds for each step in the browser
# Arial, Liberation Sans and Helvetica have the same widths: what fits its box here fits elsewhere.
FONT = "Arial, 'Liberation Sans', Helvetica, sans-serif"
MONOSPACE = "'Liberation Mono', 'Courier New', monospace"
CHARACTER, LINE = 6.6, 20  # width of a character of the labels (11 px), height of a line
MARGIN = 16  # marks reach out of the picture that Netron drew
PATH_GAP, BREAK_GAP = 3, 7  # from a node's box to its outline


def chromium(given: str | Path | None = None) -> str:
    """Chromium's program: `given`, or that of the environment variable CHROMIUM, or on PATH."""
    wanted = given or os.environ.get("CHROMIUM")
    for name in (str(wanted),) if wanted else CHROMIUM:
        if found := shutil.which(name):
            return found
    raise BadInput(
        f"{wanted or 'Chromium'}: expected a program that draws the picture, found none; install it"
        " (Debian: apt-get install chromium), or name it with --chromium or in CHROMIUM"
    )


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """`files.replacing` for a picture, by the name of what it can be."""
    path = Path(path).absolute()
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{path}: expected a name that ends in .svg or .png; choose another")
    with replacing(path) as draft:
        yield draft


def draw(
    model: bytes,
    save_as: Path,
    program: str,
    *,
    nodes: Sequence[tuple[str, str]],
    around: int | None,
    along: Sequence[int],
    break_at: int | None,
    text: str,
) -> None:
    """Draw an ONNX model whose nodes are named 0, 1, …, and mark some of them.

    `nodes` has the operator and the name of each; `text` is the text alternative.
    """
    marks = {"around": around, "along": along, "break_at": break_at}

    def work() -> None:
        with _browser(program) as browser:
            svg = mark(_export(browser, model), nodes, text, **marks)
            if save_as.suffix == ".svg":
                save_as.write_text(svg, encoding="utf-8")
            else:
                save_as.write_bytes(_render(browser, svg))

    # Playwright refuses a thread that runs an event loop, as a notebook's does.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


# ── The browser ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _browser(program: str) -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium has no sandbox for root
    with sync_playwright() as playwright:

        def launch(sandbox: bool) -> Any:
            return playwright.chromium.launch(
                executable_path=program,
                chromium_sandbox=sandbox,
                # Chromium itself asks for updates and the like: no host has an address.
                args=["--host-resolver-rules=MAP * ~NOTFOUND"],
                timeout=TIMEOUT * 1000,
            )

        try:
            try:
                browser = launch(sandbox=not root)
            except Error as error:
                if root or "sandbox" not in str(error):
                    raise
                browser = launch(sandbox=False)  # as in a container that allows none
            with browser:
                yield browser
        except Error as error:
            reason = str(error).partition("\n")[0]
            raise BadInput(
                f"{program}: expected Chromium to start and Netron to draw in it within {TIMEOUT} s"
                f" a step, found: {reason}; try again, or another Chromium with --chromium"
            ) from None


def _export(browser: Any, model: bytes) -> str:
    """Netron's own SVG export of `model`."""
    import netron

    package = Path(netron.__file__).parent
    home = "http://localhost"

    def answer(route: Any) -> None:
        url = urlsplit(route.request.url)
        file = package / (url.path.strip("/") or "index.html")
        if f"{url.scheme}://{url.netloc}" != home or not file.is_file():
            route.abort()
        elif file.name == "grapher.css":
            css = re.sub(r"(?<=font-family: )[^;]+", FONT, file.read_text(encoding="utf-8"))
            route.fulfill(body=css, content_type="text/css")
        else:
            route.fulfill(path=file)

    context = browser.new_context()
    context.set_default_timeout(TIMEOUT * 1000)
    context.add_cookies([{"name": "consent", "value": "yes", "url": home}])  # else it asks the web
    context.route("**/*", answer)
    page = context.new_page()
    page.goto(home)
    message = page.locator("#message-text")
    # Ready, or a message: from 180 days after its release Netron only says to update it.
    page.locator("body.welcome:not(.spinner), body.alert, body.notification").wait_for()
    if not message.is_visible():
        file = {"name": "model.onnx", "mimeType": "application/octet-stream", "buffer": model}
        page.locator("#open-file-dialog").set_input_files([file])
        page.locator("body.default:not(.notification), body.alert").wait_for()
    if message.is_visible():
        raise BadInput(
            f"netron {netron.__version__}: expected a picture, found the message"
            f" {message.inner_text()!r}; update it: pip install --upgrade netron"
        )
    with page.expect_download() as download:
        page.keyboard.press("Control+Alt+e")
    return Path(download.value.path()).read_text(encoding="utf-8")


def _render(browser: Any, svg: str) -> bytes:
    """`svg` as a PNG of twice its size (or what Chromium can draw at most: 16,384 pixels)."""
    root = minidom.parseString(svg).documentElement
    width, height = int(root.getAttribute("width")), int(root.getAttribute("height"))
    context = browser.new_context(device_scale_factor=min(2, 16384 / max(width, height)))
    page = context.new_page()
    data = base64.b64encode(svg.encode()).decode()
    page.set_content(f'<img style="display: block" src="data:image/svg+xml;base64,{data}">')
    return page.locator("img").screenshot()


# ── The marks ───────────────────────────────────────────────────────────────────────────────────


def mark(
    svg: str,
    nodes: Sequence[tuple[str, str]],
    text: str,
    *,
    around: int | None = None,
    along: Sequence[int] = (),
    break_at: int | None = None,
) -> str:
    """Netron's export `svg` with the marks, a line below for each of them, and a text alternative.

    A node of the path gets a solid outline and its number in a disc, the node asked for a thicker
    one and a triangle, the break a dashed one and a cross in a square. Each node gets its name as a
    tooltip.
    """
    # Netron writes shapes in brackets that only Chinese and Japanese fonts have.
    root = minidom.parseString(svg.replace("〈", " [").replace("〉", "]")).documentElement
    drawn = {
        group.getAttribute("id").removeprefix("node-name-"): group
        for group in root.getElementsByTagName("g")
        if group.parentNode.getAttribute("id") == "nodes"
    }
    if missing := [name for i, (_, name) in enumerate(nodes) if str(i) not in drawn]:
        import netron

        raise BadInput(
            f"netron {netron.__version__}: expected a drawing of {len(nodes)} nodes, found none of"
            f" {', '.join(missing[:3])}; install the version in requirements.txt"
        )
    for i, (_, name) in enumerate(nodes):
        group = drawn[str(i)]
        for title in group.getElementsByTagName("title"):
            if title.firstChild.data == str(i):  # the number that it was given for a name
                title.parentNode.removeChild(title)
        _put(group, "title", _printable(name), first=True)

    width, height = int(root.getAttribute("width")), int(root.getAttribute("height"))
    columns = max(44, int((width - 2 * LINE) / CHARACTER))
    kinds = [("around", "", around), *(("path", str(i), n) for i, n in enumerate(along, 1))]
    marks = [mark for mark in (*kinds, ("break", "", break_at)) if mark[2] is not None]
    corners = [_outline(drawn[str(node)], kind) for kind, _, node in marks]
    for line, (kind, number, node) in enumerate(marks):
        _badge(drawn[str(node)], kind, number, *corners[line])
        y = height + LINE * (line + 0.5)
        _badge(root, kind, number, 10, y)
        operator, name = nodes[node]
        label = f"{kind} {number}".strip() + f": {operator} "
        name, room = _printable(name), columns - len(label)
        label += name if len(name) <= room else f"…{name[1 - room :]}"
        style = {"font-family": MONOSPACE, "font-size": 11, "textLength": CHARACTER * len(label)}
        _put(root, "text", label, x=24, y=y + 4, **style)
        width = max(width, int(24 + CHARACTER * len(label)) + 1)
    box = (-MARGIN, -MARGIN, width + 2 * MARGIN, height + LINE * len(marks) + 2 * MARGIN)
    rectangles = root.getElementsByTagName("rect")
    background = next(each for each in rectangles if each.getAttribute("id") == "background")
    for name, value in zip(("x", "y", "width", "height"), box, strict=True):
        background.setAttribute(name, str(value))
    for name in ("id", "style"):
        root.removeAttribute(name)
    root.setAttribute("viewBox", " ".join(map(str, box)))
    for name, value in (("width", box[2]), ("height", box[3]), ("role", "img")):
        root.setAttribute(name, str(value))
    root.setAttribute("aria-labelledby", "title")
    _put(root, "title", _printable(text), first=True, id="title")
    return root.toxml() + "\n"


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in name)  # XML forbids the others


def _put(parent: Any, tag: str, text: str = "", first: bool = False, **attributes: Any) -> None:
    element = parent.ownerDocument.createElement(tag)
    for name, value in attributes.items():
        element.setAttribute(name, f"{value:g}" if isinstance(value, float) else str(value))
    if text:
        element.appendChild(parent.ownerDocument.createTextNode(text))
    parent.insertBefore(element, parent.firstChild if first else None)


def _size(group: Any) -> tuple[float, float]:
    """Width and height of a node's box, whose border is a rectangle with round corners."""
    border = next(
        path.getAttribute("d")
        for path in group.getElementsByTagName("path")
        if path.parentNode is group and path.getAttribute("class") == "node node-border"
    )
    across, radius, down = map(
        float, re.search(r"h([\d.]+)a([\d.]+),.*?v([\d.]+)a", border).groups()
    )
    return across + 2 * radius, down + 2 * radius


def _outline(group: Any, kind: str) -> tuple[float, float]:
    """Mark a node, in its own coordinates: its box begins at 0, 0. Returns where the badge goes."""
    width, height = _size(group)
    gap = BREAK_GAP if kind == "break" else PATH_GAP
    stroke = {"path": "2px", "around": "4px", "break": "2.5px; stroke-dasharray: 7 4"}[kind]
    box = {"x": -gap, "y": -gap, "width": width + 2 * gap, "height": height + 2 * gap}
    _put(
        group, "rect", **box, rx=gap + 4, style=f"fill: none; stroke: #000; stroke-width: {stroke}"
    )
    right, bottom = width + gap, height + gap
    return {"path": (-gap, -gap), "around": (right, -gap), "break": (right, bottom)}[kind]


def _badge(parent: Any, kind: str, number: str, x: float, y: float) -> None:
    """The sign of a mark, at most 16 pixels across, around `x`, `y`."""
    if kind == "path":
        _put(parent, "circle", cx=x, cy=y, r=8, style="fill: #000; stroke: #fff")
        style = f"font-family: {FONT}; font-size: 11px; font-weight: bold; fill: #fff"
        _put(parent, "text", number, x=x, y=y + 4, style=f"{style}; text-anchor: middle")
    elif kind == "around":
        triangle = f"M{x - 8:g},{y - 7:g}h16l-8,14z"
        _put(parent, "path", d=triangle, style="fill: #000; stroke: #fff")
    else:
        style = "fill: #fff; stroke: #000; stroke-width: 1.5px"
        _put(parent, "rect", x=x - 7, y=y - 7, width=14, height=14, style=style)
        cross = f"M{x - 4:g},{y - 4:g}l8,8m0,-8l-8,8"
        _put(parent, "path", d=cross, style="fill: none; stroke: #000; stroke-width: 2px")
