"""Trackers that show a run: mirrors of ``metrics.jsonl``, which stays the record, and which none of them can stop.

A tracker is written to by a thread of its own. One that raises, hangs or is slow costs the run nothing: it is left with one
warning, and training goes on. Each start of a run, a resumed one too, shows the tracker the whole log from step 1 on, so what
it has equals the file. Nothing leaves this machine unless the user's own environment asks for it: W&B is offline by default,
MLflow and Trackio write local files.

Names are those of the Hugging Face trainer where it has one: ``train/loss``, ``train/grad_norm``, ``train/learning_rate``,
``eval/loss``. A number that is not finite is left out.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minisft.common.errors import visible
from minisft.common.extras import require_extra
from minisft.common.safe_json import JSON
from minisft.config import RunConfig

MAX_WAITING = 100_000  # rows that a tracker may be behind, before it is left
CLOSING_S = 30.0  # how long a run waits for its trackers at the end
PROJECT = "minisft"
RENAMED = {"lr": "learning_rate", "tokens": "num_tokens"}

Numbers = Mapping[str, float]
Log = Callable[[str], None]


class Tracker(Protocol):
    """The part of a tracker that is used here."""

    def write(self, numbers: Numbers, step: int) -> None:
        """Show the numbers of a step."""

    def close(self) -> None:
        """Finish, with everything written."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``: ``tensorboard --logdir RUN``. What an earlier start wrote is superseded."""

    def __init__(self, run: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(run.out) / "tensorboard"), purge_step=0)

    def write(self, numbers: Numbers, step: int) -> None:
        """Add a point to each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """A Weights & Biases run in the folder of the run; ``WANDB_MODE=online`` sends it."""

    def __init__(self, run: RunConfig) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(project=project, name=Path(run.out).name, dir=run.out, config=run.to_dict(), mode=mode)

    def write(self, numbers: Numbers, step: int) -> None:
        """Log the step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflow:
    """An MLflow run in ``RUN/mlflow.db``, or where ``MLFLOW_TRACKING_URI`` points."""

    def __init__(self, run: RunConfig) -> None:
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(Path(run.out) / 'mlflow.db').absolute()}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        mlflow.start_run(run_name=Path(run.out).name)
        mlflow.log_params(run.to_dict())

    def write(self, numbers: Numbers, step: int) -> None:
        """Log the step."""
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class Trackio:
    """A Trackio run in the user's Trackio folder; ``trackio show`` opens it."""

    def __init__(self, run: RunConfig) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=Path(run.out).name, config=run.to_dict())

    def write(self, numbers: Numbers, step: int) -> None:
        """Log the step."""
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()


TRACKERS: dict[str, Callable[[RunConfig], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio,
}  # fmt: skip


def require_trackers(names: Sequence[str]) -> None:
    """Refuse to start without the libraries of the trackers that were asked for: ``config/missing-extra``."""
    for name in names:
        require_extra(name, name)


def numbers_of(row: Mapping[str, JSON]) -> dict[str, float]:
    """The finite numbers of a row of ``metrics.jsonl`` under their tracker names; the step is not one of them."""
    found = {}
    for key, value in row.items():
        if key == "step" or not isinstance(value, (int, float)):
            continue
        group, name = ("eval", key.removeprefix("eval_")) if key.startswith("eval_") else ("train", RENAMED.get(key, key))
        found[f"{group}/{name}"] = float(value)
    return found


class Mirror:
    """One tracker and the thread that writes to it.

    Args:
        name: one of ``TRACKERS``.
        run: the settings.
        log: is told once if the tracker is left.
    """

    def __init__(self, name: str, run: RunConfig, log: Log) -> None:
        self.name, self._run, self._log = name, run, log
        self._waiting: queue.Queue[Mapping[str, JSON] | None] = queue.Queue(MAX_WAITING)
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"report to {name}", daemon=True)
        self._thread.start()

    def append(self, row: Mapping[str, JSON]) -> None:
        """Hand over a row; returns at once."""
        if not self._left.is_set():
            try:
                self._waiting.put_nowait(row)
            except queue.Full:
                self._leave(f"it is {MAX_WAITING:,} rows behind")

    def close(self, deadline_s: float) -> None:
        """Wait for the rows that were handed over, but not for long."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._leave(f"it did not end within {deadline_s:g} s")

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self.name](self._run)
            while (row := self._waiting.get()) is not None and not self._left.is_set():
                step = row.get("step")
                tracker.write(numbers_of(row), step if isinstance(step, int) else 0)
            tracker.close()
        except (Exception, SystemExit) as error:  # whatever it is: nothing of a tracker may stop a run
            self._leave(f"{type(error).__name__}: {visible(error, 200)}")

    def _leave(self, why: str) -> None:
        with self._lock:
            if self._left.is_set():
                return
            self._left.set()
        self._log(f"warning: no more reports to {self.name}: {why}; training goes on, metrics.jsonl has everything")


@contextlib.contextmanager
def mirrors(
    run: RunConfig, past: Callable[[], Sequence[Mapping[str, JSON]]], log: Log
) -> Iterator[Callable[[Mapping[str, JSON]], None]]:
    """The trackers of a run, from its start (shown what there is) to its end.

    Args:
        run: the settings.
        past: gives the rows that are in ``metrics.jsonl`` already.
        log: is told what goes wrong.

    Yields:
        A call for each new row.
    """
    opened = [Mirror(name, run, log) for name in dict.fromkeys(run.report)]
    try:
        for row in past() if opened else ():
            for mirror in opened:
                mirror.append(row)

        def append(row: Mapping[str, JSON]) -> None:
            for mirror in opened:
                mirror.append(row)

        yield append
    finally:
        for mirror in opened:
            mirror.close(CLOSING_S)
