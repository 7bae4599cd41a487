"""``adapter_config.json``: PEFT's description of a LoRA, written from the modules and read into a ``LoRAConfig``.

Nothing is stored twice: rank, alpha and targets are recovered from the adapted model. Which modules the settings select is
worked out by PEFT's rules (``adapter_selection``). Options that change the arithmetic in ways this library does not compute
are refused by name, whatever their future names may be: an unknown key counts as unused only while its value is null, false
or empty.

Ref: PEFT 0.21, ``LoraConfig``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from minisft.adapter import Adapter
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.config import ALL_LINEAR, LoRAConfig
from minisft.dora import DoRALinear
from minisft.formats.adapter_selection import read_narrowing, selected, target_names
from minisft.formats.fields import Fields, read_json_object
from minisft.formats.source import regular_file
from minisft.surgery import matches

T = TypeVar("T", int, float)
Adapters = Mapping[str, Adapter]

CONFIG_FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"  # the version whose layout this is

_READ = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",  # see ``adapter_rows``
}
# Keys that do not touch the arithmetic, at any value.
_REMARKS = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    # How the factors were started. They are read from the file; whether the base was changed with them ``init_lora_weights``
    # says, which PEFT sets to true when it converts such an adapter to plain LoRA, and leaves these as they are.
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
}
# Settings with a harmless value that is not null, false or empty. The other initialisations of PEFT change the base model.
_HARMLESS: dict[str, tuple[JSON, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
_EMBEDDINGS = ("embed_tokens", "lm_head")  # what PEFT ties to each other with ``ensure_weight_tying``
MERGE_THERE = "merge it with PEFT (merge_and_unload, save_pretrained) and load the result as a model"
_FIXES = {
    "init_lora_weights": "let PEFT write it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    "peft_type": "give a LoRA adapter",
    "task_type": "give an adapter of a language model",
}
# What PEFT writes for a plain LoRA and a reader of older or newer versions may look for.
_UNUSED: dict[str, JSON] = {
    "auto_mapping": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "modules_to_save": None,
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def read_adapter_config(folder: Path, model: nn.Module | None = None, stored: Collection[str] = ()) -> LoRAConfig:
    """Parse ``adapter_config.json`` for ``model``, or without one if the base is not at hand.

    Names in its list of targets that match nothing in the model are dropped: the tensors decide what must be there.
    The dropout of a DoRA is dropped, too: it matters in training alone, where this library offers none.

    Args:
        folder: of the adapter.
        model: the base, without adapters.
        stored: paths of the modules that have factors in the file. Without a model they are the targets where settings
            narrow these (``exclude_modules``, ``layers_to_transform``).

    Returns:
        the settings; their targets select exactly what the file's settings select.

    Raises:
        UserError: ``adapter/no-config``, ``adapter/bad-config``, or ``adapter/unsupported`` naming the option.
    """
    path = config_path(folder)
    values = read_json_object(path, "adapter/bad-config")
    fields = Fields(values, visible(path), "adapter")
    _refuse_unsupported(fields, values)
    try:
        return LoRAConfig(
            rank=fields.integer("r", 8),
            alpha=fields.number("lora_alpha", 8.0),
            dropout=0.0 if fields.flag("use_dora") else fields.number("lora_dropout", 0.0),
            use_rslora=fields.flag("use_rslora"),
            targets=_targets(fields, model, stored),
            rank_pattern={key: fields.inner("rank_pattern").integer(key) for key in fields.inner("rank_pattern").values},
            alpha_pattern={key: fields.inner("alpha_pattern").number(key) for key in fields.inner("alpha_pattern").values},
            use_dora=fields.flag("use_dora"),
        )
    except UserError as error:
        if error.code.startswith("adapter/"):
            raise
        what, fix = "the adapter's settings are wrong", "correct the value, or save the adapter again"
        raise UserError("adapter/bad-config", what, where=visible(path), found=visible(error, 500), fix=fix) from None


def config_path(folder: Path) -> Path:
    """Where the adapter's settings are.

    Raises:
        UserError: there is no adapter, or the file is no regular one.
    """
    if not (folder / CONFIG_FILE).exists():
        fix = f"name the folder that holds {CONFIG_FILE} (of a finished run: OUT/adapter)"
        raise UserError("adapter/no-config", "no adapter there", where=visible(folder), expected=CONFIG_FILE, fix=fix)
    return regular_file(folder, CONFIG_FILE, "adapter/bad-config")


def _refuse_unsupported(fields: Fields, values: Mapping[str, JSON]) -> None:
    if values.get("peft_type") != "LORA":
        raise fields.error("peft_type", "LORA", "unsupported", _FIXES["peft_type"])
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise fields.error("task_type", "CAUSAL_LM", "unsupported", _FIXES["task_type"])
    for name, value in values.items():
        if name in _READ or name in _REMARKS or not value or value in _HARMLESS.get(name, ()):
            continue
        if name == "ensure_weight_tying" and not _adapts_embeddings(values.get("target_modules")):
            continue
        raise fields.error(name, "this option unused (null, false or empty)", "unsupported", _FIXES.get(name, MERGE_THERE))


def _adapts_embeddings(targets: JSON) -> bool:
    """Whether targets are, or may be, an embedding or the output head."""
    if isinstance(targets, str):
        return targets != ALL_LINEAR
    return isinstance(targets, list) and any(_leaf(str(name)) in _EMBEDDINGS for name in targets)


def _targets(fields: Fields, model: nn.Module | None, stored: Collection[str]) -> str | tuple[str, ...]:
    """Targets that select, of ``model``, exactly what the settings select."""
    names, narrowing = _present(fields, model), read_narrowing(fields)
    if narrowing is None:
        return names
    if model is None:
        return tuple(sorted(stored)) or names
    paths = selected(model, names, narrowing, fields.where)
    if not paths:
        expected = "modules outside exclude_modules and in layers_to_transform"
        raise fields.error("target_modules", expected, "base-mismatch", "check that the base model is the right one")
    exact = target_names(model, paths)
    return exact if isinstance(exact, str) else tuple(map(str, exact))


def _present(fields: Fields, model: nn.Module | None) -> str | tuple[str, ...]:
    """``target_modules``, less the names that match nothing in ``model``."""
    value = fields.values.get("target_modules")
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise fields.error("target_modules", "a list of module names, a regular expression or all-linear")
    if model is None:
        return tuple(str(name) for name in value)
    paths = [path for path, _ in model.named_modules()]
    present = tuple(name for name in value if any(matches(path, name) for path in paths))
    if not present:
        expected, fix = "names of modules that the base model has", "give the base model that the adapter was trained on"
        raise fields.error("target_modules", expected, "base-mismatch", fix)
    return present


def adapter_config(model: nn.Module, adapters: Adapters, base_name: str | None) -> dict[str, JSON]:
    """The config of the adapters that ``model`` carries.

    Args:
        model: with the adapters.
        adapters: by path; what ``lora_modules(model)`` gives.
        base_name: what the base is called; None leaves it open.

    Returns:
        the content of ``adapter_config.json``.

    Raises:
        UserError: ``adapter/mixed`` when dropout, rsLoRA or DoRA differ between modules, for which PEFT has no setting.
    """
    layers = adapters.values()
    return config_of_modules(
        {path: adapter.saved_rank for path, adapter in adapters.items()},
        {path: adapter.saved_alpha for path, adapter in adapters.items()},
        target_names(model, adapters),
        base_name,
        dropout=_common("dropout", [adapter.dropout.p for adapter in layers]),
        use_rslora=bool(_common("use_rslora", [adapter.use_rslora for adapter in layers])),
        use_dora=bool(_common("use_dora", [isinstance(adapter, DoRALinear) for adapter in layers])),
    )


def config_of_modules(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    targets: list[JSON] | str,
    base_name: str | None,
    *,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> dict[str, JSON]:
    """The config of modules with these ranks and alphas.

    Args:
        ranks, alphas: by path.
        targets: names, or a pattern, that select exactly these modules.
        base_name: what the base is called; None leaves it open.
        dropout, use_rslora, use_dora: of all modules.

    Returns:
        the content of ``adapter_config.json``.
    """
    rank, rank_pattern = _exceptions(ranks)
    alpha, alpha_pattern = _exceptions({path: _plain(alpha) for path, alpha in alphas.items()})
    return {
        **_UNUSED,
        "alpha_pattern": {**alpha_pattern},
        "base_model_name_or_path": base_name,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": {**rank_pattern},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }


def _plain(number: float) -> float:
    """32.0 as 32: PEFT's alpha is an integer."""
    return int(number) if number == int(number) else number


def _common(name: str, values: list[float]) -> float:
    if len(set(values)) > 1:
        found, fix = ", ".join(map(str, sorted(set(values)))), "save the modules as several adapters"
        raise UserError("adapter/mixed", f"{name} differs between modules", found=found, expected="one value", fix=fix)
    return values[0]


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _exceptions(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most frequent value, and the patterns for the rest: a last name where all its modules agree, else whole paths."""
    default = Counter(values.values()).most_common(1)[0][0]
    patterns: dict[str, T] = {}
    for path, value in sorted(values.items()):
        same_name = {other for name, other in values.items() if _leaf(name) == _leaf(path)}
        if value != default:
            # PEFT matches a key at the end of a path; ^ makes it the whole path.
            patterns[re.escape(_leaf(path)) if len(same_name) == 1 else "^" + re.escape(path)] = value
    return default, patterns


def needs_patterns(config: LoRAConfig) -> bool:
    """Whether reading ``config`` means running regular expressions that somebody else wrote."""
    return bool(config.rank_pattern or config.alpha_pattern) or (
        isinstance(config.targets, str) and config.targets != ALL_LINEAR
    )
