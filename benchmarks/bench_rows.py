"""One 4-bit weight times a few rows on a CPU: straight from the codes, decoded first, and what reading the codes alone takes.

    python benchmarks/bench_rows.py [--shapes 1536x576 576x1536] [--rows 1 4 8 16 32] [--turns 7]

"read" sums the bytes of codes and scales, "decoded" is the product with the weight decoded into a reused buffer, "ours" what
``frozen_linear`` does for up to 32 rows. Weights rotate through 64 MB, so that none is in the cache but the last level's. CPU
time of one thread, in turns, least and median of the turns; GB/s are of stored bytes, "peer" is decoded over ours turn by turn.
Results are checked against fp64 before anything is timed, and printed only. CXX="g++ -DNF4_AVX2" asks for AVX2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import spread
from torch import Tensor

from minisft import nf4
from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_matmul import native_matmul
from minisft.matmul import dense_weight
from minisft.nf4 import QuantizedWeight

ROTATED_BYTES = 64 * 2**20


def read(_: Tensor, q: QuantizedWeight) -> Tensor:
    return q.packed.view(torch.int64).sum() + q.absmax.sum()


def decoded(x: Tensor, q: QuantizedWeight) -> Tensor:
    with dense_weight(q, torch.float32) as dense:
        return F.linear(x, dense)


WAYS: dict[str, Callable[[Tensor, QuantizedWeight], Tensor]] = {"read": read, "decoded": decoded, "ours": native_matmul}


def measure(weights: list[QuantizedWeight], num_rows: int, turns: int) -> dict[str, list[float]]:
    """Seconds of one call, by way and turn; the first turn warms up."""
    x = torch.randn(num_rows, weights[0].shape[1])
    dense = nf4.dequantize(weights[0], torch.float64)
    bound = (x.shape[1] + 2) * 2.0**-23 * (x.double().abs() @ dense.abs().T)
    for way in (decoded, native_matmul):
        assert ((way(x, weights[0]).double() - x.double() @ dense.T).abs() <= bound).all(), f"{way.__name__}: another product"
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):
        for name, way in WAYS.items():
            began = time.process_time()
            for q in weights:
                way(x, q)
            if turn > 0:
                seconds[name].append((time.process_time() - began) / len(weights))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "576x1536"], help="out x in")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(cpu_nf4.path())
    for shape in arguments.shapes:
        outputs, inputs = map(int, shape.split("x"))
        first = cpu_nf4.quantize(torch.randn(outputs, inputs) * 0.02)
        stored = first.packed.nbytes + first.absmax.nbytes
        weights = [first] + [cpu_nf4.quantize(torch.randn(outputs, inputs) * 0.02) for _ in range(ROTATED_BYTES // stored)]
        for num_rows in arguments.rows:
            seconds = measure(weights, num_rows, arguments.turns)
            ratio = spread([d / o for d, o in zip(seconds["decoded"], seconds["ours"], strict=True)])
            times = ", ".join(f"{name} {min(s) * 1e6:.0f} ({spread(s)['median'] * 1e6:.0f})" for name, s in seconds.items())
            ours = min(seconds["ours"])
            print(
                f"{shape} x {num_rows} rows, us: {times}; {stored / ours / 1e9:.1f} GB/s, "
                f"{2 * num_rows * outputs * inputs / ours / 1e9:.0f} GFLOP/s; "
                f"peer {ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
