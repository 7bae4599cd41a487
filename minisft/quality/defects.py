"""What is wrong with single answers, by rules that can be read: each rule has a name, a threshold and a reason it shows.

The rules look at the trained answers of a row. They are written for few false alarms, not for finding everything: a cut answer
is found when its pool ends its answers with a full stop, broken encodings when decoding them again gives sense. Lists, code and
markup in code fences are left alone. Thresholds are constants here, fixed before they were tested. No rule calls a model.

Ref: repetition limits: Rae et al. 2021 (Gopher), arXiv:2112.11446, table A1.
"""

from __future__ import annotations

import bisect
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minisft.data.messages import Example
from minisft.quality.languages import guess_language, mentions_language
from minisft.quality.pool import prompt_text
from minisft.quality.text import words

KINDS = (
    "empty", "truncated", "looping", "prompt echoed", "mojibake", "HTML", "refusal", "wrong language", "control characters",
)  # fmt: skip

MIN_LOOP_WORDS = 20
MAX_DUPLICATE_4GRAMS = 0.4  # Gopher drops web pages from 0.16 of the characters; answers are shorter and have lists
MIN_COMPRESSED_BYTES, MIN_COMPRESS_RATIO = 300, 0.15
MIN_ECHO_WORDS = 5
MIN_CUT_WORDS = 8
MIN_LINE_WORDS = 4
MIN_STOPPED_SHARE = 0.8  # of the pool's longer answers, before a missing full stop means anything
MIN_LANGUAGE_SHARE = 0.8  # of the pool's answers, before another language means anything
REFUSAL_CHARACTERS = 250

_NEVER_LAST = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "and",
        "or",
        "to",
        "in",
        "with",
        "for",
        "from",
        "by",
        "at",
        "as",
        "is",
        "are",
        "was",
        "were",
        "that",
        "which",
        "your",
        "my",
        "their",
        "its",
        "our",
        "be",
    ]
)
_LIST_ITEM = re.compile(r"\s*(?:[-*•–|#>]|\d+[.)])")
_FENCE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_TAG = re.compile(
    r"</?(?:p|div|br|span|table|tr|td|th|tbody|ul|ol|li|a|b|i|em|strong|h[1-6]|img|font|script|style|html|body|head|meta|link|"
    r"section|article|nav|footer|input|button|form|iframe)(?:\s[^<>]*)?/?>|&(?:nbsp|amp|lt|gt|quot|apos|#\d{2,5}|#x[0-9a-f]{2,5});",
    re.IGNORECASE,
)
_MARKUP_ASKED = re.compile(
    r"\b(?:html|xml|css|svg|jsx|tsx|markup|web ?page|website|javascript|react|vue|tags?|escape)\b|<\w+", re.I
)
_MOJIBAKE = re.compile(r"[ÂÃÄÅÆÇÐÑØÙâãäåæçðï][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_REFUSAL = re.compile(
    r"\bas an ai\b|\bas a (?:large )?language model\b|\bi(?:'m| am) (?:just )?an? (?:ai|language model)\b"
    r"|\bi(?:'m| am) (?:very |really )?sorry,? but (?:i|as|that|this)\b"
    r"|\bi (?:can(?:no|')t|can not|am unable to|'m unable to|am not able to|'m not able to|won't|will not) "
    r"(?:assist|help|fulfil|provide|comply|answer|generate|create|do that|discuss|engage|complete)"
    r"|\bi(?:'m| am) (?:unable|not able) to (?:assist|help|fulfil|provide|comply|answer|generate|create|discuss|complete)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Defect:
    """One finding: which row (its index), what kind, and the evidence in a few words."""

    row: int
    kind: str
    evidence: str


@dataclass(frozen=True)
class PoolHabits:
    """What is usual in a pool, which decides what is unusual in a row.

    Attributes:
        stopped: share of longer answers that end with a closing sign.
        vocabulary: sorted words that at least two answers have before their last word.
        language: the language of most answers, or an empty string.
    """

    stopped: float
    vocabulary: tuple[str, ...]
    language: str


def habits(examples: Sequence[Example]) -> PoolHabits:
    """Look at all answers once."""
    longer = stopped = 0
    vocabulary: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for example in examples:
        for text in trained_answers(example):
            found = words(text)
            vocabulary.update(set(found[:-1]))
            languages[guess_language(found)] += 1
            if len(found) >= MIN_CUT_WORDS:
                longer += 1
                stopped += _is_stopped(text)
    languages.pop("", None)
    total = languages.total()
    name, count = languages.most_common(1)[0] if total else ("", 0)
    language = name if count >= MIN_LANGUAGE_SHARE * total else ""
    known = tuple(sorted(word for word, number in vocabulary.items() if number > 1 and word.isalpha()))
    return PoolHabits(stopped / longer if longer else 0.0, known, language)


def trained_answers(example: Example) -> list[str]:
    """The texts that the row trains on."""
    return [m.content for m in example.messages if m.role == "assistant" and m.train]


def find_defects(examples: Sequence[Example]) -> list[Defect]:
    """All findings, in row order, at most one of a kind a row."""
    usual = habits(examples)
    found: dict[tuple[int, str], Defect] = {}
    for i, example in enumerate(examples):
        prompt = prompt_text(example)
        for text in trained_answers(example):
            for kind, evidence in answer_defects(prompt, text, usual):
                found.setdefault((i, kind), Defect(i, kind, evidence))
    return list(found.values())


def answer_defects(prompt: str, answer: str, usual: PoolHabits) -> list[tuple[str, str]]:
    """(kind, evidence) of everything wrong with one answer.

    Args:
        prompt: the turns before it.
        answer: its text.
        usual: of the pool.

    Returns:
        nothing for a good answer; an empty one is only empty.
    """
    if not answer.strip():
        return [("empty", "no text")]
    asked, said = words(prompt), words(answer)
    rules: dict[str, Callable[[], str]] = {
        "truncated": lambda: _truncation(answer, said, usual),
        "looping": lambda: _loop(answer, said),
        "prompt echoed": lambda: _echo(asked, said),
        "mojibake": lambda: _mojibake(answer),
        "HTML": lambda: _markup(prompt, answer),
        "refusal": lambda: _refusal(answer),
        "wrong language": lambda: _foreign(prompt, asked, said, usual),
        "control characters": lambda: _control(prompt, answer),
    }
    return [(kind, evidence) for kind, rule in rules.items() if (evidence := rule())]


# ---- the rules: evidence in a few words, or nothing ----


def _is_stopped(text: str) -> bool:
    """Whether the text ends on a sign, of whatever kind; a comma or a dash leads on."""
    end = text.rstrip()[-1:]
    return not end.isalnum() and end not in ",-–—&/"


def _truncation(answer: str, said: Sequence[str], usual: PoolHabits) -> str:
    if answer.count("```") % 2:
        return "a code fence that is never closed"
    body = answer.strip()
    if body[:1] in "{[" and _open_brackets(body) > 0:
        return "brackets that are never closed"
    if len(said) < MIN_CUT_WORDS or _is_stopped(answer):
        return ""
    last = said[-1]
    if last in _NEVER_LAST:
        return f"ends on {last!r}"
    if last.isalpha() and _is_fragment(last, usual.vocabulary):
        return f"ends on {last!r}, which is no word of the pool but begins one"
    line = body.rsplit("\n", 1)[-1]
    if usual.stopped >= MIN_STOPPED_SHARE and len(line.split()) >= MIN_LINE_WORDS and not _LIST_ITEM.match(line):
        return f"ends on {last!r} without a full stop; {usual.stopped:.0%} of the answers have one"
    return ""


def _open_brackets(text: str) -> int:
    """How many brackets are open at the end, those inside strings not counted."""
    bare = re.sub(r'"(?:\\.|[^"\\])*"?', "", text)
    return sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))


def _is_fragment(word: str, vocabulary: Sequence[str]) -> bool:
    at = bisect.bisect_left(vocabulary, word)
    return at < len(vocabulary) and vocabulary[at] != word and vocabulary[at].startswith(word)


def _loop(answer: str, said: Sequence[str]) -> str:
    if len(said) >= MIN_LOOP_WORDS:
        grams = Counter(zip(said, said[1:], said[2:], said[3:], strict=False))
        share = 1 - len(grams) / max(1, grams.total())
        if share > MAX_DUPLICATE_4GRAMS:
            phrase, times = grams.most_common(1)[0]
            return f"{share:.0%} of its 4-word runs are repeats, {' '.join(phrase)!r} comes {times} times"
    raw = answer.encode("utf-8", "replace")
    if len(raw) >= MIN_COMPRESSED_BYTES and (ratio := len(zlib.compress(raw, 1)) / len(raw)) < MIN_COMPRESS_RATIO:
        return f"compresses to {ratio:.0%}"
    return ""


def _echo(asked: Sequence[str], said: Sequence[str]) -> str:
    n = len(asked)
    if n >= MIN_ECHO_WORDS and list(said[:n]) == list(asked):
        return "the answer begins with the whole prompt" if len(said) > n else "the answer is the prompt"
    return ""


def _mojibake(answer: str) -> str:
    if "\ufffd" in answer:
        return "a replacement character"
    for match in _MOJIBAKE.finditer(answer):
        repaired = _repair(match[0])
        if repaired is not None:
            return f"{match[0]!r} is {repaired!r} decoded wrongly"
    return ""


def _repair(text: str) -> str | None:
    """What UTF-8 bytes read as Windows-1252 were meant to be; None if they are no such thing."""
    try:
        raw = b"".join(c.encode("latin-1") if "\x80" <= c <= "\x9f" else c.encode("cp1252") for c in text)
        return raw.decode("utf-8")
    except UnicodeError:
        return None


def _markup(prompt: str, answer: str) -> str:
    if "<" not in answer and "&" not in answer:
        return ""
    match = _TAG.search(_FENCE.sub("", answer))
    return f"{match[0][:40]} outside of code" if match and not _MARKUP_ASKED.search(prompt) else ""


def _refusal(answer: str) -> str:
    match = _REFUSAL.search(answer[:REFUSAL_CHARACTERS].replace("’", "'"))
    return f"{match[0]!r}" if match else ""


def _foreign(prompt: str, asked: Sequence[str], said: Sequence[str], usual: PoolHabits) -> str:
    if not usual.language or mentions_language(prompt):
        return ""
    own = guess_language(said)
    if not own or own == usual.language or guess_language(asked) == own:
        return ""
    return f"in {own}, the pool's answers are in {usual.language}"


def _control(prompt: str, answer: str) -> str:
    match = _CONTROL.search(answer) or _CONTROL.search(prompt)
    return f"U+{ord(match[0]):04X}" if match else ""
