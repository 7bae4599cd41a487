"""A run in progress: its model, its optimizer, where it stands, and what to do at the end of a step.

Everything that a step needs follows from (settings, data, step), so what is saved with a checkpoint is small: the trained
numbers, the optimizer's moments and the few counters of ``RunState``. Knows nothing of loops, signals or the command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minisft.batching import Batch, micro_batches, step_rows
from minisft.common.errors import UserError, listing
from minisft.common.safe_json import JSON
from minisft.common.seeds import derive_seed
from minisft.config import RunConfig
from minisft.data.chat import Encoded
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.formats import base_fingerprint, save_adapter, save_model, write_adapter
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.schedule import learning_rate
from minisft.step import StepResult, check_gradients, prepare_method, train_step, validation_loss
from minisft.training.checkpoint import Checkpoint, check_identity, load_step, save_checkpoint
from minisft.training.run_data import RunData
from minisft.training.runlog import MetricsLog

MAX_BAD_STEPS = 3  # non-finite steps, or failed saves, in a row
# Settings that decide how a run is watched, not what it computes: they may change on resume.
FREE_ON_RESUME = ("out", "log_every", "keep_last", "save_every")


@dataclass
class RunState:
    """The part of a run that changes, saved with each checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0  # validations since the best
    bad_steps: int = 0  # non-finite steps in a row
    failed_saves: int = 0
    last_grad_norm: float | None = None
    saved_step: int = field(default=0, metadata={"saved": False})


class ActiveRun:
    """One run in progress: the things that every step needs, and what to do at a step's end."""

    def __init__(self, run: RunConfig, model: CausalLM, tokenizer: Tokenizer, template: ChatTemplate, data: RunData) -> None:
        self.run, self.model, self.tokenizer, self.template, self.data = run, model, tokenizer, template, data
        self.out = Path(run.out)
        self.device = model.model.norm.weight.device
        parameters = prepare_method(model, run)
        self.optimizer = MasterAdamW(parameters, betas=(run.beta1, run.beta2), weight_decay=run.weight_decay)
        self.total = run.steps or max(1, math.ceil((run.epochs or 1.0) * len(data.train) / run.batch_size))
        self.warmup = min(math.ceil(run.warmup * self.total), self.total - 1)
        self.eval_every = run.eval_every or max(1, math.ceil(self.total / 10))
        self.save_every = run.save_every or self.eval_every
        self.micro = run.micro_batch_size or run.batch_size
        self.validation = [
            batch
            for i in range(0, len(data.validation), self.micro)
            for batch in self._batches(data.validation[i : i + self.micro])
        ]
        self.progress = RunState()
        settings = {key: value for key, value in run.to_dict().items() if key not in FREE_ON_RESUME}
        self.identity: dict[str, JSON] = {
            "config": settings,
            "data": data.identity,
            "base": base_fingerprint(model),
        }

    def _batches(self, rows: Sequence[Encoded]) -> list[Batch]:
        run = self.run
        return micro_batches(
            rows, self.micro, self.tokenizer.pad_id, run.packing, run.max_length, share_prefix=run.dropout == 0
        )

    def step(self) -> StepResult:
        """The next optimizer step."""
        run, step = self.run, self.progress.step + 1
        rows = [self.data.train[i] for i in step_rows(step, run.batch_size, len(self.data.train), run.seed)]
        batches = [batch.to(self.device) for batch in self._batches(rows)]
        result = train_step(
            self.model,
            self.optimizer,
            batches,
            learning_rate(step, self.total, run.peak_lr, self.warmup, run.schedule),
            run.clip,
            (lambda micro: derive_seed(run.seed, "dropout", step, micro)) if run.dropout > 0 else None,
            (lambda: check_gradients(self.model)) if step == 1 else None,
        )
        self.progress.step = step
        self._note_health(result, batches)
        return result

    def _note_health(self, result: StepResult, batches: Sequence[Batch]) -> None:
        progress = self.progress
        if not result.skipped:
            progress.bad_steps, progress.last_grad_norm = 0, result.grad_norm
            return
        progress.bad_steps += 1
        if progress.bad_steps >= MAX_BAD_STEPS:
            rows = sorted({row for batch in batches for row in batch.rows})
            raise UserError(
                "numeric/non-finite",
                f"loss or gradient was not finite {MAX_BAD_STEPS} steps in a row",
                where=f"step {progress.step}, data rows {listing(map(str, rows))}",
                found=f"loss {result.loss}, gradient norm {result.grad_norm}, last good norm {progress.last_grad_norm}",
                fix=f"lower --lr or look at these rows; the weights are as of the last finite step, {self._resume_hint()}",
            )

    def _resume_hint(self) -> str:
        return (
            f"checkpoint step-{self.progress.saved_step} can be resumed"
            if self.progress.saved_step
            else "no checkpoint was saved yet"
        )

    def validate(self) -> float | None:
        """Validation loss, noted as the best if it is; None without validation rows."""
        if not self.validation:
            return None
        loss, progress = validation_loss(self.model, self.validation), self.progress
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_step, progress.best_loss, progress.stale = progress.step, loss, 0
        else:
            progress.stale += 1
        return loss

    @property
    def is_done(self) -> bool:
        out_of_patience = self.run.patience is not None and self.progress.stale >= self.run.patience
        return self.progress.step >= self.total or out_of_patience

    @property
    def wants_validation(self) -> bool:
        return self.progress.step % self.eval_every == 0 or self.progress.step == self.total

    @property
    def wants_save(self) -> bool:
        progress = self.progress
        return progress.step % self.save_every == 0 or progress.best_step == progress.step or self.is_done

    def save(self, log: MetricsLog, say: Callable[[str], None]) -> None:
        """A checkpoint of everything. A full disk is survived twice; the third time in a row it stops the run."""
        progress = self.progress
        log.sync()
        state = {f.name: getattr(progress, f.name) for f in dataclasses.fields(progress) if f.metadata.get("saved", True)}
        try:
            save_checkpoint(
                self.out,
                progress.step,
                {"optimizer": self.optimizer.state()},
                state,
                self.identity,
                keep_last=self.run.keep_last,
                protect=() if progress.best_step is None else (progress.best_step,),
                write_extra=self._write_adapter if self.run.method == "lora" else None,
            )
        except UserError as error:
            progress.failed_saves += 1
            if error.code != "disk/full" or progress.failed_saves >= MAX_BAD_STEPS:
                raise
            say(f"{error}\nTraining goes on; the next save is tried at the next interval.")
        else:
            progress.failed_saves, progress.saved_step = 0, progress.step

    def _write_adapter(self, staging: Path) -> None:
        (staging / "adapter").mkdir()
        write_adapter(self.model, staging / "adapter", template=self.template.source)

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: ``checkpoint/changed`` when data, base or settings differ from the run's.
        """
        check_identity(saved.identity, self.identity)
        self.optimizer.load_state(saved.groups["optimizer"])
        for name, value in saved.state.items():
            setattr(self.progress, name, value)
        self.progress.saved_step = saved.step

    def export(self, say: Callable[[str], None]) -> Path:
        """Write the result: the best validated weights, or the last without validation."""
        best = self.progress.best_step
        if best is not None and best != self.progress.step:
            try:
                self.optimizer.load_state(load_step(self.out, best).groups["optimizer"])
            except UserError as error:
                say(f"{error}\nThe result is the last step's weights instead of the best.")
        if self.run.method == "lora":
            save_adapter(self.model, self.out / "adapter", template=self.template.source)
            return self.out / "adapter"
        save_model(self.model, self.tokenizer, self.out / "model")
        return self.out / "model"
