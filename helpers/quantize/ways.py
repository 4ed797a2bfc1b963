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
    groups = _groups(base) if samples.calibration else {}
    if target == "cpu":
        yield Way("dynamic", cpu.dynamically, [*layers], smooth=True)
        yield from _by_calibration(products, "static", samples, [*groups])
        return
    yield Way("weights", partial(openvino.weights, every=products, bits=8, block=0), products)
    if samples.calibration:
        make = partial(openvino.statically, every=products, samples=samples.calibration)
        # A grouped convolution stays in float: OpenVINO takes 16 times as long for that of
        # wav2vec2-base in 8 bits as in bf16.
        whole = [name for name, count in groups.items() if count == 1]
        yield from _with_convolutions(Way("static, by NNCF", make, products), whole)
    yield from _by_calibration(products, "static, by ONNX Runtime", samples, [*groups])


def _by_calibration(
    products: list[Layer], name: str, samples: Samples, convolutions: list[str]
) -> Iterator[Way]:
    """Static 8 bits by ONNX Runtime's tool, where there are samples."""
    if samples.calibration and products:
        make = partial(cpu.statically, samples=samples.calibration)
        yield from _with_convolutions(Way(name, make, products, smooth=True), convolutions)


def _with_convolutions(way: Way, convolutions: list[str]) -> Iterator[Way]:
    """`way`, which rounds products, and where there are `convolutions`, one that rounds these too.

    Those of wav2vec2-base cost far more than its products: an error of 0.47, and of 0.03 without.
    """
    yield way
    if convolutions:
        make = partial(way.make, convolutions=convolutions)
        yield Way(f"{way.name}, convolutions too", make, way.layers, more=True)


def _groups(base: Path) -> dict[str, int]:
    """The convolutions by weights, by name, with the number of groups that their channels form."""
    return {
        node.name: node.attributes.get_int("group", 1)
        for node in ir.load(base).graph
        if graph.operator(node) == "Conv" and node.inputs[1].is_initializer()
    }
