"""The parts of an offline HTML page: text, tables, bars and histograms as inline SVG; nothing is loaded from anywhere.

All text from files passes ``escape`` (made visible, then HTML-escaped). Colours follow the reader's setting, light or dark, and
a table wider than a phone scrolls inside its own box.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from minisft.common.errors import visible
from minisft.quality.text import even_sample

Cell = str | int | float
# Blue and orange of Okabe and Ito: told apart by every reader, on white and on black.
_STYLE = """\
:root{color-scheme:light dark;--text:#1d1f23;--quiet:#5c6370;--line:#d9dce1;--back:#fff;--blue:#0072b2;--orange:#c24e00}
@media(prefers-color-scheme:dark){
:root{--text:#e4e6ea;--quiet:#9aa1ad;--line:#3a3f47;--back:#15171a;--blue:#56b4e9;--orange:#f0a050}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back);max-width:64rem;margin:0 auto;
padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.5rem 0 .5rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{margin:.4rem 0;max-width:46rem;overflow-wrap:anywhere}
.quiet{color:var(--quiet)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{font-weight:600;color:var(--quiet);font-size:.85rem;overflow-wrap:normal}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;overflow-wrap:normal}
.excerpts td{min-width:9rem}
.excerpts td.n{min-width:3rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1.5rem}
figure{margin:0}
figcaption{font-size:.9rem;color:var(--quiet)}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--quiet);font:12px system-ui,sans-serif}
.mark{background:color-mix(in srgb,var(--orange) 28%,transparent);border-radius:.2rem}
.bar{display:grid;grid-template-columns:minmax(8rem,17rem) 1fr minmax(3.5rem,auto);gap:.6rem;align-items:center;margin:.2rem 0}
.bar i{display:block;height:.9rem;background:var(--blue);min-width:1px;border-radius:2px}
.bar b{font-weight:400;text-align:right;font-variant-numeric:tabular-nums}
.bar.lost i{background:var(--orange)}
@media(max-width:600px){
.excerpts,.excerpts tbody,.excerpts tr,.excerpts td{display:block}
.excerpts tr:first-child{display:none}
.excerpts tr{border-bottom:1px solid var(--line);padding:.5rem 0}
.excerpts td,.excerpts td.n{border:0;padding:.1rem 0;text-align:left;min-width:0}
.excerpts td::before{content:attr(data-name) ": ";color:var(--quiet);font-size:.85rem}
.bar{grid-template-columns:1fr auto}.bar i{grid-column:1/3;grid-row:2}}
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 360, 190, 44, 34
_NUM_BINS = 24


def escape(value: object, limit: int = 400) -> str:
    """Text for a page: control characters shown, HTML signs escaped, numbers short."""
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return html.escape(visible(value, limit))


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page."""
    shown = escape(title)
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{shown}</title><style>{_STYLE}</style></head>",
            f"<body>\n<h1>{shown}</h1>",
            *parts,
            "</body></html>\n",
        )
    )


def heading(text: str, note: str = "") -> str:
    """A section's title and what it means."""
    return f"<h2>{escape(text)}</h2>" + (f'\n<p class="quiet">{escape(note, 1000)}</p>' if note else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], excerpts: bool = False) -> str:
    """A table; numbers are aligned to the right.

    Args:
        columns: titles.
        rows: cells; text is escaped, except for a cell made by ``marked``.
        excerpts: the text cells hold sentences.

    Returns:
        HTML.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ["<tr>" + "".join(map(_cell, row, columns)) + "</tr>" for row in rows]
    kind = ' class="excerpts"' if excerpts else ""
    return f'<div class="scroll"><table{kind}><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


class Markup(str):
    """HTML that is escaped already."""

    __slots__ = ()


def _cell(value: Cell, column: str) -> str:
    kind = "" if isinstance(value, str) else ' class="n"'
    return f'<td{kind} data-name="{escape(column)}">{value if isinstance(value, Markup) else escape(value)}</td>'


def marked(text: str, start: int, end: int, around: int = 90) -> Markup:
    """An excerpt of a text with one span marked.

    Args:
        text: the whole text.
        start: first marked character.
        end: one past the last.
        around: characters shown on either side.

    Returns:
        HTML.
    """
    low, high = max(0, start - around), min(len(text), end + around)
    shown = (text[low:start], text[start:end][:300], text[end:high])
    before, middle, after = (escape(" ".join(part.split()), 400) for part in shown)
    lead, trail = "…" if low else "", "…" if high < len(text) else ""
    return Markup(f'{lead}{before} <span class="mark">{middle}</span> {after}{trail}')


def bars(values: Mapping[str, int], lost: Iterable[str] = ()) -> str:
    """Horizontal bars, each with its name and number; those in ``lost`` in orange."""
    top = max([*values.values(), 1])
    orange = set(lost)
    lines = []
    for name, value in values.items():
        kind = "bar lost" if name in orange else "bar"
        bar = f'<i style="width:{100 * value / top:.2f}%"></i>' if value else '<i style="visibility:hidden"></i>'
        lines.append(f'<div class="{kind}"><span>{escape(name)}</span>{bar}<b>{value:,}</b></div>')
    return "\n".join(lines)


def histogram(title: str, values: NDArray[np.float64], kept: NDArray[np.bool_] | None = None, log: bool = False) -> str:
    """How values are spread; with ``kept``, all in blue and those not kept in orange on top of it.

    Args:
        title: what the values are.
        values: finite numbers.
        kept: which of them are kept.
        log: bins of equal ratio, for values of at least 0 (1 is added).

    Returns:
        an SVG with a caption.
    """
    if not len(values):
        return f"<figure><figcaption>{escape(title)}: no values</figcaption></figure>"
    scaled = np.log1p(values) if log else values
    low, high = float(scaled.min()), float(scaled.max())
    edges = np.linspace(low, high if high > low else low + 1, _NUM_BINS + 1)
    every = np.histogram(scaled, edges)[0]
    gone = np.histogram(scaled[~kept], edges)[0] if kept is not None else np.zeros_like(every)
    top = int(every.max())
    body = [*_columns(every, top, "var(--blue)"), *_columns(gone, top, "var(--orange)")]
    shown = np.expm1(edges) if log else edges
    labels = [(_x(share), float(shown[round(share * _NUM_BINS)])) for share in (0, 0.5, 1)]
    return _figure(title, body, labels, [(0.0, 0.0), (1.0, float(top))])


def scatter(title: str, x: NDArray[np.float64], y: NDArray[np.float64], kept: NDArray[np.bool_], most: int = 4000) -> str:
    """Points, those kept in blue and the others in orange; at most ``most`` of each, evenly chosen.

    Args:
        title: what is drawn.
        x: across.
        y: up.
        kept: which are kept.
        most: points drawn of each kind.

    Returns:
        an SVG with a caption.
    """
    if not len(x):
        return f"<figure><figcaption>{escape(title)}: no values</figcaption></figure>"
    (x0, x1), (y0, y1) = _limits(x), _limits(y)
    body = []
    for keep, color in ((False, "var(--orange)"), (True, "var(--blue)")):
        rows = np.flatnonzero(kept == keep)
        rows = rows[even_sample(len(rows), most)]
        path = "".join(f"M{_x((x[i] - x0) / (x1 - x0)):.1f} {_y((y[i] - y0) / (y1 - y0)):.1f}h0" for i in rows)
        body.append(f'<path d="{path}" stroke="{color}" stroke-width="3" stroke-linecap="round" opacity=".5" fill="none"/>')
    return _figure(title, body, [(_x(s), x0 + s * (x1 - x0)) for s in (0, 0.5, 1)], [(0.0, y0), (1.0, y1)])


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - 8)


def _y(share: float) -> float:
    return (_HEIGHT - _BOTTOM) - share * (_HEIGHT - _BOTTOM - 10)


def _columns(counts: NDArray[np.int64], top: int, color: str) -> list[str]:
    width = (_x(1) - _x(0)) / _NUM_BINS
    boxes = [(_x(i / _NUM_BINS), _y(n / top)) for i, n in enumerate(counts) if n]
    return [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{_y(0) - y:.1f}" fill="{color}"/>' for x, y in boxes
    ]


def _figure(
    title: str, body: list[str], x_labels: Sequence[tuple[float, float]], y_labels: Sequence[tuple[float, float]]
) -> str:
    anchors = ("start", "middle", "end")
    axis = [f'<path d="M{_x(0)} {_y(1)}V{_y(0)}H{_x(1)}" stroke="var(--line)" fill="none"/>']
    axis += [
        f'<text x="{x:.0f}" y="{_HEIGHT - 14}" text-anchor="{anchor}">{escape(value)}</text>'
        for (x, value), anchor in zip(x_labels, anchors, strict=True)
    ]
    axis += [f'<text x="{_LEFT - 6}" y="{_y(s) + 4:.0f}" text-anchor="end">{escape(value)}</text>' for s, value in y_labels]
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body + axis)}</svg>'
    return f"<figure>{picture}<figcaption>{escape(title)}</figcaption></figure>"


def charts(figures: Iterable[str]) -> str:
    """Figures side by side where they fit."""
    return '<div class="charts">' + "\n".join(figures) + "</div>"
