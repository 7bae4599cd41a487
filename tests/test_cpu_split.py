"""Products in fp32 by AMX: as exact as fp32 whatever bits weights have, and the same for any threads."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_nf4 import threads
from torch import Tensor, nn

from minisft.kernels import cpu_nf4, cpu_split
from minisft.kernels.cpu_split import split_product
from minisft.lora import LoRALinear
from minisft.loss import head_loss_sum, token_log_probs
from minisft.matmul import Linear, frozen_linear, frozen_linear_t, linear
from minisft.nf4 import QuantizedWeight, dequantize, quantize
from minisft.nf4_linear import NF4Linear

U = 2.0**-24
pytestmark = pytest.mark.skipif(not cpu_nf4.tile_floats(), reason="needs a CPU with AMX, and leave to use it")


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_split, "MIN_ROWS", 1)
    monkeypatch.setattr(cpu_split, "MIN_SPLIT_ROWS", 1)
    monkeypatch.setattr(cpu_split, "MIN_WORK", 0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bf16_numbers(*shape: int, seed: int = 1) -> Tensor:
    return normal(*shape, seed=seed).bfloat16().float()


def product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    y = split_product(x, weight, transposed)
    assert y is not None
    return y


# Weights of one part, two and three.
KINDS = [torch.bfloat16, torch.float16, torch.float32]


def weights_of(inner: int, columns: int, transposed: bool, kind: torch.dtype = torch.bfloat16) -> Tensor:
    return normal(*((columns, inner) if transposed else (inner, columns)), seed=1).to(kind).float()


# Packed at once: 576 of the inner size, and for each thread rows of 640 Ki numbers in three parts.
SIZES = [
    (1, 32, 32), (16, 64, 32), (17, 32, 96), (31, 96, 64), (33, 64, 64), (47, 160, 32), (64, 576, 32), (65, 608, 64),
    (70, 1056, 160), (5, 576, 544), (129, 64, 8256), (700, 576, 64), (1400, 288, 32), (900, 1056, 96), (70, 1056, 1504),
    (900, 1056, 1504), (2100, 1056, 256),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_against_fp64_for_any_threads(rows: int, inner: int, columns: int, transposed: bool, kind: torch.dtype) -> None:
    """Exact products of parts, summed in fp32: at most 6 K terms in any order, three of at most |x| |w|, others far below."""
    x, weight = normal(rows, inner), weights_of(inner, columns, transposed, kind)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(product(x, weight, transposed))
    assert all(torch.equal(y, found[0]) for y in found)
    true = (weight.T if transposed else weight).double()
    error = (found[0].double() - x.double() @ true).abs() / (x.double().abs() @ true.abs())
    # Errors of a sum grow with the root of its length unless all go one way. Whether small parts are lost does not show here.
    assert float(error.max()) <= 4 * (3 * inner) ** 0.5 * U


@given(
    st.lists(st.floats(width=32, min_value=2.0**-100, max_value=2.0**100), min_size=1, max_size=40), st.booleans(), st.data()
)
def test_no_bit_of_x_is_lost(numbers: list[float], transposed: bool, data: st.DataObject) -> None:
    """Times a power of two, alone in its sum: the product is exact, so y must be exact."""
    rows, inner, columns = len(numbers), 96, 64
    position, column = data.draw(st.integers(0, inner - 1)), data.draw(st.integers(0, columns - 1))
    sign, power = data.draw(st.sampled_from((-1.0, 1.0))), data.draw(st.integers(-8, 8))
    x = torch.full((rows, inner), 3.0)
    x[:, position] = torch.tensor(numbers)
    weight = torch.zeros((columns, inner) if transposed else (inner, columns))
    (weight.T if not transposed else weight)[column, position] = sign * 2.0**power
    wanted = torch.zeros(rows, columns)
    wanted[:, column] = x[:, position] * sign * 2.0**power
    assert torch.equal(product(x, weight, transposed), wanted)


@given(
    st.lists(st.floats(width=32, min_value=2.0**-50, max_value=2.0**60), min_size=1, max_size=40),
    st.lists(st.floats(width=32, min_value=2.0**-50, max_value=2.0**60), min_size=1, max_size=64),
    st.booleans(), st.integers(0, 95),
)  # fmt: skip
def test_one_product_is_exact_to_its_last_bits(numbers: list[float], weights: list[float], transposed: bool, at: int) -> None:
    """All that is left out is x_3 W_2 + x_2 W_3 + x_3 W_3; sums of what is kept round up to five times.

    Smaller numbers would have products of parts below 2^-126, which count as zero.
    """
    x, weight = torch.zeros(len(numbers), 96), torch.zeros(64, 96)
    x[:, at] = torch.tensor(numbers)
    weight[: len(weights), at] = torch.tensor(weights)
    true = x.double() @ weight.double().T
    y = product(x, weight if transposed else weight.T.contiguous(), transposed)
    assert ((y - true).abs() <= (2.0**-22 + 5 * U) * true).all()


@pytest.mark.parametrize("transposed", [True, False])
@given(st.lists(st.floats(width=32, min_value=2.0**-100, max_value=2.0**100), min_size=1, max_size=96), st.data())
def test_no_bit_of_a_weight_is_lost(transposed: bool, numbers: list[float], data: st.DataObject) -> None:
    """Times one, alone in its sum; wherever it stands among weights of fewer bits."""
    weight = weights_of(96, 64, transposed, data.draw(st.sampled_from(KINDS)))
    for number in numbers:
        weight.view(-1)[data.draw(st.integers(0, weight.numel() - 1))] = number
    assert torch.equal(product(torch.eye(96), weight, transposed), weight.T if transposed else weight)


@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
def test_a_product_is_added_onto_what_there_is(kind: torch.dtype | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any number of threads, in place; 608 numbers are two parts of the inner size."""
    grad, onto = normal(700, 608), normal(700, 256, seed=2)
    layer: Tensor | QuantizedWeight
    layer = weight = weights_of(608, 256, False, torch.float32 if kind == "nf4" else kind)
    if kind == "nf4":
        layer = quantize(weight)
        weight = dequantize(layer)
    exact = onto.double() + grad.double() @ weight.double()
    for count in (1, 2, 3, 8):
        y = onto.clone()
        with threads(count):
            assert frozen_linear_t(grad, layer, y) is y
        assert ((y - exact).abs() <= 100 * U * (onto.abs() + grad.abs() @ weight.abs())).all()
    monkeypatch.setattr(cpu_nf4, "USE_TILES", False)
    assert not torch.equal(frozen_linear_t(grad, layer, onto.clone()), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_row_has_the_same_bits_beside_any_others(transposed: bool, kind: torch.dtype) -> None:
    x, weight = normal(900, 544), weights_of(544, 64, transposed, kind)
    whole = product(x, weight, transposed)
    for rows in (slice(0, 1), slice(30, 35), slice(411, 650)):
        assert torch.equal(product(x[rows].clone(), weight, transposed), whole[rows])


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("columns", [96, 8256])
@given(data=st.data())
def test_one_other_number_is_always_found(columns: int, transposed: bool, data: st.DataObject) -> None:
    """Among bf16 numbers, far from the first one of its row."""
    weight = weights_of(544, columns, transposed)
    row, column = data.draw(st.integers(0, len(weight) - 1)), data.draw(st.integers(0, weight.shape[1] - 1))
    weight[row, column] = 1 + 2.0 ** data.draw(st.integers(-23, -8))
    x = torch.zeros(3, 544)
    x[:, column if transposed else row] = 1.0
    with threads(data.draw(st.integers(1, 3))):
        y = product(x, weight, transposed)
    assert torch.equal(y, (weight[:, column] if transposed else weight[row]).expand(3, columns))


def test_what_changes_is_seen_by_the_next_call() -> None:
    """Nothing of a weight is kept: not even what PyTorch does not count as a change."""
    x, weight = torch.eye(64), bf16_numbers(96, 64)
    for number in (0.5, 1e-3, 1.0 + 2.0**-15, 2.0):
        weight.numpy()[50, 3] = number
        assert torch.equal(product(x, weight, True), weight.T)


def test_what_is_refused() -> None:
    x, weight = normal(40, 64), bf16_numbers(96, 64)
    refused = [
        (x.double(), weight.double()), (x.bfloat16(), weight.bfloat16()), (x, weight.bfloat16()),
        (normal(40, 48), bf16_numbers(96, 48)), (x, bf16_numbers(80, 64)), (x, bf16_numbers(64, 96).T), (normal(0, 64), weight),
        (x, bf16_numbers(96, 128)[:, ::2]),
    ]  # fmt: skip
    assert all(split_product(a, b, True) is None for a, b in refused)
    assert split_product(x, weight[0], True) is None
    for a, b in ((normal(40, 32), weight), (normal(40, 96), weight), (x, bf16_numbers(96, 32))):
        assert split_product(a, b, True) is None
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            frozen_linear(a, b)
    with torch.autocast("cpu"):
        assert split_product(x, weight, True) is None
    assert torch.equal(product(normal(64, 40).T, weight, True), product(normal(64, 40).T.contiguous(), weight, True))


def test_small_products_stay_with_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = bf16_numbers(1536, 576)
    assert split_product(normal(16, 576), weight, True) is None
    assert split_product(normal(17, 576), weight, True) is not None
    assert split_product(normal(70, 192), bf16_numbers(576, 192), True) is None
    assert split_product(normal(95, 576), normal(1536, 576), True) is None
    assert split_product(normal(96, 576), normal(1536, 576), True) is not None
    monkeypatch.setattr(cpu_nf4, "USE_TILES", False)
    assert split_product(normal(17, 576), weight, True) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whatever_the_default_dtype_is(dtype: torch.dtype) -> None:
    x, weight = normal(40, 64), bf16_numbers(96, 64)
    wanted = product(x, weight, True)
    torch.set_default_dtype(dtype)
    try:
        found = product(x, weight, True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_in_half_precision_keep_their_dtype(dtype: torch.dtype) -> None:
    assert frozen_linear(normal(40, 64).to(dtype), bf16_numbers(96, 64)).dtype == dtype


@pytest.mark.parametrize("sizes", [(100, 1056, 1504), (64, 1056, 512), (300, 4096, 64), (1400, 608, 64), (2100, 1056, 256)])
def test_threads_wait_for_one_another(sizes: tuple[int, int, int]) -> None:
    """More threads than cores: one that was put off still finds what it has to multiply."""
    rows, inner, columns = sizes
    x, weight = normal(rows, inner), weights_of(inner, columns, True)
    with threads(1):
        wanted = product(x, weight, True)
    with threads(8):
        assert all(torch.equal(product(x, weight, True), wanted) for _ in range(20))


def test_more_groups_of_rows_than_are_counted() -> None:
    """Seventeen threads and one panel of columns would like 66."""
    x, weight = normal(2112, 32), weights_of(32, 32, True)
    with threads(1):
        wanted = product(x, weight, True)
    with threads(17):
        assert torch.equal(product(x, weight, True), wanted)


@pytest.mark.parametrize("row", [0, 700, 1535])
def test_a_table_of_which_a_row_was_trained_is_not_packed(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a few rows: then the BLAS is faster."""
    monkeypatch.setattr(cpu_split, "MIN_SPLIT_ROWS", 96)
    monkeypatch.setattr(cpu_split, "memory", lambda *_: pytest.fail("memory was asked for"))
    weight = bf16_numbers(1536, 64)
    weight[row] = normal(64)
    assert split_product(normal(40, 64), weight, True) is None
    assert split_product(normal(40, 1536), weight, False) is None


def test_the_largest_number_has_parts() -> None:
    """Rounded to bf16 it would be infinite."""
    largest = torch.finfo(torch.float32).max
    x, weight = torch.zeros(17, 64), torch.zeros(32, 64)
    x[:, 40], weight[:, 40] = largest, 0.5
    assert torch.equal(product(x, weight, True), torch.full((17, 32), largest / 2))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_spoils_its_row_alone(number: float) -> None:
    x, weight = normal(40, 64), bf16_numbers(96, 64)
    x[7, 9] = number
    y, others = product(x, weight, True), torch.arange(40) != 7
    assert not y[7].isfinite().any()
    assert y[others].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFE000, 0x7FC00000, 0x7F800001, 0x7F800000, 0x7F7FFFFF])
def test_a_weight_that_is_none_spoils_its_column_alone(word: int, kind: torch.dtype) -> None:
    """NaN of many bits, infinity, and what bf16 rounds to it."""
    x, weight = normal(40, 64), weights_of(64, 96, True, kind)
    weight.view(torch.int32)[50, 9] = word - 2**32 * (word >> 31)
    y, others = product(x, weight, True), torch.arange(96) != 50
    assert not y[:, 50].isfinite().any()
    assert y[:, others].isfinite().all()


# ---- in a layer ----------------------------------------------------------------------------------------------------------


def frozen_layer(bias: bool, kind: torch.dtype = torch.bfloat16) -> Linear:
    layer = Linear(64, 96, bias=bias)
    layer.weight.data = weights_of(64, 96, True, kind)
    return layer.requires_grad_(False)


def both_ways(monkeypatch: pytest.MonkeyPatch, compute: object) -> tuple[list[Tensor], list[Tensor]]:
    """What ``compute`` gives with and without tiles."""
    ways = []
    for tiles in (True, False):
        monkeypatch.setattr(cpu_nf4, "USE_TILES", tiles)
        ways.append(compute())
    return ways[0], ways[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "nf4"])
def test_values_and_gradients_of_a_layer(
    bias: bool, adapted: bool, kind: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = frozen_layer(bias, torch.float32 if kind == "nf4" else kind)
    layer: nn.Module = dense
    if kind == "nf4":
        layer = NF4Linear(quantize(dense.weight.data), dense.bias)
        dense.weight.data = dequantize(layer.quantized)
    exact: nn.Module = copy.deepcopy(dense)
    if adapted:
        layer, exact = (LoRALinear(base, rank=4, alpha=8.0) for base in (layer, exact))
        layer.lora_B.data = normal(96, 4, seed=3)
        exact.load_state_dict({**exact.state_dict(), "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    grad = normal(5, 40, 96, seed=2)

    def compute() -> list[Tensor]:
        x = normal(5, 40, 64).requires_grad_()
        parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, parameters, grad)]

    found, blas = both_ways(monkeypatch, compute)
    exact = exact.double()
    x = normal(5, 40, 64).double().requires_grad_()
    y = exact(x)
    true = [y, *torch.autograd.grad(y, [x, *(p for p in exact.parameters() if p.requires_grad)], grad.double())]
    for ours, theirs, wanted in zip(found, blas, true, strict=True):
        scale = float(wanted.detach().abs().max())
        assert float((ours - wanted.detach()).abs().max()) <= 2e-6 * scale
        assert float((theirs - wanted.detach()).abs().max()) <= 2e-6 * scale
    assert not torch.equal(found[0], blas[0])
    assert not torch.equal(found[1], blas[1])


@pytest.mark.parametrize("bias", [True, False])
def test_one_answer_in_training_after_it_and_with_a_fresh_adapter(bias: bool) -> None:
    layer, x = frozen_layer(bias), normal(40, 64)
    adapted = LoRALinear(layer, rank=4, alpha=8.0)
    trained = layer(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        ways = [layer(x), adapted(x), linear(x, layer.weight, layer.bias)]
    ways.append(adapted(x).detach())
    layer.weight.requires_grad_()  # as a model that was just loaded
    ways.append(linear(x, layer.weight, layer.bias).detach())
    assert all(torch.equal(way, trained) for way in ways)


def test_plain_pytorch_layers_multiply_as_they_do_without_us() -> None:
    layer = nn.Linear(64, 96).requires_grad_(False)
    layer.weight.data = bf16_numbers(96, 64)
    x = normal(40, 64)
    wanted = layer(x)
    assert torch.equal(LoRALinear(layer, rank=4, alpha=8.0)(x).detach(), wanted)


@pytest.mark.parametrize("loss", [head_loss_sum, token_log_probs])
def test_losses_of_a_head(loss: object, monkeypatch: pytest.MonkeyPatch) -> None:
    head, targets = frozen_layer(bias=False), torch.arange(40) * 7 % 96

    def compute() -> list[Tensor]:
        hidden = normal(40, 64).requires_grad_()
        value = loss(hidden, head, targets)
        return [value.detach(), *torch.autograd.grad(value.sum(), hidden)]

    found, blas = both_ways(monkeypatch, compute)
    hidden = normal(40, 64).double().requires_grad_()
    log_probs = (hidden @ head.weight.double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    value = -log_probs.sum() if loss is head_loss_sum else log_probs
    true = [value, *torch.autograd.grad(value.sum(), hidden)]
    for ours, wanted in zip(found, true, strict=True):
        assert float((ours - wanted.detach()).abs().max()) <= 4e-6 * float(wanted.detach().abs().max())
    assert not torch.equal(found[1], blas[1])
