"""One run, from data to adapter: the only file that knows the whole day.

Data, model and adapters are prepared, steps follow steps (``step.py``), now and then comes a validation and a checkpoint,
and at the end the result is written. No random state is kept: what a step draws follows from (seed, step), which is why a
stopped run that is resumed ends in the same bits.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minisft.common.atomic_files import require_outside, require_unused, write_durably
from minisft.common.device import DTYPES, pick_device
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.config import RunConfig
from minisft.formats import load_model
from minisft.kernels import cpu_nf4
from minisft.schedule import learning_rate
from minisft.surgery import nf4_modules, num_parameters, weight_bytes
from minisft.training.checkpoint import Checkpoint, RunLock, load_latest
from minisft.training.lossplot import plot_loss
from minisft.training.run_data import RunData, environment, prepare_data
from minisft.training.runlog import MetricsLog, Progress, duration, peak_memory_bytes
from minisft.training.trainer import ActiveRun
from minisft.training.untrained_tokens import untrained_tokens


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended. ``signal`` is the one that stopped it early, if any; ``weights`` the folder of the result."""

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


class _Stop:
    """Remembers a SIGTERM or SIGINT so that the step in progress can end; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        try:
            before = {number: signal.signal(number, self._remember) for number in numbers}
        except ValueError:  # not the main thread: whoever owns it handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = number
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)


def train(run: RunConfig, resume: bool = False, say: Callable[[str], None] = print) -> TrainResult:
    """One run from data to adapter (or model), in the folder ``run.out``.

    Args:
        run: the settings.
        resume: go on from the newest checkpoint in ``run.out`` that verifies.
        say: where the run's few sentences go; progress goes to standard error.

    Returns:
        Where the run ended; with ``signal`` set if SIGTERM or SIGINT stopped it (a checkpoint was saved).

    Raises:
        UserError: bad input, a changed run, three non-finite steps, three failed saves.
    """
    out = _checked_out(run, resume)
    device = pick_device(run.device)
    model, tokenizer = load_model(run.model, DTYPES[run.dtype], device, run.quantization)
    if in_4_bits := nf4_modules(model):
        _check_trainable(run, len(in_4_bits))
        dense, held = weight_bytes(model, DTYPES[run.dtype]), weight_bytes(model)
        say(f"base: {len(in_4_bits)} linears in 4 bits, {held:,} bytes instead of {dense:,} in {run.dtype}")
        if device.type == "cpu":
            say(f"4-bit arithmetic on this CPU: {cpu_nf4.path()}")
    template, data = prepare_data(run, tokenizer, say)
    going = ActiveRun(run, model, tokenizer, template, data)
    for note in untrained_tokens(model, tokenizer, data.train):
        say(note)
    with RunLock(out):  # from here on something is written
        saved = _resumable(out, say) if resume else None
        if saved is not None:
            going.restore(saved)
        _write_records(out, run, data, device)
        trainable, parameters = num_parameters(model, trainable=True), num_parameters(model)
        say(
            f"training {trainable:,} of {parameters:,} parameters ({trainable / parameters:.2%}) for {going.total} steps of "
            f"{run.batch_size} rows on {device}, {run.dtype}"
        )
        return _loop(going, trainable, parameters, say)


def _loop(going: ActiveRun, trainable: int, parameters: int, say: Callable[[str], None]) -> TrainResult:
    run, out, progress = going.run, going.out, going.progress
    stop, began = _Stop(), time.monotonic()
    with (
        MetricsLog(out / "metrics.jsonl") as log,
        Progress(going.total, start=progress.step, log_every=run.log_every) as bar,
        stop.listening(),
    ):
        log.truncate_after(progress.step)
        while not going.is_done and stop.signal is None:
            _one_step(going, log, bar)
        if stop.signal is not None and progress.saved_step != progress.step:
            going.save(log, bar.say)
    plot_loss(out / "metrics.jsonl", out / "loss.png", f"{Path(run.model).name}, {run.method}")
    weights = None
    if stop.signal is None:
        weights = _exported(going, say)
    else:
        say(
            f"stopped by signal {stop.signal} after step {progress.step}; to go on: minisft train --out {visible(out)} --resume"
        )
    seconds = time.monotonic() - began
    result = TrainResult(
        out,
        weights,
        progress.step,
        going.total,
        progress.best_loss,
        progress.best_step,
        trainable,
        parameters,
        seconds,
        stop.signal,
    )
    if weights is not None:
        say(_summary(result))
    return result


def _exported(going: ActiveRun, say: Callable[[str], None]) -> Path:
    done = going.out / ("adapter" if going.run.method == "lora" else "model")
    return done if done.exists() else going.export(say)  # a finished run that is resumed has nothing left to do


def _summary(result: TrainResult) -> str:
    best = "" if result.eval_loss is None else f", best validation loss {result.eval_loss:.4f} at step {result.best_step}"
    return f"done: {result.steps} steps in {duration(result.seconds)}{best}; weights in {visible(result.weights)}"


def _one_step(going: ActiveRun, log: MetricsLog, bar: Progress) -> None:
    began = time.monotonic()
    result = going.step()
    step, run = going.progress.step, going.run
    tokens_per_s = result.num_tokens / (time.monotonic() - began)
    lr = learning_rate(step, going.total, run.peak_lr, going.warmup, run.schedule)
    row: dict[str, JSON] = {
        "step": step,
        "tokens": result.num_tokens,
        "supervised_tokens": result.num_targets,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_s": round(tokens_per_s, 1),
        "peak_memory_bytes": peak_memory_bytes(going.device),
    }
    if result.skipped:
        row["skipped"] = True
        bar.say(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: skipped, weights unchanged")
    if going.wants_validation and (eval_loss := going.validate()) is not None:
        row["eval_loss"] = eval_loss
        bar.say(f"step {step}: validation loss {eval_loss:.4f}")
    log.append(row)
    bar.update(step, result.loss, lr, tokens_per_s)
    if going.wants_save:
        going.save(log, bar.say)


def _checked_out(run: RunConfig, resume: bool) -> Path:
    out = Path(run.out)
    require_outside(out, Path(run.model))
    if resume and not out.is_dir():
        raise UserError(
            "config/no-run",
            "there is no run to resume",
            where="--out",
            found=visible(out),
            fix="leave --resume away to start it",
        )
    if not resume:
        require_unused(out, fix="choose another folder, or go on with this run with --resume")
    return out


def _check_trainable(run: RunConfig, num_quantized: int) -> None:
    if run.method == "full":
        raise UserError(
            "config/quantized-base", "weights in 4 bits cannot be trained in full", where="--method full",
            found=f"{num_quantized} linears in 4 bits in {visible(run.model)}", fix="train adapters on them: --method lora",
        )  # fmt: skip


def _resumable(out: Path, say: Callable[[str], None]) -> Checkpoint | None:
    saved = load_latest(out)
    if saved is None:
        say("no checkpoint yet: starting from step 1")
        return None
    for reason in saved.skipped:
        say(f"passed over {visible(reason)}")
    say(f"resuming after step {saved.step}")
    return saved


def _write_records(out: Path, run: RunConfig, data: RunData, device: torch.device) -> None:
    records: dict[str, dict[str, JSON]] = {"config": run.to_dict(), "env": environment(device), "data": data.facts}
    for name, record in records.items():
        write_durably(out / f"{name}.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
