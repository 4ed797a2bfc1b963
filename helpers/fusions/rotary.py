"""Repair RotaryEmbedding whose caches have a batch of 1.

transformers' exporter, at opset 23 with dynamic shapes, gives RotaryEmbedding cosines and sines of
shape (1, S, D/2), made from positions that all rows share. The operator wants them for each row,
(B, S, D/2), so ONNX Runtime refuses a batch above 1. They are expanded to the batch:

    RotaryEmbedding(x, cos, sin)  →  RotaryEmbedding(x, Expand(cos, (B, 1, 1)), Expand(sin, …))

Follows ONNX's RotaryEmbedding, opset 23: with no position_ids, caches are 3-D.
"""

import onnx_ir as ir

from helpers import graph
from helpers.fusions.values import dim


def of_one_batch(model: ir.Model) -> list[ir.Node]:
    """Each RotaryEmbedding whose caches have a batch of 1, and whose rows may be more."""
    found = []
    for node in graph.nodes(model):
        if node.op_type != "RotaryEmbedding" or node.domain not in graph.STANDARD:
            continue
        rows, caches = node.inputs[0], node.inputs[1:3]
        by_row = len(node.inputs) < 4 or node.inputs[3] is None
        if not by_row or any(dim(one, -3) not in (1, None) for one in caches):
            continue
        if dim(rows, -len(rows.shape) if rows.shape else -4) != 1:
            found.append(node)
    return found


def repair(model: ir.Model) -> list[str]:
    """Expand caches of batch 1, in place; a line for each RotaryEmbedding that got it."""
    repaired, expanded = [], {}
    for node in of_one_batch(model):
        rows, tape = node.inputs[0], ir.tape.Tape()
        for i, cache in enumerate(node.inputs[1:3], 1):
            key = (cache, dim(rows, -4) or rows)
            if key not in expanded:
                batch = tape.op("Shape", [rows], {"start": 0, "end": 1})
                ones = tape.op("Constant", [], {"value_ints": [1, 1]})
                shape = tape.op("Concat", [batch, ones], {"axis": 0})
                expanded[key] = tape.op("Expand", [cache, shape])
            node.replace_input_with(i, expanded[key])
        node.graph.insert_before(node, tape.nodes)
        repaired.append(f"{graph.name(node)}: cosines and sines of batch 1 expanded to the batch")
    return repaired
