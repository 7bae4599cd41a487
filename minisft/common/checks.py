"""Checks of settings that need no tensor: the command line makes them before PyTorch is loaded, the library makes the same."""

from __future__ import annotations

import math
from pathlib import Path

from minisft.common.atomic_files import require_no_files
from minisft.common.errors import UserError, visible


def require(ok: bool, name: str, found: object, expected: str, fix: str = "") -> None:
    """Refuse a setting unless ``ok``.

    Args:
        ok: whether the setting is all right.
        name: its flag or field.
        found: its value.
        expected: what would have been right.
        fix: what to do.

    Raises:
        UserError: ``config/bad-value``.
    """
    if not ok:
        raise UserError(
            "config/bad-value", "a setting is out of range", where=name, found=visible(found), expected=expected, fix=fix
        )


def check_sampling(temperature: float, top_p: float, top_k: int, prefix: str = "") -> None:
    """Refuse sampling settings that choose no token.

    Args:
        temperature: divides the logits; 0 for the likeliest token.
        top_p: share of the probability that is sampled from.
        top_k: how many tokens are sampled from; 0 for all.
        prefix: how the caller's settings begin: ``--`` for flags.

    Raises:
        UserError: ``config/bad-value``.
    """
    finite = math.isfinite(temperature) and temperature >= 0
    require(finite, f"{prefix}temperature", temperature, "zero or more", "0 takes the likeliest token, 1 samples as it is")
    name = "top-p" if prefix else "top_p"
    require(0 < top_p <= 1, prefix + name, top_p, "a share in (0, 1]", "1 keeps every token")
    name = "top-k" if prefix else "top_k"
    require(top_k >= 0, prefix + name, top_k, "zero (off) or more", "0 keeps every token")


def check_calibration(onto: str, calibration: str | Path | None) -> None:
    """Refuse ``compensated`` without text, and text that nothing would read.

    Raises:
        UserError: ``config/no-calibration``, ``config/unused-calibration``.
    """
    if onto == "compensated" and calibration is None:
        raise UserError(
            "config/no-calibration",
            "codes are fitted to text, and none is given",
            where="--onto compensated",
            expected="--calibration F.jsonl",
            fix="give rows like those that the model will be asked, for instance some of those it was trained on",
        )
    if onto != "compensated" and calibration is not None:
        raise UserError(
            "config/unused-calibration",
            "only codes that are fitted need text",
            where="--calibration",
            found=f"--onto {onto}",
            fix="give --onto compensated, or leave --calibration away",
        )


def check_comparison(energy: float, threshold: float, top: int) -> None:
    """Refuse settings out of range for the comparison of two models, see ``merging.diff.diff_models``.

    Args:
        energy: in (0, 1].
        threshold: in (0, 1].
        top: at least 1.

    Raises:
        UserError: ``config/bad-value``.
    """
    require(0 < energy <= 1, "--energy", energy, "a share in (0, 1]", "0.9 is usual")
    require(0 < threshold <= 1, "--threshold", threshold, "a cosine in (0, 1]", "0.6 is usual")
    require(top >= 1, "--top", top, "at least 1", "10 is usual")


def check_export(
    out: str | Path, model: str | None, adapter: str | Path | None, adapter_only: bool, outtype: str
) -> tuple[Path, Path, Path]:
    """Refuse an export that cannot be meant, before anything is read.

    Args:
        out: the GGUF file.
        model, adapter, adapter_only, outtype: as for ``export_gguf``.

    Returns:
        the files to write: golden answers, Modelfile, and the GGUF file last.

    Raises:
        UserError: ``config/...``.
    """
    path = Path(out)
    require(path.suffix == ".gguf", "--out", out, "a file F.gguf", "for instance --out model.gguf")
    if model is None and adapter is None:
        raise UserError("config/missing", "nothing to export", expected="--model or --adapter", fix="give one of them")
    if adapter_only:
        require(adapter is not None, "--adapter-only", "no adapter", "--adapter DIR", "give --adapter DIR")
        fix = "--outtype f16; in other types llama.cpp cannot merge it"
        require(outtype in ("f32", "f16"), "--outtype", outtype, "f32 or f16 for an adapter alone", fix)
    names = path.with_suffix(".golden.json"), path.with_suffix(".Modelfile"), path
    require_no_files(names)
    return names
