"""Whether the paths that `explain` prints are there: asked of ONNX Runtime's own matching."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnxruntime.transformers.onnx_model import OnnxModel

from helpers import graph
from helpers.explain import Explanation, optimizer
from helpers.explain.optimizer_watch import Call, FusionWatch
from helpers.explain.reasons import ActualPath, Attempt, Reason
from helpers.graph import walks


@contextlib.contextmanager
def matched() -> Iterator[dict[int, str]]:
    """Of paths that are concluded in this context, by their ids: those that ``match_parent_path``,
    given them in the graph of that moment, does not follow to the last node, and those that leave
    the way on which they broke."""
    conclude, misses = optimizer.conclude, {}

    def concluded(watch: FusionWatch, call: Call) -> Reason:
        reason = conclude(watch, call)
        path = reason.actual
        if path is not None:
            model = OnnxModel(watch.last)
            made = {name: node for node in model.nodes() for name in node.output}
            nodes = model.match_parent_path(
                made[path.start.output], path.operators, path.inputs, made
            )
            if not nodes or nodes[-1].output[0] != path.nodes[-1].output:
                misses[id(path)] = f"not followed: {path}"
            if reason.cause != "operand_order" and not _goes_along(path, reason.attempt, made):
                misses[id(path)] = f"not along the break: {reason}"
        return reason

    optimizer.conclude = concluded
    try:
        yield misses
    finally:
        optimizer.conclude = conclude


def _goes_along(path: ActualPath, attempt: Attempt, made: dict[str, onnx.NodeProto]) -> bool:
    """Whether `path` goes on by the input at which `attempt` broke, if that leads to its end."""
    broke = len(attempt.matched)
    by = attempt.inputs[broke]
    at = made[attempt.at.output]
    if by is None or by >= len(at.input):
        return True

    def above(name: str) -> list[str]:
        return [*made[name].input] if name in made else []

    leads = path.nodes[-1].output in walks.walk([at.input[by]], above)
    return not leads or (len(path.inputs) > broke and path.inputs[broke] == by)


def astray(answer: Explanation, model: ir.Model, concluded: dict[int, str]) -> list[str]:
    """The paths of `answer`, about `model`, that are among those `concluded` to be wrong, or lead
    from an anchor elsewhere than to the site's product with the values."""
    sites = graph.sites(model)
    misses = [concluded[id(r.actual)] for r in answer.reasons if id(r.actual) in concluded]
    for reason in answer.reasons:
        path = reason.actual
        if path is None:
            continue
        site = sites[reason.sites[0]]
        inside = walks.between(site.scores, site.context)
        names = {name for node in inside for name in (node.name, node.outputs[0].name)}
        if path.start != reason.anchor or path.start.name in names:
            continue
        ends = {site.context.name, *(value.name for value in site.context.outputs)}
        if not ends & {path.nodes[-1].name, path.nodes[-1].output}:
            misses.append(f"not to the site's product: {reason}")
    return misses
