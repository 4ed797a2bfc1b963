"""What a reader's own fusion makes: compared by default, written if it holds, at an opset that has
what it makes."""

import numpy as np
import onnx
import pytest
from graphs import ATTENTION, write
from test_explain import options, valid

from helpers import files
from helpers.__main__ import main
from helpers.explain import explain

# Softmax(Mul(q·kᵀ, 0.5))·v of `graphs.ATTENTION` as the Attention of opset 23.
RULE = """
from onnxscript import rewriter


class {name}(rewriter.pattern.RewriteRuleClassBase):
    def pattern(self, op, query, turned, value, scale):
        weights = op.Softmax(op.Mul(op.MatMul(query, turned), scale), axis=-1)
        return op.MatMul(weights, value)

    def rewrite(self, op, query, turned, value, scale):
        key = op.Transpose(turned, perm=[0, 1, 3, 2])
        return op.Attention(query, key, value, scale={scale})
"""

# Softmax(Mul(Mul(q, 0.5)·kᵀ, 1))·v, of which the queries have to have four axes.
SWAPPED = """

class Swapped(rewriter.pattern.RewriteRuleClassBase):
    def pattern(self, op, query, scale, turned, value, one):
        scores = op.MatMul(op.Mul(query, scale), turned)
        return op.MatMul(op.Softmax(op.Mul(scores, one), axis=-1), value)

    def check(self, context, query, **_):
        if query.shape is None or len(query.shape) != 4:
            return rewriter.MatchResult().fail("query: expected 4 axes")
        return True

    def rewrite(self, op, query, scale, turned, value, one):
        return op.Identity(value)
"""


@pytest.fixture
def rule(tmp_path):
    """A right rule, and one whose scale is wrong."""
    text = RULE.format(name="Right", scale=0.5) + RULE.format(name="Wrong", scale=0.75)
    (tmp_path / "own.py").write_text(text)
    return f"{tmp_path}/own.py"


def test_rules_of_ones_own_are_compared(tmp_path, rule):
    """The file has opset 17, which has no Attention: it is brought to 23, and that is said."""
    path = write(tmp_path / "a.onnx")
    found = valid(explain(path, rules=f"{rule}:Right"))
    assert [(site.fused, site.wrong) for site in found.sites] == [(True, False)]
    assert found.parity.held
    assert found.notes == ["brought from opset 17 to 23 first: what the fusion makes needs that"]
    assert explain(path, rules=f"{rule}:Right", parity=False).parity is None
    wrong = valid(explain(path, rules=f"{rule}:Wrong"))
    assert [(site.fused, site.wrong) for site in wrong.sites] == [(True, True)]
    assert (wrong.parity.held, wrong.failed) == (False, True)
    assert wrong.sites[0].wanted == [
        "Attention, scale: the original multiplies q·kᵀ by 0.5, the operator by 0.75"
    ]
    lines = str(wrong).splitlines()
    assert lines[2:4] == ["1 site fused wrong: n_softmax", f"   {wrong.sites[0].wanted[0]}"]


def test_what_the_later_opset_has_no_kernel_for(tmp_path, rule):
    """ONNX Runtime runs RandomUniformLike of opset 17, and none of opset 22; no site is wrong."""
    text = ATTENTION.replace("8] y)", "8] y, float[batch,length,8] z)").replace(
        "[n_norm]", "[n_random] z = RandomUniformLike (r) [n_norm]"
    )
    path = write(tmp_path / "a.onnx", text)
    found = valid(explain(path, rules=f"{rule}:Right"))
    assert [(site.fused, site.wrong) for site in found.sites] == [(True, False)]
    assert found.parity is None
    assert found.not_compared.startswith(f"{path}: expected a model that ONNX Runtime ")
    assert found.not_compared.endswith(
        "found RandomUniformLike (n_random), for which it has no kernel from opset 22 on; export it"
        " at a lower one"
    )


def test_a_constant_in_place_of_the_other_operand(tmp_path):
    """A pattern takes either for its parameters: a check that refuses them tells what reads it."""
    (tmp_path / "own.py").write_text(RULE.format(name="Own", scale=0.5) + SWAPPED)
    text = ATTENTION.replace("[n_q_transpose] q =", "[n_q_transpose] q3 =").replace(
        "[n_scores]", "[n_q_scale] q = Mul (half, q3) [n_scores]"
    )
    path = write(tmp_path / "a.onnx", text.replace("Mul (s0, half)", "Mul (s0, one)"),
                 one=np.array(1, np.float32))  # fmt: skip
    (told,) = valid(explain(path, rules=f"{tmp_path}/own.py:Swapped")).reasons
    assert told.check.operands["query"].endswith("value 0.5, read by Mul n_q_scale")


def test_stock_fusions_are_compared_if_asked(tmp_path):
    path = write(tmp_path / "a.onnx")
    assert explain(path, "bart", **options()).parity is None
    assert explain(path, rules="onnxscript").parity is None
    assert explain(path, "bart", **options(), parity=True).parity.held


def test_what_no_run_gets_past_is_noted(tmp_path):
    """A mask with one row, whose sizes shape inference alone knows."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[b,2,l,4] q, bool[b,l] kept) => (float[b,2,l,4] y) <int64[2] at = {1, 2}>
    {
      mask = Unsqueeze (kept, at)
      [a] y = Attention (q, q, q, mask)
    }"""
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    [note] = explain(path, rules="onnxscript").notes
    assert "Attention a has a mask with one row" in note


def test_what_holds_is_written(tmp_path, rule, capsys):
    path, out = write(tmp_path / "a.onnx"), tmp_path / "out.onnx"
    assert main(["explain", str(path), "--rules", f"{rule}:Wrong", "--write", str(out)]) == 1
    assert "NOT HELD" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} - {"__pycache__"} == {"a.onnx", "own.py"}
    assert main(["explain", str(path), "--rules", f"{rule}:Right", "--write", str(out)]) == 0
    assert f"{out}: written" in capsys.readouterr().out
    made = onnx.load(out)
    assert [node.op_type for node in made.graph.node].count("Attention") == 1
    assert files.check(out)


def test_what_a_stock_fusion_makes_is_written(tmp_path):
    text = ATTENTION.replace("Softmax <axis = -1> (s1)", "Softmax <axis = -1> (s0)")
    path = write(tmp_path / "a.onnx", text.replace(f"[n_scale] {'s1 = Mul (s0, half)'}", ""))
    found = explain(path, "bart", **options(), write=tmp_path / "out.onnx")
    assert (found.parity.held, found.written) == (True, str(tmp_path / "out.onnx"))
    assert len(onnx.load(tmp_path / "out.onnx").graph.node) < len(onnx.load(path).graph.node)


def test_bad_places_to_write_to(tmp_path, rule):
    path = write(tmp_path / "a.onnx")
    own = {"rules": f"{rule}:Right"}
    with pytest.raises(files.BadInput, match="expected another file than the input"):
        explain(path, **own, write=path)
    with pytest.raises(files.BadInput, match="leave out --no-parity"):
        explain(path, **own, write=tmp_path / "b.onnx", parity=False)


def test_reasons_are_told_where_parity_is_not(tmp_path, rule, capsys):
    """No inputs can be inferred, so that nothing is compared: a line after the reasons."""
    text = ATTENTION.replace("8] given)", "8] given, int64[batch,k] which)")
    text = text.replace("=> (float[batch,length", "=> (float[batch,k")
    text = text.replace("[n_norm] y =", "[n_norm] y0 =").replace(
        "\n}",
        "\n [n_chosen] y1 = Gather <axis = 1> (y0, which)"
        " [n_sum] y = ReduceSum <keepdims = 0> (y1, axes)\n}",
    )
    path = write(tmp_path / "a.onnx", text, axes=np.array([1]))
    found = valid(explain(path, "bart", **options(), parity=True))
    assert len(found.reasons) == 1
    assert "found which int64 (batch, k); give --inputs" in found.not_compared
    assert str(found).splitlines()[-1] == f"parity could not be told: {found.not_compared}"
    assert not found.failed  # for nothing was fused
    assert explain(path, rules=f"{rule}:Right").failed
    out = tmp_path / "out.onnx"
    assert main(["explain", str(path), "--rules", f"{rule}:Right", "--write", str(out)]) == 1
    assert not out.exists()
