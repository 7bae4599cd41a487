"""One optimizer step: the whole of the training arithmetic.

Every micro-batch's loss is a sum, divided by the supervised tokens of the whole step, so cutting a step differently
changes nothing; and a step whose loss or gradient is not finite changes nothing at all. Nothing here knows of files or runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisft.adam_8bit import MIN_NUMBERS
from minisft.adapter import RowDraws
from minisft.batching import Batch, row_pieces
from minisft.common.errors import UserError, listing
from minisft.config import RunConfig
from minisft.loss import IGNORE_INDEX, head_loss_sum
from minisft.model import MLP, CausalLM, Layer
from minisft.new_rows import set_fresh_rows_, train_rows_
from minisft.optim import MasterAdamW
from minisft.surgery import apply_lora_, lora_modules, lora_plus_ratios, train_fully_
from minisft.trained_rows import row_modules


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; ``skipped`` when loss or gradient was not finite and nothing was changed."""

    loss: float
    num_targets: int
    num_tokens: int
    grad_norm: float
    skipped: bool


def supervised_hidden(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """What a loss needs of a batch, and no more: the last layer computes only positions that have a target.

    Args:
        model: the decoder. While one of its adapters drops out, all positions are computed: masks belong to whole rows.
        batch: on the model's device.

    Returns:
        (n, D) hidden states and (n,) int64 targets of the supervised positions, in their order in ``target_ids``.
    """
    supervised = (batch.target_ids.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    drops_out = any(m.p > 0 and m.training for m in model.modules() if isinstance(m, nn.Dropout))
    hidden = model.hidden(
        batch.input_ids, segment_ids=batch.segment_ids, prefix_length=batch.prefix_length, noise=batch.noise,
        only=None if drops_out else supervised,
    )  # fmt: skip
    if drops_out:
        hidden = hidden.flatten(0, 1).index_select(0, supervised)
    return hidden, batch.target_ids.flatten().index_select(0, supervised)


def batch_loss_sum(model: CausalLM, batch: Batch) -> Tensor:
    """Summed cross-entropy over the batch's supervised tokens."""
    hidden, target_ids = supervised_hidden(model, batch)
    return head_loss_sum(hidden, model.loss_head, target_ids)


def accumulate_gradients(
    model: CausalLM, batches: Sequence[Batch], dropout_seed: int | None = None, num_targets: int | None = None
) -> float:
    """Backward through every micro-batch of a step.

    L = sum over micro-batches of the summed loss / supervised tokens of the step.

    Args:
        model: in training mode; its parameters collect the gradients.
        batches: the step's micro-batches, on the model's device.
        dropout_seed: what the dropout masks of the step follow from, row by row; None without dropout.
        num_targets: supervised tokens of the step where ``batches`` are a part of it; by default theirs.

    Returns:
        The step's mean loss per supervised token, or this part's share of it.

    Raises:
        ValueError: not one supervised token in the step.
    """
    num_targets = sum(batch.num_targets for batch in batches) if num_targets is None else num_targets
    if num_targets == 0:
        raise ValueError("a step without supervised tokens has no loss")
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        with _dropout_by_row(model, batch, dropout_seed):
            loss = batch_loss_sum(model, batch) / num_targets
            loss.backward()
        total += loss.detach().to("cpu", torch.float64)
    return float(total)


@contextlib.contextmanager
def _dropout_by_row(model: CausalLM, batch: Batch, seed: int | None) -> Iterator[None]:
    """Within this block, which holds backward too, adapters draw their masks by data row."""
    adapters = [] if seed is None else list(lora_modules(model).values())
    pieces = row_pieces(batch) if adapters else []
    try:
        for layer, adapter in enumerate(adapters):
            adapter.dropout.draws = RowDraws(seed or 0, layer, pieces)
        yield
    finally:
        for adapter in adapters:
            adapter.dropout.draws = None


def train_step(
    model: CausalLM,
    optimizer: MasterAdamW,
    batches: Sequence[Batch],
    lr: float,
    clip: float = 0.0,
    dropout_seed: int | None = None,
    check: Callable[[], None] | None = None,
) -> StepResult:
    """One optimizer step of next-token prediction over micro-batches.

    Args:
        model: in training mode.
        optimizer: over the model's trained parameters.
        batches: the step's micro-batches, on the model's device.
        lr: learning rate of this step.
        clip: gradients are scaled down to this norm if theirs is larger; 0 for never.
        dropout_seed: as in ``accumulate_gradients``.
        check: called between backward and update (the self-check of the first step).

    Returns:
        A ``StepResult``; a non-finite loss or gradient leaves parameters and moments as they were.
    """
    return optimizer_step(optimizer, batches, lambda: accumulate_gradients(model, batches, dropout_seed), lr, clip, check)


def optimizer_step(
    optimizer: MasterAdamW,
    batches: Sequence[Batch],
    gradients: Callable[[], float],
    lr: float,
    clip: float = 0.0,
    check: Callable[[], None] | None = None,
) -> StepResult:
    """One optimizer step of any loss.

    Args:
        optimizer: over the model's trained parameters.
        batches: what the step computes; only counted here.
        gradients: runs backward through all of it and returns the step's loss.
        lr, clip, check: as in ``train_step``.

    Returns:
        A ``StepResult``; a non-finite loss or gradient leaves parameters and moments as they were.
    """
    optimizer.zero_grad()
    loss = gradients()
    grad_norm = optimizer.grad_norm()
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if not skipped:
        if check is not None:
            check()
        grad_scale = clip / (grad_norm + 1e-6) if 0 < clip < grad_norm else 1.0
        optimizer.step(lr, grad_scale)
    optimizer.zero_grad()
    num_targets, num_tokens = (sum(getattr(b, name) for b in batches) for name in ("num_targets", "num_tokens"))
    return StepResult(loss, num_targets, num_tokens, grad_norm, skipped)


def check_gradients(model: nn.Module) -> None:
    """The first step's self-check: every adapter's zero factor receives gradient, nothing frozen does.

    Raises:
        UserError: ``numeric/no-gradient`` or ``numeric/frozen-gradient``, naming the layers.
    """
    silent = [
        path
        for path, adapter in lora_modules(model).items()
        # At B = 0 the other factor's gradient is zero by the chain rule; this one's is not.
        if all(p.grad is None or not p.grad.any() for p in (adapter.lora_A, adapter.lora_B))
    ]
    if silent:
        raise UserError(
            "numeric/no-gradient", "adapters receive no gradient", found=listing(silent), expected="a gradient in each"
        )
    leaking = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if leaking:
        raise UserError("numeric/frozen-gradient", "frozen weights receive a gradient", found=listing(leaking))


def validation_loss(model: CausalLM, batches: Sequence[Batch]) -> float:
    """Mean loss per supervised token over ``batches``, dropout off."""
    total, num_targets = validation_sums(model, batches)
    return total / num_targets


@torch.no_grad()
def validation_sums(model: CausalLM, batches: Sequence[Batch]) -> tuple[float, int]:
    """Summed loss and number of supervised tokens over ``batches``, dropout off."""
    was_training = model.training
    model.eval()
    try:
        total = sum(float(batch_loss_sum(model, batch.to(model.device))) for batch in batches)
    finally:
        model.train(was_training)
    return total, sum(batch.num_targets for batch in batches)


def set_checkpointing(model: CausalLM, kind: str) -> None:
    """Choose what backward computes again instead of keeping.

    Nothing (``none``), each MLP (``selective``: the two widest activations), or whole layers (``full``).
    """

    def recomputed(block: nn.Module, *args: object) -> Tensor:
        if not torch.is_grad_enabled():
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False)

    if kind == "full":
        model.wrap_layer = recomputed
    elif kind == "selective":
        model.wrap_mlp = recomputed
    for block in model.modules():  # what is computed again as a whole keeps nothing anyway
        if (isinstance(block, MLP) and kind != "none") or (isinstance(block, Layer) and kind == "full"):
            block.keeps_all = True


def optimizer_of(model: CausalLM, parameters: Mapping[str, nn.Parameter], run: RunConfig) -> MasterAdamW:
    """The optimizer of a run.

    Args:
        model: ready for the run's method.
        parameters: what ``prepare_method`` returned.
        run: the settings.

    Returns:
        AdamW; with ``optim = "adamw8bit"`` all moments are in 8 bits but those of embeddings and of small tensors.
    """
    embeddings = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    embeddings |= {f"{path}.rows" for path in row_modules(model)}
    large = [name for name, p in parameters.items() if p.numel() >= MIN_NUMBERS and name not in embeddings]
    return MasterAdamW(
        parameters, betas=(run.beta1, run.beta2), weight_decay=run.weight_decay,
        lr_ratios=lora_plus_ratios(model, run.lr_b_ratio), in_8_bits=large if run.optim == "adamw8bit" else (),
    )  # fmt: skip


def prepare_method(model: CausalLM, run: RunConfig, new_ids: Sequence[int] = ()) -> dict[str, nn.Parameter]:
    """Make the model ready for the run's method.

    With ``run.init_adapter`` the adapters that the model brings are trained on; otherwise new ones are added. ``full`` trains
    the layers of ``run.targets``, or every weight if none are named.

    Args:
        model: changed in place.
        run: the settings.
        new_ids: tokens of ``run.add_tokens``: their rows, with ``train_tokens = "all"`` all rows, are trained beside adapters.

    Returns:
        What is trained, by name.
    """
    if run.method == "lora" and not (run.init_adapter and lora_modules(model)):
        apply_lora_(model, run.lora, run.seed)
    elif run.method == "full":
        train_fully_(model, None if run.targets is None else run.lora.targets)
    if new_ids and run.method == "full":
        set_fresh_rows_(model, new_ids, run.seed)
    elif new_ids:
        train_rows_(model, range(model.config.vocab_size) if run.train_tokens == "all" else new_ids, new_ids, run.seed)
    set_checkpointing(model, run.checkpointing)
    model.train()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
