"""Page 13: intervals, tests and verdicts against the library's; bugs and wrong answers are seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test

from minisft.evaluation import metrics, paired
from minisft.evaluation.statistics import Interval, bootstrap_mean
from minisft.judging import ab_statistics, gates

PAGE = page("13_judging_in_three_dimensions")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]

counts = st.integers(0, 40)


# ---- contracts -------------------------------------------------------------------------------------------------------


def agrees_wilson(built: Namespace, k: int, n: int) -> None:
    np.testing.assert_allclose(built["wilson"](k, n), metrics.wilson(k / n, n), rtol=1e-12, atol=1e-12)


@given(counts, counts)
def test_wilson_equals_the_library(right: int, wrong: int) -> None:
    agrees_wilson(BUILD, right, right + wrong + 1)


def agrees_mcnemar(built: Namespace, b: int, c: int) -> None:
    assert math.isclose(built["mcnemar"](b, c), paired.mcnemar(b, c).exact, rel_tol=1e-12)


@given(counts, counts)
def test_mcnemar_equals_the_library(b: int, c: int) -> None:
    agrees_mcnemar(BUILD, b, c)


def agrees_bootstrap(built: Namespace, seed: int, num_units: int, sizes: int) -> None:
    """Other draws, the same interval: within a tenth of its width with 4,000 of them."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(num_units), rng.integers(1, sizes + 1, num_units))
    values = rng.normal(rng.normal(0, 2, num_units)[clusters], 1)
    found = built["bootstrap"](values, clusters, 4_000, rng)
    theirs = bootstrap_mean(values, clusters.tolist(), draws=4_000)
    np.testing.assert_allclose(found, (theirs.low, theirs.high), atol=0.1 * (theirs.high - theirs.low))


@pytest.mark.parametrize("seed", range(6))
def test_bootstrap_equals_the_library(seed: int) -> None:
    agrees_bootstrap(BUILD, seed, 20 + 10 * seed, 1 + seed)


def agrees_detectable(built: Namespace, discordance: float, n: int) -> None:
    assert math.isclose(built["detectable"](discordance, n), paired.detectable_difference(discordance, n), rel_tol=1e-6)


@given(st.floats(0.01, 1), st.integers(1, 10_000))
def test_detectable_equals_the_library(discordance: float, n: int) -> None:
    agrees_detectable(BUILD, discordance, n)


def agrees_always_valid(built: Namespace, delta: float, V: float, tau: float, alpha: float) -> None:
    theirs = ab_statistics.always_valid_interval(delta, V, tau, 1 - alpha)
    np.testing.assert_allclose(built["always_valid"](delta, V, tau, alpha), (theirs.low, theirs.high), rtol=1e-9, atol=1e-12)


@given(st.floats(-1, 1), st.floats(1e-6, 0.1), st.floats(1e-3, 0.5), st.floats(0.001, 0.3))
def test_always_valid_equals_the_library(delta: float, V: float, tau: float, alpha: float) -> None:
    agrees_always_valid(BUILD, delta, V, tau, alpha)


def agrees_verdict(built: Namespace, limits: list[float], bounds: list[tuple[float, float]]) -> None:
    names = [f"task.m{i}" for i in range(len(limits))]
    held = gates.judge_gates(
        [gates.Gate(name, limit) for name, limit in zip(names, limits, strict=True)],
        {name: (Interval(0.0, *sorted(pair)), True) for name, pair in zip(names, bounds, strict=True)},
    )
    words, said = built["verdict"](
        dict(zip(names, limits, strict=True)), {name: sorted(pair) for name, pair in zip(names, bounds, strict=True)}
    )
    assert words == {g.gate.name: g.status for g in held}
    assert said == gates.verdict_of(held)


small = st.sampled_from([-0.1, -0.05, 0.0, 0.05, 0.1])


@given(st.lists(st.tuples(small, st.tuples(small, small)), min_size=1, max_size=4))
def test_verdict_equals_the_library(drawn: list[tuple[float, tuple[float, float]]]) -> None:
    agrees_verdict(BUILD, [limit for limit, _ in drawn], [bounds for _, bounds in drawn])


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    for k in (0, 1, 30, 59, 60):
        agrees_wilson(built, k, 60)
    for b, c in ((0, 0), (1, 1), (3, 12), (12, 3), (0, 6)):
        agrees_mcnemar(built, b, c)
    agrees_bootstrap(built, 0, 30, 8)
    agrees_detectable(built, 0.2, 60)
    agrees_always_valid(built, 0.02, 1e-4, 0.03, 0.1)
    for limits, bounds in (([0.0], [(0.0, 1.0)]), ([0.0], [(-1.0, 0.0)]), ([0.0], [(-2.0, -1.0)])):
        agrees_verdict(built, limits, bounds)
    agrees_verdict(built, [0.0, 0.0], [(-1.0, 1.0), (-2.0, -1.0)])
    agrees_verdict(built, [0.0, 0.0], [(-1.0, 1.0), (1.0, 2.0)])


MUTANTS = [
    ("Wald's interval", "p * (1 - p) / n + spread / (4 * n)", "p * (1 - p) / n"),
    ("the centre is the rate", "(p + spread / 2 - half)", "(p - half)"),
    ("only the upper bound is shrunk", "max(0, (p + spread / 2 - half) / (1 + spread))", "max(0, p + spread / 2 - half)"),
    ("one-sided", "min(1, 2 * below)", "min(1, below)"),
    ("not capped", "min(1, 2 * below)", "2 * below"),
    ("the larger count", "range(min(b, c) + 1)", "range(max(b, c) + 1)"),
    ("the observed count is left out", "range(min(b, c) + 1)", "range(min(b, c))"),
    ("rows instead of units", "np.unique(clusters, return", "np.unique(np.arange(len(values)), return"),
    ("a mean of means", "sums[drawn].sum(1) / sizes[drawn].sum(1)", "(sums / sizes)[drawn].mean(1)"),
    ("a 90 % interval", "[0.025, 0.975]", "[0.05, 0.95]"),
    ("half the units are drawn", "(draws, len(sums))", "(draws, len(sums) // 2)"),
    ("no power", "(Z + Z80)", "Z"),
    ("no root", "math.sqrt(discordance / n)", "(discordance / n)"),
    ("the mixture is forgotten", "np.log((V + tau**2) / V) / 2", "0"),
    ("without its half", "np.log((V + tau**2) / V) / 2", "np.log((V + tau**2) / V)"),
    ("without its two", "np.sqrt(2 * V", "np.sqrt(V"),
    ("the estimate decides", "low >= limit", "(low + high) / 2 >= limit"),
    ("a bound on the limit is not met", "low >= limit", "low > limit"),
    ("not shown is failed", "else \"failed\" if high < limit else", "else \"failed\" if low < limit else"),
    ("one failed gate is overlooked", "\"HOLD\" if \"failed\" in said else", "\"HOLD\" if said == {\"failed\"} else"),
]  # fmt: skip


def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "rows_needed": [
        (lambda d, gain: 7.85 * d / gain**2, "whole number"),
        (lambda d, gain: math.ceil(1.959964**2 * d / gain**2), "the power is missing"),
        (lambda d, gain: math.ceil(15.7 * d / gain * 5), "four times the rows"),
        (lambda d, gain: math.floor(2.801585**2 * d / gain**2), "round up"),
        (lambda d, gain: math.ceil(3.5**2 * d / gain**2), "fewer rows would do"),
        (lambda d, gain: 157, "a smaller gain needs more rows"),
    ],
    "leaked": [
        (lambda train, test: list(range(len(test))), "no test row occurs"),
        (lambda train, test: [text for text in test if text in train], "position in test"),
        (lambda train, test: [i for i, text in enumerate(test) if text in train], "capitals"),
        (lambda train, test: [i for i, t in enumerate(test) if t.lower() in [x.lower() for x in train]], "white space"),
        (
            lambda train, test: [
                i for i, t in enumerate(test) if any(_plain(t) in _plain(x) or _plain(x) in _plain(t) for x in train)
            ],
            "a part of a prompt",
        ),
        (lambda train, test: [i for i, t in enumerate(test) if _plain(t) in map(_plain, train)][:1], "all positions"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


@given(st.floats(0.05, 0.6), st.floats(0.01, 0.3))
def test_the_solution_of_rows_needed_is_the_librarys(discordance: float, gain: float) -> None:
    solution = next(exercise.solution for exercise in PAGE.exercises() if exercise.name == "rows_needed")
    assert abs(solution(discordance, gain) - paired.rows_needed(discordance, gain)) <= 1
