"""Small graphs written as text, for the tests."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

WEIGHTS = dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8)) | {"bq": (8,), "bv": (8,), "bo": (8,)}

# One post-norm encoder layer's attention, two heads of width four, as TorchScript writes it.
ATTENTION = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[batch,length,8] given) => (float[batch,length,8] y)
{
  [n_first] x = LayerNormalization <axis = -1> (given, gamma, beta)
  [n_q] q0 = MatMul (x, wq)
  [n_q_bias] q1 = Add (bq, q0)
  [n_q_heads] q2 = Reshape (q1, heads)
  [n_q_transpose] q = Transpose <perm = [0, 2, 1, 3]> (q2)
  [n_k] k0 = MatMul (x, wk)
  [n_k_heads] k1 = Reshape (k0, heads)
  [n_k_transpose] k = Transpose <perm = [0, 2, 3, 1]> (k1)
  [n_v] v0 = MatMul (x, wv)
  [n_v_bias] v1 = Add (bv, v0)
  [n_v_heads] v2 = Reshape (v1, heads)
  [n_v_transpose] v = Transpose <perm = [0, 2, 1, 3]> (v2)
  [n_scores] s0 = MatMul (q, k)
  [n_scale] s1 = Mul (s0, half)
  [n_softmax] p = Softmax <axis = -1> (s1)
  [n_context] c0 = MatMul (p, v)
  [n_merge] c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
  [n_flat] c2 = Reshape (c1, flat)
  [n_o] o0 = MatMul (c2, wo)
  [n_o_bias] o1 = Add (bo, o0)
  [n_residual] r = Add (x, o1)
  [n_norm] y = LayerNormalization <axis = -1> (r, gamma, beta)
}
"""


def write(path: Path, text: str = ATTENTION, **changed: np.ndarray) -> Path:
    """The graph `text`, with seeded weights for the names of `WEIGHTS` that it reads."""
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    values = {name: random.normal(size=shape) for name, shape in WEIGHTS.items()}
    values |= {"gamma": np.full(8, 1.5), "beta": np.full(8, 0.25), "half": np.array(0.5)}
    arrays = {name: value.astype(np.float32) for name, value in values.items()}
    arrays |= {"heads": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8])}
    arrays |= changed
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items() if name in read
    )
    onnx.checker.check_model(proto, full_check=True)
    ir.save(ir.from_proto(proto), path)
    return path
