"""Files that survive a crash: each is either wholly there or not there at all.

The kernel may write data and names to the disk in any order until it is told to ``fsync``. So everything here is written
under a name nobody reads (``.tmp-…``), synced, renamed in one step to its real name, and the folder that holds the name is
synced last. This module knows nothing of formats or of training, never overwrites a file in place and never removes a folder
that holds something: a target that is in use is refused.

The one idea: *write elsewhere, sync, rename, sync the folder*. Ref: Pillai et al., OSDI 2014, "All File Systems Are Not
Created Equal".
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError, visible

SPACE_MARGIN = 1.1  # ask for 10 % more than the payload: headers, block rounding, other writers
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like when it is read again."""

    num_bytes: int
    sha256: str


def create_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Create a new file from ``chunks`` and sync it; the mode follows the umask.

    Returns:
        size and sha256, computed from the bytes handed in (not read back), so a later check also covers the disk.

    Raises:
        FileExistsError: something has this name already; it is left alone.
        OSError: disk full, input/output error. The caller owns the clean-up of the staging folder.
    """
    digest, num_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            _write_all(descriptor, memoryview(chunk))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(num_bytes, digest.hexdigest())


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:  # os.write may take less than it is given
        view = view[os.write(descriptor, view) :]


def write_durably(path: str | Path, data: bytes) -> None:
    """Make ``path`` hold exactly ``data``: after a crash it has the old content or the new, never a mixture."""
    replace_durably(Path(path), [data])


def replace_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """``write_durably`` for content that comes in pieces; ``chunks`` may read the old file."""
    path = Path(os.path.abspath(path))
    staging = _hidden_name(path, "tmp")
    try:
        create_durably(staging, chunks)
        os.replace(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            os.unlink(staging)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is complete.

    ::

        with staged_folder(out) as staging:
            (staging / "config.json").write_text("{}")

    On a clean exit every file and folder inside is synced, the staging folder is renamed to ``target`` and the parent is
    synced. On an exception, an interrupt included, the staging folder is removed and ``target`` was never touched. Missing
    parents are made.

    Raises:
        UserError: ``target`` exists and is not an empty folder.
        OSError: from the disk.
    """
    target = Path(os.path.abspath(target))
    require_unused(target)
    make_folder(target.parent)
    staging = _hidden_name(target, "tmp")
    os.mkdir(staging)
    try:
        yield staging
        sync_tree(staging)
        require_unused(target)  # somebody may have filled it while we wrote
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def staged_files(targets: Sequence[Path]) -> Iterator[Path]:
    """Write files that belong together: in a hidden folder first, under their names when all are complete, the last one last.

    On an exception, an interrupt included, nothing stays. A file of the list that the body does not write is left out.

    Args:
        targets: in one folder; missing parents are made.

    Yields:
        the hidden folder.

    Raises:
        UserError: a target exists.
        OSError: from the disk.
    """
    targets = [Path(os.path.abspath(target)) for target in targets]
    require_no_files(targets)
    make_folder(targets[-1].parent)
    staging = _hidden_name(targets[-1], "tmp")
    os.mkdir(staging)
    try:
        yield staging
        sync_tree(staging)
        require_no_files(targets)
        for target in targets:
            if (staging / target.name).exists():
                os.rename(staging / target.name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_folder(targets[-1].parent)


def require_no_files(targets: Sequence[Path]) -> None:
    """Refuse to write over anything: ``UserError``."""
    for target in targets:
        if os.path.lexists(target):
            what, fix = "the output exists already", "name another file, or move this one away"
            raise UserError("config/out-exists", what, where="output", found=visible(target), fix=fix)


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` so that no crash leaves half of it under its own name.

    Renamed first, to ``.del-…``; only when that name is durable are the files deleted. What a crash or an error leaves
    behind is hidden, and ``remove_hidden`` takes it away later.
    """
    doomed = _hidden_name(folder, "del")
    os.rename(folder, doomed)
    sync_folder(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_hidden(folder: Path, name: str) -> None:
    """Clear away what interrupted writers of ``name…`` left in ``folder``. Call it only when no writer can be alive."""
    for prefix in ("tmp", "del"):
        for path in folder.glob(f".{prefix}-{glob.escape(name)}*"):
            shutil.rmtree(path, ignore_errors=True)


def _hidden_name(path: Path, prefix: str) -> Path:
    return path.with_name(f".{prefix}-{path.name}.{secrets.token_hex(4)}")


def require_unused(target: Path, fix: str = "name another folder, or move this one away") -> None:
    """Refuse a target that is anything but an empty folder or nothing yet: ``UserError``."""
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        what = "the output exists already and is not an empty folder"
        raise UserError("config/out-exists", what, where="output", found=visible(target), fix=fix)


def require_outside(target: Path, model: Path) -> None:
    """Refuse an output that is the model folder or lies in it: ``UserError``."""
    if model.is_dir() and model.resolve() in (target.resolve(), *target.resolve().parents):
        what = "the output lies in the model folder"
        raise UserError("config/out-in-model", what, where="output", found=visible(target), fix="choose a folder of its own")


def require_new_folder(target: Path, model: Path) -> None:
    """Both of the above: refuse a folder that cannot be written before minutes are spent on what would go into it."""
    require_outside(target, model)
    require_unused(target)


def make_folder(path: Path) -> None:
    """``mkdir -p`` whose new names survive a crash."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster; a *file* in the way fails at the next use
        os.mkdir(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (new, renamed, removed)."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Sync every regular file and every folder under ``folder``, itself last."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, payload_bytes: int) -> None:
    """Refuse to start writing what will not fit, with a margin of 10 %.

    Raises:
        OSError: ``ENOSPC``, as the write itself would have (``disk_errors`` turns both into the same message).
    """
    if _free_bytes(folder) < payload_bytes * SPACE_MARGIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextlib.contextmanager
def disk_errors(folder: Path, payload_bytes: int = 0, note: Callable[[], str] = str) -> Iterator[None]:
    """Turn an ``OSError`` of the body into a ``UserError``: ``disk/full`` or ``disk/write-failed``.

    Args:
        folder: where the body writes.
        payload_bytes: how much, if it is known; shown with the margin of ``require_space``.
        note: called on an error; says what is still safe. (The default, ``str``, says nothing.)

    Yields:
        nothing.

    Raises:
        UserError: in the place of the ``OSError``.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _DISK_FULL
        needed = f"{payload_bytes * SPACE_MARGIN / 1e6:,.1f} MB" if full and payload_bytes else ""
        free = f" ({_free_bytes(folder) / 1e6:,.1f} MB free)" if full else ""
        raise UserError(
            "disk/full" if full else "disk/write-failed",
            "the disk is full" if full else "cannot write",
            where=visible(error.filename or folder),
            found=(error.strerror or visible(error)) + free,
            expected=needed,
            fix="; ".join(filter(None, ["free some space" if full else "check the disk and the permissions", note()])),
        ) from error


def _free_bytes(folder: Path) -> int:
    while not folder.exists():  # making it may be what failed
        folder = folder.parent
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize
