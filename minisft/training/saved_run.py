"""A run as its folder knows it: what is saved with a checkpoint, gone on with, and written as the result.

Everything that a step needs follows from (settings, data, step), so a checkpoint holds the trained numbers, the optimizer's
moments and the few counters of ``RunState``. The loop is ``trainer``'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic

from torch import nn

from minisft.common.atomic_files import sync_folder
from minisft.common.errors import UserError, visible
from minisft.config import RunConfig
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.formats import base_fingerprint, save_adapter, save_model, write_adapter
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.parallel.shard import share_of
from minisft.parallel.share_optim import ShareAdamW
from minisft.parallel.world import ALONE, World
from minisft.pissa import pissa_starts
from minisft.step import optimizer_of, prepare_method
from minisft.training.checkpoint import Checkpoint, load_step, save_checkpoint
from minisft.training.identity import require_same_run, run_identity
from minisft.training.reporters import Log
from minisft.training.run_data import Row, RunData
from minisft.training.runlog import MetricsLog
from minisft.training.tensor_file import Rows

MAX_FAILED_SAVES = 3  # in a row


def rows_to_load(run: RunConfig, world: World) -> Rows | None:
    """Which rows of each tensor of a checkpoint a process of a run needs: of n rows those from a to b; None for all."""
    return partial(share_of, world=world) if run.method == "full" and run.parallel == "shard" and world.size > 1 else None


@dataclass
class RunState:
    """The part of a run that changes, saved with each checkpoint."""

    total_steps: int
    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    best_score: float | None = None  # with --eval-metric, at best_step
    evals_since_best: int = 0
    bad_steps: int = 0  # non-finite steps in a row
    failed_saves: int = 0
    last_grad_norm: float | None = None
    constant_groups: list[float] = field(default_factory=list)  # GRPO: their share in the last steps
    saved_step: int = field(default=0, metadata={"saved": False})


class SavedRun(Generic[Row]):
    """A run: the model, its optimizer, its rows, how far it has come (``state``), and its folder.

    Args:
        run: the settings.
        model: as loaded; made ready for the run's method here.
        tokenizer: the model's.
        template: the chat template of the rows, kept with the result.
        data: encoded rows to train and validate on.
        log: where the run's few sentences go; the progress bar goes to standard error.
        world: the processes of the run. Each computes its share of every step, and the first writes.
    """

    def __init__(
        self,
        run: RunConfig,
        model: CausalLM,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        data: RunData[Row],
        log: Log = print,
        world: World = ALONE,
    ) -> None:
        self.run, self.model, self.tokenizer, self.template, self.data, self.log = run, model, tokenizer, template, data, log
        self.world = world
        self.out = Path(run.out)
        self.device = model.device
        parameters = prepare_method(model, run, tokenizer.new_ids)
        self.optimizer = self._optimizer(parameters)
        self.total_steps = data.total_steps(run)
        self.state = RunState(self.total_steps)
        self.identity = run_identity(run, data.identity, base_fingerprint(model), self.device)

    def _optimizer(self, parameters: dict[str, nn.Parameter]) -> MasterAdamW:
        run = self.run
        if not (self.is_sharded and run.method == "full"):
            return optimizer_of(self.model, parameters, run)
        return ShareAdamW(self.model, parameters, self.world, betas=(run.beta1, run.beta2), weight_decay=run.weight_decay)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the base instead of all of it."""
        return self.run.parallel == "shard" and self.world.size > 1

    @property
    def is_done(self) -> bool:
        """All steps are done, or ``patience`` validations have brought nothing better."""
        out_of_patience = self.run.patience is not None and self.state.evals_since_best >= self.run.patience
        return self.state.step >= self.total_steps or out_of_patience

    def save(self, metrics: MetricsLog, log: Log) -> None:
        """Save a checkpoint of everything. A full disk is survived twice; the third time in a row it stops the run."""
        state = self.state
        self.world.require_same_weights(self.optimizer.replicated, state.step)
        try:
            self._on_first(lambda: self._save(metrics))
        except UserError as error:
            state.failed_saves += 1
            if error.code != "disk/full" or state.failed_saves >= MAX_FAILED_SAVES:
                raise
            log(f"{error}\nTraining goes on; the next save is tried at the next interval.")
        else:
            state.failed_saves, state.saved_step = 0, state.step

    def _on_first(self, write: Callable[[], object]) -> None:
        """Let the first process write; the others send it their shares of what is trained in shares."""
        if isinstance(self.optimizer, ShareAdamW):
            self.optimizer.writing(write)
        else:
            self.world.on_first(write)

    def _save(self, metrics: MetricsLog) -> None:
        state = self.state
        metrics.sync()
        save_checkpoint(
            self.out,
            state.step,
            {"optimizer": self.optimizer.state()} | ({"start": starts} if (starts := pissa_starts(self.model)) else {}),
            {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.metadata.get("saved", True)},
            self.identity,
            keep_last=self.run.keep_last,
            protect=() if state.best_step is None else (state.best_step,),
            write_extra=self._write_adapter if self.run.method == "lora" else None,
        )

    def _write_adapter(self, staging: Path) -> None:
        (staging / "adapter").mkdir()
        write_adapter(self.model, staging / "adapter", template=self.template.source, tokenizer=self.tokenizer)

    def require_same_run(self, saved: Checkpoint) -> list[str]:
        """Notes on what differs without changing anything but rounding.

        Raises:
            UserError: ``checkpoint/changed`` when data, tokens, base or settings differ from the run's.
        """
        return require_same_run(saved.identity, self.identity)

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint; with another number of steps the schedule is that of the new number from here on.

        Raises:
            UserError: as ``require_same_run``; ``config/too-few-steps`` for fewer steps than are done.
        """
        notes = self.require_same_run(saved)
        if self.total_steps < saved.step:
            raise UserError(
                "config/too-few-steps", "more steps are done than the run is to have", where="--steps or --epochs",
                found=f"{self.total_steps} steps", expected=f"at least {saved.step}", fix="give more, or leave both away",
            )  # fmt: skip
        self.optimizer.load_state(saved.groups["optimizer"])
        for name, start in pissa_starts(self.model).items():  # an SVD here may round otherwise than the first one did
            start.data.copy_(saved.groups["start"][name])
        for name, value in saved.state.items():
            setattr(self.state, name, value)
        self.state.saved_step = saved.step
        if self.state.total_steps != self.total_steps:
            before, self.state.total_steps = self.state.total_steps, self.total_steps
            notes.append(
                f"{before} steps before, {self.total_steps} now: the learning rate follows the new schedule from here on"
            )
            self.world.on_first(self._set_result_aside)
        for note in notes:
            self.log(note)

    def _set_result_aside(self) -> None:
        """A finished run that is given more steps keeps its first result under another name."""
        target = self._target
        if target.exists() and not self.is_done:
            kept = target.with_name(f"{target.name}-step-{self.state.step}")
            target.rename(kept)
            sync_folder(self.out)
            self.log(f"the result of step {self.state.step} is now {visible(kept)}")

    @property
    def _target(self) -> Path:
        return self.out / ("adapter" if self.run.method == "lora" else "model")

    def _result(self) -> Path:
        """The folder of the result; written now unless a finished run was resumed, which has nothing left to do."""
        if not self.world.from_first("it is there" if self._target.exists() else ""):
            self._load_best()
            self._on_first(self._write_result)
        return self._target

    def _write_result(self) -> None:
        target = self._target
        if self.run.method == "lora":
            save_adapter(self.model, target, template=self.template.source, tokenizer=self.tokenizer)
            return
        weights = self.optimizer.weights() if isinstance(self.optimizer, ShareAdamW) else None
        save_model(self.model, self.tokenizer, target, weights=weights)

    def _load_best(self) -> None:
        """Go back to the best validated weights; without validation the last ones stay.

        The first process does it, who writes the result, or all of them where each has a share: all or none.
        """
        best, in_shares = self.state.best_step, isinstance(self.optimizer, ShareAdamW)
        if best is None or best == self.state.step or not (in_shares or self.world.is_first):
            return
        saved, problem = None, f"another process cannot read step {best}"
        try:
            saved = load_step(self.out, best, rows_to_load(self.run, self.world))
        except UserError as error:
            problem = str(error)
        failed = self.world.largest(int(saved is None)) if in_shares else saved is None
        if saved is None or failed:
            self.log(f"{problem}\nThe result is the last step's weights instead of the best.")
        else:
            self.optimizer.load_state(saved.groups["optimizer"])
