"""`fuse` on decoders with caches: past keys and values as the operator's own, heads unrepeated."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from graphs import write

from helpers import files, fuse, generate, graph
from helpers.__main__ import main

# One head of keys and values for two of queries, of width four; TorchScript's way of repeating it.
DECODER = """
<ir_version: 8, opset_import: ["" : 17]>
decoder (float[batch,length,8] given, float[batch,1,past,4] past_key,
         float[batch,1,past,4] past_value, int64[batch,total] attention_mask)
=> (float[batch,length,8] y, float[batch,1,total,4] present_key,
    float[batch,1,total,4] present_value)
<float low = {-10000.0}, float lowest = {-3.4028234663852886e38}, float one = {1.0},
 int64 i1 = {1}, int64[1] at1 = {1}, int64[1] at2 = {2},
 int64[2] at12 = {1, 2}, int64[5] twice = {1, 1, 2, 1, 1}, int64 first = {0}, int64[1] end = {-1},
 int64 third = {2}, int64[1] start = {0}, int64[4] merged = {0, 2, -1, 4}>
{
  q0 = MatMul (given, wq)
  q1 = Reshape (q0, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (q1)
  k0 = MatMul (given, narrow_k)
  k1 = Unsqueeze (k0, at1)
  v0 = MatMul (given, narrow_v)
  v1 = Unsqueeze (v0, at1)
  present_key = Concat <axis = -2> (past_key, k1)
  present_value = Concat <axis = 2> (past_value, v1)
  k2 = Unsqueeze (present_key, at2)
  k3 = Expand (k2, twice)
  k = Reshape (k3, merged)
  v2 = Unsqueeze (present_value, at2)
  v3 = Expand (v2, twice)
  v = Reshape (v3, merged)
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  s0 = MatMul (q, kt)
  s1 = Mul (s0, half)
  m1 = Unsqueeze (attention_mask, at12)
  kf = Cast <to = 1> (m1)
  pads = Sub (one, kf)
  padding = Mul (pads, lowest)
  MASK
  s = Add (s1, mask)
  p = Softmax <axis = -1> (s)
  c = MatMul (p, v)
  c1 = Transpose <perm = [0, 2, 1, 3]> (c)
  c2 = Reshape (c1, flat)
  y = MatMul (c2, wo)
}
"""
PADDED = "mask = Identity (padding)"
# As long as the cache will be: read off what is appended to, which the operator gives only later.
CAUSAL = """
  all0 = Shape (present_key)
  all = Gather (all0, third)
  here0 = Shape (given)
  here1 = Gather (here0, i1)
  before = Sub (all, here1)
  columns = Range (first, all, i1)
  rows0 = Range (before, all, i1)
  rows = Unsqueeze (rows0, end)
  later = Greater (columns, rows)
  none = Cast <to = 1> (later)
  causal = Mul (none, low)
  mask = Add (causal, padding)
"""


def decoder(folder, mask):
    text = DECODER.replace("MASK", mask)
    random = np.random.default_rng(3)
    narrow = {f"narrow_{x}": random.normal(size=(8, 4)).astype(np.float32) for x in "kv"}
    return write(folder / "in.onnx", text, **narrow)


def fused(folder, path, target):
    done = fuse.fuse(path, folder / "out.onnx", target=target)
    assert (done.held, done.sites, done.fused, done.left) == (True, 1, 1, []), str(done)
    made = graph.load(folder / "out.onnx")
    [node] = [node for node in graph.nodes(made) if node.op_type == "Attention"]
    return made, node


@pytest.mark.parametrize("mask", [PADDED, CAUSAL])
@pytest.mark.parametrize("target", fuse.FUSING)
def test_a_cache_is_the_operators_own(tmp_path, target, mask):
    """No Concat reads it, heads are not repeated, inputs and outputs have their names."""
    path = decoder(tmp_path, mask)
    made, node = fused(tmp_path, path, target)
    before = graph.load(path)
    for of in ("inputs", "outputs"):
        assert [v.name for v in getattr(made.graph, of)] == [
            v.name for v in getattr(before.graph, of)
        ]
    assert [value.name for value in node.inputs[4:]] == ["past_key", "past_value"]
    assert [value.name for value in node.outputs[1:]] == ["present_key", "present_value"]
    counts = graph.counts(made)
    assert not {"Softmax", "Tile"} & {*counts}
    assert (node.inputs[1].shape or [0, 0, 0])[-1] == 4  # one head of keys
    for name in ("past_key", "past_value"):
        [past] = [value for value in made.graph.inputs if value.name == name]
        assert {user.op_type for user in past.consumers()} <= {"Attention", "Shape"}


OF_KEYS = """
  mean = ReduceMean <axes = [3], keepdims = 0> (present_key)
  of_key = Unsqueeze (mean, at2)
  mask = Add (of_key, padding)
"""


@pytest.mark.parametrize("target", fuse.FUSING)
def test_a_cache_that_the_bias_is_made_of_stays_outside(tmp_path, target):
    """The operator gives its present keys only after it has read the bias."""
    _, node = fused(tmp_path, decoder(tmp_path, OF_KEYS), target)
    assert len(node.outputs) == 1
    assert not any(node.inputs[4:])


# ── In place ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", fuse.FUSING)
def test_caches_are_written_in_place(tmp_path, target, capsys):
    """The buffers keep their names, one input says how far they are filled, and it is the same."""
    path, out = decoder(tmp_path, CAUSAL), tmp_path / "out.onnx"
    assert main(["fuse", str(path), str(out), "--cache", "in-place", "--target", target]) == 0
    made = graph.load(out)
    assert graph.buffers(made) == graph.Buffers(
        {"past_key": "present_key", "past_value": "present_value"}, "past_length", None
    )
    assert graph.counts(made)["TensorScatter"] == 2
    assert main(["compare", str(path), str(out)]) == 0
    assert "parity held" in capsys.readouterr().out


def test_steps_write_behind_each_other(tmp_path):
    """Past and present in the same memory: a prompt, and eight steps, give what grows."""
    path, out = decoder(tmp_path, CAUSAL), tmp_path / "out.onnx"
    fuse.fuse(path, out, cache="in-place", capacity=16)
    growing, session = files.session(path), files.session(out)
    random = np.random.default_rng(0)
    past = [np.zeros((2, 1, 0, 4), np.float32)] * 2
    buffers = [np.full((2, 1, 16, 4), 1e4, np.float32) for _ in past]
    mask = np.ones((2, 0), np.int64)
    for new in (3, *[1] * 8):
        x = random.normal(size=(2, new, 8)).astype(np.float32)
        mask = np.concatenate([mask, np.ones((2, new), np.int64)], axis=1)
        mask[1, 0] = 0  # padded on the left
        feed = {"given": x, "attention_mask": mask}
        y, *grown = growing.run(
            None, feed | dict(zip(("past_key", "past_value"), past, strict=True))
        )
        binding = session.io_binding()
        length = np.array([past[0].shape[2]], np.int64)
        for name, array in (feed | {"past_length": length}).items():
            binding.bind_cpu_input(name, array)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in buffers]
        for name, value in zip(("key", "value"), values, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        kept = slice(1 if length[0] == 0 else 0, None)
        np.testing.assert_allclose(
            binding.get_outputs()[-1].numpy()[:, kept], y[:, kept], atol=1e-5
        )
        past = grown
        buffers = [value.numpy() for value in values]
        for buffer, one in zip(buffers, past, strict=True):
            np.testing.assert_array_equal(buffer[:, :, : one.shape[2]], one)


def late(model):
    """Writes one position too far."""
    [scatter, _] = [node for node in graph.nodes(model) if node.op_type == "TensorScatter"]
    tape = ir.tape.Tape()
    one = tape.op("Constant", [], {"value_ints": [1]})
    scatter.replace_input_with(2, tape.op("Add", [scatter.inputs[2], one]))
    scatter.graph.insert_before(scatter, tape.nodes)


def all_of_it(model):
    """Reads what stands behind the keys."""
    [node] = [node for node in graph.nodes(model) if node.op_type == "Attention"]
    node.replace_input_with(6, None)


def one_short(model):
    """Does not read the last key."""
    [node] = [node for node in graph.nodes(model) if node.op_type == "Attention"]
    tape = ir.tape.Tape()
    one = tape.op("Constant", [], {"value_ints": [1]})
    node.replace_input_with(6, tape.op("Sub", [node.inputs[6], one]))
    node.graph.insert_before(node, tape.nodes)


@pytest.mark.parametrize("fault", [late, all_of_it, one_short])
def test_faults_of_buffers_are_found(tmp_path, fault, capsys):
    path, out = decoder(tmp_path, PADDED), tmp_path / "out.onnx"
    fuse.fuse(path, out, cache="in-place")
    model = graph.load(out)
    fault(model)
    files.save(model, tmp_path / "wrong.onnx")
    assert main(["compare", str(path), str(tmp_path / "wrong.onnx")]) == 1
    assert "NOT HELD" in capsys.readouterr().out


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("fault", [late, one_short])
def test_a_file_in_place_stands_by_itself(tmp_path, fault, capacity, capsys):
    """It is fed without the file that it was made from: inspected, compared, fused once more."""
    out, again = tmp_path / "out.onnx", tmp_path / "again.onnx"
    fuse.fuse(decoder(tmp_path, PADDED), out, cache="in-place", capacity=capacity)
    assert main(["inspect", str(out)]) == 0
    assert main(["fuse", str(out), str(again)]) == 0
    assert "1 attention site, 1 fused" in capsys.readouterr().out
    assert main(["compare", str(out), str(again)]) == 0
    assert "past_length int64 (1) how many positions of the caches are" in capsys.readouterr().out
    model = graph.load(out)
    fault(model)
    files.save(model, tmp_path / "wrong.onnx")
    assert main(["compare", str(out), str(tmp_path / "wrong.onnx")]) == 1


def test_what_is_longer_than_the_capacity_is_passed_over(tmp_path):
    done = fuse.fuse(
        decoder(tmp_path, PADDED), tmp_path / "out.onnx", cache="in-place", capacity=20
    )
    assert done.held, str(done)
    assert "positions, of a capacity of 20" in done.inputs
    [past, _] = graph.buffers(graph.load(tmp_path / "out.onnx")).given
    [value] = [one for one in graph.load(tmp_path / "out.onnx").graph.inputs if one.name == past]
    assert value.shape[2] == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--capacity", "8"], "--capacity: expected --cache in-place beside it"),
        (["--cache", "in-place", "--target", "openvino"], "expected --target portable or cpu"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, words, capsys):
    arguments = ["fuse", str(decoder(tmp_path, PADDED)), str(tmp_path / "out.onnx"), *options]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_a_capacity_is_a_number(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fuse", "in.onnx", "out.onnx", "--cache", "in-place", "--capacity", "0"])
    assert "expected a whole number above 0, found '0'" in capsys.readouterr().err


def test_there_must_be_caches_to_keep_in_place(tmp_path, capsys):
    path = write(tmp_path / "in.onnx")
    assert main(["fuse", str(path), str(tmp_path / "out.onnx"), "--cache", "in-place"]) == 2
    assert "expected caches to keep in place" in capsys.readouterr().err


# ── Outputs ─────────────────────────────────────────────────────────────────────────────────────


def words_of(folder, head):
    """Tokens to logits over twelve words, and a map of features that is handed on."""
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    words (int64[batch,length] ids, float[batch,1,past,4] past_key,
           float[batch,1,past,4] past_value, float[batch,seen,8] features)
    => (float[batch,length,12] logits, float[batch,1,total,4] present_key,
        float[batch,1,total,4] present_value, float[batch,seen,8] same)
    <int64[1] at1 = {{1}}, float one = {{1.0}}>
    {{
      x = Gather (table, ids)
      q0 = MatMul (x, wq)
      q1 = Reshape (q0, heads)
      q = Transpose <perm = [0, 2, 1, 3]> (q1)
      k0 = MatMul (x, narrow_k)
      k1 = Unsqueeze (k0, at1)
      v0 = MatMul (x, narrow_v)
      v1 = Unsqueeze (v0, at1)
      present_key = Concat <axis = -2> (past_key, k1)
      present_value = Concat <axis = 2> (past_value, v1)
      kt = Transpose <perm = [0, 1, 3, 2]> (present_key)
      s = MatMul (q, kt)
      p = Softmax <axis = -1> (s)
      c = MatMul (p, present_value)
      c1 = Transpose <perm = [0, 2, 1, 3]> (c)
      y = Reshape (c1, flat)
      same = Identity (features)
      {head}
    }}
    """
    random = np.random.default_rng(3)
    shapes = {"narrow_k": (8, 4), "narrow_v": (8, 4), "table": (12, 8), "back": (8, 12), "b": (12,)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return write(folder / "in.onnx", text, **arrays)


HEADS = {
    "a product": ("logits = MatMul (y, back)", "y"),
    "with a bias, and a bound": (
        "l0 = MatMul (y, back) l1 = Add (b, l0) l2 = Tanh (l1) logits = Mul (l2, half)",
        "y",
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_the_last_position(tmp_path, head, capsys):
    """The others are not computed, where that can be."""
    path, out = words_of(tmp_path, HEADS[head][0]), tmp_path / "out.onnx"
    assert main(["fuse", str(path), str(out), "--last-logits"]) == 0
    assert "not given: all but the last position of logits" in capsys.readouterr().out
    made = graph.load(out)
    assert made.graph.outputs[0].name == "logits"
    assert made.graph.outputs[0].shape[1] == 1
    [cut] = [node for node in graph.nodes(made) if node.op_type == "Slice"]
    assert cut.inputs[0].name == HEADS[head][1]


def test_what_is_handed_on_is_taken_off(tmp_path, capsys):
    path, out = words_of(tmp_path, HEADS["a product"][0]), tmp_path / "out.onnx"
    assert main(["fuse", str(path), str(out), "--drop-unchanged"]) == 0
    assert "not given: same, which is an input" in capsys.readouterr().out
    names = [value.name for value in graph.load(out).graph.outputs]
    assert names == ["logits", "present_key", "present_value"]


# ── Tokens ──────────────────────────────────────────────────────────────────────────────────────


def test_the_same_tokens_are_generated(tmp_path, capsys):
    """By the model as it is, fused, and in place; a fault is named with its step."""
    path = words_of(tmp_path, HEADS["a product"][0])
    fused_, in_place = tmp_path / "fused.onnx", tmp_path / "in_place.onnx"
    fuse.fuse(path, fused_, last_logits=True, drop_unchanged=True)
    fuse.fuse(path, in_place, cache="in-place", capacity=40)
    arguments = ["compare", str(path), str(fused_), str(in_place), "--generate", "20"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("the same tokens in 20 steps") == 2
    model = graph.load(in_place)
    [node] = [node for node in graph.nodes(model) if node.op_type == "Attention"]
    node.replace_input_with(6, None)
    files.save(model, tmp_path / "wrong.onnx")
    assert main(["compare", str(path), str(tmp_path / "wrong.onnx"), "--generate", "20"]) == 1
    assert "OTHER TOKENS from step" in capsys.readouterr().out


def test_caches_in_place_are_run_over_steps(tmp_path, monkeypatch):
    """Each file on what it has written; nothing is written where other tokens come out."""
    path, out = words_of(tmp_path, HEADS["a product"][0]), tmp_path / "out.onnx"
    assert "and 8 steps on the caches" in fuse.fuse(path, out, cache="in-place").inputs
    few = fuse.fuse(path, tmp_path / "few.onnx", cache="in-place", capacity=9)
    assert "not run step by step (expected at most 9 positions" in few.inputs
    states = fuse.fuse(decoder(tmp_path, PADDED), tmp_path / "states.onnx", cache="in-place")
    assert "not run step by step (expected ids" in states.inputs
    model, run = graph.load(out), generate.compare
    one_short(model)
    wrong = files.save(model, tmp_path / "wrong.onnx")
    monkeypatch.setattr(
        generate, "compare", lambda models, steps: run([models[0], files.Opened(wrong)], steps)
    )
    path = words_of(tmp_path, HEADS["a product"][0])
    done = fuse.fuse(path, tmp_path / "none.onnx", cache="in-place")
    assert not done.held
    assert done.at_fault == "caches, kept in place"
    assert "in 8 steps on its own caches" in str(done)
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.parametrize("runs", [True, False])
def test_a_candidate_that_fails_on_the_prompt_has_not_held(runs, tmp_path, monkeypatch):
    """It is the candidate's fault only where the original runs."""

    def fails(models, steps):
        if len(models) > 1 or not runs:
            raise RuntimeError("no kernel")

    monkeypatch.setattr(generate, "compare", fails)
    path, out = words_of(tmp_path, HEADS["a product"][0]), tmp_path / "out.onnx"
    done = fuse.fuse(path, out, cache="in-place")
    assert done.held is not runs
    assert out.exists() is not runs
    said = "fails on a prompt that the original runs on" if runs else "not run step by step"
    assert said in str(done)


def test_two_files_in_place_generate(tmp_path, capsys):
    path, out = words_of(tmp_path, HEADS["a product"][0]), tmp_path / "out.onnx"
    fuse.fuse(path, out, cache="in-place")
    assert main(["compare", str(out), str(path), str(out), "--generate", "20"]) == 0
    assert capsys.readouterr().out.count("the same tokens in 20 steps") == 2


def test_generating_beyond_the_capacity_is_refused(tmp_path, capsys):
    path, out = words_of(tmp_path, HEADS["a product"][0]), tmp_path / "out.onnx"
    fuse.fuse(path, out, cache="in-place", capacity=20)
    assert main(["compare", str(path), str(out), "--generate", "20"]) == 2
    assert "expected at most 20 positions, the capacity of its caches" in capsys.readouterr().err


def test_what_cannot_generate_is_refused(tmp_path, capsys):
    words, states = words_of(tmp_path, HEADS["a product"][0]), decoder(tmp_path / "..", PADDED)
    encoder = write(tmp_path / "encoder.onnx")
    for path, told in ((encoder, "expected caches"), (states, "expected ids among the inputs")):
        assert main(["compare", str(path), str(path), "--generate", "2"]) == 2
        assert told in capsys.readouterr().err
    assert words.exists()
