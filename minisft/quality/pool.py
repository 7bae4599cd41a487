"""A pool: the rows of a file with what every check looks at, computed once.

Each row is cut in two: its prompt (all turns before the last assistant turn) and its answer (that turn). System messages
belong to the prompt for exact comparisons, but not to the words that near copies and test rows are searched in: thousands of
rows share one, and would look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minisft.data.messages import Dataset, Example, read_dataset
from minisft.quality.text import Hashes, Integers, Runs, WordHashes, key, words


@dataclass(frozen=True)
class Pool:
    """Rows and their words.

    Attributes:
        dataset: the rows as read, copies and empty answers too.
        words: hashes of each row's words, system messages left out: prompt first, then answer.
        prompt_lengths: (rows,) how many of a row's words are the prompt's.
        row_keys: 16 bytes for each row, equal for rows with the same words in the same turns.
        prompt_keys: the same for all turns before the answer.
        answer_keys: the same for the answer.
    """

    dataset: Dataset
    words: Runs
    prompt_lengths: Integers
    row_keys: tuple[bytes, ...]
    prompt_keys: tuple[bytes, ...]
    answer_keys: tuple[bytes, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """The rows."""
        return self.dataset.examples

    @property
    def path(self) -> str:
        """The file."""
        return self.dataset.path

    @property
    def answer_lengths(self) -> Integers:
        """(rows,) words of each answer."""
        return self.words.lengths - self.prompt_lengths

    def row(self, index: int) -> int:
        """The number, from 1, that row ``index`` has in the file."""
        return self.examples[index].row

    def prompts(self) -> Runs:
        """The words of the prompts alone."""
        starts = self.words.offsets[:-1]
        return Runs.of([self.words.values[a : a + n] for a, n in zip(starts, self.prompt_lengths, strict=True)])

    def answers(self) -> Runs:
        """The words of the answers alone."""
        starts = self.words.offsets[:-1] + self.prompt_lengths
        ends = self.words.offsets[1:]
        return Runs.of([self.words.values[a:b] for a, b in zip(starts, ends, strict=True)])


def read_pool(path: str, mapping: Sequence[str] = ()) -> Pool:
    """Read a file for inspection: nothing is dropped, not even rows with an empty answer.

    Raises:
        UserError: ``data/...`` with file and line; ``config/bad-map``.
    """
    return make_pool(read_dataset(path, mapping, keep_duplicates=True, keep_empty=True))


def make_pool(dataset: Dataset) -> Pool:
    """The words and keys of every row."""
    hashes = WordHashes()
    runs: list[Hashes] = []
    prompt_lengths: list[int] = []
    keys: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
    for example in dataset.examples:
        last = answer_index(example)
        turns = [words(message.content) for message in example.messages[: last + 1]]
        shown = [turn for turn, message in zip(turns, example.messages, strict=False) if message.role != "system"]
        runs.append(hashes.of([word for turn in shown for word in turn]))
        prompt_lengths.append(sum(map(len, shown[:-1])))
        roles = [[message.role] for message in example.messages[:last]]
        prompt = [part for pair in zip(roles, turns[:-1], strict=True) for part in pair]
        keys[0].append(key([*prompt, turns[-1]]))
        keys[1].append(key(prompt))
        keys[2].append(key([turns[-1]]))
    return Pool(dataset, Runs.of(runs), np.array(prompt_lengths, np.int64), *map(tuple, keys))


def answer_index(example: Example) -> int:
    """Which message is the answer: the last assistant turn."""
    return max(i for i, message in enumerate(example.messages) if message.role == "assistant")


def prompt_text(example: Example) -> str:
    """All turns before the answer, system messages left out."""
    return "\n".join(m.content for m in example.messages[: answer_index(example)] if m.role != "system")


def answer_text(example: Example) -> str:
    """The last assistant turn."""
    return example.messages[answer_index(example)].content
