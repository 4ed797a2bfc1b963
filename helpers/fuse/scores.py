"""What is done to queries, keys and their product, up to the Softmax: the first half of a site.

Follows, and names shapes as, `helpers.fuse.attention`, which has the second half.
"""

import onnx_ir as ir

from helpers import graph
from helpers.fuse import forms, masks
from helpers.fuse.building import RESHAPES, Reading
from helpers.graph import walks
from helpers.graph.values import NOTHING, number, rank, tail

_CASTS = {"Cast", "CastLike"}
SAME = {*_CASTS, "Dropout", "Identity"}  # what changes the type at most
_STILL_LOW = 30.0  # below its row's other scores; e⁻³⁰ is no weight in float32


class Left(Exception):
    """A site that is left as it is, and why."""


def between(node: ir.Node, where: str) -> str:
    """That `node` is where the operator has none, and what to do."""
    advice = f"; {graph.BEFORE_QUANTISING}" * graph.is_quantised(node.op_type)
    return f"{node.op_type} {graph.name(node)} is between {where}{advice}"


class ScoreReader:
    """Reads a site, from its first product to the Softmax, into a `Reading`."""

    def __init__(self, model: ir.Model, site: graph.Site) -> None:
        self.of_scores, self.of_weights = below(site.scores), below(site.node)
        self.reading = Reading(site, graph.from_input(model))
        self.tape = self.reading.tape
        self.masked_later: set[masks.Fact] = set()  # what has to hold where scores are kept

    def _axis_of_keys(self) -> int:
        """The axis of the product's result, from the end, that becomes the Softmax's."""
        softmax = self.reading.site.node
        axis = softmax.attributes.get_int("axis", -1)
        if axis >= 0:
            axis -= rank(softmax.inputs[0]) or 0
        for node in reversed(self.reading.before):
            axis = graph.through(node, axis, forward=False) or axis
        return axis

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
                what = "weights" if below is self.of_weights else "scores"
                raise Left(f"{node.op_type} {graph.name(node)} takes the {what} twice")
            last = onward[0]
            positions = [i for i, value in enumerate(node.inputs) if value is last]
            path.append((node, positions[-1]))
        return path[::-1]

    # ── Operands ────────────────────────────────────────────────────────────────────────────

    def _read_operands(self, first: ir.Value, second: ir.Value) -> None:
        reading = self.reading
        reading.axes = max(rank(first) or 0, rank(second) or 0)
        if not reading.axes:
            raise Left(f"how many axes {first.name} has is not known")
        query, key = (second, first) if reading.flipped else (first, second)
        query, key = self._unscaled(query), self._unscaled(key)
        if reading.flipped:
            query = self._unscaled(self._swapped(query))
        else:
            key = self._unscaled(self._swapped(key))
        reading.query = reading.broadcast(query, key)
        reading.key = reading.broadcast(key, query, heads=False)

    def _unscaled(self, value: ir.Value) -> ir.Value:
        """What `value` is a multiple of; the number goes into the scale."""
        node = self._maker(value)
        if node is None or node.op_type not in ("Mul", "Div"):
            return value
        for side in (1, 0) if node.op_type == "Mul" else (1,):
            factor, multiplied = number(node.inputs[side]), node.inputs[1 - side]
            if factor and rank(multiplied) == rank(value) is not None:
                self._scale(node.op_type, node.inputs[side])
                self.reading.above.append(node)
                return self._unscaled(multiplied)
        return value

    def _maker(self, value: ir.Value) -> ir.Node | None:
        """What makes `value`, if it can be taken for a part of the site."""
        node, reading = value.producer(), self.reading
        outside = reading.as_rule and node is not None and node.graph is not reading.site.node.graph
        return None if outside else node

    def _scale(self, kind: str, operand: ir.Value) -> None:
        """The scores times the number `operand`, or where `kind` is Div, by it."""
        factor = number(operand)
        self.reading.scale *= factor if kind == "Mul" else 1 / factor
        self.reading.factors.append((kind, operand))

    def _swapped(self, value: ir.Value) -> ir.Value:
        """`value` with its last two axes exchanged."""
        axes = rank(value)
        if axes is None:
            raise Left(f"how many axes {value.name} has is not known")
        node, perm = self._maker(value), [*range(axes)]
        inner = forms.swapped_in_three(value) if node is not None else None
        if inner is not None:
            while value is not inner:
                self.reading.above.append(value.producer())
                value = value.producer().inputs[0]
            return inner
        if node is not None and node.op_type == "Transpose":
            perm = [*(node.attributes.get_ints("perm") or perm[::-1])]
            value = node.inputs[0]
            self.reading.above.append(node)
        perm[-2], perm[-1] = perm[-1], perm[-2]
        if perm == sorted(perm):
            return value
        swapped = self.tape.op("Transpose", [value], {"perm": perm})
        if value.shape is not None:
            swapped.shape = ir.Shape([value.shape[axis] for axis in perm])
        swapped.type = value.type
        return swapped

    # ── Scores ──────────────────────────────────────────────────────────────────────────────

    def _read_score(self, node: ir.Node, position: int) -> None:
        """What `node`, which gets them as its input `position`, does to the scores."""
        reading, kind, inputs = self.reading, node.op_type, node.inputs
        other = next((value for i, value in enumerate(inputs) if i != position), None)
        if kind in SAME:
            self._cast(node)
        elif kind in RESHAPES or kind == "Transpose":
            self._reshape(node)
            if reading.bias is not None and kind in RESHAPES:
                reading.bias = self.tape.repeated(node, reading.whole(reading.bias))
        elif kind in ("Add", "Sum") and len(inputs) == 2:
            self._add("Add", other, node)
        elif kind == "Sub" and position == 0 and forms.off_the_top(node):
            if reading.flipped:
                raise Left(f"{kind} {graph.name(node)} takes off a maximum over the queries")
            reading.shifted = True
        elif kind == "Sub" and position == 0:
            self._add("Sub", other, node)
        elif kind == "Mul" or (kind == "Div" and position == 0):
            self._multiply(kind, other, node)
        elif kind == "Where" and position > 0:
            self._mask(node, inputs[3 - position], position == 1)
        elif kind == "Concat" and position == 0 and len(inputs) == 2:
            self._add_keys(node, other)
        elif kind == "Tanh" and not (
            reading.in_tanh
            or reading.softcap is not None
            or reading.bias is not None
            or reading.row_scales
        ):
            reading.in_tanh = True
        elif not forms.keeps_scores(node, position):
            raise Left(between(node, "the product and the Softmax"))

    def _cast(self, node: ir.Node) -> None:
        if not changes_type(node):
            return
        self.reading.casts = True
        if self.reading.bias is not None:
            self.reading.bias = self.tape.repeated(node, self.reading.bias)

    def _multiply(self, kind: str, operand: ir.Value, node: ir.Node) -> None:
        reading, factor = self.reading, number(operand)
        if reading.in_tanh and factor and kind == "Mul":  # c·tanh(x/c)
            reading.in_tanh, reading.softcap, reading.cap = False, factor, operand
            self._scale(kind, operand)
            return
        if reading.in_tanh or reading.softcap is not None:
            raise Left("the scores are scaled after a tanh")
        if factor:
            self._scale(kind, operand)
        elif kind == "Mul" and reading.bias is None and not self._is_by_rows(operand):
            # s·mask - 1e4·(1 - mask), as OpenAI's GPT has it: what is 0 is masked further on
            reading.masked_again.append((kind, operand))
            self.masked_later |= masks.read(kind, operand, self._places(operand, node))
            return
        else:
            reading.row_scales.append((kind, self._of_rows(operand, "scores")))
        times = 1 / factor if factor and kind == "Div" else factor or 0.0
        if abs(times * NOTHING) < _STILL_LOW:
            reading.kept.clear()  # what was masked may have a weight
            reading.masked_by.clear()
        if reading.bias is not None:
            reading.bias = self.tape.op(kind, [reading.bias, self._upright(operand)])

    def _check_masked(self) -> None:
        """Raise `Left` where scores were multiplied with what is not 1 in all that are kept."""
        if not masks.covers(self.reading.kept, self.masked_later):
            _, factor = self.reading.masked_again[0]
            raise Left(
                f"the scores are multiplied with {factor.name}, which may differ from key to key"
            )

    def _is_by_rows(self, value: ir.Value) -> bool:
        """Whether `value`, beside scores, is one number for all keys."""
        return tail(value)[-2 if self.reading.flipped else -1] == 1

    def _of_rows(self, value: ir.Value, what: str) -> ir.Value:
        """`value`, which must be one number for all keys; in terms of (…, S, T).

        The scores, or weights, are multiplied with it.
        """
        upright = self._upright(value)
        if tail(upright)[1] != 1:
            raise Left(
                f"the {what} are multiplied with {value.name}, which may differ from key to key"
            )
        if self.reading.reshapes:
            raise Left(f"the {what} are multiplied with {value.name} in another layout")
        self.reading.by_rows.append(value)
        return upright

    def _upright(self, value: ir.Value) -> ir.Value:
        """An operand beside the scores, in terms of (…, S, T)."""
        axes = rank(value)
        if not self.reading.flipped or axes == 0:
            return value
        if axes is None:
            raise Left(f"how many axes {value.name} has is not known")
        if axes == 1:  # (S,) beside (…, T, S)
            return self.tape.op("Unsqueeze", [value, self.tape.ints(1)])
        return self._swapped(value)

    def _add(self, kind: str, value: ir.Value, node: ir.Node) -> None:
        """The scores with `value` added by `node`, or where `kind` is Sub, taken off."""
        reading = self.reading
        if number(value) == 0.0:  # as where nothing is ever masked
            return
        if reading.in_tanh:
            raise Left("something is added between a tanh and its factor")
        self._masks(kind, value, node)
        value = self._upright(value)
        self._lay_out()
        if reading.bias is not None:
            reading.bias = self.tape.op(kind, [reading.bias, value])
        else:
            reading.bias = value if kind == "Add" else self.tape.op("Neg", [value])

    def _mask(self, node: ir.Node, other: ir.Value, keeps: bool) -> None:
        """where(condition, x, other) if it `keeps` x, else where(condition, other, x)."""
        condition = node.inputs[0]
        reading, lowest = self.reading, number(other)
        if lowest is None or lowest > NOTHING or reading.in_tanh:
            raise Left(f"{other.name}, in place of masked scores, is not known to be very low")
        if number(condition) == float(keeps):
            return
        self._masks("keep" if keeps else "masked", condition, node)
        self._lay_out()
        dtype = other.dtype or ir.convenience.get_const_tensor(other).dtype
        zero = reading.bias or self.tape.number(0.0, dtype)
        low = self.tape.number(lowest, dtype)
        if not (reading.flipped and rank(other)):
            reading.numbers[low] = other
        choice = [zero, low] if keeps else [low, zero]
        reading.bias = self.tape.op("Where", [self._upright(condition), *choice])

    def _reshape(self, node: ir.Node) -> None:
        """The scores, or weights, in the layout that the Transpose or Reshape `node` gives them."""
        reading = self.reading
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm") or []
            if [*perm[:-2]] != [*range(len(perm) - 2)] or len(perm) < 2:
                raise Left(f"Transpose {graph.name(node)} moves more than queries and keys")
            if perm[-1] != len(perm) - 1:
                reading.flipped = not reading.flipped
            return
        if reading.flipped:
            raise Left(f"{node.op_type} {graph.name(node)} has the keys before the queries")
        reading.reshapes.append(node)

    def _add_keys(self, node: ir.Node, scores: ir.Value) -> None:
        """Scores of more keys, beside the product's: keys of zeros, with those scores as bias.

        Concat(x, scores) on the last axis: (…, S, T) and (…, S, added keys).
        """
        reading = self.reading
        last = node.attributes.get_int("axis", 0) in (-1, reading.axes - 1)
        if not last or reading.added_keys is not None:
            raise Left(f"Concat {graph.name(node)} adds to the scores")
        in_tanh = reading.in_tanh or reading.softcap is not None
        if reading.flipped or reading.reshapes or reading.shifted or in_tanh:
            raise Left(f"Concat {graph.name(node)} adds to the scores in another layout")
        zero = self.tape.number(0.0)
        bias = reading.whole(reading.bias or self.tape.op("CastLike", [zero, scores]))
        reading.bias = self.tape.op("Concat", [bias, scores], {"axis": -1})
        reading.added_keys = self.tape.sizes(scores, -1)
        reading.key = reading.padded(reading.key)

    def _lay_out(self) -> None:
        """Before something is added in another layout than the product's: zeros in that layout."""
        reading = self.reading
        if reading.reshapes and reading.bias is None:
            zero = self.tape.op("CastLike", [self.tape.number(0.0), reading.query])
            reading.bias = reading.whole(zero)
            for node in reading.reshapes:
                reading.bias = self.tape.repeated(node, reading.bias)

    # ── What is beside scores or weights ────────────────────────────────────────────────────────

    def _masks(self, how: str, value: ir.Value, node: ir.Node) -> None:
        """Keep in mind that `node` masks scores by `value`, if it does."""
        kept = masks.read(how, value, self._places(value, node))
        self.reading.kept |= kept
        if kept:
            self.reading.masked_by.append((how, value))

    def _places(self, value: ir.Value, node: ir.Node) -> masks.Axes | None:
        """Where the axes of `value` are, which `node` reads beside scores or weights."""
        reading = self.reading
        layout = rank(node.outputs[0]) if reading.reshapes else reading.axes
        return masks.places(value, reading.flipped, layout or 0)


def changes_type(node: ir.Node) -> bool:
    """Whether it is a cast, and not one to the type that its input is known to have."""
    given, made = node.inputs[0].dtype, node.outputs[0].dtype
    return node.op_type in _CASTS and (given is None or given != made)


def below(node: ir.Node) -> set[ir.Value]:
    """What is computed from the results of `node`, not from their shapes, in the same graph."""

    def following(above: ir.Node) -> list[ir.Node]:
        users = walks.consumers(above)
        return [user for user in users if user.graph is node.graph and user.op_type != "Shape"]

    return {value for reached in walks.walk([node], following) for value in reached.outputs}
