"""The layers of a graph: its products by weights, in the form that tools quantise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from helpers import files, graph
from helpers.fuse.pipeline import convert
from helpers.graph import external

_GROWS = {"ConstantOfShape", "Expand", "Range", "Tile"}  # what it gives may be far larger


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
        model, input_size_limit=most, output_size_limit=most, should_fold=_makes_weight
    )
    for node in [*model.graph]:
        if node.op_type == "Gemm" and node.domain in graph.STANDARD:
            _apart(model.graph, node)
        elif graph.operator(node) == f"{graph.MICROSOFT}.Attention":
            _give_bias(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)
    found = [*_layers(model)]
    files.write(model, path)
    return found


def _makes_weight(node: ir.Node) -> bool:
    """Whether it computes a weight of others, as a normalised convolution does."""
    given = [value for value in node.inputs if value is not None]
    return bool(given) and node.op_type not in _GROWS and all(map(_is_weight, given))


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
            inside.register_initializer(ir.val(name, const_value=ir.tensor(turned, name=name)))
        weight = inside.initializers[name]
    old = gemm.outputs[0]
    nodes = [ir.node("MatMul", [given, weight], name=gemm.name)]
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=f"{gemm.name}_bias"))
        nodes[0].outputs[0].name = f"{old.name}_product"
        if old.dtype is not None:
            nodes[0].outputs[0].dtype = old.dtype
    new = nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    inside.insert_before(gemm, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name = old.name
    inside.remove(gemm, safe=True)
    new.name = name


def _give_bias(inside: ir.Graph, node: ir.Node) -> None:
    """Give com.microsoft's Attention a bias of zeros where it has none: QAttention needs one."""
    inputs = [*node.inputs, None][:3]
    weight = inputs[1]
    if inputs[2] is not None or not _is_weight(weight) or weight.dtype != ir.DataType.FLOAT:
        return
    name = f"{weight.name}_no_bias"
    if name not in inside.initializers:
        zeros = ir.tensor(np.zeros(weight.const_value.shape[-1], np.float32), name=name)
        inside.register_initializer(ir.val(name, const_value=zeros))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, inside.initializers[name])


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
