"""Rows that are not all alike: three ways to pick by distance, and numbers for how diverse a set is.

``greedy`` walks from the best score down and skips what is too near to a row it has kept (the shape of DEITA's filter, with a
cosine where that code says distance). ``k_center`` takes the row farthest from all it has, which covers the pool within twice
the least radius possible. ``facility`` takes the row that makes the pool best represented, within 1 - 1/e of the best possible.
Ties go to the earlier row, and no result depends on a batch size.

A threshold means nothing across models, so it is found from the share of rows to keep. Vectors are centred, lose their two
strongest directions and get unit length first: raw hidden states all point the same way.

Ref: greedy: Liu et al. 2023, arXiv:2312.15685, section 3.4; k-center: Gonzalez 1985; facility location: Nemhauser et al. 1978;
directions: Mu and Viswanath 2017, arXiv:1702.01417; Vendi score: Friedman and Dieng 2022, arXiv:2210.02410.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minisft.common.errors import UserError
from minisft.quality.text import Integers, even_sample

Vectors = NDArray[np.float32]
NUM_DIRECTIONS = 2
BLOCK = 256
DIGITS = 5  # of a cosine that is compared with a threshold: the rest is rounding
MAX_FACILITY_ROWS = 10_000
MAX_VENDI_ROWS = 2_000


def prepare(raw: NDArray[np.floating], rows: Sequence[int], num_directions: int = NUM_DIRECTIONS) -> Vectors:
    """Centred vectors without their strongest common directions, of unit length.

    Args:
        raw: (N, D).
        rows: their numbers in the file, for messages.
        num_directions: how many principal directions to remove.

    Returns:
        (N, D) float32.

    Raises:
        UserError: ``data/zero-embedding``: a vector without a direction.
    """
    x = np.asarray(raw, np.float64)
    x = x - x.mean(axis=0)
    count = min(num_directions, x.shape[1] - 1, len(x) - 1)
    if count > 0:
        _, vectors = np.linalg.eigh(x.T @ x)
        top = vectors[:, -count:]
        x = x - (x @ top) @ top.T
    norms = np.linalg.norm(x, axis=1)
    scale = float(np.linalg.norm(raw, axis=1).max(initial=0.0))
    zero = np.flatnonzero(norms <= 1e-9 * max(scale, 1e-30))
    if len(zero):
        what, fix = "embeddings without a direction", "drop copies first (--dedup exact), or give other embeddings"
        found = f"{len(zero)} rows, the first is row {rows[int(zero[0])]}"
        raise UserError("data/zero-embedding", what, found=found, fix=fix)
    return (x / norms[:, None]).astype(np.float32)


# ---- picking: each returns positions in the order in which they were picked ----


def greedy(vectors: Vectors, order: Integers, threshold: float) -> Integers:
    """Walk ``order`` and keep each row whose cosine to every row kept so far is at most ``threshold``.

    Args:
        vectors: (N, D) of unit length.
        order: positions, the best first.
        threshold: tau.

    Returns:
        the kept positions, in order.
    """
    kept = np.empty((0, vectors.shape[1]), np.float32)
    result: list[int] = []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        near = np.full(len(block), -np.inf)
        for first in range(0, len(kept), 4096):
            near = np.maximum(near, (vectors[block] @ kept[first : first + 4096].T).max(axis=1))
        inside = vectors[block] @ vectors[block].T
        fresh: list[int] = []
        for i in range(len(block)):
            closest = max(near[i], inside[i, fresh].max()) if fresh else near[i]
            if round(float(closest), DIGITS) <= threshold or closest == -np.inf:
                fresh.append(i)
        kept = np.concatenate((kept, vectors[block[fresh]]))
        result += block[fresh].tolist()
    return np.array(result, np.int64)


def nearest(vectors: Vectors, kept: Vectors) -> Integers:
    """For each vector the position of the kept one with the largest cosine."""
    starts = range(0, len(vectors), BLOCK)
    return np.concatenate([(vectors[start : start + BLOCK] @ kept.T).argmax(axis=1) for start in starts])


def threshold_for(vectors: Vectors, order: Integers, keep_rate: float) -> float:
    """The threshold at which ``greedy`` keeps a given share, as near as bisection comes.

    Args:
        vectors: (N, D) of unit length.
        order: positions, the best first.
        keep_rate: the share, in (0, 1].

    Returns:
        a cosine; at least the share is kept.
    """
    low, high = -1.0, 1.0
    for _ in range(14):
        middle = round((low + high) / 2, DIGITS)
        if len(greedy(vectors, order, middle)) < keep_rate * len(order):
            low = middle
        else:
            high = middle
    return high


def k_center(vectors: Vectors, order: Integers, count: int) -> Integers:
    """Farthest first: the first of ``order``, then whatever is farthest from all picked; the earlier one on a tie.

    Args:
        vectors: (N, D) of unit length.
        order: candidate positions.
        count: how many to pick.

    Returns:
        positions; max_i min_j |v_i - v_j| is at most twice the least possible for so many centres.
    """
    candidates = vectors[order]
    picked = [0]
    cosine = candidates @ candidates[0]
    while len(picked) < min(count, len(order)):
        cosine[picked[-1]] = np.inf
        nearest = int(np.argmin(np.round(cosine, DIGITS)))
        picked.append(nearest)
        cosine = np.maximum(cosine, candidates @ candidates[nearest])
    return order[picked]


def facility(vectors: Vectors, order: Integers, count: int) -> Integers:
    """Greedy maximiser of f(S) = sum_i max_{j in S} (1 + cos(v_i, v_j)) / 2, lazily evaluated.

    Args:
        vectors: (N, D) of unit length.
        order: candidate positions; they are also what has to be represented.
        count: how many to pick.

    Returns:
        positions; f is at least 1 - 1/e of the best possible.

    Raises:
        UserError: ``config/too-many-rows``: all pairs would not fit in memory.
    """
    if len(order) > MAX_FACILITY_ROWS:
        what, fix = "facility location compares all pairs of rows", "--diverse kcenter or greedy, or a smaller pool"
        found, expected = f"{len(order)} rows", f"at most {MAX_FACILITY_ROWS}"
        raise UserError("config/too-many-rows", what, where="--diverse", found=found, expected=expected, fix=fix)
    candidates = vectors[order]
    likeness = (1 + candidates @ candidates.T) / 2
    covered = np.zeros(len(order), np.float32)
    queue = [(-float(gain), i) for i, gain in enumerate(likeness.sum(axis=0, dtype=np.float64))]
    heapq.heapify(queue)
    picked: list[int] = []
    while queue and len(picked) < min(count, len(order)):
        _, i = heapq.heappop(queue)
        gain = float(np.maximum(likeness[i] - covered, 0).sum(dtype=np.float64))
        if queue and -gain > queue[0][0]:  # gains only fall, so an old one is an upper bound
            heapq.heappush(queue, (-gain, i))
            continue
        picked.append(i)
        covered = np.maximum(covered, likeness[i])
    return order[picked]


# ---- how diverse a set is ----


def mean_nearest_cosine(vectors: Vectors) -> float:
    """Mean over rows of the largest cosine to another row."""
    if len(vectors) < 2:
        return 0.0
    nearest = []
    for start in range(0, len(vectors), BLOCK):
        cosine = vectors[start : start + BLOCK] @ vectors.T
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -np.inf
        nearest.append(cosine.max(axis=1))
    return float(np.concatenate(nearest).mean())


def vendi_score(vectors: NDArray[np.floating]) -> float:
    """exp of the entropy of the eigenvalues of K / n, K = V V^T: n for orthonormal rows, 1 for n copies.

    Of more than 2,000 rows an even sample is taken.
    """
    sample = np.asarray(vectors, np.float64)[even_sample(len(vectors), MAX_VENDI_ROWS)]
    values = np.linalg.svd(sample, compute_uv=False) ** 2 / len(sample)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def principal_plane(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, 2) coordinates along the two directions of greatest variance; signs are fixed so that a map can be repeated."""
    x = np.asarray(vectors, np.float64)
    x = x - x.mean(axis=0)
    _, directions = np.linalg.eigh(x.T @ x)
    top = directions[:, : -min(2, x.shape[1]) - 1 : -1]
    top = top * np.sign(top[np.abs(top).argmax(axis=0), np.arange(top.shape[1])])
    plane = x @ top
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
