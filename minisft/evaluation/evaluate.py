"""Score a model on rows with a known answer: the last assistant turn is the reference, everything before it the prompt.

Five metrics. ``exact_match``, ``json`` and ``f1`` let the model answer greedily and compare texts; ``choice`` compares the
probabilities of fixed options, so there is nothing to parse; ``loss`` is the training loss on unseen rows. Prompts are
rendered and tokenized by the same ``encode_chat`` that training uses, and the reference is what template and tokenizer make of
the last turn, so that the answer that was trained is the answer that counts. A thinking block is taken off both sides.
Other metrics of the same answers are ``rescore``'s, and several at once ``several``'s.

The idea to take home: a score is an estimate. It comes with n, a 95 % interval and every single row, so that two models
can be compared row by row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from minisft.batching import collate
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.chat import Encoded, Turns, encode_chat, fit, stop_ids
from minisft.data.examples import Example, Message
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.metrics import THINK, exact_match, is_json, json_match, split_thinking, token_f1, wilson
from minisft.evaluation.metrics import Metric as Metric
from minisft.evaluation.multiple_choice import Question, make_question, option_log_probs
from minisft.evaluation.references import decode_answer, rendered_reference
from minisft.evaluation.results import EvalResult as EvalResult
from minisft.evaluation.results import Progress as Progress
from minisft.evaluation.results import RowResult as RowResult
from minisft.evaluation.results import prompt_sha256
from minisft.evaluation.results import terminal_progress as terminal_progress
from minisft.evaluation.results import write as write
from minisft.generation import generate, no_dropout
from minisft.loss import head_loss_sum
from minisft.model import CausalLM

OPTIONS_AT_ONCE = 256  # enough to fill the matrix units


@dataclass(frozen=True)
class Scorer:
    """What every metric needs: the model, how to turn messages into ids, how much at once, and the progress callback."""

    model: CausalLM
    tokenizer: Tokenizer
    template: ChatTemplate
    max_new_tokens: int
    batch_size: int
    progress: Progress | None

    def report(self, done: int, total: int) -> None:
        """Call the progress callback, if there is one."""
        if self.progress is not None:
            self.progress(done, total)

    def encode(
        self, example: Example, messages: Sequence[Message], *, open_ended: bool = False, turns: Turns = "last"
    ) -> Encoded:
        """``messages`` as ids.

        Args:
            example: the row, for errors.
            messages: the chat.
            open_ended: end with the generation prompt, ready for the model to answer.
            turns: the assistant turns to supervise.

        Returns:
            The tokens.

        Raises:
            UserError: it does not fit the model's context.
        """
        encoded = encode_chat(
            self.tokenizer,
            self.template,
            messages,
            turns=turns,
            add_generation_prompt=open_ended,
            row=example.row,
            where=example.place,
        )
        context = self.model.config.max_position_embeddings
        if len(encoded.input_ids) + open_ended > context:
            raise UserError(
                "data/row-too-long",
                "a row does not fit the model's context",
                where=example.place,
                found=f"{len(encoded.input_ids)} tokens",
                expected=f"at most {context}",
                fix="shorten or drop the row",
            )
        return encoded


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    examples: Sequence[Example],
    metric: Metric,
    *,
    max_new_tokens: int = 128,
    limit: int | None = None,
    batch_size: int = 16,
    system: str | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Score ``model`` on the first ``limit`` examples: what ``minisft eval`` does.

    Metrics:
        exact_match: the answer equals the reference, but for white space around it.
        json: the answer, as a whole, is a JSON document equal to the reference (keys in any order, 1 equals 1.0 but not
            true); one code fence around it is allowed, other text is not. Broken JSON counts as wrong, and as
            ``unparsable``.
        f1: harmonic mean of token precision and recall, after SQuAD's normalisation (Rajpurkar et al. 2016,
            arXiv:1606.05250).
        choice: the option with the highest log p(option, end of turn | prompt) is the reference. Options: the row's
            ``choices``, or all distinct references of ``examples``. ``score`` is lm-eval's acc (sum over the option's
            tokens); ``acc_norm`` divides by the option's characters, ``acc_bytes`` by its bytes.
        loss: mean -log p per supervised token (all assistant turns that train); ``perplexity`` is its exponential. Rows longer
            than the model's context are cut or dropped as in training, and counted.

    Args:
        model: the model, in any dtype and on any device; adapters take part.
        tokenizer: its tokenizer.
        template: its chat template, from ``minisft.data.chat.resolve_template``.
        examples: rows of ``minisft.data.messages.read_dataset``, each with an assistant turn at its end.
        metric: how answers are judged, see above.
        max_new_tokens: longest answer in tokens, where the model answers.
        limit: score only so many rows; None for all. Options of ``choice`` come from all rows.
        batch_size: rows computed at once; never changes a result (but for rounding).
        system: put before rows that have no system turn.
        progress: called with (rows done, rows in all).

    Returns:
        The mean score, its 95 % interval where it is a share of right answers, and every row. ``write`` puts it into files.

    Raises:
        UserError: no rows, a row without a reference answer or too long for the model, choices that lack the reference, a row
            that the template refuses; each names the row.
    """
    if metric not in get_args(Metric):
        options = " or ".join(get_args(Metric))
        raise UserError(
            "config/bad-value", "unknown metric", found=visible(metric), expected=options, fix="metric='exact_match'"
        )
    if limit is not None and limit < 1:
        what, fix = "a setting is out of range", "limit=None for all rows"
        raise UserError("config/bad-value", what, where="limit", found=str(limit), expected="at least 1", fix=fix)
    examples = [_with_system(_with_reference(example), system) for example in examples]
    chosen = examples[:limit]
    if not chosen:
        raise UserError("data/no-rows", "there is nothing to score", found="0 rows")
    scorer = Scorer(model, tokenizer, template, max_new_tokens, batch_size, progress)
    with no_dropout(model):
        if metric == "loss":
            return _with_prompts(_loss(scorer, chosen), chosen)
        if metric == "choice":
            return _with_prompts(_choice(scorer, chosen, _all_references(examples)), chosen)
        return _with_prompts(_answers(scorer, chosen, metric), chosen)


def _with_prompts(result: EvalResult, examples: Sequence[Example]) -> EvalResult:
    """Each row with the digest of its prompt, the system message included."""
    asked = {e.row: prompt_sha256(*(text for m in e.messages[:-1] for text in (m.role, m.content))) for e in examples}
    rows = [replace(row, extra={**row.extra, "prompt_sha256": asked[row.row]}) for row in result.rows]
    return replace(result, rows=rows)


def _with_reference(example: Example) -> Example:
    if len(example.messages) < 2 or example.messages[-1].role != "assistant":
        raise UserError(
            "data/no-reference",
            "a row has no answer to compare with",
            where=example.place,
            found=f"roles {visible([m.role for m in example.messages])}",
            expected="a prompt, then an assistant turn at the end",
            fix="add the answer, or drop the row",
        )
    return example


def _with_system(example: Example, system: str | None) -> Example:
    if system is None or example.messages[0].role == "system":
        return example
    return replace(example, messages=(Message("system", system), *example.messages))


def _reference(example: Example) -> str:
    return example.messages[-1].content


def _all_references(examples: Sequence[Example]) -> list[str]:
    return sorted({_reference(example) for example in examples})


def _by_length(encoded: Sequence[Encoded]) -> list[int]:
    """Longest first: a batch of similar lengths has little padding, and running out of memory shows at once."""
    return sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))


def _summary(metric: str, rows: list[RowResult], extra: dict[str, JSON]) -> EvalResult:
    return EvalResult(sum(row.score for row in rows) / len(rows), len(rows), metric, extra, rows)


# --- answers that are written out


def _answers(scorer: Scorer, examples: Sequence[Example], metric: str) -> EvalResult:
    """exact_match, json, f1: greedy answers, compared as text."""
    compare = {"exact_match": exact_match, "json": json_match, "f1": token_f1}[metric]
    references = [rendered_reference(scorer.tokenizer, scorer.template, example) for example in examples]
    if metric == "json":
        _require_json(examples, [reference.text for reference in references])
    prompts = [scorer.encode(example, example.messages[:-1], open_ended=True) for example in examples]
    eos_ids = stop_ids(scorer.tokenizer, scorer.template)
    is_open = scorer.template.generation_prompt.rstrip().endswith(THINK)
    rows: dict[int, RowResult] = {}
    order = _by_length(prompts)
    for start in range(0, len(order), scorer.batch_size):
        batch = order[start : start + scorer.batch_size]
        answers = _write_answers(scorer, [prompts[i].input_ids for i in batch], eos_ids)
        for i, (text, stopped) in zip(batch, answers, strict=True):
            thinking, said = split_thinking(text, is_open)
            prediction, reference = said.removeprefix(references[i].added), references[i].text
            extra: dict[str, JSON] = {"stopped": stopped, **({"thinking": thinking} if thinking else {})}
            rows[i] = RowResult(examples[i].row, prediction, reference, compare(prediction, reference), extra)
        scorer.report(len(rows), len(order))
    return _answer_summary(metric, [rows[i] for i in range(len(rows))])


def _write_answers(scorer: Scorer, prompts: list[list[int]], eos_ids: Collection[int]) -> Iterator[tuple[str, bool]]:
    """(text, whether the model ended it by itself) for each prompt."""
    length, size = scorer.max_new_tokens, scorer.batch_size
    for ids in generate(scorer.model, prompts, max_new_tokens=length, eos_ids=eos_ids, batch_size=size):
        stopped = ids[-1] in eos_ids
        yield decode_answer(scorer.tokenizer, ids[:-1] if stopped else ids), stopped


def _answer_summary(metric: str, rows: list[RowResult]) -> EvalResult:
    extra: dict[str, JSON] = {"not_stopped": sum(not row.extra["stopped"] for row in rows)}
    if metric == "json":
        extra["unparsable"] = sum(not is_json(row.prediction) for row in rows)
    result = _summary(metric, rows, extra)
    if metric != "f1":  # a mean of fractions is no share, Wilson's formula does not apply
        extra["interval_95"] = list(wilson(result.score, result.n))
    return result


def _require_json(examples: Sequence[Example], references: Sequence[str]) -> None:
    for example, reference in zip(examples, references, strict=True):
        if not is_json(reference):
            raise UserError(
                "data/reference-not-json",
                "the answer in the file is not JSON, so nothing can equal it",
                where=example.place,
                found=visible(reference, 40),
                fix="use --metric exact_match or f1",
            )


# --- options that are compared


def _choice(scorer: Scorer, examples: Sequence[Example], labels: list[str]) -> EvalResult:
    questions = [make_question(example, labels, scorer.encode) for example in examples]
    asked = [(question.prompt, question.tails) for question in questions]
    log_probs = option_log_probs(
        scorer.model, asked, OPTIONS_AT_ONCE, lambda done, total: scorer.report(done * len(asked) // total, len(asked))
    )
    in_order = [_choice_row(question, scores) for question, scores in zip(questions, log_probs, strict=True)]
    result = _summary("choice", in_order, {})
    norm = sum(row.extra["prediction_norm"] == row.reference for row in in_order) / len(in_order)
    chance = sum(1 / len(question.options) for question in questions) / len(questions)
    interval: list[JSON] = list(wilson(result.score, result.n))
    by_bytes = sum(row.extra["prediction_bytes"] == row.reference for row in in_order) / len(in_order)
    return replace(result, extra={"acc_norm": norm, "acc_bytes": by_bytes, "chance": chance, "interval_95": interval})


def _choice_row(question: Question, log_probs: list[float]) -> RowResult:
    by_sum = dict(zip(question.options, log_probs, strict=True))
    by_character = {option: total / max(1, len(option)) for option, total in by_sum.items()}
    by_byte = {option: total / max(1, len(option.encode())) for option, total in by_sum.items()}
    prediction, prediction_norm = max(by_sum, key=by_sum.__getitem__), max(by_character, key=by_character.__getitem__)
    right = question.reference
    extra: dict[str, JSON] = {
        "prediction_norm": prediction_norm,
        "prediction_bytes": max(by_byte, key=by_byte.__getitem__),
        "log_prob": by_sum[prediction],
        "log_prob_reference": by_sum[right],
    }
    return RowResult(question.example.row, prediction, right, float(prediction == right), extra)


# --- loss


@torch.inference_mode()
def _loss(scorer: Scorer, examples: Sequence[Example]) -> EvalResult:
    encoded, examples, extra = _fitted(scorer, examples)
    num_targets = [sum(row.supervised[1:]) for row in encoded]  # nothing predicts a row's first token
    if not any(num_targets):
        raise UserError("data/no-targets", "no token of the data is supervised", found=f"{len(encoded)} rows")
    sums: dict[int, float] = {}
    order = _by_length(encoded)
    for start in range(0, len(order), scorer.batch_size):
        batch = order[start : start + scorer.batch_size]
        losses = _row_losses(scorer.model, [encoded[i] for i in batch], scorer.tokenizer.pad_id)
        sums.update(zip(batch, losses, strict=True))
        scorer.report(len(sums), len(order))
    result = _loss_result(examples, [sums[i] for i in range(len(sums))], num_targets)
    return replace(result, extra=result.extra | extra)


def _fitted(scorer: Scorer, examples: Sequence[Example]) -> tuple[list[Encoded], list[Example], dict[str, JSON]]:
    """The rows as training would see them: cut from the left or dropped where they exceed the model's context, and counted.

    Raises:
        UserError: no row fits.
    """
    context = scorer.model.config.max_position_embeddings
    whole = [
        encode_chat(scorer.tokenizer, scorer.template, example.messages, turns="all", row=example.row, where=example.place)
        for example in examples
    ]
    kept = [
        (row, example) for row, example in zip((fit(row, context) for row in whole), examples, strict=True) if row is not None
    ]
    if not kept:
        raise UserError(
            "data/all-too-long", "no row fits the model's context", found=f"{len(whole)} rows",
            expected=f"answers in at most {context} tokens", fix="shorter rows, or a model with a longer context",
        )  # fmt: skip
    longer = sum(len(row.input_ids) > context for row in whole)
    counts: dict[str, JSON] = {"dropped_for_context": len(whole) - len(kept), "longer_than_context": longer}
    return [row for row, _ in kept], [example for _, example in kept], counts if longer else {}


def _row_losses(model: CausalLM, rows: Sequence[Encoded], pad_id: int) -> list[float]:
    """The loss of each row, summed over its supervised tokens."""
    batch = collate(rows, pad_id).to(model.device)
    hidden_BTD = model.hidden(batch.input_ids, segment_ids=batch.segment_ids)
    return [float(head_loss_sum(h, model.loss_head, ids)) for h, ids in zip(hidden_BTD, batch.target_ids, strict=True)]


def _loss_result(examples: Sequence[Example], sums: list[float], num_targets: list[int]) -> EvalResult:
    mean = sum(sums) / sum(num_targets)
    if not math.isfinite(mean):
        raise UserError("numeric/non-finite-loss", "the loss is not finite", found=str(mean), fix="check the model's weights")
    rows = [
        RowResult(example.row, "", _reference(example), total / max(1, n), {"tokens": n})
        for example, total, n in zip(examples, sums, num_targets, strict=True)
    ]
    perplexity = math.exp(min(mean, 700.0))  # e^710 is no float any more
    return EvalResult(mean, len(rows), "loss", {"perplexity": perplexity, "tokens": sum(num_targets)}, rows)
