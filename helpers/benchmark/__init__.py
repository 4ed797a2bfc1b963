"""Time contenders fairly: each in a process of its own, by turns, as ratios paired by round."""

from helpers.benchmark.machine import (
    PACKAGES,
    cpu_in_words,
    instruction_sets,
    peak_memory,
    processor,
)
from helpers.benchmark.results import Measured, Result
from helpers.benchmark.timing import run
from helpers.workers.paired import Speedup, speedup

__all__ = [
    "PACKAGES",
    "Measured",
    "Result",
    "Speedup",
    "cpu_in_words",
    "instruction_sets",
    "peak_memory",
    "processor",
    "run",
    "speedup",
]
