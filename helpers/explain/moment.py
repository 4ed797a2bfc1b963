"""The attention sites of a graph at the moment at which a fusion is at work on it.

The optimizer's earlier fusions, and ONNX Runtime before them, have changed the graph that was read
from the file, so the sites are found again, in the graph that the fusion sees.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import NamedTuple

import onnx
import onnx_ir as ir

from helpers import graph
from helpers.explain.reasons import Attempt
from helpers.graph import walks
from helpers.graph.attention_sites import PRODUCTS
from helpers.quiet import quiet


class Goal(NamedTuple):
    """Where a path should end: at one of the nodes that compute `outputs`, from nodes that compute
    `ways`; without these, at any operator of the kind that was asked for last."""

    outputs: frozenset[str] = frozenset()
    ways: frozenset[str] = frozenset()

    def is_end(self, node: onnx.NodeProto, wanted: str) -> bool:
        """Whether a path may end at `node`, where the operator `wanted` was asked for."""
        if self.outputs:
            return not self.outputs.isdisjoint(node.output)
        return node.op_type == wanted

    def leads(self, outputs: Collection[str]) -> bool:
        """Whether the node that computes `outputs` is on a way to the end."""
        return not self.ways or not self.ways.isdisjoint(outputs)

    def dearest(self, wanted: list[str]) -> int:
        """The most changes after which a path still is one: all that lead to an end that is known,
        those that are few to one that is not."""
        return len(wanted) + (100 if self.outputs else 3)


class Products(NamedTuple):
    """The two products of a site, and all between them."""

    scores: ir.Node
    context: ir.Node
    between: set[ir.Node]


class Moment:
    """The sites of a `model` that is being changed; in the file it had the sites `before`."""

    def __init__(self, model: onnx.ModelProto, before: list[graph.Site]) -> None:
        self._model, self._before = model, before

    @functools.cached_property
    def _graph(self) -> tuple[dict[str, ir.Node], list[Products]]:
        """The nodes by their outputs, and the sites that are not fused; none of no valid graph."""
        try:
            with quiet():
                model = graph.inline(ir.from_proto(self._model))  # which sorts the nodes
                sites = graph.sites(model)
        except Exception:  # any: a graph that is being changed need not be one
            return {}, []
        nodes = list(graph.nodes(model))
        pairs = [(site.scores, site.context) for site in sites if not site.fused]
        # What is no site any more, as where ONNX Runtime wrote out the Softmax, is known by names.
        named = {node.name: node for node in nodes if node.name}
        for site in self._before:
            if not site.fused:
                pairs.append((named.get(site.scores.name), named.get(site.context.name)))
        products = [Products(*pair, walks.between(*pair)) for pair in pairs if None not in pair]
        return {value.name: node for node in nodes for value in node.outputs}, products

    def goal(self, attempt: Attempt) -> Goal:
        """Where the path of `attempt` should end, up the graph.

        From what follows a site, that is its product with the values; from inside it, the other
        product if the path is to go through its Softmax, a projection if it is to go to a product,
        and else any operator of the kind that was asked for last.
        """
        nodes, sites = self._graph
        start = nodes.get(attempt.start.output)
        if start is None:
            return Goal()
        inside = next((site for site in sites if start in site.between), None)
        if inside is None:
            context = _latest_above(start, [site.context for site in sites])
            return _to([context]) if context else Goal()
        if attempt.expected[-1] not in PRODUCTS:
            return Goal()
        if "Softmax" in attempt.expected or start not in (inside.scores, inside.context):
            return _to([inside.scores])
        return _to(_projections(start, inside))


def _latest_above(start: ir.Node, contexts: list[ir.Node]) -> ir.Node | None:
    """The nearest of `contexts` above `start` from which no other leads there."""
    above = [node for node in walks.upstream(start) if node in contexts]
    for node in above:
        below = {*walks.downstream(node)} - {node}
        if not any(other in below for other in above):
            return node
    return None


def _projections(start: ir.Node, site: Products) -> list[ir.Node]:
    """The first products above `start`, one of the site's, that are none of it."""

    def above(node: ir.Node) -> list[ir.Node]:
        return walks.producers(node) if node is start or node.op_type not in PRODUCTS else []

    reached = walks.walk([start], above, stop=site.between - {start})
    return [node for node in reached if node.op_type in PRODUCTS and node is not start]


def _to(ends: list[ir.Node]) -> Goal:
    """The goal that is any of `ends`."""
    below = walks.downstream(*ends)
    ways = frozenset(value.name for node in below for value in node.outputs)
    return Goal(frozenset(value.name for node in ends for value in node.outputs), ways)
