"""Plain text, without a chat template: bits per byte, continuations by likelihood, and how far two models' predictions are
apart.

What a general benchmark of a base model asks. Every token is predicted once; a text that is longer than a window is cut into
windows that begin where the last one ended.

The idea to take home: nats per token depend on the tokenizer, bits per byte do not, and hundreds of paired texts see a change
of one percent where sixty questions see nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.batching import MIN_SHARED_FRACTION, collate, collate_families, shared_prefix
from minisft.data.chat import Encoded
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.results import Progress
from minisft.loss import IGNORE_INDEX, token_log_probs
from minisft.model import CausalLM, KVCache

WINDOW = 1_024
# A batch costs as much as so many tokens more (weights are read, layers called), so a family may add that much padding.
BATCH_TOKENS = 32


@dataclass(frozen=True)
class Continuation:
    """A context and what follows it, as token ids; what is scored are the target tokens."""

    context: list[int]
    target: list[int]


def split_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> Continuation:
    """Tokens of ``context + continuation``, cut where the tokens of ``context`` alone end.

    Trailing spaces of the context move to the continuation. Where the tokenizer merges across the border, the cut is by
    count, as lm-evaluation-harness does it.

    Args:
        tokenizer: the model's.
        context: may be empty: then the first token follows the begin token, or the end token where there is none.
        continuation: not empty.

    Returns:
        both parts.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return Continuation([prefix_id(tokenizer)], tokenizer.encode(continuation))
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    whole, length = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    return Continuation([*start, *whole[:length]], whole[length:])


def prefix_id(tokenizer: Tokenizer) -> int:
    """What the first token of a text follows: the begin token, or the end token where there is none."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    return tokenizer.eos_ids[0] if tokenizer.eos_ids else tokenizer.pad_id


@torch.inference_mode()
def log_probs(
    model: CausalLM, parts: Sequence[Continuation], pad_id: int, batch_size: int = 16, progress: Progress | None = None
) -> list[float]:
    """sum_t log p(target_t | context, target_<t) of each part.

    Args:
        model: any.
        parts: each with a context of at least one token; at most the model's context together.
        pad_id: what fills a batch.
        batch_size: parts computed at once; never changes a result (but for rounding).
        progress: called with (parts done, parts in all).

    Returns:
        natural logarithms, in the order of the parts.

    Cost: what all contexts begin with is computed once where that saves a tenth, and so is the rest of a context that several
    parts have, as the options of a question do.
    """
    found: dict[int, float] = {}
    families = _families(parts, batch_size)
    past, length = _past(model, parts, families)
    parts = [Continuation(part.context[length:], part.target) for part in parts]
    while families:
        chosen = [families.pop()]
        batch = [[_encoded(parts[i]) for i in chosen[0]]]
        cost = _cost(batch)
        while families and sum(map(len, chosen)) + len(families[-1]) <= batch_size:
            following = [_encoded(parts[i]) for i in families[-1]]
            joined = _cost([*batch, following])
            if joined > cost + _cost([following]) + BATCH_TOKENS:
                break
            cost = joined
            batch.append(following)
            chosen.append(families.pop())
        found |= dict(zip([i for family in chosen for i in family], _sums(model, batch, pad_id, past), strict=True))
        if progress is not None:
            progress(len(found), len(parts))
    return [found[i] for i in range(len(found))]


def _families(parts: Sequence[Continuation], most: int) -> list[list[int]]:
    """Parts that are computed together, the longest last: those of one context, where it is most of each part."""
    families: list[list[int]] = []
    latest: dict[tuple[int, ...], list[int]] = {}
    for i, part in enumerate(parts):
        family = latest.get(tuple(part.context))
        if len(part.context) <= len(part.target):
            families.append([i])
        elif family is None or len(family) >= most:
            families.append([i])
            latest[tuple(part.context)] = families[-1]
        else:
            family.append(i)
    return sorted(families, key=lambda family: len(parts[family[0]].context) + sum(len(parts[i].target) for i in family))


def _past(model: CausalLM, parts: Sequence[Continuation], families: Sequence[Sequence[int]]) -> tuple[KVCache | None, int]:
    """What all contexts begin with, computed, and its length; None where that saves little. A token of each stays outside."""
    if len(families) < 2:
        return None, 0
    firsts = [_encoded(parts[family[0]]) for family in families]
    shared = shared_prefix(firsts)
    computed = sum(first.prompt_length for first in firsts) + sum(len(part.target) for part in parts)
    if shared * (len(families) - 1) <= MIN_SHARED_FRACTION * computed:
        return None, 0
    past = model.new_cache(1, shared)
    model.hidden(torch.tensor([firsts[0].input_ids[:shared]], device=model.device), cache=past)
    return past, shared


def _prefix(families: Sequence[Sequence[Encoded]]) -> int:
    return min(map(shared_prefix, families)) if max(map(len, families)) > 1 else 0


def _cost(families: Sequence[Sequence[Encoded]]) -> int:
    """Tokens that a batch computes, its padding too."""
    P = _prefix(families)
    return len(families) * max(P + sum(len(row.input_ids) - P for row in family) for family in families)


def _sums(model: CausalLM, families: Sequence[Sequence[Encoded]], pad_id: int, past: KVCache | None) -> list[float]:
    """The sums of a batch, family after family."""
    P = _prefix(families)
    batch = collate_families(families, pad_id, P).to(model.device)
    hidden = model.hidden(batch.input_ids, segment_ids=batch.segment_ids, prefix_length=P, past=past)
    values = token_log_probs(hidden, model.loss_head, batch.target_ids)
    sizes = torch.tensor([len(family) for family in families], device=values.device)
    before = (sizes.cumsum(0) - sizes)[:, None] - (2 if P else 1)  # segments count from 1, the prefix first
    owner = (batch.segment_ids + before)[batch.target_ids != IGNORE_INDEX]
    return torch.zeros(int(sizes.sum()), dtype=values.dtype, device=values.device).index_add(0, owner, values).tolist()


def _hidden(model: CausalLM, part: Continuation, pad_id: int) -> tuple[Tensor, Tensor]:
    batch = collate([_encoded(part)], pad_id).to(model.device)
    return model.hidden(batch.input_ids, segment_ids=batch.segment_ids), batch.target_ids


def _encoded(part: Continuation) -> Encoded:
    supervised = [False] * len(part.context) + [True] * len(part.target)
    return Encoded([*part.context, *part.target], supervised, 0, 0, len(part.context))


# --- bits per byte


@dataclass(frozen=True)
class TextBits:
    """A text's bits, its UTF-8 bytes and the tokens that were predicted."""

    bits: float
    num_bytes: int
    num_tokens: int

    @property
    def per_byte(self) -> float:
        """Bits per byte."""
        return self.bits / self.num_bytes


def windows(tokenizer: Tokenizer, text: str, size: int) -> Iterator[Continuation]:
    """The text's tokens in windows of ``size``, each token a target once; the last window is filled up with context.

    Args:
        tokenizer: the model's.
        text: not empty.
        size: tokens of a window.

    Returns:
        windows in order.
    """
    return token_windows([prefix_id(tokenizer), *tokenizer.encode(text)], size)


def token_windows(ids: Sequence[int], size: int) -> Iterator[Continuation]:
    """``ids`` after the first in windows of ``size``, see ``windows``."""
    ids = list(ids)
    for start in range(1, len(ids), size):
        end = min(len(ids), start + size)
        first = max(0, end - size - 1) if start > 1 else 0
        yield Continuation(ids[first:start], ids[start:end])


def bits_per_byte(
    model: CausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int = WINDOW,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[TextBits]:
    """-sum log2 p(token | the tokens before it in its window) for each text, with its bytes.

    Args:
        model: any.
        tokenizer: the model's.
        texts: none empty.
        window: tokens at once, at most the model's context less one.
        batch_size: windows computed at once.
        progress: called with (windows done, windows in all).

    Returns:
        one entry a text.
    """
    size = min(window, model.config.max_position_embeddings - 1)
    parts = [list(windows(tokenizer, text, size)) for text in texts]
    totals = iter(log_probs(model, [p for each in parts for p in each], tokenizer.pad_id, batch_size, progress))
    made = []
    for text, each in zip(texts, parts, strict=True):
        nats = -sum(next(totals) for _ in each)
        made.append(TextBits(nats / math.log(2), len(text.encode()), sum(len(part.target) for part in each)))
    return made


# --- two models


@torch.inference_mode()
def kl_per_token(base: CausalLM, tuned: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], window: int = 512) -> list[float]:
    """KL(base || tuned) in nats a token for each text's first window: 0 where nothing changed; no reference is needed.

    Args:
        base: the model before.
        tuned: the model after; the same vocabulary.
        tokenizer: of both.
        texts: none empty.
        window: tokens of each text.

    Returns:
        the mean over a text's tokens, for each text.

    Raises:
        ValueError: the two have different vocabularies.
    """
    if base.config.vocab_size != tuned.config.vocab_size:
        raise ValueError(f"vocabularies of {base.config.vocab_size} and {tuned.config.vocab_size} tokens")
    found = []
    for text in texts:
        part = next(windows(tokenizer, text, min(window, base.config.max_position_embeddings - 1)))
        logs = [_window_log_probs(model, part, tokenizer.pad_id) for model in (base, tuned)]
        found.append(max(0.0, float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())))
    return found


def _window_log_probs(model: CausalLM, part: Continuation, pad_id: int) -> Tensor:
    """(N, V) log-probabilities in fp64 at the positions that predict."""
    hidden_BTD, target_ids = _hidden(model, part, pad_id)
    return model.head(hidden_BTD[0][target_ids[0] != IGNORE_INDEX]).double().log_softmax(-1)
