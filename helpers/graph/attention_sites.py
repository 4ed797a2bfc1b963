"""The attention sites of a graph, found from what it computes.

Graphs are ``onnx_ir`` models. Axes are counted from the end (-1 is the last), since graphs often do
not state their ranks. Shapes: B batch, N heads, S queries, T keys, D width of a head.
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers.graph import walks
from helpers.graph.operators import OPERATORS
from helpers.graph.reading import MICROSOFT, STANDARD, module, name, nodes
from helpers.graph.values import ELEMENTWISE, constant, stated_rank

# Operators that are an attention site by themselves.
FUSED = {*OPERATORS} | {
    (MICROSOFT, name)
    for name in (
        "DecoderMaskedMultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "LongformerAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "QAttention",
        "QOrderedAttention",
        "QOrderedLongformerAttention",
        "SparseAttention",
    )
}

_RESHAPING = {"Concat", "Flatten", "Pad", "QLinearConcat", "Reshape", "ScatterND"}
_RESHAPING |= {"Slice", "Split"}
PRODUCTS = {"Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"}
SOFTMAXES = {"BiasSoftmax", "QLinearSoftmax", "Softmax"}
SHAPES = {"Shape", "Size"}  # what is computed from a shape alone does not come from the input


@dataclass(frozen=True)
class Site:
    """One place that computes softmax(Q·Kᵀ·scale + bias)·V, or one operator that does all of it.

    `name` is the node's: the Softmax, or the fused operator. `layer` is the PyTorch module it came
    from, where the graph tells. `scores` and `context` are the two products around a Softmax: Q·Kᵀ,
    and the weights with V; both are None for a fused operator.
    """

    name: str
    fused: bool
    layer: str | None
    node: ir.Node
    scores: ir.Node | None = None
    context: ir.Node | None = None


def _layer(node: ir.Node) -> str | None:
    """`module`, or for a node that an optimizer made, the module around what reads its result."""
    inner_module, step = module(node), [node]
    while inner_module is None and step:
        step = walks.consumers(step[0])[:1]
        below = module(step[0]) if step else None
        inner_module = below.rpartition(".")[0] if below else None
    return inner_module


def from_input(model: ir.Model) -> set[ir.Value]:
    """The values that depend on what is in the model's inputs, not on their shapes alone."""
    dependent: set[ir.Value] = {value for value in model.graph.inputs if not value.is_initializer()}

    def visit(graph: ir.Graph) -> None:
        for node in graph:
            inner = walks.inner_graphs(node)
            for inside in inner:
                dependent.update(inside.inputs)  # what a Loop or Scan carries
                visit(inside)
            results = {value for inside in inner for value in inside.outputs}
            if node.op_type not in SHAPES and not dependent.isdisjoint({*node.inputs, *results}):
                dependent.update(node.outputs)

    visit(model.graph)
    return dependent


def through(node: ir.Node, axis: int, *, forward: bool) -> int | None:
    """Follow `axis` through `node`, from its input to its output or back. None: it does not pass.

    Reshapes are taken to leave the last axes as they are, as splitting and merging heads does.
    """
    if node.op_type in ELEMENTWISE or node.op_type in _RESHAPING:
        return axis
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm") or [*range(stated_rank(*node.inputs) or 2)][::-1]
        if not -len(perm) <= axis < 0:
            return None
        moved = perm.index(len(perm) + axis) if forward else perm[axis]
        return moved - len(perm)
    if node.op_type in ("Squeeze", "Unsqueeze"):
        adds = node.op_type == "Unsqueeze"
        axes = node.attributes.get_ints("axes")
        if not axes and len(node.inputs) > 1 and (given := constant(node.inputs[1])) is not None:
            axes = [int(axis) for axis in given.ravel()]
        rank = stated_rank(*node.outputs) if adds else stated_rank(*node.inputs)
        if rank is None and axes and adds:
            inner = stated_rank(*node.inputs)
            rank = None if inner is None else inner + len(axes)
        ends = [axis_at - rank if axis_at >= 0 and rank else axis_at for axis_at in axes or []]
        if adds is forward:  # the other side has more axes
            for end in sorted((end for end in ends if end < 0), reverse=True):
                axis -= end >= axis
            return axis
        return None if axis in ends else axis + sum(axis < end < 0 for end in ends)
    return None


def equation(node: ir.Node) -> tuple[list[str], str]:
    """The terms of an Einsum, and its result."""
    terms, _, result = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    return terms.split(","), result


def _other(einsum: ir.Node, mine: int) -> ir.Value:
    """The operand beside that at `mine`; of several, the first that is no weight."""
    others = [value for i, value in enumerate(einsum.inputs) if i != mine]
    return next((v for v in others if ir.convenience.get_const_tensor(v) is None), others[0])


def _operands(node: ir.Node, axis: int) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a product that bring its output's `axis`, and the other one."""
    if node.op_type == "Einsum":
        terms, result = equation(node)
        if len(terms) < 2 or len(result) < -axis or result[axis] == ".":
            return None
        holds = [result[axis] in term for term in terms]
        if sum(holds) != 1:
            return None
        return node.inputs[holds.index(True)], _other(node, holds.index(True))
    first, second = (node.inputs[0], node.inputs[3 if node.op_type == "QLinearMatMul" else 1])
    if stated_rank(second) == 1:  # a vector adds no axis to the output
        axis -= 1
    return {-1: (second, first), -2: (first, second)}.get(axis)


def _contracts(node: ir.Node, value: ir.Value, axis: int) -> ir.Value | None:
    """The other operand, if the product sums over `axis` of its operand `value`; else None."""
    if node.op_type == "Einsum":
        terms, result = equation(node)
        mine = node.inputs.index(value)
        if len(terms) < 2 or len(terms[mine]) < -axis:
            return None
        label, others = terms[mine][axis], [*terms[:mine], *terms[mine + 1 :]]
        summed = any(label in term for term in others) and label not in result
        return _other(node, mine) if summed else None
    second = 3 if node.op_type == "QLinearMatMul" else 1
    sides = {0: -1, second: -2}
    for side, flag in ((0, "transA"), (second, "transB")):
        if node.attributes.get_int(flag, 0):
            sides[side] = -3 - sides[side]  # -1 and -2 change places
    for side, summed in sides.items():
        if node.inputs[side] is value and axis == summed:
            return node.inputs[second if side == 0 else 0]
    return None


def _is_linear(node: ir.Node, weight: ir.Value) -> bool:
    shape = weight.shape
    columns = 1 if shape is None or len(shape) != 2 else shape[1]
    return weight is node.inputs[1] and columns != 1


def _scores(softmax: ir.Value, axis: int, from_inputs: set[ir.Value]) -> ir.Node | None:
    """Walk up from what goes into a Softmax to the product of queries with keys, which come from
    the input."""

    def above(place: tuple[ir.Node, int]) -> list[tuple[ir.Node, int]]:
        node, axis = place
        if node.op_type in PRODUCTS:  # heads mixed by a weight: the scores are above
            operands = _operands(node, axis)
            mixed = operands[0].producer() if operands and operands[0] in from_inputs else None
            return [(mixed, axis)] if mixed is not None else []
        passed = through(node, axis, forward=False)
        if passed is None:
            return []
        return [(producer, passed) for producer in walks.producers(node)]

    learned = None  # a product of keys with a learned query, unless a product of two is above it
    start = softmax.producer()
    for node, axis_there in walks.walk([(start, axis)] if start is not None else [], above):
        operands = _operands(node, axis_there) if node.op_type in PRODUCTS else None
        if operands is None or operands[0] not in from_inputs:
            continue
        if operands[1] in from_inputs:
            return node
        # x·W is a linear layer, unless W is one column: then that is the query
        if learned is None and not _is_linear(node, operands[1]):
            learned = node
    return learned


def _context(weights: ir.Value, axis: int, from_inputs: set[ir.Value]) -> ir.Node | None:
    """Walk down from what a Softmax gives to the product with values that come from the input."""

    def readers(value: ir.Value, axis: int) -> list[tuple[ir.Node, ir.Value, int]]:
        return [(node, value, axis) for node in value.consumers()]

    def below(place: tuple[ir.Node, ir.Value, int]) -> list[tuple[ir.Node, ir.Value, int]]:
        node, value, axis = place
        if node.op_type not in PRODUCTS:
            passed = through(node, axis, forward=True)
            outputs = node.outputs if passed is not None else ()
            return [reader for output in outputs for reader in readers(output, passed)]
        mixes = node.inputs[0] is value and node.inputs[1] not in from_inputs
        if mixes and _contracts(node, value, axis) is None:  # heads mixed by a weight
            return readers(node.outputs[0], axis)
        return []

    for node, value, axis_there in walks.walk(readers(weights, axis), below):
        other = _contracts(node, value, axis_there) if node.op_type in PRODUCTS else None
        if other is not None and other in from_inputs:
            return node
    return None


def sites(model: ir.Model) -> list[Site]:
    """The attention sites of `model`, in the graph's order.

    Found from the graph itself and not from what a fusion looks for: a Softmax over a product of
    queries with keys that come from the input (a learned query counts), whose result is multiplied
    with values that come from the input; or one operator that computes all of it. A softmax whose
    keys or values are weights (a router, a detection head) is none.
    """
    opset = next((model.opset_imports[d] for d in STANDARD if d in model.opset_imports), 13)

    def axis_of(softmax: ir.Node) -> int | None:
        axis = softmax.attributes.get_int("axis", -1 if opset >= 13 else 1)
        rank = stated_rank(softmax.inputs[0], softmax.outputs[0])
        return axis if axis < 0 else axis - rank if rank else None

    softmaxes = [node for node in nodes(model) if node.op_type in SOFTMAXES]
    if any(axis_of(node) is None for node in softmaxes):
        passes.ShapeInferencePass()(model)  # an axis counted from the front needs the rank
    from_inputs = from_input(model)
    attention_sites = []
    for node in nodes(model):
        if (node.domain, node.op_type) in FUSED:
            attention_sites.append(Site(name(node), True, _layer(node), node))
        elif node in softmaxes:
            axis = axis_of(node) or -1
            scores = _scores(node.inputs[0], axis, from_inputs)
            context = _context(node.outputs[0], axis, from_inputs) if scores else None
            if context:
                attention_sites.append(Site(name(node), False, _layer(node), node, scores, context))
    return attention_sites
