"""A group as one batch: scored as sampled, its gradient that of the formula, and what a group must never be mixed with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dpo import make_model, move
from tiny import assert_close
from torch import Tensor

from minisft.generation import Sampled, sample_groups
from minisft.model import CausalLM
from minisft.preference import advantages, grpo_loss
from minisft.training.grpo import (
    Group,
    GRPOSettings,
    group_gradients,
    group_log_probs,
    make_group,
    parameters_as,
    reference_of_group,
)  # fmt: skip

PROMPTS = [[5, 6, 7, 8], [9], [5, 6, 7, 10, 11]]
EOS = {3, 4, 5}
REWARDS = [[1.0, 0.0, 0.0], [0.5, 2.0, -1.0], [0.0, 1.0, 1.0]]


def sampled(model: CausalLM, temperature: float = 1.0, rewards: list[list[float]] = REWARDS) -> list[Group]:
    groups = sample_groups(model, PROMPTS, 3, max_new_tokens=6, eos_ids=EOS, temperature=temperature, seed=2)
    return [
        make_group(prompt, answers, values, row, 0, [True] * 3)
        for row, (prompt, answers, values) in enumerate(zip(PROMPTS, groups, rewards, strict=True), 1)
    ]


def gradients(model: CausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model() -> CausalLM:
    made = make_model()
    move(made)
    return made


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_what_is_scored_is_what_was_sampled(model: CausalLM, temperature: float) -> None:
    for group in sampled(model, temperature):
        scored = group_log_probs(model, group.batch, temperature)
        assert len(scored) == int(group.lengths.sum())
        assert_close(scored, group.old_log_probs.double(), 1e-6)
    stats = group_gradients(model, sampled(model, temperature), GRPOSettings(temperature=temperature, max_new_tokens=6))
    assert stats.ratio_error < 1e-6
    assert stats.clip_share == 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("kind", ["mean", "zscore"])
def test_the_gradient_of_a_step_is_that_of_the_formula(loss: str, kind: str) -> None:
    """Against one text a forward, full logits, and the loss over the whole step at once; off-policy, with a KL term."""
    ours, theirs = make_model(), make_model()
    for each in (ours, theirs):
        move(each)
    groups = [replace(group, reference_log_probs=group.old_log_probs - 0.1) for group in sampled(ours)]
    for each in (ours, theirs):
        move(each, seed=7)  # the policy has moved on since it sampled
    settings = GRPOSettings(loss=loss, advantage=kind, beta=0.05, max_new_tokens=6, epsilon=0.1, epsilon_high=0.3)
    stats = group_gradients(ours, groups, settings)
    parts: list[Tensor] = []
    for group, prompt in zip(groups, PROMPTS, strict=True):
        ids = group.batch.target_ids[group.batch.target_ids >= 0].split(group.lengths.tolist())
        for answer in ids:
            logits = theirs(torch.tensor([[*prompt, *answer.tolist()]]))[0, len(prompt) - 1 : -1]
            parts.append(logits.log_softmax(-1)[range(len(answer)), answer])
    total = grpo_loss(
        torch.cat(parts), torch.cat([g.old_log_probs for g in groups]).double(),
        torch.cat([advantages(g.rewards, kind) for g in groups]), torch.cat([g.lengths for g in groups]), loss=loss,
        max_new_tokens=6, epsilon=0.1, epsilon_high=0.3, beta=0.05,
        reference_log_probs=torch.cat([g.old_log_probs - 0.1 for g in groups]).double(),
    )  # fmt: skip
    total.backward()
    assert stats.loss == pytest.approx(total.item(), rel=1e-9)
    assert stats.clip_share > 0
    assert stats.kl > 0
    wanted = gradients(theirs)
    for name, gradient in gradients(ours).items():
        assert_close(gradient, wanted[name], 1e-9, name)


def test_equal_rewards_leave_no_gradient_at_all(model: CausalLM) -> None:
    group_gradients(model, sampled(model, rewards=[[1e6] * 3] * 3), GRPOSettings(max_new_tokens=6))
    assert not gradients(model)


def test_a_group_of_equal_rewards_still_counts_in_the_denominator(model: CausalLM) -> None:
    groups = sampled(model, rewards=[[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3])
    stats = group_gradients(model, groups, GRPOSettings(max_new_tokens=6))
    together = gradients(model)
    model.zero_grad()
    group_gradients(model, groups[:1], GRPOSettings(max_new_tokens=6))
    share = int(groups[0].lengths.sum()) / stats.num_tokens
    for name, gradient in gradients(model).items():
        assert_close(together[name], share * gradient, 1e-12, name)


@pytest.mark.slow
@given(st.permutations(range(3)))
def test_the_order_of_groups_and_of_answers_changes_nothing(order: list[int]) -> None:
    models = [make_model() for _ in range(2)]
    for each in models:
        move(each)
    samples = sample_groups(models[0], PROMPTS, 3, max_new_tokens=6, eos_ids=EOS, seed=2)
    for each, chosen in zip(models, (range(3), order), strict=True):
        groups = [
            make_group(PROMPTS[i], [samples[i][g] for g in chosen], [REWARDS[i][g] for g in chosen], i, 0, [True] * 3)
            for i in chosen
        ]
        group_gradients(each, groups, GRPOSettings(max_new_tokens=6))
    found, wanted = map(gradients, models)
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-12, name)


def test_an_answer_that_is_left_out_is_as_if_it_had_not_been_sampled(model: CausalLM) -> None:
    samples = sample_groups(model, PROMPTS[:1], 3, max_new_tokens=6, eos_ids=EOS, seed=2)[0]
    group_gradients(model, [make_group(PROMPTS[0], samples, REWARDS[1], 1, 0, [True, False, True])], GRPOSettings())
    masked = gradients(model)
    model.zero_grad()
    kept = [samples[0], samples[2]]
    group_gradients(model, [make_group(PROMPTS[0], kept, [REWARDS[1][0], REWARDS[1][2]], 1, 0, [True] * 2)], GRPOSettings())
    for name, gradient in gradients(model).items():
        assert_close(masked[name], gradient, 1e-12, name)
    model.zero_grad()
    assert (
        group_gradients(model, [make_group(PROMPTS[0], samples, REWARDS[1], 1, 0, [False] * 3)], GRPOSettings()).num_tokens == 0
    )
    assert not gradients(model)


def test_the_end_token_is_a_target_and_nothing_behind_it() -> None:
    answers = [Sampled([7, 8, 3], [-1.0, -2.0, -3.0], 0.0), Sampled([9], [-4.0], 0.0)]
    group = make_group([5, 6], answers, [1.0, 0.0], 1, 0, [True] * 2)
    assert group.batch.target_ids[group.batch.target_ids >= 0].tolist() == [7, 8, 3, 9]
    assert group.old_log_probs.tolist() == [-1, -2, -3, -4]


def test_the_reference_is_the_start_and_the_model_comes_back_bit_for_bit() -> None:
    model = make_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    group = sampled(model)[0]
    before = group_log_probs(model, group.batch, 1.0).detach()
    move(model)
    moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert_close(reference_of_group(model, group, start, 1.0), before, 1e-12)
    assert all(torch.equal(p, moved[name]) for name, p in model.named_parameters())
    with pytest.raises(RuntimeError), parameters_as(model, start):
        raise RuntimeError
    assert all(torch.equal(p, moved[name]) for name, p in model.named_parameters())


def test_a_reward_that_is_no_number_leaves_its_answer_alone(model: CausalLM) -> None:
    groups = sampled(model, rewards=[[1.0, math.nan, 0.0]] * 3)
    group_gradients(model, groups, GRPOSettings(max_new_tokens=6))
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())
