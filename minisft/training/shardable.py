"""What a base that processes share cannot be used for, with the setting that asks for it."""

from __future__ import annotations

from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.config import RunConfig
from minisft.formats.adapter_config import config_path
from minisft.formats.adapter_rows import read_row_ids
from minisft.formats.foreign_files import foreign_type
from minisft.formats.source import resolve
from minisft.training.preference_config import GRPOConfig

SMALLER = "--parallel replicate; --quant nf4 makes the base smaller"


def require_shardable(run: RunConfig) -> None:
    """Refuse what cannot be done in shares: ``config/shard``.

    Raises:
        UserError: that; and what is wrong with the settings of the adapter that the run starts from.
    """
    if isinstance(run, GRPOConfig):
        raise _refusal("minisft grpo", "a run whose answers are given", "--parallel replicate")
    if run.optim == "adamw8bit" and run.method == "full":
        raise _refusal("--optim adamw8bit with --method full", "--optim adamw", "leave --optim away, or --parallel replicate")
    if run.init_adapter is not None and read_row_ids(config_path(Path(run.init_adapter))):
        raise _refusal("--init-adapter with trained tokens", "tables without rows of their own")


def require_own_decoder(path: str) -> None:
    """Refuse a base that transformers computes, which is read whole: ``config/shard``."""
    source = resolve(path)
    if source.kind == "folder" and (kind := foreign_type(source.path)) is not None:
        raise _refusal(f"{visible(kind)}, a model that transformers computes")


def _refusal(found: str, expected: str = "a model that minisft computes", fix: str = SMALLER) -> UserError:
    return UserError(
        "config/shard", "this is not offered with a shared base", where="--parallel shard", found=found, expected=expected,
        fix=fix,
    )  # fmt: skip
