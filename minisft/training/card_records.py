"""What a finished run left behind, read for its model card (``card.py``).

Every file is read as untrusted: a record that is damaged is one line of an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON, loads
from minisft.common.settings import config_of
from minisft.config import RunConfig
from minisft.training.preference_config import DPOConfig, GRPOConfig
from minisft.training.runlog import read_metrics

KINDS: dict[str, type[RunConfig]] = {"dpo": DPOConfig, "grpo": GRPOConfig, "sft": RunConfig}


@dataclass(frozen=True)
class Records:
    """What a finished run left behind.

    Attributes:
        kind: sft, dpo or grpo.
        run: its settings.
        data, env: ``data.json`` and ``env.json``.
        metrics: the rows of ``metrics.jsonl``.
        state: how far the run had come, from its newest checkpoint.
        weights: the folder of the result.
        base: what the adapter's files have about the base; None for a whole model.
    """

    kind: str
    run: RunConfig
    data: dict[str, JSON]
    env: dict[str, JSON]
    metrics: list[dict[str, JSON]]
    state: dict[str, JSON]
    weights: Path
    base: dict[str, JSON] | None


def read_records(out: Path) -> Records:
    """Read what a run recorded.

    Args:
        out: its folder.

    Returns:
        The records.

    Raises:
        UserError: ``checkpoint/no-result`` for a run without a result; a record that is damaged.
    """
    settings = read_object(out / "config.json")
    kind = next(
        name
        for name, config in KINDS.items()
        if {f.name for f in dataclasses.fields(config)} - _run_fields() <= settings.keys()
    )
    run = config_of(KINDS[kind], dict(settings), visible(out / "config.json"))
    weights = out / ("adapter" if run.method == "lora" else "model")
    if not weights.is_dir():
        raise UserError(
            "checkpoint/no-result", "the run has no result yet", where=visible(out), found=f"no folder {weights.name}",
            fix=f"finish it: minisft {'train' if kind == 'sft' else kind} --out {visible(out)} --resume",
        )  # fmt: skip
    states = sorted(out.glob("checkpoints/step-*/state.json"), key=lambda path: int(path.parent.name.removeprefix("step-")))
    facts = weights / "minisft.json"
    base = read_object(facts).get("base") if run.method == "lora" and facts.exists() else None
    return Records(
        kind, run, read_object(out / "data.json"), read_object(out / "env.json"), read_metrics(out / "metrics.jsonl"),
        read_object(states[-1]) if states else {}, weights, base if isinstance(base, dict) else None,
    )  # fmt: skip


def _run_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(RunConfig)}


def read_object(path: Path) -> dict[str, JSON]:
    """Read the JSON object in a file.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        UserError: ``checkpoint/bad-record``, a file that cannot be read or holds something else.
    """
    try:
        value = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError("checkpoint/bad-record", "a record cannot be read", where=visible(path), found=visible(why)) from None
    if not isinstance(value, dict):
        raise UserError("checkpoint/bad-record", "a record is no object", where=visible(path), found=type(value).__name__)
    return value
