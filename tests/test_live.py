"""Netron live in a real JupyterLab, and a notebook's pictures: nothing asked of another machine."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import nbformat
import pytest
from graphs import write

from helpers import view

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = "notebooks/01_wav2vec2.ipynb"  # opened in place of the one that a reader has run
[COMMAND] = re.findall(r"^\.venv/bin/jupyter lab .*(?= exports/\S+\.ipynb$)", README, re.M)
TOKEN = "open-sesame"
REMOTE = "lab.example"  # this machine, under a name that does not say so

SHOW = 'from helpers import view\nview.show("tiny.onnx", "n_softmax", up=2, down=1)'
NODES = {f"node-name-{name}" for name in ("n_scores", "n_scale", "n_softmax", "n_context")}

# Not as for a reader: all cells are drawn, also those far from the screen, and no news is fetched.
SETTINGS = {
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}


class Lab(NamedTuple):
    port: int
    opened: str  # the address that it opens in a browser

    def live(self, host: str) -> str:
        address = self.opened.replace("localhost", host, 1)
        return re.sub(r"[^/]*$", f"live.ipynb?reset&token={TOKEN}", address)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a JupyterLab whose own files are all in `folder`."""
    for name, text in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    browser = folder / "browser"  # writes down what it is to open
    browser.write_text(
        f'#!/bin/sh\ncp "${{1#file://}}" "{folder}/part" && mv "{folder}/part" "{folder}/opened"\n'
    )
    browser.chmod(0o755)
    own = {name: str(folder / name) for name in ("config", "data", "runtime")}
    return {
        **os.environ,
        **{f"JUPYTER_{name.upper()}_DIR": path for name, path in own.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "BROWSER": f"{browser} %s",
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """JupyterLab, started as the README says in a copy of the repository, under a path."""
    folder, own = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "assets", folder / "assets", ignore=shutil.ignore_patterns("*.csv"))
    arguments = [*shlex.split(COMMAND.partition(" lab ")[2]), NOTEBOOK]
    (folder / "notebooks").mkdir()
    shutil.copy(ROOT / arguments[-1], folder / "notebooks")
    write(folder / "notebooks" / "tiny.onnx")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "notebooks" / "live.ipynb")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "ServerApp.port": port,
        "ServerApp.base_url": "/user/ada/",
        "ServerApp.allow_remote_access": True,
        "IdentityProvider.token": TOKEN,
        "LabApp.news_url": None,
        "LabApp.extension_manager": "readonly",
    }
    command = [sys.executable, "-m", "jupyterlab", *arguments, "--allow-root"]
    command += [f"--{name}={value}" for name, value in options.items()]
    opened = own / "opened"
    with (own / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(own), stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while not opened.exists():
            assert process.poll() is None, (own / "log").read_text()
            assert time.monotonic() < deadline, (own / "log").read_text()
            time.sleep(0.1)
        yield Lab(port, re.search(r'href="([^"]+)"', opened.read_text())[1])
    finally:
        process.send_signal(signal.SIGTERM)  # its kernels end with it
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def chromium(program):
    """Chromium, which finds this machine alone."""
    from playwright.sync_api import sync_playwright

    rules = f"MAP {REMOTE} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE localhost"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=program,
            chromium_sandbox=False,
            args=[f"--host-resolver-rules={rules}"],
        )
        with launched:
            yield launched


class Told:
    """What a page and its frames ask for, and the errors in its console."""

    def __init__(self, page) -> None:
        self.page, self.asked, self.errors = page, [], []
        page.context.on("request", lambda request: self.asked.append(request.url))
        page.on("console", self._log)

    def _log(self, message) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    @property
    def hosts(self) -> set[str]:
        return {urlsplit(url).hostname for url in self.asked if not url.startswith("data:")}


@pytest.fixture
def told(chromium) -> Iterator[Told]:
    with chromium.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(30_000)
        yield Told(context.new_page())


def run(page, address: str) -> None:
    """Run the one cell of the notebook there."""
    page.goto(address)
    page.locator(".jp-CodeCell .cm-content").click()
    prompt = ".jp-CodeCell .jp-InputPrompt"
    for _ in range(9):  # JupyterLab forgets a cell that is run at the moment its kernel has started
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(300)
        page.wait_for_function(f"!document.querySelector('{prompt}').innerText.includes('*')")
        if page.locator(prompt).inner_text() != "[ ]:":
            break


def drawn(page) -> tuple[str, set[str]]:
    """The address of Netron's frame, and the nodes that it shows and nothing over them."""
    output = page.frame_locator(".jp-OutputArea iframe")
    output.locator("body.default .node-border").first.wait_for()
    assert not output.locator("#message-text").is_visible()
    nodes = output.locator("#nodes > g[id^=node-name-]").all()
    address = page.locator(".jp-OutputArea iframe").get_attribute("src")
    return address, {node.get_attribute("id") for node in nodes}


def test_netron_in_a_notebook_asks_nothing_of_another_machine(lab, told):
    run(told.page, lab.live("localhost"))
    address, nodes = drawn(told.page)
    assert re.fullmatch(r"http://localhost:\d+/[\w-]{16}/", address)
    assert nodes == NODES
    told.page.goto("about:blank")  # Netron's page reports that it is left, too
    assert told.hosts == {"localhost"}
    assert told.errors == []


def test_elsewhere_the_frame_comes_through_the_proxy_of_jupyter(lab, told):
    run(told.page, lab.live(REMOTE))
    address, nodes = drawn(told.page)
    assert re.fullmatch(rf"http://{REMOTE}:{lab.port}/user/ada/proxy/\d+/[\w-]{{16}}/", address)
    assert nodes == NODES
    told.page.goto("about:blank")
    assert told.hosts == {REMOTE}
    assert told.errors == []


def test_without_a_proxy_a_line_says_what_to_do(lab, told):
    # What Jupyter answers without jupyter-server-proxy.
    told.page.route("**/proxy/**", lambda route: route.fulfill(status=404))
    run(told.page, lab.live(REMOTE))
    line = told.page.get_by_text("Install jupyter-server-proxy beside Jupyter").inner_text()
    port = re.match(r"Netron runs on port (\d+) of the kernel's machine, which this", line)[1]
    assert f"(ssh -L {port}:localhost:{port} HOST) and open http://localhost:{port}/" in line
    assert told.page.locator(".jp-OutputArea iframe").count() == 0
    assert told.hosts == {REMOTE}


def test_a_page_on_this_machine_that_reaches_no_port_tries_the_proxy(lab, told):
    """As where Jupyter's port alone is forwarded, and another program has Netron's."""
    told.page.route(
        re.compile(r"http://localhost:\d+/[\w-]{16}/$"), lambda route: route.fulfill(body="other")
    )
    run(told.page, lab.live("localhost"))
    address, nodes = drawn(told.page)
    assert f"http://localhost:{lab.port}/user/ada/proxy/" in address
    assert nodes == NODES


def test_what_a_later_netron_may_try_is_refused(told, tmp_path):
    told.page.goto(view.serve(write(tmp_path / "a.onnx")))
    told.page.locator("body.default .node-border").first.wait_for()
    assert told.hosts == {"localhost"}
    assert told.errors == []
    session = told.page.context.new_cdp_session(told.page)  # Netron's page has no eval
    tries = [
        "fetch('{}').catch(() => null)",
        "navigator.sendBeacon('{}')",
        "new Image().src = '{}'",
    ]
    for i, expression in enumerate(tries):
        address = f"http://{REMOTE}/{i}"
        with told.page.expect_console_message(lambda m, to=address: to in m.text) as message:
            session.send("Runtime.evaluate", {"expression": expression.format(address)})
        assert "violates the following Content Security Policy" in message.value.text


def test_the_pictures_of_a_notebook_show_with_the_command_of_the_readme(lab, told):
    told.page.goto(lab.opened)
    file = ROOT / NOTEBOOK
    cells = nbformat.read(file, as_version=4).cells
    wanted = re.findall(r"!\[[^\]]*\]\(\.\./(assets/[^)]+)\)", "".join(c.source for c in cells))
    assert wanted
    pictures = told.page.locator(".jp-MarkdownOutput img")
    pictures.nth(len(wanted) - 1).wait_for()
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        told.page.wait_for_function("image => image.complete", arg=picture.element_handle())
    shown = pictures.evaluate_all("images => images.map(i => [i.src, i.naturalWidth])")
    assert [width > 0 for _, width in shown] == [True] * len(wanted)
    assert all(f"/files/{name}" in source for (source, _), name in zip(shown, wanted, strict=True))
    assert told.hosts == {"localhost"}
