"""minisft's docstrings as Sphinx wants them.

They are plain prose: names and literals in double backticks, sections such as ``Args:`` with ``name: meaning`` below, displayed
formulas indented. Nothing else in them is markup, so a star, a bar or a trailing underscore (``x_i * y_i``, ``|W|``,
``merge_``) has to reach the reader as it stands. Everything outside backticks is therefore escaped before docutils sees it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from textwrap import dedent

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Metrics|Ref|Cost):\s*(.*)")
ENTRY = re.compile(r"([A-Za-z_][\w, ]*): (.*)")
LITERAL = re.compile(r"(``.+?``|`[^`]+`)")
EMPHASIS = re.compile(r"(?<![\w*/])\*(?=\w)([^*]+)(?<=\w)\*(?![\w*])")
ARXIV = re.compile(r"arXiv\\:(\d{4}\.\d{5})")
TABLE_RULE = re.compile(r"\|[-| ]+\|")


def escape(text: str) -> str:
    """Prose that reads as it is written; literals, one emphasised word or phrase and arXiv numbers become markup."""
    parts = LITERAL.split(text)
    # The empty escapes let a literal touch letters, as in "``Example``s".
    return "".join(f"\\ ``{part.strip('`')}``\\ " if i % 2 else _escape_prose(part) for i, part in enumerate(parts))


def _escape_prose(text: str) -> str:
    words = EMPHASIS.split(text)
    escaped = (re.sub(r"([\\*`|_:<>\[\]])", r"\\\1", word) for word in words)
    marked = "".join(f"*{word}*" if i % 2 else word for i, word in enumerate(escaped))
    return ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", marked)


def paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    """Runs of lines that are not blank; a section's label begins one, and so does a change to or from deep indentation."""
    run: list[str] = []
    for line in lines:
        starts_section = SECTION.match(line) is not None
        leaves_display = bool(run) and SECTION.match(run[0]) is None and line[:1].isspace() != run[0][:1].isspace()
        if run and (not line.strip() or starts_section or leaves_display):
            yield run
            run = []
        if line.strip():
            run.append(line)
    if run:
        yield run


def to_rest(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText."""
    rest: list[str] = []
    for run in paragraphs(lines):
        section = SECTION.match(run[0])
        if section:
            rest += _section(section[1], [section[2], *run[1:]] if section[2] else run[1:])
        elif run[0][:1].isspace():
            rest += ["::", "", *("    " + line for line in dedent("\n".join(run)).splitlines()), ""]
        elif len(run) > 1 and TABLE_RULE.fullmatch(run[1].strip()):
            rest += _table(run)
        else:
            rest += _paragraph(run)
    return rest


def _paragraph(run: list[str]) -> list[str]:
    text = " ".join(line.strip() for line in run).removesuffix("::")
    # The empty escape keeps "A. Name" and "(B, T) ids" from being read as the first item of a list.
    return ["\\ " + escape(text), ""] if text else []


def _section(label: str, body: list[str]) -> list[str]:
    if label not in ("Args", "Attributes", "Raises", "Metrics"):
        return [f":{label}: " + "".join(_paragraph(body)), ""]
    items: list[list[str]] = []
    depth = min(len(line) - len(line.lstrip()) for line in body)
    for line in body:
        if not items or (len(line) - len(line.lstrip()) == depth and ENTRY.match(line.strip())):
            items.append([])
        items[-1].append(line.strip())
    return [f":{label}:", *("    - " + _item(" ".join(item)) for item in items), ""]


def _item(text: str) -> str:
    entry = ENTRY.fullmatch(text)
    return f"``{entry[1]}``: {escape(entry[2])}" if entry else "\\ " + escape(text)


def _table(run: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in (run[0], *run[2:])]
    rest = [".. list-table::", "    :header-rows: 1", ""]
    for row in rows:
        rest += [f"    {'* -' if i == 0 else '  -'} \\ {escape(cell)}" for i, cell in enumerate(row)]
    return [*rest, ""]


def settings(kind: type) -> list[str]:
    """The fields of a dataclass that carry their own explanation, as a section of its docstring."""
    fields = [(f.name, f.metadata["help"]) for f in dataclasses.fields(kind) if "help" in f.metadata]
    return ["", "Args:", *(f"    {name}: {meaning}." for name, meaning in fields)] if fields else []


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    explained = settings(obj) if isinstance(obj, type) and dataclasses.is_dataclass(obj) else []
    lines[:] = to_rest(lines + explained)


def _skip(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Fields stand in the signature and under ``Attributes`` already; what is left are functions, classes, properties."""
    is_code = callable(obj) or isinstance(obj, (property, classmethod, staticmethod))
    return None if is_code else True


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
