"""Libraries that only some commands need: a clear error with the command that installs them."""

from __future__ import annotations

import importlib.util

from minisft.common.errors import UserError, listing


def require_extra(extra: str, *modules: str) -> None:
    """Refuse to start without the libraries of an extra.

    Raises:
        UserError: ``config/missing-extra`` with the command that installs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        fix = f"pip install 'minisft[{extra}]'"
        raise UserError("config/missing-extra", "a library is not installed", found=f"no {listing(missing)}", fix=fix)
