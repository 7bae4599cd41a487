"""Intervals and tests: scipy and statsmodels as oracles, closed forms, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.evaluation import distributions as dist
from minisft.evaluation.metrics import wilson
from minisft.evaluation.paired import (
    compare_paired,
    detectable_difference,
    mcnemar,
    permutation_p,
    rows_needed,
)
from minisft.evaluation.statistics import (
    bootstrap_mean,
    bootstrap_metric,
    holm,
    newcombe_interval,
    newcombe_paired,
    two_level_bootstrap,
    wilson_interval,
)

COUNTS = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)).filter(any)


# --- distributions


@given(st.floats(0.05, 200), st.floats(0.05, 200), st.floats(0, 1))
def test_incomplete_beta_is_scipys(a, b, x):
    special = pytest.importorskip("scipy.special")
    assert dist.incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), abs=1e-10)


@pytest.mark.slow
@given(st.floats(-40, 40), st.floats(1, 500))
def test_tails_are_scipys(t, degrees):
    stats = pytest.importorskip("scipy.stats")
    assert dist.t_tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=1e-9, abs=1e-12)
    assert dist.normal_tail(t / 4) == pytest.approx(stats.norm.sf(t / 4), rel=1e-12)
    assert dist.chi_square_tail(abs(t), 3) == pytest.approx(stats.chi2.sf(abs(t), 3), rel=1e-9)


@given(st.floats(0.001, 0.999), st.floats(1, 200))
def test_a_quantile_inverts_its_tail(p, degrees):
    assert 1 - dist.t_tail(dist.t_quantile(p, degrees), degrees) == pytest.approx(p, abs=1e-9)


# --- shares


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_is_statsmodels(n, share):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    k = round(share * n)
    ours, theirs = wilson_interval(k, n), proportion.proportion_confint(k, n, method="wilson")
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=1e-9)
    assert wilson(k / n, n) == pytest.approx(theirs, abs=1e-7)


def test_wilson_at_the_ends():
    """The figures that a report of 60 questions is read with."""
    assert wilson_interval(0, 60).high == pytest.approx(0.0602, abs=5e-5)
    assert wilson_interval(56, 60).low == pytest.approx(0.8407, abs=5e-5)
    assert wilson_interval(60, 60).high == 1.0


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_newcombe_is_statsmodels(n_a, n_b, share_a, share_b):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    k_a, k_b = round(share_a * n_a), round(share_b * n_b)
    ours = newcombe_interval(k_a, n_a, k_b, n_b)
    theirs = proportion.confint_proportions_2indep(k_b, n_b, k_a, n_a, method="newcomb", compare="diff")
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=1e-9)


@given(COUNTS)
def test_newcombe_paired_mirrors_and_contains_the_difference(counts):
    both, only_a, only_b, neither = counts
    ours, mirrored = newcombe_paired(*counts), newcombe_paired(both, only_b, only_a, neither)
    assert -1 <= ours.low <= ours.estimate + 1e-12
    assert ours.estimate - 1e-12 <= ours.high <= 1
    assert (ours.low, ours.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-12)


def covered(intervals, truth):
    return np.mean([i.low - 1e-12 <= truth <= i.high + 1e-12 for i in intervals])


@pytest.mark.slow
def test_intervals_of_shares_cover():
    """95 % intervals hold the truth in about 95 % of 3 000 simulated evaluations; counts are discrete, so some n cover more."""
    rng = np.random.default_rng(1)
    for n, p in ((60, 0.93), (150, 0.5), (20, 0.3)):
        assert 0.93 <= covered([wilson_interval(k, n) for k in rng.binomial(n, p, 3000)], p) <= 0.985
    draws = zip(rng.binomial(200, 0.1, 3000), rng.binomial(300, 0.14, 3000), strict=True)
    assert 0.935 <= covered([newcombe_interval(a, 200, b, 300) for a, b in draws], 0.04) <= 0.97
    for cells in ((0.6, 0.05, 0.15, 0.2), (0.85, 0.05, 0.05, 0.05)):
        tables = rng.multinomial(100, cells, 3000)
        assert 0.935 <= covered([newcombe_paired(*t.tolist()) for t in tables], cells[2] - cells[1]) <= 0.985


# --- bootstrap


def test_bootstrap_is_scipys_up_to_its_draws():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).gamma(1.0, size=80)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1))
    ours = bootstrap_mean(values)
    assert ours.estimate == pytest.approx(values.mean())
    spread = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * spread)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * spread)


@pytest.mark.parametrize("size", [40, 300])  # few different clusters are drawn as counts, many one by one
def test_bootstrap_ignores_the_order_and_mirrors(size):
    rng = np.random.default_rng(3)
    values, clusters = rng.normal(0.1, 1, size), rng.integers(0, size, size).tolist()
    order = rng.permutation(size)
    ours = bootstrap_mean(values, clusters, draws=500)
    again = bootstrap_mean(values[order], [clusters[i] for i in order], draws=500)
    mirrored = -bootstrap_mean(-values, clusters, draws=500)
    for other in (again, mirrored):
        assert (ours.estimate, ours.low, ours.high) == pytest.approx((other.estimate, other.low, other.high), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [lambda rng: rng.random(60) < 0.7, lambda rng: rng.exponential(1.0, 60)])
def test_the_bootstrap_covers(draw):
    rng = np.random.default_rng(5)
    truth = 0.7 if draw(rng).dtype == bool else 1.0
    intervals = [bootstrap_mean(draw(rng).astype(float), draws=400, seed=i) for i in range(800)]
    assert 0.90 <= covered(intervals, truth) <= 0.97


@pytest.mark.slow
def test_with_clusters_the_cluster_bootstrap_covers_and_the_row_bootstrap_does_not():
    rng = np.random.default_rng(7)
    by_row, by_cluster = [], []
    for seed in range(300):
        effects = np.repeat(rng.normal(0, 1, 40), 10)
        values, clusters = effects + rng.normal(0, 1, 400), np.repeat(np.arange(40), 10).tolist()
        by_row.append(bootstrap_mean(values, draws=300, seed=seed))
        by_cluster.append(bootstrap_mean(values, clusters, draws=300, seed=seed))
    assert covered(by_cluster, 0.0) >= 0.91
    assert covered(by_row, 0.0) <= 0.70


def test_copies_of_a_file_do_not_narrow_a_clustered_interval():
    values = np.random.default_rng(2).random(50)
    once = bootstrap_mean(values, list(range(50)))
    twice = bootstrap_mean(np.tile(values, 2), list(range(50)) * 2)
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high))
    copied = bootstrap_mean(np.tile(values, 2))
    assert copied.high - copied.low < 0.8 * (once.high - once.low)


@pytest.mark.slow
def test_bootstrap_of_a_metric_is_the_bootstrap_of_a_mean_for_a_mean():
    values = np.random.default_rng(4).random(70)
    metric = bootstrap_metric(lambda rows: float(values[rows].mean()), 70, draws=3000)
    mean = bootstrap_mean(values)
    assert (metric.estimate, metric.low, metric.high) == pytest.approx((mean.estimate, mean.low, mean.high), abs=0.006)


def test_runs_are_a_unit_too():
    """Three runs that differ much: the interval over runs and rows is far wider than over rows, and two runs are refused."""
    rng = np.random.default_rng(6)
    scores = rng.normal(0, 1, (5, 1)) + rng.normal(0, 1, (5, 200))
    both, rows = two_level_bootstrap(scores, draws=2000), bootstrap_mean(scores.mean(0), draws=2000)
    assert both.estimate == pytest.approx(rows.estimate)
    assert both.high - both.low > 3 * (rows.high - rows.low)
    with pytest.raises(ValueError, match="at least 3"):
        two_level_bootstrap(scores[:2])


# --- tests


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_statsmodels(only_a, only_b):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    theirs = tables.mcnemar([[5, only_a], [only_b, 5]], exact=True).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b).exact == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_by_hand():
    """b 3, c 12: 2 (1 + 15 + 105 + 455) / 2^15, and half of the last term less on each side."""
    assert mcnemar(3, 12).exact == pytest.approx(2 * 576 / 2**15)
    assert mcnemar(3, 12).mid_p == pytest.approx((2 * 576 - 455) / 2**15)
    assert mcnemar(0, 0).exact == mcnemar(4, 4).exact == mcnemar(4, 4).mid_p == 1.0


def test_permutation_is_every_sign_for_few_rows():
    """Eight rows have 256 signs: the exact share, up to the draws."""
    values = np.array([0.3, -0.1, 0.5, 0.2, 0.4, -0.2, 0.6, 0.1])
    signs = np.array([[1 if bits >> i & 1 else -1 for i in range(8)] for bits in range(256)])
    exact = np.mean(np.abs(signs @ values) >= values.sum() - 1e-12)
    assert permutation_p(values, draws=20_000) == pytest.approx(exact, abs=0.006)
    assert permutation_p(-values) == permutation_p(values)
    assert permutation_p(np.zeros(30)) == 1.0


def test_permutation_of_right_and_wrong_is_mcnemars():
    values = [1.0] * 12 + [-1.0] * 3 + [0.0] * 30
    assert permutation_p(values, draws=20_000) == pytest.approx(mcnemar(3, 12).exact, abs=0.005)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """A claim stands iff every set of claims with it in it falls: the largest, over these sets, of size times smallest p."""
    n = len(p_values)
    sets = [[i for i in range(n) if bits >> i & 1] for bits in range(1, 2**n)]
    closed = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in range(n)]
    assert holm(p_values) == pytest.approx(closed)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


# --- two models on the same rows


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=20, max_size=80), st.booleans())
def test_exchanging_the_models_mirrors_everything(pairs, graded):
    a, b = [x / (1 + i * graded) for i, (x, _) in enumerate(pairs)], [y / (1 + i * graded) for i, (_, y) in enumerate(pairs)]
    one, other = compare_paired(a, b, draws=300), compare_paired(b, a, draws=300)
    assert one.difference.estimate == pytest.approx(-other.difference.estimate)
    assert (one.difference.low, one.difference.high) == pytest.approx((-other.difference.high, -other.difference.low), abs=1e-9)
    assert (one.bootstrap.low, one.bootstrap.high) == pytest.approx((-other.bootstrap.high, -other.bootstrap.low), abs=1e-9)
    assert (one.p_value, one.permutation) == pytest.approx((other.p_value, other.permutation))


def test_a_model_against_itself():
    same = compare_paired([0.0, 1.0] * 20, [0.0, 1.0] * 20)
    assert (same.p_value, same.permutation, same.difference.estimate, same.detectable) == (1.0, 1.0, 0.0, 0.0)
    assert same.table == {"both": 20, "only_a": 0, "only_b": 0, "neither": 20}


def test_too_few_rows_have_an_interval_and_no_test():
    few = compare_paired([0.0] * 19, [1.0] * 19)
    assert few.p_value is None
    assert few.mcnemar is None
    assert few.permutation is None
    assert few.difference.low > 0
    enough = compare_paired([0.0] * 20, [1.0] * 20)
    assert enough.p_value == pytest.approx(2 / 2**20)


@pytest.mark.parametrize(("n", "points"), [(60, 0.16), (150, 0.10), (600, 0.051), (1531, 0.032)])
def test_the_detectable_difference_at_a_discordance_of_a_fifth(n, points):
    assert detectable_difference(0.2, n) == pytest.approx(points, abs=0.003)
    assert rows_needed(0.2, detectable_difference(0.2, n)) == pytest.approx(n, abs=1)


def test_the_detectable_difference_is_found_as_often_as_it_says():
    """McNemar's exact test at the difference that it should find with 80 %."""
    n, discordance, rng = 300, 0.2, np.random.default_rng(0)
    d = detectable_difference(discordance, n)
    tables = rng.multinomial(n, [0.5, (discordance - d) / 2, (discordance + d) / 2, 0.3], 1500)
    power = np.mean([mcnemar(b, c).exact <= 0.05 for _, b, c, _ in tables.tolist()])
    assert 0.70 <= power <= 0.85  # the exact test pays a little for being exact


def test_non_inferiority_at_the_margin_is_claimed_by_chance_in_5_percent():
    n, margin, rng = 400, 0.05, np.random.default_rng(8)
    tables = rng.multinomial(n, [0.6, 0.075 + margin / 2, 0.075 - margin / 2, 0.25], 3000)
    lows = [newcombe_paired(*table, level=0.9).low for table in tables.tolist()]
    assert 0.03 <= np.mean(np.array(lows) > -margin) <= 0.065


def test_nothing_lost_is_not_a_large_p_value():
    """Sixty questions, two lost: no difference shown, and nothing shown to be kept."""
    a = [1.0] * 35 + [0.0] * 25
    b = [1.0] * 33 + [0.0] * 27
    result = compare_paired(a, b, margin=0.02)
    assert result.p_value == pytest.approx(0.5)
    assert not result.non_inferiority.shown
    assert compare_paired(a, b, margin=0.12).non_inferiority.shown


def test_clusters_decide_by_permutation():
    a, b = [0.0] * 100, [1.0] * 10 + [0.0] * 90
    rows, clustered = compare_paired(a, b), compare_paired(a, b, clusters=[i // 10 for i in range(100)])
    assert rows.p_value == pytest.approx(2 / 2**10)
    assert clustered.p_value is None  # ten clusters
    many = compare_paired(a * 3, (b + [0.0] * 200), clusters=[i // 10 for i in range(300)])
    assert many.p_value == 1.0  # one cluster of thirty moved
    assert many.detectable > 2 * compare_paired(a * 3, (b + [0.0] * 200)).detectable
    assert math.isclose(many.difference.estimate, 1 / 30)
