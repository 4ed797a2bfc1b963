"""A contender of a benchmark in a process of its own, which runs when it is asked to."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files

Model = Callable[[dict[str, np.ndarray]], object]  # input arrays by name to outputs, of any type


class Failed(Exception):
    """Why a contender gave no answer, in one line."""


class Worker:
    """A contender's own process, started at once; it answers in the order in which it is asked.

    JSON lines go in and out: first what to load (`folder` is its own, for inputs and messages),
    then numbers of runs; back come seconds or an error. It ends by itself with its standard input.
    """

    def __init__(
        self,
        path: Path | None,
        factory: str | None,
        arguments: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        threads: int,
        timeout: float,
        folder: Path,
    ):
        folder.mkdir()
        self.path, self.timeout, self.hung = path, timeout, False
        self.messages = folder / "stderr.txt"
        np.savez(folder / "arrays.npz", **arrays)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # can import what we can
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait do not spin
        }
        what = {
            "path": str(path),
            "factory": factory,
            "arguments": dict(arguments),
            "arrays": str(folder / "arrays.npz"),
            "threads": threads,
        }
        line = json.dumps(what)  # raises on arguments it cannot carry, before anything is started
        with self.messages.open("wb") as messages:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "helpers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                bufsize=0,
                env=environment,
            )
        self.send(line)

    def send(self, line: str | int) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died; `receive` tells
            self.process.stdin.write(f"{line}\n".encode())

    def receive(self) -> float | None:
        """The next answer: the median of the seconds of its runs, None after loading."""
        timer = threading.Timer(self.timeout, self._give_up)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise Failed(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(self._one_line(answer["error"]))
        return answer["seconds"]

    def _give_up(self) -> None:
        self.hung = True
        self.process.kill()

    def _death(self) -> str:
        status = self.process.wait()
        if self.hung:
            return f"no answer within {self.timeout:g} s"
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        said = self.messages.read_text(errors="replace").strip().splitlines()
        return self._one_line(f"its process died with {how}" + (f": {said[-1]}" if said else ""))

    def _one_line(self, text: str) -> str:
        """Short, and with the model's name in place of its path, so that it can be published."""
        if self.path is not None:
            text = text.replace(str(self.path), self.path.name)
        return textwrap.shorten(text, 240, placeholder=" …")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _work() -> None:
    """What a contender's own process does, until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        what = json.loads(sys.stdin.readline())
        with np.load(what["arrays"]) as stored:
            arrays = dict(stored)
        if what["factory"] is None:
            model = _on_onnxruntime(what["path"], what["threads"])
        else:
            module, _, function = what["factory"].partition(":")
            model = getattr(importlib.import_module(module), function)(**what["arguments"])
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(what["threads"])
        answer(seconds=None)
        for line in sys.stdin:
            seconds = []
            for _ in range(json.loads(line)):
                start = time.perf_counter()
                model(arrays)
                seconds.append(time.perf_counter() - start)
            answer(seconds=float(np.median(seconds)) if seconds else None)
    except Exception as error:  # whatever a model raises is the reason why it has no times
        answer(error=f"{type(error).__name__}: {error}")


def _on_onnxruntime(path: str, threads: int) -> Model:
    session = files.session(path, threads=threads)
    if session.get_providers() != ["CPUExecutionProvider"]:
        raise RuntimeError(f"expected the CPU provider alone, found {session.get_providers()}")
    names = [value.name for value in session.get_inputs()]
    return lambda arrays: session.run(None, {n: arrays[n] for n in names if n in arrays})


def profiled(path: str, prefix: str, runs: int, threads: int) -> Model:
    """For `benchmark.profile`: a function that writes a profile of two warm-up runs and `runs`."""
    session = files.session(path, threads=threads, profile_prefix=prefix)
    names = [value.name for value in session.get_inputs()]

    def model(arrays: dict[str, np.ndarray]) -> None:
        for _ in range(2 + runs):
            session.run(None, {n: arrays[n] for n in names if n in arrays})
        session.end_profiling()

    return model


if __name__ == "__main__":
    _work()
