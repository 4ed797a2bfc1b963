"""What attention operators mask, read off what they are given.

It is asked of those of com.microsoft, which give out no scores. Shapes: B batch, N heads,
S queries, T keys (past ones included).
"""

import numpy as np
import onnx

from helpers import graph
from helpers.graph import operators
from helpers.graph.operators import Holds

_KINDS = {(graph.MICROSOFT, "Attention"), (graph.MICROSOFT, "MultiHeadAttention")}
_READ = (Holds.HIDDEN, Holds.QUERY, Holds.KEY, Holds.MASK, Holds.BIAS, Holds.PAST, Holds.PAST_KEY)
MASKED = -5e3  # scores at most this low have been masked: by -1e4, -1e6, the smallest float, …


def reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that tell what `node` masks; none where it gives out its scores, or where that is
    not known."""
    if (node.domain, node.op_type) not in _KINDS:
        return []
    wanted = operators.numbers(node, *_READ)
    return [node.input[at] for at in wanted if at < len(node.input) and node.input[at]]


def masked(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> np.ndarray:
    """True where `node`, an operator of the table, masks a score, (B, 1 or N, S, T)."""
    batch, queries, keys = _lengths(node, values)
    hidden = np.zeros((batch, 1, queries, keys), bool)
    bias = added(node, values)
    if bias is not None:
        hidden = hidden | ~(bias > MASKED)
    for one in operators.of(node).holding(Holds.MASK, Holds.COUNT, Holds.ENDS, Holds.LAST):
        mask = _given(node, values, one)
        if mask is None or (one.type == "bool") != (mask.dtype == bool):
            continue
        if mask.dtype == bool:
            hidden = hidden | ~_spread(mask)
        elif one.holds is not Holds.MASK and one.layout(mask.ndim):
            hidden = hidden | _beyond(mask + (one.holds is Holds.LAST), hidden)
        elif one.holds is Holds.MASK and mask.ndim > 1:
            hidden = hidden | _of_mask(mask, hidden)
    return _causal(node, hidden)


def added(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> np.ndarray | None:
    """What `node` adds to its scores, (B or 1, N or 1, S, T); None where it is given nothing."""
    for one in operators.of(node).holding(Holds.BIAS):
        bias = _given(node, values, one)
        if bias is not None and bias.dtype != bool:
            return _spread(bias)
    return None


def _given(
    node: onnx.NodeProto, values: dict[str, np.ndarray], one: operators.Input
) -> np.ndarray | None:
    return values.get(node.input[one.number]) if one.number < len(node.input) else None


def _lengths(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> tuple[int, int, int]:
    """How many rows there are, queries, and keys with past ones."""
    found = {}
    for symbol, *holds in (
        ("B", Holds.HIDDEN, Holds.QUERY, Holds.PACKED),
        ("S", Holds.HIDDEN, Holds.QUERY, Holds.PACKED),
        ("L", Holds.KEY),
        ("P", Holds.PAST, Holds.PAST_KEY),
    ):
        for one in operators.of(node).holding(*holds):
            array = _given(node, values, one)
            layout = one.layout(array.ndim) if array is not None else None
            if layout and symbol in layout.split():
                found[symbol] = array.shape[layout.split().index(symbol)]
    return found["B"], found["S"], found.get("L", found["S"]) + found.get("P", 0)


def _spread(array: np.ndarray) -> np.ndarray:
    """`array` in a layout of "B N S T" with four axes, of which those that it lacks are 1."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _causal(node: onnx.NodeProto, hidden: np.ndarray) -> np.ndarray:
    """`hidden`, and what is later than the query if the operator is causal, or before a window."""
    operator = operators.of(node)
    given = {attribute.name: attribute.i for attribute in node.attribute}
    if given.get(operator.causal, operator.causal_default):
        hidden = hidden | later(hidden)
    window = given.get("local_window_size", -1)
    return hidden | ~later(hidden, -window) if window > 0 else hidden


def later(scores: np.ndarray, by: int = 0) -> np.ndarray:
    """True where a key is later than the query and `by` more, (S, T); the last query is that of the
    last key."""
    queries, keys = scores.shape[-2:]
    return np.arange(keys)[None, :] > np.arange(queries)[:, None] + keys - queries + by


def _beyond(ends: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """True where a row has no key by its `ends`, (B,), or (2·B,) with where they begin as well."""
    batch, at = len(hidden), np.arange(hidden.shape[-1])
    ends = ends.ravel()
    starts = ends[batch:, None] if len(ends) == 2 * batch else 0
    return ((at >= ends[:batch, None]) | (at < starts))[:, None, None, :]


def _of_mask(mask: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """True where a mask_index or key_padding_mask has no key, in the forms that there are."""
    queries, keys = hidden.shape[-2:]
    kept = mask != 0
    if mask.ndim == 2:  # (B, T), or (B, 1) for none
        return ~kept[:, None, None, :] if mask.shape[-1] == keys else np.zeros_like(hidden)
    if mask.ndim == 3:  # (B, S, T)
        return ~kept[:, None]
    return ~kept[:, :, keys - queries : keys, :keys]  # (B, 1, M, M), M the longest there may be
