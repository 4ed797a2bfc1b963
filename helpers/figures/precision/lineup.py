"""Who takes part: PyTorch, and all that public tools and ours make for a reader, as it comes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType

from helpers import contenders
from helpers.contenders import Contender, Feeds
from helpers.figures.precision import models
from helpers.figures.speed import lineup
from helpers.figures.speed.lineup import DYNAMO, OPSET23, SDPA, Exports
from helpers.figures.speed.models import Model

ROUTES = {"torchscript": SDPA, "dynamo": DYNAMO}  # whose graphs are fused
# Bounds near the errors that NNCF's static quantisation of the exports has: of text and images,
# and of speech, whose convolutions it rounds too.
STRICT, LOOSE = 0.04, 0.55
SHORT = {SDPA: "torchscript", DYNAMO: "dynamo", OPSET23: "opset 23"}


def prepare(model: Model, lengths: Sequence[int], folder: Path) -> dict[str, list[Contender]]:
    """All contenders for `lengths` (one alone, where those are fixed), their files in `folder`; by
    whose they are, "theirs" or "ours".

    The first of theirs is PyTorch in fp32. Who cannot be made, or in fp32 does not hold parity, has
    a reason.
    """
    made = lineup.exports(model, lengths, folder)
    public = lineup.public(model, made)
    calibration = models.calibration(model, min(lengths))
    npz = folder / "samples.npz"
    np.savez(npz, **calibration)
    samples = models.single(calibration)
    theirs = [
        *pytorch(model, lengths[0]),
        *public,
        *onnxruntime_int8([public[0], public[2]], samples),
        *openvino(made, samples),
    ]
    return {"theirs": theirs, "ours": [*ours(made, npz)]}


def pytorch(model: Model, length: int) -> Iterator[Contender]:
    """PyTorch in fp32, and in bf16, eager and compiled."""
    arguments = model.pytorch(length)
    factory = "helpers.models:pytorch"
    yield contenders.pytorch("PyTorch eager, fp32", factory, **arguments)
    for way, compiled in (("eager", {}), ("compiled", {"compiled": True})):
        for bf16 in ("autocast", "weights"):
            label = f"PyTorch {way}, bf16 {bf16}"
            yield contenders.pytorch(label, factory, **arguments, **compiled, bf16=bf16)


def onnxruntime_int8(graphs: Sequence[Contender], samples: Feeds) -> Iterator[Contender]:
    """ONNX Runtime's own tool, dynamic and static, on each of the `graphs`."""
    # The type of what com.microsoft's operators give, which it does not infer.
    floats = {"extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT}}
    for graph in graphs:
        for how, options in (
            ("per tensor", floats),
            ("per channel", {"per_channel": True} | floats),
        ):
            label = f"quantize_dynamic, {how} ({graph.kind})"
            yield of(graph, label, "dynamic-int8", contenders.dynamic_int8, **options)
        yield of(
            graph,
            f"quantize_static ({graph.kind})",
            "static-int8",
            contenders.static_int8,
            feeds=samples,
            activation_type=QuantType.QUInt8,
        )


def openvino(made: Exports, samples: Feeds) -> Iterator[Contender]:
    """OpenVINO, NNCF and the plugin, on the exports."""
    run, plugin = contenders.openvino, contenders.openvino_plugin
    for export, short in SHORT.items():
        graph = Contender(short, "unfused", path=made.paths[export])
        graph = dataclasses.replace(graph, reason=made.failed.get(graph.path, ""))
        yield of(graph, f"OpenVINO as it comes ({short})", "openvino-default", run, precision=None)
        yield of(graph, f"OpenVINO f32 ({short})", "openvino", run, precision="f32")
        label = f"OpenVINO, NNCF weights ({short})"
        yield of(graph, label, "openvino-int8", run, precision=None, int8=True)
        if export != OPSET23:
            static, label = contenders.openvino_static_int8, f"OpenVINO, NNCF static ({short})"
            options = {"feeds": samples, "precision": None}
            yield of(graph, label, "openvino-static-int8", static, **options)
        if export != DYNAMO:
            label = f"plugin as it comes ({short})"
            yield of(graph, label, "plugin-default", plugin, precision=None)


def ours(made: Exports, npz: Path) -> Iterator[Contender]:
    """Fused for either target, on each route; and in 8 bits, of the TorchScript route, with and
    without the samples in the file `npz`."""
    run, plugin = contenders.openvino, contenders.openvino_plugin
    for_cpu = {route: _fused(made, "cpu", route) for route in ROUTES}
    for_openvino = {route: _fused(made, "openvino", route) for route in ROUTES}
    yield from for_cpu.values()
    for route, graph in for_openvino.items():
        for name, precision in (("as it comes", None), ("f32", "f32")):
            label = f"fuse openvino, OpenVINO {name} ({route})"
            yield of(graph, label, "ours-openvino", run, precision=precision)
            label = f"fuse openvino, plugin {name} ({route})"
            yield of(graph, label, "ours-plugin", plugin, precision=precision)
    eight_bits = contenders.quantized
    for name, inputs in (("calibrated", npz), ("no samples", None)):
        graph, label = for_cpu["torchscript"], f"quantize cpu, ONNX Runtime, {name}"
        yield of(graph, label, "ours-int8", eight_bits, target="cpu", inputs=inputs)
    for name, inputs, bound in (
        ("calibrated", npz, None),
        ("strict, calibrated", npz, STRICT),
        ("loose, calibrated", npz, LOOSE),
        ("no samples", None, None),
    ):
        graph, label = for_openvino["torchscript"], f"quantize openvino, {name}"
        options = {"target": "openvino", "inputs": inputs, "bound": bound}
        eight = of(graph, label, "ours-int8", eight_bits, **options)
        label = f"quantize openvino, OpenVINO, {name}"
        yield of(eight, label, "ours-openvino-int8", run, precision=None)
        label = f"quantize openvino, plugin, {name}"
        yield of(eight, label, "ours-plugin-int8", plugin, precision=None)


def _fused(made: Exports, target: str, route: str) -> Contender:
    def make(label: str, path: Path) -> Contender:
        return contenders.fused(label, path, target=target)

    return made.judged(make, f"fuse {target}, ONNX Runtime ({route})", "ours", ROUTES[route])


def of(
    graph: Contender, label: str, kind: str, make: Callable[..., Contender], **options: Any
) -> Contender:
    """What `make` makes of the file of `graph`, or the reason why there is none."""
    if graph.reason:
        return Contender(label, kind, reason=graph.reason)
    return dataclasses.replace(make(label, graph.path, **options), kind=kind)
