"""The ways to make a quantised graph, by target and bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from helpers import graph
from helpers.quantize import cpu, openvino
from helpers.quantize.layers import Layer
from helpers.quantize.samples import Samples

BLOCKS = (32, 128)  # numbers of a column that share a scale, in 4 bits


class Way(NamedTuple):
    """A way to make a graph: its name, what writes a file of a prepared graph with some of the
    layers rounded, and the layers that it can round; whether it rounds `more`, and whether the
    graph may be smoothed first."""

    name: str
    make: Callable[[Path, Path, Sequence[Layer]], None]
    layers: list[Layer]
    more: bool = False
    smooth: bool = False


def ways(
    base: Path, layers: Sequence[Layer], target: str, bits: int, samples: Samples
) -> Iterator[Way]:
    """The ways to try for the prepared graph `base`, those that take least time to make first."""
    products = [layer for layer in layers if layer.operator == "MatMul"]
    if bits == 4:
        for block in BLOCKS:
            make = partial(cpu.in_blocks, bits=bits, block=block)
            if target == "openvino":
                make = partial(openvino.weights, every=products, bits=bits, block=block)
            yield Way(f"weights in blocks of {block}", make, products)
        return
    if target == "cpu":
        yield Way("dynamic", cpu.dynamically, [*layers], smooth=True)
        yield from _by_calibration(base, products, "static", samples)
        return
    yield Way("weights", partial(openvino.weights, every=products, bits=8, block=0), products)
    if samples.calibration:
        make = partial(openvino.statically, every=products, samples=samples.calibration)
        # OpenVINO takes 15 times as long for wav2vec2-base's grouped one in 8 bits as in bf16.
        yield from _with_convolutions(
            Way("static, by NNCF", make, products), _convolutions(base, grouped=False)
        )
    yield from _by_calibration(base, products, "static, by ONNX Runtime", samples)


def _by_calibration(
    base: Path, products: list[Layer], name: str, samples: Samples
) -> Iterator[Way]:
    """Static 8 bits by ONNX Runtime's tool, where there are samples."""
    if samples.calibration and products:
        make = partial(cpu.statically, samples=samples.calibration)
        way = Way(name, make, products, smooth=True)
        yield from _with_convolutions(way, _convolutions(base, grouped=True))


def _with_convolutions(way: Way, convolutions: list[str]) -> Iterator[Way]:
    """`way`, which rounds products, and where there are `convolutions`, one that rounds these too.

    Those of wav2vec2-base cost far more than its products: an error of 0.48, and of 0.03 without.
    """
    yield way
    if convolutions:
        make = partial(way.make, convolutions=convolutions)
        yield Way(f"{way.name}, convolutions too", make, way.layers, more=True)


def _convolutions(base: Path, *, grouped: bool) -> list[str]:
    """The names of the convolutions by weights; without those of `grouped` channels, or with."""
    return [
        node.name
        for node in ir.load(base).graph
        if graph.operator(node) == "Conv"
        and node.inputs[1].is_initializer()
        and (grouped or node.attributes.get_int("group", 1) == 1)
    ]
