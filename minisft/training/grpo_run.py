"""A GRPO run as the training loop sees it: prompts to sampled groups, rewards, one update, validation on held-out prompts.

Samples are functions of (seed, step, prompt, answer), so a resumed run draws the same ones, and so does any number of
processes. These share the prompts of a step, each with its whole group, and exchange what every answer earned; the
first keeps all answers in ``samples.jsonl``. Watch the reward, not the loss: with one update for each sampling the loss is
about 0 whatever is learned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from minisft.batching import Batch
from minisft.common.atomic_files import disk_errors, replace_durably
from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.common.seeds import derive_seed
from minisft.data.chat import stop_ids
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.generation import Sampled, sample_groups
from minisft.model import CausalLM
from minisft.parallel.world import ALONE, World
from minisft.training.grpo import Group, GRPOSettings, GRPOStats, group_gradients, make_group, reference_of_group
from minisft.training.preference_config import GRPOConfig
from minisft.training.preference_data import EncodedPrompt
from minisft.training.rewards import Reward
from minisft.training.run_data import RunData
from minisft.training.trainer import Log, Trainer

SAMPLES = "samples.jsonl"
RIGHT = 1.0  # a reward from here on counts as a right answer in pass@1 and pass@G
HOPELESS_STEPS, HOPELESS_SHARE = 10, 0.9  # so many steps with so many constant groups teach nothing


@dataclass(frozen=True)
class _Answer:
    """What all processes know of an answer; ``counted`` says whether it takes part in the loss."""

    text: str
    reward: float
    num_tokens: int
    stopped: bool
    counted: bool
    entropy: float


@dataclass(frozen=True)
class _Scored:
    """One prompt's answers."""

    prompt: EncodedPrompt
    answers: list[_Answer]

    @property
    def rewards(self) -> list[float]:
        """Those that are numbers."""
        return [answer.reward for answer in self.answers if math.isfinite(answer.reward)]

    @property
    def is_constant(self) -> bool:
        """Whether the group's rewards are all equal, so that it teaches nothing."""
        return len(set(self.rewards)) < 2

    @property
    def has_gradient(self) -> bool:
        """Whether answers that take part in the loss differ in their rewards."""
        return len({answer.reward for answer in self.answers if answer.counted and math.isfinite(answer.reward)}) > 1


class GRPOTrainer(Trainer[EncodedPrompt]):
    """Learns to answer so that ``reward`` pays; everything else is as for ``Trainer``."""

    run: GRPOConfig
    command = "grpo"

    def __init__(
        self,
        run: GRPOConfig,
        model: CausalLM,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        data: RunData[EncodedPrompt],
        log: Log = print,
        world: World = ALONE,
        *,
        reward: Reward,
    ) -> None:
        super().__init__(run, model, tokenizer, template, data, log, world)
        self.reward = reward

    def prepare(self) -> None:
        """What sampling and the KL term need; the trained numbers as they start are the KL term's reference."""
        run = self.run
        self.settings = GRPOSettings(
            run.loss, run.advantage, run.beta, run.epsilon, run.epsilon_high, run.temperature, run.max_new_tokens,
            run.mask_truncated,
        )  # fmt: skip
        self.eos_ids = stop_ids(self.tokenizer, self.template)
        parameters = self.optimizer.parameters
        self.start = {name: p.detach().clone() for name, p in parameters.items()} if run.beta else {}
        self.groups: list[Group] = []
        self.other_lengths: list[int] = []
        self.sampled: list[_Scored] = []
        self.stats = GRPOStats(0.0, 0.0, 0.0, 0.0, 0, 0)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def batches(self, step: int) -> list[Batch]:
        """Sample a group for each of this process's prompts, score it and keep all samples; one batch a group."""
        is_going_on = bool(self.sampled)
        self.sampled, mine = self._sample(self.step_rows(step), derive_seed(self.run.seed, "grpo", step))
        if self.world.is_first:
            self._keep_samples(step, is_going_on)
        self.groups = [self._group(self.sampled[i], answers) for i, answers in mine.items()]
        others = [scored for i, scored in enumerate(self.sampled) if i not in mine]
        self.other_lengths = [answer.num_tokens for scored in others for answer in scored.answers if answer.counted]
        share = sum(s.is_constant for s in self.sampled) / len(self.sampled)
        self.state.constant_groups = [*self.state.constant_groups, share][-HOPELESS_STEPS:]
        self._require_hope(step)
        return [group.batch for group in self.groups]

    def _sample(self, prompts: Sequence[EncodedPrompt], seed: int) -> tuple[list[_Scored], dict[int, list[Sampled]]]:
        """Every prompt with its answers, whoever sampled them; and place of a prompt -> what this process has sampled."""
        run = self.run
        mine = sorted(self.world.share(range(len(prompts)), lambda i: len(prompts[i].input_ids)))
        groups = sample_groups(
            self.model, [prompts[i].input_ids for i in mine], run.num_generations, max_new_tokens=run.max_new_tokens,
            eos_ids=self.eos_ids, temperature=run.temperature, seed=seed, numbers=mine,
        )  # fmt: skip
        found = dict(zip(mine, groups, strict=True))
        scored = [(i, [astuple(self._score(prompts[i], answer)) for answer in answers]) for i, answers in found.items()]
        told = dict(pair for text in self.world.from_all(json.dumps(scored)) for pair in json.loads(text))
        return [_Scored(prompt, [_Answer(*answer) for answer in told[i]]) for i, prompt in enumerate(prompts)], found

    def _score(self, prompt: EncodedPrompt, answer: Sampled) -> _Answer:
        stopped = answer.stopped(self.eos_ids)
        text = self.tokenizer.decode(answer.ids[:-1] if stopped else answer.ids)
        reward = self.reward.score(text, prompt.columns, prompt.where)
        return _Answer(text, reward, len(answer.ids), stopped, stopped or not self.run.mask_truncated, answer.entropy)

    def _group(self, scored: _Scored, answers: Sequence[Sampled]) -> Group:
        rewards, counted = ([getattr(answer, name) for answer in scored.answers] for name in ("reward", "counted"))
        group = make_group(scored.prompt.input_ids, answers, rewards, scored.prompt.row, self.tokenizer.pad_id, counted)
        if not self.run.beta:
            return group
        return replace(group, reference_log_probs=reference_of_group(self.model, group, self.start, self.run.temperature))

    def _keep_samples(self, step: int, is_going_on: bool) -> None:
        """Append the step's samples, first of all after taking off what a stopped run had written of this and later steps."""
        path = self.out / SAMPLES
        lines = [
            {
                "step": step, "row": scored.prompt.row, "answer": g,
                "reward": answer.reward if math.isfinite(answer.reward) else None,
                "stopped": answer.stopped, "tokens": answer.num_tokens, "text": answer.text,
            }
            for scored in self.sampled
            for g, answer in enumerate(scored.answers)
        ]  # fmt: skip
        with disk_errors(path):
            if not is_going_on and path.exists():
                replace_durably(path, _lines_before(path, step))
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _require_hope(self, step: int) -> None:
        recent = self.state.constant_groups
        if len(recent) < HOPELESS_STEPS or min(recent) <= HOPELESS_SHARE:
            return
        rewards = [value for scored in self.sampled for value in scored.rewards]
        mean = sum(rewards) / len(rewards) if rewards else math.nan
        raise UserError(
            "data/constant-rewards", f"nearly all groups have equal rewards, {HOPELESS_STEPS} steps in a row",
            where=f"step {step}", found=f"mean reward {mean:.3g}, {recent[-1]:.0%} of groups constant",
            expected="groups with right and wrong answers",
            fix="take easier prompts or train with `minisft train` first when nothing is right; stop when everything is",
        )  # fmt: skip

    def gradients(self, step: int, batches: Sequence[Batch]) -> float:
        """Backward through this process's groups."""
        part = group_gradients(self.model, self.groups, self.settings, self.other_lengths)
        self.stats = GRPOStats.of_all([GRPOStats(*json.loads(text)) for text in self.world.from_all(json.dumps(astuple(part)))])
        return part.loss

    def _summed_gradients(self, step: int, batches: Sequence[Batch]) -> float:
        loss = super()._summed_gradients(step, batches)
        if not self.stats.num_scored:
            self.optimizer.zero_grad()  # none at all, as with one process: a sum of zeros would let the old moments move on
        return loss

    def check_first_step(self) -> None:
        """The self-check of the first step, unless no group has a gradient; that of the KL term is 0 at the reference."""
        if any(scored.has_gradient for scored in self.sampled):
            super().check_first_step()

    def facts(self) -> dict[str, JSON]:
        """Rewards, lengths and how far the policy moved, under TRL's names where it has one."""
        return {
            **_summary(self.sampled),
            "frac_reward_zero_std": self.state.constant_groups[-1],
            "kl": self.stats.kl,
            "clip_ratio": self.stats.clip_share,
            "sampling_error": self.stats.ratio_error,
        }

    # ---- held-out prompts --------------------------------------------------------------------------------------------

    def evaluate(self) -> tuple[float, dict[str, JSON]]:
        """Minus the mean reward of answers to the held-out prompts, and pass@1 and pass@G; the same draws every time."""
        run = self.run
        scored, _ = self._sample(self.data.validation, derive_seed(run.seed, "grpo-validation"))
        values = [one.rewards for one in scored]
        rewards = [value for group in values for value in group]
        mean = sum(rewards) / len(rewards) if rewards else math.nan
        more: dict[str, JSON] = {
            "eval_reward": mean,
            "eval_pass_at_1": sum(value >= RIGHT for value in rewards) / max(len(rewards), 1),
            f"eval_pass_at_{run.num_generations}": sum(any(v >= RIGHT for v in group) for group in values) / len(values),
        }
        return -mean, more

    def validation_words(self, loss: float, more: dict[str, JSON]) -> str:
        """Reward and share of right answers of the held-out prompts."""
        G = self.run.num_generations
        return f"held out: reward {-loss:.4f}, pass@1 {more['eval_pass_at_1']:.1%}, pass@{G} {more[f'eval_pass_at_{G}']:.1%}"

    def best_words(self, loss: float) -> str:
        """The best mean reward of the held-out prompts."""
        return f"best held-out reward {-loss:.4f}"


def _summary(groups: Sequence[_Scored]) -> dict[str, JSON]:
    answers = [answer for scored in groups for answer in scored.answers]
    rewards = torch.tensor([value for scored in groups for value in scored.rewards], dtype=torch.float64)
    stopped = [answer.num_tokens for answer in answers if answer.stopped]
    return {
        "reward": float(rewards.mean()) if len(rewards) else None,
        "reward_std": float(rewards.std()) if len(rewards) > 1 else None,
        "completions/mean_length": sum(answer.num_tokens for answer in answers) / len(answers),
        "completions/mean_terminated_length": sum(stopped) / len(stopped) if stopped else None,
        "completions/clipped_ratio": 1 - len(stopped) / len(answers),
        "entropy": sum(answer.entropy for answer in answers) / len(answers),
    }


def _lines_before(path: Path, step: int) -> Iterator[bytes]:
    """The samples before ``step``, and before one that was cut short, perhaps within a letter: later ones are drawn again."""
    with path.open("rb") as file:
        for line in file:
            try:
                if json.loads(line)["step"] >= step:
                    return
            except (ValueError, KeyError):
                return
            yield line
