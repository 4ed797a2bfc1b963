"""The private parts of ``onnxruntime.transformers`` that we rely on, all of them, here alone.

`tests/test_private_parts.py` names each, so that an upgrade of ONNX Runtime fails there. Its
optimizer is imported when a function needs it: from then on its folder is on `sys.path`.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from helpers import graph
from helpers.explain.calls import syntax
from helpers.graph import walks

# The methods by which a fusion asks a graph for paths.
MATCHING = {
    *("match_parent", "match_parent_path", "match_parent_paths", "match_parent_paths_all"),
    *("match_child_path",),
}

# The file whose code applies a fusion to all nodes that it starts from.
APPLYING = "fusion_base.py"

# Its functions by what they ask of a graph: shapes, constants, who reads a tensor.
ASK_SHAPES = {
    *("get_edge_shape", "compare_shape", "infer_runtime_shape", "get_shape", "get_add_qk_str"),
}
ASK_CONSTANTS = {
    *("get_constant_value", "get_constant_input", "get_initializer", "find_constant_input"),
    *("has_constant_input", "is_constant_with_specified_dimension", "check_node_input_value"),
    *("check_node_attribute", "to_array", "get_node_attribute"),
}
ASK_READERS = {"get_children", "is_safe_to_fuse_nodes", "find_graph_output"}


# ── The optimizer ───────────────────────────────────────────────────────────────────────────────


def on_path() -> None:
    """Put the optimizer's folder on `sys.path`: fusions import its modules by their bare names."""
    import onnxruntime.transformers.optimizer  # noqa: F401


def optimizers() -> dict[str, type]:
    """The classes of its optimizers, by model type."""
    from onnxruntime.transformers import optimizer

    return {model_type: class_ for model_type, (class_, *_) in optimizer.MODEL_TYPES.items()}


@contextlib.contextmanager
def registered(class_: type) -> Iterator[str]:
    """The model type under which `class_` is one of its optimizers, with BERT's default level."""
    from onnxruntime.transformers import optimizer

    model_type = f"{class_.__name__} {id(class_)}"
    optimizer.MODEL_TYPES[model_type] = (class_, "pytorch", optimizer.MODEL_TYPES["bert"][2])
    try:
        yield model_type
    finally:
        del optimizer.MODEL_TYPES[model_type]


def is_optimizer(class_: Any) -> bool:
    """Whether `class_` is a subclass of its OnnxModel."""
    return "OnnxModel" in _bases(class_)


def is_fusion(class_: Any) -> bool:
    """Whether `class_` is a subclass of its Fusion."""
    return "Fusion" in _bases(class_)


def _bases(class_: Any) -> set[str]:
    """The names of the base classes: each of its modules may be there twice, by two names."""
    return {base.__name__ for base in getattr(class_, "__mro__", ())[1:]}


def in_bert(fusion: type) -> type:
    """BERT's optimizer with `fusion` in the place of its attention fusion."""

    def fuse_attention(self: Any) -> None:
        given = {
            "model": self,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "attention_mask": self.attention_mask,
        }
        wanted = inspect.signature(fusion).parameters
        fusion(**{name: value for name, value in given.items() if name in wanted}).apply()

    return type(fusion.__name__, (optimizers()["bert"],), {"fuse_attention": fuse_attention})


@contextlib.contextmanager
def silent_sessions() -> Iterator[None]:
    """Nothing is printed by the sessions that the optimizer makes."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # the default; what it was cannot be read


@contextlib.contextmanager
def loading_by(
    load: Callable[[str, bool], onnx.ModelProto], *, zeros: bool = False
) -> Iterator[None]:
    """The optimizer reads a file by `load`, which is given its path, and whether with its data.

    With `zeros`, it is given zeros for what is still in another file when it reads an array, as its
    own ``NumpyHelper`` does on request.
    """
    from onnxruntime.transformers import optimizer

    load_before, to_array = optimizer.load_model, numpy_helper.to_array

    def load_model(path: str, *_: Any, **options: Any) -> onnx.ModelProto:
        return load(path, options.get("load_external_data", True))

    def array_or_zeros(tensor: onnx.TensorProto, *args: Any, **options: Any) -> np.ndarray:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return np.zeros(tensor.dims, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        return to_array(tensor, *args, **options)

    optimizer.load_model = load_model
    if zeros:
        numpy_helper.to_array = array_or_zeros
    try:
        yield
    finally:
        optimizer.load_model, numpy_helper.to_array = load_before, to_array


# ── Its fusions ─────────────────────────────────────────────────────────────────────────────────


def is_of_fusions(code: CodeType) -> bool:
    """Whether `code` is of a module of fusions, and not of what they all use."""
    file = PurePath(code.co_filename).name
    return file.startswith("fusion_") and not file.startswith("fusion_utils")


def makes(fusion: Any) -> str:
    """The operator that `fusion` makes."""
    return fusion.fused_op_type


def anchors(fusion: Any) -> list[str]:
    """The operators that `fusion` starts from."""
    return list(fusion.search_op_types)


def model_of(fusion: Any) -> onnx.ModelProto:
    """The model that `fusion`, or a method of the optimizer `fusion`, is at work on."""
    model = fusion.model
    return model if isinstance(model, onnx.ModelProto) else model.model


class Changes(NamedTuple):
    """How many nodes a fusion is going to add to the graph, and to remove."""

    added: int
    removed: int


def changes(fusion: Any) -> Changes:
    """Those that `fusion` has asked for so far."""
    return Changes(len(fusion.nodes_to_add), len(fusion.nodes_to_remove))


def nodes_since(before: Changes, fusion: Any) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that `fusion` is going to add and to remove besides those of `before`."""
    return fusion.nodes_to_add[before.added :], fusion.nodes_to_remove[before.removed :]


class Started(NamedTuple):
    """A call of the method `fuse` of `fusion`, from the node `anchor`; the nodes by output."""

    fusion: Any
    anchor: onnx.NodeProto
    producers: dict[str, onnx.NodeProto]


def started(frame: FrameType) -> Started | None:
    """What `fuse` was called for; None of a function of that name that is no fusion's.

    A reader's own `fuse` may name its arguments otherwise: their order and types tell.
    """
    if frame.f_code.co_name != "fuse":
        return None
    local, names = frame.f_locals, frame.f_code.co_varnames
    fusion, anchor = local.get("self"), local.get(names[1]) if len(names) > 1 else None
    if not isinstance(anchor, onnx.NodeProto) or not hasattr(fusion, "nodes_to_add"):
        return None
    producers = (
        value
        for value in local.values()
        if isinstance(value, dict) and value.get(anchor.output[0]) is anchor
    )
    return Started(fusion, anchor, next(producers, {}))


# ── What they ask of a graph ────────────────────────────────────────────────────────────────────


def classes(bases: Iterable[type]) -> list[type]:
    """`bases` and all that they derive from, and the optimizer's own, by both names of import."""
    derived = [class_ for base in bases for class_ in base.__mro__]
    own = [
        getattr(sys.modules[f"{prefix}{module}"], name)
        for prefix in ("", "onnxruntime.transformers.")
        for module, name in (("onnx_model", "OnnxModel"), ("fusion_base", "Fusion"))
        if f"{prefix}{module}" in sys.modules
    ]
    return list(dict.fromkeys([*derived, *own]))


def wrapped(
    classes: Iterable[type], apply: Callable, infer: Callable
) -> list[tuple[type, str, Callable]]:
    """The methods to wrap, by class and name, and what each of them is wrapped in."""
    wrappers = {"apply": apply, "infer_runtime_shape": infer}
    return [
        (class_, name, wrapper)
        for name, wrapper in wrappers.items()
        for class_ in classes
        if name in vars(class_)
    ]


def matching(
    classes: Iterable[type], path: Callable, step: Callable, down: Callable
) -> dict[CodeType, Callable]:
    """What follows the code of each method that matches a path, a step of it, or a path down."""
    methods = {"match_parent_path": path, "match_parent": step, "match_child_path": down}
    return {
        vars(class_)[name].__code__: follower
        for name, follower in methods.items()
        for class_ in classes
        if hasattr(vars(class_).get(name), "__code__")
    }


class Method(NamedTuple):
    """A method of the optimizer `owner` that makes attentions itself; `matches` is whether it asks
    for paths, by which it can be followed. `anchors` are the operators that it starts from."""

    owner: type
    name: str
    code: CodeType
    matches: bool

    @property
    def anchors(self) -> list[str]:
        """The operators in calls of ``get_nodes_by_op_type``."""
        calls = [node for node in ast.walk(syntax(self.code)) if isinstance(node, ast.Call)]
        return [
            call.args[0].value
            for call in calls
            if getattr(call.func, "attr", "") == "get_nodes_by_op_type"
            and call.args
            and isinstance(call.args[0], ast.Constant)
        ]


def attention_methods(optimizer: type) -> list[Method]:
    """The methods of the class `optimizer` that make attentions: the innermost, of those that call
    one another.

    Whether one `matches` paths is told by the functions that it calls, and these in turn.
    """
    members: dict[str, tuple[type, CodeType]] = {}
    for class_ in reversed(optimizer.__mro__):
        if class_.__name__ != "OnnxModel":
            codes = {name: getattr(value, "__code__", None) for name, value in vars(class_).items()}
            members |= {name: (class_, code) for name, code in codes.items() if code}

    def called(name: str) -> list[str]:
        return [other for other in members[name][1].co_names if other in members]

    def codes(name: str) -> list[CodeType]:
        return [members[other][1] for other in walks.walk([name], called)]

    making = {name for name in members if any(map(_makes_attention, codes(name)))}
    innermost = [name for name in making if making.isdisjoint({*called(name)} - {name})]
    return [
        Method(
            *(members[name][0], name, members[name][1]),
            any(not MATCHING.isdisjoint(code.co_names) for code in codes(name)),
        )
        for name in sorted(innermost)
    ]


def _makes_attention(code: CodeType) -> bool:
    """Whether a method calls a function to create an attention, or ``make_node("Attention", …)``;
    not one that names attentions besides, to change those that are there."""
    if any(name.startswith("create_") and "attention" in name for name in code.co_names):
        return True
    operators = {operator for _, operator in graph.FUSED}
    nodes = list(ast.walk(syntax(code)))
    named = {node for node in nodes if isinstance(node, ast.Constant) and node.value in operators}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    made = {call.args[0] for call in calls if getattr(call.func, "attr", "") == "make_node"}
    return bool(named) and named <= made


def attentions(model: onnx.ModelProto) -> int:
    """How many attentions there are in `model`, as one operator."""
    return sum((node.domain, node.op_type) in graph.FUSED for node in model.graph.node)


class Asked(NamedTuple):
    """A path from the node `start`: the operators wanted, and by which inputs (None: any)."""

    start: onnx.NodeProto
    operators: list[str]
    inputs: list[int | None]


def asked_path(frame: FrameType) -> Asked:
    """What ``match_parent_path`` was called for."""
    local = frame.f_locals
    operators, inputs = list(local["parent_op_types"]), local["parent_input_index"]
    return Asked(local["node"], operators, _any_or(inputs, operators))


def asked_step(frame: FrameType) -> Asked:
    """What ``match_parent`` was called for: a path of one step."""
    local = frame.f_locals
    return Asked(local["node"], [local["parent_op_type"]], [local["input_index"]])


def asked_down(frame: FrameType) -> Asked:
    """What ``match_child_path`` was called for; the inputs are those of the nodes wanted."""
    local = frame.f_locals
    operators, edges = list(local["child_op_types"]), local["edges"]
    inputs = None if edges is None else [index for _, index in edges]
    return Asked(local["node"], operators, _any_or(inputs, operators))


def _any_or(inputs: Sequence[int | None] | None, operators: list[str]) -> list[int | None]:
    return [None] * len(operators) if inputs is None else list(inputs)


class Above(NamedTuple):
    """The `nodes` that compute inputs of a node, and all nodes of the graph by output."""

    nodes: list[onnx.NodeProto]
    producers: dict[str, onnx.NodeProto]


def above(frame: FrameType) -> Above:
    """What ``match_parent`` had to choose from."""
    local = frame.f_locals
    node, index = local["node"], local["input_index"]
    producers = local["output_name_to_node"] or local["self"].output_name_to_node()
    names = node.input if index is None else node.input[index : index + 1]
    return Above([producers[name] for name in names if name in producers], producers)


def matched_down(frame: FrameType) -> list[onnx.NodeProto]:
    """The nodes that ``match_child_path`` has matched."""
    return frame.f_locals.get("matched_children", ())


def below(frame: FrameType) -> list[onnx.NodeProto]:
    """What ``match_child_path`` had to choose from at its last step."""
    return frame.f_locals.get("children_nodes", ())


# ── Its shape inference ─────────────────────────────────────────────────────────────────────────


class Inferred(NamedTuple):
    """What symbolic shape inference has: nodes in its order, and the types of tensors and the
    values of shapes that it has inferred."""

    nodes: Sequence[onnx.NodeProto]
    types: Mapping[str, onnx.ValueInfoProto]
    values: Mapping[str, Any]


def infers_shapes(model: Any) -> bool:
    """Whether its OnnxModel `model` infers shapes; it turns that off where it raises."""
    return model.enable_shape_infer


def inferred(model: Any) -> Inferred:
    """What the shape inference of its OnnxModel `model` has so far."""
    inference = model.shape_infer_helper
    proto = getattr(inference, "out_mp_", None)
    return Inferred(
        proto.graph.node if proto else (),
        getattr(inference, "known_vi_", {}),
        getattr(inference, "sympy_data_", {}),
    )
