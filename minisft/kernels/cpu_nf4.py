"""The functions of ``minisft.nf4`` on a CPU at full speed, and products of a few rows that never build the dense weight.

``dequantize`` and ``quantize`` give the bits of ``minisft.nf4``; ``matmul`` multiplies and sums in fp32; ``effect_sums``
measures a merge in one pass over its numbers. The work is done by
``cpu_nf4.cpp``, which ``cpu_build`` compiles at the first call. Where that does not succeed, and for what the C++ does
not do (fp64, another device, tensors that are not laid out plainly), the reference serves, so a caller need not ask.

A newcomer leaves with one idea: few rows are limited by memory, and 4 bits are an eighth of fp32, so reading them directly is
faster than any dense product; many rows are limited by arithmetic, so the weight is decoded once, into a buffer that is reused.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minisft import nf4
from minisft.kernels import cpu_build
from minisft.nf4 import CHUNK, NESTED_BLOCK_SIZE, QuantizedWeight

FEW_ROWS = 16  # measured on AVX2: at 32, decoding the weight once and the dense product are faster for small weights
# Of an fp32 weight, more rows are as fast in the BLAS; half the bytes win for longer.
FEW_DENSE_ROWS = {torch.float32: range(1, 9), torch.bfloat16: range(1, 17)}
LEAST_DENSE = 2**16  # weights: a smaller layer pays more for the call than it wins
COLUMNS = 16  # a row of weights is read in groups of 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_Function = Callable[..., object]  # one of the library's


class _Weight(ctypes.Structure):
    """``Weight`` in nf4.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "map", "absmax2", "offset", "levels")),
        *((name, ctypes.c_int64) for name in ("length", "block_shift")),
    )


class _Product(ctypes.Structure):
    """``Product`` in nf4.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y", "weight", "A", "B", "down", "wide")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "rank")),
        ("scaling", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class EffectSums(ctypes.Structure):
    """What ``effect_sums`` found, with E = W' - W as stored and D as trained; ``EffectSums`` in nf4.cpp.

    Attributes:
        base, delta, error, dot: sums of W^2, D^2, (E - D)^2 and E D, in fp64.
        asked, changed: how many entries of D are not zero, and how many of those changed W.
    """

    base: float
    delta: float
    error: float
    dot: float
    asked: int
    changed: int
    _fields_ = (
        *((name, ctypes.c_double) for name in ("base", "delta", "error", "dot")),
        *((name, ctypes.c_int64) for name in ("asked", "changed")),
    )


class Update(NamedTuple):
    """What an adapter adds to a product of a few rows: scaling * (x A^T) B^T.

    Args:
        lora_A: (rank, in). lora_B: (out, rank). Accepted by ``serves_update``.
        down: (M, rank), fp32; holds x A^T afterwards.
    """

    lora_A: Tensor  # noqa: N815  # the names that everybody gives them
    lora_B: Tensor  # noqa: N815
    scaling: float
    down: Tensor


# ---- the library -----------------------------------------------------------------------------------------------------


def path() -> str:
    """Which code runs, for people: "native code (AVX2)" or "PyTorch (no C++ compiler found)". Compiles if nobody has yet."""
    library, reason = cpu_build.load()
    if library is None or not _gives_our_bits():
        return f"PyTorch ({reason or 'the compiled code gave wrong bits'})"
    return f"native code ({library.nf4_instructions().decode()})"


def _library() -> ctypes.CDLL | None:
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


def _is_plain(q: QuantizedWeight) -> bool:
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


def _weight(q: QuantizedWeight) -> _Weight:
    """Pointers into ``q``, which the caller keeps alive; the map is kept by its cache."""
    nested: tuple[int | None, ...] = (None, None, None)
    if q.absmax2 is not None and q.offset is not None:
        nested = (nf4.dynamic_map(q.absmax.device).data_ptr(), q.absmax2.data_ptr(), q.offset.data_ptr())
    shift = q.block_size.bit_length() - 1
    return _Weight(q.packed.data_ptr(), q.absmax.data_ptr(), *nested, q.levels.data_ptr(), q.shape.numel(), shift)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# ---- there and back --------------------------------------------------------------------------------------------------


def quantize(
    weight: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    levels: str | Sequence[float] | Tensor = "nf4",
    *,
    name: str = "weight",
) -> QuantizedWeight:
    """``nf4.quantize``, with its arguments, bits and errors."""
    library = _library() if weight.device.type == "cpu" else None
    coder = None if library is None else functools.partial(_code_with, library)
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

    Raises:
        ValueError: ``out`` is something else.
    """
    dtype = dtype or q.dtype
    if out is not None and (out.shape != q.shape or out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(f"out must be a contiguous {dtype} {tuple(q.shape)}, not {out.dtype} {tuple(out.shape)}")
    library = _library()
    if library is None or dtype not in FLOATS or not _is_plain(q) or (out is not None and out.device.type != "cpu"):
        dense = nf4.dequantize(q, dtype)
        return dense if out is None else out.copy_(dense)
    out = torch.empty(q.shape, dtype=dtype) if out is None else out
    if dtype == torch.float16:  # a kind of its own on each CPU; rounding the fp32 values once gives the same bits
        return out.copy_(dense_weight(q, torch.float32))
    _dequantize_with(library, q, out)
    return out


def _dequantize_with(library: ctypes.CDLL, q: QuantizedWeight, out: Tensor) -> None:
    function = library.nf4_dequantize_float32 if out.dtype == torch.float32 else library.nf4_dequantize_bfloat16
    function(ctypes.byref(_weight(q)), _address(out), torch.get_num_threads())


class _Scratch(threading.local):
    """One buffer a dtype, for this thread alone: backward may run in another one."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


def dense_weight(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """``dequantize(q, dtype)``, only until this thread calls again: the next weight may overwrite it.

    Cost: the largest weight so far, kept. A new tensor each time would be new pages each time, which cost more than decoding.
    """
    library = _library()
    if library is None or dtype not in (torch.float32, torch.bfloat16) or not _is_plain(q):
        return nf4.dequantize(q, dtype)
    size, buffers = q.shape.numel(), _scratch.buffers
    if dtype not in buffers or buffers[dtype].numel() < size:
        buffers.pop(dtype, None)  # freed before the larger one is allocated
        buffers[dtype] = torch.empty(size, dtype=dtype)
    dense = buffers[dtype][:size].view(q.shape)
    _dequantize_with(library, q, dense)
    return dense


# ---- products of a few rows ------------------------------------------------------------------------------------------


def serves(x: Tensor, q: QuantizedWeight) -> bool:
    """Whether ``matmul`` takes this product, and is the fastest way to do it."""
    in_features = q.shape[1]
    few = 0 < x.numel() <= FEW_ROWS * in_features and x.shape[-1:] == (in_features,) and in_features % COLUMNS == 0
    return few and x.dtype in FLOATS and x.device.type == "cpu" and _library() is not None and _is_plain(q)


def matmul(x: Tensor, q: QuantizedWeight, bias: Tensor | None = None, update: Update | None = None) -> Tensor | None:
    """x W^T + b and the update, read from the 4 bits; fp32 weights and sums, one rounding. None if ``serves`` says no.

    Args:
        x: (..., in), fp32, bf16 or fp16. bias: (out,) or None. Returns: (..., out) in the dtype of ``x``, without a gradient.
    """
    library = _library()
    if library is None or not serves(x, q):
        return None
    weight = _weight(q)
    return _product(library.nf4_matmul, ctypes.addressof(weight), x, q.shape[0], bias, update)


def serves_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether ``dense_matmul`` takes this product and is the fastest way to do it (measured: ``benchmarks/LOG.md``)."""
    few = FEW_DENSE_ROWS.get(weight.dtype)
    if few is None or weight.numel() < LEAST_DENSE or not (weight.is_cpu and x.is_cpu) or torch.compiler.is_compiling():
        return False
    if type(x) is not Tensor or type(weight) not in (Tensor, torch.nn.Parameter):  # a subclass may have no memory to read
        return False
    in_features, dtype = weight.shape[1], x.dtype
    fits = x.numel() // in_features in few and x.shape[-1] == in_features and in_features % COLUMNS == 0
    return fits and weight.is_contiguous() and (dtype == torch.float32 or dtype == weight.dtype) and _library() is not None


def dense_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, update: Update | None = None) -> Tensor:
    """x W^T + b for a dense weight that ``serves_dense`` accepts, read as it is stored; multiplied and summed in fp32.

    Args:
        x: (..., in), fp32 or the dtype of the weight. weight: (out, in), fp32 or bf16. bias: (out,) or None.
        update: is added in the same call.

    Returns:
        (..., out) in the dtype of ``x``, without a gradient.
    """
    library = _library()
    assert library is not None, "ask serves_dense first"
    function = library.fp32_matmul if weight.dtype == torch.float32 else library.bf16_matmul
    return _product(function, weight.data_ptr(), x, weight.shape[0], bias, update)


def serves_update(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether an ``Update`` of these factors fits x, (..., in), and is the fastest way to do it."""
    rank, in_features = lora_A.shape
    if type(x) is not Tensor or in_features % COLUMNS or not 0 < x.numel() <= FEW_ROWS * in_features or x.dtype not in FLOATS:
        return False
    fits = x.is_cpu and x.dim() > 0 and x.shape[-1] == in_features and lora_B.shape[1] == rank
    plain = lora_A.is_cpu and lora_B.is_cpu and lora_A.is_contiguous() and lora_B.is_contiguous()
    wide = lora_A.dtype == torch.float32 and lora_B.dtype == torch.float32
    return fits and plain and wide and not torch.compiler.is_compiling() and _library() is not None


def add_update_(y: Tensor, rows: Tensor, update: Update) -> Tensor:
    """y += scaling * (x A^T) B^T in one call without a gradient.

    Args:
        y: (M, out); changed in place. rows: x, (M, in), accepted by ``serves_update``. Both fp32 and contiguous.
    """
    library = _library()
    assert library is not None, "ask serves_update first"
    _call(library.lora_update, None, rows, y, None, update)
    return y


def _product(
    function: _Function, weight: int, x: Tensor, out_features: int, bias: Tensor | None, update: Update | None
) -> Tensor:
    offset = None if bias is None else _plain_fp32(bias)
    if x.dtype == torch.bfloat16 and x.is_contiguous():
        y = torch.empty((*x.shape[:-1], out_features), dtype=torch.bfloat16)
        _call(function, weight, x, y, offset, update, torch.empty(x.numel() + y.numel(), dtype=torch.float32))
        return y
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    _call(function, weight, _plain_fp32(x), y, offset, update)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _plain_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.detach().to(torch.float32).contiguous()


def _call(
    function: _Function,
    weight: int | None,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    update: Update | None,
    wide: Tensor | None = None,
) -> None:
    """At one token this takes as long as a small product: nothing here is asked twice. The caller keeps ``weight`` alive."""
    in_features = x.shape[-1]
    A = B = down = None
    rank, scaling = 0, 0.0
    if update is not None:
        A, B, down = update.lora_A.data_ptr(), update.lora_B.data_ptr(), update.down.data_ptr()
        rank, scaling = update.lora_A.shape[0], update.scaling
    offset, room = None if bias is None else bias.data_ptr(), None if wide is None else wide.data_ptr()
    pointers = (x.data_ptr(), offset, y.data_ptr(), weight, A, B, down, room)
    sizes = (x.numel() // in_features, in_features, y.shape[-1], rank)
    function(ctypes.byref(_Product(*pointers, *sizes, scaling, torch.get_num_threads())))


# ---- what became of an update ----------------------------------------------------------------------------------------


def effect_sums(base: Tensor, delta: Tensor, stored: Tensor) -> EffectSums | None:
    """The sums of ``effect.Effect`` over W, D and W', flat and of one size; None for what the C++ does not read."""
    library = _library()
    if library is None or not all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (base, delta, stored)):
        return None
    sums = EffectSums()
    library.merge_effect(*map(_address, (base, delta, stored)), ctypes.c_int64(base.numel()), ctypes.byref(sums))
    return sums
