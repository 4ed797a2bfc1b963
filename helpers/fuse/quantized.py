"""Integers stay integers through what only moves them.

ONNX Runtime, as it makes a session, carries a DequantizeLinear on through what only moves numbers,
and writes a pair of QuantizeLinear and DequantizeLinear behind it. From opset 21 the former says
its type, uint8 unless told otherwise, and ONNX Runtime 1.32 does not tell it: a graph with int8
there does not load ("output_dtype INT8 does not match y_zero_point type UINT8"). The integers are
moved first, which gives the same numbers, and leaves nothing to carry on:

    Transpose(DequantizeLinear(q, scale, zero))  →  DequantizeLinear(Transpose(q), scale, zero)

Follows ONNX's DequantizeLinear, opset 23, with one scale for the whole tensor, and ONNX Runtime's
propagate_qdq_nodes.cc.
"""

import onnx_ir as ir

from helpers import graph

_MOVING = {"Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
OPSET = 21  # from which QuantizeLinear has an output_dtype


def move_first(model: ir.Model) -> None:
    """Have each such DequantizeLinear come after what moves its numbers, in place."""
    if model.opset_imports.get("", 0) < OPSET:
        return
    queue = [node for node in graph.nodes(model) if _is_whole(node)]
    while queue:
        node = queue.pop()
        for mover in [user for user in node.outputs[0].consumers() if _moves(user, node)]:
            (given, scale, zero), others = node.inputs[:3], mover.inputs[1:]
            kept = [*mover.attributes.values()]
            moved = ir.Node("", mover.op_type, [given, *others], kept, name=mover.name)
            dequantized = ir.node(
                "DequantizeLinear", [moved.outputs[0], scale, zero], name=node.name
            )
            mover.graph.insert_before(mover, [moved, dequantized])
            old, new = mover.outputs[0], dequantized.outputs[0]
            moved.outputs[0].type, moved.outputs[0].shape = given.type, old.shape
            new.type, new.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            new.name = old.name
            mover.graph.remove(mover, safe=True)
            queue.append(dequantized)
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            node.graph.remove(node, safe=True)


def _is_whole(node: ir.Node) -> bool:
    """Whether `node` is a DequantizeLinear with one scale for int8 that are no weights."""
    if node.op_type != "DequantizeLinear" or node.domain not in graph.STANDARD:
        return False
    if len(node.inputs) < 3 or ir.convenience.get_const_tensor(node.inputs[0]) is not None:
        return False
    zero = ir.convenience.get_const_tensor(node.inputs[2])
    return zero is not None and zero.dtype == ir.DataType.INT8 and zero.size == 1


def _moves(user: ir.Node, node: ir.Node) -> bool:
    """Whether `user` moves what `node` gives, and hands it on to more than a QuantizeLinear."""
    if user.op_type not in _MOVING or user.domain not in graph.STANDARD:
        return False
    if user.graph is not node.graph or user.inputs[0] is not node.outputs[0]:
        return False
    if any(value.uses() or value.is_graph_output() for value in user.outputs[1:]):
        return False  # a MaxPool's indices
    given = user.outputs[0]
    quantised = {reader.op_type for reader in given.consumers()} == {"QuantizeLinear"}
    return not quantised or given.is_graph_output()
