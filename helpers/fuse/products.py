"""The products of an attention site as MatMul, whatever operator the exporter chose.

    Einsum "bind,bjnd->bnij"   → Transpose each operand, MatMul, Transpose the result
    Gemm                       → Transpose where it says so, MatMul, Mul, Add
    com.microsoft FusedMatMul  → the same

so that `attention` reads one kind of product. Transposes that change nothing are not written.
Follows the specifications of Einsum, Gemm, and com.microsoft's FusedMatMul.
"""

import onnx_ir as ir

from helpers import graph


def as_matmul(node: ir.Node) -> ir.Node | None:
    """Rewrite the product `node` in its graph; returns its MatMul, None where there is no way."""
    if node.op_type == "MatMul" and node.domain in graph.STANDARD:
        return node
    rewrite = {"Einsum": _einsum, "Gemm": _gemm, "FusedMatMul": _gemm}.get(node.op_type)
    tape = ir.tape.Tape()
    rewritten = rewrite(node, tape) if rewrite else None
    if rewritten is None:
        return None
    product, result = rewritten
    product.producer().metadata_props.update(node.metadata_props)
    old = node.outputs[0]
    result.shape, result.type = old.shape, old.type
    node.graph.insert_before(node, tape.nodes)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, old.name = old.name, None
    node.graph.remove(node, safe=True)
    return product.producer()


def _einsum(node: ir.Node, tape: ir.tape.Tape) -> tuple[ir.Value, ir.Value] | None:
    terms, result = graph.equation(node)
    if len(terms) != 2 or not (all(term.isalpha() for term in terms) and result.isalpha()):
        return None
    first, second = terms
    batch = [label for label in result if label in first and label in second]
    rows = [label for label in result if label in first and label not in second]
    columns = [label for label in result if label in second and label not in first]
    summed = [label for label in first if label in second and label not in result]
    whole = len(first) == len(second) == len(result) == len(batch) + 2
    if not whole or not len(rows) == len(columns) == len(summed) == 1:
        return None
    product = tape.op(
        "MatMul",
        [
            _transposed(tape, node.inputs[0], first, [*batch, *rows, *summed]),
            _transposed(tape, node.inputs[1], second, [*batch, *summed, *columns]),
        ],
    )
    return product, _transposed(tape, product, [*batch, *rows, *columns], [*result])


def _transposed(tape: ir.tape.Tape, value: ir.Value, axes, wanted) -> ir.Value:
    """`value`, whose axes are labelled `axes`, with them in the order `wanted`."""
    perm = [list(axes).index(label) for label in wanted]
    if perm == sorted(perm):
        return value
    return tape.op("Transpose", [value], {"perm": perm})


def _gemm(node: ir.Node, tape: ir.tape.Tape) -> tuple[ir.Value, ir.Value] | None:
    attributes = node.attributes
    if attributes.get_int("transBatchA", 0) or attributes.get_int("transBatchB", 0):
        return None
    operands = []
    for value, flag in zip(node.inputs, ("transA", "transB"), strict=False):
        axes = 2 if node.op_type == "Gemm" else value.shape and len(value.shape)
        if attributes.get_int(flag, 0):
            if not axes:
                return None
            perm = [*range(axes - 2), axes - 1, axes - 2]
            value = tape.op("Transpose", [value], {"perm": perm})
        operands.append(value)
    product = result = tape.op("MatMul", operands)
    factor = attributes.get_float("alpha", 1.0)
    if factor != 1.0:
        result = tape.op("Mul", [result, _like(tape, factor, node.inputs[0])])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        added, factor = node.inputs[2], attributes.get_float("beta", 1.0)
        if factor != 1.0:
            added = tape.op("Mul", [added, _like(tape, factor, added)])
        result = tape.op("Add", [result, added])
    return product, result


def _like(tape: ir.tape.Tape, number: float, value: ir.Value) -> ir.Value:
    constant = tape.op("Constant", [], {"value_float": number})
    return tape.op("CastLike", [constant, value])
