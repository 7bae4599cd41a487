"""Settings of ``minisft dpo`` and ``minisft grpo``: a run's, and the numbers of the loss."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from minisft.common.checks import require
from minisft.common.settings import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Allowed, check_fields, flag, flag_name
from minisft.config import RunConfig

# What a run on pairs or on sampled answers has no use for.
UNUSED_BY_DPO = (
    "turns", "packing", "micro_batch_size", "strict", "neftune_alpha", "replay", "replay_share", "cache",
    "eval_metric", "eval_rows", "eval_new_tokens", "best_by",
)  # fmt: skip
UNUSED_BY_GRPO = (*UNUSED_BY_DPO, "batch_size", "allow_control_tokens")


def _refuse_unused(run: RunConfig, names: tuple[str, ...], command: str) -> None:
    """A setting that this kind of run has no use for must be as it is by default, not ignored."""
    for field in (f for f in fields(RunConfig) if f.name in names):
        given = getattr(run, field.name)
        require(given == field.default, flag_name(field.name), given, f"nothing: {command} has no use for it", "leave it away")


def _refuse_dropout(run: RunConfig, why: str) -> None:
    require(run.dropout == 0, "--dropout", run.dropout, f"0: {why}", "leave it away")


@dataclass(frozen=True)
class DPOConfig(RunConfig):
    """Everything that decides one DPO run. Each field is a flag of ``minisft dpo`` and a key of ``--config``."""

    data: str = flag("preference pairs, JSONL or JSON", metavar="F")
    eval_data: str | None = flag("pairs to validate on; without it a share of --data is held out", None, "F")
    map: tuple[str, ...] = flag("column of your file for a field of ours, e.g. chosen=better (repeatable)", (), "FIELD=COLUMN")
    max_length: int = flag(
        "longest prompt with answer in tokens; longer prompts lose their start, alike on both sides, and pairs with an answer "
        "that does not fit are dropped",
        1024,
        "N",
    )
    dropout: float = flag("only 0: the reference is computed without dropout", 0.0, "P")
    batch_size: int = flag("pairs in an optimizer step", 8, "N")
    lr: float | None = flag("peak learning rate (default 2e-5 for lora, 1e-6 for full)", None)
    beta: float = flag("how strongly a pair pulls away from the reference", 0.1, allowed=POSITIVE, fix="try 0.1")
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = flag("the loss of a pair", "sigmoid")
    label_smoothing: float = flag(
        "share of pairs believed to be labelled the wrong way round, in [0, 0.5)",
        0.0,
        allowed=Allowed(lambda value: 0 <= value < 0.5, "a share in [0, 0.5)"),
        fix="give the share of wrong labels; at one half the labels carry nothing",
    )
    rpo_alpha: float = flag(
        "weight of a cross-entropy on the chosen answer, which keeps it likely", 0.0, allowed=NOT_NEGATIVE, fix="try 1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_unused(self, UNUSED_BY_DPO, "dpo")
        _refuse_dropout(self, "the reference is computed without dropout")
        require(
            not self.label_smoothing or self.loss in ("sigmoid", "robust"), "--label-smoothing", self.loss,
            "--loss sigmoid or robust", "leave it away, or choose one of these losses",
        )  # fmt: skip

    @property
    def peak_lr(self) -> float:
        """``lr``, or about ten times the field's usual rate of full DPO for adapters."""
        return self.lr if self.lr is not None else (2e-5 if self.method == "lora" else 1e-6)


@dataclass(frozen=True)
class GRPOConfig(RunConfig):
    """Everything that decides one GRPO run. Each field is a flag of ``minisft grpo`` and a key of ``--config``."""

    data: str = flag("prompts, JSONL or JSON; the rows' own answers are what exact_match and json compare with", metavar="F")
    eval_data: str | None = flag("prompts to validate on; without it a share of --data is held out", None, "F")
    max_length: int = flag(
        "longest prompt with answer in tokens; prompts that leave no token for an answer are dropped", 1024, "N"
    )
    dropout: float = flag("only 0: answers are sampled without dropout", 0.0, "P")
    lr: float | None = flag("peak learning rate (default 1e-5 for lora, 1e-6 for full)", None)
    parallel: Literal["auto", "replicate", "shard"] = flag(
        "on several processes (torchrun): the whole base in each, the prompts divided; shard is refused", "auto"
    )
    reward: str = flag(
        "what pays an answer: exact_match, json, regex:PATTERN or FILE.py:function, called as f(answer, row)", "", "R"
    )
    num_generations: int = flag(
        "answers sampled to each prompt",
        8,
        "G",
        allowed=Allowed(lambda value: value >= 2, "at least 2"),
        fix="an answer is compared with the others of its group",
    )
    prompts_per_step: int = flag("prompts in an optimizer step", 8, "N", allowed=AT_LEAST_1, fix="give 1 or more")
    max_new_tokens: int = flag("the most tokens of an answer", 64, "N", allowed=AT_LEAST_1, fix="give 1 or more")
    temperature: float = flag("of sampling, and of the scored distribution alike", 1.0, allowed=POSITIVE, fix="try 1")
    loss: Literal["dapo", "dr_grpo", "grpo"] = flag(
        "what the tokens' losses are divided by: the step's tokens, answers times --max-new-tokens, or each answer's length",
        "dapo",
    )
    advantage: Literal["mean", "zscore"] = flag("reward minus the group's mean, or that over the group's spread", "mean")
    beta: float = flag(
        "weight of the KL term against the model as it was before step 1", 0.0, allowed=NOT_NEGATIVE, fix="try 0"
    )
    epsilon: float = flag(
        "clip range of the probability ratio",
        0.2,
        allowed=Allowed(lambda value: 0 < value < 1, "a number in (0, 1)"),
        fix="try 0.2",
    )
    epsilon_high: float | None = flag("its upper side, where that differs", None, allowed=POSITIVE, fix="try 0.28")
    mask_truncated: bool = flag("leave answers that did not stop out of the loss", False)

    def __post_init__(self) -> None:
        check_fields(self)  # before one of them becomes another
        object.__setattr__(self, "batch_size", self.prompts_per_step)
        super().__post_init__()
        _refuse_unused(self, tuple(name for name in UNUSED_BY_GRPO if name != "batch_size"), "grpo")
        _refuse_dropout(self, "answers are sampled without dropout, and the probability ratio compares with that")
        require(
            bool(self.reward), "--reward", "nothing", "a reward", "give exact_match, json, regex:PATTERN or FILE.py:function"
        )
        require(
            self.max_new_tokens < self.max_length, "--max-new-tokens", self.max_new_tokens,
            f"less than --max-length {self.max_length}", "lower it, or raise --max-length; the prompt needs tokens too",
        )  # fmt: skip

    @property
    def peak_lr(self) -> float:
        """``lr``, or about ten times the field's usual rate of full GRPO for adapters."""
        return self.lr if self.lr is not None else (1e-5 if self.method == "lora" else 1e-6)
