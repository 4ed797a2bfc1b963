"""Netron in headless Chromium: a graph drawn, exported as SVG, rendered."""

import base64
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from xml.dom import minidom

from helpers.files import BadInput, replacing

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

SUFFIXES = (".svg", ".png")

TIMEOUT = 60  # seconds for each step in the browser

HOME = "http://localhost"  # of Netron's page: nothing listens there

# Arial, Liberation Sans and Helvetica have the same widths: what fits its box here fits elsewhere.
FONT = "Arial, 'Liberation Sans', Helvetica, sans-serif"

BORDERS = """() => Array.from(document.querySelectorAll("#nodes > g > .node-border"), border => {
    const { width, height } = border.getBBox();
    return [border.parentNode.id, width, height];
})"""

Sizes = dict[str, tuple[float, float]]  # width and height of a node's box, by its group's id
Answer = TypeVar("Answer")


def chromium(given: str | Path | None = None) -> str:
    """Chromium's program: `given`, or that of the environment variable CHROMIUM, or on PATH."""
    wanted = given or os.environ.get("CHROMIUM")
    for name in (str(wanted),) if wanted else CHROMIUM:
        if located := shutil.which(name):
            return located
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


class Browser:
    """Headless Chromium that draws one picture after the other, in a thread of its own.

    Playwright refuses a thread that runs an event loop, as a notebook's does.
    """

    def __init__(self, program: str, thread: ThreadPoolExecutor, chromium: Any) -> None:
        self._program, self._thread, self._chromium = program, thread, chromium

    def run(self, step: Callable[..., Answer], *arguments: Any) -> Answer:
        """What a `step` below returns, given Chromium and the `arguments`."""
        with _told(self._program):
            return self._thread.submit(step, self._chromium, *arguments).result()


@contextmanager
def opened(program: str) -> Iterator[Browser]:
    """Chromium, started from `program`, until the context ends. Raises `files.BadInput`."""
    with ThreadPoolExecutor(1) as thread:
        session = ExitStack()
        try:
            chromium = thread.submit(session.enter_context, _started(program)).result()
            yield Browser(program, thread, chromium)
        finally:
            thread.submit(session.close).result()


@contextmanager
def _started(program: str) -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium has no sandbox for root
    with _told(program), sync_playwright() as playwright:

        def launch(sandbox: bool) -> Any:
            return playwright.chromium.launch(
                executable_path=program,
                chromium_sandbox=sandbox,
                # Chromium itself asks for updates and the like: no host has an address.
                args=["--host-resolver-rules=MAP * ~NOTFOUND"],
                timeout=TIMEOUT * 1000,
            )

        try:
            chromium = launch(sandbox=not root)
        except Error as error:
            if root or "sandbox" not in str(error):
                raise
            chromium = launch(sandbox=False)  # as in a container that allows none
        with chromium:
            yield chromium


@contextmanager
def _told(program: str) -> Iterator[None]:
    """What Playwright raises, as `files.BadInput`."""
    from playwright.sync_api import Error

    try:
        yield
    except Error as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(
            f"{program}: expected Chromium to start and Netron to draw in it within {TIMEOUT} s"
            f" a step, found: {reason}; try again, or another Chromium with --chromium"
        ) from None


def exported(chromium: Any, model: bytes) -> tuple[str, Sizes]:
    """Netron's own SVG export of `model`, and the `sizes` in it."""
    consent = {"name": "consent", "value": "yes", "url": HOME}  # else it asks the web
    with empty_page(chromium) as page:
        page.context.add_cookies([consent])
        page.context.route("**/*", _answer)
        page.goto(HOME)
        _load(page, model)
        with page.expect_download() as download:
            page.keyboard.press("Control+Alt+e")
        svg = Path(download.value.path()).read_text(encoding="utf-8")
        # Netron's page runs no script of others, and on being left sends what no route catches.
        return svg, sizes(page.context.new_page(), svg)


@contextmanager
def empty_page(chromium: Any, **options: Any) -> Iterator[Any]:
    """An empty page that shares nothing with another."""
    with chromium.new_context(**options) as context:
        context.set_default_timeout(TIMEOUT * 1000)
        yield context.new_page()


def _answer(route: Any) -> None:
    """Answer a request of Netron's page with a file of its package, or refuse it."""
    import netron

    url = urlsplit(route.request.url)
    file = Path(netron.__file__).parent / (url.path.strip("/") or "index.html")
    if f"{url.scheme}://{url.netloc}" != HOME or not file.is_file():
        route.abort()
    elif file.name == "grapher.css":
        css = re.sub(r"(?<=font-family: )[^;]+", FONT, file.read_text(encoding="utf-8"))
        route.fulfill(body=css, content_type="text/css")
    else:
        route.fulfill(path=file)


def _load(page: Any, model: bytes) -> None:
    """Open `model` in Netron's `page`, which shows its graph or a message."""
    import netron

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


def sizes(page: Any, svg: str) -> Sizes:
    """The sizes of the nodes' boxes in Netron's export `svg`, as an empty `page` lays it out."""
    page.set_content(svg)
    return {group: (width, height) for group, width, height in page.evaluate(BORDERS)}


def rendered(chromium: Any, svg: str) -> bytes:
    """`svg` as a PNG of twice its size (or what Chromium can draw at most: 16,384 pixels)."""
    root = minidom.parseString(svg).documentElement
    width, height = int(root.getAttribute("width")), int(root.getAttribute("height"))
    scale = min(2, 16384 / max(width, height))
    data = base64.b64encode(svg.encode()).decode()
    with empty_page(chromium, device_scale_factor=scale) as page:
        page.set_content(f'<img style="display: block" src="data:image/svg+xml;base64,{data}">')
        return page.locator("img").screenshot()
