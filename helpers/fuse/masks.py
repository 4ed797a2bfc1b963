"""Where a mask keeps the scores, so that it is known again when it is set once more on the weights.

The weight of a masked score is 0. Setting it to 0 after the Softmax changes rows without a key
alone, whatever the mask is written as, before and after:

    where(pads, -inf, s)        where(Not(pads), weights, 0)
    s + (1 - mask)·-1e9         weights·mask
    where(a and b, s, -inf)     where(a, weights, 0)·b

A mask is read as the facts that hold where it keeps a score: that some value, at some axes of the
scores, is 0, is 1, or is not 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from helpers.graph.values import (
    ELEMENTWISE,
    FILLED_UP_TO,
    LOGICAL,
    NOTHING,
    SHAPE_UP_TO,
    SHAPING,
    constant,
    number,
    rank,
)

ZERO, ONE, OTHER = "0", "1", "not 0"
Step = tuple[str, ir.Value]  # what is done to scores or weights, and by which value
# Where the axes of a value are among the scores', from the end; those before the last two with how
# many axes the scores have there.
Axes = tuple[tuple[int, int], ...]

_DEEP = 6  # nodes above one another that are compared, where two values are computed alike
_RANDOM = {"Bernoulli", "Dropout", "Multinomial"}
_WHOLE = {ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8}
_SAME = {"Cast", "CastLike", "Expand", "Identity"}


class Fact(NamedTuple):
    """That `what`, whose axes are at `axes` of the scores, is in `state`; `what` of a constant is
    where it is."""

    what: Hashable
    state: str
    axes: Axes | None


def once_more(after: Step, *before: Step) -> bool:
    """Whether a mask set `after` the Softmax masks no more than those set `before` it, as far as is
    known: for the check of a rewrite rule. All are beside the scores as they are."""
    known, asked = (
        set().union(*(read(how, value, places(value, False, 0)) for how, value in steps))
        for steps in (before, [after])
    )
    return covers(known, asked)


def read(how: str, value: ir.Value, axes: Axes | None) -> set[Fact]:
    """What holds where the scores, or weights, are kept by a step: "keep" those where `value`
    holds, or "masked" where it does, "Add" it, "Sub" it, "Mul" or "Div" by it."""
    if how in ("Add", "Sub"):
        return kept(value, axes, 1 if how == "Add" else -1)
    return facts(value, {"keep": OTHER, "masked": ZERO}.get(how, ONE), axes)


def covers(known: set[Fact], asked: Iterable[Fact]) -> bool:
    """Whether all that is `asked` holds wherever all that is `known` does."""
    return all(
        fact in known or (fact.state == OTHER and fact._replace(state=ONE) in known)
        for fact in asked
    )


def places(value: ir.Value, flipped: bool, layout: int) -> Axes | None:
    """Where the axes of `value` are, beside scores (…, S, T), or (…, T, S) where `flipped`, with
    `layout` axes; None where it is not known how many it has."""
    axes = _rank(value)
    if axes is None:
        return None
    swapped = {-1: -2, -2: -1} if flipped else {}
    found = (swapped.get(axis, axis) for axis in range(-axes, 0))
    return tuple((layout if axis < -2 else 0, axis) for axis in found)


def facts(value: ir.Value, state: str, axes: Axes | None) -> set[Fact]:
    """What holds where `value` is in `state`, and together says that it is.

    A mask of integers that the graph is given is taken to be of 0 and 1.
    """
    known = number(value)
    if known is not None and _is(known, state):
        return set()
    node, array = value.producer(), _array(value)
    if array is not None and axes is not None:
        return {_of_array(_is(array, state), axes)}
    kind = node.op_type if node is not None else ""
    if kind in _SAME and (kind == "Expand" or _keeps_state(node)):
        made_bool = _dtype(value) == ir.DataType.BOOL and state == ONE
        return facts(node.inputs[0], OTHER if made_bool else state, _above(node, 0, axes))
    if kind in ("Unsqueeze", "Transpose") and axes is not None:
        return facts(node.inputs[0], state, _above(node, 0, axes))
    if kind == "Not":
        return facts(node.inputs[0], OTHER if state == ZERO else ZERO, axes)
    if (kind, state == ZERO) in (("And", False), ("Or", True), ("Mul", False)):
        # All of them, where it is a product; none of them, where it is a sum.
        return set().union(
            *(facts(operand, state, _above(node, i, axes)) for i, operand in enumerate(node.inputs))
        )
    exact = state != OTHER or (kind == "Sub" and _is_mask(node.inputs[1]))
    if kind == "Sub" and number(node.inputs[0]) == 1.0 and exact:  # 1 - x
        return facts(node.inputs[1], ONE if state == ZERO else ZERO, _above(node, 1, axes))
    if kind == "Sub" and number(node.inputs[1]) == 1.0 and state == ZERO:  # x - 1
        return facts(node.inputs[0], ONE, _above(node, 0, axes))
    if kind == "Equal" and number(node.inputs[1]) == 0.0:
        return facts(node.inputs[0], OTHER if state == ZERO else ZERO, _above(node, 0, axes))
    return {Fact(_key(value), ONE if state == OTHER and _is_mask(value) else state, axes)}


def kept(bias: ir.Value, axes: Axes | None, sign: int = 1) -> set[Fact]:
    """What holds wherever `sign` · `bias`, which is added to the scores, masks none."""
    node, array = bias.producer(), _array(bias)
    if array is not None and axes is not None:
        return {_of_array(sign * array > NOTHING, axes)}
    if node is None:
        return set()
    kind, inputs = node.op_type, node.inputs

    def of(i: int, sign: int = sign) -> set[Fact]:
        return kept(inputs[i], _above(node, i, axes), sign)

    if kind in _SAME or (kind in ("Unsqueeze", "Transpose") and axes is not None):
        return of(0)
    if kind == "Neg":
        return of(0, -sign)
    if kind == "Sub":
        return of(0) | of(1, -sign)
    if kind == "Add" or (kind == "Min" and sign > 0):
        return set().union(*map(of, range(len(inputs))))
    if kind == "Where":  # where(c, 0, lowest) or where(c, lowest, 0)
        condition = _above(node, 0, axes)
        if _is_low(inputs[2], sign):
            return facts(inputs[0], OTHER, condition) | of(1)
        if _is_low(inputs[1], sign):
            return facts(inputs[0], ZERO, condition) | of(2)
    if kind == "Mul":  # (1 - mask)·lowest or (mask - 1)·highest
        for i in (0, 1):
            below = inputs[i].producer()
            less = below is not None and below.op_type == "Sub" and number(below.inputs[1]) == 1.0
            if _is_low(inputs[1 - i], -sign if less else sign):
                return facts(inputs[i], ZERO, _above(node, i, axes))
    return set()


def _is_low(value: ir.Value, sign: int) -> bool:
    given = number(value)
    return given is not None and sign * given <= NOTHING


def _is(given: float | np.ndarray, state: str) -> bool | np.ndarray:
    return given == 1 if state == ONE else (given == 0) == (state == ZERO)


def _keeps_state(node: ir.Node) -> bool:
    """Whether what the cast `node` makes is 0 where its input is, and not 0 where that is not."""
    made = _dtype(node.outputs[0])
    return (
        node.op_type == "Identity"
        or made == ir.DataType.BOOL
        or _dtype(node.inputs[0]) in _WHOLE
        or (made is not None and made.is_floating_point())
    )


def _dtype(value: ir.Value) -> ir.DataType | None:
    """The type of `value`, where that is not stated from what makes it."""
    node = value.producer()
    if value.dtype is not None or node is None:
        return value.dtype
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to"))
    if node.op_type in LOGICAL:
        return ir.DataType.BOOL
    return _dtype(node.inputs[0]) if node.op_type in SHAPING and node.inputs else None


def _rank(value: ir.Value) -> int | None:
    """How many axes `value` has, where that is not stated from what makes it."""
    node, known = value.producer(), rank(value)
    if known is not None or node is None:
        return known
    if node.op_type in LOGICAL | ELEMENTWISE - {"Expand"}:
        ranks = [_rank(operand) for operand in node.inputs if operand is not None]
    elif node.op_type in ("Transpose", "Unsqueeze"):
        ranks = [_rank(node.inputs[0])]
    else:
        return None
    new = constant(node.inputs[1]) if node.op_type == "Unsqueeze" else ()
    return None if None in ranks or new is None else max(ranks) + np.size(new)


def _above(node: ir.Node, position: int, axes: Axes | None) -> Axes | None:
    """Where the axes of an input of `node` are, whose result has its own at `axes`."""
    count = _rank(node.inputs[position])
    if axes is None or count is None:
        return None
    if node.op_type == "Transpose":
        perm = [*(node.attributes.get_ints("perm") or range(count)[::-1])]
        return tuple(axes[perm.index(i)] for i in range(count))
    if node.op_type == "Unsqueeze":
        new = constant(node.inputs[1])
        if new is None:
            return None
        at = {int(axis) % len(axes) for axis in np.ravel(new)}
        return tuple(place for i, place in enumerate(axes) if i not in at)
    return axes[len(axes) - count :] if count <= len(axes) else None


def _array(value: ir.Value) -> np.ndarray | None:
    """The numbers of a constant, if they are few enough to look at."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > FILLED_UP_TO or tensor.dtype == ir.DataType.STRING:
        return None
    try:
        return tensor.numpy()
    except FileNotFoundError:  # left out, with the large weights
        return None


def _of_array(holds: np.ndarray, axes: Axes) -> Fact:
    """Where a constant is as it is asked to be; leading axes of 1 say nothing."""
    while holds.ndim and holds.shape[0] == 1:
        holds, axes = holds[0], axes[1:]
    return Fact((holds.shape, holds.tobytes()), ONE, axes)


def _is_mask(value: ir.Value) -> bool:
    """Whether `value` is of 0 and 1: a bool, integers that the graph is given, or made of such."""
    node = value.producer()
    if _dtype(value) == ir.DataType.BOOL:
        return True
    if node is None:
        return value.is_graph_input() and value.dtype in _WHOLE
    if node.op_type in SHAPING | {"Trilu"} and node.op_type not in ("Concat", "Pad"):
        return _is_mask(node.inputs[0])
    return node.op_type == "ConstantOfShape" and number(value) in (0.0, 1.0)


def _key(value: ir.Value, deep: int = _DEEP) -> Hashable:
    """The same for values that are computed alike, by nodes of their own, of the same values."""
    node, array = value.producer(), constant(value)
    if array is not None:
        return (str(array.dtype), array.shape, array.tobytes())
    settings = _settings(node) if node is not None and deep else None
    if settings is None:
        return value
    inputs = tuple(None if one is None else _key(one, deep - 1) for one in node.inputs)
    return (node.domain, node.op_type, value.index(), settings, inputs)


def _settings(node: ir.Node) -> Hashable:
    """The attributes of `node`; None where they do not tell all that it makes of its inputs."""
    settings = []
    if node.op_type.startswith("Random") or node.op_type in _RANDOM:
        return None
    for attribute in node.attributes.values():
        told = attribute.value
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            if told.size > SHAPE_UP_TO:
                return None
            told = told.numpy().tolist()
        settings.append((attribute.name, str(told)))
    return tuple(sorted(settings))
