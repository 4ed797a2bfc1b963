"""What `attention` recognises around the scores: one function for each form that takes a look."""

from collections.abc import Iterable

import onnx_ir as ir

from helpers import graph
from helpers.graph import walks
from helpers.graph.values import NOTHING, constant, dim, number, rank, sized_by

_CONDITIONS = {"Cast", "Expand", "Identity", "Not", "Unsqueeze"}  # what a mask goes through


def keeps_scores(node: ir.Node, at: int) -> bool:
    """Whether `node` bounds the scores where none is: Max(x, lowest), Clip(x, lowest, highest).

    `lowest` is a number as low as a masked score's, `highest` one as far above 0.
    """
    bounds = [number(value) for i, value in enumerate(node.inputs) if i != at and value is not None]
    if node.op_type == "Max":
        return None not in bounds and max(bounds) <= NOTHING
    if node.op_type != "Clip" or None in bounds:
        return False
    return all(abs(bound) >= -NOTHING for bound in bounds)


def keeps_weights(node: ir.Node, at: int) -> bool:
    """Whether `node` bounds the weights by what they are within: Clip(p, 0, 1), Max(p, 0)."""
    bounds = [number(value) for i, value in enumerate(node.inputs) if i != at and value is not None]
    if None in bounds or node.op_type not in ("Clip", "Max", "Min"):
        return False
    return all(bound <= 0.0 or bound >= 1.0 for bound in bounds)


def never_holds(condition: ir.Value, of_weights: set[ir.Value]) -> bool:
    """Whether `condition` holds for no weight: IsInf(p), or a test beside it.

    nan_to_num writes Where(And(IsInf(p), Greater(p, 0)), highest, p) behind that of IsNaN.
    """
    origin, holds = unwrapped(condition, True)
    node = origin.producer()
    if node is None or not holds:
        return False
    if node.op_type == "And":
        return any(never_holds(operand, of_weights) for operand in node.inputs)
    return node.op_type == "IsInf" and node.inputs[0] in of_weights


def tells_no_key(condition: ir.Value, holds: bool, of_scores: set[ir.Value], keys: int) -> bool:
    """Whether `condition` holds, or does not, in rows without a key alone; axis `keys` is theirs.

    IsNaN(p)                                of a weight: a Softmax over nothing is not a number
    Not(ReduceMax(Not(Equal(s, -inf))))     of scores (…, S, T): one for each row, by their lowest
    """
    origin, holds = unwrapped(condition, holds)
    node = origin.producer()
    if node is None or origin not in of_scores:
        return False
    if node.op_type == "IsNaN":
        return holds
    tests = above(origin, of_scores)
    bounds = [number(value) for test in tests for value in test.inputs if value is not None]
    lowest = any(bound is not None and bound <= NOTHING for bound in bounds)
    infinite = any(test.op_type == "IsInf" for test in tests)
    return (lowest or infinite) and dim(condition, keys) == 1


def keeps_shape(node: ir.Node, site: graph.Site) -> bool:
    """Whether the Reshape `node` of the site's result (B, N, S, Dv) gives it the sizes it has.

    Reshape(result, Concat(B, N, S, Dv)), with each size read off the result, the queries or the
    values; or one of them -1.
    """
    sizes = node.inputs[1].producer()
    if sizes is None or sizes.op_type != "Concat" or len(sizes.inputs) != 4:
        return False
    same = [(node.inputs[0], axis) for axis in range(4)]
    same += [(site.scores.inputs[0], axis) for axis in (0, 1, 2)]
    same.append((site.context.inputs[1], 3))
    inferred = 0
    for axis, size in enumerate(sizes.inputs):
        source = sized_by(size)
        if number(size) == -1:
            inferred += 1
        elif source not in same or source[1] != axis:
            return False
    return inferred <= 1


def swapped_in_three(value: ir.Value) -> ir.Value | None:
    """What `value` is with its last two axes exchanged, if they were with the others merged.

    onnxscript writes the transpose of keys as

        k (B, N, T, D) → Reshape (B·N, T, D) → Transpose (B·N, D, T) → Reshape (B, N, D, T)
    """
    back = value.producer()
    swap = back.inputs[0].producer() if back is not None and back.op_type == "Reshape" else None
    if swap is None or [*(swap.attributes.get_ints("perm") or [])] != [0, 2, 1]:
        return None
    merge = swap.inputs[0].producer()
    if merge is None or merge.op_type != "Reshape" or rank(merge.inputs[0]) != rank(value):
        return None
    inner = merge.inputs[0]
    pairs = [(dim(inner, -1), dim(value, -2)), (dim(inner, -2), dim(value, -1))]
    return inner if all(size == other or None in (size, other) for size, other in pairs) else None


def off_the_top(node: ir.Node) -> bool:
    """Whether `node` takes from the scores their maximum in each row, which changes no weight.

    Sub(x, ReduceMax(x, axis -1))                 x (…, S, T), the maximum (…, S, 1)
    Sub(x, Unsqueeze(ReduceMax(x, axis -1)))      the maximum (…, S), without its axis kept
    """
    top = node.inputs[-1] and node.inputs[-1].producer()
    if top is not None and top.op_type == "Unsqueeze":
        top, keeps = top.inputs[0].producer(), 0
    else:
        keeps = 1
    if node.op_type != "Sub" or top is None or top.op_type != "ReduceMax":
        return False
    axes = top.attributes.get_ints("axes") or constant(top.inputs[1] if top.inputs[1:] else None)
    last = axes is not None and [*axes] in ([-1], [(rank(top.inputs[0]) or 0) - 1])
    return last and top.attributes.get_int("keepdims", 1) == keeps


def unwrapped(condition: ir.Value, holds: bool) -> tuple[ir.Value, bool]:
    """What a condition was made of, and whether it must hold or not.

    Expand(Unsqueeze(Not(c)))    c (B, T) or (S, T), which must not hold where that holds
    """
    while (node := condition.producer()) is not None and node.op_type in _CONDITIONS:
        holds ^= node.op_type == "Not"
        condition = node.inputs[0]
    return condition, holds


def above(value: ir.Value, within: set[ir.Value]) -> set[ir.Node]:
    """The nodes among those that make `within` that `value` is computed by."""

    def inside(nodes: Iterable[ir.Node]) -> list[ir.Node]:
        return [node for node in nodes if not within.isdisjoint(node.outputs)]

    start = value.producer()
    starts = inside([start] if start is not None else [])
    return {*walks.walk(starts, lambda node: inside(walks.producers(node)))}


def named(softmax: ir.Node) -> str:
    """The operator's name, after the Softmax's, in which the module may be written."""
    name = graph.name(softmax)
    for word, other in (("Softmax", "Attention"), ("softmax", "attention")):
        if word in name:
            return name.replace(word, other)
    return f"{name}/Attention"
