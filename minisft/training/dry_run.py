"""``--dry-run``: everything that a run checks before its first step, and one micro-batch backward; nothing is written."""

from __future__ import annotations

import time
from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.config import RunConfig
from minisft.formats.foreign_files import foreign_type
from minisft.formats.source import resolve
from minisft.surgery import num_parameters
from minisft.training.plan import plan, render
from minisft.training.run_data import Row
from minisft.training.runlog import duration
from minisft.training.trainer import Log, Trainer, TrainResult


def require_new_run(resume: bool) -> None:
    """Refuse to try a run that is to be resumed: ``config/bad-value``."""
    if resume:
        raise UserError(
            "config/bad-value", "a resumed run has been checked when it started", where="--dry-run", found="--resume",
            expected="a new run", fix="leave one of them away",
        )  # fmt: skip


def log_plan(run: RunConfig, log: Log) -> None:
    """The memory bill of the run, before its model is loaded."""
    source = resolve(run.model)
    if source.kind == "folder" and (kind := foreign_type(source.path)) is not None:
        log(f"the memory of a model that transformers computes is not known before it runs ({visible(kind)})")
        return
    log(render(plan(run)))


def dry_run(trainer: Trainer[Row]) -> TrainResult:
    """What a run would do, in a few sentences, and its largest micro-batch backward where that needs no file.

    Args:
        trainer: made ready as for ``fit``; its weights stay as they are.

    Returns:
        A result of 0 steps without weights.

    Raises:
        UserError: what the first step would find: a loss that is not finite, an adapter without a gradient.
    """
    began, run, data = time.monotonic(), trainer.run, trainer.data
    trainable, parameters = num_parameters(trainer.model, trainable=True), num_parameters(trainer.model)
    trainer.log(f"would train {trainable:,} of {parameters:,} parameters ({trainable / parameters:.2%})")
    trainer.log(
        f"would take {trainer.total_steps} steps of {run.batch_size} rows from {len(data.train)}: {trainer.warmup_steps} of "
        f"warm-up, then {run.schedule} from {run.peak_lr:g}; {len(data.validation)} rows to validate on every "
        f"{trainer.eval_every} steps, a checkpoint every {trainer.save_every}"
    )
    trainer.try_step()
    seconds = time.monotonic() - began
    trainer.log(f"dry run: nothing was written to {visible(Path(run.out))} ({duration(seconds)})")
    return TrainResult(trainer.out, None, 0, trainer.total_steps, None, None, trainable, parameters, seconds)
