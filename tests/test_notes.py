"""What `inspect` notes of a file: each note where it is true, and none where it is not."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from building import HEAD, HEADS, WIDTH, WORDS, Graph, save
from transformers import DynamicCache

from helpers import models
from helpers.__main__ import main
from helpers.export import export
from helpers.models import small

# How each note begins.
NO_MASK = "no input masks keys"
FIXED = "the past has a fixed length"
HANDED_ON = "outputs that are inputs as they came in"
OUTSIDE = "Concat appends to the past outside of the operator"
REPEATED = "keys are repeated for groups of heads"
ONLY_SHAPES = "inputs whose values change nothing"
ALL_LOGITS = "gives logits of all positions"
NOTES = (NO_MASK, FIXED, HANDED_ON, OUTSIDE, REPEATED, ONLY_SHAPES, ALL_LOGITS)
MICROSOFT = "com.microsoft"


class Decoder(Graph):
    """A step of a decoder of one layer, by default with nothing to note, but by what is given.

    masked   what masks keys: "mask" (B, T), "ids" (compared with padding), "position" (causal
             alone), or "" for nothing
    past     the length of the caches: a number, or a name; "" for none
    present  the length of those that it gives
    append   where keys are appended: the "operator", a Concat before it ("outside"), one before
             products ("products"), or one whose last keys are kept ("window")
    repeat   what repeats the one head of keys and values, for two of queries; "" for none
    batch    how many rows: a number, or a name
    gives    "last" logits or "all" of them, "pooled" ones, or "hidden" states that are as wide as
             positions are many
    """

    def step(
        self,
        masked: str = "mask",
        past: int | str = "p",
        present: int | str = "t",
        append: str = "operator",
        repeat: str = "",
        gives: str = "last",
        length: int | str = "s",
        batch: int | str = "b",
    ) -> None:
        ids = self.given("ids", np.int64, batch, length)
        x = self.embedded(ids)
        keep = self.kept(masked, ids)
        shared = 1 if repeat else HEADS
        q, k, v = self.split(x, "q", HEADS), self.split(x, "k", shared), self.split(x, "v", shared)
        pasts = [
            self.given(name, np.float32, batch, shared, past, HEAD) if past != "" else ""
            for name in ("past_k", "past_v")
        ]
        if append == "operator":
            a, *presents = self.Attention(q, k, v, keep, *pasts, outputs=3, name="site")
        else:
            k, v = (self.appended(*pair, append) for pair in zip(pasts, (k, v), strict=True))
            presents = [k, v]
            k, v = (self.repeated(value, repeat, f"twice_{value}") for value in presents)
            a = self.attended(q, k, v, keep, append)
        for name, value in zip(("present_k", "present_v"), presents, strict=True):
            self.gives(name, value, "b", shared, present, HEAD)
        self.head(self.Add(x, self.merged(a)), gives)

    def kept(self, masked: str, ids: str) -> str | None:
        """What is True where there is a key, (B, 1, S, T)."""
        if not masked:
            return None
        if masked == "position":
            own = self.given("position", np.int64, "s")
            keys = self.given("keys", np.int64, "t")
            causal = self.LessOrEqual(self.Unsqueeze(keys, [0]), self.Unsqueeze(own, [1]))
            return self.Unsqueeze(causal, [0, 1])
        if masked == "ids":  # no past: padding is id 0
            keys = self.Not(self.Equal(ids, 0))
        else:
            keys = self.Cast(self.given("mask", np.int64, "b", "t"), to=onnx.TensorProto.BOOL)
        rows = self.Concat([1, 1], self.Shape(ids, start=1, end=2), [1], axis=0)
        return self.Expand(self.Unsqueeze(keys, [1, 2]), rows)

    def split(self, x: str, name: str, heads: int) -> str:
        product = self.MatMul(x, self.weight(name, WIDTH, heads * HEAD))
        return self.Transpose(self.Reshape(product, [0, 0, heads, HEAD]), perm=[0, 2, 1, 3])

    def appended(self, past: str, new: str, append: str) -> str:
        if not past:
            return new
        past = self.Concat(past, axis=2) if append == "products" else past  # as TorchScript may
        appended = self.Concat(past, new, axis=2)
        return self.Slice(appended, [-5], [2**62], [2]) if append == "window" else appended

    def repeated(self, value: str, repeat: str, name: str) -> str:
        """One head (B, 1, T, D) as two (B, 2, T, D)."""
        if not repeat:
            return value
        once = self.Unsqueeze(value, [2])
        twice = {
            "Expand": lambda: self.Expand(once, [1, 1, 2, 1, 1], name=name),
            "Tile": lambda: self.Tile(once, [1, 1, 2, 1, 1], name=name),
            "Concat": lambda: self.Concat(once, once, axis=2, name=name),
            "once": lambda: self.Concat(value, value, axis=1),  # whole heads, not grouped: no G
        }[repeat]()
        return self.Reshape(twice, [0, HEADS, -1, HEAD])

    def attended(self, q: str, k: str, v: str, keep: str | None, append: str) -> str:
        if append != "products":
            return self.Attention(q, k, v, keep, name="site")
        scores = self.MatMul(q, self.Transpose(k, perm=[0, 1, 3, 2]))
        scores = self.Where(keep, scores, -1e9) if keep else scores
        return self.MatMul(self.Softmax(scores, axis=-1), v)

    def head(self, x: str, gives: str) -> None:
        if gives == "hidden":
            table = self.weight("positions", WIDTH, HEAD)
            looked_up = self.Gather(table, self.given("position_ids", np.int64, "b", "s"))
            self.gives("hidden", x, "b", "s", WIDTH)
            self.gives("looked_up", looked_up, "b", "s", HEAD)
            return
        if gives == "last":
            x = self.Slice(x, [-1], [2**62], [1])
        elif gives == "pooled":
            x = self.ReduceMax(x, [1])
        self.gives("logits", self.MatMul(x, self.weight("lm", WIDTH, WORDS)), "b", "n", WORDS)


def inspected(path: Path, capsys: pytest.CaptureFixture) -> list[str]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["notes"]


@pytest.fixture
def notes(tmp_path, capsys):
    """What is noted of a graph that a function builds, or of a decoder that is told."""

    def noted(build=None, **parts) -> list[str]:
        def step(g: Graph, wrong: str) -> None:
            Decoder.step(g, **parts)

        path = save(tmp_path / "a.onnx", build or step, kind=Decoder)
        return inspected(path, capsys)

    return noted


def kinds(lines: list[str]) -> set[str]:
    """Which notes there are, each of them once."""
    begun = [note for line in lines for note in NOTES if line.startswith(note)]
    assert len(begun) == len(lines) == len({*begun}), lines
    return {*begun}


def test_a_decoder_without_a_fault_has_no_notes(notes):
    assert notes() == []


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"masked": ""}, {NO_MASK}),
        ({"masked": "", "append": "products"}, {NO_MASK}),
        ({"masked": "position"}, {NO_MASK}),
        ({"masked": "", "past": "", "append": "products"}, {NO_MASK}),
        ({"masked": "", "batch": 1}, set()),
        ({"masked": "ids", "past": ""}, set()),
        ({"past": 5}, {FIXED}),
        ({"past": 5, "append": "products"}, {FIXED}),
        ({"past": 5, "present": 5, "append": "window"}, {OUTSIDE}),
        ({"append": "outside"}, {OUTSIDE}),
        ({"append": "products"}, set()),
        ({"append": "outside", "past": ""}, set()),
        ({"append": "outside", "repeat": "Expand"}, {OUTSIDE, REPEATED}),
        ({"append": "products", "repeat": "Expand"}, {REPEATED}),
        ({"append": "products", "repeat": "Tile"}, {REPEATED}),
        ({"append": "products", "repeat": "Concat"}, {REPEATED}),
        ({"append": "products", "repeat": "once"}, set()),
        ({"gives": "all"}, {ALL_LOGITS}),
        ({"gives": "all", "past": "", "append": "products"}, {ALL_LOGITS}),
        ({"gives": "all", "length": 1}, set()),
        ({"gives": "pooled"}, set()),
        ({"gives": "hidden"}, set()),
    ],
)
def test_a_decoder_is_noted_for_what_is_wrong_in_it(notes, parts, expected):
    assert kinds(notes(**parts)) == expected


def test_notes_name_inputs_outputs_and_nodes(notes):
    lines = notes(masked="", past=5, append="outside", repeat="Expand", gives="all")
    assert kinds(lines) == {NO_MASK, FIXED, OUTSIDE, REPEATED, ALL_LOGITS}
    text = "\n".join(lines)
    assert "(past_k and 1 more), so batches with padding come out wrong" in text
    assert "fixed length of 5 (past_k and 1 more)" in text
    assert "(Attention site)" in text
    assert "(Expand twice_" in text
    assert "(logits)" in text


# ── Inputs that are given out, or not read ──────────────────────────────────────────────────────


def with_more(g: Decoder, more) -> None:
    """A decoder without a fault, and what `more` adds to it."""
    g.step()
    more(g)


def cross_cache(g: Decoder) -> None:
    """Keys and values of an encoder, which a decoder's next steps need as they are."""
    for name in ("key", "value"):
        given = g.given(f"cross_{name}", np.float32, "b", HEADS, "e", HEAD)
        g.gives(f"present_cross_{name}", g.Identity(given), "b", HEADS, "e", HEAD)


def test_caches_that_are_given_as_they_came_are_noted(notes):
    [line] = notes(lambda g, wrong: with_more(g, cross_cache))
    assert line.startswith(HANDED_ON)
    assert "(present_cross_key from cross_key and 1 more)" in line


def test_an_input_that_is_computed_with_is_not_handed_on(notes):
    def scaled(g: Decoder) -> None:
        given = g.given("cross_key", np.float32, "b", HEADS, "e", HEAD)
        g.gives("present_cross_key", g.Mul(given, 2.0), "b", HEADS, "e", HEAD)

    assert notes(lambda g, wrong: with_more(g, scaled)) == []


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda g, given: g.Shape(given), {ONLY_SHAPES}),
        (lambda g, given: g.Shape(g.Cast(given, to=onnx.TensorProto.FLOAT)), {ONLY_SHAPES}),
        (lambda g, given: g.Size(g.Identity(given)), {ONLY_SHAPES}),
        (lambda g, given: g.Concat(g.Shape(given), g.ReduceSum(given), axis=0), set()),
        (lambda g, given: g.branch(g.flag, lambda b: b.Neg(given), lambda b: b.Abs(given)), set()),
    ],
)
def test_an_input_of_which_only_the_shape_is_read_is_noted(notes, read, expected):
    def build(g: Graph, wrong: str) -> None:
        g.flag = g.given("flag", bool)
        given = g.given("padding", np.int64, "n")
        g.gives("y", g.Where(g.flag, read(g, given), 1), "m", dtype=np.int64)

    lines = notes(build)
    assert kinds(lines) == expected
    assert all("(padding)" in line for line in lines)


# ── Caches in other forms ───────────────────────────────────────────────────────────────────────


def stacked(g: Graph, past: int | str) -> None:
    """Keys and values as one, (2, B, N, P, D), in both branches of an If."""
    x = g.embedded(g.given("ids", np.int64, "b", "s"))
    both = g.given("past", np.float32, 2, "b", HEADS, past, HEAD)
    new = g.Transpose(g.Reshape(x, [0, 0, HEADS, HEAD]), perm=[0, 2, 1, 3])

    def step(b: Graph) -> list[str]:
        k, v = (b.Concat(b.Gather(both, at, axis=0), new, axis=-2) for at in (0, 1))
        present = b.Concat(b.Unsqueeze(k, [0]), b.Unsqueeze(v, [0]), axis=0)
        return [b.scored(new, k, v), present]

    y, present = g.branch(g.given("flag", bool), step, step, outputs=2)
    g.gives("y", y, "b", HEADS, "s", HEAD)
    g.gives("present", present, 2, "b", HEADS, "t", HEAD)


def test_keys_and_values_as_one_and_in_branches_are_a_cache(notes):
    assert kinds(notes(lambda g, wrong: stacked(g, "p"))) == {NO_MASK}
    lines = notes(lambda g, wrong: stacked(g, 5))
    assert kinds(lines) == {NO_MASK, FIXED}
    assert "fixed length of 5 (past)" in "".join(lines)


# ── Operators of com.microsoft ──────────────────────────────────────────────────────────────────


def grouped(
    g: Graph, past: int | str, present: int | str, counted: bool = True, length: int | str = ""
) -> None:
    """GroupQueryAttention, which counts the keys of each row of a mask. With a `length` of ids, it
    gives logits; ONNX infers no shape behind it."""
    x = g.embedded(g.given("ids", np.int64, "b", length or "s"))
    mask = g.given("mask", np.int64, "b", "t")
    caches = [g.given(name, np.float32, "b", HEADS, past, HEAD) for name in ("past_k", "past_v")]
    each = g.ReduceSum(mask, [1], keepdims=0) if counted else g.Shape(mask, start=1)
    seqlens = g.Cast(g.Sub(each, 1), to=onnx.TensorProto.INT32)
    total = g.Cast(g.length(mask, 1), to=onnx.TensorProto.INT32)
    y, *presents = g.GroupQueryAttention(
        *(x, x, x, *caches, seqlens, total),
        **{"outputs": 3, "domain": MICROSOFT, "num_heads": HEADS, "kv_num_heads": HEADS},
    )
    g.gives("y", y, "b", "s", WIDTH)
    if length:
        g.gives("logits", g.MatMul(y, g.weight("lm", WIDTH, WORDS)), "b", "n", WORDS)
    for name, value in zip(("present_k", "present_v"), presents, strict=True):
        g.gives(name, value, "b", HEADS, present, HEAD)


def test_grouped_query_attention_counts_keys_and_may_write_in_place(notes):
    assert notes(lambda g, wrong: grouped(g, "p", "t")) == []
    assert notes(lambda g, wrong: grouped(g, 64, 64)) == []
    assert kinds(notes(lambda g, wrong: grouped(g, 64, "t"))) == {FIXED}
    assert kinds(notes(lambda g, wrong: grouped(g, "p", "t", length="s"))) == {ALL_LOGITS}
    assert notes(lambda g, wrong: grouped(g, "p", "t", length=1)) == []
    assert kinds(notes(lambda g, wrong: grouped(g, "p", "t", False))) == {NO_MASK, ONLY_SHAPES}


def multi_head(g: Graph, inside: bool) -> None:
    """MultiHeadAttention on (B, S, N·D), with its keys repeated before that."""
    x = g.embedded(g.given("ids", np.int64, "b", "s"))
    caches = [g.given(name, np.float32, "b", HEADS, "p", HEAD) for name in ("past_k", "past_v")]
    mask = g.given("mask", np.int32, "b", "t")
    kind = {"domain": MICROSOFT, "num_heads": HEADS}
    if inside:
        y, *presents = g.MultiHeadAttention(x, x, x, "", mask, "", *caches, outputs=3, **kind)
    else:
        new = g.Transpose(g.Reshape(x, [0, 0, HEADS, HEAD]), perm=[0, 2, 1, 3])
        presents = [g.Concat(past, new, axis=2) for past in caches]
        keys, values = (g.merged(present) for present in presents)
        y = g.MultiHeadAttention(x, keys, values, "", mask, **kind)
    g.gives("y", y, "b", "s", WIDTH)
    for name, value in zip(("present_k", "present_v"), presents, strict=True):
        g.gives(name, value, "b", HEADS, "t", HEAD)


def test_multi_head_attention_has_inputs_for_the_past(notes):
    assert notes(lambda g, wrong: multi_head(g, True)) == []
    [line] = notes(lambda g, wrong: multi_head(g, False))
    assert f"({MICROSOFT}.MultiHeadAttention" in line
    assert line.startswith(OUTSIDE)


def repeated_flat(g: Graph, first: str) -> None:
    """One head as two, merged to (B, T, 2·D): from (B, T, 1, D), or from (B, 1, T, D)."""
    x = g.given("x", np.float32, "b", "s", WIDTH)
    one = g.Reshape(g.MatMul(x, g.weight("k", WIDTH, HEAD)), [0, 0, 1, HEAD])
    if first == "length":
        twice = g.Reshape(g.Expand(g.Unsqueeze(one, [3]), [1, 1, 1, 2, 1]), [0, 0, HEADS, HEAD])
        flat = g.Reshape(twice, [0, 0, WIDTH])
    else:
        turned = g.Unsqueeze(g.Transpose(one, perm=[0, 2, 1, 3]), [2])
        flat = g.merged(g.Reshape(g.Expand(turned, [1, 1, 2, 1, 1]), [0, HEADS, -1, HEAD]))
    sizes = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    g.gives("y", g.Attention(x, flat, flat, **sizes), "b", "s", WIDTH)


@pytest.mark.parametrize("first", ["length", "heads"])
def test_heads_that_are_repeated_and_then_merged_are_noted(notes, first):
    assert kinds(notes(lambda g, wrong: repeated_flat(g, first))) == {REPEATED}


# ── Encoders have none of what a cache brings ───────────────────────────────────────────────────


def encoder(g: Graph, wrong: str) -> None:
    """Masked language modelling, whose states are given as well; one input is given on."""
    ids = g.given("ids", np.int64, "b", "s")
    g.gives("same", ids, "b", "s", dtype=np.int64)
    y = g.attention(g.embedded(ids))
    g.gives("states", y, "b", "s", WIDTH)
    g.gives("logits", g.MatMul(y, g.weight("lm", WIDTH, WORDS)), "b", "s", WORDS)


def pieces(g: Graph, wrong: str) -> None:
    """An image of fixed size, of which a Concat of two halves is attended to."""
    image = g.given("image", np.float32, 1, HEADS, 4, HEAD)
    halves = [g.Slice(image, [start], [start + 2], [2]) for start in (2, 0)]
    turned = g.Concat(*halves, axis=2)
    g.gives("y", g.scored(image, turned, turned), 1, HEADS, 4, HEAD)


def features(g: Graph, wrong: str) -> None:
    """An encoder that gives keys, and no values: a map of features."""
    x = g.embedded(g.given("ids", np.int64, "b", "s"))
    q, k, v = (g.heads(x, name) for name in "qkv")
    g.gives("y", g.scored(q, k, v), "b", HEADS, "s", HEAD)
    g.gives("keys", k, "b", HEADS, "s", HEAD)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("build", [encoder, pieces, features])
def test_an_encoder_has_none_of_these_notes(build, fused, tmp_path, capsys):
    assert inspected(save(tmp_path / "a.onnx", build, fused=fused), capsys) == []


# ── A decoder as it is exported ─────────────────────────────────────────────────────────────────


def test_an_exported_decoder_is_noted_for_what_is_known_of_it(tmp_path, capsys):
    """Qwen3 with two heads of keys for four of queries, in two layers, at opset 23."""
    architecture = small.ARCHITECTURES["Qwen3"]
    changed = dict(architecture.config) | {"use_cache": True}
    model = models.stand_in(architecture.model, changed, "sdpa")
    cache = DynamicCache(config=model.config)
    for layer in range(2):
        cache.update(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16), layer)
    inputs = {
        "input_ids": torch.ones(2, 4, dtype=torch.int64),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
        "past_key_values": cache,
    }
    path = export(model, inputs, tmp_path / "a.onnx", "opset23").path
    rotary, *lines = inspected(path, capsys)
    assert "RotaryEmbedding" in rotary
    assert kinds(lines) == {OUTSIDE, REPEATED, ALL_LOGITS}
    assert any("(Attention node_scaled_dot_product_attention and 1 more)" in line for line in lines)
    # the same with True in place of the mask
    proto = onnx.load(path)
    [cast] = [node for node in proto.graph.node if "attention_mask" in node.input]
    true = onnx.numpy_helper.from_array(np.ones(1, bool))
    proto.graph.node.insert(0, onnx.helper.make_node("Shape", ["attention_mask"], ["sizes"]))
    cast.CopyFrom(onnx.helper.make_node("ConstantOfShape", ["sizes"], cast.output, value=true))
    onnx.save(proto, path)
    _, *lines = inspected(path, capsys)
    assert kinds(lines) == {NO_MASK, OUTSIDE, REPEATED, ALL_LOGITS, ONLY_SHAPES}
