"""Repair Attention whose mask has one row for all queries.

ONNX lets a mask be broadcast, so exporters write a padding mask as (B, 1, 1, T). ONNX Runtime's
kernel refuses it ("inconsistent q_sequence_length"), and a last axis of 1 means one key there, the
others masked. The mask is expanded to the sizes of queries and keys:

    Attention(q, k, v, mask)  →  Attention(q, k, v, Expand(mask, (1, 1, S, T)))

Follows ONNX's Attention, opset 23, and ONNX Runtime's attention_helper.h.
"""

import onnx_ir as ir

from helpers import graph
from helpers.fusions.values import dim, size, tail


def of_one_row(model: ir.Model) -> list[ir.Node]:
    """Each Attention whose mask has one row, and that may have more than one query."""
    found = []
    for node in graph.nodes(model):
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if node.op_type != "Attention" or node.domain not in graph.STANDARD or mask is None:
            continue
        if tail(mask)[0] == 1 and dim(node.inputs[0], -2) != 1:
            found.append(node)
    return found


def repair(model: ir.Model) -> list[str]:
    """Expand masks of one row, in place; a line for each Attention that got it."""
    repaired = []
    for node in of_one_row(model):
        tape, (query, key, _, mask) = ir.tape.Tape(), node.inputs[:4]
        node.replace_input_with(3, expanded(tape, mask, query, key))
        node.graph.insert_before(node, tape.nodes)
        repaired.append(f"{graph.name(node)}: mask of one row expanded to all queries")
    return repaired


def expanded(tape: ir.tape.Tape, mask: ir.Value, query: ir.Value, key: ir.Value) -> ir.Value:
    """`mask`, or bias, with axes of S and T at the end, as `query` and `key` have them at -2."""
    ones = tape.op("Constant", [], {"value_ints": [1, 1]})
    shape = tape.op("Concat", [ones, size(tape, query, -2), size(tape, key, -2)], {"axis": 0})
    return tape.op("Expand", [mask, shape])
