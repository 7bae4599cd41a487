"""Two models on the same rows: whether a difference is more than chance, and how large it could be.

Every function takes numbers by row, in the same order for both models. Right and wrong answers have McNemar's exact test; any
other score has a sign-flip permutation; both have an interval. "Nothing lost" is a claim of its own, non-inferiority: a p-value
above 0.05 does not show it.

The idea to take home: rows on which both models agree carry no information about which is better, however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from minisft.evaluation.distributions import fair_coin_cdf, fair_coin_pmf, normal_quantile
from minisft.evaluation.statistics import (
    DRAWS,
    MIN_TEST_ROWS,
    Floats,
    Interval,
    bootstrap_mean,
    cluster_sums,
    newcombe_paired,
)

POWER = 0.8
_SIGNS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class McNemar:
    """Two-sided p-values on the discordant rows."""

    exact: float
    mid_p: float


def mcnemar(only_a: int, only_b: int) -> McNemar:
    """Exact McNemar test: of the rows that exactly one model got right, is half A's and half B's?

    p = 2 P(X <= min(b, c)) for X ~ Binomial(b + c, 1/2); the mid-p takes off half of the observed probability on both sides.

    Ref: Fagerland et al. 2013, BMC Med. Res. Methodol. 13:91.
    """
    n, least = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return McNemar(1.0, 1.0)
    two_sided = 2 * fair_coin_cdf(least, n)
    return McNemar(min(1.0, two_sided), min(1.0, two_sided - fair_coin_pmf(least, n)))


def permutation_p(
    differences: Sequence[float] | Floats, clusters: Sequence[Hashable] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> float:
    """Two-sided p-value of a mean difference: the share of random signs that give one as large.

    p = (1 + #{|T*| >= |T|}) / (1 + draws), T = sum_i d_i, T* with every sign by a coin.

    Args:
        differences: B - A for each row.
        clusters: of each row; a cluster keeps its rows together.
        draws: of signs.
        seed: decides them.

    Returns:
        a p-value that is never 0.

    Ref: Phipson and Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9(1).
    """
    sums = np.sort(np.abs(cluster_sums(differences, clusters)[0]))  # a random sign takes away which one it had
    observed = abs(float(np.sum(differences)))
    sums = sums[sums > 0]
    rng, step = np.random.default_rng(seed), max(1, _SIGNS_AT_ONCE // max(1, len(sums)))
    tolerance = 1e-9 * float(sums.sum())
    hits = 0
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, (min(step, draws - start), len(sums)), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ sums) >= observed - tolerance).sum())
    return (1 + hits) / (1 + draws)


@dataclass(frozen=True)
class NonInferiority:
    """Is B at most ``margin`` worse than A? ``shown`` iff the lower bound of B - A lies above -margin."""

    margin: float
    lower_bound: float
    level: float

    @property
    def shown(self) -> bool:
        """Whether the claim may be made."""
        return self.lower_bound > -self.margin


@dataclass(frozen=True)
class PairedResult:
    """B - A over ``n`` rows. ``table`` counts right and wrong rows, for scores that are 0 or 1 only."""

    n: int
    num_clusters: int
    mean_a: float
    mean_b: float
    difference: Interval
    bootstrap: Interval
    table: dict[str, int] | None
    mcnemar: McNemar | None
    permutation: float | None
    detectable: float
    non_inferiority: NonInferiority

    @property
    def p_value(self) -> float | None:
        """Of the test that decides: McNemar's for 0 and 1 without clusters, else the permutation's; None under 20 rows."""
        return self.mcnemar.exact if self.mcnemar is not None and self.num_clusters == self.n else self.permutation


def compare_paired(
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    margin: float = 0.02,
    draws: int = DRAWS,
    seed: int = 0,
) -> PairedResult:
    """Everything about B - A on the same rows.

    Args:
        scores_a, scores_b: one score a row, higher is better, in the same order.
        clusters: of each row, for rows that belong together.
        margin: of non-inferiority, chosen before the data.
        draws, seed: of bootstrap and permutation.

    Returns:
        means, difference, tests and what difference could have been found.

    Raises:
        ValueError: no rows, or lists of different length.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"{len(a)} and {len(b)} scores")
    differences, n = b - a, len(a)
    bootstrap = bootstrap_mean(differences, clusters, draws=draws, seed=seed)
    table = _table(a, b)
    num_clusters = n if clusters is None else len(set(clusters))
    by_counts = table is not None and num_clusters == n
    if table is not None and by_counts:
        difference, low = newcombe_paired(**table), newcombe_paired(**table, level=0.9).low
    else:
        difference, low = bootstrap, bootstrap_mean(differences, clusters, level=0.9, draws=draws, seed=seed).low
    enough = num_clusters >= MIN_TEST_ROWS
    return PairedResult(
        n,
        num_clusters,
        float(a.mean()),
        float(b.mean()),
        difference,
        bootstrap,
        table,
        mcnemar(table["only_a"], table["only_b"]) if table is not None and enough else None,
        permutation_p(differences, clusters, draws=draws, seed=seed) if enough else None,
        _detectable(differences, clusters),
        NonInferiority(margin, low, 0.95),
    )


def _table(a: Floats, b: Floats) -> dict[str, int] | None:
    """Rows by who was right, in the order of ``newcombe_paired``; None unless every score is 0 or 1."""
    if not np.isin(a, (0, 1)).all() or not np.isin(b, (0, 1)).all():
        return None
    right_a, right_b = a == 1, b == 1
    groups = {
        "both": right_a & right_b,
        "only_a": right_a & ~right_b,
        "only_b": ~right_a & right_b,
        "neither": ~right_a & ~right_b,
    }
    return {name: int(rows.sum()) for name, rows in groups.items()}


def _detectable(differences: Floats, clusters: Sequence[Hashable] | None) -> float:
    sums, counts = cluster_sums(differences, clusters)
    centred = sums - counts * differences.mean()
    if clusters is None:
        centred = sums  # the root mean square, which for right and wrong is the discordance of the textbook formula
    return detectable_difference(float((centred**2).sum() / counts.sum()), len(differences))


def detectable_difference(variance: float, n: int, power: float = POWER, level: float = 0.95) -> float:
    """The smallest true difference that a two-sided test finds with ``power``: (z_{1-a/2} + z_power) sqrt(variance / n).

    Args:
        variance: of a row's difference; for right and wrong the discordance, the share of rows that exactly one got right.
        n: rows.
        power: chance to find it.
        level: 1 - the chance of a false alarm.

    Returns:
        a difference in the score's unit.
    """
    return (normal_quantile((1 + level) / 2) + normal_quantile(power)) * math.sqrt(variance / n)


def rows_needed(discordance: float, difference: float, power: float = POWER, level: float = 0.95) -> int:
    """How many rows show this difference? The inverse of ``detectable_difference``.

    Args:
        discordance: share of rows that exactly one model gets right.
        difference: of the two scores, not 0.
        power: chance to find it.
        level: 1 - the chance of a false alarm.

    Returns:
        rows.
    """
    z = normal_quantile((1 + level) / 2) + normal_quantile(power)
    return math.ceil(z * z * discordance / (difference * difference))
