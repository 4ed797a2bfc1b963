"""8 and 4 bits for ONNX Runtime's CPU provider, by its own tool.

Weights of 8-bit products are signed, with a scale for each column: of all-MiniLM-L6-v2 in dynamic 8
bits the error is 0.12 of the output's spread so, and 0.26 with one scale for a weight, at the same
speed. They have seven bits and inputs eight unsigned ones, since a processor without VNNI adds two
products in 16 bits, which 255 · 127 · 2 does not fit into and 255 · 64 · 2 does (ONNX Runtime's
guide to quantisation, "U8S8"): so a file is right on any machine. On one with VNNI the bit costs
6 % of the error, and no time. Outputs of products stay floats (error 0.15, against 0.34).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime import quantization

from helpers import files, graph
from helpers.quantize.layers import Layer, prepare

# What one value is, where shape inference does not say: com.microsoft's operators have none.
_FLOATS = {"DefaultTensorType": ir.DataType.FLOAT.value}
ACCURACY = 4  # of MatMulNBits: inputs are rounded to 8 bits too, which is what makes it fast


def dynamic(source: str | Path | files.Opened, out: Path, *, per_channel: bool = True) -> None:
    """Write `source` with all of its layers in dynamic 8 bits to `out`, without proof.

    Raises ValueError where it has none.
    """
    with files.scratch(out) as base:
        layers = prepare(source, base)
        if not layers:  # of which the tool would make all
            raise ValueError(f"{source}: expected products by float32 weights, found none")
        dynamically(base, out, layers, per_channel=per_channel)


def dynamically(
    base: Path, out: Path, layers: Sequence[Layer], *, per_channel: bool = True
) -> None:
    """Write the prepared graph `base` to `out` with these `layers` in 8 bits, com.microsoft's
    Attention among them; inputs are quantised as it runs, with one scale for a whole tensor.

    The tool is told the nodes: it takes a standard Attention for com.microsoft's.
    """
    quantization.quantize_dynamic(
        str(base),
        str(out),
        op_types_to_quantize=["MatMul", "Attention"],
        nodes_to_quantize=[layer.name for layer in layers],
        per_channel=per_channel,
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=_is_large(base),
        extra_options=dict(_FLOATS),
    )


def statically(
    base: Path,
    out: Path,
    layers: Sequence[Layer],
    *,
    samples: Sequence[Mapping[str, np.ndarray]],
    convolutions: Sequence[str] = (),
) -> None:
    """Write the prepared graph `base` to `out` with these MatMul `layers`, and the `convolutions`
    by name, in 8 bits; inputs are quantised with the range that they have in the `samples`."""
    quantization.quantize_static(
        str(base),
        str(out),
        _Reader(samples),
        op_types_to_quantize=["MatMul", "Conv"],
        nodes_to_quantize=[*(layer.name for layer in layers), *convolutions],
        per_channel=True,
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=_is_large(base),
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"], **_FLOATS},
    )


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        self.samples = iter(samples)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return next(self.samples, None)


def in_blocks(base: Path, out: Path, layers: Sequence[Layer], *, bits: int, block: int) -> None:
    """Write the prepared graph `base` to `out` with the weights of these MatMul `layers` in `bits`,
    a scale for each `block` of a column's numbers: as com.microsoft's MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    names = {layer.name for layer in layers}
    others = [node.name for node in graph.nodes(ir.load(base)) if node.name not in names]
    quantizer = MatMulNBitsQuantizer(
        str(base),
        bits=bits,
        block_size=block,
        is_symmetric=True,
        accuracy_level=ACCURACY,
        nodes_to_exclude=others,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), _is_large(base))


def _is_large(base: Path) -> bool:
    """Whether a graph of that size is written with its weights in a file beside it."""
    return files.size(base) > files.ONE_FILE
