"""Rows of a DPO or GRPO run: read, split, encoded, and the facts that identify them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.common.seeds import derive_seed
from minisft.data.chat import Encoded, encode_chat, fit, resolve_template
from minisft.data.encoding import limit_words
from minisft.data.messages import Message
from minisft.data.pairs import Pair, read_pairs
from minisft.data.prompts import Prompt, read_prompts
from minisft.data.template import ChatTemplate, current_time
from minisft.data.tokenizer import Tokenizer
from minisft.training.dpo import EncodedPair
from minisft.training.identity import tokens_sha256
from minisft.training.preference_config import DPOConfig, GRPOConfig
from minisft.training.rewards import REFERENCE, Reward
from minisft.training.run_data import RunData, template_choice

Log = Callable[[str], None]
T = TypeVar("T", Pair, Prompt)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids, and what its reward reads.

    Attributes:
        input_ids: up to where the assistant answers.
        columns: the row, with its own answer as ``reference``.
        row: lines or items from 1.
        where: file and line, for errors.
    """

    input_ids: list[int]
    columns: dict[str, JSON]
    row: int
    where: str


def prepare_pairs(
    run: DPOConfig,
    tokenizer: Tokenizer,
    log: Log,
    began: datetime.datetime | None = None,
    context: int | None = None,
) -> tuple[ChatTemplate, RunData[EncodedPair]]:
    """Read, split and encode the pairs of a run.

    Args:
        run: the settings.
        tokenizer: the model's.
        log: is told what was dropped or cut.
        began: when the run began, if it is resumed.
        context: the most tokens that the model is made for, to name the limit; ``run.max_length`` is at most that.

    Returns:
        The chat template, and the pairs.

    Raises:
        UserError: bad rows, no usable pair.
    """
    now = began or current_time()
    template = resolve_template(tokenizer, template_choice(run, log), now)
    dataset = read_pairs(run.data, run.map)
    held_out = read_pairs(run.eval_data, run.map) if run.eval_data else None
    train, validation = (
        (dataset.pairs, held_out.pairs)
        if held_out
        else _split(dataset.pairs, lambda pair: pair.prompt, run.validation_share, run.seed)
    )
    encoded = [
        _encode_pairs(pairs, run, tokenizer, template, use, path, log, limit_words(run.max_length, context))
        for pairs, use, path in ((train, "training", run.data), (validation, "validation", run.eval_data or run.data))
    ]
    for note in (*dataset.notes, *tokenizer.notes, *_near_identical(encoded[0])):
        log(note)
    if not encoded[0]:
        raise UserError(
            "data/no-rows", "no pair fits", where=visible(run.data), found=f"{len(train)} pairs",
            expected=f"answers that fit {limit_words(run.max_length, context)}", fix=_fix_length(run.max_length, context),
        )  # fmt: skip
    log(f"{len(encoded[0])} pairs to train on, {len(encoded[1])} to validate on")
    sides = [[side for pair in pairs for side in (pair.chosen, pair.rejected)] for pairs in encoded]
    hashes: dict[str, JSON] = {"train": dataset.sha256, "eval": held_out.sha256 if held_out else None}
    identity = _identity(hashes, tokens_sha256(*sides), template, now)
    facts: dict[str, JSON] = {
        use: {"path": data.path, "sha256": data.sha256, "form": data.form, "counts": dict(data.counts), "pairs": len(pairs)}
        for use, data, pairs in (("train", dataset, encoded[0]), ("validation", held_out or dataset, encoded[1]))
    }
    return template, RunData(encoded[0], encoded[1], identity, facts)


def _identity(hashes: dict[str, JSON], tokens: str, template: ChatTemplate, now: datetime.datetime) -> dict[str, JSON]:
    return {"data": hashes, "tokens": tokens, "template": template.sha256, "date": now.isoformat()}


def _split(
    rows: Sequence[T], key: Callable[[T], tuple[Message, ...]], share: float, seed: int
) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Hold out about ``share`` of the prompts with all their rows: (training, validation), each in file order."""
    first: dict[tuple[Message, ...], int] = {}
    for row in rows:
        first.setdefault(key(row), row.row)
    shuffled = sorted(first, key=lambda prompt: derive_seed(seed, "split", first[prompt]))
    count = min(max(round(share * len(shuffled)), 1 if share > 0 else 0), len(shuffled) - 1)
    held_out = set(shuffled[:count])
    return tuple(r for r in rows if key(r) not in held_out), tuple(r for r in rows if key(r) in held_out)


def _encode_pairs(
    pairs: Sequence[Pair],
    run: DPOConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    use: str,
    path: str,
    log: Log,
    limit: str,
) -> tuple[EncodedPair, ...]:
    found: list[EncodedPair] = []
    cut, too_long = 0, []
    for pair in pairs:
        sides = [_encode_side(pair, answer, run, tokenizer, template, path) for answer in (pair.chosen, pair.rejected)]
        fitted = _fit_pair(sides[0], sides[1], run.max_length)
        if fitted is None:
            too_long.append(pair.row)
            continue
        cut += len(fitted.chosen.input_ids) < len(sides[0].input_ids)
        found.append(fitted)
    if cut:
        log(f"{use}: {cut} pairs lost the start of their prompt to {limit}, both sides alike")
    if too_long:
        log(f"{use}: {len(too_long)} pairs dropped: an answer does not fit {limit}: rows {listing(map(str, too_long))}")
    return tuple(found)


def _encode_side(
    pair: Pair, answer: Message, run: DPOConfig, tokenizer: Tokenizer, template: ChatTemplate, path: str
) -> Encoded:
    encoded = encode_chat(
        tokenizer, template, [*pair.prompt, replace(answer, train=True)], turns="last",
        allow_control_tokens=run.allow_control_tokens, row=pair.row,
    )  # fmt: skip
    if not encoded.num_targets:
        raise UserError(
            "data/empty-answer", "an answer has no token", where=f"{visible(path)}:{pair.row}",
            expected="at least one token in each answer", fix="drop the row",
        )  # fmt: skip
    return encoded


def _fit_pair(chosen: Encoded, rejected: Encoded, max_length: int) -> EncodedPair | None:
    """Both sides within ``max_length`` with the same start of the prompt cut off; None where an answer does not fit."""
    over = max(len(chosen.input_ids), len(rejected.input_ids)) - max_length
    if over <= 0:
        return EncodedPair(chosen, rejected)
    fitted = [fit(side, len(side.input_ids) - over) for side in (chosen, rejected)]
    return None if fitted[0] is None or fitted[1] is None else EncodedPair(fitted[0], fitted[1])


def _near_identical(pairs: Sequence[EncodedPair]) -> list[str]:
    """A note on pairs whose answers share most tokens: their likelihoods tend to fall together (arXiv:2410.08847)."""
    rows = [pair.row for pair in pairs if _overlap(pair) > 0.9]
    if not rows:
        return []
    return [f"{len(rows)} pairs have nearly the same answer twice; watch logps/chosen_change or give --rpo-alpha 1"]


def _overlap(pair: EncodedPair) -> float:
    sides = [{i for i, flag in zip(s.input_ids, s.supervised, strict=True) if flag} for s in (pair.chosen, pair.rejected)]
    return len(sides[0] & sides[1]) / len(sides[0] | sides[1])


def _fix_length(max_length: int, context: int | None) -> str:
    return "shorter rows, or a model with a longer context" if max_length == context else "raise --max-length"


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prepare_prompts(
    run: GRPOConfig, reward: Reward, context: int, tokenizer: Tokenizer, log: Log, began: datetime.datetime | None = None
) -> tuple[ChatTemplate, RunData[EncodedPrompt]]:
    """Read, split and encode the prompts of a run.

    Args:
        run: the settings.
        reward: what will judge the answers.
        context: the model's longest text in tokens.
        tokenizer: the model's.
        log: is told what was dropped.
        began: when the run began, if it is resumed.

    Returns:
        The chat template, and the prompts.

    Raises:
        UserError: bad rows, no prompt that leaves tokens for an answer.
    """
    now = began or current_time()
    template = resolve_template(tokenizer, template_choice(run, log), now)
    dataset = read_prompts(run.data, run.map, reward.needs_reference)
    held_out = read_prompts(run.eval_data, run.map, reward.needs_reference) if run.eval_data else None
    train, validation = (
        (dataset.prompts, held_out.prompts)
        if held_out
        else _split(dataset.prompts, lambda prompt: prompt.messages, run.validation_share, run.seed)
    )
    longest = min(run.max_length, context) - run.max_new_tokens
    encoded = [_encode_prompts(prompts, longest, tokenizer, template, log) for prompts in (train, validation)]
    for note in (*dataset.notes, *tokenizer.notes, *_unread_answers(dataset.prompts, reward)):
        log(note)
    if not encoded[0]:
        raise UserError(
            "data/no-rows", "no prompt leaves tokens for an answer", where=visible(run.data), found=f"{len(train)} prompts",
            expected=f"at most {longest} tokens with --max-new-tokens {run.max_new_tokens}",
            fix=f"lower --max-new-tokens, or {_fix_length(run.max_length, context)}",
        )  # fmt: skip
    log(f"{len(encoded[0])} prompts to train on, {len(encoded[1])} to validate on")
    tokens = tokens_sha256(*([Encoded(p.input_ids, [False] * len(p.input_ids), p.row, 0, 0) for p in part] for part in encoded))
    hashes: dict[str, JSON] = {"train": dataset.sha256, "eval": held_out.sha256 if held_out else None}
    facts: dict[str, JSON] = {
        use: {"path": data.path, "sha256": data.sha256, "prompts": len(part)}
        for use, data, part in (("train", dataset, encoded[0]), ("validation", held_out or dataset, encoded[1]))
    }
    identity = {**_identity(hashes, tokens, template, now), "reward": reward.identity or reward.name}
    return template, RunData(encoded[0], encoded[1], identity, facts)


def _unread_answers(prompts: Sequence[Prompt], reward: Reward) -> list[str]:
    """A note on answers that stand in the rows and that the reward is known not to look at."""
    number = sum(prompt.answer is not None for prompt in prompts)
    if not number or reward.reads_row:
        return []
    return [f"{number} rows have an answer of their own, which --reward {visible(reward.name, 80)} does not read"]


def _encode_prompts(
    prompts: Sequence[Prompt], longest: int, tokenizer: Tokenizer, template: ChatTemplate, log: Log
) -> tuple[EncodedPrompt, ...]:
    found: list[EncodedPrompt] = []
    too_long: list[int] = []
    for prompt in prompts:
        ids = encode_chat(tokenizer, template, prompt.messages, add_generation_prompt=True).input_ids
        if len(ids) > longest:
            too_long.append(prompt.row)
        else:
            found.append(EncodedPrompt(ids, {**prompt.columns, REFERENCE: prompt.answer}, prompt.row, prompt.where))
    if too_long:
        log(f"{len(too_long)} prompts dropped: no tokens left for an answer: rows {listing(map(str, too_long))}")
    return tuple(found)
