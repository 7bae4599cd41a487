"""One more token for each row of a batch, in one native call: the fast form of ``CausalLM`` with a KV cache.

A step of the readable model makes some twenty calls of PyTorch a layer, which at one token take longer than the arithmetic.
``NativeDecoder`` hands the model's pointers to ``kernels/cpu_decode.cpp``, which walks through all layers: norm, q k v, RoPE,
cache, attention, output, norm, MLP, head. Everything is multiplied and summed in fp32 whatever the weights' dtype (fp32, bf16
or 4 bits), and what enters the cache is rounded to its dtype.

The readable model stays the reference, and it does the step wherever ``reason_for_python`` is not empty: on a GPU, in fp64 or
fp16, while a module has hooks, under autocast, for DoRA and for adapters of the embedding, for more than 16 rows, and without
a C++ compiler. Weights are never copied. Pointers are taken when a decoder is made, which is once for each batch of prompts,
so whatever was trained, merged, replaced or turned off before is seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_decode import KINDS, MAX_ROWS, LayerFields, LinearFields, Pointers, StepFields, Unsupported, require
from minisft.lora import LoRALinear
from minisft.matmul import Linear
from minisft.model import MLP, Attention, CausalLM, KVCache, Layer, RMSNorm, Transformer, rope_angles
from minisft.nf4_linear import NF4Linear

_MODULES = (CausalLM, Transformer, nn.ModuleList, Layer, Attention, MLP, RMSNorm, nn.Embedding)
_MODULES += (Linear, nn.Linear, NF4Linear, LoRALinear, nn.Dropout)


def reason_for_python(model: CausalLM, num_rows: int = 1) -> str:
    """Why the readable model does the step; empty where the native code does.

    Args:
        model: as it is now.
        num_rows: rows of the batch.

    Returns:
        a few words, such as "no C++ compiler found", or an empty string.
    """
    try:
        _Model(model)
        _require_rows(num_rows)
    except Unsupported as reason:
        return str(reason)
    return ""


def _require_rows(num_rows: int) -> None:
    require(num_rows <= MAX_ROWS, f"{num_rows} rows, more than {MAX_ROWS}")


def _require_plain(model: nn.Module) -> None:
    """Only modules whose arithmetic is known, none of them watched or training."""
    hooks = torch.nn.modules.module
    require(not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks), "a global hook watches all modules")
    for name, module in model.named_modules():
        require(type(module) in _MODULES, f"{name or 'the model'} is a {type(module).__name__}")
        require(not (module._forward_hooks or module._forward_pre_hooks), f"{name or 'the model'} has a hook")
        require("forward" not in vars(module), f"the forward of {name or 'the model'} was replaced")


def next_logits_of(model: CausalLM, cache: KVCache) -> Callable[[Tensor, KVCache], Tensor]:
    """What computes the next token's logits from the newest tokens: native where it can, else the readable model.

    Args:
        model: in ``eval`` mode; its weights must not move while the result is used.
        cache: what the prompts left behind.

    Returns:
        a function of tokens (B,) int64 and their cache, which it appends to; it gives logits (B, V) in the model's dtype.
    """
    try:
        decoder = NativeDecoder(model, cache)
    except Unsupported:
        decoder = None

    def next_logits(tokens: Tensor, cache: KVCache) -> Tensor:
        if decoder is not None and len(tokens) <= MAX_ROWS:
            return decoder.logits(tokens, cache)
        return model.head(model.hidden(tokens[:, None], cache=cache)[:, 0])

    return next_logits


class _Model:
    """A model's pointers, and the tensors they point into.

    Raises:
        Unsupported: something that the native step does not compute.
    """

    def __init__(self, model: CausalLM) -> None:
        require(not torch.is_autocast_enabled("cpu"), "autocast is on")
        require(not torch.compiler.is_compiling(), "the model is being compiled")
        require(model.dtype in KINDS, f"the model computes in {str(model.dtype).removeprefix('torch.')}")
        _require_plain(model)
        require(cpu_nf4.library() is not None, cpu_nf4.path())
        self.pointers, body = Pointers(), model.model
        self.max_rank = 0
        layers = [self._layer(layer) for layer in body.layers]
        self.layers = (LayerFields * len(layers))(*layers)
        self.head = self._linear(model.lm_head, "the head")
        self.embedding = self.pointers.numbers(body.embed_tokens.weight, "the embedding")
        self.embedding_kind = KINDS[body.embed_tokens.weight.dtype]
        self.final_norm = self._norm(body.norm)
        self.eps = body.norm.eps

    def _norm(self, norm: nn.Module) -> int | None:
        assert isinstance(norm, RMSNorm)
        return self.pointers.small(norm.weight, "a norm")

    def _layer(self, layer: nn.Module) -> LayerFields:
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        linears = [self._linear(getattr(attention, f"{name}_proj"), name) for name in "qkvo"]
        linears += [self._linear(getattr(mlp, f"{name}_proj"), name) for name in ("gate", "up", "down")]
        qk_norms = (attention.q_norm, attention.k_norm) if attention.qk_norm else (None, None)
        norms = (layer.input_layernorm, *qk_norms, layer.post_attention_layernorm)
        return LayerFields(*linears, *(None if norm is None else self._norm(norm) for norm in norms))

    def _linear(self, layer: nn.Module, what: str) -> LinearFields:
        update = None
        if isinstance(layer, LoRALinear):
            require(layer.dropout.p == 0 or not layer.training, f"the adapter of {what} draws dropout")
            if layer.enabled:
                update = (layer.lora_A, layer.lora_B, layer.scaling)
                self.max_rank = max(self.max_rank, layer.rank)
            layer = layer.base
        assert isinstance(layer, (nn.Linear, NF4Linear))
        weight = layer.quantized if isinstance(layer, NF4Linear) else layer.weight
        return self.pointers.linear(weight, layer.bias, update, what)


class NativeDecoder:
    """Computes logits of the next token for rows that continue in a KV cache; make one for each batch of prompts.

    Args:
        model: in ``eval`` mode; its weights must not move while this object is used.
        cache: what the prompts left behind.

    Raises:
        Unsupported: see ``reason_for_python``.
    """

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        config, found = model.config, _Model(model)
        self._model, self._dtype, self._vocabulary = found, model.dtype, model.lm_head.out_features
        threads = torch.get_num_threads()
        D, H, K, E, I = (  # noqa: E741
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size
        )  # fmt: skip
        angles = rope_angles(config, torch.arange(cache.max_length), model.dtype)
        self._cos, self._sin = (x.float().contiguous() for x in angles)
        own_size = 2 * MAX_ROWS * max(D, H * E, I) + 4 * E + cache.max_length
        own_size += -own_size % 16 + 16  # threads write to cache lines of their own
        self._own = torch.empty(threads * own_size)
        self._shared = torch.empty(MAX_ROWS * (D + (2 * H + 2 * K) * E + 2 * I + 3 * found.max_rank))
        step = self._step = StepFields(
            layers=found.layers, embedding=found.embedding, final_norm=found.final_norm, head=found.head
        )
        step.cos, step.sin = self._cos.data_ptr(), self._sin.data_ptr()
        step.shared, step.own, step.own_size = self._shared.data_ptr(), self._own.data_ptr(), own_size
        step.num_layers, step.D, step.H, step.K, step.E, step.I = config.num_layers, D, H, K, E, I
        step.max_rank, step.window, step.eps, step.threads = found.max_rank, config.sliding_window or 0, found.eps, threads
        step.embedding_kind = found.embedding_kind

    def logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One step.

        Args:
            tokens: (B,) int64, the newest token of each row; 1 to 16 rows.
            cache: the rows' keys and values; those of the new tokens are appended.

        Returns:
            (B, V) in the model's dtype.

        Raises:
            ValueError: the cache is full.
            Unsupported: more than 16 rows, or a cache in another dtype or layout.
        """
        B = len(tokens)
        _require_rows(B)
        if int(cache.lengths.max()) >= cache.max_length:
            raise ValueError(f"the KV cache holds {cache.max_length} tokens; {int(cache.lengths.max()) + 1} are needed")
        _require_cache(cache, B)
        logits, slots = torch.empty(B, self._vocabulary), torch.arange(B)
        step, positions, ids = self._step, cache.lengths.contiguous(), tokens.contiguous()
        step.rows, step.ids, step.positions, step.slots = B, ids.data_ptr(), positions.data_ptr(), slots.data_ptr()
        step.keys, step.values, step.logits = cache.keys.data_ptr(), cache.values.data_ptr(), logits.data_ptr()
        step.layer_stride, step.slot_stride, step.head_stride, step.position_stride, _ = cache.keys.stride()
        step.cache_kind = KINDS[cache.keys.dtype]
        library = cpu_nf4.library()
        assert library is not None
        library.decode_step(ctypes.byref(step))
        cache.lengths = cache.lengths + 1
        return logits.to(self._dtype)


def _require_cache(cache: KVCache, num_rows: int) -> None:
    keys, values = cache.keys, cache.values
    plain = keys.is_cpu and keys.dtype in KINDS and values.dtype == keys.dtype and keys.shape[1] == num_rows
    require(plain and keys.stride(-1) == 1 and keys.stride() == values.stride(), "the KV cache lies in another way")
