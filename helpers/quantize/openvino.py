"""8 and 4 bits for OpenVINO, by NNCF, in ONNX: OpenVINO reads the file as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir

from helpers import files, graph
from helpers.quantize.layers import Layer
from helpers.workers import runtimes

OUTLIERS = 1e-4  # of the numbers at either end of a range, which rounding cuts off
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_SAME_NUMBERS = {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


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
    convolutions: Sequence[str] = (),
) -> None:
    """Write the prepared graph `base` to `out` with these `layers`, of `every` that it has, and
    the `convolutions` by name in 8 bits, by calibration on the `samples`.

    NNCF's quantisation of a Transformer: outliers of inputs are moved into the weights
    (SmoothQuant), biases corrected, and products of two inputs rounded too.
    """
    tool, model = nncf(), onnx.load(base)
    options = {"advanced_parameters": _without_outliers(tool)} if convolutions else {}
    made = tool.quantize(
        model,
        tool.Dataset([*samples]),
        model_type=tool.ModelType.TRANSFORMER,
        subset_size=len(samples),
        ignored_scope=_ignored(tool, model, every, layers, convolutions),
        **options,
    )
    quantised = ir.from_proto(made)
    _without_signs(quantised)
    files.write(quantised, out)


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
    model = onnx.load(base)
    made = tool.compress_weights(
        model, ignored_scope=_ignored(tool, model, every, layers), **options
    )
    files.write(ir.from_proto(made), out)


def _ignored(
    tool: ModuleType,
    model: onnx.ModelProto,
    every: Sequence[Layer],
    layers: Sequence[Layer],
    convolutions: Sequence[str] = (),
) -> object:
    """What NNCF leaves alone: layers and convolutions that are not among those to round."""
    left = [layer.name for layer in every if layer not in layers]
    left += [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and node.name not in convolutions
    ]
    return tool.IgnoredScope(names=left, validate=False)


def _without_outliers(tool: ModuleType) -> object:
    """Have NNCF take ranges without the outermost numbers: a few of what a convolution reads are
    far from all others. Error of wav2vec2-base: 0.47, and with them 0.51."""
    from nncf.quantization import range_estimator as estimator

    end = estimator.StatisticsCollectorParameters(
        statistics_type=estimator.StatisticsType.QUANTILE,
        aggregator_type=estimator.AggregatorType.MEAN,
        quantile_outlier_prob=OUTLIERS,
    )
    return tool.AdvancedQuantizationParameters(
        activations_range_estimator_params=estimator.RangeEstimatorParameters(end, end)
    )


def _without_signs(model: ir.Model) -> None:
    """Have what convolutions read rounded to uint8, in place; NNCF writes int8.

    The numbers are the same, int8 steps from zero point z are uint8 steps from z + 128, but
    OpenVINO runs a convolution of int8 whose zero point is not 0 in fp32: wav2vec2-base is twice
    as slow so (OpenVINO 2026.4, its profile).
    """
    for node in graph.nodes(model):
        read = _alone(node.inputs[0]) if node.op_type == "Conv" else None
        while read is not None and read.op_type in _SAME_NUMBERS:  # audio gets its channel here
            read = _alone(read.inputs[0])
        rounded = _alone(read.inputs[0]) if read is not None and read.inputs else None
        if rounded is not None and (rounded.op_type, read.op_type) == _ROUNDING:
            _to_unsigned(model.graph, rounded, read)


def _alone(value: ir.Value) -> ir.Node | None:
    """The node that makes `value`, if nothing else reads it."""
    return value.producer() if len([*value.consumers()]) == 1 else None


def _to_unsigned(inside: ir.Graph, rounded: ir.Node, read: ir.Node) -> None:
    """The pair QuantizeLinear, DequantizeLinear in uint8, where it is in int8."""
    zero = rounded.inputs[2].const_value if len(rounded.inputs) > 2 else None
    if zero is None or zero.dtype != ir.DataType.INT8:
        return
    name = f"{rounded.outputs[0].name}_zero_point"
    shifted = (zero.numpy().astype(np.int16) + 128).astype(np.uint8)
    value = ir.val(name, const_value=ir.tensor(shifted, name=name))
    inside.register_initializer(value)
    for node in (rounded, read):
        node.replace_input_with(2, value)
    rounded.outputs[0].dtype = ir.DataType.UINT8
