"""What an attention site of the original graph computes, in numbers, from the values it has there.

    scores = q·kᵀ (B, N, S, T)  → factors, bias, mask →  Softmax  →  weights·v (B, N, S, V)

Shapes: B batch, N heads, S queries, T keys, D width of a head, V that of its values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from helpers import graph
from helpers.feeds.operator_masks import MASKED
from helpers.graph import walks
from helpers.graph.attention_sites import PRODUCTS, SHAPES, equation
from helpers.graph.values import SHAPING

Values = dict[str, np.ndarray]


@dataclass
class SiteNumbers:
    """A site's queries (B, N, S, D), keys (B, N, T, D) and values (B, N, T, V) as its products have
    them, what it multiplies the scores with, what it `added` to them (B, N, S, T), masks among it,
    and its result (B, N, S, V). `scale` is None where that is no single number."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scale: float | None
    softcap: float
    added: np.ndarray
    context: np.ndarray

    @property
    def sizes(self) -> dict[str, int]:
        """B, N, S, D, T and V."""
        return dict(zip("BNSDTV", (*self.query.shape, *self.value.shape[-2:]), strict=True))

    @property
    def hidden(self) -> np.ndarray:
        """True where a score is masked, (B, N, S, T)."""
        return ~(self.added > MASKED)


def tensors(site: graph.Site) -> list[str]:
    """The tensors that `read` needs; none where the site is of another form than it reads."""
    if not _readable(site):
        return []
    asked = [*site.scores.inputs, *site.context.inputs, site.node.inputs[0]]
    asked += [value for node in _way(site) for value in (node.outputs[0], *_factors(node))]
    asked += [site.context.outputs[0]]
    return [*dict.fromkeys(value.name for value in asked)]


def read(site: graph.Site, values: Values, hidden: int) -> SiteNumbers | None:
    """The numbers of `site`, from the `values` of `tensors`; None where it is of another form.

    `hidden` is the width of all heads of queries, by which they are told apart where the graph has
    them with the batch on one axis.
    """
    if not _readable(site):
        return None
    try:
        return _read(site, values, hidden)
    except ValueError:  # axes that do not fit: products over others than those that are read
        return None


def _read(site: graph.Site, values: Values, hidden: int) -> SiteNumbers | None:
    raw = values[site.scores.outputs[0].name]
    lead = raw.shape[:-2]
    query, key = _operands(site.scores, values, of_scores=True)
    heads = lead[-1] if len(lead) == 2 else hidden // query.shape[-1]
    if not lead or not heads or np.prod(lead) % heads:
        return None

    def four(array: np.ndarray) -> np.ndarray:
        array = np.broadcast_to(array, (*lead, *array.shape[-2:]))
        return array.reshape(-1, heads, *array.shape[-2:])

    _, value = _operands(site.context, values, of_scores=False)
    scale, softcap, linear = _scaled(site, values)
    scores = values[site.node.inputs[0].name]
    with np.errstate(over="ignore", invalid="ignore"):
        added = scores.reshape(raw.shape) - linear.reshape(raw.shape)
    context = _context(site.context, values)
    return SiteNumbers(
        *(four(one) for one in (query, key, value)), scale, softcap, four(added), four(context)
    )


def _readable(site: graph.Site) -> bool:
    """Whether the products are MatMul or Einsum, around a Softmax over the last axis, and no
    further product is on the way to it."""
    if site.scores is None or site.node.op_type != "Softmax":
        return False
    axis, shape = site.node.attributes.get_int("axis", -1), site.node.inputs[0].shape
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        return False
    plain = all(
        node.op_type == "MatMul"
        or (node.op_type == "Einsum" and len(node.inputs) == 2 and "." not in equation(node)[1])
        for node in (site.scores, site.context)
    )
    return plain and not {node.op_type for node in _way(site)[1:]} & PRODUCTS


def _way(site: graph.Site) -> list[ir.Node]:
    """The nodes from the product of queries with keys to the Softmax, without it."""
    between, way = walks.between(site.scores, site.node) - {site.node}, [site.scores]
    while True:
        nodes = [node for node in walks.consumers(way[-1]) if node in between]
        nodes = [node for node in nodes if node.op_type not in SHAPES and node not in way]
        if not nodes:
            return way
        way.append(nodes[0])


def _factors(node: ir.Node) -> list[ir.Value]:
    """What a Mul or a Div on the way may scale the scores by."""
    return [*node.inputs] if node.op_type in ("Div", "Mul") else []


def _scaled(site: graph.Site, values: Values) -> tuple[float | None, float, np.ndarray]:
    """What the scores are multiplied with in all (None: by no one number), the cap of their tanh
    or 0, and the scores as they go into the Softmax but for what is added to them."""
    way = _way(site)
    product, cap, later, bounded = 1.0, 0.0, 1.0, False
    linear, added = values[way[0].outputs[0].name], False
    for last, node in itertools.pairwise(way):
        by = _factor(node, last.outputs[0], values)
        product *= by
        bounded = bounded or (node.op_type == "Tanh" and not added)
        added = added or node.op_type not in SHAPING | {"Div", "Mul", "Tanh"}
        if added:
            later *= by
        else:
            linear = values[node.outputs[0].name]
            cap = by if bounded and by != 1 else cap
    known = np.isfinite(product)
    return (product if known else None), cap, linear * (later if known else 1.0)


def _factor(node: ir.Node, mine: ir.Value, values: Values) -> float:
    """What a Mul or a Div multiplies `mine` with, NaN where that is no number; else 1."""
    if node.op_type not in ("Div", "Mul"):
        return 1.0
    other = next((value for value in node.inputs if value is not mine), mine)
    array = values[other.name]
    if array.size != 1 or (node.op_type == "Div" and node.inputs[0] is not mine):
        return float("nan")
    return float(array.ravel()[0]) if node.op_type == "Mul" else 1 / float(array.ravel()[0])


def _operands(node: ir.Node, values: Values, *, of_scores: bool) -> tuple[np.ndarray, np.ndarray]:
    """The operands of a product, rows first: queries and keys, or weights and values."""
    left, right = (values[value.name] for value in node.inputs)
    if node.op_type == "MatMul":
        return left, right.swapaxes(-1, -2) if of_scores else right
    (first, second), result = equation(node)
    if of_scores:  # bqhd, bkhd -> bhqk
        rows, columns, inner = result[-2], result[-1], ({*first} & {*second}) - {*result}
        lead, width = result[:-2], "".join(inner)
        if rows in second:
            first, second, left, right = second, first, right, left
        return _term(left, first, lead + rows + width), _term(right, second, lead + columns + width)
    inner = "".join(({*first} & {*second}) - {*result})  # bhqk, bkhd -> bqhd
    if not first.endswith(inner):
        first, second, left, right = second, first, right, left
    width = "".join({*second} - {*first})
    return left, _term(right, second, first[:-2] + inner + width)


def _term(array: np.ndarray, term: str, wanted: str) -> np.ndarray:
    """An operand of an Einsum, with the axes of `term`, with those that are `wanted`."""
    order = [term.index(letter) for letter in wanted if letter in term]
    array = array.transpose(order)
    for at, letter in enumerate(wanted):
        if letter not in term:
            array = np.expand_dims(array, at)
    return array


def _context(node: ir.Node, values: Values) -> np.ndarray:
    """The product with the values, (B, N, S, V)."""
    array = values[node.outputs[0].name]
    if node.op_type == "MatMul":
        return array
    (first, second), result = equation(node)
    inner = "".join(({*first} & {*second}) - {*result})
    first, second = (first, second) if first.endswith(inner) else (second, first)
    return _term(array, result, first[:-1] + "".join({*second} - {*first}))
