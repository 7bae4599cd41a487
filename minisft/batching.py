"""Rows of tokens to batches: which rows make a step, padded or packed, shifted once and masked once.

Which rows a step sees is a pure function of (seed, step), so a resumed run sees the same ones. ``batch_size`` counts
rows whether they are packed or not: packing changes how they lie in memory, never what is computed. Rows that begin alike, as
chats with one system message do, need that prefix only once: attention is causal, so it is the same for all.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisft.common.seeds import generator
from minisft.data.chat import Encoded
from minisft.loss import IGNORE_INDEX

# A shared prefix costs attention an explicit mask; below this share of the tokens saved it is not worth one.
MIN_SHARED_FRACTION = 0.1


@dataclass(frozen=True)
class Batch:
    """What the model computes at once.

    Attributes:
        input_ids: (B, T) int64.
        target_ids: (B, T) int64, already shifted: the token to predict *after* each position, or ``IGNORE_INDEX``.
        segment_ids: (B, T) int64: 0 is padding, 1, 2, ... the row of data within the batch row.
        num_targets: how many targets are not ignored.
        num_tokens: how many tokens the rows have, a shared prefix counted in each of them.
        rows: the data rows (line numbers) inside, for messages.
        prefix_length: the first so many tokens of each batch row are a segment that its others continue; 0 for none.
        segment_rows: for each batch row the data rows of its segments 1, 2, ...
        noise: (B, T, D) fp32, added to the embeddings; None for none (``with_noise``).
    """

    input_ids: Tensor
    target_ids: Tensor
    segment_ids: Tensor
    num_targets: int
    num_tokens: int
    rows: tuple[int, ...]
    prefix_length: int = 0
    segment_rows: tuple[tuple[int, ...], ...] = ()
    noise: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        names = ("input_ids", "target_ids", "segment_ids", *(() if self.noise is None else ("noise",)))
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class Share:
    """What one file of a mixture gives: rows ``first`` to ``first + count - 1`` of the data, ``drawn`` of them in an epoch."""

    first: int
    count: int
    drawn: int


def step_rows(step: int, batch_size: int, num_rows: int, seed: int, shares: tuple[Share, ...] = ()) -> list[int]:
    """The rows of one optimizer step: the next ``batch_size`` of an endless series of shuffled epochs.

    Args:
        step: the step's number, from 1.
        batch_size: rows in a step; a step may reach into the next epoch.
        num_rows: rows in an epoch: those of the data.
        seed: decides the order of each epoch.
        shares: what each file of a mixture gives to an epoch; together ``num_rows``.

    Returns:
        Indices of rows.
    """
    first = (step - 1) * batch_size
    positions = range(first, first + batch_size)
    orders = {epoch: _order(epoch, num_rows, seed, shares) for epoch in {p // num_rows for p in positions}}
    return [int(orders[p // num_rows][p % num_rows]) for p in positions]


def epoch_order(epoch: int, num_rows: int, seed: int) -> list[int]:
    """A permutation of all rows that depends on (seed, epoch) alone.

    Args:
        epoch: its number, from 0.
        num_rows: rows in the data.
        seed: the run's.

    Returns:
        Indices of rows.
    """
    return _shuffled(epoch, num_rows, seed).tolist()


def _order(epoch: int, num_rows: int, seed: int, shares: tuple[Share, ...]) -> Tensor:
    return _mixed(epoch, seed, shares) if shares else _shuffled(epoch, num_rows, seed)


@functools.lru_cache(maxsize=2)  # as below
def _mixed(epoch: int, seed: int, shares: tuple[Share, ...]) -> Tensor:
    """The rows of an epoch of a mixture, in their order."""
    rows = torch.cat([share.first + _drawn(epoch, seed, i, share) for i, share in enumerate(shares)])
    return rows[_shuffled(epoch, len(rows), seed)]


def _drawn(epoch: int, seed: int, index: int, share: Share) -> Tensor:
    """What a file gives to an epoch: the next ``drawn`` of an endless series of its rows, each pass in an order of its own."""
    start, end = epoch * share.drawn, (epoch + 1) * share.drawn
    passes = range(start // share.count, (end - 1) // share.count + 1)
    orders = [torch.randperm(share.count, generator=generator(seed, "file-order", index, number)) for number in passes]
    begin = start - passes.start * share.count
    return torch.cat(orders)[begin : begin + share.drawn]


@functools.lru_cache(maxsize=4)  # a step asks for one epoch, or for two neighbours; with --replay of two files
def _shuffled(epoch: int, num_rows: int, seed: int) -> Tensor:
    return torch.randperm(num_rows, generator=generator(seed, "data-order", epoch))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: each item goes to the fullest bin that still takes it.

    An item longer than ``capacity`` gets a bin of its own, so that it can never block the others.

    Returns:
        Bins of item indices; every item is in exactly one.

    Ref: Krell et al. 2021, arXiv:2107.02027, section 3.
    """
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free positions, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(space, (lengths[item], -1))
        if at == len(space):
            bins.append([item])
            free, target = capacity - lengths[item], len(bins) - 1
        else:
            free, target = space.pop(at)
            free -= lengths[item]
            bins[target].append(item)
        bisect.insort(space, (free, target))
    return bins


def collate(rows: Sequence[Encoded], pad_id: int, bins: Sequence[Sequence[int]] | None = None) -> Batch:
    """Lay rows out side by side (padded), or several to a batch row (packed).

    Args:
        rows: encoded rows of data.
        pad_id: what fills the rest; never looked at, since padding is known by its place.
        bins: which rows lie in which batch row; None for one each.

    Returns:
        A ``Batch`` padded on the right to its longest batch row. The target of a row's last token is ignored, so no row is ever
        asked to predict the first token of the next.
    """
    bins = [[i] for i in range(len(rows))] if bins is None else bins
    T = max(sum(len(rows[i].input_ids) for i in row) for row in bins)
    input_ids = torch.full((len(bins), T), pad_id, dtype=torch.int64)
    target_ids = torch.full((len(bins), T), IGNORE_INDEX, dtype=torch.int64)
    segment_ids = torch.zeros(len(bins), T, dtype=torch.int64)
    for b, row in enumerate(bins):
        end = 0
        for segment, i in enumerate(row, start=1):
            ids = torch.tensor(rows[i].input_ids, dtype=torch.int64)
            supervised = torch.tensor(rows[i].supervised, dtype=torch.bool)
            start, end = end, end + len(ids)
            input_ids[b, start:end] = ids
            target_ids[b, start : end - 1] = torch.where(supervised[1:], ids[1:], IGNORE_INDEX)
            segment_ids[b, start:end] = segment
    num_targets, num_tokens = int((target_ids != IGNORE_INDEX).sum()), int((segment_ids > 0).sum())
    segment_rows = tuple(tuple(rows[i].row for i in row) for row in bins)
    return Batch(
        input_ids, target_ids, segment_ids, num_targets, num_tokens, tuple(r.row for r in rows), segment_rows=segment_rows
    )


def shared_prefix(rows: Sequence[Encoded]) -> int:
    """How many tokens all rows begin with, up to the last one before anything that one of them learns."""
    # Whoever predicts the first supervised token must stay outside, because rows may differ in what follows it.
    limit = min(next((i for i in range(1, len(row.input_ids)) if row.supervised[i]), len(row.input_ids)) - 1 for row in rows)
    columns = zip(*(row.input_ids[:limit] for row in rows), strict=True)
    return next((i for i, tokens in enumerate(columns) if len(set(tokens)) > 1), limit)


def collate_shared(rows: Sequence[Encoded], pad_id: int, prefix_length: int) -> Batch:
    """Lay rows that begin alike end to end in one batch row: their common prefix once, then what each has of its own.

    Exact, because attention is causal: the hidden states of the prefix cannot depend on what follows, and its gradient is
    the sum of what the rows send back.

    Args:
        rows: encoded rows of data.
        pad_id: what would fill the rest; one batch row has none.
        prefix_length: at least 1, at most ``shared_prefix(rows)``.

    Returns:
        A ``Batch`` of one batch row, whose first segment is the prefix.
    """
    return collate_families([rows], pad_id, prefix_length)


def collate_families(families: Sequence[Sequence[Encoded]], pad_id: int, prefix_length: int) -> Batch:
    """Several families of rows, a batch row each: what its rows begin with once, then what each has of its own.

    Args:
        families: rows that begin alike within a family.
        pad_id: what fills the rest of a batch row.
        prefix_length: P, the same for all families: at most the smallest of their ``shared_prefix``; 0 lays whole rows out.

    Returns:
        A ``Batch`` of a batch row for each family; with P > 0 the first segment of each is the prefix.
    """
    P = prefix_length
    parts: list[Encoded] = []
    bins: list[range] = []
    for family in families:
        first = len(parts)
        if P:
            parts.append(replace(family[0], input_ids=family[0].input_ids[:P], supervised=[False] * P))
        parts += [replace(row, input_ids=row.input_ids[P:], supervised=row.supervised[P:]) for row in family]
        bins.append(range(first, len(parts)))
    rows = [row for family in families for row in family]
    num_tokens = sum(len(row.input_ids) for row in rows)
    batch = collate(parts, pad_id, bins)
    return replace(batch, num_tokens=num_tokens, rows=tuple(row.row for row in rows), prefix_length=P)


def collate_packed(rows: Sequence[Encoded], pad_id: int, capacity: int, share_prefix: bool = True) -> Batch:
    """Lay rows out with as little waste as there can be: a common prefix stored once if that saves enough, else packed.

    Args:
        rows: encoded rows of data.
        pad_id: what fills the rest of a batch row.
        capacity: tokens in a packed batch row.
        share_prefix: whether a common prefix may be stored once.

    Returns:
        A ``Batch``.
    """
    lengths = [len(row.input_ids) for row in rows]
    prefix_length = shared_prefix(rows) if share_prefix else 0
    if prefix_length * (len(rows) - 1) > MIN_SHARED_FRACTION * sum(lengths):
        return collate_shared(rows, pad_id, prefix_length)
    return collate(rows, pad_id, pack(lengths, capacity))


def micro_batches(
    rows: Sequence[Encoded], micro_batch_size: int, pad_id: int, packing: bool, capacity: int, share_prefix: bool = True
) -> list[Batch]:
    """Cut a step's rows into batches of at most ``micro_batch_size`` rows, neighbours in length together.

    Args:
        rows: encoded rows of data.
        micro_batch_size: rows in a batch, at most.
        pad_id: what fills the rest of a batch row.
        packing: several rows to a batch row, at most ``capacity`` tokens each; else one, padded.
        capacity: tokens in a packed batch row.
        share_prefix: with packing, compute a common prefix once. Not with dropout, where each row has masks of its own.

    Returns:
        The batches, the longest rows first.
    """
    ordered = sorted(rows, key=lambda row: -len(row.input_ids))
    groups = [ordered[i : i + micro_batch_size] for i in range(0, len(ordered), micro_batch_size)]
    if not packing:
        return [collate(group, pad_id) for group in groups]
    return [collate_packed(group, pad_id, capacity, share_prefix) for group in groups]


def with_noise(batch: Batch, alpha: float, hidden_size: int, seed: int, step: int) -> Batch:
    """NEFTune: the batch with noise for its embeddings, uniform in +-alpha / sqrt(L * D) for a row of L tokens.

    L is the row's own length, and what is drawn follows from (seed, step, data row) alone: padded, packed, resumed or cut into
    other micro-batches, a row gets the same noise. Padding gets none.

    Args:
        batch: without a shared prefix, which could have one noise only.
        alpha: how strong; 5 to 15 in the paper.
        hidden_size: D.
        seed: the run's.
        step: the optimizer step.

    Returns:
        The batch with ``noise`` (B, T, D), fp32, on the CPU.

    Ref: Jain et al. 2023, arXiv:2310.05914, algorithm 1. TRL's L is the length that the batch is padded to.
    """
    assert batch.prefix_length == 0, "rows that share a prefix cannot have noise of their own in it"
    noise = torch.zeros(batch.input_ids.numel(), hidden_size)
    for begin, end, row in row_pieces(batch):
        bound = alpha / math.sqrt((end - begin) * hidden_size)
        noise[begin:end].uniform_(-bound, bound, generator=generator(seed, "neftune", step, row))
    return replace(batch, noise=noise.view(*batch.input_ids.shape, hidden_size))


def row_pieces(batch: Batch) -> list[tuple[int, int, int]]:
    """Where each data row of a batch without a shared prefix lies: (begin, end) among its flat tokens, and the row."""
    T = batch.input_ids.shape[1]
    pieces: list[tuple[int, int, int]] = []
    for b, (ids, rows) in enumerate(zip(batch.segment_ids.cpu(), batch.segment_rows, strict=True)):
        begin = b * T
        for row, length in zip(rows, ids.bincount(minlength=len(rows) + 1)[1:].tolist(), strict=True):
            pieces.append((begin, begin + length, row))
            begin += length
    return pieces
