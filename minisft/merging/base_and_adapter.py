"""A base and an adapter over it, in their files: checked against each other, with no weight of the base in memory.

``open_adapted`` finds the base that the adapter names, has ``load_adapter_`` check and adapt a model whose weights have
shapes but no memory, and offers each weight as the files hold it and as training held it. What it refuses: all that loading
refuses, and a base that this adapter has been merged into. The idea to take home: checking needs names and shapes, adding
needs a few rows; nothing needs the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from minisft.adapter import Adapter
from minisft.common.errors import UserError, visible
from minisft.config import QUANT_LEVELS, ModelConfig, QuantConfig
from minisft.data.chat import resolve_template
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.effect import Target
from minisft.formats import load_adapter_, load_model, load_tokenizer
from minisft.formats.adapter import WEIGHTS_FILE, recorded_base, recorded_base_name, saved_template
from minisft.formats.adapter_config import config_path
from minisft.formats.adapter_rows import grown_vocabulary, read_row_ids, saved_tokenizer
from minisft.formats.adapter_tensors import repeated_weights
from minisft.formats.lazy_weights import PIECE, In4Bits, Pieces, StoredModel, WithRows, open_model, read_flat
from minisft.formats.loading import EMBEDDING, HEAD, empty_model, expected_shapes
from minisft.formats.safetensors_file import read_header
from minisft.formats.source import Origin, file_sha256, regular_file, resolve, set_origin_
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight, codebook
from minisft.nf4_linear import NF4Linear
from minisft.surgery import lora_modules, quantization_targets, replace_module, scale_adapters_
from minisft.trained_rows import TrainedRows, own_rows

MARK = "minisft_adapter"  # in the headers of merged weights: sha256 of the adapter's weights
ROW_STEP = 16  # a multiple of what matrix products are cut into, so that a few rows get the bits of the whole product


@dataclass(frozen=True)
class AdaptedFiles:
    """A base and an adapter over it, checked against each other; no weight of the base is in memory.

    Args:
        stored: the base, as the files hold it.
        adapters: by path, their bases without memory.
        quant: how training held the linears in ``in_4_bits`` in 4 bits, where the files hold them dense.
        in_4_bits: names of those weights.
        folder, scale: of the adapter, and a further factor on its updates.
        digest: sha256 of the adapter's weights.
        rows: trained rows of embedding and head, by path; ``stored`` has the vocabulary that they need.
    """

    folder: Path
    scale: float
    stored: StoredModel
    adapters: dict[str, Adapter]
    quant: QuantConfig | None
    in_4_bits: frozenset[str]
    digest: str
    rows: dict[str, TrainedRows] = field(default_factory=dict)

    @property
    def held(self) -> str:
        """How the base was held in training, in words."""
        form = self.quant or next(iter(self.stored.in_4_bits.values()), None)
        if form is None:
            return "dense"
        return f"{form.levels}, blocks of {form.block_size}, {'double' if form.double_quant else 'single'} quantization"

    def trained_on(self, name: str) -> Pieces:
        """The weight ``name`` as it was in training. A head that is tied is the embedding."""
        dense = self.stored_weight(name)
        return In4Bits(name, dense, self.quant) if self.quant is not None and name in self.in_4_bits else dense

    def stored_weight(self, name: str) -> Pieces:
        """The weight ``name`` as the files hold it, with the adapter's own rows put in."""
        name = name if name in self.stored.open else EMBEDDING
        table, rows = self.stored.open[name](), self.rows.get(name.removesuffix(".weight"))
        return table if rows is None else WithRows(table, rows, (self.stored.config.vocab_size, *table.shape[1:]))


def open_adapted(adapter: str | Path, model: str | None = None, scale: float = 1.0) -> AdaptedFiles:
    """Find the base of an adapter and check that they belong together.

    Args:
        adapter: PEFT's layout, ours or theirs.
        model: the base; by default the one that the adapter's files name.
        scale: a further factor on every update.

    Returns:
        both, checked; no weight of the base in memory.

    Raises:
        UserError: no such base, everything that ``load_adapter_`` refuses, or a base into which this adapter is merged.
    """
    folder = Path(adapter)
    stored = _with_new_rows(open_model(resolve(model or recorded_base_name(folder))), folder)
    quant = recorded_quantization(folder) if not stored.in_4_bits else None
    in_4_bits = frozenset() if quant is None else _quantized_names(stored.config, quant)
    digest = file_sha256(regular_file(folder, WEIGHTS_FILE, "adapter/no-weights"))
    if stored.metadata.get(MARK) == digest:
        raise UserError(
            "adapter/already-merged",
            "the adapter is merged into this model already",
            where=visible(stored.source.name),
            found=f"{visible(folder)} ({digest[:16]})",
            fix="give the base model that the adapter was trained on",
        )
    placeholder = _placeholder(stored, quant, in_4_bits, _repeated(folder))
    load_adapter_(placeholder, folder)
    scale_adapters_(placeholder, scale)
    return AdaptedFiles(folder, scale, stored, lora_modules(placeholder), quant, in_4_bits, digest, own_rows(placeholder))


def load_unmerged(files: AdaptedFiles, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Tokenizer]:
    """The model that was trained, in memory: the base as training held it, with the adapter."""
    model, tokenizer = load_model(files.stored.source.path, dtype, quant=files.quant)
    load_adapter_(model, files.folder)
    scale_adapters_(model, files.scale)
    return model, saved_tokenizer(files.folder, tokenizer)


def _with_new_rows(stored: StoredModel, folder: Path) -> StoredModel:
    """The base with the vocabulary that the adapter's tokens need."""
    config = stored.config
    ids = read_row_ids(config_path(folder))
    size = grown_vocabulary(ids, config.vocab_size, config.tie_word_embeddings, folder)
    return dataclasses.replace(stored, config=dataclasses.replace(config, vocab_size=size))


def tokenizer_of(files: AdaptedFiles) -> Tokenizer:
    """The base's tokenizer, or the one that an adapter with new tokens brings."""
    return saved_tokenizer(files.folder, load_tokenizer(files.stored.source.path))


def held_in_4_bits(files: AdaptedFiles) -> AdaptedFiles:
    """The same with the base in 4 bits: as training held it, or, if it was dense in training, as QLoRA would hold it."""
    if files.quant is not None or files.stored.in_4_bits:
        return files
    quant = QuantConfig()
    return dataclasses.replace(files, quant=quant, in_4_bits=_quantized_names(files.stored.config, quant))


def _quantized_names(config: ModelConfig, quant: QuantConfig) -> frozenset[str]:
    return frozenset(f"{path}.weight" for path in quantization_targets(empty_model(config), quant))


def template_of(files: AdaptedFiles, tokenizer: Tokenizer) -> ChatTemplate:
    """An adapter is used with the template that it was trained with."""
    return resolve_template(tokenizer, saved_template(files.folder))


def recorded_quantization(folder: Path) -> QuantConfig | None:
    """How the base's linears were quantized in training, by the adapter's files; None for dense, or where they do not state it.

    Raises:
        UserError: a form that cannot be asked for again.
    """
    base = recorded_base(folder)
    if base is None or base.values.get("quantization") is None:
        return None
    form = base.inner("quantization")
    if form.values.get("levels") not in QUANT_LEVELS:
        raise form.error("levels", " or ".join(QUANT_LEVELS), "unsupported")
    return QuantConfig(form.text("levels"), form.integer("block_size"), form.flag("double_quant"))


def _repeated(folder: Path) -> set[str]:
    """Weights of the base, by name, that the adapter's own file repeats (PEFT does so for embeddings)."""
    return set(repeated_weights(read_header(regular_file(folder, WEIGHTS_FILE, "adapter/no-weights"), "adapter")).values())


def _placeholder(stored: StoredModel, quant: QuantConfig | None, in_4_bits: frozenset[str], real: set[str]) -> CausalLM:
    """A model for ``load_adapter_`` to check and adapt whose weights have shapes but, each, the memory of one number.

    Args:
        real: names of weights that are compared, and so must be there. A tied head is the embedding.
    """
    model = empty_model(stored.config)
    tied = stored.config.tie_word_embeddings
    real = {EMBEDDING if tied and name == HEAD else name for name in real}
    forms = {**stored.in_4_bits, **(dict.fromkeys(in_4_bits, quant) if quant is not None else {})}
    for name, shape in expected_shapes(model).items():
        owner, _, leaf = name.rpartition(".")
        if name in forms:
            replace_module(model, owner, NF4Linear(_weightless(forms[name], shape)))
        elif name in real:
            whole = torch.cat(list(read_flat(stored.open[name]()))).view(shape)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(whole))
        else:
            setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.zeros(()).expand(shape)))
    if tied:
        model.tie()
    source = stored.source
    set_origin_(model, Origin(source.name, str(source.path), source.kind, stored.file_dtype))
    return model


def _weightless(form: QuantConfig, shape: tuple[int, ...]) -> QuantizedWeight:
    length = shape[0] * shape[1]
    byte, number = torch.zeros((), dtype=torch.uint8), torch.zeros(())
    blocks = -(-length // form.block_size)
    return QuantizedWeight(
        packed=byte.expand(-(-length // 2)),
        absmax=byte.expand(blocks) if form.double_quant else number.expand(blocks),
        absmax2=number.expand(1) if form.double_quant else None,
        offset=number if form.double_quant else None,
        levels=codebook(form.levels),
        block_size=form.block_size,
        shape=torch.Size(shape),
        dtype=torch.float32,
    )


def check_onto(files: AdaptedFiles, onto: Target) -> None:
    """Refuse a target that this base cannot have."""
    if onto in ("dequantized", "compensated"):
        return
    if files.quant is None and not files.stored.in_4_bits:
        raise UserError(
            "adapter/base-not-quantized",
            "the adapter was trained on dense weights: the base is the only weight to merge onto",
            where="--onto",
            found=onto,
            fix="leave --onto away",
        )
    if onto == "original" and files.stored.in_4_bits:
        raise UserError(
            "model/not-dense",
            "this base is stored in 4 bits: the weights before that are not in it",
            where=visible(files.stored.source.name),
            fix="leave --onto away, or give the dense model with --model",
        )


# ---- rows ------------------------------------------------------------------------------------------------------------


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a matrix, about ``PIECE`` numbers each, that begin at multiples of ``ROW_STEP``; none is tiny."""
    rows, columns = shape
    step = max(ROW_STEP, PIECE // columns // ROW_STEP * ROW_STEP)
    begins = list(range(0, max(1, rows - ROW_STEP + 1), step))
    yield from zip(begins, [*begins[1:], rows], strict=True)
