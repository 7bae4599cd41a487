"""Runs pytest in forked children of a process that has imported the libraries already, which takes most of a small test's time.

``mutants.py`` starts this file with the names of the libraries. A line of JSON on stdin asks for a run: ``root`` (a copy of the
project), ``arguments`` (of pytest) and ``output`` (a file). The answers are two lines: the child's process id, which is its
process group too, and its exit status once it has ended. Nothing of the project is imported here: each child imports the copy
that it is told to test.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Sequence

OTHER_PACKAGE = 70  # exit status of a child that would test another minisft than the copy


def import_libraries(names: Sequence[str]) -> None:
    """What is installed of them. Raises: RuntimeError: one has started a thread, which no fork would carry over."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if threading.active_count() > 1:
        raise RuntimeError(f"these threads run after importing: {threading.enumerate()}")


def run_tests(root: str, arguments: list[str], output: str) -> int:
    """In the child: pytest's exit status, with the copy at ``root`` first on the path and everything printed into a file."""
    os.setsid()
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(1, 2)
    os.chdir(root)
    os.environ["PYTHONPATH"] = sys.path[0] = root
    importlib.invalidate_caches()
    # The copy is first on the path, but an editable install has a say too: ask before anything runs.
    found = importlib.util.find_spec("minisft")
    if found is None or found.origin is None or not found.origin.startswith(root):
        return OTHER_PACKAGE
    import pytest

    return int(pytest.main(arguments))


def main() -> None:
    import_libraries(sys.argv[1:])
    for line in sys.stdin:
        if not (child := os.fork()):
            sys.exit(run_tests(**json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
