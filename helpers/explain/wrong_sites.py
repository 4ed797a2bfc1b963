"""Which fused sites compute something else than before: each by itself, on the values around it.

The optimised graph shares most of its tensors with the graph that it came from, by name. Around a
fused operator they cut out a piece, from the tensors that both have above it to one that both have
below. The piece is run on the values that the original graph has there, so that a wrong site does
not spoil the verdict on those after it, and must give what the original has below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import files, graph, parity
from helpers.explain import wrong_values
from helpers.explain.got import rounding
from helpers.explain.pieces import Piece, Values, ValuesOf, alone, around, longer, pieces
from helpers.explain.reasons import Explanation, Verdict
from helpers.feeds import Feed
from helpers.graph import walks

Wrong = dict[int | str, list[str]]
_ELSEWHERE = (
    "by itself, on the original's values, it was not found to be wrong: the fault is elsewhere"
)


def mark(answer: Explanation, whole: parity.Candidate, wrong: Wrong) -> None:
    """Add to `answer` what `find` returned: the comparison, and which sites are wrong."""
    answer.parity = whole
    answer.parity.name = "the optimised graph"
    for site, wanted in wrong.items():
        if isinstance(site, str):  # it fused what is no attention
            answer.sites.append(Verdict(site, None, True, wrong=True, wanted=wanted))
        elif answer.sites[site].fused:
            answer.sites[site].wrong, answer.sites[site].wanted = True, wanted


def find(
    original: files.Opened,
    fused: str | Path,
    cases: list[Feed],
    description: str,
    model: ir.Model | None = None,
    sites: list[graph.Site] | None = None,
    read: files.Opened | None = None,
) -> tuple[parity.Candidate, Wrong]:
    """Compare the model `fused` with the `original`, and say which of its sites are wrong.

    `model` is the graph that was fused, if it has been read, with its `sites`: the `original`, or
    what was `read` in its place, as where it had to be brought to another opset first.

    Returns the comparison of all, and by number in ``graph.sites`` of the `original`, or the name
    of a tensor where an operator stands for what was no site there, what each wrong one wants and
    what it got, in lines. None where parity holds; every fused one where the fault is in none
    alone. Of a model that does not load, those are wrong that have taken away what is read
    elsewhere.
    """
    fused = Path(fused).absolute()
    candidate = _candidate(original, fused)
    whole = parity.compare(original, [candidate], cases, description).candidates[0]
    if whole.held:
        return whole, {}
    proto = onnx.load(fused)
    read = read or original
    if model is None:
        model, sites = read.model.clone(), None  # whose shapes may be inferred
    sites = graph.sites(model) if sites is None else sites
    values_of = partial(around, read.path, named=original.path)
    return whole, _wrong(values_of, fused, proto, model, sites, cases, description, whole.feed)


def _wrong(
    values_of: ValuesOf,
    fused: Path,
    proto: onnx.ModelProto,
    model: ir.Model,
    sites: list[graph.Site],
    cases: list[Feed],
    description: str,
    worst: Feed | None,
) -> Wrong:
    """Which of `sites`, of the `model` that `values_of` runs, are wrong in `fused`, read as
    `proto`; `worst` is the feed on which the whole differs most."""
    all_pieces = pieces(model, proto, sites)
    every = {site for piece in all_pieces for site in piece.sites}
    missing_nodes = _gone(model, proto)
    if missing_nodes or not all_pieces:
        about = _about(sites, all_pieces, missing_nodes) or every
        return dict.fromkeys(about, _taken_away(missing_nodes))
    further = [*longer(model, proto, all_pieces)]
    parts = all_pieces + further
    names = list(dict.fromkeys(name for one in parts for name in (*one.inputs, *one.outputs)))
    values = values_of(names)
    wrong = _wrong_pieces(values, proto, all_pieces, further, cases, description)
    if not wrong:
        line = _elsewhere(proto, fused, names, values, worst)
        return {site: [line] for site in every}
    return wrong_values.told(values_of, proto, model, sites, wrong)


def _wrong_pieces(
    original: Values,
    proto: onnx.ModelProto,
    pieces: list[Piece],
    further: list[Piece],
    cases: list[Feed],
    description: str,
) -> list[tuple[Piece, Feed]]:
    """Those of `pieces`, of the optimised model `proto`, that compute something else than the
    `original` has there, and on what most: on a short feed, if it shows there. None where there
    are no numbers to compare.

    `further` are such with what follows them, for those that are right by themselves.
    """
    outputs = list(dict.fromkeys(name for piece in pieces + further for name in piece.outputs))

    def reference(arrays: parity.Outputs) -> parity.Outputs:
        values = original(arrays)
        return {name: values[name] for name in outputs}

    def wrong(pieces: list[Piece]) -> list[tuple[Piece, Feed]]:
        runs = [_runner(piece, proto, original, outputs) for piece in pieces]
        worst = _differing(reference, runs, cases, description)
        with contextlib.suppress(files.BadInput):  # no numbers to compare on short feeds
            numbers = [*worst]
            on_short = _differing(reference, [runs[i] for i in numbers], short, description)
            worst |= {numbers[i]: feed for i, feed in on_short.items()}
        return [(pieces[i], feed or shortest) for i, feed in worst.items()]

    shortest = min(cases, key=lambda feed: sum(array.size for array in feed.arrays.values()))
    short = [feed for feed in cases if wrong_values.is_short(feed)]
    try:
        found = wrong(pieces)
        told = {site for piece, _ in found for site in piece.sites}
        return found + wrong([piece for piece in further if told.isdisjoint(piece.sites)])
    except files.BadInput:  # no numbers to compare there
        return []


def _differing(
    reference: Values, runs: list[Values], cases: list[Feed], description: str
) -> dict[int, Feed | None]:
    """Which of `runs`, by number, do not hold against the `reference`, and on what they differ
    most; None where they fail."""
    if not runs or not cases:
        return {}
    judged = parity.compare(reference, runs, cases, description).candidates
    return {i: candidate.feed for i, candidate in enumerate(judged) if not candidate.held}


def _elsewhere(
    proto: onnx.ModelProto, fused: Path, names: list[str], original: Values, feed: Feed | None
) -> str:
    """That the fault is at no site, and which of the tensors `names`, of the optimised model
    `proto` in the file `fused`, is the first that is another than in the original."""
    if feed is None:
        return _ELSEWHERE
    given = {value.name for value in proto.graph.input}
    arrays = {name: array for name, array in feed.arrays.items() if name in given}
    wanted, found = original(feed.arrays), around(fused, names)(arrays)
    for node in proto.graph.node:
        for name in {*node.output} & {*names}:
            if not _close(found[name], wanted[name]):
                which = f"{name}, of {node.op_type} {node.name}".rstrip()
                return f"{_ELSEWHERE}; the first tensor that differs is {which}"
    return _ELSEWHERE


def _close(array: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors are the same to within rounding."""
    if array.shape != other.shape:
        return False
    most = rounding(array, other) * np.abs(other).max(initial=0)
    return np.allclose(array, other, 0, most, equal_nan=True)


def _candidate(original: files.Opened, fused: Path) -> parity.Model:
    """The model `fused`, given those inputs of the `original` that it still has."""
    before = {value.name for value in original.model.graph.inputs}
    proto = onnx.load(fused, load_external_data=False)
    after = {value.name for value in proto.graph.input}
    del proto  # it holds the weights
    if not after < before:
        return fused
    session: list[ort.InferenceSession] = []

    def run(arrays: parity.Outputs) -> parity.Outputs:
        if not session:
            session.append(files.session(fused))
        names = [output.name for output in session[0].get_outputs()]
        given = {name: array for name, array in arrays.items() if name in after}
        return dict(zip(names, session[0].run(None, given), strict=True))

    return run


def _gone(model: ir.Model, proto: onnx.ModelProto) -> list[ir.Node]:
    """The nodes of the original graph whose results are read in `proto`, and made no longer."""
    computed = {name for node in proto.graph.node for name in node.output}
    computed |= {value.name for value in (*proto.graph.input, *proto.graph.initializer)}
    read = [name for node in proto.graph.node for name in node.input]
    read += [output.name for output in proto.graph.output]
    makers = {output.name: node for node in model.graph for output in node.outputs}
    return [makers[name] for name in dict.fromkeys(read) if name not in computed and name in makers]


def _taken_away(missing_nodes: list[ir.Node]) -> list[str]:
    return [
        f"{node.op_type} {graph.name(node)}: what it gives is read elsewhere, and made no longer"
        for node in missing_nodes
    ]


def _about(
    sites: list[graph.Site], pieces: list[Piece], missing_nodes: list[ir.Node]
) -> set[int | str]:
    """The sites whose pieces stand for `missing_nodes`, or else the nearest ones above."""
    about = {
        site
        for piece in pieces
        if not piece.stands_for.isdisjoint(missing_nodes)
        for site in piece.sites
    }
    if about:
        return about
    number = {site.context: i for i, site in enumerate(sites) if site.context}
    above = (number[node] for node in walks.upstream(*missing_nodes) if node in number)
    nearest = next(above, None)
    return set() if nearest is None else {nearest}


def _runner(
    piece: Piece,
    proto: onnx.ModelProto,
    original: Values,
    tensors: list[str],
) -> Callable[[parity.Outputs], parity.Outputs]:
    """A candidate that gives `tensors` as the original does, those of the piece by the piece."""
    sessions: list[ort.InferenceSession] = []

    def run(arrays: parity.Outputs) -> parity.Outputs:
        values = original(arrays)
        if not sessions:
            sessions.append(files.session(alone(piece, proto, values).SerializeToString()))
        feed = {name: np.asarray(values[name]) for name in piece.inputs}
        outputs = dict(zip(piece.outputs, sessions[0].run(piece.outputs, feed), strict=True))
        return {name: outputs.get(name, values[name]) for name in tensors}

    return run
