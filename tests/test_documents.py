"""The notebooks as documents, and the README's table."""

import collections
import re
import subprocess
import tomllib
from pathlib import Path

import nbclient
import nbformat
import pandas as pd
import pytest

from helpers import files
from helpers.__main__ import main
from helpers.explain.reasons import CAUSES
from helpers.figures import notebooks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECTIONS = [
    *("Export", "Inspect", "Why it did not fuse", "Fix", "Parity", "Benchmark", "Summary"),
]
OPENING = ("What you will learn", "Before you start", "It takes")
# What differs from machine to machine or from run to run, and what a page cannot show.
FORBIDDEN = {
    "an absolute path": r"(?<![\w.:/])/(home|root|tmp|usr|work|Users|opt|var|mnt)/",
    "an object's address": r"\bat 0x[0-9a-f]{6,}",
    "a timestamp": r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d",
    "a warning": r"\b\w*Warning\b",
}
# Seconds of a run: two minutes, and five of the first, on a quick machine of 2 cores; on a slow one
# the same run has taken two thirds more.
BUDGET = collections.defaultdict(lambda: 200, wav2vec2=500)
LARGEST = 10 * 2**30  # bytes of memory
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TAKES = r"(?P<minutes>\w+) minutes? on 2 cores, and less than (?P<gibibytes>\d+) GiB of memory"
PLUMBING = r"^\s*(!|%(?!matplotlib inline))|sys\.path|pip install"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def text_of(output: nbformat.NotebookNode) -> str:
    data = output.get("data", {})
    return output.get("text", "") + data.get("text/plain", "") + data.get("text/html", "")


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_notebooks():
    assert NOTEBOOKS
    assert all(re.fullmatch(r"\d\d_\w+", path.stem) for path in NOTEBOOKS)


def test_committed_with_the_outputs_of_a_full_run_in_order(notebook):
    nbformat.validate(notebook)
    run = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "skip-execution" not in cell.metadata.get("tags", [])
    ]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    assert not any("execution" in cell.metadata for cell in notebook.cells)


def test_outputs_are_free_of_what_changes_or_breaks(notebook):
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not any("widget" in kind for kind in output.get("data", {}))
        for what, pattern in FORBIDDEN.items():
            found = re.search(pattern, text_of(output))
            assert not found, f"{what}: {found}"


def test_small_enough_to_render():
    for path in NOTEBOOKS:
        assert path.stat().st_size < 400_000, path


def committed(*patterns: str) -> list[Path]:
    """The files that are in the repository: all, or those that match."""
    command = ["git", "ls-files", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_the_repository_holds_no_model():
    """What tools write beside their work is not committed by mistake."""
    paths = committed()
    assert not [path for path in paths if path.suffix in (".onnx", ".data")]
    assert max(path.stat().st_size for path in paths if path.is_file()) < 500_000


def test_fixed_sections_and_opening(notebook):
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    if "start here" not in prose[0].lower():  # which is no model's
        assert re.findall(r"^## (.+)$", "\n".join(prose), re.M) == SECTIONS
    assert prose[0].startswith("# ")
    for part in OPENING:
        assert f"**{part}" in prose[0]


def test_cells_are_short_and_plain(notebook):
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert len(cell.source.splitlines()) <= 12, cell.source
        assert not re.search(PLUMBING, cell.source, re.M), cell.source


def test_the_failure_comes_first(notebook):
    """The first cell that a page shows is the call that a reader would make, and its 0."""
    if "model" in tags(notebook):
        return  # 00 writes its model first
    shown = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first = next(cell for cell in shown if "hide-input" not in cell.metadata.get("tags", []))
    assert re.search(r"optimizer\.optimize_model|optimize_model\(", first.source)
    assert re.search(r": 0\b", text_of(first.outputs[-1]))


def tags(notebook) -> set[str]:
    return {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}


def test_runs_within_its_budget_and_says_so(notebook):
    """`python -m helpers run --in-place` writes what a run took into the metadata."""
    run = notebook.metadata["run"]
    assert set(run) == {"seconds", "memory", "processor"}
    assert 0 < run["seconds"] <= BUDGET[notebook.cells[0].source.split(":")[0].lstrip("# ")]
    assert 2**20 < run["memory"] <= LARGEST
    assert re.search(r"\w", run["processor"])
    said = re.search(TAKES, notebook.cells[0].source)
    seconds = 60 * NUMBERS.index(said["minutes"])
    assert run["seconds"] <= seconds <= max(3 * run["seconds"], 60)
    assert run["memory"] <= int(said["gibibytes"]) * 2**30


def page(path: Path, *sources: str) -> bytes:
    """Write a notebook with these cells of code to `path`; returns the file."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path.read_bytes()


def test_a_run_is_written_with_what_it_took(tmp_path):
    path = tmp_path / "00_page.ipynb"
    child = (
        "import subprocess, sys\ncode = 'x = bytearray(3 * 10**8); import time; time.sleep(1.5)'"
    )
    page(path, child, "print(subprocess.run([sys.executable, '-c', code]).returncode)")
    took = notebooks.run(path)
    ran = nbformat.read(path, as_version=4)
    assert ran.metadata["run"] == took
    assert 1 <= took["seconds"] < 120
    assert 3e8 < took["memory"] < 3e9  # that of the process which the kernel started is counted
    assert [cell.execution_count for cell in ran.cells] == [1, 2]
    assert ran.cells[1].outputs[0].text == "0\n"
    assert not any("execution" in cell.metadata for cell in ran.cells)


def test_a_result_becomes_its_row(tmp_path):
    table = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        other = re.sub(rf"^(\| \[{path.stem}\].+ \| ).+( \|)$", r"\1old\2", text, flags=re.M)
        assert other != text
        table.write_text(other, encoding="utf-8")
        notebooks.put_result(path, table)
        row = f"| [{path.stem}](notebooks/{path.stem}.ipynb) |"
        [line] = [line for line in table.read_text("utf-8").splitlines() if line.startswith(row)]
        assert line.endswith(f" | {notebooks.result(path)} |")
    table.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="expected one row for"):
        notebooks.put_result(path, table)


def test_a_notebook_that_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "00_page.ipynb"
    before = page(path, "1 / 0")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        notebooks.run(path)
    assert path.read_bytes() == before


def test_a_reader_runs_a_copy(tmp_path, monkeypatch, capsys):
    """It is left in exports/, with its result and progress told, and the notebook stays."""
    path, out = tmp_path / "notebooks" / "00_page.ipynb", tmp_path / "exports"
    for folder in (path.parent, out):
        folder.mkdir()
    monkeypatch.setattr(notebooks, "FOLDER", path.parent)
    monkeypatch.setattr(notebooks, "EXPORTS", out)
    title = nbformat.v4.new_markdown_cell("# A page\n\nof text")
    last = nbformat.v4.new_code_cell("print('all is well')", metadata={"tags": ["result"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[title, last]), path)
    before = path.read_bytes()
    assert main(["run", "00"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{out / path.name}: ")
    assert told.out.endswith("\nall is well\n")
    assert told.err == "00_page: A page (cell 1 of 2) …\n"
    assert path.read_bytes() == before
    assert notebooks.result(out / path.name) == "all is well"
    page(path, "1 / 0")
    assert main(["run"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"{path}: expected each cell to run, found ZeroDivisionError: division by zero; open it in"
        " JupyterLab and run it up to there"
    ]
    path.unlink()
    assert main(["run", "00"]) == 2
    assert "expected notebooks, found none" in capsys.readouterr().err


def test_notebooks_are_chosen_by_how_their_names_begin():
    assert notebooks.chosen([]) == NOTEBOOKS
    assert notebooks.chosen(["03", "01_w"]) == [NOTEBOOKS[1], NOTEBOOKS[3]]
    with pytest.raises(files.BadInput, match="xx: expected the beginning of one of 00_start_here"):
        notebooks.chosen(["xx"])


def test_pictures_have_alt_text(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert "![](" not in cell.source
            assert not re.search(r"<img(?![^>]*\balt=)", cell.source)


def test_readme_table_has_each_notebook_with_its_result():
    rows = re.findall(
        r"^\| \[(\w+)\]\(notebooks/(\w+)\.ipynb\) \| .+? \| (.+) \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert rows == [(path.stem, path.stem, notebooks.result(path)) for path in NOTEBOOKS]


def test_readme_has_the_explanation_of_the_notebook():
    """What the README shows of `explain` is what a notebook printed."""
    (cell,) = [
        cell
        for path in NOTEBOOKS
        for cell in nbformat.read(path, as_version=4).cells
        if "explanation" in cell.metadata.get("tags", [])
    ]
    shown = re.findall(r"```text\n(.+?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert [one.strip() for one in shown] == [cell.outputs[-1].text.strip()]


def test_readme_has_each_cause():
    rows = [f"| `{name}` | {told} |" for name, told in CAUSES.items()]
    page = (ROOT / "helpers" / "README.md").read_text("utf-8")
    assert "\n".join(["| --- | --- |", *rows, ""]) in page


def test_sentence_pairs_are_as_their_note_says():
    pairs = pd.read_csv(ROOT / "assets" / "sentence_pairs.csv")
    assert len(pairs) >= 200
    assert not pairs.duplicated(["first", "second"]).any()
    assert ((pairs["similarity"] >= 4) == (pairs["paraphrase"] == 1)).all()
    assert set(pairs["similarity"]) == set(range(6))
    assert not (pairs["first"] == pairs["second"]).any()


@pytest.mark.parametrize("name", ["README.md", "helpers/README.md", "assets/results.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_readme_installs_as_ci_does_with_any_python_and_on_windows():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    ran = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.+?)```", page.partition("\n## Notebooks")[0], re.S)
    installs = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/"
    first, tests = (block.strip() for block in blocks if block.startswith(installs))
    assert 'python3 -m venv "$venv"' in ran
    assert first == f"{installs}python -m helpers run 00"
    assert tests == f"{installs}pytest --nbmake"
    tests, notebooks = ran.strip().splitlines()[-2:]  # one run of them all, in two parts
    assert tests == '"$venv/bin/pytest" tests -n 2'
    assert notebooks == '"$venv/bin/pytest" --nbmake notebooks'
    [windows] = re.findall(r"```powershell\n(.+?)```", page, re.S)
    assert r".venv\Scripts\pip install -r requirements.txt" in windows


def test_requirements_are_pinned_and_used():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "-e ."
    for line in lines[:-1]:
        if not line.startswith("#"):
            assert re.match(r"(netron>=|[\w-]+==)[\d.]+(; [^#]+)?\s+# \w", line), line


def test_every_notebook_is_run_by_the_tests():
    """Each that is in the repository lies where pytest looks."""
    assert set(committed("*.ipynb")) == set(NOTEBOOKS)
    with (ROOT / "pyproject.toml").open("rb") as file:
        options = tomllib.load(file)["tool"]["pytest"]["ini_options"]
    assert {path.parent.name for path in NOTEBOOKS} <= {*options["testpaths"]}
