"""What `compare` compares, and how far it lets outputs differ: sizes, types, 8 bits, rows.

Graphs are built in the test: right ones fused or in another order, wrong ones by a little.
"""

from functools import partial

import numpy as np
import pytest
from building import HEAD, HEADS, LOWEST, WIDTH, Build, Graph, compared, found, save

from helpers import feeds, parity
from helpers.__main__ import main

# ── What is compared, by how much it may differ, and in which types ──────────────────────────────

SCALE = HEAD**-0.5
HIDDEN, IDS = ("b", "n", WIDTH), ("b", "n")


def layer(factor: float = 1.0, scale: float = SCALE) -> Build:
    """One layer under a padding mask, its output times `factor`. Wrong: the mask, or the scale."""

    def build(g: Graph, wrong: str) -> None:
        ids, mask = g.given("ids", np.int64, *IDS), g.given("given", np.int64, *IDS)
        bias = None if wrong == "mask" else g.penalty(mask)
        by = scale * (0.95 if wrong == "scale" else 1)
        y = g.attention(g.embedded(ids), bias=bias, scale=by)
        g.gives("y", g.Mul(y, factor), *HIDDEN)

    return build


def nothing(g: Graph, wrong: str) -> None:
    x = g.given("x", np.float32, *HIDDEN)
    g.gives("none", g.Slice(g.attention(x), [0], [0], [1]), "b", 0, WIDTH)


def no_key(g: Graph, wrong: str) -> None:
    """A mask of the graph's own that leaves no key at all."""
    x = g.given("x", np.float32, *HIDDEN)
    keep = g.Less(g.Add(*g.pairs(x)), 0)
    g.gives("y", g.attention(x, keep=g.Unsqueeze(keep, [0, 1])), *HIDDEN)


@pytest.mark.parametrize("build", [nothing, no_key])
def test_nothing_compared_is_not_parity(build, tmp_path, capsys):
    path = str(save(tmp_path / "a.onnx", build))
    assert main(["compare", path, path]) == 2
    said = capsys.readouterr().err
    assert "expected rows to compare" in said
    assert "give --inputs FEEDS.npz with at least one key in a row" in said


def test_given_inputs_without_a_key_are_not_parity(tmp_path, capsys):
    path = str(save(tmp_path / "a.onnx", layer()))
    ids = np.ones((2, 5), np.int64)
    np.savez(tmp_path / "feeds.npz", ids=ids, given=0 * ids)
    assert main(["compare", path, path, "--inputs", str(tmp_path / "feeds.npz")]) == 2
    assert "expected rows to compare" in capsys.readouterr().err


def test_how_many_numbers_were_compared_is_said(tmp_path):
    report = compared(tmp_path, layer())
    total = report.to_json()["parity"]["compared"]
    assert total > 1000
    assert f"compared {total:,} numbers in" in str(report)


@pytest.mark.parametrize("factor", [1e-8, 1e-4, 1e3])
def test_the_tolerance_goes_with_the_size_of_outputs(factor, tmp_path):
    found(tmp_path, layer(factor), "mask", "scale")


def halves(g: Graph, wrong: str) -> None:
    """float32 outside, float16 inside; the right candidate scales queries instead of scores."""
    ids, mask = g.given("ids", np.int64, *IDS), g.given("given", np.int64, *IDS)
    x = g.embedded(ids)

    def half(value) -> str:
        return g.Cast(value, to=10)

    def split(name: str) -> str:
        product = g.MatMul(half(x), half(g.weight(name, WIDTH, WIDTH)))
        return g.Transpose(g.Reshape(product, [0, 0, HEADS, HEAD]), perm=[0, 2, 1, 3])

    q, k, v = (split(name) for name in ("q", "k", "v"))
    scale = half(g.constant(SCALE * (0.8 if wrong == "scale" else 1)))
    k = g.Transpose(k, perm=[0, 1, 3, 2])
    s = g.MatMul(g.Mul(q, scale), k) if g.fused else g.Mul(g.MatMul(q, k), scale)
    s = s if wrong == "mask" else g.Add(s, half(g.penalty(mask)))
    context = g.Cast(g.merged(g.MatMul(g.Softmax(s, axis=-1), v)), to=1)
    g.gives("y", g.Add(x, context), *HIDDEN)


def test_float16_inside_is_named_and_allowed(tmp_path):
    report = compared(tmp_path, halves, "mask", "scale")
    assert [one.held for one in report.candidates] == [True, False, False], str(report)
    assert report.candidates[0].max_abs_diff > 1e-4
    assert report.candidates[0].tolerance > 5e-3
    assert {one.precision for one in report.candidates} == {"float16"}
    assert ", float16)" in str(report)


def test_a_tolerance_of_ones_own(tmp_path, capsys):
    reference = str(save(tmp_path / "a.onnx", layer()))
    off = str(save(tmp_path / "b.onnx", layer(), "scale"))
    fine = str(save(tmp_path / "c.onnx", layer(scale=SCALE * (1 + 1e-6))))
    assert main(["compare", reference, off, "--tolerance", "10"]) == 0
    assert "tolerance 1.0e+01" in capsys.readouterr().out
    assert main(["compare", reference, fine]) == 0
    assert main(["compare", reference, fine, "--tolerance", "1e-12"]) == 1


@pytest.mark.parametrize("wrong", ["mask", "scale"])
def test_the_worst_feed_is_written_and_shows_it_again(wrong, tmp_path, capsys):
    reference = str(save(tmp_path / "a.onnx", layer()))
    other = str(save(tmp_path / "b.onnx", layer(), wrong))
    npz = tmp_path / "feed.npz"
    assert main(["compare", reference, other, "--save-inputs", str(npz)]) == 1
    assert set(np.load(npz)) == {"ids", "given"}
    assert main(["compare", reference, other, "--inputs", str(npz)]) == 1
    assert main(["compare", reference, reference, "--inputs", str(npz)]) == 0
    capsys.readouterr()
    away = tmp_path / "none" / "feed.npz"
    assert main(["compare", reference, other, "--save-inputs", str(away)]) == 2
    assert "feed.npz" in capsys.readouterr().err


# ── 8 bits ───────────────────────────────────────────────────────────────────────────────────────


def quantised(dynamic: bool) -> Build:
    """Two layers, T5's in that distances add to scores, whose products are in 8 bits.

    Dynamic quantisation has one scale for a whole tensor, QDQ one that is written.
    """

    def product(g: Graph, x: str, name: str) -> str:
        weight = np.random.default_rng(sum(map(ord, name))).normal(size=(WIDTH, WIDTH)) / 3
        scale = np.float32(np.abs(weight).max() / 127)
        weight, zero = np.round(weight / scale).astype(np.int8), np.int8(0)
        if not dynamic:
            by = np.float32(0.03), np.uint8(128)
            x = g.DequantizeLinear(g.QuantizeLinear(x, *by), *by)
            return g.MatMul(x, g.DequantizeLinear(weight, scale, zero))
        x, by, own = g.DynamicQuantizeLinear(x, outputs=3)
        whole = g.MatMulInteger(x, weight, own, zero)
        return g.Mul(g.Cast(whole, to=1), g.Mul(by, scale))

    def build(g: Graph, wrong: str) -> None:
        ids, mask = g.given("ids", np.int64, *IDS), g.given("given", np.int64, *IDS)
        x = g.embedded(ids)
        rows, columns = g.pairs(x)
        distances = g.Add(g.Clip(g.Sub(columns, rows), -5, 5), 5)
        near = g.Gather(g.weight("near", 11, HEADS, scale=1.5), distances)
        bias = g.Unsqueeze(g.Transpose(near, perm=[2, 0, 1]), [0])
        both = g.Add(g.penalty(mask), bias)
        norm = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
        for number in "01":
            h = g.LayerNormalization(x, *norm, axis=-1)
            heads = (g.Reshape(product(g, h, n + number), [0, 0, HEADS, HEAD]) for n in "qkv")
            q, k, v = (g.Transpose(one, perm=[0, 2, 1, 3]) for one in heads)
            scale = 1.5 * SCALE * (0.95 if wrong == f"scale{number}" else 1)
            masked = bias if wrong == f"mask{number}" else both
            context = g.merged(g.scored(q, k, v, bias=masked, scale=scale))
            x = g.Add(x, product(g, context, "o" + number))
        g.gives("y", g.LayerNormalization(x, *norm, axis=-1), *HIDDEN)

    return build


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "QDQ"])
def test_one_scale_that_is_5_percent_off_shows_in_8_bits(dynamic, tmp_path):
    said = found(tmp_path, quantised(dynamic), "scale0", "scale1", "mask1")
    for one in feeds.infer(tmp_path / "a.onnx")[0] if dynamic else ():
        assert one.arrays["given"].any(axis=1).all()
    assert ("altogether" in said) != dynamic


# ── Rows without a key ───────────────────────────────────────────────────────────────────────────


def rowless(g: Graph, wrong: str, dtype: type = np.int64) -> None:
    """Causal, with padding; a row without a key is the mean of the values, or fused, zeros."""
    x, mask = g.given("x", np.float32, *HIDDEN), g.given("given", dtype, *IDS)
    rows, columns = g.pairs(x)
    own = g.Unsqueeze(g.GreaterOrEqual(rows, columns), [0, 1])
    keep = g.And(own, g.Cast(g.Unsqueeze(mask, [1, 2]), to=9))
    q, k, v = (g.heads(x, name) for name in ("q", "k", "v"))
    scale = SCALE * (0.9 if wrong else 1)
    s = g.Mul(g.MatMul(q, g.Transpose(k, perm=[0, 1, 3, 2])), scale)
    p = g.Softmax(g.Where(keep, s, LOWEST), axis=-1)
    p = g.Mul(p, g.Cast(keep, to=1)) if g.fused or wrong else p
    g.gives("y", g.Add(x, g.merged(g.MatMul(p, v))), *HIDDEN)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
def test_rows_without_a_key_are_judged_alike_inferred_and_given(dtype, tmp_path):
    """Left out, with how many there are and by how much they differ, and no other row is."""
    inferred = compared(tmp_path, partial(rowless, dtype=dtype), "scale")
    x, mask = np.random.default_rng(0).normal(size=(3, 9, WIDTH)), np.ones((3, 9), dtype)
    mask[0], mask[1, :4] = 0, 0
    np.savez(tmp_path / "feeds.npz", x=x.astype(np.float32), given=mask)
    reference, others = tmp_path / "a.onnx", [tmp_path / f"{n}.onnx" for n in ("fused", "scale")]
    given = parity.compare(reference, others, *feeds.load(tmp_path / "feeds.npz", reference))
    for report in (inferred, given):
        right, wrong = report.candidates
        assert (right.held, wrong.held) == (True, False), str(report)
        assert right.left_out > 0
        assert right.left_out_diff > 0.1 > right.max_abs_diff
        assert f"left out {right.left_out} rows without a key, which differ by" in right.said()
    assert given.candidates[0].left_out == 9 + 4
    assert given.candidates[0].compared == {"feeds.npz": (27 - 13) * WIDTH}
