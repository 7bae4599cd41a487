"""Model folders as Hugging Face lays them out: ``config.json``, safetensors in one file or in shards, an index.

This module reads them; ``hf_write`` writes. Everything that can be checked without touching a weight (which tensors, in which
file, of which shape and dtype) is checked, then the weights are streamed. Linears may be stored in 4 bits (``bnb`` knows how);
pickled weights are refused by name. The idea to take home: the index is untrusted; each line of it is compared
with the files before it is used.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minisft.common.errors import UserError, listing, visible
from minisft.config import ModelConfig, QuantConfig
from minisft.formats.bnb import QUANTIZED_FROM, StoredWeight, check_quantized, read_quantized, require_same
from minisft.formats.fields import read_json_object
from minisft.formats.file_bytes import read_bytes
from minisft.formats.hf_config import read_config
from minisft.formats.loading import (
    EMBEDDING,
    HEAD,
    check_memory,
    check_shapes,
    empty_model,
    expected_shapes,
    fill_,
    nf4_bytes,
    quantized_bytes,
)
from minisft.formats.safetensors_file import DTYPES, Entry, Header, read_header, read_tensors
from minisft.formats.source import PICKLES, pickle_error, regular_file
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 2**20
COMPARED_ITEMS = 2**20
FLOATS = ("F32", "F16", "BF16", "F64")
# Old Llama files carry RoPE's frequencies; they follow from the configuration and transformers ignores them too.
_DERIVED = ".rotary_emb.inv_freq"


def load_folder(
    folder: Path, dtype: torch.dtype, device: torch.device, quant: QuantConfig | None = None
) -> tuple[CausalLM, str]:
    """Build the model that a folder describes and stream the weights into it.

    Args:
        quant: which linears are quantized when they are read. What the folder holds in 4 bits is taken as it is.
        folder: in Hugging Face's layout.
        dtype: of all parameters that stay dense.
        device: where they go.

    Returns:
        the model, and what most of its weights were stored as (``BF16``; ``NF4`` or ``FP4`` for 4 bits).

    Raises:
        UserError: any of the refusals of this module, before memory for the weights is allocated.
    """
    checked = check_folder(folder)
    if quant is not None:
        require_same(checked.in_4_bits, quant, folder)
    model = empty_model(checked.config)
    held = quantized_bytes(model, quant)
    held |= {name: nf4_bytes(weight.shape.numel(), weight.form) for name, weight in checked.in_4_bits.items()}
    check_memory(expected_shapes(model), dtype, device, held)
    fill_(model, _weights(checked, folder), dtype, device, quant)
    return model, checked.stored_as


@dataclass(frozen=True)
class CheckedFolder:
    """What a model folder holds, certain as far as names, shapes and dtypes go.

    Args:
        headers: of all weight files.
        dense: the tensors that are parameters as they are; a tied head is not among them.
        in_4_bits: the linears that are quantized.
        dense_dtype: of most dense weights, in the file's own word.
    """

    config: ModelConfig
    headers: list[Header]
    dense: set[str]
    in_4_bits: dict[str, StoredWeight]
    dense_dtype: str

    @property
    def stored_as(self) -> str:
        """What most of the weights are stored as (``BF16``; ``NF4`` or ``FP4`` for 4 bits)."""
        return next((weight.levels.upper() for weight in self.in_4_bits.values()), self.dense_dtype)


def check_folder(folder: Path) -> CheckedFolder:
    """Everything that can be known of a folder without touching a weight.

    Raises:
        UserError: any of the refusals of this module, but for what the memory cannot hold.
    """
    config, stated = read_config(folder)
    headers = read_headers(folder)
    model = empty_model(config)
    in_4_bits = _quantized_weights(model, headers, folder)
    expected = expected_shapes(model)
    dense = _dense_names(headers, in_4_bits)
    if config.tie_word_embeddings and HEAD in dense:
        expected[HEAD] = expected[EMBEDDING]
    declared = {name: header.entries[name].shape for header in headers for name in header.entries if name in dense}
    check_shapes({name: shape for name, shape in expected.items() if name not in in_4_bits}, declared, folder)
    dense_dtype = _check_dtypes(headers, dense, stated, folder)
    if config.tie_word_embeddings and HEAD in dense:
        _check_tied(headers)
        dense.remove(HEAD)
    return CheckedFolder(config, headers, dense, in_4_bits, dense_dtype)


def _quantized_weights(model: CausalLM, headers: list[Header], folder: Path) -> dict[str, StoredWeight]:
    """The linears that the folder holds in 4 bits, checked."""
    linears = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: shape for name, shape in expected_shapes(model).items() if name in linears}
    return check_quantized(headers, shapes, folder)


def _dense_names(headers: list[Header], in_4_bits: Mapping[str, StoredWeight]) -> set[str]:
    """The tensors of the files that are parameters as they are."""
    parts = {part for weight in in_4_bits.values() for part in weight.names}
    return {name for header in headers for name in header.entries if name not in parts and not name.endswith(_DERIVED)}


def quantized_from(folder: Path) -> str | None:
    """The fingerprint of the model whose 4-bit form a folder is; None for what ``minisft quantize`` did not write."""
    if not folder.is_dir():
        return None
    named = {header.metadata.get(QUANTIZED_FROM) for header in read_headers(folder)}
    return named.pop() if len(named) == 1 else None


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


def _check_dtypes(headers: list[Header], dense: set[str], stated: str | None, folder: Path) -> str:
    """The dtype that most weights have; every dense tensor must be a float.

    They need not agree with each other, nor with the configuration, which can name one dtype only: after training in 4 bits,
    norms and embeddings are often fp32 beside 16-bit linears. Each is converted once, from what it is; a warning lists them.
    """
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for header in headers:
        for name, entry in header.entries.items():
            if name not in dense:
                continue
            if entry.dtype not in FLOATS:
                what, where = f"tensor {visible(name)} is not a float", visible(header.path)
                raise UserError("model/dtype", what, where=where, found=entry.dtype, expected=" or ".join(FLOATS))
            tensors[entry.dtype] += 1
            weights[entry.dtype] += math.prod(entry.shape)
    most = weights.most_common(1)[0][0]
    if len(tensors) > 1 or stated not in (None, most):
        held = ", ".join(f"{count} tensors {dtype}" for dtype, count in sorted(tensors.items()))
        config = f"; config.json names {stated}" if stated else ""
        warnings.warn(f"{visible(folder)}: {held}{config}; each is converted from what it is", stacklevel=4)
    return most


def _check_tied(headers: list[Header]) -> None:
    """A head that is stored although the configuration ties it must be the embedding."""
    held = {name: (header, header.entries[name]) for header in headers for name in (EMBEDDING, HEAD) if name in header.entries}
    embedding, head = held[EMBEDDING], held[HEAD]
    if not any(_are_equal(embedding, head, DTYPES[entry.dtype]) for _, entry in (embedding, head)):
        raise UserError(
            "model/tied",
            "the configuration ties the output head to the embedding, but the file stores different weights for the two",
            where=visible(headers[0].path.parent),
            fix="set tie_word_embeddings to false in config.json if the model was trained untied",
        )


def _are_equal(one: tuple[Header, Entry], other: tuple[Header, Entry], dtype: torch.dtype) -> bool:
    """Whether two tensors of one shape hold the same numbers in ``dtype``; read a piece at a time."""
    length = math.prod(one[1].shape)

    def piece(header: Header, entry: Entry, begin: int) -> torch.Tensor:
        stored = DTYPES[entry.dtype]
        count = min(COMPARED_ITEMS, length - begin) * stored.itemsize
        raw = read_bytes(header.path, header.data_begin + entry.begin + begin * stored.itemsize, count)
        return raw.view(stored).to(dtype)

    return all(torch.equal(piece(*one, begin), piece(*other, begin)) for begin in range(0, length, COMPARED_ITEMS))


def _weights(checked: CheckedFolder, folder: Path) -> Iterator[tuple[str, torch.Tensor | QuantizedWeight]]:
    """All weights, each in memory of its own."""
    for header in checked.headers:
        yield from read_tensors(header, [name for name in header.entries if name in checked.dense])
    yield from read_quantized(checked.headers, checked.in_4_bits, folder)
