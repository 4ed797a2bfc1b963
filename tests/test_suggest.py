"""`explain.suggest`: rules made from a graph fuse it, unedited, however attention is written."""

import ast
import importlib.util
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from graphs import ATTENTION, write
from test_fuse import HEAD, IN_A_BRANCH, NOT, WAYS, body, source

from helpers import explain as explaining
from helpers import export, files, graph
from helpers.__main__ import main
from helpers.figures.fused_sites import coverage
from helpers.fuse import pipeline
from helpers.models.small import ARCHITECTURES
from helpers.quiet import quiet

# What is between the products, beside the ways of `test_fuse`.
MORE = {
    "a mask that chooses, in half precision": {
        "before": """sa = Mul (s0, half) sh = Cast <to = 10> (sa) nh = Cast <to = 10> (none)
        sm = Where (keys, sh, nh) s = Cast <to = 1> (sm)"""
    },
    "dropout": {"after": "w, dropped = Dropout (p)"},
    "repeated keys of a group": {
        "scores": """kh = MatMul (given, narrow) k1 = Unsqueeze (kh, at1)
        sizes = Shape (k1) groups = Mul (sizes, repeats) k4 = Expand (k1, groups)
        k4t = Transpose <perm = [0, 1, 3, 2]> (k4) s0 = MatMul (q, k4t)""",
        "context": """vh = MatMul (given, narrow) v1 = Unsqueeze (vh, at1)
        v4 = Expand (v1, groups) c = MatMul (w, v4)""",
    },
    "one head of keys": {
        "scores": """kh = MatMul (given, narrow) k1 = Unsqueeze (kh, at1)
        k1t = Transpose <perm = [0, 1, 3, 2]> (k1) s0 = MatMul (q, k1t)""",
        "context": "vh = MatMul (given, narrow) v1 = Unsqueeze (vh, at1) c = MatMul (w, v1)",
    },
    "packed queries, keys and values": {
        "scores": """x0 = MatMul (given, packed) x1 = Reshape (x0, five)
        x2 = Transpose <perm = [2, 0, 3, 1, 4]> (x1) pq = Gather <axis = 0> (x2, first)
        pk = Gather <axis = 0> (x2, i1) pkt = Transpose <perm = [0, 1, 3, 2]> (pk)
        s0 = MatMul (pq, pkt)""",
        "context": "i2 = Add (i1, i1) pv = Gather <axis = 0> (x2, i2) c = MatMul (w, pv)",
    },
    "weights that are an output too": {
        "after": "w = Identity (p) seen_ = ReduceMean <axes = [1], keepdims = 0> (p)",
        "more": ", float[batch,length,length] seen_",
    },
}
ARRAYS = {
    "narrow": np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32),
    "packed": np.random.default_rng(2).normal(size=(8, 24)).astype(np.float32),
    "five": np.array([0, 0, 3, 2, 4]),
    "repeats": np.array([1, 2, 1, 1]),
}
# Small models: masks that are added or chosen by, none, positions.
MODELS = [
    ("BERT", "TorchScript, eager"),
    ("GPT-2", "TorchScript, SDPA"),
    ("ViT", "TorchScript, SDPA"),
    ("WavLM", "TorchScript, eager"),
]


def at_opset_23(path):
    """The file at the opset that has Attention, beside it."""
    model = graph.load(path)
    with quiet():
        pipeline.convert(model)
    return files.save(model, path.with_stem(f"{path.stem}_23"))


def classes(text):
    return [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]


def applied(text, path):
    """What `explain` says of the module `text`, run on the file at `path`."""
    module = path.with_suffix(".py")
    module.write_text(text, encoding="utf-8")
    names = classes(text)
    name = "RULES" if len(names) > 1 else names[0]
    assert text.rstrip().endswith(f" --rules {'FILE.py'}:{name} --write OUT.onnx")
    return explaining.explain(at_opset_23(path), rules=f"{module}:{name}", parity=True)


def check(path, sites=1, forms=1):
    """The suggestion for the file at `path` fuses all of its sites, and computes the same."""
    suggestion = explaining.suggest(path)
    assert suggestion.left == []
    assert len(classes(suggestion.text)) == forms
    assert_formatted(suggestion.text)
    done = applied(suggestion.text, path)
    assert [site.fused for site in done.sites] == [True] * sites, str(done)
    assert done.parity.held, str(done)
    return suggestion.text


def assert_formatted(text):
    compile(text, "suggested", "exec")
    assert max(map(len, text.splitlines())) <= 100
    if importlib.util.find_spec("ruff"):
        command = [
            sys.executable,
            "-m",
            "ruff",
            "format",
            "--check",
            "--isolated",
            "--line-length",
            "100",
            "-",
        ]
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, text


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_it(tmp_path, way):
    check(source(tmp_path, WAYS[way]))


@pytest.mark.parametrize("way", MORE)
def test_more_ways_of_writing_it(tmp_path, way):
    check(write(tmp_path / "in.onnx", body(**MORE[way]), **ARRAYS))


@pytest.mark.parametrize(("architecture", "route"), MODELS)
def test_models(tmp_path, architecture, route):
    small, (way, attention) = ARCHITECTURES[architecture], coverage.ROUTES[route]
    with quiet():
        export.export(small.make(attention), small.inputs(), tmp_path / "in.onnx", way)
    check(tmp_path / "in.onnx", small.sites)


@pytest.mark.parametrize("way", NOT)
def test_what_is_left_to_write(tmp_path, way):
    """A module that runs and fuses nothing, and names the node that is in the way."""
    changed, word = NOT[way]
    path = source(tmp_path, changed)
    suggestion = explaining.suggest(path)
    [line] = suggestion.left
    assert word in line
    assert "# left to write: " in suggestion.text
    assert_formatted(suggestion.text)
    done = applied(suggestion.text, path)
    assert [site.fused for site in done.sites] == [False]
    assert word in done.reasons[0].message


def test_what_it_looks_like(tmp_path):
    text = check(source(tmp_path, WAYS["an added mask"]))
    assert (
        text.partition("class ")[2].rpartition("\n\n\n")[0]
        == '''\
BiasedAttention(pattern.RewriteRuleClassBase):
    """softmax(scale · query · keyᵀ + bias) · value as one Attention.

    Made from the site p.
    """

    def pattern(self, op, query, key, value, scale, mask):
        # query (B, N, S, D), key (B, T, N, D), value (B, N, T, D), mask (B, 1, 1, T)
        keys = op.Transpose(key, perm=[0, 2, 3, 1])  # (B, N, D, T)
        scores = op.MatMul(query, keys)  # (B, N, S, T)
        scores = op.Mul(scores, scale)
        scores = op.Add(scores, mask)
        weights = op.Softmax(scores, axis=-1)
        weights = op.Identity(weights)
        return op.MatMul(weights, value)

    def check(self, context, query, key, value, scale, **_):
        match = pattern.MatchResult()
        if not {rank(query), rank(key), rank(value)} <= {4, None}:
            return match.fail("query, key and value: expected 4 axes")
        if not number(scale):
            return match.fail("scale: expected a constant")
        return match

    def rewrite(self, op, query, key, value, scale, mask):
        key = op.Transpose(key, perm=[0, 2, 1, 3])  # (B, N, T, D)
        shape = op.Concat(
            op.Constant(value_ints=[1, 1]),
            op.Shape(query, start=2, end=3),
            op.Shape(key, start=2, end=3),
            axis=0,
        )
        bias = op.Expand(mask, shape)  # a row for each query, which ONNX Runtime asks for
        return op.Attention(query, key, value, bias, scale=number(scale))'''
    )


def layers(*scaled):
    """A layer for each of `scaled`, which writes `s@` from `s0@`."""
    text, given = HEAD.replace("MORE", ""), "given"
    for i, line in enumerate(scaled):
        text += f"""
        qa{i} = MatMul ({given}, wq) qb{i} = Reshape (qa{i}, heads)
        qc{i} = Transpose <perm = [0, 2, 1, 3]> (qb{i}) ka{i} = MatMul ({given}, wk)
        kb{i} = Reshape (ka{i}, heads) kc{i} = Transpose <perm = [0, 2, 3, 1]> (kb{i})
        s0{i} = MatMul (qc{i}, kc{i}) {line.replace("@", str(i))}
        p{i} = Softmax <axis = -1> (s{i}) c{i} = MatMul (p{i}, v)
        t{i} = Transpose <perm = [0, 2, 1, 3]> (c{i}) x{i} = Reshape (t{i}, flat)"""
        given = f"x{i}"
    return text + f" y = MatMul ({given}, wo) }}"


SCALED = "s@ = Mul (s0@, half)"


def test_sites_of_one_form_share_a_rule(tmp_path):
    path = write(tmp_path / "in.onnx", layers(SCALED, SCALED, "s@ = Div (s0@, two)"))
    text = check(path, sites=3, forms=2)
    assert "Made from the site p0, the first of 2 sites of this form." in text
    assert "Made from the site p2." in text


def test_sites_that_are_left_share_a_rule_too(tmp_path):
    """Beside one that is whole, which does its work."""
    odd = "s@ = Relu (s0@)"
    path = write(tmp_path / "in.onnx", layers(odd, SCALED, odd))
    suggestion = explaining.suggest(path)
    assert [line.partition(":")[0] for line in suggestion.left] == ["p0", "p2"]
    assert len(classes(suggestion.text)) == 2
    assert [site.fused for site in applied(suggestion.text, path).sites] == [False, True, False]


@pytest.mark.parametrize(
    ("way", "old", "new", "why"),
    [
        ("a scale", "Mul (s0, half)", "Mul (s0, heat)", "scale: expected a constant"),
        ("a mask that chooses", "none = {-inf}", "none = {-1.0}", "lowest: expected a constant"),
        ("a guard against NaN", "zero = {0.0}", "zero = {0.5}", "zero: expected the constant 0.0"),
        ("a maximum taken off", "axes = [-1]", "axes = [-2]", "axis: expected the constant -1.0"),
    ],
)
def test_a_rule_refuses_what_it_was_not_made_for(tmp_path, way, old, new, why):
    """A graph with the nodes that the pattern has, which computes something else."""
    text = explaining.suggest(source(tmp_path, WAYS[way])).text
    other = body(**WAYS[way]).replace(old, new)
    assert other != body(**WAYS[way])
    done = applied(text, write(tmp_path / "other.onnx", other))
    assert [site.fused for site in done.sites] == [False]
    assert why in done.reasons[0].message


def test_a_bias_that_has_rows_is_not_expanded(tmp_path):
    """The file states them, so that the rule can test them; it refuses a bias of one row."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    tiny (float[1,2,length,4] q, float[1,2,4,length] k, float[1,2,length,4] v,
          float[1,1,ROWS,length] bias) => (float[1,2,length,4] y)
    { s0 = MatMul (q, k) s1 = Add (s0, bias) p = Softmax <axis = -1> (s1) y = MatMul (p, v) }"""
    rule = check(write(tmp_path / "in.onnx", text.replace("ROWS", "length")))
    assert "Expand" not in rule
    one_row = write(tmp_path / "one.onnx", text.replace("ROWS", "1"))
    assert "a row for each query" in applied(rule, one_row).reasons[0].message
    assert "Expand" in check(one_row)


def test_a_cast_that_changes_nothing(tmp_path):
    way = {"before": "sa = Mul (s0, half) s = Cast <to = 1> (sa)"}
    assert "CastLike" not in check(source(tmp_path, way))


def test_a_site_in_a_branch(tmp_path):
    check(write(tmp_path / "in.onnx", IN_A_BRANCH))


def test_large_weights(tmp_path):
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(256, 256)) / 16 for name in ("wq", "wk", "wv", "wo")}
    weights |= {name: random.normal(size=256) for name in ("bq", "bv", "bo", "gamma", "beta")}
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    arrays |= {"heads": np.array([0, 0, 4, 64]), "flat": np.array([0, 0, 256])}
    path = write(tmp_path / "in.onnx", ATTENTION.replace("length,8]", "length,256]"), **arrays)
    check(path)


def test_names_of_any_kind_make_a_module(tmp_path):
    path = source(tmp_path, {"before": "s = Relu (s0)"})
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.name = f'"""\\ {node.op_type}\n{{}}'
    odd = tmp_path / 'a """ b.onnx'
    onnx.save(proto, odd)
    suggestion = explaining.suggest(odd)
    assert_formatted(suggestion.text)
    assert len(suggestion.left) == 1


def test_nothing_to_suggest(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 23]>
    tiny (float[2,5,8] x) => (float[2,5,8] y)
    { [n_attention] y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x) }"""
    suggestion = explaining.suggest(write(tmp_path / "a.onnx", text))
    assert "its attention is one operator already" in suggestion.text
    assert (classes(suggestion.text), suggestion.left) == ([], [])
    suggestion = explaining.suggest(
        write(
            tmp_path / "b.onnx",
            text.replace("Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x)", "Neg (x)"),
        )
    )
    assert "it has none" in suggestion.text


# ── From a shell ────────────────────────────────────────────────────────────────────────────────


def test_the_text_alone_is_on_standard_output(tmp_path, capsys):
    path = source(tmp_path, NOT["another function"][0])
    assert main(["explain", str(path), "--suggest"]) == 0
    printed = capsys.readouterr()
    assert printed.out == explaining.suggest(path).text
    assert "left to write: p: Relu" in printed.err
    assert main(["explain", str(path), "--suggest", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["suggested"] == printed.out
    assert answer["left"] == explaining.suggest(path).left


def test_beside_a_fusion_it_is_added_to_the_answer(tmp_path, capsys):
    path = source(tmp_path, WAYS["a scale"])
    arguments = ["explain", str(path), "--rules", "onnxscript", "--suggest"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["sites"]
    assert classes(answer["suggested"]) == ["PlainAttention"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == answer["suggested"]
    assert "optimize_for_ort: 1 site" in printed.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "expected one of --model-type, --fusion, --rules and --suggest, found none"),
        (["--suggest", "--what-if"], "--suggest: expected no --what-if beside it"),
        (["--suggest", "--save", "a.svg"], "--suggest: expected no --save beside it"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, more, said):
    path = source(tmp_path, WAYS["a scale"])
    assert main(["explain", str(path), *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_rules_by_the_name_of_a_list_or_a_function(tmp_path):
    path = write(tmp_path / "in.onnx", layers(SCALED, "s@ = Div (s0@, two)"))
    text = explaining.suggest(path).text
    module = tmp_path / "rules.py"
    module.write_text(f"{text}\n\ndef made():\n    return RULES\n\n\nNONE = []\n", encoding="utf-8")
    converted = at_opset_23(path)
    for name in ("RULES", "made"):
        done = explaining.explain(converted, rules=f"{module}:{name}")
        assert [site.fused for site in done.sites] == [True, True]
    done = explaining.explain(converted, rules=f"{module}:PlainAttention")
    assert sorted(site.fused for site in done.sites) == [False, True]
    with pytest.raises(files.BadInput, match="found none"):
        explaining.explain(converted, rules=f"{module}:NONE")
