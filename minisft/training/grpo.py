"""GRPO's step: groups of sampled answers, their rewards, and the gradient of one update.

A group is one object and one batch: the prompt once, and G segments that continue it; nothing counts strides. Answers are
sampled through the adapter as it is, which is never merged. There is one update for each sampling, so the ratio of new to old
probability is 1 up to rounding and the loss value says nothing: watch the reward. ``preference`` has the formulas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.batching import Batch, collate, collate_shared, shared_prefix
from minisft.data.chat import Encoded
from minisft.generation import Sampled, no_dropout
from minisft.loss import token_log_probs
from minisft.model import CausalLM
from minisft.preference import Advantage, GRPOLoss, advantages, answer_weights, grpo_token_losses, kl_estimate
from minisft.step import supervised_hidden


@dataclass(frozen=True)
class GRPOSettings:
    """The numbers of ``preference.grpo_loss`` and ``advantages``; ``mask_truncated`` leaves out answers that did not stop."""

    loss: GRPOLoss = "dapo"
    advantage: Advantage = "mean"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    temperature: float = 1.0
    max_new_tokens: int = 64
    mask_truncated: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt's sampled answers.

    Attributes:
        row: the row of the data file, from 1.
        batch: the prompt and, behind it, one segment for each answer.
        old_log_probs: (N,) of the sampled tokens, answer after answer, as noted while sampling.
        lengths: (G,) tokens of each answer.
        rewards: (G,) fp64; nan where there is none.
        counted: (G,) bool: answers that take part in the loss.
        reference_log_probs: (N,) under the model as it was before the first step; None without a KL term.
    """

    row: int
    batch: Batch
    old_log_probs: Tensor
    lengths: Tensor
    rewards: Tensor
    counted: Tensor
    reference_log_probs: Tensor | None = None


@dataclass(frozen=True)
class GRPOStats:
    """What one update saw.

    Attributes:
        loss: the loss; about -mean advantage, so near 0 whatever is learned.
        ratio_error: largest |log pi - log pi_old|: what was scored against what was sampled.
        num_clipped: tokens whose ratio left the clip range.
        kl_sum: the KL estimates of all tokens, in nats; 0 without a KL term.
        num_scored: tokens that were computed; those of groups that teach nothing are not.
        num_tokens: sampled tokens in the loss of the whole step.
    """

    loss: float
    ratio_error: float
    num_clipped: float
    kl_sum: float
    num_scored: int
    num_tokens: int

    @property
    def clip_share(self) -> float:
        """Share of tokens whose ratio left the clip range."""
        return self.num_clipped / max(self.num_scored, 1)

    @property
    def kl(self) -> float:
        """Mean of the KL estimate in nats a token."""
        return self.kl_sum / max(self.num_scored, 1)

    @classmethod
    def of_all(cls, parts: Sequence[GRPOStats]) -> GRPOStats:
        """What a step saw whose groups were computed in parts."""
        return cls(
            sum(part.loss for part in parts), max(part.ratio_error for part in parts),
            sum(part.num_clipped for part in parts), sum(part.kl_sum for part in parts),
            sum(part.num_scored for part in parts), parts[0].num_tokens,
        )  # fmt: skip


def group_batch(prompt: Sequence[int], answers: Sequence[Sampled], row: int, pad_id: int) -> Batch:
    """A prompt and its answers as one batch; every sampled token is a target, nothing else is.

    Args:
        prompt: token ids, not empty.
        answers: what was sampled behind it.
        row: the row of the data file.
        pad_id: the tokenizer's padding.

    Returns:
        One batch row; its targets are the answers' tokens, answer after answer.
    """
    rows = [Encoded([*prompt, *a.ids], [False] * len(prompt) + [True] * len(a.ids), row, 0, len(prompt)) for a in answers]
    if prefix_length := shared_prefix(rows):
        return collate_shared(rows, pad_id, prefix_length)
    return collate(rows, pad_id, [range(len(rows))])


def make_group(
    prompt: Sequence[int], answers: Sequence[Sampled], rewards: Sequence[float], row: int, pad_id: int, counted: Sequence[bool]
) -> Group:
    """Put a group together.

    Args:
        prompt: token ids.
        answers: G sampled answers.
        rewards: their rewards, nan for none.
        row: the row of the data file.
        pad_id: the tokenizer's padding.
        counted: which answers take part in the loss.

    Returns:
        The group, on the CPU.
    """
    return Group(
        row=row,
        batch=group_batch(prompt, answers, row, pad_id),
        old_log_probs=torch.tensor([value for answer in answers for value in answer.log_probs]),
        lengths=torch.tensor([len(answer.ids) for answer in answers]),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        counted=torch.tensor(counted, dtype=torch.bool),
    )


def group_log_probs(model: CausalLM, batch: Batch, temperature: float) -> Tensor:
    """Log-probabilities of a group's sampled tokens under softmax(logits / temperature).

    Args:
        model: the decoder.
        batch: of ``group_batch``, on the model's device.
        temperature: as in sampling.

    Returns:
        (N,) in fp32 at least, answer after answer.
    """
    hidden, target_ids = supervised_hidden(model, batch)
    return token_log_probs(hidden, model.loss_head, target_ids, temperature)


def group_gradients(
    model: CausalLM, groups: Sequence[Group], settings: GRPOSettings, other_lengths: Sequence[int] = ()
) -> GRPOStats:
    """Backward through every group of an optimizer step.

    The denominators count all answers of the step. A group whose advantages are all 0 has a gradient of exactly 0 and is not
    computed, unless there is a KL term.

    Args:
        model: the decoder.
        groups: the step's groups, or a part of them.
        settings: the loss.
        other_lengths: tokens of each answer that counts in the step's other groups, where ``groups`` are a part.

    Returns:
        What the update saw, or this part of it; no gradient at all where no answer counts.
    """
    counted = [group.lengths[group.counted] for group in groups]
    all_lengths = torch.cat([*counted, torch.tensor(other_lengths, dtype=torch.int64)])
    if not len(all_lengths):
        return GRPOStats(0.0, 0.0, 0.0, 0.0, 0, 0)
    step_weights = answer_weights(all_lengths, settings.loss, settings.max_new_tokens)
    totals = torch.zeros(3, dtype=torch.float64)
    ratio_error, scored = 0.0, 0
    for group, weights in zip(groups, step_weights.split([*map(len, counted), len(other_lengths)]), strict=False):
        A = advantages(torch.where(group.counted, group.rewards, torch.nan), settings.advantage)
        if not (A.any() or settings.beta):
            continue
        loss, found, error = _one_group(model, group, A, weights, settings)
        loss.backward()
        totals += found
        ratio_error, scored = max(ratio_error, error), scored + int(group.lengths.sum())
    loss_sum, clipped, kl = totals.tolist()
    return GRPOStats(loss_sum, ratio_error, clipped, kl, scored, int(all_lengths.sum()))


def _one_group(
    model: CausalLM, group: Group, A: Tensor, weights: Tensor, settings: GRPOSettings
) -> tuple[Tensor, Tensor, float]:
    """A group's part of the step's loss; (its value, clipped tokens, summed KL); largest |log pi - log pi_old|."""
    device = model.device
    log_probs = group_log_probs(model, group.batch.to(device), settings.temperature)
    old = group.old_log_probs.to(log_probs)
    answer_weight = torch.zeros_like(A).masked_scatter(group.counted, weights)
    per_token = grpo_token_losses(
        log_probs, old, A.repeat_interleave(group.lengths).to(device), epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high, beta=settings.beta,
        reference_log_probs=None if group.reference_log_probs is None else group.reference_log_probs.to(log_probs),
    )  # fmt: skip
    loss = (per_token * answer_weight.repeat_interleave(group.lengths).to(per_token)).sum()
    difference = (log_probs - old).detach()
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    rho = difference.exp()
    clipped = ((rho < 1 - settings.epsilon) | (rho > 1 + high)).sum()
    kl = torch.zeros(())
    if group.reference_log_probs is not None:
        kl = kl_estimate(log_probs.detach(), group.reference_log_probs.to(log_probs)).sum()
    facts = torch.stack([loss.detach().cpu().double(), clipped.cpu().double(), kl.cpu().double()])
    return loss, facts, float(difference.abs().max())


@contextlib.contextmanager
def parameters_as(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with some parameters set to ``values`` for a while: the reference of a KL term, without a second model."""
    parameters = dict(model.named_parameters())
    now = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in now.items():
                parameters[name].copy_(value)


def reference_of_group(model: CausalLM, group: Group, start: Mapping[str, Tensor], temperature: float) -> Tensor:
    """(N,) log-probabilities of a group's tokens under the model as it was before the first step.

    Args:
        model: the decoder as it is now; it is the same afterwards, bit for bit.
        group: the group.
        start: the trained parameters as they were, by name.
        temperature: as in sampling.

    Returns:
        Log-probabilities on the CPU, without gradient.
    """
    with parameters_as(model, start), torch.no_grad(), no_dropout(model):
        return group_log_probs(model, group.batch.to(model.device), temperature).cpu()
