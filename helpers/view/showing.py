"""Netron on the part of a graph that matters: live in a notebook, or as a picture for a page."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from helpers import files, graph
from helpers.graph import external, walks
from helpers.view import browser, marks, serving

if TYPE_CHECKING:
    from IPython.display import HTML

READABLE = 60  # nodes up to which a graph is shown whole where no node is named


@dataclass(frozen=True)
class View:
    """What is shown: the nodes of `model`, a cut-out of `file`, and those of them that are marked.

    `around` is the node asked for, `along` a path in the order given, `break_at` the node where
    something breaks.
    """

    file: str
    model: ir.Model
    around: ir.Node | None
    along: tuple[ir.Node, ...]
    break_at: ir.Node | None

    def __str__(self) -> str:
        """The text alternative of a picture of it."""
        counted = Counter(node.op_type for node in self.model.graph)
        operators = (kind if n == 1 else f"{n} {kind}" for kind, n in counted.items())
        total = counted.total()
        text = f"{total} node{'s' * (total != 1)} of {self.file}: {', '.join(operators)}."
        if self.around:
            text += f" Around {_label(self.around)}."
        if self.along:
            steps = (f"{i} {_label(node)}" for i, node in enumerate(self.along, 1))
            text += f" Path: {', '.join(steps)}."
        if self.break_at:
            text += f" Break at {_label(self.break_at)}."
        return text

    def to_json(self) -> dict[str, Any]:
        def name(node: ir.Node | None) -> str | None:
            return graph.name(node) if node else None

        return {
            "nodes": [name(node) for node in self.model.graph],
            "marked": {
                "around": name(self.around),
                "path": [name(node) for node in self.along],
                "break": name(self.break_at),
            },
            "text": str(self),
        }

    def to_proto(self) -> onnx.ModelProto:
        """The cut-out for Netron: of values that `graph.load` left out, only the shape."""
        proto = ir.to_proto(self.model)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
        for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param.startswith("unk__"):  # made up by shape inference
                    dimension.ClearField("dim_param")
        return proto


def _label(node: ir.Node) -> str:
    return f"{node.op_type} {graph.name(node)}"


def _find(path: Path, model: ir.Model, wanted: str) -> ir.Node:
    """The node of that name in the main graph, or `BadInput` with the names that come close."""
    try:
        node = graph.find(model, wanted)
    except KeyError:
        names = [graph.name(node) for node in graph.nodes(model)]
        close = difflib.get_close_matches(wanted, names, cutoff=0.5)
        advice = f"close to it: {', '.join(close)}" if close else "take a name that Netron shows"
        raise files.BadInput(
            f"{path}: expected the name of a node or of a tensor that a node computes,"
            f" found none named {wanted!r}; {advice}"
        ) from None
    if node.graph is not model.graph:
        raise files.BadInput(
            f"{path}: expected a node of the main graph, found {wanted!r} in a branch or a body"
            f" ({node.graph.name}); name the If, Loop or Scan around it"
        )
    if node.op_type == "Constant":
        raise files.BadInput(
            f"{path}: expected a node that computes, found the constant {wanted!r};"
            " name the node that reads it"
        )
    return node


def _way(start: ir.Node, goals: set[ir.Node]) -> list[ir.Node]:
    """The nodes on a shortest way along the arrows, else against them, to one of `goals`."""
    return walks.shortest(start, goals, walks.consumers) or walks.shortest(
        start, goals, walks.producers
    )


def _choose(
    path: Path,
    model: ir.Model,
    named: list[ir.Node],
    around: bool,
    up: int | None,
    down: int | None,
) -> list[ir.Node]:
    """The nodes to show: see `cut`, whose rule it is."""
    if not named:
        if len([node for node in model.graph if node.op_type != "Constant"]) <= READABLE:
            return list(model.graph)
        for site in graph.sites(model):
            if site.node.graph is model.graph:
                return graph.block(model, site)
        raise files.BadInput(
            f"{path}: expected a graph with an attention site or of at most {READABLE} nodes, found"
            f" {len(model.graph)} nodes and no site; name a node with --around"
        )
    default = 3 if around else 1
    up, down = default if up is None else up, default if down is None else down
    taken = {
        near
        for node in (named[:1] if around else named)
        for near in graph.neighbours(node, up=up, down=down)
    }
    for before, node in pairwise(named):
        taken.update(_way(node, {before}) or _way(node, taken), {node})
    return [node for node in model.graph if node in taken]


def cut(
    path: str | Path,
    around: str | None = None,
    *,
    along: Sequence[str] = (),
    break_at: str | None = None,
    up: int | None = None,
    down: int | None = None,
) -> View:
    """The part of the model at `path` that is worth looking at.

    Nodes are given by their names, or by the name of a tensor that they compute. With `around`,
    the nodes at most `up` steps against the arrows from it or `down` along them (3, unless given);
    without it, those near the nodes of `along` and `break_at` (1 step). What is named is always
    shown, with the nodes on the way to the one named before, or else to the nearest that is shown.
    If nothing is named: the whole graph where it has at most 60 nodes, else the block of its first
    attention site. Large weights are left out. Raises `files.BadInput`.
    """
    path = files.check(path, notes=[])  # what cannot be run can be seen
    model = graph.load(path, weights=False)
    wanted = [name for name in (around, *along, break_at) if name is not None]
    named = [_find(path, model, name) for name in wanted]
    taken = _choose(path, model, named, around is not None, up, down)
    # Names need be neither there nor unique: number all nodes, cut, and put the names back.
    names = {str(i): node.name for i, node in enumerate(graph.nodes(model))}
    for number, node in zip(names, graph.nodes(model), strict=True):
        node.name = number
    small = graph.cut_out(model, taken)
    twins = {node.name: node for node in small.graph}
    marked = [twins[node.name] for node in named]
    for node in graph.nodes(small):
        node.name = names[node.name]
    return View(
        path.name,
        small,
        marked.pop(0) if around is not None else None,
        tuple(marked[: len(along)]),
        marked[-1] if break_at is not None else None,
    )


def drawing(program: str | Path | None = None) -> AbstractContextManager[browser.Browser]:
    """One Chromium for several pictures, each of which `save` is to draw in it.

    `program` is that of this machine (`browser.chromium`) unless given. It starts where the context
    begins, and ends with it. Raises `files.BadInput`.
    """
    return browser.opened(browser.chromium(program))


def save(
    path: str | Path,
    save_as: str | Path,
    around: str | None = None,
    *,
    chromium: str | Path | browser.Browser | None = None,
    **choice: Any,
) -> View:
    """Draw what `cut` chooses from the model at `path` to `save_as`, an .svg or .png; returns it.

    `around` and `choice` are passed to `cut`. Netron draws it, in a `chromium` that is started for
    it from a program as in `drawing`, or in the one that `drawing` holds open, with nothing sent
    over the network; the nodes named are marked so that no colour is needed. ``str()`` of the
    result is the picture's text alternative. Raises `files.BadInput`, and then writes nothing.
    """
    held = isinstance(chromium, browser.Browser)
    context = nullcontext(chromium) if held else drawing(chromium)
    with browser.writing(save_as) as draft:
        shown = cut(path, around, **choice)
        number = {node: i for i, node in enumerate(shown.model.graph)}
        proto = shown.to_proto()
        for i, node in enumerate(proto.graph.node):
            node.name = str(i)  # so that Netron's identifiers are known, whatever the names are
        with context as opened:
            marks.draw(
                proto.SerializeToString(),
                draft,
                opened,
                nodes=[(node.op_type, graph.name(node)) for node in number],
                around=number.get(shown.around),
                along=[number[node] for node in shown.along],
                break_at=number.get(shown.break_at),
                text=str(shown),
            )
    return shown


def serve(path: str | Path, shown: View | None = None) -> str:
    """Serve `shown`, or all of the model at `path`, with Netron on this machine; its address.

    Nothing is sent to another machine. It is served as long as the process lives, and so are those
    before it, all on one port. Raises `files.BadInput`.
    """
    return f"http://localhost:{serving.server().server_port}/{_served(path, shown)}"


def _served(path: str | Path, shown: View | None) -> str:
    """The path of the page at `serving.server`."""
    if shown:
        path = Path(path)
        return serving.server().add(path, {path.name: shown.to_proto().SerializeToString()})
    path = files.check(path, notes=[])
    tensors = external.tensors(onnx.load(path, load_external_data=False))
    data = {external.location(tensor): external.place(path, tensor) for tensor in tensors}
    return serving.server().add(path, {**data, path.name: path})


def show(
    path: str | Path,
    around: str | None = None,
    *,
    whole: bool = False,
    height: int = 500,
    **choice: Any,
) -> HTML:
    """Netron, live, for a notebook cell: what `cut` chooses, or the `whole` graph.

    `around` and `choice` are passed to `cut`, `height` is in pixels. Netron runs in the kernel, on
    a port of its machine. A notebook that is open in a browser on that machine shows it directly;
    elsewhere through jupyter-server-proxy, if Jupyter has it; else a line says what to do. Nothing
    is sent to another machine. Raises `files.BadInput`.
    """
    from IPython.display import HTML

    shown = None if whole else cut(path, around, **choice)
    return HTML(serving.html(_served(path, shown), height))
