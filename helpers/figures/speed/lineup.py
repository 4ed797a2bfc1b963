"""Who takes part in a cell: the exports, the other optimizers at their best, and ours."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from helpers import contenders, export, feeds, files, graph, models, parity
from helpers.contenders import Contender
from helpers.figures.speed.models import Arrays, Model

# An export: its route, and the attention implementation of the module.
Export = tuple[str, str]
EAGER, SDPA = ("torchscript", "eager"), ("torchscript", "sdpa")
DYNAMO, OPSET23 = ("dynamo", "sdpa"), ("opset23", "sdpa")


def export_all(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], folder: Path
) -> tuple[dict[Export, Path], dict[Path, str]]:
    """The file of each export in `folder`, and the reasons of those that the exporter refused."""
    paths: dict[Export, Path] = {}
    failed: dict[Path, str] = {}
    for route, attention in (EAGER, SDPA, DYNAMO, OPSET23):
        paths[route, attention] = path = folder / f"{route}_{attention}.onnx"
        module.set_attn_implementation(attention)
        try:
            export.export(module, tensors, path, route)
        except Exception as error:  # whatever an exporter raises is the reason
            failed[path] = f"no export: {type(error).__name__}: {error}"[:240]
    return paths, failed


@dataclasses.dataclass(frozen=True)
class Exports:
    """What the contenders are made of: the file of each export, the reasons of those that failed,
    by file, and who keeps the contenders that compute what the module does."""

    paths: Mapping[Export, Path]
    failed: Mapping[Path, str]
    judge: Callable[[Contender], Contender]

    def judged(
        self, make: Callable[[str, Path], Contender], label: str, kind: str, export: Export
    ) -> Contender:
        """The contender that `make` makes of an export, with a reason where there is none."""
        source = self.paths[export]
        if source in self.failed:
            return Contender(label, kind, reason=self.failed[source])
        return self.judge(make(label, source))


def exports(model: Model, lengths: Sequence[int], folder: Path) -> Exports:
    """The exports of `model` in `folder`, for `lengths` (one alone, where those are fixed)."""
    module = model.module(lengths[0])
    example = model.inputs(2, lengths[0] if model.fixed else min(lengths))
    tensors = {name: torch.from_numpy(array) for name, array in example.items()}
    paths, failed = export_all(module, tensors, folder)
    exported = [path for path in paths.values() if path not in failed]
    if not exported:
        raise RuntimeError(f"{model.repository}: no export: {failed}")
    inferred, description = feeds.infer(exported[0])
    if not model.fixed:  # what is inferred is short
        longest = model.inputs(2, max(lengths))
        masks = {name: array != 0 for name, array in longest.items() if name == "attention_mask"}
        inferred.append(feeds.Feed("longest", longest, masks))
    return Exports(paths, failed, Judge(module, inferred, description, exported[0]))


def public(model: Model, made: Exports) -> list[Contender]:
    """What public tools make for ONNX Runtime, in fp32."""
    unfused = functools.partial(contenders.onnx, kind="unfused")
    as_exported = functools.partial(contenders.onnx, kind="opset23")
    return [
        made.judged(unfused, "unfused (torchscript, SDPA)", "unfused", SDPA),
        made.judged(unfused, "unfused (dynamo, SDPA)", "unfused", DYNAMO),
        best_stock(model, made.paths, made.failed, made.judge),
        made.judged(contenders.onnxscript, "onnxscript (dynamo, SDPA)", "onnxscript", DYNAMO),
        made.judged(contenders.transformers, "transformers (dynamo, SDPA)", "transformers", DYNAMO),
        made.judged(as_exported, "opset 23 as exported (SDPA)", "opset23", OPSET23),
    ]


def prepare(
    model: Model, lengths: Sequence[int], folder: Path, ours: Sequence[str]
) -> list[Contender]:
    """All contenders for `lengths` (one alone, where those are fixed), their files in `folder`.

    `ours` are the routes whose graphs `helpers.fuse` is given. Who cannot be made or does not hold
    parity has a reason.
    """
    made = exports(model, lengths, folder)
    return [
        *public(model, made),
        *(
            made.judged(contenders.fused, f"ours ({route}, SDPA)", "ours", (route, "sdpa"))
            for route in ours
        ),
    ]


class Judge:
    """Keeps those who compute what the PyTorch module does, over `feeds`.

    Outputs of the module are computed once. Where there is padding, which rows have no key is read
    off the export `guide`, whose attention is not fused.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        feeds: Sequence[feeds.Feed],
        description: str,
        guide: Path,
    ):
        self.feeds, self.description = feeds, description
        self.guides = [guide] if any(feed.keys for feed in feeds) else []
        run = models.runner(module)
        computed: list[tuple[Arrays, Arrays]] = []  # the arrays of each feed, and the outputs

        @functools.wraps(run)
        def reference(arrays: Arrays) -> Arrays:
            for inputs, outputs in computed:
                if inputs is arrays:
                    return outputs
            computed.append((arrays, run(arrays)))
            return computed[-1][1]

        self.reference = reference

    def __call__(self, contender: Contender) -> Contender:
        """`contender`, with a reason where it does not hold."""
        if contender.reason:
            return contender
        both = [*self.guides, contender.path]
        try:
            report = parity.compare(self.reference, both, self.feeds, self.description)
        except files.BadInput as error:
            reason = str(error).replace(f"{contender.path.parent}/", "")
        else:
            candidate = report.candidates[-1]
            if candidate.held:
                return contender
            reason = candidate.reason or f"differs by {candidate.max_abs_diff:.0e}"
        return Contender(contender.label, contender.kind, reason=f"wrong: {reason}"[:240])


def best_stock(
    model: Model,
    paths: Mapping[Export, Path],
    failed: Mapping[Path, str],
    judge: Callable[[Contender], Contender],
) -> Contender:
    """ONNX Runtime's optimizer at its best setting that holds parity: the one that fuses the most
    sites, then the one with the fewest nodes. It fuses attention of eager TorchScript graphs alone,
    with dynamic axes at its default level."""
    tried: list[tuple[int, int, Contender]] = []
    reasons: list[str] = []
    sizes = {"num_heads": model.heads, "hidden_size": model.width}
    for attention, raw in (("eager", False), ("eager", True), ("sdpa", False)):
        setting = f"{model.model_type}{', raw mask' if raw else ''} (torchscript, {attention})"
        source = paths["torchscript", attention]
        if raw and tried:  # what it makes by itself of the mask is right
            continue
        if source in failed:
            reasons.append(failed[source])
            continue
        label = f"stock, {setting}"
        stock = judge(contenders.stock(label, source, model.model_type, **sizes, raw_mask=raw))
        if stock.reason:
            reasons.append(f"{setting}: {stock.reason}")
            continue
        optimised = graph.load(stock.path, weights=False)
        sites = graph.sites(optimised)
        fused = sum(site.fused for site in sites)
        tried.append((-fused, sum(graph.counts(optimised).values()), stock))
        if fused == len(sites):
            break
    if not tried:
        return Contender(f"stock, {model.model_type}", "stock", reason="; ".join(reasons))
    return min(tried, key=lambda attempt: attempt[:2])[2]
