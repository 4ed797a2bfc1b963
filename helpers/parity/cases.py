"""What the reference gives for each feed, and where that is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from helpers import files, graph
from helpers.feeds import Feed
from helpers.parity import rows
from helpers.parity.runner import Model, Outputs, Runner


@dataclasses.dataclass
class Case:
    """A feed, what the reference gives for it, and where that is compared."""

    feed: Feed
    outputs: Outputs
    kept: Outputs
    empty: list[np.ndarray]


def cases_of(
    plain: Runner, feeds: Sequence[Feed], models: Sequence[Model]
) -> tuple[list[Case], list[str]]:
    """What the reference gives for each feed, and which feeds it was passed over for, and why.

    One of `models` tells where queries have no key. Raises as `compare` does.
    """
    cases, passed = [], []
    buffers = [graph.buffers(one.model) for one in models if isinstance(one, files.Opened)]
    for feed in rows.with_masked(feeds, models):
        try:
            outputs = plain.run(feed.arrays)
            _check_capacity(outputs, filter(None, buffers))
            empty = rows.empty(feed, outputs)
            kept = rows.kept(plain.run, feed, outputs, empty)
        except Exception as error:  # ONNX Runtime and PyTorch raise types of their own
            if not feed.inferred:
                raise files.BadInput(
                    f"{plain.name}: expected a model that runs on {feed.name}, found:"
                    f" {files.told(error)}; give other inputs"
                ) from None
            passed.append(f"{feed.name} ({files.told(error, 160)})")
            continue
        bad = [name for name, out in outputs.items() if _nan(out[kept[name]])]
        if not bad:
            cases.append(Case(feed, outputs, kept, empty))
        elif feed.inferred:
            passed.append(f"{feed.name} (the reference gives NaN)")
        else:
            raise files.BadInput(
                f"{plain.name}: expected numbers from the reference, found NaN in {bad[0]}"
                f" ({feed.name}); give other inputs"
            )
    nothing = not any(where.any() for case in cases for where in case.kept.values())
    if (any("NaN" in line for line in passed) and not cases) or (
        nothing and any(_nan(out) for case in cases for out in case.outputs.values())
    ):
        raise files.BadInput(
            f"{plain.name}: expected numbers from the reference, found NaN on all inputs that were"
            " inferred; give --inputs FEEDS.npz"
        )
    if not cases:
        raise files.BadInput(
            f"{plain.name}: expected numbers from the reference, found that it runs on none of the"
            f" inputs: {'; '.join(passed)[:400] or 'there are none'}; give --inputs FEEDS.npz"
        )
    if nothing:
        raise files.BadInput(
            f"{plain.name}: expected rows to compare, found outputs without numbers, or none in a"
            " row that has a key, so that parity cannot be told; give --inputs FEEDS.npz with at"
            " least one key in a row"
        )
    return cases, passed


def _check_capacity(outputs: Outputs, buffers: Iterable[graph.Buffers]) -> None:
    """Raise ValueError where what a step gives is longer than the `buffers` of a candidate."""
    for one in buffers:
        for name in one.given.values() if one.capacity else ():
            length = outputs[name].shape[one.AXIS] if name in outputs else 0
            if length > one.capacity:
                raise ValueError(f"{length} positions, of a capacity of {one.capacity}")


def _nan(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).any())
