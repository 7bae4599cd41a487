"""Page 07: its frozen 4-bit layer and its QLoRA layer against the library's, and that no dense weight outlives a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import page, wrong_answers_test
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from minisft import nf4
from minisft.lora import LoRALinear
from minisft.nf4_linear import NF4Linear

PAGE = "07_backprop_through_four_bits"
FEW_ROWS = 16  # up to here the library's fp32 product reads the codes directly, and sums in another order
Namespace = dict[str, Any]

SIZES = st.integers(1, 80)
LEADING = st.lists(st.integers(1, 6), min_size=1, max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forward_and_backward(product: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and ``others`` for an output gradient that depends on the output."""
    x = x.clone().requires_grad_()
    y = product(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum() + y.sum(), (x, *others))]


def dense_bytes_alive_after(product: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of dequantized weights that are still in memory while the output of ``product`` waits for its backward."""
    made, dequantize = [], nf4.dequantize

    def watched(q: nf4.QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
        weight = dequantize(q, dtype)
        made.append((StorageWeakRef(weight.untyped_storage()), weight.nbytes))
        return weight

    with mock.patch.object(nf4, "dequantize", watched):
        y = product(x.clone().requires_grad_())
        assert made, "the product was not made from a dequantized weight"
        alive = sum(size for storage, size in made if not storage.expired())
    assert y.requires_grad
    return alive


# ---- what the page builds equals the library's -----------------------------------------------------------------------


def agrees_FourBitLinear(namespace: Namespace, weight: Tensor, x: Tensor) -> None:  # noqa: N802  (the page's name)
    """Bit for bit, but for the sum of a few rows in fp32."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    ours, theirs = namespace["FourBitLinear"](weight), NF4Linear.from_linear(linear)
    (y, grad), (expected, expected_grad) = forward_and_backward(ours, x), forward_and_backward(theirs, x)
    if x.dtype == torch.float32 and x[..., 0].numel() <= FEW_ROWS:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(y, expected)
        assert torch.equal(grad, expected_grad)
    assert list(ours.parameters()) == []
    assert dense_bytes_alive_after(ours, x) == 0


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(SIZES, SIZES, LEADING, DTYPES, st.integers(0, 99))
def test_FourBitLinear_equals_the_library(outputs: int, inputs: int, leading: list[int], dtype: torch.dtype, seed: int) -> None:  # noqa: N802
    weight, x = random(seed, outputs, inputs), random(seed + 1, *leading, inputs, dtype=dtype)
    agrees_FourBitLinear(page(PAGE).build(), weight, x)


def agrees_QLoRALinear(namespace: Namespace, weight: Tensor, x: Tensor, rank: int, alpha: float) -> None:  # noqa: N802
    """In fp64, where another order of the sums costs nothing; and no dense weight is kept."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    ours = namespace["QLoRALinear"](weight, rank=rank, alpha=alpha).double()
    theirs = LoRALinear(NF4Linear.from_linear(linear), rank=rank, alpha=alpha).double()
    assert torch.equal(ours(x), theirs.base(x)), "a fresh adapter changes nothing"
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.lora_A.copy_(random(5, rank, weight.shape[1]))
            layer.lora_B.copy_(random(6, weight.shape[0], rank))
    got = forward_and_backward(ours, x, ours.lora_A, ours.lora_B)
    for ours_tensor, expected in zip(got, forward_and_backward(theirs, x, theirs.lora_A, theirs.lora_B), strict=True):
        torch.testing.assert_close(ours_tensor, expected, rtol=1e-9, atol=1e-9)
    assert dense_bytes_alive_after(ours, x) == 0


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(4, 50), st.integers(4, 80), LEADING, st.integers(1, 4), st.floats(0.5, 32), st.integers(0, 99))
def test_QLoRALinear_equals_the_library(  # noqa: N802
    outputs: int, inputs: int, leading: list[int], rank: int, alpha: float, seed: int
) -> None:
    weight, x = random(seed, outputs, inputs), random(seed + 1, *leading, inputs, dtype=torch.float64)
    agrees_QLoRALinear(page(PAGE).build(), weight, x, rank, alpha)


# ---- and what no library object says ---------------------------------------------------------------------------------


def agrees_with_a_dense_layer(namespace: Namespace, q: nf4.QuantizedWeight, x: Tensor) -> None:
    """Outputs and gradients bit for bit those of a dense layer with the dequantized weight; the slope is the true one."""
    dense = nf4.dequantize(q, x.dtype)
    product = namespace["FrozenProduct"].apply
    expected = forward_and_backward(lambda x: F.linear(x, dense), x)
    for got, wanted in zip(forward_and_backward(lambda x: product(x, q), x), expected, strict=True):
        assert torch.equal(got, wanted)
    assert torch.autograd.gradcheck(lambda x: product(x, q), x.double().requires_grad_(), fast_mode=True)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), LEADING, DTYPES, st.sampled_from(nf4.BLOCK_SIZES), st.booleans())
def test_gradients_are_those_of_a_dense_layer(
    outputs: int, inputs: int, leading: list[int], dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    q = nf4.quantize(random(outputs, outputs, inputs), block_size, double_quant)
    agrees_with_a_dense_layer(page(PAGE).build(), q, random(7, *leading, inputs, dtype=dtype))


def agrees_count_saved(namespace: Namespace) -> None:
    """Against sizes known beforehand: two views of one storage count once, what is owned not at all."""
    x, weight = random(1, 6, 8).requires_grad_(), random(2, 8, 8)
    for product, owned, kept in (
        (lambda: (x @ weight) @ weight.T, (x,), [weight.nbytes]),
        (lambda: (x @ weight).square(), (x, weight), [6 * 8 * 4]),
        (lambda: x @ weight.T, (x, weight), []),
    ):
        with namespace["count_saved"](*owned) as saved:
            y = product()
        assert y.requires_grad
        assert list(saved.values()) == kept


def test_the_counter_counts_each_storage_once() -> None:
    agrees_count_saved(page(PAGE).build())


# ---- bugs that must not pass -----------------------------------------------------------------------------------------

MUTANTS = [
    ("the dense weight is hidden in ctx", "ctx.q = q ", "ctx.q, ctx.dense = q, nf4.dequantize(q, x.dtype) "),
    ("the naive product", "FrozenProduct.apply(x, self.q)", "F.linear(x, nf4.dequantize(self.q, x.dtype))"),
    ("no gradient passes through", "return grad_x, None", "return grad_x * 0, None"),
    ("backward in half precision", "nf4.dequantize(ctx.q, grad_y.dtype)", "nf4.dequantize(ctx.q, torch.bfloat16).to(grad_y)"),
    ("the base learns too", "self.q = nf4.quantize(weight)", "self.q, self.w = nf4.quantize(weight), nn.Parameter(weight)"),
    ("alpha without the rank", "alpha / rank\n", "alpha\n"),
    ("scaled by the root of the rank", "alpha / rank\n", "alpha / rank**0.5\n"),
    ("B does not start at zero", "torch.zeros(out_features, rank)", "torch.ones(out_features, rank)"),
    ("the update is not scaled", "self.scaling * update", "update"),
    ("tensors are counted, not storages", "saved[storage.data_ptr()]", "saved[id(tensor), len(saved)]"),
    ("what is owned counts", "if storage.data_ptr() not in anyway:", "if storage.nbytes():"),
]


def agrees(namespace: Namespace) -> None:
    agrees_FourBitLinear(namespace, random(1, 48, 65), random(2, 5, 7, 65))
    agrees_FourBitLinear(namespace, random(1, 48, 65), random(2, 3, 65, dtype=torch.float64))
    agrees_QLoRALinear(namespace, random(3, 20, 33), random(4, 2, 3, 33, dtype=torch.float64), rank=3, alpha=5.0)
    agrees_with_a_dense_layer(namespace, nf4.quantize(random(5, 7, 30)), random(6, 4, 30))
    agrees_count_saved(namespace)


@pytest.mark.parametrize(("old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[mutant[0] for mutant in MUTANTS])
def test_a_mutated_page_disagrees(old: str, new: str) -> None:
    agrees(page(PAGE).build())
    with pytest.raises(AssertionError):
        agrees(page(PAGE).build(mutate=(old, new)))


# ---- answers that must not pass --------------------------------------------------------------------------------------


class _Biased(torch.autograd.Function):
    """The exercise in one Function; ``reduce`` makes the gradient of the bias from that of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: nf4.QuantizedWeight, bias: Tensor, reduce: Callable[[Tensor], Tensor | None]) -> Tensor:
        ctx.q, ctx.reduce = q, reduce
        return F.linear(x, nf4.dequantize(q), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        return grad_y @ nf4.dequantize(ctx.q), None, ctx.reduce(grad_y), None


def biased(reduce: Callable[[Tensor], Tensor | None]) -> Callable[..., Tensor]:
    return lambda x, q, bias: _Biased.apply(x, q, bias, reduce)


def _keeps_the_dense_weight(x: Tensor, q: nf4.QuantizedWeight, bias: Tensor) -> Tensor:
    return F.linear(x, nf4.dequantize(q), bias)


def _cuts_the_chain(x: Tensor, q: nf4.QuantizedWeight, bias: Tensor) -> Tensor:
    return F.linear(x.detach(), nf4.dequantize(q)) + bias


def _counts_python_references(product: Callable[..., Tensor], x: Tensor, q: nf4.QuantizedWeight) -> bool:
    import sys

    weight = nf4.dequantize(q)
    before = sys.getrefcount(weight)
    y = product(x, weight)
    return y is not None and sys.getrefcount(weight) > before


def _asks_the_tensor(product: Callable[..., Tensor], x: Tensor, q: nf4.QuantizedWeight) -> bool:
    import weakref

    weight = nf4.dequantize(q)
    alive = weakref.ref(weight)
    y = product(x, weight)
    del weight
    return y is not None and alive() is not None


def _looks_whether_there_is_a_graph(product: Callable[..., Tensor], x: Tensor, q: nf4.QuantizedWeight) -> bool:
    return product(x, nf4.dequantize(q)).grad_fn is not None


def _always(product: Callable[..., Tensor], x: Tensor, q: nf4.QuantizedWeight) -> bool:
    return True


WRONG = {
    "biased_linear": [
        (biased(lambda grad: grad.sum(-1)), "shapes"),
        (biased(lambda grad: grad.mean((0, 1))), "sum over all"),
        (biased(lambda grad: None), "no gradient"),
        (_keeps_the_dense_weight, "dequantize again"),
        (_cuts_the_chain, "x gets no gradient"),
    ],
    "outlives": [
        (_counts_python_references, "No Python reference"),
        (_asks_the_tensor, "Ask the storage, with"),
        (_looks_whether_there_is_a_graph, "another view"),
        (_always, "without a gradient"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(page(PAGE), WRONG)


def test_one_function_is_a_right_answer_too() -> None:
    exercise = next(exercise for exercise in page(PAGE).exercises() if exercise.name == "biased_linear")
    exercise.check(biased(lambda grad: grad.sum((0, 1))))
