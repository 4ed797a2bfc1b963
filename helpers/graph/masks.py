"""What masks the keys of attention sites, and which inputs of a model do.

Shapes: B batch, N heads, S queries, T keys (past ones included).
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from helpers.graph import operators, walks
from helpers.graph.attention_sites import FUSED, SHAPES, Site
from helpers.graph.operators import Holds
from helpers.graph.reading import MICROSOFT
from helpers.graph.values import ELEMENTWISE, LOGICAL, SHAPING, dim, rank

# Operators beside those of the table whose input of that number is a mask by their own definition.
_MASK_INPUTS = {
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): (3, 4),
    (MICROSOFT, "EmbedLayerNormalization"): (7,),
    (MICROSOFT, "QEmbedLayerNormalization"): (7,),
}
_ROTATING = SHAPING | {"Add", "Einsum", "MatMul", "Mul", "Sub"}  # from positions to their angles


def rotates(value: ir.Value) -> bool:
    """Whether the angles of rotary embeddings are made of an input: it holds positions."""
    return any(
        node.op_type in ("Cos", "RotaryEmbedding", "Sin")
        for node, _ in walks.uses(value, _ROTATING)
    )


def mask_inputs(node: ir.Node) -> Sequence[int]:
    """The inputs of an operator, by number, that are a mask or are added to the scores."""
    known = operators.numbers(node, Holds.MASK, Holds.BIAS)
    return known or _MASK_INPUTS.get((node.domain, node.op_type), ())


def score_paths(sites: Sequence[Site]) -> set[tuple[ir.Node, int]]:
    """Where something meets the scores of an attention site, or its weights, beside them: node, and
    input.

    That is between the product of queries with keys and the Softmax, between that and the product
    with the values, or at an operator's own mask.
    """
    meetings = set()
    for site in sites:
        meetings |= {(site.node, position) for position in mask_inputs(site.node)}
        for start in (site.scores, site.node) if site.scores is not None else ():
            meetings |= {*_beside(start, site.node)}
    return meetings


def _beside(start: ir.Node, softmax: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Where something else meets what `start` gives, on the way to `softmax` or a product."""

    def following(node: ir.Node) -> list[ir.Node]:
        return [
            user
            for user in walks.consumers(node)
            if user is not softmax and user.op_type in SHAPING | ELEMENTWISE | LOGICAL
        ]

    below = [*walks.walk([start], following)]
    computed = {value for node in below for value in node.outputs}
    for node in below[1:]:
        for position, value in enumerate(node.inputs):
            if value not in computed:
                yield node, position


def masking_inputs(model: ir.Model, sites: Sequence[Site]) -> set[ir.Value]:
    """The inputs whose values decide which keys a row has, at any of `sites`, those of `model`.

    Ids are among them where the graph compares them with that of padding. Positions are not: all
    that a causal mask is made of. Of an operator whose inputs are not known, each may be a mask.
    """
    given = [value for value in model.graph.inputs if not value.is_initializer()]
    meetings = [
        node.inputs[at]
        for node, at in (*score_paths(sites), *_counting(sites))
        if at < len(node.inputs) and node.inputs[at] is not None
    ]

    def above(value: ir.Value) -> list[ir.Value]:
        node = value.producer()
        return [] if node is None or node.op_type in SHAPES else walks.read(value)

    reached = {*walks.walk(meetings, above)}
    if any(value.is_graph_input() and value.graph is not model.graph for value in reached):
        return {*given}  # what a Loop carries may come from any
    batches = {dim(value, -rank(value)) for value in given if (rank(value) or 0) > 1}
    return {value for value in given if value in reached and not _is_position(value, batches)}


def _counting(sites: Sequence[Site]) -> Iterator[tuple[ir.Node, int]]:
    """Where operators count keys, or may mask them; and the mask of a BiasSoftmax."""
    for node in (site.node for site in sites):
        if node.op_type == "BiasSoftmax":
            yield node, 1
        elif (node.domain, node.op_type) in FUSED:
            counts = operators.numbers(node, Holds.COUNT, Holds.LAST)
            known = counts if mask_inputs(node) else range(3, len(node.inputs))
            yield from ((node, at) for at in known)


def _is_position(value: ir.Value, batches: set[int | str | None]) -> bool:
    """Whether an input holds positions: of rotary embeddings, or one for a whole batch."""
    return rotates(value) or not rank(value) or (rank(value) == 1 and dim(value, -1) not in batches)
