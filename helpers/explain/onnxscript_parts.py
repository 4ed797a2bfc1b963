"""The private parts of ``onnxscript.rewriter`` that we rely on, all of them, here alone.

`tests/test_private_parts.py` names each, so that an upgrade of onnxscript fails there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import _matcher, _pattern_ir, _rewrite_rule, pattern

AttrConstantPattern = _pattern_ir.AttrConstantPattern
BacktrackingOr = _pattern_ir.BacktrackingOr
Constant = _pattern_ir.Constant
NodePattern = _pattern_ir.NodePattern
OpIdDispatchOr = _pattern_ir.OpIdDispatchOr
ValuePattern = _pattern_ir.ValuePattern

Matcher = _matcher.SimplePatternMatcher
Rule = _rewrite_rule.RewriteRule

# The functions of the library that call a rule's own code: its check, and its rewrite.
CALLERS = ("wrapped", "get_replacement")

_INTERNAL = (
    "onnx_ir",
    *(f"{rewriter.__name__}._{name}" for name in ("basics", "context", "rewrite_rule")),
)


def is_internal(frame: FrameType) -> bool:
    """Whether `frame` is of the library's own code, and not of a rule's."""
    return frame.f_globals.get("__name__", "").startswith(_INTERNAL)


def calls_rules(frame: FrameType) -> bool:
    """Whether `frame` is where the library calls a rule's own code."""
    inside = frame.f_globals.get("__name__") == _rewrite_rule.__name__
    return inside and frame.f_code.co_name in CALLERS


def wrapped(
    visit: Callable, outputs: Callable, match: Callable, try_rewrite: Callable
) -> list[tuple[type, str, Callable]]:
    """The methods to wrap, by class and name, and what each of them is wrapped in."""
    return [
        (Matcher, "_match_node", visit),
        (Matcher, "_match_value", visit),
        (Matcher, "_get_output_values", outputs),
        (Matcher, "match", match),
        (Rule, "try_rewrite", try_rewrite),
    ]


def match_of(matcher: Any) -> Any:
    """The match that `matcher` is at work on."""
    return matcher._match


def matched_nodes(match: Any) -> list[ir.Node]:
    """The nodes that have matched so far, those of alternatives that are being tried included."""
    return [node for partial in match._partial_matches for node in partial.nodes]


def alternatives(wanted: Any) -> list[Any]:
    """The values of which one must match, in the order in which they are tried."""
    return list(wanted._values)


def dispatched(wanted: Any) -> list[Any]:
    """The nodes of which one must match, chosen by their operators."""
    return [value.producer() for _, value in wanted._op_to_pattern.values()]


def constant_of(wanted: Any) -> Any:
    """The value that an attribute must have."""
    return wanted._value


def fits(rule: pattern.RewriteRule, wanted: Any, value: ir.Value, inside: ir.Graph) -> bool:
    """Whether `value`, of the graph `inside`, matches a part of the rule's pattern by itself."""
    matcher = Matcher(rule._target_pattern)
    matcher._init_match(0)
    matcher._graph = inside
    return bool(matcher._match_value(wanted, value))


def instance(rule: pattern.RewriteRule) -> pattern.RewriteRuleClassBase | None:
    """The object that `rule` was made from; None of a rule that was made from functions."""
    owner = getattr(rule._condition_function, "__self__", None)
    return owner if isinstance(owner, pattern.RewriteRuleClassBase) else None


def code_of(rule: pattern.RewriteRule) -> CodeType | None:
    """The code of the rule's pattern; of a rule without a class, that of its rewrite."""
    owner = instance(rule)
    function = owner.pattern if owner else rule._replacement_pattern._function
    return getattr(inspect.unwrap(function), "__code__", None)
