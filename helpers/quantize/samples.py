"""The inputs that a graph is quantised and judged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from helpers import feeds, files

LEAST = 8  # samples, to calibrate on
HELD_OUT = 4  # of so many samples one is kept from calibration, to judge by
JUDGED, TOGETHER = 32, 8  # samples of either kind that errors are measured on; and in one run
FEW = 4  # samples that each layer alone is measured on


@dataclasses.dataclass(frozen=True)
class Samples:
    """`calibration` has single samples, or none; the graph is judged on `judged` of them, and on
    `others`; each layer alone on a `few`. `description` says what they are."""

    calibration: Sequence[Mapping[str, np.ndarray]]
    judged: Sequence[feeds.Feed]
    others: Sequence[feeds.Feed]
    few: Sequence[feeds.Feed]
    description: str


def read(npz: str | Path | None, opened: files.Opened) -> Samples:
    """The samples in the file `npz`, the rows of its arrays; or inferred ones, none of them to
    calibrate on.

    Every fourth is held out. Of a graph whose batch is fixed no row can be: it is judged on
    inferred inputs instead. Raises `files.BadInput` on fewer than eight, and what `feeds` raises.
    """
    if npz is None:
        others, description = feeds.infer(opened)
        return Samples([], [], others, _middle(others), description)
    [feed], description = feeds.load(npz, opened)
    axis, fixed = _batch(opened.model, feed)
    count = len(feed.arrays[axis[0]]) if axis else 1
    if count < LEAST:
        raise files.BadInput(
            f"{npz}: expected {LEAST} samples or more along the first axis, to calibrate on, found"
            f" {count}; add more, or leave out --inputs"
        )
    if fixed:
        others, inferred = feeds.infer(opened)
        said = f"{description}; {count} samples, all for calibration; others {inferred}"
        return Samples([feed.arrays], [feed], others, _middle(others), said)
    rows = np.arange(count)
    held_out = rows % HELD_OUT == HELD_OUT - 1
    said = f"{description}; {count} samples, {held_out.sum()} of them held out from calibration"
    return Samples(
        [_rows(feed, axis, row[None]).arrays for row in rows[~held_out]],
        [*_steps(feed, axis, rows[~held_out], "calibration")],
        [*_steps(feed, axis, rows[held_out], "held out")],
        [_rows(feed, axis, rows[:: count // FEW][:FEW])],
        said,
    )


def _middle(inferred: Sequence[feeds.Feed]) -> list[feeds.Feed]:
    """The feed of the middle size."""
    sizes = [sum(array.size for array in feed.arrays.values()) for feed in inferred]
    return [inferred[int(np.argsort(sizes)[len(sizes) // 2])]]


def _batch(model: ir.Model, feed: feeds.Feed) -> tuple[list[str], bool]:
    """The inputs with a row for each sample, by name, and whether their number is fixed: those
    whose first axis is that of the first input that has two or more."""
    firsts: dict[str, int | str | None] = {}
    for value in model.graph.inputs:
        if value.name in feed.arrays and value.shape:
            first = value.shape[0]
            firsts[value.name] = first if isinstance(first, int) else first.value
    leading = next((name for name in firsts if feed.arrays[name].ndim > 1), None)
    if leading is None:
        return [], False
    count, first = len(feed.arrays[leading]), firsts[leading]
    names = [
        name
        for name, own in firsts.items()
        if len(feed.arrays[name]) == count and own in (first, None)
    ]
    return names, isinstance(first, int)


def _steps(
    feed: feeds.Feed, axis: Sequence[str], rows: np.ndarray, name: str
) -> Iterator[feeds.Feed]:
    """Those rows, evenly spaced where they are many, several to a feed."""
    rows = rows[:: -(-len(rows) // JUDGED)]
    for start in range(0, len(rows), TOGETHER):
        some = rows[start : start + TOGETHER]
        part = _rows(feed, axis, some)
        yield dataclasses.replace(part, name=f"{name}, from sample {some[0]}")


def _rows(feed: feeds.Feed, axis: Sequence[str], rows: np.ndarray) -> feeds.Feed:
    """Some rows of `feed`; where its queries have no key is not known of them yet."""
    arrays = {name: a[rows] if name in axis else a for name, a in feed.arrays.items()}
    keys = {name: a[rows] if name in axis else a for name, a in feed.keys.items()}
    return dataclasses.replace(feed, arrays=arrays, keys=keys, masked=None, settled=None)
