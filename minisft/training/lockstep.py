"""Processes that share a base gather every layer together, so each of them computes as many batches as the others.

Nor may one of them write a longer answer than another: all go on from the logits of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from minisft.batching import Batch, collate
from minisft.data.chat import Encoded
from minisft.model import CausalLM
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


@contextlib.contextmanager
def same_logits(model: CausalLM, world: World) -> Iterator[None]:
    """Within this block every process has the first one's logits, so that a last bit changes the answer of all or of none.

    Args:
        model: whose ``head`` is asked for them by all processes alike.
        world: the processes.

    Cost: a broadcast of the logits of every token that is written.
    """
    own = model.head

    def head(hidden: Tensor) -> Tensor:
        return world.from_first_(own(hidden))

    model.head = head  # type: ignore[method-assign]  # of this model only
    try:
        yield
    finally:
        del model.head  # that of its class is there again
