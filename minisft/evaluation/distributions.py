"""Probabilities of the distributions that tests and intervals need: normal, Student's t, chi-square, binomial, hypergeometric.

The normal one comes from the standard library, the others from two incomplete functions, in double precision. scipy is the
oracle of the tests and is not needed here.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()
_TINY, _EPS, _MAX_TERMS = 1e-300, 1e-15, 20_000


def normal_quantile(probability: float) -> float:
    """z with P(Z <= z) = ``probability`` for a standard normal Z."""
    return _NORMAL.inv_cdf(probability)


def normal_tail(z: float) -> float:
    """P(Z >= z), right in the far tail too."""
    return math.erfc(z / math.sqrt(2)) / 2


def chi_square_tail(value: float, degrees: int) -> float:
    """P(X >= value) for a chi-square X with ``degrees`` degrees of freedom."""
    return incomplete_gamma_tail(degrees / 2, value / 2)


def incomplete_gamma_tail(a: float, x: float) -> float:
    """The regularized upper incomplete gamma function Q(a, x) = 1 - P(a, x), for ``a`` above 0 and ``x`` at least 0.

    Ref: Abramowitz and Stegun 1964, 6.5.29 (the series, for small x) and 6.5.31 (the continued fraction).
    """
    if x <= 0:
        return 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    return 1 - front * _gamma_series(a, x) if x < a + 1 else front * _gamma_fraction(a, x)


def _gamma_series(a: float, x: float) -> float:
    """sum_n x^n / (a (a+1) ... (a+n))."""
    term = total = 1 / a
    for n in range(1, _MAX_TERMS):
        term *= x / (a + n)
        total += term
        if term < total * _EPS:
            break
    return total


def _gamma_fraction(a: float, x: float) -> float:
    """1 / (x+1-a - 1(1-a) / (x+3-a - 2(2-a) / ...)), by Lentz's method."""
    b = x + 1 - a
    up, down = 1 / _TINY, 1 / b
    value = down
    for n in range(1, _MAX_TERMS):
        d, b = -n * (n - a), b + 2
        down = 1 / ((d * down + b) or _TINY)
        up = (b + d / up) or _TINY
        value *= up * down
        if abs(up * down - 1) < _EPS:
            break
    return value


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b).

    Args:
        a, b: above 0.
        x: in [0, 1].

    Returns:
        a probability.

    Ref: Abramowitz and Stegun 1964, 26.5.8 (the continued fraction), summed by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the mirrored problem converges faster
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _beta_fraction(a, b, x))


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)), with the d of 26.5.8."""
    value, up, down = 1.0, 1.0, 0.0
    for term in range(1, _MAX_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        down = 1 / ((1 + d * down) or _TINY)
        up = (1 + d / up) or _TINY
        value *= up * down
        if abs(up * down - 1) < _EPS:
            break
    return value


def t_tail(t: float, degrees: float) -> float:
    """P(T >= t) for Student's T."""
    tail = incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t)) / 2
    return tail if t >= 0 else 1 - tail


def t_quantile(probability: float, degrees: float) -> float:
    """t with P(T <= t) = ``probability``, by bisection."""
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > 1 - probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 1 - probability else (low, middle)
    return (low + high) / 2


def fair_coin_cdf(k: int, n: int) -> float:
    """P(X <= k) for the number of heads X of ``n`` fair coins."""
    return 0.0 if k < 0 else 1.0 if k >= n else incomplete_beta(n - k, k + 1, 0.5)


def fair_coin_pmf(k: int, n: int) -> float:
    """P(X = k) for the number of heads X of ``n`` fair coins."""
    return math.exp(_log_choose(n, k) - n * math.log(2))


def fisher_exact(k_a: int, n_a: int, k_b: int, n_b: int) -> float:
    """Fisher's exact two-sided p-value for ``k_a`` of ``n_a`` against ``k_b`` of ``n_b``.

    Args:
        k_a, k_b: successes of each arm.
        n_a, n_b: units of each arm.

    Returns:
        the sum of all tables with these margins that are no likelier than the one observed.
    """
    hits, total = k_a + k_b, n_a + n_b
    logs = [
        _log_choose(n_a, k) + _log_choose(n_b, hits - k) - _log_choose(total, hits)
        for k in range(max(0, hits - n_b), min(hits, n_a) + 1)
    ]
    observed = logs[k_a - max(0, hits - n_b)]
    return min(1.0, math.fsum(math.exp(log) for log in logs if log <= observed + 1e-7))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
