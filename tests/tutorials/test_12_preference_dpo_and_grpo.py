"""Page 12: its log-probabilities, samples, advantages and losses against the library's; bugs and wrong answers are seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from torch import Tensor

from minisft import preference
from minisft.common.seeds import derive_seed
from minisft.config import ModelConfig
from minisft.generation import sample_groups
from minisft.loss import IGNORE_INDEX, token_log_probs
from minisft.model import CausalLM

PAGE = page("12_preference_dpo_and_grpo")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]

families = st.sampled_from(list(tiny.FAMILIES.values()))
texts = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=8)
seeds = st.integers(0, 999)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- contracts -------------------------------------------------------------------------------------------------------


def agrees_reply_log_probs(
    built: Namespace, model: CausalLM, prompts: Sequence[list[int]], replies: Sequence[list[int]]
) -> None:
    found, mask = built["reply_log_probs"](model, prompts, replies)
    assert mask.sum(1).tolist() == [len(reply) for reply in replies]
    assert not found[~mask].any()
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):  # each by itself: no padding, no neighbours
        targets = torch.tensor([IGNORE_INDEX] * (len(prompt) - 1) + reply)
        theirs = token_log_probs(model.hidden(torch.tensor([prompt + reply[:-1]])), model.lm_head, targets[None])
        torch.testing.assert_close(found[row][mask[row]], theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@given(families, st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_reply_log_probs_equals_the_library(family: ModelConfig, chats: list[tuple[list[int], list[int]]]) -> None:
    agrees_reply_log_probs(BUILD, tiny.shared(family), *zip(*chats, strict=True))


def agrees_dpo_loss(built: Namespace, seed: int, num_pairs: int, beta: float) -> None:
    """Values, and what they ask of each log-probability."""
    values = [20 * random(seed + i, num_pairs) for i in range(4)]
    mine, theirs = ([value.clone().requires_grad_() for value in values[:2]] for _ in range(2))
    ours, wanted = built["dpo_loss"](*mine, *values[2:], beta), preference.dpo_loss(*theirs, *values[2:], beta=beta)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    ours.sum().backward()
    wanted.sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(1, 5), st.floats(0.01, 2))
def test_dpo_loss_equals_the_library(seed: int, num_pairs: int, beta: float) -> None:
    agrees_dpo_loss(BUILD, seed, num_pairs, beta)


def agrees_sample_group(
    built: Namespace, model: CausalLM, prompt: list[int], num_answers: int, limit: int, end_ids: set[int], seed: int
) -> None:
    draws = [[derive_seed(seed, "sample", g, t) / 2**63 for t in range(limit)] for g in range(num_answers)]
    replies = built["sample_group"](model, prompt, torch.tensor(draws, dtype=torch.float64), end_ids)
    (group,) = sample_groups(model, [prompt], num_answers, max_new_tokens=limit, eos_ids=end_ids, seed=seed)
    assert replies == [answer.ids for answer in group]


@pytest.mark.slow
@given(families, texts, st.integers(1, 5), st.integers(1, 6), st.sets(st.integers(0, tiny.VOCAB - 1), max_size=20), seeds)
def test_sample_group_equals_the_library(
    family: ModelConfig, prompt: list[int], num_answers: int, limit: int, end_ids: set[int], seed: int
) -> None:
    agrees_sample_group(BUILD, tiny.shared(family), prompt, num_answers, limit, end_ids, seed)


def agrees_advantages(built: Namespace, rewards: Tensor) -> None:
    torch.testing.assert_close(built["advantages"](rewards), preference.advantages(rewards), rtol=1e-12, atol=1e-12)
    divided = built["advantages"](rewards, divide_by_std=True)
    torch.testing.assert_close(divided, preference.advantages(rewards, "zscore"), rtol=1e-12, atol=1e-12)
    if len(rewards.unique()) == 1:
        assert not built["advantages"](rewards).any()
        assert not divided.any()


@given(
    st.lists(st.sampled_from([0.0, 0.1, 1.0, -3.5]), min_size=2, max_size=9) | st.lists(st.just(0.1), min_size=2, max_size=9)
)
def test_advantages_equals_the_library(rewards: list[float]) -> None:
    agrees_advantages(BUILD, torch.tensor(rewards, dtype=torch.float64))


def agrees_grpo_loss(built: Namespace, seed: int, lengths: Sequence[int], beta: float) -> None:
    """Value and gradient on ragged replies; the library's are without padding."""
    mask = torch.arange(max(lengths) + 2) < torch.tensor(lengths)[:, None]
    values, reference = random(seed, *mask.shape), random(seed + 1, *mask.shape)
    A = random(seed + 2, len(lengths))
    mine, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    ours = built["grpo_loss"](mine, reference, A, mask, beta)
    wanted = preference.grpo_loss(
        theirs[mask], values[mask], A, torch.tensor(lengths), beta=beta, reference_log_probs=reference[mask]
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    ours.backward()
    wanted.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@given(seeds, st.lists(st.integers(1, 7), min_size=1, max_size=6), st.just(0.0) | st.floats(0.001, 1))
def test_grpo_loss_equals_the_library(seed: int, lengths: list[int], beta: float) -> None:
    agrees_grpo_loss(BUILD, seed, lengths, beta)


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    model = tiny.shared(tiny.LLAMA)
    agrees_reply_log_probs(built, model, [[3, 1, 4], [1, 5]], [[9, 2, 6], [5, 3, 5, 8, 9]])
    agrees_dpo_loss(built, 0, 4, 0.3)
    (group,) = sample_groups(model, [[3, 1, 4]], 6, max_new_tokens=6, eos_ids=set(), seed=2)
    agrees_sample_group(built, model, [3, 1, 4], 6, 6, set(), 2)
    agrees_sample_group(built, model, [3, 1, 4], 6, 6, {group[0].ids[2]}, 2)
    agrees_advantages(built, torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64))
    agrees_advantages(built, torch.full((7,), 0.1, dtype=torch.float64))
    agrees_grpo_loss(built, 3, [2, 5, 1], 0.4)


MUTANTS = [
    ("rows not shifted", "ids[:, 1:, None]", "ids[:, :-1, None]"),
    ("no softmax", "model(ids[:, :-1]).log_softmax(-1)", "model(ids[:, :-1])"),
    ("the end token is dropped", "(predicted < end)", "(predicted < end - 1)"),
    ("the first token is dropped", "(predicted >= begin)", "(predicted > begin)"),
    ("the mask is not applied", "return log_p * mask, mask", "return log_p, mask"),
    ("no reference for the rejected reply", "(rejected - rejected_ref)", "rejected"),
    ("both margins added", "(chosen - chosen_ref) - (", "(chosen - chosen_ref) + ("),
    ("beta twice", "F.logsigmoid(beta * d)", "F.logsigmoid(beta * beta * d)"),
    ("chosen and rejected exchanged", "F.logsigmoid(beta * d)", "F.logsigmoid(-beta * d)"),
    ("the least likely first", "descending=True", "descending=False"),
    ("one token too far", "place.clamp(", "(place + 1).clamp("),
    ("the prompt's first position is read", "model(ids)[:, -1]", "model(ids)[:, 0]"),
    ("the end token is cut off", "(i + 1 for i, token", "(i for i, token"),
    ("never ends by itself", "if token in end_ids", "if False"),
    ("the mean of equal rewards is rounded", "if (rewards == rewards[0]).all():", "if False:"),
    ("the median instead of the mean", "rewards.mean()", "rewards.median()"),
    ("always divided", "if divide_by_std else above", "if True else above"),
    ("the whole variance", "rewards.std()", "rewards.var()"),
    ("a ratio without a gradient", "(log_probs - log_probs.detach()).exp()", "torch.ones_like(log_probs)"),
    ("the log-ratio the wrong way round", "u = log_probs_ref - log_probs", "u = log_probs - log_probs_ref"),
    ("k1 instead of k3", "u.exp() - u - 1", "-u"),
    ("learns from what was bad", "beta * k3 - A", "beta * k3 + A"),
    ("padding counts", "* mask).sum()", ").sum()"),
    ("divided by all positions", "/ mask.sum()", "/ mask.numel()"),
]


def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def surrogate(
    combine: Callable[[Tensor, Tensor], Tensor], sign: float = -1
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def answer(log_probs: Tensor, old: Tensor, A: Tensor, epsilon: float) -> Tensor:
        rho = (log_probs - old).exp()
        return sign * combine(rho * A, rho.clamp(1 - epsilon, 1 + epsilon) * A)

    return answer


def _no_exponential(log_probs: Tensor, old: Tensor, A: Tensor, epsilon: float) -> Tensor:
    rho = log_probs / old
    return -torch.minimum(rho * A, rho.clamp(1 - epsilon, 1 + epsilon) * A) - 0.5


def _only_log_ratio(log_probs: Tensor, old: Tensor, A: Tensor, epsilon: float) -> Tensor:
    return -A * (log_probs - old) - 0.1


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "clipped": [
        (surrogate(torch.minimum, sign=1), "a loss is minimized"),
        (surrogate(lambda free, cut: free), "A > 0 and rho = 1.3"),
        (surrogate(lambda free, cut: cut), "A < 0 and rho = 1.3"),
        (surrogate(torch.maximum), "A > 0 and rho = 1.3"),
        (surrogate(lambda free, cut: torch.minimum(free, cut).sum()), "one loss for each token"),
        (_no_exponential, "the ratio is exp"),
        (_only_log_ratio, "the ratio is exp"),
    ],
    "teaches": [
        (lambda p, G: 1 - (1 - p) ** G, "nothing to compare"),
        (lambda p, G: min(1, G * p * (1 - p)) if G > 1 else 0, "all that is left"),
        (lambda p, G: (1 - (1 - p) ** G) if G > 1 else 0, "all replies are right"),
        (lambda p, G: (1 - p**G) if G > 1 else 0, "all replies are wrong"),
        (lambda p, G: 2 * p * (1 - p) if G > 1 else 0, "count all that is left"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


@given(st.integers(1, 6), st.integers(0, 4))
def test_the_solution_of_teaches_counts_all_outcomes(G: int, quarters: int) -> None:
    """Every outcome of G replies, one by one."""
    solution = next(exercise.solution for exercise in PAGE.exercises() if exercise.name == "teaches")
    p = quarters / 4
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * G).view(-1, G)
    chances = (p * outcomes + (1 - p) * (1 - outcomes)).prod(1)
    mixed = (outcomes.sum(1) > 0) & (outcomes.sum(1) < G)
    assert solution(p, G) == pytest.approx(float(chances[mixed].sum()), abs=1e-6)
