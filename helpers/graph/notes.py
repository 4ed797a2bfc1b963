"""What hurts in a file, a line each: what goes wrong or costs time, where, and what to do about it.

Follows ONNX's Attention, opset 23, and ONNX Runtime's docs/ContribOperators.md.
"""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from helpers.graph import repairs, walks
from helpers.graph.attention_sites import FUSED, SHAPES, Site, from_input, sites
from helpers.graph.caches import PASTS, Cache, caches, heads_repeated, presents
from helpers.graph.masks import masking_inputs
from helpers.graph.reading import counts, is_quantised, name, nodes, operator
from helpers.graph.values import constant, looked_up, rank, size, stated_rank

_UNCHANGED = ("Cast", "Identity")
_PICKING = {"Compress", "Gather", "GatherElements", "GatherND", "Slice", "Split"}


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
    handed = []
    for output in model.graph.outputs:
        value = output
        while (node := value.producer()) is not None and node.op_type == "Identity":
            value = node.inputs[0]
        if value.is_graph_input() and not value.is_initializer():
            handed.append(f"{output.name} from {value.name}")
    if handed:
        yield (
            f"outputs that are inputs as they came in, copied at each step ({_listed(handed)});"
            " take them off the outputs, and feed the same arrays again"
        )


def _outside(past: Sequence[Cache]) -> Iterator[str]:
    """Concat appends to a cache for an operator that has an input of its own for the past."""
    outside: dict[ir.Node, None] = {}
    for cache in past:
        node = cache.site.node
        numbers = PASTS.get((node.domain, node.op_type), ())
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
    """Logits of every position, of which generation reads the last."""
    dependent = from_input(model)
    vocabularies = _vocabularies(model, dependent)
    costly = [
        output.name
        for output in model.graph.outputs
        if stated_rank(output) == 3
        and size(output, -1) in vocabularies
        and size(output, -2) != 1
        and not _picked(output, dependent)
    ]
    if costly:
        yield (
            f"gives logits of all positions ({_listed(costly)}), of which generation reads the last"
            " alone: on a prompt that takes time and memory; pick the last position before the"
            " head (in transformers logits_to_keep=1)"
        )


def _vocabularies(model: ir.Model, dependent: set[ir.Value]) -> set[int | None]:
    """How many rows the tables have that several ids a sample look up; `dependent` are the values
    that come from the inputs.

    What is as wide as a table is no vocabulary: hidden states may be as wide as positions are many.
    """
    rows: set[int | None] = set()
    widths: set[int | None] = {None}
    for node in nodes(model):
        tables = [
            value for value in node.inputs if value not in dependent and stated_rank(value) == 2
        ]
        for at, value in enumerate(node.inputs if node.op_type != "RotaryEmbedding" else ()):
            if (
                tables
                and value in dependent
                and (stated_rank(value) or 2) > 1
                and size(value, -1) != 1
            ):
                lookups = {*looked_up(node, at)}
                rows |= lookups
                widths |= {size(table, -1) for table in tables} if lookups else set()
    return rows - widths


def _picked(output: ir.Value, dependent: set[ir.Value]) -> bool:
    """Whether positions are picked on the way to `output` (B, S, V), after the last site."""

    def computing(value: ir.Value) -> ir.Node | None:
        node = value.producer()
        if node is None or node.op_type == "Softmax" or (node.domain, node.op_type) in FUSED:
            return None
        return None if node.op_type in _PICKING and node.inputs[0] not in dependent else node

    def above(value: ir.Value) -> list[ir.Value]:
        read = [] if computing(value) is None else walks.read(value)
        return [
            operand
            for operand in read
            if operand.dtype is None or operand.dtype.is_floating_point()
        ]

    passed = map(computing, walks.walk([output], above))
    return any(node is not None and _picks(node) for node in passed)


def _picks(node: ir.Node) -> bool:
    """Whether `node` takes a part of an axis that is not the last, (B, S, D) to (B, 1, D)."""
    if node.op_type not in _PICKING:
        return False
    axes = [node.attributes.get_int("axis", 0)]
    if node.op_type == "Slice":
        starts, ends, axes = (_numbers(node, at) for at in (1, 2, 3))
        if starts and ends and not any(starts) and min(ends) >= 2**31 - 1:
            return False  # all of it
    last = (stated_rank(node.inputs[0]) or 3) - 1
    return axes is None or not {*axes} <= {-1, last}


def _numbers(node: ir.Node, at: int) -> list[int] | None:
    """The starts (1), ends (2) or axes (3) of a Slice, where they are constants."""
    if at >= len(node.inputs):  # they were attributes before opset 10
        given = node.attributes.get_ints(("starts", "ends", "axes")[at - 1])
        return None if given is None else [*given]
    given = constant(node.inputs[at])
    return None if given is None else [int(number) for number in given.ravel()]
