"""The machine that a benchmark ran on: its processor, instruction sets, memory and packages."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys

from helpers.workers.worker import memory

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxscript", "openvino", "nncf")
NOT_EVERYWHERE = ("onnxruntime-ep-openvino",)  # packages that some systems have no build of

# By platform, what prints the processor's name and what it can do, which ``platform`` does not:
# ``Flags: fpu … avx2 …`` of lscpu, and ``hw.optional.avx2_0: 1`` of sysctl.
NAMED_BY = {
    "linux": ("lscpu",),
    "darwin": ("sysctl", "machdep.cpu.brand_string", "hw.optional"),
}
# What decides how fast products are in which precision, with the flags that tell of it: of lscpu on
# x86 and on ARM, and the last part of sysctl's names, in small letters.
INSTRUCTION_SETS = {
    "AVX2": {"avx2", "avx2_0"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni", "avx512vnni"},
    "bf16": {"avx512_bf16", "bf16", "feat_bf16"},
    "AMX": {"amx_bf16", "amx_int8"},
    "int8 products": {"i8mm", "feat_i8mm"},
}


def conditions(threads: int) -> str:
    """Processor, instruction sets, cores, threads and versions, in a line that names no machine."""
    versions = []
    for name in (*PACKAGES, *NOT_EVERYWHERE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    threaded = f"{os.cpu_count()} cores, {threads} threads that do not spin"
    return f"{processor()} ({instruction_sets()}), {threaded}; {', '.join(versions)}"


def processor() -> str:
    """The processor's name, as far as the system tells."""
    pattern = r"^(?:Model name|machdep\.cpu\.brand_string):\s*(.+)$"
    if match := re.search(pattern, _told(), re.MULTILINE):
        return match[1]
    return platform.processor() or platform.machine()


def instruction_sets() -> str:
    """Those of `INSTRUCTION_SETS` that the processor has: "AVX2, AVX-512, VNNI, bf16, AMX".

    "instruction sets not told", where the system does not tell.
    """
    told = _told()
    flags = re.search(r"^Flags:(.*)$", told, re.MULTILINE)
    named = {*flags[1].split()} if flags else set()
    named |= {
        name.rpartition(".")[2].lower()
        for name in re.findall(r"^hw\.optional\.(\S+): 1$", told, re.MULTILINE)
    }
    if not named:
        return "instruction sets not told"
    found = [name for name, flags in INSTRUCTION_SETS.items() if not flags.isdisjoint(named)]
    return ", ".join(found) or f"none of {', '.join(INSTRUCTION_SETS)}"


def _told() -> str:
    """What the system's own command tells of the processor; empty where there is none."""
    with contextlib.suppress(OSError, KeyError):
        environment = os.environ | {"LC_ALL": "C"}
        return subprocess.run(
            NAMED_BY[sys.platform], capture_output=True, text=True, env=environment
        ).stdout
    return ""


def peak_memory() -> float:
    """GiB of memory that this process has had at the most, without those that it started."""
    try:
        import resource
    except ImportError:  # as on Windows
        return memory(os.getpid()) / 2**30
    bytes_each = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_each / 2**30
