"""The architectures that the fusions are shown to serve, each small, with two layers.

No fusion looks at a name: these are for tests and for the table of fused sites. Weights are seeded;
biases and norm weights have values of their own.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from helpers import models

BATCH, LENGTH, VOCABULARY = 2, 12, 120
Tensors = dict[str, torch.Tensor]


def _ids(length: int = LENGTH) -> torch.Tensor:
    """Token ids (batch, length)."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(5, VOCABULARY - 1, (BATCH, length), generator=generator)


def _mask(length: int = LENGTH) -> torch.Tensor:
    """A mask (batch, length); a third of the last row is padding, on the right."""
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    mask[-1, length * 2 // 3 :] = 0
    return mask


def _text() -> Tensors:
    return {"input_ids": _ids(), "attention_mask": _mask()}


def _pair() -> Tensors:
    return _text() | {"decoder_input_ids": _ids(7), "decoder_attention_mask": _mask(7)}


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _audio() -> Tensors:
    return {"input_values": _floats(BATCH, 1600), "attention_mask": _mask(1600)}


def _image() -> Tensors:
    return {"pixel_values": _floats(BATCH, 3, 32, 32)}


def _mel() -> Tensors:
    return {"input_features": _floats(BATCH, 16, 100)}


@dataclass(frozen=True)
class Small:
    """A class of transformers, where its configuration differs from the default, and its inputs.

    `sites` is how many attention sites it has.
    """

    model: str
    config: Mapping[str, Any]
    inputs: Callable[[], Tensors]
    sites: int = 2

    def make(self, attn_implementation: str) -> transformers.PreTrainedModel:
        """The model in evaluation mode; its own attention where it has no other."""
        kind = operator.attrgetter(self.model)(transformers)
        implementation = attn_implementation if kind._supports_sdpa else "eager"
        return models.stand_in(self.model, self.config, implementation)


_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = _SIZES | {
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_AUDIO = _SIZES | {
    "intermediate_size": 96,
    "vocab_size": 32,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

ARCHITECTURES = {
    "wav2vec2": Small("Wav2Vec2ForCTC", _AUDIO, _audio),
    "HuBERT": Small("HubertModel", _AUDIO, _audio),
    "WavLM": Small("WavLMModel", _AUDIO | {"num_buckets": 32, "max_bucket_distance": 80}, _audio),
    "BERT": Small("BertModel", _ENCODER, _text),
    "DistilBERT": Small(
        "DistilBertModel",
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 96,
            "max_position_embeddings": 64,
        },
        _text,
    ),
    "MPNet": Small("MPNetModel", _ENCODER, _text),
    "DeBERTa-v2": Small(
        "DebertaV2Model",
        _ENCODER
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        _text,
    ),
    "ModernBERT": Small(
        "ModernBertModel",
        _ENCODER
        | {
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        _text,
    ),
    "ViT": Small(
        "ViTModel", _SIZES | {"intermediate_size": 96, "image_size": 32, "patch_size": 8}, _image
    ),
    "CLIP text": Small("CLIPTextModel", _ENCODER | {"eos_token_id": VOCABULARY - 1}, _text),
    "Whisper encoder": Small(
        "models.whisper.modeling_whisper.WhisperEncoder",
        _PAIR | {"num_mel_bins": 16, "max_source_positions": 50},
        _mel,
    ),
    "BART": Small("BartModel", _PAIR | {"max_position_embeddings": 64}, _pair, sites=6),
    "T5": Small(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "decoder_start_token_id": 0,
        },
        _pair,
        sites=6,
    ),
    "GPT-2": Small(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 64,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _text,
    ),
    "Qwen3": Small(
        "Qwen3ForCausalLM",
        _ENCODER | {"num_key_value_heads": 2, "head_dim": 16, "use_cache": False},
        _text,
    ),
}
