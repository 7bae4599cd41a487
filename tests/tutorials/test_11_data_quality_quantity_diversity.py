"""Page 11: its scores, ranks, copies and filter against the library's; bugs and wrong answers are seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from texts import byte_tokenizer

from minisft.data.chat import Encoded, encode_chat, resolve_template
from minisft.data.examples import Example, Message
from minisft.model import CausalLM
from minisft.quality.near_duplicates import jaccard, join, near_pairs
from minisft.quality.text import Runs
from minisft.selection.diversity import greedy
from minisft.selection.ranking import spearman
from minisft.selection.scores import Judge, score_rows

PAGE = page("11_data_quality_quantity_diversity")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]

sets = st.lists(st.sets(st.integers(1, 12), max_size=6), max_size=12)
few_values = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=12)


# ---- contracts -------------------------------------------------------------------------------------------------------


def small_model() -> CausalLM:
    """Random weights over the vocabulary of ``byte_tokenizer``."""
    model = CausalLM(replace(tiny.LLAMA, vocab_size=byte_tokenizer().vocab_size, max_position_embeddings=256)).double()
    tiny.randomize_(model)
    return model.eval()


MODEL = small_model()


def halves(encoded: Encoded) -> tuple[list[int], list[int]]:
    """The context and the answer of a chat of two turns."""
    begin = encoded.supervised.index(True)
    end = len(encoded.supervised) - encoded.supervised[::-1].index(True)
    return encoded.input_ids[:begin], encoded.input_ids[begin:end]


def agrees_ifd(built: Namespace, chats: Sequence[tuple[str, str]]) -> None:
    tokenizer = byte_tokenizer()
    template = resolve_template(tokenizer, "chatml")
    rows = [Example((Message("user", x), Message("assistant", y)), i) for i, (x, y) in enumerate(chats)]
    empty = [Example((Message("user", ""), Message("assistant", y)), i) for i, (_, y) in enumerate(chats)]
    whole = [halves(encode_chat(tokenizer, template, row.messages)) for row in rows]
    blank = [halves(encode_chat(tokenizer, template, row.messages)) for row in empty]
    prompts, answers, blanks = [p for p, _ in whole], [a for _, a in whole], [p for p, _ in blank]
    judge = Judge(MODEL, tokenizer, template, 256, 3, True, False)
    scores = {s.row: s for part in score_rows(judge, rows, range(len(rows))) for s in part}
    wanted = [scores[i] for i in range(len(rows))]  # the library rounds its losses
    assert built["mean_losses"](MODEL, prompts, answers).tolist() == pytest.approx([s.loss for s in wanted], abs=2e-5)
    assert built["ifd"](MODEL, prompts, answers, blanks).tolist() == pytest.approx([s.ifd for s in wanted], rel=1e-4)


@pytest.mark.slow
@given(st.lists(st.tuples(st.text("abc ?", max_size=9), st.text("abc.", min_size=1, max_size=6)), min_size=1, max_size=4))
def test_ifd_equals_the_library(chats: list[tuple[str, str]]) -> None:
    agrees_ifd(BUILD, [(x.strip(), y.strip()) for x, y in chats])


def hashed(values: set[int]) -> np.ndarray:
    return np.sort(np.array(list(values), np.uint64)) << np.uint64(32)


def agrees_jaccard(built: Namespace, a: set[int], b: set[int]) -> None:
    assert built["jaccard"](a, b) == jaccard(hashed(a), hashed(b))


@given(st.sets(st.integers(1, 9)), st.sets(st.integers(1, 9)))
def test_jaccard_equals_the_library(a: set[int], b: set[int]) -> None:
    agrees_jaccard(BUILD, a, b)


def agrees_clusters(built: Namespace, rows: Sequence[set[int]], threshold: float) -> None:
    pairs = near_pairs(Runs.of([hashed(row) for row in rows]), threshold)
    assert built["clusters"](list(rows), threshold) == [list(cluster.rows) for cluster in join(len(rows), pairs)]


@given(sets, st.sampled_from([0.3, 0.45, 0.55, 0.7, 0.9]))
def test_clusters_equals_the_library(rows: list[set[int]], threshold: float) -> None:
    agrees_clusters(BUILD, rows, threshold)


def agrees_far_apart(built: Namespace, seed: int, num_rows: int, threshold: float) -> None:
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((num_rows, 3)).astype(np.float32)
    vectors[draw.integers(num_rows)] = vectors[0]  # a copy
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = draw.permutation(num_rows)
    assert built["far_apart"](vectors, order, threshold) == greedy(vectors, order, threshold).tolist()


@given(st.integers(0, 999), st.integers(1, 300), st.sampled_from([-0.5, 0.0, 0.3, 0.8, 0.95, 1.0]))
def test_far_apart_equals_the_library(seed: int, num_rows: int, threshold: float) -> None:
    agrees_far_apart(BUILD, seed, num_rows, threshold)


def agrees_rank_correlation(built: Namespace, a: Sequence[float], b: Sequence[float]) -> None:
    x, y = np.array(a), np.array(b)
    assert built["rank_correlation"](x, y) == pytest.approx(spearman(x, y), abs=1e-12)


@given(few_values, st.integers(0, 99))
def test_rank_correlation_equals_the_library(values: list[float], seed: int) -> None:
    agrees_rank_correlation(BUILD, values, np.random.default_rng(seed).integers(0, 4, len(values)).tolist())


def agrees_auc(built: Namespace, scores: Sequence[float], bad: Sequence[bool]) -> None:
    """Pair by pair."""
    pairs = [(x, y) for x, b in zip(scores, bad, strict=True) for y, c in zip(scores, bad, strict=True) if b and not c]
    wanted = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs) / len(pairs)
    assert built["auc"](np.array(scores), np.array(bad)) == pytest.approx(wanted)


@given(few_values)
def test_auc_counts_pairs(scores: list[float]) -> None:
    agrees_auc(BUILD, scores, [i % 2 == 0 for i in range(len(scores))])


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    agrees_ifd(built, [("abc", "ca"), ("a", "bcabc."), ("cab abc?", "c")])
    for a, b in (({1, 2, 3}, {2, 3, 4, 5}), (set(), set()), ({1}, set())):
        agrees_jaccard(built, a, b)
    chain = [{9}, {1, 2, 3, 4}, {7, 8}, {3, 4, 5, 6, 2, 1}, set(), {5, 6, 3, 4, 2}, {7, 8}, set()]
    for threshold in (0.55, 0.62, 0.9):
        agrees_clusters(built, chain, threshold)
    agrees_clusters(built, [{1, 2}, {5, 6}, {5, 6, 1, 2}], 0.5)  # the last row connects the two before it
    for seed in range(4):
        agrees_far_apart(built, seed, 40, 0.3)
        agrees_far_apart(built, seed, 10, 1.0)
    agrees_rank_correlation(built, [1.0, 5.0, 2.0, 2.0, 9.0], [3.0, 9.0, 1.0, 4.0, 4.0])
    agrees_rank_correlation(built, [1.0, 1.0, 1.0], [3.0, 1.0, 2.0])
    agrees_auc(built, [1.0, 2.0, 2.0, 5.0, 0.0], [True, True, False, True, False])


MUTANTS = [
    ("rows not shifted", "ids[:, 1:, None]", "ids[:, :-1, None]"),
    ("no softmax", "model(ids[:, :-1]).log_softmax(-1)", "model(ids[:, :-1])"),
    ("the first token is dropped", "(place >= begin)", "(place > begin)"),
    ("padding counts", "(place < begin + lengths)", "(place < begin + lengths.max())"),
    ("a sum instead of a mean", "/ mask.sum(1)", "/ 1"),
    ("the prompt is not used", "return mean_losses(model, prompts, answers) /", "return mean_losses(model, blanks, answers) /"),
    ("a difference instead of a ratio", "prompts, answers) / mean", "prompts, answers) - mean"),
    ("clean rows score higher", "scores[bad][:, None] - scores[~bad][None]", "scores[~bad][:, None] - scores[bad][None]"),
    ("ties count fully", "0.5 * (gap == 0)", "(gap == 0)"),
    ("equal values are ranked by place", "+ 0.5 * (v[:, None] == v).sum(1) for v", "for v"),
    ("ranks not centred", "(rank - rank.mean() for rank in below)", "(rank for rank in below)"),
    ("a flat score divides by zero", "if norm else 0.0", "if norm else 1.0"),
    ("divided by the larger set", "together = len(a | b)", "together = max(len(a), len(b))"),
    ("empty sets are equal", "if together else 0.0", "if together else 1.0"),
    ("not transitive", "[low if g == high else g for g in group]", "[low if i == k else g for k, g in enumerate(group)]"),
    ("only neighbours are compared", "combinations(range(len(sets)), 2)", "zip(range(len(sets)), range(1, len(sets)))"),
    ("the limit itself is left out", ">= threshold:", "> threshold:"),
    ("single rows are clusters", "if len(rows) > 1", "if rows"),
    ("only the last kept row counts", "for other in kept)", "for other in kept[-1:])"),
    ("the threshold itself is too near", "nearest <= threshold:", "nearest < threshold:"),
    ("the least similar row decides", "nearest = max(", "nearest = min("),
    ("a distance instead of a cosine", "nearest <= threshold", "nearest >= threshold"),
]  # fmt: skip


def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def finds(grams: Callable[[list[str], int], set[tuple[str, ...]]]) -> Callable[..., list[int]]:
    def answer(rows: Sequence[list[str]], tests: Sequence[list[str]], n: int) -> list[int]:
        secret = {gram for test in tests for gram in grams(test, n)}
        return [i for i, row in enumerate(rows) if grams(row, n) & secret]

    return answer


def masked(words: Sequence[str]) -> list[str]:
    return ["0" if word.isdigit() else word for word in words]


def runs_of(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _any_order(rows: Sequence[list[str]], tests: Sequence[list[str]], n: int) -> list[int]:
    return [i for i, row in enumerate(rows) if any(len({*masked(row)} & {*masked(test)}) >= n for test in tests)]


def _unsorted(scores: Sequence[float], k: int) -> float:
    n = len(scores)
    return sum(score * (((i + 1) / n) ** k - (i / n) ** k) for i, score in enumerate(scores))


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "leaked": [
        (finds(runs_of), "48 and 52 count as the same"),
        (finds(lambda words, n: {tuple(masked(words)[:n])}), "not only at the start"),
        (_any_order, "not in a row"),
        (finds(lambda words, n: {tuple(masked(words)[i : i + n]) for i in range(len(words))}), "shorter than n"),
        (lambda rows, tests, n: len(finds(lambda w, m: runs_of(masked(w), m))(rows, tests, n)) * [0, 1], "each once"),
    ],
    "luck": [
        (lambda scores, k: max(scores), "the mean of all"),
        (lambda scores, k: sum(scores) / len(scores), "at least one is 1"),
        (_unsorted, "sort them"),
        (lambda scores, k: sum(scores) / len(scores) + 0.25 * (k - 1), "cannot beat the best"),
        (lambda scores, k: max(scores) - (max(scores) - sum(scores) / len(scores)) / k, "each score weighs"),
    ],
}  # fmt: skip
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=4), st.integers(1, 4))
def test_the_solution_of_luck_counts_all_outcomes(scores: list[int], k: int) -> None:
    """Every outcome of k tries, one by one."""
    solution = next(exercise.solution for exercise in PAGE.exercises() if exercise.name == "luck")
    tries = torch.cartesian_prod(*[torch.tensor(scores, dtype=torch.float64)] * k).view(-1, k)
    assert solution(scores, k) == pytest.approx(float(tries.max(1).values.mean()), abs=1e-9)


# ---- the page's data -------------------------------------------------------------------------------------------------


def test_training_and_test_share_no_wording() -> None:
    """The page's claim of unseen wordings rests on this; its cells are run as far as they define the data."""
    cell = next(cell for cell in PAGE.cells if cell.kind == "code" and "def new_wording" in cell.source)
    source = cell.source[: cell.source.index("torch.set_num_threads")]
    namespace: dict[str, Any] = dict(BUILD)
    exec(compile(source, PAGE.path.name, "exec"), namespace)
    assert len(set(namespace["TRAIN"] + namespace["TEST"])) == 40
    assert all("{0}" in w and w.index("{0}") < w.index("{1}") for w in namespace["wordings"])
