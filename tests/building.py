"""Small graphs built in a test: attention over ids or hidden states, right and wrong on purpose."""

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from helpers import feeds, parity

WIDTH, HEADS, HEAD, WORDS = 16, 2, 8, 30
LOWEST = float(np.finfo(np.float32).min)
Value = Any  # the name of a value, or what becomes a constant: a number, a list, an array


class Graph:
    """A graph in the making. An operator is a method of its name: `g.MatMul(a, b)`.

    What it is given are names of values, or numbers and arrays, which become constants: int64,
    float32 or the array's own type. With `fused`, `scored` is the standard Attention.
    """

    def __init__(self, fused: bool = False, root: "Graph | None" = None) -> None:
        self.fused = fused
        self.root = root or self
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.count = 0

    def given(self, name: str, dtype: Any, *dims: int | str) -> str:
        """An input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, _type(dtype), dims))
        return name

    def gives(self, name: str, value: Value, *dims: int | str, dtype: Any = np.float32) -> None:
        """An output of the graph."""
        self.nodes.append(helper.make_node("Identity", [self.constant(value)], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, _type(dtype), dims))

    def constant(self, value: Value, name: str = "") -> str:
        """The name of a value, or of the constant that is made of it. None is no input."""
        if value is None or isinstance(value, str):
            return value or ""
        array = np.asarray(value)
        array = array.astype(np.float32) if isinstance(value, float) else array
        name = name or f"c{zlib.crc32(array.tobytes() + f'{array.dtype}{array.shape}'.encode())}"
        self.root.constants[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, *shape: int, scale: float = 0.0) -> str:
        """Normal numbers, seeded by their name."""
        random = np.random.default_rng(zlib.crc32(name.encode()))
        array = random.normal(size=shape) * (scale or 1.3 / np.sqrt(shape[0]))
        return self.constant(array.astype(np.float32), name)

    def op(self, kind: str, *inputs: Value, outputs: int = 1, domain: str = "", **more: Any) -> Any:
        """Add a node; the name of its output, or a list of several."""
        self.root.count += 1
        number = self.root.count
        names = [f"v{number}_{i}" for i in range(outputs)]
        read = [self.constant(value) for value in inputs]
        label = more.pop("name", f"{kind}_{number}")
        self.nodes.append(helper.make_node(kind, read, names, label, domain=domain, **more))
        return names if outputs > 1 else names[0]

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        if not kind[0].isupper():
            raise AttributeError(kind)
        return partial(self.op, kind)

    def branch(self, condition: str, then: Callable, other: Callable, outputs: int = 1) -> Any:
        """An If, whose branches are built by functions of a graph."""
        bodies = []
        for build in (then, other):
            body = Graph(self.fused, self.root)
            values = build(body)
            values = [values] if isinstance(values, str) else values
            names = [body.Identity(value) for value in values]
            ends = [helper.make_empty_tensor_value_info(name) for name in names]
            bodies.append(helper.make_graph(body.nodes, "body", [], ends))
        return self.If(condition, outputs=outputs, then_branch=bodies[0], else_branch=bodies[1])

    # ── Lengths and positions ───────────────────────────────────────────────────────────────────

    def length(self, value: str, axis: int) -> str:
        """The size of one axis, as a number."""
        return self.Gather(self.Shape(value), axis)

    def positions(self, count: Value, axis: int) -> str:
        """0, 1, 2, …, as a row (axis 0) or a column (axis 1)."""
        return self.Unsqueeze(self.Range(0, count, 1), [axis])

    def pairs(self, x: str) -> tuple[str, str]:
        """Positions of queries, (n, 1), and of keys, (1, n)."""
        count = self.length(x, 1)
        return self.positions(count, 1), self.positions(count, 0)

    # ── Attention ───────────────────────────────────────────────────────────────────────────────

    def embedded(self, ids: str) -> str:
        return self.Gather(self.weight("words", WORDS, WIDTH, scale=1.0), ids)

    def heads(self, x: str, name: str) -> str:
        """A projection with a bias, (batch, heads, n, width of a head)."""
        product = self.MatMul(x, self.weight(name, WIDTH, WIDTH))
        biased = self.Add(product, self.weight(f"{name}_bias", WIDTH, scale=0.1))
        return self.Transpose(self.Reshape(biased, [0, 0, HEADS, HEAD]), perm=[0, 2, 1, 3])

    def scored(
        self,
        q: str,
        k: str,
        v: str,
        *,
        bias: str | None = None,
        keep: str | None = None,
        scale: float = HEAD**-0.5,
    ) -> str:
        """softmax(scale · q·kᵀ + bias)·v, where `keep` is True: all (batch, heads, n, ·)."""
        if self.fused:
            mask = bias or keep
            if bias and keep:
                mask = self.Add(bias, self.Where(keep, 0.0, LOWEST))
            sizes = [self.Unsqueeze(self.length(one, 2), [0]) for one in (q, k)]
            full = mask and self.Expand(mask, self.Concat([1, 1], *sizes, axis=0))
            return self.Attention(q, k, v, full, scale=scale)
        s = self.Mul(self.MatMul(q, self.Transpose(k, perm=[0, 1, 3, 2])), scale)
        s = self.Add(s, bias) if bias else s
        s = self.Where(keep, s, LOWEST) if keep else s
        return self.MatMul(self.Softmax(s, axis=-1), v)

    def merged(self, heads: str) -> str:
        return self.Reshape(self.Transpose(heads, perm=[0, 2, 1, 3]), [0, 0, WIDTH])

    def attention(
        self,
        x: str,
        memory: str | None = None,
        *,
        name: str = "a",
        turned: Callable[[str, str], str] = lambda value, which: value,
        **masks: Any,
    ) -> str:
        """A layer of attention with its residual; `turned` rotates queries ("q") and keys ("k")."""
        q = turned(self.heads(x, f"{name}q"), "q")
        k = turned(self.heads(memory or x, f"{name}k"), "k")
        v = self.heads(memory or x, f"{name}v")
        context = self.merged(self.scored(q, k, v, **masks))
        return self.Add(x, self.MatMul(context, self.weight(f"{name}o", WIDTH, WIDTH)))

    def penalty(self, mask: str, lowest: float = -1e4) -> str:
        """(1 - mask) · lowest, of a mask (batch, keys): what BERT adds to scores."""
        ones = self.Unsqueeze(self.Cast(mask, to=onnx.TensorProto.FLOAT), [1, 2])
        return self.Mul(self.Sub(1.0, ones), lowest)


Build = Callable[[Graph, str], None]  # of a graph, and of what is wrong in it, if anything is


def save(
    path: Path, build: Build, wrong: str = "", *, fused: bool = False, kind: type[Graph] = Graph
) -> Path:
    """Write what `build` makes, of a graph of `kind`, to `path`."""
    g = kind(fused)
    build(g, wrong)
    made = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, [*g.constants.values()])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    return path


def compared(folder: Path, build: Build, *wrong: str) -> parity.Report:
    """`build`'s graph compared with itself fused, and with each of the `wrong` ones."""
    reference = save(folder / "a.onnx", build)
    others = [save(folder / "fused.onnx", build, fused=True)]
    others += [save(folder / f"{one}.onnx", build, one) for one in wrong]
    return parity.compare(reference, others, *feeds.infer(reference))


def found(folder: Path, build: Build, *wrong: str) -> str:
    """Assert that the fused graph holds and each `wrong` one does not; what is said of inputs."""
    report = compared(folder, build, *wrong)
    held = {Path(one.name).stem: one.held for one in report.candidates}
    assert held == {"fused": True} | dict.fromkeys(wrong, False), str(report)
    return report.inputs


def _type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
