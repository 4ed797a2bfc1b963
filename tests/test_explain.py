"""`explain`: what a fusion asked for, where it broke, what is there."""

import re
import sys

import pytest
from graphs import ATTENTION, write

from helpers import files
from helpers.explain import explain


def attention(tmp_path, text: str = ATTENTION):
    return write(tmp_path / "a.onnx", text)


def options(**changed):
    return {"num_heads": 2, "hidden_size": 8, "opt_level": 0} | changed


def test_a_scale_that_bart_does_not_expect(tmp_path):
    """Eager attention of today scales the scores; FusionBartAttention wants Softmax ← MatMul."""
    found = explain(attention(tmp_path), "bart", **options())
    assert [(site.name, site.fused, site.reason) for site in found.sites] == [
        ("n_softmax", False, 0)
    ]
    (reason,) = found.reasons
    assert (reason.fusion, reason.file) == ("FusionBartAttention", "fusion_bart_attention.py")
    assert (reason.kind, reason.cause, reason.source) == ("path", "extra_node", "return")
    assert reason.anchor.operator == "SkipLayerNormalization"
    assert reason.none == [
        *("qk_nodes_no_mask", "qk_nodes_with_mask"),
        *("qk_nodes_sdpa_no_mask", "qk_nodes_sdpa_with_mask"),
    ]
    broken = reason.attempt
    assert broken.expected == ["Softmax", "MatMul"]
    assert (broken.at.name, [one.name for one in broken.found]) == ("n_softmax", ["n_scale"])
    assert reason.actual == (["Softmax", "Mul", "MatMul"], [0, 0, 0])
    assert "n_scale" in str(found)
    assert found.table()["variable"].iloc[0] == reason.none[0]
    assert set(reason.none) <= set(found.table()["variable"])


def test_a_node_between_the_anchor_and_the_products(tmp_path):
    """The first path of all breaks, and the reason is in the variable that the code tests."""
    text = ATTENTION.replace(
        "[n_flat] c2 = Reshape (c1, flat)",
        "[n_foreign] c3 = Identity (c1) [n_cast] c4 = Neg (c3) [n_flat] c2 = Reshape (c4, flat)",
    )
    (reason,) = explain(attention(tmp_path, text), "bart", **options()).reasons
    assert reason.none == ["qkv_nodes", "qkv_nodes_with_residual"]
    assert reason.attempt.at.name == "n_flat"
    assert [one.name for one in reason.attempt.found] == ["n_cast"]
    assert reason.actual[0][:4] == ["Add", "MatMul", "Reshape", "Neg"]


def test_same_reason_of_several_layers_is_one(tmp_path):
    start, end = ATTENTION.index("{"), ATTENTION.rindex("}")
    names = r"\b(q0|q1|q2|q|k0|k1|k|v0|v1|v2|v|s0|s1|p|c0|c1|c2|o0|o1|r|y)\b"
    second = re.sub(names, r"\1_", ATTENTION[start + 1 : end]).replace("[n_", "[m_")
    second = re.sub(r".*m_first.*", "", second)
    second = re.sub(r"\bx\b", "y", second)
    text = ATTENTION[:start].replace("8] y)", "8] y_)") + ATTENTION[start:end] + second + "}"
    found = explain(attention(tmp_path, text), "bart", **options())
    assert [site.name for site in found.sites] == ["n_softmax", "m_softmax"]
    assert [reason.sites for reason in found.reasons] == [[0, 1]]
    assert str(found).startswith("BartOnnxModel: 2 sites, 0 fused, 1 reason\n")


def test_no_anchor_after_a_site(tmp_path):
    text = ATTENTION.replace("[n_norm] y = LayerNormalization <axis = -1> (r, gamma, beta)", "")
    text = text.replace("r = Add", "y = Add")
    (reason,) = explain(attention(tmp_path, text), "bart", **options()).reasons
    assert (reason.kind, reason.cause, reason.anchor) == ("none", "missing_anchor", None)
    assert "it starts from LayerNormalization or SkipLayerNormalization" in reason.message


def test_an_anchor_that_an_earlier_fusion_did_not_make(tmp_path):
    """CLIP's fusion starts from SkipLayerNormalization alone."""
    text = ATTENTION.replace("[n_norm]", "[n_foreign] f = Neg (r) [n_norm]").replace(
        "<axis = -1> (r, gamma", "<axis = -1> (f, gamma"
    )
    (reason,) = explain(attention(tmp_path, text), "clip", **options()).reasons
    assert (reason.cause, reason.fusion) == ("missing_anchor", "FusionAttentionClip")
    assert reason.earlier.fusion == "FusionSkipLayerNormalization"
    assert "Neg n_foreign" in reason.check.operands["add"]
    assert "FusionSkipLayerNormalization did not fire at LayerNormalization n_norm" in str(reason)


def test_bad_options_are_bad_input(tmp_path):
    path = attention(tmp_path)
    with pytest.raises(files.BadInput, match="model type brat: expected one of bart, bert"):
        explain(path, "brat")
    with pytest.raises(files.BadInput, match="hidden size 8: expected a multiple of the 3 heads"):
        explain(path, "bart", **options(num_heads=3))


def test_what_the_optimizer_raises_is_a_reason(tmp_path):
    """LayerNormalization's bias is optional, and the stock fusions read it all the same."""
    text = ATTENTION.replace("(r, gamma, beta)", "(r, gamma)")
    before = sys.gettrace()
    (reason,) = explain(attention(tmp_path, text), "bart", **options()).reasons
    assert (reason.kind, reason.cause) == ("raised", "raised")
    assert reason.message.startswith("IndexError")
    assert reason.file == "fusion_skiplayernorm.py"
    assert reason.anchor.name == "n_norm"
    assert "LayerNormalization n_norm (r, gamma)" in str(reason)
    assert sys.gettrace() is before
