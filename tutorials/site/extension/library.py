"""``.. library:: minisft.lora``, one line a module, becomes the module's heading and everything public in it."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

LINE = re.compile(r"^\.\. library:: minisft\.([\w.]+)$", re.MULTILINE)


def expand(text: str) -> str:
    """The reStructuredText that the lines of ``text`` stand for."""
    return LINE.sub(lambda line: f"{line[1]}\n{'-' * len(line[1])}\n\n.. automodule:: minisft.{line[1]}\n", text)


def _expand_source(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = expand(source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _expand_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
