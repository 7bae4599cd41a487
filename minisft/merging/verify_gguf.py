"""``minisft verify --gguf``: an installed llama.cpp against the golden answers beside an exported file.

Three things are compared for each prompt: whether llama.cpp makes as many tokens of the text and goes on from them as it does
from the ids; whether its likeliest first tokens have our probabilities; and whether its greedy answer is ours. The first two
decide. A file whose numbers are fp32 is held to the numbers; in other types llama.cpp rounds activations too, so there the
divergence of the whole distribution is bounded. llama.cpp's server adds up the vocabulary in fp32, one number after another,
which makes all its probabilities too large by one factor; that is not the model's, and is taken out first. The idea to take
home: texts can agree by luck, distributions do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.common.llama_cpp import ask
from minisft.common.safe_json import JSON
from minisft.formats.fields import read_json_object
from minisft.formats.gguf_file import file_dtype
from minisft.formats.gguf_header import read_gguf
from minisft.formats.source import file_sha256, resolve

MAX_GOLDEN_BYTES = 2**26
MAX_DIFFERENCE = 5e-4  # of a log-probability, where every number of the file is fp32
# Of KL(ours || llama.cpp's) in nats, by the type of most numbers. F32: what ``MAX_DIFFERENCE`` at every token comes to, since
# KL(p || p e^-x) = sum p x^2 / 2 + O(x^3). The others: a few times what SmolLM2 showed. Four bits: other types.
MAX_KL = {"F32": MAX_DIFFERENCE**2 / 2, "F16": 5e-4, "BF16": 2e-3, "Q8_0": 0.05}
OTHER_KL = 0.1
REST = 1e-6  # what the tokens that are not listed have at least: below, their share is rounding


@dataclass(frozen=True)
class Golden:
    """One golden answer; see ``golden.golden``."""

    messages: list[JSON] | None
    text: str
    ids: list[int]
    first: list[tuple[int, float]]
    answer_ids: list[int]
    answer: str


@dataclass(frozen=True)
class GGUFVerification:
    """What llama.cpp made of an exported file.

    Attributes:
        prompts: how many were asked.
        same_tokens: of them, those whose text gave the same tokens.
        difference: the largest difference of a log-probability among the likeliest first tokens.
        kl: the largest divergence of a first token's distribution, in nats.
        same_answers: greedy answers that are equal, character by character.
        stored_as: the type of most numbers.
    """

    prompts: int
    same_tokens: int
    difference: float
    kl: float
    same_answers: int
    stored_as: str

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"llama.cpp: tokens equal in {self.same_tokens} of {self.prompts} prompts, first token within "
            f"{self.difference:.2g} (KL at most {self.kl:.2g}), {self.same_answers} of {self.prompts} answers equal"
        )

    @property
    def good(self) -> bool:
        """Whether tokens and distributions are those of the golden answers, up to the rounding of the file's type."""
        exact = self.stored_as != "F32" or self.difference <= MAX_DIFFERENCE
        return exact and self.same_tokens == self.prompts and self.kl <= MAX_KL.get(self.stored_as, OTHER_KL)


def verify_gguf(file: str | Path, base: str | Path | None = None) -> GGUFVerification:
    """Ask an installed llama.cpp what an exported file answers.

    Args:
        file: written by ``export_gguf``, with its golden answers beside it.
        base: for an adapter file, the GGUF file of its base, or a name that ``load_model`` takes for one.

    Returns:
        what was found.

    Raises:
        UserError: ``config/missing-extra`` without the wheel; no golden answers, or those of another file; a ``base`` that is
            missing or too much; ``model/llama-cpp`` where llama.cpp refuses the file; ``numeric/not-this-model``.
    """
    path = Path(file)
    header = read_gguf(path)
    model, adapter = path, None
    if header.metadata.get("general.type") == "adapter":
        if base is None:
            what, fix = "an adapter file needs its base", "give --base, the GGUF file of the model that it was trained on"
            raise UserError("config/missing", what, where=visible(path), fix=fix)
        model, adapter = _gguf_of(base), path
        header = read_gguf(model)
    elif base is not None:
        what, fix = "the file is a whole model and has no base", "leave --base away"
        raise UserError("config/bad-value", what, where=visible(path), found=visible(base), fix=fix)
    prompts = _golden(path)
    requests = [request for prompt in prompts for request in _requests(prompt)]
    context = max(len(prompt.ids) + len(prompt.answer_ids) for prompt in prompts) + 16
    answers = ask(model, requests, context, adapter)
    found = _compare(prompts, answers, file_dtype(header), header.tensors["token_embd.weight"].shape[0])
    if not found.good:
        raise UserError(
            "numeric/not-this-model", "llama.cpp computes another model from the file", where=visible(path),
            found=found.summary, expected=f"equal tokens, KL below {MAX_KL.get(found.stored_as, OTHER_KL):g}",
            fix="export again with the same base; if it stays so, please report it with both versions",
        )  # fmt: skip
    return found


def _gguf_of(base: str | Path) -> Path:
    source = resolve(base)
    if source.kind != "gguf":
        what, fix = "the base is no GGUF file", "export it first: minisft export --model M --out base.gguf"
        raise UserError("config/bad-value", what, where="--base", found=visible(base), expected="a GGUF file", fix=fix)
    return source.path


def _golden(path: Path) -> list[Golden]:
    """The golden answers beside the file.

    Raises:
        UserError: ``model/no-golden``, ``model/other-golden`` or ``model/bad-golden``.
    """
    beside = path.with_suffix(".golden.json")
    if not beside.is_file():
        what, fix = "the file has no golden answers beside it", "export it again, without --no-check"
        raise UserError("model/no-golden", what, where=visible(path), expected=visible(beside.name), fix=fix)
    content = read_json_object(beside, "model/bad-golden", MAX_GOLDEN_BYTES)
    if content.get("sha256") != file_sha256(path):
        what, fix = "the golden answers are those of another file", "keep both files of one export together"
        raise UserError("model/other-golden", what, where=visible(beside), found=visible(content.get("sha256")), fix=fix)
    listed = content.get("prompts")
    found = [_read_prompt(value) for value in listed] if isinstance(listed, list) else []
    known = [prompt for prompt in found if prompt is not None]
    if not known or len(known) < len(found):
        raise UserError(
            "model/bad-golden", "the golden answers cannot be read", where=visible(beside), fix="export the model again"
        )
    return known


def _read_prompt(value: JSON) -> Golden | None:
    """None for what is no golden answer."""
    if not isinstance(value, dict):
        return None
    messages, text, answer = value.get("messages"), value.get("text"), value.get("answer")
    ids, answer_ids, first = _integers(value.get("ids")), _integers(value.get("answer_ids")), value.get("first")
    pairs = [
        (pair[0], pair[1])
        for pair in (first if isinstance(first, list) else [])
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int) and isinstance(pair[1], float)
    ]
    if not isinstance(text, str) or not isinstance(answer, str) or not ids or not answer_ids or not pairs:
        return None
    return Golden(messages if isinstance(messages, list) else None, text, ids, pairs, answer_ids, answer)


def _integers(value: JSON) -> list[int]:
    return [i for i in value if isinstance(i, int)] if isinstance(value, list) else []


def _requests(prompt: Golden) -> list[dict[str, JSON]]:
    """From the ids and from the text: the first token; then the whole answer, by the chat's messages if it is one."""
    greedy: dict[str, JSON] = {"temperature": 0, "cache_prompt": False}
    first = {**greedy, "max_tokens": 1, "logprobs": len(prompt.first), "n_probs": len(prompt.first)}
    whole: dict[str, JSON] = {**greedy, "max_tokens": len(prompt.answer_ids)}
    ids: list[JSON] = [*prompt.ids]
    asked: dict[str, JSON] = {"prompt": ids} if prompt.messages is None else {"messages": prompt.messages}
    return [{**first, "prompt": ids}, {**first, "prompt": prompt.text}, {**whole, **asked}]


def _compare(
    prompts: Sequence[Golden], answers: Sequence[dict[str, JSON]], stored_as: str, vocabulary: int
) -> GGUFVerification:
    same_tokens = same_answers = 0
    found: list[tuple[float, float]] = []
    for number, prompt in enumerate(prompts):
        by_ids, by_text, whole = answers[3 * number : 3 * number + 3]
        theirs = _first(by_ids)
        counted = [by_ids, by_text] if prompt.messages is None else [by_ids, by_text, whole]
        lengths = {str(_prompt_tokens(answer)) for answer in counted}
        same_tokens += lengths == {str(len(prompt.ids))} and _first(by_text) == theirs
        same_answers += _text(whole).strip() == prompt.answer.strip()
        if theirs:
            found.append(first_token(prompt.first, theirs, vocabulary))
    difference, kl = (max(column) for column in zip(*found, strict=True)) if found else (math.inf, math.inf)
    return GGUFVerification(len(prompts), same_tokens, difference, kl, same_answers, stored_as)


def first_token(ours: Sequence[tuple[int, float]], theirs: Mapping[int, float], vocabulary: int) -> tuple[float, float]:
    """How far llama.cpp's distribution of a token is from ours, but for the factor that its sum is off by.

    A sum of V numbers in fp32, one after another, is off by a factor of at most 1 +- V 2^-24. Within that the factor is taken
    that gives our tokens together the probability that they have with us.

    Args:
        ours: token and log-probability, the likeliest first.
        theirs: log-probabilities of llama.cpp's likeliest; a token that is not among them has at most the least of them.
        vocabulary: V.

    Returns:
        the largest difference of a log-probability among the likelier half of ``ours`` (those after it may not be listed by
        both), and KL(ours || theirs) in nats, all tokens that we do not list taken together as one: at most the divergence
        over the vocabulary.
    """
    unlisted = max(1 - math.fsum(map(math.exp, theirs.values())), REST)
    least = min(*theirs.values(), math.log(unlisted / max(sum(i not in theirs for i, _ in ours), 1)))
    pairs = [(value, theirs.get(i, least)) for i, value in ours]
    P, Q = (math.fsum(map(math.exp, column)) for column in zip(*pairs, strict=True))
    off = vocabulary * 2.0**-24
    factor = min(max(Q / P, 1 - off), 1 + off)
    pairs = [(p, q - math.log(factor)) for p, q in pairs]
    difference = max(abs(p - q) for p, q in pairs[: len(pairs) // 2])
    rest = (math.log(max(1 - P, REST)), math.log(max(1 - Q / factor, REST)))
    # p log(p / q) - p + q: the same in sum, and no term is below 0, so rounding is of second order in each.
    kl = math.fsum(math.exp(p) * (p - q + math.expm1(q - p)) for p, q in [*pairs, rest])
    return difference, kl


def _choice(answer: dict[str, JSON]) -> dict[str, JSON]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UserError("model/llama-cpp", "llama.cpp gave no answer", found=visible(str(answer), 300))
    return choices[0]


def _first(answer: dict[str, JSON]) -> dict[int, float]:
    """The likeliest first tokens; empty where llama.cpp gives none (half a character was drawn)."""
    logprobs = _choice(answer).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    tops = content[0].get("top_logprobs") if isinstance(content, list) and content and isinstance(content[0], dict) else None
    listed = [top for top in tops if isinstance(top, dict)] if isinstance(tops, list) else []
    return {int(str(top["id"])): float(str(top["logprob"])) for top in listed}


def _prompt_tokens(answer: dict[str, JSON]) -> JSON:
    usage = answer.get("usage")
    return usage.get("prompt_tokens") if isinstance(usage, dict) else None


def _text(answer: dict[str, JSON]) -> str:
    choice = _choice(answer)
    message = choice.get("message")
    return str(message.get("content") if isinstance(message, dict) else choice.get("text"))
