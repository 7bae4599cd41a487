"""AdamW on fp32 master weights.

A parameter stored in bf16 is the rounded copy of a master weight that the optimizer owns: updates far smaller than the copy's
last bit still add up. Gradients are collected in fp32 as they arrive, so many micro-batches sum like one.
Adapters are fp32 already and are their own master weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from minisft.adam_8bit import Moments, adamw_8bit_

_WHOLE = 2**16  # numbers of a gradient whose norm is one fp32 sum: 5e-5 too low at most, if all are the same


class MasterAdamW:
    """Decoupled-weight-decay Adam (``torch.optim.AdamW``) over named parameters.

    Args:
        parameters: name -> parameter to train.
        betas, eps: moment decay and the floor of the denominator.
        weight_decay: applied to matrices only, not to norms and biases.
        lr_ratios: name -> what the rate is multiplied by for this parameter; 1 for those that are not named.
        in_8_bits: names of those whose moments are kept in 8 bits (``adam_8bit``).

    Ref: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
        lr_ratios: Mapping[str, float] | None = None,
        in_8_bits: Collection[str] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self.master_weights = {name: _master(p) for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            if self.master_weights[name] is not p:
                p.register_post_accumulate_grad_hook(_collect_into(self.master_weights[name]))
        self.ratios = ratios = {name: (lr_ratios or {}).get(name, 1.0) for name in self.parameters}
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.in_8_bits = {name: Moments.zeros(m) for name, m in self.master_weights.items() if name in in_8_bits}
        whole = {name: m for name, m in self.master_weights.items() if name not in self.in_8_bits}
        groups = [
            {
                "params": [m for name, m in whole.items() if ratios[name] == ratio and (m.ndim >= 2) == decays],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_ratio": ratio,
            }
            for ratio in dict.fromkeys(ratios.values())
            for decays in (True, False)
        ]
        groups = [g for g in groups if g["params"]] or [{"params": [nn.Parameter(torch.zeros(1))], "lr_ratio": 1.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    @property
    def replicated(self) -> dict[str, nn.Parameter]:
        """The master weights that each process of a run has whole: their gradients are to be added up."""
        return self.master_weights

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.parameters.values(), *self.master_weights.values()):
            tensor.grad = None

    def grad_norm(self) -> float:
        """Euclidean norm over all gradients together; NaN or infinite if any is."""
        return math.sqrt(self._sum_of_squares())

    def _sum_of_squares(self) -> float:
        """In fp64 over norms in fp32, of a large table by rows: one fp32 sum is too low, and an fp64 copy takes memory."""
        gradients = [m.grad for m in self.master_weights.values() if m.grad is not None]
        small = [g for g in gradients if g.numel() <= _WHOLE]
        norms = [torch.linalg.vector_norm(g, dim=-1).reshape(-1) for g in gradients if g.numel() > _WHOLE]
        if small:
            norms.append(torch.stack(torch._foreach_norm(small)))
        return float(torch.cat(norms).double().square().sum()) if norms else 0.0

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """One update at rate ``lr`` (times a parameter's ratio) with all gradients multiplied by ``grad_scale`` (clipping)."""
        with torch.no_grad():
            if grad_scale != 1.0:
                torch._foreach_mul_([m.grad for m in self.master_weights.values() if m.grad is not None], grad_scale)
            for group in self.adamw.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            self.adamw.step()
            for name, moments in self.in_8_bits.items():
                master = self.master_weights[name]
                if master.grad is not None:
                    decay = self.weight_decay if master.ndim >= 2 else 0.0
                    adamw_8bit_(master, master.grad, moments, lr * self.ratios[name], self.betas, self.eps, decay)
            for name, p in self.parameters.items():
                if self.master_weights[name] is not p:
                    p.copy_(self.master_weights[name])

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step counts by name: everything that the next step depends on."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.master_weights.items():
            tensors[f"{name}/master"] = master.detach()
            moments = self.in_8_bits[name].state() if name in self.in_8_bits else self.adamw.state[master]
            tensors.update({f"{name}/{key}": value for key, value in moments.items()})
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned, parameters included."""
        self.adamw.state.clear()
        with torch.no_grad():
            for name, master in self.master_weights.items():
                master.copy_(tensors[f"{name}/master"])
                self.parameters[name].copy_(master)
                if name in self.in_8_bits:
                    own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
                    self.in_8_bits[name] = Moments.from_state(own, master.device)
                    continue
                moments = {
                    key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in tensors
                }
                if moments:
                    # The fused kernel wants everything beside the parameter, the step count too.
                    self.adamw.state[master] = {key: value.to(master.device, copy=True) for key, value in moments.items()}


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))


def _collect_into(master: nn.Parameter):  # type: ignore[no-untyped-def]  # the hook type is private upstream
    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        grad = parameter.grad.to(master.dtype)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        parameter.grad = None

    return collect
