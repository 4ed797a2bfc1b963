"""What of a graph is shown, the marks, and pictures that Netron draws in Chromium."""

import asyncio
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from xml.dom import minidom

import matplotlib.image
import netron
import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import ATTENTION, write

from helpers import view
from helpers.__main__ import main
from helpers.files import BadInput
from helpers.view import browser, marks, serving

NAMES = [line.split("]")[0].strip(" [") for line in ATTENTION.splitlines() if " = " in line]
HEAD = '<ir_version: 8, opset_import: ["" : 17]> g'
LONG = ATTENTION.replace("y = LayerNormalization", "r0 = LayerNormalization").rstrip("}\n") + (
    "".join(f"  [n_tail_{i}] r{i + 1} = Relu (r{i})\n" for i in range(60))
    + "  [n_end] y = Relu (r60)\n}"
)
ODD = f"""{HEAD} (float[n,8] x) => (float[n,8] y)
{{
  a = Relu (x)
  b = Sigmoid (a)
  [odd] c = Tanh (b)
  [zero] y = Add (c, a)
}}"""
ODD_NAME = '/layers.0/"q":\'<&>é中文\a/' + "proj/" * 20 + "Tanh"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A graph with nodes without a name, a number for a name, and a name of odd characters."""
    proto = onnx.parser.parse_model(ODD)
    proto.graph.node[2].name = ODD_NAME
    proto.graph.node[3].name = "0"
    onnx.save(proto, tmp_path / "odd.onnx")
    return tmp_path / "odd.onnx"


@pytest.fixture(scope="module")
def chromium(program: str) -> Iterator[browser.Browser]:
    """Started once for what is not about how it starts."""
    with view.drawing(program) as opened:
        yield opened


def shown(path: Path, *arguments: str, **choice) -> list[str]:
    return view.cut(path, *arguments, **choice).to_json()["nodes"]


# ── What is shown ───────────────────────────────────────────────────────────────────────────────


def test_a_small_graph_is_shown_whole_and_of_a_large_one_the_block(tmp_path):
    assert shown(write(tmp_path / "a.onnx")) == NAMES
    block = shown(write(tmp_path / "b.onnx", LONG))
    assert {"n_q", "n_softmax", "n_o_bias"} <= set(block) < set(NAMES)


def test_a_large_graph_without_a_site_asks_for_a_node(tmp_path):
    lines = "".join(f"x{i + 1} = Relu (x{i}) " for i in range(61))
    path = write(tmp_path / "a.onnx", f"{HEAD} (float[n] x0) => (float[n] x61) {{ {lines} }}")
    with pytest.raises(BadInput, match="61 nodes and no site; name a node with --around"):
        view.cut(path)
    assert shown(path, "x30", up=1, down=2) == ["x29", "x30", "x31", "x32"]


def test_around_counts_steps_and_takes_the_name_of_a_tensor(tmp_path):
    path = write(tmp_path / "a.onnx")
    near = ["n_scores", "n_scale", "n_softmax", "n_context"]
    assert shown(path, "n_softmax", up=2, down=1) == near
    assert shown(path, "p", up=2, down=1) == near
    assert shown(path, "n_softmax", up=0, down=0) == ["n_softmax"]
    assert len(shown(path, "n_softmax")) == 8


def test_what_is_named_is_shown_with_the_nodes_between(tmp_path):
    path = write(tmp_path / "a.onnx")
    chosen = view.cut(path, "n_softmax", along=["n_q_heads", "n_q"], break_at="n_v", up=0, down=0)
    answer = chosen.to_json()
    assert answer["marked"] == {
        "around": "n_softmax",
        "path": ["n_q_heads", "n_q"],
        "break": "n_v",
    }
    between = {"n_q_transpose", "n_scores", "n_scale", "n_q_bias"}
    assert set(answer["nodes"]) == {"n_softmax", "n_q_heads", "n_q", "n_v"} | between
    near = shown(path, "n_softmax", break_at="n_v", up=0, down=1)  # no way from one to the other
    assert set(near) == {"n_softmax", "n_context", "n_v", "n_v_bias", "n_v_heads", "n_v_transpose"}
    assert shown(path, "n_context", break_at="n_flat", up=0, down=0) == [
        "n_context",
        "n_merge",
        "n_flat",
    ]
    assert "Around Softmax n_softmax. Path: 1 Reshape n_q_heads, 2 MatMul n_q." in str(chosen)


def test_without_a_node_the_neighbourhood_is_that_of_the_path(tmp_path):
    path = write(tmp_path / "a.onnx")
    near = ["n_scores", "n_scale", "n_softmax", "n_context"]
    assert shown(path, along=["n_scale", "n_softmax"]) == near
    assert shown(path, break_at="n_norm") == ["n_residual", "n_norm"]
    assert shown(path, break_at="n_norm", up=0) == ["n_norm"]


def test_nodes_without_a_name_are_known_by_their_output(odd):
    assert shown(odd) == ["a", "b", ODD_NAME, "0"]
    chosen = view.cut(odd, "b", along=["0", ODD_NAME])
    assert chosen.to_json()["marked"] == {"around": "b", "path": ["0", ODD_NAME], "break": None}


def test_a_branch_is_shown_as_its_if_with_what_it_reads(tmp_path):
    text = f"""{HEAD} (float[n] x, bool[1] c) => (float[n] y) {{
      [n_before] a = Relu (x)
      [n_between] b = Exp (a)
      [n_if] y = If (c) <
        then_branch = one () => (float[n] t) {{ [n_inside] t = Sigmoid (b) }},
        else_branch = two () => (float[n] e) {{ [n_else] e = Tanh (b) }}
      >
    }}"""
    path = write(tmp_path / "a.onnx", text)
    chosen = view.cut(path, "n_if")
    assert chosen.to_json()["nodes"] == ["n_if"]
    assert {value.name for value in chosen.model.graph.inputs} == {"c", "b"}
    with pytest.raises(BadInput, match=r"'n_inside' in a branch or a body \(one\); name the If"):
        view.cut(path, "n_inside")


def test_large_weights_are_left_out_and_small_ones_keep_their_values(tmp_path):
    text = f"{HEAD} (float[n,8] x) => (float[n,8192] y) {{ h = Mul (x, half) y = MatMul (h, big) }}"
    path = write(tmp_path / "a.onnx", text, big=np.ones((8, 8192), np.float32))
    proto = view.cut(path).to_proto()
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert list(tensors["big"].dims) == [8, 8192]
    assert tensors["big"].data_location == onnx.TensorProto.DEFAULT  # or Netron asks for a file
    assert onnx.numpy_helper.to_array(tensors["half"]) == 0.5
    assert proto.ByteSize() < 1000


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--around", "n_sofmax"], "none named 'n_sofmax'; close to it: n_softmax"),
        (
            ["--path", "n_q", "?", "--save", "a.svg"],
            "none named '?'; take a name that Netron shows",
        ),
        (["--break", "zzz"], "none named 'zzz'"),
        (["--save", "a.gif"], "expected a name that ends in .svg or .png"),
        (["--save", "none/a.svg"], "expected an existing folder, found none; create"),
        (["--save", "/proc/a.svg"], "expected a folder that can be written to"),
        (["--save", "a.svg", "--chromium", "none"], "none: expected a program that draws"),
        (["--save", "a.svg", "--chromium", sys.executable], "expected Chromium to start"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, arguments, line
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHROMIUM", sys.executable)  # is there, and draws nothing
    write(tmp_path / "m.onnx")
    assert main(["view", "m.onnx", "--json", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert line in printed.err
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_bad_model_and_no_chromium_are_told(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="expected a model file, found none"):
        view.cut(tmp_path / "none.onnx")
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="apt-get install chromium") as error:
        view.save(write(tmp_path / "a.onnx"), tmp_path / "a.svg")
    assert "\n" not in str(error.value)


def test_a_constant_cannot_be_asked_for(tmp_path):
    text = (
        f"{HEAD} (float[n] x) => (float[n] y) {{ c = Constant <value_float=2.0> () y = Mul(x,c) }}"
    )
    path = write(tmp_path / "a.onnx", text)
    assert shown(path, "y") == ["y"]
    with pytest.raises(BadInput, match="found the constant 'c'; name the node that reads it"):
        view.cut(path, "c")


# ── The marks ───────────────────────────────────────────────────────────────────────────────────

# What Netron exports, as far as the marks need it: two boxes of 60 x 20 and 90 x 40.
BOX = "M5,0h{0}a5,5 0 0 1 5,5v{1}a5,5 0 0 1 -5,5h-{0}a5,5 0 0 1 -5,-5v-{1}a5,5 0 0 1 5,-5z"
EXPORT = f"""<svg xmlns="http://www.w3.org/2000/svg" id="export" style="" width="120" height="150">
<rect id="background" fill="#fff" width="120" height="150"/>
<g id="origin" transform="translate(10, 10) scale(1)"><g id="nodes" class="nodes">
<g id="input-name-x"/>
<g id="node-name-0" transform="translate(20,30)"><g><text>Relu</text><title>0</title></g>
<path class="node node-border" d="{BOX.format(50, 10)}"/></g>
<g id="node-name-1" transform="translate(5,80)"><g><text>MatMul 〈8〉</text><title>1</title></g>
<path class="node node-border" d="{BOX.format(80, 30)}"/></g>
</g></g></svg>"""
SIZES = {"node-name-0": (60, 20), "node-name-1": (90, 40)}
TWO = [("Relu", "first"), ("MatMul", "/a/" + "b" * 99)]


def number(element, name: str) -> float:
    return float(element.getAttribute(name))


def outlines(group) -> list:
    return [child for child in group.childNodes if child.nodeName == "rect"]


def groups(svg: str) -> dict:
    found = minidom.parseString(svg).getElementsByTagName("g")
    return {g.getAttribute("id").removeprefix("node-name-"): g for g in found}


def surrounds(outline, width: float, height: float) -> bool:
    """Whether the outline is outside the box from 0, 0, its stroke and all, by less than 10."""
    half = float(re.search(r"stroke-width: ([\d.]+)", outline.getAttribute("style"))[1]) / 2
    left, top = number(outline, "x") + half, number(outline, "y") + half
    right = number(outline, "x") + number(outline, "width") - half
    bottom = number(outline, "y") + number(outline, "height") - half
    return -10 < left < 0 and -10 < top < 0 and width < right < width + 10 and height < bottom


def test_the_sizes_are_those_of_the_boxes(chromium):
    def measured(started) -> browser.Sizes:
        with browser.empty_page(started) as page:
            return browser.sizes(page, EXPORT)

    assert chromium.run(measured) == SIZES


def test_outlines_surround_the_boxes_and_differ_in_shape():
    marked = groups(marks.mark(EXPORT, SIZES, TWO, "text", around=0, along=[1, 0], break_at=1))
    path, thick = sorted(outlines(marked["0"]), key=lambda o: o.getAttribute("style"))
    assert surrounds(thick, 60, 20)
    assert surrounds(path, 60, 20)
    assert "4px" in thick.getAttribute("style")
    solid, dashed, *_cross = outlines(marked["1"])
    assert surrounds(solid, 90, 40)
    assert surrounds(dashed, 90, 40)
    assert "dasharray" in dashed.getAttribute("style")
    assert "dasharray" not in solid.getAttribute("style")
    numbers = [
        group.getElementsByTagName("text")[-1].firstChild.data
        for group in (marked["1"], marked["0"])
    ]
    assert numbers == ["1", "2"]


def test_labels_are_inside_the_picture_and_below_the_drawing():
    marked = marks.mark(EXPORT, SIZES, TWO, "A <text> & more", around=0, along=[1], break_at=1)
    root = minidom.parseString(marked).documentElement
    left, top, width, height = map(float, root.getAttribute("viewBox").split())
    assert (number(root, "width"), number(root, "height")) == (width, height)
    labels = [e for e in root.getElementsByTagName("text") if e.hasAttribute("textLength")]
    assert [label.firstChild.data.split(":")[0] for label in labels] == [
        "around",
        "path 1",
        "break",
    ]
    for label in labels:
        assert left < number(label, "x")
        assert number(label, "x") + number(label, "textLength") < left + width
        assert 150 < number(label, "y") < top + height
    assert labels[1].firstChild.data.startswith("path 1: MatMul …b")
    ys = [number(label, "y") for label in labels]
    assert min(np.diff(ys)) >= 16
    background = root.getElementsByTagName("rect")[0]
    assert [number(background, n) for n in ("x", "y", "width", "height")] == [
        *(left, top),
        *(width, height),
    ]


def test_names_and_the_text_alternative_are_in_the_picture():
    marked = marks.mark(EXPORT, SIZES, [("Relu", ODD_NAME), TWO[1]], "A <text> & more")
    root = minidom.parseString(marked).documentElement
    assert root.getAttribute("role") == "img"
    assert root.firstChild.firstChild.data == "A <text> & more"
    titles = [
        [title.firstChild.data for title in group.getElementsByTagName("title")]
        for key, group in groups(marked).items()
        if key in ("0", "1")
    ]
    assert titles == [[ODD_NAME.replace("\a", "\ufffd")], [TWO[1][1]]]
    assert "MatMul  [8]" in marked


def test_an_export_without_the_nodes_is_refused():
    with pytest.raises(BadInput, match="expected a drawing of 2 nodes, found none of first"):
        marks.mark(EXPORT.replace("node-name-0", "other"), SIZES, TWO, "text")


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────


def test_an_svg_is_drawn_and_no_request_leaves_the_machine(program, tmp_path):
    log, logging = tmp_path / "net.json", tmp_path / "chromium"
    logging.write_text(f'#!/bin/sh\nexec "{program}" --log-net-log="{log}" "$@"\n')
    logging.chmod(0o755)
    path, drawn = write(tmp_path / "a b é.onnx"), tmp_path / "a.svg"
    chosen = view.save(
        path, drawn, "n_softmax", along=["n_scale", "n_scores"], break_at="n_q", chromium=logging
    )
    svg = drawn.read_text(encoding="utf-8")
    assert 10_000 < len(svg) < 100_000
    assert set(re.findall(r"https?://[^\"' ]*", svg)) == {"http://www.w3.org/2000/svg"}
    assert {"MatMul", "Softmax", "Transpose", "B = 0.5"} <= set(
        re.findall(r">([^<>]+)<", svg.replace("</tspan><tspan>", ""))
    )
    fonts = set(re.findall(r"font-family: ([^,]+),", svg))
    assert fonts == {"Arial"}  # of the same widths wherever the picture is shown
    marked = groups(svg)
    for i, name in enumerate(chosen.to_json()["nodes"]):
        assert marked[str(i)].firstChild.firstChild.data == name
    assert svg.count("dasharray: 7") == 1
    assert [file.name for file in tmp_path.glob(".writing*")] == []

    events = json.loads(log.read_text())
    types = {number: name for name, number in events["constants"]["logEventTypes"].items()}
    told = [(types[event["type"]], event.get("params", {})) for event in events["events"]]
    asked = {
        p["host"] for name, p in told if name == "HOST_RESOLVER_MANAGER_REQUEST" and "host" in p
    }
    assert asked <= {"https://~notfound", "http://~notfound"}
    assert [p for name, p in told if name.startswith("TCP_CONNECT_ATTEMPT")] == []
    sent = [p["url"] for name, p in told if name == "URL_REQUEST_START_JOB" and "url" in p]
    assert [url for url in sent if "analytics" in url] == []  # Netron tries: its page is refused it
    assert "CORS_REQUEST" in {name for name, _ in told}  # the log does tell of requests

    before = drawn.read_bytes()
    choice = ["--around", "n_softmax", "--path", "n_scale", "n_scores", "--break", "n_q"]
    assert main(["view", str(path), *choice, "--save", str(drawn)]) == 0
    assert drawn.read_bytes() == before


def test_a_png_is_the_marked_svg_at_twice_its_size(program, tmp_path, monkeypatch, capsys, odd):
    if hasattr(os, "geteuid"):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)  # as root: tries a sandbox, does without
    drawn = tmp_path / "odd.png"
    arguments = ["view", str(odd), "--around", ODD_NAME, "--path", "a", "--save", str(drawn)]
    assert main([*arguments, "--json", "--chromium", program]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["picture"] == str(drawn)
    assert answer["nodes"] == ["a", "b", ODD_NAME, "0"]
    pixels = matplotlib.image.imread(drawn)
    height, width = pixels.shape[:2]
    assert width > 600
    assert height > 600
    assert pixels[0, 0, :3].tolist() == pixels[-1, -1, :3].tolist() == [1, 1, 1]
    legend = pixels[-2 * (marks.MARGIN + 2 * marks.LINE) : -2 * marks.MARGIN, : width // 2]
    assert legend.min() == 0


def changed_netron(folder: Path, file: str, old: str, new: str) -> Path:
    """Netron's package, with one file changed."""
    package = Path(netron.__file__).parent
    for each in package.iterdir():
        (folder / each.name).symlink_to(each)
    (folder / file).unlink()
    text = (package / file).read_text(encoding="utf-8")
    assert re.search(old, text)
    (folder / file).write_text(re.sub(old, new, text, flags=re.DOTALL), encoding="utf-8")
    return folder / "__init__.py"


def test_netron_180_days_after_its_release_is_told(chromium, tmp_path, monkeypatch):
    path, folder = write(tmp_path / "a.onnx"), tmp_path / "netron"
    folder.mkdir()
    changed = changed_netron(folder, "index.html", r'(name="date" content=")\d+', r"\g<1>2020")
    monkeypatch.setattr(netron, "__file__", str(changed))
    with pytest.raises(BadInput, match="Please update to the newest version") as error:
        view.save(path, tmp_path / "a.svg", chromium=chromium)
    assert "pip install --upgrade netron" in str(error.value)
    assert not (tmp_path / "a.svg").exists()


def test_netron_that_never_draws_is_told_and_the_next_picture_drawn(
    chromium, tmp_path, monkeypatch
):
    path, folder = write(tmp_path / "a.onnx"), tmp_path / "netron"
    folder.mkdir()
    changed = changed_netron(folder, "dagre.js", r".*", "for (;;) {}")
    monkeypatch.setattr(netron, "__file__", str(changed))
    monkeypatch.setattr(browser, "TIMEOUT", 5)
    with pytest.raises(BadInput, match=r"within 5 s a step, found: .*Timeout 5000ms exceeded"):
        view.save(path, tmp_path / "a.svg", chromium=chromium)
    assert not (tmp_path / "a.svg").exists()
    monkeypatch.undo()
    view.save(path, tmp_path / "a.svg", chromium=chromium)
    assert chromium.run(lambda started: started.contexts) == []


def test_a_notebook_draws_too(program, tmp_path):
    path = write(tmp_path / "a.onnx")

    async def draw() -> None:  # Playwright refuses a thread that runs an event loop
        with view.drawing(program) as opened:
            view.save(path, tmp_path / "a.svg", chromium=opened)

    asyncio.run(draw())
    assert set(groups((tmp_path / "a.svg").read_text(encoding="utf-8"))) >= {"0", "1"}


def test_a_message_of_netron_is_told(chromium, tmp_path):
    with pytest.raises(BadInput, match="found the message 'Unsupported file"):
        marks.draw(
            b"junk" * 99,
            tmp_path / "a.svg",
            chromium,
            nodes=[],
            around=None,
            along=[],
            break_at=None,
            text="",
        )


# ── Live ────────────────────────────────────────────────────────────────────────────────────────


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def test_each_page_has_its_model_on_one_port(tmp_path):
    one, two = write(tmp_path / "one.onnx"), write(tmp_path / "a b#é&.onnx", LONG)
    first = view.serve(one, view.cut(one, "n_softmax", up=1, down=0))
    second = view.serve(two)
    served = onnx.load_from_string(fetch(f"{first}data/one.onnx"))
    assert [node.name for node in served.graph.node] == ["n_scale", "n_softmax"]
    page = fetch(second).decode()
    assert '<meta name="identifier" content="a b#é&amp;.onnx">' in page
    [place] = re.findall(r'name="file" content="([^"]+)"', page)
    assert fetch(second + place) == two.read_bytes()
    assert first.rsplit("/", 2)[0] == second.rsplit("/", 2)[0]


def test_the_data_of_a_whole_model_is_served_and_no_other_file(tmp_path):
    folder, cache = tmp_path / "model", tmp_path / "blobs"
    folder.mkdir()
    cache.mkdir()
    big = np.ones((8, 8192), np.float32)
    text = f"{HEAD} (float[n,8] x) => (float[n,8192] y) {{ y = MatMul (x, big) }}"
    model = onnx.load(write(tmp_path / "a.onnx", text, big=big))
    onnx.save(model, cache / "0", save_as_external_data=True, location="a.data")
    (folder / "a.onnx").symlink_to(cache / "0")  # as in a hub's cache
    (folder / "a.data").symlink_to(cache / "a.data")
    (folder / "secret.txt").write_text("no")
    address = view.serve(folder / "a.onnx")
    assert fetch(f"{address}data/a.data") == big.tobytes()
    for other in ("data/secret.txt", "data/../../a.onnx", "server.py", "data", "../../etc/hosts"):
        with pytest.raises(OSError, match="404"):
            fetch(address + other)
    with pytest.raises(OSError, match="404"):
        fetch(address.rsplit("/", 2)[0] + "/")
    with pytest.raises(BadInput, match="expected a model file, found none"):
        view.serve(tmp_path / "none.onnx")


def test_a_port_that_is_taken_is_left_alone(monkeypatch):
    with socket.create_server(("localhost", 0)) as taken:
        monkeypatch.setattr(serving, "PORT", taken.getsockname()[1])
        started = serving.server.__wrapped__()
        assert started.server_port != serving.PORT
        started.shutdown()
        started.server_close()


def test_an_output_that_no_script_runs_in_says_what_to_do(tmp_path):
    shown = view.show(write(tmp_path / "a.onnx"), height=300).data
    assert re.sub(r"<script>.*</script>", "", shown, flags=re.DOTALL) == (
        "<div>Run this cell to see the graph here.</div>"
    )
    assert re.search(r'\d+, "[\w-]{16}/", 300\)</script>', shown)


def test_the_shell_serves_until_it_is_interrupted(tmp_path):
    path = write(tmp_path / "a.onnx")
    command = [sys.executable, "-m", "helpers", "view", str(path), "--around", "n_softmax"]
    # A process that a shell started in the background ignores the signal, and so do its children.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heeds, **pipe) as process:
        try:
            assert "8 nodes of a.onnx" in process.stdout.readline()
            address = process.stdout.readline().split()[0]
            assert b"netron" in fetch(address).lower()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
