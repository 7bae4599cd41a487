"""Lines 9 to 11 of the scorecard: a run killed at every step, a thousand kills while saving, every state after a crash."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from scorecard_parts import run_tests, use_tests

if TYPE_CHECKING:
    from crashing import Op

STEPS = 40


def resume(quick: bool) -> dict[str, object]:
    """Line 9: kill a run inside each of its optimizer steps, resume it, and compare everything that it computed."""
    use_tests()
    from tiny_folder import digest, losses, quiet, run_config, write_shop

    from minisft.training.train import train

    num_steps = 4 if quick else STEPS
    identical, killed, failures = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="minisft-scorecard-") as name:
        folder = Path(name)
        shop = write_shop(folder)

        def config(out: str, steps: int = num_steps):
            return run_config(
                shop, folder / out, steps=steps, save_every=1, keep_last=3, eval_every=10, micro_batch_size=2, dropout=0.1
            )

        train(config("whole"), log=quiet)
        expected, log = digest(folder / "whole"), losses(folder / "whole")
        for step in range(1, num_steps + 1):
            out = folder / f"killed-in-{step}"
            killed += _killed_in_step(step, lambda out=out: train(config(out.name), log=quiet))
            train(config(out.name), resume=True, log=quiet)
            if (digest(out), losses(out)) == (expected, log):
                identical += 1
            else:
                failures.append(f"killed in step {step}: other bits")
            shutil.rmtree(out)
    return {"kills": killed, "identical": identical, "missed": num_steps - identical, "failures": failures, "quick": quick}


def _killed_in_step(step: int, run: Callable[[], object]) -> bool:
    """Run in a forked child that gets SIGKILL inside the call of its optimizer number ``step``; whether that happened."""
    from minisft.optim import MasterAdamW

    child = os.fork()
    if child == 0:
        real, calls = MasterAdamW.step, 0

        def counted(self: MasterAdamW, *arguments: object, **keywords: object) -> None:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *arguments, **keywords)

        MasterAdamW.step = counted
        try:
            run()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kills(quick: bool) -> dict[str, object]:
    """Line 10: a process that saves one checkpoint after the other, killed at random instants; then a control.

    The control saves in place, with nothing staged.
    """
    use_tests()
    import test_checkpoint

    num_kills, num_control = (12, 10) if quick else (1000, 100)
    with tempfile.TemporaryDirectory(prefix="minisft-scorecard-") as name:
        found = test_checkpoint.kill_many(Path(name, "run"), num_kills)
        (Path(name) / "control").mkdir()
        broken = test_checkpoint.kill_a_direct_writer(Path(name) / "control", num_control)
    return {
        "kills": found.kills, "acknowledged": found.acknowledged, "lost": found.lost, "invalid": found.invalid,
        "control kills": num_control, "control %": 100 * broken / num_control, "quick": quick,
    }  # fmt: skip


CRASH_TESTS = (
    "test_checkpoint.py::test_after_every_possible_crash_old_or_new_loads",
    "test_checkpoint.py::test_the_enumeration_catches_a_worse_protocol",
    "test_checkpoint.py::test_after_every_kill_the_run_goes_on",
    "test_checkpoint.py::test_every_call_may_fail",
    "test_checkpoint.py::test_every_flipped_byte_is_noticed",
    "test_checkpoint.py::test_every_truncation_addition_and_absence_is_noticed",
    "test_checkpoint.py::test_a_file_size_limit_is_a_user_error",
    "test_atomic_files.py",
)


def crash_states(quick: bool) -> dict[str, object]:
    """Line 11: the tests that enumerate states, faults, flips and truncations; and a whole run whose every call may fail."""
    tests = run_tests(CRASH_TESTS[3:4] if quick else CRASH_TESTS)
    runs, tracebacks, lost = failing_runs(30 if quick else 1)
    return {**tests.numbers(quick), "failing runs": runs, "tracebacks": len(tracebacks), "lost": lost} | {
        "failures": [*tests.failures, *tracebacks]
    }


def failing_runs(every: int = 1) -> tuple[int, list[str], int]:
    """``minisft train`` with the disk failing at one call, for each call (or one in ``every``), ENOSPC and EIO by turns.

    Of the many writes to one file only the first and the last are failed.

    Returns:
        how many runs; what a run printed or raised other than a coded error; how many runs could not be finished afterwards.
    """
    use_tests()
    import pytest
    from crashing import Shim, install
    from tiny_folder import write_shop

    from minisft.training import trainer

    problems, lost = [], 0
    with tempfile.TemporaryDirectory(prefix="minisft-scorecard-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        shop = write_shop(folder)
        patch.setattr(trainer, "plot_loss", lambda *_: None)  # half the time of so short a run, and no part of it
        install(patch, counting := Shim())
        status, printed = _train(shop, folder / "whole")
        if status != 0:
            return 0, [printed], 1
        calls = _worth_failing(counting.ops)[::every]
        for at in calls:
            out, code = folder / f"fails-{at}", (errno.ENOSPC, errno.EIO)[at % 2]
            install(patch, Shim(at, code))
            status, printed = _train(shop, out)
            install(patch, Shim())
            coded = status == 0 or (status in (2, 5, 7) and "error[" in printed)
            if not coded or "Traceback" in printed:
                problems.append(
                    f"call {at} ({counting.ops[at].kind} {Path(counting.ops[at].path).name}): {status}: {printed[-300:]}"
                )
            elif not _goes_on(shop, out):
                lost += 1
                problems.append(
                    f"call {at} ({counting.ops[at].kind} {Path(counting.ops[at].path).name}): cannot be gone on with"
                )
            shutil.rmtree(out, ignore_errors=True)
    return len(calls), problems, lost


def _worth_failing(calls: list[Op]) -> list[int]:
    """Numbers of all calls but the writes between a file's first and last."""
    written: dict[str, list[int]] = {}
    for number, call in enumerate(calls):
        if call.kind == "write":
            written.setdefault(call.path, []).append(number)
    inner = {number for numbers in written.values() for number in numbers[1:-1]}
    return [number for number in range(len(calls)) if number not in inner]


def _train(shop: Path, out: Path, *more: str) -> tuple[int, str]:
    """Exit status of ``minisft train`` in this process, and what it printed; a traceback's text if it raised."""
    import contextlib
    import io
    import traceback

    from minisft.cli.main import main

    flags = ["--batch-size", "4", "--dtype", "fp32", "--rank", "2", "--lr", "1e-2", "--steps", "4", "--save-every", "2"]
    start = ["train", "--model", str(shop / "model"), "--data", str(shop / "rows.jsonl"), "--out", str(out), *flags]
    words = ["train", "--out", str(out), *more] if more else start
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            status = main(words)
        except BaseException:
            return 1, f"{said.getvalue()}Traceback {traceback.format_exc()}"
    return status, said.getvalue()


def _goes_on(shop: Path, out: Path) -> bool:
    """Whether the run can be finished after the fault: resumed where a checkpoint is, else resumed or begun anew."""
    status, printed = _train(shop, out, "--resume")
    if status == 0:
        return True
    if any(out.glob("checkpoints/step-*")) or "error[" not in printed:
        return False
    shutil.rmtree(out, ignore_errors=True)
    return _train(shop, out)[0] == 0
