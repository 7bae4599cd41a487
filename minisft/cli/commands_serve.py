"""The command that answers other programs: ``serve``."""

from __future__ import annotations

import argparse

from minisft.cli.libraries import load_libraries
from minisft.common.errors import UserError, visible
from minisft.config import QuantConfig


def serve_command(arguments: argparse.Namespace) -> int:
    """Serve a model and its adapters until a signal; the exit status is the signal's, 143 or 130."""
    from minisft.serving.settings import check_adapters, check_serving, read_api_key

    adapters = adapters_by_name(arguments.adapter)
    check_adapters(arguments.model, adapters)
    key = None if arguments.api_key_file is None else read_api_key(arguments.api_key_file)
    counts = arguments.max_rows, arguments.max_waiting, arguments.max_new_tokens, arguments.prefix_cache_mb
    check_serving(arguments.host, arguments.port, key, *counts)
    load_libraries()
    from minisft.serving.server import serve

    received = serve(
        arguments.model,
        adapters,
        host=arguments.host,
        port=arguments.port,
        api_key=key,
        template=arguments.template,
        max_new_tokens=arguments.max_new_tokens,
        max_rows=arguments.max_rows,
        max_waiting=arguments.max_waiting,
        prefix_cache_mb=arguments.prefix_cache_mb,
        dtype=arguments.dtype,
        device=arguments.device,
        quant=None if arguments.quant == "none" else QuantConfig(arguments.quant, double_quant=arguments.double_quant),
        fast_decode=arguments.fast_decode,
        log=lambda text: print(text, flush=True),
    )
    return 0 if received is None else 128 + received


def adapters_by_name(words: list[str]) -> dict[str, str]:
    """``NAME=DIR`` -> DIR by NAME.

    Raises:
        UserError: no name or no folder, or a name that comes twice.
    """
    adapters: dict[str, str] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not name or not folder or name in adapters:
            what = "an adapter cannot be read" if name not in adapters else "two adapters have one name"
            raise UserError(
                "config/bad-adapter", what, where="--adapter", found=visible(word, 80), expected="NAME=DIR",
                fix="give each adapter a name of its own, which clients then name as their model",
            )  # fmt: skip
        adapters[name] = folder
    return adapters
