"""Models small enough for hypothesis: one shape of each family, all of them awkward on purpose.

Sizes are no powers of two, ``num_heads * head_dim`` is never ``hidden_size``, several query heads share a kv head, and
every weight is random, norms and biases too, so that nothing can be left out unnoticed.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from minisft.config import LoRAConfig, ModelConfig, RopeScaling
from minisft.model import CausalLM
from minisft.surgery import apply_lora_, lora_modules

VOCAB = 29
LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=12,
    intermediate_size=14,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
# With 5 frequencies and this original length, one wave is kept, some are blended and the longest are stretched.
LLAMA3_ROPE = replace(
    LLAMA,
    head_dim=10,
    rope_theta=1000.0,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    tie_word_embeddings=False,
)
LLAMA_BIASES = replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, num_kv_heads=6)
MISTRAL = replace(LLAMA, model_type="mistral", sliding_window=4, num_kv_heads=3, tie_word_embeddings=False)
QWEN2 = replace(LLAMA, model_type="qwen2", qkv_bias=True, num_kv_heads=1)
QWEN3 = replace(LLAMA, model_type="qwen3", qk_norm=True, head_dim=14, tie_word_embeddings=False)
FAMILIES = {
    "llama": LLAMA,
    "llama3-rope": LLAMA3_ROPE,
    "llama-biases": LLAMA_BIASES,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}

# Families with switches that the six above leave alone: the tests of ``test_model_families`` ask for all of them at once.
SMOLLM3 = replace(LLAMA, model_type="smollm3", num_layers=3, nope_layers=(1,))
GRANITE = replace(
    LLAMA, model_type="granite", embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.4, logits_divisor=1.7
)
OLMO2 = replace(LLAMA, model_type="olmo2", qk_norm=True, qk_norm_flat=True, norms="after")
GEMMA3 = replace(
    LLAMA, model_type="gemma3_text", num_layers=3, sliding_window=3, global_layers=(1,), local_rope_theta=10.0, qk_norm=True,
    norms="both", norm_plus_one=True, activation="gelu", embedding_multiplier=12**0.5, attention_multiplier=0.3,
    logits_softcap=2.0,
)  # fmt: skip
SWITCHED_FAMILIES = {"smollm3": SMOLLM3, "granite": GRANITE, "olmo2": OLMO2, "gemma3": GEMMA3}


def randomize_(module: nn.Module, seed: int = 0) -> None:
    """Every parameter random: norms around 1, the rest large enough that attention is far from uniform."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * values if "norm" in name else 0.5 * values)


def build(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> CausalLM:
    """A random model, the same numbers in every dtype up to rounding."""
    model = CausalLM(config).to(dtype)
    randomize_(model, seed)
    return model


@functools.cache
def shared(config: ModelConfig) -> CausalLM:
    """A frozen random model in fp64, built once: hypothesis asks for it a thousand times."""
    return build(config).requires_grad_(False)


@functools.cache
def shared_with_lora(config: ModelConfig) -> CausalLM:
    """The same with adapters, built once. Whoever runs backward clears the gradients (``gradients`` does)."""
    return build_with_lora(config, LoRAConfig(rank=2, alpha=3.0))


def build_with_lora(config: ModelConfig, lora: LoRAConfig, dtype: torch.dtype = torch.float64) -> CausalLM:
    """A random model whose adapters are random too, in both factors: as if trained for a while."""
    model = build(config, dtype)
    apply_lora_(model, lora)
    draw = torch.Generator().manual_seed(7)
    for layer in lora_modules(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = torch.randn(factor.shape, generator=draw, dtype=torch.float64).to(factor.dtype) * 0.4
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of everything that is trained; clears them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Equal keys, and every tensor equal up to ``tolerance`` times its largest element."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, name)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12, name: str = "") -> None:
    """Equal shape, and equal up to ``tolerance`` times the largest element (or 1, if that is larger)."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{name}: off by {error:.3g} at scale {scale:.3g}"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on shape and seed alone, wherever else randomness is used."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
