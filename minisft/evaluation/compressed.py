"""A step that reads weights in fewer bits where those are the same numbers: the exact form of ``fast_decode.py``.

Most checkpoints are published in bf16. ``kernels/exact_copy.py`` holds their numbers in 12 bits without a loss, whether they
were loaded in fp32 or in bf16, and those of a GGUF file in the file's own 4 to 8 bits. Native steps of a model that was
switched on read such a copy of every weight that has one, the linears' and the head's, also of a dense head over 4-bit layers.
Sums are made in fp32 as before. A weight with one other number (trained, merged in fp32) is read as it is. The command line
switches it on where a model writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from minisft.evaluation.fast_decode import dense_weights, held_weights
from minisft.formats.loading import available_bytes
from minisft.generation import no_dropout
from minisft.kernels.cpu_decode import Unsupported
from minisft.kernels.exact_copy import forget, max_copy_bytes
from minisft.model import CausalLM
from minisft.native.decoder import exact_copies, in_compressed, in_eight_bits, is_native

MIN_FREE = 2  # times the memory of the copies: what the command line leaves to caches and others


@dataclass(frozen=True)
class CompressedWeights:
    """What steps read of a model in fewer bits.

    Attributes:
        num_weights: that have an exact copy.
        num_bytes: memory that those copies take, beside the weights; other models of the same weights share them.
    """

    num_weights: int
    num_bytes: int


def decode_compressed_(model: CausalLM) -> CompressedWeights:
    """Let steps of one token read exact copies of a model's dense weights in fewer bits, until ``free_compressed_``.

    No weight changes. Logits have the bits that they had up to 8 rows (5 where 16 bits are read), with weights in bf16, and on
    a CPU without AMX; else tiles of AMX may round differently than vectors do. It is not on by itself, for it takes memory,
    and a model that was merged in fp32 holds other numbers: its steps would be compared with those of a base that reads fewer
    bytes. ``minisft generate``, ``chat``, ``serve``, ``eval``, ``sweep`` and ``arena`` switch it on where memory allows.

    Args:
        model: with or without adapters. A weight that changes is looked at again for the next batch of prompts, see
            ``WeightCopies`` for the changes that are not seen: then call this again, after ``free_compressed_``. After
            ``fast_decode_`` 8 bits are read, until ``exact_decode_``.

    Returns:
        what has been copied: nothing of a model on a GPU, in 8 bits, or that native code does not decode.

    Cost: for each number of such a weight 5 to 10 bits if it has its file's; else 12 to 14, if its inputs are a multiple of 64
    and at most an eighth of its blocks stand apart; else 16, in fp32 alone, as on a CPU without AVX2. Two to five seconds for a
    thousand million of them. A copy of a model (``merge``, ``deepcopy``) does not know the file that it came from.
    """
    in_compressed.add(model)
    if model in in_eight_bits:
        return CompressedWeights(0, 0)
    try:
        with no_dropout(model):
            copies = {id(copy): copy for copy in exact_copies(model)}.values()
    except Unsupported:
        _forget_all(model)
        return CompressedWeights(0, 0)
    return CompressedWeights(len(copies), sum(copy.nbytes for copy in copies))


def free_compressed_(model: CausalLM) -> None:
    """Let steps read weights as they are again, and free the copies, which other models of the same weights make anew."""
    in_compressed.discard(model)
    _forget_all(model)


def _forget_all(model: CausalLM) -> None:
    for weight in held_weights(model):
        forget(weight)


def _is_native(model: CausalLM) -> bool:
    with no_dropout(model):
        return is_native(model)


def decode_compressed_if_memory_allows_(models: Iterable[CausalLM], log: Callable[[str], None]) -> bool:
    """What the command line does: ``decode_compressed_`` of models together, whose copies are made when they first write.

    Args:
        models: which may share weights. All that will write: what one is promised is not counted for the next.
        log: called with one line where memory is too short.

    Returns:
        whether it is on for those that native code decodes: as much memory is free as twice what the copies take at most, or
        nobody knows how much is.
    """
    some = list(filter(_is_native, models))
    weights = {id(weight): weight for model in some for weight in dense_weights(model)}
    needed, free = sum(map(max_copy_bytes, weights.values())), available_bytes(torch.device("cpu"))
    if free is not None and free < MIN_FREE * needed:
        need = f"compressed copies would take up to {needed / 1e9:.2f} GB and are made where twice that is free"
        log(f"weights are read as they are: {need}; {free / 1e9:.2f} GB are")
        return False
    in_compressed.update(some)
    return True
