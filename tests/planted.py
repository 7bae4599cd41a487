"""Rows with known faults: clean chats from a small grammar, and fourteen ways of spoiling them, each labelled."""

from __future__ import annotations

import json
import random
from pathlib import Path


def _split(text: str, separator: str) -> list[str]:
    return text.split(separator)


NOUNS = _split(
    "river engine garden teacher market bridge violin desert harbour painter forest battery village kitchen comet library "
    "farmer glacier castle lantern orchard museum pilot valley tunnel sailor factory meadow clock island baker temple "
    "canyon wagon mirror shelter anchor ladder compass blanket curtain hammer kettle pillow saddle thunder whistle candle "
    "basket",
    " ",
)
VERBS = _split(
    "carries protects follows repairs measures paints crosses warms studies builds guards remembers lifts cools explains "
    "feeds surrounds replaces moves shelters divides welcomes observes connects colours delays",
    " ",
)
ADJECTIVES = _split(
    "quiet narrow ancient bright heavy gentle hollow distant frozen clever rusty silver broken patient golden windy deep "
    "tired northern hidden modern copper wooden sudden famous empty",
    " ",
)
TAILS = _split(
    "before the winter|after a long night|without any help|near the old road|because the rain stops|during the "
    "festival|while the others sleep|beyond the last hill|with great care|against the cold wind|since early spring|under a "
    "clear sky",
    "|",
)
ASKS = _split(
    "Why is it that {}?|Describe how {}.|Write two sentences about why {}.|Explain to a child that {}.|Is it true that "
    "{}?|Give a reason why {}.",
    "|",
)
GERMAN = (
    "der fluss ist nicht so tief wie die alten leute im dorf es immer sagen und das wasser ist auch im sommer kalt",
    "die kinder sind mit dem lehrer in den wald gegangen und haben dort für eine stunde nach einem weg gesucht",
    "das ist nicht die antwort auf die frage aber der text ist von einem freund und nicht für sie geschrieben",
)
KINDS = (
    "empty", "truncated", "swapped", "looping", "prompt echoed", "mojibake", "HTML", "copy", "near copy", "test row",
    "test row, numbers changed", "wrong label", "refusal", "wrong language",
)  # fmt: skip
Row = dict[str, str]


class Grammar:
    """Sentences that are all different, from one seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def clause(self) -> str:
        pick = self.draw.choice
        subject, thing = self.draw.sample(NOUNS, 2)
        return f"the {pick(ADJECTIVES)} {subject} {pick(VERBS)} the {pick(ADJECTIVES)} {thing} {pick(TAILS)}"

    def sentence(self) -> str:
        text = self.clause()
        return text[0].upper() + text[1:] + "."

    def row(self) -> Row:
        prompt = self.draw.choice(ASKS).format(f"{self.clause()} and {self.clause()}")
        number = self.draw.randrange(100, 1000)
        prompt = f"{prompt} Use {number} words or {number + self.draw.randrange(3, 90)}."
        return {"prompt": prompt, "completion": " ".join(self.sentence() for _ in range(self.draw.randrange(2, 5)))}


def labelled(num_clean: int = 400, num_each: int = 20, seed: int = 0) -> tuple[list[Row], list[str], list[Row]]:
    """(rows in random order, the kind of each or ``clean``, test rows)."""
    grammar = Grammar(seed)
    clean = [grammar.row() for _ in range(num_clean)]
    tests = [grammar.row() for _ in range(2 * num_each + 20)]
    rows = [(row, "clean") for row in clean]
    for kind in KINDS:
        rows += [(spoil(kind, grammar, clean, tests, i), kind) for i in range(num_each)]
    grammar.draw.shuffle(rows)
    return [row for row, _ in rows], [kind for _, kind in rows], tests


def spoil(kind: str, grammar: Grammar, clean: list[Row], tests: list[Row], i: int) -> Row:
    """A row with the fault ``kind``; ``i`` counts rows of that kind, so each copies another row."""
    row, draw = grammar.row(), grammar.draw
    answer = row["completion"]
    if kind == "empty":
        answer = ("", " ", "\n\n")[i % 3]
    elif kind == "truncated":
        answer = answer[: len(answer) * 2 // 3]
        answer = answer[: next(at for at in range(len(answer), 0, -1) if answer[at - 3 : at].isalpha())]
    elif kind == "swapped":
        answer = grammar.row()["completion"]
    elif kind == "looping":
        answer = " ".join([answer, *[grammar.sentence()] * 6])
    elif kind == "prompt echoed":
        answer = row["prompt"] if i % 2 else f"{row['prompt']} {answer}"
    elif kind == "mojibake":
        answer = answer.replace("the ", "thé “old” ", 1).encode().decode("cp1252", "replace")
    elif kind == "HTML":
        answer = f"<p>{answer}</p>" if i % 2 else answer.replace(" ", "&nbsp;", 2)
    elif kind == "copy":
        return {name: text.upper() if i % 2 else f" {text}  " for name, text in clean[i].items()}
    elif kind == "near copy":
        return near_copy(clean[len(clean) // 4 + i], draw)
    elif kind == "test row":
        return dict(tests[i])
    elif kind == "test row, numbers changed":
        text = tests[20 + i]["prompt"]
        changed = "".join(str((int(c) + 3) % 10) if c.isdigit() else c for c in text)
        return {"prompt": changed, "completion": answer}
    elif kind == "wrong label":
        return {"prompt": clean[len(clean) // 2 + i]["prompt"], "completion": grammar.row()["completion"]}
    elif kind == "refusal":
        answer = ("I'm sorry, but I can't help with that.", "As an AI language model, I have no opinion.")[i % 2]
    elif kind == "wrong language":
        answer = GERMAN[i % 3].capitalize() + "."
        answer += f" Und {draw.choice(GERMAN)}."
    return {**row, "completion": answer}


def near_copy(row: Row, draw: random.Random) -> Row:
    """One word in twenty replaced, anywhere in the row."""
    words = [*row["prompt"].split(), "\n", *row["completion"].split()]
    for at in draw.sample([i for i, word in enumerate(words) if word.isalpha()], len(words) // 20):
        words[at] = draw.choice([word for word in NOUNS if word != words[at]])
    cut = words.index("\n")
    return {"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut + 1 :])}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
