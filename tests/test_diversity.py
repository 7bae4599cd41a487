"""Picking by distance: against a triple loop, against the best possible sets, and closed forms of the numbers."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.common.errors import UserError
from minisft.selection import diversity
from minisft.selection.ranking import best_first, merit, ranks, spearman


def unit(num_rows: int, size: int, seed: int) -> diversity.Vectors:
    x = np.random.default_rng(seed).normal(size=(num_rows, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def naive_greedy(vectors: diversity.Vectors, order: list[int], threshold: float) -> list[int]:
    kept: list[int] = []
    for i in order:
        near = False
        for j in kept:
            cosine = 0.0
            for d in range(vectors.shape[1]):
                cosine += float(vectors[i, d]) * float(vectors[j, d])
            near = near or cosine > threshold
        if not near:
            kept.append(i)
    return kept


@given(st.integers(1, 30), st.integers(0, 99), st.floats(-0.5, 0.95), st.sampled_from([2, 3, 7, 256]))
def test_greedy_is_the_naive_triple_loop_whatever_the_block(num_rows: int, seed: int, threshold: float, block: int) -> None:
    vectors, order = unit(num_rows, 4, seed), np.random.default_rng(seed).permutation(num_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "BLOCK", block)
        kept = diversity.greedy(vectors, order, threshold)
    assert kept.tolist() == naive_greedy(vectors, order.tolist(), threshold)


@given(st.integers(0, 50), st.floats(0.1, 1.0))
def test_the_threshold_keeps_the_share_asked_for(seed: int, keep_rate: float) -> None:
    vectors, order = unit(60, 5, seed), np.arange(60)
    threshold = diversity.threshold_for(vectors, order, keep_rate)
    assert len(diversity.greedy(vectors, order, threshold)) >= keep_rate * 60 - 1e-9
    assert threshold <= 1


@given(st.integers(0, 200), st.integers(1, 5))
def test_k_center_is_within_twice_the_best_radius(seed: int, count: int) -> None:
    vectors = unit(10, 3, seed)
    distance = np.sqrt(np.maximum(0, 2 - 2 * vectors.astype(np.float64) @ vectors.T))

    def radius(centres: tuple[int, ...]) -> float:
        return float(distance[:, list(centres)].min(axis=1).max())

    best = min(radius(centres) for centres in combinations(range(10), count))
    picked = diversity.k_center(vectors, np.arange(10), count)
    assert len(set(picked.tolist())) == count
    assert radius(tuple(picked.tolist())) <= 2 * best + 1e-2  # cosines are compared to 5 places


@given(st.integers(0, 200), st.integers(1, 4))
def test_facility_is_within_1_minus_1_over_e_of_the_best(seed: int, count: int) -> None:
    vectors = unit(8, 3, seed)
    likeness = (1 + vectors.astype(np.float64) @ vectors.T) / 2

    def value(chosen: tuple[int, ...]) -> float:
        return float(likeness[:, list(chosen)].max(axis=1).sum())

    best = max(value(chosen) for chosen in combinations(range(8), count))
    picked = tuple(diversity.facility(vectors, np.arange(8), count).tolist())
    assert len(set(picked)) == count
    assert value(picked) >= (1 - 1 / math.e) * best - 1e-6
    step: list[int] = []  # lazy evaluation must not change the greedy choice
    for _ in range(count):
        gains = {j: value((*step, j)) for j in range(8) if j not in step}
        assert gains[picked[len(step)]] == pytest.approx(max(gains.values()), abs=1e-5)
        step.append(picked[len(step)])


def test_too_many_rows_for_all_pairs() -> None:
    many = diversity.MAX_FACILITY_ROWS + 1
    with pytest.raises(UserError, match="config/too-many-rows"):
        diversity.facility(np.ones((many, 1), np.float32), np.arange(many), 2)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_vendi_score_of_copies_and_of_orthonormal_rows(n: int) -> None:
    assert diversity.vendi_score(np.ones((n, 1))) == pytest.approx(1)
    assert diversity.vendi_score(np.eye(n)) == pytest.approx(n)
    two = np.repeat(np.eye(2), n, axis=0)  # two groups of equal rows
    assert diversity.vendi_score(two) == pytest.approx(2)


def test_nearest_cosine_of_known_sets() -> None:
    assert diversity.mean_nearest_cosine(np.eye(5, dtype=np.float32)) == pytest.approx(0)
    assert diversity.mean_nearest_cosine(np.ones((300, 1), np.float32)) == pytest.approx(1)


def test_what_all_rows_share_is_taken_out() -> None:
    draw = np.random.default_rng(0)
    own = draw.normal(size=(200, 20))
    raw = own + 50 + np.outer(draw.normal(size=200), np.full(20, 9.0))  # a common offset and one strong direction
    direction = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.quantile(direction @ direction.T, 0.1) > 0.9
    vectors = diversity.prepare(raw, range(1, 201))
    cosine = vectors @ vectors.T
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(200), abs=1e-5)
    assert abs(float(np.median(cosine[np.triu_indices(200, 1)]))) < 0.05


def test_a_vector_without_direction_is_an_error_with_its_row() -> None:
    raw = np.zeros((5, 3), np.float32)
    with pytest.raises(UserError, match=r"data/zero-embedding.*5 rows, the first is row 11"):
        diversity.prepare(raw, [11, 12, 13, 14, 15])


def test_the_map_shows_the_direction_of_greatest_variance() -> None:
    x = np.zeros((100, 6))
    x[:, 3] = np.linspace(-5, 5, 100)
    x[:, 1] = np.linspace(-1, 1, 100) ** 2
    plane = diversity.principal_plane(x)
    assert abs(np.corrcoef(plane[:, 0], x[:, 3])[0, 1]) == pytest.approx(1)
    assert abs(np.corrcoef(plane[:, 1], x[:, 1])[0, 1]) == pytest.approx(1)


# ---- order ----


@given(st.lists(st.integers(0, 5), min_size=2, max_size=20), st.integers(0, 9))
def test_rank_correlation_is_the_correlation_of_mean_ranks(values: list[int], seed: int) -> None:
    other = np.random.default_rng(seed).normal(size=len(values))
    expected = [np.mean([sorted(values).index(v) + k for k in range(values.count(v))]) for v in values]
    assert ranks(np.array(values, float)).tolist() == expected
    if len(set(values)) > 1:
        pearson = np.corrcoef(expected, np.argsort(np.argsort(other)))[0, 1]
        assert spearman(np.array(values, float), other) == pytest.approx(pearson)
    else:
        assert spearman(np.array(values, float), other) == 0


def test_known_rank_correlations() -> None:
    x = np.arange(9.0)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_equal_merits_keep_the_order_of_rows(values: list[int]) -> None:
    order = best_first(np.array(values, float), np.ones(len(values)))
    assert order.tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))


def test_length_bins_take_the_same_share_of_each() -> None:
    lengths = np.arange(100.0)
    order = best_first(lengths, lengths, num_bins=5)  # a score that is the length itself
    first = np.bincount((order[:50] // 20).astype(int), minlength=5)
    assert first.tolist() == [10] * 5
    assert sorted(order[:5].tolist()) == [19, 39, 59, 79, 99]  # the best of each bin first
    assert sorted(order.tolist()) == list(range(100))


def test_the_middle_of_the_loss_is_best() -> None:
    assert best_first(merit("loss", np.array([0.0, 5.0, 2.0, 2.1, 9.0])), np.ones(5)).tolist() == [3, 2, 0, 1, 4]
