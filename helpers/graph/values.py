"""What is known of a value without running the graph: constants, ranks, sizes of axes."""

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from helpers.graph import walks
from helpers.graph.reading import MICROSOFT

# Operators that leave each score, or each weight, at its place on the last axes.
ELEMENTWISE = {
    *("Add", "Cast", "CastLike", "Clip", "Div", "Dropout", "Expand", "Identity", "Max", "Min"),
    *("Mul", "Pow", "Sub", "Sum", "Tanh", "Where", "DequantizeLinear", "QuantizeLinear"),
    *("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus"),
    *("Softsign", "Sqrt", "Swish"),
    *("QLinearAdd", "QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid"),
}
# Operators that move, repeat or pick what they are given, and change no number.
SHAPING = {
    *("Cast", "CastLike", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "Identity"),
    *("Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
COMPARING = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
LOGICAL = COMPARING | {"And", "Not", "Or", "Xor"}
# What a table looked up by `ids` is, and where the ids come in: operator → [(ids, table, axis)].
_TABLES = {
    "Gather": [(1, 0, "axis")],
    "GatherElements": [(1, 0, "axis")],
    "GatherBlockQuantized": [(1, 0, "gather_axis")],
    "EmbedLayerNormalization": [(0, 2, None), (1, 4, None), (8, 3, None)],
    "QEmbedLayerNormalization": [(0, 2, None), (1, 4, None)],
}
_FILLED = {"Cast", "CastLike", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
SHAPE_UP_TO = 64  # elements of a constant that may be a shape
FILLED_UP_TO = 2**20  # elements of one that may be a number, repeated
NOTHING = -1e3  # a score as low as this is none: its weight is 0 in any precision


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of a small constant; None where it is computed, or a weight."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size > SHAPE_UP_TO:
        return None
    try:
        return tensor.numpy()
    except FileNotFoundError:  # in another file, and left there with the weights
        return None


def number(value: ir.Value | None) -> float | None:
    """The number that `value` is filled with, whatever its shape; None where that is not known.

    It is looked for behind casts and shapes, and what Mul, Neg and Not make of numbers.
    """
    node = value.producer() if value is not None else None
    kind = node.op_type if node is not None else ""
    if kind == "ConstantOfShape":
        filled = node.attributes.get_tensor("value", None)
        return 0.0 if filled is None else float(filled.numpy().flat[0])
    if kind in _FILLED:
        return _cast(node, number(node.inputs[0]))
    if kind in ("Mul", "Neg", "Not"):
        factors = [number(operand) for operand in node.inputs]
        if None in factors:
            return None
        return {"Mul": math.prod(factors), "Neg": -factors[0], "Not": float(not factors[0])}[kind]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or not 0 < tensor.size <= FILLED_UP_TO:
        return None
    if tensor.dtype == ir.DataType.STRING:
        return None
    try:
        array = tensor.numpy()
    except FileNotFoundError:  # left out, with the large weights
        return None
    return float(array.flat[0]) if (array == array.flat[0]).all() else None


def _cast(node: ir.Node, given: float | None) -> float | None:
    """What a Cast makes of the number `given`; any other node leaves it."""
    to = node.attributes.get_int("to", 0) if node.op_type == "Cast" else 0
    if given is None or not to or ir.DataType(to).is_floating_point():
        return given
    if to == ir.DataType.BOOL:
        return float(bool(given))
    return float(int(given)) if math.isfinite(given) else None


def finite_number(value: ir.Value | None) -> float | None:
    """What `number` gives, if that is finite."""
    given = number(value)
    return given if given is not None and math.isfinite(given) else None


def before_casts(value: ir.Value) -> ir.Value:
    """What `value` was before casts and shapes."""
    while (node := value.producer()) is not None and node.op_type in _FILLED:
        value = node.inputs[0]
    return value


def stated_rank(*values: ir.Value | None) -> int | None:
    """The number of axes of the first of `values` whose shape is stated; None where none is."""
    stated = (value.shape for value in values if value is not None)
    return next((len(shape) for shape in stated if shape is not None), None)


def rank(value: ir.Value | None) -> int | None:
    """The number of axes, from the value's shape or from what makes it; None where not known."""
    ranks = []
    for source in walks.walk([] if value is None else [value], _broadcast):
        if not _broadcast(source):
            own = _own_rank(source)
            if own is None:
                return None
            ranks.append(own)
    return max(ranks, default=None)


def _broadcast(value: ir.Value) -> list[ir.Value]:
    """Those of whose ranks the largest is that of `value`; none where it tells its own."""
    node = value.producer()
    spreads = node is not None and (node.op_type in ELEMENTWISE or node.op_type == "MatMul")
    if value.shape is not None or not spreads:
        return []
    return [operand for operand in node.inputs if operand is not None]


def _own_rank(value: ir.Value) -> int | None:
    """The rank that a shape, a Transpose or a Reshape tells."""
    node = value.producer()
    if value.shape is not None or node is None:
        return stated_rank(value)
    if node.op_type == "Transpose" and node.attributes.get_ints("perm"):
        return len(node.attributes.get_ints("perm"))
    if node.op_type == "Reshape":
        wanted = node.inputs[1].shape
        return wanted[0] if wanted is not None and isinstance(wanted[0], int) else None
    return None


def dim(value: ir.Value, axis: int) -> int | str | None:
    """The size of an axis counted from the end: a number, a name, None where not known.

    1 where the value has fewer axes.
    """
    if value.shape is None:
        return None
    if len(value.shape) < -axis:
        return 1
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value


def size(value: ir.Value, axis: int) -> int | None:
    """The size of an axis counted from the end, if it is a number; exporters write "2" as well."""
    stated = dim(value, axis)
    return int(stated) if stated is not None and str(stated).isdecimal() else None


def sized_by(value: ir.Value) -> tuple[ir.Value, int] | None:
    """The value and axis, from the start, whose size `value` is: read by Shape and Gather."""
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Identity", "Unsqueeze", "Squeeze"):
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("Gather", "Shape"):
        return None
    if node.op_type == "Shape":
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        single = end is not None and end - start == 1 and start >= 0
        return (node.inputs[0], start) if single else None
    shape, axis = node.inputs[0].producer(), number(node.inputs[1])
    if shape is None or shape.op_type != "Shape" or axis is None or len(shape.attributes):
        return None
    return (shape.inputs[0], int(axis)) if axis >= 0 else None


def looked_up(node: ir.Node, at: int) -> Iterator[int | None]:
    """How many rows the tables have that `node` looks up by its input `at`; None: not known."""
    for ids, table, axis in _TABLES.get(node.op_type, ()):
        if ids != at or len(node.inputs) <= table or node.inputs[table] is None:
            continue
        shape = node.inputs[table].shape
        which = node.attributes.get_int(axis, 0) if axis else 0
        stated = shape is not None and isinstance(shape[which], int)
        yield shape[which] if stated else None
    if node.op_type == "GatherND" and at == 1:
        shape, last = node.inputs[0].shape, node.inputs[1].shape
        first = node.attributes.get_int("batch_dims", 0)
        if shape is None or last is None or not isinstance(last[-1], int):
            yield None
        else:
            yield from (
                size if isinstance(size, int) else None for size in shape[first : first + last[-1]]
            )
    if node.op_type == "OneHot" and at == 0:
        depth = finite_number(node.inputs[1])
        yield None if depth is None else int(depth)
    if node.op_type == "RotaryEmbedding":
        table = {("", 3): 1, (MICROSOFT, 1): 2}.get((node.domain, at))
        if table is not None:
            shape = node.inputs[table].shape
            yield shape[0] if shape is not None and isinstance(shape[0], int) else None


def tail(value: ir.Value) -> tuple[int | str | None, int | str | None]:
    """The sizes of the last two axes; of what elementwise operators made, from their inputs."""
    node = value.producer()
    if value.shape is not None or node is None or node.op_type not in ELEMENTWISE:
        tensor = ir.convenience.get_const_tensor(value)
        if value.shape is None and tensor is not None:
            return tuple([1, 1, *tensor.shape.numpy()][-2:])
        return dim(value, -2), dim(value, -1)
    if node.op_type in ("Cast", "CastLike", "Expand"):
        return (None, None) if node.op_type == "Expand" else tail(node.inputs[0])
    sizes = [tail(operand) for operand in node.inputs if operand is not None]
    return _joined(pair[0] for pair in sizes), _joined(pair[1] for pair in sizes)


def _joined(sizes) -> int | str | None:
    """The size of an axis that has these, broadcast."""
    sizes = {*sizes} - {1}
    return 1 if not sizes else sizes.pop() if len(sizes) == 1 else None
