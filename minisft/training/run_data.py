"""What a run learns from: rows read, split, encoded and checked, and the facts about them that are kept with the run."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from minisft.common.safe_json import JSON
from minisft.config import RunConfig
from minisft.data.chat import Encoded, EncodedDataset, encode_dataset, limit_words, resolve_template
from minisft.data.inspect_data import check
from minisft.data.messages import Dataset, Example, read_dataset, split
from minisft.data.template import ChatTemplate, current_time
from minisft.data.tokenizer import Tokenizer
from minisft.formats.adapter import TEMPLATE_FILE
from minisft.quality.report import near_groups
from minisft.training.identity import tokens_sha256
from minisft.training.replay import Replay, read_replay, replay_words, validated_too

RECORDED_PACKAGES = ("minisft", "torch", "numpy", "safetensors", "tokenizers", "triton", "jinja2", "gguf")


Row = TypeVar("Row")


@dataclass(frozen=True)
class RunData(Generic[Row]):
    """Encoded rows to train and validate on, what identifies them, facts for ``data.json``, and rows to replay."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    identity: dict[str, JSON]
    facts: dict[str, JSON]
    replay: Replay | None = None


def prepare_data(
    run: RunConfig,
    tokenizer: Tokenizer,
    log: Callable[[str], None],
    began: datetime.datetime | None = None,
    context: int | None = None,
) -> tuple[ChatTemplate, RunData[Encoded]]:
    """Read, split and encode the rows of a run.

    Args:
        run: the settings.
        tokenizer: the model's.
        log: is told what was dropped or cut.
        began: when the run began, if it is resumed: what a template writes as today's date.
        context: the most tokens that the model is made for, to name the limit; ``run.max_length`` is at most that.

    Returns:
        The chat template of the run, and its rows.

    Raises:
        UserError: bad rows, no usable row, data on which training would be broken.
    """
    now = began or current_time()
    template = resolve_template(tokenizer, template_choice(run, log), now)
    dataset = read_dataset(run.data, run.map)
    held_out = read_dataset(run.eval_data, run.map) if run.eval_data else None
    if held_out is None:
        groups = near_groups(dataset) if run.validation_share > 0 else {}
        train, validation = split(dataset.examples, run.validation_share, run.seed, groups)
        if groups:
            log(f"{len(groups)} rows are copies or near copies of others: each stays on the side of its like")
        if run.validation_share > 0 and len(dataset.examples) > 1 and not validation:
            log("all rows are near copies of each other: there is nothing to validate on; give --eval-data")
    else:
        train, validation = dataset.examples, held_out.examples

    def encode(examples: Sequence[Example], path: str) -> EncodedDataset:
        return encode_dataset(
            examples,
            tokenizer,
            template,
            run.max_length,
            turns=run.turns,
            allow_control_tokens=run.allow_control_tokens,
            strict=run.strict,
            path=path,
            context=context,
        )

    encoded, encoded_validation = encode(train, run.data), encode(validation, run.eval_data or run.data)
    check(encoded, tokenizer, run.max_length, context)
    limit = limit_words(run.max_length, context)
    losses = (*_losses(encoded, "training", limit), *_losses(encoded_validation, "validation", limit))
    for note in (*dataset.notes, *tokenizer.notes, *losses):
        log(note)
    log(f"{len(encoded.rows)} rows to train on, {len(encoded_validation.rows)} to validate on")
    identity: dict[str, JSON] = {
        "data": {"train": dataset.sha256, "eval": held_out.sha256 if held_out else None},
        "tokens": tokens_sha256(encoded.rows, encoded_validation.rows),
        "template": hashlib.sha256(template.source.encode("utf-8", "surrogatepass")).hexdigest(),
        "date": now.isoformat(),
    }
    facts: dict[str, JSON] = {
        "train": _facts(dataset, encoded),
        "validation": _facts(held_out or dataset, encoded_validation),
    }
    replay = read_replay(run, tokenizer, template, [dataset.sha256, *([held_out.sha256] if held_out else [])])
    if replay is not None:
        for note in filter(None, (replay_words(replay, encoded.rows), validated_too(replay, encoded_validation.rows))):
            log(note)
        identity, facts = identity | {"replay": replay.identity}, facts | {"replay": replay.facts}
    return template, RunData(encoded.rows, encoded_validation.rows, identity, facts, replay)


def template_choice(run: RunConfig, log: Callable[[str], None]) -> str | None:
    """``--template``, or else the one that the adapter of ``--init-adapter`` was trained with."""
    if run.template is not None or run.init_adapter is None:
        return run.template
    saved = Path(run.init_adapter) / TEMPLATE_FILE
    if not saved.is_file():
        return None
    log("chat template: the one that the adapter was trained with")
    return str(saved)


def _losses(encoded: EncodedDataset, use: str, limit: str) -> list[str]:
    """Which rows were not used as they are; one sentence each, nothing when there were none."""
    counted = {
        f"prompts cut from the left to fit {limit}": len(encoded.truncated),
        f"rows dropped: the answer does not fit {limit}": len(encoded.too_long),
        "rows dropped: no turn in them is trained": len(encoded.untrained),
        "rows lose their reasoning: the chat template leaves out the text up to </think>": len(encoded.lost_reasoning),
        "control tokens spelt out in the data, read as plain text": encoded.control_tokens,
    }
    return [f"{use}: {number} {what}" for what, number in counted.items() if number]


def _facts(dataset: Dataset, encoded: EncodedDataset) -> dict[str, JSON]:
    lengths = sorted(len(row.input_ids) for row in encoded.rows)
    num_tokens, num_supervised = sum(lengths), sum(sum(row.supervised) for row in encoded.rows)
    return {
        "path": dataset.path,
        "sha256": dataset.sha256,
        "form": dataset.form,
        "file_counts": dict(dataset.counts),
        "encoding_counts": dict(encoded.counts),
        "rows": len(lengths),
        "tokens": num_tokens,
        "supervised_tokens": num_supervised,
        "supervised_share": round(num_supervised / num_tokens, 4) if num_tokens else None,
        "longest_row": lengths[-1] if lengths else None,
        "median_row": lengths[len(lengths) // 2] if lengths else None,
    }


def environment(device: torch.device) -> dict[str, JSON]:
    """Versions and machine, for ``env.json``."""
    versions: dict[str, JSON] = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
