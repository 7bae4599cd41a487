"""Comparing an answer with the right one, as text; and how far a share of right answers can be trusted.

Pure functions of strings and numbers; each score lies in [0, 1]. The idea to take home: decide how strict equality is
before looking at any model, and write it down here.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import Literal

from minisft.common.safe_json import JSON, loads

Metric = Literal["exact_match", "json", "f1", "choice", "loss"]
NORMALIZATIONS = ("none", "squad")  # of exact_match
THINK, END_THINK = "<think>", "</think>"
Z_95 = 1.959964  # the normal distribution's 97.5 % point


def split_thinking(text: str, is_open: bool = False) -> tuple[str, str]:
    """A thinking block at the start of ``text``, and the rest; ``is_open``: the prompt ended inside such a block."""
    if is_open or text.lstrip().startswith(THINK):
        thinking, closing, rest = text.partition(END_THINK)
        if closing:
            return thinking + closing, rest.lstrip()
    return "", text


def exact_match(prediction: str, reference: str, normalize: str = "none") -> float:
    """1.0 if the texts are equal.

    Args:
        prediction: the answer.
        reference: the right one.
        normalize: ``none``: white space around the texts does not count; ``squad``: nor do case, punctuation and English
            articles (Rajpurkar et al. 2016, arXiv:1606.05250).

    Returns:
        1.0 or 0.0.
    """
    if normalize == "squad":
        return float(_words(prediction) == _words(reference))
    return float(prediction.strip() == reference.strip())


def json_match(prediction: str, reference: str) -> float:
    """1.0 if both are JSON documents of equal value."""
    try:
        return float(json_equal(loads(_unfenced(prediction)), loads(_unfenced(reference))))
    except ValueError:
        return 0.0


def json_equal(first: JSON, second: JSON) -> bool:
    """Whether two JSON values are equal; unlike in Python, true is not 1."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(json_equal(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(json_equal, first, second))
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def _unfenced(text: str) -> str:
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text.strip(), re.DOTALL)
    return fenced.group(1) if fenced else text.strip()


def is_json(text: str) -> bool:
    """Whether the text, as a whole, is a JSON document; one code fence around it is allowed."""
    try:
        loads(_unfenced(text))
    except ValueError:
        return False
    return True


def token_f1(prediction: str, reference: str) -> float:
    """2 P R / (P + R) over the multiset of words; 1.0 when both have none."""
    said, right = Counter(_words(prediction)), Counter(_words(reference))
    if not said or not right:
        return float(said == right)
    shared = (said & right).total()
    return 2 * shared / (said.total() + right.total())


def _words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def wilson(score: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Interval of a share: never leaves [0, 1], and is honest near 0 and 1.

    Args:
        score: the share.
        n: of how many, at least 1.
        z: of confidence, as the normal distribution's point; 95 % by default.

    Returns:
        both bounds.

    Ref: Wilson 1927, J. Am. Stat. Assoc. 22(158), eq. 5.
    """
    spread = z * z / n
    centre = (score + spread / 2) / (1 + spread)
    half = z * math.sqrt(score * (1 - score) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
