"""The functions of ``minisft.nf4`` on a CPU at full speed, with the same bits; and the sums of a merge report in one pass.

The work is done by ``cpu_nf4.cpp``, which ``cpu_build`` compiles at the first call. Where that does not succeed, and for what
the C++ does not do (fp64, another device, tensors that are not laid out plainly), the reference does it, so a caller need not
ask. Products are in ``cpu_matmul``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from minisft import nf4
from minisft.kernels import cpu_build
from minisft.kernels.workspace import borrowed
from minisft.nf4 import CHUNK, NESTED_BLOCK_SIZE, QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = (Tensor, torch.nn.Parameter)  # another subclass may have no memory to read
USE_TILES = True  # False: as on a CPU without AMX, for tests and benchmarks


class WeightFields(ctypes.Structure):
    """``Weight`` in cpu_lanes.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "map", "absmax2", "offset", "levels", "least")),
        *((name, ctypes.c_int64) for name in ("length", "block_shift")),
    )


class EffectSums(ctypes.Structure):
    """What ``effect_sums`` found, with E = W' - W as stored and D as trained; ``EffectSums`` in cpu_nf4.cpp.

    Attributes:
        base, delta, error, dot: sums of W^2, D^2, (E - D)^2 and E D, in fp64.
        num_nonzero, num_changed: how many entries of D are not zero, and how many of those changed W.
    """

    base: float
    delta: float
    error: float
    dot: float
    num_nonzero: int
    num_changed: int
    _fields_ = (
        *((name, ctypes.c_double) for name in ("base", "delta", "error", "dot")),
        *((name, ctypes.c_int64) for name in ("num_nonzero", "num_changed")),
    )


# ---- the library -----------------------------------------------------------------------------------------------------


def path() -> str:
    """Which code runs, for people: "native code (AVX2)" or "PyTorch (no C++ compiler found)". Compiles if nobody has yet."""
    handle, reason = cpu_build.load()
    if handle is None or not _gives_our_bits():
        return f"PyTorch ({reason or 'the compiled code gave wrong bits'})"
    return f"native code ({instructions()})"


def instructions() -> str:
    """AVX-512, AVX2 or portable; empty where there is no compiled code."""
    handle = library()
    return "" if handle is None else handle.nf4_instructions().decode()


def library() -> ctypes.CDLL | None:
    """The compiled code, or None where there is none that gives the bits of ``minisft.nf4``."""
    return cpu_build.load().handle if _gives_our_bits() else None


@functools.cache
def _gives_our_bits() -> bool:
    """Whether a small weight comes out as it does in PyTorch; a compiler that was told to be fast and loose fails here."""
    library = cpu_build.load().handle
    if library is None:
        return False
    library.nf4_instructions.restype = ctypes.c_char_p
    weight = torch.linspace(-3.0, 3.0, 4111, dtype=torch.float32)  # odd, and a short last block
    q, nested = nf4.quantize(weight, double_quant=False), nf4.quantize(weight)
    packed, absmax, dense = torch.empty_like(q.packed), torch.empty_like(q.absmax), torch.empty_like(weight)
    _code_with(library, weight, q.block_size, q.levels, packed, absmax)
    _dequantize_with(library, nested, dense)
    return torch.equal(packed, q.packed) and torch.equal(absmax, q.absmax) and torch.equal(dense, nf4.dequantize(nested))


def tile_floats() -> int:
    """Memory that a step's products by AMX tiles need, in floats for each number of a row; 0 without tiles, for any product."""
    return _tile_floats() if USE_TILES else 0


@functools.cache
def vector_lanes() -> int:
    """How many fp32 numbers a vector of the compiled code holds."""
    handle = library()
    assert handle is not None, "ask library first"
    handle.lanes.restype = ctypes.c_int64
    return int(handle.lanes())


@functools.cache
def _tile_floats() -> int:
    handle = library()
    if handle is None:
        return 0
    handle.tile_floats.restype = ctypes.c_int64
    return int(handle.tile_floats())


def has_numbers(tensor: Tensor) -> bool:
    """Whether C++ may read this tensor: one with memory, on the CPU and without gaps."""
    return type(tensor) in TENSORS and tensor.is_cpu and tensor.is_contiguous()


def is_plain(q: QuantizedWeight) -> bool:
    """Whether C++ may read these tensors: on the CPU, contiguous, of the sizes that the shape asks for."""
    length = q.shape.numel()
    blocks = -(-length // q.block_size)
    scale_dtype = torch.float32 if q.absmax2 is None else torch.uint8
    wanted = [(q.packed, torch.uint8, (length + 1) // 2), (q.absmax, scale_dtype, blocks), (q.levels, torch.float32, 16)]
    if (q.absmax2 is None) != (q.offset is None) or q.block_size not in nf4.BLOCK_SIZES:
        return False
    if q.absmax2 is not None and q.offset is not None:
        wanted += [(q.absmax2, torch.float32, -(-blocks // NESTED_BLOCK_SIZE)), (q.offset, torch.float32, 1)]
    return all(t.dtype == dtype and t.numel() == size and t.is_cpu and t.is_contiguous() for t, dtype, size in wanted)


def can_decode(q: QuantizedWeight) -> bool:
    """Whether the C++ decodes this weight, so that a buffer can be reused for it."""
    return library() is not None and is_plain(q)


def pointers_to(q: QuantizedWeight) -> WeightFields:
    """``q`` as the C++ sees it: pointers into ``q``, which the caller keeps alive; the map is kept by its cache."""
    nested: tuple[int | None, ...] = (None, None, None)
    if q.absmax2 is not None and q.offset is not None:
        nested = (nf4.dynamic_map(q.absmax.device).data_ptr(), q.absmax2.data_ptr(), q.offset.data_ptr())
    shift = q.block_size.bit_length() - 1
    return WeightFields(q.packed.data_ptr(), q.absmax.data_ptr(), *nested, q.levels.data_ptr(), None, q.shape.numel(), shift)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# ---- quantize, dequantize --------------------------------------------------------------------------------------------


def quantize(
    weight: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    levels: str | Sequence[float] | Tensor = "nf4",
    *,
    name: str = "weight",
) -> QuantizedWeight:
    """``nf4.quantize``, with its bits and errors.

    Args:
        weight, block_size, double_quant, levels, name: as there.

    Returns:
        the quantized weight.
    """
    native = library() if weight.device.type == "cpu" else None
    coder = None if native is None else functools.partial(_code_with, native)
    return nf4.quantize(weight, block_size, double_quant, levels, name=name, coder=coder)


def _code_with(library: ctypes.CDLL, flat: Tensor, block_size: int, table: Tensor, packed: Tensor, absmax: Tensor) -> None:
    """``nf4.code_blocks`` in C++; what is not fp32 goes a chunk at a time, so that widening it costs little memory."""
    midpoints, order = nf4.midpoints_of(table)
    codes, threads = order.to(torch.int32), torch.get_num_threads()
    step = -(-flat.numel() // CHUNK) * CHUNK if flat.dtype == torch.float32 else CHUNK
    pieces = zip(flat.split(step), packed.split(step // 2), absmax.split(step // block_size), strict=True)
    for chunk, packed_out, absmax_out in pieces:
        numbers = chunk.to(torch.float32).contiguous()
        sizes = (ctypes.c_int64(numbers.numel()), ctypes.c_int64(block_size))
        tables_and_results = map(_address, (midpoints, codes, packed_out, absmax_out))
        library.nf4_quantize(_address(numbers), *sizes, *tables_and_results, threads)


@torch.no_grad()
def dequantize(q: QuantizedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """``nf4.dequantize``, with its bits.

    Args:
        q: the weight, on any device.
        dtype: of the result; the source's own if None.
        out: contiguous, of ``q.shape`` and ``dtype``, on the device of ``q``; a new tensor if None.

    Returns:
        ``out``, the dense weight.

    Raises:
        ValueError: ``out`` is something else.
    """
    dtype = dtype or q.dtype
    if out is not None and (out.shape != q.shape or out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(f"out must be a contiguous {dtype} {tuple(q.shape)}, not {out.dtype} {tuple(out.shape)}")
    native = library()
    if native is None or dtype not in FLOATS or not is_plain(q) or (out is not None and out.device.type != "cpu"):
        dense = nf4.dequantize(q, dtype)
        return dense if out is None else out.copy_(dense)
    out = torch.empty(q.shape, dtype=dtype) if out is None else out
    if dtype == torch.float16:  # a kind of its own on each CPU; rounding the fp32 values once gives the same bits
        with borrowed(q.shape, torch.float32, out.device) as fp32:
            _dequantize_with(native, q, fp32)
            return out.copy_(fp32)
    _dequantize_with(native, q, out)
    return out


def _dequantize_with(library: ctypes.CDLL, q: QuantizedWeight, out: Tensor) -> None:
    function = library.nf4_dequantize_float32 if out.dtype == torch.float32 else library.nf4_dequantize_bfloat16
    function(ctypes.byref(pointers_to(q)), _address(out), torch.get_num_threads())


# ---- merge report ----------------------------------------------------------------------------------------------------


def effect_sums(base: Tensor, delta: Tensor, stored: Tensor) -> EffectSums | None:
    """The sums of ``effect.Effect`` over W, D and W'.

    Args:
        base, delta, stored: W, D and W', flat and of one size.

    Returns:
        the sums; None for what the C++ does not read.
    """
    native = library()
    if native is None or not all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (base, delta, stored)):
        return None
    sums = EffectSums()
    native.merge_effect(*map(_address, (base, delta, stored)), ctypes.c_int64(base.numel()), ctypes.byref(sums))
    return sums
