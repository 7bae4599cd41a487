"""The arithmetic of an A/B test: how many units, whether the split is sound, how large the effect is, when one may look.

Functions of counts and of one number a unit; nothing here reads files or decides. B - A everywhere.

The idea to take home: a p-value of a fixed horizon is right for one look, at the end. Looking twenty times on the way and
stopping at the first p < 0.05 is wrong one time in four; the always-valid test pays for the freedom to look with some power.

Ref: Johari et al. 2015, arXiv:1512.04922 (always-valid inference); Fabijan et al. 2019, KDD (sample-ratio mismatch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minisft.evaluation.distributions import chi_square_tail, fisher_exact, normal_quantile, normal_tail, t_quantile, t_tail
from minisft.evaluation.statistics import DRAWS, Floats, Interval, resampled_means

SPLIT_ALPHA = 0.001  # below it the split is called broken
MIN_EXPECTED = 5.0  # of a cell, for the normal approximation


def sample_size(baseline: float, effect: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Units an arm to find a change of a rate from p1 = ``baseline`` to p2 = p1 + ``effect``.

    n = [z_{1-a/2} sqrt(2 p (1-p)) + z_power sqrt(p1 (1-p1) + p2 (1-p2))]^2 / effect^2, p = (p1 + p2) / 2

    Args:
        baseline: rate of A, in (0, 1).
        effect: absolute, not 0; p2 in (0, 1) too.
        alpha: chance of a false alarm, two-sided.
        power: chance to find the effect.

    Returns:
        units of one arm.

    Raises:
        ValueError: a rate outside (0, 1), or no effect.

    Ref: Fleiss, Levin, Paik 2003, "Statistical Methods for Rates and Proportions", 4.14, without continuity correction.
    """
    p1, p2 = baseline, baseline + effect
    if not (0 < p1 < 1 and 0 < p2 < 1) or effect == 0:
        raise ValueError(f"rates {p1:g} and {p2:g}")
    p = (p1 + p2) / 2
    null = normal_quantile(1 - alpha / 2) * math.sqrt(2 * p * (1 - p))
    other = normal_quantile(power) * math.sqrt(p1 * (1 - p1) + p2 * (1 - p2))
    return math.ceil((null + other) ** 2 / effect**2)


def power_of(baseline: float, effect: float, n: int, *, alpha: float = 0.05) -> float:
    """Chance that a two-sided test of a rate finds ``effect`` with ``n`` units an arm.

    Args:
        baseline: rate of A.
        effect: absolute.
        n: units of one arm.
        alpha: chance of a false alarm.

    Returns:
        a probability; the chance of a finding in the wrong direction is left out.
    """
    p1, p2 = baseline, baseline + effect
    p = (p1 + p2) / 2
    z = abs(effect) * math.sqrt(n) - normal_quantile(1 - alpha / 2) * math.sqrt(2 * p * (1 - p))
    return normal_tail(-z / math.sqrt(p1 * (1 - p1) + p2 * (1 - p2)))


def sample_ratio_p(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Chi-square p-value of the units of each arm against the planned shares; below 0.001 nothing else is to be believed."""
    total, planned = sum(counts), sum(shares)
    expected = [total * share / planned for share in shares]
    return chi_square_tail(sum((k - e) ** 2 / e for k, e in zip(counts, expected, strict=True)), len(counts) - 1)


def rates_p(k_a: int, n_a: int, k_b: int, n_b: int) -> tuple[float, str]:
    """Two-sided p-value of two rates: pooled z, or Fisher's exact test where a cell expects fewer than 5.

    Args:
        k_a, k_b: conversions.
        n_a, n_b: units.

    Returns:
        the p-value and the name of the test.
    """
    pooled = (k_a + k_b) / (n_a + n_b)
    if min(n_a, n_b) * min(pooled, 1 - pooled) < MIN_EXPECTED:
        return fisher_exact(k_a, n_a, k_b, n_b), "Fisher exact"
    z = (k_b / n_b - k_a / n_a) / math.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    return min(1.0, 2 * normal_tail(abs(z))), "pooled z"


def relative_lift(k_a: int, n_a: int, k_b: int, n_b: int, level: float = 0.95) -> Interval | None:
    """p_b / p_a - 1 by the delta method on its logarithm; None when an arm has no conversion.

    Args:
        k_a, k_b: conversions.
        n_a, n_b: units.
        level: of confidence.

    Returns:
        the lift and its bounds.
    """
    if k_a == 0 or k_b == 0:
        return None
    log_ratio = math.log((k_b / n_b) / (k_a / n_a))
    half = normal_quantile((1 + level) / 2) * math.sqrt((1 - k_a / n_a) / k_a + (1 - k_b / n_b) / k_b)
    return Interval(math.expm1(log_ratio), math.expm1(log_ratio - half), math.expm1(log_ratio + half))


@dataclass(frozen=True)
class Welch:
    """Difference of two means B - A with unequal variances."""

    difference: Interval
    p_value: float
    standard_error: float
    degrees: float

    def p_above(self, limit: float) -> float:
        """One-sided p-value of the claim that the true difference lies above ``limit``."""
        if self.standard_error == 0:
            return 0.0 if self.difference.estimate > limit else 1.0
        return t_tail((self.difference.estimate - limit) / self.standard_error, self.degrees)


def welch(a: Floats, b: Floats, level: float = 0.95) -> Welch:
    """Welch's t-test of two means.

    Args:
        a, b: one number a unit; at least two units each.
        level: of confidence.

    Returns:
        difference, p-value and what they came from.

    Raises:
        ValueError: fewer than two units in an arm.

    Ref: Welch 1947, Biometrika 34(1-2).
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} units")
    part_a, part_b = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    difference, error = float(b.mean() - a.mean()), math.sqrt(part_a + part_b)
    if error == 0:
        return Welch(Interval(difference, difference, difference), float(difference == 0), 0.0, len(a) + len(b) - 2.0)
    share = part_a / (part_a + part_b)
    degrees = 1 / (share**2 / (len(a) - 1) + (1 - share) ** 2 / (len(b) - 1))
    half = t_quantile((1 + level) / 2, degrees) * error
    p = min(1.0, 2 * t_tail(abs(difference) / error, degrees))
    return Welch(Interval(difference, difference - half, difference + half), p, error, degrees)


def bootstrap_difference(a: Floats, b: Floats, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Percentile bootstrap of mean(b) - mean(a), each arm resampled by unit.

    Args:
        a, b: one number a unit.
        level: of confidence.
        draws: resampled differences.
        seed: decides them.

    Returns:
        the difference and its bounds.
    """
    means = resampled_means(b, np.ones_like(b), draws, 2 * seed + 1) - resampled_means(a, np.ones_like(a), draws, 2 * seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(b.mean() - a.mean()), float(low), float(high))


def cuped(values: Floats, covariate: Floats) -> Floats:
    """Values less what a covariate from before the test explains: y - theta (x - mean x), theta = cov(x, y) / var(x).

    The mean stays; the variance becomes (1 - rho^2) times itself.

    Ref: Deng et al. 2013, WSDM.
    """
    centred = covariate - covariate.mean()
    spread = float(centred @ centred)
    return values if spread == 0 else values - float(centred @ values) / spread * centred


# --- looking before the end


def mixture_ratio(difference: float, variance: float, tau: float) -> float:
    """The likelihood ratio of N(0, tau^2) effects against none, given an estimate with this variance.

    Lambda = sqrt(V / (V + tau^2)) exp(d^2 tau^2 / (2 V (V + tau^2)))

    Args:
        difference: d, the estimate.
        variance: V, of the estimate; 0, of no data, gives 1.
        tau: size of the effects one expects, fixed before the data.

    Returns:
        the ratio; under no effect it passes 1/alpha at any time with a chance of at most alpha.

    Ref: Johari et al. 2015, arXiv:1512.04922, eq. 6.
    """
    if variance <= 0:
        return 1.0
    spread = variance + tau * tau
    exponent = difference * difference * tau * tau / (2 * variance * spread)
    return math.sqrt(variance / spread) * math.exp(min(exponent, 700.0))


def always_valid_interval(difference: float, variance: float, tau: float, level: float = 0.95) -> Interval:
    """An interval that holds at every look at once.

    d +- sqrt(2 V (V + tau^2) / tau^2 [ln(1/alpha) + ln((V + tau^2) / V) / 2])

    Args:
        difference: d, the estimate.
        variance: V, of the estimate.
        tau: size of the effects one expects, fixed before the data.
        level: of confidence, over all looks together.

    Returns:
        the estimate and its bounds; without any variance they are infinite.
    """
    if variance <= 0:
        return Interval(difference, -math.inf, math.inf)
    spread = variance + tau * tau
    log_term = math.log(1 / (1 - level)) + math.log(spread / variance) / 2
    half = math.sqrt(2 * variance * spread / (tau * tau) * log_term)
    return Interval(difference, difference - half, difference + half)


@dataclass(frozen=True)
class Look:
    """What was known after so many units: p is the smallest so far, so it never rises."""

    n_a: int
    n_b: int
    interval: Interval
    p_value: float


def sequential(a: Sequence[Floats], b: Sequence[Floats], tau: float, level: float = 0.95) -> list[Look]:
    """The always-valid test at each look.

    Args:
        a, b: for each look, the values that each arm gained since the last one.
        tau: size of the effects one expects, fixed before the data.
        level: of confidence.

    Returns:
        one entry a look; the effect is shown at the first with p <= 1 - level.
    """
    looks: list[Look] = []
    totals_a, totals_b, smallest = np.zeros(3), np.zeros(3), 1.0
    for new_a, new_b in zip(a, b, strict=True):
        totals_a, totals_b = totals_a + _moments(new_a), totals_b + _moments(new_b)
        if min(totals_a[0], totals_b[0]) < 2:
            continue
        difference = totals_b[1] / totals_b[0] - totals_a[1] / totals_a[0]
        variance = _mean_variance(totals_a) + _mean_variance(totals_b)
        smallest = min(smallest, 1 / mixture_ratio(difference, variance, tau))
        interval = always_valid_interval(float(difference), variance, tau, level)
        looks.append(Look(int(totals_a[0]), int(totals_b[0]), interval, smallest))
    return looks


def _moments(values: Floats) -> Floats:
    return np.array([len(values), values.sum(), (values * values).sum()])


def _mean_variance(totals: Floats) -> float:
    n, total, squares = totals.tolist()
    return max(0.0, squares / n - (total / n) ** 2) / n
