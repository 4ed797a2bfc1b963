"""The scores of each attention site, on given inputs: which keys they mask, which branches ran.

A session of its own gives out what goes into the Softmax of each site (of a standard Attention, its
fourth output: the masked scores), and takes something to add to the result of each site, which
shows how far what a row without a key gets is carried. An If is replaced by the branch that runs,
since nothing inside of a branch can be given out; so each choice of branches has its own session.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import files, graph
from helpers.feeds import operator_masks
from helpers.feeds.operator_masks import MASKED
from helpers.graph import external

Arrays = dict[str, np.ndarray]


class Scores:
    """Runs the model at `path` for the scores of its attention sites, which are `sites` if they are
    known.

    `branches` has, for each If by name, the values that its condition has had in the runs so far.
    """

    def __init__(
        self, path: str | Path | files.Opened, sites: Sequence[graph.Site] | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self._sites = sites
        self.branches: dict[str, set[bool]] = {}
        self._sessions: dict[tuple[bool, ...], _Exposed] = {}
        self._proto, self._folder = external.read(self.path)
        if self._proto.functions:
            self._proto = ir.to_proto(graph.inline(ir.from_proto(self._proto)))

    def __bool__(self) -> bool:
        """Whether there is anything to run for: a site whose scores can be given out, or an If."""
        first = self._session(())
        return bool(first.sites or first.conditions)

    def masked(self, arrays: Arrays) -> list[np.ndarray]:
        """For each site, True where a score is masked: (batch, heads, queries, keys), or as the
        graph has them. Raises whatever ONNX Runtime raises where the model does not run."""
        exposed = self._session(self.choice(arrays))
        return exposed.masked(exposed.run(arrays))

    def spread(self, arrays: Arrays) -> float:
        """How far the scores of a query are apart, as standard deviation over its keys: the median
        of its rows, in the site where that is largest. 0 where no scores are given out."""
        exposed = self._session(self.choice(arrays))
        values = exposed.run(arrays)
        scores = [values[site.scores] for site in exposed.sites if site.scores is not None]
        return max((_spread(array) for array in scores), default=0.0)

    def settled(self, arrays: Arrays, lacking: list[np.ndarray] | None) -> Arrays | None:
        """For each output, True where it does not depend on what rows get that have no key; these
        are `lacking`, of each site (batch, heads, queries) as the graph has them. None where all
        rows have a key, or where that cannot be found."""
        if not any(rows.any() for rows in lacking or ()):
            return None
        exposed = self._session(self.choice(arrays))
        try:
            before, after = exposed.run(arrays), exposed.run(arrays, lacking)
        except Exception:  # ONNX Runtime's own types: the result has its rows elsewhere
            return None
        with np.errstate(invalid="ignore"):
            return {name: before[name] == after[name] for name in exposed.outputs}

    def choice(self, arrays: Arrays) -> tuple[bool, ...]:
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
        files.give_back(self.path.stat().st_size)

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
            sites = self._sites if proto is self._proto else None  # others are in a branch
            self._sessions[choice] = _Exposed(proto, self._folder, sites)
            if proto is self._proto:
                self._proto = onnx.ModelProto()  # nothing branches: its session is the only one
        return self._sessions[choice]


@dataclasses.dataclass
class _Site:
    """What a session gives out of a site: the tensor `scores`, or else what the `operator` of
    com.microsoft reads; and the input `added` to its result, of so many `axes`."""

    scores: str | None
    operator: onnx.NodeProto | None
    added: str
    axes: int | None

    def masked(self, values: Arrays) -> np.ndarray:
        if self.scores is not None:
            return ~(values[self.scores] > MASKED)
        return operator_masks.masked(self.operator, values)

    def noise(self, lacking: np.ndarray | None) -> np.ndarray:
        """What to add to the result: something in the rows that are `lacking` a key."""
        if lacking is None:
            return np.zeros(1)
        if self.axes == 3 and lacking.ndim == 3:  # heads are not apart: (batch, queries, width)
            lacking = lacking.any(axis=1)
        return lacking[..., None] * np.random.default_rng(3).normal(size=(*lacking.shape, 1))


class _Exposed:
    """A session on `proto` that gives out scores and outputs, or conditions of what branches."""

    def __init__(
        self, proto: onnx.ModelProto, folder: Path, sites: Sequence[graph.Site] | None
    ) -> None:
        self.conditions = [
            (node.name or node.output[0], node.input[0]) for node in _branchings(proto)
        ]
        given = {tensor.name for tensor in (*proto.graph.input, *proto.graph.initializer)}
        self.outputs = [tensor.name for tensor in proto.graph.output if tensor.name not in given]
        self.types: dict[str, np.dtype] = {}  # of what is added
        self.sites = [] if self.conditions else self._expose(proto, sites)
        reads = [name for _, name in self.conditions]
        for site in self.sites:
            reads += operator_masks.reads(site.operator) if site.operator else [site.scores]
        wanted = [name for name in reads if name not in given]
        self.wanted = list(dict.fromkeys([*wanted, *(self.outputs if self.sites else ())]))
        self.given = {
            tensor.name: onnx.numpy_helper.to_array(tensor, str(folder))
            for tensor in proto.graph.initializer
            if tensor.name in reads
        }
        self.session: ort.InferenceSession | None = None
        if self.wanted:
            del proto.graph.output[:]
            proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.wanted)
            del proto.graph.value_info[:]
            self.session = files.session(proto.SerializeToString(), optimise=False, folder=folder)

    def _expose(self, proto: onnx.ModelProto, sites: Sequence[graph.Site] | None) -> list[_Site]:
        """The sites that tell what they mask, each with an input that is added to its result."""
        if sites is None:
            sites = graph.sites(graph.inline(ir.from_proto(proto)))
        makers = {name: node for node in proto.graph.node for name in node.output}
        exposed = []
        for site in sites:
            result = (site.context or site.node).outputs[0]
            node = makers.get(site.node.outputs[0].name)
            if node is None or result.name not in makers or node.op_type == "QLinearSoftmax":
                continue  # in 8 bits a score that is masked is but the lowest that there is
            scores = site.node.inputs[0].name if site.scores else _open(node)
            readable = scores in makers if site.scores else scores or operator_masks.reads(node)
            if readable:
                operator = None if scores else node
                added = self._added(proto, makers[result.name], result)
                exposed.append(_Site(scores, operator, added, _axes(site)))
        return exposed

    def _added(self, proto: onnx.ModelProto, node: onnx.NodeProto, result: ir.Value) -> str:
        """Put an Add of a new input behind `result`; returns the input's name."""
        name = f"{result.name}_added"
        at = next(i for i, other in enumerate(proto.graph.node) if other is node or other == node)
        outputs = [f"{other}_before" if other == result.name else other for other in node.output]
        node.output[:] = outputs
        before = f"{result.name}_before"
        proto.graph.node.insert(at + 1, onnx.helper.make_node("Add", [before, name], [result.name]))
        kind = _type(result)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, int(kind), None))
        self.types[name] = kind.numpy()
        return name

    def masked(self, values: Arrays) -> list[np.ndarray]:
        """For each site, True where a score is masked."""
        return [site.masked(values) for site in self.sites]

    def run(self, arrays: Arrays, lacking: list[np.ndarray] | None = None) -> Arrays:
        """What is given out, by name; with something else in the rows that are `lacking` keys."""
        values = self.given | arrays
        if self.session is not None:
            of_sites = zip(self.sites, lacking or [None] * len(self.sites), strict=True)
            noise = {site.added: site.noise(where) for site, where in of_sites}
            noise = {name: array.astype(self.types[name]) for name, array in noise.items()}
            results = self.session.run(self.wanted, arrays | noise)
            values |= dict(zip(self.wanted, results, strict=True))
        return values


def _spread(scores: np.ndarray) -> float:
    """The median of the standard deviations over the last axis, over what is not masked."""
    kept = scores > MASKED
    count = kept.sum(axis=-1)
    several = count > 1
    if not several.any():
        return 0.0
    numbers = np.where(kept, scores, 0).astype(np.float64)
    mean = numbers.sum(axis=-1) / np.maximum(count, 1)
    apart = np.where(kept, (numbers - mean[..., None]) ** 2, 0).sum(axis=-1)
    return float(np.median(np.sqrt(apart / np.maximum(count, 1))[several]))


def _type(value: ir.Value | None) -> ir.DataType:
    """The float type of a value, or where the graph does not state it, of what it comes from."""
    while value is not None and value.dtype is None and (node := value.producer()) is not None:
        if node.op_type == "Cast":
            return ir.DataType(node.attributes.get_int("to", 1))
        operands = [operand for operand in node.inputs if operand is not None]
        floats = (typed for typed in operands if typed.dtype and typed.dtype.is_floating_point())
        chosen = operands[1:] if node.op_type == "Where" and len(operands) > 1 else operands
        value = next(floats, next(iter(chosen), None))
    return value.dtype if value is not None and value.dtype else ir.DataType.FLOAT


def _axes(site: graph.Site) -> int | None:
    """How many axes the result of a site has, as far as it is known."""
    if site.scores is None and "q_num_heads" in site.node.attributes:
        return 3
    if site.scores is None and site.node.domain == graph.MICROSOFT:
        return 3
    result = (site.context or site.node).outputs[0]
    return len(result.shape) if result.shape is not None else None


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
        branch = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
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
        tensor.name for tensor in inside.initializer
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
    for tensor in (*inside.initializer, *inside.output) if names else ():
        tensor.name = new(tensor.name)


def _open(node: onnx.NodeProto) -> str | None:
    """Have a standard Attention give its masked scores as its fourth output, of the name returned;
    None where the operator is another, or gives scores already."""
    if node.op_type != "Attention" or node.domain not in graph.STANDARD:
        return None
    node.output.extend([""] * (4 - len(node.output)))
    if node.output[3]:
        return None
    node.output[3] = f"{node.output[0]}_scores"
    kept = [attribute for attribute in node.attribute if attribute.name != "qk_matmul_output_mode"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("qk_matmul_output_mode", 2)])
    return node.output[3]
