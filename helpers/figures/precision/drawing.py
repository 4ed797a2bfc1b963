"""The picture of the page of results: speed against quality, one panel a model."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers import files
from helpers.contenders import AGAIN
from helpers.figures import cells
from helpers.figures.precision.by_runtime import PRECISIONS, RUNTIMES, computed_in, runtime
from helpers.figures.precision.quality import SPEARMAN
from helpers.figures.precision.table import FLOATS, LOSS

LEAST = FLOATS / 10  # errors below are drawn here
COLOURS = dict(zip(RUNTIMES, ("black", "#0072b2", "#cc79a7", "#d55e00"), strict=True))
MARKERS = dict(zip(PRECISIONS, ("o", "s", "^", "D"), strict=True))
WIDE = 4.5  # inches of a panel


def draw(table: pd.DataFrame, path: Path) -> Figure:
    """Each contender as a mark, the geometric mean over the cells of its model; the same bytes for
    the same table."""
    timed = table[table["ratio"].notna() & table["quality"].notna()]
    timed = timed[~timed["contender"].str.endswith(AGAIN)]
    names = list(timed["model"].unique())
    with matplotlib.rc_context({"svg.hashsalt": "precision", "svg.fonttype": "none"}):
        across = min(2, max(1, len(names)))
        down = -(-max(1, len(names)) // across)
        figure = Figure(figsize=(WIDE * 2, 1.2 + 3.4 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).flat
        for axes, name in zip(panels, names, strict=False):
            _panel(axes, timed[timed["model"] == name], name)
        for axes in [*panels][len(names) :]:
            axes.set_axis_off()
        figure.legend(handles=_legend(), loc="outside lower center", ncols=5, frameon=False)
        figure.supylabel("speed-up over PyTorch eager in fp32")
        with files.replacing(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})
    return figure


def _legend() -> list[Line2D]:
    """Colours are runtimes, shapes precisions, and what is filled is ours."""
    colours = [("s", colour, True, runtime) for runtime, colour in COLOURS.items()]
    shapes = [(marker, "grey", False, precision) for precision, marker in MARKERS.items()]
    entries = [*colours, *shapes, ("o", "grey", True, "ours"), ("o", "grey", False, "theirs")]
    return [
        Line2D([], [], **_style(marker, colour, filled), label=label)
        for marker, colour, filled, label in entries
    ]


def _style(marker: str, colour: str, filled: bool) -> dict[str, object]:
    inside = colour if filled else "white"
    style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 7}
    return style | {"markerfacecolor": inside, "markeredgewidth": 1.3}


def _panel(axes: Axes, rows: pd.DataFrame, name: str) -> None:
    correlation = rows["measure"].iloc[0] == SPEARMAN
    for _, own in rows.groupby("contender", sort=False):
        row = own.iloc[0].to_dict()
        loss = -own["difference"].min() if correlation else max(own["quality"].max(), LEAST)
        style = _style(MARKERS[computed_in(row)], COLOURS[runtime(row)], row["ours"] == "yes")
        axes.plot(loss, 1 / cells.mean(np.array(own["ratio"])), **style)
    axes.axvline(LOSS if correlation else FLOATS, color="grey", linestyle="--", linewidth=1)
    if correlation:
        axes.set_xlabel("loss of Spearman's correlation")
        axes.set_xscale("symlog", linthresh=LOSS)
        axes.set_xticks([-0.01, 0, LOSS, 0.1], ["-0.01", "0", f"{LOSS}", "0.1"])
        axes.margins(x=0.1)
    else:
        axes.set_xlabel("error, of the output's spread")
        axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(name)
    axes.spines[["top", "right"]].set_visible(False)
