"""The precision that products were computed in, from what runtimes tell of it."""

import types

import numpy as np
import pytest
from graphs import write

from helpers.workers import computed, processor


@pytest.fixture(autouse=True)
def instruction_sets(monkeypatch):
    """This machine's do not matter."""
    monkeypatch.setattr(processor, "instruction_sets", lambda: ("AVX2", "VNNI"))


def event(operator: str, *inputs: str, name: str = "n", index: int = 0) -> dict:
    """As in ONNX Runtime's profile; `inputs` are types."""
    shapes = [{one: [2, 2]} for one in inputs]
    told = {"op_name": operator, "node_index": index, "input_type_shape": shapes}
    return {"name": f"{name}_kernel_time", "args": told}


def test_precisions_in_words():
    assert computed.in_words({}) == ""
    assert computed.in_words({"fp32": 3}) == "fp32"
    assert computed.in_words({"fp32": 3, "int8": 9}) == "int8 and fp32"
    assert computed.in_words({"bf16": 1, "fp32": 3, "int8": 2}) == "fp32, int8 and bf16"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (event("MatMul", "float"), "fp32"),
        (event("FusedConv", "float16", "float16"), "fp16"),
        (event("Attention", "double"), "fp64"),
        (event("MatMulInteger", "uint8", "int8"), "int8"),
        (event("DynamicQuantizeMatMul", "float", "int8"), "int8"),
        (event("QAttention", "uint8", "int8"), "int8"),
        (event("QLinearConv", "uint8"), "int8"),
        (event("Softmax", "float"), None),
        (event("QuantizeLinear", "float"), None),
    ],
)
def test_of_an_operator_of_onnx_runtime(told, expected):
    assert computed.of_events([told], "unread.onnx") == ({expected: 1} if expected else {})


def test_of_many_each_node_counts_once():
    found = [event("MatMul", "float", index=index) for index in (0, 1, 1)]
    assert computed.of_events(found, "unread.onnx") == {"fp32": 2}


NBITS = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
tiny (float[2,32] x, uint8[8,1,16] w, float[8] s) => (float[2,8] a, float[2,8] b)
{
  [plain] a = com.microsoft.MatMulNBits <K = 32, N = 8, bits = 4, block_size = 32> (x, w, s)
  [level] b = com.microsoft.MatMulNBits
    <K = 32, N = 8, bits = 4, block_size = 32, accuracy_level = 4> (x, w, s)
}
"""


def test_of_weights_of_few_bits(tmp_path):
    """Their inputs are quantised where the node asks for it, or the session made it."""
    path = str(write(tmp_path / "a.onnx", NBITS))
    names = ("plain", "level", "made by the session")
    found = [event("MatMulNBits", "float", name=name, index=3) for name in names]
    assert [list(computed.of_events([one], path)) for one in found] == [
        ["fp32"],
        ["int8"],
        ["int8"],
    ]
    assert computed.of_plugin(path, [], "fp32") == {"int8": 2}
    assert computed.of_plugin(path, [], "bf16") == {"bf16": 2}
    assert computed.of_plugin(path, [("MatMulNBits", "plain")], "bf16") == {"bf16": 1}


QDQ = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[2,8] x, float scale, int8 zero, int8[8,8] w) => (float[2,8] y)
{
  q = QuantizeLinear (x, scale, zero)
  d = DequantizeLinear (q, scale, zero)
  v = DequantizeLinear (w, scale, zero)
  [eight] a = MatMul (d, v)
  [weights] b = MatMul (a, v)
  [floats] c = MatMul (b, wq)
  y = Softmax (c)
}
"""


def test_of_a_file_on_the_plugin(tmp_path):
    path = str(write(tmp_path / "a.onnx", QDQ))
    assert computed.of_plugin(path, [], "bf16") == {"int8": 1, "bf16": 2}
    assert computed.of_plugin(path, [], "fp32") == {"int8": 2, "fp32": 1}
    assert computed.of_plugin(path, [("MatMul", "eight")], "fp32") == {"int8": 1, "fp32": 1}


INTEGERS = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
tiny (uint8[2,8] x) => (int32[2,8] a, float[2,8] b)
{
  a = MatMulInteger (x, w, zero)
  b = com.microsoft.MatMulIntegerToFloat (x, w, scale, scales, zero)
}
"""


def test_of_integers_on_the_plugin_as_plain_openvino_tells_of_them(tmp_path, monkeypatch):
    arrays = {"w": np.arange(-32, 32, dtype=np.int8).reshape(8, 8), "zero": np.uint8(128)}
    arrays |= {"scale": np.float32(0.02), "scales": np.full(8, 0.01, np.float32)}
    path = write(tmp_path / "a.onnx", INTEGERS, **arrays)
    assert computed.of_plugin(str(path), [], "fp32") == {"fp32": 1, "int8": 1}
    assert computed.of_plugin(str(path), [], "bf16") == {"fp32": 1, "bf16": 1}
    openvino = pytest.importorskip("openvino", reason="optional, a contender")
    monkeypatch.undo()
    core = openvino.Core()
    model = core.read_model(path)
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("2026-11-30: this CPU has no bf16, and may not quantise as it runs")
    for asked, floats in (("f32", "fp32"), ("bf16", "bf16")):
        made = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": asked})
        assert computed.of_openvino(model, made) == computed.of_plugin(str(path), [], floats)


def test_without_vnni_nothing_is_quantised_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "instruction_sets", lambda: ("AVX2",))
    path = str(write(tmp_path / "a.onnx", NBITS))
    assert computed.of_plugin(path, [], "fp32") == {"fp32": 2}
    weights = ("FullyConnected", "u4", "brgemm_avx2_f32", "n")
    model = types.SimpleNamespace(get_ops=list)
    assert computed.of_openvino(model, compiled(weights)) == {"fp32": 1}


class Told(str):
    """As OpenVINO gives what it tells of a node."""

    def astype(self, _: type) -> str:
        return str(self)


def compiled(*nodes: tuple[str, str, str, str], group: int = 32):
    """What OpenVINO made of a model: types, precisions, primitives and the names of parts."""
    keys = ("layerType", "runtimePrecision", "primitiveType", "originalLayersNames")
    infos = [dict(zip(keys, map(Told, node), strict=True)) for node in nodes]
    ops = [types.SimpleNamespace(get_rt_info=lambda info=info: info) for info in infos]
    runtime = types.SimpleNamespace(get_ops=lambda: ops)
    return types.SimpleNamespace(get_property=lambda _: group, get_runtime_model=lambda: runtime)


def test_of_what_openvino_runs():
    product = types.SimpleNamespace(
        get_friendly_name=lambda: "scores", get_type_name=lambda: "MatMul"
    )
    model = types.SimpleNamespace(get_ops=lambda: [product])
    ran = compiled(
        ("FullyConnected", "bf16", "brgemm_avx512_bf16", "n_q"),
        ("Subgraph", "bf16", "jit_avx512_bf16", "scale,scores,"),
        ("Subgraph", "f32", "jit_avx512_f32", "add,multiply"),
        ("Convolution", "f32", "jit_avx512_f32", "c"),
        ("Eltwise", "f32", "jit_avx512_f32", "e"),
        ("MatMul", "u8", "brgemm_avx512_I8", "m"),
    )
    assert computed.of_openvino(model, ran) == {"bf16": 2, "fp32": 1, "int8": 1}
    weights = ("FullyConnected", "u4", "brgemm_avx512_f32", "n")
    assert computed.of_openvino(model, compiled(weights)) == {"int8": 1}
    assert computed.of_openvino(model, compiled(weights, group=0)) == {"fp32": 1}
    bf16 = ("FullyConnected", "u4", "brgemm_avx512_amx_bf16", "n")
    assert computed.of_openvino(model, compiled(bf16)) == {"bf16": 1}
