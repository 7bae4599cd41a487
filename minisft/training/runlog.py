"""What a run says while it runs: ``metrics.jsonl``, a progress bar, a loss curve.

``metrics.jsonl`` is the record: one JSON object a line, appended in one write each, never rewritten except when a resumed run
takes back the rows after its checkpoint. The bar and the picture are made from the same numbers. Nothing is kept in memory,
and a number that is not finite is never hidden: it is written as ``null`` beside a field that says what it was.

The one idea: the log on the disk is the only state; everything else can be made from it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, Self, TextIO

import torch

from minisft.common import safe_json
from minisft.common.atomic_files import disk_errors, replace_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON

NONFINITE_SUFFIX = "_nonfinite"  # "loss": null, "loss_nonfinite": "nan"
PEAK_MEMORY_SOURCES = {"cpu": "peak resident set of the process", "cuda": "peak of PyTorch's CUDA allocator"}


class MetricsLog:
    """Append rows to ``metrics.jsonl``.

    A last line that a crash cut short is removed when the log is opened. Each ``append`` is one write: what another program
    reads is whole lines. ``sync`` makes the rows survive a power cut; call it before a checkpoint is saved, so that the log
    is never behind the checkpoint.

    Raises:
        UserError: ``disk/full`` or ``disk/write-failed``; a half-written row is taken back.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor = -1
        with disk_errors(self.path):
            self._open()

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._descriptor).st_size
        whole = _end_of_last_line(self._descriptor, size)
        if whole < size:
            os.ftruncate(self._descriptor, whole)

    def append(self, row: Mapping[str, JSON]) -> dict[str, JSON]:
        """Write one row; NaN and infinities become ``null`` plus ``<key>_nonfinite``. Returns it as it was written."""
        written_row = _spell_nonfinite(row)
        line = json.dumps(written_row, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        with disk_errors(self.path, len(line)):
            try:
                written = os.write(self._descriptor, line)
                if written < len(line):  # a disk with space for half a line
                    os.write(self._descriptor, line[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, before)
                raise
        return written_row

    def sync(self) -> None:
        """Make all rows so far durable."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of steps later than ``step``, in one durable replacement: a resumed run writes them again."""
        with disk_errors(self.path):
            replace_durably(self.path, (line for line, row in _rows(self.path) if _step(row) <= step))
            os.close(self._descriptor)  # it still points at the file that was replaced
            self._open()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class NoMetrics(MetricsLog):
    """The log of a process that writes none: another one of its run does."""

    def __init__(self) -> None:
        super().__init__(os.devnull)

    def append(self, row: Mapping[str, JSON]) -> dict[str, JSON]:
        """Nothing is written."""
        return {}

    def sync(self) -> None:
        """Nothing."""

    def truncate_after(self, step: int) -> None:
        """Nothing."""


def _end_of_last_line(descriptor: int, size: int, block_bytes: int = 65536) -> int:
    """Offset just after the last newline, searched from the end."""
    end = size
    while end > 0:
        start = max(0, end - block_bytes)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _spell_nonfinite(row: Mapping[str, JSON]) -> dict[str, JSON]:
    spelled = dict(row)
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            spelled[key] = None
            spelled[key + NONFINITE_SUFFIX] = str(value)
    return spelled


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, JSON]]]:
    """(line with its newline, its object); a last line without newline is not a row yet."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = safe_json.loads(line)
            except ValueError as error:
                raise _bad_row(path, number, visible(error)) from None
            if not isinstance(row, dict):
                raise _bad_row(path, number, type(row).__name__)
            yield line, row


def _bad_row(path: Path, number: int, found: str) -> UserError:
    where = f"{visible(path)}:{number}"
    return UserError(
        "checkpoint/bad-log", "a row of the run log is damaged", where=where, found=found, expected="a JSON object"
    )


def _step(row: Mapping[str, JSON]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def read_metrics(path: str | Path) -> list[dict[str, JSON]]:
    """All whole rows of a log, in order.

    Raises:
        UserError: ``checkpoint/bad-log`` with file and line; ``checkpoint/no-log`` when it cannot be opened.
    """
    try:
        return [row for _, row in _rows(Path(path))]
    except OSError as error:
        raise UserError(
            "checkpoint/no-log", "cannot read the run log", where=visible(path), found=error.strerror or visible(error)
        ) from None


class _Bar(Protocol):
    """The part of ``tqdm`` that is used here."""

    def update(self, n: float) -> object: ...

    def set_postfix_str(self, s: str) -> object: ...

    def write(self, s: str, file: TextIO) -> object: ...

    def close(self) -> object: ...


class Progress:
    """A bar with the time left on a terminal; anywhere else one plain line every ``log_every`` steps.

    Args:
        total: steps of the whole run.
        start: steps done before (a resumed run).
        stream: where to write; standard error by default.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        log_every: int = 10,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.start, self.log_every = total, start, log_every
        self._stream = stream or sys.stderr
        self._clock = clock
        self._began = clock()
        self._done = start
        self._bar = _terminal_bar(total, start, self._stream) if self._stream.isatty() else None

    def update(self, step: int, loss: float, lr: float, tokens_per_s: float) -> None:
        """Report a finished step.

        Args:
            step: its number, from 1.
            loss: mean loss a supervised token.
            lr: its learning rate.
            tokens_per_s: its speed.
        """
        numbers = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers)
            self._bar.update(step - self._done)
        elif step % self.log_every == 0 or step in (self.start + 1, self.total):
            seconds_a_step = (self._clock() - self._began) / max(1, step - self.start)
            left = duration(seconds_a_step * (self.total - step))
            print(f"step {step}/{self.total}  {numbers}  ETA {left}", file=self._stream, flush=True)
        self._done = step

    def log(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Take the bar away, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class NoProgress(Progress):
    """The progress of a process that shows none: another one of its run does."""

    def __init__(self, total: int) -> None:
        super().__init__(total, stream=io.StringIO())

    def update(self, step: int, loss: float, lr: float, tokens_per_s: float) -> None:
        """Nothing.

        Args:
            step, loss, lr, tokens_per_s: not shown.
        """

    def log(self, text: str) -> None:
        """Nothing."""


def _terminal_bar(total: int, start: int, stream: TextIO) -> _Bar:
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # the library would start a thread to watch the bar

    layout = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}] {postfix}"
    bar: _Bar = Bar(total=total, initial=start, file=stream, dynamic_ncols=True, bar_format=layout)
    return bar


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory this process has used so far; ``PEAK_MEMORY_SOURCES`` says what is counted.

    CUDA: tensors held by PyTorch's allocator on ``device``. CPU: the resident set of the whole process, Python and libraries
    included. Linux keeps that for this program alone (``VmHWM``); ``getrusage``, used elsewhere, also counts the process
    that started it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
