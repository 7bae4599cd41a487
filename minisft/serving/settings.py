"""What ``serve`` checks before anything is loaded: addresses, the key, how much is done at once. Nothing here needs PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from minisft.common.checks import require
from minisft.common.errors import UserError, visible
from minisft.common.extras import require_extra
from minisft.common.local_server import MIN_SECRET, check_access, check_port

ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_KEY_BYTES = 1000


def read_api_key(path: str | Path) -> str:
    """The key in the first line of a file: on a command line everybody on the machine could read it.

    Raises:
        UserError: the file cannot be read, or holds no key.
    """
    expected = f"a line of at least {MIN_SECRET} printable ASCII characters"
    try:
        with Path(path).open("rb") as file:
            lines = file.read(MAX_KEY_BYTES + 1).decode("ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "other characters"
        lines, found = [""], str(found)
    else:
        found = f"{len(lines[0])} characters"
    key = lines[0].strip()
    if not (MIN_SECRET <= len(key) <= MAX_KEY_BYTES and key.isprintable() and " " not in key):
        raise UserError(
            "config/bad-key", "the file holds no API key", where=visible(path), found=found, expected=expected,
            fix="for instance: openssl rand -hex 24 > FILE",
        )  # fmt: skip
    return key


def check_serving(
    host: str, port: int, api_key: str | None, max_rows: int, max_waiting: int, max_new_tokens: int, prefix_cache_mb: int
) -> None:
    """Refuse settings that no server could run with, before anything is loaded.

    Args:
        host, port, api_key, max_rows, max_waiting, max_new_tokens, prefix_cache_mb: see ``serve``.

    Raises:
        UserError: ``config/...``.
    """
    require_extra("serve", "starlette", "uvicorn")
    check_access(host, api_key, "the models", "give --api-key-file F; clients send it as their API key")
    check_port(port)
    require(1 <= max_rows <= 256, "--max-rows", max_rows, "1 to 256", "16 is what the fast code for CPUs computes at once")
    require(1 <= max_waiting <= 10_000, "--max-waiting", max_waiting, "1 to 10000", "64 is usual")
    require(max_new_tokens >= 1, "--max-new-tokens", max_new_tokens, "at least 1", "256 is usual")
    require(prefix_cache_mb >= 0, "--prefix-cache-mb", prefix_cache_mb, "0 or more", "512 is usual; 0 keeps nothing")


def base_id(model: str | Path) -> str:
    """What clients call the base: the name of its folder or file, or the name it was given by."""
    return Path(model).absolute().name if Path(model).exists() else str(model)


def check_adapters(model: str | Path, adapters: Mapping[str, str | Path]) -> None:
    """Refuse names that clients could not choose by.

    Args:
        model: the base.
        adapters: name -> folder.

    Raises:
        UserError: a name of other characters than letters, digits, ``_`` and ``-``, or the base's own.
    """
    for name in adapters:
        if not ADAPTER_NAME.fullmatch(name) or name == base_id(model):
            expected, fix = "1 to 64 letters, digits, _ or -, not the base's name", "--adapter NAME=DIR"
            raise UserError(
                "config/bad-adapter", "an adapter's name cannot be used", where="--adapter", found=visible(name, 80),
                expected=expected, fix=fix,
            )  # fmt: skip
