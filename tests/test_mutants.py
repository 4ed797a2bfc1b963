"""Planted faults: `explain` names each that stops a fusion, and each fusion that became wrong."""

import collections

import jsonschema
import onnx
import pytest
from mutants import (
    HEADS,
    WIDTH,
    Mutant,
    Seed,
    attentions,
    expected,
    miss,
    mutants,
    optimised,
    outcome,
    seeds,
    watched,
)
from paths import astray, matched
from test_explain import SCHEMA

from helpers import graph
from helpers.explain import explain

EVERY = 7  # of the mutants, one in so many is tried in each run of the tests
VALID = jsonschema.Draft202012Validator(SCHEMA)
LEAST = 120  # mutants of which something became, in each run


@pytest.fixture(scope="session")
def fused(tmp_path_factory) -> list[Seed]:
    return seeds(tmp_path_factory.mktemp("seeds"))


def test_seeds_fuse(fused, tmp_path):
    for seed in fused:
        onnx.save(seed.proto, tmp_path / "a.onnx")
        options = {"num_heads": HEADS, "hidden_size": WIDTH}
        for level in seed.opt_levels:
            made = optimised(tmp_path / "a.onnx", seed, level)
            assert attentions(made) == 2
            with watched() as results:  # `explain` changes nothing of what it watches
                explain(tmp_path / "a.onnx", seed.model_type, opt_level=level, **options)
            assert results == [made]


def missed(fused: list[Seed], folder, every: int) -> tuple[collections.Counter, list[str]]:
    came_to, misses, number = collections.Counter(), [], 0
    for seed in fused:
        for level in seed.opt_levels:
            for mutant in mutants(seed):
                number += 1
                if number % every == 0:
                    came, why = told(mutant, folder / "mutant.onnx", level)
                    came_to[came] += 1
                    misses += [f"{mutant}, opt_level {level}, {came}: {why}"] if why else []
    return came_to, misses


def told(mutant: Mutant, path, level: int) -> tuple[str | None, str | None]:
    """What became of `mutant`, and what `explain` does not tell of it."""
    right = expected(path, mutant)
    if right is None:
        return None, None
    options = {"num_heads": HEADS, "hidden_size": WIDTH, "opt_level": level}
    parity = {"parity": True, "inputs": mutant.seed.inputs}
    with watched() as results, matched() as concluded:
        answer = explain(path, mutant.seed.model_type, **options, **parity)
    assert not astray(answer, graph.load(path), concluded), mutant
    came = outcome(results[-1], right, mutant, path.with_suffix(".optimised.onnx"))
    if answer.not_compared and came in ("wrong", "holds"):
        assert "row that has a key" in answer.not_compared  # a mask turned round leaves none
        return "without a key", None
    answer = answer.to_json()
    VALID.validate(answer)
    return came, miss(mutant, came, answer)


def test_faults_are_named(fused, tmp_path):
    came_to, misses = missed(fused, tmp_path, EVERY)
    assert not misses, "\n".join(misses)
    assert came_to.total() - came_to[None] >= LEAST
    assert min(came_to[one] for one in ("stops", "wrong", "raises")) >= 8


@pytest.mark.every
def test_every_fault_is_named(fused, tmp_path):
    came_to, misses = missed(fused, tmp_path, 1)
    print(dict(came_to))
    assert not misses, "\n".join(misses)
