"""T5 out of ONNX files in dynamic 8 bits, for checkpoints that are published in them alone.

In such a file, which ONNX Runtime's ``quantize_dynamic`` makes of a TorchScript export, a product
by a weight is a MatMulInteger that is named after its layer (`/decoder/block.0/…/q/MatMul_quant`);
the weight itself is named after nothing. What a Gather reads has the name of its parameter, with
`_quantized` behind it. A weight comes back as it was rounded: (integer - zero point) × scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from helpers import files, graph

if TYPE_CHECKING:
    import transformers

PRODUCT, WEIGHT, INTEGERS = "/MatMul_quant", ".weight", "_quantized"
# What the files call their own part of the model, and where that is in it.
PARTS = {"encoder.onnx": ("enc.", "encoder."), "decoder.onnx": ("m.", "")}
HEAD_SIZE = 64  # of every T5 that was published, which its weights alone do not tell


def read(path: Path) -> dict[str, np.ndarray]:
    """The weights in the file at `path` in float32, by the names of their parameters.

    A product's is (out, in), as ``torch.nn.Linear`` has it. Raises `files.BadInput` where the file
    is no ONNX, or has no product in 8 bits.
    """
    model = graph.load(path)
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}

    def restored(name: str) -> np.ndarray:
        integers, zero = (arrays[f"{name}{end}"] for end in (INTEGERS, "_zero_point"))
        return (integers.astype(np.float32) - zero) * arrays[f"{name}_scale"]

    found = {name: array for name, array in arrays.items() if name.endswith(WEIGHT)}
    for name in arrays:
        if name.endswith(f"{WEIGHT}{INTEGERS}"):
            found[name.removesuffix(INTEGERS)] = restored(name.removesuffix(INTEGERS))
    products = [node for node in graph.nodes(model) if _is_product(node)]
    for node in products:
        layer = node.name.removesuffix(PRODUCT).strip("/").replace("/", ".")
        found[f"{layer}{WEIGHT}"] = restored(node.inputs[1].name.removesuffix(INTEGERS)).T
    if not products:
        raise files.BadInput(
            f"{path}: expected products in 8 bits, MatMulInteger nodes whose names end with"
            f" {PRODUCT}, found none; install or fetch it again"
        )
    return found


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "MatMulInteger" and (node.name or "").endswith(PRODUCT)


def t5(
    folder: Path, attn_implementation: str = "sdpa"
) -> tuple[transformers.T5ForConditionalGeneration, transformers.PreTrainedTokenizerFast]:
    """The T5 whose encoder.onnx and decoder.onnx are in `folder`, in float32, and its tokenizer.

    It is one of those whose feed-forward layer is gated and whose output layer is not the
    embeddings, as T5 v1.1 and Flan-T5 are. Raises `files.BadInput` where it is another.
    """
    import torch
    import transformers

    state = {}
    for name, (own, place) in PARTS.items():
        state |= {place + key.removeprefix(own): one for key, one in read(folder / name).items()}
    words, width = state["shared.weight"].shape
    layers = [_layers(state, side) for side in ("encoder", "decoder")]
    config = transformers.T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=HEAD_SIZE,
        num_heads=len(state["encoder.block.0.layer.0.SelfAttention.q.weight"]) // HEAD_SIZE,
        d_ff=len(state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]),
        num_layers=layers[0],
        num_decoder_layers=layers[1],
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,  # which transformers reads as: outputs are not scaled
    )
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    # transformers ties the output layer to the embeddings, whatever the configuration says
    model.lm_head = torch.nn.Linear(width, words, bias=False, device="meta")
    state = {name: torch.tensor(one) for name, one in state.items()}
    for side in ("encoder", "decoder"):
        state[f"{side}.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = str(folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=words, **special)
    tokenizer.backend_tokenizer.no_truncation()  # the file has one, of 20 tokens
    return model.eval(), tokenizer


def _layers(state: Mapping[str, np.ndarray], side: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{side}.block.")})
