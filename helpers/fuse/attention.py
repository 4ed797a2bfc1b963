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
    weights·h     one number a head or query → result·h

so that scale, mask and relative positions may be written in any way and order. Anything else there
leaves the site as it is, with the reason. What computes Q, K, V and the bias (projections, rotary
embeddings, caches) is not touched.

Shapes: queries (B, N, S, D), keys (B, N, T, D), values (B, N, T, Dv), or with any other number of
axes before the last two; the operator gets them with four. Follows ONNX's Attention, opset 23.
"""

import dataclasses

import numpy as np
import onnx_ir as ir

from helpers import graph
from helpers.fuse import forms, products
from helpers.graph.shapes import expanded
from helpers.graph.values import NOTHING, dim, number, rank, sized_by, tail

_SAME = {"Cast", "CastLike", "Dropout", "Identity"}
_RESHAPES = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}


class Left(Exception):
    """A site that is left as it is, and why."""


def fuse(model: ir.Model, site: graph.Site) -> ir.Node:
    """Replace what `site` computes by a standard Attention, which is returned.

    Raises `Left`, with `model` as it was, where that cannot be done.
    """
    return _Lift(model, site).replace()


class _Lift:
    """One site as it is read, and the nodes that will stand for it."""

    def __init__(self, model: ir.Model, site: graph.Site) -> None:
        kinds = site.scores.op_type, site.context.op_type
        scores, context = products.as_matmul(site.scores), products.as_matmul(site.context)
        if scores is None or context is None:
            raise Left(f"its products are {kinds[0]} and {kinds[1]}")
        site = dataclasses.replace(site, scores=scores, context=context)
        self.site = site
        self.of_scores, self.of_weights = _below(site.scores), _below(site.node)
        self.tape = ir.tape.Tape()
        self.known = graph.from_input(model)
        self.scale = 1.0
        self.softcap: float | None = None  # 0 between the tanh and the factor after it
        self.bias: ir.Value | None = None
        self.row_scales: list[tuple[str, ir.Value]] = []  # Mul or Div, and by what
        self.result_scales: list[tuple[str, ir.Value]] = []
        self.conditions: list[tuple[ir.Value, bool]] = []  # of masks: what, and where it holds
        self.reshapes: list[ir.Node] = []
        self.full = False  # whether the bias has been brought to the shape of all scores
        self.casts = False
        self.shifted = False  # whether the scores have been shifted, each row by a number
        self.added: ir.Value | None = None  # how many keys were added that are not the product's
        self.dropped = False  # whether their weights are dropped after the Softmax

    def replace(self) -> ir.Node:
        """Read the site, build the operator, put it in place."""
        scores, softmax, context = self.site.scores, self.site.node, self.site.context
        if softmax.op_type != "Softmax":
            raise Left(f"{graph.name(softmax)} is a {softmax.op_type}, and not a Softmax")
        before = self._between(self.of_scores, scores, softmax.inputs[0])
        axis = softmax.attributes.get_int("axis", -1)
        axis -= (rank(softmax.inputs[0]) or 0) if axis >= 0 else 0
        for node, _ in reversed(before):
            axis = graph.through(node, axis, forward=False) or axis
        # Where the keys are on the last axis but one, everything is read as transposed.
        self.flip = axis == -2
        self._read_operands(*scores.inputs)
        self.before = before
        for node, at in before:
            self._read_score(node, at)
        if softmax.attributes.get_int("axis", -1) % max(rank(softmax.inputs[0]) or 4, 1) != (
            (rank(softmax.inputs[0]) or 4) - 1 - self.flip
        ):
            raise Left(f"{graph.name(softmax)} is over another axis than the keys'")
        weights = next(value for value in context.inputs if value in self.of_weights)
        after = self._between(self.of_weights, softmax, weights)
        for node, at in after:
            self._read_weight(node, at)
        return self._build([node for node, _ in after], weights)

    # ── Reading ─────────────────────────────────────────────────────────────────────────────────

    def _between(
        self, below: set[ir.Value], first: ir.Node, last: ir.Value
    ) -> list[tuple[ir.Node, int]]:
        """The nodes on the way from `first`, with all that is `below` it, to `last`, and by which
        input."""
        path = []
        while (node := last.producer()) is not first:
            onward = [value for value in node.inputs if value in below]
            if node.op_type == "Where" and node.inputs[0] in below:
                onward = onward[1:]  # a condition on the scores themselves
            elif node.op_type in ("Reshape", "Expand", "Slice") or forms.off_the_top(node):
                onward = onward[:1]  # a shape computed from the scores' own; their maximum
            if len(set(onward)) != 1 or (len(onward) > 1 and node.op_type != "Where"):
                raise Left(f"{node.op_type} {graph.name(node)} takes the scores twice")
            last = onward[0]
            where = [i for i, value in enumerate(node.inputs) if value is last]
            path.append((node, where[-1]))
        return path[::-1]

    def _read_operands(self, first: ir.Value, second: ir.Value) -> None:
        self.rank = max(rank(first) or 0, rank(second) or 0)
        if not self.rank:
            raise Left(f"how many axes {first.name} has is not known")
        query, key = (second, first) if self.flip else (first, second)
        query, key = self._unscaled(query), self._unscaled(key)
        if self.flip:
            query = self._unscaled(self._swapped(query))
        else:
            key = self._unscaled(self._swapped(key))
        self.query, self.key = self._broadcast(query, key), self._broadcast(key, query, heads=False)

    def _unscaled(self, value: ir.Value) -> ir.Value:
        """What `value` is a multiple of; the number goes into the scale."""
        node = value.producer()
        if node is None or node.op_type not in ("Mul", "Div"):
            return value
        for side in (1, 0) if node.op_type == "Mul" else (1,):
            factor = number(node.inputs[side])
            same = rank(node.inputs[1 - side]) == rank(value) is not None
            if factor and same:
                self.scale *= factor if node.op_type == "Mul" else 1 / factor
                return self._unscaled(node.inputs[1 - side])
        return value

    def _swapped(self, value: ir.Value) -> ir.Value:
        """`value` with its last two axes exchanged."""
        axes = rank(value)
        if axes is None:
            raise Left(f"how many axes {value.name} has is not known")
        node, perm = value.producer(), [*range(axes)]
        if (inner := forms.swapped_in_three(value)) is not None:
            return inner
        if node is not None and node.op_type == "Transpose":
            perm = [*(node.attributes.get_ints("perm") or perm[::-1])]
            value = node.inputs[0]
        perm[-2:] = perm[:-3:-1]
        if perm == sorted(perm):
            return value
        swapped = self.tape.op("Transpose", [value], {"perm": perm})
        if value.shape is not None:
            swapped.shape = ir.Shape([value.shape[axis] for axis in perm])
        swapped.type = value.type
        return swapped

    def _broadcast(self, value: ir.Value, other: ir.Value, *, heads: bool = True) -> ir.Value:
        """`value` with as many axes as the scores, and no axis of size 1 where `other` has more.

        Without `heads`, the axis of the heads may be 1: the operator shares keys by itself.
        """
        missing = self.rank - (rank(value) or self.rank)
        leading = [*range(-self.rank, -3 if self.rank == 4 and not heads else -2)]
        one = [axis for axis in leading if dim(value, axis) == 1 != dim(other, axis)]
        unknown = any(dim(value, axis) is None for axis in leading)
        learned = unknown and not self._from_input(value)
        if missing:
            value = self.tape.op("Unsqueeze", [value, self._ints(*range(missing))])
        if one or learned:
            ones = self._ints(*[1] * (self.rank - len(leading)))
            shape = self._shape(self._sizes(other, 0, len(leading)), ones)
            value = self.tape.op("Expand", [value, shape])
        return value

    def _from_input(self, value: ir.Value) -> bool:
        node = value.producer()
        if node is None or node not in self.tape.nodes:
            return value in self.known
        return any(self._from_input(one) for one in node.inputs)

    def _read_score(self, node: ir.Node, at: int) -> None:
        """What `node`, which gets them as its input `at`, does to the scores."""
        kind, inputs = node.op_type, node.inputs
        other = next((value for i, value in enumerate(inputs) if i != at), None)
        if kind in _SAME:
            self.casts |= kind.startswith("Cast")
            if self.bias is not None and kind.startswith("Cast"):
                self.bias = self._again(node, self.bias)
        elif kind in _RESHAPES or kind == "Transpose":
            self._reshape(node)
        elif kind in ("Add", "Sum") and len(inputs) == 2:
            self._add("Add", other)
        elif kind == "Sub" and at == 0:
            if not forms.off_the_top(node):
                self._add("Sub", other)
            elif self.flip:
                raise Left(f"{kind} {graph.name(node)} takes off a maximum over the queries")
            else:
                self.shifted = True
        elif kind == "Mul" or (kind == "Div" and at == 0):
            self._multiply(kind, other)
        elif kind == "Where" and at > 0:
            self._mask(inputs[0], inputs[3 - at], at == 1)
        elif kind == "Concat" and at == 0 and len(inputs) == 2:
            self._add_keys(node, other)
        elif kind == "Tanh" and self.softcap is None and self.bias is None and not self.row_scales:
            self.softcap = 0.0
        elif not forms.keeps_scores(node, at):
            raise Left(f"{kind} {graph.name(node)} is between the product and the Softmax")

    def _multiply(self, kind: str, by: ir.Value) -> None:
        factor = number(by)
        if self.softcap == 0.0 and factor and kind == "Mul":
            self.softcap, self.scale = factor, self.scale * factor
            return
        if self.softcap is not None:
            raise Left("the scores are scaled after a tanh")
        if factor:
            self.scale *= factor if kind == "Mul" else 1 / factor
        else:
            self.row_scales.append((kind, self._of_rows(by)))
        if self.bias is not None:
            self.bias = self.tape.op(kind, [self.bias, self._upright(by)])

    def _of_rows(self, value: ir.Value) -> ir.Value:
        """`value`, which must be one for all keys; in terms of (…, S, T)."""
        value = self._upright(value)
        if tail(value)[1] != 1 or self.reshapes:
            raise Left(f"{value.name} is multiplied with, and may differ from key to key")
        return value

    def _upright(self, value: ir.Value) -> ir.Value:
        """An operand beside the scores, in terms of (…, S, T)."""
        axes = rank(value)
        if not self.flip or axes == 0:
            return value
        if axes is None:
            raise Left(f"how many axes {value.name} has is not known")
        return (
            self.tape.op("Unsqueeze", [value, self._ints(1)]) if axes == 1 else self._swapped(value)
        )

    def _add(self, kind: str, value: ir.Value) -> None:
        if number(value) == 0.0:  # as where nothing is ever masked
            return
        value = self._upright(value)
        self._lay_out()
        if self.bias is not None:
            self.bias = self.tape.op(kind, [self.bias, value])
        else:
            self.bias = value if kind == "Add" else self.tape.op("Neg", [value])
        if self.softcap == 0.0:
            raise Left("something is added between a tanh and its factor")

    def _mask(self, condition: ir.Value, other: ir.Value, keeps: bool) -> None:
        """where(condition, x, other) if it `keeps` x, else where(condition, other, x)."""
        lowest = number(other)
        if lowest is None or lowest > NOTHING or self.softcap == 0.0:
            raise Left(f"{other.name}, in place of masked scores, is not known to be very low")
        if number(condition) == float(keeps):
            return
        self.conditions.append(forms.root(condition, keeps))
        self._lay_out()
        dtype = other.dtype or ir.convenience.get_const_tensor(other).dtype
        zero, low = self.bias or self._number(0.0, dtype), self._number(lowest, dtype)
        choice = [zero, low] if keeps else [low, zero]
        self.bias = self.tape.op("Where", [self._upright(condition), *choice])

    def _reshape(self, node: ir.Node) -> None:
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm") or []
            if [*perm[:-2]] != [*range(len(perm) - 2)] or len(perm) < 2:
                raise Left(f"Transpose {graph.name(node)} moves more than queries and keys")
            if perm[-1] != len(perm) - 1:
                self.flip = not self.flip
            return
        if self.flip:
            raise Left(f"{node.op_type} {graph.name(node)} has the keys before the queries")
        if self.bias is not None:
            self.bias = self._again(node, self._whole(self.bias))
        self.reshapes.append(node)

    def _add_keys(self, node: ir.Node, scores: ir.Value) -> None:
        """Scores of more keys, beside the product's: keys of zeros, with those scores as bias."""
        if node.attributes.get_int("axis", 0) not in (-1, self.rank - 1) or self.added is not None:
            raise Left(f"Concat {graph.name(node)} adds to the scores")
        if self.flip or self.reshapes or self.shifted or self.softcap is not None:
            raise Left(f"Concat {graph.name(node)} adds to the scores in another layout")
        zero = self._number(0.0)
        bias = self.bias or self.tape.op("CastLike", [zero, scores])
        self.bias = self.tape.op("Concat", [self._whole(bias), scores], {"axis": -1})
        self.added = self._sizes(scores, -1)
        self.key = self._padded(self.key)

    def _padded(self, value: ir.Value) -> ir.Value:
        """Keys or values with zeros for the ones that were added."""
        shape = self._shape(self._sizes(value, 0, -2), self.added, self._sizes(value, -1))
        zero = self.tape.op("CastLike", [self._number(0.0), value])
        zeros = self.tape.op("Expand", [zero, shape])
        return self.tape.op("Concat", [value, zeros], {"axis": -2})

    def _lay_out(self) -> None:
        """Before something is added in another layout than the product's: zeros in that layout."""
        if self.reshapes and self.bias is None:
            self.bias = self._whole(self.tape.op("CastLike", [self._number(0.0), self.query]))
            for node in self.reshapes:
                self.bias = self._again(node, self.bias)

    def _whole(self, bias: ir.Value) -> ir.Value:
        """`bias` in the shape of all scores, as the product gives them."""
        if self.full:
            return bias
        self.full = True
        product = self.site.scores.outputs[0].shape
        if product is not None and not product.has_unknown_dim() and bias.shape == product:
            return bias
        return self.tape.op("Expand", [bias, self._shape_of_scores()])

    def _shape_of_scores(self) -> ir.Value:
        return self._shape(self._sizes(self.query, 0, -1), self._sizes(self.key, -2, -1))

    def _again(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """What `node` does to the scores, done to `value`."""
        inputs, attributes = [value, *node.inputs[1:]], dict(node.attributes)
        return self.tape.op(node.op_type, inputs, attributes, domain=node.domain)

    def _read_weight(self, node: ir.Node, at: int) -> None:
        """What `node`, which gets them as its input `at`, does to the weights."""
        kind, inputs = node.op_type, node.inputs
        if kind in _SAME:
            self.casts |= kind.startswith("Cast")
        elif kind in _RESHAPES or kind == "Transpose":
            self.bias, kept = None, self.bias
            self._reshape(node)
            self.bias = kept
        elif kind == "Mul" or (kind == "Div" and at == 0):
            self.result_scales.append((kind, self._of_rows(inputs[1 - at])))
        elif kind == "Slice" and self.added is not None and number(inputs[1]) == 0.0:
            self.dropped = True
        elif not (kind == "Where" and at > 0 and number(inputs[3 - at]) == 0.0):
            raise Left(f"{kind} {graph.name(node)} is between the Softmax and the values")
        elif not self._without_keys(inputs[0], at == 1):
            raise Left(f"{kind} {graph.name(node)} masks the weights after the Softmax")

    def _last(self, context: ir.Node) -> ir.Node:
        """The last node that stands for the site: the product, or a Reshape that changes nothing.

        The TorchScript exporter writes one to the shape that the result has.
        """
        users = [user for user in context.outputs[0].consumers() if user.op_type != "Shape"]
        plain = self.rank == 4 and not self.flip and not self.reshapes
        if not plain or len(users) != 1 or context.outputs[0].is_graph_output():
            return context
        node = users[0]
        return node if node.op_type == "Reshape" and self._keeps_shape(node) else context

    def _keeps_shape(self, node: ir.Node) -> bool:
        """Whether the Reshape `node` of the result gives it the sizes that it has."""
        sizes = node.inputs[1].producer()
        if sizes is None or sizes.op_type != "Concat" or len(sizes.inputs) != 4:
            return False
        value = self.site.context.inputs[1]
        same = [(node.inputs[0], axis) for axis in range(4)]
        same += [(self.site.scores.inputs[0], axis) for axis in (0, 1, 2)] + [(value, 3)]
        kept = [
            sized_by(one) in same and sized_by(one)[1] == i for i, one in enumerate(sizes.inputs)
        ]
        inferred = [number(one) == -1 for one in sizes.inputs]
        return sum(inferred) <= 1 and all(map(max, kept, inferred))

    def _without_keys(self, condition: ir.Value, keeps: bool) -> bool:
        """Whether weights are set to 0 in rows without a key alone, or where they are 0 already."""
        root, holds = forms.root(condition, keeps)
        node = root.producer()
        if (root, holds) in self.conditions or (node is not None and node.op_type == "IsNaN"):
            return True
        return root in self.of_scores and dim(condition, -2 if self.flip else -1) == 1

    # ── Building ────────────────────────────────────────────────────────────────────────────────

    def _build(self, after: list[ir.Node], weights: ir.Value) -> ir.Node:
        softmax, context = self.site.node, self.site.context
        if (context.inputs[0] is weights) is self.flip:
            raise Left(f"{graph.name(context)} does not sum over the keys")
        value = self._swapped(context.inputs[0]) if self.flip else context.inputs[1]
        elsewhere = self._read_elsewhere(softmax, [*after, context])
        if elsewhere and self.reshapes:
            raise Left(f"the weights are read by {elsewhere} too, in another layout")
        if self.added is not None and self.dropped:
            value = self._padded(self._broadcast(value, self.query, heads=False))
        query = self.query
        for kind, by in self.row_scales:
            by = self.tape.op("CastLike", [by, query]) if self.casts else by
            query = self.tape.op(kind, [query, by])
        own = value  # with the axes that the values have in the graph
        if self.reshapes:
            shape = self._shape(self._sizes(self.query, 0, -2), self._sizes(value, -2))
            value = self.tape.op("Reshape", [value, shape])
        else:
            value = self._broadcast(value, self.query, heads=False)
        if self.casts:
            value = self.tape.op("CastLike", [value, query])
        inputs = [self._four(query), self._four(self.key), self._four(value)]
        inputs += [self._four_bias(inputs[0], inputs[1])] if self.bias is not None else []
        attributes = {"scale": self.scale}
        if self.softcap == 0.0:
            raise Left("a tanh is over the scores, without a factor after it")
        if self.softcap:
            attributes["softcap"] = self.softcap
        if self.casts:
            attributes["softmax_precision"] = int(ir.DataType.FLOAT)
        if elsewhere:
            attributes["qk_matmul_output_mode"] = 3
        outputs = self.tape.op_multi_out(
            "Attention", inputs, attributes, num_outputs=4 if elsewhere else 1
        )
        node = outputs[0].producer()
        node.metadata_props.update(softmax.metadata_props)
        node.name = forms.named(softmax)
        result = self._back(outputs[0], own)
        if self.casts:
            result = self.tape.op("CastLike", [result, own])
        for kind, by in self.result_scales:
            result = self.tape.op(kind, [result, by])
        if self.flip:
            result = self._swap_new(result)
        last = self._last(context)
        old, new = [last.outputs[0]], [result]
        if elsewhere:
            # Reshaped, since ONNX Runtime infers another shape for this output than it has.
            back = self.tape.op("Reshape", [outputs[3], self._shape_of_scores()])
            old, new = [softmax.outputs[0], *old], [back, *new]
        for one, other in zip(old, new, strict=True):
            other.shape, other.type = one.shape, one.type
        self._redirect_shapes([softmax, *after])
        if not self.flip and not self.reshapes:
            shape = self._shape(self._sizes(self.query, 0, -1), self._sizes(own, -1))
            self._redirect(context.outputs[0], shape)
        last.graph.insert_before(last, self.tape.nodes)
        for one, other in zip(old, new, strict=True):
            one.replace_all_uses_with(other, replace_graph_outputs=True)
            other.name, one.name = one.name, None
        return node

    def _redirect_shapes(self, after: list[ir.Node]) -> None:
        """Have those that read the shape of scores or weights read it off the queries and keys."""
        for node in (self.site.scores, *(one for one, _ in self.before), *after):
            if node.op_type in (*_RESHAPES, "Concat", "Slice", "Transpose"):
                return
            if not self.flip:
                self._redirect(node.outputs[0], self._shape_of_scores())

    def _redirect(self, value: ir.Value, shape: ir.Value) -> None:
        """Have those that ask for the shape of `value` take `shape` instead."""
        for user in [*value.consumers()]:
            if user.op_type != "Shape":
                continue
            start, end = (user.attributes.get_int(one, None) for one in ("start", "end"))
            asked = shape
            if start or end is not None:
                ends = [self._ints(start or 0), self._ints(2**31 if end is None else end)]
                asked = self.tape.op("Slice", [shape, *ends])
            user.outputs[0].replace_all_uses_with(asked)

    def _read_elsewhere(self, softmax: ir.Node, chain: list[ir.Node]) -> str:
        """The name of what else reads the weights: a node or an output of the graph; else empty."""
        values = [softmax.outputs[0], *(node.outputs[0] for node in chain[:-1])]
        within, queue = {*chain}, [user for value in values for user in value.consumers()]
        guards = {node.inputs[0] for node in chain if node.op_type == "Where"}
        for value in guards:
            within |= forms.above(value, self.of_weights)
        within |= {user for user in queue if user.op_type == "Shape"}
        for value in values:
            if value.is_graph_output():
                return value.name
        return next((graph.name(user) for user in queue if user not in within), "")

    def _four(self, value: ir.Value) -> ir.Value:
        """`value` of the rank of the scores, with four axes."""
        if self.rank < 4:
            return self.tape.op("Unsqueeze", [value, self._ints(*range(4 - self.rank))])
        if self.rank > 4:
            shape = self._shape(self._ints(-1), self._sizes(value, -3))
            return self.tape.op("Reshape", [value, shape])
        return value

    def _four_bias(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """The bias with sizes of its own on the last two axes, which the operator asks for."""
        bias = self.bias
        if self.full or self.rank > 4:
            bias = self._whole(bias)
            bias = self.tape.op("Reshape", [bias, self._shape_of_scores()])
            bias = self._four(bias)
        elif tail(bias) != (dim(self.query, -2), dim(self.key, -2)) or None in tail(bias):
            bias = expanded(self.tape, bias, query, key)
        return self.tape.op("CastLike", [bias, query]) if self.casts else bias

    def _back(self, result: ir.Value, own: ir.Value) -> ir.Value:
        """The operator's result with the axes that the product with the values has."""
        if not self.reshapes and self.rank <= 4:
            return self._squeezed(result)
        like = own if self.reshapes else self.query
        leading, rows = self._sizes(like, 0, -2), self._sizes(self.query, -2, -1)
        shape = self._shape(leading, rows, self._sizes(own, -1))
        return self.tape.op("Reshape", [result, shape])

    def _squeezed(self, value: ir.Value) -> ir.Value:
        if self.rank == 4:
            return value
        return self.tape.op("Squeeze", [value, self._ints(*range(4 - self.rank))])

    def _swap_new(self, value: ir.Value) -> ir.Value:
        perm = [*range(self.rank - 2), self.rank - 1, self.rank - 2]
        return self.tape.op("Transpose", [value], {"perm": perm})

    def _sizes(self, value: ir.Value, start: int, end: int | None = None) -> ir.Value:
        """The sizes of the axes of `value` from `start` to before `end`."""
        ends = {"start": start} if end is None else {"start": start, "end": end}
        return self.tape.op("Shape", [value], ends)

    def _shape(self, *sizes: ir.Value) -> ir.Value:
        return self.tape.op("Concat", sizes, {"axis": 0})

    def _ints(self, *numbers: int) -> ir.Value:
        return self.tape.op("Constant", [], {"value_ints": numbers})

    def _number(self, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        array = np.array(value, dtype.numpy())
        return self.tape.op("Constant", [], {"value": ir.tensor(array, dtype=dtype)})


def _below(node: ir.Node) -> set[ir.Value]:
    """What is computed from the results of `node`, not from their shapes, in the same graph."""
    found = set(node.outputs)
    queue = [*node.outputs]
    while queue:
        for user in queue.pop().consumers():
            here = user.graph is node.graph and user.op_type != "Shape"
            if here and not found.issuperset(user.outputs):
                found.update(user.outputs)
                queue += user.outputs
    return found
