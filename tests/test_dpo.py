"""A pair as one batch, its log-probabilities by hand, and the gradient of a step against autograd of the formula."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_close, build
from tiny_folder import CONFIG
from torch import Tensor

from minisft.config import LoRAConfig
from minisft.data.chat import Encoded
from minisft.model import CausalLM
from minisft.preference import dpo_loss
from minisft.surgery import adapters_off, apply_lora_
from minisft.training.dpo import (
    DPOSettings,
    EncodedPair,
    PairStats,
    answer_log_probs,
    pair_batch,
    pair_batches,
    pair_gradients,
    reference_log_probs,
)  # fmt: skip

tokens = st.integers(0, 255)
answers = st.lists(tokens, min_size=1, max_size=5)
pairs = st.builds(
    lambda prompt, chosen, rejected, row: pair(prompt, chosen, rejected, row),
    st.lists(tokens, min_size=1, max_size=7), answers, answers, st.just(1),
)  # fmt: skip
PAIRS = [([5, 6, 7, 8], [1, 2, 3, 9], [1, 4, 9]), ([5, 6], [3, 9], [4, 4, 4, 9]), ([8], [9], [2, 9])]


def encoded(prompt: list[int], answer: list[int], row: int) -> Encoded:
    flags = [False] * len(prompt) + [True] * len(answer)
    return Encoded([*prompt, *answer], flags, row, 0, len(prompt))


def pair(prompt: list[int], chosen: list[int], rejected: list[int], row: int) -> EncodedPair:
    return EncodedPair(encoded(prompt, chosen, row), encoded(prompt, rejected, row))


def make_model(seed: int = 0) -> CausalLM:
    model = build(CONFIG, torch.float64)
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0), seed)
    return model


def move(model: CausalLM, seed: int = 1) -> None:
    """As if trained: an adapter that changes the model."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3)


def by_hand(model: CausalLM, side: Encoded) -> Tensor:
    """log pi(y|x) of one answer, the chat alone in its batch, full logits."""
    logits = model(torch.tensor([side.input_ids]))[0].log_softmax(-1)
    return torch.stack([logits[i - 1, side.input_ids[i]] for i, flag in enumerate(side.supervised) if flag]).sum()


@pytest.fixture(scope="module")
def model() -> CausalLM:
    made = make_model()
    move(made)
    return made


@given(pairs)
def test_log_probs_of_a_pair_equal_each_answer_alone(model: CausalLM, one: EncodedPair) -> None:
    sums, lengths = answer_log_probs(model, pair_batch(one, 0))
    assert_close(sums, torch.stack([by_hand(model, one.chosen), by_hand(model, one.rejected)]))
    assert lengths.tolist() == [one.chosen.num_targets, one.rejected.num_targets]


def test_the_prompt_is_stored_once() -> None:
    batch = pair_batch(pair([5, 6, 7, 8], [1, 2], [3], 1), 0)
    assert batch.prefix_length == 3  # the prompt's last token predicts either answer, so each has its own
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2, 8, 3]]


@pytest.mark.parametrize("settings", [
    DPOSettings(), DPOSettings(beta=0.5, label_smoothing=0.1), DPOSettings(loss="ipo"), DPOSettings(loss="hinge"),
    DPOSettings(loss="robust", label_smoothing=0.2), DPOSettings(rpo_alpha=0.7),
])  # fmt: skip
def test_the_gradient_of_a_step_is_that_of_the_formula(settings: DPOSettings) -> None:
    ours, theirs = make_model(), make_model()
    batches = [pair_batch(pair(*sides, row), 0) for row, sides in enumerate(PAIRS, 1)]
    reference = reference_log_probs(ours, batches)
    for each in (ours, theirs):
        move(each)
    stats = pair_gradients(ours, batches, reference, settings)
    losses = []
    for row, sides in enumerate(PAIRS, 1):
        one = pair(*sides, row)
        with adapters_off(theirs), torch.no_grad():
            ref = [by_hand(theirs, side)[None] for side in (one.chosen, one.rejected)]
        now = [by_hand(theirs, side)[None] for side in (one.chosen, one.rejected)]
        n = {"chosen_lengths": torch.tensor([len(sides[1])]), "rejected_lengths": torch.tensor([len(sides[2])])}
        values = {k: getattr(settings, k) for k in ("beta", "loss", "label_smoothing", "rpo_alpha")}
        losses.append(dpo_loss(*now, *ref, **n, **values))
    total = torch.cat(losses).mean()
    total.backward()
    assert stats.loss == pytest.approx(total.item(), rel=1e-12)
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, 1e-11, name)


@pytest.mark.parametrize("max_tokens", [1, 24, 1000])
def test_pairs_that_share_a_batch_change_nothing(max_tokens: int) -> None:
    """As many to a batch as fit, against each pair alone, and the reference against each answer's full logits."""
    sides = [*PAIRS, ([1, 2, 3, 4, 5], [6, 9], [7, 9]), ([7, 7, 7], [1, 9], [2, 3, 9]), ([4, 3, 2, 1], [5], [6, 9])]
    made = [pair(*each, row) for row, each in enumerate(sides, 1)]
    alone, together = make_model(), make_model()
    singles = [pair_batch(one, 0) for one in made]
    batches = pair_batches(made, [one.row for one in made], 0, max_tokens)
    assert sorted(row for batch in batches for row in batch.rows) == [1, 2, 3, 4, 5, 6]
    assert all(batch.input_ids.numel() <= max_tokens or len(batch.rows) == 1 for batch in batches)
    assert (max_tokens == 1) == all(len(batch.rows) == 1 for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(batch.num_tokens for batch in singles)
    reference = reference_log_probs(together, batches)
    for one in made:
        wanted = torch.stack([by_hand(together, one.chosen), by_hand(together, one.rejected)])
        assert_close(torch.tensor(reference[one.row], dtype=torch.float64), wanted.detach())
    for each in (alone, together):
        move(each)
    settings = DPOSettings(rpo_alpha=0.7, beta=0.5)
    stats = [pair_gradients(m, b, reference, settings) for m, b in ((alone, singles), (together, batches))]
    assert astuple(stats[0]) == pytest.approx(astuple(stats[1]), rel=1e-10)
    wanted_gradients = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    for name, p in together.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, wanted_gradients[name], 1e-11, name)


def test_pairs_are_batched_with_few_places_wasted() -> None:
    """Prompts of one length lie together, so that each is stored once."""
    made = [pair(list(range(1, 3 + n % 2 * 10)), [1, 9], [2, 9], n) for n in range(6)]
    batches = pair_batches(made, range(6), 0, 51)
    assert [batch.prefix_length for batch in batches] == [11, 1]
    assert sorted(map(sorted, (batch.rows for batch in batches))) == [[0, 2, 4], [1, 3, 5]]


def test_order_and_cut_of_a_step_change_nothing() -> None:
    models = [make_model() for _ in range(2)]
    batches = [pair_batch(pair(*sides, row), 0) for row, sides in enumerate(PAIRS, 1)]
    reference = reference_log_probs(models[0], batches)
    for each, order in zip(models, (batches, batches[::-1]), strict=True):
        move(each)
        pair_gradients(each, order, reference, DPOSettings(rpo_alpha=1.0))
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        if a.grad is not None:
            assert_close(a.grad, b.grad, 1e-12, name)


def test_before_the_first_step() -> None:
    """Margins 0, no wins, ln 2, and a gradient; the reference is what the base says with adapters off."""
    model = make_model()
    batches = [pair_batch(pair(*sides, row), 0) for row, sides in enumerate(PAIRS, 1)]
    reference = reference_log_probs(model, batches)
    stats = pair_gradients(model, batches, reference, DPOSettings())
    assert astuple(stats)[:5] == pytest.approx((math.log(2), 0, 0, 0, 0), abs=1e-12)
    assert stats.chosen_change == pytest.approx(0, abs=1e-12)
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    move(model)
    with adapters_off(model):
        assert reference_log_probs(model, batches) == reference
    assert reference_log_probs(model, batches) != reference


def test_equal_answers_teach_nothing() -> None:
    model = make_model()
    move(model)
    batch = pair_batch(pair([5, 6], [1, 9], [1, 9], 1), 0)
    pair_gradients(model, [batch], {1: (-3.0, -5.0)}, DPOSettings())
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-15 for p in model.parameters())


def test_numbers_of_the_log() -> None:
    stats = PairStats(0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    assert stats.metrics() == {
        "rewards/chosen": 1.0, "rewards/rejected": 2.0, "rewards/margins": 3.0, "rewards/accuracies": 4.0,
        "logps/chosen": 5.0, "logps/rejected": 6.0, "logps/chosen_change": 7.0,
    }  # fmt: skip
