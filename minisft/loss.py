"""Cross-entropy as a sum, over supervised positions only.

The loss leaves this module as a sum, never a mean: whoever steps the optimizer divides once, by the supervised tokens of the
whole step. Logits of positions without a target are never computed; those of the others never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minisft.common.autograd import Context
from minisft.matmul import compute_dtype, times, times_transposed
from minisft.trained_rows import HeadRows

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 2**23  # logits alive at once: 32 MiB in fp32


def cross_entropy_sum(logits: Tensor, target_ids: Tensor) -> Tensor:
    """sum_i -log softmax(logits_i)[target_i] over targets that are not ``IGNORE_INDEX``, in fp32 at least.

    Args:
        logits: (N, V).
        target_ids: (N,) int64.

    Returns:
        A scalar; the gradient at ignored rows is exactly zero.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, target_ids, ignore_index=IGNORE_INDEX, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """Loss and gradient of a linear head in one pass, chunk by chunk: dL/dh = (softmax(h W^T) - onehot) W.

    ``weight`` is W without a gradient. ``trained`` (n, D) are its rows ``ids`` (n,), or W without ``ids``: if they need a
    gradient, it is these columns of softmax - onehot, transposed, times h.
    """

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, target_ids: Tensor, trained: Tensor, ids: Tensor | None
    ) -> Tensor:
        matmul_dtype = compute_dtype(hidden)
        precise = torch.promote_types(matmul_dtype, torch.float32)
        head_VD = weight.to(matmul_dtype)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        need_hidden, _, _, need_trained, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_trained = torch.zeros_like(trained, dtype=precise) if need_trained else None
        columns = slice(None) if ids is None else ids
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            h, targets = hidden[part].to(matmul_dtype), target_ids[part, None]
            logits = times_transposed(h, head_VD).to(precise)
            # In place: logsumexp would take as much memory again, at the moment of a step when all activations are alive.
            largest, of_targets = logits.amax(-1, keepdim=True), logits.gather(1, targets)
            weights = logits.sub_(largest).exp_()
            sums = weights.sum(-1, keepdim=True)
            total += (sums.log() + (largest - of_targets)).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad_logits = weights.div_(sums)
            grad_logits.scatter_add_(1, targets, torch.full_like(sums, -1))
            if grad_hidden is not None:
                grad_hidden[part] = times(grad_logits.to(matmul_dtype), head_VD).to(hidden.dtype)
            if grad_trained is not None:
                grad_trained += (grad_logits[:, columns].to(matmul_dtype).T @ h).to(precise)
        ctx.save_for_backward(grad_hidden, None if grad_trained is None else grad_trained.to(trained.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        grad_hidden, grad_trained = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, None, None, grad_trained, None


def _table_of(head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """``weight``, ``trained`` and ``ids`` (see ``_HeadLoss``) of a head that is W h and no more. Else None."""
    if isinstance(head, HeadRows) and head.enabled:
        weight, trained, ids = head.whole_weight(), head.rows, head.ids
    else:
        dense = head.base if isinstance(head, HeadRows) else head
        if not isinstance(dense, nn.Linear) or dense.bias is not None:
            return None
        weight, trained, ids = dense.weight.detach(), dense.weight, None
    # A Function cannot see no_grad from within.
    return weight, trained if torch.is_grad_enabled() else trained.detach(), ids


def head_loss_sum(hidden: Tensor, head: Callable[[Tensor], Tensor], target_ids: Tensor) -> Tensor:
    """``cross_entropy_sum(head(hidden), target_ids)`` without the logits of ignored positions.

    Args:
        hidden: (..., D) hidden states after the final norm.
        head: (N, D) -> (N, V); a linear without bias takes the fused path, anything else runs chunk by chunk with
            recomputation.
        target_ids: (...) int64, already shifted, ``IGNORE_INDEX`` where nothing is to be learned.

    Returns:
        A scalar in fp32 at least: the sum over supervised positions (zero, with zero gradient, if there are none).

    Cost: 3 N' D V multiply-adds for N' supervised positions, and 32 MiB of logits.
    """
    supervised = (target_ids.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, supervised)
    targets = target_ids.reshape(-1).index_select(0, supervised)
    if (table := _table_of(head)) is not None:
        weight, trained, ids = table
        return _HeadLoss.apply(rows, weight, targets, trained, ids)
    chunk = max(1, CHUNK_ELEMENTS // 2**16)
    parts = zip(rows.split(chunk), targets.split(chunk), strict=True)
    losses = [checkpoint(lambda h, t: cross_entropy_sum(head(h), t), h, t, use_reentrant=False) for h, t in parts]
    return torch.stack(losses).sum()  # without a supervised token there is one part, of no rows


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h W^T / T) at the targets, chunk by chunk; backward computes each chunk's logits again.

    dl_n/dh_n = (onehot(target_n) - softmax(h_n W^T / T)) W / T. ``trained`` and ``ids`` as for ``_HeadLoss``.
    """

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        temperature: float,
        trained: Tensor,
        ids: Tensor | None,
    ) -> Tensor:
        log_probs = [_chunk_log_probs(*chunk, weight, temperature)[0] for chunk in _chunks(hidden, weight, target_ids)]
        ctx.save_for_backward(hidden, weight, target_ids, torch.tensor(temperature, dtype=torch.float64), trained, ids)
        return torch.cat(log_probs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
        hidden, weight, target_ids, saved_temperature, trained, ids = ctx.saved_tensors
        temperature = saved_temperature.item()
        need_hidden, _, _, _, need_trained, _ = ctx.needs_input_grad
        grad_hidden: list[Tensor] = []
        grad_trained = torch.zeros_like(trained, dtype=grad.dtype) if need_trained else None
        columns = slice(None) if ids is None else ids
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for (h, targets), g in zip(_chunks(hidden, weight, target_ids), grad.split(rows), strict=True):
            _, logits, logsum = _chunk_log_probs(h, targets, weight, temperature)
            grad_logits = logits.sub_(logsum).exp_().mul_(-g[:, None])
            grad_logits.scatter_add_(1, targets[:, None], g[:, None])
            grad_logits /= temperature
            dtype = compute_dtype(hidden)
            if need_hidden:
                grad_hidden.append(times(grad_logits.to(dtype), weight.to(dtype)).to(hidden.dtype))
            if grad_trained is not None:
                grad_trained += (grad_logits[:, columns].to(dtype).T @ h.to(dtype)).to(grad.dtype)
        return (
            torch.cat(grad_hidden) if need_hidden else None,
            None,
            None,
            None,
            None if grad_trained is None else grad_trained.to(trained.dtype),
            None,
        )


def _chunks(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of hidden states and their targets, few enough for ``CHUNK_ELEMENTS`` logits; at least one chunk."""
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return list(zip(hidden.split(rows), target_ids.split(rows), strict=True))


def _chunk_log_probs(h: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities (n,), logits / T (n, V) and their logsumexp (n, 1), all in fp32 at least."""
    dtype = compute_dtype(h)
    logits = times_transposed(h.to(dtype), weight.to(dtype)).to(torch.promote_types(dtype, torch.float32)) / temperature
    logsum = torch.logsumexp(logits, -1, keepdim=True)
    return (logits.gather(1, targets[:, None]) - logsum).squeeze(1), logits, logsum


def token_log_probs(hidden: Tensor, head: Callable[[Tensor], Tensor], target_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target_n | what precedes it) of each supervised position, without all logits ever existing at once.

    l_n = log softmax(head(h_n) / T)[target_n]. SFT's loss is minus their sum; DPO and GRPO are built on them.

    Args:
        hidden: (..., D) hidden states after the final norm.
        head: (N, D) -> (N, V); a linear without bias takes the fused path, anything else runs chunk by chunk with
            recomputation.
        target_ids: (...) int64, already shifted, ``IGNORE_INDEX`` where nothing is scored.
        temperature: T > 0, what the logits are divided by.

    Returns:
        (N',) in fp32 at least, one for each position with a target, in their order in ``target_ids``.

    Cost: N' D V multiply-adds forward and 2 N' D V backward, and 32 MiB of logits.
    """
    scored = (target_ids.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, scored)
    targets = target_ids.reshape(-1).index_select(0, scored)
    if (table := _table_of(head)) is not None:
        weight, trained, ids = table
        return _TokenLogProbs.apply(rows, weight, targets, temperature, trained, ids)

    def part(h: Tensor, t: Tensor) -> Tensor:
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits.log_softmax(-1).gather(1, t[:, None]).squeeze(1)

    chunk = max(1, CHUNK_ELEMENTS // 2**16)
    parts = zip(rows.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in parts])
