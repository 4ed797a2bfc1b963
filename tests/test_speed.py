"""The command for speed, on a tiny model: who takes part, the table, and the summary."""

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pandas as pd
import pytest
import tiny_bert

import helpers
from helpers import benchmark, contenders, files, graph
from helpers.figures import cells
from helpers.figures.speed import lineup, measuring
from helpers.figures.speed import models as speed_models
from helpers.figures.speed import table as tables


@pytest.fixture
def tiny(monkeypatch):
    """BERT, tiny."""
    bert = tiny_bert.bert(layers=2)
    monkeypatch.setitem(speed_models.MODELS, "bert", bert)
    return bert


@pytest.fixture(scope="session")
def export_once(tmp_path_factory):
    """In place of `lineup.export_all`: the exports are made once, and each test has copies."""
    first, kept = tmp_path_factory.mktemp("exports"), []
    export_all = lineup.export_all

    def copied(module, tensors, folder):
        if not kept:
            kept.append(export_all(module, tensors, first))
        paths, failed = kept[0]
        assert not failed
        return {key: Path(shutil.copy(path, folder)) for key, path in paths.items()}, {}

    return copied


@pytest.fixture
def exports(monkeypatch, export_once):
    monkeypatch.setattr(lineup, "export_all", export_once)


def stand_in(scale: float = 1.0) -> types.ModuleType:
    """What takes the place of `helpers.fuse`: the same graph, its weights multiplied."""

    def fuse(source: Path, draft: Path, *, target: str) -> types.SimpleNamespace:
        assert target == "cpu"
        model = graph.load(source)
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()
            if array.dtype == np.float32 and array.size > 1:
                value.const_value = ir.tensor(array * np.float32(scale), name=value.name)
        files.save(model, draft)
        return types.SimpleNamespace(held=True)

    module = types.ModuleType("helpers.fuse")
    module.fuse = fuse
    return module


@pytest.fixture
def use(monkeypatch):
    """Puts a module in the place of `helpers.fuse`."""

    def put(module):
        monkeypatch.setitem(sys.modules, "helpers.fuse", module)
        monkeypatch.setattr(helpers, "fuse", module, raising=False)

    return put


def row(model="bert", length=128, batch=1, contender="ours (dynamo, SDPA)", ratio=1.0, **more):
    kind = "ours" if contender.startswith("ours") else "unfused"
    spread = {"low": ratio - 0.01, "high": ratio + 0.01, "rounds": 10, "reason": ""}
    cell = {"model": model, "length": length, "batch": batch}
    return cell | {"contender": contender, "kind": kind, "ratio": ratio} | spread | more


@pytest.mark.usefixtures("tiny", "exports")
def test_the_whole_command(use, tmp_path, capsys):
    use(stand_in())
    path = tmp_path / "speed.csv"
    some = ["--models", "bert", "--rounds", "1", "--batches", "2", "--lengths", "16"]
    measuring.main([*some, "--csv", str(path), "--at-once", "7"])
    table = pd.read_csv(path, keep_default_na=False)
    assert list(table["kind"]) == [
        *("unfused", "unfused", "stock", "onnxscript", "transformers", "opset23", "ours", "ours")
    ]
    assert set(table["reason"]) == {""}
    ratios = table["ratio"].astype(float)
    assert ratios[table["kind"] != "ours"].min() == 1
    said = capsys.readouterr().out
    assert "the faster of ours: geometric mean" in said
    assert "bert, 16 tokens, batch 2" in said
    assert str(tmp_path) not in said + path.read_text("utf-8")
    first = (tmp_path / "speed.svg").read_bytes()
    measuring.main(["--only-show", "--csv", str(path)])
    assert (tmp_path / "speed.svg").read_bytes() == first
    assert b"dc:date" not in first


@pytest.mark.usefixtures("tiny", "exports")
def test_who_is_wrong_takes_no_part(use, tmp_path):
    use(stand_in(scale=1.01))
    those = lineup.prepare(speed_models.MODELS["bert"], [16], tmp_path, ["dynamo"])
    reasons = {one.label: one.reason for one in those if one.reason}
    assert list(reasons) == ["ours (dynamo, SDPA)"]
    assert reasons["ours (dynamo, SDPA)"].startswith("wrong: differs by ")
    [stock] = [one for one in those if one.kind == "stock"]
    assert stock.label == "stock, bert, raw mask (torchscript, eager)"
    assert all(site.fused for site in graph.sites(graph.load(stock.path)))


def test_merging_replaces_the_same_cells_only(tmp_path):
    path = tmp_path / "speed.csv"
    none = row("vit", 224, 1, ratio=np.nan, reason="wrong: nan, it says")
    tables.merge(path, [none, row("bert", 512), row(), row(contender="a"), row(batch=8)])
    before = path.read_text("utf-8")
    table = tables.merge(path, [row(ratio=0.5)])
    pd.testing.assert_frame_equal(table, tables.merge(path, []))
    found = [tuple(one) for one in table[cells.CELL].to_numpy()]
    assert found == [("bert", 128, 1), ("bert", 128, 8), ("bert", 512, 1), ("vit", 224, 1)]
    assert list(table["ratio"][:3]) == [0.5, 1, 1]
    assert list(table["reason"]) == ["", "", "", "wrong: nan, it says"]
    assert [line for line in before.splitlines() if "bert,128,1" not in line] == [
        line for line in path.read_text("utf-8").splitlines() if "bert,128,1" not in line
    ]


def test_summary_of_known_numbers(tmp_path):
    rows = [row(ratio=0.5), row(batch=8, ratio=2.0), row("vit", 224, ratio=0.8)]
    rows += [row("t5", 128, ratio=np.nan, reason="wrong: differs by 1e-02")]
    rows += [row(contender="ours (torchscript, SDPA)", ratio=0.25), row(contender="b", ratio=9)]
    table = tables.merge(tmp_path / "speed.csv", rows)
    said = tables.summary(table).splitlines()
    assert said == [
        "ours (dynamo, SDPA): geometric mean 0.928 over 3 cells, 2 of 4 at most 1.03",
        "  misses 1.03: bert, 128 tokens, batch 8: 2.000 (1.990 to 2.010)",
        "  no result: t5, 128 tokens, batch 1: wrong: differs by 1e-02",
        "ours (torchscript, SDPA): geometric mean 0.250 over 1 cells, 1 of 1 at most 1.03",
        "the faster of ours: geometric mean 0.737 over 3 cells, 2 of 4 at most 1.03",
    ]
    assert cells.mean([0.5, 2.0]) == pytest.approx(1)
    shown = tables.by_model(table)
    assert "0.50 (0.49 to 0.51)" in shown
    assert "ours (dynamo, SDPA): wrong: differs by 1e-02" in shown


def test_ratios_are_paired_by_round_with_the_fastest_of_the_others():
    seconds = {"slow": [3, 6], "fast": [2, 4], "ours": [1, 2], "never": [np.nan, np.nan]}
    kinds = {"slow": "unfused", "fast": "stock", "ours": "ours", "never": "opset23"}
    result = benchmark.Result(
        tuple(contenders.onnx(label, "a.onnx", kind) for label, kind in kinds.items()),
        "slow",
        {label: benchmark.Measured(np.array(s), 1, {}, None) for label, s in seconds.items()},
        *({}, {}, {}, ""),
    )
    best, found = measuring.ratios(result)
    assert best == "fast"
    assert {label: ratio.median for label, ratio in found.items()} == {
        "slow": 1.5,
        "fast": 1,
        "ours": 0.5,
    }


def test_who_is_slow_is_timed_in_the_first_rounds_alone(monkeypatch):
    """Ours always goes on, the fastest of the others goes first, and who then fails has no time."""
    seconds = {"a": 2.0, "b": 1.0, "ours": 3.0, "bad": None, "late": 1.01}
    asked = []

    def run(those, cases, *, rounds, at_once):
        asked.append(([c.label for c in those], rounds))
        able = [c.label for c in those if seconds[c.label] and (c.label, rounds) != ("late", 10)]
        measured = {
            label: benchmark.Measured(np.full(rounds, seconds[label]), 1, {}, None)
            for label in able
        }
        reasons = {c.label: "died" for c in those if c.label not in able}
        return {name: benchmark.Result(those, "", measured, reasons, {}, {}, "") for name in cases}

    monkeypatch.setattr(measuring.benchmark, "run", run)
    kinds = dict.fromkeys(seconds, "unfused") | {"ours": "ours"}
    those = [contenders.Contender(label, kind) for label, kind in kinds.items()]
    rows = {one["contender"]: one for one in measuring.measure(those, {}, "case", 10, 3)}
    assert asked == [(["a", "b", "ours", "bad", "late"], 3), (["b", "ours", "late"], 10)]
    assert [(one["ratio"], one["rounds"]) for one in rows.values()][:3] == [
        (2, 3),
        (1, 10),
        (3, 10),
    ]
    assert np.isnan([rows["bad"]["ratio"], rows["late"]["ratio"]]).all()
    assert rows["bad"]["reason"] == rows["late"]["reason"] == "died"


def test_what_is_shown_is_that_of_the_measurements(tmp_path):
    """The table of results and the picture are made of the csv, which has every cell."""
    (tmp_path / "speed.csv").write_bytes((cells.ASSETS / "speed.csv").read_bytes())
    table = tables.merge(tmp_path / "speed.csv", [])
    both = {name: 2 * len(model.lengths) for name, model in speed_models.MODELS.items()}
    assert table[cells.CELL].drop_duplicates()["model"].value_counts().to_dict() == both
    page = (cells.ASSETS / "results.md").read_text(encoding="utf-8")
    assert tables.page(table) in page
    tables.draw(table, tmp_path / "again.svg")
    committed = (cells.ASSETS / "speed.svg").read_bytes()
    assert (tmp_path / "again.svg").read_bytes() == committed
