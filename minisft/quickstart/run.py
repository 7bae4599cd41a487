"""Five minutes, one command: a model of your own, with proof of what it learnt and what it kept.

Makes the parcel task (``parcel_task.py``), scores the pretrained model on it and on general questions, trains a LoRA the
way ``minisft train`` does, loads the saved adapter onto a fresh base and scores both again. Everything it writes lies in
one folder, in the forms the other commands read, so that each number can be had again by hand.

The idea to take home: look twice. A fine-tuned model is judged on rows it never saw, and on what it could do before.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.atomic_files import make_folder, write_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON, loads
from minisft.config import RunConfig
from minisft.data.chat import resolve_template
from minisft.data.messages import read_dataset
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.compressed import decode_compressed_if_memory_allows_
from minisft.evaluation.evaluate import EvalResult, Metric, evaluate, terminal_progress, write
from minisft.evaluation.metrics import wilson
from minisft.formats import load_adapter_, load_model
from minisft.formats.source import SMOLLM2
from minisft.model import CausalLM
from minisft.quickstart.parcel_task import INSTRUCTION, parcel_rows
from minisft.training.runlog import duration
from minisft.training.train import TrainResult, train

TRAIN_ROWS = 400
TEST_ROWS = 60
BATCH_SIZE = 4  # more steps from the same rows
LEARNING_RATE = 8e-4  # four times the default: a hundred steps are few
EXAMPLE_QUESTION = ("What colour is fresh snow?", "white")  # shows that a bare word is asked for, not a sentence
MAX_NEW_TOKENS = 48  # answers have up to 40


@dataclass(frozen=True)
class Scores:
    """One model on both tests."""

    task: EvalResult
    general: EvalResult


@dataclass(frozen=True)
class QuickstartResult:
    """What the table shows."""

    before: Scores
    after: Scores
    training: TrainResult
    seconds: float


def run_quickstart(
    out: Path, seed: int = 0, *, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS, log: Callable[[str], None] = print
) -> QuickstartResult | None:
    """The whole tour, in the new folder ``out``.

    Args:
        out: gets ``data/`` (the rows), ``run/`` (the run folder, with the adapter) and ``eval/`` (scores, row by row).
        seed: decides the data and the training.
        train_rows, test_rows: how many parcel messages are made for each.
        log: where the sentences and the table go; bars go to standard error, on a terminal only.

    Returns:
        the numbers; None when a signal stopped the training.

    Raises:
        UserError: ``out`` is in use, or the pretrained model is not installed.
    """
    began = time.monotonic()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fix = "minisft quickstart --out another folder, or move this one away"
        raise UserError("config/out-exists", "the quickstart's folder is in use", where=visible(out), fix=fix)
    model, tokenizer = load_model(SMOLLM2)
    log(f"1. Making the data: {train_rows} parcel messages to learn from, {test_rows} others to be tested on.")
    log(_sample(write_data(out / "data", seed, train_rows, test_rows)))
    log("2. Scoring the pretrained model.")
    decode_compressed_if_memory_allows_([model], log)
    before = _scores(model, tokenizer, out, "before")
    del model
    log("3. Training an adapter.")
    training = train(training_settings(out, seed), log=lambda text: log(f"   {text}"))
    if training.weights is None:
        return None
    log("4. Scoring the pretrained model with the saved adapter.")
    model, tokenizer = load_model(SMOLLM2)
    load_adapter_(model, training.weights)
    decode_compressed_if_memory_allows_([model], log)
    result = QuickstartResult(before, _scores(model, tokenizer, out, "after"), training, time.monotonic() - began)
    log(report(result, out))
    return result


def training_settings(out: Path, seed: int) -> RunConfig:
    """fp32, because most CPUs multiply bf16 slowly; two validations, because each costs as much as three steps."""
    return RunConfig(
        model=SMOLLM2,
        data=str(out / "data" / "train.jsonl"),
        out=str(out / "run"),
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        dtype="fp32",
        eval_every=50,
        seed=seed,
    )


def write_data(folder: Path, seed: int, train_rows: int, test_rows: int) -> dict[str, JSON]:
    """Write ``train.jsonl``, ``test.jsonl`` and ``general.jsonl``.

    Args:
        folder: where they go; made if it is not there.
        seed: decides the parcel messages.
        train_rows, test_rows: how many of them; the general questions are always the same.

    Returns:
        the first training row.
    """
    train, test = parcel_rows("train", train_rows, seed), parcel_rows("test", test_rows, seed)
    make_folder(folder)
    for name, rows in (("train", train), ("test", test), ("general", general_rows())):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_durably(folder / f"{name}.jsonl", text.encode())
    return train[0]


def general_rows() -> list[dict[str, JSON]]:
    """The packaged four-option questions as chat rows with a ``choices`` column, for the metric ``choice``."""
    file = importlib.resources.files("minisft.quickstart") / "general_questions.json"
    questions = loads(file.read_bytes())
    assert isinstance(questions, list)
    return [_general_row(question) for question in questions]


def _general_row(question: JSON) -> dict[str, JSON]:
    assert isinstance(question, dict)
    choices, answer = question["choices"], question["answer"]
    assert isinstance(choices, list)
    assert isinstance(answer, int)
    texts = (*EXAMPLE_QUESTION, question["question"], choices[answer])
    turns: list[JSON] = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, "choices": choices}


def _sample(row: dict[str, JSON]) -> str:
    messages = row["messages"]
    assert isinstance(messages, list)
    _, user, assistant = (message["content"] for message in messages if isinstance(message, dict))
    return f"   {user}\n   -> {assistant}"


def _scores(model: CausalLM, tokenizer: Tokenizer, out: Path, name: str) -> Scores:
    def score(test: str, metric: Metric) -> EvalResult:
        examples = read_dataset(out / "data" / f"{test}.jsonl", keep_duplicates=True).examples
        with terminal_progress(f"   {test}") as progress:
            result = evaluate(model, tokenizer, template, examples, metric, max_new_tokens=MAX_NEW_TOKENS, progress=progress)
        write(result, out / "eval" / f"{test}_{name}.json")
        return result

    template = resolve_template(tokenizer)
    return Scores(score("test", "json"), score("general", "choice"))


def report(result: QuickstartResult, out: Path) -> str:
    """The table, where the files are, and what to type next."""
    training, before, after = result.training, result.before, result.after
    rows = [
        ("", "before", "after", "95 % interval", "rows"),
        ("parcel message to JSON, all right", *_cells(before.task, after.task)),
        ("general questions, four options", *_cells(before.general, after.general)),
    ]
    share = training.trainable / training.parameters
    lines = [
        "",
        *_table(rows),
        "",
        f"Trained {training.trainable:,} of {training.parameters:,} parameters ({share:.1%}) in {duration(training.seconds)}, "
        f"{duration(result.seconds)} with everything around it.",
        f"Adapter: {visible(training.weights)}   every answer: {visible(out / 'eval')}   data: {visible(out / 'data')}",
        "",
        "Next, type one of these:",
        *(f"  {command}" for command in next_commands(out)),
    ]
    return "\n".join(lines)


def _cells(before: EvalResult, after: EvalResult) -> tuple[str, str, str, str]:
    low, high = wilson(after.score, after.n)
    return f"{before.score:.1%}", f"{after.score:.1%}", f"{low:.1%} to {high:.1%}", str(after.n)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def next_commands(out: Path) -> list[str]:
    """Talk to it; have a number again; train on one's own data."""
    program = "minisft" if shutil.which("minisft") else os.path.relpath(Path(sys.executable).with_name("minisft"))
    tuned = f"--model {SMOLLM2} --adapter {out / 'run' / 'adapter'}"
    return [
        f"{program} chat {tuned} --system {shlex.quote(INSTRUCTION)}",
        f"{program} eval {tuned} --data {out / 'data' / 'test.jsonl'} --metric json --out {out / 'eval' / 'again.json'}",
        f"{program} train --model {SMOLLM2} --data YOUR_ROWS.jsonl --out runs/first",
    ]
