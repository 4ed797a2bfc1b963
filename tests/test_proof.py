"""The self-test of the proof: `compare` on inferred inputs finds faults that were planted.

A mutant counts if a feed of the test's own shows a difference above ten times the tolerance; the
others are equal to the graph, for all that one can see. All of them, with the figures:
``pytest tests/test_proof.py -m every -q``.
"""

from __future__ import annotations

import collections
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
        return self.largest > 10

    def __str__(self) -> str:
        outputs = "" if self.factor == 1 else f", outputs × {self.factor:g}"
        return f"{self.study}, {self.route}: {self.kind}, at {self.where}{outputs}: {self.said}"


def _graph(paths: Sequence[Path]) -> ir.Model:
    protos = [onnx.load(path) for path in paths]
    return ir.from_proto(protos[0] if len(protos) == 1 else merge(*protos))


def _mutants(study: Study, paths: Sequence[Path]) -> Iterator[Mutant]:
    own = [one.arrays for one in feeds(study)]
    if not study.merged:
        yield from mutants(graph.load(paths[0]), own)
        return
    yield from of_branches(_graph(paths))
    protos = [onnx.load(path) for path in paths]
    for number, path in enumerate(paths):
        base = graph.load(path)
        names = {value.name for value in base.graph.inputs}
        past = number == 0
        mine = [arrays for arrays in own if arrays["use_cache_branch"][0] == past]
        mine = [{name: arrays[name] for name in arrays if name in names} for arrays in mine]
        for one in mutants(base, mine):
            both = list(protos)
            both[number] = ir.to_proto(one.model)
            where = f"{one.where}, {'with' if past else 'without'} a cache"
            yield Mutant(one.kind, where, ir.from_proto(merge(*both)))


def _run(model: ir.Model, own: Sequence[Own]) -> list[Arrays | None]:
    """Outputs on each feed, None where it fails. Raises where the model does not load."""
    proto = ir.to_proto(model)
    session = files.session(proto.SerializeToString(), optimise=False)
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
            tolerance = TOLERANCE * min(1.0, one.std() or 1.0)
            gap = np.abs(one - other).max()
            most = max(most, np.inf if np.isnan(gap) else gap / tolerance)
    return most


def judge(
    name: str, route: str, folder: Path, chosen: Callable[[int], bool] = lambda number: True
) -> list[Result]:
    """What `compare` finds of the mutants of one architecture by one route.

    The graph itself, the same in other numbers, must hold.
    """
    study = STUDIES[name]
    paths = exported(study, folder, name, route)
    base, own = _graph(paths), feeds(study)
    wanted = _run(base, own)
    assert None not in wanted, f"{name}, {route}: the test's own feeds do not run"
    tried: list[tuple[Mutant, list[float]]] = []
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for number, mutant in enumerate(_mutants(study, paths)):
        if chosen(number):
            try:
                found = _run(mutant.model, own)
            except Exception as error:
                raise AssertionError(f"{name}, {route}: {mutant} does not load: {error}") from error
            tried.append((mutant, [_largest(own, wanted, found, one) for one in FACTORS]))
    results = []
    for which, factor in enumerate(FACTORS):
        reference = work / "reference.onnx"
        ir.save(scaled(base, factor), reference)
        given, description = inferred.infer(reference)
        right = work / "right.onnx"
        models = [_rescaled(study, paths)]
        ir.save(scaled(models[0], factor), right)
        candidates = [work / f"{number}.onnx" for number in range(len(tried))]
        for (mutant, _), path in zip(tried, candidates, strict=True):
            ir.save(scaled(mutant.model, factor), path)
        report = parity.compare(reference, [reference, right, *candidates], given, description)
        for one, what in zip(report.candidates[:2], ("itself", "in other numbers"), strict=True):
            results.append(Result(name, route, what, "", factor, 0.0, not one.held, str(one)))
        for (mutant, largest), one in zip(tried, report.candidates[2:], strict=True):
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
    return results


def _rescaled(study: Study, paths: Sequence[Path]) -> ir.Model:
    models = [rescaled(graph.load(path)) for path in paths]
    if not study.merged:
        return models[0]
    return ir.from_proto(merge(*map(ir.to_proto, models)))
