"""BERT, tiny, for the tests of the commands that measure models."""

import dataclasses

from helpers.figures.speed import models


def bert(layers: int) -> models.Model:
    """Of so many layers, two heads of width eight."""
    config = {
        "vocab_size": 30_000,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    small = {"config": config, "lengths": (8, 16), "heads": 2, "width": 16}
    return dataclasses.replace(models.MODELS["bert"], **small)
