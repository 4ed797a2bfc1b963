"""Why a fusion did not match: watch ONNX Runtime's optimizer at work, without a debugger.

Its fusions are Python: `fuse` starts from an anchor (a LayerNormalization, say), asks
``match_parent_path`` for one path after another, and returns at the first thing that it misses. A
trace function (`sys.settrace`) sees each of these calls come and go. Nothing is patched or forked.
"""

from __future__ import annotations

import ast
import functools
import gc
import heapq
import inspect
import linecache
import sys
import textwrap
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx
import onnx_ir as ir

from helpers import files, graph

if TYPE_CHECKING:
    import pandas as pd


class Node(NamedTuple):
    """A node as it was when a fusion looked at it. `name` is what to search for in the file: the
    node's, or, for one that the optimizer made itself, its first output's."""

    operator: str
    name: str
    output: str


@dataclass
class Attempt:
    """One path that a fusion asked for, from the node `start` up against the arrows.

    `expected[i]` is the operator wanted next, by input `inputs[i]` of the node before it (None: any
    input). `matched` are the nodes found so far. Where the path broke, `at` is the last node that
    matched and `found` the node that is there instead of `expected[len(matched)]`.
    """

    start: Node
    expected: list[str]
    inputs: list[int | None]
    variable: str | None  # what the fusion's code calls the result
    matched: list[Node] = field(default_factory=list)
    found: Node | None = None

    @property
    def broke(self) -> bool:
        return len(self.matched) < len(self.expected)

    @property
    def at(self) -> Node:
        return self.matched[-1] if self.matched else self.start

    def __str__(self) -> str:
        """The path read backwards: one line for each step, and where it broke."""
        lines = [f"  start      {self.start.operator:<12} {self.start.name}"]
        for i, (operator, index) in enumerate(zip(self.expected, self.inputs, strict=True)):
            edge = "any input" if index is None else f"input {index}"
            if i < len(self.matched):
                lines.append(f"  {edge:<10} {operator:<12} {self.matched[i].name}")
                continue
            there = f"{self.found.operator} {self.found.name}" if self.found else "no node"
            lines.append(f"  {edge:<10} {operator:<12} ✗ the graph has {there}")
            break
        return "\n".join(lines)


@dataclass
class Call:
    """One call of a fusion's `fuse`: its anchor, what it asked for, and how it ended."""

    fusion: str
    anchor: Node
    attempts: list[Attempt] = field(default_factory=list)
    fused: bool = False
    file: str = ""
    line: int = 0
    source: str = ""  # the line that returned
    broken: list[Attempt] = field(default_factory=list)  # the failed ones that made it return
    actual: tuple[list[str], list[int]] | None = None  # the path there is: operators, inputs

    @property
    def culprit(self) -> Attempt | None:
        """Of `broken`, the attempt that got furthest (the first of those)."""
        return max(self.broken, key=lambda attempt: len(attempt.matched), default=None)

    @property
    def none(self) -> list[str]:
        """The local variables that the failed matches left None."""
        return list(dict.fromkeys(one.variable for one in self.broken if one.variable))


_NO_ANCHOR = "no anchor of a fusion for attention comes after them"


def _count(things: list, what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


@dataclass
class Reason:
    """Why sites were not fused: the same for each of `sites`; `call` is that of the first.

    Without a call, no fusion for attention was started from a node after the site, or the
    optimizer's own code raised `error` before.
    """

    sites: list[graph.Site]
    call: Call | None = None
    error: str | None = None

    def __str__(self) -> str:
        if self.call is None:
            why = f"the optimizer's own code raised {self.error}" if self.error else _NO_ANCHOR
            return f"{_count(self.sites, 'site')}: {why}"
        call, attempt = self.call, self.call.culprit
        lines = [
            f"{_count(self.sites, 'site')}: {call.fusion} gave up at {call.file}:{call.line}"
            f" ({call.source}), started from {call.anchor.operator} {call.anchor.name}"
        ]
        if attempt:
            lines += [f"  left None: {', '.join(call.none)}", str(attempt)]
        if call.actual:
            lines.append(f"  the path there is: {call.actual[0]}, {call.actual[1]}")
        return "\n".join(lines)


@dataclass
class Explanation:
    """What `explain` found. `calls` are those of the fusions for attention, in order."""

    optimizer: str
    sites: list[graph.Site]  # of the optimised graph
    calls: list[Call]
    reasons: list[Reason]

    def __str__(self) -> str:
        fused = sum(site.fused for site in self.sites)
        verdict = f"{self.optimizer}: {_count(self.sites, 'site')}, {fused} fused"
        reasons = _count(self.reasons, "reason")
        return "\n".join([f"{verdict}, {reasons}", *map(str, self.reasons)])

    def table(self, call: Call | None = None) -> pd.DataFrame:
        """The paths that `call` (by default the first reason's) asked for, one a row."""
        import pandas as pd

        call = call or self.reasons[0].call
        return pd.DataFrame(
            {
                "variable": attempt.variable,
                "start": attempt.start.operator,
                "expected": " ← ".join(attempt.expected),
                "inputs": attempt.inputs,
                "matched": f"{len(attempt.matched)} of {len(attempt.expected)}",
                "found": attempt.found.operator if attempt.found else "",
            }
            for attempt in call.attempts
        )


class Watch:
    """Record every `fuse` of a fusion for attention in a ``with`` block, and what it asked for.

    `optimizer` is the class that runs (its own ``match_parent_path`` is watched: the package has
    two copies of ``OnnxModel``), and `names` are the nodes that the file has.
    """

    def __init__(self, optimizer: type, names: set[str]) -> None:
        self.calls: list[Call] = []
        self._names = names
        self._path_code = optimizer.match_parent_path.__code__
        self._step_code = optimizer.match_parent.__code__
        self._open: list[tuple[FrameType, Call]] = []
        self._attempt: Attempt | None = None  # the path that is being matched

    def __enter__(self) -> Watch:
        self._fusion = sys.modules["fusion_base"].Fusion  # by the name that the fusions import
        self._apply = apply = self._fusion.apply

        def traced(fusion: Any) -> None:
            """Trace this fusion alone: under a trace, all the rest takes half as long again."""
            before = sys.gettrace()
            sys.settrace(self._called if self._is_ours(fusion) else before)
            try:
                apply(fusion)
            finally:
                sys.settrace(before)

        self._fusion.apply = traced
        return self

    def __exit__(self, *_: object) -> None:
        self._fusion.apply = self._apply

    @staticmethod
    def _is_ours(fusion: object) -> bool:
        return "Attention" in getattr(fusion, "fused_op_type", "")

    def _node(self, proto: onnx.NodeProto) -> Node:
        name = proto.name if proto.name in self._names else proto.output[0]
        return Node(proto.op_type, name, proto.output[0])

    def _called(self, frame: FrameType, _event: str, _: Any) -> Callable | None:
        code = frame.f_code  # f_locals is dear, and most calls are none of ours
        if code.co_name != "fuse" and code is not self._path_code and code is not self._step_code:
            return None
        local = frame.f_locals
        if code.co_name == "fuse":
            fusion = local.get("self")
            if not self._is_ours(fusion):
                return None
            anchor = self._node(local[code.co_varnames[1]])
            self.calls.append(Call(type(fusion).__name__, anchor, file=code.co_filename))
            self._open.append((frame, self.calls[-1]))
            return self._watching(frame, functools.partial(self._fused, len(fusion.nodes_to_add)))
        if code is self._path_code and self._open:
            inputs = local["parent_input_index"]
            wanted = list(local["parent_op_types"])
            inputs = [None] * len(wanted) if inputs is None else list(inputs)
            self._attempt = self._start(frame, wanted, inputs)
            return self._watching(frame, self._path_returned)
        if code is self._step_code and self._open:
            if self._attempt is None:  # asked for by itself: a path of one step
                self._start(frame, [local["parent_op_type"]], [local["input_index"]])
            return self._watching(frame, self._step_returned)
        return None

    def _start(self, frame: FrameType, wanted: list[str], inputs: list[int | None]) -> Attempt:
        fusion, call = self._open[-1]
        assigned = _code(fusion.f_code).assigned
        variable = next((v for lines, v in assigned if fusion.f_lineno in lines), None)
        call.attempts.append(Attempt(self._node(frame.f_locals["node"]), wanted, inputs, variable))
        return call.attempts[-1]

    @staticmethod
    def _watching(frame: FrameType, returned: Callable) -> Callable:
        frame.f_trace_lines = False

        def local(frame: FrameType, event: str, value: Any) -> Callable:
            if event == "return":
                returned(frame, value)
            return local

        return local

    def _fused(self, before: int, frame: FrameType, _value: Any) -> None:
        call = self._open.pop()[1]
        call.line = frame.f_lineno
        call.fused = len(frame.f_locals["self"].nodes_to_add) > before
        call.source = linecache.getline(call.file, call.line).strip()
        if not call.fused:
            call.broken = _broken(call, _code(frame.f_code))
        if call.culprit:
            made = frame.f_locals[frame.f_code.co_varnames[3]]
            call.actual = _aligned(call.culprit, made)

    def _path_returned(self, _frame: FrameType, _value: Any) -> None:
        self._attempt = None

    def _step_returned(self, frame: FrameType, value: Any) -> None:
        attempt = self._attempt or self._open[-1][1].attempts[-1]
        if value is not None:
            attempt.matched.append(self._node(value))
            return
        local = frame.f_locals
        node, index = local["node"], local["input_index"]
        made = local["output_name_to_node"] or local["self"].output_name_to_node()
        names = node.input if index is None else node.input[index : index + 1]
        found = next((made[name] for name in names if name in made), None)
        attempt.found = self._node(found) if found is not None else None


class _Code(NamedTuple):
    """What a function's source tells: which lines assign to which variable, and for each `if` with
    its `elif`s, the lines of its branches and the names that its tests read."""

    assigned: list[tuple[range, str]]
    tested: list[tuple[range, set[str]]]


@functools.cache
def _code(code: CodeType) -> _Code:
    lines, start = inspect.getsourcelines(code)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    assigned, tested, elifs = [], [], set()
    for node in ast.walk(tree):  # an `if` before its `elif`s
        span = range(getattr(node, "lineno", 0) + start - 1, getattr(node, "end_lineno", 0) + start)
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and len(target.elts) == 3:
                target = target.elts[1]  # match_parent_paths returns which, the nodes, the inputs
            if isinstance(target, ast.Name):
                assigned.append((span, target.id))
        if isinstance(node, ast.If) and node not in elifs:
            names, branch = set(), [node]
            while len(branch) == 1 and isinstance(branch[0], ast.If):
                elifs.add(branch[0])
                names |= {n.id for n in ast.walk(branch[0].test) if isinstance(n, ast.Name)}
                branch = branch[0].orelse
            tested.append((span, names))
    return _Code(assigned, tested)


def _broken(call: Call, code: _Code) -> list[Attempt]:
    """The failed attempts that made `fuse` return: those whose results the `if` around the return
    reads, and else the last ones that started from one node."""
    spans = [(len(span), names) for span, names in code.tested if call.line in span]
    names = min(spans, key=lambda one: one[0])[1] if spans else set()
    failed = [attempt for attempt in call.attempts if attempt.broke]
    if failed and failed[-1].variable in names:
        return [attempt for attempt in failed if attempt.variable in names]
    last: list[Attempt] = []
    for attempt in reversed(call.attempts):
        if not attempt.broke or (last and attempt.start != last[0].start):
            break
        last.insert(0, attempt)
    return last


def _aligned(
    attempt: Attempt, made: dict[str, onnx.NodeProto]
) -> tuple[list[str], list[int]] | None:
    """The path that the graph has from the attempt's start, through what matched, to an operator of
    the kind wanted last: operators and inputs, or None where none is near.

    Of all such paths the one that needs fewest changes of what was expected: an operator more costs
    1, one less costs 1, another input than expected a little (Dijkstra on the edit distance).
    """
    matched, wanted = len(attempt.matched), attempt.expected
    fixed = [one.output for one in attempt.matched]
    queue: list[tuple[float, int, int, str, tuple]] = [(0, 0, 0, attempt.start.output, ())]
    seen, tie = set(), 0
    while queue and tie < 20_000:
        cost, _, reached, output, path = heapq.heappop(queue)
        if reached == len(wanted) and path and path[-1][0] == wanted[-1]:
            return [operator for operator, _ in path], [index for _, index in path]
        if (output, reached) in seen or cost > len(wanted) + 3:
            continue
        seen.add((output, reached))
        if matched <= reached < len(wanted) - 1:  # the graph does without this operator
            tie += 1
            heapq.heappush(queue, (cost + 1, tie, reached + 1, output, path))
        for index, name in enumerate(made[output].input if output in made else ()):
            above = made.get(name)
            if above is None or (reached < matched and above.output[0] != fixed[reached]):
                continue
            same = reached < len(wanted) and above.op_type == wanted[reached]
            edge = attempt.inputs[reached] if reached < len(wanted) else None
            dear = 0.1 if edge not in (None, index) else 0
            tie += 1
            step = (cost + dear + (not same), tie, reached + same, above.output[0])
            heapq.heappush(queue, (*step, (*path, (above.op_type, index))))
    return None


def _anchored(site: graph.Site, calls: dict[str, Call]) -> Call | None:
    """The call of `fuse` whose anchor is the first downstream of `site`."""
    queue, seen = deque([site.node]), {site.node}
    while queue:
        node = queue.popleft()
        for value in node.outputs:
            if value.name in calls:
                return calls[value.name]
            for user in value.consumers():
                if user not in seen:
                    seen.add(user)
                    queue.append(user)
    return None


def explain(
    path: str | Path,
    model_type: str,
    *,
    num_heads: int = 0,
    hidden_size: int = 0,
    opt_level: int | None = None,
    options: Any = None,
    save: str | Path | None = None,
) -> Explanation:
    """Run ``onnxruntime.transformers.optimizer`` on the file at `path`, and say what it missed.

    `model_type` is a key of its MODEL_TYPES, or of one that was registered there; `num_heads`,
    `hidden_size`, `opt_level` and `options` (its FusionOptions) are passed on (0, and None: the
    optimizer's own choice). What it makes is written to `save`. Raises `files.BadInput` on an
    unknown `model_type`, or a hidden size that is no multiple of the heads. What the optimizer's
    code raises becomes a reason.
    """
    from onnxruntime.transformers import optimizer

    from helpers.export import quiet

    if model_type not in optimizer.MODEL_TYPES:
        known = ", ".join(sorted(optimizer.MODEL_TYPES))
        raise files.BadInput(f"model type {model_type}: expected one of {known}")
    if num_heads and hidden_size % num_heads:
        raise files.BadInput(
            f"hidden size {hidden_size}: expected a multiple of the {num_heads} heads; give both"
        )
    class_ = optimizer.MODEL_TYPES[model_type][0]
    names = {node.name for node in onnx.load(path, load_external_data=False).graph.node}
    proto = error = None
    with quiet(), Watch(class_, names) as watch:
        try:
            made = optimizer.optimize_model(
                str(path), model_type, num_heads, hidden_size, options, opt_level
            )
            proto = made.model
        except Exception as raised:  # any: the code is not ours, and that it raised is the answer
            where = traceback.extract_tb(raised.__traceback__)[-1]
            error = f"{type(raised).__name__} ({raised}) at {PurePath(where.filename).name}"
            error += f":{where.lineno} ({where.line})"
        if save and proto:
            with files.writing(save) as draft:
                made.save_model_to_file(str(draft))
        gc.collect()  # the optimizer leaves temporary folders behind, with a warning
    if proto:  # the sites keep their graph, which needs no weights
        model = ir.from_proto(graph.without_weights(proto))
    else:
        model = graph.load(path, weights=False)
    sites = graph.sites(model)
    calls = {call.anchor.output: call for call in watch.calls if not call.fused}
    reasons: dict[object, Reason] = {}
    for site in sites:
        if site.fused:
            continue
        call = None if error else _anchored(site, calls)
        key = None if call is None else (call.fusion, call.line, tuple(call.none))
        reasons.setdefault(key, Reason([], call, error)).sites.append(site)
    for call in watch.calls:
        call.file = "notebook cell" if "ipykernel" in call.file else PurePath(call.file).name
    return Explanation(class_.__name__, sites, watch.calls, list(reasons.values()))
