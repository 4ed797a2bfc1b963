"""Caches: the keys and values of earlier steps, which a model is given, appends to, and gives.

Shapes: B batch, N heads, P past keys, S new ones, T = P + S, D width of a head.

    past (B, N, P, D) ┐
    new (B, N, S, D)  ┴ Concat, or an attention operator  →  keys or values, present (B, N, T, D)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx_ir as ir

from helpers.graph import operators, walks
from helpers.graph.attention_sites import Site, through
from helpers.graph.values import ELEMENTWISE, SHAPING, constant, dim, rank, size, stated_rank

_MOVING = SHAPING - {"Concat"}
_HANDING = {"Cast", "Concat", "Identity", "QuantizeLinear", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class Cache:
    """An input of the graph to which keys or values are appended, for an attention site.

    `axis` is that of its length, from the end. `node` appends: a Concat, or the site's operator;
    and `present` is what it gives, None where an operator gives none.
    """

    given: ir.Value
    axis: int
    node: ir.Node
    present: ir.Value | None
    site: Site

    @property
    def past(self) -> int | None:
        """Its length, where that is fixed to a number."""
        return size(self.given, self.axis)

    def in_place(self) -> bool:
        """Whether it is given back as long as it was: a buffer, or a window of the last keys."""
        return any(size(value, self.axis) == self.past for value in self.given_out())

    def given_out(self) -> list[ir.Value]:
        """The outputs of the graph that are what it gives, or that moved."""
        if self.present is None:
            return []
        moved = walks.uses(self.present, _MOVING)
        values = [self.present, *(value for node, _ in moved for value in node.outputs)]
        return [value for value in dict.fromkeys(values) if value.is_graph_output()]


def caches(model: ir.Model, sites: Sequence[Site]) -> list[Cache]:
    """The caches that `model` is given, in the order of its inputs; `sites` are its own."""
    by_input: dict[ir.Value, Cache] = {}
    for site in sites:
        for cache in (*_of_operator(site), *_of_concat(site)):
            by_input.setdefault(cache.given, cache)
    return [by_input[value] for value in model.graph.inputs if value in by_input]


def presents(sites: Sequence[Site]) -> list[ir.Value]:
    """The outputs, of the graph or of a branch, that are keys or values of one of `sites`.

    A site that gives its keys alone has none: that is a map of features.
    """
    given_out: list[ir.Value] = []
    for site in sites:
        of_operator = _given_out(site.node.outputs[at] for at in _outputs(site.node))
        sides = [_given_out(_sources(side)) for side in keys_and_values(site)]
        given_out += of_operator or ([*chain(*sides)] if all(sides) else [])
    return [*dict.fromkeys(given_out)]


def handed_on(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The outputs of `model` that are inputs as they came in, each with that input."""
    for output in model.graph.outputs:
        value = output
        while (node := value.producer()) is not None and node.op_type == "Identity":
            value = node.inputs[0]
        if value.is_graph_input() and not value.is_initializer():
            yield output, value


def keys_and_values(site: Site) -> tuple[list[ir.Value], list[ir.Value]]:
    """What may be the keys of a site, and its values: of a product, either operand."""
    if site.scores is None or site.context is None:
        keys, values = ([value] for value in (*site.node.inputs, None, None)[1:3])
    else:
        keys, values = site.scores.inputs, site.context.inputs
    return [*filter(None, keys)], [*filter(None, values)]


def heads_repeated(site: Site) -> ir.Node | None:
    """The node that repeats keys or values for groups of G heads, before a site; or None.

        (B, N, T, D) → Unsqueeze (B, N, 1, T, D) → Expand (B, N, G, T, D) → Reshape (B, N·G, T, D)

    The heads may come after T, and what repeats may be a Tile, or a Concat of one value.
    """
    for value in chain(*keys_and_values(site)):
        flat = site.scores is None and rank(value) == 3  # (B, T, N·D)
        node = _repeats(value, -1 if flat else -3)
        if node is not None:
            return node
    return None


def _repeats(value: ir.Value, axis: int) -> ir.Node | None:
    """What repeats heads on the way to `value`, whose `axis` they are."""
    while (node := value.producer()) is not None:
        if node.op_type == "Reshape" and (repeating := _repeated(node.inputs[0], axis)):
            return repeating
        before = through(node, axis, forward=False)
        computed = [operand for operand in node.inputs if constant(operand) is None]
        if before is None or not computed:
            return None
        if axis == -1 and node.op_type == "Reshape" and rank(node.inputs[0]) == 4:
            before = -2  # heads are merged, (B, T, N, D) to (B, T, N·D)
        value, axis = computed[0], before
    return None


def _repeated(value: ir.Value, axis: int) -> ir.Node | None:
    """What made `value`, of five axes, if it repeats one of 1 that a Reshape then merges into the
    heads at `axis`."""
    node, axis = value.producer(), min(axis, -2)
    if node is None or node.op_type not in ("Concat", "Expand", "Tile"):
        return None
    once, again = node.inputs[0], node.inputs[1:] if node.op_type == "Concat" else ()
    if {*again} - {once} or rank(once) not in (5, None) or dim(value, axis) == 1:
        return None
    adding = once.producer()
    if adding is not None and adding.op_type == "Unsqueeze":
        added = constant(adding.inputs[1]) if len(adding.inputs) > 1 else None
        added = adding.attributes.get_ints("axes") if added is None else added.ravel()
        return node if added is not None and [*added] in ([axis], [axis + 5]) else None
    return node if once.shape is not None and dim(once, axis) == 1 else None


def _outputs(node: ir.Node) -> list[int]:
    """The numbers of the outputs of an operator that are caches."""
    operator = operators.of(node)
    return [at for at in operator.presents if at < len(node.outputs)] if operator else []


def _given_out(values: Iterable[ir.Value]) -> list[ir.Value]:
    """The outputs of four axes or more that are `values`, or these stacked or transposed."""
    given_out = []
    for value in values:
        handed = walks.uses(value, _HANDING)
        further = (
            result for node, _ in handed if node.op_type in _HANDING for result in node.outputs
        )
        given_out += [
            result
            for result in (value, *further)
            if result.is_graph_output() and (stated_rank(result) or 4) > 3
        ]
    return given_out


def _sources(values: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """`values`, and what they are made of but for weights and products."""

    def above(value: ir.Value) -> Sequence[ir.Value]:
        node = value.producer()
        if node is None or node.op_type not in SHAPING | ELEMENTWISE:
            return ()
        data = node.inputs[:1] if node.op_type in _MOVING else node.inputs
        return [operand for operand in data if operand is not None]

    return walks.walk(values, above)


def _of_operator(site: Site) -> Iterator[Cache]:
    node = site.node
    for at, number in enumerate(operators.numbers(node, *operators.PASTS)):
        value = node.inputs[number] if number < len(node.inputs) else None
        given, axis = _origin(value, -2) if value is not None else (None, 0)
        if given is not None:
            numbers = _outputs(node)
            present = node.outputs[numbers[at]] if at < len(numbers) else None
            yield Cache(given, axis, node, present, site)


def _of_concat(site: Site) -> Iterator[Cache]:
    sources = _sources([*chain(*keys_and_values(site))])
    for node in dict.fromkeys(value.producer() for value in sources):
        if node is None or node.op_type != "Concat":
            continue
        axis, axes = node.attributes.get_int("axis", 0), stated_rank(*node.outputs, *node.inputs)
        axis = axis - (axes or 4) if axis >= 0 else axis
        origins = [_origin(operand, axis) for operand in node.inputs]
        givens = {given for given, _ in origins}
        for given, there in origins if len(givens) > 1 else ():
            if given is not None and (stated_rank(given) or 0) > 2:
                yield Cache(given, there, node, node.outputs[0], site)


def _origin(value: ir.Value, axis: int) -> tuple[ir.Value | None, int]:
    """The input of the graph that `value` is, moved, and which of its axes `axis` is; None where
    it is computed."""
    while (node := value.producer()) is not None:
        first = node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0
        before = axis if first else through(node, axis, forward=False)
        alone = node.op_type == "Concat" and len(node.inputs) == 1  # TorchScript's first layer
        if before is None or not (alone or node.op_type in _MOVING | {"DequantizeLinear"}):
            return None, axis
        value, axis = node.inputs[0], before
    return (value if value.is_graph_input() and not value.is_initializer() else None), axis
