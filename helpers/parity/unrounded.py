"""8-bit graphs without their rounding, so that they are compared as closely as those in floats.

Where numbers are rounded to steps, one that falls on a step's other side moves what comes after it:
a graph of twelve products in a row that sums in another order may differ from itself by half of the
output's spread. A fault is told from that by leaving the rounding out of both graphs:

    QuantizeLinear(x, scale, zero)      →  Clip(x / scale + zero, lowest, highest)
    DequantizeLinear(y, scale, zero)    →  (y - zero) · scale
    DynamicQuantizeLinear(x)            →  x, 1, 0
    MatMulInteger(a, b, …)              →  MatMul(a - zero, b - zero)
    ConvInteger(x, w, …)                →  Conv(x - zero, w - zero)
    DynamicQuantizeMatMul(a, b, …)      →  MatMul(a, (b - zero) · scale) + bias
    MatMulIntegerToFloat(a, b, …)       →  MatMul(a - zero, (b - zero) · scale) · scale + bias

What was integers is floats of the same numbers, up to the rounding. Weights stay as they are.
Follows ONNX's definitions of the first five, and ONNX Runtime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers import files, graph
from helpers.graph.values import constant

RANGES = {
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65_535),
    ir.DataType.INT16: (-32_768, 32_767),
}
_MOVING = {"Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split"}
_MOVING |= {"Squeeze", "Transpose", "Unsqueeze"}  # their first input

OPSET = 11  # from which Clip has its ends as inputs
_FLOAT = int(ir.DataType.FLOAT)

Steps = frozenset[tuple]  # what is rounded to: operator, scale and zero point


class _Stays(Exception):
    """Rounding that cannot be taken out."""


def write(model: files.Opened, out: Path) -> Steps | None:
    """Write `model` without its rounding to `out`, and return what it rounds to; None, and no file,
    where that cannot be done."""
    changed = graph.load(model.path)
    try:
        steps = _take_out(changed)
    except _Stays:
        return None
    files.write(changed, out)
    return steps


def _take_out(model: ir.Model) -> Steps:
    """Take the rounding of what is computed out, in place."""
    if model.opset_imports.get("", OPSET) < OPSET:
        raise _Stays
    passes.RemoveUnusedNodesPass()(model)
    computed = graph.from_input(model)
    floats: set[ir.Value] = set()  # what was integers
    steps: set[tuple] = set()
    for inside in model.graphs():
        inside.sort()
    for node in [*graph.nodes(model)]:
        was_integers = not floats.isdisjoint(node.inputs)
        if not was_integers and (not _rounds(node) or computed.isdisjoint(node.inputs)):
            continue
        if node.op_type in _WRITTEN:
            tape = ir.tape.Tape()
            outputs = _WRITTEN[node.op_type](tape, node, floats)
            if _rounds(node):
                steps.add(_step(node))
            if node.op_type in _TO_INTEGERS:
                floats.update(outputs[:1], outputs[2:])  # and the zero point; the scale never was
            _replace(node, tape, outputs)
        elif was_integers and _moves(node, floats):
            floats.update(node.outputs)
            for value in node.outputs:
                value.type = value.shape = None
        elif not _is_cast_to_float(node):
            raise _Stays
    if any(value in floats for inside in model.graphs() for value in inside.outputs):
        raise _Stays
    return frozenset(steps)


def _rounds(node: ir.Node) -> bool:
    """Whether `node` makes integers of floats, or computes in them."""
    quantised = graph.is_quantised(node.op_type) and not node.op_type.endswith("NBits")
    return quantised and node.op_type != "DequantizeLinear"


def _moves(node: ir.Node, floats: set[ir.Value]) -> bool:
    if node.op_type == "Concat":
        return floats.issuperset(node.inputs)
    return node.op_type in _MOVING and floats.isdisjoint(node.inputs[1:])


def _is_cast_to_float(node: ir.Node) -> bool:
    target = ir.DataType(node.attributes.get_int("to", ir.DataType.UNDEFINED))
    return node.op_type == "Cast" and target.is_floating_point()


def _step(node: ir.Node) -> tuple:
    """What `node` rounds to: steps that are made of its input are all alike."""
    if node.op_type != "QuantizeLinear":
        return ("dynamic",)
    given = [constant(value) for value in node.inputs[1:]]
    return (node.op_type, *(None if one is None else (str(one.dtype), one.item()) for one in given))


def _replace(node: ir.Node, tape: ir.tape.Tape, outputs: list[ir.Value]) -> None:
    node.graph.insert_before(node, [*tape.nodes])
    for old, new in zip(node.outputs, outputs, strict=False):
        new.name = old.name
        if node.op_type not in _TO_INTEGERS:
            new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


# ── One operator ────────────────────────────────────────────────────────────────────────────────


def _quantize(tape: ir.tape.Tape, node: ir.Node, floats: set[ir.Value]) -> list[ir.Value]:
    (given, scale), zero = node.inputs[:2], _input(node, 2)
    dtype = given.dtype or scale.dtype or ir.DataType.FLOAT
    kind = ir.DataType(node.attributes.get_int("output_dtype", 0)) or ir.DataType.UINT8
    kind = kind if zero is None else zero.dtype
    if kind not in RANGES or not _is_single(scale) or "saturate" in node.attributes:
        raise _Stays
    steps = tape.op("Div", [given, scale])
    if zero is not None:
        steps = tape.op("Add", [steps, tape.op("Cast", [zero], {"to": int(dtype)})])
    ends = [_number(tape, end, dtype) for end in RANGES[kind]]
    return [tape.op("Clip", [steps, *ends])]


def _dequantize(tape: ir.tape.Tape, node: ir.Node, floats: set[ir.Value]) -> list[ir.Value]:
    (given, scale), zero = node.inputs[:2], _input(node, 2)
    if not _is_single(scale):
        raise _Stays
    if zero is not None:
        dtype = scale.dtype or ir.DataType.FLOAT
        given = tape.op("Sub", [given, tape.op("Cast", [zero], {"to": int(dtype)})])
    return [tape.op("Mul", [given, scale])]


def _dynamic(tape: ir.tape.Tape, node: ir.Node, floats: set[ir.Value]) -> list[ir.Value]:
    return [tape.op("Identity", node.inputs), _number(tape, 1), _number(tape, 0)]


def _product(tape: ir.tape.Tape, node: ir.Node, floats: set[ir.Value]) -> list[ir.Value]:
    pairs = zip(node.inputs[:2], (_input(node, 2), _input(node, 3)), strict=True)
    operands = [_centred(tape, value, zero, floats) for value, zero in pairs]
    return [tape.op("MatMul", operands)]


def _convolution(tape: ir.tape.Tape, node: ir.Node, floats: set[ir.Value]) -> list[ir.Value]:
    given, weight, zeros = *node.inputs[:2], [_input(node, 2), _input(node, 3)]
    if not all(zero is None or _is_single(zero) for zero in zeros):
        raise _Stays
    pairs = zip((given, weight), zeros, strict=True)
    operands = [_centred(tape, value, zero, floats) for value, zero in pairs]
    return [tape.op("Conv", operands, dict(node.attributes))]


def _dynamic_product(tape: ir.tape.Tape, node: ir.Node, floats: set[ir.Value]) -> list[ir.Value]:
    given, weight, scale = node.inputs[:3]
    weight = tape.op("Mul", [_centred(tape, weight, _input(node, 3), floats), scale])
    return [_biased(tape, tape.op("MatMul", [given, weight]), _input(node, 4))]


def _product_to_float(tape: ir.tape.Tape, node: ir.Node, floats: set[ir.Value]) -> list[ir.Value]:
    given, weight, scale, weight_scale = node.inputs[:4]
    weight = _centred(tape, weight, _input(node, 5), floats)
    operands = [
        tape.op("Mul", [_centred(tape, given, _input(node, 4), floats), scale]),
        tape.op("Mul", [weight, weight_scale]),
    ]
    return [_biased(tape, tape.op("MatMul", operands), _input(node, 6))]


_WRITTEN: dict[str, Callable[[ir.tape.Tape, ir.Node, set[ir.Value]], list[ir.Value]]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _product,
    "ConvInteger": _convolution,
    "DynamicQuantizeMatMul": _dynamic_product,
    "MatMulIntegerToFloat": _product_to_float,
}
_TO_INTEGERS = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}


def _number(tape: ir.tape.Tape, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    tensor = ir.tensor(np.array(value, dtype.numpy()), dtype=dtype)
    return tape.op("Constant", [], {"value": tensor})


def _input(node: ir.Node, number: int) -> ir.Value | None:
    return node.inputs[number] if number < len(node.inputs) else None


def _is_single(value: ir.Value) -> bool:
    """Whether it is one number, for the tensor as a whole."""
    array = constant(value)
    return array.size == 1 if array is not None else value.shape is not None and not value.shape


def _centred(
    tape: ir.tape.Tape, value: ir.Value, zero: ir.Value | None, floats: set[ir.Value]
) -> ir.Value:
    """Integers, or what was, as floats without their zero point."""
    value, zero = (
        one if one is None or one in floats else tape.op("Cast", [one], {"to": _FLOAT})
        for one in (value, zero)
    )
    return value if zero is None else tape.op("Sub", [value, zero])


def _biased(tape: ir.tape.Tape, value: ir.Value, bias: ir.Value | None) -> ir.Value:
    return value if bias is None else tape.op("Add", [value, bias])
