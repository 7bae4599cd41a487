"""Folding adapters into the weights: the same function, one product a layer instead of three.

W' = W + D with D = scaling * B A, summed in fp32 or wider and rounded once. That is exact up to the rounding of the storage
dtype, and ``effect`` measures what the rounding did. Every layer is computed and checked before anything is changed, the
originals are kept, so unmerging is putting them back, never a subtraction. What it refuses: merging twice, and calling two
different functions by one name: for a base in 4 bits ``onto`` says which weight D is added to.

The idea to take home: judge a merge by its effect W' - W against D, not by how close W' is to W + D. An adapter that vanished
in rounding is close, too.

Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1 ("no additional inference latency").
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.adapter import Adapter
from minisft.common.errors import UserError, listing, visible
from minisft.config import ModelConfig
from minisft.effect import Effect, LayerReport, MergeReport, Onto
from minisft.formats.foreign import ForeignLM
from minisft.formats.loading import EMBEDDING, HEAD, empty_model, fill_
from minisft.kernels import cpu_nf4
from minisft.lora import LoRAEmbedding, LoRALinear
from minisft.matmul import Linear
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight
from minisft.nf4_linear import NF4Linear
from minisft.surgery import lora_modules, quantization_of, replace_module
from minisft.trained_rows import TrainedRows, row_modules

# ---- one layer -------------------------------------------------------------------------------------------------------


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """W + D in fp32 or wider, not yet rounded.

    Args:
        weight: W, any float dtype.
        delta: D, of the same shape, fp32 or wider.

    Returns:
        a new tensor; where D is zero W is kept bit for bit (-0.0 + 0.0 would be +0.0).
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), delta.dtype)
    base = weight.to(dtype)
    return torch.where(delta == 0, base, base + delta.to(dtype))


def base_weight(adapter: Adapter) -> Tensor:
    """The weight that the adapter was trained on, dense; of a base in 4 bits, what its codes stand for, in fp32."""
    if isinstance(adapter.base, NF4Linear):
        return adapter.base.dequantized_weight(torch.float32)
    return adapter.base.weight.detach()


def rounded(name: str, numbers: Tensor, dtype: torch.dtype, own: bool = False) -> Tensor:
    """``numbers`` in ``dtype``, which may be too narrow for them.

    Args:
        name: of the weight, for the message.
        numbers: any float dtype.
        dtype: of the result.
        own: whether the result must have memory of its own.

    Returns:
        a tensor of the same shape.

    Raises:
        UserError: a number that is not finite after rounding, naming the weight.
    """
    stored = numbers.to(dtype, copy=own)
    if stored.numel() and not all(extreme.isfinite() for extreme in stored.aminmax()):  # a NaN is both
        raise UserError(
            "numeric/merge-not-finite",
            "a merged weight is not finite",
            where=visible(name),
            found=f"numbers up to {float(numbers.abs().max()):.4g} as {str(dtype).removeprefix('torch.')}",
            fix="if the weight and the adapter are finite, --dtype bf16 or fp32 can hold the sum",
        )
    return stored


@torch.no_grad()
def merge_layer(
    path: str, adapter: Adapter, onto: Onto, dtype: torch.dtype, original: Tensor | None = None
) -> tuple[Tensor | QuantizedWeight, LayerReport]:
    """W' of one layer, and what the merge did to its adapter.

    Args:
        path: of the layer, for the report.
        adapter: the layer.
        onto: which W; with ``requantized`` W' goes back to 4 bits, as its base was.
        dtype: of a dense W'.
        original: the weight before it was quantized; needed for ``onto="original"`` over a base in 4 bits.

    Returns:
        W', a tensor or a quantized weight, and the report.

    Raises:
        UserError: W' is not finite, or ``requantized`` over a base that is dense.
    """
    trained = base_weight(adapter)
    base = trained if original is None else original
    delta, effect = adapter.delta_weight(), Effect()
    exact = merged_weight(base, delta)
    if onto == "requantized":
        rounded(path, exact, exact.dtype)
        q = _requantized(path, adapter, exact, keep=not bool(delta.any()))
        effect.add(base, delta, cpu_nf4.dequantize(q, torch.float32))
        return q, effect.report(path)
    stored = rounded(path, exact, dtype)
    effect.add(base, delta, stored, None if original is None else trained)
    return stored, effect.report(path)


def _requantized(path: str, adapter: Adapter, weight: Tensor, keep: bool) -> QuantizedWeight:
    """``weight`` in 4 bits as the base is; with ``keep`` the base's own codes, as scales in 8 bits would not survive twice."""
    if not isinstance(adapter.base, NF4Linear):
        raise UserError(
            "adapter/base-not-quantized",
            "there is no 4-bit base to quantize the merge like",
            where=visible(path),
            fix="merge onto the base as it is, and quantize the merged model",
        )
    q, facts = adapter.base.quantized, quantization_of(adapter.base)
    if keep:
        return copy.deepcopy(q)
    assert facts is not None
    levels = facts["levels"] if isinstance(facts["levels"], str) else q.levels
    again = cpu_nf4.quantize(weight, q.block_size, q.absmax2 is not None, levels, name=path)
    return dataclasses.replace(again, dtype=q.dtype)


# ---- a model ---------------------------------------------------------------------------------------------------------


def merge(
    model: CausalLM,
    onto: Onto = "dequantized",
    dtype: torch.dtype | None = None,
    original: Callable[[str], Tensor] | None = None,
) -> tuple[CausalLM, MergeReport]:
    """A new model with the adapters folded in; ``model`` stays as it is and shares no memory with the new one.

    Args:
        model: with adapters, over a dense base or one in 4 bits.
        onto: ``dequantized`` adds D to the weight that it was trained on, and every layer becomes dense: the same function.
            ``original`` adds it to the weights before they were quantized: another function, which may be better or worse.
            ``requantized`` goes back to 4 bits, where small updates vanish: see ``LayerReport.survival``.
        dtype: of all dense weights; the model's own by default.
        original: for ``onto="original"``: name of a weight in 4 bits (``model.layers.0.mlp.up_proj.weight``) -> the tensor
            that was quantized.

    Returns:
        the merged model, frozen and in evaluation mode, and the report. If the head is tied to the embedding and one of them
        is adapted, the merged model is untied.

    Raises:
        UserError: no adapters, merged already, a number not finite in ``dtype``, or an ``onto`` that this base cannot have.

    Cost: the new model, and one layer three times in fp32.
    """
    if (onto == "original") != (original is not None):
        raise ValueError('onto="original" and the original weights come together')
    if isinstance(model, ForeignLM):
        raise UserError(
            "model/foreign", "a model that transformers computes is not built anew", expected="a model of our own decoder",
            fix="merge it in place with merge_weights.merge_(model)",
        )  # fmt: skip
    adapters, dtype = _adapters_to_merge(model), dtype or model.dtype
    merged: dict[str, Tensor | QuantizedWeight] = {}
    reports = []
    for path, adapter in adapters.items():
        before = original(path + ".weight") if original is not None and isinstance(adapter.base, NF4Linear) else None
        merged[path], report = merge_layer(path, adapter, onto, dtype, before)
        reports.append(report)
    tied = model.config.tie_word_embeddings and not splits_tie(adapters)
    dense = empty_model(dataclasses.replace(model.config, tie_word_embeddings=tied))
    weights = _weights(model, merged, onto, dtype, original)
    fill_(dense, ((n, w) for n, w in weights if not (tied and n == HEAD)), dtype, model.device)
    return dense.requires_grad_(False).eval(), MergeReport(onto, tuple(reports))


def _adapters_to_merge(model: nn.Module) -> dict[str, Adapter]:
    if (kept := _kept(model)) is not None:
        raise UserError(
            "adapter/already-merged", "the adapters are merged already", found=listing(kept.adapters, 3), fix="unmerge_ first"
        )
    adapters = lora_modules(model)
    if not adapters:
        raise UserError("adapter/none", "the model has no adapters to merge", fix="load one with load_adapter_ first")
    return adapters


def splits_tie(adapters: dict[str, Adapter]) -> bool:
    """Whether one of the two sides of a tied head is adapted, so that the merged model must store both."""
    return not {EMBEDDING, HEAD}.isdisjoint(path + ".weight" for path in adapters)


def _weights(
    model: CausalLM,
    merged: dict[str, Tensor | QuantizedWeight],
    onto: Onto,
    dtype: torch.dtype,
    original: Callable[[str], Tensor] | None,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Every weight of the merged model by its name, each a tensor of its own."""
    inside = tuple(path + "." for path in (*merged, *row_modules(model)))
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        name, bias = path + ".weight", getattr(getattr(module, "base", module), "bias", None)
        if path in merged:
            yield name, merged[path]
        elif isinstance(module, TrainedRows):
            yield name, rounded(name, module.merged_rows(module.base.weight.detach()), dtype, own=True)
        elif isinstance(module, NF4Linear):  # without an adapter; it goes the way of its neighbours
            if onto == "requantized":
                yield name, copy.deepcopy(module.quantized)
            else:
                dense = module.dequantized_weight(torch.float32) if original is None else original(name)
                yield name, rounded(name, dense.detach(), dtype, own=True)
        elif isinstance(weight := getattr(module, "weight", None), Tensor):
            yield name, rounded(name, weight.detach(), dtype, own=True)
        if isinstance(bias, Tensor):
            yield path + ".bias", rounded(path + ".bias", bias.detach(), dtype, own=True)


# ---- in place, and back ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """What ``unmerge_`` puts back."""

    adapters: Mapping[str, Adapter | TrainedRows]
    config: ModelConfig | None


def _kept(model: nn.Module) -> _Kept | None:
    return getattr(model, "_kept_by_merge", None)


def put_aside(model: nn.Module) -> list[nn.Module]:
    """The modules that ``unmerge_`` would put back, bases and all."""
    kept = _kept(model)
    return [] if kept is None else list(kept.adapters.values())


def merge_(model: nn.Module, dtype: torch.dtype | None = None) -> MergeReport:
    """Put a dense layer with W' = W + D in the place of every adapted one; the adapters and their bases are kept.

    Args:
        model: any tree with adapters, changed in place once every layer has been computed and found finite.
        dtype: of the merged weights; by default each base's own. For a base in 4 bits it is the model's, or in a tree that
            is no ``CausalLM`` what the 4 bits were made from.

    Returns:
        the report, ``onto="dequantized"``: what was trained is what is merged.

    Raises:
        UserError: no adapters, merged already, or a sum that is not finite; the model is then unchanged.

    Cost: the merged weights beside the originals. A model that moves to another device while merged unmerges to the old one.
    """
    adapters = _adapters_to_merge(model)
    layers: dict[str, nn.Module] = {}
    reports = []
    for path, adapter in adapters.items():
        weight, report = merge_layer(path, adapter, "dequantized", dtype or _own_dtype(model, adapter))
        assert isinstance(weight, Tensor)
        layers[path] = _dense_layer(adapter, weight).train(adapter.training)
        reports.append(report)
    rows = row_modules(model)
    layers |= _dense_tables(rows, dtype)
    for path, layer in layers.items():
        replace_module(model, path, layer)
    config = None
    if isinstance(model, CausalLM) and model.config.tie_word_embeddings and splits_tie(adapters):
        config, model.config = model.config, dataclasses.replace(model.config, tie_word_embeddings=False)
    # A frozen value, not a module: it stays out of parameters, buffers and the state dict.
    model._kept_by_merge = _Kept({**adapters, **rows}, config)  # type: ignore[assignment]  # nn.Module admits tensors and modules only
    return MergeReport("dequantized", tuple(reports))


def _own_dtype(model: nn.Module, adapter: Adapter) -> torch.dtype:
    if not isinstance(adapter.base, NF4Linear):
        return adapter.base.weight.dtype
    return model.dtype if isinstance(model, CausalLM) else adapter.base.weight_dtype


def _dense_layer(adapter: Adapter, weight: Tensor) -> nn.Module:
    if isinstance(adapter, LoRAEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=adapter.base.padding_idx)
    layer = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert isinstance(adapter, LoRALinear)
    layer.register_parameter("bias", adapter.base.bias)
    return layer


def _dense_tables(modules: Mapping[str, TrainedRows], dtype: torch.dtype | None) -> dict[str, nn.Module]:
    """Plain embedding and head with the trained rows put in; tied ones share the table."""
    made: dict[str, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for path, module in modules.items():
        table = module.base.weight.detach()
        if id(module.rows) not in weights:
            whole = rounded(f"{path}.weight", module.merged_rows(table), dtype or table.dtype, own=True)
            weights[id(module.rows)] = nn.Parameter(whole, requires_grad=False)
        made[path] = copy.copy(module.base).train(module.training)
        made[path]._parameters = {**module.base._parameters, "weight": weights[id(module.rows)]}
    return made


def unmerge_(model: nn.Module) -> None:
    """Put the adapters and their bases back where ``merge_`` took them from: bit for bit, since they were never touched.

    Raises:
        UserError: nothing is merged.
    """
    kept = _kept(model)
    if kept is None:
        raise UserError("adapter/not-merged", "there is nothing to unmerge", fix="merge_ first")
    for path, adapter in kept.adapters.items():
        adapter.train(model.get_submodule(path).training)
        replace_module(model, path, adapter)
    if kept.config is not None:
        assert isinstance(model, CausalLM)
        model.config = kept.config
    del model._kept_by_merge
