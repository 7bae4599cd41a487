"""Adapters: a fresh one changes no bit, and gradients equal plain autograd of the dense W + scaling * B A."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA, QWEN2, assert_close, assert_same, build, gradients, randn
from torch import Tensor, nn

from minisft import lora, lora_fused, matmul
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig
from minisft.dora import DoRALinear
from minisft.lora import LoRAEmbedding, LoRALinear
from minisft.matmul import Linear
from minisft.nf4_linear import NF4Linear
from minisft.surgery import apply_lora_, lora_modules, quantize_

sizes = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33])
batches = st.sampled_from([(), (0,), (1,), (5,), (2, 3), (0, 3), (2, 1, 3)])
seeds = st.integers(0, 2**31)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_linear(
    inputs: int, outputs: int, bias: bool, dtype: torch.dtype, kind: type[nn.Linear] = Linear, seed: int = 0
) -> nn.Linear:
    base = kind(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(base.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + i))
    return base


def make_nf4(inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int = 0, double_quant: bool = True) -> NF4Linear:
    return NF4Linear.from_linear(make_linear(inputs, outputs, bias, dtype, seed=seed), double_quant=double_quant)


def trained(layer: LoRALinear | LoRAEmbedding, seed: int = 5) -> LoRALinear | LoRAEmbedding:
    """Both factors random, as after some training."""
    with torch.no_grad():
        layer.lora_A.copy_(randn(*layer.lora_A.shape, seed=seed))
        layer.lora_B.copy_(randn(*layer.lora_B.shape, seed=seed + 1))
    return layer


def as_laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in memory that is not contiguous."""
    if layout == "transposed" and x.ndim >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x


# A fresh adapter


@pytest.mark.parametrize("kind", [nn.Linear, Linear])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(inputs=sizes | st.sampled_from([576, 1536]), outputs=sizes | st.just(257), batch=batches, bias=st.booleans(), seed=seeds)
def test_zero_b_changes_no_bit(kind, dtype, inputs, outputs, batch, bias, seed):
    base = make_linear(inputs, outputs, bias, dtype, kind, seed)
    x = randn(*batch, inputs, seed=seed + 9, dtype=dtype)
    if kind is Linear or matmul.compute_dtype(x) == dtype:
        expected = base(x)
    else:  # somebody else's layer would multiply in bf16 here; the adapter widens the operands
        with mock.patch.object(matmul, "can_use_native", return_value=False):
            expected = matmul.linear(x, base.weight, base.bias)
    layer = LoRALinear(base, 1, 3.0)
    assert layer.lora_A.any()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_fresh_adapters_leave_a_model_as_it_was(config, dtype):
    model = build(config, dtype)
    ids = torch.arange(21).view(3, 7)
    expected = model(ids)
    apply_lora_(model, LoRAConfig(rank=3, alpha=7.0))
    assert torch.equal(model(ids), expected)
    assert torch.equal(model.train()(ids), expected)


@given(inputs=st.integers(1, 300), outputs=sizes, rank=st.integers(1, 4))
def test_start_is_kaiming_uniform(inputs, outputs, rank):
    rank = min(rank, inputs, outputs)
    layer = LoRALinear(Linear(inputs, outputs), rank, 3.0)
    assert layer.lora_A.shape == (rank, inputs)
    assert layer.lora_B.shape == (outputs, rank)
    assert not layer.lora_B.any()
    largest = float(layer.lora_A.detach().abs().max()) * math.sqrt(inputs)
    assert largest <= 1.0
    if inputs * rank >= 100:
        assert largest > 0.9


# Gradients


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@given(inputs=sizes, outputs=sizes, batch=batches, bias=st.booleans(), rslora=st.booleans(), data=st.data(), seed=seeds)
def test_equals_dense_autograd(layout, inputs, outputs, batch, bias, rslora, data, seed):
    """Value and gradients of A, B and x in fp64 against y = x (W + s B A)^T + b by plain autograd."""
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    alpha = data.draw(st.sampled_from([-2.0, 0.0, 0.5, 3.0, 17.0]).filter(lambda a: a != rank))
    base = make_linear(inputs, outputs, bias, torch.float64, seed=seed)
    layer = trained(LoRALinear(base, rank, alpha, use_rslora=rslora), seed)
    x = randn(*batch, inputs, seed=seed + 9)
    ours = as_laid_out(x, layout).requires_grad_()
    theirs = x.clone().requires_grad_()
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora_A, layer.lora_B))
    scaling = alpha / (rank**0.5 if rslora else rank)
    expected = theirs @ (base.weight + scaling * (B @ A)).T + (base.bias if bias else 0.0)
    actual = layer(ours)
    assert_close(actual, expected)
    upstream = as_laid_out(randn(*expected.shape, seed=seed + 10), layout)
    found = torch.autograd.grad(actual, [ours, layer.lora_A, layer.lora_B], upstream)
    wanted = torch.autograd.grad(expected, [theirs, A, B], upstream)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(dropout, bias):
    layer = LoRALinear(make_linear(3, 4, bias, torch.float64), 2, 3.0, dropout)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask at every evaluation
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, x)

    inputs = [randn(2, 3, 3), randn(2, 3, seed=1), randn(4, 2, seed=2)]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_base_gets_no_gradient(dropout):
    base = make_linear(5, 4, True, torch.float32)
    layer = trained(LoRALinear(base, 2, 3.0, dropout))
    x = randn(6, 5, dtype=torch.float32).requires_grad_()
    layer(x).square().sum().backward()
    assert base.weight.grad is None
    assert base.bias.grad is None
    assert not base.weight.requires_grad
    assert all(t.grad is not None and t.grad.any() for t in (x, layer.lora_A, layer.lora_B))


def test_only_what_is_asked_for_is_computed():
    """The first layer's input needs no gradient, nor does a factor that somebody froze."""
    layer = trained(LoRALinear(make_linear(5, 4, False, torch.float64), 2, 3.0))
    layer.lora_A.requires_grad_(False)
    y = layer(randn(3, 5)).sum()
    with mock.patch.object(lora_fused, "_of_factors", wraps=lora_fused._of_factors) as computed:
        y.backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is not None
    grad_A, grad_B = lora_fused._of_factors(*computed.call_args.args)
    assert grad_A is None
    assert grad_B is not None


def test_an_unfrozen_base_is_trained_too():
    layer = trained(LoRALinear(make_linear(5, 4, True, torch.float64), 2, 3.0))
    layer.base.requires_grad_(True)
    x, upstream = randn(6, 5), randn(6, 4, seed=3)
    layer(x).backward(upstream)
    assert_close(layer.base.weight.grad, upstream.T @ x)
    assert_close(layer.base.bias.grad, upstream.sum(0))
    assert_close(layer.lora_B.grad, layer.scaling * upstream.T @ (x @ layer.lora_A.T))


# Several layers of one x


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj", "up_proj")], ids=["all", "some"])
@pytest.mark.parametrize("in_4_bits", [False, True])
def test_layers_of_one_x_have_one_backward(in_4_bits, targets):
    """q, k and v, and gate and up: the gradients are those that each has by itself, which a hook on it brings about."""
    found, calls = [], {}
    for watched in (False, True):
        model = build(LLAMA)
        if in_4_bits:
            quantize_(model, QuantConfig())
        apply_lora_(model, LoRAConfig(rank=2, alpha=3.0, targets=targets))
        for layer in map(trained, lora_modules(model).values()):
            if watched:
                layer.register_forward_hook(lambda *_: None)
        with mock.patch.object(lora, "adapted_linears", wraps=lora.adapted_linears) as called:
            logits = model(torch.arange(12).view(2, 6))
        calls[watched] = [len(layers) for _, layers in (call.args for call in called.call_args_list)]
        logits.square().sum().backward()
        found.append((logits.detach(), gradients(model)))
    together, alone = ([3, 1, 2, 1], 7) if targets == "all-linear" else ([2, 1], 3)
    assert calls == {False: LLAMA.num_layers * together, True: LLAMA.num_layers * alone * [1]}
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


NOTICED = ("hook before", "hook after", "hook of backward", "hook before backward", "hook of all", "own forward", "off")
NOTICED += ("dropout", "no_grad", "DoRA", "base in training")


@pytest.mark.parametrize("what", NOTICED)
def test_a_layer_is_called_where_somebody_would_notice(what):
    base, dropout = make_linear(5, 4, False, torch.float32), 0.5 if what == "dropout" else 0.0
    layer = DoRALinear(base, 2, 3.0) if what == "DoRA" else LoRALinear(base, 2, 3.0, dropout)
    if what not in ("DoRA", "dropout"):
        assert layer.together is not None
    registers = {
        "hook before": layer.register_forward_pre_hook,
        "hook after": layer.register_forward_hook,
        "hook of backward": layer.register_full_backward_hook,
        "hook before backward": layer.register_full_backward_pre_hook,
        "hook of all": nn.modules.module.register_module_forward_hook,
    }
    handle = registers[what](lambda *_: None) if what in registers else None
    if what == "own forward":
        layer.forward = layer.forward
    elif what == "off":
        layer.enabled = False
    elif what == "base in training":
        layer.base.requires_grad_(True)
    with torch.set_grad_enabled(what != "no_grad"):
        together = layer.together
    if handle is not None:
        handle.remove()
    assert together is None


# Dropout


@given(seed=seeds, probability=st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_is_off_in_eval(seed, probability):
    base = make_linear(7, 5, True, torch.float64)
    with_dropout, without = (trained(LoRALinear(base, 2, 3.0, p)) for p in (probability, 0.0))
    x = randn(4, 7, seed=seed)
    assert_close(with_dropout.eval()(x), without(x))


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_dropout_hides_inputs_from_the_update_alone(probability):
    """With x = e_i the output is base + s (B A)_i / (1 - p) or base alone, in the right proportion."""
    layer = trained(LoRALinear(make_linear(4, 3, False, torch.float64), 2, 3.0, probability)).train()
    draws = 4000
    x = torch.eye(4, dtype=torch.float64).repeat(draws, 1)
    torch.manual_seed(0)
    update = (layer(x) - layer.base(x)).detach().view(draws, 4, 3)
    full = 1.5 * (layer.lora_B @ layer.lora_A).T.detach() / (1 - probability)  # (4, 3)
    kept = (update - full).abs().amax(-1) < 1e-9
    dropped = update.abs().amax(-1) < 1e-9
    assert bool((kept ^ dropped).all())
    share = float(kept.double().mean())
    assert abs(share - (1 - probability)) < 5 * math.sqrt(probability * (1 - probability) / (4 * draws))


# Masters and memory


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_masters_stay_fp32(narrow):
    """Adapters keep all their bits whether they are added before or after the model is narrowed, and train in fp32."""
    for model in (
        nn.Sequential(LoRALinear(Linear(6, 5), 2, 3.0)),
        nn.Sequential(LoRALinear(Linear(6, 5, dtype=narrow), 2, 3.0)),
    ):
        layer = trained(model[0])
        before = layer.lora_A.detach().clone()
        identity = layer.lora_A
        model.to(narrow)
        assert layer.base.weight.dtype == narrow
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert layer.lora_A is identity
        assert torch.equal(layer.lora_A, before)
        y = model(randn(3, 6, dtype=narrow))
        assert y.dtype == narrow
        y.sum().backward()
        assert layer.lora_A.grad.dtype == torch.float32
    model.double()
    assert layer.lora_A.dtype == torch.float64


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_masters_are_fp32_at_least(kind):
    for dtype, master in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        layer = (
            LoRALinear(Linear(4, 3, dtype=dtype), 2, 3.0)
            if kind == "linear"
            else LoRAEmbedding(nn.Embedding(4, 3, dtype=dtype), 2, 3.0)
        )
        assert layer.lora_A.dtype == layer.lora_B.dtype == master


@pytest.mark.parametrize("fast_bf16", [False, True])
def test_bf16_base_stays_close_to_fp64(fast_bf16):
    layer = trained(LoRALinear(make_linear(33, 17, True, torch.bfloat16), 4, 3.0))
    exact = trained(LoRALinear(make_linear(33, 17, True, torch.float64), 4, 3.0))
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = randn(6, 33, dtype=torch.bfloat16)
    results = []
    for module, inputs in ((layer, x), (exact, x.double())):
        inputs = inputs.clone().requires_grad_()
        with mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=fast_bf16):
            y = module(inputs)
            y.backward(randn(6, 17, seed=4, dtype=torch.bfloat16).to(y.dtype))
        results.append([y, inputs.grad, module.lora_A.grad, module.lora_B.grad])
    assert [t.dtype for t in results[0]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_keeps_its_input_and_nothing_large(bias, dtype):
    """Saved: x itself (not a copy), x A^T, the factors. Never y, the dense weight or a widened x."""
    kept: list[Tensor] = []
    layer = trained(LoRALinear(make_linear(64, 48, bias, dtype), 2, 3.0))
    x = randn(32, 64, dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    shared = {x.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}
    assert x.data_ptr() in {t.data_ptr() for t in kept}
    assert [t.shape for t in kept if t.data_ptr() not in shared] == [(32, 2)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("inputs", [17, 32])  # 32: a width that our own code takes
def test_bits_do_not_depend_on_no_grad_mode(inputs, dropout, in_4_bits, dtype):
    base = (make_nf4 if in_4_bits else make_linear)(inputs, 9, True, dtype)
    layer = trained(LoRALinear(base, rank=2, alpha=3.0, dropout=dropout)).eval()
    x = randn(2, 3, inputs, dtype=dtype)
    with torch.no_grad():
        quick, quick_base = layer(x), base(x)
    assert torch.equal(quick, layer(x))
    assert torch.equal(quick_base, base(x))


def test_nothing_is_written_in_forward():
    layer = trained(LoRALinear(make_linear(5, 4, True, torch.float64), 2, 3.0))
    x = randn(3, 5)
    before = [t.clone() for t in (x, *layer.state_dict().values())]
    layer.train()(x)
    layer.eval()(x)
    for a, b in zip((x, *layer.state_dict().values()), before, strict=True):
        assert torch.equal(a, b)


# Scaling, rank, delta weight


@given(rank=st.integers(1, 8), alpha=st.floats(-50, 50), rslora=st.booleans())
def test_delta_weight(rank, alpha, rslora):
    layer = trained(LoRALinear(make_linear(9, 8, False, torch.float64), rank, alpha, use_rslora=rslora))
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    divisor = math.sqrt(rank) if rslora else rank
    expected = sum(torch.outer(B[:, r], A[r]) for r in range(rank)) * alpha / divisor
    assert_close(layer.delta_weight(), expected)
    assert not layer.delta_weight().requires_grad
    x = randn(3, 9)
    assert_close(layer(x), x @ (layer.base.weight + layer.delta_weight()).T)
    assert f"rank={rank}" in repr(layer)


@pytest.mark.parametrize("rank", [0, -1, 5])
@pytest.mark.parametrize("base", [Linear(4, 9), Linear(9, 4), nn.Embedding(4, 9), nn.Embedding(9, 4)], ids=repr)
def test_rank_that_does_not_fit(base, rank):
    with pytest.raises(UserError, match=f"found rank {rank}; expected 1 to 4 for a weight of shape . x .") as error:
        (LoRALinear if isinstance(base, nn.Linear) else LoRAEmbedding)(base, rank, 3.0)
    assert error.value.code == "config/bad-rank"


# Embeddings


@given(ids=st.lists(st.integers(0, 8), max_size=7), rank=st.integers(1, 5), rslora=st.booleans(), seed=seeds)
def test_embedding_equals_dense_autograd(ids, rank, rslora, seed):
    base = nn.Embedding(9, 5, dtype=torch.float64)
    layer = trained(LoRAEmbedding(base, rank, 7.0, use_rslora=rslora), seed)
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora_A, layer.lora_B))
    scaling = 7.0 / (rank**0.5 if rslora else rank)
    index = torch.tensor(ids, dtype=torch.int64)
    expected = (base.weight + scaling * (B @ A).T)[index]
    actual = layer(index)
    assert_close(actual, expected)
    assert_close((base.weight + layer.delta_weight())[index], expected)
    upstream = randn(*expected.shape, seed=seed + 1)
    found = torch.autograd.grad(actual, [layer.lora_A, layer.lora_B], upstream)
    for a, b in zip(found, torch.autograd.grad(expected, [A, B], upstream), strict=True):
        assert_close(a, b)
    assert base.weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fresh_embedding_changes_no_bit(dtype):
    base = nn.Embedding(9, 5, dtype=dtype)
    layer = LoRAEmbedding(base, 2, 3.0)
    ids = torch.tensor([[0, 8], [3, 3]])
    assert layer.lora_B.any()
    assert torch.equal(layer(ids), base(ids))
    layer.enabled = False
    assert torch.equal(trained(layer)(ids), base(ids))


@pytest.mark.parametrize("base", [Linear(6, 5), Linear(6, 5, bias=False), nn.Embedding(6, 5)], ids=repr)
def test_layer_equals_peft(base):
    """Same factors, same output: PEFT's layer is the oracle, embeddings and rsLoRA included."""
    peft = pytest.importorskip("peft")
    for rslora in (False, True):
        layer = trained((LoRALinear if isinstance(base, nn.Linear) else LoRAEmbedding)(base, 3, 7.0, use_rslora=rslora))
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_rslora=rslora)
        theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
        prefix = "lora_embedding_" if isinstance(base, nn.Embedding) else "lora_"
        with torch.no_grad():
            for name, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                slot = getattr(theirs, prefix + name)["default"]
                (slot if isinstance(slot, nn.Parameter) else slot.weight).copy_(factor)
        x = torch.tensor([[0, 5], [2, 2]]) if isinstance(base, nn.Embedding) else randn(4, 6, dtype=torch.float32)
        assert_close(layer(x), theirs(x), 1e-5)


# Over a base in 4 bits


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(inputs=sizes | st.sampled_from([576]), outputs=sizes | st.just(257), batch=batches, bias=st.booleans(), seed=seeds)
def test_zero_b_changes_no_bit_of_a_quantized_layer(dtype, inputs, outputs, batch, bias, seed):
    base = make_nf4(inputs, outputs, bias, dtype, seed)
    x = randn(*batch, inputs, seed=seed + 9, dtype=dtype)
    expected = base(x)
    layer = LoRALinear(base, 1, 3.0)
    assert layer.lora_A.any()
    assert torch.equal(layer(x), expected)
    assert layer.lora_A.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dropout", [False, True], ids=["fused", "with-dropout"])
@given(inputs=sizes, outputs=sizes, batch=batches, bias=st.booleans(), double_quant=st.booleans(), data=st.data(), seed=seeds)
def test_over_4_bits_equals_dense_autograd(dropout, inputs, outputs, batch, bias, double_quant, data, seed):
    """Value and gradients in fp64 against y = x (dequantized W + s B A)^T + b by plain autograd."""
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    base = make_nf4(inputs, outputs, bias, torch.float64, seed, double_quant)
    layer = trained(LoRALinear(base, rank, 3.5, 1e-300 if dropout else 0.0), seed)  # a chance that never comes
    ours = randn(*batch, inputs, seed=seed + 9).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    A, B = (f.detach().clone().requires_grad_() for f in (layer.lora_A, layer.lora_B))
    weight = base.dequantized_weight(torch.float64)
    expected = theirs @ (weight + 3.5 / rank * (B @ A)).T + (base.bias.detach() if bias else 0.0)
    actual = layer(ours)
    assert_close(actual, expected)
    upstream = randn(*expected.shape, seed=seed + 10)
    found = torch.autograd.grad(actual, [ours, layer.lora_A, layer.lora_B], upstream)
    for a, b in zip(found, torch.autograd.grad(expected, [theirs, A, B], upstream), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_over_4_bits(bias):
    layer = LoRALinear(make_nf4(5, 4, bias, torch.float64), 2, 3.0)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, x)

    inputs = [randn(2, 3, 5), randn(2, 5, seed=1), randn(4, 2, seed=2)]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_dense_is_kept_over_4_bits(bias, dtype):
    """Saved: x, x A^T, the factors. No dequantized weight, in whichever dtype."""
    kept: list[Tensor] = []
    layer = trained(LoRALinear(make_nf4(64, 48, bias, dtype), 2, 3.0))
    x = randn(32, 64, dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    shared = {x.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}
    assert [t.shape for t in kept if t.data_ptr() not in shared] == [(32, 2)]
    y.sum().backward()
    assert layer.base.bias is None or layer.base.bias.grad is None
    assert all(t.grad is not None and t.grad.any() for t in (x, layer.lora_A, layer.lora_B))


def test_an_unfrozen_bias_of_a_quantized_layer_is_trained_too():
    layer = trained(LoRALinear(make_nf4(5, 4, True, torch.float64), 2, 3.0))
    layer.base.requires_grad_(True)
    x, upstream = randn(6, 5), randn(6, 4, seed=3)
    layer(x).backward(upstream)
    assert_close(layer.base.bias.grad, upstream.sum(0))
    assert_close(layer.lora_B.grad, layer.scaling * upstream.T @ (x @ layer.lora_A.T))


@pytest.mark.parametrize("fast_bf16", [False, True])
def test_bf16_over_4_bits_stays_close_to_fp64(fast_bf16):
    layer = trained(LoRALinear(make_nf4(33, 17, True, torch.bfloat16), 4, 3.0))
    x, upstream = randn(6, 33, dtype=torch.bfloat16), randn(6, 17, seed=4, dtype=torch.bfloat16)
    results = []
    with mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=fast_bf16):
        for dtype in (torch.bfloat16, torch.float64):
            inputs = x.to(dtype).clone().requires_grad_()
            layer.zero_grad()
            y = layer(inputs)
            y.backward(upstream.to(dtype))
            results.append([y, inputs.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
            layer.double()
    assert [t.dtype for t in results[0]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 0.02)


def test_a_trained_part_inside_the_base_gets_its_gradient() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.scale

    layer = LoRALinear(make_linear(8, 4, False, torch.float64), 2, 3.0)
    weight, scale = layer.base.weight.detach().clone(), Scale()
    nn.utils.parametrize.register_parametrization(layer.base, "weight", scale)
    x = randn(3, 8, seed=1)
    layer(x).sum().backward()  # d sum(s x W^T) / d s; the fresh adapter adds nothing
    assert_close(scale.scale.grad, (x @ weight.T).sum())
