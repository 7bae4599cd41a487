"""Which numbers the shape of a decoder may have: they come from a file that somebody else wrote.

A size that no model has is refused before memory is asked for, and a switch that would give infinite or empty attention
before the first forward pass. What the fields mean stands in ``config.ModelConfig``.
"""

from __future__ import annotations

from typing import Protocol

from minisft.common.errors import UserError, visible
from minisft.common.settings import NOT_NEGATIVE, POSITIVE, Allowed

# The largest size that is believed.
_LARGEST = {
    "vocab_size": 2**24, "hidden_size": 2**17, "intermediate_size": 2**19, "num_layers": 1024, "num_heads": 4096,
    "num_kv_heads": 4096, "head_dim": 4096, "max_position_embeddings": 2**31,
}  # fmt: skip
_OR_NULL = Allowed(POSITIVE.holds, "a positive number or null")
_NUMBERS = {
    "rms_norm_eps": Allowed(NOT_NEGATIVE.holds, "a small positive number"), "rope_theta": POSITIVE,
    "sliding_window": _OR_NULL, "local_rope_theta": _OR_NULL, "embedding_multiplier": POSITIVE,
    "attention_multiplier": _OR_NULL, "residual_multiplier": POSITIVE, "logits_divisor": POSITIVE, "logits_softcap": _OR_NULL,
}  # fmt: skip


class _Shape(Protocol):
    """What the checks look at beside the numbers above."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def nope_layers(self) -> tuple[int, ...]: ...
    @property
    def global_layers(self) -> tuple[int, ...]: ...


def check_model(config: _Shape) -> None:
    """Refuse a shape that no decoder has.

    Args:
        config: a ``ModelConfig``.

    Raises:
        UserError: ``model/bad-config``, with the field and what it may be.
    """
    for name, limit in _LARGEST.items():
        if not 1 <= (size := getattr(config, name)) <= limit:
            raise _error(f"{name} is absurd", str(size), f"1 to {limit}")
    for name, allowed in _NUMBERS.items():
        if (number := getattr(config, name)) is not None and not allowed.holds(number):
            raise _error(f"{name} is absurd", str(number), allowed.expected)
    for name in ("nope_layers", "global_layers"):
        if absent := [layer for layer in getattr(config, name) if not 0 <= layer < config.num_layers]:
            raise _error(f"{name} names a layer that is not there", visible(absent), f"0 to {config.num_layers - 1}")
    if config.num_heads % config.num_kv_heads:
        raise _error("the heads do not divide", f"{config.num_heads} heads over {config.num_kv_heads} kv heads", "a multiple")
    if config.head_dim % 2:
        raise _error("head_dim is odd", str(config.head_dim), "an even number (RoPE turns pairs)")


def _error(what: str, found: str, expected: str) -> UserError:
    return UserError("model/bad-config", what, where="config.json", found=found, expected=expected)
