"""Inputs for a model: read from a file, or inferred from the graph.

Inferred are the values (ids within the embedding table that they index, masks of ones and zeros
with padding, seeded normal floats) and the sizes (dimensions of one name have one size, every
batch dimension the same, and what is still open is tried until the model runs).
"""

import ast
import dataclasses
import operator
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from helpers import files

# Sizes for a dimension of floats (frames, samples, pixels), from small: the first that runs.
LADDER = (8, 10, 12, 16, 32, 64, 96, 128, 224, 256, 384, 400, 512, 800, 1600, 3000, 4096, 16_000)
BATCH = "batch"
_PASSING = {  # what leaves ids as they are
    *("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
_ROTATING = _PASSING | {"Add", "Einsum", "MatMul", "Mul", "Sub"}  # from positions to their angles
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


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


@dataclasses.dataclass
class _Input:
    """An input of the graph. A dimension is a size, or a name or expression of names."""

    name: str
    dtype: np.dtype
    dims: list[int | str]
    bound: int | None = None  # of the smallest table that its values index
    indexes: bool = False  # whether it indexes something that is not a table
    positions: bool = False  # whether sines and cosines are made of it

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f"

    @property
    def is_mask(self) -> bool:
        if self.is_float:
            return "mask" in self.name and len(self.dims) < 4
        known = self.bound is not None or self.indexes or self.positions
        return not known and len(self.dims) > 1

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.dims))})"


def _inputs(path: Path) -> list[_Input]:
    graph = ir.load(path).graph
    found = []
    for value in graph.inputs:
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
        one = _Input(value.name, value.dtype.numpy(), dims)
        if not one.is_float:
            _follow(value, one)
        found.append(one)
    return found


def _follow(origin: ir.Value, one: _Input) -> None:
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


# ── Sizes ───────────────────────────────────────────────────────────────────────────────────────


def _symbols(dim: int | str) -> list[str]:
    """The names in a dimension. What is no expression (seq.len, batch-size) is a name itself."""
    if isinstance(dim, int):
        return []
    try:
        ast.parse(dim, mode="eval")
    except SyntaxError:
        return [dim]
    if re.search(r"[^\w\s()+*/%,-]|[A-Za-z_]\w*[-/][A-Za-z_]", dim):
        return [dim]
    return [name for name in re.findall(r"[A-Za-z_]\w*", dim) if name not in ("Max", "Min")]


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension, where its names have `sizes`."""
    if isinstance(dim, int) or dim in sizes:
        return dim if isinstance(dim, int) else sizes[dim]

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return int(node.value)
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return {"Max": max, "Min": min}[node.func.id](map(value, node.args))
        raise KeyError(ast.dump(node))

    return value(ast.parse(dim, mode="eval").body)


class _Sizes:
    """The open dimensions by what they are: batch, cache, signal, mask and token lengths."""

    def __init__(self, inputs: list[_Input]) -> None:
        self.kind: dict[str, str] = {}
        caches = [one for one in inputs if one.is_float and len(one.dims) == 4]
        caches = caches if len(caches) > 1 else []  # one alone is an image

        def claim(kind: str, dims: list[int | str]) -> None:
            for dim in dims:
                for symbol in _symbols(dim):
                    self.kind.setdefault(symbol, kind)

        for one in inputs:
            claim(BATCH, one.dims[:1] if len(one.dims) > 1 else [])
        for one in caches:
            claim("cache", one.dims)
        for one in inputs:
            claim("signal", one.dims if one.is_float else [])
        for one in inputs:
            claim("token", [] if one.is_mask or one.is_float else one.dims)
        for one in inputs:
            claim("mask", one.dims)
        self.waveform = any(
            one.is_float and not one.is_mask and len(one.dims) == 2 for one in inputs
        )
        self.image = not caches and any(one.is_float and len(one.dims) == 4 for one in inputs)

    def assign(self, at: "_At") -> dict[str, int]:
        """Sizes by name. Token lengths of other names (an encoder's, a decoder's) are apart."""
        masks = {"token": at.token, "sum": at.token + at.cache, "signal": at.signal}
        sizes = {BATCH: at.batch, "cache": at.cache, "signal": at.signal, "mask": masks[at.mask]}
        tokens = [symbol for symbol, kind in self.kind.items() if kind == "token"]
        return {
            symbol: at.token - at.apart * tokens.index(symbol) if kind == "token" else sizes[kind]
            for symbol, kind in self.kind.items()
        }

    def tries(self) -> Iterator["_At"]:
        """Sizes to try, the likeliest first."""
        kinds = set(self.kind.values())
        masks = ("token", "sum", "signal")
        if "signal" in kinds and (self.waveform or "token" not in kinds):
            masks = ("signal", "token", "sum")  # of another length it runs too, and masks nothing
        for batch in (2, 1):
            for cache in (5, 0) if "cache" in kinds else (5,):
                for signal in LADDER if "signal" in kinds else LADDER[:1]:
                    for mask in masks if "mask" in kinds else ("token",):
                        for apart in (2, 0):
                            yield _At(batch, 8, cache, signal, mask, apart)
        if "token" in kinds:  # the length that was traced may be the only one
            for token in (*range(2, 33), 64, 128):
                yield _At(2, token, 5, LADDER[0], "token", 0)


@dataclasses.dataclass(frozen=True)
class _At:
    """Sizes of the open dimensions; `mask` names what a mask of its own length is as long as."""

    batch: int
    token: int
    cache: int
    signal: int
    mask: str
    apart: int


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
    sizes = _Sizes(inputs)
    try:
        session = files.session(path)
    except Exception as error:  # ONNX Runtime's own types
        raise files.BadInput(
            f"{path}: expected a model that ONNX Runtime {ort.__version__} can load,"
            f" found: {error}; export it again"
        ) from None

    def feed(name: str, at: _At, padding: str = "no", keep: bool = True) -> Feed:
        arrays = _arrays(inputs, sizes.assign(at), padding, keep)
        masks = [one.name for one in inputs if one.is_mask and len(one.dims) == 2]
        keys = {name: arrays[name].astype(bool) == keep for name in masks}
        return Feed(name, arrays, keys, True)

    def problem(at: _At) -> str | None:
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
    inputs: list[_Input], sizes: Mapping[str, int], padding: str, keep: bool
) -> dict[str, np.ndarray]:
    """Seeded values. In masks `keep` marks a key; `padding` is no, right, left or all."""
    random = np.random.default_rng(0)
    arrays = {}
    for one in inputs:
        shape = tuple(_size(dim, sizes) for dim in one.dims)
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


def _inverted(session: ort.InferenceSession, inputs: list[_Input], feed: Feed) -> bool:
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


def _describe(inputs: list[_Input], feeds: list[Feed], keep: bool) -> str:
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


def load(npz: str | Path, path: str | Path) -> tuple[list[Feed], str]:
    """The feed in the file `npz`, an array for each input of the model, and a description.

    Raises `files.BadInput` on a file that is none, and on names, types, ranks or fixed sizes that
    are not the model's, and ids outside of the table that they index.
    """
    npz, path = Path(npz), Path(path).absolute()
    try:
        with np.load(npz, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
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
    for one in inputs:
        array = arrays[one.name]
        fits = array.dtype == one.dtype and array.ndim == len(one.dims)
        pairs = zip(one.dims, array.shape, strict=False)
        if not fits or any(isinstance(dim, int) and dim != size for dim, size in pairs):
            raise files.BadInput(
                f"{npz}: expected {one}, found {array.dtype} {array.shape}; change the array"
            )
        if one.bound and array.size and not -one.bound <= array.min() <= array.max() < one.bound:
            raise files.BadInput(
                f"{npz}: expected {one.name} below {one.bound}, the rows of the table that it"
                f" indexes, found {array.min()} to {array.max()}; change the ids"
            )
    masks = [one.name for one in inputs if one.is_mask and len(one.dims) == 2]
    keys = {name: arrays[name] != 0 for name in masks if arrays[name].dtype.kind != "b"}
    return [Feed(npz.name, arrays, keys)], f"from {npz.name}: {', '.join(map(str, inputs))}"
