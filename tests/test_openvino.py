"""Target `openvino`: what its plugin hands back is written out, and computes the same."""

import json

import numpy as np
import onnx
import pytest

from helpers import files, fuse, graph
from helpers.__main__ import main
from helpers.files.sessions import _openvino_device

try:  # optional, what the target is for
    import openvino
except ModuleNotFoundError:
    openvino = None
try:  # optional, not built for all systems
    import onnxruntime_ep_openvino as plugin
except ModuleNotFoundError:
    plugin = None

HEADS = "q_num_heads = 4, kv_num_heads = 4"
GROUPED = "q_num_heads = 4, kv_num_heads = 2"
# By name: inputs beside x (batch, rows, 16), what becomes of it (Q, K, V are made of x), outputs.
FORMS = {
    "three axes": ("", f"y = Attention <{HEADS}> (q, k, v)", ""),
    "scaled": ("", f"y = Attention <{HEADS}, scale = 0.7> (q, k, v)", ""),
    "capped": ("", f"y = Attention <{HEADS}, softcap = 0.5> (q, k, v)", ""),
    "grouped": ("", f"y = Attention <{GROUPED}> (q, k2, v2)", ""),
    "causal": ("", f"y = Attention <{HEADS}, is_causal = 1> (q, k, v)", ""),
    "bool mask": (", bool[batch,1,rows,rows] mask", f"y = Attention <{HEADS}> (q, k, v, mask)", ""),
    "mask of floats": (
        ", bool[batch,1,rows,rows] mask",
        f"b = Where (mask, zero, none) y = Attention <{HEADS}> (q, k, v, b)",
        "",
    ),
    "capped and masked": (
        ", bool[batch,1,rows,rows] mask",
        f"b = Where (mask, zero, lowest) y = Attention <{HEADS}, softcap = 0.5> (q, k, v, b)",
        "",
    ),
    "bias": (
        "",
        f"t = Transpose <perm = [0, 1, 3, 2]> (v4) b = MatMul (v4, t)"
        f" y = Attention <{HEADS}> (q, k, v, b)",
        "",
    ),
    "four axes": ("", "z = Attention (q4, k4, v4) y = Identity (z)", ""),
    "weights": (
        "",
        "z, kk, vv, w = Attention <qk_matmul_output_mode = 3> (q4, k4, v4) y = Identity (z)",
        ", float[batch,4,rows,rows] w",
    ),
    "past": (
        ", float[batch,4,past,4] pk, float[batch,4,past,4] pv",
        "y, kk, vv = Attention <is_causal = 1> (q4, k4, v4, , pk, pv)",
        ", float[batch,4,all,4] kk, float[batch,4,all,4] vv",
    ),
    "rotated": (
        ", float[batch,rows,2] cos, float[batch,rows,2] sin",
        "r = RotaryEmbedding (q4, cos, sin) y = Attention (r, k4, v4)",
        "",
    ),
    "rotated by a table": (
        ", int64[batch,rows] at",
        "r = RotaryEmbedding (q4, table, table, at) y = Attention (r, k4, v4)",
        "",
    ),
    "RMS": ("", f"n = RMSNormalization (q, ones) y = Attention <{HEADS}> (n, k, v)", ""),
    "gelu": (
        "",
        f"n = com.microsoft.FastGelu (q, ones) y = Attention <{HEADS}> (n, k, v)",
        "",
    ),
}
BATCH, ROWS, PAST = 2, 5, 3


def source(path, form):
    """The model of that form at `path`, as it is given to `fuse`."""
    given, middle, more = FORMS[form]
    split = "".join(
        f"{one}3 = Reshape ({one}, heads) {one}4 = Transpose <perm = [0, 2, 1, 3]> ({one}3) "
        for one in "qkv"
    )
    four = "float[batch,4,rows,4] y" if "4" in middle.split(">")[-1] else "float[batch,rows,16] y"
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    tiny (float[batch,rows,16] x{given}) => ({four}{more})
    <float zero = {{0}}, float none = {{-inf}}, float lowest = {{-3.4028234663852886e38}},
     int64[4] heads = {{0, 0, 4, 4}}>
    {{ q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) k2 = MatMul (x, wk2)
       v2 = MatMul (x, wv2) {split} {middle} }}"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    shapes = {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wk2": (16, 8), "wv2": (16, 8)}
    shapes |= {"table": (ROWS, 2), "ones": (16,)}
    for name, shape in shapes.items():
        array = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def feed(model):
    """Arrays for what `model` is given; the first row of the second sample has no key."""
    random = np.random.default_rng(1)
    sizes = {"batch": BATCH, "rows": ROWS, "past": PAST}
    arrays = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[dim.value] for dim in value.shape]
        if value.dtype.is_floating_point():
            arrays[value.name] = random.normal(size=shape).astype(np.float32)
        else:
            drawn = random.integers(0, ROWS if value.name == "at" else 2, shape)
            arrays[value.name] = drawn.astype(value.dtype.numpy())
    if "mask" in arrays:
        arrays["mask"][:, :, :, 0] = True
        arrays["mask"][1, 0, 0] = False
    return arrays


def run(session, arrays):
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_it_is_written_out(tmp_path, form):
    path = source(tmp_path / "in.onnx", form)
    done = fuse.fuse(path, tmp_path / "out.onnx", target="openvino")
    assert (done.held, done.sites, done.fused, done.handed_back) == (True, 1, 0, []), str(done)
    assert len(done.left) == 1
    assert "written out" in done.left[0]
    made = graph.load(tmp_path / "out.onnx")
    kinds = set(graph.counts(made))
    assert "Softmax" in kinds
    assert not kinds & {
        "Attention",
        "RotaryEmbedding",
        "RMSNormalization",
        "com.microsoft.FastGelu",
    }
    arrays = feed(made)
    expected, found = (
        run(files.session(tmp_path / f"{name}.onnx"), arrays) for name in ("in", "out")
    )
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        if name != "w":
            np.testing.assert_allclose(found[name], array, atol=1e-5)
    if "mask" in arrays:
        assert np.abs(found["y"][1, 0]).max() == 0
    if openvino is not None:
        kernels = {"rotated": "RoPE", "rotated by a table": "RoPE", "RMS": "RMS"}
        _is_one_kernel(tmp_path / "out.onnx", arrays, expected, kernels.get(form, "Subgraph"))
    if plugin is not None and offered():
        session = files.session(tmp_path / "out.onnx", openvino={})
        taken = session.get_provider_graph_assignment_info()
        assert {part.ep_name for part in taken} == {plugin.get_ep_name()}


def offered():
    """Whether the plugin offers this machine's CPU: on those of some makers it does not."""
    try:
        return _openvino_device() is not None
    except RuntimeError:
        return False


def _is_one_kernel(path, arrays, expected, kernel):
    """OpenVINO computes the same, with that kernel, and attention as one."""
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", exact)
    named = {value.get_any_name() for value in compiled.inputs}
    found = compiled({name: arrays[name] for name in named})
    for value, array in found.items():
        [name] = value.names & {*expected}
        if name != "w":
            np.testing.assert_allclose(array, expected[name], atol=1e-4)
    nodes = compiled.get_runtime_model().get_ops()
    ran = {node.get_rt_info()["layerType"].astype(str) for node in nodes}
    if "w" not in expected:  # which another reads
        assert "Softmax" not in ran
        assert {"Subgraph", kernel} <= ran


def test_what_is_handed_back_all_the_same_is_said(tmp_path, monkeypatch, capsys):
    text = FORMS["weights"][1].replace("mode = 3", "mode = 1")
    monkeypatch.setitem(FORMS, "scores", ("", text, FORMS["weights"][2]))
    path = source(tmp_path / "in.onnx", "scores")
    command = ["fuse", str(path), str(tmp_path / "out.onnx"), "--target", "openvino", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["sites"], answer["fused"]) == (1, 1)
    assert answer["left"][0].endswith(
        "hands it back to ONNX Runtime, and its scores are read elsewhere"
    )
    assert answer["handed_back"] == ["Attention × 1"]
