"""Watch the rewrite rules of ``onnxscript.rewriter`` at work, from outside: how far each try came.

A rule is a pattern, a `check` and a `rewrite`. The matcher starts at a node and walks the pattern
up against the arrows; where all of it is there, `check` may still say no, and `rewrite` give up.
While a `RuleWatch` is open, methods of the matcher and of the rule are wrapped, and a trace
function (`sys.settrace`) follows `check` and `rewrite`. No rule is changed, and all is as before
when the ``with`` block ends, however it does. (The library's own tracer speaks only where a rule
fired nowhere, and prints.)
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from helpers import graph
from helpers.explain import onnxscript_parts as parts
from helpers.explain.calls import Step, is_generator
from helpers.graph import walks

# What a node is to a site; a try counts for a site by the highest of its nodes.
ABOVE, BELOW, WEIGHTS, CONTEXT = range(4)


@dataclass
class Wanted:
    """A pattern that is being matched against what is `there`, input `index` of the step before."""

    pattern: parts.NodePattern | parts.ValuePattern
    there: ir.Node | ir.Value | None
    index: int | None = None
    inputs: Iterator[int] | None = None  # of a node, those that are matched next

    @property
    def node(self) -> ir.Node | None:
        return self.there.producer() if isinstance(self.there, ir.Value) else self.there

    @property
    def wanted(self) -> list[parts.NodePattern]:
        """The patterns of nodes of which one has to be here; none where any value would do."""
        if isinstance(self.pattern, parts.NodePattern):
            return [self.pattern]
        if isinstance(self.pattern, parts.OpIdDispatchOr):
            return parts.dispatched(self.pattern)
        above = self.pattern.producer()
        return [above] if above else []


@dataclass
class Failure:
    """The innermost pattern that did not match, after `nodes` had; `path` are those that lead here
    from the root. `missing` are the operators that would do, or empty if another thing is wrong."""

    path: list[Wanted]
    step: Wanted
    nodes: list[ir.Node]
    missing: list[parts.NodePattern]
    message: str
    sources: list[ir.Node | ir.Value]
    swapped: bool = False  # what would match is the node's other operand

    @property
    def rank(self) -> tuple[float, int]:
        return len(set(self.nodes)) + (0 if self.missing else 0.5), len(self.path)


@dataclass
class Try:
    """A rule tried at the node `root`: how far it came."""

    rule: pattern.RewriteRule
    root: ir.Node
    steps: list[Wanted] = field(default_factory=list)  # that are being matched
    failures: list[Failure] = field(default_factory=list)
    nodes: Sequence[ir.Node] = ()  # that matched
    outputs: Sequence[ir.Value] = ()  # of the whole pattern, once it matched
    match: Any = None
    call: Step | None = None  # the last of `check` or `rewrite`


def is_any_of(node: ir.Node, wanted: Iterable[parts.NodePattern]) -> bool:
    return any(
        pattern_node.op.matches(node.op_type) and pattern_node.domain.matches(node.domain)
        for pattern_node in wanted
    )


class RuleWatch:
    """Record the tries of rules in a ``with`` block, by the attention site that they were made at.

    `watched` tells which rules. `tries` are for each of `sites` the (rank, conclusion) of those
    that came to nothing after the last that fired there; `conclude` is asked for its conclusion as
    soon as a try has failed, since later rules change the graph. `fired` is the last rule that
    replaced a site's nodes, `raised` the one whose code raised. `created` are nodes and values that
    rules made, but for outputs that take the place of others; `roles` is what each node is to which
    sites.
    """

    def __init__(
        self,
        sites: list[graph.Site],
        watched: Callable[[pattern.RewriteRule], bool],
        conclude: Callable[[Try, Failure | None], Any],
        created: set[ir.Node | ir.Value],
    ) -> None:
        self.roles = _roles(sites)
        self.tries: list[list[tuple[tuple, Any]]] = [[] for _ in sites]
        self.fired: dict[int, pattern.RewriteRule] = {}
        self.raised: pattern.RewriteRule | None = None
        self.created = created
        self._watched, self._conclude = watched, conclude
        self._try: Try | None = None
        self._order = itertools.count()
        self._open: list[tuple[FrameType, Step]] = []  # calls of a rule's code that are running

    def __enter__(self) -> RuleWatch:
        wrapped = parts.wrapped(self._visit, self._matched, self._match, self._try_rewrite)
        self._plain = [(class_, name, getattr(class_, name)) for class_, name, _ in wrapped]
        self._trace_before = sys.gettrace()
        for (class_, name, plain), (_, _, method) in zip(self._plain, wrapped, strict=True):
            setattr(class_, name, _wrapper(method, plain))
        return self

    def __exit__(self, *_: object) -> None:
        for class_, name, plain in self._plain:
            setattr(class_, name, plain)

    # ── The rule ────────────────────────────────────────────────────────────────────────────────

    def _try_rewrite(self, plain: Callable, rule: Any, *args: Any, **options: Any) -> Any:
        watched = self._watched(rule)
        tried = self._try = Try(rule, args[2]) if watched else None
        try:
            rewritten = plain(rule, *args, **options)
        except Exception:
            self.raised = rule
            raise
        finally:
            sys.settrace(self._trace_before)
            self._try, self._open = None, []
        if rewritten is not None:
            self._replaced(rule, rewritten, watched)
        elif watched:
            self._gave_up(tried)
        return rewritten

    def _replaced(self, rule: pattern.RewriteRule, rewritten: Any, watched: bool) -> None:
        """What a rule made is to a site what it took the place of."""
        roles = self._roles_of(rewritten.match.nodes)
        taken = set(rewritten.new_outputs)
        for node in rewritten.new_nodes:
            self.created |= {node, *(value for value in node.outputs if value not in taken)}
        self.roles.update((node, dict(roles)) for node in rewritten.new_nodes)
        for site, role in roles.items():
            if watched and role >= WEIGHTS:
                self.tries[site].clear()
                self.fired[site] = rule

    def _roles_of(self, nodes: Iterable[ir.Node]) -> dict[int, int]:
        roles: dict[int, int] = {}
        for node in nodes:
            for site, role in self.roles.get(node, {}).items():
                roles[site] = max(role, roles.get(site, role))
        return roles

    def _gave_up(self, tried: Try) -> None:
        """Keep the try for the sites that it was about."""
        failure = _furthest(tried) if tried.failures else None
        tried.nodes = tried.nodes or (failure.nodes if failure else [])
        roles = self._roles_of([tried.root, *tried.nodes])
        if not roles or not (tried.nodes or max(roles.values()) >= WEIGHTS):
            return
        conclusion = self._conclude(tried, failure)
        reach = (tried.match is not None, *(failure.rank if failure else (len(tried.nodes), 0)))
        order = -next(self._order)
        for site, role in roles.items():
            self.tries[site].append(((role, *reach, order), conclusion))

    # ── The matcher ─────────────────────────────────────────────────────────────────────────────

    def _match(self, plain: Callable, matcher: Any, *args: Any, **options: Any) -> Any:
        first = self._try is not None and self._try.match is None
        match = plain(matcher, *args, **options)
        if match and first:  # else a rule's own check matches a pattern
            sys.settrace(self._called)
        return match

    def _matched(self, plain: Callable, matcher: Any) -> list[ir.Value] | None:
        """All of the pattern is there, though its nodes may be used elsewhere too."""
        outputs, tried = plain(matcher), self._try
        if tried is not None and tried.match is None and outputs is not None:
            tried.match, tried.outputs = parts.match_of(matcher), outputs
            tried.nodes = tried.match.nodes
        return outputs

    def _visit(self, plain: Callable, matcher: Any, wanted: Any, there: Any) -> bool:
        """Match one node or value; what failed stays recorded unless an alternative matched."""
        tried = self._try
        if tried is None or tried.match is not None:
            return plain(matcher, wanted, there)
        step = Wanted(wanted, there)
        if isinstance(wanted, parts.NodePattern):
            step.inputs = (i for i, value in enumerate(wanted.inputs) if value is not None)
        if tried.steps:
            above = tried.steps[-1]
            of_node = isinstance(above.pattern, parts.NodePattern)
            step.index = next(above.inputs) if of_node else above.index
        else:  # another combination of outputs: the best so far is enough
            best = max((failure.rank for failure in tried.failures), default=None)
            tried.failures = [failure for failure in tried.failures if failure.rank == best]
        before = len(tried.failures)
        tried.steps.append(step)
        matched = plain(matcher, wanted, there)
        if matched:
            del tried.failures[before:]
        elif len(tried.failures) == before:
            tried.failures.append(self._failure(tried, parts.match_of(matcher)))
        tried.steps.pop()
        return matched

    @staticmethod
    def _failure(tried: Try, match: Any) -> Failure:
        *before, step = tried.steps
        path = [
            step_before
            for step_before in before
            if isinstance(step_before.pattern, parts.NodePattern)
        ]
        nodes = parts.matched_nodes(match)
        wanted, node = step.wanted, step.node
        missing = [] if node is not None and is_any_of(node, wanted) else wanted
        sources = list(match.failure_nodes_and_values)
        return Failure(path, step, nodes, missing, match.reason, sources)

    # ── What the rule's own code does ───────────────────────────────────────────────────────────

    def _called(self, frame: FrameType, _event: str, _: Any) -> Callable | None:
        """Follow the code that the library calls for a rule, and what that calls."""
        caller = frame.f_back
        if parts.is_internal(frame) or is_generator(frame.f_code):
            return None
        if self._open:
            if caller is not self._open[-1][0]:
                return None
        elif not parts.calls_rules(caller):
            return None
        step = Step(frame.f_code, caller.f_lineno, names=frame.f_globals)
        if self._open:
            self._open[-1][1].inner.append(step)
        else:
            self._try.call = step
        self._open.append((frame, step))
        frame.f_trace_lines = False

        def local(frame: FrameType, event: str, value: Any) -> Callable:
            if event == "return":
                step.line, step.local, step.value = frame.f_lineno, dict(frame.f_locals), value
                self._open.pop()
            return local

        return local


def _wrapper(method: Callable, plain: Callable) -> Callable:
    @functools.wraps(plain)
    def wrapper(self: Any, *args: Any, **options: Any) -> Any:
        return method(plain, self, *args, **options)

    return wrapper


def _furthest(tried: Try) -> Failure:
    """The failure that most nodes matched before, with all operators that would have done there.

    If at a node on the way the other operand would match, that is where it failed.
    """
    failure = max(tried.failures, key=lambda failure: failure.rank)
    for i, (reader, step) in enumerate(itertools.pairwise([*failure.path, failure.step])):
        wanted, values = reader.pattern.inputs[step.index], reader.there.inputs
        operators = _operators(wanted)
        if len(values) == 2 and operators and values[0] is not values[1]:
            other = values[1 - step.index]
            if other is not None and parts.fits(tried.rule, wanted, other, tried.root.graph):
                here = Wanted(wanted, values[step.index], step.index)
                path = failure.path[: i + 1]
                message = "its other operand would match"
                return Failure(path, here, failure.nodes, operators, message, [], swapped=True)
    if failure.missing:
        alike = (
            other_failure
            for other_failure in tried.failures
            if _place(other_failure) == _place(failure)
        )
        failure.missing = [pattern_node for other in alike for pattern_node in other.missing]
    return failure


def _place(failure: Failure) -> tuple:
    step = failure.step
    return id(step.there if step.node is None else step.node), len(failure.path)


def _operators(wanted: parts.ValuePattern) -> list[parts.NodePattern]:
    """The nodes of which one must compute the value; none where another value would do too."""
    if isinstance(wanted, parts.BacktrackingOr):
        choices = [_operators(alternative) for alternative in parts.alternatives(wanted)]
        return (
            [pattern_node for choice in choices for pattern_node in choice] if all(choices) else []
        )
    return Wanted(wanted, None).wanted


# ── The sites ───────────────────────────────────────────────────────────────────────────────────


def _roles(sites: list[graph.Site]) -> dict[ir.Node, dict[int, int]]:
    """What each node is to which sites: between their products, or after them, nearest first."""
    roles: dict[ir.Node, dict[int, int]] = {}
    nearest: dict[ir.Node, int] = {}  # the site of each node after one
    for i, site in enumerate(sites):
        nearest.setdefault(site.context or site.node, i)
        if site.context is None:
            roles.setdefault(site.node, {})[i] = CONTEXT
            continue
        above = walks.between(site.scores, site.node)
        weights = walks.between(site.node, site.context)
        for role, nodes in ((ABOVE, above), (WEIGHTS, weights), (CONTEXT, [site.context])):
            for node in nodes:
                roles.setdefault(node, {})[i] = role
    for node in walks.downstream(*nearest, stop=set(roles)):
        for reader in walks.consumers(node):
            nearest.setdefault(reader, nearest[node])
    return {node: {i: BELOW} for node, i in nearest.items()} | roles
