"""Read a graph: its nodes and their names, operators, types, and where a node came from."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers.graph import external

LEFT_OUT_ABOVE = (
    2**16
)  # bytes of a weight above which its values are left out where they do not matter

_LATEST = {"": onnx.defs.onnx_opset_version(), "ai.onnx.ml": 5}  # which ONNX Runtime imports

_NO_NAMES = {"", "?", "*", "-1", "None", "none", "null"}  # as names of sizes

STANDARD = ("", "ai.onnx")
BEFORE_QUANTISING = "fuse the float model, and quantise what that gives"

MICROSOFT = "com.microsoft"
_QUANTISED = re.compile(r"(\w+\.)*(\w*[Qq]uantize[A-Z]\w*|Q[A-Z][a-z]\w*|\w+Integer\w*|\w+NBits)")


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
    computed: set[ir.Value] = set()
    for node in inside:
        reads = ir.traversal.RecursiveGraphIterator([node])
        for value in (value for inner in reads for value in inner.inputs if value is not None):
            if value.producer() and value.graph is inside and value not in computed:
                inside.sort()
                return
        computed.update(node.outputs)


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
        if len(tensor.raw_data) > LEFT_OUT_ABOVE:
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
            tensors.update(tensor.name for tensor in (*inside.input, *inside.initializer))
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


def operator(node: ir.Node) -> str:
    """What a node does, with its domain where that is not ONNX's own: com.microsoft.Attention."""
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def is_quantised(operator: str) -> bool:
    """Whether an operator, by its name, computes in integers, or turns floats into them or back."""
    return _QUANTISED.fullmatch(operator) is not None


def later_operators(model: ir.Model) -> list[str]:
    """The operators of ONNX's own that the opset which `model` imports does not have yet."""
    opset = model.opset_imports.get("", 0)

    def is_later(operator: str) -> bool:
        if not opset or not onnx.defs.has(operator):
            return False  # ONNX Runtime writes some of its own into ONNX's domain
        return not onnx.defs.has(operator, max_inclusive_version=opset)

    own = dict.fromkeys(node.op_type for node in nodes(model) if node.domain in STANDARD)
    return [operator for operator in own if is_later(operator)]


def counts(model: ir.Model, *, domains: bool = True) -> dict[str, int]:
    """How often each operator occurs, most frequent first; with the `domains` of those that are
    not ONNX's own, or without, as ONNX Runtime's profile has them."""
    counted = Counter(operator(node) if domains else node.op_type for node in nodes(model))
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def module(node: ir.Node) -> str | None:
    """The PyTorch module that `node` came from, as ``named_modules`` writes it, or None.

    The dynamo exporter writes it into the node's metadata, TorchScript into its name, and an
    optimizer often leaves it in the name of the tensor that it took over.
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        modules = ast.literal_eval(scopes)[:-1]  # the last is the operator itself
        # torch.export's own name for what it adds is the module of no model
        named = (
            scope for scope in reversed(modules) if not scope.startswith("_empty_nn_module_stack")
        )
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
    return f"{file_name(file)}:{line} in {module(node) or 'the model'}"


def file_name(path: str) -> str:
    """The name of a file with source code, as a reader knows it."""
    return "notebook cell" if "ipykernel" in path else PurePath(path).name
