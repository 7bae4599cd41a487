"""Every kernel against its PyTorch twin and against fp64. ``test_kernels.py`` runs this file under Triton's interpreter.

On a machine with a GPU the same cases run compiled, bf16 included: ``pytest tests/kernel_cases.py``. The interpreter knows no
correct bf16 (it cuts bits off instead of rounding), so there the dtypes are fp32 and fp16. Each configuration meets half of the
shapes and each shape half of the configurations; ``-m ""`` runs them all.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start of the process", allow_module_level=True)

pytest.importorskip("triton")

from minisft import matmul, nf4
from minisft.kernels import tuning, workspace
from minisft.kernels.dequantize import dequantize
from minisft.kernels.matmul_backward import CONFIGS as BACKWARD_CONFIGS
from minisft.kernels.matmul_backward import matmul_backward
from minisft.kernels.matmul_small import CONFIGS as SMALL_CONFIGS
from minisft.kernels.matmul_small import matmul_small
from minisft.kernels.matvec import CONFIGS as MATVEC_CONFIGS
from minisft.kernels.matvec import matvec
from minisft.kernels.quantize import quantize
from minisft.kernels.split_k import sum_partials
from minisft.nf4 import QuantizedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NF4 = nf4.codebook("nf4").to(DEVICE)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def quantized(*shape: int, block_size: int = 64, nested: bool = True, seed: int = 0) -> QuantizedWeight:
    return nf4.quantize(gaussian(*shape, seed=seed), block_size, nested)


def scales(weight: QuantizedWeight) -> list[float]:
    """One fp32 scale a block, rebuilt one by one: fp64 holds each product and nearly each sum exactly before it is rounded."""
    if weight.absmax2 is None:
        return weight.absmax.tolist()
    table, outer, offset = nf4.dynamic_map(weight.absmax.device).tolist(), weight.absmax2.tolist(), weight.offset.item()
    products = [table[code] * outer[block // 256] for block, code in enumerate(weight.absmax.tolist())]
    return (torch.tensor(products).double() + offset).float().tolist()  # torch.tensor rounds the products to fp32


def by_hand(weight: QuantizedWeight) -> Tensor:
    """The dense weight in fp64, byte by byte, each element rounded once to fp32: shares no code with kernel or twin."""
    levels, absmax, stored = weight.levels.tolist(), scales(weight), weight.packed.tolist()
    nibble = [(stored[i // 2] >> 4) if i % 2 == 0 else (stored[i // 2] & 15) for i in range(math.prod(weight.shape))]
    values = [levels[code] * absmax[i // weight.block_size] for i, code in enumerate(nibble)]
    return torch.tensor(values, dtype=torch.float64).float().view(weight.shape).to(DEVICE)


# ---- dequantize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        *(((n,), 64) for n in (2, 7, 64, 65, 777, 8192)),
        *(((1,), 32), ((33,), 32), ((24, 40), 128), ((17, 1031), 64), ((5, 3333), 256)),
        *(((20000,), 512), ((16385,), 1024), ((3, 4099), 2048), ((8193,), 4096)),
    ],
)
def test_dequantize_is_bit_equal_to_the_definition_and_to_its_twin(
    shape: tuple[int, ...], block_size: int, nested: bool
) -> None:
    weight = quantized(*shape, block_size=block_size, nested=nested)
    exact = by_hand(weight)
    q = nf4.quantize(gaussian(*shape), block_size, nested)
    for dtype in DTYPES:
        got = dequantize(weight, dtype)
        assert got.shape == shape
        assert got.dtype == dtype
        assert torch.equal(got, exact.to(dtype))
        assert torch.equal(got, nf4.dequantize(q, dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_a_zero_block_dequantizes_to_positive_zero(nested: bool) -> None:
    dense = gaussian(300)
    dense[64:128] = 0.0
    got = dequantize(nf4.quantize(dense, 64, nested), torch.float32)
    assert torch.equal(got[64:128].view(torch.int32), torch.zeros(64, dtype=torch.int32, device=DEVICE))


def test_a_zero_under_a_negative_scale_is_positive_too() -> None:
    """The smallest nested scales can come back from 8 bits just below zero."""
    codes = torch.full((16,), 0x77, dtype=torch.uint8, device=DEVICE)
    scale = torch.tensor([-1e-3], device=DEVICE)
    weight = QuantizedWeight(codes, scale, None, None, NF4, 32, torch.Size((32,)), torch.float32)
    assert not bool(dequantize(weight, torch.float32).signbit().any())


def test_every_byte_and_any_levels() -> None:
    levels = torch.linspace(-0.7, 0.9, 16).to(DEVICE)
    codes, shape = torch.arange(256, dtype=torch.uint8, device=DEVICE), torch.Size((512,))
    weight = QuantizedWeight(codes, gaussian(16).abs(), None, None, levels, 32, shape, torch.float32)
    assert torch.equal(dequantize(weight, torch.float32), by_hand(weight))


@pytest.mark.parametrize("n", [1, 2, 31, 33, 8190, 8192, 8193])
def test_dequantize_writes_nothing_past_the_end(n: int) -> None:
    weight, guarded = quantized(n), torch.full((n + 64,), 7.5, device=DEVICE)
    dequantize(weight, torch.float32, out=guarded[:n])
    assert torch.equal(guarded[:n], by_hand(weight))
    assert bool((guarded[n:] == 7.5).all())


def test_dequantize_does_not_depend_on_what_lies_behind_the_codes() -> None:
    weight = quantized(999)
    roomy = torch.full((len(weight.packed) + 64,), 0xFF, dtype=torch.uint8, device=DEVICE)
    roomy[: len(weight.packed)] = weight.packed
    assert torch.equal(
        dequantize(dataclasses.replace(weight, packed=roomy[: len(weight.packed)]), torch.float32), by_hand(weight)
    )


# ---- quantize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("n", [1, 63, 777, 4096, 9001])
def test_quantize_is_bit_equal_to_its_twin(n: int, block_size: int) -> None:
    for dtype in DTYPES:
        dense = gaussian(n, seed=n, dtype=dtype)
        expected = nf4.quantize(dense, block_size, double_quant=False)
        packed, absmax = quantize(dense, NF4, block_size)
        assert torch.equal(packed, expected.packed)
        assert torch.equal(absmax, expected.absmax)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_quantize_at_the_edges_of_fp32(scale: float) -> None:
    dense = gaussian(500).clamp(-1, 1) * scale
    expected = nf4.quantize(dense, 64, double_quant=False)
    packed, absmax = quantize(dense, NF4, 64)
    assert torch.equal(packed, expected.packed)
    assert torch.equal(absmax, expected.absmax)


def test_a_tie_takes_the_lower_code() -> None:
    midpoints = (NF4[:-1] + NF4[1:]) / 2
    dense = torch.cat([midpoints, torch.ones(1, device=DEVICE)]).repeat_interleave(2)
    packed, _ = quantize(dense, NF4, 32)
    above, _ = quantize(torch.nextafter(dense, torch.full_like(dense, 2.0)).clamp(max=1.0), NF4, 32)
    assert nf4.unpack(packed, 32)[::2].tolist() == [*range(15), 15]
    assert nf4.unpack(above, 32)[::2].tolist() == [*range(1, 16), 15]


def test_codes_come_from_the_reciprocal_not_from_a_division() -> None:
    """Only next to a midpoint do the two differ, so they are looked for there: 16 blocks of a scale and such a number."""
    scale = gaussian(200_000).abs() + 0.5
    near = scale * ((NF4[:-1] + NF4[1:]) / 2)[torch.arange(200_000, device=DEVICE) % 15]
    boundaries = (NF4[:-1] + NF4[1:]) / 2
    by_reciprocal, by_division = (torch.bucketize(y, boundaries) for y in (near * (1 / scale), near / scale))
    found = (by_reciprocal != by_division).nonzero().flatten()[:16]
    assert len(found) == 16
    dense = torch.stack([scale[found], near[found]], dim=1).repeat_interleave(16, dim=1)
    packed, _ = quantize(dense, NF4, 32)
    assert torch.equal(nf4.unpack(packed, 512).view(16, 32)[:, -1].long(), by_reciprocal[found])


@pytest.mark.parametrize("name", ["fp4", "int4"])
def test_other_codebooks(name: str) -> None:
    dense = gaussian(1000)
    packed, absmax = quantize(dense, nf4.codebook(name).to(DEVICE), 128)
    expected = nf4.quantize(dense, 128, double_quant=False, levels=name)
    assert torch.equal(packed, expected.packed)
    assert torch.equal(absmax, expected.absmax)


def test_quantize_keeps_zero_and_reports_what_is_not_finite() -> None:
    dense = gaussian(320)
    dense[:64], dense[70], dense[200] = 0.0, float("nan"), float("inf")
    packed, absmax = quantize(dense, NF4, 64)
    assert packed[:32].tolist() == [0x77] * 32
    assert absmax[0].item() == 0.0
    assert absmax.isnan().tolist() == [False, True, False, True, False]


# ---- products --------------------------------------------------------------------------------------------------------


def check_product(got: Tensor, exact: Tensor, magnitude: Tensor, inner: int, twin: Tensor) -> None:
    """Within the worst-case bound u |y| + 2 k e |W||x| element by element, and no worse than the twin on the whole.

    ``exact`` is the product in fp64 and ``magnitude`` that of the absolute values.
    """
    error = (got.double() - exact).abs()
    rounding = ROUNDOFF[got.dtype]
    bound = rounding * exact.abs() + 2 * inner * 2.0**-24 * magnitude + 2.0**-25
    assert got.shape == exact.shape
    assert bool((error <= bound).all()), f"{(error / bound).max().item():.3f} of the bound"
    if got.numel() < 16:  # the error of a few numbers is luck, and no yardstick
        return
    yardstick = (twin.double() - exact).square().mean().sqrt().item()
    floor = rounding * exact.square().mean().sqrt().item() / 4
    assert error.square().mean().sqrt().item() <= 1.5 * yardstick + floor


def crossed(shapes: Sequence[tuple[int, ...]], configs: Sequence[tuning.Config]) -> list[object]:
    """Every shape with every configuration; as on a chess board, the dark squares are left to make test-thorough."""
    return [
        pytest.param(*shape, config, marks=[pytest.mark.exhaustive] if (i + j) % 2 else [])
        for i, shape in enumerate(shapes)
        for j, config in enumerate(configs)
    ]


SHAPES = [(1, 32), (21, 160), (9, 1056), (5, 2080)]  # (out_features, in_features)


@pytest.mark.parametrize(("outputs", "inputs", "config"), crossed(SHAPES, MATVEC_CONFIGS))
def test_matvec(outputs: int, inputs: int, config: tuning.Config) -> None:
    for rows, dtype in enumerate([DTYPES[0], DTYPES[-1], DTYPES[0], DTYPES[1]], start=1):
        weight = quantized(outputs, inputs, nested=rows % 2 == 1, block_size=32 if rows == 2 else 64)
        x, dense = gaussian(rows, inputs, seed=rows, dtype=dtype), by_hand(weight)
        exact = x.double() @ dense.double().T
        twin = torch.nn.functional.linear(x.float(), dense).to(dtype)
        check_product(matvec(x, weight, config=config), exact, x.abs().double() @ dense.abs().double().T, inputs, twin)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "block_size", "config"),
    crossed([(1, 5, 96, 64), (16, 70, 160, 32), (33, 70, 544, 4096)], SMALL_CONFIGS),
)
def test_matmul_small(rows: int, outputs: int, inputs: int, block_size: int, config: tuning.Config) -> None:
    for dtype, nested in zip(DTYPES, (True, False, True), strict=False):
        weight, x = quantized(outputs, inputs, block_size=block_size, nested=nested), gaussian(rows, inputs, dtype=dtype)
        dense = by_hand(weight).to(dtype)
        exact = x.double() @ dense.double().T
        twin = torch.nn.functional.linear(x.float(), dense.float()).to(dtype)
        check_product(matmul_small(x, weight, config), exact, x.abs().double() @ dense.abs().double().T, inputs, twin)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "block_size", "config"),
    crossed([(1, 5, 96, 64), (16, 160, 96, 32), (33, 301, 160, 4096)], BACKWARD_CONFIGS),
)
def test_matmul_backward(rows: int, outputs: int, inputs: int, block_size: int, config: tuning.Config) -> None:
    for dtype, nested in zip(DTYPES, (True, False, True), strict=False):
        weight, grad = quantized(outputs, inputs, block_size=block_size, nested=nested), gaussian(rows, outputs, dtype=dtype)
        dense = by_hand(weight).to(dtype)
        exact = grad.double() @ dense.double()
        twin = (grad.float() @ dense.float()).to(dtype)
        check_product(matmul_backward(grad, weight, config), exact, grad.abs().double() @ dense.abs().double(), outputs, twin)


def test_the_largest_row_counts() -> None:
    weight, x, grad = quantized(40, 64), gaussian(128, 64), gaussian(128, 40, seed=1)
    dense = by_hand(weight)
    wide, sizes = dense.double(), dense.abs().double()
    check_product(matmul_small(x, weight), x.double() @ wide.T, x.abs().double() @ sizes.T, 64, x @ dense.T)
    check_product(matmul_backward(grad, weight), grad.double() @ wide, grad.abs().double() @ sizes, 40, grad @ dense)


def test_partial_sums_are_added_in_order_and_rounded_once() -> None:
    partials = torch.tensor([1.0, 2.0**-24, 2.0**-24, 0.5], device=DEVICE)[:, None, None].expand(4, 3, 700).contiguous()
    assert torch.equal(sum_partials(partials, torch.float32), torch.full((3, 700), 1.5, device=DEVICE))
    assert torch.equal(sum_partials(partials[:1], torch.float32), partials[0])
    powers = torch.tensor([1.0, 2.0, 4.0, 8.0], device=DEVICE)[:, None, None].expand(4, 1, 1500).contiguous()
    assert torch.equal(sum_partials(powers, torch.float16), torch.full((1, 1500), 15.0, dtype=torch.float16, device=DEVICE))


# ---- any number of rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [64, 40, 33])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 130])
def test_every_shape_is_multiplied(rows: int, inputs: int) -> None:
    weight = quantized(12, inputs)
    dense = by_hand(weight)
    x, grad = gaussian(rows, inputs), gaussian(rows, 12, seed=1)
    torch.testing.assert_close(matmul.triton_matmul(x, weight), (x.double() @ dense.double().T).float(), rtol=1e-5, atol=1e-5)
    expected = (grad.double() @ dense.double()).float()
    torch.testing.assert_close(matmul.triton_matmul_t(grad, weight), expected, rtol=1e-5, atol=1e-5)


def test_one_buffer_is_shared_by_all_layers_and_can_be_freed() -> None:
    workspace.release()
    device = torch.device(DEVICE)
    with workspace.borrowed((64, 32), torch.float32, device) as large:
        address = large.data_ptr()
    with workspace.borrowed((5, 7), torch.float32, device) as small:
        assert small.data_ptr() == address
        assert small.shape == (5, 7)
    assert workspace.release() == 64 * 32 * 4
    assert workspace.release() == 0


# ---- choosing a configuration ----------------------------------------------------------------------------------------


def test_the_fastest_configuration_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: 3.0, 2: 1.0, 4: float("inf")}
    configs = [tuning.Config(8, 32, parts) for parts in times]
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_milliseconds", lambda config, run: times[config.parts])
    assert tuning.fastest("key", configs, lambda config: None).parts == 2
    times[1] = 0.5
    assert tuning.fastest("key", configs, lambda config: None).parts == 2
    assert tuning.fastest("another", configs, lambda config: None).parts == 1


def test_a_configuration_that_does_not_fit_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import OutOfResources

    def run(config: tuning.Config) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda call, **options: call())
    assert tuning._milliseconds(tuning.Config(8, 32, 1), run) == float("inf")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_non_contiguous_input_is_copied_and_a_non_contiguous_weight_refused() -> None:
    weight, x = quantized(16, 64), gaussian(64, 3)
    assert torch.equal(matvec(x.T, weight), matvec(x.T.contiguous(), weight))
    grad = gaussian(16, 9)
    assert torch.equal(matmul_backward(grad.T, weight), matmul_backward(grad.T.contiguous(), weight))
    strided = weight.packed.repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match="packed is not contiguous"):
        dequantize(dataclasses.replace(weight, packed=strided), torch.float32)
    with pytest.raises(ValueError, match="weight is not contiguous"):
        quantize(gaussian(64, 64).T, NF4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(511, dtype=torch.uint8)}, ValueError, "packed has 511 items, expected 512"),
        ({"packed": torch.zeros(512, dtype=torch.int8)}, TypeError, "packed is torch.int8"),
        ({"packed": torch.zeros(513, dtype=torch.uint8)[1:]}, ValueError, "no multiple of 4"),
        ({"absmax": torch.zeros(16)}, TypeError, "absmax is torch.float32, expected torch.uint8"),
        ({"absmax2": None}, ValueError, "together, or none"),
        ({"absmax2": torch.zeros(2)}, ValueError, "absmax2 has 2 items, expected 1"),
        ({"offset": torch.zeros((), dtype=torch.float64)}, TypeError, "offset is torch.float64"),
        ({"levels": torch.zeros(15)}, ValueError, "levels has 15 items"),
        ({"block_size": 48}, ValueError, "not 48"),
        ({"shape": torch.Size((0, 64))}, ValueError, "not 0"),
        ({"shape": torch.Size((2**20, 2**20))}, ValueError, "elements"),
    ],
)
def test_a_malformed_weight_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dequantize(dataclasses.replace(quantized(16, 64), **change), torch.float32)


def test_a_product_of_the_wrong_shape_is_refused() -> None:
    weight = quantized(16, 64)
    for x in (gaussian(5, 64), gaussian(2, 63), gaussian(64), gaussian(0, 64)):
        with pytest.raises(ValueError, match="expected \\(1 to 4, 64\\)"):
            matvec(x, weight)
    with pytest.raises(ValueError, match="divisible by 32"):
        matmul_small(gaussian(8, 40), quantized(16, 40))
    with pytest.raises(TypeError, match="float64"):
        matmul_backward(gaussian(2, 16).double(), weight)
    with pytest.raises(TypeError, match="float64"):
        dequantize(weight, torch.float64)


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized(16, 64)
    on_cpu = QuantizedWeight(*(f.cpu() if isinstance(f, Tensor) else f for f in vars(weight).values()))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        dequantize(on_cpu, torch.float32)
