"""Decoders in ONNX inside transformers' own `generate`.

Greedy search, beams, sampling, stopping and what else `generate` does are transformers'. What it
calls at each step, `forward`, runs the ONNX files, and their caches stay there: transformers holds
an object that knows how long they are, and which rows a search over beams goes on with.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from helpers import files
from helpers.generate.decoder import Arrays, Cache, Decoder

GIVEN = "input."  # what transformers' exporter puts before the name of a cache that goes in
ENCODED = "encoder_outputs.last_hidden_state"
CPU = torch.device("cpu")


def model_of(
    model: transformers.PreTrainedModel,
    decode: str | Path,
    *,
    prefill: str | Path | None = None,
    encoder: str | Path | None = None,
    threads: int = 0,
) -> transformers.PreTrainedModel:
    """A model whose `generate` is that of `model`, and whose `forward` runs ONNX files.

    `decode` takes caches and gives them, growing or in place (`helpers.fuse.in_place`). A decoder
    that begins with empty caches needs nothing else. An encoder-decoder needs its `encoder`, and
    the `prefill`, which makes the caches of cross-attention. Inputs have the names of `forward`'s
    arguments, and caches those that transformers' exporter gives (`export.for_generation`). Weights
    of `model` are not used. `threads` is for one operator, as `files.session` has it. Raises
    `files.BadInput` where the files do not fit together.
    """
    own = _Files(Decoder(decode, threads=threads), prefill, encoder, threads)
    kind = type(model)
    members = {
        "forward": functools.wraps(kind.forward)(_forward),
        "device": property(lambda _: CPU),
        "dtype": property(lambda _: torch.float32),
        "get_encoder": lambda self, *_, **__: self.onnx.encoder,
        "_prepare_cache_for_generation": _prepare_cache,
    }
    with torch.device("meta"):
        made = type(f"Onnx{kind.__name__}", (kind,), members)(copy.deepcopy(model.config))
    made.generation_config = copy.deepcopy(model.generation_config)
    made.onnx = own
    return made.eval()


class Caches(transformers.Cache):
    """Caches that stay with the ONNX files; what `generate` asks of them."""

    is_compileable = False
    is_initialized = True

    def __init__(self, cache: Cache, cross: Arrays) -> None:
        super().__init__(layers=[])
        self.cache, self.cross = cache, cross

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = indices.numpy()
        if not np.array_equal(rows, np.arange(_rows(self.cache.arrays))):
            self.cache = self.cache.reordered(rows)
            self.cross = {name: array[rows] for name, array in self.cross.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = np.arange(_rows(self.cache.arrays)).repeat(repeats)
        self.batch_select_indices(torch.from_numpy(rows))


class _Files:
    """The sessions of one model."""

    def __init__(
        self,
        decoder: Decoder,
        prefill: str | Path | None,
        encoder: str | Path | None,
        threads: int,
    ) -> None:
        self.decoder = decoder
        self.prefill = files.session(prefill, threads=threads) if prefill else None
        self.encoder = _Encoder(encoder, threads) if encoder else None
        self.one_a_step = any(
            isinstance(value.shape[-1], int)
            for name, value in decoder.inputs.items()
            if name.endswith("input_ids")
        )
        self.cross: dict[str, str] = {}  # for a cache that no step changes, the prefill's output
        if self.prefill:
            made = {value.name for value in self.prefill.get_outputs()}
            others = set(decoder.inputs) - set(decoder.given)
            found = {name: name.removeprefix(GIVEN) for name in others}
            self.cross = {name: output for name, output in found.items() if output in made}
            lost = [name for name in decoder.given if name.removeprefix(GIVEN) not in made]
            if lost:
                raise files.BadInput(
                    f"{prefill}: expected an output {lost[0].removeprefix(GIVEN)}, which"
                    f" {decoder.opened} takes as {lost[0]}, found {', '.join(sorted(made))}; give"
                    " the prefill and the decode of one export"
                )

    def step(self, given: Arrays, caches: Caches, new: int) -> np.ndarray:
        """The logits of `new` tokens; `caches` have them afterwards."""
        if self.prefill and not caches.cache.length:
            return self._first(given, caches, new)
        names = self.decoder.inputs
        arrays = {name: array for name, array in given.items() if name in names} | caches.cross
        outputs, caches.cache = self.decoder.step(arrays, caches.cache, new)
        return outputs["logits"]

    def _first(self, given: Arrays, caches: Caches, new: int) -> np.ndarray:
        taken = [value.name for value in self.prefill.get_inputs()]
        names = [value.name for value in self.prefill.get_outputs()]
        values = self.prefill.run(names, {name: given[name] for name in taken})
        made = dict(zip(names, values, strict=True))
        caches.cross = {name: made[output] for name, output in self.cross.items()}
        for name, array in caches.cache.arrays.items():
            own = made[name.removeprefix(GIVEN)]
            if self.decoder.buffers:
                array[:, :, :new] = own
            else:
                caches.cache.arrays[name] = own
        caches.cache.length = new
        return made["logits"]


class _Encoder(torch.nn.Module):
    """An encoder's file as the module that `generate` calls once."""

    def __init__(self, path: str | Path, threads: int) -> None:
        super().__init__()
        self.session = files.session(path, threads=threads)
        self.names = [value.name for value in self.session.get_inputs()]
        self.main_input_name = self.names[0]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        first = input_features if input_ids is None else input_ids
        if attention_mask is None:
            attention_mask = torch.ones(first.shape[:2], dtype=torch.long)
        known = {"input_ids": input_ids, "attention_mask": attention_mask}
        known["input_features"] = input_features
        arrays = {name: known[name].numpy() for name in self.names}
        return BaseModelOutput(torch.from_numpy(self.session.run(None, arrays)[0]))


def _prepare_cache(
    self: transformers.PreTrainedModel,
    generation_config: transformers.GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: object,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Have `generate` begin with empty caches of ours: as transformers' method of this name."""
    each = max(generation_config.num_beams, generation_config.num_return_sequences)
    cache = self.onnx.decoder.empty(batch_size * each, max_cache_length)
    model_kwargs["past_key_values"] = Caches(cache, {})


def _forward(
    self: transformers.PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    past_key_values: Caches | None = None,
    encoder_outputs: BaseModelOutput | None = None,
    **given: Any,
) -> CausalLMOutputWithPast | Seq2SeqLMOutput:
    """The logits of all tokens that are given, (B, S, V), or of the last alone if the graph has
    been cut to that; and the caches, which have them too."""
    decoding = given.get("decoder_input_ids")
    tokens = input_ids if decoding is None else decoding
    rows, new = tokens.shape
    caches = past_key_values
    if caches is None:
        caches = Caches(self.onnx.decoder.empty(rows, new), {})
    known = {name: tensor for name, tensor in given.items() if torch.is_tensor(tensor)}
    known["input_ids" if decoding is None else "decoder_input_ids"] = tokens
    if encoder_outputs is not None:
        known[ENCODED] = encoder_outputs[0]
    own = "attention_mask" if decoding is None else "decoder_attention_mask"
    length = caches.get_seq_length() + new
    if known.get(own) is None:
        known[own] = torch.ones((rows, length), dtype=torch.long)
    if known.get("position_ids") is None:
        known["position_ids"] = (known[own].cumsum(-1) - 1).clamp(min=0)[:, -new:]
    steps = [slice(at, at + 1) for at in range(new)] if self.onnx.one_a_step else [slice(None)]
    logits = []
    for step in steps:
        part = {name: _part(name, tensor, step, length - new) for name, tensor in known.items()}
        count = 1 if self.onnx.one_a_step else new
        logits.append(self.onnx.step(part, caches, count))
    told = torch.from_numpy(np.concatenate(logits, axis=1))
    if decoding is None:
        return CausalLMOutputWithPast(logits=told, past_key_values=caches)
    return Seq2SeqLMOutput(logits=told, past_key_values=caches)


def _part(name: str, tensor: torch.Tensor, step: slice, past: int) -> np.ndarray:
    """What one step of several is given of an input: the tokens of `step`, the mask up to them."""
    if step.start is None:
        return tensor.numpy()
    if name in ("input_ids", "decoder_input_ids", "position_ids"):
        return tensor[:, step].numpy()
    if name == "decoder_attention_mask":
        return tensor[:, : past + step.stop].numpy()
    return tensor.numpy()


def _rows(arrays: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(arrays.values())))
