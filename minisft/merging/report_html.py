"""The pages of a merge's certificate: a plot of the layers, and the report as one readable page.

Everything that comes from a file (names of layers, models, folders) is escaped; the page loads nothing, and its plot stands
in it. Nothing is computed here: this is what ``certificate`` has found.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from minisft.common.colours import BLUE, GREEN, GREY, ORANGE
from minisft.common.errors import visible
from minisft.common.safe_json import JSON

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# An axis, and the columns of the report that are drawn on it.
_PANELS: dict[str, dict[str, str]] = {
    "|D| / |W|": {"delta_ratio": BLUE},
    "fraction_lost": {"fraction_lost": ORANGE},
    "effect error": {"effect_error": ORANGE},
    "survival": {"survival": GREEN},
}
_FITTED_PANELS: dict[str, dict[str, str]] = {
    "|D| / |W|": {"delta_ratio": BLUE},
    "output error": {"plain_output_error": GREY, "output_error": ORANGE},
    "codes moved": {"moved": BLUE},
    "survival": {"survival": GREEN},
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}"
    "th,td{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}"
    ".verdict{padding:.8rem 1rem;border-left:.4rem solid;background:#f6f6f6}svg{max-width:100%;height:auto}"
    "td{font-variant-numeric:tabular-nums}"
)
_EXPLAINED = {
    "delta_ratio": "|D| / |W|: how large the update is",
    "fraction_lost": "share of the update's entries that rounding left without effect",
    "effect_error": "|E - D| / |D|: how far the change that was stored is from the one that was trained",
    "survival": "the part of D that is still there; 1 is all of it",
    "base_shift": "|W - W in training| / |D|",
    "output_error": "|X (W' - W - D)| on the calibration text, relative to the 4-bit base without adapter; 0 is perfect",
    "plain_output_error": "the same with every weight rounded for itself",
    "moved": "share of the 4-bit codes that are not the base's",
}


def draw_layers(layers: Sequence[Mapping[str, JSON]]) -> bytes:
    """An SVG with four rows over all layers: how large the update is, its merge error (two measures), how much survived."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = _FITTED_PANELS if "output_error" in layers[0] else _PANELS
    # A fixed salt: the same merge gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "minisft", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 7))
        figure.subplots_adjust(0.09, 0.07, 0.99, 0.97, hspace=0.18)
        rows = figure.subplots(len(panels), 1, sharex=True)
        for axes, (label, columns) in zip(rows, panels.items(), strict=True):
            _draw_panel(axes, {name: [float(str(layer[name])) for layer in layers] for name in columns}, columns)
            axes.set_ylabel(label)
        rows[-1].set_xlabel("adapted layer, in the model's order")
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def _draw_panel(axes: Axes, columns: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    for name, values in columns.items():
        axes.plot(
            range(len(values)), values, ".-", color=colors[name], linewidth=0.8, markersize=4, label=name.replace("_", " ")
        )
    finite = [value for values in columns.values() for value in values if math.isfinite(value)]
    axes.set_ylim(min(0.0, *finite), 1.08 * max(0.0, *finite) or 1.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.15, linewidth=0.6)
    if len(columns) > 1:
        axes.legend(frameon=False, ncols=len(columns), loc="lower right", bbox_to_anchor=(1, 0.95), fontsize=9)


def page(report: Mapping[str, JSON], svg: str) -> str:
    """The report as an HTML page."""
    verdict = _table(report["verdict"])
    good = str(verdict["words"]).startswith("equivalent")
    at = f" in {verdict['where']}" if verdict["where"] else ""
    head = f"<b>{_text(verdict['words'])}</b>: {_text(verdict['number'])} {_text(verdict['value'])}{_text(at)}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Merge report</title><style>{_STYLE}</style>\n'
        f'<h1>Merge report</h1>\n<p class="verdict" style="border-color:{GREEN if good else ORANGE}">'
        f"{head}, limit {_text(verdict['limit'])}</p>\n"
        + "".join(f"<h2>{title}</h2>\n{_pairs(report[key])}" for title, key in _SECTIONS)
        + f"<h2>Layers</h2>\n{_picture(svg)}\n{_layers(report['layers'])}</html>\n"
    )


_SECTIONS = (
    ("What was merged", "adapter"),
    ("Onto which model", "base"),
    ("Into what", "merged"),
    ("What the models answer", "model"),
)


def _table(value: JSON) -> dict[str, JSON]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else visible(value, 300)
    return html.escape(shown)


def _pairs(value: JSON) -> str:
    if not isinstance(value, dict):
        return f"<p>{_text(value)}</p>\n"
    lines = []
    for key, item in value.items():
        shown = "<br>".join(f"{_text(k)} {_text(v)}" for k, v in item.items()) if isinstance(item, dict) else _text(item)
        lines.append(f"<tr><td>{_text(key.replace('_', ' '))}</td><td>{shown}</td></tr>\n")
    return f"<table>\n{''.join(lines)}</table>\n"


def _picture(svg: str) -> str:
    """The drawing without the prologue that a file of its own has."""
    return svg[svg.index("<svg") :]


def _layers(value: JSON) -> str:
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    explained = {name: text for name, text in _EXPLAINED.items() if rows and name in rows[0]}
    legend = "".join(f"<li><b>{_text(name.replace('_', ' '))}</b>: {_text(text)}</li>" for name, text in explained.items())
    names = ("path", *explained)
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_text(row[name])}</td>" for name in names) + "</tr>\n" for row in rows)
    return f"<ul>{legend}</ul>\n<table>\n<tr>{head}</tr>\n{body}</table>\n"
