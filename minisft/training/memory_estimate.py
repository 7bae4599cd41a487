"""Memory estimate of a training step: which bytes are alive at which moment, found without allocating any.

The same modules, the same optimizer and the same loss run on tensors that have a shape and a dtype but no memory (PyTorch's
fake tensors), under a tracker that notes each block when it is born and when it is freed. What it finds follows from the code
that will train and cannot drift away from it. All layers cost the same, so two and three of them are run and the rest
follows along a straight line.

Its rows all have ``max_length`` tokens, every one of them a target: the worst that the data can bring. Not seen:
what one operator takes and gives back by itself, and the gaps that the C library leaves between the blocks. A newcomer leaves
with one idea: a peak is one moment, and what it costs can be counted without paying.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisft.batching import Batch
from minisft.common.device import DTYPES
from minisft.config import ModelConfig, QuantConfig, RunConfig
from minisft.formats.loading import empty_model, expected_shapes
from minisft.matmul import compute_dtype
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.pissa import pissa_starts
from minisft.step import batch_loss_sum, optimizer_of, prepare_method
from minisft.surgery import match_targets

KINDS = ("weights", "adapters", "optimizer", "gradients", "activations", "temporary")
MEASURED_LAYERS = (3, 4)  # layers: the first one's input needs no gradient, the last one computes little more than the targets
PLACEHOLDER = "placeholder"  # a dense weight in the position of one in 4 bits: it is in no sum

Amounts = Mapping[str, float]  # bytes by kind


@dataclass(frozen=True)
class Shape:
    """A model as its headers describe it: the tensors, and which of them will be quantized, in which form."""

    config: ModelConfig
    tensors: Mapping[str, tuple[int, ...]]
    in_4_bits: Mapping[str, QuantConfig]
    row_ids: Sequence[int] = ()  # rows of embedding and head that are trained beside the adapters


@dataclass(frozen=True)
class Step:
    """Bytes of a step by kind: altogether, and alive at the moment of its peak."""

    whole: Amounts
    at_peak: Amounts


def estimate_step(run: RunConfig, shape: Shape, device: torch.device, totals: Mapping[str, int] | None = None) -> Step:
    """The bytes of one optimizer step in a run that is under way (moments exist; gradients of earlier micro-batches too).

    Args:
        run: the settings.
        shape: the model, as its headers describe it.
        device: where the run will be.
        totals: bytes altogether of the kinds of which a process has only its share; what is alive of them is scaled alike.

    Returns:
        Bytes by kind.
    """
    layers = shape.config.num_layers
    chosen = () if run.targets is None and run.method == "full" else match_targets(empty_model(shape.config), run.lora.targets)
    paths = [*shape.in_4_bits, *chosen]
    if layers <= max(MEASURED_LAYERS) or not _same_in_all_layers(paths, layers):
        found = _peak_by_phase(run, shape, device, layers)
    else:
        few, more = (_peak_by_phase(run, shape, device, n) for n in MEASURED_LAYERS)
        steps = (layers - MEASURED_LAYERS[0]) / (MEASURED_LAYERS[1] - MEASURED_LAYERS[0])
        found = {
            moment: {kind: few[moment][kind] + steps * (more[moment][kind] - few[moment][kind]) for kind in KINDS}
            for moment in few
        }
    scales = {kind: num_bytes / found["whole"][kind] for kind, num_bytes in (totals or {}).items()}
    found = {moment: {kind: n * scales.get(kind, 1.0) for kind, n in amounts.items()} for moment, amounts in found.items()}
    whole = found.pop("whole")
    return Step(whole, max(found.values(), key=lambda amounts: sum(amounts.values())))


def _same_in_all_layers(paths: Collection[str], num_layers: int) -> bool:
    inside: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        if path.startswith("model.layers."):
            _, _, layer, rest = path.split(".", 3)
            inside[layer].add(rest)
    return not inside or (len(inside) == num_layers and len({frozenset(names) for names in inside.values()}) == 1)


def _peak_by_phase(run: RunConfig, shape: Shape, device: torch.device, num_layers: int) -> dict[str, dict[str, float]]:
    """Run ``num_layers`` layers: amounts altogether (``whole``) and at the largest moment of each part of a step.

    The parts are those within which the largest moment moves along a straight line when layers are added: until half of
    the gradients exist (activations count most), after that (gradients count most), and the update.
    """
    model, placeholders = _fake_model(run, shape, device, num_layers)
    parameters = prepare_method(model, run, shape.row_ids)
    optimizer = optimizer_of(model, parameters, run)
    batch, tracker = full_batch(run, device), MemoryTracker()
    with tracker:
        _start_moments(optimizer)
        tracker.label(optimizer.state().values(), "optimizer")
        tracker.label(model.parameters(), "weights")
        tracker.label(parameters.values(), "adapters" if run.method == "lora" else "weights")
        tracker.label(pissa_starts(model).values(), "adapters")
        tracker.label(placeholders, PLACEHOLDER)
        began = len(tracker.events)
        for _ in range(min(2, run.batch_size // (run.micro_batch_size or run.batch_size))):
            loss = batch_loss_sum(model, batch)
            tracker.label_living("activations")
            loss.backward()
            del loss
        tracker.label((m.grad for m in optimizer.master_weights.values() if m.grad is not None), "gradients")
        updating = len(tracker.events)
        optimizer.step(0.0, grad_scale=0.5)
    return _largest(tracker, began, updating)


def _fake_model(run: RunConfig, shape: Shape, device: torch.device, num_layers: int) -> tuple[CausalLM, list[Tensor]]:
    """The model with so many layers, without memory; and the placeholders of its 4-bit weights.

    Such a weight is multiplied as a dense one in the dtype of the product: that is what it is made into, for a moment.
    """
    dtype = DTYPES[run.dtype]
    matmul_dtype = compute_dtype(torch.empty(0, dtype=dtype, device=device))
    model = empty_model(replace(shape.config, num_layers=num_layers))
    with FakeTensorMode(allow_non_fake_inputs=True):  # ids, positions and targets are real: how many there are is what counts
        for name, size in expected_shapes(model).items():
            owner, _, leaf = name.rpartition(".")
            weight = torch.empty(size, dtype=matmul_dtype if name in shape.in_4_bits else dtype, device=device)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight))
    if model.config.tie_word_embeddings:
        model.tie()
    return model, [model.get_parameter(name) for name in expected_shapes(model) if name in shape.in_4_bits]


def full_batch(run: RunConfig, device: torch.device) -> Batch:
    """The largest micro-batch that the run can have; its ids are all 0."""
    ids = torch.zeros(run.micro_batch_size or run.batch_size, run.max_length, dtype=torch.int64, device=device)
    return Batch(ids, ids, torch.ones_like(ids), ids.numel(), ids.numel(), ())


def _start_moments(optimizer: MasterAdamW) -> None:
    """What the first step leaves behind."""
    for master in optimizer.master_weights.values():
        master.grad = torch.empty_like(master)
    optimizer.step(0.0)
    optimizer.zero_grad()


# ---- the tracker -------------------------------------------------------------------------------------------------------


class MemoryTracker(TorchDispatchMode):
    """Notes each block of memory that operators make while it is active, and when it is freed.

    Attributes:
        events: (block, bytes), the bytes negative when the block is freed.
        kinds: what a block is, once ``label`` has said so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.kinds: dict[int, str] = {}
        self._living: dict[int, tuple[int, int]] = {}  # address of the storage object -> (block, bytes)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._block(leaf)
        return result

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what these tensors' blocks are; the last word counts. Blocks that were there before are noted now."""
        for tensor in tensors:
            self.kinds[self._block(tensor)] = kind

    def label_living(self, kind: str) -> None:
        """Say what all blocks are that are alive and have no label."""
        for block, _ in self._living.values():
            self.kinds.setdefault(block, kind)

    def _block(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata  # the same for all views of one block, for as long as it lives
        if address not in self._living:
            self._living[address] = (len(self.events), storage.nbytes())
            self.events.append(self._living[address])
            weakref.finalize(storage, self._freed, address).atexit = False
        return self._living[address][0]

    def _freed(self, address: int) -> None:
        block, num_bytes = self._living.pop(address)
        self.events.append((block, -num_bytes))


def _largest(tracker: MemoryTracker, began: int, updating: int) -> dict[str, dict[str, float]]:
    """Replay the events: the largest amount of each kind, and all kinds at the largest moment of each part of the step."""
    found: dict[str, dict[str, float]] = {part: dict.fromkeys(KINDS, 0.0) for part in ("whole", "early", "late", "update")}
    all_gradients = sum(n for block, n in tracker.events if n > 0 and tracker.kinds.get(block) == "gradients")
    now = dict.fromkeys((*KINDS, PLACEHOLDER), 0)
    for index, (block, num_bytes) in enumerate(tracker.events):
        kind = tracker.kinds.get(block, "temporary")
        now[kind] += num_bytes
        if index < began or kind == PLACEHOLDER:
            continue
        found["whole"][kind] = max(found["whole"][kind], now[kind])
        part = "update" if index >= updating else "late" if 2 * now["gradients"] > all_gradients else "early"
        if sum(now[k] for k in KINDS) > sum(found[part].values()):
            found[part] = {k: float(now[k]) for k in KINDS}
    for kind in ("weights", "adapters", "optimizer"):  # there since before the step
        found["whole"][kind] = now[kind]
    return found
