"""The model under study, with example inputs: the published checkpoint where it is at hand.

Where it is not, a stand-in: the published configuration with seeded weights. Its graph and its
latency are those of the real model; what it predicts means nothing, and is never printed.
"""

import contextlib
import functools
import operator
import urllib.request
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers

from helpers import files

SPEECH = Path(__file__).parent.parent / "assets" / "speech.wav"
SAMPLE_RATE = 16_000  # Hz


@dataclass(frozen=True)
class Architecture:
    """What is needed to load one architecture: its class, and its published checkpoint."""

    model: str  # a class of transformers
    processor: str | None  # a class of transformers, for what the model reads and predicts
    repository: str
    revision: str
    config: Mapping[str, Any]  # where the published configuration differs from the class's default


ARCHITECTURES = {
    "wav2vec2": Architecture(
        model="Wav2Vec2ForCTC",
        processor="Wav2Vec2Processor",
        repository="facebook/wav2vec2-base-960h",
        revision="22aad52d435eb6dbaf354bdad9b0da84ce7d6156",
        config={},
    )
}


@dataclass(frozen=True)
class Study:
    """A model under study; `source` says in one line what it is. A stand-in has no processor."""

    model: transformers.PreTrainedModel
    processor: Any | None
    source: str

    @property
    def is_stand_in(self) -> bool:
        return self.processor is None


def load(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    attn_implementation: str = "sdpa",
    num_hidden_layers: int | None = None,
) -> Study:
    """The model `name` of `ARCHITECTURES`, in evaluation mode.

    `checkpoint` is a local folder with the published files; by default they come from the hub at a
    pinned revision, or from its cache (always so with HF_HUB_OFFLINE=1). Where they are not to be
    had, a stand-in is made; with `num_hidden_layers`, always, since it is another model then.
    Raises KeyError on an unknown name, `files.BadInput` on a folder without a checkpoint.
    """
    architecture = ARCHITECTURES[name]
    if num_hidden_layers is not None:
        return _stand_in(architecture, attn_implementation, num_hidden_layers)
    folder = Path(checkpoint) if checkpoint is not None else _from_hub(architecture)
    if folder is None:
        return _stand_in(architecture, attn_implementation, None)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise files.BadInput(
            f"{folder}: expected a folder with the files of {architecture.repository}, found no"
            " config.json or no .safetensors; give another checkpoint, or none"
        )
    processor = getattr(transformers, architecture.processor).from_pretrained(folder)
    model = getattr(transformers, architecture.model).from_pretrained(
        folder,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return Study(model.eval(), processor, f"the published checkpoint {architecture.repository}")


def _from_hub(architecture: Architecture) -> Path | None:
    """The folder with the published files, from the hub's cache or the hub; None without either."""
    snapshot = functools.partial(
        huggingface_hub.snapshot_download,
        architecture.repository,
        revision=architecture.revision,
        allow_patterns=["*.json", "*.safetensors"],
    )
    with contextlib.suppress(OSError):
        cached = Path(snapshot(local_files_only=True))
        if any(cached.glob("*.safetensors")):  # another tool may have fetched a part only
            return cached
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    hub = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:  # ask once, and shortly: the hub's client tries again for minutes
        urllib.request.urlopen(hub, timeout=5).close()
    except OSError:
        return None
    print(f"downloading {architecture.repository} …", flush=True)
    huggingface_hub.utils.disable_progress_bars()  # a widget breaks a rendered notebook
    try:
        return Path(snapshot())
    finally:
        huggingface_hub.utils.enable_progress_bars()


def _stand_in(architecture: Architecture, attn_implementation: str, layers: int | None) -> Study:
    changes = {} if layers is None else {"num_hidden_layers": layers}
    model = stand_in(architecture.model, {**architecture.config, **changes}, attn_implementation)
    source = f"a stand-in with the configuration of {architecture.repository} and seeded weights"
    return Study(model, None, f"{source}, {model.config.num_hidden_layers} layers")


def stand_in(
    name: str, config: Mapping[str, Any], attn_implementation: str = "sdpa"
) -> transformers.PreTrainedModel:
    """A model of the class `name` of transformers with seeded weights, in evaluation mode.

    `config` is where its configuration differs from the class's default.
    """
    model_class = operator.attrgetter(name)(transformers)  # some are in a module of their own
    made = model_class.config_class(**config)
    made._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(made).eval()
        randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    """Give biases and norm weights seeded values of their own, in place.

    PyTorch starts them all at 0 and 1; an exporter would merge them, as it never does with trained
    ones, and the graph would not be that of the real checkpoint.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))


def runner(model: torch.nn.Module) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """`model` in PyTorch eager, as a function from input arrays to output arrays, by name."""

    def run(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            outputs = model(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return {name: value.numpy() for name, value in outputs.items() if torch.is_tensor(value)}

    run.__qualname__ = f"{type(model).__name__} in PyTorch"
    return run


def pytorch(
    name: str, *, compiled: bool = False, **options: Any
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """`runner` of the model that `load` gives, in a benchmark's own process.

    With `compiled`, by ``torch.compile``, which needs a C++ compiler and compiles as it first runs.
    """
    model = load(name, **options).model
    return runner(torch.compile(model) if compiled else model)


def speech(seconds: float | None = None, batch: int = 1) -> np.ndarray:
    """The clip of speech in assets/ as float32 (batch, samples) at 16 kHz, each row normalised.

    Mean 0 and variance 1, as wav2vec2's feature extractor does. Rows start at different places; a
    clip shorter than `seconds` starts over.
    """
    with wave.open(str(SPEECH)) as file:
        if file.getframerate() != SAMPLE_RATE or file.getnchannels() != 1:
            raise ValueError(f"{SPEECH}: expected {SAMPLE_RATE} Hz mono; make it again")
        clip = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32)
    samples = len(clip) if seconds is None else int(seconds * SAMPLE_RATE)
    starts = np.arange(batch) * (len(clip) // batch)
    rows = np.stack([np.take(clip, np.arange(s, s + samples), mode="wrap") for s in starts])
    return (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-7)
