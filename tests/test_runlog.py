"""The run log: whole lines, nothing hidden, and a picture that follows from it."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import Shim, crash_states, install, materialize, snapshot
from hypothesis import given
from hypothesis import strategies as st

from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.training import runlog
from minisft.training.lossplot import plot_loss, smooth
from minisft.training.runlog import MetricsLog, Progress, duration, peak_memory_bytes, read_metrics

pytestmark = pytest.mark.slow

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def write_rows(path: Path, num_steps: int) -> None:
    with MetricsLog(path) as log:
        for step in range(1, num_steps + 1):
            log.append({"step": step, "loss": 3 / step, "lr": 1e-4})
            if step % 5 == 0:
                log.append({"step": step, "eval_loss": 3.1 / step})


# --- the log --------------------------------------------------------------------------------------------------------------

KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ROWS = st.lists(
    st.dictionaries(KEYS, st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | KEYS), max_size=5
)


@given(ROWS)
def test_rows_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, JSON]]) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for number, row in enumerate(rows):
            log.append(row)
            assert read_metrics(path) == rows[: number + 1]  # at once, without closing
    assert len(path.read_bytes().splitlines()) == len(rows)


@pytest.mark.parametrize(("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_nonfinite_numbers_are_spelt_out(tmp_path: Path, value: float, name: str) -> None:
    with MetricsLog(tmp_path / "m") as log:
        log.append({"step": 1, "loss": value, "lr": 0.5})
    assert json.loads((tmp_path / "m").read_text()) == {"step": 1, "loss": None, "lr": 0.5, "loss_nonfinite": name}


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_torn_last_line_is_dropped_when_opened(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m"
    write_rows(path, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] if cut else whole)
    kept = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert read_metrics(path) == kept
    with MetricsLog(path) as log:
        log.append({"step": 99})
    assert read_metrics(path) == [*kept, {"step": 99}]


def test_a_torn_line_longer_than_a_block_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n' + b"x" * 200_000)
    with MetricsLog(path):
        pass
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(b"x" * 200_000)
    with MetricsLog(path):
        pass
    assert path.read_bytes() == b""


@given(st.integers(0, 12))
def test_truncate_after(tmp_path_factory: pytest.TempPathFactory, step: int) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    write_rows(path, 11)
    before = path.read_bytes()
    with MetricsLog(path) as log:
        log.truncate_after(step)
        log.append({"step": step + 1, "again": True})
    rows = read_metrics(path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, min(step, 11) + 1))
    assert [row["step"] for row in rows if "eval_loss" in row] == [s for s in (5, 10) if s <= step]
    assert rows[-1] == {"step": step + 1, "again": True}
    assert before.startswith(path.read_bytes().rpartition(b'{"step"')[0])  # what stays, stays byte for byte


def test_truncating_survives_any_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    root.mkdir()
    write_rows(root / "m", 9)
    start, shim = snapshot(root), Shim()
    install(monkeypatch, shim)
    with MetricsLog(root / "m") as log:
        log.truncate_after(4)
    for end in range(len(shim.ops) + 1):
        for state in crash_states(start, shim.ops[:end]):
            num_rows = len(read_metrics(materialize(state, root, tmp_path / "state") / "m"))
            assert num_rows == 4 or (num_rows == 10 and end < len(shim.ops))


@pytest.mark.parametrize(
    ("line", "found"),
    [("{", "Expecting property name"), ("[1]", "list"), ('{"loss": NaN}', "NaN"), ('{"a":1,"a":2}', "duplicate")],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(UserError, match="checkpoint/bad-log") as caught:
        read_metrics(tmp_path / "m")
    assert "/m:2" in str(caught.value)
    assert found in str(caught.value)


def _append(path: Path) -> None:
    with MetricsLog(path) as log:
        log.append({"step": 1})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (lambda folder: read_metrics(folder / "none"), "checkpoint/no-log"),
        (lambda folder: _append(folder), "disk/write-failed"),
        (lambda folder: _append(Path("/dev/full")), "disk/full"),
    ],
)
def test_input_output_trouble_is_a_user_error(tmp_path: Path, body: Callable[[Path], object], code: str) -> None:
    with pytest.raises(UserError, match=code):
        body(tmp_path)


def test_a_row_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    write_rows(path, 3)
    with MetricsLog(path) as log:
        real_write, calls = os.write, []

        def half_then_full(descriptor: int, data: bytes) -> int:
            calls.append(data)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real_write(descriptor, data[:5])

        monkeypatch.setattr(os, "write", half_then_full)
        with pytest.raises(UserError, match="disk/full"):
            log.append({"step": 4})
        monkeypatch.undo()
        log.append({"step": 5})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 5]


# --- progress -------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_when_there_is_no_terminal() -> None:
    seconds = iter(range(1000))  # one second passes between two looks at the clock
    stream = io.StringIO()
    with Progress(25, log_every=10, stream=stream, clock=lambda: next(seconds)) as progress:
        for step in range(1, 26):
            progress.update(step, 1 / step, 2e-4, 1234.5)
        progress.log("saved")
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25", "saved"]
    assert lines[1] == "step 10/25  loss 0.1000  lr 2.00e-04  1,234 tokens/s  ETA 3 s"  # 2 s for 10 steps, 15 to go
    assert lines[3].endswith("ETA 0 s")


def test_a_resumed_run_reckons_with_its_own_steps() -> None:
    now = [100.0]
    stream = io.StringIO()
    progress = Progress(30, start=10, log_every=10, stream=stream, clock=lambda: now[0])
    now[0] += 60
    progress.update(20, 1.0, 1e-4, 1.0)
    assert stream.getvalue().startswith("step 20/30")
    assert stream.getvalue().endswith("ETA 1 min 00 s\n")


def test_a_bar_on_a_terminal() -> None:
    import gc
    import threading

    gc.collect()  # what earlier tests left may go at any time, and must not count
    stream, threads = Terminal(), threading.active_count()
    with Progress(4, start=1, stream=stream) as progress:
        progress.update(2, 0.5, 1e-4, 100.0)
        progress.log("a note")
        progress.update(4, 0.25, 1e-4, 100.0)
    text = stream.getvalue()
    assert "100%" in text
    assert "step 4/4" in text
    assert "loss 0.2500" in text
    assert "ETA" in text
    assert "a note\n" in text
    gc.collect()
    assert threading.active_count() <= threads


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- the picture ----------------------------------------------------------------------------------------------------------


def test_the_same_log_gives_the_same_picture(tmp_path: Path) -> None:
    write_rows(tmp_path / "m", 80)
    for name in ("a.png", "b.png"):
        plot_loss(tmp_path / "m", tmp_path / name, "a run with $x and \x1b[31m")
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(PNG_MAGIC)
    assert first == (tmp_path / "b.png").read_bytes()
    with MetricsLog(tmp_path / "m") as log:
        log.append({"step": 81, "loss": math.nan, "lr": 1e-4})
    plot_loss(tmp_path / "m", tmp_path / "c.png", "a run with $x and \x1b[31m")
    assert first != (tmp_path / "c.png").read_bytes()  # a step that was not finite shows


@pytest.mark.parametrize("num_steps", [1, 2, 39, 41])
def test_short_runs_have_a_picture(tmp_path: Path, num_steps: int) -> None:
    write_rows(tmp_path / "m", num_steps)
    plot_loss(tmp_path / "m", tmp_path / "a.png", "short")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG_MAGIC)


def test_a_log_without_losses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(UserError, match="no loss to draw"):
        plot_loss(tmp_path / "m", tmp_path / "a.png", "")
    assert not (tmp_path / "a.png").exists()


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    write_rows(tmp_path / "m", 5)
    code = f"""
import sys
import minisft.training.lossplot, minisft.training.runlog
assert "matplotlib" not in sys.modules
import matplotlib
settings = lambda: {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}  # reading it sets it
before = settings()
minisft.training.lossplot.plot_loss({str(tmp_path / "m")!r}, {str(tmp_path / "a.png")!r}, "t")
assert "matplotlib.pyplot" not in sys.modules
assert before == settings()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


FINITE = st.floats(-1e3, 1e3)


@given(st.lists(FINITE, min_size=1, max_size=60), st.integers(1, 8))
def test_smoothing_is_the_mean_of_each_full_window(values: list[float], radius: int) -> None:
    windows = [values[i - radius : i + radius + 1] for i in range(radius, len(values) - radius)]
    assert smooth(values, radius) == pytest.approx([sum(w) / len(w) for w in windows], abs=1e-9)


@given(st.integers(3, 60), FINITE, FINITE, st.integers(1, 8))
def test_smoothing_does_not_lag(count: int, start: float, slope: float, radius: int) -> None:
    line = [start + slope * i for i in range(count)]
    assert smooth(line, radius) == pytest.approx(line[radius : count - radius], abs=1e-6)


# --- memory ---------------------------------------------------------------------------------------------------------------


def test_peak_memory_follows_an_allocation() -> None:
    code = """
from minisft.training.runlog import peak_memory_bytes
before = peak_memory_bytes()
block = b"x" * 200_000_000
del block
print(before, peak_memory_bytes())
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ballast = b"x" * 400_000_000  # of this process: must not count for the other one
    output = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True).stdout
    before, after = map(int, output.split())
    assert len(ballast) > before > 20e6
    assert 180e6 < after - before < 230e6


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError

    expected = peak_memory_bytes()
    monkeypatch.setattr(runlog, "open", missing, raising=False)
    assert peak_memory_bytes() == pytest.approx(expected, rel=0.5)
