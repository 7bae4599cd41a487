"""``minisft card``: a model card of a run, ``README.md`` beside its weights, with the head that the hub reads.

Everything in it was recorded by the run (settings, rows, ``metrics.jsonl``, versions) or by ``minisft eval`` (the results that
are given). Nothing is estimated, and what is not known is said to be not known: the license is the user's to state, and
of files only the name and the SHA-256 are shown, never a path. Uploading stays with the hub's own client.

Ref: the hub's model cards, https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minisft.common.atomic_files import disk_errors, write_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.formats.source import file_sha256
from minisft.training.card_records import Records, read_object, read_records
from minisft.training.task_metric import ROWS

CARD = "README.md"
SHOWN = ("method", "rank", "alpha", "targets", "quant", "schedule", "batch_size", "max_length", "dtype", "seed")  # always
NOT_SHOWN = (
    "model", "data", "eval_data", "replay", "template", "init_adapter", "out", "reward", "lr", "steps", "epochs", "map",
    "report", "cache", "log_every", "keep_last", "save_every", "device", "micro_batch_size", "checkpointing", "strict",
    "add_tokens",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
COUNTED = {
    "rows": "rows", "tokens": "tokens", "supervised_tokens": "supervised tokens", "longest_row": "longest row in tokens",
    "median_row": "median row in tokens",
}  # fmt: skip


def write_card(
    out: str | Path,
    license_id: str | None = None,
    base_model: str | None = None,
    results: Sequence[str | Path] = (),
    force: bool = False,
) -> Path:
    """Write the card of a finished run beside its weights.

    Args:
        out: the run's folder.
        license_id: the hub's name of a license, such as ``apache-2.0``; None leaves the field out.
        base_model: hub id of the base; None takes the run's own where it is one.
        results: what ``minisft eval`` wrote (``F.json``), to be shown.
        force: replace a card that is there.

    Returns:
        The card's path, in the folder of the weights.

    Raises:
        UserError: no finished run, records or results that cannot be read, a card that is there already.
    """
    for text, pattern, where, fix in (
        (license_id, LICENSE_ID, "--license", "the hub's identifier, such as apache-2.0, mit or other"),
        (base_model, HUB_ID, "--base-model", "owner/name, as on the hub"),
    ):
        if text is not None and not pattern.fullmatch(text):
            raise UserError(
                "config/bad-value", "the hub would refuse this", where=where, found=visible(text), expected=fix, fix=fix
            )
    records = read_records(Path(out))
    path = records.weights / CARD
    if path.exists() and not force:
        raise UserError(
            "config/out-exists", "there is a card already", where=visible(path), found=f"{path.stat().st_size:,} bytes",
            expected="none", fix="--force replaces it",
        )  # fmt: skip
    text = render(records, license_id, base_model, [(Path(name), read_object(Path(name))) for name in results])
    with disk_errors(path, len(text)):
        write_durably(path, text.encode("utf-8", "backslashreplace"))
    return path


# ---- the text ---------------------------------------------------------------------------------------------------------------


def render(
    records: Records, license_id: str | None, base_model: str | None, results: Sequence[tuple[Path, Mapping[str, JSON]]]
) -> str:
    """The card.

    Args:
        records: what the run recorded.
        license_id, base_model: as for ``write_card``.
        results: files of ``minisft eval`` and what stands in them.

    Returns:
        Markdown with a YAML head.
    """
    run, name = records.run, records.weights.absolute().parent.name or "run"
    named = base_model or (run.model if HUB_ID.fullmatch(run.model) and not Path(run.model).exists() else None)
    what = {"sft": "supervised fine-tuning", "dpo": "DPO on preference pairs", "grpo": "GRPO on its own answers"}[records.kind]
    form = "A LoRA adapter" if run.method == "lora" else "A whole model"
    parts = [
        *_head(records, license_id, named),
        f"# {_plain(name)}",
        f"{form} for {_code(named or Path(run.model).name)}, made by {what} with minisft {_version(records)}.",
        *_section("Results", [*_validation(records), *_results(results)]),
        *_section("Training data", _data(records)),
        *_section("Training", _training(records)),
        *_section("Limits", [f"- {text}" for text in _limits(records, license_id, bool(results))]),
    ]
    return "\n".join(parts) + "\n"


def _head(records: Records, license_id: str | None, base_model: str | None) -> Iterator[str]:
    """YAML; every value is JSON, which YAML reads."""
    run = records.run
    adapter = run.method == "lora"
    fields: dict[str, JSON] = {
        **({"base_model": base_model} if base_model else {}),
        **({"base_model_relation": "adapter" if adapter else "finetune"} if base_model else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        **({"license": license_id} if license_id else {}),
        "tags": ["minisft", records.kind, *(["lora"] if adapter else []), *(["qlora"] if run.quant != "none" else [])],
        "data_sha256": {part: fact.get("sha256") for part, fact in _facts(records)},
    }
    yield from ("---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---", "")


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", f"## {title}", "", *lines)


def _validation(records: Records) -> list[str]:
    """What the run measured at the step that was kept."""
    kept = _kept_step(records)
    row = next((row for row in records.metrics if row.get("step") == kept), {})
    numbers = {key: value for key, value in row.items() if key.startswith("eval_") and _is_number(value)}
    if not numbers:
        return ["The run validated on no rows: there is no score of this step."]
    scored = f"the first {records.run.eval_rows or ROWS} of them at most, for answers" if records.run.eval_metric else ""
    said = (
        f"Step {kept} of {_last_step(records)}, on rows held out ({_of_validation(records)}{'; ' if scored else ''}{scored}):"
    )
    return [said, "", *_table(("measured in training", "value"), [(_code(k), _number(v)) for k, v in numbers.items()])]


def _of_validation(records: Records) -> str:
    rows = next((fact.get("rows") for part, fact in _facts(records) if part == "validation"), None)
    return f"{rows} rows" if _is_number(rows) else "their number was not recorded"


def _results(results: Sequence[tuple[Path, Mapping[str, JSON]]]) -> Iterator[str]:
    if not results:
        return
    rows = []
    for path, head in results:
        score, n, metric = head.get("score"), head.get("n"), head.get("metric")
        if not (_is_number(score) and isinstance(n, int) and isinstance(metric, str)):
            raise UserError(
                "config/bad-result", "this is no result of minisft eval", where=visible(path), found=visible(list(head), 120),
                expected="score, n and metric", fix="give the F.json that minisft eval --out F.json wrote",
            )  # fmt: skip
        bounds = head.get("interval_95")
        interval = " to ".join(map(_number, bounds)) if isinstance(bounds, list) else "not given"
        form, decoding = head.get("form", "not recorded"), head.get("decoding", "not recorded")
        rows.append(
            (_code(metric), _number(score), interval, str(n), _code(form), _plain(decoding), _code(path.name), _sha(path))
        )
    heads = ("metric", "score", "95 % interval", "rows", "data", "decoding", "file", "its SHA-256")
    yield from ("", "Results of `minisft eval`:", "", *_table(heads, rows))


def _data(records: Records) -> list[str]:
    rows = []
    for part, fact in _facts(records):
        names = ", ".join(_code(Path(name).name) for name in str(fact.get("path", "not recorded")).split(", "))
        counts = [f"{fact[key]:,} {words}" for key, words in COUNTED.items() if _is_number(fact.get(key))]
        rows.append((part, names, _code(fact.get("sha256")), "; ".join(counts) or "not recorded"))
    changed = [
        f"- {part}: {number:,} {_plain(str(key).replace('_', ' '))}"
        for part, fact in _facts(records)
        for key, number in _inner(fact, "encoding_counts").items()
        if _is_number(number) and number
    ]
    return [
        *_table(("part", "file", "SHA-256 of the rows' file", "what was used"), rows),
        *(["", "What encoding did to the rows:", "", *changed] if changed else []),
    ]


def _training(records: Records) -> list[str]:
    run, settings = records.run, []
    own = {field.name: field.default for field in dataclasses.fields(run)}
    for name, default in own.items():
        value = getattr(run, name)
        if name in SHOWN or (name not in NOT_SHOWN and value != default):
            settings.append((_code(name), _code(" ".join(map(str, value)) if isinstance(value, tuple) else value)))
    tokens, targets = (sum(int(str(row.get(key) or 0)) for row in records.metrics) for key in ("tokens", "supervised_tokens"))
    memory = max((int(str(row.get("peak_memory_bytes") or 0)) for row in records.metrics), default=0)
    facts = [
        ("optimizer steps", f"{_last_step(records):,}"),
        ("step of the weights", f"{_kept_step(records):,}"),
        ("tokens computed", f"{tokens:,}"),
        ("of them supervised", f"{targets:,}"),
        ("peak learning rate", f"{run.peak_lr:g}"),
        ("most memory used", f"{memory / 2**20:,.0f} MiB" if memory else "not recorded"),
        *(
            (_plain(key), _code(value))
            for key, value in records.env.items()
            if key in ("python", "platform", "device", "threads")
        ),
        *((_plain(key), _code(value)) for key, value in _inner(records.env, "packages").items() if value is not None),
    ]
    if records.base is not None:
        facts.append(("fingerprint of the base's weights", _code(records.base.get("fingerprint") or "not recorded")))
    return [*_table(("setting", "value"), settings), "", *_table(("recorded", "value"), facts)]


def _limits(records: Records, license_id: str | None, is_scored: bool) -> Iterator[str]:
    run = records.run
    if license_id is None:
        yield "License: not stated here. The base model's and the data's terms apply; the run does not know them."
    if _kept_step(records) != _last_step(records) or run.patience is not None:
        yield "The rows held out also chose the step, so its numbers on them are a little too good."
    if not is_scored:
        yield "No task score from `minisft eval` was given: how well the answers are is not known from this card."
    yield "Nothing but the numbers above was measured: other tasks, other languages and safety are not known."
    yield f"Rows were at most {run.max_length:,} tokens long in training."
    if run.quant != "none":
        yield f"Trained on a base in 4 bits ({run.quant}): on the dense base its answers can differ."
    if records.kind == "sft" and run.replay is None:
        yield "No other data was replayed in training: what the base knew may have been lost in part."


def _facts(records: Records) -> list[tuple[str, dict[str, JSON]]]:
    return [(part, fact) for part, fact in records.data.items() if isinstance(fact, dict) and "sha256" in fact]


def _last_step(records: Records) -> int:
    return max((int(str(row["step"])) for row in records.metrics if _is_number(row.get("step"))), default=0)


def _kept_step(records: Records) -> int:
    """The step whose weights are the result: the best validated one, or the last."""
    best = records.state.get("best_step")
    return best if isinstance(best, int) else _last_step(records)


def _version(records: Records) -> str:
    return _plain(_inner(records.env, "packages").get("minisft") or "of a version that was not recorded")


def _inner(value: Mapping[str, JSON], key: str) -> dict[str, JSON]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.6g}" if _is_number(value) else "not recorded"


def _sha(path: Path) -> str:
    return _code(file_sha256(path)[:16])


def _plain(value: object) -> str:
    """Text that is no Markdown and no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", visible(value))


def _code(value: object) -> str:
    """A code span in a table's cell."""
    return "`" + visible(value).replace("`", "'").replace("|", "\\|") + "`"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
