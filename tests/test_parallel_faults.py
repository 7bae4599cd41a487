"""Runs of several real processes: resumed by another number of them, stopped, killed, given other data, out of disk."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machine import free_port
from safetensors.torch import load_file
from tiny_folder import digest, losses, stopped_copy, write_rows, write_shop

from minisft.cli.main import main
from minisft.common import atomic_files
from minisft.common.errors import UserError
from minisft.parallel import launch
from minisft.parallel.launch import num_processes, read_place, reports
from minisft.training.checkpoint import load_latest
from minisft.training.runlog import read_metrics

pytestmark = pytest.mark.slow
LIMIT_S = 180.0


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shop(tmp_path_factory.mktemp("parallel"))
    write_rows(folder / "others.jsonl", 29)
    (folder / "broken.jsonl").write_text('{"messages": 3}\n')
    return folder


@dataclass
class Group:
    """Processes of one run, as a launcher would have started them; what each printed, and how it ended."""

    pids: list[int]
    outputs: list[Path]

    def wait(self) -> list[int]:
        """Exit statuses by rank, minus the signal for one that was killed."""
        end = time.monotonic() + LIMIT_S
        found: dict[int, int] = {}
        while len(found) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in found and (status := os.waitpid(pid, os.WNOHANG))[0]:
                    found[rank] = os.waitstatus_to_exitcode(status[1])
            if time.monotonic() > end:
                for rank, pid in enumerate(self.pids):
                    if rank not in found:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                pytest.fail(f"ranks {set(range(len(self.pids))) - set(found)} hang: {[o.read_text() for o in self.outputs]}")
            time.sleep(0.02)
        return [found[rank] for rank in range(len(self.pids))]

    @property
    def errors(self) -> list[str]:
        """The errors that all processes printed together."""
        return [line for out in self.outputs for line in out.read_text().splitlines() if line.startswith("error[")]


def start(size: int, folder: Path, argv: Callable[[int], list[object]], before: Callable[[int], None] | None = None) -> Group:
    """Fork ``size`` processes that run the command ``argv(rank)``."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    pids, outputs = [], [folder / f"printed-{rank}.txt" for rank in range(size)]
    for rank in range(size):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 99
        try:
            if hasattr(os, "sched_setaffinity"):  # two cores on any machine: a test reads how many threads follow from that
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(0, (cores + cores)[port % len(cores) :][:2])
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            with outputs[rank].open("wb", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            with (
                open(1, "w", closefd=False) as out,
                open(2, "w", closefd=False, buffering=1) as err,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                if before is not None:
                    before(rank)
                status = main([str(word) for word in argv(rank)])
        finally:
            os._exit(status)
    return Group(pids, outputs)


def patient(rank: int) -> None:
    """Time for all processes to report the same error, on a busy machine too."""
    launch.GRACE_S = 30.0


def flags(shop: Path, out: Path, *more: object, data: str = "rows.jsonl") -> list[object]:
    return [
        "train", "--model", shop / "model", "--data", shop / data, "--out", out, "--batch-size", 4, "--lr", "1e-2",
        "--dtype", "fp32", "--rank", 2, "--alpha", 3, "--validation-share", 0.2, "--device", "cpu", *more,
    ]  # fmt: skip


SHORT = ("--steps", 4, "--eval-every", 2, "--save-every", 1, "--keep-last", 9)


@pytest.fixture(scope="module", autouse=True)
def _imported(whole: Callable[[int], Path]) -> None:
    """One run in this process first: it imports what every run needs late, and the forked ones need not."""
    importlib.import_module("torch.distributed.rendezvous")
    whole(1)


@pytest.fixture(scope="module")
def whole(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The finished run of so many processes."""
    made: dict[int, Path] = {}

    def of(size: int) -> Path:
        if size not in made:
            made[size] = tmp_path_factory.mktemp("whole") / f"of-{size}"
            if size == 1:
                assert main([str(word) for word in flags(shop, made[size], *SHORT)]) == 0
                return made[size]
            group = start(size, made[size].parent / f"out-{size}", lambda rank: flags(shop, made[size], *SHORT))
            assert group.wait() == [0] * size, group.errors
        return made[size]

    return of


def weights(out: Path) -> dict[str, object]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_several_processes_write_the_files_of_one(whole: Callable[[int], Path]) -> None:
    one, two = whole(1), whole(2)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert [row["step"] for row in losses(two)] == [1, 2, 3, 4]
    for mine, theirs in zip(losses(two), losses(one), strict=True):
        assert mine == {key: pytest.approx(value, rel=1e-5) for key, value in theirs.items()}
    assert {k: v.tolist() for k, v in weights(two).items()} == {
        k: pytest.approx(v.tolist(), abs=1e-5) if v.ndim == 1 else [pytest.approx(r, rel=1e-3, abs=1e-5) for r in v.tolist()]
        for k, v in weights(one).items()
    }
    printed = [path.read_text() for path in sorted((two.parent / "out-2").iterdir())]
    assert "2 processes, 1 thread each" in printed[0]
    assert printed[0].count("done: 4 steps") == 1
    assert printed[1] == ""


PAIRS = [(1, 2), (2, 1), (2, 2)]
MORE = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if (a, b) not in PAIRS]


@pytest.mark.parametrize(("saved", "resumed"), PAIRS + [pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in MORE])
def test_a_checkpoint_knows_no_number_of_processes(
    whole: Callable[[int], Path], tmp_path: Path, saved: int, resumed: int
) -> None:
    out = tmp_path / "run"
    stopped_copy(whole(saved), out, 2)
    group = start(resumed, tmp_path / "printed", lambda rank: ["train", "--out", out, "--resume"])
    assert group.wait() == [0] * resumed, group.errors
    if saved == resumed:
        assert digest(out) == digest(whole(saved))
        assert losses(out) == losses(whole(saved))
    for mine, theirs in zip(losses(out), losses(whole(saved)), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


# ---- faults ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(shop: Path, out: Path, printed: Path, size: int = 2, *more: object) -> Iterator[Group]:
    """A long run that has taken some steps and saved some checkpoints."""
    group = start(size, printed, lambda rank: flags(shop, out, "--steps", 100_000, "--save-every", 5, *more))
    end = time.monotonic() + LIMIT_S
    while len(list(out.glob("checkpoints/step-*"))) < 2:
        assert time.monotonic() < end, [path.read_text() for path in group.outputs]
        time.sleep(0.05)
    yield group


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_after_a_saved_step(shop: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    with running(shop, out, tmp_path / "printed") as group:
        os.kill(group.pids[rank], signal.SIGTERM)
        assert group.wait() == [143, 143]
    saved = load_latest(out)
    assert saved is not None
    assert saved.step == read_metrics(out / "metrics.jsonl")[-1]["step"]
    text = "".join(path.read_text() for path in group.outputs)
    assert text.count(f"stopped by signal 15 after step {saved.step}") == 1
    assert not group.errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_and_no_checkpoint_is_lost(
    shop: Path, tmp_path: Path, rank: int, record_property: Callable[[str, object], None]
) -> None:
    out = tmp_path / "run"
    with running(shop, out, tmp_path / "printed") as group:
        acknowledged = max(int(path.name.split("-")[1]) for path in out.glob("checkpoints/step-*"))
        os.kill(group.pids[rank], signal.SIGKILL)
        began = time.monotonic()
        statuses = group.wait()
    record_property("seconds to end", time.monotonic() - began)
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 7
    assert len(group.errors) == 1
    assert group.errors[0].startswith(f"error[process/lost] a process of the run has ended: rank {rank}")
    saved = load_latest(out)
    assert saved is not None
    assert saved.step >= acknowledged


def test_other_data_on_one_process_is_refused_before_the_first_step(shop: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", ("rows.jsonl", "others.jsonl")
    group = start(2, tmp_path / "printed", lambda rank: flags(shop, out, "--steps", 3, data=data[rank]))
    assert group.wait() == [2, 2]
    [error] = group.errors
    assert "config/other-start" in error
    assert "data; found rank 1" in error
    assert not out.exists()


def test_an_error_of_one_process_is_reported_with_its_rank(shop: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", ("rows.jsonl", "broken.jsonl")
    group = start(2, tmp_path / "printed", lambda rank: flags(shop, out, "--steps", 3, data=data[rank]))
    assert group.wait() == [3, 3]
    [error] = group.errors
    assert "rank 1 of 2: " in error
    assert "broken.jsonl" in error


def test_an_error_of_all_is_printed_once_without_a_rank(shop: Path, tmp_path: Path) -> None:
    group = start(
        2, tmp_path / "printed", lambda rank: flags(shop, tmp_path / "run", "--steps", 3, data="nowhere.jsonl"), patient
    )
    assert group.wait() == [3, 3]
    [error] = group.errors
    assert "rank" not in error


def test_a_full_disk_on_the_first_process_ends_all_after_three_saves(shop: Path, tmp_path: Path) -> None:
    def fill(rank: int) -> None:
        def full(folder: Path, payload_bytes: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

        patient(rank)
        if rank == 0:
            atomic_files.require_space = full

    argv = flags(shop, tmp_path / "run", "--steps", 9, "--save-every", 1)
    group = start(2, tmp_path / "printed", lambda rank: argv, fill)
    assert group.wait() == [7, 7]
    assert len(group.errors) == 3  # two saves that training went on after, and the one that ended it
    assert all(error.startswith("error[disk/full]") and "rank" not in error for error in group.errors)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 3


# ---- what the launcher says --------------------------------------------------------------------------------------------


PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


def test_the_place_of_a_process_is_read_from_the_launchers_variables() -> None:
    assert read_place({}) == (0, 1, 0, 1)
    assert read_place({"RANK": "7"}) == (0, 1, 0, 1)  # no run of several processes
    assert read_place(PLACE | {"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1, 0, 1)
    assert read_place(PLACE) == (1, 2, 1, 2)
    assert read_place(PLACE | {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4"}) == (5, 8, 1, 4)
    assert num_processes(PLACE) == 2


@pytest.mark.parametrize(
    "change", [{"RANK": "2"}, {"RANK": "-1"}, {"RANK": ""}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "2"}]
)
def test_an_impossible_place_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        read_place(PLACE | change)
    assert caught.value.code == "config/world"
    assert f": {next(iter(change))}; found {next(iter(change.values())) or 'nothing'}" in str(caught.value)
    assert reports(caught.value, PLACE | change) is ("RANK" in change or "WORLD_SIZE" in change or "LOCAL_RANK" in change)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["merge", "--model", "m", "--adapter", "a", "--out", "o"], "merge runs in one process"),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--parallel", "both"], "--parallel"),
    ],
)
def test_other_commands_are_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    for name, value in (PLACE | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert main(words) == 2
    assert named in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 2
    assert capsys.readouterr().err == ""  # printed once


def test_sharing_the_base_needs_several_processes(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(word) for word in flags(shop, tmp_path / "run", "--steps", 1, "--parallel", "shard")]) == 2
    assert "config/one-process" in capsys.readouterr().err
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
