"""Why a fusion did not match: run ONNX Runtime's optimizer on a model, and say what it missed.

The optimizer is that of the package, or a reader's own fusion in its place, unchanged; `watch`
records what its fusions ask for and `source` reads why they returned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import inspect
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import align, feeds, files, graph, source, wrong
from helpers.quiet import quiet
from helpers.reasons import Check, Explanation, Reason, Verdict
from helpers.watch import NORMALIZATIONS, Call, Watch

LEVELS = (0, 1, 2, 99)  # of `opt_level`: how far ONNX Runtime itself optimises first


def explain(
    path: str | Path,
    model_type: str | None = None,
    *,
    fusion: str | type | None = None,
    num_heads: int = 0,
    hidden_size: int = 0,
    opt_level: int | None = None,
    options: Any = None,
    save: str | Path | None = None,
    parity: bool = False,
    inputs: str | Path | None = None,
) -> Explanation:
    """Run ``onnxruntime.transformers.optimizer`` on the file at `path`, and say what it missed.

    `model_type` is a key of its MODEL_TYPES, or of one that was registered there; or `fusion` is a
    subclass of its `Fusion` (applied where BERT's attention fusion would be) or `OnnxModel`, as a
    class or "FILE.py:CLASS". `num_heads`, `hidden_size`, `opt_level` and `options` (FusionOptions)
    are passed on (0, and None: the optimizer's own choice). What it makes is written to `save`.
    What the optimizer's code raises becomes a reason.

    With `parity`, what it makes is compared with the file, on `inputs` (an .npz) or inferred ones,
    and sites that fused and compute something else are marked `wrong`.

    Raises `files.BadInput` on an unknown `model_type`, a `fusion` that is none, a hidden size that
    is no multiple of the heads, and inputs that do not fit or cannot be inferred.
    """
    if num_heads and hidden_size % num_heads:
        raise files.BadInput(
            f"hidden size {hidden_size}: expected a multiple of the {num_heads} heads; give both"
        )
    cases = None
    if parity:
        cases = feeds.load(inputs, path) if inputs else feeds.infer(path)
    before = onnx.load(path, load_external_data=False)
    in_functions = bool(before.functions)
    names, tensors = _names(before.graph)
    model = graph.inline(ir.from_proto(graph.without_weights(before)))
    del before
    with (
        _registered(model_type, fusion) as (name, class_, also),
        tempfile.TemporaryDirectory() as folder,
    ):
        watch = Watch([class_], names, tensors, _conclude, also)
        draft = Path(folder) / "optimised.onnx" if parity else None
        choice = (num_heads, hidden_size, options, opt_level)
        made = _optimised(path, name, watch, save, draft, *choice)
        sites = graph.sites(model)
        if isinstance(made, Reason):
            verdicts, reasons = _stopped(sites, made)
        else:
            verdicts, reasons = _verdicts(model, sites, made, watch, in_functions)
        answer = Explanation(class_.__name__, verdicts, reasons)
        if cases and not isinstance(made, Reason):
            answer.parity, found = wrong.find(path, draft, *cases)
            answer.parity.name = "what the optimizer makes"
            for site in found:
                if isinstance(site, str):  # it fused what is no attention
                    verdicts.append(Verdict(site, None, True, wrong=True))
                else:
                    verdicts[site].wrong = verdicts[site].fused
    for reason in reasons:
        _locate(reason, model)
    return answer


def _stopped(sites: list[graph.Site], reason: Reason) -> tuple[list[Verdict], list[Reason]]:
    """Nothing was made, for `reason`."""
    reason.sites = [i for i, site in enumerate(sites) if not site.fused]
    verdicts = [Verdict(s.name, s.layer, s.fused, reason=None if s.fused else 0) for s in sites]
    return verdicts, [reason] if reason.sites else []


def _names(inside: onnx.GraphProto) -> tuple[set[str], set[str]]:
    """The names of the nodes and of the tensors in a graph and in those inside of it."""
    names = {node.name for node in inside.node}
    tensors = {name for node in inside.node for name in node.output if name}
    tensors |= {one.name for one in (*inside.input, *inside.initializer)}
    for node in inside.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                more = _names(inner)
                names |= more[0]
                tensors |= more[1]
    return names - {""}, tensors


def _optimised(
    path: str | Path,
    name: str,
    watch: Watch,
    save: str | Path | None,
    draft: Path | None,
    *choice: Any,
) -> onnx.ModelProto | Reason:
    """What the optimizer makes, without its weights, or what it raised. It is written to `save`, if
    it can be run, and to `draft` even if not."""
    from onnxruntime.transformers import optimizer

    with quiet():
        ort.set_default_logger_severity(4)  # what the optimizer's own sessions would print
        try:
            with watch:
                made = optimizer.optimize_model(str(path), name, *choice)
        except Exception as error:  # any: the code is not ours, and that it raised is the answer
            return _raised(watch, error)
        finally:
            ort.set_default_logger_severity(2)  # the default
            gc.collect()  # the optimizer leaves temporary folders behind, with a warning
        weights = sum(len(one.raw_data) for one in made.model.graph.initializer)
        if save:
            with files.writing(save) as checked:
                made.save_model_to_file(str(checked), weights > files.ONE_FILE)
        if draft:
            made.save_model_to_file(str(draft), weights > files.ONE_FILE)
        return graph.without_weights(made.model)


def what_if(
    paths: Mapping[str, str | Path] | str | Path,
    model_type: str | None = None,
    *,
    opt_levels: Iterable[int] = LEVELS,
    **choice: Any,
) -> list[dict[str, Any]]:
    """`explain` each of `paths` (one, or by label: other routes, say) at each of `opt_levels`.

    Rows for a table: the file's label, level, sites, how many fused, whether the result is right
    (None: there is none, or nothing fused), and the causes of the sites left. `choice` is passed to
    `explain`.
    """
    named = paths if isinstance(paths, Mapping) else {Path(paths).name: paths}
    rows = []
    for label, path in named.items():
        for level in opt_levels:
            print(f"{label} at opt_level {level} …", file=sys.stderr)
            found = explain(path, model_type, opt_level=level, parity=True, **choice)
            fused = sum(site.fused for site in found.sites)
            rows.append(
                {
                    "file": label,
                    "opt_level": level,
                    "sites": len(found.sites),
                    "fused": fused,
                    "held": found.parity.held if found.parity else None,
                    "causes": ", ".join(dict.fromkeys(one.cause for one in found.reasons)),
                }
            )
    return rows


# ── Whose fusion ────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _registered(
    model_type: str | None, fusion: str | type | None
) -> Iterator[tuple[str, type, tuple[type, ...]]]:
    """The key of MODEL_TYPES to run, its class, and the fusions to watch besides those known."""
    from onnxruntime.transformers import optimizer

    types = optimizer.MODEL_TYPES
    if fusion is None:
        if model_type not in types:
            known = ", ".join(sorted(types))
            raise files.BadInput(f"model type {model_type}: expected one of {known}")
        yield model_type, types[model_type][0], ()
        return
    class_ = _loaded(fusion) if isinstance(fusion, str) else fusion
    bases = {base.__name__ for base in class_.__mro__[1:]}
    if "OnnxModel" in bases:
        optimizer_class, also = class_, ()
    elif "Fusion" in bases:
        optimizer_class, also = _in_bert(class_, types["bert"][0]), (class_,)
    else:
        raise files.BadInput(
            f"{fusion}: expected a subclass of onnxruntime.transformers' Fusion or OnnxModel,"
            f" found {class_.__name__} of {', '.join(sorted(bases)) or 'nothing'}; name another"
        )
    key = f"{class_.__name__} {id(class_)}"
    types[key] = (optimizer_class, "pytorch", types["bert"][2])
    try:
        yield key, optimizer_class, also
    finally:
        del types[key]


def _in_bert(fusion: type, bert: type) -> type:
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

    return type(fusion.__name__, (bert,), {"fuse_attention": fuse_attention})


def _loaded(named: str) -> type:
    """The class that "FILE.py:CLASS" names."""
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise files.BadInput(
            f"{named}: expected FILE.py:CLASS, found no file {file or named}; check the path"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise files.BadInput(f"{named}: expected FILE.py:CLASS, found no Python file; name one")
    module = importlib.util.module_from_spec(spec)
    import onnxruntime.transformers.optimizer  # noqa: F401  its folder is on sys.path from then on

    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the reader's own code
        raise files.BadInput(
            f"{path}: expected a module that can be imported, found {type(error).__name__}:"
            f" {error}; mend it"
        ) from None
    class_ = getattr(module, name, None)
    if not isinstance(class_, type):
        own = [key for key, one in vars(module).items() if inspect.isclass(one)]
        raise files.BadInput(
            f"{path}: expected a class {name}, found {', '.join(own) or 'none'}; name one of them"
        )
    return class_


# ── Why a call of `fuse` gave up ────────────────────────────────────────────────────────────────


def _conclude(watch: Watch, call: Call) -> Reason:
    """The reason that `call` gives for not having fused; asked for as soon as it has returned."""
    write = source.writer(call.made, watch.node)
    gave = source.gave_up(call.step, write)
    reason = Reason(
        type(call.fusion).__name__,
        "end" if gave.end else "path" if gave.broken else "check",
        "other_check",
        file=_file(call.step.code.co_filename),
        line=gave.line,
        source=gave.source,
        within=gave.within,
        anchor=call.anchor,
        none=gave.none,
    )
    if gave.broken:
        near = {id(one): align.nearest(one, call.made) for one in gave.broken}
        ranked = sorted(gave.broken, key=lambda one: align.rank(one, near[id(one)]))
        reason.attempt = ranked[0]
        reason.actual = align.path(near[id(ranked[0])])
        reason.cause = align.cause(ranked[0], near[id(ranked[0])], call.made)
        reason.attempt.found = align.unvisited(reason.attempt, call.attempts)
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
    found = {one.operator for one in reason.attempt.found} if reason.attempt else set()
    if watch.stopped and found & {"Cast", "Reshape"}:
        reason.cause = "shape_inference"  # which removes those that do nothing
    if reason.check and "num_heads" in reason.check.source:
        reason.message = "give the number of heads and the hidden size, if you have not"
    rest = [one for one in call.attempts if one.broke and one not in ranked]
    reason.attempts = [*ranked, *sorted(rest, key=lambda one: -len(one.matched))]
    return reason


_SHAPES = {"get_edge_shape", "compare_shape", "infer_runtime_shape", "get_shape", "get_add_qk_str"}
_CONSTANTS = {
    *("get_constant_value", "get_constant_input", "get_initializer", "find_constant_input"),
    *("has_constant_input", "is_constant_with_specified_dimension", "check_node_input_value"),
    *("check_node_attribute", "to_array", "get_node_attribute"),
}
_CONSUMERS = {"get_children", "is_safe_to_fuse_nodes", "find_graph_output"}


def _check_cause(gave: source.GaveUp, made: dict[str, onnx.NodeProto]) -> str:
    """The class of a check that said no, by what it asked for and about what."""
    tensors = [one for one in gave.values if isinstance(one, str)]
    lists = [one for one in gave.values if isinstance(one, list)]
    if gave.calls & _SHAPES or "shape_infer" in gave.test:
        known = [one for one in lists if one and not isinstance(one[0], onnx.NodeProto)]
        return "symbolic_dimension" if len(known) > 1 else "shape_inference"
    if gave.calls & _CONSTANTS:
        return "constant"
    if gave.calls & _CONSUMERS or any(name.startswith("children") for name in gave.operands):
        return "used_elsewhere"
    if len(set(tensors)) > 1:
        return "extra_node" if align.related(tensors, made) else "unsupported_form"
    if "op_type" in gave.test:
        return "other_operator"
    return "other_check"


def _raised(watch: Watch, error: Exception) -> Reason:
    """The reason that is an exception of the optimizer's own code."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [pair for pair in frames if PurePath(pair[0].f_code.co_filename).name != "fusion_base.py"]
    call = watch.calls[-1] if watch.calls and watch.calls[-1].raised else None
    frame, line = own[-1] if own else frames[-1]
    step = source.Step(frame.f_code, 0, line, dict(frame.f_locals), frame.f_globals)
    write = source.writer(call.made if call else {}, watch.node)
    reason = Reason(
        type(call.fusion).__name__ if call else None,
        "raised",
        "raised",
        file=_file(frame.f_code.co_filename),
        line=line,
        anchor=call.anchor if call else None,
        message=f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
    )
    reason.source, operands = source.statement(step, write)
    if watch.unfinished is not None:
        operands |= _dangling(watch)
    reason.check = Check(reason.source, operands)
    return reason


def _dangling(watch: Watch) -> dict[str, str]:
    """What is read in the unfinished graph and no longer computed there: used elsewhere, then."""
    proto = watch.unfinished.model.graph
    made = {name for node in proto.node for name in node.output}
    made |= {one.name for one in (*proto.input, *proto.initializer)} | {""}
    found = {}
    for node in proto.node:
        for name in node.input:
            if name not in made and len(found) < 8:
                found[f"{name}, no longer computed, is read by"] = watch.node(node).name
    return found


def _file(name: str) -> str:
    return "notebook cell" if "ipykernel" in name else PurePath(name).name


# ── Which call is about which site ──────────────────────────────────────────────────────────────


def _verdicts(
    model: ir.Model,
    sites: list[graph.Site],
    made: onnx.ModelProto,
    watch: Watch,
    in_functions: bool,
) -> tuple[list[Verdict], list[Reason]]:
    """What became of each of `sites`, of `model`, in the graph `made`."""
    reasons: dict[object, Reason] = {}
    verdicts = []
    places = _Places(watch, sites)
    fused, still = _became(model, sites, made)
    for number, site in enumerate(sites):
        verdict = Verdict(site.name, site.layer, number in fused)
        verdicts.append(verdict)
        if verdict.fused:
            continue
        reason = places.reason(site, in_functions) if number in still else _gone(made)
        reason = reasons.setdefault(_same(reason), reason)
        reason.sites.append(number)
        verdict.reason = list(reasons.values()).index(reason)
    return verdicts, list(reasons.values())


def _became(
    model: ir.Model, sites: list[graph.Site], made: onnx.ModelProto
) -> tuple[set[int], set[int]]:
    """Which of `sites` are one operator in the graph `made`, and which are still there unfused."""
    found = graph.sites(graph.inline(ir.from_proto(made)))
    left = {site.node.outputs[0].name for site in found if not site.fused}
    still = {i for i, s in enumerate(sites) if not s.fused and s.node.outputs[0].name in left}
    fused = set(range(len(sites))) - still
    if sum(site.fused for site in found) < len(fused):  # some are neither
        stand_for = {one for piece in wrong.pieces(model, made) for one in piece.sites}
        fused = {i for i in fused if i in stand_for or sites[i].fused}
    return fused, still


def _gone(made: onnx.ModelProto) -> Reason:
    """The reason of a site that the optimizer took away without putting anything in its place."""
    computed = {name for node in made.graph.node for name in node.output}
    outputs = [one.name for one in made.graph.output if one.name not in computed]
    message = "the optimizer took it out of the graph, and put no attention in its place"
    check = Check("the optimised graph", {"outputs that no node computes": ", ".join(outputs)})
    return Reason(None, "check", "other_check", check=check, message=message)


def _same(reason: Reason) -> object:
    """What two reasons have in common that are the same for several layers."""
    attempt = reason.attempt
    return (
        *(reason.fusion, reason.kind, reason.cause, reason.file, reason.line, reason.message),
        *(tuple(reason.within), tuple(reason.none), repr(reason.actual)),
        attempt and (*attempt.expected, len(attempt.matched), *(n.operator for n in attempt.found)),
        reason.earlier and _same(reason.earlier),
    )


class _Places:
    """Where the calls of `fuse` that gave up started, to be found from the sites."""

    def __init__(self, watch: Watch, sites: list[graph.Site]) -> None:
        self.watch = watch
        self.fusions = ", ".join(watch.anchors)
        self.anchors = {one for found in watch.anchors.values() for one in found}
        makes = self.anchors | ({"LayerNormalization"} if self.anchors & NORMALIZATIONS else set())
        self.calls: dict[str, list[Call]] = {}
        for call in watch.calls:
            early = call.fusion.fused_op_type in makes and _near(call)
            if not call.done and (watch.attends(call.fusion) or early):
                self.calls.setdefault(call.anchor.output, []).append(call)
        self.products = {node for s in sites for node in (s.node, s.scores, s.context) if node}

    def reason(self, site: graph.Site, in_functions: bool) -> Reason:
        own = {node for node in (site.node, site.scores, site.context) if node}
        touching = self._touching({value.name for node in own for value in node.outputs})
        call = self._downstream(site, own, touching) or touching
        if call and self.watch.attends(call.fusion):
            return call.reason
        starts = f"it starts from {' or '.join(sorted(self.anchors))}, and there is none after the"
        if call:  # of an earlier fusion, which should have made the anchor
            message = f"{starts} site: {call.reason.fusion} did not fire at {call.anchor.operator}"
            return dataclasses.replace(
                call.reason,
                fusion=self.fusions,
                cause="missing_anchor",
                message=f"{message} {call.anchor.name} ({call.reason.cause})",
                earlier=call.reason,
                sites=[],
            )
        if not self.anchors:
            message = "this optimizer has no fusion that makes an attention, or it is turned off"
        else:
            message = f"{starts} site"
        if in_functions:
            message += " (the optimizer does not look into the functions of a model)"
        after = ", ".join(f"{one.op_type} {graph.name(one)}" for one in self._after(site))
        operands = {
            **{f"{name}.search_op_types": str(found) for name, found in self.watch.anchors.items()},
            "after the site": after,
        }
        return Reason(
            self.fusions or None,
            "check",
            "missing_anchor",
            check=Check("search_op_types", operands),
            message=message,
        )

    def _after(self, site: graph.Site, number: int = 10) -> list[ir.Node]:
        """The first nodes after the product with the values, without those that make shapes."""
        queue, found = deque([site.context or site.node]), []
        while queue and len(found) < number:
            users = [user for value in queue.popleft().outputs for user in value.consumers()]
            new = [one for one in users if one not in found and one.op_type != "Shape"]
            found += new
            queue.extend(new)
        return found[:number]

    def _touching(self, names: set[str]) -> Call | None:
        """The call that came upon the site's own nodes and got furthest."""

        def touches(call: Call) -> bool:
            reached = (one.output for a in call.attempts for one in (a.start, *a.matched))
            return call.anchor.output in names or not names.isdisjoint(reached)

        calls = [c for calls in self.calls.values() for c in calls if self.watch.attends(c.fusion)]
        return max(filter(touches, calls), key=_progress, default=None)

    def _downstream(
        self, site: graph.Site, own: set[ir.Node], touching: Call | None
    ) -> Call | None:
        """The call that started from the first anchor after the site, before another site."""
        queue, seen = deque([site.node]), {site.node}
        while queue:
            node = queue.popleft()
            for value in node.outputs:
                calls = self.calls.get(value.name, [])
                attending = [call for call in calls if self.watch.attends(call.fusion)]
                if attending:
                    return max(attending, key=_progress) if touching not in calls else touching
                if calls and touching is None:
                    return calls[-1]
                for user in value.consumers():
                    if user not in seen and user not in self.products - own:
                        seen.add(user)
                        queue.append(user)
        return None


def _near(call: Call) -> bool:
    """Whether a call of a fusion of normalisations was about one: it starts from a good many nodes
    that have nothing to do with them."""
    return "Normalization" in call.anchor.operator or any(len(a.matched) > 2 for a in call.attempts)


def _progress(call: Call) -> tuple[int, int]:
    """How far a call got: the paths that it found, and the nodes on all of them."""
    attempts = call.attempts
    return sum(not one.broke for one in attempts), sum(len(one.matched) for one in attempts)


# ── Where it is in the file ─────────────────────────────────────────────────────────────────────


def _locate(reason: Reason, model: ir.Model) -> None:
    """Add where the node that is there came from in PyTorch, and its shape."""
    attempt = reason.attempt
    named = [*(attempt.found if attempt else ()), attempt.at if attempt else reason.anchor]
    for one in filter(None, named):
        with contextlib.suppress(KeyError):
            node = graph.find(model, one.name)
            reason.origin = reason.origin or graph.origin(node)
            value = node.outputs[0]
            if reason.shape is None and value.shape is not None:
                reason.shape = str(value.shape)
    if reason.earlier:
        _locate(reason.earlier, model)
