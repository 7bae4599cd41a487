"""Supervised fine-tuning as the training loop sees it: rows to micro-batches, next-token loss, validation loss."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from functools import cached_property

from minisft.batching import Batch, micro_batches, with_noise
from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.common.seeds import derive_seed
from minisft.data.chat import Encoded
from minisft.data.token_rows import longest_rows
from minisft.step import accumulate_gradients, validation_sums
from minisft.training.lockstep import same_logits
from minisft.training.new_tokens import unused_tokens
from minisft.training.replay import mixed_rows
from minisft.training.runlog import peak_memory_bytes
from minisft.training.task_metric import TaskMetric, read_task
from minisft.training.trainer import Trainer
from minisft.training.untrained_tokens import untrained_tokens, untrained_tokens_of


def num_tokens(row: Encoded) -> int:
    """How long a row is."""
    return len(row.input_ids)


class SFTTrainer(Trainer[Encoded]):
    """Learns to predict the supervised tokens of chats."""

    task: TaskMetric | None = None  # with ``eval_metric``, from ``prepare`` on

    def prepare(self) -> None:
        """Report special tokens that the rows train and the model cannot produce; find the rows of ``--eval-metric``."""
        self.task = read_task(self.run, self.model, self.tokenizer, self.template, [row.row for row in self.data.validation])
        if self.is_sharded:  # no process has the rows to look at
            notes = untrained_tokens_of(self.run.model, self.tokenizer, itertools.chain(*self._sets), self.model)
        else:
            notes = untrained_tokens(self.model, self.tokenizer, *self._sets)
        for note in (*notes, *unused_tokens(self.tokenizer, self._sets)):
            self.log(note)

    def step_rows(self, step: int) -> list[Encoded]:
        """The rows of one optimizer step (from 1), those to replay among them."""
        run, own, replay = self.run, self.data.train, self.data.replay
        if replay is None:
            return super().step_rows(step)
        mixed = mixed_rows(step, run.batch_size, len(own), len(replay.rows), replay.share, run.seed, self.data.shares)
        return [replay.rows[i] if is_replayed else own[i] for is_replayed, i in mixed]

    def facts(self) -> dict[str, JSON]:
        """With ``--replay``, how many of the step's supervised tokens were replayed ones."""
        if self.data.replay is None:
            return {}
        return {"replay_tokens": sum(row.num_targets for row in self.step_rows(self.state.step) if row.row < 0)}

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of one optimizer step (from 1), on the model's device."""
        return self._with_noise(self.even(self._cut(self.world.share(self.step_rows(step), num_tokens))), step)

    def _with_noise(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        run, D = self.run, self.model.config.hidden_size
        if run.neftune_alpha > 0:
            batches = [with_noise(batch, run.neftune_alpha, D, run.seed, step) for batch in batches]
        return [batch.to(self.device) for batch in batches]

    def try_step(self) -> None:
        """One micro-batch of the longest rows, forward and backward; the weights stay as they are.

        Raises:
            UserError: ``numeric/non-finite``; what ``check_gradients`` finds.
        """
        self.prepare()
        candidates = [row for rows in self._sets for row in longest_rows(rows, self.micro_batch_size)]
        longest = longest_rows(candidates, self.micro_batch_size)
        began, batches = time.monotonic(), self._with_noise(self._cut(longest), step=1)
        loss = self.gradients(1, batches)
        norm = self.optimizer.grad_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                "numeric/non-finite", "the loss or its gradient is not finite", where="the longest rows",
                found=f"loss {loss}, gradient norm {norm}", fix="look at these rows and at the base model; --dtype fp32",
            )  # fmt: skip
        self.check_first_step()
        self.optimizer.zero_grad()
        tokens, seconds = sum(batch.num_tokens for batch in batches), time.monotonic() - began
        memory = peak_memory_bytes(self.device) / 2**20
        self.log(f"longest micro-batch: {tokens:,} tokens, loss {loss:.4f}, {seconds:.1f} s, {memory:,.0f} MiB at the peak")

    def gradients(self, step: int, batches: Sequence[Batch]) -> float:
        """Backward of the mean cross-entropy per supervised token; with dropout, masks follow from (seed, step)."""
        run = self.run
        seed = derive_seed(run.seed, "dropout", step) if run.dropout > 0 else None
        num_targets = self.world.sum_ints(sum(batch.num_targets for batch in batches))[0]
        return accumulate_gradients(self.model, batches, seed, num_targets)

    def evaluate(self) -> tuple[float, dict[str, JSON]]:
        """The mean cross-entropy per supervised token of the rows held out, and the score of ``--eval-metric``."""
        total, num_targets = validation_sums(self.model, self._validation)
        [total], [num_targets] = self.world.sum_floats(total), self.world.sum_ints(num_targets)
        if self.task is None:
            return total / num_targets, {}
        with same_logits(self.model, self.world) if self.is_sharded else contextlib.nullcontext():
            score = self.task.score(self.model)  # by every process, so that none waits; the first one's counts
        return total / num_targets, {self.task.key: self.world.sum_floats(score if self.world.is_first else 0.0)[0]}

    def score(self, more: dict[str, JSON]) -> float | None:
        """The score of a validation by ``eval_metric``; None where there is none."""
        return None if self.task is None else float(str(more[self.task.key]))

    def is_best(self, loss: float, more: dict[str, JSON]) -> bool:
        """By loss, or with ``--best-by metric`` by score; of two equal scores the one with the lower loss."""
        best, score = self.state, self.score(more)
        if self.task is None or score is None or self.run.best_by == "loss" or best.best_score is None:
            return super().is_best(loss, more)
        return self.task.is_better(score, best.best_score) or (score == best.best_score and super().is_best(loss, more))

    def validation_words(self, loss: float, more: dict[str, JSON]) -> str:
        """Loss, and score where there is one."""
        words = super().validation_words(loss, more)
        return words if self.task is None else f"{words}, {self.task.words(self.score(more))}"

    def best_words(self, loss: float) -> str:
        """Loss and score of the step that was kept."""
        if self.task is None:
            return super().best_words(loss)
        best = "best validation loss" if self.run.best_by == "loss" else f"best {self.task.metric}, validation loss"
        return f"{best} {loss:.4f}, {self.task.words(self.state.best_score)}"

    @property
    def _sets(self) -> tuple[Sequence[Encoded], ...]:
        """The run's own rows, and those to replay."""
        return (self.data.train, *([self.data.replay.rows] if self.data.replay else []))

    @cached_property
    def _validation(self) -> list[Batch]:
        rows, size = self.data.validation[self.world.rank :: self.world.size], self.micro_batch_size
        return self.even([batch for i in range(0, len(rows), size) for batch in self._cut(rows[i : i + size])])

    def _cut(self, rows: Sequence[Encoded]) -> list[Batch]:
        run = self.run
        share_prefix = run.dropout == 0 and run.neftune_alpha == 0  # each row has draws of its own
        return micro_batches(
            rows, self.micro_batch_size, self.tokenizer.pad_id, run.packing, run.max_length, share_prefix=share_prefix
        )
