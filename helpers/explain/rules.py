"""Why a rewrite rule of ``onnxscript.rewriter`` did not fuse: apply it, and say what it missed.

The rules are those that ``optimize_for_ort`` applies for attention, or a reader's own, unchanged;
`rule_watch` records how far each came, and `slicing` reads why its code gave up.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
from pathlib import Path
from types import CodeType
from typing import Any

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import ort_fusions, pattern

from helpers import files, graph
from helpers.explain import calls, chosen, slicing
from helpers.explain import onnxscript_parts as parts
from helpers.explain.reasons import ActualPath, Attempt, Check, Reason
from helpers.explain.rule_watch import CONTEXT, Failure, RuleWatch, Try, is_any_of
from helpers.explain.verdicts import Outcome, innermost, raised, stopped
from helpers.explain.words import IrWriter
from helpers.graph import walks
from helpers.quiet import quiet

# The modules of ort_fusions whose rules make an attention operator, or a step towards it.
_ATTENTION = {
    f"{ort_fusions.__name__}.{name}"
    for name in (
        *("attention", "gqa", "gqa_packed_qkv", "mha", "mha_bias", "mha_scale"),
        *("sdpa", "sdpa_via_mha"),
    )
}
_TEMPORARY = "ai.onnxruntime._fusion"  # the domain of operators that a later rule must replace


class _Reasons:
    """Why tries of rules came to nothing."""

    def __init__(self, names: IrWriter) -> None:
        self._names = names

    def conclude(self, tried: Try, failure: Failure | None) -> tuple[Reason, Attempt | None]:
        """The reason, and the path that the pattern went if an operator was not there."""
        if tried.match is not None:
            return self._refused(tried), None
        if failure and failure.missing:
            return self._missing(tried, failure)
        return self._unlike(tried, failure), None

    def _missing(self, tried: Try, failure: Failure) -> tuple[Reason, Attempt]:
        """An operator of the pattern was not there."""
        names, step, node_there = self._names, failure.step, failure.step.node
        operators = dict.fromkeys(str(pattern_node.op) for pattern_node in failure.missing)
        path = [visited.there for visited in failure.path]
        attempt = Attempt(
            names.node(tried.root),
            [*(node.op_type for node in path[1:]), "|".join(operators)],
            [*(visited.index for visited in failure.path[1:]), step.index],
            tried.rule.name,
            [names.node(node) for node in path[1:]],
            [names.node(node_there)] if node_there is not None else [],
        )
        further = _way(node_there, failure.missing) if node_there is not None and path else None
        reason = self._reason(tried, "path", _cause(failure, further), node_there, failure)
        reason.attempt = attempt
        if further:
            there = [(node_there, step.index), *further]
            reason.actual = ActualPath(
                attempt.start,
                [*attempt.matched, *(names.node(node) for node, _ in there)],
                [*attempt.inputs[:-1], *(index for _, index in there)],
            )
        return reason, attempt

    def _unlike(self, tried: Try, failure: Failure | None) -> Reason:
        """The operators are there, but an attribute, a constant or an operand is another."""
        if failure is None:  # a matcher of another class, of which nothing is known
            reason = self._reason(tried, "check", "other_check", tried.root, None)
            reason.check = self._check("the pattern", {"node": tried.root})
            return reason
        step = failure.step
        constant = isinstance(step.pattern, parts.Constant)
        reason = self._reason(
            tried, "check", "constant" if constant else "other_check", step.node, failure
        )
        operands: dict[str, Any] = {}
        if isinstance(step.there, ir.Node) and isinstance(step.pattern, parts.NodePattern):
            operands["node"] = step.there
            for key, wanted in step.pattern.attributes.items():
                given = step.there.attributes.get(key)
                if not (wanted.can_match_none if given is None else wanted.matches(given)):
                    operands[key] = given
        else:
            operands["value"] = step.there
        bound = [source for source in failure.sources if isinstance(source, ir.Value)]
        operands |= {
            f"bound to {i}": value for i, value in enumerate(bound) if value is not step.there
        }
        if failure.path:
            operands["read by"] = failure.path[-1].there
        reason.check = self._check(reason.source or failure.message, operands)
        return reason

    def _refused(self, tried: Try) -> Reason:
        """All of the pattern is there, and what else the rule asks for is not."""
        match, call = tried.match, tried.call
        blamed = list(match.failure_nodes_and_values)
        reason = self._reason(tried, "check", "other_check", blamed[0] if blamed else None, None)
        reason.message = match.reason or None
        if call is None:
            reason.cause = "used_elsewhere"
            uses = _uses(tried).items()
            test, operands = match.reason, {key: self._names.show(operand) for key, operand in uses}
        else:
            gave = slicing.gave_up(call, functools.partial(self._write, tried))
            reason.within, reason.line, reason.source = gave.within, gave.line, gave.source
            reason.file = calls.file_of(call.code)
            reason.cause = _cause_of_check(gave.values)
            test, operands = gave.test or gave.source, gave.operands
        blamed_operands = {
            f"blamed {i}": self._names.show(operand) for i, operand in enumerate(blamed)
        }
        blamed_operands = {
            key: operand
            for key, operand in blamed_operands.items()
            if operand not in operands.values()
        }
        reason.check = Check(test, {**operands, **blamed_operands})
        return reason

    def _write(self, tried: Try, value: Any) -> str | None:
        """An operand of a check of the rule that was `tried`. Of a constant also which nodes of the
        pattern read it: its own name says nothing of that, and it may be no number that is wanted
        but the other operand, in its place."""
        text = self._names.write(value)
        if not isinstance(value, ir.Value) or ir.convenience.get_const_tensor(value) is None:
            return text
        readers = [self._names.node(node) for node in tried.nodes if value in node.inputs]
        named = ", ".join(f"{reader.operator} {reader.name}" for reader in readers)
        return f"{text}, read by {named}" if readers else text

    def _check(self, source: str, operands: dict[str, Any]) -> Check:
        return Check(source, {key: self._names.show(operand) for key, operand in operands.items()})

    def _reason(
        self,
        tried: Try,
        kind: str,
        cause: str,
        there: ir.Node | ir.Value | None,
        failure: Failure | None,
    ) -> Reason:
        """A reason with the place in the pattern where it failed, and in PyTorch what is there."""
        node = there.producer() if isinstance(there, ir.Value) else there
        reason = Reason(_fusion(tried.rule), kind, cause, anchor=self._names.node(tried.root))
        written = parts.code_of(tried.rule)
        wanted = failure.step.wanted if failure else []
        if failure and not wanted and failure.path:
            wanted = failure.path[-1].wanted
        if written is not None:
            reason.file = calls.file_of(written)
            reason.line, reason.source = _line(written, wanted[0] if wanted else None)
        if node is not None:
            reason.origin = graph.origin(node)
            reason.shape = str(node.outputs[0].shape) if node.outputs[0].shape else None
        if failure:
            reason.message = failure.message or None
        return reason


# ── What a rule's source tells ──────────────────────────────────────────────────────────────────


def _fusion(rule: pattern.RewriteRule) -> str:
    owner = parts.instance(rule)
    return type(owner).__name__ if owner else str(rule)


def _line(code: CodeType, wanted: parts.NodePattern | None) -> tuple[int, str]:
    """Where a pattern builds the node `wanted`: the call that has most in common with it."""
    best, line = -1, code.co_firstlineno
    for call in ast.walk(calls.syntax(code)):
        if wanted is None or not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Attribute) and call.func.attr == str(wanted.op):
            written = {word.arg: ast.unparse(word.value) for word in call.keywords}
            alike = sum(
                repr(parts.constant_of(attribute)) == written.get(key)
                for key, attribute in wanted.attributes.items()
                if isinstance(attribute, parts.AttrConstantPattern)
            )
            alike += sum(
                parameter is not None
                and parameter.name is not None
                and parameter.name == ast.unparse(given)
                for parameter, given in zip(wanted.inputs, call.args, strict=False)
            )
            if alike > best:
                best, line = alike, call.lineno
    return line, linecache.getline(code.co_filename, line).strip()


# ── Causes ──────────────────────────────────────────────────────────────────────────────────────


def _way(
    start: ir.Node, wanted: list[parts.NodePattern], far: int = 3
) -> list[tuple[ir.Node, int]] | None:
    """The way up from `start` to the nearest node that is wanted: nodes, and by which inputs."""

    def above(place: tuple[ir.Node, tuple]) -> list[tuple[ir.Node, tuple]]:
        node, steps = place
        producers = ((i, value.producer()) for i, value in enumerate(node.inputs) if value)
        return [(near, (*steps, (near, i))) for i, near in producers if near is not None]

    places = walks.walk([(start, ())], above, far=far)
    return next((list(steps) for node, steps in places if steps and is_any_of(node, wanted)), None)


def _cause(failure: Failure, further: list | None) -> str:
    """The cause class of an operator that was not there; `further`: it is up this way."""
    if failure.swapped:
        return "operand_order"
    if all(str(pattern_node.domain) == _TEMPORARY for pattern_node in failure.missing):
        return "missing_anchor"
    if further:
        return "extra_node"
    node_there = failure.step.node
    above = [
        value.producer() for node in failure.missing for value in node.inputs if value is not None
    ]
    if node_there is None or is_any_of(node_there, [node for node in above if node is not None]):
        return "missing_node"
    return "other_operator"


def _cause_of_check(values: list[Any]) -> str:
    items = [item for value in values for item in (value.values() if _is_map(value) else [value])]
    if any(isinstance(item, ir.Value) and item.shape is None for item in items):
        return "shape_inference"
    if any(isinstance(item, ir.SymbolicDim) for item in items):
        return "symbolic_dimension"
    return "other_check"


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def _uses(tried: Try) -> dict[str, Any]:
    """The tensors that would be gone, and who else reads them."""
    operands: dict[str, Any] = {}
    for value in (value for node in tried.nodes for value in node.outputs):
        readers = [node for node in value.consumers() if node not in tried.nodes]
        if value not in tried.outputs and (readers or value.is_graph_output()):
            count = len(operands) // 2
            operands[f"tensor {count}"] = value
            operands[f"used by {count}"] = [
                *readers,
                *(["the graph's outputs"] if value.is_graph_output() else []),
            ]
    return operands


def _is_attention(rule: pattern.RewriteRule) -> bool:
    return type(parts.instance(rule)).__module__ in _ATTENTION


def _rule_set(rules: Any) -> pattern.RewriteRuleSet:
    if isinstance(rules, pattern.RewriteRuleSet):
        return rules
    given = list(rules) if isinstance(rules, list | tuple) else [rules]
    rule_list: list[pattern.RewriteRule] = []
    for entry in given:
        if isinstance(entry, str):
            entry = chosen.loaded(entry)
            if inspect.isfunction(entry):
                entry = entry()
        if isinstance(entry, list | tuple | pattern.RewriteRuleSet):
            rule_list += _rule_set(entry).rules
        elif isinstance(entry, type) and issubclass(entry, pattern.RewriteRuleClassBase):
            rule_list.append(entry.rule())
        elif isinstance(entry, pattern.RewriteRule):
            rule_list.append(entry)
        else:
            raise files.BadInput(
                f"{entry}: expected a rewrite rule, a set of them, or a subclass of onnxscript's"
                " RewriteRuleClassBase; name another"
            )
    if not rule_list:
        raise files.BadInput(f"{rules}: expected rewrite rules, found none; name some")
    return pattern.RewriteRuleSet(rule_list)


def applied(opened: files.Opened, rules: Any, draft: Path | None) -> Outcome:
    """Apply rewrite rules to the model that is `opened`; what they make is written to `draft`.

    `rules` is a subclass of ``RewriteRuleClassBase``, a ``RewriteRule``, a ``RewriteRuleSet``, a
    list of them, or "FILE.py:NAME" of any of these or of a function that gives one, applied as
    ``onnxscript.rewriter.rewrite`` does. "onnxscript": those for attention that
    ``optimize_for_ort`` applies, in its course. A site is fused if an operator of `graph.FUSED`
    takes its place. What the rules' code raises is a reason.
    Raises `files.BadInput` on other `rules`.
    """
    rule_set = None if rules == "onnxscript" else _rule_set(rules)
    optimizer = "optimize_for_ort" if rule_set is None else "rewrite"
    model = graph.load(opened.path)  # rules change it, and read its weights
    sites = graph.sites(model)
    before = opened.model.clone()  # which stays as it is
    sites_before = graph.sites(before)
    created: set[ir.Node | ir.Value] = set()
    reasons = _Reasons(IrWriter(opened.contents.nodes, opened.contents.tensors, created))
    watched = _is_attention if rule_set is None else rule_set.rules.__contains__
    watch = RuleWatch(sites, watched, reasons.conclude, created)
    with quiet(), watch:
        try:
            if rule_set is None:
                ort_fusions.optimize_for_ort(model)
            else:
                rewriter.rewrite(model, rule_set)
        except Exception as error:  # any: the code is not ours, and that it raised is the answer
            return stopped(optimizer, sites_before, _raised(watch, error), before)
        if draft:
            ir.save(model, draft, external_data=f"{draft.name}.data")
    left = set(graph.nodes(model))
    fused = {
        number
        for node in left
        if (node.domain, node.op_type) in graph.FUSED
        for number, role in watch.roles.get(node, {}).items()
        if role == CONTEXT
    }
    return Outcome(
        optimizer,
        sites_before,
        fused,
        lambda number: _best(watch, number, left),
        before,
        later=graph.later_operators(model),
    )


def _raised(watch: RuleWatch, error: Exception) -> Reason:
    """The reason that is an exception of a rule's or the library's own code."""
    return raised(innermost(error), _fusion(watch.raised) if watch.raised else None)


def _best(watch: RuleWatch, site: int, left: set[ir.Node]) -> Reason:
    """Why the rule that got furthest on the site did not fuse it."""
    tries = sorted(watch.tries[site], key=lambda attempt: attempt[0], reverse=True)
    if tries and (tries[0][0][2] >= 1 or site not in watch.fired):  # a node matched
        reason = tries[0][1][0]
        others: dict[str, Attempt] = {}  # the best of each rule that matched a node
        for rank, (_, attempt) in tries[1:]:
            if attempt and rank[2] >= 1:
                others.setdefault(attempt.variable, attempt)
        reason.attempts = [*others.values()][:10]
        return reason
    fired = watch.fired.get(site)
    if fired:
        message = "it fired, and no rule made an attention operator of what it put there"
    elif any(site in roles for node, roles in watch.roles.items() if node in left):
        message = "no rule came to a node of it"
    else:
        message = "the passes before took it out of the graph"
    name = _fusion(fired) if fired else None
    return Reason(name, "check", "unsupported_form", message=message, check=Check(message, {}))
