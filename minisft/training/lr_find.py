"""The learning rate of a run, found by a grid on a share of its steps.

Every cell of the grid is the run itself with another rate and fewer steps: the same rows in the same order, and a schedule
that is as complete as the run's. Nothing of a cell is kept but its curves, so a large model costs no disk. A cell's result is
a file named by the hash of all that decides its numbers: the same call goes on where a killed one stopped, and a grid that
is extended trains the new rates only.

The idea to take home: two methods are compared at their own best rates, or not at all.

Ref: Schulman et al. 2025, LoRA Without Regret (LoRA's best rate is about ten times that of full fine-tuning).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minisft.common import safe_json
from minisft.common.atomic_files import disk_errors, make_folder, remove_folder, require_unused, write_durably
from minisft.common.device import pick_device, pick_dtype
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.config import RunConfig
from minisft.data.chat import Encoded
from minisft.data.template import ChatTemplate, current_time
from minisft.data.tokenizer import Tokenizer
from minisft.formats import context_length, fingerprint
from minisft.model import CausalLM
from minisft.parallel.world import World
from minisft.surgery import num_parameters
from minisft.training.identity import run_identity
from minisft.training.lr_grid import Cell, Choice, Curve, check_search, choose, draw, no_validation
from minisft.training.new_tokens import tokenizer_of_run
from minisft.training.run_data import RunData, prepare_data
from minisft.training.sft import SFTTrainer
from minisft.training.stop_signal import StopSignal
from minisft.training.train import TrainResult, run_training
from minisft.training.trainer import Log

REPORT, PLOT = "lr.json", "lr.svg"
_CELLS, _SCRATCH, _BEGAN = "cells", "unfinished", "began.json"
MIN_STEPS = 2  # one to warm up, one at the peak
_CURVE_POINTS = 4


@dataclass(frozen=True)
class LRSearch:
    """What a grid has found.

    Attributes:
        out: the folder of ``lr.json`` and ``lr.svg``.
        cells: one a rate, from the smallest; fewer than asked for if a signal stopped the search.
        choice: the best rate; None if a signal stopped the search.
        steps, total_steps: optimizer steps of a cell, and of the whole run.
        signal: the signal that stopped the search, if any.
    """

    out: Path
    cells: tuple[Cell, ...]
    choice: Choice | None
    steps: int
    total_steps: int
    signal: int | None = None


class _StoppedError(Exception):
    """A signal arrived within a cell."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def lr_find(
    run: RunConfig,
    lrs: Sequence[float],
    share: float = 0.25,
    out: str | Path | None = None,
    *,
    log: Log = lambda text: None,
    callback: Callable[[Cell], None] = lambda cell: None,
) -> LRSearch:
    """Try learning rates on a share of a run's steps and choose by validation loss.

    lr* = argmin over the grid of the validation loss after ceil(share * steps) steps.

    Args:
        run: the settings; its ``lr``, ``patience`` and checkpoints have no part in this. Its ``out`` is not touched.
        lrs: at least three rates, in any order.
        share: of the run's steps that each rate is given, in (0, 1].
        out: gets ``lr.json``, ``lr.svg`` and a file for each cell; ``run.out`` with ``-lr`` after it by default. A folder
            that an earlier search has written is gone on with.
        log: called with what is noteworthy about the rows.
        callback: called with each cell, also with those that were done before.

    Returns:
        all cells and the chosen rate.

    Raises:
        UserError: a grid without an inside; no validation rows; ``numeric/lr-at-edge`` when the best rate is the smallest or
            the largest one (``lr.json`` is written all the same); whatever training raises, but for losses that are not
            finite: such a cell is ``diverged``.

    Cost: len(lrs) * share of the run, and as many loads of the model.
    """
    check_search(run, lrs, share)
    folder = Path(out if out is not None else f"{run.out.rstrip('/')}-lr")
    if not (folder / _BEGAN).is_file():
        require_unused(folder, fix="name another folder with --out, or move this one away")
    with disk_errors(folder):
        make_folder(folder.absolute() / _CELLS)
        search = _Search(run, folder, share, log)
        cells: list[Cell] = []
        stopped: int | None = None
        with _terminal_bar(len(lrs) * search.steps) as step_done:
            for lr in sorted(lrs):
                try:
                    cells.append(search.cell(lr, step_done))
                except _StoppedError as error:
                    stopped = error.number
                    break
                callback(cells[-1])
        if stopped is not None:
            return LRSearch(folder, tuple(cells), None, search.steps, search.total_steps, stopped)
        return search.report(cells)


class _Search:
    """A grid in progress: the rows, which all cells share, and what identifies them."""

    def __init__(self, run: RunConfig, folder: Path, share: float, log: Log) -> None:
        device = pick_device(run.device)
        context = context_length(run.model)
        dtype, length = pick_dtype(run.dtype, device), min(run.max_length, context or run.max_length)
        # Early stopping would give the rates different budgets, and the run's own rate has no part in this.
        self.run = replace(run, dtype=dtype, max_length=length, patience=None, lr=None)
        self.folder, self.share = folder, share
        self.template, self.data = self._read(log, context)
        if not self.data.validation:
            raise no_validation("0 rows to validate on")
        self.total_steps = self.data.total_steps(run)
        self.steps = math.ceil(share * self.total_steps)
        if self.steps < MIN_STEPS:
            raise UserError(
                "config/too-few-steps", "a share of the run is too short to rank rates", where="--share",
                found=f"{self.steps} of {self.total_steps} steps", expected=f"at least {MIN_STEPS} steps",
                fix="give a larger --share, or a longer run",
            )  # fmt: skip
        identity = run_identity(self.run, self.data.identity, fingerprint(run.model), device)
        self.identity = {name: value for name, value in identity.items() if name != "date"}  # the tokens hold what it changes

    def _read(self, log: Log, context: int | None) -> tuple[ChatTemplate, RunData[Encoded]]:
        """The rows, with the date of the first call in templates that write one."""
        path = self.folder / _BEGAN
        if not path.is_file():
            write_durably(path, (json.dumps({"began": current_time().isoformat()}) + "\n").encode())
        began = datetime.datetime.fromisoformat(str(_read_object(path)["began"]))
        return prepare_data(self.run, tokenizer_of_run(self.run)[0], log, began, context)

    def cell_run(self, lr: float) -> RunConfig:
        """The settings of one cell: the run with another rate, a share of its steps and few validations."""
        every = self.run.eval_every or math.ceil(self.steps / _CURVE_POINTS)
        return replace(
            self.run, lr=lr, steps=self.steps, epochs=None, eval_every=min(every, self.steps), out=str(self.folder / _SCRATCH)
        )

    def key(self, lr: float) -> str:
        """Hash of everything that decides a cell's numbers."""
        run = self.cell_run(lr)
        cell: dict[str, JSON] = {"lr": lr, "eval_every": run.eval_every, "steps": run.steps}
        text = json.dumps({**self.identity, "cell": cell}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cell(self, lr: float, step_done: Callable[[int], None]) -> Cell:
        """The result of one rate: read, if it is there, or else trained."""
        key = self.key(lr)
        path = self.folder / _CELLS / f"{key}.json"
        if path.is_file():
            step_done(self.steps)
            return _read_cell(path)
        scratch = self.folder / _SCRATCH
        if scratch.exists():
            remove_folder(scratch)  # of a cell that was killed: it starts again
        cell = self._train(lr, key, step_done)
        write_durably(path, (json.dumps(cell.to_json()) + "\n").encode())
        remove_folder(scratch)
        return cell

    def _train(self, lr: float, key: str, step_done: Callable[[int], None]) -> Cell:
        trainers: list[_CurveTrainer] = []

        def make(
            run: RunConfig,
            model: CausalLM,
            tokenizer: Tokenizer,
            template: ChatTemplate,
            data: RunData[Encoded],
            log: Log,
            world: World,
        ) -> _CurveTrainer:
            trainers.append(_CurveTrainer(run, model, tokenizer, template, data, log, world))
            trainers[0].step_done = step_done
            return trainers[0]

        status: Literal["done", "diverged"] = "done"
        try:
            result = run_training(
                self.cell_run(lr), lambda *_: (self.template, self.data), make, resume=False, log=lambda text: None
            )
            if result.signal is not None:
                raise _StoppedError(result.signal)
        except UserError as error:
            if error.code != "numeric/non-finite":
                raise
            status = "diverged"
        trainer = trainers[0]
        if not (trainer.curve and math.isfinite(trainer.curve[-1][1])):
            status = "diverged"
        loss = trainer.curve[-1][1] if status == "done" else None
        return Cell(lr, key, status, loss, trainer.state.step, _finite(trainer.curve), _finite(trainer.losses))

    def report(self, cells: Sequence[Cell]) -> LRSearch:
        """Write ``lr.json`` and ``lr.svg``, whether there is a choice or not; then refuse what is no choice."""
        choice, refused = None, None
        try:
            choice = choose(cells)
        except UserError as error:
            refused = error
        report: dict[str, JSON] = {
            "model": self.run.model, "method": self.run.method, "share": self.share, "steps": self.steps,
            "total_steps": self.total_steps, "identity": self.identity,
            "lr": choice.lr if choice else None, "loss": choice.loss if choice else None,
            "bracket": list(choice.bracket) if choice else None, "resolution": choice.resolution if choice else None,
            "refused": str(refused) if refused else None, "cells": [cell.to_json() for cell in cells],
        }  # fmt: skip
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_durably(self.folder / REPORT, text.encode())
        title = f"{Path(self.run.model).name}, {self.run.method}, {self.steps} of {self.total_steps} steps"
        write_durably(self.folder / PLOT, draw(cells, choice, title))
        if refused is not None:
            raise refused
        return LRSearch(self.folder, tuple(cells), choice, self.steps, self.total_steps)


class _CurveTrainer(SFTTrainer):
    """A run of which nothing is kept but its curves: no checkpoint, no weights, no picture."""

    step_done: Callable[[int], None]

    def fit(self) -> TrainResult:
        """Train to the end or to a signal."""
        self.curve: list[tuple[int, float]] = []
        self.losses: list[tuple[int, float]] = []
        stop = StopSignal()
        with stop.listening():
            while not self.is_done and stop.received is None:
                step = self.state.step + 1
                result = self.step(step, self.batches(step), self.learning_rate(step))
                self.losses.append((step, result.loss))
                self.step_done(1)
                if self.is_validation_step:
                    self.curve.append((step, self.evaluate()[0]))
        state = self.state
        return TrainResult(
            self.out, None, state.step, self.total_steps, None, None, num_parameters(self.model, trainable=True),
            num_parameters(self.model), 0.0, stop.received,
        )  # fmt: skip


def _finite(curve: Sequence[tuple[int, float]]) -> Curve:
    return tuple(point for point in curve if math.isfinite(point[1]))


def _read_object(path: Path) -> dict[str, JSON]:
    try:
        values = safe_json.loads(path.read_bytes())
        if isinstance(values, dict):
            return values
        found = type(values).__name__
    except (OSError, ValueError) as error:
        found = visible(error, 80)
    raise UserError(
        "checkpoint/bad-cell", "a file of an earlier search cannot be read", where=visible(path), found=found,
        expected="a JSON object", fix="remove this file; what it held is computed again",
    )  # fmt: skip


def _read_cell(path: Path) -> Cell:
    try:
        values: dict[str, Any] = _read_object(path)
        values |= {name: tuple((int(a), float(b)) for a, b in values[name]) for name in ("curve", "train")}
        return Cell(**values)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "checkpoint/bad-cell", "a cell of an earlier search is damaged", where=visible(path), found=visible(error, 80),
            fix="remove this file; its rate is trained again",
        ) from None  # fmt: skip


@contextlib.contextmanager
def _terminal_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over the steps of all cells on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    from tqdm import tqdm

    with tqdm(desc="rates", total=total, unit="step", leave=False) as bar:

        def advance(steps: int) -> None:
            bar.update(steps)

        yield advance
