"""Which precision, on which provider? The best of ours over the best of theirs at equal quality.

``python -m helpers.figures.precision.measuring [--models minilm] [--lengths 64] [--batches 1]``

all-MiniLM-L6-v2 with its published weights, and stand-ins of base size, two lengths, batch 1 and 8.
In each *cell* (model, length, batch) take part: PyTorch, ONNX Runtime, OpenVINO and its plugin,
with what public tools make, in fp32, bf16 and 8 bits, and what `helpers.fuse` and
`helpers.quantize` make. A *ratio* is the time of one over that of PyTorch eager in fp32, paired by
round. *Quality* is Spearman's correlation on the sentence pairs of notebook 02, the lower of
padding on the right and on the left; for stand-ins the error against PyTorch in fp32, in standard
deviations of the output, on the worst feed.

It may be run in parts. A cell that is measured again replaces its rows in assets/precision.csv; the
picture and the page of results are made of all cells there. Files go to a temporary folder, up to
15 GB for one model.
"""

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers import benchmark, contenders
from helpers.contenders import Contender
from helpers.figures import cells, page
from helpers.figures.cells import ASSETS
from helpers.figures.precision import drawing, lineup, quality, table
from helpers.figures.precision.models import MODELS
from helpers.figures.speed.measuring import at_most_together
from helpers.figures.speed.models import Arrays
from helpers.quiet import progress_on

CLOSE = 1.3  # who is slower than so many times the fastest of its side is not timed in the later
FIRST = 3  # rounds in which all take part
SITTINGS = 3  # the later rounds are split into, each with new processes: one process of a graph
# may be a tenth faster than another of the same graph, for as long as both live
TURN, REPEATS = 0.3, 15  # seconds of PyTorch eager in a turn, about, and its runs at the most

LineUp = Mapping[str, Sequence[Contender]]  # "theirs", the reference first, and "ours"


# ── One cell ────────────────────────────────────────────────────────────────────────────────────


def measure(
    those: LineUp,
    qualities: Mapping[str, quality.Quality],
    arrays: Arrays,
    name: str,
    rounds: int,
    at_once: int,
) -> list[dict[str, Any]]:
    """A row for each contender on `arrays`: its ratio to the first, or its reason.

    All take part in the first rounds, `at_once` models in memory. Those that may be the best at
    equal quality are then timed in `rounds` more, in a few sittings, the best of theirs twice: as
    many as fit into memory together, so that all are paired. The others keep the ratio of the first
    rounds.
    """
    every = [*those["theirs"], *those["ours"]]
    ours = {contender.label for contender in those["ours"]}
    repeats = repeats_of(every[0], arrays, name)
    common = {"cases": {name: arrays}, "repeats": repeats}
    first = benchmark.run(every, rounds=FIRST, at_once=at_once, **common)[name]
    print(first.conditions, flush=True)
    rows = _rows([first], qualities, ours)
    kept = chosen(every, rows, len(every))
    if len(kept) > 1:
        kept = chosen(every, rows, at_most_together(first, kept))
        best = table.fastest(table.able([*rows.values()], ours=False))
        of_best = {one.label: one for one in kept}.get(best["contender"] if best else "")
        if of_best:
            twin = contenders.again(of_best)
            qualities = {**qualities, twin.label: qualities[of_best.label]}
            kept.append(twin)
        later = []
        for number in range(SITTINGS):
            share = len(range(number, rounds, SITTINGS))
            if share:
                order = [kept[0], *kept[:0:-1]] if number % 2 else kept
                later += [benchmark.run(order, rounds=share, at_once=len(order), **common)[name]]
        rows |= _rows(later, qualities, ours)
    return [*rows.values()]


def repeats_of(reference: Contender, arrays: Arrays, name: str) -> int:
    """How often each runs in one turn: a short run alone differs much from the next."""
    alone = benchmark.run([reference], {name: arrays}, rounds=1, progress=False)[name]
    if alone.reasons:
        raise RuntimeError(f"{name}: {alone.reasons}")
    [seconds] = alone.measured[reference.label].seconds
    return int(np.clip(TURN / seconds, 1, REPEATS))


def chosen(every: Sequence[Contender], rows: Mapping[str, table.Row], size: int) -> list[Contender]:
    """Up to `size`: the reference, and those that may be the fastest at equal quality."""
    labels = list(dict.fromkeys([every[0].label, *finalists([*rows.values()])]))[:size]
    return [one for one in every if one.label in labels and not rows[one.label]["reason"]]


def finalists(rows: Sequence[table.Row]) -> list[str]:
    """The labels of those that may be the fastest at equal quality, of theirs and of ours by turns:
    of theirs the fastest; of ours the fastest that are as good as each of these, and the fastest of
    all."""
    theirs = near(table.able(rows, ours=False))
    of_ours = [near(table.as_good(rows, row)) for row in theirs]
    of_ours.append(near(table.able(rows, ours=True)))
    ours = by_turns(*([row["contender"] for row in some] for some in of_ours))
    return by_turns([row["contender"] for row in theirs], ours)


def by_turns(*lists: Sequence[str]) -> list[str]:
    """The first of each, the second of each, and so on, each label once."""
    ranks = itertools.zip_longest(*lists)
    return list(dict.fromkeys(label for rank in ranks for label in rank if label is not None))


def near(rows: Sequence[table.Row]) -> list[table.Row]:
    """The fastest, and those near it, in the order of their times."""
    ordered = sorted(rows, key=lambda row: row["ratio"])
    return [row for row in ordered if row["ratio"] <= CLOSE * ordered[0]["ratio"]]


def _rows(
    sittings: Sequence[benchmark.Result],
    qualities: Mapping[str, quality.Quality],
    ours: set[str],
) -> dict[str, dict[str, Any]]:
    """The rows of the table that the sittings give together, by label. Who failed in one of them
    has no ratio."""
    processor = benchmark.cpu_in_words()
    reasons = {label: why for one in sittings for label, why in one.reasons.items()}
    rows = {}
    for contender in sittings[0].contenders:
        label = contender.label
        measured = [one.measured[label] for one in sittings if label in one.measured]
        relative = np.concatenate([np.array([]), *(one.relative for one in measured)])
        if label in reasons or not np.isfinite(relative).all():
            relative = relative[:0]
        ratio = benchmark.Speedup(np.nan, np.nan, np.nan)
        if relative.size:
            ratio = benchmark.speedup(relative, np.ones_like(relative))
        told = sittings[0].row(label)
        judged = qualities.get(label, quality.NONE)
        rows[label] = {
            "contender": label,
            "kind": contender.kind,
            "ours": "yes" if label in ours else "no",
            "precision": told["precision"],
            "handed back": told.get("handed back", ""),
            "measure": judged.measure,
            "quality": judged.value,
            "difference": judged.difference,
            "ratio": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "rounds": relative.size,
            "ratios": " ".join(f"{one:.4g}" for one in relative),
            "reason": reasons.get(label, ""),
            "processor": processor,
        }
    return rows


# ── The command ─────────────────────────────────────────────────────────────────────────────────


def precision(
    name: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    rounds: int,
    at_once: int,
    path: Path,
) -> None:
    """Measure the cells of one model, each put into the table at `path` when it is done."""
    model = MODELS[name]
    for some in model.together(lengths):
        with tempfile.TemporaryDirectory() as folder:
            print(f"preparing {name}, {', '.join(map(str, some))} {model.unit} …", flush=True)
            those = lineup.prepare(model, some, Path(folder))
            every = [*those["theirs"], *those["ours"]]
            for contender in every:
                print(f"  {contender.label}: {contender.reason or 'ready'}", flush=True)
            print(f"judging {len(every)} contenders …", flush=True)
            qualities, failed = quality.judge(model, some, every, at_once)
            those = {side: without(failed, own) for side, own in those.items()}
            for length in some:
                for batch in batches:
                    cell = {"model": name, "length": length, "batch": batch}
                    case = f"{name}, {length} {model.unit}, batch {batch}"
                    inputs = model.inputs(batch, length)
                    rows = measure(those, qualities[length], inputs, case, rounds, at_once)
                    rows = [cell | row for row in rows]
                    table.merge(path, rows)
                    print("\n".join(table.decision(rows)), flush=True)


def without(failed: Mapping[str, str], those: Sequence[Contender]) -> list[Contender]:
    """The contenders, with the reasons of those that have `failed`."""
    return [dataclasses.replace(one, reason=failed.get(one.label, one.reason)) for one in those]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cells.parser(__doc__, MODELS, ASSETS / "precision.csv", at_once=7)
    given = parser.parse_args(arguments)
    if given.only_show and not given.csv.is_file():
        parser.error(f"{given.csv}: expected the table of a measurement, found no file")
    for name in () if given.only_show else given.models:
        precision(
            name,
            given.lengths or MODELS[name].lengths,
            given.batches,
            rounds=given.rounds,
            at_once=given.at_once,
            path=given.csv,
        )
    rows = table.merge(given.csv, [])
    print(table.lines(rows))
    print(table.summary(rows))
    drawing.draw(rows, given.csv.with_suffix(".svg"))
    if given.csv == ASSETS / "precision.csv":
        page.put(ASSETS / "results.md", "precision", table.page(rows))


if __name__ == "__main__":
    with progress_on(sys.stderr):
        main()
