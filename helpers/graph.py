"""Read a graph: operators, attention sites, neighbours, where a node came from, cut-outs.

Graphs are ``onnx_ir`` models. Axes are counted from the end (-1 is the last), since graphs often do
not state their ranks. Shapes: B batch, N heads, S queries, T keys, D width of a head.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers import external

LARGE = 2**16  # bytes of a weight above which its values are left out where they do not matter
_LATEST = {"": onnx.defs.onnx_opset_version(), "ai.onnx.ml": 5}  # which ONNX Runtime imports
_QUANTISED = re.compile(r"[Qq]uantize|QLinear|Integer$|NBits|(^|\.)Q[A-Z]")
_NO_NAMES = {"", "?", "*", "-1", "None", "none", "null"}  # as names of sizes
STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"

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
_PRODUCTS = {"Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"}
_SHAPES = {"Shape", "Size"}  # what is computed from a shape alone does not come from the input


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


def load(path: str | Path, *, weights: bool = True) -> ir.Model:
    """The model at `path`, its functions inlined, mended as `inline` does.

    Without `weights`, tensors above 64 KB are left out: their names, types and shapes are there,
    their values must not be read. It takes as much less memory. Raises `BadInput` where external
    data is not where it may be.
    """
    if weights:
        return inline(external.load(path))
    proto = onnx.load(path, format="protobuf", load_external_data=False)
    return inline(ir.from_proto(without_weights(proto)))


def inline(model: ir.Model) -> ir.Model:
    """`model`, in place, with its functions inlined, and mended as ONNX Runtime does by itself.

    Nodes are sorted. A domain is imported where an operator is of it, and ONNX's own is called "".
    Sizes below 0, and names of sizes that are no names (?), are sizes that are not known: axes of
    such a "name" are independent.
    """
    opsets = model.opset_imports
    if "ai.onnx" in opsets:
        opsets.setdefault("", opsets.pop("ai.onnx"))
    if model.functions:
        passes.InlinePass()(model)
    for domain in {node.domain for node in nodes(model)} - {*opsets}:
        opsets[domain] = _LATEST.get(domain, 1)
    for inside in model.graphs():
        _sort(inside)
        values = [*inside.inputs, *inside.initializers.values()]
        for node in inside:
            values += node.outputs
        for value in values:
            _mend_shape(value)
    return model


def _sort(inside: ir.Graph) -> None:
    """Sort the nodes, if one reads what a later one of the graph computes."""
    made: set[ir.Value] = set()
    for node in inside:
        reads = ir.traversal.RecursiveGraphIterator([node])
        for value in (v for one in reads for v in one.inputs if v is not None):
            if value.producer() and value.graph is inside and value not in made:
                inside.sort()
                return
        made.update(node.outputs)


def _mend_shape(value: ir.Value) -> None:
    if value.shape is None:
        return
    sizes = [
        size if (size >= 0 if isinstance(size, int) else size.value not in _NO_NAMES) else None
        for size in value.shape
    ]
    if None in sizes:
        value.shape = ir.Shape(sizes)


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model in which tensors above 64 KB have no values; `proto` loses them too."""
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > LARGE:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="left out")
    # Protobuf gives memory back with the whole message only.
    return onnx.ModelProto.FromString(proto.SerializeToString())


def names_in(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """The names of all nodes, and of all tensors, those in branches, bodies and functions too."""
    nodes: set[str] = set()
    tensors: set[str] = set()
    queue: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while queue:
        inside = queue.pop()
        for node in inside.node:
            nodes.add(node.name)
            tensors.update(node.output)
            for attribute in node.attribute:
                queue += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        if isinstance(inside, onnx.GraphProto):
            tensors.update(one.name for one in (*inside.input, *inside.initializer))
    return nodes - {""}, tensors - {""}


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node, those in the branches and bodies of If, Loop and Scan included."""
    return ir.traversal.RecursiveGraphIterator(model.graph)


def name(node: ir.Node) -> str:
    """What to search for in Netron: the node's name, or its first output's where it has none."""
    return node.name or next((value.name for value in node.outputs if value.name), "")


def find(model: ir.Model, wanted: str) -> ir.Node:
    """The node of that name, or the one that computes the tensor of that name; else KeyError."""
    for node in nodes(model):
        if node.name == wanted or any(value.name == wanted for value in node.outputs):
            return node
    raise KeyError(wanted)


def _producers(step: Iterable[ir.Node]) -> list[ir.Node]:
    above = (v.producer() for node in step for v in node.inputs if v is not None)
    return [node for node in dict.fromkeys(above) if node is not None]


def _consumers(step: Iterable[ir.Node]) -> list[ir.Node]:
    return list(
        dict.fromkeys(user for node in step for v in node.outputs for user in v.consumers())
    )


def operator(node: ir.Node) -> str:
    """What a node does, with its domain where that is not ONNX's own: com.microsoft.Attention."""
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def counts(model: ir.Model, *, domains: bool = True) -> dict[str, int]:
    """How often each operator occurs, most frequent first; with the `domains` of those that are
    not ONNX's own, or without, as ONNX Runtime's profile has them."""
    counted = Counter(operator(node) if domains else node.op_type for node in nodes(model))
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def notes(model: ir.Model) -> list[str]:
    """What a reader should know of the types that `model` computes in, a line each."""
    found = Counter(
        value.dtype
        for inside in model.graphs()
        for value in (*inside.inputs, *inside.initializers.values(), *inside.outputs)
        if value.dtype is not None
    )
    lines = []
    if found[ir.DataType.BFLOAT16]:
        lines.append("computes in bfloat16, for which ONNX Runtime has few kernels on the CPU")
    counted = counts(model)
    quantised = {name: n for name, n in counted.items() if _QUANTISED.search(name)}
    if quantised:
        listed = ", ".join(f"{n} {name}" for name, n in quantised.items())
        lines.append(f"quantised: {listed}")
    return lines


# ── Where a node came from ──────────────────────────────────────────────────────────────────────


def module(node: ir.Node) -> str | None:
    """The PyTorch module that `node` came from, as ``named_modules`` writes it, or None.

    The dynamo exporter writes it into the node's metadata, TorchScript into its name, and an
    optimizer often leaves it in the name of the tensor that it took over.
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        modules = ast.literal_eval(scopes)[:-1]  # the last is the operator itself
        # torch.export's own name for what it adds is the module of no model
        named = (one for one in reversed(modules) if not one.startswith("_empty_nn_module_stack"))
        return next(filter(None, named), None)
    for path in (node.name or "", *(value.name or "" for value in node.outputs)):
        if path.startswith("/") and path.count("/") > 1:
            return ".".join(path.strip("/").split("/")[:-1])
    return None


def origin(node: ir.Node) -> str | None:
    """Where `node` was written in PyTorch: "FILE:LINE in MODULE", "MODULE", or None."""
    frames = re.findall(
        r'File "([^"]+)", line (\d+)', node.metadata_props.get("pkg.torch.onnx.stack_trace", "")
    )
    if not frames:
        return module(node)
    file, line = frames[-1]
    return f"{PurePath(file).name}:{line} in {module(node) or 'the model'}"


def _layer(node: ir.Node) -> str | None:
    """`module`, or for a node that an optimizer made, the module around what reads its result."""
    found, step = module(node), [node]
    while found is None and step:
        step = _consumers(step)[:1]
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
            if node.op_type not in _SHAPES and not known.isdisjoint({*node.inputs, *results}):
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
        if node.op_type in _PRODUCTS:
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
            if node.op_type in _PRODUCTS:
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


def _projects(node: ir.Node) -> bool:
    """Whether `node` is a product with a constant: a projection."""
    return node.op_type in _PRODUCTS and any(
        ir.convenience.get_const_tensor(value) is not None for value in node.inputs if value
    )


def block(model: ir.Model, site: Site, *, side: int = 2) -> list[ir.Node]:
    """The nodes of one attention block: from the projections of Q, K, V to that of the output.

    Both walks, against the arrows and along them, end at a projection (its bias is taken along) and
    before a normalisation. Of what is computed from shapes alone, `side` nodes up are taken.
    """
    known = from_input(model)

    def inner(nodes: Iterable[ir.Node]) -> list[ir.Node]:
        return [
            node
            for node in nodes
            if node not in taken
            and node.op_type != "Constant"
            and "Normalization" not in node.op_type
        ]

    taken = {site.context or site.node}
    step, depth = list(taken), dict.fromkeys(taken, 0)
    while step:
        reached = {
            above: 0 if known.intersection(above.outputs) else depth[node] + 1
            for node in step
            if not _projects(node)
            for above in inner(_producers([node]))
        }
        depth |= reached
        step = [node for node, far in reached.items() if far <= side]
        taken.update(step)
    step = [site.context or site.node]
    while step:
        step = inner(node for node in _consumers(step) if node.op_type not in _SHAPES)
        taken.update(step)
        ends = [node for node in step if _projects(node)]
        taken.update(node for node in _consumers(ends) if node.op_type == "Add")
        step = [node for node in step if node not in ends]
    return [node for node in site.node.graph if node in taken]


def neighbours(node: ir.Node, *, up: int = 3, down: int = 3) -> list[ir.Node]:
    """`node`, and the nodes at most `up` steps against the arrows or `down` along them."""
    taken, step = {node}, [node]
    for _ in range(up):
        step = _producers(step)
        taken.update(step)
    step = [node]
    for _ in range(down):
        step = _consumers(step)
        taken.update(step)
    return [one for one in node.graph if one in taken]


def cut_out(model: ir.Model, taken: Iterable[ir.Node]) -> ir.Model:
    """The nodes `taken`, of the main graph, as a model of their own that loads and runs.

    What they read from elsewhere becomes its inputs, what others read from them its outputs;
    weights come along and Constant nodes become initializers. `model` is left as it is.
    """
    names = {name(node) for node in taken}
    copy = passes.ShapeInferencePass()(model.clone()).model
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    inside = [node for node in copy.graph if name(node) in names]
    made = {value for node in inside for value in node.outputs}
    reads = ir.traversal.RecursiveGraphIterator(inside)  # a branch or a body reads from around it
    read = dict.fromkeys(v for node in reads for v in node.inputs if v and v.graph is copy.graph)
    inputs = [value for value in read if value not in made and not value.is_initializer()]
    outputs = [
        value
        for value in made
        if value.is_graph_output() or any(user not in inside for user in value.consumers())
    ]
    order = {value: i for i, node in enumerate(inside) for value in node.outputs}
    graph = ir.convenience.extract(copy.graph, inputs, sorted(outputs, key=order.__getitem__))
    graph.name = "cut_out"
    return ir.Model(graph, ir_version=model.ir_version)
