"""Why a call of a fusion's `fuse` gave up: the path or the check that it was about, its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx

from helpers.explain import calls, nearest, slicing
from helpers.explain import onnxruntime_parts as parts
from helpers.explain.optimizer_watch import Call, FusionWatch
from helpers.explain.reasons import Attempt, Check, Reason
from helpers.explain.words import ProtoWriter


class _Tried(NamedTuple):
    """A path that did not match, and the one of the graph that is nearest to it."""

    attempt: Attempt
    near: nearest.Nearest | None


def conclude(watch: FusionWatch, call: Call) -> Reason:
    """The reason that `call` gives for not having fused; asked for as soon as it has returned."""
    write = ProtoWriter(call.producers, watch.node).write
    gave = slicing.gave_up(call.step, write)
    reason = Reason(
        call.fusion,
        "end" if gave.end else "path" if gave.broken else "check",
        "other_check",
        file=calls.file_of(call.step.code),
        line=gave.line,
        source=gave.source,
        within=gave.within,
        anchor=call.anchor,
        none=gave.none,
    )
    tried = [
        _Tried(attempt, nearest.nearest(attempt, call.producers, watch.goal(call, attempt)))
        for attempt in gave.broken
    ]
    tried.sort(key=lambda path: nearest.rank(*path))
    if tried:
        _blame(reason, tried[0], call, watch)
    else:
        reason.cause = _check_cause(gave, call.producers)
    decided = {} if tried and not gave.end else gave.operands
    operands = {**decided, **_before(watch, reason.attempt, write)}
    if operands or not tried or gave.end:
        reason.check = Check(gave.test or gave.source, operands)
    ranked = [path.attempt for path in tried]
    rest = [attempt for attempt in call.attempts if attempt.broke and attempt not in ranked]
    reason.attempts = [*ranked, *sorted(rest, key=lambda attempt: -len(attempt.matched))]
    return reason


def _blame(reason: Reason, tried: _Tried, call: Call, watch: FusionWatch) -> None:
    """Let `reason` be the path that was `tried`."""
    attempt, near = tried
    reason.attempt = attempt
    reason.actual = nearest.path(near, attempt.start, watch.node)
    reason.cause = nearest.cause(attempt, near, call.producers)
    attempt.found = nearest.unvisited(attempt, near, call.attempts)
    operators = {node.operator for node in attempt.found}
    needs_one_change = near is not None and near.cost < 2
    if watch.stopped and operators & {"Cast", "Reshape"} and needs_one_change:
        reason.cause = "shape_inference"  # which removes those that do nothing


def _before(
    watch: FusionWatch, attempt: Attempt | None, write: Callable[[Any], str | None]
) -> dict[str, str]:
    """What had happened before: where the node at the break came from, and to shape inference."""
    operands = {}
    if attempt and attempt.at.output in watch.replaced:
        made_from = map(write, watch.replaced[attempt.at.output])
        operands[f"{attempt.at.name} was made from"] = "; ".join(made_from)
    if watch.stopped:
        stopped = map(write, watch.stopped)
        operands["shape inference of the optimizer stopped at"] = "; ".join(stopped)
    return operands


def _check_cause(gave: slicing.GaveUp, producers: dict[str, onnx.NodeProto]) -> str:
    """The class of a check that said no, by what it asked for and about what."""
    tensors = [value for value in gave.values if isinstance(value, str)]
    lists = [value for value in gave.values if isinstance(value, list)]
    if gave.calls & parts.ASK_SHAPES or "shape_infer" in gave.test:
        shapes = [
            values for values in lists if values and not isinstance(values[0], onnx.NodeProto)
        ]
        return "symbolic_dimension" if len(shapes) > 1 else "shape_inference"
    if gave.calls & parts.ASK_CONSTANTS:
        return "constant"
    if gave.calls & parts.ASK_READERS or any(name.startswith("children") for name in gave.operands):
        return "used_elsewhere"
    if len(set(tensors)) > 1:
        return "extra_node" if nearest.related(tensors, producers) else "unsupported_form"
    if "op_type" in gave.test:
        return "other_operator"
    return "other_check"
