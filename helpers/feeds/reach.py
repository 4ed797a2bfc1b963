"""How long a feed must be: the windows, buckets and offsets that are written in a graph.

Positions are what Range, CumSum and constants that count (0, 1, 2, …) give, and what is computed
from them alone. A number that they are compared with, clipped to or shifted by before a comparison
bounds a window; what a logarithm of distances ends at is the last bucket. A fault beyond it shows
only where two positions are farther apart.
"""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import onnx_ir as ir

from helpers import graph
from helpers.graph import operators, walks
from helpers.graph.operators import Holds
from helpers.graph.values import finite_number

ENOUGH = 1030  # positions beyond which no feed goes: above the windows of 1,024
LARGE_TABLE = 64  # rows of a table that may end before a long feed does
CONDITION = 200  # nodes nearest to an If that may decide on it
SMALLEST = 4  # a window below this is passed by any feed
_COUNTING = {"CumSum", "Range"}
_KEEPING = {
    *(
        "Abs",
        "Add",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "CumSum",
        "Div",
        "Expand",
        "Flatten",
        "Floor",
    ),
    *("Gather", "Identity", "Log", "Max", "Min", "Mul", "Neg", "Pad", "Reshape", "Round", "Sign"),
    *("Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
}
_COMPARING = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
_SHIFTING = {"Add", "Sub"}


def windows(model: ir.Model, positions: set[ir.Value]) -> list[int]:
    """The windows, last buckets and offsets that the graph has, in order of size.

    `positions` are the values that hold them, and the unit of what is returned.
    """
    lengths: set[int] = set()
    for node in graph.nodes(model):
        lengths |= {*_numbers(node, positions)}
        local = node.attributes.get_int("local_window_size", -1)
        lengths |= {local, *(_last_bucket(node, positions))}
        lengths |= {node.attributes.get_int("left_window_size", -1)}
    return sorted(length for length in lengths if SMALLEST <= length < 2**20)


def positions(model: ir.Model) -> set[ir.Value]:
    """Values that hold positions, or are computed from positions and constants alone."""
    held: set[ir.Value] = set()
    for node in graph.nodes(model):
        read = [value for value in node.inputs if value is not None]
        counts = node.op_type in _COUNTING or (
            node.op_type in ("Trilu", "EyeLike") and not held.isdisjoint(read)
        )
        if node.op_type == "Gather":
            read = read[:1]  # what is looked up at positions are none
        kept = node.op_type in _KEEPING and any(v in held or _counts(v) for v in read)
        if counts or kept:
            held.update(node.outputs)
    return held


def _counts(value: ir.Value) -> bool:
    """Whether a constant counts: 0, 1, 2, … along its last axis, or its distances do."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or not 8 <= tensor.size <= 2**22 or not tensor.dtype.is_integer():
        return False
    if tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        return False
    try:
        array = tensor.numpy()
    except Exception:  # left out, with the large weights
        return False
    row = array.reshape(-1, array.shape[-1])[0] if array.ndim else array
    return row.size >= 8 and bool((np.abs(np.diff(row.astype(np.int64))) == 1).all())


def _numbers(node: ir.Node, positions: set[ir.Value]) -> Iterator[int]:
    """The numbers that `node` compares positions with, clips them to, or that shifted them."""
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type in ("Clip", "Max", "Min") and not positions.isdisjoint(inputs):
        yield from (abs(round(c)) for c in map(finite_number, inputs) if c is not None)
    if node.op_type in ("Div", "Mod") and inputs[0] in positions:  # chunks of so many positions
        length = finite_number(inputs[1])
        yield from (int(length),) if length is not None and length == round(length) else ()
    if node.op_type == "Trilu" and len(inputs) > 1:
        shift = finite_number(inputs[1])
        yield from () if shift is None else (abs(round(shift)),)
    if node.op_type not in _COMPARING or positions.isdisjoint(inputs):
        return
    for value in inputs:
        number = finite_number(value)
        if number is not None:
            yield abs(round(number))
        yield from _shifts(value, positions)


def _shifts(value: ir.Value, positions: set[ir.Value]) -> Iterator[int]:
    """The numbers added to positions on the way to `value`."""

    def above(value: ir.Value) -> list[ir.Value]:
        node = value.producer()
        return [] if node is None else [operand for operand in node.inputs if operand in positions]

    for held in walks.walk([value] if value in positions else [], above):
        node = held.producer()
        if node is not None and node.op_type in _SHIFTING:
            numbers = map(finite_number, node.inputs)
            yield from (abs(round(shift)) for shift in numbers if shift is not None)


def _last_bucket(node: ir.Node, positions: set[ir.Value]) -> Iterator[int]:
    """Where buckets that grow as the logarithm of the distance end: a·exp(c).

    T5 and DeBERTa write Mul(Div(Log(Div(distance, a)), c), buckets) with c = log(last / a).
    """
    if node.op_type != "Log" or node.outputs[0] not in positions:
        return
    start, above = 1.0, node.inputs[0].producer()
    if above is not None and above.op_type in ("Div", "Mul"):
        factor = next((c for c in map(finite_number, above.inputs) if c), None)
        start = start if factor is None else factor if above.op_type == "Div" else 1 / factor
    for user in node.outputs[0].consumers():
        factor = next((c for c in map(finite_number, user.inputs) if c), None)
        if factor and user.op_type in ("Div", "Mul"):
            length = factor if user.op_type == "Div" else 1 / factor
            if 0 < length < 20:
                yield math.ceil(start * math.exp(length))


def conditions(model: ir.Model) -> set[int]:
    """The sizes that decide which branch of an If runs."""
    deciding: set[int] = set()
    for node in graph.nodes(model):
        condition = node.inputs[0].producer() if node.op_type == "If" else None
        above = walks.upstream(condition) if condition is not None else ()
        for test in islice(above, CONDITION):
            if test.op_type in _COMPARING | {"Equal"}:
                numbers = filter(None, map(finite_number, test.inputs))
                deciding |= {abs(round(number)) for number in numbers}
    return deciding


def tables(model: ir.Model, positions: set[ir.Value]) -> list[int]:
    """How many rows the tables have that are looked up by `positions`, or cut to their number."""
    lengths: set[int] = set()
    for node in graph.nodes(model):
        if node.op_type in ("Gather", "GatherElements") and node.inputs[1] in positions:
            lengths |= {*_rows(node.inputs[0], node.attributes.get_int("axis", 0))}
        elif node.op_type == "Slice" and len(node.inputs) > 2:
            data, end = node.inputs[0], finite_number(node.inputs[2])
            axes = node.inputs[3] if len(node.inputs) > 3 else None
            axis = finite_number(axes) if axes is not None else 0
            if data.is_initializer() and end is None and axis is not None:
                lengths |= {*_rows(data, int(axis))}
    return sorted(rows for rows in lengths if rows > LARGE_TABLE)


def _rows(table: ir.Value, axis: int) -> Iterator[int]:
    shape = table.shape
    if shape is not None and -len(shape) <= axis < len(shape) and isinstance(shape[axis], int):
        yield shape[axis]


def table(model: ir.Model) -> int | None:
    """The rows of the smallest table of sines whose operator does not look whether it ends."""
    rows = []
    for node in graph.nodes(model):
        rotates = (node.domain, node.op_type) == (graph.MICROSOFT, "RotaryEmbedding")
        at = 2 if rotates else next(iter(operators.numbers(node, Holds.COS)), None)
        value = node.inputs[at] if at is not None and len(node.inputs) > at else None
        if value is not None and value.shape is not None and isinstance(value.shape[0], int):
            rows.append(value.shape[0])
    return min(rows, default=None)


def written(model: ir.Model) -> dict[int, list[ir.Node]]:
    """The sizes above 1 that constants give to Reshape and Expand, and to which nodes: one may be a
    length that the exporter wrote into the graph. Most frequent first."""
    nodes_by_size: dict[int, list[ir.Node]] = {}
    for node in graph.nodes(model):
        if node.op_type in ("Reshape", "Expand"):
            for size in {*sizes(node.inputs[1])}:
                if size > 1:
                    nodes_by_size.setdefault(size, []).append(node)
    return dict(sorted(nodes_by_size.items(), key=lambda item: -len(item[1])))


def sizes(shape: ir.Value | None) -> Iterator[int]:
    """The sizes in a shape that are constants, if it is put together of several."""
    node = shape.producer() if shape is not None else None
    if node is not None and node.op_type in ("Concat", "Unsqueeze", "Cast", "Identity"):
        for value in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
            yield from sizes(value)
        return
    tensor = ir.convenience.get_const_tensor(shape) if shape is not None else None
    if tensor is not None and 0 < tensor.size < 16 and tensor.dtype.is_integer():
        yield from (int(item) for item in tensor.numpy().ravel())
