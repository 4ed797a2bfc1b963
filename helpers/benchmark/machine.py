"""The machine that a benchmark ran on: its processor, instruction sets, memory and packages."""

import contextlib
import importlib.metadata
import os
import sys

from helpers.workers import processor as cpu
from helpers.workers.worker import memory

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxscript", "openvino", "nncf")
NOT_EVERYWHERE = ("onnxruntime-ep-openvino",)  # packages that some systems have no build of


def conditions(threads: int) -> str:
    """Processor, instruction sets, cores, threads and versions, in a line that names no machine."""
    versions = []
    for name in (*PACKAGES, *NOT_EVERYWHERE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    threaded = f"{os.cpu_count()} cores, {threads} threads that do not spin"
    return f"{cpu_in_words()}, {threaded}; {', '.join(versions)}"


def cpu_in_words() -> str:
    """The processor with its instruction sets: "Intel(R) Xeon(R) (AVX2, AVX-512, VNNI)"."""
    return f"{processor()} ({instruction_sets()})"


def processor() -> str:
    """The processor's name, as far as the system tells."""
    return cpu.name()


def instruction_sets() -> str:
    """Those that decide how fast products are in which precision: "AVX2, AVX-512, VNNI"."""
    found = cpu.instruction_sets()
    if found is None:
        return "instruction sets not told"
    return ", ".join(found) or f"none of {', '.join(cpu.INSTRUCTION_SETS)}"


def peak_memory() -> float:
    """GiB of memory that this process has had at the most, without those that it started."""
    try:
        import resource
    except ImportError:  # as on Windows
        return memory(os.getpid()) / 2**30
    bytes_each = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_each / 2**30
