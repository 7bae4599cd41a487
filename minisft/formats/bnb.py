"""Weights in 4 bits as bitsandbytes stores them in a Hugging Face folder: read and written byte for byte.

For a weight ``W`` of N numbers in blocks of G, the file holds

    W                                  (ceil(N/2), 1) uint8, the first number of a pair in the high nibble
    W.absmax                           (ceil(N/G),) fp32 scales, or with double quantization their uint8 codes
    W.quant_map                        (16,) fp32, the levels
    W.nested_absmax                    (ceil(N/G/256),) fp32, with double quantization only
    W.nested_quant_map                 (256,) fp32, likewise: the table that the codes of the scales point into
    W.quant_state.bitsandbytes__nf4    JSON as uint8: type, block size, dtype, shape, and the mean of the scales

or ``...__fp4``: bitsandbytes' fp4 levels are not sorted, ``nf4.codebook("fp4")`` has them in the same order, so these are
exchanged as exactly as nf4. Packed weights under another dtype (``bnb_4bit_quant_storage``, for sharded training) are the
same bytes and are read as such; they are always written as uint8.

Everything but the values is checked from headers and JSON alone, before memory is given to a tensor. Refused: other
tables of levels or scales than bitsandbytes' own (its kernels ignore ``quant_map`` and would compute with other weights
than we), nested blocks of another size than 256, and scales that are not finite. A newcomer leaves with one idea: nothing
is converted; the file's tensors are the buffers of the layer.

Ref: bitsandbytes 0.50, ``functional.QuantState``; transformers 5, ``quantizer_bnb_4bit.serialized_names``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.common import safe_json
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.config import QuantConfig
from minisft.formats.fields import Fields
from minisft.formats.safetensors_file import Entry, Header, read_tensors
from minisft.nf4 import BLOCK_SIZES, NESTED_BLOCK_SIZE, QuantizedWeight, codebook, decode_absmax, dynamic_map

ABSMAX, MAP, ABSMAX2, MAP2 = "absmax", "quant_map", "nested_absmax", "nested_quant_map"
LEVELS = ("nf4", "fp4")
STORAGE = ("U8", "I8", "BF16", "F16", "F32")
# In the header of every weights file: the fingerprint of the dense model that was quantized. Other programs pass it over.
QUANTIZED_FROM = "minisft.quantized_from"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_STATE_BYTES = 4096  # about 170 are used

_Entries = Mapping[str, Entry]


def _state_name(weight: str, levels: str) -> str:
    return f"{weight}.quant_state.bitsandbytes__{levels}"


# ---- what a file says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeight:
    """What a file says about one weight in 4 bits, checked against the shape that the model expects.

    Args:
        name: of the weight, ``X.weight``.
        levels: ``nf4`` or ``fp4``.
        offset: mean of the scales; None without double quantization.
        shape, dtype: of the dense weight.
    """

    name: str
    levels: str
    block_size: int
    offset: float | None
    shape: torch.Size
    dtype: torch.dtype

    @property
    def form(self) -> QuantConfig:
        """How ``nf4.quantize`` would have to be asked for it."""
        return QuantConfig(self.levels, self.block_size, self.offset is not None)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes."""
        return -(-self.shape.numel() // 2)

    @property
    def tables(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (as a header says it) and shape of each tensor beside the packed weight, by the last part of its name."""
        blocks = -(-self.shape.numel() // self.block_size)
        if self.offset is None:
            return {ABSMAX: ("F32", (blocks,)), MAP: ("F32", (16,))}
        nested = {ABSMAX2: ("F32", (-(-blocks // NESTED_BLOCK_SIZE),)), MAP2: ("F32", (256,))}
        return {ABSMAX: ("U8", (blocks,)), MAP: ("F32", (16,)), **nested}

    @property
    def names(self) -> list[str]:
        """Its tensors in the file: the packed weight, the tables, the JSON."""
        return [self.name, *(f"{self.name}.{part}" for part in self.tables), _state_name(self.name, self.levels)]


def check_quantized(headers: list[Header], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, StoredWeight]:
    """Find the weights that are stored in 4 bits and check all about them that headers and JSON show.

    Args:
        headers: of all weight files; the parts of one weight may lie in different files.
        shapes: name and shape of each weight that may be in 4 bits.
        folder: for messages.

    Returns:
        the weights in 4 bits by name, in the order of ``shapes``.

    Raises:
        UserError: parts that are missing or too many (listed), or a part that is not what the format says.
    """
    entries = {name: entry for header in headers for name, entry in header.entries.items()}
    levels_of = {name: levels for name in shapes if (levels := _find_levels(name, entries, folder)) is not None}
    states = dict(_read(headers, [_state_name(name, levels) for name, levels in levels_of.items()]))
    found = {}
    for name, levels in levels_of.items():
        state = _state_name(name, levels)
        fields = Fields(_json_object(states[state], state, folder), f"{visible(folder)}: {visible(state)}")
        stored = _parse(fields, name, levels, shapes[name], nested=f"{name}.{ABSMAX2}" in entries)
        _check_sizes(stored, entries, folder)
        found[name] = stored
    return found


def _find_levels(name: str, entries: _Entries, folder: Path) -> str | None:
    """``nf4`` or ``fp4`` once it is certain that all parts of the weight are there; None for a dense weight."""
    tables = [part for part in (ABSMAX, MAP, ABSMAX2, MAP2) if f"{name}.{part}" in entries]
    kinds = [levels for levels in LEVELS if _state_name(name, levels) in entries]
    if not tables and not kinds:
        return None
    needed = [ABSMAX, MAP, *([ABSMAX2, MAP2] if ABSMAX2 in tables or MAP2 in tables else [])]
    missing = [f"{name}.{part}" for part in needed if part not in tables]
    missing += [] if kinds else [_state_name(name, "nf4")]
    missing += [] if name in entries else [name]
    if missing:
        raise UserError(
            "model/missing-tensor", "parts of a 4-bit weight are missing", where=visible(folder), expected=listing(missing)
        )
    if len(kinds) > 1:
        both = listing(_state_name(name, levels) for levels in kinds)
        raise UserError("model/unexpected-tensor", "a 4-bit weight is described twice", where=visible(folder), found=both)
    state = _state_name(name, kinds[0])
    if entries[state].dtype != "U8" or entries[state].end - entries[state].begin > MAX_STATE_BYTES:
        raise _wrong_tensor(state, entries[state], f"JSON as U8, at most {MAX_STATE_BYTES} bytes", folder)
    return kinds[0]


def _json_object(state: Tensor, name: str, folder: Path) -> dict[str, JSON]:
    what, where = "the description of a 4-bit weight is not one JSON object", f"{visible(folder)}: {visible(name)}"
    try:
        value = safe_json.loads(bytes(state.flatten().tolist()))
    except ValueError as error:
        raise UserError("model/bad-config", what, where=where, found=visible(error)) from None
    if not isinstance(value, dict):
        raise UserError("model/bad-config", what, where=where, found=type(value).__name__)
    return value


def _parse(fields: Fields, name: str, levels: str, shape: tuple[int, ...], nested: bool) -> StoredWeight:
    """Exactly the keys that bitsandbytes writes, with values that this library can follow."""
    wanted: dict[str, JSON] = {"quant_type": levels, "shape": list(shape)}
    wanted |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"} if nested else {}
    known = sorted({*wanted, "blocksize", "dtype", *(["nested_offset"] if nested else [])})
    if unknown := sorted(set(fields.values) - set(known)):
        raise fields.error(unknown[0], f"only {listing(known)}", "unsupported")
    for key, value in wanted.items():
        if fields.values.get(key) != value:
            raise fields.error(key, str(value))
    block_size, dtype = fields.integer("blocksize"), fields.text("dtype")
    if block_size not in BLOCK_SIZES:
        raise fields.error("blocksize", listing(map(str, BLOCK_SIZES)))
    if dtype not in DTYPES:
        raise fields.error("dtype", listing(DTYPES))
    offset = fields.number("nested_offset") if nested else None
    if offset is not None and abs(offset) > torch.finfo(torch.float32).max:
        raise fields.error("nested_offset", "a finite fp32 number")
    return StoredWeight(name, levels, block_size, offset, torch.Size(shape), DTYPES[dtype])


def _check_sizes(stored: StoredWeight, entries: _Entries, folder: Path) -> None:
    packed = entries[stored.name]
    if packed.dtype not in STORAGE or packed.end - packed.begin != stored.packed_bytes:
        expected = f"{stored.packed_bytes} bytes for {list(stored.shape)}, as {' or '.join(STORAGE)}"
        raise _wrong_tensor(stored.name, packed, expected, folder)
    for part, (dtype, shape) in stored.tables.items():
        entry = entries[f"{stored.name}.{part}"]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise _wrong_tensor(f"{stored.name}.{part}", entry, f"{dtype} {list(shape)}", folder)


def _wrong_tensor(name: str, entry: Entry, expected: str, folder: Path) -> UserError:
    found = f"{entry.dtype} {list(entry.shape)}"
    what = f"tensor {visible(name)} does not fit its 4-bit weight"
    return UserError("model/shape", what, where=visible(folder), found=found, expected=expected)


def require_same(stored: Mapping[str, StoredWeight], quant: QuantConfig, folder: Path) -> None:
    """A folder that is quantized already must be in the form that is asked for: it is never quantized again.

    Args:
        stored: what the folder holds in 4 bits, by name.
        quant: what is asked for.
        folder: for messages.

    Raises:
        UserError: ``model/already-quantized``, with both forms.
    """
    for weight in stored.values():
        if _said(weight.form) != _said(quant):
            raise UserError(
                "model/already-quantized",
                "the model is quantized already, in another form than is asked for",
                where=f"{visible(folder)}: {visible(weight.name)}",
                found=_said(weight.form),
                expected=_said(quant),
                fix="ask for no quantization, which takes it as it is, or for the form it has, or start from the dense model",
            )


def _said(form: QuantConfig) -> str:
    return f"{form.levels}, block size {form.block_size}, {'with' if form.double_quant else 'without'} double quantization"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_quantized(
    headers: list[Header], stored: Mapping[str, StoredWeight], folder: Path
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield (name, weight) one at a time, each in memory of its own.

    Args:
        headers: of all weight files.
        stored: the weights to read, by name.
        folder: for messages.

    Returns:
        an iterator of names and weights.

    Raises:
        UserError: tables that are not bitsandbytes' own, scales that are not finite.
    """
    for name, weight in stored.items():
        yield name, _assemble(weight, dict(_read(headers, weight.names)), folder)


def _read(headers: list[Header], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for header in headers:
        if here := [name for name in names if name in header.entries]:
            yield from read_tensors(header, here)


def read_tables(headers: list[Header], stored: StoredWeight, folder: Path) -> QuantizedWeight:
    """A weight in 4 bits but for its codes, which stay in the file: ``packed`` is on the meta device.

    Args:
        headers: of all weight files.
        stored: the weight.
        folder: for messages.

    Returns:
        the weight; its levels and scales are in memory.
    """
    tables = [name for name in stored.names if name != stored.name]
    codes = torch.empty(stored.packed_bytes, dtype=torch.uint8, device="meta")
    return _assemble(stored, {stored.name: codes, **dict(_read(headers, tables))}, folder)


def _assemble(stored: StoredWeight, tensors: Mapping[str, Tensor], folder: Path) -> QuantizedWeight:
    own = {MAP: codebook(stored.levels), MAP2: dynamic_map(torch.device("cpu"))}
    for part, table in own.items():
        key = f"{stored.name}.{part}"
        if key in tensors and not torch.equal(tensors[key], table):
            raise UserError(
                "model/unsupported",
                f"tensor {visible(key)} is another table than bitsandbytes uses",
                where=visible(folder),
                found=listing(map(str, tensors[key].tolist()), 4),
                expected=listing(map(str, table.tolist()), 4),
            )
    q = QuantizedWeight(
        packed=tensors[stored.name].view(torch.uint8).flatten(),
        absmax=tensors[f"{stored.name}.{ABSMAX}"],
        absmax2=tensors.get(f"{stored.name}.{ABSMAX2}"),
        offset=None if stored.offset is None else torch.tensor(stored.offset, dtype=torch.float32),
        levels=tensors[f"{stored.name}.{MAP}"],
        block_size=stored.block_size,
        shape=stored.shape,
        dtype=stored.dtype,
    )
    _require_finite(q, stored.name, folder)
    return q


def _require_finite(q: QuantizedWeight, name: str, folder: Path) -> None:
    scales = decode_absmax(q)
    bad = (~scales.isfinite()).nonzero().flatten()
    if len(bad):
        raise UserError(
            "model/non-finite-weight",
            "a scale of a 4-bit weight is not finite",
            where=f"{visible(folder)}: {visible(name)}.{ABSMAX}[{int(bad[0])}]",
            found=f"{scales[bad[0]].item()}, the first of {len(bad)} such in {len(scales)} scales",
            expected="finite numbers only",
        )


# ---- writing ---------------------------------------------------------------------------------------------------------


def stored_tensors(name: str, q: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that a file holds for the weight ``name``: those of ``q`` themselves, and copies of the tables.

    Raises:
        UserError: levels or a dtype that this format has no word for.
    """
    levels = _levels_word(name, q)
    state: dict[str, JSON] = {
        "quant_type": levels,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {name: q.packed.view(-1, 1), f"{name}.{ABSMAX}": q.absmax, f"{name}.{MAP}": q.levels}
    if q.absmax2 is not None and q.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": q.offset.item()}
        tensors[f"{name}.{ABSMAX2}"] = q.absmax2
        tensors[f"{name}.{MAP2}"] = dynamic_map(torch.device("cpu")).clone()  # safetensors refuses tensors that share memory
    text = json.dumps(state).encode()  # keys in this order, as bitsandbytes writes them, so that the bytes are equal
    return {**tensors, _state_name(name, levels): torch.tensor(list(text), dtype=torch.uint8)}


def _levels_word(name: str, q: QuantizedWeight) -> str:
    for levels in LEVELS:
        if torch.equal(q.levels.cpu(), codebook(levels)) and q.dtype in DTYPES.values():
            return levels
    raise UserError(
        "model/unsupported",
        "a 4-bit weight cannot be stored in bitsandbytes' format",
        where=visible(name),
        found=f"{q.dtype} in levels {listing(map(str, q.levels.tolist()), 4)}",
        expected=f"{listing(DTYPES)} in levels {' or '.join(LEVELS)}",
    )


def quantization_config(q: QuantizedWeight, compute_dtype: torch.dtype, dense: list[str]) -> dict[str, JSON]:
    """What ``config.json`` says under ``quantization_config``, as transformers writes it.

    Args:
        q: one of the weights. (Each weight's own JSON says what it is; this is what transformers takes for new layers.)
        compute_dtype: what transformers multiplies in.
        dense: paths of the linears that are not in 4 bits.

    Returns:
        the JSON object.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": _levels_word("weight", q),
        "bnb_4bit_use_double_quant": q.absmax2 is not None,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
    }
