"""``config.json`` of Hugging Face, read into a fixed dataclass and written back.

Two dialects are in use: transformers 4 writes ``torch_dtype``, ``rope_theta`` and ``rope_scaling``; transformers 5 writes
``dtype`` and ``rope_parameters``. Both are read, and what is written holds both. Only the keys named here are looked at; a
key that would change the arithmetic in a way this library does not know is refused by name, and nothing in the file can
name code to run.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.config import ModelConfig, RopeScaling
from minisft.formats.fields import Fields, read_json_object
from minisft.formats.source import regular_file


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` differs where the file is silent.

    Args:
        architecture: the class name that transformers writes and loads.
        num_kv_heads, head_dim: the defaults of transformers; None follows from the other sizes.
        has_window: whether ``sliding_window`` means anything.
    """

    architecture: str
    num_kv_heads: int | None = None
    head_dim: int | None = None
    has_window: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", num_kv_heads=8, has_window=True),
    "qwen2": Family("Qwen2ForCausalLM", num_kv_heads=32, has_window=True),
    "qwen3": Family("Qwen3ForCausalLM", num_kv_heads=32, head_dim=128, has_window=True),
}
# torch's word for a dtype -> the word in a safetensors header
STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def read_config(folder: Path) -> tuple[ModelConfig, str | None]:
    """Parse ``config.json``.

    Returns:
        the shape, and the dtype that the file names for the weights (``BF16``, in the word of safetensors; None without one).

    Raises:
        UserError: no such file, unsupported architecture, RoPE type or activation (named), absurd numbers.
    """
    if not (folder / "config.json").exists():
        raise _no_config(folder)
    path = regular_file(folder, "config.json")
    fields = Fields(read_json_object(path, "model/bad-config"), visible(path))
    model_type = fields.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise fields.error("model_type", listing(FAMILIES), "unsupported")
    _refuse_unknown_arithmetic(fields, model_type)
    return _shape(fields, model_type), _stored_dtype(fields)


def _no_config(folder: Path) -> UserError:
    shown = visible(folder)
    if (folder / "adapter_config.json").exists():
        return UserError(
            "model/no-config",
            "this folder holds an adapter, not a model",
            where=shown,
            expected="config.json",
            fix=f"give the base model with --model and this folder with --adapter {shown}",
        )
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    fix = (
        f"give the file itself: {visible(folder / ggufs[0])}"
        if ggufs
        else "name the folder that holds config.json and the weights"
    )
    return UserError("model/no-config", "the model folder has no config.json", where=shown, fix=fix)


def _refuse_unknown_arithmetic(fields: Fields, model_type: str) -> None:
    architectures = fields.values.get("architectures")
    if architectures not in (None, [], [FAMILIES[model_type].architecture]):
        raise fields.error("architectures", f"[{FAMILIES[model_type].architecture}]", "unsupported")
    activation = fields.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.error("hidden_act", "silu", "unsupported")
    if fields.values.get("quantization_config") is not None:
        _refuse_unknown_quantization(fields.inner("quantization_config"))
    if fields.values.get("auto_map") is not None:
        warnings.warn(f"{fields.where}: auto_map names code to run; it is ignored", stacklevel=4)


def _refuse_unknown_quantization(quantization: Fields) -> None:
    """Only bitsandbytes in 4 bits is read. Its other settings are not looked at: each weight in the file says what it is."""
    expected = "unquantized weights, or bitsandbytes with load_in_4bit"
    if quantization.values.get("quant_method", "bitsandbytes") != "bitsandbytes":  # files of 2023 do not name it
        raise quantization.error("quant_method", expected, "unsupported")
    if not quantization.flag("load_in_4bit"):
        raise quantization.error("load_in_4bit", expected, "unsupported")


def _shape(fields: Fields, model_type: str) -> ModelConfig:
    family = FAMILIES[model_type]
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    bias = fields.flag("attention_bias")
    theta, scaling = _rope(fields)
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", family.num_kv_heads or heads),
        head_dim=fields.integer("head_dim", family.head_dim or hidden // max(heads, 1)),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        # Of the four only llama and qwen3 read attention_bias; qwen2 always has it on q, k and v and never on o.
        qkv_bias=model_type == "qwen2" or (bias and model_type != "mistral"),
        o_bias=bias and model_type in ("llama", "qwen3"),
        mlp_bias=fields.flag("mlp_bias") and model_type == "llama",
        qk_norm=model_type == "qwen3",
        sliding_window=_window(fields, model_type) if family.has_window else None,
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (dialect 5), else ``rope_theta`` and ``rope_scaling`` (dialect 4)."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    value = fields.values.get(name) or {}
    if not isinstance(value, dict):
        raise fields.error(name, "an object or null")
    rope = Fields(value, f"{fields.where}: {name}")
    for owner in (fields, rope):
        if owner.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise owner.error("partial_rotary_factor", "1", "unsupported")
    word = "type" if "rope_type" not in value and "type" in value else "rope_type"
    kind = value.get(word, "default")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if nested := [key for key, inner in value.items() if isinstance(inner, dict)]:
        raise rope.error(nested[0], "one RoPE for all layers", "unsupported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.error(word, "default or llama3", "unsupported")
    return theta, _llama3(rope, fields.integer("max_position_embeddings", 2048))


def _llama3(rope: Fields, longest: int) -> RopeScaling:
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", longest),
    )
    if not (
        scaling.factor >= 1
        and 0 < scaling.low_freq_factor < scaling.high_freq_factor
        and scaling.original_max_position_embeddings >= 1
    ):
        raise rope.error("factor", "llama3 scaling with a factor of at least 1 and 0 < low_freq_factor < high_freq_factor")
    return scaling


def _window(fields: Fields, model_type: str) -> int | None:
    """The one window of all layers, or None; layers that differ from each other are refused."""
    num_layers, is_mistral = fields.integer("num_hidden_layers"), model_type == "mistral"
    absent = "sliding_window" not in fields.values  # transformers then takes 4096; null says there is none
    window = fields.integer("sliding_window", 4096) if absent or fields.values["sliding_window"] is not None else None
    if is_mistral or window is None or not fields.flag("use_sliding_window"):
        return window if is_mistral else None
    first = min(max(fields.integer("max_window_layers", 28), 0), num_layers)
    full, sliding = ["full_attention"] * num_layers, ["sliding_attention"] * num_layers
    kinds = fields.values.get("layer_types") or full[:first] + sliding[first:]
    if kinds not in (full, sliding):
        raise fields.error("layer_types", "the same attention in every layer", "unsupported")
    return window if kinds == sliding else None


def _stored_dtype(fields: Fields) -> str | None:
    name = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    if fields.values.get(name) is None:
        return None
    word = fields.text(name).removeprefix("torch.")
    if word not in STORED_AS:
        raise fields.error(name, listing(STORED_AS))
    return STORED_AS[word]


def write_config(
    config: ModelConfig,
    dtype: torch.dtype,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int,
    kept: Mapping[str, JSON] | None = None,
) -> dict[str, JSON]:
    """The content of a ``config.json`` that transformers 4 and 5 both read.

    Args:
        config: the shape.
        dtype: of the stored weights.
        bos_id, eos_ids, pad_id: token ids.
        kept: keys of the base's file; those that are written here win.

    Returns:
        the JSON object.

    Raises:
        UserError: switches that transformers does not combine in this family, so that the file could not hold them.
    """
    name = str(dtype).removeprefix("torch.")
    scaling: dict[str, JSON] = (
        {} if config.rope_scaling is None else {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    )
    written: dict[str, JSON] = {
        "architectures": [FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **scaling},
        "torch_dtype": name,
        "dtype": name,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
        "pad_token_id": pad_id,
    }
    written.update(_written_window(config))
    written = {**(kept or {}), **written}
    if _shape(Fields(written, "config.json"), config.model_type) != config:
        raise UserError(
            "model/unsupported",
            "config.json has no words for this model",
            found=visible(config),
            expected=f"the switches of {config.model_type}",
        )
    return written


def _written_window(config: ModelConfig) -> dict[str, JSON]:
    if config.model_type == "llama":
        return {}
    if config.model_type == "mistral":
        return {"sliding_window": config.sliding_window}
    uses = config.sliding_window is not None
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": uses,
        "max_window_layers": 0 if uses else config.num_layers,
    }
