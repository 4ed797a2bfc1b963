"""The notebooks, run: into exports/ for a reader, or in place to be committed.

Each is written with its outputs when it has run to its end, and into its metadata, as ``run``, what
that took: ``seconds``, from the start of the kernel to its end, ``memory``, the most that the
kernel and the processes that it started had at one time, in bytes, and the ``processor``. In place,
what its cell tagged ``result`` prints becomes its row of the README's table.

Memory is RSS, added up: pages that processes share count for each of them, so it is an upper bound.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import psutil

from helpers import benchmark, files

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[2] / "notebooks"
EXPORTS = FOLDER.parent / "exports"  # where what a reader runs goes; ../assets is found from there
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


def run(path: Path, out: Path | None = None) -> dict[str, Any]:
    """Run the notebook at `path` in its folder, write it with its outputs to `out` (in place,
    unless given), and return what it took, as its metadata has it. Progress is logged.

    Raises what nbclient raises where a cell fails; nothing is written then.
    """
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=_progress(notebook, path.stem),
    )
    start = time.perf_counter()
    with Peak() as peak:
        client.execute()
    notebook.metadata["run"] = {
        "seconds": round(time.perf_counter() - start),
        "memory": peak.bytes,
        "processor": benchmark.processor(),
    }
    with files.replacing(out or path) as draft:
        nbformat.write(notebook, draft)
    return dict(notebook.metadata["run"])


def _progress(notebook: nbformat.NotebookNode, name: str) -> Callable[..., None]:
    """What logs the section that a cell begins."""
    titles = {}  # by the number of a section's first cell
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and (found := re.search(r"^##? (.+)$", cell.source, re.M)):
            titles[number] = found[1]

    def begin(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if title := titles.get(cell_index):
            logger.info(f"{name}: {title} (cell {cell_index + 1} of {len(notebook.cells)}) …")

    return begin


def result(path: Path) -> str:
    """What the cell tagged ``result`` of the executed notebook at `path` printed."""
    cells = nbformat.read(path, as_version=4).cells
    [cell] = [cell for cell in cells if "result" in cell.metadata.get("tags", [])]
    return cell.outputs[-1].text.strip()


def put_result(path: Path, page: Path) -> None:
    """Put what the cell tagged ``result`` of the notebook at `path` printed into its row of the
    table in `page`; raises ValueError where there is no such cell or row."""
    line, text = result(path), page.read_text(encoding="utf-8")
    row = re.compile(rf"^(\| \[{path.stem}\]\([^)]+\) \| [^|]+ \| ).+( \|)$", re.MULTILINE)
    text, rows = row.subn(lambda match: f"{match[1]}{line}{match[2]}", text)
    if rows != 1:
        raise ValueError(f"{page}: expected one row for {path.stem}, found {rows}")
    with files.replacing(page) as draft:
        draft.write_text(text, encoding="utf-8")


def chosen(names: Sequence[str]) -> list[Path]:
    """The notebooks whose names begin with one of `names`, or all; raises `files.BadInput` on a
    name that none begins with, and where there are none, as beside an installed package."""
    paths = sorted(FOLDER.glob("*.ipynb"))
    if not paths:
        raise files.BadInput(f"{FOLDER}: expected notebooks, found none; run it in a clone")
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            stems = ", ".join(path.stem for path in paths)
            raise files.BadInput(f"{name}: expected the beginning of one of {stems}")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def run_all(names: Sequence[str], *, in_place: bool = False) -> list[dict[str, Any]]:
    """Run those that are `chosen`, offline; for each its ``notebook``, the ``result`` that it
    printed, and what it took.

    They are written to exports/, or with `in_place` where they are, and their rows of the README.
    Raises `files.BadInput`, also where a cell fails.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # the kernels inherit it
    done = []
    for path in chosen(names):
        out = path if in_place else EXPORTS / path.name
        try:
            took = run(path, out)
        except nbclient.exceptions.CellExecutionError as error:
            raise files.BadInput(
                f"{path}: expected each cell to run, found {error.ename}: {error.evalue}; open it"
                " in JupyterLab and run it up to there"
            ) from error
        if in_place:
            put_result(path, FOLDER.parent / "README.md")
        done.append({"notebook": str(out), "result": result(out), **took})
    return done
