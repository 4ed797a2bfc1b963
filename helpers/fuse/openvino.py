"""What OpenVINO runs fastest, on its own and as a plugin of ONNX Runtime.

The rule of target `openvino`: Attention, RotaryEmbedding and RMSNormalization of the standard, and
com.microsoft's FastGelu, are written out (`written_out`); all else is left to OpenVINO.

The plugin (onnxruntime-ep-openvino 1.8) hands these four back to ONNX Runtime's own kernels: what
goes to and fro between the two, and is computed there in fp32, takes longer than fusing saves.
OpenVINO alone reads them. In either, attention that is written out in one form ends in one kernel,
which it does not in most graphs as they are exported, and those of com.microsoft's attention are no
faster (`helpers/figures/attention_forms` measures all of them).
"""

import onnx_ir as ir

from helpers import graph
from helpers.fuse import written_out
from helpers.fuse.scores import Left

_WRITERS = {
    **{(domain, "Attention"): written_out.attention for domain in graph.STANDARD},
    **{(domain, "RotaryEmbedding"): written_out.rotary_embedding for domain in graph.STANDARD},
    **{(domain, "RMSNormalization"): written_out.rms_normalization for domain in graph.STANDARD},
    (graph.MICROSOFT, "FastGelu"): written_out.fast_gelu,
}
# What the plugin hands back besides, and nothing here writes in another way.
_HANDED_BACK = {
    *((graph.MICROSOFT, kind) for kind in ("GroupQueryAttention", "DynamicQuantizeMatMul")),
    *((graph.MICROSOFT, kind) for kind in ("FusedConv", "QAttention")),
    *((domain, kind) for domain in graph.STANDARD for kind in ("QLinearMatMul", "TensorScatter")),
}


def use(model: ir.Model) -> list[str]:
    """Follow the rule, in place; returns a line for each standard Attention that is no operator any
    more, or that the plugin hands back to ONNX Runtime."""
    lines = []
    for node in [*graph.nodes(model)]:
        write = _WRITERS.get(_kind(node))
        if write is None:
            continue
        name, why = graph.name(node), "written out, in the form that OpenVINO joins by itself"
        try:
            write(node)
        except Left as left:
            why = f"OpenVINO's plugin hands it back to ONNX Runtime, and {left}"
        if node.op_type == "Attention":
            lines.append(f"{name}: {why}")
    return lines


def handed_back(model: ir.Model) -> list[str]:
    """The operators that the plugin hands back to ONNX Runtime, with how many there are."""
    kinds = _HANDED_BACK | set(_WRITERS)
    names = [graph.operator(node) for node in graph.nodes(model) if _kind(node) in kinds]
    return [f"{name} × {names.count(name)}" for name in dict.fromkeys(names)]


def _kind(node: ir.Node) -> tuple[str, str]:
    return node.domain, node.op_type
