"""The processor: its name, and which instruction sets it has, as far as the system tells."""

import contextlib
import os
import platform
import re
import subprocess
import sys

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


def name() -> str:
    """The processor's name, as far as the system tells."""
    pattern = r"^(?:Model name|machdep\.cpu\.brand_string):\s*(.+)$"
    if match := re.search(pattern, _told(), re.MULTILINE):
        return match[1]
    return platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...] | None:
    """Those of `INSTRUCTION_SETS` that the processor has; None where the system does not tell."""
    told = _told()
    flags = re.search(r"^Flags:(.*)$", told, re.MULTILINE)
    named = {*flags[1].split()} if flags else set()
    named |= {
        name.rpartition(".")[2].lower()
        for name in re.findall(r"^hw\.optional\.(\S+): 1$", told, re.MULTILINE)
    }
    if not named:
        return None
    return tuple(name for name, flags in INSTRUCTION_SETS.items() if not flags.isdisjoint(named))


def _told() -> str:
    """What the system's own command tells of the processor; empty where there is none."""
    with contextlib.suppress(OSError, KeyError):
        environment = os.environ | {"LC_ALL": "C"}
        return subprocess.run(
            NAMED_BY[sys.platform], capture_output=True, text=True, env=environment
        ).stdout
    return ""
