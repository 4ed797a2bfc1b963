"""Other machines: without modules that Windows lacks, and with the packages of the shell alone."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import types
import venv
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from graphs import write
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_main import EXPLAIN

from helpers import files, packages
from helpers.__main__ import main
from helpers.benchmark import machine
from helpers.explain import chosen
from helpers.workers import processor

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    one.name: one.specifier
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if re.match(r"\w", line)
    for one in [Requirement(line.partition("#")[0])]
}
POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog")
BENCHMARK = """
import sys
import numpy as np
from helpers import benchmark, contenders
two = [contenders.onnx(path, path) for path in sys.argv[1:]]
arrays = {"given": np.ones((2, 3, 8), np.float32)}
found = benchmark.run(two, {"here": arrays}, rounds=2, threads=1, progress=False)["here"]
assert not found.reasons, found.reasons
assert [len(one.seconds) for one in found.measured.values()] == [2, 2]
assert benchmark.peak_memory() > 0 or "resource" not in sys.modules
print(found.describe())
"""


class Python:
    """A Python to run commands with, in a folder."""

    def __init__(self, program: Path | str, folder: Path, **environment: str):
        self.program, self.folder = str(program), folder
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment

    def __call__(self, *arguments: object, status: int = 0) -> subprocess.CompletedProcess:
        command = [self.program, *map(str, arguments)]
        ended = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, timeout=120
        )
        ended.stdout = ended.stdout.decode("utf-8", "replace")
        ended.stderr = ended.stderr.decode("utf-8", "replace")
        assert ended.returncode == status, f"{arguments}: {ended.stdout}{ended.stderr}"
        return ended

    def json(self, *arguments: object) -> dict:
        return json.loads(self("-m", "helpers", *arguments, "--json").stdout)

    def refused(self, *arguments: object) -> str:
        ended = self("-m", "helpers", *arguments, status=2)
        assert ended.stdout == ""
        assert ended.stderr.count("\n") == 1, ended.stderr
        return ended.stderr


# ── Modules that are POSIX alone ────────────────────────────────────────────────────────────────

BLOCKED = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {POSIX[:5]}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
for name in {POSIX[:5]}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def elsewhere(tmp_path) -> Python:
    """This Python, without the modules that Windows lacks."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKED, encoding="utf-8")
    return Python(sys.executable, ROOT, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")


def test_everything_runs_without_modules_that_windows_lacks(elsewhere, tmp_path):
    with pytest.raises(AssertionError, match="No module named 'fcntl'"):
        elsewhere("-c", "import fcntl")
    model, fused = write(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    assert elsewhere.json("inspect", model)["nodes"] == 22
    assert elsewhere.json("fuse", model, fused)["fused"] == 1
    assert elsewhere.json("compare", model, fused)["parity"]["inputs"].startswith("inferred")
    bart = ("--model-type", "bart", "--num-heads", "2", "--hidden-size", "8")
    assert elsewhere.json("explain", model, *bart)["reasons"][0]["cause"] == "extra_node"
    assert elsewhere.json("explain", model, "--rules", "onnxscript")["sites"]
    assert "missing" in elsewhere.refused("inspect", tmp_path / "missing.onnx")
    assert "Speed-up over" in elsewhere("-c", BENCHMARK, model, fused).stdout
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "blocked"]


def sources() -> dict[str, str]:
    """The code of helpers/ and of the notebooks' cells."""
    found = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in (ROOT / "helpers").rglob("*.py")
    }
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                found[f"{path.name}, cell {number}"] = re.sub(r"^%.*$", "", cell.source, flags=re.M)
    return found


def test_what_is_posix_alone_is_asked_for_where_it_is_used():
    """Not when a module is imported; and nothing reads /proc."""
    for name, text in sources().items():
        assert "/proc" not in text, name
        for node in ast.parse(text).body:
            named = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {one.partition(".")[0] for one in named} & {*POSIX}, name


@pytest.mark.skipif(os.name == "nt", reason="2026-11-25: a folder called C: is a drive there")
def test_a_path_with_a_drive_letter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:").mkdir()
    (tmp_path / "C:" / "mine.py").write_text("class Mine: pass", encoding="utf-8")
    assert chosen.loaded("C:/mine.py:Mine").__name__ == "Mine"
    with pytest.raises(files.BadInput, match=r"^C:/mine\.py: .* found no class; add :CLASS"):
        chosen.loaded("C:/mine.py")
    with pytest.raises(files.BadInput, match=r"found no file C:\\mine\.py"):
        chosen.loaded(r"C:\mine.py:Mine")


def test_a_stream_that_lacks_signs(tmp_path):
    """As of Windows' code pages."""
    model = write(tmp_path / "a.onnx")
    ascii_ = Python(sys.executable, ROOT, PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT))
    text = ascii_("-m", "helpers", "explain", model, *EXPLAIN).stdout
    assert r"input 0    MatMul       \u2717 the graph has Mul" in text


# ── Processors ──────────────────────────────────────────────────────────────────────────────────

LSCPU = """Architecture:            x86_64
Model name:              Some(R) Processor
Flags:                   fpu sse2 {flags}
"""
SYSCTL = "machdep.cpu.brand_string: Apple M2\nhw.optional.{flag}: 1\nhw.optional.avx2_0: 0\n"


@pytest.mark.parametrize(
    ("platform", "told", "expected"),
    [
        (
            "linux",
            LSCPU.format(flags="avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"),
            "Some(R) Processor (AVX2, AVX-512, VNNI, bf16, AMX), ",
        ),
        ("linux", LSCPU.format(flags="avx2 avx_vnni"), "Some(R) Processor (AVX2, VNNI), "),
        (
            "linux",
            LSCPU.format(flags="avx"),
            "(none of AVX2, AVX-512, VNNI, bf16, AMX, int8 products), ",
        ),
        ("linux", LSCPU.format(flags="asimd i8mm bf16"), "(bf16, int8 products), "),
        ("linux", "", "(instruction sets not told), "),
        ("darwin", SYSCTL.format(flag="arm.FEAT_BF16"), "Apple M2 (bf16), "),
        ("darwin", SYSCTL.format(flag="avx512f"), "Apple M2 (AVX-512), "),
        ("win32", "never asked", "(instruction sets not told), "),
    ],
)
def test_the_caption_names_the_instruction_sets(platform, told, expected, monkeypatch):
    def run(command, **_) -> types.SimpleNamespace:
        assert command[0] == {"linux": "lscpu", "darwin": "sysctl"}[platform]
        return types.SimpleNamespace(stdout=told)

    monkeypatch.setattr(processor.sys, "platform", platform)
    monkeypatch.setattr(processor.subprocess, "run", run)
    monkeypatch.setattr(processor.platform, "processor", lambda: "x86_64")
    assert expected in machine.conditions(2)


def test_without_the_command_that_tells_of_the_processor(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.instruction_sets() == "instruction sets not told"
    assert machine.processor()


# ── What is installed ───────────────────────────────────────────────────────────────────────────


def test_the_pinned_versions_are_those_of_requirements():
    assert {name: str(PINS[name])[2:] for name in packages.PINNED} == packages.PINNED


def test_a_line_says_what_is_not_the_pinned_version(tmp_path, monkeypatch, capsys):
    model = write(tmp_path / "a.onnx")

    def version(name: str) -> str:
        if name == "transformers":
            raise metadata.PackageNotFoundError(name)
        return {"onnxruntime": "1.31.1"}.get(name, f"{packages.PINNED[name]}+cpu")

    monkeypatch.setattr(packages.metadata, "version", version)
    assert main(["inspect", str(model), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["nodes"] == 22
    assert told.err == (
        "onnxruntime 1.31.1: expected onnxruntime 1.32.0, results may differ; to have them:"
        " pip install onnxruntime==1.32.0\n"
    )


def test_what_the_shell_needs_is_named_with_the_oldest_version_and_a_reason():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for text in PROJECT["dependencies"]:
        one = Requirement(text)
        assert re.search(rf'"{re.escape(text)}",\s+# \w', lines), text
        assert [specifier.operator for specifier in one.specifier] == [">="]
    extras = PROJECT["optional-dependencies"].values()
    for text in itertools.chain(PROJECT["dependencies"], *extras):
        one = Requirement(text)
        for pin in PINS.get(one.name, ()):
            assert pin.version in one.specifier, text
        assert one.name in PINS or one.name == PROJECT["name"], text


def needed() -> dict[str, metadata.Distribution]:
    """The installed distributions that the command line needs, theirs included."""
    found: dict[str, metadata.Distribution] = {}
    queue = [Requirement(one) for one in PROJECT["dependencies"]]
    while queue:
        one = queue.pop()
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found[name] = metadata.distribution(name)
        queue += map(Requirement, found[name].requires or ())
    return found


@pytest.fixture(scope="session")
def light(tmp_path_factory) -> Python:
    """A fresh environment with what ``pip install .`` puts there alone."""
    folder = tmp_path_factory.mktemp("light")
    builder = venv.EnvBuilder(symlinks=os.name != "nt")
    builder.create(folder / "venv")
    program = builder.ensure_directories(folder / "venv").env_exe
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "venv")}))
    for distribution in needed().values():
        for file in distribution.files:
            if ".." not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(file.locate(), target)
                except OSError:  # another disk
                    shutil.copy2(file.locate(), target)
    shutil.copytree(ROOT / "helpers", site / "helpers", ignore=shutil.ignore_patterns("*.pyc"))
    return Python(program, folder, PYTHONPATH="")


def test_the_shell_needs_no_more_than_its_packages(light, tmp_path):
    for absent in ("torch", "transformers", "matplotlib", "pandas", "netron"):
        light("-c", f"import {absent}", status=1)
    model, fused = write(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    ended = light("-m", "helpers", "inspect", model)
    assert "1 attention site, 0 fused" in ended.stdout
    assert ended.stderr == ""
    for target in ("portable", "cpu"):
        assert light.json("fuse", model, fused, "--target", target)["fused"] == 1
    assert light.json("compare", model, fused)["parity"]["max_abs_diff"] < 1e-5
    assert len(light.json("explain", model, "--rules", "onnxscript")["sites"]) == 1
    assert light.json("explain", model, *EXPLAIN, "--parity")["reasons"][0]["cause"] == "extra_node"
    assert light.json("view", model, "--around", "n_softmax")
    assert "Speed-up over" in light("-c", BENCHMARK, model, fused).stdout


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["explain", *EXPLAIN[:-2]], "torch"),
        (["explain", *EXPLAIN[:-1], "1"], "torch"),
        (["view"], "netron"),
        (["view", "--save", "a.svg", "--chromium", sys.executable], "playwright"),
    ],
)
def test_what_needs_more_says_so_in_one_line(command, package, light, tmp_path):
    model = write(tmp_path / "a.onnx")
    line = light.refused(command[0], model, *command[1:])
    wanted = f"{model}: expected the package {package}, found that it is not installed;"
    assert f"{wanted} pip install {package}" in line


def test_a_rule_of_ones_own_that_needs_more_says_so(light, tmp_path):
    model, rule = write(tmp_path / "a.onnx"), tmp_path / "mine.py"
    rule.write_text("import torch.nn\nclass Mine: pass\n", encoding="utf-8")
    for option in ("--fusion", "--rules"):
        line = light.refused("explain", model, option, f"{rule}:Mine")
        assert (
            f"{rule}: expected a module that can be imported, found that it imports torch" in line
        )


def test_the_program_of_the_package(light):
    [(name, value)] = PROJECT["scripts"].items()
    code = (
        "import sys\nfrom importlib.metadata import EntryPoint\n"
        f"sys.exit(EntryPoint({name!r}, {value!r}, 'console_scripts').load()())"
    )
    assert light("-c", code, "inspect", "--help").stdout.startswith(f"usage: {name} inspect ")
    told = light("-c", code, "inspekt", status=2).stderr
    assert told.startswith(f"{name}: ")
    assert told.endswith(f"see {name} --help\n")


def test_what_no_package_gives_is_not_to_be_installed():
    for name in ("resource", "helpers.none"):
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        assert "pip install" not in str(packages.missing(error, "a.onnx"))
    error = ModuleNotFoundError("No module named 'IPython.display'", name="IPython.display")
    assert str(packages.missing(error, "view.show")).endswith("pip install ipython")
