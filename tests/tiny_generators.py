"""Generators of transformers, small enough to be exported in seconds: two layers, random weights.

The weights are large and the output layer is not tied, so that tokens vary: a random model with a
tied one repeats its last token, and then equal tokens say little. (T5 ties it whatever its
configuration says.)
"""

import torch
import transformers

WORDS, PADDING, START, END = 120, 0, 1, 2
_SPECIAL = {"pad_token_id": PADDING, "bos_token_id": START, "eos_token_id": END}
_UNTIED = {"vocab_size": WORDS, "tie_word_embeddings": False, **_SPECIAL}
_GROUPED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_BOTH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": START,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
_WHISPER = {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 128}
_WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
_NEOX = {name: size for name, size in _GROUPED.items() if name not in ("num_key_value_heads",)}

# By name: the class, its configuration, and what that is given.
KINDS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 64},
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEOX),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"decoder_start_token_id": PADDING}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BOTH),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _BOTH | _WHISPER),
}


SCALE = {"t5": 2, "whisper": 1}  # of their weights, others' is 5: these would repeat themselves


def load(name: str) -> transformers.PreTrainedModel:
    model, config, sizes = KINDS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**_UNTIED, **sizes))
    output = made.get_output_embeddings()
    output.weight = torch.nn.Parameter(torch.randn(output.weight.shape))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SCALE.get(name, 5))
    return made.eval()


def prompt(name: str, rows: int, length: int = 9) -> dict[str, torch.Tensor]:
    """What `generate` takes: tokens (rows, length), padded on the left in all rows but the last, or
    for speech, features."""
    random = torch.Generator().manual_seed(3)
    if name == "whisper":
        return {"input_features": torch.randn(rows, 16, 100, generator=random)}
    ids = torch.randint(5, WORDS - 1, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : 3 + row] = 0
    return {"input_ids": ids.where(mask > 0, PADDING), "attention_mask": mask}


def sequences(
    model: transformers.PreTrainedModel, steps: int, given: dict[str, torch.Tensor], **options
) -> torch.Tensor:
    """What `model` generates in so many steps, (rows, steps), without what it was given."""
    with torch.no_grad():
        told = model.generate(
            **given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options
        )
    return told[:, -steps:]
