"""The quality report as one offline page and as lines for a terminal."""

from __future__ import annotations

import itertools

import numpy as np

from minisft.common.errors import visible
from minisft.quality.contamination import KINDS, Leak
from minisft.quality.html import Cell, Markup, bars, charts, document, escape, heading, histogram, marked, table
from minisft.quality.pool import Pool, answer_text, prompt_text
from minisft.quality.report import QualityReport, counts, excerpt, lengths, quantiles
from minisft.quality.text import character_span

NUM_SHOWN = 20  # of each kind


def quality_page(report: QualityReport, token_lengths: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None) -> str:
    """The report as an HTML page; ``token_lengths`` adds a histogram of the rows' tokens."""
    pool = report.pool
    found = counts(report)
    findings = {name: number for name, number in found.items() if name != "rows"}
    figures = [histogram(f"{name} a row", values.astype(float), log=True) for name, values in lengths(pool).items()]
    if token_lengths is not None:
        figures.append(histogram("tokens a row, with its template", token_lengths.astype(float), log=True))
    parts = [
        f'<p class="quiet">{found["rows"]:,} rows ({escape(pool.dataset.form)}), sha256 {escape(pool.dataset.sha256[:16])}. '
        "Nothing was changed or dropped. Row numbers are those of the file, from 1.</p>",
        heading("What was found", "Rows concerned. Of copies and near copies, those beyond the first of each group."),
        bars(findings, [name for name, number in findings.items() if number]),
        heading("Lengths", "On a logarithmic axis."),
        charts(figures),
        *_contamination(report),
        *_defects(report),
        *_copies(report),
        *_conflicts(report),
    ]
    return document(f"Data quality: {pool.path}", parts)


def _contamination(report: QualityReport) -> list[str]:
    parts = []
    for path, leaks in report.leaks.items():
        test = report.tests[path]
        hit = len({leak.test_row for leak in leaks})
        note = (
            f"{len(leaks):,} rows give away {hit:,} of {len(test.examples):,} test rows. Each is shown with the test row "
            "and the words they share, strictest kind first."
        )
        parts.append(heading(f"Contamination by {path}", note))
        for label, group in itertools.groupby(sorted(leaks, key=_strictness), key=lambda leak: leak.label):
            members = list(group)
            parts.append(f"<h3>{escape(label)}: {len(members):,} rows</h3>")
            rows = [_leak_row(report.pool, test, leak) for leak in members[:NUM_SHOWN]]
            parts.append(table(("row", "training row", "test row", "its text", "share"), rows, excerpts=True))
            parts.append(_more(len(members)))
    return parts


def _strictness(leak: Leak) -> tuple[bool, int, int]:
    return leak.masked, KINDS.index(leak.kind), leak.row


def _leak_row(pool: Pool, test: Pool, leak: Leak) -> tuple[Cell, ...]:
    text = f"{prompt_text(pool.examples[leak.row])}\n{answer_text(pool.examples[leak.row])}"
    start, end = character_span(text, leak.start, leak.length)
    partner = test.examples[leak.test_row]
    return pool.row(leak.row), marked(text, start, end), test.row(leak.test_row), excerpt(prompt_text(partner)), leak.share


def _defects(report: QualityReport) -> list[str]:
    parts = [heading("Defects", "Single answers that break a rule, with the evidence.")]
    by_kind: dict[str, list[tuple[Cell, ...]]] = {}
    for defect in report.defects:
        example = report.pool.examples[defect.row]
        row = (report.pool.row(defect.row), defect.evidence, excerpt(prompt_text(example)), excerpt(answer_text(example)))
        by_kind.setdefault(defect.kind, []).append(row)
    for kind, rows in by_kind.items():
        parts.append(f"<h3>{escape(kind)}: {len(rows):,} rows</h3>")
        parts.append(table(("row", "evidence", "prompt", "answer"), rows[:NUM_SHOWN], excerpts=True) + _more(len(rows)))
    return parts if by_kind else [*parts, "<p>None.</p>"]


def _copies(report: QualityReport) -> list[str]:
    pool = report.pool
    exact = [
        (len(group), _rows(pool, group), excerpt(prompt_text(pool.examples[group[0]])))
        for group in sorted(report.copies, key=len, reverse=True)[:NUM_SHOWN]
    ]
    near = [
        (len(c.rows), round(c.least, 3), _rows(pool, c.rows), _first_two(pool, c.rows))
        for c in sorted(report.clusters, key=lambda c: -len(c.rows))[:NUM_SHOWN]
    ]
    note = f"Word shingles in common, Jaccard similarity at least {report.near}, and the least one inside each cluster."
    parts = [heading("Exact copies", "The same words, whatever the punctuation and the case.")]
    parts.append(table(("size", "rows", "prompt"), exact, excerpts=True) if exact else "<p>None.</p>")
    parts.append(heading("Near copies", note + " A near B and B near C join all three."))
    parts.append(table(("size", "least", "rows", "first two"), near, excerpts=True) if near else "<p>None.</p>")
    return parts


def _first_two(pool: Pool, rows: tuple[int, ...]) -> Markup:
    texts = [f"{prompt_text(pool.examples[i])} → {answer_text(pool.examples[i])}" for i in rows[:2]]
    return Markup("<br>".join(escape(excerpt(text)) for text in texts))


def _conflicts(report: QualityReport) -> list[str]:
    pool = report.pool
    title = "Label conflicts" if report.has_labels else "The same prompt, different answers"
    note = "Listed, never dropped: only you know which answer is right, or whether both are."
    rows = [
        (c.answers, _rows(pool, c.rows), excerpt(prompt_text(pool.examples[c.rows[0]])), _answers(pool, c.rows))
        for c in sorted(report.conflicts, key=lambda c: -c.answers)[:NUM_SHOWN]
    ]
    shown = table(("answers", "rows", "prompt", "some answers"), rows, excerpts=True) if rows else "<p>None.</p>"
    return [heading(title, note), shown + _more(len(report.conflicts))]


def _answers(pool: Pool, rows: tuple[int, ...]) -> Markup:
    different = list(dict.fromkeys(answer_text(pool.examples[i]) for i in rows))
    return Markup("<br>".join(escape(excerpt(text, 100)) for text in different[:3]))


def _rows(pool: Pool, rows: tuple[int, ...]) -> str:
    return ", ".join(str(pool.row(i)) for i in rows[:6]) + (", …" if len(rows) > 6 else "")


def _more(number: int) -> str:
    return f'<p class="quiet">{number - NUM_SHOWN:,} more in the JSON report.</p>' if number > NUM_SHOWN else ""


def render(report: QualityReport) -> str:
    """The report as lines for a terminal."""
    pool = report.pool
    lines = [visible(pool.path), *(f"  {visible(note)}" for note in pool.dataset.notes), ""]
    for name, number in counts(report).items():
        lines.append(f"{name:<32}{number:>9,}{_some(report, name)}")
    lines.append("")
    for name, values in lengths(pool).items():
        shown = "  ".join(f"{key} {value:,.0f}" for key, value in quantiles(values).items() if isinstance(value, float))
        lines.append(f"{name:<32}{shown}")
    for path, leaks in report.leaks.items():
        lines += ["", *_leak_lines(report, path, leaks)]
    return "\n".join(lines)


def _some(report: QualityReport, name: str) -> str:
    """The first rows that a count is made of."""
    pool = report.pool
    rows = {
        "copies": [row for group in report.copies for row in group[1:]],
        "near copies": [row for cluster in report.clusters for row in cluster.rows[1:]],
        "same prompt, different answers": [row for conflict in report.conflicts for row in conflict.rows],
        "contaminated": sorted({leak.row for leaks in report.leaks.values() for leak in leaks}),
    }.get(name, [defect.row for defect in report.defects if defect.kind == name])
    return f"   row {_rows(pool, tuple(rows))}" if rows and name != "rows" else ""


def _leak_lines(report: QualityReport, path: str, leaks: list[Leak]) -> list[str]:
    test = report.tests[path]
    hit = len({leak.test_row for leak in leaks})
    lines = [f"{visible(path)}: {len(leaks):,} rows give away {hit:,} of {len(test.examples):,} test rows"]
    for leak in sorted(leaks, key=_strictness)[:5]:
        lines.append(f"  row {report.pool.row(leak.row)} and test row {test.row(leak.test_row)} ({leak.label})")
        lines.append(f"    {excerpt(prompt_text(report.pool.examples[leak.row]), 110)}")
        lines.append(f"    {excerpt(prompt_text(test.examples[leak.test_row]), 110)}")
    return lines
