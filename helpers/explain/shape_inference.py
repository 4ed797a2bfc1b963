"""Where ONNX Runtime's symbolic shape inference stopped, on which some of its fusions depend."""

from __future__ import annotations

import onnx

from helpers.explain.onnxruntime_parts import Inferred
from helpers.graph import walks

_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def stopped_at(inferred: Inferred, raised: bool) -> list[onnx.NodeProto]:
    """The node at which the inference stopped (it goes through them in their order), or, where it
    `raised`, that and the one after it, since either may be at fault; and before them the nodes by
    which it lost the values of a shape that these read."""
    last: list[onnx.NodeProto] = []
    for proto in inferred.nodes:
        if any(name and name not in inferred.types for name in proto.output):
            last = [*last, proto] if raised else last
            break
        last = [proto]
    return [*_lost_values(inferred, last), *last]


def _lost_values(inferred: Inferred, readers: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes above `readers` that make integers whose values are not known, of known ones."""
    producers = {name: node for node in inferred.nodes for name in node.output}

    def unvalued(node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name in producers and name not in inferred.values]

    def above(name: str) -> list[str]:
        return [tensor for tensor in unvalued(producers[name]) if _is_integer(inferred, tensor)]

    starts = [name for node in readers for name in unvalued(node) if _is_integer(inferred, name)]
    return [producers[name] for name in walks.walk(starts, above) if not unvalued(producers[name])]


def _is_integer(inferred: Inferred, name: str) -> bool:
    value = inferred.types.get(name)
    return value is not None and value.type.tensor_type.elem_type in _INTEGERS
