"""A merge is judged by its effect E = W' - W against D, what was trained, and the report tells the truth about it.

W' close to W + D proves nothing: an adapter that vanished in rounding is close, too.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from laws import DENSE, IN_FP64, Case, cases, exact, roundoff, weight_of
from tiny import randn
from torch import Tensor, nn

from minisft import effect as effect_module
from minisft.effect import LayerReport
from minisft.lora import LoRALinear
from minisft.matmul import Linear
from minisft.merge_weights import merge_, merge_layer


def measured(W: Tensor, D: Tensor, after: Tensor) -> LayerReport:
    """The report by another road: the definitions, in fp64."""
    E = after.double() - W
    norm = float(D.norm())
    if norm == 0:
        return LayerReport("0", 0.0, 0.0, 0.0, 1.0)
    asked = D != 0
    return LayerReport(
        "0",
        norm / float(W.norm()) if W.any() else float("inf"),
        float((asked & (E == 0)).sum() / asked.sum()),
        float((E - D).norm()) / norm,
        float((E * D).sum()) / norm**2,
    )


def adapter_of_size(ratio: float, dtype: torch.dtype, size: int = 256) -> nn.Sequential:
    """A weight of spread 0.02, as trained models have them, under an adapter with |D| = ratio |W|."""
    base = Linear(size, size, bias=False, dtype=dtype)
    adapter = LoRALinear(base, 8, 8.0)
    with torch.no_grad():
        base.weight.copy_(0.02 * randn(size, size))
        adapter.lora_A.copy_(randn(8, size, seed=1))
        adapter.lora_B.copy_(randn(size, 8, seed=2) * 0.02 * ratio / 8**0.5)
    return nn.Sequential(adapter)


@given(case=cases(hostile=False))
def test_the_report_gives_the_numbers_of_its_definitions(case: Case) -> None:
    model = case.model()
    e = exact(case, model, case.input())
    W, D = (e.W, e.D) if case.kind != "embedding" else (e.W.T, e.D.T)
    report = merge_(model).layers[0]
    expected = measured(W, D, weight_of(model[0]))
    noise = 4 * 2.0**-24 * max(1.0, float(W.norm()) / (float(D.norm()) or 1.0))  # of D in fp32, and of W + D
    assert report.path == expected.path
    assert report.delta_ratio == pytest.approx(expected.delta_ratio, rel=1e-4)
    assert report.fraction_lost == pytest.approx(expected.fraction_lost, abs=2 / D.numel())  # an entry may lie on the border
    assert report.effect_error == pytest.approx(expected.effect_error, rel=1e-4, abs=noise)
    assert report.survival == pytest.approx(expected.survival, rel=1e-4, abs=noise)
    assert report.base_shift == 0


@given(case=cases(*IN_FP64, hostile=False))
def test_in_fp64_the_effect_is_delta_to_1e_12(case: Case) -> None:
    model = case.model()
    e = exact(case, model, case.input())
    W, D = (e.W, e.D) if case.kind != "embedding" else (e.W.T, e.D.T)
    report = merge_(model).layers[0]
    assert float((weight_of(model[0]) - W - D).norm()) <= 1e-12 * float(W.norm() + D.norm())
    assert report.survival == pytest.approx(1.0, abs=1e-10)


# |D| / |W| -> the share of entries that rounding swallows, and the error of the effect.
KNOWN = [
    (torch.bfloat16, 0.1, 0.019, 0.017),
    (torch.bfloat16, 0.01, 0.18, 0.17),
    (torch.bfloat16, 0.001, 0.78, 0.79),
    (torch.float16, 0.1, 0.0024, 0.0021),
    (torch.float16, 0.01, 0.024, 0.021),
    (torch.float16, 0.001, 0.21, 0.21),
]


@pytest.mark.parametrize(("dtype", "ratio", "swallowed", "error"), KNOWN)
def test_what_16_bits_swallow(dtype: torch.dtype, ratio: float, swallowed: float, error: float) -> None:
    """The smaller the update, the less of it a 16-bit weight can take in. Figures measured once, on other random numbers."""
    report = merge_(adapter_of_size(ratio, dtype)).layers[0]
    assert report.delta_ratio == pytest.approx(ratio, rel=0.1)
    assert report.fraction_lost == pytest.approx(swallowed, rel=0.15)
    assert report.effect_error == pytest.approx(error, rel=0.15)


def test_a_wider_dtype_brings_the_update_back() -> None:
    """The same adapter over the same bf16 weight, merged in fp32: hardly anything is lost."""
    model = adapter_of_size(0.001, torch.bfloat16)
    W, D = model[0].base.weight.double(), model[0].delta_weight().double()
    report = merge_(model, dtype=torch.float32).layers[0]
    assert report.fraction_lost < 1e-3
    assert report.effect_error < 1e-3
    assert float((model[0].weight.double() - W - D).norm() / D.norm()) < 1e-3


def test_an_update_too_small_even_for_the_sum_is_reported_as_lost() -> None:
    """W + D in fp32 is W here, so the report must look at D itself."""
    model = adapter_of_size(1e-9, torch.float32)
    before = model[0].base.weight.fill_(0.02).clone()
    report = merge_(model).layers[0]
    assert report.delta_ratio == pytest.approx(1e-9, rel=0.2)
    assert (report.fraction_lost, report.survival, report.effect_error) == (1.0, 0.0, pytest.approx(1.0))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("scale", [1e-25, 1e12])
def test_the_report_does_not_depend_on_the_unit(scale: float) -> None:
    """Squares of numbers that fp32 can hold need not fit into fp32."""
    model = adapter_of_size(0.1, torch.float32)
    expected = dataclasses.astuple(merge_(adapter_of_size(0.1, torch.float32)).layers[0])[1:]
    with torch.no_grad():
        model[0].base.weight.mul_(scale)
        model[0].lora_B.mul_(scale)
    assert dataclasses.astuple(merge_(model).layers[0])[1:] == pytest.approx(expected, rel=1e-2)


def test_a_layer_is_measured_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, and the last one short: none is left out, none is counted twice."""
    whole = dataclasses.astuple(merge_(adapter_of_size(0.01, torch.bfloat16, 65)).layers[0])[1:]
    for size in (1000, 65 * 65 - 1, 65 * 65):
        monkeypatch.setattr(effect_module, "CHUNK", size)
        assert dataclasses.astuple(merge_(adapter_of_size(0.01, torch.bfloat16, 65)).layers[0])[1:] == pytest.approx(
            whole, rel=1e-12
        )


def test_entries_without_an_update_are_not_counted_as_swallowed() -> None:
    """Half the rows of B are zero, so half of D is: what counts is the other half."""
    model = adapter_of_size(0.001, torch.bfloat16)
    with torch.no_grad():
        model[0].lora_B[::2] = 0.0
    W, D = model[0].base.weight.detach().double(), model[0].delta_weight().double()
    report = merge_(model).layers[0]
    assert report.fraction_lost == pytest.approx(measured(W, D, model[0].weight).fraction_lost, abs=1e-3)
    assert report.fraction_lost == pytest.approx(0.78, rel=0.15)


def test_the_whole_is_as_good_as_its_worst_layer() -> None:
    model = nn.Sequential(*(adapter_of_size(ratio, torch.bfloat16)[0] for ratio in (0.1, 0.001, 0.01)))
    report = merge_(model)
    assert [layer.path for layer in report.layers] == ["0", "1", "2"]
    assert report.fraction_lost == report.layers[1].fraction_lost
    assert report.survival == min(layer.survival for layer in report.layers)


@pytest.mark.parametrize("base", DENSE)
def test_the_effect_of_the_output_is_the_adapters(base: str) -> None:
    """|(y' - y) - D x| is small beside |D x|: the function changed by what was trained, not by something of its size."""
    case = Case("linear", base, 65, 63, rank=4)
    model = case.model()
    e = exact(case, model, case.input())
    change = e.x @ (merge_layer("0", model[0], "dequantized", case.dtype)[0].double() - e.W).T
    update = e.x @ e.D.T
    assert float((change - update).norm() / update.norm()) < 2 * roundoff(case.dtype) + 1e-6
