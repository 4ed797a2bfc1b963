"""Read a graph: operators, attention sites, neighbours, where a node came from, cut-outs.

Graphs are ``onnx_ir`` models. Axes are counted from the end (-1 is the last), since graphs often do
not state their ranks. Shapes: B batch, N heads, S queries, T keys, D width of a head.
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers.graph import walks
from helpers.graph.reading import MICROSOFT, STANDARD, module, name, nodes

# Operators that are an attention site by themselves.
FUSED = {(domain, "Attention") for domain in (*STANDARD, MICROSOFT)} | {
    (MICROSOFT, name)
    for name in (
        "DecoderMaskedMultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "GroupQueryAttention",
        "LongformerAttention",
        "MultiHeadAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "QAttention",
        "QOrderedAttention",
        "QOrderedLongformerAttention",
        "SparseAttention",
    )
}

# Operators that leave each score, or each weight, at its place on the last axes.
ELEMENTWISE = {
    *("Add", "Cast", "CastLike", "Clip", "Div", "Dropout", "Expand", "Identity", "Max", "Min"),
    *("Mul", "Pow", "Sub", "Sum", "Tanh", "Where", "DequantizeLinear", "QuantizeLinear"),
    *("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus"),
    *("Softsign", "Sqrt", "Swish"),
}
_RESHAPING = {"Concat", "Flatten", "Pad", "Reshape", "ScatterND", "Slice", "Split"}
PRODUCTS = {"Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"}
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
    found, step = module(node), [node]
    while found is None and step:
        step = walks.consumers(step[0])[:1]
        inner = module(step[0]) if step else None
        found = inner.rpartition(".")[0] if inner else None
    return found


# ── Attention sites ─────────────────────────────────────────────────────────────────────────────


def from_input(model: ir.Model) -> set[ir.Value]:
    """The values that depend on what is in the model's inputs, not on their shapes alone."""
    known: set[ir.Value] = {value for value in model.graph.inputs if not value.is_initializer()}

    def visit(graph: ir.Graph) -> None:
        for node in graph:
            inner = [
                inside
                for attribute in node.attributes.values()
                for inside in (
                    [attribute.as_graph()]
                    if attribute.type == ir.AttributeType.GRAPH
                    else attribute.as_graphs()
                    if attribute.type == ir.AttributeType.GRAPHS
                    else []
                )
            ]
            for inside in inner:
                known.update(inside.inputs)  # what a Loop or Scan carries
                visit(inside)
            results = {value for inside in inner for value in inside.outputs}
            if node.op_type not in SHAPES and not known.isdisjoint({*node.inputs, *results}):
                known.update(node.outputs)

    visit(model.graph)
    return known


def _rank(*values: ir.Value | None) -> int | None:
    return next((len(v.shape) for v in values if v is not None and v.shape is not None), None)


def _constant(value: ir.Value | None = None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(item) for item in tensor.numpy().ravel()]


def through(node: ir.Node, axis: int, *, forward: bool) -> int | None:
    """Follow `axis` through `node`, from its input to its output or back. None: it does not pass.

    Reshapes are taken to leave the last axes as they are, as splitting and merging heads does.
    """
    if node.op_type in ELEMENTWISE or node.op_type in _RESHAPING:
        return axis
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm") or [*range(_rank(*node.inputs) or 2)][::-1]
        if not -len(perm) <= axis < 0:
            return None
        moved = perm.index(len(perm) + axis) if forward else perm[axis]
        return moved - len(perm)
    if node.op_type in ("Squeeze", "Unsqueeze"):
        adds = node.op_type == "Unsqueeze"
        axes = node.attributes.get_ints("axes") or _constant(*node.inputs[1:2])
        rank = _rank(*node.outputs) if adds else _rank(*node.inputs)
        if rank is None and axes and adds:
            inner = _rank(*node.inputs)
            rank = None if inner is None else inner + len(axes)
        ends = [one - rank if one >= 0 and rank else one for one in axes or []]
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


def _operands(node: ir.Node, axis: int) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a product that bring its output's `axis`, and the other one."""
    if node.op_type == "Einsum":
        terms, result = equation(node)
        if len(terms) != 2 or len(result) < -axis or result[axis] == ".":
            return None
        holds = [result[axis] in term for term in terms]
        if sum(holds) != 1:
            return None
        return node.inputs[holds.index(True)], node.inputs[holds.index(False)]
    first, second = (node.inputs[0], node.inputs[3 if node.op_type == "QLinearMatMul" else 1])
    if _rank(second) == 1:  # a vector adds no axis to the output
        axis -= 1
    return {-1: (second, first), -2: (first, second)}.get(axis)


def _contracts(node: ir.Node, value: ir.Value, axis: int) -> ir.Value | None:
    """The other operand, if the product sums over `axis` of its operand `value`; else None."""
    if node.op_type == "Einsum":
        terms, result = equation(node)
        if len(terms) != 2:
            return None
        mine = node.inputs.index(value)
        if len(terms[mine]) < -axis:
            return None
        label = terms[mine][axis]
        summed = label in terms[1 - mine] and label not in result
        return node.inputs[1 - mine] if summed else None
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


def _scores(value: ir.Value, axis: int, known: set[ir.Value]) -> ir.Node | None:
    """Walk up from a Softmax to the product of queries with keys that come from the input."""
    learned = None  # a product of keys with a learned query, unless a product of two is above it
    queue, seen = [(value, axis)], set()
    while queue:
        value, axis = queue.pop(0)
        node = value.producer() if value is not None else None
        if node is None or (node, axis) in seen:
            continue
        seen.add((node, axis))
        if node.op_type in PRODUCTS:
            operands = _operands(node, axis)
            if operands is None or operands[0] not in known:
                continue
            if operands[1] in known:
                return node
            # x·W is a linear layer, unless W is one column: then that is the query
            learned = learned or (None if _is_linear(node, operands[1]) else node)
            queue.append((operands[0], axis))  # heads mixed by a weight: the scores are above
            continue
        above = through(node, axis, forward=False)
        if above is not None:
            queue += [(one, above) for one in node.inputs if one is not None]
    return learned


def _context(value: ir.Value, axis: int, known: set[ir.Value]) -> ir.Node | None:
    """Walk down from a Softmax to the product with values that come from the input."""
    queue, seen = [(value, axis)], set()
    while queue:
        value, axis = queue.pop(0)
        for node in value.consumers():
            if (node, axis) in seen:
                continue
            seen.add((node, axis))
            if node.op_type in PRODUCTS:
                other = _contracts(node, value, axis)
                if other is not None and other in known:
                    return node
                if other is None and node.inputs[0] is value and node.inputs[1] not in known:
                    queue.append((node.outputs[0], axis))  # heads mixed by a weight
                continue
            below = through(node, axis, forward=True)
            if below is not None:
                queue += [(one, below) for one in node.outputs]
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
        rank = _rank(softmax.inputs[0], softmax.outputs[0])
        return axis if axis < 0 else axis - rank if rank else None

    softmaxes = [node for node in nodes(model) if node.op_type in ("Softmax", "BiasSoftmax")]
    if any(axis_of(node) is None for node in softmaxes):
        passes.ShapeInferencePass()(model)  # an axis counted from the front needs the rank
    known = from_input(model)
    found = []
    for node in nodes(model):
        if (node.domain, node.op_type) in FUSED:
            found.append(Site(name(node), True, _layer(node), node))
        elif node in softmaxes:
            axis = axis_of(node) or -1
            scores = _scores(node.inputs[0], axis, known)
            context = _context(node.outputs[0], axis, known) if scores else None
            if context:
                found.append(Site(name(node), False, _layer(node), node, scores, context))
    return found


# ── Cut-outs ────────────────────────────────────────────────────────────────────────────────────
