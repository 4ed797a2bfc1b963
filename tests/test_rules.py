"""`rules`: why a rewrite rule did not fuse a site. Mutants of graphs that onnxscript does fuse."""

import json
import re
import secrets
import sys
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from graphs import ATTENTION, write
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase, RewriteRuleSet, _matcher, pattern

from helpers import explain as explaining
from helpers import files, graph
from helpers.export import export

FOREIGN = ("Neg", "Sin", "Abs", "Tanh")


def explain(path, rules="onnxscript", **choice):
    """The one entry, as a reader calls it for rules."""
    return explaining.explain(path, rules=rules, **choice)


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.arange(5, 15).reshape(2, 5)
    return transformers.BertModel(config), {"input_ids": ids, "attention_mask": ids.clamp(0, 1)}


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config), {"pixel_values": torch.zeros(2, 3, 16, 16)}


def whisper():
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        num_mel_bins=8, d_model=32, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=32, max_source_positions=10,
    )  # fmt: skip
    return WhisperEncoder(config), {"input_features": torch.zeros(2, 8, 20)}


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, use_cache=False,
    )  # fmt: skip
    ids = torch.arange(5, 15).reshape(2, 5)
    model = transformers.T5EncoderModel(config)
    return model, {"input_ids": ids, "attention_mask": ids.clamp(0, 1)}


MODELS = {build.__name__: build for build in (bert, vit, whisper, t5)}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The path of each model's graph, all of whose sites onnxscript fuses."""
    folder, paths = tmp_path_factory.mktemp("rules"), {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model, inputs = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        paths[name] = export(model, inputs, folder / f"{name}.onnx", "dynamo").path
    return paths


class Mutant:
    """A graph with one edge of one attention broken: where, and by which names it shows."""

    def __init__(self, path, layer: int):
        self.model = ir.load(path)
        self.site = graph.sites(self.model)[layer]
        self.known = graph.from_input(self.model)
        self.where, self.names = "", set()
        self.context, self.softmax, self.scores = (
            self.site.context, self.site.node, self.site.scores,
        )  # fmt: skip

    @property
    def keys(self) -> list[ir.Node]:
        """From the product of the scores up to the Transpose of the keys' heads."""
        found, node = [], self.scores.inputs[1].producer()
        while node.op_type in ("Mul", "Reshape", "Transpose") and len(found) < 5:
            found.append(node)
            node = node.inputs[0].producer()
        return found

    @property
    def core(self) -> list[ir.Node]:
        between, node = [], self.softmax.inputs[0].producer()
        while node is not self.scores:
            between.append(node)
            node = node.inputs[0].producer()
        return [self.context, self.softmax, *between, self.scores, *self.keys]

    def plant(self, node: ir.Node, index: int, operator: str) -> None:
        name, value = secret(), node.inputs[index]
        added = ir.Node("", operator, [value], name=name)
        added.outputs[0].name = secret()
        added.outputs[0].type, added.outputs[0].shape = value.type, value.shape
        node.graph.insert_before(node, added)
        node.replace_input_with(index, added.outputs[0])
        self.where, self.names = f"{operator} on input {index} of {shown(node)}", {name}

    def swap(self, node: ir.Node) -> None:
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
        self.where, self.names = f"operands of {shown(node)} swapped", {node.name}

    def permute(self, node: ir.Node, perm: list[int]) -> None:
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        self.where, self.names = f"perm of {shown(node)} is {perm}", {node.name}

    def constant(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        name = secret()
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.model.graph.register_initializer(value)
        node.replace_input_with(index, value)
        self.where = f"input {index} of {shown(node)} is {array.tolist()}"
        self.names = {name, node.name}

    def use(self, node: ir.Node) -> None:
        """The graph also gives out what another node makes of what `node` computes."""
        reader = ir.Node("", "Neg", node.outputs, name=secret())
        output = reader.outputs[0]
        output.name, output.type, output.shape = (
            secret(),
            *((node.outputs[0].type, node.outputs[0].shape)),
        )
        self.model.graph.append(reader)
        self.model.graph.outputs.append(output)
        self.where, self.names = f"{shown(node)} used elsewhere", {reader.name}


def secret() -> str:
    return f"x{secrets.token_hex(6)}"


def shown(node: ir.Node) -> str:
    return f"{node.op_type} {node.name}"


def changes(example: Mutant) -> list:
    """What to do to a graph like `example`: functions of a `Mutant`."""
    made = []
    inside = example.core.index(example.scores)  # the weights: Tanh leaves them a site
    last = len(example.core) - 2  # from there up it is the input of the rule
    for i, node in enumerate(example.core):
        operator = "Tanh" if i < inside else FOREIGN[i % len(FOREIGN)]
        if i < last:
            made.append(lambda m, i=i, o=operator: m.plant(m.core[i], int(i == inside), o))
        if 0 < i < last - 1:
            made.append(lambda m, i=i: m.use(m.core[i]))
        if node.op_type in ("Add", "Mul") or i == inside:
            made.append(lambda m, i=i: m.swap(m.core[i]))
        if node.op_type == "Transpose":
            perm = [1, 0, 2, 3][: len(node.attributes["perm"].value)]
            made.append(lambda m, i=i, perm=perm: m.permute(m.core[i], perm))
        if node.op_type == "Mul":
            vector = np.full(16, 0.5, np.float32)
            made.append(lambda m, i=i, vector=vector: m.constant(m.core[i], 1, vector))
    values = example.context.inputs[1].producer()
    made.append(lambda m: m.plant(m.context, 1, "Neg"))  # fuses all the same, as it should
    if values.op_type == "Transpose":
        made.append(lambda m: m.permute(m.context.inputs[1].producer(), [2, 0, 1, 3]))
    return made


def named(reason, names: set[str]) -> bool:
    """Whether the reason says one of `names` as what it found, where, or as an operand."""
    attempt, check = reason.attempt, reason.check
    texts = [one.name for one in (*attempt.found, attempt.at)] if attempt else []
    texts += check.operands.values() if check else []
    return any(names & set(re.split(r"[\s(),\[\]]+", text)) for text in texts)


def verdict(found, site: graph.Site):
    return next((one for one in found.sites if one.name == site.name), None)


@pytest.mark.parametrize("name", MODELS)
def test_one_broken_edge_is_named(name, exported, tmp_path):
    """Of the mutants that stop the fusion of their site, which reasons name what was changed.

    65 of 67 did, when this was written. Missed: the heads' Transpose of the keys with another
    permutation (BERT and T5), so that the keys' length is that of the heads. The rule reads the
    keys' shape before the values' and blames the values, which no longer agree.
    """
    missed = {"bert": 1, "t5": 1}.get(name, 0)
    stopped, misses = 0, []
    path, layer = exported[name], len(name) % 2
    todo = changes(Mutant(path, layer))
    assert len(todo) >= 15  # in all 60 or more
    for change in todo:
        mutant = Mutant(path, layer)
        change(mutant)
        ir.save(mutant.model, tmp_path / "mutant.onnx")
        found = explain(tmp_path / "mutant.onnx")
        (mine,) = [one for one in found.sites if one.name == mutant.site.name]
        (other,) = [one for one in found.sites if one is not mine]
        assert other.fused
        if mine.fused:
            continue
        stopped += 1
        reason = found.reasons[mine.reason]
        assert reason.sites == [found.sites.index(mine)]
        if not named(reason, mutant.names):
            misses.append(f"{mutant.where}: {reason.to_json()}")
    assert stopped >= 13
    assert len(misses) <= missed, "\n".join(misses)


# ── A reader's own rules ────────────────────────────────────────────────────────────────────────


class Scaled(RewriteRuleClassBase):
    """An attention whose scores are multiplied by a constant, as one operator."""

    def pattern(self, op, query, keys, values, scale):
        scores = op.Mul(op.MatMul(query, keys), scale, _outputs=["scores"])
        return op.MatMul(op.Softmax(scores, axis=-1), values)

    def check(self, context, scale, scores, **_):
        factor = scale.const_value
        if factor is None or factor.size != 1:
            return pattern.MatchResult().fail("not one factor", scale)
        return self.allowed(scores)

    def allowed(self, scores):
        return scores.name != "forbidden"

    def rewrite(self, op, query, keys, values, **_):
        return op.MultiHeadAttention(query, keys, values, num_heads=2, _domain="com.microsoft")


class Raising(Scaled):
    def allowed(self, scores):
        return 1 / len(scores.meta)


class Unwilling(Scaled):
    def rewrite(self, op, query, keys, values, scale, **_):
        if scale is not None:
            return None
        raise AssertionError


class Elsewhere(Scaled):
    def rewrite(self, op, query, keys, values, **_):
        return op.Foreign(query, keys, values, _domain="foreign")


def plain(folder, old: str = "", new: str = "", **changed):
    assert old in ATTENTION
    return write(folder / "a.onnx", ATTENTION.replace(old, new) if old else ATTENTION, **changed)


def only(found):
    """The one reason of the one site, in JSON that the schema allows."""
    schema = json.loads((Path(__file__).parent / "explain.schema.json").read_text())
    jsonschema.validate(found.to_json(), schema)
    assert [site.fused for site in found.sites] == [False]
    (reason,) = found.reasons
    return reason


@pytest.mark.parametrize(
    "rules",
    [Scaled, [Scaled], Scaled.rule(), RewriteRuleSet([Scaled.rule()])],
    ids=["class", "list", "rule", "set"],
)
def test_own_rule_that_fires(rules, tmp_path):
    found = explain(plain(tmp_path), rules)
    assert [(site.name, site.fused) for site in found.sites] == [("n_softmax", True)]
    assert found.reasons == []


def test_own_rule_with_an_operator_between(tmp_path):
    change = "s1 = Mul (s0, half)", "s9 = Mul (s0, half) [n_odd] s1 = Tanh (s9)"
    reason = only(explain(plain(tmp_path, *change), Scaled))
    assert (reason.fusion, reason.kind, reason.cause) == ("Scaled", "path", "extra_node")
    assert reason.source == 'scores = op.Mul(op.MatMul(query, keys), scale, _outputs=["scores"])'
    assert reason.attempt.start.name == "n_context"
    assert (reason.attempt.expected, reason.attempt.inputs) == (["Softmax", "Mul"], [0, 0])
    assert [one.name for one in reason.attempt.matched] == ["n_softmax"]
    assert [one.name for one in reason.attempt.found] == ["n_odd"]
    assert reason.actual.operators == ["Softmax", "Tanh", "Mul"]


def test_own_rule_whose_check_says_no(tmp_path):
    reason = only(explain(plain(tmp_path, half=np.full(5, 0.5, np.float32)), Scaled))
    assert (reason.kind, reason.message, reason.file) == (
        "check",
        "not one factor",
        "test_rules.py",
    )
    assert reason.source == 'return pattern.MatchResult().fail("not one factor", scale)'
    assert reason.check.source == "factor.size != 1"
    assert reason.check.operands["factor.size"] == "5"
    assert reason.check.operands["scale"] == "initializer half, shape [5]" + (
        ", value [0.5, 0.5, 0.5, 0.5, 0.5], read by Mul n_scale"
    )


def test_own_rule_whose_helper_says_no(tmp_path):
    """The line is that of `check`, and where the function that it called said no is told too."""
    text = ATTENTION.replace("s1", "forbidden")
    reason = only(explain(write(tmp_path / "a.onnx", text), Scaled))
    assert reason.source == "return self.allowed(scores)"
    assert 'return scores.name != "forbidden"' in reason.within[0]
    assert "Mul n_scale (s0, half) -> forbidden" in reason.check.operands["scores"]


def test_own_rule_whose_rewrite_gives_up(tmp_path):
    reason = only(explain(plain(tmp_path), Unwilling))
    assert (reason.fusion, reason.kind, reason.source) == ("Unwilling", "check", "return None")
    assert reason.check.source == "scale is not None"


def test_own_rule_with_another_attribute(tmp_path):
    changed = "<axis = -1> (s1)", "<axis = 3> (s1)"
    reason = only(explain(plain(tmp_path, *changed), Scaled))
    assert (reason.kind, reason.source) == (
        "check",
        "return op.MatMul(op.Softmax(scores, axis=-1), values)",
    )
    assert reason.check.operands["axis"] == "3"
    assert reason.check.operands["node"] == "Softmax n_softmax (s1) -> p"


def test_own_rule_that_makes_no_attention(tmp_path):
    reason = only(explain(plain(tmp_path), Elsewhere))
    assert reason.fusion == "Elsewhere"
    assert "no rule made an attention operator" in reason.message


def test_what_a_rule_raises_is_a_reason_and_all_is_as_before(tmp_path, capsys):
    methods = [*vars(_matcher.SimplePatternMatcher).items(), *vars(RewriteRule).items()]
    trace = sys.gettrace()
    reason = only(explain(plain(tmp_path), Raising))
    assert (reason.fusion, reason.kind, reason.cause) == ("Raising", "raised", "raised")
    assert (reason.file, reason.source) == ("test_rules.py", "return 1 / len(scores.meta)")
    assert reason.message == "ZeroDivisionError: division by zero"
    assert methods == [*vars(_matcher.SimplePatternMatcher).items(), *vars(RewriteRule).items()]
    assert sys.gettrace() is trace
    assert capsys.readouterr().out == ""


def test_a_rule_that_fired_at_another_site(tmp_path):
    """Two attentions in a row, of which one has an operator between."""
    start, end = ATTENTION.index("{"), ATTENTION.rindex("}")
    second = re.sub(r"\b(q\d?|k\d?|v\d?|s\d|p|c\d|o\d|r|y|x)\b", r"\1_", ATTENTION[start + 1 : end])
    second = second.replace("[n_", "[m_").replace("(given,", "(y,")
    second = second.replace("s1_ = Mul (s0_, half)", "t = Mul (s0_, half) [m_odd] s1_ = Tanh (t)")
    text = ATTENTION[:start].replace("8] y)", "8] y_)") + ATTENTION[start:end] + second + "}"
    found = explain(write(tmp_path / "a.onnx", text), Scaled)
    assert [(site.name, site.fused) for site in found.sites] == [
        ("n_softmax", True),
        ("m_softmax", False),
    ]
    (reason,) = found.reasons
    assert reason.sites == [1]
    assert [one.name for one in reason.attempt.found] == ["m_odd"]


def test_rules_that_are_none(tmp_path):
    with pytest.raises(files.BadInput, match="7: expected a rewrite rule, a set of them"):
        explain(plain(tmp_path), 7)
    with pytest.raises(files.BadInput, match="found no file SDPA"):
        explain(plain(tmp_path), "SDPA")


def test_rules_of_a_file(tmp_path):
    found = explain(plain(tmp_path, half=np.full(5, 0.5, np.float32)), f"{__file__}:Scaled")
    assert only(found).message == "not one factor"


def test_a_rule_that_computes_something_else(tmp_path):
    """MultiHeadAttention scales the scores itself, and not by this factor."""
    found = explain(plain(tmp_path), Scaled, parity=True)
    assert [(site.fused, site.wrong) for site in found.sites] == [(True, True)]
    assert not found.parity.held


# ── Graphs of other kinds ───────────────────────────────────────────────────────────────────────


def test_same_reason_of_several_layers_is_one(exported, tmp_path):
    model = ir.load(exported["vit"])
    for site in graph.sites(model):
        node = site.node
        added = ir.Node("", "Tanh", [node.inputs[0]], name=f"odd_{node.name}")
        added.outputs[0].name = f"of_{node.name}"
        node.graph.insert_before(node, added)
        node.replace_input_with(0, added.outputs[0])
    ir.save(model, tmp_path / "a.onnx")
    found = explain(tmp_path / "a.onnx")
    assert [reason.sites for reason in found.reasons] == [[0, 1]]


def test_names_are_in_the_file(exported, tmp_path):
    """After passes and rules that made and renamed nodes, every name can be searched for."""
    mutant = Mutant(exported["t5"], 0)
    mutant.permute(mutant.context.inputs[1].producer(), [2, 0, 1, 3])
    ir.save(mutant.model, tmp_path / "a.onnx")
    found = explain(tmp_path / "a.onnx")
    (reason,) = found.reasons
    proto = onnx.load(tmp_path / "a.onnx")
    names = {name for node in proto.graph.node for name in (node.name, *node.output)}
    said = {reason.anchor.name}
    for attempt in reason.attempts:
        said |= {one.name for one in (attempt.start, *attempt.matched, *attempt.found)}
    assert said
    assert said <= names


def test_site_in_a_branch(tmp_path):
    inner = ATTENTION[ATTENTION.index("{") + 1 : ATTENTION.rindex("}")].replace(" y =", " z =")
    inputs = ATTENTION[: ATTENTION.index("{")].replace("8] given)", "8] given, bool c)")
    text = f"""{inputs} {{ y = If (c) <
        then_branch = then () => (float[batch,length,8] z) {{ {inner} }},
        else_branch = other () => (float[batch,length,8] w) {{ w = Neg (given) }}> }}"""
    text = text.replace("s1 = Mul (s0, half)", "s9 = Mul (s0, half) [n_odd] s1 = Tanh (s9)")
    path = tmp_path / "a.onnx"
    proto = onnx.parser.parse_model(text)
    weights = onnx.load(write(path, ATTENTION)).graph.initializer
    proto.graph.initializer.extend(weights)
    onnx.save(proto, path)
    reason = only(explain(path, Scaled))
    assert [one.name for one in reason.attempt.found] == ["n_odd"]
    assert only(explain(path)).fusion == "SDPA"


def test_site_that_was_fused_before(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 23]>
    tiny (float[2,5,8] x) => (float[2,5,8] y)
    { [n_attention] y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    found = explain(tmp_path / "a.onnx")
    assert [(site.name, site.fused) for site in found.sites] == [("n_attention", True)]
    assert found.reasons == []


def test_site_that_other_passes_took_away(tmp_path):
    """Nothing reads its result."""
    reason = only(explain(plain(tmp_path, "[n_residual] r = Add (x, o1)", "r = Add (x, x)")))
    assert "took it out of the graph" in reason.message
