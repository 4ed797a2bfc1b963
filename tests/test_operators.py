"""The table of operators against ONNX Runtime's kernels on the CPU: each layout is taken and means
what the table says, by a reference in NumPy; each one that is refused raises."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from helpers import files, graph
from helpers.feeds.operator_masks import masked
from helpers.graph import operators
from helpers.graph.operators import OPERATORS, Holds, Input, Operator

KINDS = [kind for kind in OPERATORS if kind[0] != "ai.onnx"]
GROUPED = (graph.MICROSOFT, "GroupQueryAttention")
PACKED = (graph.MICROSOFT, "Attention")

# The axes that each input's array is made with, before it is laid out.
PLAIN = {
    Holds.QUERY: "B N S D",
    Holds.KEY: "B K L D",
    Holds.VALUE: "B K L V",
    Holds.HIDDEN: "B S H",
    Holds.BIAS: "B N S T",
    Holds.MASK: "B N S T",
    Holds.PAST: "2 B N P D",
    Holds.PAST_KEY: "B K P D",
    Holds.PAST_VALUE: "B K P V",
    Holds.COS: "M D/2",
    Holds.SIN: "M D/2",
    Holds.SINK: "N",
}


def sizes(kind: tuple[str, str], past: bool) -> dict[str, int]:
    """Of each symbol; no two are the same but where the operator has them so."""
    found = {"B": 3, "N": 4, "K": 2, "S": 5, "L": 7, "P": 0, "D": 16, "V": 12, "H": 10, "M": 9}
    if past:
        found["P"] = 6
    if past and kind == GROUPED:
        found["S"] = 1  # several queries of several rows are refused
    if kind == PACKED:
        found["L"] = found["S"]
    if past and kind[0]:
        found["V"] = found["D"]
    return found | {"T": found["P"] + found["S" if kind == GROUPED else "L"]}


def laid(array: np.ndarray, axes: str, layout: str) -> np.ndarray:
    """`array` of these axes in another layout: those it lacks are dropped, at their first."""
    array_axes, wanted = axes.split(), layout.replace("·", " ").split()
    for axis in reversed([axis for axis in array_axes if axis not in wanted]):
        array = array.take(0, axis=array_axes.index(axis))
        array_axes.remove(axis)
    return operators.laid(array, " ".join(array_axes), layout)


class Case:
    """One operator with arrays for its inputs, by number, and what it must compute of them."""

    def __init__(self, kind: tuple[str, str], past: bool = False) -> None:
        self.kind, self.operator = kind, OPERATORS[kind]
        self.sizes = sizes(kind, past)
        self.random = np.random.default_rng(0)
        self.plain: dict[Holds, np.ndarray] = {}
        self.arrays: dict[int, np.ndarray] = {}
        self.attributes: dict[str, int | list[int]] = {}
        s = self.sizes
        required = [Holds.QUERY, Holds.KEY, Holds.VALUE, Holds.HIDDEN, Holds.WEIGHTS, Holds.LAST]
        for one in self.operator.holding(
            *required, Holds.TOTAL, *(operators.PASTS if past else ())
        ):
            self.give(one, one.layouts[0])
        if kind[0]:
            self.attributes = {self.operator.heads: s["N"]}
        if kind == GROUPED:
            self.attributes["kv_num_heads"] = s["K"]
        if kind == PACKED:
            self.attributes["qkv_hidden_sizes"] = [
                s["N"] * s["D"],
                s["N"] * s["D"],
                s["N"] * s["V"],
            ]

    def give(self, one: Input, layout: str, single: str = "") -> None:
        """Give the input in this layout, with an axis of 1 where `single` names it."""
        axes = self._axes(one, layout)
        if one.holds not in self.plain:
            self.plain[one.holds] = self._made(one, axes)
        array = self.plain[one.holds]
        layout = " ".join(axis.split("|")[0] for axis in layout.split())
        if one.holds in (Holds.BIAS, Holds.MASK):
            kept = [axis for axis in layout.split() if axis not in single]
            for at, axis in enumerate(axes.split()):
                if axis not in kept:
                    array = array.take([0], axis=at)
            self.plain[one.holds] = array
        if axes and one.holds is not Holds.PAST and "/" not in axes:
            array = laid(array, axes, layout)
        elif one.holds in (Holds.COUNT, Holds.LAST, Holds.TOTAL):
            array = self._counts(array, layout)
        self.arrays[one.number] = array.astype(one.type)
        if one.number < 3 and array.ndim == 3 and not self.kind[0]:
            self.attributes = {"q_num_heads": self.sizes["N"], "kv_num_heads": self.sizes["K"]}

    def _axes(self, one: Input, layout: str) -> str:
        axes = PLAIN.get(one.holds, "")
        if "V" not in layout:
            axes = axes.replace("V", "D")
        if self.operator.heads == self.operator.key_heads:
            axes = axes.replace("K", "N")
        if self.kind == GROUPED:
            axes = axes.replace("L", "S")
        return axes

    def _made(self, one: Input, axes: str) -> np.ndarray:
        s, random = self.sizes, self.random
        shape = operators.shapes(axes or one.layouts[0], s)[0]
        if one.holds is Holds.MASK:
            kept = random.random(shape) > 0.4
            kept[..., 0] = True
            return kept
        if one.holds is Holds.COUNT:
            return np.array([1, s["T"] - 2, s["T"]])
        if one.holds is Holds.ENDS:
            return np.array([3, s["T"] - 1, s["T"], 0, 1, s["T"] - 2])
        if one.holds is Holds.LAST:  # of fewer keys, past ones are left out
            return s["T"] - 1 - (np.array([0, 2, 4]) if s["P"] else np.zeros(3, int))
        if one.holds is Holds.TOTAL:
            return np.array(s["T"])
        if one.holds is Holds.POSITION:
            return np.tile(np.arange(s["S"]) + 2, (s["B"], 1))
        return random.normal(size=shape).astype(np.float32)

    def _counts(self, array: np.ndarray, layout: str) -> np.ndarray:
        shape = operators.shapes(layout, self.sizes)[0]
        more = np.zeros(int(np.prod(shape)) - array.size, array.dtype)  # of 3·B+2: not read
        return np.concatenate([array.ravel(), more]).reshape(shape)

    def run(self, outputs: int = 3) -> np.ndarray:
        """What the kernel computes, (B, S, N·V); raises what ONNX Runtime raises."""
        outputs = outputs if any(one.number in self.arrays for one in self.pasts()) else 1
        names = [f"i{at}" if at in self.arrays else "" for at in range(max(self.arrays) + 1)]
        made = [f"y{at}" for at in range(min(outputs, len(self.operator.presents) + 1))]
        domain, op_type = self.kind
        attributes = {name: value for name, value in self.attributes.items() if value}
        self.node = node = helper.make_node(op_type, names, made, domain=domain, **attributes)
        inputs = [
            helper.make_tensor_value_info(
                f"i{at}", helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
            )
            for at, array in self.arrays.items()
        ]
        body = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name=n) for n in made])
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(graph.MICROSOFT, 1)]
        model = helper.make_model(body, opset_imports=opsets, ir_version=10)
        session = files.session(model.SerializeToString(), optimise=False)
        self.values = {f"i{at}": array for at, array in self.arrays.items()}
        result = session.run(None, self.values)[0]
        return (
            result.swapaxes(1, 2).reshape(len(result), result.shape[2], -1)
            if result.ndim == 4
            else result
        )

    def pasts(self) -> list[Input]:
        return self.operator.holding(*operators.PASTS)

    # ── The reference ───────────────────────────────────────────────────────────────────────────

    def expected(self) -> np.ndarray:
        """softmax(Q·Kᵀ/√D + bias)·V, masked, by the arrays as they were before they were laid."""
        s, plain = self.sizes, self.plain
        q, k, v = self._projected()
        if Holds.COS in plain:
            q, k = self._rotated(q), self._rotated(k)
        k, v = self._with_past(k, v)
        groups = s["N"] // k.shape[1]
        k, v = (one.repeat(groups, axis=1) for one in (k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(s["D"]) + plain.get(Holds.BIAS, 0)
        scores = np.where(self.kept(), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        if Holds.SINK in plain:
            total = total + np.exp(plain[Holds.SINK][:, None, None] - scores.max(-1, keepdims=True))
        return laid(weights / total @ v, "B N S D", "B S N·D")

    def _projected(self) -> list[np.ndarray]:
        plain, s = self.plain, self.sizes
        heads = (("N", "D"), ("N", "D"), ("N", "V"))
        if Holds.HIDDEN in plain:
            flat = plain[Holds.HIDDEN] @ plain[Holds.WEIGHTS]
        elif Holds.PACKED in plain:
            flat, heads = plain[Holds.PACKED], (("N", "D"), ("K", "D"), ("K", "D"))
        else:
            found = [plain[one] for one in (Holds.QUERY, Holds.KEY, Holds.VALUE)]
            if Holds.PROJECTION_BIAS not in plain:
                return found
            ends = np.cumsum([s[n] * s[d] for n, d in heads])[:2]
            parts = np.split(plain[Holds.PROJECTION_BIAS], ends)
            return [
                one + part.reshape(s[n], 1, s[d])
                for one, part, (n, d) in zip(found, parts, heads, strict=True)
            ]
        flat = flat + plain.get(Holds.PROJECTION_BIAS, 0)
        parts = np.split(flat, np.cumsum([s[n] * s[d] for n, d in heads])[:2], axis=-1)
        return [
            part.reshape(s["B"], s["S"], s[n], s[d]).swapaxes(1, 2)
            for part, (n, d) in zip(parts, heads, strict=True)
        ]

    def _rotated(self, one: np.ndarray) -> np.ndarray:
        at = self.plain.get(Holds.POSITION, np.arange(self.sizes["S"])[None])
        cos, sin = (self.plain[table][at][:, None] for table in (Holds.COS, Holds.SIN))
        low, high = np.split(one, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def _with_past(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        plain = self.plain
        if not any(one.holds in plain for one in self.pasts()):
            return k, v
        both = plain.get(Holds.PAST)
        past_k = plain[Holds.PAST_KEY] if both is None else both[0]
        past_v = plain[Holds.PAST_VALUE] if both is None else both[1]
        if Holds.LAST in plain:  # the new key comes after the last that is counted
            k, v = k.copy(), v.copy()
            joined = []
            for past, new in ((past_k, k), (past_v, v)):
                both = np.concatenate([past, new], axis=2)
                for row, at in enumerate(plain[Holds.LAST]):
                    both[row, :, at] = new[row, :, 0]
                joined.append(both)
            return joined[0], joined[1]
        return np.concatenate([past_k, k], axis=2), np.concatenate([past_v, v], axis=2)

    def kept(self) -> np.ndarray:
        s, plain = self.sizes, self.plain
        at = np.arange(s["T"])
        kept = np.ones((s["B"], 1, 1, s["T"]), bool) & plain.get(Holds.MASK, True)
        ends = plain.get(Holds.COUNT, plain[Holds.LAST] + 1 if Holds.LAST in plain else None)
        if Holds.ENDS in plain:
            ends, starts = np.split(plain[Holds.ENDS], 2)
            kept = kept & (at >= starts[:, None, None, None])
        if ends is not None:
            kept = kept & (at < ends[:, None, None, None])
        if self.operator.causal_default and not s["P"]:
            kept = kept & (at <= np.arange(s["S"])[:, None])
        return kept


def accepted():
    for kind in KINDS:
        for one in OPERATORS[kind].inputs:
            for layout in one.layouts:
                options = [axis[0] for axis in layout.split() if "|1" in axis]
                for single in dict.fromkeys(("", *options, "".join(options))):
                    label = f"{kind[1]}-{kind[0]}-{one.name}-{one.holds.name}-{layout}-{single}"
                    yield pytest.param(kind, one, layout, single, id=label)


def given(kind: tuple[str, str], one: Input, layout: str, single: str = "") -> Case:
    """An operator with this input in this layout, and what else it then needs."""
    case = Case(kind, one.holds in operators.PASTS or one.holds is Holds.LAST)
    if one.number < 3 and layout == "B N L D":  # values as wide as keys
        case.sizes["V"] = case.sizes["D"]
        case.plain.clear()
        for other in case.operator.holding(Holds.QUERY, Holds.KEY, Holds.VALUE):
            case.give(other, other.layouts[0])
    beside = {
        Holds.COS: [Holds.SIN],
        Holds.SIN: [Holds.COS],
        Holds.POSITION: [Holds.COS, Holds.SIN],
    }
    for other in case.operator.holding(*beside.get(one.holds, ())):
        case.give(other, other.layouts[0])
        case.attributes["do_rotary"] = 1
    if one.holds in (Holds.COS, Holds.SIN):
        case.attributes["do_rotary"] = 1
    if one.holds is Holds.PACKED:
        for other in case.operator.holding(Holds.QUERY, Holds.KEY, Holds.VALUE):
            case.arrays.pop(other.number, None)
    for other in case.operator.holding(Holds.QUERY, Holds.KEY, Holds.VALUE):
        fitting = other.layout(len(layout.split()))
        if one.number < 3 and not {one.holds} & {Holds.HIDDEN, Holds.PACKED} and fitting:
            case.give(other, fitting)
    case.give(one, layout, single)
    return case


@pytest.mark.parametrize(("kind", "one", "layout", "single"), [*accepted()])
def test_a_layout_is_taken(kind, one, layout, single):
    case = given(kind, one, layout, single)
    np.testing.assert_allclose(case.run(), case.expected(), atol=2e-5)
    hidden, kept = np.broadcast_arrays(masked(case.node, case.values), case.kept())
    np.testing.assert_array_equal(hidden, ~kept)


def refused_layouts():
    for kind in KINDS:
        for one in OPERATORS[kind].inputs:
            for layout in one.refused:
                yield pytest.param(
                    kind,
                    one,
                    layout,
                    id=f"{kind[1]}-{kind[0]}-{one.name}-{one.holds.name}-{layout}",
                )


@pytest.mark.parametrize(("kind", "one", "layout"), [*refused_layouts()])
def test_a_layout_is_refused(kind, one, layout):
    case = Case(kind, one.holds in operators.PASTS)
    if one.layouts:
        case = given(kind, one, one.layouts[0])
        np.testing.assert_allclose(case.run(), case.expected(), atol=2e-5)
    shape = operators.shapes(layout, case.sizes)[0]
    case.arrays[one.number] = np.ones(shape, one.type)
    if one.holds is Holds.PACKED:
        case.arrays = {one.number: case.arrays[one.number]}
    if one.holds is Holds.NORM:
        case.arrays |= {14: case.arrays[one.number], 15: case.arrays[one.number]}
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        case.run()


def refused_together():
    for kind in KINDS:
        for refused in OPERATORS[kind].refused:
            yield pytest.param(kind, refused, id=f"{kind[1]}-{kind[0]}-{refused.why}")


@pytest.mark.parametrize(("kind", "refused"), [*refused_together()])
def test_inputs_are_refused_together(kind, refused):
    operator: Operator = OPERATORS[kind]
    pasts = {one.number for one in operator.holding(*operators.PASTS)}
    case = Case(kind, bool(pasts & {*refused.given}))
    if kind == GROUPED:
        case.sizes |= {"S": 5, "T": 5 + case.sizes["P"]}
        case.plain.clear()
        for one in operator.holding(Holds.QUERY, Holds.KEY, Holds.VALUE, Holds.LAST, Holds.TOTAL):
            case.give(one, one.layouts[0])
    for number in pasts - {*refused.given}:
        case.arrays.pop(number, None)
    for number, layout in refused.given.items():
        if layout is None:
            del case.arrays[number]
            continue
        one = next(one for one in operator.inputs if one.number == number)
        case.arrays[number] = np.ones(operators.shapes(layout, case.sizes)[0], one.type)
    case.attributes |= refused.attributes
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        case.run(refused.outputs)


def test_a_window_has_the_query_itself_among_its_keys():
    (one,) = OPERATORS[GROUPED].holding(Holds.BIAS)
    case = given(GROUPED, one, one.layouts[0])
    case.attributes["local_window_size"] = 2
    result = case.run()
    hidden = masked(case.node, case.values)
    assert (~hidden).sum(axis=-1).ravel()[:5].tolist() == [1, 2, 2, 2, 2]
    case.plain[Holds.BIAS] = np.where(hidden, -1e9, case.plain[Holds.BIAS])
    np.testing.assert_allclose(result, case.expected(), atol=2e-5)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_integers_are_added_to_the_scores(dtype):
    """A mask of 1 and 0 given to the standard Attention keeps all keys."""
    (one,) = OPERATORS["", "Attention"].holding(Holds.BIAS)
    case = given(("", "Attention"), one, "S T")
    case.arrays[3] = np.arange(35).reshape(5, 7).astype(dtype) % 2
    case.plain[Holds.BIAS] = case.arrays[3].astype(np.float32)
    np.testing.assert_allclose(case.run(), case.expected(), atol=2e-5)


def test_a_mask_of_one_axis_of_1_hides_nothing():
    """com.microsoft.Attention takes (B, 1) for no mask at all."""
    mask, _, _ = OPERATORS[PACKED].holding(Holds.MASK, Holds.COUNT, Holds.ENDS)
    case = Case(PACKED)
    case.arrays[mask.number] = np.zeros((case.sizes["B"], 1), mask.type)
    np.testing.assert_allclose(case.run(), case.expected(), atol=2e-5)


def test_names_are_those_of_the_schemas():
    schemas = {
        (schema.domain, schema.name, one): position.name
        for schema in ort.capi.onnxruntime_pybind11_state.get_all_operator_schema()
        for one, position in enumerate(schema.inputs)
    }
    for domain, op_type in KINDS:
        operator = OPERATORS[domain, op_type]
        for one in operator.inputs:
            assert schemas[domain, op_type, one.number] == one.name
