"""A pool of chat rows of about 1.25 KB each, the same bytes for the same arguments: what ``bench_data.py`` measures on.

Words follow Zipf's law over 40 000 made-up words; one row in four has a system message. Of a hundred rows two are exact copies,
three near copies (a word in twenty-five replaced), one is cut, one loops, and one holds 20 words of a test row.

    python benchmarks/data_pool.py pool.jsonl test.jsonl --rows 300000
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SYLLABLES = "ba ce di fo gu ha ki lo me nu pa ri so te vu wa xe yo zi en or al is".split(" ")  # noqa: SIM905
COMMON = "the of and to in is that it for you with on as are this be have from or not your can at by".split(" ")  # noqa: SIM905
NUM_WORDS, SYSTEM = 40_000, "You are a careful assistant. Answer in full sentences and say so when you do not know."
TEST_ROWS = 2_000


class Texts:
    """Sentences over a made-up vocabulary, drawn in blocks."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        made = dict.fromkeys("".join(draw.choices(SYLLABLES, k=draw.choice((2, 3, 4)))) for _ in range(2 * NUM_WORDS))
        self.words = [*COMMON, *made][:NUM_WORDS]
        weight = 1 / np.arange(3, len(self.words) + 3)
        self.cumulative = np.cumsum(weight / weight.sum())
        self.draw = np.random.default_rng(seed)
        self.block: list[int] = []
        self.taken = 0  # of the block

    def take(self, count: int) -> list[str]:
        if len(self.block) - self.taken < count:
            self.block, self.taken = np.searchsorted(self.cumulative, self.draw.random(1 << 16)).tolist(), 0
        taken = self.block[self.taken : self.taken + count]
        self.taken += count
        return [self.words[min(i, len(self.words) - 1)] for i in taken]

    def prose(self, num_sentences: int) -> str:
        sizes = self.draw.integers(8, 18, num_sentences).tolist()
        return " ".join(" ".join(self.take(size)).capitalize() + "." for size in sizes)


def row(texts: Texts, draw: random.Random) -> dict:
    """One chat: a question and an answer of 6 to 16 sentences."""
    system = [{"role": "system", "content": SYSTEM}] if draw.random() < 0.25 else []
    question = texts.prose(draw.randrange(1, 5))
    answer = texts.prose(draw.randrange(6, 17))
    return {"messages": [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pool(num_rows: int, tests: list[dict], seed: int = 0) -> Iterator[dict]:
    """The rows, one after the other."""
    texts, draw = Texts(seed), random.Random(seed + 1)
    kept: list[dict] = []
    for _ in range(num_rows):
        kind = draw.randrange(100)
        if kept and kind < 5:
            made = json.loads(json.dumps(draw.choice(kept)))
            if kind >= 2:
                answer = made["messages"][-1]
                parts = answer["content"].split(" ")
                for at in draw.sample(range(len(parts)), len(parts) // 25):
                    parts[at] = texts.take(1)[0]
                answer["content"] = " ".join(parts)
        else:
            made = row(texts, draw)
            answer = made["messages"][-1]
            if kind == 5:
                answer["content"] = answer["content"][: len(answer["content"]) // 2].rstrip(". ")
            elif kind == 6:
                answer["content"] += f" {texts.prose(1)}" + " and so on it goes." * 30
            elif kind == 7:
                answer["content"] += " " + " ".join(draw.choice(tests)["messages"][-1]["content"].split(" ")[3:23]) + "."
            if len(kept) < 5_000:
                kept.append(made)
            else:
                kept[draw.randrange(len(kept))] = made
        yield made


def write_pool(path: Path, test_path: Path, num_rows: int, seed: int = 0) -> None:
    """Write both files."""
    texts, draw = Texts(seed + 1000), random.Random(seed + 1001)
    tests = [row(texts, draw) for _ in range(TEST_ROWS)]
    test_path.write_text("".join(json.dumps(made) + "\n" for made in tests))
    with path.open("w") as file:
        for made in pool(num_rows, tests, seed):
            file.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_pool(given.pool, given.test, given.rows, given.seed)
