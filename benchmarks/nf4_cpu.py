"""The NF4 benchmark's cases on a CPU, and how they are timed there: alternating, several calls a sample, median of rounds."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from nf4_cases import (
    BITSANDBYTES,
    BLOCK_SIZE,
    DECODE,
    MINISFT,
    NAMES,
    QLORA,
    TORCHAO,
    Call,
    Case,
    Contestant,
    copies,
    dense_linear,
    error_bound,
    exact_lora,
    factors,
    forward,
    forward_backward,
    gaussian,
    linear_4bit,
    minisft_layer,
    peft_layer,
    relative_error,
    same_weight,
    torchao_nf4,
)
from torch import Tensor, nn

from minisft import nf4
from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_matmul import can_use_native
from minisft.matmul import compute_dtype, dense_weight
from minisft.nf4 import QuantizedWeight
from minisft.nf4_linear import NF4Linear

DTYPES = (torch.bfloat16, torch.float32)
REUSED, FRESH = "minisft, reused buffer", "minisft, new tensor"
MOST_S = 60  # for all samples of one contestant
Build = Callable[[], Case]


@dataclass(frozen=True)
class Sizes:
    """``rotate_bytes``: a decode weight has copies enough to exceed it, and with it the last-level cache.

    ``sample_s``: shorter work is repeated until a sample takes this long.
    """

    square: int = 4096
    linear_rows: tuple[int, ...] = (1, 8, 64, 512)
    bf16_linear_rows: tuple[int, ...] = (1, 8)  # more take the peer minutes a call on a CPU without bf16 instructions
    product_rows: tuple[int, ...] = (1, 4, 8, 16)
    small: tuple[tuple[int, int], ...] = ((1536, 576), (576, 1536))  # SmolLM2-135M's MLP, (out, in)
    rotate_bytes: int = 128 * 2**20
    rounds: int = 7
    sample_s: float = 0.05


QUICK = Sizes(128, (1, 8), (1,), (1, 4), ((96, 64),), 2**16, 3, 0.001)


def builders(sizes: Sizes) -> list[Build]:
    """All cases, each built only when it is its turn."""
    n = sizes.square
    shapes = [(n, n), *sizes.small]
    return [
        *(functools.partial(dequantize_case, n, dtype) for dtype in DTYPES),
        *(functools.partial(quantize_case, n, dtype) for dtype in DTYPES),
        *(functools.partial(linear_case, n, m, torch.float32) for m in sizes.linear_rows),
        *(functools.partial(linear_case, n, m, torch.bfloat16) for m in sizes.bf16_linear_rows),
        *(
            functools.partial(product_case, shape, m, dtype, sizes.rotate_bytes)
            for shape in shapes
            for dtype in DTYPES
            for m in sizes.product_rows
        ),
    ]


# ---- timing ----------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int, sample_s: float) -> dict[str, list[float]]:
    """Seconds of one call: every contestant once a round, in turns forwards and backwards.

    Fewer rounds where a contestant takes very long (bf16 products on a CPU without bf16 instructions can take a minute): the
    results say how many. Below one round, the warm-up is all there is.
    """
    first = {c.name: [_warm(c.calls)] for c in case.contestants}
    rounds = min(rounds, int(MOST_S / max(first[c.name][0] * len(c.calls) for c in case.contestants)))
    if rounds == 0:
        return first
    repeats = {c.name: max(1, math.ceil(sample_s / first[c.name][0] / len(c.calls))) for c in case.contestants}
    seconds: dict[str, list[float]] = {c.name: [] for c in case.contestants}
    for turn in range(rounds):
        for c in case.contestants[:: 1 if turn % 2 else -1]:
            seconds[c.name].append(_sample(c.calls, repeats[c.name]))
    return seconds


def _warm(calls: Sequence[Call]) -> float:
    """One pass, and another one if it is short: the first call of a layer may allocate or repack."""
    once = _sample(calls, 1)
    return once if once > 1 else _sample(calls, 1)


def _sample(calls: Sequence[Call], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    return (time.perf_counter() - began) / (repeats * len(calls))


# ---- cases -----------------------------------------------------------------------------------------------------------


def _decode_into_the_buffer(q: QuantizedWeight, dtype: torch.dtype) -> None:
    with dense_weight(q, dtype):
        pass


def dequantize_case(size: int, dtype: torch.dtype) -> Case:
    """Doubly quantized 4 bits to dense: into training's reused buffer, and into a new tensor as the peers do."""
    from bitsandbytes import functional

    weight = gaussian(size, size, seed=1, dtype=dtype) * 0.02
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True)
    q = same_weight(packed, state)
    theirs = functional.dequantize_4bit(packed, state)
    for ours in (nf4.dequantize(q), cpu_nf4.dequantize(q)):
        assert torch.equal(ours, theirs), "different dequantized weights"
    moved, path = q.nbytes + weight.nbytes, cpu_nf4.path()
    contestants = [
        Contestant(REUSED, [functools.partial(_decode_into_the_buffer, q, dtype)], path, moved),
        Contestant(FRESH, [functools.partial(cpu_nf4.dequantize, q, dtype)], path, moved),
        Contestant(BITSANDBYTES, [functools.partial(functional.dequantize_4bit, packed, state)], "dequantize_4bit", moved),
    ]
    pairs = [(REUSED, BITSANDBYTES), (FRESH, BITSANDBYTES)]
    torchao, _ = torchao_nf4()
    if torchao is not None:  # its scales are stored in another 8-bit format, so its weight is another one
        tensor = torchao.to_nf4(weight, BLOCK_SIZE, nf4.NESTED_BLOCK_SIZE)
        contestants.append(Contestant(TORCHAO, [tensor.get_original_weight], "get_original_weight", moved))
        pairs += [(REUSED, TORCHAO), (FRESH, TORCHAO)]
    return Case("dequantize", f"{size} x {size} to {NAMES[dtype]}", contestants, pairs)


def quantize_case(size: int, dtype: torch.dtype) -> Case:
    """Dense to 4 bits with double quantization; the codes must be the same ones, and the scales nearly (another table)."""
    from bitsandbytes import functional

    weight = gaussian(size, size, seed=1, dtype=dtype) * 0.02
    quantize = functools.partial(
        functional.quantize_4bit, weight, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
    )
    packed, state = quantize()
    q = cpu_nf4.quantize(weight, BLOCK_SIZE)
    assert torch.equal(q.packed, packed.flatten()), "different codes"
    ours, theirs = nf4.decode_absmax(q), nf4.decode_absmax(same_weight(packed, state))
    assert relative_error([ours], [theirs.double()]) < 1e-3, "different scales"
    moved, path = weight.nbytes + q.nbytes, cpu_nf4.path()
    contestants = [
        Contestant(MINISFT, [functools.partial(cpu_nf4.quantize, weight, BLOCK_SIZE)], path, moved),
        Contestant(BITSANDBYTES, [quantize], "quantize_4bit", moved),
    ]
    torchao, _ = torchao_nf4()
    if torchao is not None:
        convert = functools.partial(torchao.to_nf4, weight, BLOCK_SIZE, nf4.NESTED_BLOCK_SIZE)
        contestants.append(Contestant(TORCHAO, [convert], "to_nf4", moved))
    return Case("quantize", f"{size} x {size} {NAMES[dtype]}", contestants, [(MINISFT, c.name) for c in contestants[1:]])


def linear_case(size: int, num_rows: int, dtype: torch.dtype) -> Case:
    """QLoRA linear, forward and backward: our layer against PEFT's over bitsandbytes' in training mode (never repacked)."""
    base = linear_4bit(gaussian(size, size, seed=1, dtype=dtype) * 0.02, dtype)
    q = same_weight(base.weight.data, base.weight.quant_state)
    lora_A, lora_B = factors(size, size)
    x, grad = gaussian(num_rows, size, seed=2, dtype=dtype).requires_grad_(), gaussian(num_rows, size, seed=3, dtype=dtype)
    exact = exact_lora(nf4.dequantize(q, torch.float32), lora_A, lora_B, x, grad)
    layers = {
        MINISFT: minisft_layer(NF4Linear(q), lora_A, lora_B),
        f"peft + {BITSANDBYTES}": peft_layer(base, lora_A, lora_B),
    }
    moved = 2 * q.nbytes + 4 * x.nbytes + 4 * (lora_A.nbytes + lora_B.nbytes)
    contestants = []
    for name, (layer, trained) in layers.items():
        call = functools.partial(forward_backward, layer, trained, x, grad)
        path = _product_path(x.detach(), q) if name == MINISFT else _layer_path(base)
        contestants.append(Contestant(name, [call], path, moved, relative_error(call(), exact)))
    bound = error_bound(dtype, max(size, num_rows))
    return Case(QLORA, f"{size} x {size}, M = {num_rows}, {NAMES[dtype]}", contestants, [(MINISFT, contestants[1].name)], bound)


def product_case(shape: tuple[int, int], num_rows: int, dtype: torch.dtype, rotate_bytes: int) -> Case:
    """Forward only, as in generation: 4 bits against bitsandbytes in 4 bits and against the dense weight."""
    weight = gaussian(*shape, seed=1, dtype=dtype) * 0.02
    base = linear_4bit(weight, dtype).eval()
    q = same_weight(base.weight.data, base.weight.quant_state)
    dense, x = nf4.dequantize(q, dtype), gaussian(num_rows, shape[1], seed=2, dtype=dtype)
    exact = [x.double() @ nf4.dequantize(q, torch.float32).double().T]
    many = copies(q.nbytes, rotate_bytes)
    layers: dict[str, list[nn.Module]] = {
        MINISFT: [NF4Linear(copy.deepcopy(q)) for _ in range(many)],
        BITSANDBYTES: [copy.deepcopy(base) for _ in range(many)],
        f"dense {NAMES[dtype]}": [dense_linear(dense.clone()) for _ in range(copies(dense.nbytes, rotate_bytes))],
    }
    sizes = [q.nbytes, q.nbytes, dense.nbytes]
    contestants = []
    for (name, modules), weight_bytes in zip(layers.items(), sizes, strict=True):
        calls = [functools.partial(forward, module, x) for module in modules]
        error = relative_error([calls[0]()], exact)
        path = _product_path(x, q) if name == MINISFT else _layer_path(modules[0])
        moved = weight_bytes + x.nbytes + num_rows * shape[0] * x.element_size()
        contestants.append(Contestant(name, calls, path, moved, error))
    # A repacked bitsandbytes layer multiplies in bf16 whatever it was asked for; that is its choice, not an error here.
    repacked = contestants[1].path.endswith(", repacked")
    bound = error_bound(torch.bfloat16 if repacked else dtype, shape[1])
    label = f"{shape[0]} x {shape[1]}, M = {num_rows}, {NAMES[dtype]}"
    return Case(DECODE, label, contestants, [(MINISFT, c.name) for c in contestants[1:]], bound)


def _product_path(x: Tensor, q: QuantizedWeight) -> str:
    """Who multiplies in ``frozen_linear``: straight from the 4 bits, or through a dense weight in a reused buffer."""
    if can_use_native(x, q):
        return f"4-bit product, {cpu_nf4.path()}"
    return f"dense in {NAMES[compute_dtype(x)]}, {cpu_nf4.path()}"


def _layer_path(layer: nn.Module) -> str:
    """A dense layer, or bitsandbytes' with its layout: in eval mode it repacks its weight on CPUs with AVX512-BF16."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return "F.linear"
    return f"Linear4bit, {'repacked' if getattr(state, 'packing_format_for_cpu', False) else 'not repacked'}"
