"""Caches as the operator's own: past keys and values go in, present ones come out.

    past (B, K, P, D) ┐
    new (B, K, L, D)  ┴ Concat → present (B, K, T, D), to an Attention and out of the graph

for its keys and for its values becomes an Attention of the new ones, with the past ones as its
inputs past_key and past_value; present_key and present_value, its outputs, have the names that the
Concat's had. P past keys, L new ones, T = P + L.

Follows ONNX's Attention, opset 23. ONNX Runtime wants both outputs where there are both inputs.
"""

import onnx_ir as ir

from helpers import graph
from helpers.fuse.building import Tape, redirect_shape
from helpers.graph import walks
from helpers.graph.values import rank


def take_in(model: ir.Model) -> int:
    """Rewrite each standard Attention whose keys and values end a Concat with a past that the
    model is given, in place; returns how many."""
    done = 0
    for node in [*graph.nodes(model)]:
        if node.op_type == "Attention" and node.domain in graph.STANDARD:
            done += _take_in(node)
    return done


def _take_in(node: ir.Node) -> bool:
    appended = [_appended(value) for value in node.inputs[1:3]]
    others = any(node.inputs[4:]) or len(node.outputs) > 1
    # A causal Attention counts its queries from the first key on, with a past from behind it.
    if others or node.attributes.get_int("is_causal", 0) or None in appended:
        return False
    wholes = [concat.outputs[0] for concat in appended]
    here = all(concat.graph is node.graph for concat in appended)
    if not here or wholes[0] is wholes[1]:
        return False
    tape = Tape()
    for concat in appended:  # whose sizes masks are made from, before the operator gives it
        past, new = concat.inputs
        length = tape.op("Add", [tape.sizes(past, 2, 3), tape.sizes(new, 2, 3)])
        shape = tape.shape(tape.sizes(new, 0, 2), length, tape.sizes(new, 3))
        redirect_shape(tape, concat.outputs[0], shape)
    node.graph.insert_before(node, tape.nodes)
    others = [value for value in (node.inputs[0], *node.inputs[3:4]) if value is not None]
    if not {*wholes}.isdisjoint(walks.walk(others, walks.read)):
        return False  # queries or bias are computed of present keys
    tape = Tape()
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    (past_key, key), (past_value, value) = (concat.inputs for concat in appended)
    inputs = [node.inputs[0], key, value, mask, past_key, past_value]
    outputs = tape.op_multi_out("Attention", inputs, dict(node.attributes), num_outputs=3)
    made = outputs[0].producer()
    made.name, node.name = node.name, None
    made.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, tape.nodes)
    for old, new in zip((node.outputs[0], *wholes), outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
    return True


def _appended(value: ir.Value | None) -> ir.Node | None:
    """The Concat that appends `value`'s last keys to those the model is given; else None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or rank(value) != 4:
        return None
    past = node.inputs[0]
    given = past.is_graph_input() and not past.is_initializer()
    return node if given and node.attributes.get_int("axis", 0) in (2, -2) else None
