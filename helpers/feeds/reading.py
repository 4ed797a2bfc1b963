"""Inputs for a model, read from a file."""

from contextlib import closing
from pathlib import Path

import numpy as np

from helpers import files, graph
from helpers.feeds import inputs
from helpers.feeds.feed import Feed
from helpers.feeds.inferring import infer
from helpers.feeds.inputs import Input
from helpers.feeds.scores import Scores


def read(npz: str | Path | None, model: str | Path | files.Opened) -> tuple[list[Feed], str]:
    """What `load` gives, or where there is no file `npz`, what `infer` does."""
    return load(npz, model) if npz else infer(model)


def load(npz: str | Path, model: str | Path | files.Opened) -> tuple[list[Feed], str]:
    """The feed in the file `npz`, an array for each input of `model`, and a description.

    Raises `files.BadInput` on a file that is none, and on names, types, ranks or fixed sizes that
    are not the model's, and ids outside of the table that they index.
    """
    npz, opened = Path(npz), files.Opened.of(model)
    arrays = _arrays(npz)
    inner = opened.model.clone()  # whose shapes are inferred
    sites = graph.sites(inner)
    wanted = inputs.read(inner, opened.path, sites)
    names = [entry.name for entry in wanted]
    if set(arrays) != set(names):
        raise files.BadInput(
            f"{npz}: expected arrays {', '.join(names)}, found {', '.join(arrays) or 'none'};"
            f" name them as the inputs of {opened.path.name}"
        )
    _check(npz, wanted, arrays)
    masks = [entry for entry in wanted if entry.is_mask]
    masked = settled = None
    if masks:
        with closing(Scores(opened, sites)) as scores:
            masked = _masked(scores, arrays)
            settled = scores.settled(arrays, masked)
    keys = {
        entry.name: arrays[entry.name] != 0
        for entry in masks
        if len(entry.dims) == 2 and arrays[entry.name].dtype.kind != "b" and not entry.is_float
    }
    fixed = frozenset(
        entry.name for entry in wanted if entry.role not in ("ids", "floats", "integers")
    )
    feed = Feed(npz.name, arrays, keys, masked=masked, fixed=fixed, settled=settled)
    return [feed], f"from {npz.name}: {', '.join(map(str, wanted))}"


def _masked(scores: Scores, arrays: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    """Where queries have no key; None where the model does not tell, or does not run."""
    try:
        return [score.all(axis=-1) for score in scores.masked(arrays)] or None
    except Exception:  # ONNX Runtime's own types: whoever compares will say that it does not run
        return None


def _arrays(npz: Path) -> dict[str, np.ndarray]:
    try:
        with npz.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("one array, without a name")
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy, zipfile, zlib and ast raise their own
        raise files.BadInput(
            f"{npz}: expected an .npz file of arrays, found: {error}; write it with numpy.savez"
        ) from None


def _check(npz: Path, wanted: list[Input], arrays: dict[str, np.ndarray]) -> None:
    sizes: dict[str, tuple[int, str]] = {}  # by name of a dimension, and whose it is
    for entry in wanted:
        array = arrays[entry.name]
        given = f"found {array.dtype} {array.shape}"
        fits = array.dtype == entry.dtype and array.ndim == len(entry.dims)
        pairs = list(zip(entry.dims, array.shape, strict=False))
        if not fits or any(isinstance(dim, int) and dim != length for dim, length in pairs):
            raise files.BadInput(f"{npz}: expected {entry}, {given}; change the array")
        for dim, length in pairs:
            if isinstance(dim, int):
                continue
            first, whose = sizes.setdefault(dim, (length, entry.name))
            if first != length:
                raise files.BadInput(
                    f"{npz}: expected {dim} of one size, found {first} in {whose} and {length} in"
                    f" {entry.name}; change the arrays"
                )
        if not array.size and entry.role not in ("cache", "cross"):  # which may be empty
            raise files.BadInput(f"{npz}: expected values for {entry}, {given}; change the array")
        if entry.role == "ids" and array.size and not 0 <= array.min() <= array.max() < entry.bound:
            raise files.BadInput(
                f"{npz}: expected {entry.name} from 0 to {entry.bound - 1}, the rows of the table"
                f" that it indexes, found {array.min()} to {array.max()}; change the ids"
            )


def save(feed: Feed, npz: str | Path) -> None:
    """Write `feed` to the file `npz`, to be read by `load`; whole or not at all."""
    with files.replacing(npz) as draft, draft.open("wb") as file:
        np.savez(file, **feed.arrays)
