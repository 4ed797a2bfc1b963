"""The path that a graph has against the one that a fusion asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

import onnx

from helpers.explain.moment import Goal
from helpers.explain.reasons import ActualPath, Attempt, Node
from helpers.graph import walks

STEPS = 20_000  # of the search for a path, at the most
ANYWHERE = Goal()
_ANY_ORDER = {"Add", "And", "Max", "Min", "Mul", "Or", "SkipLayerNormalization"}
_ANY_ORDER |= {"SkipSimplifiedLayerNormalization", "Sum"}


class Nearest(NamedTuple):
    """A path in the graph, each node with the input of the node before that it computes, and how
    much it differs from the one that was asked for. `aside` is whether it leaves the nodes that
    were matched: any input would do, and another was taken."""

    cost: float
    steps: tuple[tuple[onnx.NodeProto, int], ...]
    aside: bool = False


def nearest(
    attempt: Attempt, producers: dict[str, onnx.NodeProto], goal: Goal | None = None
) -> Nearest | None:
    """The path that the graph has from the attempt's start to `goal`, or where none leads there, to
    an operator of the kind wanted last; None where none is near. `producers` has the nodes by
    output.

    Of all such paths the one that needs fewest changes of what was expected: an operator more costs
    1, one less costs 1, another input than expected a little (Dijkstra on the edit distance). It
    goes through the nodes that matched and the input at which the attempt broke, if it can; through
    another input, if that leads to the end, which costs 1.1 more unless that is all that it needs,
    as where a sum's operands are in another order; and, where any input would do, past the nodes
    that matched if it fits much better. Without a `goal`, by any input.
    """
    if attempt.down:
        return None
    for end in dict.fromkeys((goal or ANYWHERE, ANYWHERE)):
        matched, through = len(attempt.matched), None
        if goal is not None:
            through = _nearest(attempt, producers, end, matched, along=True)
        if through is None:
            through = _nearest(attempt, producers, end, matched, along=False)
            if goal is not None and through is not None and through.cost >= 1:
                through = through._replace(cost=through.cost + 1.1)
        if None in attempt.inputs[:matched]:
            other = _nearest(attempt, producers, end, 0, along=False)
            if other and (through is None or other.cost + 0.5 < through.cost):
                return other._replace(aside=True)
        if through is not None:
            return through
    return None


def _nearest(
    attempt: Attempt, producers: dict[str, onnx.NodeProto], goal: Goal, matched: int, *, along: bool
) -> Nearest | None:
    """The nearest path through the first `matched` nodes, and if `along`, on by the input at which
    the attempt broke."""
    wanted = attempt.expected
    fixed = [matched_node.output for matched_node in attempt.matched]
    broke_by = attempt.inputs[len(fixed)] if along else None
    # cost, a number against ties, how many of the wanted are behind, output, path, it ends here
    queue: list[tuple[float, int, int, str, tuple, bool]]
    queue = [(0, 0, 0, attempt.start.output, (), False)]
    seen, tie = set(), 0
    while queue and tie < STEPS:
        cost, _, reached, output, path, ends = heapq.heappop(queue)
        if ends:
            return Nearest(cost, path)
        if (output, reached, len(path) <= matched) in seen or cost > goal.dearest(wanted):
            continue
        seen.add((output, reached, len(path) <= matched))
        if path and goal.is_end(path[-1][0], wanted[-1]):
            left = len(wanted) - reached
            if left == 0 or goal.outputs:
                tie += 1
                heapq.heappush(queue, (cost + left, tie, reached, output, path, True))
                continue
        if len(path) >= matched and reached < len(wanted) - 1:  # it does without this operator
            tie += 1
            heapq.heappush(queue, (cost + 1, tie, reached + 1, output, path, False))
        for index, name in enumerate(producers[output].input if output in producers else ()):
            above = producers.get(name)
            if above is None or not goal.leads(above.output):
                continue
            if len(path) < matched and fixed[len(path)] not in above.output:
                continue
            if len(path) == matched and broke_by not in (None, index):
                continue
            same = reached < len(wanted) and above.op_type == wanted[reached]
            edge = attempt.inputs[reached] if reached < len(wanted) else None
            dear = 0.1 if edge not in (None, index) else 0
            tie += 1
            step = (cost + dear + (not same), tie, reached + same, above.output[0])
            heapq.heappush(queue, (*step, (*path, (above, index)), False))
    return None


def path(
    near: Nearest | None, start: Node, name: Callable[[onnx.NodeProto], Node]
) -> ActualPath | None:
    """The nearest path from `start`, its nodes as `name` has them."""
    if near is None:
        return None
    return ActualPath(
        start, [name(proto) for proto, _ in near.steps], [index for _, index in near.steps]
    )


def rank(attempt: Attempt, near: Nearest | None) -> tuple[float, int]:
    """Sorts attempts: first that which needs fewest changes, then that which got furthest."""
    return (near.cost if near else len(attempt.expected) + 4, -len(attempt.matched))


def cause(attempt: Attempt, near: Nearest | None, producers: dict[str, onnx.NodeProto]) -> str:
    """The cause class (`reasons.CAUSES`) of a path that broke."""
    wanted = attempt.expected[len(attempt.matched)]
    index = attempt.inputs[len(attempt.matched)]
    if attempt.down:
        return "used_elsewhere" if len(attempt.found) > 1 else "extra_node"
    at = producers.get(attempt.at.output)
    if near and near.aside:
        return "operand_order"
    if index is not None and at is not None and at.op_type in _ANY_ORDER:
        others = (producers[name] for name in at.input if name in producers)
        if any(other.op_type == wanted for other in others):
            return "operand_order"
    if near is None or near.cost >= 3:
        return "unsupported_form"
    if len(near.steps) > len(attempt.expected):
        return "extra_node"
    if len(near.steps) < len(attempt.expected) or not attempt.found:
        return "missing_node"
    return "other_operator" if near.cost >= 1 else "operand_order"


def unvisited(attempt: Attempt, near: Nearest | None, attempts: Iterable[Attempt]) -> list[Node]:
    """Of the nodes found where `attempt` broke, the one that is on the path nearest to it, or those
    that no successful attempt visited."""
    if len(attempt.found) < 2:
        return attempt.found
    on_path = {name for proto, _ in (near.steps if near else ()) for name in proto.output}
    ahead = [node for node in attempt.found if node.output in on_path]
    if len(ahead) == 1 and not near.aside:
        return ahead
    visited = {
        node.output
        for attempt in attempts
        if not attempt.broke
        for node in (attempt.start, *attempt.matched)
    }
    left = [node for node in attempt.found if node.output not in visited]
    return (left or attempt.found)[:2]


def related(tensors: list[str], producers: dict[str, onnx.NodeProto], *, steps: int = 3) -> bool:
    """Whether one of `tensors` is made from another by at most so many nodes."""

    def above(name: str) -> Iterable[str]:
        return producers[name].input if name in producers else ()

    return any(
        near != tensor and near in tensors
        for tensor in tensors
        for near in walks.walk([tensor], above, far=steps)
    )
