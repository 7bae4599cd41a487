"""What a base that processes share cannot be used for, with the setting that asks for it."""

from __future__ import annotations

from minisft.common.errors import UserError, visible
from minisft.config import RunConfig
from minisft.formats.foreign_files import foreign_type
from minisft.formats.source import resolve


def require_shardable(run: RunConfig) -> None:
    """Refuse what needs a whole weight outside of the forward pass, or gradients of the base: ``config/shard``."""
    needs = {
        "--use-dora": bool(run.use_dora),
        "--init pissa": run.init == "pissa",
        "--method full": run.method == "full",
        "--eval-metric": run.eval_metric is not None,
        "--init-adapter": run.init_adapter is not None,
        "minisft dpo": type(run) is not RunConfig,
    }
    for name in (name for name, is_asked in needs.items() if is_asked):
        raise _refusal(name)


def require_own_decoder(path: str) -> None:
    """Refuse a base that transformers computes, which is read whole: ``config/shard``."""
    source = resolve(path)
    if source.kind == "folder" and (kind := foreign_type(source.path)) is not None:
        raise _refusal(f"{visible(kind)}, a model that transformers computes")


def _refusal(found: str) -> UserError:
    return UserError(
        "config/shard", "this is not offered with a shared base", where="--parallel shard", found=found,
        expected="adapters of plain LoRA on a frozen base", fix="--parallel replicate; --quant nf4 makes the base smaller",
    )  # fmt: skip
