"""Which rows are compared: those that have at least one key.

A row that has none (it is padding altogether; or the first rows of a causal model, padded on the
left; or the window of a row holds padding alone) has no single right value: kernels give NaN, zero,
or the mean of the values. Which rows these are is read off the scores of the attention sites, or
where a graph does not give these out, off the masks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np

from helpers.feeds import Feed
from helpers.feeds.scores import Scores
from helpers.parity.runner import Model, Outputs


def with_masked(feeds: Sequence[Feed], models: Sequence[Model]) -> list[Feed]:
    """The feeds, each with where its queries have no key, if the first of `models` that is a file
    with attention sites can tell."""
    unknown = [feed for feed in feeds if feed.masked is None and feed.keys]
    if not any(not keys.all() for feed in unknown for keys in feed.keys.values()):
        return [*feeds]
    for model in models:
        if callable(model):
            continue
        with closing(Scores(model)) as scores:
            if scores:
                return [_known(feed, scores) if feed in unknown else feed for feed in feeds]
    return [*feeds]


def _known(feed: Feed, scores: Scores) -> Feed:
    try:
        masked = [score.all(axis=-1) for score in scores.masked(feed.arrays)]
    except Exception:  # ONNX Runtime's own types: the model does not run on it, which is told later
        return feed
    settled = scores.settled(feed.arrays, masked)
    return dataclasses.replace(feed, masked=masked or None, settled=settled)


def empty(feed: Feed, outputs: Outputs) -> list[np.ndarray]:
    """Where rows have no key, as (batch, rows) for each number of rows there is.

    Where that is not known of a feed, every row that is padding itself is taken for one, which
    leaves out more than it must.
    """
    if feed.masked is None:
        return [~keys for keys in feed.keys.values() if not keys.all()]
    arrays = [*feed.arrays.values(), *outputs.values()]
    lengths = {array.shape[1] for array in arrays if array.ndim in (2, 3)}
    lacking: dict[int, np.ndarray] = {}
    for masked in feed.masked:  # (batch, heads, rows) or (batch · heads, rows)
        rows = masked.shape[-1] if masked.ndim else 0
        batch = _batch(feed, arrays, masked) if masked.size else 0
        if not batch:
            continue
        if masked.size == rows:  # the same for all samples
            masked = np.repeat(masked.reshape(1, rows), batch, axis=0)
        masked = masked.reshape(batch, -1, rows)
        if rows in lengths:
            masked = masked.any(axis=1)
        else:  # another layout, as Longformer's (batch, rows, heads): whole samples only
            masked = np.repeat(masked.all(axis=(1, 2))[:, None], rows, axis=1)
        lacking[rows] = lacking.get(rows, False) | masked
    for keys in feed.keys.values():  # scores tell no longer where their maximum was taken off
        padding = ~keys.any(axis=1)
        for rows, masked in lacking.items():
            if len(masked) == len(padding):
                lacking[rows] = masked | padding[:, None]
    return [masked for masked in lacking.values() if masked.any()]


def _batch(feed: Feed, arrays: Sequence[np.ndarray], masked: np.ndarray) -> int:
    """How many samples the rows of `masked` are of: one that a mask has, or with which they are the
    rows of an input or output, (batch, rows, …) or (rows, batch, …). 0: that cannot be told."""
    rows = masked.shape[-1]
    for keys in feed.keys.values():
        if masked.size == rows or masked.size % (len(keys) * rows) == 0:
            return len(keys)
    first = [array.shape[0] for array in arrays if array.ndim > 1]
    leading = {array.shape[:2] for array in arrays if array.ndim > 1}
    often = max(set(first), key=first.count, default=0)
    options = [often, masked.shape[0], masked.size // rows]
    options = [size for size in options if size and masked.size % (size * rows) == 0]
    fits = [size for size in options if {(size, rows), (rows, size)} & leading]
    return next(iter(fits or options), often if masked.size == rows else 0)


def kept(
    run: Callable[[Outputs], Outputs], feed: Feed, outputs: Outputs, empty: list[np.ndarray]
) -> Outputs:
    """For each output, True where it is compared.

    Left out are the rows that are `empty` in outputs (batch, rows, …), in keys and values that are
    given out (batch, heads, rows, …), samples that are empty altogether, and in any other output
    what changes with the inputs there. An output that does not depend on inputs of that length at
    all, such as the image's beside a padded text, is compared in full. Where the feed tells what is
    settled whatever such rows get, that is compared.
    """
    if feed.settled is not None and all(
        name in feed.settled and feed.settled[name].shape == out.shape
        for name, out in outputs.items()
    ):
        return {name: feed.settled[name] for name in outputs}
    compared = {name: np.ones(out.shape, bool) for name, out in outputs.items()}
    for rows in empty:
        batch, number = rows.shape
        if number not in {array.shape[1] for array in feed.arrays.values() if array.ndim > 1}:
            changed, depends = outputs, False
        else:
            changed = run(feed.changed(rows))
            others = feed.changed(np.ones_like(rows))
            depends = any(others[name] is not feed.arrays[name] for name in others)
        moved = run(others) if depends else {}
        for name, out in outputs.items():
            if depends and np.array_equal(out, moved[name]):
                continue
            if out.ndim and len(out) == batch:
                compared[name][rows.all(axis=1)] = False
            if out.shape[:2] == rows.shape and out.ndim > 2:
                compared[name][rows] = False
            elif out.ndim == 3 and out.shape[:2] == rows.shape[::-1]:  # rows before the batch
                compared[name][rows.T] = False
            elif out.ndim == 4 and len(out) == batch and out.shape[2] >= number:
                compared[name][:, :, -number:] &= ~rows[:, None, :, None]
            elif depends:
                compared[name] &= (out == changed[name]) | ~np.isfinite(changed[name])
    return compared
