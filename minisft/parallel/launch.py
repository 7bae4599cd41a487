"""Joining the processes that ``torchrun`` started, and leaving them: one message for what went wrong, whoever it befell.

``torchrun`` tells each process its place in ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. Nothing else is read, and there is no
launcher and no file of ours. Without them, or with one process, there is nothing to join. An error of every process alike is
reported by the first that meets it, one of a single process by that process with its rank; the others end silently with the
same status. Nothing here needs PyTorch before a group is joined, because the command line asks first.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.common.errors import UserError, listing, visible

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from minisft.parallel.world import World

START_S = 300.0  # until all processes have said that they are there
TIMEOUT_S = 1800.0  # of one collective: longer than the slowest save or the longest imbalance
GRACE_S = 2.0  # for the operating system to show that a process has gone, and for others to report the same error
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
COMMAND = "torchrun --nproc-per-node 2 -m minisft ..."


def num_processes(environment: Mapping[str, str] | None = None) -> int:
    """How many processes this run has: ``WORLD_SIZE``, or 1.

    Raises:
        UserError: ``config/world``, where what the launcher says is impossible.
    """
    return read_place(os.environ if environment is None else environment)[1]


def read_place(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, size, local rank, local size) as the launcher gave them.

    Args:
        environment: with ``torchrun``'s variables, or without any.

    Returns:
        (0, 1, 0, 1) without ``WORLD_SIZE``.

    Raises:
        UserError: ``config/world``: no number, a rank that is not below the size, a variable that is missing.
    """
    if "WORLD_SIZE" not in environment:
        return 0, 1, 0, 1
    size = _number(environment, "WORLD_SIZE", 1)
    if size == 1:
        return 0, 1, 0, 1
    rank = _number(environment, "RANK", 0, size - 1)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else size
    local_rank = _number(environment, "LOCAL_RANK", 0, local_size - 1)
    return rank, size, local_rank, local_size


def _number(environment: Mapping[str, str], name: str, least: int, most: int = 2**20) -> int:
    text = environment.get(name, "")
    if text.isascii() and text.isdigit() and least <= int(text) <= most:
        return int(text)
    raise UserError(
        "config/world", "the place of this process among those of its run is impossible", where=name,
        found=visible(text) or "nothing", expected=f"a number from {least} to {most}", fix=f"start it with {COMMAND}",
    )  # fmt: skip


def reports(error: UserError, environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the one to print ``error``."""
    if error.reported is not None:
        return not error.reported
    with contextlib.suppress(UserError):
        return read_place(os.environ if environment is None else environment)[0] == 0
    return True  # its place is what is wrong


# ---- joining and leaving ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Within this block the processes of the run are one group; with one process nothing is done.

    Args:
        device: the run's ``--device``.

    Yields:
        This process's place.

    Raises:
        UserError: what the block raises, marked as reported in all processes but one; ``process/lost`` where another
            process ended; ``process/late`` where one keeps the others waiting; ``process/missing`` where one has not come.
    """
    place = read_place(os.environ)
    from minisft.parallel.world import ALONE, World

    if place[1] == 1:
        yield ALONE
        return
    import torch.distributed as dist

    world = World(*place)
    store, gpu = _meet(world), _check_device(world, device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        yield world
        world.barrier()
    except UserError as error:
        told = _told(error, world, store)
        if told is error:
            raise
        raise told from error
    except RuntimeError as error:
        lost = _lost(world, store, error)
        if lost is None:
            raise
        raise lost from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _meet(world: World) -> Store:
    """The store that the processes share, once all of them are there."""
    from torch._C._distributed_c10d import PrefixStore  # torch.distributed has it too, but does not declare it
    from torch.distributed.rendezvous import rendezvous

    try:
        base, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timedelta(seconds=START_S)))
    except (ValueError, RuntimeError) as error:  # a variable is missing, the port is in use, nobody answers
        raise UserError(
            "process/no-meeting", "the processes cannot find each other", where=f"rank {world.rank} of {world.size}",
            found=visible(str(error).splitlines()[0]), expected="MASTER_ADDR and MASTER_PORT of a free port",
            fix=f"start them with {COMMAND}; another --master-port where this one is in use",
        ) from None  # fmt: skip
    store = PrefixStore(f"minisft-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", base)
    store.set(f"here/{world.rank}", f"{platform.node()} {os.getpid()}")
    names = [f"here/{rank}" for rank in range(world.size)]
    try:
        store.wait(names, timedelta(seconds=START_S))
    except RuntimeError:
        missing = [name.removeprefix("here/") for name in names if not store.check([name])]
        raise UserError(
            "process/missing", "not all processes of the run have come", where=f"after {START_S:.0f} s",
            found=f"rank {listing(missing)} missing", expected=f"{world.size} processes", fix="look at what they print",
        ) from None  # fmt: skip
    return store


def _check_device(world: World, device: str) -> bool:
    """Whether the run is on GPUs; refuses a process that has none of its own."""
    import torch

    if not (torch.cuda.is_available() and device != "cpu"):
        return False
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(set(shown)) < len(shown):
        raise UserError(
            "config/devices", "a GPU is named twice", where="CUDA_VISIBLE_DEVICES", found=visible(",".join(shown)),
            expected="each once", fix="one process has one GPU",
        )  # fmt: skip
    if (found := torch.cuda.device_count()) < world.local_size:
        raise UserError(
            "config/devices", "there are fewer GPUs than processes", where=f"rank {world.rank}, LOCAL_RANK {world.local_rank}",
            found=f"{found} for {world.local_size} processes", fix=f"--nproc-per-node {found}, or --device cpu",
        )  # fmt: skip
    torch.cuda.set_device(world.local_rank)
    return True


# ---- what went wrong, once -----------------------------------------------------------------------------------------------


def _told(error: UserError, world: World, store: Store) -> UserError:
    """The error of this process: to be printed by it, with its rank, unless another process has met one before."""
    try:
        number = store.add("errors", 1)
        store.set(f"error/{number}", json.dumps(error.parts()))
        if number > 1:
            return _silent(error)
        alike = _is_everybodys(error, world, store)
    except RuntimeError:  # the process that kept the store has gone
        alike = False
    told = error if alike else error.at(f"rank {world.rank} of {world.size}")
    told.reported = False
    return told


def _is_everybodys(error: UserError, world: World, store: Store) -> bool:
    """Whether all processes have met the same error; they are given ``GRACE_S`` for it."""
    names = [f"error/{number}" for number in range(1, world.size + 1)]
    with contextlib.suppress(RuntimeError):
        store.wait(names, timedelta(seconds=GRACE_S))
        return all(json.loads(store.get(name)) == error.parts() for name in names)
    return False


def _lost(world: World, store: Store, cause: RuntimeError) -> UserError | None:
    """Why a collective failed: another process's error; one that keeps the rest waiting, or has gone. None for neither."""
    with contextlib.suppress(RuntimeError):
        store.wait(["error/1"], timedelta(seconds=GRACE_S / 4))
        return _silent(UserError(**json.loads(store.get("error/1"))))
    if "timed out" in str(cause).lower():  # before who has gone is asked: others that waited may have ended by now
        return _told(_late(), world, store)
    gone = _gone(world, store)
    if gone is None:
        return None
    error = UserError(
        "process/lost", "a process of the run has ended", where=gone, found="its connection is closed",
        fix="look for what ended it (memory, a signal); the last checkpoint is whole, go on with --resume",
    )  # fmt: skip
    with contextlib.suppress(RuntimeError):
        if store.add("lost", 1) > 1:
            return _silent(error)
    error.reported = False
    return error


def _late() -> UserError:
    return UserError(
        "process/late", "another process of the run does not answer", found=f"waited for {TIMEOUT_S / 60:g} minutes",
        expected="all processes to take part in each step",
        fix="look at what the others do (a reward that does not return, a disk); go on with --resume",
    )  # fmt: skip


def _gone(world: World, store: Store) -> str | None:
    """Which processes have ended, in words; None where all that can be seen from here are alive."""
    try:
        homes = {rank: store.get(f"here/{rank}").decode().split() for rank in range(world.size)}
    except RuntimeError:
        return "rank 0, which kept the run's store"
    here = {rank: int(pid) for rank, (host, pid) in homes.items() if host == platform.node()}
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end:
        if gone := [str(rank) for rank, pid in here.items() if not _is_alive(pid)]:
            return f"rank {listing(gone)} of {world.size}"
        time.sleep(0.05)
    others = [str(rank) for rank in homes if rank not in here]
    return f"rank {listing(others)} of {world.size}, on another machine" if others else None


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
    return True


def _silent(error: UserError) -> UserError:
    error.reported = True
    return error
