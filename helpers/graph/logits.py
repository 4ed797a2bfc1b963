"""Logits that a graph gives for every position, of which generation reads the last."""

from collections.abc import Iterator

import onnx_ir as ir

from helpers.graph import walks
from helpers.graph.attention_sites import FUSED, from_input
from helpers.graph.reading import nodes
from helpers.graph.values import constant, looked_up, size, stated_rank

_PICKING = {"Compress", "Gather", "GatherElements", "GatherND", "Slice", "Split"}


def of_all_positions(model: ir.Model) -> Iterator[ir.Value]:
    """The outputs (B, S, V) of `model` that have as many numbers a position as there are words, for
    positions of which none were picked."""
    dependent = from_input(model)
    vocabularies = _vocabularies(model, dependent)
    for output in model.graph.outputs:
        words = stated_rank(output) == 3 and size(output, -1) in vocabularies
        if words and size(output, -2) != 1 and not _picked(output, dependent):
            yield output


def _vocabularies(model: ir.Model, dependent: set[ir.Value]) -> set[int | None]:
    """How many rows the tables have that several ids a sample look up; `dependent` are the values
    that come from the inputs.

    What is as wide as a table is no vocabulary: hidden states may be as wide as positions are many.
    """
    rows: set[int | None] = set()
    widths: set[int | None] = {None}
    for node in nodes(model):
        tables = [
            value for value in node.inputs if value not in dependent and stated_rank(value) == 2
        ]
        for at, value in enumerate(node.inputs if node.op_type != "RotaryEmbedding" else ()):
            if (
                tables
                and value in dependent
                and (stated_rank(value) or 2) > 1
                and size(value, -1) != 1
            ):
                lookups = {*looked_up(node, at)}
                rows |= lookups
                widths |= {size(table, -1) for table in tables} if lookups else set()
    return rows - widths


def _picked(output: ir.Value, dependent: set[ir.Value]) -> bool:
    """Whether positions are picked on the way to `output` (B, S, V), after the last site."""

    def computing(value: ir.Value) -> ir.Node | None:
        node = value.producer()
        if node is None or node.op_type == "Softmax" or (node.domain, node.op_type) in FUSED:
            return None
        return None if node.op_type in _PICKING and node.inputs[0] not in dependent else node

    def above(value: ir.Value) -> list[ir.Value]:
        read = [] if computing(value) is None else walks.read(value)
        return [
            operand
            for operand in read
            if operand.dtype is None or operand.dtype.is_floating_point()
        ]

    passed = map(computing, walks.walk([output], above))
    return any(node is not None and _picks(node) for node in passed)


def _picks(node: ir.Node) -> bool:
    """Whether `node` takes a part of an axis that is not the last, (B, S, D) to (B, 1, D)."""
    if node.op_type not in _PICKING:
        return False
    axes = [node.attributes.get_int("axis", 0)]
    if node.op_type == "Slice":
        starts, ends, axes = (_numbers(node, at) for at in (1, 2, 3))
        if starts and ends and not any(starts) and min(ends) >= 2**31 - 1:
            return False  # all of it
    last = (stated_rank(node.inputs[0]) or 3) - 1
    return axes is None or not {*axes} <= {-1, last}


def _numbers(node: ir.Node, at: int) -> list[int] | None:
    """The starts (1), ends (2) or axes (3) of a Slice, where they are constants."""
    if at >= len(node.inputs):  # they were attributes before opset 10
        given = node.attributes.get_ints(("starts", "ends", "axes")[at - 1])
        return None if given is None else [*given]
    given = constant(node.inputs[at])
    return None if given is None else [int(number) for number in given.ravel()]
