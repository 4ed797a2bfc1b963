"""T5 out of ONNX files in dynamic 8 bits: their weights, by transformers' names, in float32."""

import numpy as np
import onnx
import pytest
import torch

from helpers import files, models
from helpers.models import dynamic_int8

TENSOR = onnx.TensorProto


@pytest.fixture
def quantised(tmp_path):
    """A layer (4 → 3) behind a look-up, in 8 bits by ONNX Runtime's own quantize_dynamic."""
    from onnxruntime.quantization import quantize_dynamic

    random = np.random.default_rng(0)
    arrays = {
        "enc.table.weight": random.normal(size=(7, 4)).astype(np.float32),
        "enc.norm.weight": random.normal(size=4).astype(np.float32),
        "onnx::MatMul_9": random.normal(size=(4, 3)).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("Gather", ["enc.table.weight", "ids"], ["rows"], "/enc/table/Gather"),
        onnx.helper.make_node("Mul", ["rows", "enc.norm.weight"], ["scaled"], "/enc/norm/Mul"),
        onnx.helper.make_node(
            "MatMul", ["scaled", "onnx::MatMul_9"], ["y"], "/enc/block.0/q/MatMul"
        ),
    ]
    made = onnx.helper.make_graph(
        nodes,
        "small",
        [onnx.helper.make_tensor_value_info("ids", TENSOR.INT64, ["n"])],
        [onnx.helper.make_tensor_value_info("y", TENSOR.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(made, opset_imports=opset, ir_version=10), tmp_path / "a.onnx")
    quantize_dynamic(tmp_path / "a.onnx", tmp_path / "a8.onnx")
    return tmp_path / "a8.onnx", arrays


def test_weights_come_back_by_their_names(quantised):
    path, arrays = quantised
    found = dynamic_int8.read(path)
    assert set(found) == {"enc.table.weight", "enc.norm.weight", "enc.block.0.q.weight"}
    np.testing.assert_array_equal(found["enc.norm.weight"], arrays["enc.norm.weight"])
    for name, exact in (
        ("enc.table.weight", arrays["enc.table.weight"]),
        ("enc.block.0.q.weight", arrays["onnx::MatMul_9"].T),
    ):
        assert found[name].dtype == np.float32
        step = np.ptp(exact) / 254  # symmetric ones have fewer steps
        np.testing.assert_allclose(found[name], exact, atol=2 * step)
        assert np.abs(found[name] - exact).max() > 0


def test_a_file_without_products_in_8_bits_is_refused(quantised):
    path, _ = quantised
    with pytest.raises(files.BadInput, match=r"expected products in 8 bits, .* found none"):
        dynamic_int8.read(path.with_name("a.onnx"))


def test_the_published_t5_writes_titles():
    study = models.load("t5")
    assert study.source == (
        "a flan-t5-small distilled to write titles, its 8-bit weights in float32 again, from the"
        " package traceforge_title_model, its SHA-256 checked"
    )
    texts = [
        "summarize agent step: Opened the settings, read the logs of the service, saw that the"
        " database refused connections after ten minutes, and restarted it with a larger pool.",
        "summarize agent step: Installed the pinned packages, then ran the notebooks.",
    ]
    inputs = study.processor(texts, return_tensors="pt", padding=True)
    assert inputs["input_ids"].shape[1] > 30  # not cut to 20, as the tokenizer's file has it
    with torch.no_grad():
        tokens = study.model.generate(**inputs, max_new_tokens=24, num_beams=4)
    titles = study.processor.batch_decode(tokens, skip_special_tokens=True)
    assert "database" in titles[0]
    assert "packages" in titles[1]
