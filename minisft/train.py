"""One run, from data to adapter: the only file that knows the whole day.

Data, model and adapters are prepared, steps follow steps (``step.py``), now and then comes a validation and a checkpoint,
and at the end the result is written. No random state is kept: what a step draws follows from (seed, step), which is why a
stopped run that is resumed ends in the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minisft import native_nf4
from minisft.batching import Batch, micro_batches, step_rows
from minisft.chat import Encoded
from minisft.checkpoint import Checkpoint, RunLock, check_identity, load_latest, load_step, save_checkpoint
from minisft.config import RunConfig
from minisft.durable import write_durably
from minisft.errors import UserError, listing, visible
from minisft.formats import base_fingerprint, load_model, save_adapter, save_model, write_adapter
from minisft.lossplot import plot_loss
from minisft.machine import pick_device
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.run_data import RunData, environment, prepare_data
from minisft.runlog import MetricsLog, Progress, duration, peak_memory_bytes
from minisft.safe_json import JSON
from minisft.schedule import learning_rate
from minisft.seeds import derive_seed
from minisft.step import StepResult, check_gradients, prepare_method, train_step, validation_loss
from minisft.surgery import nf4_modules, num_parameters, weight_bytes
from minisft.template import ChatTemplate
from minisft.tokenizer import Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_BAD_STEPS = 3  # non-finite steps, or failed saves, in a row
# Settings that decide how a run is watched, not what it computes: they may change on resume.
FREE_ON_RESUME = ("out", "log_every", "keep_last", "save_every")


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


@dataclass
class _Progress:
    """The part of a run that changes, saved with each checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0  # validations since the best
    bad_steps: int = 0  # non-finite steps in a row
    failed_saves: int = 0
    last_grad_norm: float | None = None
    saved_step: int = field(default=0, metadata={"saved": False})


class _Run:
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
        self.progress = _Progress()
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
            say(f"4-bit arithmetic on this CPU: {native_nf4.path()}")
    template, data = prepare_data(run, tokenizer, say)
    going = _Run(run, model, tokenizer, template, data)
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


def _loop(going: _Run, trainable: int, parameters: int, say: Callable[[str], None]) -> TrainResult:
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


def _exported(going: _Run, say: Callable[[str], None]) -> Path:
    done = going.out / ("adapter" if going.run.method == "lora" else "model")
    return done if done.exists() else going.export(say)  # a finished run that is resumed has nothing left to do


def _summary(result: TrainResult) -> str:
    best = "" if result.eval_loss is None else f", best validation loss {result.eval_loss:.4f} at step {result.best_step}"
    return f"done: {result.steps} steps in {duration(result.seconds)}{best}; weights in {visible(result.weights)}"


def _one_step(going: _Run, log: MetricsLog, bar: Progress) -> None:
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
    out, model = Path(run.out), Path(run.model)
    if model.is_dir() and (out.resolve() == model.resolve() or model.resolve() in out.resolve().parents):
        raise UserError(
            "config/out-in-model",
            "the run folder lies in the model folder",
            where="--out",
            found=visible(out),
            fix="choose a folder of its own",
        )
    if resume and not out.is_dir():
        raise UserError(
            "config/no-run",
            "there is no run to resume",
            where="--out",
            found=visible(out),
            fix="leave --resume away to start it",
        )
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "config/out-exists", "the run folder exists and is not empty", where="--out", found=visible(out),
            fix="choose another folder, or go on with this run with --resume",
        )  # fmt: skip
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
