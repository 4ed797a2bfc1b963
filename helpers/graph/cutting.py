"""Cut a part out of a graph: an attention block, or any nodes."""

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers.graph import walks
from helpers.graph.attention_sites import PRODUCTS, SHAPES, Site, from_input
from helpers.graph.reading import name


def _projects(node: ir.Node) -> bool:
    """Whether `node` is a product with a constant: a projection."""
    return node.op_type in PRODUCTS and any(
        ir.convenience.get_const_tensor(value) is not None for value in node.inputs if value
    )


def block(model: ir.Model, site: Site, *, side: int = 2) -> list[ir.Node]:
    """The nodes of one attention block: from the projections of Q, K, V to that of the output.

    Both walks, against the arrows and along them, end at a projection (its bias is taken along) and
    before a normalisation. Of what is computed from shapes alone, `side` nodes up are taken.
    """
    dependent = from_input(model)

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
            above: 0 if dependent.intersection(above.outputs) else depth[node] + 1
            for node in step
            if not _projects(node)
            for above in inner(walks.producers(node))
        }
        depth |= reached
        step = [node for node, far in reached.items() if far <= side]
        taken.update(step)
    step = [site.context or site.node]
    while step:
        below = [*walks.downstream(*step, far=1)][len(step) :]
        step = inner(node for node in below if node.op_type not in SHAPES)
        taken.update(step)
        ends = [node for node in step if _projects(node)]
        taken.update(node for node in walks.downstream(*ends, far=1) if node.op_type == "Add")
        step = [node for node in step if node not in ends]
    return [node for node in site.node.graph if node in taken]


def cut_out(model: ir.Model, taken: Iterable[ir.Node]) -> ir.Model:
    """The nodes `taken`, of the main graph, as a model of their own that loads and runs.

    What they read from elsewhere becomes its inputs, what others read from them its outputs;
    weights come along and Constant nodes become initializers. `model` is left as it is.
    """
    names = {name(node) for node in taken}
    copy = passes.ShapeInferencePass()(model.clone()).model
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    inside = [node for node in copy.graph if name(node) in names]
    computed = {value for node in inside for value in node.outputs}
    reads = ir.traversal.RecursiveGraphIterator(inside)  # a branch or a body reads from around it
    read = dict.fromkeys(
        value for node in reads for value in node.inputs if value and value.graph is copy.graph
    )
    inputs = [value for value in read if value not in computed and not value.is_initializer()]
    outputs = [
        value
        for value in computed
        if value.is_graph_output() or any(user not in inside for user in value.consumers())
    ]
    order = {value: i for i, node in enumerate(inside) for value in node.outputs}
    graph = ir.convenience.extract(copy.graph, inputs, sorted(outputs, key=order.__getitem__))
    graph.name = "cut_out"
    return ir.Model(graph, ir_version=model.ir_version)
