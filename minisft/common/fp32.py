"""Parameters that stay fp32 whatever the dtype of the model around them."""

from __future__ import annotations

import torch
from torch import nn


class Fp32Parameters(nn.Module):
    """A module whose own parameters stay fp32 when the model is converted; those of its children do not."""

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # signature of nn.Module, untyped upstream
        """Move with the model, but stay fp32: ``model.to(bfloat16)`` must not round what trains."""
        own = {name: p.data for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, before in own.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device)
                parameter.grad = None  # it was rounded along
        return self
