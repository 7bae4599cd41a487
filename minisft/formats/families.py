"""What each ``model_type`` of Hugging Face means: its defaults, and how its switches are read and written.

The decoder knows switches, not families (``config.ModelConfig``); this table is where the one becomes the other. Every reader
has its writer beside it, and ``hf_config.write_config`` reads back what it wrote, so a switch that a family has no word for
cannot be lost. A value that would change the arithmetic in a way the decoder does not know is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.common.safe_json import JSON
from minisft.config import ModelConfig
from minisft.formats.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
Switches = dict[str, Any]  # fields of ModelConfig


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` differs where the file is silent, and its switches.

    Args:
        architecture: the class name that transformers writes and loads.
        read: the switches that a ``config.json`` sets.
        write: the keys of ``config.json`` that set them again.
        num_kv_heads, head_dim: the defaults of transformers; None follows from the other sizes.
        tied, eps, context, theta: its defaults for ``tie_word_embeddings``, ``rms_norm_eps``, ``max_position_embeddings``
            and RoPE's base.
        activation: the key that names the activation, and the names that mean the family's own.
        local_theta: RoPE's base in the layers with a window, if they have one of their own.
    """

    architecture: str
    read: Callable[[Fields], Switches]
    write: Callable[[ModelConfig], dict[str, JSON]]
    num_kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    eps: float = 1e-6
    context: int = 2048
    theta: float = 10000.0
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu", "swish"))
    local_theta: float | None = None


# ---- windows ---------------------------------------------------------------------------------------------------------


def _windows(fields: Fields, window: int | None, default: Sequence[str]) -> Switches:
    """The window of the layers that ``layer_types``, or else ``default``, calls sliding."""
    kinds = fields.values.get("layer_types") or list(default)
    if not isinstance(kinds, list) or len(kinds) != len(default) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise fields.error("layer_types", f"{len(default)} times {FULL} or {SLIDING}", "unsupported")
    if window is None or SLIDING not in kinds:
        return {"sliding_window": None}
    return {"sliding_window": window, "global_layers": tuple(i for i, kind in enumerate(kinds) if kind == FULL)}


def _layer_types(config: ModelConfig) -> list[JSON]:
    return [FULL if config.window(layer) is None else SLIDING for layer in range(config.num_layers)]


def _window(fields: Fields, absent: int) -> int | None:
    """``sliding_window``: null says there is none; where it is missing transformers takes ``absent``."""
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return None
    return fields.integer("sliding_window", absent)


def _read_qwen_windows(fields: Fields) -> Switches:
    num_layers = fields.integer("num_hidden_layers")
    first = min(max(fields.integer("max_window_layers", 28), 0), num_layers)
    window = _window(fields, 4096) if fields.flag("use_sliding_window") else None
    if window is None:  # then nothing else matters
        return {"sliding_window": None}
    return _windows(fields, window, [FULL] * first + [SLIDING] * (num_layers - first))


def _write_qwen_windows(config: ModelConfig) -> dict[str, JSON]:
    uses = config.sliding_window is not None
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": uses,
        "max_window_layers": 0 if uses else config.num_layers,
        "layer_types": _layer_types(config),
    }


# ---- one reader and one writer for each family -----------------------------------------------------------------------


def _biases(fields: Fields) -> Switches:
    bias = fields.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def _write_biases(config: ModelConfig) -> dict[str, JSON]:
    return {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


def _llama(fields: Fields) -> Switches:
    return {**_biases(fields), "mlp_bias": fields.flag("mlp_bias")}


def _mistral(fields: Fields) -> Switches:
    return {"sliding_window": _window(fields, 4096)}


def _write_mistral(config: ModelConfig) -> dict[str, JSON]:
    return {**_write_biases(config), "sliding_window": config.sliding_window}


def _qwen2(fields: Fields) -> Switches:
    return {"qkv_bias": True, **_read_qwen_windows(fields)}  # always, whatever attention_bias says, and never on o


def _qwen3(fields: Fields) -> Switches:
    return {**_biases(fields), "qk_norm": True, **_read_qwen_windows(fields)}


def _write_qwen(config: ModelConfig) -> dict[str, JSON]:
    return {**_write_biases(config), **_write_qwen_windows(config)}


def _smollm3(fields: Fields) -> Switches:
    num_layers = fields.integer("num_hidden_layers")
    interval = fields.integer("no_rope_layer_interval", 4)
    uses_rope = fields.values.get("no_rope_layers") or [int((i + 1) % max(interval, 1) != 0) for i in range(num_layers)]
    if not isinstance(uses_rope, list) or len(uses_rope) < num_layers or any(flag not in (0, 1) for flag in uses_rope):
        raise fields.error("no_rope_layers", f"{num_layers} times 1 (RoPE) or 0 (none)")
    window = _window(fields, 0) or None if fields.flag("use_sliding_window") else None
    default = [FULL if flag or window is None else SLIDING for flag in uses_rope[:num_layers]]
    nope = tuple(i for i, flag in enumerate(uses_rope[:num_layers]) if not flag)
    return {**_llama(fields), "nope_layers": nope, **_windows(fields, window, default)}


def _write_smollm3(config: ModelConfig) -> dict[str, JSON]:
    return {
        **_write_biases(config),
        "no_rope_layers": [int(layer not in config.nope_layers) for layer in range(config.num_layers)],
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }


_GRANITE = {
    "embedding_multiplier": "embedding_multiplier",
    "attention_multiplier": "attention_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_divisor": "logits_scaling",
}  # ours: theirs, each 1 where it is missing


def _granite(fields: Fields) -> Switches:
    return {**_llama(fields), **{ours: fields.number(theirs, 1.0) for ours, theirs in _GRANITE.items()}}


def _write_granite(config: ModelConfig) -> dict[str, JSON]:
    return {**_write_biases(config), **{theirs: getattr(config, ours) for ours, theirs in _GRANITE.items()}}


def _olmo2(fields: Fields) -> Switches:
    return {**_biases(fields), "qk_norm": True, "qk_norm_flat": True, "norms": "after"}


def _gemma3(fields: Fields) -> Switches:
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if fields.values.get(name) not in (None, False):
            raise fields.error(name, "null or false", "unsupported")
    num_layers, scalar = fields.integer("num_hidden_layers"), fields.integer("query_pre_attn_scalar", 256)
    if scalar < 1:
        raise fields.error("query_pre_attn_scalar", "a positive integer")
    pattern = max(fields.integer("sliding_window_pattern", 6), 1)
    default = [SLIDING if (i + 1) % pattern else FULL for i in range(num_layers)]
    cap = None if fields.values.get("final_logit_softcapping") is None else fields.number("final_logit_softcapping")
    return {
        **_biases(fields),
        **_windows(fields, _window(fields, 4096), default),
        "qk_norm": True,
        "norms": "both",
        "norm_plus_one": True,
        "activation": "gelu",
        "embedding_multiplier": math.sqrt(fields.integer("hidden_size")),
        "attention_multiplier": None if scalar == fields.integer("head_dim", 256) else scalar**-0.5,
        "logits_softcap": cap,
    }


def _write_gemma3(config: ModelConfig) -> dict[str, JSON]:
    multiplier = config.attention_multiplier
    return {
        "attention_bias": config.o_bias,
        "query_pre_attn_scalar": config.head_dim if multiplier is None else round(multiplier**-2),
        "sliding_window": config.sliding_window or 4096,  # transformers wants a number though no layer uses it
        "layer_types": _layer_types(config),
        "final_logit_softcapping": config.logits_softcap,
    }


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _write_biases),
    "mistral": Family("MistralForCausalLM", _mistral, _write_mistral, num_kv_heads=8),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _write_qwen, num_kv_heads=32),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _write_qwen, num_kv_heads=32, head_dim=128),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, _write_smollm3, num_kv_heads=4, tied=True, context=32768, theta=2e6),
    "granite": Family("GraniteForCausalLM", _granite, _write_granite),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, _write_biases, eps=1e-5),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        _write_gemma3,
        num_kv_heads=4,
        head_dim=256,
        tied=True,
        context=131072,
        theta=1e6,
        activation=("hidden_activation", ("gelu_pytorch_tanh",)),
        local_theta=1e4,
    ),
}
