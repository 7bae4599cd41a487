"""What tests ask of the machine that they run on: how fast it is, and a port that nobody else takes meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time

FIRST_PORT, END_PORT = 20_000, 32_000  # below those that Linux gives to sockets that ask for any: 32768 to 60999
PORTS_A_WORKER = 3_000

_numbers = itertools.count(int.from_bytes(os.urandom(2)))  # another process that counts here most likely began elsewhere


def cpu_unit_s() -> float:
    """CPU seconds of a fixed loop in Python, the best of three: how fast this machine is now.

    It is 0.05 on the idle machine on which the limits of tests were set. Limits in this unit hold on a slow machine too.
    """
    times = []
    for _ in range(3):
        begin, total = time.process_time(), 0
        for i in range(700_000):
            total += i % 7
        times.append(time.process_time() - begin)
    return min(times)


def free_port() -> int:
    """A port for a server that a child process starts seconds later; until then no other process is given it by chance."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    num_ports = min(PORTS_A_WORKER, (END_PORT - FIRST_PORT) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    for _ in range(num_ports):
        port = FIRST_PORT + worker * num_ports + next(_numbers) % num_ports
        with socket.socket() as probe, contextlib.suppress(OSError):  # it is in use
            probe.bind(("", port))
            return port
    raise OSError(f"worker {worker} finds no free port")
