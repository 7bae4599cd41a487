"""The learning rate as a pure function of the step.

There is no scheduler object and nothing to save in a checkpoint: step 17 has the same rate whether the run came straight to
it or was resumed at step 16. The one idea: the curve is zero at step 0 and at step ``total + 1``, the two steps that never
happen, so every step that does happen learns something.
"""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["cosine", "linear", "constant", "wsd"]


def learning_rate(step: int, total: int, peak: float, warmup_steps: int, kind: Kind, decay_steps: int = 0) -> float:
    """The learning rate of one optimizer step.

    With W = ``warmup_steps``, T = ``total`` and D = ``decay_steps``::

        step <= W:   peak * step / (W + 1)                           (below the peak, never 0)
        after it:    p = (step - 1 - W) / (T - W), from 0 to 1 - 1/(T - W)
            cosine   peak * (1 + cos(pi * p)) / 2
            linear   peak * (1 - p)
            constant peak
            wsd      peak until step T - D, then linear over the last D: peak * min(1, (T + 1 - step) / D)

    The peak itself is reached at step W + 1. The last step still has a positive rate: ``linear`` ends at peak / (T - W),
    ``cosine`` at peak * sin(pi / (2 (T - W)))**2, ``wsd`` at peak / D. After the warm-up this is the curve of transformers'
    schedules; during it transformers uses (step - 1) / W, which wastes the first step on a rate of 0.

    Args:
        step: counted from 1; at most ``total``.
        total: number of optimizer steps of the whole run.
        peak: the highest rate.
        warmup_steps: how many steps lie below the peak at the start; less than ``total``.
        kind: what happens after the warm-up.
        decay_steps: of ``wsd`` only: how many steps at the end come down; at most ``total - warmup_steps``.

    Returns:
        The rate, positive if ``peak`` is.

    Raises:
        ValueError: a step outside 1..total, or a warm-up outside 0..total-1, or a decay that does not fit after it.

    Ref: cosine decay, Loshchilov and Hutter 2016, arXiv:1608.03983, section 3 (without restarts). Warm-up, stable, decay:
    Hu et al. 2024, arXiv:2404.06395, section 4; the linear decay, Haegele et al. 2024, arXiv:2405.18392, section 3.
    """
    if not 1 <= step <= total:
        raise ValueError(f"step {step} is outside 1..{total}")
    if not 0 <= warmup_steps < total:
        raise ValueError(f"warm-up of {warmup_steps} steps does not fit a run of {total}")
    if kind == "wsd" and not 1 <= decay_steps <= total - warmup_steps:
        raise ValueError(f"a decay of {decay_steps} steps does not fit {total} with a warm-up of {warmup_steps}")
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    progress = (step - 1 - warmup_steps) / (total - warmup_steps)
    match kind:
        case "cosine":
            return peak * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            return peak * (1 - progress)
        case "constant":
            return peak
        case "wsd":
            return peak * min(1.0, (total + 1 - step) / decay_steps)
        case _:
            raise ValueError(f"unknown schedule {kind!r}; expected cosine, linear, constant or wsd")
