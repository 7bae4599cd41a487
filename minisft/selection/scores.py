"""What a model thinks of each row: the loss of the answer with its prompt, without it, and their comparison.

With l_t = -log p(y_t | ...), y the answer's tokens and x everything before them:

    loss = mean l(y | x)        ifd = mean l(y | x) / mean l(y)        pmi = mean l(y) - mean l(y | x) = -log(ppl-ifd)

IFD comes in two forms that rank differently, both called so in the literature: the ratio of losses (Cherry) and of perplexities
(Superfiltering), exp(mean l(y | x) - mean l(y)). Both means run over the same tokens: the answer is rendered with the same
template, its prompt replaced by empty turns, and its tokens are found by their mask. A row is never cut: one that does not fit
has no score. A score that is no number is an error and not a bad score.

A small model's loss is no judgement of quality. These numbers find rows whose prompt and answer do not belong together.

Ref: Li et al. 2023, arXiv:2308.12032, equation 3; Li et al. 2024, arXiv:2402.00530.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minisft.batching import collate
from minisft.common.errors import UserError
from minisft.data.chat import Encoded, encode_chat
from minisft.data.messages import Example
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.loss import head_loss_sum
from minisft.model import CausalLM

STATE_DEPTH = 2 / 3  # of the layers; later ones are bent towards the next token
DIGITS = 5  # of a loss: what lies below depends on how rows were batched


@dataclass(frozen=True)
class RowScore:
    """One row's numbers.

    Attributes:
        row: its index.
        tokens: of the whole row with its template.
        targets: supervised tokens.
        loss: mean l(y | x); None without a score.
        loss_alone: mean l(y); None without a score, or where it was not asked for.
        reason: why there is no score, or an empty string.
        state: the mean hidden state of its tokens, where it was asked for.
    """

    row: int
    tokens: int
    targets: int
    loss: float | None = None
    loss_alone: float | None = None
    reason: str = ""
    state: NDArray[np.float16] | None = None

    @property
    def ifd(self) -> float | None:
        """The ratio of losses; infinite when the answer alone has none."""
        if self.loss is None or self.loss_alone is None:
            return None
        return self.loss / self.loss_alone if self.loss_alone else math.inf

    @property
    def pmi(self) -> float | None:
        """Nats a token that the prompt explains."""
        return None if self.loss is None or self.loss_alone is None else self.loss_alone - self.loss

    @property
    def ppl_ifd(self) -> float | None:
        """The ratio of perplexities, exp(-pmi)."""
        return None if self.pmi is None else math.exp(-self.pmi)


@dataclass(frozen=True)
class Judge:
    """A model with all that turns rows into its losses.

    Attributes:
        model, tokenizer, template: who is asked, and how rows are written.
        max_length: longest row in tokens; at most the model's context.
        batch_size: rows computed at once; changes nothing but the time.
        alone: compute the loss of the answer without its prompt too.
        states: compute mean hidden states too.
    """

    model: CausalLM
    tokenizer: Tokenizer
    template: ChatTemplate
    max_length: int
    batch_size: int
    alone: bool
    states: bool

    @property
    def limit(self) -> int:
        """The longest row that gets a score."""
        return min(self.max_length, self.model.config.max_position_embeddings)


def score_rows(judge: Judge, examples: Sequence[Example], rows: Sequence[int]) -> Iterator[list[RowScore]]:
    """Scores in groups, as they are computed; rows of like length together, each row exactly once.

    Args:
        judge: the model.
        examples: the pool.
        rows: which of them, by index.

    Yields:
        the scores of the next rows.

    Raises:
        UserError: ``numeric/non-finite-loss``; ``tokenizer/template...``.
    """
    for start in range(0, len(rows), 64 * judge.batch_size):  # lengths are known for these; a kill loses one batch
        encoded = [_encode(judge, examples[i], i) for i in rows[start : start + 64 * judge.batch_size]]
        yield [pair for pair in encoded if isinstance(pair, RowScore)]
        pairs = [pair for pair in encoded if not isinstance(pair, RowScore)]
        pairs.sort(key=lambda pair: (-len(pair[0].input_ids), pair[0].row))
        for first in range(0, len(pairs), judge.batch_size):
            yield _score(judge, pairs[first : first + judge.batch_size])


def _encode(judge: Judge, example: Example, index: int) -> tuple[Encoded, Encoded] | RowScore:
    """The row, and its answers with empty prompts; or why it has no score. ``row`` is the index here."""
    encoded = encode_chat(judge.tokenizer, judge.template, example.messages, row=index)
    size = len(encoded.input_ids)
    if not any(encoded.supervised[1:]):
        return RowScore(index, size, 0, reason="no supervised token")
    blank = [m if m.role == "assistant" else replace(m, content="") for m in example.messages if m.role != "system"]
    alone = _with_start(judge, encode_chat(judge.tokenizer, judge.template, blank, row=index)) if judge.alone else encoded
    longest = max(size, len(alone.input_ids))
    if longest > judge.limit:
        return RowScore(index, size, encoded.num_targets, reason=f"too long: {longest} tokens, at most {judge.limit}")
    encoded = _with_start(judge, encoded)
    if _targets(encoded) != _targets(alone):
        return RowScore(index, size, encoded.num_targets, reason="the answer has other tokens without its prompt")
    return encoded, alone


def _with_start(judge: Judge, encoded: Encoded) -> Encoded:
    """With a token in front, when the first one is a target: nothing would predict it otherwise."""
    if encoded.supervised[:1] != [True]:
        return encoded
    start = judge.tokenizer.bos_id if judge.tokenizer.bos_id is not None else next(iter(judge.tokenizer.eos_ids), 0)
    return replace(encoded, input_ids=[start, *encoded.input_ids], supervised=[False, *encoded.supervised])


def _targets(encoded: Encoded) -> list[int]:
    return [i for i, supervised in zip(encoded.input_ids, encoded.supervised, strict=True) if supervised]


@torch.inference_mode()
def _score(judge: Judge, pairs: Sequence[tuple[Encoded, Encoded]]) -> list[RowScore]:
    losses, states = _losses(judge, [encoded for encoded, _ in pairs], judge.states)
    alone = _losses(judge, [blank for _, blank in pairs], False)[0] if judge.alone else [None] * len(pairs)
    return [
        RowScore(encoded.row, len(encoded.input_ids), encoded.num_targets, loss, without, state=state)
        for (encoded, _), loss, without, state in zip(pairs, losses, alone, states, strict=True)
    ]


def _losses(judge: Judge, rows: Sequence[Encoded], with_states: bool) -> tuple[list[float], list[NDArray[np.float16] | None]]:
    """The mean loss of each row's supervised tokens, and the mean of its tokens' states."""
    model = judge.model
    batch = collate(rows, judge.tokenizer.pad_id).to(model.device)
    seen: list[Tensor] = []
    hook = _middle_layer(model).register_forward_hook(lambda _, __, output: seen.append(output)) if with_states else None
    try:
        hidden_BTD = model.hidden(batch.input_ids, segment_ids=batch.segment_ids)
    finally:
        if hook is not None:
            hook.remove()
    sums = [float(head_loss_sum(h, model.loss_head, ids)) for h, ids in zip(hidden_BTD, batch.target_ids, strict=True)]
    means = [round(total / row.num_targets, DIGITS) for total, row in zip(sums, rows, strict=True)]
    for row, mean in zip(rows, means, strict=True):
        if not math.isfinite(mean):
            what, fix = "the loss of a row is not finite", "check the model's weights"
            raise UserError("numeric/non-finite-loss", what, where=f"row {row.row + 1}", found=str(mean), fix=fix)
    return means, _pooled(seen[0].view(hidden_BTD.shape), batch.segment_ids) if with_states else [None] * len(rows)


def _middle_layer(model: CausalLM) -> nn.Module:
    return model.model.layers[max(0, round(STATE_DEPTH * model.config.num_layers) - 1)]


def _pooled(states_BTD: Tensor, segment_ids: Tensor) -> list[NDArray[np.float16] | None]:
    weight = (segment_ids > 0).unsqueeze(-1).to(torch.float32)
    means = (states_BTD.float() * weight).sum(1) / weight.sum(1)
    return list(means.cpu().numpy().astype(np.float16))
