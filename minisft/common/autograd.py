"""What passes from forward to backward: an ``autograd.Function``'s context with types, and tensors that are computed again.

PyTorch's own class declares nothing of the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """The ``ctx`` of a function; one that keeps more than tensors declares it in a protocol of its own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep ``tensors`` for backward, where they are ``saved_tensors``."""


@contextmanager
def computed_again(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """What keeps ``result`` for backward in this block keeps ``inputs`` instead; backward then calls ``function`` once more.

    Args:
        result: ``function(*inputs)``, which has the same bits whenever it is called.
        function: cheap.
        inputs: those that somebody else keeps too cost nothing.

    Returns:
        the block's context.
    """
    inputs = tuple(x.detach() for x in inputs)
    results = [result]  # nothing in this block may hold it afterwards
    kept: list[Tensor] = []  # the one of backward, while it is still asked for
    num_uses = 0

    def pack(tensor: Tensor) -> Tensor | None:
        nonlocal num_uses
        if not tensor.is_set_to(results[0]):
            return tensor
        num_uses += 1
        return None

    def unpack(tensor: Tensor | None) -> Tensor:
        nonlocal num_uses
        if tensor is not None:
            return tensor
        if not kept:
            with torch.no_grad():
                kept.append(function(*inputs))
        num_uses -= 1
        return kept.pop() if num_uses <= 0 else kept[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    results.clear()
