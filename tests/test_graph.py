"""Attention sites, neighbours, origins, cut-outs."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import ATTENTION, write

from helpers import files, fuse, graph
from helpers.graph import (
    block,
    counts,
    cut_out,
    find,
    load,
    module,
    neighbours,
    origin,
    sites,
    values,
)

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'


def names(path) -> list[str]:
    return [site.name for site in sites(load(path))]


def test_site_of_a_plain_attention(tmp_path):
    (site,) = sites(load(write(tmp_path / "a.onnx")))
    assert (site.name, site.fused) == ("n_softmax", False)
    assert (site.scores.name, site.context.name) == ("n_scores", "n_context")


# Text of the scores and the weights between the two products, which a site is looked for through.
BETWEEN = {
    "mask selected with Where, boolean": (
        "float[batch,1,1,length] mask",
        "m = Cast <to = 9> (mask) s1 = Where (m, s0, low) p = Softmax <axis = -1> (s1)",
    ),
    "guard against rows without keys": (
        "float[batch,1,1,length] mask",
        "s1 = Add (s0, mask) p0 = Softmax <axis = -1> (s1) n = IsNaN (p0) p = Where (n, half, p0)",
    ),
    "half precision, dropout, head mask": (
        "float[2,1,1] mask",
        "s1 = Cast <to = 10> (s0) p0 = Softmax (s1) p1 = Cast <to = 1> (p0) p2 = Dropout (p1)"
        " p = Mul (p2, mask)",
    ),
    "flattened to 3-D and back": (
        "float[1] mask",
        "f = Shape (s0) s1 = Reshape (s0, three) p0 = Softmax <axis = 2> (s1) p = Reshape (p0, f)",
    ),
    "softmax over the other axis": (
        "float[1] mask",
        "s1 = Transpose <perm = [0, 1, 3, 2]> (s0) p0 = Softmax <axis = -2> (s1)"
        " p = Transpose <perm = [0, 1, 3, 2]> (p0)",
    ),
    "heads mixed by a weight (talking heads)": (
        "float[1] mask",
        "s1 = Transpose <perm = [0, 2, 3, 1]> (s0) s2 = MatMul (s1, mix)"
        " s3 = Transpose <perm = [0, 3, 1, 2]> (s2) p = Softmax (s3)",
    ),
    "bias that is a product itself": (
        "float[batch,2,length,length] mask",
        "b = MatMul (q, rel) s1 = Add (s0, b) s2 = Add (s1, mask) p = Softmax (s2)",
    ),
    "scores joined with a sink and cut again": (
        "float[batch,2,length,1] mask",
        "s1 = Concat <axis = -1> (s0, mask) p0 = Softmax (s1) p = Slice (p0, zero, minus, last)",
    ),
}


@pytest.mark.parametrize("between", BETWEEN, ids=list(BETWEEN))
def test_site_seen_through(between, tmp_path):
    """Each way of writing scores to weights is one site, found with both its products."""
    given, middle = BETWEEN[between]
    start, end = ATTENTION.index("[n_scale]"), ATTENTION.index("[n_context]")
    text = (ATTENTION[:start] + middle + ATTENTION[end:]).replace(
        "8] given)", f"8] given, {given})"
    )
    constants = {
        "low": np.float32(-1e9),
        "three": np.array([-1, 5, 5]),
        "mix": np.eye(2, dtype=np.float32),
        "rel": np.ones((4, 5), np.float32),
        "zero": np.array([0]),
        "minus": np.array([-1]),
        "last": np.array([3]),
    }
    (site,) = sites(load(write(tmp_path / "a.onnx", text, **constants)))
    assert (site.scores.name, site.context.name) == ("n_scores", "n_context")


NO_SITES = {
    "a router: scores are a product with a weight": (
        "l = MatMul (x, wq) p = Softmax <axis = -1> (l) t = Transpose <perm = [0, 2, 1]> (x)"
        " u = MatMul (p, t) y = MatMul (u, x)"
    ),
    "values are weights": (
        "t = Transpose <perm = [0, 2, 1]> (x) s = MatMul (x, t) p = Softmax <axis = -1> (s)"
        " u = Einsum <equation = 'bst,ce->bse'> (p, wv) y = Add (u, x)"
    ),
    "a classifier": "l = MatMul (x, wq) b = Add (l, bq) y = Softmax <axis = -1> (b)",
    "linear attention: the softmax is over the features of the keys": (
        "k = MatMul (x, wk) p = Softmax <axis = -1> (k) t = Transpose <perm = [0, 2, 1]> (p)"
        " c = MatMul (t, x) y = MatMul (x, c)"
    ),
    "no softmax": "y = Add (x, bq)",
}


@pytest.mark.parametrize("body", NO_SITES.values(), ids=list(NO_SITES))
def test_softmax_that_is_no_site(body, tmp_path):
    text = f"{HEAD} g (float[batch,8,8] x) => (float[batch,8,8] y) {{ {body} }}".replace("'", '"')
    assert names(write(tmp_path / "a.onnx", text)) == []


LEARNED = {
    "a query that is a weight": ("t = Transpose <perm = [0, 2, 1]> (x) s = MatMul (probe, t)", 1),
    "a linear layer of one output": (
        "l = MatMul (x, column) s = Transpose <perm = [0, 2, 1]> (l)",
        1,
    ),
    "a linear layer of several, a router over tokens": (
        "l = MatMul (x, wq) s = Transpose <perm = [0, 2, 1]> (l)",
        0,
    ),
}


@pytest.mark.parametrize(("scores", "count"), LEARNED.values(), ids=list(LEARNED))
def test_learned_query(scores, count, tmp_path):
    """A softmax over tokens whose query is learned, as in SigLIP's pooling head, is a site."""
    body = f"{scores} p = Softmax <axis = -1> (s) y = MatMul (p, x)"
    text = f"{HEAD} g (float[batch,length,8] x) => (float[batch,rows,8] y) {{ {body} }}"
    weights = {"probe": np.ones((1, 1, 8), np.float32), "column": np.ones((8, 1), np.float32)}
    assert len(names(write(tmp_path / "a.onnx", text, **weights))) == count


def test_einsum_products(tmp_path):
    text = f"""{HEAD}
    g (float[b,n,s,d] q, float[b,n,t,d] k, float[b,n,t,d] v) => (float[b,n,s,d] y) {{
      s0 = Einsum <equation = "bnsd, bntd -> bnst"> (q, k)
      [n_softmax] p = Softmax <axis = 3> (s0)
      y = Einsum <equation = "bnst,bntd->bnsd"> (p, v) }}"""
    assert names(write(tmp_path / "a.onnx", text)) == ["n_softmax"]
    over_heads = text.replace("axis = 3", "axis = 1")
    assert names(write(tmp_path / "b.onnx", over_heads)) == []


def test_fused_operators_are_sites(tmp_path):
    text = f"""{HEAD} g (float[b,s,8] x) => (float[b,s,8] y) {{
      [n_mha] z = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x)
      y = Softmax (z) }}"""
    (site,) = sites(load(write(tmp_path / "a.onnx", text)))
    assert (site.name, site.fused) == ("n_mha", True)


def test_sites_in_branches_and_functions_count_each(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
    g (float[b,s,8] x, bool flag) => (float[b,s,8] y) {
      one = local.attend (x)
      two = local.attend (one)
      y = If (flag) <
        then_branch = t () => (float[b,s,8] a) {
          k = Transpose <perm = [0, 2, 1]> (two) l = MatMul (two, k) p = Softmax (l)
          a = MatMul (p, two) },
        else_branch = e () => (float[b,s,8] a) { a = Identity (two) }>
    }
    <opset_import: ["" : 21], domain: "local">
    attend (x) => (y) {
      k = Transpose <perm = [0, 2, 1]> (x) l = MatMul (x, k) p = Softmax (l) y = MatMul (p, x) }
    """
    assert len(names(write(tmp_path / "a.onnx", text))) == 3


def test_counts_and_find(tmp_path):
    model = load(write(tmp_path / "a.onnx"))
    assert counts(model)["MatMul"] == 6
    assert list(counts(model).values()) == sorted(counts(model).values(), reverse=True)
    assert find(model, "n_softmax") is find(model, "p")
    with pytest.raises(KeyError):
        find(model, "nothing")


def test_block_is_cut_out_and_computes_the_same(tmp_path):
    path = write(tmp_path / "a.onnx")
    model = load(path)
    before = len(list(model.graph))
    taken = block(model, sites(model)[0])
    found = {node.name for node in taken}
    assert {"n_q", "n_q_bias", "n_k", "n_v", "n_softmax", "n_flat", "n_o", "n_o_bias"} <= found
    assert not {"n_residual", "n_norm"} & found
    small = files.save(cut_out(model, taken), tmp_path / "block.onnx")
    assert len(list(model.graph)) == before
    whole = onnx.load(path)
    for name in ("x", "o1"):
        whole.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    onnx.save(whole, tmp_path / "whole.onnx")
    given = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    x, expected = files.session(tmp_path / "whole.onnx").run(["x", "o1"], {"given": given})
    np.testing.assert_allclose(files.session(small).run(None, {"x": x})[0], expected, atol=1e-6)


def test_load_without_weights_finds_the_same(tmp_path):
    big = np.ones((8, 8192), np.float32)
    text = f"{HEAD} g (float[n,8] x) => (float[n,8192] y) {{ y = MatMul (x, big) }}"
    path = write(tmp_path / "a.onnx", text, big=big)
    light = load(path, weights=False)
    assert light.graph.initializers["big"].const_value.shape == (8, 8192)
    assert counts(light) == counts(load(path))
    assert names(write(tmp_path / "b.onnx")) == ["n_softmax"]


def test_neighbours_counts_steps(tmp_path):
    model = load(write(tmp_path / "a.onnx"))
    near = {node.name for node in neighbours(find(model, "n_softmax"), up=2, down=1)}
    assert near == {"n_scores", "n_scale", "n_softmax", "n_context"}


def test_origin_from_metadata_and_from_names(tmp_path):
    model = load(write(tmp_path / "a.onnx"))
    node = find(model, "n_softmax")
    assert (module(node), origin(node)) == (None, None)
    node.name = "/encoder/layers.0/attention/Softmax"
    assert origin(node) == module(node) == "encoder.layers.0.attention"
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.0', 'layers.0.attn', 'sdpa']"
    node.metadata_props["pkg.torch.onnx.stack_trace"] = (
        'File "/a/b/modeling_x.py", line 7, in forward\n  File "/a/b/modeling_x.py", line 537, in f'
    )
    assert origin(node) == "modeling_x.py:537 in layers.0.attn"


def test_layer_of_a_node_that_an_optimizer_made(tmp_path):
    text = f"""{HEAD} g (float[b,s,8] x) => (float[b,s,8] y) {{
      [Attention_0] z = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x)
      y = MatMul (z, wo) }}"""
    model = load(write(tmp_path / "a.onnx", text))
    find(model, "y").name = "/encoder/layers.0/attention/out_proj/MatMul"
    assert [site.layer for site in graph.sites(model)] == ["encoder.layers.0.attention"]


def test_attention_in_qoperator_form(tmp_path):
    """QLinearMatMul · QLinearSoftmax · QLinearMatMul is an attention site, with what is between."""
    text = """
    <ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    tiny (float[b,2,n,4] q, float[b,2,4,n] k, float[b,2,n,4] v, float[b,1,1,n] bias)
      => (float[b,2,n,4] y)
    <float one = {0.05}, uint8 zero = {128}>
    {
      q8 = QuantizeLinear (q, one, zero)
      k8 = QuantizeLinear (k, one, zero)
      v8 = QuantizeLinear (v, one, zero)
      b8 = QuantizeLinear (bias, one, zero)
      s8 = QLinearMatMul (q8, one, zero, k8, one, zero, one, zero)
      [added] t8 = com.microsoft.QLinearAdd (s8, one, zero, b8, one, zero, one, zero)
      [softmax] p8 = com.microsoft.QLinearSoftmax <axis = -1, opset = 13> (t8, one, zero, one, zero)
      y8 = QLinearMatMul (p8, one, zero, v8, one, zero, one, zero)
      y = DequantizeLinear (y8, one, zero)
    }"""
    path = tmp_path / "a.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    (site,) = graph.sites(graph.load(path))
    assert (site.name, site.fused) == ("softmax", False)
    done = fuse.fuse(path, tmp_path / "out.onnx")
    assert (done.held, done.fused) == (True, 0)
    assert done.left == [
        "softmax: it is in QOperator form: fuse before quantising, or use QuantFormat.QDQ"
    ]


def test_a_rank_is_found_at_once_behind_many_values_of_unknown_shape():
    """Each Add reads the one before twice: there are 2³⁰⁰ ways up."""
    end = start = ir.Value(name="x", shape=ir.Shape([1, "n", 8]))
    for _ in range(300):
        end = ir.node("Add", [end, end]).outputs[0]
    assert values.rank(end) == 3
    unknown = ir.node("Add", [end, ir.Value(name="y")]).outputs[0]
    assert values.rank(unknown) is None
    assert values.rank(start) == 3
