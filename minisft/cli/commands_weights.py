"""The commands that make new weights: ``quantize``, ``merge`` and ``combine``; and ``verify``, which checks some.

Each is a few lines over the modules below; see ``cli.main`` for errors and output.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.cli.commands_export import verify_gguf_command
from minisft.cli.libraries import load_libraries
from minisft.common.atomic_files import require_new_folder
from minisft.common.errors import UserError, visible
from minisft.config import QuantConfig

if TYPE_CHECKING:
    from minisft.merging.combine import Combined


def quantize_command(arguments: argparse.Namespace) -> int:
    """Write a model whose linears are in 4 bits."""
    quant = QuantConfig(block_size=arguments.block_size, double_quant=arguments.double_quant)
    require_new_folder(Path(arguments.out), Path(arguments.model))  # before PyTorch is loaded, which takes seconds
    load_libraries()
    from minisft.common.device import DTYPES
    from minisft.formats.base_settings import not_kept
    from minisft.merging.certified import quantize_folder

    sizes = quantize_folder(arguments.model, arguments.out, quant, DTYPES[arguments.dtype], log=print)
    print(
        f"{visible(arguments.out)}: {sizes.num_quantized} linears in 4 bits, {sizes.num_dense} dense; "
        f"{sizes.dense_bytes / 1e6:,.1f} MB in {arguments.dtype}, {sizes.stored_bytes / 1e6:,.1f} MB as stored"
        + not_kept(sizes.not_kept)
    )
    return 0


def merge_command(arguments: argparse.Namespace) -> int:
    """Write a model with the adapter in its weights, and the certificate beside them."""
    require_new_folder(Path(arguments.out), Path(arguments.model or arguments.adapter))
    load_libraries()
    from minisft.common.device import DTYPES
    from minisft.merging.certificate import REPORT
    from minisft.merging.certified import merge_and_certify

    found = merge_and_certify(
        arguments.adapter,
        arguments.out,
        arguments.model,
        arguments.onto,
        DTYPES.get(arguments.dtype),  # None: auto
        arguments.scale,
        arguments.force,
        arguments.calibration,
        arguments.data,
        arguments.check,
        log=print,
    )
    compared = "" if found.models is not None else ", the models were not compared"
    print(f"{found.verdict}{compared}; {visible(Path(arguments.out) / REPORT)}")
    return 0


def combine_command(arguments: argparse.Namespace) -> int:
    """Write one adapter that is a weighted sum of several."""
    out, adapters = Path(arguments.out), [_weighted(word) for word in arguments.adapter]
    load_libraries()
    from minisft.merging.combine_files import combine_folders

    combined = combine_folders(adapters, out, arguments.rank)
    ranks = sorted({update.rank for update in combined.updates.values()})
    shown = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    print(f"{visible(out)}: {len(combined.updates)} modules of {shown}, {_loss_words(combined)}")
    return 0


def _weighted(word: str) -> tuple[str, float]:
    """``DIR:WEIGHT`` or ``DIR``, whose name may hold a colon too."""
    folder, colon, weight = word.rpartition(":")
    if not colon or Path(word).is_dir():
        return word, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise UserError(
            "config/bad-value", "an adapter's weight is no number", where="--adapter", found=visible(word),
            expected="DIR or DIR:WEIGHT", fix="write the weight as a number, for instance runs/a/adapter:0.5",
        ) from None  # fmt: skip


def _loss_words(combined: Combined) -> str:
    if not combined.errors:
        return "the exact sum"
    worst = max(combined.errors, key=lambda path: combined.errors[path])
    most = f"at most {combined.errors[worst]:.3g} in {visible(worst)}"
    return f"the nearest of this rank: relative error {combined.error:.3g} in all, {most}"


def verify_command(arguments: argparse.Namespace) -> int:
    """Check that a folder is the merge that it is said to be, or ask llama.cpp about an exported file."""
    if arguments.gguf is not None:
        return verify_gguf_command(arguments)
    if arguments.base is not None:
        fix = "give --gguf F.gguf, or the base of a merge with --model"
        raise UserError("config/usage", "--base goes with --gguf", where="minisft verify", found="--base", fix=fix)
    if missing := [flag for flag in ("merged", "adapter") if getattr(arguments, flag) is None]:
        fix = "give --merged DIR and --adapter DIR, or --gguf F.gguf"
        raise UserError("config/usage", "nothing to check", where="minisft verify", expected=f"--{missing[0]}", fix=fix)
    load_libraries()
    from minisft.merging.certified import verify_merge

    _, verdict = verify_merge(
        arguments.merged,
        arguments.adapter,
        arguments.model,
        arguments.onto,
        arguments.scale,
        arguments.calibration,
        arguments.data,
        log=print,
    )
    print(verdict)
    return 0
