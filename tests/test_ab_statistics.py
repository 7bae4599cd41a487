"""The arithmetic of A/B tests: scipy and statsmodels as oracles, closed forms, and what peeking does, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.judging import ab_statistics as ab

ARMS = st.tuples(st.integers(2, 400), st.integers(2, 400), st.floats(0, 1), st.floats(0, 1))


@pytest.mark.parametrize(("p1", "p2", "n"), [(0.10, 0.12, 3841), (0.10, 0.11, 14751), (0.50, 0.55, 1565)])
def test_sample_sizes_of_the_textbook(p1, p2, n):
    assert ab.sample_size(p1, p2 - p1) == pytest.approx(n, abs=1)
    assert ab.power_of(p1, p2 - p1, n) == pytest.approx(0.8, abs=2e-3)


def test_the_sample_size_has_its_power_by_simulation():
    n, rng = ab.sample_size(0.1, 0.05), np.random.default_rng(0)
    draws = zip(rng.binomial(n, 0.10, 2000).tolist(), rng.binomial(n, 0.15, 2000).tolist(), strict=True)
    assert 0.77 <= np.mean([ab.rates_p(a, n, b, n)[0] <= 0.05 for a, b in draws]) <= 0.83


@pytest.mark.slow
def test_power_is_near_statsmodels():
    """Theirs works on arcsines of the rates, ours on the rates: equal to a point or so."""
    stats = pytest.importorskip("statsmodels.stats")
    from statsmodels.stats.power import NormalIndPower
    from statsmodels.stats.proportion import proportion_effectsize

    assert stats
    theirs = NormalIndPower().power(proportion_effectsize(0.12, 0.10), 3000, 0.05)
    assert ab.power_of(0.10, 0.02, 3000) == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize(("p1", "effect"), [(0.0, 0.1), (1.0, -0.1), (0.95, 0.1), (0.5, 0.0)])
def test_no_sample_size_shows_what_cannot_be(p1, effect):
    with pytest.raises(ValueError, match="rates"):
        ab.sample_size(p1, effect)


@given(st.lists(st.integers(1, 500), min_size=2, max_size=5))
def test_the_split_is_scipys_chi_square(counts):
    stats = pytest.importorskip("scipy.stats")
    assert ab.sample_ratio_p(counts, [1.0] * len(counts)) == pytest.approx(stats.chisquare(counts).pvalue, abs=1e-9)
    uneven = np.arange(1, len(counts) + 1)
    theirs = stats.chisquare(counts, sum(counts) * uneven / uneven.sum()).pvalue
    assert ab.sample_ratio_p(counts, uneven.tolist()) == pytest.approx(theirs, abs=1e-9)


@given(ARMS)
def test_rates_are_fishers_or_the_pooled_z(arms):
    stats = pytest.importorskip("scipy.stats")
    from statsmodels.stats.proportion import proportions_ztest

    n_a, n_b, share_a, share_b = arms
    k_a, k_b = round(n_a * share_a), round(n_b * share_b)
    p, name = ab.rates_p(k_a, n_a, k_b, n_b)
    if name == "pooled z":
        theirs = proportions_ztest([k_b, k_a], [n_b, n_a])[1]
    else:
        theirs = stats.fisher_exact([[k_a, n_a - k_a], [k_b, n_b - k_b]]).pvalue
    assert p == pytest.approx(theirs, abs=1e-8)
    assert p == pytest.approx(ab.rates_p(k_b, n_b, k_a, n_a)[0], abs=1e-9)


def test_rates_choose_fisher_where_few_are_expected():
    assert ab.rates_p(1, 30, 4, 30)[1] == "Fisher exact"
    assert ab.rates_p(40, 300, 60, 300)[1] == "pooled z"


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.lists(st.floats(-50, 50), min_size=2, max_size=30))
def test_welch_is_scipys(a, b):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array(a), np.array(b)
    ours = ab.welch(a, b)
    if ours.standard_error < 1e-6:
        return
    theirs = stats.ttest_ind(b, a, equal_var=False)
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=1e-7)
    low, high = theirs.confidence_interval()
    assert (ours.difference.low, ours.difference.high) == pytest.approx((low, high), rel=1e-5, abs=1e-7)
    one_sided = stats.ttest_ind(b - 1.5, a, equal_var=False, alternative="greater").pvalue
    assert ours.p_above(1.5) == pytest.approx(one_sided, abs=1e-7)


def test_welch_of_constants_and_of_too_few():
    ones = np.ones(5)
    assert ab.welch(ones, ones).p_value == 1.0
    assert ab.welch(ones, 2 * ones).p_value == 0.0
    with pytest.raises(ValueError, match="units"):
        ab.welch(ones[:1], ones)


def test_relative_lift_covers_and_needs_conversions():
    rng = np.random.default_rng(3)
    draws = zip(rng.binomial(800, 0.1, 2000).tolist(), rng.binomial(800, 0.13, 2000).tolist(), strict=True)
    lifts = [ab.relative_lift(a, 800, b, 800) for a, b in draws]
    assert 0.935 <= np.mean([lift.low <= 0.3 <= lift.high for lift in lifts]) <= 0.965
    assert ab.relative_lift(0, 10, 3, 10) is None


@pytest.mark.slow
def test_bootstrap_difference_is_near_welch_for_many_units():
    rng = np.random.default_rng(4)
    a, b = rng.normal(1, 2, 3000), rng.normal(1.2, 3, 2000)
    boot, t = ab.bootstrap_difference(a, b), ab.welch(a, b).difference
    assert (boot.estimate, boot.low, boot.high) == pytest.approx((t.estimate, t.low, t.high), abs=0.01)


@given(st.floats(-0.95, 0.95), st.integers(0, 2**32 - 1))
def test_cuped_keeps_the_mean_and_leaves_one_minus_rho_squared_of_the_variance(rho, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=60)
    y = rho * x + math.sqrt(1 - rho * rho) * rng.normal(size=60) + 3
    adjusted, r = ab.cuped(y, x), np.corrcoef(x, y)[0, 1]
    assert adjusted.mean() == pytest.approx(y.mean())
    assert adjusted.var() == pytest.approx(y.var() * (1 - r * r))
    assert (ab.cuped(y, np.ones(60)) == y).all()


# --- looking before the end


def test_the_mixture_ratio_is_the_integral_that_it_is_a_closed_form_of():
    integrate = pytest.importorskip("scipy.integrate")
    stats = pytest.importorskip("scipy.stats")
    d, v, tau = 0.3, 0.02, 0.15
    density = stats.norm(0, math.sqrt(v))
    mixture = integrate.quad(lambda e: stats.norm.pdf(d, e, math.sqrt(v)) * stats.norm.pdf(e, 0, tau), -3, 3)[0]
    assert ab.mixture_ratio(d, v, tau) == pytest.approx(mixture / density.pdf(d), rel=1e-8)
    assert ab.mixture_ratio(0.3, 0.0, tau) == 1.0


@given(st.floats(-1, 1), st.floats(1e-6, 1), st.floats(1e-3, 1))
def test_the_interval_leaves_out_zero_exactly_when_the_test_rejects(d, v, tau):
    interval, ratio = ab.always_valid_interval(d, v, tau), ab.mixture_ratio(d, v, tau)
    if abs(ratio * 0.05 - 1) > 1e-6:
        assert (interval.low > 0 or interval.high < 0) == (ratio > 20)


def looks_of(rng, p_a, p_b, n, looks):
    a, b = (rng.random(n) < p_a).astype(float), (rng.random(n) < p_b).astype(float)
    return np.split(a, looks), np.split(b, looks)


@pytest.mark.slow
def test_peeking_deceives_the_fixed_test_and_not_the_sequential_one():
    """No effect, 20 looks: 25 % false alarms at a fixed p < 0.05, at most 5 % always-valid, and its interval covers."""
    rng, runs, fooled, fooled_sequential, missed = np.random.default_rng(11), 1500, 0, 0, 0
    for _ in range(runs):
        a, b = looks_of(rng, 0.1, 0.1, 2000, 20)
        k_a, k_b = np.cumsum([x.sum() for x in a]), np.cumsum([x.sum() for x in b])
        fooled += any(
            ab.rates_p(int(x), n, int(y), n)[0] < 0.05 for x, y, n in zip(k_a, k_b, range(100, 2001, 100), strict=True)
        )
        found = ab.sequential(a, b, tau=0.02)
        fooled_sequential += found[-1].p_value <= 0.05
        missed += any(not look.interval.low <= 0 <= look.interval.high for look in found)
    assert 0.21 <= fooled / runs <= 0.29
    assert fooled_sequential / runs <= 0.05
    assert missed / runs <= 0.05


def test_the_sequential_test_finds_an_effect_and_its_p_never_rises():
    rng = np.random.default_rng(12)
    runs = [ab.sequential(*looks_of(rng, 0.10, 0.13, 2000, 20), tau=0.03) for _ in range(200)]
    assert 0.45 <= np.mean([looks[-1].p_value <= 0.05 for looks in runs]) <= 0.70
    for looks in runs:
        p_values = [look.p_value for look in looks]
        assert p_values == sorted(p_values, reverse=True)
        assert (looks[-1].n_a, looks[-1].n_b) == (2000, 2000)
