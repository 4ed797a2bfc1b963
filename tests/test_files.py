"""Model files: bad ones are refused in one line, good ones written whole or not at all."""

import json
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
from helpers.__main__ import main
from helpers.files import saving
from helpers.graph import external


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


def test_fields_are_written_in_their_order(tmp_path):
    """OpenVINO does not read a file whose opsets, if they are two, come before its graph."""
    model = ir.load(write(tmp_path / "a.onnx"))
    model.opset_imports["com.microsoft"] = 1
    model.producer_name = "a test"
    files.write(model, tmp_path / "b.onnx")
    written = (tmp_path / "b.onnx").read_bytes()
    proto = onnx.ModelProto.FromString(written)
    assert proto.producer_name == "a test"
    assert len(proto.opset_import) == 2
    assert written == proto.SerializeToString(deterministic=True)


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
from helpers.files import saving

source, path, external = sys.argv[1:]
folder, steps = os.path.dirname(path), 0
saving.ONE_FILE = 0 if external == "1" else saving.ONE_FILE

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
        os.utime(draft.parent.parent, (0, 0))  # the folder of the draft and of its lock
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
    monkeypatch.setattr(saving, "ONE_FILE", 0)
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
    monkeypatch.setattr(saving, "ONE_FILE", 0)
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
    monkeypatch.setattr(saving, "ONE_FILE", 0)
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


# ── External data ───────────────────────────────────────────────────────────────────────────────

EVERYWHERE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x, bool yes) => (float[2] y)
{
  c = Constant <value = float[2] c {3.0, 4.0}> ()
  a = Mul (x, w)
  z = If (yes) <
    then_branch = t () => (float[2] t0) <float[2] v = {5.0, 6.0}> { t0 = Mul (a, v) },
    else_branch = e () => (float[2] e0) {
      e1 = Constant <value = float[2] e1 {7.0, 8.0}> ()
      e0 = Mul (a, e1)
    }
  >
  y = Add (z, c)
}"""


def all_external(path: Path, name: str) -> Path:
    """The model at `path` with each float tensor, whatever its size, in a file of that name."""
    proto, data = onnx.load(path), path.parent / name
    with data.open("wb") as file:

        def move(graph: onnx.GraphProto) -> None:
            tensors = [*graph.initializer]
            for node in graph.node:
                for attribute in node.attribute:
                    tensors += [attribute.t] if attribute.HasField("t") else []
                    if attribute.HasField("g"):
                        move(attribute.g)
            for tensor in tensors:
                if tensor.data_type != onnx.TensorProto.FLOAT:
                    continue  # ONNX Runtime wants shapes in the model
                array = onnx.numpy_helper.to_array(tensor)
                tensor.ClearField("float_data")
                tensor.raw_data = array.tobytes()
                onnx.external_data_helper.set_external_data(
                    tensor, name, offset=file.tell(), length=array.nbytes
                )
                tensor.ClearField("raw_data")
                file.write(array.tobytes())

        move(proto.graph)
    path.write_bytes(proto.SerializeToString())
    return data


def in_a_hub(path: Path, data: Path) -> Path:
    """Both files moved into a folder, under other names, and links to them in another."""
    blobs, snapshot = path.parent / "hub" / "blobs", path.parent / "hub" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file, name in ((path, "7f"), (data, "e2")):
        file.rename(blobs / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    return snapshot / path.name


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("one_file", [0, files.ONE_FILE])
def test_all_external_data_is_brought_in(linked, one_file, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "ONE_FILE", one_file)
    path = write(tmp_path / "a.onnx", EVERYWHERE, w=np.array([1, 2], np.float32))
    data = all_external(path, "weights.data")  # a name that our own files have for a moment, too
    before = onnx.load(path, load_external_data=False)
    assert len(list(external.tensors(before))) == 4
    path = in_a_hub(path, data) if linked else path
    size = files.size(files.check(path))
    assert size == path.stat().st_size + 4 * 8
    copy = files.save(graph.load(path), tmp_path / "copy.onnx")
    data.resolve().unlink(missing_ok=True)
    for file in tmp_path.glob("hub/blobs/*"):
        file.unlink()
    x = np.array([10, 100], np.float32)
    for yes, factors in ((True, (5, 6)), (False, (7, 8))):
        (found,) = files.session(copy).run(None, {"x": x, "yes": np.array(yes)})
        np.testing.assert_array_equal(found, x * (1, 2) * factors + (3, 4))


def test_a_session_of_bytes_beside_linked_data(tmp_path):
    path = write(tmp_path / "a.onnx")
    path = in_a_hub(path, all_external(path, "a.data"))
    feed = {"given": np.ones((2, 3, 8), np.float32)}
    proto, folder = external.read(path)
    session = files.session(proto.SerializeToString(), folder=folder)
    expected = files.session(path).run(None, feed)
    np.testing.assert_array_equal(session.run(None, feed), expected)


def test_data_beside_the_model_may_be_a_link_within_its_folder(tmp_path):
    path = write(tmp_path / "a.onnx")
    all_external(path, "a.data").rename(tmp_path / "b.data")
    (tmp_path / "a.data").symlink_to("b.data")
    files.check(path)
    model = graph.load(path)
    tensor = model.graph.initializers["wq"].const_value
    assert Path(tensor.path) == tmp_path / "b.data"  # what is opened is no link
    assert tensor.numpy().shape == (8, 8)


def test_data_in_a_folder_within_the_models(tmp_path):
    path = write(tmp_path / "a.onnx")
    (tmp_path / "data").mkdir()
    all_external(path, "data/a.data")
    files.check(path)
    assert graph.load(path).graph.initializers["wq"].const_value.numpy().shape == (8, 8)


@pytest.mark.parametrize("level", [None, 0, 1])
def test_every_command_works_in_a_hub(level, tmp_path, capfd):
    path = write(tmp_path / "a.onnx")
    path = str(in_a_hub(path, all_external(path, "a.data")))
    commands = [["explain", path, "--model-type", "bert", "--opt-level", f"{level}", "--json"]]
    if level is None:
        commands = [
            ["inspect", path],
            ["view", path, "--json"],
            ["compare", path, path],
            ["fuse", path, str(tmp_path / "out.onnx")],
            ["explain", path, "--rules", "onnxscript", "--parity"],
        ]
    for command in commands:
        assert main(command) == 0, command
        assert "symbolic" not in capfd.readouterr().out


LINKS = {  # what is done to the data of a model that is in a hub, and what is said of it
    "another folder": (
        lambda p, data: (data.rename(p / "w"), (p / "l").symlink_to(p / "w")),
        "a link that leads out of the model's folder, to .*/w; put a copy",
    ),
    "a folder": (
        lambda p, data: (data.unlink(), data.mkdir(), (p / "l").symlink_to(data)),
        "found a folder",
    ),
    "nothing": (
        lambda p, data: (data.unlink(), (p / "l").symlink_to(data)),
        "found a link to no file",
    ),
    "itself": (lambda p, data: (p / "l").symlink_to(p / "l"), "found a link to no file"),
    "a hard link": (
        lambda p, data: ((data.parent / "also").hardlink_to(data), (p / "l").symlink_to(data)),
        "found a hard link, .*; put a copy",
    ),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_that_lead_elsewhere_are_refused(kind, tmp_path):
    path = write(tmp_path / "a.onnx")
    path = in_a_hub(path, all_external(path, "a.data"))
    change, said = LINKS[kind]
    data = (path.parent / "a.data").resolve()
    (path.parent / "a.data").unlink()
    other = tmp_path / "other"
    other.mkdir()
    change(other, data)
    (other / "l").rename(path.parent / "a.data")
    for read in (files.check, graph.load, files.size):
        with pytest.raises(files.BadInput, match=said):
            read(path)


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    """Where it leads to another file, to none, or to the file that is read."""
    source = write(tmp_path / "source.onnx")
    model = graph.load(source)
    before = source.read_bytes()
    (tmp_path / "other.onnx").write_text("other")
    for target in ("other.onnx", "none.onnx", "source.onnx"):
        out = tmp_path / "out.onnx"
        out.unlink(missing_ok=True)
        out.symlink_to(target)
        files.save(model, out)
        assert not out.is_symlink()
        files.check(out)
    assert (tmp_path / "other.onnx").read_text() == "other"
    assert source.read_bytes() == before
    assert not (tmp_path / "none.onnx").exists()


# ── What ONNX Runtime runs and onnx's checker does not like ──────────────────────────────────────


def reversed_(proto):
    nodes = [*proto.graph.node][::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def sized(**size):
    def change(proto):
        for value in (*proto.graph.input, *proto.graph.output):
            for dim in value.type.tensor_type.shape.dim[:2]:
                dim.CopyFrom(onnx.TensorShapeProto.Dimension(**size))

    return change


def scaled(proto):
    node = onnx.helper.make_node("Scaler", ["y"], ["z"], domain="ai.onnx.ml", scale=[2.0])
    node.attribute.append(onnx.helper.make_attribute("offset", [0.0]))
    proto.graph.node.append(node)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["b", "l", 8]))


RUNS = {
    "no shape": lambda p: p.graph.output[0].type.tensor_type.ClearField("shape"),
    "no type": lambda p: p.graph.output[0].ClearField("type"),
    "not sorted": reversed_,
    "-1": sized(dim_value=-1),
    "?": sized(dim_param="?"),
    "None": sized(dim_param="None"),
    "ai.onnx": lambda p: setattr(p.opset_import[0], "domain", "ai.onnx"),
    "ai.onnx.ml": scaled,
}


@pytest.mark.parametrize("kind", RUNS)
def test_what_onnxruntime_runs_is_let_in(kind, tmp_path, capsys):
    path, plain = tmp_path / "a.onnx", write(tmp_path / "plain.onnx")
    proto = onnx.load(plain)
    RUNS[kind](proto)
    path.write_bytes(proto.SerializeToString())
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["name"] == "n_softmax"
    model = graph.load(path, weights=False)
    made = [value for node in model.graph for value in node.outputs]
    assert all(v.producer() is None or v in made for n in model.graph for v in n.inputs)
    sizes = [size for size in model.graph.inputs[0].shape if isinstance(size, int)]
    assert min(sizes) > 0
    copy = files.save(graph.load(path), tmp_path / "copy.onnx")
    feed = {"given": np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)}
    one, two = (files.session(file).run(["y"], feed)[0] for file in (plain, copy))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_draft_that_the_cpu_cannot_run_is_named_as_what_it_was_to_be(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (bfloat16[2,4] x) => (bfloat16[2,4] y) { y = Erf (x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    out = tmp_path / "out.onnx"
    with pytest.raises(
        files.BadInput, match=r"out\.onnx: expected .* found Erf on bfloat16"
    ) as said:
        files.save(model, out)
    assert str(said.value).startswith(f"{out}: expected ")
    assert not list(tmp_path.iterdir())
