"""The operator that stands for an attention site, built from what has been read of the site.

`attention` reads a site into a `Reading`; `build` makes of it

    Attention(query, key, value, bias, scale=…, softcap=…)

with what brings the operands to four axes before it, and its result back to the site's own after
it. Shapes: queries (B, N, S, D), keys (B, N, T, D), values (B, N, T, Dv), bias (B, N, S, T), with
any number of axes before the last two.
"""

import dataclasses

import numpy as np
import onnx_ir as ir

from helpers import graph
from helpers.fuse import forms, masks
from helpers.graph.shapes import expanded
from helpers.graph.values import dim, rank, tail

RESHAPES = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}


class Tape(ir.tape.Tape):
    """New nodes in order, with a method for each small form that is written often."""

    def ints(self, *numbers: int) -> ir.Value:
        """The constant (numbers)."""
        return self.op("Constant", [], {"value_ints": numbers})

    def number(self, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The constant `value`, of no axes."""
        array = np.array(value, dtype.numpy())
        return self.op("Constant", [], {"value": ir.tensor(array, dtype=dtype)})

    def sizes(self, value: ir.Value, start: int, end: int | None = None) -> ir.Value:
        """The sizes of the axes of `value` from `start` to before `end`, (number of axes,)."""
        ends = {"start": start} if end is None else {"start": start, "end": end}
        return self.op("Shape", [value], ends)

    def shape(self, *sizes: ir.Value) -> ir.Value:
        """The shape that is put together of `sizes`, each of one axis."""
        return self.op("Concat", sizes, {"axis": 0})

    def repeated(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """What `node` does to its first input, done to `value`."""
        inputs, attributes = [value, *node.inputs[1:]], dict(node.attributes)
        return self.op(node.op_type, inputs, attributes, domain=node.domain)


@dataclasses.dataclass
class Reading:
    """What is known of a site so far: all that is read, and all that is built from."""

    site: graph.Site
    from_input: set[ir.Value]  # the model's values that depend on what is in its inputs
    tape: Tape = dataclasses.field(default_factory=Tape)
    as_rule: bool = False  # sizes are read off the operands alone, which are all that a rule has
    expands: bool = False  # the bias, whatever is known of its sizes

    # The operands, with as many `axes` as the scores have; where they are `flipped`, the keys are
    # on the last axis but one of the scores.
    axes: int = 0
    flipped: bool = False
    keys_first: bool = False  # so it is in the product itself, before any Transpose
    query: ir.Value | None = None
    key: ir.Value | None = None
    value: ir.Value | None = None

    # What is done to the scores.
    scale: float = 1.0
    softcap: float | None = None
    in_tanh: bool = False  # a tanh has been read, the factor after it has not
    bias: ir.Value | None = None
    bias_is_whole: bool = False  # it has been brought to the shape of all scores
    row_scales: list[tuple[str, ir.Value]] = dataclasses.field(default_factory=list)  # Mul or Div
    casts: bool = False
    reshapes: list[ir.Node] = dataclasses.field(default_factory=list)
    shifted: bool = False  # each row by a number, which changes no weight
    masked_by: list[masks.Step] = dataclasses.field(default_factory=list)
    kept: set[masks.Fact] = dataclasses.field(default_factory=set)  # what holds where none masks
    added_keys: ir.Value | None = None  # how many, that are not the product's

    # Where the numbers come from: the factors of the scale, the softcap, and constants on the tape.
    factors: list[tuple[str, ir.Value]] = dataclasses.field(default_factory=list)  # Mul or Div
    cap: ir.Value | None = None
    numbers: dict[ir.Value, ir.Value] = dataclasses.field(default_factory=dict)

    # What is done to the weights.
    result_scales: list[tuple[str, ir.Value]] = dataclasses.field(default_factory=list)
    masked_again: list[masks.Step] = dataclasses.field(default_factory=list)  # that change nothing
    by_rows: list[ir.Value] = dataclasses.field(default_factory=list)  # one number for all keys
    drops_added_keys: bool = False
    read_elsewhere: bool = False

    # The nodes that the operator stands for: those above its operands, on the way, and the last.
    above: list[ir.Node] = dataclasses.field(default_factory=list)
    before: list[ir.Node] = dataclasses.field(default_factory=list)
    after: list[ir.Node] = dataclasses.field(default_factory=list)
    last: ir.Node | None = None

    def shape_of_scores(self) -> ir.Value:
        """The shape (…, S, T) of the product of queries with keys."""
        sizes = self.tape.sizes
        return self.tape.shape(sizes(self.query, 0, -1), sizes(self.key, -2, -1))

    def whole(self, bias: ir.Value) -> ir.Value:
        """`bias` in the shape of all scores, as the product gives them."""
        if self.bias_is_whole:
            return bias
        self.bias_is_whole = True
        product = self.site.scores.outputs[0].shape
        if product is not None and not product.has_unknown_dim() and bias.shape == product:
            return bias
        return self.tape.op("Expand", [bias, self.shape_of_scores()])

    def broadcast(self, value: ir.Value, other: ir.Value, *, heads: bool = True) -> ir.Value:
        """`value` with as many axes as the scores, and no axis of size 1 where `other` has more.

        Without `heads`, the axis of the heads may be 1: the operator shares keys by itself.
        """
        missing = self.axes - (rank(value) or self.axes)
        leading = [*range(-self.axes, -3 if self.axes == 4 and not heads else -2)]
        shared = any(dim(value, axis) == 1 != dim(other, axis) for axis in leading)
        unknown = any(dim(value, axis) is None for axis in leading)
        learned = unknown and not self._comes_from_input(value)
        if missing:
            value = self.tape.op("Unsqueeze", [value, self.tape.ints(*range(missing))])
        if shared or learned:
            ones = self.tape.ints(*[1] * (self.axes - len(leading)))
            shape = self.tape.shape(self.tape.sizes(other, 0, len(leading)), ones)
            value = self.tape.op("Expand", [value, shape])
        return value

    def _comes_from_input(self, value: ir.Value) -> bool:
        node = value.producer()
        if node is None or node not in self.tape.nodes:
            return value in self.from_input
        return any(self._comes_from_input(operand) for operand in node.inputs)

    def padded(self, value: ir.Value) -> ir.Value:
        """Keys or values, (…, T, D), with zeros for the keys that were added."""
        tape = self.tape
        shape = tape.shape(tape.sizes(value, 0, -2), self.added_keys, tape.sizes(value, -1))
        zero = tape.op("CastLike", [tape.number(0.0), value])
        zeros = tape.op("Expand", [zero, shape])
        return tape.op("Concat", [value, zeros], {"axis": -2})


def build(reading: Reading) -> ir.Node:
    """Put a standard Attention in the place of the site that was read; returns it."""
    softmax = reading.site.node
    outputs, result = made(reading)
    replaced = {reading.last.outputs[0]: result}
    if reading.read_elsewhere:
        # Reshaped, since ONNX Runtime infers another shape for this output than it has.
        weights = reading.tape.op("Reshape", [outputs[3], reading.shape_of_scores()])
        replaced = {softmax.outputs[0]: weights, **replaced}
    for old, new in replaced.items():
        new.shape, new.type = old.shape, old.type
    _redirect_shapes(reading)
    reading.last.graph.insert_before(reading.last, reading.tape.nodes)
    for old, new in replaced.items():
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
    return outputs[0].producer()


def made(reading: Reading) -> tuple[list[ir.Value], ir.Value]:
    """The outputs of the operator, and its result as the site gives it; they are on the tape."""
    query, value = _scaled_query(reading), _value(reading)
    outputs = _operator(reading, query, value)
    return outputs, _result(reading, outputs[0])


def _scaled_query(reading: Reading) -> ir.Value:
    """The queries, with what scales each row of the scores multiplied into them."""
    query = reading.query
    for kind, factor in reading.row_scales:
        if reading.casts:
            factor = reading.tape.op("CastLike", [factor, query])
        query = reading.tape.op(kind, [query, factor])
    return query


def _value(reading: Reading) -> ir.Value:
    """The values, with the axes that the queries have."""
    if not reading.reshapes:
        return reading.broadcast(reading.value, reading.query, heads=False)
    tape = reading.tape
    shape = tape.shape(tape.sizes(reading.query, 0, -2), tape.sizes(reading.value, -2))
    return tape.op("Reshape", [reading.value, shape])


def _operator(reading: Reading, query: ir.Value, value: ir.Value) -> list[ir.Value]:
    """The Attention itself: its outputs."""
    softmax = reading.site.node
    if reading.casts:
        value = reading.tape.op("CastLike", [value, query])
    inputs = [_four_axes(reading, operand) for operand in (query, reading.key, value)]
    if reading.bias is not None:
        inputs.append(_four_axes_of_bias(reading, inputs[0], inputs[1]))
    attributes: dict[str, float | int] = {"scale": reading.scale}
    if reading.softcap is not None:
        attributes["softcap"] = reading.softcap
    if reading.casts:
        attributes["softmax_precision"] = int(ir.DataType.FLOAT)
    if reading.read_elsewhere:
        attributes["qk_matmul_output_mode"] = 3  # the weights, as its fourth output
    count = 4 if reading.read_elsewhere else 1
    outputs = reading.tape.op_multi_out("Attention", inputs, attributes, num_outputs=count)
    node = outputs[0].producer()
    node.metadata_props.update(softmax.metadata_props)
    node.name = forms.named(softmax)
    return [*outputs]


def _four_axes(reading: Reading, value: ir.Value) -> ir.Value:
    """`value`, of the rank of the scores, with four axes."""
    tape = reading.tape
    if reading.axes < 4:
        return tape.op("Unsqueeze", [value, tape.ints(*range(4 - reading.axes))])
    if reading.axes > 4:
        return tape.op("Reshape", [value, tape.shape(tape.ints(-1), tape.sizes(value, -3))])
    return value


def _four_axes_of_bias(reading: Reading, query: ir.Value, key: ir.Value) -> ir.Value:
    """The bias with sizes of its own on the last two axes, which the operator asks for."""
    bias, sizes = reading.bias, tail(reading.bias)
    if reading.bias_is_whole or reading.axes > 4:
        bias = reading.whole(bias)
        bias = reading.tape.op("Reshape", [bias, reading.shape_of_scores()])
        bias = _four_axes(reading, bias)
    elif (
        reading.expands or sizes != (dim(reading.query, -2), dim(reading.key, -2)) or None in sizes
    ):
        if reading.as_rule:
            tape = reading.tape
            rows, columns = tape.sizes(query, 2, 3), tape.sizes(key, 2, 3)
            bias = tape.op("Expand", [bias, tape.shape(tape.ints(1, 1), rows, columns)])
        else:
            bias = expanded(reading.tape, bias, query, key)
    return reading.tape.op("CastLike", [bias, query]) if reading.casts else bias


def _result(reading: Reading, result: ir.Value) -> ir.Value:
    """The operator's `result` as the product with the values gives it."""
    result = _own_axes(reading, result)
    if reading.casts:
        result = reading.tape.op("CastLike", [result, reading.value])
    for kind, factor in reading.result_scales:
        if reading.casts:
            factor = reading.tape.op("CastLike", [factor, reading.value])
        result = reading.tape.op(kind, [result, factor])
    if reading.flipped:
        perm = [*range(reading.axes - 2), reading.axes - 1, reading.axes - 2]
        result = reading.tape.op("Transpose", [result], {"perm": perm})
    return result


def _own_axes(reading: Reading, result: ir.Value) -> ir.Value:
    """The operator's `result`, of four axes, with those of the product with the values."""
    tape = reading.tape
    if reading.reshapes or reading.axes > 4:
        like = reading.value if reading.reshapes else reading.query
        leading, rows = tape.sizes(like, 0, -2), tape.sizes(reading.query, -2, -1)
        shape = tape.shape(leading, rows, tape.sizes(reading.value, -1))
        return tape.op("Reshape", [result, shape])
    if reading.axes == 4:
        return result
    return tape.op("Squeeze", [result, tape.ints(*range(4 - reading.axes))])


def _redirect_shapes(reading: Reading) -> None:
    """Have those that read the shape of scores, weights or result read it off the operands."""
    site, tape = reading.site, reading.tape
    for node in (site.scores, *reading.before, site.node, *reading.after):
        if node.op_type in (*RESHAPES, "Concat", "Slice", "Transpose"):
            break
        if not reading.flipped:
            redirect_shape(tape, node.outputs[0], reading.shape_of_scores())
    if not reading.flipped and not reading.reshapes:
        shape = tape.shape(tape.sizes(reading.query, 0, -1), tape.sizes(reading.value, -1))
        redirect_shape(tape, site.context.outputs[0], shape)


def redirect_shape(tape: Tape, value: ir.Value, shape: ir.Value) -> None:
    """Have those that ask for the shape of `value` take `shape` instead, but for the tape's own."""
    for user in [*value.consumers()]:
        if user.op_type != "Shape" or user in tape.nodes:
            continue
        start = user.attributes.get_int("start", None)
        end = user.attributes.get_int("end", None)
        asked = shape
        if start or end is not None:
            ends = [tape.ints(start or 0), tape.ints(2**31 if end is None else end)]
            asked = tape.op("Slice", [shape, *ends])
        user.outputs[0].replace_all_uses_with(asked)
