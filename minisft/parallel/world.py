"""The processes of one run: what they add up, what they agree on, and which of them writes.

``World`` is all that the rest of the package sees of ``torch.distributed``. With one process (``ALONE``) every method returns
what it was given and no collective runs. The loss of a step is a sum over rows divided once by the supervised tokens of all
processes, so gradients are added, never averaged: W processes compute what one would, up to the order of the sums.

Adapters are small (20 MB for rank 16 on SmolLM2), so there is no DistributedDataParallel: after the last micro-batch the
gradients lie in one flat buffer, which is reduced once. Averaging, buckets and hooks are left out on purpose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, visible

FLAT_BYTES = 2**28  # of gradients reduced at once: all of an adapter's, and full training in pieces
Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """Where this process stands among those of its run, in the words of ``torchrun``.

    Attributes:
        rank: this process, from 0; the first one writes and reports.
        size: how many there are.
        local_rank, local_size: the same among those on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    # ---- who computes what -------------------------------------------------------------------------------------------

    def share(self, items: Sequence[Item], length: Callable[[Item], int]) -> list[Item]:
        """This process's items of a step: the longest first, dealt there and back (0, 1, 1, 0, 0, ...), so that all get alike.

        Args:
            items: those of the whole step, the same in every process.
            length: what an item costs.

        Returns:
            Its part; together the parts are all items, each once. All of them, in their order, for one process.
        """
        if self.size == 1:
            return list(items)
        ordered = sorted(items, key=lambda item: -length(item))
        return [item for i, item in enumerate(ordered) if self._turn(i) == self.rank]

    def _turn(self, i: int) -> int:
        lap, place = divmod(i, self.size)
        return place if lap % 2 == 0 else self.size - 1 - place

    # ---- sums --------------------------------------------------------------------------------------------------------

    def sum_ints(self, *numbers: int) -> tuple[int, ...]:
        """The sums over all processes, exact."""
        return tuple(self._reduced(numbers, torch.int64).tolist()) if self.size > 1 else numbers

    def sum_floats(self, *numbers: float) -> tuple[float, ...]:
        """The sums over all processes, in fp64; the same bits in each."""
        return tuple(self._reduced(numbers, torch.float64).tolist()) if self.size > 1 else numbers

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        import torch.distributed as dist

        return int(self._reduced([number], torch.int64, dist.ReduceOp.MAX))

    def sum_table_(self, table: Tensor) -> Tensor:
        """``table``, on the CPU, with the other processes' added to it, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(table)
        return table

    def gathered(self, share: Tensor, shape: Sequence[int]) -> Tensor:
        """Shares of rows as one tensor, at the first process; all of them must take part.

        Args:
            share: this process's rows: ceil(rows / W) of them, or what is left.
            shape: of the whole.

        Returns:
            The whole on the CPU at the first process, nothing (no rows) at the others.
        """
        import torch.distributed as dist

        rows = -(-shape[0] // self.size)
        whole = torch.empty(rows * self.size if self.is_first else 0, *shape[1:], dtype=share.dtype)
        mine = torch.zeros(rows, *shape[1:], dtype=share.dtype)
        mine[: len(share)] = share.detach()
        dist.gather(mine, list(whole.chunk(self.size)) if self.is_first else None)
        return whole[: shape[0]]

    def _reduced(self, numbers: Sequence[float], dtype: torch.dtype, op: object = None) -> Tensor:
        import torch.distributed as dist

        values = torch.tensor(numbers, dtype=dtype)
        dist.all_reduce(values, dist.ReduceOp.SUM if op is None else op)
        return values

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each ``grad`` by the sum over all processes; one without a gradient adds zero.

        Args:
            parameters: the same ones in every process, in the same order, of one dtype and device; fp32 at least.

        Cost: one all-reduce of 4 bytes a number (in pieces of ``FLAT_BYTES``), and a buffer of that size.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        for group in _pieces(list(parameters)):
            numbers = [p.numel() for p in group]
            flat = torch.zeros(sum(numbers), dtype=group[0].dtype, device=group[0].device)
            parts = flat.split(numbers)
            for p, part in zip(group, parts, strict=True):
                if p.grad is not None:
                    part.copy_(p.grad.reshape(-1))
            dist.all_reduce(flat)
            for p, part in zip(group, parts, strict=True):
                p.grad = part.view_as(p)

    # ---- agreement ---------------------------------------------------------------------------------------------------

    def any_signal(self, received: int | None) -> int | None:
        """The signal that one of the processes has received: all of them stop after the same step."""
        return self.largest(received or 0) or None

    def on_first(self, action: Callable[[], object], meanwhile: Callable[[], object] | None = None) -> None:
        """Let the first process do something, and the others wait for it.

        Args:
            action: what the first one does.
            meanwhile: what the others do, until the first has done.

        Raises:
            UserError: what ``action`` raised, in every process: nobody waits for one that has failed.
        """
        if self.size == 1:
            action()
            return
        failed: UserError | None = None
        if self.is_first:
            try:
                action()
            except UserError as error:
                failed = error
        elif meanwhile is not None:
            meanwhile()
        text = self.from_first("" if failed is None else json.dumps(failed.parts()))
        if text:
            raise failed or UserError(**json.loads(text))

    def from_first(self, text: str) -> str:
        """The first process's ``text``, in every process."""
        if self.size == 1:
            return text
        import torch.distributed as dist

        raw = text.encode() if self.is_first else b""
        length = torch.tensor([len(raw)])
        dist.broadcast(length, 0)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if raw:
            data.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        if len(data):
            dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def from_all(self, text: str) -> list[str]:
        """Every process's ``text``, by rank, in every process.

        Cost: two all-gathers: of the lengths, and of all texts, each as long as the longest.
        """
        if self.size == 1:
            return [text]
        import torch.distributed as dist

        raw = text.encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(raw)]))
        mine = torch.frombuffer(bytearray(raw.ljust(max(1, *map(int, lengths)))), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return [data[: int(length)].numpy().tobytes().decode() for data, length in zip(found, lengths, strict=True)]

    def from_first_(self, tensor: Tensor) -> Tensor:
        """The first process's numbers in place of the own ones; of one shape and dtype everywhere, without a gradient."""
        if self.size > 1:
            import torch.distributed as dist

            tensor = tensor.contiguous()
            dist.broadcast(tensor.view(torch.uint8), 0)
        return tensor

    def differing(self, facts: Mapping[str, bytes]) -> tuple[str, int] | None:
        """The first fact that is not the same everywhere, and the first process whose it is; None if all are.

        Args:
            facts: name -> content, the same names in every process.

        Cost: one all-gather of 32 bytes a fact.
        """
        if self.size == 1 or not facts:
            return None
        import torch.distributed as dist

        digests = b"".join(hashlib.sha256(content).digest() for content in facts.values())
        mine = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        for i, name in enumerate(facts):
            for rank, theirs in enumerate(found):
                if not torch.equal(theirs[i], found[0][i]):
                    return name, rank
        return None

    def require_same_start(self, facts: Mapping[str, bytes]) -> None:
        """Refuse processes that are not about to train the same thing: ``config/other-start``."""
        if found := self.differing(facts):
            name, rank = found
            raise UserError(
                "config/other-start", "the processes of this run do not start alike", where=visible(name),
                found=f"rank {rank} has another than rank 0", expected="the same settings and files in all processes",
                fix="give every machine the same files and the same command",
            )  # fmt: skip

    def require_same_weights(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Refuse to go on once the trained numbers of two processes differ in a bit: ``numeric/diverged``."""
        if self.size == 1:
            return
        if found := self.differing({name: raw_bytes(weight) for name, weight in weights.items()}):
            name, rank = found
            raise UserError(
                "numeric/diverged", "the processes no longer train the same numbers", where=f"step {step}: {visible(name)}",
                found=f"rank {rank} has other bits than rank 0", expected="the same bits in all processes",
                fix="look at that machine: its libraries or its memory; --resume goes on from the last checkpoint",
            )  # fmt: skip

    def barrier(self) -> None:
        """Wait for all processes."""
        self.largest(0)


ALONE = World()


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """The parameters in their order, cut where a piece would have more than ``FLAT_BYTES``."""
    piece: list[nn.Parameter] = []
    num_bytes = 0
    for p in parameters:
        size = p.numel() * p.element_size()
        if piece and num_bytes + size > FLAT_BYTES:
            yield piece
            piece, num_bytes = [], 0
        piece.append(p)
        num_bytes += size
    if piece:
        yield piece


def raw_bytes(tensor: Tensor) -> bytes:
    """What lies in memory for a tensor, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
