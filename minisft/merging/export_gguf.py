"""``minisft export``: a model, a merged model or an adapter alone as a GGUF file for llama.cpp and Ollama.

Weights are read, merged, rounded and written a piece at a time; only the q and k of ``llama`` files, whose rows are reordered,
are held whole. Beside the file stand golden answers, by which ``minisft verify --gguf`` asks llama.cpp, and a ``Modelfile`` if
wanted. Refused are models and adapters that llama.cpp would compute otherwise, each with a way out. The idea to take home: an
export is right when the other program gives the same numbers, so the numbers go with it.

Ref: llama.cpp, ``docs/development/HOWTO-add-model.md`` and ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.common.atomic_files import FileRecord, create_durably, disk_errors, require_space, staged_files
from minisft.common.checks import check_export
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.config import ModelConfig
from minisft.data.gguf_tokenizer import GGUFTokenizer, gguf_tokenizer
from minisft.data.template import ChatTemplate, resolve_template
from minisft.data.tokenizer import Tokenizer
from minisft.effect import Effect, LayerReport, MergeReport
from minisft.formats import load_model, load_tokenizer
from minisft.formats.gguf_file import ROPE_FREQS
from minisft.formats.gguf_header import Metadata
from minisft.formats.gguf_names import architecture_of, llama_cpp_name, rope_factors, shape_keys, their_order
from minisft.formats.gguf_types import OUT_TYPES, OutType, encode, stored_type
from minisft.formats.gguf_write import GGUFSpec, Pieces, gguf_bytes
from minisft.formats.lazy_weights import StoredModel, open_model, read_flat, read_rows
from minisft.formats.loading import empty_model, expected_shapes
from minisft.formats.source import resolve
from minisft.merge_weights import merged_weight, splits_tie
from minisft.merging.base_and_adapter import AdaptedFiles, load_unmerged, open_adapted, row_ranges, template_of, tokenizer_of
from minisft.merging.certificate import Verdict, compare_models, judge
from minisft.merging.export_lora import lora_keys, lora_tensors
from minisft.merging.golden import golden
from minisft.merging.modelfile import modelfile

QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class ExportedGGUF:
    """What ``export_gguf`` has written.

    Attributes:
        out, golden, modelfile: the files; None for one that was not written.
        record: size and sha256 of the GGUF file.
        num_tensors: in the file.
        kept_16: how many matrices are fp16 in a Q8_0 file.
        report: of the merge, layer by layer; None without one.
        verdict: what the merge's certificate concludes; None if the models were not compared.
    """

    out: Path
    record: FileRecord
    num_tensors: int
    kept_16: int
    golden: Path | None
    modelfile: Path | None
    report: MergeReport | None
    verdict: Verdict | None


@dataclass(frozen=True)
class _Source:
    """What is exported, checked, before a byte is written."""

    stored: StoredModel
    files: AdaptedFiles | None
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    words: GGUFTokenizer
    architecture: str

    @property
    def name(self) -> str:
        return Path(self.stored.source.name).name if self.files is None else f"{Path(self.stored.source.name).name} + adapter"


def export_gguf(
    out: str | Path,
    model: str | None = None,
    adapter: str | Path | None = None,
    *,
    adapter_only: bool = False,
    outtype: OutType = "f16",
    ollama: bool = False,
    compare: bool = True,
    log: Callable[[str], object] = str,
) -> ExportedGGUF:
    """Write a GGUF file, and golden answers beside it; all appear or none does.

    Args:
        out: a new file, ``F.gguf``; beside it come ``F.golden.json`` and ``F.Modelfile``.
        model: folder, GGUF file, hub id or name; for an adapter by default the base that its files name.
        adapter: PEFT's layout. It is merged into the written weights.
        adapter_only: write the adapter alone, for llama.cpp to load on top of the base's own GGUF file.
        outtype: of the matrices; vectors stay fp32. An adapter alone is f32 or f16.
        ollama: write a ``Modelfile``.
        compare: load the model for the golden answers and, after a merge, the written file to compare both.
        log: called with notes. (The default, ``str``, does nothing.)

    Returns:
        what was written.

    Raises:
        UserError: ``model/no-gguf``, ``adapter/no-gguf``, ``tokenizer/no-gguf...``; what ``open_model`` and ``open_adapted``
            refuse; a weight that the type cannot hold; a target that exists, a disk that is full.

    Cost: 64 MiB beside the tokenizer, the adapter and the largest q or k; with ``compare`` the model in fp32.
    """
    names = check_export(out, model, adapter, adapter_only, outtype)
    source = _open(model, adapter)
    for note in (*source.tokenizer.notes, *source.words.notes):
        log(note)
    reports: dict[str, LayerReport] = {}
    keys, specs, pieces = _adapter_file(source, outtype) if adapter_only else _model_file(source, outtype, reports)
    keys = {"general.architecture": source.architecture, "general.name": source.name, **keys}
    num_bytes, report, verdict = sum(spec.num_bytes for spec in specs.values()), None, None
    with disk_errors(Path(out), num_bytes), staged_files(names) as staging:
        require_space(staging, num_bytes)
        file = staging / names[-1].name
        record = create_durably(file, gguf_bytes(keys, specs, pieces))
        if reports and source.files is not None:
            report = MergeReport("dequantized", tuple(reports[path] for path in source.files.adapters))
            verdict = _compared(source, report, file, log) if compare else None
        if compare:
            facts: dict[str, JSON] = {"file": file.name, "sha256": record.sha256, "outtype": outtype}
            facts |= {"adapter_only": adapter_only, **_merge_facts(report, verdict)}
            _write_golden(staging / names[0].name, source, facts, log)
        if ollama:
            _write_modelfile(staging / names[1].name, file.name, source, adapter_only, log)
    half = sum(spec.kind.name == "f16" for spec in specs.values()) if outtype == "q8_0" else 0
    golden_file, model_file = (path if path.exists() else None for path in names[:2])
    return ExportedGGUF(names[-1], record, len(specs), half, golden_file, model_file, report, verdict)


def _open(model: str | None, adapter: str | Path | None) -> _Source:
    """Everything that can be refused without reading a weight."""
    files = None if adapter is None else open_adapted(adapter, model)
    stored = open_model(resolve(str(model))) if files is None else files.stored
    architecture = architecture_of(stored.config, visible(stored.source.name))
    tokenizer = load_tokenizer(stored.source.path) if files is None else tokenizer_of(files)
    tokenizer.check_embedding(stored.config.vocab_size)
    template = _template(tokenizer, files)
    config = stored.config
    if files is not None and splits_tie(files.adapters):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return _Source(
        stored, files, config, tokenizer, template, gguf_tokenizer(tokenizer, template, config.vocab_size), architecture
    )


def _template(tokenizer: Tokenizer, files: AdaptedFiles | None) -> ChatTemplate | None:
    """An adapter's own template, or the model's; None for a base model that has none."""
    try:
        return resolve_template(tokenizer) if files is None else template_of(files, tokenizer)
    except UserError as error:
        if error.code != "tokenizer/no-template":
            raise
        return None


# ---- weights ---------------------------------------------------------------------------------------------------------


_File = tuple[Metadata, dict[str, GGUFSpec], Pieces]  # its metadata, its tensors, and their bytes by name


def _adapter_file(source: _Source, outtype: OutType) -> _File:
    assert source.files is not None
    kind, tensors = OUT_TYPES[outtype], lora_tensors(source.files)
    specs = {name: GGUFSpec(kind, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return lora_keys(), specs, lambda name: [encode(name, tensors[name], kind)[0]]


def _model_file(source: _Source, outtype: OutType, reports: dict[str, LayerReport]) -> _File:
    specs = _specs(source.config, outtype)
    return _model_keys(source, outtype), specs, _weights(source, specs, reports)


def _model_keys(source: _Source, outtype: OutType) -> Metadata:
    """The metadata of a model file, but for its name."""
    quantized: Metadata = {"general.quantization_version": QUANTIZATION_VERSION} if outtype == "q8_0" else {}
    kind: Metadata = {"general.type": "model", "general.file_type": OUT_TYPES[outtype].file_type}
    return {**kind, **quantized, **shape_keys(source.config, source.architecture), **source.words.keys}


def _specs(config: ModelConfig, outtype: OutType) -> dict[str, GGUFSpec]:
    """Every tensor by llama.cpp's name. A tied head is not among them; Llama 3's stretched waves are."""
    shapes = {llama_cpp_name(name): shape for name, shape in expected_shapes(empty_model(config)).items()}
    if config.rope_scaling is not None:
        shapes[ROPE_FREQS] = (config.head_dim // 2,)
    return {name: GGUFSpec(stored_type(outtype, shape), shape) for name, shape in shapes.items()}


def _weights(
    source: _Source, specs: Mapping[str, GGUFSpec], reports: dict[str, LayerReport]
) -> Callable[[str], Iterator[Tensor]]:
    """The bytes of each tensor; a layer's report is entered when its last piece is out."""
    ours = {llama_cpp_name(name): name for name in expected_shapes(empty_model(source.config))}

    def pieces(theirs: str) -> Iterator[Tensor]:
        kind = specs[theirs].kind
        if theirs == ROPE_FREQS:
            factors = rope_factors(source.config)
            assert factors is not None
            yield encode(theirs, factors, kind)[0]
            return
        name = ours[theirs]
        order, row_bytes = their_order(name, source.config), kind.num_bytes(specs[theirs].shape[1:] or (1,))
        stored = _stored_pieces(source, name, specs[theirs], reports)
        if order is None:
            yield from stored
        else:
            yield torch.cat(list(stored)).view(-1, row_bytes)[order].reshape(-1)

    return pieces


def _stored_pieces(source: _Source, name: str, spec: GGUFSpec, reports: dict[str, LayerReport]) -> Iterator[Tensor]:
    """One weight's rows in our order, merged if an adapter is over it, as bytes of the file's type."""
    path, files = name.removesuffix(".weight"), source.files
    if files is None or path not in files.adapters:
        base = source.stored.open[name]() if files is None else files.trained_on(name)
        for piece in read_flat(base):
            yield encode(name, piece, spec.kind)[0]
        return
    base, adapter, effect = files.trained_on(name), files.adapters[path], Effect()
    for begin, end in row_ranges(base.shape):
        weight = read_rows(base, begin, end)
        delta = adapter.delta_rows(weight, slice(begin, end))
        raw, back = encode(name, merged_weight(weight, delta), spec.kind)
        effect.add(weight, delta, back)
        yield raw
    reports[path] = effect.report(path)


# ---- what goes with it -----------------------------------------------------------------------------------------------


def _compared(source: _Source, report: MergeReport, file: Path, log: Callable[[str], object]) -> Verdict | None:
    """The certificate of a merge: the unmerged model against the file, as this library reads it."""
    assert source.files is not None
    try:
        answers = compare_models(source.files, file)
    except UserError as error:
        if error.code != "model/too-large":
            raise
        warnings.warn("the models were not compared: they do not fit into memory", stacklevel=3)
        return None
    log(f"against the unmerged model: KL {answers.kl_mean:.3g} nats, same choice at {answers.same_choice:.1%} of positions")
    return judge(report.layers, answers)


def _merge_facts(report: MergeReport | None, verdict: Verdict | None) -> dict[str, JSON]:
    if report is None:
        return {}
    layers: list[JSON] = [dataclasses.asdict(layer) for layer in report.layers]
    return {"merge": {"verdict": str(verdict or "not compared"), "survival": report.survival, "layers": layers}}


def _write_golden(path: Path, source: _Source, facts: Mapping[str, JSON], log: Callable[[str], object]) -> None:
    """Golden answers of the model before the export; left out where it does not fit into memory."""
    try:
        if source.files is None:
            model = load_model(source.stored.source.path)[0]
        else:
            model = load_unmerged(source.files)[0]
    except UserError as error:
        if error.code != "model/too-large":
            raise
        log("no golden answers: the model does not fit into memory")
        return
    asked = golden(model, source.tokenizer, source.template)
    del model
    gc.collect()
    head = {**facts, "model": source.stored.source.name, "base_stored_as": source.stored.file_dtype}
    first = json.dumps(head, ensure_ascii=False, allow_nan=False)[:-1]
    lines = ",\n".join(json.dumps(prompt, ensure_ascii=False, allow_nan=False) for prompt in asked)  # a prompt a line
    create_durably(path, [f'{first}, "prompts": [\n{lines}\n]}}\n'.encode()])


def _write_modelfile(path: Path, file: str, source: _Source, adapter_only: bool, log: Callable[[str], object]) -> None:
    base = source.stored.source.name if adapter_only else None
    text, why = modelfile(file, source.template, source.words.stops, base)
    create_durably(path, [text.encode()])
    if why:
        log(f"the Modelfile has no TEMPLATE: {why}. Ollama then takes the file's if it knows it: compare a chat")
