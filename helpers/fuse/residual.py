"""Keep a residual Add and the LayerNormalization after it apart, for ONNX Runtime on the CPU.

    Add → LayerNormalization    →    Add → Reshape (0, 0, -1) → LayerNormalization

A session joins the two as com.microsoft's SkipLayerNormalization whenever it can tell that both
operands have one shape. On the CPU that kernel is several times slower than Add and
LayerNormalization are together (`helpers/figures/speed`). The Reshape changes nothing and copies
nothing; with it, the session leaves them.
"""

import onnx_ir as ir

from helpers import graph
from helpers.graph.values import rank

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def keep_apart(model: ir.Model) -> int:
    """Put the Reshape in, in place; returns how many."""
    done = 0
    for node in [*graph.nodes(model)]:
        added = node.inputs[0].producer() if node.op_type in NORMS else None
        if added is None or added.op_type != "Add" or rank(node.inputs[0]) != 3:
            continue
        tape = ir.tape.Tape()
        shape = tape.op("Constant", [], {"value_ints": [0, 0, -1]})
        same = tape.op("Reshape", [node.inputs[0], shape])
        same.shape, same.type = node.inputs[0].shape, node.inputs[0].type
        node.graph.insert_before(node, tape.nodes)
        node.replace_input_with(0, same)
        done += 1
    return done
