"""The certificate of a merge: its error, layer by layer and in what the model answers.

``merge_report.json`` for programs, ``merge_report.html`` for people (one page, no network) and ``merge_report.svg``. The
layers are measured while they are merged. The model is measured afterwards: the unmerged model and the written folder are
loaded one after the other, read the same text, and their answers are compared. The yardstick is the adapter itself: the
merge must move the model by much less than the adapter does. Codes that were fitted to answers are judged by answers alone.

The idea to take home: a verdict is worth its number. Each one names the number that decided it and the limit it was held to.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.common.atomic_files import FileRecord, disk_errors, write_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.encoding import encode_dataset
from minisft.data.messages import Example, read_dataset
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.effect import SURVIVAL_FLOOR, LayerReport, Target
from minisft.evaluation.evaluate import evaluate
from minisft.formats import load_model
from minisft.formats.source import file_sha256, fingerprint
from minisft.merging.base_and_adapter import AdaptedFiles, load_unmerged, template_of
from minisft.merging.report_html import draw_layers, page
from minisft.merging.streaming import Merged
from minisft.model import CausalLM
from minisft.surgery import adapters_off

REPORT, PAGE, PLOT = "merge_report.json", "merge_report.html", "merge_report.svg"
MAX_POSITIONS = 256  # their logits are kept: 50 MB for a vocabulary of 49 152
MAX_ROWS = 200  # of the data, for the loss
EXACT = 1e-3  # effect error of a merge whose rounding nobody can measure in an answer; fp32 reaches it, 16 bits do not
# KL of the merge as a share of the adapter's own. It grows with the square of a change, so this is what losing as much of
# the update as ``SURVIVAL_FLOOR`` allows comes to.
MOVED_LIMIT = (1 - SURVIVAL_FLOOR) ** 2
SMALL_KL = 1e-4  # nats; below this nobody sees a difference, whatever the share is

# Held-out text of our own, for a merge without --data: prose, numbers, code, a list, a dialogue, another language.
SENTENCES = (
    "The ferry leaves the old harbour at seven, and by noon the island's only lane smells of bread and tar.",
    "If 3 boxes weigh 12.6 kg together and each holds 4 jars, one jar weighs a little over a kilogram.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2.0))",
    "Shopping list: two lemons, a bag of flour, candles, the blue paint that Marta asked for, and string.",
    "\u201cDid you lock the gate?\u201d she asked. \u201cTwice,\u201d he said, \u201cand then I went back to look.\u201d",
    "Der Zug nach Freiburg hat heute zehn Minuten Versp\u00e4tung; bitte achten Sie auf die Anzeige am Gleis.",
)


@dataclass(frozen=True)
class Verdict:
    """One of ``VERDICTS`` and the number that decided it."""

    words: str
    number: str
    value: float
    limit: float
    where: str = ""

    @property
    def good(self) -> bool:
        """Whether the merged model is the one that was trained, up to rounding."""
        return self.words.startswith("equivalent")

    def __str__(self) -> str:
        at = f" in {visible(self.where)}" if self.where else ""
        return f"{self.words} ({self.number} {self.value:.3g}{at}, limit {self.limit:.3g})"


VERDICTS = ("equivalent", "equivalent up to rounding", "different model", "adapter lost", "not compared")


@dataclass(frozen=True)
class ModelReport:
    """What the models answer, at ``positions`` positions of held-out text. Divergences are in nats, logits in fp32.

    Attributes:
        text: ``built-in``, or the data file.
        kl_mean, kl_max: KL(unmerged || merged) of the next token.
        adapter_kl_mean: KL(unmerged || base), what the adapter itself does there.
        logit_max: largest difference of a logit, unmerged against merged.
        same_choice: share of positions where both would take the same token.
        files_intact: whether the weight files, read back, have the sha256 of what was computed; None if that is not known.
        loss_unmerged, loss_merged: per supervised token of the data.
    """

    text: str
    positions: int
    kl_mean: float
    kl_max: float
    adapter_kl_mean: float
    logit_max: float
    same_choice: float
    files_intact: bool | None = None
    loss_unmerged: float | None = None
    loss_merged: float | None = None

    @property
    def moved(self) -> float:
        """How far the merge moved the model, as a share of how far the adapter does."""
        return self.kl_mean / self.adapter_kl_mean if self.adapter_kl_mean else float("inf")


# ---- what the models answer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """Rows of ids, and the positions in each whose next token is compared."""

    name: str
    rows: list[tuple[list[int], list[int]]]
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class _Answers:
    logits: Tensor
    loss: float | None


def compare_models(
    files: AdaptedFiles, merged: Path, data: str | Path | None = None, records: Mapping[str, FileRecord] | None = None
) -> ModelReport:
    """Load the unmerged model and then the merged folder, both computing in fp32, and compare what they answer.

    Args:
        records: what the weight files of the merged folder should be, if that is known.
        data: rows as for training; without it ``SENTENCES`` are read.
        files: the base and its adapter.
        merged: the merged folder.

    Returns:
        how far their answers differ, and from what the adapter does.

    Raises:
        UserError: what ``load_model`` and ``read_dataset`` refuse.

    Cost: one of the two models at a time, and the logits of at most ``MAX_POSITIONS`` positions three times.
    """
    unmerged, tokenizer = load_unmerged(files)
    template = template_of(files, tokenizer) if data is not None else None
    text = _built_in(tokenizer) if template is None or data is None else _from_data(tokenizer, template, Path(data), unmerged)
    before = _answers(unmerged, tokenizer, template, text)
    with adapters_off(unmerged):
        base = _logits(unmerged, text)
    del unmerged
    gc.collect()  # modules and their hooks form circles, and two models at once may not fit
    reloaded, tokenizer = load_model(merged)
    after = _answers(reloaded, tokenizer, template, text)
    intact = all(file_sha256(merged / name) == record.sha256 for name, record in records.items()) if records else None
    return _compared(text, before, base, after, intact)


def _built_in(tokenizer: Tokenizer) -> _Text:
    rows = []
    left = MAX_POSITIONS
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)[: left + 1]
        rows.append((ids, list(range(len(ids) - 1))))
        left -= len(ids) - 1
    return _Text("built-in", [row for row in rows if row[1]])


def _from_data(tokenizer: Tokenizer, template: ChatTemplate, path: Path, model: CausalLM) -> _Text:
    """The first supervised positions of the data, encoded as training does."""
    examples = read_dataset(path).examples[:MAX_ROWS]
    encoded = encode_dataset(examples, tokenizer, template, model.config.max_position_embeddings, path=str(path)).rows
    rows = []
    left = MAX_POSITIONS
    for row in encoded:
        positions = [i - 1 for i, wanted in enumerate(row.supervised) if wanted and i > 0][:left]
        left -= len(positions)
        if positions:
            rows.append((row.input_ids[: positions[-1] + 1], positions))
    if not rows:
        raise UserError(
            "data/no-targets", "no token of the data is supervised", where=visible(path), found=f"{len(examples)} rows"
        )
    return _Text(str(path), rows, examples)


def _answers(model: CausalLM, tokenizer: Tokenizer, template: ChatTemplate | None, text: _Text) -> _Answers:
    model.eval()
    loss = None
    if text.examples and template is not None:
        loss = evaluate(model, tokenizer, template, text.examples, "loss").score
    return _Answers(_logits(model, text), loss)


@torch.inference_mode()
def _logits(model: CausalLM, text: _Text) -> Tensor:
    """(positions, V) fp32."""
    model.eval()
    found = [model.head(model.hidden(torch.tensor([ids]))[0, positions]) for ids, positions in text.rows]
    return torch.cat(found).float()


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, (positions, V) twice -> (positions,), in fp64."""
    rows = []
    for p_row, q_row in zip(p_logits.double(), q_logits.double(), strict=True):
        p, q = p_row.log_softmax(0), q_row.log_softmax(0)
        rows.append((p.exp() * (p - q)).sum().clamp(min=0))
    return torch.stack(rows)


def _compared(text: _Text, before: _Answers, base: Tensor, after: _Answers, intact: bool | None) -> ModelReport:
    kl = kl_divergence(before.logits, after.logits)
    return ModelReport(
        text=text.name,
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        adapter_kl_mean=float(kl_divergence(before.logits, base).mean()),
        logit_max=float((before.logits - after.logits).abs().max()),
        same_choice=float((before.logits.argmax(1) == after.logits.argmax(1)).double().mean()),
        files_intact=intact,
        loss_unmerged=before.loss,
        loss_merged=after.loss,
    )


# ---- the verdict -----------------------------------------------------------------------------------------------------


def judge(layers: Sequence[LayerReport], model: ModelReport | None, onto: Target = "dequantized") -> Verdict:
    """The first of these that holds: lost in a layer, another base, damaged or moved as a model, rounded, equivalent.

    Args:
        layers: effects of the adapted layers.
        model: how the answers compare; None if they were not compared.
        onto: what the merge was onto.

    Returns:
        the verdict, with the number that decided it.
    """
    if onto == "compensated":
        return _judge_answers(model)
    lost = min(layers, key=lambda layer: layer.survival)
    if lost.survival < SURVIVAL_FLOOR:
        return Verdict("adapter lost", "survival", lost.survival, SURVIVAL_FLOOR, lost.path)
    shifted = max(layers, key=lambda layer: layer.base_shift)
    if shifted.base_shift > 0:
        return Verdict("different model", "base shift", shifted.base_shift, 0.0, shifted.path)
    if model is not None and model.files_intact is False:
        return Verdict("different model", "files that differ from what was computed", 1.0, 0.0)
    if model is not None and model.kl_mean > SMALL_KL:
        words = "different model" if model.moved > MOVED_LIMIT else "equivalent up to rounding"
        return Verdict(words, "KL of the merge / KL of the adapter", model.moved, MOVED_LIMIT)
    worst = max(layers, key=lambda layer: layer.effect_error)
    words = "equivalent" if worst.effect_error <= EXACT else "equivalent up to rounding"
    return Verdict(words, "effect error", worst.effect_error, EXACT, worst.path)


def _judge_answers(model: ModelReport | None) -> Verdict:
    """Codes that were fitted to answers: many different W' give nearly the same, so the weights decide nothing."""
    if model is None:
        return Verdict("not compared", "positions compared", 0.0, 1.0)
    kept = model.kl_mean <= SMALL_KL or model.moved <= MOVED_LIMIT
    words = "equivalent up to rounding" if kept else "different model"
    return Verdict(words, "KL of the merge / KL of the adapter", model.moved, MOVED_LIMIT)


# ---- files -----------------------------------------------------------------------------------------------------------


def check(merged: Merged, data: str | Path | None = None) -> ModelReport | None:
    """``compare_models`` for what was just merged; None, with a warning, where the models do not fit into memory."""
    try:
        return compare_models(merged.files, merged.out, data, merged.records)
    except UserError as error:
        if error.code != "model/too-large":
            raise
        warnings.warn("the models were not compared: they do not fit into memory", stacklevel=2)
        return None


def certify(merged: Merged, model: ModelReport | None) -> Verdict:
    """Write the three files into the merged folder; call it again when more is known.

    Args:
        model: None if the models were not compared; the files then state that.

    Raises:
        UserError: the disk.
    """
    verdict = judge(merged.report.layers, model, merged.report.onto)
    layers = _layers(merged)
    content = report_json(merged, layers, model, verdict)
    svg = draw_layers(layers)
    with disk_errors(merged.out):
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        write_durably(merged.out / REPORT, text.encode())
        write_durably(merged.out / PLOT, svg)
        write_durably(merged.out / PAGE, page(content, svg.decode()).encode())
    return verdict


def report_json(
    merged: Merged, layers: Sequence[Mapping[str, JSON]], model: ModelReport | None, verdict: Verdict
) -> dict[str, JSON]:
    """The content of ``merge_report.json``.

    Args:
        merged: the merge.
        layers: a row each.
        model: how the answers compare; None if they were not compared.
        verdict: what the certificate concludes.

    Returns:
        a JSON object; infinities are text.
    """
    files, fitted = merged.files, merged.compensation
    source = files.stored.source
    method: dict[str, JSON] = {}
    if fitted is not None:
        method = {"way": fitted.method, "calibration": merged.calibration, "calibration_tokens": fitted.num_tokens}
    return {
        "adapter": {"folder": str(files.folder), "sha256": files.digest, "scale": files.scale},
        "base": {
            "name": source.name,
            "fingerprint": fingerprint(source.path),
            "file_dtype": files.stored.file_dtype,
            "in_training": files.held,
        },
        "merged": {
            "onto": merged.onto_words,
            **method,
            "dtype": merged.dtype_name,
            "files": {name: record.sha256 for name, record in merged.records.items()},
        },
        "verdict": _numbers(dataclasses.asdict(verdict)),
        "layers": [dict(layer) for layer in layers],
        "model": "not checked" if model is None else _numbers(dataclasses.asdict(model)),
    }


def _layers(merged: Merged) -> list[dict[str, JSON]]:
    """One row a layer; fitted ones have the errors of their outputs as well."""
    rows = [dataclasses.asdict(layer) for layer in merged.report.layers]
    if merged.compensation is not None:
        for row, layer in zip(rows, merged.compensation.layers, strict=True):
            row |= {"output_error": layer.output_error, "plain_output_error": layer.plain_output_error, "moved": layer.moved}
    return [_numbers(row) for row in rows]


def _numbers(values: dict[str, JSON]) -> dict[str, JSON]:
    """JSON has no infinity: such a number becomes text."""
    return {
        key: str(value) if isinstance(value, float) and abs(value) == float("inf") else value for key, value in values.items()
    }
