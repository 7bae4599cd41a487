"""How much of a step's time its matrix products need at the rate at which this machine multiplies: 1 is nothing beside them.

    share = seconds of the products alone / seconds of the step

The products are those that the step makes, with their shapes and layouts, each by itself on matrices of its own and as often as
in the step, in turns with it and in the same process: what the machine gives to others meanwhile, it takes from both. Products
with a side of ``narrow`` or less, rows among them, do not count: they are work beside the model's own, as those of adapters
are. If they run at the same rate, and nothing else takes time, a step of PyTorch's products alone has a share of

    ceiling = operations of the products that count / operations of all products

Multiplying less for the same step makes it faster and leaves the share as it is. The rate is that
of PyTorch's products: a step that multiplies faster by itself (``minisft.kernels.cpu_split``) may have a share above 1.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.kernels import cpu_nf4

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides
Product = tuple[Layout, Layout, torch.dtype]
OPERANDS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # the position of the first matrix


class Products(TorchDispatchMode):
    """Counts the matrix products that are made while it is active, backward too."""

    def __init__(self, narrow: int) -> None:
        super().__init__()
        self.narrow = narrow
        self.made: Counter[Product] = Counter()
        self.beside: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: Sequence = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        first = OPERANDS.get(func._schema.name)
        if first is not None:
            a, b = args[first : first + 2]
            counter = self.made if min(*a.shape, b.shape[1]) > self.narrow else self.beside
            counter[_layout(a), _layout(b), a.dtype] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def by_pytorch() -> Iterator[None]:
    """minisft asks PyTorch for all products of a training step, which can count them."""
    try:
        from minisft.kernels import cpu_adapter
    except ImportError:  # another tree, from before it
        adapter: AbstractContextManager = nullcontext()
    else:
        adapter = mock.patch.object(cpu_adapter, "MIN_ROWS", 2**62)
    with adapter, mock.patch.object(cpu_nf4, "USE_TILES", False):
        yield


def _layout(matrix: Tensor) -> Layout:
    return tuple(matrix.shape), matrix.stride()


def flops(product: Product) -> int:
    """2 M K N."""
    ((rows, inner), _), ((_, columns), _), _ = product
    return 2 * rows * inner * columns


def seconds_of(product: Product, count: int, clock: Callable[[], float]) -> float:
    """The time of ``count`` such products of the same numbers, which lie in caches where those of a step come from memory."""
    a, b = (torch.empty_strided(*layout, dtype=product[2]).fill_(0.5) for layout in product[:2])
    out = a @ b
    began = clock()
    for _ in range(count):
        torch.mm(a, b, out=out)
    return clock() - began


def measure(
    step: Callable[[], object],
    rounds: int,
    narrow: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The share of a step, again and again.

    Args:
        step: one training step, always of the same rows.
        rounds: how often the step and its products are timed, in turns.
        narrow: products with a side of so many or fewer do not count.
        clock: what is measured; ``time.process_time`` where other work runs beside.

    Returns:
        ``shares``, one a round, and their ``ceiling``; the step's ``gflops`` (counted, in units of 1e9) and the machine's
        ``gflops_per_s``.
    """
    with Products(narrow) as products, by_pytorch():
        step()
    total, beside = (sum(flops(product) * n for product, n in some.items()) / 1e9 for some in (products.made, products.beside))
    shares, rates = [], []
    for _ in range(rounds):
        began = clock()
        step()
        whole = clock() - began
        alone = sum(seconds_of(product, count, clock) for product, count in products.made.items())
        shares.append(alone / whole)
        rates.append(total / alone)
    rate = statistics.median(rates)
    return {"shares": shares, "gflops": total, "gflops_per_s": rate, "ceiling": total / (total + beside)}
