"""Several metrics from one pass: answers that were written once are judged by as many metrics as one likes, with intervals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.evaluation.label_metrics import confusion_codes, label_scores, table_of
from minisft.evaluation.metrics import exact_match, is_json, json_match, token_f1
from minisft.evaluation.results import EvalResult, RowResult
from minisft.evaluation.statistics import Interval, bootstrap_mean, bootstrap_metric, wilson_interval
from minisft.evaluation.text_metrics import bleu, chrf, rouge

BY_ROW: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "json": json_match, "f1": token_f1}
TEXT_METRICS = (*BY_ROW, "label", "bleu", "chrf", "rouge")
SHARES = ("exact_match", "json", "choice", "label")
MAX_LABELS, LABEL_DRAWS = 1_000, 500


def rescore(
    result: EvalResult,
    metric: str,
    *,
    labels: Sequence[str] = (),
    clusters: Sequence[Hashable] | None = None,
    bleu_tokenize: str = "13a",
    normalize: str = "none",
) -> EvalResult:
    """Judge answers by another metric.

    Args:
        result: of any metric that lets the model answer.
        metric: one of ``TEXT_METRICS``.
        labels: for label: the label set; the references' own by default.
        clusters: of each row, for intervals.
        bleu_tokenize: for bleu.
        normalize: for exact_match, ``none`` or ``squad``: lower case, no punctuation, no articles; the result says which.

    Returns:
        the result; ``score`` is accuracy for label, BLEU or chrF / 100 of the corpus, mean ROUGE-L F for rouge.

    Raises:
        UserError: references that are empty, no labels or not JSON; a library that is missing.
    """
    _require_references(result)
    if metric == "label":
        return _label(result, labels, clusters)
    if metric in ("bleu", "chrf"):
        return _corpus(result, metric, clusters, bleu_tokenize)
    if metric == "rouge":
        return _rouge(result, clusters)
    compare, extra = BY_ROW[metric], dict(result.extra)
    if metric == "exact_match":
        compare, extra["normalize"] = functools.partial(exact_match, normalize=normalize), normalize
    rows = [replace(row, score=compare(row.prediction, row.reference)) for row in result.rows]
    if metric == "json":
        _require_json(rows)
    return with_interval(_result(metric, rows, extra), clusters)


def with_interval(result: EvalResult, clusters: Sequence[Hashable] | None = None) -> EvalResult:
    """The same with ``interval_95``: Wilson's for shares, the bootstrap's for other means and for clustered rows."""
    scores = [row.score for row in result.rows]
    if result.metric == "loss":  # a mean over tokens, not over rows
        return result
    if clusters is None and result.metric in SHARES:
        interval = wilson_interval(sum(scores), len(scores))
    else:
        interval = bootstrap_mean(scores, clusters)
    more: dict[str, JSON] = {} if clusters is None else {"clusters": len(set(clusters))}
    return replace(result, extra={**result.extra, "interval_95": [interval.low, interval.high], **more})


def _result(metric: str, rows: list[RowResult], extra: dict[str, JSON]) -> EvalResult:
    kept = {name: value for name, value in extra.items() if name not in ("interval_95", "unparsable")}
    if metric == "json":
        kept["unparsable"] = sum(not is_json(row.prediction) for row in rows)
    return EvalResult(sum(row.score for row in rows) / len(rows), len(rows), metric, kept, rows)


def _require_references(result: EvalResult) -> None:
    empty = next((row.row for row in result.rows if not row.reference.strip()), None)
    if empty is not None:
        what = "a reference is empty, so nothing can be compared with it"
        raise UserError("data/empty-reference", what, where=f"row {empty}", fix="add the answer, or drop the row")


def _require_json(rows: Sequence[RowResult]) -> None:
    bad = next((row for row in rows if not is_json(row.reference)), None)
    if bad is not None:
        what, fix = "the answer in the file is not JSON, so nothing can equal it", "use --metric exact_match or f1"
        found = visible(bad.reference, 40)
        raise UserError("data/reference-not-json", what, where=f"row {bad.row}", found=found, fix=fix)


def _label(result: EvalResult, labels: Sequence[str], clusters: Sequence[Hashable] | None) -> EvalResult:
    names = sorted({label.strip() for label in labels} or {row.reference.strip() for row in result.rows})
    unseen = sorted({row.reference.strip() for row in result.rows} - set(names))
    if unseen or len(names) < 2 or len(names) > MAX_LABELS:
        found = listing(unseen) if unseen else f"{len(names)} labels"
        expected, fix = f"2 to {MAX_LABELS} labels, every reference among them", "use --metric exact_match for free text"
        raise UserError("data/bad-labels", "the references are no label set", found=found, expected=expected, fix=fix)
    codes = confusion_codes([r.reference for r in result.rows], [r.prediction for r in result.rows], names)
    scores = label_scores(table_of(codes, len(names)), names)

    def value(name: str) -> Interval:
        def of(chosen: npt.NDArray[np.intp]) -> float:
            return float(getattr(label_scores(table_of(codes[chosen], len(names)), names), name))

        return bootstrap_metric(of, len(codes), clusters, draws=LABEL_DRAWS)

    intervals: dict[str, JSON] = {f"{name}_interval_95": [i.low, i.high] for name in ("macro_f1", "mcc") for i in [value(name)]}
    rows = [replace(row, score=float(row.prediction.strip() == row.reference.strip())) for row in result.rows]
    return with_interval(_result("label", rows, {**result.extra, **scores.to_json(), **intervals}), clusters)


def _corpus(result: EvalResult, metric: str, clusters: Sequence[Hashable] | None, tokenize: str) -> EvalResult:
    texts = [row.prediction for row in result.rows], [row.reference for row in result.rows]
    score = bleu(*texts, tokenize, clusters) if metric == "bleu" else chrf(*texts, clusters)
    rows = [replace(row, score=value / 100) for row, value in zip(result.rows, score.rows, strict=True)]
    i = score.interval
    extra: dict[str, JSON] = {"signature": score.signature, "interval_95": [i.low / 100, i.high / 100]}
    extra |= {"corpus_score": i.estimate, "row_scores": "of each row by itself: their mean is not the corpus score"}
    if score.warnings:
        extra["warnings"] = list(score.warnings)
    made = _result(metric, rows, result.extra)
    return replace(made, score=i.estimate / 100, extra={**made.extra, **extra})


def _rouge(result: EvalResult, clusters: Sequence[Hashable] | None) -> EvalResult:
    scores = rouge([row.prediction for row in result.rows], [row.reference for row in result.rows])
    rows = [replace(row, score=value) for row, value in zip(result.rows, scores["rougeL"], strict=True)]
    means: dict[str, JSON] = {name: sum(values) / len(values) for name, values in scores.items()}
    extra = {**result.extra, **means, "rouge_tokenizer": "unicode words, no stemmer"}
    return with_interval(_result("rouge", rows, extra), clusters)
