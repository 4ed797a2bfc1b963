"""Model files: bad ones are refused in one line, good ones written whole or not at all."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from graphs import write

from helpers import export, files, graph


def test_check_returns_an_absolute_path(tmp_path, monkeypatch):
    write(tmp_path / "ein Modell 模型.onnx")
    monkeypatch.chdir(tmp_path)
    assert files.check("ein Modell 模型.onnx") == tmp_path / "ein Modell 模型.onnx"


def test_a_session_writes_the_graph_that_it_runs(tmp_path):
    path, running = write(tmp_path / "a.onnx"), tmp_path / "running.onnx"
    files.session(path, write_to=running)
    before, after = (graph.counts(graph.load(one)) for one in (path, running))
    assert before["LayerNormalization"] == 2
    assert after["com.microsoft.SkipLayerNormalization"] == 1  # which the session fuses by itself


def test_an_operator_of_onnxruntimes_own_in_the_domain_of_onnx(tmp_path):
    """onnx's checker does not know what ONNX Runtime's optimizer makes of T5, and it runs."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    own (float[2,4] x) => (float[2,4] y) { y = SimplifiedLayerNormalization <axis = -1> (x, w) }"""
    path = tmp_path / "own.onnx"
    for name in ("Simplified", "Other"):
        model = onnx.parser.parse_model(text.replace("Simplified", name))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "w"))
        path.write_bytes(model.SerializeToString())
        if name == "Simplified":
            assert files.check(path) == path
    with pytest.raises(files.BadInput, match="OtherLayerNormalization"):
        files.check(path)


def test_large_weights_are_written_one_by_one(tmp_path):
    """As protobuf would: read again, it is the model that was written."""
    model = ir.load(write(tmp_path / "a.onnx"))
    random = np.random.default_rng(0)
    for name, shape in (("one", (300, 100)), ("two", (128, 2**8))):
        array = ir.tensor(random.normal(size=shape).astype(np.float32), name=name)
        model.graph.register_initializer(ir.Value(name=name, const_value=array))
    files.save(model, tmp_path / "b.onnx")
    read = onnx.load(tmp_path / "b.onnx")
    wanted = ir.to_proto(model)
    for proto in (read, wanted):
        proto.graph.initializer.sort(key=lambda tensor: tensor.name)
    assert read == wanted


def test_what_is_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")
    model = ir.load(write(tmp_path / "b.onnx"))
    assert files.save(model, path) == path
    assert onnx.load(files.check(path)) == onnx.load(tmp_path / "b.onnx")
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


SCALED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[99,9] x) => (float[99,9] y) { a = Mul (x, w) y = Add (a, b) }"""
ONES = {"w": np.ones((99, 9), np.float32), "b": np.ones(1, np.float32)}
WRITER = """
import os, signal, sys
import numpy as np, onnx_ir as ir
from helpers import files

source, path, external = sys.argv[1:]
folder, steps = os.path.dirname(path), 0
files.ONE_FILE = 0 if external == "1" else files.ONE_FILE

def write(value, moment):
    def step(event, arguments):  # each call of the system that opens or changes something there
        global steps
        if event == "open" or event.startswith(("os.", "shutil.")):
            if folder in str(arguments[0]):
                if steps == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1

    model = ir.load(source)
    for name, shape in {"w": (99, 9), "b": (1,)}.items():  # b is too small to be external
        tensor = ir.tensor(np.full(shape, value, np.float32), name=name)
        model.graph.initializers[name].const_value = tensor
    sys.addaudithook(step)
    files.save(model, path)

for line in sys.stdin:
    child = os.fork()
    if not child:
        write(*map(int, line.split()))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("external", [False, True])
def test_a_write_that_is_killed_leaves_the_old_model_or_the_new(external, tmp_path):
    """Killed at each of its steps in turn, until it ends before that."""
    source = write(tmp_path / "source.onnx", SCALED, **ONES)
    path = tmp_path / "folder" / "a.onnx"
    path.parent.mkdir()
    command = [sys.executable, "-c", WRITER, str(source), str(path), str(int(external))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as writer:

        def killed(value: int, moment: int) -> bool:
            writer.stdin.write(f"{value} {moment}\n")
            status = int(writer.stdout.readline())
            assert status in (0, -signal.SIGKILL)
            return status != 0

        def value() -> float:
            session = files.session(files.check(path))
            x = np.full((99, 9), 1000, np.float32)
            (found,) = np.unique(session.run(None, {"x": x})[0])
            assert found // 1000 == found % 1000  # both of one model
            return found % 1000

        assert not killed(1, -1)
        size, seen, now, moment = files.size(path), [], value(), 0
        assert now == 1
        while killed(moment + 2, moment):
            before, now = now, value()
            assert now in (before, moment + 2)
            seen.append(now != before)
            moment += 1
            for left in path.parent.glob(".writing-*"):  # to remove it would be steps of the next
                shutil.rmtree(left)
        assert seen.index(True) > 5  # the model is replaced in one of the last steps
        assert seen == sorted(seen)
        left = path.parent / ".writing-killed"
        left.mkdir()
        os.utime(left, (0, 0))
        assert not killed(1, -1)
        writer.stdin.close()
    assert files.size(path) == size
    assert len(list(path.parent.iterdir())) == 1 + external  # what the killed ones left is gone


def test_what_another_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "a.onnx"
    with files.replacing(path) as draft:
        os.utime(draft.parent, (0, 0))
        with files.replacing(tmp_path / "b.onnx") as other:
            other.write_text("b")
        draft.write_text("a")
    assert path.read_text() == "a"


def test_a_full_disk(tmp_path):
    """As a limit on the size of a file, which anyone can set."""
    path = write(tmp_path / "a.onnx")
    before = path.read_bytes()
    model = ir.load(path)
    model.graph.initializers["wq"].const_value = ir.tensor(np.ones((8, 99_999), np.float32))
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(files.BadInput, match=r"expected room .* found: File too large"):
            files.save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_data_of_other_models_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ONE_FILE", 0)
    source = write(tmp_path / "source.onnx", SCALED, **ONES)
    model = ir.load(source)
    for name in ("a.onnx", "a.onnx.b.onnx", "b.onnx"):
        files.save(model, tmp_path / name)
    (tmp_path / "a.onnx.mine.data").write_text("mine")
    files.save(model, tmp_path / "a.onnx")
    for name in ("a.onnx", "a.onnx.b.onnx", "b.onnx"):
        files.check(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 3 + 1


def test_a_model_that_comes_in_many_files(tmp_path):
    """As TorchScript's exporter writes one above 2 GB."""
    path = tmp_path / "a.onnx"
    source = write(tmp_path / "source.onnx")
    for _ in range(2):
        with files.writing(path) as draft:
            onnx.save(
                onnx.load(source),
                draft,
                save_as_external_data=True,
                all_tensors_to_one_file=False,
                size_threshold=100,
            )
    assert files.size(path) > source.stat().st_size
    data = [file for file in tmp_path.iterdir() if file.suffix == ".data"]
    assert len(data) == 4
    feed = {"given": np.ones((2, 3, 8), np.float32)}
    one, two = (files.session(files.check(file)).run(None, feed)[0] for file in (source, path))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("route", export.ROUTES)
def test_exported_twice_from_other_folders_has_the_same_size(route, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ONE_FILE", 0)
    config = transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    model, sizes = transformers.DistilBertModel(config), []
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        export.export(model, inputs, Path("..") / "model.onnx", route)
        sizes.append(files.size(tmp_path / "model.onnx"))
    assert sizes[0] == sizes[1]
    external = route != "torchscript"  # which keeps up to 2 GB in one file
    assert len(list(tmp_path.glob("model.onnx*"))) == 1 + external


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


SOURCE = "/onnxruntime_src/onnxruntime/core/providers/cpu/tensor/reshape_helper.h:91 "


@pytest.mark.parametrize(
    "raised",
    [
        f"[ONNXRuntimeError] : 1 : FAIL : {SOURCE}onnxruntime::Helper::Helper(const onnxruntime::A&"
        ", std::function<void(int)>, bool) Sizes (2) differ.\n\n",
        f"{SOURCE}onnxruntime::common::Status onnxruntime::Foo<T>::Compute(onnxruntime::B*) const"
        " [with T = float; A = std::allocator<int(*)()>] Sizes (2) differ.",
        f"{SOURCE}onnxruntime::A::f(int)::<lambda(int)>::operator()(int) const Sizes (2) differ; ",
        f"Load model from /a b/c.onnx failed:{SOURCE}onnxruntime::f(int) Sizes (2) differ.",
        r"D:\\a\\_work\\1\\s\\onnxruntime\\core\\a.cc:9 onnxruntime::A::f Sizes (2) differ",
    ],
)
def test_what_onnxruntime_says_loses_the_place_in_its_source(raised):
    prefix = "[ONNXRuntimeError] : 1 : FAIL : " if raised.startswith("Load") else ""
    assert files.told(RuntimeError(prefix + raised)) == "Sizes (2) differ"


def test_what_is_told_is_shortened_last():
    place = f"{SOURCE}onnxruntime::f({'const onnxruntime::Tensor*, ' * 99}bool) "
    assert files.told(f"Name:'a' {place}no", 20) == "Name:'a' no"
    assert files.told("a" * 30, 20) == f"{'a' * 20} …"
    assert files.told(f"a {place[:-9]}", 20) == "a"
    assert files.told(ValueError()) == "ValueError"
