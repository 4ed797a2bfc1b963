"""The products of an attention site as MatMul, whatever operator the exporter chose.

    Einsum "bind,bjnd->bnij"   → Transpose each operand, MatMul, Transpose the result
    Einsum "bqhd,bkd->bhqk"    → the same, the keys with an axis of 1 for the heads that share them
    Gemm                       → Transpose where it says so, MatMul, Mul, Add
    com.microsoft FusedMatMul  → the same

so that `attention` reads one kind of product. Transposes that change nothing are not written.
Follows the specifications of Einsum, Gemm, and com.microsoft's FusedMatMul.
"""

import string

import onnx_ir as ir

from helpers import graph
from helpers.graph.values import rank


def as_matmul(node: ir.Node, weights: ir.Value | None = None) -> ir.Node | None:
    """Rewrite the product `node` in its graph; returns its MatMul, None where there is no way.

    It is the product of queries with keys, or that of the `weights` with the values.
    """
    if node.op_type == "MatMul" and node.domain in graph.STANDARD:
        return node
    tape = ir.tape.Tape()
    if node.op_type == "Einsum":
        rewritten = _einsum(node, tape, weights)
    else:
        rewritten = _gemm(node, tape) if node.op_type in ("Gemm", "FusedMatMul") else None
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


def _einsum(
    node: ir.Node, tape: ir.tape.Tape, weights: ir.Value | None
) -> tuple[ir.Value, ir.Value] | None:
    """An Einsum of two operands as MatMul over all labels but three.

    "bqhd,bkd->bhqk" sums d, with rows q and columns k: the last two of the scores' labels, which
    are those of the result, or of the `weights`. All others are batch, where a label that an
    operand does not have is an axis of 1, so that what it holds is shared: (b, h, q, d) by
    (b, 1, d, k).
    """
    labels = _labels(node)
    if labels is None:
        return None
    (first, second), result = labels
    operands = [(node.inputs[0], first), (node.inputs[1], second)]
    if weights is not None and node.inputs[1] is weights:
        operands.reverse()
    (_, left), (_, right) = operands
    scores = result if weights is None else left
    summed = [label for label in left if label in right and label not in result]
    only_left, only_right = (
        [label for label in result if (label in left, label in right) == sides]
        for sides in ((True, False), (False, True))
    )
    ends = scores[-2:]
    rows = [label for label in only_left if label in ends] or only_left[:1]
    columns = [label for label in only_right if label in ends or weights is not None]
    whole = {*left, *right} == {*result, *summed}
    if not whole or not len(rows) == len(columns) == len(summed) == 1:
        return None
    batch = [label for label in scores if label in result and label not in (*rows, *columns)]
    batch += [label for label in result if label not in (*batch, *rows, *columns)]
    product = tape.op(
        "MatMul",
        [
            _with_axes(tape, *operands[0], [*batch, *rows, *summed]),
            _with_axes(tape, *operands[1], [*batch, *summed, *columns]),
        ],
    )
    return product, _with_axes(tape, product, "".join([*batch, *rows, *columns]), [*result])


def _labels(node: ir.Node) -> tuple[list[str], str] | None:
    """The terms of an Einsum of two operands and its result, with letters in the place of "…";
    None where an operand has a label twice."""
    terms, result = graph.equation(node)
    if len(terms) != 2 or not result:
        return None
    free = [letter for letter in string.ascii_uppercase if letter not in "".join([*terms, result])]
    counts = []
    for term, operand in zip(terms, node.inputs, strict=True):
        axes = rank(operand)
        if "..." in term and axes is None:
            return None
        counts.append(axes - len(term) + 3 if "..." in term else 0)
    letters = "".join(free[: max(counts)])  # aligned at the end, as axes are broadcast
    terms = [
        term.replace("...", letters[len(letters) - count :])
        for term, count in zip(terms, counts, strict=True)
    ]
    result = result.replace("...", letters)
    whole = all(term.isalpha() and len({*term}) == len(term) for term in (*terms, result))
    return (terms, result) if whole else None


def _with_axes(tape: ir.tape.Tape, value: ir.Value, axes: str, wanted: list[str]) -> ir.Value:
    """`value`, whose axes are labelled `axes`, with them in the order `wanted`, and axes of 1 where
    it has none of a label."""
    sizes = dict(zip(axes, value.shape or [None] * len(axes), strict=True))
    kept = [label for label in wanted if label in axes]
    perm = [axes.index(label) for label in kept]
    if perm != sorted(perm):
        value = tape.op("Transpose", [value], {"perm": perm})
        value.shape = ir.Shape([sizes[label] for label in kept])
    missing = [i for i, label in enumerate(wanted) if label not in axes]
    if missing:
        new = tape.op("Constant", [], {"value_ints": missing})
        value = tape.op("Unsqueeze", [value, new])
        value.shape = ir.Shape([sizes.get(label, 1) for label in wanted])
    return value


def _gemm(node: ir.Node, tape: ir.tape.Tape) -> tuple[ir.Value, ir.Value] | None:
    # alpha · A' · B' + beta · C, where A' is A (…, S, D) or, with transA, A (…, D, S) transposed.
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
