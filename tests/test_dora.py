"""DoRA: lengths and directions of W's rows. Expected values: plain autograd of the dense formula, and PEFT."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lora import DTYPES, batches, make_linear, make_nf4, seeds, sizes
from tiny import FAMILIES, LLAMA, QWEN2, assert_close, build, randn
from torch import Tensor, nn

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig, RunConfig
from minisft.dora import DoRALinear
from minisft.formats import load_adapter_, save_adapter
from minisft.lora import LoRAEmbedding, LoRALinear
from minisft.merge_weights import merged_weight
from minisft.nf4 import CHUNK
from minisft.nf4_linear import NF4Linear
from minisft.step import check_gradients
from minisft.surgery import adapters_off, apply_lora_, lora_modules, quantize_, scale_adapters_

BASES = {
    "dense": lambda *shape, bias, dtype, seed: make_linear(*shape, bias, dtype, seed=seed),
    "nf4": lambda *shape, bias, dtype, seed: make_nf4(*shape, bias, dtype, seed),
}


def trained(layer: DoRALinear, seed: int = 5) -> DoRALinear:
    """Factors and lengths random, as after some training; a length may have become negative."""
    with torch.no_grad():
        layer.lora_A.copy_(randn(*layer.lora_A.shape, seed=seed))
        layer.lora_B.copy_(randn(*layer.lora_B.shape, seed=seed + 1))
        layer.lora_magnitude_vector.mul_(1 + 0.7 * randn(len(layer.lora_magnitude_vector), seed=seed + 2))
    return layer


def dense_weight(base: nn.Linear | NF4Linear) -> Tensor:
    return base.dequantized_weight(torch.float64) if isinstance(base, NF4Linear) else base.weight.detach().double()


def merged_rows(layer: LoRALinear | LoRAEmbedding, weight_rows: Tensor, rows: slice = slice(None)) -> Tensor:
    """Rows of W' as a merge computes them."""
    return merged_weight(weight_rows, layer.delta_rows(weight_rows, rows))


def formula(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float) -> Tensor:
    """W' = m (W + s B A) / |W + s B A|, the norm over the inputs of each row and out of autograd's sight; 0 / 0 is 0."""
    direction = W + scaling * (B @ A)
    norms = (direction.detach() ** 2).sum(1).sqrt()
    norms[norms == 0] = 1.0  # four bits can round a whole row to zero
    return (m / norms).view(-1, 1) * direction


# A fresh adapter


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(inputs=sizes, outputs=sizes, batch=batches, bias=st.booleans(), seed=seeds)
def test_a_fresh_adapter_changes_no_number(kind, dtype, inputs, outputs, batch, bias, seed):
    """g = 1 exactly, so the output is that of a fresh LoRA, which is the base's."""
    base = BASES[kind](inputs, outputs, bias=bias, dtype=dtype, seed=seed)
    x = randn(*batch, inputs, seed=seed + 9, dtype=dtype)
    plain, layer = LoRALinear(copy.deepcopy(base), 1, 3.0), DoRALinear(base, 1, 3.0)
    assert layer.lora_A.any()
    assert torch.equal(layer.lora_magnitude_vector, layer.row_norms())
    assert torch.equal(layer(x), plain(x))
    assert not layer.delta_weight().any()


@pytest.mark.parametrize("kind", BASES)
def test_norms_of_more_than_one_slab(kind):
    assert 1 < 577 * 513 / CHUNK < 2
    layer = DoRALinear(BASES[kind](577, 513, bias=False, dtype=torch.float32, seed=0), 2, 3.0)
    x = randn(3, 577, dtype=torch.float32)
    assert torch.equal(layer(x), LoRALinear.forward(layer, x))
    trained(layer)
    weight = dense_weight(layer.base) + 1.5 * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    assert_close(layer.row_norms(), (weight**2).sum(1).sqrt(), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_a_fresh_model_says_the_same(family, dtype):
    model = build(family, dtype)
    ids = torch.arange(21).view(3, 7)
    expected = model(ids)
    apply_lora_(model, LoRAConfig(rank=3, alpha=7.0, use_dora=True))
    assert all(isinstance(layer, DoRALinear) for layer in lora_modules(model).values())
    assert torch.equal(model(ids), expected)
    assert torch.equal(model.train()(ids), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_zeros_stays_zero(bias):
    base = make_linear(5, 4, bias, torch.float64)
    with torch.no_grad():
        base.weight[2] = 0.0
    x = randn(3, 5)
    expected = base(x)
    layer = DoRALinear(base, 2, 3.0)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    with torch.no_grad():
        layer.lora_B.fill_(0.5)
    assert_close(layer(x)[:, 2], expected[:, 2])
    assert not merged_rows(layer, base.weight)[2].any()


# Value and gradients


@pytest.mark.parametrize("kind", BASES)
@given(inputs=sizes, outputs=sizes, batch=batches, bias=st.booleans(), rslora=st.booleans(), data=st.data(), seed=seeds)
def test_equals_dense_autograd(kind, inputs, outputs, batch, bias, rslora, data, seed):
    """In fp64: y = x W'^T + b and the gradients of A, B, m and x, the norm held constant."""
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    alpha = data.draw(st.sampled_from([-2.0, 0.0, 0.5, 3.0, 17.0]).filter(lambda a: a != rank))
    base = BASES[kind](inputs, outputs, bias=bias, dtype=torch.float64, seed=seed)
    layer = trained(DoRALinear(base, rank, alpha, use_rslora=rslora), seed)
    ours = randn(*batch, inputs, seed=seed + 9).requires_grad_()
    x, A, B, m = (t.detach().clone().requires_grad_() for t in (ours, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    merged = formula(dense_weight(base), A, B, m, alpha / (rank**0.5 if rslora else rank))
    expected = x @ merged.T + (base.bias.detach() if bias else 0.0)
    actual = layer(ours)
    assert_close(actual, expected)
    assert_close(merged_rows(layer, dense_weight(base)), merged)
    assert_close(layer.delta_weight(), merged - dense_weight(base))
    upstream = randn(*expected.shape, seed=seed + 10)
    found = torch.autograd.grad(actual, [ours, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector], upstream)
    for a, b in zip(found, torch.autograd.grad(expected, [x, A, B, m], upstream), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_with_the_norm_held(kind, bias, monkeypatch):
    """Finite differences know nothing of a constant norm: it is frozen at its value for them."""
    layer = trained(DoRALinear(BASES[kind](5, 4, bias=bias, dtype=torch.float64, seed=0), 2, 3.0))
    norms = layer.row_norms()
    monkeypatch.setattr(DoRALinear, "row_norms", lambda self: norms)

    def run(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B, "lora_magnitude_vector": m}, x)

    inputs = [randn(2, 3, 5), *(p.detach().clone() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))]
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


def test_an_unfrozen_base_is_trained_too():
    layer = trained(DoRALinear(make_linear(5, 4, True, torch.float64), 2, 3.0))
    layer.base.requires_grad_(True)
    x, upstream = randn(6, 5), randn(6, 4, seed=3)
    layer(x).backward(upstream)
    stretch = (layer.lora_magnitude_vector / layer.row_norms()).detach()
    assert_close(layer.base.weight.grad, (upstream * stretch).T @ x)
    assert_close(layer.base.bias.grad, upstream.sum(0))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_fp64(kind, bias, dtype):
    """Error against fp64 from the same stored numbers: a few roundings of y, and lengths that are fp32."""
    base = BASES[kind](65, 33, bias=bias, dtype=dtype, seed=0)
    layer = trained(DoRALinear(base, 4, 3.0))
    x = randn(9, 65, dtype=dtype)
    m, A, B = (p.detach().double() for p in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B))
    merged = formula(dense_weight(base), A, B, m, 0.75)
    expected = x.double() @ merged.T + (base.bias.detach().double() if bias else 0.0)
    assert layer(x).dtype == dtype
    assert_close(layer(x), expected, 4 * torch.finfo(dtype).eps)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    layer.to(torch.bfloat16)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    assert torch.equal(layer.lora_magnitude_vector, m.float())


def test_what_is_kept_for_backward():
    """Beside what LoRA keeps: one tensor like y, in the dtype of x, and vectors. Never a dense weight."""
    kept: list[Tensor] = []
    layer = trained(DoRALinear(make_linear(64, 48, True, torch.bfloat16), 2, 3.0))
    x = randn(32, 64, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    shared = {x.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}
    large = [(tuple(t.shape), t.dtype) for t in kept if t.data_ptr() not in shared and t.numel() > 48]
    assert sorted(shape for shape, _ in large) == [(32, 2), (32, 48)]
    assert ((32, 48), torch.bfloat16) in large


# A few rows of W'


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding"])
@given(outputs=sizes, inputs=sizes, seed=seeds, data=st.data())
def test_rows_of_the_merged_weight(kind, outputs, inputs, seed, data):
    """Any rows are those of the whole, for any W that is given; plain LoRA's are merged_weight(W, D)."""
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    begin = data.draw(st.integers(0, outputs))
    rows = slice(begin, data.draw(st.integers(begin, outputs)))
    if kind == "embedding":
        layer = LoRAEmbedding(nn.Embedding(outputs, inputs, dtype=torch.float64), rank, 3.0)
    else:
        make = DoRALinear if kind == "dora" else LoRALinear
        layer = make(make_linear(inputs, outputs, False, torch.float64, seed=seed), rank, 3.0)
    with torch.no_grad():
        layer.lora_A.copy_(randn(*layer.lora_A.shape, seed=seed + 1))
        layer.lora_B.copy_(randn(*layer.lora_B.shape, seed=seed + 2))
    other = randn(outputs, inputs, seed=seed + 3)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    if kind == "dora":
        expected = formula(other, A, B, layer.lora_magnitude_vector.detach(), 3.0 / rank)
    else:
        delta = 3.0 / rank * (B @ A)
        expected = other + (delta.T if kind == "embedding" else delta)
        assert_close(merged_rows(layer, other), merged_weight(other, layer.delta_weight()), 0.0)
    assert_close(merged_rows(layer, other[rows], rows), expected[rows])
    assert_close(merged_rows(layer, other), expected)
    assert not merged_rows(layer, other).requires_grad


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_without_an_update_keep_their_bits(dtype):
    weight = randn(6, 5, dtype=dtype)
    weight[1, 2] = -0.0
    for make in (LoRALinear, DoRALinear):
        base = make_linear(5, 6, False, dtype)
        with torch.no_grad():
            base.weight.copy_(weight)
        merged = merged_rows(make(base, 2, 3.0), weight)
        assert merged.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(merged, weight.to(merged.dtype))
        assert math.copysign(1, float(merged[1, 2])) == -1


# Scale


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.25, 2.0])
def test_scale_acts_inside_the_norm(scale):
    layer = trained(DoRALinear(make_linear(7, 5, True, torch.float64), 2, 3.0))
    x, m, A, B = randn(4, 7), *(p.detach() for p in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B))
    expected = x @ formula(dense_weight(layer.base), A, B, m, scale * 1.5).T + layer.base.bias
    scale_adapters_(nn.Sequential(layer), scale)
    assert_close(layer(x), expected)


# A model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_first_step_reaches_everything_and_the_second_learns_lengths(family, quantized):
    """B = 0: its gradient and that of m are not zero, that of A is. Then the loss falls with all three."""
    model = build(FAMILIES[family], torch.float32).requires_grad_(False)
    if quantized:
        quantize_(model, QuantConfig(block_size=32))
    apply_lora_(model, LoRAConfig(rank=2, alpha=4.0, use_dora=True))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trainable} == {"lora_A", "lora_B", "lora_magnitude_vector"}
    ids, losses = torch.arange(20).view(2, 10), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if step == 0:
            check_gradients(model)
            assert all(layer.lora_magnitude_vector.grad.any() for layer in lora_modules(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with adapters_off(model):
        off = model(ids)
    assert (off - model(ids)).abs().max() > 1e-4


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="dropout with use_dora"):
        LoRAConfig(use_dora=True, dropout=0.1)
    with pytest.raises(UserError, match="dropout with use_dora"):
        RunConfig(model="m", data="d", out="o", use_dora=True, dropout=0.1)
    assert RunConfig(model="m", data="d", out="o", use_dora=True).lora.use_dora
    model = build(LLAMA)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match="DoRA is for linear layers") as error:
        apply_lora_(model, LoRAConfig(rank=2, targets=("q_proj", "embed_tokens"), use_dora=True))
    assert error.value.code == "config/dora-embedding"
    assert [name for name, _ in model.named_modules()] == before


def test_mixed_kinds_cannot_be_saved(tmp_path: Path):
    model = nn.Sequential(LoRALinear(nn.Linear(4, 3), 2, 3.0), DoRALinear(nn.Linear(3, 4), 2, 3.0))
    with pytest.raises(UserError, match="use_dora differs between modules"):
        save_adapter(model, tmp_path / "a")


# PEFT


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_and_gradients_equal_peft(bias, rslora):
    peft = pytest.importorskip("peft")
    base = make_linear(6, 5, bias, torch.float64, nn.Linear)
    layer = trained(DoRALinear(copy.deepcopy(base), 3, 7.0, use_rslora=rslora))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_rslora=rslora, use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    theirs.to(torch.float64)
    assert_close(theirs.lora_magnitude_vector["default"].weight, DoRALinear(base, 3, 7.0).lora_magnitude_vector)
    slots = [theirs.lora_A["default"], theirs.lora_B["default"], theirs.lora_magnitude_vector["default"]]
    ours = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    with torch.no_grad():
        for slot, parameter in zip(slots, ours, strict=True):
            slot.weight.copy_(parameter)
            slot.weight.requires_grad_(True)
    x, upstream = randn(4, 6), randn(4, 5, seed=1)
    assert_close(layer(x), theirs(x))
    layer(x).backward(upstream)
    theirs(x).backward(upstream)
    for slot, parameter in zip(slots, ours, strict=True):
        assert_close(parameter.grad, slot.weight.grad)
    theirs.merge(safe_merge=True)
    assert_close(merged_rows(layer, layer.base.weight), theirs.base_layer.weight)


def test_peft_scales_as_we_do():
    peft = pytest.importorskip("peft")
    layer = trained(DoRALinear(make_linear(6, 5, True, torch.float32, nn.Linear), 3, 7.0))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base)), config).base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
        theirs.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude_vector)
    x = randn(4, 6, dtype=torch.float32)
    before = theirs(x)
    theirs.set_scale("default", 0.3)
    scale_adapters_(nn.Sequential(layer), 0.3)
    assert_close(layer(x), theirs(x), 1e-5)
    assert (theirs(x) - before).abs().max() > 1e-2


CONFIGS = {
    "q": LoRAConfig(rank=4, alpha=6.0, targets=("q_proj",), use_dora=True),
    "all": LoRAConfig(rank=4, alpha=6.0, use_rslora=True, use_dora=True),
    "ranks": LoRAConfig(
        rank=4, alpha=8.0, rank_pattern={"v_proj": 2, "1.mlp.up_proj": 7}, alpha_pattern={"q_proj": 3.5}, use_dora=True
    ),
}


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "_proj" in name:  # so large that attention is far from uniform
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 3, 60, 2, 7]])).logits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_folders_are_exchanged_with_peft(name: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    base = logits(model)
    apply_lora_(model, CONFIGS[name])
    for index, layer in enumerate(lora_modules(model).values()):
        trained(layer, index)
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-2
    save_adapter(model, tmp_path / "ours", base_name="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    assert theirs.peft_config["default"].use_dora
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = tiny_llama()
    load_adapter_(again, tmp_path / "theirs")
    assert torch.equal(logits(again), expected)
    save_adapter(again, tmp_path / "again", base_name="tiny")
    for file in ("adapter_config.json", "adapter_model.safetensors", "minisft.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
