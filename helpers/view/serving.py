"""Netron's page, served on this machine to a notebook or a browser; it asks nothing of another.

Netron's own server hands out a page that asks for consent (and before that asks ipinfo.io where it
is) and reports to Google Analytics. Here the same files get a few lines at the head of the page
that leave it no reason to do either, and a policy under which the browser refuses it.
"""

from __future__ import annotations

import functools
import http.server
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote, urlsplit

logger = logging.getLogger(__name__)

PORT = 8080  # tried first, as Netron does: a port that is forwarded stays the same

TYPES = {
    ".css": "text/css",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
}

# 0.0.0 is what Netron calls itself when it runs from its sources: it reports nothing then.
HEAD = """<head>
<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline' data: blob:">
<meta name="version" content="0.0.0">
<meta name="file" content="data/{url}">
<meta name="identifier" content="{name}">
<script src="consent.js"></script>"""

# Netron asks unless a cookie says that it has asked. Browsers keep none for a frame on another site
# (behind a proxy, in an editor), and none is needed: the page reads its cookies from here.
CONSENT = b'Object.defineProperty(document, "cookie", { get: () => "consent=yes", set() {} });\n'

# The frame, in the place of the text that holds it, with the first address that answers.
# Jupyter's page says where Jupyter is, and there jupyter-server-proxy hands on what a port answers.
SHOW = """async (output, port, path, height) => {
    const direct = `http://localhost:${port}/${path}`;
    const config = document.getElementById("jupyter-config-data");
    const jupyter = config ? JSON.parse(config.textContent).baseUrl : document.body.dataset.baseUrl;
    const near = /^(localhost|127\\..*|\\[::1\\])$/.test(location.hostname);
    const addresses = near || !location.protocol.startsWith("http") ? [direct] : [];
    if (jupyter) {
        addresses.push(new URL(`${jupyter}proxy/${port}/${path}`, location.href).href);
    }
    for (const address of addresses) {
        const page = await fetch(address).then(answer => answer.text(), () => "");
        if (page.includes("consent.js")) {  // and not another program on the port, or Jupyter's 404
            const frame = document.createElement("iframe");
            Object.assign(frame, { src: address, title: "Netron", width: "100%", height });
            frame.style.border = "none";
            output.replaceChildren(frame);
            return;
        }
    }
    output.textContent = `Netron runs on port ${port} of the kernel's machine, which this page does`
        + " not reach. Install jupyter-server-proxy beside Jupyter and restart it, or forward the"
        + ` port (ssh -L ${port}:localhost:${port} HOST) and open ${direct}`;
}"""


class Server(http.server.ThreadingHTTPServer):
    """Models, each of them under a path of its own that cannot be guessed."""

    allow_reuse_address = os.name == "posix"  # elsewhere it shares the port with who has it

    def __init__(self, port: int) -> None:
        super().__init__(("localhost", port), _Handler)
        self.files: dict[str, Mapping[str, bytes | Path]] = {}  # by name, for each path

    def add(self, model: Path, data: Mapping[str, bytes | Path]) -> str:
        """Serve Netron with `model`, one of the `data` by name; returns the path of its page."""
        token = secrets.token_urlsafe(12)
        of_data = {f"data/{name}": content for name, content in data.items()}
        self.files[token] = {**_netron(model.name), **of_data}
        return f"{token}/"

    def handle_error(self, *_: object) -> None:
        logger.debug("a browser left before it was answered", exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        token, _, name = unquote(urlsplit(self.path).path).removeprefix("/").partition("/")
        content = self.server.files.get(token, {}).get(name or "index.html")
        if content is None or (isinstance(content, Path) and not content.is_file()):
            self.send_error(404)
            return
        kind = TYPES.get(Path(name or "index.html").suffix, "application/octet-stream")
        with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(file.seek(0, os.SEEK_END)))
            self.send_header("Access-Control-Allow-Origin", "*")  # a notebook asks if it is there
            self.end_headers()
            file.seek(0)
            shutil.copyfileobj(file, self.wfile)

    def log_message(self, message: str, *arguments: object) -> None:
        logger.debug(message, *arguments)


def _netron(model: str) -> dict[str, bytes | Path]:
    """The files of Netron's page by their names; the page opens the `model` of that name."""
    import netron

    package = Path(netron.__file__).parent
    files = {file.name: file for file in package.iterdir() if file.suffix in TYPES}
    page = files["index.html"].read_text(encoding="utf-8")
    # Netron takes the first of two that have one name.
    page = page.replace("<head>", HEAD.format(url=quote(model), name=escape(model)), 1)
    return {**files, "index.html": page.encode(), "consent.js": CONSENT}


@functools.cache
def server() -> Server:
    """The server of this process, started where it is first asked for."""
    try:
        started = Server(PORT)
    except OSError:  # taken
        started = Server(0)
    threading.Thread(target=started.serve_forever, name="netron", daemon=True).start()
    return started


def html(path: str, height: int) -> str:
    """A notebook's output that shows what `server` has at `path`, or says why it cannot."""
    call = f'document.currentScript.parentElement, {server().server_port}, "{path}", {height}'
    return f"<div>Run this cell to see the graph here.<script>({SHOW})({call})</script></div>"


def wait() -> NoReturn:
    """Keep the process, and so its `server`, alive until Ctrl-C."""
    while True:
        time.sleep(1)
