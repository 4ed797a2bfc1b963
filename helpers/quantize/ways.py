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
    """A way to make a graph: its name, what writes a file with some of the layers rounded, the
    layers that it can round, and whether it rounds `more`, which stays rounded."""

    name: str
    make: Callable[[Path, Sequence[Layer]], None]
    layers: list[Layer]
    more: bool = False


def ways(
    base: Path, layers: Sequence[Layer], target: str, bits: int, samples: Samples
) -> Iterator[Way]:
    """The ways to try for the prepared graph `base`, those that take least time to make first."""
    products = [layer for layer in layers if layer.operator == "MatMul"]
    if bits == 4:
        for block in BLOCKS:
            make = partial(cpu.in_blocks, base, bits, block)
            if target == "openvino":
                make = partial(openvino.weights, base, bits, block, products)
            yield Way(f"weights in blocks of {block}", make, products)
        return
    if target == "cpu":
        yield Way("dynamic", partial(cpu.dynamically, base), [*layers])
        yield from _by_calibration(base, products, "static", samples)
        return
    yield Way("weights", partial(openvino.weights, base, bits, 0, products), products)
    if samples.calibration:
        make = partial(openvino.statically, base, samples.calibration, products)
        yield Way("static, by NNCF", make, products)
    yield from _by_calibration(base, products, "static, by ONNX Runtime", samples)


def _by_calibration(
    base: Path, products: list[Layer], name: str, samples: Samples
) -> Iterator[Way]:
    """Static 8 bits by ONNX Runtime's tool, where there are samples: products alone, and where
    there are convolutions these too."""
    if not (samples.calibration and products):
        return
    yield Way(name, partial(cpu.statically, base, samples.calibration, ()), products)
    convolutions = [
        node.name
        for node in ir.load(base).graph
        if graph.operator(node) == "Conv" and node.inputs[1].is_initializer()
    ]
    if convolutions:
        make = partial(cpu.statically, base, samples.calibration, convolutions)
        yield Way(f"{name}, convolutions too", make, products, more=True)
