"""The comparison as one HTML page: three panels, the gates, bad cases side by side. It loads nothing and runs nothing.

Answers come from models and prompts from files, so all of it is escaped, made visible and cut; a content policy in the page
forbids scripts and requests, should an escape ever be missing.
"""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterable, Sequence

from minisft.common.errors import visible
from minisft.evaluation.statistics import Interval
from minisft.judging.bad_cases import BadCase
from minisft.judging.comparison import Comparison, Measured
from minisft.judging.gates import GateResult

MAX_CASES, MAX_TEXT, MAX_DIFF_WORDS, MAX_SLICES = 60, 1_500, 300, 40
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'none'"
STYLE = """
:root{--ink:#1d1d1f;--soft:#5c5c66;--line:#d9d9de;--paper:#fff;--panel:#f5f5f7;--good:#00684a;--bad:#a83200;--open:#6b5200;
--del:#ffdcd0;--ins:#cdeedd;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#ececf0;--soft:#a6a6b0;--line:#3a3a42;--paper:#131316;
--panel:#1e1e23;--good:#4fd1a1;
--bad:#ff9a6b;--open:#e3c04d;--del:#5a2413;--ins:#0f4a35}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:76rem;
padding:1.2rem;color:var(--ink);
background:var(--paper)}h1{font-size:1.45rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .6rem}
h3{font-size:1rem;margin:0}
p{margin:.4rem 0}.soft{color:var(--soft)}.verdict{font-size:1.6rem;font-weight:700}.SHIP,.met{color:var(--good)}
.HOLD,.failed{color:var(--bad)}.NOT,.not{color:var(--open)}.panels{display:grid;gap:1rem;grid-template-columns:1fr}
@media(min-width:900px){.panels{grid-template-columns:repeat(3,1fr)}}.panel{background:var(--panel);
border:1px solid var(--line);
border-radius:.5rem;padding:1rem;min-width:0}.big{font-size:1.5rem;font-weight:650;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums;
white-space:nowrap}
th{white-space:normal}th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:8rem}
details{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem;margin:.5rem 0}
summary{cursor:pointer;overflow-wrap:anywhere}
.sides{display:grid;gap:.8rem;grid-template-columns:1fr}@media(min-width:700px){.sides{grid-template-columns:1fr 1fr}}
.answer,.prompt{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);border-radius:.35rem;
padding:.6rem;margin:.3rem 0;
min-width:0}del{background:var(--del);text-decoration-thickness:1px}ins{background:var(--ins);text-decoration:none}
"""


def escaped(text: object, limit: int = MAX_TEXT) -> str:
    """Text for the page: control characters shown as escapes (line breaks stay), markup inert, a long text cut."""
    lines = str(text)[: limit + 1].split("\n")
    shown = "\n".join(visible(line, limit) for line in lines)
    return html.escape(shown[:limit] + ("…" if len(str(text)) > limit else ""))


def page(comparison: Comparison) -> str:
    """The whole page."""
    word = comparison.verdict.split(" ")[0]
    gates = "".join(_gate(result) for result in comparison.gates)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>Comparison: {escaped(comparison.verdict)}</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>Two models, three dimensions</h1>\n"
        f'<p class="soft">base {escaped(comparison.base, 300)}<br>tuned {escaped(comparison.tuned, 300)}</p>\n'
        f'<p class="verdict {word}">{escaped(comparison.verdict)}</p>\n<ul>{gates}</ul>\n<div class="panels">\n'
        f"{_panels(comparison)}</div>\n{_errors(comparison)}{_cases(comparison)}{_clusters(comparison)}{_slices(comparison)}"
        "</body></html>\n"
    )


def _gate(result: GateResult) -> str:
    return f'<li class="{result.status.split(" ")[0]}">{escaped(result)}</li>'


def _panels(comparison: Comparison) -> str:
    shown = []
    for dimension, title in (("task", "Task"), ("general", "General ability")):
        measured = [_measured(m, comparison.gates) for m in comparison.measured if m.dimension == dimension]
        shown.append(_panel(title, "".join(measured) or '<p class="soft">no data: give --general BASE TUNED</p>'))
    return "".join([*shown, _panel("Business effect", _business(comparison))])


def _panel(title: str, body: str) -> str:
    return f'<section class="panel"><h3>{title}</h3>{body}</section>\n'


def _measured(m: Measured, gates: Sequence[GateResult]) -> str:
    r = m.result
    form = f" ({escaped(m.form, 100)})" if m.form else ""
    p = "too few rows for a test" if r.p_value is None else f"p {r.p_value:.3g}"
    margin = r.non_inferiority
    table = "" if r.table is None else (
        f"<p>fixed {r.table['only_b']}, broken {r.table['only_a']}, both right {r.table['both']}, "
        f"both wrong {r.table['neither']}</p>"
    )  # fmt: skip
    limit = next((g.gate.limit for g in gates if g.measured == m.name), None)
    return (
        f'<p class="soft">{escaped(m.metric, 60)}{form}, {r.n} rows; a true difference of '
        f"{r.detectable:.4f} would be found with 80 %</p>"
        f'<p class="big">{m.sign * r.mean_a:.4f} → {m.sign * r.mean_b:.4f}</p>'
        f"<p>gain {r.difference}, {p}</p>{interval_svg(r.difference, limit)}{table}"
        f'<p class="soft">nothing lost within {margin.margin:g}: {"shown" if margin.shown else "not shown"}</p>'
    )


def _business(comparison: Comparison) -> str:
    if comparison.business is None:
        return '<p class="soft">no data: give --business FILE, from minisft ab analyze, arena or feedback</p>'
    headline = comparison.business["headline"]
    assert isinstance(headline, dict)
    interval = Interval.from_json(headline)
    limit = next((g.gate.limit for g in comparison.gates if g.measured == "business"), None)
    return f'<p class="soft">{escaped(headline.get("name", ""), 200)}</p><p class="big">{interval.estimate:+.4f}</p>' + (
        f"<p>{interval}</p>{interval_svg(interval, limit)}"
    )


def interval_svg(interval: Interval, limit: float | None = None) -> str:
    """A line from low to high with a dot, a mark at 0 and one at the gate."""
    reach = max(abs(interval.low), abs(interval.high), abs(limit or 0), 1e-9) * 1.15

    def x(value: float) -> float:
        return round(150 + 145 * value / reach, 1)

    gate = "" if limit is None else (
        f'<line x1="{x(limit)}" x2="{x(limit)}" y1="8" y2="36" stroke="var(--bad)" stroke-dasharray="3 3"/>'
        f'<text x="{x(limit)}" y="54" font-size="11" text-anchor="middle" fill="var(--bad)">gate</text>'
    )  # fmt: skip
    label = f"gain {interval}"
    return (
        f'<svg viewBox="0 0 300 60" role="img" aria-label="{label}">'
        f'<line x1="150" x2="150" y1="8" y2="36" stroke="var(--soft)"/>'
        f'<text x="150" y="54" font-size="11" text-anchor="middle" fill="var(--soft)">'
        f"{'' if limit == 0 else '0'}</text>{gate}"
        f'<line x1="{x(interval.low)}" x2="{x(interval.high)}" y1="22" y2="22" stroke="currentColor" stroke-width="3"/>'
        f'<circle cx="{x(interval.estimate)}" cy="22" r="5" fill="currentColor"/></svg>'
    )


def _rows(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escaped(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell, 120)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _errors(comparison: Comparison) -> str:
    shown = ""
    if comparison.errors:
        rows = [(name, before, after) for name, (before, after) in comparison.errors.items()]
        shown += f"<h2>Kinds of error</h2>\n{_rows(('kind', 'base', 'tuned'), rows)}"
    repeated = [c for c in comparison.confusions if float(str(c["count"])) > 1]
    if repeated:
        pairs = [(f"{c['reference']} → {c['prediction']}", c["count"], f"{float(str(c['expected'])):.1f}") for c in repeated]
        shown += f"<h2>Labels taken for each other</h2>\n{_rows(('right → given', 'rows', 'by chance'), pairs)}"
    return shown


def _cases(comparison: Comparison) -> str:
    regressions = [case for case in comparison.cases if case.kind == "regression"]
    shared = len(comparison.cases) - len(regressions)
    first = "".join(_case(case) for case in regressions[:MAX_CASES]) or '<p class="soft">none</p>'
    more = f'<p class="soft">{len(regressions) - MAX_CASES} more in bad_cases.jsonl</p>' if len(regressions) > MAX_CASES else ""
    others = "".join(_case(case) for case in comparison.cases if case.kind != "regression" and shared <= MAX_CASES)
    rest = f"<h2>Wrong in both: {shared}</h2>\n" + (others or '<p class="soft">in bad_cases.jsonl</p>') if shared else ""
    return f"<h2>Regressions: {len(regressions)}</h2>\n{first}{more}{rest}\n"


def _case(case: BadCase) -> str:
    prompt = "" if case.prompt is None else f'<div class="prompt">{escaped(case.prompt)}</div>'
    near = "".join(f"<li>{escaped(text, 160)}</li>" for text in case.near)
    before, after = diff(case.before, case.after)
    return (
        f"<details><summary>row {escaped(case.row, 60)}: {escaped(case.error, 120)}</summary>{prompt}"
        f'<p class="soft">right answer</p><div class="answer">{escaped(case.reference)}</div><div class="sides">'
        f'<div><p class="soft">base</p><div class="answer">{before}</div></div>'
        f'<div><p class="soft">tuned</p><div class="answer">{after}</div></div></div>'
        f"{f'<p class=soft>nearest training rows</p><ul>{near}</ul>' if near else ''}</details>\n"
    )


def diff(before: str, after: str) -> tuple[str, str]:
    """Both texts as markup, with the words that only one has marked; long texts are compared by their first 300 words."""
    first, second = (text[:MAX_TEXT].split(" ")[:MAX_DIFF_WORDS] for text in (before, after))
    left, right = [], []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        gone, new = escaped(" ".join(first[i:j])), escaped(" ".join(second[k:m]))
        left.append(gone if tag == "equal" or not gone else f"<del>{gone}</del>")
        right.append(new if tag == "equal" or not new else f"<ins>{new}</ins>")
    return _joined(left, before), _joined(right, after)


def _joined(parts: Sequence[str], text: str) -> str:
    cut = len(text) > MAX_TEXT or text.count(" ") >= MAX_DIFF_WORDS
    return " ".join(filter(None, parts)) + ("…" if cut else "")


def _clusters(comparison: Comparison) -> str:
    if not comparison.clusters:
        return ""
    rows = [(" ".join(w for w, _ in c.words) or "no word stands out", c.size, c.regressions) for c in comparison.clusters]
    note = '<p class="soft">k-means on words; named by the words that a group has more often than all other rows</p>'
    return f"<h2>Groups of wrong rows</h2>\n{note}{_rows(('words', 'rows', 'regressions'), rows)}"


def _slices(comparison: Comparison) -> str:
    if not comparison.slices:
        return ""
    rows = [
        (s.name, s.n, f"{s.mean_a:.3f}", f"{s.mean_b:.3f}", s.difference, "" if s.p_holm is None else f"{s.p_holm:.3g}")
        for s in comparison.slices[:MAX_SLICES]
    ]
    note = '<p class="soft">exploratory: many slices, so a low p here is a hypothesis for new rows; p is adjusted by Holm</p>'
    return f"<h2>Slices, largest loss first</h2>\n{note}{_rows(('slice', 'rows', 'base', 'tuned', 'gain', 'p'), rows)}"
