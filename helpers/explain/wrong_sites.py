"""Which fused sites compute something else than before: each by itself, on the values around it.

The optimised graph shares most of its tensors with the graph that it came from, by name. Around a
fused operator they cut out a piece, from the tensors that both have above it to one that both have
below. The piece is run on the values that the original graph has there, so that a wrong site does
not spoil the verdict on those after it, and must give what the original has below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import files, graph, parity
from helpers.explain.reasons import Explanation, Verdict
from helpers.feeds import Feed
from helpers.graph import external, walks


@dataclass
class Piece:
    """Nodes of the optimised graph around a fused operator, between tensors of both graphs."""

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]
    stands_for: set[ir.Node]  # in the original graph
    sites: list[int | str]


def mark(answer: Explanation, whole: parity.Candidate, wrong: set[int | str]) -> None:
    """Add to `answer` what `find` returned: the comparison, and which sites are wrong."""
    answer.parity = whole
    answer.parity.name = "the optimised graph"
    for site in wrong:
        if isinstance(site, str):  # it fused what is no attention
            answer.sites.append(Verdict(site, None, True, wrong=True))
        else:
            answer.sites[site].wrong = answer.sites[site].fused


def find(
    original: files.Opened,
    fused: str | Path,
    cases: list[Feed],
    description: str,
    model: ir.Model | None = None,
    sites: list[graph.Site] | None = None,
    read: files.Opened | None = None,
) -> tuple[parity.Candidate, set[int | str]]:
    """Compare the model `fused` with the `original`, and say which of its sites are wrong.

    `model` is the graph that was fused, if it has been read, with its `sites`: the `original`, or
    what was `read` in its place, as where it had to be brought to another opset first.

    Returns the comparison of all, and numbers in ``graph.sites`` of the `original`, or the
    name of a tensor where an operator stands for what was no site there. None where parity holds;
    every fused one where the fault is in none alone. Of a model that does not load, those are wrong
    that have taken away what is read elsewhere.
    """
    fused = Path(fused).absolute()
    candidate = _candidate(original, fused)
    whole = parity.compare(original, [candidate], cases, description).candidates[0]
    if whole.held:
        return whole, set()
    proto = onnx.load(fused)
    read = read or original
    if model is None:
        model, sites = read.model.clone(), None  # whose shapes may be inferred
    sites = graph.sites(model) if sites is None else sites
    all_pieces = pieces(model, proto, sites)
    every = {site for piece in all_pieces for site in piece.sites}
    missing_nodes = _gone(model, proto)
    if missing_nodes or not all_pieces:
        return whole, _about(sites, all_pieces, missing_nodes) or every
    tensors = [name for piece in all_pieces for name in (*piece.outputs, *piece.inputs)]
    around = _around(read.path, list(dict.fromkeys(tensors)), named=original.path)
    wrong = _wrong_pieces(around, proto, all_pieces, cases, description)
    return whole, {site for piece in wrong for site in piece.sites} or every


def _wrong_pieces(
    around: Callable[[parity.Outputs], parity.Outputs],
    proto: onnx.ModelProto,
    pieces: list[Piece],
    cases: list[Feed],
    description: str,
) -> list[Piece]:
    """Those of `pieces`, of the optimised model `proto`, that compute something else than the
    original, run by `around`, does there. None where it has no numbers to compare there."""
    outputs = list(dict.fromkeys(name for piece in pieces for name in piece.outputs))
    runs = [_runner(piece, proto, around, outputs) for piece in pieces]

    def reference(arrays: parity.Outputs) -> parity.Outputs:
        values = around(arrays)
        return {name: values[name] for name in outputs}

    try:
        judged = parity.compare(reference, runs, cases, description).candidates
    except files.BadInput:  # no numbers to compare there
        return []
    return [piece for piece, candidate in zip(pieces, judged, strict=True) if not candidate.held]


def _candidate(original: files.Opened, fused: Path) -> parity.Model:
    """The model `fused`, given those inputs of the `original` that it still has."""
    before = {value.name for value in original.model.graph.inputs}
    proto = onnx.load(fused, load_external_data=False)
    after = {value.name for value in proto.graph.input}
    del proto  # it holds the weights
    if not after < before:
        return fused
    session: list[ort.InferenceSession] = []

    def run(arrays: parity.Outputs) -> parity.Outputs:
        if not session:
            session.append(files.session(fused))
        names = [output.name for output in session[0].get_outputs()]
        given = {name: array for name, array in arrays.items() if name in after}
        return dict(zip(names, session[0].run(None, given), strict=True))

    return run


class _Numbered:
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

    def first_below(self, number: int, tensors: set[str]) -> list[str]:
        """The nearest of `tensors` after a node, or none."""

        def below(number: int) -> list[int]:
            outputs = self.nodes[number].output
            return [reader for name in outputs for reader in self._readers.get(name, ())]

        numbers = walks.walk([number], below)
        outputs = (name for number in numbers for name in self.nodes[number].output)
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
    numbered = _Numbered(proto.graph)
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
        pieces_of_sites.append(Piece(nodes, inputs, outputs, was_there, within))
    return pieces_of_sites


def _between(model: ir.Model, outputs: list[str], stop: set[str]) -> set[ir.Node]:
    """The nodes of the original graph between its tensors `stop` and `outputs`."""

    def above(node: ir.Node) -> list[ir.Node]:
        inputs = (value for value in node.inputs if value is not None and value.name not in stop)
        return [value.producer() for value in inputs if value.producer()]

    return set(walks.walk((graph.find(model, name) for name in outputs), above))


def _gone(model: ir.Model, proto: onnx.ModelProto) -> list[ir.Node]:
    """The nodes of the original graph whose results are read in `proto`, and made no longer."""
    computed = {name for node in proto.graph.node for name in node.output}
    computed |= {value.name for value in (*proto.graph.input, *proto.graph.initializer)}
    read = [name for node in proto.graph.node for name in node.input]
    read += [output.name for output in proto.graph.output]
    makers = {output.name: node for node in model.graph for output in node.outputs}
    return [makers[name] for name in dict.fromkeys(read) if name not in computed and name in makers]


def _about(
    sites: list[graph.Site], pieces: list[Piece], missing_nodes: list[ir.Node]
) -> set[int | str]:
    """The sites whose pieces stand for `missing_nodes`, or else the nearest ones above."""
    about = {
        site
        for piece in pieces
        if not piece.stands_for.isdisjoint(missing_nodes)
        for site in piece.sites
    }
    if about:
        return about
    number = {site.context: i for i, site in enumerate(sites) if site.context}
    above = (number[node] for node in walks.upstream(*missing_nodes) if node in number)
    nearest = next(above, None)
    return set() if nearest is None else {nearest}


def _around(
    path: Path, names: list[str], *, named: Path
) -> Callable[[parity.Outputs], parity.Outputs]:
    """Runs the original at `path` for the values of the tensors `names`; its answers are kept.

    Raises `BadInput` about the file `named`, where what that was brought to at `path` does not run.
    """
    proto, folder = external.read(path)
    inputs = {value.name for value in proto.graph.input}
    asked = [name for name in names if name not in inputs]
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


def _runner(
    piece: Piece,
    proto: onnx.ModelProto,
    around: Callable[[parity.Outputs], parity.Outputs],
    tensors: list[str],
) -> Callable[[parity.Outputs], parity.Outputs]:
    """A candidate that gives `tensors` as the original does, those of the piece by the piece."""
    sessions: list[ort.InferenceSession] = []

    def run(arrays: parity.Outputs) -> parity.Outputs:
        values = around(arrays)
        if not sessions:
            sessions.append(files.session(_alone(piece, proto, values).SerializeToString()))
        feed = {name: np.asarray(values[name]) for name in piece.inputs}
        outputs = dict(zip(piece.outputs, sessions[0].run(piece.outputs, feed), strict=True))
        return {name: outputs.get(name, values[name]) for name in tensors}

    return run


def _alone(piece: Piece, proto: onnx.ModelProto, values: parity.Outputs) -> onnx.ModelProto:
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
