"""What passes from forward to backward: an ``autograd.Function``'s context with types, and tensors that are computed again.

PyTorch's own class declares nothing of the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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
        the block's context. Hooks that stand around it see what it keeps, as if there were none here.

    Raises:
        RuntimeError: in backward, if what the block keeps was changed in place: under these hooks, autograd does not look.
    """
    inputs = tuple(x.detach() for x in inputs)
    # PyTorch calls the innermost hooks alone and has no public way to ask for those around them.
    outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_unchanged, _unchanged)
    results = [result]  # nothing in this block may hold it afterwards
    again: list[Tensor] = []  # the one of backward, while it is still asked for
    num_uses = 0

    def pack(tensor: Tensor) -> tuple[object, int] | None:
        nonlocal num_uses
        if not _is_same(tensor, results[0]):
            return outer_pack(tensor), tensor._version
        num_uses += 1
        return None

    def unpack(kept: tuple[object, int] | None) -> Tensor:
        nonlocal num_uses
        if kept is not None:
            tensor = outer_unpack(kept[0])
            if tensor is kept[0] and tensor._version != kept[1]:
                raise RuntimeError("a tensor that backward needs has been modified by an inplace operation")
            return tensor
        if not again:
            with torch.no_grad():
                again.append(function(*inputs))
        num_uses -= 1
        return again.pop() if num_uses <= 0 else again[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    results.clear()


def _unchanged(kept: Any) -> Any:
    return kept


def _is_same(one: Tensor, other: Tensor) -> bool:
    """``one.is_set_to(other)`` without an operator, which tensors without memory do not have."""
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata or one.dtype != other.dtype:
        return False
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())
