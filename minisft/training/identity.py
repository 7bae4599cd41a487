"""What makes a run the same run: the settings that decide its numbers, and hashes of its rows, tokens, base and adapter.

Contents are compared, never names: a file that moved is the same file. Settings that only decide how a step is computed
(``COMPUTE``) may change on resume, because the result is the same up to rounding; with dropout the device may not, because it
draws other masks. How many processes share a step decides nothing, so it is no part of this at all. The rows are compared as
the token ids that are trained on, so an edited chat template or tokenizer is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.common.settings import flag_name
from minisft.config import RunConfig
from minisft.data.chat import Encoded
from minisft.data.token_rows import TokenRows
from minisft.formats.adapter import WEIGHTS_FILE
from minisft.formats.adapter_config import CONFIG_FILE
from minisft.formats.source import file_sha256
from minisft.training.new_tokens import tokens_identity

FORMAT = 3  # 1 compared names and memory settings, and knew nothing of tokens; 2 trained all weights whatever --targets said
FILES = ("model", "data", "eval_data", "replay", "template", "init_adapter", "reward", "add_tokens")  # compared by content
WATCHING = ("out", "log_every", "keep_last", "save_every", "strict", "cache", "report", "parallel")  # decide nothing computed
LENGTH = ("steps", "epochs")  # may be raised, see ``Trainer.restore``
COMPUTE = ("micro_batch_size", "checkpointing", "device", "packing")
MASKS = ("device",)  # those of COMPUTE that dropout's masks depend on


def run_identity(run: RunConfig, data: Mapping[str, JSON], base: str | None, device: torch.device) -> dict[str, JSON]:
    """What identifies a run, as it is saved with each checkpoint.

    Args:
        run: the settings, with ``dtype`` resolved.
        data: hashes of the rows (``RunData.identity``).
        base: fingerprint of the base model; None for a model that came from no file.
        device: where the run is.

    Returns:
        JSON for ``require_same_run``.
    """
    left_out = {*FILES, *WATCHING, *LENGTH, *COMPUTE, "train_tokens"}  # this one is recorded with the tokens
    settings = {name: value for name, value in run.to_dict().items() if name not in left_out}
    settings |= {"lr": run.peak_lr, "replay_share": run.replay_share_or_default}
    compute: dict[str, JSON] = {
        "micro_batch_size": run.micro_batch_size or run.batch_size,
        "checkpointing": run.checkpointing,
        "device": device.type,
        "packing": run.packing,
    }
    init_adapter = adapter_sha256(Path(run.init_adapter)) if run.init_adapter else None
    dropout: dict[str, JSON] = {"dropout": "by row"} if run.dropout else {}  # older runs drew their masks by micro-batch
    found: dict[str, JSON] = {"format": FORMAT, "config": settings, "compute": compute, "base": base}
    return found | {"init_adapter": init_adapter, **dropout, **tokens_identity(run), **data}


def require_same_run(saved: Mapping[str, JSON], current: Mapping[str, JSON]) -> list[str]:
    """Refuse to go on with a run that would compute something else.

    Returns:
        A note on each difference that changes nothing but rounding.

    Raises:
        UserError: ``checkpoint/changed``, naming each setting or content that differs; ``checkpoint/older-format``.
    """
    if saved.get("format") != FORMAT:
        raise UserError(
            "checkpoint/older-format", "this run was started by an older minisft, which recorded less of what it was",
            found=f"identity format {visible(saved.get('format', 1))}", expected=f"format {FORMAT}",
            fix="start a new run from its weights: --init-adapter RUN/checkpoints/step-N/adapter",
        )  # fmt: skip
    config, old, new = (_object(part) for part in (current["config"], saved.get("compute"), current["compute"]))
    may_change = [name for name in COMPUTE if not config["dropout"] or name not in MASKS]
    check_identity(saved, current, ["template", "tokens", "date", *(f"compute.{name}" for name in may_change)])
    _require_same_tokens(saved, current)
    notes = [
        f"{flag_name(name)}: {visible(old.get(name))} before, {visible(new[name])} now; the result is the same up to rounding"
        for name in COMPUTE
        if old.get(name) != new[name]
    ]
    if saved.get("template") != current["template"]:
        notes.append("the chat template has changed, but no token of the rows has")
    return notes


def _require_same_tokens(saved: Mapping[str, JSON], current: Mapping[str, JSON]) -> None:
    """The files of rows are the same; if their tokens are not, the template has changed or else the tokenizer."""
    if saved.get("tokens") == current["tokens"]:
        return
    if saved.get("template") != current["template"]:
        check_identity({"template": saved.get("template")}, {"template": current["template"]})
    check_identity({"tokenizer": saved.get("tokens")}, {"tokenizer": current["tokens"]})


def check_identity(saved: Mapping[str, JSON], current: Mapping[str, JSON], allowed: Collection[str] = ()) -> None:
    """Refuse to go on with a run whose settings, data or base model have changed.

    Nested values are compared leaf by leaf under dotted names such as ``config.lr``; a tuple equals the list it was saved as.

    Args:
        saved, current: nested JSON objects.
        allowed: dotted names (a name covers everything below it) that may differ.

    Raises:
        UserError: ``checkpoint/changed``: every key that differs, with the old and the new value.
    """
    old, new = _leaves(saved), _leaves(current)
    changed = {
        key: f"{visible(old.get(key, 'absent'))} before, {visible(new.get(key, 'absent'))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == name or key.startswith(f"{name}.") for name in allowed)
    }
    if changed:
        raise UserError(
            "checkpoint/changed",
            "the run was started with something else",
            where=listing(changed),
            found=" | ".join(f"{visible(key)}: {values}" for key, values in changed.items()),
            fix="resume with what it was started with, or start a new run in another folder",
        )


def _leaves(value: Mapping[str, JSON], prefix: str = "") -> dict[str, str]:
    """Dotted name -> JSON text of every value that is not itself a non-empty object."""
    leaves: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            leaves |= _leaves(item, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = json.dumps(item)
    return leaves


def _object(value: JSON) -> dict[str, JSON]:
    return value if isinstance(value, dict) else {}


def tokens_sha256(*sets: Iterable[Encoded]) -> str:
    """Hash of what is trained and validated on: every token id and every supervised flag, row by row."""
    digest = hashlib.sha256()
    for rows in sets:
        arrays = rows.arrays() if isinstance(rows, TokenRows) else ((row.input_ids, row.supervised) for row in rows)
        for input_ids, supervised in arrays:
            digest.update(len(input_ids).to_bytes(8, "little"))
            digest.update(np.asarray(input_ids, dtype="<i8").tobytes())
            digest.update(np.asarray(supervised, dtype=np.uint8).tobytes())
        digest.update(b"end of a set")
    return digest.hexdigest()


def adapter_sha256(folder: Path) -> str:
    """Hash of an adapter's two files, wherever they lie."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
