"""Changing a model's modules: hold linears in 4 bits, add adapters, find them, switch them off for a while.

Everything works on any ``nn.Module`` tree with ``nn.Linear`` in it, ours or somebody else's. Modules are found by type and
path, never by a piece of their name; a request that matches nothing is an error that lists what would have matched. The base
is quantized first and adapted afterwards, and whatever is refused is refused before the first module is replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from minisft.adapter import Adapter, FrozenLinear, check_rank
from minisft.common.errors import UserError, listing, nearest, visible
from minisft.common.safe_json import JSON
from minisft.common.seeds import generator
from minisft.config import ALL_LINEAR, QUANT_LEVELS, LoRAConfig, QuantConfig
from minisft.dora import DoRALinear
from minisft.lora import LoRAEmbedding, LoRALinear
from minisft.nf4 import codebook
from minisft.nf4_linear import NF4Linear
from minisft.pissa import PiSSALinear
from minisft.trained_rows import TrainedRows, own_rows, row_modules

T = TypeVar("T")


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if the model says which: ``get_output_embeddings()`` or ``lm_head``."""
    ask = getattr(model, "get_output_embeddings", None)
    return ask() if callable(ask) else getattr(model, "lm_head", None)


def lora_modules(model: nn.Module) -> dict[str, Adapter]:
    """All adapters by path, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapter)}


def nf4_modules(model: nn.Module) -> dict[str, NF4Linear]:
    """All layers in 4 bits by path, in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}


def require_no_adapters(model: nn.Module, fix: str = "load the base model again") -> None:
    """Refuse a model that has adapters: ``UserError``."""
    if existing := {**lora_modules(model), **row_modules(model)}:
        raise UserError("adapter/already-there", "the model already has adapters", found=listing(existing, 3), fix=fix)


def _candidates(model: nn.Module) -> dict[str, FrozenLinear | nn.Embedding]:
    return {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, NF4Linear, nn.Embedding)) and path}


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
        found = [path for path, m in candidates.items() if not isinstance(m, nn.Embedding) and m is not head]
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
            "config/bad-pattern",
            "the target pattern is too long",
            found=f"{len(pattern)} characters",
            expected="at most 1000",
            fix="name the layers by their last parts",
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            "config/bad-pattern",
            "the target pattern is no regular expression",
            where=visible(pattern),
            found=str(error),
            fix="correct it, or name the layers",
        ) from None


def _no_match(name: str, candidates: Mapping[str, nn.Module]) -> list[str]:
    last_parts = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in candidates))
    raise UserError(
        "config/no-such-target",
        "a target matches no layer",
        where="--targets",
        found=visible(repr(name)),
        expected=f"one of {listing(last_parts, 30)}",
        fix=nearest(name, last_parts),
    )


def pattern_value(path: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern that matches the end of ``path`` (PEFT's rule for rank_pattern and alpha_pattern).

    Args:
        path: of the module.
        patterns: regular expression -> value.
        default: where none matches.

    Returns:
        the value.
    """
    for key, value in patterns.items():
        if _compiled(rf"(.*\.)?({key})").fullmatch(path):
            return value
    return default


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` is.

    Args:
        model: the tree, changed in place.
        path: of the module to replace.
        module: the new one.
    """
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def freeze(model: nn.Module) -> None:
    """No parameter of ``model`` gets a gradient."""
    model.requires_grad_(False)


def train_fully_(model: nn.Module, targets: str | tuple[str, ...] | None) -> list[str]:
    """Train the weights (and biases) of the target layers, and nothing else.

    A weight that two modules share, as tied embedding and head do, is trained if either is a target.

    Args:
        model: any tree with ``nn.Linear`` or ``nn.Embedding``; changed in place.
        targets: as in ``LoRAConfig``; None for every parameter of the model.

    Returns:
        The paths that are trained, in the model's order; empty for ``None``.

    Raises:
        UserError: a target that matches nothing; a layer in 4 bits.
    """
    if targets is None:
        model.requires_grad_(True)
        return []
    paths = match_targets(model, targets)
    if packed := [path for path in paths if isinstance(model.get_submodule(path), NF4Linear)]:
        raise _unquantizable(
            packed[0], "weights in 4 bits cannot be trained in full", "a linear in 4 bits", "use --method lora"
        )
    freeze(model)
    for path in paths:
        model.get_submodule(path).requires_grad_(True)
    return paths


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def quantize_(model: nn.Module, config: QuantConfig) -> list[str]:
    """Replace linear layers by ``NF4Linear``, one at a time; a dense weight is let go before the next layer's turn.

    Biases stay as they are. All weights are looked at before the first is replaced, so an error leaves the model as it was.

    Args:
        model: any tree with ``nn.Linear``; changed in place.
        config: which layers, and how they are stored.

    Returns:
        The paths that were replaced, in the model's order.

    Raises:
        UserError: what ``quantization_targets`` refuses; ``model/non-finite-weight``, naming tensor and index.

    Cost: beyond the result, the scratch of ``nf4.quantize``; one more reading of each weight.
    """
    paths = quantization_targets(model, config)
    for path in paths:
        _check_numbers(path, _dense_linear(model, path), config)
    for path in paths:
        replace_module(model, path, in_4_bits(path, _dense_linear(model, path), config))
    return paths


def quantization_targets(model: nn.Module, config: QuantConfig) -> list[str]:
    """The paths of the linears that ``config`` asks for, in the model's order; the model may be on the meta device.

    Raises:
        UserError: a target that matches nothing; an embedding; a weight that another module shares; a layer that is in
            4 bits already; a model that has adapters.
    """
    require_no_adapters(model, fix="quantize first, then add them")
    paths, names = match_targets(model, config.targets), _names_by_parameter(model)
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Embedding):
            raise _unquantizable(path, "an embedding is looked up, not multiplied, and stays dense", "an embedding")
        if isinstance(layer, NF4Linear) or not layer.get_parameter("weight").is_floating_point():
            raise _unquantizable(path, "the layer is quantized already", repr(layer), "load the dense model")
        if shared := [name for name in names[id(layer.get_parameter("weight"))] if name != f"{path}.weight"]:
            raise _unquantizable(path, "the layer's weight is tied to another module's", f"tied to {listing(shared)}")
    return paths


def _names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _unquantizable(path: str, what: str, found: str, fix: str = "leave it out of the targets") -> UserError:
    return UserError(
        "model/not-quantizable",
        what,
        where=visible(path),
        found=found,
        expected="a linear of its own, in a float dtype",
        fix=fix,
    )


def _dense_linear(model: nn.Module, path: str) -> nn.Linear:
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer


def _check_numbers(path: str, linear: nn.Linear, config: QuantConfig) -> None:
    """Raise what ``nf4.quantize`` would, for the price of one reading: only a suspicious weight is quantized to see."""
    low, high = linear.weight.detach().aminmax()  # NaN if there is one
    largest_sum = max(abs(float(low)), abs(float(high))) * linear.weight.numel()  # of the scales, whose mean must be finite
    if not largest_sum < torch.finfo(torch.float32).max:
        in_4_bits(path, linear, config)


def in_4_bits(path: str, linear: nn.Linear, config: QuantConfig) -> NF4Linear:
    """The quantized layer for ``path``; it shares the bias. Errors as in ``nf4.quantize``.

    Args:
        path: of the layer, for messages.
        linear: the dense layer.
        config: how to quantize.

    Returns:
        a new layer, in the same mode.
    """
    layer = NF4Linear.from_linear(linear, config.block_size, config.double_quant, config.levels, name=f"{path}.weight")
    return layer.train(linear.training)


def quantization_of(model: nn.Module) -> dict[str, JSON] | None:
    """How the model's 4-bit layers are stored: ``levels``, ``block_size``, ``double_quant``; None if all are dense.

    A codebook without a name is listed as its 16 values; where layers differ the value is ``"mixed"``.
    """
    layers = nf4_modules(model).values()
    if not layers:
        return None
    facts: list[dict[str, JSON]] = [
        {"levels": _levels_name(m.levels), "block_size": m.block_size, "double_quant": m.absmax2 is not None} for m in layers
    ]
    return {key: value if all(other[key] == value for other in facts) else "mixed" for key, value in facts[0].items()}


def _levels_name(levels: Tensor) -> JSON:
    named = (name for name in QUANT_LEVELS if torch.equal(codebook(name), levels.cpu()))
    return next(named, None) or [float(value) for value in levels]


# ---- adapters --------------------------------------------------------------------------------------------------------


def apply_lora_(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze ``model`` and wrap each target layer in an adapter.

    Args:
        model: any tree with ``nn.Linear``, ``NF4Linear`` or ``nn.Embedding``; changed in place.
        config: which layers, which rank and scaling.
        seed: decides the random factor, layer by layer, whatever else was drawn before.

    Returns:
        The paths that were wrapped, in the model's order.

    Raises:
        UserError: a target matches nothing, a rank does not fit, an embedding with DoRA, a layer with PiSSA that is no dense
            linear, or the model already has adapters.
    """
    require_no_adapters(model)
    paths = match_targets(model, config.targets)
    for path in paths:  # all of them fit before anything is changed
        _check_layer(path, model.get_submodule(path), config)
    wrapped = {path: _wrap(path, model.get_submodule(path), config) for path in paths}
    freeze(model)
    for index, (path, adapter) in enumerate(wrapped.items()):
        if not isinstance(adapter, PiSSALinear):  # that one has no random start
            adapter.reset_parameters(generator(seed, "lora-init", index, device=adapter.lora_A.device))
        adapter.train(model.training)
        replace_module(model, path, adapter)
    return paths


def _check_layer(path: str, layer: nn.Module, config: LoRAConfig) -> None:
    if config.init == "pissa" and not isinstance(layer, nn.Linear):
        found = "an embedding" if isinstance(layer, nn.Embedding) else "a linear in 4 bits"
        raise UserError(
            "config/pissa-layer", "PiSSA is for dense linear layers", where=visible(path), found=found,
            fix="leave it out of the targets, or use --init default",
        )  # fmt: skip
    if config.use_dora and isinstance(layer, nn.Embedding):
        raise UserError(
            "config/dora-embedding",
            "DoRA is for linear layers",
            where=visible(path),
            found="an embedding",
            fix="leave it out of the targets, or use plain LoRA",
        )
    rank = pattern_value(path, config.rank_pattern, config.rank)
    if config.init == "pissa":
        check_rank(2 * rank, _weight_shape(layer), f"{visible(path)}, where --init pissa saves twice the rank")
    check_rank(rank, _weight_shape(layer), visible(path))


def _weight_shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    assert isinstance(layer, (nn.Linear, NF4Linear))
    return layer.out_features, layer.in_features


def _wrap(path: str, base: nn.Module, config: LoRAConfig) -> LoRALinear | LoRAEmbedding:
    rank = pattern_value(path, config.rank_pattern, config.rank)
    alpha = pattern_value(path, config.alpha_pattern, config.alpha)
    if isinstance(base, nn.Embedding):
        return LoRAEmbedding(base, rank, alpha, config.dropout, config.use_rslora)
    assert isinstance(base, (nn.Linear, NF4Linear))
    if config.init == "pissa":
        assert isinstance(base, nn.Linear)
        return PiSSALinear(base, rank, alpha, config.dropout, config.use_rslora)
    if config.use_dora:
        return DoRALinear(base, rank, alpha, config.use_rslora)
    return LoRALinear(base, rank, alpha, config.dropout, config.use_rslora)


def lora_plus_ratios(model: nn.Module, ratio: float) -> dict[str, float]:
    """LoRA+: what the learning rate of each trained parameter is multiplied by.

    ``ratio`` for ``lora_B`` of linear layers and DoRA's lengths, 1 for ``lora_A``. An adapter of an embedding keeps the rate in
    both factors: there the zero factor is A, and the paper says nothing of it.

    Args:
        model: with its adapters.
        ratio: rate of B over rate of A.

    Returns:
        Parameter name -> multiplier.

    Ref: Hayou et al. 2024, arXiv:2402.12354, section 5; the groups are those of PEFT's ``create_loraplus_optimizer``, which
    gives embeddings a fixed rate of their own.
    """
    linears = {path for path, adapter in lora_modules(model).items() if isinstance(adapter, LoRALinear)}
    ratios: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if parameter.requires_grad:
            ratios[name] = ratio if owner in linears and leaf != "lora_A" else 1.0
    return ratios


def scale_adapters_(model: nn.Module, scale: float) -> None:
    """Multiply every adapter's scaling (and alpha) by ``scale``: how much of what was learned takes part.

    For LoRA the model is then W + scale * D, and the base at 0. DoRA's norms take in the scaled update, as in PEFT.

    Raises:
        UserError: no adapters, or a ``scale`` that is not finite.
    """
    if not math.isfinite(scale):
        raise UserError(
            "config/bad-value",
            "a setting is out of range",
            where="scale",
            found=str(scale),
            expected="a number",
            fix="give a finite scale",
        )
    adapters = lora_modules(model)
    if not adapters:
        raise UserError("adapter/none", "the model has no adapters to scale", fix="load one, or leave the scale at 1")
    if scale != 1.0:
        require_scalable(model)
    for adapter in adapters.values():
        adapter.scaling *= scale
        adapter.alpha *= scale


def require_scalable(model: nn.Module) -> None:
    """Refuse trained rows, which take the place of rows and are no update that could be scaled: ``config/scaled-rows``."""
    if rows := own_rows(model):
        raise UserError(
            "config/scaled-rows", "trained tokens cannot be scaled", found=listing(rows, 3), expected="scale 1",
            fix="leave the scale at 1, or train without --add-tokens",
        )  # fmt: skip


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model is its base; rows that were added to its tables are the mean of the others."""
    adapters: list[Adapter | TrainedRows] = [*lora_modules(model).values(), *row_modules(model).values()]
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


# ---- counting --------------------------------------------------------------------------------------------------------


def num_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Parameters of the model, tied ones once; only those that are trained with ``trainable``.

    A weight in 4 bits counts as the numbers it stands for, so that a model has as many parameters dense as quantized.
    """
    packed = 0 if trainable else sum(m.out_features * m.in_features for m in nf4_modules(model).values())
    return packed + sum(p.numel() for p in _dense_parameters(model) if p.requires_grad or not trainable)


def weight_bytes(model: nn.Module, dense: torch.dtype | None = None) -> int:
    """Bytes of all parameters and of the layers in 4 bits; these as if they were stored in ``dense``, if that is given."""
    quantized = [m.quantized for m in nf4_modules(model).values()]
    packed = sum(q.nbytes if dense is None else q.shape.numel() * dense.itemsize for q in quantized)
    return packed + sum(p.numel() * p.element_size() for p in _dense_parameters(model))


def _dense_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters but codes and scales, which are parameters where the base is shared among processes."""
    packed = {id(p) for m in nf4_modules(model).values() for name, p in m.named_parameters(recurse=False) if name != "bias"}
    return (p for p in model.parameters() if id(p) not in packed)
