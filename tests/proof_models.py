"""Small models for the self-test of `compare`, what they are exported as, and feeds of its own.

The feeds are longer than any window or bucket of the model and padded on either side. They are made
of what the test knows of a model, without `helpers.feeds`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import compose, helper

from helpers import export, files, graph
from helpers.graph import repairs
from helpers.models.small import ARCHITECTURES, Small
from helpers.quiet import quiet

Arrays = dict[str, np.ndarray]
PAST, NEW = 70, 60  # keys in a cache, and tokens after them

_TEXT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 16}


def _text() -> dict[str, torch.Tensor]:
    return ARCHITECTURES["BERT"].inputs()


@dataclass(frozen=True)
class Study:
    """One model of the self-test. `longest` is the length of the test's own feeds."""

    small: Small
    longest: int = 160
    attention: str = "sdpa"
    cache: bool = False  # exported with past keys and values as inputs
    merged: bool = False  # both exports, with a cache and without, as branches of an If
    routes: tuple[str, ...] = tuple(export.ROUTES)


_CACHED = Small("Qwen3ForCausalLM", _GROUPED, _text)
STUDIES = {
    **{
        name: Study(small, 160 if name in ("ModernBERT", "Qwen3", "T5", "DeBERTa-v2") else 60)
        for name, small in ARCHITECTURES.items()
    },
    "Mistral, window 96": Study(
        Small("MistralForCausalLM", _GROUPED | {"sliding_window": 96, "use_cache": False}, _text)
    ),
    "Gemma 2, window 24": Study(
        Small(
            "Gemma2ForCausalLM",
            _GROUPED
            | {
                "sliding_window": 24,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": None,
                "query_pre_attn_scalar": 16,
                "use_cache": False,
            },
            _text,
        ),
        attention="eager",
    ),
    "ModernBERT, window 128": Study(
        Small(
            "ModernBertModel",
            _TEXT
            | {
                "global_attn_every_n_layers": 2,
                "local_attention": 128,
                "cls_token_id": 1,
                "sep_token_id": 2,
            },
            _text,
        )
    ),
    "T5, 32 buckets": Study(
        Small(
            "T5ForConditionalGeneration",
            dict(ARCHITECTURES["T5"].config)
            | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
            ARCHITECTURES["T5"].inputs,
        )
    ),
    "Qwen3, cache": Study(_CACHED, PAST + NEW, cache=True),
    "Qwen3, merged": Study(_CACHED, PAST + NEW, cache=True, merged=True),
}


def _spread(model: torch.nn.Module) -> None:
    """Give weights a size at which attention is far from even: fresh ones hardly tell keys apart,
    and a fault in the scores would not be seen in the outputs."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.div_(module.weight.std())
            elif isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
                weight = module.weight
                fan_in = weight.shape[1 if isinstance(module, torch.nn.Linear) else 0]
                weight.mul_(1.5 / fan_in**0.5 / weight.std())


# ── With a cache ────────────────────────────────────────────────────────────────────────────────


class _Cached(torch.nn.Module):
    """A decoder that takes past keys and values as tensors, and gives them with the new ones."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        cache = transformers.DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(input_ids, attention_mask=attention_mask, past_key_values=cache)
        present = [tensor for one in cache.layers for tensor in (one.keys, one.values)]
        return [out.logits, *present]


def _cache_names(kind: str) -> list[str]:
    return [f"{kind}.{layer}.{what}" for layer in range(2) for what in ("key", "value")]


def export_cached(model: torch.nn.Module, path: Path, route: str, *, past: bool) -> None:
    """With `past` it takes a cache, as after the first step; without, none (as in the first)."""
    names = _cache_names("past_key_values") if past else []
    tokens, total = (3, 8) if past else (8, 8)
    random = torch.Generator().manual_seed(0)
    cache = [torch.randn(2, 2, total - tokens, 16, generator=random) for _ in names]
    ids = torch.randint(5, 119, (2, tokens), generator=random)
    args = (ids, torch.ones(2, total, dtype=torch.int64), cache)
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "total" if past else "length"},
        **{name: {0: "batch", 2: "past"} for name in names},
    }
    outputs = ["logits", *_cache_names("present")]
    common: dict[str, Any] = {
        "input_names": [*axes],
        "output_names": outputs,
        "opset_version": export.ROUTES[route],
    }
    wrapped = _Cached(model).eval()
    if route == "torchscript":
        common["dynamic_axes"] = axes | {name: {0: "batch", 2: "all"} for name in outputs[1:]}
        torch.onnx.export(wrapped, args, path, dynamo=False, **common)
        return
    dims = [dict.fromkeys(one, torch.export.Dim.DYNAMIC) for one in axes.values()]
    common["dynamic_shapes"] = (dims[0], dims[1], dims[2:])
    torch.onnx.export(wrapped, args, path, dynamo=True, external_data=False, **common)


def merge(past: onnx.ModelProto, first: onnx.ModelProto) -> onnx.ModelProto:
    """One model with both as branches of an If on `use_cache_branch`, as optimum writes them."""
    branches, stored = [], []
    for prefix, model in (("past_", past), ("first_", first)):
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        copy = compose.add_prefix(copy, prefix, rename_inputs=False)
        graph = copy.graph
        stored += list(graph.initializer)
        branches.append(helper.make_graph(graph.node, f"{prefix}branch", [], graph.output))
    flag = helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    names = [one.name for one in past.graph.output]
    node = helper.make_node(
        "If",
        ["use_cache_branch"],
        names,
        "by_cache",
        then_branch=branches[0],
        else_branch=branches[1],
    )
    graph = helper.make_graph(
        [node], "merged", [*past.graph.input, flag], list(past.graph.output), stored
    )
    for value in graph.input:
        if value.name == "attention_mask":  # as long as the tokens, or as cache and tokens
            value.type.tensor_type.shape.dim[1].dim_param = "total"
    return helper.make_model(graph, opset_imports=past.opset_import, ir_version=past.ir_version)


def _repair(path: Path) -> None:
    """Mend an export that runs on one sample alone, or masks with one row, as `fuse` does."""
    model = graph.load(path)
    if any(dataclasses.astuple(repairs.repair(model))):
        files.save(model, path)


def exported(study: Study, folder: Path, name: str, route: str) -> list[Path]:
    """The study's files: one; of a merged decoder that with a cache, and that without."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{route}".replace(" ", "-").replace(",", "")
    with quiet():
        if not study.cache:
            path = folder / f"{stem}.onnx"
            if not path.exists():
                model = study.small.make(study.attention)
                _spread(model)
                export.export(model, study.small.inputs(), path, route)
                _repair(path)
            return [path]
        stem = f"{study.small.model}-{route}"  # the merged one has the other's export
        paths = [folder / f"{stem}-past.onnx", folder / f"{stem}-first.onnx"]
        for path, past in zip(paths[: 1 + study.merged], (True, False), strict=False):
            if not path.exists():
                model = study.small.make(study.attention)
                _spread(model)
                export_cached(model, path, route, past=past)
                _repair(path)
        return paths[: 1 + study.merged]


# ── Feeds ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Own:
    """Inputs by name, and where the masks among them have keys: (batch, length) for a length."""

    name: str
    arrays: Arrays
    keys: dict[int, np.ndarray] = field(default_factory=dict)


def feeds(study: Study) -> list[Own]:
    """Two samples of the longest length: not padded, padded on the right and on the left."""
    found = [_feed(study, padding) for padding in ("no", "right", "left")]
    if study.cache:
        found = [one for kind in found for one in _with_cache(kind, study)]
    return found


def _feed(study: Study, padding: str) -> Own:
    random = np.random.default_rng(5)
    arrays, keys = {}, {}
    examples = {name: tensor.numpy() for name, tensor in study.small.inputs().items()}
    wave = "input_values" in examples
    for name, example in examples.items():
        shape = list(example.shape)
        if wave:
            shape[1] = 3200
        elif example.ndim == 2:
            shape[1] = study.longest - 9 * name.startswith("decoder_")
        if "mask" in name:
            value = np.ones(shape, example.dtype)
            cut = shape[1] // 4
            if padding == "right":
                value[1, -cut:] = 0
            elif padding == "left":
                value[1, :cut] = 0
            keys[shape[1]] = value.astype(bool)
        elif example.dtype.kind == "f":
            value = random.normal(size=shape)
        else:
            value = random.integers(3, 119, size=shape)
        arrays[name] = value.astype(example.dtype)
    return Own(f"{padding} padding", arrays, keys)


def _with_cache(one: Own, study: Study) -> list[Own]:
    """`one` cut into a cache and new tokens, and without a cache: that is empty, or where a flag
    says that there is none, has one key that is to be ignored."""
    random = np.random.default_rng(6)
    ids, mask = one.arrays["input_ids"], one.arrays["attention_mask"]
    made = []
    for past, length in ((PAST, PAST), (0, 0), *([(0, 1)] if study.merged else [])):
        cache = {
            name: random.normal(size=(2, 2, length, 16)).astype(np.float32)
            for name in _cache_names("past_key_values")
        }
        tokens = ids[:, past:]
        arrays = {"input_ids": tokens, "attention_mask": mask, **cache}
        if study.merged:
            arrays["use_cache_branch"] = np.array([past > 0])
        keys = {mask.shape[1]: mask.astype(bool), tokens.shape[1]: mask[:, past:].astype(bool)}
        made.append(Own(f"{one.name}, past {past}", arrays, keys))
    return made


def compared(one: Own, outputs: Arrays) -> Arrays:
    """Where each output is compared: at no position that is padding, for that has no key in a
    causal model or a window; a pooled output everywhere, but for what is padded on the left."""
    kept = {}
    for name, out in outputs.items():
        where = np.ones(out.shape, bool)
        rows = one.keys.get(out.shape[1]) if out.ndim > 1 else None
        if out.ndim == 4 and out.shape[2] in one.keys:  # a cache: (batch, heads, keys, width)
            where[:] = one.keys[out.shape[2]][:, None, :, None]
        elif out.ndim > 2 and rows is not None:
            where[~rows] = False
        elif out.ndim == 2 and one.name.startswith("left") and one.keys:
            where[1] = False
        kept[name] = where
    return kept
