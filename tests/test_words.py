"""One word, one meaning: words that the package does not use, each with the field's word that it uses instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minisft"

# A regular expression, looked for in code, comments, docstrings and messages -> what to say.
INSTEAD = {
    r"rehears\w*": "memory estimate",
    r"serves(_\w+)?": "can_use_native",
    r"swallow\w*": "lost, num_nonzero / num_changed",
    r"twins?": "reference",
    r"forged|control text": "injected, special tokens in data",
    r"dither\w*": "stochastic rounding",
    r"going": "trainer",
    r"say|tell": "log, callback",
    r"masters": "fp32 master weights",
    r"shrink": "grad_scale",
    r"stale": "evals_since_best",
    r"places": "positions",
    r"beginnings?": "prefix",
    r"WORTH_SHARING|MOST_ROWS|SLAB": "MIN_SHARED_..., MAX_..., a name of its own",
    r"wide|product_dtype": "compute_dtype",
    r"houses?|rooms?|streets?|floors|ground|strangers?": "package, module, level, CLI, base, untrusted",
    r"said aloud|aloud": "reported",
    r"mends?|mended|mending": "fix",
    r"dial(s|led)?": "scale",
    r"became of": "merge error",
    r"held in 4 bits|in four bits": "quantized",
    r"wish(es)?|knows the whole day": "target, a plain description",
}
BANNED = re.compile("|".join(f"(?P<w{i}>(?<![\\w])(?:{words})(?![\\w]))" for i, words in enumerate(INSTEAD)))
DATA = PACKAGE / "quickstart" / "parcel_phrases.py"  # what customers write; a street in it is a street
SOURCES = sorted({*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.cpp")} - {DATA})


def found(text: str) -> list[tuple[int, str, str]]:
    """(line, word, what to say instead) of each banned word in ``text``."""
    instead = list(INSTEAD.values())
    return [
        (text.count("\n", 0, match.start()) + 1, match[0], instead[int(str(match.lastgroup)[1:])])
        for match in BANNED.finditer(text)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_uses_the_fields_words(path: Path) -> None:
    assert not found(path.read_text(encoding="utf-8"))


def test_the_reader_of_words_itself() -> None:
    assert found("a\nthe twin of it") == [(2, "twin", "reference")]
    assert found("cpu_nf4.serves_dense(x)") == [(1, "serves_dense", "can_use_native")]
    assert not found("torch.floor(x); widen; the background; a classroom; essays")
