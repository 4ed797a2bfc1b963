"""Attention on (B, S, N·D), without the transposes that split and merge the heads.

    q (B, S, N·D) → Reshape (B, S, N, D) → Transpose (B, N, S, D) ┐
    k             → …                                             ├ Attention → Transpose → Reshape
    v             → …                                             ┘

becomes Attention on q, k, v themselves, with q_num_heads and kv_num_heads: ONNX Runtime's kernel
splits the heads faster than transposes do (`helpers/figures/speed` measures models). Where one
of the three comes from elsewhere (rotary embeddings), the operator keeps its four axes. Past keys
and values, and present ones, have four axes in either case.

Follows ONNX's Attention, opset 23: inputs of three axes.
"""

import onnx_ir as ir

from helpers import graph
from helpers.graph.values import dim, rank

SPLIT = [0, 2, 1, 3]


def merge(model: ir.Model) -> int:
    """Rewrite each standard Attention whose heads are split right before it; returns how many."""
    done = 0
    for node in [*graph.nodes(model)]:
        standard = node.op_type == "Attention" and node.domain in graph.STANDARD
        if standard and len(node.outputs) < 4:  # the fourth is the weights
            done += _merge(node)
    return done


def _merge(node: ir.Node) -> bool:
    flat = [_unsplit(value) for value in node.inputs[:3]]
    if (
        node.outputs[0].is_graph_output()
        or None in flat
        or any(value is not None for value in node.inputs[6:])
    ):
        return False
    heads, shared = (_heads(value) for value in node.inputs[:2])
    for i, value in enumerate(flat):
        node.replace_input_with(i, value)
    node.attributes.add(ir.AttrInt64("q_num_heads", heads))
    node.attributes.add(ir.AttrInt64("kv_num_heads", shared))
    tape = ir.tape.Tape()
    result = node.outputs[0]
    users = [*result.consumers()]
    merged = [user for user in users if _transposes(user)]
    shape = tape.op("Constant", [], {"value_ints": [0, 0, heads, -1]})
    split = tape.op("Reshape", [result, shape])
    split.type = result.type
    if result.shape is not None:
        split.shape = ir.Shape([result.shape[i] for i in SPLIT])
    again = None
    if len(merged) < len(users):
        again = tape.op("Transpose", [split], {"perm": SPLIT})
        again.shape, again.type = result.shape, result.type
        for user in users:
            if user not in merged:
                for i, value in enumerate(user.inputs):
                    if value is result:
                        user.replace_input_with(i, again)
    result.shape = None
    node.graph.insert_after(node, tape.nodes)
    for user in merged:
        user.outputs[0].replace_all_uses_with(split, replace_graph_outputs=True)
    return True


def _transposes(node: ir.Node | None) -> bool:
    """Whether `node` exchanges heads and queries: (B, S, N, D) to (B, N, S, D), or back."""
    return (
        node is not None
        and node.op_type == "Transpose"
        and [*(node.attributes.get_ints("perm") or [])] == SPLIT
    )


def _unsplit(value: ir.Value) -> ir.Value | None:
    """What `value` (B, N, S, D) is, before its heads were split: (B, S, N·D); else None."""
    transpose = value.producer()
    reshape = transpose.inputs[0].producer() if _transposes(transpose) else None
    if reshape is None or reshape.op_type != "Reshape" or rank(value) != 4:
        return None
    flat, heads, width = reshape.inputs[0], _heads(value), dim(value, -1)
    return flat if rank(flat) == 3 and heads and dim(flat, -1) == heads * width else None


def _heads(value: ir.Value) -> int | None:
    """How many heads `value` (B, N, S, D) has; where they are inferred, from the width before."""
    heads, width = dim(value, -3), dim(value, -1)
    if isinstance(heads, int) or not isinstance(width, int) or not _transposes(value.producer()):
        return heads if isinstance(heads, int) else None
    reshape = value.producer().inputs[0].producer()
    whole = dim(reshape.inputs[0], -1) if reshape and reshape.op_type == "Reshape" else None
    return whole // width if isinstance(whole, int) and whole % width == 0 else None
