"""The self-test of the proof: `compare` on inferred inputs finds faults that were planted.

A mutant counts if a feed of the test's own shows a difference above ten times the tolerance; the
others are equal to the graph, for all that one can see. All of them, with the figures:
``pytest tests/test_proof.py -m every -q``.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from proof_models import STUDIES, Arrays, Own, Study, compared, exported, feeds, merge
from proof_mutants import Mutant, mutants, of_branches, rescaled, scaled

from helpers import feeds as inferred
from helpers import files, fuse, graph, parity

TOLERANCE = 1e-4
FACTORS = (1.0, 1e-4, 1e3)  # of the outputs
RIGHT = ("itself", "in other numbers")  # no mutants: these must hold
LEAST = 0.98  # of the mutants that count are found


@dataclass(frozen=True)
class Result:
    """What `compare` says of a mutant whose outputs are times `factor`. `largest` is the largest
    difference on the test's own feeds, over the tolerance; `said` is the verdict in words."""

    study: str
    route: str
    kind: str
    where: str
    factor: float
    largest: float
    found: bool
    said: str

    @property
    def counts(self) -> bool:
        return self.largest > 10 and self.kind not in RIGHT

    def __str__(self) -> str:
        outputs = "" if self.factor == 1 else f", outputs × {self.factor:g}"
        return f"{self.study}, {self.route}: {self.kind}, at {self.where}{outputs}: {self.said}"


def _merged(protos: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    return protos[0] if len(protos) == 1 else merge(*protos)


def _mutants(study: Study, paths: Sequence[Path]) -> Iterator[Mutant]:
    own = [one.arrays for one in feeds(study)]
    if not study.merged:
        yield from mutants(graph.load(paths[0]), own)
        return
    protos = [ir.to_proto(graph.load(path)) for path in paths]
    yield from of_branches(merge(*protos))
    for number, path in enumerate(paths):
        base = graph.load(path)
        names = {value.name for value in base.graph.inputs}
        past = number == 0
        mine = [arrays for arrays in own if arrays["use_cache_branch"][0] == past]
        mine = [{name: arrays[name] for name in arrays if name in names} for arrays in mine]
        for one in mutants(base, mine):

            def make(one: Mutant = one, number: int = number) -> onnx.ModelProto:
                return merge(*protos[:number], one.make(), *protos[number + 1 :])

            where = f"{one.where}, {'with' if past else 'without'} a cache"
            yield Mutant(one.kind, where, make)


def _run(model: onnx.ModelProto, own: Sequence[Own]) -> list[Arrays | None]:
    """Outputs on each feed, None where it fails. Raises where the model does not load."""
    session = files.session(model.SerializeToString(), optimise=False)
    names = [value.name for value in session.get_outputs()]
    found: list[Arrays | None] = []
    for one in own:
        try:
            found.append(dict(zip(names, session.run(None, one.arrays), strict=True)))
        except Exception:  # ONNX Runtime's own types
            found.append(None)
    return found


def _largest(
    own: Sequence[Own], wanted: Sequence[Arrays], found: Sequence[Arrays | None], factor: float
) -> float:
    """The largest difference in rows that have a key, over the tolerance of the feed's output."""
    most = 0.0
    for feed, right, wrong in zip(own, wanted, found, strict=True):
        if wrong is None:
            return np.inf
        for name, where in compared(feed, right).items():
            one = right[name][where].astype(np.float64) * factor
            if not one.size or not np.isfinite(one).all():
                continue
            if wrong[name].shape != right[name].shape:
                return np.inf
            other = wrong[name][where].astype(np.float64) * factor
            # of outputs × 1e3 no more digits are asked for than of those × 1: float32 has no more
            tolerance = TOLERANCE * min(max(1.0, factor), one.std() or 1.0)
            gap = np.abs(one - other).max()
            most = max(most, np.inf if np.isnan(gap) else gap / tolerance)
    return most


def judge(
    name: str,
    route: str,
    folder: Path,
    factors: Sequence[float] = FACTORS,
    chosen: Callable[[Mutant], bool] = lambda mutant: True,
) -> list[Result]:
    """What `compare` says of one architecture by one route: of its mutants, of the graph itself,
    and of the same in other numbers (the kinds in `RIGHT`)."""
    study = STUDIES[name]
    paths = exported(study, folder, name, route)
    base = _merged([ir.to_proto(graph.load(path)) for path in paths])
    right = _merged([rescaled(graph.load(path)) for path in paths])
    own = feeds(study)
    wanted = _run(base, own)
    assert None not in wanted, f"{name}, {route}: the test's own feeds do not run"
    tried: list[tuple[Mutant, onnx.ModelProto, list[float]]] = []
    work = Path(tempfile.mkdtemp(dir=folder))
    for mutant in _mutants(study, paths):
        if chosen(mutant):
            made = mutant.make()
            try:
                found = _run(made, own)
            except Exception as error:
                raise AssertionError(f"{name}, {route}: {mutant} does not load: {error}") from error
            tried.append((mutant, made, [_largest(own, wanted, found, one) for one in factors]))
    results = []
    for which, factor in enumerate(factors):
        reference, other = work / "reference.onnx", work / "other.onnx"
        onnx.save(scaled(base, factor), reference)
        onnx.save(scaled(right, factor), other)
        given, description = inferred.infer(reference)
        candidates = [work / f"{number}.onnx" for number in range(len(tried))]
        for (_, made, _), path in zip(tried, candidates, strict=True):
            onnx.save(scaled(made, factor), path)
        report = parity.compare(reference, [reference, other, *candidates], given, description)
        for one, what in zip(report.candidates[:2], RIGHT, strict=True):
            results.append(Result(name, route, what, "", factor, 0.0, not one.held, str(one)))
        for (mutant, _, largest), one in zip(tried, report.candidates[2:], strict=True):
            results.append(
                Result(
                    name,
                    route,
                    mutant.kind,
                    mutant.where,
                    factor,
                    largest[which],
                    not one.held,
                    f"{largest[which]:.0f} times the tolerance by the test's own feeds;"
                    f" {str(one).partition(': ')[2]}",
                )
            )
    shutil.rmtree(work)
    return results


def figures(results: Sequence[Result]) -> str:
    """How many mutants there are, count and are found, by kind; which are not found, or equal."""
    mine = [one for one in results if one.kind not in RIGHT]
    rows = [("kind", "mutants", "count", "found")]
    for kind in [*dict.fromkeys(one.kind for one in mine), "all"]:
        of_kind = [one for one in mine if kind in (one.kind, "all")]
        counting = [one for one in of_kind if one.counts]
        found = sum(one.found for one in counting)
        rows.append((kind, *map(str, (len(of_kind), len(counting), found))))
    lines = [f"{kind:40}{made:>9}{count:>9}{found:>9}" for kind, made, count, found in rows]
    missed = [one for one in mine if one.counts and not one.found]
    equal = [one for one in mine if not one.counts]
    wrong = [one for one in results if one.kind in RIGHT and one.found]
    for title, some in (("not found", missed), ("equal", equal), ("right, but not held", wrong)):
        lines += ["", f"{title}: {len(some)}", *(f"  {one}" for one in some)]
    return "\n".join(lines)


def check(results: Sequence[Result]) -> None:
    wrong = [str(one) for one in results if one.kind in RIGHT and one.found]
    counting = [one for one in results if one.counts]
    assert not wrong, figures(results)
    assert sum(one.found for one in counting) >= LEAST * len(counting), figures(results)


# Tried in each run of the tests: architecture, route, factor. Every kind of mutant is in one.
SAMPLE = [
    ("Mistral, window 96", "torchscript", 1.0),
    ("T5, 32 buckets", "torchscript", 1e-4),
    ("Qwen3, merged", "torchscript", 1.0),
    ("Gemma 2, window 24", "torchscript", 1e3),
    ("GPT-2", "torchscript", 1e-4),
    ("BERT", "opset23", 1.0),
    ("wav2vec2", "torchscript", 1e3),
]
EVERY = 7  # of their mutants one in so many, and the first of each kind
KINDS = {
    *("mask dropped", "mask inverted", "last key leaked", "scale 5 % off", "soft cap dropped"),
    *("causal offset moved, later key seen", "causal offset moved, own key not seen"),
    *("window removed", "window off by one, wider", "window off by one, narrower"),
    *("bias of queries dropped", "bias of values dropped", "keys' heads repeated as tiles"),
    *("two heads of queries swapped", "two heads of values swapped"),
    *("rotary positions of queries shifted", "far buckets zeroed", "last positions zeroed"),
    *("branches of an If swapped", "then-branch of an If for both"),
    "else-branch of an If for both",
}


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


def test_faults_are_found(exports):
    kinds: set[str] = set()
    number = itertools.count()

    def chosen(mutant: Mutant) -> bool:
        new = mutant.kind not in kinds
        kinds.add(mutant.kind)
        return next(number) % EVERY == 0 or new

    results = []
    for name, route, factor in SAMPLE:
        results += judge(name, route, exports, [factor], chosen)
    assert kinds == KINDS
    check(results)


@pytest.mark.every
def test_every_fault_is_found(exports, capsys):
    results = []
    for name, study in STUDIES.items():
        for route in study.routes:
            results += judge(name, route, exports)
    with capsys.disabled():
        print("\n" + figures(results))
    check(results)


@pytest.mark.parametrize("name", ["BERT", "Mistral, window 96"])
def test_what_fuse_writes_holds(name, exports):
    """Another right version, in which every site is one operator."""
    path = exported(STUDIES[name], exports, name, "torchscript")[0]
    for factor in FACTORS:
        reference, made = exports / "reference.onnx", exports / "fused.onnx"
        onnx.save(scaled(ir.to_proto(graph.load(path)), factor), reference)
        assert fuse.fuse(reference, made).held
        assert parity.compare(reference, [made], *inferred.infer(reference)).held


def test_what_counts():
    """A difference counts in rows that have a key alone, and relative to the output."""
    mask = np.array([[True, True], [True, False]])
    own = Own("right padding", {}, {2: mask})
    right = {"y": np.arange(8, dtype=np.float32).reshape(2, 2, 2) * 1e-4}
    padded, seen = ({"y": right["y"].copy()} for _ in range(2))
    padded["y"][1, 1] += 1
    seen["y"][0, 1] += 1e-6
    assert _largest([own], [right], [padded], 1.0) == 0
    assert 10 < _largest([own], [right], [seen], 1.0) < 100
    assert _largest([own], [right], [None], 1.0) == np.inf
