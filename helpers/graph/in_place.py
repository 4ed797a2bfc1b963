"""Caches that a graph writes in place: buffers of fixed length, as `helpers.fuse` makes them.

    buffer (B, K, C, D), new (B, K, S, D), write_indices → TensorScatter → buffer, given out

C is the capacity. How many of its positions hold keys is told by an input of the graph, `length`,
of one integer, that `write_indices` is made of.
"""

from dataclasses import dataclass

import onnx_ir as ir

from helpers.graph import walks
from helpers.graph.attention_sites import sites
from helpers.graph.caches import caches
from helpers.graph.reading import STANDARD, nodes
from helpers.graph.values import size


@dataclass(frozen=True)
class Buffers:
    """The buffers of a graph: `given` has for the name of each input that of the output which
    gives it back; `length` is the name of the input that says how many positions are filled.
    `capacity` is how many there are, None where a user chooses."""

    given: dict[str, str]
    length: str
    capacity: int | None

    AXIS = 2  # of a buffer's positions


def buffers(model: ir.Model) -> Buffers | None:
    """The buffers of `model`; None where it has none, or not all are told by one length."""
    given, lengths, capacities = {}, set(), set()
    for node in nodes(model):
        if node.op_type != "TensorScatter" or node.domain not in STANDARD:
            continue
        buffer, index = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        if index is None or not (buffer.is_graph_input() and node.outputs[0].is_graph_output()):
            continue
        given[buffer.name] = node.outputs[0].name
        capacities.add(size(buffer, Buffers.AXIS - 4))
        lengths |= {value.name for value in walks.walk([index], _data) if value.is_graph_input()}
    if not given or len(lengths) != 1:
        return None
    known = capacities - {None}
    return Buffers(given, lengths.pop(), min(known) if known else None)


def cache_inputs(model: ir.Model) -> set[str]:
    """The names of the inputs of `model` that hold keys or values of earlier steps, in caches that
    grow or in buffers."""
    found = buffers(model)
    growing = {cache.given.name for cache in caches(model, sites(model))}
    return growing | (found.given.keys() if found else set())


def _data(value: ir.Value) -> list[ir.Value]:
    """What `value` is made of, not of whose shape."""
    node = value.producer()
    return [] if node is None else [operand for operand in node.inputs[:1] if operand is not None]
