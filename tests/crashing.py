"""Tools for crash tests: a recording, failing stand-in for ``os``, and a model of what a power cut leaves of its calls.

The model is harsher than real file systems: a name (new, renamed, removed) is safe only after an ``fsync`` of its folder,
data only after an ``fsync`` of its file; what is not safe may be there, missing, cut in half or zeros.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from minisft.common import atomic_files

NAME_OPS = ("create", "mkdir", "rename", "unlink", "rmdir")


@dataclass(frozen=True)
class Op:
    kind: str
    path: str
    target: str = ""  # of a rename
    data: bytes = b""  # of a write


class Shim:
    """``os`` for ``atomic_files``: records every call that changes the disk; the call number ``fail_at`` fails."""

    def __init__(self, fail_at: int | None = None, code: int = errno.ENOSPC, short_writes: bool = False) -> None:
        self.ops: list[Op] = []
        self.fail_at, self.code, self.short_writes = fail_at, code, short_writes
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def _note(self, op: Op) -> None:
        if len(self.ops) == self.fail_at:
            self.fail_at = None
            raise OSError(self.code, os.strerror(self.code), op.path)
        self.ops.append(op)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._note(Op("create", str(path)))
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = str(path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        piece = bytes(data[: max(1, len(data) // 2)]) if self.short_writes else bytes(data)
        self._note(Op("write", self._paths[descriptor], data=piece))
        return os.write(descriptor, piece)

    def fsync(self, descriptor: int) -> None:
        self._note(Op("fsync", self._paths[descriptor]))
        os.fsync(descriptor)

    def mkdir(self, path: Path) -> None:
        self._note(Op("mkdir", str(path)))
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._note(Op("rename", str(source), str(target)))
        os.rename(source, target)

    replace = rename

    def unlink(self, path: Path) -> None:
        self._note(Op("unlink", str(path)))
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        self._note(Op("rmdir", str(path)))
        os.rmdir(path)

    def rmtree(self, folder: Path, ignore_errors: bool = False) -> None:
        assert ignore_errors
        try:
            for parent, folders, names in os.walk(folder, topdown=False):
                for name in sorted(names):
                    self.unlink(Path(parent, name))
                for name in sorted(folders):
                    self.rmdir(Path(parent, name))
            self.rmdir(folder)
        except OSError:
            return


def install(monkeypatch: pytest.MonkeyPatch, shim: Shim) -> None:
    monkeypatch.setattr(atomic_files, "os", shim)
    monkeypatch.setattr(atomic_files, "shutil", shim)


@dataclass
class Content:
    data: bytes = b""
    safe_bytes: int = 0


Tree = dict[str, Content | None]  # None: a folder


def snapshot(root: Path) -> Tree:
    """What lies under ``root``, all of it safe."""
    tree: Tree = {str(root): None}
    for path in root.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        tree[str(path)] = Content(data, len(data)) if path.is_file() else None
    return tree


def replay(start: Tree, ops: list[Op], dropped: frozenset[int]) -> Tree:
    """``start`` after ``ops``, without the ones numbered in ``dropped``."""
    tree: Tree = {path: Content(c.data, c.safe_bytes) if c else None for path, c in start.items()}
    moved: dict[str, str] = {}  # where the contents of a folder still lie when its rename was lost
    for number, op in enumerate(ops):
        op = _redirected(op, moved)
        if number in dropped:
            if op.kind == "rename":
                moved[op.target] = op.path
            continue
        content = tree.get(op.path)
        if op.kind == "create":
            tree[op.path] = Content()
        elif op.kind == "mkdir":
            tree[op.path] = None
        elif op.kind == "write" and content:
            content.data += op.data
        elif op.kind == "fsync" and content:
            content.safe_bytes = len(content.data)
        elif op.kind in ("unlink", "rmdir"):
            tree.pop(op.path, None)
        elif op.kind == "rename":
            _move(tree, op.path, op.target)
    return tree


def _redirected(op: Op, moved: dict[str, str]) -> Op:
    for target, source in moved.items():
        if op.path.startswith(target + "/"):
            return replace(op, path=source + op.path[len(target) :])
    return op


def _move(tree: Tree, source: str, target: str) -> None:
    for path in [p for p in tree if p == source or p.startswith(source + "/")]:
        tree[target + path[len(source) :]] = tree.pop(path)


def crash_states(start: Tree, ops: list[Op]) -> Iterator[Tree]:
    """Every distinct tree that a kill or a power cut just after ``ops`` may leave."""
    seen: set[int] = set()
    volatile = _volatile_names(ops)
    drops = [frozenset(), *(frozenset(volatile[i:]) for i in range(len(volatile))), *(frozenset([i]) for i in volatile)]
    for dropped in drops:
        tree = replay(start, ops, dropped)
        for damage in ("none", "lost", "half", "zeros"):
            state = {path: _damaged(content, damage) for path, content in tree.items()}
            identity = hash(tuple(sorted((p, c.data if c else None) for p, c in state.items())))
            if identity not in seen:
                seen.add(identity)
                yield state


def _volatile_names(ops: list[Op]) -> list[int]:
    """Numbers of the name-changing calls whose folder has not been synced since."""
    volatile: list[int] = []
    for number, op in enumerate(ops):
        if op.kind in NAME_OPS:
            volatile.append(number)
        elif op.kind == "fsync":
            volatile = [i for i in volatile if os.path.dirname(ops[i].target or ops[i].path) != op.path]
    return volatile


def _damaged(content: Content | None, damage: str) -> Content | None:
    if content is None or damage == "none":
        return content
    safe, risky = content.data[: content.safe_bytes], content.data[content.safe_bytes :]
    left = {"lost": b"", "half": risky[: len(risky) // 2], "zeros": bytes(len(risky))}[damage]
    return Content(safe + left)


def materialize(tree: Tree, root: Path, into: Path) -> Path:
    """Write ``tree`` (absolute paths below ``root``) to the empty place ``into``."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for name, content in sorted(tree.items()):
        path = into / Path(name).relative_to(root)
        if not path.parent.is_dir():
            continue  # its folder was lost
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content.data)
    return into
