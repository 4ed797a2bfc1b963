"""Caches in place: buffers of a fixed length, which each step writes its keys and values into.

    past_key (B, K, P, D) → Attention (new keys, past_key) → present_key (B, K, P + S, D)

becomes, with buffers of C positions, C the capacity,

    past_key (B, K, C, D) ┐
    new keys (B, K, S, D) ┼ TensorScatter → present_key (B, K, C, D), to an Attention that is told
    past_length           ┘                 by nonpad_kv_seqlen that P + S of them are keys

and so for the values. Where a session has past and present bound to the same memory, nothing is
copied. The graph gets one input, `past_length`, int64 (1,): how many positions of the buffers hold
keys, P, which is where the new ones are written. All that the graph read off the length of a cache
it reads there. A bias is filled up to C; what stands there is never read.

Follows ONNX's Attention and TensorScatter, opset 24.
"""

from collections.abc import Callable

import onnx_ir as ir

from helpers import graph
from helpers.fuse.building import Tape, redirect_shape
from helpers.graph.caches import caches

OPSET, IR_VERSION = 24, 11
PAST_LENGTH, CAPACITY = "past_length", "capacity"


def use(model: ir.Model, capacity: int | None) -> int:
    """Have each standard Attention that has caches write them in place, in `model` itself; returns
    how many. Buffers have `capacity` positions; None: as many as they are given with."""
    attentions = [
        node
        for node in graph.nodes(model)
        if node.op_type == "Attention" and node.domain in graph.STANDARD and any(node.inputs[4:6])
    ]
    if not attentions:
        return 0
    length = ir.Value(name=PAST_LENGTH, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(length)
    known: dict[tuple, ir.Value] = {}
    for node in attentions:
        _write_in_place(node, length, capacity, known)
    model.opset_imports[""] = max(model.opset_imports.get("", OPSET), OPSET)
    model.ir_version = max(model.ir_version, IR_VERSION)
    return len(attentions)


def caches_of(model: ir.Model) -> list[str]:
    """The names of the inputs of `model` that new keys or values are appended to."""
    return [cache.given.name for cache in caches(model, graph.sites(model))]


def _write_in_place(
    node: ir.Node, length: ir.Value, capacity: int | None, known: dict[tuple, ir.Value]
) -> None:
    """Do it to one Attention. All layers have one length, batch and capacity, so what depends on
    these alone is made once for each graph, and `known` from then on."""
    query, *new, mask, past_key, past_value = node.inputs[:6]
    tape = Tape()

    def once(name: str, make: Callable[[], ir.Value], *of: object) -> ir.Value:
        key = (name, node.graph, past_key.shape[0], *of)
        return known[key] if key in known else known.setdefault(key, make())

    for past in (past_key, past_value):
        shape = tape.shape(tape.sizes(past, 0, 2), length, tape.sizes(past, 3))
        redirect_shape(tape, past, shape)
    batch = once("batch", lambda: tape.sizes(past_key, 0, 1))
    start = once("start", lambda: tape.op("Expand", [length, batch]))
    keys = once("keys", lambda: tape.op("Add", [length, tape.sizes(new[0], 2, 3)]))
    count = once("count", lambda: tape.op("Expand", [keys, batch]))
    if mask is not None:
        free = once("free", lambda: tape.op("Sub", [tape.sizes(past_key, 2, 3), keys]))
        pads = once("pads", lambda: tape.shape(tape.ints(0), free))
        filled = [mask, pads, None, tape.ints(-1)]
        mask = once("mask", lambda: tape.op("Pad", filled), mask)
    buffers = [
        tape.op("TensorScatter", [past, update, start], {"axis": -2})
        for past, update in zip((past_key, past_value), new, strict=True)
    ]
    inputs = [query, *buffers, mask, None, None, count]
    result = tape.op("Attention", inputs, dict(node.attributes))
    made = result.producer()
    made.name, node.name = node.name, None
    made.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, tape.nodes)
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    for past, buffer in zip((past_key, past_value), buffers, strict=True):
        sizes = [*past.shape]
        sizes[2] = CAPACITY if capacity is None else capacity
        past.shape = ir.Shape(sizes)
        buffer.shape, buffer.type = ir.Shape(sizes), past.type
    for old, value in zip(node.outputs[:3], (result, *buffers), strict=True):
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        value.name, old.name = old.name, None
