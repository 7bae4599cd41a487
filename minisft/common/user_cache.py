"""The folder of this user's own where things are kept that can be made again: ``$MINISFT_CACHE``, else
``$XDG_CACHE_HOME/minisft``, else ``~/.cache/minisft``.

What lies there is used without asking, so a folder that somebody else owns or may write to is refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The folder, made if it is not there.

    Raises:
        PermissionError: others may write to it.
        OSError: it cannot be made.
        RuntimeError: there is no home folder.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MINISFT_CACHE") or Path(home) / "minisft").absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder.stat()):
        raise PermissionError(f"{folder} is not a folder that only this user can write to")
    return folder


def is_private(status: os.stat_result) -> bool:
    """Whether a file is this user's, and nobody else may write to it."""
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
