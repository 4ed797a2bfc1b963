"""What became of each attention site: one verdict each, and the reasons that sites share."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import PurePath

import onnx_ir as ir

from helpers import files, graph
from helpers.explain import calls, causes, onnxruntime_parts, slicing
from helpers.explain.reasons import Check, Reason, Verdict
from helpers.explain.words import Writer


@dataclass
class Outcome:
    """What a fusion made of a model: numbers of `sites` that are `fused`, and why others are not.

    `model` is the one that it was given. `stopped` is whether its code raised, so that there is no
    result to compare. `watched` has the fusions for attention that were applied, with the operators
    that they start from. `later` are operators that it makes and that the model's opset does not
    have yet. `given` are the number of heads and the hidden size that it was told.
    """

    optimizer: str
    sites: list[graph.Site]
    fused: Collection[int]
    reason_of: Callable[[int], Reason]
    model: ir.Model
    stopped: bool = False
    watched: dict[str, list[str]] = field(default_factory=dict)
    later: list[str] = field(default_factory=list)
    given: tuple[int, int] = (0, 0)


def stopped(optimizer: str, sites: list[graph.Site], reason: Reason, model: ir.Model) -> Outcome:
    """The outcome of a fusion whose code raised, for `reason`: no site is fused that was not."""
    fused = [number for number, site in enumerate(sites) if site.fused]
    return Outcome(optimizer, sites, fused, lambda _: reason, model, stopped=True)


def judged(outcome: Outcome) -> tuple[list[Verdict], list[Reason]]:
    """A verdict on each site, and the reasons of those that are not fused, each of them once."""
    verdicts: list[Verdict] = []
    reasons: dict[tuple, Reason] = {}
    for number, site in enumerate(outcome.sites):
        verdict = Verdict(site.name, site.layer, number in outcome.fused)
        verdicts.append(verdict)
        if verdict.fused:
            continue
        asked = causes.Asked(site, outcome.model, *outcome.given)
        own = causes.refined(outcome.reason_of(number), asked)
        reason = reasons.setdefault(shared_by_layers(own), own)
        reason.sites.append(number)
        verdict.reason = list(reasons.values()).index(reason)
    return verdicts, list(reasons.values())


def shared_by_layers(reason: Reason) -> tuple:
    """What two reasons have in common that are the same for several layers: all but the names."""
    attempt = reason.attempt
    path = attempt and (
        *attempt.expected,
        *attempt.inputs,
        len(attempt.matched),
        *(node.operator for node in attempt.found),
    )
    return (
        *(reason.fusion, reason.kind, reason.cause, reason.file, reason.line),
        None if reason.file else reason.message,  # the message of a check in code may have names
        *(tuple(reason.within), tuple(reason.none)),
        reason.actual and (*reason.actual.operators, *reason.actual.inputs),
        path,
        reason.check and reason.check.source,
        reason.earlier and shared_by_layers(reason.earlier),
    )


def innermost(error: BaseException) -> BaseException:
    """What was raised first: passes and readers of graphs wrap it on its way out."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def raised(error: Exception, fusion: str | None, writer: Writer | None = None) -> Reason:
    """The reason that is an `error` of a fusion's own code, or of the library that runs it.

    With `writer`, the values of what the failing line reads are told.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [
        (frame, line)
        for frame, line in frames
        if PurePath(frame.f_code.co_filename).name != onnxruntime_parts.APPLYING
    ]
    frame, line = own[-1] if own else frames[-1]
    step = calls.Step(frame.f_code, 0, line, dict(frame.f_locals), frame.f_globals)
    reason = Reason(fusion, "raised", "raised", file=calls.file_of(frame.f_code), line=line)
    reason.message = files.raised(error)
    if writer is None:
        reason.source = slicing.source_line(step)
        return reason
    reason.source, operands = slicing.statement(step, writer.write)
    reason.check = Check(reason.source, operands)
    return reason
