"""The models that are measured, and the samples that 8 bits are calibrated and judged on."""

import functools

from helpers.figures.precision import sentences
from helpers.figures.speed.models import MODELS as STAND_INS
from helpers.figures.speed.models import Arrays, Model, text

CALIBRATED, JUDGED, TOGETHER = 32, 8, 4  # samples; and of the judged, how many in one feed

MINILM = Model(
    "sentence-transformers/all-MiniLM-L6-v2",
    "BertModel",
    functools.partial(text, types=True),
    (64, 256),
    "tokens",
    "bert",
    width=384,
    published="minilm",
)
MODELS = {"minilm": MINILM} | {name: STAND_INS[name] for name in ("bert", "vit", "wav2vec2")}


def calibration(model: Model, length: int) -> Arrays:
    """Samples by input, (32, …): sentences, or of `length` what a stand-in reads."""
    if model.published:
        return sentences.tokens(sentences.OTHERS)
    return rows(model.inputs(CALIBRATED + JUDGED, length), 0, CALIBRATED)


def judged(model: Model, length: int) -> list[Arrays]:
    """Feeds of `length` that are not those of the calibration."""
    every = model.inputs(CALIBRATED + JUDGED, length)
    starts = range(CALIBRATED, CALIBRATED + JUDGED, TOGETHER)
    return [rows(every, start, start + TOGETHER) for start in starts]


def rows(arrays: Arrays, start: int, end: int) -> Arrays:
    return {name: array[start:end] for name, array in arrays.items()}


def single(arrays: Arrays) -> list[Arrays]:
    """Each row as a feed of its own."""
    count = len(next(iter(arrays.values())))
    return [rows(arrays, at, at + 1) for at in range(count)]
