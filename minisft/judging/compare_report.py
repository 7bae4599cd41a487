"""What a comparison leaves behind: a JSON report, a page, the bad cases ready for labelling, and lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from minisft.common.atomic_files import disk_errors, staged_folder
from minisft.common.safe_json import JSON
from minisft.data.messages import Example
from minisft.judging.bad_cases import BadCase
from minisft.judging.compare_page import page
from minisft.judging.comparison import Comparison, Measured
from minisft.judging.rows_file import RowId

REPORT, PAGE, BAD_CASES = "compare.json", "report.html", "bad_cases.jsonl"


def write_comparison(comparison: Comparison, out: str | Path) -> Path:
    """Write ``compare.json``, ``report.html`` and ``bad_cases.jsonl`` into a new folder, all or nothing.

    Raises:
        UserError: the folder is in use, the disk.
    """
    out = Path(out)
    with disk_errors(out.absolute().parent), staged_folder(out) as folder:
        report = json.dumps(comparison.to_json(), indent=2, ensure_ascii=False) + "\n"
        (folder / REPORT).write_text(report, encoding="utf-8")
        (folder / PAGE).write_text(page(comparison), encoding="utf-8")
        lines = [json.dumps(_case_line(case, comparison.examples), ensure_ascii=False) + "\n" for case in comparison.cases]
        (folder / BAD_CASES).write_text("".join(lines), encoding="utf-8")
    return out


def _case_line(case: BadCase, examples: Mapping[RowId, Example] | None) -> dict[str, JSON]:
    """A row in the messages form, when the prompt is known, with the right answer as its last turn."""
    line: dict[str, JSON] = {}
    if examples is not None:
        line["messages"] = [{"role": m.role, "content": m.content} for m in examples[case.row].messages]
    return line | {
        "row": case.row, "kind": case.kind, "error": case.error, "reference": case.reference,
        "base_prediction": case.before, "prediction": case.after, "cluster": case.cluster,
    }  # fmt: skip


def summary(comparison: Comparison) -> str:
    """What the terminal shows: what could be found, what was found, the verdict."""
    lines = [line for m in comparison.measured for line in _measured_lines(m)]
    lines += [f"gate {result}" for result in comparison.gates]
    return "\n".join([*lines, comparison.verdict])


def _measured_lines(m: Measured) -> list[str]:
    r, t, kept = m.result, m.result.table, m.result.non_inferiority
    p = "too few rows for a test" if r.p_value is None else f"p {r.p_value:.4g}"
    if r.mcnemar is not None:
        p += f" (McNemar exact {r.mcnemar.exact:.4g}; mid-p {r.mcnemar.mid_p:.4g})"
    counts = ""
    if t is not None:
        counts = f"  fixed {t['only_b']}, broken {t['only_a']}, both right {t['both']}, both wrong {t['neither']}"
    shown = "shown" if kept.shown else "not shown"
    return [
        f"{m.name}: {r.n} rows; a true difference of {r.detectable:.4f} would be found with 80 %",
        f"  base {m.sign * r.mean_a:.4f}, tuned {m.sign * r.mean_b:.4f}; gain {r.difference}, {p}",
        *filter(None, [counts]),
        f"  nothing lost within {kept.margin:g}: {shown} (lower bound {kept.lower_bound:+.4f})",
    ]
