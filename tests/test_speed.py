"""The command for speed, on a tiny model: who takes part, the table, and the summary."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pandas as pd
import pytest

import helpers
from helpers import benchmark, contenders, files, graph

COMMAND = Path(__file__).parent.parent / "assets" / "make_speed.py"
TINY = {
    "vocab_size": 30_000,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def make_speed(monkeypatch):
    """The command as a module, whose BERT is tiny."""
    spec = importlib.util.spec_from_file_location("make_speed", COMMAND)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_speed", module)
    spec.loader.exec_module(module)
    small = {"config": TINY, "lengths": (8, 16), "heads": 2, "width": 16}
    module.MODELS["bert"] = module.dataclasses.replace(module.MODELS["bert"], **small)
    return module


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


def test_the_whole_command(make_speed, use, tmp_path, capsys):
    use(stand_in())
    path = tmp_path / "speed.csv"
    some = ["--models", "bert", "--rounds", "1", "--batches", "2", "--lengths", "16"]
    make_speed.main([*some, "--csv", str(path), "--at-once", "7"])
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
    make_speed.main(["--only-show", "--csv", str(path)])
    assert (tmp_path / "speed.svg").read_bytes() == first
    assert b"dc:date" not in first


def test_who_is_wrong_takes_no_part(make_speed, use, tmp_path):
    use(stand_in(scale=1.01))
    those = make_speed.prepare(make_speed.MODELS["bert"], [16], tmp_path, ["dynamo"])
    reasons = {one.label: one.reason for one in those if one.reason}
    assert list(reasons) == ["ours (dynamo, SDPA)"]
    assert reasons["ours (dynamo, SDPA)"].startswith("wrong: differs by ")
    [stock] = [one for one in those if one.kind == "stock"]
    assert stock.label == "stock, bert, raw mask (torchscript, eager)"
    assert all(site.fused for site in graph.sites(graph.load(stock.path)))


def test_merging_replaces_the_same_cells_only(make_speed, tmp_path):
    path = tmp_path / "speed.csv"
    none = row("vit", 224, 1, ratio=np.nan, reason="wrong: nan, it says")
    make_speed.merge(path, [none, row("bert", 512), row(), row(contender="a"), row(batch=8)])
    before = path.read_text("utf-8")
    table = make_speed.merge(path, [row(ratio=0.5)])
    pd.testing.assert_frame_equal(table, make_speed.merge(path, []))
    cells = [tuple(one) for one in table[make_speed.CELL].to_numpy()]
    assert cells == [("bert", 128, 1), ("bert", 128, 8), ("bert", 512, 1), ("vit", 224, 1)]
    assert list(table["ratio"][:3]) == [0.5, 1, 1]
    assert list(table["reason"]) == ["", "", "", "wrong: nan, it says"]
    assert [line for line in before.splitlines() if "bert,128,1" not in line] == [
        line for line in path.read_text("utf-8").splitlines() if "bert,128,1" not in line
    ]


def test_summary_of_known_numbers(make_speed, tmp_path):
    rows = [row(ratio=0.5), row(batch=8, ratio=2.0), row("vit", 224, ratio=0.8)]
    rows += [row("t5", 128, ratio=np.nan, reason="wrong: differs by 1e-02")]
    rows += [row(contender="ours (torchscript, SDPA)", ratio=0.25), row(contender="b", ratio=9)]
    table = make_speed.merge(tmp_path / "speed.csv", rows)
    said = make_speed.summary(table).splitlines()
    assert said == [
        "ours (dynamo, SDPA): geometric mean 0.928 over 3 cells, 2 of 4 at most 1.03",
        "  misses 1.03: bert, 128 tokens, batch 8: 2.000 (1.990 to 2.010)",
        "  no result: t5, 128 tokens, batch 1: wrong: differs by 1e-02",
        "ours (torchscript, SDPA): geometric mean 0.250 over 1 cells, 1 of 1 at most 1.03",
        "the faster of ours: geometric mean 0.737 over 3 cells, 2 of 4 at most 1.03",
    ]
    assert make_speed.mean([0.5, 2.0]) == pytest.approx(1)
    shown = make_speed.by_model(table)
    assert "0.50 (0.49 to 0.51)" in shown
    assert "ours (dynamo, SDPA): wrong: differs by 1e-02" in shown


def test_ratios_are_paired_by_round_with_the_fastest_of_the_others(make_speed):
    seconds = {"slow": [3, 6], "fast": [2, 4], "ours": [1, 2], "never": [np.nan, np.nan]}
    kinds = {"slow": "unfused", "fast": "stock", "ours": "ours", "never": "opset23"}
    result = benchmark.Result(
        tuple(contenders.onnx(label, "a.onnx", kind) for label, kind in kinds.items()),
        "slow",
        {label: benchmark.Measured(np.array(s), 1, {}, None) for label, s in seconds.items()},
        *({}, {}, {}, ""),
    )
    best, found = make_speed.ratios(result)
    assert best == "fast"
    assert {label: ratio.median for label, ratio in found.items()} == {
        "slow": 1.5,
        "fast": 1,
        "ours": 0.5,
    }


def test_who_is_slow_is_timed_in_the_first_rounds_alone(make_speed, monkeypatch, tmp_path):
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

    monkeypatch.setattr(make_speed.benchmark, "run", run)
    kinds = dict.fromkeys(seconds, "unfused") | {"ours": "ours"}
    those = [contenders.Contender(label, kind) for label, kind in kinds.items()]
    rows = {one["contender"]: one for one in make_speed.measure(those, {}, "case", 10, 3)}
    assert asked == [(["a", "b", "ours", "bad", "late"], 3), (["b", "ours", "late"], 10)]
    assert [(one["ratio"], one["rounds"]) for one in rows.values()][:3] == [
        (2, 3),
        (1, 10),
        (3, 10),
    ]
    assert np.isnan([rows["bad"]["ratio"], rows["late"]["ratio"]]).all()
    assert rows["bad"]["reason"] == rows["late"]["reason"] == "died"


def test_what_is_shown_is_that_of_the_measurements(make_speed, tmp_path):
    """The README's table and the picture are made of the csv, which has every cell."""
    (tmp_path / "speed.csv").write_bytes((make_speed.ASSETS / "speed.csv").read_bytes())
    table = make_speed.merge(tmp_path / "speed.csv", [])
    both = {name: 2 * len(model.lengths) for name, model in make_speed.MODELS.items()}
    assert table[make_speed.CELL].drop_duplicates()["model"].value_counts().to_dict() == both
    readme = (make_speed.ASSETS.parent / "README.md").read_text(encoding="utf-8")
    assert make_speed.page(table) in readme
    make_speed.draw(table, tmp_path / "again.svg")
    committed = (make_speed.ASSETS / "speed.svg").read_bytes()
    assert (tmp_path / "again.svg").read_bytes() == committed
