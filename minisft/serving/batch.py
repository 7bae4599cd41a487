"""The rows of one model that are being written: they join and leave between two steps, and each step reads the weights once.

As in ``minisft.generation``, nothing a row gets depends on its neighbours (but for rounding), and the random number of a draw
is a function of (seed, choice, step) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from minisft.generation import Sampling, TextStream, holes_filled, read_prompts, read_suffixes
from minisft.model import READ_AT_ONCE, CausalLM, KVCache
from minisft.native.decoder import in_eight_bits, next_logits_of
from minisft.serving.lanes import Lane
from minisft.serving.prefix_cache import PrefixCache
from minisft.serving.stops import TextUntilStop

ROOM = 128  # tokens by which a KV cache grows: a request may ask for far more than it will use
MAX_PREFILL = 4096  # tokens of prompts, padding included, that are read at once


@dataclass(frozen=True)
class TokenScore:
    """A token as it was chosen: id and log p under the model's own distribution, before temperature and cuts.

    Attributes:
        token: id.
        log_prob: its log-probability.
        top: (id, log-probability) of the likeliest, in falling order.
    """

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """One more token of one choice.

    Attributes:
        choice: which one, from 0.
        text: what has become certain; often one word, sometimes empty.
        score: of the token, if scores were asked for and it is no end token.
        finish: None while the answer goes on; ``stop`` or ``length``.
    """

    choice: int
    text: str
    score: TokenScore | None
    finish: str | None


@dataclass(eq=False)
class Job:
    """A request as it is computed.

    Attributes:
        lane: the model.
        prompt: token ids.
        num_choices: answers.
        max_tokens: the most of each.
        sampling: see ``Sampling``.
        stops: stop strings.
        top_logprobs: None without scores.
        emit: called in the computing thread with each ``Piece``, or once with None when the request failed.
        cancelled: nobody waits for it any more.
        num_cached: tokens of the prompt whose keys and values were kept from earlier requests.
    """

    lane: Lane
    prompt: Sequence[int]
    num_choices: int
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    top_logprobs: int | None
    emit: Callable[[Piece | None], None]
    cancelled: bool = field(default=False)
    num_cached: int = field(default=0)


class Row:
    """One choice of a job on its way."""

    def __init__(self, job: Job, choice: int) -> None:
        self.job, self.choice = job, choice
        self.ids: list[int] = []
        self._stream, self._text = TextStream(job.lane.tokenizer), TextUntilStop(job.stops)
        context = job.lane.model.config.max_position_embeddings
        self._limit = min(job.max_tokens, context - len(job.prompt))

    def push(self, token: int, score: TokenScore | None) -> bool:
        """Take the next token; returns whether the row goes on."""
        self.ids.append(token)
        ends = token in self.job.lane.eos_ids
        text = "" if ends else self._text.push(self._stream.push(token))
        finish = "stop" if ends or self._text.stopped else "length" if len(self.ids) >= self._limit else None
        if finish is not None:
            text += self._text.push(self._stream.finish()) + self._text.finish()
            finish = "stop" if self._text.stopped else finish
        self.job.emit(Piece(self.choice, text, None if ends else score, finish))
        return finish is None


class Batch:
    """Rows of one model. Not safe for threads: one thread owns it.

    Args:
        model: the decoder, in ``eval`` mode.
        kept: what rows that have ended leave behind.
    """

    def __init__(self, model: CausalLM, kept: PrefixCache) -> None:
        self._model, self._kept = model, kept
        self.rows: list[Row] = []
        self._cache: KVCache | None = None
        self._logits_BV = torch.empty(0)

    @torch.inference_mode()
    def admit(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of ``jobs`` and let their rows join."""
        pasts = {job: past for job in jobs if (past := self._kept.find(self._model, job.prompt)) is not None}
        for job, past in pasts.items():
            job.num_cached = int(past.lengths)
        for group in _groups([job for job in jobs if job not in pasts]):
            self._join(group, read_prompts(self._model, [job.prompt for job in group], ROOM))
        for group in _groups(pasts):
            self._join(group, read_suffixes(self._model, [job.prompt for job in group], [pasts[job] for job in group], ROOM))

    def _join(self, group: Sequence[Job], read: tuple[KVCache, Tensor]) -> None:
        cache, hidden_BD = read
        rows = [(i, Row(job, choice)) for i, job in enumerate(group) for choice in range(job.num_choices)]
        logits_BV = self._model.head(hidden_BD)
        if len(rows) > len(group):
            index = torch.tensor([i for i, _ in rows], device=logits_BV.device)
            cache, logits_BV = cache.select(index), logits_BV[index]
        if self._cache is not None:
            cache, logits_BV = joined(self._model, (self._cache, cache)), torch.cat((self._logits_BV, logits_BV))
        self.rows += [row for _, row in rows]
        self._use(cache, logits_BV)

    def _use(self, cache: KVCache, logits_BV: Tensor) -> None:
        self._cache, self._logits_BV = cache, logits_BV
        self._next_logits = next_logits_of(self._model, cache)

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row; rows that are done, or that nobody waits for, leave."""
        self._keep([r for r, row in enumerate(self.rows) if not row.job.cancelled])
        if not self.rows:
            return
        chosen = self._choose()
        scores = [self._score(r, token) for r, token in enumerate(chosen)]
        active = self._keep([r for r, row in enumerate(self.rows) if row.push(chosen[r], scores[r])])
        if self._cache is None:
            return
        if int(self._cache.lengths.max()) >= self._cache.max_length:
            self._use(joined(self._model, (self._cache,)), self._logits_BV)
        tokens = torch.tensor([chosen[r] for r in active], device=self._logits_BV.device)
        self._logits_BV = self._next_logits(tokens, self._cache)

    def _choose(self) -> list[int]:
        """The likeliest tokens all at once, the drawn ones row by row: each has a seed and a step of its own."""
        chosen: list[int] = self._logits_BV.argmax(-1).tolist()
        for r, row in enumerate(self.rows):
            if row.job.sampling.temperature > 0:
                chosen[r] = int(row.job.sampling.choose(self._logits_BV[r : r + 1], [row.choice], len(row.ids)))
        return chosen

    def _score(self, r: int, token: int) -> TokenScore | None:
        num_top = self.rows[r].job.top_logprobs
        if num_top is None:
            return None
        log_probs_V = self._logits_BV[r].float().log_softmax(-1)
        top = log_probs_V.topk(min(num_top, len(log_probs_V)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return TokenScore(token, float(log_probs_V[token]), pairs)

    def _keep(self, active: list[int]) -> list[int]:
        """Only these rows stay; returns them in the order in which they now stand."""
        if len(active) == len(self.rows):
            return active
        for r in set(range(len(self.rows))).difference(active):
            self._keep_prefix(r)
        active = holes_filled(active)
        self.rows = [self.rows[r] for r in active]
        if not active:
            self._cache = None
        elif self._cache is not None:
            self._cache.keep_(active)
            self._logits_BV = self._logits_BV[torch.tensor(active, device=self._logits_BV.device)]
        return active

    def _keep_prefix(self, r: int) -> None:
        """Keep what a row has read and written; only its prompt if steps read 8 bits, and of several choices only the first."""
        row = self.rows[r]
        if self._cache is None or row.choice > 0:
            return
        length = len(row.job.prompt) if self._model in in_eight_bits else int(self._cache.lengths[r])
        self._kept.keep(self._model, [*row.job.prompt, *row.ids][:length], self._cache.part(r, length))

    def clear(self) -> list[Job]:
        """Give up all rows; returns their jobs, one for each row."""
        jobs = [row.job for row in self.rows]
        self.rows, self._cache = [], None
        return jobs


def _groups(jobs: Collection[Job]) -> list[list[Job]]:
    """Jobs whose prompts are read together: those of one length beside each other, and not too many tokens at once.

    Attention over a cache holds scores of every token that is read with all before it, so their number has a limit too.
    """
    groups: list[list[Job]] = []
    for job in sorted(jobs, key=_num_to_read, reverse=True):
        group = [*groups[-1], job] if groups else []
        tokens = len(group) * _num_to_read(group[0]) if group else 0
        if group and tokens <= MAX_PREFILL and tokens * max(len(job.prompt) for job in group) <= MAX_PREFILL * READ_AT_ONCE:
            groups[-1] = group
        else:
            groups.append([job])
    return groups


def _num_to_read(job: Job) -> int:
    return len(job.prompt) - job.num_cached


def joined(model: CausalLM, caches: Sequence[KVCache]) -> KVCache:
    """The rows of several caches in one, with space for ``ROOM`` more tokens of the longest.

    Args:
        model: theirs.
        caches: of any lengths.

    Returns:
        a new cache.

    Cost: copies what is filled.
    """
    counts, longest = [len(cache.lengths) for cache in caches], max(int(cache.lengths.max()) for cache in caches)
    made = model.new_cache(sum(counts), longest + ROOM)
    for start, cache in zip(accumulate(counts, initial=0), caches, strict=False):
        made.put_(start, cache)
    return made
