"""Watch ONNX Runtime's fusions at work, from outside: what each asked the graph for, how it ended.

Its fusions are Python: `fuse` starts from an anchor (a LayerNormalization, say), asks
``match_parent_path`` for one path after another, and returns at the first thing that it misses. A
trace function (`sys.settrace`) sees each call come and go while such a fusion is applied. No fusion
is changed or forked, and all is as before when the ``with`` block ends, however it does.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any

import onnx

from helpers.explain.calls import Step
from helpers.explain.reasons import Attempt, Node, Reason

# What fusions for attention start from, where it is made by another fusion.
NORMALIZATIONS = {
    *("LayerNormalization", "SimplifiedLayerNormalization"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
}

_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


@dataclass
class Call:
    """One call of the `fuse` of `fusion` from `anchor`; `done` is whether it changed the graph."""

    fusion: Any
    anchor: Node
    step: Step
    made: dict[str, onnx.NodeProto] = field(repr=False, default_factory=dict)  # by output
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
    """In a ``with`` block, record each `fuse` of the fusions that make attentions or their anchors.

    `bases` are classes whose ``match_parent_path`` is watched, along their MRO, and whose `apply`
    is, if they are fusions (the package has two copies of ``OnnxModel``, by two names of import).
    `names` and `tensors` are those in the file; `also` are classes of fusions to watch besides.
    `conclude` is asked for the reason when a `fuse` has returned, since later fusions change what
    its variables refer to. `unfinished` is the model of the last fusion that was applied, `stopped`
    the nodes at which the optimizer's own shape inference failed, if it did.
    """

    def __init__(
        self,
        bases: Iterable[type],
        names: set[str],
        tensors: set[str],
        conclude: Callable[[FusionWatch, Call], Reason],
        also: tuple[type, ...] = (),
    ) -> None:
        self.calls: list[Call] = []
        self.anchors: dict[str, list[str]] = {}  # of the fusions for attention, by their classes
        self.unfinished: Any = None
        self.stopped: list[onnx.NodeProto] = []
        self.replaced: dict[str, list[onnx.NodeProto]] = {}  # by output of what a fusion made
        self._names, self._tensors, self._conclude, self.also = names, tensors, conclude, also
        mro = [class_ for base in (*bases, *also) for class_ in base.__mro__]
        mro += [
            sys.modules[module].__dict__[name]
            for prefix in ("", "onnxruntime.transformers.")
            for module, name in (
                (f"{prefix}onnx_model", "OnnxModel"),
                (f"{prefix}fusion_base", "Fusion"),
            )
            if module in sys.modules
        ]
        own = {class_: vars(class_) for class_ in mro}
        self._path = _codes("match_parent_path", own.values())
        self._step = _codes("match_parent", own.values())
        self._down = _codes("match_child_path", own.values())
        self._patched = [
            (class_, name, patch)
            for name, patch in (("apply", self._traced), ("infer_runtime_shape", self._inferring))
            for class_, v in own.items()
            if name in v
        ]
        self._files: set[str] = set()  # of the code whose calls are recorded within `fuse`
        self._kinds: dict[CodeType, Callable | None] = {}
        self._open: list[tuple[FrameType, Step]] = []
        self._call: Call | None = None
        self._attempt: Attempt | None = None  # the path that is being matched

    def __enter__(self) -> FusionWatch:
        self._before = [(class_, name, getattr(class_, name)) for class_, name, _ in self._patched]
        for owner, name, patch in self._patched:
            setattr(owner, name, patch(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, before in self._before:
            setattr(owner, name, before)

    def _inferring(self, infer: Callable) -> Callable:
        @functools.wraps(infer)
        def inferring(model: Any, *args: Any, **kwargs: Any) -> Any:
            wanted, inferred = model.enable_shape_infer, infer(model, *args, **kwargs)
            if wanted and inferred is None and not self.stopped:
                raised = not model.enable_shape_infer  # which it then turns off
                self.stopped = _incomplete(model.shape_infer_helper, raised)
            return inferred

        return inferring

    def _traced(self, apply: Callable) -> Callable:
        @functools.wraps(apply)
        def traced(fusion: Any) -> None:
            """Trace these fusions alone: under a trace, all the rest takes half as long again."""
            self.unfinished = fusion.model
            before = sys.gettrace()
            if self.attends(fusion):
                self.anchors[type(fusion).__name__] = list(fusion.search_op_types)
            if self.attends(fusion) or fusion.fused_op_type in NORMALIZATIONS:
                sys.settrace(self._called)
            try:
                apply(fusion)
            except BaseException as error:
                codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
                if self.calls and self.calls[-1].step.code in codes:
                    self.calls[-1].raised = True
                raise
            finally:
                sys.settrace(before)

        return traced

    def attends(self, fusion: Any) -> bool:
        """Whether `fusion` makes attention operators, or is one that was to be watched besides."""
        return "Attention" in fusion.fused_op_type or isinstance(fusion, self.also)

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
        if code.co_name == "fuse" and self._call is None:
            return self._fuse_called(frame)
        if self._call is None:
            return None
        if code not in self._kinds:
            inner = code.co_filename in self._files or (
                PurePath(code.co_filename).name.startswith("fusion_")
                and not PurePath(code.co_filename).name.startswith("fusion_utils")
            )
            self._kinds[code] = (
                self._path_called
                if code in self._path
                else self._step_called
                if code in self._step
                else self._down_called
                if code in self._down
                else self._inner_called
                if inner and not code.co_name.startswith("<")
                else None
            )
        kind = self._kinds[code]
        return kind(frame) if kind else None

    def _fuse_called(self, frame: FrameType) -> Callable | None:
        local, names = frame.f_locals, frame.f_code.co_varnames
        fusion, proto = local.get("self"), local.get(names[1]) if len(names) > 1 else None
        if not isinstance(proto, onnx.NodeProto) or not hasattr(fusion, "nodes_to_add"):
            return None
        self._files = {frame.f_code.co_filename}
        step = Step(frame.f_code, 0, names=frame.f_globals)
        producers = next((v for v in local.values() if _by_output(v, proto)), {})
        self._call = Call(fusion, self.node(proto), step, producers)
        self.calls.append(self._call)
        before = len(fusion.nodes_to_add), len(fusion.nodes_to_remove)
        self._open = [(frame, step)]

        def returned(frame: FrameType, value: Any) -> None:
            self._inner_returned(frame, value)
            call, self._call, self._attempt = self._call, None, None
            call.done = before != (len(fusion.nodes_to_add), len(fusion.nodes_to_remove))
            for added in fusion.nodes_to_add[before[0] :]:
                self.replaced[added.output[0]] = fusion.nodes_to_remove[before[1] :]
            if not call.done:
                try:
                    call.reason = self._conclude(self, call)
                except Exception as error:  # raised here it would go on in the fusion's code
                    call.reason = _unread(call, error)

        return self._watching(frame, returned)

    def _inner_called(self, frame: FrameType) -> Callable:
        caller, parent = self._open[-1]
        step = Step(frame.f_code, caller.f_lineno, names=frame.f_globals)
        parent.inner.append(step)
        self._open.append((frame, step))
        return self._watching(frame, self._inner_returned)

    def _inner_returned(self, frame: FrameType, value: Any) -> None:
        step = self._open.pop()[1]
        step.line, step.local, step.value = frame.f_lineno, dict(frame.f_locals), value

    def _path_called(self, frame: FrameType) -> Callable:
        local = frame.f_locals
        inputs, wanted = local["parent_input_index"], list(local["parent_op_types"])
        inputs = [None] * len(wanted) if inputs is None else list(inputs)
        self._attempt = self._start(frame, wanted, inputs)
        return self._watching(frame, self._path_returned)

    def _path_returned(self, _frame: FrameType, _value: Any) -> None:
        self._attempt = None

    def _step_called(self, frame: FrameType) -> Callable:
        local, attempt = frame.f_locals, self._attempt
        if attempt is None:  # asked for by itself: a path of one step
            attempt = self._start(frame, [local["parent_op_type"]], [local["input_index"]])
        return self._watching(frame, functools.partial(self._step_returned, attempt))

    def _step_returned(self, attempt: Attempt, frame: FrameType, value: Any) -> None:
        if value is not None:
            attempt.matched.append(self.node(value))
            return
        local = frame.f_locals
        node, index = local["node"], local["input_index"]
        producers = local["output_name_to_node"] or local["self"].output_name_to_node()
        if not self._call.made:
            self._call.made = producers
        names = node.input if index is None else node.input[index : index + 1]
        attempt.found = [self.node(producers[name]) for name in names if name in producers]

    def _down_called(self, frame: FrameType) -> Callable:
        local = frame.f_locals
        wanted, edges = list(local["child_op_types"]), local["edges"]
        inputs = [None] * len(wanted) if edges is None else [index for _, index in edges]
        attempt = self._start(frame, wanted, inputs)
        attempt.down = True

        def returned(frame: FrameType, value: Any) -> None:
            local = frame.f_locals
            attempt.matched = [self.node(proto) for proto in local.get("matched_children", ())]
            if value is None:
                attempt.found = [self.node(proto) for proto in local.get("children_nodes", ())][:2]

        return self._watching(frame, returned)

    def _start(self, frame: FrameType, wanted: list[str], inputs: list[int | None]) -> Attempt:
        caller, step = self._open[-1]
        attempt = Attempt(self.node(frame.f_locals["node"]), wanted, inputs)
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


def _incomplete(inference: Any, raised: bool) -> list[onnx.NodeProto]:
    """The node at which SymbolicShapeInference stopped (it goes through them in their order), or,
    where it raised, that and the one after it, since either may be at fault; and before them the
    nodes by which it lost the values of a shape that these read."""
    known, model = getattr(inference, "known_vi_", {}), getattr(inference, "out_mp_", None)
    nodes, last = model.graph.node if model else (), []
    for proto in nodes:
        if any(name and name not in known for name in proto.output):
            last = [*last, proto] if raised else last
            break
        last = [proto]
    producers = {name: node for node in nodes for name in node.output}
    values, lost = getattr(inference, "sympy_data_", {}), []
    queue, seen = [name for node in last for name in node.input], set()
    while queue:
        name = queue.pop()
        of_integers = name in known and known[name].type.tensor_type.elem_type in _INTEGERS
        if name in seen or name in values or name not in producers or not of_integers:
            continue
        seen.add(name)
        missing = [
            tensor
            for tensor in producers[name].input
            if tensor in producers and tensor not in values
        ]
        lost += [] if missing else [producers[name]]
        queue += missing
    return [*lost, *last]


def _unread(call: Call, error: Exception) -> Reason:
    file = PurePath(call.step.code.co_filename).name
    message = f"its code could not be followed: {type(error).__name__}: {error}"
    name, line = type(call.fusion).__name__, call.step.line
    return Reason(
        name, "check", "other_check", file=file, line=line, anchor=call.anchor, message=message
    )


def _codes(name: str, classes: Iterable[Mapping[str, Any]]) -> set[CodeType]:
    return {class_[name].__code__ for class_ in classes if hasattr(class_.get(name), "__code__")}


def _by_output(value: Any, proto: onnx.NodeProto) -> bool:
    return isinstance(value, dict) and value.get(proto.output[0]) is proto
