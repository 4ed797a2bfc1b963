"""Sizes for the open dimensions of a model's inputs: what each is, and which to try first."""

import ast
import dataclasses
import operator
import re
from collections.abc import Iterator, Mapping

import numpy as np

# Sizes for a dimension of floats (frames, samples, pixels), from small: the first that runs.
LADDER = (8, 10, 12, 16, 32, 64, 96, 128, 224, 256, 384, 400, 512, 800, 1600, 3000, 4096, 16_000)
BATCH = "batch"
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclasses.dataclass
class Input:
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


def size(dim: int | str, sizes: Mapping[str, int]) -> int:
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


class Sizes:
    """The open dimensions by what they are: batch, cache, signal, mask and token lengths."""

    def __init__(self, inputs: list[Input]) -> None:
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

    def assign(self, at: "At") -> dict[str, int]:
        """Sizes by name. Token lengths of other names (an encoder's, a decoder's) are apart."""
        masks = {"token": at.token, "sum": at.token + at.cache, "signal": at.signal}
        sizes = {BATCH: at.batch, "cache": at.cache, "signal": at.signal, "mask": masks[at.mask]}
        tokens = [symbol for symbol, kind in self.kind.items() if kind == "token"]
        return {
            symbol: at.token - at.apart * tokens.index(symbol) if kind == "token" else sizes[kind]
            for symbol, kind in self.kind.items()
        }

    def tries(self) -> Iterator["At"]:
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
                            yield At(batch, 8, cache, signal, mask, apart)
        if "token" in kinds:  # the length that was traced may be the only one
            for token in (*range(2, 33), 64, 128):
                yield At(2, token, 5, LADDER[0], "token", 0)


@dataclasses.dataclass(frozen=True)
class At:
    """Sizes of the open dimensions; `mask` names what a mask of its own length is as long as."""

    batch: int
    token: int
    cache: int
    signal: int
    mask: str
    apart: int
