"""What the site itself tells of why a fusion gave up: causes, forms, heads, methods that fuse."""

import numpy as np
import onnx
import pytest
from graphs import ATTENTION, write
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from test_explain import in_branch, options, valid
from test_fuse import MASKED

from helpers import graph
from helpers.explain import explain, head_sizes
from helpers.explain import onnxruntime_parts as parts

# Attention as BERT's fusion wants it: a bias on each projection, a scale by Div, no mask.
BERT = ATTENTION.replace("Add (bq, q0)", "Add (q0, bq)").replace("Mul (s0", "Div (s0")
BERT = BERT.replace("[n_k_heads]", "[n_kb] kb = Add (k0, bv) [n_k_heads]").replace(
    "Reshape (k0, heads)", "Reshape (kb, heads)"
)

# One product makes (batch, length, 3 · 8), which becomes (3, batch, heads, length, 4).
PACKED = """
  [n_qkv] a0 = MatMul (x, wqkv)
  [n_qkv_heads] a1 = Reshape (a0, three)
  [n_qkv_transpose] a2 = Transpose <perm = [2, 0, 3, 1, 4]> (a1)
  [n_q] q = Gather <axis = 0> (a2, zero)
  [n_k0] k0 = Gather <axis = 0> (a2, one)
  [n_k] k = Transpose <perm = [0, 1, 3, 2]> (k0)
  [n_v] v = Gather <axis = 0> (a2, two)
"""


def reason(path, model_type="bert", **changed):
    (told,) = valid(explain(path, model_type, **options(**changed))).reasons
    return told


def test_a_packed_projection(tmp_path):
    """A count of products is one short; that nothing is used elsewhere is not the point."""
    start, end = ATTENTION.index("[n_q]"), ATTENTION.index("[n_scores]")
    path = write(
        tmp_path / "a.onnx",
        ATTENTION[:start] + PACKED + ATTENTION[end:],
        wqkv=np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32),
        three=np.array([0, 0, 3, 2, 4]),
        **{name: np.array(i) for i, name in enumerate(("zero", "one", "two"))},
    )
    told = reason(path)
    assert (told.cause, told.kind) == ("packed_projection", "check")
    assert told.message.startswith("MatMul n_qkv makes all three")


def test_quantised_products(tmp_path):
    quantize_dynamic(write(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    told = reason(tmp_path / "b.onnx", "bart")
    assert told.cause == "quantised"
    assert "fuse the float model, and quantise what that gives" in told.message


def test_a_cast_that_onnx_runtime_put_there(tmp_path):
    """At opt_level 1 it converts what it has no kernels for in float16; at 0 nothing is cast."""
    proto = convert_float_to_float16(onnx.load(write(tmp_path / "a.onnx")))
    onnx.save(proto, tmp_path / "b.onnx")
    told = reason(tmp_path / "b.onnx", "bart", opt_level=1)
    assert told.cause == "extra_node"
    assert told.attempt.found[0].operator == "Cast"
    assert "take --opt-level 0" in told.message
    assert told.actual.nodes[-1].name == "n_context"
    assert "Cast" not in reason(tmp_path / "b.onnx", "bart").actual.operators


def test_heads_that_were_not_given(tmp_path):
    """Where its own reading of the graph fails, as where the number of heads is -1."""
    path = write(tmp_path / "a.onnx", BERT, half=np.array(2, np.float32))
    assert explain(path, "bert", **options()).sites[0].fused
    text = BERT.replace("Reshape (q1, heads)", "Reshape (q1, inferred)")
    arrays = {"half": np.array(2, np.float32), "inferred": np.array([0, 0, -1, 4])}
    path = write(tmp_path / "a.onnx", text, **arrays)
    told = reason(path, num_heads=0, hidden_size=0)
    assert told.cause == "heads"
    advice = "2 heads of width 4, and none were given: --num-heads 2 --hidden-size 8"
    assert told.message == f"the graph has {advice}"


def test_heads_are_told_before(tmp_path, caplog):
    """If they are missing, or others than the graph has."""
    path = write(tmp_path / "a.onnx")
    with caplog.at_level("INFO", "helpers"):
        explain(path, "bert", opt_level=0)
        explain(path, "bert", **options(num_heads=4))
        explain(path, "bert", **options())
    missing, other = caplog.messages
    assert missing.endswith("; the graph has --num-heads 2 --hidden-size 8")
    assert other == "--num-heads 4 --hidden-size 8: the graph has --num-heads 2 --hidden-size 8"


# How queries come about of x (batch, length, 8), two heads of width 4.
LAST = "{} q = Transpose <perm = [0, 2, 1, 3]> (q2)"
WAYS_TO_HEADS = {
    "packed by heads": LAST.format("""a0 = MatMul (x, wqkv) a1 = Reshape (a0, by_heads)
        q2 = Gather <axis = 3> (a1, zero)"""),
    "packed in a head": LAST.format("""a0 = MatMul (x, wqkv) a1 = Reshape (a0, in_a_head)
        q2, ak, av = Split <axis = -1> (a1, thirds)"""),
    "cut out of a head": LAST.format("""a0 = MatMul (x, wqkv) a1 = Reshape (a0, in_a_head)
        q2 = Slice (a1, from, to, last)"""),
    "heads that are left over": LAST.format("q0 = MatMul (x, wq) q2 = Reshape (q0, left_over)"),
    "a width that is left over": LAST.format("q0 = MatMul (x, wq) q2 = Reshape (q0, width_left)"),
    "scaled by a Constant": """q0 = MatMul (x, wq) q1 = Reshape (q0, heads)
        qt = Transpose <perm = [0, 2, 1, 3]> (q1) c = Constant <value_float = 0.5> ()
        q = Mul (c, qt)""",
    "heads in the batch": """q0 = MatMul (x, wq) qt = Transpose <perm = [1, 0, 2]> (q0)
        q2 = Reshape (qt, merged) q = Transpose <perm = [1, 0, 2]> (q2)""",
    "rotated": LAST.format("""q0 = MatMul (x, wq) q1 = Reshape (q0, heads)
        qc = Mul (q1, half) qa, qb = Split <axis = -1> (q1, halves) qn = Neg (qb)
        qr = Concat <axis = -1> (qn, qa) qs = Mul (qr, half) q2 = Add (qc, qs)"""),
}


@pytest.mark.parametrize("way", WAYS_TO_HEADS)
def test_how_many_heads_there_are(tmp_path, way):
    start, end = ATTENTION.index("[n_q]"), ATTENTION.index("[n_k]")
    wanted = {
        **{"by_heads": [0, 0, 2, 3, 4], "in_a_head": [0, 0, 2, 12], "thirds": [4, 4, 4]},
        **{"halves": [2, 2], "from": [0], "to": [4], "last": [-1], "left_over": [0, 0, -1, 4]},
        **{"width_left": [0, 0, 2, -1], "merged": [0, -1, 4]},
        "zero": 0,
    }
    arrays = {name: np.array(sizes) for name, sizes in wanted.items()}
    wqkv = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
    text = ATTENTION[:start] + WAYS_TO_HEADS[way] + ATTENTION[end:]
    model = graph.load(write(tmp_path / "a.onnx", text, wqkv=wqkv, **arrays))
    [site] = graph.sites(model)
    assert head_sizes.heads(site) == (2, 4)


def test_heads_of_an_einsum(tmp_path):
    text = ATTENTION.replace("q = Transpose <perm = [0, 2, 1, 3]> (q2)", "q = Identity (q2)")
    way = 'Einsum <equation = "bqhd,bhdk->bhqk"> (q, k)'
    path = write(tmp_path / "a.onnx", text.replace("MatMul (q, k)", way))
    assert head_sizes.heads(graph.sites(graph.load(path))[0]) == (2, 4)


ROTATED = """[n_turn] qa, qb = Split <axis = -1> (qs, pairs) qn = Neg (qb)
    qr = Concat <axis = -1> (qn, qa) [n_cos] qc = Mul (qs, half) [n_sin] qt = Mul (qr, half)
    [n_rotated] q = Add (qc, qt)"""


@pytest.mark.parametrize("between", ["[n_scaled] q = Mul (qs, half)", ROTATED])
def test_what_is_between_projection_and_product(tmp_path, between):
    """Not "operands in another order", though the keys' Transpose is at the other input."""
    text = BERT.replace("[n_q_transpose] q =", "[n_q_transpose] qs =")
    text = text.replace("[n_scores]", f"{between} [n_scores]")
    told = reason(write(tmp_path / "a.onnx", text, pairs=np.array([2, 2])))
    assert (told.cause, told.attempt.at.name) == ("extra_node", "n_scores")
    assert (told.message is not None) == (between is ROTATED)
    assert told.message is None or "(rotary embeddings)" in told.message


RAISES = """
from fusion_base import Fusion


class Raises(Fusion):
    def __init__(self, model):
        super().__init__(model, "Attention", "Softmax")

    def fuse(self, node, input_name_to_nodes, output_name_to_node):
        return {}[node.input[0]]
"""


def test_a_branch_on_which_the_optimizer_fails(tmp_path):
    path = write(tmp_path / "a.onnx")
    (tmp_path / "own.py").write_text(RAISES)
    own = {"fusion": f"{tmp_path}/own.py:Raises"}
    assert valid(explain(path, **own, **options())).reasons[0].cause == "raised"
    onnx.save(in_branch(onnx.load(path)), path)
    (told,) = valid(explain(path, **own, **options())).reasons
    assert (told.kind, told.cause) == ("raised", "branch")
    assert told.message.startswith("the site is in a branch of If n_if; ")


# Two forms of what a sum adds: by the input that it has in the graph, with a Reshape more; and as
# the graph has it, by the other input.
ORDERS = """
from fusion_base import Fusion


class Orders(Fusion):
    def __init__(self, model):
        super().__init__(model, "Attention", "SkipLayerNormalization")

    def fuse(self, node, input_name_to_nodes, output_name_to_node):
        nodes = self.model.match_parent_path(
            node, ["Add", "MatMul", "Reshape", "Transpose", "Reshape", "MatMul"],
            [0, None, None, 0, 0, 0],
        )
        if nodes is None:
            nodes = self.model.match_parent_path(
                node, ["Add", "MatMul", "Reshape", "Transpose", "MatMul"], [1, None, 0, 0, 0]
            )
            if nodes is None:
                return
"""


def test_operands_in_another_order_are_nearer_than_a_node_less(tmp_path):
    (tmp_path / "own.py").write_text(ORDERS)
    path = write(tmp_path / "a.onnx", ATTENTION.replace("Add (x, o1)", "Add (o1, x)"))
    (told,) = valid(explain(path, fusion=f"{tmp_path}/own.py:Orders", **options())).reasons
    assert (told.cause, told.attempt.expected[0]) == ("operand_order", "Add")
    assert (told.attempt.matched, told.attempt.inputs) == ([], [1, None, 0, 0, 0])
    assert told.actual.operators == ["Add", "MatMul", "Reshape", "Transpose", "MatMul"]
    assert told.actual.inputs[0] == 0


SCORES = "[n_scale] s1 = Mul (s0, half)"
FORMS = {
    "softcap": (SCORES, "[n_tanh] t = Tanh (s0) [n_scale] s1 = Mul (t, half)"),
    "a learned bias": (SCORES, "[n_scale] s1 = Add (s0, table)"),
    "a learned scale": (SCORES, "[n_scale] s1 = Mul (s0, scales)"),
    "its products are Einsum": (
        "[n_scores] s0 = MatMul (q, k)",
        '[n_scores] s0 = Einsum <equation = "bnid,bndj->bnij"> (q, k)',
    ),
    "cosine attention": (
        "[n_scores] s0 = MatMul (q, k)",
        "[n_norm_q] lq = ReduceL2 <axes = [-1]> (q) [n_divided] dq = Div (q, lq)"
        "[n_scores] s0 = MatMul (dq, k)",
    ),
    "windows": (
        "[n_merge] c1 = Transpose <perm = [0, 2, 1, 3]> (c0)",
        "[n_cut] w0 = Reshape (c0, six) [n_moved] w1 = Transpose <perm = [0, 1, 3, 2, 4, 5]> (w0)"
        "[n_back] w2 = Reshape (w1, four) [n_merge] c1 = Transpose <perm = [0, 2, 1, 3]> (w2)",
    ),
}


FOREIGN = "[n_f1] f1 = Neg (c1) [n_f2] f2 = Abs (f1) [n_f3] f3 = Relu (f2)"


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_named(tmp_path, form):
    """And only that form: what few fusions know, and which operator can express it."""
    text = ATTENTION.replace("float[batch,length,8]", "float[2,6,8]").replace(*FORMS[form])
    # What a pattern asks for after the site, it does not find in few steps.
    text = text.replace("[n_flat] c2 = Reshape (c1", f"{FOREIGN} [n_flat] c2 = Reshape (f3")
    arrays = {"table": np.ones((1, 2, 6, 6)), "scales": np.array([2.0, 3.0]).reshape(2, 1, 1)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays |= {"six": np.array([2, 2, 2, 3, 2, 2]), "four": np.array([2, 2, 6, 4])}
    told = reason(write(tmp_path / "a.onnx", text, **arrays), "bart")
    assert told.cause == "unsupported_form"
    assert form in told.message
    assert sum(other in told.message for other in FORMS) == 1


def test_what_stands_in_the_way_of_an_operator(tmp_path):
    """An Attention of the standard that ONNX Runtime refuses: a site that is fused, with a note."""
    path = tmp_path / "a.onnx"
    onnx.save(onnx.parser.parse_model(MASKED), path)
    found = valid(explain(path, "bert", opt_level=0))
    assert [site.fused for site in found.sites] == [True]
    (note,) = found.notes
    assert "on no input with more than one query: Attention y has a mask with one row" in note
    assert f"note: {note}" in str(found)


# ── Methods that make attentions ────────────────────────────────────────────────────────────────


def test_a_method_of_the_optimizer(tmp_path):
    told = reason(write(tmp_path / "a.onnx"), "bert_tf")
    assert told.fusion == "BertOnnxModelTF.fuse_attention"
    assert (told.file, told.kind, told.source) == ("onnx_model_bert_tf.py", "path", "continue")
    assert told.none == ["qkv_nodes"]
    assert told.anchor.operator == "SkipLayerNormalization"


OWN = """
from onnx import helper
from onnxruntime.transformers.optimizer import MODEL_TYPES

Bert = MODEL_TYPES["bert"][0]


class Loop(Bert):
    def fuse_attention(self):
        for kind in ("Softmax", "Gelu"):
            for softmax in self.get_nodes_by_op_type(kind):
                for index in (0, 1):
                    scaled = self.match_parent_path(softmax, ["Div", "MatMul"], [index, 0])
                    if scaled is not None:
                        break
                if scaled is None:
                    continue
                self.add_node(helper.make_node("Attention", [], [], domain="com.microsoft"))


class Called(Bert):
    def fuse_attention(self):
        for softmax in self.get_nodes_by_op_type("Softmax"):
            self.fuse_one(softmax)

    def fuse_one(self, softmax):
        scaled = self.match_parent_path(softmax, ["Div", "MatMul"], [0, 0])
        if scaled is None:
            return
        self.create_attention_node(scaled)


class Silent(Bert):
    def fuse_attention(self):
        for softmax in self.get_nodes_by_op_type("Softmax"):
            if self.get_parent(softmax, 0).op_type == "Div":
                self.create_attention_node(softmax)
"""


@pytest.mark.parametrize(("name", "method"), [("Loop", "fuse_attention"), ("Called", "fuse_one")])
def test_a_method_of_ones_own(tmp_path, name, method):
    (tmp_path / "own.py").write_text(OWN)
    found = explain(write(tmp_path / "a.onnx"), fusion=f"{tmp_path}/own.py:{name}", **options())
    (told,) = valid(found).reasons
    assert (told.fusion, told.file) == (f"{name}.{method}", "own.py")
    assert told.none == ["scaled"]
    assert [node.name for node in told.attempt.found] == ["n_scale"]
    assert found.watched == {f"{name}.{method}": []}  # what it starts from is not in its own text


def test_a_method_that_cannot_be_followed_is_named(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    found = explain(write(tmp_path / "a.onnx"), fusion=f"{tmp_path}/own.py:Silent", **options())
    (told,) = valid(found).reasons
    assert "Silent.fuse_attention makes attentions without asking for paths" in told.message


BERTS = {"FusionAttention", "FusionQOrderedAttention"}
GPTS = {"FusionGptAttentionNoPast", "FusionRotaryAttention"}
WATCHED = dict.fromkeys(("bert", "gpt_neox", "swin", "vit"), BERTS)
WATCHED |= dict.fromkeys(("gpt2", "gpt2_tf", "qwen3"), GPTS)
WATCHED |= {
    "bart": {"FusionBartAttention"},
    "bert_keras": {"BertOnnxModelKeras.fuse_attention"},
    "bert_tf": {"BertOnnxModelTF.fuse_attention"},
    "clip": {"FusionAttentionClip"},
    "conformer": {"FusionConformerAttention"},
    "mmdit": {"FusionMultiHeadAttentionDiT", "FusionMultiHeadAttentionMMDit"},
    "phi": set(),  # its own code fails before it comes to a fusion
    "sam2": {"FusionMultiHeadAttentionSam2"},
    "t5": {"FusionT5Attention"},
    "tnlr": {"FusionTnlrAttention"},
    "unet": {"FusionAttentionUnet"},
    "vae": {"FusionAttentionVae"},
}


@pytest.mark.parametrize("model_type", sorted(parts.optimizers()))
def test_each_model_type_is_watched(tmp_path, model_type):
    """What is applied to a graph with one attention, whatever becomes of it."""
    found = valid(explain(write(tmp_path / "a.onnx"), model_type, **options()))
    assert {*found.watched} == WATCHED[model_type]
    if not found.watched:
        assert [told.kind for told in found.reasons] == ["raised"]
