"""A step that reads fp32 weights in 16 bits where those are the same numbers: the exact form of ``fast_decode.py``.

Most checkpoints are published in bf16; loaded in fp32, the lower 16 bits of their numbers are zero, see
``kernels/sixteen_bit.py``. Native steps of a model that was switched on read a bf16 copy of every such weight, the linears'
and the head's, also of a dense head over 4-bit layers. Sums are made in fp32 as before. A weight with one other number
(trained, merged, from a GGUF file of 4 bits) is read as it is. The command line switches it on where a model writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from minisft.evaluation.fast_decode import dense_weights, held_weights
from minisft.formats.loading import available_bytes
from minisft.generation import no_dropout
from minisft.kernels.cpu_decode import Unsupported
from minisft.kernels.sixteen_bit import forget, may_have_copy
from minisft.model import CausalLM
from minisft.native.decoder import copies_in_16_bits, in_eight_bits, in_sixteen_bits

MIN_FREE = 2  # times the memory of the copies: what the command line leaves to caches and others


@dataclass(frozen=True)
class SixteenBits:
    """What steps in 16 bits read of a model.

    Attributes:
        num_weights: that have an exact copy in 16 bits.
        num_bytes: memory that those copies take, beside the weights; other models of the same weights share them.
    """

    num_weights: int
    num_bytes: int


def decode_in_16_bits_(model: CausalLM) -> SixteenBits:
    """Let steps of one token read a model's fp32 weights in 16 bits where that is exact, until ``free_16_bits_``.

    No weight changes. Up to 5 rows, and on a CPU without AMX, logits have the bits that they had; from 6 rows on tiles of AMX
    add in another order. It is not on by itself, for it takes memory, and a merged model in fp32 is no bf16 model any more: its
    steps would be compared with those of a base that reads half as many bytes. ``minisft generate``, ``chat``, ``serve``,
    ``eval``, ``sweep`` and ``arena`` switch it on where memory allows.

    Args:
        model: with or without adapters. A weight that changes is looked at again for the next batch of prompts, see
            ``WeightCopies`` for the changes that are not seen: then call this again, after ``free_16_bits_``. After
            ``fast_decode_`` 8 bits are read, until ``exact_decode_``.

    Returns:
        what has been copied: nothing of a model in bf16, on a GPU, in 8 bits, or that native code does not decode.

    Cost: 2 bytes for each number of such a weight, and two seconds for a thousand million of them.
    """
    in_sixteen_bits.add(model)
    if model in in_eight_bits:
        return SixteenBits(0, 0)
    try:
        with no_dropout(model):
            copies = {id(copy): copy for copy in copies_in_16_bits(model)}.values()
    except Unsupported:
        _forget_all(model)
        return SixteenBits(0, 0)
    return SixteenBits(len(copies), sum(copy.nbytes for copy in copies))


def free_16_bits_(model: CausalLM) -> None:
    """Let steps read fp32 weights as they are again, and free the copies, which other models of the same weights make anew."""
    in_sixteen_bits.discard(model)
    _forget_all(model)


def _forget_all(model: CausalLM) -> None:
    for weight in held_weights(model):
        forget(weight)


def decode_in_16_bits_if_memory_allows_(models: Iterable[CausalLM], log: Callable[[str], None]) -> bool:
    """What the command line does: ``decode_in_16_bits_`` of models together, whose copies are made when they first write.

    Args:
        models: which may share weights. All that will write: what one is promised is not counted for the next.
        log: called with one line where memory is too short.

    Returns:
        whether it is on: as much memory is free as twice what the copies take at most, or nobody knows how much is.
    """
    some = [model for model in models if type(model) is CausalLM]
    weights = {id(weight): weight for model in some for weight in dense_weights(model) if may_have_copy(weight)}
    needed, free = sum(weight.nbytes // 2 for weight in weights.values()), available_bytes(torch.device("cpu"))
    if free is not None and free < MIN_FREE * needed:
        need = f"copies in 16 bits would take {needed / 1e9:.2f} GB and are made where twice that is free"
        log(f"weights are read in fp32: {need}; {free / 1e9:.2f} GB are")
        return False
    in_sixteen_bits.update(some)
    return True
