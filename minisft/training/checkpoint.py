"""Checkpoints that are whole or absent.

``<run>/checkpoints/step-N/`` holds one safetensors file for each named group of tensors, ``state.json``, whatever the caller
adds, and ``manifest.json`` with the size and sha256 of every other file (``manifest.py``). A checkpoint is written under
a hidden name, synced, and renamed once (``atomic_files.staged_folder``), so a name ``step-N`` means a finished save. Nothing
points at the latest one: it is found by looking, newest first, for one that verifies, and what was passed over is reported.

Saving needs the run's lock; loading needs nothing and changes nothing. This module knows nothing of training: named tensors and
JSON go in and come out bit for bit. It uses no pickle, and it saves no random state, because minisft has none (``seeds.py``).
Tensors that share storage are saved as separate copies; which of them to save is the caller's decision.

The one idea: *a checkpoint is what verifies*, not what has the highest number.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from torch import Tensor

from minisft.common import atomic_files, safe_json
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.common.shares import Later
from minisft.training.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    NewerFormatError,
    UnusableError,
    as_object,
    json_bytes,
    read_manifest,
    read_small,
    record,
)
from minisft.training.tensor_file import Rows, file_pieces, num_bytes, read_tensors

STATE = "state.json"
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_GROUP_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One loaded checkpoint; ``skipped`` names the newer ones that did not verify, each with its reason."""

    path: Path
    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, JSON]
    identity: dict[str, JSON]
    skipped: tuple[str, ...]


class RunLock:
    """At most one process writes to a run folder.

    ``with RunLock(run_dir): ...`` makes the folder if need be, takes ``flock`` on ``<run>/.lock`` and clears away what
    interrupted saves left behind: holding the lock proves that nobody is still writing it. The kernel frees the lock when the
    process ends, however it ends, so there is no lock of a dead process to delete by hand.

    Raises:
        UserError: ``checkpoint/locked`` with the holder's process id.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._descriptor = -1

    def __enter__(self) -> Self:
        with atomic_files.disk_errors(self.run_dir):
            atomic_files.make_folder(self.run_dir)
            self._descriptor = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take()
            except BaseException:
                os.close(self._descriptor)
                raise
        atomic_files.remove_hidden(self.run_dir / "checkpoints", "step-")
        return self

    def _take(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = visible(os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()) or "unknown"
            raise UserError(
                "checkpoint/locked",
                "another process is using this run",
                where=visible(self.run_dir),
                found=f"process {holder}",
                fix="wait for it, stop it, or give another folder",
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor | Later]],
    state: Mapping[str, JSON],
    identity: Mapping[str, JSON],
    *,
    keep_last: int = 2,
    protect: Collection[int] = (),
    write_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Save one checkpoint, then remove the ones that are no longer kept. Hold the ``RunLock``.

    When this returns, the checkpoint survives a crash and a power cut.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        groups: file name (without suffix) -> tensor name -> tensor; every dtype is kept, tensors may lie on any device, or be
            made one by one as they are written.
        state: JSON that the run needs to go on. Finite numbers only: write ``None`` where there is no best loss yet.
        identity: JSON that says what the run is (settings, data, base model), for ``identity.check_identity``.
        keep_last: how many newest checkpoints stay, at least 1.
        protect: steps that stay whatever their age (the best one).
        write_extra: called with the staging folder first of all, to put files or folders of its own beside the groups.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: ``checkpoint/exists``; ``disk/full`` or ``disk/write-failed``, in which case no trace of this save is left
            and the earlier checkpoints are untouched.
        ValueError: an impossible argument.

    Cost: one more copy of the largest tensor in memory; two passes over the bytes (write, hash) and one re-reading of each
        kept checkpoint.
    """
    if step < 0 or keep_last < 1:
        raise ValueError(f"step {step} and keep_last {keep_last}: expected at least 0 and at least 1")
    folder = Path(run_dir) / "checkpoints"
    target = folder / f"step-{step}"
    payload_bytes = sum(num_bytes(t) for group in groups.values() for t in group.values())
    with atomic_files.disk_errors(folder, payload_bytes, lambda: _last_good(folder)):
        atomic_files.make_folder(folder)
        atomic_files.require_space(folder, payload_bytes)
        _clear_name(target, step)
        with atomic_files.staged_folder(target) as staging:
            _fill(staging, step, groups, state, identity, write_extra)
        _rotate(folder, keep_last, {step, *protect})
    return target


def _last_good(folder: Path) -> str:
    for step, path in _step_folders(folder):
        try:
            _verify(path, step)
        except UnusableError:
            continue
        return f"{path.name} is the last good checkpoint and is untouched"
    return "no checkpoint has been saved yet"


def _clear_name(target: Path, step: int) -> None:
    """A broken ``step-N`` that the run has fallen back from makes way when the run reaches step N again."""
    if not target.exists():
        return
    try:
        _verify(target, step)
    except NewerFormatError:
        raise _newer_format_error(target) from None
    except UnusableError:
        atomic_files.remove_folder(target)
    else:
        raise UserError(
            "checkpoint/exists",
            "this step is saved already",
            where=visible(target),
            fix="resume the run, or name another folder",
        )


def _fill(
    staging: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor | Later]],
    state: Mapping[str, JSON],
    identity: Mapping[str, JSON],
    write_extra: Callable[[Path], None] | None,
) -> None:
    if write_extra is not None:
        write_extra(staging)
    files = {path.relative_to(staging).as_posix(): record(path) for path in sorted(staging.rglob("*")) if path.is_file()}
    for name, tensors in groups.items():
        if not _GROUP_NAME.fullmatch(name):
            raise ValueError(f"group name {name!r}: expected 1 to 64 letters, digits, _ or -")
        files[f"{name}.safetensors"] = atomic_files.create_durably(staging / f"{name}.safetensors", file_pieces(tensors))
    files[STATE] = atomic_files.create_durably(staging / STATE, [json_bytes(dict(state))])
    manifest = Manifest(step, dict(identity), tuple(groups), files)
    atomic_files.create_durably(staging / MANIFEST, [manifest.render()])


def _rotate(folder: Path, keep_last: int, protected: set[int]) -> None:
    """Remove the checkpoints that have ``keep_last`` newer ones, each of them read again and found whole."""
    num_whole = 0
    for step, path in _step_folders(folder):
        if num_whole >= keep_last and step not in protected:
            atomic_files.remove_folder(path)
            continue
        try:
            _verify(path, step)
        except UnusableError:
            continue  # not counted: an older one stays in its place
        num_whole += 1


def load_latest(run_dir: str | Path, rows: Rows | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, on the CPU; ``None`` when there is none at all. Reads only.

    Args:
        run_dir: the run's folder.
        rows: which rows of each tensor are loaded; by default all.

    Returns:
        The checkpoint.

    Raises:
        UserError: ``checkpoint/none-valid`` (every one with its reason) or ``checkpoint/newer-format``.
    """
    skipped: list[str] = []
    for step, path in _step_folders(Path(run_dir) / "checkpoints"):
        try:
            return _load(path, step, tuple(skipped), rows)
        except NewerFormatError:
            raise _newer_format_error(path) from None
        except UnusableError as reason:
            skipped.append(f"{path.name}: {reason}")
    if not skipped:
        return None
    raise UserError(
        "checkpoint/none-valid",
        "no checkpoint can be used",
        where=visible(run_dir),
        found=" | ".join(skipped),
        fix="restore one from a copy, or start a new run in another folder",
    )


def load_step(run_dir: str | Path, step: int, rows: Rows | None = None) -> Checkpoint:
    """The checkpoint of one step. Reads only.

    Args:
        run_dir: the run's folder.
        step: of the checkpoint.
        rows: as for ``load_latest``.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        UserError: ``checkpoint/unusable``, with the reason; ``checkpoint/newer-format``.
    """
    path = Path(run_dir) / "checkpoints" / f"step-{step}"
    try:
        return _load(path, step, (), rows)
    except NewerFormatError:
        raise _newer_format_error(path) from None
    except UnusableError as reason:
        raise UserError(
            "checkpoint/unusable", "this checkpoint cannot be used", where=visible(path), found=visible(reason)
        ) from None


def _load(folder: Path, step: int, skipped: tuple[str, ...], rows: Rows | None) -> Checkpoint:
    manifest = _verify(folder, step)
    try:
        groups = {name: read_tensors(folder / f"{name}.safetensors", rows) for name in manifest.groups}
        state = as_object(safe_json.loads(read_small(folder / STATE)))
    except (
        OSError,
        ValueError,
        SafetensorError,
    ) as error:  # whole but not ours: a manifest made on purpose, or files gone meanwhile
        raise UnusableError(f"cannot be read: {visible(error)}") from None
    return Checkpoint(folder, step, groups, state, manifest.identity, skipped)


def _verify(folder: Path, step: int) -> Manifest:
    """Read every byte of a checkpoint and compare it with its manifest.

    Raises:
        UnusableError: the reason.
    """
    try:
        manifest = read_manifest(folder / MANIFEST)
        if manifest.step != step:
            raise UnusableError(f"{MANIFEST} is of step {manifest.step}")
        if STATE not in manifest.files:
            raise UnusableError(f"{MANIFEST} does not list {STATE}")
        manifest.check_files(folder)
    except OSError as error:
        raise UnusableError(f"cannot be read: {error.strerror}") from None
    return manifest


def _newer_format_error(folder: Path) -> UserError:
    return UserError(
        "checkpoint/newer-format",
        "this checkpoint was written by a newer minisft",
        where=visible(folder),
        expected=f"format {FORMAT} or older",
        fix="upgrade minisft",
    )


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Every ``step-N`` in ``folder``, newest first."""
    if not folder.is_dir():
        return []
    named = ((_STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in named if match and path.is_dir()), reverse=True)
