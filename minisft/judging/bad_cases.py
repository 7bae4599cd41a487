"""Rows on which a model is wrong: what kind of error it is, which rows became wrong, and what they have in common.

An error's class comes from rules that read the two texts, in a fixed order, so that the same answer always has the same class.
Regressions, which the base had right, come before errors that both make.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from minisft.common import safe_json
from minisft.common.errors import visible
from minisft.common.safe_json import JSON
from minisft.data.messages import Example
from minisft.evaluation.metrics import json_equal
from minisft.evaluation.statistics import Floats
from minisft.judging.rows_file import RowId, RowsFile, ScoredRow
from minisft.judging.words import WordVectors, clusters_of, nearest, over_represented

_REFUSAL = re.compile(r"\b(i('m| am) sorry|i (cannot|can't|am unable to|am not able to)|as an ai)\b", re.I)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
MAX_JUDGED = 20_000  # characters of a text that the rules read
RIGHT = 0.5  # of a graded score; a score of 0 or 1 is right at 1
MIN_TO_CLUSTER, ROWS_A_CLUSTER, MAX_CLUSTERS = 20, 15, 8
NEIGHBOURS = 3


@dataclass(frozen=True)
class BadCase:
    """A row that the second model has wrong: ``kind`` is regression or shared, ``loss`` orders, ``near`` are training rows."""

    row: RowId
    kind: str
    error: str
    loss: float
    prompt: str | None
    reference: str
    before: str
    after: str
    cluster: int | None = None
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """Wrong rows that share words: how many, how many of them regressions, and the words."""

    size: int
    regressions: int
    words: tuple[tuple[str, float], ...]


def is_right(row: ScoredRow) -> bool:
    """Whether a score of at most 1 counts as a right answer."""
    return row.score >= RIGHT


def error_class(prediction: str, reference: str, prompt: str = "", extra: Mapping[str, JSON] | None = None) -> str:
    """What is wrong with an answer, by the first rule that fits.

    Args:
        prediction: the answer.
        reference: the right one.
        prompt: the last user turn, where it is known.
        extra: the row's other columns; ``stopped`` is read.

    Returns:
        a class, with the field's or the labels' names where there are any.
    """
    said, right = prediction[:MAX_JUDGED].strip(), reference[:MAX_JUDGED].strip()
    if not said:
        return "empty"
    if _is_loop(said):
        return "loop"
    if extra is not None and extra.get("stopped") is False:
        return "not stopped"
    if right[:1] in ("{", "["):
        return _json_error(said, right)
    if _REFUSAL.search(said) and not _REFUSAL.search(right):
        return "refusal"
    if len(said) > 15 and said in prompt[:MAX_JUDGED] and said not in right:
        return "copied prompt"
    if _script(said) != _script(right):
        return "other language"
    if _NUMBER.sub("#", said) == _NUMBER.sub("#", right):
        return "number wrong, text right"
    if _is_label(said) and _is_label(right):
        return f"label {visible(right, 40)} -> {visible(said, 40)}"
    return "other text"


def _is_label(text: str) -> bool:
    return len(text) <= 60 and len(text.split()) <= 5 and "\n" not in text


def _is_loop(text: str) -> bool:
    """The last words stand three times in a row, or one character thirty times."""
    words = text.split()
    for size in range(1, min(40, len(words) // 3) + 1):
        tail = words[-size:]
        if len(" ".join(tail)) * 3 >= 12 and words[-2 * size : -size] == tail == words[-3 * size : -2 * size]:
            return True
    return re.search(r"(\S{1,8}?)\1{14,}$", text[-200:]) is not None


def _script(text: str) -> str:
    """The alphabet of most letters: LATIN, CJK, CYRILLIC ...; empty without letters."""
    letters = [c for c in text[:500] if c.isalpha()]
    scripts = Counter(unicodedata.name(c, "?").split(" ")[0] for c in letters)
    return scripts.most_common(1)[0][0] if scripts else ""


def _json_error(said: str, right: str) -> str:
    try:
        wanted = safe_json.loads(right)
    except ValueError:
        return "other text"
    try:
        given = safe_json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", said))
    except ValueError:
        return "invalid JSON"
    if not isinstance(wanted, dict) or not isinstance(given, dict):
        return "other JSON"
    for key in wanted:
        if key not in given:
            return f"field {visible(key, 40)} missing"
    wrong = [key for key in wanted if not json_equal(given[key], wanted[key])]
    if wrong:
        return f"field {visible(wrong[0], 40)} wrong" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
    surplus = [key for key in given if key not in wanted]
    return f"extra field {visible(surplus[0], 40)}" if surplus else "other JSON"


# --- which rows


def find_bad_cases(a: RowsFile, b: RowsFile, examples: Mapping[RowId, Example] | None = None) -> list[BadCase]:
    """Rows that B has wrong, regressions first, those that lost most first.

    For a metric without right and wrong (a loss) these are the rows that became worse.

    Args:
        a: base, comparable with ``b``.
        b: tuned.
        examples: the prompts by row, where they are known.

    Returns:
        the cases, without clusters.
    """
    cases = []
    for number, after in b.rows.items():
        before = a.rows[number]
        gain = b.sign * (after.score - before.score)
        if b.sign < 0:
            kind = "regression" if gain < 0 else ""
        elif is_right(after):
            kind = ""
        else:
            kind = "regression" if is_right(before) else "shared"
        if kind:
            prompt = prompt_of(examples[number]) if examples else None
            error = error_class(after.prediction, after.reference, prompt or "", after.extra) if b.sign > 0 else "higher loss"
            loss = _margin(before) - _margin(after) or -gain
            cases.append(BadCase(number, kind, error, loss, prompt, after.reference, before.prediction, after.prediction))
    return sorted(cases, key=lambda case: (case.kind != "regression", -case.loss, str(case.row)))


def prompt_of(example: Example) -> str:
    """The last user turn."""
    return next((m.content for m in reversed(example.messages[:-1]) if m.role == "user"), "")


def _margin(row: ScoredRow) -> float:
    """log p(reference) - log p(prediction): 0 for a right choice, or where no log-probability was written."""
    reference, prediction = row.extra.get("log_prob_reference"), row.extra.get("log_prob")
    if isinstance(reference, (int, float)) and isinstance(prediction, (int, float)):
        return float(reference) - float(prediction)
    return 0.0


def confusions(rows: Sequence[ScoredRow], count: int = 10) -> list[dict[str, JSON]]:
    """Pairs (right label, wrong label) by how much oftener they occur than their labels' frequencies explain."""
    wrong = [(row.reference.strip(), row.prediction.strip()) for row in rows if not is_right(row)]
    wrong = [pair for pair in wrong if all(map(_is_label, pair))]
    pairs, rights, saids = Counter(wrong), Counter(r for r, _ in wrong), Counter(s for _, s in wrong)
    expected = {(r, s): rights[r] * saids[s] / len(wrong) for r, s in pairs}
    order = sorted(pairs, key=lambda pair: (pairs[pair] < 2, -pairs[pair] / expected[pair], pair))  # a single one is no pattern
    return [{"reference": r, "prediction": s, "count": pairs[r, s], "expected": expected[r, s]} for r, s in order[:count]]


# --- what they have in common


def cluster_cases(cases: Sequence[BadCase], others: Sequence[str], seed: int = 0) -> tuple[list[BadCase], list[Cluster]]:
    """Group cases by the words of their prompts, each group named by the words that it has more often than all other rows.

    Args:
        cases: at least 20, or there are no clusters.
        others: prompts of the rows that are right.
        seed: of k-means.

    Returns:
        the cases with their cluster's number, and the clusters, the largest first.
    """
    texts = [case.prompt if case.prompt is not None else case.reference for case in cases]
    if len(cases) < MIN_TO_CLUSTER:
        return list(cases), []
    count = min(MAX_CLUSTERS, max(2, len(cases) // ROWS_A_CLUSTER))
    numbers = clusters_of(WordVectors(texts).vectors, count, seed)
    clusters = []
    for k in range(max(numbers) + 1):
        inside = [i for i, number in enumerate(numbers) if number == k]
        outside = [text for text, number in zip(texts, numbers, strict=True) if number != k]
        words = over_represented([texts[i] for i in inside], [*outside, *others])
        clusters.append(Cluster(len(inside), sum(cases[i].kind == "regression" for i in inside), tuple(words)))
    return [replace(case, cluster=number) for case, number in zip(cases, numbers, strict=True)], clusters


def with_neighbours(
    cases: Sequence[BadCase], training: Sequence[Example], limit: int, vectors: tuple[Floats, Floats] | None = None
) -> list[BadCase]:
    """The first ``limit`` cases with their three nearest training rows, as "row N: answer".

    Args:
        cases: with prompts.
        training: examples that the model was trained on.
        limit: how many cases.
        vectors: unit vectors of those cases and of the training rows; of their words by default.

    Returns:
        all cases, in their order.
    """
    if vectors is None:
        words = WordVectors([prompt_of(example) for example in training])
        vectors = words.of([case.prompt or "" for case in cases[:limit]]), words.vectors
    chosen = nearest(*vectors, NEIGHBOURS)
    found = []
    for case, rows in zip(cases, chosen, strict=False):
        near = tuple(f"row {training[i].row}: {training[i].messages[-1].content[:120]}" for i in rows)
        found.append(replace(case, near=near))
    return [*found, *cases[limit:]]
