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
    assert [site.name for site in found.sites] == ["n_softmax"]
    (reason,) = found.reasons
    call = reason.call
    assert (call.fusion, call.file) == ("FusionBartAttention", "fusion_bart_attention.py")
    assert call.source == "return"
    assert call.anchor.operator == "SkipLayerNormalization"
    assert set(call.none) == {
        *("qk_nodes_no_mask", "qk_nodes_with_mask"),
        *("qk_nodes_sdpa_no_mask", "qk_nodes_sdpa_with_mask"),
    }
    broken = call.culprit
    assert broken.expected == ["Softmax", "MatMul"]
    assert (broken.at.name, broken.found.name) == ("n_softmax", "n_scale")
    assert call.actual == (["Softmax", "Mul", "MatMul"], [0, 0, 0])
    assert "n_scale" in str(found)
    assert "n_softmax" in str(found)
    assert list(found.table()["variable"])[-4:] == call.none


def test_a_node_between_the_anchor_and_the_products(tmp_path):
    """The first path of all breaks, and the reason is in the variable that the code tests."""
    text = ATTENTION.replace(
        "[n_flat] c2 = Reshape (c1, flat)",
        "[n_foreign] c3 = Identity (c1) [n_cast] c4 = Neg (c3) [n_flat] c2 = Reshape (c4, flat)",
    )
    (reason,) = explain(attention(tmp_path, text), "bart", **options()).reasons
    assert reason.call.none == ["qkv_nodes", "qkv_nodes_with_residual"]
    assert reason.call.culprit.at.name == "n_flat"
    assert reason.call.culprit.found.name == "n_cast"
    assert reason.call.actual[0][:4] == ["Add", "MatMul", "Reshape", "Neg"]


def test_same_reason_of_several_layers_is_one(tmp_path):
    start, end = ATTENTION.index("{"), ATTENTION.rindex("}")
    names = r"\b(q0|q1|q2|q|k0|k1|k|v0|v1|v2|v|s0|s1|p|c0|c1|c2|o0|o1|r|y)\b"
    second = re.sub(names, r"\1_", ATTENTION[start + 1 : end]).replace("[n_", "[m_")
    second = re.sub(r".*m_first.*", "", second)
    second = re.sub(r"\bx\b", "y", second)
    text = ATTENTION[:start].replace("8] y)", "8] y_)") + ATTENTION[start:end] + second + "}"
    found = explain(attention(tmp_path, text), "bart", **options())
    assert [site.name for site in found.sites] == ["n_softmax", "m_softmax"]
    assert [len(reason.sites) for reason in found.reasons] == [2]


def test_no_anchor_after_a_site(tmp_path):
    text = ATTENTION.replace("[n_norm] y = LayerNormalization <axis = -1> (r, gamma, beta)", "")
    text = text.replace("r = Add", "y = Add")
    (reason,) = explain(attention(tmp_path, text), "bart", **options()).reasons
    assert reason.call is None
    assert "no anchor" in str(reason)


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
    assert "IndexError" in reason.error
    assert "fusion_skiplayernorm.py" in str(reason)
    assert sys.gettrace() is before
