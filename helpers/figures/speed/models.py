"""The models whose speed is measured, of base size, with their inputs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from helpers import models

Arrays = dict[str, np.ndarray]


def speech(batch: int, length: int) -> Arrays:
    """input_values (batch, samples), of `length` seconds."""
    return {"input_values": models.speech(length, batch).astype(np.float32)}


def text(batch: int, length: int, types: bool = False) -> Arrays:
    """input_ids, attention_mask and with `types` token_type_ids, each (batch, length).

    The first row is full, and those after it are padded on the right, the last to about half.
    """
    ids = np.random.default_rng(0).integers(5, 30_000, (batch, length))
    full = length - np.arange(batch) * length // (2 * batch)
    mask = (np.arange(length) < full[:, None]).astype(np.int64)
    arrays = {"input_ids": ids, "attention_mask": mask}
    return arrays | ({"token_type_ids": np.zeros_like(ids)} if types else {})


def image(batch: int, length: int) -> Arrays:
    """pixel_values (batch, 3, length, length)."""
    values = np.random.default_rng(0).normal(size=(batch, 3, length, length))
    return {"pixel_values": values.astype(np.float32)}


def mel(batch: int, length: int) -> Arrays:
    """input_features (batch, 80, frames), 100 frames a second."""
    values = np.random.default_rng(0).normal(size=(batch, 80, 100 * length))
    return {"input_features": values.astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Model:
    """One model: its published configuration, what it reads, and its two lengths in `unit`.

    With `published`, a name of `models.ARCHITECTURES`, it has the published weights, and gives a
    sentence's embedding; all others are stand-ins.
    `config` is where the configuration differs from the default of the class `model`. `model_type`
    is the one under which ONNX Runtime's optimizer fuses most of it. A model that takes one length
    alone is made for each, by `fixed`: what a length changes in its configuration.
    """

    repository: str
    model: str
    inputs: Callable[[int, int], Arrays]
    lengths: tuple[int, ...]
    unit: str
    model_type: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Callable[[int], Mapping[str, Any]] | None = None
    heads: int = 12
    width: int = 768
    published: str = ""

    def pytorch(self, length: int) -> dict[str, Any]:
        """The arguments with which `models.pytorch` makes it for `length`."""
        if self.published:
            return {"name": self.published, "pooled": True}
        own = self.fixed(length) if self.fixed else {}
        return {"name": self.model, "config": {**self.config, **own}}

    def together(self, lengths: Sequence[int]) -> list[list[int]]:
        """The `lengths` in groups that one graph takes."""
        return [[length] for length in lengths] if self.fixed else [[*lengths]]

    def module(self, length: int) -> torch.nn.Module:
        arguments = self.pytorch(length)
        if self.published:
            return models.load(arguments.pop("name"), **arguments).model
        return models.stand_in(*arguments.values())


T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}

WHISPER_SMALL = {  # of Whisper's sizes the one as wide and as deep as the base size of the others
    "d_model": 768,
    "encoder_layers": 12,
    "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
}

MODELS = {
    "wav2vec2": Model(
        "facebook/wav2vec2-base-960h", "Wav2Vec2ForCTC", speech, (5, 10), "s", "clip"
    ),
    "bert": Model(
        "google-bert/bert-base-uncased",
        "BertModel",
        functools.partial(text, types=True),
        (128, 512),
        "tokens",
        "bert",
    ),
    "vit": Model(  # its second size is that of google/vit-base-patch16-384
        "google/vit-base-patch16-224",
        "ViTModel",
        image,
        (224, 384),
        "pixels",
        "vit",
        fixed=lambda length: {"image_size": length},
    ),
    "whisper": Model(  # 30 s is what the published model takes; 10 s is the same, cut shorter
        "openai/whisper-small",
        "models.whisper.modeling_whisper.WhisperEncoder",
        mel,
        (10, 30),
        "s",
        "bart",
        WHISPER_SMALL,
        fixed=lambda length: {"max_source_positions": 50 * length},
    ),
    "t5": Model("google-t5/t5-base", "T5EncoderModel", text, (128, 512), "tokens", "t5", T5_BASE),
    "modernbert": Model(
        "answerdotai/ModernBERT-base", "ModernBertModel", text, (128, 512), "tokens", "bert"
    ),
}
