"""Training run: load, loop, validate, checkpoint, export.

``train`` makes everything ready (folder, lock, rows, model) and hands it to ``Trainer.fit``. No random state is kept: what a
step draws follows from (seed, step), which is why a stopped run that is resumed ends in the same bits.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from minisft.common.atomic_files import require_outside, require_unused, write_durably
from minisft.common.device import DTYPES, pick_device, pick_dtype
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.config import RunConfig
from minisft.data.chat import Encoded
from minisft.data.template import ChatTemplate, current_time
from minisft.data.tokenizer import Tokenizer
from minisft.formats import load_model
from minisft.kernels import cpu_nf4
from minisft.model import CausalLM
from minisft.parallel.launch import joined
from minisft.parallel.world import ALONE, World
from minisft.surgery import nf4_modules, num_parameters, weight_bytes
from minisft.training.checkpoint import Checkpoint, RunLock, load_latest
from minisft.training.dry_run import dry_run as try_run
from minisft.training.dry_run import log_plan, require_new_run
from minisft.training.init_adapter import load_init_adapter_, with_adapter_settings
from minisft.training.new_tokens import with_new_tokens_
from minisft.training.reporters import require_trackers
from minisft.training.run_data import Row, RunData, environment, prepare_data
from minisft.training.saved_run import rows_to_load
from minisft.training.several import check_start, check_world
from minisft.training.sft import SFTTrainer
from minisft.training.shardable import require_own_decoder
from minisft.training.tensor_file import Rows
from minisft.training.trainer import Log, Trainer
from minisft.training.trainer import TrainResult as TrainResult

Config = TypeVar("Config", bound=RunConfig)
MakeTrainer = Callable[[Config, CausalLM, Tokenizer, ChatTemplate, RunData[Row], Log, World], Trainer[Row]]
# (settings, model, tokenizer, log, when a resumed run began) -> the chat template and the rows
Prepare = Callable[[Config, CausalLM, Tokenizer, Log, datetime.datetime | None], tuple[ChatTemplate, RunData[Row]]]


def train(run: RunConfig, resume: bool = False, log: Callable[[str], None] = print, dry_run: bool = False) -> TrainResult:
    """Train a model on rows: one run from data to adapter (or model), in the folder ``run.out``.

    Under ``torchrun`` the processes share each step's rows, and the first writes; what is computed is the same.

    Args:
        run: the settings; each is a flag of ``minisft train``.
        resume: go on from the newest checkpoint in ``run.out`` that verifies.
        log: where the run's few sentences go; the progress bar goes to standard error.
        dry_run: check everything, log the plan, compute one micro-batch, and write nothing.

    Returns:
        Where the run ended; with ``signal`` set if SIGTERM or SIGINT stopped it (a checkpoint was saved).

    Raises:
        UserError: bad input, a changed run, three non-finite steps, three failed saves.
    """

    def prepare(
        run: RunConfig, model: CausalLM, tokenizer: Tokenizer, log: Log, began: datetime.datetime | None
    ) -> tuple[ChatTemplate, RunData[Encoded]]:
        return prepare_data(run, tokenizer, log, began, model.config.max_position_embeddings)

    if dry_run:
        require_new_run(resume)
        _checked_out(run, resume)  # before the bill, which takes seconds
        log_plan(run, log)
    with joined(run.device) as world:
        return run_training(run, prepare, SFTTrainer, resume, log, dry_run, world)


def run_training(
    run: Config,
    prepare: Prepare[Config, Row],
    make_trainer: MakeTrainer[Config, Row],
    resume: bool,
    log: Log,
    dry_run: bool = False,
    world: World = ALONE,
) -> TrainResult:
    """One run of any kind: folder, lock, model, rows, loop.

    Args:
        run: the settings.
        prepare: (settings, model, tokenizer, log, when a resumed run began) -> the chat template and the rows.
        make_trainer: (settings, model, tokenizer, template, rows, log, processes) -> what is learned from them.
        resume: go on from the newest checkpoint that verifies.
        log: where the run's few sentences go.
        dry_run: stop before anything is written.
        world: the processes of the run, joined.

    Returns:
        Where the run ended.

    Raises:
        UserError: bad input, a changed run, three non-finite steps, three failed saves.
    """
    if dry_run:
        require_new_run(resume)
    require_trackers(run.report)
    log = log if world.is_first else _nothing
    out, device = _checked_out(run, resume), pick_device(run.device)
    run = replace(run, dtype=pick_dtype(run.dtype, device))
    check_world(run, world, dry_run, log)
    with contextlib.ExitStack() as lock:
        saved = None
        if resume:
            _lock(out, lock, world)
            saved = _newest(out, rows_to_load(run, world), log)
            world.require_same_start({"the newest checkpoint": str(saved and saved.step).encode()})
        model, tokenizer = _load(run, device, world)
        _check_quantized(run, model, log)
        if device.type == "cpu":
            log(f"arithmetic on this CPU: {cpu_nf4.path()}")
        tokenizer = with_new_tokens_(run, model, tokenizer, log)
        run = replace(_with_init_adapter(run, model, log), max_length=min(run.max_length, model.config.max_position_embeddings))
        template, data = prepare(run, model, tokenizer, log, _began(saved, world))
        trainer = make_trainer(run, model, tokenizer, template, data, log, world)
        if dry_run:
            return try_run(trainer)
        check_start(trainer)
        if not resume:
            _lock(out, lock, world)  # from here on something is written
        if saved is not None:
            trainer.require_same_run(saved)  # first: rows that have changed are named here, before their preparation can fail
        trainer.prepare()
        if saved is not None:
            trainer.restore(saved)
        world.on_first(lambda: _write_records(out, run, data, device))
        trainable, parameters = num_parameters(model, trainable=True), num_parameters(model)
        log(
            f"training {trainable:,} of {parameters:,} parameters ({trainable / parameters:.2%}) for {trainer.total_steps} "
            f"steps of {run.batch_size} rows on {device}, {run.dtype}"
        )
        return trainer.fit()


def _load(run: RunConfig, device: torch.device, world: World) -> tuple[CausalLM, Tokenizer]:
    """The base, or with ``--parallel shard`` this process's share of it."""
    if run.parallel != "shard":
        return load_model(run.model, DTYPES[run.dtype], device, run.quantization)
    from minisft.parallel.shard import load_sharded

    require_own_decoder(run.model)
    return load_sharded(run.model, DTYPES[run.dtype], device, run.quantization, world, trained=run.method == "full")


def _with_init_adapter(run: Config, model: CausalLM, log: Log) -> Config:
    """Put the adapter of ``--init-adapter`` on the model; the settings with what it decides."""
    if run.init_adapter is None:
        return run
    run, _ = with_adapter_settings(run, model)
    load_init_adapter_(model, run)
    log(f"starting from the adapter {visible(run.init_adapter)}: rank {run.lora.rank}, alpha {run.lora.alpha:g}")
    return run


def _nothing(text: str) -> None:
    """What a process logs that is not the first of its run."""


def _lock(out: Path, lock: contextlib.ExitStack, world: World) -> None:
    """The run's folder is this run's alone from here on; all processes must see it."""
    world.on_first(lambda: lock.enter_context(RunLock(out)))
    if not (out / ".lock").exists():
        raise UserError(
            "checkpoint/not-shared", "the run's folder is not the one that the first process has locked", where=visible(out),
            found="no lock in it", expected="one folder, seen by all machines", fix="give an --out on a shared disk",
        )  # fmt: skip


def _began(saved: Checkpoint | None, world: World) -> datetime.datetime | None:
    """When the run began, if it is resumed or several processes must write the same date."""
    date = None if saved is None else saved.identity.get("date")
    if world.size > 1:
        date = world.from_first(str(date or current_time().isoformat()))
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(str(date))
    return None


def _check_quantized(run: RunConfig, model: CausalLM, log: Callable[[str], None]) -> None:
    """Report a base in 4 bits, and refuse to train it in full."""
    quantized = nf4_modules(model)
    if not quantized:
        return
    if run.method == "full":
        raise UserError(
            "config/quantized-base", "weights in 4 bits cannot be trained in full", where="--method full",
            found=f"{len(quantized)} linears in 4 bits in {visible(run.model)}", fix="train adapters on them: --method lora",
        )  # fmt: skip
    dense, stored = weight_bytes(model, DTYPES[run.dtype]), weight_bytes(model)
    log(f"base: {len(quantized)} linears in 4 bits, {stored:,} bytes instead of {dense:,} in {run.dtype}")


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


def _newest(out: Path, rows: Rows | None, log: Callable[[str], None]) -> Checkpoint | None:
    saved = load_latest(out, rows)
    if saved is None:
        log("no checkpoint yet: starting from step 1")
        return None
    for reason in saved.skipped:
        log(f"passed over {visible(reason)}")
    log(f"resuming after step {saved.step}")
    return saved


def _write_records(out: Path, run: RunConfig, data: RunData[Row], device: torch.device) -> None:
    records: dict[str, dict[str, JSON]] = {"config": run.to_dict(), "env": environment(device), "data": data.facts}
    for name, record in records.items():
        write_durably(out / f"{name}.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
