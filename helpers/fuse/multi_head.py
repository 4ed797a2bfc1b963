"""Attention over many keys as com.microsoft's MultiHeadAttention, for ONNX Runtime on the CPU.

    Attention (q_num_heads = kv_num_heads = N)    →    MultiHeadAttention (num_heads = N)

The rule of target `cpu`: MultiHeadAttention where the graph fixes 512 keys or more and nothing is
added to the scores, Attention of the standard elsewhere. MultiHeadAttention works through the keys
in blocks that fit the cache, which pays where there are many: with 512 it is as fast for one sample
and faster for eight, with fewer slower, for heads of 32 to 128 (assets/attention_forms.csv, by
`helpers/figures/attention_forms`). With a bias, it gives no finite numbers in rows without a key,
which Attention does.

Follows ONNX Runtime's docs/ContribOperators.md.
"""

import onnx_ir as ir

from helpers import graph
from helpers.graph.values import dim

MANY = 512  # keys
OTHERS = {"is_causal", "qk_matmul_output_mode", "softcap", "softmax_precision"}


def use(model: ir.Model) -> int:
    """Replace the operators that the rule names, in place; returns how many."""
    done = 0
    for node in [*graph.nodes(model)]:
        heads = node.attributes.get_int("q_num_heads", 0)
        if node.op_type != "Attention" or node.domain not in graph.STANDARD or not heads:
            continue
        keys = dim(node.inputs[1], -2)
        if len(node.inputs) > 3 or not isinstance(keys, int) or keys < MANY:
            continue
        shared = node.attributes.get_int("kv_num_heads", 0) != heads
        if shared or any(node.attributes[name].value for name in OTHERS & {*node.attributes}):
            continue
        attributes = {"num_heads": heads}
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes.get_float("scale")
        replacement = ir.node(
            "MultiHeadAttention",
            node.inputs,
            attributes,
            domain=graph.MICROSOFT,
            outputs=[ir.Value(type=node.outputs[0].type)],
            name=node.name,
            metadata_props=node.metadata_props,
        )
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], [replacement], node.outputs, replacement.outputs
        )
        done += 1
    if done:
        model.opset_imports[graph.MICROSOFT] = 1
    return done
