"""Attention, lifted from the graph itself: softmax(scale·Q·Kᵀ + bias)·V becomes one operator.

No pattern of operators. From a site (`graph.sites`) the walk goes from the product of queries with
keys to the Softmax, and on to the product with the values. What lies between is read as what it
does to the scores x:

    x·c, x/c      a number                  → scale (one number a query: into the queries)
    x + b, x - b  any tensor                → bias
    where(m, x, -inf), where(m, -inf, x)    → bias of 0 and -inf
    c·tanh(x/c)                             → softcap
    casts, dropouts, reshapes, transposes   → followed
    where(no key, 0, weights)               → left out: the operator's result is finite there
    where(m, weights, 0), weights·m         → left out where m is what masks the scores
    weights·h     one number a head or query → result·h

so that scale, mask and relative positions may be written in any way and order. Anything else there
leaves the site as it is, with the reason. What computes Q, K, V and the bias (projections, rotary
embeddings, caches) is not touched.

Shapes: queries (B, N, S, D), keys (B, N, T, D), values (B, N, T, Dv), or with any other number of
axes before the last two; the operator gets them with four. Follows ONNX's Attention, opset 23.
"""

import dataclasses

import onnx_ir as ir

from helpers import graph
from helpers.fuse import forms, masks, products
from helpers.fuse.building import RESHAPES, Reading, build
from helpers.fuse.scores import SAME, Left, ScoreReader, below, between, changes_type
from helpers.graph.values import number, rank


def fuse(model: ir.Model, site: graph.Site) -> ir.Node:
    """Replace what `site` computes by a standard Attention, which is returned.

    Raises `Left`, with what `model` computes as it was, where that cannot be done.
    """
    return build(read(model, site))


def read(model: ir.Model, site: graph.Site, *, as_rule: bool = False) -> Reading:
    """What `site` computes. Its products are made MatMul in `model`; nothing else is changed.

    `as_rule`: so that a rewrite rule can do it, of which a branch's ends at the branch. Raises
    `Left` where no operator does that.
    """
    if site.node.op_type == "QLinearSoftmax":
        raise Left("it is in QOperator form: fuse before quantising, or use QuantFormat.QDQ")
    weights = next(value for value in site.context.inputs if value in below(site.node))
    scores, context = products.as_matmul(site.scores), products.as_matmul(site.context, weights)
    for product, rewritten in ((site.scores, scores), (site.context, context)):
        if rewritten is None:
            written = product.attributes.get_string("equation", "") or graph.name(product)
            raise Left(f"{product.op_type} {written} is no product of two matrices")
    reader = _Reader(model, dataclasses.replace(site, scores=scores, context=context))
    reader.reading.as_rule = as_rule
    return reader.read()


class _Reader(ScoreReader):
    """Reads a site from its first product to its last into a `Reading`, which is all its state."""

    def read(self) -> Reading:
        """All that the site does; raises `Left` where no operator does that."""
        reading, site = self.reading, self.reading.site
        softmax, context = site.node, site.context
        if softmax.op_type != "Softmax":
            advice = f"; {graph.BEFORE_QUANTISING}" * graph.is_quantised(softmax.op_type)
            raise Left(f"{graph.name(softmax)} is a {softmax.op_type}, and not a Softmax{advice}")
        before = self._between(self.of_scores, site.scores, softmax.inputs[0])
        reading.before = [node for node, _ in before]
        # Where the keys are on the last axis but one, everything is read as transposed.
        reading.flipped = reading.keys_first = self._axis_of_keys() == -2
        self._read_operands(*site.scores.inputs)
        for node, position in before:
            self._read_score(node, position)
        self._check_masked()
        if reading.in_tanh:
            raise Left("a tanh is over the scores, without a factor after it")
        axes = rank(softmax.inputs[0]) or 4
        if softmax.attributes.get_int("axis", -1) % axes != axes - (2 if reading.flipped else 1):
            raise Left(f"{graph.name(softmax)} is over another axis than the keys'")
        weights = next(value for value in context.inputs if value in self.of_weights)
        after = self._between(self.of_weights, softmax, weights)
        reading.after = [node for node, _ in after]
        for node, position in after:
            self._read_weight(node, position)
        self._read_values(weights)
        return reading

    # ── Weights ─────────────────────────────────────────────────────────────────────────────────

    def _read_weight(self, node: ir.Node, position: int) -> None:
        """What `node`, which gets them as its input `position`, does to the weights."""
        reading, kind, inputs = self.reading, node.op_type, node.inputs
        if kind in SAME:
            reading.casts |= changes_type(node)
        elif kind in RESHAPES or kind == "Transpose":
            self._reshape(node)
        elif kind == "Mul" or (kind == "Div" and position == 0):
            self._multiply_weights(node, inputs[1 - position])
        elif kind == "Slice" and reading.added_keys is not None and number(inputs[1]) == 0.0:
            reading.drops_added_keys = True
        elif kind == "Where" and position > 0:
            self._choose_weights(node, inputs[3 - position], position == 1)
        elif not forms.keeps_weights(node, position):
            raise Left(between(node, "the Softmax and the values"))

    def _multiply_weights(self, node: ir.Node, factor: ir.Value) -> None:
        """weights·factor, or where `node` is Div, by it."""
        if not self._masks_again(node.op_type, factor, node):
            by_rows = self._of_rows(factor, "weights")
            self.reading.result_scales.append((node.op_type, by_rows))

    def _choose_weights(self, node: ir.Node, other: ir.Value, keeps: bool) -> None:
        """where(condition, weights, other) if it `keeps` them, else where(condition, other, …)."""
        reading, condition = self.reading, node.inputs[0]
        keys = -2 if reading.flipped else -1
        if not keeps and forms.never_holds(condition, self.of_weights):
            return
        if number(other) != 0.0:
            raise Left(f"Where {graph.name(node)} puts {other.name} in the place of weights")
        if self._masks_again("keep" if keeps else "masked", condition, node):
            return
        if forms.tells_no_key(condition, not keeps, self.of_scores, keys):
            return
        if not self._is_by_rows(condition) or reading.reshapes or condition in self.of_scores:
            more = "masks more after the Softmax than is known to be masked before"
            raise Left(f"Where {graph.name(node)} {more}")
        reading.by_rows.append(condition)
        kept = condition if keeps else self.tape.op("Not", [condition])
        factor = self.tape.op("CastLike", [self._upright(kept), reading.query])
        reading.result_scales.append(("Mul", factor))

    def _masks_again(self, how: str, value: ir.Value, node: ir.Node) -> bool:
        """Whether `node` masks weights by `value` that are 0 already, but in rows without a key."""
        reading = self.reading
        again = masks.covers(reading.kept, masks.read(how, value, self._places(value, node)))
        if again:
            reading.masked_again.append((how, value))
        return again

    def _read_values(self, weights: ir.Value) -> None:
        """The values, and what takes the result."""
        reading, context = self.reading, self.reading.site.context
        if (context.inputs[0] is weights) is reading.flipped:
            raise Left(f"{graph.name(context)} does not sum over the keys")
        reading.last = self._last(context)
        value = self._swapped(context.inputs[0]) if reading.flipped else context.inputs[1]
        reader = self._other_reader()
        if reader and reading.reshapes:
            raise Left(f"the weights are read by {reader} too, in another layout")
        reading.read_elsewhere = bool(reader)
        if reading.added_keys is not None and reading.drops_added_keys:
            value = reading.padded(reading.broadcast(value, reading.query, heads=False))
        reading.value = value

    def _last(self, context: ir.Node) -> ir.Node:
        """The last node that stands for the site: the product, or a Reshape that changes nothing.

        The TorchScript exporter writes one to the shape that the result has.
        """
        reading = self.reading
        users = [user for user in context.outputs[0].consumers() if user.op_type != "Shape"]
        plain = reading.axes == 4 and not reading.flipped and not reading.reshapes
        if not plain or len(users) != 1 or context.outputs[0].is_graph_output():
            return context
        node = users[0]
        same = node.op_type == "Reshape" and forms.keeps_shape(node, reading.site)
        return node if same else context

    def _other_reader(self) -> str:
        """The name of what else reads the weights: a node or an output of the graph; else empty."""
        chain = [*self.reading.after, self.reading.site.context]
        values = [self.reading.site.node.outputs[0], *(node.outputs[0] for node in chain[:-1])]
        for value in values:
            if value.is_graph_output():
                return value.name
        within = {*chain}
        for value in {node.inputs[0] for node in chain if node.op_type == "Where"}:
            within |= forms.above(value, self.of_weights)
        users = [user for value in values for user in value.consumers()]
        others = (user for user in users if user not in within and user.op_type != "Shape")
        return next(map(graph.name, others), "")
