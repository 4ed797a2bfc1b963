"""How a node, a value or another operand of a check is written: under the names of the file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from helpers.explain.reasons import Node
from helpers.graph import walks

MANY = 8  # items of a list, and elements of a constant, that are written out


class Writer:
    """Writes what a fusion's variables hold; a subclass knows one kind of graph."""

    def write(self, value: Any) -> str | None:
        """An operand of a check, in words; None for what tells nothing of the graph: methods,
        modules, large dictionaries."""
        raise NotImplementedError

    def _plain(self, value: Any) -> str | None:
        """Numbers, truth values, None, and lists of anything."""
        if isinstance(value, (bool, int, float, type(None))):
            return str(value)
        if not isinstance(value, (list, tuple, set)):
            return None
        parts = [self._item(item) for item in itertools.islice(value, MANY)]
        more = ", …" if len(value) > MANY else ""
        return None if None in parts else f"[{', '.join(parts)}{more}]"

    def _item(self, value: Any) -> str | None:
        return self.write(value)


def written_node(node: Node, inputs: Iterable[str], outputs: Iterable[str]) -> str:
    """A node between its tensors, as all answers write it."""
    return f"{node.operator} {node.name} ({', '.join(inputs)}) -> {', '.join(outputs)}"


class ProtoWriter(Writer):
    """Writes what ONNX Runtime's fusions hold: protobuf's nodes, and tensors by their names.

    `producers` has the nodes by output; `name` gives a node under the file's name for it.
    """

    def __init__(
        self, producers: dict[str, onnx.NodeProto], name: Callable[[onnx.NodeProto], Node]
    ) -> None:
        self._producers, self._name = producers, name

    def write(self, value: Any) -> str | None:
        if isinstance(value, onnx.NodeProto):
            return written_node(self._name(value), value.input, filter(None, value.output))
        if isinstance(value, onnx.TensorProto):
            return f"initializer {value.name} {list(value.dims)}"
        if isinstance(value, str):
            return self._tensor(value)
        if isinstance(value, np.ndarray) and value.size > MANY:
            return f"an array {value.dtype} {list(value.shape)}"
        if isinstance(value, (np.ndarray, np.generic)):
            return str(value.tolist())
        if type(value).__name__.startswith("Repeated"):  # protobuf's lists
            value = list(value)
        return self._plain(value)

    def _tensor(self, name: str) -> str:
        above = self._producers.get(name)
        return f"{name} (from {above.op_type} {self._name(above).name})" if above else repr(name)


class IrWriter(Writer):
    """Writes what rewrite rules hold: nodes and values of onnx_ir, in a graph that has changed
    since, by the names that the file has."""

    def __init__(
        self, nodes: set[str], tensors: set[str], created: set[ir.Node | ir.Value]
    ) -> None:
        """`nodes` and `tensors` are the file's; what is in `created` has its name by chance."""
        self._nodes, self._tensors, self._created = nodes, tensors, created

    def tensor(self, value: ir.Value | None) -> str:
        """The value's name, or of the nearest up or down the graph that has a name in the file."""
        starts = [] if value is None else [value]
        named = (
            near.name
            for near in walks.walk(starts, _neighbours)
            if near.name in self._tensors and near not in self._created
        )
        return next(named, "")

    def node(self, node: ir.Node) -> Node:
        output = self.tensor(node.outputs[0])
        in_file = node.name in self._nodes and node not in self._created
        return Node(node.op_type, node.name if in_file else output, output)

    def write(self, value: Any) -> str | None:
        telling = (ir.Node, ir.Value, ir.Attr, ir.Shape, ir.SymbolicDim)
        telling = (*telling, str, int, float, dict, list, tuple, set, type(None))
        return self.show(value) if isinstance(value, telling) else None

    def show(self, value: Any) -> str:
        """The same for what is known to tell of the graph: all of it is written."""
        if isinstance(value, ir.Node):
            inputs, outputs = map(self.tensor, value.inputs), map(self.tensor, value.outputs)
            return written_node(self.node(value), inputs, outputs)
        if isinstance(value, ir.Value):
            return self._value(value)
        if isinstance(value, ir.Attr):
            return self.show(value.value)
        if isinstance(value, dict):
            items = itertools.islice(value.items(), 20)
            inner = (f"{key}: {self.show(item)}" for key, item in items)
            return "{" + ", ".join(inner) + "}"
        return self._plain(value) or str(value)

    def _item(self, value: Any) -> str:
        return self.show(value)

    def _value(self, value: ir.Value) -> str:
        producer, tensor = value.producer(), ir.convenience.get_const_tensor(value)
        if producer is not None:
            text = self.show(producer)
        else:
            text = f"{'input' if value.is_graph_input() else 'initializer'} {self.tensor(value)}"
        text += f", shape {value.shape}" if value.shape is not None else ", no shape"
        if tensor is not None and tensor.size <= MANY:
            text += f", value {tensor.numpy().tolist()}"
        return text


def _neighbours(value: ir.Value) -> list[ir.Value]:
    """What `value` is computed from, and then what is computed from it."""
    producer = value.producer()
    above = [given for given in producer.inputs if given is not None] if producer else []
    return [*above, *(output for node in value.consumers() for output in node.outputs)]
