"""Which call of a fusion was about which attention site, and so why that was not fused."""

from __future__ import annotations

import dataclasses
import itertools

import onnx
import onnx_ir as ir

from helpers import graph
from helpers.explain.optimizer_watch import NORMALIZATIONS, Call, FusionWatch
from helpers.explain.pieces import pieces
from helpers.explain.reasons import Check, Reason
from helpers.explain.verdicts import Outcome
from helpers.graph import walks


def outcome(
    name: str,
    model: ir.Model,
    sites: list[graph.Site],
    optimised: onnx.ModelProto,
    after: ir.Model,
    watch: FusionWatch,
    in_functions: bool,
) -> Outcome:
    """What became of `sites`, of `model`, in the graph `optimised` by the optimizer `name`, which
    has been read as `after`."""
    places = _Places(watch, sites)
    fused, still = _became(model, sites, optimised, after)

    def reason_of(number: int) -> Reason:
        if number not in still:
            return _taken_away(optimised)
        return places.reason(sites[number], in_functions)

    return Outcome(name, sites, fused, reason_of, model)


def _became(
    model: ir.Model, sites: list[graph.Site], optimised: onnx.ModelProto, after: ir.Model
) -> tuple[set[int], set[int]]:
    """Which of `sites` are one operator in the graph `optimised`, and which are there unfused."""
    sites_after = graph.sites(after)
    left = {
        name
        for node in graph.nodes(after)
        if (node.domain, node.op_type) not in graph.FUSED
        for name in (node.name, *(value.name for value in node.outputs))
    }
    still = {i for i, s in enumerate(sites) if not s.fused and not left.isdisjoint(_known_by(s))}
    fused = set(range(len(sites))) - still
    if sum(site.fused for site in sites_after) < len(fused):  # some are neither
        stand_for = {site for piece in pieces(model, optimised, sites) for site in piece.sites}
        fused = {i for i in fused if i in stand_for or sites[i].fused}
    return fused, still


def _known_by(site: graph.Site) -> set[str]:
    """The names by which a site is known again: ONNX Runtime may keep one of them alone, as where
    it has no kernel for a Softmax in float16, and writes it out."""
    nodes = [node for node in (site.node, site.context) if node is not None]
    return {name for node in nodes for name in (node.name, node.outputs[0].name) if name}


def _taken_away(optimised: onnx.ModelProto) -> Reason:
    """The reason of a site that the optimizer took away without putting anything in its place."""
    computed = {name for node in optimised.graph.node for name in node.output}
    outputs = [output.name for output in optimised.graph.output if output.name not in computed]
    message = "the optimizer took it out of the graph, and put no attention in its place"
    check = Check("the optimised graph", {"outputs that no node computes": ", ".join(outputs)})
    return Reason(None, "check", "other_check", check=check, message=message)


class _Places:
    """Where the calls of `fuse` that gave up started, to be found from the sites."""

    def __init__(self, watch: FusionWatch, sites: list[graph.Site]) -> None:
        self.watch = watch
        self.fusions = ", ".join(watch.anchors)
        self.anchors = {operator for operators in watch.anchors.values() for operator in operators}
        makes = self.anchors | ({"LayerNormalization"} if self.anchors & NORMALIZATIONS else set())
        self.calls: dict[str, list[Call]] = {}
        for call in watch.calls:
            early = call.makes in makes and _near(call)
            if not call.done and (call.attends or early):
                self.calls.setdefault(call.anchor.output, []).append(call)
        self.products = {
            node for site in sites for node in (site.node, site.scores, site.context) if node
        }

    def reason(self, site: graph.Site, in_functions: bool) -> Reason:
        own = {node for node in (site.node, site.scores, site.context) if node}
        touching = self._touching({value.name for node in own for value in node.outputs})
        call = self._downstream(site, own, touching) or touching
        if call and call.attends:
            return call.reason
        starts = f"it starts from {' or '.join(sorted(self.anchors))}, and there is none after the"
        if call:  # of an earlier fusion, which should have made the anchor
            message = f"{starts} site: {call.reason.fusion} did not fire at the"
            message += f" {call.anchor.operator} there ({call.reason.cause})"
            return dataclasses.replace(
                call.reason,
                fusion=self.fusions,
                cause="missing_anchor",
                message=message,
                actual=None,  # of which the earlier fusion tells
                earlier=call.reason,
                sites=[],
            )
        if not self.anchors:
            message = "this optimizer has no fusion that makes an attention, or it is turned off"
        else:
            message = f"{starts} site"
        for method in self.watch.unwatched:
            message += (
                f"; {method.owner.__name__}.{method.name} makes attentions without asking for"
            )
            message += " paths, and could not be followed"
        if in_functions:
            message += " (the optimizer does not look into the functions of a model)"
        after = ", ".join(f"{node.op_type} {graph.name(node)}" for node in self._after(site))
        operands = {
            **{
                f"{name}.search_op_types": str(operators)
                for name, operators in self.watch.anchors.items()
            },
            "after the site": after,
        }
        return Reason(
            self.fusions or None,
            "check",
            "missing_anchor",
            check=Check("search_op_types", operands),
            message=message,
        )

    def _after(self, site: graph.Site, number: int = 10) -> list[ir.Node]:
        """The first nodes after the product with the values, without those that make shapes."""

        def below(node: ir.Node) -> list[ir.Node]:
            return [reader for reader in walks.consumers(node) if reader.op_type != "Shape"]

        return list(itertools.islice(walks.walk([site.context or site.node], below), 1, number + 1))

    def _touching(self, names: set[str]) -> Call | None:
        """The call that came upon the site's own nodes and got furthest."""

        def touches(call: Call) -> bool:
            reached = (
                node.output
                for attempt in call.attempts
                for node in (attempt.start, *attempt.matched)
            )
            return call.anchor.output in names or not names.isdisjoint(reached)

        calls = [call for calls in self.calls.values() for call in calls if call.attends]
        return max(filter(touches, calls), key=_progress, default=None)

    def _downstream(
        self, site: graph.Site, own: set[ir.Node], touching: Call | None
    ) -> Call | None:
        """The call that started from the first anchor after the site, before another site.

        Where a residual connection around what comes after the site ends, the feed-forward part
        does, and anchors behind that are not the site's.
        """
        others = self.products - own
        after = set(walks.downstream(site.context or site.node, stop=others))

        def below(node: ir.Node) -> list[ir.Node]:
            return [reader for reader in walks.consumers(node) if not _joins(reader, after)]

        for node in walks.walk([site.node], below, stop=others):
            for value in node.outputs:
                calls = self.calls.get(value.name, [])
                attending = [call for call in calls if call.attends]
                if attending:
                    return max(attending, key=_progress) if touching not in calls else touching
                if calls and touching is None:
                    return calls[-1]
        return None


def _joins(node: ir.Node, after: set[ir.Node]) -> bool:
    """Whether a residual connection ends at `node` that began in `after`: Add of two of these."""
    makers = [value.producer() for value in node.inputs if value is not None]
    return node.op_type == "Add" and len(makers) == 2 and after.issuperset(makers)


def _near(call: Call) -> bool:
    """Whether a call of a fusion of normalisations was about one: it starts from a good many nodes
    that have nothing to do with them."""
    return "Normalization" in call.anchor.operator or any(
        len(attempt.matched) > 2 for attempt in call.attempts
    )


def _progress(call: Call) -> tuple[int, int]:
    """How far a call got: the paths that it found, and the nodes on all of them."""
    attempts = call.attempts
    return sum(not attempt.broke for attempt in attempts), sum(
        len(attempt.matched) for attempt in attempts
    )
