"""The path that a graph has against the one that a fusion asked for."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

import onnx

from helpers.explain.reasons import Attempt, Node
from helpers.graph import walks

STEPS = 20_000  # of the search for a path, at the most


class Nearest(NamedTuple):
    """A path in the graph, and how much it differs from the one that was asked for. `aside` is
    whether it leaves the nodes that were matched: any input would do, and another was taken."""

    cost: float
    operators: list[str]
    inputs: list[int]
    aside: bool = False


def nearest(attempt: Attempt, producers: dict[str, onnx.NodeProto]) -> Nearest | None:
    """The path that the graph has from the attempt's start to an operator of the kind wanted last;
    None where none is near. `producers` has the nodes by output.

    Of all such paths the one that needs fewest changes of what was expected: an operator more costs
    1, one less costs 1, another input than expected a little (Dijkstra on the edit distance). It
    goes through the nodes that matched, unless any input would do and another fits much better.
    """
    if attempt.down:
        return None
    through = _nearest(attempt, producers, len(attempt.matched))
    if None in attempt.inputs[: len(attempt.matched)]:
        other = _nearest(attempt, producers, 0)
        if other and (through is None or other.cost + 0.5 < through.cost):
            return other._replace(aside=True)
    return through


def _nearest(
    attempt: Attempt, producers: dict[str, onnx.NodeProto], matched: int
) -> Nearest | None:
    wanted = attempt.expected
    fixed = [matched_node.output for matched_node in attempt.matched]
    queue: list[tuple[float, int, int, str, tuple]] = [(0, 0, 0, attempt.start.output, ())]
    seen, tie = set(), 0
    while queue and tie < STEPS:
        cost, _, reached, output, path = heapq.heappop(queue)
        if reached == len(wanted) and path and path[-1][0] == wanted[-1]:
            return Nearest(cost, [operator for operator, _ in path], [index for _, index in path])
        if (output, reached) in seen or cost > len(wanted) + 3:
            continue
        seen.add((output, reached))
        if matched <= reached < len(wanted) - 1:  # the graph does without this operator
            tie += 1
            heapq.heappush(queue, (cost + 1, tie, reached + 1, output, path))
        for index, name in enumerate(producers[output].input if output in producers else ()):
            above = producers.get(name)
            if above is None or (reached < matched and fixed[reached] not in above.output):
                continue
            same = reached < len(wanted) and above.op_type == wanted[reached]
            edge = attempt.inputs[reached] if reached < len(wanted) else None
            dear = 0.1 if edge not in (None, index) else 0
            tie += 1
            step = (cost + dear + (not same), tie, reached + same, above.output[0])
            heapq.heappush(queue, (*step, (*path, (above.op_type, index))))
    return None


def path(near: Nearest | None) -> tuple[list[str], list[int]] | None:
    return (near.operators, near.inputs) if near else None


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
    others = [producers[name] for name in (at.input if at is not None else ()) if name in producers]
    if near and near.aside:
        return "operand_order"
    if index is not None and any(other.op_type == wanted for other in others):
        return "operand_order"
    if near is None or near.cost >= 3:
        return "unsupported_form"
    if len(near.operators) > len(attempt.expected):
        return "extra_node"
    if len(near.operators) < len(attempt.expected) or not attempt.found:
        return "missing_node"
    return "other_operator" if near.cost >= 1 else "operand_order"


def unvisited(attempt: Attempt, attempts: Iterable[Attempt]) -> list[Node]:
    """Of the nodes found where `attempt` broke, those that no successful attempt visited."""
    if len(attempt.found) < 2:
        return attempt.found
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
