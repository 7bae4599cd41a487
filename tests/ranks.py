"""Several processes in a test: forked, joined by gloo through a file, and asked for one value each."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from minisft.parallel.world import World

LIMIT_S = 180.0  # of a machine that is busy; a hang fails too
Value = TypeVar("Value")


def on_ranks(size: int, function: Callable[[World], Value]) -> list[Value]:
    """What ``function`` returns in each of ``size`` processes, by rank.

    The processes are forked, so that they need not import PyTorch again, and ``function`` may be any closure.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        children = [
            context.Process(
                target=_child, args=(World(rank, size, rank, size), Path(folder, "store"), function, pipes[rank][1])
            )
            for rank in range(size)
        ]
        for child in children:
            child.start()
        try:
            found = [pickle.loads(pipe.recv_bytes()) if pipe.poll(LIMIT_S) else (False, "no answer") for pipe, _ in pipes]
        finally:
            for child in children:
                child.kill()
                child.join()
    for rank, (good, value) in enumerate(found):
        assert good, f"rank {rank}: {value}"
    return [value for _, value in found]


def _child(world: World, store: Path, function: Callable[[World], object], pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), world.size), rank=world.rank, world_size=world.size,
            timeout=timedelta(seconds=LIMIT_S),
        )  # fmt: skip
        pipe.send_bytes(pickle.dumps((True, function(world))))  # plain pickle: PyTorch's own would share memory
        dist.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
