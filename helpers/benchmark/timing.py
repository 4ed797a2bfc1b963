"""Time contenders fairly: each in a process of its own, by turns, as ratios paired by round.

Runtimes in one process fight over threads, and a machine's speed drifts within minutes. So every
contender gets a process, one at a time runs, they take turns, and only the ratio of two times of
the same round counts. Milliseconds are shown, as a fact of one run on one machine.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from helpers import files, graph
from helpers.benchmark.results import Measured, Result
from helpers.contenders import Contender
from helpers.workers.worker import Failed, Worker, memory

logger = logging.getLogger(__name__)

TIMEOUT = 300  # seconds that a contender may take to load, or for one turn
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxscript", "openvino", "nncf")


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
            logger.info(f"group {number + 1} of {len(groups)}: {len(group)} contenders")
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
                    logger.info(f"{case}: round {number + 1} of {rounds[case]}")
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
