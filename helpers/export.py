"""PyTorch to ONNX, by route. A route names how a graph was made, which decides what fuses later."""

import contextlib
import inspect
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from helpers import files, graph
from helpers.quiet import quiet

logger = logging.getLogger(__name__)

# Route → opset. `torchscript` is what exports looked like for years; the other two are made by
# transformers' own exporter, built on torch.onnx.export(dynamo=True).
ROUTES = {"torchscript": 17, "dynamo": 18, "opset23": 23}


@dataclass(frozen=True)
class Export:
    """One exported file: its route, its graph without large weights, and what it took and gave."""

    path: Path
    route: str
    model: ir.Model
    seconds: float
    megabytes: float

    @property
    def nodes(self) -> int:
        """How many nodes the graph has, those in branches and bodies included."""
        return sum(graph.counts(self.model).values())


def dynamic_axes(inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    """The axes that vary, by name: batch, and for inputs (batch, length) the length as well.

    Lengths that differ here, as an encoder's and a decoder's, have names of their own.
    """
    lengths = dict.fromkeys(value.shape[1] for value in inputs.values() if value.ndim == 2)
    names = {size: f"length_{i}" if i else "length" for i, size in enumerate(lengths)}
    return {
        name: {0: "batch", 1: names[tensor.shape[1]]} if tensor.ndim == 2 else {0: "batch"}
        for name, tensor in inputs.items()
    }


def export(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    path: str | Path,
    route: str,
    *,
    dynamic: bool = True,
) -> Export:
    """Export `model`, called with `inputs` by name, to `path` by `route`, and check the file.

    `inputs` are examples; give two samples or more, since a size of 1 is taken for a constant. With
    `dynamic`, batch and length vary (`torchscript`), or every axis does that can (the others).
    The file appears whole or not at all. Raises ValueError on an unknown route, `files.BadInput` on
    a folder that cannot be written to or a graph that ONNX Runtime does not load, and whatever the
    exporter raises.
    """
    if route not in ROUTES:
        raise ValueError(f"route {route!r}: expected one of {', '.join(ROUTES)}")
    logger.info(f"exporting by {route} …")
    start = time.perf_counter()
    with quiet():
        save = _torchscript if route == "torchscript" else _transformers
        save(model.eval(), dict(inputs), Path(path), ROUTES[route], dynamic)
    seconds = time.perf_counter() - start
    exported = graph.load(path, weights=False)
    return Export(Path(path), route, exported, seconds, files.size(path) / 1e6)


def _torchscript(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, opset: int, dynamic: bool
) -> None:
    with torch.no_grad():
        outputs = model(**inputs)
    with _taking(model, list(inputs)), files.writing(path) as draft:
        torch.onnx.export(
            model,
            (),
            draft,
            kwargs=inputs,
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=[name for name, value in outputs.items() if torch.is_tensor(value)],
            dynamic_axes=dynamic_axes(inputs) if dynamic else None,
        )


@contextlib.contextmanager
def _taking(model: torch.nn.Module, names: list[str]) -> Iterator[None]:
    """Have `model` take the inputs `names` alone, as TorchScript counts them.

    The exporter fills in every other parameter of `forward` by its place, where models such as BERT
    take theirs by name ("multiple values for argument 'use_cache'"). A module around the model
    would do as well, but each node's name would begin with it.
    """
    forward = model.forward

    def named(*tensors: torch.Tensor) -> object:
        return forward(**dict(zip(names, tensors, strict=True)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    model.forward = named
    try:
        yield
    finally:
        del model.forward


def _transformers(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, opset: int, dynamic: bool
) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=dynamic, opset_version=opset)
    files.save(OnnxExporter().export(model, inputs, config=config).program, path)


# ── Generation ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Generation:
    """The files of a model that generates, as `generate.inside.model_of` takes them. A decoder
    alone has only `decode`."""

    decode: Path
    prefill: Path | None = None
    encoder: Path | None = None


def for_generation(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    folder: str | Path,
    *,
    opset: int | None = None,
) -> Generation:
    """Export `model`, of transformers, with caches, by transformers' exporter into `folder`, which
    is made where it is missing.

    `inputs` are what `model.generate` takes, two samples or more. Where they have a mask, a token
    of it is masked: the exporter leaves out a mask that is all ones, and then padded batches are
    wrong. Of a decoder one file is written, `decode.onnx`, for any number of tokens: an empty past
    is a prefill. Of an encoder-decoder they are three, `encoder.onnx`, `prefill.onnx` and
    `decode.onnx`, and a step takes one token. `opset` is 20 by default; at 23, transformers'
    exporter fails on decoders with cross-attention.

    Raises ValueError where there is one sample alone, and whatever the exporter raises.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    rows = min(len(tensor) for tensor in inputs.values())
    if rows < 2:
        raise ValueError(f"expected inputs of two samples or more, found {rows}")
    inputs, folder = dict(inputs), Path(folder)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][0, 0] = 0
    config = OnnxConfig(dynamic=True, **({"opset_version": opset} if opset else {}))
    several = model.config.is_encoder_decoder
    logger.info("exporting for generation …")
    with quiet():
        taken = {**inputs, "max_new_tokens": 4, "do_sample": False}
        exporter = OnnxExporter()
        parts = exporter.export_for_generation(model.eval(), taken, config, multi_token_decode=True)
        programs = {name: part.program for name, part in parts.components.items()}
        if several:
            programs["encoder"] = exporter.export(model.get_encoder(), inputs, config).program
    wanted = ("encoder", "prefill", "decode") if several else ("decode",)
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.onnx" for name in wanted}
    for name, path in paths.items():
        files.save(programs[name], path)
    return Generation(**paths)
