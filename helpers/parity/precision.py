"""How far two right graphs may differ: by the types they compute in, and by their own noise."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from helpers import files, graph
from helpers.feeds import Feed
from helpers.graph import external
from helpers.parity.runner import Outputs

# By the least precise type that is computed in, relative to the output's standard deviation where
# that is below 1. fp32: what another order of summation gives in a few dozen layers stays well
# below. fp16 and bf16 have 11 and 8 bits of mantissa where fp32 has 24, of which a few dozen layers
# lose some more. Integers and booleans are compared exactly.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2}
ORDER = ("float64", "float32", "float16", "bfloat16")  # from the most precise
ULPS = 16  # of an output's largest number: what another order of summation may cost at its end
SCALED = 1.05  # a fault that must show in an 8-bit graph: scores that are 5 % off
SITES = 6  # at most, of which that is tried
ROUNDED = 1 + 2**-21  # what scores are off by that were summed in another order
STEPPED = 1 + 2**-16  # the same in 8 bits, where one number in many falls on a step's other side
QUANTISERS = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QuantizeLinear")

_NOT_COMPUTING = {
    *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather"),
    *("Identity", "Pad", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose"),
    *("Unsqueeze", "Where", "DequantizeLinear"),
}
_QUANTISED = {
    *("ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger"),
    *("MatMulIntegerToFloat", "QAttention", "QuantizeLinear"),
}


def read(model: ir.Model) -> tuple[str, bool]:
    """The least precise float type that `model` computes in, by name, and whether it computes in 8
    bits anywhere. What is rounded to a type on the way is computed in it; weights that are only
    kept in one are not."""
    computed = graph.from_input(model)
    types: dict[ir.Value, ir.DataType | None] = {}
    least, eight_bits = "float32", False
    for node in graph.nodes(model):
        eight_bits |= node.op_type in _QUANTISED or node.op_type.startswith("QLinear")
        given = [
            types.get(operand) or operand.dtype for operand in node.inputs if operand is not None
        ]
        floats = [
            operand for operand in given if operand is not None and operand.is_floating_point()
        ]
        inherited = floats[0] if floats else None
        if node.op_type == "Cast":
            inherited = ir.DataType(node.attributes.get_int("to", 1))
        rounds = node.op_type == "Cast" and not computed.isdisjoint(node.inputs)
        for value in node.outputs:
            types[value] = value.dtype or inherited
            name = types[value].name.lower() if types[value] is not None else ""
            name = {"float": "float32", "double": "float64"}.get(name, name)
            computing = (rounds or node.op_type not in _NOT_COMPUTING) and name in ORDER
            if computing and ORDER.index(name) > ORDER.index(least):
                least = name
    return least, eight_bits


def spread(values: np.ndarray) -> float:
    """What an output is measured by: its standard deviation, or if it is constant, its size."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return 1.0
    return float(finite.std()) or float(np.abs(finite).max())


def allowed(values: np.ndarray, base: float) -> float:
    """The tolerance for an output that has `values` where it is compared, without noise."""
    if values.dtype.kind != "f" or not values.size:
        return base if values.dtype.kind == "f" else 0.0
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0))
    return max(base * min(1.0, spread(values)), ULPS * float(np.finfo(values.dtype).eps) * largest)


Tried = list[tuple[Feed, Outputs, Outputs]]  # feeds, what is given for them, where it is compared


def with_scores_off(path: Path, tried: Tried) -> dict[str, float]:
    """By how much the outputs of the model at `path` differ if the scores of one site are 5 % off,
    by name, relative to their spread: for the site where it shows least. Empty where that cannot
    be tried."""
    proto, folder, sites = _sites(path)
    every = -(-len(sites) // SITES) or 1
    shown = [_shown(_scaled(proto, [site], SCALED), folder, tried) for site in sites[::every]]
    names = {name for differences in shown for name in differences}
    return {
        name: min(differences[name] for differences in shown if name in differences)
        for name in names
    }


def with_scores_rounded(path: Path, tried: Tried, by: float = ROUNDED) -> dict[str, float]:
    """The same, if all scores are off by what they may be rounded by: how far rounding grows."""
    proto, folder, sites = _sites(path)
    return _shown(_scaled(proto, sites, by), folder, tried) if sites else {}


def with_steps_off(path: Path, tried: Tried) -> dict[str, float]:
    """The same, if all that is rounded to 8 bits is off by what it may be rounded by before."""
    proto, folder = external.read(path)
    places = [i for i, node in enumerate(proto.graph.node) if node.op_type in QUANTISERS]
    return _shown(_scaled(proto, places, ROUNDED), folder, tried) if places else {}


def _sites(path: Path) -> tuple[onnx.ModelProto, Path, list[int]]:
    """The model, the folder of its data, and the places of its nodes whose first input is scores,
    or queries."""
    proto, folder = external.read(path)
    places = {name: i for i, node in enumerate(proto.graph.node) for name in node.output}
    site_places = [
        places[site.node.outputs[0].name]
        for site in graph.sites(graph.inline(ir.from_proto(proto)))
        if site.node.outputs[0].name in places and site.node.op_type in ("Softmax", "Attention")
    ]
    return proto, folder, site_places


def _scaled(proto: onnx.ModelProto, places: list[int], factor: float) -> bytes:
    """The model with what goes into its nodes at `places` times `factor`."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    array = np.array(factor, np.float32)
    changed.graph.initializer.append(onnx.numpy_helper.from_array(array, "scores_off_by"))
    for at in sorted(places, reverse=True):
        node = changed.graph.node[at]
        inputs, node.input[0] = [node.input[0], "scores_off_by"], f"{node.output[0]}_scores_off"
        changed.graph.node.insert(at, onnx.helper.make_node("Mul", inputs, [node.input[0]]))
    return changed.SerializeToString()


def _shown(changed: bytes, folder: Path, tried: Tried) -> dict[str, float]:
    """By how much the outputs of a changed model differ, by name, relative to their spread."""
    shown: dict[str, float] = {}
    try:
        session = files.session(changed, optimise=False, folder=folder)
        names = [output.name for output in session.get_outputs()]
        for feed, outputs, compared in tried:
            changed_outputs = dict(zip(names, session.run(names, feed.arrays), strict=True))
            for name, out in outputs.items():
                where = compared[name]
                if out.dtype.kind == "f" and where.any():
                    gap = np.abs(
                        out[where].astype(float) - changed_outputs[name][where].astype(float)
                    )
                    share = float(np.nanmax(gap)) / (spread(out[where]) or 1.0)
                    shown[name] = max(shown.get(name, 0.0), share)
    except Exception:  # ONNX Runtime's own types: scores of another type, say
        return {}
    return shown
