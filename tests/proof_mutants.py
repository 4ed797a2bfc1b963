"""Mutants of a graph for the self-test of `compare`: each has one fault of one attention site.

Places are found in the graph, never by a model's name: the attention sites by `helpers.graph`, and
what their operands are by the values that they have on a feed of the test's own, `feeds`, the last
of which are padded. Masks, windows and causal offsets are changed where a site reads its mask, so
that it does not matter how an exporter wrote them. Shapes: B batch, N heads, S queries, T keys,
D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from helpers import files, graph

Arrays = dict[str, np.ndarray]
Change = Callable[["_Tape", ir.Value], ir.Value]
Slot = tuple[ir.Node, int]  # a node, and which of its inputs
MASKED = -5e3  # scores of this or less have been masked
LOW = np.float32(-1e9)


class _Tape(ir.tape.Tape):
    """A tape on which an operator is a method, its attributes by name."""

    def __getattr__(self, operator: str) -> Callable[..., ir.Value]:
        return lambda *inputs, **attributes: self.op(operator, inputs, attributes)


@dataclass(frozen=True)
class Mutant:
    """A graph with one fault: its kind, the name of the place, and what makes it."""

    kind: str
    where: str
    make: Callable[[], onnx.ModelProto]

    def __str__(self) -> str:
        return f"{self.kind}, at {self.where}"


class _Places:
    """The operands of each attention site, in one copy of a graph."""

    def __init__(self, model: ir.Model) -> None:
        self.known = graph.from_input(model)
        self.sites = [site for site in graph.sites(model) if site.node.graph is model.graph]

    def operand(self, site: graph.Site, what: str) -> Slot | None:
        """Where a site reads its queries, keys or values."""
        index = {"queries": 0, "keys": 1, "values": 2}[what]
        if site.scores is None:
            return site.node, index
        if what != "values":
            return site.scores, index
        return site.context, 1

    def masks(self, site: graph.Site) -> list[Slot]:
        """What may be a mask: the other operands of Add and Where from scores to Softmax."""
        if site.scores is None:
            node = site.node
            return [(node, 3)] if len(node.inputs) > 3 and node.inputs[3] is not None else []
        path, queue = [], [site.node]
        below = _reached(site.scores)
        while queue:
            node = queue.pop()
            for value in node.inputs:
                above = value.producer() if value is not None else None
                if above in below and above not in path and above is not site.scores:
                    path.append(above)
                    queue.append(above)
        return [
            (node, index)
            for node in path
            if node.op_type in ("Add", "Where")
            for index, value in enumerate(node.inputs)
            if value.producer() not in path and value.producer() is not site.scores
            if node.op_type == "Add" or index == 0
        ]


def _reached(node: ir.Node) -> set[ir.Node]:
    """`node`, and all that reads of it."""
    found, queue = {node}, [node]
    while queue:
        for value in queue.pop().outputs:
            new = set(value.consumers()) - found
            found |= new
            queue += new
    return found


def probe(model: ir.Model, values: Iterable[ir.Value], feeds: Sequence[Arrays]) -> list[Arrays]:
    """What `values`, by name, are on each of `feeds`."""
    copy = model.clone()
    names = dict.fromkeys(value.name for value in values)
    by_name = {value.name: value for node in copy.graph for value in node.outputs}
    constants = {
        name: copy.graph.initializers[name].const_value.numpy()
        for name in names
        if name in copy.graph.initializers
    }
    inputs = {value.name for value in copy.graph.inputs}
    wanted = [name for name in names if name not in constants and name not in inputs]
    present = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(by_name[name] for name in wanted if name not in present)
    for value in copy.graph.outputs:
        value.shape = None if value.name in wanted else value.shape
    session = files.session(ir.to_proto(copy).SerializeToString(), optimise=False)
    found = []
    for arrays in feeds:
        got = dict(zip(wanted, session.run(wanted, arrays) if wanted else [], strict=True))
        found.append(constants | {name: arrays[name] for name in names if name in inputs} | got)
    return found


Same = dict[ir.Node, ir.Node]  # the copy's node for each of the original's


class _Maker:
    """Makes mutants, each of a fresh copy of the graph."""

    def __init__(self, model: ir.Model) -> None:
        self.original = model
        self.places = _Places(model)

    def edited(self, edit: Callable[[Same], None]) -> onnx.ModelProto:
        copy = self.original.clone()
        edit(dict(zip(self.original.graph, copy.graph, strict=True)))
        return ir.to_proto(copy)

    def mutant(self, kind: str, where: str, edit: Callable[[Same], None]) -> Mutant:
        return Mutant(kind, where, lambda: self.edited(edit))

    def attribute(self, kind: str, site: graph.Site, name: str, value: float | int) -> Mutant:
        """The graph in which an attribute of a fused site is `value`."""

        def edit(same: Same) -> None:
            of = ir.AttrFloat32 if isinstance(value, float) else ir.AttrInt64
            same[site.node].attributes[name] = of(name, value)

        return self.mutant(kind, site.name, edit)

    def replaced(self, kind: str, where: str, slot: Slot, change: Change) -> Mutant:
        """The graph with `change` of what a node reads there in its stead."""

        def edit(same: Same) -> None:
            node = same[slot[0]]
            build = _Tape()
            node.replace_input_with(slot[1], change(build, node.inputs[slot[1]]))
            node.graph.insert_before(node, build.nodes)

        return self.mutant(kind, where, edit)


def _constant(build: _Tape, value: object, dtype: type = np.int64) -> ir.Value:
    return build.Constant(value=ir.tensor(np.asarray(value, dtype)))


# ── Masks ───────────────────────────────────────────────────────────────────────────────────────

Visible = Callable[[_Tape, ir.Value, "_Grid"], ir.Value]


@dataclass(frozen=True)
class _Grid:
    """In a graph: for each query and key how far behind the key is, (S, T); the key's number, (T,);
    and how many keys there are."""

    behind: ir.Value
    key: ir.Value
    keys: ir.Value


def _grid(build: _Tape, site: graph.Site, queries: ir.Value, keys: ir.Value) -> _Grid:
    """The positions of queries and keys; the last query is as far as the last key."""

    def axis(value: ir.Value, number: int) -> ir.Value:
        return build.Gather(build.Shape(value), _constant(build, number))

    rows = axis(queries, -2)
    columns = axis(keys, -2 if site.scores is None else -1)
    zero, one = _constant(build, 0), _constant(build, 1)
    key = build.Range(zero, columns, one)
    query = build.Add(build.Range(zero, rows, one), build.Sub(columns, rows))
    behind = build.Sub(build.Unsqueeze(query, _constant(build, [1])), key)
    return _Grid(behind, key, columns)


def _some(build: _Tape, visible: ir.Value) -> ir.Value:
    """Which keys any query sees: those that are no padding. (…, 1, T)"""
    numbers = build.Cast(visible, to=ir.DataType.INT32)
    most = build.ReduceSum(numbers, _constant(build, [-2]), keepdims=1)
    return build.Cast(most, to=ir.DataType.BOOL)


def _beyond(distance: int, comparison: str) -> Visible:
    """Keys are seen too whose distance behind compares so, unless they are padding."""

    def change(build: _Tape, visible: ir.Value, grid: _Grid) -> ir.Value:
        far = build.op(comparison, [grid.behind, _constant(build, distance)])
        return build.Or(visible, build.And(far, _some(build, visible)))

    return change


def _without(distance: int) -> Visible:
    def change(build: _Tape, visible: ir.Value, grid: _Grid) -> ir.Value:
        here = build.Equal(grid.behind, _constant(build, distance))
        return build.And(visible, build.Not(here))

    return change


def _dropped(build: _Tape, visible: ir.Value, grid: _Grid) -> ir.Value:
    return build.Or(visible, build.Not(visible))


def _inverted(build: _Tape, visible: ir.Value, grid: _Grid) -> ir.Value:
    return build.Not(visible)


def _leaked(build: _Tape, visible: ir.Value, grid: _Grid) -> ir.Value:
    last = build.Equal(grid.key, build.Sub(grid.keys, _constant(build, 1)))
    return build.Or(visible, last)


def _seen(array: np.ndarray, keep: bool) -> np.ndarray:
    return array == keep if array.dtype == bool else array > MASKED


def _is_mask(arrays: list[np.ndarray]) -> bool:
    return all(one.dtype == bool or one.dtype.kind == "f" for one in arrays) and any(
        one.dtype == bool or (one.size and one.min() <= MASKED) for one in arrays
    )


def _band(visible: np.ndarray) -> tuple[int | None, int | None]:
    """How far ahead and how far behind keys are seen in an unpadded mask (…, S, T), None where as
    far as there are keys."""
    rows, columns = visible.shape[-2:]
    if rows == 1:
        return None, None
    behind = (np.arange(rows) + columns - rows)[:, None] - np.arange(columns)
    seen = behind[visible.reshape(-1, rows, columns).all(axis=0)]
    ahead = None if seen.min() == behind.min() else -int(seen.min())
    return ahead, None if seen.max() == behind.max() else int(seen.max())


def _mask_changes(visible: np.ndarray) -> Iterator[tuple[str, Visible]]:
    yield "mask dropped", _dropped
    yield "mask inverted", _inverted
    yield "last key leaked", _leaked
    ahead, behind = _band(visible)
    if ahead == 0:
        yield "causal offset moved, later key seen", _beyond(-1, "Equal")
        yield "causal offset moved, own key not seen", _without(0)
    if behind is not None:
        yield "window removed", _beyond(behind, "Greater")
        yield "window off by one, wider", _beyond(behind + 1, "Equal")
        yield "window off by one, narrower", _without(behind)


def _of_masks(make: _Maker, arrays: Arrays, values: list[Arrays]) -> Iterator[Mutant]:
    for site in make.places.sites:
        queries, keys = (make.places.operand(site, what) for what in ("queries", "keys"))
        slots = [
            slot
            for slot in make.places.masks(site)
            if _is_mask([one[slot[0].inputs[slot[1]].name] for one in values])
        ]
        for node, index in slots:
            array = values[0][node.inputs[index].name]
            keep = node.op_type != "Where" or node.inputs[2].producer() not in _reached(site.scores)
            for kind, change in _mask_changes(_seen(array, keep)):
                edit = _masked(
                    site, queries, keys, (node, index), change, keep, array.dtype == bool
                )
                yield make.mutant(kind, site.name, edit)
        causal = site.node.attributes.get_int("is_causal", 0) if site.scores is None else 0
        if causal and not slots:
            yield from _of_causal(make, site)


def _masked(
    site: graph.Site,
    queries: Slot,
    keys: Slot,
    mask: Slot,
    change: Visible,
    keep: bool,
    boolean: bool,
) -> Callable[[Same], None]:
    """An edit by which `change` of what is seen is the mask. Of a mask that is added, what else it
    has where keys are seen, such as a bias by position, stays."""

    def edit(same: Same) -> None:
        build = _Tape()
        grid = _grid(build, site, *(same[node].inputs[index] for node, index in (queries, keys)))
        node, index = same[mask[0]], mask[1]
        value = node.inputs[index]
        if boolean:
            new = change(build, value if keep else build.Not(value), grid)
            new = new if keep else build.Not(new)
        else:
            seen = build.Greater(value, _constant(build, MASKED, np.float32))
            zero, low = (_constant(build, one, np.float32) for one in (0, LOW))
            new = change(build, seen, grid)
            new = build.Where(new, build.Where(seen, value, zero), low)
        node.replace_input_with(index, new)
        node.graph.insert_before(node, build.nodes)

    return edit


def _of_causal(make: _Maker, site: graph.Site) -> Iterator[Mutant]:
    """A standard Attention that is causal by its attribute alone."""
    yield make.attribute("mask dropped", site, "is_causal", 0)
    for kind, first in (
        ("causal offset moved, later key seen", -1),
        ("causal offset moved, own key not seen", 1),
    ):

        def edit(same: Same, first: int = first) -> None:
            node = same[site.node]
            build = _Tape()
            grid = _grid(build, site, *node.inputs[:2])
            seen = build.GreaterOrEqual(grid.behind, _constant(build, first))
            node.resize_inputs(max(4, len(node.inputs)))
            node.replace_input_with(3, seen)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
            node.graph.insert_before(node, build.nodes)

        yield make.mutant(kind, site.name, edit)


def _of_mask_inputs(make: _Maker) -> Iterator[Mutant]:
    """The same faults in an input (batch, keys) of ones and zeros, for all sites at once."""

    def leaked(build: _Tape, value: ir.Value) -> ir.Value:
        last = build.Sub(build.Gather(build.Shape(value), _constant(build, 1)), _constant(build, 1))
        number = build.Range(
            _constant(build, 0), build.Add(last, _constant(build, 1)), _constant(build, 1)
        )
        return build.Where(build.Equal(number, last), _constant(build, 1), value)

    changes = {
        "mask dropped": lambda build, value: build.Max(value, _constant(build, 1)),
        "mask inverted": lambda build, value: build.Sub(_constant(build, 1), value),
        "last key leaked": leaked,
    }
    for number, one in enumerate(make.original.graph.inputs):
        if "mask" not in one.name or one.dtype != ir.DataType.INT64 or len(one.shape) != 2:
            continue
        for kind, change in changes.items():

            def edit(same: Same, number: int = number, change: Change = change) -> None:
                inside = next(iter(same.values())).graph
                value = inside.inputs[number]
                uses = list(value.uses())
                build = _Tape()
                new = change(build, value)
                for node, index in uses:
                    node.replace_input_with(index, new)
                inside.insert_before(inside[0], build.nodes)

            yield make.mutant(kind, one.name, edit)


# ── Scores ──────────────────────────────────────────────────────────────────────────────────────


def _of_scale(make: _Maker, values: list[Arrays]) -> Iterator[Mutant]:
    for site in make.places.sites:
        slot = make.places.operand(site, "queries")
        if site.scores is not None:
            yield make.replaced(
                "scale 5 % off",
                site.name,
                slot,
                lambda build, value: build.Mul(value, _constant(build, 1.05, np.float32)),
            )
            continue
        node = site.node
        shape = values[0][slot[0].inputs[slot[1]].name].shape
        width = shape[-1] // (1 if len(shape) == 4 else node.attributes.get_int("q_num_heads"))
        scale = node.attributes.get_float("scale", width**-0.5)
        yield make.attribute("scale 5 % off", site, "scale", scale * 1.05)


def _of_cap(make: _Maker) -> Iterator[Mutant]:
    """Soft cap: cap · tanh(scores / cap), as operators or an attribute of Attention."""
    for site in make.places.sites:
        if site.scores is None:
            if site.node.attributes.get_float("softcap", 0.0):
                yield make.attribute("soft cap dropped", site, "softcap", 0.0)
            continue
        below = _reached(site.scores)
        queue, seen = [site.node], set()
        while queue:
            node = queue.pop()
            for index, value in enumerate(node.inputs):
                above = value.producer()
                if above is None or above not in below or above in seen or above is site.scores:
                    continue
                seen.add(above)
                queue.append(above)
                if above.op_type == "Tanh":
                    yield make.replaced(
                        "soft cap dropped",
                        site.name,
                        (node, index),
                        lambda build, value: value.producer().inputs[0],
                    )


# ── Heads ───────────────────────────────────────────────────────────────────────────────────────


def _taken(
    make: _Maker, kind: str, site: graph.Site, what: str, order: list[int], axis: int
) -> Mutant:
    """The heads of an operand in another order: on axis 1 of (B, N, …), or as blocks on the last
    axis of (B, S, N·D), or on the first of (B·N, …)."""

    def change(build: _Tape, value: ir.Value) -> ir.Value:
        index = _constant(build, order)
        if axis == 0:
            rows = build.Gather(build.Shape(value), _constant(build, 0))
            row = build.Range(_constant(build, 0), rows, _constant(build, 1))
            head = build.Mod(row, _constant(build, len(order)))
            index = build.Add(build.Sub(row, head), build.Gather(index, head))
        return build.Gather(value, index, axis=axis)

    return make.replaced(kind, site.name, make.places.operand(site, what), change)


def _of_heads(make: _Maker, batch: int, values: list[Arrays]) -> Iterator[Mutant]:
    for site in make.places.sites:
        arrays, heads = {}, {}
        for what in ("queries", "keys", "values"):
            node, index = make.places.operand(site, what)
            array = arrays[what] = values[0][node.inputs[index].name]
            if array.ndim == 4:
                heads[what] = array.shape[1]
            elif site.scores is None:
                named = "q_num_heads" if what == "queries" else "kv_num_heads"
                heads[what] = node.attributes.get_int(named)
            else:
                heads[what] = array.shape[0] // batch
        for what in ("queries", "values"):
            last, shape = heads[what] - 1, arrays[what].shape
            if last < 1:
                continue
            order, axis = [last, *range(1, last), 0], 1
            if len(shape) == 3 and site.scores is None:
                width, axis = shape[2] // len(order), 2
                order = [head * width + i for head in order for i in range(width)]
            elif len(shape) == 3:
                axis = 0
            yield _taken(make, f"two heads of {what} swapped", site, what, order, axis)
        keys, number = arrays["keys"], heads["keys"]
        if keys.ndim != 4 or number < 2:
            continue
        if site.scores is None and number < heads["queries"]:
            yield _spelt_out(make, site, heads["queries"], number)
            continue
        group = next((i for i in range(1, number) if (keys[:, i] != keys[:, 0]).any()), number)
        if 1 < group < number:
            order = [head % (number // group) * group for head in range(number)]
            yield _taken(make, "keys' heads repeated as tiles", site, "keys", order, 1)


def _spelt_out(make: _Maker, site: graph.Site, heads: int, groups: int) -> Mutant:
    """An Attention that repeats heads itself: values repeated as it does, keys as tiles."""

    def edit(same: Same) -> None:
        node = same[site.node]
        build = _Tape()
        for index, order in (
            (1, [head % groups for head in range(heads)]),
            (2, [head // (heads // groups) for head in range(heads)]),
        ):
            new = build.Gather(node.inputs[index], _constant(build, order), axis=1)
            node.replace_input_with(index, new)
        node.graph.insert_before(node, build.nodes)

    return make.mutant("keys' heads repeated as tiles", site.name, edit)


# ── Weights and positions ───────────────────────────────────────────────────────────────────────


def _of_biases(make: _Maker) -> Iterator[Mutant]:
    for site in make.places.sites:
        for what in ("queries", "values"):
            node, index = make.places.operand(site, what)
            found = _bias(node.inputs[index], make.places.known)
            if found is None:
                continue
            slot, part = found
            bias = slot[0].inputs[slot[1]].const_value.numpy().copy()
            which, parts = part or (0, 1)
            size = len(bias) // parts
            bias[which * size : (which + 1) * size] = 0

            def change(build: _Tape, value: ir.Value, bias=bias) -> ir.Value:
                return build.Constant(value=ir.tensor(bias))

            yield make.replaced(f"bias of {what} dropped", site.name, slot, change)


def _bias(value: ir.Value, known: set[ir.Value]) -> tuple[Slot, tuple[int, int] | None] | None:
    """The bias that is added to a projection above `value`, and which part of how many, where a
    Split takes an operand out of a joint projection."""
    queue: list[tuple[ir.Value, tuple[int, int] | None]] = [(value, None)]
    seen = set()
    while queue:
        value, part = queue.pop(0)
        node = value.producer()
        if node is None or value in seen or value not in known:
            continue
        seen.add(value)
        if node.op_type in ("Add", "Gemm"):
            for index, one in enumerate(node.inputs):
                tensor = one.const_value
                if tensor is not None and tensor.shape.rank() == 1 and tensor.shape[0] > 1:
                    above = node.inputs[1 - index].producer() if node.op_type == "Add" else node
                    if above is not None and above.op_type in ("Gemm", "MatMul"):
                        return (node, index), part
        if node.op_type in ("Gemm", "LayerNormalization", "MatMul"):
            continue
        if node.op_type == "Split" and len(node.outputs) == 3:
            part = (node.outputs.index(value), 3)
        queue += [(one, part) for one in node.inputs if one is not None]
    return None


def _of_rotary(make: _Maker, values: list[Arrays]) -> Iterator[Mutant]:
    """Rotary embeddings: queries · cos(angle) + turned queries · sin(angle). The angle, (B, S, D),
    of the queries alone is that of the next position."""
    for site in make.places.sites:
        node, index = make.places.operand(site, "queries")
        operator = _operator(node.inputs[index])
        if operator is not None:
            yield _turned(make, site, operator, values[0])
            continue
        chains = _chains(node.inputs[index], make.places.known)
        if not chains:
            continue
        steps = {}
        for _, chain in chains:
            angle = values[0][chain[-1].inputs[0].name]
            step = angle[..., 1:2, :] - angle[..., :1, :]
            steps[chain[-1]] = step.reshape(-1, angle.shape[-1])[:1]

        def edit(same: Same, chains=chains, steps=steps) -> None:
            for slot, chain in chains:  # from what the Mul reads up to Cos or Sin
                build = _Tape()
                before = same[chain[-1]].inputs[0]
                new = build.Add(before, _constant(build, steps[chain[-1]], np.float32))
                for one in reversed(chain):
                    mine = same[one]
                    inputs = [new if value is before else value for value in mine.inputs]
                    before = mine.outputs[0]
                    new = build.op(mine.op_type, inputs, dict(mine.attributes.items()))
                mul = same[slot[0]]
                mul.replace_input_with(slot[1], new)
                mul.graph.insert_before(mul, build.nodes)

        yield make.mutant("rotary positions of queries shifted", site.name, edit)


def _operator(value: ir.Value) -> ir.Node | None:
    """The RotaryEmbedding above a query, before any product."""
    queue, seen = [value], set()
    while queue:
        node = queue.pop(0).producer()
        if node is None or node in seen or node.op_type in ("Gemm", "MatMul"):
            continue
        if node.op_type == "RotaryEmbedding":
            return node
        seen.add(node)
        queue += [one for one in node.inputs if one is not None]
    return None


def _turned(make: _Maker, site: graph.Site, node: ir.Node, values: Arrays) -> Mutant:
    """The standard RotaryEmbedding, whose cosines and sines, (B, S, D/2), are inputs: they are
    those of the sum of the angle and that of one step."""
    cos, sin = (values[node.inputs[index].name] for index in (1, 2))
    turn = (cos + 1j * sin)[:1, 1:2] / (cos + 1j * sin)[:1, :1]

    def edit(same: Same) -> None:
        mine, build = same[node], _Tape()
        cos, sin = mine.inputs[1:3]
        c, s = (_constant(build, part, np.float32) for part in (turn.real, turn.imag))
        mine.replace_input_with(1, build.Sub(build.Mul(cos, c), build.Mul(sin, s)))
        mine.replace_input_with(2, build.Add(build.Mul(sin, c), build.Mul(cos, s)))
        mine.graph.insert_before(mine, build.nodes)

    return make.mutant("rotary positions of queries shifted", site.name, edit)


def _chains(value: ir.Value, known: set[ir.Value]) -> list[tuple[Slot, list[ir.Node]]]:
    """Each Mul above a query that reads of a Cos or Sin, and the nodes up to that."""
    found, queue, seen = [], [value], set()
    while queue:
        node = queue.pop(0).producer()
        if node is None or node in seen or node.op_type in ("Gemm", "MatMul"):
            continue
        seen.add(node)
        for index, one in enumerate(node.inputs):
            chain = _chain(one) if node.op_type == "Mul" else None
            if chain:
                found.append(((node, index), chain))
            elif one is not None:
                queue.append(one)
    return found


def _chain(value: ir.Value | None) -> list[ir.Node] | None:
    """From `value` up to a Cos or Sin, through nodes that read nothing else but constants."""
    chain: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        chain.append(node)
        if node.op_type in ("Cos", "Sin"):
            return chain
        if node.op_type not in ("Cast", "Mul", "Unsqueeze", "Identity"):
            return None
        open_ = [one for one in node.inputs if ir.convenience.get_const_tensor(one) is None]
        if len(open_) != 1:
            return None
        value = open_[0]
    return None


def _positions(make: _Maker) -> list[ir.Node]:
    """Lookups by position: their indices do not come from what is in the inputs."""
    return [
        node
        for node in make.original.graph
        if node.op_type in ("Gather", "GatherElements")
        and node.inputs[1] not in make.places.known
        and node.inputs[1].const_value is None
        and node.inputs[1].producer() is not None
    ]


def _of_buckets(make: _Maker, values: list[Arrays]) -> Iterator[Mutant]:
    """Relative positions: a table (buckets, heads), or products with one, looked up by a bucket for
    each query and key, (…, S, T). What the farthest bucket gives becomes 0."""
    for node in _positions(make):
        index = values[0][node.inputs[1].name]
        data = node.inputs[0]
        table = node.op_type == "Gather"
        if index.ndim < 2 or min(index.shape[-2:]) < 9 or index.dtype.kind != "i":
            continue
        if table and (data.const_value is None or len(data.shape) != 2):
            continue
        corners = index.reshape(-1, *index.shape[-2:])[0]
        near = corners[0, 0]
        far = sorted({int(one) for one in (corners[0, -1], corners[-1, 0])} - {int(near)})
        if not far or len(set(corners.ravel())) < 4:
            continue

        def edit(same: Same, node=node, far=far, kind=index.dtype.type, table=table) -> None:
            mine = same[node]
            build = _Tape()
            hits = [build.Equal(mine.inputs[1], _constant(build, one, kind)) for one in far]
            hit = functools.reduce(build.Or, hits)
            if table:
                hit = build.Unsqueeze(hit, _constant(build, [-1]))
            uses = list(mine.outputs[0].uses())
            new = build.Where(hit, _constant(build, 0, np.float32), mine.outputs[0])
            for user, at in uses:
                user.replace_input_with(at, new)
            mine.graph.insert_after(mine, build.nodes)

        yield make.mutant("far buckets zeroed", graph.name(node), edit)


def _of_position_tables(make: _Maker, values: list[Arrays]) -> Iterator[Mutant]:
    """Learned positions: the last quarter of the rows that the longest feed reaches becomes 0."""
    for node in _positions(make):
        table, index = node.inputs[0].const_value, values[0][node.inputs[1].name]
        if node.op_type != "Gather" or table is None or table.shape.rank() != 2:
            continue
        if index.ndim == 0 or index.size != index.shape[-1] or len(set(index.ravel())) < 9:
            continue
        rows = table.numpy().copy()
        rows[int(index.max() * 0.9) :] = 0

        def change(build: _Tape, value: ir.Value, rows=rows) -> ir.Value:
            return build.Constant(value=ir.tensor(rows))

        yield make.replaced("last positions zeroed", graph.name(node), (node, 0), change)


# ── Branches ────────────────────────────────────────────────────────────────────────────────────


def of_branches(model: onnx.ModelProto) -> Iterator[Mutant]:
    """The wrong branch of each If: swapped, and one for both."""
    for number, node in enumerate(model.graph.node):
        if node.op_type == "If":
            for kind, then, other in (
                ("branches of an If swapped", "else_branch", "then_branch"),
                ("then-branch of an If for both", "then_branch", "then_branch"),
                ("else-branch of an If for both", "else_branch", "else_branch"),
            ):
                make = functools.partial(_branched, model, number, then, other)
                yield Mutant(kind, node.name or node.output[0], make)


def _branched(model: onnx.ModelProto, number: int, then: str, other: str) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    attributes = {one.name: one.g for one in model.graph.node[number].attribute}
    for one in copy.graph.node[number].attribute:
        one.g.CopyFrom(attributes[then if one.name == "then_branch" else other])
    if then == other:  # names are single in a model
        _rename(copy.graph.node[number].attribute[1].g)
    return copy


def _rename(inside: onnx.GraphProto) -> None:
    made = {name for node in inside.node for name in node.output if name}
    for node in inside.node:
        node.name = f"{node.name}_again"
        for names in (node.input, node.output):
            names[:] = [f"{name}_again" if name in made else name for name in names]
    for value in (*inside.output, *inside.value_info):
        value.name = f"{value.name}_again" if value.name in made else value.name


# ── All ─────────────────────────────────────────────────────────────────────────────────────────


def mutants(model: ir.Model, feeds: Sequence[Arrays]) -> Iterator[Mutant]:
    """Every mutant of `model`. The first of `feeds` is not padded; the others are."""
    make = _Maker(model)
    wanted: list[ir.Value] = []
    for site in make.places.sites:
        slots = [make.places.operand(site, one) for one in ("queries", "keys", "values")]
        slots += make.places.masks(site)
        wanted += [node.inputs[index] for node, index in slots]
        node, index = slots[0]
        operator = _operator(node.inputs[index])
        wanted += operator.inputs[1:3] if operator is not None else []
        wanted += [
            chain[-1].inputs[0] for _, chain in _chains(node.inputs[index], make.places.known)
        ]
    wanted += [node.inputs[1] for node in _positions(make)]
    values = probe(model, wanted, feeds)
    batch = len(next(iter(feeds[0].values())))
    yield from _of_masks(make, feeds[0], values)
    yield from _of_mask_inputs(make)
    yield from _of_scale(make, values)
    yield from _of_cap(make)
    yield from _of_heads(make, batch, values)
    yield from _of_biases(make)
    yield from _of_rotary(make, values)
    yield from _of_buckets(make, values)
    yield from _of_position_tables(make, values)
    yield from of_branches(ir.to_proto(model))


def rescaled(model: ir.Model) -> onnx.ModelProto:
    """The same in other numbers: at each site queries × 1.3, and keys ÷ 1.3."""
    make = _Maker(model)

    def edit(same: Same) -> None:
        for site in make.places.sites:
            for what, operator in (("queries", "Mul"), ("keys", "Div")):
                slot = make.places.operand(site, what)
                node, index = same[slot[0]], slot[1]
                build = _Tape()
                factor = _constant(build, 1.3, np.float32)
                node.replace_input_with(index, build.op(operator, [node.inputs[index], factor]))
                node.graph.insert_before(node, build.nodes)

    return make.edited(edit)


def scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """`model` with its outputs of float times `factor`."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for value in copy.graph.output:
        if factor != 1 and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            name = f"{value.name}_scaled"
            copy.graph.initializer.append(numpy_helper.from_array(np.float32(factor), f"{name}_by"))
            copy.graph.node.append(helper.make_node("Mul", [value.name, f"{name}_by"], [name]))
            value.name = name
    return copy
