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

Ref: Frantar et al. 2022, arXiv:2210.17323 (GPTQ, the same rounding in another form); Babai 1986 (the nearest plane), which
``gptq`` is; Behdin et al. 2023, arXiv:2309.01885 (coordinate descent).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, visible
from minisft.common.seeds import generator
from minisft.effect import Effect, LayerReport
from minisft.generation import no_dropout
from minisft.kernels import cpu_nf4
from minisft.lora import LoRALinear
from minisft.merge_weights import base_weight, merge, merged_weight
from minisft.model import CausalLM
from minisft.nf4 import TINY, QuantizedWeight, decode_absmax, midpoints_of, pack, unpack
from minisft.nf4_linear import NF4Linear
from minisft.surgery import lora_modules, nf4_modules, replace_module

Method = Literal["stochastic", "gptq", "descent", "both"]
METHODS: tuple[Method, ...] = get_args(Method)
BLOCK = 64  # inputs handled between two large products
SWEEPS = 3  # of descent; in the third about one code in a thousand still changes
DAMPING = 0.01  # of the mean of H's diagonal, added to it: text is finite, and directions it never took must not run free


# ---- the grid of one layer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What the weights of a layer can be while its scales stay: one row an input, (I, O), so that a step reads one row.

    Args:
        codes: (I, O) uint8, those of the base.
        scales: (I, O) fp32, of each weight's block.
        levels: (16,) fp32.
        pinned: (I, O) bool, weights that keep their code: those at the end of the levels, without which a block's scale would
            no longer be its largest magnitude, and those in blocks of zeros.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    pinned: Tensor

    @classmethod
    def of(cls, q: QuantizedWeight) -> Grid:
        """The grid of a weight, (O, I)."""
        length = q.shape.numel()
        scales = decode_absmax(q).repeat_interleave(q.block_size)[:length].view(q.shape).T.contiguous()
        codes = unpack(q.packed, length).view(q.shape).T.contiguous()
        return cls(codes, scales, q.levels, (q.levels[codes.int()].abs() >= 1) | (scales.abs() < TINY))

    def take(self, inputs: Tensor) -> Grid:
        """The grid of some inputs, in that order."""
        return Grid(self.codes[inputs], self.scales[inputs], self.levels, self.pinned[inputs])

    def values(self, codes: Tensor) -> Tensor:
        """What codes of all inputs stand for, (I, O) fp32: the numbers that ``dequantize`` gives."""
        return self.levels[codes.int()] * self.scales

    def rounder(self) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        """(input, (O,) wanted weights) -> codes of the nearest that are possible, and what these stand for."""
        midpoints, order = midpoints_of(self.levels)
        order = order.to(torch.uint8)

        def nearest(i: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
            # Beyond 1 lie levels that no scale was made for: int4's -8 / 7.
            free = order[torch.bucketize((wanted / self.scales[i]).clamp(-1, 1), midpoints)]
            codes = torch.where(self.pinned[i], self.codes[i], free)
            return codes, self.levels[codes.int()] * self.scales[i]

        return nearest

    def store(self, q: QuantizedWeight, codes: Tensor) -> QuantizedWeight:
        """``q`` with other codes, (I, O); it shares no memory with ``q``."""
        own = {name: t.clone() for name in ("absmax", "absmax2", "offset", "levels") if (t := getattr(q, name)) is not None}
        beyond = unpack(q.packed, 2 * len(q.packed))[q.shape.numel() :]  # half a byte that stands for nothing, if N is odd
        return dataclasses.replace(q, packed=pack(torch.cat((codes.T.flatten(), beyond))), **own)


def damped(moments: Tensor) -> Tensor:
    """H + c I in fp64, positive definite: (I, I). With it, an error that the text does not show still costs a little."""
    H = moments.double()
    return H + torch.eye(len(H), dtype=H.dtype, device=H.device) * (DAMPING * float(H.diag().mean()) or 1.0)


# ---- methods of choosing codes ----------------------------------------------------------------------------------------


def gptq(grid: Grid, target: Tensor, moments: Tensor) -> Tensor:
    """Round one input after the other, each time correcting for the errors made so far.

    With H = R^T R, R upper triangular, e H e^T = sum_i R_ii^2 (e_i + sum_{j>i} R_ij / R_ii e_j)^2: one square for each input,
    which depends on those after it only. So from the last to the first each e_i is made to cancel the sum as well as the
    grid allows. The input with the largest H_ii goes first, while all others can still make up for it.

    Args:
        target: (I, O), W + D transposed.
        moments: (I, I), H.
        grid: what the weights of the layer can be.

    Returns:
        codes, (I, O) uint8.

    Cost: I^2 O / 2 multiplications in fp32, one factorization of (I, I) in fp64.
    """
    H = damped(moments)
    order = H.diag().argsort(stable=True)
    grid, target = grid.take(order), target[order]
    R = torch.linalg.cholesky(H[order][:, order], upper=True)
    leaning = (R / R.diag()[:, None]).to(target.dtype)
    nearest, codes, error = grid.rounder(), torch.empty_like(grid.codes), torch.zeros_like(target)
    for end in range(len(R), 0, -BLOCK):
        begin = max(0, end - BLOCK)
        later = leaning[begin:end, end:] @ error[end:]
        for i in reversed(range(begin, end)):
            lean = later[i - begin] + leaning[i, i + 1 : end] @ error[i + 1 : end]
            codes[i], value = nearest(i, target[i] - lean)
            error[i] = value - target[i]
    return codes[order.argsort()]


def descend(grid: Grid, target: Tensor, moments: Tensor, codes: Tensor) -> Tensor:
    """Change one input's codes at a time to the best, all others held: e_i = -(sum_{j != i} H_ij e_j) / H_ii, rounded.

    No step makes e H e^T larger. Arguments as for ``gptq``, and the codes to start from.

    Args:
        grid: what the weights of the layer can be.
        target: (I, O), W + D transposed.
        moments: (I, I), H.
        codes: (I, O) uint8, to start from.

    Returns:
        codes, (I, O) uint8.

    Cost: I^2 O multiplications a sweep.
    """
    H = damped(moments).to(target.dtype)
    nearest, codes, error = grid.rounder(), codes.clone(), grid.values(codes) - target
    for begin in [*range(0, len(H), BLOCK)] * SWEEPS:
        block = H[begin : begin + BLOCK]
        slope = block @ error
        for k in range(len(block)):
            i = begin + k
            codes[i], value = nearest(i, target[i] + error[i] - slope[k] / block[k, i])
            change = value - target[i] - error[i]
            error[i] += change
            slope[k + 1 :].addr_(block[k + 1 :, i], change)
    return codes


def round_stochastically(grid: Grid, target: Tensor, draw: torch.Generator) -> Tensor:
    """One of the two nearest levels at random, so that the mean is ``target``: codes, (I, O) uint8.

    Args:
        grid: what the weights of the layer can be.
        target: (I, O), W + D transposed.
        draw: the random numbers.

    Returns:
        codes, (I, O) uint8.
    """
    levels, order = grid.levels.sort(stable=True)
    scaled = (target / grid.scales).clamp(-1, 1)
    below = (torch.searchsorted(levels, scaled, right=True) - 1).clamp(0, len(levels) - 2)
    share = (scaled - levels[below]) / (levels[below + 1] - levels[below])
    up = torch.rand(share.shape, generator=draw, device=share.device) < share
    return torch.where(grid.pinned, grid.codes, order[below + up].to(torch.uint8))


def output_error(error: Tensor, moments: Tensor) -> Tensor:
    """e H e^T for each output, summed in fp64: (I, O) and (I, I) -> (O,)."""
    return (error.double() * (moments @ error)).sum(0).clamp(min=0)


def choose_codes(grid: Grid, target: Tensor, moments: Tensor, method: Method, draw: torch.Generator) -> Tensor:
    """The codes that ``method`` finds, (I, O) uint8; an output for which they are no better than the base's keeps the base's.

    With ``stochastic`` they stand as they are: to drop what came out badly would be to take sides.

    Args:
        grid: what the weights of the layer can be.
        target: (I, O), W + D transposed.
        moments: (I, I), H.
        method: see the module.
        draw: random numbers, for ``stochastic``.

    Returns:
        codes, (I, O) uint8.
    """
    if method == "stochastic":
        return round_stochastically(grid, target, draw)
    found = grid.codes if method == "descent" else gptq(grid, target, moments)
    if method != "gptq":
        found = descend(grid, target, moments, found)
    before, after = (output_error(grid.values(codes) - target, moments) for codes in (grid.codes, found))
    return torch.where(after < before, found, grid.codes)


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
    device = model.model.norm.weight.device
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
