"""The NF4 benchmark's cases on one GPU: our Triton kernels against bitsandbytes' CUDA kernels and the dense bf16 product.

Every contestant works through the same number of copies of the weight, in order, so that the L2 cache never holds the one it
needs; a sample is several such passes between two CUDA events. Each case is timed twice: launched call by call ("eager"), and
replayed from a CUDA graph, for all contestants or for none. A contestant that cannot be captured has no row there and is
named in the results. The yardstick for what moves bytes is the bandwidth of a plain copy, measured first.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from harness import spread
from nf4_cases import (
    BITSANDBYTES,
    BLOCK_SIZE,
    DECODE,
    MINISFT,
    QLORA,
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
    line,
    linear_4bit,
    minisft_layer,
    peft_layer,
    relative_error,
    rows,
    same_weight,
)
from torch import Tensor

from minisft import nf4
from minisft.nf4 import QuantizedWeight
from minisft.nf4_linear import NF4Linear

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

DTYPE = torch.bfloat16
DENSE, DENSE_LORA = "dense bf16", "dense bf16 LoRA, minisft"
Build = Callable[[], Case]


@dataclass(frozen=True)
class Sizes:
    """``shapes`` are (out, in); ``rotate_bytes`` is more than twice an H100's L2 cache; ``copy_bytes`` are read and written."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096))
    product_rows: tuple[int, ...] = (1, 8, 16, 32, 64)
    training_rows: int = 4096
    rotate_bytes: int = 128 * 2**20
    copy_bytes: int = 2**30
    rounds: int = 15
    sample_s: float = 0.02
    device: str = "cuda"


QUICK = Sizes(((256, 256), (512, 256)), (1, 8, 16), 256, 2**20, 2**24, 3, 0.001)


def run(quick: bool, rounds: int | None) -> dict:
    """All cases, printed while they come in."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU")
    sizes = QUICK if quick else Sizes()
    bandwidth = copy_bandwidth(sizes, rounds or sizes.rounds)
    cells: list[dict] = []
    uncaptured: dict[str, str] = {}
    for build in builders(sizes):
        case = build()
        for setting, prepare in (("eager", as_it_is), ("CUDA graph", captured)):
            passes, refused = prepare(case.contestants)
            uncaptured |= {f"{case.group}, {case.label}: {name}": reason for name, reason in refused.items()}
            for cell in rows(case, measure(passes, rounds or sizes.rounds, sizes.sample_s), setting=setting):
                for side in ("ours", "peer"):
                    cell[f"{side}_share_of_copy"] = cell[f"{side}_gb_per_s"] * 1e9 / bandwidth["median"]
                print(line(cell), f" {cell['ours_share_of_copy']:.0%} of copy bandwidth", flush=True)
                cells.append(cell)
        del case
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "copy_bytes_per_s": bandwidth,
        "not_captured": uncaptured,
        "cells": cells,
    }


def builders(sizes: Sizes) -> list[Build]:
    """All cases, each built only when it is its turn."""
    return [
        *(functools.partial(dequantize_case, shape, sizes) for shape in sizes.shapes),
        *(functools.partial(quantize_case, shape, sizes) for shape in sizes.shapes),
        *(functools.partial(product_case, shape, m, sizes) for shape in sizes.shapes for m in sizes.product_rows),
        *(functools.partial(backward_case, shape, m, sizes) for shape in sizes.shapes for m in sizes.product_rows),
        *(functools.partial(linear_case, shape, sizes) for shape in sizes.shapes),
    ]


# ---- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """``run`` does ``num_calls`` calls, one for each copy of the weight."""

    run: Call
    num_calls: int


def one_by_one(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def as_it_is(contestants: Sequence[Contestant]) -> tuple[dict[str, Pass], dict[str, str]]:
    return {c.name: Pass(functools.partial(one_by_one, c.calls), len(c.calls)) for c in contestants}, {}


def captured(contestants: Sequence[Contestant]) -> tuple[dict[str, Pass], dict[str, str]]:
    """Each contestant's pass as a CUDA graph, and for those that cannot be captured, why."""
    passes, refused = {}, {}
    for c in contestants:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the workspace belongs to a stream, and kernels are chosen before the capture
            one_by_one(c.calls)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=stream):
                one_by_one(c.calls)
        except RuntimeError as error:
            refused[c.name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
        else:
            passes[c.name] = Pass(graph.replay, len(c.calls))
    return passes, refused


def measure(passes: dict[str, Pass], rounds: int, sample_s: float) -> dict[str, list[float]]:
    """Seconds of one call: every contestant once a round, in turns forwards and backwards."""
    for each in passes.values():
        _seconds(each.run, 1)
    repeats = {name: max(1, math.ceil(sample_s / _seconds(each.run, 1))) for name, each in passes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(rounds):
        for name in list(passes)[:: 1 if turn % 2 else -1]:
            seconds[name].append(_seconds(passes[name].run, repeats[name]) / passes[name].num_calls)
    return seconds


def _seconds(run: Call, repeats: int) -> float:
    """Of one ``run``, on the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def copy_bandwidth(sizes: Sizes, rounds: int) -> dict[str, float]:
    """Bytes read and written a second by ``copy_``."""
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    run = functools.partial(target.copy_, source)
    _seconds(run, 3)
    return spread([2 * sizes.copy_bytes / _seconds(run, 3) for _ in range(rounds)])


# ---- cases -----------------------------------------------------------------------------------------------------------


def dense_weight(shape: tuple[int, int], sizes: Sizes) -> Tensor:
    return gaussian(*shape, seed=1, dtype=DTYPE, device=sizes.device) * 0.02


def quantized(shape: tuple[int, int], sizes: Sizes) -> tuple[list[tuple[Tensor, QuantState]], list[QuantizedWeight]]:
    """bitsandbytes' codes and state, and the same weight as ours; copies enough to exceed ``rotate_bytes``, each."""
    from bitsandbytes import functional

    weight = dense_weight(shape, sizes)
    quantize = functools.partial(functional.quantize_4bit, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True)
    first = same_weight(*quantize(weight))
    many = copies(first.nbytes, sizes.rotate_bytes)
    return [quantize(weight) for _ in range(many)], [copy.deepcopy(first) for _ in range(many)]


def dequantize_case(shape: tuple[int, int], sizes: Sizes) -> Case:
    """Doubly quantized 4 bits to bf16, both into tensors that are there already."""
    from bitsandbytes import functional

    from minisft.kernels.dequantize import dequantize

    theirs, ours = quantized(shape, sizes)
    weights = ours
    outs = [torch.empty(shape, dtype=DTYPE, device=sizes.device) for _ in weights]
    different = share_of_differences(dequantize(weights[0], DTYPE), functional.dequantize_4bit(*theirs[0]))
    assert torch.equal(dequantize(weights[0], DTYPE), nf4.dequantize(ours[0], DTYPE)), "different dequantized weights"
    moved = ours[0].nbytes + outs[0].nbytes
    mine = [functools.partial(dequantize, w, DTYPE, out) for w, out in zip(weights, outs, strict=True)]
    peer = [functools.partial(functional.dequantize_4bit, p, s, out=out) for (p, s), out in zip(theirs, outs, strict=True)]
    contestants = [
        Contestant(MINISFT, mine, "Triton", moved),
        Contestant(BITSANDBYTES, peer, "dequantize_4bit, out given", moved),
    ]
    notes = {"share_of_differences": different}
    return Case("dequantize", f"{shape[0]} x {shape[1]} to bf16", contestants, [(MINISFT, BITSANDBYTES)], notes=notes)


def share_of_differences(ours: Tensor, theirs: Tensor) -> float:
    """How many values are not equal: 0 is expected, and what else it is belongs into the results."""
    return (ours.flatten() != theirs.flatten()).double().mean().item()


def quantize_case(shape: tuple[int, int], sizes: Sizes) -> Case:
    """bf16 to 4 bits with fp32 scales: the kernels alone, without double quantization."""
    from bitsandbytes import functional

    from minisft.kernels.quantize import quantize

    levels = nf4.codebook("nf4").to(sizes.device)
    weight = dense_weight(shape, sizes)
    weights = [weight.clone() for _ in range(copies(weight.nbytes, sizes.rotate_bytes))]
    packed, absmax = quantize(weight, levels, BLOCK_SIZE)
    twin = nf4.quantize(weight, BLOCK_SIZE, double_quant=False)
    assert torch.equal(packed, twin.packed), "different codes"
    assert torch.equal(absmax, twin.absmax), "different scales"
    theirs, _ = functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    moved = weight.nbytes + packed.nbytes + absmax.nbytes
    form = {"blocksize": BLOCK_SIZE, "quant_type": "nf4"}
    contestants = [
        Contestant(MINISFT, [functools.partial(quantize, w, levels, BLOCK_SIZE) for w in weights], "Triton", moved),
        Contestant(
            BITSANDBYTES, [functools.partial(functional.quantize_4bit, w, **form) for w in weights], "quantize_4bit", moved
        ),
    ]
    notes = {"share_of_differences": share_of_differences(packed, theirs)}
    return Case("quantize", f"{shape[0]} x {shape[1]} bf16", contestants, [(MINISFT, BITSANDBYTES)], notes=notes)


def product_case(shape: tuple[int, int], num_rows: int, sizes: Sizes) -> Case:
    """x W^T from 4 bits, against bitsandbytes' own choice of kernel, its vector kernel at one row, and dense bf16."""
    import bitsandbytes as bnb

    from minisft.matmul import triton_matmul as matmul

    theirs, ours = quantized(shape, sizes)
    x = gaussian(num_rows, shape[1], seed=2, dtype=DTYPE, device=sizes.device)
    dense = [nf4.dequantize(ours[0], DTYPE).clone() for _ in ours]
    product = torch.nn.functional.linear
    ways: dict[str, tuple[list[Call], str]] = {
        MINISFT: ([functools.partial(matmul, x, q) for q in ours], "Triton"),
        BITSANDBYTES: (
            [functools.partial(forward, functools.partial(bnb.matmul_4bit, B=p.t(), quant_state=s), x) for p, s in theirs],
            "matmul_4bit",
        ),
        DENSE: ([functools.partial(product, x, w) for w in dense], "F.linear"),
    }
    if num_rows == 1:
        calls = [functools.partial(bnb.functional.gemv_4bit, x, p.t(), state=s) for p, s in theirs]
        ways[f"{BITSANDBYTES}, gemv"] = calls, "gemv_4bit"
    exact = x.double() @ nf4.dequantize(ours[0], torch.float32).double().T
    return _products(DECODE, shape, num_rows, ways, ours[0], x, exact)


def backward_case(shape: tuple[int, int], num_rows: int, sizes: Sizes) -> Case:
    """grad W from 4 bits, against what bitsandbytes does: dequantize, then the dense product."""
    from bitsandbytes import functional

    from minisft.matmul import triton_matmul_t as matmul_backward

    theirs, ours = quantized(shape, sizes)
    grad = gaussian(num_rows, shape[0], seed=3, dtype=DTYPE, device=sizes.device)
    dense = [nf4.dequantize(ours[0], DTYPE).clone() for _ in ours]
    ways: dict[str, tuple[list[Call], str]] = {
        MINISFT: ([functools.partial(matmul_backward, grad, q) for q in ours], "Triton"),
        BITSANDBYTES: (
            [functools.partial(_dequantized_product, functional.dequantize_4bit, grad, p, s) for p, s in theirs],
            "dequantize_4bit and matmul",
        ),
        DENSE: ([functools.partial(torch.matmul, grad, w) for w in dense], "matmul"),
    }
    exact = grad.double() @ nf4.dequantize(ours[0], torch.float32).double()
    return _products("backward product", shape, num_rows, ways, ours[0], grad, exact)


def _dequantized_product(dequantize: Callable[..., Tensor], grad: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    return grad @ dequantize(packed, state)


def _products(
    group: str,
    shape: tuple[int, int],
    num_rows: int,
    ways: dict[str, tuple[list[Call], str]],
    q: QuantizedWeight,
    rows_in: Tensor,
    exact: Tensor,
) -> Case:
    contestants = []
    for name, (calls, path) in ways.items():
        weight_bytes = shape[0] * shape[1] * DTYPE.itemsize if name == DENSE else q.nbytes
        moved = weight_bytes + rows_in.nbytes + exact.numel() * DTYPE.itemsize
        contestants.append(Contestant(name, calls, path, moved, relative_error([calls[0]()], [exact])))
    label = f"{shape[0]} x {shape[1]}, M = {num_rows}"
    return Case(
        group, label, contestants, [(MINISFT, name) for name in ways if name != MINISFT], error_bound(DTYPE, max(shape))
    )


def linear_case(shape: tuple[int, int], sizes: Sizes) -> Case:
    """QLoRA linear, forward and backward at many rows; the yardstick is the same layer over a dense bf16 base."""
    num_rows, device = sizes.training_rows, sizes.device
    base = linear_4bit(dense_weight(shape, sizes), DTYPE)
    q = same_weight(base.weight.data, base.weight.quant_state)
    lora_A, lora_B = factors(*shape, device=device)
    x = gaussian(num_rows, shape[1], seed=2, dtype=DTYPE, device=device).requires_grad_()
    grad = gaussian(num_rows, shape[0], seed=3, dtype=DTYPE, device=device)
    dense = nf4.dequantize(q, DTYPE)
    exact = exact_lora(nf4.dequantize(q, torch.float32), lora_A, lora_B, x, grad)
    peer, dense_peer = f"peft + {BITSANDBYTES}", "dense bf16 LoRA, peft"
    layers = {
        MINISFT: (minisft_layer(NF4Linear(q), lora_A, lora_B), "workspace and cuBLAS"),
        peer: (peft_layer(base, lora_A, lora_B), "Linear4bit"),
        DENSE_LORA: (minisft_layer(dense_linear(dense), lora_A, lora_B), "cuBLAS"),
        dense_peer: (peft_layer(dense_linear(dense), lora_A, lora_B), "cuBLAS"),
    }
    moved = 2 * q.nbytes + 2 * x.nbytes + 2 * grad.nbytes + 4 * (lora_A.nbytes + lora_B.nbytes)
    contestants = []
    for name, ((layer, trained), path) in layers.items():
        call = functools.partial(forward_backward, layer, trained, x, grad)
        contestants.append(Contestant(name, [call], path, moved, relative_error(call(), exact)))
    bound = error_bound(DTYPE, max(*shape, num_rows))
    label = f"{shape[0]} x {shape[1]}, M = {num_rows}"
    return Case(QLORA, label, contestants, [(MINISFT, name) for name in (peer, DENSE_LORA, dense_peer)], bound)
