"""Reading and writing models and adapters in the formats that other programs use.

``load_model`` takes a Hugging Face folder, a GGUF file, a hub id or the name of the small pretrained model;
``save_model`` writes a Hugging Face folder, ``save_quantized`` one in 4 bits; ``save_adapter`` and ``load_adapter_`` speak
PEFT's layout. No pickle, no code from a file, no network unless a hub id is named. The idea to take home: a file is
untrusted; it is checked from its first byte before memory is given to it, and then read one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minisft.common.errors import listing
from minisft.config import QuantConfig
from minisft.data.tokenizer import Tokenizer
from minisft.formats.adapter import load_adapter_, save_adapter, write_adapter
from minisft.formats.foreign_files import foreign_context, foreign_type, load_foreign
from minisft.formats.gguf_file import file_dtype, gguf_config, load_gguf
from minisft.formats.gguf_header import read_gguf
from minisft.formats.hf import load_folder
from minisft.formats.hf_config import read_config
from minisft.formats.hf_write import save_model, save_quantized
from minisft.formats.source import SMOLLM2, Origin, base_fingerprint, fingerprint, origin_of, resolve, set_origin_
from minisft.model import CausalLM

__all__ = [
    "SMOLLM2", "CausalLM", "Origin", "Tokenizer", "base_fingerprint", "context_length", "fingerprint", "load_adapter_",
    "load_model", "load_tokenizer", "origin_of", "save_adapter", "save_model", "save_quantized", "write_adapter",
]  # fmt: skip

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quant: QuantConfig | None = None,
) -> tuple[CausalLM, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        path: a Hugging Face folder, a GGUF file, ``smollm2-135m-instruct`` or a hub id ``org/name``.
        dtype: of all parameters; each stored weight is converted once.
        device: where they go.
        quant: which linears are quantized. Each is, when it is read, from the numbers in the file, so the
            codes do not depend on ``dtype``. A layer that the file holds in 4 bits is taken as it is, and must be in the form
            asked for.

    Returns:
        the model in training mode, all parameters trainable (a weight in 4 bits is none), with ``model.origin`` set; and
        the tokenizer.

    Raises:
        UserError: everything that can be wrong with what lies at ``path``, before memory is given to it.
        TypeError: ``dtype`` is not a float.

    Cost: at most the finished (quantized) model, its largest tensor in fp32 and 64 MiB.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype {dtype} cannot hold a model; one of {listing(map(str, _DTYPES))}")
    source, place = resolve(path), torch.device(device)
    if source.kind == "gguf":
        gguf = read_gguf(source.path)
        model, stored = load_gguf(gguf, dtype, place, quant), file_dtype(gguf)
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    else:
        load = load_folder if foreign_type(source.path) is None else load_foreign
        model, stored = load(source.path, dtype, place, quant)
        tokenizer = Tokenizer.from_folder(source.path)
    tokenizer.check_embedding(model.config.vocab_size)
    set_origin_(model, Origin(source.name, str(source.path), source.kind, stored))
    return model, tokenizer


def context_length(path: str | Path) -> int | None:
    """The most tokens that a model is made for, from its header alone; None for a folder without a ``config.json``."""
    source = resolve(path)
    if source.kind == "gguf":
        return gguf_config(read_gguf(source.path)).max_position_embeddings
    if foreign_type(source.path) is not None:
        return foreign_context(source.path)
    return read_config(source.path)[0].max_position_embeddings if (source.path / "config.json").exists() else None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model, without its weights; arguments and errors as in ``load_model``."""
    source = resolve(path)
    return Tokenizer.from_gguf(read_gguf(source.path).metadata) if source.kind == "gguf" else Tokenizer.from_folder(source.path)
