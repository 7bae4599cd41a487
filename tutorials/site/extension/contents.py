"""What the landing page and the pages "The library" and "Measured" show, taken from the notebooks and from the package."""

from __future__ import annotations

import html
import inspect
import json
from pathlib import Path
from typing import Any

import minisft

LANES = {
    "Data": ("01", "02", "10", "11"),
    "Adapter": ("03", "04", "07", "09"),
    "Bits": ("05", "06", "08"),
    "Judgement": ("12", "13"),
}
DOORS = {"01": "start here: how a model answers", "03": "start here: adapters", "05": "start here: 4-bit numbers"}


def pages(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """By number: the name of each page's file and what its notebook says of it."""
    found = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        found[path.name[:2]] = path.stem, json.loads(path.read_text(encoding="utf-8"))["metadata"]["minisft"]
    return found


def page_map(folder: Path) -> str:
    """The path as four lanes of cards, each a link to its page."""
    known = pages(folder)
    lanes = []
    for lane, numbers in LANES.items():
        cards = "".join(_card(number, *known[number]) for number in numbers)
        lanes.append(f'<div class="lane"><div class="lane-name">{lane}</div>{cards}</div>')
    return f'<div class="page-map">{"".join(lanes)}</div>'


def _card(number: str, stem: str, page: dict[str, Any]) -> str:
    title = html.escape(page["title"])
    times = f"run {page['minutes']} min, read {page.get('read_minutes', '?')} min"
    door = f"<em>{DOORS[number]}</em>" if number in DOORS else ""
    kind = "card door" if number in DOORS else "card"
    return f'<a class="{kind}" href="tutorials/{stem}.html"><b>{number}</b> {title}{door}<small>{times}</small></a>'


def page_table(folder: Path) -> str:
    """The tutorials in their order, from the notebooks' metadata."""
    rows = ["| page | you build | run | read |", "|---|---|---|---|"]
    for number, (stem, page) in pages(folder).items():
        title = f"[{number} {page['title']}](tutorials/{stem}.ipynb)"
        built = ", ".join(f"`{name}`" for name in page.get("contract", {}))
        run = f"{page['minutes']} min" + (", SmolLM2" if page["needs"] == "smollm2" else "")
        rows.append(f"| {title} | {built} | {run} | {page.get('read_minutes', '?')} min |")
    return "\n".join(rows)


def total_times(folder: Path) -> str:
    """How long all pages take together, to run and to read."""
    known = [page for _, page in pages(folder).values()]
    run, read = sum(page["minutes"] for page in known), sum(page.get("read_minutes", 0) for page in known)
    return f"{run} minutes to run and about {round(read / 60)} hours to read"


def front_door() -> str:
    """Every name that ``import minisft`` offers, with a link and the first sentence of its docstring."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in minisft.__all__:
        thing = getattr(minisft, name)
        summary = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        rows.append(f"| {{py:obj}}`{name} <{thing.__module__}.{thing.__qualname__}>` | {summary} |")
    return "\n".join(rows)


def latency(plot: Path) -> str:
    """The plot of ``benchmarks/bench_merge.py``, once it has been measured."""
    if not plot.exists():
        return ""
    return f"![Latency of a layer with its adapter beside it and merged into it]({plot.name})"
