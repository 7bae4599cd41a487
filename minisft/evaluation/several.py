"""Several metrics from one pass over the rows: the model answers once, whatever is judged on the answers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import cast, get_args

from minisft.common.errors import UserError, nearest, visible
from minisft.data.examples import Example
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.evaluate import evaluate
from minisft.evaluation.metrics import NORMALIZATIONS, Metric
from minisft.evaluation.rescore import TEXT_METRICS, rescore, with_interval
from minisft.evaluation.results import EvalResult, Progress
from minisft.evaluation.text_metrics import BLEU_TOKENIZERS
from minisft.model import CausalLM

ALL_METRICS = (*TEXT_METRICS, "choice", "loss", "bits_per_byte")


def evaluate_all(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    examples: Sequence[Example],
    metrics: Sequence[str],
    *,
    clusters: Sequence[Hashable] | None = None,
    bleu_tokenize: str = "13a",
    normalize: str = "none",
    max_new_tokens: int = 128,
    limit: int | None = None,
    batch_size: int = 16,
    system: str | None = None,
    progress: Progress | None = None,
) -> dict[str, EvalResult]:
    """Score ``model`` by each of ``metrics``.

    Args:
        model: the model; adapters take part.
        tokenizer: its tokenizer.
        template: its chat template.
        examples: rows, each with an assistant turn at its end.
        metrics: of ``ALL_METRICS``; those on texts share one pass.
        clusters: of each example, for intervals.
        bleu_tokenize: sacrebleu's tokenizer.
        normalize: what exact_match compares, ``none`` or ``squad``.
        max_new_tokens: longest answer.
        limit: only so many rows; the label set of ``label`` comes from all of them.
        batch_size: rows computed at once.
        system: put before rows that have no system turn.
        progress: called with (rows done, rows in all), in every pass.

    Returns:
        results by metric, in the order asked for, each with its interval.

    Raises:
        UserError: an unknown metric, rows that cannot be scored, a missing library.
    """
    _check(metrics, bleu_tokenize, normalize)
    labels = [example.messages[-1].content for example in examples if example.messages]
    grouped = None if clusters is None else list(clusters)[:limit]
    answered: EvalResult | None = None
    found: dict[str, EvalResult] = {}
    for metric in dict.fromkeys(metrics):
        first = cast(Metric, {"bits_per_byte": "loss"}.get(metric, metric if metric in get_args(Metric) else "exact_match"))
        if metric in TEXT_METRICS and answered is not None:
            found[metric] = rescore(
                answered, metric, labels=labels, clusters=grouped, bleu_tokenize=bleu_tokenize, normalize=normalize
            )
            continue
        result = evaluate(
            model, tokenizer, template, examples, first, max_new_tokens=max_new_tokens, limit=limit,
            batch_size=batch_size, system=system, progress=progress,
        )  # fmt: skip
        kept = None if grouped is None else _of_rows(result, examples, grouped)
        if metric not in TEXT_METRICS:
            found[metric] = with_interval(_in_bits(result, examples) if metric == "bits_per_byte" else result, kept)
            continue
        answered, grouped = result, kept
        found[metric] = rescore(result, metric, labels=labels, clusters=kept, bleu_tokenize=bleu_tokenize, normalize=normalize)
    return found


def _in_bits(loss: EvalResult, examples: Sequence[Example]) -> EvalResult:
    """Losses as bits per byte of what was trained: sum of nats / (ln 2 x UTF-8 bytes), the ends of turns in the nats only."""
    by_row = {example.row: example for example in examples}
    rows = []
    for row in loss.rows:
        turns = [m for m in by_row[row.row].messages if m.role == "assistant" and m.train]
        num_bytes, tokens = sum(len(m.content.encode()) for m in turns), int(str(row.extra["tokens"]))
        bits, kept = row.score * tokens / math.log(2), {"prompt_sha256": row.extra["prompt_sha256"]}
        rows.append(replace(row, score=bits / max(1, num_bytes), extra={**kept, "bytes": num_bytes, "num_tokens": tokens}))
    return EvalResult(sum(row.score for row in rows) / len(rows), len(rows), "bits_per_byte", {}, rows)


def _of_rows(result: EvalResult, examples: Sequence[Example], clusters: Sequence[Hashable]) -> list[Hashable]:
    """The cluster of each row that was scored: some may have been dropped."""
    if len(result.rows) == len(clusters):
        return list(clusters)
    by_row = {example.row: cluster for example, cluster in zip(examples, clusters, strict=False)}
    return [by_row[row.row] for row in result.rows]


def _check(metrics: Sequence[str], bleu_tokenize: str, normalize: str) -> None:
    for name, options, what in (
        *((metric, ALL_METRICS, "unknown metric") for metric in metrics),
        (bleu_tokenize, BLEU_TOKENIZERS, "unknown tokenizer of BLEU"),
        (normalize, NORMALIZATIONS, "unknown normalization"),
    ):
        if name not in options:
            fix = nearest(name, options) or f"use {options[0]}"
            raise UserError("config/bad-value", what, found=visible(name), expected=" or ".join(options), fix=fix)
