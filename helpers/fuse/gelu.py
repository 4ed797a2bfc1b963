"""GELU as one operator: x·(1 + erf(x/√2))/2, in any order of its products.

    Div or Mul → Erf → Add 1 → Mul x → Mul 0.5    →    Gelu

TorchScript and dynamo exports below opset 20 write it out; ONNX Runtime's session recognises some
orders, and joins a Gelu with the bias before it. Rules of `onnxscript.rewriter`, whose own
(`ort_fusions.erfgelu`) write com.microsoft's Gelu; this is the standard's, opset 20.
"""

import math

import onnx_ir as ir
from onnxscript.rewriter import pattern

from helpers import graph


def _normal(op, x):
    """1 + erf(x/√2): twice the normal distribution's cumulative function."""
    scaled = pattern.OrValue([x / math.sqrt(2), x * math.sqrt(0.5)])
    return op.Erf(scaled) + 1.0


def _half_outside(op, x):
    return 0.5 * (x * _normal(op, x))


def _half_first(op, x):
    return (0.5 * x) * _normal(op, x)


def _half_inside(op, x):
    return x * (0.5 * _normal(op, x))


def _gelu(op, x):
    return op.Gelu(x)


def fuse(model: ir.Model) -> int:
    """Rewrite each GELU that is written out, in place; returns how many."""
    if not any(node.op_type == "Erf" for node in graph.nodes(model)):
        return 0
    ways = (_half_outside, _half_first, _half_inside)
    rules = [pattern.RewriteRule(way, _gelu) for way in ways]
    return pattern.RewriteRuleSet(rules, commute=True).apply_to_model(model)
