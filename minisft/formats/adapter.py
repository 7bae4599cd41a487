"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

Equal adapters give equal files. What PEFT has no key for (the fingerprint of the base, how its weights were stored and how
they were quantized) goes into a file of our own, ``minisft.json``, which PEFT never opens. The one idea: an adapter that
loads only in part acts like the base model and nobody notices, so every tensor must find its module and every module its
tensors before the model is touched.

Ref: PEFT 0.21, ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from minisft.adapter import Adapter
from minisft.common.atomic_files import disk_errors, staged_folder
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.common.shares import whole
from minisft.config import LoRAConfig
from minisft.data.tokenizer import Tokenizer
from minisft.dora import DoRALinear
from minisft.formats.adapter_config import CONFIG_FILE, adapter_config, config_path, needs_patterns, read_adapter_config
from minisft.formats.adapter_rows import KEY, RowsInFile, indices_of, rows_of, write_tokenizer
from minisft.formats.adapter_selection import run_patterns
from minisft.formats.adapter_tensors import (
    Factors,
    changed_weight,
    check_names,
    check_shapes,
    factors_of,
    magnitude_name,
    read_factors,
    repeated_weights,
    same_weight,
    tensor_names,
)  # fmt: skip
from minisft.formats.fields import Fields, read_json_object, write_json
from minisft.formats.hf import quantized_from
from minisft.formats.safetensors_file import Header, read_header, read_tensors, write_safetensors
from minisft.formats.source import base_fingerprint, origin_of, regular_file
from minisft.lora import LoRAEmbedding
from minisft.nf4_linear import NF4Linear
from minisft.pissa import pissa_starts
from minisft.surgery import (
    apply_lora_,
    lora_modules,
    match_targets,
    pattern_value,
    quantization_of,
    require_no_adapters,
)

WEIGHTS_FILE, FACTS_FILE = "adapter_model.safetensors", "minisft.json"
TEMPLATE_FILE = "chat_template.jinja"
PISSA_FACTS = (
    "pissa: a plain LoRA of the original base; the second half of lora_A and lora_B is the start, A0 and -B0, "
    "and the base that PiSSA trains on is W + scaling * (-B0) A0"
)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_name: str | None = None,
    fingerprint: str | None = None,
    facts: Mapping[str, JSON] | None = None,
    template: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the adapters of ``model`` as a folder that PEFT loads; it appears whole or not at all.

    Args:
        model: any tree with adapters.
        folder: new, or empty.
        base_name: what the base is called; by default what ``load_model`` was given.
        fingerprint: of the base (``formats.fingerprint``); by default that of the files the model came from.
        facts: further remarks for ``minisft.json``.
        template: source of the chat template that the adapter was trained with, kept beside it.
        tokenizer: kept beside trained rows (``trained_rows``), which are nothing without it.

    Raises:
        UserError: no adapters, trained rows without a tokenizer, a target that is in use, a disk that is full.
    """
    trained = [p for path, adapter in lora_modules(model).items() for p in _trained(path, adapter).values()]
    num_bytes = sum(p.numel() * p.element_size() for p in (*trained, *rows_of(model).values()))
    with disk_errors(Path(folder), num_bytes), staged_folder(folder) as staging:
        write_adapter(model, staging, base_name, fingerprint, facts, template, tokenizer)


def write_adapter(
    model: nn.Module,
    folder: Path,
    base_name: str | None = None,
    fingerprint: str | None = None,
    facts: Mapping[str, JSON] | None = None,
    template: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """``save_adapter`` into a folder that exists and that the caller makes durable (part of a checkpoint).

    Args:
        model, folder, base_name, fingerprint, facts, template, tokenizer: as for ``save_adapter``.

    Raises:
        UserError: ``adapter/none``, for a model without adapters; ``adapter/no-tokenizer``.
    """
    adapters = lora_modules(model)
    if not adapters:
        raise UserError("adapter/none", "the model has no adapters to save", fix="apply_lora_ adds them")
    origin = origin_of(model)
    base: dict[str, JSON] = {
        "fingerprint": fingerprint or base_fingerprint(model),
        "file_dtype": origin.file_dtype if origin else None,
        "quantization": quantization_of(model),
    }
    tensors: dict[str, torch.Tensor] = {}
    for path, adapter in adapters.items():
        tensors |= _trained(path, adapter)
    rows = rows_of(model)
    if rows and tokenizer is None:
        fix = "give the tokenizer: save_adapter(model, folder, tokenizer=tokenizer)"
        raise UserError(
            "adapter/no-tokenizer", "trained tokens are saved with their tokenizer", found=listing(rows, 2), fix=fix
        )
    config = adapter_config(model, adapters, base_name or (origin.name if origin else None)) | {KEY: indices_of(model)}
    started: dict[str, JSON] = {"init": PISSA_FACTS} if pissa_starts(model) else {}
    raw = None if template is None else template.encode()
    if rows and tokenizer is not None:
        write_tokenizer(folder, tokenizer)
    write_adapter_files(folder, config, tensors | rows, {**(facts or {}), **started}, base, raw)


def write_adapter_files(
    folder: Path,
    config: dict[str, JSON],
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, JSON],
    base: Mapping[str, JSON] | None,
    template: bytes | None,
) -> None:
    """The files of an adapter, into a folder that exists and that the caller makes durable.

    Args:
        folder, config, tensors: where, and the content of the two files that PEFT reads.
        facts: further remarks for ``minisft.json``.
        base: what is known of the base; without it there is no ``minisft.json``.
        template: source of a chat template that is kept beside them.
    """
    write_json(folder / CONFIG_FILE, config)
    if base is not None:
        write_json(folder / FACTS_FILE, {**facts, "base": {**base}})
    write_safetensors(tensors, folder / WEIGHTS_FILE)
    if template is not None:
        (folder / TEMPLATE_FILE).write_bytes(template)


def saved_template(folder: str | Path) -> str | None:
    """The path of the chat template that an adapter was trained with, to be used with it; None where its folder has none."""
    path = Path(folder) / TEMPLATE_FILE
    return str(path) if path.is_file() else None


def _trained(path: str, adapter: Adapter) -> dict[str, torch.Tensor]:
    """What the adapter at ``path`` has learned, by the names in the file."""
    name_A, name_B = tensor_names(path, isinstance(adapter, LoRAEmbedding))
    A, B = adapter.factors()
    parameters = {name_A: A.detach(), name_B: B.detach()}
    if isinstance(adapter, DoRALinear):
        parameters[magnitude_name(path)] = adapter.lora_magnitude_vector.detach()
    return parameters


def load_adapter_(model: nn.Module, folder: str | Path, allow_other_base: bool = False) -> list[str]:
    """Add the adapters of a folder to ``model``, a base without adapters. Nothing is changed unless all of it fits.

    A base that is quantized otherwise than in training is a close relative of the right one: that is a warning, no error.

    Args:
        model: any tree with the modules that the adapter names.
        folder: PEFT's layout, ours or theirs.
        allow_other_base: accept a base other than the one the adapter was trained on.

    Returns:
        The adapted paths, in the model's order.

    Raises:
        UserError: ``adapter/...``: an unsupported option, missing, unexpected or non-finite tensors, shapes of another
            base, another fingerprint.
    """
    folder = Path(folder)
    config = read_adapter_config(folder, model)
    header = read_header(regular_file(folder, WEIGHTS_FILE, "adapter/no-weights"), "adapter")
    targets = _resolve_safely(model, config, folder)
    factors = {path: factors_of(model.get_submodule(path), path, rank, config.use_dora) for path, (rank, _) in targets.items()}
    rows = RowsInFile(model, config_path(folder), [*targets])
    _check_tensors(model, factors, header, rows.names)
    row_tensors = rows.read(header)
    trained_on = recorded_base(folder)
    if trained_on is not None and not allow_other_base:
        _check_base(model, trained_on, folder)
    tensors = read_factors(factors, header)
    rows.grow_()
    paths = apply_lora_(model, config)
    rows.put_(row_tensors)
    with torch.no_grad():
        for path, adapter in lora_modules(model).items():
            for name, parameter in _trained(path, adapter).items():
                parameter.copy_(tensors[name])
    if trained_on is not None:
        _compare_quantization(trained_on.values.get("quantization"), quantization_of(model), folder)
    return paths


def _resolve_safely(model: nn.Module, config: LoRAConfig, folder: Path) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each target. Patterns from the file run in a child process first: they can take for ever."""
    where = visible(folder / CONFIG_FILE)
    require_no_adapters(model)
    try:
        return run_patterns(lambda: _resolve(model, config), where, needs_patterns(config))
    except UserError as error:
        if error.code.startswith("adapter/"):
            raise
        what, fix = "its targets are not in this model", "give the base model that the adapter was trained on"
        raise UserError("adapter/base-mismatch", what, where=where, found=visible(error, 500), fix=fix) from None


def _resolve(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each target."""
    return {
        path: (pattern_value(path, config.rank_pattern, config.rank), pattern_value(path, config.alpha_pattern, config.alpha))
        for path in match_targets(model, config.targets)
    }


def _check_tensors(model: nn.Module, factors: Mapping[str, Factors], header: Header, rows: list[str]) -> None:
    """Every module has its tensors, of the right shapes, and what else is there are weights of the base, unchanged."""
    repeated = {name: base for name, base in repeated_weights(header).items() if _has_weight(model, base)}
    check_names({*rows, *(name for factor in factors.values() for name in factor.names)}, header, repeated)
    for path, factor in factors.items():
        check_shapes(path, factor, header)
    for name, stored in read_tensors(header, list(repeated), "adapter"):
        owner, _, leaf = repeated[name].rpartition(".")
        ours = getattr(model.get_submodule(owner), leaf, None)  # none of a linear in 4 bits: nobody can compare it
        if not isinstance(ours, nn.Parameter) or not same_weight(whole(ours.detach()).cpu(), stored):
            raise changed_weight(name, header)


def _has_weight(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    return getattr(module, leaf, None) is not None or (leaf == "weight" and isinstance(module, NF4Linear))


def recorded_base(folder: Path) -> Fields | None:
    """What our own file says of the base that the adapter was trained on; None without that file."""
    if not (folder / FACTS_FILE).exists():
        return None
    path = regular_file(folder, FACTS_FILE, "adapter/bad-config")
    return Fields(read_json_object(path, "adapter/bad-config"), visible(path), "adapter").inner("base")


def recorded_base_name(folder: Path) -> str:
    """What the adapter's files call their base.

    Raises:
        UserError: no adapter there, or none named.
    """
    name = named_base(folder)
    if name is None:
        where = visible(config_path(folder))
        raise UserError("adapter/no-base-name", "the adapter does not name its base", where=where, fix="give --model")
    return name


def named_base(folder: Path) -> str | None:
    """``recorded_base_name``, or None where the adapter's files name no base."""
    name = read_json_object(config_path(folder), "adapter/bad-config").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _compare_quantization(before: object, now: object, folder: Path) -> None:
    """Say so when base weights are held otherwise than they were in training."""
    if before != now:
        what = "the adapter was trained on a base held otherwise"
        found, expected = (visible(_quantization_words(value)) for value in (now, before))
        warnings.warn(f"{what}: {visible(folder)}; here {found}, in training {expected}", stacklevel=3)


def _quantization_words(value: object) -> str:
    if not isinstance(value, Mapping):
        return "dense weights"
    return ", ".join(f"{key} {item}" for key, item in sorted(value.items()))


def _check_base(model: nn.Module, base: Fields, folder: Path) -> None:
    trained_on, here = base.values.get("fingerprint"), base_fingerprint(model)
    if trained_on is None or here is None or trained_on == here:
        return
    origin = origin_of(model)
    if origin is not None and trained_on == quantized_from(Path(origin.path)):
        return  # the same weights in 4 bits; that they are held as in training is compared apart
    name = read_json_object(folder / CONFIG_FILE, "adapter/bad-config").get("base_model_name_or_path")
    raise UserError(
        "adapter/base-mismatch",
        "the adapter was trained on another base",
        where=visible(folder),
        found=f"{visible(origin.name if origin else '')} ({visible(here[:16])}, {origin.file_dtype if origin else ''})",
        expected=f"{visible(name)} ({visible(trained_on)[:16]}, {visible(base.values.get('file_dtype'))})",
        fix=f"load {visible(name)}, or pass allow_other_base=True if the bases are as good as equal",
    )
