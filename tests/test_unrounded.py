"""8-bit graphs are compared without their rounding, which hides what a fault changes."""

import numpy as np
import onnx
import pytest
from graphs import write
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from helpers import files, fuse, parity
from helpers.feeds import Feed
from helpers.parity import unrounded

X = np.arange(-16, 16, dtype=np.float32).reshape(4, 8) / 4  # on the steps of all graphs here
HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
ONE = {
    "quantized and dequantized": """
 (float[4,8] x) => (float[8,4] y)
<float scale = {0.25}, int8 zero = {3}, int64[1] one = {1}>
{ q = QuantizeLinear (x, scale, zero)
  t = Transpose <perm = [1, 0]> (q)
  y = DequantizeLinear (t, scale, zero) }""",
    "a product of integers": """
 (float[4,8] x) => (float[4,2] y)
{ q, scale, zero = DynamicQuantizeLinear (x)
  p = MatMulInteger (q, w, zero, w_zero)
  f = Cast <to = 1> (p)
  s = Mul (scale, w_scale)
  y = Mul (f, s) }""",
    "a convolution of integers": """
 (float[4,8] x) => (float[1,2,4] y)
<int64[3] shape = {1, 4, 8}>
{ q, scale, zero = DynamicQuantizeLinear (x)
  r = Reshape (q, shape)
  p = ConvInteger <pads = [1, 1], strides = [2]> (r, kernel, zero)
  f = Cast <to = 1> (p)
  y = Mul (f, scale) }""",
    "a product as one operator": """
 (float[4,8] x) => (float[4,2] y)
{ y = com.microsoft.DynamicQuantizeMatMul (x, w, w_scale, w_zero, bias) }""",
    "a product of integers with their scales": """
 (float[4,8] x) => (float[4,2] y)
{ q, scale, zero = DynamicQuantizeLinear (x)
  y = com.microsoft.MatMulIntegerToFloat (q, w, scale, w_scale, zero, w_zero, bias) }""",
}
ARRAYS = {
    "w": np.arange(-8, 8, dtype=np.int8).reshape(8, 2),
    "w_zero": np.array([1, -2], np.int8),
    "w_scale": np.array([0.5, 0.125], np.float32),
    "bias": np.array([3, -1], np.float32),
    "kernel": np.arange(24, dtype=np.int8).reshape(2, 4, 3),
}


def _write(path, text, **arrays):
    proto = onnx.parser.parse_model(HEAD + "g" + text)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name)
        for name, array in (ARRAYS | arrays).items()
        if name in read
    )
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("kind", ONE)
def test_what_falls_on_the_steps_is_the_same(kind, tmp_path):
    """A range of 255 steps of 1/16 has 0 and each of these numbers on one, bar a half of it."""
    path = _write(tmp_path / "a.onnx", ONE[kind])
    out = tmp_path / "b.onnx"
    assert unrounded.write(files.Opened(path), out)
    names = {node.op_type for node in onnx.load(out).graph.node}
    assert not any("Quantize" in name or "Integer" in name for name in names)
    given = {"x": (np.arange(32, dtype=np.float32).reshape(4, 8) * 8 - 120) / 16}
    given["x"][3, 7] = 135 / 16  # from -120 to 135 steps
    if kind.startswith("quantized"):
        given["x"] = X
    [expected] = files.session(path).run(None, given)
    [found] = files.session(out).run(None, given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    given["x"] = given["x"] + 0.1 / 16  # off the steps: what is exact is no longer what is rounded
    [expected] = files.session(path).run(None, given)
    [found] = files.session(out).run(None, given)
    assert np.abs(found - expected).max() > 1e-3


def test_what_is_beyond_the_range_is_cut_off(tmp_path):
    text = ONE["quantized and dequantized"].replace("float scale = {0.25}", "float scale = {0.01}")
    path = _write(tmp_path / "a.onnx", text)
    unrounded.write(files.Opened(path), tmp_path / "b.onnx")
    [found] = files.session(tmp_path / "b.onnx").run(None, {"x": X})
    np.testing.assert_allclose(found, np.clip(X, -1.31, 1.24).T, atol=1e-6)


STAYS = {
    "rounded to the end": """
 (float[4,8] x) => (int8[4,8] y)
<float scale = {0.25}, int8 zero = {3}>
{ y = QuantizeLinear (x, scale, zero) }""",
    "computed with as integers": """
 (float[4,8] x) => (float[4,8] y)
<float scale = {0.25}, uint8 zero = {3}>
{ q = QuantizeLinear (x, scale, zero)
  a = Add (q, zero)
  y = DequantizeLinear (a, scale, zero) }""",
    "computed by an operator of another kind": """
 (float[4,8] x) => (float[4,8] y)
<float scale = {0.25}, uint8 zero = {3}>
{ q = QuantizeLinear (x, scale, zero)
  p = QLinearMatMul (q, scale, zero, square, scale, zero, scale, zero)
  y = DequantizeLinear (p, scale, zero) }""",
    "a scale for each column": """
 (float[4,8] x) => (float[4,8] y)
<int8[8] zero = {0, 0, 0, 0, 0, 0, 0, 0}>
{ q = QuantizeLinear <axis = 1> (x, columns, zero)
  y = DequantizeLinear <axis = 1> (q, columns, zero) }""",
}


@pytest.mark.parametrize("kind", STAYS)
def test_rounding_that_stays(kind, tmp_path):
    others = {"square": np.ones((8, 8), np.uint8), "columns": np.ones(8, np.float32)}
    path = _write(tmp_path / "a.onnx", STAYS[kind], **others)
    assert unrounded.write(files.Opened(path), tmp_path / "b.onnx") is None
    assert not (tmp_path / "b.onnx").exists()


# ── What parity says ────────────────────────────────────────────────────────────────────────────


class _Reader(CalibrationDataReader):
    def __init__(self):
        random = np.random.default_rng(1)
        self.left = [random.normal(size=(2, 5, 8)).astype(np.float32) for _ in range(8)]

    def get_next(self):
        return {"given": self.left.pop()} if self.left else None


def _statically(tmp_path, **changed):
    """The small attention of `graphs` in static 8 bits; what is `changed` is so after it."""
    path = write(tmp_path / "float.onnx")
    eight = tmp_path / "eight.onnx"
    quantize_static(path, eight, _Reader(), activation_type=QuantType.QUInt8)
    if changed:
        proto = onnx.load(eight)
        for tensor in proto.graph.initializer:
            if tensor.name in changed:
                changes = np.asarray(changed[tensor.name], np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(changes, tensor.name))
        eight = tmp_path / "changed.onnx"
        onnx.save(proto, eight)
    return eight


FEEDS = [Feed("some", {"given": np.random.default_rng(2).normal(size=(3, 9, 8)).astype("float32")})]


def test_a_fault_that_rounding_would_hide(tmp_path):
    """Scores that are 1 % off are less than the rounding that a session's optimisation changes."""
    right = _statically(tmp_path)
    [scale] = [t for t in onnx.load(right).graph.initializer if t.name == "half_scale"]
    wrong = _statically(tmp_path, half_scale=1.01 * onnx.numpy_helper.to_array(scale))
    report = parity.compare(right, [right, wrong], FEEDS, "some")
    assert [one.held for one in report.candidates] == [True, False]
    assert report.candidates[0].unrounded
    assert report.candidates[0].tolerance <= 1e-4
    assert report.candidates[1].unrounded
    assert "without the rounding" in report.candidates[1].said()


def test_fuse_says_that_rounding_was_left_out(tmp_path):
    fused = fuse.fuse(_statically(tmp_path), tmp_path / "out.onnx")
    assert fused.held
    assert fused.parity.unrounded
    assert fused.parity.max_abs_diff < 1e-5
    assert "without the rounding to 8 bits (with it, the largest difference is " in str(fused)
    [left] = fused.left
    assert left.endswith("; fuse the float model, and quantise what that gives")


def test_other_steps_are_compared_as_they_are_run(tmp_path):
    """Coarser steps compute the same without their rounding: that must not count."""
    path = _write(tmp_path / "a.onnx", ONE["quantized and dequantized"])
    coarse = ONE["quantized and dequantized"].replace("{0.25}", "{0.5}")
    other = _write(tmp_path / "b.onnx", coarse)
    [candidate] = parity.compare(path, [other], [Feed("x", {"x": X})], "x").candidates
    assert not candidate.held
    assert not candidate.unrounded


def test_other_inputs_are_told_with_the_names_of_the_files(tmp_path):
    path = _write(tmp_path / "a.onnx", ONE["quantized and dequantized"])
    other = ONE["quantized and dequantized"].replace("float[4,8] x", "float[4,8] z")
    other = _write(tmp_path / "b.onnx", other.replace("(x, scale", "(z, scale"))
    with pytest.raises(files.BadInput, match=r"b.onnx: expected the inputs of .+a.onnx \(x "):
        parity.compare(path, [other], [Feed("x", {"x": X})], "x")


def test_what_cannot_be_run_without_rounding_is_compared_as_it_is(tmp_path, monkeypatch):
    """As if a form were taken apart into what ONNX Runtime has no kernel for."""
    path = _write(tmp_path / "a.onnx", ONE["quantized and dequantized"])
    monkeypatch.setitem(
        unrounded._WRITTEN,
        "DequantizeLinear",
        lambda tape, node, floats: [tape.op("NoSuchOperator", node.inputs)],
    )
    [candidate] = parity.compare(path, [path], [Feed("x", {"x": X})], "x").candidates
    assert candidate.held
    assert not candidate.unrounded
