"""A contender of a benchmark in a process of its own, which runs when it is asked to."""

import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAMPLED = 0.02  # seconds between two looks at a contender's memory
TOLD = ("operators", "precision", "handed_back")  # attributes that a model may have: `runtimes`


class Failed(Exception):
    """Why a contender gave no answer, in one line."""


class Worker:
    """A contender's own process, started at once; it answers in the order in which it is asked.

    JSON lines go in and out: first what to load, then ``{"arrays": FILE.npz}`` (`give`; it runs
    once, keeps the outputs and tells the `TOLD` attributes of the model) or ``{"runs": N}`` (it
    tells the median of their seconds). It ends by itself with its standard input. `folder` is its
    own; `path` is the model's file, whose folder is left out of what it says. `peak` is the most
    memory, in bytes, that it was seen to have while it was asked something; NaN where the system
    does not tell.
    """

    def __init__(
        self,
        factory: str,
        arguments: Mapping[str, Any],
        threads: int,
        timeout: float,
        folder: Path,
        path: Path | None = None,
    ):
        folder.mkdir()
        self.path, self.timeout, self.folder, self.hung = path, timeout, folder, False
        self.messages, self.peak = folder / "stderr.txt", math.nan
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # can import what we can
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait do not spin
        }
        what = {"factory": factory, "arguments": dict(arguments)}
        what["outputs"] = str(folder / "outputs.npz")
        line = json.dumps(what)  # raises on arguments it cannot carry, before anything is started
        with self.messages.open("wb") as messages:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "helpers.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                bufsize=0,
                env=environment,
            )
        self._write(line)

    def _write(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died; `receive` tells
            self.process.stdin.write(f"{line}\n".encode())

    def send(self, **message: Any) -> None:
        self._write(json.dumps(message))

    def give(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Have it run once on `arrays`, the model's inputs by name, which later runs take too."""
        np.savez(self.folder / "arrays.npz", **arrays)
        self.send(arrays=str(self.folder / "arrays.npz"))

    def receive(self) -> dict[str, Any]:
        """The next answer; raises `Failed` where there is none."""
        answered = threading.Event()
        watch = threading.Thread(target=self._watch, args=(answered,), daemon=True)
        watch.start()
        try:
            line = self.process.stdout.readline()
        finally:
            answered.set()
            watch.join()
        if not line:
            raise Failed(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(self._one_line(answer["error"]))
        return answer

    def outputs(self) -> dict[str, np.ndarray]:
        """What the model gave for the inputs that it was last sent, by name."""
        with np.load(self.folder / "outputs.npz") as stored:
            return dict(stored)

    def _watch(self, answered: threading.Event) -> None:
        """Note how much memory it has, until it has `answered`; end it if that takes too long."""
        end = time.monotonic() + self.timeout
        while True:
            self.peak = np.fmax(self.peak, memory(self.process.pid))
            if answered.wait(SAMPLED):
                break
            if time.monotonic() > end:
                self.hung = True
                self.process.kill()
                break

    def _death(self) -> str:
        status = self.process.wait()
        if self.hung:
            return f"no answer within {self.timeout:g} s"
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        message_lines = self.messages.read_text(errors="replace").strip().splitlines()
        return self._one_line(
            f"its process died with {how}" + (f": {message_lines[-1]}" if message_lines else "")
        )

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


def memory(pid: int) -> float:
    """Bytes of memory that a process has; on Windows, the most that it has had. NaN: not told."""
    try:
        import psutil
    except ImportError:  # it needs modules of the system's
        return math.nan
    with contextlib.suppress(psutil.Error):  # it has ended
        memory_info = psutil.Process(pid).memory_info()
        return getattr(memory_info, "peak_wset", memory_info.rss)
    return math.nan


def work() -> None:
    """What a contender's own process does, until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        what = json.loads(sys.stdin.readline())
        module, _, function = what["factory"].partition(":")
        model = getattr(importlib.import_module(module), function)(**what["arguments"])
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        answer()
        for line in sys.stdin:
            asked = json.loads(line)
            if "arrays" in asked:
                with np.load(asked["arrays"]) as stored:
                    arrays = dict(stored)
                np.savez(what["outputs"], **(model(arrays) or {}))
                answer(**{name: getattr(model, name, None) for name in TOLD})
                continue
            seconds = []
            for _ in range(asked["runs"]):
                start = time.perf_counter()
                model(arrays)
                seconds.append(time.perf_counter() - start)
            answer(seconds=float(np.median(seconds)))
    except Exception as error:  # whatever a model raises is the reason why it has no times
        answer(error=f"{type(error).__name__}: {error}")
