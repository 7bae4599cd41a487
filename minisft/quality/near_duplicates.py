"""Rows that are nearly the same: candidates by MinHash, each verified by exact Jaccard similarity, then joined to clusters.

J(A, B) = |A and B| / |A or B|, A and B the sets of a row's shingles. A short row's shingles are 5 consecutive characters, a
longer one's 2 consecutive words; with both, one word changed in twenty leaves a similarity of a little over 0.8, which the
usual 5 words of web documents would turn into 0.5. Rows with fewer than 5 words are compared as a whole only.

A small pool is searched exactly, by the rarest shingles of each row; a large one by MinHash and locality-sensitive hashing,
which miss about one pair in a hundred at the threshold itself and fewer above it. Either way, a pair counts only when its
shingles have been compared: hashing proposes and never decides. Clusters are transitive: A near B and B near C puts A and C
together, however far apart; so each cluster comes with the least similarity inside it.

Ref: Broder 1997, "On the resemblance and containment of documents"; Leskovec et al., "Mining of Massive Datasets", 3.3-3.4;
prefix filter: Bayardo et al. 2007, "Scaling up all pairs similarity search".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minisft.quality.text import Hashes, Integers, Runs, common_values, distinct, even_sample, mix, ngrams, sorted_distinct

Make = Callable[[Integers], Runs]  # the distinct shingles of some rows, by position
NUM_HASHES = 96
MIN_WORDS = 5
# Rows between the two limits are compared both ways, so no pair is lost at a border.
MAX_CHARACTER_WORDS, MIN_BIGRAM_WORDS = 36, 24
CHARACTERS, BIGRAM = 5, 2
EXACT_ROWS = 20_000  # up to so many rows the exact search is quick enough
MAX_SHINGLES = 20_000  # of one row
MIN_FOUND = 0.98  # of the pairs exactly at the threshold
MAX_LAG = 64  # a bucket of more equal rows is linked to that many neighbours of each row, not all to all
COMMON_SHARE = 0.5  # shingles of so many rows are no evidence for two of them: a shared instruction
_SAMPLE_ROWS = 4_000
_ROWS_AT_ONCE = 4_096
_PAIR_BITS = 14
_PAIRS_AT_ONCE = 1 << _PAIR_BITS
_SHINGLES_OF_PAIRS = 1 << 22
_SHINGLES_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Pairs:
    """Pairs of row indices, first below second, sorted, with their exact Jaccard similarity."""

    first: Integers
    second: Integers
    similarity: NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """Rows that are near each other, in order; ``least`` is the smallest similarity of two of them that was computed."""

    rows: tuple[int, ...]
    least: float


def jaccard(a: Hashes, b: Hashes) -> float:
    """|A and B| / |A or B| of two sorted arrays without repeats; 0 for two empty ones."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 0.0


def shingle_sets(words: Runs, characters: Runs | None = None) -> Runs:
    """The distinct shingles of each row: ``characters`` by fives where they are given, else ``words`` by twos."""
    return distinct(ngrams(characters, CHARACTERS) if characters is not None else ngrams(words, BIGRAM), MAX_SHINGLES)


def common_shingles(make: Make, num_rows: int) -> Hashes:
    """The shingles that more than ``COMMON_SHARE`` of the rows have, judged on a sample of them: instructions, boilerplate.

    Args:
        make: the sets of some rows.
        num_rows: of the pool.

    Returns:
        sorted shingles; none for a small pool.
    """
    return common_values(make(even_sample(num_rows, _SAMPLE_ROWS)), COMMON_SHARE)


# ---- candidates ----


def signatures(sets: Runs, num_hashes: int = NUM_HASHES, seed: int = 0) -> NDArray[np.uint32]:
    """MinHash signatures: entry k is the least value of hash k over the row's set, so P(two agree) = J.

    h_k(x) = the upper half of a_k x + b_k modulo 2^64, a_k odd (multiply-shift).

    Args:
        sets: distinct shingles of each row; a row without any gets a signature of zeros, and is in no pair.
        num_hashes: K.
        seed: decides all a_k and b_k.

    Returns:
        (rows, K) uint32.
    """
    draw = mix(np.arange(1, 2 * num_hashes + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15))
    factors, shifts = draw[::2] | np.uint64(1), draw[1::2]
    result = np.empty((len(sets), num_hashes), np.uint32)
    start = 0
    while start < len(sets):
        limit = int(sets.offsets[start]) + _SHINGLES_AT_ONCE
        end = max(start + 1, int(np.searchsorted(sets.offsets, limit, side="right")) - 1)
        _sign(sets, start, end, factors, shifts, result)
        start = end
    return result


def _sign(sets: Runs, start: int, end: int, factors: Hashes, shifts: Hashes, result: NDArray[np.uint32]) -> None:
    lengths = sets.lengths[start:end]
    filled = np.flatnonzero(lengths)
    result[start:end] = 0
    if not len(filled):
        return
    values = sets.values[sets.offsets[start] : sets.offsets[end]]
    heads = sets.offsets[start:end][filled] - sets.offsets[start]
    for k, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
        hashed = ((values * factor + shift) >> np.uint64(32)).astype(np.uint32)
        result[start + filled, k] = np.minimum.reduceat(hashed, heads)


def rows_of_band(threshold: float, num_hashes: int = NUM_HASHES) -> int:
    """The most selective r with b = K / r bands that still finds ``MIN_FOUND`` of the pairs at the threshold.

    P(candidate) = 1 - (1 - s^r)^b at similarity s.
    """
    fitting = [r for r in range(1, 17) if num_hashes % r == 0 and candidate_rate(threshold, r, num_hashes // r) >= MIN_FOUND]
    return max(fitting, default=1)


def candidate_rate(similarity: float, r: int, b: int) -> float:
    """P(two rows agree in at least one band) = 1 - (1 - s^r)^b.

    Args:
        similarity: s, their Jaccard similarity.
        r: hashes of a band.
        b: number of bands.

    Returns:
        the probability.
    """
    return float(1 - (1 - similarity**r) ** b)


def lsh_candidates(signed: NDArray[np.uint32], threshold: float) -> tuple[Integers, Integers]:
    """Pairs of rows that agree in a whole band, without those whose signatures put them far below the threshold.

    Returns:
        first and second rows, first below second, each pair once.
    """
    num_hashes = signed.shape[1]
    r = rows_of_band(threshold, num_hashes)
    keys: list[Integers] = []
    for band in range(0, num_hashes, r):
        column = np.zeros(len(signed), np.uint64)
        for k in range(band, band + r):
            column = mix(column * np.uint64(0x9E3779B97F4A7C15) + signed[:, k])
        first, second = equal_pairs(column, MAX_LAG)
        keys.append(_likely(signed, sorted_distinct(first << 32 | second), threshold))
    merged = sorted_distinct(np.concatenate(keys)) if keys else np.empty(0, np.int64)
    return merged >> 32, merged & 0xFFFFFFFF


def _likely(signed: NDArray[np.uint32], keys: Integers, threshold: float) -> Integers:
    """Leave out pairs whose agreement lies 4 standard deviations below what the threshold makes us expect."""
    num_hashes = signed.shape[1]
    least = threshold - 4 * float(np.sqrt(threshold * (1 - threshold) / num_hashes))
    kept = [np.empty(0, np.int64)]
    for start in range(0, len(keys), 1 << 16):
        part = keys[start : start + (1 << 16)]
        agreement = (signed[part >> 32] == signed[part & 0xFFFFFFFF]).mean(axis=1)
        kept.append(part[agreement >= least])
    return np.concatenate(kept)


def equal_pairs(keys: Hashes, max_lag: int | None = None) -> tuple[Integers, Integers]:
    """All pairs of indices with equal keys (first below second); of more than ``max_lag`` equal ones only near neighbours."""
    order = np.argsort(keys, kind="stable")
    values = keys[order]
    position = np.arange(len(values))
    firsts, seconds = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    lag = 0
    while len(position) and (max_lag is None or lag < max_lag):
        lag += 1
        position = position[position + lag < len(values)]
        position = position[values[position] == values[position + lag]]
        firsts.append(order[position])
        seconds.append(order[position + lag])
    return np.concatenate(firsts), np.concatenate(seconds)


def prefix_candidates(sets: Runs, threshold: float) -> tuple[Integers, Integers]:
    """Every pair that can reach the threshold: such a pair shares one of the rarest |A| - ceil(T |A|) + 1 shingles of each.

    Returns:
        first and second rows, first below second, each pair once.
    """
    _, inverse, counts = np.unique(sets.values, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ranked = Runs(rank[inverse].astype(np.uint64), sets.offsets)
    prefixes = []
    for i in range(len(sets)):
        n = int(sets.lengths[i])
        length = n - int(np.ceil(threshold * n - 1e-9)) + 1 if n else 0
        prefixes.append(np.sort(ranked[i])[:length])
    index = Runs.of(prefixes)
    owner = np.repeat(np.arange(len(sets)), index.lengths)
    first, second = equal_pairs(index.values)
    keys = sorted_distinct(owner[first] << 32 | owner[second])
    first, second = keys >> 32, keys & 0xFFFFFFFF
    sizes = sets.lengths
    small, large = np.minimum(sizes[first], sizes[second]), np.maximum(sizes[first], sizes[second])
    fits = small >= threshold * large - 1e-9
    return first[fits], second[fits]


# ---- verification and clusters ----


def verify(sets: Runs, first: Integers, second: Integers, threshold: float) -> Pairs:
    """The candidates whose exact similarity reaches the threshold.

    Args:
        sets: distinct shingles of each row, sorted hashes of which 50 bits are compared.
        first: (N,) row indices.
        second: (N,) row indices.
        threshold: least Jaccard similarity.

    Returns:
        the pairs that pass.
    """
    sizes = np.cumsum(sets.lengths[first] + sets.lengths[second])
    parts, start = [np.empty(0)], 0
    while start < len(first):
        done = int(sizes[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(sizes, done + _SHINGLES_OF_PAIRS, side="right")))
        end = min(end, start + _PAIRS_AT_ONCE)
        parts.append(_similarities(sets, first[start:end], second[start:end]))
        start = end
    similarity = np.concatenate(parts)
    passed = similarity >= threshold - 1e-12
    return Pairs(first[passed], second[passed], similarity[passed])


def _similarities(sets: Runs, first: Integers, second: Integers) -> NDArray[np.float64]:
    """Exact Jaccard of many pairs at once: both sets of a pair sorted together, equal neighbours are shared shingles."""
    sizes = sets.lengths[first] + sets.lengths[second]
    keys = np.concatenate([_owned(sets, first), _owned(sets, second)])
    keys.sort()
    equal = keys[1:][keys[1:] == keys[:-1]]
    shared = np.bincount((equal >> np.uint64(64 - _PAIR_BITS)).astype(np.int64), minlength=len(first))
    union = sizes - shared
    return np.divide(shared, union, out=np.zeros(len(first)), where=union > 0)


def _owned(sets: Runs, rows: Integers) -> Hashes:
    """The shingles of ``rows`` with the position of their row in the upper bits; 50 bits of each hash are left to differ."""
    owner = np.repeat(np.arange(len(rows), dtype=np.uint64), sets.lengths[rows])
    return owner << np.uint64(64 - _PAIR_BITS) | sets.select(rows).values >> np.uint64(_PAIR_BITS)


def near_pairs(sets: Runs, threshold: float, exact: bool | None = None) -> Pairs:
    """All pairs of rows with J >= threshold.

    Args:
        sets: distinct shingles of each row, sorted hashes of which 50 bits are compared; rows without any are in no pair.
        threshold: least Jaccard similarity, above 0.
        exact: search exactly; by default up to ``EXACT_ROWS`` rows.

    Returns:
        the pairs, every one verified.
    """
    return find_pairs(sets.select, len(sets), threshold, exact)


def find_pairs(make: Make, num_rows: int, threshold: float, exact: bool | None = None) -> Pairs:
    """``near_pairs`` for sets that are made when they are needed: of a large pool, never all at once.

    Args:
        make: the sets of some rows, by position.
        num_rows: how many there are.
        threshold: least Jaccard similarity, above 0.
        exact: search exactly; by default up to ``EXACT_ROWS`` rows.

    Returns:
        the pairs, every one verified.
    """
    exact = num_rows <= EXACT_ROWS if exact is None else exact
    if exact:
        sets = make(np.arange(num_rows))
        return verify(sets, *prefix_candidates(sets, threshold), threshold)
    starts = range(0, num_rows, _ROWS_AT_ONCE)
    parts = [signatures(make(np.arange(start, min(start + _ROWS_AT_ONCE, num_rows)))) for start in starts]
    first, second = lsh_candidates(np.concatenate(parts), threshold)
    del parts
    rows = sorted_distinct(np.concatenate((first, second)))
    pairs = verify(make(rows), np.searchsorted(rows, first), np.searchsorted(rows, second), threshold)
    return Pairs(rows[pairs.first], rows[pairs.second], pairs.similarity)


def join(num_rows: int, pairs: Pairs) -> list[Cluster]:
    """The connected components of the pairs, two rows or more, ordered by first row.

    ``least`` is the smallest similarity among the given pairs of a component; see ``least_similarities``.
    """
    parent = np.arange(num_rows)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for a, b in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    least: dict[int, float] = {}
    for row in sorted({*pairs.first.tolist(), *pairs.second.tolist()}):
        members.setdefault(root(row), []).append(row)
    for a, similarity in zip(pairs.first.tolist(), pairs.similarity.tolist(), strict=True):
        least[root(a)] = min(similarity, least.get(root(a), 1.0))
    return [Cluster(tuple(rows), least[head]) for head, rows in sorted(members.items())]


def merged(parts: Sequence[Pairs]) -> Pairs:
    """The union of pairs found in several ways, each once with its greatest similarity."""
    keys = np.concatenate([part.first << 32 | part.second for part in parts])
    similarity = np.concatenate([part.similarity for part in parts])
    order = np.lexsort((-similarity, keys))
    keys, similarity = keys[order], similarity[order]
    keep = np.concatenate(([True], keys[1:] != keys[:-1])) if len(keys) else np.empty(0, bool)
    return Pairs(keys[keep] >> 32, keys[keep] & 0xFFFFFFFF, similarity[keep])
