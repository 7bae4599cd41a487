"""Merging is safe: it happens wholly or not at all, a copy shares nothing, and unmerging restores every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import BASES, DENSE, IN_4_BITS, LAYERS, PATTERNED, SIDES, Case, adapted, cases, digest, logits, storages, tensors
from tiny import FAMILIES, LLAMA, LLAMA_BIASES, MISTRAL
from torch import nn

from minisft.common.errors import UserError
from minisft.config import LoRAConfig
from minisft.merge_weights import merge, merge_, unmerge_
from minisft.model import CausalLM
from minisft.surgery import adapters_off, lora_modules

BROKEN = (float("nan"), float("inf"), float("-inf"))


def state(model: nn.Module) -> tuple[object, ...]:
    """All that a model is: its modules, bits, memory, flags and configuration."""
    modules = {path: (id(m), m.training) for path, m in model.named_modules()}
    memory = {name: (id(t), t.data_ptr(), t.requires_grad) for name, t in tensors(model)}
    enabled = {path: adapter.enabled for path, adapter in lora_modules(model).items()}
    return modules, memory, digest(model), list(model.state_dict()), enabled, getattr(model, "config", None), set(vars(model))


def refused(code: str, call: object, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert caught.value.code == code
    return str(caught.value)


# ---- in place, and back ----------------------------------------------------------------------------------------------


@given(case=cases())
def test_unmerging_restores_every_bit_of_a_layer(case: Case) -> None:
    """L3, for numbers of any size and pattern, after several rounds: subtraction would drift."""
    model = case.model()
    before = state(model)
    for _ in range(3):
        try:
            merge_(model)
        except UserError:  # the sum overflows; then nothing has happened, which is what is asserted
            continue
        assert not lora_modules(model)
        unmerge_(model)
    assert state(model) == before


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("base", BASES)
def test_unmerging_restores_every_bit_of_a_model(base: str, side: str) -> None:
    """L3, tied heads included: the tie is cut where one side is adapted, and comes back."""
    model = adapted(LLAMA, LoRAConfig(rank=2, alpha=3.0, targets=SIDES[side]), base)
    before, function = state(model), logits(model)
    merge_(model)
    assert not lora_modules(model)
    assert model.config.tie_word_embeddings == (side == "neither")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (side == "neither")
    assert not torch.equal(logits(model), function)
    unmerge_(model)
    assert state(model) == before
    assert model.lm_head.get_parameter("base.weight" if side in ("head", "both") else "weight") is not None
    assert torch.equal(logits(model), function)


def test_adapters_train_on_after_unmerging() -> None:
    model = adapted(LLAMA, LoRAConfig(rank=2, alpha=3.0)).train()
    merge_(model)
    assert not any(p.requires_grad for p in model.parameters())
    unmerge_(model)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {f"{path}.{factor}" for path in lora_modules(model) for factor in ("lora_A", "lora_B")}


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_and_switches_come_back(training: bool) -> None:
    """Also where single layers differ from the model; and what was set while merged is kept."""
    model = adapted(LLAMA, PATTERNED).train(training)
    first, second, *_ = lora_modules(model).values()
    first.train(not training)
    second.enabled = False
    before = state(model)
    merge_(model)
    unmerge_(model)
    assert state(model) == before
    merge_(model)
    model.train(not training)
    unmerge_(model)
    assert all(module.training is not training for module in model.modules())


def test_merging_does_not_ask_whether_adapters_are_switched_off() -> None:
    """``adapters_off`` is for a look at the base; what is merged is what was trained."""
    model = adapted(LLAMA, LoRAConfig(rank=2, alpha=3.0))
    function = logits(model)
    with adapters_off(model):
        assert not torch.allclose(logits(model), function)
        merge_(model)
        torch.testing.assert_close(logits(model), function, rtol=1e-10, atol=1e-10)
        unmerge_(model)
    assert torch.equal(logits(model), function)


def test_a_merged_model_has_the_state_of_a_plain_one() -> None:
    """Nothing of the adapters is in its state dict, parameters or modules: it saves, counts and moves like any model."""
    model = adapted(LLAMA_BIASES, LoRAConfig(rank=2, alpha=3.0))
    merge_(model)
    assert list(model.state_dict()) == list(CausalLM(LLAMA_BIASES).state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in CausalLM(LLAMA_BIASES).named_modules()]


# ---- a new model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("base", BASES)
def test_merging_into_a_new_model_leaves_the_old_one_whole(base: str, side: str) -> None:
    model = adapted(LLAMA_BIASES, LoRAConfig(rank=2, alpha=3.0, targets=SIDES[side]), base)
    before = state(model)
    merged, _ = merge(model)
    assert state(model) == before
    assert not storages(model) & storages(merged)
    assert not lora_modules(merged)
    assert not any(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert state(model) == before


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("base", DENSE)
def test_both_ways_to_merge_give_the_same_bits(base: str, side: str) -> None:
    model = adapted(MISTRAL if side == "both" else LLAMA, LoRAConfig(rank=2, alpha=3.0, targets=SIDES[side]), base)
    merged, report = merge(model)
    assert merge_(model) == report
    assert merged.config == model.config
    assert digest(merged) == digest(model)


# ---- refusals leave everything as it was -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids="-".join)
def test_merging_twice_is_an_error(layer: tuple[str, str]) -> None:
    """L4."""
    model = Case(*layer, 17, 15, rank=3).model()
    merge_(model)
    before = state(model)
    message = refused("adapter/already-merged", merge_, model)
    assert "found 0" in message
    assert "unmerge_" in message
    assert state(model) == before
    unmerge_(model)
    refused("adapter/not-merged", unmerge_, model)


def test_a_merged_model_is_not_merged_into_another() -> None:
    model = adapted(LLAMA, LoRAConfig(rank=2, alpha=3.0))
    merge_(model)
    refused("adapter/already-merged", merge, model)


@pytest.mark.parametrize("call", [merge, merge_])
def test_without_adapters_there_is_nothing_to_merge(call: object) -> None:
    model = CausalLM(LLAMA)
    before = state(model)
    refused("adapter/none", call, model)
    assert state(model) == before


@pytest.mark.slow
@given(data=st.data(), value=st.sampled_from(BROKEN), factor=st.sampled_from(["lora_A", "lora_B"]))
def test_one_broken_number_in_one_layer_and_nothing_is_merged(data: st.DataObject, value: float, factor: str) -> None:
    """All or nothing, whichever layer it is, in place and into a new model. The message names the layer."""
    model = adapted(FAMILIES[data.draw(st.sampled_from(list(FAMILIES)))], LoRAConfig(rank=2, alpha=3.0), "fp32")
    path = data.draw(st.sampled_from(list(lora_modules(model))))
    broken = getattr(lora_modules(model)[path], factor).data.view(-1)
    broken[data.draw(st.integers(0, len(broken) - 1))] = value
    before = state(model)
    for call in (merge_, merge):
        assert f"{path}; found" in refused("numeric/merge-not-finite", call, model)
        assert state(model) == before
    broken.nan_to_num_(0.0, 0.0, 0.0)
    merge_(model)


@pytest.mark.parametrize("base", IN_4_BITS)
@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_number_over_four_bits_is_refused_for_every_target(base: str, value: float) -> None:
    model = adapted(LLAMA, LoRAConfig(rank=2, alpha=3.0), base)
    path, adapter = list(lora_modules(model).items())[-1]
    adapter.lora_B.data[-1, -1] = value
    before = state(model)
    for onto in ("dequantized", "requantized"):
        assert path in refused("numeric/merge-not-finite", merge, model, onto)
    refused("numeric/merge-not-finite", merge_, model)
    assert state(model) == before


def test_a_sum_that_overflows_fp16_is_refused_and_fits_into_fp32() -> None:
    model = Case("linear", "fp16", 17, 15, rank=3, exponents=(10, 4, 11, 0)).model()
    before = state(model)
    message = refused("numeric/merge-not-finite", merge_, model)
    assert ": 0; found numbers up to" in message
    assert "as float16" in message
    assert "--dtype bf16 or fp32" in message
    assert state(model) == before
    merge_(model, torch.float32)
    assert bool(torch.isfinite(model[0].weight).all())


def test_a_weight_without_an_adapter_must_fit_the_dtype_too() -> None:
    """Merging in fp16 also rounds what was not adapted; an infinity there is as wrong."""
    model = adapted(LLAMA, LoRAConfig(rank=2, alpha=3.0), "fp32")
    model.model.norm.weight.data[3] = 1e5
    merge(model)
    before = state(model)
    assert "model.norm.weight" in refused("numeric/merge-not-finite", merge, model, "dequantized", torch.float16)
    assert state(model) == before


@pytest.mark.parametrize(("onto", "original"), [("original", None), ("dequantized", torch.zeros)])
def test_original_weights_and_the_wish_for_them_come_together(onto: str, original: object) -> None:
    with pytest.raises(ValueError, match="come together"):
        merge(adapted(LLAMA, LoRAConfig(rank=2, alpha=3.0)), onto, original=original)
