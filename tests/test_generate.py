"""ONNX decoders inside transformers' `generate`: the same tokens, greedily and by beams."""

import numpy as np
import pytest
import tiny_generators
import torch

from helpers import export, fuse, graph, models
from helpers.generate import inside, timing

STEPS = 64
WAYS = {
    "cpu": {"target": "cpu"},
    "portable": {"target": "portable"},
    "cpu in place": {"target": "cpu", "cache": "in-place"},
    "portable in place": {"target": "portable", "cache": "in-place"},
}
SAMPLE = [("gpt2", "cpu"), ("gpt2", "portable in place"), ("t5", "cpu in place")]


def exported(name, folder):
    model = tiny_generators.load(name)
    return model, export.for_generation(model, tiny_generators.prompt(name, 2), folder)


def fused(made, folder, way):
    """The same files, all fused; the caches as `way` says."""
    paths = {}
    for part in ("decode", "prefill", "encoder"):
        if path := getattr(made, part):
            options = WAYS[way] if part == "decode" else {"target": WAYS[way]["target"]}
            paths[part] = folder / f"{part}_fused.onnx"
            done = fuse.fuse(path, paths[part], **options)
            assert done.fused == done.sites
            assert done.held
    return paths


def same_tokens(model, other, name, steps, batches, beams=(1, 4)):
    """Assert it, and that there are different tokens."""
    different = set()
    for rows in batches:
        given = tiny_generators.prompt(name, rows)
        for count in beams:
            wanted = tiny_generators.sequences(model, steps, given, num_beams=count)
            found = tiny_generators.sequences(other, steps, given, num_beams=count)
            assert torch.equal(wanted, found), (name, rows, count)
            different |= {*wanted.flatten().tolist()}
    assert len(different) > 3


def all_the_way(name, way, folder, batches):
    model, made = exported(name, folder)
    paths = fused(made, folder, way)
    if way.endswith("in place"):
        assert graph.buffers(graph.load(paths["decode"])) is not None
    same_tokens(model, inside.model_of(model, **paths), name, STEPS, batches)


@pytest.mark.parametrize(("name", "way"), SAMPLE)
def test_the_same_tokens(name, way, tmp_path):
    all_the_way(name, way, tmp_path, [2])


@pytest.mark.every
@pytest.mark.parametrize("name", tiny_generators.KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_of_all(name, way, tmp_path):
    all_the_way(name, way, tmp_path, [1, 2, 3])


def test_what_else_generate_does(tmp_path):
    """Sampling from the same seed, several sequences of one prompt, and no step too many."""
    model, made = exported("gpt2", tmp_path)
    other = inside.model_of(model, made.decode)
    given = tiny_generators.prompt("gpt2", 2)
    wanted, found = (
        tiny_generators.sequences(one, 8, given, num_beams=4, num_return_sequences=2)
        for one in (model, other)
    )
    assert wanted.shape == (4, 8)
    assert torch.equal(wanted, found)
    told = []
    for one in (model, other):
        torch.manual_seed(0)
        told.append(one.generate(**given, max_new_tokens=12, do_sample=True, top_k=20))
    assert torch.equal(*told)


def test_what_is_timed_is_the_same(tmp_path, monkeypatch):
    """On ONNX Runtime and PyTorch, by each cache: logits behind a prompt, and of it, each time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    sizes = {"num_hidden_layers": 2, "n_embd": 48, "n_head": 4, "bos_token_id": 0}
    sizes |= {"vocab_size": tiny_generators.WORDS, "eos_token_id": 0}
    model = models.load("gpt2", **sizes).model
    made = export.for_generation(model, tiny_generators.prompt("gpt2", 2), tmp_path)
    in_place = tmp_path / "in_place.onnx"
    fuse.fuse(made.decode, in_place, cache="in-place", last_logits=True)
    runs = [timing.onnx(str(made.decode)), timing.onnx(str(in_place))]
    runs += [timing.pytorch("gpt2", static=static, **sizes) for static in (False, True)]
    for following in (5, 0):
        arrays = timing.given(2, 7, following, tiny_generators.WORDS)
        arrays["attention_mask"][0, :3] = 0
        ids = np.concatenate([arrays["input_ids"], arrays["next_ids"]], axis=1)
        mask = np.pad(arrays["attention_mask"], ((0, 0), (0, following)), constant_values=1)
        positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
        with torch.no_grad():
            wanted = model(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=positions,
            ).logits[:, -1]
        for run in runs:
            for _ in range(3):
                np.testing.assert_allclose(run(arrays)["logits"], wanted.numpy(), atol=1e-5)


def test_one_sample_alone_is_refused(tmp_path):
    given = tiny_generators.prompt("gpt2", 1)
    with pytest.raises(ValueError, match="two samples or more, found 1"):
        export.for_generation(tiny_generators.load("gpt2"), given, tmp_path)
