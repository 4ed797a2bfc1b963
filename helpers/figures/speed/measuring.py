"""Does fusing pay? Time on ONNX Runtime of what `helpers.fuse` makes, against the best of the rest.

``python -m helpers.figures.speed.measuring [--models bert vit] [--rounds 10] [--lengths 128]``

Models of base size (stand-ins: published configurations with seeded weights), two lengths, batch 1
and 8. In each *cell* (model, length, batch) the others are: the exports unfused, ONNX Runtime's
optimizer at its best, onnxscript, transformers' ``ort_fusions``, and the export at opset 23. Who
does not compute what PyTorch computes takes no part. A *ratio* is the time of one contender over
that of the fastest of the others, paired by round: below 1 is faster than all of them.

It may be run in parts. A cell that is measured again replaces its rows in assets/speed.csv; the
summary, the picture, speed.svg, and the table in results.md are made of all cells there.
Export files go to a temporary folder, up to 10 GB for one model.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from helpers import benchmark
from helpers.contenders import Contender
from helpers.figures import cells, page
from helpers.figures.cells import ASSETS
from helpers.figures.speed import table
from helpers.figures.speed.lineup import prepare
from helpers.figures.speed.models import MODELS, Arrays
from helpers.figures.speed.table import ROUTE_LOOKS
from helpers.quiet import progress_on

CLOSE = 1.15  # who is surely slower than this after the first rounds is not timed in the later
FIRST = 3  # rounds in which all take part
MEASURED = ("ratio", "low", "high", "rounds")  # columns of the table


# ── Times ───────────────────────────────────────────────────────────────────────────────────────


def measure(
    contenders: Sequence[Contender], arrays: Arrays, name: str, rounds: int, at_once: int
) -> list[dict[str, Any]]:
    """A row for each contender on `arrays`: its ratio, with a 95 % interval, or its reason.

    All take part in the first rounds, `at_once` models in memory; ours and the others that may be
    the fastest are then timed in `rounds` more, together if memory allows. Who was too slow keeps
    the ratio of the first rounds.
    """
    able_first = sorted(contenders, key=lambda contender: bool(contender.reason))
    first = benchmark.run(able_first, {name: arrays}, rounds=FIRST, at_once=at_once)[name]
    print(first.conditions, flush=True)
    best, slow = ratios(first)
    rows = {label: (*ratio, FIRST) for label, ratio in slow.items()}
    reasons = dict(first.reasons)
    kept = [
        contender
        for contender in contenders
        if contender.label in slow
        and (contender.kind == "ours" or slow[contender.label].low < CLOSE)
    ]
    # The first is in each group, if they need several: groups are compared by it.
    kept.sort(key=lambda contender: contender.label != best)
    if kept:
        size = at_most_together(first, kept)
        later = benchmark.run(kept, {name: arrays}, rounds=rounds, at_once=size)[name]
        rows = {label: row for label, row in rows.items() if label not in later.reasons}
        rows |= {label: (*ratio, rounds) for label, ratio in ratios(later)[1].items()}
        reasons |= later.reasons
    empty = (np.nan, np.nan, np.nan, 0)
    return [
        {"contender": contender.label, "kind": contender.kind}
        | dict(zip(MEASURED, rows.get(contender.label, empty), strict=True))
        | {"reason": reasons.get(contender.label, "")}
        for contender in contenders
    ]


def at_most_together(first: benchmark.Result, kept: Sequence[Contender]) -> int:
    """How many of those that are `kept` may be in memory, by what they took in the `first` rounds:
    two or more."""
    peak = max(first.measured[contender.label].peak for contender in kept)
    return int(max(2, min(len(kept), 0.8 * psutil.virtual_memory().available // peak)))


def ratios(result: benchmark.Result) -> tuple[str, dict[str, benchmark.Speedup]]:
    """The fastest of the others, and by label each one's time over that one's."""
    kinds = {contender.label: contender.kind for contender in result.contenders}
    times = {
        label: measured.relative
        for label, measured in result.measured.items()
        if np.isfinite(measured.relative).all()
    }
    others = [label for label in times if kinds[label] != "ours"]
    if not others:
        return "", {}
    best = min(others, key=lambda label: float(np.median(times[label])))
    return best, {label: benchmark.speedup(time, times[best]) for label, time in times.items()}


# ── The command ─────────────────────────────────────────────────────────────────────────────────


def speed(
    name: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    rounds: int,
    ours: Sequence[str],
    at_once: int,
    path: Path,
) -> None:
    """Measure the cells of one model, each put into the table at `path` when it is done."""
    model = MODELS[name]
    for some in model.together(lengths):
        with tempfile.TemporaryDirectory() as folder:
            print(f"preparing {name}, {', '.join(map(str, some))} {model.unit} …", flush=True)
            contenders = prepare(model, some, Path(folder), ours)
            for contender in contenders:
                print(f"  {contender.label}: {contender.reason or 'ready'}", flush=True)
            for length in some:
                for batch in batches:
                    cell = {"model": name, "length": length, "batch": batch}
                    case = f"{name}, {length} {model.unit}, batch {batch}"
                    measured = measure(
                        contenders, model.inputs(batch, length), case, rounds, at_once
                    )
                    table.merge(path, [cell | row for row in measured])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cells.parser(__doc__, MODELS, ASSETS / "speed.csv", at_once=3)
    parser.add_argument(
        "--ours",
        nargs="+",
        choices=list(ROUTE_LOOKS),
        default=["torchscript", "dynamo"],
        help="routes whose graphs are fused; default: torchscript dynamo",
    )
    given = parser.parse_args(arguments)
    for name in () if given.only_show else given.models:
        speed(
            name,
            given.lengths or MODELS[name].lengths,
            given.batches,
            rounds=given.rounds,
            ours=given.ours,
            at_once=given.at_once,
            path=given.csv,
        )
    rows = table.merge(given.csv, [])
    print(table.by_model(rows))
    print(table.summary(rows))
    table.draw(rows, given.csv.with_suffix(".svg"))
    if given.csv == ASSETS / "speed.csv":
        page.put(ASSETS / "results.md", "speed", table.page(rows))


if __name__ == "__main__":
    with progress_on(sys.stderr):
        main()
