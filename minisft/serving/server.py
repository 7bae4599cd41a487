"""``minisft serve``: load the models, listen, end on a signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from minisft.common.errors import visible
from minisft.common.local_server import LOOPBACK, address_of, own_hosts, run_server
from minisft.config import QuantConfig
from minisft.evaluation.compressed import decode_compressed_if_memory_allows_
from minisft.evaluation.fast_decode import fast_decode_
from minisft.merging.golden import prompts
from minisft.native.decoder import decode_path
from minisft.serving.app import Service, make_app
from minisft.serving.engine import Engine
from minisft.serving.lanes import load_lanes
from minisft.serving.settings import check_adapters, check_serving

GRACE_S = 10  # seconds that answers in progress get after a signal


def serve(
    model: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 256,
    max_rows: int = 16,
    max_waiting: int = 64,
    prefix_cache_mb: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    quant: QuantConfig | None = None,
    fast_decode: bool = False,
    log: Callable[[str], None] = print,
) -> int | None:
    """Serve a model and its adapters as OpenAI's chat completions and completions do, until SIGTERM or SIGINT.

    After the first signal nothing new is taken, what waits gets an error, and answers in progress have ten seconds. Weights are
    read from exact copies where there are some and memory allows, see ``decode_compressed_``.

    Args:
        model: folder, GGUF file, hub id or name.
        adapters: name -> folder; clients choose one by naming it as their model.
        host, port: where; another host than this machine needs a key.
        api_key: what clients have to send, at least 16 characters; None for nothing.
        template: chat template for all, as for ``generate``.
        max_new_tokens: the longest answer where a request names no limit.
        max_rows: answers written at once.
        max_waiting: requests that may wait; the next one is refused with 429.
        prefix_cache_mb: memory, in millions of bytes, for keys and values of earlier requests: one that begins alike computes
            only what is new. 0 keeps nothing.
        dtype: ``auto``, ``bf16`` or ``fp32``.
        device: ``auto``, ``cpu`` or ``cuda``.
        quant: hold the model's linears in 4 bits.
        fast_decode: read dense weights in 8 bits for each new token, see ``fast_decode_``.
        log: called with what that costs, model by model, or that memory is too short for compressed copies, with the address
            once it listens, and with one line for each error of the server's own.

    Returns:
        the number of the signal that ended it, if it was one.

    Raises:
        UserError: a setting that is out of range, files that cannot be read, a port that is taken.
    """
    check_serving(host, port, api_key, max_rows, max_waiting, max_new_tokens, prefix_cache_mb)
    check_adapters(model, adapters or {})
    lanes = load_lanes(model, adapters or {}, template=template, dtype=dtype, device=device, quant=quant)
    for lane in lanes.values() if fast_decode else ():
        drift = fast_decode_(lane.model, [prompt.ids for prompt in prompts(lane.tokenizer, lane.template)], lane.name)
        log(f"{visible(lane.name)}: {drift}")
    if not fast_decode:
        decode_compressed_if_memory_allows_((lane.model for lane in lanes.values()), log)
    engine = Engine(lanes, max_rows, max_waiting, log, 10**6 * prefix_cache_mb)
    hosts = own_hosts(host, port) if host in LOOPBACK else None
    app = make_app(Service(engine, hosts, api_key, max_new_tokens, log))
    for lane in lanes.values():  # compiles native code and copies weights, if that is still to do: no client waits for it
        decode_path(lane.model)
    engine.start()

    def stopping() -> None:
        engine.stopping = True

    try:
        return run_server(app, host, port, lambda: log(f"{address_of(host, port)}/v1"), stopping, GRACE_S)
    finally:
        engine.end()
