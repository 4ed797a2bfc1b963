"""The layers of a graph, its products by weights: found, and what rounding costs each of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from helpers import files, graph
from helpers.fuse.pipeline import convert
from helpers.graph import external
from helpers.parity import precision

logger = logging.getLogger(__name__)

AT_ONCE = 32  # inputs of layers that are in memory together
ROWS = 512  # of a layer's input, at most, on which its error is measured
_SAME_WEIGHT = {"Cast", "Identity", "Squeeze", "Transpose", "Unsqueeze"}


class Layer(NamedTuple):
    """A product by a weight, X (…, inputs) · W (inputs, outputs): a node by `name`, its `operator`,
    and the names of X and of the initializer W."""

    name: str
    operator: str
    given: str
    weight: str


def prepare(source: str | Path | files.Opened, path: Path, *, latest: bool = False) -> list[Layer]:
    """Write the graph of `source` to `path` in the form that tools quantise, and return its layers.

    Each node has a name of its own, the input's where it had one; weights are initializers; a Gemm
    is a MatMul and an Add. With `latest`, it is brought to the opset that `fuse` writes.
    """
    model = graph.load(Path(source))
    external.bring_in(model, up_to=graph.LEFT_OUT_ABOVE)
    for node in graph.nodes(model):
        node.name = graph.name(node)
    if latest:
        convert(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    most = 2**31  # elements: all weights
    optimizer.fold_constants(
        model, input_size_limit=most, output_size_limit=most, should_fold=_reshapes_weight
    )
    for node in [*model.graph]:
        if node.op_type == "Gemm" and node.domain in graph.STANDARD:
            _apart(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)
    found = [*_layers(model)]
    files.write(model, path)
    return found


def _reshapes_weight(node: ir.Node) -> bool:
    return node.op_type in _SAME_WEIGHT and all(map(_is_weight, node.inputs[:1]))


def _is_weight(value: ir.Value | None) -> bool:
    """Whether it is an initializer, and no input that has a default."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _apart(inside: ir.Graph, gemm: ir.Node) -> None:
    """Gemm(x, weight, bias) → Add(MatMul(x, weight), bias), where it is no more than that."""
    given, weight, *rest = gemm.inputs
    bias = rest[0] if rest else None
    factors = [gemm.attributes.get_float("alpha", 1.0)]
    factors += [gemm.attributes.get_float("beta", 1.0)] if bias is not None else []
    if gemm.attributes.get_int("transA", 0) or {*factors} != {1.0} or not _is_weight(weight):
        return
    if gemm.attributes.get_int("transB", 0):
        name = f"{weight.name}_turned"
        if name not in inside.initializers:
            turned = np.ascontiguousarray(weight.const_value.numpy().T)
            inside.register_initializer(
                ir.Value(name=name, const_value=ir.tensor(turned, name=name))
            )
        weight = inside.initializers[name]
    old = gemm.outputs[0]
    nodes = [ir.node("MatMul", [given, weight], name=gemm.name)]
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=f"{gemm.name}_bias"))
        nodes[0].outputs[0].name = f"{old.name}_product"
        nodes[0].outputs[0].dtype = old.dtype
    new = nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    inside.insert_before(gemm, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name = old.name
    inside.remove(gemm, safe=True)
    new.name = name


def _layers(model: ir.Model) -> Iterator[Layer]:
    """The products by float32 weights of the main graph, those in com.microsoft's Attention too."""
    for node in model.graph:
        operator = graph.operator(node)
        if operator not in ("MatMul", f"{graph.MICROSOFT}.Attention"):
            continue
        if operator != "MatMul" and "qkv_hidden_sizes" in node.attributes:
            continue  # ONNX Runtime's QAttention has queries, keys and values of one width
        given, weight = node.inputs[:2]
        if not _is_weight(weight) or _is_weight(given) or weight.dtype != ir.DataType.FLOAT:
            continue
        if weight.shape is not None and len(weight.shape) == 2:
            yield Layer(node.name, operator, given.name, weight.name)


def own_errors(
    base: Path, layers: Sequence[Layer], feeds: Sequence[Mapping[str, np.ndarray]], bits: int
) -> dict[str, float]:
    """What rounding costs each layer by itself, by name: the root of the mean squared difference of
    X · W with X and W rounded from X · W, on the float inputs X that `feeds` give it, relative to
    its standard deviation.

    X has one scale, and W one for each column (8 bits); or W alone is rounded, in blocks (4 bits).
    """
    weights = ir.load(base).graph.initializers
    errors = {}
    for start in range(0, len(layers), AT_ONCE):
        some = layers[start : start + AT_ONCE]
        inputs = _inputs(base, {layer.given for layer in some}, feeds)
        for layer in some:
            given, low, high = inputs[layer.given]
            weight = weights[layer.weight].const_value.numpy()
            exact = given @ weight
            if bits == 8:
                rounded = round_inputs(given, low, high) @ round_columns(weight)
            else:
                rounded = given @ round_blocks(weight)
            gap = np.sqrt(np.mean((rounded - exact) ** 2))
            errors[layer.name] = float(gap / (precision.spread(exact) or 1.0))
    return errors


def _inputs(
    base: Path, names: set[str], feeds: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, tuple[np.ndarray, float, float]]:
    """By name: rows of the tensor (rows, inputs), evenly spaced, and its range in all rows."""
    model = ir.load(base)
    own = {value.name for value in model.graph.outputs}
    given = {value.name for value in model.graph.inputs}
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in sorted(names - own - given))
    path = base.with_name("inputs.onnx")
    files.write(model, path)
    session = files.session(path)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    wanted = sorted(names - given)
    most = max(1, ROWS // len(feeds))
    for feed in feeds:
        found = dict(zip(wanted, session.run(wanted, feed), strict=True)) if wanted else {}
        for name in names:
            array = found.get(name, feed.get(name))
            flat = array.reshape(-1, array.shape[-1])
            if not flat.size:
                continue
            low[name] = min(low[name], float(flat.min()))
            high[name] = max(high[name], float(flat.max()))
            rows[name].append(flat[:: max(1, len(flat) // most)][:most])
    return {name: (np.concatenate(rows[name]), low[name], high[name]) for name in names}


def round_inputs(given: np.ndarray, low: float, high: float) -> np.ndarray:
    """To 256 steps from `low` to `high`, of which 0 is one: as DynamicQuantizeLinear does."""
    scale = (high - low) / 255 or 1.0
    zero = np.round(-low / scale)
    return (np.clip(np.round(given / scale) + zero, 0, 255) - zero) * np.float32(scale)


def round_columns(weight: np.ndarray) -> np.ndarray:
    """To seven bits with a sign, a scale for each column: as `cpu.dynamic` has it."""
    scale = np.abs(weight).max(axis=0) / 64
    scale[scale == 0] = 1
    return np.clip(np.round(weight / scale), -64, 63) * scale


def round_blocks(weight: np.ndarray, block: int = 32) -> np.ndarray:
    """To four bits with a sign, a scale for each `block` of a column's numbers."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, -rows % block), (0, 0))).reshape(-1, block, columns)
    scale = np.abs(padded).max(axis=1, keepdims=True) / 8
    scale[scale == 0] = 1
    rounded = np.clip(np.round(padded / scale), -8, 7) * scale
    return rounded.reshape(-1, columns)[:rows]
