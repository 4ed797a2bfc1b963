"""What each input of a model holds, read off what the graph does with it.

ids        rows of a table that they look up (Gather and its kin), within its bounds
positions  what rotary embeddings turn into angles, or what is compared with positions
flag       one value that decides which branch of an If runs
lengths    how much of each sample is there, (batch,)
total      how many positions there are, past ones included: one number
mask       which keys a query may see; its sense is found later, by what it does to scores
cache      keys or values of earlier steps
buffer     the same, in a buffer that a step writes into (`helpers.graph.in_place`)
filled     how many positions of the buffers hold keys
integers   none of these: zeros and ones
floats     none of these: normal numbers, smaller where they would put scores far apart
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers import files, graph
from helpers.graph import operators, walks
from helpers.graph.masks import masking_inputs, rotates, score_paths
from helpers.graph.operators import Holds
from helpers.graph.values import COMPARING, LOGICAL, SHAPING, finite_number, looked_up

_KEEPING_IDS = SHAPING | {"Abs", "Clip", "Floor", "Max", "Min", "Mod", "Round", "Where"}
_SCALING = {"Add", "Mul", "Sub"}
_ELEMENTWISE = graph.ELEMENTWISE | LOGICAL
_REDUCING = {"ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "CumSum"}
_THROUGH = SHAPING | _ELEMENTWISE | _REDUCING


@dataclasses.dataclass
class Input:
    """An input of the graph. A dimension is a size, or a name or an expression of names.

    `role` is what it holds (see the module). Ids are from `low` to below `bound`. Of a mask,
    `keep` and `drop` are the values that mark a key and none, and `pairs` says that its last two
    axes are queries and keys (else its last are keys alone); `in_scores`, that it is seen there.
    """

    name: str
    dtype: np.dtype
    dims: list[int | str]
    role: str = "floats"
    low: int = 0
    bound: int | None = None
    indexes: bool = False  # whether it indexes something that is not a table
    keep: float = 1
    drop: float = 0
    pairs: bool = False
    in_scores: bool = False
    special: tuple[
        int, ...
    ] = ()  # values that the graph compares it with: of ids, padding or an end
    counted: bool = False  # whether its keys are counted, and the count given to an operator
    scale: float = 1.0  # of normal numbers

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f" or self.dtype.name == "bfloat16"

    @property
    def is_mask(self) -> bool:
        return self.role == "mask"

    @property
    def is_normal(self) -> bool:
        """Whether normal numbers are fed."""
        return self.role in ("floats", "cache", "cross", "buffer")

    @property
    def additive(self) -> bool:
        """Whether the mask is added to scores: zeros, and very low numbers."""
        return self.is_mask and self.drop < -1

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.dims))})"

    def described(self) -> str:
        """The input, and what is fed, in words that a user can check."""
        if self.role == "ids":
            low = f"from {self.low} " if self.low else ""
            what = f"ids {low}below {self.bound}"
        elif self.additive:
            what = "additive mask (0 is a key; the lowest number, -inf and -1e4 are none)"
        elif self.is_mask:
            what = f"mask ({self.keep:g} is a key)"
        else:
            what = {
                "lengths": "lengths",
                "last": "index of the last key",
                "total": "number of positions",
                "amount": "a number, up to that of the positions",
                "cache": "cache, normal",
                "buffer": "cache in place, normal",
                "filled": "how many positions of the caches are filled",
                "cross": "keys or values of another sequence, normal",
                "integers": "bytes" if self.dtype == np.uint8 else "integers 0 and 1",
                "floats": "normal",
                "positions": "positions",
            }[self.role]
        scaled = f" × {self.scale:g}" if self.scale != 1 else ""
        return f"{self} {what}{scaled}"


def read(model: ir.Model, path: Path, sites: Sequence[graph.Site]) -> list[Input]:
    """The inputs of `model`, which is the one at `path`, with the role of each.

    `sites` are the attention sites of `model`, whose shapes are inferred where that is needed.

    Raises `files.BadInput` where one is no tensor of known type and rank.
    """
    entries = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or value.shape is None:
            raise files.BadInput(
                f"{path}: expected inputs that are tensors of known type and rank, found"
                f" {value.name} ({value.type}); give --inputs FEEDS.npz"
            )
        entries.append(Input(value.name, value.dtype.numpy(), _dims(value)))
    values = {value.name: value for value in model.graph.inputs}
    for entry in entries:
        if not entry.is_float and entry.dtype.kind != "b":
            entry.special = _compared(values[entry.name])
    paths = score_paths(sites)
    for entry in entries:
        entry.role = _role(entry, values[entry.name], paths)
    if any(entry.indexes for entry in entries):  # what it indexes may be a table of unknown shape
        passes.ShapeInferencePass()(model)
        for entry in entries:
            entry.indexes = False
            entry.role = _role(entry, values[entry.name], paths)
        masking = masking_inputs(model, sites)
        for entry in entries:
            if entry.is_mask and values[entry.name] in masking:
                entry.indexes = _is_looked_up(values[entry.name])
    growing = {entry.name for entry in entries if _grows(values[entry.name])}
    caches = [entry for entry in entries if entry.role == "floats" and len(entry.dims) == 4]
    caches = caches if len(caches) > 1 else []  # one alone is an image
    caches += [  # keys and values as one: (2, batch, heads, past, width)
        entry
        for entry in entries
        if entry.role == "floats" and len(entry.dims) == 5 and entry.name in growing
    ]
    lengths = {entry.dims[-2] for entry in caches if entry.name in growing}
    for entry in caches:
        entry.role = "cache" if entry.dims[-2] in lengths else "cross"
    if buffers := graph.buffers(model):
        for entry in entries:
            entry.role = "buffer" if entry.name in buffers.given else entry.role
            entry.role = "filled" if entry.name == buffers.length else entry.role
    return entries


def _dims(value: ir.Value) -> list[int | str]:
    """The sizes of the axes. One that is unknown has a name of its own."""
    dims: list[int | str] = []
    for axis, dim in enumerate(value.shape):
        text = str(dim) if isinstance(dim, int) else dim.value or f"{value.name}_{axis}"
        dims.append(int(text) if text.isdigit() else text)
    return dims


def _role(entry: Input, value: ir.Value, score_paths: set[tuple[ir.Node, int]]) -> str:
    _lookups(value, entry)
    if entry.bound is not None and entry.bound > entry.low:
        return "ids"
    if entry.indexes and len(entry.dims) == 1:  # the last row of each sample, by its length
        entry.indexes = False
        return "lengths"
    sinks = [*walks.uses(value, _THROUGH)]
    small = all(dim == 1 for dim in entry.dims)
    if small and any(node.op_type == "If" for node, _ in sinks):
        return "flag"
    held = {what for node, at in sinks for what in operators.held(node, at)}
    if entry.is_float:
        masks = len(entry.dims) > 1 and any(
            (node, at) in score_paths for node, at in walks.uses(value, SHAPING | _ELEMENTWISE)
        )
        width = entry.dims[-1] if len(entry.dims) == 3 else None
        hidden = isinstance(width, int) and width != entry.dims[1]  # states (batch, length, width)
        named = "mask" in entry.name and 1 < len(entry.dims) < 4 and not hidden
        return "mask" if masks or named else "floats"
    if len(entry.dims) < 2 or small:
        if held & {Holds.LAST, Holds.TOTAL}:
            return "last" if Holds.LAST in held and entry.dims else "total"
        if entry.dtype.kind == "b":
            return "flag" if small else "integers"
        if rotates(value):
            return "positions"
        return "amount" if small else "lengths"
    if rotates(value):
        return "positions"
    entry.counted = Holds.LAST in held
    one_a_sample = len(entry.dims) == 2 and entry.dims[1] == 1
    if one_a_sample and any(node.op_type in COMPARING for node, _ in sinks):
        return "lengths"
    return "mask"


class _Scaled(NamedTuple):
    """What a value is of the ids, factor·ids + offset: in `whole` numbers, or not; and below
    `wraps`, where the graph brings it within bounds by itself."""

    factor: float
    offset: float
    whole: bool
    wraps: int = 0


def _lookups(origin: ir.Value, entry: Input) -> None:
    """Find the tables that an input looks up, and so the bounds of its ids.

    What is followed is a·ids + b, for the numbers a and b that the graph has on the way: Keras adds
    the table's rows to negative ids in a Where, RoBERTa's positions begin at 2.
    """
    queue, seen = [(origin, _Scaled(1.0, 0.0, not entry.is_float))], set()
    while queue:
        value, scaled = queue.pop()
        for node, position in value.uses():
            rows = [*looked_up(node, position)] if scaled.whole else []
            for count in rows:
                _bound(entry, scaled, count)
            kept = node.op_type in _KEEPING_IDS | _SCALING
            if rows or not kept or (node, position) in seen:
                continue
            seen.add((node, position))
            further = _scaled_by(node, position, scaled, entry)
            if further is not None:
                queue += [(result, further) for result in node.outputs]


def _bound(entry: Input, scaled: _Scaled, rows: int | None) -> None:
    """Have the ids stay within a table of so many `rows`, which they look up as `scaled`."""
    if rows is None:
        entry.indexes = True
        return
    bound = scaled.wraps or int(np.floor((rows - 1 - scaled.offset) / scaled.factor)) + 1
    if bound > 0:  # else it is where negative ids are brought into the table
        low = 0 if scaled.wraps else int(np.ceil(-scaled.offset / scaled.factor))
        entry.bound = min(entry.bound or bound, bound)
        entry.low = max(entry.low, low)


def _scaled_by(node: ir.Node, position: int, scaled: _Scaled, entry: Input) -> _Scaled | None:
    """What `node` makes of its input at `position`, which is `scaled`; None: no ids any more."""
    kind = node.op_type
    if (kind, position) in (("Where", 0), ("Gather", 1), ("Sub", 1)):
        return None
    if kind == "Mod" and position == 0:  # within bounds by itself: once around
        return scaled._replace(wraps=2 * int(finite_number(node.inputs[1]) or 0))
    if kind == "Cast":
        to = ir.DataType(node.attributes.get_int("to", 1))
        return scaled._replace(whole=not to.is_floating_point())
    if kind not in _SCALING:
        return scaled
    number = finite_number(node.inputs[1 - position])
    if kind == "Mul":
        if number is None or number <= 0:
            return None
        return scaled._replace(factor=scaled.factor * number, offset=scaled.offset * number)
    if number is None:
        return None if entry.is_float else scaled
    return scaled._replace(offset=scaled.offset + (number if kind == "Add" else -number))


def _is_looked_up(value: ir.Value) -> bool:
    """Whether `value` itself is looked up, and not what is computed from it: blocks of a mask have
    numbers of their own, by which positions between them are looked up."""
    return any([*looked_up(node, at)] for node, at in walks.uses(value, SHAPING))


def _compared(value: ir.Value) -> tuple[int, ...]:
    """The numbers that an input of integers is compared with, or those next to them."""
    numbers: set[int] = set()
    for node, at in walks.uses(value, SHAPING):
        bound = finite_number(node.inputs[1 - at]) if node.op_type in COMPARING else None
        if bound is not None:
            above = {"Greater": 1, "Less": -1}.get(node.op_type, 0) * (1 if at == 0 else -1)
            numbers.add(int(bound) + above)
    return tuple(sorted(numbers))


def _grows(cache: ir.Value) -> bool:
    """Whether new keys or values are appended to a cache: by Concat, or by an operator."""
    return any(
        node.op_type == "Concat" or at in operators.numbers(node, *operators.PASTS)
        for node, at in walks.uses(cache, SHAPING - {"Concat"})
    )


def flag_values(model: ir.Model, entry: Input) -> list[int]:
    """The values to try for a flag: 0 and 1, and those next to what it is compared with."""
    value = next(value for value in model.graph.inputs if value.name == entry.name)
    if entry.dtype.kind == "b":
        return [0, 1]
    compared = {
        int(number) + more
        for node, at in walks.uses(value, _THROUGH)
        if node.op_type in COMPARING and (number := finite_number(node.inputs[1 - at])) is not None
        for more in (-1, 0, 1)
    }
    return sorted({0, 1} | compared)[:8]
