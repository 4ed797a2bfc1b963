"""One attention in each of its forms, as a graph: from hidden states to heads that are merged.

    x (B, S, N·D) → three products by weights → the form → y (B, S, N·D)

The products are there since one form has them within itself, and since they are what attention is
computed beside. With a mask, attention_mask (B, S) has 1 where there is a key.
"""

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers import files, graph
from helpers.fuse import OPSET, written_out
from helpers.fuse.building import Tape

_FLOAT, _INT64 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)


class Form:
    """One graph in the making, of `heads` that are `width` wide; `made` gives y, as named."""

    def __init__(self, heads: int, width: int, masked: bool) -> None:
        self.heads, self.width, self.tape = heads, width, Tape()
        shape = ir.Shape(["batch", "length", heads * width])
        self.x = ir.Value(name="x", type=_FLOAT, shape=shape)
        shape = ir.Shape(["batch", "length"])
        mask = ir.Value(name="attention_mask", type=_INT64, shape=shape)
        self.mask = mask if masked else None

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes) -> ir.Value:
        return self.tape.op(kind, inputs, attributes, domain=domain)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.width)

    # ── What the forms are made of ──────────────────────────────────────────────────────────────

    def weight(self, name: str) -> np.ndarray:
        """The weight of the product that gives queries, keys or values."""
        size = self.heads * self.width
        random = np.random.default_rng("qkv".index(name))
        return (random.normal(size=(size, size)) / math.sqrt(size)).astype(np.float32)

    def projected(self) -> list[ir.Value]:
        """Queries, keys and values, (B, S, N·D)."""
        return [
            self.op("MatMul", self.x, self.op("Constant", value=ir.tensor(self.weight(name))))
            for name in "qkv"
        ]

    def split(self, value: ir.Value) -> ir.Value:
        """(B, S, N·D) as (B, N, S, D)."""
        shape = self.tape.ints(0, 0, self.heads, self.width)
        return self.op("Transpose", self.op("Reshape", value, shape), perm=[0, 2, 1, 3])

    def merged(self, value: ir.Value) -> ir.Value:
        """(B, N, S, D) as (B, S, N·D)."""
        value = self.op("Transpose", value, perm=[0, 2, 1, 3])
        return self.op("Reshape", value, self.tape.ints(0, 0, -1))

    def added(self, *, whole: bool = True) -> list[ir.Value]:
        """What the mask adds to the scores: (B, 1, S, S), or if not `whole`, (B, 1, 1, S)."""
        if self.mask is None:
            return []
        none = self.op("Equal", self.mask, self.op("Constant", value_int=0))
        lowest, zero = self.tape.number(written_out.MASKED), self.tape.number(0.0)
        bias = self.op("Unsqueeze", self.op("Where", none, lowest, zero), self.tape.ints(1, 2))
        if not whole:
            return [bias]
        batch, length = self.tape.sizes(self.x, 0, 1), self.tape.sizes(self.x, 1, 2)
        shape = self.tape.shape(batch, self.tape.ints(1), length, length)
        return [self.op("Expand", bias, shape)]

    # ── The forms ───────────────────────────────────────────────────────────────────────────────

    def standard(self) -> ir.Value:
        """The standard's Attention on (B, S, N·D)."""
        heads = {"q_num_heads": self.heads, "kv_num_heads": self.heads}
        return self.op("Attention", *self.projected(), *self.added(), scale=self.scale, **heads)

    def standard_on_four_axes(self) -> ir.Value:
        """The standard's Attention on (B, N, S, D)."""
        operands = [self.split(value) for value in self.projected()]
        return self.merged(self.op("Attention", *operands, *self.added(), scale=self.scale))

    def multi_head(self) -> ir.Value:
        """com.microsoft's MultiHeadAttention, with what the mask adds as its attention_bias."""
        bias = [None, None, *self.added()] if self.mask is not None else []
        attributes = {"num_heads": self.heads, "scale": self.scale, "domain": graph.MICROSOFT}
        return self.op("MultiHeadAttention", *self.projected(), *bias, **attributes)

    def multi_head_with_padding(self) -> ir.Value:
        """com.microsoft's MultiHeadAttention, with the mask itself as its key_padding_mask."""
        attributes = {"num_heads": self.heads, "scale": self.scale, "domain": graph.MICROSOFT}
        return self.op("MultiHeadAttention", *self.projected(), *self._padding(), **attributes)

    def packed(self) -> ir.Value:
        """com.microsoft's Attention, which has the products within itself."""
        weights = np.concatenate([self.weight(name) for name in "qkv"], axis=1)
        weights = self.op("Constant", value=ir.tensor(weights))
        attributes = {"num_heads": self.heads, "scale": self.scale, "domain": graph.MICROSOFT}
        return self.op("Attention", self.x, weights, *self._padding(), **attributes)

    def products(self) -> ir.Value:
        """MatMul, Softmax and MatMul, as written out for OpenVINO."""
        query, key, value = map(self.split, self.projected())
        key = self.op("Transpose", key, perm=[0, 1, 3, 2])
        scores = self.op("Mul", self.op("MatMul", query, key), self.tape.number(self.scale))
        return self._weighted(scores, value)

    def fused_products(self) -> ir.Value:
        """The same with com.microsoft's FusedMatMul, which transposes and scales by itself."""
        query, key, value = map(self.split, self.projected())
        attributes = {"transB": 1, "alpha": self.scale, "domain": graph.MICROSOFT}
        return self._weighted(self.op("FusedMatMul", query, key, **attributes), value)

    def _padding(self) -> list[ir.Value | None]:
        """No bias of the products, and the mask as com.microsoft's operators take it."""
        if self.mask is None:
            return []
        return [None, self.op("Cast", self.mask, to=int(ir.DataType.INT32))]

    def _weighted(self, scores: ir.Value, value: ir.Value) -> ir.Value:
        for bias in self.added(whole=False):
            scores = self.op("Add", scores, bias)
        return self.merged(self.op("MatMul", self.op("Softmax", scores, axis=-1), value))


# By name, in the order of the table; the first is what target `cpu` has by default. Those with a
# padding mask are others only where there is one.
FORMS = {
    "Attention (B, S, N·D)": Form.standard,
    "Attention (B, N, S, D)": Form.standard_on_four_axes,
    "MultiHeadAttention": Form.multi_head,
    "MultiHeadAttention, padding mask": Form.multi_head_with_padding,
    "com.microsoft.Attention": Form.packed,
    "MatMul, Softmax, MatMul": Form.products,
    "FusedMatMul, Softmax, MatMul": Form.fused_products,
}
STANDARD = next(iter(FORMS))
ONLY_MASKED = {"MultiHeadAttention, padding mask"}


def save(form: str, heads: int, width: int, masked: bool, path: Path) -> Path:
    """Write the graph of that form to `path`."""
    making = Form(heads, width, masked)
    y = FORMS[form](making)
    y.name, y.type = "y", _FLOAT
    inputs = [making.x] if making.mask is None else [making.x, making.mask]
    opsets = {"": OPSET, graph.MICROSOFT: 1}
    nodes = making.tape.nodes
    inside = ir.Graph(inputs, [y], nodes=nodes, opset_imports=opsets, name="attention")
    model = ir.Model(inside, ir_version=10)
    passes.NameFixPass()(model)
    files.save(model, path)
    return path
