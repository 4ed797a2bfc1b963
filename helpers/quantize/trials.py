"""Each way tried: which layers go back to floats until the bound holds, and how fast it is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files, parity
from helpers.quantize import costs, measuring
from helpers.quantize.layers import Layer
from helpers.quantize.samples import Samples
from helpers.quantize.ways import Way
from helpers.quiet import quiet
from helpers.workers import Failed
from helpers.workers.paired import Speedup, speedup

logger = logging.getLogger(__name__)

FAR = 1e3  # an error that is reckoned with in place of a larger one, or of none that is a number


@dataclasses.dataclass
class Tried:
    """What a way gave: the file, its error, the output that has it, the layers left in float, by
    name, and how fast it is against the file that came in; `seconds` are (rounds,). With `reason`
    there is no file."""

    method: str
    path: Path | None = None
    error: float = float("inf")
    output: str = ""
    left: list[str] = dataclasses.field(default_factory=list)
    seconds: np.ndarray | None = None
    speedup: Speedup | None = None
    reason: str = ""

    def drop(self) -> None:
        """Remove the file, which may be large."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "left_in_float": self.left,
            "error": self.error if np.isfinite(self.error) else None,
            "speedup": self.speedup.median if self.speedup else None,
            "interval": [self.speedup.low, self.speedup.high] if self.speedup else None,
            "reason": self.reason or None,
        }

    def __str__(self) -> str:
        if self.reason:
            return f"{self.method}: {self.reason}"
        fast = f", speed-up {self.speedup}" if self.speedup else ""
        return f"{self.method}: error {self.error:.3f}, {len(self.left)} left in float{fast}"


class Trials:
    """Tries ways to round layers of the prepared graph `base`, which has `every` of them, of the
    model that is `opened`.

    `description` says on what inputs, and `timed` on which of them time was measured.
    """

    def __init__(
        self,
        opened: files.Opened,
        base: Path,
        every: Sequence[Layer],
        target: str,
        bound: float,
        bits: int,
        samples: Samples,
    ) -> None:
        self.opened, self.base, self.every = opened, base, every
        self.target, self.bound, self.bits = target, bound, bits
        self.timed, self.costs = "", {}
        plain = parity.Runner(opened, optimise=False)
        self.sets, passed = [], []  # calibration, if any, and others
        for feeds in filter(None, (samples.judged, samples.others)):
            cases, passed_over = parity.cases_of(plain, feeds, [opened])
            self.sets.append(cases)
            passed += passed_over
        self.few, _ = parity.cases_of(plain, samples.few, [opened])
        self.description = samples.description
        if passed:
            self.description += f"; passed over: {'; '.join(passed)}"
        plain.close()

    def of(self, way: Way) -> Tried:
        """What `way` gives, with as few layers in float as the bound needs.

        Those go back first that cost most if they are rounded alone. How many must is guessed from
        the squares of these errors, which add up; then it is tried.
        """
        logger.info(f"trying {self.bits} bits, {way.name} …")
        beyond = [layer.name for layer in self.every if layer not in way.layers]
        best = self._tried(way, 0, beyond)
        if self._held(best) or best.reason:
            return best
        failed, number = 0, self._guessed(way, best.error)
        while not self._held(best) and number < len(way.layers):
            tried = self._tried(way, number, beyond)
            best, worse = sorted((best, tried), key=lambda one: one.error)
            worse.drop()
            if not self._held(tried):
                failed, number = number, number + max(1, number // 4)
        while self._held(best) and number - 1 > failed:
            fewer = self._tried(way, number - 1, beyond)
            if not self._held(fewer):
                fewer.drop()
                break
            best.drop()
            best, number = fewer, number - 1
        return best

    def _held(self, tried: Tried) -> bool:
        return tried.error <= self.bound

    def _guessed(self, way: Way, whole: float) -> int:
        """How many layers must go back for the `whole` error to be within the bound, if the squares
        of what each costs alone add up to it; all of them where that does not do."""
        whole = min(whole, FAR)
        squares = np.array([self._costs()[layer.name] for layer in self._order(way)]) ** 2
        if not way.more:  # without any rounded, nothing of it is left
            squares *= whole**2 / (squares.sum() or 1.0)
        enough = whole**2 - np.cumsum(squares) <= self.bound**2
        return 1 + int(np.argmax(enough)) if enough.any() else len(way.layers)

    def _order(self, way: Way) -> list[Layer]:
        """The layers of `way`, that which costs most first."""
        return sorted(way.layers, key=lambda layer: -self._costs()[layer.name])

    def _costs(self) -> dict[str, float]:
        """What rounding each layer alone costs; measured when it is first needed."""
        if not self.costs:
            logger.info(f"rounding each of {len(self.every)} layers alone …")
            self.costs = costs.alone(self.base, self.every, self.few, self.bits)
        return self.costs

    def _tried(self, way: Way, number: int, beyond: Sequence[str]) -> Tried:
        """What `way` gives with so many layers in float."""
        order = self._order(way) if number else way.layers
        left = order[:number]
        path = self.base.with_name(f"{way.name.replace(' ', '_')}_{number}.onnx")
        tried = Tried(way.name, path, left=[*beyond, *(layer.name for layer in left)])
        try:
            with quiet():
                way.make(path, [layer for layer in way.layers if layer not in left])
            with measuring.running(path, self.target) as run:
                errors = [measuring.error(run, cases) for cases in self.sets]
            tried.error, tried.output = max(errors)
            logger.info(f"{way.name}, {number} left in float: error {tried.error:.3f}")
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the tools' own types: a way that fails is none
            tried.reason = files.raised(error)
            logger.info(f"{way.name}: {tried.reason}")
        return tried

    def time(self, tried: Sequence[Tried]) -> None:
        """Measure the speed of these, against the file that came in.

        That is done on the largest input, and of 4 bits on the smallest: they are for decoders,
        which read one position at a time.
        """
        if not tried:
            return
        cases = [case for cases in self.sets for case in cases]
        which = max if self.bits == 8 else min
        arrays = which((case.feed.arrays for case in cases), key=_size)
        self.timed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        logger.info(f"timing {len(tried)} of them …")
        paths = {"": self.opened.path, **{one.method: one.path for one in tried}}
        try:
            seconds = measuring.seconds(paths, self.target, arrays)
        except Failed as why:
            raise files.BadInput(
                f"{self.opened}: expected a graph that can be timed on {self.target}, found: {why};"
                " give one that it runs, or more time to the machine"
            ) from None
        for one in tried:
            one.seconds = seconds[one.method]
            one.speedup = speedup(seconds[""], one.seconds)


def _size(arrays: parity.Outputs) -> int:
    return sum(array.size for array in arrays.values())
