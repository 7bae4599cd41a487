"""Tensors of which each process of a run holds a share, and how to have them whole.

Only ``parallel/`` makes them. What needs a whole weight outside of the forward pass, where shares are gathered anyway, asks
here; for any other tensor nothing is done, and PyTorch's distributed tensors are not even imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def is_share(tensor: Tensor) -> bool:
    """Whether this process holds a part of ``tensor``, and the others the rest."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there can be none
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """``tensor``; gathered, without a gradient, where it is a share: then all processes must ask for it together."""
    return tensor.detach().full_tensor() if is_share(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written, so that one is held at a time: what it will be, and how to have it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def made(tensor: Tensor | Later) -> Tensor:
    """The tensor, now."""
    return tensor.make() if isinstance(tensor, Later) else tensor
