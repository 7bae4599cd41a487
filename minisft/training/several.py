"""What a run on several processes checks before its first step: that there is work for all, and that all start alike."""

from __future__ import annotations

import hashlib
import json

import torch

from minisft.common.errors import UserError, visible
from minisft.common.settings import flag_name
from minisft.config import RunConfig
from minisft.parallel.launch import COMMAND
from minisft.parallel.threads import num_cores, set_threads
from minisft.parallel.world import World, raw_bytes
from minisft.training.preference_config import GRPOConfig
from minisft.training.run_data import Row
from minisft.training.shardable import require_shardable
from minisft.training.trainer import Log, Trainer


def check_world(run: RunConfig, world: World, dry_run: bool, log: Log) -> None:
    """Refuse what several processes cannot do; report how many there are, and with how many threads.

    Args:
        run: the settings.
        world: the processes, joined.
        dry_run: whether nothing is to be written.
        log: where the first process's sentences go.

    Raises:
        UserError: ``config/one-process``: a dry run on several, ``--parallel shard`` on one; ``config/shard``.
    """
    if run.parallel == "shard":
        require_shardable(run)
    if world.size == 1:
        if run.parallel == "shard":
            raise UserError(
                "config/one-process", "one process has nobody to share the base with", where="--parallel shard",
                found="1 process", expected="2 or more", fix=f"start it with {COMMAND}",
            )  # fmt: skip
        return
    if dry_run:
        raise UserError(
            "config/one-process", "a dry run has one process", where="--dry-run", found=f"{world.size} processes",
            fix="leave torchrun away; minisft plan --parallel shard --world-size N counts the bytes of several",
        )  # fmt: skip
    threads, cores = set_threads(world), num_cores()
    log(f"{world.size} processes, {threads} {'thread' if threads == 1 else 'threads'} each ({cores} cores here)")
    if world.local_size > cores and not torch.cuda.is_available():
        log(f"warning: {world.local_size} processes on {cores} cores are slower than {cores}; the result is the same")
    if world.size > run.batch_size:
        what, where = ("prompts", "prompts_per_step") if isinstance(run, GRPOConfig) else ("rows", "batch_size")
        log(f"warning: a step has {run.batch_size} {what} ({flag_name(where)}) for {world.size} processes; some have none")


def check_start(trainer: Trainer[Row]) -> None:
    """Before step 1: enough rows, and the same settings, rows, base and trained numbers in every process.

    Raises:
        UserError: ``config/world`` for more processes than rows; ``config/other-start``, naming what differs and the rank.
    """
    world = trainer.world
    if world.size == 1:
        return
    if world.size > len(trainer.data.train):
        raise UserError(
            "config/world", "there are more processes than rows", where="WORLD_SIZE", found=f"{world.size} processes",
            expected=f"at most {len(trainer.data.train)}", fix="start fewer",
        )  # fmt: skip
    facts = {name: json.dumps(value, sort_keys=True).encode() for name, value in trainer.identity.items()}
    weights = hashlib.sha256()
    for weight in trainer.optimizer.replicated.values():
        weights.update(raw_bytes(weight))
    world.require_same_start({**facts, "the trained numbers": weights.digest(), "--steps": str(trainer.total_steps).encode()})
    if (found := world.differing({"torch": torch.__version__.encode()})) is not None:
        trainer.log(f"warning: rank {found[1]} has another version of PyTorch than rank 0, {visible(torch.__version__)}")
