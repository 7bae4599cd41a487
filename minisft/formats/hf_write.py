"""Writing model folders that transformers loads with equal logits: dense, or with linears in 4 bits as bitsandbytes has them.

A folder appears whole or not at all. Nothing is trained, merged or quantized here: a model with adapters is refused, and
layers in 4 bits are written as they are. The idea to take home: a file is the model's own tensors under agreed names, and
``config.json`` states what they are; what it has no words for must not be written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minisft.common.atomic_files import disk_errors, require_space, staged_folder
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.common.shares import Later, made
from minisft.data.tokenizer import Tokenizer
from minisft.formats.base_settings import folder_of, keep_settings, kept_config, not_kept
from minisft.formats.bnb import QUANTIZED_FROM, quantization_config, stored_tensors
from minisft.formats.fields import read_json_object, write_json
from minisft.formats.foreign import ForeignLM
from minisft.formats.foreign_files import write_foreign
from minisft.formats.hf_config import write_config
from minisft.formats.loading import empty_model, expected_shapes
from minisft.formats.shard_writer import MAX_SHARD_BYTES, TensorSpec, write_shards
from minisft.formats.source import origin_of
from minisft.model import CausalLM
from minisft.surgery import lora_modules, nf4_modules


class _Stored(NamedTuple):
    """A tensor, and the dtype to write it in."""

    tensor: torch.Tensor | Later
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.tensor.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SavedSizes:
    """What ``save_quantized`` wrote.

    Args:
        dense_bytes: of the weights if all of them were stored in the dtype of the dense ones.
        stored_bytes: of the weights as they are stored.
        num_quantized, num_dense: linears in 4 bits, and the others.
        not_kept: of the base's settings, as ``base_settings.keep_settings`` names them.
    """

    dense_bytes: int
    stored_bytes: int
    num_quantized: int
    num_dense: int
    not_kept: tuple[str, ...] = ()


def save_model(
    model: CausalLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    settings: str | Path | None = None,
    weights: Mapping[str, Later] | None = None,
) -> None:
    """Write a folder that transformers and this library load; it appears whole or not at all.

    Args:
        model: dense, without adapters.
        tokenizer: saved beside the weights, with its chat template.
        folder: new, or empty.
        dtype: of the stored weights; the model's own by default. Rounded once, from the weights as they are.
        max_shard_bytes: weights beyond this go into several files; one tensor is never split.
        settings: the folder whose settings are kept (sampling defaults, those of the tokenizer); by default the one that the
            model came from. What cannot be kept is named in a warning.
        weights: the numbers by name, made one tensor at a time, of a model that holds a share of them.

    Raises:
        UserError: adapters that are not merged, quantized layers, a target that is in use, a disk that is full.
    """
    if quantized := nf4_modules(model):
        raise UserError(
            "model/not-dense",
            "the model has layers in 4 bits",
            found=listing(quantized, 3),
            fix="dequantize them first, or save it with save_quantized",
        )
    _require_whole(model)
    dtype = model.dtype if dtype is None else dtype
    base = _settings_of(model, settings)
    if isinstance(model, ForeignLM):
        lost = _write_foreign_folder(model, Path(folder), tokenizer, dtype, max_shard_bytes, base)
    else:
        config = _config(model, tokenizer, dtype, base)
        stored = _dense_weights(model, dtype) if weights is None else {k: _Stored(t, dtype) for k, t in weights.items()}
        lost = _write_folder(Path(folder), tokenizer, config, stored, {}, max_shard_bytes, base)
    if lost:
        warnings.warn(f"{visible(folder)}{not_kept(lost)}", stacklevel=2)


def _write_foreign_folder(
    model: ForeignLM, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype, max_shard_bytes: int, base: Path | None
) -> tuple[str, ...]:
    total_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    with disk_errors(folder, total_bytes), staged_folder(folder) as staging:
        require_space(staging, total_bytes)
        write_foreign(model, staging, dtype, max_shard_bytes)
        config = read_json_object(staging / "config.json", "model/bad-config")
        return write_settings(staging, tokenizer, config, base)


def _settings_of(model: CausalLM, settings: str | Path | None) -> Path | None:
    origin = origin_of(model)
    return folder_of(settings if settings is not None else origin.path if origin else None)


def _config(model: CausalLM, tokenizer: Tokenizer, dtype: torch.dtype, base: Path | None) -> dict[str, JSON]:
    kept = kept_config(base)
    return write_config(model.config, dtype, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, kept)


def save_quantized(
    model: CausalLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantized_from: str | None = None,
    settings: str | Path | None = None,
) -> SavedSizes:
    """Write a folder in bitsandbytes' 4-bit format, which transformers with bitsandbytes and this library load.

    Nothing is quantized here: what is in 4 bits (``NF4Linear``) is written as it is, bit for bit, the rest in ``dtype``.

    Args:
        model: with at least one layer in 4 bits, without adapters.
        tokenizer, folder, dtype, max_shard_bytes, settings: as for ``save_model``; ``dtype`` is of the dense weights.
        quantized_from: the fingerprint of the model whose 4-bit form this is: adapters trained on that model in 4 bits then
            fit the folder.

    Returns:
        sizes before and after, and what was not kept of the base's settings.

    Raises:
        UserError: adapters, no layer in 4 bits, levels or a dtype that the format has no word for, a target that is in
            use, a disk that is full.
    """
    if isinstance(model, ForeignLM):
        raise UserError("model/foreign", "a model that transformers computes is not written in 4 bits", fix="use save_model")
    layers = nf4_modules(model)
    if not layers:
        raise UserError("model/not-quantized", "no layer of the model is in 4 bits", fix="quantize it, or use save_model")
    _require_whole(model)
    dtype = model.dtype if dtype is None else dtype
    weights = _dense_weights(model, dtype)
    for path, layer in layers.items():
        for name, tensor in stored_tensors(f"{path}.weight", layer.quantized).items():
            weights[name] = _Stored(tensor, tensor.dtype)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    base = _settings_of(model, settings)
    config = _config(model, tokenizer, dtype, base)
    config["quantization_config"] = quantization_config(next(iter(layers.values())).quantized, dtype, linears)
    metadata = {} if quantized_from is None else {QUANTIZED_FROM: quantized_from}
    lost = _write_folder(Path(folder), tokenizer, config, weights, metadata, max_shard_bytes, base)
    dense_bytes = sum(math.prod(shape) for shape in expected_shapes(empty_model(model.config)).values()) * dtype.itemsize
    return SavedSizes(dense_bytes, sum(stored.num_bytes for stored in weights.values()), len(layers), len(linears), lost)


def _require_whole(model: CausalLM) -> None:
    """No adapters, and every weight that the configuration promises, dense or in 4 bits."""
    if adapters := lora_modules(model):
        raise UserError(
            "adapter/not-merged",
            "the model has adapters",
            found=listing(adapters, 3),
            fix="merge them first, or save them alone with save_adapter",
        )
    if isinstance(model, ForeignLM):
        return  # what it promises is transformers' business
    found = expected_shapes(model)
    found |= {f"{path}.weight": tuple(layer.quantized.shape) for path, layer in nf4_modules(model).items()}
    if found != expected_shapes(empty_model(model.config)):
        raise UserError("model/not-dense", "the model is not what its configuration says", fix="dequantize or merge it first")


def _dense_weights(model: CausalLM, dtype: torch.dtype) -> dict[str, _Stored]:
    """All parameters by name; a tied head is not listed twice, nor stored."""
    return {name: _Stored(parameter, dtype) for name, parameter in model.named_parameters()}


def _write_folder(
    folder: Path,
    tokenizer: Tokenizer,
    config: dict[str, JSON],
    weights: Mapping[str, _Stored],
    metadata: Mapping[str, str],
    max_shard_bytes: int,
    base: Path | None,
) -> tuple[str, ...]:
    total_bytes = sum(stored.num_bytes for stored in weights.values())
    with disk_errors(folder, total_bytes), staged_folder(folder) as staging:
        require_space(staging, total_bytes)
        lost = write_settings(staging, tokenizer, config, base)
        _write_weights(staging, weights, metadata, max_shard_bytes)
    return lost


def write_settings(folder: Path, tokenizer: Tokenizer, config: dict[str, JSON], base: Path | None = None) -> tuple[str, ...]:
    """Everything in a model folder but the weights.

    Args:
        folder: exists.
        tokenizer: saved with its chat template.
        config: the content of ``config.json``.
        base: a model folder whose other settings are kept.

    Returns:
        what was not kept of the base's settings.
    """
    generation: dict[str, JSON] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    tokenizer.save(folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    return keep_settings(folder, base, tokenizer)


def _write_weights(folder: Path, weights: Mapping[str, _Stored], metadata: Mapping[str, str], max_shard_bytes: int) -> None:
    specs = {name: TensorSpec(stored.dtype, tuple(stored.tensor.shape)) for name, stored in weights.items()}

    def pieces(name: str) -> list[torch.Tensor]:
        return [made(weights[name].tensor).detach().to(weights[name].dtype)]

    write_shards(folder, specs, pieces, metadata, max_shard_bytes)
