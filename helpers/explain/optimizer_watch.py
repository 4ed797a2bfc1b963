"""Watch ONNX Runtime's fusions at work, from outside: what each asked the graph for, how it ended.

Its fusions are Python: `fuse` starts from an anchor (a LayerNormalization, say), asks
``match_parent_path`` for one path after another, and returns at the first thing that it misses. A
trace function (`sys.settrace`) sees each call come and go while such a fusion is applied. No fusion
is changed or forked, and all is as before when the ``with`` block ends, however it does.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any

import onnx

from helpers import graph
from helpers.explain import method_watch, shape_inference
from helpers.explain import onnxruntime_parts as parts
from helpers.explain.calls import Step, is_generator
from helpers.explain.moment import Goal, Moment
from helpers.explain.reasons import Attempt, Node, Reason

# What fusions for attention start from, where it is made by another fusion.
NORMALIZATIONS = {
    *("LayerNormalization", "SimplifiedLayerNormalization"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
}


@dataclass
class Call:
    """One call of the `fuse` of the class `fusion` from `anchor`, or one turn of a method that is
    none's; `done` is whether it changed the graph. `attends` is whether it makes attentions, and
    `makes` the operator."""

    fusion: str
    makes: str
    attends: bool
    anchor: Node
    step: Step
    producers: dict[str, onnx.NodeProto] = field(repr=False, default_factory=dict)  # by output
    done: bool = False
    reason: Reason | None = None  # why not, where it did not change the graph
    raised: bool = False

    @property
    def attempts(self) -> list[Attempt]:
        attempts, steps = [], [self.step]
        while steps:
            step = steps.pop()
            attempts += [attempt for _, attempt in step.attempts]
            steps += step.inner
        return attempts


class FusionWatch:
    """In a ``with`` block, record each `fuse` of the fusions that make attentions or their anchors,
    and the turns of the optimizer's own methods that do.

    `optimizer` is the class whose matching of paths is watched, along its MRO, and `also` classes
    of fusions to watch besides (the package has two copies of ``OnnxModel``, by two names of
    import). `names` and `tensors` are those in the file, which has the attention `sites`.
    `conclude` is asked for the reason when a `fuse` has returned, since later fusions change what
    its variables refer to. `last` is the model as the fusion that was applied last has it,
    `stopped` the nodes at which the optimizer's own shape inference failed, if it did.
    """

    def __init__(
        self,
        optimizer: type,
        names: set[str],
        tensors: set[str],
        sites: list[graph.Site],
        conclude: Callable[[FusionWatch, Call], Reason],
        also: tuple[type, ...] = (),
    ) -> None:
        self.calls: list[Call] = []
        self.anchors: dict[str, list[str]] = {}  # of the fusions for attention, by their names
        self.last: onnx.ModelProto | None = None
        self.stopped: list[onnx.NodeProto] = []
        self.replaced: dict[str, list[onnx.NodeProto]] = {}  # by output of what a fusion made
        self._names, self._tensors, self._sites = names, tensors, sites
        self._conclude, self._also = conclude, also
        watched = parts.classes([optimizer, *also])
        self._patched = parts.wrapped(watched, self._traced, self._inferring)
        methods = parts.attention_methods(optimizer)
        self._methods = {method.code: method for method in filter(method_watch.can_follow, methods)}
        self.unwatched = [method for method in methods if method.code not in self._methods]
        for method in self._methods.values():
            self._patched.append((method.owner, method.name, self._traced_method))
        self._files: set[str] = set()  # of the code whose calls are recorded within `fuse`
        followers = (self._path_called, self._step_called, self._down_called)
        self._followers: dict[CodeType, Callable | None] = parts.matching(watched, *followers)
        self._open: list[tuple[FrameType, Step]] = []
        self._call: Call | None = None
        self._attempt: Attempt | None = None  # the path that is being matched
        self._moment: Moment | None = None  # of the fusion that is being applied

    def __enter__(self) -> FusionWatch:
        self._before = [(class_, name, vars(class_)[name]) for class_, name, _ in self._patched]
        for owner, name, patch in self._patched:
            setattr(owner, name, patch(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, before in self._before:
            setattr(owner, name, before)

    def _inferring(self, infer: Callable) -> Callable:
        @functools.wraps(infer)
        def inferring(model: Any, *args: Any, **kwargs: Any) -> Any:
            wanted, inferred = parts.infers_shapes(model), infer(model, *args, **kwargs)
            if wanted and inferred is None and not self.stopped:
                raised = not parts.infers_shapes(model)
                self.stopped = shape_inference.stopped_at(parts.inferred(model), raised)
            return inferred

        return inferring

    def _traced(self, apply: Callable) -> Callable:
        @functools.wraps(apply)
        def traced(fusion: Any) -> None:
            """Trace these fusions alone: under a trace, all the rest takes half as long again."""
            attends = self._attends(fusion)
            if attends:
                self.anchors[type(fusion).__name__] = parts.anchors(fusion)
            with self._tracing(fusion, attends or parts.makes(fusion) in NORMALIZATIONS):
                apply(fusion)

        return traced

    def _traced_method(self, method: Callable) -> Callable:
        @functools.wraps(method)
        def traced(optimizer: Any, *args: Any, **options: Any) -> Any:
            self.anchors[method.__qualname__] = self._methods[method.__code__].anchors
            with self._tracing(optimizer, True):
                return method(optimizer, *args, **options)

        return traced

    @contextlib.contextmanager
    def _tracing(self, fusion: Any, wanted: bool) -> Iterator[None]:
        """Trace what is called, if that is `wanted`, while `fusion` is at work on its model."""
        self.last = parts.model_of(fusion)
        self._moment = Moment(self.last, self._sites)
        before = sys.gettrace()
        if wanted:
            sys.settrace(self._called)
        try:
            yield
        except BaseException as error:
            codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
            if self.calls and self.calls[-1].step.code in codes:
                self.calls[-1].raised = True
            raise
        finally:
            sys.settrace(before)

    def _attends(self, fusion: Any) -> bool:
        """Whether `fusion` makes attention operators, or is one that was to be watched besides."""
        return "Attention" in parts.makes(fusion) or isinstance(fusion, self._also)

    def goal(self, call: Call, attempt: Attempt) -> Goal | None:
        """Where the path of an `attempt` of `call` should end, in the graph as it is now; None of
        a call that makes no attentions."""
        return self._moment.goal(attempt) if call.attends else None

    def node(self, proto: onnx.NodeProto) -> Node:
        """`proto` under the name that the file has for it."""
        name = proto.name
        if not name or name not in self._names:
            name = next(
                (tensor for tensor in proto.output if tensor in self._tensors), proto.output[0]
            )
        return Node(proto.op_type, name, proto.output[0])

    # ── The trace ───────────────────────────────────────────────────────────────────────────────

    def _called(self, frame: FrameType, _event: str, _: Any) -> Callable | None:
        code = frame.f_code  # f_locals is dear, and most calls are none of ours
        if self._call is None:
            if code in self._methods:
                return self._method_called(frame)
            return self._fuse_called(frame)
        if code not in self._followers:
            inner = code.co_filename in self._files or parts.is_of_fusions(code)
            named = not code.co_name.startswith("<") and not is_generator(code)
            self._followers[code] = self._inner_called if inner and named else None
        follower = self._followers[code]
        return follower(frame) if follower else None

    def _fuse_called(self, frame: FrameType) -> Callable | None:
        started = parts.started(frame)
        if started is None:
            return None
        fusion, anchor, producers = started
        kind = (type(fusion).__name__, parts.makes(fusion), self._attends(fusion))
        self._begin(frame, Call(*kind, self.node(anchor), _step(frame, 0), producers))
        before = parts.changes(fusion)

        def returned(frame: FrameType, value: Any) -> None:
            added, removed = parts.nodes_since(before, fusion)
            self.replaced.update((proto.output[0], removed) for proto in added)
            done = before != parts.changes(fusion)
            self._end(frame, frame.f_lineno, value, done)

        return self._watching(frame, returned)

    def _method_called(self, frame: FrameType) -> Callable:
        method, attentions = self._methods[frame.f_code], 0

        def begin(frame: FrameType, anchor: onnx.NodeProto) -> None:
            nonlocal attentions
            attentions = parts.attentions(self.last)
            kind = (f"{method.owner.__name__}.{method.name}", "Attention", True)
            producers = {name: node for node in self.last.graph.node for name in node.output}
            self._begin(frame, Call(*kind, self.node(anchor), _step(frame, 0), producers))

        def end(frame: FrameType, line: int, value: Any) -> None:
            self._end(frame, line, value, parts.attentions(self.last) > attentions)

        return method_watch.Turns(frame, begin, end)

    def _begin(self, frame: FrameType, call: Call) -> None:
        self._files = {frame.f_code.co_filename}
        self._call = call
        self.calls.append(call)
        self._open = [(frame, call.step)]

    def _end(self, frame: FrameType, line: int, value: Any, done: bool) -> None:
        """The call, or the turn, that is open has ended at `line`."""
        self._close(frame, line, value)
        call, self._call, self._attempt = self._call, None, None
        call.done = done
        if not done:
            try:
                call.reason = self._conclude(self, call)
            except Exception as error:  # raised here it would go on in the fusion's code
                call.reason = _unread(call, error)

    def _inner_called(self, frame: FrameType) -> Callable:
        caller, parent = self._open[-1]
        step = _step(frame, caller.f_lineno)
        parent.inner.append(step)
        self._open.append((frame, step))
        return self._watching(frame, self._inner_returned)

    def _inner_returned(self, frame: FrameType, value: Any) -> None:
        self._close(frame, frame.f_lineno, value)

    def _close(self, frame: FrameType, line: int, value: Any) -> None:
        step = self._open.pop()[1]
        step.line, step.local, step.value = line, dict(frame.f_locals), value

    def _path_called(self, frame: FrameType) -> Callable:
        self._attempt = self._asked(parts.asked_path(frame))
        return self._watching(frame, self._path_returned)

    def _path_returned(self, _frame: FrameType, _value: Any) -> None:
        self._attempt = None

    def _step_called(self, frame: FrameType) -> Callable:
        attempt = self._attempt
        if attempt is None:  # asked for by itself: a path of one step
            attempt = self._asked(parts.asked_step(frame))
        return self._watching(frame, functools.partial(self._step_returned, attempt))

    def _step_returned(self, attempt: Attempt, frame: FrameType, value: Any) -> None:
        if value is not None:
            attempt.matched.append(self.node(value))
            return
        above = parts.above(frame)
        if not self._call.producers:
            self._call.producers = above.producers
        attempt.found = [self.node(proto) for proto in above.nodes]

    def _down_called(self, frame: FrameType) -> Callable:
        attempt = self._asked(parts.asked_down(frame))
        attempt.down = True

        def returned(frame: FrameType, value: Any) -> None:
            attempt.matched = [self.node(proto) for proto in parts.matched_down(frame)]
            if value is None:
                attempt.found = [self.node(proto) for proto in parts.below(frame)][:2]

        return self._watching(frame, returned)

    def _asked(self, asked: parts.Asked) -> Attempt:
        caller, step = self._open[-1]
        attempt = Attempt(self.node(asked.start), asked.operators, asked.inputs)
        step.attempts.append((caller.f_lineno, attempt))
        return attempt

    @staticmethod
    def _watching(frame: FrameType, returned: Callable) -> Callable:
        frame.f_trace_lines = False

        def local(frame: FrameType, event: str, value: Any) -> Callable:
            if event == "return":
                returned(frame, value)
            return local

        return local


def _step(frame: FrameType, called_at: int) -> Step:
    return Step(frame.f_code, called_at, names=frame.f_globals)


def _unread(call: Call, error: Exception) -> Reason:
    file = PurePath(call.step.code.co_filename).name
    message = f"its code could not be followed: {type(error).__name__}: {error}"
    name, line = call.fusion, call.step.line
    return Reason(
        name, "check", "other_check", file=file, line=line, anchor=call.anchor, message=message
    )
