"""What the NF4 benchmarks of both devices share: contestants, the same 4-bit weight in two libraries' hands, errors, rows.

A case is one piece of work and the contestants that do it. All of them start from the same bits: bitsandbytes quantizes, and
minisft takes codes and scales as they are. Before anything is timed, dequantized weights must be equal bit for bit, and the
relative error (root mean square, against fp64 over those bits) of our products within ``error_bound``; the peers' errors are
written down beside ours.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from harness import spread
from torch import Tensor, nn

from minisft import nf4
from minisft.config import LoRAConfig
from minisft.lora import LoRALinear
from minisft.nf4 import QuantizedWeight
from minisft.nf4_linear import NF4Linear

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

LORA = LoRAConfig(rank=16, alpha=32.0)
BLOCK_SIZE = 64
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MINISFT, BITSANDBYTES, TORCHAO = "minisft", "bitsandbytes", "torchao"
QLORA, DECODE = "QLoRA linear, forward + backward", "decode product"  # names of groups
Call = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        calls: the work, once for each copy of the weight, so that a pass over all of them leaves no cache warm.
        path: which code runs, for people.
        bytes_moved: the least that one call reads and writes.
        error: relative error of the result; None where it must be, and was, equal bit for bit.
    """

    name: str
    calls: Sequence[Call]
    path: str
    bytes_moved: int
    error: float | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work; ``pairs`` are the (ours, peer) whose times are compared."""

    group: str
    label: str
    contestants: Sequence[Contestant]
    pairs: Sequence[tuple[str, str]]
    bound: float | None = None
    notes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in self.contestants:
            if each.name.startswith(MINISFT) and each.error is not None and self.bound is not None:
                assert each.error <= self.bound, f"{self.group} {self.label}: off by {each.error}, more than {self.bound}"


def rows(case: Case, seconds: dict[str, list[float]], **setting: str) -> list[dict]:
    """The results of a case, one row a pair; ``seconds`` are of one call, the same number of them for each contestant."""
    contestants = {c.name: c for c in case.contestants}
    found = []
    for ours, peer in case.pairs:
        if ours not in seconds or peer not in seconds:
            continue
        ratios = [theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours], strict=True)]
        row = {"group": case.group, "case": case.label, **setting, "ours": ours, "peer": peer, "ratio": spread(ratios)}
        for side, name in (("ours", ours), ("peer", peer)):
            row |= _facts(side, contestants[name], seconds[name])
        found.append(row | {"error_bound": case.bound, **case.notes})
    return found


def _facts(side: str, contestant: Contestant, seconds: list[float]) -> dict:
    milliseconds = spread([s * 1e3 for s in seconds])
    return {
        f"{side}_ms": milliseconds,
        f"{side}_bytes": contestant.bytes_moved,
        f"{side}_gb_per_s": contestant.bytes_moved / milliseconds["median"] / 1e6,
        f"{side}_path": contestant.path,
        f"{side}_error": contestant.error,
    }


def line(row: dict) -> str:
    """One row for people."""
    ratio, ours, peer = row["ratio"], row["ours_ms"]["median"], row["peer_ms"]["median"]
    errors = "" if row["ours_error"] is None else f"  error {row['ours_error']:.1e} against {row['peer_error']:.1e}"
    return (
        f"{row['setting']:14} {row['group']} {row['case']}: {row['ours']} / {row['peer']} x{ratio['median']:.2f} "
        f"({ratio['q1']:.2f} to {ratio['q3']:.2f})  {ours:.3f} ms against {peer:.3f}  {row['ours_bytes'] / 1e6:.1f} MB, "
        f"{row['ours_gb_per_s']:.1f} GB/s{errors}  [{row['ours_path']} / {row['peer_path']}]"
    )


# ---- weights ---------------------------------------------------------------------------------------------------------


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def same_weight(packed: Tensor, state: QuantState) -> QuantizedWeight:
    """bitsandbytes' double-quantized weight as ours: the same codes and scales, copied."""
    absmax, absmax2 = state.absmax.clone(), state.state2.absmax.clone()
    shape = torch.Size(state.shape)
    assert torch.equal(state.state2.code, nf4.dynamic_map(packed.device))
    return QuantizedWeight(
        packed.flatten().clone(), absmax, absmax2, state.offset.clone(), state.code.clone(), state.blocksize, shape, state.dtype
    )


def copies(weight_bytes: int, rotate_bytes: int) -> int:
    """How many copies of a weight together are larger than the cache."""
    return max(1, math.ceil(rotate_bytes / weight_bytes))


def linear_4bit(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """bitsandbytes' layer for a dense (out, in) weight, quantized on the weight's device with double quantization."""
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    form = {"compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=dtype, device="meta", **form)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **form).to(weight.device)
    return layer


def dense_linear(weight: Tensor) -> nn.Linear:
    """A frozen layer with this (out, in) weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def peft_layer(base: nn.Linear, lora_A: Tensor, lora_B: Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    """PEFT's LoRA on ``base``, 4-bit or dense, with these factors; its adapters are fp32 as PEFT makes them."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(base)
    model.is_loaded_in_4bit = type(base) is not nn.Linear  # what transformers sets, and PEFT asks for
    adapted = get_peft_model(model, LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=["0"])).train()
    factors = [p for p in adapted.parameters() if p.requires_grad]
    for factor, value in zip(factors, (lora_A, lora_B), strict=True):
        factor.data = value.to(factor.dtype)
    return adapted, factors


def minisft_layer(base: nn.Linear | NF4Linear, lora_A: Tensor, lora_B: Tensor) -> tuple[nn.Module, list[nn.Parameter]]:
    layer = LoRALinear(base, LORA.rank, LORA.alpha)
    layer.lora_A.data, layer.lora_B.data = lora_A.clone(), lora_B.clone()
    return layer, [layer.lora_A, layer.lora_B]


def factors(out_features: int, in_features: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """lora_A and lora_B as after some training: neither is zero."""
    lora_A = gaussian(LORA.rank, in_features, seed=11, device=device) / math.sqrt(in_features)
    return lora_A, gaussian(out_features, LORA.rank, seed=12, device=device) * 0.01


# ---- work ------------------------------------------------------------------------------------------------------------


def forward(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def forward_backward(layer: nn.Module, factors: Sequence[Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of x, lora_A and lora_B."""
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, *factors), grad)


def exact_lora(dense: Tensor, lora_A: Tensor, lora_B: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """What ``forward_backward`` should give, in fp64."""
    W, A, B, rows, g = (t.detach().double() for t in (dense, lora_A, lora_B, x, grad))
    scaling = LORA.alpha / LORA.rank
    xa, gb = rows @ A.T, scaling * (g @ B)
    return rows @ W.T + scaling * (xa @ B.T), g @ W + gb @ A, gb.T @ rows, scaling * (g.T @ xa)


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The worst tensor's root mean square error, as a share of the root mean square of what it should be."""
    return max(
        float(((f.detach().double() - e).square().mean() / e.square().mean()).sqrt()) for f, e in zip(found, exact, strict=True)
    )


def error_bound(dtype: torch.dtype, longest_sum: int) -> float:
    """2 u + sqrt(k) e: a few roundings to the dtype (u) that add up like noise, and fp32 sums (e) of k products.

    Rounding a Gaussian number to a dtype with unit roundoff u has a relative error of about 0.4 u, root mean square; weight,
    x A^T, the update, the base's output and their sum are five such, together about 0.9 u.
    """
    return 2 * ROUNDOFF[dtype] + math.sqrt(longest_sum) * ROUNDOFF[torch.float32]


def torchao_nf4() -> tuple[ModuleType | None, str]:
    """torchao's module of NF4 tensors, or None and why."""
    try:
        return importlib.import_module("torchao.dtypes.nf4tensor"), ""
    except ImportError as error:
        return None, f"not measured: {error}"
