"""What a fine-tune may have lost: MMLU in cloze form, bits per byte of web text, sixty simple questions, KL to the base.

Each part has its own rows file, so that two models are compared row by row; its name holds the form of the prompt, because
the same questions in another form give another number. Small models get the cloze form: asked for a letter they answer by
habit, and such a score can neither rise nor fall.

The idea to take home: bits per byte on paired texts is the most sensitive of them, sixty questions show only a catastrophe.

Ref: Hendrycks et al. 2020, arXiv:2009.03300 (MMLU); lm-evaluation-harness (cloze, acc and acc_norm).
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minisft.common import safe_json
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.examples import Example, Message
from minisft.data.json_rows import MAX_ROW_BYTES, RowFile
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.evaluate import evaluate
from minisft.evaluation.plain_text import Continuation, bits_per_byte, kl_per_token, log_probs, split_continuation
from minisft.evaluation.rescore import with_interval
from minisft.evaluation.results import EvalResult, Progress, RowResult, prompt_sha256
from minisft.model import CausalLM

QUESTIONS = "general_questions.json"
LETTERS = "ABCD"
MAX_TEXTS, KL_TEXTS = 300, 40
_QUESTION = re.compile(r"(?s)(?:The following are[^\n]*\n\n)?(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:\s*")


@dataclass(frozen=True)
class ClozeQuestion:
    """A question with its options as texts; ``answer`` is an index."""

    row: int
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


def read_mmlu(path: str | Path, limit: int | None = None) -> list[ClozeQuestion]:
    """Read four-choice questions: ``{input, output}`` in MMLU's letter form, or ``{question, choices, answer}``.

    A limit takes rows spread evenly over the file, so that every subject has its part.

    Raises:
        UserError: ``data/...`` with file and line.
    """
    found = [_cloze_question(number, where, row) for number, where, row in RowFile(Path(path), MAX_ROW_BYTES).rows()]
    if not found:
        raise UserError("data/no-rows", "there are no questions", where=visible(path), found="0 rows")
    return found if limit is None or limit >= len(found) else [found[i * len(found) // limit] for i in range(limit)]


def _cloze_question(number: int, where: str, row: dict[str, JSON]) -> ClozeQuestion:
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if isinstance(row.get("input"), str) and (match := _QUESTION.fullmatch(str(row["input"]))):
        question, choices, answer = match[1], list(match.groups()[1:]), row.get("output")
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in LETTERS:
        answer = LETTERS.index(answer.strip())
    texts = [str(choice) for choice in choices] if isinstance(choices, list) else []
    if not isinstance(question, str) or len(texts) < 2 or type(answer) is not int or not 0 <= answer < len(texts):
        expected = '{"question", "choices", "answer"}, or {"input", "output"} with options A to D'
        raise UserError(
            "data/bad-question", "a question cannot be read", where=where, found=visible(row, 80), expected=expected
        )
    return ClozeQuestion(number, str(row.get("subject", "")), question, tuple(texts), answer)


def read_texts(path: str | Path, limit: int | None = None) -> list[tuple[int, str]]:
    """Row numbers and texts of ``{text}`` rows.

    Raises:
        UserError: ``data/...`` with file and line.
    """
    found = []
    for number, where, row in RowFile(Path(path), MAX_ROW_BYTES).rows():
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                "data/no-text", "a row has no text", where=where, found=visible(row, 60), expected='{"text": "..."}'
            )
        found.append((number, text))
    if not found:
        raise UserError("data/no-rows", "there are no texts", where=visible(path), found="0 rows")
    return found[:limit]


# --- the parts


def cloze(
    model: CausalLM, tokenizer: Tokenizer, questions: Sequence[ClozeQuestion], name: str, progress: Progress | None = None
) -> EvalResult:
    """Options by likelihood after ``Question: ...\\nAnswer:``, each a text behind one space.

    Args:
        model: any.
        tokenizer: the model's.
        questions: with their options.
        name: of the data, for the result's form.
        progress: called with (options done, options in all).

    Returns:
        ``score`` is acc (the sum of log p); ``acc_norm`` divides by the option's characters.
    """
    parts: list[Continuation] = []
    for q in questions:
        parts += [split_continuation(tokenizer, f"Question: {q.question}\nAnswer:", f" {choice}") for choice in q.choices]
    _require_fit(model, parts)
    scores = iter(log_probs(model, parts, tokenizer.pad_id, progress=progress))
    rows = [_cloze_row(q, [next(scores) for _ in q.choices]) for q in questions]
    norm = sum(row.extra["prediction_norm"] == row.reference for row in rows) / len(rows)
    chance = sum(1 / len(q.choices) for q in questions) / len(questions)
    score = sum(row.score for row in rows) / len(rows)
    extra: dict[str, JSON] = {"form": f"{name}/cloze/plain/0-shot", "acc_norm": norm, "chance": chance}
    return with_interval(EvalResult(score, len(rows), "choice", extra, rows))


def _require_fit(model: CausalLM, parts: Sequence[Continuation]) -> None:
    longest = max(len(part.context) + len(part.target) for part in parts)
    if longest > model.config.max_position_embeddings:
        found, expected = f"{longest} tokens", f"at most {model.config.max_position_embeddings}"
        raise UserError("data/row-too-long", "a question does not fit the model's context", found=found, expected=expected)


def _cloze_row(q: ClozeQuestion, totals: list[float]) -> RowResult:
    best = max(range(len(totals)), key=totals.__getitem__)
    norm = max(range(len(totals)), key=lambda i: totals[i] / max(1, len(q.choices[i])))
    extra: dict[str, JSON] = {
        "subject": q.subject, "prediction_norm": q.choices[norm], "log_prob": totals[best],
        "log_prob_reference": totals[q.answer], "prompt_sha256": prompt_sha256(q.question, *q.choices),
    }  # fmt: skip
    return RowResult(q.row, q.choices[best], q.choices[q.answer], float(best == q.answer), extra)


def web_text(
    model: CausalLM, tokenizer: Tokenizer, texts: Sequence[tuple[int, str]], name: str, progress: Progress | None = None
) -> EvalResult:
    """Bits per byte of each text, and of all of them together.

    Args:
        model: any.
        tokenizer: the model's.
        texts: row numbers and texts.
        name: of the data, for the result's form.
        progress: called with (windows done, windows in all).

    Returns:
        ``score`` is the mean over texts, ``corpus`` all bits over all bytes.
    """
    found = bits_per_byte(model, tokenizer, [text for _, text in texts], progress=progress)
    rows = [
        RowResult(
            number,
            "",
            "",
            bits.per_byte,
            {"bytes": bits.num_bytes, "num_tokens": bits.num_tokens, "prompt_sha256": prompt_sha256(text)},
        )
        for (number, text), bits in zip(texts, found, strict=True)
    ]
    corpus = sum(bits.bits for bits in found) / sum(bits.num_bytes for bits in found)
    extra: dict[str, JSON] = {"form": f"{name}/plain/{len(rows)} texts", "corpus": corpus}
    mean = sum(row.score for row in rows) / len(rows)
    return with_interval(EvalResult(mean, len(rows), "bits_per_byte", extra, rows))


def own_questions(
    model: CausalLM, tokenizer: Tokenizer, template: ChatTemplate, progress: Progress | None = None
) -> EvalResult:
    """The sixty questions of the quickstart, by likelihood in the chat form.

    Args:
        model: any.
        tokenizer: the model's.
        template: its chat template.
        progress: called with (rows done, rows in all).

    Returns:
        the result; sixty rows show differences of 16 points and more.
    """
    rows = safe_json.loads((importlib.resources.files("minisft.quickstart") / QUESTIONS).read_bytes())
    assert isinstance(rows, list)
    examples = [_own_example(number, row) for number, row in enumerate(rows, 1)]
    result = evaluate(model, tokenizer, template, examples, "choice", progress=progress)
    return replace(result, extra={**result.extra, "form": "own60/choice/chat/0-shot"})


def _own_example(number: int, row: JSON) -> Example:
    assert isinstance(row, dict)
    choices, answer = row["choices"], row["answer"]
    assert isinstance(choices, list)
    assert isinstance(answer, int)
    turns = (Message("user", str(row["question"])), Message("assistant", str(choices[answer])))
    return Example(turns, number, {"choices": choices})


def distance(base: CausalLM, tuned: CausalLM, tokenizer: Tokenizer, texts: Sequence[tuple[int, str]]) -> EvalResult:
    """KL(base || tuned) a token of each text.

    Args:
        base: the model before.
        tuned: the model after.
        tokenizer: of both.
        texts: row numbers and texts; the first 40 are read.

    Returns:
        ``score`` is the mean in nats a token; 0 where nothing changed.
    """
    chosen = texts[:KL_TEXTS]
    values = kl_per_token(base, tuned, tokenizer, [text for _, text in chosen])
    rows = [RowResult(number, "", "", value) for (number, _), value in zip(chosen, values, strict=True)]
    return with_interval(EvalResult(sum(values) / len(values), len(rows), "kl", {"form": f"{len(rows)} texts"}, rows))


# --- all of it


@dataclass(frozen=True)
class SuiteData:
    """What the suite is asked on; parts without data are left out."""

    questions: list[ClozeQuestion] | None
    questions_name: str
    texts: list[tuple[int, str]] | None
    texts_name: str


def read_suite(mmlu: str | Path | None, texts: str | Path | None, limit: int | None) -> SuiteData:
    """Read the files of the suite.

    Args:
        mmlu: four-choice questions.
        texts: web texts.
        limit: most questions, and most texts (300 at most).

    Returns:
        both, or None for what is not given.
    """
    return SuiteData(
        None if mmlu is None else read_mmlu(mmlu, limit),
        "" if mmlu is None else Path(mmlu).stem,
        None if texts is None else read_texts(texts, min(limit or MAX_TEXTS, MAX_TEXTS)),
        "" if texts is None else Path(texts).stem,
    )


def run_suite(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    data: SuiteData,
    base: CausalLM | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, EvalResult]:
    """Every part that there is data for.

    Args:
        model: to judge.
        tokenizer: the model's.
        template: its chat template.
        data: of ``read_suite``.
        base: for the KL.
        log: called with a line after each part.

    Returns:
        results by part: mmlu_cloze, bits_per_byte, questions, kl.
    """
    found: dict[str, EvalResult] = {}

    def keep(name: str, result: EvalResult) -> None:
        found[name] = result
        log(f"{name} {result}: {result.extra['form']}")

    if data.questions is not None:
        keep("mmlu_cloze", cloze(model, tokenizer, data.questions, data.questions_name))
    if data.texts is not None:
        keep("bits_per_byte", web_text(model, tokenizer, data.texts, data.texts_name))
        if base is not None:
            keep("kl", distance(base, model, tokenizer, data.texts))
    keep("questions", own_questions(model, tokenizer, template))
    return found
