"""DPO's and GRPO's losses against golden values, closed forms, enumeration and laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import randn
from torch import Tensor
from torch.testing import assert_close

from minisft.preference import advantages, answer_weights, dpo_loss, grpo_loss, grpo_token_losses, kl_estimate

numbers = st.floats(-30, 0)
betas = st.sampled_from([0.01, 0.1, 0.5, 2.0])
LOSSES = ("sigmoid", "ipo", "hinge", "robust")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def golden(loss: str, **settings: float) -> Tensor:
    """log pi -12 / -15, reference -13 / -14, lengths 4 / 5: d = 2, and 1/4 + 1/5 by token."""
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([5])}
    return dpo_loss(f64(-12), f64(-15), f64(-13), f64(-14), beta=0.1, loss=loss, **lengths, **settings)


@pytest.mark.parametrize(
    ("loss", "settings", "value"),
    [
        ("sigmoid", {}, math.log(1 + math.exp(-0.2))),
        ("hinge", {}, 0.8),
        ("ipo", {}, (0.25 + 0.2 - 5.0) ** 2),
        ("sigmoid", {"label_smoothing": 0.1}, 0.618139),
        ("robust", {"label_smoothing": 0.1}, 0.573139),
        ("robust", {}, 0.598139),
        ("sigmoid", {"rpo_alpha": 0.5}, 0.598139 + 0.5 * 12 / 4),
    ],
)
def test_golden_values(loss: str, settings: dict[str, float], value: float) -> None:
    assert golden(loss, **settings).item() == pytest.approx(value, abs=1e-6)


def test_the_gradient_is_a_weighted_cross_entropy() -> None:
    """dL/dlog pi_c = -beta sigma(-beta d), and its negative for the rejected answer."""
    chosen, rejected = f64(-12).requires_grad_(), f64(-15).requires_grad_()
    dpo_loss(chosen, rejected, f64(-13), f64(-14), beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.0450166, abs=1e-7)
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.2)), rel=1e-12)
    assert rejected.grad.item() == -chosen.grad.item()


@given(c=numbers, r=numbers, beta=betas)
def test_at_the_reference_every_loss_has_its_known_value_and_a_gradient(c: float, r: float, beta: float) -> None:
    n = {"chosen_lengths": torch.tensor([3]), "rejected_lengths": torch.tensor([7])}
    start = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * beta**2)}
    for loss, expected in start.items():
        chosen = f64(c).requires_grad_()
        value = dpo_loss(chosen, f64(r), f64(c), f64(r), beta=beta, loss=loss, **n)
        assert value.item() == pytest.approx(expected, rel=1e-12)
        (gradient,) = torch.autograd.grad(value.sum(), [chosen])
        assert gradient.item() < 0


@given(c=numbers, r=numbers, shift=st.floats(-5, 5), beta=betas, e=st.floats(0, 0.49))
def test_laws_of_the_pair(c: float, r: float, shift: float, beta: float, e: float) -> None:
    """A shift of both references changes nothing; swapped sides differ by beta d; robust undoes flips on average."""
    zero = f64(0.0)
    here = dpo_loss(f64(c), f64(r), zero, zero, beta=beta)
    assert_close(here, dpo_loss(f64(c), f64(r), f64(shift), f64(shift), beta=beta), rtol=1e-9, atol=1e-9)
    swapped = dpo_loss(f64(r), f64(c), zero, zero, beta=beta)
    assert (here - swapped).item() == pytest.approx(-beta * (c - r), abs=1e-9)
    settings = {"beta": beta, "loss": "robust", "label_smoothing": e}
    right, flipped = dpo_loss(f64(c), f64(r), zero, zero, **settings), dpo_loss(f64(r), f64(c), zero, zero, **settings)
    assert ((1 - e) * right + e * flipped).item() == pytest.approx(here.item(), rel=1e-6, abs=1e-9)


def trained(loss: str, steps: int = 4000, lr: float = 1.0, **settings: float) -> float:
    """d of a table with two answers, trained to the end from the uniform policy."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reference = f64(0.5, 0.5).log()
    one = torch.tensor([1])
    for _ in range(steps):
        c, r = logits.log_softmax(0)[:1], logits.log_softmax(0)[1:]
        value = dpo_loss(
            c, r, reference[:1], reference[1:], loss=loss, chosen_lengths=one, rejected_lengths=one, **settings
        ).sum()
        (gradient,) = torch.autograd.grad(value, [logits])
        with torch.no_grad():
            logits -= lr * gradient
    return float((logits[0] - logits[1]).detach())


@pytest.mark.slow
def test_the_optimum_of_a_table_is_the_closed_form() -> None:
    assert trained("sigmoid", beta=0.5, label_smoothing=0.1) == pytest.approx(math.log(0.9 / 0.1) / 0.5, rel=1e-6)
    assert trained("ipo", beta=0.5, steps=200, lr=0.1) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.slow
def test_plain_sigmoid_on_one_sided_pairs_has_no_optimum() -> None:
    assert trained("sigmoid", beta=0.5, steps=4000) > trained("sigmoid", beta=0.5, steps=400) + 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"beta": 0.0}, {"beta": math.nan}, {"loss": "dpo"}, {"label_smoothing": 0.5}, {"label_smoothing": 0.1, "loss": "hinge"},
        {"rpo_alpha": -1.0}, {"loss": "ipo"}, {"rpo_alpha": 1.0, "chosen_lengths": torch.tensor([0])},
    ],
)  # fmt: skip
def test_bad_settings(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        dpo_loss(f64(-1), f64(-2), f64(-1), f64(-2), **bad)


# ---- GRPO ------------------------------------------------------------------------------------------------------------


def test_golden_advantages() -> None:
    rewards = f64(1, 0, 0, 1, 0, 0, 0, 0)
    assert advantages(rewards).tolist() == [0.75, -0.25, -0.25, 0.75, *[-0.25] * 4]
    z = advantages(rewards, "zscore")
    assert z[0].item() == pytest.approx(1.619835, abs=1e-6)
    assert z[1].item() == pytest.approx(-0.539945, abs=1e-6)
    # Leave-one-out (RLOO): r_i minus the mean of the others = G / (G - 1) times the centred reward.
    others = torch.stack([rewards[torch.arange(8) != i].mean() for i in range(8)])
    assert_close(rewards - others, 8 / 7 * advantages(rewards))


@given(value=st.floats(-1e6, 1e6), G=st.integers(2, 9), kind=st.sampled_from(["mean", "zscore"]))
@example(value=0.7, G=3, kind="mean")  # the mean of these is 1.1e-16 off
@example(value=1e6 + 0.1, G=7, kind="zscore")
def test_equal_rewards_teach_exactly_nothing(value: float, G: int, kind: str) -> None:
    found = advantages(torch.full((G,), value, dtype=torch.float64), kind)
    assert not found.any()
    log_probs = randn(G, seed=1).requires_grad_()
    loss = grpo_loss(log_probs, log_probs.detach(), found, torch.ones(G, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, [log_probs])
    assert not gradient.any()


@given(rewards=st.lists(st.integers(-4, 4), min_size=2, max_size=8), shift=st.integers(-9, 9), factor=st.integers(2, 5))
def test_shift_and_scale_of_a_group(rewards: list[int], shift: int, factor: int) -> None:
    r = f64(*rewards)
    assert_close(advantages(r + shift), advantages(r), rtol=1e-9, atol=1e-9)
    assert_close(advantages(r * factor), factor * advantages(r), rtol=1e-9, atol=1e-9)
    if len(set(rewards)) > 1:
        assert_close(advantages(r * 1e6, "zscore"), advantages(r * 1e7, "zscore"), rtol=1e-6, atol=1e-9)


def test_a_reward_that_is_no_number_has_no_say() -> None:
    with_it, without = advantages(f64(1, math.nan, 0, math.inf)), advantages(f64(1, 0))
    assert with_it.tolist() == [without[0], 0, without[1], 0]
    assert not advantages(f64(1, math.nan)).any()  # one reward alone is no comparison


@pytest.mark.parametrize(
    ("A", "rho", "moves"), [(1.0, 1.3, False), (-1.0, 1.3, True), (-1.0, 0.7, False), (1.0, 0.7, True), (1.0, 1.1, True)]
)
def test_the_clip_table(A: float, rho: float, moves: bool) -> None:
    log_probs = f64(math.log(rho)).requires_grad_()
    loss = grpo_token_losses(log_probs, f64(0.0), f64(A)).sum()
    (gradient,) = torch.autograd.grad(loss, [log_probs])
    assert gradient.item() == pytest.approx(-A * rho if moves else 0.0)


def test_a_wider_upper_clip() -> None:
    log_probs = f64(math.log(1.25)).requires_grad_()
    loss = grpo_token_losses(log_probs, f64(0.0), f64(1.0), epsilon_high=0.28).sum()
    assert torch.autograd.grad(loss, [log_probs])[0].item() == pytest.approx(-1.25)


def test_the_kl_estimate_by_enumeration() -> None:
    logits, reference = randn(7, seed=3).requires_grad_(), randn(7, seed=4).log_softmax(0)
    log_probs = logits.log_softmax(0)
    k = kl_estimate(log_probs, reference)
    assert bool((k >= 0).all())
    assert not kl_estimate(reference, reference).any()
    p = log_probs.exp()
    assert_close((p * k).sum(), (p * (log_probs - reference)).sum())
    leaf = log_probs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(kl_estimate(leaf, reference).sum(), [leaf])
    assert_close(slope, 1 - (reference - leaf.detach()).exp())


def test_denominators() -> None:
    n = torch.tensor([2, 6])
    assert answer_weights(n, "dapo").tolist() == [1 / 8, 1 / 8]
    assert answer_weights(n, "grpo").tolist() == [1 / 4, 1 / 12]
    assert answer_weights(n, "dr_grpo", 16).tolist() == [1 / 32, 1 / 32]
    for bad in ({"loss": "bnpo"}, {"loss": "dr_grpo"}):
        with pytest.raises(ValueError, match=r"\w"):
            answer_weights(n, **bad)
    with pytest.raises(ValueError, match="without a token"):
        answer_weights(torch.tensor([0, 1]))


def test_the_estimate_is_the_exact_policy_gradient_on_average() -> None:
    """Two tokens, answers of three: all groups of two enumerated. The centred estimate needs the factor G / (G - 1)."""
    table = randn(3, 2, seed=5).requires_grad_()  # logits of each position, whatever came before
    answers = list(itertools.product(range(2), repeat=3))
    reward = {a: float(sum(a) ** 2 - a[0]) for a in answers}
    log_probs = torch.stack([table.log_softmax(1)[range(3), list(a)] for a in answers])  # (8, 3)
    p = log_probs.sum(1).exp()
    (exact,) = torch.autograd.grad((p * f64(*reward.values())).sum(), [table], retain_graph=True)

    G, estimate = 2, torch.zeros_like(table)
    for group in itertools.product(range(8), repeat=G):
        chosen = log_probs[list(group)]
        A = advantages(f64(*(reward[answers[i]] for i in group)))
        loss = grpo_loss(chosen.flatten(), chosen.detach().flatten(), A, torch.full((G,), 3), loss="dr_grpo", max_new_tokens=1)
        (gradient,) = torch.autograd.grad(loss, [table], retain_graph=True)
        estimate -= p[list(group)].prod().detach() * gradient
    assert_close(estimate * G / (G - 1), exact, rtol=1e-9, atol=1e-12)
