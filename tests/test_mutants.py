"""Planted faults: `explain` names each that stops a fusion, and each fusion that became wrong."""

import collections

import jsonschema
import onnx
import pytest
from mutants import (
    Mutant,
    Seed,
    attentions,
    expected,
    miss,
    mutants,
    optimised,
    outcome,
    seeds,
    seeds_of_rules,
    watched,
)
from paths import astray, matched
from test_explain import SCHEMA

from helpers import graph

EVERY = 7  # of the mutants, one in so many is tried in each run of the tests
VALID = jsonschema.Draft202012Validator(SCHEMA)
LEAST = 120  # mutants of which something became, in each run


@pytest.fixture(scope="session")
def fused(tmp_path_factory) -> list[Seed]:
    return seeds(tmp_path_factory.mktemp("seeds"))


def test_seeds_fuse(fused, tmp_path):
    for seed in fused:
        onnx.save(seed.proto, tmp_path / "a.onnx")
        for level in seed.opt_levels:
            made = optimised(tmp_path / "a.onnx", seed, level)
            assert attentions(made) == 2
            with watched() as results:  # `explain` changes nothing of what it watches
                seed.explained(tmp_path / "a.onnx", level)
            assert results == [made]


@pytest.fixture(scope="session")
def suggested(tmp_path_factory) -> list[Seed]:
    return seeds_of_rules(tmp_path_factory.mktemp("suggested"))


def test_suggested_rules_fuse_their_seeds(suggested, tmp_path):
    for seed in suggested:
        onnx.save(seed.proto, tmp_path / "a.onnx")
        answer = seed.explained(tmp_path / "a.onnx", 0, parity=True, inputs=seed.inputs)
        assert [site.fused for site in answer.sites] == [True, True], f"{seed.name}: {answer}"
        assert answer.parity.held


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
    parity = {"parity": True, "inputs": mutant.seed.inputs}
    with watched() as results, matched() as concluded:
        answer = mutant.seed.explained(path, level, **parity)
    assert not astray(answer, graph.load(path), concluded), mutant
    came = outcome(results[-1], right, mutant, path.with_suffix(".optimised.onnx"))
    if answer.not_compared and came in ("wrong", "holds"):
        assert "row that has a key" in answer.not_compared  # a mask turned round leaves none
        return "without a key", None
    if came == "wrong" and answer.parity and answer.parity.held and answer.parity.left_out:
        return "without a key", None  # in rows that have one, it holds
    answer = answer.to_json()
    VALID.validate(answer)
    return came, miss(mutant, came, answer)


def test_faults_are_named(fused, tmp_path):
    came_to, misses = missed(fused, tmp_path, EVERY)
    assert not misses, "\n".join(misses)
    assert came_to.total() - came_to[None] >= LEAST
    assert min(came_to[one] for one in ("stops", "wrong", "raises")) >= 8


def test_faults_before_rules_are_named(suggested, tmp_path):
    came_to, misses = missed(suggested, tmp_path, 6 * EVERY)
    assert not misses, "\n".join(misses)
    assert came_to["stops"] >= 2


@pytest.mark.every
def test_every_fault_before_rules_is_named(suggested, tmp_path):
    came_to, misses = missed(suggested, tmp_path, 1)
    print(dict(came_to))
    assert not misses, "\n".join(misses)


@pytest.mark.every
def test_every_fault_is_named(fused, tmp_path):
    came_to, misses = missed(fused, tmp_path, 1)
    print(dict(came_to))
    assert not misses, "\n".join(misses)
