"""Model files: bad ones are refused in one line, good ones written whole or not at all."""

import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import write

from helpers import files


def test_check_returns_an_absolute_path(tmp_path, monkeypatch):
    write(tmp_path / "ein Modell 模型.onnx")
    monkeypatch.chdir(tmp_path)
    assert files.check("ein Modell 模型.onnx") == tmp_path / "ein Modell 模型.onnx"


def bad(kind: str, path) -> None:
    good = path.read_bytes()
    proto = onnx.load(path)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "a Git LFS pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "no file":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "an opset from the future":
        proto.opset_import[0].version = 99
        onnx.save(proto, path)
    elif kind == "an unknown operator":
        proto.graph.node[0].op_type = "Attenti0n"
        onnx.save(proto, path)
    elif kind == "external data that is missing":
        onnx.save(proto, path, save_as_external_data=True, location="w.data", size_threshold=0)
        (path.parent / "w.data").unlink()
    elif kind == "external data that is truncated":
        onnx.save(proto, path, save_as_external_data=True, location="w.data", size_threshold=0)
        os.truncate(path.parent / "w.data", 100)


BAD = [
    *("empty", "truncated", "a Git LFS pointer", "no file", "a folder", "an opset from the future"),
    *("an unknown operator", "external data that is missing", "external data that is truncated"),
]


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_one_line(kind, tmp_path):
    path = write(tmp_path / "a.onnx")
    bad(kind, path)
    with pytest.raises(files.BadInput) as error:
        files.check(path)
    message = str(error.value)
    assert message.startswith(f"{path}: expected ")
    assert "found" in message
    assert "\n" not in message


def test_what_is_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")
    model = ir.load(write(tmp_path / "b.onnx"))
    assert files.save(model, path) == path
    assert files.check(path).read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")

    def fail(draft):
        draft.write_text("half")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), files.writing(path) as draft:
        fail(draft)
    with pytest.raises(files.BadInput), files.writing(path) as draft:
        draft.write_text("not a model")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_killed_leaves_what_was_there(tmp_path):
    path = write(tmp_path / "a.onnx")
    before = path.read_bytes()
    code = f"""
import shutil, time
from helpers import files
with files.writing({str(path)!r}) as draft:
    draft.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == before


def test_writing_into_a_folder_that_is_not_there(tmp_path):
    missing = tmp_path / "none" / "a.onnx"
    with pytest.raises(files.BadInput, match="expected an existing folder"), files.writing(missing):
        pytest.fail("the body ran")


def test_saved_twice_from_other_folders_has_the_same_size(tmp_path, monkeypatch):
    """``onnx.save`` with external data looks for an old file in the working folder, and appends."""
    path = tmp_path / "a.onnx"
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[9] x) => (float[1,9,9] y) { y = Mul (x, w) }"""
    model = ir.load(write(tmp_path / "b.onnx", text, w=np.ones((1, 9, 9), np.float32)))
    monkeypatch.setattr(files, "ONE_FILE", 0)
    sizes = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        files.save(model, path)
        sizes.append(files.size(path))
    assert sizes[0] == sizes[1] > path.stat().st_size
    assert files.session(path).run(None, {"x": np.ones(9, np.float32)})[0].sum() == 81
