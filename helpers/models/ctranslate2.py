"""Whisper out of CTranslate2's file format, for checkpoints that are published in it alone.

The format (`model.bin`, version 6, WhisperSpec of revision 3) and its names are those of
CTranslate2's converter: ctranslate2/specs/model_spec.py and whisper_spec.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers import files

if TYPE_CHECKING:
    import transformers

EXPECTED = (6, "WhisperSpec", 3)
END, START, NO_TIMESTAMPS = 50256, 50257, 50362  # tokens of Whisper for English alone
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by number in the file

# For each part of a layer, what it is called here and there; the first product of an attention
# makes several.
_SELF = ("self_attn", "self_attention", ("q_proj", "k_proj", "v_proj"))
_CROSS = ("encoder_attn", "attention", ("q_proj",), ("k_proj", "v_proj"))
_ATTENTIONS = {"encoder": (_SELF,), "decoder": (_SELF, _CROSS)}


def read(path: Path) -> dict[str, np.ndarray]:
    """The variables in the file at `path`, by name, the aliases among them.

    Raises `files.BadInput` where it is no such file, or not a whole one.
    """
    data, at = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal at
        length = number("H")  # with a zero at the end
        at += length
        return data[at - length : at - 1].decode()

    try:
        found, arrays = (number("I"), text(), number("I")), {}
        if found != EXPECTED:
            raise ValueError(f"version, specification and revision {found}")
        for _ in range(number("I")):
            name, rank = text(), number("B")
            shape = [number("I") for _ in range(rank)]
            dtype, size = np.dtype(_TYPES[number("B")]), number("I")
            arrays[name] = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
            at += size
        for _ in range(number("I")):
            alias = text()
            arrays[alias] = arrays[text()]
    except (struct.error, LookupError, ValueError) as error:
        raise files.BadInput(
            f"{path}: expected a file of CTranslate2, of version, specification and revision"
            f" {EXPECTED}, found: {error}; fetch it again"
        ) from None
    return arrays


def whisper(
    folder: Path, attn_implementation: str = "sdpa"
) -> tuple[transformers.WhisperForConditionalGeneration, transformers.WhisperProcessor]:
    """The Whisper for English in `folder`, in float32, and its processor, as transformers has them.

    Raises as `read` does.
    """
    import torch
    import transformers

    arrays = read(folder / "model.bin")
    words, width = arrays["decoder/embeddings/weight"].shape
    sizes = {"d_model": width, "vocab_size": words}
    sizes["num_mel_bins"] = arrays["encoder/conv1/weight"].shape[1]
    for side in _ATTENTIONS:
        sizes[f"{side}_layers"] = _layers(arrays, side)
        sizes[f"{side}_attention_heads"] = int(arrays[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = len(arrays[f"{side}/layer_0/ffn/linear_0/bias"])
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END)
    special["decoder_start_token_id"] = START
    suppressed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = transformers.WhisperConfig(
        **sizes, **special, suppress_tokens=None, begin_suppress_tokens=None
    )
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(config)
    state = {name: torch.from_numpy(array) for name, array in renamed(arrays).items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config.update(
        suppress_tokens=suppressed["suppress_ids"],
        begin_suppress_tokens=suppressed["suppress_ids_begin"],
        no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=False,
        return_timestamps=False,
        max_length=config.max_target_positions,
    )
    mel = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    words = transformers.WhisperTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return model.eval(), transformers.WhisperProcessor(mel, words)


def _layers(arrays: Mapping[str, np.ndarray], side: str) -> int:
    names = (name.split("/") for name in arrays if name.startswith(f"{side}/layer_"))
    return len({layer for _, layer, *rest in names if len(rest) > 1})


def renamed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights in float32, by the names that transformers has for them."""
    found = {}

    def one(new: str, old: str) -> None:
        found[new] = arrays[old].astype(np.float32)

    def norm(new: str, old: str) -> None:
        one(f"{new}.weight", f"{old}/gamma")
        one(f"{new}.bias", f"{old}/beta")

    def product(new: str, old: str, names: tuple[str, ...] = ("",)) -> None:
        for part in ("weight", "bias"):
            several = np.split(arrays[f"{old}/{part}"].astype(np.float32), len(names))
            found.update(
                {f"{new}{name}.{part}": array for name, array in zip(names, several, strict=True)}
            )

    for side, attentions in _ATTENTIONS.items():
        one(f"model.{side}.embed_positions.weight", f"{side}/position_encodings/encodings")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(_layers(arrays, side)):
            layer, old = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            for ours, theirs, *made in attentions:
                for number, names in enumerate(made):
                    product(f"{layer}.{ours}.", f"{old}/{theirs}/linear_{number}", names)
                product(f"{layer}.{ours}.out_proj", f"{old}/{theirs}/linear_{len(made)}")
                norm(f"{layer}.{ours}_layer_norm", f"{old}/{theirs}/layer_norm")
                del found[f"{layer}.{ours}.k_proj.bias"]  # which is 0, and transformers has none
            product(f"{layer}.fc1", f"{old}/ffn/linear_0")
            product(f"{layer}.fc2", f"{old}/ffn/linear_1")
            norm(f"{layer}.final_layer_norm", f"{old}/ffn/layer_norm")
    for name in ("conv1", "conv2"):
        product(f"model.encoder.{name}", f"encoder/{name}")
    one("model.decoder.embed_tokens.weight", "decoder/embeddings/weight")
    found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
    return found
