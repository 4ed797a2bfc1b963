"""How good what a contender computes is, against PyTorch in fp32."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from helpers import benchmark
from helpers.contenders import Contender
from helpers.figures.precision import models, sentences
from helpers.figures.speed.models import Arrays, Model

logger = logging.getLogger(__name__)

SPEARMAN, ERROR = "Spearman", "error"  # what is measured: the first is better the higher


class Quality(NamedTuple):
    """What was measured, its value, and of a correlation the difference from fp32."""

    measure: str
    value: float
    difference: float


NONE = Quality("", np.nan, np.nan)


def judge(
    model: Model, lengths: Sequence[int], contenders: Sequence[Contender], at_once: int
) -> tuple[dict[int, dict[str, Quality]], dict[str, str]]:
    """By length the quality of each contender, by label, and the reasons of those without.

    The first contender is PyTorch in fp32. A model with published weights is judged by what it is
    for, on sentences, and stand-ins by their error.
    """
    if model.published:
        batches = sentences.batches()
        ran, reasons = _outputs(contenders, {f"{key}": b for key, b in batches.items()}, at_once)
        own = {label: _correlations(outputs) for label, outputs in ran.items()}
        reference = own.get(contenders[0].label)
        same = {label: _against(sides, reference) for label, sides in own.items() if reference}
        return dict.fromkeys(lengths, same), reasons
    feeds = {
        f"{length}, {number}": feed
        for length in lengths
        for number, feed in enumerate(models.judged(model, length))
    }
    ran, reasons = _outputs(contenders, feeds, at_once)
    reference = ran.get(contenders[0].label, {})
    found: dict[int, dict[str, Quality]] = {}
    for length in lengths:
        names = [name for name in reference if name.startswith(f"{length}, ")]
        found[length] = {
            label: Quality(ERROR, max(error(reference[n], own[n]) for n in names), np.nan)
            for label, own in ran.items()
            if names
        }
    return found, reasons


def _outputs(
    contenders: Sequence[Contender], cases: Mapping[str, Arrays], at_once: int
) -> tuple[dict[str, dict[str, Arrays]], dict[str, str]]:
    """The outputs of each who ran all cases, by label and case, and the reasons of the others."""
    ran: dict[str, dict[str, Arrays]] = {}
    reasons = {one.label: one.reason for one in contenders if one.reason}
    for start in range(0, len(contenders), at_once):
        some = [one for one in contenders[start : start + at_once] if not one.reason]
        if not some:
            continue
        results = benchmark.run(some, cases, rounds=1, at_once=at_once, progress=False)
        for case, result in results.items():
            reasons |= result.reasons
            for label, measured in result.measured.items():
                ran.setdefault(label, {})[case] = dict(measured.outputs)
        logger.info(f"judged {min(start + at_once, len(contenders))} of {len(contenders)}")
    return {label: own for label, own in ran.items() if label not in reasons}, reasons


def _correlations(outputs: Mapping[str, Arrays]) -> list[float]:
    """Spearman's correlation with the padding on either side, from all batches in their order."""
    embeddings = [arrays.get("sentence_embedding") for arrays in outputs.values()]
    if any(array is None for array in embeddings):
        return [np.nan] * len(sentences.SIDES)
    of_side = np.split(np.concatenate(embeddings), len(sentences.SIDES))
    return [sentences.spearman(array) for array in of_side]


def _against(own: Sequence[float], reference: Sequence[float]) -> Quality:
    """The lower correlation of the two sides, and the larger loss of them."""
    return Quality(SPEARMAN, min(own), float(np.min(np.subtract(own, reference))))


def error(expected: Arrays, found: Arrays) -> float:
    """The root of the mean squared difference, in standard deviations of the expected values; of
    all outputs of floats the largest, NaN where there are none in common."""
    errors = [np.nan]
    for name, wanted in expected.items():
        if wanted.dtype.kind == "f" and name in found and found[name].shape == wanted.shape:
            gap = np.subtract(found[name], wanted, dtype=float)
            errors.append(float(np.sqrt(np.mean(gap**2)) / np.std(wanted, dtype=float)))
    return float(np.fmax.reduce(errors)) if np.isfinite(errors[1:]).all() else np.nan
