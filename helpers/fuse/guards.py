"""Leave out what guards an Attention against rows without a key.

transformers' exporter writes, after the attention,

    Where(Less(ReduceSum(Cast(has a key)), 1), 0, attention)

since a Softmax over nothing is not a number. Attention gives finite numbers there (ONNX Runtime's
gives 0), so the guard only costs time. It is left out where what it counts is the mask that the
same Attention gets, or nothing is ever masked; any other Where is not touched.
"""

import onnx_ir as ir

from helpers import graph
from helpers.graph import walks
from helpers.graph.values import NOTHING, number, root

_MASK_OF = {"Add", "And", "Cast", "CastLike", "Expand", "Mul", "Not", "Reshape", "Sub", "Unsqueeze"}


def drop(model: ir.Model) -> int:
    """Leave out the guards of standard Attention, in place; returns how many."""
    done = 0
    for node in [*graph.nodes(model)]:
        if node.op_type == "Attention" and node.domain in graph.STANDARD:
            done += _drop(node)
    return done


def _drop(node: ir.Node) -> bool:
    result = node.outputs[0]
    users = [user for user in result.consumers() if user.op_type == "Where"]
    if len(users) != 1 or len(result.consumers()) != 1 or result.is_graph_output():
        return False
    condition, zero, other = users[0].inputs
    less = condition.producer()
    counted = less.inputs[0].producer() if less is not None and less.op_type == "Less" else None
    if other is not result or number(zero) != 0.0 or counted is None:
        return False
    if counted.op_type != "ReduceSum" or number(less.inputs[1]) != 1.0:
        return False
    has_key = counted.inputs[0]
    if number(has_key) != 1.0 and not _is_mask(root(has_key), node):
        return False
    users[0].outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    return True


def _is_mask(has_key: ir.Value, node: ir.Node) -> bool:
    """Whether `has_key` is what the mask of the Attention `node` was made of, or a test of it."""

    def made_of(value: ir.Value) -> list[ir.Value]:
        maker = value.producer()
        if maker is not None and maker.op_type in _MASK_OF:
            return [operand for operand in maker.inputs if operand is not None]
        return [maker.inputs[0]] if maker is not None and maker.op_type == "Where" else []

    masks = [value for value in node.inputs[3:4] if value is not None]
    of_mask = {*walks.walk(masks, made_of)}
    test = has_key.producer()
    if test is not None and test.op_type == "Greater" and (number(test.inputs[1]) or 0) <= NOTHING:
        return test.inputs[0] in of_mask
    return has_key in of_mask
