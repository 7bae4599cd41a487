"""Starting a run from an adapter: it says rank, alpha, targets and form, and training goes on from its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from minisft.common.errors import UserError, visible
from minisft.common.settings import flag_name
from minisft.config import LoRAConfig, RunConfig
from minisft.formats import load_adapter_
from minisft.formats.adapter_config import read_adapter_config
from minisft.surgery import lora_modules, match_targets

Config = TypeVar("Config", bound=RunConfig)
SETTINGS = ("rank", "alpha", "use_rslora", "use_dora")


def with_adapter_settings(run: Config, model: nn.Module) -> tuple[Config, LoRAConfig]:
    """The settings of a run that starts from ``run.init_adapter``.

    Args:
        run: the settings; what they leave open (None) is taken from the adapter.
        model: the base, or one of its shape on the meta device.

    Returns:
        ``run`` with the adapter's rank, alpha, form and targets; and the adapter's own config, with its patterns.

    Raises:
        UserError: ``config/contradicts-adapter`` for a setting that is given and differs; ``adapter/...`` for a folder that
            holds no adapter.
    """
    folder = Path(str(run.init_adapter))
    config = read_adapter_config(folder, model)
    for flag, found, expected in _contradictions(run, config, model):
        raise UserError(
            "config/contradicts-adapter", "a setting contradicts the adapter that the run starts from", where=flag,
            found=visible(found), expected=f"{visible(expected)}, as in {visible(folder)}",
            fix=f"leave {flag} away, or start without --init-adapter",
        )  # fmt: skip
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    settings = {name: getattr(config, name) for name in SETTINGS}
    return replace(run, targets=targets, **settings), config


def _contradictions(run: RunConfig, config: LoRAConfig, model: nn.Module) -> Iterator[tuple[str, object, object]]:
    """(flag, what the run says, what the adapter says)."""
    for name in SETTINGS:
        given, own = getattr(run, name), getattr(config, name)
        if given is not None and given != own:
            yield flag_name(name), given, own
    if run.targets is not None and match_targets(model, run.lora.targets) != match_targets(model, config.targets):
        yield (
            "--targets",
            " ".join(run.targets),
            config.targets if isinstance(config.targets, str) else " ".join(config.targets),
        )


def load_init_adapter_(model: nn.Module, run: RunConfig) -> None:
    """Put the adapter on the base and give it the run's dropout; the base is frozen, the factors are trained.

    Raises:
        UserError: ``adapter/...``: another base, missing tensors, and all else that ``load_adapter_`` refuses.
    """
    load_adapter_(model, str(run.init_adapter))
    for adapter in lora_modules(model).values():
        adapter.dropout.p = run.dropout
