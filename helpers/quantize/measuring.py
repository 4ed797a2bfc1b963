"""What a quantised graph costs and gains: its error against the floats, and its speed."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from helpers import files, parity
from helpers.parity import precision
from helpers.workers import Failed, Worker
from helpers.workers.paired import turns

LOADERS = {  # by target, what runs a file in a process of its own
    "cpu": ("helpers.workers.runtimes:onnxruntime", {}),
    "openvino": ("helpers.workers.runtimes:openvino", {"int8": False}),
}
THREADS, TIMEOUT = 2, 300  # of one process; seconds that one turn may take
ROUNDS, SECONDS = (3, 10), 5  # of one sitting, at least and at most; its length
RUNS = 3  # in a turn, of which the median counts: the first finds the caches full of another's data
SHORT = 1.0  # seconds of a run, up to which there are several in a turn
Run = Callable[[parity.Outputs], parity.Outputs]


@contextlib.contextmanager
def running(path: Path, target: str) -> Iterator[Run]:
    """The file at `path` as its provider runs it: a function from input to output arrays."""
    if target == "cpu":
        session = files.session(path)
        names = [value.name for value in session.get_outputs()]
        yield lambda arrays: dict(zip(names, session.run(names, arrays), strict=True))
        return
    with _processes({"": path}, target) as workers:
        worker = workers[""]

        def run(arrays: parity.Outputs) -> parity.Outputs:
            worker.give(arrays)
            worker.receive()
            return worker.outputs()

        yield run


@contextlib.contextmanager
def _processes(paths: Mapping[str, Path], target: str) -> Iterator[dict[str, Worker]]:
    """A process for each of the files, by label, which has loaded it."""
    factory, more = LOADERS[target]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {}
        for number, (label, path) in enumerate(paths.items()):
            arguments = {"path": str(path), **more}
            place = folder / str(number)
            worker = Worker(factory, arguments, THREADS, TIMEOUT, place, path)
            workers[label] = stack.enter_context(contextlib.closing(worker))
        for worker in workers.values():
            worker.receive()
        yield workers


def refused(path: Path, target: str, cases: Sequence[parity.Case]) -> dict[str, str]:
    """By the feed's name, why the provider does not run the file at `path` on some of the cases."""
    left, reasons = [case.feed for case in cases], {}
    while left:
        try:
            with running(path, target) as run:
                while left:
                    run(left[0].arrays)
                    left.pop(0)
        except Failed as why:
            reasons[left.pop(0).name] = str(why)
    return reasons


def error(run: Run, cases: Sequence[parity.Case]) -> tuple[float, str]:
    """The error of `run`, and the output that has it: the largest of all outputs of floats.

    That of an output is the root of the mean squared difference from the reference, over all rows
    that are compared in all `cases`, relative to the standard deviation of the reference there.
    """
    gaps: dict[str, list[np.ndarray]] = {}
    values: dict[str, list[np.ndarray]] = {}
    for case in cases:
        outputs = run(case.feed.arrays)
        for name, wanted in case.outputs.items():
            if wanted.dtype.kind == "f":
                where = case.kept[name]
                gaps.setdefault(name, []).append((outputs[name] - wanted)[where].ravel())
                values.setdefault(name, []).append(wanted[where].ravel())
    errors = {}
    for name, parts in gaps.items():
        gap, wanted = np.concatenate(parts).astype(float), np.concatenate(values[name])
        if gap.size:
            own = np.sqrt(np.mean(gap**2)) / (precision.spread(wanted) or 1.0)
            errors[name] = float(own) if np.isfinite(own) else float("inf")
    worst = max(errors, key=errors.get, default="")
    return errors.get(worst, float("inf")), worst


def seconds(
    paths: Mapping[str, Path], target: str, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The seconds that each of the files takes for `arrays`, by label, (rounds,); by turns, each in
    a process of its own.

    There are two sittings, with new processes, started in the other order: of equal processes the
    one that was started first was up to a tenth slower, for as long as they lived.
    """
    times: dict[str, list[float]] = {label: [] for label in paths}
    for order in ([*paths], [*paths][::-1]):
        with _processes({label: paths[label] for label in order}, target) as workers:
            start = time.monotonic()
            for worker in workers.values():  # which does not count
                worker.give(arrays)
                worker.receive()
            short = time.monotonic() - start < SHORT * len(workers)
            _sitting(workers, RUNS if short else 1, times)
    return {label: np.array(taken) for label, taken in times.items()}


def _sitting(workers: Mapping[str, Worker], runs: int, times: Mapping[str, list[float]]) -> None:
    """Time the workers round by round, so many `runs` in a turn, and add the seconds to `times`."""
    least, most = ROUNDS
    end = time.monotonic() + SECONDS
    for number in range(most):
        for label in turns([*workers], number):
            workers[label].send(runs=runs)
            times[label].append(workers[label].receive()["seconds"])
        if number + 1 >= least and time.monotonic() > end:
            break
