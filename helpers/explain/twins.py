"""What `helpers.fuse` would make of the attention sites of a file, read in a copy of its graph.

The file's own graph stays as it is, since a rule has to match it; its copy has shapes inferred, and
gets what is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers import graph
from helpers.fuse import attention, building, masks
from helpers.graph import walks
from helpers.graph.values import dim, number, rank
from helpers.quiet import quiet

Axes = tuple[str, ...]  # in letters; empty where they are not known

# What the operator gets, and the axes: B batch, N heads, S queries, T keys, D width of a head.
OPERANDS: dict[str, Axes] = {
    "query": ("B", "N", "S", "D"),
    "key": ("B", "N", "T", "D"),
    "value": ("B", "N", "T", "D"),
}


@dataclasses.dataclass
class Twin:
    """A site of the file, and what has been read of it in the copy.

    `own` has the file's values by those of the copy, `copies` the other way round. `left` says why
    nothing could be read. `outputs` are the operator's, `result` is what the site gives instead.
    """

    site: graph.Site
    own: Mapping[ir.Value, ir.Value]
    copies: Mapping[ir.Value, ir.Value]
    left: str | None = None
    reading: building.Reading | None = None
    outputs: list[ir.Value] = dataclasses.field(default_factory=list)
    result: ir.Value | None = None

    @property
    def operator(self) -> ir.Node:
        return self.outputs[0].producer()

    def unsure(self) -> str | None:
        """The name of what masks the weights once more, if the file alone does not tell that."""
        before = [(how, self.own[value]) for how, value in self.reading.masked_by]
        for how, value in self.reading.masked_again:
            known = number(value) is not None or masks.once_more((how, self.own[value]), *before)
            if not known:
                return value.name
        return None

    def unread(self, why: str) -> Twin:
        """The same without what has been read."""
        return Twin(self.site, self.own, self.copies, why)

    def file_nodes(self, nodes: Iterable[ir.Node]) -> list[ir.Node]:
        """Of nodes of the copy, those that the file has."""
        values = (self.own.get(node.outputs[0]) for node in nodes)
        return [value.producer() for value in values if value is not None]

    @functools.cached_property
    def new_nodes(self) -> list[ir.Node]:
        """The nodes that a rule makes, in order."""

        def new(node: ir.Node) -> list[ir.Node]:
            return [near for near in walks.producers(node) if near.outputs[0] not in self.own]

        return ordered(self.result, {*walks.walk([self.result.producer()], new)})

    @functools.cached_property
    def taken(self) -> set[ir.Value]:
        """The values of the file that new nodes read."""
        read = {value for node in self.new_nodes for value in node.inputs if value is not None}
        values = {self.reading.numbers.get(value, value) for value in read}
        return {self.own[value] for value in values if value in self.own}

    def operand(self, position: int) -> tuple[ir.Value, Axes]:
        """What the operator's input `position` is made of, as the copy has it, and its axes."""
        value, axes = self.operator.inputs[position], [*OPERANDS.values()][position]
        while value not in self.own:
            node = value.producer()
            axes = _axes_before(node, axes)
            value = node.inputs[0]
        return value, axes


def read(model: ir.Model) -> list[Twin]:
    """The sites of `model` that are not one operator yet, read in a copy of it."""
    copy = model.clone()
    with quiet():
        passes.ShapeInferencePass()(copy)
    own = _own(model, copy)
    copies = {value: its_copy for its_copy, value in own.items()}
    pairs = zip(graph.sites(model), graph.sites(copy), strict=True)
    return [
        _read(copy, its_copy, Twin(site, own, copies)) for site, its_copy in pairs if not site.fused
    ]


def _own(model: ir.Model, copy: ir.Model) -> dict[ir.Value, ir.Value]:
    """The values of `model` by those of its `copy`."""
    own: dict[ir.Value, ir.Value] = {}
    for ours, theirs in zip(model.graphs(), copy.graphs(), strict=True):
        own |= zip(theirs.inputs, ours.inputs, strict=True)
        own |= {theirs.initializers[name]: ours.initializers[name] for name in ours.initializers}
    for ours, theirs in zip(graph.nodes(model), graph.nodes(copy), strict=True):
        own |= zip(theirs.outputs, ours.outputs, strict=True)
    return own


def _read(copy: ir.Model, its_copy: graph.Site, twin: Twin) -> Twin:
    """`twin` with what the site is in the copy, `its_copy`."""
    try:
        reading = attention.read(copy, its_copy, as_rule=True)
    except attention.Left as why:
        return twin.unread(str(why))
    reading.read_elsewhere = False  # a rule has one result
    reading.expands = not _has_rows(twin.own.get(reading.bias))
    outputs, result = building.made(reading)
    last = reading.site.context.outputs[0]
    while last.name != twin.site.context.outputs[0].name:  # an Einsum, made MatMul and Transpose
        node = last.consumers()[0]
        last, result = node.outputs[0], reading.tape.repeated(node, result)
    return dataclasses.replace(twin, reading=reading, outputs=outputs, result=result)


def _has_rows(bias: ir.Value | None) -> bool:
    """Whether the file itself states that `bias` has rows, which a rule's check can see."""
    return rank(bias) in (2, 3, 4) and dim(bias, -2) not in (1, None)


def ordered(result: ir.Value, nodes: set[ir.Node]) -> list[ir.Node]:
    """Those of `nodes` that `result` needs, as it needs them: first what makes a node's first
    input, and so on."""
    done: dict[ir.Node, None] = {}

    def visit(value: ir.Value | None) -> None:
        node = value.producer() if value is not None else None
        if node is None or node not in nodes or node in done:
            return
        for given in node.inputs:
            visit(given)
        done[node] = None

    visit(result)
    return [*done]


def _axes_before(node: ir.Node, axes: Axes) -> Axes:
    """The axes of the first input of `node`, whose result has these."""
    if node.op_type == "Transpose":
        perm = [*(node.attributes.get_ints("perm") or [])]
        known = len(perm) == len(axes)
        return tuple(axes[perm.index(i)] for i in range(len(perm))) if known else ()
    if node.op_type == "Unsqueeze":  # heads in the batch, or one head
        kept = rank(node.inputs[0]) or 0
        return ("…", *axes[-2:]) if kept == 3 else axes[-kept:]
    return axes if node.op_type in graph.ELEMENTWISE else ()
