"""Bad input from a shell: one line, exit status 2, nothing written; never a traceback or a hang."""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import files
from helpers.__main__ import main

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def listing(folder: Path) -> dict[str, tuple[int, float]]:
    found = (file.lstat() for file in folder.rglob("*"))
    names = (str(file) for file in folder.rglob("*"))
    return {name: (s.st_size, s.st_mtime) for name, s in zip(names, found, strict=True)}


def refused(capfd, folder: Path, *arguments: object) -> str:
    """The one line that the command prints, having checked that it is all that it does."""
    before = listing(folder)
    assert main([str(argument) for argument in arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert ": expected " in printed.err
    assert " found" in printed.err
    assert ";" in printed.err  # what to do
    assert listing(folder) == before
    return printed.err.strip()


def external(path: Path) -> Path:
    """The model at `path`, its weights moved to a file beside it."""
    ir.save(ir.load(path), path, external_data="w.data", size_threshold_bytes=100)
    return path.parent / "w.data"


def edited(path: Path, change) -> None:
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def entry(path: Path, key: str, value: str) -> None:
    """Change one entry of the external data of each tensor."""

    def change(proto):
        for tensor in proto.graph.initializer:
            for one in tensor.external_data:
                if one.key == key:
                    one.value = value

    edited(path, change)


def moved_out(path: Path) -> Path:
    """External data in another folder, and nothing where it was."""
    data, other = external(path), path.parent / "other"
    other.mkdir()
    return data.rename(other / "w.data")


def node(path: Path, **fields) -> None:
    edited(path, lambda proto: [setattr(proto.graph.node[0], *item) for item in fields.items()])


def tensor(path: Path, dim: int) -> None:
    edited(path, lambda proto: proto.graph.initializer[0].dims.__setitem__(0, dim))


BAD = {  # what is done to a good model, and what the line says of it
    "empty": (lambda p: p.write_bytes(b""), "an empty file"),
    "truncated": (lambda p: os.truncate(p, 300), "truncated or damaged"),
    "text": (lambda p: p.write_text("<!DOCTYPE html>\n<p>not found"), "a text file"),
    "Git LFS": (lambda p: p.write_text(LFS), "a Git LFS pointer; .* git lfs pull"),
    "zip": (lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "a zip archive"),
    "safetensors": (lambda p: p.write_bytes(bytes(8) + b'{"w":{}}'), "a safetensors file"),
    "ORT": (
        lambda p: p.write_bytes(b"\x18\0\0\0ORTM" + bytes(99)),
        "a model in ONNX Runtime's own format .*; name the .onnx file",
    ),
    "no file": (lambda p: p.unlink(), "found none; check the path"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "a folder"),
    "pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "no regular file"),
    "no graph": (lambda p: edited(p, lambda m: m.ClearField("graph")), "without outputs"),
    "opset": (
        lambda p: edited(p, lambda m: setattr(m.opset_import[0], "version", 99)),
        "Opset 99 is .* till opset",
    ),
    "IR version": (lambda p: edited(p, lambda m: setattr(m, "ir_version", 99)), "ir_version 99"),
    "operator": (lambda p: node(p, op_type="Attenti0n"), "No Op registered for Attenti0n"),
    "domain": (lambda p: node(p, domain="no.such"), "domain 'no.such'"),
    "no such tensor": (lambda p: edited(p, lambda m: m.graph.ClearField("initializer")), "gamma"),
    "negative size": (lambda p: tensor(p, -3), "Negative dimension"),
    "huge size": (lambda p: tensor(p, 2**40), "too small for the declared shape"),
    "data missing": (lambda p: external(p).unlink(), "w.data, found no such file; put it beside"),
    "data truncated": (lambda p: os.truncate(external(p), 200), "256 bytes from 0, found 200"),
    "data empty": (lambda p: os.truncate(external(p), 0), "found 0 bytes"),
    "data misplaced": (
        lambda p: (external(p), entry(p, "offset", "4096")),
        "from 4096, found 1024 bytes",
    ),
    "data too short": (lambda p: (external(p), entry(p, "length", "8")), "a length of 8"),
    "offset no number": (lambda p: (external(p), entry(p, "offset", "abc")), "abc"),
    "offset negative": (lambda p: (external(p), entry(p, "offset", "-8")), "-8"),
    "data above": (
        lambda p: (external(p), entry(p, "location", "../w.data")),
        "leads out of the model's folder",
    ),
    "data absolute": (
        lambda p: (external(p), entry(p, "location", "/etc/hosts")),
        "leads out of the model's folder",
    ),
    "link out": (
        lambda p: (p.parent / "w.data").symlink_to(moved_out(p)),
        "found a link that leads out of the model's folder, to ",
    ),
    "hard link": (lambda p: (p.parent / "w.data").hardlink_to(moved_out(p)), "found a hard link"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_model_is_one_line(kind, tmp_path, capfd):
    folder = tmp_path / "a folder"
    folder.mkdir()
    good, path = write(tmp_path / "good.onnx"), write(folder / "bad.onnx")
    damage, said = BAD[kind]
    damage(path)
    for arguments in (
        ["inspect", path],
        ["compare", good, path],
        ["view", path, "--json"],
        ["explain", path, "--model-type", "bert"],
    ):
        line = refused(capfd, tmp_path, *arguments)
        assert line.startswith(f"{path}: expected ")
        with pytest.raises(files.BadInput, match=said):
            files.check(path)


TYPES = {  # valid, or nearly, and what is said of it
    "g (bfloat16[2,4] x) => (bfloat16[2,4] y) { [e] y = Erf (x) }": (
        "Erf (e) on bfloat16, for which it has no kernel; convert the model to float32"
    ),
    "g (double[1,1,4] x, double[1,1,2] w) => (double[1,1,3] y) { y = Conv (x, w) }": (
        "Conv on float64, for which it has no kernel; convert the model to float32"
    ),
    "g (int32[2,4] x, int32[4,3] w) => (int32[2,3] y) { y = Gemm (x, w) }": (
        "Gemm on int32, for which it has no kernel; convert the model to float32"
    ),
    "g (float16[2,4] x, float[4] w) => (float16[2,4] y) { [n] y = LayerNormalization (x, w) }": (
        "LayerNormalization (n) on float16 and float32 at once, where it takes one type;"
        " convert the model to float32, or put a Cast before it"
    ),
    "g (int8[2,4] x, int8[4,2] w) => (int8[2,2] y) { y = MatMul (x, w) }": (
        "MatMul on int8 (x), a type that the operator does not take; convert the model to float32"
    ),
    "g (float[2,4] x) => (float16[2,4] y) { y = Exp (x) }": (
        "y declared float16, and computed in float32; put a Cast before it"
    ),
    "g (float[2,4] x) => (float[2,4] y) { y = a.library.Exp (x) }": (
        "the operator a.library.Exp, which is of a library that is not loaded; export it with the"
        " operators of the standard"
    ),
    "g (float[2,4] x) => (float[2,4] y) { [a] z = Exp (x) [a] y = Exp (z) }": (
        "more than one node of the name a; give each a name of its own"
    ),
}


@pytest.mark.parametrize("text", TYPES)
def test_what_the_cpu_cannot_run_can_be_seen(text, tmp_path, capfd):
    path = tmp_path / "a.onnx"
    header = '<ir_version: 8, opset_import: ["" : 17, "a.library" : 1]>'
    path.write_bytes(onnx.parser.parse_model(f"{header}\n{text}").SerializeToString())
    assert main(["inspect", str(path), "--json"]) == 0
    notes = json.loads(capfd.readouterr().out)["notes"]
    assert notes[0].endswith(f"does not run it on the CPU: {TYPES[text]}")
    assert main(["view", str(path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["nodes"]
    for arguments in (["fuse", path, tmp_path / "out.onnx"], ["compare", path, path]):
        line = refused(capfd, tmp_path, *arguments)
        assert line.endswith(f"can run on the CPU, found {TYPES[text]}")


def test_an_operator_that_onnxruntime_takes_apart_has_the_type_of_the_model(tmp_path):
    path = tmp_path / "a.onnx"
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (bfloat16[1,2,3,4] x) => (bfloat16[1,2,3,4] y) { y = Attention (x, x, x) }"""
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(files.BadInput, match=r"found \w+ on bfloat16, for which"):
        files.check(path)


@pytest.mark.parametrize("operator", ["RandomUniformLike", "Bernoulli"])  # this has that in it
def test_an_operator_that_has_no_kernel_at_this_opset(operator, tmp_path):
    """The type is not the cause, which it would not help to change."""
    path = tmp_path / "a.onnx"
    for opset in (21, 22):
        text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[2,4] x) => (float[2,4] y) {{ [n] y = {operator} (x) }}"""
        path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        if opset == 21:
            files.check(path)
    with pytest.raises(files.BadInput, match="no kernel from opset 22 on; export it at a lower"):
        files.check(path)


@pytest.mark.parametrize(
    "name", ["ein Modell 模型.onnx", "-dash.onnx", "new\nline.onnx", "é", "a'b\""]
)
def test_odd_names_work(name, tmp_path, monkeypatch, capfd):
    write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    given_ = ["inspect", "--json", "--", name]  # a bare name, found in the working folder
    assert main(given_) == 0
    assert json.loads(capfd.readouterr().out)["sites"]
    assert files.size(name) == Path(name).stat().st_size
    (tmp_path / name).write_bytes(b"")
    assert main(given_) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_link_to_a_model_works(tmp_path):
    """As in the cache of the Hugging Face hub, whose files are all links."""
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "other" / "blob")
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    assert files.check(link) == link


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, capfd):
    path = write(tmp_path / "a.onnx")

    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    assert "Permission denied" in refused(capfd, tmp_path, "inspect", path)


FEEDS = {
    "none": (None, "No such file"),
    "empty": (b"", "expected an .npz file"),
    "no archive": (b"words", "expected an .npz file"),
    "truncated": (slice(0, 100), "expected an .npz file"),
    "damaged": (slice(60, None), "expected an .npz file"),
    "a name too few": ({}, "found none; name them"),
    "a name too many": ({"given": np.ones((2, 3, 8), "f"), "y": np.ones(1)}, "found given, y"),
    "another name": ({"x": np.ones((2, 3, 8), np.float32)}, "expected arrays given, found x"),
    "type": ({"given": np.ones((2, 3, 8))}, "found float64"),
    "rank": ({"given": np.ones((3, 8), np.float32)}, "expected given float32 .*found float32"),
    "size": ({"given": np.ones((2, 3, 9), np.float32)}, "found float32 .2, 3, 9"),
    "no batch": ({"given": np.ones((0, 3, 8), np.float32)}, "expected values"),
    "objects": ({"given": np.array([object()])}, "expected an .npz file"),
    "NaN": ({"given": np.full((2, 3, 8), np.nan, np.float32)}, "found NaN in y"),
}


@pytest.mark.parametrize("kind", FEEDS)
def test_bad_inputs_are_one_line(kind, tmp_path, capfd):
    path, npz = write(tmp_path / "a.onnx"), tmp_path / "feeds.npz"
    content, said = FEEDS[kind]
    if isinstance(content, bytes):
        npz.write_bytes(content)
    elif isinstance(content, slice):
        np.savez(npz, given=np.ones((2, 3, 8), np.float32))
        npz.write_bytes(npz.read_bytes()[content])
    elif content is not None:
        np.savez(npz, **content)
    line = refused(capfd, tmp_path, "compare", path, path, "--inputs", npz)
    assert str(tmp_path) in line
    assert re.search(said, line), line


def test_a_reference_that_gives_nan_is_bad_input(tmp_path, capfd):
    path = write(tmp_path / "a.onnx", half=np.array(np.nan, np.float32))
    assert "found NaN on all inputs" in refused(capfd, tmp_path, "compare", path, path)


@pytest.mark.parametrize("folder", ["none", "a.onnx"])
def test_a_folder_that_is_missing(folder, tmp_path, capfd):
    path = write(tmp_path / "a.onnx")
    picture = tmp_path / folder / "picture.svg"
    assert "expected an existing folder" in refused(
        capfd, tmp_path, "view", path, "--save", picture, "--chromium", sys.executable
    )


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    """Root may write everywhere, so the system's answer is put in its mouth."""

    def denied(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    with pytest.raises(files.BadInput, match="can be written to, found: Read-only file system"):
        files.save(ir.load(write(tmp_path / "a.onnx")), tmp_path / "b.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_a_command_that_needs_too_much_memory(tmp_path, monkeypatch, capfd):
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x) => (float[m,k] y) { e = Expand (x, huge) y = Identity (e) }"""
    path = write(tmp_path / "a.onnx", text, huge=np.array([2**36, 1]))
    line = refused(capfd, tmp_path, "compare", path, path)
    assert str(path) in line


def test_what_a_library_raises_is_one_line(tmp_path, monkeypatch, capfd):
    from helpers import graph

    def fail(*_, **__):
        raise RuntimeError("no\nsuch thing")

    path = write(tmp_path / "a.onnx")
    monkeypatch.setattr(graph, "sites", fail)
    line = refused(capfd, tmp_path, "inspect", path)
    assert "expected a model to work on, found RuntimeError: no such thing;" in line


def test_an_interrupt_and_a_closed_pipe_are_quiet(tmp_path, monkeypatch, capfd):
    path = write(tmp_path / "a.onnx")
    piped = f"{sys.executable} -m helpers inspect {path} --json | true"
    ended = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("", "")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "check", interrupt)
    assert main(["inspect", str(path)]) == 130
    assert capfd.readouterr() == ("", "")


# ── Files that nobody thought of ────────────────────────────────────────────────────────────────

ANY = settings(
    max_examples=1000,
    deadline=None,  # the first run of a session is slow
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good") / "good.onnx").read_bytes()


@ANY
@given(
    command=st.sampled_from(["inspect", "compare", "explain"]),
    end=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=8),
)
@example(command="inspect", end=0.0, flips=[])
def test_damaged_models(good, tmp_path, capfd, command, end, flips):
    """Truncated anywhere, bits flipped: an answer or one line, soon and in little memory."""
    damaged = bytearray(good if end is None else good[: int(end * len(good))])
    for where, bit in flips if damaged else ():
        damaged[int(where * len(damaged))] ^= 1 << bit
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged)
    before, start = listing(tmp_path), time.monotonic()
    more = {"compare": [str(path)], "explain": ["--model-type", "bert"]}.get(command, [])
    status = main([command, str(path), *more, "--json"])
    printed = capfd.readouterr()
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20  # KiB
    assert listing(tmp_path) == before
    said = [line for line in printed.err.splitlines() if "--num-heads" not in line]
    if status == 2:
        assert printed.out == ""
        assert len(said) == 1, printed.err
        assert ": expected " in said[0]
    else:
        assert status in (0, 1)
        assert not said
        assert json.loads(printed.out)
