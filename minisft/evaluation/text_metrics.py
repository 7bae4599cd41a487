"""BLEU, chrF and ROUGE through the libraries that define them, with the conventions that change the numbers written down.

BLEU and chrF are metrics of a corpus, not means over rows; their signature says how they were computed. ROUGE gets a
tokenizer that keeps letters of every script: the library's own keeps a-z and digits, and gives 0 to identical Chinese texts.
The libraries are the extra ``metrics``.

Ref: Post 2018, arXiv:1804.08771 (sacrebleu); Lin 2004 (ROUGE); Popovic 2015 (chrF).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minisft.common.extras import require_extra
from minisft.evaluation.statistics import Interval, bootstrap_metric

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as CorpusMetric

BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
FEW_ROWS, FEW_WORDS = 100, 4
DRAWS = 500


@dataclass(frozen=True)
class CorpusScore:
    """A corpus metric in [0, 100], the score of each row by itself, how it was computed, and what to be careful about."""

    interval: Interval
    rows: tuple[float, ...]
    signature: str
    warnings: tuple[str, ...]


def bleu(
    predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a", clusters: Sequence[Hashable] | None = None
) -> CorpusScore:
    """Corpus BLEU with one reference a row.

    Args:
        predictions: the answers.
        references: the right ones.
        tokenize: sacrebleu's tokenizer: 13a, or zh, char, intl for texts that have no spaces between words.
        clusters: of each row, for the interval.

    Returns:
        the score; its interval resamples rows.
    """
    require_extra("metrics", "sacrebleu")
    from sacrebleu.metrics.bleu import BLEU

    sentence = BLEU(tokenize=tokenize, effective_order=True)
    rows = tuple(float(sentence.sentence_score(p, [r]).score) for p, r in zip(predictions, references, strict=True))
    return _corpus(BLEU(tokenize=tokenize), predictions, references, rows, clusters, _bleu_warnings(references))


def chrf(predictions: Sequence[str], references: Sequence[str], clusters: Sequence[Hashable] | None = None) -> CorpusScore:
    """Corpus chrF with one reference a row.

    Args:
        predictions: the answers.
        references: the right ones.
        clusters: of each row, for the interval.

    Returns:
        the score; its interval resamples rows.
    """
    require_extra("metrics", "sacrebleu")
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    rows = tuple(float(metric.sentence_score(p, [r]).score) for p, r in zip(predictions, references, strict=True))
    return _corpus(metric, predictions, references, rows, clusters, ())


def _corpus(
    metric: CorpusMetric,
    predictions: Sequence[str],
    references: Sequence[str],
    rows: tuple[float, ...],
    clusters: Sequence[Hashable] | None,
    warnings: tuple[str, ...],
) -> CorpusScore:
    """The corpus score, bootstrapped over its sufficient statistics: n-gram counts are summed once a row, not once a draw."""
    statistics = np.array(metric._extract_corpus_statistics(predictions, [references]), dtype=np.float64)

    def score(chosen: npt.NDArray[np.intp]) -> float:
        return float(metric._compute_score_from_stats(statistics[chosen].sum(0).tolist()).score)

    interval = bootstrap_metric(score, len(rows), clusters, draws=DRAWS)
    return CorpusScore(interval, rows, str(metric.get_signature()), warnings)


def _bleu_warnings(references: Sequence[str]) -> tuple[str, ...]:
    words = sorted(len(reference.split()) for reference in references)
    if len(words) >= FEW_ROWS and words[len(words) // 2] >= FEW_WORDS:
        return ()
    what = f"{len(words)} rows, median {words[len(words) // 2]} words"
    return (f"BLEU counts runs of four words and says little on {what}: look at chrF",)


class UnicodeTokenizer:
    """Lower-case runs of letters and digits of any script; scripts without spaces are cut into characters."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return re.findall(
            r"[\u2e80-\u9fff\uac00-\ud7af\u3040-\u30ff\U00020000-\U0003ffff]|[^\W_\u2e80-\u9fff\uac00-\ud7af]+", text.lower()
        )


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F of ROUGE-1, -2, -L and -Lsum for each row, in [0, 1], without a stemmer."""
    require_extra("metrics", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=False, tokenizer=UnicodeTokenizer())
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: [float(score[name].fmeasure) for score in scores] for name in ROUGE_TYPES}
