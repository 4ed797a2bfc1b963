"""Time contenders fairly: each in a process of its own, by turns, as ratios paired by round.

Runtimes in one process fight over threads, and a machine's speed drifts within minutes. So every
contender gets a process, one at a time runs, they take turns, and only the ratio of two times of
the same round counts. Milliseconds are shown, as a fact of one run on one machine.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from helpers import files
from helpers.worker import Failed, Worker

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

TIMEOUT = 300  # seconds that a contender may take to load, or for one turn

# By kind of contender, the same in every notebook: Okabe and Ito's colours, told apart by the
# colour-blind, and markers, told apart in black and white.
COLOURS = {
    "pytorch": "#000000",
    "unfused": "#E69F00",
    "stock": "#56B4E9",
    "opset23": "#009E73",
    "ours": "#D55E00",
}
MARKERS = {"pytorch": "o", "unfused": "s", "stock": "^", "opset23": "D", "ours": "P"}


@dataclasses.dataclass(frozen=True)
class Contender:
    """What takes part: the model file at `path` on ONNX Runtime, or what `factory` makes.

    `factory` is ``"module:function"``; the contender's process calls it with `arguments` (values
    that JSON can carry) and times the function that it returns, from a dict of arrays to anything.
    Beside a factory, `path` only tells the size. `kind` is a key of `COLOURS`, else ValueError.
    """

    label: str
    kind: str
    path: Path | None = None
    factory: str | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in COLOURS:
            raise ValueError(f"kind: expected one of {', '.join(COLOURS)}, found {self.kind}")


def onnx(label: str, path: str | Path, kind: str = "ours") -> Contender:
    """The model file at `path`, on ONNX Runtime's CPU provider."""
    return Contender(label, kind, path=Path(path).absolute())


def pytorch(label: str, factory: str, /, **arguments: Any) -> Contender:
    """PyTorch, as `factory` makes it: ``pytorch("eager", "helpers.models:pytorch", name=…)``."""
    return Contender(label, "pytorch", factory=factory, arguments=arguments)


class Speedup(NamedTuple):
    """Above 1 is faster than the reference. `low` and `high` bound the median, at 95 %."""

    median: float
    low: float
    high: float


def speedup(reference: np.ndarray, seconds: np.ndarray) -> Speedup:
    """The median of the ratios `reference` / `seconds`, both (rounds,), paired by round.

    The interval is a seeded percentile bootstrap over rounds (Efron 1979); of fewer than six rounds
    no interval of the median reaches 95 %, and it is about their range.
    """
    ratios = np.asarray(reference) / np.asarray(seconds)
    picks = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Speedup(float(np.median(ratios)), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Result:
    """What `run` measured: by label, `seconds` (rounds,) of who finished, `reasons` of who failed.

    `conditions` has the rounds, inputs, processor, threads and versions, in one line.
    """

    contenders: tuple[Contender, ...]
    reference: str
    seconds: Mapping[str, np.ndarray]
    reasons: Mapping[str, str]
    megabytes: Mapping[str, float]
    conditions: str

    @property
    def caption(self) -> str:
        """What the table and the plot show, in one line."""
        return f"speed-up against {self.reference}, median and 95 % interval; {self.conditions}"

    def against(self, reference: str) -> "Result":
        """The same times against another contender; raises ValueError if it is none of them."""
        if reference not in (contender.label for contender in self.contenders):
            raise ValueError(f"reference: expected a contender's label, found {reference}")
        return dataclasses.replace(self, reference=reference)

    def speedups(self) -> dict[str, Speedup]:
        """By label, for those who finished; empty where the reference did not."""
        if self.reference not in self.seconds:
            return {}
        reference = self.seconds[self.reference]
        return {label: speedup(reference, seconds) for label, seconds in self.seconds.items()}

    def table(self) -> "pandas.DataFrame":
        """A row for each contender, by label; MB is on disk, NaN where there is no file."""
        import pandas as pd

        speedups, rows = self.speedups(), []
        for label in (contender.label for contender in self.contenders):
            median, low, high = speedups.get(label, (np.nan,) * 3)
            row = {"contender": label, "speed-up": median, "low": low, "high": high}
            row["milliseconds"] = 1000 * np.median(self.seconds.get(label, np.nan))
            row["MB"] = self.megabytes.get(label, np.nan)
            rows.append(row | ({"reason": self.reasons.get(label, "")} if self.reasons else {}))
        decimals = {"speed-up": 2, "low": 2, "high": 2, "milliseconds": 1, "MB": 1}
        return pd.DataFrame(rows).set_index("contender").round(decimals)

    def plot(self) -> "Figure":
        """The table's speed-ups as dots with their intervals; in words, `describe`."""
        from matplotlib.figure import Figure

        speedups, names = self.speedups(), []
        figure = Figure(figsize=(6.5, 1 + 0.45 * len(self.contenders)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color="grey", linewidth=1, linestyle="--")
        for row, contender in enumerate(self.contenders):
            label, colour = contender.label, COLOURS[contender.kind]
            names.append(label if label in speedups else f"{label} (no result)")
            if label not in speedups:
                continue
            median, low, high = speedups[label]
            axes.plot([low, high], [row, row], color=colour, linewidth=2)
            axes.plot(median, row, color=colour, marker=MARKERS[contender.kind], markersize=8)
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{median:.2f}", (median, row), **place)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.7)
        axes.set_xlabel(f"speed-up against {self.reference} (median of rounds, 95 % interval)")
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(self) -> str:
        """The plot in one sentence, for those who do not see it."""
        parts = [
            f"{label} {s.median:.2f} ({s.low:.2f} to {s.high:.2f})"
            for label, s in self.speedups().items()
            if label != self.reference
        ]
        parts += [f"{label} failed" for label in self.reasons]
        return f"Speed-up against {self.reference} (1.00), median and 95 % interval: " + (
            "; ".join(parts) + "."
        )


def turns(labels: Sequence[str], number: int) -> list[str]:
    """The order in round `number` (from 0): each round, another one goes first."""
    first = number % len(labels)
    return [*labels[first:], *labels[:first]]


def run(
    contenders: Sequence[Contender],
    arrays: Mapping[str, np.ndarray],
    *,
    rounds: int = 10,
    repeats: int = 1,
    warmup: int = 2,
    threads: int = 2,
    reference: str | None = None,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> Result:
    """Time `contenders` on `arrays`, the model's inputs by name (a graph takes those it knows).

    In each of the `rounds` every contender runs `repeats` times, of which the median counts, after
    `warmup` runs that do not. `threads` are for one operator, and never spin. Speed-ups are against
    the label `reference`, by default the first. A contender that raises, dies, or does not answer
    within `timeout` seconds has no times, but a reason. Raises ValueError on bad arguments.
    """
    labels = [contender.label for contender in contenders]
    reference = labels[0] if reference is None and labels else reference
    if reference not in labels or len(set(labels)) < len(labels) or min(rounds, repeats) < 1:
        raise ValueError(
            "expected contenders with labels of their own, the reference among them, and one round"
            f" and repeat or more; found {labels}, {reference}, {rounds} and {repeats}"
        )
    reasons, seconds = {}, {label: [] for label in labels}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {
            c.label: stack.enter_context(
                contextlib.closing(
                    Worker(
                        c.path, c.factory, c.arguments, arrays, threads, timeout, folder / str(n)
                    )
                )
            )
            for n, c in enumerate(contenders)
        }

        def take_turn(label: str, times: int | None) -> float | None:
            """The median seconds of `times` runs; with None, wait until it is ready."""
            try:
                if times is not None:
                    workers[label].send(times)
                return workers[label].receive()
            except Failed as failed:
                reasons[label] = str(failed)
                workers[label].close()

        for times in (None, warmup):
            for label in labels:
                if label not in reasons:
                    take_turn(label, times)
        if progress:
            print(f"started {len(labels) - len(reasons)} of {len(labels)} contenders", flush=True)
        for number in range(rounds):
            for label in turns(labels, number):
                if label not in reasons:
                    seconds[label].append(take_turn(label, repeats))
            if progress and ((number + 1) % 5 == 0 or number + 1 == rounds):
                print(f"round {number + 1} of {rounds}", flush=True)
    return Result(
        tuple(contenders),
        reference,
        {label: np.array(seconds[label]) for label in labels if label not in reasons},
        reasons,
        {c.label: files.size(c.path) / 1e6 for c in contenders if c.path and c.path.is_file()},
        f"{rounds} rounds of {repeats}; "
        + ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items())
        + f"; {_machine(threads)}",
    )


def profile(
    path: str | Path, arrays: Mapping[str, np.ndarray], *, runs: int = 5, threads: int = 2
) -> "pandas.DataFrame":
    """Where the time goes in the model at `path`, by ONNX Runtime's own profiler.

    A row for each operator, the slowest first: its `nodes`, `milliseconds` in one run (the median
    of `runs`), and its `share` of their sum, 0 to 1. Operators are those after the session's own
    optimisation, which fuses by itself; what is in the file, `graph.counts` tells. An If or a Loop
    counts as the operators in it. Raises `files.BadInput` where the model does not run.
    """
    import pandas as pd

    path = Path(path).absolute()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"path": str(path), "runs": runs, "threads": threads}
        arguments["prefix"] = str(Path(folder) / "profile")
        profiled, own = "helpers.worker:profiled", Path(folder) / "worker"
        worker = Worker(path, profiled, arguments, arrays, threads, TIMEOUT, own)
        with contextlib.closing(worker):
            try:
                worker.receive()
                worker.send(1)
                worker.receive()
            except Failed as failed:
                raise files.BadInput(
                    f"{path}: expected a model that runs on the given arrays, found: {failed};"
                    " check the file and its inputs"
                ) from None
        [file] = Path(folder).glob("profile*")
        events = json.loads(file.read_text())
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs:]
    nodes = pd.DataFrame(
        {
            "run": int(np.searchsorted(starts, event["ts"], side="right")),  # 0 is the warm-up
            "operator": event["args"]["op_name"],
            "node": event["name"],
            "milliseconds": event["dur"] / 1000,
        }
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    )
    nodes = nodes[(nodes.run > 0) & ~nodes.operator.isin(["If", "Loop", "Scan"])]
    by_run = nodes.groupby(["run", "operator"]).milliseconds.sum().unstack(fill_value=0)
    table = pd.DataFrame({"nodes": nodes.groupby("operator").node.nunique()})
    table["milliseconds"] = by_run.median()
    table["share"] = table.milliseconds / table.milliseconds.sum()
    table = table.sort_values("milliseconds", ascending=False)
    return table.round({"milliseconds": 2, "share": 3})


def plot_profile(profiles: Mapping[str, "pandas.DataFrame"], *, top: int = 8) -> "Figure":
    """What `profile` gave for a few graphs, by label, side by side; beyond `top`, "other".

    Bars are milliseconds in one run, the text beside each is its share. Without colour, since
    colours stand for contenders.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    times = pd.DataFrame({label: table.milliseconds for label, table in profiles.items()}).fillna(0)
    times = times.loc[times.sum(axis=1).sort_values(ascending=False).index]
    rest = times.iloc[top:].sum()
    times = times.iloc[:top]
    if rest.any():
        times.loc["other"] = rest
    figure = Figure(figsize=(6.8, 1.1 + 0.28 * len(times)), layout="constrained")
    panels = figure.subplots(1, len(profiles), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (label, column) in zip(panels, times.items(), strict=True):
        bars = axes.barh(column.index, column, color="dimgrey")
        shares = [f"{share:.0%}" if share else "" for share in column / column.sum()]
        axes.bar_label(bars, shares, padding=2, fontsize="small")
        axes.set_title(textwrap.fill(label, 72 // len(profiles)), fontsize="medium")
        axes.margins(x=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.supxlabel("milliseconds in one run", fontsize="medium")
    return figure


def _machine(threads: int) -> str:
    """Processor, cores, threads and versions, in one line that names no machine."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (
        found := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    ):
        processor = found[1]
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime"))
    return f"{processor}, {os.cpu_count()} cores, {threads} threads; {', '.join(versions)}"
