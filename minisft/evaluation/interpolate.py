"""A model between two models of one shape: W + s (W' - W), for what full fine-tuning has changed.

The numbers are read from the files a tensor at a time, so beside the model itself no weight is in memory. At s = 0 and s = 1
the stored numbers are taken as they are: no arithmetic, hence no rounding. Weights in 4 bits are refused: between two codes
there is no third.

Ref: Wortsman et al. 2022, arXiv:2109.01903 (interpolating towards the pretrained weights keeps robustness).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minisft.common.errors import UserError, listing, visible
from minisft.formats.lazy_weights import Pieces, read_flat
from minisft.formats.pair import open_pair
from minisft.model import CausalLM
from minisft.surgery import lora_modules, nf4_modules


def interpolated(base: str | Path, tuned: str | Path) -> Callable[[CausalLM, float], contextlib.AbstractContextManager[None]]:
    """What ``sweep`` takes as ``at`` for a full fine-tune.

    Args:
        base, tuned: two models of one shape; W is the first one's, W' the second one's.

    Returns:
        a function of (model, scale): within its block the model's weights are W + scale (W' - W), computed in fp32 (fp64 for a
        model in fp64) and rounded once to the model's dtype; afterwards they are W.

    Raises:
        UserError: what ``open_pair`` refuses; weights in 4 bits.

    Cost: both models' files are read for each scale.
    """
    first, second = open_pair(base, tuned)
    for model in (first, second):
        if model.in_4_bits:
            raise UserError(
                "model/not-dense", "weights in 4 bits cannot be scaled", where=visible(model.source.name),
                found=listing(model.in_4_bits, 3), fix="give the dense model that they came from",
            )  # fmt: skip

    @contextlib.contextmanager
    def at(model: CausalLM, scale: float) -> Iterator[None]:
        _check(model, scale)
        try:
            for name, parameter in model.named_parameters():
                _set(parameter, first.open[name](), second.open[name](), scale)
            yield
        finally:
            for name, parameter in model.named_parameters():
                _set(parameter, first.open[name](), first.open[name](), 0.0)

    return at


def _check(model: CausalLM, scale: float) -> None:
    if not math.isfinite(scale):
        raise UserError(
            "config/bad-value", "a setting is out of range", where="scale", found=str(scale), expected="a number",
            fix="give a finite scale",
        )  # fmt: skip
    if lora_modules(model) or nf4_modules(model):
        raise UserError("model/not-dense", "only a plain model can be set to weights between two models")


@torch.no_grad()
def _set(parameter: Tensor, base: Pieces, tuned: Pieces, scale: float) -> None:
    flat, at = parameter.view(-1), 0
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    for w, changed in zip(read_flat(base), read_flat(tuned), strict=True):
        if scale == 0:
            value = w
        elif scale == 1:
            value = changed
        else:
            value = torch.lerp(w.to(dtype), changed.to(dtype), scale)
        flat[at : at + len(w)].copy_(value)
        at += len(w)
