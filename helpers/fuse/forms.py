"""What `attention` recognises around the scores: one function for each form that takes a look."""

from collections.abc import Iterable

import onnx_ir as ir

from helpers import graph
from helpers.graph import walks
from helpers.graph.values import NOTHING, constant, dim, number, rank

_CONDITIONS = {"Cast", "Expand", "Identity", "Not", "Unsqueeze"}  # what a mask goes through


def keeps_scores(node: ir.Node, at: int) -> bool:
    """Whether `node` bounds the scores where none is: at least the lowest number, or the like."""
    bounds = [number(value) for i, value in enumerate(node.inputs) if i != at and value is not None]
    if node.op_type == "Max":
        return None not in bounds and max(bounds) <= NOTHING
    if node.op_type != "Clip" or None in bounds:
        return False
    return all(abs(bound) >= -NOTHING for bound in bounds)


def swapped_in_three(value: ir.Value) -> ir.Value | None:
    """What `value` is with its last two axes exchanged, if they were with the others merged.

    onnxscript writes the transpose of keys as Reshape (B·N, T, D), Transpose, Reshape (B, N, D, T).
    """
    back = value.producer()
    swap = back.inputs[0].producer() if back is not None and back.op_type == "Reshape" else None
    if swap is None or [*(swap.attributes.get_ints("perm") or [])] != [0, 2, 1]:
        return None
    merge = swap.inputs[0].producer()
    if merge is None or merge.op_type != "Reshape" or rank(merge.inputs[0]) != rank(value):
        return None
    inner = merge.inputs[0]
    pairs = [(dim(inner, -1), dim(value, -2)), (dim(inner, -2), dim(value, -1))]
    return inner if all(size == other or None in (size, other) for size, other in pairs) else None


def off_the_top(node: ir.Node) -> bool:
    """Whether `node` takes from the scores their maximum in each row, which changes no weight."""
    top = node.inputs[-1] and node.inputs[-1].producer()
    if top is not None and top.op_type == "Unsqueeze":
        top, keeps = top.inputs[0].producer(), 0
    else:
        keeps = 1
    if node.op_type != "Sub" or top is None or top.op_type != "ReduceMax":
        return False
    axes = top.attributes.get_ints("axes") or constant(top.inputs[1] if top.inputs[1:] else None)
    last = axes is not None and [*axes] in ([-1], [(rank(top.inputs[0]) or 0) - 1])
    return last and top.attributes.get_int("keepdims", 1) == keeps


def unwrapped(condition: ir.Value, holds: bool) -> tuple[ir.Value, bool]:
    """What a condition was made of, and whether it must hold or not."""
    while (node := condition.producer()) is not None and node.op_type in _CONDITIONS:
        holds ^= node.op_type == "Not"
        condition = node.inputs[0]
    return condition, holds


def above(value: ir.Value, within: set[ir.Value]) -> set[ir.Node]:
    """The nodes among those that make `within` that `value` is computed by."""

    def inside(nodes: Iterable[ir.Node]) -> list[ir.Node]:
        return [node for node in nodes if not within.isdisjoint(node.outputs)]

    start = value.producer()
    starts = inside([start] if start is not None else [])
    return {*walks.walk(starts, lambda node: inside(walks.producers(node)))}


def named(softmax: ir.Node) -> str:
    """The operator's name, after the Softmax's, in which the module may be written."""
    name = graph.name(softmax)
    for word, other in (("Softmax", "Attention"), ("softmax", "attention")):
        if word in name:
            return name.replace(word, other)
    return f"{name}/Attention"
