"""``python -m minisft`` is the command ``minisft``."""

from __future__ import annotations

import sys

from minisft.cli.main import process

if __name__ == "__main__":
    sys.exit(process())
