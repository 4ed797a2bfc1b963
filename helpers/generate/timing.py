"""Decoders in a contender's own process: what is timed are steps behind a prompt, or the prompt.

What a contender is given, B rows, S tokens of prompt, N that follow it:

    input_ids       int64 (B, S)
    attention_mask  int64 (B, S), 0 where padded
    next_ids        int64 (B, N)

A run takes the N tokens one by one, from the caches of the prompt, which the first run has made; of
no tokens, it is the prompt that is run. The tokens are given, and not chosen by the model, so that
what is less precise does the same work. The output is ``logits`` (B, V), of the last position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from helpers import graph
from helpers.generate.decoder import Arrays, Cache, Decoder
from helpers.workers.runtimes import Model, threads


def given(rows: int, length: int, following: int, words: int) -> Arrays:
    """Seeded tokens below `words` for a contender, as the module has it, none padded."""
    random = np.random.default_rng(0)
    ids = random.integers(5, words, (rows, length + following))
    prompt = {"input_ids": ids[:, :length], "attention_mask": np.ones((rows, length), np.int64)}
    return prompt | {"next_ids": ids[:, length:]}


def onnx(path: str) -> Model:
    """The decoder at `path` on ONNX Runtime's CPU provider; its caches are bound, not copied."""
    decoder = Decoder(path, threads=threads())

    def run(arrays: Arrays, cache: Cache, tokens: np.ndarray, keys: np.ndarray) -> tuple:
        positions = np.maximum(keys.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :]
        known = {"input_ids": tokens, "attention_mask": keys, "position_ids": positions}
        fed = {name: array for name, array in known.items() if name in decoder.inputs}
        outputs, cache = decoder.step(fed, cache, tokens.shape[1])
        return outputs["logits"][:, -1], cache

    def prefill(arrays: Arrays) -> tuple[np.ndarray, Cache]:
        ids = arrays["input_ids"]
        cache = decoder.empty(len(ids), sum(arrays[name].shape[1] for name in _TOKENS))
        return run(arrays, cache, ids, arrays["attention_mask"])

    def follow(arrays: Arrays, cache: Cache) -> np.ndarray:
        cache = Cache(cache.arrays, arrays["input_ids"].shape[1])
        for tokens, keys in _steps(arrays):
            logits, cache = run(arrays, cache, tokens, keys)
        return logits

    quantised = any(map(graph.is_quantised, graph.counts(decoder.opened.model)))
    return _model(prefill, follow, "int8 and fp32" if quantised else "fp32")


def pytorch(
    name: str, *, static: bool = False, compiled: bool = False, **options: Any
) -> Callable[[Arrays], Arrays]:
    """The model that `helpers.models.load` gives, with a DynamicCache or, `static`, a StaticCache;
    with `compiled`, its steps by ``torch.compile``."""
    import torch
    import transformers

    from helpers import models

    model = models.load(name, **options).model
    stepped = torch.compile(model) if compiled else model

    @torch.no_grad()
    def run(forward: Callable, ids: np.ndarray, keys: np.ndarray, positions: Any, cache: Any):
        result = forward(
            input_ids=torch.from_numpy(np.ascontiguousarray(ids)),
            attention_mask=torch.from_numpy(np.ascontiguousarray(keys)),
            position_ids=torch.from_numpy(np.ascontiguousarray(positions)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return result.logits[:, -1].numpy()

    def whole(arrays: Arrays, keys: np.ndarray) -> np.ndarray:
        """The mask of all positions that a static cache has, (B, S + N)."""
        missing = sum(arrays[name].shape[1] for name in _TOKENS) - keys.shape[1]
        return np.pad(keys, ((0, 0), (0, missing)), constant_values=1) if static else keys

    def prefill(arrays: Arrays) -> tuple[np.ndarray, Any]:
        ids, keys = arrays["input_ids"], arrays["attention_mask"]
        cache = transformers.DynamicCache(config=model.config)
        if static:
            length = sum(arrays[name].shape[1] for name in _TOKENS)
            cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        return run(model, ids, whole(arrays, keys), np.maximum(keys.cumsum(1) - 1, 0), cache), cache

    def follow(arrays: Arrays, cache: Any) -> np.ndarray:
        length = arrays["input_ids"].shape[1]
        if static:
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)
        elif behind := cache.get_seq_length() - length:
            cache.crop(-behind)
        for tokens, keys in _steps(arrays):
            positions = keys.sum(axis=1, keepdims=True) - 1
            logits = run(stepped, tokens, whole(arrays, keys), positions, cache)
        return logits

    return _model(prefill, follow, "fp32")


def generating(
    name: str, *, decode: str = "", prefill: str = "", encoder: str = "", **options: Any
) -> Model:
    """All of `generate`, of the model that `helpers.models.load` gives, or of its files; `options`
    are those of `generate`. It is given the inputs of that, and gives ``tokens``."""
    import torch

    from helpers import models

    model = models.load(name).model
    if decode:
        from helpers.generate import inside

        paths = {"prefill": prefill or None, "encoder": encoder or None}
        model = inside.model_of(model, decode, threads=threads(), **paths)

    def run(arrays: Arrays) -> Arrays:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return {"tokens": model.generate(**tensors, **options).numpy()}

    return run


_TOKENS = ("input_ids", "next_ids")


def _steps(arrays: Arrays) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each of the tokens that follow, (B, 1), with the mask of all keys up to it."""
    following, keys = arrays["next_ids"], arrays["attention_mask"]
    for at in range(following.shape[1]):
        keys = np.concatenate([keys, np.ones_like(keys[:, :1])], axis=1)
        yield following[:, at : at + 1], keys


def _model(
    prefill: Callable[[Arrays], tuple[np.ndarray, Any]],
    follow: Callable[[Arrays, Any], np.ndarray],
    precision: str,
) -> Model:
    known: list[tuple[Arrays, Any]] = []  # the last arrays, with the caches of their prompt

    def model(arrays: Arrays) -> Arrays:
        if not arrays["next_ids"].shape[1]:
            return {"logits": prefill(arrays)[0]}
        if not known or known[0][0] is not arrays:
            known[:] = [(arrays, prefill(arrays)[1])]
        return {"logits": follow(*known[0])}

    model.precision = precision
    return model
