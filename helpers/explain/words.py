"""How a node, a value or another operand of a check is written: under the names of the file."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from helpers.explain.reasons import Node


def writer(made: dict[str, onnx.NodeProto], name: Callable) -> Callable[[Any], str | None]:
    """Renders values of a fusion's variables; `made` has the nodes by output, `name` names one.

    Answers None for what tells nothing of the graph: methods, modules, large dictionaries.
    """

    def node(proto: onnx.NodeProto) -> str:
        inputs, outputs = ", ".join(proto.input), ", ".join(filter(None, proto.output))
        return f"{proto.op_type} {name(proto).name} ({inputs}) -> {outputs}"

    def write(value: Any) -> str | None:
        if isinstance(value, onnx.NodeProto):
            return node(value)
        if isinstance(value, onnx.TensorProto):
            return f"initializer {value.name} {list(value.dims)}"
        if isinstance(value, str):
            above = made.get(value)
            return f"{value} (from {above.op_type} {name(above).name})" if above else repr(value)
        if isinstance(value, np.ndarray) and value.size > 8:
            return f"an array {value.dtype} {list(value.shape)}"
        if isinstance(value, (bool, int, float, np.ndarray, np.generic, type(None))):
            return str(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value)
        if isinstance(value, (list, tuple, set)) or type(value).__name__.startswith("Repeated"):
            parts = [write(one) for one in list(value)[:8]]
            more = ", …" if len(value) > 8 else ""
            return None if None in parts else f"[{', '.join(parts)}{more}]"
        return None

    return write


_MANY = 8  # items of a list, and elements of a constant, that are written out


class Names:
    """Names as the file has them, of nodes and values of a graph that has changed since."""

    def __init__(self, nodes: set[str], tensors: set[str], made: set[ir.Node | ir.Value]) -> None:
        """`nodes` and `tensors` are the file's; what is in `made` has its name by chance."""
        self._nodes, self._tensors, self._made = nodes, tensors, made

    def tensor(self, value: ir.Value | None) -> str:
        """The value's name, or of the nearest up or down the graph that has a name in the file."""
        queue, seen = deque([value]), {value}
        while queue:
            value = queue.popleft()
            if value is None:
                continue
            if value.name in self._tensors and value not in self._made:
                return value.name
            above, below = value.producer(), value.consumers()
            near = [*(above.inputs if above else ()), *(v for node in below for v in node.outputs)]
            queue += (one for one in near if one not in seen)
            seen.update(near)
        return ""

    def node(self, node: ir.Node) -> Node:
        output = self.tensor(node.outputs[0])
        known = node.name in self._nodes and node not in self._made
        return Node(node.op_type, node.name if known else output, output)

    def show(self, thing: Any) -> str:
        """An operand of a check, in words: nodes and tensors by their names."""
        if isinstance(thing, ir.Node):
            inputs = ", ".join(map(self.tensor, thing.inputs))
            outputs = ", ".join(map(self.tensor, thing.outputs))
            return f"{thing.op_type} {self.node(thing).name} ({inputs}) -> {outputs}"
        if isinstance(thing, ir.Value):
            return self._value(thing)
        if isinstance(thing, ir.Attr):
            return self.show(thing.value)
        if isinstance(thing, dict):
            inner = (f"{key}: {self.show(one)}" for key, one in itertools.islice(thing.items(), 20))
            return "{" + ", ".join(inner) + "}"
        if isinstance(thing, list | tuple | set):
            inner = [self.show(one) for one in itertools.islice(thing, _MANY)]
            return f"[{', '.join(inner)}{', …' if len(thing) > _MANY else ''}]"
        return str(thing)

    def operand(self, thing: Any) -> str | None:
        """The same for what tells of the graph; None for modules, functions and the like."""
        plain = (ir.Node, ir.Value, ir.Attr, ir.Shape, ir.SymbolicDim)
        plain = (*plain, str, int, float, dict, list, tuple, set, type(None))
        return self.show(thing) if isinstance(thing, plain) else None

    def _value(self, value: ir.Value) -> str:
        made, tensor = value.producer(), ir.convenience.get_const_tensor(value)
        if made is not None:
            text = self.show(made)
        else:
            text = f"{'input' if value.is_graph_input() else 'initializer'} {self.tensor(value)}"
        text += f", shape {value.shape}" if value.shape is not None else ", no shape"
        if tensor is not None and tensor.size <= _MANY:
            text += f", value {tensor.numpy().tolist()}"
        return text
