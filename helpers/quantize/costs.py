"""What it costs the whole result to round one layer alone.

One graph has each layer twice, and its own input that says which of them is rounded:

    node(X, W)  →  If(rounded == its number, node(rounded X, rounded W), node(X, W))

X is rounded to 256 steps of its range, as DynamicQuantizeLinear does; with 4 bits, not at all. On
all-MiniLM-L6-v2 the squares of these errors add up to that of all layers rounded at once: 0.121²
against 0.126².
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from helpers import files, parity
from helpers.quantize import measuring
from helpers.quantize.layers import Layer

NUMBER = "number_of_the_rounded_layer"


def alone(
    base: Path, layers: Sequence[Layer], cases: Sequence[parity.Case], bits: int
) -> dict[str, float]:
    """The error of the prepared graph `base` with one of its `layers` rounded, by its name."""
    model = ir.load(base)
    number = ir.val(NUMBER, ir.DataType.INT64, [])
    model.graph.inputs.append(number)
    nodes = {node.name: node for node in model.graph}
    for at, layer in enumerate(layers):
        _twice(model.graph, nodes[layer.name], number, at, bits)
    path = base.with_name("each_layer_twice.onnx")
    files.write(model, path)
    del model, nodes
    with measuring.running(path, "cpu") as run:

        def with_rounded(at: int) -> measuring.Run:
            chosen = {NUMBER: np.array(at, np.int64)}
            return lambda arrays: run(arrays | chosen)

        return {
            layer.name: measuring.error(with_rounded(at), cases)[0]
            for at, layer in enumerate(layers)
        }


def _twice(inside: ir.Graph, node: ir.Node, number: ir.Value, at: int, bits: int) -> None:
    """Put the If in place of `node`."""
    given, weight, *rest = node.inputs
    array = weight.const_value.numpy()
    rounded = round_columns(array) if bits == 8 else round_blocks(array)
    other = _constant(inside, f"{node.name}_rounded", rounded.astype(np.float32))
    own = _constant(inside, f"{node.name}_number", np.array(at, np.int64))
    equal = ir.node("Equal", [number, own], name=f"{node.name}_is_rounded")
    equal.outputs[0].name = f"{node.name}_is_rounded"
    branches = []
    for which in (True, False):
        body = [*_rounding(given)] if which and bits == 8 else []
        read = body[-1].outputs[0] if body else given
        inputs = [read, other if which else weight, *rest]
        attributes = [*node.attributes.values()]
        body.append(ir.Node(node.domain, node.op_type, inputs, attributes))
        for value in (value for inner in body for value in inner.outputs):
            value.name = f"{node.name}_{which}_{value.producer().op_type}_{value.index()}"
        branches.append(ir.Graph([], body[-1].outputs[:1], nodes=body, name="body"))
    choice = ir.node(
        "If",
        equal.outputs,
        {"then_branch": branches[0], "else_branch": branches[1]},
        name=f"{node.name}_twice",
    )
    old, new = node.outputs[0], choice.outputs[0]
    new.type, new.shape = old.type, old.shape
    inside.insert_before(node, [equal, choice])
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name = old.name
    inside.remove(node, safe=True)
    new.name = name


def _constant(inside: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    inside.register_initializer(value)
    return value


def _rounding(given: ir.Value) -> Iterator[ir.Node]:
    """Nodes whose last gives X, rounded."""
    to_bytes = ir.node("DynamicQuantizeLinear", [given], num_outputs=3)
    yield to_bytes
    yield ir.node("DequantizeLinear", [*to_bytes.outputs])


def round_columns(weight: np.ndarray) -> np.ndarray:
    """To seven bits with a sign, a scale for each column: as `cpu.dynamically` has it."""
    scale = np.abs(weight).max(axis=0) / 64
    scale[scale == 0] = 1
    return np.clip(np.round(weight / scale), -64, 64) * scale


def round_blocks(weight: np.ndarray, block: int = 32) -> np.ndarray:
    """To four bits with a sign, a scale for each `block` of a column's numbers."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, -rows % block), (0, 0))).reshape(-1, block, columns)
    scale = np.abs(padded).max(axis=1, keepdims=True) / 8
    scale[scale == 0] = 1
    rounded = np.clip(np.round(padded / scale), -8, 7) * scale
    return rounded.reshape(-1, columns)[:rows]
