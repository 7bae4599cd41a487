"""What the benchmarks share: workers that take turns, honest statistics, results files, experiments that may be cut off.

Each contestant is a process of its own, so that peak memory is its own; the parent asks one after the other for one unit of
work, over and over, so that a machine that slows down slows both. Times are reported as ratios.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "triton", "tokenizers", "safetensors", "minisft")
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """A contestant: reads one JSON command a line, answers one JSON object a line."""

    def __init__(self, script: Path, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET, **environment},
        )
        self.ready = self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):  # libraries print other things
                return json.loads(line)
        raise RuntimeError(f"a worker ended with status {self.process.wait()}")

    def ask(self, **command: object) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.communicate()


def serve(ready: dict, work) -> None:
    """The worker's side: say ready, then answer commands until the input ends."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)


def peak_rss_bytes() -> int:
    """The most memory this process has had resident (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of values."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "q1": quartiles[0], "q3": quartiles[2], "n": len(values)}


def bootstrap(table: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float, float]:
    """A statistic of a (seeds, rows, ...) table and its 95 % interval: seeds and rows are drawn anew, 4 000 times.

    A statistic that is not a number in one of the draws has no interval: nan.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    seeds, rows = table.shape[:2]
    drawn = [statistic(table[draw.integers(seeds, size=seeds)][:, draw.integers(rows, size=rows)]) for _ in range(4_000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return statistic(table), float(low), float(high)


def provenance(*more: str) -> dict:
    """Where a result comes from: the command that this process is, commit, machine, versions (of ``more`` too), date."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ""
    )
    flags = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "").split()
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_portable, sys.argv[1:])]),
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu or platform.processor(),
        "cpu_features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of the last minute: who else was at work
        "versions": {name: _version(name) for name in (*PACKAGES, *more)},
    }


def _portable(argument: str) -> str:
    """Of a folder on this machine only its name: nobody else has the rest."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def out_folder(given: Path | None, quick: bool) -> Path:
    """Where results go: not among the committed ones if the run only tried whether everything works."""
    return given or (Path(tempfile.gettempdir()) / "minisft-benchmarks" if quick else RESULTS)


def save(name: str, result: dict, folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def save_svg(figure: Figure, path: Path) -> None:
    """Draw into a file: text stays text, and the same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "minisft", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def note(text: str) -> None:
    """Say on standard error what is being done."""
    print(f"  {text}", file=sys.stderr, flush=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Data as JSON lines; the path again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- experiments of many cells: one JSON line a cell, so that a run may be stopped at any time and go on ----


def settings_hash(settings: object) -> str:
    """What names a cell: 12 hex digits of all that decides its numbers, given as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_cells(path: Path) -> list[dict]:
    """The lines of a results file, none if there is no file yet; a broken line is a killed run's and counts as none."""
    cells = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    cells.append(json.loads(line))
    return cells


def add_cell(path: Path, cell: Mapping[str, object]) -> None:
    """Append a line. What a killed run left half written gets its line break first, or this cell would be lost with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if before and not before.endswith(b"\n") else "") + json.dumps(cell) + "\n")
