"""Each of `helpers.fuse` beside attention, on a graph written as text."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from helpers import files, graph
from helpers.fuse import gelu, guards, heads, multi_head, normalization, products, residual
from helpers.graph import values

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\nsmall '


def made(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(HEADER + text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def check(before: ir.Model, after: ir.Model, folder, **inputs: tuple[int, ...]) -> None:
    """Both compute the same, on seeded normal inputs of these shapes."""
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype("f4") for name, shape in inputs.items()}
    results = []
    for name, model in (("before", before), ("after", after)):
        files.save(model, folder / f"{name}.onnx")
        session = files.session(folder / f"{name}.onnx", optimise=False)
        results.append(session.run(None, arrays))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


GELUS = {
    "half outside": "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)",
    "half first": "h = Mul (x, half) a = Div (x, r) b = Erf (a) c = Add (b, one) y = Mul (h, c)",
    "half inside": "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (half, c) y = Mul (x, d)",
    "times": "a = Mul (x, s) b = Erf (a) c = Add (one, b) d = Mul (c, x) y = Mul (half, d)",
}


@pytest.mark.parametrize("way", GELUS)
def test_gelu(way, tmp_path):
    constants = (
        "<float r = {1.4142135}, float s = {0.70710677}, float one = {1}, float half = {0.5}>"
    )
    text = f"(float[2,3] x) => (float[2,3] y) {constants} {{ {GELUS[way]} }}"
    model = made(text)
    assert gelu.fuse(model) == 1
    assert graph.counts(model) == {"Gelu": 1}
    check(made(text), model, tmp_path, x=(2, 3))


def test_another_function_is_no_gelu():
    text = """(float[2,3] x) => (float[2,3] y)
    <float r = {1.5}, float one = {1}, float half = {0.5}>
    { a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half) }"""
    assert gelu.fuse(made(text)) == 0


RMS = """(float[2,3,4] x, float[4] w) => (float[2,3,4] y)
<float two = {2}, float eps = {0.001}, int64[1] last = {-1}>
{ a = Pow (x, two) b = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> (a, last)
  c = Add (b, eps) d = Sqrt (c)
  e = Reciprocal (d) f = Mul (x, e) y = Mul (w, f) }"""
LAYER = """(float[2,3,4] x, float[4] w, float[4] b) => (float[2,3,4] y)
<float two = {2}, float eps = {0.001}, int64[1] last = {-1}>
{ m = ReduceMean <keepdims = 1> (x, last) d = Sub (x, m) s = Pow (d, two)
  v = ReduceMean <keepdims = 1> (s, last) e = Add (v, eps) r = Sqrt (e) n = Div (d, r)
  o = Mul (n, w) y = Add (o, b) }"""


def test_normalisations(tmp_path):
    for text, name, inputs in (
        (RMS, "RMSNormalization", {"x": (2, 3, 4), "w": (4,)}),
        (LAYER, "LayerNormalization", {"x": (2, 3, 4), "w": (4,), "b": (4,)}),
    ):
        model = made(text)
        assert normalization.fuse(model)
        assert graph.counts(model)[name] == 1
        check(made(text), model, tmp_path, **inputs)


GUARDED = """(float[2,2,3,4] q, float[2,1,1,3] keep) => (float[2,2,3,4] y)
<float low = {-10000}, float zero = {0}, float one = {1}, int64[1] last = {-1}, float half = {0.5},
 int64[4] full = {2, 1, 3, 3}>
{ keys = Greater (keep, half) has = Expand (keys, full) off = Not (has) offs = Cast <to = 1> (off)
  mask = Mul (offs, low) a = Attention (q, q, q, mask) COUNTED
  count = ReduceSum (counted, last) none = Less (count, one) y = Where (none, zero, a) }"""


def test_a_guard_by_the_mask_is_left_out(tmp_path):
    text = GUARDED.replace("COUNTED", "counted = Cast <to = 1> (has)")
    model = made(text)
    assert guards.drop(model) == 1
    node = model.graph.outputs[0].producer()
    assert node.op_type == "Attention"


def test_a_guard_by_something_else_stays():
    text = GUARDED.replace("COUNTED", "counted = Expand (keep, full)")
    assert guards.drop(made(text)) == 0


SPLIT = """(float[B,S,8] q, float[B,T,8] k) => (float[B,S,8] y)
<int64[4] heads = {0, 0, 2, 4}, int64[3] flat = {0, 0, 8}>
{ q1 = Reshape (q, heads) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
  k1 = Reshape (k, heads) k2 = Transpose <perm = [0, 2, 1, 3]> (k1)
  a = Attention <scale = 0.7> (q2, k2, k2) a1 = Transpose <perm = [0, 2, 1, 3]> (a)
  y = Reshape (a1, flat) }"""


def test_heads_are_split_in_the_operator(tmp_path):
    model = made(SPLIT)
    assert heads.merge(model) == 1
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert "Transpose" not in graph.counts(model)
    check(made(SPLIT), model, tmp_path, q=(2, 5, 8), k=(2, 7, 8))


def test_heads_that_are_read_otherwise_too(tmp_path):
    """Another reader of the result still gets it with the heads apart."""
    text = SPLIT.replace("float[B,S,8] y)", "float[B,S,8] y, float[B,2,S,4] z)")
    text = text.replace("y = Reshape (a1", "z = Neg (a) y = Reshape (a1")
    model = made(text)
    assert heads.merge(model) == 1
    ir.passes.common.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    check(made(text), model, tmp_path, q=(2, 5, 8), k=(2, 7, 8))


def test_many_keys_are_for_multi_head_attention(tmp_path):
    text = """(float[1,KEYS,8] q) => (float[1,KEYS,8] y)
    { y = Attention <scale = 0.7, q_num_heads = 2, kv_num_heads = 2> (q, q, q) }"""
    few, many = (made(text.replace("KEYS", str(keys))) for keys in (511, 512))
    assert multi_head.use(few) == 0
    assert multi_head.use(many) == 1
    before = made(text.replace("KEYS", "512"))
    check(before, many, tmp_path, q=(1, 512, 8))


def test_a_bias_keeps_attention():
    text = """(float[1,512,8] q, float[1,1,512,512] b) => (float[1,512,8] y)
    { y = Attention <scale = 0.7, q_num_heads = 2, kv_num_heads = 2> (q, q, q, b) }"""
    assert multi_head.use(made(text)) == 0


def test_residuals_are_kept_apart(tmp_path):
    """A session joins them otherwise, which this shows too: it would be a test of nothing."""
    text = """(float[2,3,64] x, float[2,3,64] s, float[64] w, float[64] b) => (float[2,3,64] y)
    { r = Add (x, s) y = LayerNormalization <axis = -1> (r, w, b) }"""
    model = made(text)
    assert residual.keep_apart(model) == 1
    kinds = []
    for name, one in (("before", made(text)), ("after", model)):
        files.save(one, tmp_path / f"{name}.onnx")
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.run.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(tmp_path / f"{name}.onnx", options)
        kinds.append(graph.counts(ir.load(tmp_path / f"{name}.run.onnx")))
    assert kinds[0] == {"com.microsoft.SkipLayerNormalization": 1}
    assert kinds[1] == {"Add": 1, "LayerNormalization": 1, "Reshape": 1}
    check(made(text), model, tmp_path, x=(2, 3, 64), s=(2, 3, 64), w=(64,), b=(64,))


PRODUCTS = {
    "Gemm": "y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (a, b, c)",
    "Einsum": 'y = Einsum <equation = "ij,kj->ik"> (a, b)',
    "Einsum, turned": 'y = Einsum <equation = "ij,kj->ki"> (a, b)',
}


@pytest.mark.parametrize("way", PRODUCTS)
def test_products_as_matmul(way, tmp_path):
    rows = "5,3" if "turned" in way else "3,5"
    text = f"(float[3,4] a, float[5,4] b, float[5] c) => (float[{rows}] y) {{ {PRODUCTS[way]} }}"
    model = made(text)
    product = products.as_matmul(model.graph.outputs[0].producer())
    assert product.op_type == "MatMul"
    assert way.split(",")[0] not in graph.counts(model)
    check(made(text), model, tmp_path, a=(3, 4), b=(5, 4), c=(5,))


def test_an_einsum_that_is_no_matmul_stays():
    text = '(float[3,4] a, float[4] b) => (float[3] y) { y = Einsum <equation = "ij,j->i"> (a, b) }'
    model = made(text)
    assert products.as_matmul(model.graph.outputs[0].producer()) is None
    assert graph.counts(model) == {"Einsum": 1}


def test_numbers_behind_what_repeats_them():
    text = """(int64[2] shape) => (float[N,M] y, float[N,M] z)
    <bool yes = {1}, float low = {-3.0}> {
      all = Expand (yes, shape) none = Not (all) as_float = Cast <to = 1> (none)
      y = Mul (as_float, low) z = Expand (low, shape) }"""
    first, second = made(text).graph.outputs
    assert values.number(first) == 0.0
    assert values.number(second) == -3.0
    assert values.number(made(SPLIT).graph.outputs[0]) is None
