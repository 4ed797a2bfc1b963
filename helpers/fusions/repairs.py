"""What ONNX Runtime refuses at run time, and `fuse` repairs."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers import graph
from helpers.fusions import masks, rotary


@dataclasses.dataclass
class Repaired:
    """A line for each node that was repaired: of `by_rows` the file that it is in runs on one row
    at a time, of `by_definition` not at all, though the standard says what it computes."""

    by_rows: list[str]
    by_definition: list[str]


def repair(model: ir.Model) -> Repaired:
    """Repair `model`, in place; its shapes are inferred."""
    return Repaired(rotary.repair(model), masks.repair(model))


def needed(model: ir.Model) -> list[str]:
    """The names of the nodes that `repair` would repair. `model` is left as it is."""
    model = _inferred(model)
    return [graph.name(node) for node in (*masks.of_one_row(model), *rotary.of_one_batch(model))]


def notes(model: ir.Model) -> list[str]:
    """What `needed` finds in `model`, as lines for a reader. `model` is left as it is."""
    model, lines = _inferred(model), []
    if nodes := masks.of_one_row(model):
        lines.append(
            f"ONNX Runtime runs it on no input with more than one query: {_named(nodes)} a mask"
            " with one row for all queries, which its kernel refuses; fuse repairs that"
        )
    if nodes := rotary.of_one_batch(model):
        lines.append(
            f"ONNX Runtime runs it with a batch of 1 alone: {_named(nodes)} cosines and sines of"
            " batch 1, which its kernel refuses for more; fuse repairs that"
        )
    return lines


def _inferred(model: ir.Model) -> ir.Model:
    """A copy of `model` with its shapes inferred."""
    return passes.ShapeInferencePass()(model.clone()).model


def _named(nodes: list[ir.Node]) -> str:
    more = f" and {len(nodes) - 1} more have" if len(nodes) > 1 else " has"
    return f"{nodes[0].op_type} {graph.name(nodes[0])}{more}"
