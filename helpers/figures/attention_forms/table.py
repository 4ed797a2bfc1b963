"""What was measured of attention's forms: kept in a CSV, as a table, and drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers import files
from helpers.figures import cells
from helpers.figures.attention_forms.forms import FORMS, STANDARD

PROVIDERS = {"cpu": "ONNX Runtime, products in 8 bits", "plugin": "OpenVINO's plugin as it comes"}

CELL = ["provider", "masked", "width", "length", "batch"]
TYPES = {"provider": str, "masked": bool, "width": int, "length": int, "batch": int}
TYPES |= {"form": str, "median": float, "low": float, "high": float, "rounds": int}
TYPES |= {"processor": str, "reason": str}
FIGURES = ("median", "low", "high")
LOOKS = dict(  # Okabe and Ito's colours, and markers
    zip(
        FORMS,
        [
            *(("#000000", "o"), ("#999999", "s"), ("#D55E00", "P"), ("#E69F00", "X")),
            *(("#CC79A7", "D"), ("#0072B2", "v"), ("#009E73", "^")),
        ],
        strict=True,
    )
)


def merge(path: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Put `rows` into the table at `path`, where they replace those of the same cells."""
    rounded = [row | {name: round(row[name], 3) for name in FIGURES} for row in rows]
    return cells.merge(path, rounded, TYPES, cell=CELL)


def _wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Ratios, a form in each column, a cell in each row."""
    shown = rows.assign(
        cell=[
            f"{'masked' if masked else 'no mask'}, D = {width}, {batch} × {length}"
            for masked, width, length, batch in rows[CELL[1:]].itertuples(index=False)
        ],
        text=["none" if np.isnan(ratio) else f"{ratio:.2f}" for ratio in rows["median"]],
    )
    wide = shown.pivot(index="cell", columns="form", values="text").fillna("")
    others = [form for form in FORMS if form in wide.columns and form != STANDARD]
    wide = wide.loc[shown["cell"].unique(), others]
    wide.index.name = wide.columns.name = None
    return wide


def text(table: pd.DataFrame) -> str:
    """A table for each provider, and why a form has no time."""
    parts = []
    for provider, rows in table.groupby("provider", sort=False):
        parts += [f"{PROVIDERS[provider]}: the time of {STANDARD} over that of each form"]
        parts += [_wide(rows).to_string()]
        why = rows[rows["reason"] != ""].drop_duplicates(["form", "reason"])
        parts += [f"  {row.form}: {row.reason}" for row in why.itertuples()]
    return "\n".join(parts)


def page(table: pd.DataFrame) -> str:
    """The section of the page of results."""
    parts = [
        f"![For each provider, mask and width of a head, how much faster each form of attention is"
        f" than {STANDARD}, by length and batch; the table below has the figures]"
        "(attention_forms.svg)",
        "",
        f"The time of `{STANDARD}` over that of each form, the three products by weights included:"
        " above 1 is faster. D is the width of a head, of which there are 12; the cells are batch"
        " × length, medians of paired rounds.",
    ]
    for provider, rows in table.groupby("provider", sort=False):
        wide = _wide(rows)
        processors = ", ".join(rows["processor"].unique())
        parts += ["", f"**{PROVIDERS[provider]}**, on {processors}:", ""]
        parts += [
            f"| cell | {' | '.join(wide.columns)} |",
            "| --- " * (len(wide.columns) + 1) + "|",
        ]
        parts += [
            f"| {cell} | {' | '.join(row)} |"
            for cell, row in zip(wide.index, wide.values, strict=True)
        ]
    return "\n".join(parts)


def draw(table: pd.DataFrame, path: Path) -> Figure:
    """A panel for each provider and mask, a mark for each form; the same bytes for the same
    table."""
    panels = [*table.groupby(["provider", "masked"], sort=False)]
    style = {"svg.hashsalt": "attention_forms", "svg.fonttype": "none"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 1 + 2.7 * len(panels)), layout="constrained")
        every = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, ((provider, masked), rows) in zip(every, panels, strict=True):
            _draw_panel(axes, rows)
            axes.set_title(f"{PROVIDERS[provider]}, {'masked' if masked else 'no mask'}\n")
        figure.supxlabel("batch × length, by the width D of a head", fontsize="medium")
        figure.supylabel(f"times as fast as {STANDARD}", fontsize="medium")
        handles = {
            label: handle
            for axes in every
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False
            )
        with files.replacing(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})
    return figure


def _draw_panel(axes: Axes, rows: pd.DataFrame) -> None:
    """The `rows` of one provider and mask, cells along the axis by width, batch and length."""
    cell = ["width", "batch", "length"]
    sizes = sorted({*rows[cell].itertuples(index=False, name=None)})
    axes.axhline(1, color="black", linewidth=1)
    for form, (colour, marker) in LOOKS.items():
        of_form = rows[(rows["form"] == form) & rows["median"].notna()]
        if form == STANDARD or of_form.empty:
            continue
        x = [sizes.index(key) for key in of_form[cell].itertuples(index=False, name=None)]
        axes.vlines(x, of_form["low"], of_form["high"], color=colour, linewidth=1)
        axes.plot(x, of_form["median"], marker, color=colour, markersize=5, label=form)
    axes.set_xticks(
        range(len(sizes)), [f"{batch} × {length}" for _, batch, length in sizes], rotation=90
    )
    axes.tick_params(labelsize=7)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    for width in sorted({width for width, *_ in sizes}):
        own = [place for place, (one, *_) in enumerate(sizes) if one == width]
        axes.text(np.mean(own), 1.02, f"D = {width}", transform=axes.get_xaxis_transform())
        axes.axvline(own[-1] + 0.5, color="lightgrey", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
