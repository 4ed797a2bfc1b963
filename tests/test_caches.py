"""`fuse` on decoders with caches: past keys and values as the operator's own, heads unrepeated."""

import numpy as np
import pytest
from graphs import write

from helpers import fuse, graph

# One head of keys and values for two of queries, of width four; TorchScript's way of repeating it.
DECODER = """
<ir_version: 8, opset_import: ["" : 17]>
decoder (float[batch,length,8] given, float[batch,1,past,4] past_key,
         float[batch,1,past,4] past_value, int64[batch,total] attention_mask)
=> (float[batch,length,8] y, float[batch,1,total,4] present_key,
    float[batch,1,total,4] present_value)
<float low = {-10000.0}, int64 i1 = {1}, float lowest = {-3.4028234663852886e38}, float one = {1.0}, int64[1] at1 = {1}, int64[1] at2 = {2},
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
