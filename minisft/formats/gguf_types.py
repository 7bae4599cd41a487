"""How the numbers of an exported GGUF file are stored: fp32, fp16, bf16, or 8 bits in blocks of 32.

Every number is rounded once, from fp32. Vectors (norms, biases) stay fp32 in every kind of file, as llama.cpp expects. A matrix
whose rows are no multiple of 32 cannot be Q8_0 and becomes fp16. A number that the type cannot hold is refused.

Ref: ggml, ``ggml-quants.c``, ``quantize_row_q8_0_ref``; the bytes are those of the ``gguf`` package's quantizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minisft.common.errors import UserError, visible

OutType = Literal["f32", "f16", "bf16", "q8_0"]
BLOCK = 32  # weights of Q8_0 that share a scale


@dataclass(frozen=True)
class StoredType:
    """A type of numbers in a GGUF file.

    Args:
        name: ``ggml``'s name in lower case.
        type_id: in a tensor's description.
        file_type: ``general.file_type`` of a file whose matrices have this type.
        dtype: of each number; None for blocks of ``BLOCK`` bytes with a scale of 2.
    """

    name: OutType
    type_id: int
    file_type: int
    dtype: torch.dtype | None

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape."""
        items = math.prod(shape)
        return items // BLOCK * (BLOCK + 2) if self.dtype is None else items * self.dtype.itemsize


OUT_TYPES: dict[OutType, StoredType] = {
    "f32": StoredType("f32", 0, 0, torch.float32),
    "f16": StoredType("f16", 1, 1, torch.float16),
    "bf16": StoredType("bf16", 30, 32, torch.bfloat16),
    "q8_0": StoredType("q8_0", 8, 7, None),
}


def stored_type(wanted: OutType, shape: tuple[int, ...]) -> StoredType:
    """The type of one tensor in a file of the type ``wanted``."""
    if len(shape) < 2:
        return OUT_TYPES["f32"]
    return OUT_TYPES["f16" if wanted == "q8_0" and shape[-1] % BLOCK else wanted]


def encode(name: str, numbers: Tensor, kind: StoredType) -> tuple[Tensor, Tensor]:
    """Round numbers to a type.

    Args:
        name: of the tensor, for the message.
        numbers: any shape and float dtype; for Q8_0 whole blocks.
        kind: the type.

    Returns:
        the bytes, flat uint8; and the numbers as they will be read back, fp32, in the shape of ``numbers``.

    Raises:
        UserError: ``numeric/export-not-finite``.
    """
    numbers = numbers.float()
    if kind.dtype is None:
        raw, back = _q8_0(numbers)
    else:
        stored = numbers.to(kind.dtype)
        raw, back = stored.reshape(-1).view(torch.uint8), stored.float()
    if not bool(torch.isfinite(back).all()):
        largest = float(numbers.abs().max())
        raise UserError(
            "numeric/export-not-finite", "a weight is not finite in the exported file", where=visible(name),
            found=f"numbers up to {largest:.4g} as {kind.name}",
            fix="--outtype bf16 or f32 holds all that fp32 holds; a weight that is not finite there is damaged",
        )  # fmt: skip
    return raw, back


def _q8_0(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """d = max |x| / 127 in fp32, codes = x / d rounded half away from zero, then d in fp16; block by block."""
    blocks = numbers.reshape(-1, BLOCK)
    d = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * torch.where(d == 0, 0.0, 1 / d)
    floor = scaled.abs().floor()
    codes = (torch.where(scaled.abs() - floor >= 0.5, floor + 1, floor) * scaled.sign()).to(torch.int8)
    scale = d.to(torch.float16)
    raw = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=1)
    return raw.reshape(-1), (codes.float() * scale.float()).view(numbers.shape)
