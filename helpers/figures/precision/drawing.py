"""The picture of the page of results: speed against quality, one panel a model."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers import files
from helpers.contenders import LOOKS
from helpers.figures import cells
from helpers.figures.precision.quality import SPEARMAN
from helpers.figures.precision.table import AGAIN, FLOATS, LOSS

LEAST = FLOATS / 10  # errors below are drawn here


def draw(table: pd.DataFrame, path: Path) -> Figure:
    """Each contender as a dot, the geometric mean over the cells of its model; the same bytes for
    the same table."""
    timed = table[table["ratio"].notna() & table["quality"].notna()]
    timed = timed[~timed["contender"].str.endswith(AGAIN)]
    names = list(timed["model"].unique())
    with matplotlib.rc_context({"svg.hashsalt": "precision", "svg.fonttype": "none"}):
        across = min(2, max(1, len(names)))
        down = -(-max(1, len(names)) // across)
        figure = Figure(figsize=(4.5 * across, 1.4 + 3.6 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).flat
        for axes, name in zip(panels, names, strict=False):
            _panel(axes, timed[timed["model"] == name], name)
        handles = {kind: handle for axes in figure.axes for handle, kind in _handles(axes)}
        figure.legend(
            handles.values(),
            [kind.replace("-", " ") for kind in handles],
            loc="outside lower center",
            ncols=2 * across,
            frameon=False,
        )
        figure.supylabel("speed-up against PyTorch eager in fp32")
        with files.replacing(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})
    return figure


def _handles(axes: Axes) -> list[tuple[object, str]]:
    handles, kinds = axes.get_legend_handles_labels()
    return [*zip(handles, kinds, strict=True)]


def _panel(axes: Axes, rows: pd.DataFrame, name: str) -> None:
    correlation = rows["measure"].iloc[0] == SPEARMAN
    for (_, kind), own in rows.groupby(["contender", "kind"], sort=False):
        look = LOOKS[kind]
        loss = -own["difference"].min() if correlation else max(own["quality"].max(), LEAST)
        style = {"color": look.colour, "marker": look.marker, "linestyle": "none", "markersize": 7}
        inside = look.colour if look.filled else "white"
        speedup = 1 / cells.mean(np.array(own["ratio"]))
        axes.plot(loss, speedup, markerfacecolor=inside, label=kind, **style)
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
