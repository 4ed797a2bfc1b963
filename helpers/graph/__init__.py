"""Graphs: reading them, walking them, their attention sites, cut-outs, what is known of a value."""

from helpers.graph.attention_sites import (
    FUSED,
    Site,
    equation,
    from_input,
    sites,
    through,
)
from helpers.graph.cutting import block, cut_out
from helpers.graph.in_place import Buffers, buffers, cache_inputs
from helpers.graph.notes import notes
from helpers.graph.reading import (
    BEFORE_QUANTISING,
    LEFT_OUT_ABOVE,
    MICROSOFT,
    STANDARD,
    counts,
    file_name,
    find,
    inline,
    is_quantised,
    later_operators,
    load,
    module,
    name,
    names_in,
    nodes,
    operator,
    origin,
    without_weights,
)
from helpers.graph.values import ELEMENTWISE
from helpers.graph.walks import neighbours

__all__ = [
    "BEFORE_QUANTISING",
    "ELEMENTWISE",
    "FUSED",
    "LEFT_OUT_ABOVE",
    "MICROSOFT",
    "STANDARD",
    "Buffers",
    "Site",
    "block",
    "buffers",
    "cache_inputs",
    "counts",
    "cut_out",
    "equation",
    "file_name",
    "find",
    "from_input",
    "inline",
    "is_quantised",
    "later_operators",
    "load",
    "module",
    "name",
    "names_in",
    "neighbours",
    "nodes",
    "notes",
    "operator",
    "origin",
    "sites",
    "through",
    "without_weights",
]
