"""Copies of weights in another format: each kept as long as its weight lives, and made again when the weight has changed.

Models that share a weight (a tied embedding, adapters over one base) share its copy. Not every change is counted by PyTorch:
its fused AdamW's is not, nor are those through ``.data``. So some of the numbers are compared too, and an uncounted change of
other numbers alone is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NUM_SEEN = 64  # numbers, about, that are compared to see a change

Copy = TypeVar("Copy")


class WeightCopies(Generic[Copy]):
    """Remembers what ``make`` gave for each weight.

    Args:
        make: a weight -> its copy, which holds no reference to the weight.
    """

    def __init__(self, make: Callable[[Tensor], Copy]) -> None:
        self._make = make
        self._kept = WeakTensorKeyDictionary()  # weight -> (its state, copy)

    def of(self, weight: Tensor) -> Copy:
        """The copy of a weight as it is now: the one that is kept, or a new one if there is none or the weight has changed.

        Args:
            weight: fp32 or bf16, on the CPU.

        Returns:
            what ``make`` gave.
        """
        flat = weight.detach().flatten()
        step = len(flat) // NUM_SEEN | 1  # odd: the numbers lie in many columns, not all in the first
        seen = flat[::step].float().numpy().tobytes()
        state = (0 if weight.is_inference() else weight._version, weight.data_ptr(), seen)
        kept: tuple[object, Copy] | None = self._kept.get(weight)
        if kept is not None and kept[0] == state:
            return kept[1]
        del kept
        self.forget(weight)  # before the new one is made: only one of them is held
        made = self._make(weight)
        self._kept[weight] = (state, made)
        return made

    def forget(self, weight: Tensor) -> None:
        """Free what is kept of a weight."""
        self._kept.pop(weight, None)

    def __contains__(self, weight: Tensor) -> bool:
        """Whether something is kept of a weight."""
        return weight in self._kept

    def __len__(self) -> int:
        """Weights of which something is kept."""
        return len(self._kept)
