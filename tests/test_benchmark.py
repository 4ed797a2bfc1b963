"""Contenders run in processes of their own, by turns; what fails is a row. Never absolute times."""

import dataclasses
import json
import logging
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from graphs import write

from helpers import benchmark, contenders, files
from helpers.benchmark import timing
from helpers.workers import paired

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
        return {"y": module(torch.from_numpy(arrays["x"])).numpy()}

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


def large(megabytes: int):
    """It takes that much while it loads, for a tenth of a second, and then has it no more."""
    filled = np.ones(megabytes * 1_000_000, np.uint8)
    time.sleep(0.1)
    del filled
    return dict


def named(label: str, factory: str, /, **arguments) -> contenders.Contender:
    return contenders.pytorch(label, f"{__name__}:{factory}", **arguments)


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path / "tiny.onnx", TEXT)


def run(contenders, arrays=None, **options) -> benchmark.Result:
    """One case, without progress."""
    options = {"rounds": 1, "threads": 1, "progress": False} | options
    return benchmark.run(contenders, {"here": arrays or ARRAYS}, **options)["here"]


def result(seconds: dict[str, list[float]], reasons: dict[str, str] | None = None):
    """A result of made-up seconds."""
    kinds = list(contenders.LOOKS)
    took_part = tuple(
        contenders.Contender(label, kinds[n % len(kinds)])
        for n, label in enumerate([*seconds, *(reasons or {})])
    )
    first = next(iter(seconds))
    measured = {
        label: benchmark.Measured(
            np.array(values), 3_000_000, {}, None, reference=np.array(seconds[first])
        )
        for label, values in seconds.items()
    }
    return benchmark.Result(took_part, took_part[0].label, measured, reasons or {}, {}, {}, "here")


def test_speedup_is_paired_by_round():
    reference = np.array([1.0, 2.0, 4.0, 8.0])  # a machine that slows down eightfold meanwhile
    assert benchmark.speedup(reference, reference / 2) == (2, 2, 2)
    assert benchmark.speedup(reference[:1], reference[:1] * 2) == (0.5, 0.5, 0.5)
    ratios = np.array([1.0, 1.1, 1.2, 1.3, 9.0])
    assert benchmark.speedup(ratios, np.ones(5)) == (1.2, 1, 9)  # the range
    ratios = np.array([9.0, 1.4, 1.3, 1.0, 1.2, 1.1, 1.5, 1.6, 1.7])
    assert benchmark.speedup(ratios, np.ones(9)) == (1.4, 1.1, 1.7)  # the second and the eighth


@pytest.mark.parametrize(
    ("rounds", "expected", "covers"),  # tables of the sign test, as Conover's A3
    [
        (1, (1, 1), 0),
        (2, (1, 2), 0.5),
        (5, (1, 5), 0.9375),
        (6, (1, 6), 0.96875),
        (8, (1, 8), 0.9921875),
        (9, (2, 8), 0.9609375),
        (10, (2, 9), 0.978515625),
        (15, (4, 12), 0.96484375),
        (20, (6, 15), 0.95861),
        (30, (10, 21), 0.95723),
    ],
)
def test_ranks_that_bound_the_median(rounds, expected, covers):
    assert paired.ranks(rounds) == expected
    assert paired.coverage(rounds) == pytest.approx(covers, abs=1e-5)


def test_the_interval_is_the_narrowest_that_covers_enough_and_is_named():
    for rounds in range(6, 60):
        low, high = paired.ranks(rounds)
        assert paired.coverage(rounds) >= 0.95
        inside = sum(math.comb(rounds, count) for count in range(low + 1, high - 1))
        assert inside / 2**rounds < 0.95  # one rank less on either side covers too little
        assert paired.interval(rounds) == "95 % interval"
    assert paired.interval(5) == "range (a 94 % interval)"
    assert paired.interval(2) == "range (a 50 % interval)"


def test_how_often_the_median_lies_in_the_interval():
    ratios = np.random.default_rng(0).lognormal(size=(2000, 9))  # whose median is 1
    bounds = np.array([benchmark.speedup(row, np.ones(9)) for row in ratios])
    inside = (bounds[:, 1] <= 1) & (bounds[:, 2] >= 1)
    assert inside.mean() == pytest.approx(paired.coverage(9), abs=0.015)


def test_enough_rounds():
    rule = timing.Rule(least=6, most=10, width=0.03, seconds=40, pairs=[("b", "a")])
    steady, noisy = np.full(6, 2.0), np.array([1.9, 2, 2, 2, 2, 2.1])
    assert rule.holds(6, {"a": steady, "b": steady / 3}, 1)
    assert not rule.holds(5, {"a": steady[:5], "b": steady[:5]}, 100)  # never before the least
    assert not rule.holds(6, {"a": noisy, "b": steady}, 1)
    assert rule.holds(6, {"a": noisy, "b": steady}, 40)
    assert rule.holds(10, {"a": noisy, "b": steady}, 1)
    assert dataclasses.replace(rule, width=0.0501).holds(6, {"a": noisy, "b": steady}, 1)
    # What the interval says does not count, nor who is not compared, nor who failed.
    assert not rule.holds(6, {"a": noisy, "b": steady / 9}, 1)
    assert rule.holds(6, {"a": steady, "b": steady, "c": noisy}, 1)
    assert rule.holds(6, {"a": noisy}, 1)


def test_rounds_end_by_the_rule_and_are_said(tmp_path):
    log = tmp_path / "log"
    three = [named(label, "logged", log=str(log), label=label) for label in "abc"]
    options = {"threads": 1, "progress": False, "at_once": 2}
    wide = benchmark.run(three, {"x": ARRAYS}, rounds=(2, 9), width=1e6, **options)["x"]
    assert {len(one.seconds) for one in wide.measured.values()} == {6}  # the first interval
    assert "; 95 % interval; x: 6 rounds, 2 groups; " in wide.caption
    # The second group takes as many rounds as the first, so that they can be compared.
    over = benchmark.run(three, {"x": ARRAYS}, rounds=(3, 9), width=1e-9, seconds=1e-9, **options)
    assert {len(one.seconds) for one in over["x"].measured.values()} == {3}
    assert "; range (a 75 % interval); x: 3 rounds" in over["x"].caption
    most = {"x": (1, 7)}
    ends = benchmark.run(three, {"x": ARRAYS}, rounds=most, width=1e-12, **options)["x"]
    assert {len(one.seconds) for one in ends.measured.values()} == {7}
    assert ends.against("b").speedups()["c"].median > 0
    assert "; 95 % interval; x: 7 rounds, 2 groups;" in ends.caption


def test_each_round_another_one_goes_first():
    orders = [timing.turns("abc", number) for number in range(4)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "abc"]


def test_contenders_take_turns_and_are_gone_afterwards(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "helpers")
    log = tmp_path / "log"
    three = [named(label, "logged", log=str(log), label=label) for label in "abc"]
    answer = benchmark.run(three, {"short": ARRAYS}, rounds=3, repeats=2, threads=1)["short"]
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    order = "".join(run["label"] for run in runs)
    assert sorted(order[:3]) == [*"abc"]  # not timed, all together
    assert order[3:] == "aabbcc" + "bbccaa" + "ccaabb"
    assert {(r["threads"], r["wait"], *r["shape"]) for r in runs} == {("1", "PASSIVE", 2, 8)}
    assert len({run["pid"] for run in runs}) == 3
    assert_gone(runs)
    assert {label: len(one.seconds) for label, one in answer.measured.items()} == dict.fromkeys(
        "abc", 3
    )
    assert caplog.messages == ["short: 3 rounds"]
    assert capfd.readouterr() == ("", "")


def test_groups_keep_few_in_memory_and_share_the_reference(tmp_path):
    log = tmp_path / "log"
    five = [named(label, "logged", log=str(log), label=label) for label in "abcde"]
    cases = {"one": ARRAYS, "two": {"x": np.ones((3, 8), np.float32)}}
    rounds = {"one": 2, "two": 1}
    answers = benchmark.run(five, cases, rounds=rounds, threads=1, at_once=3, progress=False)
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    groups = [[run for run in runs if run["pid"] == pid] for pid in {r["pid"] for r in runs}]
    assert sorted(group[0]["label"] for group in groups) == [*"aabcde"]
    together = [
        {one[0]["label"] for one in groups if one[0]["start"] < first < one[-1]["start"]}
        for first in (runs[1]["start"], runs[-2]["start"])
    ]
    assert all(len(alive) <= 3 for alive in together)
    shapes = [run["shape"][0] for run in groups[0]]
    assert shapes == [2] * (1 + 2) + [3] * (1 + 1)
    for case, answer in answers.items():
        assert list(answer.measured) == [*"abcde"]
        assert all(len(one.relative) == rounds[case] for one in answer.measured.values())
        assert set(answer.measured["a"].relative) == {1}
        assert answer.speedups()["e"].median > 0
        assert f"{case}: {rounds[case]} rounds, 2 groups; x float32" in answer.caption


def test_speedups_of_two_groups_go_through_the_reference():
    answer = result({"a": [1.0, 2.0], "b": [0.5, 1.0]})
    slower = benchmark.Measured(np.array([5.0, 5.0]), 0, {}, None, reference=20.0)
    answer = dataclasses.replace(answer, measured={**answer.measured, "c": slower})
    assert answer.speedups()["c"].median == 4
    assert answer.against("b").speedups()["c"].median == 2


def assert_gone(runs) -> None:
    for run in runs:
        with pytest.raises(ProcessLookupError):
            os.kill(run["pid"], 0)


def test_processes_are_gone_when_interrupted(tmp_path, monkeypatch):
    log = tmp_path / "log"

    def interrupt(labels, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "turns", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([named("a", "logged", log=str(log), label="a")])
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(runs) == 1
    assert_gone(runs)


def test_what_fails_is_a_row_with_its_reason(tiny, tmp_path, capfd):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(tiny.read_bytes()[:100])
    all_of_them = [
        named("eager", "identity"),
        contenders.onnx("ours", tiny),
        contenders.onnx("does not load", bad, "stock"),
        contenders.onnx("no file", tmp_path / "none.onnx", "unfused"),
        contenders.Contender("not made", "onnxscript", reason="a tool said no"),
        named("raises", "broken", at="run"),
        named("dies", "broken", at="death"),
        named("dies on loading", "broken", at="load"),
        named("no such function", "nobody"),
    ]
    answer = run(all_of_them, rounds=2, at_once=9)
    assert capfd.readouterr() == ("", "")
    table = answer.table()
    assert list(table.index) == [contender.label for contender in all_of_them]
    finished = table[table.reason == ""]
    assert list(finished.index) == ["eager", "ours"]
    assert table["speed-up"].notna().sum() == (table["interval"] != "").sum() == 2
    assert table.loc["eager", "speed-up"] == 1
    reasons = answer.reasons
    assert "bad.onnx" in reasons["does not load"]
    assert reasons["not made"] == "a tool said no"
    assert reasons["raises"] == "ValueError: two lines"
    assert reasons["dies"] == "its process died with exit status 3"
    assert reasons["dies on loading"] == "its process died with exit status 4"
    assert reasons["no such function"].startswith("AttributeError")
    text = " ".join(reasons.values())
    assert "\n" not in text
    assert str(tmp_path) not in text + answer.caption + answer.describe()
    assert re.match(
        r"speed-up over eager \([\d.e-]+ ms\); range \(a 50 % interval\); "
        r"here: 2 rounds; x float32 \[2, 8\]; ",
        answer.caption,
    )
    assert "1 threads that do not spin; torch 2" in answer.caption
    assert not {"/", "\n"} & set(answer.caption)


def test_a_reference_that_fails(tiny):
    broken = [named("eager", "broken", at="load"), contenders.onnx("a", tiny)]
    answer = run([*broken, contenders.onnx("b", tiny)])
    assert answer.table()["speed-up"].isna().all()
    assert answer.against("a").speedups()["b"].median > 0
    two_groups = run([*broken, contenders.onnx("b", tiny)], at_once=2)
    assert np.isnan(two_groups.against("a").speedups()["b"].median)


def test_a_contender_that_hangs_is_killed():
    answer = run([named("hangs", "broken", at="hang")], timeout=2)
    assert answer.reasons == {"hangs": "no answer within 2 s"}


def test_memory_at_the_most_is_the_contenders_own():
    held = np.ones(600_000_000, np.uint8)  # of this process, which is not counted
    answer = run([named("small", "large", megabytes=1), named("large", "large", megabytes=400)])
    peak = {label: one.peak / 1e6 for label, one in answer.measured.items()}
    assert 10 < peak["small"] < 300
    assert 350 < peak["large"] - peak["small"] < 450
    del held


def test_peak_of_this_process():
    before = benchmark.peak_memory()
    assert 0.01 < before < 100
    more = before + 0.2
    held = np.ones(int(more * 2**30), np.uint8)
    assert benchmark.peak_memory() > more
    del held
    assert benchmark.peak_memory() > more


def test_a_graph_takes_the_inputs_that_it_knows(tiny):
    answer = run([contenders.onnx("a", tiny)], ARRAYS | {"pruned": np.ones(1)})
    assert answer.reasons == {}
    answer = run([contenders.onnx("a", tiny)], {"z": ARRAYS["x"]})
    assert "missing" in answer.reasons["a"]
    assert answer.table()["speed-up"].isna().all()


def test_difference_operators_and_memory(tiny, tmp_path):
    other = write(tmp_path / "other.onnx", TEXT.replace("Softmax (b)", "Relu (b)"))
    answer = run(
        [named("eager", "identity"), contenders.onnx("a", tiny), contenders.onnx("b", other)]
    )
    x, found = ARRAYS["x"], {}
    for label, path in {"a": tiny, "b": other}.items():
        (found[label],) = files.session(path).run(None, ARRAYS)
        assert answer.difference(label) == pytest.approx(np.abs(found[label] - x).max(), rel=1e-6)
    assert answer.difference("a") != answer.difference("b")
    assert answer.difference("eager") == 0
    assert answer.table()["MB in memory"].between(20, 2000).all()
    assert dict(answer.operators()["b", "run"]) == {"MatMul": 2, "Softmax": 0, "Relu": 1}
    assert answer.operators()["a", "file"]["Softmax"] == 1


def test_difference_of_other_outputs():
    def one(**outputs):
        return benchmark.Measured(np.ones(1), 1, outputs, None)

    answer = result({"eager": [1.0], "ours": [1.0]})
    cases = [
        ({"y": np.ones(3)}, {"y": np.zeros(3)}, 1),
        ({"y": np.ones(3)}, {"y": np.ones(2)}, np.inf),
        ({"y": np.ones(3)}, {"z": np.ones(3)}, np.nan),
        ({"y": np.ones(3)}, {"y": np.full(3, np.nan)}, np.nan),
        ({"y": np.ones(2), "z": np.ones(2)}, {"z": np.ones(2), "y": np.ones(2)}, 0),
        ({"y": np.array([True])}, {"y": np.array([False])}, 1),
    ]
    for mine, theirs, expected in cases:
        both = {"eager": one(**mine), "ours": one(**theirs)}
        found = dataclasses.replace(answer, measured=both).difference("ours")
        assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ("", {}),
        ("aa", {}),
        ("a", {"rounds": 0}),
        ("a", {"rounds": {"b": 1}}),
        ("a", {"at_once": 1}),
        ("a", {"rounds": (3, 2)}),
        ("a", {"rounds": (0, 2)}),
        ("a", {"width": 0}),
        ("a", {"seconds": 0}),
        ("a", {"compared": [("a", "b")]}),
    ],
)
def test_bad_arguments(labels, options):
    with pytest.raises(ValueError, match=r"expected .*, found|expected .*; found"):
        run([named(label, "identity") for label in labels], **options)


def test_table():
    table = result({"eager": [0.2, 0.4], "ours": [0.1, 0.16]}).table()
    assert list(table) == [
        *("speed-up", "interval", "precision", "difference", "MB on disk", "MB in memory"),
    ]
    assert list(table.loc["ours"].iloc[:2]) == [2.25, "2.00 to 2.50"]
    assert table.loc["eager", "MB in memory"] == 3
    assert np.isnan(table.loc["ours", "MB on disk"])


def test_what_runtimes_tell_is_in_the_table():
    answer = result({"eager": [0.2], "plugin": [0.1], "all": [0.1]})
    told = {
        "plugin": {"precision": "bf16 and fp32", "handed_back": {"Attention": 6, "Shape": 2}},
        "all": {"precision": "bf16", "handed_back": {}},
    }
    both = {
        label: dataclasses.replace(one, **told.get(label, {}))
        for label, one in answer.measured.items()
    }
    table = dataclasses.replace(answer, measured=both).table()
    assert list(table.precision) == ["", "bf16 and fp32", "bf16"]
    assert list(table["handed back"]) == ["", "6 Attention, 2 Shape", "nothing"]


def test_against_another_reference():
    answer = result({"eager": [0.2, 0.4], "ours": [0.1, 0.2]}).against("ours")
    assert list(answer.table()["speed-up"]) == [0.5, 1]
    assert answer.caption == "speed-up over ours (150 ms); range (a 50 % interval); here"
    with pytest.raises(ValueError, match="expected a contender's label, found theirs"):
        answer.against("theirs")


def test_plot_has_a_marker_for_each_contender():
    answer = result({"eager": [2.0, 4, 3], "ours": [1.0, 2, 2]}, {"stock": "it did not load"})
    plot = answer.plot()
    plot.figure.draw_without_rendering()
    [axes] = plot.figure.axes
    dots = [line for line in axes.lines if line.get_marker() not in NO_MARKER]
    assert [dot.get_xdata()[0] for dot in dots] == [1, 2]
    assert [dot.get_color() for dot in dots] == ["#000000", "#000000"]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["eager", "ours", "stock (no result)"]
    assert plot.text == (
        "Speed-up over eager (1.00), median and range (a 75 % interval): ours 2.00 (1.50 to"
        " 2.00); stock failed."
    )
    assert [dot.get_markerfacecolor() for dot in dots] == ["#000000", "white"]


def test_a_speedup_says_what_it_tells():
    faster = benchmark.Speedup(1.5, 1.204, 1.8)
    assert str(faster) == "1.50 (1.20 to 1.80)"
    assert faster.verdict() == "faster"
    assert faster.verdict(0.5) == "no difference"
    assert benchmark.Speedup(0.9, 0.8, 0.95).verdict(0.05) == "slower"
    assert benchmark.Speedup(1.1, 1.0, 1.2).verdict() == "no difference"
    assert benchmark.Speedup(0.97, 0.93, 0.997).verdict() == "no difference"  # printed as 1.00


def test_what_two_runs_of_one_contender_differ_by_is_no_difference():
    seconds = {"eager": [2.0, 4, 3], "ours": [1.0, 2, 1.5], "theirs": [1.9, 3.8, 2.85]}
    alone = result(seconds, {"stock": "it did not load"})
    assert alone.noise == 0
    told = {"ours": "2.00 (2.00 to 2.00), faster", "theirs": "1.05 (1.05 to 1.05), faster"}
    assert dict(alone.over("eager")) == told
    twice = result(seconds | {"eager, again": [1.8, 3.6, 2.7]})
    assert twice.noise == pytest.approx(1 / 9)
    [ours] = twice.over("theirs", ["ours"])
    assert ours == "1.90 (1.90 to 1.90), faster"
    assert twice.over("eager")["theirs"] == "1.05 (1.05 to 1.05), no difference"


def test_a_second_run_is_named_so():
    first = contenders.Contender("eager", "pytorch", "here:made", {"a": 1})
    again = contenders.again(first)
    assert again.label == "eager, again"
    assert dataclasses.replace(again, label="eager") == first


def test_plot_without_the_reference():
    answer = result({"ours": [1.0]}, {"eager": "it did not load"})
    against = dataclasses.replace(answer, reference="eager")
    plot = against.plot()
    plot.figure.draw_without_rendering()
    assert plot.text.endswith(": eager failed.")
