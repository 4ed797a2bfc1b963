"""Netron in headless Chromium: a graph drawn, exported as SVG, rendered."""

import base64
import os
import re
import shutil
from collections.abc import Iterator
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


@contextmanager
def opened(program: str) -> Iterator[Any]:
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


def exported(browser: Any, model: bytes) -> str:
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


def rendered(browser: Any, svg: str) -> bytes:
    """`svg` as a PNG of twice its size (or what Chromium can draw at most: 16,384 pixels)."""
    root = minidom.parseString(svg).documentElement
    width, height = int(root.getAttribute("width")), int(root.getAttribute("height"))
    context = browser.new_context(device_scale_factor=min(2, 16384 / max(width, height)))
    page = context.new_page()
    data = base64.b64encode(svg.encode()).decode()
    page.set_content(f'<img style="display: block" src="data:image/svg+xml;base64,{data}">')
    return page.locator("img").screenshot()
