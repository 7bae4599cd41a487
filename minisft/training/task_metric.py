"""A run's validation by task: on the first rows held out the model answers, and a metric of ``minisft eval`` judges.

The number that is logged is the one that ``minisft eval`` gives for the checkpoint on the same rows. Answers are greedy, so
nothing is drawn, and a resumed run finds the same numbers. Whatever would stop the scoring (rows without an answer, a missing
library) is found before step 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minisft.common.errors import UserError, visible
from minisft.config import RunConfig
from minisft.data.examples import Example
from minisft.data.messages import read_dataset
from minisft.data.mixture import read_sources
from minisft.data.sources import parse_sources
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.evaluate import Scorer
from minisft.evaluation.multiple_choice import make_question
from minisft.evaluation.references import rendered_reference
from minisft.evaluation.rescore import TEXT_METRICS, rescore
from minisft.evaluation.results import EvalResult, RowResult
from minisft.evaluation.several import evaluate_all
from minisft.model import CausalLM

ROWS, NEW_TOKENS = 100, 256  # by default; the second as for ``minisft eval``
LOWER_IS_BETTER = ("loss", "bits_per_byte")


@dataclass(frozen=True)
class TaskMetric:
    """What is scored, and how.

    Attributes:
        metric: one of ``EVAL_METRICS``.
        examples: all rows held out; the labels of ``label`` and ``choice`` come from all of them.
        limit: the first so many of them are scored.
        max_new_tokens: longest answer.
        tokenizer, template: the run's.
    """

    metric: str
    examples: tuple[Example, ...]
    limit: int
    max_new_tokens: int
    tokenizer: Tokenizer
    template: ChatTemplate

    @property
    def key(self) -> str:
        """Its name in ``metrics.jsonl``; the loss of single rows is not the run's own ``eval_loss``."""
        return f"eval_task_{self.metric}" if self.metric == "loss" else f"eval_{self.metric}"

    def score(self, model: CausalLM) -> float:
        """The model's score, as ``minisft eval`` computes it; adapters take part, dropout does not."""
        return evaluate_all(
            model, self.tokenizer, self.template, self.examples, [self.metric],
            max_new_tokens=self.max_new_tokens, limit=self.limit,
        )[self.metric].score  # fmt: skip

    def is_better(self, score: float, best: float) -> bool:
        """Whether ``score`` beats ``best``: less is better for losses, more for everything else."""
        return score < best if self.metric in LOWER_IS_BETTER else score > best

    def words(self, score: float | None) -> str:
        """A score in a few words."""
        return f"{self.metric} {score:.4f} on {min(self.limit, len(self.examples))} rows"

    def check(self, model: CausalLM) -> None:
        """Encode the rows and score their right answers: what is wrong with them, or missing here, shows before step 1.

        Raises:
            UserError: a row without an answer at its end, too long for ``model``, or whose answer the metric cannot judge; a
                missing library.
        """
        chosen, labels = self.examples[: self.limit], sorted({example.messages[-1].content for example in self.examples})
        scorer = Scorer(model, self.tokenizer, self.template, self.max_new_tokens, 1, None)
        for example in chosen:
            if len(example.messages) < 2 or example.messages[-1].role != "assistant":
                raise UserError(
                    "data/no-reference", "a row held out has no answer to compare with", where=example.place,
                    found=f"roles {visible([m.role for m in example.messages])}", expected="an assistant turn at the end",
                    fix="give rows with answers as --eval-data, or leave --eval-metric away",
                )  # fmt: skip
            if self.metric == "choice":
                make_question(example, labels, scorer.encode)
            elif self.metric in TEXT_METRICS:
                scorer.encode(example, example.messages[:-1], open_ended=True)
        if self.metric in TEXT_METRICS:
            texts = [rendered_reference(self.tokenizer, self.template, example).text for example in chosen]
            rows = [RowResult(e.row, text, text, 1.0, {"stopped": True}) for e, text in zip(chosen, texts, strict=True)]
            rescore(EvalResult(1.0, len(rows), "exact_match", {}, rows), self.metric, labels=labels)


def read_task(
    run: RunConfig, model: CausalLM, tokenizer: Tokenizer, template: ChatTemplate, rows: Sequence[int]
) -> TaskMetric | None:
    """The validation by task that a run asked for.

    The rows are read again as text: what a run keeps of them, in its memory and in the cache, is their tokens.

    Args:
        run: the settings.
        model: the run's.
        tokenizer: the model's.
        template: the run's chat template.
        rows: the numbers of the rows held out, in order.

    Returns:
        What to score; None without ``eval_metric``.

    Raises:
        UserError: nothing is held out; what ``TaskMetric.check`` finds.
    """
    if run.eval_metric is None:
        return None
    if not rows:
        raise UserError(
            "config/no-validation", "no row is held out to validate on", where="--eval-metric", found="0 rows",
            expected="rows with answers", fix="give --eval-data F or a larger --validation-share, or leave --eval-metric away",
        )  # fmt: skip
    dataset = read_dataset(run.eval_data, run.map) if run.eval_data else read_sources(parse_sources(run.data), run.map)[0]
    by_row = {example.row: example for example in dataset.examples}
    task = TaskMetric(
        run.eval_metric, tuple(by_row[row] for row in rows), run.eval_rows or ROWS, run.eval_new_tokens or NEW_TOKENS,
        tokenizer, template,
    )  # fmt: skip
    task.check(model)
    return task
