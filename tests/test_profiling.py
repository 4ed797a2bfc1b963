"""Time by operator, and products against bare ones. Never absolute times."""

import numpy as np
import pandas as pd
import pytest
from graphs import write
from test_benchmark import ARRAYS, TEXT

from helpers import files, profiling


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path / "tiny.onnx", TEXT)


def test_lists_the_operators_and_products(tiny):
    found = profiling.profile(tiny, ARRAYS, runs=2, threads=1)
    assert list(found.operators) == ["nodes", "milliseconds", "share"]
    assert dict(found.operators.nodes) == {"MatMul": 2, "Softmax": 1}
    assert found.operators.share.sum() == pytest.approx(1)
    assert found.operators.milliseconds.is_monotonic_decreasing
    assert list(found.products.index) == [("MatMul", "1×2×8×8")]
    (row,) = found.products.to_dict("records")
    assert row["nodes"] == 2
    assert row["GFLOP/s"] == pytest.approx(2 * 2 * 2 * 8 * 8 / row["milliseconds"] / 1e6)
    assert row["of peak"] == pytest.approx(row["GFLOP/s"] / found.peak)
    assert row["of peak"] < 1
    assert found.share == pytest.approx(found.operators.share["MatMul"])
    assert found.of_peak == pytest.approx(row["of peak"])
    assert found.describe().startswith(f"{found.share:.0%} of the time is in products")


def test_a_branch_counts_once(tmp_path):
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
    found = profiling.profile(path, ARRAYS | {"cond": np.array(True)}, runs=1, threads=1)
    assert dict(found.operators.nodes) == {"Softmax": 1}
    assert found.products.empty
    assert found.share == 0
    assert found.describe() == "no time is in products or convolutions"


def test_what_does_not_run(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("no model")
    with pytest.raises(files.BadInput, match=r"a\.onnx: expected a model that runs .* found: "):
        profiling.profile(path, ARRAYS)


CASES = {  # operator, shapes of its inputs and of its output, heads: batch, rows, inner, columns
    "packed weight": ("MatMul", [[2, 5, 8]], [2, 5, 3], 0, [(1, 10, 8, 3)]),
    "weight": ("MatMul", [[2, 5, 8], [8, 3]], [2, 5, 3], 0, [(1, 10, 8, 3)]),
    "scores": ("MatMul", [[2, 4, 5, 8], [2, 4, 8, 7]], [2, 4, 5, 7], 0, [(8, 5, 8, 7)]),
    "transposed": ("FusedMatMul", [[2, 4, 8, 5], [2, 4, 8, 7]], [2, 4, 5, 7], 0, [(8, 5, 8, 7)]),
    "broadcast": ("MatMul", [[5, 8], [4, 8, 7]], [4, 5, 7], 0, [(4, 5, 8, 7)]),
    "gemm": ("Gemm", [[8, 5], [8, 3], [3]], [5, 3], 0, [(1, 5, 8, 3)]),
    "int8": ("DynamicQuantizeMatMul", [[1, 5, 8], [], [], [3]], [1, 5, 3], 0, [(1, 5, 8, 3)]),
    "conv": ("Conv", [[2, 6, 20], [9, 6, 3]], [2, 9, 18], 0, [(2, 18, 18, 9)]),
    "grouped": ("Conv", [[2, 6, 20], [9, 2, 3]], [2, 9, 18], 0, [(6, 18, 6, 3)]),
    "a vector": ("MatMul", [[8], [8, 3]], [3], 0, []),
    "nothing": ("MatMul", [[0, 5, 8], [8, 3]], [0, 5, 3], 0, []),
    "no product": ("Add", [[2, 5], [5]], [2, 5], 0, []),
    "Attention": (
        *("Attention", [[2, 5, 12], [36]], [2, 5, 12], 3),
        [(1, 10, 12, 36), (6, 5, 4, 5), (6, 5, 5, 4)],
    ),
    "MultiHeadAttention": (
        *("MultiHeadAttention", [[2, 5, 12], [2, 7, 12], [2, 7, 12], [36]], [2, 5, 12], 3),
        [(6, 5, 4, 7), (6, 5, 7, 4)],
    ),
    "opset 23": (
        *("Attention", [[2, 3, 5, 4], [2, 3, 7, 4], [2, 3, 7, 6]], [2, 3, 5, 6], 0),
        [(6, 5, 4, 7), (6, 5, 7, 6)],
    ),
    "heads unknown": ("MultiHeadAttention", [[2, 5, 12], [2, 7, 12]], [2, 5, 12], 0, []),
}


@pytest.mark.parametrize("case", CASES)
def test_products_of_an_operator(case):
    operator, reads, writes, heads, expected = CASES[case]
    arguments = {
        "op_name": operator,
        "input_type_shape": [{"float": shape} for shape in reads],
        "output_type_shape": [{"float": writes}],
    }
    assert list(profiling.products({"args": arguments}, heads)) == expected


def test_flops():
    assert profiling.Product(2, 3, 5, 7).flops == 2 * 2 * 3 * 5 * 7


def test_plot():
    columns = {"nodes": [6, 1, 1], "milliseconds": [6.0, 3.0, 1.0], "share": [0.6, 0.3, 0.1]}
    table = pd.DataFrame(columns, index=pd.Index(["MatMul", "Conv", "Softmax"], name="operator"))
    keys = pd.MultiIndex.from_tuples([("MatMul", "1×2×3×4")], names=["operator", "shape"])
    products = pd.DataFrame({"milliseconds": [6.0], "of peak": [0.5]}, index=keys)
    both = {
        "unfused": profiling.Profile(table, products, 100.0),
        "no Conv": profiling.Profile(table.drop("Conv"), products, 100.0),
    }
    plot = profiling.plot(both, top=2)
    plot.figure.draw_without_rendering()
    assert both["no Conv"].describe() in plot.text
    first, second = plot.figure.axes
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["MatMul", "Conv", "other"]
    assert [bar.get_width() for bar in first.patches] == [6, 3, 1, 3, 0, 0]
    assert [bar.get_width() for bar in second.patches] == [6, 0, 1, 3, 0, 0]
    assert [text.get_text() for text in first.texts] == ["60%", "30%", "10%"]
    assert second.get_title() == "no Conv"
