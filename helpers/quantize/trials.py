"""Each way tried: which layers go back to floats until the bound holds, and how fast it is."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files, graph, parity
from helpers.feeds import Feed
from helpers.quantize import costs, measuring, smoothing
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
        self.samples, self.timed, self.costs = samples, "", {}
        plain = parity.Runner(opened, optimise=False)
        self.sets, passed = [], []  # calibration, if any, and others
        for feeds in filter(None, (samples.judged, samples.others)):
            cases, passed_over = parity.cases_of(plain, feeds, [opened])
            self.sets.append(self._that_run(cases, passed_over))
            passed += passed_over
        self.few, _ = parity.cases_of(plain, samples.few, [opened])
        self.description = samples.description
        if passed:
            self.description += f"; passed over: {'; '.join(passed)}"
        plain.close()

    def _that_run(self, cases: Sequence[parity.Case], passed: list[str]) -> list[parity.Case]:
        """The cases that the target runs in floats; what was inferred and it does not run goes to
        those `passed` over. Raises `files.BadInput` where nothing is left, or it was given."""
        if self.target == "cpu":  # which has run them all
            return [*cases]
        reasons = measuring.refused(self.opened.path, self.target, cases)
        kept = [case for case in cases if case.feed.name not in reasons]
        given = [case.feed.name for case in cases if not case.feed.inferred]
        name, why = next(iter(reasons.items()), ("", ""))
        if not kept or any(name in reasons for name in given):
            raise files.BadInput(
                f"{self.opened}: expected a graph that {self.target} runs on {name}, found: {why};"
                " give other inputs, or another target"
            )
        passed += [f"{name} ({why})" for name, why in reasons.items()]
        return kept

    def of(self, way: Way) -> Tried:
        """What `way` gives, with as few layers in float as the bound needs.

        Where it needs any, the graph is smoothed first, if that helps. Then those go back that cost
        most if they are rounded alone. How many must is guessed from the squares of these errors,
        which add up; then it is tried. A way that rounds more than layers is taken as it is.
        """
        logger.info(f"trying {self.bits} bits, {way.name} …")
        base, best = self.base, self._tried(way, self.base, 0)
        if not self._held(best) and way.smooth and self._smoothed:
            smoothed = self._tried(way, self._smoothed, 0)
            best, worse = sorted((best, smoothed), key=lambda one: one.error)
            base = self._smoothed if best is smoothed else base
            worse.drop()
        if self._held(best) or best.reason or way.more:
            return best
        return self._with_floats(way, base, best)

    @functools.cached_property
    def _smoothed(self) -> Path | None:
        """The graph, smoothed; None where it has nothing to smooth."""
        path = self.base.with_name("smoothed.onnx")
        feeds = self.samples.calibration or [feed.arrays for feed in self.samples.others]
        return path if smoothing.smooth(self.base, self.every, feeds, path) else None

    def _with_floats(self, way: Way, base: Path, best: Tried) -> Tried:
        """The same with layers back in float; `best` has none."""
        failed, number = 0, self._guessed(way, base, best.error)
        while not self._held(best) and number < len(way.layers):
            tried = self._tried(way, base, number)
            best, worse = sorted((best, tried), key=lambda one: one.error)
            worse.drop()
            if not self._held(tried):
                failed, number = number, number + max(1, number // 4)
        step = 0 if failed else 1  # back by longer and longer steps, and then by halves
        while self._held(best) and number - failed > 1:
            middle = max(failed + 1, number - step) if step else (failed + number) // 2
            fewer = self._tried(way, base, middle)
            if self._held(fewer):
                best.drop()
                best, number, step = fewer, middle, 2 * step
            else:
                fewer.drop()
                failed, step = middle, 0
        return best

    def _held(self, tried: Tried) -> bool:
        return tried.error <= self.bound

    def _guessed(self, way: Way, base: Path, whole: float) -> int:
        """How many layers must go back for the `whole` error to be within the bound, if the squares
        of what each costs alone add up to it."""
        whole = min(whole, FAR)
        alone = self._alone(base)
        squares = np.array([alone[layer.name] for layer in self._order(way, base)]) ** 2
        stays = 1 - np.cumsum(squares) / (squares.sum() or 1.0)
        return 1 + int(np.argmax(stays <= (self.bound / whole) ** 2))

    def _order(self, way: Way, base: Path) -> list[Layer]:
        """The layers of `way`, that which costs most first."""
        alone = self._alone(base)
        return sorted(way.layers, key=lambda layer: -alone[layer.name])

    def _alone(self, base: Path) -> dict[str, float]:
        """What rounding each layer of a prepared graph alone costs; measured when it is needed."""
        if base not in self.costs:
            logger.info(f"rounding each of {len(self.every)} layers alone …")
            self.costs[base] = costs.alone(base, self.every, self.few, self.bits)
        return self.costs[base]

    def _tried(self, way: Way, base: Path, number: int) -> Tried:
        """What `way` makes of the prepared graph `base` with so many layers in float."""
        left = self._order(way, base)[:number] if number else []
        name = way.name if base == self.base else f"{way.name}, smoothed"
        path = self.base.with_name(f"{name} {number}.onnx".replace(" ", "_"))
        beyond = [layer for layer in self.every if layer not in way.layers]
        tried = Tried(name, path, left=[layer.name for layer in (*beyond, *left)])
        try:
            with quiet():
                way.make(base, path, [layer for layer in way.layers if layer not in left])
            tried.error, tried.output = self._error(path)
            logger.info(f"{name}, {number} left in float: error {tried.error:.3f}")
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the tools' own types: a way that fails is none
            tried.reason = files.raised(error)
            logger.info(f"{name}: {tried.reason}")
        return tried

    def _error(self, path: Path) -> tuple[float, str]:
        """The error of a file, and the output that has it."""
        with measuring.running(path, self.target) as run:
            return max(measuring.error(run, cases) for cases in self.sets)

    def error_in_floats(self) -> float:
        """The error of the target itself."""
        return self._error(self.opened.path)[0]

    def time(self, tried: Sequence[Tried]) -> None:
        """Measure the speed of these, against the file that came in.

        That is done on the largest input; of 4 bits, which are for decoders, and of a graph with
        caches on the smallest, caches apart: it reads one position at a time.
        """
        if not tried:
            return
        cases = [case for cases in self.sets for case in cases]
        caches = graph.cache_inputs(self.opened.model)
        which = max if self.bits == 8 and not caches else min
        feed = which((case.feed for case in cases), key=lambda feed: _size(feed, caches))
        arrays = feed.arrays
        self.timed = ", ".join(feed.shapes())
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


def _size(feed: Feed, caches: Container[str]) -> int:
    """How many numbers it has, but for those in `caches`."""
    return sum(array.size for name, array in feed.arrays.items() if name not in caches)
