"""The model under study, with example inputs: the published checkpoint where it is at hand.

Where it is not, a stand-in: the published configuration with seeded weights. Its graph and its
latency are those of the real model; what it predicts means nothing, and is never printed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import logging
import operator
import urllib.request
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files
from helpers.models.published import ARCHITECTURES, Architecture

if TYPE_CHECKING:  # torch and transformers take seconds to import
    import torch
    import transformers

logger = logging.getLogger(__name__)

SPEECH = Path(__file__).parents[2] / "assets" / "speech.wav"
SAMPLE_RATE = 16_000  # Hz


@dataclass(frozen=True)
class Study:
    """A model under study; `source` says in one line what it is. A stand-in has no processor."""

    model: transformers.PreTrainedModel
    processor: Any | None
    source: str
    is_stand_in: bool = False


def load(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    attn_implementation: str = "sdpa",
    pooled: bool = False,
    **changes: Any,
) -> Study:
    """The model `name` of `ARCHITECTURES`, in evaluation mode.

    `checkpoint` is a local folder with the published files. By default they come from the package
    that carries them, if there is one, and else from the hub at a pinned revision, or from its
    cache (always so with HF_HUB_OFFLINE=1). Where they are not to be had, a stand-in is made; with
    `changes` of the published configuration (``num_hidden_layers=2``), always, since it is another
    model then. With `pooled`, what it gives is ``sentence_embedding``, see `sentence_encoder`.
    Raises KeyError on an unknown name, TypeError on a change of what no configuration of it has,
    `files.BadInput` on a folder without a checkpoint, or one of
    the package or the hub whose weights are not the published ones.
    """
    import transformers

    architecture = ARCHITECTURES[name]
    model_class = operator.attrgetter(architecture.model)(transformers)
    if pooled:
        model_class = sentence_encoder(model_class)
    if changes:
        return _stand_in(architecture, model_class, attn_implementation, changes)
    if checkpoint is not None:
        folder, origin = Path(checkpoint), ""
    elif carried := _from_package(architecture):
        folder, origin = carried
        if architecture.reader:
            return _read(architecture, folder, origin, attn_implementation)
    else:
        folder, origin = _from_hub(architecture), ""
    if folder is None:
        return _stand_in(architecture, model_class, attn_implementation, {})
    source = _source(architecture, folder, origin, given=checkpoint is not None)
    kind, processor = architecture.processor, None
    if kind is not None:
        processor = getattr(transformers, kind).from_pretrained(folder)
    with _without_bars():
        model = model_class.from_pretrained(
            folder,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    return Study(model.eval(), processor, source)


def _read(architecture: Architecture, folder: Path, origin: str, attn_implementation: str) -> Study:
    """The model in the `folder` of a package that carries it in a format of its own.

    Raises `BadInput` as `load` does.
    """
    _check_digest(architecture, folder)
    module, function = architecture.reader.split(":")
    reader = getattr(importlib.import_module(module), function)
    model, processor = reader(folder, attn_implementation)
    carried = architecture.carries or f"the published checkpoint {architecture.repository}"
    source = f"{carried}{origin}, its SHA-256 checked"
    return Study(model, processor, source)


def _source(architecture: Architecture, folder: Path, origin: str, *, given: bool) -> str:
    """What the checkpoint in `folder` is, in one line; its weights are checked.

    `origin` says where it came from; it is the reader's own if `given`. Raises `BadInput` as `load`
    does.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise files.BadInput(
            f"{folder}: expected a folder with the files of {architecture.repository}, found no"
            " config.json or no .safetensors; give another checkpoint, or none"
        )
    source = f"the published checkpoint {architecture.repository}{origin}"
    if not architecture.sha256 or architecture.reader:  # the package's weights are in other files
        return source
    if not given:
        _check_digest(architecture, folder)
    elif _digest(architecture, folder) != architecture.sha256:
        return f"the checkpoint given, with other weights than {architecture.repository}"
    return f"{source}, its SHA-256 checked"


def _digest(architecture: Architecture, folder: Path) -> str:
    """The SHA-256 of the weights in `folder`, "none" where a file is missing: a checkpoint given
    may be in several others."""
    weights = [folder / name for name in architecture.weights]
    if not all(path.is_file() for path in weights):
        return "none"
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_digest(architecture: Architecture, folder: Path) -> None:
    if (digest := _digest(architecture, folder)) != architecture.sha256:
        described = architecture.carries or f"the published weights of {architecture.repository}"
        raise files.BadInput(
            f"{folder}: expected {described}, found SHA-256 {digest} of"
            f" {', '.join(architecture.weights)}; install or fetch them again"
        )


def sentence_encoder(base: type[transformers.PreTrainedModel]) -> type:
    """The class `base` of an encoder, with one output: ``sentence_embedding``, (batch, width).

    It is the mean of the last hidden states over the keys of `attention_mask`, of length 1, as
    sentence-transformers computes it for its all-* models.
    """

    import torch

    Output = _sentence_output()  # before the model is traced, in which it cannot be registered

    class SentenceEncoder(base):
        def forward(self, input_ids, attention_mask, **others):
            states = super().forward(input_ids, attention_mask=attention_mask, **others)[0]
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            embedding = torch.nn.functional.normalize(mean, dim=1)
            # "embedding" alone would be the name of the look-up in an exported graph
            return Output(sentence_embedding=embedding)

    return SentenceEncoder


@functools.cache
def _sentence_output() -> type:
    """The class of what a sentence encoder returns."""
    from transformers.utils import ModelOutput

    @dataclass
    class SentenceOutput(ModelOutput):
        sentence_embedding: torch.Tensor | None = None

    return SentenceOutput


def _from_package(architecture: Architecture) -> tuple[Path, str] | None:
    """The folder with the published files in the package that carries them, and what it is called;
    None where it is not installed. Nothing of the package is imported."""
    specification = importlib.util.find_spec(architecture.package) if architecture.package else None
    if specification is None:
        return None
    (folder,) = specification.submodule_search_locations
    return Path(folder) / architecture.folder, f", from the package {architecture.package}"


def _from_hub(architecture: Architecture) -> Path | None:
    """The folder with the published files, from the hub's cache or the hub; None without either."""
    import huggingface_hub

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
    logger.info(f"downloading {architecture.repository} …")
    with _without_bars():
        fetched = Path(snapshot())
    return fetched if any(fetched.glob("*.safetensors")) else None


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without progress bars of transformers and the hub: a widget breaks a rendered notebook."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # the hub's, too
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _stand_in(
    architecture: Architecture,
    model_class: type[transformers.PreTrainedModel],
    attn_implementation: str,
    changes: Mapping[str, Any],
) -> Study:
    if unknown := [name for name in changes if not hasattr(model_class.config_class(), name)]:
        raise TypeError(f"{', '.join(unknown)}: not in a {model_class.config_class.__name__}")
    model = _seeded(model_class, {**architecture.config, **changes}, attn_implementation)
    source = (
        f"a stand-in with the configuration of {architecture.repository} and seeded weights,"
        f" {model.config.num_hidden_layers} layers"
    )
    others = {name: value for name, value in changes.items() if name != "num_hidden_layers"}
    source += "".join(f", {name} {value}" for name, value in others.items())
    return Study(model, None, source, is_stand_in=True)


def stand_in(
    name: str, config: Mapping[str, Any], attn_implementation: str = "sdpa"
) -> transformers.PreTrainedModel:
    """A model of the class `name` of transformers with seeded weights, in evaluation mode.

    `config` is where its configuration differs from the class's default.
    """
    import transformers

    model_class = operator.attrgetter(name)(transformers)  # some are in a module of their own
    return _seeded(model_class, config, attn_implementation)


def _seeded(
    model_class: type[transformers.PreTrainedModel],
    config: Mapping[str, Any],
    attn_implementation: str,
) -> transformers.PreTrainedModel:
    import torch

    configuration = model_class.config_class(**config)
    configuration._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(configuration).eval()
        randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    """Give biases and norm weights seeded values of their own, in place.

    PyTorch starts them all at 0 and 1; an exporter would merge them, as it never does with trained
    ones, and the graph would not be that of the real checkpoint.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))


def runner(
    model: torch.nn.Module, *, autocast: bool = False
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """`model` in PyTorch, as a function from input arrays to output arrays, by name.

    With `autocast`, products are computed in bfloat16, by ``torch.autocast``. A model in bfloat16
    takes its inputs in it too; outputs in it become float32.
    """
    import torch

    in_bf16 = any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    casting = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)

    def run(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if in_bf16:
            inputs = {
                name: value.bfloat16() if value.is_floating_point() else value
                for name, value in inputs.items()
            }
        with torch.inference_mode(), casting:
            outputs = model(**inputs)
        tensors = {name: value for name, value in outputs.items() if torch.is_tensor(value)}
        return {
            name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            for name, value in tensors.items()
        }

    run.__qualname__ = f"{type(model).__name__} in PyTorch"
    return run


def pytorch(
    name: str,
    *,
    compiled: bool = False,
    bf16: str = "",
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """`runner` of the model that `load` gives, in a benchmark's own process; with `config`, of the
    one that `stand_in` does.

    With `compiled`, by ``torch.compile``, which needs a C++ compiler and compiles as it first runs.
    `bf16` is "autocast", which keeps what loses most in float32 and casts weights in each run, or
    "weights", where the whole model is bfloat16. Raises ValueError on another.
    """
    import torch

    if bf16 not in ("", "autocast", "weights"):
        raise ValueError(f'bf16: expected "autocast" or "weights", found {bf16}')
    made = load(name, **options).model if config is None else stand_in(name, config, **options)
    if bf16 == "weights":
        made = made.to(torch.bfloat16)
    run = runner(torch.compile(made) if compiled else made, autocast=bf16 == "autocast")
    run.precision = "bf16" if bf16 else "fp32"  # what is asked of PyTorch is what it does
    return run


def speech(seconds: float | None = None, batch: int = 1, path: Path = SPEECH) -> np.ndarray:
    """The clip of speech in assets/, or another at `path`, as float32 (batch, samples) at 16 kHz,
    each row normalised.

    Mean 0 and variance 1, as wav2vec2's feature extractor does. Rows start at different places; a
    clip shorter than `seconds` starts over.
    """
    with wave.open(str(path)) as file:
        if file.getframerate() != SAMPLE_RATE or file.getnchannels() != 1:
            raise ValueError(f"{path}: expected {SAMPLE_RATE} Hz mono; make it again")
        clip = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32)
    samples = len(clip) if seconds is None else int(seconds * SAMPLE_RATE)
    starts = np.arange(batch) * (len(clip) // batch)
    rows = np.stack(
        [np.take(clip, np.arange(start, start + samples), mode="wrap") for start in starts]
    )
    return (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-7)
