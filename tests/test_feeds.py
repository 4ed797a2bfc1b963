"""Inputs inferred from a graph, and read from a file."""

import numpy as np
import onnx
import onnx.parser
import pytest
from building import WIDTH, WORDS, Graph, found, save
from graphs import write

from helpers import feeds, files
from helpers.feeds import sizes

OPSET = '<ir_version: 8, opset_import: ["" : 17]>'


def infer(tmp_path, text: str, **constants):
    path = write(tmp_path / "a.onnx", f"{OPSET} {text}", **constants)
    return feeds.infer(path)


def shapes(cases, name):
    return {feed.arrays[name].shape for feed in cases}


def test_ids_stay_within_the_table_that_they_index(tmp_path):
    cases, description = infer(
        tmp_path,
        """g (int64[b,s] ids, int64[b,s] kind) => (float[b,s,4] y) {
          t = Unsqueeze (ids, one) u = Squeeze (t, one) w = Gather (words, u)
          k = Gather (kinds, kind) y = Add (w, k) }""",
        words=np.ones((13, 4), np.float32),
        kinds=np.ones((2, 4), np.float32),
        one=np.array([1]),
    )
    ids = np.concatenate([feed.arrays["ids"].ravel() for feed in cases])
    assert ids.min() >= 0
    assert 10 < ids.max() < 13
    assert set(np.unique(cases[0].arrays["kind"])) <= {0, 1}
    assert len({shape[0] for shape in shapes(cases, "ids")}) > 1
    assert len({shape[1] for shape in shapes(cases, "ids")}) > 1
    assert "ids below 13" in description
    assert description.startswith("inferred: ")


MASKED = """g (int64[b,s] ids, int64[b,s] mask) => (float[b,s,4] y) {
  w = Gather (words, ids) m = Cast <to = 1> (mask) n = Unsqueeze (m, two) y = Mul (w, n) }"""


def test_masks_are_ones_and_zeros_padded_both_ways_and_altogether(tmp_path):
    words = np.ones((13, 4), np.float32)
    cases, _ = infer(tmp_path, MASKED, words=words, two=np.array([2]))
    masks = [feed.arrays["mask"] for feed in cases]
    assert all(set(np.unique(mask)) <= {0, 1} for mask in masks)
    assert any(mask.all() for mask in masks)
    assert any((mask[:, 0] == 1).all() and (mask[:, -1] == 0).any() for mask in masks)
    assert any((mask[:, 0] == 0).any() and (mask[:, -1] == 1).all() for mask in masks)
    assert any((~mask.astype(bool)).all(axis=1).any() for mask in masks)
    for feed, mask in zip(cases, masks, strict=True):
        np.testing.assert_array_equal(feed.keys["mask"], mask == 1)


def test_a_boolean_mask_in_which_true_is_padding_is_recognised(tmp_path):
    """As torch.nn.MultiheadAttention has it; changing what is masked away must change nothing."""
    cases, description = infer(
        tmp_path,
        """g (float[b,s,4] x, bool[b,s] padding) => (float[b,s,4] y) {
          n = Unsqueeze (padding, one) t = Transpose <perm = [0, 2, 1]> (x) s0 = MatMul (x, t)
          s1 = Where (n, low, s0) p = Softmax (s1) y = MatMul (p, x) }""",
        one=np.array([1]),
        low=np.float32(-1e9),
    )
    assert "0 is a key" in description
    for feed in cases:
        np.testing.assert_array_equal(feed.keys["padding"], ~feed.arrays["padding"])


def test_dimensions_of_one_name_have_one_size_and_expressions_are_worked_out(tmp_path):
    cases, _ = infer(
        tmp_path,
        """g (float[b,s,4] x, float[b,"s + 3",4] z, float["2*b",s,4] w) => (float[q] y) {
          y = Identity (one) }""".replace('"s + 3"', "s3").replace('"2*b"', "b2"),
        one=np.ones(1, np.float32),
    )
    assert cases
    at = {"s": 7, "b": 2}
    assert sizes.evaluated("s + 3", at) == 10
    assert sizes.evaluated("((((s//2)) - 1)*b) + 1", at) == 5
    assert sizes.evaluated("Max(1, s - 9)", at) == 1


def test_lengths_are_tried_until_the_model_runs(tmp_path):
    """A convolution over 400 samples, as wav2vec2's front end needs."""
    cases, _ = infer(
        tmp_path,
        """g (float[b,n] x) => (float[b,4,m] y) {
          u = Unsqueeze (x, one) y = Conv <strides = [320]> (u, kernel) }""",
        one=np.array([1]),
        kernel=np.ones((4, 1, 400), np.float32),
    )
    lengths = sorted(shape[1] for shape in shapes(cases, "x"))
    assert len(set(lengths)) > 1
    assert lengths[0] > 400 + 4 * 320  # some frames, and not one


def test_a_mask_of_its_own_length_is_as_long_as_the_waveform(tmp_path):
    """It runs at any length, but only at the waveform's does it mask anything."""
    cases, _ = infer(
        tmp_path,
        """g (float[b,n] x, int64[c,t] mask) => (float[b,4,m] y) {
          u = Unsqueeze (x, one) v = Conv <strides = [4]> (u, kernel)
          w = Cast <to = 1> (mask) s = ReduceSum (w) y = Add (v, s) }""",
        one=np.array([1]),
        kernel=np.ones((4, 1, 16), np.float32),
    )
    for feed in cases:
        assert feed.arrays["mask"].shape == feed.arrays["x"].shape


def test_an_image_is_large_enough_for_several_keys(tmp_path):
    cases, _ = infer(
        tmp_path,
        """g (float[b,3,h,w] x, int64[b,k,l] mask) => (float[b,4,p] y) {
          v0 = Conv <strides = [32, 32]> (x, kernel) v = Reshape (v0, flat)
          m0 = Slice (mask, start, end, axes, steps) m1 = Reshape (m0, row) m = Cast <to = 9> (m1)
          t = Transpose <perm = [0, 2, 1]> (v) s0 = MatMul (t, v) s = Where (m, s0, low)
          p0 = Softmax (s) y0 = MatMul (p0, t) y = Transpose <perm = [0, 2, 1]> (y0) }""",
        kernel=np.ones((4, 3, 1, 1), np.float32),
        flat=np.array([0, 4, -1]),
        row=np.array([0, 1, -1]),
        start=np.array([0, 0]),
        end=np.array([2**31, 2**31]),
        axes=np.array([1, 2]),
        steps=np.array([32, 32]),
        low=np.float32(-1e9),
    )
    assert max(shape[2] for shape in shapes(cases, "x")) > 3 * 32
    for feed in cases:
        assert feed.arrays["mask"].shape[1:] == feed.arrays["x"].shape[2:]
    [large] = [feed.arrays["mask"] for feed in cases if "long" in feed.name and "left" in feed.name]
    assert (large[1, :, ::32] == 0).any()  # the padding is there in patches too


def test_positions_of_rotary_embeddings_are_no_mask(tmp_path):
    cases, _ = infer(
        tmp_path,
        """g (float[b,s,4] x, int64[b,s] where, int64[b,s] mask) => (float[b,s,4] y) {
          p = Cast <to = 1> (where) u = Unsqueeze (p, last) a = MatMul (u, frequencies)
          c = Cos (a) z = Mul (x, c) m = Cast <to = 1> (mask) n = Unsqueeze (m, last)
          y = Mul (z, n) }""",
        last=np.array([2]),
        frequencies=np.ones((1, 4), np.float32),
    )
    for feed in cases:
        assert set(feed.keys) == {"mask"}
        assert (feed.arrays["where"] == np.arange(feed.arrays["where"].shape[1])).all()


@pytest.mark.parametrize("name", ["seq.len", "batch-size", "encoder/length", "a b", "dim:0"])
def test_a_dimension_that_is_no_expression_is_a_name(name):
    assert sizes._symbols(name) == [name]
    assert sizes.evaluated(name, {name: 7}) == 7


def test_a_model_that_takes_one_sample_at_a_time_gets_that(tmp_path):
    cases, description = infer(
        tmp_path,
        "g (float[b,s,4] x) => (float[s,4] y) { y = Squeeze (x, first) }",
        first=np.array([0]),
    )
    assert {shape[0] for shape in shapes(cases, "x")} == {1}
    assert "refuses a batch of 2" in description


def test_a_model_that_does_not_load_is_bad_input(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17, "elsewhere" : 1]>'
    path = tmp_path / "a.onnx"
    onnx.save(
        onnx.parser.parse_model(
            f"{text} g (float[b] x) => (float[b] y) {{ y = elsewhere.Op (x) }}"
        ),
        path,
    )
    with pytest.raises(files.BadInput, match="expected a model that ONNX Runtime"):
        feeds.infer(path)


def test_changed_floats_are_told_apart_behind_a_layer_normalization():
    x = np.random.default_rng(0).normal(size=(1, 3, 8))
    rows = np.array([[True, False, False]])
    changed = feeds.Feed("", {"x": x}).changed(rows)["x"]
    np.testing.assert_array_equal(changed[~rows], x[~rows])
    assert (
        abs((changed - changed.mean(-1, keepdims=True)) - (x - x.mean(-1, keepdims=True))).max() > 1
    )


def test_a_cache_is_as_long_as_the_mask_says(tmp_path):
    cases, _ = infer(
        tmp_path,
        """g (int64[b,s] ids, int64[b,t] mask, float[b,2,p,4] k, float[b,2,p,4] v)
           => (float[b,2,t,4] y) {
          w = Gather (words, ids) h0 = Unsqueeze (w, one) two_heads = Concat <axis = 1> (h0, h0)
          all = Concat <axis = 2> (k, two_heads) m = Cast <to = 1> (mask)
          n = Unsqueeze (m, ends) both = Add (all, v2) y = Mul (both, n)
          z = Shape (v) v2 = ReduceSum (v) }""".replace(
            "both = Add (all, v2)", "v2 = ReduceSum (v) both = Add (all, v2)"
        ).replace("z = Shape (v) v2 = ReduceSum (v)", "z = Shape (v)"),
        words=np.ones((13, 4), np.float32),
        one=np.array([1]),
        ends=np.array([1, 3]),
    )
    for feed in cases:
        past, ids = feed.arrays["k"].shape[2], feed.arrays["ids"].shape[1]
        assert feed.arrays["mask"].shape[1] == past + ids


@pytest.mark.parametrize(("weight", "told"), [(1, "normal;"), (8, "normal × 0.5;")])
def test_numbers_are_smaller_where_scores_would_be_far_apart(weight, told, tmp_path):
    """As in T5, whose scores are not scaled: rounding would grow where one score alone counts."""
    cases, description = infer(
        tmp_path,
        """g (float[b,s,4] x) => (float[b,s,4] y) {
          q = MatMul (x, w) k = Transpose <perm = [0, 2, 1]> (x) scores = MatMul (q, k)
          weights = Softmax <axis = -1> (scores) y = MatMul (weights, x) }""",
        w=weight * np.eye(4, dtype=np.float32),
    )
    assert f"x float32 (b, s, 4) {told}" in description
    largest = max(np.abs(feed.arrays["x"]).max() for feed in cases)
    assert (largest > 2) == (weight == 1)


def test_numbers_are_not_made_smaller_where_that_changes_nothing(tmp_path):
    _, description = infer(
        tmp_path,
        """g (float[b,s,4] x) => (float[b,s,4] y) {
          n = LayerNormalization <axis = -1, epsilon = 1e-12> (x, ones) q = MatMul (n, w)
          k = Transpose <perm = [0, 2, 1]> (n) scores = MatMul (q, k)
          weights = Softmax <axis = -1> (scores) y = MatMul (weights, n) }""",
        w=40 * np.eye(4, dtype=np.float32),
        ones=np.ones(4, np.float32),
    )
    assert "x float32 (b, s, 4) normal;" in description


def test_fixed_sizes_are_kept(tmp_path):
    cases, _ = infer(tmp_path, "g (float[1,3,8,8] x) => (float[1,3,8,8] y) { y = Relu (x) }")
    assert shapes(cases, "x") == {(1, 3, 8, 8)}


def test_what_cannot_be_inferred_is_bad_input(tmp_path):
    text = """g (float[b,s,4] x, int64[b,k] which) => (float[b,k,4] y) {
      y0 = Gather <axis = 1> (x, which) y = ReduceSum <keepdims = 0> (y0, one) }"""
    with pytest.raises(files.BadInput, match=r"found which int64 \(b, k\); give --inputs"):
        infer(tmp_path, text, one=np.array([1]))


def test_a_file_of_arrays_is_checked_against_the_model(tmp_path):
    path = write(
        tmp_path / "a.onnx",
        f"{OPSET} {MASKED}",
        words=np.ones((13, 4), np.float32),
        two=np.array([2]),
    )
    ids, mask = np.array([[1, 12]]), np.array([[1, 0]])

    def load(**arrays):
        np.savez(tmp_path / "feeds.npz", **arrays)
        return feeds.load(tmp_path / "feeds.npz", path)

    [feed], description = load(ids=ids, mask=mask)
    np.testing.assert_array_equal(feed.keys["mask"], [[True, False]])
    assert "feeds.npz" in description
    wrong = {
        "expected arrays ids, mask": {"ids": ids},
        "expected arrays ids, mask, found ids, mask, more": {"ids": ids, "mask": mask, "more": ids},
        "expected ids int64": {"ids": ids.astype(np.float32), "mask": mask},
        "expected mask int64": {"ids": ids, "mask": mask[0]},
        "expected ids from 0 to 12": {"ids": ids + 1, "mask": mask},
        "expected ids from 0 to 12, .* found -1 to 10": {"ids": ids - 2, "mask": mask},
        "expected s of one size, found 2 in ids and 3": {"ids": ids, "mask": np.array([[1, 1, 0]])},
        "expected values for ids": {"ids": ids[:0], "mask": mask[:0]},
    }
    for message, arrays in wrong.items():
        with pytest.raises(files.BadInput, match=message):
            load(**arrays)
    for content in (b"", b"no arrays", np.array([object()])):
        bad = tmp_path / "bad.npz"
        if isinstance(content, bytes):
            bad.write_bytes(content)
        else:
            np.savez(bad, ids=content)
        with pytest.raises(files.BadInput, match=r"expected an \.npz file of arrays"):
            feeds.load(bad, path)
    one_array = tmp_path / "one.npy"
    np.save(one_array, ids)
    with pytest.raises(files.BadInput, match=r"expected an \.npz file of arrays"):
        feeds.load(one_array, path)


def test_a_feed_that_the_model_refuses_is_passed_over_and_named(tmp_path):
    """It pads what is short to 20 positions and takes no more, but for what a session makes of it
    that optimises: samples of 20."""

    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", np.float32, "b", "n", WIDTH)
        batch, count = (g.Unsqueeze(g.length(x, axis), [0]) for axis in (0, 1))
        missing = g.Max(g.Sub([20], count), [0])
        padded = g.Pad(x, g.Concat([0, 0, 0, 0], missing, [0], axis=0), 0.0)
        twenty = g.Reshape(padded, g.Concat(batch, [20, WIDTH], axis=0), name="twenty")
        y = g.attention(g.Slice(twenty, [0], count, [1]), scale=0.3 if wrong else 0.35)
        g.gives("y", y, "b", "n", WIDTH)

    said = found(tmp_path, build, "scale")
    assert "passed over: beyond 39 positions (" in said
    assert "'twenty'" in said


def test_what_some_padding_makes_impossible_is_passed_over(tmp_path):
    """A sample without any key is looked up as its last one, at -1, in a table that is none."""
    text = """g (int64[b,s] mask, float[b,s,4] x) => (float[b,s,4] y) {
      count = ReduceSum <keepdims = 0> (mask, one) none = Equal (count, nil)
      some = Cast <to = 7> (none) at = Mul (some, far) w = Gather (table, at)
      u = Unsqueeze (w, one) m0 = Cast <to = 1> (mask) m = Unsqueeze (m0, two)
      xm = Mul (x, m) y = Add (xm, u) }"""
    cases, description = infer(
        tmp_path,
        text,
        one=np.array([1]),
        two=np.array([2]),
        nil=np.array(0),
        far=np.array(50),
        table=np.ones((3, 4), np.float32),
    )
    assert cases
    assert "passed over: short, one sample padding altogether (" in description
    assert all(one.arrays["mask"].any(axis=1).all() for one in cases)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "hidden states"])
def test_a_length_that_was_written_into_a_reshape_is_told(ids, tmp_path):
    """Where it then runs at that length, it is compared there."""

    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", np.int64, "b", "n") if ids else g.given("x", np.float32, "b", "n", WIDTH)
        x = g.embedded(x) if ids else x
        flat = g.Reshape(x, [-1, 23, WIDTH], name="written")
        y = g.Add(x, g.attention(flat, scale=0.3 if wrong else 0.35))
        g.gives("y", y, "b", "n", WIDTH)

    said = found(tmp_path, build, "scale")
    assert "node written (-1,23,16)" in said
    assert "dynamo=True" in said
    assert {one.arrays["x"].shape[1] for one in feeds.infer(tmp_path / "a.onnx")[0]} == {23}


def test_a_reshape_that_fits_nothing_is_told_with_its_sizes(tmp_path):
    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", np.float32, "b", "n", WIDTH)
        g.gives("y", g.Reshape(x, [7, 9000, WIDTH], name="written"), 7, 9000, WIDTH)

    with pytest.raises(files.BadInput, match=r"node written \(7,9000,16\).*dynamo=True"):
        feeds.infer(save(tmp_path / "a.onnx", build))


def test_a_mask_from_which_is_computed_what_is_looked_up(tmp_path):
    """Numbers of blocks in a table of unknown size, -1 of padding, as LongT5 has: no ids."""

    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", np.float32, "b", "n", WIDTH)
        mask = g.given("mask", np.int64, "b", "n")
        count = g.length(x, 1)
        blocks = g.Sub(g.Mul(mask, 3), 1)
        table = g.Slice(g.weight("table", WORDS, WIDTH), [0], g.Unsqueeze(count, [0]), [0])
        keep = g.Unsqueeze(g.Cast(mask, to=onnx.TensorProto.BOOL), [1, 2])
        keep = None if wrong == "mask" else keep
        y = g.attention(g.Add(x, g.Gather(table, blocks)), keep=keep)
        g.gives("y", y, "b", "n", WIDTH)

    assert "mask int64 (b, n) mask (1 is a key)" in found(tmp_path, build, "mask")
