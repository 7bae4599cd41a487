"""Stateless randomness: every random draw is a pure function of what it is for.

A generator is made from (seed, purpose, indices) and thrown away after use, so nothing random has to be saved in a
checkpoint, and what step 17 draws does not depend on what step 16 did.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed: the head of sha256 over ``seed/purpose/i/j/…``.

    Args:
        seed: the run's.
        purpose: what is drawn, for instance ``dropout``.
        indices: which of them: a step, a row, a layer.

    Returns:
        a number in [0, 2^63), as good as uniform, and unrelated for different arguments.
    """
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh ``torch.Generator`` that depends on nothing but its arguments.

    Args:
        seed, purpose, indices: as for ``derive_seed``.
        device: where its numbers are drawn; another kind of device draws other numbers.

    Returns:
        the generator.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *indices))
