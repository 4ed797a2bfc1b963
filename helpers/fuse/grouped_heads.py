"""Heads of keys that groups of queries share, left to the operator that reads them.

    k (B, K, T, D) → Unsqueeze (B, K, 1, T, D) → Expand (B, K, G, T, D) → Reshape (B, K·G, T, D)

repeats each head of keys, or values, for a group of G heads of queries. A standard Attention does
that by itself, without the copies: it takes K heads of keys for K·G of queries, the first of them
for the first G, and so on, which is the order that these nodes make.

Follows ONNX's Attention, opset 23: kv_num_heads.
"""

import onnx_ir as ir

from helpers import graph
from helpers.fuse.building import Tape, redirect_shape
from helpers.graph.values import constant, dim, rank


def share(model: ir.Model) -> int:
    """Have each standard Attention read its keys and values unrepeated, in place; returns how many
    do."""
    done = 0
    for node in [*graph.nodes(model)]:
        if node.op_type == "Attention" and node.domain in graph.STANDARD:
            done += _share(node)
    return done


def _share(node: ir.Node) -> bool:
    operands = node.inputs[1:3]
    if any(rank(value) != 4 for value in operands) or any(node.inputs[4:6]):
        return False
    once = [_before_repeating(value) for value in operands]
    if None in once or dim(once[0], -3) != dim(once[1], -3):
        return False
    tape = Tape()
    for number, value in enumerate(once, 1):
        repeated = node.inputs[number]
        heads = tape.ints(dim(repeated, -3))
        shape = tape.shape(tape.sizes(value, 0, 1), heads, tape.sizes(value, 2))
        redirect_shape(tape, repeated, shape)
        node.replace_input_with(number, value)
    node.graph.insert_before(node, tape.nodes)
    return True


def _before_repeating(value: ir.Value) -> ir.Value | None:
    """What `value` (B, K·G, T, D) was, (B, K, T, D), before its heads were repeated; else None."""
    merge = value.producer()
    repeat = merge.inputs[0].producer() if merge and merge.op_type == "Reshape" else None
    if repeat is None or repeat.op_type not in ("Expand", "Tile") or dim(value, -3) is None:
        return None
    split = repeat.inputs[0].producer()
    adds = split is not None and split.op_type == "Unsqueeze"
    axes = constant(split.inputs[1]) if adds and len(split.inputs) > 1 else None
    if axes is None or [*axes.ravel()] not in ([2], [-3]) or rank(split.inputs[0]) != 4:
        return None
    before, repeated = split.inputs[0], repeat.outputs[0]
    heads, group, whole = dim(before, -3), dim(repeated, -3), dim(value, -3)
    sizes = (heads, group, whole)
    counted = all(isinstance(size, int) for size in sizes) and heads * group == whole
    same = dim(repeated, -4) == heads and dim(value, -1) == dim(before, -1)
    return before if counted and same else None
