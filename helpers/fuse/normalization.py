"""Normalisations as one operator, where an exporter has written them out.

    ReduceMean → Sub → Pow → ReduceMean → Add → Sqrt → Div → Mul → Add    →  LayerNormalization
    Pow → ReduceMean → Add → Sqrt → Reciprocal → Mul → Mul                →  RMSNormalization

ONNX Runtime's session recognises some of the orders in which they are written, not that of dynamo's
RMSNormalization. The rules are onnxscript's own; both operators are the standard's, opset 17 and
23.
"""

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion import _layer_norm, _rms_normalization


def fuse(model: ir.Model) -> int:
    """Rewrite each normalisation that is written out, in place; returns how many."""
    rules = (_layer_norm.layer_normalization_ruleset, _rms_normalization.rms_normalization_ruleset)
    return sum(ruleset.apply_to_model(model) for ruleset in rules)
