"""What was measured, cell by cell: kept in a CSV, drawn, and as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers import files
from helpers.figures import cells
from helpers.figures.cells import CELL, mean
from helpers.figures.speed.models import MODELS

LIMIT = 1.03  # the ratio to stay below in every cell

TYPES = {"model": str, "length": int, "batch": int, "contender": str, "kind": str}
TYPES |= {"ratio": float, "low": float, "high": float, "rounds": int, "reason": str}
ROUTE_LOOKS = {
    "torchscript": ("#D55E00", "P"),
    "dynamo": ("#0072B2", "o"),
    "opset23": ("#009E73", "D"),
}


def merge(path: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Put `rows` into the table at `path`, where they replace those of the same cells."""
    rounded = [
        row | {name: round(row[name], 4) for name in ("ratio", "low", "high")} for row in rows
    ]
    return cells.merge(path, rounded, TYPES, MODELS)


def by_model(table: pd.DataFrame) -> str:
    """For each model a table of ratios, contenders by cells, with the reasons of those without."""
    parts = []
    for name, rows in table.groupby("model", sort=False):
        shown = rows.assign(
            cell=[
                f"{length} {MODELS[name].unit} × {batch}"
                for length, batch in rows[["length", "batch"]].itertuples(index=False)
            ],
            text=[
                "none" if np.isnan(ratio) else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
                for ratio, low, high in rows[["ratio", "low", "high"]].itertuples(index=False)
            ],
        )
        wide = shown.pivot(index="contender", columns="cell", values="text").fillna("")
        wide = wide.loc[shown["contender"].unique(), shown["cell"].unique()]
        wide.index.name = wide.columns.name = None
        parts.append(f"{name} ({MODELS[name].repository}), time over the fastest of the others")
        parts.append(wide.to_string())
        why = shown[shown["reason"] != ""].drop_duplicates(["contender", "reason"])
        parts += [f"  {row.contender}: {row.reason}" for row in why.itertuples()]
        parts.append("")
    return "\n".join(parts)


def summary(table: pd.DataFrame) -> str:
    """For each of ours the geometric mean of its ratios over all cells, and the cells it misses."""
    names, lines = cells.names(table, MODELS), []
    ours = table[table["kind"] == "ours"]
    for label, rows in ours.groupby("contender", sort=False):
        timed = rows.dropna(subset="ratio")
        missed = [
            f"  misses {LIMIT}: {names[tuple(row[key] for key in CELL)]}: {row['ratio']:.3f}"
            f" ({row['low']:.3f} to {row['high']:.3f})"
            for row in timed[timed["ratio"] > LIMIT].to_dict("records")
        ]
        none = rows[rows["ratio"].isna()].to_dict("records")
        missed += [
            f"  no result: {names[tuple(row[key] for key in CELL)]}: {row['reason']}"
            for row in none
        ]
        if len(timed):
            total = f"geometric mean {mean(timed['ratio']):.3f} over {len(timed)} cells"
            within = int((timed["ratio"] <= LIMIT).sum())
            lines.append(f"{label}: {total}, {within} of {len(rows)} at most {LIMIT}")
        else:
            lines.append(f"{label}: no result")
        lines += missed
    best = ours.groupby(CELL, sort=False)["ratio"].min().dropna()
    if len(best):
        within = int((best <= LIMIT).sum())
        lines.append(
            f"the faster of ours: geometric mean {mean(best):.3f} over {len(best)} cells,"
            f" {within} of {len(names)} at most {LIMIT}"
        )
    return "\n".join(lines)


def markdown(table: pd.DataFrame) -> str:
    """A row for each cell: the ratios of ours, by their label, and who was the fastest other."""
    names = cells.names(table, MODELS)
    ours = list(table[table["kind"] == "ours"]["contender"].unique())
    lines = [f"| {' | '.join(['cell', *ours, 'the fastest of the others'])} |"]
    lines.append("| --- " * (len(ours) + 2) + "|")
    for cell, rows in table.groupby(CELL, sort=False):
        ratios = {
            row["contender"]: f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            for row in rows.dropna(subset="ratio").to_dict("records")
        }
        others = rows[(rows["kind"] != "ours") & rows["ratio"].notna()]
        fastest = "" if others.empty else others.loc[others["ratio"].idxmin(), "contender"]
        lines.append(
            f"| {names[cell]} | {' | '.join(ratios.get(label, '') for label in ours)} | {fastest} |"
        )
    return "\n".join(lines)


def page(table: pd.DataFrame) -> str:
    """What the page of results shows: the summary, and the table."""
    return f"```\n{summary(table)}\n```\n\n{markdown(table)}"


def draw(table: pd.DataFrame, path: Path) -> Figure:
    """Ours in each cell, as dots with their intervals; the same bytes for the same table."""
    names = cells.names(table, MODELS)
    places = {cell: row for row, cell in enumerate(names)}
    ours = table[(table["kind"] == "ours") & table["ratio"].notna()]
    with matplotlib.rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 1.4 + 0.28 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color="black", linewidth=1)
        axes.axvline(LIMIT, color="grey", linewidth=1, linestyle="--")
        labels = list(ours["contender"].unique())
        for number, label in enumerate(labels):
            rows = ours[ours["contender"] == label]
            route = next(route for route in ROUTE_LOOKS if route in label)
            colour, marker = ROUTE_LOOKS[route]
            shift = 0.2 * (number - (len(labels) - 1) / 2)
            y = [places[cell] + shift for cell in rows[CELL].itertuples(index=False, name=None)]
            axes.hlines(y, rows["low"], rows["high"], color=colour, linewidth=2)
            axes.plot(rows["ratio"], y, marker, color=colour, markersize=6, label=label)
        axes.set_yticks(range(len(names)), list(names.values()))
        axes.set_ylim(len(names) - 0.4, -0.6)
        figure.supxlabel(
            "time over that of the fastest of the others, median and 95 % interval\n"
            f"(below 1 is faster; the dashed line is at {LIMIT})",
            fontsize="medium",
        )
        axes.spines[["top", "right"]].set_visible(False)
        if labels:
            figure.legend(loc="outside upper center", ncols=len(labels), frameon=False)
        with files.replacing(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})
    return figure
