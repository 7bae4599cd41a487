"""A model's shape in llama.cpp's words: the keys, the names and the row order that ``gguf_file`` reads, written.

Refused are models that llama.cpp would compute otherwise: a sliding window (its ``llama`` and ``qwen2`` ignore the key), an
architecture without a name in ``ARCHITECTURE``, biases, head lengths, a stretched RoPE and ``ModelConfig.switches`` that an
architecture does not have there. The lengths of a head are always written: without them a reader divides hidden size by
heads, which is wrong for Qwen3.

Ref: llama.cpp, ``gguf-py/gguf/constants.py``.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from minisft.common.errors import UserError, listing, visible
from minisft.config import ModelConfig
from minisft.formats.gguf_file import INNER, OUTER, frequencies
from minisft.formats.gguf_header import Metadata

ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> theirs
_THEIR_OUTER = {ours: theirs for theirs, ours in OUTER.items()}
_THEIR_INNER = {ours: theirs for theirs, ours in INNER.items()}
_CONVERTER = "write a folder with minisft merge and try llama.cpp's own convert_hf_to_gguf.py"


def architecture_of(config: ModelConfig, where: str) -> str:
    """llama.cpp's architecture that computes what this model computes.

    Raises:
        UserError: ``model/no-gguf``, with what it cannot have and the way out.
    """
    what, found, expected, fix = "", "", "", _CONVERTER
    if config.model_type not in ARCHITECTURE:
        what, found, expected = "this architecture is not exported to GGUF", config.model_type, listing(ARCHITECTURE)
    elif (window := config.sliding_window) is not None:
        what, found = "llama.cpp does not compute this architecture's sliding window", f"a window of {window} tokens"
        expected = "full attention"
        fix = (
            f"within {window} tokens the model is the same without it: in a copy of the folder set sliding_window to null and "
            f"max_position_embeddings to {window} in config.json, and export that"
        )
    elif ARCHITECTURE[config.model_type] != "llama" and (config.o_bias or config.mlp_bias):
        what, found = "llama.cpp's form of this architecture has no such biases", "biases outside q, k and v"
        expected = "biases of q, k and v alone"
    elif ARCHITECTURE[config.model_type] != "llama" and config.rope_scaling is not None:
        what, found = "llama.cpp's form of this architecture has no such stretching of RoPE", "rope_type llama3"
        expected = "rope_type default"
    elif config.model_type == "qwen2" and config.num_heads * config.head_dim != config.hidden_size:
        what, found = "llama.cpp's qwen2 has no head length of its own", f"{config.num_heads} heads of {config.head_dim}"
        expected = f"heads that make up the hidden size, {config.hidden_size}"
    elif config.qk_norm != (config.model_type == "qwen3"):
        what, found = "llama.cpp's form of this architecture has other norms of q and k", f"qk_norm {config.qk_norm}"
        expected = f"qk_norm {not config.qk_norm}"
    elif config.switches:
        what, found = "llama.cpp's form of this architecture has no such switch", listing(config.switches)
        expected = "the switches of Llama, Mistral, Qwen2 and Qwen3"
    if what:
        raise UserError("model/no-gguf", what, where=where, found=visible(found), expected=expected, fix=fix)
    return ARCHITECTURE[config.model_type]


def shape_keys(config: ModelConfig, architecture: str) -> Metadata:
    """The metadata that says what is computed, with the architecture as prefix."""
    values: Metadata = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    return {f"{architecture}.{name}": value for name, value in values.items()}


def llama_cpp_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``: the inverse of ``hugging_face_name``."""
    if name in _THEIR_OUTER:
        return _THEIR_OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_THEIR_INNER[part]}.{kind}"


def their_order(name: str, config: ModelConfig) -> Tensor | None:
    """Which of our rows stands at each place of llama.cpp's q and k of the ``llama`` architecture; None: the same rows.

    Within each head ours are (half, pair), theirs (pair, half): x_0, x_{E/2}, x_1, x_{E/2 + 1}, ... Biases too.

    Returns:
        (heads * E,) int64, or None.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2] if "." in name else "")
    if heads is None or ARCHITECTURE.get(config.model_type) != "llama":
        return None
    rows = torch.arange(heads * config.head_dim)
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten()


def rope_factors(config: ModelConfig) -> Tensor | None:
    """How much Llama 3's RoPE stretches each wave, original / stretched frequency, (E/2,) fp32; None without stretching."""
    if config.rope_scaling is None:
        return None
    return (frequencies(dataclasses.replace(config, rope_scaling=None)) / frequencies(config)).float()
