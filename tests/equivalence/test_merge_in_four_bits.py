"""Over a base in 4 bits a merge must say onto which weight: three answers, three laws, and how much of the adapter lives.

dequantized: what the codes stand for, plus D: the function that was trained. original: the weights before they were quantized,
plus D: another function. requantized: 4 bits again, where an update smaller than the gap between two levels vanishes.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import BASES, IN_4_BITS, IN_FP64, PATTERNED, Case, adapted, bits, digest, logits, roundoff, storages
from tiny import FAMILIES, LLAMA, assert_close, build
from torch import Tensor

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig
from minisft.lora import LoRALinear
from minisft.merge_weights import merge, merge_, merge_layer
from minisft.nf4 import QuantizedWeight, dequantize, quantize
from minisft.surgery import adapters_off, apply_lora_, lora_modules, nf4_modules, quantize_

SOME = LoRAConfig(rank=2, alpha=3.0, targets=("q_proj", "down_proj"))  # the other linears are in 4 bits, without an adapter
every_base = pytest.mark.parametrize("base", IN_4_BITS)
FIELDS = ("packed", "absmax", "absmax2", "offset", "levels")


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Equal codes, scales and layout."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    if any((x is None) != (y is None) for x, y in pairs):
        return False
    tensors_agree = all(bits(x) == bits(y) for x, y in pairs if x is not None)
    return tensors_agree and (a.block_size, a.shape, a.dtype) == (b.block_size, b.shape, b.dtype)


def original_weights(base: str) -> dict[str, Tensor]:
    """The weights that ``adapted(LLAMA, ..., base)`` was quantized from."""
    return dict(build(LLAMA, BASES[base].dtype).named_parameters())


# ---- dequantized -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", [base for base in IN_FP64 if base in IN_4_BITS])
def test_onto_dequantized_is_the_function_that_was_trained(family: str, base: str) -> None:
    model = adapted(FAMILIES[family], SOME, base)
    merged, report = merge(model)
    assert not nf4_modules(merged)
    assert report.onto == "dequantized"
    assert_close(logits(merged), logits(model), 1e-10)


@every_base
def test_onto_dequantized_every_weight_is_what_its_codes_stand_for(base: str) -> None:
    model = adapted(LLAMA, SOME, base)
    weights = dict(merge(model)[0].named_parameters())
    dtype, adapters = BASES[base].dtype, lora_modules(model)
    for path, layer in nf4_modules(model).items():
        path = path.removesuffix(".base")
        dense = dequantize(layer.quantized, torch.float32).double()
        if path in adapters:
            adapter = adapters[path]
            dense = dense + 1.5 * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
        error = (weights[f"{path}.weight"].double() - dense).abs()
        assert bool((error <= roundoff(dtype) * dense.abs() + 2.0**-20).all())


# ---- original --------------------------------------------------------------------------------------------------------


@every_base
def test_onto_original_is_the_original_plus_delta(base: str) -> None:
    """Adapted or not, no trace of 4 bits is left; and the report says how far the base moved under the adapter."""
    model, before = adapted(LLAMA, SOME, base), original_weights(base)
    asked: list[str] = []
    merged, report = merge(model, "original", original=lambda name: asked.append(name) or before[name])
    after = dict(merged.named_parameters())
    adapters = lora_modules(model)
    assert sorted(asked) == sorted(f"{path.removesuffix('.base')}.weight" for path in nf4_modules(model))
    for path, adapter in adapters.items():
        W, D = before[f"{path}.weight"].detach().double(), 1.5 * (adapter.lora_B.double() @ adapter.lora_A.double()).detach()
        allowed = roundoff(BASES[base].dtype) * (W + D).abs() + 2.0**-20
        assert bool(((after[f"{path}.weight"].double() - W - D).abs() <= allowed).all())
        trained = dequantize(adapter.base.quantized, torch.float32).double()
        (layer,) = (layer for layer in report.layers if layer.path == path)
        assert layer.base_shift == pytest.approx(float((W - trained).norm() / D.norm()), rel=1e-3)
        assert layer.base_shift > 0.01
    for name in before.keys() - {f"{path}.weight" for path in adapters}:
        assert bits(after[name]) == bits(before[name])


def test_onto_original_is_another_function_and_onto_dequantized_is_not() -> None:
    model, before = adapted(LLAMA, SOME, "nf4-of-fp64"), original_weights("nf4-of-fp64")
    trained = logits(model)
    other = logits(merge(model, "original", original=before.__getitem__)[0])
    assert float((other - trained).abs().max()) > 0.1
    assert all(layer.base_shift == 0 for layer in merge(model)[1].layers)


# ---- requantized -----------------------------------------------------------------------------------------------------


@every_base
def test_onto_requantized_has_the_codes_of_the_sum(base: str) -> None:
    """quantize(W + D), in the form of the base; layers without an adapter keep theirs, bit for bit; memory is not shared."""
    model = adapted(LLAMA, SOME, base)
    merged, report = merge(model, "requantized")
    assert report.onto == "requantized"
    before, after = nf4_modules(model), nf4_modules(merged)
    assert list(after) == [path.removesuffix(".base") for path in before]
    for path, layer in before.items():
        q, now = layer.quantized, after[path.removesuffix(".base")].quantized
        adapter = lora_modules(model).get(path.removesuffix(".base"))
        if adapter is None:
            assert same(now, q)
        else:
            delta = adapter.delta_weight()
            total = dequantize(q, torch.float32).to(delta.dtype) + delta
            wanted = quantize(total, q.block_size, BASES[base].double_quant)
            assert torch.equal(now.packed, wanted.packed)
            assert torch.equal(now.absmax, wanted.absmax)
            assert now.dtype == q.dtype
    assert not storages(model) & storages(merged)
    assert torch.isfinite(logits(merged)).all()


@pytest.mark.parametrize("levels", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_requantizing_keeps_the_form_of_the_base(levels: str, double_quant: bool) -> None:
    """Levels, block size and double quantization; fp4's levels are in no rising order."""
    model = build(LLAMA, torch.float32)
    quantize_(model, QuantConfig(levels, 128, double_quant))
    apply_lora_(model, SOME)
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(1))
    merged, _ = merge(model, "requantized")
    before, after = list(nf4_modules(model).values()), list(nf4_modules(merged).values())
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.levels, new.levels)
        assert (old.block_size, old.absmax2 is None) == (new.block_size, new.absmax2 is None) == (128, not double_quant)


@every_base
def test_requantizing_a_zero_update_is_the_identity(base: str) -> None:
    """L7 in 4 bits. Scales that were rounded to 8 bits would not come through that twice."""
    model = adapted(LLAMA, SOME, base)
    for adapter in lora_modules(model).values():
        adapter.lora_B.data.zero_()
    merged, report = merge(model, "requantized")
    for old, new in zip(nf4_modules(model).values(), nf4_modules(merged).values(), strict=True):
        assert same(old.quantized, new.quantized)
    assert (report.fraction_lost, report.survival) == (0, 1)
    assert torch.equal(logits(merged), logits(model))


@given(base=st.sampled_from(IN_4_BITS), seed=st.integers(0, 2**20), exponent=st.integers(-14, 2))
def test_the_report_says_how_much_of_the_adapter_lives(base: str, seed: int, exponent: int) -> None:
    """Survival and effect error of a requantized layer, recomputed by their definitions in fp64."""
    model = layer_in_4_bits(base, 2.0**exponent, seed)
    q, report = merge_layer("layer", model, "requantized", torch.float32)
    assert isinstance(q, QuantizedWeight)
    W = dequantize(model.base.quantized, torch.float32).double()
    D = model.scaling * model.lora_B.detach().double() @ model.lora_A.detach().double()
    E = dequantize(q, torch.float32).double() - W
    assert report.survival == pytest.approx(float((E * D).sum() / (D * D).sum()), rel=1e-4, abs=1e-4)
    assert report.effect_error == pytest.approx(float((E - D).norm() / D.norm()), rel=1e-4)
    assert report.fraction_lost == pytest.approx(float((E == 0).double().mean()), abs=1e-9)
    assert report.delta_ratio == pytest.approx(float(D.norm() / W.norm()), rel=1e-4)


def layer_in_4_bits(base: str, ratio: float, seed: int = 0) -> LoRALinear:
    """One adapted layer of 64 x 65 with |D| about ``ratio`` |W|."""
    model = Case("linear-no-bias", base, 65, 64, rank=4, alpha=3.0, seed=seed).model()
    adapter = model[0]
    assert isinstance(adapter, LoRALinear)
    with torch.no_grad():
        adapter.lora_B.mul_(ratio / (adapter.scaling * 4**0.5))
    return adapter


@pytest.mark.parametrize("base", ["nf4", "nf4-of-fp64"])
@pytest.mark.parametrize(("ratio", "low", "high"), [(1.0, 0.8, 1.1), (0.1, 0.2, 0.9), (0.001, -0.02, 0.1), (1e-5, -0.02, 0.02)])
def test_a_tiny_update_does_not_survive_four_bits(base: str, ratio: float, low: float, high: float) -> None:
    """Trained updates are of the order of 0.01 |W|: merging them into 4 bits gives back the base. The report says so."""
    _, report = merge_layer("layer", layer_in_4_bits(base, ratio), "requantized", torch.float32)
    assert low <= report.survival <= high
    _, kept = merge_layer("layer", layer_in_4_bits(base, ratio), "dequantized", torch.float32)
    assert kept.survival == pytest.approx(1.0, abs=1e-2)


def test_the_models_report_is_that_of_its_worst_layer() -> None:
    model = adapted(LLAMA, PATTERNED, "nf4", scale=0.02)
    report = merge(model, "requantized")[1]
    trained = [layer for layer in report.layers if layer.delta_ratio > 0]
    assert report.survival == min(layer.survival for layer in trained) < 0.1
    assert report.fraction_lost == max(layer.fraction_lost for layer in trained) > 0


@pytest.mark.parametrize("base", ["fp64", "bf16"])
def test_requantizing_a_dense_base_is_refused(base: str) -> None:
    model = adapted(LLAMA, SOME, base)
    before = digest(model)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj") as caught:
        merge(model, "requantized")
    assert caught.value.code == "adapter/base-not-quantized"
    assert digest(model) == before


# ---- in place --------------------------------------------------------------------------------------------------------


@every_base
def test_in_place_only_adapted_layers_become_dense(base: str) -> None:
    model = adapted(LLAMA, SOME, base)
    plain = {path for path in nf4_modules(model) if not path.endswith(".base")}
    unmerged = logits(model).double()
    with adapters_off(model):
        effect = float((logits(model).double() - unmerged).norm())
    merge_(model)
    assert set(nf4_modules(model)) == plain
    assert float((logits(model).double() - unmerged).norm()) < 40 * roundoff(BASES[base].dtype) * effect + 1e-5 * effect
