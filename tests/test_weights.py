"""What is done to the weights after the Softmax: masks set once more, by models and by hand."""

import random
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from building import LOWEST, Graph, save
from onnx_ir.passes.common import ShapeInferencePass

from helpers import explain, files, fuse, graph
from helpers.export import export
from helpers.fuse import attention, masks, pipeline
from helpers.models import small
from helpers.quiet import quiet

SEW_D = small.Small(
    "SEWDModel",
    {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 3, 3),
        "conv_stride": (5, 2, 2),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "position_buckets": 16,
        "max_position_embeddings": 64,
    },
    small._audio,
)
LONG_T5 = small.Small(
    "LongT5Model",
    {
        "vocab_size": small.VOCABULARY,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "use_cache": False,
        "local_radius": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "decoder_start_token_id": 0,
    },
    small._pair,
    sites=6,
)


@pytest.mark.parametrize("model", [SEW_D, LONG_T5], ids=["SEW-D", "LongT5"])
def test_models_that_mask_their_weights_or_attend_in_blocks(tmp_path, model):
    """SEW-D sets weights to 0 by the mask of the scores; LongT5's keys are of three blocks."""
    path = tmp_path / "in.onnx"
    export(model.make("eager"), model.inputs(), path, "torchscript")
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.sites, done.fused, done.left) == (True, model.sites, model.sites, [])


class WithoutMask(torch.nn.Module):
    """SEW-D that is given no mask: what masks its weights is False everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SEW_D.make("eager").eval()

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return self.model(input_values).last_hidden_state


def test_masked_fill_by_dynamo_where_nothing_is_masked(tmp_path):
    path, given = tmp_path / "in.onnx", SEW_D.inputs()["input_values"]
    with quiet():
        torch.onnx.export(WithoutMask(), (given,), path, dynamo=True, verbose=False)
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.sites, done.fused, done.left) == (True, 2, 2, [])


# ── Masks that are computed alike ───────────────────────────────────────────────────────────────


def masked_twice(g: Graph, wrong: str) -> None:
    """Scores and weights masked by tokens that are padding, each by nodes of its own."""
    ids = g.given("ids", np.int64, "b", "n")
    x = g.embedded(ids)
    q, k, v = (g.heads(x, name) for name in "qkv")

    def is_token(padding: int) -> str:
        return g.Unsqueeze(g.Not(g.Equal(ids, padding)), [1, 2])

    s = g.Mul(g.MatMul(q, g.Transpose(k, perm=[0, 1, 3, 2])), 0.3)
    p = g.Softmax(g.Where(is_token(0), s, LOWEST), axis=-1)
    p = g.Where(is_token(1 if wrong else 0), p, 0.0)
    g.gives("y", g.merged(g.MatMul(p, v)), "b", "n", 16)


@pytest.mark.parametrize(("wrong", "fused"), [("", 1), ("another token", 0)])
def test_masks_of_nodes_of_their_own(tmp_path, wrong, fused):
    path = save(tmp_path / "in.onnx", masked_twice, wrong)
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.sites, done.fused, len(done.left)) == (True, 1, fused, 1 - fused)


MULTIPLIED = {  # scores times a mask: what masks them further on, and what is said of that
    "by the same": ("same", ""),
    "by another": ("other", "which may differ from key to key"),
    "not at all": ("", "which may differ from key to key"),
    "before": ("before", "which may differ from key to key"),
}


@pytest.mark.parametrize("masked", MULTIPLIED)
def test_scores_that_are_multiplied_with_a_mask(tmp_path, masked):
    """s·m - 1e4·(1 - m), as OpenAI's GPT has it: a rule's own check asks for that, too."""
    how, left = MULTIPLIED[masked]

    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", np.float32, "b", "n", 16)
        q, k, v = (g.heads(x, name) for name in "qkv")
        s = g.Mul(g.MatMul(q, g.Transpose(k, perm=[0, 1, 3, 2])), 0.3)
        count = g.Unsqueeze(g.length(x, 1), [0])
        ones = np.ones((1, 1, 40, 40), np.float32)

        def cut(mask: np.ndarray) -> str:
            return g.Slice(mask, [0, 0], g.Concat(count, count, axis=0), [2, 3])

        causal, other = cut(np.tril(ones)), cut(np.tril(ones, 1))
        penalty = g.Mul(g.Sub(1.0, other if how == "other" else causal), -1e4)
        s = g.Add(s, penalty) if how == "before" else s
        s = g.Mul(s, causal)
        s = g.Add(s, penalty) if how in ("same", "other") else s
        g.gives("y", g.merged(g.MatMul(g.Softmax(s, axis=-1), v)), "b", "n", 16)

    path = save(tmp_path / "in.onnx", build)
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.fused) == (True, 0 if left else 1)
    assert all(left in line for line in done.left)
    rule = tmp_path / "rule.py"
    rule.write_text(explain.suggest(path).text)
    if not left:
        name = rule.read_text().rpartition("FILE.py:")[2].split()[0]
        answer = explain.explain(path, rules=f"{rule}:{name}")
        assert answer.sites[0].fused
        assert answer.parity.held


def test_a_float_that_is_only_not_0_is_no_mask(tmp_path):
    """Keys of importance 0 are masked, and the weights of the others multiplied by it."""

    def build(g: Graph, wrong: str) -> None:
        q, k, v = (g.given(name, np.float32, "b", 2, "n", 8) for name in "qkv")
        importance = g.given("importance", np.float32, "b", 1, 1, "n")
        s = g.MatMul(q, g.Transpose(k, perm=[0, 1, 3, 2]))
        keep = g.Cast(importance, to=onnx.TensorProto.BOOL)
        p = g.Softmax(g.Where(keep, s, LOWEST), axis=-1)
        g.gives("y", g.MatMul(g.Mul(p, importance), v), "b", 2, "n", 8)

    done = fuse.fuse(save(tmp_path / "in.onnx", build), tmp_path / "out.onnx")
    assert (done.held, done.fused) == (True, 0)
    assert "the weights are multiplied with importance" in done.left[0]


# ── Any masks, before and after ─────────────────────────────────────────────────────────────────

BATCH, LENGTH = 3, 5


class Masks:
    """Masks of a graph, drawn at random, each with its array for two inputs of 0 and 1."""

    def __init__(self, g: Graph, seed: int) -> None:
        self.g, self.random = g, random.Random(seed)
        drawn = np.random.default_rng(seed)
        self.inputs = {name: drawn.integers(0, 2, (BATCH, LENGTH)) for name in "ab"}
        for name in self.inputs:
            g.given(name, np.int64, "b", "n")

    def any(self, deep: int = 2) -> tuple[str, np.ndarray]:
        """True where it keeps; the keys of an input, or the queries, or what is made of others."""
        g, kind = self.g, self.random.choice(("plain", "not", "and", "or") if deep else ("plain",))
        if kind == "plain":
            name, axes = self.random.choice("ab"), self.random.choice(([1, 2], [1, 2], [1, 3]))
            whole, array = g.Unsqueeze(name, axes), np.expand_dims(self.inputs[name] != 0, axes)
            if self.random.random() < 0.5:
                return g.Cast(whole, to=onnx.TensorProto.BOOL), array
            return g.Not(g.Equal(whole, 0)), array
        one, first = self.any(deep - 1)
        if kind == "not":
            return g.Not(one), ~first
        two, second = self.any(deep - 1)
        return (
            (g.And(one, two), first & second) if kind == "and" else (g.Or(one, two), first | second)
        )

    def scores(self, s: str) -> tuple[str, str, np.ndarray]:
        """Scores masked, the mask, and where they are kept."""
        mask, keeps = self.any()
        g, way = self.g, self.random.choice(("where", "inverted", "added"))
        if way == "where":
            return g.Where(mask, s, LOWEST), mask, keeps
        if way == "inverted":
            return g.Where(mask, LOWEST, s), mask, ~keeps
        bias = g.Mul(g.Sub(1.0, g.Cast(mask, to=onnx.TensorProto.FLOAT)), -1e9)
        return g.Add(s, bias), mask, keeps

    def weights(self, p: str, mask: str) -> str:
        """Weights masked by `mask`, by what it is not, or by another."""
        g, way = self.g, self.random.choice(("where", "inverted", "times"))
        mask = mask if self.random.random() < 0.6 else self.any()[0]
        if way == "where":
            return g.Where(mask, p, 0.0)
        if way == "inverted":
            return g.Where(mask, 0.0, p)
        return g.Mul(p, g.Cast(mask, to=onnx.TensorProto.FLOAT))


def drawn(path: Path, seed: int) -> tuple[Path, dict[str, np.ndarray], np.ndarray]:
    """A graph of masks drawn at random, what to feed it, and which of its rows have a key."""
    made = []

    def build(g: Graph, wrong: str) -> None:
        all_masks = Masks(g, seed)
        q, k, v = (g.given(name, np.float32, "b", 2, "n", 4) for name in "qkv")
        s, mask, keeps = all_masks.scores(g.MatMul(q, g.Transpose(k, perm=[0, 1, 3, 2])))
        p = all_masks.weights(g.Softmax(s, axis=-1), mask)
        g.gives("y", g.MatMul(p, v), "b", 2, "n", 4)
        made.extend((all_masks.inputs, np.broadcast_to(keeps, (BATCH, 1, LENGTH, LENGTH))))

    save(path, build)
    inputs, keeps = made
    normal = np.random.default_rng(seed)
    arrays = {name: normal.normal(size=(BATCH, 2, LENGTH, 4)).astype("f") for name in "qkv"}
    return path, arrays | inputs, keeps.any(-1)[:, 0]


def test_any_mask_is_fused_right_or_not_at_all(tmp_path):
    fused = 0
    for seed in range(60):
        path, arrays, with_key = drawn(tmp_path / "in.onnx", seed)
        model = ShapeInferencePass()(graph.load(path)).model
        try:
            attention.fuse(model, graph.sites(model)[0])
        except attention.Left:
            continue
        fused += 1
        pipeline.clean(model)
        one, two = (
            files.session(file).run(["y"], arrays)[0].transpose(0, 2, 1, 3)[with_key]
            for file in (path, files.save(model, tmp_path / "out.onnx"))
        )
        np.testing.assert_allclose(one, two, atol=1e-5, err_msg=f"seed {seed}")
    assert 15 < fused < 50


# ── Steps, as the check of a rule reads them ────────────────────────────────────────────────────

STEPS = """
<ir_version: 10, opset_import: ["" : 23]>
g (int64[b,n] mask, float[b,1,1,n] soft, bool[b,1,n,n] seen) => (float y)
<int64[2] keys = {1, 2}, int64[2] queries = {1, 3}, float one = {1.0}, float low = {-1e9},
 float high = {1e9}, float zero = {0.0}>
{
  m = Unsqueeze (mask, keys)
  rows = Unsqueeze (mask, queries)
  keep = Cast <to = 9> (m)
  keep_rows = Cast <to = 9> (rows)
  pads = Not (keep)
  factor = Cast <to = 1> (m)
  padding = Sub (one, factor)
  added = Mul (padding, low)
  taken = Mul (padding, high)
  less = Sub (factor, one)
  added_less = Mul (less, high)
  chosen = Where (keep, zero, low)
  both = And (seen, keep)
  either = Or (seen, keep)
  soft_keep = Cast <to = 9> (soft)
  soft_padding = Sub (one, soft)
  soft_added = Mul (soft_padding, low)
  y = Identity (one)
}
"""
SAME = [
    (("masked", "pads"), ("keep", "keep")),
    (("Mul", "factor"), ("masked", "pads")),
    (("Mul", "factor"), ("Add", "added")),
    (("Mul", "factor"), ("Sub", "taken")),
    (("Mul", "factor"), ("Add", "added_less")),
    (("keep", "keep"), ("Add", "chosen")),
    (("keep", "keep"), ("keep", "both")),
    (("keep", "seen"), ("keep", "both")),
    (("Mul", "soft"), ("Add", "soft_added")),
    (("keep", "soft_keep"), ("Add", "soft_added")),
]
OTHERS = [
    (("masked", "keep"), ("keep", "keep")),
    (("keep", "keep_rows"), ("keep", "keep")),
    (("Mul", "padding"), ("keep", "keep")),
    (("keep", "both"), ("keep", "keep")),
    (("keep", "keep"), ("keep", "either")),
    (("keep", "keep"), ("Sub", "added")),
    (("Mul", "factor"), ("Add", "taken")),
    (("Mul", "soft"), ("keep", "soft_keep")),
    (("keep", "seen"), ("keep", "keep")),
]


@pytest.mark.parametrize(
    ("steps", "same"), [*((steps, True) for steps in SAME), *((steps, False) for steps in OTHERS)]
)
def test_a_mask_that_is_set_once_more(steps, same):
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(STEPS)))
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    after, before = ((how, values[name]) for how, name in steps)
    assert masks.once_more(after, before) is same


def test_a_rule_refuses_another_mask(tmp_path):
    """The rule of a site whose weights are masked as its scores are, on one where they are not."""
    rule = tmp_path / "rule.py"
    suggestion = explain.suggest(save(tmp_path / "in.onnx", masked_twice))
    assert "once_more(" in suggestion.text
    rule.write_text(suggestion.text, encoding="utf-8")
    for wrong, fused in (("", True), ("another token", False)):
        path = save(tmp_path / "other.onnx", masked_twice, wrong)
        done = explain.explain(path, rules=f"{rule}:MaskedAttention")
        assert [site.fused for site in done.sites] == [fused], str(done)
    assert "expected what masks the scores" in str(done)
    assert graph.sites(graph.load(path))[0].fused is False
