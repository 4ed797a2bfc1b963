"""The model under study: loading, the catalogue of published checkpoints, small stand-ins."""

from helpers.models.loading import (
    SAMPLE_RATE,
    Study,
    load,
    pytorch,
    randomise,
    runner,
    sentence_encoder,
    speech,
    stand_in,
)
from helpers.models.published import ARCHITECTURES, Architecture

__all__ = [
    "ARCHITECTURES",
    "SAMPLE_RATE",
    "Architecture",
    "Study",
    "load",
    "pytorch",
    "randomise",
    "runner",
    "sentence_encoder",
    "speech",
    "stand_in",
]
