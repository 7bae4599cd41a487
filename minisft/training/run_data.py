"""What a run learns from: rows read, split, encoded and checked, and the facts about them that are kept with the run."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from minisft.batching import Share
from minisft.common.errors import visible
from minisft.common.safe_json import JSON
from minisft.config import RunConfig
from minisft.data.chat import Encoded, resolve_template
from minisft.data.encoding import EncodedDataset, encode_dataset, limit_words
from minisft.data.inspect_data import check
from minisft.data.messages import Dataset, Example, read_dataset, split
from minisft.data.mixture import FileRows, described, read_sources, rows_of_epoch, shares, shown
from minisft.data.sources import Source, parse_sources
from minisft.data.template import ChatTemplate, current_time
from minisft.data.token_rows import TokenRows, TokenWriter
from minisft.data.tokenizer import Tokenizer
from minisft.formats.adapter import saved_template
from minisft.quality.report import near_groups
from minisft.training.identity import tokens_sha256
from minisft.training.manifest import as_object
from minisft.training.replay import Replay, read_replay, replay_words, steps_of_epochs, validated_too
from minisft.training.row_cache import PreparedRows, open_cache

RECORDED_PACKAGES = ("minisft", "torch", "numpy", "safetensors", "tokenizers", "triton", "jinja2", "gguf")


class FromFile(Protocol):
    """What every kind of row knows."""

    @property
    def row(self) -> int:
        """The row of the data file, from 1."""
        ...


Row = TypeVar("Row", bound=FromFile)


@dataclass(frozen=True)
class RunData(Generic[Row]):
    """Encoded rows, what identifies them, facts for ``data.json``, rows to replay, and the shares of a mixture."""

    train: Sequence[Row]
    validation: Sequence[Row]
    identity: dict[str, JSON]
    facts: dict[str, JSON]
    replay: Replay | None = None
    shares: tuple[Share, ...] = ()

    @property
    def replay_share(self) -> Fraction:
        """Of the rows of a step; 0 without ``--replay``."""
        return self.replay.share if self.replay else Fraction(0)

    def total_steps(self, run: RunConfig) -> int:
        """Optimizer steps of a run on these rows: ``--steps``, or those of its epochs."""
        return run.steps or steps_of_epochs(run.epochs or 1.0, len(self.train), run.batch_size, self.replay_share)


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
    cache = open_cache(run, tokenizer, template, context, now, log)
    rows = cache.load() if cache is not None else None
    if cache is not None and rows is not None:
        log(f"encoded rows: taken from {visible(cache.folder)}")
    elif cache is not None:
        log(f"reading and encoding the rows, which are kept in {visible(cache.folder)}")
        rows = cache.store(lambda folder: _prepare(run, tokenizer, template, context, folder))
    if rows is None:
        rows = _prepare(run, tokenizer, template, context, None)
    for note in _list(rows.record["notes"]):
        log(str(note))
    identity = {**as_object(rows.record["identity"]), "date": now.isoformat()}
    facts = {name: {"path": _path(run, name), **as_object(fact)} for name, fact in as_object(rows.record["facts"]).items()}
    shares = tuple(Share(*(int(str(number)) for number in _list(share))) for share in _list(rows.record["shares"]))
    replay = read_replay(run, tokenizer, template, list(map(str, _list(rows.record["files"]))))
    if replay is not None:
        for note in filter(None, (replay_words(replay, rows.train), validated_too(replay, rows.validation))):
            log(note)
        identity, facts = identity | {"replay": replay.identity}, facts | {"replay": replay.facts}
    return template, RunData(rows.train, rows.validation, identity, dict(facts), replay, shares)


def _prepare(
    run: RunConfig, tokenizer: Tokenizer, template: ChatTemplate, context: int | None, folder: Path | None
) -> PreparedRows:
    """Read, split and encode; the tokens go into ``folder``, or stay in memory."""
    sources = parse_sources(run.data)
    dataset, files = read_sources(sources, run.map, allow_tokens=True)
    held_out = read_dataset(run.eval_data, run.map, allow_tokens=True) if run.eval_data else None
    train, validation, notes = _sides(run, dataset, held_out)

    def encode(examples: Sequence[Example], name: str, path: str) -> EncodedDataset:
        writer = TokenWriter(None if folder is None else folder / f"{name}.tokens")
        with contextlib.closing(writer):
            return encode_dataset(
                examples, tokenizer, template, run.max_length, turns=run.turns,
                allow_control_tokens=run.allow_control_tokens, strict=run.strict, path=path, context=context, writer=writer,
            )  # fmt: skip

    encoded = encode(train, "train", dataset.path)
    encoded_validation = encode(validation, "validation", run.eval_data or dataset.path)
    check(encoded, tokenizer, run.max_length, context)
    there = _rows_of_files(files, encoded.rows)
    drawn = rows_of_epoch(sources, there) if shares(sources) is not None else None
    limit = limit_words(run.max_length, context)
    notes += [*dataset.notes, *tokenizer.notes]
    notes += [*_losses(encoded, "training", limit), *_losses(encoded_validation, "validation", limit)]
    notes += _file_notes(sources, there, drawn) if len(sources) > 1 else []
    notes.append(f"{len(encoded.rows)} rows to train on, {len(encoded_validation.rows)} to validate on")
    identity: dict[str, JSON] = {
        "data": {"train": dataset.sha256, "eval": held_out.sha256 if held_out else None},
        "tokens": tokens_sha256(encoded.rows, encoded_validation.rows),
        "template": template.sha256,
    }
    facts: dict[str, JSON] = {
        "train": _facts(dataset, encoded),
        "validation": _facts(held_out or dataset, encoded_validation),
    }
    if (parts := shares(sources)) is not None:
        identity["mixture"] = [round(part, 12) for part in parts]
    if len(sources) > 1:
        facts["files"] = {"files": list(described(sources, there, drawn))}
    firsts = np.cumsum([0, *there])[:-1].tolist()
    record: dict[str, JSON] = {
        "identity": identity,
        "facts": facts,
        "files": [*(file.sha256 for file in files), *([held_out.sha256] if held_out else [])],
        "shares": [[first, count, number] for first, count, number in zip(firsts, there, drawn or (), strict=False)],
        "notes": [visible(note, 2000) for note in notes],
        "dates": dict(template.dates),
    }
    return PreparedRows(encoded.rows, encoded_validation.rows, record)


def _sides(
    run: RunConfig, dataset: Dataset, held_out: Dataset | None
) -> tuple[tuple[Example, ...], tuple[Example, ...], list[str]]:
    """The rows to train on, those to validate on, and sentences for the log."""
    if held_out is not None:
        return dataset.examples, held_out.examples, []
    notes = []
    groups = near_groups(dataset) if run.validation_share > 0 else {}
    train, validation = split(dataset.examples, run.validation_share, run.seed, groups)
    if groups:
        notes.append(f"{len(groups)} rows are copies or near copies of others: each stays on the side of its like")
    if run.validation_share > 0 and len(dataset.examples) > 1 and not validation:
        notes.append("all rows are near copies of each other: there is nothing to validate on; give --eval-data")
    return train, validation, notes


def _rows_of_files(files: Sequence[FileRows], rows: TokenRows) -> list[int]:
    """How many of the rows came from each file."""
    ends = np.searchsorted(rows.numbers, [file.last for file in files], side="right")
    return np.diff(ends, prepend=0).tolist()


def _file_notes(sources: Sequence[Source], there: Sequence[int], drawn: Sequence[int] | None) -> list[str]:
    notes = []
    for i, source in enumerate(sources):
        note = f"{visible(source.path)}: {there[i]} rows to train on"
        if drawn is not None:
            note += f"; {drawn[i]} rows of an epoch ({drawn[i] / sum(drawn):.1%}), {drawn[i] / there[i]:.2f} passes"
        notes.append(note)
    return notes


def _list(value: JSON) -> list[JSON]:
    return value if isinstance(value, list) else []


def _path(run: RunConfig, name: str) -> JSON:
    return run.eval_data if name == "validation" and run.eval_data else shown(parse_sources(run.data))


def template_choice(run: RunConfig, log: Callable[[str], None]) -> str | None:
    """``--template``, or else the one that the adapter of ``--init-adapter`` was trained with."""
    if run.template is not None or run.init_adapter is None:
        return run.template
    saved = saved_template(run.init_adapter)
    if saved is not None:
        log("chat template: the one that the adapter was trained with")
    return saved


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
    lengths = np.sort(encoded.rows.lengths).tolist()
    num_tokens, num_supervised = sum(lengths), encoded.rows.num_targets
    return {
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
