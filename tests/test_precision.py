"""The command for precision: on a tiny model with few contenders, and on made-up rows."""

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pandas as pd
import pytest
import tiny_bert
import torch
from graphs import ATTENTION, write

from helpers import benchmark, contenders, export, files, graph
from helpers.figures import cells, page
from helpers.figures.precision import (
    by_runtime,
    drawing,
    lineup,
    measuring,
    models,
    quality,
    sentences,
)
from helpers.figures.precision import table as tables
from helpers.models import loading


@pytest.fixture
def tiny(monkeypatch):
    """BERT, tiny."""
    bert = tiny_bert.bert(layers=1)
    monkeypatch.setitem(models.MODELS, "bert", bert)
    return bert


def multiplied(path: Path, scale: float) -> Path:
    """The same graph with its weights multiplied."""
    model = graph.load(path)
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.float32 and array.size > 1:
            value.const_value = ir.tensor(array * np.float32(scale), name=value.name)
    return files.save(model, path.with_stem(f"times_{scale}"))


@pytest.fixture
def few(monkeypatch):
    """In place of the whole line-up, two on one export, and one that could not be made."""

    def prepare(model, lengths, folder):
        tensors = {n: torch.from_numpy(a) for n, a in model.inputs(2, 8).items()}
        path = export.export(model.module(8), tensors, folder / "a.onnx", "torchscript").path
        off = contenders.onnx("off", multiplied(path, 1.01), "ours-int8")
        broken = contenders.Contender("broken", "ours", reason="ValueError: no, it says")
        theirs = [contenders.onnx("reference", path, "pytorch")]
        return {"theirs": theirs, "ours": [off, broken]}

    monkeypatch.setattr(lineup, "prepare", prepare)


def row(contender="a", ratio=1.0, good=0.01, ours=False, **more):
    """One row: with a list of ratios, their median and range."""
    ratios = np.atleast_1d(ratio)
    ratio = {"ratio": np.median(ratios), "low": ratios.min(), "high": ratios.max()}
    ratio |= {"rounds": ratios.size, "ratios": " ".join(map(str, ratios))}
    who = {"contender": contender, "kind": "ours" if ours else "unfused"}
    told = {"precision": "fp32", "handed back": "", "reason": "", "processor": "a processor (AVX2)"}
    judged = {"measure": "error", "quality": good, "difference": np.nan}
    cell = {"model": "bert", "length": 128, "batch": 1}
    return cell | who | {"ours": "yes" if ours else "no"} | ratio | told | judged | more


ours = functools.partial(row, ours=True)


def embedding(contender, ratio, difference, **more):
    judged = {"measure": "Spearman", "quality": 0.9 + difference, "difference": difference}
    return row(contender, ratio, **judged, **more)


@pytest.mark.usefixtures("tiny", "few")
def test_the_whole_command(tmp_path, capsys):
    path = tmp_path / "precision.csv"
    some = ["--models", "bert", "--rounds", "2", "--batches", "2", "--lengths", "16"]
    measuring.main([*some, "--csv", str(path)])
    table = tables.merge(path, [])
    assert list(table.columns) == list(tables.TYPES)
    rows = {one["contender"]: one for one in table.to_dict("records")}
    [twin] = [label for label in rows if label.endswith(tables.AGAIN)]
    assert list(rows) == ["reference", "off", "broken", twin]
    assert [one["ours"] for one in rows.values()] == ["no", "yes", "yes", "no"]
    assert {one["precision"] for one in rows.values()} == {"fp32", ""}
    assert rows["reference"]["ratio"] == 1
    assert rows["reference"]["quality"] == rows[twin]["quality"] == 0
    assert (rows["off"]["rounds"], rows[twin]["rounds"]) == (2, 2)
    assert 1e-3 < rows["off"]["quality"] < 1
    assert rows["broken"]["reason"] == "ValueError: no, it says"
    assert rows["broken"]["rounds"] == 0
    assert benchmark.instruction_sets() in rows["off"]["processor"]
    said = capsys.readouterr().out
    assert "the best of theirs: " in said
    assert "1 cells" in said
    assert str(tmp_path) not in said + path.read_text(encoding="utf-8")
    first = (tmp_path / "precision.svg").read_bytes()
    measuring.main(["--only-show", "--csv", str(path)])
    assert (tmp_path / "precision.svg").read_bytes() == first
    assert b"dc:date" not in first


def test_later_rounds_are_split_into_sittings(tmp_path, monkeypatch, tiny, few):
    """With new processes each, in another order; who fails in one of them has no ratio."""
    real, asked = benchmark.run, []

    def run(those, *args, **more):
        if more["rounds"] == 1:
            return real(those, *args, **more)
        asked.append(([one.label for one in those], more["rounds"]))
        if len(asked) == 3:
            those = [
                dataclasses.replace(one, reason="it died" if one.label == "off" else one.reason)
                for one in those
            ]
        return real(those, *args, **more)

    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(measuring, "CLOSE", 100)
    those = lineup.prepare(tiny, [8], tmp_path)
    every = [*those["theirs"], *those["ours"]]
    judged = {one.label: quality.Quality("error", 0.0, np.nan) for one in every}
    rows = measuring.measure(those, judged, tiny.inputs(1, 8), "a case", 6, 7)
    kept = ["reference", "off", "reference, again"]
    assert asked[1:] == [(kept, 2), ([kept[0], *kept[:0:-1]], 2), (kept, 2)]
    told = {row["contender"]: (row["rounds"], row["reason"]) for row in rows}
    assert told["reference"] == told["reference, again"] == (6, "")
    assert told["off"] == (0, "it died")


def test_only_show_without_a_table(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        measuring.main(["--only-show", "--csv", str(tmp_path / "none.csv")])
    assert stopped.value.code == 2
    assert "expected the table of a measurement, found no file" in capsys.readouterr().err


def test_a_faster_one_of_worse_quality_loses():
    rows = [row("slow", 0.9, good=0.001), row("t", 0.5, good=0.01)]
    rows += [ours("bad", 0.1, good=0.011), ours("good", 0.4, good=0.009), ours("exact", 0.45, 0)]
    found = tables.best(rows)
    assert (found.theirs["contender"], found.ours["contender"]) == ("t", "good")
    assert found.speedup.median == 1.25
    assert not found.missed
    told = tables.decision(rows)
    assert told[-1].startswith("faster and less good: bad, fp32, error 0.011, 5.00 ")
    alone = tables.best([*rows[:3]])
    assert alone.ours is alone.speedup is None
    assert alone.missed
    assert tables.decision(rows[:3])[-1] == "none of ours is as good"
    assert tables.decision(rows[2:]) == ["none of theirs has a result"]


def test_a_tie_is_no_loss_and_errors_of_floats_are_equal():
    found = tables.best([row("t", 0.5), ours("same", 0.5), ours("also", 0.5)])
    assert found.ours["contender"] == "same"
    assert found.speedup == (1, 1, 1)
    assert not found.missed
    found = tables.best([row("t", 0.5, good=2e-7), ours("fp32", 0.25, good=3e-7)])
    assert found.speedup.median == 2


def test_an_embedding_keeps_its_correlation():
    """On both sides: who loses more than 0.005 is not compared, and a gain is no loss."""
    rows = [embedding("wrong", 0.1, -0.3), embedding("t", 0.5, -0.004)]
    rows += [embedding("far", 0.2, -0.006, ours=True), embedding("o", 0.25, 0.01, ours=True)]
    found = tables.best(rows)
    assert (found.theirs["contender"], found.ours["contender"]) == ("t", "o")
    assert found.speedup.median == 2


def test_behind_by_no_more_than_two_runs_differ():
    theirs = row("t", [0.5, 0.5, 0.6])
    twin = row("t, again", [0.51, 0.52, 0.6])
    behind = ours("o", [0.509, 0.51, 0.61])
    found = tables.best([theirs, twin, behind])
    assert found.differ == pytest.approx(1 - 0.5 / 0.51)
    assert found.theirs["contender"] == "t"  # the twin is not chosen
    assert found.speedup.median == pytest.approx(0.5 / 0.509)
    assert not found.missed
    assert tables.best([theirs, behind]).missed
    assert tables.best([theirs, twin, ours("o", [0.52, 0.53, 0.7])]).missed


def test_paired_by_round_only_within_a_run():
    fast, slow = row("a", [0.1, 0.4, 0.2]), row("b", [0.2, 0.8, 0.4])
    assert tables.faster(fast, slow) == (2, 2, 2)
    median, low, high = tables.faster(fast, row("c", [0.4, 0.8]))
    assert (median, low, high) == pytest.approx((3, 1, 8))


def test_what_has_no_time_or_no_quality_is_not_compared():
    rows = [row("t", 0.5), row("none", 0.1, good=np.nan), row("failed", np.nan, reason="died")]
    assert [one["contender"] for one in tables.able(rows, ours=False)] == ["t"]


def test_who_is_timed_further():
    """Near the fastest of a side, and of ours also what is as good as one of theirs."""
    rows = [row("t", 0.5, good=0.01), row("near", 0.6, good=1e-5), row("far", 0.8)]
    rows += [ours("fast", 0.2, good=0.1), ours("as good", 0.7, good=0.01), ours("slow", 0.95)]
    rows += [ours("exact", 0.9, good=0), ours("late", 1.3, good=0)]
    every = ["t", "as good", "near", "exact", "fast"]
    assert measuring.finalists(rows) == every
    assert measuring.finalists([]) == []
    alone = [row(f"t{number}", 0.5 + number / 100) for number in range(3)]
    assert measuring.finalists(alone) == ["t0", "t1", "t2"]  # there are none of ours
    by_label = {one["contender"]: one for one in [row("reference", 1.0), *rows]}
    those = [contenders.Contender(label, "ours", reason="not made") for label in by_label]
    for size, labels in ((9, {"reference", *every}), (3, {"reference", "t", "as good"})):
        assert {one.label for one in measuring.chosen(those, by_label, size)} == labels


def test_the_summary_and_the_page(tmp_path):
    rows = [row("t", 0.5), ours("o", 0.25), row("t", 0.5, batch=8), ours("o", 1.0, batch=8)]
    rows += [row("t", 0.5, good=0.3, model="vit", length=224)]
    path = tmp_path / "precision.csv"
    table = tables.merge(path, rows)
    said = tables.summary(table).splitlines()
    assert said == [
        "the best of ours over the best of theirs at equal quality: geometric mean 1.000,"
        " 3 cells, 2 missed",
        "  missed: bert, 128 tokens, batch 8: 0.50 (0.50 to 0.50); two runs differ by 0.0%",
        "  missed: vit, 224 pixels, batch 1: none of ours is as good; two runs differ by 0.0%",
    ]
    again = tables.merge(path, [row("t", 0.5, model="vit", length=224), ours("x", 0.5)])
    assert list(again["contender"]) == ["x", "t", "o", "t"]  # of bert the first cell is replaced
    result = tmp_path / "results.md"
    shutil.copy(cells.ASSETS / "results.md", result)
    page.put(result, "precision", tables.page(table))
    text = result.read_text(encoding="utf-8")
    assert "](precision.svg)" in text
    assert "a processor (AVX2)" in text
    line = "| bert, 128 tokens, batch 1 | t | fp32 | error 0.01 | o | fp32 | error 0.01 |"
    assert f"{line} 2.00 (2.00 to 2.00) | 0.0% |" in text
    assert "vit, 224 pixels, batch 1 | t | fp32 | error 0.3 | none |  |  | none |" in text
    assert "<!-- attention_forms -->" in text


def test_the_picture(tmp_path):
    """A panel for each model, whose dots are ours and theirs; nothing of it is missing."""
    rows = [row("t", 0.5), row("t, again", 0.5), ours("o", 0.25)]
    rows += [embedding("t", 0.5, -0.1, model="minilm"), row("dead", np.nan, model="minilm")]
    table = tables.merge(tmp_path / "precision.csv", rows)
    figure = drawing.draw(table, tmp_path / "precision.svg")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == ["minilm", "bert"]
    dots = [line.get_xydata()[0] for line in panels["bert"].lines[:-1]]
    np.testing.assert_allclose(dots, [[0.01, 2], [0.01, 4]])
    np.testing.assert_allclose(panels["minilm"].lines[0].get_xydata(), [[0.1, 2]])


def test_errors_are_relative_to_the_spread():
    values = np.array([[0.0, 2.0], [0.0, 2.0]], np.float32)  # of standard deviation 1
    expected = {"y": values, "count": np.array([1])}
    assert quality.error(expected, {"y": values + 0.5}) == pytest.approx(0.5)
    assert np.isnan(quality.error(expected, {"z": values}))
    assert np.isnan(quality.error(expected, {"y": np.full_like(values, np.nan)}))
    both = {"y": values, "z": 10 * values}
    assert quality.error(both, {"y": values + 0.5, "z": 10 * values}) == pytest.approx(0.5)


def test_samples_to_judge_by_are_not_those_of_the_calibration(tiny):
    calibration = models.calibration(tiny, 8)["input_ids"]
    judged = np.concatenate([feed["input_ids"] for feed in models.judged(tiny, 8)])
    assert (len(calibration), len(judged)) == (32, 8)
    assert not {*map(tuple, calibration)} & {*map(tuple, judged)}
    pairs = pd.read_csv(cells.ASSETS / "sentence_pairs.csv")
    assert len(sentences.OTHERS) == len(set(sentences.OTHERS)) == 32
    assert not {*sentences.OTHERS} & {*pairs["first"], *pairs["second"]}


def test_embeddings_are_judged_by_both_paddings(monkeypatch):
    monkeypatch.setattr(quality.sentences, "spearman", lambda embeddings: float(embeddings.mean()))

    def outputs(right, left):
        return {
            side: {"sentence_embedding": np.full((2, 2), value)}
            for side, value in (("right", right), ("left", left))
        }

    reference, own = (quality._correlations(outputs(*both)) for both in ((0.9, 0.8), (0.9, 0.6)))
    measure, value, difference = quality._against(own, reference)
    assert (measure, value, difference) == ("Spearman", 0.6, pytest.approx(-0.2))
    assert np.isnan(quality._correlations({"right": {}, "left": {}})).all()


def test_spearman_of_the_pairs():
    """Embeddings on a circle, whose cosines are in the order of the grades."""
    grades = pd.read_csv(cells.ASSETS / "sentence_pairs.csv")["similarity"].to_numpy()
    angles = np.concatenate([np.zeros(len(grades)), (5 - grades) / 5])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert sentences.spearman(embeddings) == pytest.approx(1)
    assert sentences.spearman(np.concatenate(np.split(embeddings, 2)[::-1])) == pytest.approx(1)


def test_a_model_is_the_same_in_a_process_of_its_own(tiny):
    """What `pytorch` hands to a contender makes the module that is exported."""
    arrays = tiny.inputs(2, 8)
    alone = loading.pytorch(**tiny.pytorch(8))
    expected = loading.runner(tiny.module(8))(arrays)
    for name, array in alone(arrays).items():
        np.testing.assert_array_equal(array, expected[name])
    assert alone.precision == "fp32"
    assert models.MODELS["minilm"].pytorch(64) == {"name": "minilm", "pooled": True}
    assert models.MODELS["vit"].pytorch(384)["config"] == {"image_size": 384}


def test_contenders_in_8_bits(tmp_path):
    """A reader's plain call, in either way; and ours, with the reason why there is none."""
    path = write(tmp_path / "attention.onnx", ATTENTION)
    made = [
        contenders.dynamic_int8("a", path),
        contenders.dynamic_int8("b", path, per_channel=True),
    ]
    assert [one.reason for one in made] == ["", ""]
    assert made[0].path != made[1].path
    assert all("MatMulInteger" in graph.counts(graph.load(one.path)) for one in made)
    ours = contenders.quantized("c", made[0].path)
    assert ours.kind == "ours-int8"
    assert "expected a graph in floats" in ours.reason
    eight = lineup.of(ours, "d", "ours-plugin-int8", contenders.openvino_plugin)
    assert (eight.kind, eight.reason) == ("ours-plugin-int8", ours.reason)
    taken = lineup.of(made[0], "e", "plugin-default", contenders.openvino_plugin, precision=None)
    assert (taken.path, taken.arguments["precision"]) == (made[0].path, None)


# ── By runtime ──────────────────────────────────────────────────────────────────────────────────


def test_the_fastest_of_each_runtime_and_precision(tmp_path):
    where = {"model": "bert", "length": 8, "batch": 1, "measure": "error", "processor": "a CPU"}
    rows = [
        row("eager", kind="pytorch", precision="fp32", **where),
        row("slow", 0.8, kind="unfused", precision="fp32", **where),
        row("fast", 0.5, 0.03, kind="onnxscript", precision="fp32", **where),
        row("fast, again", 0.1, kind="onnxscript", precision="fp32", **where),
        row("fused", 0.4, ours=True, kind="ours-openvino", precision="bf16 and fp32", **where),
        row("static", 0.3, ours=True, kind="ours-plugin-int8", precision="int8", **where)
        | {"contender": "quantize, calibrated"},
        row("weights", 0.7, kind="openvino-int8", precision="bf16", **where),
        row("failed", np.nan, kind="dynamic-int8", precision="", **where),
    ]
    tables.merge(tmp_path / "a.csv", rows)
    found = by_runtime.fastest(by_runtime.read(tmp_path / "a.csv", "bert", 8, 1))
    assert found["theirs", "speed-up"].to_dict() == {
        ("PyTorch", "fp32"): "1.00",
        ("ONNX Runtime", "fp32"): "2.00",
        ("ONNX Runtime with OpenVINO", "8 bits, calibrated"): "",
        ("OpenVINO", "bf16"): "",
        ("OpenVINO", "8 bits"): "1.43",
    }
    assert found["theirs", "error"].iloc[1] == "0.03"
    assert [*found["ours", "speed-up"]] == ["", "", "3.33", "2.50", ""]
    with pytest.raises(ValueError, match="found no row of it"):
        by_runtime.read(tmp_path / "a.csv", "bert", 16, 1)


def test_the_page_says_what_was_not_measured():
    wanted = [
        {"model": name, "length": length, "batch": batch}
        for name, model in models.MODELS.items()
        for length in model.lengths
        for batch in (1, 8)
    ]
    rows = [r | cell for cell in wanted[1:] for r in (row("t", 0.5), ours("old", 0.4))]
    rows += [ours("new", 0.3) | cell for cell in wanted[-2:]]
    page = tables.page(pd.DataFrame(rows))
    assert "- not measured: minilm, 64 tokens, batch 1\n" in page
    assert f"- new: in 2 of {len(wanted) - 1} cells" in page
    assert "old: in" not in page
    complete = pd.DataFrame([row("t", 0.5) | cell for cell in wanted])
    assert tables.not_measured(complete) == []
