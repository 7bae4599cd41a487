"""Model folders as Hugging Face lays them out: ``config.json``, safetensors in one file or in shards, an index.

Reading checks everything that can be checked without touching a weight (which tensors, in which file, of which shape and
dtype), then streams. Writing produces what transformers loads with equal logits. Pickled weights are refused by name. The
idea to take home: the index is a claim by a stranger; each line of it is held against the files before it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from minisft.durable import disk_errors, require_space, staged_folder
from minisft.errors import UserError, listing, visible
from minisft.formats.fields import read_json_object, write_json
from minisft.formats.hf_config import read_config, write_config
from minisft.formats.safetensors_file import Header, read_header, read_tensors, write_safetensors
from minisft.formats.source import PICKLES, pickle_error, regular_file
from minisft.formats.stream import EMBEDDING, HEAD, check_memory, check_shapes, empty_model, expected_shapes, fill_
from minisft.model import CausalLM
from minisft.safe_json import JSON
from minisft.surgery import lora_modules
from minisft.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 2**20
MAX_SHARD_BYTES = 4 * 10**9
# Old Llama files carry RoPE's frequencies; they follow from the configuration and transformers ignores them too.
_DERIVED = ".rotary_emb.inv_freq"


def load_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[CausalLM, str]:
    """Build the model that a folder describes and stream the weights into it.

    Returns:
        the model, and the dtype most of its weights were stored in (``BF16``).

    Raises:
        UserError: any of the refusals of this module, before memory for the weights is allocated.
    """
    config, stored = read_config(folder)
    headers = read_headers(folder)
    model = empty_model(config)
    expected = expected_shapes(model)
    declared = {
        name: entry.shape for header in headers for name, entry in header.entries.items() if not name.endswith(_DERIVED)
    }
    if config.tie_word_embeddings and HEAD in declared:
        expected[HEAD] = expected[EMBEDDING]
    check_shapes(expected, declared, folder)
    file_dtype = _check_dtypes(headers, stored)
    if config.tie_word_embeddings and HEAD in declared:
        _check_tied(headers)
    check_memory(expected, dtype, device)
    fill_(model, _weights(headers, dtype, config.tie_word_embeddings), dtype, device)
    return model, file_dtype


def read_headers(folder: Path) -> list[Header]:
    """The checked headers of all weight files of a folder; each tensor is in exactly one of them.

    Raises:
        UserError: no weights, pickles only, an index that disagrees with the files.
    """
    if (folder / INDEX).exists():
        return _read_sharded(folder)
    if (folder / SINGLE).exists():
        return [read_header(regular_file(folder, SINGLE))]
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            raise pickle_error(file, folder)
    raise UserError(
        "model/no-weights", "the model folder has no weights", where=visible(folder), expected=f"{SINGLE} or {INDEX}"
    )


def _read_sharded(folder: Path) -> list[Header]:
    index_path = regular_file(folder, INDEX)
    weight_map = read_json_object(index_path, "model/index", MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("model/index", "the index has no weight_map", where=visible(index_path))
    claimed: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise UserError(
                "model/index",
                "the index names something that is no safetensors file",
                where=f"{visible(index_path)}: {visible(name)}",
                found=visible(shard),
            )
        claimed[name] = shard
    headers = [read_header(regular_file(folder, shard, "model/shard")) for shard in sorted(set(claimed.values()))]
    _check_index(claimed, headers, index_path)
    return headers


def _check_index(claimed: dict[str, str], headers: list[Header], index_path: Path) -> None:
    holders = Counter(name for header in headers for name in header.entries)
    if twice := [name for name, count in holders.items() if count > 1]:
        raise UserError(
            "model/index",
            "tensors lie in two shards",
            where=visible(index_path),
            found=listing(twice, 6),
            expected="each in one",
        )
    for header in headers:
        inside, promised = set(header.entries), {name for name, shard in claimed.items() if shard == header.path.name}
        if absent := sorted(promised - inside):
            raise UserError(
                "model/index",
                "the index names tensors that the shard does not hold",
                where=visible(header.path),
                found=listing(absent, 6),
            )
        if extra := sorted(inside - promised):
            raise UserError(
                "model/index",
                "the shard holds tensors that the index does not name there",
                where=visible(header.path),
                found=listing(extra, 6),
            )


def _check_dtypes(headers: list[Header], stored: str | None) -> str:
    """The most frequent dtype; every tensor must be a float, and of the dtype that the configuration states."""
    counts: Counter[str] = Counter()
    for header in headers:
        for name, entry in header.entries.items():
            counts[entry.dtype] += entry.end - entry.begin
            allowed = (stored,) if stored else ("F32", "F16", "BF16", "F64")
            if entry.dtype not in allowed and not name.endswith(_DERIVED):
                raise UserError(
                    "model/dtype",
                    f"tensor {visible(name)} has another dtype than the configuration says"
                    if stored
                    else f"tensor {visible(name)} is not a float",
                    where=visible(header.path),
                    found=entry.dtype,
                    expected=" or ".join(allowed),
                    fix="correct torch_dtype (or dtype) in config.json if the weights are right" if stored else "",
                )
    return counts.most_common(1)[0][0]


def _check_tied(headers: list[Header]) -> None:
    """A head that is stored although the configuration ties it must be the embedding."""
    wanted = [(header, name) for header in headers for name in (EMBEDDING, HEAD) if name in header.entries]
    embedding, head = (tensor for header, name in wanted for _, tensor in read_tensors(header, [name]))
    if not torch.equal(embedding, head):
        raise UserError(
            "model/tied",
            "the configuration ties the output head to the embedding, but the file stores different weights for the two",
            where=visible(headers[0].path.parent),
            fix="set tie_word_embeddings to false in config.json if the model was trained untied",
        )


def _weights(headers: list[Header], dtype: torch.dtype, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for header in headers:
        names = [name for name in header.entries if not name.endswith(_DERIVED) and not (tied and name == HEAD)]
        for name, tensor in read_tensors(header, names):
            yield name, tensor.to(dtype, copy=True)  # a copy: the memory of the view is the file


def save_model(
    model: CausalLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers and this library load; it appears whole or not at all.

    Args:
        model: dense, without adapters.
        tokenizer: saved beside the weights, with its chat template.
        folder: new, or empty.
        dtype: of the stored weights; the model's own by default. Rounded once, from the weights as they are.
        max_shard_bytes: weights beyond this go into several files; one tensor is never split.

    Raises:
        UserError: adapters that are not merged, quantized layers, a target that is in use, a disk that is full.
    """
    _require_dense(model)
    dtype = model.dtype if dtype is None else dtype
    config = write_config(model.config, dtype, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id)
    generation: dict[str, JSON] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())  # a tied head is not listed twice, nor stored
    total_bytes = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    with disk_errors(Path(folder), total_bytes), staged_folder(folder) as staging:
        require_space(staging, total_bytes)
        tokenizer.save(staging)
        write_json(staging / "config.json", config)
        write_json(staging / "generation_config.json", generation)
        _write_weights(staging, weights, dtype, max_shard_bytes)


def _require_dense(model: CausalLM) -> None:
    if adapters := lora_modules(model):
        raise UserError(
            "adapter/not-merged",
            "the model has adapters",
            found=listing(adapters, 3),
            fix="merge them first, or save them alone with save_adapter",
        )
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if found != expected_shapes(empty_model(model.config)):
        raise UserError("model/not-dense", "the model is not what its configuration says", fix="dequantize or merge it first")


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards = _plan({name: weight.numel() * dtype.itemsize for name, weight in weights.items()}, max_shard_bytes)
    files = (
        [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, names in zip(files, shards, strict=True):
        write_safetensors({name: weights[name].detach().to(dtype) for name in names}, folder / file)
    if len(shards) > 1:
        total: JSON = {"total_size": sum(weight.numel() for weight in weights.values()) * dtype.itemsize}
        weight_map: JSON = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def _plan(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Tensors in the model's order, in as many groups of at most ``limit`` bytes as that takes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
