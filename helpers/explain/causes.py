"""What the site itself tells of why a fusion gave up on it, and what to do about that.

A fusion's code tells at which node or check it gave up, but not what that means: that a count of
products is one short says nothing of queries, keys and values that one product makes together.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import onnx_ir as ir

from helpers import graph
from helpers.explain import head_sizes, site_forms
from helpers.explain.reasons import Reason
from helpers.graph import walks


class Asked(NamedTuple):
    """What a fusion was asked for: the `site`, of the `model`, by an optimizer that was told of so
    many `heads` and a `hidden_size` (0: it was not)."""

    site: graph.Site
    model: ir.Model
    heads: int
    hidden_size: int


Told = tuple[str, str] | None  # a cause, and a message


def refined(reason: Reason, asked: Asked) -> Reason:
    """`reason`, with the cause and the advice that the site gives; itself without such."""
    for refine in (
        _in_a_branch,
        _quantised,
        _packed,
        _other_heads,
        _inserted,
        _unknown_form,
        _rotated,
    ):
        cause, message = refine(reason, asked) or (None, None)
        if cause:
            return dataclasses.replace(reason, cause=cause, message=message)
    return reason


def _in_a_branch(reason: Reason, asked: Asked) -> Told:
    inside = asked.site.node.graph
    if inside is asked.model.graph or reason.kind != "raised":
        return None
    branch = next(node for node in graph.nodes(asked.model) if inside in walks.inner_graphs(node))
    return "branch", (
        f"the site is in a branch of {branch.op_type} {graph.name(branch)}; export the parts as"
        f" files of their own, or use fuse, which reads branches (its code raised {reason.message})"
    )


def _quantised(reason: Reason, asked: Asked) -> Told:
    """The path or the check came upon a quantised operator, or the whole site is in such."""
    if asked.site.node.op_type == "QLinearSoftmax":
        return "quantised", f"{asked.site.node.op_type}: {graph.BEFORE_QUANTISING}"
    operators = [node.operator for node in (reason.attempt.found if reason.attempt else ())]
    operators += reason.actual.operators if reason.actual else []
    if not operators and reason.check and reason.anchor:
        operators = [*reason.check.operands.values()]
    words = re.findall(r"\w+", " ".join(operators))
    named = next(filter(graph.is_quantised, words), None)
    return ("quantised", f"{named}: {graph.BEFORE_QUANTISING}") if named else None


def _packed(reason: Reason, asked: Asked) -> Told:
    """It counted products, or broke on the way to the one that makes all three."""
    packed = site_forms.packed(asked.site)
    if packed is None:
        return None
    attempt, nodes = reason.attempt, site_forms.below_packed(asked.site, packed)
    broke_there = attempt is not None and any(
        node.name in nodes for node in (attempt.at, *attempt.found)
    )
    if reason.cause != "used_elsewhere" and not broke_there:
        return None
    return "packed_projection", (
        f"{packed.op_type} {graph.name(packed)} makes all three, where it wants three products;"
        " write the path through what splits them, or use fuse, which takes them as they are"
    )


def _other_heads(reason: Reason, asked: Asked) -> Told:
    """A check of the number of heads or the hidden size said no."""
    told = reason.check.source if reason.check else ""
    if "num_heads" not in told and "hidden_size" not in told:
        return None
    heads = head_sizes.heads(asked.site)
    if heads is None:
        return None if asked.heads else ("heads", "give --num-heads and --hidden-size")
    number, width = heads
    options = head_sizes.options(heads)
    has = f"the graph has {number} heads of width {width}"
    if not asked.heads:
        return "heads", f"{has}, and none were given: {options}"
    if (asked.heads, asked.hidden_size) == (number, number * width):
        return None
    given = f"{asked.heads} in a hidden size of {asked.hidden_size}"
    return "heads", f"{has}, and {given} were given: {options}"


def _inserted(reason: Reason, asked: Asked) -> Told:
    """What is in the way is a Cast of ONNX Runtime's own."""
    there = reason.attempt.found if reason.attempt else []
    casts = [node for node in there if node.operator == "Cast"]
    if not casts:
        return None
    cast = casts[0]
    own = {
        value.name
        for node in graph.nodes(asked.model)
        if node.op_type == "Cast"
        for value in (node, *node.outputs)
    }
    if cast.name in own or cast.output in own:
        return None
    return "extra_node", (
        "ONNX Runtime put the Cast there before the fusions ran, since it has few kernels for"
        " float16: take --opt-level 0, or fuse the float32 model and convert what that gives"
    )


def _rotated(reason: Reason, asked: Asked) -> Told:
    """It broke in what rotates queries or keys by their positions."""
    if reason.attempt is None or asked.site.scores is None:
        return None
    rotating = {graph.name(node) for node in site_forms.rotating(asked.site)}
    there = (reason.attempt.at, *reason.attempt.found)
    return (reason.cause, site_forms.ROTATED) if any(n.name in rotating for n in there) else None


def _unknown_form(reason: Reason, asked: Asked) -> Told:
    if reason.cause != "unsupported_form":
        return None
    forms = site_forms.told(asked.site, asked.model)
    return (reason.cause, "; ".join(forms)) if forms else None
