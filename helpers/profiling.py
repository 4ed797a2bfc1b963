"""Where the time goes in a model, and how far its products are from this machine's peak."""

import contextlib
import json
import math
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx

from helpers import files, graph
from helpers.plots import WIDTH, Plot
from helpers.workers import runtimes
from helpers.workers.worker import Failed, Worker

if TYPE_CHECKING:
    import pandas

TIMEOUT = 300  # seconds for all runs of a model, and for all bare products

MATRICES = {
    *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat"),
    *("DynamicQuantizeMatMul", "MatMulNBits"),
}
CONVOLUTIONS = {"Conv", "FusedConv"}
ATTENTION = {"Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention"}


class Product(NamedTuple):
    """`batch` products of a (rows, inner) matrix with an (inner, columns) one: 2·b·r·i·c flops."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * math.prod(self)


LARGE = Product(1, 1024, 1024, 1024)  # at which bare products come near the peak


@dataclass(frozen=True)
class Profile:
    """What `profile` measured; times are medians over its runs.

    `operators` has a row for each operator, the slowest first: its `nodes`, `milliseconds` in one
    run, and its `share` of their sum, 0 to 1. They are those that the session ran, which fuses by
    itself; what is in the file, `graph.counts` tells. An If or a Loop counts as the operators in
    it. `products` has a row for each operator and shape that is a product or a convolution:
    `nodes`, `milliseconds`, the rate `GFLOP/s`, and what that is `of peak`. `peak` is the best rate
    in GFLOP/s that a bare fp32 product reached, of `LARGE` and of all shapes in `products`; only
    products in 8 bits or bf16 are above it.
    """

    operators: "pandas.DataFrame"
    products: "pandas.DataFrame"
    peak: float

    @property
    def share(self) -> float:
        """The share of the time that is in products and convolutions, 0 to 1.

        Of an operator of attention all the time is counted, its softmax included.
        """
        return float(self.products.milliseconds.sum() / self.operators.milliseconds.sum())

    @property
    def of_peak(self) -> float:
        """The rate of all of them together, as a part of `peak`; NaN of none."""
        if self.products.empty:
            return math.nan
        at_peak = (self.products["of peak"] * self.products.milliseconds).sum()
        return float(at_peak / self.products.milliseconds.sum())

    def describe(self) -> str:
        """What is left to gain, in one sentence."""
        if self.products.empty:
            return "no time is in products or convolutions"
        return (
            f"{self.share:.0%} of the time is in products and convolutions, at"
            f" {self.of_peak:.0%} of the best rate of a bare fp32 product here"
        )


def profile(
    path: str | Path, arrays: Mapping[str, np.ndarray], *, runs: int = 5, threads: int = 2
) -> Profile:
    """Time by operator in the model at `path`, and its products against this machine's peak rate.

    By ONNX Runtime's own profiler, in a process of its own. Raises `files.BadInput` where the model
    does not run on `arrays`.
    """
    import pandas as pd

    path = Path(path).absolute()
    asked = {"path": str(path), "runs": runs}
    events = _asked("helpers.profiling:recorded", asked, arrays, threads, path)
    heads = {
        graph.name(node): node.attributes.get_int(attribute, 0)
        for node in graph.nodes(graph.load(path, weights=False))
        for attribute in ("num_heads", "q_num_heads")
        if attribute in node.attributes
    }
    nodes = pd.DataFrame(
        {
            "run": event["run"],
            "node": (event["name"], event["args"]["node_index"]),
            "operator": event["args"]["op_name"],
            "milliseconds": event["dur"] / 1000,
            "shape": products(event, heads.get(event["name"].removesuffix("_kernel_time"), 0)),
        }
        for event in events
        if event["args"]["op_name"] not in ("If", "Loop", "Scan")
    )
    operators = _by(nodes, ["operator"])
    operators["share"] = operators.milliseconds / operators.milliseconds.sum()
    heavy = _by(nodes[nodes["shape"].map(len) > 0], ["operator", "shape"])
    shapes = {shape for row in heavy.index.get_level_values("shape") for shape in row}
    shapes = sorted({*shapes, LARGE})
    seconds = _asked("helpers.profiling:bare", {"shapes": shapes}, {}, threads, path)
    peak = max(shape.flops / least for shape, least in zip(shapes, seconds, strict=True)) / 1e9
    flops = [sum(product.flops for product in row) * n for (_, row), n in heavy.nodes.items()]
    heavy["GFLOP/s"] = np.divide(flops, 1e6) / heavy.milliseconds
    heavy["of peak"] = heavy["GFLOP/s"] / peak
    named = [(op, " + ".join("×".join(map(str, s)) for s in row)) for op, row in heavy.index]
    heavy.index = pd.MultiIndex.from_tuples(
        named, names=["operator", "batch × rows × inner × columns"]
    )
    return Profile(operators, heavy, peak)


def _by(nodes: "pandas.DataFrame", keys: list[str]) -> "pandas.DataFrame":
    """The number of nodes and the milliseconds in one run, the slowest first."""
    table = nodes.groupby(keys).node.nunique().to_frame("nodes")
    by_run = nodes.groupby(["run", *keys]).milliseconds.sum().unstack("run", fill_value=0)
    table["milliseconds"] = by_run.median(axis=1)
    return table.sort_values("milliseconds", ascending=False)


def products(event: Mapping, num_heads: int) -> tuple[Product, ...]:
    """The products that an operator of ONNX Runtime's profile computed, read off its shapes.

    Empty for what is none, or whose shapes do not tell. A weight that the session has packed has no
    shape there any more, so as little as can be is read off the second input. A convolution is
    the product that it can be computed as (im2col, Chellapilla et al. 2006); an operator of
    attention its projections, if they are in it, and the products with keys and with values.
    """
    operator = event["args"]["op_name"]
    reads, writes = (
        [
            next(iter(shapes_by_type.values()), [])
            for shapes_by_type in event["args"][f"{side}_type_shape"]
        ]
        for side in ("input", "output")
    )
    first, second, out = ([*reads, [], []][0], [*reads, [], []][1], [*writes, []][0])
    if min(len(first), len(out)) < 2 or 0 in [*first, *second, *out]:
        return ()
    if operator in MATRICES:
        batch = math.prod(out[:-2]) if len(second) > 2 else 1
        inner = first[-1] if first[-2] == out[-2] else first[-2]  # the first may be transposed
        return (Product(batch, math.prod(out[:-1]) // batch, inner, out[-1]),)
    if operator in CONVOLUTIONS and len(second) > 2:
        groups = max(first[1] // second[1], 1)
        inner, columns = math.prod(second[1:]), out[1] // groups
        return (Product(out[0] * groups, math.prod(out[2:]), inner, columns),)
    if operator not in ATTENTION or len(first) not in (3, 4) or (len(first) == 3 and not num_heads):
        return ()
    projections = []
    if len(first) == 4:  # batch, heads, length, width of a head
        heads, length, width = first[0] * first[1], first[2], first[3]
        keys, values = second[2], out[-1]
    else:
        heads, length, width = first[0] * num_heads, first[1], first[2] // num_heads
        keys, values = second[1] if len(second) == 3 else length, out[-1] // num_heads
        if operator in ("Attention", "QAttention") and len(second) != 3:
            bias = next((shape[0] for shape in reads[1:] if len(shape) == 1), 3 * first[2])
            projections = [Product(1, first[0] * length, first[2], bias)]
            width = (bias - values * num_heads) // 2 // num_heads
    return (
        *projections,
        Product(heads, length, width, keys),
        Product(heads, length, keys, values),
    )


def recorded(path: str, runs: int) -> runtimes.Model:
    """For `profile`: a function that gives the events of `runs` runs, as JSON, after two others."""
    model, events = runtimes.profiled(path)

    def record(arrays: runtimes.Arrays) -> runtimes.Arrays:
        for _ in range(2 + runs):
            model(arrays)
        recorded_events = [event for event in events() if event["run"] >= 2]
        return {"answer": np.array(json.dumps(recorded_events))}

    return record


def bare(shapes: list[list[int]]) -> runtimes.Model:
    """For `profile`: a function that gives the least seconds for a bare product of each shape.

    The faster of ONNX Runtime's MatMul, with a weight that it can pack, and of numpy's (OpenBLAS).
    """

    def least(run: Callable[[], object]) -> float:
        seconds: list[float] = []
        while len(seconds) < 4 or sum(seconds) < 0.06:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def one(shape: Product) -> float:
        random = np.random.default_rng(0)
        x = random.random((shape.batch, shape.rows, shape.inner), np.float32)
        w = random.random((shape.batch, shape.inner, shape.columns), np.float32)
        out = np.empty((shape.batch, shape.rows, shape.columns), np.float32)
        given = {"x": x} if shape.batch == 1 else {"x": x, "w": w}
        infos = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape)
            for name, array in {"x": x, "w": w, "y": out}.items()
        ]
        node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
        weights = [onnx.numpy_helper.from_array(w[0], "w")] if shape.batch == 1 else []
        inputs = infos[: len(given)]
        proto = onnx.helper.make_graph([node], "bare", inputs, infos[2:], weights)
        opset = [onnx.helper.make_opsetid("", 17)]
        model = onnx.helper.make_model(proto, opset_imports=opset, ir_version=8)
        threads = runtimes.threads()
        session = files.session(model.SerializeToString(), threads=threads, spin=True)
        return min(least(lambda: session.run(None, given)), least(lambda: np.matmul(x, w, out=out)))

    def measure(_: runtimes.Arrays) -> runtimes.Arrays:
        # Twice: a system may take a second or two to spread the threads of a process over cores.
        passes = [[one(Product(*shape)) for shape in shapes] for _ in range(2)]
        return {"answer": np.array(json.dumps([min(both) for both in zip(*passes, strict=True)]))}

    return measure


def _asked(
    factory: str,
    arguments: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    threads: int,
    path: Path,
) -> Any:
    """What a function above answers in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(factory, arguments, threads, TIMEOUT, Path(folder) / "worker", path)
        with contextlib.closing(worker):
            worker.give(arrays)
            try:
                worker.receive()  # it has loaded
                worker.receive()
            except Failed as failed:
                raise files.BadInput(
                    f"{path}: expected a model that runs on the given arrays, found: {failed};"
                    " check the file and its inputs"
                ) from None
            return json.loads(str(worker.outputs()["answer"]))


def plot(profiles: Mapping[str, Profile], *, top: int = 8) -> Plot:
    """A few graphs, by label, side by side; beyond the `top` operators, "other".

    Bars are milliseconds in one run, the text beside each is its share; the dark part of a bar is
    what its products would take at the peak rate. Without colour, since colours stand for
    contenders.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    times = pd.DataFrame(
        {label: profiled.operators.milliseconds for label, profiled in profiles.items()}
    )
    times = times.fillna(0)
    times = times.loc[times.sum(axis=1).sort_values(ascending=False).index]
    rest = times.iloc[top:].sum()
    times = times.iloc[:top]
    if rest.any():
        times.loc["other"] = rest
    figure = Figure(figsize=(WIDTH, 1.4 + 0.28 * len(times)), layout="constrained")
    panels = figure.subplots(1, len(profiles), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (label, column) in zip(panels, times.items(), strict=True):
        bars = axes.barh(column.index, column, color="lightgrey", edgecolor="black", linewidth=0.5)
        table = profiles[label].products
        at_peak = (table.milliseconds * table["of peak"]).groupby(level="operator").sum()
        least = np.minimum(at_peak.reindex(column.index, fill_value=0), column)
        axes.barh(column.index, least, color="dimgrey", label="products at the peak rate")
        shares = [f"{share:.0%}" if share else "" for share in column / column.sum()]
        axes.bar_label(bars, shares, padding=2, fontsize="small")
        axes.set_title(textwrap.fill(label, 72 // len(profiles)), fontsize="medium")
        axes.margins(x=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[-1].legend(loc="lower right", fontsize="small", frameon=False)
    figure.supxlabel("milliseconds in one run", fontsize="medium")
    told = "; ".join(f"{label}: {profile.describe()}" for label, profile in profiles.items())
    return Plot(figure, f"Milliseconds in one run by operator. {told}.")
