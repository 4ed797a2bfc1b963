"""What masks the keys of attention sites, and which inputs of a model do.

Shapes: B batch, N heads, S queries, T keys (past ones included).
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from helpers.graph import walks
from helpers.graph.attention_sites import FUSED, SHAPES, Site
from helpers.graph.reading import MICROSOFT
from helpers.graph.values import ELEMENTWISE, LOGICAL, SHAPING, dim, rank

# Operators whose input of that number is a mask by the operator's own definition.
MASK_INPUTS = {
    ("", "Attention"): (3,),
    (MICROSOFT, "Attention"): (3, 5),
    (MICROSOFT, "MultiHeadAttention"): (4, 5),
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): (3, 4),
    (MICROSOFT, "EmbedLayerNormalization"): (7,),
    (MICROSOFT, "QEmbedLayerNormalization"): (7,),
    (MICROSOFT, "GroupQueryAttention"): (10,),
}
# And a count of the keys of each row.
_COUNTS = {("", "Attention"): (6,), (MICROSOFT, "GroupQueryAttention"): (5,)}
SEQLENS = 5  # input of GroupQueryAttention: the index of the last key of each row
_ROTATING = SHAPING | {"Add", "Einsum", "MatMul", "Mul", "Sub"}  # from positions to their angles


def rotates(value: ir.Value) -> bool:
    """Whether the angles of rotary embeddings are made of an input: it holds positions."""
    return any(
        node.op_type in ("Cos", "RotaryEmbedding", "Sin")
        for node, _ in walks.uses(value, _ROTATING)
    )


def score_paths(sites: Sequence[Site]) -> set[tuple[ir.Node, int]]:
    """Where something meets the scores of an attention site, or its weights, beside them: node, and
    input.

    That is between the product of queries with keys and the Softmax, between that and the product
    with the values, or at an operator's own mask.
    """
    meetings = set()
    for site in sites:
        masks = MASK_INPUTS.get((site.node.domain, site.node.op_type), ())
        meetings |= {(site.node, position) for position in masks}
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
        kind = (node.domain, node.op_type)
        if node.op_type == "BiasSoftmax":
            yield node, 1
        elif kind in FUSED:
            known = _COUNTS.get(kind, ()) if kind in MASK_INPUTS else range(3, len(node.inputs))
            yield from ((node, at) for at in known)


def _is_position(value: ir.Value, batches: set[int | str | None]) -> bool:
    """Whether an input holds positions: of rotary embeddings, or one for a whole batch."""
    return rotates(value) or not rank(value) or (rank(value) == 1 and dim(value, -1) not in batches)
