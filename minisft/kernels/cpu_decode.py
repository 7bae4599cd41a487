"""One decoding step in one native call: the structs of ``cpu_decode.cpp``, filled from tensors.

The C++ takes pointers and checks nothing. Here a tensor becomes a pointer only if it lies as the C++ reads it, else
``Unsupported`` says what does not; ``minisft.native.decoder`` walks through the model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_matmul import COLUMNS
from minisft.kernels.eight_bit import EightBitWeight
from minisft.kernels.exact_copy import ExactCopy
from minisft.kernels.gguf_copy import GROUP, FourBitWeight
from minisft.kernels.twelve_bit import TwelveBitWeight
from minisft.nf4 import QuantizedWeight

MAX_ROWS = 16  # rows of a step; more of them go to the BLAS, which reads each weight once for all rows
PACKED_COLUMNS = 32  # a row of 4-bit weights is read in groups of 32, a dense one in groups of COLUMNS
KINDS = {torch.float32: 0, torch.bfloat16: 1}
NF4, EIGHT_BIT, TWELVE_BIT, FOUR_BIT = 2, 3, 4, 5


class Unsupported(Exception):  # noqa: N818  # no error: the readable model takes over
    """What the native step does not compute; its text is the reason."""


class EightBitFields(ctypes.Structure):
    """``EightBit`` in cpu_decode.cpp."""

    _fields_ = (("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("block", ctypes.c_int64))


class TwelveBitFields(ctypes.Structure):
    """``TwelveBit`` in cpu_twelve_bit.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("packed", "base", "first", "at", "apart", "whole"))


class LinearFields(ctypes.Structure):
    """``Linear`` in cpu_decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "A", "B")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "rank")),
        ("scaling", ctypes.c_float),
        ("kind", ctypes.c_int32),
        ("factor_kind", ctypes.c_int32),
    )


class LayerFields(ctypes.Structure):
    """``Layer`` in cpu_decode.cpp."""

    _fields_ = (
        *((name, LinearFields) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm")),
    )


class StepFields(ctypes.Structure):
    """``Step`` in cpu_decode.cpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerFields)),
        *((name, ctypes.c_void_p) for name in ("embedding", "final_norm", "cos", "sin", "ids", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "shared", "own", "logits")),
        ("head", LinearFields),
        *((name, ctypes.c_int64) for name in ("num_layers", "rows", "D", "H", "K", "E", "I", "max_rank", "window")),
        *((name, ctypes.c_int64) for name in ("own_size", "layer_stride", "slot_stride", "head_stride", "position_stride")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("embedding_kind", "cache_kind", "threads", "use_tiles")),
    )


def require(ok: bool, reason: str) -> None:
    """Raise ``Unsupported`` with ``reason`` unless ``ok``."""
    if not ok:
        raise Unsupported(reason)


class Pointers:
    """Turns tensors into pointers, and keeps alive what they point to."""

    def __init__(self) -> None:
        self._kept: list[object] = []

    def numbers(self, tensor: Tensor, what: str, dtypes: Sequence[torch.dtype] = tuple(KINDS)) -> int:
        """The address of a tensor's numbers.

        Args:
            tensor: read as it lies, never copied.
            what: for the reason.
            dtypes: which ones the C++ reads there.

        Returns:
            it, as long as this object lives.

        Raises:
            Unsupported: another dtype, device or layout.
        """
        require(type(tensor) in cpu_nf4.TENSORS and tensor.is_cpu, f"{what} is not on the CPU")
        require(tensor.dtype in dtypes, f"{what} is {str(tensor.dtype).removeprefix('torch.')}")
        require(tensor.is_contiguous(), f"{what} is not contiguous")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def vector(self, tensor: Tensor | None, size: int, what: str) -> int | None:
        """The address of a vector in fp32: of the tensor itself, or of a copy where it is stored in bf16.

        Args:
            tensor: (size,), or None.
            size: what it must be.
            what: for the reason.

        Returns:
            it, as long as this object lives; None for None.

        Raises:
            Unsupported: another shape, dtype, device or layout.
        """
        if tensor is None:
            return None
        require(tensor.shape == (size,), f"{what} has the shape {tuple(tensor.shape)}")
        self.numbers(tensor, what)
        return self.numbers(tensor.detach().float(), what)

    def linear(
        self,
        weight: ExactCopy | QuantizedWeight,
        bias: Tensor | None,
        update: tuple[Tensor, Tensor, float] | None,
        what: str,
        whole: Tensor | None = None,
    ) -> LinearFields:
        """A linear layer and its adapter.

        Args:
            weight: (out, in), dense or in 4, 8 or 12 bits.
            bias: (out,) or None.
            update: lora_A (rank, in), lora_B (out, rank), both in fp32 or both in bf16, and the scaling; or None.
            what: the layer's name, for the reason.
            whole: of a weight in 12 bits the same in bf16, if there is one: many rows are multiplied by that.

        Returns:
            what the C++ reads, as long as this object lives.

        Raises:
            Unsupported: the layer is stored in another way.
        """
        out_features, in_features = weight.shape
        require(in_features % COLUMNS == 0, f"{what} has {in_features} inputs, no multiple of {COLUMNS}")
        if isinstance(weight, QuantizedWeight):
            require(cpu_nf4.is_plain(weight), f"{what} is quantized in another layout")
            require(in_features % PACKED_COLUMNS == 0, f"{what} has {in_features} inputs, no multiple of {PACKED_COLUMNS}")
            fields = cpu_nf4.pointers_to(weight)
            self._kept += [weight, fields]
            address, kind = ctypes.addressof(fields), NF4
        elif isinstance(weight, FourBitWeight):
            least = None if weight.least is None else weight.least.data_ptr()
            pointers = (weight.packed.data_ptr(), weight.scales.data_ptr(), None, None, None, weight.levels.data_ptr(), least)
            four = cpu_nf4.WeightFields(*pointers, weight.shape.numel(), GROUP.bit_length() - 1)
            self._kept += [weight, four]
            address, kind = ctypes.addressof(four), FOUR_BIT
        elif isinstance(weight, EightBitWeight):
            eight = EightBitFields(weight.codes.data_ptr(), weight.scales.data_ptr(), weight.block_size)
            self._kept += [weight, eight]
            address, kind = ctypes.addressof(eight), EIGHT_BIT
        elif isinstance(weight, TwelveBitWeight):
            bf16 = None if whole is None else self.numbers(whole, what, (torch.bfloat16,))
            twelve = TwelveBitFields(*(tensor.data_ptr() for tensor in vars(weight).values()), bf16)
            self._kept += [weight, twelve]
            address, kind = ctypes.addressof(twelve), TWELVE_BIT
        else:
            address = self.numbers(weight, what)
            kind = KINDS[weight.dtype]
        A = B = None
        rank, scaling, factor_kind = 0, 0.0, 0
        if update is not None:
            lora_A, lora_B, scaling = update
            A, B = (self.numbers(factor, f"a factor of {what}") for factor in (lora_A, lora_B))
            require(lora_A.dtype == lora_B.dtype, f"the factors of {what} have two dtypes")
            rank, factor_kind = lora_A.shape[0], KINDS[lora_A.dtype]
            fit = lora_A.shape == (rank, in_features) and lora_B.shape == (out_features, rank)
            require(fit, f"the factors of {what} do not fit it")
        return LinearFields(
            address,
            self.vector(bias, out_features, f"the bias of {what}"),
            A,
            B,
            in_features,
            out_features,
            rank,
            scaling,
            kind,
            factor_kind,
        )
