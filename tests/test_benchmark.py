"""Contenders run in processes of their own, by turns; what fails is a row. Never absolute times."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from graphs import write

from helpers import benchmark, files

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[N,8] x) => (float[N,8] y)
{
  a = MatMul (x, wq)
  b = MatMul (a, wk)
  y = Softmax (b)
}
"""
ARRAYS = {"x": np.ones((2, 8), np.float32)}
NO_MARKER = {"None", "none", "", " "}  # a line without a marker, as matplotlib may call it


# What a contender's process makes: it imports this module.


def logged(log: str, label: str):
    """A model that writes down when it runs, and that the settings reached its process."""

    def model(arrays):
        told = {"label": label, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
        told |= {"shape": list(arrays["x"].shape), "wait": os.environ["OMP_WAIT_POLICY"]}
        with Path(log).open("a") as file:
            print(json.dumps(told | {"start": time.time()}), file=file)

    return model


def identity():
    import torch

    module = torch.nn.Identity()
    print("what a library prints is no answer")

    def model(arrays):
        assert torch.get_num_threads() == 1
        return module(torch.from_numpy(arrays["x"]))

    return model


def broken(at: str):
    def model(arrays):
        if at == "run":
            raise ValueError("two\nlines")
        if at == "hang":
            time.sleep(600)
        os._exit(3)

    if at == "load":
        os._exit(4)
    return model


def named(label: str, factory: str, /, **arguments) -> benchmark.Contender:
    return benchmark.pytorch(label, f"{__name__}:{factory}", **arguments)


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path / "tiny.onnx", TEXT)


def result(seconds: dict[str, list[float]], reasons: dict[str, str] | None = None):
    """A result of made-up seconds."""
    kinds = list(benchmark.COLOURS)
    contenders = [
        benchmark.Contender(label, kinds[n % len(kinds)])
        for n, label in enumerate([*seconds, *(reasons or {})])
    ]
    arrays = {label: np.array(values) for label, values in seconds.items()}
    first = contenders[0].label
    return benchmark.Result(tuple(contenders), first, arrays, reasons or {}, {first: 1.25}, "here")


def test_speedup_is_paired_by_round():
    reference = np.array([1.0, 2.0, 4.0, 8.0])  # a machine that slows down eightfold meanwhile
    assert benchmark.speedup(reference, reference / 2) == (2, 2, 2)
    assert benchmark.speedup(reference[:1], reference[:1] * 2) == (0.5, 0.5, 0.5)
    ratios = np.array([1.0, 1.1, 1.2, 1.3, 9.0])
    median, low, high = benchmark.speedup(ratios, np.ones(5))
    assert median == 1.2
    assert 1 <= low < median < high <= 9
    assert benchmark.speedup(ratios, np.ones(5)) == (median, low, high)  # seeded


def test_each_round_another_one_goes_first():
    orders = [benchmark.turns("abc", number) for number in range(4)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "abc"]


def test_contenders_take_turns_and_are_gone_afterwards(tmp_path, capfd):
    log = tmp_path / "log"
    contenders = [named(label, "logged", log=str(log), label=label) for label in "abc"]
    answer = benchmark.run(contenders, ARRAYS, rounds=3, repeats=2, warmup=1, threads=1)
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert "".join(run["label"] for run in runs) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert [run["start"] for run in runs] == sorted(run["start"] for run in runs)
    assert {(r["threads"], r["wait"], *r["shape"]) for r in runs} == {("1", "PASSIVE", 2, 8)}
    assert len({run["pid"] for run in runs}) == 3
    assert_gone(runs)
    assert {label: len(seconds) for label, seconds in answer.seconds.items()} == dict.fromkeys(
        "abc", 3
    )
    assert capfd.readouterr() == ("started 3 of 3 contenders\nround 3 of 3\n", "")


def assert_gone(runs) -> None:
    for run in runs:
        with pytest.raises(ProcessLookupError):
            os.kill(run["pid"], 0)


def test_processes_are_gone_when_interrupted(tmp_path, monkeypatch):
    log = tmp_path / "log"

    def interrupt(labels, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "turns", interrupt)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run([named("a", "logged", log=str(log), label="a")], ARRAYS, progress=False)
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(runs) == 2
    assert_gone(runs)


def test_what_fails_is_a_row_with_its_reason(tiny, tmp_path, capfd):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(tiny.read_bytes()[:100])
    contenders = [
        benchmark.onnx("ours", tiny),
        named("eager", "identity"),
        benchmark.onnx("does not load", bad, "stock"),
        benchmark.onnx("no file", tmp_path / "none.onnx", "unfused"),
        named("raises", "broken", at="run"),
        named("dies", "broken", at="death"),
        named("dies on loading", "broken", at="load"),
        named("no such function", "nobody"),
    ]
    answer = benchmark.run(
        contenders, ARRAYS, rounds=2, warmup=1, threads=1, reference="eager", progress=False
    )
    assert capfd.readouterr() == ("", "")
    table = answer.table()
    assert list(table.index) == [contender.label for contender in contenders]
    finished = table[table.reason == ""]
    assert list(finished.index) == ["ours", "eager"]
    assert table["speed-up"].notna().sum() == table.milliseconds.notna().sum() == 2
    assert table.loc["eager", "speed-up"] == 1
    reasons = answer.reasons
    assert "bad.onnx" in reasons["does not load"]
    assert reasons["raises"] == "ValueError: two lines"
    assert reasons["dies"] == "its process died with exit status 3"
    assert reasons["dies on loading"] == "its process died with exit status 4"
    assert reasons["no such function"].startswith("AttributeError")
    text = " ".join(reasons.values())
    assert "\n" not in text
    assert str(tmp_path) not in text + answer.caption + answer.describe()
    assert answer.caption.startswith(
        "speed-up against eager, median and 95 % interval; 2 rounds of 1; x float32 [2, 8]; "
    )
    assert "1 threads; torch 2" in answer.caption
    assert not {"/", "\n"} & set(answer.caption)


def test_a_contender_that_hangs_is_killed():
    contenders = [named("hangs", "broken", at="hang")]
    answer = benchmark.run(contenders, ARRAYS, rounds=1, timeout=1, progress=False)
    assert answer.reasons == {"hangs": "no answer within 1 s"}


def test_a_graph_takes_the_inputs_that_it_knows(tiny):
    two = ARRAYS | {"pruned": np.ones(1)}
    answer = benchmark.run([benchmark.onnx("a", tiny)], two, rounds=1, progress=False)
    assert answer.reasons == {}
    other = {"z": ARRAYS["x"]}
    answer = benchmark.run([benchmark.onnx("a", tiny)], other, rounds=1, progress=False)
    assert "missing" in answer.reasons["a"]
    assert answer.table()["speed-up"].isna().all()


@pytest.mark.parametrize(
    ("labels", "options"), [("", {}), ("aa", {}), ("a", {"reference": "b"}), ("a", {"rounds": 0})]
)
def test_bad_arguments(labels, options):
    with pytest.raises(ValueError, match="expected contenders with labels of their own"):
        benchmark.run([named(label, "identity") for label in labels], ARRAYS, **options)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"expected one of pytorch, .* found fast"):
        benchmark.onnx("a", "a.onnx", "fast")


def test_table():
    table = result({"eager": [0.2, 0.4], "ours": [0.1, 0.16]}).table()
    assert list(table) == ["speed-up", "low", "high", "milliseconds", "MB"]
    assert list(table.loc["ours"][:4]) == [2.25, 2, 2.5, 130]
    assert table.loc["eager", "MB"] == 1.2
    assert np.isnan(table.loc["ours", "MB"])


def test_against_another_reference():
    answer = result({"eager": [0.2, 0.4], "ours": [0.1, 0.2]}).against("ours")
    assert list(answer.table()["speed-up"]) == [0.5, 1]
    assert answer.caption == "speed-up against ours, median and 95 % interval; here"
    with pytest.raises(ValueError, match="expected a contender's label, found theirs"):
        answer.against("theirs")


def test_plot_has_a_marker_for_each_contender():
    answer = result({"eager": [2.0, 4, 3], "ours": [1.0, 2, 2]}, {"stock": "it did not load"})
    figure = answer.plot()
    figure.draw_without_rendering()
    assert figure.get_figwidth() * 100 <= 700
    [axes] = figure.axes
    dots = [line for line in axes.lines if line.get_marker() not in NO_MARKER]
    assert [dot.get_xdata()[0] for dot in dots] == [1, 2]
    assert [dot.get_color() for dot in dots] == [*benchmark.COLOURS.values()][:2]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["eager", "ours", "stock (no result)"]
    assert answer.describe() == (
        "Speed-up against eager (1.00), median and 95 % interval: ours 2.00 (1.50 to 2.00);"
        " stock failed."
    )
    assert set(benchmark.COLOURS) == set(benchmark.MARKERS)
    assert len(set(benchmark.MARKERS.values())) == len(benchmark.MARKERS)


def test_plot_without_the_reference():
    answer = result({"ours": [1.0]}, {"eager": "it did not load"})
    against = answer.against("eager")
    against.plot().draw_without_rendering()
    assert against.describe().endswith(": eager failed.")


def test_profile_lists_the_operators(tiny):
    table = benchmark.profile(tiny, ARRAYS, runs=2, threads=1)
    assert list(table) == ["nodes", "milliseconds", "share"]
    assert dict(table.nodes) == {"MatMul": 2, "Softmax": 1}
    assert table.share.sum() == pytest.approx(1, abs=0.01)
    assert table.milliseconds.is_monotonic_decreasing


def test_profile_counts_a_branch_once(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (bool cond, float[N,8] x) => (float[N,8] y)
    {
      y = If (cond) <
        then_branch = yes () => (float[N,8] a) { a = Softmax (x) },
        else_branch = no () => (float[N,8] b) { b = Tanh (x) }
      >
    }
    """
    path = write(tmp_path / "if.onnx", text)
    table = benchmark.profile(path, ARRAYS | {"cond": np.array(True)}, runs=1, threads=1)
    assert dict(table.nodes) == {"Softmax": 1}


def test_profile_of_what_does_not_run(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("no model")
    with pytest.raises(files.BadInput, match=r"a\.onnx: expected a model that runs .* found: "):
        benchmark.profile(path, ARRAYS)


def test_plot_profile():
    columns = {"nodes": [6, 1, 1], "milliseconds": [6.0, 3.0, 1.0], "share": [0.6, 0.3, 0.1]}
    table = pd.DataFrame(columns, index=["MatMul", "Conv", "Softmax"])
    figure = benchmark.plot_profile({"unfused": table, "no Conv": table.drop("Conv")}, top=2)
    figure.draw_without_rendering()
    assert figure.get_figwidth() * 100 <= 700
    first, second = figure.axes
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["MatMul", "Conv", "other"]
    assert [bar.get_width() for bar in first.patches] == [6, 3, 1]
    assert [bar.get_width() for bar in second.patches] == [6, 0, 1]
    assert [text.get_text() for text in first.texts] == ["60%", "30%", "10%"]
    assert second.get_title() == "no Conv"
