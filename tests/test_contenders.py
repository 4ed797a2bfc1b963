"""What is ready to take part in a benchmark: each runs, and gives what the graph before it gave."""

import logging
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import ATTENTION, write

import helpers
from helpers import benchmark, contenders, files, graph, models
from helpers.workers import computed


@pytest.fixture
def attention(tmp_path):
    return write(tmp_path / "attention.onnx", ATTENTION)


def measured(*those, arrays):
    return benchmark.run(those, {"here": arrays}, rounds=1, threads=1, progress=False)["here"]


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    """wav2vec2 with two layers of 32, by the exporter of transformers, and inputs for it."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    from helpers import export

    small = {
        "conv_dim": [32] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **small
    )
    model = Wav2Vec2ForCTC(config).eval()
    models.randomise(model)
    arrays = {"input_values": models.speech(seconds=1, batch=2)}
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    export.export(model, inputs, path, "dynamo")
    return model, inputs, path


@pytest.fixture
def exported(exported_once, tmp_path):
    """The same, and a copy of the file."""
    model, inputs, path = exported_once
    return model, inputs, Path(shutil.copy(path, tmp_path))


def test_made_graphs_run_and_agree(exported, caplog):
    caplog.set_level(logging.INFO, "helpers")
    model, inputs, path = exported
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    made = [contenders.onnxscript("onnxscript", path), contenders.transformers("theirs", path)]
    int8 = contenders.int8("int8", path)
    assert [one.reason for one in [*made, int8]] == [""] * 3
    answer = measured(contenders.onnx("as it is", path, "unfused"), *made, int8, arrays=arrays)
    assert answer.reasons == {}
    reference = models.runner(model)(arrays)["logits"]
    found = {label: one.outputs["logits"] for label, one in answer.measured.items()}
    for label in ("as it is", "onnxscript", "theirs"):
        np.testing.assert_allclose(found[label], reference, atol=1e-4)
    assert 1e-4 < np.abs(found["int8"] - reference).max() < 1
    operators = answer.operators()
    assert operators["onnxscript", "file"]["MultiHeadAttention"] == 2
    assert operators["int8", "file"]["MatMulInteger"] > 0
    assert operators["int8", "run"]["DynamicQuantizeMatMul"] > 0
    assert "making small_onnxscript.onnx …" in caplog.messages
    assert str(path.parent) not in caplog.text


def test_transformers_gives_what_its_exporter_gives(exported):
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from helpers import export

    model, inputs, path = exported
    config = OnnxConfig(dynamic=True, opset_version=export.ROUTES["dynamo"], ort_fusions="cpu")
    with export.quiet():
        program = OnnxExporter().export(model, inputs, config=config).program
    made = contenders.transformers("theirs", path)
    assert graph.counts(graph.load(made.path)) == graph.counts(program)


def test_stock(exported):
    _, _, path = exported
    made = contenders.stock("stock", path, "bart", num_heads=4, hidden_size=32)
    assert made.kind == "stock"
    assert graph.counts(graph.load(made.path))["com.microsoft.BiasGelu"] == 2


def test_what_fuse_makes(exported, monkeypatch):
    """A file where parity held, and else the reason; `helpers.fuse` has tests of its own."""
    _, _, path = exported

    def fuse(source, draft, *, target):
        files.save(graph.load(source), draft)
        return types.SimpleNamespace(held=target == "portable")

    module = types.ModuleType("helpers.fuse")
    module.fuse = fuse
    monkeypatch.setitem(sys.modules, "helpers.fuse", module)
    monkeypatch.setattr(helpers, "fuse", module, raising=False)
    made = contenders.fused("ours", path, target="portable")
    assert (made.kind, made.reason) == ("ours", "")
    assert graph.counts(graph.load(made.path)) == graph.counts(graph.load(path))
    assert contenders.fused("ours", path).reason.startswith("ValueError: expected parity")


def test_what_cannot_be_made_is_a_reason(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_text("no model")
    for make in (contenders.onnxscript, contenders.transformers, contenders.int8):
        made = make("bad", bad)
        assert made.reason
        assert str(tmp_path) not in made.reason
    made = contenders.stock("bad", bad, "no such type")
    assert made.reason
    assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx"]


def test_int8_leaves_the_standard_attention_alone(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    tiny (float[2,4,8] x) => (float[2,4,8] y)
    {
      a = MatMul (x, wq)
      y = Attention <q_num_heads: int = 2, kv_num_heads: int = 2> (a, a, a)
    }
    """
    path = write(tmp_path / "standard.onnx", text)
    made = contenders.int8("int8", path)
    assert made.reason == ""
    operators = graph.counts(graph.load(made.path))
    assert operators["Attention"] == operators["MatMulInteger"] == 1


@pytest.fixture
def given():
    return {"given": np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)}


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="optional, a contender")


@pytest.fixture
def plugin():
    """The type in which OpenVINO's plugin computes as it comes on this machine."""
    pytest.importorskip("onnxruntime_ep_openvino", reason="optional, not built for all systems")
    try:
        return computed.plugin_floats({})
    except RuntimeError as error:  # on processors of other makers it offers none
        pytest.skip(str(error))


def test_openvino(attention, given, openvino):
    both = [
        contenders.onnx("onnxruntime", attention, "unfused"),
        contenders.openvino("fp32", attention),
        contenders.openvino("default", attention, precision=None),
        contenders.openvino("int8", attention, int8=True),
    ]
    answer = measured(*both, arrays=given)
    assert answer.reasons == {}
    (name,) = answer.measured["fp32"].outputs
    outputs = {label: one.outputs[name] for label, one in answer.measured.items()}
    np.testing.assert_allclose(outputs["fp32"], outputs["onnxruntime"], atol=1e-5)
    assert 0 < np.abs(outputs["int8"] - outputs["onnxruntime"]).max() < 0.5
    assert answer.operators()["fp32", "run"].sum() > 0
    precision = answer.table().precision
    assert (precision["onnxruntime"], precision["fp32"]) == ("fp32", "fp32")
    takes = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    assert precision["default"] == computed.called(takes)
    off = np.abs(outputs["default"] - outputs["fp32"]).max()
    assert off < 1e-5 if takes == "f32" else 1e-4 < off < 0.1
    assert [one.kind for one in both[1:3]] == ["openvino", "openvino-default"]


def test_openvino_plugin(attention, given, plugin):
    both = [
        contenders.onnx("onnxruntime", attention, "unfused"),
        contenders.openvino_plugin("fp32", attention),
        contenders.openvino_plugin("default", attention, precision=None),
    ]
    answer = measured(*both, arrays=given)
    assert answer.reasons == {}
    table = answer.table()
    assert list(table.precision) == ["fp32", "fp32", plugin]
    assert list(table["handed back"]) == ["", "nothing", "nothing"]
    assert sum(answer.measured["fp32"].operators.values()) == 22
    expected, found, default = (one.outputs["y"] for one in answer.measured.values())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    off = np.abs(default - expected).max()
    assert off < 1e-5 if plugin == "fp32" else 1e-4 < off < 0.1
    assert computed.plugin_floats({"INFERENCE_PRECISION_HINT": "f32"}) == "fp32"


STANDARD = """
<ir_version: 10, opset_import: ["" : 23]>
tiny (float[N,4,8] given) => (float[N,4,8] y)
{
  [first] a = MatMul (given, wq)
  [middle] b = Attention <q_num_heads: int = 2, kv_num_heads: int = 2> (a, a, a)
  [last] y = MatMul (b, wk)
}
"""


def test_what_the_plugin_hands_back_is_said(tmp_path, given, plugin):
    """As it does with the standard's Attention; where that is all there is, it takes no part."""
    path = write(tmp_path / "standard.onnx", STANDARD)
    answer = measured(
        contenders.onnx("onnxruntime", path, "unfused"),
        contenders.openvino_plugin("default", path, precision=None),
        arrays=given,
    )
    assert answer.reasons == {}
    row = answer.table().loc["default"]
    assert row["handed back"] == "1 Attention"
    assert row.precision == {"fp32": "fp32"}.get(plugin, f"{plugin} and fp32")
    operators = answer.operators()["default"]
    assert dict(operators["run"]) == {"MatMul": 2, "Attention": 1}
    assert dict(operators["handed back"]) == {"MatMul": 0, "Attention": 1}
    alone = STANDARD.replace("[first] a = MatMul (given, wq)", "")
    alone = alone.replace("(a, a, a)", "(given, given, given)").replace("[middle] b", "y")
    path = write(tmp_path / "alone.onnx", alone.replace("[last] y = MatMul (b, wk)", ""))
    answer = measured(contenders.openvino_plugin("default", path), arrays=given)
    assert answer.reasons["default"].endswith("plugin takes, found all handed back: 1 Attention")


@pytest.mark.parametrize("name", ["openvino", "onnxruntime_ep_openvino"])
def test_what_is_optional(name, attention, tmp_path, monkeypatch):
    """Where it is not installed the row says so."""
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    make = contenders.openvino if name == "openvino" else contenders.openvino_plugin
    answer = measured(make("absent", attention), arrays={"x": np.ones(1)})
    assert answer.reasons["absent"] == f"ModuleNotFoundError: No module named {name}"


def feeds(count: int) -> list[dict[str, np.ndarray]]:
    """For calibration; the graph does not know the second."""
    random = np.random.default_rng(1)
    return [
        {"given": random.normal(size=(2, 4, 8)).astype(np.float32), "mask": np.ones(1)}
        for _ in range(count)
    ]


def test_static_int8(attention, given):
    from onnxruntime.quantization import QuantType

    static = contenders.static_int8("static", attention, feeds(8))
    unsigned = contenders.static_int8(
        "unsigned", attention, feeds(8), activation_type=QuantType.QUInt8
    )
    assert static.path != unsigned.path
    plain = contenders.onnx("plain", attention, "unfused")
    answer = measured(plain, static, unsigned, arrays=given)
    assert answer.reasons == {}
    operators = answer.operators()
    assert operators["static", "file"]["QuantizeLinear"] > 6
    assert "int8" in answer.table().precision["unsigned"]
    expected = answer.measured["plain"].outputs["y"]
    for label in ("static", "unsigned"):
        assert 1e-3 < np.abs(answer.measured[label].outputs["y"] - expected).max() < 1
    assert contenders.static_int8("none", attention, []).reason.startswith("ValueError")


def test_static_int8_on_openvino(attention, given, openvino):
    pytest.importorskip("nncf", reason="optional, a contender")
    static = contenders.openvino_static_int8("static", attention, feeds(8))
    plain = contenders.onnx("plain", attention, "unfused")
    answer = measured(plain, static, arrays=given)
    assert answer.reasons == {}
    assert answer.table().precision["static"].startswith("int8")
    both = [static.path.with_suffix(end) for end in (".xml", ".bin")]
    assert answer.megabytes["static"] == sum(file.stat().st_size for file in both) / 1e6
    [name] = answer.measured["static"].outputs
    off = answer.measured["static"].outputs[name] - answer.measured["plain"].outputs["y"]
    assert 1e-3 < np.abs(off).max() < 1


def test_openvino_refuses_a_missing_input(attention):
    answer = measured(contenders.openvino("fp32", attention), arrays={"z": np.ones(3)})
    assert "KeyError" in answer.reasons["fp32"]


def test_how_pytorch_runs_is_a_kind_of_its_own():
    autocast = {"bf16": "autocast"}
    eager, compiled, bf16, both = (
        contenders.pytorch("a", "helpers.models:pytorch", name="wav2vec2", **more)
        for more in ({}, {"compiled": True}, autocast, autocast | {"compiled": True})
    )
    assert (eager.kind, compiled.kind) == ("pytorch", "compiled")
    assert (bf16.kind, both.kind) == ("pytorch-bf16", "compiled-bf16")
    assert compiled.arguments == {"name": "wav2vec2", "compiled": True}


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"expected one of pytorch, .* found fast"):
        contenders.onnx("a", "a.onnx", "fast")


def test_kinds_look_different_without_colour():
    shapes = [(look.marker, look.filled) for look in contenders.LOOKS.values()]
    assert len(set(shapes)) == len(shapes)
