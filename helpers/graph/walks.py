"""Walks over a graph, from node to node, along the arrows or against them.

A walk is breadth first: the nearest nodes come first, each of them once. Its steps are those of
onnx_ir: the predecessors of a node compute its inputs, its successors read its outputs.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

import onnx_ir as ir

Place = TypeVar("Place")  # a node; or a value, or a node with what a walk knows of it there
Step = Callable[[Place], Iterable[Place]]


def producers(node: ir.Node) -> list[ir.Node]:
    """The nodes that compute the inputs of `node`, in the order of its inputs."""
    return [producer for producer in node.predecessors() if producer is not None]


def consumers(node: ir.Node) -> list[ir.Node]:
    """The nodes that read the outputs of `node`."""
    return list(node.successors())


def inner_graphs(node: ir.Node) -> list[ir.Graph]:
    """The branches or the body of an If, Loop or Scan; none of any other node."""
    graphs = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs += attribute.as_graphs()
    return graphs


def read(value: ir.Value) -> list[ir.Value]:
    """What `value` is computed from: inputs of its node, and results of that one's branches."""
    node = value.producer()
    if node is None:
        return []
    results = [result for inside in inner_graphs(node) for result in inside.outputs]
    return [*results, *(operand for operand in node.inputs if operand is not None)]


def walk(
    starts: Iterable[Place],
    step: Step[Place],
    *,
    stop: Collection[Place] = (),
    far: int | None = None,
) -> Iterator[Place]:
    """`starts` and all that `step` leads to from there, but for the nodes in `stop`.

    With `far`, only what is that many steps away at the most.
    """
    level = list(dict.fromkeys(starts))
    seen = {*level, *stop}
    yield from level
    while level and far != 0:
        reached = dict.fromkeys(near for node in level for near in step(node))
        level = [node for node in reached if node not in seen]
        seen.update(level)
        far = None if far is None else far - 1
        yield from level


def upstream(
    *starts: ir.Node, stop: Collection[ir.Node] = (), far: int | None = None
) -> Iterator[ir.Node]:
    """`starts` and the nodes that they depend on; `stop` and `far` as in `walk`."""
    return walk(starts, producers, stop=stop, far=far)


def downstream(
    *starts: ir.Node, stop: Collection[ir.Node] = (), far: int | None = None
) -> Iterator[ir.Node]:
    """`starts` and the nodes that depend on them; `stop` and `far` as in `walk`."""
    return walk(starts, consumers, stop=stop, far=far)


def between(first: ir.Node, last: ir.Node) -> set[ir.Node]:
    """The nodes on all ways along the arrows from `first` to `last`, these two included."""
    return {*downstream(first)} & {*upstream(last)}


def uses(origin: ir.Value, through: Collection[str]) -> Iterator[tuple[ir.Node, int]]:
    """Every use of what is made of `origin` by the operators `through` alone: node and input."""

    def following(use: tuple[ir.Node, int]) -> list[tuple[ir.Node, int]]:
        node, _ = use
        passed_on = node.outputs if node.op_type in through else ()
        return [further for value in passed_on for further in value.uses()]

    return walk(origin.uses(), following)


def shortest(start: ir.Node, goals: Collection[ir.Node], step: Step[ir.Node]) -> list[ir.Node]:
    """The nodes on a shortest way from `start` to one of `goals`, both ends included; or none."""
    came_from: dict[ir.Node, ir.Node | None] = {start: None}

    def following(node: ir.Node) -> list[ir.Node]:
        reached = [near for near in step(node) if near not in came_from]
        came_from.update(dict.fromkeys(reached, node))
        return reached

    goal = next((node for node in walk([start], following) if node in goals), None)
    nodes = []
    while goal is not None:
        nodes.append(goal)
        goal = came_from[goal]
    return nodes[::-1]


def neighbours(node: ir.Node, *, up: int = 3, down: int = 3) -> list[ir.Node]:
    """`node`, and the nodes at most `up` steps against the arrows or `down` along them, in the
    order of the graph."""
    taken = {*upstream(node, far=up), *downstream(node, far=down)}
    return [near for near in node.graph if near in taken]
