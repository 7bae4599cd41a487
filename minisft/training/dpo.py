"""DPO's step: two answers to one prompt, scored in one pass, and the gradient of their preference.

A pair is one batch row: the prompt once, and two segments that continue it; several pairs make a batch. The reference is what
the model itself said of every pair before the first step, computed once; no second model exists. ``preference.dpo_loss`` has
the formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from minisft.batching import Batch, collate_families, shared_prefix
from minisft.data.chat import Encoded
from minisft.generation import no_dropout
from minisft.loss import IGNORE_INDEX, token_log_probs
from minisft.model import CausalLM
from minisft.preference import DPOLoss, dpo_loss
from minisft.step import supervised_hidden

# TRL's names for the fields of ``PairStats`` after the loss; the last one is ours.
METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "logps/chosen_change",
)  # fmt: skip
TIE = 1e-3  # nats: neighbours in a batch change sums of log-probabilities in fp32 by less


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
        reward_accuracy: share of pairs whose margin is above 0 by more than rounding; a tie is not a win.
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
        return dict(zip(METRICS, [getattr(self, f.name) for f in fields(self)[1:]], strict=True))


def pair_batch(pair: EncodedPair, pad_id: int) -> Batch:
    """One pair as one batch: what both sides begin with is stored once, and each answer is a segment of its own."""
    return _batch([pair], [pair.row], pad_id)


def _sides(pair: EncodedPair) -> tuple[Encoded, Encoded]:
    return pair.chosen, pair.rejected


def _batch(pairs: Sequence[EncodedPair], numbers: Sequence[int], pad_id: int) -> Batch:
    prefix_length = min(shared_prefix(_sides(pair)) for pair in pairs)
    return replace(collate_families([_sides(pair) for pair in pairs], pad_id, prefix_length), rows=tuple(numbers))


def pair_batches(pairs: Sequence[EncodedPair], numbers: Sequence[int], pad_id: int, max_tokens: int) -> list[Batch]:
    """Pairs as few batches, those with prompts of one length together.

    The prompts of a batch are stored once as far as its shortest reaches, the rest of the longer ones in both segments.

    Args:
        pairs: encoded pairs.
        numbers: what each is called in ``Batch.rows``.
        pad_id: the tokenizer's padding.
        max_tokens: positions of a batch, padding included; a pair that has more is a batch of its own.

    Returns:
        The batches, the longest prompts first; each pair is in exactly one.
    """
    prefixes = [shared_prefix(_sides(pair)) for pair in pairs]
    batches: list[list[int]] = []
    for i in sorted(range(len(pairs)), key=lambda i: -prefixes[i]):
        grown = [*(batches[-1] if batches else []), i]
        P = prefixes[i]  # the shortest so far
        longest = max(P + sum(len(side.input_ids) - P for side in _sides(pairs[k])) for k in grown)
        if batches and len(grown) * longest <= max_tokens:
            batches[-1] = grown
        else:
            batches.append([i])
    return [_batch([pairs[i] for i in batch], [numbers[i] for i in batch], pad_id) for batch in batches]


def answer_log_probs(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """log pi(y|x) of the answers in a batch of P pairs: of each pair chosen, then rejected.

    Args:
        model: the decoder, its adapters as they are.
        batch: of ``pair_batch`` or ``pair_batches``, on the model's device.

    Returns:
        (2 P,) sums over each answer's tokens, in fp32 at least, and (2 P,) how many tokens each has; P is 0 for a batch that
        holds no pair.
    """
    hidden, target_ids = supervised_hidden(model, batch)
    log_probs = token_log_probs(hidden, model.loss_head, target_ids)
    first = 2 if batch.prefix_length else 1
    num_pairs = batch.segment_ids.shape[0]
    pair = torch.arange(num_pairs, device=log_probs.device)[:, None]
    side = (batch.segment_ids - first + 2 * pair)[batch.target_ids != IGNORE_INDEX]
    sums = torch.zeros(2 * num_pairs, dtype=log_probs.dtype, device=log_probs.device).index_add(0, side, log_probs)
    own = 2 * len(batch.rows)
    return sums[:own], torch.bincount(side, minlength=2 * num_pairs)[:own]


def reference_log_probs(model: CausalLM, batches: Iterable[Batch]) -> dict[int, tuple[float, float]]:
    """row -> (chosen, rejected) log pi under the model as it is now, dropout off. Call it before the first step."""
    with torch.no_grad(), no_dropout(model):
        found: dict[int, tuple[float, float]] = {}
        for batch in batches:
            sums = answer_log_probs(model, batch.to(model.device))[0].tolist()
            found |= dict(zip(batch.rows, zip(sums[::2], sums[1::2], strict=True), strict=True))
    return found


def pair_gradients(
    model: CausalLM,
    batches: Sequence[Batch],
    reference: Mapping[int, tuple[float, float]],
    settings: DPOSettings,
    backward: bool = True,
    num_pairs: int | None = None,
) -> PairStats:
    """Backward through every pair of an optimizer step; the loss is the mean over the step's pairs.

    Args:
        model: the decoder.
        batches: of ``pair_batch`` or ``pair_batches``.
        reference: row -> (chosen, rejected) log pi_ref.
        settings: the loss.
        backward: accumulate gradients; without it (validation) only the numbers come back.
        num_pairs: pairs of the step where ``batches`` are a part of it; by default theirs.

    Returns:
        Means over the pairs, or this part's share of them: the shares add up to the means.
    """
    num_pairs = sum(len(batch.rows) for batch in batches) if num_pairs is None else num_pairs
    columns = [torch.zeros(len(fields(PairStats)), 0, dtype=torch.float64)]
    for batch in batches:
        sums, lengths = (values.view(-1, 2).T for values in answer_log_probs(model, batch))  # (2, P): chosen, rejected
        ref = torch.tensor([reference[row] for row in batch.rows], dtype=sums.dtype, device=sums.device).view(-1, 2).T
        loss = dpo_loss(
            *sums, *ref, chosen_lengths=lengths[0], rejected_lengths=lengths[1],
            beta=settings.beta, loss=settings.loss, label_smoothing=settings.label_smoothing, rpo_alpha=settings.rpo_alpha,
        )  # fmt: skip
        if backward:
            (loss.sum() / num_pairs).backward()
        columns.append(_facts(loss, sums, ref, lengths, settings.beta))
    return PairStats(*(torch.cat(columns, 1).sum(1) / num_pairs).tolist())


def _facts(loss: Tensor, sums: Tensor, ref: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """(8, P): each pair's numbers in the order of ``PairStats``, fp64 on the CPU."""
    sums, ref = sums.detach().to("cpu", torch.float64), ref.to("cpu", torch.float64)
    rewards = beta * (sums - ref)
    margin = rewards[0] - rewards[1]
    change = (sums[0] - ref[0]) / lengths[0].cpu()
    return torch.stack(
        [loss.detach().to("cpu", torch.float64), *rewards, margin, (margin > beta * TIE).double(), *sums, change]
    )
