"""Limits of what a command takes, memory and time: a damaged model may ask for any amount of them.

Time is that of the processor, of the command and of its children, so that a busy machine ends
nothing; a limit on the clock is there for what waits and never works. Memory is limited by the
system where it can be (Linux), and looked at as the command runs.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import onnx

from helpers.errors import BAD_INPUT
from helpers.workers.worker import memory

MEMORY, MEMORY_EACH = 6 * 2**30, 12  # bytes that a command may take, and for each byte of a model
SECONDS, SECONDS_EACH = 100, 4e-6  # likewise, of the processor's time
SECONDS_NODE = 0.1  # and for each node: optimizers take longer for many nodes, however small
CLOCK = 10  # seconds on the clock for each of them
LOOK = 0.5  # seconds between two looks at what was taken
READ = 2**27  # bytes of a model up to which it is read, for its nodes and the names of its data


class Limits(NamedTuple):
    """What a command may take: bytes of memory, and seconds of the processor and on the clock."""

    memory: float
    processor: float
    clock: float


def limits(models: Iterable[Path]) -> Limits:
    """What a command on these files may take. Those that are missing or damaged count no nodes."""
    size = nodes = 0
    for path in models:
        with contextlib.suppress(OSError):  # the command says it better
            content = path.read_bytes() if path.is_file() and path.stat().st_size < READ else b""
            beside = [file for file in path.parent.iterdir() if file.is_file()]
            size += sum(file.stat().st_size for file in beside if _belongs(file, path, content))
            nodes += _count(content)
    seconds = SECONDS + SECONDS_EACH * size + SECONDS_NODE * nodes
    return Limits(MEMORY + MEMORY_EACH * size, seconds, CLOCK * seconds)


def _belongs(file: Path, model: Path, content: bytes) -> bool:
    """Whether `file` is the model, or its data: the model names it, or it is called like it."""
    return file.name.startswith(model.name) or file.name.encode() in content


def _count(content: bytes) -> int:
    """The nodes of a serialised model, those in branches, bodies and functions included."""
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception:  # whatever protobuf raises: it is damaged
        return 0
    return sum(_nodes(function.node) for function in (model.graph, *model.functions))


def _nodes(nodes: Sequence[onnx.NodeProto]) -> int:
    inner = (
        g
        for node in nodes
        for attribute in node.attribute
        for g in (attribute.g, *attribute.graphs)
    )
    return len(nodes) + sum(_nodes(graph.node) for graph in inner)


@contextlib.contextmanager
def bounded(models: Sequence[Path]) -> Iterator[None]:
    """Bound what a command on `models` takes; where it is more, one line, and the process ends."""
    allowed, done = limits(models), threading.Event()
    watch = threading.Thread(target=_watch, args=(models[0], allowed, done), daemon=True)
    with _memory_limited(int(allowed.memory)):
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()


@contextlib.contextmanager
def _memory_limited(size: int) -> Iterator[None]:
    """Have the system refuse more than `size` bytes, where it can: code then raises, and cleans."""
    try:
        import resource
    except ImportError:  # as on Windows, where `_watch` alone looks
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = size if before[1] == resource.RLIM_INFINITY else min(size, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _watch(model: Path, allowed: Limits, done: threading.Event) -> None:
    """End the process when it has taken more than `allowed`, unless it is `done` before."""
    began, before = time.monotonic(), processor_seconds()
    while not done.wait(LOOK):
        clock, processor = time.monotonic() - began, processor_seconds() - before
        taken = memory(os.getpid())
        if taken > allowed.memory:
            _end(
                f"{model}: expected a command to take {allowed.memory / 2**30:.1f} GiB of memory at"
                f" the most, found {taken / 2**30:.1f} GiB"
            )
        if processor > allowed.processor or clock > allowed.clock:
            _end(
                f"{model}: expected an answer within {allowed.processor:.0f} s of the processor's"
                f" time and {allowed.clock:.0f} s on the clock, found none after {processor:.0f} s"
                f" of the processor's time, {clock:.0f} s on the clock"
            )


def processor_seconds() -> float:
    """Seconds of the processor's time that this process has taken, and those that it started.

    Of those that have ended, only where the system keeps count (not on Windows).
    """
    user, system, children_user, children_system, _ = os.times()
    total = user + system + children_user + children_system
    with contextlib.suppress(ImportError):
        import psutil

        for child in _children():
            with contextlib.suppress(psutil.Error):  # it has ended
                times = child.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def _children() -> list:
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process().children(recursive=True)
    return []


def _end(line: str) -> NoReturn:
    """Say `line`, and end this process and those that it started.

    The code that hangs may not be Python's, and cannot be interrupted.
    """
    advice = "check the model; called from Python, helpers has no limits"
    print(f"{line}; {advice}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # whatever happens, it ends
        for child in _children():
            child.kill()
    os._exit(BAD_INPUT)
