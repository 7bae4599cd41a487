"""Durable files: whole or absent under every fault, and only real names change."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import Shim, crash_states, install, materialize, snapshot

from minisft.common import atomic_files
from minisft.common.atomic_files import (
    create_durably,
    disk_errors,
    make_folder,
    remove_folder,
    remove_hidden,
    require_space,
    staged_folder,
    write_durably,
)
from minisft.common.errors import UserError

PARTS = [b"first", memoryview(b""), memoryview(b"second" * 1000)]
WHOLE = b"first" + b"second" * 1000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_create_returns_what_it_wrote(tmp_path: Path) -> None:
    record = create_durably(tmp_path / "a", PARTS)
    assert (tmp_path / "a").read_bytes() == WHOLE
    assert record == atomic_files.FileRecord(len(WHOLE), hashlib.sha256(WHOLE).hexdigest())


def test_create_refuses_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        create_durably(tmp_path / "a", PARTS)
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_durably(tmp_path / "a", b"x")
        with staged_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o777 & ~umask


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = Shim(short_writes=True)
    install(monkeypatch, shim)
    create_durably(tmp_path / "a", PARTS)
    assert (tmp_path / "a").read_bytes() == WHOLE
    assert sum(op.kind == "write" for op in shim.ops) > 10


def test_write_durably_after_any_crash_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "f").write_bytes(b"old")
    start, shim = snapshot(root), Shim()
    install(monkeypatch, shim)
    write_durably(root / "f", b"new content")
    num_states = 0
    for end in range(len(shim.ops) + 1):
        for state in crash_states(start, shim.ops[:end]):
            found = (materialize(state, root, tmp_path / "state") / "f").read_bytes()
            assert found == b"new content" or (found == b"old" and end < len(shim.ops))
            num_states += 1
    assert num_states > len(shim.ops)


def test_write_durably_under_every_fault_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Shim()
    install(monkeypatch, counting)
    write_durably(tmp_path / "f", b"old")
    for fail_at, op in enumerate(counting.ops):
        (tmp_path / "f").write_bytes(b"old")
        install(monkeypatch, Shim(fail_at, errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            write_durably(tmp_path / "f", b"new")
        renamed = op.kind == "fsync" and op.path == str(tmp_path)  # only the very last call may fail with the new one there
        assert (tmp_path / "f").read_bytes() == (b"new" if renamed else b"old")
        assert names(tmp_path) == ["f"]


def test_staged_folder_appears_whole_and_makes_parents(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a" / "b" / "out") as staging:
        assert names(tmp_path / "a" / "b") == [staging.name]
        assert staging.name.startswith(".tmp-out.")
        (staging / "sub").mkdir()
        (staging / "sub" / "x").write_text("1")
    assert names(tmp_path / "a" / "b") == ["out"]
    assert (tmp_path / "a" / "b" / "out" / "sub" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_staged_folder_leaves_nothing_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "out") as staging:
            (staging / "x").write_text("1")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


def _file(path: Path) -> None:
    path.write_text("mine")


def _used_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def _link(path: Path) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


@pytest.mark.parametrize("make", [_file, _used_folder, _link])
@pytest.mark.parametrize("late", [False, True], ids=["before", "meanwhile"])
def test_staged_folder_refuses_a_target_in_use(tmp_path: Path, make: Callable[[Path], None], late: bool) -> None:
    target = tmp_path / "out"

    def fill() -> None:
        if not late:
            make(target)
        with staged_folder(target):
            if late:
                make(target)

    with pytest.raises(UserError, match="config/out-exists"):
        fill()
    assert names(tmp_path) == ["out"]


def test_staged_folder_fills_an_empty_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as staging:
        (staging / "x").write_text("1")
    assert names(tmp_path / "out") == ["x"]


def test_staged_folder_syncs_everything_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = Shim()
    install(monkeypatch, shim)
    with staged_folder(tmp_path / "out") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "x").write_text("1")
    kinds = [(op.kind, Path(op.path)) for op in shim.ops]
    rename = kinds.index(("rename", staging))
    assert {path for kind, path in kinds[:rename] if kind == "fsync"} == {staging / "sub" / "x", staging / "sub", staging}
    assert kinds[rename + 1 :] == [("fsync", tmp_path)]


def test_make_folder_syncs_each_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = Shim()
    install(monkeypatch, shim)
    make_folder(tmp_path / "a" / "b")
    assert [(op.kind, op.path) for op in shim.ops] == [
        ("mkdir", str(tmp_path / "a")),
        ("fsync", str(tmp_path)),
        ("mkdir", str(tmp_path / "a" / "b")),
        ("fsync", str(tmp_path / "a")),
    ]


def test_remove_folder_never_leaves_half_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    (root / "old").mkdir(parents=True)
    for name in "abc":
        (root / "old" / name).write_text(name)
    start, shim = snapshot(root), Shim()
    install(monkeypatch, shim)
    remove_folder(root / "old")
    assert names(root) == []
    for end in range(len(shim.ops) + 1):
        for state in crash_states(start, shim.ops[:end]):
            old = materialize(state, root, tmp_path / "state") / "old"
            assert not old.exists() or names(old) == ["a", "b", "c"]


def test_remove_hidden_takes_only_its_own(tmp_path: Path) -> None:
    keep = ["step-1", ".tmp-other.1", "tmp-step-2", ".lock"]
    for name in [*keep, ".tmp-step-2.ab", ".del-step-3.cd"]:
        (tmp_path / name).mkdir()
    remove_hidden(tmp_path, "step-")
    assert names(tmp_path) == sorted(keep)
    remove_hidden(tmp_path / "absent", "step-")


def test_space_is_checked_with_a_margin(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    free = space.f_bavail * space.f_frsize
    require_space(tmp_path, free // 2)
    with pytest.raises(OSError, match="No space"):
        require_space(tmp_path, free)  # it would just fit; 10 % are missing


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.ENOSPC, "disk/full"), (errno.EDQUOT, "disk/full"), (errno.EROFS, "disk/write-failed")]
)
def test_disk_errors_become_user_errors(tmp_path: Path, code: int, expected: str) -> None:
    with pytest.raises(UserError) as caught, disk_errors(tmp_path / "not" / "made", 10**7, lambda: "step-3 is safe"):
        raise OSError(code, os.strerror(code), "weights\x1b[31m")
    assert (caught.value.code, caught.value.exit_code) == (expected, 7)
    text = str(caught.value)
    assert os.strerror(code) in text
    assert r"weights\x1b[31m" in text
    assert "step-3 is safe" in text
    assert ("11.0 MB" in text and "MB free" in text) == (expected == "disk/full")


def test_a_full_device_is_a_user_error() -> None:
    with pytest.raises(UserError, match="disk/full"), disk_errors(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"x")
