"""Why a fusion did not match: run ONNX Runtime's optimizer on a model, and say what it missed.

The optimizer is that of the package, or a reader's own fusion in its place, unchanged:
`optimizer_watch` records what its fusions ask for, and `slicing` reads why they returned.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import files, graph, packages
from helpers.explain import chosen, nearest, places, slicing
from helpers.explain.optimizer_watch import Call, FusionWatch
from helpers.explain.reasons import Check, Reason
from helpers.explain.verdicts import Outcome, raised, stopped
from helpers.explain.words import ProtoWriter
from helpers.quiet import quiet


def applied(
    opened: files.Opened,
    model_type: str | None,
    fusion: str | type | None,
    draft: Path | None,
    *,
    num_heads: int = 0,
    hidden_size: int = 0,
    opt_level: int | None = None,
    options: Any = None,
    save: str | Path | None = None,
) -> Outcome:
    """Run ``onnxruntime.transformers.optimizer`` on the file that is `opened`.

    `model_type` is a key of its MODEL_TYPES, or of one that was registered there; or `fusion` is a
    subclass of its `Fusion` (applied where BERT's attention fusion would be) or `OnnxModel`, as a
    class or "FILE.py:CLASS". `num_heads`, `hidden_size`, `opt_level` and `options` (FusionOptions)
    are passed on (0, and None: the optimizer's own choice). What it makes is written to `save`, and
    to `draft`. What the optimizer's code raises becomes a reason. Weights above 1.5 GB in all are
    not read, unless what it makes is asked for.

    Raises `files.BadInput` on an unknown `model_type`, a `fusion` that is none, a hidden size that
    is no multiple of the heads, and where a package is missing that the optimizer imports (PyTorch,
    above opt_level 0).
    """
    if num_heads and hidden_size % num_heads:
        raise files.BadInput(
            f"hidden size {hidden_size}: expected a multiple of the {num_heads} heads; give both"
        )
    contents = opened.contents
    model = contents.model.clone()  # whose shapes may be inferred
    with chosen.registered(model_type, fusion) as (key, class_, also):
        watch = FusionWatch([class_], contents.nodes, contents.tensors, _conclude, also)
        choice = (num_heads, hidden_size, options, opt_level)
        optimised = _optimised(opened, key, watch, save, draft, *choice)
        sites = graph.sites(model)
        if isinstance(optimised, Reason):
            return stopped(class_.__name__, sites, optimised, model)
        in_functions = contents.has_functions
        return places.outcome(class_.__name__, model, sites, optimised, watch, in_functions)


def _optimised(
    opened: files.Opened,
    name: str,
    watch: FusionWatch,
    save: str | Path | None,
    draft: Path | None,
    *choice: Any,
) -> onnx.ModelProto | Reason:
    """What the optimizer makes, without its weights, or what it raised. It is written to `save`, if
    it can be run, and to `draft` even if not."""
    from onnxruntime.transformers import optimizer

    with quiet():
        ort.set_default_logger_severity(4)  # what the optimizer's own sessions would print
        light = not save and not draft and files.size(opened) > files.ONE_FILE
        reading = chosen.without_large_weights if light else chosen.following_links
        try:
            with watch, reading():
                optimised = optimizer.optimize_model(str(opened.path), name, *choice)
        except ModuleNotFoundError as error:  # of a package that it needs, PyTorch
            light = ", or take --opt-level 0 and no --what-if" if error.name == "torch" else ""
            raise packages.missing(error, opened.path, light) from None
        except Exception as error:  # any: the code is not ours, and that it raised is the answer
            optimised = _raised(watch, error)
        finally:
            ort.set_default_logger_severity(2)  # the default; it cannot be read
        if isinstance(optimised, Reason):
            gc.collect()  # it leaves a temporary folder behind, with a warning
            return optimised
        weights = sum(len(tensor.raw_data) for tensor in optimised.model.graph.initializer)
        if save:
            with files.writing(save) as checked:
                optimised.save_model_to_file(str(checked), weights > files.ONE_FILE)
        if draft:
            optimised.save_model_to_file(str(draft), weights > files.ONE_FILE)
        return graph.without_weights(optimised.model)


# ── Why a call of `fuse` gave up ────────────────────────────────────────────────────────────────


def _conclude(watch: FusionWatch, call: Call) -> Reason:
    """The reason that `call` gives for not having fused; asked for as soon as it has returned."""
    write = ProtoWriter(call.made, watch.node).write
    gave = slicing.gave_up(call.step, write)
    reason = Reason(
        type(call.fusion).__name__,
        "end" if gave.end else "path" if gave.broken else "check",
        "other_check",
        file=slicing.file_of(call.step.code),
        line=gave.line,
        source=gave.source,
        within=gave.within,
        anchor=call.anchor,
        none=gave.none,
    )
    nearest_paths = {}
    if gave.broken:
        nearest_paths = {
            id(attempt): nearest.nearest(attempt, call.made) for attempt in gave.broken
        }
        ranked = sorted(
            gave.broken, key=lambda attempt: nearest.rank(attempt, nearest_paths[id(attempt)])
        )
        reason.attempt = ranked[0]
        reason.actual = nearest.path(nearest_paths[id(ranked[0])])
        reason.cause = nearest.cause(ranked[0], nearest_paths[id(ranked[0])], call.made)
        reason.attempt.found = nearest.unvisited(reason.attempt, call.attempts)
    else:
        ranked = []
        reason.cause = _check_cause(gave, call.made)
    if not gave.broken or gave.end:
        reason.check = Check(gave.test or gave.source, gave.operands)
    more = {}
    if reason.attempt and reason.attempt.at.output in watch.replaced:
        made_from = map(write, watch.replaced[reason.attempt.at.output])
        more[f"{reason.attempt.at.name} was made from"] = "; ".join(made_from)
    if watch.stopped:
        more["shape inference of the optimizer stopped at"] = "; ".join(map(write, watch.stopped))
    if more:
        reason.check = reason.check or Check(gave.test or gave.source, {})
        reason.check.operands |= more
    operators = {node.operator for node in reason.attempt.found} if reason.attempt else set()
    if (
        watch.stopped
        and operators & {"Cast", "Reshape"}
        and _only(nearest_paths[id(reason.attempt)])
    ):
        reason.cause = "shape_inference"  # which removes those that do nothing
    if reason.check and "num_heads" in reason.check.source:
        reason.message = "give the number of heads and the hidden size, if you have not"
    rest = [attempt for attempt in call.attempts if attempt.broke and attempt not in ranked]
    reason.attempts = [*ranked, *sorted(rest, key=lambda attempt: -len(attempt.matched))]
    return reason


def _only(near: nearest.Nearest | None) -> bool:
    """Whether a path needs one change alone."""
    return near is not None and near.cost < 2


_SHAPES = {"get_edge_shape", "compare_shape", "infer_runtime_shape", "get_shape", "get_add_qk_str"}
_CONSTANTS = {
    *("get_constant_value", "get_constant_input", "get_initializer", "find_constant_input"),
    *("has_constant_input", "is_constant_with_specified_dimension", "check_node_input_value"),
    *("check_node_attribute", "to_array", "get_node_attribute"),
}
_CONSUMERS = {"get_children", "is_safe_to_fuse_nodes", "find_graph_output"}


def _check_cause(gave: slicing.GaveUp, producers: dict[str, onnx.NodeProto]) -> str:
    """The class of a check that said no, by what it asked for and about what."""
    tensors = [value for value in gave.values if isinstance(value, str)]
    lists = [value for value in gave.values if isinstance(value, list)]
    if gave.calls & _SHAPES or "shape_infer" in gave.test:
        shapes = [
            values for values in lists if values and not isinstance(values[0], onnx.NodeProto)
        ]
        return "symbolic_dimension" if len(shapes) > 1 else "shape_inference"
    if gave.calls & _CONSTANTS:
        return "constant"
    if gave.calls & _CONSUMERS or any(name.startswith("children") for name in gave.operands):
        return "used_elsewhere"
    if len(set(tensors)) > 1:
        return "extra_node" if nearest.related(tensors, producers) else "unsupported_form"
    if "op_type" in gave.test:
        return "other_operator"
    return "other_check"


def _raised(watch: FusionWatch, error: Exception) -> Reason:
    """The reason that is an exception of the optimizer's own code."""
    call = watch.calls[-1] if watch.calls and watch.calls[-1].raised else None
    writer = ProtoWriter(call.made if call else {}, watch.node)
    reason = raised(error, type(call.fusion).__name__ if call else None, writer)
    reason.anchor = call.anchor if call else None
    if watch.unfinished is not None:
        reason.check.operands |= _dangling(watch)
    return reason


def _dangling(watch: FusionWatch) -> dict[str, str]:
    """What is read in the unfinished graph and no longer computed there: used elsewhere, then."""
    proto = watch.unfinished.model.graph
    computed = {name for node in proto.node for name in node.output}
    computed |= {value.name for value in (*proto.input, *proto.initializer)} | {""}
    dangling = {}
    for node in proto.node:
        for name in node.input:
            if name not in computed and len(dangling) < 8:
                dangling[f"{name}, no longer computed, is read by"] = watch.node(node).name
    return dangling


# ── Where it is in the file ─────────────────────────────────────────────────────────────────────


def locate(reason: Reason, model: ir.Model) -> None:
    """Add where the node that is there came from in PyTorch, and its shape."""
    attempt = reason.attempt
    named = [*(attempt.found if attempt else ()), attempt.at if attempt else reason.anchor]
    for node_named in filter(None, named):
        with contextlib.suppress(KeyError):
            node = graph.find(model, node_named.name)
            reason.origin = reason.origin or graph.origin(node)
            value = node.outputs[0]
            if reason.shape is None and value.shape is not None:
                reason.shape = str(value.shape)
    if reason.earlier:
        locate(reason.earlier, model)
