"""Why a fusion did not match: run ONNX Runtime's optimizer on a model, and say what it missed.

The optimizer is that of the package, or a reader's own fusion in its place, unchanged:
`optimizer_watch` records what its fusions ask for, and `conclusions` says why they returned.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx.external_data_helper import (
    load_external_data_for_model,
    load_external_data_for_tensor,
)

from helpers import files, graph, packages
from helpers.explain import chosen, head_sizes, places
from helpers.explain import onnxruntime_parts as parts
from helpers.explain.conclusions import conclude
from helpers.explain.optimizer_watch import FusionWatch
from helpers.explain.reasons import Reason
from helpers.explain.verdicts import Outcome, innermost, raised, stopped
from helpers.explain.words import ProtoWriter
from helpers.graph import external
from helpers.quiet import quiet

logger = logging.getLogger(__name__)


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
    tell_heads: bool = True,
) -> Outcome:
    """Run ``onnxruntime.transformers.optimizer`` on the file that is `opened`.

    `model_type` is a key of its MODEL_TYPES, or of one that was registered there; or `fusion` is a
    subclass of its `Fusion` (applied where BERT's attention fusion would be) or `OnnxModel`, as a
    class or "FILE.py:CLASS". `num_heads`, `hidden_size`, `opt_level` and `options` (FusionOptions)
    are passed on (0, and None: the optimizer's own choice); with `tell_heads`, that no heads were
    given, or others than the graph has, is logged. What it makes is written to `save`, and
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
        sites = graph.sites(model)
        watch = FusionWatch(class_, contents.nodes, contents.tensors, sites, conclude, also)
        if tell_heads:
            _tell_heads(sites, num_heads, hidden_size)
        choice = (num_heads, hidden_size, options, opt_level)
        optimised = _optimised(opened, key, watch, save, draft, *choice)
        after = optimised if isinstance(optimised, Reason) else _read(optimised)
        if isinstance(after, Reason):
            return stopped(class_.__name__, sites, after, model)
        outcome = places.outcome(
            class_.__name__, model, sites, optimised, after, watch, contents.has_functions
        )
        outcome.watched, outcome.later = watch.anchors, graph.later_operators(after)
        outcome.given = num_heads, hidden_size
        return outcome


def _tell_heads(sites: list[graph.Site], num_heads: int, hidden_size: int) -> None:
    """Log that no heads were given, or others than the graph has."""
    heads = next(filter(None, map(head_sizes.heads, sites)), None)
    number, width = heads or (0, 0)
    if not num_heads:
        has = f"; the graph has {head_sizes.options(heads)}" if heads else ""
        logger.info(f"no --num-heads was given, without which some fusions do nothing{has}")
    elif heads and (num_heads, hidden_size or number * width) != (number, number * width):
        has = head_sizes.options(heads)
        logger.info(f"--num-heads {num_heads} --hidden-size {hidden_size}: the graph has {has}")


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

    light = not save and not draft and files.size(opened) > files.ONE_FILE
    load = _without_large_weights if light else _following_links
    with quiet():
        try:
            with parts.silent_sessions(), parts.loading_by(load, zeros=light), watch:
                optimised = optimizer.optimize_model(str(opened.path), name, *choice)
        except ModuleNotFoundError as error:  # of a package that it needs, PyTorch
            otherwise = ", or take --opt-level 0 and no --what-if" if error.name == "torch" else ""
            raise packages.missing(error, opened.path, otherwise) from None
        except Exception as error:  # any: the code is not ours, and that it raised is the answer
            optimised = _raised(watch, error)
        if isinstance(optimised, Reason):
            gc.collect()  # it leaves a temporary folder behind, with a warning
            return optimised
        weights = sum(len(tensor.raw_data) for tensor in optimised.model.graph.initializer)
        large = weights > files.ONE_FILE
        if save:
            with files.writing(save) as checked:
                optimised.save_model_to_file(str(checked), large)
        if draft:
            optimised.save_model_to_file(str(draft), large)
        return graph.without_weights(optimised.model)


def _read(optimised: onnx.ModelProto) -> ir.Model | Reason:
    """What the optimizer made, its functions inlined; or why that is no graph, which it can be:
    of a decoder with ids of its own, some optimizers declare an input twice."""
    try:
        with quiet():  # onnx_ir warns of outputs that no node computes
            return graph.inline(ir.from_proto(optimised))
    except ir.serde.SerdeError as error:
        message = f"what it made is no valid graph: {files.told(innermost(error))}"
        return Reason(None, "raised", "raised", message=message)


def _following_links(path: str, with_data: bool) -> onnx.ModelProto:
    """The model at `path`, whose data files may be links, as in a hub's cache.

    onnx follows no link; those of `external.read` have been followed.
    """
    model, beside = external.read(path)
    if with_data:
        load_external_data_for_model(model, str(beside))
    return model


def _without_large_weights(path: str, with_data: bool) -> onnx.ModelProto:
    """The model at `path`, but for large weights, which stay in the files that they are in.

    Fusions need their shapes alone, and a model over 2 GB takes five times as much of memory.
    """
    model, beside = external.read(path)
    for tensor in external.tensors(model) if with_data else ():
        if ir.from_proto(tensor).nbytes <= graph.LEFT_OUT_ABOVE:
            load_external_data_for_tensor(tensor, str(beside))
            tensor.data_location = onnx.TensorProto.DEFAULT
    return model


def _raised(watch: FusionWatch, error: Exception) -> Reason:
    """The reason that is an exception of the optimizer's own code."""
    call = watch.calls[-1] if watch.calls and watch.calls[-1].raised else None
    writer = ProtoWriter(call.producers if call else {}, watch.node)
    reason = raised(error, call.fusion if call else None, writer)
    reason.anchor = call.anchor if call else None
    if watch.last is not None:
        reason.check.operands |= _dangling(watch)
    return reason


def _dangling(watch: FusionWatch) -> dict[str, str]:
    """What is read in the unfinished graph and no longer computed there: used elsewhere, then."""
    proto = watch.last.graph
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
