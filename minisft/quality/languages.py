"""A guess at a text's language from its script and its commonest words; no model, and no guess where there is no evidence.

For Latin script the words that a language cannot do without decide; other scripts speak for themselves. Related languages in
one script beside Latin (Ukrainian and Russian) are not told apart, and text with fewer than 8 words gets no guess.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MIN_WORDS = 8
MAX_WORDS = 100
MIN_SHARE = 0.15  # of the words; English prose has about 0.4 of its list
MIN_LEAD = 2.0  # times the runner-up
_COMMON = {
    "English": "the of and to in is that it for you with on as are this be have from or not your can at by an was will",
    "German": "der die das und ist nicht ein eine den von zu mit auf für sie es im dem des sich auch wird sind ich werden",
    "French": "le la les des et est une un que pour dans pas vous sur au du avec ce qui sont il elle nous votre aux être en de",
    "Spanish": "el los las una que por con para es su del se lo como más pero está sus al son puede este esta muy en un de la",
    "Italian": "il che di è per una con non sono del della le gli si nel alla più come anche questo dei un lo la in",
    "Portuguese": "o os as uma que não com para por do da em se mais dos das como ao você é são seu sua um no na de",
    "Dutch": "de het een en van is dat niet op te zijn voor met die aan er om maar ook als bij je wordt deze kan naar",
    "Polish": "nie się na jest do że to jak w z co ale czy dla od przez może są tak być po oraz tego",
    "Turkish": "ve bir bu için ile olarak da de çok daha gibi olan ne kadar var değil ya ama en her",
}
COMMON_WORDS = {name: frozenset(text.split()) for name, text in _COMMON.items()}
_SCRIPTS = {
    "CYRILLIC": "Cyrillic script", "CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean",
    "ARABIC": "Arabic", "HEBREW": "Hebrew", "DEVANAGARI": "Hindi", "GREEK": "Greek", "THAI": "Thai",
}  # fmt: skip
_NAMES = re.compile(
    r"\b(?:translat\w*|language|english|german|french|spanish|italian|portuguese|dutch|polish|turkish|russian|ukrainian|"
    r"chinese|mandarin|japanese|korean|arabic|hebrew|hindi|greek|thai|latin|deutsch|español|français)\b",
    re.IGNORECASE,
)


def mentions_language(text: str) -> bool:
    """Whether a language is asked for."""
    return bool(_NAMES.search(text))


def guess_language(words: Sequence[str]) -> str:
    """The language of a text given as words; an empty string where there is no good guess."""
    words = words[:MAX_WORDS]
    foreign = [script for word in words if not word.isascii() and (script := _script(word))]
    if foreign:
        top = max(sorted(set(foreign)), key=foreign.count)
        if len(foreign) >= 0.5 * sum(word[0].isalpha() for word in words):
            return "Japanese" if "Japanese" in foreign else top
    if len(words) < MIN_WORDS:
        return ""
    shares = sorted(((sum(map(common.__contains__, words)) / len(words), name) for name, common in COMMON_WORDS.items()))
    (second, _), (first, name) = shares[-2:]
    return name if first >= MIN_SHARE and first >= MIN_LEAD * second else ""


def _script(word: str) -> str:
    letter = next((c for c in word if c.isalpha() and not c.isascii()), "")
    name = unicodedata.name(letter, "") if letter else ""
    return next((language for script, language in _SCRIPTS.items() if name.startswith(script)), "")
