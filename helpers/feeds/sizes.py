"""Sizes for the open dimensions of a model's inputs: what each is, and which to try first."""

import ast
import dataclasses
import operator
import re
from collections.abc import Iterator, Mapping, Sequence

from helpers.feeds.inputs import Input

# Sizes for a dimension of floats (frames, samples, pixels), from small: the first that runs.
LADDER = (8, 10, 12, 16, 32, 64, 96, 128, 224, 256, 384, 400, 512, 800, 1600, 3000, 4096, 16_000)
BATCH = "batch"
FREE = 3  # positions of a buffer that are not needed
HEADS = (1, 2, 4, 8, 12, 16, 3, 6)  # that a mask of (batch · heads, queries, keys) may have
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


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


def evaluated(dim: int | str, sizes: Mapping[str, int]) -> int:
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


def _kinds(inputs: list[Input]) -> dict[str, str]:
    """What each open dimension is, by its name: what is claimed first counts."""
    kinds: dict[str, str] = {}
    # A first axis is the batch, unless its name is a later axis too: of a mask (n, n), or of a
    # signal that has its length first.
    later = {symbol for entry in inputs for dim in entry.dims[1:] for symbol in _symbols(dim)}

    def claim(kind: str, dims: Sequence[int | str]) -> None:
        for dim in dims:
            for symbol in _symbols(dim):
                kinds.setdefault(symbol, kind)

    for entry in inputs:
        several = len(entry.dims) > 1 or entry.role in ("lengths", "last")
        if several and entry.role != "mask":
            claim(BATCH, [dim for dim in entry.dims[:1] if not later & {*_symbols(dim)}])
    for entry in inputs:  # a signal that has its length first has the batch after that
        if entry.role == "floats" and len(entry.dims) > 2 and later & {*_symbols(entry.dims[0])}:
            claim(BATCH, entry.dims[1:2])
    for entry in inputs:  # a mask's own first axis: (batch · heads, …), or queries, or a batch
        if entry.role == "mask" and len(entry.dims) > 1:
            own = [dim for dim in entry.dims[:1] if not later & {*_symbols(dim)}]
            claim({2: "rows", 3: "folded"}.get(len(entry.dims), BATCH), own)
    for entry in inputs:
        claim("cross", entry.dims[-2:] if entry.role == "cross" else [])
    for entry in inputs:
        claim("past", entry.dims[-2:] if entry.role == "cache" else [])
    for entry in inputs:
        claim("capacity", entry.dims[-2:] if entry.role == "buffer" else [])
    for entry in inputs:
        claim("signal", entry.dims if entry.role == "floats" else [])
    for entry in inputs:
        claim(
            "token",
            entry.dims if entry.role not in ("mask", "floats", "cache", "cross") else [],
        )
    for entry in inputs:
        if entry.role == "mask":
            claim("mask", entry.dims[-1:])
            claim("queries", entry.dims)
    for entry in inputs:
        claim("signal", entry.dims)
    return kinds


class Sizes:
    """The open dimensions by what they are: batch, past, signal, mask and token lengths."""

    def __init__(self, inputs: list[Input]) -> None:
        self.kind = _kinds(inputs)
        floats = [entry for entry in inputs if entry.role == "floats"]
        self.waveform = any(len(entry.dims) == 2 for entry in floats)
        self.image = any(len(entry.dims) >= 4 for entry in floats)
        self.past = "past" in self.kind.values() or any(one.role == "buffer" for one in inputs)
        widths = [
            entry
            for entry in inputs
            if entry.role == "ids"
            or (
                entry.role == "floats"
                and 0 < len(entry.dims) < 4
                and isinstance(entry.dims[-1], int)
            )
        ]
        fixed = [entry.dims[1] for entry in widths if len(entry.dims) > 1]
        self.fixed = next((dim for dim in fixed if isinstance(dim, int)), 0)
        cached = [entry.dims[-2] for entry in inputs if entry.role == "cache"]
        self.fixed_past = next((dim for dim in cached if isinstance(dim, int)), 0)

    def queries(self, at: "At") -> int:
        """How many positions are new: tokens, or frames of a signal."""
        kinds = self.kind.values()
        if "token" not in kinds and (self.fixed or "signal" in kinds):
            return self.fixed or at.signal
        return at.token

    def with_queries(self, at: "At", count: int) -> "At":
        """The same sizes but for `count` new positions, of tokens or else of a signal."""
        if "token" in self.kind.values():
            return dataclasses.replace(at, token=count)
        return dataclasses.replace(at, token=count, signal=count)

    def before(self, at: "At") -> int:
        """How many positions are past."""
        return at.past if self.past else self.fixed_past

    def assign(self, at: "At") -> dict[str, int]:
        """Sizes by name. Token lengths of other names (an encoder's, a decoder's) are apart."""
        queries, tokens = self.queries(at), "token" in self.kind.values() or self.fixed
        lengths = {"token": at.token, "signal": at.signal}
        masks = {
            "token": queries if tokens else at.token,
            "sum": queries + self.before(at),
            "signal": at.signal,
            "one more": queries + 1,
            "all": sum(lengths.get(kind, 0) for kind in self.kind.values()),
        }
        queries = at.signal if at.mask == "signal" else queries
        sizes = {
            BATCH: at.batch,
            "past": at.past,
            "capacity": queries + self.before(at) + FREE,
            "cross": max(at.past, 5) + 2,
            "signal": at.signal,
            "mask": masks[at.mask],
            "queries": queries,
            "folded": at.batch * at.heads,
            "rows": at.batch if at.rows == BATCH else queries,
        }
        tokens = [symbol for symbol, kind in self.kind.items() if kind == "token"]
        return {
            symbol: max(at.token - at.apart * tokens.index(symbol), 1)
            if kind == "token"
            else sizes[kind]
            for symbol, kind in self.kind.items()
        }

    def tries(self, constants: Sequence[int] = ()) -> Iterator["At"]:
        """Sizes to try, the likeliest first; then the `constants` that are written in the graph."""
        kinds = set(self.kind.values())
        masks = ("token", "signal", "sum")
        if self.past or self.fixed_past:
            masks = ("sum", "token", "signal")
        elif "signal" in kinds and (self.waveform or "token" not in kinds):
            masks = ("signal", "token", "sum")  # of another length it runs too, and masks nothing
        masks = (*masks, "all", "one more") if kinds & {"mask", "queries"} else ("token",)
        for batch in (2, 1):
            for past in (5, 0) if self.past else (5,):
                for signal in LADDER if "signal" in kinds else LADDER[:1]:
                    for mask in masks:
                        for apart in (2, 0):
                            for heads in HEADS if "folded" in kinds else (1,):
                                for rows in (BATCH, "queries") if "rows" in kinds else (BATCH,):
                                    yield At(batch, 8, past, signal, mask, apart, heads, rows)
        if "token" in kinds:  # the length that was traced may be the only one
            for token in (*range(2, 33), 64, 128):
                yield At(2, token, 5, LADDER[0], masks[0], 0)
        for constant in constants:
            for batch in (2, 1):
                yield At(batch, constant, 5, constant, masks[0], 0)


@dataclasses.dataclass(frozen=True)
class At:
    """Sizes of the open dimensions. `mask` names what a mask of its own length is as long as, and
    `rows` what the first axis of a mask of two is; `apart` is how much shorter each further token
    length is (a decoder's, beside an encoder's)."""

    batch: int
    token: int
    past: int
    signal: int
    mask: str
    apart: int = 2
    heads: int = 1
    rows: str = BATCH
