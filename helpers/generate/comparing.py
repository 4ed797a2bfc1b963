"""Do two decoders generate the same tokens? Greedily, over many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files
from helpers.generate.decoder import Arrays, Decoder
from helpers.generate.prompts import Feeding, Prompt
from helpers.parity import precision


@dataclasses.dataclass
class Generated:
    """How the tokens of one model compare over `steps`. `differs` is the first step, from 0, and
    row at which they do, with the token expected, that found, and by how much the expected one's
    logit is larger; `ties` are the steps at which that is less than the tolerance. `difference` is
    the largest of all logits up to there."""

    name: str
    steps: int
    tolerance: float = 0.0
    difference: float = 0.0
    differs: tuple[int, int, int, int, float] | None = None
    ties: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def same(self) -> bool:
        return self.differs is None

    def to_json(self) -> dict[str, Any]:
        names = ("step", "row", "expected", "found", "margin")
        return {
            "file": self.name,
            "same": self.same,
            "first_difference": self.differs and dict(zip(names, self.differs, strict=True)),
            "ties": [{"step": step, "row": row} for step, row in self.ties],
            "max_abs_diff": self.difference,
            "tolerance": self.tolerance,
        }

    def __str__(self) -> str:
        if self.differs:
            step, row, expected, found, margin = self.differs
            return (
                f"{self.name}: OTHER TOKENS from step {step} on, in row {row}: {found} and not"
                f" {expected}, whose logit is {margin:.1e} larger (tolerance {self.tolerance:.1e})"
            )
        ties = ", ".join(f"step {step}, row {row}" for step, row in self.ties)
        more = f", but for ties, closer than {self.tolerance:.1e}: {ties}" if ties else ""
        return (
            f"{self.name}: the same tokens in {self.steps} steps{more}; largest difference of the"
            f" logits {self.difference:.1e} (tolerance {self.tolerance:.1e})"
        )


@dataclasses.dataclass
class Report:
    """What `compare` found: how each candidate's tokens compare with those of the `reference`."""

    reference: str
    prompt: str
    tokens: np.ndarray
    candidates: list[Generated]

    @property
    def held(self) -> bool:
        return all(candidate.same for candidate in self.candidates)

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "held": self.held,
            "generate": {
                "steps": self.tokens.shape[1],
                "prompt": self.prompt,
                "tokens": self.tokens.tolist(),
                "models": [candidate.to_json() for candidate in self.candidates],
            },
        }

    def __str__(self) -> str:
        rows, steps = self.tokens.shape
        lines = [
            f"reference {self.reference}",
            f"prompt {self.prompt}",
            f"generated {steps} tokens in each of {rows} rows, by the largest logit;"
            f" {len(np.unique(self.tokens))} different ones",
        ]
        return "\n".join([*lines, *map(str, self.candidates)])


def compare(models: Sequence[files.Opened], steps: int, inputs: Path | None = None) -> Report:
    """Run the first of `models` greedily for so many `steps`, and the others on its tokens.

    The prompt is that in the file `inputs`, or seeded. A candidate has other tokens where it gives
    another one the largest logit, unless the reference's own logits of the two differ by less than
    the tolerance of `parity.compare`: that is a tie. Raises `files.BadInput` where a model has no
    caches, no ids or no logits, or another vocabulary.
    """
    decoders = [Decoder(model) for model in models]
    feeding = Feeding(models[0])
    prompt = feeding.prompt(inputs)
    runs = [_Run(decoder, feeding, prompt, steps) for decoder in decoders]
    reference, *others = runs
    answers = [Generated(str(run.decoder.opened), steps) for run in others]
    given: list[np.ndarray] = []
    tokens, keys = prompt.tokens, prompt.keys
    for step in range(steps):
        logits = reference.next(tokens, keys)
        best = logits.argmax(axis=-1)
        for run, answer in zip(others, answers, strict=True):
            _judge(answer, step, logits, best, run.next(tokens, keys))
        given.append(best)
        tokens = best[:, None]
        keys = np.concatenate([keys, np.ones_like(tokens, bool)], axis=1)
    told = np.stack(given, axis=1)
    return Report(str(reference.decoder.opened), prompt.told, told, answers)


class _Run:
    """One decoder on its way through the steps."""

    def __init__(self, decoder: Decoder, feeding: Feeding, prompt: Prompt, steps: int) -> None:
        self.decoder, self.feeding, self.prompt = decoder, feeding, prompt
        rows, length = prompt.tokens.shape
        self.cache = decoder.empty(rows, length + steps)

    def next(self, tokens: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The logits (B, V) of the token after `tokens` (B, S); `keys` (B, T) are all so far."""
        arrays = self.feeding.arrays(self.prompt, tokens, keys)
        taken = {name: array for name, array in arrays.items() if name in self.decoder.inputs}
        outputs, self.cache = self.decoder.step(taken, self.cache, tokens.shape[1])
        return _logits(self.decoder, outputs, self.prompt.words)


def _logits(decoder: Decoder, outputs: Arrays, words: int) -> np.ndarray:
    """The logits of the last position, (B, V)."""
    found = [array for array in outputs.values() if array.ndim == 3 and array.dtype.kind == "f"]
    fitting = [array for array in found if array.shape[-1] == words]
    if not fitting:
        shapes = ", ".join(str(array.shape) for array in found) or "none"
        raise files.BadInput(
            f"{decoder.opened}: expected logits (batch, positions, {words}), a number for each"
            f" token, found outputs {shapes}; compare decoders of one vocabulary"
        )
    return fitting[0][:, -1].astype(np.float32)


def _judge(
    answer: Generated, step: int, logits: np.ndarray, best: np.ndarray, found: np.ndarray
) -> None:
    """Note where `found` has another best token than `logits`, both (B, V)."""
    if answer.differs:
        return
    answer.tolerance = precision.allowed(logits, precision.TOLERANCE["float32"])
    answer.difference = max(answer.difference, float(np.abs(found - logits).max()))
    other = found.argmax(axis=-1)
    for row in np.flatnonzero(other != best):
        margin = float(logits[row, best[row]] - logits[row, other[row]])
        if margin <= answer.tolerance:
            answer.ties.append((step, int(row)))
        else:
            answer.differs = (step, int(row), int(best[row]), int(other[row]), margin)
            return
