"""Adapters and 4 bits: what is asked for is replaced, nothing else, and a request that matches nothing says what there is."""

import copy
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, LLAMA, LLAMA3_ROPE, assert_close, build, build_with_lora, shared_with_lora
from torch import nn

from minisft.common.errors import UserError
from minisft.common.seeds import derive_seed, generator
from minisft.config import LoRAConfig, QuantConfig
from minisft.lora import LoRAEmbedding, LoRALinear
from minisft.nf4 import codebook, dequantize, quantize
from minisft.nf4_linear import NF4Linear
from minisft.surgery import (
    adapters_off,
    apply_lora_,
    freeze,
    lora_modules,
    match_targets,
    matches,
    nf4_modules,
    num_parameters,
    output_head,
    pattern_value,
    quantization_of,
    quantize_,
    replace_module,
    scale_adapters_,
    weight_bytes,
)

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
ALL_LINEARS = [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS]


class Stranger(nn.Module):
    """Somebody else's tree: no head, a linear at the top, an embedding, things that are no linears."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.LayerNorm(5))
        self.out = nn.Linear(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.tokens(ids)))


# Which layers


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL_LINEARS),
        (("q_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (("v_proj", "q_proj"), [p for p in ALL_LINEARS if p.endswith(("q_proj", "v_proj"))]),  # in the model's order
        (("mlp.up_proj", "layers.1.mlp.up_proj"), [p for p in ALL_LINEARS if p.endswith("up_proj")]),
        (("model.layers.1.mlp.down_proj",), ["model.layers.1.mlp.down_proj"]),
        (("lm_head", "embed_tokens"), ["model.embed_tokens", "lm_head"]),
        (r".*\.1\.self_attn\.[qk]_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        (r"lm_head|.*gate_proj", [*(p for p in ALL_LINEARS if "gate" in p), "lm_head"]),
    ],
)
def test_targets(targets, expected):
    assert match_targets(build(LLAMA3_ROPE), targets) == expected
    model = build(LLAMA3_ROPE)
    assert apply_lora_(model, LoRAConfig(rank=2, alpha=3.0, targets=targets)) == expected
    assert list(lora_modules(model)) == expected
    for path, module in model.named_modules():
        assert isinstance(module, (LoRALinear, LoRAEmbedding)) is (path in expected)


@pytest.mark.parametrize(
    "targets", [("proj",), ("_proj", "q_proj"), r"q_proj", r"model\.layers\.0", ("layers.0",), ("norm",), ("",), "all_linear"]
)
def test_a_target_that_matches_nothing_lists_what_there_is(targets):
    """Parts of names, paths of containers, norms, a pattern that covers only a part of the path: none of them is a layer."""
    model = build(LLAMA)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UserError) as error:
        apply_lora_(model, LoRAConfig(rank=2, alpha=3.0, targets=targets))
    assert error.value.code == "config/no-such-target"
    listed = "expected one of embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    assert listed in str(error.value)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_partial_match_is_an_error_and_names_the_nearest():
    model = build(LLAMA)
    with pytest.raises(UserError, match=r"found 'v_porj'.*did you mean 'v_proj'\?"):
        apply_lora_(model, LoRAConfig(rank=2, targets=("q_proj", "v_porj")))
    assert not lora_modules(model)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "no regular expression: \\(; found"), ("a" * 1001, "found 1001 characters; expected at most 1000")],
)
def test_bad_patterns(pattern, message):
    with pytest.raises(UserError, match=message) as error:
        match_targets(build(LLAMA), pattern)
    assert error.value.code == "config/bad-pattern"


def test_bad_exception_pattern():
    with pytest.raises(UserError, match=r"no regular expression.*found"):
        apply_lora_(build(LLAMA), LoRAConfig(rank=2, rank_pattern={"q_proj(": 3}))


@given(st.text(alphabet="ab.", max_size=8), st.text(alphabet="ab.", max_size=8))
def test_matches_compares_whole_parts(path, name):
    parts, wanted = path.split("."), name.split(".")
    assert matches(path, name) is (parts[-len(wanted) :] == wanted)


def test_any_tree_with_linears():
    model = Stranger()
    ids = torch.tensor([[1, 2, 6]])
    expected = model(ids)
    assert apply_lora_(model, LoRAConfig(rank=2, alpha=3.0)) == ["body.0", "body.2", "out"]
    assert torch.equal(model(ids), expected)
    model = Stranger()
    assert apply_lora_(model, LoRAConfig(rank=2, targets=("tokens", "out"))) == ["tokens", "out"]
    with pytest.raises(UserError, match="expected one of none"):
        apply_lora_(nn.Sequential(nn.ReLU()), LoRAConfig())


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_model(tied):
    """The head is left out by identity, also when it is tied, and training it gives every adapter a gradient."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    assert apply_lora_(model, LoRAConfig(rank=2, alpha=3.0)) == ALL_LINEARS
    assert torch.equal(model(ids).logits, before)
    for layer in lora_modules(model).values():
        nn.init.normal_(layer.lora_B)
    model(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{path}.lora_{factor}" for path in ALL_LINEARS for factor in "AB"
    }


def test_the_head_is_known_by_identity():
    """A linear that merely looks like a head is none, and a head under another name is one."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head_like = nn.Linear(4, 4)
            self.classifier = nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.classifier

    model = Odd()
    assert output_head(model) is model.classifier
    assert match_targets(model, "all-linear") == ["lm_head_like"]
    assert output_head(nn.Linear(2, 2)) is None


# What is trained


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trained(family):
    model = build(FAMILIES[family], torch.float32)
    whole = num_parameters(model)
    assert num_parameters(model, trainable=True) == whole
    paths = apply_lora_(model, LoRAConfig(rank=3, alpha=4.0))
    assert paths == ALL_LINEARS
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.lora_{factor}" for path in paths for factor in "AB"}
    expected = sum(3 * sum(layer.base.weight.shape) for layer in lora_modules(model).values())
    assert num_parameters(model, trainable=True) == expected
    assert num_parameters(model) == whole + expected
    freeze(model)
    assert num_parameters(model, trainable=True) == 0


def test_rank_and_alpha_patterns():
    config = LoRAConfig(
        rank=2,
        alpha=3.0,
        rank_pattern={"q_proj": 4, r"layers\.1\.mlp\..*": 1, "proj": 9},
        alpha_pattern={"model.layers.0.self_attn.k_proj": 10.0, r".*\.v_proj": -1.0},
    )
    model = build(LLAMA)
    apply_lora_(model, config)
    for path, layer in lora_modules(model).items():
        rank = 4 if path.endswith("q_proj") else 1 if ".1.mlp." in path else 2
        alpha = 10.0 if path == "model.layers.0.self_attn.k_proj" else -1.0 if path.endswith("v_proj") else 3.0
        assert (layer.rank, layer.alpha) == (rank, alpha)
        assert layer.scaling == alpha / rank
        assert layer.lora_A.shape[0] == rank
    assert pattern_value("a.b", {"x": 1, "b": 2, "a.b": 3}, 0) == 2  # the first that matches
    assert pattern_value("a.bb", {"b": 2}, 0) == 0


def test_dropout_rslora_and_mode_carry_over():
    for training in (True, False):
        model = build(LLAMA).train(training)
        apply_lora_(model, LoRAConfig(rank=4, alpha=6.0, dropout=0.25, use_rslora=True))
        for layer in lora_modules(model).values():
            assert layer.scaling == 3.0
            assert layer.dropout.p == 0.25
            assert layer.training is layer.dropout.training is training


def test_nothing_is_placed_when_one_rank_does_not_fit():
    model = build(LLAMA)
    with pytest.raises(UserError) as error:
        apply_lora_(model, LoRAConfig(rank=2, rank_pattern={"layers.1.mlp.down_proj": 13}))
    assert error.value.code == "config/bad-rank"
    assert not lora_modules(model)
    assert all(p.requires_grad for p in model.parameters() if p.ndim == 1)


def test_applying_twice_is_an_error_and_changes_nothing():
    model = build(LLAMA)
    apply_lora_(model, LoRAConfig(rank=2, targets=("q_proj",)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"error\[adapter/already-there\].*q_proj.*fix: load the base model again"):
        apply_lora_(model, LoRAConfig(rank=2, targets=("v_proj",)))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Seeds


def factors(seed: int, targets: str | tuple[str, ...] = "all-linear") -> dict[str, torch.Tensor]:
    model = build(LLAMA)
    apply_lora_(model, LoRAConfig(rank=2, targets=targets), seed)
    return {path: layer.lora_A.detach() for path, layer in lora_modules(model).items()}


def test_same_seed_same_start():
    torch.manual_seed(1)
    first = factors(5)
    torch.manual_seed(2)
    torch.randn(100)
    again, other = factors(5), factors(6)
    assert all(torch.equal(first[path], again[path]) for path in ALL_LINEARS)
    assert not any(torch.equal(first[path], other[path]) for path in ALL_LINEARS)
    assert len({tuple(a.flatten().tolist()) for a in first.values()}) == len(ALL_LINEARS)  # no two layers start alike


@given(st.integers(), st.text(alphabet="abc-", min_size=1), st.lists(st.integers(0, 9), max_size=3))
def test_seeds_depend_on_every_part(seed, purpose, indices):
    value = derive_seed(seed, purpose, *indices)
    assert 0 <= value < 2**63
    assert value == derive_seed(seed, purpose, *indices)
    others = [
        (seed + 1, purpose, *indices),
        (seed, purpose + "x", *indices),
        (seed, purpose, *indices, 0),
        (seed, purpose, 10, *indices),
    ]
    assert value not in {derive_seed(*other) for other in others}
    one, two = (torch.rand(3, generator=generator(seed, purpose, *indices)) for _ in range(2))
    assert torch.equal(one, two)


# Switching off


def test_adapters_off_is_the_base_and_comes_back():
    model, base = shared_with_lora(LLAMA), build(LLAMA)
    ids = torch.arange(10)[None]
    adapted = model(ids)
    with adapters_off(model):
        assert torch.equal(model(ids), base(ids))
        with adapters_off(model):
            assert torch.equal(model(ids), base(ids))
        assert torch.equal(model(ids), base(ids))  # the inner block restores what it found: off
    assert torch.equal(model(ids), adapted)
    assert not torch.allclose(adapted, base(ids))


def test_adapters_come_back_after_an_exception():
    model = shared_with_lora(LLAMA)
    ids = torch.arange(10)[None]
    adapted = model(ids)
    with pytest.raises(KeyboardInterrupt), adapters_off(model):
        raise KeyboardInterrupt
    assert torch.equal(model(ids), adapted)
    one = next(iter(lora_modules(model).values()))
    one.enabled = False  # somebody's own choice survives too
    with adapters_off(model):
        pass
    assert not one.enabled
    one.enabled = True


@given(power=st.integers(-8, 8), sign=st.sampled_from([-1.0, 1.0]))
def test_a_scale_that_is_a_power_of_two_is_exact(power, sign):
    """Of the update, to the last bit; and the scaling that a file would carry is the same."""
    scale = sign * 2.0**power
    model = build_with_lora(LLAMA, LoRAConfig(rank=3, alpha=7.0, use_rslora=True), torch.float32)
    before = {path: (layer.delta_weight(), layer.alpha) for path, layer in lora_modules(model).items()}
    scale_adapters_(model, scale)
    for path, layer in lora_modules(model).items():
        delta, alpha = before[path]
        assert torch.equal(layer.delta_weight(), delta * scale)
        assert layer.alpha == alpha * scale
        assert layer.scaling == layer.alpha / 3**0.5


def test_the_scale_dial_goes_from_the_base_to_the_adapted_model():
    model = build_with_lora(LLAMA, LoRAConfig(rank=2, alpha=3.0))
    ids = torch.arange(14).view(2, 7)
    with adapters_off(model):
        base = model(ids)
    adapted = model(ids)
    scale_adapters_(model, 1.0)
    assert torch.equal(model(ids), adapted)
    scale_adapters_(model, 0.0)
    assert torch.equal(model(ids), base)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_out_of_range_changes_nothing(scale):
    model = build_with_lora(LLAMA, LoRAConfig(rank=2, alpha=3.0))
    with pytest.raises(UserError, match="a setting is out of range: scale"):
        scale_adapters_(model, scale)
    assert {layer.scaling for layer in lora_modules(model).values()} == {1.5}
    with pytest.raises(UserError, match="no adapters to scale"):
        scale_adapters_(build(LLAMA), 0.5)


def test_replace_module():
    model = Stranger()
    replace_module(model, "body.2", nn.Identity())
    replace_module(model, "out", nn.Identity())
    assert isinstance(model.body[2], nn.Identity)
    assert isinstance(model.out, nn.Identity)
    assert isinstance(model.body[0], nn.Linear)


def test_a_copy_has_adapters_of_its_own():
    model = shared_with_lora(LLAMA)
    twin = copy.deepcopy(model)
    ids = torch.arange(6)[None]
    assert_close(twin(ids), model(ids))
    with adapters_off(twin):
        assert not torch.allclose(twin(ids), model(ids))


def test_a_rank_that_does_not_fit_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(UserError, match=r"config/bad-rank.*: 1;"):
        apply_lora_(model, LoRAConfig(rank=4, alpha=1.0))
    assert all(p.requires_grad for p in model.parameters())
    assert not lora_modules(model)


# In 4 bits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name].nan_to_num(7.0), before[name].nan_to_num(7.0)) for name in before)
    assert not nf4_modules(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config", [QuantConfig(), QuantConfig("fp4", 32, double_quant=False), QuantConfig("int4", 128)], ids=["nf4", "fp4", "int4"]
)
def test_quantized_weights_are_those_of_the_reference(family, config):
    model, dense = build(FAMILIES[family], torch.float32), build(FAMILIES[family], torch.float32)
    parameters = num_parameters(model)
    assert quantize_(model, config) == ALL_LINEARS
    assert list(nf4_modules(model)) == ALL_LINEARS
    assert num_parameters(model) == parameters
    for path, layer in nf4_modules(model).items():
        linear = dense.get_submodule(path)
        expected = dequantize(quantize(linear.weight, config.block_size, config.double_quant, config.levels))
        assert torch.equal(layer.dequantized_weight(), expected)
        assert (layer.bias is None) is (linear.bias is None)
        assert linear.bias is None or torch.equal(layer.bias, linear.bias)
        with torch.no_grad():
            linear.weight.copy_(expected)
    ids = torch.arange(12).view(2, 6)
    assert_close(model(ids), dense(ids), 1e-5)
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)


def test_only_the_named_linears_and_the_head_if_it_is_asked_for():
    model = build(LLAMA3_ROPE)  # whose head is not tied
    assert quantize_(model, QuantConfig(targets=("lm_head", "1.mlp.up_proj"))) == ["model.layers.1.mlp.up_proj", "lm_head"]
    assert quantize_(model, QuantConfig(targets=r".*q_proj")) == [p for p in ALL_LINEARS if p.endswith("q_proj")]
    assert len(nf4_modules(model)) == 4


def test_mode_and_bias_carry_over():
    for training in (True, False):
        model = nn.Sequential(nn.Linear(8, 4)).train(training)
        bias = model[0].bias
        quantize_(model, QuantConfig())
        assert model[0].training is training
        assert model[0].bias is bias
        assert [name for name, _ in model.named_parameters()] == ["0.bias"]


def test_a_dense_weight_is_let_go_before_the_next_is_quantized(monkeypatch):
    model = nn.Sequential(*(nn.Linear(70, 70) for _ in range(5)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []

    def watched(*arguments, **options):
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(*arguments, **options)

    monkeypatch.setattr("minisft.kernels.cpu_nf4.quantize", watched)
    quantize_(model, QuantConfig())
    assert alive == [5, 4, 3, 2, 1]
    assert not any(weight() is not None for weight in weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_number_that_cannot_be_quantized_is_named_and_nothing_is_replaced(bad, dtype):
    model = build(LLAMA, dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.tensor(bad, dtype=torch.float64).to(dtype)
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 3e38 if dtype != torch.float64 else 1.0  # large, but a number
    before = state(model)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight\[3, 5\]; found .*, the first of 1 such") as error:
        quantize_(model, QuantConfig())
    assert error.value.code == "model/non-finite-weight"
    assert_untouched(model, before)


def test_scales_too_large_for_their_mean_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(64, 4, bias=False))
    nn.init.constant_(model[1].weight, 3e38)
    before = state(model)
    with pytest.raises(UserError) as error:
        quantize_(model, QuantConfig())
    assert error.value.code == "model/weights-too-large"
    assert_untouched(model, before)
    assert quantize_(model, QuantConfig(double_quant=False)) == ["0", "1"]


@pytest.mark.parametrize(
    ("targets", "code", "said"),
    [
        (("embed_tokens",), "model/not-quantizable", "an embedding is looked up, not multiplied.*: model.embed_tokens;"),
        (r".*", "model/not-quantizable", "embedding"),
        (("lm_head",), "model/not-quantizable", "lm_head; found tied to model.embed_tokens.weight; .*fix: leave it out"),
        (("no_proj",), "config/no-such-target", "'no_proj'.*expected one of embed_tokens, q_proj"),
    ],
)
def test_what_cannot_be_quantized(targets, code, said):
    model = build(LLAMA)
    before = state(model)
    with pytest.raises(UserError, match=said) as error:
        quantize_(model, QuantConfig(targets=targets))
    assert error.value.code == code
    assert_untouched(model, before)


def test_quantizing_twice_or_under_adapters_is_refused():
    model = build(LLAMA)
    quantize_(model, QuantConfig(targets=("q_proj",)))
    before = state(model)
    with pytest.raises(UserError, match=r"quantized already: model\.layers\.0\.self_attn\.q_proj; found NF4Linear") as error:
        quantize_(model, QuantConfig())
    assert error.value.code == "model/not-quantizable"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply_lora_(model, LoRAConfig(rank=2))
    with pytest.raises(UserError, match=r"q_proj.*fix: quantize first, then add them") as error:
        quantize_(model, QuantConfig(targets=("k_proj",)))
    assert error.value.code == "adapter/already-there"


def test_somebody_elses_packed_weight_is_refused():
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="quantized already"):
        quantize_(model, QuantConfig())


def test_adapters_find_layers_in_4_bits():
    model = build(FAMILIES["llama-biases"], torch.float32)
    whole = num_parameters(model)
    quantize_(model, QuantConfig())
    ids = torch.arange(12).view(2, 6)
    expected = model(ids)
    assert apply_lora_(model, LoRAConfig(rank=2, alpha=3.0)) == ALL_LINEARS
    assert torch.equal(model(ids), expected)
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert num_parameters(model, trainable=True) == added
    assert num_parameters(model) == whole + added
    assert all(isinstance(layer.base, NF4Linear) for layer in lora_modules(model).values())
    model = build(LLAMA)
    quantize_(model, QuantConfig())
    with pytest.raises(UserError, match="found rank 13; expected 1 to 12 for a weight of shape 36 x 12") as error:
        apply_lora_(model, LoRAConfig(rank=13))
    assert error.value.code == "config/bad-rank"


def test_quantization_of_says_how_the_layers_are_stored():
    model = build(LLAMA)
    assert quantization_of(model) is None
    quantize_(model, QuantConfig("int4", 128, targets=("q_proj",)))
    assert quantization_of(model) == {"levels": "int4", "block_size": 128, "double_quant": True}
    quantize_(model, QuantConfig("int4", 32, double_quant=False, targets=("k_proj",)))
    assert quantization_of(model) == {"levels": "int4", "block_size": "mixed", "double_quant": "mixed"}
    own = [k / 15 for k in range(16)]
    stranger = nn.Sequential(NF4Linear.from_linear(nn.Linear(8, 4), levels=own))
    assert quantization_of(stranger) == {"levels": codebook(own).tolist(), "block_size": 64, "double_quant": True}


def test_weight_bytes_are_those_of_the_tensors():
    model = build(LLAMA, torch.bfloat16)
    dense = weight_bytes(model)
    assert dense == 2 * num_parameters(model)
    quantize_(model, QuantConfig())
    assert weight_bytes(model) == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert weight_bytes(model) < dense
    assert weight_bytes(model, torch.bfloat16) == dense
