"""What form of attention a site is, as far as fusions do not know it, and what can express that."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from helpers import graph
from helpers.graph import walks
from helpers.graph.attention_sites import PRODUCTS
from helpers.graph.caches import caches
from helpers.graph.values import number

FAR = 12  # nodes between a product and its projections, at the most
ROTATED = (
    "queries and keys are rotated by their positions (rotary embeddings): Attention of opset 23 and"
    " MultiHeadAttention take them as they are after that"
)


def packed(site: graph.Site) -> ir.Node | None:
    """The product that makes queries, keys and values together; None where there are several."""
    if site.scores is None:
        return None
    made = [_projection(value, site) for value in _operands(site)]
    return made[0] if made[0] is not None and made.count(made[0]) == 3 else None


def below_packed(site: graph.Site, packed: ir.Node) -> set[str]:
    """The names of the nodes between the product that makes all three and the site's products."""
    ends = {*walks.upstream(site.scores, site.context)}
    return {graph.name(node) for node in walks.downstream(packed) if node in ends} - {
        graph.name(node) for node in walks.between(site.scores, site.context)
    }


def told(site: graph.Site, model: ir.Model) -> list[str]:
    """Each form of `site`, of the `model`, that few fusions know, and which operator can express
    it."""
    return [] if site.scores is None else [*dict.fromkeys(_forms(site, model))]


def _operands(site: graph.Site) -> list[ir.Value]:
    """Queries and keys, and the values."""
    inside = walks.between(site.scores, site.context)
    given = [value for value in site.context.inputs if value is not None]
    values = [value for value in given if value.producer() not in inside]
    return [*site.scores.inputs[:2], *values[:1]]


def _way(value: ir.Value, site: graph.Site) -> Iterator[ir.Node]:
    """The nodes above an operand of a product, up to its projection, that included."""
    start = value.producer()

    def above(node: ir.Node) -> list[ir.Node]:
        return [] if node.op_type in PRODUCTS else walks.producers(node)

    own = {site.scores, site.context, site.node}
    return walks.walk([start] if start is not None else [], above, stop=own, far=FAR)


def _projection(value: ir.Value, site: graph.Site) -> ir.Node | None:
    return next((node for node in _way(value, site) if node.op_type in PRODUCTS), None)


# ── Forms ───────────────────────────────────────────────────────────────────────────────────────


def _forms(site: graph.Site, model: ir.Model) -> Iterator[str]:
    query, key, value = (list(_way(operand, site)) for operand in _operands(site))
    between = walks.between(site.scores, site.node) - {site.scores, site.node}
    kinds = {node.op_type for node in (*query, *key)}
    if "Einsum" in (site.scores.op_type, site.context.op_type):
        yield "its products are Einsum: as MatMul, a path can name them"
    if {"ReduceL2", "LpNormalization"} & kinds:
        yield (
            "queries and keys are divided by their norm (cosine attention): Attention of opset 23"
            " with a scale of 1 takes them as they are"
        )
    if [*rotating(site)]:
        yield ROTATED
    yield from _of_scores(between, site)
    if caches(model, [site]):
        yield (
            "keys of earlier steps are joined to its own (a cache): Attention of opset 23 and"
            " GroupQueryAttention have inputs for them"
        )
    if _partitions(site, [*query, *value]):
        yield (
            "the sequence is cut into windows around it: inside them the attention is an ordinary"
            " one, so start the path at the product with the values, and not at the residual"
        )


def rotating(site: graph.Site) -> Iterator[ir.Node]:
    """What rotates queries and keys: Add(Mul(x, cos), Mul(turned x, sin)), or RotaryEmbedding.

    Of each Add its products too, and what turns x: Concat(Neg(second half), first half).
    """
    for operand in _operands(site)[:2]:
        for node in _way(operand, site):
            if node.op_type == "RotaryEmbedding":
                yield node
            if node.op_type != "Add" or [p.op_type for p in walks.producers(node)] != ["Mul"] * 2:
                continue
            plain, turned = ({*walks.upstream(product, far=4)} for product in walks.producers(node))
            inside = {n for n in plain ^ turned if n.op_type in ("Concat", "Neg", "Slice", "Split")}
            if plain & turned and any(n.op_type == "Neg" for n in inside):
                yield from {node, *walks.producers(node), *inside}


def _of_scores(between: set[ir.Node], site: graph.Site) -> Iterator[str]:
    """What is done to the scores before the Softmax."""
    for node in between:
        others = [
            value
            for value in node.inputs
            if value is not None and value.producer() not in between | {site.scores}
        ]
        if node.op_type == "Tanh":
            yield (
                "the scores go through a tanh (softcap): Attention of opset 23 and"
                " GroupQueryAttention have it"
            )
        if node.op_type == "Add" and any(_is_learned(value) for value in others):
            yield (
                "a learned bias is added to the scores (relative positions): Attention of opset 23"
                " takes it as its mask, MultiHeadAttention as its attention_bias"
            )
        if node.op_type in ("Mul", "Div") and any(
            number(value) is None and _is_learned(value) for value in others
        ):
            yield (
                "the scores have a learned scale: Attention of opset 23 with a scale of 1, the"
                " scale multiplied into the queries"
            )


def _is_learned(value: ir.Value, far: int = 8) -> bool:
    """Whether weights, of more than one number, are in what makes `value`."""

    def is_weight(operand: ir.Value | None) -> bool:
        tensor = ir.convenience.get_const_tensor(operand) if operand is not None else None
        return tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1

    start = value.producer()
    above = walks.upstream(start, far=far) if start is not None else ()
    return is_weight(value) or any(map(is_weight, (v for node in above for v in node.inputs)))


def _partitions(site: graph.Site, way: list[ir.Node]) -> bool:
    """Whether windows are cut out, before the projections or after the result.

    Transpose to (B, H/w, W/w, w, w, C) from (B, H/w, w, W/w, w, C), or back: of a picture
    (B, H, W, C) windows of w × w.
    """

    def is_partition(node: ir.Node) -> bool:
        return node.op_type == "Transpose" and len(node.attributes.get_ints("perm") or ()) == 6

    projections = [node for node in way if node.op_type in PRODUCTS]
    near = [*walks.upstream(*projections, far=FAR), *walks.downstream(site.context, far=FAR)]
    return any(map(is_partition, near))
