"""Time contenders fairly: each in a process of its own, by turns, as ratios paired by round.

Runtimes in one process fight over threads, and a machine's speed drifts within minutes. So every
contender gets a process, one at a time runs, they take turns, and only the ratio of two times of
the same round counts. Of the reference, the milliseconds are told, as a fact of one machine.
"""

import contextlib
import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from helpers import files, graph
from helpers.benchmark import machine
from helpers.benchmark.results import Measured, Result
from helpers.contenders import Contender
from helpers.workers.paired import TAIL, coverage, speedup, turns
from helpers.workers.worker import Failed, Worker

logger = logging.getLogger(__name__)

OPENVINO = ".xml"  # how the name of a file in its own format ends, beside which is one of weights
TIMEOUT = 300  # seconds that a contender may take to load, or for one turn

Cases = Mapping[str, Mapping[str, np.ndarray]]  # by a case's name, the model's inputs by theirs
Rounds = int | tuple[int, int]  # so many, or at least and at most so many
Pairs = Sequence[tuple[str, str]]  # a contender's label, and that of what it is compared with


def run(
    contenders: Sequence[Contender],
    cases: Cases,
    *,
    rounds: Rounds | Mapping[str, Rounds] = 10,
    width: float = 0.03,
    seconds: float = math.inf,
    compared: Pairs = (),
    repeats: int = 1,
    threads: int = 2,
    at_once: int = 7,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> dict[str, Result]:
    """Time `contenders` on each of the `cases`, by name; a graph takes the inputs that it knows.

    Each runs once without being timed; then, in each of the `rounds`, each runs `repeats` times, of
    which the median counts. `rounds` are a number, or the least and the most, or either by case.
    Between the least and the most, a case ends when the interval of each speed-up of `compared` is
    narrower than ± `width` of its median, whatever it says, or after so many `seconds`. `compared`
    has pairs of labels, each with its reference; by default, all with the first contender. Of fewer
    than six rounds there is no interval at 95 %, and none counts as narrow.

    `threads` are for one operator, and never spin. Ratios are against the first contender. One that
    raises, dies, or does not answer within `timeout` seconds has no times, but a reason.

    At most `at_once` models are in memory. Where there are more contenders, they are timed group by
    group, in their order, with the first of all in each, and in as many rounds as the first group:
    two of different groups are compared by what each took of its time, which is less sure, so put
    those side by side that are alike. Peaks of memory grow from case to case, so put a small one
    first. Raises ValueError on bad arguments.
    """
    labels = [contender.label for contender in contenders]
    by_case = rounds if isinstance(rounds, Mapping) else dict.fromkeys(cases, rounds)
    _check_labels(labels, cases, by_case, compared)
    _check_numbers(by_case, width, seconds, repeats, threads, at_once)
    pairs = compared or [(label, labels[0]) for label in labels[1:]]
    rules = {case: Rule(*_limits(by_case[case]), width, seconds, pairs) for case in cases}
    table = _Table(
        labels,
        {contender.label: contender.reason for contender in contenders if contender.reason},
        list(cases),
    )
    groups = _groups(
        [contender for contender in contenders if not contender.reason], labels[0], at_once
    )
    files.give_back(math.inf)  # of whatever was worked on before
    for number, together in enumerate(groups):
        if progress and len(groups) > 1:
            logger.info(f"group {number + 1} of {len(groups)}: {len(together)} contenders …")
        with _processes(together, threads, timeout) as workers:
            group = _Group(workers, progress)
            for case, arrays in cases.items():
                group.give(arrays)
                measured, count = group.time(case, rules[case], repeats)
                rules[case] = dataclasses.replace(rules[case], least=count, most=count)
                table.add(case, measured, group.reasons, alone=len(groups) == 1)
    of_runs = f" of {repeats} runs" if repeats > 1 else ""
    in_groups = f", {len(groups)} groups" if len(groups) > 1 else ""
    taken = {case: f"{rules[case].most} rounds{of_runs}{in_groups}" for case in cases}
    where = machine.conditions(threads)
    conditions = {
        case: f"{case}: {taken[case]}; {_shapes(arrays)}; {where}" for case, arrays in cases.items()
    }
    return table.results(contenders, conditions)


def _limits(rounds: Rounds) -> tuple[int, int]:
    """The least and the most rounds."""
    return rounds if isinstance(rounds, tuple) else (rounds, rounds)


def _check_labels(
    labels: Sequence[str], cases: Cases, rounds: Mapping[str, Rounds], compared: Pairs
) -> None:
    if not labels or len(set(labels)) < len(labels) or set(rounds) != set(cases):
        raise ValueError(
            "expected contenders with labels of their own, and rounds for each case; found"
            f" {labels}, {list(cases)} and {rounds}"
        )
    if unknown := {label for pair in compared for label in pair} - set(labels):
        raise ValueError(f"compared: expected labels of contenders, found {sorted(unknown)}")


def _check_numbers(
    rounds: Mapping[str, Rounds],
    width: float,
    seconds: float,
    repeats: int,
    threads: int,
    at_once: int,
) -> None:
    limits = [_limits(number) for number in rounds.values()]
    counts = [repeats, threads, *(least for least, _ in limits)]
    if min(counts) < 1 or any(least > most for least, most in limits) or at_once < 2:
        raise ValueError(
            "expected one round, repeat and thread or more, not more rounds at least than at most,"
            f" and two models at once; found {rounds}, {repeats}, {threads} and {at_once}"
        )
    if width <= 0 or seconds <= 0:
        raise ValueError(f"expected a width and seconds above 0, found {width} and {seconds}")


def _groups(able: list[Contender], reference: str, at_once: int) -> list[list[Contender]]:
    """Contenders that are in memory together, the reference in each group."""
    first = [contender for contender in able if contender.label == reference]
    others = [contender for contender in able if contender.label != reference]
    size = at_once - len(first)
    starts = range(0, len(others), size)
    return [first + others[start : start + size] for start in starts] or [first]


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a case has been timed enough: as `run` says. `pairs` whose times are not there count as
    narrow."""

    least: int
    most: int
    width: float
    seconds: float
    pairs: Pairs

    def holds(self, number: int, times: Mapping[str, Sequence[float]], elapsed: float) -> bool:
        """Whether `number` rounds are enough, with the `times` by label, after `elapsed` seconds.

        It looks at the width of the intervals alone: to stop as soon as one says something would
        find gains that are not there.
        """
        if number < self.least or number >= self.most or elapsed >= self.seconds:
            return number >= self.least
        if coverage(number) < 1 - 2 * TAIL:
            return False
        speedups = [
            speedup(times[reference], times[label])
            for label, reference in self.pairs
            if {label, reference} <= set(times)
        ]
        return all(high - low <= 2 * self.width * median for median, low, high in speedups)


@contextlib.contextmanager
def _processes(
    contenders: Sequence[Contender], threads: int, timeout: float
) -> Iterator[dict[str, Worker]]:
    """A process for each, by label, which has been told to load; they end with the context."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {}
        for number, contender in enumerate(contenders):
            place = folder / str(number)
            what = contender.factory, contender.arguments, threads, timeout, place, contender.path
            worker = stack.enter_context(contextlib.closing(Worker(*what)))
            workers[contender.label] = worker
        yield workers


class _Group:
    """Contenders that are in memory together, with what they answered last; by label."""

    def __init__(self, workers: dict[str, Worker], progress: bool) -> None:
        self.workers, self.progress = workers, progress
        self.answers: dict[str, dict] = {label: {} for label in workers}
        self.reasons: dict[str, str] = {}
        self.receive(list(workers))  # they have loaded

    def receive(self, labels: Sequence[str]) -> None:
        """The answers of those who have been asked; who does not answer takes no more part."""
        for label in labels:
            try:
                self.answers[label] |= self.workers[label].receive()
            except Failed as why:
                self.reasons[label] = str(why)
                self.workers.pop(label).close()

    def give(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Have each run once on `arrays`, all together, since this run is not timed."""
        for worker in self.workers.values():
            worker.give(arrays)
        self.receive(list(self.workers))

    def time(self, case: str, rule: Rule, repeats: int) -> tuple[dict[str, Measured], int]:
        """What each showed on the arrays that it was given, and in how many rounds."""
        times: dict[str, list[float]] = {label: [] for label in self.workers}
        start, number, enough = time.monotonic(), 0, False
        while not enough:
            self.take_turns(times, number, repeats)
            number += 1
            alive = {label: np.array(times[label]) for label in self.workers}
            enough = rule.holds(number, alive, time.monotonic() - start)
            if self.progress and enough:
                logger.info(f"{case}: {number} rounds")
            elif self.progress and number % 5 == 0:
                logger.info(f"{case}: round {number} of {rule.most} …")
        return {label: self.measured(label, times[label]) for label in self.workers}, number

    def take_turns(self, times: Mapping[str, list[float]], number: int, repeats: int) -> None:
        """One round, whose seconds are added to `times`."""
        for label in turns(list(times), number):
            if label not in self.workers:
                continue
            self.workers[label].send(runs=repeats)
            self.receive([label])
            times[label].append(self.answers[label]["seconds"])

    def measured(self, label: str, times: Sequence[float]) -> Measured:
        worker, answer = self.workers[label], self.answers[label]
        return Measured(
            np.array(times),
            worker.peak,
            worker.outputs(),
            answer["operators"],
            precision=answer["precision"] or "",
            handed_back=answer["handed_back"],
        )


class _Table:
    """What the groups have shown so far, by case and label."""

    def __init__(self, labels: Sequence[str], reasons: Mapping[str, str], cases: Sequence[str]):
        self.labels = labels
        self.measured: dict[str, dict[str, Measured]] = {case: {} for case in cases}
        self.reasons: dict[str, dict[str, str]] = {case: dict(reasons) for case in cases}

    def add(
        self,
        case: str,
        measured: Mapping[str, Measured],
        reasons: Mapping[str, str],
        *,
        alone: bool,
    ) -> None:
        """Add what a group showed, with the times of the reference in the same rounds.

        Without those, the times of a group that is `alone` can still be compared with each other.
        """
        first = measured.get(self.labels[0])
        without = 1.0 if alone else np.nan
        reference = first.seconds if first else without
        self.reasons[case].update(reasons)
        for label, times in measured.items():
            paired = dataclasses.replace(times, reference=reference)
            self.measured[case].setdefault(label, paired)

    def results(
        self, contenders: Sequence[Contender], conditions: Mapping[str, str]
    ) -> dict[str, Result]:
        """By case, with what is in the file of each contender that finished any."""
        finished = {label for measured in self.measured.values() for label in measured}
        paths = {
            contender.label: contender.path
            for contender in contenders
            if contender.path and contender.label in finished
        }
        counts = {
            label: graph.counts(graph.load(path, weights=False), domains=False)
            for label, path in paths.items()
            if path.suffix != OPENVINO
        }
        megabytes = {label: _size(path) / 1e6 for label, path in paths.items()}
        return {
            case: Result(
                tuple(contenders),
                self.labels[0],
                {label: measured[label] for label in self.labels if label in measured},
                self.ordered(self.reasons[case]),
                {label: counts[label] for label in counts if label in measured},
                {label: megabytes[label] for label in megabytes if label in measured},
                conditions[case],
            )
            for case, measured in self.measured.items()
        }

    def ordered(self, reasons: Mapping[str, str]) -> dict[str, str]:
        return {label: reasons[label] for label in self.labels if label in reasons}


def _size(path: Path) -> int:
    """Bytes of a model on disk."""
    if path.suffix == OPENVINO:
        return path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return files.size(path)


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items())
