"""Operators of the standard written out, in the forms that OpenVINO joins by itself.

    Attention(q, k, v, bias)        →  MatMul(q, kᵀ) → Mul → Add → Softmax → MatMul(…, v)
    RotaryEmbedding(x, cos, sin)    →  x·[cos|cos] + [-x2|x1]·[sin|sin]
    RMSNormalization(x, weight)     →  Mul → ReduceMean → Add → Sqrt → Div → Mul

OpenVINO makes one kernel of the first, if nothing but these is between the two products, and one of
each of the others (`Subgraph`, `RoPE` and `RMS` in its runtime model; it recognises the halves of x
as two Slices, not as a Split). Shapes: queries (B, N, S, D), keys and values (B, K, T, D) of K
heads, or with three axes, (B, S, N·D); bias (B, N, S, T) or what broadcasts to it.

Follows ONNX's Attention, RotaryEmbedding and RMSNormalization, opset 23.
"""

import math

import onnx_ir as ir

from helpers.fuse.building import Tape
from helpers.fuse.scores import Left
from helpers.graph import walks
from helpers.graph.values import ELEMENTWISE, NOTHING, SHAPING, dim, rank

MASKED = -3.3e38  # added to the score of a masked key: near bfloat16's lowest, so never infinite
MASKED_IN_HALF = -60000.0  # the same where float16 is computed in
_INT = ir.DataType.INT64
WEIGHTS = 3  # the qk_matmul_output_mode of the weights


# ── Attention ───────────────────────────────────────────────────────────────────────────────────


def attention(node: ir.Node) -> None:
    """Write out `node`, a standard Attention, in its place.

    A row without a key gets 0, as from Attention. Raises `Left`, with the graph as it was, where
    that cannot be done.
    """
    heads, key_heads = _heads(node)
    tape, dtype = Tape(), _dtype(node)
    query, key, value, bias, past_key, past_value = _inputs(node, 6)
    flat = "q_num_heads" in node.attributes  # three axes
    if flat:
        query = _split(tape, query, heads)
        key, value = (_split(tape, one, key_heads) for one in (key, value))
    if past_key is not None:
        key = tape.op("Concat", [past_key, key], {"axis": 2})
        value = tape.op("Concat", [past_value, value], {"axis": 2})
    presents = [key, value]
    if heads != key_heads:
        key, value = (_repeated(tape, one, heads, key_heads) for one in presents)
    bias, has_keys = _finite(tape, bias, dtype)
    transposed = tape.op("Transpose", [key], {"perm": [0, 1, 3, 2]})
    scores = tape.op("MatMul", [query, transposed])
    scores = tape.op("Mul", [scores, _scale(tape, node, query, dtype)])
    scores = _capped(tape, scores, node.attributes.get_float("softcap", 0.0), dtype)
    if node.attributes.get_int("is_causal", 0):
        later = tape.op("Not", [_up_to_itself(tape, query, key, past_key)])
        scores = tape.op("Add", [scores, _masking(tape, later, dtype)])
    if bias is not None:
        scores = tape.op("Add", [scores, bias])
    weights = _softmax(tape, scores, node.attributes.get_int("softmax_precision", 0), dtype)
    result = tape.op("MatMul", [weights, value])
    if has_keys is not None:
        result = tape.op("Mul", [result, has_keys])
    if flat:
        result = tape.op("Transpose", [result], {"perm": [0, 2, 1, 3]})
        result = tape.op("Reshape", [result, tape.ints(0, 0, -1)])
    _replace(node, tape, [result, *presents, weights])


def _inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    """The first `count` inputs of `node`, None for those that are not given."""
    return [*node.inputs, *[None] * count][:count]


def _dtype(node: ir.Node) -> ir.DataType:
    """The type of float that `node` takes."""
    return node.inputs[0].dtype or node.outputs[0].dtype or ir.DataType.FLOAT


def _heads(node: ir.Node) -> tuple[int, int]:
    """How many heads there are, and how many of keys; raises `Left` where these are unknown, or the
    operator does more than is written out."""
    if len(node.inputs) > 6 and node.inputs[6] is not None:
        raise Left("it is told how many keys each row has")
    scores_read = len(node.outputs) > 3 and bool(node.outputs[3].name)
    if scores_read and node.attributes.get_int("qk_matmul_output_mode", 0) != WEIGHTS:
        raise Left("its scores are read elsewhere")
    given = [node.attributes.get_int(f"{of}_num_heads", 0) for of in ("q", "kv")]
    heads, key_heads = given if all(given) else (dim(value, -3) for value in node.inputs[:2])
    if not any(isinstance(one, int) for one in (heads, key_heads)):
        return 1, 1  # as many of keys, or one, as a product takes them
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        raise Left("how many heads there are is not known")
    return heads, key_heads


def _scale(tape: Tape, node: ir.Node, query: ir.Value, dtype: ir.DataType) -> ir.Value:
    """What the scores of `query` (B, N, S, D) are multiplied with: by default 1/√D."""
    width = dim(node.inputs[0], -1)
    if "q_num_heads" in node.attributes and isinstance(width, int):
        width //= node.attributes.get_int("q_num_heads")
    if "scale" in node.attributes:
        return tape.number(node.attributes.get_float("scale"), dtype)
    if isinstance(width, int):
        return tape.number(1 / math.sqrt(width), dtype)
    width = tape.op("Cast", [tape.sizes(query, -1)], {"to": int(dtype)})
    return tape.op("Reciprocal", [tape.op("Sqrt", [width])])


def _split(tape: Tape, value: ir.Value, heads: int) -> ir.Value:
    """(B, S, N·D) as (B, N, S, D)."""
    split = tape.op("Reshape", [value, tape.ints(0, 0, heads, -1)])
    return tape.op("Transpose", [split], {"perm": [0, 2, 1, 3]})


def _repeated(tape: Tape, value: ir.Value, heads: int, key_heads: int) -> ir.Value:
    """Each of the K heads of (B, K, T, D) as often as queries share it: (B, N, T, D)."""
    apart = tape.op("Unsqueeze", [value, tape.ints(2)])
    times = tape.op("Expand", [apart, tape.ints(1, 1, heads // key_heads, 1, 1)])
    shape = tape.shape(tape.ints(0, heads), tape.sizes(value, 2))
    return tape.op("Reshape", [times, shape])


def _capped(tape: Tape, scores: ir.Value, cap: float, dtype: ir.DataType) -> ir.Value:
    """cap·tanh(scores / cap); the scores themselves where there is none."""
    if not cap:
        return scores
    number = tape.number(cap, dtype)
    return tape.op("Mul", [tape.op("Tanh", [tape.op("Div", [scores, number])]), number])


def _finite(
    tape: Tape, bias: ir.Value | None, dtype: ir.DataType
) -> tuple[ir.Value | None, ir.Value | None]:
    """What is added to the scores for `bias` (…, S, T), which may be a mask, in finite numbers, and
    1 for each row (…, S, 1) that has a key, 0 for the others; None where it masks nothing."""
    if bias is None or not _may_mask(bias):
        return bias, None
    if bias.dtype == ir.DataType.BOOL:
        bias = _masking(tape, tape.op("Not", [bias]), dtype)
    else:
        bias = tape.op("Max", [bias, tape.number(_lowest(dtype), dtype)])
    most = tape.op("ReduceMax", [bias, tape.ints(-1)])
    has_keys = tape.op("Greater", [most, tape.number(_lowest(dtype) / 2, dtype)])
    return bias, tape.op("Cast", [has_keys], {"to": int(dtype)})


def _may_mask(bias: ir.Value) -> bool:
    """Whether `bias` is a mask, given from outside, or put together from a number that masks."""

    def parts(value: ir.Value) -> list[ir.Value]:
        node = value.producer()
        passes = node is not None and node.op_type in ELEMENTWISE | SHAPING
        return [given for given in node.inputs if given is not None] if passes else []

    values = [*walks.walk([bias], parts)]
    tensors = [*map(ir.convenience.get_const_tensor, values)]
    floats = [each for each in tensors if each is not None and each.dtype.is_floating_point()]
    return (
        bias.dtype == ir.DataType.BOOL
        or any(value.is_graph_input() for value in values)
        or any((each.numpy() <= NOTHING).any() for each in floats)
    )


def _up_to_itself(
    tape: Tape, query: ir.Value, key: ir.Value, past_key: ir.Value | None
) -> ir.Value:
    """Which keys each query has, (S, T), where it has those up to its own, and all past ones."""
    rows, keys = (
        tape.op("Range", [tape.number(0, _INT), _length(tape, one), tape.number(1, _INT)])
        for one in (query, key)
    )
    if past_key is not None:
        rows = tape.op("Add", [rows, _length(tape, past_key)])
    return tape.op("GreaterOrEqual", [tape.op("Unsqueeze", [rows, tape.ints(1)]), keys])


def _length(tape: Tape, value: ir.Value) -> ir.Value:
    """The size of the last axis but one, as a number."""
    return tape.op("Squeeze", [tape.sizes(value, -2, -1)])


def _masking(tape: Tape, masked: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The lowest number where `masked` is True, and 0 elsewhere."""
    return tape.op("Where", [masked, tape.number(_lowest(dtype), dtype), tape.number(0.0, dtype)])


def _lowest(dtype: ir.DataType) -> float:
    return MASKED_IN_HALF if dtype == ir.DataType.FLOAT16 else MASKED


def _softmax(tape: Tape, scores: ir.Value, precision: int, dtype: ir.DataType) -> ir.Value:
    """The weights, of type `dtype`, computed in `precision` where that is given."""
    if precision in (0, dtype):
        return tape.op("Softmax", [scores], {"axis": -1})
    weights = tape.op("Softmax", [tape.op("Cast", [scores], {"to": precision})], {"axis": -1})
    return tape.op("Cast", [weights], {"to": int(dtype)})


# ── Others ──────────────────────────────────────────────────────────────────────────────────────


def rotary_embedding(node: ir.Node) -> None:
    """Write out `node`, a RotaryEmbedding of x (B, N, S, D) by cos and sin (B, S, D/2), or by
    tables (positions, D/2) that position_ids (B, S) look up; raises `Left` on other forms."""
    value, cos, sin, positions = _inputs(node, 4)
    width = dim(value, -1)
    partial = node.attributes.get_int("rotary_embedding_dim", 0)
    if node.attributes.get_int("interleaved", 0) or partial not in (0, width):
        raise Left("it rotates pairs, or a part of the width")
    if rank(value) != 4 or not isinstance(width, int):
        raise Left("it is not on four axes of a known width")
    tape = Tape()
    if positions is not None:
        cos, sin = (tape.op("Gather", [table, positions]) for table in (cos, sin))
    cos, sin = (
        tape.op("Unsqueeze", [tape.op("Concat", [table, table], {"axis": -1}), tape.ints(1)])
        for table in (cos, sin)
    )
    half, last = tape.ints(width // 2), tape.ints(-1)
    first = tape.op("Slice", [value, tape.ints(0), half, last])
    second = tape.op("Slice", [value, half, tape.ints(width), last])
    turned = tape.op("Concat", [tape.op("Neg", [second]), first], {"axis": -1})
    parts = [tape.op("Mul", [value, cos]), tape.op("Mul", [turned, sin])]
    _replace(node, tape, [tape.op("Add", parts)])


def rms_normalization(node: ir.Node) -> None:
    """Write out `node`, an RMSNormalization over the last axis; raises `Left` on more axes."""
    value, weight = node.inputs[:2]
    axis, axes = node.attributes.get_int("axis", -1), rank(value)
    if axis != -1 and axis + 1 != axes:
        raise Left("it is over more than the last axis")
    tape, dtype = Tape(), _dtype(node)
    stash = ir.DataType(node.attributes.get_int("stash_type", 1))
    if stash != dtype:
        value = tape.op("Cast", [value], {"to": int(stash)})
    mean = tape.op("ReduceMean", [tape.op("Mul", [value, value]), tape.ints(-1)])
    epsilon = tape.number(node.attributes.get_float("epsilon", 1e-5), stash)
    root = tape.op("Sqrt", [tape.op("Add", [mean, epsilon])])
    result = tape.op("Div", [value, root])
    if stash != dtype:
        result = tape.op("Cast", [result], {"to": int(dtype)})
    _replace(node, tape, [tape.op("Mul", [result, weight])])


def fast_gelu(node: ir.Node) -> None:
    """Write com.microsoft's FastGelu `node`, gelu(x + bias) by tanh, as the standard's Gelu."""
    tape, (value, bias) = Tape(), _inputs(node, 2)
    if bias is not None:
        value = tape.op("Add", [value, bias])
    _replace(node, tape, [tape.op("Gelu", [value], {"approximate": "tanh"})])


def _replace(node: ir.Node, tape: Tape, results: list[ir.Value]) -> None:
    """Put what is on `tape` in the place of `node`, whose outputs are `results`, in order."""
    new = results[: len(node.outputs)]
    for old, value in zip(node.outputs, new, strict=True):
        value.type, value.shape = old.type, old.shape
    for made in tape.nodes:
        made.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], tape.nodes, node.outputs, new)
