"""Sizes that a graph computes for itself, and values expanded to them."""

import onnx_ir as ir

from helpers.graph.values import constant, dim, rank


def size_of_axis(tape: ir.tape.Tape, value: ir.Value, axis: int) -> ir.Value:
    """The size of an axis, counted from the end, as a tensor of one element.

    Where heads were split by a Reshape to sizes that are computed, the one that was given to it:
    it is the same in all layers, and so is then what is made from it.
    """
    static = dim(value, axis)
    if isinstance(static, int):
        return tape.op("Constant", [], {"value_ints": [static]})
    node, at = value.producer(), axis
    if node is not None and node.op_type == "Transpose" and node.attributes.get_ints("perm"):
        perm = node.attributes.get_ints("perm")
        node, at = node.inputs[0].producer(), perm[axis] - len(perm)
    if node is not None and node.op_type == "Reshape":
        sizes = node.inputs[1].producer()
        if sizes is not None and sizes.op_type == "Concat" and len(sizes.inputs) == rank(value):
            given = sizes.inputs[at]
            if given.shape is not None and given.shape.dims == (1,) and constant(given) is None:
                return given
    end = {} if axis == -1 else {"end": axis + 1}
    return tape.op("Shape", [value], {"start": axis, **end})


def expanded(tape: ir.tape.Tape, mask: ir.Value, query: ir.Value, key: ir.Value) -> ir.Value:
    """`mask`, or bias, with axes of S and T at the end, as `query` and `key` have them at -2."""
    ones = tape.op("Constant", [], {"value_ints": [1, 1]})
    shape = tape.op(
        "Concat", [ones, size_of_axis(tape, query, -2), size_of_axis(tape, key, -2)], {"axis": 0}
    )
    return tape.op("Expand", [mask, shape])
