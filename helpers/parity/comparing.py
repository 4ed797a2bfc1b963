"""Do two models compute the same? Outputs compared over several inputs, padding included.

Compared is every row that has at least one key (`rows`), to within what another order of summation
gives in the types that are computed in (`precision`). A row without a key must only be finite where
the reference is. Nothing compared is not parity.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files
from helpers.feeds import Feed
from helpers.parity import precision, rows, unrounded
from helpers.parity.runner import Model, Outputs, Runner

if TYPE_CHECKING:
    import pandas as pd

OPTIMISED = 3  # times its own noise that an 8-bit graph may differ once sessions optimise it
GROWN = 8  # times what scores rounded otherwise change, that another order of summation may
CAUGHT = 0.5  # of what scores 5 % off change: the most that noise may widen a tolerance to


@dataclasses.dataclass
class Candidate:
    """How one model compares.

    `where` is the worst place: feed, output, index; there `max_abs_diff` is the difference, which
    is `relative` to the output's spread, and `tolerance` what was allowed, for `precision`.
    `compared` counts the numbers that were compared, in all and by feed. Of rows `without_key`,
    which are not, `left_out` of them differ by at most `left_out_diff`. Of graphs in 8 bits that is
    told without their rounding where they are `unrounded`; with it, they differ by `as_run`.
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


@dataclasses.dataclass
class Case:
    """A feed, what the reference gives for it, and where that is compared."""

    feed: Feed
    outputs: Outputs
    kept: Outputs
    empty: list[np.ndarray]


def compare(
    reference: Model,
    candidates: Sequence[Model],
    feeds: Sequence[Feed],
    description: str,
    *,
    tolerance: float | None = None,
) -> Report:
    """Compare `candidates` with `reference` on each of `feeds`; `description` says what those are.

    A model is a file, or a function from input arrays to output arrays by name (as
    `models.runner` makes of PyTorch's). A file as the reference runs without the session's own
    optimisation, a candidate as users run it, with. The tolerance is that of the least precise type
    that either computes in, relative to each output's spread (`precision`), or the reference's own
    difference between optimised and not, where that is larger. 8-bit graphs that round to the same
    steps are compared without their rounding (`unrounded`); other ones without optimisation first,
    where noise counts only as far as scores 5 % off would still show. As they are run, they may
    then differ by a few times what the reference's own rounding changes. `tolerance` sets it, in
    absolute terms.

    A candidate that fails where the reference runs has not held. Raises `files.BadInput` where the
    reference fails or gives NaN in rows that are compared, where inputs or outputs do not match,
    and where there is nothing to compare.
    """
    reference, *candidates = [
        model if callable(model) else files.Opened.of(model) for model in (reference, *candidates)
    ]
    plain = Runner(reference, optimise=False)
    cases, passed = cases_of(plain, feeds, [reference, *candidates])
    if passed:
        description += f"; passed over: {'; '.join(passed)}"
    plain.close()
    with tempfile.TemporaryDirectory() as folder:
        judge = _Judge(plain, cases, tolerance, Path(folder))
        judged = [judge.judged(model) for model in candidates]
        del judge  # whose sessions may read files there
    return Report(plain.name, judged, description)


def cases_of(
    plain: Runner, feeds: Sequence[Feed], models: Sequence[Model]
) -> tuple[list[Case], list[str]]:
    """What the reference gives for each feed, and which feeds it was passed over for, and why.

    One of `models` tells where queries have no key. Raises as `compare` does.
    """
    cases, passed = [], []
    for feed in rows.with_masked(feeds, models):
        try:
            outputs = plain.run(feed.arrays)
            empty = rows.empty(feed, outputs)
            kept = rows.kept(plain.run, feed, outputs, empty)
        except Exception as error:  # ONNX Runtime and PyTorch raise types of their own
            if not feed.inferred:
                raise files.BadInput(
                    f"{plain.name}: expected a model that runs on {feed.name}, found:"
                    f" {files.told(error)}; give other inputs"
                ) from None
            passed.append(f"{feed.name} ({files.told(error, 160)})")
            continue
        bad = [name for name, out in outputs.items() if _nan(out[kept[name]])]
        if not bad:
            cases.append(Case(feed, outputs, kept, empty))
        elif feed.inferred:
            passed.append(f"{feed.name} (the reference gives NaN)")
        else:
            raise files.BadInput(
                f"{plain.name}: expected numbers from the reference, found NaN in {bad[0]}"
                f" ({feed.name}); give other inputs"
            )
    nothing = not any(where.any() for case in cases for where in case.kept.values())
    if (any("NaN" in line for line in passed) and not cases) or (
        nothing and any(_nan(out) for case in cases for out in case.outputs.values())
    ):
        raise files.BadInput(
            f"{plain.name}: expected numbers from the reference, found NaN on all inputs that were"
            " inferred; give --inputs FEEDS.npz"
        )
    if not cases:
        raise files.BadInput(
            f"{plain.name}: expected numbers from the reference, found that it runs on none of the"
            f" inputs: {'; '.join(passed)[:400] or 'there are none'}; give --inputs FEEDS.npz"
        )
    if nothing:
        raise files.BadInput(
            f"{plain.name}: expected rows to compare, found outputs without numbers, or none in a"
            " row that has a key, so that parity cannot be told; give --inputs FEEDS.npz with at"
            " least one key in a row"
        )
    return cases, passed


class _Judge:
    """Judges candidates by what the reference gave."""

    def __init__(
        self,
        plain: Runner,
        cases: list[Case],
        tolerance: float | None,
        folder: Path,
        *,
        noise: bool = True,
    ) -> None:
        self.plain, self.cases, self.tolerance, self.folder = plain, cases, tolerance, folder
        self.precision, self.eight_bits = _read(plain)
        self.noise: dict[str, float] = {}
        self.cap: dict[str, float] = {}
        self.rounding: dict[str, float] | None = None
        self.steps: unrounded.Steps | None = None
        self.unrounded: _Judge | None = None
        self.moved: dict[str, float] = {}
        if plain.opened is not None and tolerance is None and noise:
            self._measure_noise()
            if self.eight_bits:
                self._leave_out_rounding()

    def _measure_noise(self) -> None:
        """How far the reference differs from itself, optimised and not, by output."""
        try:
            optimised = Runner(self.plain.opened)
        except Exception:  # ONNX Runtime's own types: what it optimises cannot be loaded
            return
        for case in self.cases:
            try:
                outputs = optimised.run(case.feed.arrays)
            except Exception:  # ONNX Runtime's own types: a session's fusion may fail
                continue
            for name, out in outputs.items():
                where = case.kept[name]
                own = _difference(case.outputs[name][where], out[where])
                self.noise[name] = max(self.noise.get(name, 0.0), own)
        optimised.close()
        if self.eight_bits:
            tried = [(case.feed, case.outputs, case.kept) for case in self.cases[:4]]
            self.cap = precision.with_scores_off(self.plain.opened, tried)

    def _leave_out_rounding(self) -> None:
        """Make a judge of what the reference computes without its rounding, if it can be told."""
        path = self.folder / "reference.onnx"
        self.steps = unrounded.write(self.plain.opened, path)
        if self.steps is None:
            return
        opened = files.Opened(path)
        plain = Runner(opened, optimise=False)
        cases, _ = cases_of(plain, [case.feed for case in self.cases], [opened])
        self.unrounded = _Judge(plain, cases, None, self.folder, noise=False)
        tried = [(case.feed, case.outputs, case.kept) for case in self.cases]
        self.moved = precision.with_steps_off(self.plain.opened, tried)

    def judged(self, model: Model) -> Candidate:
        first = self._without_rounding(model)
        first = first or self._judged(model, optimise=not self.eight_bits)
        if first.held and self.eight_bits and not callable(model):
            second = self._judged(model, optimise=True, times=OPTIMISED)
            if not second.held:
                return second
            if first.unrounded:
                first.as_run = second.max_abs_diff
        return first

    def _without_rounding(self, model: Model) -> Candidate | None:
        """How `model` compares where the rounding of both is left out; None where that cannot be
        told, or they round to other steps."""
        if self.unrounded is None or callable(model):
            return None
        path = self.folder / "candidate.onnx"
        if unrounded.write(model, path) != self.steps:
            return None
        # Optimised, a session would put rounding in: it makes MatMulNBits of weights in integers.
        judged = self.unrounded._judged(files.Opened(path), optimise=False)
        judged.name, judged.unrounded = str(model), True
        return judged

    def _judged(self, model: Model, *, optimise: bool, times: float = 1) -> Candidate:
        try:
            other = Runner(model, optimise=optimise)
        except Exception as error:  # ONNX Runtime's own types
            reason = f"does not load: {files.told(error)}"
            return Candidate(str(model), False, float("inf"), reason=reason)
        both_files = other.opened is not None and self.plain.opened is not None
        if both_files and other.inputs != self.plain.inputs:
            raise files.BadInput(
                f"{other.name}: expected the inputs of {self.plain.name}"
                f" ({_listed(self.plain.inputs)}), found {_listed(other.inputs)}; compare models of"
                " one signature"
            )
        own, _ = _read(other)
        least = max(self.precision, own, key=precision.ORDER.index)
        candidate = Candidate(other.name, precision=least)
        worst = -1.0
        for case in self.cases:
            try:
                outputs = other.run(case.feed.arrays)
            except Exception as error:  # as above: that it fails is the answer
                candidate.held, candidate.max_abs_diff = False, float("inf")
                candidate.reason = f"fails on {case.feed.name}: {files.told(error)}"
                candidate.feed = case.feed
                return candidate
            for name, array, wanted in _pairs(other, outputs, self.plain, case.outputs):
                worst = self._judge_output(candidate, case, name, array, wanted, times, worst)
            candidate.left_out += sum(int(where.sum()) for where in case.empty)
        return candidate

    def _judge_output(
        self,
        candidate: Candidate,
        case: Case,
        name: str,
        array: np.ndarray,
        wanted: np.ndarray,
        times: float,
        worst: float,
    ) -> float:
        """Judge one output on one feed; returns how bad the worst is so far, in tolerances."""
        where, feed = case.kept[name], case.feed
        counted = candidate.compared
        counted[feed.name] = counted.get(feed.name, 0) + int(where.sum())
        tolerance, reason, at = self._tolerance(candidate, name, wanted[where], times), None, ()
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            found_is = f"{array.dtype} {array.shape}"
            reason = f"{name} is {found_is} and not {wanted.dtype} {wanted.shape}: {feed.name}"
            difference = float("inf")
        else:
            gaps = _gaps(wanted, array)
            inside = np.where(where, gaps, 0.0)
            difference = float(inside.max(initial=0.0))
            at = np.unravel_index(inside.argmax(), inside.shape) if inside.size else ()
            outside = gaps[~where & np.isfinite(gaps)]
            candidate.left_out_diff = max(candidate.left_out_diff, outside.max(initial=0.0))
            if not np.isfinite(array[np.isfinite(wanted) & ~where]).all():
                reason = f"{name} is not finite in a row without a key: {feed.name}"
        if tolerance < difference <= self._most(candidate, name, wanted[where]):
            tolerance = max(tolerance, self._rounding(candidate, name, wanted[where]))
        if reason or not difference <= tolerance:
            candidate.held = False
        candidate.reason = candidate.reason or reason
        if difference / (tolerance or 1e-30) > worst:
            worst = difference / (tolerance or 1e-30)
            candidate.max_abs_diff, candidate.tolerance = difference, tolerance
            candidate.relative = difference / (precision.spread(wanted[where]) or 1.0)
            candidate.where = f"{name}[{', '.join(str(int(i)) for i in at)}], {feed.name}"
            candidate.feed = feed
        return worst

    def _tolerance(
        self, candidate: Candidate, name: str, values: np.ndarray, times: float
    ) -> float:
        """How far the output `name` may differ, which is `values` in the reference."""
        if self.tolerance is not None:
            return self.tolerance if values.dtype.kind == "f" else 0.0
        least = precision.allowed(values, precision.TOLERANCE[candidate.precision])
        noise = times * self.noise.get(name, 0.0)
        if times > 1:
            noise = max(noise, times * self.moved.get(name, 0.0) * precision.spread(values))
        if times == 1 and name in self.cap:
            noise = min(noise, CAUGHT * self.cap[name] * precision.spread(values))
        return max(least, noise)

    def _rounding(self, candidate: Candidate, name: str, values: np.ndarray) -> float:
        """What rounding of the scores grows to in the output `name`: measured when a difference
        asks for it."""
        if self.plain.opened is None or self.tolerance is not None or values.dtype.kind != "f":
            return 0.0
        if self.rounding is None:
            tried = [(case.feed, case.outputs, case.kept) for case in self.cases]
            by = precision.STEPPED if self.eight_bits else precision.ROUNDED
            self.rounding = precision.with_scores_rounded(self.plain.opened, tried, by)
        grown = GROWN * self.rounding.get(name, 0.0) * precision.spread(values)
        return min(grown, self._most(candidate, name, values))

    def _most(self, candidate: Candidate, name: str, values: np.ndarray) -> float:
        """The most that rounding may widen a tolerance to: that of the type times the spread, if
        that is above 1. In 8 bits, where a score that is rounded otherwise can move a whole step,
        it is what scores 5 % off would still be caught by."""
        spread = precision.spread(values)
        if name in self.cap:
            return CAUGHT * self.cap[name] * spread
        return precision.TOLERANCE[candidate.precision] * max(spread, 1.0)


def _read(runner: Runner) -> tuple[str, bool]:
    """What a model computes in, and whether that is 8 bits anywhere; a function's is not known."""
    return precision.read(runner.opened.model) if runner.opened else ("float32", False)


def _listed(inputs: dict[str, str]) -> str:
    return ", ".join(f"{name} {type_}" for name, type_ in inputs.items())


def _pairs(other: Runner, given: Outputs, plain: Runner, outputs: Outputs) -> list[tuple]:
    """(name, found, expected), matched by name, and else by position."""
    if set(outputs) <= set(given):
        return [(name, given[name], wanted) for name, wanted in outputs.items()]
    if len(given) != len(outputs):
        raise files.BadInput(
            f"{other.name}: expected the outputs of {plain.name} ({', '.join(outputs)}),"
            f" found {', '.join(given)}; compare models of one signature"
        )
    return [
        (name, array, wanted)
        for (name, wanted), array in zip(outputs.items(), given.values(), strict=True)
    ]


def _nan(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def _gaps(expected: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Absolute differences, 0 between equal infinities, infinite where only one is a number."""
    if expected.dtype.kind not in "fiub":
        return np.where(expected == given, 0.0, np.inf)
    with np.errstate(invalid="ignore"):
        gaps = np.asarray(np.abs(expected.astype(np.float64) - given.astype(np.float64)))
    gaps[expected == given] = 0.0
    return np.where(np.isnan(gaps), np.inf, gaps)


def _difference(expected: np.ndarray, given: np.ndarray) -> float:
    gaps = _gaps(expected, given)
    return float(gaps[np.isfinite(gaps)].max(initial=0.0))
