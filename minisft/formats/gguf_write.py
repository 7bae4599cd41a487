"""GGUF files written as a tape: header, metadata, descriptions, then the tensors' bytes as they are computed.

Names, shapes and types are known before the first number is, so nothing is held but the piece in hand. What this module
refuses: metadata of a type that the format has no word for, and pieces that do not add up to what the description says.

Ref: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from minisft.formats.gguf_header import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, STRING, Metadata, Scalar
from minisft.formats.gguf_types import StoredType

VERSION = 3
_UINT32, _INT32, _FLOAT32 = 4, 5, 6


@dataclass(frozen=True)
class GGUFSpec:
    """What a file says of a tensor.

    Args:
        kind: how its numbers are stored.
        shape: outermost dimension first, as torch has it.
    """

    kind: StoredType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file, without padding."""
        return self.kind.num_bytes(self.shape)


Pieces = Callable[[str], Iterable[Tensor]]  # name -> the tensor's bytes, flat uint8 pieces in order


def gguf_bytes(metadata: Metadata, specs: Mapping[str, GGUFSpec], pieces: Pieces) -> Iterator[bytes | memoryview]:
    """A whole file in pieces, for ``create_durably``.

    Args:
        metadata: integers become uint32 (int32 in arrays), floats float32.
        specs: every tensor, in the order of the file.
        pieces: asked once for each name, in that order.

    Yields:
        bytes.

    Raises:
        ValueError: a piece too many or too few.
    """
    yield gguf_header(metadata, specs)
    for name, spec in specs.items():
        written = 0
        for piece in pieces(name):
            raw = piece.contiguous().numpy().data
            written += len(raw)
            yield raw
        if written != spec.num_bytes:
            raise ValueError(f"{name} was announced with {spec.num_bytes} bytes and has {written}")
        yield bytes(-written % DEFAULT_ALIGNMENT)


def gguf_header(metadata: Metadata, specs: Mapping[str, GGUFSpec]) -> bytes:
    """Everything before the first tensor, padding included."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(specs), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for name, spec in specs.items():
        dimensions = spec.shape[::-1]
        form = f"<I{len(dimensions)}QIQ"
        parts += [_text(name), struct.pack(form, len(dimensions), *dimensions, spec.kind.type_id, offset)]
        offset += -(-spec.num_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    head = b"".join(parts)
    return head + bytes(-len(head) % DEFAULT_ALIGNMENT)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Scalar | list[Scalar]) -> bytes:
    if not isinstance(value, list):
        kind, raw = _scalar(value)
        return struct.pack("<I", kind) + raw
    if all(isinstance(item, str) for item in value):  # an empty list, too: of merges, which are strings
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(_text(str(item)) for item in value)
    numbers = [item for item in value if isinstance(item, int) and not isinstance(item, bool)]
    if len(numbers) < len(value):
        raise TypeError("an array of the metadata holds something other than strings or integers")
    return struct.pack(f"<IIQ{len(numbers)}i", ARRAY, _INT32, len(numbers), *numbers)


def _scalar(value: Scalar) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    return (_FLOAT32, struct.pack("<f", value)) if isinstance(value, float) else (STRING, _text(value))
