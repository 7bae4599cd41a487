"""``--report``: what a tracker is shown equals ``metrics.jsonl``, and no tracker can stop, slow or change a run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_folder import digest, losses, quiet, run_config, stopped_copy, write_shop

from minisft.common.errors import UserError
from minisft.config import TRACKERS as NAMES
from minisft.config import RunConfig
from minisft.training import reporters
from minisft.training.reporters import TRACKERS, Mirror, numbers_of
from minisft.training.runlog import read_metrics
from minisft.training.train import train

Shown = list[tuple[int, dict[str, float]]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("reports"))


def reported(shop: Path, out: Path, *trackers: str, **changes: object) -> RunConfig:
    return run_config(
        shop, out, **{"report": trackers, "steps": 3, "save_every": 1, "eval_every": 2, "keep_last": 9, **changes}
    )


def expected(out: Path) -> Shown:
    """The curves as the file has them, by other means than ``numbers_of``."""
    shown = []
    for row in read_metrics(out / "metrics.jsonl"):
        numbers = {k: float(v) for k, v in row.items() if k != "step" and not isinstance(v, str) and v is not None}
        for old, new in (("lr", "learning_rate"), ("tokens", "num_tokens")):
            numbers[new] = numbers.pop(old)
        named = {("eval/" + k[5:] if k.startswith("eval_") else "train/" + k): v for k, v in numbers.items()}
        shown.append((row["step"], named))
    return shown


def fake(monkeypatch: pytest.MonkeyPatch, name: str) -> types.SimpleNamespace:
    """A module in the place of a tracker's, which notes what it is told."""
    told = types.SimpleNamespace(shown=[], started=[], ended=0)
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def log(numbers: dict[str, float], step: int) -> None:
        told.shown.append((step, dict(numbers)))

    def end() -> None:
        told.ended += 1

    def start(*args: object, **kwargs: object) -> object:
        told.started.append((args, kwargs))
        return types.SimpleNamespace(log=log, finish=end)

    names = {
        "wandb": {"init": start},
        "mlflow": {
            "set_tracking_uri": start, "set_experiment": start, "start_run": start, "log_params": start,
            "log_metrics": log, "end_run": end,
        },
        "trackio": {"init": start, "log": log, "finish": end},
    }[name]  # fmt: skip
    for attribute, value in names.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_is_shown_the_log_and_a_resumed_run_shows_all_of_it(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    told = fake(monkeypatch, name)
    run = reported(shop, tmp_path / "run", name)
    train(run, log=quiet)
    assert told.shown == expected(tmp_path / "run")
    assert len(told.shown) == 3
    assert "eval/loss" in told.shown[1][1]
    assert told.ended == 1
    said = str(told.started)
    assert {"wandb": "'mode': 'offline'", "mlflow": f"sqlite:///{tmp_path}/run/mlflow.db", "trackio": "minisft"}[name] in said
    assert "'batch_size': 4" in said  # the settings
    again = replace(run, out=stopped_copy(tmp_path / "run", tmp_path / "again", 1))
    told.shown.clear()
    train(again, resume=True, log=quiet)
    assert told.shown == expected(tmp_path / "again")
    assert [step for step, _ in told.shown] == [1, 2, 3]


@pytest.mark.slow
def test_tensorboard_reads_back_the_log_after_a_resume_too(shop: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'minisft[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = reported(shop, tmp_path / "run", "tensorboard")
    train(run, log=quiet)
    again = stopped_copy(tmp_path / "run", tmp_path / "again", 1)
    train(replace(run, out=again), resume=True, log=quiet)
    assert len(list((tmp_path / "again" / "tensorboard").iterdir())) == 2  # the stopped start's file, and the resumed one's
    for out in (tmp_path / "run", tmp_path / "again"):
        events = EventAccumulator(str(out / "tensorboard")).Reload()
        points = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
        count = sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"])
        wanted = {(tag, step): value for step, numbers in expected(out) for tag, value in numbers.items()}
        assert count == len(wanted)  # nothing twice
        assert points == pytest.approx(wanted, rel=1e-6)  # single precision


class Raises:
    """A tracker that fails where it is told to."""

    where = "write"
    error: BaseException = RuntimeError("no route to host\x1b[2J")

    def __init__(self, run: RunConfig) -> None:
        self._fail("init")

    def _fail(self, where: str) -> None:
        if self.where == where:
            raise self.error

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._fail("write")

    def close(self) -> None:
        self._fail("close")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "error"), [("init", SystemExit(1)), ("write", Raises.error), ("close", OSError(28, "full"))])
def test_a_tracker_that_fails_is_left_with_one_warning_and_changes_nothing(
    shop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    error: Exception,
) -> None:
    told = fake(monkeypatch, "wandb")
    fake(monkeypatch, "trackio")
    monkeypatch.setitem(TRACKERS, "trackio", type("Bad", (Raises,), {"where": where, "error": error}))
    train(reported(shop, tmp_path / "run", "trackio", "wandb"), log=quiet)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    (line,) = warnings
    assert line.startswith(f"warning: no more reports to trackio: {type(error).__name__}: ")
    assert "\x1b" not in line
    assert told.shown == expected(tmp_path / "run")  # the other one is not concerned
    train(reported(shop, tmp_path / "plain"), log=quiet)
    assert digest(tmp_path / "run") == digest(tmp_path / "plain")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_tracker_that_hangs_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, said = threading.Event(), []

    class Hangs(Raises):
        def write(self, numbers: dict[str, float], step: int) -> None:
            hanging.wait(20)

    monkeypatch.setitem(TRACKERS, "wandb", Hangs)
    monkeypatch.setattr(reporters, "MAX_WAITING", 3)
    mirror = Mirror("wandb", RunConfig("m", "d", "o"), said.append)
    began = time.monotonic()
    for step in range(9):  # more than may wait: handing over never blocks
        mirror.append({"step": step, "loss": 1.0})
    assert time.monotonic() - began < 5
    (line,) = said
    assert "it is 3 rows behind" in line
    mirror.close(0.05)
    assert said == [line]
    hanging.set()
    slow = Mirror("wandb", RunConfig("m", "d", "o"), said.append)
    hanging.clear()
    slow.append({"step": 1, "loss": 1.0})
    slow.close(0.05)
    assert "it did not end within 0.05 s" in said[-1]
    hanging.set()


def test_numbers_that_are_not_finite_are_left_out() -> None:
    row = {"step": 7, "loss": None, "loss_nonfinite": "nan", "lr": 0.5, "skipped": True, "eval_f1": 0.25, "grad_norm": 2}
    assert numbers_of(row) == {"train/learning_rate": 0.5, "train/skipped": 1.0, "eval/f1": 0.25, "train/grad_norm": 2.0}
    assert all(map(math.isfinite, numbers_of(row).values()))


def test_a_missing_library_is_an_error_before_anything_is_written(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest))
    with pytest.raises(UserError, match=r"config/missing-extra.*found no mlflow; fix: pip install 'minisft\[mlflow\]'"):
        train(reported(shop, tmp_path / "run", "mlflow"), log=quiet)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--report; found tensorbord; expected tensorboard or .*fix: .*tensorboard"):
        RunConfig("m", "d", "o", report=("tensorbord",))
    assert set(NAMES) == set(TRACKERS)
