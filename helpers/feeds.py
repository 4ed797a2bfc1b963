"""Inputs for a model: read from a file, or inferred from the graph.

Inferred are the values (ids within the embedding table that they index, masks of ones and zeros
with padding, seeded normal floats) and the sizes (dimensions of one name have one size, every
batch dimension the same, and what is still open is tried until the model runs).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from helpers import files, graph
from helpers.sizes import BATCH, At, Input, Sizes, size

_PASSING = {  # what leaves ids as they are
    *("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
_ROTATING = _PASSING | {"Add", "Einsum", "MatMul", "Mul", "Sub"}  # from positions to their angles


@dataclasses.dataclass(frozen=True)
class Feed:
    """One set of inputs by name. `keys` has the masks among them, by name: True where there is a
    key, each (batch, length). `inferred` ones may be passed over where the reference gives NaN."""

    name: str
    arrays: dict[str, np.ndarray]
    keys: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    inferred: bool = False

    def changed(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays with other values where `rows`, (batch, length), is True: ids and floats of
        that batch and length that are no masks."""
        arrays = dict(self.arrays)
        for name, array in arrays.items():
            if name in self.keys or array.shape[:2] != rows.shape or array.ndim > 3:
                continue
            arrays[name] = array = array.copy()
            if array.dtype.kind == "f":
                array[rows] *= -1  # a constant added would be lost in a LayerNormalization
            else:  # 0 and 1 are in range of any table
                array[rows] = array[rows] == 0
        return arrays


def _inputs(path: Path) -> list[Input]:
    found = []
    for value in graph.load(path, weights=False).graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or value.shape is None:
            raise files.BadInput(
                f"{path}: expected inputs that are tensors of known type and rank, found"
                f" {value.name} ({value.type}); give --inputs FEEDS.npz"
            )
        dims: list[int | str] = []
        for axis, dim in enumerate(value.shape):
            text = str(dim) if isinstance(dim, int) else dim.value or f"{value.name}_{axis}"
            dims.append(int(text) if text.isdigit() else text)
        one = Input(value.name, value.dtype.numpy(), dims)
        if not one.is_float:
            _follow(value, one)
        found.append(one)
    return found


def _follow(origin: ir.Value, one: Input) -> None:
    """Find what an integer input holds: ids, by the tables that it indexes, or positions."""
    queue, seen = [origin], set()
    while queue:
        value = queue.pop()
        for node, index in value.uses():
            if node.op_type in ("Gather", "GatherElements") and index == 1:
                data, axis = node.inputs[0], node.attributes.get_int("axis", 0)
                if data.shape is not None and isinstance(data.shape[axis], int):
                    one.bound = min(one.bound or data.shape[axis], data.shape[axis])
                else:
                    one.indexes = True
            elif node.op_type in _PASSING and node not in seen:
                seen.add(node)
                queue.extend(node.outputs)
    one.positions = one.bound is None and not one.indexes and _rotates(origin)


def _rotates(value: ir.Value) -> bool:
    """Whether the angles of rotary embeddings are made of an input: it holds positions, no mask."""
    queue, seen = [value], set()
    while queue:
        for node, _ in queue.pop().uses():
            if node.op_type in ("Cos", "RotaryEmbedding", "Sin"):
                return True
            if node.op_type in _ROTATING and node not in seen:
                seen.add(node)
                queue.extend(node.outputs)
    return False


# ── Inferred ──────────────────────────────────────────────────────────────────────────────────────


def infer(path: str | Path) -> tuple[list[Feed], str]:
    """Feeds for the model at `path`, and in one line what was inferred.

    Several batch sizes and lengths where they are dynamic; where there is a mask, without padding,
    with padding on the right and on the left, and with one sample that is padding altogether.
    Raises `files.BadInput` where an input cannot be inferred, or the model runs on nothing tried.
    """
    path = Path(path).absolute()
    inputs = _inputs(path)
    for one in inputs:
        if one.indexes or one.dtype.kind not in "fiub":
            raise files.BadInput(
                f"{path}: expected inputs that can be inferred (ids, masks, floats), found {one};"
                " give --inputs FEEDS.npz"
            )
    sizes = Sizes(inputs)
    try:
        session = files.session(path)
    except Exception as error:  # ONNX Runtime's own types
        raise files.refused(path, error) from None

    def feed(name: str, at: At, padding: str = "no", keep: bool = True) -> Feed:
        arrays = _arrays(inputs, sizes.assign(at), padding, keep)
        masks = [one.name for one in inputs if one.is_mask and len(one.dims) == 2]
        keys = {name: arrays[name].astype(bool) == keep for name in masks}
        return Feed(name, arrays, keys, True)

    def problem(at: At) -> str | None:
        try:
            session.run(None, feed("", at).arrays)
        except Exception as error:  # ONNX Runtime's own types, or a size that cannot be
            return str(error)
        return None

    problems: list[str] = []
    for smallest in sizes.tries():
        said = problem(smallest)
        if said is None:
            break
        problems.append(said)
    else:
        raise files.BadInput(
            f"{path}: expected a model that runs on inputs inferred from its graph"
            f" ({'; '.join(map(str, inputs))}), found: {problems[0][:300]}; give --inputs FEEDS.npz"
        )
    # The smallest signal proves little: convolutions may leave one frame of it, which is one key.
    factors = (40 if sizes.waveform else 16 if sizes.image else 4, 4, 2, 1)
    grown = [(f * smallest.signal, token) for f in factors for token in (17, smallest.token)]
    larger = [dataclasses.replace(smallest, signal=s, token=t) for s, t in grown]
    long = next((at for at in larger if problem(at) is None), smallest)
    half = dataclasses.replace(smallest, signal=long.signal // 2)
    short = half if problem(half) is None else smallest
    masked = any(one.is_mask for one in inputs)
    keep = not _inverted(session, inputs, feed("", short))
    single, more = dataclasses.replace(short, batch=1), dataclasses.replace(long, batch=3)
    single = single if problem(single) is None else short
    more = more if long.batch > 1 and problem(more) is None else long
    feeds = [
        feed("short", single, "no", keep),
        feed("long", more, "no", keep),
    ]
    if masked:
        feeds += [
            feed("short, padded on the right", short, "right", keep),
            feed("long, padded on the left", more, "left", keep),
            feed("short, one sample padding altogether", short, "all", keep),
        ]
    one_only = smallest.batch == 1 and BATCH in sizes.kind.values()
    note = "; batch 1, since the model refuses a batch of 2" if one_only else ""
    return feeds, _describe(inputs, feeds, keep) + note


# ── Values ──────────────────────────────────────────────────────────────────────────────────────


def _arrays(
    inputs: list[Input], sizes: Mapping[str, int], padding: str, keep: bool
) -> dict[str, np.ndarray]:
    """Seeded values. In masks `keep` marks a key; `padding` is no, right, left or all."""
    random = np.random.default_rng(0)
    arrays = {}
    for one in inputs:
        shape = tuple(size(dim, sizes) for dim in one.dims)
        if one.is_mask:
            values = np.full(shape, keep)
            length = shape[-1]
            for row in range(shape[0]):
                cut = (length // 3 + row) % length if row or shape[0] == 1 else 0
                if padding == "left" and len(shape) == 2:
                    values[row, :cut] = not keep
                elif padding in ("left", "right"):  # images are padded on the right alone
                    values[row, ..., length - cut :] = not keep
            if padding == "all" and len(shape) == 2:
                values[-1] = not keep
        elif one.is_float:
            values = random.normal(size=shape)
        elif one.bound is not None:
            values = random.integers(0, one.bound, size=shape)
        else:  # positions, or a flag
            values = np.broadcast_to(np.arange(shape[-1]), shape) if shape else 1
        arrays[one.name] = np.asarray(values).astype(one.dtype)
    return arrays


def _inverted(session: ort.InferenceSession, inputs: list[Input], feed: Feed) -> bool:
    """Whether a True in the graph's boolean mask means padding, as in torch.nn.MultiheadAttention.

    Mask the first position away as if True meant a key, and change what is there: other rows must
    not notice. If they do, True means padding.
    """
    masks = [one.name for one in inputs if one.is_mask and one.dtype.kind == "b"]
    if not masks:
        return False
    for name in masks:
        feed.arrays[name][:, 0] = False
    rows = np.zeros(feed.arrays[masks[0]].shape, bool)
    rows[:, 0] = True
    runs = [session.run(None, arrays) for arrays in (feed.arrays, feed.changed(rows))]
    return any(
        not np.array_equal(before[:, 1:], after[:, 1:])
        for before, after in zip(*runs, strict=True)
        if before.ndim > 2 and before.shape[:2] == rows.shape
    )


def _describe(inputs: list[Input], feeds: list[Feed], keep: bool) -> str:
    parts = []
    for one in inputs:
        what = "normal" if one.is_float else "positions"
        if one.is_mask:
            what = f"mask ({int(keep)} is a key)"
        elif one.bound is not None:
            what = f"ids below {one.bound}"
        parts.append(f"{one} {what}")
    shapes = dict.fromkeys(str(feed.arrays[inputs[0].name].shape) for feed in feeds)
    padding = "; padded not at all, right, left, altogether" if len(feeds) > 2 else ""
    return f"inferred: {'; '.join(parts)}; {inputs[0].name} {', '.join(shapes)}{padding}"


# ── From a file ─────────────────────────────────────────────────────────────────────────────────


def read(npz: str | Path | None, path: str | Path) -> tuple[list[Feed], str]:
    """What `load` gives, or where there is no file `npz`, what `infer` does."""
    return load(npz, path) if npz else infer(path)


def load(npz: str | Path, path: str | Path) -> tuple[list[Feed], str]:
    """The feed in the file `npz`, an array for each input of the model, and a description.

    Raises `files.BadInput` on a file that is none, and on names, types, ranks or fixed sizes that
    are not the model's, and ids outside of the table that they index.
    """
    npz, path = Path(npz), Path(path).absolute()
    try:
        with npz.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("one array, without a name")
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy, zipfile, zlib and ast raise their own
        raise files.BadInput(
            f"{npz}: expected an .npz file of arrays, found: {error}; write it with numpy.savez"
        ) from None
    inputs = _inputs(path)
    names = [one.name for one in inputs]
    if set(arrays) != set(names):
        raise files.BadInput(
            f"{npz}: expected arrays {', '.join(names)}, found {', '.join(arrays) or 'none'};"
            f" name them as the inputs of {path.name}"
        )
    sizes: dict[str, tuple[int, str]] = {}  # by name of a dimension, and whose it is
    for one in inputs:
        array = arrays[one.name]
        found = f"found {array.dtype} {array.shape}"
        fits = array.dtype == one.dtype and array.ndim == len(one.dims)
        pairs = list(zip(one.dims, array.shape, strict=False))
        if not fits or any(isinstance(dim, int) and dim != length for dim, length in pairs):
            raise files.BadInput(f"{npz}: expected {one}, {found}; change the array")
        for dim, length in pairs:
            if isinstance(dim, int):
                continue
            known, whose = sizes.setdefault(dim, (length, one.name))
            if known != length:
                raise files.BadInput(
                    f"{npz}: expected {dim} of one size, found {known} in {whose} and {length} in"
                    f" {one.name}; change the arrays"
                )
        is_cache = one.is_float and len(one.dims) == 4  # which may be empty
        if not array.size and not is_cache:
            raise files.BadInput(f"{npz}: expected values for {one}, {found}; change the array")
        if one.bound and not 0 <= array.min() <= array.max() < one.bound:
            raise files.BadInput(
                f"{npz}: expected {one.name} from 0 to {one.bound - 1}, the rows of the table that"
                f" it indexes, found {array.min()} to {array.max()}; change the ids"
            )
    masks = [one.name for one in inputs if one.is_mask and len(one.dims) == 2]
    keys = {name: arrays[name] != 0 for name in masks if arrays[name].dtype.kind != "b"}
    return [Feed(npz.name, arrays, keys)], f"from {npz.name}: {', '.join(map(str, inputs))}"
