"""What generation does not need of the outputs: inputs as they came, logits of early positions."""

import onnx_ir as ir

from helpers.fuse.building import Tape
from helpers.graph import caches, logits
from helpers.graph.attention_sites import from_input
from helpers.graph.values import ELEMENTWISE, rank

_END = 2**63 - 1


def drop_unchanged(model: ir.Model) -> list[str]:
    """Take off `model`, in place, the outputs that are inputs as they came in; returns their names.

    As long as it has another one.
    """
    unchanged = [output for output, _ in caches.handed_on(model)]
    if len(unchanged) == len(model.graph.outputs):
        return []
    for output in unchanged:
        model.graph.outputs.remove(output)
    return [output.name for output in unchanged]


def keep_last_logits(model: ir.Model) -> list[str]:
    """Have `model`, in place, give logits (B, 1, V) of the last position alone, where it gives them
    of all, (B, S, V); returns the names of these outputs."""
    dependent, names = from_input(model), []
    for output in [*logits.of_all_positions(model)]:
        value, chain = output, [output]
        while step := _above(value, dependent):
            node, at = step
            value = node.inputs[at]
            chain.append(value)
            if node.op_type in ("MatMul", "Gemm"):
                break
        _cut(chain)
        names.append(output.name)
    return names


def _above(value: ir.Value, dependent: set[ir.Value]) -> tuple[ir.Node, int] | None:
    """The node that makes each position of `value` (B, S, …) of the same position of one of its
    inputs, and which; None where it does not."""
    node = value.producer()
    if node is None or len([*value.consumers()]) + value.is_graph_output() != 1:
        return None
    given = [at for at, operand in enumerate(node.inputs) if operand in dependent]
    by_weight = node.op_type == "MatMul" and given == [0]
    if not by_weight and (node.op_type not in ELEMENTWISE or len(given) != 1):
        return None
    return (node, given[0]) if rank(node.inputs[given[0]]) == 3 else None


def _cut(chain: list[ir.Value]) -> None:
    """Begin from the last position of the last value of `chain`, (B, S, …), each made of the
    next."""
    *made, start = chain
    tape = Tape()
    last = tape.op("Slice", [start, tape.ints(-1), tape.ints(_END), tape.ints(-2)])
    last.type, last.shape = start.type, _of_one(start)
    start.producer().graph.insert_after(start.producer(), tape.nodes)
    if not made:
        start.replace_all_uses_with(last, replace_graph_outputs=True)
        tape.nodes[-1].replace_input_with(0, start)
        last.name, start.name = start.name, None
        return
    reader = made[-1].producer()
    reader.replace_input_with(reader.inputs.index(start), last)
    for value in made:
        value.shape = _of_one(value)


def _of_one(value: ir.Value) -> ir.Shape | None:
    """The shape of `value` (B, S, …) with one position."""
    if value.shape is None:
        return None
    return ir.Shape([value.shape[0], 1, *value.shape[2:]])
