"""The training loop: rows to batches, step, log, validate, save; then the result.

``Trainer`` is the loop, whatever is learned; its subclasses (``sft``, ``dpo_run``, ``grpo_run``) define what a row is, what its
batches are and where the gradient comes from. ``Trainer.fit`` is the loop, on one screen. How a run comes about (folder,
lock, model and rows) is ``train.py``'s business; what is saved, restored and written as the result is ``saved_run``'s.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minisft.batching import Batch, step_rows
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.config import RunConfig
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.model import CausalLM
from minisft.parallel.world import ALONE, World
from minisft.schedule import learning_rate
from minisft.step import StepResult, check_gradients, optimizer_step
from minisft.surgery import num_parameters
from minisft.training.lockstep import even
from minisft.training.lossplot import plot_loss
from minisft.training.replay import num_replayed
from minisft.training.reporters import Log as Log
from minisft.training.reporters import mirrors
from minisft.training.run_data import Row, RunData
from minisft.training.runlog import MetricsLog, NoMetrics, NoProgress, Progress, duration, peak_memory_bytes, read_metrics
from minisft.training.saved_run import SavedRun
from minisft.training.stop_signal import StopSignal

DECAY_SHARE = 0.2  # of the steps, with --schedule wsd: as in most runs of arXiv:2405.18392
MAX_BAD_STEPS = 3  # non-finite ones, in a row


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    Attributes:
        out: the run's folder.
        weights: the folder of the result (``adapter`` or ``model``); None when a signal stopped the run, and of a dry run.
        steps, total_steps: optimizer steps done, and those of the whole run.
        eval_loss, best_step: the best validation loss (nats a supervised token; DPO: of a pair; GRPO: minus the mean
            reward) and its step; None without validation. With ``best_by = "metric"`` the step of the best score, and its loss.
        trainable, parameters: how many numbers are trained, and how many the model has.
        seconds: wall time of the loop.
        signal: the signal that stopped the run early, if any.
        score: of ``eval_metric`` at ``best_step``; None without it.
    """

    out: Path
    weights: Path | None
    steps: int
    total_steps: int
    eval_loss: float | None
    best_step: int | None
    trainable: int
    parameters: int
    seconds: float
    signal: int | None = None
    score: float | None = None


class Trainer(SavedRun[Row], ABC):
    """A run in progress: the model, its optimizer, its rows, and how far it has come (``state``).

    ``batches``, ``gradients`` and ``evaluate`` are left to the subclasses; ``command`` is the one that starts such runs.
    What it is made of are ``SavedRun``'s arguments.
    """

    command = "train"

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
        super().__init__(run, model, tokenizer, template, data, log, world)
        if data.replay and not num_replayed(self.total_steps, run.batch_size, data.replay_share):
            raise UserError(
                "config/no-replay", "the share is too small for a single row to be replayed", where="--replay-share",
                found=f"{float(data.replay_share):g} of {self.total_steps} steps of {run.batch_size} rows",
                expected="one row of the run or more", fix="give a larger --replay-share, or leave --replay away",
            )  # fmt: skip
        self.warmup_steps = min(math.ceil(run.warmup * self.total_steps), self.total_steps - 1)
        decay_steps = math.ceil((run.decay_share or DECAY_SHARE) * self.total_steps)
        self.decay_steps = min(max(1, decay_steps), self.total_steps - self.warmup_steps)
        self.eval_every = run.eval_every or max(1, math.ceil(self.total_steps / 10))
        self.save_every = run.save_every or self.eval_every
        self.micro_batch_size = run.micro_batch_size or run.batch_size

    def prepare(self) -> None:
        """What has to be computed before the first step, by the model as it starts; the run's folder is locked by now."""

    def try_step(self) -> None:
        """For a dry run: backward of the rows that need most memory, where that takes no file of the run's folder."""

    def even(self, batches: list[Batch]) -> list[Batch]:
        """With a shared base as many batches in each process; else those that are given."""
        return even(batches, self.world, self.tokenizer.pad_id) if self.is_sharded else batches

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> TrainResult:
        """Train until all steps are done, patience runs out or a signal arrives; then write the result. Hold the ``RunLock``.

        Returns:
            Where the run ended. After a signal the step in progress was finished and saved, and there are no weights.

        Raises:
            UserError: three non-finite steps, or three failed saves, in a row.
        """
        state, stop, began = self.state, StopSignal(), time.monotonic()
        metrics, progress = self._records()
        with contextlib.ExitStack() as opened:
            for each in (metrics, progress, stop.listening()):
                opened.enter_context(each)
            metrics.truncate_after(state.step)
            report = opened.enter_context(mirrors(self._shown, lambda: read_metrics(metrics.path), progress.log))
            stopped_by = self.world.any_signal(stop.received)
            while not self.is_done and stopped_by is None:
                started, step = time.monotonic(), state.step + 1
                batches, lr = self.batches(step), self.learning_rate(step)
                result = self.step(step, batches, lr)
                tokens_per_s = result.num_tokens / (time.monotonic() - started)
                row = self._metrics(result, lr, tokens_per_s)
                if result.skipped:
                    progress.log(
                        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: skipped, weights unchanged"
                    )
                if self.is_validation_step:
                    row |= self._validate(progress.log)
                report(metrics.append(row))
                progress.update(step, result.loss, lr, tokens_per_s)
                if self.is_save_step:
                    self.save(metrics, progress.log)
                stopped_by = self.world.any_signal(stop.received)
            if stopped_by is not None and state.saved_step != state.step:
                self.save(metrics, progress.log)
        if self.world.is_first:
            plot_loss(self.out / "metrics.jsonl", self.out / "loss.png", f"{Path(self.run.model).name}, {self.run.method}")
        return self._finish(stopped_by, began)

    def _records(self) -> tuple[MetricsLog, Progress]:
        """What the run writes while it goes on; the first process's, the others write nothing."""
        if not self.world.is_first:
            return NoMetrics(), NoProgress(self.total_steps)
        progress = Progress(self.total_steps, start=self.state.step, log_every=self.run.log_every)
        return MetricsLog(self.out / "metrics.jsonl"), progress

    @property
    def _shown(self) -> RunConfig:
        """The run as its trackers see it; of several processes the first alone has trackers."""
        return self.run if self.world.is_first else replace(self.run, report=())

    @property
    def is_validation_step(self) -> bool:
        """The step just done is followed by a validation, if there are rows for one."""
        return bool(self.data.validation) and (self.state.step % self.eval_every == 0 or self.state.step == self.total_steps)

    @property
    def is_save_step(self) -> bool:
        """The step just done is followed by a checkpoint."""
        state = self.state
        return state.step % self.save_every == 0 or state.best_step == state.step or self.is_done

    # ---- a step ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of one optimizer step (from 1), on the model's device: this process's share of them."""

    @abstractmethod
    def gradients(self, step: int, batches: Sequence[Batch]) -> float:
        """Run backward through the micro-batches of a step and return its loss, or this process's share of it."""

    @abstractmethod
    def evaluate(self) -> tuple[float, dict[str, JSON]]:
        """What is made small on the rows held out, and more numbers for the log."""

    def check_first_step(self) -> None:
        """The self-check between backward and update of step 1."""
        check_gradients(self.model)

    def facts(self) -> dict[str, JSON]:
        """More numbers about the step just done, for ``metrics.jsonl``."""
        return {}

    def step_rows(self, step: int) -> list[Row]:
        """The rows of one optimizer step (from 1)."""
        train, shares = self.data.train, self.data.shares
        return [train[i] for i in step_rows(step, self.run.batch_size, len(train), self.run.seed, shares)]

    def learning_rate(self, step: int) -> float:
        """The learning rate of one optimizer step (from 1)."""
        run = self.run
        return learning_rate(step, self.total_steps, run.peak_lr, self.warmup_steps, run.schedule, self.decay_steps)

    def step(self, step: int, batches: Sequence[Batch], lr: float) -> StepResult:
        """Take one optimizer step and count it.

        Args:
            step: its number, from 1; with the seed it decides the dropout masks.
            batches: its micro-batches.
            lr: its learning rate.

        Returns:
            What it did; skipped, with the weights unchanged, when the loss or a gradient was not finite.

        Raises:
            UserError: ``numeric/non-finite`` for the third such step in a row; what the first step's self-check finds.
        """
        check = self.check_first_step if step == 1 else None
        result = optimizer_step(
            self.optimizer, batches, lambda: self._summed_gradients(step, batches), lr, clip=self.run.clip, check=check
        )
        num_targets, num_tokens = self.world.sum_ints(result.num_targets, result.num_tokens)
        result = replace(result, num_targets=num_targets, num_tokens=num_tokens)
        self.state.step = step
        self._check_finite(result)
        return result

    def _summed_gradients(self, step: int, batches: Sequence[Batch]) -> float:
        """Backward, and what the other processes have computed added to it: the same gradient and loss in each of them."""
        loss = self.gradients(step, batches)
        self.world.sum_gradients_(self.optimizer.replicated.values())
        return self.world.sum_floats(loss)[0]

    def _check_finite(self, result: StepResult) -> None:
        state = self.state
        if not result.skipped:
            state.bad_steps, state.last_grad_norm = 0, result.grad_norm
            return
        state.bad_steps += 1
        if state.bad_steps < MAX_BAD_STEPS:
            return
        rows = sorted({row.row for row in self.step_rows(state.step)})
        resume = f"checkpoint step-{state.saved_step} can be resumed" if state.saved_step else "no checkpoint was saved yet"
        raise UserError(
            "numeric/non-finite",
            f"loss or gradient was not finite {MAX_BAD_STEPS} steps in a row",
            where=f"step {state.step}, data rows {listing(map(str, rows))}",
            found=f"loss {result.loss}, gradient norm {result.grad_norm}, last good norm {state.last_grad_norm}",
            fix=f"lower --lr or look at these rows; the weights are as of the last finite step, {resume}",
        )

    def _metrics(self, result: StepResult, lr: float, tokens_per_s: float) -> dict[str, JSON]:
        """The row of ``metrics.jsonl`` for the step just done."""
        row: dict[str, JSON] = {
            "step": self.state.step,
            "tokens": result.num_tokens,
            "supervised_tokens": result.num_targets,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": round(tokens_per_s, 1),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        return row | ({"skipped": True} if result.skipped else {}) | self.facts()

    # ---- validation, the end ------------------------------------------------------------------------------------------

    def _validate(self, log: Log) -> dict[str, JSON]:
        """The validation loss and what comes with it, noted as the best if it is."""
        (loss, more), state = self.evaluate(), self.state
        if math.isfinite(loss) and self.is_best(loss, more):
            state.best_step, state.best_loss, state.evals_since_best = state.step, loss, 0
            state.best_score = self.score(more)
        else:
            state.evals_since_best += 1
        log(f"step {state.step}: {self.validation_words(loss, more)}")
        return {"eval_loss": loss, **more}

    def is_best(self, loss: float, more: dict[str, JSON]) -> bool:
        """Whether a validation is better than all before it."""
        return self.state.best_loss is None or loss < self.state.best_loss

    def score(self, more: dict[str, JSON]) -> float | None:
        """The score of a validation by ``eval_metric``; None where there is none."""
        return None

    def validation_words(self, loss: float, more: dict[str, JSON]) -> str:
        """A validation in a few words."""
        return f"validation loss {loss:.4f}"

    def best_words(self, loss: float) -> str:
        """The best validation in a few words."""
        return f"best validation loss {loss:.4f}"

    def _finish(self, stopped_by: int | None, began: float) -> TrainResult:
        state = self.state
        if stopped_by is not None:
            resume = f"minisft {self.command} --out {visible(self.out)} --resume"
            self.log(f"stopped by signal {stopped_by} after step {state.step}; to go on: {resume}")
        result = TrainResult(
            out=self.out,
            weights=None if stopped_by is not None else self._result(),
            steps=state.step,
            total_steps=self.total_steps,
            eval_loss=state.best_loss,
            best_step=state.best_step,
            trainable=num_parameters(self.model, trainable=True),
            parameters=num_parameters(self.model),
            seconds=time.monotonic() - began,
            signal=stopped_by,
            score=state.best_score,
        )
        if result.weights is not None:
            self.log(self._summary(result))
        return result

    def _summary(self, result: TrainResult) -> str:
        best = "" if result.eval_loss is None else f", {self.best_words(result.eval_loss)} at step {result.best_step}"
        return f"done: {result.steps} steps in {duration(result.seconds)}{best}; weights in {visible(result.weights)}"
