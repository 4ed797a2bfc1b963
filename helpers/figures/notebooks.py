"""Run the notebooks in place: ``python -m helpers.figures.notebooks [01 02 …]``.

All of them, or those whose names begin so, one after the other and offline. Each is written with
its outputs when it has run to its end, and into its metadata, as ``run``, what that took:
``seconds``, from the start of the kernel to its end, ``memory``, the most that the kernel and the
processes that it started had at one time, in bytes, and the ``processor``.

What its cell tagged ``result`` prints becomes its row of the README's table.

Memory is RSS, added up: pages that processes share count for each of them, so it is an upper bound.
"""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import psutil

from helpers import benchmark, files

FOLDER = Path(__file__).parents[2] / "notebooks"
SAMPLED = 0.2  # seconds between two looks at the memory


class Peak:
    """The most memory that the processes started from here have had together, while in its context.

    `bytes` is that of RSS, added up over children of children as well.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.ended = threading.Event()
        self.watch = threading.Thread(target=self.sample, daemon=True)

    def __enter__(self) -> "Peak":
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.watch.join()

    def sample(self) -> None:
        while not self.ended.wait(SAMPLED):
            children = psutil.Process().children(recursive=True)
            self.bytes = max(self.bytes, sum(map(resident, children)))


def resident(process: psutil.Process) -> int:
    """RSS of a process in bytes; 0 where it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def run(path: Path) -> dict[str, Any]:
    """Run the notebook at `path` in place, and return what it took, as its metadata has it.

    Raises what nbclient raises where a cell fails; the file stays as it was then.
    """
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    start = time.perf_counter()
    with Peak() as peak:
        client.execute()
    notebook.metadata["run"] = {
        "seconds": round(time.perf_counter() - start),
        "memory": peak.bytes,
        "processor": benchmark.processor(),
    }
    with files.replacing(path) as draft:
        nbformat.write(notebook, draft)
    return dict(notebook.metadata["run"])


def put_result(path: Path, page: Path) -> None:
    """Put what the cell tagged ``result`` of the notebook at `path` printed into its row of the
    table in `page`; raises ValueError where there is no such cell or row."""
    cells = nbformat.read(path, as_version=4).cells
    [result] = [cell for cell in cells if "result" in cell.metadata.get("tags", [])]
    line = result.outputs[-1].text.strip()
    text = page.read_text(encoding="utf-8")
    row = re.compile(rf"^(\| \[{path.stem}\]\([^)]+\) \| [^|]+ \| ).+( \|)$", re.MULTILINE)
    text, rows = row.subn(lambda match: f"{match[1]}{line}{match[2]}", text)
    if rows != 1:
        raise ValueError(f"{page}: expected one row for {path.stem}, found {rows}")
    with files.replacing(page) as draft:
        draft.write_text(text, encoding="utf-8")


def chosen(names: Sequence[str]) -> list[Path]:
    """The notebooks whose names begin with one of `names`, or all; raises `files.BadInput` on a
    name that none begins with."""
    paths = sorted(FOLDER.glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            stems = ", ".join(path.stem for path in paths)
            raise files.BadInput(f"{name}: expected the beginning of one of {stems}")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of notebooks' names")
    names = parser.parse_args(arguments).names
    os.environ["HF_HUB_OFFLINE"] = "1"  # the kernels inherit it
    for path in chosen(names):
        print(f"running {path.stem} …", flush=True)
        took = run(path)
        put_result(path, FOLDER.parent / "README.md")
        print(f"{took['seconds']} s, {took['memory'] / 2**30:.1f} GiB at the most", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (files.BadInput, nbclient.exceptions.CellExecutionError) as error:
        sys.exit(str(error))
