"""A DPO run as the training loop sees it: pairs to batches, the reference computed once, TRL's names in the log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minisft.batching import Batch
from minisft.common.atomic_files import write_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.generation import no_dropout
from minisft.training.dpo import DPOSettings, EncodedPair, PairStats, pair_batches, pair_gradients, reference_log_probs
from minisft.training.preference_config import DPOConfig
from minisft.training.trainer import Trainer

REFERENCE = "reference.safetensors"
WORST_CHANGE = -1.0  # nats a token: below it the chosen answer itself has become unlikely
# Parts of a run's identity that the reference does not depend on (its tokens show what template and date made of the rows).
FORGIVEN = ("config", "compute", "format", "template", "date")


def num_tokens(pair: EncodedPair) -> int:
    """How long a pair is, both sides together."""
    return len(pair.chosen.input_ids) + len(pair.rejected.input_ids)


class DPOTrainer(Trainer[EncodedPair]):
    """Learns to prefer the chosen answers. ``prepare`` computes the reference, before the first step or a resume."""

    run: DPOConfig
    command = "dpo"

    def prepare(self) -> None:
        """The reference: read from the run's folder, or computed by the model as it is now, and kept there.

        Raises:
            UserError: ``checkpoint/reference`` where the kept one belongs to other data, base, adapter or template.
        """
        run = self.run
        self.settings = DPOSettings(run.beta, run.loss, run.label_smoothing, run.rpo_alpha)
        self.stats: PairStats | None = None
        self._warned = False
        path, identity = self.out / REFERENCE, self._reference_identity()
        self.world.barrier()  # whether it is there is asked before the first process may write it
        if path.exists():
            self.reference = _read(path, identity)
            return
        self.log(f"reference: log-probabilities of {len(self.data.train) + len(self.data.validation)} pairs, before step 1")
        from tqdm import tqdm  # late: nothing else here needs it

        # ``rows`` says which pair a batch is: training pairs count from 0, validation pairs follow.
        pairs = (*self.data.train, *self.data.validation)
        mine = range(self.world.rank, len(pairs), self.world.size)
        batches = self.even(pair_batches([pairs[i] for i in mine], mine, self.tokenizer.pad_id, self.run.max_length))
        quiet = None if self.world.is_first else True
        found = reference_log_probs(self.model, tqdm(batches, "reference", unit="batch", leave=False, disable=quiet))
        values = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for pair, log_probs in found.items():
            values[pair] = torch.tensor(log_probs, dtype=torch.float64)
        self.world.sum_table_(values)
        self.reference = {pair: (chosen, rejected) for pair, (chosen, rejected) in enumerate(values.tolist())}
        tensors = {"pair": torch.arange(len(pairs)), "log_probs": values}
        self.world.on_first(lambda: write_durably(path, save(tensors, {"identity": identity})))

    def _reference_identity(self) -> str:
        parts = {name: value for name, value in self.identity.items() if name not in FORGIVEN}
        start = {"method": self.run.method, "seed": self.run.seed, **{k: self.run.to_dict()[k] for k in ("quant", "dtype")}}
        return hashlib.sha256(json.dumps([parts, start], sort_keys=True).encode()).hexdigest()

    @cached_property
    def _numbers(self) -> dict[int, int]:
        """Row of the training file -> number of its pair."""
        return {pair.row: number for number, pair in enumerate(self.data.train)}

    def batches(self, step: int) -> list[Batch]:
        """The step's pairs on the model's device, as many to a batch as fit ``--max-length`` positions."""
        pairs = self.world.share(self.step_rows(step), num_tokens)
        return self._batches(pairs, [self._numbers[pair.row] for pair in pairs])

    def _batches(self, pairs: Sequence[EncodedPair], numbers: Sequence[int]) -> list[Batch]:
        batches = pair_batches(pairs, numbers, self.tokenizer.pad_id, self.run.max_length)
        return [batch.to(self.device) for batch in self.even(batches)]

    def gradients(self, step: int, batches: Sequence[Batch]) -> float:
        """Backward of the mean loss over the step's pairs."""
        share = pair_gradients(self.model, batches, self.reference, self.settings, num_pairs=len(self.step_rows(step)))
        self.stats = self._summed(share)
        return share.loss

    def _summed(self, share: PairStats) -> PairStats:
        """The means over all pairs of the step from the shares of the processes."""
        return PairStats(*self.world.sum_floats(*astuple(share)))

    def facts(self) -> dict[str, JSON]:
        """The means over the step's pairs, under TRL's names; warns once where the chosen answers lose too much."""
        assert self.stats is not None
        if self.stats.chosen_change < WORST_CHANGE and not self._warned:
            self._warned = True
            self.log(
                f"warning: the chosen answers have lost {-self.stats.chosen_change:.2f} nats a token against the reference; "
                "--rpo-alpha 1, a larger --beta or fewer steps keep them likely"
            )
        return dict(self.stats.metrics())

    def evaluate(self) -> tuple[float, dict[str, JSON]]:
        """The mean loss of the pairs held out, and their means under TRL's names."""
        first, pairs = len(self.data.train), self.data.validation
        mine = range(self.world.rank, len(pairs), self.world.size)
        batches = self._batches([pairs[i] for i in mine], [first + i for i in mine])
        with torch.no_grad(), no_dropout(self.model):
            share = pair_gradients(self.model, batches, self.reference, self.settings, backward=False, num_pairs=len(pairs))
        stats = self._summed(share)
        return stats.loss, {f"eval_{name}": value for name, value in stats.metrics().items()}

    def validation_words(self, loss: float, more: dict[str, JSON]) -> str:
        """Loss and accuracy of the pairs held out."""
        right, change = more["eval_rewards/accuracies"], more["eval_logps/chosen_change"]
        return f"validation loss {loss:.4f}, {right:.1%} of pairs right, chosen answers {change:+.3f} nats a token"


def _read(path: Path, identity: str) -> dict[int, tuple[float, float]]:
    try:
        with safe_open(path, framework="pt") as file:
            saved = (file.metadata() or {}).get("identity")
            pairs, values = file.get_tensor("pair").tolist(), file.get_tensor("log_probs").tolist()
    except (SafetensorError, OSError) as error:
        raise UserError(
            "checkpoint/reference", "the reference cannot be read", where=visible(path), found=visible(error),
            fix="delete it: it is computed again before the run goes on",
        ) from None  # fmt: skip
    if saved != identity:
        raise UserError(
            "checkpoint/reference", "the reference belongs to another run", where=visible(path),
            found="other data, base, adapter, template or seed", expected="those of this run",
            fix="give the settings and files that the run was started with",
        )  # fmt: skip
    return {pair: (value[0], value[1]) for pair, value in zip(pairs, values, strict=True)}
