"""What ONNX Runtime refuses at run time for a known cause, and its repair.

Attention whose mask has one row for all queries. ONNX lets a mask be broadcast, so exporters write
a padding mask as (B, 1, 1, T). ONNX Runtime's kernel refuses it ("inconsistent q_sequence_length"),
and a last axis of 1 means one key there, the others masked. The mask is expanded to the sizes of
queries and keys:

    Attention(q, k, v, mask)  →  Attention(q, k, v, Expand(mask, (1, 1, S, T)))

RotaryEmbedding whose caches have a batch of 1. transformers' exporter, at opset 23 with dynamic
shapes, gives RotaryEmbedding cosines and sines of shape (1, S, D/2), made from positions that all
rows share. The operator wants them for each row, (B, S, D/2), so ONNX Runtime refuses a batch above
1. They are expanded to the batch:

    RotaryEmbedding(x, cos, sin)  →  RotaryEmbedding(x, Expand(cos, (B, 1, 1)), Expand(sin, …))

Follows ONNX's Attention and RotaryEmbedding, opset 23 (with no position_ids, caches are 3-D), and
ONNX Runtime's attention_helper.h.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers.graph.reading import STANDARD, name, nodes
from helpers.graph.shapes import expanded
from helpers.graph.values import dim, tail


@dataclasses.dataclass
class Repaired:
    """A line for each node that was repaired: of `by_rows` the file that it is in runs on one row
    at a time, of `by_definition` not at all, though the standard says what it computes."""

    by_rows: list[str]
    by_definition: list[str]


def repair(model: ir.Model) -> Repaired:
    """Repair `model`, in place; its shapes are inferred."""
    return Repaired(_repair_caches(model), _repair_masks(model))


def needed(model: ir.Model) -> list[str]:
    """The names of the nodes that `repair` would repair. `model` is left as it is."""
    model = inferred(model)
    return [name(node) for node in (*_of_one_row(model), *_of_one_batch(model))]


def notes(model: ir.Model) -> list[str]:
    """What `needed` finds in `model`, whose shapes are inferred, as lines for a reader."""
    lines = []
    if refused := _of_one_row(model):
        lines.append(
            f"ONNX Runtime runs it on no input with more than one query: {_named(refused)} a mask"
            " with one row for all queries, which its kernel refuses; fuse repairs that"
        )
    if refused := _of_one_batch(model):
        lines.append(
            f"ONNX Runtime runs it with a batch of 1 alone: {_named(refused)} cosines and sines of"
            " batch 1, which its kernel refuses for more; fuse repairs that"
        )
    return lines


def inferred(model: ir.Model) -> ir.Model:
    """A copy of `model` with its shapes inferred."""
    return passes.ShapeInferencePass()(model.clone()).model


def _named(nodes: list[ir.Node]) -> str:
    more = f" and {len(nodes) - 1} more have" if len(nodes) > 1 else " has"
    return f"{nodes[0].op_type} {name(nodes[0])}{more}"


def _of_one_row(model: ir.Model) -> list[ir.Node]:
    """Each Attention whose mask has one row, and that may have more than one query."""
    refused = []
    for node in nodes(model):
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if node.op_type != "Attention" or node.domain not in STANDARD or mask is None:
            continue
        if tail(mask)[0] == 1 and dim(node.inputs[0], -2) != 1:
            refused.append(node)
    return refused


def _repair_masks(model: ir.Model) -> list[str]:
    """Expand masks of one row, in place; a line for each Attention that got it."""
    repaired = []
    for node in _of_one_row(model):
        tape, (query, key, _, mask) = ir.tape.Tape(), node.inputs[:4]
        node.replace_input_with(3, expanded(tape, mask, query, key))
        node.graph.insert_before(node, tape.nodes)
        repaired.append(f"{name(node)}: mask of one row expanded to all queries")
    return repaired


def _of_one_batch(model: ir.Model) -> list[ir.Node]:
    """Each RotaryEmbedding whose caches have a batch of 1, and whose rows may be more."""
    refused = []
    for node in nodes(model):
        if node.op_type != "RotaryEmbedding" or node.domain not in STANDARD:
            continue
        rows, caches = node.inputs[0], node.inputs[1:3]
        by_row = len(node.inputs) < 4 or node.inputs[3] is None
        if not by_row or any(dim(cache, -3) not in (1, None) for cache in caches):
            continue
        if dim(rows, -len(rows.shape) if rows.shape else -4) != 1:
            refused.append(node)
    return refused


def _repair_caches(model: ir.Model) -> list[str]:
    """Expand caches of batch 1, in place; a line for each RotaryEmbedding that got it."""
    repaired, caches = [], {}
    for node in _of_one_batch(model):
        rows, tape = node.inputs[0], ir.tape.Tape()
        for i, cache in enumerate(node.inputs[1:3], 1):
            key = (cache, dim(rows, -4) or rows)
            if key not in caches:
                batch = tape.op("Shape", [rows], {"start": 0, "end": 1})
                ones = tape.op("Constant", [], {"value_ints": [1, 1]})
                shape = tape.op("Concat", [batch, ones], {"axis": 0})
                caches[key] = tape.op("Expand", [cache, shape])
            node.replace_input_with(i, caches[key])
        node.graph.insert_before(node, tape.nodes)
        repaired.append(f"{name(node)}: cosines and sines of batch 1 expanded to the batch")
    return repaired
