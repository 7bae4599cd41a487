"""Write text with a model: many prompts at once, greedily or by sampling, one token a step through a KV cache.

A step reads every weight once, whatever the number of rows, so prompts are grouped into batches; a row that is done leaves
its batch. There is no beam search, and there are no penalties or stop strings (vLLM and transformers have them).

The idea to take home: nothing a row says depends on its neighbours. Rows of a batch cannot see each other, padding stands
where no query looks, and the random number of a draw is a function of (seed, prompt, step) alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minisft.common.checks import check_sampling
from minisft.common.errors import UserError, visible
from minisft.common.seeds import derive_seed
from minisft.data.tokenizer import Tokenizer
from minisft.model import CausalLM, KVCache
from minisft.native.decoder import in_eight_bits, next_logits_of

MIN_SHARED_PROMPT = 8  # tokens: a shorter shared prefix is not worth a pass of its own
LIKELIEST = 256  # tokens in which nearly every draw ends: finding them costs a twentieth of sorting a vocabulary of 49152
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no UTF-8 (yet)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    p = softmax(logits / temperature), then only the ``top_k`` likeliest, then of those the fewest that hold ``top_p`` of
    what is left; renormalised. ``temperature`` 0 takes the likeliest. ``top_k`` 0 and ``top_p`` 1 switch the cuts off.

    Raises:
        UserError: ``config/bad-value``.

    Ref: top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1; top-k: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)

    def choose(self, logits_BV: Tensor, prompts: Sequence[int], step: int) -> Tensor:
        """One token for each row.

        Args:
            logits_BV: (B, V).
            prompts: the prompt index of each row.
            step: how many tokens each row has so far.

        Returns:
            (B,) int64.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        # derive_seed is uniform in [0, 2^63).
        u = self._scaled(logits_BV[:, :1]).new_tensor([derive_seed(self.seed, "sample", i, step) / 2**63 for i in prompts])
        if self.top_k or self.top_p < 1 or logits_BV.shape[-1] <= LIKELIEST:
            return self._drawn(logits_BV, u)
        return self._drawn_from_whole(logits_BV, u)

    def _drawn_from_whole(self, logits_BV: Tensor, u: Tensor) -> Tensor:
        """The same without sorting a whole vocabulary: the likeliest in falling order, then the rest as it stands."""
        probabilities = self._scaled(logits_BV).softmax(-1)
        likeliest, ids = probabilities.topk(LIKELIEST, sorted=True)
        cumulative = likeliest.cumsum(-1)
        threshold = u[:, None] * probabilities.sum(-1, keepdim=True)
        place = (cumulative <= threshold).sum(-1, keepdim=True)
        tokens = ids.gather(-1, place.clamp(max=LIKELIEST - 1)).squeeze(-1)
        beyond = (place.squeeze(-1) == LIKELIEST).nonzero().squeeze(-1)
        if len(beyond):
            rest = probabilities[beyond].scatter(-1, ids[beyond], 0).cumsum(-1)
            found = (rest <= (threshold - cumulative[:, -1:])[beyond]).sum(-1)
            # Rounding can push the threshold past every token with a share: fall back to the likeliest of all.
            tokens[beyond] = torch.where(found < rest.shape[-1], found, ids[beyond, 0])
        return tokens

    def _drawn(self, logits_BV: Tensor, u: Tensor) -> Tensor:
        """Inverse transform: the first token at which the running sum passes u, (B,) in [0, 1)."""
        probabilities, ids = self.distribution(logits_BV)
        cumulative = probabilities.cumsum(-1)
        threshold = u.to(cumulative)[:, None] * cumulative[:, -1:]
        place = (cumulative <= threshold).sum(-1, keepdim=True)
        # Rounding can push u * sum up to the sum itself, past every token with a share: fall back to the last of them.
        return ids.gather(-1, torch.minimum(place, (probabilities > 0).sum(-1, keepdim=True) - 1)).squeeze(-1)

    def _scaled(self, logits_BV: Tensor) -> Tensor:
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / self.temperature

    def distribution(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """What is sampled from: probabilities (B, N) in falling order, fp32 at least, and their token ids (B, N)."""
        scaled = self._scaled(logits_BV)
        N = min(self.top_k or scaled.shape[-1], scaled.shape[-1])
        kept, ids = scaled.topk(N, sorted=True)
        probabilities = kept.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # held by the likelier tokens; 0 for the first, which always stays
        probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        return probabilities / probabilities.sum(-1, keepdim=True), ids


@dataclass(frozen=True)
class Sampled:
    """One sampled answer.

    Attributes:
        ids: the new tokens; the last one is an end token if and only if the answer stopped by itself.
        log_probs: log p of each under softmax(logits / temperature), in the model's own precision of logits.
        entropy: mean over the tokens of the entropy of what each was drawn from, in nats.
    """

    ids: list[int]
    log_probs: list[float]
    entropy: float

    def stopped(self, eos_ids: Collection[int]) -> bool:
        """Whether the answer ends by itself, not at the limit of tokens."""
        return self.ids[-1] in eos_ids


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        what, expected = "a setting is out of range", "at least 1"
        raise UserError("config/bad-value", what, where=name, found=str(value), expected=expected, fix="give a larger number")


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until it says one of ``eos_ids``, has ``max_new_tokens`` more, or fills the model's context.

    Args:
        model: with or without adapters; dropout is off meanwhile.
        prompts: token ids; of any lengths, none empty.
        max_new_tokens: the most tokens to write for each prompt.
        eos_ids: tokens that end a row; may be empty.
        temperature, top_p, top_k, seed: how a token is chosen, see ``Sampling``.
        batch_size: rows computed at once; never changes a row's result (but for rounding).
        on_token: called with (index of the prompt, token) as tokens come; a row for which it returns True ends there.

    Returns:
        the new ids of each prompt; the last one is an eos if and only if the row stopped by itself.

    Raises:
        UserError: a setting is out of range, a prompt is empty or fills the context.

    Cost: a KV cache of 2 * layers * kv heads * head_dim values for each of the batch's tokens.
    """
    sampling = Sampling(temperature, top_p, top_k, seed)
    _require_positive("max_new_tokens", max_new_tokens)
    _require_positive("batch_size", batch_size)
    _check_prompts(model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # neighbours of one length: little padding
    for start in range(0, len(prompts), batch_size):
        batch = {i: prompts[i] for i in longest_first[start : start + batch_size]}
        ended: set[int] = set()
        for index, token, _, _ in _scored_tokens(model, batch, max_new_tokens, eos_ids, sampling, ended, scored=False):
            answers[index].append(token)
            if on_token is not None and on_token(index, token):
                ended.add(index)
    return answers


def sample_groups(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    num_answers: int,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    numbers: Sequence[int] | None = None,
) -> list[list[Sampled]]:
    """Sample several answers to each prompt from the whole distribution, and note what each token's probability was.

    p = softmax(logits / temperature), no top-k and no top-p: what is sampled is what ``token_log_probs`` scores.

    Args:
        model: the model, its adapters as they are; dropout is off while it samples.
        prompts: token ids of each prompt; none empty.
        num_answers: G, answers to each.
        max_new_tokens: the most tokens of an answer.
        eos_ids: ids that end an answer.
        temperature: > 0.
        seed: answer g of prompt i is a function of (seed, i, g), whatever else is in the batch (but for rounding).
        batch_size: answers computed at once; a group may be cut by it.
        numbers: i of each prompt where ``prompts`` are a part of some; by default 0, 1, ...

    Returns:
        A group of ``num_answers`` for each prompt, in order.

    Raises:
        UserError: a setting is out of range, a prompt is empty or fills the context.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        what, expected = "a setting is out of range", "a positive number"
        raise UserError("config/bad-value", what, where="temperature", found=str(temperature), expected=expected, fix="try 1")
    _require_positive("num_answers", num_answers)
    _require_positive("max_new_tokens", max_new_tokens)
    _check_prompts(model, prompts)
    sampling = Sampling(temperature, seed=seed)
    numbered = zip(range(len(prompts)) if numbers is None else numbers, prompts, strict=True)
    jobs = [(i * num_answers + g, prompt) for i, prompt in numbered for g in range(num_answers)]
    found: dict[int, list[tuple[int, float, float]]] = {job: [] for job, _ in jobs}
    for start in range(0, len(jobs), batch_size):
        batch = dict(jobs[start : start + batch_size])
        for job, token, log_prob, entropy in _scored_tokens(model, batch, max_new_tokens, eos_ids, sampling):
            found[job].append((token, log_prob, entropy))
    answers = [_sampled(found[job]) for job, _ in jobs]
    return [answers[i * num_answers : (i + 1) * num_answers] for i in range(len(prompts))]


def _sampled(tokens: Sequence[tuple[int, float, float]]) -> Sampled:
    ids, log_probs, entropies = (list(column) for column in zip(*tokens, strict=True))
    return Sampled(ids, log_probs, sum(entropies) / len(entropies))


def _check_prompts(model: CausalLM, prompts: Sequence[Sequence[int]]) -> None:
    context = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise UserError(
                "data/prompt-length",
                "a prompt is empty or fills the model's whole context",
                where=f"prompt {index + 1}",
                found=f"{len(prompt)} tokens",
                expected=f"1 to {context - 1}",
            )


@torch.inference_mode()
def _scored_tokens(
    model: CausalLM,
    prompts: dict[int, Sequence[int]],
    max_new_tokens: int,
    eos_ids: Collection[int],
    sampling: Sampling,
    ended: Collection[int] = (),
    scored: bool = True,
    kept: ChatCache | None = None,
) -> Iterator[tuple[int, int, float, float]]:
    """(prompt index, token, its log-probability, entropy), step by step, for one batch; zeros unless ``scored``.

    ``ended`` may grow meanwhile: prompts in it get no further token. With ``kept`` there is one prompt.
    """
    context = model.config.max_position_embeddings
    limits = {i: min(max_new_tokens, context - len(prompt)) for i, prompt in prompts.items()}
    rows = list(prompts)
    with no_dropout(model):
        read = read_prompts if kept is None else kept.read
        cache, hidden_BD = read(model, list(prompts.values()), max(limits.values()))
        logits_BV, next_logits = model.head(hidden_BD), next_logits_of(model, cache)
        for step in range(max_new_tokens):
            tokens = sampling.choose(logits_BV, rows, step)
            chosen = tokens.tolist()
            zeros = [0.0] * len(rows)
            log_probs, entropies = _scores(logits_BV, tokens, sampling.temperature) if scored else (zeros, zeros)
            yield from zip(rows, chosen, log_probs, entropies, strict=True)
            active = [r for r, i in enumerate(rows) if chosen[r] not in eos_ids and step + 1 < limits[i] and i not in ended]
            if not active:
                return
            if len(active) < len(rows):
                active = holes_filled(active)
                rows, tokens = [rows[r] for r in active], tokens[torch.tensor(active, device=tokens.device)]
                cache.keep_(active)
            logits_BV = next_logits(tokens, cache)
            if kept is not None and model not in in_eight_bits:  # a later prompt is read with the weights as they are
                kept.ids += tokens.tolist()


def holes_filled(active: Sequence[int]) -> list[int]:
    """The rows that stay, so that ``KVCache.keep_`` copies least: each in its place if there is one, the last in the holes."""
    staying = {row for row in active if row < len(active)}
    moving = iter(row for row in active if row >= len(active))
    return [row if row in staying else next(moving) for row in range(len(active))]


def _scores(logits_BV: Tensor, tokens: Tensor, temperature: float) -> tuple[list[float], list[float]]:
    """log softmax(logits / temperature) at ``tokens``, and the entropy of each row in nats."""
    scaled = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / temperature
    log_probs_BV = scaled.log_softmax(-1)
    entropy = -(log_probs_BV.exp() * log_probs_BV).sum(-1)
    return log_probs_BV.gather(-1, tokens[:, None]).squeeze(-1).tolist(), entropy.tolist()


def read_prompts(model: CausalLM, prompts: Sequence[Sequence[int]], num_new: int) -> tuple[KVCache, Tensor]:
    """Run prompts through the model once; equal prompts are read once, and so is a prefix that all of them share.

    Args:
        model: the decoder.
        prompts: token ids, none empty.
        num_new: how many more tokens a row the cache must hold.

    Returns:
        a KV cache with space for ``num_new`` more tokens a row, and the hidden state (B, D) at each prompt's last token.
    """
    different = list(dict.fromkeys(map(tuple, prompts)))
    cache, hidden_BD = read_suffixes(model, different, [model.new_cache(1, 0)] * len(different), num_new)
    if len(different) == len(prompts):
        return cache, hidden_BD
    rows = torch.tensor([different.index(tuple(prompt)) for prompt in prompts], device=model.device)
    return cache.select(rows), hidden_BD[rows]


def read_suffixes(
    model: CausalLM, prompts: Sequence[Sequence[int]], pasts: Sequence[KVCache], num_new: int
) -> tuple[KVCache, Tensor]:
    """``read_prompts`` where a prefix of each is known; a longer one that all of them share is read once.

    Args:
        model: the decoder.
        prompts: token ids.
        pasts: for each a cache of one row: its prefix, at most all of its tokens but the last.
        num_new: how many more tokens a row the cache must hold.

    Returns:
        a KV cache with space for ``num_new`` more tokens a row, and the hidden state (B, D) at each prompt's last token.
    """
    P = _shared_prefix(prompts)
    if max(int(past.lengths) for past in pasts) + MIN_SHARED_PROMPT <= P:
        cache, _ = read_suffixes(model, [prompts[0][:P]], pasts[:1], 0)
        pasts = [cache.part(0, P)] * len(prompts)
    rests = [prompt[int(past.lengths) :] for prompt, past in zip(prompts, pasts, strict=True)]
    lengths = torch.tensor([len(rest) for rest in rests])
    longest = int(lengths.max())
    cache = model.new_cache(len(prompts), max(int(past.lengths) for past in pasts) + longest + num_new)
    for row, past in enumerate(pasts):
        cache.put_(row, past)
    input_ids = torch.tensor([[*rest, *[0] * (longest - len(rest))] for rest in rests], device=model.device)
    segment_ids = (torch.arange(longest) < lengths[:, None]).long().to(model.device)
    hidden_BTD = model.hidden(input_ids, segment_ids=segment_ids, cache=cache)
    return cache, hidden_BTD[torch.arange(len(prompts)), lengths - 1]


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prefix that all prompts share, leaving each at least one token of its own; 0 where it saves little."""
    length = _num_common([prompt[:-1] for prompt in prompts])
    return length if len(prompts) > 1 and length >= MIN_SHARED_PROMPT else 0


def _num_common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    columns = enumerate(zip(*rows, strict=False))
    return next((i for i, tokens in columns if len(set(tokens)) > 1), min(map(len, rows)))


@dataclass
class ChatCache:
    """What a model has read and said in a chat, so that the next turn computes only what is new.

    Keys and values of a token depend on the tokens before it alone, so those of the prefix that the next prompt shares with the
    last one and its answer are taken over; whatever differs, as after an edit, is computed anew. One model, as it stands.

    Attributes:
        ids: the tokens, in order.
        cache: their keys and values, and perhaps more; None before the first turn.
    """

    ids: list[int] = field(default_factory=list)
    cache: KVCache | None = None

    def read(self, model: CausalLM, prompts: Sequence[Sequence[int]], num_new: int) -> tuple[KVCache, Tensor]:
        """``read_prompts`` of one prompt.

        Args:
            model: the decoder, the same in every turn.
            prompts: the prompt's token ids, in a list.
            num_new: how many more tokens the cache must hold.

        Returns:
            a KV cache of one row with space for ``num_new`` more tokens, and the hidden state (1, D) at the last token.
        """
        (prompt,) = prompts
        shared = _num_common([self.ids, prompt[:-1]])  # the last token is computed in any case: its state is asked for
        past = model.new_cache(1, 0) if self.cache is None else self.cache.part(0, shared)
        cache, hidden_BD = read_suffixes(model, prompts, [past], num_new)
        self.ids, self.cache = list(prompt), cache
        return cache, hidden_BD


@contextlib.contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; every module gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class TextStream:
    """Token ids in, text out, as early as it is certain: never half a character, never text that changes later.

    A character may be spread over several byte-level tokens; until its last byte has come, the decoder shows U+FFFD at
    the end, and the text is held back. New ids are decoded together with the ones before them, because some tokenizers
    write the first token of a text without its leading space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._said: list[int] = []  # the ids of the last piece handed out
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that has become certain with ``token``; often one word, sometimes empty."""
        self._held.append(token)
        piece = self._piece()
        return "" if piece.endswith(REPLACEMENT) else self._hand_out(piece)

    def finish(self) -> str:
        """What is still held back: the text ended within a character."""
        return self._hand_out(self._piece())

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._said)
        return self._tokenizer.decode([*self._said, *self._held])[len(before) :]

    def _hand_out(self, piece: str) -> str:
        if piece:
            self._said, self._held = self._held, []
        return piece


def safe_text(text: str) -> str:
    r"""``text`` for a terminal: ESC and other control characters become ``\xNN``; new lines and tabs stay."""
    return "".join(c if c in "\n\t" else visible(c) for c in text)


def stream_chat(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    show: Callable[[str], None],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    sampling: Sampling,
    kept: ChatCache | None = None,
) -> str:
    """Answer one prompt, handing pieces of text to ``show`` as they come, made safe for a terminal.

    Args:
        model: with or without adapters.
        tokenizer: turns the new ids into text.
        prompt: token ids.
        show: called with each piece of text.
        max_new_tokens: the most tokens to write.
        eos_ids: tokens that end the answer.
        sampling: how a token is chosen.
        kept: what the turns before have left, and this one leaves; None to read the whole prompt.

    Returns:
        the whole answer, as the model said it (not made safe): what belongs into the next turn's history.

    Raises:
        UserError: the prompt is empty or fills the context.
    """
    _require_positive("max_new_tokens", max_new_tokens)
    _check_prompts(model, [prompt])
    stream, pieces = TextStream(tokenizer), []
    for _, token, _, _ in _scored_tokens(model, {0: prompt}, max_new_tokens, eos_ids, sampling, scored=False, kept=kept):
        if token not in eos_ids:
            pieces.append(stream.push(token))
            show(safe_text(pieces[-1]))
    pieces.append(stream.finish())
    show(safe_text(pieces[-1]))
    return "".join(pieces)
