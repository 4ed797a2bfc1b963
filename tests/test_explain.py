"""`explain`: what a fusion asked for, where it broke, what is there."""

import json
import re
import sys
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from graphs import ATTENTION, write
from onnxruntime.quantization import quantize_dynamic

from helpers import files, graph
from helpers.explain import explain, what_if
from helpers.files import saving
from helpers.graph import reading

SCHEMA = json.loads((Path(__file__).parent / "explain.schema.json").read_text())


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
    assert reason.actual.operators == ["Softmax", "Mul", "MatMul"]
    assert reason.actual.inputs == [0, 0, 0]
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
    assert reason.actual.operators[:4] == ["Add", "MatMul", "Reshape", "Neg"]


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
    assert (reason.kind, reason.cause, reason.anchor) == ("check", "missing_anchor", None)
    assert "it starts from LayerNormalization or SkipLayerNormalization" in reason.message
    assert reason.check.operands["after the site"].endswith("Add n_residual")


def test_a_normalisation_that_is_not_there(tmp_path):
    """The next one is behind the feed-forward part, and not the attention's."""
    text = ATTENTION.replace(
        "[n_norm] y = LayerNormalization <axis = -1> (r, gamma, beta)",
        """[n_up] u = MatMul (r, wq) [n_act] a = Relu (u) [n_down] d = MatMul (a, wk)
        [n_sum] s = Add (r, d) [n_next] y = LayerNormalization <axis = -1> (s, gamma, beta)""",
    )
    (reason,) = explain(attention(tmp_path, text), "bart", **options()).reasons
    assert reason.cause == "missing_anchor"
    assert "Add n_residual, MatMul n_up" in reason.check.operands["after the site"]


def test_an_input_that_the_optimizer_drops(tmp_path):
    """Where a scale that the fusion does not read is an input, the result has one less."""
    text = ATTENTION.replace("Add (bq, q0)", "Add (q0, bq)").replace(
        "[n_k_heads] k1 = Reshape (k0, heads)",
        "[n_kb] kb = Add (k0, bv) [n_k_heads] k1 = Reshape (kb, heads)",
    )
    text = text.replace("Mul (s0, half)", "Div (s0, root)").replace(
        "8] given) =>", "8] given, float root) =>"
    )
    found = explain(attention(tmp_path, text), "bert", **options(), parity=True)
    assert [(site.fused, site.wrong) for site in found.sites] == [(True, True)]


def test_an_anchor_that_an_earlier_fusion_did_not_make(tmp_path):
    """CLIP's fusion starts from SkipLayerNormalization alone."""
    text = ATTENTION.replace("[n_norm]", "[n_foreign] f = Neg (r) [n_norm]").replace(
        "<axis = -1> (r, gamma", "<axis = -1> (f, gamma"
    )
    (reason,) = explain(attention(tmp_path, text), "clip", **options()).reasons
    assert (reason.cause, reason.fusion) == ("missing_anchor", "FusionAttentionClip")
    assert reason.earlier.fusion == "FusionSkipLayerNormalization"
    assert "Neg n_foreign" in reason.check.operands["add"]
    assert "FusionSkipLayerNormalization did not fire at the LayerNormalization" in str(reason)


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


# ── A reader's own fusion ───────────────────────────────────────────────────────────────────────

OWN = """
from onnxruntime.transformers.optimizer import MODEL_TYPES
from fusion_base import Fusion

Bart = MODEL_TYPES["bart"][0]


class Scaled(Fusion):
    def __init__(self, model):
        super().__init__(model, "Attention", "Softmax")

    def fuse(self, node, input_name_to_nodes, output_name_to_node):
        scaled = self.model.match_parent_path(node, ["Div", "MatMul"], [0, 0])
        if scaled is None:
            return


class Model(Bart):
    def fuse_attention(self):
        Scaled(self).apply()


class Raises(Scaled):
    def fuse(self, node, input_name_to_nodes, output_name_to_node):
        return node.input[7]


class Twice(Bart):
    def fuse_attention(self):
        self.add_node(self.nodes()[-1])


NUMBER = 7
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


@pytest.mark.parametrize("name", ["Scaled", "Model"])
def test_a_fusion_of_ones_own(tmp_path, own, name):
    from onnxruntime.transformers import optimizer

    known = dict(optimizer.MODEL_TYPES)
    found = explain(attention(tmp_path), fusion=f"{own}:{name}", **options())
    (reason,) = found.reasons
    assert (found.optimizer, reason.fusion, reason.file) == (name, "Scaled", "own.py")
    assert (reason.kind, reason.none) == ("path", ["scaled"])
    assert [one.name for one in reason.attempt.found] == ["n_scale"]
    assert reason.actual.operators == ["Mul", "MatMul"]
    assert known == optimizer.MODEL_TYPES


def test_a_fusion_of_ones_own_that_raises(tmp_path, own):
    (reason,) = explain(attention(tmp_path), fusion=f"{own}:Raises", **options()).reasons
    assert (reason.kind, reason.fusion, reason.file) == ("raised", "Raises", "own.py")
    assert reason.source == "return node.input[7]"
    assert reason.message.startswith("IndexError")


def test_an_optimizer_that_makes_no_valid_graph(tmp_path, own):
    """As some do of BART's decoder: an output that two nodes declare."""
    found = explain(attention(tmp_path), fusion=f"{own}:Twice", **options(), parity=True)
    assert not any(site.fused for site in found.sites)
    (reason,) = found.reasons
    assert (reason.kind, reason.cause) == ("raised", "raised")
    assert reason.message.startswith("what it made is no valid graph: Output '")
    assert found.parity is None


def test_a_fusion_without_source_is_explained_by_its_paths(tmp_path):
    names = {}
    exec(OWN.replace("match_parent_path(node", "match_parent_path( node"), names)
    (reason,) = explain(attention(tmp_path), fusion=names["Scaled"], **options()).reasons
    assert [one.name for one in reason.attempt.found] == ["n_scale"]


MATCH = 'self.model.match_parent_path(node, ["Div", "MatMul"], [0, 0])'
ASK = (
    "def ask(start, path):\n    return start and self.model.match_parent_path(start, path, [0, 0])"
)

STYLES = {
    "walrus": f"if (found := {MATCH}) is None: return",
    "in the condition": f"if {MATCH} is None: return",
    "not": f"if not {MATCH}: return",
    "one step": "if self.model.match_parent(node, 'Div', 0) is None:\n    return",
    "attribute": f"self.found = {MATCH}\nif self.found is None:\n    return",
    "nested": f"found = {MATCH}\nif found is not None:\n    if len(found) == 2: self.done()",
    "loop": f"for _ in '12':\n    found = {MATCH}\n    if found:\n        break\nelse:\n    return",
    "list": f"found = [{MATCH} for _ in '12']\nif any(one is None for one in found):\n    return",
    "dict": f"found = {{one: {MATCH} for one in 'ab'}}\nif None in found.values():\n    return",
    "kept in a list": f"found = []\nfound.append({MATCH})\nif found[0] is None:\n    return",
    "flag": f"ok = True\nif {MATCH} is None:\n    ok = False\nif not ok:\n    return",
    "function": f"def ask():\n    return {MATCH}\nfound = ask()\nif not found:\n    return",
    "method": "found = self.ask(node)\nif found is None:\n    return",
    "passed on": "self.ask(node)",
    "paths": "_, found, _ = self.model.match_parent_paths(node, [(['Div'], [0])], parents)\n"
    "if found is None:\n    return",
    "word at the end": f"found = {MATCH}\nif found:\n    self.done()\nelse:\n    print('no')",
    "tried before": f"found = {MATCH}\nif found is not None:\n    self.done()\nelse:\n"
    "    other = self.model.match_parent_path(node, ['Sub', 'Sub', 'MatMul'], [0, 0, 0])\n"
    "    if other is None:\n        return",
    "try": f"try:\n    a, b = {MATCH}\nexcept TypeError:\n    return",
    "of nothing": f"{ASK}\nfound = ask(node, ['Div', 'MatMul'])\n"
    "a, b = ask(found, ['Add']), ask(found, ['Sub'])\nif a and b:\n    self.done()",
    "two in a line": f"{ASK}\na, b = ask(node, ['Div', 'MatMul']), ask(None, ['Sub'])\n"
    "if a and b:\n    self.done()",
}


@pytest.mark.parametrize("style", STYLES)
def test_ways_to_write_a_fusion(tmp_path, style):
    """However the code keeps and tests what it asked for, the node in the way is found."""
    lines = STYLES[style].split("\n")
    text = f"""
from fusion_base import Fusion

class Own(Fusion):
    def __init__(self, model):
        super().__init__(model, "Attention", "Softmax")

    def ask(self, node):
        found = {MATCH}
        if found is None:
            return None
        return found

    def fuse(self, node, children, parents):
        value = self.model.match_parent_path(node, ["Mul"], [0])
"""
    text += "".join(f"        {line}\n" for line in lines)
    (tmp_path / "own.py").write_text(text)
    (reason,) = explain(attention(tmp_path), fusion=f"{tmp_path}/own.py:Own", **options()).reasons
    assert reason.attempt.expected[0] == "Div"
    assert [one.name for one in reason.attempt.found] == ["n_scale"]


def test_a_check_that_says_no_is_the_reason(tmp_path):
    """And not a path that may be missing, which the check was given."""
    (tmp_path / "own.py").write_text("""
from fusion_base import Fusion

class Own(Fusion):
    def __init__(self, model):
        super().__init__(model, "Attention", "Softmax")

    def allowed(self, node, mask):
        return mask is not None or node.op_type == "Relu"

    def fuse(self, node, children, parents):
        mask = self.model.match_parent_path(node, ["Sub"], [0])
        allowed = self.allowed(node, mask)
        if not allowed:
            return
""")
    (reason,) = explain(attention(tmp_path), fusion=f"{tmp_path}/own.py:Own", **options()).reasons
    assert (reason.kind, reason.attempt) == ("check", None)
    assert "Relu" in reason.within[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing", "expected a class Nothing, found Fusion, Bart, Scaled, Model, Raises"),
        ("NUMBER", "expected a subclass .*, found 7"),
        ("Fusion", "expected a subclass"),
    ],
)
def test_what_is_no_fusion_is_bad_input(tmp_path, own, name, message):
    with pytest.raises(files.BadInput, match=message):
        explain(attention(tmp_path), fusion=f"{own}:{name}")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("none.py:A", "found no file .*none.py"),
        ("own.py", "expected FILE.py:CLASS"),
        ("bad.py:A", "found SyntaxError"),
        ("text.txt:A", "found no Python file"),
    ],
)
def test_a_file_that_cannot_be_imported_is_bad_input(tmp_path, own, named, message):
    (tmp_path / "bad.py").write_text("class")
    (tmp_path / "text.txt").write_text("class")
    with pytest.raises(files.BadInput, match=message):
        explain(attention(tmp_path), fusion=f"{tmp_path}/{named}")


# ── Any graph ───────────────────────────────────────────────────────────────────────────────────


def in_branch(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, but for its weights in both branches of an If."""
    body = onnx.GraphProto()
    body.CopyFrom(proto.graph)
    del body.input[:], body.initializer[:]
    other = onnx.GraphProto()
    other.CopyFrom(body)
    for node in other.node:
        node.name = f"e_{node.name}"
        node.input[:] = [f"e_{one}" if one in made(body) else one for one in node.input]
        node.output[:] = [f"e_{one}" for one in node.output]
    other.output[0].name = f"e_{other.output[0].name}"
    choose = onnx.helper.make_node(
        "If", ["yes"], [proto.graph.output[0].name], "n_if", then_branch=body, else_branch=other
    )
    del proto.graph.node[:]
    proto.graph.node.append(choose)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    return proto


def made(body: onnx.GraphProto) -> set[str]:
    return {name for node in body.node for name in node.output}


def in_function(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, all of it in a function."""
    inputs = [proto.graph.input[0].name, *(one.name for one in proto.graph.initializer)]
    outputs = [one.name for one in proto.graph.output]
    function = onnx.helper.make_function(
        "own", "Block", inputs, outputs, list(proto.graph.node), list(proto.opset_import)
    )
    del proto.graph.node[:]
    proto.graph.node.append(onnx.helper.make_node("Block", inputs, outputs, "n_call", domain="own"))
    proto.functions.append(function)
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    return proto


@pytest.mark.parametrize("change", [in_branch, in_function])
@pytest.mark.parametrize("model_type", ["bart", "bert", "t5"])
def test_nested_graphs(tmp_path, change, model_type):
    path = attention(tmp_path)
    onnx.save(change(onnx.load(path)), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = explain(path, model_type, **options())
    assert len(found.sites) == (2 if change is in_branch else 1)
    assert all(site.reason is not None for site in found.sites)
    valid(found)
    if change is in_function:
        assert "does not look into the functions" in found.reasons[0].message


def test_a_quantised_graph(tmp_path):
    path, small = attention(tmp_path), tmp_path / "small.onnx"
    quantize_dynamic(path, small)
    (site,) = valid(explain(small, "bart", **options())).sites
    assert site.reason == 0


def test_a_graph_that_is_fused_and_one_without_a_site(tmp_path):
    text = ATTENTION.replace("half)", "one)").replace("[n_scale] s1 = Mul (s0, one)", "")
    text = text.replace("Softmax <axis = -1> (s1)", "Softmax <axis = -1> (s0)")
    text = text.replace("Reshape (q1, heads)", "Reshape (q3, heads)").replace(
        "[n_q_heads]", "[n_scale] q3 = Mul (q1, half) [n_q_heads]"
    )
    path, fused = attention(tmp_path, text), tmp_path / "fused.onnx"
    first = explain(path, "bart", **options(), save=fused, parity=True)
    assert [(site.name, site.fused, site.wrong) for site in first.sites] == [
        ("n_softmax", True, False)
    ]
    assert (first.reasons, first.parity.held) == ([], True)
    again = valid(explain(fused, "bart", **options()))
    assert [(site.fused, site.reason) for site in again.sites] == [(True, None)]
    none = write(tmp_path / "none.onnx", ATTENTION.replace("Softmax <axis = -1>", "Sigmoid"))
    assert str(valid(explain(none, "bart", **options()))).endswith(
        "no attention site in this graph"
    )


def test_weights_in_another_file(tmp_path):
    path = attention(tmp_path)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, size_threshold=100, location="w.data")
    (reason,) = explain(path, "bart", **options(), parity=True).reasons
    assert [one.name for one in reason.attempt.found] == ["n_scale"]


def test_large_weights_are_not_read(tmp_path, monkeypatch):
    """Without the file that they are in, the optimizer comes to the same end."""
    text = ATTENTION.replace("Softmax <axis = -1> (s1)", "Softmax <axis = -1> (s0)")
    path = attention(tmp_path, text.replace("[n_scale] s1 = Mul (s0, half)", ""))
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, size_threshold=100, location="w.data")
    whole = explain(path, "bart", **options())
    monkeypatch.setattr(files, "ONE_FILE", 0)
    monkeypatch.setattr(saving, "ONE_FILE", 0)
    monkeypatch.setattr(graph, "LEFT_OUT_ABOVE", 100)
    monkeypatch.setattr(reading, "LEFT_OUT_ABOVE", 100)
    (tmp_path / "w.data").write_bytes(b"")
    assert explain(path, "bart", **options()).to_json() == whole.to_json()


def test_what_if_at_the_other_levels(tmp_path):
    path = attention(tmp_path)
    rows = what_if({"eager": path}, "bart", num_heads=2, hidden_size=8, opt_levels=(0, 1))
    assert [(row["file"], row["opt_level"], row["fused"], row["held"]) for row in rows] == [
        ("eager", 0, 0, True),
        ("eager", 1, 0, True),
    ]


def valid(found):
    """`found`, if its JSON is as the schema has it."""
    jsonschema.validate(found.to_json(), SCHEMA)
    return found
