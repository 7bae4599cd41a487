"""How far a score can be trusted: intervals of shares, of means and of whole metrics, and several tests at once.

Functions of numbers, no model. A share has Wilson's interval; a mean of row scores has the bootstrap's; rows that come from one
document or template are resampled together, as one cluster. Nothing here draws a conclusion.

The idea to take home: the unit that was sampled is the unit that is resampled. Ten copies of a row are one observation.

Ref: Efron and Tibshirani 1993, "An Introduction to the Bootstrap"; Miller 2024, arXiv:2411.00640 (clustered errors in evals).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minisft.common.safe_json import JSON
from minisft.evaluation.distributions import normal_quantile
from minisft.evaluation.metrics import wilson

Floats = npt.NDArray[np.float64]
DRAWS = 10_000
MIN_TEST_ROWS = 20  # fewer give an interval, no p-value
_FEW_KINDS = 200  # so many different clusters are drawn as counts, not one by one
_AT_ONCE = 2_000_000  # indices held at a time


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds."""

    estimate: float
    low: float
    high: float

    def __neg__(self) -> Interval:
        return Interval(-self.estimate, -self.high, -self.low)

    def clipped(self, low: float, high: float) -> Interval:
        """The same with its bounds in [low, high], for what cannot lie elsewhere."""
        return Interval(self.estimate, max(low, self.low), min(high, self.high))

    def to_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}

    @staticmethod
    def from_json(value: JSON) -> Interval:
        """What ``to_json`` wrote; other keys do not matter."""
        numbers = value if isinstance(value, dict) else {}
        return Interval(*(float(str(numbers[name])) for name in ("estimate", "low", "high")))

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """Interval of a share, honest near 0 and 1.

    Args:
        successes: of ``n``; half a success, a tie, is allowed.
        n: at least 1.
        level: of confidence.

    Returns:
        the share and its bounds, all in [0, 1].

    Ref: Wilson 1927, J. Am. Stat. Assoc. 22(158).
    """
    share = float(successes) / n
    low, high = wilson(share, n, normal_quantile((1 + level) / 2))
    return Interval(share, min(share, low), max(share, high))


def newcombe_interval(k_a: float, n_a: int, k_b: float, n_b: int, level: float = 0.95) -> Interval:
    """Interval of p_b - p_a for two groups of different units.

    Args:
        k_a, k_b: successes.
        n_a, n_b: units.
        level: of confidence.

    Returns:
        p_b - p_a and its bounds.

    Ref: Newcombe 1998, Stat. Med. 17, 873-890, method 10.
    """
    a, b = wilson_interval(k_a, n_a, level), wilson_interval(k_b, n_b, level)
    difference = b.estimate - a.estimate
    down = math.hypot(b.estimate - b.low, a.high - a.estimate)
    up = math.hypot(b.high - b.estimate, a.estimate - a.low)
    return Interval(difference, difference - down, difference + up)


def newcombe_paired(both: int, only_a: int, only_b: int, neither: int, level: float = 0.95) -> Interval:
    """Interval of p_b - p_a when the same rows were judged under a and under b.

    Args:
        both, only_a, only_b, neither: rows that are right under both, one or none.
        level: of confidence.

    Returns:
        p_b - p_a and its bounds.

    Ref: Newcombe 1998, Stat. Med. 17, 2635-2650, method 10.
    """
    n = both + only_a + only_b + neither
    a, b = wilson_interval(both + only_a, n, level), wilson_interval(both + only_b, n, level)
    phi = _paired_correlation(both, only_a, only_b, neither)
    down_b, up_b = b.estimate - b.low, b.high - b.estimate
    down_a, up_a = a.estimate - a.low, a.high - a.estimate
    down = math.sqrt(max(0.0, down_b**2 - 2 * phi * down_b * up_a + up_a**2))
    up = math.sqrt(max(0.0, up_b**2 - 2 * phi * up_b * down_a + down_a**2))
    difference = (only_b - only_a) / n
    return Interval(difference, max(-1.0, difference - down), min(1.0, difference + up))


def _paired_correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Phi of the table, less Newcombe's continuity correction where it is positive; 0 if a margin is empty."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    product, n = both * neither - only_a * only_b, both + only_a + only_b + neither
    return (max(0.0, product - n / 2) if product > 0 else float(product)) / math.sqrt(margins)


# --- bootstrap


def cluster_sums(values: Sequence[float] | Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """(sum, number of rows) of each cluster; without ``clusters`` every row is its own."""
    rows = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return rows, np.ones_like(rows)
    numbers: dict[Hashable, int] = {}
    of_row = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    sums: Floats = np.bincount(of_row, rows, len(numbers)).astype(np.float64)
    return sums, np.bincount(of_row, minlength=len(numbers)).astype(np.float64)


def bootstrap_mean(
    values: Sequence[float] | Floats,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean of rows.

    The order of the rows changes nothing, and the interval of -values is the mirrored one.

    Args:
        values: one number a row.
        clusters: of each row; whole clusters are drawn.
        level: of confidence.
        draws: resampled means.
        seed: decides them.

    Returns:
        the mean and its bounds.
    """
    sums, counts = cluster_sums(values, clusters)
    mean = float(sums.sum() / counts.sum())
    low, high = np.quantile(resampled_means(sums, counts, draws, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def resampled_means(sums: Floats, counts: Floats, draws: int, seed: int) -> Floats:
    """Means of ``draws`` resamples of clusters with these sums and numbers of rows.

    Args:
        sums, counts: of each cluster.
        draws: how many means.
        seed: decides them.

    Returns:
        the means, in the order of the draws.
    """
    sign = _orientation(sums, counts)
    kinds, times = np.unique(np.stack([sign * sums, counts], axis=1), axis=0, return_counts=True)
    n, rng = len(sums), np.random.default_rng(seed)
    if len(kinds) <= _FEW_KINDS:
        drawn = rng.multinomial(n, times / n, size=draws) @ kinds
    else:
        drawn = _drawn_one_by_one(np.repeat(kinds, times, axis=0), draws, rng)
    means: Floats = sign * drawn[:, 0] / drawn[:, 1]
    return means


def _drawn_one_by_one(kinds_N2: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """The sums of ``draws`` resamples of both columns."""
    n, (values, counts) = len(kinds_N2), np.ascontiguousarray(kinds_N2.T)
    step, same_size = max(1, _AT_ONCE // n), bool((counts == counts[0]).all())
    parts = []
    for start in range(0, draws, step):
        rows = rng.integers(0, n, (min(step, draws - start), n), dtype=np.int32)
        sizes = np.full(len(rows), n * counts[0]) if same_size else counts[rows].sum(1)
        parts.append(np.stack([values[rows].sum(1), sizes], axis=1))
    return np.concatenate(parts)


def _orientation(sums: Floats, counts: Floats) -> float:
    """1 or -1, the other one for ``-sums``: both are then resampled with the same draws."""
    for power in (1, 3, 5):
        moment = math.fsum((sums**power * counts).tolist())
        if moment != 0:
            return math.copysign(1.0, moment)
    return 1.0


def bootstrap_metric(
    metric: Callable[[npt.NDArray[np.intp]], float],
    n: int,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = 1_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a metric of a whole corpus: macro F1, BLEU, a difference of two.

    Args:
        metric: of the rows with these indices, which may repeat.
        n: rows.
        clusters: of each row; whole clusters are drawn.
        level: of confidence.
        draws: resampled corpora.
        seed: decides them.

    Returns:
        the metric of all rows and its bounds.
    """
    rng, members = np.random.default_rng(seed), _members(n, clusters)
    values = [metric(np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(metric(np.arange(n)), float(low), float(high))


def _members(n: int, clusters: Sequence[Hashable] | None) -> list[npt.NDArray[np.intp]]:
    """The rows of each cluster."""
    if clusters is None:
        return list(np.arange(n)[:, None])
    found: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        found.setdefault(cluster, []).append(row)
    return [np.array(rows) for rows in found.values()]


def two_level_bootstrap(scores_RN: Floats, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Bootstrap of a mean over training runs and rows: runs are drawn, and rows are drawn, the same for all runs.

    Args:
        scores_RN: a score (or a difference) for each of R runs and N rows.
        level: of confidence.
        draws: resampled means.
        seed: decides them.

    Returns:
        the mean and its bounds.

    Raises:
        ValueError: fewer than three runs, of which nothing can be said about runs.
    """
    num_runs, num_rows = scores_RN.shape
    if num_runs < 3:
        raise ValueError(f"{num_runs} runs; at least 3 show how runs differ")
    rng = np.random.default_rng(seed)
    runs = rng.multinomial(num_runs, [1 / num_runs] * num_runs, size=draws) / num_runs
    rows = rng.multinomial(num_rows, [1 / num_rows] * num_rows, size=draws) / num_rows
    low, high = np.quantile(np.einsum("dr,rn,dn->d", runs, scores_RN, rows, optimize=True), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(scores_RN.mean()), float(low), float(high))


# --- several tests


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: each below 0.05 may be claimed, and all claims are right with 95 %.

    Ref: Holm 1979, Scand. J. Stat. 6(2).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
