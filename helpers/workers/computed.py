"""The precision that products were computed in, as far as a runtime tells.

Products are matrix products, convolutions and attention: nearly all of a Transformer's time. What a
runtime is asked for is not always what it does: OpenVINO takes bf16 where the CPU has it, a session
of ONNX Runtime leaves products of an 8-bit graph in fp32 where it has no kernel for them.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx

from helpers import files, graph
from helpers.workers import processor

if TYPE_CHECKING:
    import openvino

_PRODUCT = re.compile(r"MatMul|Gemm|Conv|Attention|Einsum")  # in the name of an operator

# By the names that ONNX Runtime, OpenVINO and PyTorch have for them.
_CALLED = {
    **{"float": "fp32", "f32": "fp32", "float32": "fp32"},
    **{"float16": "fp16", "f16": "fp16"},
    **{"bfloat16": "bf16", "bf16": "bf16"},
    **{"double": "fp64", "f64": "fp64", "float64": "fp64"},
}
_BY_INTEGER_WEIGHTS = ("MatMulNBits", "MatMulIntegerToFloat")
_OPENVINO_PRODUCTS = {"FullyConnected", "MatMul", "Convolution", "Deconvolution", "ScaledAttn"}


def called(name: str) -> str:
    """What a table calls a type that a runtime calls `name`."""
    return _CALLED.get(name, "int8" if name[0] in "iu" else name)


def in_words(counts: Mapping[str, int]) -> str:
    """Precisions by the number of products, the most frequent first: "int8 and fp32"."""
    *others, last = [name for name, _ in Counter(counts).most_common()] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def of_events(events: Iterable[Mapping], path: str) -> Counter[str]:
    """How many operators of ONNX Runtime's profile computed products, by precision.

    `path` is the model's file. Counts each node once.
    """
    found, levels = {}, None
    for event in events:
        arguments = event["args"]
        operator, types = arguments["op_name"], arguments["input_type_shape"]
        if not _PRODUCT.search(operator) or not types:
            continue
        precision = called(next(iter(types[0])))
        if operator == "MatMulNBits":
            levels = _accuracy_levels(path) if levels is None else levels
            # A node that the session made has the session's own level, which is 4.
            if levels.get(event["name"].removesuffix("_kernel_time"), 4) == 4:
                precision = "int8"
        elif graph.is_quantised(operator):
            precision = "int8"
        found[event["name"], arguments["node_index"]] = precision
    return Counter(found.values())


def _accuracy_levels(path: str) -> dict[str, int]:
    """Of each MatMulNBits in the file, by its name: at 4, it quantises its input to 8 bits."""
    return {
        graph.name(node): node.attributes.get_int("accuracy_level", 0)
        for node in graph.nodes(graph.load(path, weights=False))
        if node.op_type == "MatMulNBits"
    }


def of_openvino(model: "openvino.Model", compiled: "openvino.CompiledModel") -> Counter[str]:
    """How many nodes of what OpenVINO made of `model` compute products, by precision.

    Its runtime model tells it of each. A Subgraph is generated code for a part of the graph, which
    is whole attention where the name of a product is among those of its parts.
    """
    names = {op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == "MatMul"}
    group = int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
    quantises = group > 0 and _may_quantise()
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        told = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        parts = told.get("originalLayersNames", "").split(",")
        attention = told["layerType"] == "Subgraph" and not names.isdisjoint(parts)
        if told["layerType"] not in _OPENVINO_PRODUCTS and not attention:
            continue
        precision, kernel = told["runtimePrecision"], told["primitiveType"].rpartition("_")[2]
        # Where weights alone are in integers, the kernel is one for floats: it is only in fp32 that
        # the other operand may be quantised as it runs.
        if precision[0] in "iu" and kernel in _CALLED and not (kernel == "f32" and quantises):
            precision = kernel
        counts[called(precision)] += 1
    return counts


def of_plugin(path: str, handed_back: Collection[tuple[str, str]], floats: str) -> Counter[str]:
    """How many products of the file at `path` OpenVINO's plugin computes, by precision.

    It tells nothing of what it runs, so this is read off the file: what is in 8 bits there is
    computed in them, the rest in `floats`. `handed_back` are operators with the names of nodes.
    Products by integer weights alone are computed in bf16 where that is it, and else in 8 bits if
    the other operand may be quantised as it runs; those of integers without a scale in fp32. (As
    the runtime model of OpenVINO 2026.4 has it of each of these operators alone.)
    """
    by_weights = "int8" if floats == "fp32" and _may_quantise() else floats
    counts: Counter[str] = Counter()
    for node in graph.nodes(graph.load(path, weights=False)):
        operator = node.op_type
        if not _PRODUCT.search(operator) or (operator, node.name or "") in handed_back:
            continue
        makers = [value and value.producer() for value in node.inputs[:2]]
        integer = [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]
        if operator in ("MatMulInteger", "ConvInteger"):
            counts["fp32"] += 1
        elif operator in _BY_INTEGER_WEIGHTS or integer == [False, True]:
            counts[by_weights] += 1
        else:
            counts["int8" if all(integer) else floats] += 1
    return counts


def _may_quantise() -> bool:
    """Whether OpenVINO may quantise what is multiplied by integer weights in fp32, as it does by
    default where the CPU has VNNI (its dnnl_fullyconnected_primitive.cpp)."""
    found = processor.instruction_sets()
    return found is None or "VNNI" in found


def plugin_floats(openvino: Mapping[str, str | int]) -> str:
    """The type in which OpenVINO's plugin computes products of floats, with these properties.

    Seen in one: of 1 + 2⁻⁹ + 2⁻¹⁸, bf16 keeps 1, fp16 the first two terms, and fp32 all three.
    """
    terms = np.float32([1, 2**-9, 2**-18]).cumsum(dtype=np.float32)
    named = onnx.helper.make_tensor_value_info
    x, y = (named(name, onnx.TensorProto.FLOAT, [16, 16]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", [x], [y], [weight]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    session = files.session(model.SerializeToString(), threads=1, openvino=openvino)
    given = np.full((16, 16), terms[2])
    result = session.run(None, {"x": given})[0].max()
    found = dict(zip(terms.tolist(), ("bf16", "fp16", "fp32"), strict=True))
    return found.get(float(result), "not told")
