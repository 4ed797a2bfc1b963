"""What is installed: a package that is missing, or of another version than the pinned one."""

import contextlib
import sys
from importlib import metadata

from helpers.errors import BadInput

# What the graphs, and so the results that are described, depend on: as in requirements.txt, which
# is not there where the package is installed.
PINNED = {"onnxruntime": "1.32.0", "onnxscript": "0.7.2", "transformers": "5.23.0"}
CALLED = {"IPython": "ipython"}  # packages that are installed by another name


def unlike_pinned() -> str:
    """One line on installed packages that are not of the pinned version; empty if all are."""
    installed = {}
    for name in PINNED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)  # None where its record cannot be read
            if version and version.partition("+")[0] != PINNED[name]:  # the rest is the build's
                installed[name] = version
    if not installed:
        return ""
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    wanted = ", ".join(f"{name} {PINNED[name]}" for name in installed)
    install = " ".join(f"{name}=={PINNED[name]}" for name in installed)
    return f"{listed}: expected {wanted}, results may differ; to have them: pip install {install}"


def missing(error: ModuleNotFoundError, task: object, otherwise: str = "") -> BadInput:
    """What to install for `task`, or what to do `otherwise`, given what an import raised."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "helpers") or name in sys.stdlib_module_names:  # not to be installed
        return BadInput(f"{task}: expected a Python that has all modules, found: {error}")
    package = CALLED.get(name, name)
    return BadInput(
        f"{task}: expected the package {package}, found that it is not installed;"
        f" pip install {package}{otherwise}"
    )
