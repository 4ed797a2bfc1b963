"""What a comparison found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.feeds import Feed

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass
class Candidate:
    """How one model compares.

    `where` is the worst place: feed, output, index; there `max_abs_diff` is the difference, which
    is `relative` to the output's spread, and `tolerance` what was allowed, for `precision`.
    `compared` counts the numbers that were compared, in all and by feed. Of rows `without_key`,
    which are not, `left_out` of them differ by at most `left_out_diff`. Of graphs in 8 bits that is
    told without their rounding where they are `unrounded`; with it, they differ by `as_run`.
    `not_given` names what the reference gives and it does not.
    """

    name: str
    held: bool = True
    max_abs_diff: float = 0.0
    tolerance: float = 0.0
    where: str = ""
    reason: str | None = None
    relative: float = 0.0
    precision: str = "float32"
    compared: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: int = 0
    left_out_diff: float = 0.0
    feed: Feed | None = None
    unrounded: bool = False
    as_run: float = 0.0
    not_given: list[str] = dataclasses.field(default_factory=list)

    def leave_out(self, what: str) -> None:
        """Note once that it does not give `what`."""
        if what not in self.not_given:
            self.not_given.append(what)

    def to_json(self) -> dict[str, Any]:
        return {
            "held": self.held,
            "max_abs_diff": _finite(self.max_abs_diff),
            "relative": _finite(self.relative),
            "tolerance": self.tolerance,
            "precision": self.precision,
            "where": self.where,
            "reason": self.reason,
            "compared": sum(self.compared.values()),
            "not_given": self.not_given,
            "rows_without_key": {
                "left_out": self.left_out,
                "max_abs_diff": _finite(self.left_out_diff),
            },
        }

    def said(self) -> str:
        """What was compared, and what was not."""
        total = sum(self.compared.values())
        text = f"compared {total:,} numbers in {len(self.compared)} feeds"
        nothing = [name for name, count in self.compared.items() if not count]
        text += f", none of them in: {', '.join(nothing)}" if nothing else ""
        text += f"; not given: {'; '.join(self.not_given)}" if self.not_given else ""
        if self.unrounded:
            text += ", without the rounding to 8 bits"
            text += f" (with it, the largest difference is {self.as_run:.1e})" if self.held else ""
        if not self.left_out:
            return f"{text}; no rows without a key"
        return (
            f"{text}; left out {self.left_out} rows without a key, which differ by at most"
            f" {self.left_out_diff:.1e}"
        )

    def __str__(self) -> str:
        verdict = "held" if self.held else "NOT HELD"
        return (
            f"{self.name}: parity {verdict}, largest difference {self.max_abs_diff:.1e}"
            f" (tolerance {self.tolerance:.1e}, {self.precision}) {self.reason or self.where}"
        ).rstrip()


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


@dataclasses.dataclass
class Report:
    """What `compare` found. `max_abs_diff` and `tolerance` are of the worst candidate."""

    reference: str
    candidates: list[Candidate]
    inputs: str

    @property
    def held(self) -> bool:
        return all(candidate.held for candidate in self.candidates)

    @property
    def worst(self) -> Candidate:
        return max(
            self.candidates, key=lambda candidate: (not candidate.held, candidate.max_abs_diff)
        )

    def to_json(self) -> dict[str, Any]:
        worst = self.worst.to_json()
        for name in ("held", "where", "reason"):
            worst.pop(name)
        return {
            "reference": self.reference,
            "held": self.held,
            "parity": worst | {"inputs": self.inputs},
            "models": [
                {"file": candidate.name, **candidate.to_json()} for candidate in self.candidates
            ],
        }

    def table(self) -> pd.DataFrame:
        """A row for each candidate, differences rounded to two digits."""
        import pandas as pd

        return pd.DataFrame(
            {
                "parity": "held" if candidate.held else "not held",
                "largest difference": f"{candidate.max_abs_diff:.1e}",
                "tolerance": f"{candidate.tolerance:.1e}",
                "where": candidate.reason or candidate.where,
            }
            for candidate in self.candidates
        ).set_axis([Path(candidate.name).name for candidate in self.candidates])

    def __str__(self) -> str:
        lines = [f"reference {self.reference}", f"inputs {self.inputs}"]
        return "\n".join([*lines, self.worst.said(), *map(str, self.candidates)])
