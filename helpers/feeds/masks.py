"""What a mask means, and masks to feed.

Its sense is found by what it does to the scores of the attention sites (`scores`): filled with one
value it masks none, with the other all. Where it does not get there (a pooled output, a mask that
is multiplied into hidden states), a position that is masked away must not show in the others when
its own input changes. Shapes: (batch, keys), (batch, 1, 1, keys); or with queries before the keys,
which is called pairs: (queries, keys), (batch, heads, queries, keys) and the like.
"""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from helpers.feeds.feed import changed
from helpers.feeds.inputs import Input
from helpers.feeds.scores import Arrays, Scores

LOWEST = float(np.finfo(np.float32).min)
# What stands for no key in an additive mask, by what is masked.
VERY_LOW = {"causal": LOWEST, "right": -np.inf, "left": LOWEST, "holes": -1e4, "all": LOWEST}


def lowest(dtype: np.dtype) -> float:
    """The lowest number of a float type."""
    return float(np.finfo(dtype).min) if dtype.kind == "f" else LOWEST


def find_senses(
    masks: Sequence[Input],
    scores: Scores,
    build: Callable[[], Arrays],
    outputs: Callable[[Arrays], list[np.ndarray]],
) -> None:
    """Set `keep`, `drop` and `pairs` of each of `masks`, or its role where it is none.

    `build` makes arrays for all inputs, the masks among them filled with `keep`; `outputs` runs the
    model. What changes nothing anywhere becomes "integers" or "floats".
    """
    for entry in masks:
        entry.keep, entry.drop = (0.0, lowest(entry.dtype)) if entry.is_float else (1, 0)
    counted = _counter(scores, build) if scores else None
    if counted is not None:
        filling = [(0.0, 1.0) if entry.is_float else (1, 0) for entry in masks]
        tried = product(*filling) if len(masks) <= 4 else [tuple(fill[0] for fill in filling)]
        counts = {fill: counted(dict(zip(_names(masks), fill, strict=True))) for fill in tried}
        answers = {fill: count for fill, count in counts.items() if count is not None}
        if answers:
            least = min(answers, key=answers.__getitem__)
            for entry, fill in zip(masks, least, strict=True):
                entry.keep = fill
            for entry in masks:
                _probe(entry, masks, counted, answers[least])
    for entry in masks:
        if entry.counted:
            entry.keep, entry.drop, entry.in_scores = 1, 0, True
        elif not entry.in_scores:
            _by_invariance(entry, build, outputs)
        elif counted is not None:
            entry.pairs = _is_pairs(entry, scores, build)
    for entry in masks:
        entry.pairs = entry.pairs or (
            len(entry.dims) > 2 and not entry.in_scores and entry.dims[-2] != 1
        )


def _names(masks: Sequence[Input]) -> list[str]:
    return [entry.name for entry in masks]


def _counter(scores: Scores, build: Callable[[], Arrays]) -> Callable[[dict], int | None]:
    """How many scores are masked where the inputs named are filled with one value each."""

    def counted(fills: dict[str, float]) -> int | None:
        arrays = build()
        for name, fill in fills.items():
            arrays[name] = np.full_like(arrays[name], fill)
        try:
            return sum(int(score.sum()) for score in scores.masked(arrays))
        except Exception:  # ONNX Runtime's own types: it does not run so, which tells nothing
            return None

    return counted


def _probe(entry: Input, masks: Sequence[Input], counted: Callable, least: int) -> None:
    """Find what masks the scores: the other of 0 and 1, or for floats a very low number."""
    fills = {other.name: other.keep for other in masks}
    others = [1 - entry.keep, lowest(entry.dtype)] if entry.is_float else [1 - entry.keep]
    for drop in others:
        more = counted(fills | {entry.name: drop})
        if more is not None and more > least:
            entry.drop, entry.in_scores = drop, True
            return
    if entry.is_float:
        entry.keep = 0.0


def _is_pairs(entry: Input, scores: Scores, build: Callable[[], Arrays]) -> bool:
    """Whether the last axis but one is the queries': mask its first row, and see what is."""
    if len(entry.dims) < 2:
        return False
    arrays = build()
    shape = arrays[entry.name].shape
    if shape[-2] == 1:
        return False
    if len(shape) > 2:
        return True
    before = scores.masked(arrays)
    arrays[entry.name][0] = entry.drop
    for old, new in zip(before, scores.masked(arrays), strict=True):
        rows = (new & ~old).any(axis=-1)  # (batch, heads, queries) or (batch · heads, queries)
        if rows.any() and rows.shape[-1] > 1:
            return not rows[..., 1:].any()
    return False


def _by_invariance(
    entry: Input, build: Callable[[], Arrays], outputs: Callable[[Arrays], list[np.ndarray]]
) -> None:
    """The sense of a mask that does not show in scores, by what a masked position changes.

    With the right sense nothing at all shows of what is there (2), or only in its own row (1). Else
    it is the one with which an unpadded feed gives numbers, and the other NaN or zeros alone.
    """
    fits, numbers = {1: 0, 0: 0}, {1: False, 0: False}
    for keep in (1, 0) if len(entry.dims) == 2 else ():
        arrays = build()
        full = arrays | {entry.name: np.full_like(arrays[entry.name], keep)}
        rows = np.zeros(full[entry.name].shape, bool)
        rows[:, 0] = True
        first = full | {entry.name: np.where(rows, 1 - keep, full[entry.name]).astype(entry.dtype)}
        others = changed(first, rows, {entry.name})
        try:
            whole, before, after = (outputs(each) for each in (full, first, others))
        except Exception:  # ONNX Runtime's own types: it does not run so
            continue
        numbers[keep] = all(map(_numbers, whole)) and any(array.any() for array in whole)
        pairs = list(zip(before, after, strict=True))
        seen = any(not _close(a, b) for a, b in zip(before, whole, strict=True))
        if seen and all(map(_numbers, before)) and all(_same(a, b, rows.shape) for a, b in pairs):
            fits[keep] = 2 if all(_close(a, b) for a, b in pairs) else 1
    for evidence in (fits, numbers):
        if evidence[1] != evidence[0]:
            entry.keep = int(evidence[1] > evidence[0])
            entry.drop = 1 - entry.keep
            return
    entry.role = "floats" if entry.is_float else "integers"


def _numbers(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _same(before: np.ndarray, after: np.ndarray, rows: tuple[int, ...]) -> bool:
    """Whether an output is the same but for its first position, where it has positions."""
    if before.ndim > 1 and before.shape[:2] == rows:
        return _close(before[:, 1:], after[:, 1:])
    if before.ndim and before.shape[0] == rows[0]:
        return _close(before, after)
    return True


def _close(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two outputs are the same but for rounding."""
    if before.dtype.kind != "f" or not before.size or not _numbers(before):
        return np.array_equal(before, after)
    return np.allclose(before, after, rtol=0, atol=1e-3 * float(np.std(before)) + 1e-30)


# ── Values ──────────────────────────────────────────────────────────────────────────────────────


def filled(entry: Input, shape: tuple[int, ...], padding: str, past: int = 0) -> np.ndarray:
    """A mask of `shape` with `padding`, in its own type and sense: no, causal, right, left,
    holes, bias or all.

    All but "all" leave each row a key: "all" takes all keys from the last sample, or of pairs, from
    the first query of the last sample. The first sample of several is never padded. Where keys are
    counted, no more is taken away than there are `past` ones, since the operator counts back.
    """
    kept = (
        _pairs(shape, padding)
        if entry.pairs
        else _keys(shape, padding, past if entry.counted and past else shape[-1])
    )
    array = np.full(shape, entry.keep, dtype=np.float64 if entry.is_float else entry.dtype)
    drop = VERY_LOW.get(padding, entry.drop) if entry.additive else entry.drop
    array[~kept] = max(drop, lowest(entry.dtype)) if np.isfinite(drop) else drop
    random = np.random.default_rng(2)
    if entry.additive and padding == "bias":
        array = random.normal(size=shape)
    special = [value for value in entry.special if value not in (entry.keep, entry.drop)]
    if special and padding != "no":  # values that mean more than that there is a key
        marked = kept & (random.random(shape) < 0.2)
        array[marked] = random.choice(special, size=int(marked.sum()))
    return array.astype(entry.dtype)


def ids(
    entry: Input, shape: tuple[int, ...], padding: str, random: np.random.Generator
) -> np.ndarray:
    """Ids within bounds; where there is padding, those that the graph compares ids with."""
    array = random.integers(entry.low, entry.bound, size=shape)
    special = [value for value in entry.special if entry.low <= value < entry.bound]
    if special and padding not in ("no", "causal", "bias", "all") and len(shape) > 1:
        marked = ~_keys(shape, padding, shape[-1])
        array[marked] = np.random.default_rng(2).choice(special, size=int(marked.sum()))
    return array


def _keys(shape: tuple[int, ...], padding: str, most: int) -> np.ndarray:
    """True where there is a key, (batch, …, keys); `most` are padding at the end."""
    kept, length = np.ones(shape, bool), shape[-1]
    random = np.random.default_rng(1)
    for row in range(shape[0]):
        if not row and shape[0] > 1:
            continue
        cut = min((length // 3 + row) % max(length, 1), most)
        if padding == "left" and len(shape) == 2:
            kept[row, :cut] = False
        elif padding in ("left", "right"):  # images are padded on the right alone
            kept[row, ..., length - cut :] = False
        elif padding == "holes":
            kept[row] = random.random(kept[row].shape) < 0.6
            kept[row, ..., length // 2 : length // 2 + 1] = True
    if padding == "all":
        kept[-1] = False
    return kept


def _pairs(shape: tuple[int, ...], padding: str) -> np.ndarray:
    """True where a query sees a key, (…, queries, keys)."""
    kept = np.ones(shape, bool)
    queries, keys = shape[-2:]
    own = np.arange(queries)[:, None] + (keys - queries)  # the key at each query's own position
    at, cut = np.arange(keys)[None, :], keys // 3
    random = np.random.default_rng(1)
    padded = kept[1:] if len(shape) > 2 and shape[0] > 1 else kept  # the first is never padded
    if padding == "causal":
        kept &= at <= own
    elif padding == "right":
        padded[..., keys - cut :] = False
        own = np.minimum(own, keys - cut - 1)
    elif padding == "left":
        padded[..., :cut] = False
    elif padding in ("holes", "all"):
        kept &= random.random(shape) < 0.6
    kept |= at == np.clip(own, 0, keys - 1)
    if padding == "all":
        kept[(-1,) * (len(shape) - 2) + (0,)] = False
    return kept
