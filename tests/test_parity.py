"""Parity: wrong fusions are caught, and rows without a key raise no false alarm."""

import numpy as np
import onnx
import pytest
from graphs import write

from helpers import feeds, files, parity
from helpers.parity import rows

# One layer of attention on ids, with a padding mask, in three ways; W is (8, 8), E (20, 8).
HEAD = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
g (int64[batch,length] ids, int64[batch,length] mask) => (float[batch,length,8] y, float[batch,8] z)
"""
START = """
  x = Gather (table, ids)
  q0 = MatMul (x, wq) q1 = Reshape (q0, heads) q = Transpose <perm = [0, 2, 1, 3]> (q1)
  k0 = MatMul (x, wk) k1 = Reshape (k0, heads) k = Transpose <perm = [0, 2, 1, 3]> (k1)
  v0 = MatMul (x, wv) v1 = Reshape (v0, heads) v = Transpose <perm = [0, 2, 1, 3]> (v1)
  m0 = Cast <to = 1> (mask) m1 = Sub (one, m0) m2 = Mul (m1, lowest) m3 = Unsqueeze (m2, axes)
  n = Shape <start = 1> (ids) shape = Concat <axis = 0> (one_i, n, n)
"""
CAUSAL = "t = Expand (zero, shape) u = Add (t, lowest) w = Trilu <upper = 1> (u, one_s)"
UNFUSED = """
  kt = Transpose <perm = [0, 1, 3, 2]> (k) s0 = MatMul (q, kt) s1 = Mul (s0, half)
  s = Add (s1, bias) p = Softmax (s) a = MatMul (p, v)
"""
END = """
  b = Transpose <perm = [0, 2, 1, 3]> (a) c = Reshape (b, flat) y = Add (c, x)
  z = Gather <axis = 1> (y, first)
"""
CONSTANTS = {
    "table": np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32),
    "one": np.float32(1),
    "lowest": np.finfo(np.float32).min,
    "axes": np.array([1, 2]),
    "one_i": np.array([1]),
    "one_s": np.array(1),
    "zero": np.float32(0),
    "first": np.array(0),
}


def graph(tmp_path, name: str, attention: str, **changed):
    text = HEAD + "{" + START + attention + END + "}"
    return write(tmp_path / f"{name}.onnx", text, **(CONSTANTS | changed))


def causal(tmp_path, name, attention=UNFUSED, **changed):
    bias = CAUSAL + " bias0 = Add (m3, w) bias = Max (bias0, lowest)"
    return graph(tmp_path, name, bias + attention, **changed)


def plain(tmp_path, name, attention=UNFUSED, **changed):
    both = "z0 = Expand (zero, shape) bias = Add (m3, z0)"
    return graph(tmp_path, name, both + attention, **changed)


def fused(mask: str = "bias", *, causal: int = 0, scale: float = 0.5) -> str:
    return f"a = Attention <is_causal = {causal}, scale = {scale}> (q, k, v{mask and ', ' + mask})"


def compare(reference, *candidates) -> parity.Report:
    return parity.compare(reference, candidates, *feeds.infer(reference))


def test_a_right_fusion_holds(tmp_path):
    reference = plain(tmp_path, "a")
    report = compare(reference, plain(tmp_path, "b", fused()))
    assert report.held
    assert report.candidates[0].max_abs_diff < report.candidates[0].tolerance


def test_a_right_causal_fusion_holds(tmp_path):
    """Padded on the left, its first rows have no key: NaN, zero or a mean are all as good."""
    assert compare(causal(tmp_path, "a"), causal(tmp_path, "b", fused())).held


WRONG = {
    "made causal": fused(causal=1),
    "mask dropped": fused(""),
    "scale 1 % off": fused(scale=0.505),
    "a mean of all values": "w0 = Mul (bias, zero) e = Mul (q, zero) a = Attention (e, k, v, w0)",
}


@pytest.mark.parametrize("attention", WRONG.values(), ids=list(WRONG))
def test_a_wrong_fusion_is_caught(attention, tmp_path):
    report = compare(plain(tmp_path, "a"), plain(tmp_path, "b", attention))
    assert not report.held
    assert report.candidates[0].max_abs_diff > report.candidates[0].tolerance


def test_a_causal_mask_that_was_lost_is_caught(tmp_path):
    assert not compare(causal(tmp_path, "a"), plain(tmp_path, "b", fused())).held


def test_what_only_padding_shows_is_caught(tmp_path):
    """Without padding the dropped mask is right, which is how such fusions go unnoticed."""
    reference, other = plain(tmp_path, "a"), plain(tmp_path, "b", fused(""))
    cases, description = feeds.infer(reference)
    full = [feed for feed in cases if all(keys.all() for keys in feed.keys.values())]
    assert parity.compare(reference, [other], full, description).held
    assert not parity.compare(reference, [other], cases, description).held


def test_rows_without_a_key_must_be_finite_where_the_reference_is(tmp_path):
    """0 / 0 is NaN for the sample whose mask is all zeros, and 0 / 1 changes nothing elsewhere."""
    rest = """ r0 = ReduceMax <keepdims = 1> (mask, one_i) r = Unsqueeze (r0, axes)
      any_key = Cast <to = 1> (r) nan = Div (zero, any_key) a = Add (a1, nan)"""
    attention = fused().replace("a =", "a1 =") + rest
    report = compare(plain(tmp_path, "a"), plain(tmp_path, "b", attention))
    assert not report.held
    assert "not finite in a row without a key" in report.candidates[0].reason


def test_a_padded_row_that_has_keys_is_compared_where_all_is_fused(tmp_path):
    """What rows lack keys is read off an Attention too: a padded query still sees the others."""
    zeroed = (
        fused().replace("a =", "a1 =")
        + """
      q_mask = Unsqueeze (m0, query_axes) a = Mul (a1, q_mask)"""
    )
    reference = plain(tmp_path, "a", fused())
    other = plain(tmp_path, "b", zeroed, query_axes=np.array([1, 3]))
    assert not compare(reference, other).held


@pytest.mark.parametrize("mask", [plain, causal])
def test_a_fused_reference_raises_no_false_alarm(mask, tmp_path):
    assert compare(mask(tmp_path, "a", fused()), mask(tmp_path, "b")).held


IMAGE = """ w0 = ReduceMax <keepdims = 1> (mask, one_i) w1 = Cast <to = 1> (w0)
  w2 = Unsqueeze (w1, two) w = Mul (image, {}) """


def test_an_image_beside_a_padded_text_is_compared(tmp_path):
    """The wrong one loses the image of the sample whose text is padding altogether."""
    head = HEAD.replace("mask)", "mask, float[batch,5,8] image)").replace(
        "z)", "z, float[batch,5,8] w)"
    )
    bias = "z0 = Expand (zero, shape) bias = Add (m3, z0)"
    paths = [
        write(
            tmp_path / f"{factor}.onnx",
            head + "{" + START + bias + UNFUSED + IMAGE.format(factor) + END + "}",
            two=np.array([2]),
            **CONSTANTS,
        )
        for factor in ("one", "w2")
    ]
    report = compare(*paths)
    assert not report.held
    assert report.candidates[0].where.startswith("w[")


def test_scores_in_another_layout_leave_out_whole_samples_only():
    """Longformer's are (batch, rows, heads, window): the heads are not rows."""
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    for last, expected in ((mask[1], []), (0 * mask[1], [[False] * 4, [True] * 4])):
        mask[1] = last
        masked = np.zeros((2, 6, 4), bool)
        masked[mask == 0] = True
        feed = feeds.Feed("", {"mask": mask}, {"mask": mask == 1}, masked=[masked])
        empty = rows.empty(feed, {"y": np.zeros((2, 6, 8))})
        assert [one.tolist() for one in empty] == ([expected] if expected else [])


def test_what_was_passed_over_is_said(tmp_path):
    path = write(
        tmp_path / "a.onnx",
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[b,s] mask) => (float[b,s] y) { m = Cast <to = 1> (mask) y = Div (m, m) }""",
    )
    assert (
        "passed over: short, padded on the right (the reference gives NaN)"
        in compare(path, path).inputs
    )


def test_a_candidate_that_does_not_load_has_not_held(tmp_path):
    reference, other = plain(tmp_path, "a"), plain(tmp_path, "b")
    proto = onnx.load(other)
    proto.graph.node[0].domain = "elsewhere"
    onnx.save(proto, other)
    report = compare(reference, other)
    assert not report.held
    assert "does not load" in report.candidates[0].reason


def test_a_function_can_be_the_reference(tmp_path):
    path = plain(tmp_path, "a")
    cases, description = feeds.infer(path)
    session = files.session(path)

    def twice(arrays):
        return {"y": 2 * session.run(["y"], arrays)[0], "z": session.run(["z"], arrays)[0]}

    report = parity.compare(twice, [path], cases, description)
    assert not report.held
    assert report.candidates[0].where.startswith("y[")


def test_a_candidate_that_fails_has_not_held(tmp_path):
    attention = "short = Reshape (bias, bad) " + fused("short")
    other = plain(tmp_path, "b", attention, bad=np.array([1, 1, 1, 5]))
    report = compare(plain(tmp_path, "a"), other)
    assert not report.held
    assert "fails on" in report.candidates[0].reason
    assert report.to_json()["parity"]["max_abs_diff"] is None


def test_other_inputs_or_outputs_are_bad_input(tmp_path):
    reference = plain(tmp_path, "a")
    proto = onnx.load(reference)
    del proto.graph.output[1]
    onnx.save(proto, tmp_path / "b.onnx")
    with pytest.raises(files.BadInput, match="expected the outputs of"):
        compare(reference, tmp_path / "b.onnx")
    text = (
        HEAD + "{" + START + "z0 = Expand (zero, shape) bias = Add (m3, z0)" + UNFUSED + END + "}"
    )
    other = write(tmp_path / "c.onnx", text.replace("ids", "words"), **CONSTANTS)
    with pytest.raises(files.BadInput, match="expected the inputs of"):
        compare(reference, other)


def test_nan_in_the_reference_is_bad_input(tmp_path):
    path = write(
        tmp_path / "a.onnx",
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Log (x) }',
    )
    with pytest.raises(files.BadInput, match="found NaN"):
        compare(path, path)


def test_the_report_is_json_and_text(tmp_path):
    reference = plain(tmp_path, "a")
    report = compare(reference, plain(tmp_path, "b", fused()), plain(tmp_path, "c", fused("")))
    answer = report.to_json()
    assert answer["held"] is False
    assert [model["held"] for model in answer["models"]] == [True, False]
    assert answer["parity"]["max_abs_diff"] == answer["models"][1]["max_abs_diff"]
    assert answer["parity"]["inputs"].startswith("inferred: ")
    assert "NOT HELD" in str(report)
    assert list(report.table()["parity"]) == ["held", "not held"]


def test_outputs_of_no_dimension(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    mean (float[batch,8] given) => (float m)
    { m = ReduceMean <keepdims = 0> (given) }"""
    path = write(tmp_path / "mean.onnx", text)
    cases, description = feeds.infer(path)
    assert parity.compare(path, [path], cases, description).held


def test_models_are_called_as_they_were_given(tmp_path, monkeypatch):
    write(
        tmp_path / "a.onnx",
        HEAD.splitlines()[0] + "\ng (float[3] x) => (float[3] y) { y = Relu (x) }",
    )
    monkeypatch.chdir(tmp_path)
    report = parity.compare("a.onnx", ["../" + tmp_path.name + "/a.onnx"], *feeds.infer("a.onnx"))
    assert (report.reference, report.worst.name) == ("a.onnx", f"../{tmp_path.name}/a.onnx")
