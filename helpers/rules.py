"""Why a rewrite rule of ``onnxscript.rewriter`` did not fuse: watch its matcher from outside.

A rule is a pattern, a `check` and a `rewrite`. The matcher starts at a node and walks the pattern
up against the arrows; where all of it is there, `check` may still say no, and `rewrite` give up.
While `Watch` is open, three methods of the matcher and one of the rule are wrapped, and a trace
function (`sys.settrace`) follows `check` and `rewrite`. The rules stay as they are. The library's
own tracer speaks only where a rule fired nowhere, and prints.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import CodeType, FrameType
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import _matcher, _pattern_ir, _rewrite_rule, ort_fusions, pattern

from helpers import conditions, graph
from helpers.quiet import quiet
from helpers.reasons import Attempt, Check, Explanation, Node, Reason, Verdict

# The modules of ort_fusions whose rules make an attention operator, or a step towards it.
_ATTENTION = {
    f"{ort_fusions.__name__}.{name}"
    for name in (
        *("attention", "gqa", "gqa_packed_qkv", "mha", "mha_bias", "mha_scale"),
        *("sdpa", "sdpa_via_mha"),
    )
}
_TEMPORARY = "ai.onnxruntime._fusion"  # the domain of operators that a later rule must replace
_INTERNAL = (
    "onnx_ir",
    *(f"{rewriter.__name__}._{name}" for name in ("basics", "context", "rewrite_rule")),
)
_MANY = 8  # items of a list, and elements of a constant, that are written out

# What a node is to a site; a try counts for a site by the highest of its nodes.
_ABOVE, _BELOW, _WEIGHTS, _CONTEXT = range(4)


@dataclass
class _Step:
    """A pattern that is being matched against what is `there`, input `index` of the step before."""

    pattern: _pattern_ir.NodePattern | _pattern_ir.ValuePattern
    there: ir.Node | ir.Value | None
    index: int | None = None
    inputs: Iterator[int] | None = None  # of a node, those that are matched next

    @property
    def node(self) -> ir.Node | None:
        return self.there.producer() if isinstance(self.there, ir.Value) else self.there

    @property
    def wanted(self) -> list[_pattern_ir.NodePattern]:
        """The patterns of nodes of which one has to be here; none where any value would do."""
        if isinstance(self.pattern, _pattern_ir.NodePattern):
            return [self.pattern]
        if isinstance(self.pattern, _pattern_ir.OpIdDispatchOr):
            return [value.producer() for _, value in self.pattern._op_to_pattern.values()]
        above = self.pattern.producer()
        return [above] if above else []


@dataclass
class _Failure:
    """The innermost pattern that did not match, after `nodes` had; `path` are those that lead here
    from the root. `missing` are the operators that would do, or empty if another thing is wrong."""

    path: list[_Step]
    step: _Step
    nodes: list[ir.Node]
    missing: list[_pattern_ir.NodePattern]
    message: str
    sources: list[ir.Node | ir.Value]
    swapped: bool = False  # what would match is the node's other operand

    @property
    def rank(self) -> tuple[float, int]:
        return len(set(self.nodes)) + (0 if self.missing else 0.5), len(self.path)


@dataclass
class _Try:
    """A rule tried at the node `root`: how far it came."""

    rule: pattern.RewriteRule
    root: ir.Node
    steps: list[_Step] = field(default_factory=list)  # that are being matched
    failures: list[_Failure] = field(default_factory=list)
    nodes: Sequence[ir.Node] = ()  # that matched
    outputs: Sequence[ir.Value] = ()  # of the whole pattern, once it matched
    match: Any = None
    call: conditions.Call | None = None  # the last of `check` or `rewrite`


def _is_one(node: ir.Node, wanted: Iterable[_pattern_ir.NodePattern]) -> bool:
    return any(one.op.matches(node.op_type) and one.domain.matches(node.domain) for one in wanted)


class Watch:
    """Record the tries of rules in a ``with`` block, by the attention site that they were made at.

    `watched` tells which rules; `names` are the names of nodes and of tensors that the file has.
    `tries` are for each site the (rank, reason, attempt) of those that came to nothing.
    """

    def __init__(
        self,
        sites: list[graph.Site],
        names: tuple[set[str], set[str]],
        watched: Callable[[pattern.RewriteRule], bool],
    ) -> None:
        self.roles = _roles(sites)
        self.tries: list[list[tuple[tuple, Reason, Attempt | None]]] = [[] for _ in sites]
        self.fired: dict[int, str] = {}  # the last rule that replaced a site's nodes
        self.raised: str | None = None  # the rule whose code raised
        self._names = _Names(*names)
        self._watched = watched
        self._try: _Try | None = None
        self._order = itertools.count()
        self._open: list[conditions.Call] = []  # calls of a rule's code that are running

    def __enter__(self) -> Watch:
        matcher, rule = _matcher.SimplePatternMatcher, _rewrite_rule.RewriteRule
        wrapped = [
            (matcher, "_match_node", self._visit),
            (matcher, "_match_value", self._visit),
            (matcher, "_get_output_values", self._matched),
            (matcher, "match", self._match),
            (rule, "try_rewrite", self._try_rewrite),
        ]
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
        tried = self._try = _Try(rule, args[2]) if watched else None
        try:
            made = plain(rule, *args, **options)
        except Exception:
            self.raised = _fusion(rule)
            raise
        finally:
            sys.settrace(self._trace_before)
            self._try, self._open = None, []
        if made is not None:
            self._replaced(rule, made, watched)
        elif watched:
            self._gave_up(tried)
        return made

    def _replaced(self, rule: pattern.RewriteRule, made: Any, watched: bool) -> None:
        """What a rule made is to a site what it took the place of."""
        roles = self._roles_of(made.match.nodes)
        self._names.add(made.new_nodes, made.new_outputs)
        self.roles.update((node, dict(roles)) for node in made.new_nodes)
        for site, role in roles.items():
            if watched and role >= _WEIGHTS:
                self.tries[site].clear()
                self.fired[site] = _fusion(rule)

    def _roles_of(self, nodes: Iterable[ir.Node]) -> dict[int, int]:
        found: dict[int, int] = {}
        for node in nodes:
            for site, role in self.roles.get(node, {}).items():
                found[site] = max(role, found.get(site, role))
        return found

    def _gave_up(self, tried: _Try) -> None:
        """Keep the try for the sites that it was about."""
        failure = _furthest(tried) if tried.failures else None
        tried.nodes = tried.nodes or (failure.nodes if failure else [])
        roles = self._roles_of([tried.root, *tried.nodes])
        if not roles or not (tried.nodes or max(roles.values()) >= _WEIGHTS):
            return
        if tried.match is not None:
            reason, attempt = self._refused(tried), None
        elif failure and failure.missing:
            reason, attempt = self._missing(tried, failure)
        else:
            reason, attempt = self._unlike(tried, failure), None
        reach = (tried.match is not None, *(failure.rank if failure else (len(tried.nodes), 0)))
        order = -next(self._order)
        for site, role in roles.items():
            self.tries[site].append(((role, *reach, order), reason, attempt))

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
            tried.match, tried.nodes, tried.outputs = matcher._match, matcher._match.nodes, outputs
        return outputs

    def _visit(self, plain: Callable, matcher: Any, wanted: Any, there: Any) -> bool:
        """Match one node or value; what failed stays recorded unless an alternative matched."""
        tried = self._try
        if tried is None or tried.match is not None:
            return plain(matcher, wanted, there)
        step = _Step(wanted, there)
        if isinstance(wanted, _pattern_ir.NodePattern):
            step.inputs = (i for i, one in enumerate(wanted.inputs) if one is not None)
        if tried.steps:
            above = tried.steps[-1]
            of_node = isinstance(above.pattern, _pattern_ir.NodePattern)
            step.index = next(above.inputs) if of_node else above.index
        else:  # another combination of outputs: the best so far is enough
            best = max((one.rank for one in tried.failures), default=None)
            tried.failures = [one for one in tried.failures if one.rank == best]
        before = len(tried.failures)
        tried.steps.append(step)
        matched = plain(matcher, wanted, there)
        if matched:
            del tried.failures[before:]
        elif len(tried.failures) == before:
            tried.failures.append(self._failure(tried, matcher._match))
        tried.steps.pop()
        return matched

    @staticmethod
    def _failure(tried: _Try, match: Any) -> _Failure:
        *before, step = tried.steps
        path = [one for one in before if isinstance(one.pattern, _pattern_ir.NodePattern)]
        nodes = [node for partial in match._partial_matches for node in partial.nodes]
        wanted, node = step.wanted, step.node
        missing = [] if node is not None and _is_one(node, wanted) else wanted
        sources = list(match.failure_nodes_and_values)
        return _Failure(path, step, nodes, missing, match.reason, sources)

    # ── What the rule's own code does ───────────────────────────────────────────────────────────

    def _called(self, frame: FrameType, _event: str, _: Any) -> Callable | None:
        """Follow the code that the library calls for a rule, and what that calls."""
        caller = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(_INTERNAL):
            return None
        if self._open:
            if caller is not self._open[-1].frame:
                return None
        elif caller.f_globals.get("__name__") != _rewrite_rule.__name__ or (
            caller.f_code.co_name not in ("wrapped", "get_replacement")
        ):
            return None
        call = conditions.Call(frame, caller.f_lineno)
        if self._open:
            self._open[-1].calls.append(call)
        else:
            self._try.call = call
        self._open.append(call)
        frame.f_trace_lines = False

        def local(frame: FrameType, event: str, _: Any) -> Callable:
            if event == "return":
                call.line = frame.f_lineno
                self._open.pop()
            return local

        return local

    # ── Reasons ─────────────────────────────────────────────────────────────────────────────────

    def _missing(self, tried: _Try, failure: _Failure) -> tuple[Reason, Attempt]:
        """An operator of the pattern was not there."""
        names, step, found = self._names, failure.step, failure.step.node
        operators = dict.fromkeys(str(one.op) for one in failure.missing)
        path = [one.there for one in failure.path]
        attempt = Attempt(
            names.node(tried.root),
            [*(node.op_type for node in path[1:]), "|".join(operators)],
            [*(one.index for one in failure.path[1:]), step.index],
            tried.rule.name,
            [names.node(node) for node in path[1:]],
            [names.node(found)] if found is not None else [],
        )
        further = _way(found, failure.missing) if found is not None and path else None
        reason = self._reason(tried, "path", _cause(failure, further), found, failure)
        reason.attempt = attempt
        if further:
            way = [*zip(attempt.expected, attempt.inputs, strict=True)][:-1]
            way += [(found.op_type, step.index), *further]
            reason.actual = [operator for operator, _ in way], [index for _, index in way]
        return reason, attempt

    def _unlike(self, tried: _Try, failure: _Failure | None) -> Reason:
        """The operators are there, but an attribute, a constant or an operand is another."""
        if failure is None:  # a matcher of another class, of which nothing is known
            return self._reason(tried, "check", "other_check", tried.root, None)
        step = failure.step
        constant = isinstance(step.pattern, _pattern_ir.Constant)
        reason = self._reason(
            tried, "check", "constant" if constant else "other_check", step.node, failure
        )
        operands: dict[str, Any] = {}
        if isinstance(step.there, ir.Node) and isinstance(step.pattern, _pattern_ir.NodePattern):
            operands["node"] = step.there
            for key, wanted in step.pattern.attributes.items():
                given = step.there.attributes.get(key)
                if not (wanted.can_match_none if given is None else wanted.matches(given)):
                    operands[key] = given
        else:
            operands["value"] = step.there
        bound = [one for one in failure.sources if isinstance(one, ir.Value)]
        operands |= {f"bound to {i}": one for i, one in enumerate(bound) if one is not step.there}
        if failure.path:
            operands["read by"] = failure.path[-1].there
        reason.check = self._check(reason.source or failure.message, operands)
        return reason

    def _refused(self, tried: _Try) -> Reason:
        """All of the pattern is there, and what else the rule asks for is not."""
        match, call = tried.match, tried.call
        blamed = list(match.failure_nodes_and_values)
        reason = self._reason(tried, "check", "other_check", blamed[0] if blamed else None, None)
        reason.message = match.reason or None
        if call is None:
            reason.cause = "used_elsewhere"
            source, operands = match.reason, _uses(tried)
        else:
            source, operands, reason.within = conditions.decided(call)
            code, reason.line = call.frame.f_code, call.line
            reason.file = conditions.file_of(code)
            reason.source = linecache.getline(code.co_filename, call.line).strip()
            reason.cause = _cause_of_check(operands)
        blamed = [one for one in blamed if not any(one is other for other in operands.values())]
        operands |= {f"blamed {i}": one for i, one in enumerate(blamed)}
        reason.check = self._check(source, operands)
        return reason

    def _check(self, source: str, operands: dict[str, Any]) -> Check:
        return Check(source, {key: self._names.show(one) for key, one in operands.items()})

    def _reason(
        self,
        tried: _Try,
        kind: str,
        cause: str,
        there: ir.Node | ir.Value | None,
        failure: _Failure | None,
    ) -> Reason:
        """A reason with the place in the pattern where it failed, and in PyTorch what is there."""
        node = there.producer() if isinstance(there, ir.Value) else there
        reason = Reason(_fusion(tried.rule), kind, cause, anchor=self._names.node(tried.root))
        written = _written(tried.rule)
        wanted = failure.step.wanted if failure else []
        if failure and not wanted and failure.path:
            wanted = failure.path[-1].wanted
        if written is not None:
            reason.file = conditions.file_of(written)
            reason.line, reason.source = _line(written, wanted[0] if wanted else None)
        if node is not None:
            reason.origin = graph.origin(node)
            reason.shape = str(node.outputs[0].shape) if node.outputs[0].shape else None
        if failure:
            reason.message = failure.message or None
        return reason


def _wrapper(method: Callable, plain: Callable) -> Callable:
    @functools.wraps(plain)
    def wrapper(self: Any, *args: Any, **options: Any) -> Any:
        return method(plain, self, *args, **options)

    return wrapper


class _Names:
    """Names as the file has them, of nodes and values of a graph that has changed since."""

    def __init__(self, nodes: set[str], tensors: set[str]) -> None:
        self._nodes, self._tensors = nodes, tensors
        self._made: set[ir.Node | ir.Value] = set()  # whose names are chance

    def add(self, nodes: Iterable[ir.Node], outputs: Iterable[ir.Value]) -> None:
        """Take note of `nodes` that a rule made; `outputs` get the names of those they replace."""
        taken = set(outputs)
        for node in nodes:
            self._made |= {node, *(value for value in node.outputs if value not in taken)}

    def tensor(self, value: ir.Value | None) -> str:
        """The value's name, or of the nearest up or down the graph that has a name in the file."""
        queue, seen = deque([value]), {value}
        while queue:
            value = queue.popleft()
            if value is None:
                continue
            if value.name in self._tensors and value not in self._made:
                return value.name
            above, below = value.producer(), value.consumers()
            near = [*(above.inputs if above else ()), *(v for node in below for v in node.outputs)]
            queue += (one for one in near if one not in seen)
            seen.update(near)
        return ""

    def node(self, node: ir.Node) -> Node:
        output = self.tensor(node.outputs[0])
        known = node.name in self._nodes and node not in self._made
        return Node(node.op_type, node.name if known else output, output)

    def show(self, thing: Any) -> str:
        """An operand of a check, in words: nodes and tensors by their names."""
        if isinstance(thing, ir.Node):
            inputs = ", ".join(map(self.tensor, thing.inputs))
            outputs = ", ".join(map(self.tensor, thing.outputs))
            return f"{thing.op_type} {self.node(thing).name} ({inputs}) -> {outputs}"
        if isinstance(thing, ir.Value):
            return self._value(thing)
        if isinstance(thing, ir.Attr):
            return self.show(thing.value)
        if isinstance(thing, dict):
            inner = (f"{key}: {self.show(one)}" for key, one in itertools.islice(thing.items(), 20))
            return "{" + ", ".join(inner) + "}"
        if isinstance(thing, list | tuple | set):
            inner = [self.show(one) for one in itertools.islice(thing, _MANY)]
            return f"[{', '.join(inner)}{', …' if len(thing) > _MANY else ''}]"
        return str(thing)

    def _value(self, value: ir.Value) -> str:
        made, tensor = value.producer(), ir.convenience.get_const_tensor(value)
        if made is not None:
            text = self.show(made)
        else:
            text = f"{'input' if value.is_graph_input() else 'initializer'} {self.tensor(value)}"
        text += f", shape {value.shape}" if value.shape is not None else ", no shape"
        if tensor is not None and tensor.size <= _MANY:
            text += f", value {tensor.numpy().tolist()}"
        return text


# ── What a rule's source tells ──────────────────────────────────────────────────────────────────


def _instance(rule: pattern.RewriteRule) -> pattern.RewriteRuleClassBase | None:
    owner = getattr(rule._condition_function, "__self__", None)
    return owner if isinstance(owner, pattern.RewriteRuleClassBase) else None


def _fusion(rule: pattern.RewriteRule) -> str:
    owner = _instance(rule)
    return type(owner).__name__ if owner else str(rule)


def _written(rule: pattern.RewriteRule) -> CodeType | None:
    """The code of the rule's pattern; of a rule without a class, that of its rewrite."""
    owner = _instance(rule)
    function = owner.pattern if owner else rule._replacement_pattern._function
    return getattr(inspect.unwrap(function), "__code__", None)


def _line(code: CodeType, wanted: _pattern_ir.NodePattern | None) -> tuple[int, str]:
    """Where a pattern builds the node `wanted`: the call that has most in common with it."""
    best, line = -1, code.co_firstlineno
    for call in ast.walk(conditions.syntax(code) or ast.Module([])):
        if wanted is None or not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Attribute) and call.func.attr == str(wanted.op):
            written = {word.arg: ast.unparse(word.value) for word in call.keywords}
            alike = sum(
                repr(one._value) == written.get(key)
                for key, one in wanted.attributes.items()
                if isinstance(one, _pattern_ir.AttrConstantPattern)
            )
            alike += sum(
                one is not None and one.name is not None and one.name == ast.unparse(given)
                for one, given in zip(wanted.inputs, call.args, strict=False)
            )
            if alike > best:
                best, line = alike, call.lineno
    return line, linecache.getline(code.co_filename, line).strip()


# ── Causes ──────────────────────────────────────────────────────────────────────────────────────


def _furthest(tried: _Try) -> _Failure:
    """The failure that most nodes matched before, with all operators that would have done there.

    If at a node on the way the other operand would match, that is where it failed.
    """
    failure = max(tried.failures, key=lambda one: one.rank)
    for i, (reader, step) in enumerate(itertools.pairwise([*failure.path, failure.step])):
        wanted, values = reader.pattern.inputs[step.index], reader.there.inputs
        operators = _operators(wanted)
        if len(values) == 2 and operators and values[0] is not values[1]:
            other = values[1 - step.index]
            if other is not None and _fits(tried, wanted, other):
                here = _Step(wanted, values[step.index], step.index)
                path = failure.path[: i + 1]
                message = "its other operand would match"
                return _Failure(path, here, failure.nodes, operators, message, [], swapped=True)
    if failure.missing:
        alike = (one for one in tried.failures if one.step.there is failure.step.there)
        failure.missing = [one for other in alike for one in other.missing]
    return failure


def _operators(wanted: _pattern_ir.ValuePattern) -> list[_pattern_ir.NodePattern]:
    """The nodes of which one must compute the value; none where another value would do too."""
    if isinstance(wanted, _pattern_ir.BacktrackingOr):
        choices = [_operators(one) for one in wanted._values]
        return [one for choice in choices for one in choice] if all(choices) else []
    return _Step(wanted, None).wanted


def _fits(tried: _Try, wanted: _pattern_ir.ValuePattern, value: ir.Value) -> bool:
    """Whether `value` matches a part of the rule's pattern by itself."""
    matcher = _matcher.SimplePatternMatcher(tried.rule._target_pattern)
    matcher._init_match(0)
    matcher._graph = tried.root.graph
    return bool(matcher._match_value(wanted, value))


def _way(
    found: ir.Node, wanted: list[_pattern_ir.NodePattern], far: int = 3
) -> list[tuple[str, int]] | None:
    """The way up from `found` to the nearest node that is wanted: operators and inputs."""
    queue: deque[tuple[ir.Node, list]] = deque([(found, [])])
    while queue:
        node, way = queue.popleft()
        if way and _is_one(node, wanted):
            return way
        if len(way) < far:
            above = ((i, value.producer()) for i, value in enumerate(node.inputs) if value)
            queue += [(one, [*way, (one.op_type, i)]) for i, one in above if one is not None]
    return None


def _cause(failure: _Failure, further: list | None) -> str:
    """The cause class of an operator that was not there; `further`: it is up this way."""
    if failure.swapped:
        return "operand_order"
    if all(str(one.domain) == _TEMPORARY for one in failure.missing):
        return "missing_anchor"
    if further:
        return "extra_node"
    found = failure.step.node
    above = [one.producer() for node in failure.missing for one in node.inputs if one is not None]
    if found is None or _is_one(found, [one for one in above if one is not None]):
        return "missing_node"
    return "other_operator"


def _cause_of_check(operands: dict[str, Any]) -> str:
    values = [
        item
        for one in operands.values()
        for item in (one.values() if isinstance(one, dict) else [one])
    ]
    if any(isinstance(one, ir.Value) and one.shape is None for one in values):
        return "shape_inference"
    if any(isinstance(one, ir.SymbolicDim) for one in operands.values()):
        return "symbolic_dimension"
    return "other_check"


def _uses(tried: _Try) -> dict[str, Any]:
    """The tensors that would be gone, and who else reads them."""
    found: dict[str, Any] = {}
    for value in (value for node in tried.nodes for value in node.outputs):
        readers = [node for node in value.consumers() if node not in tried.nodes]
        if value not in tried.outputs and (readers or value.is_graph_output()):
            count = len(found) // 2
            found[f"tensor {count}"] = value
            found[f"used by {count}"] = [
                *readers,
                *["the graph's outputs"][: value.is_graph_output()],
            ]
    return found


# ── The sites ───────────────────────────────────────────────────────────────────────────────────


def _reached(start: ir.Node, step: Callable[[ir.Node], Iterable[ir.Node]]) -> set[ir.Node]:
    queue, seen = [start], {start}
    while queue:
        new = [node for node in step(queue.pop()) if node not in seen]
        seen.update(new)
        queue += new
    return seen


def _up(node: ir.Node) -> list[ir.Node]:
    return [one for one in node.predecessors() if one is not None]


def _down(node: ir.Node) -> list[ir.Node]:
    return list(node.successors())


def _roles(sites: list[graph.Site]) -> dict[ir.Node, dict[int, int]]:
    """What each node is to which sites: between their products, or after them, nearest first."""
    roles: dict[ir.Node, dict[int, int]] = {}
    for i, site in enumerate(sites):
        if site.context is None:
            roles.setdefault(site.node, {})[i] = _CONTEXT
            continue
        above = _reached(site.node, _up) & _reached(site.scores, _down)
        weights = _reached(site.node, _down) & _reached(site.context, _up)
        for role, nodes in ((_ABOVE, above), (_WEIGHTS, weights), (_CONTEXT, [site.context])):
            for node in nodes:
                roles.setdefault(node, {})[i] = role
    queue = deque((site.context or site.node, i) for i, site in enumerate(sites))
    while queue:
        node, i = queue.popleft()
        for below in _down(node):
            if below not in roles:
                roles[below] = {i: _BELOW}
                queue.append((below, i))
    return roles


def _file_names(inside: onnx.GraphProto | onnx.FunctionProto) -> tuple[set[str], set[str]]:
    """The names of the nodes and of the tensors in a graph and in those inside of it."""
    nodes = {node.name for node in inside.node}
    tensors = {name for node in inside.node for name in node.output}
    if isinstance(inside, onnx.GraphProto):
        tensors |= {one.name for one in (*inside.input, *inside.initializer)}
    attributes = [one for node in inside.node for one in node.attribute]
    for graph_ in [one.g for one in attributes if one.HasField("g")]:
        inner = _file_names(graph_)
        nodes, tensors = nodes | inner[0], tensors | inner[1]
    return nodes - {""}, tensors - {""}


def _is_attention(rule: pattern.RewriteRule) -> bool:
    return type(_instance(rule)).__module__ in _ATTENTION


def _rule_set(rules: Any) -> pattern.RewriteRuleSet:
    if isinstance(rules, pattern.RewriteRuleSet):
        return rules
    given = list(rules) if isinstance(rules, list | tuple) else [rules]
    made: list[pattern.RewriteRule] = []
    for one in given:
        if isinstance(one, pattern.RewriteRuleSet):
            made += one.rules
        elif isinstance(one, type) and issubclass(one, pattern.RewriteRuleClassBase):
            made.append(one.rule())
        elif isinstance(one, pattern.RewriteRule):
            made.append(one)
        else:
            raise TypeError(f"rules: expected rewrite rules or classes of them, found {one!r}")
    return pattern.RewriteRuleSet(made)


def explain(path: str | Path, rules: Any = None) -> Explanation:
    """Apply rewrite rules to the model at `path`, and say why its attention sites were not fused.

    `rules` is a subclass of ``RewriteRuleClassBase``, a ``RewriteRule``, a ``RewriteRuleSet``, or a
    list of them, applied as ``onnxscript.rewriter.rewrite`` does. None: those for attention that
    ``optimize_for_ort`` applies, in its course. A site is fused if an operator of `graph.FUSED`
    takes its place. Raises TypeError on other `rules`; what the rules' code raises is a reason.
    """
    chosen = None if rules is None else _rule_set(rules)
    proto = onnx.load(path, load_external_data=False)
    names = [_file_names(one) for one in (proto.graph, *proto.functions)]
    names = tuple(set().union(*one) for one in zip(*names, strict=True))
    del proto  # it may hold the weights
    model = graph.load(path)
    sites = graph.sites(model)
    watch = Watch(sites, names, _is_attention if chosen is None else chosen.rules.__contains__)
    failed: Reason | None = None
    with quiet(), watch:
        try:
            if chosen is None:
                ort_fusions.optimize_for_ort(model)
            else:
                rewriter.rewrite(model, chosen)
        except Exception as raised:  # any: the code is not ours, and that it raised is the answer
            last = traceback.extract_tb(raised.__traceback__)[-1]
            failed = Reason(watch.raised, "raised", "raised")
            failed.file, failed.line = PurePath(last.filename).name, last.lineno
            failed.source = last.line
            failed.message = f"{type(raised).__name__}: {raised}"
    left = set(graph.nodes(model))
    fused = {
        i
        for node in left
        if (node.domain, node.op_type) in graph.FUSED
        for i, role in watch.roles.get(node, {}).items()
        if role == _CONTEXT
    }
    verdicts, reasons = [], {}
    for i, site in enumerate(sites):
        verdict = Verdict(site.name, site.layer, i in fused if failed is None else site.fused)
        verdicts.append(verdict)
        if verdict.fused:
            continue
        reason = failed or _best(watch, i, left)
        number, reason = reasons.setdefault(_key(reason), (len(reasons), reason))
        reason.sites.append(i)
        verdict.reason = number
    optimizer = "optimize_for_ort" if chosen is None else "rewrite"
    return Explanation(optimizer, verdicts, [reason for _, reason in reasons.values()])


def _best(watch: Watch, site: int, left: set[ir.Node]) -> Reason:
    """Why the rule that got furthest on the site did not fuse it."""
    tries = sorted(watch.tries[site], key=lambda one: one[0], reverse=True)
    if tries:
        reason = tries[0][1]
        others = {
            attempt.variable: attempt
            for rank, _, attempt in reversed(tries[1:])
            if attempt and rank[2] >= 1
        }
        reason.attempts = [*reversed(others.values())][:10]
        return reason
    fired = watch.fired.get(site)
    if fired:
        message = "it fired, and no rule made an attention operator of what it put there"
    elif any(site in roles for node, roles in watch.roles.items() if node in left):
        message = "no rule came to a node of it"
    else:
        message = "the passes before took it out of the graph"
    return Reason(fired, "check", "unsupported_form", message=message, check=Check(message, {}))


def _key(reason: Reason) -> tuple:
    attempt = reason.attempt
    path = (*attempt.expected, *attempt.inputs) if attempt else ()
    found = tuple(one.operator for one in attempt.found) if attempt else ()
    source = reason.check.source if reason.check else None
    return reason.fusion, reason.kind, reason.file, reason.line, source, path, found
