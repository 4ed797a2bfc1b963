"""How far `compare` goes on inputs that it inferred: windows, tables, ids, lengths and caches.

Each graph is compared with itself fused, which must hold, and with graphs that are wrong beyond a
window, in a table's last row, in the past alone.
"""

import numpy as np
import pytest
from building import HEAD, HEADS, WIDTH, WORDS, Build, Graph, found, save

from helpers import feeds, files

BOOL, INT, FLOAT = np.bool_, np.int64, np.float32
HIDDEN, IDS = ("b", "n", WIDTH), ("b", "n")

# ── Long enough ──────────────────────────────────────────────────────────────────────────────────


def window(size: int, *, triangles: bool = False) -> Build:
    """A causal window of `size`, by a comparison of positions or by two triangles."""

    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", FLOAT, *HIDDEN)
        width = size + (wrong == "one wider")
        if triangles:
            count = g.Unsqueeze(g.length(x, 1), [0])
            keep = g.Trilu(g.Expand(1.0, g.Concat(count, count, axis=0)), upper=0)
            keep = keep if wrong == "none" else g.Trilu(keep, 1 - width, upper=1)
            keep = g.Greater(keep, 0.0)
        else:
            rows, columns = g.pairs(x)
            keep = g.GreaterOrEqual(rows, columns)
            near = g.Less(g.Sub(rows, columns), width)
            keep = keep if wrong == "none" else g.And(keep, near)
        g.gives("y", g.attention(x, keep=g.Unsqueeze(keep, [0, 1])), *HIDDEN)

    return build


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (window(17), ["none", "one wider"]),
        (window(96, triangles=True), ["none", "one wider"]),
        (window(200), ["none"]),
    ],
    ids=["17", "96, by triangles", "200"],
)
def test_a_window_is_passed(build, wrong, tmp_path):
    assert "not reached" not in found(tmp_path, build, *wrong)


def test_a_window_that_is_too_wide_is_named(tmp_path):
    _, said = feeds.infer(save(tmp_path / "a.onnx", window(4096)))
    assert "a window of 4096 is not reached" in said


def buckets(g: Graph, wrong: str) -> None:
    """T5's: 8 exact distances, then by their logarithm, the last from 128 on."""
    x = g.given("x", FLOAT, *HIDDEN)
    rows, columns = g.pairs(x)
    distance = g.Abs(g.Sub(columns, rows))
    logarithm = g.Log(g.Div(g.Cast(g.Max(distance, 1), to=1), 8.0))
    large = g.Mul(g.Div(logarithm, float(np.log(128 / 8))), 8.0)
    large = g.Min(g.Add(g.Cast(large, to=7), 8), 15)
    bucket = g.Where(g.Less(distance, 8), distance, large)
    table = np.random.default_rng(3).normal(size=(16, HEADS)).astype(np.float32)
    table[{"near": 2, "far": 15}.get(wrong, [])] = 0
    bias = g.Transpose(g.Gather(table, bucket), perm=[2, 0, 1])
    g.gives("y", g.attention(x, bias=g.Unsqueeze(bias, [0])), *HIDDEN)


def test_the_last_bucket_of_distances_is_reached(tmp_path):
    found(tmp_path, buckets, "near", "far")


def learned(g: Graph, wrong: str) -> None:
    """A table of 42 rows, of which positions begin at the third, as in OPT and BART."""
    ids = g.given("ids", INT, *IDS)
    table = np.random.default_rng(5).normal(size=(42, WIDTH)).astype(np.float32)
    if wrong == "last":
        table[-1] = 0
    at = g.Add(g.Range(0, g.length(ids, 1), 1), 1 if wrong == "shifted" else 2)
    positions = g.Unsqueeze(g.Gather(table, at), [0])
    g.gives("y", g.attention(g.Add(g.embedded(ids), positions)), *HIDDEN)


def test_a_table_of_positions_is_reached_to_its_last_row_and_not_passed(tmp_path):
    said = found(tmp_path, learned, "last", "shifted")
    assert "(2, 40)" in said
    assert "passed over" not in said


def rotary(g: Graph, wrong: str) -> None:
    """Tables of sines for 72 positions, which are given."""
    x, positions = g.given("x", FLOAT, *HIDDEN), g.given("where", INT, *IDS)
    angles = np.arange(72)[:, None] * 0.3 ** np.arange(HEAD // 2)
    angles = np.concatenate([angles, angles], axis=1)
    if wrong == "tail":
        angles[60:] = 0

    def turned(value: str, which: str) -> str:
        at = positions
        if wrong == "queries" and which == "q":
            at = g.Max(g.Sub(at, 1), 0)
        cos, sin = (
            g.Unsqueeze(g.Gather(f(angles).astype(FLOAT), at), [1]) for f in (np.cos, np.sin)
        )
        one = g.Slice(value, [0], [HEAD // 2], [3])
        two = g.Slice(value, [HEAD // 2], [HEAD], [3])
        return g.Add(g.Mul(value, cos), g.Mul(g.Concat(g.Neg(two), one, axis=3), sin))

    g.gives("y", g.attention(x, turned=turned), *HIDDEN)


def test_given_positions_reach_the_end_of_tables_of_sines(tmp_path):
    said = found(tmp_path, rotary, "tail", "queries")
    assert "where int64 (b, n) ids below 72" in said


# ── Ids, and lengths ─────────────────────────────────────────────────────────────────────────────


def looked_up(way, dtype=INT, rows: int = WORDS) -> Build:
    """Ids that look up a table by `way(g, table, ids)`; in wrong ones a part of it is zero."""

    def build(g: Graph, wrong: str) -> None:
        ids = g.given("given", dtype, *IDS)
        table = np.random.default_rng(11).normal(size=(rows, WIDTH)).astype(np.float32)
        table[{"upper": slice(rows // 2, None), "lower": slice(rows // 4)}.get(wrong, [])] = 0
        g.gives("y", g.attention(way(g, table, ids)), *HIDDEN)

    return build


def wrapped(g: Graph, table: np.ndarray, ids: str) -> str:
    """As Keras does: negative ids count from the end."""
    return g.Gather(table, g.Where(g.Less(ids, 0), g.Add(ids, WORDS), ids))


LOOKUPS = {
    "Where": looked_up(wrapped),
    "Clip": looked_up(lambda g, table, ids: g.Gather(table, g.Clip(ids, 0, WORDS - 1))),
    "Mod": looked_up(lambda g, table, ids: g.Gather(table, g.Mod(ids, WORDS))),
    "Add": looked_up(lambda g, table, ids: g.Gather(table, g.Add(ids, 2)), rows=WORDS + 2),
    "floats": looked_up(lambda g, table, ids: g.Gather(table, g.Cast(ids, to=7)), FLOAT),
    "GatherND": looked_up(lambda g, table, ids: g.GatherND(table, g.Unsqueeze(ids, [2]))),
}


@pytest.mark.parametrize("way", LOOKUPS)
def test_ids_are_followed_to_their_table(way, tmp_path):
    """What Mod brings into the table goes around it once."""
    said = found(tmp_path, LOOKUPS[way], "upper", "lower")
    assert f"ids below {2 * WORDS if way == 'Mod' else WORDS};" in said
    assert "passed over" not in said


def embedding(g: Graph, wrong: str) -> None:
    """com.microsoft's operator, with tables of words, positions and segments."""
    i32 = np.int32
    ids, kinds, mask = (g.given(name, i32, *IDS) for name in ("one", "two", "three"))
    segments = np.random.default_rng(13).normal(size=(3, WIDTH)).astype(FLOAT)
    segments = segments[[0, 2, 1]] if wrong == "segments" else segments
    places = np.random.default_rng(14).normal(size=(40, WIDTH)).astype(FLOAT)
    places[39 if wrong == "last" else []] = 0
    words = g.weight("words", WORDS, WIDTH, scale=1.0)
    norm = np.ones(WIDTH, FLOAT), np.zeros(WIDTH, FLOAT)
    tables = (words, places, segments)
    x, _ = g.op(
        *("EmbedLayerNormalization", ids, kinds, *tables, *norm),
        outputs=2,
        domain="com.microsoft",
    )
    bias = None if wrong == "mask" else g.penalty(mask)
    g.gives("y", g.attention(x, bias=bias), *HIDDEN)


def test_the_tables_of_an_embedding_operator(tmp_path):
    said = found(tmp_path, embedding, "segments", "last", "mask")
    assert "one int32 (b, n) ids below 30" in said
    assert "two int32 (b, n) ids below 3" in said


def lengths(g: Graph, wrong: str) -> None:
    x, count = g.given("x", FLOAT, *HIDDEN), g.given("given", INT, "b")
    row = g.positions(g.length(x, 1), 0)
    less = g.LessOrEqual if wrong == "one more" else g.Less
    keep = g.Unsqueeze(less(row, g.Unsqueeze(count, [1])), [1, 2])
    g.gives("y", g.attention(x, keep=None if wrong == "dropped" else keep), *HIDDEN)


def test_lengths_are_between_one_and_the_length(tmp_path):
    said = found(tmp_path, lengths, "dropped", "one more")
    assert "given int64 (b) lengths" in said
    for feed in feeds.infer(tmp_path / "a.onnx")[0]:
        n, counts = feed.arrays["x"].shape[1], feed.arrays["given"]
        assert counts.min() >= 1
        assert counts.max() == n


# ── Caches ───────────────────────────────────────────────────────────────────────────────────────

PAST = ("b", HEADS, "p", HEAD)
PRESENT = ("b", HEADS, "t", HEAD)


def causal(g: Graph, x: str, keys: str, wrong: str) -> str:
    """(1, 1, n, t), aligned at the last key; wrong is at the first."""
    n, t = g.length(x, 1), g.length(keys, 2)
    offset = g.constant(0) if wrong == "top left" else g.Sub(t, n)
    rows = g.Add(g.positions(n, 1), offset)
    return g.Unsqueeze(g.GreaterOrEqual(rows, g.positions(t, 0)), [0, 1])


def extended(g: Graph, x: str) -> tuple[str, str]:
    """Keys and values: those of the past, and then those of `x`."""
    past = [g.given(name, FLOAT, *PAST) for name in ("keys", "values")]
    own = [g.heads(x, name) for name in ("k", "v")]
    return tuple(g.Concat(*both, axis=2) for both in zip(past, own, strict=True))


def finished(g: Graph, x: str, context: str, keys: str, values: str) -> None:
    y = g.Add(x, g.MatMul(g.merged(context), g.weight("o", WIDTH, WIDTH)))
    g.gives("y", y, *HIDDEN)
    g.gives("keys_out", keys, *PRESENT)
    g.gives("values_out", values, *PRESENT)


def cached(g: Graph, wrong: str) -> None:
    x, mask = g.given("x", FLOAT, *HIDDEN), g.given("given", INT, "b", "t")
    keys, values = extended(g, x)
    bias = g.penalty(mask)
    if wrong == "past":
        past = g.Less(g.Range(0, g.length(mask, 1), 1), g.Sub(g.length(mask, 1), g.length(x, 1)))
        bias = g.Where(past, 0.0, bias)
    bias = None if wrong == "dropped" else bias
    keep = causal(g, x, keys, wrong)
    finished(g, x, g.scored(g.heads(x, "q"), keys, values, bias=bias, keep=keep), keys, values)


def test_a_cache_is_empty_and_not_and_its_mask_covers_both(tmp_path):
    found(tmp_path, cached, "top left", "past", "dropped")
    cases, _ = feeds.infer(tmp_path / "a.onnx")
    sizes = {(one.arrays["keys"].shape[2], one.arrays["x"].shape[1]) for one in cases}
    assert any(past == 0 and n > 1 for past, n in sizes)
    assert any(past > 0 and n == 1 for past, n in sizes)
    assert any(past > 0 and n > 1 for past, n in sizes)
    assert max(past for past, _ in sizes) > 64
    assert max(n for _, n in sizes) > 64
    for one in cases:
        total = one.arrays["keys"].shape[2] + one.arrays["x"].shape[1]
        assert one.arrays["given"].shape[1] == total


def crossed(g: Graph, wrong: str) -> None:
    """A cache that grows, and keys of an encoder that do not, with a mask of their length."""
    x, mask = g.given("x", FLOAT, *HIDDEN), g.given("given", INT, "b", "l")
    theirs = [g.given(name, FLOAT, "b", HEADS, "l", HEAD) for name in ("k2", "v2")]
    keys, values = extended(g, x)
    context = g.scored(g.heads(x, "q"), keys, values, keep=causal(g, x, keys, wrong))
    y = g.Add(x, g.MatMul(g.merged(context), g.weight("o", WIDTH, WIDTH)))
    bias = None if wrong == "mask" else g.penalty(mask)
    finished(g, y, g.scored(g.heads(y, "q2"), *theirs, bias=bias), keys, values)


def test_keys_of_another_sequence_are_no_past(tmp_path):
    said = found(tmp_path, crossed, "top left", "mask")
    assert "k2 float32 (b, 2, l, 8) keys or values of another sequence" in said
    assert "keys float32 (b, 2, p, 8) cache" in said


def merged_decoder(g: Graph, wrong: str) -> None:
    """One file for both steps: a flag says whether the past is used."""
    ids, mask = g.given("ids", INT, *IDS), g.given("given", INT, "b", "t")
    past = [g.given(name, FLOAT, *PAST) for name in ("keys", "values")]
    flag = g.given("use_cache_branch", BOOL, 1)

    def step(g: Graph, used: bool) -> tuple[str, str, str]:
        x = g.embedded(ids)
        keys, values = (g.heads(x, name) for name in ("k", "v"))
        if used:
            keys, values = g.Concat(past[0], keys, axis=2), g.Concat(past[1], values, axis=2)
        keep = causal(g, x, keys, "top left" if wrong == "decoding" and used else "")
        bias = None if wrong == "prefill" and not used else g.penalty(mask)
        context = g.scored(g.heads(x, "q"), keys, values, bias=bias, keep=keep)
        return g.Add(x, g.MatMul(g.merged(context), g.weight("o", WIDTH, WIDTH))), keys, values

    y, keys, values = g.branch(flag, lambda g: step(g, True), lambda g: step(g, False), outputs=3)
    g.gives("y", y, *HIDDEN)
    g.gives("keys_out", keys, *PRESENT)
    g.gives("values_out", values, *PRESENT)


def test_a_merged_decoder_is_run_with_its_cache_and_without(tmp_path):
    assert "not run" not in found(tmp_path, merged_decoder, "decoding", "prefill")


def grouped(width: int = 16) -> Build:
    """GroupQueryAttention, given how many keys a sample's mask counts."""

    def build(g: Graph, wrong: str) -> None:
        x, mask = g.embedded(g.given("ids", INT, *IDS)), g.given("given", INT, "b", "t")
        last = g.Sub(g.ReduceSum(mask, [1], keepdims=0), 1)
        counts = [g.Cast(last, to=6), g.Cast(g.length(mask, 1), to=6)]
        past = [g.given(name, FLOAT, "b", 1, "p", width) for name in ("keys", "values")]
        q, k, v = (
            g.MatMul(x, g.weight(n, WIDTH, w))
            for n, w in zip("qkv", (2 * width, width, width), strict=True)
        )
        angles = np.arange(64)[:, None] * 0.3 ** np.arange(width // 2)
        more = {"do_rotary": 1, "local_window_size": 3 if wrong == "window" else -1}
        more["scale"] = 0.3 if wrong == "scale" else 0.35
        tables = [f(angles).astype(FLOAT) for f in (np.cos, np.sin)]
        if wrong == "tail":
            tables[0][50:] = 1
        outputs = g.op(
            *("GroupQueryAttention", q, k, v, *past, *counts, *tables),
            **{"outputs": 3, "domain": "com.microsoft", "num_heads": 2, "kv_num_heads": 1} | more,
        )
        y = g.MatMul(outputs[0], g.weight("o", 2 * width, WIDTH))
        g.gives("y", g.Add(x, y), *HIDDEN)
        for name, value in zip(("keys_out", "values_out"), outputs[1:], strict=True):
            g.gives(name, value, "b", 1, "t", width)

    return build


def test_an_operator_that_counts_keys_is_fed_masks_padded_on_the_right(tmp_path):
    said = found(tmp_path, grouped(), "window", "scale", "tail")
    assert "given int64 (b, t) mask (1 is a key)" in said
    assert said.endswith("padded not at all, right, left")  # with holes, counts say nothing
    masks = [one.arrays["given"] for one in feeds.infer(tmp_path / "a.onnx")[0]]
    assert all(mask.any(axis=1).all() for mask in masks)
    assert any((mask[:, 0] == 1).all() and (mask[:, -1] == 0).any() for mask in masks)


def test_a_head_that_its_kernel_refuses_gives_that_reason(tmp_path):
    with pytest.raises(files.BadInput, match=r"head_size.*(multiple of|divisible by)"):
        feeds.infer(save(tmp_path / "a.onnx", grouped(12)))
