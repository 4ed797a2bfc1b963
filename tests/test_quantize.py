"""8 and 4 bits: what is reached, what is left in float, what is refused; proven against floats."""

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from building import HEADS, WIDTH, WORDS, Graph, save

from helpers import contenders, feeds, files, graph, parity, quantize
from helpers.__main__ import main
from helpers.errors import BAD_INPUT, DONE, FAILED
from helpers.files import saving
from helpers.quantize import costs, cpu, measuring, openvino, samples, smoothing, trials
from helpers.quantize.layers import prepare
from helpers.quantize.ways import Way, ways
from helpers.workers import Failed

MICROSOFT = graph.MICROSOFT


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No times are taken: what is written second is faster."""

    def seconds(paths, target, arrays):
        return {label: np.full(6, 1 / (1 + at)) for at, label in enumerate(paths)}

    monkeypatch.setattr(measuring, "seconds", seconds)
    return seconds


def normalised(g: Graph, x: str, loud: float = 1.0) -> str:
    """LayerNormalization, after which one number in sixteen is `loud` times as large."""
    gain = np.ones(WIDTH, np.float32)
    gain[3] = loud
    return g.LayerNormalization(x, gain, np.zeros(WIDTH, np.float32), axis=-1)


def product(g: Graph, x: str, name: str, columns: int = WIDTH, loud: float = 1.0) -> str:
    """A product by a weight whose row for the loud number makes up for it."""
    weight = np.random.default_rng(len(name)).normal(size=(WIDTH, columns)) / 4
    weight[3] /= loud
    return g.MatMul(x, g.constant(weight.astype(np.float32), f"{name}_weight"), name=name)


def encoder(g: Graph, wrong: str = "") -> None:
    """A layer of attention, and three products, the second of which may read a loud input."""
    x = g.embedded(g.given("ids", np.int64, "batch", "length"))
    x = normalised(g, g.attention(x))
    for name in ("first", "second", "third"):
        loud = 2000.0 if name == "second" and wrong == "loud" else 1.0
        gain = np.ones(WIDTH, np.float32)
        gain[3] = loud
        read = g.Mul(normalised(g, x), gain)  # which is no part of the normalisation
        x = g.Add(x, g.Tanh(product(g, read, name, loud=loud)))
    g.gives("y", x, "batch", "length", WIDTH)


def kinds(g: Graph, wrong: str = "") -> None:
    """Products of all kinds, beside what is none: a standard Attention, a convolution, a product
    of two inputs."""
    x = g.given("x", np.float32, "batch", "length", WIDTH)
    joined = g.weight("joined", WIDTH, 3 * WIDTH)
    bias = g.weight("joined_bias", 3 * WIDTH, scale=0.1)
    theirs = g.op("Attention", x, joined, bias, domain=MICROSOFT, num_heads=HEADS, name="microsoft")
    turned = g.Transpose(theirs, perm=[0, 2, 1])
    kernel = g.weight("kernel", WIDTH, WIDTH, 3, scale=0.2)
    convolved = g.Conv(turned, kernel, pads=[1, 1], name="convolution")
    flat = g.Reshape(g.Transpose(convolved, perm=[0, 2, 1]), [-1, WIDTH])
    gemm = g.Gemm(flat, g.weight("b", WIDTH, WIDTH), g.weight("c", WIDTH), name="gemm")
    gemm = g.Gemm(gemm, g.weight("bt", WIDTH, WIDTH), transB=1, name="gemm_turned")
    rows = g.Reshape(gemm, g.Shape(x))
    heads = [g.Unsqueeze(rows, [1])] * 3
    ours = g.Squeeze(g.Attention(*heads, name="standard"), [1])
    scores = g.MatMul(ours, g.Transpose(rows, perm=[0, 2, 1]), name="two_inputs")
    g.gives("y", g.MatMul(scores, rows), "batch", "length", WIDTH)
    g.gives("z", g.MatMul(rows, g.Transpose(g.weight("w", WIDTH, WIDTH)), name="behind"), 1, 1, 1)


def operators(path: Path) -> dict[str, int]:
    return graph.counts(graph.load(path, weights=False))


def rows_of(path: Path, count: int = 8, length: int = 6, words: int = WORDS) -> Path:
    ids = np.random.default_rng(0).integers(0, words, (count, length))
    np.savez(path, ids=ids)
    return path


def run(path: Path, **arrays: np.ndarray) -> list[np.ndarray]:
    return files.session(path).run(None, arrays)


@pytest.fixture
def made(tmp_path):
    return save(tmp_path / "encoder.onnx", encoder)


def test_layers_of_all_kinds_are_found_and_reached(tmp_path):
    path = save(tmp_path / "kinds.onnx", kinds)
    layers = prepare(path, tmp_path / "base.onnx")
    assert {layer.name: layer.operator for layer in layers} == {
        "microsoft": f"{MICROSOFT}.Attention",
        "gemm": "MatMul",
        "gemm_turned": "MatMul",
        "behind": "MatMul",
    }
    x = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)
    for before, after in zip(run(path, x=x), run(tmp_path / "base.onnx", x=x), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-4)
    quantize.dynamic(path, tmp_path / "dynamic.onnx")
    counts = operators(tmp_path / "dynamic.onnx")
    assert counts[f"{MICROSOFT}.QAttention"] == 1
    assert counts["MatMulInteger"] == 3
    assert counts["Attention"] == counts["Conv"] == 1  # as they were
    assert counts["MatMul"] == 2
    for before, after in zip(run(path, x=x), run(tmp_path / "dynamic.onnx", x=x), strict=True):
        assert 0 < np.abs(before - after).std() < 0.1 * before.std()


def test_attention_without_a_bias(tmp_path):
    """ONNX Runtime's tool takes it for granted."""

    def build(g: Graph, wrong: str) -> None:
        x, joined = g.given("x", np.float32, "batch", "length", WIDTH), g.weight("w", WIDTH, 48)
        g.gives("y", g.op("Attention", x, joined, domain=MICROSOFT, num_heads=HEADS), "b", "l", 16)

    path = save(tmp_path / "in.onnx", build)
    quantize.dynamic(path, tmp_path / "out.onnx")
    assert operators(tmp_path / "out.onnx")[f"{MICROSOFT}.QAttention"] == 1
    x = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)
    [before], [after] = run(path, x=x), run(tmp_path / "out.onnx", x=x)
    assert 0 < np.abs(before - after).std() < 0.1 * before.std()


def test_weights_have_seven_bits_and_a_scale_for_each_column(made, tmp_path):
    quantize.dynamic(made, tmp_path / "dynamic.onnx")
    weights = ir.load(tmp_path / "dynamic.onnx").graph.initializers
    eight = {name: value for name, value in weights.items() if value.dtype == ir.DataType.INT8}
    large = [value.const_value.numpy() for value in eight.values() if len(value.shape) == 2]
    assert len(large) == 7
    for weight in large:
        assert -64 <= weight.min() <= weight.max() <= 64
        assert np.abs(weight.astype(int)).max(axis=0).min() >= 63  # each column uses them all
    quantize.dynamic(made, tmp_path / "tensor.onnx", per_channel=False)
    scale = ir.load(tmp_path / "tensor.onnx").graph.initializers["second_weight_scale"]
    assert scale.const_value.size == 1


def test_a_layer_whose_input_is_loud_is_left_in_float_and_no_other(tmp_path):
    clean = quantize.quantize(save(tmp_path / "a.onnx", encoder), tmp_path / "a8.onnx")
    assert (clean.held, clean.chosen.left, clean.layers) == (True, [], 7)
    loud = save(tmp_path / "b.onnx", encoder, "loud")
    done = quantize.quantize(loud, tmp_path / "b8.onnx")
    assert done.held
    assert done.chosen.method == "dynamic"
    assert done.chosen.left == ["second"]
    assert done.chosen.error <= done.bound == 0.1
    assert "inferred: ids" in done.inputs
    assert operators(done.path)["MatMulInteger"] == 6
    quantize.dynamic(loud, tmp_path / "all.onnx")
    ids = np.arange(12).reshape(2, 6)
    exact, all_of_them, ours = (
        run(path, ids=ids)[0] for path in (loud, tmp_path / "all.onnx", done.path)
    )
    assert np.sqrt(((all_of_them - exact) ** 2).mean()) > 0.1 * exact.std()
    assert np.sqrt(((ours - exact) ** 2).mean()) < 0.1 * exact.std()
    assert "left in float: second" in str(done)


def test_loud_channels_of_a_normalisation_are_smoothed(tmp_path):
    """What one reader has alone goes into the normalisation, of what others read a copy."""

    def build(g: Graph, wrong: str) -> None:
        x = g.embedded(g.given("ids", np.int64, "batch", "length"))
        alone = normalised(g, x, 300.0)
        x = g.Add(x, product(g, alone, "alone", loud=300.0))
        shared = normalised(g, x, 300.0)
        both = g.Add(product(g, shared, "one", loud=300.0), product(g, shared, "other"))
        g.gives("y", g.Add(x, g.Tanh(both)), "batch", "length", WIDTH)
        g.gives("shared", shared, "batch", "length", WIDTH)

    path, base = save(tmp_path / "a.onnx", build), tmp_path / "base.onnx"
    layers = prepare(path, base)
    arrays = {"ids": np.random.default_rng(0).integers(0, WORDS, (4, 9))}
    smoothed = tmp_path / "smoothed.onnx"
    assert smoothing.smooth(base, layers, [arrays], smoothed)
    counts = operators(smoothed)
    assert (counts["LayerNormalization"], counts["Mul"]) == (2, 1)
    exact, same = run(path, **arrays), run(smoothed, **arrays)
    for before, after in zip(exact, same, strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    errors = []
    for graph_of, out in ((base, "plain.onnx"), (smoothed, "rounded.onnx")):
        cpu.dynamically(graph_of, tmp_path / out, layers)
        gap = run(tmp_path / out, **arrays)[0] - exact[0]
        errors.append(np.sqrt((gap**2).mean()) / exact[0].std())
    assert errors[1] < 0.3 * errors[0]
    assert quantize.quantize(path, tmp_path / "8.onnx").chosen.method == "dynamic, smoothed"
    nothing = save(
        tmp_path / "b.onnx",
        lambda g, _: g.gives("y", product(g, g.given("x", "f4", 2, WIDTH), "p"), 2, WIDTH),
    )
    layers = prepare(nothing, base)
    assert not smoothing.smooth(base, layers, [{}], tmp_path / "none.onnx")


def test_what_a_layer_costs_alone_is_what_rounding_it_alone_costs(tmp_path):
    path, base = save(tmp_path / "a.onnx", encoder, "loud"), tmp_path / "base.onnx"
    layers = prepare(path, base)
    arrays = {"ids": np.arange(12).reshape(2, 6)}
    feed = [feeds.Feed("here", arrays)]
    cases, _ = parity.cases_of(parity.Runner(path, optimise=False), feed, [path])
    alone = costs.alone(base, layers, cases, 8)
    assert max(alone, key=alone.get) == "second"
    for layer in layers[:2] + layers[-2:]:
        cpu.dynamically(base, tmp_path / "one.onnx", [layer])
        with measuring.running(tmp_path / "one.onnx", "cpu") as one:
            error, output = measuring.error(one, cases)
        assert output == "y"
        assert alone[layer.name] == pytest.approx(error, rel=0.1)


def test_an_error_is_relative_to_the_spread_and_the_worst_output_counts():
    wanted = {"a": np.array([[0.0, 2.0]]), "b": np.array([[0.0, 20.0]]), "n": np.array([1])}
    kept = {name: np.ones(array.shape, bool) for name, array in wanted.items()}
    kept["a"][0, 1] = False  # a row without a key
    case = parity.Case(feeds.Feed("one", {}), wanted, kept, [])
    given = {"a": np.array([[0.0, 9.0]]), "b": np.array([[1.0, 19.0]]), "n": np.array([5])}
    assert measuring.error(lambda arrays: given, [case]) == (pytest.approx(0.1), "b")
    bad = given | {"b": np.array([[np.nan, 0.0]])}
    assert measuring.error(lambda arrays: bad, [case]) == (float("inf"), "b")


def test_static_is_calibrated_on_three_of_four_samples(made, tmp_path):
    npz = rows_of(tmp_path / "rows.npz", 12)
    given = samples.read(npz, files.Opened(made))
    assert len(given.calibration) == 9
    assert [feed.arrays["ids"].shape[0] for feed in given.judged] == [8, 1]
    [held_out] = given.others
    np.testing.assert_array_equal(held_out.arrays["ids"], np.load(npz)["ids"][3::4])
    done = quantize.quantize(made, tmp_path / "8.onnx", inputs=npz)
    assert done.held
    assert [one.method for one in done.tried] == ["dynamic", "static"]
    assert done.chosen.method == "static"  # as its time is less
    assert done.chosen.speedup.median == 3
    assert "12 samples, 3 of them held out" in done.inputs
    counts = operators(done.path)
    assert counts["DequantizeLinear"] > counts["QuantizeLinear"] == 5  # q, k and v read one
    assert "MatMulInteger" not in counts
    assert done.megabytes[1] < done.megabytes[0] + 0.1


def test_convolutions_are_tried_and_the_layers_of_an_attention_counted(tmp_path):
    path = save(tmp_path / "kinds.onnx", kinds)
    npz = tmp_path / "rows.npz"
    np.savez(npz, x=np.random.default_rng(1).normal(size=(8, 5, WIDTH)).astype(np.float32))
    done = quantize.quantize(path, tmp_path / "8.onnx", inputs=npz)
    ways = {one.method: one for one in done.tried}
    assert [*ways] == ["dynamic", "static", "static, convolutions too"]
    assert [one.reason for one in done.tried] == [""] * 3
    assert ways["dynamic"].left == []
    assert ways["static"].left == ["microsoft"]  # which has no static form
    assert done.held


def test_the_more_exact_of_two_as_fast_is_taken(made, tmp_path, monkeypatch):
    def alike(paths, target, arrays):
        return {label: np.ones(6) for label in paths}

    monkeypatch.setattr(measuring, "seconds", alike)
    npz = rows_of(tmp_path / "rows.npz")
    done = quantize.quantize(made, tmp_path / "8.onnx", inputs=npz)
    assert done.chosen.error == min(one.error for one in done.tried)


def test_a_graph_that_cannot_be_timed_is_refused(made, tmp_path, monkeypatch):
    def seconds(paths, target, arrays):
        raise Failed("its process died with signal SIGKILL")

    monkeypatch.setattr(measuring, "seconds", seconds)
    with pytest.raises(files.BadInput, match=r"timed on cpu, found: its process died .*; give"):
        quantize.quantize(made, tmp_path / "8.onnx")
    assert not (tmp_path / "8.onnx").exists()


def test_a_way_that_fails_is_told_and_the_others_are_taken(made, tmp_path, monkeypatch):
    def failing(*given, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(cpu, "dynamically", failing)
    done = quantize.quantize(made, tmp_path / "8.onnx", inputs=rows_of(tmp_path / "rows.npz"))
    assert done.chosen.method == "static"
    assert "also tried: dynamic: RuntimeError: no such kernel" in str(done)


def test_four_bits_round_weights_alone(made, tmp_path):
    done = quantize.quantize(made, tmp_path / "4.onnx", bits=4)
    assert done.held
    assert [one.method[:20] for one in done.tried] == ["weights in blocks of"] * 2
    counts = operators(done.path)
    assert counts[f"{MICROSOFT}.MatMulNBits"] == 7 - len(done.chosen.left)
    assert 0.01 < done.chosen.error <= done.bound == quantize.BOUND[4]
    assert done.timed == "ids (1, 8)"  # the shortest of those inferred


def test_json_has_the_fields_of_the_design_and_speed_is_measured(
    made, tmp_path, capsys, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.setattr(measuring, "ROUNDS", (2, 2))
    assert main(["quantize", str(made), str(tmp_path / "8.onnx"), "--json"]) == DONE
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert (answer["bits"], answer["method"], answer["left_in_float"]) == (8, "dynamic", [])
    assert 0 < answer["error"] < answer["bound"]
    low, high = answer["interval"]
    assert 0 < low <= answer["speedup"] <= high
    assert answer["inputs"].startswith("inferred: ")
    assert answer["timed"].startswith("ids (")
    assert "trying 8 bits, dynamic …" in printed.err
    onnx.checker.check_model(str(tmp_path / "8.onnx"))


def test_nothing_is_written_where_the_bound_does_not_hold(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(quantize.BOUND, 8, 1e-6)
    out = tmp_path / "8.onnx"
    assert main(["quantize", str(made), str(out)]) == FAILED
    printed = capsys.readouterr().out
    assert (
        "not written: the bound is not held by any way (in floats, cpu has an error of" in printed
    )
    assert {file.name for file in tmp_path.iterdir()} == {"encoder.onnx"}


def test_a_bound_that_is_none(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "a.onnx", "b.onnx", "--bound", "-1"])
    assert "--bound: expected a number of 0 or more, found '-1'" in capsys.readouterr().err


def test_a_bound_of_ones_own(made, tmp_path, capsys):
    """What the default bound takes as it is has layers in float at half of its error."""
    arguments = ["quantize", str(made), str(tmp_path / "8.onnx"), "--json"]
    assert main(arguments) == DONE
    first = json.loads(capsys.readouterr().out)
    bound = first["error"] / 2
    assert main([*arguments, "--bound", str(bound)]) == DONE
    second = json.loads(capsys.readouterr().out)
    assert second["error"] <= bound == second["bound"]
    assert len(second["left_in_float"]) > len(first["left_in_float"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["8.onnx", "x.onnx"], "quantised already (7 MatMulInteger"),
        (["encoder.onnx", "x.onnx", "--inputs", "seven.npz"], "8 samples or more along the first"),
        (["encoder.onnx", "x.onnx", "--inputs", "names.npz"], "expected arrays ids, found words"),
        (["encoder.onnx", "x.onnx", "--inputs", "types.npz"], "expected ids int64 (batch, length)"),
        (["encoder.onnx", "encoder.onnx"], "expected another file than the input"),
        (["none.onnx", "x.onnx"], "expected products by float32 weights (MatMul, Gemm)"),
        (["missing.onnx", "x.onnx"], "expected a model file, found none"),
        (["encoder.onnx", "x.onnx", "--target", "openvino"], "expected the package nncf"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    made, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nncf", None)
    if arguments[0] == "8.onnx":
        quantize.dynamic(made, tmp_path / "8.onnx")
    if arguments[0] == "none.onnx":
        save(tmp_path / "none.onnx", lambda g, _: g.gives("y", g.Tanh(g.given("x", "f4", 2)), 2))
    rows_of(tmp_path / "seven.npz", 7)
    np.savez("names.npz", words=np.ones((8, 4), np.int64))
    np.savez("types.npz", ids=np.ones((8, 4), np.int32))
    before = {file.name: file.stat().st_mtime for file in tmp_path.iterdir()}
    assert main(["quantize", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert {file.name: file.stat().st_mtime for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("wrong", [["--target", "gpu"], ["--bits", "2"]])
def test_another_target_or_other_bits_are_refused(made, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", str(made), str(tmp_path / "x.onnx"), *wrong])
    assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected"):
        quantize.quantize(made, tmp_path / "x.onnx", target="gpu")
    with pytest.raises(ValueError, match="expected 8 or 4"):
        quantize.quantize(made, tmp_path / "x.onnx", bits=2)


def test_seven_samples_are_told_and_what_to_do(made, tmp_path):
    with pytest.raises(files.BadInput, match="found 7; add more, or leave out --inputs"):
        quantize.quantize(made, tmp_path / "x.onnx", inputs=rows_of(tmp_path / "seven.npz", 7))


def test_weights_in_another_file(made, tmp_path, monkeypatch):
    for module in (files, saving):
        monkeypatch.setattr(module, "ONE_FILE", 3000)
    small = tmp_path / "small"
    small.mkdir()
    npz = rows_of(tmp_path / "rows.npz")
    loud = save(tmp_path / "loud.onnx", encoder, "loud")
    for bits in (8, 4):
        done = quantize.quantize(loud, small / f"{bits}.onnx", bits=bits, inputs=npz)
        assert done.held
        assert [one.reason for one in done.tried] == ["", ""]
    assert {file.suffix for file in small.iterdir()} == {".onnx", ".data"}
    run(small / "8.onnx", ids=np.load(npz)["ids"])


def test_a_fixed_batch_is_calibrated_on_as_it_is_and_judged_on_inferred_inputs(tmp_path):
    def build(g: Graph, wrong: str) -> None:
        g.gives("y", product(g, g.Tanh(g.given("x", np.float32, 8, WIDTH)), "one"), 8, WIDTH)

    path = save(tmp_path / "fixed.onnx", build)
    npz = tmp_path / "rows.npz"
    np.savez(npz, x=np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32))
    given = samples.read(npz, files.Opened(path))
    assert [one["x"].shape for one in given.calibration] == [(8, WIDTH)]
    assert all(feed.inferred for feed in given.others)
    assert quantize.quantize(path, tmp_path / "8.onnx", inputs=npz).held


def test_rows_without_a_key_do_not_count(tmp_path):
    def build(g: Graph, wrong: str) -> None:
        x = g.embedded(g.given("ids", np.int64, "batch", "length"))
        mask = g.given("mask", np.int64, "batch", "length")
        x = g.attention(x, bias=g.penalty(mask))
        g.gives("y", product(g, x, "last"), "batch", "length", WIDTH)

    path = save(tmp_path / "masked.onnx", build)
    npz = tmp_path / "rows.npz"
    mask = np.ones((8, 6), np.int64)
    mask[7] = 0
    np.savez(npz, ids=np.load(rows_of(tmp_path / "ids.npz"))["ids"], mask=mask)
    given = samples.read(npz, files.Opened(path))
    plain = parity.Runner(path, optimise=False)
    [case], _ = parity.cases_of(plain, given.others, [path])
    assert case.kept["y"][0].all()
    assert not case.kept["y"][1].any()  # sample 7, held out as sample 3 is


@pytest.mark.parametrize("bits", [8, 4])
def test_openvino_reads_what_nncf_makes(tmp_path, bits):
    pytest.importorskip("openvino", reason="2026-11-30: openvino is optional")
    pytest.importorskip("nncf", reason="2026-11-30: nncf is optional")
    path = save(tmp_path / "encoder.onnx", encoder)
    npz = rows_of(tmp_path / "rows.npz")
    out = tmp_path / "out.onnx"
    done = quantize.quantize(path, out, target="openvino", bits=bits, inputs=npz)
    assert done.held, str(done)
    assert [one.reason for one in done.tried] == [""] * len(done.tried)
    if bits == 8:
        assert {one.method for one in done.tried} == {
            "weights",
            "static, by NNCF",
            "static, by ONNX Runtime",
        }
    exact, [ours] = run(path, ids=np.load(npz)["ids"]), run(out, ids=np.load(npz)["ids"])
    assert np.sqrt(((ours - exact[0]) ** 2).mean()) < quantize.BOUND[bits] * exact[0].std()


def test_nncf_leaves_in_float_what_it_is_told(made, tmp_path):
    pytest.importorskip("openvino", reason="2026-11-30: openvino is optional")
    pytest.importorskip("nncf", reason="2026-11-30: nncf is optional")
    layers = prepare(made, tmp_path / "base.onnx")
    some = [layer for layer in layers if layer.name != "second"]
    out = tmp_path / "out.onnx"
    openvino.weights(tmp_path / "base.onnx", out, some, every=layers, bits=8, block=0)
    weights = ir.load(out).graph.initializers
    assert weights["second_weight"].dtype == ir.DataType.FLOAT
    assert weights["first_weight_quantized"].dtype == ir.DataType.INT8


def test_convolutions_for_openvino_read_no_signed_numbers(tmp_path):
    """It runs those in fp32 whose int8 zero point is not 0. One of grouped channels stays float."""
    pytest.importorskip("openvino", reason="2026-11-30: openvino is optional")
    pytest.importorskip("nncf", reason="2026-11-30: nncf is optional")

    def build(g, wrong):
        x = g.given("x", np.float32, "batch", "length")
        channel = g.Unsqueeze(x, np.array([1]))
        first = g.Conv(channel, g.weight("first", 8, 1, 3, scale=0.3), pads=[1, 1], name="first")
        kernel = g.weight("kernel", 8, 8, 3, scale=0.3)
        first = g.Conv(g.Gelu(first), kernel, pads=[1, 1], name="whole")
        grouped = g.weight("grouped_kernel", 8, 2, 3, scale=0.3)
        second = g.Conv(g.Gelu(first), grouped, pads=[1, 1], group=4, name="grouped")
        turned = g.Transpose(second, perm=[0, 2, 1])
        g.gives("y", g.MatMul(turned, g.weight("w", 8, 8, scale=0.3)), "batch", "length", 8)

    path, npz = save(tmp_path / "in.onnx", build), tmp_path / "x.npz"
    np.savez(npz, x=np.random.default_rng(0).normal(size=(32, 40)).astype(np.float32))
    base = tmp_path / "base.onnx"
    layers = prepare(path, base)
    given = samples.read(npz, files.Opened(path))
    found = {way.name: way for way in ways(base, layers, "openvino", 8, given)}
    for name, rounded in (
        ("static, by NNCF", []),
        ("static, by NNCF, convolutions too", ["first", "whole"]),
    ):
        out = tmp_path / f"{name}.onnx"
        found[name].make(base, out, layers)
        model = ir.load(out)
        kinds = {node.name: node for node in model.graph if node.op_type == "Conv"}
        weights = {one: node.inputs[1].producer() for one, node in kinds.items()}
        assert [one for one, node in weights.items() if node is not None] == rounded
        for one in rounded:
            read = kinds[one].inputs[0].producer()
            if read.op_type == "Unsqueeze":
                read = read.inputs[0].producer()
            zero = read.inputs[2].const_value
            assert zero.dtype == ir.DataType.UINT8
            assert zero.numpy() > 0
        x = np.load(npz)["x"][:4]
        [exact], [ours] = run(path, x=x), run(out, x=x)
        assert np.sqrt(((ours - exact) ** 2).mean()) < 0.1 * exact.std()


def test_contenders_are_made_by_the_same_code(made, monkeypatch):
    asked = []
    monkeypatch.setattr(quantize, "dynamic", lambda *given, **more: asked.append(more))
    contenders.int8("int8", made, per_channel=False)
    assert asked == [{"per_channel": False}]


def test_weights_that_are_computed_of_others(tmp_path):
    """As PyTorch's weight_norm is exported: NNCF raises where a convolution has no initializer."""

    def build(g, wrong):
        direction = g.constant(np.ones((4, 4, 3), np.float32), "direction")
        size = g.Sqrt(g.constant(np.full((4, 1, 1), 3, np.float32), "size"))
        x = g.given("x", np.float32, "batch", 4, "length")
        g.gives("y", g.Conv(x, g.Div(direction, size), pads=[1, 1]), "batch", 4, "length")

    prepare(save(tmp_path / "a.onnx", build), tmp_path / "b.onnx")
    made = onnx.load(tmp_path / "b.onnx").graph
    [conv], [weight] = made.node, made.initializer
    assert conv.input[1] == weight.name
    np.testing.assert_allclose(onnx.numpy_helper.to_array(weight), 3**-0.5, rtol=1e-6)


@pytest.fixture
def runs_up_to_20(monkeypatch):
    """In place of OpenVINO, what refuses ids that are longer."""
    pytest.importorskip("nncf")
    real = measuring.running

    @contextlib.contextmanager
    def running(path, target):
        def checked(arrays):
            if arrays["ids"].shape[1] > 20:
                raise Failed("too long")
            return run(arrays)

        with real(path, "cpu") as run:
            yield checked

    monkeypatch.setattr(measuring, "running", running)


@pytest.mark.usefixtures("runs_up_to_20")
def test_what_the_provider_does_not_run_is_passed_over_and_named(made, tmp_path):
    done = quantize.quantize(made, tmp_path / "8.onnx", target="openvino")
    assert done.held
    assert re.search(r"; passed over: .+ \(too long\)", done.inputs)


@pytest.mark.usefixtures("runs_up_to_20")
def test_samples_that_the_provider_does_not_run_are_refused(made, tmp_path, capsys):
    np.savez(tmp_path / "long.npz", ids=np.zeros((8, 21), np.int64))
    arguments = ["quantize", str(made), str(tmp_path / "8.onnx"), "--target", "openvino"]
    assert main([*arguments, "--inputs", str(tmp_path / "long.npz")]) == BAD_INPUT
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        "expected a graph that openvino runs on calibration, from sample 0, found: too lo" in told
    )


@pytest.mark.parametrize("guess", [1, 6, 7, 8, 30, 39])
def test_as_few_layers_in_float_as_it_takes_are_found_in_few_trials(guess, tmp_path, monkeypatch):
    """Of forty layers, seven: a trial may take a minute."""
    tried = []

    def trial(self, way, base, number):
        tried.append(number)
        path = tmp_path / str(number)
        path.touch()
        error = 0.05 if number >= 7 else 0.2 - number / 100
        return trials.Tried("way", path, error, left=[str(i) for i in range(number)])

    monkeypatch.setattr(trials.Trials, "_tried", trial)
    monkeypatch.setattr(trials.Trials, "_guessed", lambda *_: guess)
    own = trials.Trials.__new__(trials.Trials)
    own.bound = 0.1
    found = own._with_floats(Way("way", None, [None] * 40), tmp_path, trial(own, None, None, 0))
    assert len(found.left) == 7
    assert found.path.exists()
    assert {file.name for file in tmp_path.iterdir()} == {"7"}
    assert len(tried) <= 11
