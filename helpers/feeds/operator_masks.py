"""What operators of com.microsoft mask, read off what they are given: they give out no scores.

Follows ONNX Runtime's Attention and MultiHeadAttention. Shapes: B batch, N heads,
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
    """The tensors that tell what `node` masks; none where it is no such operator."""
    if (node.domain, node.op_type) not in _KINDS:
        return []
    wanted = operators.numbers(node, *_READ)
    return [node.input[at] for at in wanted if at < len(node.input) and node.input[at]]


def masked(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> np.ndarray:
    """True where `node` masks a score, (B, 1 or N, S, T)."""
    operator = operators.of(node)

    def given(*holds: Holds) -> tuple[operators.Input | None, np.ndarray | None]:
        """The input that holds one of these, and its values; None where it is not given."""
        one = next(iter(operator.holding(*holds)), None)
        within = one is not None and one.number < len(node.input)
        return one, values.get(node.input[one.number]) if within else None

    _, query = given(Holds.HIDDEN, Holds.QUERY)
    key_input, key = given(Holds.KEY)
    past_input, past = given(Holds.PAST, Holds.PAST_KEY)
    _, mask = given(Holds.MASK)
    _, bias = given(Holds.BIAS)
    batch, queries = query.shape[:2]
    keys = queries if key is None else key.shape[key_input.axis("L", key.ndim)]
    keys += 0 if past is None else past.shape[past_input.axis("P", past.ndim)]
    hidden = np.zeros((batch, 1, queries, keys), bool)
    if mask is not None:
        hidden = hidden | _of_mask(mask, batch, queries, keys)
    if bias is not None:
        hidden = hidden | ~(bias > MASKED)
    if any(attribute.name == "unidirectional" and attribute.i for attribute in node.attribute):
        own = np.arange(queries)[:, None] + keys - queries
        hidden = hidden | (np.arange(keys)[None, :] > own)
    return hidden


def _of_mask(mask: np.ndarray, batch: int, queries: int, keys: int) -> np.ndarray:
    """True where a mask_index or key_padding_mask has no key, in the forms that there are."""
    at = np.arange(keys)
    if mask.ndim == 1:  # (B,): where keys end; (2·B,): and where they begin
        end = mask[:batch, None]
        start = mask[batch : 2 * batch, None] if len(mask) == 2 * batch else 0
        return ((at >= end) | (at < start))[:, None, None, :]
    kept = mask != 0
    if mask.ndim == 2:  # (B, T)
        return ~kept[:, None, None, :keys]
    if mask.ndim == 3:  # (B, S, T)
        return ~kept[:, None]
    return ~kept[:, :, keys - queries : keys, :keys]  # (B, 1, M, M), M the longest there may be
