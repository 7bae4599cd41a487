"""The decoder: one transformer with Hugging Face's module names.

Llama, SmolLM2 and 3, Mistral, Qwen2 and 3, Granite, OLMo 2 and Gemma 3 differ in switches (biases, where norms stand, which
layers have a window or no RoPE, factors), all of them in ``ModelConfig``; there are no subclasses. The model knows nothing of
adapters, quantization or training: those replace or wrap its linears from outside. The idea to take home: hidden states stay
flat (tokens, D) all the way, and only attention needs to know which tokens belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from minisft.attention import Segments, attend, attend_cached, cache_attn_mask
from minisft.common.autograd import computed_again
from minisft.config import ModelConfig
from minisft.elementwise import geglu, rms_norm, rotate, swiglu
from minisft.matmul import Linear

READ_AT_ONCE = 512  # tokens: attention over a cache holds the scores of so many with all before them, in every head


class Wrap(Protocol):
    """How a block is called: directly, or through activation checkpointing."""

    def __call__(self, block: nn.Module, *args: object) -> Tensor: ...


def direct(block: nn.Module, *args: object) -> Tensor:
    """A block called as it is."""
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
        """A cache of the given rows, in that order; a row may come several times."""
        chosen = object.__new__(KVCache)
        chosen.keys, chosen.values = self.keys[:, rows], self.values[:, rows]
        chosen.lengths = self.lengths[rows]
        return chosen

    def part(self, row: int, length: int) -> KVCache:
        """A view of one row's first ``length`` tokens."""
        chosen = object.__new__(KVCache)
        chosen.keys, chosen.values = self.keys[:, row : row + 1, :, :length], self.values[:, row : row + 1, :, :length]
        chosen.lengths = torch.full_like(self.lengths[:1], length)
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

    def put_(self, start: int, other: KVCache) -> None:
        """Copy what ``other`` has filled into the rows from ``start`` on, which are as long or longer."""
        rows, end = slice(start, start + len(other.lengths)), int(other.lengths.max())
        self.keys[:, rows, :, :end] = other.keys[:, :, :, :end]
        self.values[:, rows, :, :end] = other.values[:, :, :, :end]
        self.lengths[rows] = other.lengths

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, B, C, K, E), as far as the longest row is filled; copies, as attention takes them."""
        end = int(self.lengths.max())
        keys, values = (x[:, :, :, :end].transpose(2, 3).contiguous() for x in (self.keys, self.values))
        return keys, values

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
    """What the layers of one forward pass need: angles (False: RoPE's own, True: local), masks by window, where tokens lie."""

    def __init__(
        self,
        angles: Mapping[bool, tuple[Tensor, Tensor]],
        segments: Segments | None,
        cache: KVCache | None,
        positions: Tensor,
        end: int,
        attn_masks: Mapping[int | None, Tensor],
        past: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.angles, self.attn_masks, self.past = angles, attn_masks, past
        self.segments, self.cache, self.positions, self.end = segments, cache, positions, end


class RMSNorm(nn.Module):
    """Root mean square norm with a learned factor a column, weight or weight + 1, see ``elementwise.rms_norm``."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 0.0 if config.norm_plus_one else 1.0))
        self.eps, self.plus_one = config.rms_norm_eps, config.norm_plus_one

    def forward(self, x: Tensor) -> Tensor:
        if not self.plus_one:
            return rms_norm(x, self.weight, self.eps)
        weight = self.weight.to(torch.promote_types(x.dtype, torch.float32)) + 1  # in bf16 the sum would lose the weight
        return rms_norm(x, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions, see ``attention.attend``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.layer, self.head_dim, self.window = layer, E, config.window(layer)
        self.has_rope = layer not in config.nope_layers
        self.local_rope = config.local_rope_theta is not None and self.window is not None
        self.q_proj = Linear(D, config.num_heads * E, bias=config.qkv_bias)
        self.k_proj = Linear(D, config.num_kv_heads * E, bias=config.qkv_bias)
        self.v_proj = Linear(D, config.num_kv_heads * E, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * E, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(E * config.num_heads if config.qk_norm_flat else E, config)
            self.k_norm = RMSNorm(E * config.num_kv_heads if config.qk_norm_flat else E, config)
        self.qk_norm = config.qk_norm
        # attention.attend multiplies by 1 / sqrt(E); what else is wanted multiplies q
        self.q_scale = 1.0 if config.attention_multiplier is None else config.attention_multiplier * math.sqrt(E)

    def forward(self, x_ND: Tensor, context: _Context, only: Tensor | None = None) -> Tensor:
        N, x_only = len(x_ND), _rows(x_ND, only)
        projections = self.q_proj, self.k_proj, self.v_proj
        qkv = _outputs(x_ND, projections) if only is None else [self.q_proj(x_only), *_outputs(x_ND, projections[1:])]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
        if only is not None:  # a query for each token is what attention takes; nobody reads what comes of the zeros
            q = q.new_zeros(N, *q.shape[1:]).index_copy(0, only, q)
        if self.qk_norm:
            q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        if self.has_rope:
            cos, sin = context.angles[self.local_rope]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (N, heads, E)
        if self.q_scale != 1.0:
            q = q * self.q_scale
        if context.cache is None:
            assert context.segments is not None
            past = None if context.past is None else (context.past[0][self.layer], context.past[1][self.layer])
            out = attend(q, k, v, context.segments, self.window, past)
        else:
            B, T = context.positions.shape
            keys, values = context.cache.append(
                self.layer, k.view(B, T, -1, self.head_dim), v.view(B, T, -1, self.head_dim), context.positions
            )
            seen = slice(None), slice(None), slice(context.end)
            out = attend_cached(q.view(B, T, -1, self.head_dim), keys[seen], values[seen], context.attn_masks[self.window])
        return self.o_proj(_rows(out.reshape(N, -1), only))


def _outputs(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """``[layer(x) for layer in layers]``. What replaces linears may offer ``together``, a function of x and several of them."""
    ways = [getattr(layer, "together", None) for layer in layers]
    together = next(filter(None, ways), None)
    joined = [layer for layer, way in zip(layers, ways, strict=True) if way is together]
    if together is None or len(joined) < 2:
        return [layer(x) for layer in layers]
    found = dict(zip(joined, together(x, joined), strict=True))
    return [found[layer] if layer in found else layer(x) for layer in layers]


def _rows(x: Tensor, only: Tensor | None) -> Tensor:
    return x if only is None else x.index_select(0, only)


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """Norm of (N, heads, E) over each head, or over all of them together if the norm has that size."""
    return norm(x.reshape(len(x), -1, len(norm.weight))).view_as(x)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), see ``elementwise.swiglu`` and ``geglu``.

    Attributes:
        keeps_all: see ``Layer``; here it is the product of gate and up.
    """

    keeps_all = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_proj = Linear(D, I, bias=config.mlp_bias)
        self.up_proj = Linear(D, I, bias=config.mlp_bias)
        self.down_proj = Linear(I, D, bias=config.mlp_bias)
        self.gated = geglu if config.activation == "gelu" else swiglu

    def forward(self, x_ND: Tensor) -> Tensor:
        gate, up = _outputs(x_ND, (self.gate_proj, self.up_proj))
        product = self.gated(gate, up)
        with _computed_again(self, product, self.gated, gate, up):
            return self.down_proj(product)


# Hugging Face's names of a layer's norms: before attention, after it, before the MLP, after it.
_NORMS: dict[str, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


class Layer(nn.Module):
    """x + m * norm(attention(norm(x))), then x + m * norm(MLP(norm(x))); most families have m = 1 and norms before only.

    Attributes:
        keeps_all: whether backward finds what the norms gave, or computes it again: a pass over memory instead of the memory.
    """

    keeps_all = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.norm_names, self.multiplier = _NORMS[config.norms], config.residual_multiplier
        for name in filter(None, self.norm_names):
            self.add_module(name, RMSNorm(config.hidden_size, config))

    def forward(self, x_ND: Tensor, context: _Context, wrap_mlp: Wrap, only: Tensor | None = None) -> Tensor:
        before, after, before_mlp, after_mlp = (getattr(self, name) if name else _unchanged for name in self.norm_names)
        normed = before(x_ND)
        with _computed_again(self, normed, before, x_ND):
            attended = self.self_attn(normed, context, only)
        x_ND = _rows(x_ND, only).add(after(attended), alpha=self.multiplier)
        normed = before_mlp(x_ND)
        with _computed_again(self, normed, before_mlp, x_ND):
            return x_ND.add(after_mlp(wrap_mlp(self.mlp, normed)), alpha=self.multiplier)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _computed_again(
    block: Layer | MLP, result: Tensor, function: Callable[..., Tensor], *inputs: Tensor
) -> AbstractContextManager[None]:
    if block.keeps_all or function is _unchanged or not (result.requires_grad and torch.is_grad_enabled()):
        return nullcontext()
    return computed_again(result, function, *inputs)


class Transformer(nn.Module):
    """Embedding, layers, final norm: the part that Hugging Face calls ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:  # there is nothing to draw there, and asking makes PyTorch import its compiler: seconds
            nn.init.normal_(weight)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config)


class CausalLM(nn.Module):
    """A decoder with its output head: ``model(input_ids) -> logits``.

    Attributes:
        config: the shape.
        wrap_layer, wrap_mlp: how layers and their MLPs are called; training sets them to activation checkpointing.
        activations_dtype: where weights are held in another dtype than they are computed in, as fp32 shares of a bf16 model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.wrap_layer: Wrap = direct
        self.wrap_mlp: Wrap = direct
        self.activations_dtype: torch.dtype | None = None
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's: one parameter under two names."""
        self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations, which is the norms' dtype (linears may be quantized) unless another one was given."""
        return self.activations_dtype or self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return self.model.norm.weight.device

    @property
    def embedding(self) -> nn.Module:
        """The input embedding."""
        return self.model.embed_tokens

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for so many rows of so many tokens."""
        return KVCache(self.config, batch_size, max_length, self.dtype, self.device)

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
        """Logits, cap * tanh(W hidden / divisor / cap): (..., D) -> (..., V)."""
        logits = self.lm_head(hidden)
        if (divisor := self.config.logits_divisor) != 1.0:
            logits = logits / divisor
        return logits if (cap := self.config.logits_softcap) is None else torch.tanh(logits / cap) * cap

    @property
    def loss_head(self) -> Callable[[Tensor], Tensor]:
        """``head``, as the bare linear where it is no more than that: the loss has a fused path for it."""
        return self.lm_head if self.config.logits_divisor == 1.0 and self.config.logits_softcap is None else self.head

    def hidden(
        self,
        input_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix_length: int = 0,
        noise: Tensor | None = None,
        only: Tensor | None = None,
        past: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids, segment_ids, cache: as in ``forward``.
            prefix_length: the first so many tokens of each row are a segment that all its others continue.
            noise: (B, T, D), added to the embeddings; None for none.
            only: (n,) int64, the flat positions that are asked for; None for all. Of the others the last layer computes keys
                and values, which is all that anybody reads of them there.
            past: a cache of one row, which all rows continue; it is read, not appended to. Not together with ``cache``.

        Returns:
            (B, T, D) in the model's dtype, or (n, D).
        """
        B, T = input_ids.shape
        if cache is not None and T > READ_AT_ONCE:
            ids = torch.ones_like(input_ids) if segment_ids is None else segment_ids
            pieces = zip(input_ids.split(READ_AT_ONCE, 1), ids.split(READ_AT_ONCE, 1), strict=True)
            hidden = torch.cat([self.hidden(piece, segment_ids=real, cache=cache) for piece, real in pieces], 1)
            return hidden if only is None else hidden.flatten(0, 1).index_select(0, only)
        context = self._context(input_ids, segment_ids, cache, prefix_length, past)
        x_ND = self.model.embed_tokens(input_ids.reshape(-1))
        if (multiplier := self.config.embedding_multiplier) != 1.0:
            x_ND = x_ND * torch.tensor(multiplier, dtype=x_ND.dtype)  # rounded as the weights are: Gemma was trained so
        if noise is not None:
            x_ND = x_ND + noise.view(-1, noise.shape[-1]).to(x_ND.dtype)
        for layer in self.model.layers:
            x_ND = self.wrap_layer(layer, x_ND, context, self.wrap_mlp, only if layer is self.model.layers[-1] else None)
        hidden = self.model.norm(x_ND)
        return hidden if only is not None else hidden.view(B, T, -1)

    def _context(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        cache: KVCache | None,
        prefix_length: int,
        past: KVCache | None,
    ) -> _Context:
        T, before = input_ids.shape[1], None if past is None else past.filled()
        if cache is None:
            ids = torch.ones_like(input_ids) if segment_ids is None else segment_ids
            segments = Segments.of(ids, prefix_length, 0 if before is None else before[0].shape[2])
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
        kinds = (False,) if self.config.local_rope_theta is None else (False, True)
        angles = {local: rope_angles(self.config, positions.reshape(-1), self.dtype, local) for local in kinds}
        windows = {self.config.window(layer) for layer in range(self.config.num_layers) if cache is not None}
        attn_masks = {window: cache_attn_mask(positions, end, window) for window in windows}
        return _Context(angles, segments, cache, positions, end, attn_masks, before)


def rope_angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype, local: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/E), stretched as Llama 3 does when the config says so.

    Args:
        config: the model's theta, head dimension and stretching.
        positions: (N,) int64.
        dtype: of the result.
        local: for the layers with a window, where they have a base of their own, which is not stretched.

    Returns:
        (N, 1, E/2) each; angles in fp32, rounded to ``dtype`` once.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    theta = config.local_rope_theta if local and config.local_rope_theta is not None else config.rope_theta
    frequency = 1.0 / theta ** (half / config.head_dim)
    if not local and (scaling := config.rope_scaling) is not None:
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
