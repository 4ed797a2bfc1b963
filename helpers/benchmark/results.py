"""What a benchmark showed: speed-ups with their intervals, as a table, a plot, and in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helpers.contenders import LOOKS, Contender

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


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
