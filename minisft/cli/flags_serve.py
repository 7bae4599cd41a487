"""The flags of ``serve``, and one that it shares with ``generate`` and ``chat``."""

from __future__ import annotations

import argparse


def serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add them to the command's parser."""
    parser.add_argument("--model", required=True, metavar="M", help="model folder, GGUF file, hub id or smollm2-135m-instruct")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an adapter that clients choose by name; may be given again",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="another address needs --api-key-file (default this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="(default %(default)s)")
    parser.add_argument("--api-key-file", default=None, metavar="F", help="its first line is what clients have to send")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N",
        help="longest answer where a request names no limit (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-rows", type=int, default=16, metavar="N", help="answers written at once (default %(default)s)")
    parser.add_argument(
        "--max-waiting", type=int, default=64, metavar="N", help="requests that may wait; more get 429 (default %(default)s)"
    )
    parser.add_argument(
        "--prefix-cache-mb", type=int, default=512, metavar="N",
        help="memory for what was read: requests that begin like earlier ones compute only what is new (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--template", default=None, metavar="T", help="chat template: a .jinja file, chatml or plain")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--quant", choices=("none", "nf4"), default="none", help="hold the model's linears in 4 bits")
    parser.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="with --quant: scales in 8 bits"
    )
    fast_decode_flag(parser)


def fast_decode_flag(parser: argparse.ArgumentParser) -> None:
    """Whether new tokens may be computed from rounded weights."""
    text = "on a CPU: read dense weights in 8 bits for each new token; prints how far that is from the model's own answers"
    parser.add_argument("--fast-decode", action="store_true", default=False, help=text)
