"""What hurts in a file, a line each: what goes wrong or costs time, where, and what to do about it.

Follows ONNX's Attention, opset 23, and ONNX Runtime's docs/ContribOperators.md.
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from helpers.graph import logits, operators, repairs, walks
from helpers.graph.attention_sites import SHAPES, Site, sites
from helpers.graph.caches import Cache, caches, handed_on, heads_repeated, presents
from helpers.graph.masks import masking_inputs
from helpers.graph.reading import counts, is_quantised, name, operator
from helpers.graph.values import rank, size

_UNCHANGED = ("Cast", "Identity")


def notes(model: ir.Model) -> list[str]:
    """What a reader should know of `model`, a line each. It is left as it is."""
    model = repairs.inferred(model)
    own_sites = sites(model)
    past = caches(model, own_sites)
    lines = [*_types(model), *repairs.notes(model)]
    kept = [cache.given for cache in past] or presents(own_sites)
    if kept:
        lines += [
            *_no_mask(model, own_sites, kept),
            *_fixed_past(past),
            *_handed_on(model),
            *_outside(past),
            *_all_logits(model),
        ]
    return [*lines, *_repeated(own_sites), *_only_shapes(model)]


def _types(model: ir.Model) -> Iterator[str]:
    """The types that `model` computes in, where they are special."""
    values = (
        value
        for inside in model.graphs()
        for value in (*inside.inputs, *inside.initializers.values(), *inside.outputs)
    )
    if any(value.dtype == ir.DataType.BFLOAT16 for value in values):
        yield "computes in bfloat16, for which ONNX Runtime has few kernels on the CPU"
    quantised = {name: n for name, n in counts(model).items() if is_quantised(name)}
    if quantised:
        yield "quantised: " + ", ".join(f"{n} {name}" for name, n in quantised.items())


def _listed(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _operators(listed: Sequence[ir.Node]) -> str:
    """The first of some nodes with its operator, and how many more there are."""
    return _listed([f"{operator(node)} {name(node)}" for node in listed])


def _no_mask(model: ir.Model, own_sites: Sequence[Site], kept: Sequence[ir.Value]) -> Iterator[str]:
    """No input decides which keys a row has, though rows are kept from step to step."""
    rows = [value for value in model.graph.inputs if rank(value) in (2, 3)]
    single = rows and all(size(value, -rank(value)) == 1 for value in rows)
    if not single and not masking_inputs(model, own_sites) - {*kept}:
        yield (
            "no input masks keys, and those of earlier steps are kept"
            f" ({_listed([value.name for value in kept])}), so batches with padding come out wrong;"
            " export it again with an attention_mask among its inputs"
        )


def _fixed_past(past: Sequence[Cache]) -> Iterator[str]:
    """The past has one length, which the next step's is not."""
    fixed: dict[int, list[str]] = {}
    for cache in past:
        if cache.past is not None and not cache.in_place():
            fixed.setdefault(cache.past, []).append(cache.given.name)
    for length, names in fixed.items():
        yield (
            f"the past has a fixed length of {length} ({_listed(names)}), to which keys are"
            " appended, so what it gives fits no next step; export it again with a dynamic length"
        )


def _handed_on(model: ir.Model) -> Iterator[str]:
    """Outputs that are inputs, as they came in."""
    handed = [f"{output.name} from {given.name}" for output, given in handed_on(model)]
    if handed:
        yield (
            f"outputs that are inputs as they came in, copied at each step ({_listed(handed)});"
            " feed the same arrays again: `fuse --drop-unchanged` takes them off the outputs"
        )


def _outside(past: Sequence[Cache]) -> Iterator[str]:
    """Concat appends to a cache for an operator that has an input of its own for the past."""
    outside: dict[ir.Node, None] = {}
    for cache in past:
        node = cache.site.node
        numbers = operators.numbers(node, *operators.PASTS)
        given = [at for at in numbers if at < len(node.inputs) and node.inputs[at] is not None]
        if cache.node is not node and numbers and not given:
            outside[node] = None
    if outside:
        yield (
            "Concat appends to the past outside of the operator, which copies all of it at each"
            f" step ({_operators([*outside])}); give the past to the operator's own inputs for it"
        )


def _repeated(own_sites: Sequence[Site]) -> Iterator[str]:
    """Keys and values are repeated for groups of heads."""
    repeating = [*filter(None, map(heads_repeated, own_sites))]
    if repeating:
        yield (
            f"keys are repeated for groups of heads ({_operators(repeating)}), which takes time and"
            " memory; Attention of opset 23 and com.microsoft.GroupQueryAttention share them, so"
            " give them keys and values as they were before"
        )


def _only_shapes(model: ir.Model) -> Iterator[str]:
    """Inputs of which nothing reads the values."""
    unread = []
    for value in model.graph.inputs:
        readers = {node for node, _ in walks.uses(value, _UNCHANGED)}
        same = {node for node in readers if node.op_type in _UNCHANGED}
        results = (value, *(result for node in same for result in node.outputs))
        used = any(node.op_type not in SHAPES for node in readers - same)
        if not (used or value.is_initializer() or any(end.is_graph_output() for end in results)):
            unread.append(value.name)
    if unread:
        yield (
            "inputs whose values change nothing, since at most their shapes are read"
            f" ({_listed(unread)}); leave them out, or export it again from a sample in which they"
            " matter"
        )


def _all_logits(model: ir.Model) -> Iterator[str]:
    """Logits of every position."""
    costly = [output.name for output in logits.of_all_positions(model)]
    if costly:
        yield (
            f"gives logits of all positions ({_listed(costly)}), of which generation reads the last"
            " alone: on a prompt that takes time and memory; `fuse --last-logits` leaves the others"
            " out (in transformers logits_to_keep=1)"
        )
