"""``minisft merge``, ``verify`` and ``quantize`` as one call each, with every check that the commands make.

The work is done elsewhere: ``streaming`` merges, ``certificate`` judges, ``verify`` compares, ``formats`` quantizes and writes.
Here stands in which order, and what is refused before minutes are spent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minisft.common.atomic_files import require_new_folder
from minisft.common.errors import UserError, visible
from minisft.config import QuantConfig
from minisft.data.messages import read_dataset
from minisft.effect import Target
from minisft.formats import base_fingerprint, load_model, load_tokenizer, save_quantized
from minisft.formats.hf_write import SavedSizes
from minisft.merging.certificate import ModelReport, Verdict, certify, check, compare_models, judge
from minisft.merging.streaming import Merged, merge_folder
from minisft.merging.verify import Verification, verify


@dataclass(frozen=True)
class Certified:
    """A merge with its certificate.

    Args:
        merged: what was written, layer by layer.
        models: what the unmerged and the merged model answer; None if they were not compared.
        verdict: what the certificate concludes.
    """

    merged: Merged
    models: ModelReport | None
    verdict: Verdict


def merge_and_certify(
    adapter: str | Path,
    out: str | Path,
    model: str | None = None,
    onto: Target = "dequantized",
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    force: bool = False,
    calibration: str | Path | None = None,
    data: str | Path | None = None,
    compare: bool = True,
    log: Callable[[str], object] = str,
) -> Certified:
    """Merge an adapter into a model folder, and write its certificate beside the weights.

    Args:
        adapter, out, model, onto, dtype, scale, force, calibration: as for ``merge_folder``.
        data: rows to compare the models on; a built-in text without them.
        compare: load the unmerged and the merged model and compare their answers.
        log: called with notes about the rows and the tokenizer, and with the summary of the merge before the models are
            compared. (The default, ``str``, does nothing.)

    Returns:
        the merge, the comparison and the verdict.

    Raises:
        UserError: what ``merge_folder`` refuses; rows that cannot be read, before anything is merged.

    Cost: that of ``merge_folder``; with ``compare`` each of the two models in fp32, one at a time.
    """
    out = Path(out)
    require_new_folder(out, Path(model or adapter))
    for path in (data, calibration):
        if path is not None:
            for note in read_dataset(path).notes:
                log(f"{visible(path)}: {note}")
    merged = merge_folder(adapter, out, model, onto, dtype, scale=scale, force=force, calibration=calibration)
    verdict = certify(merged, None)  # should the comparison be interrupted, the certificate is there
    for note in load_tokenizer(merged.files.stored.source.path).notes:  # written beside the weights: its guesses go with them
        log(note)
    log(merged.summary)
    models = check(merged, data) if compare else None
    return Certified(merged, models, certify(merged, models) if models is not None else verdict)


def verify_merge(
    merged: str | Path,
    adapter: str | Path,
    model: str | None = None,
    onto: Target = "dequantized",
    scale: float = 1.0,
    calibration: str | Path | None = None,
    data: str | Path | None = None,
    log: Callable[[str], object] = str,
) -> tuple[Verification, Verdict]:
    """Check that a folder is the merge that it is said to be; raises if it is not.

    Args:
        merged, adapter, model, onto, scale, calibration: as for ``verify``.
        data: rows to compare the models' answers on; without them only tensors are compared, but for ``compensated``.
        log: called with what was found before it is judged. (The default, ``str``, does nothing.)

    Returns:
        what was found tensor by tensor, and the verdict.

    Raises:
        UserError: ``numeric/not-this-merge``; what ``verify`` refuses.
    """
    found = verify(merged, adapter, model, onto, scale, calibration)
    log(found.summary)
    found.require()
    by_answers = data is not None or onto == "compensated"  # there only the answers decide
    models = compare_models(found.files, Path(merged), data) if by_answers else None
    verdict = judge(found.adapted, models, onto)
    if not verdict.good:
        what, fix = "the folder is not this merge", "check --model, --adapter, --scale and --onto, or merge again"
        raise UserError("numeric/not-this-merge", what, where=visible(found.merged), found=str(verdict), fix=fix)
    return found, verdict


def quantize_folder(
    model: str | Path,
    out: str | Path,
    quant: QuantConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    log: Callable[[str], object] = str,
) -> SavedSizes:
    """Write a model whose linears are in 4 bits, as transformers with bitsandbytes loads it.

    Args:
        model: as for ``load_model``.
        out: new, or empty; outside the model's folder.
        quant: form of the 4 bits; NF4 in blocks of 64 with double quantization by default.
        dtype: of what stays dense.
        log: called with notes about the tokenizer. (The default, ``str``, does nothing.)

    Returns:
        sizes, and what was not kept of the base's settings.

    Raises:
        UserError: what ``load_model`` and ``save_quantized`` refuse.
    """
    require_new_folder(Path(out), Path(model))
    loaded, tokenizer = load_model(model, dtype, quant=quant or QuantConfig())
    for note in tokenizer.notes:
        log(note)
    return save_quantized(loaded, tokenizer, out, quantized_from=base_fingerprint(loaded))
