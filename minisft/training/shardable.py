"""What a base that processes share cannot be used for, with the setting that asks for it."""

from __future__ import annotations

from minisft.common.errors import UserError
from minisft.config import RunConfig


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
        raise UserError(
            "config/shard", "this is not offered with a shared base", where="--parallel shard", found=name,
            expected="adapters of plain LoRA on a frozen base", fix="--parallel replicate; --quant nf4 makes the base smaller",
        )  # fmt: skip
