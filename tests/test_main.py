"""The command line: what it prints, and its exit status."""

import json
import subprocess
import sys

import jsonschema
import numpy as np
import onnx
import pytest
from graphs import ATTENTION, write
from test_explain import SCHEMA

from helpers.__main__ import main


def test_inspect_json_is_one_document_with_the_fields_of_the_design(tmp_path, capsys):
    path = write(tmp_path / "a b é.onnx")
    assert main(["inspect", str(path), "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["opset"] == {"": 17}
    assert answer["nodes"] == sum(answer["operators"].values()) == 22
    assert answer["operators"]["MatMul"] == 6
    assert answer["sites"] == [{"name": "n_softmax", "fused": False, "layer": None}]
    assert answer["notes"] == []
    assert printed.err == ""


def test_inspect_text_names_sites_and_operators(tmp_path, capsys):
    assert main(["inspect", str(write(tmp_path / "a.onnx"))]) == 0
    text = capsys.readouterr().out
    assert "1 attention site, 0 fused" in text
    assert "n_softmax" in text
    assert "6  MatMul" in text


def test_inspect_notes_what_a_reader_should_know(tmp_path, capsys):
    text = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    g (float[b,2,l,4] q, bool[b,1,1,l] mask) => (float[b,2,l,4] y)
    {
      [a] h = Attention (q, q, q, mask)
      r = com.microsoft.QuickGelu (h)
      n, scale, zero = DynamicQuantizeLinear (r)
      y = DequantizeLinear (n, scale, zero)
    }"""
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    assert main(["inspect", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    quantised, repaired = answer["notes"]
    assert quantised == "quantised: 1 DequantizeLinear, 1 DynamicQuantizeLinear"
    assert "Attention a has a mask with one row" in repaired
    assert repaired.endswith("fuse repairs that")
    assert answer["operators"]["com.microsoft.QuickGelu"] == 1
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"note: {repaired}" in printed
    assert "1  com.microsoft.QuickGelu" in printed


def test_compare_holds_for_the_same_graph(tmp_path, capsys):
    one, two = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx")
    assert main(["compare", str(one), str(two), "--json"]) == 0
    parity = json.loads(capsys.readouterr().out)["parity"]
    assert parity["max_abs_diff"] <= parity["tolerance"]
    assert parity["inputs"].startswith("inferred: ")


def test_compare_fails_with_status_1_where_the_scale_is_another(tmp_path, capsys):
    one = write(tmp_path / "a.onnx")
    two = write(tmp_path / "b.onnx", half=np.float32(0.6))
    assert main(["compare", str(one), str(two), "--json"]) == 1
    parity = json.loads(capsys.readouterr().out)["parity"]
    assert parity["max_abs_diff"] > parity["tolerance"]


def test_compare_with_inputs_of_ones_own(tmp_path, capsys):
    one, two = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx")
    feeds = tmp_path / "feeds.npz"
    np.savez(feeds, given=np.ones((2, 3, 8), np.float32))
    assert main(["compare", str(one), str(two), "--inputs", str(feeds), "--json"]) == 0
    assert "feeds.npz" in json.loads(capsys.readouterr().out)["parity"]["inputs"]


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    path = write(tmp_path / "a.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:99])
    other = write(tmp_path / "other.onnx", ATTENTION.replace("given", "something_else"))
    cases = [
        ["inspect", str(broken), "--json"],
        ["inspect", str(tmp_path / "none.onnx")],
        ["compare", str(path), str(broken)],
        ["compare", str(path)],
        ["compare", str(path), str(other)],
        ["compare", str(path), str(path), "--inputs", str(tmp_path / "none.npz")],
    ]
    for arguments in cases:
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1, printed.err
        assert "expected" in printed.err


def test_unknown_command_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspekt"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_as_a_module(tmp_path):
    path = write(tmp_path / "a.onnx")
    run = subprocess.run(
        [sys.executable, "-m", "helpers", "inspect", str(path), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout)["nodes"] == 22
    assert run.stderr == ""


EXPLAIN = ("--model-type", "bart", "--num-heads", "2", "--hidden-size", "8", "--opt-level", "0")


def test_explain_json_is_one_document(tmp_path, capsys):
    path = write(tmp_path / "a b é.onnx")
    assert main(["explain", str(path), *EXPLAIN, "--json", "--what-if", "--parity"]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, SCHEMA)
    (reason,) = answer["reasons"]
    assert (reason["at"], reason["found"], reason["cause"]) == (
        "n_softmax",
        "n_scale",
        "extra_node",
    )
    assert answer["parity"]["held"]
    assert [row["opt_level"] for row in answer["what_if"]] == [1, 2, 99]


def test_explain_text_and_what_is_around_the_break(tmp_path, capsys):
    path, cut = write(tmp_path / "a.onnx"), tmp_path / "cut.onnx"
    assert main(["explain", str(path), *EXPLAIN, "--save", str(cut)]) == 0
    text = capsys.readouterr().out
    assert "BartOnnxModel: 1 site, 0 fused, 1 reason" in text
    assert len(text.splitlines()) <= 40
    assert main(["inspect", str(cut), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operators"]["Softmax"] == 1


def test_explain_fails_with_status_1_where_a_fusion_is_wrong(tmp_path, capsys):
    """FusionAttention takes the scale to be that of the heads' width, whatever the graph has."""
    text = ATTENTION.replace("Add (bq, q0)", "Add (q0, bq)").replace(
        "[n_k_heads] k1 = Reshape (k0, heads)",
        "[n_kb] kb = Add (k0, bv) [n_k_heads] k1 = Reshape (kb, heads)",
    )
    path = write(tmp_path / "a.onnx", text.replace("Mul (s0, half)", "Div (s0, half)"))
    options = ("--model-type", "bert", "--num-heads", "2", "--hidden-size", "8", "--opt-level", "0")
    assert main(["explain", str(path), *options, "--json", "--parity"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [(s["fused"], s["wrong"]) for s in answer["sites"]] == [(True, True)]
    assert not answer["parity"]["held"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--model-type", "brat"), "model type brat: expected one of bart, bert, "),
        ((*EXPLAIN[:2], "--num-heads", "3", "--hidden-size", "8"), "multiple of the 3 heads"),
        ((), "expected one of --model-type, --fusion, --rules and --suggest, found none"),
        (("--fusion", "none.py:A"), "none.py:A: expected FILE.py:CLASS, found no file"),
    ],
)
def test_explain_refuses_bad_options(tmp_path, capsys, given, message):
    path = str(write(tmp_path / "a.onnx"))
    try:
        status = main(["explain", path, *given])
    except SystemExit as left:
        status = left.code
    assert status == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
