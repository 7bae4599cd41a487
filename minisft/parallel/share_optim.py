"""AdamW of a model that is trained in shares: each process has the fp32 weights and the moments of its share, and no others.

FSDP adds the gradients of all processes up and leaves each the rows that are its own (``reduce_scatter``); nothing is averaged,
because the loss was divided by the supervised tokens of all. The update is a matter of single numbers and needs nobody else.
Only the gradient's norm is a sum over all shares, the same bits everywhere, so all clip or skip together.

On disk there are no shares: the first process asks for one tensor after the other and writes it whole, as one process would.
Refused are moments in 8 bits, whose blocks would not be those of whole tensors.

Ref: Rajbhandari et al. 2020, arXiv:1910.02054, section 5; Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from minisft.common.shares import Later
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.parallel.shard import take_over_
from minisft.parallel.world import World


class ShareAdamW(MasterAdamW):
    """``MasterAdamW`` over this process's rows of every trained weight.

    Args:
        model: of ``load_sharded`` with ``trained``, ready for the run's method.
        parameters: name -> what is trained of it.
        world: the processes that share it.
        betas, weight_decay: as for ``MasterAdamW``.
    """

    def __init__(
        self,
        model: CausalLM,
        parameters: Mapping[str, nn.Parameter],
        world: World,
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        take_over_(model)
        self.model, self.world = model, world
        self._asked: dict[str, Tensor] = {}  # what the first process may ask for, in the same order everywhere
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._weights = {name: _local(p) for name, p in model.named_parameters()}  # frozen ones too
        shares = {name: nn.Parameter(self._weights[name]) for name in parameters}  # of the same memory
        super().__init__(shares, betas=betas, weight_decay=weight_decay)
        for name, p in parameters.items():
            p.register_post_accumulate_grad_hook(partial(_collect, share=shares[name]))

    @property
    def replicated(self) -> dict[str, nn.Parameter]:
        """What each process trains whole: nothing."""
        return {}

    def grad_norm(self) -> float:
        """Euclidean norm over the gradients of all processes together; NaN or infinite if any is."""
        return math.sqrt(self.world.sum_floats(self._sum_of_squares())[0])

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what was saved, by any number of processes.

        Args:
            tensors: this process's rows of each tensor.
        """
        super().load_state(tensors)
        self.model.reshard()  # type: ignore[operator]  # embedding and head may be gathered, as they were before

    # ---- whole tensors, for files ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor | Later]:  # type: ignore[override]  # they are whole when they are written
        """Masters, moments and step counts by name, as of one process; to be read inside ``writing``."""
        return {name: self._later(name, t) if t.ndim else t for name, t in super().state().items()}

    def weights(self) -> dict[str, Later]:
        """All weights of the model by name, the frozen ones too; to be read inside ``writing``."""
        return {name: self._later(name, share) for name, share in self._weights.items()}

    def writing(self, action: Callable[[], object]) -> None:
        """Let the first process write ``state`` or ``weights``; the others send what it asks for until it has done.

        Raises:
            UserError: what ``action`` raised, in every process.

        Cost: each tensor that is written goes once to the first process, which holds one of them at a time.
        """
        self._asked = self._weights | {name: share for name, share in super().state().items() if share.ndim}
        names = list(self._asked)

        def ask() -> None:
            try:
                action()
            finally:
                self.world.largest(-1)

        def answer() -> None:
            while (number := self.world.largest(-1)) >= 0:
                self._gathered(names[number])

        self.world.on_first(ask, answer)

    def _later(self, name: str, share: Tensor) -> Later:
        def make() -> Tensor:
            self.world.largest(list(self._asked).index(name))
            return self._gathered(name)

        return Later(self._shape(name), share.dtype, make)

    def _gathered(self, name: str) -> Tensor:
        return self.world.gathered(self._asked[name], self._shape(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name.partition("/")[0]]


def _local(parameter: nn.Parameter) -> Tensor:
    """This process's rows, in the memory that FSDP gathers from."""
    return parameter.detach().to_local()  # type: ignore[attr-defined]  # a DTensor


def _collect(parameter: Tensor, *, share: nn.Parameter) -> None:
    """Add the gradient of a micro-batch, summed over the processes, to that of the step."""
    assert parameter.grad is not None
    gradient = parameter.grad.to_local()  # type: ignore[attr-defined]  # a DTensor
    share.grad = gradient if share.grad is None else share.grad.add_(gradient)
    parameter.grad = None
