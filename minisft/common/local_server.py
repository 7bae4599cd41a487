"""What the web servers of this package share: who may ask by default, and a server that ends on a signal.

A server listens on this machine only, unless it has a secret that others have to know. Needs the extra arena or serve.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from minisft.common.errors import UserError, visible

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MIN_SECRET = 16  # characters


def check_access(host: str, secret: str | None, what: str, fix: str) -> None:
    """Refuse to open a server to the network without a secret.

    Args:
        host: where it listens.
        secret: what others have to know; None for none.
        what: would be open, for the message.
        fix: how to give a secret.

    Raises:
        UserError: another host without a secret, or a secret too short to be one.
    """
    if host not in LOOPBACK and secret is None:
        raise UserError("config/no-token", f"{what} would be open to the network", where="--host", found=visible(host), fix=fix)
    if secret is not None and len(secret) < MIN_SECRET:
        example = f"for instance {secrets.token_urlsafe(MIN_SECRET)}"
        found, expected = f"{len(secret)} characters", f"at least {MIN_SECRET} characters"
        raise UserError("config/short-token", "the secret is too short", found=found, expected=expected, fix=example)


def check_port(port: int) -> int:
    """A port number.

    Raises:
        UserError: outside 1 to 65 535.
    """
    if not 1 <= port <= 65_535:
        fix = "give a port between 1024 and 65535"
        raise UserError("config/bad-value", "no such port", where="--port", found=str(port), fix=fix)
    return port


def own_hosts(host: str, port: int) -> frozenset[str]:
    """What a request may call a server in its ``Host`` header: another name is one that was rebound to this machine."""
    names = {*LOOPBACK, host} if host in LOOPBACK else {host}
    return frozenset(f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names)


def address_of(host: str, port: int) -> str:
    """The address for people and programs, ``http://127.0.0.1:8000``."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    app: Starlette,
    host: str,
    port: int,
    started: Callable[[], None],
    stopping: Callable[[], None] = lambda: None,
    grace_s: int | None = None,
) -> int | None:
    """Listen until SIGTERM or SIGINT; then end after the requests in progress. A second signal ends at once.

    Args:
        app: an ASGI application.
        host, port: where.
        started: called once connections are accepted.
        stopping: called at the first signal, in the handler: it may only set something.
        grace_s: the most seconds that requests in progress get; None for as long as they take.

    Returns:
        the signal's number, if there was one.

    Raises:
        UserError: the port is taken, or the host is no address of this machine.
    """
    import uvicorn

    class Server(uvicorn.Server):
        received: int | None = None

        async def startup(self, sockets: list[Any] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started()

        def handle_exit(self, sig: int, frame: object) -> None:
            if self.received is not None:
                self.force_exit = True
            self.received = self.received or sig
            self.should_exit = True
            stopping()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            try:
                before = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)}
            except ValueError:  # not the main thread: whoever owns it handles signals
                yield
                return
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    server = Server(
        uvicorn.Config(app, host=host, port=port, log_level="critical", access_log=False, timeout_graceful_shutdown=grace_s)
    )
    try:
        server.run()
    except SystemExit:
        found = f"{visible(host)}:{port}"
        raise UserError("config/port", "the server cannot listen there", found=found, fix="give another --port") from None
    return server.received
