"""Causal attention over segments, however they lie in the batch.

Padded left or right, or packed end to end: a batch is always a set of segments. ``Segments`` knows where their tokens
lie. On a CPU ``kernels.cpu_attention`` takes short ones where they are; otherwise attention gathers them into a grid (S, L)
with every segment at the left edge. There plain causal attention is all that is needed: a real token never sees what stands to
its right, so padding needs no mask, and segments cannot see each other because they are different rows. Nothing is ever
quadratic in the packed length. Where all segments of a batch row continue a common prefix, its keys stand once more to the
left of each of them; and so do those of a past, which all batch rows continue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisft.common.autograd import Context
from minisft.kernels import cpu_attention
from minisft.kernels.cpu_attention import Spans
from minisft.matmul import compute_dtype

# Up to this many keys the C++, where each thread computes a kv head of a segment, is faster than PyTorch's fused kernel:
# forward and backward, in fp32 and in bf16 (benchmarks/LOG.md).
NATIVE_KEYS = 512
PREFIX_NUMBERS = 2**23  # of keys in the prefixes of a batch, and as many of values, once a thread: 64 MiB


@dataclass(frozen=True)
class Segments:
    """Where each token of a batch (B, T) stands in its segment, and where each place of the grid (S, L) comes from.

    Attributes:
        positions: (B, T) int64: the place within the segment, plus P after a common prefix, plus the length of the past;
            anything at padding.
        take: (S * L,) int64: flat batch index of the token at each place of the grid. Places without one hold their segment's
            first token once more: it stands to the right of all real ones, so nobody sees it, and no gradient comes back.
        put: (N,) int64: flat grid place of each token; 0 for padding.
        padding: (N, 1, 1) bool: tokens without a place; None when there are none.
        shape: (S, L).
        trivial: the batch already is the grid, so nothing has to move.
        prefix_length: P, the tokens at the front of each batch row that all its other segments continue. They are in no grid:
            the fields above, positions aside, speak of the N = B * (T - P) tokens after them.
        batch_size: B.
        owner: (S,) int64: the batch row of each segment.
        spans: the same for the C++, in the flat batch; the prefixes are segments there.
    """

    positions: Tensor
    take: Tensor
    put: Tensor
    padding: Tensor | None
    shape: tuple[int, int]
    trivial: bool
    prefix_length: int
    batch_size: int
    owner: Tensor
    spans: Spans

    @classmethod
    def of(cls, segment_ids: Tensor, prefix_length: int = 0, past_length: int = 0) -> Segments:
        """Read the segments off ``segment_ids``.

        Args:
            segment_ids: (B, T) int64; 0 is padding, equal positive neighbours in a row are one segment.
            prefix_length: P; if not 0, the first P tokens of each row are what its other segments continue.
            past_length: tokens before the batch that every row of it continues.

        Returns:
            The segments.
        """
        ids = segment_ids.cpu()[:, prefix_length:]
        B, T = ids.shape
        starts = torch.ones(B, T, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts &= ids > 0
        real = (ids > 0).flatten()
        index = torch.arange(B * T)
        segment = starts.flatten().cumsum(0) - 1  # number of the segment each real token belongs to
        first = index[starts.flatten()]
        place = torch.where(real, index - first[segment.clamp(min=0)], 0) if len(first) else torch.zeros_like(index)
        S, L = max(len(first), 1), int(place.max()) + 1
        put = torch.where(real, segment * L + place, 0)
        take = (first if len(first) else index[:1]).repeat_interleave(L)
        take[put[real]] = index[real]
        device = segment_ids.device
        owner = first // max(T, 1) if len(first) else torch.zeros(1, dtype=torch.int64)
        trivial = (S, L) == (B, T) and bool((put == index)[real].all())  # right padding leaves every token in its place
        positions = torch.cat((torch.arange(prefix_length).expand(B, -1), prefix_length + place.view(B, T)), 1)
        return cls(
            positions=(past_length + positions).to(device),
            take=take.to(device),
            put=put.to(device),
            padding=None if bool(real.all()) else (~real).view(-1, 1, 1).to(device),
            shape=(S, L),
            trivial=trivial,
            prefix_length=prefix_length,
            batch_size=B,
            owner=owner.to(device),
            spans=_spans_of(first, owner[: len(first)], segment[real], prefix_length, T, B),
        )

    def to_grid(self, flat: Tensor) -> Tensor:
        """(N, heads, E) -> (S, L, heads, E); where the grid is empty anything finite."""
        grid = flat if self.trivial else flat.index_select(0, self.take)
        return grid.view(*self.shape, *flat.shape[1:])

    def from_grid(self, grid: Tensor) -> Tensor:
        """(S, L, heads, E) -> (N, heads, E), zero at padding."""
        flat = grid.reshape(-1, *grid.shape[2:])
        flat = flat if self.trivial else flat.index_select(0, self.put)
        return flat if self.padding is None else flat.masked_fill(self.padding, 0)  # in the gradient that comes back too


def _spans_of(first: Tensor, owner: Tensor, segment: Tensor, prefix_length: int, T: int, B: int) -> Spans:
    """``first`` of B rows of T tokens after the prefix; ``segment``: that of each real token."""
    lengths = torch.bincount(segment, minlength=len(first))
    longest = prefix_length + int(lengths.max()) if len(first) else prefix_length
    num_tokens, complete = B * (prefix_length + T), len(segment) == B * T
    first = first + (owner + 1) * prefix_length
    if prefix_length == 0:
        return Spans(first, lengths, torch.full_like(first, -1), 0, 0, longest, num_tokens, complete)
    rows = torch.arange(B)
    first, lengths = torch.cat((first, rows * (prefix_length + T))), torch.cat((lengths, torch.full_like(rows, prefix_length)))
    return Spans(first, lengths, torch.cat((owner, torch.full_like(rows, -1))), B, prefix_length, longest, num_tokens, complete)


def _hidden_keys(L: int, C: int, window: int | None, device: torch.device) -> Tensor:
    """(L, C) bool, True where one of the last L of C tokens must not look: the future, and what lies before a window."""
    ones = torch.ones(L, C, dtype=torch.bool, device=device)
    hidden = ones.triu(C - L + 1)
    return hidden | ones.tril(C - L - window) if window is not None else hidden


class _AttentionContext(Context, Protocol):
    spans: Spans
    window: int | None


class _NativeAttention(torch.autograd.Function):
    """Attention by the C++. Keeps q, k and v; the weights are computed again in backward."""

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Spans,
        window: int | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, *(past or ()))
        ctx.spans, ctx.window = spans, window
        return cpu_attention.forward(q, k, v, spans, window, past)

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttentionContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *past = ctx.saved_tensors
        before = (past[0], past[1]) if past else None
        return *cpu_attention.backward(grad.contiguous(), q, k, v, ctx.spans, ctx.window, before), None, None, None


def _group_queries(grid: Tensor, num_kv_heads: int) -> Tensor:
    """(S, L, H, E) -> (S, K, G * L, E): the queries of the G heads that share a kv head, one below the other."""
    S, L, H, E = grid.shape
    grouped = grid.view(S, L, num_kv_heads, H // num_kv_heads, E).permute(0, 2, 3, 1, 4)
    return grouped.to(compute_dtype(grid)).reshape(S, num_kv_heads, -1, E)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    L, C = q.shape[1], k.shape[1]
    plain = L == C and (window is None or window >= L)
    q_grid, k_grid, v_grid = (x.transpose(1, 2).to(compute_dtype(q)) for x in (q, k, v))
    allowed = None if plain else ~_hidden_keys(L, C, window, q.device)
    out = torch.nn.functional.scaled_dot_product_attention(
        q_grid, k_grid, v_grid, attn_mask=allowed, is_causal=plain, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2).to(q.dtype)


def _can_use_native(q: Tensor, k: Tensor, v: Tensor, spans: Spans, past: tuple[Tensor, Tensor] | None) -> bool:
    before = () if past is None else past
    if not cpu_attention.can_use_native(q, k, v, *before) or any(x.requires_grad for x in before):
        return False
    num_keys, threads = spans.longest + (0 if past is None else past[0].shape[1]), torch.get_num_threads()
    # Each thread sums the gradients of all prefixes by itself.
    prefix_numbers = threads * spans.prefixes * spans.prefix_length * k[0].numel()
    return num_keys <= NATIVE_KEYS and len(spans.first) * k.shape[1] >= threads and prefix_numbers <= PREFIX_NUMBERS


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window: int | None = None,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v within each segment and what it continues: the past of all, then its row's prefix; causal.

    Args:
        q: (B * T, H, E), rotated already.
        k, v: (B * T, K, E), K dividing H.
        segments: where the tokens lie.
        window: how many keys a query may see, itself included; None for all.
        past: keys and values (1, C, K, E) of the tokens before the batch.

    Returns:
        (B * T, H, E) in the dtype of ``q``; what stands at padding is zero and sends no gradient.

    Ref: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    if _can_use_native(q, k, v, segments.spans, past):
        return _NativeAttention.apply(q, k, v, segments.spans, window, past)
    P, B = segments.prefix_length, segments.batch_size
    if P == 0 and past is None:
        q_grid, k_grid, v_grid = (segments.to_grid(x) for x in (q, k, v))
        return segments.from_grid(_fused_attention(q_grid, k_grid, v_grid, window))
    q_BT, k_BT, v_BT = (x.view(B, -1, *x.shape[1:]) for x in (q, k, v))
    q_grid, k_grid, v_grid = (segments.to_grid(x[:, P:].flatten(0, 1)) for x in (q_BT, k_BT, v_BT))
    k_before, v_before = k_BT[:, :P], v_BT[:, :P]
    if past is not None:
        k_before, v_before = (
            torch.cat((x.expand(B, -1, -1, -1), before), 1) for x, before in zip(past, (k_before, v_before), strict=True)
        )
    k_grid, v_grid = (
        torch.cat((_for_each_segment(before, segments), grid), 1) for before, grid in ((k_before, k_grid), (v_before, v_grid))
    )
    rest = segments.from_grid(_fused_attention(q_grid, k_grid, v_grid, window))
    if P == 0:
        return rest
    prefix = _fused_attention(q_BT[:, :P], k_before, v_before, window)
    return torch.cat((prefix, rest.view(B, -1, *rest.shape[1:])), 1).flatten(0, 1)


def _for_each_segment(prefix: Tensor, segments: Segments) -> Tensor:
    """(B, P, K, E) -> (S, P, K, E): what each segment continues."""
    S = segments.shape[0]
    return prefix.expand(S, -1, -1, -1) if segments.batch_size == 1 else prefix.index_select(0, segments.owner)


def cache_attn_mask(positions: Tensor, num_positions: int, window: int | None = None) -> Tensor:
    """Which positions of a KV cache a query may not see: those after its own, and those before its window.

    Args:
        positions: (B, T) int64, the cache position of each query.
        num_positions: C, how many positions of the cache are looked at.
        window: how many keys a query may see, itself included; None for all.

    Returns:
        (B, 1, 1, T, C) bool.
    """
    keys = torch.arange(num_positions, device=positions.device)
    attn_mask = keys > positions.unsqueeze(-1)
    if window is not None:
        attn_mask |= keys <= positions.unsqueeze(-1) - window
    return attn_mask[:, None, None]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """Attention of new tokens over everything in a KV cache (inference only).

    Args:
        q: (B, T, H, E) new queries.
        k, v: (B, K, C, E) cache, the new keys and values included.
        attn_mask: (B, 1, 1, T, C), from ``cache_attn_mask``; True where a query may not see.

    Returns:
        (B, T, H, E).
    """
    B, T, H, E = q.shape
    dtype = compute_dtype(q)
    q_grid = _group_queries(q, k.shape[1])  # (B, K, G * T, E)
    scores = (q_grid * (1 / math.sqrt(E))) @ k.to(dtype).transpose(-1, -2)
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    scores = scores.view(B, k.shape[1], -1, T, k.shape[2]).masked_fill_(attn_mask, -torch.inf)
    out = torch.softmax(scores, -1).to(dtype).view(B, k.shape[1], -1, k.shape[2]) @ v.to(dtype)
    return out.to(q.dtype).view(B, k.shape[1], H // k.shape[1], T, E).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)
