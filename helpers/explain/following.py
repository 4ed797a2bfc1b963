"""What follows an operator that is right, and where that is wrong: a projection that was dropped or
is applied twice, a result that lies in another order.

Each tensor after the operator is held against those that the original has after its site, by its
numbers alone: a Reshape changes none of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from helpers import graph
from helpers.explain.got import rounding

Values = dict[str, np.ndarray]
_LISTED = 4  # nodes that a line names


def lines(
    name: str,
    result: np.ndarray,
    nodes: Sequence[onnx.NodeProto],
    fused: Values,
    after: Sequence[ir.Node],
    original: Values,
    lacking: float = 0.0,
) -> list[str]:
    """What is wrong after the operator called `name`, whose own `result` is right; nothing where
    all is right to within rounding.

    `nodes` are those that follow it, in order, and `after` the product with the values in the
    original and those that follow that, with the values of both; `lacking` is which part of the
    rows has no key, and so no one value.
    """
    tensors = [original[node.outputs[0].name] for node in after]
    found = [i for i, other in enumerate(tensors) if _same(result, other, lacking)]
    if not found:  # (B, S, N·V), and the original has (B, N, S, V) in another order after its site
        rest = _listed(after[1:])
        return [f"{name} is right, and gives all heads as (B, S, N·V); the original has {rest}"]
    reached = found[-1]
    for node in nodes:
        array = fused[node.output[0]]
        if array.dtype.kind != "f":
            continue  # a shape
        same = [i for i, other in enumerate(tensors) if _same(array, other, lacking)]
        if not same:
            return [_fault(name, node, array, nodes, after, tensors, reached, lacking)]
        reached = max(reached, *same)
    if reached + 1 < len(after):
        return [f"{name} is right; what follows leaves out {_listed(after[reached + 1 :])}"]
    return []


def _fault(
    name: str,
    node: onnx.NodeProto,
    array: np.ndarray,
    nodes: Sequence[onnx.NodeProto],
    after: Sequence[ir.Node],
    tensors: Sequence[np.ndarray],
    reached: int,
    lacking: float,
) -> str:
    """What `node` is, the first whose result, `array`, the original has nowhere."""
    label = f"{node.op_type} {node.name or node.output[0]}"
    for other, tensor in zip(after, tensors, strict=True):
        orders = itertools.permutations(range(tensor.ndim)) if tensor.size == array.size else ()
        if any(_same(array, tensor.transpose(order), lacking) for order in orders):
            return f"{name} is right; {label} gives {_listed([other])} transposed"
    passed = after[1 : reached + 1]
    if any(one.op_type == node.op_type and _reads_the_same(one, node) for one in passed):
        return f"{name} is right; {label}, after it, is applied twice"
    rest = after[reached + 1 :]
    named = [i for i, one in enumerate(rest) if one.outputs[0].name == node.output[0]]
    alike = [i for i, one in enumerate(rest) if one.op_type == node.op_type]
    till = next(iter(named + alike), len(rest))
    there = {one.op_type for one in nodes[: nodes.index(node)]}
    left_out = [one for one in rest[:till] if one.op_type not in there]
    if left_out:
        return f"{name} is right; what follows leaves out {_listed(left_out)}, before {label}"
    return (
        f"{name} is right; {label}, after it, gives what the original has nowhere, which goes on"
        f" with {_listed(rest)}"
    )


def _reads_the_same(one: ir.Node, node: onnx.NodeProto) -> bool:
    """Whether both read one tensor, such as the weight of a projection."""
    return not {value.name for value in one.inputs if value is not None}.isdisjoint(node.input)


def _listed(nodes: Sequence[ir.Node]) -> str:
    names = [f"{node.op_type} {graph.name(node)}" for node in nodes[:_LISTED]]
    return ", ".join(names) + (" …" if len(nodes) > _LISTED else "")


def _same(array: np.ndarray, other: np.ndarray, lacking: float) -> bool:
    """Whether both have the same numbers in the same order, but for the rows `lacking` a key."""
    if array.size != other.size or other.dtype.kind != "f":
        return False
    most = rounding(array, other) * (np.abs(other).max(initial=0.0) or 1.0)
    close = np.abs(array.ravel() - other.ravel()) <= most
    return bool(close.mean() >= 1 - lacking - 1e-9)
