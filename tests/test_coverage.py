"""Every site of every architecture, by every route: a sample each time, all with ``-m every``."""

import csv
from pathlib import Path

import onnx
import pytest
from graphs import write

from helpers import fuse, graph
from helpers.figures.fused_sites import coverage, table
from helpers.models.small import ARCHITECTURES
from helpers.quiet import quiet

ROOT = Path(__file__).parent.parent
SAMPLE = [
    ("MPNet", "TorchScript, eager"),
    ("DeBERTa-v2", "dynamo"),
    ("WavLM", "opset 23"),
    ("BERT", "TorchScript, SDPA"),
    ("ModernBERT", "opset 23"),
    ("T5", "dynamo"),
    ("Qwen3", "TorchScript, SDPA"),
]
ALL = [(name, route) for name in ARCHITECTURES for route in coverage.ROUTES]


def check(architecture: str, route: str, folder: Path) -> None:
    small, (way, attention) = ARCHITECTURES[architecture], coverage.ROUTES[route]
    path = folder / "in.onnx"
    with quiet():
        coverage.export.export(small.make(attention), small.inputs(), path, way)
    for target in fuse.FUSING:
        done = fuse.fuse(path, folder / f"{target}.onnx", target=target)
        assert done.held, str(done)
        assert (done.sites, done.fused, done.left) == (small.sites, small.sites, [])
        made = graph.load(folder / f"{target}.onnx")
        assert [site.fused for site in graph.sites(made)] == [True] * small.sites
        assert target == "cpu" or {*made.opset_imports} == {""}


@pytest.mark.parametrize(("architecture", "route"), SAMPLE)
def test_every_site_is_fused(architecture, route, tmp_path):
    check(architecture, route, tmp_path)


@pytest.mark.every
@pytest.mark.parametrize(("architecture", "route"), ALL)
def test_every_site_of_all_is_fused(architecture, route, tmp_path):
    check(architecture, route, tmp_path)


def test_a_wrong_result_counts_nothing(tmp_path):
    """A graph that fuses and computes something else; one that does not load; one that is right."""
    path, wrong, broken = write(tmp_path / "a.onnx"), tmp_path / "b.onnx", tmp_path / "c.onnx"
    right = tmp_path / "d.onnx"
    assert fuse.fuse(path, right).held
    proto = onnx.load(right)
    node = next(node for node in proto.graph.node if node.op_type == "Attention")
    next(one for one in node.attribute if one.name == "scale").f *= 3
    onnx.save(proto, wrong)
    broken.write_bytes(right.read_bytes()[:-9])
    assert coverage.judge(path, right) == (1, "", "")
    assert coverage.judge(path, wrong)[:2] == (0, coverage.WRONG)
    assert coverage.judge(path, broken)[:2] == (0, coverage.FAILED)


def test_the_table_is_that_of_the_results(monkeypatch, tmp_path):
    """The table of results and the picture are made of the csv, which has every cell."""
    results = table.read()
    cells = {(one.architecture, one.route, one.fuser) for one in results}
    assert len(results) == len(cells) == len(ALL) * len(coverage.FUSERS)
    page = (ROOT / "assets" / "results.md").read_text(encoding="utf-8")
    assert table.markdown(results) in page
    monkeypatch.setattr(table, "PICTURE", tmp_path / "again.svg")
    table.draw(results)
    committed = (ROOT / "assets" / "fused_sites.svg").read_bytes()
    assert (tmp_path / "again.svg").read_bytes() == committed
    with table.CSV.open(newline="", encoding="utf-8") as file:
        ours = [row for row in csv.DictReader(file) if row["fuser"] == "helpers.fuse"]
    assert all(row["fused"] == row["sites"] for row in ours if row["mark"] != coverage.NONE)
