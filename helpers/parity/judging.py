"""Judge one model by what the reference gave: how far may it differ, and does it?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers import files
from helpers.parity import precision, unrounded
from helpers.parity.cases import Case, cases_of
from helpers.parity.reports import Candidate
from helpers.parity.runner import Model, Outputs, Runner

OPTIMISED = 3  # times its own noise that an 8-bit graph may differ once sessions optimise it
GROWN = 8  # times what scores rounded otherwise change, that another order of summation may
CAUGHT = 0.5  # of what scores 5 % off change: the most that noise may widen a tolerance to


class Judge:
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
        self.unrounded: Judge | None = None
        self.moved: dict[str, float] = {}
        if plain.opened is not None and tolerance is None and noise:
            self._measure_noise()
            if self.eight_bits:
                self._leave_out_rounding()

    @property
    def _tried(self) -> precision.Tried:
        return [(case.feed, case.outputs, case.kept) for case in self.cases]

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
            self.cap = precision.with_scores_off(self.plain.opened, self._tried[:4])

    def _leave_out_rounding(self) -> None:
        """Make a judge of what the reference computes without its rounding, if it can be told."""
        path = self.folder / "reference.onnx"
        self.steps = unrounded.write(self.plain.opened, path)
        if self.steps is None:
            return
        opened = files.Opened(path)
        try:
            plain = Runner(opened, optimise=False)
            cases, _ = cases_of(plain, [case.feed for case in self.cases], [opened])
        except Exception:  # ONNX Runtime's own types, or it gives no numbers
            return
        plain.name = self.plain.name
        self.unrounded = Judge(plain, cases, None, self.folder, noise=False)
        self.moved = precision.with_steps_off(self.plain.opened, self._tried)

    def judged(self, model: Model) -> Candidate:
        other = self._loaded(model, optimise=not self.eight_bits)
        if isinstance(other, Candidate):
            return other
        first = self._without_rounding(other) or self._judged(other)
        if first.held and self.eight_bits and not callable(model):
            other = self._loaded(model, optimise=True)
            second = other if isinstance(other, Candidate) else self._judged(other, OPTIMISED)
            if not second.held:
                return second
            first.as_run = second.max_abs_diff
        return first

    def _loaded(self, model: Model, *, optimise: bool) -> Runner | Candidate:
        """`model`, or that it does not load. Raises `files.BadInput` on another signature."""
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
        return other

    def _without_rounding(self, other: Runner) -> Candidate | None:
        """How a model compares where the rounding of both is left out; None where that cannot be
        told, or they round to other steps."""
        if self.unrounded is None or other.opened is None:
            return None
        path = self.folder / "candidate.onnx"
        if unrounded.write(other.opened, path) != self.steps:
            return None
        # Optimised, a session would put rounding in: it makes MatMulNBits of weights in integers.
        plain = self.unrounded._loaded(files.Opened(path), optimise=False)
        if isinstance(plain, Candidate):
            return None
        plain.name = other.name
        judged = self.unrounded._judged(plain)
        judged.unrounded = True
        return None if judged.reason else judged

    def _judged(self, other: Runner, times: float = 1) -> Candidate:
        own, _ = _read(other)
        least = max(self.precision, own, key=precision.ORDER.index)
        candidate = Candidate(other.name, precision=least)
        worst = -1.0
        for case in self.cases:
            try:
                outputs = other.run(case.feed.arrays)
            except Exception as error:  # ONNX Runtime's own types: that it fails is the answer
                candidate.held, candidate.max_abs_diff = False, float("inf")
                candidate.reason = f"fails on {case.feed.name}: {files.told(error)}"
                candidate.feed = case.feed
                return candidate
            for name, array, wanted in _pairs(other, outputs, self.plain, case, candidate):
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
        if _is_last(array, wanted):
            where, wanted = where[:, -1:], wanted[:, -1:]
            candidate.leave_out(f"all but the last position of {name}")
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
            by = precision.STEPPED if self.eight_bits else precision.ROUNDED
            self.rounding = precision.with_scores_rounded(self.plain.opened, self._tried, by)
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


def _pairs(
    other: Runner, given: Outputs, plain: Runner, case: Case, candidate: Candidate
) -> list[tuple]:
    """(name, found, expected), matched by name, and else by position. What the reference only
    hands on may be missing; `candidate` is told."""
    outputs, inputs = case.outputs, case.feed.arrays.values()
    missing = [name for name in outputs if name not in given]
    handed_on = [
        name for name in missing if any(np.array_equal(outputs[name], one) for one in inputs)
    ]
    if missing == handed_on:
        for name in missing:
            candidate.leave_out(f"{name}, which is an input")
        return [(name, given[name], wanted) for name, wanted in outputs.items() if name in given]
    if len(given) != len(outputs):
        raise files.BadInput(
            f"{other.name}: expected the outputs of {plain.name} ({', '.join(outputs)}),"
            f" found {', '.join(given)}; compare models of one signature"
        )
    return [
        (name, array, wanted)
        for (name, wanted), array in zip(outputs.items(), given.values(), strict=True)
    ]


def _is_last(array: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether `array` (B, 1, V) has one position where `wanted` (B, S, V) has several."""
    several = wanted.ndim == 3 == array.ndim and wanted.shape[1] > 1 == array.shape[1]
    return several and array.shape[::2] == wanted.shape[::2]


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
