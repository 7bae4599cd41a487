"""``minisft export --format peft --plain``: the same adapter in the one form that every reader of PEFT's layout gets right.

vLLM drops the keys of ``adapter_config.json`` that it does not know and computes one scale, alpha / r, for all modules: ranks
and alphas by pattern are silently wrong there. So here all modules have one rank (smaller ones are filled up with zeros),
alpha is that rank, and each module's own scaling is multiplied into B. What is refused: DoRA, and a rank that a small layer
cannot have. No base is needed.

Ref: vLLM, ``vllm/lora/peft_helper.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F

from minisft.common.atomic_files import disk_errors, require_new_folder, staged_folder
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.formats.adapter import TEMPLATE_FILE, WEIGHTS_FILE, named_base, recorded_base, write_adapter_files
from minisft.formats.adapter_config import config_of_modules
from minisft.formats.source import file_sha256, regular_file
from minisft.merging.combine import Update
from minisft.merging.combine_files import named_factors, read_stored

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be; 16 if it is not given


@dataclass(frozen=True)
class ExportedPEFT:
    """What ``export_peft`` has written: a folder whose modules all have this rank and the scale 1."""

    out: Path
    num_modules: int
    rank: int

    @property
    def served_with(self) -> str:
        """The words that vLLM needs for this rank, for people."""
        fits = next((rank for rank in SERVER_RANKS if rank >= self.rank), None)
        if fits is None:
            return f"vLLM takes ranks up to {SERVER_RANKS[-1]}: lower it with minisft combine --rank"
        return f"vllm serve BASE --enable-lora --max-lora-rank {fits} --lora-modules NAME={self.out}"


def export_peft(adapter: str | Path, out: str | Path, outtype: Literal["f32", "bf16"] = "f32") -> ExportedPEFT:
    """Write an adapter with one rank, one scale and no patterns; its effect is that of the original up to one rounding of B.

    Args:
        adapter: PEFT's layout, ours or theirs.
        out: new, or empty.
        outtype: of the factors.

    Returns:
        what was written.

    Raises:
        UserError: what ``read_stored`` refuses, DoRA among it; ``adapter/rank``; a target that is in use.
    """
    folder, out = Path(adapter), Path(out)
    require_new_folder(out, folder)
    stored = read_stored(folder)
    rank = max(update.rank for update in stored.updates.values())
    _check_rank(stored.updates, rank, folder)
    plain = {path: plain_update(update, rank) for path, update in stored.updates.items()}
    tensors = {name: factor.to(DTYPES[outtype]) for name, factor in named_factors(plain).items()}
    paths = sorted(plain)
    config = config_of_modules(dict.fromkeys(paths, rank), dict.fromkeys(paths, float(rank)), [*paths], named_base(folder))
    facts: dict[str, JSON] = {"plain_form_of": {"adapter": str(folder), "sha256": file_sha256(folder / WEIGHTS_FILE)}}
    recorded, template = recorded_base(folder), None
    base = None if recorded is None else cast("dict[str, JSON]", recorded.values)
    if (folder / TEMPLATE_FILE).exists():
        template = regular_file(folder, TEMPLATE_FILE, "adapter/bad-file").read_bytes()
    with disk_errors(out, sum(t.numel() * t.element_size() for t in tensors.values())), staged_folder(out) as staging:
        write_adapter_files(staging, config, tensors, facts, base, template)
    return ExportedPEFT(out, len(paths), rank)


def plain_update(update: Update, rank: int) -> Update:
    """A and scaling * B, filled up with zeros to ``rank``, fp32; B is rounded once, from fp64. The scaling is then 1."""
    missing = rank - update.rank
    A = F.pad(update.A.float(), (0, 0, 0, missing))
    B = F.pad((update.B.double() * update.scaling).float(), (0, missing))
    return Update(A, B, float(rank), is_embedding=update.is_embedding)


def _check_rank(updates: Mapping[str, Update], rank: int, folder: Path) -> None:
    for path, update in updates.items():
        if rank > min(update.A.shape[1], update.B.shape[0]):
            raise UserError(
                "adapter/rank", f"one rank for all modules does not fit {visible(path)}", where=visible(folder),
                found=f"rank {rank}", expected=f"at most {min(update.A.shape[1], update.B.shape[0])}",
                fix="bring the largest rank down first: minisft combine --adapter DIR --rank R --out D, and export D",
            )  # fmt: skip
