"""The decoder: one Llama-family transformer with Hugging Face's module names.

Llama, SmolLM2, Mistral, Qwen2 and Qwen3 differ in a few switches (biases, a norm on q and k, tied head), all of them in
``ModelConfig``; there are no subclasses. The model knows nothing of adapters, quantization or training: those replace or
wrap its linears from outside. The idea to take home: hidden states stay flat (tokens, D) all the way, and only attention
needs to know which tokens belong together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from minisft.attention import Segments, attend, attend_cached, cache_attn_mask
from minisft.config import ModelConfig
from minisft.elementwise import rms_norm, rotate, swiglu
from minisft.matmul import Linear


class Wrap(Protocol):
    """How a block is called: directly, or through activation checkpointing."""

    def __call__(self, block: nn.Module, *args: object) -> Tensor: ...


def _direct(block: nn.Module, *args: object) -> Tensor:
    return block(*args)


class KVCache:
    """Keys and values of everything read so far, one preallocated pair of (B, K, C, E) buffers a layer.

    ``lengths[b]`` tokens of row b are filled; appending writes row b at its own position, so rows of different length need
    no padding between their tokens. Whatever lies beyond ``lengths`` is garbage that no query may see.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # zeros: garbage must be finite to be masked out
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def max_length(self) -> int:
        """How many tokens a row can hold."""
        return self.keys.shape[3]

    def select(self, rows: Tensor) -> KVCache:
        """A cache of the given rows, in that order; a row may come several times (to score options)."""
        chosen = object.__new__(KVCache)
        chosen.keys, chosen.values = self.keys[:, rows], self.values[:, rows]
        chosen.lengths = self.lengths[rows]
        return chosen

    def keep_(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; row ``rows[i]`` becomes row i, and only what moves is copied.

        Args:
            rows: different ones; a row may not go where another one that stays has yet to leave.
        """
        for place, row in enumerate(rows):
            if place != row:
                length = int(self.lengths[row])
                self.keys[:, place, :, :length] = self.keys[:, row, :, :length]
                self.values[:, place, :, :length] = self.values[:, row, :, :length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths = self.lengths[torch.tensor(rows, device=self.lengths.device)]

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values.

        Args:
            layer: which one's.
            k, v: (B, T, K, E), in the cache's dtype.
            positions: (B, T) int64, where they go in each row.

        Returns:
            the layer's keys and values, (B, K, C, E) each.
        """
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer][rows, :, positions] = k
        self.values[layer][rows, :, positions] = v
        return self.keys[layer], self.values[layer]


class _Context:
    """What every layer of one forward pass needs: angles, and where tokens attend."""

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        segments: Segments | None,
        cache: KVCache | None,
        positions: Tensor,
        end: int,
        attn_mask: Tensor | None,
    ) -> None:
        self.cos, self.sin = cos, sin
        self.segments, self.cache, self.positions, self.end, self.attn_mask = segments, cache, positions, end, attn_mask


class RMSNorm(nn.Module):
    """Root mean square norm with a learned factor a column, see ``elementwise.rms_norm``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions, see ``attention.attend``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.layer, self.head_dim, self.window = layer, E, config.sliding_window
        self.q_proj = Linear(D, config.num_heads * E, bias=config.qkv_bias)
        self.k_proj = Linear(D, config.num_kv_heads * E, bias=config.qkv_bias)
        self.v_proj = Linear(D, config.num_kv_heads * E, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * E, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(E, config.rms_norm_eps)
            self.k_norm = RMSNorm(E, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x_ND: Tensor, context: _Context) -> Tensor:
        q, k, v = (proj(x_ND).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)  # (N, heads, E)
        if context.cache is None:
            assert context.segments is not None
            out = attend(q, k, v, context.segments, self.window)
        else:
            assert context.attn_mask is not None
            B, T = context.positions.shape
            keys, values = context.cache.append(
                self.layer, k.view(B, T, -1, self.head_dim), v.view(B, T, -1, self.head_dim), context.positions
            )
            seen = slice(None), slice(None), slice(context.end)
            out = attend_cached(q.view(B, T, -1, self.head_dim), keys[seen], values[seen], context.attn_mask)
        return self.o_proj(out.reshape(x_ND.shape[0], -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), see ``elementwise.swiglu``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_proj = Linear(D, I, bias=config.mlp_bias)
        self.up_proj = Linear(D, I, bias=config.mlp_bias)
        self.down_proj = Linear(I, D, bias=config.mlp_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_ND), self.up_proj(x_ND)))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_ND: Tensor, context: _Context, wrap_mlp: Wrap) -> Tensor:
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), context)
        return x_ND + wrap_mlp(self.mlp, self.post_attention_layernorm(x_ND))


class Transformer(nn.Module):
    """Embedding, layers, final norm: the part that Hugging Face calls ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:  # there is nothing to draw there, and asking makes PyTorch import its compiler: seconds
            nn.init.normal_(weight)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder with its output head: ``model(input_ids) -> logits``.

    Attributes:
        config: the shape.
        wrap_layer, wrap_mlp: how layers and their MLPs are called; training sets them to activation checkpointing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.wrap_layer: Wrap = _direct
        self.wrap_mlp: Wrap = _direct
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's: one parameter under two names."""
        self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations, which is the norms' dtype (linears may be quantized)."""
        return self.model.norm.weight.dtype

    def forward(self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, T) int64.
            segment_ids: (B, T) int64: 0 is padding, equal positive neighbours are one segment. None: each row is one.
            cache: read and appended to if given.

        Returns:
            (B, T, V) in the model's dtype; unspecified at padding.
        """
        return self.head(self.hidden(input_ids, segment_ids=segment_ids, cache=cache))

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix_length: int = 0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids, segment_ids, cache: as in ``forward``.
            prefix_length: the first so many tokens of each row are a segment that all its others continue.
            noise: (B, T, D), added to the embeddings; None for none.

        Returns:
            (B, T, D) in the model's dtype.
        """
        B, T = input_ids.shape
        context = self._context(input_ids, segment_ids, cache, prefix_length)
        x_ND = self.model.embed_tokens(input_ids.reshape(-1))
        if noise is not None:
            x_ND = x_ND + noise.view(-1, noise.shape[-1]).to(x_ND.dtype)
        for layer in self.model.layers:
            x_ND = self.wrap_layer(layer, x_ND, context, self.wrap_mlp)
        return self.model.norm(x_ND).view(B, T, -1)

    def _context(self, input_ids: Tensor, segment_ids: Tensor | None, cache: KVCache | None, prefix_length: int) -> _Context:
        T = input_ids.shape[1]
        if cache is None:
            segments = Segments.of(torch.ones_like(input_ids) if segment_ids is None else segment_ids, prefix_length)
            positions, end = segments.positions, T
        else:
            real = torch.ones_like(input_ids) if segment_ids is None else (segment_ids > 0).long()
            segments = None
            positions = cache.lengths[:, None] + torch.arange(T, device=input_ids.device)
            end = int(cache.lengths.max()) + T
            if end > cache.max_length:
                raise ValueError(f"the KV cache holds {cache.max_length} tokens; {end} are needed")
            assert bool((real[:, 1:] <= real[:, :-1]).all()), "padding must stand to the right of the new tokens"
            cache.lengths = cache.lengths + real.sum(1)
        cos, sin = rope_angles(self.config, positions.reshape(-1), self.dtype)
        attn_mask = None if cache is None else cache_attn_mask(positions, end, self.config.sliding_window)
        return _Context(cos, sin, segments, cache, positions, end, attn_mask)


def rope_angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/E), stretched as Llama 3 does when the config says so.

    Args:
        config: the model's theta, head dimension and stretching.
        positions: (N,) int64.
        dtype: of the result.

    Returns:
        (N, 1, E/2) each; angles in fp32, rounded to ``dtype`` once.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (half / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        wavelength = 2 * math.pi / frequency
        longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
        shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
        # Waves longer than `longest` are stretched by factor, those shorter than `shortest` kept, between them a blend.
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / span
        blend = (1 - keep) * frequency / scaling.factor + keep * frequency
        frequency = torch.where(
            wavelength > longest, frequency / scaling.factor, torch.where(wavelength < shortest, frequency, blend)
        )
    angles = positions[:, None, None].float() * frequency
    return angles.cos().to(dtype), angles.sin().to(dtype)
