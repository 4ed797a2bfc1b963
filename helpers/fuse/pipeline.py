"""Fuse every attention site of an ONNX model, right or not at all.

The graph is brought to opset 23, each site is lifted into one operator (`helpers.fuse`), and
the result is compared with the file that it came from. Where they differ, nothing is written, and
the step at fault is found by bisection.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes
from onnxscript import optimizer, version_converter

from helpers import feeds, files, generate, graph, parity
from helpers.fuse import (
    attention,
    caches,
    gelu,
    grouped_heads,
    guards,
    heads,
    in_place,
    multi_head,
    normalization,
    openvino,
    outputs,
    quantized,
    residual,
)
from helpers.graph import external, repairs
from helpers.quiet import quiet

logger = logging.getLogger(__name__)

OPSET = 23  # the first with Attention
FUSING = ("portable", "cpu")  # the targets in which every site is one operator
TARGETS = (*FUSING, "openvino")
CACHES = ("growing", "in-place")
STEPS = 8  # behind a prompt, for caches in place
IN_PLACE = "caches, kept in place"  # what is at fault where these steps differ


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the result is to be: for which `target`, how its `cache` is kept, in buffers of how many
    positions (None: as a user gives them), and which outputs are left out."""

    target: str = "portable"
    cache: str = "growing"
    capacity: int | None = None
    drop_unchanged: bool = False
    last_logits: bool = False


@dataclasses.dataclass
class Fused:
    """What `fuse` did: sites and how many of them are fused, the operators that fuse them, and how
    the result compares. `left` and `repaired` have a line for each site, or node; `not_portable`,
    for target `portable`, one for each operator outside the standard that the input had and the
    file still has; `handed_back`, for `openvino`, one for each that its plugin hands back to ONNX
    Runtime. `at_fault` names the step from which on parity did not hold, or says that the file
    does not load; there is no file then."""

    path: Path
    sites: int
    fused: int
    operators: dict[str, int]
    left: list[str]
    repaired: list[str]
    not_portable: list[str]
    handed_back: list[str]
    parity: parity.Candidate
    inputs: str
    at_fault: str | None = None

    @property
    def held(self) -> bool:
        return self.parity.held

    def to_json(self) -> dict[str, Any]:
        compared = self.parity.to_json()
        reason = compared.pop("reason")
        return {
            "sites": self.sites,
            "fused": self.fused,
            "operators": self.operators,
            "parity": compared | {"where": reason or compared["where"], "inputs": self.inputs},
            "repaired": self.repaired,
            "left": self.left,
            "not_portable": self.not_portable,
            "handed_back": self.handed_back,
            "at_fault": self.at_fault,
        }

    def __str__(self) -> str:
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        sites = f"{self.sites} attention {'site' if self.sites == 1 else 'sites'}"
        sites += f", {self.fused} fused ({operators or 'none'})"
        lines = [
            sites if self.sites else "no attention site: there was nothing to fuse",
            *(f"left: {line}" for line in self.left),
            *(f"repaired: {line}" for line in self.repaired),
            *(f"not of the standard: {line}" for line in self.not_portable),
            *(f"handed back to ONNX Runtime by OpenVINO's plugin: {x}" for x in self.handed_back),
            f"inputs {self.inputs}",
            self.parity.said(),
            str(self.parity),
        ]
        if not self.held:
            lines.append(f"not written; at fault: {self.at_fault}")
        return "\n".join(lines)


def fuse(
    model: str | Path | files.Opened,
    out: str | Path,
    *,
    target: str = "portable",
    inputs: str | Path | None = None,
    cache: str = "growing",
    capacity: int | None = None,
    drop_unchanged: bool = False,
    last_logits: bool = False,
) -> Fused:
    """Fuse `model`, a file or what has been read of it, for `target`, and write it to `out` if it
    computes the same.

    `portable` uses operators of the ONNX standard alone (opset 23), `cpu` may use those of
    com.microsoft, `openvino` makes what OpenVINO and its plugin for ONNX Runtime run fastest, in
    which attention is written out. Compared is on `inputs`, an .npz with an array for each input,
    or on inputs that are inferred.

    Of decoders: with `cache` `in-place`, past keys and values are buffers that each step writes
    into (`fuse.in_place`), of `capacity` positions, or as many as they are given with; these are
    compared over a prompt and `STEPS` steps too, each on the caches that it has written.
    `drop_unchanged` takes off the outputs what is an input as it came in, `last_logits` gives
    logits of the last position alone, so prompts are to be padded on the left.

    Raises ValueError on another target or cache, `files.BadInput` on a model that is none, whose
    inputs cannot be inferred, or that has no caches to keep in place.
    """
    wanted = Wanted(target, cache, capacity, drop_unchanged, last_logits)
    _check(wanted)
    opened, named, out = files.Opened.of(model), str(out), Path(out).absolute()
    files.keep_apart(opened, out)
    report = _Report()
    fused = _stepped(opened.path, wanted, report)
    _check_in_place(opened, fused, wanted)
    answer = _unproven(fused, target, report, out)
    with files.writing(out, keep=opened.data) as draft:
        files.write(fused, draft)
        del fused
        files.give_back(files.size(opened))
        written = files.Opened(draft)
        refusal = _does_not_load(written)
        if refusal:
            answer.parity.reason, answer.at_fault = refusal, "the file as a whole"
        else:
            logger.info("comparing …")
            cases, description = feeds.read(inputs, written if report.repaired else opened)
            reference = _reference(opened, report)
            compared = parity.compare(reference, [written], cases, description)
            [answer.parity], answer.inputs = compared.candidates, compared.inputs
            if wanted.cache == "in-place" and answer.held and not report.repaired:
                _compare_over_steps(answer, opened, written)
        answer.parity.name = named
        written.close()
        if not answer.held:
            draft.unlink()  # so that nothing is written
    if not answer.held and answer.at_fault is None:
        answer.at_fault = _bisect(opened.path, wanted, reference, cases, out)
    return answer


def _check(wanted: Wanted) -> None:
    if wanted.target not in TARGETS:
        raise ValueError(f"target {wanted.target!r}: expected one of {', '.join(TARGETS)}")
    if wanted.cache not in CACHES:
        raise ValueError(f"cache {wanted.cache!r}: expected one of {', '.join(CACHES)}")
    in_place = wanted.cache == "in-place"
    if wanted.capacity is not None and (wanted.capacity < 1 or not in_place):
        raise ValueError(
            f"capacity {wanted.capacity}: expected a number above 0, with cache 'in-place'"
        )
    if in_place and wanted.target not in FUSING:
        raise ValueError(f"cache 'in-place': expected target {' or '.join(FUSING)}")


def _check_in_place(opened: files.Opened, fused: ir.Model, wanted: Wanted) -> None:
    """Raise `files.BadInput` where caches were to be kept in place, and are not, or not all."""
    if wanted.cache != "in-place":
        return
    kept = graph.buffers(fused)
    given = kept.given if kept else {}
    left = [one for one in in_place.caches_of(opened.model) if one not in given]
    if left or not given:
        found = f"found that {left[0]} is none" if left else "found none"
        raise files.BadInput(
            f"{opened}: expected caches to keep in place, inputs (batch, heads, past, width) that"
            f" new keys or values are appended to, {found}; leave out --cache in-place"
        )


def _unproven(fused: ir.Model, target: str, report: _Report, out: Path) -> Fused:
    """What the steps have made of a model, before anything is compared."""
    names = [
        graph.operator(node)
        for node in graph.nodes(fused)
        if (node.domain, node.op_type) in graph.FUSED
    ]
    return Fused(
        out,
        report.sites,
        len(names),
        {name: names.count(name) for name in dict.fromkeys(names)},
        report.left,
        report.repaired,
        _not_portable(fused) if target == "portable" else [],
        openvino.handed_back(fused) if target == "openvino" else [],
        parity.Candidate(out.name, held=False, max_abs_diff=float("inf")),
        "none",
    )


def _compare_over_steps(answer: Fused, opened: files.Opened, written: files.Opened) -> None:
    """Run both behind a prompt, on what each has written into its caches, and tell `answer`."""
    try:
        generated = generate.compare([opened, written], STEPS)
    except files.BadInput as error:  # no ids, or a capacity of fewer positions
        _, _, reason = str(error).partition(": ")  # behind the file's name
        answer.inputs += f"; not run step by step ({reason})"
        return
    except Exception as error:  # ONNX Runtime's own types
        told = files.told(error, 160)
        if _generates(opened):
            answer.parity.held, answer.at_fault = False, IN_PLACE
            answer.parity.reason = f"fails on a prompt that the original runs on: {told}"
        else:
            answer.inputs += f"; not run step by step ({told})"
        return
    [run] = generated.candidates
    answer.inputs += f"; {generated.prompt}, and {STEPS} steps on the caches that each has written"
    if not run.same:
        answer.parity.held, answer.at_fault = False, IN_PLACE
        answer.parity.max_abs_diff, answer.parity.tolerance = run.difference, run.tolerance
        answer.parity.reason = f"in {STEPS} steps on its own caches"


def _generates(opened: files.Opened) -> bool:
    """Whether the model that was given runs on the prompt itself."""
    try:
        generate.compare([opened], STEPS)
    except Exception:  # ONNX Runtime's own types
        return False
    return True


def _does_not_load(written: files.Opened) -> str | None:
    """Why ONNX Runtime does not load the file, if so."""
    try:
        written.session()
    except Exception as error:  # ONNX Runtime's own types
        return f"does not load in ONNX Runtime: {files.told(error)}"
    return None


def _not_portable(model: ir.Model) -> list[str]:
    """The operators outside ONNX's standard, with how many there are."""
    own = {  # ONNX Runtime writes some of its own into ONNX's domain
        graph.operator(node)
        for node in graph.nodes(model)
        if not onnx.defs.has(node.op_type, node.domain)
    }
    counted = graph.counts(model).items()
    return [f"{name} × {count}" for name, count in counted if name in own]


@dataclasses.dataclass
class _Report:
    """What the steps say of themselves."""

    sites: int = 0
    left: list[str] = dataclasses.field(default_factory=list)
    by_rows: list[str] = dataclasses.field(default_factory=list)
    by_definition: list[str] = dataclasses.field(default_factory=list)

    @property
    def repaired(self) -> list[str]:
        """What was repaired: where the file runs on one row at a time, and where it does not."""
        return self.by_rows + self.by_definition


def _stepped(path: Path, wanted: Wanted, report: _Report, number: int | None = None) -> ir.Model:
    """The model at `path` after all of the steps, or the first `number`, ready to be saved."""
    model = graph.load(path)
    for i, _ in enumerate(_steps(model, wanted, report), 1):
        if i == number:
            break
    quantized.move_first(model)
    clean(model)
    return model


def clean(model: ir.Model) -> None:
    """Remove what is not used or there twice, in place; sort the nodes and name them all."""
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    for inside in model.graphs():
        inside.sort()
    passes.RemoveUnusedOpsetsPass()(model)
    passes.NameFixPass()(model)


def _steps(model: ir.Model, wanted: Wanted, report: _Report) -> Iterator[str]:
    """Change `model`, step by step, and say which was done."""
    names = {site.node.outputs[0].name: (site.name, site.layer) for site in graph.sites(model)}
    with quiet():
        convert(model)  # which names nodes that have no name
    yield f"the conversion to opset {OPSET}"
    passes.ShapeInferencePass()(model)
    repaired = repairs.repair(model)
    report.by_rows += repaired.by_rows
    report.by_definition += repaired.by_definition
    yield "the repair of what ONNX Runtime refuses"
    optimizer.fold_constants(model)
    if len([*model.graphs()]) == 1:  # in a branch, what it gives may be an Identity
        passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    yield "constants"
    normalization.fuse(model)
    gelu.fuse(model)
    yield "normalisations and Gelu"
    sites = graph.sites(model)
    report.sites = len(sites)
    for site in sites:
        if site.fused:
            continue
        name, layer = names.get(site.node.outputs[0].name, (site.name, site.layer))
        try:
            attention.fuse(model, site)
        except attention.Left as why:
            report.left.append(f"{name}: {why}")
        yield f"site {name} ({layer})" if layer else f"site {name}"
    clean(model)
    with quiet():
        passes.ShapeInferencePass()(model)
    guards.drop(model)
    if wanted.target in FUSING:
        grouped_heads.share(model)
        caches.take_in(model)
        yield "heads that groups share, caches that are the operator's own"
    if wanted.cache == "in-place":
        in_place.use(model, wanted.capacity)
        yield "caches that are written in place"
    if wanted.drop_unchanged:
        outputs.drop_unchanged(model)
        yield "outputs that are inputs"
    if wanted.last_logits:
        outputs.keep_last_logits(model)
        yield "logits of the last position alone"
    heads.merge(model)
    yield "guards that are left out, heads that are split in the operator"
    if wanted.target == "cpu":
        multi_head.use(model)
        yield "MultiHeadAttention where there are many keys"
        residual.keep_apart(model)
        yield "residuals kept apart from normalisations"
    if wanted.target == "openvino":
        report.left += openvino.use(model)
        yield "what OpenVINO takes"


def convert(model: ir.Model) -> None:
    """Bring `model`, in place, to opset 23 if it has a lower one."""
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OPSET))
    if opset < 18:  # onnxscript's converter begins there; this leaves the start to onnx's
        version_converter.ConvertVersionPass(18, fallback=True)(model)
    if opset < OPSET:
        version_converter.convert_version(model, OPSET)


def _bisect(
    path: Path, wanted: Wanted, reference: parity.Model, cases: list[feeds.Feed], out: Path
) -> str:
    """The name of the first step after which parity does not hold."""
    names = [*_steps(graph.load(path), wanted, _Report())]
    low, high = 0, len(names)  # after `low` steps it holds, after `high` it does not
    while high - low > 1:
        middle = (low + high) // 2
        logger.info(f"looking for the step at fault: {middle} of {len(names)} …")
        with files.scratch(out) as draft:
            files.write(_stepped(path, wanted, _Report(), middle), draft)
            held = parity.compare(reference, [draft], cases, "").held
        low, high = (middle, high) if held else (low, middle)
    return names[high - 1]


def _reference(opened: files.Opened, report: _Report) -> parity.Model:
    """What to compare with: the model that was given, run in the way that it can be run."""
    if report.by_definition:
        model = graph.load(opened.path)
        external.bring_in(model)
        evaluator = ReferenceEvaluator(ir.to_proto(model))  # as operators are defined, in numpy

        def run(arrays: parity.Outputs) -> parity.Outputs:
            return dict(zip(evaluator.output_names, evaluator.run(None, arrays), strict=True))

        return run
    return _by_rows(opened) if report.by_rows else opened


def _by_rows(opened: files.Opened) -> parity.Model:
    """Runs a model on one row of a batch at a time, which is all that it can run on."""
    session = opened.session(optimise=False)
    names = [output.name for output in session.get_outputs()]

    def rows(arrays: parity.Outputs) -> parity.Outputs:
        batch = max(len(array) for array in arrays.values() if array.ndim > 1)
        answers = [
            session.run(
                names,
                {
                    name: array[i : i + 1] if len(array) == batch and array.ndim > 1 else array
                    for name, array in arrays.items()
                },
            )
            for i in range(batch)
        ]
        return {name: np.concatenate(parts) for name, *parts in zip(names, *answers, strict=True)}

    return rows
