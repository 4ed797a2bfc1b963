"""What `compare` finds on inputs that it inferred: flags, and masks in every sense and shape.

Each graph is compared with itself fused, which must hold, and with graphs that are wrong where only
the right feed shows it.
"""

import re

import numpy as np
import pytest
from building import HEAD, HEADS, WIDTH, Build, Graph, found, save

from helpers import feeds
from helpers.feeds import masks

BOOL, INT, FLOAT = np.bool_, np.int64, np.float32
HIDDEN = ("b", "n", WIDTH)

# ── Flags, and what else chooses a branch ────────────────────────────────────────────────────────


def flagged(dtype, dims, condition) -> Build:
    """One layer in the first branch, two in the other; a mask is lost in one of them."""

    def build(g: Graph, wrong: str) -> None:
        x, mask = g.given("x", FLOAT, *HIDDEN), g.given("given", INT, "b", "n")
        flag = g.given("which", dtype, *dims)

        def bias(inner: Graph, branch: str) -> str | None:
            return None if wrong == branch else inner.penalty(mask)

        def then(inner: Graph) -> str:
            return inner.attention(x, bias=bias(inner, "then"))

        def other(inner: Graph) -> str:
            first = inner.attention(x, name="b", bias=bias(inner, "else"))
            return inner.attention(first, name="c", bias=inner.penalty(mask))

        g.gives("y", g.branch(condition(g, flag), then, other), *HIDDEN)

    return build


FLAGS = {
    "bool": flagged(BOOL, [], lambda g, flag: flag),
    "bool, inverted": flagged(BOOL, [1], lambda g, flag: g.Not(flag)),
    "integer that is 1": flagged(INT, [], lambda g, flag: g.Equal(flag, 1)),
    "integer above 3": flagged(
        np.int32, [1], lambda g, flag: g.Greater(flag, np.array([3], np.int32))
    ),
    "float above a half": flagged(FLOAT, [], lambda g, flag: g.Greater(flag, 0.5)),
}


@pytest.mark.parametrize("build", FLAGS.values(), ids=list(FLAGS))
def test_both_branches_of_a_flag_are_run(build, tmp_path):
    said = found(tmp_path, build, "then", "else")
    assert re.search(r"flag, -?\d+ and \d+", said)
    assert "not run" not in said


def nested(g: Graph, wrong: str) -> None:
    x, outer, inside = g.given("x", FLOAT, *HIDDEN), g.given("p", BOOL, 1), g.given("q", BOOL)

    def scale(branch: str) -> float:
        return HEAD**-0.5 * (0.9 if wrong == branch else 1)

    def then(inner: Graph) -> str:
        return inner.branch(
            inside,
            lambda g: g.attention(x, scale=scale("both")),
            lambda g: g.attention(x, name="b", scale=scale("first")),
        )

    y = g.branch(outer, then, lambda g: g.attention(x, name="c", scale=scale("none")))
    g.gives("y", y, *HIDDEN)


def test_branches_inside_of_branches_are_run(tmp_path):
    found(tmp_path, nested, "both", "first", "none")


def by_length(limit: int) -> Build:
    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", FLOAT, *HIDDEN)
        ways = [
            lambda inner, kind=kind: inner.attention(x, scale=0.2 if wrong == kind else 0.35)
            for kind in ("long", "short")
        ]
        g.gives("y", g.branch(g.Greater(g.length(x, 1), limit), *ways), *HIDDEN)

    return build


@pytest.mark.parametrize("limit", [12, 300])
def test_a_length_that_chooses_a_branch_is_reached(limit, tmp_path):
    assert "not run" not in found(tmp_path, by_length(limit), "long", "short")


def test_a_branch_for_lengths_that_are_not_reached_is_named(tmp_path):
    assert "not run: the then branch of If_" in found(tmp_path, by_length(5000), "short")


def test_a_branch_that_cannot_run_is_named(tmp_path):
    def build(g: Graph, wrong: str) -> None:
        x, flag = g.given("x", FLOAT, 2, 8, WIDTH), g.given("which", BOOL, 1)
        y = g.branch(
            flag,
            lambda g: g.Reshape(g.attention(x), [0, 0, WIDTH + 1]),
            lambda g: g.attention(x, scale=0.2 if wrong else 0.35),
        )
        g.gives("y", y, 2, 8, WIDTH)

    assert "not run: which = 1" in found(tmp_path, build, "wrong")


# ── Masks ────────────────────────────────────────────────────────────────────────────────────────


def masked(dtype, dims, lifted) -> Build:
    """Attention under one mask: `lifted(g, mask, wrong)` gives the bias or what is kept."""

    def build(g: Graph, wrong: str) -> None:
        x, mask = g.given("x", FLOAT, *HIDDEN), g.given("given", dtype, *dims)
        last = [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]
        mask = g.Transpose(mask, perm=last) if wrong == "transposed" else mask
        how = {} if wrong == "dropped" else lifted(g, mask, wrong)
        g.gives("y", g.attention(x, **how), *HIDDEN)

    return build


def kept(*axes: int, inverted: bool = False):
    """A boolean mask with `axes` inserted; its last key leaks, or its sense is wrong."""

    def lifted(g: Graph, mask: str, wrong: str) -> dict:
        keep = g.Unsqueeze(mask, [*axes]) if axes else mask
        keep = g.Not(keep) if inverted != (wrong == "inverted") else keep
        if wrong == "leak":
            count = g.length(mask, -1)
            keep = g.Or(keep, g.Equal(g.Range(0, count, 1), g.Sub(count, 1)))
        return {"keep": keep}

    return lifted


def folded(inverted: bool):
    """(batch · heads, n, n); wrong is the order (heads · batch)."""

    def lifted(g: Graph, mask: str, wrong: str) -> dict:
        n = [g.Unsqueeze(g.length(mask, axis), [0]) for axis in (1, 2)]
        first = [HEADS, -1] if wrong == "order" else [-1, HEADS]
        keep = g.Reshape(mask, g.Concat(first, *n, axis=0))
        keep = g.Transpose(keep, perm=[1, 0, 2, 3]) if wrong == "order" else keep
        return {"keep": g.Not(keep) if inverted else keep}

    return lifted


def penalised(*axes: int, one_masks: bool = False):
    """Numbers of a mask times -1e4: 1 - m, or m itself."""

    def lifted(g: Graph, mask: str, wrong: str) -> dict:
        ones = g.Cast(mask, to=1)
        ones = g.Unsqueeze(ones, [*axes]) if axes else ones
        off = ones if one_masks != (wrong == "inverted") else g.Sub(1.0, ones)
        return {"bias": g.Mul(off, -1.0 if wrong == "weak" else -1e4)}

    return lifted


N2, NN, BNN = ("b", "n"), ("n", "n"), ("b", "n", "n")
SENSES = {
    "(b, n), True is a key": (masked(BOOL, N2, kept(1, 2)), "1", "leak inverted"),
    "(b, n), True is none": (masked(BOOL, N2, kept(1, 2, inverted=True)), "0", "leak inverted"),
    "(n, n), True is a key": (masked(BOOL, NN, kept(0, 1)), "1", "transposed dropped"),
    "(n, n), True is none": (masked(BOOL, NN, kept(0, 1, inverted=True)), "0", "transposed leak"),
    "(b, n, n), True is none": (
        masked(BOOL, BNN, kept(1, inverted=True)),
        "0",
        "transposed dropped",
    ),
    "(b·h, n, n), True is a key": (masked(BOOL, ("bh", "n", "n"), folded(False)), "1", "order"),
    "(b·h, n, n), True is none": (
        masked(BOOL, ("bh", "n", "n"), folded(True)),
        "0",
        "order dropped",
    ),
    "(b, 1, n, n)": (masked(BOOL, ("b", 1, "n", "n"), kept()), "1", "transposed leak"),
    "(b, h, n, n)": (masked(BOOL, ("b", HEADS, "n", "n"), kept(inverted=True)), "0", "transposed"),
    "(b, 1, 1, n)": (masked(BOOL, ("b", 1, 1, "n"), kept()), "1", "dropped leak"),
    "integers": (masked(INT, N2, penalised(1, 2)), "1", "dropped inverted weak"),
    "integers, one masks": (masked(np.int32, N2, penalised(1, 2, one_masks=True)), "0", "inverted"),
    "integers, (b, n, n)": (masked(INT, BNN, penalised(1)), "1", "transposed"),
    "floats of ones and zeros": (masked(FLOAT, N2, penalised(1, 2)), "1", "dropped weak"),
}


@pytest.mark.parametrize("kind", SENSES.values(), ids=list(SENSES))
def test_the_sense_of_a_mask_is_found(kind, tmp_path):
    build, key, wrong = kind
    said = found(tmp_path, build, *wrong.split())
    assert f"mask ({key} is a key)" in said


def test_a_mask_of_pairs_is_told_from_one_of_samples(tmp_path):
    """Of pairs, causal ones are fed, and each query sees a key at least."""
    for kind, pairs in (("(n, n), True is a key", True), ("(b, n), True is a key", False)):
        cases, said = feeds.infer(save(tmp_path / "a.onnx", SENSES[kind][0]))
        assert ("causal" in said) == pairs
        for feed in cases:
            mask = feed.arrays["given"]
            assert mask.any(axis=1).all() or "altogether" in feed.name
            assert not pairs or mask.shape[0] == feed.arrays["x"].shape[1]


def across(g: Graph, wrong: str) -> None:
    """Masks of two senses: of the keys of another sequence, of pairs, and of own keys."""
    x, memory = g.given("x", FLOAT, *HIDDEN), g.given("memory", FLOAT, "b", "l", WIDTH)
    theirs, pairs, own = (
        g.given("theirs", BOOL, "b", "l"),
        g.given("pairs", BOOL, *NN),
        g.given("own", BOOL, *N2),
    )
    keep = g.Unsqueeze(pairs, [0, 1]) if wrong != "pairs" else None
    padding = g.Not(g.Unsqueeze(own, [1, 2]))
    if wrong != "own":
        keep = g.And(keep, padding) if keep else padding
    y = g.attention(x, keep=keep)
    keep = None if wrong == "theirs" else g.Not(g.Unsqueeze(theirs, [1, 2]))
    g.gives("y", g.attention(y, memory, name="c", keep=keep), *HIDDEN)


def test_several_masks_of_different_senses(tmp_path):
    said = found(tmp_path, across, "theirs", "pairs", "own")
    assert "theirs bool (b, l) mask (0 is a key)" in said
    assert "pairs bool (n, n) mask (1 is a key)" in said
    assert "own bool (b, n) mask (0 is a key)" in said


def pooled(g: Graph, wrong: str) -> None:
    """The mean over keys, in whose attention the mask has no part."""
    ids, mask = g.given("ids", INT, *N2), g.given("given", INT, *N2)
    y, ones = g.attention(g.embedded(ids)), g.Unsqueeze(g.Cast(mask, to=1), [2])
    total = g.ReduceSum(g.Mul(y, ones), [1], keepdims=0)
    mean = g.Div(total, g.ReduceSum(ones, [1], keepdims=0))
    if wrong:
        mean = g.ReduceMean(y, [1], keepdims=0)
    g.gives("sentence", mean, "b", WIDTH)


def test_a_mask_that_never_reaches_scores_is_found(tmp_path):
    said = found(tmp_path, pooled, "wrong")
    assert "mask (1 is a key)" in said
    assert "padded not at all, right, left" in said


def test_an_integer_that_is_no_mask_is_not_called_one(tmp_path):
    def build(g: Graph, wrong: str) -> None:
        ids, kind = g.given("ids", INT, *N2), g.given("kind", INT, *N2)
        part = g.Mul(g.Unsqueeze(g.Cast(kind, to=1), [2]), g.weight("kinds", WIDTH, scale=0.7))
        x = g.embedded(ids)
        g.gives("y", g.attention(x if wrong else g.Add(x, part)), *HIDDEN)

    said = found(tmp_path, build, "dropped")
    assert "is a key" not in said
    assert "kind int64 (b, n) integers 0 and 1" in said


# ── Additive masks ───────────────────────────────────────────────────────────────────────────────


def added(*axes: int):
    """Added as it is; wrong if clipped to -4, or if its last key is seen."""

    def lifted(g: Graph, mask: str, wrong: str) -> dict:
        if wrong == "clipped":
            mask = g.Max(mask, -4.0)
        if wrong == "leak":
            count = g.length(mask, -1)
            mask = g.Where(g.Equal(g.Range(0, count, 1), g.Sub(count, 1)), 0.0, mask)
        return {"bias": g.Unsqueeze(mask, [*axes]) if axes else mask}

    return lifted


ADDITIVE = {"(n, n)": (NN, (0, 1)), "(b, n, n)": (BNN, (1,)), "4-D": (("b", 1, "n", "n"), ())}


@pytest.mark.parametrize("kind", ADDITIVE.values(), ids=list(ADDITIVE))
def test_additive_masks_are_told_by_what_they_do(kind, tmp_path):
    """Its axes are (…, queries, keys), and a mask that is clipped masks no more."""
    dims, axes = kind
    build = masked(FLOAT, dims, added(*axes))
    said = found(tmp_path, build, "leak", "clipped", "dropped", "transposed")
    assert "given float32" in said
    assert "additive mask" in said


def test_what_additive_masks_are_fed(tmp_path):
    path = save(tmp_path / "a.onnx", masked(FLOAT, BNN, added(1)))
    values, least = set(), []
    for feed in feeds.infer(path)[0]:
        mask = feed.arrays["given"]
        values |= {*np.unique(mask).tolist()}
        least.append(mask.max(axis=-1).min())  # of a row: 0 where it has a key
        if "holes" in feed.name:
            assert (mask == 0).any(axis=-1).all()
    assert {0.0, masks.LOWEST, -np.inf, -1e4} <= values
    assert 0 in least
    causal = next(one for one in feeds.infer(path)[0] if "causal" in one.name).arrays["given"][0]
    np.testing.assert_array_equal(causal == 0, np.tril(np.ones_like(causal)) == 1)


def test_hidden_states_that_are_called_mask_are_none(tmp_path):
    """And what is added to scores is a mask, whatever it is called."""

    def build(g: Graph, wrong: str) -> None:
        x, bias = g.given("masked", FLOAT, *HIDDEN), g.given("x", FLOAT, "b", 1, "n", "n")
        g.gives("y", g.attention(x, bias=None if wrong else bias), *HIDDEN)

    said = found(tmp_path, build, "dropped")
    assert "masked float32 (b, n, 16) normal" in said
    assert "x float32 (b, 1, n, n) additive mask" in said
