"""Bytes of a file, read straight into the memory of a tensor.

Files are read by ``preadv``, never mapped: pages of a map count as this process's memory, and copying them costs as much
again. A file that has become shorter since its header was checked is an error here, never a crash.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minisft.common.errors import UserError, visible


def read_bytes(path: Path, begin: int, count: int, family: str = "model") -> Tensor:
    """Part of a file.

    Args:
        path: the file.
        begin: first byte.
        count: number of bytes.
        family: of the error.

    Returns:
        (count,) uint8, in memory of its own.

    Raises:
        UserError: ``family/unreadable``: the file has become shorter, or cannot be read.
    """
    raw = torch.empty(count, dtype=torch.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            read_into(file, begin, raw, family)
    except OSError as error:
        raise _unreadable(path, family, str(error.strerror)) from None
    return raw


def read_into(file: BinaryIO, begin: int, out: Tensor, family: str = "model") -> None:
    """Fill a tensor with what lies in a file.

    Args:
        file: open for reading.
        begin: first byte.
        out: contiguous, any dtype.
        family: of the error.

    Raises:
        UserError: ``family/unreadable``: the file has become shorter, or cannot be read.
    """
    view, done = out.view(-1).view(torch.uint8).numpy().data, 0
    try:
        while done < len(view) and (got := os.preadv(file.fileno(), [view[done:]], begin + done)):
            done += got
    except OSError as error:
        raise _unreadable(Path(file.name), family, str(error.strerror)) from None
    if done < len(view):
        raise _unreadable(Path(file.name), family, "the file became shorter while it was read")


def _unreadable(path: Path, family: str, found: str) -> UserError:
    return UserError(
        f"{family}/unreadable", "cannot read the weights", where=visible(path), found=found, fix="copy or fetch it again"
    )
