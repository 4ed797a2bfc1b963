"""What a decoder is fed from step to step: tokens, the mask of all keys, positions, and the rest.

Shapes: B rows, P positions so far, S new ones, T = P + S.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from helpers import feeds, files
from helpers.feeds.inputs import Input
from helpers.feeds.sizes import At
from helpers.feeds.trial import Trial
from helpers.generate.decoder import Arrays

ROWS, LENGTH = 3, 12  # of a prompt of ours
PADDED = (0, 3, 7)  # on the left, by row
PASSED_ON = ("cache", "buffer", "filled")  # kinds of inputs that go from step to step
OF_KEYS = ("mask", "token", "queries")  # kinds of sizes that may be those of a mask of all keys


@dataclasses.dataclass
class Prompt:
    """Rows of tokens (B, S), where they are none of `keys` padded, and all that is fed at each step
    as it is, by name. `words` is how many tokens there are to choose from."""

    tokens: np.ndarray
    keys: np.ndarray
    constant: Arrays
    words: int
    told: str


class Feeding:
    """Makes the arrays of each step for the decoder that `opened` is, and for any that takes the
    same inputs.

    Raises `files.BadInput` where it takes no ids.
    """

    def __init__(self, opened: files.Opened) -> None:
        self.trial = Trial(opened)
        flags = {entry.name: 0 for entry in self.trial.flags}
        problems: list[Exception] = []
        self.at = self.trial.smallest(flags, problems)
        if self.at is None:
            raise self.trial.refused(problems)
        self.trial.find_senses(flags, self.at)
        self.words = self._token_input(opened)
        kinds = self.trial.sizes.kind

        def of_keys(entry: Input) -> bool:
            return entry.is_mask and kinds.get(entry.dims[-1]) in OF_KEYS

        entries = [entry for entry in self.trial.inputs if entry is not self.words]
        self.masks = [entry for entry in entries if of_keys(entry)]
        self.positions = [entry for entry in entries if _is_positions(entry)]
        changing = [self.words, *self.masks, *self.positions]
        self.flags = self.trial.flags
        self.others = [
            entry
            for entry in entries
            if entry not in (*changing, *self.flags) and entry.role not in PASSED_ON
        ]
        self.one_a_step = isinstance(self.words.dims[-1], int)

    def _token_input(self, opened: files.Opened) -> Input:
        ids = [entry for entry in self.trial.inputs if entry.role == "ids" and len(entry.dims) == 2]
        tokens = [entry for entry in ids if not _is_positions(entry)]
        if not tokens:
            raise files.BadInput(
                f"{opened}: expected ids among the inputs, to generate tokens, found"
                f" {', '.join(map(str, self.trial.inputs))}; give a decoder of tokens"
            )
        return tokens[-1]  # a decoder's come behind an encoder's

    def prompt(self, npz: Path | None) -> Prompt:
        """The prompt in the file `npz`, an array for each input, or one of ours: seeded tokens in
        three rows, padded on the left where there is a mask for that."""
        if npz is not None:
            [feed], told = feeds.load(npz, self.trial.path)
            arrays = feed.arrays
            tokens = arrays[self.words.name]
            keys = np.ones(tokens.shape, bool)
            if self.masks:
                mask = arrays[self.masks[0].name]
                keys = (mask == self.masks[0].keep)[:, -tokens.shape[1] :]
        else:
            arrays = self.trial.arrays(self._sizes(ROWS, 1, self.at.past))
            length = 1 if self.one_a_step else LENGTH
            random = np.random.default_rng(0)
            tokens = random.integers(self.words.low, self.words.bound, (ROWS, length))
            keys = np.ones(tokens.shape, bool)
            told = f"{ROWS} rows of {length} seeded {'tokens' if length > 1 else 'token'}"
            if self.masks and length > 1:
                for row, padding in enumerate(PADDED):
                    keys[row, :padding] = False
                told += f", padded on the left by {', '.join(map(str, PADDED))}"
        constant = {entry.name: arrays[entry.name] for entry in self.others}
        return Prompt(tokens, keys, constant, self.words.bound, told)

    def arrays(self, prompt: Prompt, tokens: np.ndarray, keys: np.ndarray) -> Arrays:
        """What is fed for new `tokens` (B, S), where `keys` (B, T) has all that are no padding."""
        new = tokens.shape[1]
        past = keys.shape[1] - new
        fed = dict(prompt.constant)
        fed[self.words.name] = tokens.astype(self.words.dtype)
        for entry in self.masks:
            fed[entry.name] = np.where(keys, entry.keep, entry.drop).astype(entry.dtype)
        counted = np.maximum(keys.cumsum(axis=1) - 1, 0)[:, past:]
        for entry in self.positions:
            single = np.arange(past, past + new) if len(entry.dims) == 1 else counted
            fed[entry.name] = single.astype(entry.dtype)
        for entry in self.flags:
            fed[entry.name] = np.full([1] * len(entry.dims), past > 0).astype(entry.dtype)
        return fed

    def _sizes(self, rows: int, new: int, past: int) -> At:
        return dataclasses.replace(self.at, batch=rows, token=new, past=past)


def _is_positions(entry: Input) -> bool:
    """Whether it holds positions: by what it is turned into, or what it is called where it looks a
    table up, as tokens do."""
    return entry.role == "positions" or (entry.role == "ids" and "position" in entry.name)
