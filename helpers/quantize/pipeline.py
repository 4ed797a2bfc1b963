"""The 8-bit or 4-bit graph that is best for a provider, proven against the floats.

Each way to make one (dynamic, static by calibration, weights alone) is tried. Where its error is
above the bound, loud channels are smoothed, and if that does not do, the layers that rounding costs
most go back to floats, as few as it takes. Of what holds, the fastest on this machine is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from helpers import files, graph
from helpers.quantize import openvino, samples
from helpers.quantize.layers import prepare
from helpers.quantize.trials import Trials, Tried
from helpers.quantize.ways import ways
from helpers.workers.paired import speedup

TARGETS, BITS = ("cpu", "openvino"), (8, 4)
# By bits, the root of the mean squared error of an output, relative to its standard deviation, up
# to which a graph is written. On notebook 02's pairs of sentences, each 8-bit graph of all-MiniLM-
# L6-v2 of an error up to 0.34 kept its Spearman correlation within 0.005, and one of 0.47 lost
# 0.012; 0.1 leaves room for what forgives less than a correlation. All its products in dynamic 8
# bits give 0.13, smoothed 0.09; weights in 4 bits give 0.24 to 0.31.
BOUND = {8: 0.1, 4: 0.25}
AHEAD = 0.02  # by which a way must be faster than one of less error, to be taken


@dataclasses.dataclass
class Quantized:
    """What `quantize` did: `chosen` is the way that was taken (where none `held`, the one of least
    error, and nothing is written), among all that were `tried`; `layers` counts the products by
    weights, `megabytes` are before and after, `timed` says on what. Where none held,
    `error_in_floats` is that of the target itself, which may compute in bf16."""

    path: Path
    target: str
    bits: int
    bound: float
    chosen: Tried
    tried: list[Tried]
    layers: int
    inputs: str
    timed: str = ""
    megabytes: tuple[float, float] = (0.0, 0.0)
    error_in_floats: float | None = None

    @property
    def held(self) -> bool:
        return self.chosen.error <= self.bound

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "target": self.target,
            "held": self.held,
            **self.chosen.to_json(),
            "bound": self.bound,
            "layers": self.layers,
            "inputs": self.inputs,
            "timed": self.timed,
            "megabytes": list(self.megabytes),
            "error_in_floats": self.error_in_floats,
            "tried": [one.to_json() for one in self.tried],
        }

    def __str__(self) -> str:
        chosen, left = self.chosen, len(self.chosen.left)
        lines = [
            f"{self.bits} bits, {chosen.method}: {self.layers - left} of {self.layers} products by"
            f" weights, {left} left in float",
            *(f"left in float: {name}" for name in chosen.left),
            f"inputs {self.inputs}",
            f"error {chosen.error:.3f} of the spread of {chosen.output or 'the outputs'} (bound"
            f" {self.bound:g})",
        ]
        if not self.held:
            tried = [f"tried: {one}" for one in self.tried]
            own = f"in floats, {self.target} has an error of {self.error_in_floats:.3f}"
            why = f"not written: the bound is not held by any way ({own})"
            return "\n".join([*lines, *tried, why])
        before, after = self.megabytes
        lines.append(f"{before:.1f} MB before, {after:.1f} MB after")
        lines.append(f"speed-up {chosen.speedup}, on {self.timed}")
        others = [one for one in self.tried if one is not chosen]
        return "\n".join([*lines, *(f"also tried: {one}" for one in others)])


def quantize(
    model: str | Path | files.Opened,
    out: str | Path,
    *,
    target: str = "cpu",
    bits: int = 8,
    inputs: str | Path | None = None,
    bound: float | None = None,
) -> Quantized:
    """Write `model`, a file or what has been read of it, to `out` with its products by weights in
    `bits`, in the way that is fastest on `target`, if its error stays within the `bound`, by
    default `BOUND`: the root of the mean squared error of an output, in its standard deviations.

    `cpu` is ONNX Runtime, `openvino` OpenVINO (which needs NNCF). `inputs` is an .npz with an array
    for each input, of eight rows or more: three of four are calibrated on. Without, no way is tried
    that needs it, and errors are of inferred inputs. In 4 bits are weights alone. Raises ValueError
    on another target, other bits or another bound than a number, `files.BadInput` on a bad model
    and bad samples.
    """
    bound = BOUND.get(bits, 0.0) if bound is None else bound
    _check(target, bits, bound)
    opened, out = files.Opened.of(model), Path(out).absolute()
    files.keep_apart(opened, out)
    _check_floats(opened)
    if target == "openvino":
        openvino.nncf()  # its lack is told before any work
    given = samples.read(inputs, opened)
    with files.scratch(out) as base:
        layers = prepare(opened, base, latest=bits == 4 and target == "openvino")
        if not layers:
            raise files.BadInput(
                f"{opened}: expected products by float32 weights (MatMul, Gemm) outside of branches"
                " and bodies, found none; there is nothing to quantise"
            )
        trials = Trials(opened, base, layers, target, bound, bits, given)
        tried = [trials.of(way) for way in ways(base, layers, target, bits, given)]
        trials.time([one for one in tried if one.error <= bound])
        chosen = _best(tried)
        answer = Quantized(out, target, bits, bound, chosen, tried, len(layers), trials.description)
        answer.timed = trials.timed
        if answer.held:
            files.save(ir.load(chosen.path), out, keep=opened.data)
            answer.megabytes = files.size(opened) / 1e6, files.size(out) / 1e6
        else:
            answer.error_in_floats = trials.error_in_floats()
    return answer


def _check(target: str, bits: int, bound: float) -> None:
    if target not in TARGETS:
        raise ValueError(f"target {target!r}: expected one of {', '.join(TARGETS)}")
    if bits not in BITS:
        raise ValueError(f"bits {bits!r}: expected 8 or 4")
    if not 0 <= bound < float("inf"):
        raise ValueError(f"bound {bound!r}: expected a number that is not negative")


def _check_floats(opened: files.Opened) -> None:
    counts = graph.counts(opened.model).items()
    quantised = [f"{count} {name}" for name, count in counts if graph.is_quantised(name)]
    if quantised:
        raise files.BadInput(
            f"{opened}: expected a graph in floats, found one that is quantised already"
            f" ({', '.join(quantised)}); give the graph that it was made from"
        )


def _best(tried: Sequence[Tried]) -> Tried:
    """Of what was timed the fastest, or of those that cannot be told from it the one with fewest
    layers in float, and least error; where nothing was, the one of least error of all."""
    timed = [one for one in tried if one.seconds is not None]
    if not timed:
        return min(tried, key=lambda one: one.error)
    fastest = min(timed, key=lambda one: np.median(one.seconds))
    near = [one for one in timed if speedup(one.seconds, fastest.seconds).low <= 1 + AHEAD]
    return min(near, key=lambda one: (len(one.left), one.error))
