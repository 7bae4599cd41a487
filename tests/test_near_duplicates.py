"""Near copies: MinHash against exact Jaccard, LSH against its closed form, clusters against brute force."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import planted
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minisft.quality import near_duplicates as nd
from minisft.quality import text
from minisft.quality.text import Runs, WordHashes, character_codes, distinct, distinct_share, mix, ngrams, words

SETS = st.lists(st.sets(st.integers(0, 25), max_size=12), min_size=1, max_size=14)


def runs(sets: list[set[int]]) -> Runs:
    return Runs.of([np.sort(mix(np.array(sorted(s), np.uint64))) for s in sets])  # shingles are hashes


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def brute_force(sets: list[set[int]], threshold: float) -> dict[tuple[int, int], float]:
    near = {(i, j): jaccard(sets[i], sets[j]) for i, j in combinations(range(len(sets)), 2)}
    return {pair: s for pair, s in near.items() if s >= threshold}


def found(pairs: nd.Pairs) -> dict[tuple[int, int], float]:
    return dict(zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pairs.similarity.tolist(), strict=True))


def pair_of_sets(similarity: float, size: int, draw: random.Random) -> tuple[set[int], set[int]]:
    """Two random sets whose union has ``size`` members, ``similarity`` of them in both."""
    union = draw.sample(range(1 << 60), size)
    shared = round(similarity * size)
    cut = shared + (size - shared) // 2
    return set(union[:cut]), set(union[:shared] + union[cut:])


@given(SETS, st.sampled_from([0.2, 0.5, 0.8, 1.0]))
@example([{0, 1, 2}, {1, 2, 3}], 0.5)  # exactly at the threshold, and the rarest member of each is its own
def test_the_exact_search_finds_what_brute_force_finds(sets: list[set[int]], threshold: float) -> None:
    assert found(nd.near_pairs(runs(sets), threshold, exact=True)) == pytest.approx(brute_force(sets, threshold))


@given(SETS)
def test_verification_is_exact(sets: list[set[int]]) -> None:
    first, second = (
        (np.array(side, np.int64) for side in zip(*combinations(range(len(sets)), 2), strict=True))
        if len(sets) > 1
        else (np.empty(0, np.int64),) * 2
    )
    pairs = nd.verify(runs(sets), first, second, 0.0)
    assert pairs.similarity.tolist() == pytest.approx([jaccard(sets[i], sets[j]) for i, j in zip(first, second, strict=True)])
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        a, b = runs(sets)[i], runs(sets)[j]
        assert nd.jaccard(a, b) == jaccard(sets[i], sets[j])


@pytest.mark.parametrize("similarity", [0.1, 0.5, 0.8, 0.95])
def test_signatures_agree_as_often_as_the_sets_are_alike(similarity: float) -> None:
    draw, num_hashes, num_pairs = random.Random(1), 400, 60
    pairs = [pair_of_sets(similarity, 200, draw) for _ in range(num_pairs)]
    signed = nd.signatures(runs([s for pair in pairs for s in pair]), num_hashes)
    exact = np.array([jaccard(a, b) for a, b in pairs])
    agreement = (signed[::2] == signed[1::2]).mean(axis=1)
    sigma = np.sqrt(exact * (1 - exact) / num_hashes)
    assert abs(float((agreement - exact).mean())) < 3 * float(sigma.mean()) / math.sqrt(num_pairs)
    assert np.mean(np.abs(agreement - exact) < 3 * sigma) > 0.95


def test_signatures_estimate_as_well_as_datasketch_does() -> None:
    """Two independent estimates of one similarity: their difference has the variance of both, and neither is off on average."""
    datasketch = pytest.importorskip("datasketch", reason="datasketch is not installed (extra oracles)")
    draw, num_hashes, num_pairs = random.Random(3), 256, 40
    sets = [s for _ in range(num_pairs) for s in pair_of_sets(0.7, 120, draw)]
    signed = nd.signatures(runs(sets), num_hashes)
    ours = (signed[::2] == signed[1::2]).mean(axis=1)
    hashed = datasketch.MinHash.bulk([[value.to_bytes(8, "little") for value in s] for s in sets], num_perm=num_hashes)
    theirs = np.array([a.jaccard(b) for a, b in zip(hashed[::2], hashed[1::2], strict=True)])
    exact = jaccard(sets[0], sets[1])
    sigma = math.sqrt(2 * exact * (1 - exact) / num_hashes)
    assert abs(float((ours - theirs).mean())) < 3 * sigma / math.sqrt(num_pairs)
    assert np.abs(ours - theirs).max() < 4.5 * sigma


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_candidates_come_as_often_as_the_closed_form_has_it(similarity: float) -> None:
    draw, num_pairs = random.Random(2), 400
    sets = [s for _ in range(num_pairs) for s in pair_of_sets(similarity, 150, draw)]
    signed = nd.signatures(runs(sets))
    r = nd.rows_of_band(0.8)
    bands = [(signed[::2, k : k + r] == signed[1::2, k : k + r]).all(axis=1) for k in range(0, nd.NUM_HASHES, r)]
    hits = int(np.any(bands, axis=0).sum())
    rate = nd.candidate_rate(similarity, r, nd.NUM_HASHES // r)
    assert abs(hits - rate * num_pairs) <= 4 * math.sqrt(max(rate * (1 - rate) * num_pairs, 1))
    first, second = nd.lsh_candidates(signed, 0.8)
    proposed = {(int(a), int(b)) for a, b in zip(first, second, strict=True)}
    if similarity >= 0.8:
        assert len(proposed & {(2 * i, 2 * i + 1) for i in range(num_pairs)}) >= 0.98 * hits
    assert len(proposed) < 2 * num_pairs


def test_known_values_of_the_closed_form() -> None:
    """The table of datatrove's setting, 14 bands of 8."""
    known = {0.6: 0.21, 0.7: 0.56, 0.8: 0.924, 0.9: 0.9996}
    for similarity, rate in known.items():
        assert nd.candidate_rate(similarity, 8, 14) == pytest.approx(rate, abs=5e-3)
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        r = nd.rows_of_band(threshold)
        assert nd.candidate_rate(threshold, r, nd.NUM_HASHES // r) >= nd.MIN_FOUND


def test_hashing_finds_what_the_exact_search_finds() -> None:
    draw = random.Random(3)
    sets = [s for i in range(300) for s in pair_of_sets(0.5 + i / 600, 80, draw)]
    exact = found(nd.near_pairs(runs(sets), 0.8, exact=True))
    hashed = found(nd.near_pairs(runs(sets), 0.8, exact=False))
    assert set(hashed) <= set(exact)  # nothing unverified
    assert len(hashed) >= 0.98 * len(exact)
    assert len(exact) > 100


@given(SETS, st.sampled_from([0.3, 0.6]))
@example([{1, 2}, {4, 5}, {3, 4}, {2, 3}], 0.3)  # two pairs, joined by a third
def test_clusters_are_the_components_of_the_near_pairs(sets: list[set[int]], threshold: float) -> None:
    near = brute_force(sets, threshold)
    component = list(range(len(sets)))
    for _ in sets:  # spread the smallest number along every edge until nothing changes
        for i, j in near:
            component[i] = component[j] = min(component[i], component[j])
    expected = {tuple(i for i in range(len(sets)) if component[i] == head) for head in component}
    clusters = nd.join(len(sets), nd.near_pairs(runs(sets), threshold))
    assert {c.rows for c in clusters} == {rows for rows in expected if len(rows) > 1}
    for cluster in clusters:
        assert cluster.least == min(s for (i, j), s in near.items() if i in cluster.rows and j in cluster.rows)


def test_one_empty_row_is_near_to_nothing() -> None:
    for exact in (True, False):
        assert not found(nd.near_pairs(runs([set(), set(), {1}, {2}]), 0.1, exact))


@pytest.mark.slow
def test_a_crowd_of_equal_rows_is_one_cluster() -> None:
    sets = runs([{1, 2, 3}] * 500 + [{7, 8}])
    (cluster,) = nd.join(501, nd.near_pairs(sets, 0.8, exact=False))
    assert cluster.rows == tuple(range(500))


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=6), st.integers(1, 4))
@example([[1, 2, 3], [4, 5, 6]], 2)
def test_ngrams_stay_inside_their_row(rows: list[list[int]], n: int) -> None:
    arrays = [np.array(row, np.uint64) for row in rows]
    grams = ngrams(Runs.of(arrays), n)
    for i, array in enumerate(arrays):
        assert grams[i].tolist() == ngrams(Runs.of([array]), n).values.tolist()
    alone = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    assert grams.lengths.tolist() == [len(row) for row in alone]
    names = dict(zip(grams.values.tolist(), [gram for row in alone for gram in row], strict=True))
    assert [names[h] for h in grams.values.tolist()] == [gram for row in alone for gram in row]  # equal hash, equal n-gram
    assert len(names) == len({gram for row in alone for gram in row})


def test_a_cap_keeps_the_same_part_of_equal_sets() -> None:
    values = np.arange(100, dtype=np.uint64)
    capped = distinct(Runs.of([values, values[::-1].copy()]), 10)
    assert capped[0].tolist() == capped[1].tolist() == list(range(10))


def test_one_word_in_twenty_leaves_eight_tenths() -> None:
    """Both kinds of shingle, as the module's docstring has it, for texts on their side of the border."""
    grammar = planted.Grammar(5)
    for num_clauses in (2, 3, 5):
        text = " ".join(grammar.clause() for _ in range(num_clauses))
        row = {"prompt": text, "completion": "."}
        likenesses = []
        for _ in range(40):
            pair = [words(text), words(planted.near_copy(row, grammar.draw)["prompt"])]
            if len(pair[0]) < 30:
                sets = nd.shingle_sets(Runs.of([]), Runs.of([character_codes(side) for side in pair]))
            else:
                sets = nd.shingle_sets(Runs.of([WordHashes().of(side) for side in pair]))
            likenesses.append(nd.jaccard(sets[0], sets[1]))
        assert np.mean(np.array(likenesses) >= 0.79) >= 0.9


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8), st.integers(1, 3), st.integers(1, 3))
def test_the_distinct_share_is_that_of_a_set(rows: list[list[int]], n: int, at_once: int) -> None:
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_ROWS_AT_ONCE", at_once)
        share = distinct_share(Runs.of([np.array(row, np.uint64) for row in rows]), np.arange(len(rows)), n)
    assert share == pytest.approx(len(set(grams)) / len(grams) if grams else 0.0)
