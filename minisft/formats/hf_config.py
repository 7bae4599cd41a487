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
from pathlib import Path

import torch

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.config import ModelConfig, RopeScaling
from minisft.formats.families import FAMILIES, FULL, SLIDING, Family
from minisft.formats.fields import Fields, read_json_object
from minisft.formats.source import regular_file

WITH_TRANSFORMERS = (
    "pip install 'minisft[any]': then transformers computes it where a model is trained, asked or evaluated; its adapters are "
    "merged with PEFT"
)
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
        raise fields.error("model_type", listing(FAMILIES), "unsupported", WITH_TRANSFORMERS)
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
    key, known = FAMILIES[model_type].activation
    if fields.values.get(key, known[0]) not in known:
        raise fields.error(key, known[0], "unsupported")
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
    theta, scaling = _rope(_rope_values(fields, FULL), fields, family.theta, family.context)
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", family.num_kv_heads or heads),
        head_dim=fields.integer("head_dim", family.head_dim or hidden // max(heads, 1)),
        rms_norm_eps=fields.number("rms_norm_eps", family.eps),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.integer("max_position_embeddings", family.context),
        tie_word_embeddings=fields.flag("tie_word_embeddings", family.tied),
        local_rope_theta=_local_theta(fields, family),
        **family.read(fields),
    )


def _rope_values(fields: Fields, kind: str) -> Fields:
    """``rope_parameters`` (dialect 5), those of one kind of layer if they differ, else ``rope_scaling`` (dialect 4)."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    rope = fields.inner(name)
    has_local = FAMILIES[str(fields.values["model_type"])].local_theta is not None
    if has_local and name == "rope_parameters" and set(rope.values) <= {FULL, SLIDING}:
        return rope.inner(kind)
    if nested := [key for key, inner in rope.values.items() if isinstance(inner, dict)]:
        raise rope.error(nested[0], "one RoPE for all layers", "unsupported")
    return rope if kind == FULL else Fields({}, rope.where)


def _local_theta(fields: Fields, family: Family) -> float | None:
    """RoPE's base in the layers with a window, for a family where they have their own."""
    if family.local_theta is None:
        return None
    values = _rope_values(fields, SLIDING)
    theta, scaling = _rope(values, Fields({}, fields.where), fields.number("rope_local_base_freq", family.local_theta), 0)
    if scaling is not None:
        raise values.error("rope_type", "default in the layers with a window", "unsupported")
    return theta


def _rope(rope: Fields, fields: Fields, default: float, longest: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from RoPE's own object, or from the keys of dialect 4 around it."""
    for owner in (fields, rope):
        if owner.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise owner.error("partial_rotary_factor", "1", "unsupported")
    word = "type" if "rope_type" not in rope.values and "type" in rope.values else "rope_type"
    kind = rope.values.get(word, "default")
    theta = rope.number("rope_theta", fields.number("rope_theta", default))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.error(word, "default or llama3", "unsupported")
    return theta, _llama3(rope, fields.integer("max_position_embeddings", longest))


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
    name, family = str(dtype).removeprefix("torch."), FAMILIES[config.model_type]
    scaling: dict[str, JSON] = (
        {} if config.rope_scaling is None else {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    )
    written: dict[str, JSON] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation[0]: family.activation[1][0],
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **scaling},
        "torch_dtype": name,
        "dtype": name,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
        "pad_token_id": pad_id,
    }
    if config.local_rope_theta is not None:
        local: dict[str, JSON] = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        written["rope_parameters"] = {FULL: written["rope_parameters"], SLIDING: local}
        written["rope_local_base_freq"] = config.local_rope_theta
    written.update(family.write(config))
    written = {**(kept or {}), **written}
    if _shape(Fields(written, "config.json"), config.model_type) != config:
        raise UserError(
            "model/unsupported",
            "config.json has no words for this model",
            found=visible(config),
            expected=f"the switches of {config.model_type}",
        )
    return written
