"""From a model's name to the scores of a pool: loaded once, computed with a cache on the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minisft.common.device import pick_device
from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.data.chat import encode_chat, resolve_template
from minisft.formats import fingerprint, load_model, load_tokenizer
from minisft.quality.pool import Pool
from minisft.quality.text import Integers
from minisft.selection.score_file import ScoreLog, read_scores
from minisft.selection.scores import Judge, RowScore, score_rows
from minisft.selection.select import Sizes
from minisft.selection.settings import Settings

FORMAT = 1  # of the files of scores


@dataclass(frozen=True)
class ModelSettings:
    """Which model judges, and how rows are written and computed; see ``scores.Judge``.

    Raises:
        UserError: ``config/bad-value``.
    """

    model: str
    template: str | None = None
    device: str = "auto"
    max_length: int = 1024
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size"):
            if (value := getattr(self, name)) < 1:
                flag, what = "--" + name.replace("_", "-"), "a setting is out of range"
                fix = f"{flag} 16 or so"
                raise UserError("config/bad-value", what, where=flag, found=str(value), expected="at least 1", fix=fix)


def word_sizes(pool: Pool) -> Sizes:
    """Lengths in words, where no model is named."""
    return Sizes(pool.words.lengths, pool.answer_lengths, "words")


def token_sizes(pool: Pool, model: str, choice: str | None) -> Sizes:
    """Lengths in the model's tokens, with its template or the one of ``choice``.

    Args:
        pool: all rows.
        model: whose tokenizer to use.
        choice: see ``resolve_template``.

    Returns:
        the sizes of all rows.
    """
    tokenizer = load_tokenizer(model)
    template = resolve_template(tokenizer, choice)
    encoded = [encode_chat(tokenizer, template, e.messages, row=e.row) for e in pool.examples]
    tokens, targets = [len(e.input_ids) for e in encoded], [e.num_targets for e in encoded]
    return Sizes(np.array(tokens, np.int64), np.array(targets, np.int64), "tokens")


def scores_name(pool: Pool, model: ModelSettings, settings: Settings) -> dict[str, JSON]:
    """What scores belong to: the data, the model's bytes, the template and the settings that change a number.

    Args:
        pool: all rows.
        model: which model.
        settings: what is asked of it.

    Returns:
        a JSON object.
    """
    tokenizer = load_tokenizer(model.model)
    template = resolve_template(tokenizer, model.template)
    return {
        "format": FORMAT,
        "data_sha256": pool.dataset.sha256,
        "rows": len(pool.examples),
        "model": fingerprint(model.model),
        "template": template.sha256,
        "max_length": model.max_length,
        "alone": settings.needs_alone,
        "states": settings.needs_states,
    }


def model_scores(
    pool: Pool,
    rows: Integers,
    model: ModelSettings,
    settings: Settings,
    log_path: Path,
    reuse: Path | None,
    log: Callable[[str], None],
) -> tuple[dict[int, RowScore], ScoreLog | None]:
    """The scores of ``rows``, as far as they are not on the disk already.

    Args:
        pool: all rows.
        rows: indices.
        model: which model.
        settings: what is asked of it.
        log_path: where scores are collected until the selection is written; a killed run goes on from it.
        reuse: the scores of an earlier selection.
        log: told how far it is.

    Returns:
        (scores by index, the collecting file, to be removed at the end).

    Raises:
        UserError: from the model's files, from ``reuse``, and those of ``score_rows``.
    """
    name = scores_name(pool, model, settings)
    known = read_scores(reuse, name, strict=True) if reuse is not None else {}
    if all(int(i) in known for i in rows):
        return known, None
    collected = ScoreLog(log_path, name)
    known |= collected.done
    missing = [int(i) for i in rows if int(i) not in known]
    if collected.done:
        log(f"{len(collected.done)} scores of an interrupted run are used")
    judge = _load(model, settings)
    try:
        for scores in score_rows(judge, pool.examples, missing):
            before = len(collected.done)
            collected.add(scores)
            if before * 20 // max(1, len(rows)) != len(collected.done) * 20 // max(1, len(rows)):
                log(f"scored {len(collected.done)} of {len(rows)} rows")
    except BaseException:
        collected.close()
        raise
    return known | collected.done, collected


def _load(model: ModelSettings, settings: Settings) -> Judge:
    device = pick_device(model.device)
    loaded, tokenizer = load_model(model.model, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    return Judge(
        model=loaded.eval().requires_grad_(False),
        tokenizer=tokenizer,
        template=resolve_template(tokenizer, model.template),
        max_length=model.max_length,
        batch_size=model.batch_size,
        alone=settings.needs_alone,
        states=settings.needs_states,
    )
