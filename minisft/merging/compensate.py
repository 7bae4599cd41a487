"""Merging back into 4 bits with GPTQ and coordinate descent: codes are chosen for a layer's outputs, not weight by weight.

W' = Q(W + D) rounded weight by weight gives W back: W lies on the grid of its 4 bits, and a nudge below half a step rounds to
nothing. But a layer is asked for x W'^T, and errors in many weights can cancel in that sum. So text is read, the layer's inputs
X are seen, and for each output the codes are sought that make

    |X (W' - (W + D))^T|^2 / N = sum over outputs of e H e^T,    H = X^T X / N,    e = a row of W' - (W + D),

small. W' keeps the scales of W, so it has the bytes and the format of the base, and only codes differ. Four methods:
``gptq`` (error feedback) rounds one input after the other and corrects those to come for the error so far; ``descent``
(coordinate descent) starts from the base and changes single codes while that helps; ``both`` starts where GPTQ ends. These
three never end worse than rounding weight by weight in this measure, on the text they have read. ``stochastic`` rounding
looks at no text: up or down at random so that the mean is W + D, which keeps all of D and pays with noise everywhere.

The idea to take home: 4 bits can hold an adapter, if its small pushes are gathered until one is worth a whole step.

Here are the layer, the model and the reading of the text; how codes are chosen for one matrix is in ``grid_codes``.

Ref: Frantar et al. 2022, arXiv:2210.17323 (GPTQ); Behdin et al. 2023, arXiv:2309.01885 (coordinate descent).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, visible
from minisft.common.seeds import generator
from minisft.effect import Effect, LayerReport
from minisft.generation import no_dropout
from minisft.kernels import cpu_nf4
from minisft.lora import LoRALinear
from minisft.merge_weights import base_weight, merge, merged_weight
from minisft.merging.grid_codes import METHODS, Grid, Method, choose_codes, output_error
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight, unpack
from minisft.nf4_linear import NF4Linear
from minisft.surgery import lora_modules, nf4_modules, replace_module

# ---- one layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompensatedLayer:
    """The merge error of one layer; all output errors are over the text that was read.

    Attributes:
        effect: in the weights, where ``survival`` says little: many different W' give nearly the same outputs.
        output_error: |X (W' - W - D)^T|, relative to what the 4-bit base has without the adapter: 1 is that, 0 a perfect
            merge.
        plain_output_error: the same when every weight is rounded for itself.
        moved: share of the codes that are not the base's.
    """

    effect: LayerReport
    output_error: float
    plain_output_error: float
    moved: float


def compensate_layer(
    path: str,
    adapter: LoRALinear,
    plain: QuantizedWeight,
    moments: Tensor,
    method: Method,
    seed: int = 0,
    original: Tensor | None = None,
) -> tuple[QuantizedWeight, CompensatedLayer]:
    """W' of one layer over a base in 4 bits.

    Args:
        plain: W + D with every weight rounded for itself; taken if it has the smaller error (never for ``stochastic``).
        moments: (I, I) fp32, H.
        original: W, if the adapter was trained on it and not on what the base's 4 bits stand for.
        path: of the layer.
        adapter: over a base in 4 bits.
        method: see the module.
        seed: of ``stochastic``.

    Returns:
        W' in 4 bits, and its merge error.

    Raises:
        UserError: the text drove the layer's inputs to infinity.
    """
    if not torch.isfinite(moments).all():
        raise UserError(
            "numeric/calibration-not-finite",
            "the model's activations on the calibration text are not finite",
            where=visible(path),
            fix="check that the unmerged model answers well, or compute in fp32",
        )
    assert isinstance(adapter.base, NF4Linear)
    base, trained = adapter.base.quantized, base_weight(adapter) if original is None else original.float()
    delta = adapter.delta_rows(trained).float()
    target, grid = merged_weight(trained, delta).T.contiguous(), Grid.of(base)
    draw = generator(seed, f"stochastic/{path}", device=moments.device)
    codes = choose_codes(grid, target, moments, method, draw) if bool(delta.any()) else grid.codes
    rounded = cpu_nf4.dequantize(plain, torch.float32).T
    weights = (grid.values(grid.codes), grid.values(codes), rounded)
    size, ours, plainly = (float(output_error(weight - target, moments).sum()) for weight in weights)
    fall_back = plainly < ours and method != "stochastic"
    q, value = (plain, rounded) if fall_back else (grid.store(base, codes), weights[1])
    effect, count = Effect(), q.shape.numel()
    effect.add(trained, delta, value.T)
    moved = float((unpack(q.packed, count) != unpack(base.packed, count)).double().mean())
    best, other = ((error / size) ** 0.5 if size else 0.0 for error in (plainly if fall_back else ours, plainly))
    return q, CompensatedLayer(effect.report(path), best, other, moved)


# ---- a model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompensationReport:
    """Which method, over how many tokens, and the merge error of each layer."""

    method: Method
    num_tokens: int
    layers: tuple[CompensatedLayer, ...]

    @property
    def output_error(self) -> float:
        """The largest of a layer; see ``CompensatedLayer``."""
        return max(layer.output_error for layer in self.layers)


class _Reading:
    """The one reading of the text: each layer gets its codes when its input arrives, and answers with them from then on.

    So a layer is fitted to the inputs that the layers before it will really give, not to those of the unmerged model.
    """

    def __init__(self, merged: CausalLM, method: Method, seed: int, original: Callable[[str], Tensor] | None) -> None:
        self.merged, self.method, self.seed, self.original = merged, method, seed, original
        self.plain = nf4_modules(merged)
        self.layers: dict[str, CompensatedLayer] = {}
        self.seen, self.moments = torch.empty(0), torch.empty(0)

    def moments_of(self, x: Tensor) -> Tensor:
        """H of (..., I) inputs, (I, I) fp32; computed once for neighbours that share them (q, k, v; gate, up)."""
        if x is not self.seen:
            rows = x.reshape(-1, x.shape[-1]).float()
            self.seen, self.moments = x, rows.T @ rows / len(rows)
        return self.moments

    def hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def answer(adapter: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(adapter, LoRALinear)
            before = self.plain[path]
            original = None if self.original is None else self.original(f"{path}.weight").to(args[0].device)
            q, self.layers[path] = compensate_layer(
                path, adapter, before.quantized, self.moments_of(args[0]), self.method, self.seed, original
            )
            layer = NF4Linear(q, before.bias)
            replace_module(self.merged, path, layer.eval())
            return layer(args[0])

        return answer


@torch.no_grad()
def requantize_compensated(
    model: CausalLM,
    rows: Sequence[Sequence[int]],
    method: Method = "both",
    seed: int = 0,
    original: Callable[[str], Tensor] | None = None,
) -> tuple[CausalLM, CompensationReport]:
    """A new model in 4 bits with the adapters folded in; ``model`` stays as it is and shares no memory with the new one.

    Args:
        model: with adapters on linears in 4 bits.
        rows: token ids of the calibration text, one list a row: what the model will be used for, and some of what it should
            keep. A few tokens for each input of the widest layer; fewer, and codes are fitted to chance.
        method: see the module.
        seed: of ``stochastic``, for which the text is only for the report.
        original: for adapters that were trained on dense weights: name of a weight -> W as it was before it was quantized.
            The codes then make up for the quantization of W, too.

    Returns:
        the merged model, frozen and in evaluation mode, which ``save_quantized`` can write; and the report.

    Raises:
        UserError: what ``merge`` refuses for ``requantized``; no text; activations that are not finite.

    Cost: the new model; the activations of one layer for all rows together; for a layer (O, I) three matrices of its size in
    fp32, I^2 in fp64 three times, and with ``both`` 7 I^2 O multiplications, as many as one pass over 7 I tokens.
    """
    rows = [row for row in rows if len(row) > 0]
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    if not rows:
        raise UserError("data/no-calibration", "there is no text to calibrate on", fix="give rows with at least one token")
    merged, _ = merge(model, "requantized")
    reading, adapters = _Reading(merged, method, seed, original), lora_modules(model)
    device = model.device
    ids = torch.tensor([token for row in rows for token in row], device=device)
    segments = torch.repeat_interleave(torch.arange(1, len(rows) + 1), torch.tensor([len(row) for row in rows])).to(device)
    hooks = [adapter.register_forward_hook(reading.hook(path)) for path, adapter in adapters.items()]
    try:
        with no_dropout(model):
            model.hidden(ids[None], segment_ids=segments[None])
    finally:
        for hook in hooks:
            hook.remove()
    return merged, CompensationReport(method, len(ids), tuple(reading.layers[path] for path in adapters))
