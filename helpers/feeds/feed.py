"""One set of inputs for a model, and what is known of its rows."""

import dataclasses
import re
from collections.abc import Container, Iterable

import numpy as np

MANY = 4  # inputs that differ in a number alone are told as one


@dataclasses.dataclass(frozen=True)
class Feed:
    """One set of inputs by name.

    `keys` has the masks of (batch, length) among them, by name: True where there is a key. `masked`
    has, for each attention site, where a query has no key at all, (batch, heads, queries) or as the
    graph folds these, and `settled`, for each output of the model, where it does not depend on what
    such rows get; None where that is not known. `fixed` are the inputs that say which rows there
    are (masks of any kind, positions, lengths, flags). `inferred` feeds may be passed over where
    the reference does not run, or gives NaN.
    """

    name: str
    arrays: dict[str, np.ndarray]
    keys: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    inferred: bool = False
    masked: list[np.ndarray] | None = None
    fixed: frozenset[str] = frozenset()
    settled: dict[str, np.ndarray] | None = None

    def shapes(self) -> list[str]:
        """Each input with its shape."""
        return listed((name, f"{name} {array.shape}") for name, array in self.arrays.items())

    def changed(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`changed` of its arrays, but for masks and what else is `fixed`."""
        return changed(self.arrays, rows, self.fixed | self.keys.keys())


def listed(named: Iterable[tuple[str, str]]) -> list[str]:
    """What is told of inputs, by name; of those of several layers, which differ in the number in
    their names alone, once."""
    found: dict[str, list[str]] = {}
    for name, told in named:
        found.setdefault(told.replace(name, re.sub(r"\d+", "*", name), 1), []).append(told)
    return [
        one
        for alike, own in found.items()
        for one in (own if len(own) < MANY else [f"{alike} ({len(own)} inputs)"])
    ]


def changed(
    arrays: dict[str, np.ndarray], rows: np.ndarray, kept: Container[str]
) -> dict[str, np.ndarray]:
    """The arrays with other values where `rows`, (batch, length), is True: ids and floats of that
    batch and length, but those `kept`."""
    arrays = dict(arrays)
    for name, array in arrays.items():
        if name in kept or array.shape[:2] != rows.shape or array.ndim > 3:
            continue
        arrays[name] = array = array.copy()
        if array.dtype.kind == "f":
            array[rows] *= -1  # a constant added would be lost in a LayerNormalization
        else:  # 0 and 1 are in range of any table
            array[rows] = array[rows] == 0
    return arrays
