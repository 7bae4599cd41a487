"""CPU seconds of a training step by itself, of its functions, and how much of it its products need: to compare two trees.

    PYTHONPATH=OLD OMP_NUM_THREADS=1 python benchmarks/bench_step.py; PYTHONPATH=NEW OMP_NUM_THREADS=1 python ...

in turns: other work on the machine slows CPU time down too, but less. SmolLM2-135M, LoRA of rank 16, 8 rows packed whole.
The functions are timed twice, in one pass each and as PyTorch's operators, and so are, with ``--products``, products in
fp32 with weights of 8, 11 and 24 bits; ``--turns 10 --dtype fp32`` compares whole steps. These two measure wall time.
Nothing is kept; what was found stands in LOG.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gemm_share
import torch
from bench_train import BANKING77, BATCH_SIZE, DTYPES, NARROW, Minisft, make_rows
from harness import spread

from minisft.kernels import cpu_nf4

NUM_TOKENS, D, WIDE, HEADS = 662, 576, 1536, 9  # of SmolLM2, and of eight rows of Banking77
VOCABULARY, NUM_LABELS = 49152, 150
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # that weights are, held in fp32


def seconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, quartiles and least of the CPU seconds of ``repeats`` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return {**spread(times), "least": min(times)}


@contextmanager
def by_cpp(wanted: bool) -> Iterator[None]:
    """Whether the package's C++ computes what stands between the products."""
    from minisft import attention
    from minisft.kernels import cpu_elementwise

    before = cpu_elementwise.MIN_NUMBERS, attention.NATIVE_KEYS
    if not wanted:
        cpu_elementwise.MIN_NUMBERS, attention.NATIVE_KEYS = 2**62, 0
    yield
    cpu_elementwise.MIN_NUMBERS, attention.NATIVE_KEYS = before


def functions(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What stands between the products, forward and with its backward."""
    from minisft import elementwise
    from minisft.attention import Segments, attend

    numbers = functools.partial(torch.randn, dtype=dtype)
    x, gate, up, weight = (numbers(*size) for size in ((NUM_TOKENS, D), (NUM_TOKENS, WIDE), (NUM_TOKENS, WIDE), (D,)))
    q, angle = numbers(NUM_TOKENS, HEADS, D // HEADS), numbers(NUM_TOKENS, 1, D // HEADS // 2)
    found: dict[str, Callable[[], object]] = {}
    for name, function, inputs in (
        ("norm", lambda x: elementwise.rms_norm(x, weight, 1e-5), [x]),
        ("SwiGLU", elementwise.swiglu, [gate, up]),
        ("RoPE", lambda q: elementwise.rotate(q, angle, angle), [q]),
        *(
            (f"attention of {rows} rows of {length}", functools.partial(attend, segments=segments), qkv)
            for rows, length in ((8, 80), (4, 256), (2, 512), (1, 1024))
            for segments in [Segments.of(torch.arange(1, rows + 1).repeat_interleave(length)[None])]
            for qkv in [[numbers(rows * length, heads, D // HEADS) for heads in (HEADS, HEADS // 3, HEADS // 3)]]
        ),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(*leaves)
        found[name] = torch.no_grad()(functools.partial(function, *inputs))
        found[f"{name}, its backward"] = functools.partial(
            torch.autograd.grad, y, leaves, torch.randn_like(y), retain_graph=True
        )
    return found


def in_turns(ways: Sequence[Callable], arguments: Sequence[tuple]) -> list[list[float]]:
    """Seconds of wall time of each way with each of these arguments, taking turns; the first turn is not counted."""
    times: list[list[float]] = [[] for _ in ways]
    for turn, some in enumerate(arguments):
        for way, found in zip(ways, times, strict=True):
            began = time.perf_counter()
            way(*some)
            if turn > 0:
                found.append(time.perf_counter() - began)
    return times


def _by_blas(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    return x @ (weight.T if transposed else weight)


def products() -> Iterator[str]:
    """The same product by the BLAS and by AMX tiles, with W^T and with W; weights come from memory, another one each time."""
    from minisft.kernels.cpu_split import split_product

    sizes = ((D, WIDE), (WIDE, D), (D, D), (D, D // 3), (D, VOCABULARY), (VOCABULARY, D))
    for (numbers, dtype), (inner, columns), transposed in itertools.product(NUMBERS.items(), sizes, (True, False)):
        x = torch.randn(NUM_LABELS if VOCABULARY in (inner, columns) else NUM_TOKENS, inner)
        shape = (columns, inner) if transposed else (inner, columns)
        weights = [torch.randn(shape).to(dtype).float() for _ in range(2 + 2**24 // (inner * columns))]
        first = x, weights[0], transposed
        true, size = _by_blas(x.double(), weights[0].double(), transposed), _by_blas(x.abs(), weights[0].abs(), transposed)
        errors = [float(((way(*first) - true).abs() / size).max()) for way in (_by_blas, split_product)]
        times = in_turns((_by_blas, split_product), [(x, weights[i % len(weights)], transposed) for i in range(16)])
        least, medians = ([1e6 * of(found) for found in times] for of in (min, statistics.median))
        yield (
            f"{numbers} weights, {len(x):4} x {inner:5} x {columns:5}, {'W^T' if transposed else 'W':3}: "
            f"least {least[0]:6.0f} us by the BLAS, {least[1]:6.0f} by tiles; median {medians[0]:6.0f}, {medians[1]:6.0f}; "
            f"errors {errors[0]:.1e}, {errors[1]:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=0, help="of the share of its products; 0 for none")
    parser.add_argument("--functions", action="store_true", help="time the functions instead")
    parser.add_argument("--products", action="store_true", help="time products with weights of three kinds instead")
    parser.add_argument("--turns", type=int, default=0, help="of whole steps by PyTorch's products and by ours")
    arguments = parser.parse_args()
    dtype = arguments.dtype
    if arguments.products:
        if not cpu_nf4.tile_floats():
            parser.error("--products needs a CPU with AMX")
        for line in products():
            print(line, flush=True)
        return
    if arguments.functions:
        found = []
        for native in (False, True):  # what backward does is settled forward
            with by_cpp(native):
                found.append({name: seconds(work, 50)["median"] for name, work in functions(DTYPES[dtype]).items()})
        for name, plain, ours in zip(found[0], *(times.values() for times in found), strict=False):
            print(f"{name:40} {1e6 * plain:6.0f} us by PyTorch, {1e6 * ours:6.0f} us")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = make_rows(BANKING77 if BANKING77.exists() else None, BATCH_SIZE, [dtype], Path(folder))
        data = json.loads(path.read_text())
        trainer = Minisft(f"{folder}/{dtype}", dtype, "none", "minisft packed, each row whole", data["rows"], data["pad_id"])
    step = functools.partial(trainer.step, 0, BATCH_SIZE)
    if arguments.turns:
        plain, ours = in_turns((gemm_share.by_pytorch()(step), step), [()] * (arguments.turns + 1))
        print("seconds by PyTorch", spread(plain), "by ours", spread(ours))
        print("ratio", spread([a / b for a, b in zip(plain, ours, strict=True)]))
        return
    print("seconds of a step", seconds(step, arguments.steps))
    if arguments.rounds:
        found = gemm_share.measure(step, arguments.rounds, narrow=NARROW, clock=time.process_time)
        print("share", spread(found["shares"]), f"(PyTorch's products alone: at most {found['ceiling']:.2f})")
        print(f"{found['gflops']:.1f} GFLOP at {found['gflops_per_s']:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
