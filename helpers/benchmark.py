"""Time contenders fairly: each in a process of its own, by turns, as ratios paired by round.

Runtimes in one process fight over threads, and a machine's speed drifts within minutes. So every
contender gets a process, one at a time runs, they take turns, and only the ratio of two times of
the same round counts. Milliseconds are shown, as a fact of one run on one machine.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helpers import files, graph
from helpers.contenders import LOOKS, Contender
from helpers.worker import Failed, Worker, memory

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

TIMEOUT = 300  # seconds that a contender may take to load, or for one turn
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxscript", "openvino", "nncf")


class Speedup(NamedTuple):
    """Above 1 is faster than the reference. `low` and `high` bound the median, at 95 %.

    As text, with what it tells: a gain, a loss, or nothing, where the interval holds 1.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        tells = "a gain" if self.median > 1 else "a loss"
        if self.low <= 1 <= self.high:
            tells = "cannot tell"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}) {tells}"


def speedup(reference: np.ndarray, times: np.ndarray) -> Speedup:
    """The median of the ratios `reference` / `times`, both (rounds,), paired by round.

    The interval is a seeded percentile bootstrap over rounds (Efron 1979); of fewer than six rounds
    no interval of the median reaches 95 %, and it is about their range.
    """
    ratios = np.asarray(reference) / np.asarray(times)
    picks = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return Speedup(float(np.median(ratios)), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one contender showed. `seconds` are (rounds,), and `reference` those of the run's
    reference in the same rounds. `peak` is bytes, of its process, loading included; NaN where the
    system does not tell.

    `outputs` are those of its first run, `operators` what its runtime ran, if it tells.
    """

    seconds: np.ndarray
    peak: float
    outputs: Mapping[str, np.ndarray]
    operators: Mapping[str, int] | None
    reference: np.ndarray | float = 1.0

    @property
    def relative(self) -> np.ndarray:
        """Its seconds in those of the reference, (rounds,)."""
        return self.seconds / self.reference


@dataclasses.dataclass(frozen=True)
class Result:
    """What `run` measured on one case: by label, `measured` of who finished, `reasons` of the rest.

    `in_file` has how often each operator occurs in the file of who finished, if it runs one, and
    `megabytes` its size on disk; `conditions` the rounds, inputs, processor, threads and versions,
    in one line.
    """

    contenders: tuple[Contender, ...]
    reference: str
    measured: Mapping[str, Measured]
    reasons: Mapping[str, str]
    in_file: Mapping[str, Mapping[str, int]]
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
        if self.reference not in self.measured:
            return {}
        reference = self.measured[self.reference].relative
        return {label: speedup(reference, one.relative) for label, one in self.measured.items()}

    def difference(self, label: str) -> float:
        """The largest difference of any output from PyTorch's, the first contender of that kind.

        NaN where either has no result, or where they have no output in common.
        """
        found = [c.label for c in self.contenders if c.kind == "pytorch"]
        pytorch, own = (self.measured.get(one) for one in (found[0] if found else None, label))
        if pytorch is None or own is None:
            return np.nan
        pairs = [(pytorch.outputs[name], own.outputs.get(name)) for name in pytorch.outputs]
        largest = [
            np.inf if a.shape != b.shape else np.max(np.abs(np.subtract(a, b, dtype=float)))
            for a, b in pairs
            if b is not None and a.size
        ]
        return float(max(largest, default=np.nan))

    def table(self) -> "pandas.DataFrame":
        """A row for each contender, by label.

        MB are 10⁶ bytes: on disk, and of its process at the most. Nodes are those in the file, and
        those that the runtime ran after optimising it by itself. NaN or empty: there is none.
        """
        import pandas as pd

        speedups, rows = self.speedups(), []
        for contender in self.contenders:
            one = self.measured.get(contender.label)
            median, low, high = speedups.get(contender.label, (np.nan,) * 3)
            difference = self.difference(contender.label)
            ran = sum(one.operators.values()) if one and one.operators else ""
            row = {
                "contender": contender.label,
                "speed-up": median,
                "low": low,
                "high": high,
                "milliseconds": 1000 * np.median(one.seconds) if one else np.nan,
                "MB on disk": self.megabytes.get(contender.label, np.nan),
                "MB at most": one.peak / 1e6 if one else np.nan,
                "difference": "" if np.isnan(difference) else f"{difference:.0e}",
                "nodes": sum(self.in_file.get(contender.label, {}).values()) or "",
                "nodes run": ran,
            }
            reason = self.reasons.get(contender.label, "")
            rows.append(row | ({"reason": reason} if self.reasons else {}))
        decimals = {"speed-up": 2, "low": 2, "high": 2, "milliseconds": 0}
        decimals |= {"MB on disk": 0, "MB at most": 0}
        return pd.DataFrame(rows).set_index("contender").round(decimals)

    def operators(self) -> "pandas.DataFrame":
        """How often each operator occurs, for each contender that runs a file: in the file, and
        among those that the runtime ran, since a session fuses by itself. Most frequent first."""
        import pandas as pd

        columns = {}
        for label, counts in self.in_file.items():
            if ran := self.measured[label].operators:
                columns[label, "file"], columns[label, "run"] = counts, ran
        table = pd.DataFrame(columns).fillna(0).astype(int)
        return table.loc[table.max(axis=1).sort_values(ascending=False, kind="stable").index]

    def plot(self) -> "Figure":
        """The table's speed-ups as dots with their intervals; in words, `describe`."""
        from matplotlib.figure import Figure

        speedups, names = self.speedups(), []
        figure = Figure(figsize=(6.5, 1 + 0.4 * len(self.contenders)), dpi=62, layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color="grey", linewidth=1, linestyle="--")
        for row, contender in enumerate(self.contenders):
            label, look = contender.label, LOOKS[contender.kind]
            names.append(label if label in speedups else f"{label} (no result)")
            if label not in speedups:
                continue
            median, low, high = speedups[label]
            axes.plot([low, high], [row, row], color=look.colour, linewidth=2)
            inside = look.colour if look.filled else "white"
            style = {"marker": look.marker, "markersize": 8, "markerfacecolor": inside}
            axes.plot(median, row, color=look.colour, markeredgewidth=1.5, **style)
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{median:.2f}", (median, row), **place)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.8)
        axes.set_xlabel(f"speed-up against {self.reference}\n(median of rounds, 95 % interval)")
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


def plot_by(results: Mapping[int, Result], labels: Sequence[str], axis: str) -> "Figure":
    """The speed-ups of `labels` with their intervals, by what `results` differ in, such as tokens.

    `axis` names that. The tables of `results` have the same figures, for those who do not see it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.6), dpi=62, layout="constrained")
    axes = figure.subplots()
    at, (first, *_) = list(results), results.values()
    for contender in (one for one in first.contenders if one.label in labels):
        speedups = [one.speedups()[contender.label] for one in results.values()]
        middle, low, high = np.array(speedups).T
        look = LOOKS[contender.kind]
        axes.fill_between(at, low, high, alpha=0.12, color=look.colour)
        axes.plot(at, middle, f"{look.marker}-", color=look.colour, label=contender.label)
    axes.axhline(1, color="grey", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, at)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"speed-up against {first.reference}")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def turns(labels: Sequence[str], number: int) -> list[str]:
    """The order in round `number` (from 0): each round, another one goes first."""
    first = number % max(len(labels), 1)
    return [*labels[first:], *labels[:first]]


Cases = Mapping[str, Mapping[str, np.ndarray]]  # by a case's name, the model's inputs by theirs


def run(
    contenders: Sequence[Contender],
    cases: Cases,
    *,
    rounds: int | Mapping[str, int] = 10,
    repeats: int = 1,
    threads: int = 2,
    at_once: int = 7,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> dict[str, Result]:
    """Time `contenders` on each of the `cases`, by name; a graph takes the inputs that it knows.

    Each runs once without being timed; then, in each of the `rounds` (or as many as they say by
    case), each runs `repeats` times, of which the median counts. `threads` are for one operator,
    and never spin. Ratios are against the first contender. A contender that raises, dies, or does
    not answer within `timeout` seconds has no times, but a reason.

    At most `at_once` models are in memory. Where there are more contenders, they are timed group by
    group, in their order, with the first of all in each: two of different groups are compared by
    what each took of its time, which is less sure, so put those side by side that are alike. Peaks
    of memory grow from case to case, so put a small one first.
    Raises ValueError on bad arguments.
    """
    labels = [contender.label for contender in contenders]
    by_case = rounds if isinstance(rounds, Mapping) else dict.fromkeys(cases, rounds)
    if not labels or len(set(labels)) < len(labels) or set(by_case) != set(cases):
        raise ValueError(
            "expected contenders with labels of their own, and rounds for each case; found"
            f" {labels}, {list(cases)} and {rounds}"
        )
    if min(repeats, threads, *by_case.values()) < 1 or at_once < 2:
        raise ValueError(
            "expected one round, repeat and thread or more, and two models at once; found"
            f" {rounds}, {repeats}, {threads} and {at_once}"
        )
    reasons = {c.label: c.reason for c in contenders if c.reason}
    able = [c for c in contenders if not c.reason]
    first = [c for c in able if c.label == labels[0]]
    rest = [c for c in able if c.label != labels[0]]
    groups = [first + some for some in _batched(rest, at_once - len(first))] or [first]
    measured: dict[str, dict[str, Measured]] = {case: {} for case in cases}
    failed: dict[str, dict[str, str]] = {case: dict(reasons) for case in cases}
    gc.collect()
    files.give_back()
    for number, group in enumerate(groups):
        if progress:
            print(f"group {number + 1} of {len(groups)}: {len(group)} contenders", flush=True)
        for case, found in _timed(
            group, cases, by_case, repeats, threads, timeout, progress, failed
        ):
            if labels[0] in found:
                reference = found[labels[0]].seconds
            else:  # the times of one group can still be compared with each other
                reference = 1.0 if len(groups) == 1 else np.nan
            for label, one in found.items():
                measured[case].setdefault(label, dataclasses.replace(one, reference=reference))
    ran = {
        c.label: c.path
        for c in contenders
        if c.path and any(c.label in found for found in measured.values())
    }
    counts = {
        label: graph.counts(graph.load(path, weights=False), domains=False)
        for label, path in ran.items()
    }
    megabytes = {label: files.size(path) / 1e6 for label, path in ran.items()}
    return {
        case: Result(
            tuple(contenders),
            labels[0],
            {label: found[label] for label in labels if label in found},
            {label: failed[case][label] for label in labels if label in failed[case]},
            {label: one for label, one in counts.items() if label in found},
            {label: one for label, one in megabytes.items() if label in found},
            f"{case}: {by_case[case]} rounds of {repeats}, {len(groups)} groups; "
            + ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items())
            + f"; {_machine(threads)}",
        )
        for (case, arrays), found in zip(cases.items(), measured.values(), strict=True)
    }


def _batched(contenders: list[Contender], size: int) -> list[list[Contender]]:
    return [contenders[start : start + size] for start in range(0, len(contenders), size)]


def _timed(
    group: list[Contender],
    cases: Cases,
    rounds: Mapping[str, int],
    repeats: int,
    threads: int,
    timeout: float,
    progress: bool,
    failed: Mapping[str, dict[str, str]],
) -> Iterator[tuple[str, dict[str, Measured]]]:
    """By case, what each of the group showed; why one did not is added to `failed` by case."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers: dict[str, Worker] = {}
        for n, c in enumerate(group):
            worker = Worker(c.factory, c.arguments, threads, timeout, folder / str(n), c.path)
            workers[c.label] = stack.enter_context(contextlib.closing(worker))
        reasons: dict[str, str] = {}
        answers: dict[str, dict] = {label: {} for label in workers}

        def receive(labels: Sequence[str]) -> None:
            """The answers of those who have been asked; who does not answer takes no more part."""
            for label in labels:
                try:
                    answers[label] |= workers[label].receive()
                except Failed as why:
                    reasons[label] = str(why)
                    workers.pop(label).close()

        receive(list(workers))  # they have loaded
        for case, arrays in cases.items():
            for worker in workers.values():  # all together, since this run is not timed
                worker.give(arrays)
            receive(list(workers))
            seconds: dict[str, list[float]] = {label: [] for label in workers}
            for number in range(rounds[case]):
                for label in turns(list(seconds), number):
                    if label in workers:
                        workers[label].send(runs=repeats)
                        receive([label])
                        seconds[label].append(answers[label]["seconds"])
                if progress and ((number + 1) % 5 == 0 or number + 1 == rounds[case]):
                    print(f"{case}: round {number + 1} of {rounds[case]}", flush=True)
            failed[case].update(reasons)
            yield (
                case,
                {
                    label: Measured(
                        seconds=np.array(seconds[label]),
                        peak=worker.peak,
                        outputs=worker.outputs(),
                        operators=answers[label]["operators"],
                    )
                    for label, worker in workers.items()
                },
            )


def _machine(threads: int) -> str:
    """Processor, cores, threads and versions, in one line that names no machine."""
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    threaded = f"{os.cpu_count()} cores, {threads} threads that do not spin"
    return f"{_processor()}, {threaded}; {', '.join(versions)}"


# By platform, what prints the processor's name: ``platform`` has its family alone, or nothing.
NAMED_BY = {"linux": ("lscpu",), "darwin": ("sysctl", "machdep.cpu.brand_string")}


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError, KeyError):
        environment = os.environ | {"LC_ALL": "C"}
        told = subprocess.run(
            NAMED_BY[sys.platform], capture_output=True, text=True, env=environment
        )
        named = r"^(?:Model name|machdep\.cpu\.brand_string):\s*(.+)$"
        if found := re.search(named, told.stdout, re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def peak_memory() -> float:
    """GiB of memory that this process has had at the most, without those that it started."""
    try:
        import resource
    except ImportError:  # as on Windows
        return memory(os.getpid()) / 2**30
    bytes_each = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_each / 2**30
