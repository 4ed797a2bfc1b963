"""What the attention operators take: the inputs of each, their layouts, the sense of their masks.

A layout is axes in order, "B S N·D": a product is one axis, and "N|1" may be 1 as well, for all
heads alike. B batch, S queries, L keys of this step, P past keys, T = P + L all keys, N heads,
K heads of keys (N a multiple of it), D width of a head, V that of a head's values, H width of the
hidden states, M most positions.

It follows the operators' schemas, and the kernels of ONNX Runtime 1.32 on the CPU, which refuse
some of what those allow; tests run each line of it. Attention is that of opset 23 and 24 (that of
25 has no kernel, and is run as the nodes it stands for). Left out is what only shared buffers,
beams and quantised caches need.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from helpers.graph.reading import MICROSOFT, STANDARD


class Holds(enum.StrEnum):
    """What an input holds, in words."""

    QUERY = "queries"
    KEY = "keys"
    VALUE = "values"
    PACKED = "queries, keys and values packed"
    HIDDEN = "hidden states, before the projections"
    WEIGHTS = "weights of the projections [Q|K|V]"
    PROJECTION_BIAS = "bias of the projections [Q|K|V]"
    BIAS = "numbers added to the scores, those of integer type as well"
    MASK = "which keys are kept: those where it is True or 1"
    COUNT = "how many keys a row has, from its first on"
    ENDS = "after which key each row ends, and then at which it begins"
    LAST = "how many keys a row has, less 1"
    TOTAL = "how many keys the longest row has"
    PAST = "keys and values of earlier steps"
    PAST_KEY = "keys of earlier steps"
    PAST_VALUE = "values of earlier steps"
    COS = "cosines of the rotary embedding"
    SIN = "sines of the rotary embedding"
    POSITION = "the position of each query"
    SINK = "a score for no key, of each head"
    NORM = "weights of a normalization of queries or keys"


@dataclass(frozen=True)
class Input:
    """One input of an operator, by its number and its name in the schema.

    An input that may hold either of two things stands twice. `refused` are layouts that others take
    or that one might expect, and the kernel refuses.
    """

    number: int
    name: str
    holds: Holds
    layouts: tuple[str, ...]
    refused: tuple[str, ...] = ()
    type: str = "float32"  # or another that floats are computed in; of a mask: bool or int32

    def layout(self, rank: int) -> str | None:
        """The layout of so many axes; None where there is none."""
        return next((axes for axes in self.layouts if len(axes.split()) == rank), None)

    def axis(self, symbol: str, rank: int) -> int:
        """Which axis, from the start, is `symbol` in the layout of so many axes."""
        return (self.layout(rank) or self.layouts[0]).split().index(symbol)


@dataclass(frozen=True)
class Refused:
    """What the kernel refuses though each input has a layout that it takes: in words, the inputs
    given by number with their layouts (None: left out), and attributes."""

    why: str
    given: Mapping[int, str | None]
    attributes: Mapping[str, int] = field(default_factory=dict)
    outputs: int = 3


@dataclass(frozen=True)
class Operator:
    """An attention operator: its inputs, the `presents` among its outputs, and the names of its
    attributes for heads, heads of keys, and whether it is causal if that is not given."""

    inputs: tuple[Input, ...]
    presents: tuple[int, ...]
    heads: str
    key_heads: str
    causal: str
    causal_default: int = 0
    refused: tuple[Refused, ...] = ()

    def holding(self, *holds: Holds) -> list[Input]:
        """Its inputs that hold one of these."""
        return [one for one in self.inputs if one.holds in holds]


_SCORES = ("B|1 N|1 S T",)
_NO_SCORES = ("N S T", "B S T", "S T", "B 1 1 T", "B N 1 T", "B N S 1", "B T")
_MASKS = (
    *("1 T", "1 S T", "B 1 T", "S T", "B 1 1 T", "B 1 S T", "B 1 M M", "B N S T"),
    *("1 1 S T", "T"),
)

_ATTENTION = Operator(
    inputs=(
        Input(0, "Q", Holds.QUERY, ("B N S D", "B S N·D"), ("S D", "1 N S D")),
        Input(1, "K", Holds.KEY, ("B K L D", "B L K·D"), ("B K D L", "B L K D", "1 K L D")),
        Input(2, "V", Holds.VALUE, ("B K L V", "B L K·V"), ("B K V L", "B L K V", "1 K L V")),
        Input(
            *(3, "attn_mask", Holds.BIAS, ("B|1 N|1 S T", "N|1 S T", "S T")),
            ("B S T", "B 1 1 T", "B N 1 T", "B N S 1", "B T", "1 T", "T"),
        ),
        Input(
            *(3, "attn_mask", Holds.MASK, ("B|1 N|1 S T", "N|1 S T", "S T")),
            ("B S T", "B 1 1 T", "B N 1 T", "B N S 1", "B T", "1 T", "T"),
            "bool",
        ),
        Input(4, "past_key", Holds.PAST_KEY, ("B K P D",), ("1 K P D", "B P K D", "B P K·D")),
        Input(5, "past_value", Holds.PAST_VALUE, ("B K P V",), ("1 K P V", "B P K V", "B P K·V")),
        Input(6, "nonpad_kv_seqlen", Holds.COUNT, ("B",), ("B 1", "1"), "int64"),  # opset 24
    ),
    presents=(1, 2),
    heads="q_num_heads",
    key_heads="kv_num_heads",
    causal="is_causal",
    refused=(
        Refused("queries of four axes and keys of three", {1: "B L K·D", 2: "B L K·V"}),
        Refused(
            "three axes without q_num_heads and kv_num_heads",
            {0: "B S N·D", 1: "B L K·D", 2: "B L K·V"},
            {"q_num_heads": 0, "kv_num_heads": 0},
        ),
        Refused("past keys without past values", {4: "B K P D"}),
        Refused(
            "past keys without outputs for the present ones",
            {4: "B K P D", 5: "B K P V"},
            outputs=1,
        ),
        Refused("a count of keys with past ones", {4: "B K P D", 5: "B K P V", 6: "B"}),
    ),
)

_PACKED_ATTENTION = Operator(
    inputs=(
        Input(0, "input", Holds.HIDDEN, ("B S H",), ("S H", "B 1 S H")),
        Input(
            *(1, "weights", Holds.WEIGHTS, ("H N·D+N·D+N·V",)),
            ("N·D+N·D+N·V H", "3 H N·D"),
        ),
        Input(
            *(2, "bias", Holds.PROJECTION_BIAS, ("N·D+N·D+N·V",)),
            ("1 N·D+N·D+N·V", "N·D"),
        ),
        Input(3, "mask_index", Holds.MASK, ("B T", "B S T"), _MASKS, "int32"),
        Input(3, "mask_index", Holds.COUNT, ("B", "3·B+2"), ("1",), "int32"),
        Input(3, "mask_index", Holds.ENDS, ("2·B",), ("2 B",), "int32"),
        Input(4, "past", Holds.PAST, ("2 B N P D",), ("2 1 N P D", "2 B P N D", "B N P D")),
        Input(5, "attention_bias", Holds.BIAS, _SCORES, _NO_SCORES),
    ),
    presents=(1,),
    heads="num_heads",
    key_heads="num_heads",
    causal="unidirectional",
    refused=(
        Refused("something added to the scores with past keys", {4: "2 B N P D", 5: "B N S T"}),
        Refused("past keys without an output for the present ones", {4: "2 B N P D"}, outputs=1),
    ),
)

_MULTI_HEAD_ATTENTION = Operator(
    inputs=(
        Input(0, "query", Holds.QUERY, ("B S N·D",), ("B N S D", "B S N D", "S N·D")),
        Input(0, "query", Holds.PACKED, (), ("B S N 3 D", "B S 3 N D", "B S 3·N·D")),
        Input(
            *(1, "key", Holds.KEY, ("B L N·D", "B N L D")),
            ("B L N D", "1 L N·D", "B L K·D", "B L N 2 D"),
        ),
        Input(
            *(2, "value", Holds.VALUE, ("B L N·V", "B N L D")),
            ("B L N V", "1 L N·V", "B N L V"),
        ),
        Input(
            *(3, "bias", Holds.PROJECTION_BIAS, ("N·D+N·D+N·V",)),
            ("1 N·D+N·D+N·V", "N·D"),
        ),
        Input(
            *(4, "key_padding_mask", Holds.MASK, ("B T", "B S T")),
            *(_MASKS, "int32"),
        ),
        Input(4, "key_padding_mask", Holds.COUNT, ("B", "3·B+2"), ("2·B", "B 1", "1"), "int32"),
        Input(5, "attention_bias", Holds.BIAS, _SCORES, _NO_SCORES),
        Input(6, "past_key", Holds.PAST_KEY, ("B N P D",), ("1 N P D", "B P N D", "B P N·D")),
        Input(7, "past_value", Holds.PAST_VALUE, ("B N P V",), ("1 N P V", "B P N V", "B P N·V")),
    ),
    presents=(1, 2),
    heads="num_heads",
    key_heads="num_heads",
    causal="unidirectional",
    refused=(
        Refused("keys of four axes and values of three", {1: "B N L D", 2: "B L N·V"}),
        Refused("queries alone", {1: None, 2: None}),
        Refused("keys without values", {2: None}),
        Refused("past keys without past values", {6: "B N P D"}),
    ),
)

_GROUPED = "B S K·D"
_GROUP_QUERY_ATTENTION = Operator(  # L = S: there are as many new keys as queries
    inputs=(
        Input(0, "query", Holds.QUERY, ("B S N·D",), ("B N S D", "B S N D")),
        Input(0, "query", Holds.PACKED, ("B S N·D+2·K·D",)),
        Input(1, "key", Holds.KEY, (_GROUPED,), ("B K S D", "1 S K·D", "B L K·D")),
        Input(2, "value", Holds.VALUE, (_GROUPED,), ("B K S D", "1 S K·D", "B S K·V")),
        Input(3, "past_key", Holds.PAST_KEY, ("B K P D",), ("1 K P D", "B P K D", "B N P D")),
        Input(4, "past_value", Holds.PAST_VALUE, ("B K P D",), ("1 K P D", "B P K D", "B N P D")),
        Input(5, "seqlens_k", Holds.LAST, ("B", "B 1"), ("1",), "int32"),
        Input(6, "total_sequence_length", Holds.TOTAL, ("", "1"), ("1 1", "B"), "int32"),
        Input(7, "cos_cache", Holds.COS, ("M D/2",), ("B M D/2", "M D")),
        Input(8, "sin_cache", Holds.SIN, ("M D/2",), ("B M D/2", "M D")),
        Input(9, "position_ids", Holds.POSITION, ("B S",), ("S", "1 S"), "int64"),
        Input(10, "attention_bias", Holds.BIAS, _SCORES, _NO_SCORES),
        Input(11, "head_sink", Holds.SINK, ("N",), ("K", "1 N")),
        Input(14, "q_norm_weight", Holds.NORM, (), ("D",)),
        Input(15, "k_norm_weight", Holds.NORM, (), ("D",)),
    ),
    presents=(1, 2),
    heads="num_heads",
    key_heads="kv_num_heads",
    causal="causal",
    causal_default=1,
    refused=(
        Refused(
            "several queries of several rows at once, with past keys",
            {3: "B K P D", 4: "B K P D"},
        ),
        Refused("past keys without past values", {3: "B K P D"}),
        Refused("rotation without its tables", {}, {"do_rotary": 1}),
        Refused("no count of keys", {5: None}),
        Refused("no length of the longest row", {6: None}),
    ),
)

OPERATORS = {
    **{(domain, "Attention"): _ATTENTION for domain in STANDARD},
    (MICROSOFT, "Attention"): _PACKED_ATTENTION,
    (MICROSOFT, "MultiHeadAttention"): _MULTI_HEAD_ATTENTION,
    (MICROSOFT, "GroupQueryAttention"): _GROUP_QUERY_ATTENTION,
}
PASTS = (Holds.PAST, Holds.PAST_KEY, Holds.PAST_VALUE)


def of(node: ir.Node | onnx.NodeProto) -> Operator | None:
    """What the operator of `node` takes; None where the table has it not."""
    return OPERATORS.get((node.domain, node.op_type))


def numbers(node: ir.Node | onnx.NodeProto, *holds: Holds) -> list[int]:
    """The inputs of `node`, by number, that hold one of these; none where the table has it not."""
    operator = of(node)
    inputs = operator.holding(*holds) if operator else ()
    return [*dict.fromkeys(one.number for one in inputs)]


def held(node: ir.Node | onnx.NodeProto, number: int) -> set[Holds]:
    """What the input of that number of `node` may hold; nothing where the table has it not."""
    operator = of(node)
    return {one.holds for one in operator.inputs if one.number == number} if operator else set()


def laid(array: np.ndarray, axes: str, layout: str) -> np.ndarray:
    """`array` of the `axes` "B N S D" in another layout of these: "B S N·D", say."""
    sizes = dict(zip(axes.split(), array.shape, strict=True))
    order = [axes.split().index(axis) for axis in layout.replace("·", " ").split()]
    return array.transpose(order).reshape(shapes(layout, sizes)[0])


def shapes(layout: str, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The shapes that a layout allows where its symbols have these sizes; the full one first."""
    shapes_so_far: list[tuple[int, ...]] = [()]
    for axis in layout.split():
        options = [_size(one, sizes) for one in axis.split("|")]
        shapes_so_far = [(*shape, size) for shape in shapes_so_far for size in options]
    return shapes_so_far


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    def factor(one: str) -> int:
        return int(one) if one.isdecimal() else sizes[one]

    axis, _, divisor = axis.partition("/")
    total = sum(math.prod(factor(one) for one in term.split("·")) for term in axis.split("+"))
    return total // int(divisor or 1)
