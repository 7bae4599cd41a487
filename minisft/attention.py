"""Causal attention over segments, however they lie in the batch.

Padded left or right, or packed end to end: a batch is always a set of segments. ``Segments`` knows where their tokens
lie, and attention gathers them into a grid (S, L) with every segment at the left edge. There plain causal attention is
all that is needed: a real token never sees what stands to its right, so padding needs no mask, and segments cannot see each
other because they are different rows. Nothing is ever quadratic in the packed length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisft.autograd import Context
from minisft.matmul import product_dtype

# With bf16 instructions, up to this many keys, two batched products and a softmax beat the fused CPU kernel several times
# over; without them the fused kernel in fp32 wins at every length (benchmarks/LOG.md).
SHORT_ROW = 512


@dataclass(frozen=True)
class Segments:
    """Where each token of a batch (B, T) stands in its segment, and where each place of the grid (S, L) comes from.

    Attributes:
        positions: (B, T) int64, 0 at the start of each segment; 0 for padding.
        take: (S * L,) int64: flat batch index of the token at each place of the grid; 0 where the grid is empty.
        put: (B * T,) int64: flat grid place of each token; 0 for padding.
        empty: (S, L, 1, 1) bool: places of the grid without a token; None when there are none.
        padding: (B * T, 1, 1) bool: tokens without a place; None when there are none, or when nothing moves.
        shape: (S, L).
        trivial: the batch already is the grid, so nothing has to move.
    """

    positions: Tensor
    take: Tensor
    put: Tensor
    empty: Tensor | None
    padding: Tensor | None
    shape: tuple[int, int]
    trivial: bool

    @classmethod
    def of(cls, segment_ids: Tensor) -> Segments:
        """Read the segments off ``segment_ids``.

        Args:
            segment_ids: (B, T) int64; 0 is padding, equal positive neighbours in a row are one segment.
        """
        ids = segment_ids.cpu()
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
        take = torch.zeros(S * L, dtype=torch.int64)
        take[put[real]] = index[real]
        empty = torch.ones(S * L, dtype=torch.bool)
        empty[put[real]] = False
        device = segment_ids.device
        trivial = (S, L) == (B, T) and bool((put == index)[real].all())  # right padding leaves every token in its place
        return cls(
            positions=place.view(B, T).to(device),
            take=take.to(device),
            put=put.to(device),
            empty=empty.view(S, L, 1, 1).to(device) if bool(empty.any()) else None,
            padding=None if trivial or bool(real.all()) else (~real).view(-1, 1, 1).to(device),
            shape=(S, L),
            trivial=trivial,
        )

    def to_grid(self, flat: Tensor) -> Tensor:
        """(B * T, heads, E) -> (S, L, heads, E); empty places hold the first token, which no real token can see."""
        grid = flat if self.trivial else flat.index_select(0, self.take)
        return grid.view(*self.shape, *flat.shape[1:])

    def from_grid(self, grid: Tensor) -> Tensor:
        """(S, L, heads, E) -> (B * T, heads, E); padding holds the first token of the grid."""
        flat = grid.reshape(-1, *grid.shape[2:])
        return flat if self.trivial else flat.index_select(0, self.put)

    def only_real(self, grid: Tensor) -> Tensor:
        """The grid with zeros at its empty places."""
        return grid if self.empty is None else grid.masked_fill(self.empty, 0)

    def without_padding(self, flat: Tensor) -> Tensor:
        """(B * T, heads, E) with zeros at padding, where ``from_grid`` left a copy of the first token."""
        return flat if self.padding is None else flat.masked_fill(self.padding, 0)


def _hidden_keys(L: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool, True where a query must not look: the future, and what lies before a sliding window."""
    ones = torch.ones(L, L, dtype=torch.bool, device=device)
    hidden = ones.triu(1)
    return hidden | ones.tril(-window) if window is not None and window < L else hidden


class _AttentionContext(Context, Protocol):
    segments: Segments
    window: int | None


class _ShortAttention(torch.autograd.Function):
    """Attention as two batched products, query heads grouped over the kv head that they share.

    Keeps q, k and v; the (L, L) weights are computed again in backward.
    """

    @staticmethod
    def forward(ctx: _AttentionContext, q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None) -> Tensor:
        q_grid, k_grid, v_grid = _grouped(q, k, v, segments)
        weights = _weights(q_grid, k_grid, segments.shape[1], window)
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.window = segments, window
        return _ungrouped(weights.to(v_grid.dtype) @ v_grid, segments, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttentionContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        segments = ctx.segments
        q_grid, k_grid, v_grid = _grouped(q, k, v, segments)
        weights = _weights(q_grid, k_grid, segments.shape[1], ctx.window)
        g = _group_queries(segments.only_real(segments.to_grid(grad)), k.shape[1])
        grad_v = weights.to(g.dtype).transpose(-1, -2) @ g
        grad_weights = (g @ v_grid.transpose(-1, -2)).to(weights.dtype)
        # dS = P * (dP - rowsum(dP * P)), in one pass
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores = grad_scores.mul_(1 / math.sqrt(q.shape[-1])).to(g.dtype)
        grad_q = _ungrouped(grad_scores @ k_grid, segments, q.dtype)
        grad_k = segments.from_grid((grad_scores.transpose(-1, -2) @ q_grid).transpose(1, 2).to(k.dtype))
        grad_v_flat = segments.from_grid(grad_v.transpose(1, 2).to(v.dtype))
        return *map(segments.without_padding, (grad_q, grad_k, grad_v_flat)), None, None


def _group_queries(grid: Tensor, num_kv_heads: int) -> Tensor:
    """(S, L, H, E) -> (S, K, G * L, E): the queries of the G heads that share a kv head, one below the other."""
    S, L, H, E = grid.shape
    grouped = grid.view(S, L, num_kv_heads, H // num_kv_heads, E).permute(0, 2, 3, 1, 4)
    return grouped.to(product_dtype(grid)).reshape(S, num_kv_heads, -1, E)


def _grouped(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    k_grid, v_grid = (segments.to_grid(x).transpose(1, 2).to(product_dtype(x)) for x in (k, v))
    return _group_queries(segments.to_grid(q), k.shape[1]), k_grid, v_grid


def _weights(q_grid: Tensor, k_grid: Tensor, L: int, window: int | None) -> Tensor:
    """(S, K, G * L, L) softmax weights in fp32 at least, zero where a query must not look."""
    S, K, GL, E = q_grid.shape
    mask = torch.zeros(L, L, dtype=q_grid.dtype, device=q_grid.device)
    mask = mask.masked_fill_(_hidden_keys(L, window, q_grid.device), -torch.inf).repeat(GL // L, 1)
    # Scale and mask ride along in the product instead of taking passes of their own.
    q_rows, k_columns = q_grid.reshape(S * K, GL, E), k_grid.reshape(S * K, L, E).transpose(1, 2)
    scores = torch.baddbmm(mask, q_rows, k_columns, alpha=1 / math.sqrt(E)).view(S, K, GL, L)
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _ungrouped(grouped: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    """(S, K, G * L, E) -> (B * T, H, E)."""
    S, K, GL, E = grouped.shape
    L = segments.shape[1]
    grid = grouped.to(dtype).view(S, K, GL // L, L, E).permute(0, 3, 1, 2, 4).reshape(S, L, -1, E)
    return segments.from_grid(grid)


def _long_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None) -> Tensor:
    """The same through PyTorch's fused attention."""
    wide = product_dtype(q)
    q_grid, k_grid, v_grid = (segments.only_real(segments.to_grid(x)).transpose(1, 2).to(wide) for x in (q, k, v))
    L = segments.shape[1]
    allowed = ~_hidden_keys(L, window, q.device) if window is not None and window < L else None
    out = torch.nn.functional.scaled_dot_product_attention(
        q_grid, k_grid, v_grid, attn_mask=allowed, is_causal=allowed is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return segments.without_padding(segments.from_grid(segments.only_real(out.transpose(1, 2).to(q.dtype))))


def _prefers_short(q: Tensor, L: int) -> bool:
    return q.device.type == "cpu" and product_dtype(q) == torch.bfloat16 and L <= SHORT_ROW


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v within each segment, causal.

    Args:
        q: (B * T, H, E), rotated already.
        k, v: (B * T, K, E), K dividing H.
        segments: where the tokens lie.
        window: how many keys a query may see, itself included; None for all.

    Returns:
        (B * T, H, E) in the dtype of ``q``; what stands at padding is unspecified and sends no gradient.

    Ref: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    if _prefers_short(q, segments.shape[1]):
        return _ShortAttention.apply(q, k, v, segments, window)
    return _long_attention(q, k, v, segments, window)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Attention of new tokens over everything in a KV cache (inference only).

    Args:
        q: (B, T, H, E) new queries.
        k, v: (B, K, C, E) cache, the new keys and values included.
        positions: (B, T) int64, the cache place of each query; it sees keys at places up to its own.

    Returns:
        (B, T, H, E).
    """
    B, T, H, E = q.shape
    wide = product_dtype(q)
    keys = torch.arange(k.shape[2], device=q.device)
    hidden = keys > positions.unsqueeze(-1)  # (B, T, C)
    if window is not None:
        hidden |= keys <= positions.unsqueeze(-1) - window
    q_grid = _group_queries(q, k.shape[1])  # (B, K, G * T, E)
    scores = (q_grid * (1 / math.sqrt(E))) @ k.to(wide).transpose(-1, -2)
    scores = scores.to(torch.promote_types(wide, torch.float32))
    scores = scores.view(B, k.shape[1], -1, T, k.shape[2]).masked_fill_(hidden[:, None, None], -torch.inf)
    out = torch.softmax(scores, -1).to(wide).view(B, k.shape[1], -1, k.shape[2]) @ v.to(wide)
    return out.to(q.dtype).view(B, k.shape[1], H // k.shape[1], T, E).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)
