"""What an ``autograd.Function`` hands from forward to backward, with types (PyTorch's own class declares none of it)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The ``ctx`` of a function; one that keeps more than tensors declares it in a protocol of its own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep ``tensors`` for backward, where they are ``saved_tensors``."""
