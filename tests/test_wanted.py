"""What `explain` says of a site that is fused and wrong: what its operator wants, and what it got.

Each graph is the attention of `SITE` with one operator in its place, right but for one thing.
"""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from helpers import feeds, files, parity
from helpers.explain import wrong_sites
from helpers.explain.reasons import Explanation, Verdict

MICROSOFT = "com.microsoft."
HEAD = """
<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
tiny (float[batch,6,8] given, int64[batch,6] mask) => (float[batch,6,8] y)
{
"""
START = """
  [n_first] x = LayerNormalization <axis = -1> (given, gamma, beta)
  [n_q] q0 = MatMul (x, wq)
  [n_q_bias] q1 = Add (q0, bq)
  [n_k] k0 = MatMul (x, wk)
  [n_v] v0 = MatMul (x, wv)
  [n_v_bias] v1 = Add (v0, bv)
  [n_keys] kept = Cast <to = 9> (mask)
"""
SPLIT = """
  [n_q_heads] q2 = Reshape (q1, heads)
  [n_q_transpose] q = Transpose <perm = [0, 2, 1, 3]> (q2)
  [n_k_heads] k1 = Reshape (k0, heads)
  [n_k_transpose] k = Transpose <perm = [0, 2, 3, 1]> (k1)
  [n_v_heads] v2 = Reshape (v1, heads)
  [n_v_transpose] v = Transpose <perm = [0, 2, 1, 3]> (v2)
"""
SITE = """
  [n_scores] s0 = MatMul (q, k)
  [n_scale] s1 = Mul (s0, scale)
  [n_near] s2 = Add (s1, near)
  [n_keep] kept4 = Unsqueeze (kept, middle)
  [n_mask] s3 = Where (kept4, s2, lowest)
  [n_softmax] p = Softmax <axis = -1> (s3)
  [n_context] c0 = MatMul (p, v)
"""
MERGE = """
  [n_merge] c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
  [n_flat] c2 = Reshape (c1, flat)
"""
PROJECTION = """
  [n_o] o0 = MatMul (c2, wo)
  [n_o_bias] o1 = Add (o0, bo)
"""
END = """
  [n_residual] r = Add (x, o1)
  [n_norm] y = LayerNormalization <axis = -1> (r, gamma, beta)
}
"""
# Other ways to write the site, of which nothing is fused otherwise: Einsum; and (B·N, S, D).
EINSUM = """
  [n_q_heads] q2 = Reshape (q1, heads)
  [n_k_heads] k1 = Reshape (k0, heads)
  [n_v_heads] v2 = Reshape (v1, heads)
  [n_scores] s0 = Einsum <equation = "bqhd,bkhd->bhqk"> (q2, k1)
  [n_scale] s1 = Mul (s0, scale)
  [n_near] s2 = Add (s1, near)
  [n_keep] kept4 = Unsqueeze (kept, middle)
  [n_mask] s3 = Where (kept4, s2, lowest)
  [n_softmax] p = Softmax <axis = -1> (s3)
  [n_context] c1 = Einsum <equation = "bhqk,bkhd->bqhd"> (p, v2)
  [n_flat] c2 = Reshape (c1, flat)
"""
FLAT = """
  q9 = Mul (q1, scale)
  [n_q_heads] q2 = Reshape (q9, heads)
  [n_q_transpose] q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
  q = Reshape (q3, rows)
  [n_k_heads] k1 = Reshape (k0, heads)
  [n_k_transpose] k3 = Transpose <perm = [0, 2, 1, 3]> (k1)
  k4 = Reshape (k3, rows)
  k = Transpose <perm = [0, 2, 1]> (k4)
  [n_v_heads] v2 = Reshape (v1, heads)
  [n_v_transpose] v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
  v = Reshape (v3, rows)
  [n_scores] s0 = MatMul (q, k)
  s1 = Reshape (s0, apart)
  [n_near] s2 = Add (s1, near)
  [n_keep] kept4 = Unsqueeze (kept, middle)
  [n_mask] s3 = Where (kept4, s2, lowest)
  s4 = Reshape (s3, together)
  [n_softmax] p = Softmax <axis = -1> (s4)
  [n_context] c9 = MatMul (p, v)
  c0 = Reshape (c9, heads_first)
  [n_merge] c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
  [n_flat] c2 = Reshape (c1, flat)
"""
# Ways to fuse it that are right.
MULTI = """
  m32 = Cast <to = 6> (mask)
  [n_fused] c2 = com.microsoft.MultiHeadAttention
    <num_heads = 2, scale = 0.3> (q1, k0, v1, , m32, near)
"""
STANDARD = """
  kh = Transpose <perm = [0, 2, 1, 3]> (k1)
  kept_all = Unsqueeze (kept, middle)
  full = Expand (kept_all, scores_shape)
  bias = Where (full, near, lowest)
  [n_fused] c0 = Attention <scale = 0.3> (q, kh, v, bias)
"""
PACKED = """
  m32 = Cast <to = 6> (mask)
  [n_fused] c2 = com.microsoft.Attention
    <num_heads = 2, scale = 0.3> (x, packed, packed_bias, m32, , near)
"""


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    made = {name: normal(8, 8) / 2 for name in ("wq", "wk", "wv", "wo")}
    made |= {name: normal(8) for name in ("bq", "bv", "bo")}
    made |= {"near": normal(1, 2, 6, 6), "gamma": np.full(8, 1.5), "beta": np.full(8, 0.25)}
    made |= {"scale": np.array(0.3), "lowest": np.array(-1e9), "two": np.array(2.0)}
    made["packed"] = np.concatenate([made["wq"], made["wk"], made["wv"]], axis=1)
    made["packed_bias"] = np.concatenate([made["bq"], np.zeros(8), made["bv"]])
    heads = [one.reshape(8, 2, 4) for one in (made["wq"], made["wk"], made["wv"])]
    made["packed_by_head"] = np.stack(heads, axis=2).reshape(8, 24)
    biases = [one.reshape(2, 4) for one in (made["bq"], np.zeros(8), made["bv"])]
    made["packed_bias_by_head"] = np.stack(biases, axis=1).reshape(24)
    found = {name: array.astype(np.float32) for name, array in made.items()}
    found |= {"heads": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8])}
    found |= {"middle": np.array([1, 2]), "scores_shape": np.array([1, 1, 6, 6])}
    found |= {"rows": np.array([-1, 6, 4]), "apart": np.array([-1, 2, 6, 6])}
    found |= {"together": np.array([-1, 6, 6]), "heads_first": np.array([-1, 2, 6, 4])}
    found |= {"row": np.array([2]), "six": np.array([-1, 6, 8]), "whole": np.array([0, 2, 6, 4])}
    return found


def written(
    path: Path, *parts: str, head: str = HEAD, weights: dict[str, np.ndarray] | None = None
) -> None:
    """Write the graph of these parts, with the weights that it reads."""
    proto = onnx.parser.parse_model((WIDE if weights else head) + "".join(parts))
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name)
        for name, array in (weights or arrays()).items()
        if name in read
    )
    onnx.save(proto, path)


def compared(folder: Path, expected: list[str]) -> None:
    """Hold what is told of the site in b.onnx, fused from a.onnx, against patterns of lines."""
    original = files.Opened(folder / "a.onnx")
    whole, wrong = wrong_sites.find(original, folder / "b.onnx", *feeds.infer(original))
    assert whole.held == (not expected)
    assert {*wrong} <= {0}
    found = wrong.get(0, [])
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, line), line


def check(
    folder: Path,
    fused: str,
    expected: list[str],
    *,
    after: str = PROJECTION,
    end: str = END,
    plain: str = "",
) -> None:
    """The same of `SITE`, or of one that is written otherwise, where it is fused so."""
    written(folder / "a.onnx", START, plain or SPLIT + SITE + MERGE, PROJECTION, END)
    written(folder / "b.onnx", START, fused, after, end)
    compared(folder, expected)


@pytest.mark.parametrize("fused", [MULTI, SPLIT + STANDARD + MERGE, PACKED])
def test_right_ones_are_not_told_of(tmp_path, fused):
    check(tmp_path, fused, [])


TURN = "Transpose <perm = [1, 0, 2]>"
SWAPPED = f"tq = {TURN} (q1) tk = {TURN} (k0) tv = {TURN} (v1)"
UNMASKED = MULTI.replace(", , m32, near", ", , , near")
FAULTS = {
    # queries, keys, values
    "time-major": (
        SWAPPED
        + UNMASKED.replace("(q1, k0, v1, , , near)", "(tq, tk, tv)").replace("c2 =", "t =")
        + f"c2 = {TURN} (t)",
        [
            "input 0 .query.: .* got them as .S, B, N·D. .*: time-major",
            "input 1 .key.: .* got them as .T, B, N·D. .*: time-major",
            "input 2 .value.: .* got them as .T, B, N·V. .*: time-major",
        ],
    ),
    "heads first": (
        SPLIT
        + MULTI.replace("(q1,", "(q9,").replace("[n_fused]", "q9 = Reshape (q, six) [n_fused]"),
        [
            r"input 0 .query.: wants the queries as .B, S, N·D. = .*, got them as .B, N, S, D.,"
            " reshaped to .* without a Transpose"
        ],
    ),
    "keys transposed": (
        SPLIT
        + STANDARD.replace("Transpose <perm = [0, 2, 1, 3]> (k1)", "Reshape (k, whole)")
        + MERGE,
        [r"Attention, input 1 .K.: .* got them as .B, N, D, T., reshaped to .*"],
    ),
    "keys and values exchanged": (
        MULTI.replace("k0, v1", "v1, k0"),
        ["input 1 .key.: .* got the original's values", "input 2 .value.: .* the original's keys"],
    ),
    "queries and keys exchanged": (
        MULTI.replace("q1, k0", "k0, q1"),
        ["input 0 .query.: .* got the original's keys", "input 1 .key.: .* original's queries"],
    ),
    "another tensor": (
        MULTI.replace("(q1,", "(x,"),
        ["input 0 .query.: .* got another tensor of that shape"],
    ),
    "no bias of the projection": (
        MULTI.replace("(q1,", "(q0,"),
        ["input 0 .query.: .* got them with another bias of their projection, or with none"],
    ),
    "packed head by head": (
        PACKED.replace("packed, packed_bias", "packed_by_head, packed_bias_by_head"),
        [r"com.microsoft.Attention, input 1 .weights.: wants .Q.K.V., .* got them head by head"],
    ),
    # heads and scale
    "heads": (
        MULTI.replace("num_heads = 2", "num_heads = 4").replace(", near", ""),
        ["num_heads: the original has 2 heads, got 4", ".*attention_bias.*the operator none"],
    ),
    "the default scale": (
        MULTI.replace(", scale = 0.3", ""),
        ["scale: the original multiplies q·kᵀ by 0.3, the operator by 0.5, its default 1/√D"],
    ),
    "scaled twice": (
        MULTI.replace("(q1,", "(q9,").replace("[n_fused]", "q9 = Mul (q1, scale) [n_fused]"),
        ["scale: .* by 0.3, of queries and keys that come times 0.3: scaled twice"],
    ),
    # bias and mask
    "no bias": (
        MULTI.replace(", near", ""),
        ["attention_bias.: the original adds .* the operator none"],
    ),
    "bias twice": (
        MULTI.replace("near", "near2").replace("[n_fused]", "near2 = Add (near, near) [n_fused]"),
        ["input 5 .attention_bias.: the original's bias is added twice"],
    ),
    "bias of the other sign": (
        MULTI.replace("near", "near2").replace("[n_fused]", "near2 = Neg (near) [n_fused]"),
        ["input 5 .attention_bias.: the original's bias is added with the other sign"],
    ),
    "bias transposed": (
        MULTI.replace("near", "near2").replace(
            "[n_fused]", "near2 = Transpose <perm = [0, 1, 3, 2]> (near) [n_fused]"
        ),
        ["input 5 .attention_bias.: wants the bias as .*, got it transposed"],
    ),
    "no mask": (
        UNMASKED,
        ["key_padding_mask.: the original masks .*, the operator is given no mask"],
    ),
    "mask inverted": (
        MULTI.replace("(mask)", "(hidden)").replace("m32 =", "hidden = Not (kept) m32 ="),
        ["key_padding_mask.: in the opposite sense"],
    ),
    "a bool mask inverted": (
        SPLIT + STANDARD.replace("Where (full, near, lowest)", "Not (full)") + MERGE,
        ["attn_mask.: in the opposite sense"],  # so that no score is seen by both
    ),
    "a mask of numbers": (
        SPLIT + STANDARD.replace("Where (full, near, lowest)", "Cast <to = 1> (full)") + MERGE,
        ["attn_mask.: numbers 1 and 0 are added"],
    ),
    "causal": (
        MULTI.replace("num_heads = 2", "num_heads = 2, unidirectional = 1"),
        ["unidirectional: the operator masks later keys .causal., the original does not"],
    ),
    # what the kernel refuses
    "a bias without rows": (
        MULTI.replace("near)", "near1)").replace(
            "[n_fused]", "near1 = ReduceMean <keepdims = 1> (near, row) [n_fused]"
        ),
        [
            r"attention_bias.: wants .B or 1, N or 1, S, T. = .*, got .1, 2, 1, 6.",
            "does not run: Input 'attention_bias' dimension 2 should be same as sequence_length",
        ],
    ),
    "no values": (
        MULTI.replace("k0, v1", "k0, "),
        [
            "input 2 .value.: wants the values, and is not given",
            "does not run: Expect rank of key be 5 for packed kv",
        ],
    ),
    "a mask of another type": (
        MULTI.replace("m32,", "mask,"),
        ["key_padding_mask.: wants int32, got int64", "does not run: Type 'tensor.int64.' .*"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_is_told(tmp_path, fault):
    check(tmp_path, *FAULTS[fault])


@pytest.mark.parametrize("plain", [EINSUM, FLAT], ids=["Einsum", "(B·N, S, D)"])
@pytest.mark.parametrize("fault", ["heads", "keys and values exchanged", "no bias", "no mask"])
def test_however_the_site_is_written(tmp_path, plain, fault):
    check(tmp_path, MULTI, [], plain=plain)
    check(tmp_path, *FAULTS[fault], plain=plain)


NAME = "com.microsoft.MultiHeadAttention is right; "
AFTER = {
    "no projection": (
        "[n_o_bias] o1 = Identity (c2)",
        END,
        "what follows leaves out MatMul n_o, Add n_o_bias$",
    ),
    "no bias of the projection": (
        "[n_o] o1 = MatMul (c2, wo)",
        END,
        "what follows leaves out Add n_o_bias",
    ),
    "the projection twice": (
        PROJECTION.replace("o1 =", "o2 =") + "[n_more] o3 = MatMul (o2, wo) o1 = Add (o3, bo)",
        END,
        "MatMul n_more, after it, is applied twice",
    ),
    "transposed": (
        PROJECTION.replace("o1 =", "o2 =")
        + "o3 = Transpose <perm = [0, 2, 1]> (o2) [n_turned] o1 = Reshape (o3, six)",
        END,
        "Transpose .* gives Add n_o_bias transposed",
    ),
    "no projection, and no tensor of that name": (
        "",
        END.replace("o1", "c2"),
        "what follows leaves out MatMul n_o, Add n_o_bias, before Add n_residual",
    ),
    "another projection": (
        PROJECTION.replace("wo", "wq"),
        END,
        "MatMul n_o, after it, gives what the original has nowhere, which goes on with MatMul n_o",
    ),
}


@pytest.mark.parametrize("fault", AFTER)
def test_what_follows_is_told(tmp_path, fault):
    """The operator is right, and what comes after it is not."""
    after, end, expected = AFTER[fault]
    check(tmp_path, MULTI, [NAME + expected], after=after, end=end)


def test_what_is_read_elsewhere_is_told(tmp_path):
    """The weights of the site go into the result, and are made no longer."""
    end = END.replace("(x, o1)", "(x, o2)").replace(
        "[n_residual]", "[n_all] w = ReduceMax <keepdims = 0> (p) o2 = Add (o1, w) [n_residual]"
    )
    written(tmp_path / "a.onnx", START, SPLIT, SITE, MERGE, PROJECTION, end)
    written(tmp_path / "b.onnx", START, MULTI, PROJECTION, end)
    compared(tmp_path, ["Softmax n_softmax: what it gives is read elsewhere, and made no longer"])


def test_where_the_fault_is_if_at_no_site(tmp_path):
    written(tmp_path / "a.onnx", START, SPLIT, SITE, MERGE, PROJECTION, END)
    written(tmp_path / "b.onnx", START.replace("wq", "wk"), MULTI, PROJECTION, END)
    compared(tmp_path, ["elsewhere; the first tensor that differs is q1, of Add n_q_bias$"])


def test_what_is_no_attention_is_told(tmp_path):
    plain = SITE.replace("Softmax <axis = -1>", "Sigmoid")
    written(tmp_path / "a.onnx", START, SPLIT, plain, MERGE, PROJECTION, END)
    written(tmp_path / "b.onnx", START, MULTI, PROJECTION, END)
    original = files.Opened(tmp_path / "a.onnx")
    _, wrong = wrong_sites.find(original, tmp_path / "b.onnx", *feeds.infer(original))
    stands = "com.microsoft.MultiHeadAttention: stands for what is no attention in the original"
    assert wrong == {"c2": [stands]}


def test_the_report_has_the_lines_of_the_first_wrong_site():
    sites = [
        Verdict(name, None, True, wrong=True, wanted=[wanted])
        for name, wanted in zip("abc", ("scale", "scale", "mask"), strict=True)
    ]
    text = str(Explanation("own", sites, [], parity=parity.Candidate("own"))).splitlines()
    assert text[2:4] == ["3 sites fused wrong: a … c", "   scale"]
    assert text[4:] == ["   1 other got something else: see --json"]


# ── Heads that share keys ───────────────────────────────────────────────────────────────────────

WIDE = HEAD.replace("6,8]", "6,16]")
SHARED = """
  [n_first] x = LayerNormalization <axis = -1> (given, gamma, beta)
  [n_q] q0 = MatMul (x, wq)
  [n_k] k0 = MatMul (x, wk)
  [n_v] v0 = MatMul (x, wv)
"""
REPEATED = """
  [n_q_heads] q2 = Reshape (q0, heads)
  [n_q_transpose] q = Transpose <perm = [0, 2, 1, 3]> (q2)
  [n_k_heads] k1 = Reshape (k0, heads)
  [n_k_transpose] k3 = Transpose <perm = [0, 2, 1, 3]> (k1)
  [n_k_repeat] k4 = Expand (k3, groups)
  k = Transpose <perm = [0, 1, 3, 2]> (k4)
  [n_v_heads] v2 = Reshape (v0, heads)
  [n_v_transpose] v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
  [n_v_repeat] v = Expand (v3, groups)
"""
CAUSAL = """
  [n_scores] s0 = MatMul (q, k)
  [n_scale] s1 = Mul (s0, scale)
  [n_mask] s3 = Where (lower, s1, lowest)
  [n_softmax] p = Softmax <axis = -1> (s3)
  [n_context] c0 = MatMul (p, v)
"""
LAST = """
  [n_o] y = MatMul (c2, wo)
}
"""
GROUPED = """
  rows = Shape <start = 0, end = 1> (x)
  lasts = Expand (five, rows)
  [n_fused] c2 = com.microsoft.GroupQueryAttention
    <num_heads = 2, kv_num_heads = 1, scale = 0.3> (q0, k0, v0, , , lasts, six)
"""
SPLIT_UP = (
    REPEATED.partition("[n_k_repeat]")[0]
    + REPEATED.partition("(k4)")[2].partition("[n_v_repeat]")[0]
)
OWN_CAUSAL = "[n_fused] c0 = Attention <is_causal = 1, scale = 0.3> (q, k3, v3)"
HALF = "kh = Slice (k0, from, to, last) vh = Slice (v0, from, to, last)"
SHARING = {
    "grouped": (1, GROUPED, []),
    "standard": (1, SPLIT_UP + OWN_CAUSAL + MERGE, []),
    "not causal": (
        1, GROUPED.replace("scale = 0.3", "scale = 0.3, causal = 0"),
        ["GroupQueryAttention, causal: the original masks later keys .causal., the operator does"],
    ),
    "not causal either": (
        1, SPLIT_UP + OWN_CAUSAL.replace("is_causal = 1, ", "") + MERGE,
        ["^Attention, is_causal: the original masks later keys .causal., the operator does not"],
    ),
    "a count of keys": (
        1, GROUPED.replace("five", "six"),
        [r"GroupQueryAttention does not run: seqlens_k.0. = 6 is out of range"],
    ),
    "keys for one head": (
        2, HALF + GROUPED.replace("k0, v0", "kh, vh"),
        ["GroupQueryAttention, kv_num_heads: the original's keys have 2 heads, got 1"],
    ),
    "keys with all heads": (
        1, GROUPED.replace("kv_num_heads = 1", "kv_num_heads = 2"),
        [r"input 1 .key.: wants .B, S, K·D. = .*, got .*, 6, 8.",
         "input 2 .value.: wants", "GroupQueryAttention does not run: "],
    ),
}  # fmt: skip


def sharing(heads: int) -> dict[str, np.ndarray]:
    """Weights for two heads of width 8, and so many heads of keys."""
    random = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / 2).astype(np.float32)

    found = {"wq": normal(16, 16), "wo": normal(16, 16)}
    found |= {"wk": normal(16, 8 * heads), "wv": normal(16, 8 * heads)}
    found |= {"gamma": np.full(16, 1.5, np.float32), "beta": np.full(16, 0.25, np.float32)}
    found |= {"scale": np.float32(0.3), "lowest": np.float32(-1e9)}
    found |= {"lower": np.tri(6, dtype=bool), "groups": np.array([1, 2, 1, 1])}
    found |= {"heads": np.array([0, 0, -1, 8]), "flat": np.array([0, 0, 16])}
    found |= {"five": np.int32(5), "six": np.int32(6), "last": np.array([-1])}
    return found | {"from": np.array([0]), "to": np.array([8])}


@pytest.mark.parametrize("fault", SHARING)
def test_heads_that_share_keys(tmp_path, fault):
    heads, fused, expected = SHARING[fault]
    weights = sharing(heads)
    written(tmp_path / "a.onnx", SHARED, REPEATED, CAUSAL, MERGE, LAST, weights=weights)
    written(tmp_path / "b.onnx", SHARED, fused, LAST, weights=weights)
    compared(tmp_path, expected)


# ── Caches ──────────────────────────────────────────────────────────────────────────────────────

CACHES = HEAD.replace(
    "int64[batch,6] mask", "float[batch,2,3,4] past_k, float[batch,2,3,4] past_v"
).replace("y)", "y, float[batch,2,9,4] present_k, float[batch,2,9,4] present_v)")
PROJECTED = START.partition("  [n_keys]")[0]
JOINED = """
  k3 = Transpose <perm = [0, 2, 1, 3]> (k1)
  present_k = Concat <axis = 2> (past_k, k3)
  present_v = Concat <axis = 2> (past_v, v)
  kt = Transpose <perm = [0, 1, 3, 2]> (present_k)
  [n_scores] s0 = MatMul (q, kt)
  [n_scale] s1 = Mul (s0, scale)
  [n_softmax] p = Softmax <axis = -1> (s1)
  [n_context] c0 = MatMul (p, present_v)
"""
CACHED = """
  [n_fused] c2, present_k, present_v = com.microsoft.MultiHeadAttention
    <num_heads = 2, scale = 0.3> (q1, k0, v1, , , , past_k, past_v)
"""
PASTS = {
    "right": (CACHED, []),
    "pasts exchanged": (
        CACHED.replace("past_k, past_v", "past_v, past_k"),
        [r"input 6 .past_key.: wants the keys of earlier steps, got the original's values of earl",
         r"input 7 .past_value.: wants the values of earlier steps, got the original's keys of ea"],
    ),
    "keys and values exchanged": (
        CACHED.replace("k0, v1", "v1, k0"),
        ["input 1 .key.: .* got the original's values", "input 2 .value.: .* the original's keys"],
    ),
    "scale": (CACHED.replace("0.3", "0.4"), ["scale: the original multiplies q·kᵀ by 0.3, .* 0.4"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", PASTS)
def test_caches(tmp_path, fault):
    fused, expected = PASTS[fault]
    written(tmp_path / "a.onnx", PROJECTED, SPLIT, JOINED, MERGE, PROJECTION, END, head=CACHES)
    written(tmp_path / "b.onnx", PROJECTED, fused, PROJECTION, END, head=CACHES)
    compared(tmp_path, expected)
