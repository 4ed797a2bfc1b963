"""The layout of helpers/: who may import whom, and what a face hands on."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "helpers"

# From the top of the house down: a name imports those below it, never one above.
ORDER = (
    *("__main__", "bounds", "figures", "benchmark", "contenders", "quantize", "explain", "fuse"),
    *("profiling", "generate", "parity", "view", "feeds", "export", "models", "workers", "files"),
    *("graph", "packages", "errors", "plots", "quiet"),
)


def modules() -> dict[str, Path]:
    """The modules of helpers/ by their dotted names; a face has its package's."""
    found = {}
    for path in HOUSE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of helpers/ that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)


def top(module: str) -> str:
    return module.split(".")[1]


def test_each_name_has_its_place():
    names = {top(module) for module in modules() if module != "helpers"}
    assert names == set(ORDER)


def test_imports_point_down():
    known = modules()
    wrong = [
        f"{module} imports {imported}"
        for module, path in known.items()
        for imported in imports(path, known)
        if "helpers" not in (module, imported)
        and ORDER.index(top(imported)) < ORDER.index(top(module))
    ]
    assert not wrong


def test_no_imports_go_in_a_circle():
    known = modules()
    arrows = {module: {*imports(path, known)} for module, path in known.items()}
    assert [*graphlib.TopologicalSorter(arrows).static_order()]  # raises CycleError


def test_a_face_only_hands_on():
    for path in HOUSE.rglob("__init__.py"):
        docstring, *rest = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), path
        handed = {
            name.name for node in rest if isinstance(node, ast.ImportFrom) for name in node.names
        }
        listed = {
            name
            for node in rest
            if isinstance(node, ast.Assign)
            for name in ast.literal_eval(node.value)
        }
        assert handed == listed, path
        assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in rest), path


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("export", "figures")])
def test_importing_it_imports_neither_torch_nor_matplotlib(name):
    code = f"import sys, helpers.{name}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {"torch", "matplotlib", "transformers", "pandas"}.isdisjoint(loaded.stdout.split())


def test_the_readme_has_them_in_that_order():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("```\n__main__ ")[2].partition("```")[0]
    lines = [f"__main__ {tree}".splitlines()[0], *tree.splitlines()[1:]]
    names = [line.split()[0].rstrip("/") for line in lines if not line.startswith(" ")]
    assert names == list(ORDER)
