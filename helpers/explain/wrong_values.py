"""The values around wrong sites: what the operator of each got, and what the original has there.

The original is run once more, for the values at the sites alone; the piece around an operator is
run on those that both graphs have, and gives out what goes into the operator and what comes after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from helpers import files, graph, parity
from helpers.explain import following, site_numbers, wanted
from helpers.explain.got import Got
from helpers.explain.pieces import Piece, ValuesOf, alone
from helpers.feeds import Feed
from helpers.graph import operators, walks

_LONG = 128  # queries above which sites of one form are told alike, by the values of one of them


@dataclass
class _Ran:
    """What an operator got, the values `after` it in the optimised graph, and what those that
    follow it say where they do not run."""

    got: Got
    nodes: list[onnx.NodeProto]
    after: parity.Outputs
    error: str = ""


def told(
    values_of: ValuesOf,
    proto: onnx.ModelProto,
    model: ir.Model,
    sites: Sequence[graph.Site],
    wrong: Sequence[tuple[Piece, Feed]],
) -> dict[int | str, list[str]]:
    """What the operator of each `wrong` piece wants and what it got, in lines, by site.

    `proto` is the optimised model, and `model` the original, which `values_of` runs, with its
    `sites`.
    """
    first_of_form: dict[tuple, int] = {}
    alike = [first_of_form.setdefault(_form(*one), i) for i, one in enumerate(wrong)]
    names = [
        name for i in {*alike} for name in _asked(model, _site(sites, wrong[i][0]), wrong[i][0])
    ]
    original = values_of(names)
    lines = {}
    for i in {*alike}:
        piece, own = wrong[i]
        site = _site(sites, piece)
        for feed in (wrong[0][1], own):  # one for all, so that the same fault is told alike
            lines[i] = _lines(piece, proto, model, site, original(feed.arrays), feed is own)
            if lines[i]:
                break
    return {
        site: lines[first]
        for first, (piece, _) in zip(alike, wrong, strict=True)
        for site in piece.sites
    }


def is_short(feed: Feed) -> bool:
    """Whether it has so few queries that each site can be told by itself."""
    return all(size <= _LONG for array in feed.arrays.values() for size in array.shape[1:])


def _form(piece: Piece, feed: Feed) -> tuple:
    """What pieces share that are told alike: of a short feed, nothing."""
    if is_short(feed):
        return (id(piece),)
    operator = onnx.NodeProto()
    operator.CopyFrom(piece.operator)
    given = tuple(bool(name) for name in operator.input)
    del operator.input[:], operator.output[:]
    operator.name = ""
    return operator.SerializeToString(), given, *(node.op_type for node in piece.nodes)


def _site(sites: Sequence[graph.Site], piece: Piece) -> graph.Site | None:
    number = piece.sites[0]
    return None if isinstance(number, str) else sites[number]


def _after(model: ir.Model, site: graph.Site, piece: Piece) -> list[ir.Node]:
    """The product with the values, and what follows it in the original within the piece."""
    below = {*walks.downstream(site.context)} & piece.stands_for
    return [node for node in model.graph if node in below]


def _asked(model: ir.Model, site: graph.Site | None, piece: Piece) -> list[str]:
    """The tensors of the original whose values are looked at."""
    names = [*piece.inputs]
    if site is not None and site_numbers.tensors(site):
        names += site_numbers.tensors(site)
        names += [node.outputs[0].name for node in _after(model, site, piece)]
    return names


def _lines(
    piece: Piece,
    proto: onnx.ModelProto,
    model: ir.Model,
    site: graph.Site | None,
    values: parity.Outputs,
    last: bool,
) -> list[str]:
    """What the operator of `piece` wants, and what it got, on the original's `values`; where
    nothing was found, nothing, or if they are the `last`, what agrees."""
    name = f"{piece.operator.domain}.{piece.operator.op_type}".lstrip(".")
    if site is None:
        return [f"{name}: stands for what is no attention in the original"]
    if operators.of(piece.operator) is None:
        return [f"{name}: what it takes is not known, so what it got is not told"]
    try:
        ran = _ran(piece, proto, values)
    except Exception as error:  # ONNX Runtime's own types
        return [f"{name}: what comes before it does not run: {wanted.short(str(error))}"]
    numbers = None
    if site_numbers.tensors(site):
        numbers = site_numbers.read(site, values, ran.got.hidden)
    if numbers is None and ran.got.refused:
        return [f"{name} does not run: {wanted.short(ran.got.refused)}"]
    if numbers is None:
        return [f"{name}: the original's site is of a form that is not read, so it is not told"]
    if not wanted.right(ran.got, numbers):
        told = wanted.lines(ran.got, numbers)
        return told or [wanted.agreeing(ran.got, numbers)] * last
    if ran.error:
        return [f"{name} is right; what follows does not run: {wanted.short(ran.error)}"]
    lacking = float(numbers.hidden.all(axis=-1).mean())
    after = _after(model, site, piece)
    told = following.lines(name, ran.got.output, ran.nodes, ran.after, after, values, lacking)
    nothing = f"{name}: in it and in what follows it nothing was found that differs"
    return told or [nothing] * last


def _ran(piece: Piece, proto: onnx.ModelProto, values: parity.Outputs) -> _Ran:
    """Run the piece on the original's `values`, for what its operator got and what follows."""
    operator, made = piece.operator, {name for node in piece.nodes for name in node.output}
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    computed = [name for name in operator.input if name in made]
    known = values | (_run(piece, computed, proto, values) if computed else {})
    given = {}
    for number, name in enumerate(operator.input):
        if name in weights:
            given[number] = onnx.numpy_helper.to_array(weights[name])
        elif name:
            given[number] = np.asarray(known[name])
    got = Got(operator, given, None)
    nodes = _below(piece.nodes, operator)
    result, error = operator.output[0], ""
    after: parity.Outputs = {}
    try:
        after = _run(piece, [result, *(node.output[0] for node in nodes)], proto, values)
    except Exception as raised:  # ONNX Runtime's own types
        error = str(raised)
        try:
            after = _run(piece, [result], proto, values)
        except Exception as refused:
            got.refused = str(refused)
    got.output = after.get(result)
    return _Ran(got, nodes, after, error)


def _run(
    piece: Piece, names: Sequence[str], proto: onnx.ModelProto, values: parity.Outputs
) -> parity.Outputs:
    """The values of `names` in the piece; raises what ONNX Runtime raises."""
    part = replace(piece, nodes=_above(piece.nodes, names), outputs=[*names])
    session = files.session(alone(part, proto, values).SerializeToString(), optimise=False)
    feed = {name: np.asarray(values[name]) for name in piece.inputs}
    return dict(zip(names, session.run([*names], feed), strict=True))


def _above(nodes: Sequence[onnx.NodeProto], names: Sequence[str]) -> list[onnx.NodeProto]:
    """Those of `nodes`, in order, that compute `names`."""
    needed, found = {*names}, []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            found.append(node)
            needed.update(node.input)
    return found[::-1]


def _below(nodes: Sequence[onnx.NodeProto], operator: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Those of `nodes`, in order, that depend on what `operator` gives."""
    reached, found = {*filter(None, operator.output)}, []
    for node in nodes:
        if not reached.isdisjoint(node.input):
            found.append(node)
            reached.update(filter(None, node.output))
    return found
