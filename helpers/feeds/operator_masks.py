"""What operators of com.microsoft mask, read off what they are given: they give out no scores.

Follows ONNX Runtime's Attention and MultiHeadAttention. Shapes: B batch, N heads,
S queries, T keys (past ones included).
"""

import numpy as np
import onnx

from helpers import graph

# Operator → its inputs: (mask, bias, past, axis of the past's length).
_INPUTS = {"Attention": (3, 5, 4, 3), "MultiHeadAttention": (4, 5, 6, 2)}
MASKED = -5e3  # scores at most this low have been masked: by -1e4, -1e6, the smallest float, …


def reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that tell what `node` masks; none where it is no such operator."""
    if node.domain != graph.MICROSOFT or node.op_type not in _INPUTS:
        return []
    mask, bias, past, _ = _INPUTS[node.op_type]
    wanted = [0, mask, bias, past] + ([1] if node.op_type == "MultiHeadAttention" else [])
    return [node.input[at] for at in wanted if at < len(node.input) and node.input[at]]


def masked(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> np.ndarray:
    """True where `node` masks a score, (B, 1 or N, S, T)."""

    def given(at: int) -> np.ndarray | None:
        name = node.input[at] if at < len(node.input) else ""
        return values.get(name)

    mask_at, bias_at, past_at, axis = _INPUTS[node.op_type]
    query, mask, bias, past = (given(at) for at in (0, mask_at, bias_at, past_at))
    batch, queries = query.shape[:2]
    keys = queries
    if node.op_type == "MultiHeadAttention" and (key := given(1)) is not None:
        keys = key.shape[2] if key.ndim == 4 else key.shape[1]
    if past is not None:
        keys += past.shape[axis]
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
