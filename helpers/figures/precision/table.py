"""What was measured, cell by cell: kept in a CSV; what is best at equal quality, as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from helpers import benchmark
from helpers.contenders import AGAIN
from helpers.figures import cells
from helpers.figures.cells import CELL
from helpers.figures.precision.models import MODELS
from helpers.figures.precision.quality import SPEARMAN

TYPES = {"model": str, "length": int, "batch": int, "contender": str, "kind": str, "ours": str}
TYPES |= {"precision": str, "handed back": str, "measure": str}
TYPES |= {"quality": float, "difference": float, "ratio": float, "low": float, "high": float}
TYPES |= {"rounds": int, "ratios": str, "reason": str, "processor": str}

LOSS = 0.005  # of Spearman's correlation against fp32, up to which quality is equal
FLOATS = 1e-4  # errors below it are those of fp32, and equal

Row = Mapping[str, Any]


def merge(path: Path, rows: Sequence[Row]) -> pd.DataFrame:
    """Put `rows` into the table at `path`, where they replace those of the same cells."""
    digits = {"difference": 5, "ratio": 4, "low": 4, "high": 4}
    rounded = [
        {**row, **{name: round(row[name], number) for name, number in digits.items()}}
        | {"quality": float(f"{row['quality']:.4g}")}
        for row in rows
    ]
    return cells.merge(path, rounded, TYPES, MODELS)


# ── The choice at equal quality ─────────────────────────────────────────────────────────────────


def able(rows: Sequence[Row], ours: bool) -> list[Row]:
    """Those of one side that were timed and are good enough to be compared: an embedding keeps
    Spearman's correlation within `LOSS`, of others the error is known."""
    return [
        row
        for row in rows
        if (row["ours"] == "yes") == ours
        and not row["contender"].endswith(AGAIN)
        and np.isfinite(row["ratio"])
        and np.isfinite(row["quality"])
        and (row["measure"] != SPEARMAN or row["difference"] >= -LOSS)
    ]


def as_good(rows: Sequence[Row], than: Row) -> list[Row]:
    """Those of ours that are as good as that one of theirs."""
    if than["measure"] == SPEARMAN:
        return able(rows, ours=True)
    limit = max(than["quality"], FLOATS)
    return [row for row in able(rows, ours=True) if row["quality"] <= limit]


def fastest(rows: Sequence[Row]) -> Row | None:
    """Of those that are equally fast, the first."""
    return min(rows, key=lambda row: row["ratio"], default=None)


class Best(NamedTuple):
    """One cell: the fastest of theirs, the fastest of ours that is as good, how much faster ours
    is, and by how much two runs of one graph differ. None: there is none."""

    theirs: Row | None
    ours: Row | None
    speedup: benchmark.Speedup | None
    differ: float

    @property
    def missed(self) -> bool:
        """Whether ours is behind by more than two runs of one graph differ."""
        if self.theirs is None:
            return False
        return self.speedup is None or self.speedup.median < 1 - self.differ


def best(rows: Sequence[Row]) -> Best:
    """The best of ours over the best of theirs at equal quality, of the rows of one cell."""
    theirs = fastest(able(rows, ours=False))
    ours = fastest(as_good(rows, theirs)) if theirs else None
    gain = faster(ours, theirs) if ours else None
    return Best(theirs, ours, gain, twins_differ(rows))


def faster(this: Row, than: Row) -> benchmark.Speedup:
    """How much faster one row is than another, paired by round where both are of the same run."""
    own, other = (np.array(row["ratios"].split(), float) for row in (this, than))
    if len(own) == len(other):
        return benchmark.speedup(other, own)
    low, high = than["low"] / this["high"], than["high"] / this["low"]
    return benchmark.Speedup(than["ratio"] / this["ratio"], low, high)


def twins_differ(rows: Sequence[Row]) -> float:
    """By how much the one graph that was run twice differs from itself; 0 where none was."""
    by_label = {row["contender"]: row for row in rows if np.isfinite(row["ratio"])}
    gaps = [
        abs(faster(row, by_label[label.removesuffix(AGAIN)]).median - 1)
        for label, row in by_label.items()
        if label.endswith(AGAIN) and label.removesuffix(AGAIN) in by_label
    ]
    return max(gaps, default=0.0)


def by_cell(table: pd.DataFrame) -> dict[tuple[str, int, int], list[Row]]:
    return {cell: rows.to_dict("records") for cell, rows in table.groupby(CELL, sort=False)}


# ── As text ─────────────────────────────────────────────────────────────────────────────────────


def shown(row: Row | None) -> list[str]:
    """A row in words: who, its precision, and how good it is."""
    if row is None:
        return ["none", "", ""]
    quality = f"{row['measure']} {row['quality']:.2g}"
    if row["measure"] == SPEARMAN:
        quality = f"{SPEARMAN} {row['quality']:.4f} ({row['difference']:+.4f})"
    return [row["contender"], row["precision"], quality]


def lines(table: pd.DataFrame) -> str:
    """All rows of each cell, the fastest first, with what is best at equal quality."""
    names, parts = cells.names(table, MODELS), []
    for cell, rows in by_cell(table).items():
        parts.append(f"{names[cell]}: time over that of PyTorch eager in fp32")
        for row in sorted(rows, key=lambda row: (np.isnan(row["ratio"]), row["ratio"])):
            time = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), {row['rounds']}"
            text = ", ".join(part for part in shown(row) if part)
            back = f", handed back {row['handed back']}" if row["handed back"] else ""
            side = "ours  " if row["ours"] == "yes" else "theirs"
            parts.append(f"  {side} {row['reason'] or time + ' rounds'}: {text}{back}")
        parts += [f"  {line}" for line in decision(rows)] + [""]
    return "\n".join(parts)


def decision(rows: Sequence[Row]) -> list[str]:
    """What is best in one cell at equal quality, and what of ours is faster and less good."""
    found = best(rows)
    if found.theirs is None:
        return ["none of theirs has a result"]
    told = f"the best of theirs: {', '.join(shown(found.theirs))}"
    if found.ours is None:
        return [told, "none of ours is as good"]
    differ = f"two runs of one graph differ by {found.differ:.1%}"
    told_of_ours = f"the best of ours as good: {', '.join(shown(found.ours))}"
    out = [told, told_of_ours, f"ours over theirs: {found.speedup}; {differ}"]
    most = fastest(able(rows, ours=True))
    if most["ratio"] < found.ours["ratio"]:
        out.append(f"faster and less good: {', '.join(shown(most))}, {faster(most, found.theirs)}")
    return out


def summary(table: pd.DataFrame) -> str:
    """How many cells there are, the geometric mean, and those that are missed."""
    names = cells.names(table, MODELS)
    found = {cell: best(rows) for cell, rows in by_cell(table).items()}
    gains = [one.speedup.median for one in found.values() if one.speedup]
    missed = {cell: one for cell, one in found.items() if one.missed}
    mean = f"geometric mean {cells.mean(gains):.3f}, " if gains else ""
    told = [
        f"the best of ours over the best of theirs at equal quality: {mean}{len(found)} cells,"
        f" {len(missed)} missed"
    ]
    for cell, one in missed.items():
        why = f"{one.speedup}" if one.speedup else "none of ours is as good"
        told.append(f"  missed: {names[cell]}: {why}; two runs differ by {one.differ:.1%}")
    return "\n".join(told)


def markdown(table: pd.DataFrame) -> str:
    """A row for each cell."""
    names = cells.names(table, MODELS)
    sides = ["best of theirs", "precision", "quality", "best of ours, as good", "precision"]
    heads = ["cell", *sides, "quality", "ours over theirs", "two runs differ by"]
    rows = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for cell, of_cell in by_cell(table).items():
        found = best(of_cell)
        gain = f"{found.speedup or 'none'}"
        row = [names[cell], *shown(found.theirs), *shown(found.ours), gain]
        rows.append(f"| {' | '.join([*row, f'{found.differ:.1%}'])} |")
    return "\n".join(rows)


ALT = (
    "For each model, the speed-up of each contender against PyTorch eager in fp32 over what it"
    " costs in quality, ours and theirs; assets/precision.csv has the same figures"
)


def not_measured(table: pd.DataFrame) -> list[str]:
    """What the table lacks, a line each: cells, and contenders of ours that only some cells have,
    since the others were measured before those were added."""
    cells_of = by_cell(table)
    wanted = [
        (name, length, batch)
        for name, model in MODELS.items()
        for length in model.lengths
        for batch in cells.BATCHES
    ]
    frame = pd.DataFrame([cell for cell in wanted if cell not in cells_of], columns=CELL)
    told = [f"not measured: {name}" for name in cells.names(frame, MODELS).values()]
    own = table[table["ours"] == "yes"]
    for label, rows in own.groupby("contender", sort=False):
        if len(rows) < len(cells_of):
            told.append(
                f"{label}: in {len(rows)} of {len(cells_of)} cells; the others were measured before"
                " it was added"
            )
    return told


def page(table: pd.DataFrame) -> str:
    """What the page of results shows: the summary, the picture and the table of cells."""
    processors = "; ".join(table["processor"].unique())
    return "\n\n".join(
        [
            f"```\n{summary(table)}\n```",
            f"![{ALT}](precision.svg)",
            f"Measured on {processors}. Quality is equal where Spearman's correlation on the"
            f" sentence pairs is within {LOSS} of fp32 (all-MiniLM-L6-v2), or where the error of"
            " ours, relative to the output's spread, is no larger than theirs (stand-ins; below"
            f" {FLOATS:g} all count as fp32). Speed-ups are medians of paired rounds, with"
            " 95 % intervals where there were six rounds or more.",
            markdown(table),
            "\n".join(f"- {line}" for line in not_measured(table)),
        ]
    )
