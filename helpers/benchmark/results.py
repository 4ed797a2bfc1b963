"""What a benchmark showed: speed-ups with their intervals, as a table, a plot, and in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from helpers.contenders import AGAIN, LOOKS, Contender
from helpers.plots import WIDTH, Plot
from helpers.workers.paired import Speedup, interval, speedup

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one contender showed. `seconds` are (rounds,), and `reference` those of the run's
    reference in the same rounds. `peak` is bytes, of its process, loading included; NaN where the
    system does not tell.

    `outputs` are those of its first run. What its runtime tells: the `operators` that it ran, the
    `precision` that their products were computed in, in words (else ""), and of those operators,
    which the provider that was asked for `handed_back` to the CPU's (None where none was).
    """

    seconds: np.ndarray
    peak: float
    outputs: Mapping[str, np.ndarray]
    operators: Mapping[str, int] | None
    reference: np.ndarray | float = 1.0
    precision: str = ""
    handed_back: Mapping[str, int] | None = None

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
    def interval(self) -> str:
        """What the intervals are, by the number of rounds."""
        rounds = [len(measured.seconds) for measured in self.measured.values()]
        return interval(min(rounds)) if rounds else "interval"

    @property
    def caption(self) -> str:
        """What the table and the plot show, in one line."""
        return f"speed-up over {self._reference_in_words()}; {self.interval}; {self.conditions}"

    def _reference_in_words(self) -> str:
        """The reference, with the median time of one of its runs."""
        if self.reference not in self.measured:
            return self.reference
        seconds = np.median(self.measured[self.reference].seconds)
        return f"{self.reference} ({1000 * seconds:.3g} ms)"

    @property
    def noise(self) -> float:
        """By how much two runs of one contender differ: the largest distance from 1 of what
        `contenders.again` measured against the first run of the same. 0 where none ran twice."""
        gaps = [
            abs(speedup(self.measured[first].relative, measured.relative).median - 1)
            for label, measured in self.measured.items()
            if label.endswith(AGAIN) and (first := label.removesuffix(AGAIN)) in self.measured
        ]
        return max(gaps, default=0.0)

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
        return {
            label: speedup(reference, measured.relative)
            for label, measured in self.measured.items()
        }

    def over(self, reference: str, labels: Sequence[str] = ()) -> "pandas.Series":
        """The speed-ups of `labels` (all others, unless given) over `reference`, in words: faster,
        slower, or no difference, which is what is within `noise` or whose interval holds 1."""
        import pandas as pd

        speedups = self.against(reference).speedups()
        labels = labels or [label for label in speedups if label != reference]
        told = {
            label: f"{speedups[label]}, {speedups[label].verdict(self.noise)}"
            for label in labels
            if label in speedups
        }
        return pd.Series(told, name=f"over {reference}", dtype=str)

    def difference(self, label: str) -> float:
        """The largest difference of any output from PyTorch's, the first contender of that kind.

        NaN where either has no result, or where they have no output in common.
        """
        labels = [contender.label for contender in self.contenders if contender.kind == "pytorch"]
        pytorch = self.measured.get(labels[0]) if labels else None
        contender = self.measured.get(label)
        if pytorch is None or contender is None:
            return np.nan
        largest = [
            gap(expected, contender.outputs[name])
            for name, expected in pytorch.outputs.items()
            if name in contender.outputs and expected.size
        ]
        return float(max(largest, default=np.nan))

    def table(self) -> "pandas.DataFrame":
        """A row for each contender, by label.

        MB are 10⁶ bytes: on disk, and in memory at the peak of its process, loading included. The
        precision is that in which products were computed, as the runtime tells. What is handed back
        are the operators that another provider than the CPU's did not take. NaN or empty: there is
        none.
        """
        import pandas as pd

        rows = pd.DataFrame(
            {contender.label: self.row(contender.label) for contender in self.contenders}.values()
        )
        decimals = {"speed-up": 2, "MB on disk": 0, "MB in memory": 0}
        return rows.set_index("contender").round(decimals)

    def row(self, label: str) -> dict[str, object]:
        """The row of the table for the contender `label`, by column, not rounded."""
        measured = self.measured.get(label)
        gain = self.speedups().get(label)
        difference = self.difference(label)
        row = {
            "contender": label,
            "speed-up": gain.median if gain else np.nan,
            "interval": f"{gain.low:.2f} to {gain.high:.2f}" if gain else "",
            "precision": measured.precision if measured else "",
            "difference": "" if np.isnan(difference) else f"{difference:.0e}",
            "MB on disk": self.megabytes.get(label, np.nan),
            "MB in memory": measured.peak / 1e6 if measured else np.nan,
        }
        if any(one.handed_back is not None for one in self.measured.values()):
            row["handed back"] = _listed(measured.handed_back) if measured else ""
        return row | ({"reason": self.reasons.get(label, "")} if self.reasons else {})

    def operators(self) -> "pandas.DataFrame":
        """How often each operator occurs, for each contender that runs a file: in the file, among
        those that the runtime ran, since a session fuses by itself, and of those, among what was
        handed back. Most frequent first."""
        import pandas as pd

        columns = {}
        for label, counts in self.in_file.items():
            if ran := self.measured[label].operators:
                columns[label, "file"], columns[label, "run"] = counts, ran
                if handed_back := self.measured[label].handed_back:
                    columns[label, "handed back"] = handed_back
        table = pd.DataFrame(columns).fillna(0).astype(int)
        return table.loc[table.max(axis=1).sort_values(ascending=False, kind="stable").index]

    def plot(self) -> Plot:
        """The table's speed-ups as dots with their intervals."""
        from matplotlib.figure import Figure

        speedups, names = self.speedups(), []
        figure = Figure(figsize=(WIDTH, 1 + 0.4 * len(self.contenders)), layout="constrained")
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
        axes.set_xlabel(f"speed-up over {self.reference} (median and {self.interval})")
        axes.spines[["top", "right"]].set_visible(False)
        return Plot(figure, self.describe())

    def describe(self) -> str:
        """The plot in one sentence, for those who do not see it."""
        parts = [
            f"{label} {s.median:.2f} ({s.low:.2f} to {s.high:.2f})"
            for label, s in self.speedups().items()
            if label != self.reference
        ]
        parts += [f"{label} failed" for label in self.reasons]
        title = f"Speed-up over {self.reference} (1.00), median and {self.interval}"
        return f"{title}: {'; '.join(parts)}."


def _listed(operators: Mapping[str, int] | None) -> str:
    """How often each operator occurs: "6 Attention, 2 Shape", or "nothing"."""
    if operators is None:
        return ""
    return ", ".join(f"{number} {name}" for name, number in operators.items()) or "nothing"


def gap(expected: np.ndarray, array: np.ndarray) -> float:
    """The largest difference of two arrays; infinite where their shapes differ."""
    if expected.shape != array.shape:
        return np.inf
    return float(np.max(np.abs(np.subtract(expected, array, dtype=float))))
