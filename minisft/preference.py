"""The losses of preference alignment: DPO on pairs of answers, GRPO on groups of answers with rewards.

Both are functions of log-probabilities alone (``loss.token_log_probs``): tensors in, tensors out. Where those numbers come
from, what the reference is and when the optimizer steps is decided in ``training/``. A newcomer leaves with one idea: both
gradients are a weighted cross-entropy. DPO weights a whole answer by how wrong the model's preference is, GRPO each token by
how much better than its group the answer was.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DPOLoss = Literal["sigmoid", "ipo", "hinge", "robust"]
GRPOLoss = Literal["dapo", "dr_grpo", "grpo"]
Advantage = Literal["mean", "zscore"]
STD_EPSILON = 1e-4  # added to the standard deviation of a group, as TRL does


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 0.1,
    loss: DPOLoss = "sigmoid",
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
) -> Tensor:
    """The loss of each pair (x, y_c, y_r); the step's loss is their mean.

    With d = [log pi(y_c|x) - log pi_ref(y_c|x)] - [log pi(y_r|x) - log pi_ref(y_r|x)] and label smoothing e:

    sigmoid: -(1 - e) log sigma(beta d) - e log sigma(-beta d);
    robust:  [-(1 - e) log sigma(beta d) + e log sigma(-beta d)] / (1 - 2e);
    hinge:   max(0, 1 - beta d);
    ipo:     (d' - 1 / (2 beta))^2, d' being d with each log ratio divided by its own number of tokens.

    To each, ``rpo_alpha`` adds alpha * (-log pi(y_c|x) / |y_c|), which keeps the chosen answer likely.

    Args:
        chosen, rejected: (P,) log pi(y|x), summed over the answer's tokens, its end token included.
        reference_chosen, reference_rejected: (P,) the same under the model as it was before the first step.
        chosen_lengths, rejected_lengths: (P,) tokens in each answer; needed by ``ipo`` and by ``rpo_alpha``.
        beta: how strongly a pair pulls away from the reference, > 0.
        loss: the formula.
        label_smoothing: e, the share of pairs believed to be labelled the wrong way round, in [0, 0.5).
        rpo_alpha: weight of the added cross-entropy on the chosen answer, >= 0.

    Returns:
        (P,), differentiable in ``chosen`` and ``rejected``.

    Raises:
        ValueError: an unknown loss, a number out of range, missing or empty lengths.

    Ref: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; robust: Chowdhury et al. 2024, arXiv:2403.00409; hinge: Zhao et al.
    2023, arXiv:2305.10425; ipo: Azar et al. 2023, arXiv:2310.12036, divided by length as its authors advise; added
    cross-entropy: Pang et al. 2024, arXiv:2404.19733.
    """
    _check_dpo(beta, loss, label_smoothing, rpo_alpha)
    chosen_ratio, rejected_ratio = chosen - reference_chosen, rejected - reference_rejected
    d = chosen_ratio - rejected_ratio
    if loss == "ipo":
        d_mean = chosen_ratio / _lengths(chosen_lengths) - rejected_ratio / _lengths(rejected_lengths)
        value = (d_mean - 1 / (2 * beta)) ** 2
    elif loss == "hinge":
        value = torch.relu(1 - beta * d)
    else:
        kept, flipped = (1 - label_smoothing) * logsigmoid(beta * d), label_smoothing * logsigmoid(-beta * d)
        value = -(kept + flipped) if loss == "sigmoid" else -(kept - flipped) / (1 - 2 * label_smoothing)
    if rpo_alpha:
        value = value - rpo_alpha * chosen / _lengths(chosen_lengths)
    return value


def _check_dpo(beta: float, loss: str, label_smoothing: float, rpo_alpha: float) -> None:
    if loss not in get_args(DPOLoss):
        raise ValueError(f"loss {loss!r} is not one of {', '.join(get_args(DPOLoss))}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta {beta} is not a positive number")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 0.5)")
    if label_smoothing and loss not in ("sigmoid", "robust"):
        raise ValueError(f"label_smoothing has no meaning for {loss}")
    if not (math.isfinite(rpo_alpha) and rpo_alpha >= 0):
        raise ValueError(f"rpo_alpha {rpo_alpha} is not zero or more")


def _lengths(lengths: Tensor | None) -> Tensor:
    if lengths is None or not bool((lengths > 0).all()):
        raise ValueError("this loss needs the number of tokens of each answer, at least 1 each")
    return lengths


def advantages(rewards: Tensor, kind: Advantage = "mean") -> Tensor:
    """How much better than its group each answer was.

    mean: A_i = r_i - mean r; zscore: A_i = (r_i - mean r) / (std r + 1e-4), std with G - 1. A reward that is not finite stays
    out of mean and std, and its answer's advantage is 0. A group of equal rewards has advantages of exactly 0.

    Args:
        rewards: (G,) the rewards of one prompt's answers.
        kind: whether the spread of the group is divided out.

    Returns:
        (G,) fp64.

    Ref: Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (zscore); Liu et al. 2025, arXiv:2503.20783, section 3.2 (mean).
    """
    r = rewards.to(torch.float64)
    known = r.isfinite()
    found = torch.zeros_like(r)
    values = r[known]
    if len(values) < 2 or bool((values == values[0]).all()):  # compared, not subtracted: the mean of equal numbers may be off
        return found
    centred = values - values.mean()
    found[known] = centred / (values.std() + STD_EPSILON) if kind == "zscore" else centred
    return found


def grpo_token_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    token_advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    reference_log_probs: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate of each sampled token.

    l_t = -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A) + beta k_t, with rho_t = exp(log pi - log pi_old) and
    k_t = e^u - u - 1, u = log pi_ref - log pi (an unbiased, non-negative estimate of KL(pi || pi_ref); its gradient is not
    the gradient of that KL).

    Args:
        log_probs: (N,) log pi of the sampled tokens, end tokens included.
        old_log_probs: (N,) the same as noted while sampling; carries no gradient.
        token_advantages: (N,) the advantage of the answer that each token belongs to.
        epsilon: how far below 1 a ratio may fall before it is clipped, in (0, 1).
        epsilon_high: how far above 1; None for ``epsilon``.
        beta: weight of the KL estimate, >= 0.
        reference_log_probs: (N,) log pi_ref; needed where beta is not 0.

    Returns:
        (N,), differentiable in ``log_probs``.

    Raises:
        ValueError: beta without reference.

    Ref: Shao et al. 2024, arXiv:2402.03300, eqs. 3 and 4; eps_high: Yu et al. 2025, arXiv:2503.14476, section 3.1.
    """
    A = token_advantages.to(log_probs.dtype)
    rho = torch.exp(log_probs - old_log_probs)
    clipped = rho.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    value = -torch.minimum(rho * A, clipped * A)
    if beta:
        if reference_log_probs is None:
            raise ValueError("beta needs reference_log_probs")
        value = value + beta * kl_estimate(log_probs, reference_log_probs)
    return value


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """k3 = e^u - u - 1 with u = log pi_ref - log pi, of each token: >= 0, and KL(pi || pi_ref) on average over pi.

    Ref: Shao et al. 2024, arXiv:2402.03300, eq. 4.
    """
    u = reference_log_probs - log_probs
    return torch.expm1(u) - u


def answer_weights(lengths: Tensor, loss: GRPOLoss = "dapo", max_new_tokens: int | None = None) -> Tensor:
    """The weight w_i of each token of answer i in the step's loss, sum_i sum_t w_i l_t.

    dapo: 1 / (tokens of the whole step); grpo: 1 / (answers * own length); dr_grpo: 1 / (answers * max_new_tokens).

    Args:
        lengths: (A,) sampled tokens of every answer of the step, over all groups and micro-batches.
        loss: which denominator.
        max_new_tokens: the most that an answer may have; needed by ``dr_grpo``, where it is a factor of the learning rate.

    Returns:
        (A,) fp64.

    Raises:
        ValueError: an unknown loss, an empty answer, ``dr_grpo`` without ``max_new_tokens``.

    Ref: dapo: Yu et al. 2025, arXiv:2503.14476, section 3.3; grpo: Shao et al. 2024, arXiv:2402.03300, eq. 3; dr_grpo: Liu et
    al. 2025, arXiv:2503.20783, section 3.2.
    """
    n = lengths.to(torch.float64)
    if not bool((n > 0).all()):
        raise ValueError("an answer without a token has no weight")
    if loss == "dapo":
        return torch.full_like(n, 1.0) / n.sum()
    if loss == "grpo":
        return 1.0 / (len(n) * n)
    if loss != "dr_grpo":
        raise ValueError(f"loss {loss!r} is not one of {', '.join(get_args(GRPOLoss))}")
    if not max_new_tokens:
        raise ValueError("dr_grpo needs max_new_tokens")
    return torch.full_like(n, 1.0 / (len(n) * max_new_tokens))


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    answer_advantages: Tensor,
    lengths: Tensor,
    *,
    loss: GRPOLoss = "dapo",
    max_new_tokens: int | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    reference_log_probs: Tensor | None = None,
) -> Tensor:
    """The loss of one step over all its answers: sum_i w_i sum_t l_t.

    Args:
        log_probs, old_log_probs: (N,) of all sampled tokens, answer after answer.
        answer_advantages: (A,) see ``advantages``; each group by itself.
        lengths: (A,) tokens of each answer; they sum to N.
        loss, max_new_tokens: the denominator, see ``answer_weights``.
        epsilon, epsilon_high, beta, reference_log_probs: see ``grpo_token_losses``.

    Returns:
        A scalar. On the first pass after sampling its value says nothing (about -mean A), its gradient everything.

    Ref: Shao et al. 2024, arXiv:2402.03300, eq. 3.
    """
    per_token = grpo_token_losses(
        log_probs,
        old_log_probs,
        answer_advantages.repeat_interleave(lengths),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        beta=beta,
        reference_log_probs=reference_log_probs,
    )
    weights = answer_weights(lengths, loss, max_new_tokens).to(per_token.dtype)
    return (per_token * weights.repeat_interleave(lengths)).sum()
