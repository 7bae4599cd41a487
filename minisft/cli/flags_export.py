"""The flags of ``export``, and of ``verify`` for an exported file."""

from __future__ import annotations

import argparse


def export_flags(parser: argparse.ArgumentParser) -> None:
    """What to write, and for whom."""
    parser.add_argument(
        "--format",
        choices=("gguf", "peft"),
        default="gguf",
        help="gguf: llama.cpp, Ollama (default); peft: an adapter for vLLM",
    )
    parser.add_argument(
        "--model", default=None, metavar="M", help="model folder, GGUF file, hub id or name; by default the adapter's base"
    )
    parser.add_argument("--adapter", default=None, metavar="DIR", help="adapter folder (PEFT layout); merged into the weights")
    parser.add_argument(
        "--adapter-only", action="store_true", default=False, help="write the adapter alone, to load on top of its base's GGUF"
    )
    parser.add_argument("--out", required=True, metavar="F.gguf", help="the new file; with --format peft a new folder")
    parser.add_argument(
        "--outtype",
        choices=("f32", "f16", "bf16", "q8_0"),
        default=None,
        help="how the matrices are stored (default f16; with --format peft f32 or bf16, default f32)",
    )
    parser.add_argument("--ollama", action="store_true", default=False, help="write a Modelfile beside it")
    parser.add_argument(
        "--plain", action="store_true", default=False, help="with --format peft: one rank, one scale, no patterns"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the model for golden answers, and compare after a merge (default yes)",
    )


def verify_gguf_flags(parser: argparse.ArgumentParser) -> None:
    """An exported file instead of a folder."""
    parser.add_argument(
        "--gguf", default=None, metavar="F", help="instead: ask an installed llama.cpp about this exported file"
    )
    parser.add_argument("--base", default=None, metavar="F", help="with --gguf: the GGUF file that an adapter file goes on")
