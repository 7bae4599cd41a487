"""One more token for each row of a batch, in one native call: the fast form of ``CausalLM`` with a KV cache.

A step of the readable model makes some twenty calls of PyTorch a layer, which at one token take longer than the arithmetic.
``NativeDecoder`` hands the model's pointers to ``kernels/cpu_decode.cpp``, which walks through all layers: norm, q k v, RoPE,
cache, attention, output, norm, MLP, head. Everything is multiplied and summed in fp32 whatever the weights' dtype (fp32, bf16,
4, 8 or 12 bits), and what enters the cache is rounded to its dtype. With AMX many rows are summed in another order than few.

The readable model stays the reference, and it does the step where ``decode_path`` says so: for a model with
``ModelConfig.switches`` (SmolLM3, Granite, OLMo 2, Gemma 3), one that transformers computes or that processes share, on a GPU,
in fp64 or fp16, while a module has hooks, under autocast, for DoRA and for adapters of the embedding, for more than 16 rows,
and without a C++ compiler. Weights are not copied, but for a model in ``in_eight_bits`` or ``in_compressed``; nor are adapters,
but for those of a model in bf16 on a CPU with bf16 instructions: there products of many rows multiply by A and B in bf16, and
steps read them so. Pointers and copies are taken when a decoder is made, which is once for each batch of prompts, so whatever
was trained, merged, replaced or turned off before is seen.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from minisft.adapter import RowDropout
from minisft.common.errors import UserError
from minisft.common.shares import is_share
from minisft.kernels import cpu_build, cpu_nf4
from minisft.kernels.cpu_decode import (
    KINDS,
    MAX_ROWS,
    LayerFields,
    LinearFields,
    Pointers,
    StepFields,
    Unsupported,
    require,
)
from minisft.kernels.eight_bit import eight_bits_of
from minisft.kernels.exact_copy import ExactCopy, exact_copy_of
from minisft.lora import LoRALinear
from minisft.matmul import Linear, compute_dtype
from minisft.model import MLP, Attention, CausalLM, KVCache, Layer, RMSNorm, Transformer, rope_angles
from minisft.nf4 import QuantizedWeight
from minisft.nf4_linear import NF4Linear

_MODULES: tuple[type[nn.Module], ...] = (CausalLM, Transformer, nn.ModuleList, Layer, Attention, MLP, RMSNorm, nn.Embedding)
_MODULES += (Linear, nn.Linear, NF4Linear, LoRALinear, RowDropout)

in_eight_bits: WeakSet[CausalLM] = WeakSet()  # models whose dense weights are read in 8 bits, see evaluation/fast_decode.py
in_compressed: WeakSet[CausalLM] = WeakSet()  # and those whose exact copies are read, unless they are in 8 bits


def decode_path(model: CausalLM, num_rows: int = 1) -> str:
    """Which code computes a token, for people: "native code (AVX2)" or "PyTorch (no C++ compiler found)".

    Args:
        model: as it is now.
        num_rows: rows of the batch.

    Returns:
        the code, and why it is not the native one; where weights are read compressed (copies that are not there yet are made),
        of how many linears.
    """
    try:
        require(num_rows <= MAX_ROWS, f"{num_rows} rows, more than {MAX_ROWS}")
        found = _Model(model, model in in_eight_bits, model in in_compressed)
    except Unsupported as reason:
        return f"PyTorch ({reason})"
    exact = f", weights of {len(found.copies)} linears read compressed" if found.copies else ""
    return cpu_nf4.path() + exact


def is_native(model: CausalLM) -> bool:
    """Whether native code decodes the model as it is now; no weight is copied, nothing is said."""
    if cpu_nf4.library() is None:
        return False
    try:
        _Model(model)
    except Unsupported:
        return False
    return True


def exact_copies(model: CausalLM) -> list[ExactCopy]:
    """Of each linear that steps read an exact copy of, that copy; what is not there yet is made.

    Raises:
        Unsupported: native code does not decode the model; copies may have been made before that was found.
    """
    return _Model(model, compressed=True).copies


def _require_plain(model: nn.Module) -> None:
    """Only modules whose arithmetic is known, none of them watched or training."""
    hooks = torch.nn.modules.module
    require(not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks), "a global hook watches all modules")
    for name, module in model.named_modules():
        require(type(module) in _MODULES, f"{name or 'the model'} is a {type(module).__name__}")
        require(not (module._forward_hooks or module._forward_pre_hooks), f"{name or 'the model'} has a hook")
        require("forward" not in vars(module), f"the forward of {name or 'the model'} was replaced")


@functools.cache
def _no_library() -> str:
    """Why there is no compiled code; a compiler that is missing or broken is reported once."""
    reason = cpu_build.load().reason or "the compiled code gave wrong bits"
    if reason != "MINISFT_NATIVE=0":
        warnings.warn(f"text is generated by PyTorch alone, which is slower: {reason}", stacklevel=2)
    return reason


def not_fast(reason: Unsupported, name: str = "") -> UserError:
    """The error of a model, perhaps one of several, that was to decode from 8 bits and cannot."""
    return UserError(
        "config/fast-decode", "fast decoding is not possible here", where=", ".join(filter(None, ("--fast-decode", name))),
        found=str(reason), expected="a model that native code decodes: on a CPU, with a C++ compiler",
        fix="leave --fast-decode away",
    )  # fmt: skip


def next_logits_of(model: CausalLM, cache: KVCache) -> Callable[[Tensor, KVCache], Tensor]:
    """What computes the next token's logits from the newest tokens: native where it can, else the readable model.

    Args:
        model: in ``eval`` mode; its weights must not move while the result is used.
        cache: what the prompts left behind.

    Returns:
        a function of tokens (B,) int64 and their cache, which it appends to; it gives logits (B, V) in the model's dtype.

    Raises:
        UserError: ``config/fast-decode``: 8 bits were asked for and native code does not compute the model any more.
    """
    is_fast, is_exact = model in in_eight_bits, model in in_compressed
    try:
        decoder = NativeDecoder(model, cache, eight_bits=is_fast, compressed=is_exact)
    except Unsupported as reason:
        if is_fast:
            raise not_fast(reason) from reason
        decoder = None

    def next_logits(tokens: Tensor, cache: KVCache) -> Tensor:
        if decoder is not None and (is_fast or len(tokens) <= MAX_ROWS):
            return decoder.logits(tokens, cache)
        return model.head(model.hidden(tokens[:, None], cache=cache)[:, 0])

    return next_logits


class _Model:
    """A model's pointers, and the tensors they point into; ``copies`` are the exact ones of dense weights.

    Raises:
        Unsupported: something that the native step does not compute.
    """

    def __init__(self, model: CausalLM, eight_bits: bool = False, compressed: bool = False) -> None:
        require(not any(map(is_share, model.parameters())), "processes share the model")
        require(type(model) is CausalLM, "transformers computes the model")
        require(not torch.is_autocast_enabled("cpu"), "autocast is on")
        require(not torch.compiler.is_compiling(), "the model is being compiled")
        require(model.device.type == "cpu", f"the model is on {model.device.type}")
        require(model.dtype in KINDS, f"the model computes in {str(model.dtype).removeprefix('torch.')}")
        require(not model.training, "the model is in training mode")
        if switches := model.config.switches:
            raise Unsupported("; ".join(f"the model's {name} is {value}" for name, value in switches.items()))
        _require_plain(model)
        if cpu_nf4.library() is None:
            raise Unsupported(_no_library())
        self._eight_bits, self._compressed = eight_bits, compressed
        self._factors = compute_dtype(torch.empty(0, dtype=model.dtype))
        self.copies: list[ExactCopy] = []
        self.pointers, self.config, body = Pointers(), model.config, model.model
        self.max_rank, D, V = 0, model.config.hidden_size, model.config.vocab_size
        require(len(body.layers) == model.config.num_layers, "layers were added or taken away")
        layers = [self._layer(layer) for layer in body.layers]
        self.layers = (LayerFields * len(layers))(*layers)
        self.head = self._linear(model.lm_head, (V, D), "the head")
        embedding = body.embed_tokens.weight
        require(embedding.shape == (V, D), f"the embedding has the shape {tuple(embedding.shape)}")
        self.embedding, self.embedding_kind = self.pointers.numbers(embedding, "the embedding"), KINDS[embedding.dtype]
        self.final_norm = self._norm(body.norm, D)

    def _norm(self, norm: nn.Module, size: int) -> int | None:
        assert isinstance(norm, RMSNorm)
        require(norm.eps == self.config.rms_norm_eps, "a norm has another eps than the others")
        return self.pointers.vector(norm.weight, size, "a norm")

    def _layer(self, layer: nn.Module) -> LayerFields:
        assert isinstance(layer, Layer)
        config, attention, mlp = self.config, layer.self_attn, layer.mlp
        D, I, E = config.hidden_size, config.intermediate_size, config.head_dim  # noqa: E741
        Q, K = config.num_heads * E, config.num_kv_heads * E
        linears = {
            attention.q_proj: (Q, D), attention.k_proj: (K, D), attention.v_proj: (K, D), attention.o_proj: (D, Q),
            mlp.gate_proj: (I, D), mlp.up_proj: (I, D), mlp.down_proj: (D, I),
        }  # fmt: skip
        fields = [self._linear(linear, shape, "a linear") for linear, shape in linears.items()]
        qk_norms = (self._norm(attention.q_norm, E), self._norm(attention.k_norm, E)) if attention.qk_norm else (None, None)
        before, before_mlp = (self._norm(layer.get_submodule(f"{name}_layernorm"), D) for name in ("input", "post_attention"))
        norms = (before, *qk_norms, before_mlp)
        return LayerFields(*fields, *norms)

    def _linear(self, layer: nn.Module, shape: tuple[int, int], what: str) -> LinearFields:
        update = whole = None
        if isinstance(layer, LoRALinear):
            if layer.enabled:
                lora_A, lora_B = (factor.detach().to(self._factors) for factor in (layer.lora_A, layer.lora_B))
                update = lora_A, lora_B, layer.scaling
                self.max_rank = max(self.max_rank, layer.rank)
            layer = layer.base
        assert isinstance(layer, (nn.Linear, NF4Linear))
        weight: ExactCopy | QuantizedWeight
        weight = layer.quantized if isinstance(layer, NF4Linear) else layer.weight
        if self._eight_bits and isinstance(weight, Tensor):
            weight = eight_bits_of(weight)
        elif self._compressed and isinstance(weight, Tensor):
            weight = exact_copy_of(own := weight)
            if weight is not own:
                self.copies.append(weight)
                whole = own if own.dtype == torch.bfloat16 else None
        require(weight.shape == shape, f"{what} has the shape {tuple(weight.shape)}, not {shape}")
        return self.pointers.linear(weight, layer.bias, update, what, whole)


class NativeDecoder:
    """Computes logits of the next token for rows that continue in a KV cache; make one for each batch of prompts.

    Args:
        model: in ``eval`` mode; its weights must not move while this object is used.
        cache: what the prompts left behind.
        eight_bits: read dense weights in 8 bits, see ``kernels/eight_bit.py``.
        compressed: else read exact copies of dense weights where there are some, see ``kernels/exact_copy.py``.

    Raises:
        Unsupported: see ``decode_path``.
    """

    def __init__(self, model: CausalLM, cache: KVCache, eight_bits: bool = False, compressed: bool = False) -> None:
        config, found = model.config, _Model(model, eight_bits, compressed)
        self._model, self._dtype, self._vocabulary = found, model.dtype, config.vocab_size
        self._most_rows = None if eight_bits else MAX_ROWS
        threads, self._max_length = torch.get_num_threads(), cache.max_length
        D, H, K, E, I = (  # noqa: E741
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size
        )  # fmt: skip
        angles = rope_angles(config, torch.arange(cache.max_length), model.dtype)
        self._cos, self._sin = (x.float().contiguous() for x in angles)
        tiles = cpu_nf4.tile_floats()
        own_size = (tiles + 2 * MAX_ROWS) * max(D, H * E, I) + 4 * E + cache.max_length
        own_size += -own_size % 16 + 16  # threads write to cache lines of their own
        self._own = torch.empty(threads * own_size)
        self._shared = torch.empty(MAX_ROWS * (D + (2 * H + 2 * K) * E + 2 * I + 3 * found.max_rank))
        step = self._step = StepFields(
            layers=found.layers, embedding=found.embedding, final_norm=found.final_norm, head=found.head
        )
        step.cos, step.sin = self._cos.data_ptr(), self._sin.data_ptr()
        step.shared, step.own, step.own_size = self._shared.data_ptr(), self._own.data_ptr(), own_size
        step.num_layers, step.D, step.H, step.K, step.E, step.I = config.num_layers, D, H, K, E, I
        step.max_rank, step.window, step.eps, step.threads = (
            found.max_rank,
            config.sliding_window or 0,
            config.rms_norm_eps,
            threads,
        )
        step.embedding_kind, step.use_tiles = found.embedding_kind, tiles > 0

    def logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One step.

        Args:
            tokens: (B,) int64, the newest token of each row; 1 to 16 rows, with 8 bits any number.
            cache: the rows' keys and values; those of the new tokens are appended.

        Returns:
            (B, V) in the model's dtype.

        Raises:
            ValueError: the cache is full.
            Unsupported: more than 16 rows, or a cache in another dtype or layout.
        """
        B = len(tokens)
        require(self._most_rows is None or self._most_rows >= B, f"{B} rows, more than {MAX_ROWS}")
        self._require_cache(cache, B)
        if (longest := int(cache.lengths.max())) >= cache.max_length:
            raise ValueError(f"the KV cache holds {cache.max_length} tokens; {longest + 1} are needed")
        logits, slots = torch.empty(B, self._vocabulary), torch.arange(B)
        step, positions, ids = self._step, cache.lengths.contiguous(), tokens.contiguous()
        step.keys, step.values = cache.keys.data_ptr(), cache.values.data_ptr()
        step.layer_stride, step.slot_stride, step.head_stride, step.position_stride, _ = cache.keys.stride()
        step.cache_kind = KINDS[cache.keys.dtype]
        library = cpu_nf4.library()
        assert library is not None
        for first in range(0, B, MAX_ROWS):
            some = slice(first, first + MAX_ROWS)
            pointers = [tensor[some].data_ptr() for tensor in (ids, positions, slots, logits)]
            step.rows, step.ids, step.positions, step.slots, step.logits = min(MAX_ROWS, B - first), *pointers
            library.decode_step(ctypes.byref(step))
        cache.lengths = cache.lengths + 1
        return logits.to(self._dtype)

    def _require_cache(self, cache: KVCache, num_rows: int) -> None:
        keys, values, step = cache.keys, cache.values, self._step
        shape = (step.num_layers, num_rows, step.K, keys.shape[3], step.E)
        fits = keys.shape == values.shape == shape and cache.max_length <= self._max_length and len(cache.lengths) == num_rows
        plain = keys.is_cpu and keys.dtype in KINDS and values.dtype == keys.dtype
        require(fits and plain, "the KV cache has another shape or dtype")
        require(keys.stride(-1) == 1 and keys.stride() == values.stride(), "the KV cache lies in another way")
