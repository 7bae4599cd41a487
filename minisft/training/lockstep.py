"""Processes that share a base gather every layer together, so each of them computes as many batches as the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minisft.batching import Batch, collate
from minisft.data.chat import Encoded
from minisft.parallel.world import World


def idle_batch(pad_id: int) -> Batch:
    """A batch of nothing to learn: two tokens of no row, no target, not counted."""
    return replace(collate([Encoded([pad_id, pad_id], [False, False], 0, 0, 2)], pad_id), num_tokens=0, rows=())


def even(batches: Sequence[Batch], world: World, pad_id: int) -> list[Batch]:
    """As many batches in each process: where one has fewer than another, it gets ``idle_batch``es.

    Args:
        batches: this process's.
        world: the processes; all of them must ask.
        pad_id: the tokenizer's padding.

    Returns:
        ``batches``, and what is missing.
    """
    return [*batches, *[idle_batch(pad_id)] * (world.largest(len(batches)) - len(batches))]
