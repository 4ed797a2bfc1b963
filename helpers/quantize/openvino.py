"""8 and 4 bits for OpenVINO, by NNCF, in ONNX: OpenVINO reads the file as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir

from helpers import files
from helpers.quantize.layers import Layer
from helpers.workers import runtimes


def nncf() -> ModuleType:
    """NNCF. Raises ModuleNotFoundError where it, or OpenVINO, which runs the result, is not
    installed."""
    import openvino  # noqa: F401  so that its lack is told at once

    return runtimes.nncf()


def statically(
    base: Path,
    out: Path,
    layers: Sequence[Layer],
    *,
    every: Sequence[Layer],
    samples: Sequence[Mapping[str, np.ndarray]],
) -> None:
    """Write the prepared graph `base` to `out` with these `layers`, of `every` that it has, in 8
    bits, by calibration on the `samples`.

    NNCF's quantisation of a Transformer: outliers of inputs are moved into the weights
    (SmoothQuant), biases corrected, and products of two inputs rounded too.
    """
    tool = nncf()
    made = tool.quantize(
        onnx.load(base),
        tool.Dataset([*samples]),
        model_type=tool.ModelType.TRANSFORMER,
        subset_size=len(samples),
        ignored_scope=_ignored(tool, every, layers),
    )
    _write(made, out)


def weights(
    base: Path,
    out: Path,
    layers: Sequence[Layer],
    *,
    every: Sequence[Layer],
    bits: int,
    block: int,
) -> None:
    """Write the prepared graph `base` to `out` with the weights of these `layers`, of `every` that
    it has, in `bits`: in 8 a scale for each column, in 4 for each `block` of its numbers. OpenVINO
    rounds inputs as it runs."""
    tool = nncf()
    modes = tool.CompressWeightsMode
    options = {"mode": modes.INT8_SYM}
    if bits == 4:
        options = {"mode": modes.INT4_SYM, "group_size": block, "ratio": 1.0}
        options["advanced_parameters"] = tool.AdvancedCompressionParameters(
            group_size_fallback_mode=tool.GroupSizeFallbackMode.ADJUST  # where a row is shorter
        )
    _write(
        tool.compress_weights(
            onnx.load(base), ignored_scope=_ignored(tool, every, layers), **options
        ),
        out,
    )


def _ignored(tool: ModuleType, every: Sequence[Layer], layers: Sequence[Layer]) -> object:
    """What NNCF leaves alone: convolutions (with them, wav2vec2-base has an error of 0.48, and
    0.03 without), and the layers that are not among those to round."""
    left = [layer.name for layer in every if layer not in layers]
    return tool.IgnoredScope(names=left, types=["Conv"], validate=False)


def _write(model: onnx.ModelProto, out: Path) -> None:
    files.write(ir.from_proto(model), out)
