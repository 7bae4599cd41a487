"""DPO's step: two answers to one prompt, scored in one pass, and the gradient of their preference.

A pair is one batch: the prompt once, and two segments that continue it. The reference is what the model itself said of every
pair before the first step, computed once; no second model exists. ``preference.dpo_loss`` has the formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minisft.batching import Batch, collate, collate_shared, shared_prefix
from minisft.data.chat import Encoded
from minisft.generation import no_dropout
from minisft.loss import IGNORE_INDEX, token_log_probs
from minisft.model import CausalLM
from minisft.preference import DPOLoss, dpo_loss

# TRL's names for the fields of ``PairStats`` after the loss; the last one is ours.
METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "logps/chosen_change",
)  # fmt: skip


@dataclass(frozen=True)
class EncodedPair:
    """Two encoded chats that differ in their last turn; only that turn is flagged in either."""

    chosen: Encoded
    rejected: Encoded

    @property
    def row(self) -> int:
        """The row of the data file, from 1."""
        return self.chosen.row


@dataclass(frozen=True)
class DPOSettings:
    """The numbers of ``preference.dpo_loss``."""

    beta: float = 0.1
    loss: DPOLoss = "sigmoid"
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0


@dataclass(frozen=True)
class PairStats:
    """Means over pairs; ``METRICS`` has the names that the log uses.

    Attributes:
        loss: the loss, see ``dpo_loss``.
        reward_chosen, reward_rejected: beta * (log pi - log pi_ref) of the two answers.
        reward_margin: their difference.
        reward_accuracy: share of pairs whose margin is above 0; a tie is not a win.
        logp_chosen, logp_rejected: log pi of the two answers, in nats.
        chosen_change: log pi - log pi_ref of the chosen answer, in nats per token.
    """

    loss: float
    reward_chosen: float
    reward_rejected: float
    reward_margin: float
    reward_accuracy: float
    logp_chosen: float
    logp_rejected: float
    chosen_change: float

    def metrics(self) -> dict[str, float]:
        """Everything but the loss, by the names that ``metrics.jsonl`` uses."""
        names = (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        )
        return dict(zip((*names, "logps/chosen_change"), [getattr(self, f.name) for f in fields(self)[1:]], strict=True))


def pair_batch(pair: EncodedPair, pad_id: int) -> Batch:
    """One pair as one batch: what both sides begin with is stored once, and each answer is a segment of its own."""
    rows = (pair.chosen, pair.rejected)
    if prefix_length := shared_prefix(rows):
        return collate_shared(rows, pad_id, prefix_length)
    return collate(rows, pad_id, [[0, 1]])


def answer_log_probs(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """log pi(y|x) of the answers in a batch of ``pair_batch``: chosen, then rejected.

    Args:
        model: the decoder, its adapters as they are.
        batch: one pair, on the model's device.

    Returns:
        (2,) sums over each answer's tokens, in fp32 at least, and (2,) how many tokens each has.
    """
    hidden = model.hidden(batch.input_ids, segment_ids=batch.segment_ids, prefix_length=batch.prefix_length)
    log_probs = token_log_probs(hidden, model.lm_head, batch.target_ids)
    first = 2 if batch.prefix_length else 1
    side = batch.segment_ids[batch.target_ids != IGNORE_INDEX] - first
    sums = torch.zeros(2, dtype=log_probs.dtype, device=log_probs.device).index_add(0, side, log_probs)
    return sums, torch.bincount(side, minlength=2)


def reference_log_probs(model: CausalLM, batches: Iterable[Batch]) -> dict[int, tuple[float, float]]:
    """row -> (chosen, rejected) log pi under the model as it is now, dropout off. Call it before the first step."""
    with torch.no_grad(), no_dropout(model):
        sums = {batch.rows[0]: answer_log_probs(model, batch.to(model.model.norm.weight.device))[0] for batch in batches}
    return {row: (float(values[0]), float(values[1])) for row, values in sums.items()}


def pair_gradients(
    model: CausalLM,
    batches: Sequence[Batch],
    reference: Mapping[int, tuple[float, float]],
    settings: DPOSettings,
    backward: bool = True,
) -> PairStats:
    """Backward through every pair of an optimizer step; the loss is the mean over the step's pairs.

    Args:
        model: the decoder.
        batches: one pair each.
        reference: row -> (chosen, rejected) log pi_ref.
        settings: the loss.
        backward: accumulate gradients; without it (validation) only the numbers come back.

    Returns:
        Means over the pairs.
    """
    columns: list[Tensor] = []
    for batch in batches:
        sums, lengths = answer_log_probs(model, batch)
        ref = torch.tensor(reference[batch.rows[0]], dtype=sums.dtype, device=sums.device)
        loss = dpo_loss(
            *sums.split(1), *ref.split(1), chosen_lengths=lengths[:1], rejected_lengths=lengths[1:],
            beta=settings.beta, loss=settings.loss, label_smoothing=settings.label_smoothing, rpo_alpha=settings.rpo_alpha,
        )  # fmt: skip
        if backward:
            (loss.sum() / len(batches)).backward()
        columns.append(_facts(loss, sums, ref, lengths, settings.beta))
    return PairStats(*torch.stack(columns).mean(0).tolist())


def _facts(loss: Tensor, sums: Tensor, ref: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """One pair's numbers in the order of ``PairStats``, fp64 on the CPU."""
    sums, ref = sums.detach().to("cpu", torch.float64), ref.to("cpu", torch.float64)
    rewards = beta * (sums - ref)
    margin = rewards[0] - rewards[1]
    change = (sums[0] - ref[0]) / lengths[0].cpu()
    return torch.stack([loss.detach().to("cpu", torch.float64)[0], *rewards, margin, (margin > 0).double(), *sums, change])
