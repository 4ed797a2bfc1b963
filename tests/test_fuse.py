"""`helpers.fuse`: every way of writing attention, on graphs small enough to read."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from building import Graph, save
from graphs import ATTENTION, write
from transformers.exporters import OnnxConfig, OnnxExporter

from helpers import feeds, files, fuse, graph, parity
from helpers.__main__ import main
from helpers.files import saving
from helpers.fuse import attention, pipeline
from helpers.graph import repairs
from helpers.quiet import quiet

HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[batch,length,8] given, int64[batch,length] attention_mask)
=> (float[batch,length,8] yMORE)
<float two = {2.0}, float root = {0.7}, float none = {-inf}, float low = {-10000.0},
 float lowest = {-3.4028234663852886e38}, float zero = {0.0}, float one = {1.0},
 float cap = {3.0}, float[2,1,1] heat = {0.5, 1.5}, float[1,2,1,1] kept = {1.0, 0.5},
 float[1,2,1,1] sink = {0.3, -0.2}, int64[1] at1 = {1}, int64[1] at3 = {3}, int64[1] end = {-1},
 int64[1] start = {0}, int64[2] at12 = {1, 2}, int64[2] at13 = {1, 3}, int64 i1 = {1},
 int64 first = {0}, int64[3] three = {-1, 6, 4}, int64[3] values = {-1, 6, 4},
 float[1] tiny_ = {0.000001}>
{
  q0 = MatMul (given, wq)
  q1 = Add (bq, q0)
  q2 = Reshape (q1, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (q2)
  k0 = MatMul (given, wk)
  k2 = Reshape (k0, heads)
  kt = Transpose <perm = [0, 2, 3, 1]> (k2)
  v0 = MatMul (given, wv)
  v2 = Reshape (v0, heads)
  v = Transpose <perm = [0, 2, 1, 3]> (v2)
  m1 = Unsqueeze (attention_mask, at12)
  keys = Cast <to = 9> (m1)
  pads = Not (keys)
  kf = Cast <to = 1> (m1)
  inverted = Sub (one, kf)
  added = Mul (inverted, lowest)
"""
SCORES = "s0 = MatMul (q, kt)"
SOFTMAX = "p = Softmax <axis = -1> (s)"
CONTEXT = "c = MatMul (w, v)"
TAIL = """
  c1 = Transpose <perm = [0, 2, 1, 3]> (c)
  c2 = Reshape (c1, flat)
  y = MatMul (c2, wo)
}
"""


def body(
    before="s = Mul (s0, half)",
    after="w = Identity (p)",
    *,
    scores=SCORES,
    softmax=SOFTMAX,
    context=CONTEXT,
    more="",
):
    return "\n".join([HEAD, scores, before, softmax, after, context, TAIL]).replace("MORE", more)


CAUSAL = """ones = ConstantOfShape <value = float[1] {1.0}> (square)
 lower = Trilu <upper = 0> (ones)
 seen = Cast <to = 9> (lower)"""
SQUARE = "n = Shape <start = 1> (attention_mask) square = Concat <axis = 0> (n, n) "
SCALED = "sa = Mul (s0, half) "

# What is between the products, in as many ways as exporters and authors have.
WAYS = {
    "a scale": {},
    "a divisor": {"before": "s = Div (s0, two)"},
    "no scale": {"before": "s = Identity (s0)"},
    "a scale in front": {"before": "s = Mul (half, s0)"},
    "a scale of the queries": {
        "scores": "qs = Mul (q, half) s0 = MatMul (qs, kt)",
        "before": "s = Identity (s0)",
    },
    "a scale on both sides": {
        "scores": "qs = Mul (q, root) ks = Mul (root, kt) s0 = MatMul (qs, ks)",
        "before": "s = Identity (s0)",
    },
    "a scale that is computed": {
        "before": "d0 = Shape <start = 3> (q) d = Cast <to = 1> (d0) r = Sqrt (d) s = Div (s0, r)"
    },
    "a scale for each head": {"before": "s = Mul (s0, heat)"},
    "an added mask": {"before": SCALED + "s = Add (sa, added)"},
    "an added mask, before the scale": {"before": "sa = Add (added, s0) s = Mul (sa, half)"},
    "a mask that is taken away": {
        "before": SCALED + "big = Neg (lowest) ma = Mul (inverted, big) s = Sub (sa, ma)"
    },
    "a mask of -10000": {"before": SCALED + "ma = Mul (inverted, low) s = Add (sa, ma)"},
    "a mask that chooses": {"before": SCALED + "s = Where (keys, sa, none)"},
    "a mask that chooses, inverted": {"before": SCALED + "s = Where (pads, lowest, sa)"},
    "a mask that chooses, before the scale": {
        "before": "sa = Where (keys, s0, lowest) s = Mul (sa, half)"
    },
    "a causal mask from shapes": {
        "before": SQUARE + CAUSAL + SCALED + "s = Where (seen, sa, none)"
    },
    "a causal mask and padding": {
        "before": SQUARE
        + CAUSAL
        + "both = And (seen, keys)"
        + SCALED
        + "s = Where (both, sa, none)"
    },
    "two masks": {"before": SCALED + "sb = Add (sa, added) s = Where (keys, sb, lowest)"},
    "positions and a mask": {
        "before": "t0 = Transpose <perm = [0, 1, 3, 2]> (s0) bias = Mul (kf, two)"
        + SCALED
        + "sb = Add (bias, sa) s = Add (sb, added)"
    },
    "a bound below": {"before": SCALED + "sb = Add (sa, added) s = Max (sb, lowest)"},
    "a maximum taken off": {
        "before": SCALED
        + "sb = Where (keys, sa, lowest) top = ReduceMax <axes = [-1], keepdims = 1> (sb)"
        + " s = Sub (sb, top)"
    },
    "a soft cap": {
        "before": SCALED + "sb = Div (sa, cap) t = Tanh (sb) sc = Mul (t, cap) s = Add (sc, added)"
    },
    "scores of a sink": {
        "before": SCALED
        + """sb = Add (sa, added) qs = Shape <end = 3> (q)
        shape = Concat <axis = 0> (qs, at1) extra = Expand (sink, shape)
        s = Concat <axis = -1> (sb, extra)""",
        "after": "w = Slice (p, start, end, at3)",
    },
    "a guard against NaN": {
        "before": SCALED + "s = Where (keys, sa, none)",
        "after": "nan = IsNaN (p) w = Where (nan, zero, p)",
    },
    "a guard by the mask": {
        "before": SCALED + "s = Where (pads, lowest, sa)",
        "after": "w = Where (pads, zero, p)",
    },
    "a factor for each head, after": {"after": "w = Mul (p, kept)"},
    "a guard by the mask, inverted": {
        "before": SCALED + "s = Where (keys, sa, lowest)",
        "after": "w = Where (pads, zero, p)",
    },
    "a guard by the mask, cast anew": {
        "before": SCALED + "s = Where (keys, sa, lowest)",
        "after": "again = Cast <to = 9> (m1) w = Where (again, p, zero)",
    },
    "a guard by the mask that was added": {
        "before": SCALED + "s = Add (sa, added)",
        "after": "w = Where (pads, zero, p)",
    },
    "a guard by one mask of two": {
        "before": SQUARE
        + CAUSAL
        + "both = And (seen, keys) hidden = Not (both)"
        + SCALED
        + "s = Where (hidden, lowest, sa)",
        "after": "w0 = Where (seen, p, zero) w1 = Mul (w0, lower) w = Mul (w1, kf)",
    },
    "a guard where nothing is masked": {
        "before": SCALED + "no = ConstantOfShape <value = bool[1] {0}> (at1) s = Identity (sa)",
        "after": "w = Where (no, zero, p)",
    },
    "a mask that is multiplied with": {
        "before": SCALED + "s = Where (pads, lowest, sa)",
        "after": "w = Mul (p, kf)",
    },
    "a mask that is multiplied with, of what is added": {
        "before": SCALED + "s = Add (sa, added)",
        "after": "w = Mul (kf, p)",
    },
    "padding that is multiplied with": {
        "before": SCALED
        + "padding = Cast <to = 1> (pads) far = Mul (padding, lowest) s = Add (sa, far)",
        "after": "w0 = Sub (one, padding) w = Mul (p, w0)",
    },
    "a mask that is multiplied with, before the scale": {
        "before": "sa = Where (keys, s0, lowest) s = Mul (sa, half)",
        "after": "w = Mul (p, kf)",
    },
    "weights of queries that are padding": {
        "before": SCALED + "s = Where (keys, sa, lowest)",
        "after": "q1_ = Unsqueeze (attention_mask, at13) rows = Cast <to = 9> (q1_)"
        " w = Where (rows, p, zero)",
    },
    "numbers in the place of NaN and infinity": {
        "before": SCALED + "s = Where (keys, sa, none)",
        "after": """nan = IsNaN (p) w0 = Where (nan, zero, p) far = IsInf (p)
        above = Greater (p, zero) top = And (far, above) w1 = Where (top, two, w0)
        under = Less (p, zero)
        bottom = And (under, far) w = Where (bottom, lowest, w1)""",
    },
    "weights that are bounded": {"after": "w = Clip (p, zero, one)"},
    "double precision": {
        "before": SCALED + "sd = Cast <to = 11> (sa) ad = Cast <to = 11> (added) s = Add (sd, ad)",
        "after": "w = Cast <to = 1> (p)",
    },
    "three axes": {
        "scores": """qf = Reshape (q, three) k4 = Transpose <perm = [0, 1, 3, 2]> (kt)
        kf3 = Reshape (k4, three) k3 = Transpose <perm = [0, 2, 1]> (kf3) s0 = MatMul (qf, k3)""",
        "before": "s = Mul (s0, half)",
        "context": """v3 = Reshape (v, three) c3 = MatMul (w, v3) qshape = Shape (q)
        c = Reshape (c3, qshape)""",
    },
    "three axes, and a mask with four": {
        "scores": """qf = Reshape (q, three) k4 = Transpose <perm = [0, 1, 3, 2]> (kt)
        kf3 = Reshape (k4, three) k3 = Transpose <perm = [0, 2, 1]> (kf3) s0 = MatMul (qf, k3)""",
        "before": """sa = Mul (s0, half) b0 = Shape <end = 2> (q)
        n = Shape <start = 1> (attention_mask)
        four = Concat <axis = 0> (b0, n, n) sb = Reshape (sa, four) sm = Add (sb, added)
        flat3 = Shape (sa) s = Reshape (sm, flat3)""",
        "context": """v3 = Reshape (v, three) c3 = MatMul (w, v3) qshape = Shape (q)
        c = Reshape (c3, qshape)""",
    },
    "keys before queries": {
        "scores": """k4 = Transpose <perm = [0, 2, 1, 3]> (k2)
        qt = Transpose <perm = [0, 1, 3, 2]> (q)
        st = MatMul (k4, qt) s0 = Transpose <perm = [0, 1, 3, 2]> (st)""",
        "before": SCALED + "s = Add (sa, added)",
    },
    "a product over the first axis but one": {
        "scores": """k4 = Transpose <perm = [0, 2, 1, 3]> (k2)
        qt = Transpose <perm = [0, 1, 3, 2]> (q)
        s0 = MatMul (k4, qt)""",
        "softmax": "p = Softmax <axis = -2> (s)",
        "context": """vt = Transpose <perm = [0, 1, 3, 2]> (v) ct = MatMul (vt, w)
        c = Transpose <perm = [0, 1, 3, 2]> (ct)""",
    },
    "Einsum": {
        "scores": 's0 = Einsum <equation = "bind,bjnd->bnij"> (q2, k2)',
        "context": """cq = Einsum <equation = "bnij,bjnd->bind"> (w, v2)
        c = Transpose <perm = [0, 2, 1, 3]> (cq)""",
    },
    "keys swapped with three axes": {
        "scores": """k4 = Transpose <perm = [0, 2, 1, 3]> (k2) sizes = Shape (k4)
        km = Reshape (k4, three) ks = Transpose <perm = [0, 2, 1]> (km) kb = Shape <end = 2> (k4)
        kd = Shape <start = 3> (k4) kn = Shape <start = 2, end = 3> (k4)
        back = Concat <axis = 0> (kb, kd, kn) kr = Reshape (ks, back) s0 = MatMul (q, kr)""",
    },
}
# What may not be taken for attention as the operator computes it, and the word of the reason.
NOT = {
    "another function": ({"before": "s = Relu (s0)"}, "Relu"),
    "a mask that leaves 0": ({"before": "s = Where (keys, s0, zero)"}, "very low"),
    "factors that differ by key": ({"before": "s = Mul (s0, kf)"}, "key to key"),
    "weights masked by something else": (
        {
            "before": "s = Identity (s0)",
            "after": "odd = Cast <to = 9> (kf) not_odd = Not (odd) w = Where (not_odd, zero, p)",
        },
        "masks more after the Softmax than is known to be masked before",
    ),
    "weights masked where the scores are not": (
        {"before": "s = Where (keys, s0, lowest)", "after": "w = Where (keys, zero, p)"},
        "masks more after the Softmax",
    ),
    "weights masked by more than the scores": (
        {
            "before": SQUARE + CAUSAL + "s = Where (keys, s0, lowest)",
            "after": "both = And (seen, keys) w = Where (both, p, zero)",
        },
        "masks more after the Softmax",
    ),
    "weights masked by queries, the scores by keys": (
        {
            "before": "turned = Transpose <perm = [0, 1, 3, 2]> (keys)"
            " both = Or (keys, turned) s = Where (both, s0, lowest)",
            "after": "w = Where (keys, p, zero)",
        },
        "masks more after the Softmax",
    ),
    "weights masked after a scale that lets masked scores count": (
        {
            "before": "sa = Where (keys, s0, low) s = Mul (sa, tiny_)",
            "after": "w = Where (keys, p, zero)",
        },
        "masks more after the Softmax",
    ),
    "weights multiplied by key": ({"after": "w = Mul (p, kf)"}, "differ from key to key"),
    "weights multiplied by what is not 0 or 1": (
        {
            "before": "twos = Mul (kf, two) s = Where (keys, s0, lowest)",
            "after": "w = Mul (p, twos)",
        },
        "the weights are multiplied with twos, which may differ from key to key",
    ),
    "weights left out by their row's highest score": (
        {
            "before": "s = Identity (s0)",
            "after": "top = ReduceMax <axes = [-1], keepdims = 1> (s)"
            " small = Less (top, half) w = Where (small, zero, p)",
        },
        "masks more",
    ),
    "weights with other numbers": (
        {"before": "s = Where (keys, s0, lowest)", "after": "w = Where (keys, p, half)"},
        "puts half in the place of weights",
    ),
    "weights that are divided by their sum": (
        {"after": "all_ = ReduceSum <keepdims = 1> (p, end) w = Div (p, all_)"},
        "takes the weights twice",
    ),
    "weights that are squared": ({"after": "w = Mul (p, p)"}, "twice"),
    "weights changed": ({"after": "w = Sqrt (p)"}, "Sqrt"),
    "a tanh alone": ({"before": "s = Tanh (s0)"}, "tanh"),
    "a bound within the scores": ({"before": "s = Max (s0, zero)"}, "Max"),
}


def source(tmp_path, way=None, **arrays):
    text = body(**(way or {}))
    if "three" in (way or {}).get("scores", ""):  # a Reshape to three axes that has one size
        text = text.replace("batch,length", "batch,6")
    return write(tmp_path / "in.onnx", text, **arrays)


@pytest.mark.parametrize("target", fuse.FUSING)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_it(tmp_path, way, target, capsys):
    path = source(tmp_path, WAYS[way])
    before = path.read_bytes()
    done = fuse.fuse(path, tmp_path / "out.onnx", target=target)
    assert (done.held, done.sites, done.fused, done.left) == (True, 1, 1, [])
    made = graph.load(tmp_path / "out.onnx")
    assert [site.fused for site in graph.sites(made)] == [True]
    assert "Softmax" not in graph.counts(made)
    assert path.read_bytes() == before
    assert set(made.opset_imports) <= ({""} if target == "portable" else {"", "com.microsoft"})


@pytest.mark.parametrize("way", NOT)
def test_what_is_something_else_is_left(tmp_path, way):
    """It is named with its reason, and written all the same: nothing there was changed."""
    changed, word = NOT[way]
    done = fuse.fuse(source(tmp_path, changed), tmp_path / "out.onnx")
    assert (done.held, done.sites, done.fused) == (True, 1, 0)
    assert word in done.left[0]
    assert [site.fused for site in graph.sites(graph.load(tmp_path / "out.onnx"))] == [False]


def test_what_the_operator_gets(tmp_path):
    fuse.fuse(source(tmp_path, WAYS["an added mask"]), tmp_path / "out.onnx")
    [node] = [
        node for node in graph.load(tmp_path / "out.onnx").graph if node.op_type == "Attention"
    ]
    assert node.attributes.get_float("scale") == 0.5
    assert node.attributes.get_int("q_num_heads") == node.attributes.get_int("kv_num_heads") == 2
    assert [value.name for value in node.inputs[:3]] == ["q1", "k0", "v0"]


@pytest.mark.parametrize(("rows", "expands"), [("length", 0), ("1", 1)])
def test_a_bias_in_another_layout_is_expanded_where_it_must_be(tmp_path, rows, expands):
    """Heads in the batch, as DeBERTa's: scores (batch · heads, S, T) and a bias for all of them."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    tiny (float[12,length,4] q, float[12,4,length] k, float[12,length,4] v,
          float[12,ROWS,length] bias) => (float[12,length,4] y)
    {
      s0 = MatMul (q, k)
      s1 = Add (s0, bias)
      s2 = Shape <start = 1> (s1)
      six = Constant <value_ints = [2, 6]> ()
      shape = Concat <axis = 0> (six, s2)
      s3 = Reshape (s1, shape)
      p0 = Softmax <axis = -1> (s3)
      back = Shape (s1)
      p1 = Reshape (p0, back)
      y = MatMul (p1, v)
    }"""
    path = write(tmp_path / "in.onnx", text.replace("ROWS", rows))
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.fused) == (True, 1), str(done)
    made = graph.counts(graph.load(tmp_path / "out.onnx"))
    assert made.get("Expand", 0) == expands


# Products by Einsum: of queries with keys, of weights with values, and what each operand has.
EINSUMS = {
    "heads": ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
    "the weights second": ("bqhd,bkhd->bhqk", "bkhd,bhqk->bqhd"),
    "keys before queries": ("bkhd,bqhd->bhkq", "bhkq,bkhd->bqhd"),
    "no heads": ("bqd,bkd->bqk", "bqk,bkd->bqd"),
    "keys shared by the heads": ("bqhd,bkd->bhqk", "bhqk,bkd->bqhd"),
    "keys shared in groups": ("bqghd,bkgd->bghqk", "bghqk,bkgd->bqghd"),
    "learned queries": ("qhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
    "blocks": ("...qhd,...khd->...hqk", "...hqk,...khd->...qhd"),
}


@pytest.mark.parametrize("target", fuse.FUSING)
@pytest.mark.parametrize("form", EINSUMS)
def test_products_by_einsum(tmp_path, form, target):
    scores, context = EINSUMS[form]
    axis = -2 if form == "keys before queries" else -1

    def build(g: Graph, wrong: str) -> None:
        first, second = scores.partition("->")[0].replace("...", "bB").split(",")
        query, key = (second, first) if axis == -2 else (first, second)
        sizes = {"b": "b", "B": 3, "q": "q", "k": "k", "h": 2, "g": 3, "d": 4}
        k, v = (g.given(name, np.float32, *(sizes[label] for label in key)) for name in "kv")
        if "b" in query:
            q = g.given("q", np.float32, *(sizes[label] for label in query))
        else:
            q = g.weight("q", 5, 2, 4)
        operands = (k, q) if axis == -2 else (q, k)
        s = g.Mul(g.Einsum(*operands, equation=scores), 0.5)
        w = g.Softmax(s, axis=axis)
        operands = (v, w) if form == "the weights second" else (w, v)
        result = context.partition("->")[2].replace("...", "bB")
        rows = 5 if "b" not in query else "q"
        dims = [rows if label == "q" else sizes[label] for label in result]
        g.gives("y", g.Einsum(*operands, equation=context), *dims)

    done = fuse.fuse(save(tmp_path / "in.onnx", build), tmp_path / "out.onnx", target=target)
    assert (done.held, done.sites, done.fused, done.left) == (True, 1, 1, []), str(done)


def test_a_product_of_three_is_left(tmp_path):
    """Queries and keys with a weight between them, in one Einsum."""

    def build(g: Graph, wrong: str) -> None:
        x = g.given("x", np.float32, "b", "n", 8)
        between = g.weight("between", 8, 2, 8)
        s = g.Einsum(x, between, x, equation="bqd,dhe,bke->bhqk")
        g.gives("y", g.MatMul(g.Softmax(s, axis=-1), g.Unsqueeze(x, [1])), "b", 2, "n", 8)

    done = fuse.fuse(save(tmp_path / "in.onnx", build), tmp_path / "out.onnx")
    assert (done.held, done.sites, done.fused) == (True, 1, 0)
    assert "Einsum bqd,dhe,bke->bhqk is no product of two matrices" in done.left[0]


def test_weights_that_are_read_elsewhere(tmp_path):
    """They are the operator's fourth output; the Softmax is gone all the same."""
    way = {"after": "w = Identity (p) seen_ = ReduceMean <axes = [1], keepdims = 0> (p)"}
    path = source(tmp_path, way | {"more": ", float[batch,length,length] seen_"})
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.fused) == (True, 1), str(done)
    assert "Softmax" not in graph.counts(graph.load(tmp_path / "out.onnx"))


def test_keys_that_are_shared(tmp_path):
    """One head of keys and values for all queries stays one."""
    way = {
        "scores": """kh = MatMul (given, narrow) k1 = Unsqueeze (kh, at1)
        k1t = Transpose <perm = [0, 1, 3, 2]> (k1) s0 = MatMul (q, k1t)""",
        "context": "vh = MatMul (given, narrow) v1 = Unsqueeze (vh, at1) c = MatMul (w, v1)",
    }
    narrow = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    text = body(**way)
    done = fuse.fuse(write(tmp_path / "in.onnx", text, narrow=narrow), tmp_path / "out.onnx")
    assert (done.held, done.fused) == (True, 1), str(done)


def test_a_learned_query(tmp_path):
    way = {"scores": "s0 = MatMul (asked, kt)"}
    asked = np.random.default_rng(1).normal(size=(1, 2, 3, 4)).astype(np.float32)
    text = body(**way).replace("float[batch,length,8] y", "float[batch,3,8] y")
    done = fuse.fuse(write(tmp_path / "in.onnx", text, asked=asked), tmp_path / "out.onnx")
    assert (done.held, done.fused) == (True, 1), str(done)


IN_A_BRANCH = (
    HEAD
    + """
    total = ReduceSum <keepdims = 0> (attention_mask) yes = Greater (total, first)
    c = If (yes) <
      then_branch = then () => (float[batch,2,length,4] c_then) {
        s0 = MatMul (q, kt) s = Mul (s0, root) p = Softmax <axis = -1> (s) c_then = MatMul (p, v)
      },
      else_branch = otherwise () => (float[batch,2,length,4] c_else) { c_else = Identity (q) }
    >"""
    + TAIL
).replace("MORE", "")


def test_a_site_in_a_branch(tmp_path):
    done = fuse.fuse(write(tmp_path / "in.onnx", IN_A_BRANCH), tmp_path / "out.onnx")
    assert (done.held, done.sites, done.fused) == (True, 1, 1)


def test_the_site_at_fault_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    """A lifting that is wrong at the second of three sites: found by bisection."""
    text = body().split("y = MatMul")[0] + "x1 = MatMul (c2, wo)"
    for i in (1, 2):
        text += LAYER.replace("@", str(i)).replace("GIVEN", f"x{i}").replace("NEXT", str(i + 1))
    path = write(tmp_path / "in.onnx", text.replace("x3 = MatMul", "y = MatMul") + "}")
    right = attention.fuse

    def wrong(model, site):
        node = right(model, site)
        if site.node.outputs[0].name == "l1p":
            node.attributes.add(ir.AttrFloat32("scale", 3.0))
        return node

    monkeypatch.setattr(attention, "fuse", wrong)
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.at_fault) == (False, "site l1p")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in.onnx"]
    assert main(["fuse", str(path), str(tmp_path / "out.onnx"), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["at_fault"] == "site l1p"
    assert not answer["parity"]["held"]


LAYER = """
  l@q0 = MatMul (GIVEN, wq) l@q2 = Reshape (l@q0, heads)
  l@q = Transpose <perm = [0, 2, 1, 3]> (l@q2) l@kt = Transpose <perm = [0, 2, 3, 1]> (l@q2)
  l@s = MatMul (l@q, l@kt) l@p = Softmax <axis = -1> (l@s) l@c = MatMul (l@p, l@q)
  l@c1 = Transpose <perm = [0, 2, 1, 3]> (l@c) l@c2 = Reshape (l@c1, flat)
  xNEXT = MatMul (l@c2, wo)
"""


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
def test_interrupted_it_leaves_nothing(tmp_path, monkeypatch, interrupt):
    path = source(tmp_path)

    def stop(*_):
        raise interrupt

    monkeypatch.setattr(parity, "compare", stop)
    with pytest.raises(interrupt):
        fuse.fuse(path, tmp_path / "out.onnx")
    assert [one.name for one in tmp_path.iterdir()] == ["in.onnx"]


def test_a_model_that_is_fused_stays_so(tmp_path):
    first, second = tmp_path / "out.onnx", tmp_path / "again.onnx"
    fuse.fuse(source(tmp_path), first)
    done = fuse.fuse(first, second)
    assert (done.held, done.sites, done.fused, done.operators) == (True, 1, 1, {"Attention": 1})


def test_a_model_without_a_site(tmp_path):
    text = body(softmax="p = Sigmoid (s)")
    done = fuse.fuse(write(tmp_path / "in.onnx", text), tmp_path / "out.onnx")
    assert (done.held, done.sites, done.fused) == (True, 0, 0)


def test_weights_beside_the_model(tmp_path, monkeypatch):
    """Above the size of one file, they are in a second."""
    monkeypatch.setattr(saving, "ONE_FILE", 100)
    wide = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
    text = body().replace("[batch,length,8] y", "[batch,length,16] y")
    done = fuse.fuse(write(tmp_path / "in.onnx", text, wo=wide), tmp_path / "out.onnx")
    assert done.held
    assert len([*tmp_path.glob("out.onnx.*.data")]) == 1


def test_the_command(tmp_path, capsys):
    path, out = source(tmp_path, WAYS["an added mask"]), tmp_path / "out.onnx"
    assert main(["fuse", str(path), str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["sites"] == answer["fused"] == answer["operators"]["Attention"] == 1
    assert answer["left"] == answer["repaired"] == []
    assert answer["parity"]["max_abs_diff"] <= answer["parity"]["tolerance"] == 1e-4
    assert answer["parity"]["inputs"].startswith("inferred: ")
    assert main(["fuse", str(path), str(path)]) == 2
    assert "expected another file than the input" in capsys.readouterr().err
    cases, _ = feeds.infer(path)
    np.savez(tmp_path / "feeds.npz", **cases[0].arrays)
    assert main(["fuse", str(path), str(out), "--inputs", str(tmp_path / "feeds.npz")]) == 0
    assert "inputs from feeds.npz" in capsys.readouterr().out


ROTARY = """
<ir_version: 10, opset_import: ["" : 23]>
rotary (float[batch,2,length,4] q, float[1,length,2] c, float[1,length,2] s)
=> (float[batch,2,length,4] y)
{
  r = RotaryEmbedding (q, c, s)
  t = RotaryEmbedding (q, c, s)
  y = Attention (r, t, q)
}
"""
MASKED = """
<ir_version: 10, opset_import: ["" : 23]>
masked (float[batch,2,length,4] q, bool[batch,1,1,length] attention_mask)
=> (float[batch,2,length,4] y)
{ y = Attention (q, q, q, attention_mask) }
"""


def test_rotary_caches_of_one_row_are_repaired(tmp_path):
    """ONNX Runtime refuses them for a batch above 1; compared row by row."""
    path = tmp_path / "in.onnx"
    onnx.save(onnx.parser.parse_model(ROTARY), path)
    random = np.random.default_rng(0)
    arrays = {
        "q": random.normal(size=(3, 2, 5, 4)).astype(np.float32),
        "c": random.normal(size=(1, 5, 2)).astype(np.float32),
        "s": random.normal(size=(1, 5, 2)).astype(np.float32),
    }
    with pytest.raises(Exception, match="cos_cache"):
        files.session(path).run(None, arrays)
    np.savez(tmp_path / "feeds.npz", **arrays)
    model = graph.load(path, weights=False)
    assert repairs.needed(model) == ["r", "t"]
    assert "with a batch of 1 alone: RotaryEmbedding r and 1 more" in graph.notes(model)[0]
    done = fuse.fuse(path, tmp_path / "out.onnx", inputs=tmp_path / "feeds.npz")
    assert done.held
    assert len(done.repaired) == 2
    assert repairs.needed(graph.load(tmp_path / "out.onnx")) == []
    assert files.session(tmp_path / "out.onnx").run(None, arrays)[0].shape == (3, 2, 5, 4)


def test_masks_of_one_row_are_repaired(tmp_path):
    """ONNX Runtime refuses them; compared with the operators' definitions."""
    path = tmp_path / "in.onnx"
    onnx.save(onnx.parser.parse_model(MASKED), path)
    model = graph.load(path, weights=False)
    assert repairs.needed(model) == ["y"]
    assert "on no input with more than one query: Attention y has" in graph.notes(model)[0]
    assert graph.counts(model) == {"Attention": 1}  # left as it is
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert done.held
    assert len(done.repaired) == 1
    assert repairs.needed(graph.load(tmp_path / "out.onnx")) == []


# ── The door ────────────────────────────────────────────────────────────────────────────────────


class Bert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            vocab_size=50)  # fmt: skip
        self.bert = transformers.BertModel(config, add_pooling_layer=False).eval()

    def forward(self, input_ids, attention_mask):
        return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state


def by_torch(path):
    """The default of ``torch.onnx.export``: all weights in NAME.onnx.data."""
    ids, axes = torch.ones(2, 5, dtype=torch.long), {0: "batch", 1: "length"}
    with quiet():
        torch.onnx.export(
            Bert(), (ids, ids), path, dynamo=True, dynamic_shapes=(axes, axes), verbose=False
        )


def by_transformers(path):
    """Its exporter's own ``save_pretrained``."""
    ids = torch.ones(2, 5, dtype=torch.long)
    given_ = {"input_ids": ids, "attention_mask": ids}
    with quiet():
        made = OnnxExporter().export(Bert().bert, given_, config=OnnxConfig(dynamic=True))
        made.save_pretrained(path.parent)


def by_onnx(path):
    write(path, ATTENTION)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=100)


@pytest.mark.parametrize("target", fuse.FUSING)
@pytest.mark.parametrize("export", [by_torch, by_transformers, by_onnx])
def test_a_default_export_is_fused_and_runs_without_its_data(export, target, tmp_path, capsys):
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    export(path)
    [data] = files.data(path)
    assert main(["fuse", str(path), str(out), "--target", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fused"] == 1
    data.rename(tmp_path / "away")
    path.unlink()
    assert main(["inspect", str(out), "--json"]) == 0
    assert [one["fused"] for one in json.loads(capsys.readouterr().out)["sites"]] == [True]
    assert len(feeds.infer(out)[0]) > 1  # it runs
    assert files.data(out) == set()


def test_a_cut_of_a_model_with_external_data_is_whole(tmp_path, capsys):
    path, cut = tmp_path / "model.onnx", tmp_path / "cut.onnx"
    by_onnx(path)
    assert main(["explain", str(path), "--model-type", "bert", "--save", str(cut)]) == 0
    (tmp_path / "w.data").unlink()
    path.unlink()
    assert main(["inspect", str(cut)]) == 0


def test_the_file_that_is_read_and_its_data_are_left_alone(tmp_path, capsys):
    """OUT may be neither of them, and its old data may be what the input needs."""
    path = tmp_path / "model.onnx"
    write(path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="out.onnx.data",
              size_threshold=100)  # fmt: skip
    data, link = tmp_path / "out.onnx.data", tmp_path / "link.onnx"
    link.symlink_to(path)
    before = data.read_bytes(), path.read_bytes()
    for source, out in ((path, path), (path, data), (link, path), (link, link)):
        assert main(["fuse", str(source), str(out)]) == 2
        assert "expected another file than the input" in capsys.readouterr().err
    assert main(["fuse", str(path), str(tmp_path / "out.onnx")]) == 0
    assert main(["fuse", str(path), str(link)]) == 0  # which only leads to the input
    assert not link.is_symlink()
    assert (data.read_bytes(), path.read_bytes()) == before


def test_without_a_site_there_is_nothing_to_fuse(tmp_path, capsys):
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[batch,8] x) => (float[batch,8] y) { a = MatMul (x, wq) y = Relu (a) }"""
    path, out = write(tmp_path / "in.onnx", text), tmp_path / "out.onnx"
    assert main(["fuse", str(path), str(out)]) == 0
    assert "no attention site: there was nothing to fuse" in capsys.readouterr().out
    assert graph.load(files.check(out)).opset_imports[""] == fuse.OPSET


def test_what_is_not_portable_is_named(tmp_path, capsys):
    """Also what ONNX Runtime's optimizer writes into ONNX's own domain."""
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[batch,length,8] x) => (float[batch,length,8] y)
    {
      a = com.microsoft.QuickGelu (x)
      b = com.microsoft.QuickGelu (a)
      c = SimplifiedLayerNormalization <axis = -1> (b, w)
      y = com.microsoft.MultiHeadAttention <num_heads = 2> (c, c, c)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "w"))
    path = tmp_path / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    for target, named in (("portable", True), ("cpu", False)):
        out = str(tmp_path / f"{target}.onnx")
        assert main(["fuse", str(path), out, "--target", target, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["operators"] == {"com.microsoft.MultiHeadAttention": 1}
        assert set(answer["not_portable"]) == (
            {
                "com.microsoft.QuickGelu × 2",
                "SimplifiedLayerNormalization × 1",
                "com.microsoft.MultiHeadAttention × 1",
            }
            if named
            else set()
        )


def test_a_file_that_does_not_load_is_said_to_be_that(tmp_path, monkeypatch, capsys):
    """And no step is blamed for what the others compute."""
    path = write(tmp_path / "in.onnx")

    def spoil(model):
        model.graph.node(0).op_type = "NoSuchOperator"

    monkeypatch.setattr(pipeline, "clean", spoil)
    monkeypatch.setattr(pipeline, "_bisect", lambda *_: pytest.fail("bisected"))
    assert main(["fuse", str(path), str(tmp_path / "out.onnx"), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["parity"]["held"] is False
    assert "does not load in ONNX Runtime: " in answer["parity"]["where"]
    assert "NoSuchOperator" in answer["parity"]["where"]
    assert not (tmp_path / "out.onnx").exists()


MOVES = {
    "transpose": "y = Transpose <perm = [1, 0, 2]> (d)",
    "reshape": "y = Reshape (d, shape)",
    "unsqueeze": "y = Unsqueeze (d, one)",
    "slice": "y = Slice (d, one, two)",
    "maxpool": "y = MaxPool <kernel_shape = [2]> (d)",
    "several": "t = Transpose <perm = [1, 0, 2]> (d) y = Reshape (t, shape)",
    "used twice": "t = Transpose <perm = [0, 2, 1]> (d) a = Relu (d) y = MatMul (a, t)",
    "both given": "y = Transpose <perm = [1, 0, 2]> (d) z = Add (d, d)",
    "identity": "i = Identity (d) y = Transpose <perm = [1, 0, 2]> (i)",
}
INT8 = """<ir_version: 8, opset_import: ["" : 17]>
g (int64[batch,length] ids) => (float yMORE)
<float scale = {0.25}, int8 zero = {3}, int64[2] shape = {-1, 8}, int64[1] one = {1},
 int64[1] two = {2}>
{ e = Gather (table, ids) d = DequantizeLinear (e, scale, zero) BODY }"""


@pytest.mark.parametrize("kind", MOVES)
def test_int8_that_is_moved_after_it_was_dequantised(kind, tmp_path):
    """ONNX Runtime 1.32 does not load it from opset 21 on; the same numbers, and it loads."""
    table = np.random.default_rng(0).integers(-128, 128, (20, 8), np.int8)
    more = ", float z" if kind == "both given" else ""
    text = INT8.replace("BODY", MOVES[kind]).replace("MORE", more)
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    path = tmp_path / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert done.held, str(done)
    assert done.parity.max_abs_diff == 0
    ids = {"ids": np.arange(12).reshape(3, 4)}
    one, two = (files.session(file).run(None, ids) for file in (path, tmp_path / "out.onnx"))
    for before, after in zip(one, two, strict=True):
        np.testing.assert_array_equal(before, after)
