"""Changing a model's modules: add adapters, find them, switch them off for a while.

Everything works on any ``nn.Module`` tree with ``nn.Linear`` in it, ours or somebody else's. Modules are found by type and
path, never by a piece of their name; a request that matches nothing is an error that lists what would have matched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from minisft.config import ALL_LINEAR, LoRAConfig
from minisft.errors import UserError, listing, nearest, visible
from minisft.lora import LoRAEmbedding, LoRALinear, check_rank
from minisft.seeds import generator

T = TypeVar("T")


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if the model says which: ``get_output_embeddings()`` or ``lm_head``."""
    ask = getattr(model, "get_output_embeddings", None)
    return ask() if callable(ask) else getattr(model, "lm_head", None)


def lora_modules(model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding]:
    """All adapters by path, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, (LoRALinear, LoRAEmbedding))}


def _candidates(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    return {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and path}


def matches(path: str, name: str) -> bool:
    """Whether ``name`` is the path or its last parts."""
    return path == name or path.endswith("." + name)


def match_targets(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """The paths of the layers that ``targets`` asks for, in the model's order.

    Raises:
        UserError: a name or pattern that matches no linear or embedding, or a pattern that is no regular expression.
    """
    candidates = _candidates(model)
    if targets == ALL_LINEAR:
        head = output_head(model)
        found = [path for path, m in candidates.items() if isinstance(m, nn.Linear) and m is not head]
        return found or _no_match(ALL_LINEAR, candidates)
    if isinstance(targets, str):
        pattern = _compiled(targets)
        return [path for path in candidates if pattern.fullmatch(path)] or _no_match(targets, candidates)
    for name in targets:
        if not any(matches(path, name) for path in candidates):
            _no_match(name, candidates)
    return [path for path in candidates if any(matches(path, name) for name in targets)]


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > 1000:
        raise UserError(
            "config/bad-pattern", "the target pattern is too long", found=f"{len(pattern)} characters", expected="at most 1000"
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            "config/bad-pattern", "the target pattern is no regular expression", where=visible(pattern), found=str(error)
        ) from None


def _no_match(name: str, candidates: Mapping[str, nn.Module]) -> list[str]:
    last_parts = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in candidates))
    raise UserError(
        "config/no-such-target",
        "a LoRA target matches no layer",
        where="--targets",
        found=visible(repr(name)),
        expected=f"one of {listing(last_parts, 30)}",
        fix=nearest(name, last_parts),
    )


def pattern_value(path: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern that matches the end of ``path`` (PEFT's rule for rank_pattern and alpha_pattern)."""
    for key, value in patterns.items():
        if _compiled(rf"(.*\.)?({key})").fullmatch(path):
            return value
    return default


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def freeze(model: nn.Module) -> None:
    """No parameter of ``model`` gets a gradient."""
    model.requires_grad_(False)


def apply_lora_(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze ``model`` and wrap each target layer in an adapter.

    Args:
        model: any tree with ``nn.Linear`` or ``nn.Embedding``; changed in place.
        config: which layers, which rank and scaling.
        seed: decides the random factor, layer by layer, whatever else was drawn before.

    Returns:
        The paths that were wrapped, in the model's order.

    Raises:
        UserError: a target matches nothing, a rank does not fit, or the model already has adapters.
    """
    if existing := lora_modules(model):
        raise UserError(
            "adapter/already-there",
            "the model already has adapters",
            found=listing(existing, 3),
            fix="load the base model again",
        )
    paths = match_targets(model, config.targets)
    for path in paths:  # all of them fit before anything is changed
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        check_rank(pattern_value(path, config.rank_pattern, config.rank), tuple(weight.shape), visible(path))
    wrapped = {path: _wrap(path, model.get_submodule(path), config) for path in paths}
    freeze(model)
    for index, (path, adapter) in enumerate(wrapped.items()):
        adapter.reset_parameters(generator(seed, "lora-init", index, device=adapter.lora_A.device))
        adapter.train(model.training)
        replace_module(model, path, adapter)
    return paths


def _wrap(path: str, base: nn.Module, config: LoRAConfig) -> LoRALinear | LoRAEmbedding:
    rank = pattern_value(path, config.rank_pattern, config.rank)
    alpha = pattern_value(path, config.alpha_pattern, config.alpha)
    if isinstance(base, nn.Embedding):
        return LoRAEmbedding(base, rank, alpha, config.dropout, config.use_rslora)
    assert isinstance(base, nn.Linear)
    return LoRALinear(base, rank, alpha, config.dropout, config.use_rslora)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model is its base."""
    adapters = lora_modules(model).values()
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


def num_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Parameters of the model, tied ones once; only those that are trained with ``trainable``."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
