"""What the landing page and the library's first page list, taken from the notebooks and from the package itself."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import minisft


def page_table(folder: Path) -> str:
    """The tutorials in their order, from the notebooks' metadata."""
    rows = ["| page | you build | takes |", "|---|---|---|"]
    for path in sorted(folder.glob("*.ipynb")):
        page = json.loads(path.read_text(encoding="utf-8"))["metadata"]["minisft"]
        title = f"[{path.name[:2]} {page['title']}](tutorials/{path.name})"
        built = ", ".join(f"`{name}`" for name in page.get("contract", {}))
        takes = f"{page['minutes']} min" + (", SmolLM2" if page["needs"] == "smollm2" else "")
        rows.append(f"| {title} | {built} | {takes} |")
    return "\n".join(rows)


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
