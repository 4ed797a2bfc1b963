"""The scores of each attention site, on given inputs: which keys they mask, which branches ran.

A session of its own gives out what goes into the Softmax of each site (of a standard Attention, its
fourth output: the masked scores). An If is put in place of by the branch that runs, since nothing
inside of a branch can be given out; so each choice of branches has its own session.
"""

import gc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import external, files, graph
from helpers.feeds import operator_masks
from helpers.feeds.operator_masks import MASKED


class Scores:
    """Runs the model at `path` for the scores of its attention sites.

    `branches` has, for each If by name, the values that its condition has had in the runs so far.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.branches: dict[str, set[bool]] = {}
        self._sessions: dict[tuple[bool, ...], _Exposed] = {}
        self._proto, self._folder = external.read(self.path)
        if self._proto.functions:
            self._proto = ir.to_proto(graph.inline(ir.from_proto(self._proto)))

    def __bool__(self) -> bool:
        """Whether there is anything to run for: a site whose scores can be given out, or an If."""
        first = self._session(())
        return bool(first.scores or first.operators or first.conditions)

    def masked(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """For each site, True where a score is masked: (batch, heads, queries, keys), or as the
        graph has them. Raises whatever ONNX Runtime raises where the model does not run."""
        exposed = self._session(self.choice(arrays))
        values = exposed.run(arrays)
        given = [operator_masks.masked(node, values) for node in exposed.operators]
        return [~(values[name] > MASKED) for name in exposed.scores] + [
            masked for masked in given if masked is not None
        ]

    def choice(self, arrays: dict[str, np.ndarray]) -> tuple[bool, ...]:
        """The conditions of every If that runs, those inside of branches after those around."""
        choice: tuple[bool, ...] = ()
        while conditions := (exposed := self._session(choice)).conditions:
            values = exposed.run(arrays)
            taken = [bool(np.ravel(values[name])[0]) for _, name in conditions]
            for (branching, _), value in zip(conditions, taken, strict=True):
                self.branches.setdefault(branching, set()).add(value)
            choice += tuple(taken)
        return choice

    def close(self) -> None:
        """Give back the memory of the model and of its sessions."""
        self._sessions.clear()
        self._proto = None
        if self.path.stat().st_size > files.SLOW:
            gc.collect()  # models are in cycles, and hold the weights
        files.give_back()

    def _session(self, choice: tuple[bool, ...]) -> "_Exposed":
        if choice not in self._sessions:
            proto = self._proto
            if _branchings(proto):
                proto = onnx.ModelProto()
                proto.CopyFrom(self._proto)
            left = [*choice]
            while left and (count := len(_branchings(proto))):
                _choose(proto, left[:count])
                left = left[count:]
            self._sessions[choice] = _Exposed(proto, self._folder)
            if proto is self._proto:
                self._proto = onnx.ModelProto()  # nothing branches: its session is the only one
        return self._sessions[choice]


class _Exposed:
    """A session on `proto`, whose outputs are scores and the conditions of what still branches."""

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self.conditions = [
            (node.name or node.output[0], node.input[0]) for node in _branchings(proto)
        ]
        made = {name: node for node in proto.graph.node for name in node.output}
        given = {one.name for one in (*proto.graph.input, *proto.graph.initializer)}
        self.scores: list[str] = []
        self.operators: list[onnx.NodeProto] = []  # which give out none, but tell what they mask
        if not self.conditions:
            for site in graph.sites(graph.inline(ir.from_proto(proto))):
                name = site.node.inputs[0].name if site.scores else _open(made, site)
                node = made.get(site.node.outputs[0].name)
                if name is not None and (name in made or not site.scores):
                    self.scores.append(name)
                elif node is not None and operator_masks.reads(node):
                    self.operators.append(node)
        wanted = [name for _, name in self.conditions if name not in given]
        reads = [name for node in self.operators for name in operator_masks.reads(node)]
        wanted += [name for name in reads if name not in given]
        wanted = list(dict.fromkeys([*self.scores, *wanted]))
        small = {*reads, *(name for _, name in self.conditions)}
        self.given = {
            one.name: onnx.numpy_helper.to_array(one, str(folder))
            for one in proto.graph.initializer
            if one.name in small
        }
        self.session: ort.InferenceSession | None = None
        if wanted:
            del proto.graph.output[:]
            proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
            del proto.graph.value_info[:]
            self.wanted = wanted
            self.session = files.session(proto.SerializeToString(), optimise=False, folder=folder)

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = self.given | arrays
        if self.session is not None:
            values |= dict(zip(self.wanted, self.session.run(self.wanted, arrays), strict=True))
        return values


def _branchings(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "If"]


def _choose(proto: onnx.ModelProto, conditions: list[bool]) -> None:
    """Put the branch that runs in the place of each If of the main graph."""
    nodes = [*proto.graph.node]
    del proto.graph.node[:]
    values = iter(conditions)
    for node in nodes:
        if node.op_type != "If":
            proto.graph.node.append(node)
            continue
        wanted = "then_branch" if next(values) else "else_branch"
        branch = next(one.g for one in node.attribute if one.name == wanted)
        _rename(branch, _made(proto.graph) & _made(branch), node.name or node.output[0])
        proto.graph.initializer.extend(branch.initializer)
        proto.graph.node.extend(branch.node)
        proto.graph.node.extend(
            onnx.helper.make_node("Identity", [inner.name], [outer])
            for inner, outer in zip(branch.output, node.output, strict=True)
            if outer
        )


def _made(inside: onnx.GraphProto) -> set[str]:
    return {name for node in inside.node for name in node.output if name} | {
        one.name for one in inside.initializer
    }


def _rename(inside: onnx.GraphProto, names: set[str], prefix: str) -> None:
    """Put `prefix` before `names` in a branch: those of two branches may be the same."""

    def new(name: str) -> str:
        return f"{prefix}/{name}" if name in names else name

    for node in inside.node if names else ():
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, names, prefix)
    for one in (*inside.initializer, *inside.output) if names else ():
        one.name = new(one.name)


def _open(made: dict[str, onnx.NodeProto], site: graph.Site) -> str | None:
    """Have a standard Attention give its masked scores as its fourth output, of the name returned;
    None where the operator is another, or gives scores already."""
    node = made.get(site.node.outputs[0].name)
    if node is None or node.op_type != "Attention" or node.domain not in graph.STANDARD:
        return None
    node.output.extend([""] * (4 - len(node.output)))
    if node.output[3]:
        return None
    node.output[3] = f"{node.output[0]}_scores"
    kept = [one for one in node.attribute if one.name != "qk_matmul_output_mode"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("qk_matmul_output_mode", 2)])
    return node.output[3]
