"""How many heads an attention site has, and how wide they are, where shapes are not stated.

The two axes of the queries are followed up to what states their sizes: a Reshape that splits heads
off, a Split or Slice of what is packed, or the weight of a projection. Axes are counted from the
end. Shapes: B batch, N heads, S queries, T keys, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from helpers import graph
from helpers.graph.attention_sites import PRODUCTS
from helpers.graph.values import constant, rank, size

_FAR = 16  # nodes from a product's operand up to its projection, at the most


def heads(site: graph.Site) -> tuple[int, int] | None:
    """How many heads the queries of an unfused `site` have, and the width of each; None where that
    is not known."""
    axes = _axes(site.scores) if site.scores is not None else None
    sizes = [_length(site.scores.inputs[0], axis) for axis in axes or ()]
    return (sizes[0], sizes[1]) if sizes and all(sizes) else None


def options(heads: tuple[int, int]) -> str:
    """The command line's options that say how many `heads` there are, and their width."""
    number, width = heads
    return f"--num-heads {number} --hidden-size {number * width}"


def _axes(scores: ir.Node) -> tuple[int, int] | None:
    """The axes of heads and of their width, of the first operand of a product: of queries (B, N, S,
    D), unless an Einsum has them otherwise."""
    if scores.op_type != "Einsum":
        return -3, -1
    terms, result = graph.equation(scores)
    if len(terms) != 2 or len(result) < 3:
        return None
    query, key = terms
    widths = [letter for letter in query if letter in key and letter not in result]
    number = result[-3]  # of …hqk
    if len(widths) != 1 or number not in query or number == ".":
        return None
    return query.index(number) - len(query), query.index(widths[0]) - len(query)


def _length(value: ir.Value | None, axis: int, far: int = _FAR) -> int | None:
    """How long `axis` of `value` is, not counting a batch that is merged into it."""
    if value is None or far == 0:
        return None
    merged = _rank(value) == 3 and axis in (-2, -3)  # (B·N, S, D) or (S, B·N, D)
    if value.shape is not None and size(value, axis) and not merged:
        return size(value, axis)
    node = value.producer()
    if node is None or not node.inputs:  # a Constant, which a scale is
        return None
    kind, given = node.op_type, node.inputs[0]
    if kind == "Reshape" and not (axis == -3 and len(_sizes(node.inputs[1])) == 3):
        return _reshaped(node, axis, far - 1)
    if kind in PRODUCTS:
        weights = [one for one in node.inputs if one is not None and one.is_initializer()]
        sizes = [size(weight, -1) for weight in weights if axis == -1 and kind != "Einsum"]
        return next(filter(None, sizes), None)
    if kind in ("Concat", "Slice", "Split") and _own_axis(node, given) in (axis, None):
        return _cut(node, value, axis, far - 1)
    if kind == "Gather":
        axis = _before_gather(node, axis)
        return _length(given, axis, far - 1) if axis is not None else None
    before = graph.through(node, axis, forward=False)
    operands = node.inputs if kind in graph.ELEMENTWISE else [given]
    sizes = (_length(operand, before, far - 1) for operand in operands if before is not None)
    return next((given for given in sizes if given and given > 1), None)


def _reshaped(node: ir.Node, axis: int, far: int) -> int | None:
    """The size of an axis that a Reshape makes: as its shape has it, or what is left of the last
    axis, of (B, S, H) to (B, S, N, D) or (S, B·N, D)."""
    sizes = _sizes(node.inputs[1])
    if len(sizes) < -axis:
        return None
    if (len(sizes) > 3 or axis == -1) and (sizes[axis] or 0) > 0:
        return sizes[axis]
    others = [size for i, size in enumerate(sizes) if i > 1 and i != len(sizes) + axis]
    whole = _length(node.inputs[0], -1, far)
    if whole and all(size and size > 0 for size in others) and whole % math.prod(others) == 0:
        return whole // math.prod(others)
    return sizes[axis] if (sizes[axis] or 0) > 0 else None


def _cut(node: ir.Node, value: ir.Value, axis: int, far: int) -> int | None:
    """The size of the axis along which Concat joins, or Slice and Split cut."""
    if node.op_type == "Concat":
        sizes = [_length(operand, axis, far) for operand in node.inputs]
        return sum(sizes) if all(sizes) else None
    whole = _length(node.inputs[0], axis, far)
    if node.op_type == "Split":
        stated = _constants(node, 1) or node.attributes.get_ints("split")
        if stated:
            return int(stated[value.index()])
        return whole // len(node.outputs) if whole else None
    start, end, step = (_constants(node, at) for at in (1, 2, 4))
    if not whole or not start or not end:
        return None
    return len(range(*slice(start[0], end[0], step[0] if step else 1).indices(whole)))


def _own_axis(node: ir.Node, given: ir.Value | None) -> int | None:
    """The axis along which a Concat, Slice or Split works; None where that is not known."""
    if node.op_type == "Slice":
        axes = _constants(node, 3)
        axis = axes[0] if axes and len(axes) == 1 else None
    else:
        axis = node.attributes.get_int("axis", 0)
    axes = _rank(given) or _rank(node.outputs[0])
    if axis is None or axis < 0:
        return axis
    return axis - axes if axes else None


def _before_gather(node: ir.Node, axis: int) -> int | None:
    """Which axis of its data it is, of which a Gather takes one entry along another."""
    index, axes = constant(node.inputs[1]), _rank(node.inputs[0])
    if index is None or index.ndim:
        return None
    taken = node.attributes.get_int("axis", 0)
    if taken > 0:
        if axes is None:
            return None
        taken -= axes
    return axis if taken == 0 or axis > taken else axis - 1


def _rank(value: ir.Value | None) -> int | None:
    """The number of axes, which a Gather of one entry has one less of than its data."""
    stated = rank(value)
    node = value.producer() if value is not None else None
    if stated is not None or node is None:
        return stated
    if node.op_type == "Reshape":
        sizes = _sizes(node.inputs[1])
        return len(sizes) if sizes != [None] else None
    if node.op_type == "Gather":
        index, axes = constant(node.inputs[1]), _rank(node.inputs[0])
        return axes - 1 if axes and index is not None and not index.ndim else None
    return None


def _constants(node: ir.Node, at: int) -> list[int]:
    given = constant(node.inputs[at]) if at < len(node.inputs) else None
    return [] if given is None else [int(number) for number in given.ravel()]


def _sizes(shape: ir.Value) -> Sequence[int | None]:
    """The sizes that a shape is put together of: a constant, or Concat of such and others."""
    given = constant(shape)
    if given is not None:
        return [int(size) for size in given.ravel()]
    node = shape.producer()
    if node is None or node.op_type != "Concat":
        return [None]
    return [size for part in node.inputs for size in _sizes(part)]
