"""What a fused operator got, and what it computes with: its operands, heads and scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from helpers.graph import operators
from helpers.graph.operators import Holds, Input

ROLES = (Holds.QUERY, Holds.KEY, Holds.VALUE)


@dataclass
class Operand:
    """Queries, keys or values as an operator computes with them, in a layout of the input `one`."""

    array: np.ndarray
    layout: str
    one: Input


@dataclass
class Got:
    """The inputs `given` to the operator `node`, one of `operators.OPERATORS`, by number, and its
    first output; None where it `refused`, with what it said."""

    node: onnx.NodeProto
    given: dict[int, np.ndarray]
    output: np.ndarray | None
    refused: str = ""

    @property
    def operator(self) -> operators.Operator:
        return operators.of(self.node)

    @property
    def name(self) -> str:
        return f"{self.node.domain}.{self.node.op_type}".lstrip(".")

    def input(self, one: Input) -> str:
        """An input for a reader."""
        return f"{self.name}, input {one.number} ({one.name})"

    def attribute(self, name: str, default: float = 0) -> float:
        given = {one.name: one for one in self.node.attribute}
        return onnx.helper.get_attribute_value(given[name]) if name in given else default

    def held(self, *holds: Holds) -> tuple[Input, np.ndarray] | tuple[None, None]:
        """The input that holds one of these, and its array; None where it is not given, or has so
        many axes as no layout of it."""
        for one in self.operator.holding(*holds):
            array = self.given.get(one.number)
            if array is None or one.layout(array.ndim) is None:
                continue
            first = self.given.get(0, np.zeros(1))
            ends = array.shape == tuple(2 * size for size in first.shape[:1])  # (2·B,)
            if one.holds is not Holds.COUNT or not ends:
                return one, array
        return None, None

    def heads(self, *, of_keys: bool = False) -> int:
        """The number of heads that the operator takes there to be."""
        for role in (Holds.KEY, Holds.QUERY) if of_keys else (Holds.QUERY,):
            _, array = self.held(role)
            if array is not None:
                break
        if array is not None and array.ndim == 4:
            return array.shape[1]
        own = int(self.attribute(self.operator.heads, 1))
        return int(self.attribute(self.operator.key_heads, own)) if of_keys else own

    @property
    def hidden(self) -> int:
        """The width of all heads of the queries, N·D."""
        query = self._own().get(Holds.QUERY)
        if query is None:
            return 0
        shape = query.array.shape
        return shape[1] * shape[3] if len(shape) == 4 else shape[-1]

    @property
    def past(self) -> int:
        """How many past keys it is given."""
        one, array = self.held(*operators.PASTS)
        return 0 if one is None else array.shape[one.axis("P", array.ndim)]

    @property
    def scale(self) -> float:
        """What it multiplies its scores with: 1/√D where no scale is given."""
        return self.attribute("scale") or (self.hidden / self.heads()) ** -0.5

    def packed(self) -> np.ndarray | None:
        """The product of hidden states with packed weights, with its bias, (B, S, N·D+N·D+N·V)."""
        _, hidden = self.held(Holds.HIDDEN)
        _, matrix = self.held(Holds.WEIGHTS)
        _, bias = self.held(Holds.PROJECTION_BIAS)
        if hidden is None or matrix is None or hidden.shape[-1] != len(matrix):
            return None
        product = hidden @ matrix
        return product if bias is None or len(bias) != matrix.shape[-1] else product + bias

    def operands(self) -> dict[Holds, Operand]:
        """What it computes with, projected and with biases; those in no layout are left out, and
        those that it rotates itself."""
        rotated = (Holds.QUERY, Holds.KEY) if self.attribute("do_rotary") else ()
        return {role: operand for role, operand in self._own().items() if role not in rotated}

    def _own(self) -> dict[Holds, Operand]:
        product, (weights, _) = self.packed(), self.held(Holds.WEIGHTS)
        one, whole = (weights, product) if product is not None else self.held(Holds.PACKED)
        if one is not None and (product is not None or 1 not in self.given):
            return self._split(whole, one)
        return self._apart()

    def _apart(self) -> dict[Holds, Operand]:
        """Queries, keys and values that are inputs of their own, with their part of the bias."""
        found = {}
        for role in ROLES:
            one, array = self.held(role)
            if one is not None:
                found[role] = Operand(array, one.layout(array.ndim), one)
        _, bias = self.held(Holds.PROJECTION_BIAS)
        ends = np.cumsum([operand.array.shape[-1] for operand in found.values()])
        flat = all(operand.array.ndim == 3 for operand in found.values())
        if bias is not None and flat and len(found) == 3 and ends[-1] == len(bias):
            for operand, part in zip(found.values(), np.split(bias, ends[:-1]), strict=True):
                operand.array = operand.array + part
        return found

    def _split(self, whole: np.ndarray, one: Input) -> dict[Holds, Operand]:
        """The three parts of a packed product, [Q|K|V] on its last axis."""
        own, keys = self.heads(), self.heads(of_keys=True)
        width = whole.shape[-1] // (own + 2 * keys)
        sizes = self.attribute("qkv_hidden_sizes", 0) or [own * width, keys * width, keys * width]
        parts = np.split(whole, np.cumsum(sizes)[:2], axis=-1)
        shared = "K" if self.operator.key_heads != self.operator.heads else "N"
        layouts = ("B S N·D", f"B S {shared}·D", f"B S {shared}·V")
        return {
            role: Operand(part, layout, one)
            for role, part, layout in zip(ROLES, parts, layouts, strict=True)
        }


def rounding(*arrays: np.ndarray) -> float:
    """How far two numbers may be apart that are the same, as part of the largest of an array."""
    return 2e-3 if any(array.dtype.itemsize < 4 for array in arrays) else 5e-5


def factor(array: np.ndarray, other: np.ndarray) -> float | None:
    """By which number `other` is multiplied in `array`, of the same size; None where by no one."""
    close = rounding(array, other)
    array, other = (one.astype(np.float64).ravel() for one in (array, other))
    squares = other @ other
    if not squares:
        return None if array.any() else 1.0
    by = float(array @ other / squares)
    if not np.isfinite(by) or not by:
        return None
    if np.abs(array - by * other).max() > close * abs(by) * np.abs(other).max():
        return None
    return 1.0 if abs(by - 1) < close else by
