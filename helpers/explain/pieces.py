"""The optimised graph cut into pieces: the nodes around each operator that a fusion has put there.

A piece lies between tensors that both graphs have, by name, so that it can be run on the values
that the original has there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from helpers import files, graph, parity
from helpers.graph import external, walks

Values = Callable[[parity.Outputs], parity.Outputs]  # of named tensors, on given inputs
ValuesOf = Callable[[Iterable[str]], Values]


@dataclass
class Piece:
    """Nodes of the optimised graph around the fused `operator`, between tensors of both graphs."""

    operator: onnx.NodeProto
    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]
    stands_for: set[ir.Node]  # in the original graph
    sites: list[int | str]


class Numbered:
    """The nodes of a graph, by their numbers, and who makes and reads each tensor."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.nodes = list(proto.node)
        self._constants = {initializer.name for initializer in proto.initializer} | {""}
        self._maker: dict[str, int] = {}
        self._readers: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            self._maker.update((name, number) for name in node.output if name)
            for name in filter(None, node.input):
                self._readers.setdefault(name, []).append(number)

    def below(self, number: int) -> list[int]:
        """A node, and those that depend on it, the nearest first."""

        def readers(number: int) -> list[int]:
            outputs = self.nodes[number].output
            return [reader for name in outputs for reader in self._readers.get(name, ())]

        return list(walks.walk([number], readers))

    def first_below(self, number: int, tensors: set[str]) -> list[str]:
        """The nearest of `tensors` after a node, or none."""
        outputs = (name for below in self.below(number) for name in self.nodes[below].output)
        return next(([name] for name in outputs if name in tensors), [])

    def cut(self, outputs: list[str], tensors: set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """The nodes that compute `outputs` from `tensors` and inputs of the graph, and from which
        of these."""

        def is_inner(name: str) -> bool:
            return name in self._maker and name not in tensors and name not in self._constants

        def above(number: int) -> list[int]:
            return [self._maker[name] for name in self.nodes[number].input if is_inner(name)]

        inside = list(walks.walk((self._maker[name] for name in outputs), above))
        read = dict.fromkeys(name for number in inside for name in self.nodes[number].input)
        inputs = [name for name in read if not is_inner(name) and name not in self._constants]
        return [self.nodes[number] for number in sorted(inside)], inputs


def pieces(model: ir.Model, proto: onnx.ModelProto, sites: list[graph.Site]) -> list[Piece]:
    """The pieces around the operators of `proto`, the optimised `model`, that it has put there.

    `sites` are those of `model`.
    """
    tensors = {output.name for node in model.graph for output in node.outputs if output.name}
    tensors |= {value.name for value in model.graph.inputs}
    was = {site.node.outputs[0].name for site in sites if site.fused}
    numbered = Numbered(proto.graph)
    pieces_of_sites = []
    for number, node in enumerate(numbered.nodes):
        if (node.domain, node.op_type) not in graph.FUSED or node.output[0] in was:
            continue
        own = [name for name in node.output if name in tensors]
        outputs = own or numbered.first_below(number, tensors)
        if not outputs:
            continue
        nodes, inputs = numbered.cut(outputs, tensors)
        was_there = _between(model, outputs, set(inputs))
        within = [i for i, site in enumerate(sites) if site.context in was_there] or [outputs[0]]
        pieces_of_sites.append(Piece(node, nodes, inputs, outputs, was_there, within))
    return pieces_of_sites


def longer(model: ir.Model, proto: onnx.ModelProto, pieces: list[Piece]) -> Iterator[Piece]:
    """Each of `pieces` with what follows it, to the first tensor that both graphs have, and that is
    made by another node than in the original: a projection may have been left out there."""
    makers = {output.name: node for node in model.graph for output in node.outputs if output.name}
    tensors = {*makers, *(value.name for value in model.graph.inputs)}
    numbered = Numbered(proto.graph)
    fused = {node.output[0]: piece for piece in pieces for node in piece.nodes}
    for piece in pieces:
        below = numbered.below(numbered.nodes.index(piece.operator))
        changed = (
            node.output[0]
            for node in map(numbered.nodes.__getitem__, below)
            if node.output[0] in makers and not _is_same(node, makers[node.output[0]])
            if fused.get(node.output[0]) is not piece
        )
        output = next(changed, None)
        if output is None or output in fused:
            continue
        own = {name for number in below for name in numbered.nodes[number].output}
        nodes, inputs = numbered.cut([output], tensors - own)
        was_there = _between(model, [output], set(inputs))
        yield Piece(piece.operator, nodes, inputs, [output], was_there, piece.sites)


def _is_same(node: onnx.NodeProto, was: ir.Node) -> bool:
    """Whether both do the same to the same tensors."""
    was = ir.to_proto(was)
    same = (node.op_type, node.domain, [*node.input]) == (was.op_type, was.domain, [*was.input])
    given, before = (
        {one.name: onnx.helper.get_attribute_value(one) for one in each.attribute}
        for each in (node, was)
    )
    return same and str(given) == str(before)


def _between(model: ir.Model, outputs: list[str], stop: set[str]) -> set[ir.Node]:
    """The nodes of the original graph between its tensors `stop` and `outputs`."""

    def above(node: ir.Node) -> list[ir.Node]:
        inputs = (value for value in node.inputs if value is not None and value.name not in stop)
        return [value.producer() for value in inputs if value.producer()]

    return set(walks.walk((graph.find(model, name) for name in outputs), above))


def around(path: Path, names: Iterable[str], *, named: Path | None = None) -> Values:
    """Runs the original at `path` for the values of the tensors `names`; its answers are kept.

    Raises `BadInput` about the file `named`, where what that was brought to at `path` does not run.
    """
    proto, folder = external.read(path)
    inputs = {value.name for value in proto.graph.input}
    asked = [name for name in dict.fromkeys(names) if name not in inputs]
    if not asked:
        return dict
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    try:
        session = files.session(proto.SerializeToString(), optimise=False, folder=folder)
    except Exception as error:  # a later opset, of which ONNX Runtime has fewer kernels
        raise files.refused(path, error, named=named) from None
    del proto
    answers: list[tuple[parity.Outputs, parity.Outputs]] = []  # for each feed that was run

    def run(arrays: parity.Outputs) -> parity.Outputs:
        for feed, answer in answers:
            if feed is arrays:
                return answer
        values = dict(zip(asked, session.run(asked, arrays), strict=True))
        answers.append((arrays, {**arrays, **values}))
        return answers[-1][1]

    return run


def alone(piece: Piece, proto: onnx.ModelProto, values: parity.Outputs) -> onnx.ModelProto:
    """A model of the piece, of the model `proto`, alone; its inputs have the types of `values`."""
    inputs = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype),
            [None] * values[name].ndim,
        )
        for name in piece.inputs
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in piece.outputs]
    read = {name for node in piece.nodes for name in node.input}
    weights = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    body = onnx.helper.make_graph(piece.nodes, "piece", inputs, outputs, weights)
    return onnx.helper.make_model(
        body, opset_imports=proto.opset_import, ir_version=proto.ir_version
    )
