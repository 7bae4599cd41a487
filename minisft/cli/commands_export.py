"""``export``, and ``verify --gguf``: files for other programs, and what an installed llama.cpp makes of them.

Each is a few lines over the modules below; see ``cli.main`` for errors and output.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minisft.cli.libraries import load_libraries
from minisft.common.atomic_files import require_new_folder
from minisft.common.checks import check_export, require
from minisft.common.errors import visible
from minisft.common.extras import require_extra

if TYPE_CHECKING:
    from minisft.formats.gguf_types import OutType


def export_command(arguments: argparse.Namespace) -> int:
    """Write a GGUF file, or with ``--format peft --plain`` an adapter folder."""
    return _peft(arguments) if arguments.format == "peft" else _gguf(arguments)


def _gguf(arguments: argparse.Namespace) -> int:
    require(not arguments.plain, "--plain", "with --format gguf", "--format peft", "leave --plain away: GGUF has no other form")
    outtype: OutType = arguments.outtype or "f16"
    check_export(arguments.out, arguments.model, arguments.adapter, arguments.adapter_only, outtype)
    load_libraries()
    from minisft.merging.export_gguf import export_gguf

    done = export_gguf(
        arguments.out,
        arguments.model,
        arguments.adapter,
        adapter_only=arguments.adapter_only,
        outtype=outtype,
        ollama=arguments.ollama,
        compare=arguments.check,
        log=print,
    )
    half = f", {done.kept_16} matrices as f16 (rows no multiple of 32)" if done.kept_16 else ""
    merged = "" if done.report is None else f"; merged, survival at least {done.report.survival:.4f}"
    verdict = "" if done.verdict is None else f", {done.verdict}"
    beside = [visible(path.name) for path in (done.golden, done.modelfile) if path is not None]
    also = f"; beside it {' and '.join(beside)}" if beside else ""
    print(
        f"{visible(done.out)}: {done.num_tensors} tensors, {done.record.num_bytes / 1e6:,.1f} MB{half}{merged}{verdict}{also}"
    )
    return 0


def _peft(arguments: argparse.Namespace) -> int:
    outtype: Literal["f32", "bf16"] = arguments.outtype or "f32"
    require(arguments.adapter is not None, "--format peft", "no --adapter", "--adapter DIR", "give --adapter DIR")
    fix = "an adapter of any other kind is a folder already: copy it"
    require(arguments.plain, "--format peft", "without --plain", "--plain", fix)
    require(outtype in ("f32", "bf16"), "--outtype", outtype, "f32 or bf16 with --format peft", "--outtype f32")
    unused = [name for name in ("model", "adapter_only", "ollama") if getattr(arguments, name)]
    shown = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
    require(not unused, "--format peft", shown, "--adapter and --out alone", f"leave {shown} away")
    require_new_folder(Path(arguments.out), Path(arguments.adapter))
    load_libraries()
    from minisft.merging.export_peft import export_peft

    done = export_peft(arguments.adapter, arguments.out, outtype)
    print(f"{visible(arguments.out)}: {done.num_modules} modules of rank {done.rank}, scale 1; {done.served_with}")
    return 0


def verify_gguf_command(arguments: argparse.Namespace) -> int:
    """Ask an installed llama.cpp what an exported file answers."""
    others = [name for name in ("merged", "adapter", "model", "calibration", "data") if getattr(arguments, name) is not None]
    shown = ", ".join(f"--{name}" for name in others)
    require(not others, "--gguf", f"with {shown}", "--gguf and --base alone", f"leave {shown} away")
    require_extra("llamacpp", "xllamacpp")
    load_libraries()
    from minisft.merging.verify_gguf import verify_gguf

    print(verify_gguf(arguments.gguf, arguments.base).summary)
    return 0
