"""What a rewrite rule for an attention site matches: the nodes, and the parameters by name.

The nodes are the site's own, from the product with the values up to the operands: queries, keys and
values as the operator of the standard takes them, and what is added to the scores or masks them.

Shapes in letters: B batch, N heads, S queries, T keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from helpers import graph
from helpers.explain.statements import unused
from helpers.explain.twins import OPERANDS, Axes, Twin, ordered
from helpers.fuse import forms, scores
from helpers.graph import walks
from helpers.graph.values import dim, number, rank

# Names of inputs that say how a node works, by operator and position.
_PLACES = {
    **dict.fromkeys([("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0)], "shape"),
    **dict.fromkeys([("Squeeze", 1), ("Unsqueeze", 1)], "axes"),
    **{("Slice", i): name for i, name in enumerate(("data", "start", "end", "axes", "steps"))},
    **{("Clip", 1): "lowest", ("Clip", 2): "highest", ("Max", 1): "lowest"},
    **{("Dropout", 1): "ratio", ("Dropout", 2): "training", ("CastLike", 1): "like"},
    **{("Concat", 1): "extra", ("ReduceMax", 1): "axis"},
    **{("DequantizeLinear", 1): "quantised_by", ("DequantizeLinear", 2): "zero_point"},
}
_SETTINGS = {place for place, name in _PLACES.items() if name in ("shape", "axes", "ratio")}
_RESULTS = {
    **{"IsNaN": "is_nan", "ReduceMax": "highest"},
    **dict.fromkeys(("And", "Equal", "Greater", "Less", "Not", "Or"), "holds"),
}


class Skeleton:
    """The nodes of a rule's pattern, in order, and the `names` of its parameters."""

    def __init__(self, twin: Twin) -> None:
        self.twin, site = twin, twin.site
        self.axes: dict[ir.Value, Axes] = {}
        self.names: dict[ir.Value, str] = {}
        self.settings: set[ir.Value] = set()  # parameters such as shapes: not read as numbers
        if twin.reading is None:
            self.before = walks.shortest(site.scores, {site.node}, walks.consumers)[1:-1]
            self.after = walks.shortest(site.node, {site.context}, walks.consumers)[1:-1]
            self.above: list[ir.Node] = []
        else:
            self.before = twin.file_nodes(twin.reading.before)
            self.after = twin.file_nodes(twin.reading.after)
            self.above = twin.file_nodes(twin.reading.above)
        self.spine = [site.scores, *self.before, site.node, *self.after, site.context]
        self.nodes = ordered(site.context.outputs[0], {*self.spine, *self.above, *self._beside()})
        self._sides = dict(self._above_operands())
        self._name_operands()
        for node, i, value in self._inputs():
            if value not in self.names:
                self.names[value] = unused(self._name(node, i, value), {*self.names.values()})
            if (node.op_type, i) in _SETTINGS:
                self.settings.add(value)
        first = {name: i for i, name in enumerate(OPERANDS)}
        in_order = sorted(self.names.items(), key=lambda item: first.get(item[1], len(first)))
        self.names = dict(in_order)
        self._follow_axes()

    def label(self, node: ir.Node) -> str:
        """The name that a node's result has in the pattern."""
        if node in self._sides:
            return {"query": "queries", "key": "keys", "value": "values"}[self._sides[node]]
        if node not in self.spine:
            return _RESULTS.get(node.op_type, "made")
        scored = node is self.twin.site.scores or node in self.before
        return "scores" if scored else "weights"

    def outside_readers(self) -> list[ir.Node | str]:
        """What else reads results inside of the pattern: nodes, and outputs of the graph."""
        inside, readers = {*self.nodes}, []
        for node in self.nodes[:-1]:
            for value in node.outputs:
                readers += [user for user in value.consumers() if user not in inside]
                readers += [value.name] if value.is_graph_output() else []
        return [*dict.fromkeys(readers)]

    def missing(self) -> list[str]:
        """The tensors that the rule's new nodes read and the pattern does not."""
        return sorted(value.name or "" for value in self.twin.taken - {*self.names})

    def _beside(self) -> set[ir.Node]:
        """Nodes that compute an operand from the scores or weights themselves: a maximum, IsNaN."""
        site = self.twin.site
        computed = scores.below(site.scores)
        inputs = {value for node in self.spine[1:] for value in node.inputs if value is not None}
        own = {value for node in self.spine for value in node.outputs}
        beside = {near for value in inputs - own for near in forms.above(value, computed)}
        return beside - {*self.spine}

    def _inputs(self) -> Iterator[tuple[ir.Node, int, ir.Value]]:
        """What comes into the pattern: the node that reads it, at which input, and the value."""
        inside = {value for node in self.nodes for value in node.outputs}
        for node in self.nodes:
            for i, value in enumerate(node.inputs):
                if value is not None and value not in inside:
                    yield node, i, value

    def _operand_values(self) -> dict[str, ir.Value]:
        """The two operands of the scores, and the values, as the products have them."""
        site, reading = self.twin.site, self.twin.reading
        first, second = site.scores.inputs[:2]
        if reading is not None and reading.keys_first:
            first, second = second, first
        weights = (self.after or [site.node])[-1].outputs[0]
        value = next((given for given in site.context.inputs if given is not weights), weights)
        return {"query": first, "key": second, "value": value}

    def _above_operands(self) -> Iterator[tuple[ir.Node, str]]:
        above = {*self.above}
        for side, value in self._operand_values().items():
            start = value.producer()
            for node in walks.walk(
                [start] if start in above else [],
                lambda node: [near for near in walks.producers(node) if near in above],
            ):
                yield node, side

    def _name_operands(self) -> None:
        if self.twin.reading is None:
            operands = [(value, ()) for value in self._operand_values().values()]
        else:
            operands = [self.twin.operand(i) for i in range(len(OPERANDS))]
            operands = [(self.twin.own[copy], axes) for copy, axes in operands]
        for (value, axes), name in zip(operands, OPERANDS, strict=True):
            self.names.setdefault(value, name)
            if axes:
                self.axes.setdefault(value, axes)

    def _name(self, node: ir.Node, i: int, value: ir.Value) -> str:
        """A name for what `node` reads as its input `i` from outside of the pattern."""
        reading, kind, copy = self.twin.reading, node.op_type, self.twin.copies[value]
        if kind == "Reshape" and node in self._sides:  # keys, swapped with three axes
            return "flat" if node.inputs[0] in self.names else "split"
        if (kind, i) in _PLACES:
            return _PLACES[kind, i]
        if reading is not None and copy is reading.cap:
            return "cap"
        if kind in ("Mul", "Div"):
            name = {"Mul": "scale", "Div": "root"}[kind]
            sides = {self._sides.get(user, "") for user in value.consumers()}
            if node in self._sides and len(sides) == 1:
                return f"{name}_{self._sides[node][0]}"  # scale_q, scale_k
            if node in self._sides:
                return name
            return name if number(copy) is not None and node in self.before else "factor"
        if kind == "Where" and i == 0:
            kept = node.inputs[1].producer()
            return "keep" if kept in self.nodes else "masked"
        if kind == "Where":
            masked = "zero" if number(copy) == 0.0 else "other"
            return "lowest" if node in self.before else masked
        if kind in ("Add", "Sub", "Sum") and number(copy) == 0.0:
            return "zero"
        if kind in ("Add", "Sub", "Sum"):
            return "mask" if rank(copy) in (3, 4) and dim(copy, -3) == 1 else "bias"
        return "other"

    def _follow_axes(self) -> None:
        """The axes of what the nodes compute, and of what is added to the scores or masks them."""
        reading = self.twin.reading
        if reading is None or reading.axes != 4:
            return
        for node in self.nodes:
            axes: Axes = ()
            read = [self.axes[value] for value in node.inputs if value in self.axes]
            if node is self.twin.site.scores:
                axes = ("B", "N", "T", "S") if reading.keys_first else ("B", "N", "S", "T")
            elif node.op_type == "Transpose" and read:
                perm = node.attributes.get_ints("perm") or []
                axes = tuple(read[0][i] for i in perm) if len(read[0]) == len(perm) else ()
            elif node.op_type in graph.ELEMENTWISE and read:
                axes = max(read, key=len)
            if axes:
                self.axes[node.outputs[0]] = axes
            if node in self.before:
                self._axes_beside(node, axes)

    def _axes_beside(self, node: ir.Node, scores: Axes) -> None:
        """The axes of what `node` reads beside scores of these axes."""
        for value in node.inputs:
            copy = self.twin.copies[value] if value in self.names else None
            axes = rank(copy)
            if value not in self.axes and axes and axes <= len(scores):
                sizes = zip(range(-axes, 0), scores[-axes:], strict=True)
                letters = tuple(_letter(dim(copy, i), axis) for i, axis in sizes)
                if {*letters} != {"?"}:
                    self.axes[value] = letters


def _letter(size: int | str | None, axis: str) -> str:
    """How an axis of this `size` is written, beside scores that have `axis` there."""
    if size is None or str(size).startswith("unk__"):  # shape inference's name for what it is not
        return "?"
    return "1" if size == 1 else axis
