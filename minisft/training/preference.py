"""``minisft dpo`` and ``minisft grpo`` as calls: one run from pairs, or from prompts and a reward, to an adapter."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable

from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.model import CausalLM
from minisft.parallel.launch import joined
from minisft.training.dpo import EncodedPair
from minisft.training.dpo_run import DPOTrainer
from minisft.training.grpo_run import GRPOTrainer
from minisft.training.preference_config import DPOConfig, GRPOConfig
from minisft.training.preference_data import EncodedPrompt, prepare_pairs, prepare_prompts
from minisft.training.rewards import Reward, RewardFunction, load_reward
from minisft.training.run_data import RunData
from minisft.training.train import run_training
from minisft.training.trainer import Log, TrainResult


def dpo(run: DPOConfig, resume: bool = False, log: Callable[[str], None] = print, dry_run: bool = False) -> TrainResult:
    """Train a model to prefer the chosen answers of pairs, in the folder ``run.out``.

    Args:
        run: the settings; each is a flag of ``minisft dpo``.
        resume: go on from the newest checkpoint in ``run.out`` that verifies.
        log: where the run's few sentences go.
        dry_run: check everything up to the first step, and write nothing.

    Returns:
        Where the run ended; ``weights`` is one whole adapter, also after ``init_adapter``.

    Raises:
        UserError: bad input, a changed run, a reference of another run.

    Ref: Rafailov et al. 2023, arXiv:2305.18290.
    """

    def prepare(
        run: DPOConfig, model: CausalLM, tokenizer: Tokenizer, log: Log, began: datetime.datetime | None
    ) -> tuple[ChatTemplate, RunData[EncodedPair]]:
        return prepare_pairs(run, tokenizer, log, began, model.config.max_position_embeddings)

    with joined(run.device) as world:
        return run_training(run, prepare, DPOTrainer, resume, log, dry_run, world)


def grpo(
    run: GRPOConfig,
    reward: RewardFunction | None = None,
    resume: bool = False,
    log: Callable[[str], None] = print,
    dry_run: bool = False,
) -> TrainResult:
    """Train a model on its own sampled answers and their rewards, in the folder ``run.out``.

    Under ``torchrun`` the processes share each step's prompts, and the first writes; what is sampled and learned is the same.

    Args:
        run: the settings; each is a flag of ``minisft grpo``.
        reward: ``f(answer, row) -> float`` instead of the one that ``run.reward`` names; then ``run.reward`` is its name only.
        resume: go on from the newest checkpoint in ``run.out`` that verifies.
        log: where the run's few sentences go.
        dry_run: check everything up to the first step, and write nothing.

    Returns:
        Where the run ended; the weights are those of the best held-out reward.

    Raises:
        UserError: bad input, a changed run, a reward that fails, ten steps in which nearly all groups have equal rewards.

    Ref: Shao et al. 2024, arXiv:2402.03300.
    """

    def prepare(
        run: GRPOConfig, model: CausalLM, tokenizer: Tokenizer, log: Log, began: datetime.datetime | None
    ) -> tuple[ChatTemplate, RunData[EncodedPrompt]]:
        return prepare_prompts(run, judge, model.config.max_position_embeddings, tokenizer, log, began)

    with joined(run.device) as world:
        judge = load_reward(run.reward) if reward is None else Reward(run.reward, reward)
        return run_training(run, prepare, functools.partial(GRPOTrainer, reward=judge), resume, log, dry_run, world)
