"""GELU as one operator: x·(1 + erf(x/√2))/2, in any order of its products.

    Div or Mul → Erf → Add 1 → Mul x → Mul 0.5    →    Gelu

TorchScript and dynamo exports below opset 20 write it out; ONNX Runtime's session recognises some
orders, and joins a Gelu with the bias before it. Rules of `onnxscript.rewriter`, whose own
(`ort_fusions.erfgelu`) write com.microsoft's Gelu; this is the standard's, opset 20.
"""

import math

import onnx_ir as ir
from onnxscript.rewriter import pattern


def _half_outside(op, x):
    return 0.5 * (x * (op.Erf(x / math.sqrt(2)) + 1.0))


def _half_first(op, x):
    return (0.5 * x) * (op.Erf(x / math.sqrt(2)) + 1.0)


def _half_inside(op, x):
    return x * (0.5 * (op.Erf(x / math.sqrt(2)) + 1.0))


def _half_outside_times(op, x):
    return 0.5 * (x * (op.Erf(x * math.sqrt(0.5)) + 1.0))


def _half_first_times(op, x):
    return (0.5 * x) * (op.Erf(x * math.sqrt(0.5)) + 1.0)


def _half_inside_times(op, x):
    return x * (0.5 * (op.Erf(x * math.sqrt(0.5)) + 1.0))


def _gelu(op, x):
    return op.Gelu(x)


def fuse(model: ir.Model) -> int:
    """Rewrite each GELU that is written out, in place; returns how many."""
    ways = [
        *(_half_outside, _half_first, _half_inside),
        *(_half_outside_times, _half_first_times, _half_inside_times),
    ]
    rules = [pattern.RewriteRule(way, _gelu) for way in ways]
    return pattern.RewriteRuleSet(rules, commute=True).apply_to_model(model)
