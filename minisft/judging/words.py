"""Texts as words, without a model: nearest texts, clusters of texts, and the words that name a cluster.

Everything rests on counts of words, so it runs on files alone; texts that mean the same in other words are far apart here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from minisft.evaluation.statistics import Floats

MAX_WORDS, MAX_TEXT = 2_000, 4_000
PRIOR = 0.1  # a word of the prior for ten of the texts
_ROUNDS = 30


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits of any script; of a long text the first 4 000 characters."""
    return re.findall(r"[^\W_]+", text[:MAX_TEXT].lower())


class WordVectors:
    """Unit vectors of tf-idf weights over the commonest words of ``texts``."""

    def __init__(self, texts: Sequence[str]) -> None:
        counted = [Counter(words_of(text)) for text in texts]
        in_texts = Counter(word for words in counted for word in words)
        self._index = {word: i for i, (word, _) in enumerate(in_texts.most_common(MAX_WORDS))}
        self._weight = np.array([math.log((1 + len(texts)) / (1 + in_texts[word])) + 1 for word in self._index])
        self.vectors = self._vectors(counted)

    def of(self, texts: Sequence[str]) -> Floats:
        """Vectors of other texts; words that are new count as absent."""
        return self._vectors([Counter(words_of(text)) for text in texts])

    def _vectors(self, counted: Sequence[Counter[str]]) -> Floats:
        made = np.zeros((len(counted), len(self._index)))
        for row, words in enumerate(counted):
            for word, count in words.items():
                if word in self._index:
                    made[row, self._index[word]] = (1 + math.log(count)) * self._weight[self._index[word]]
        lengths = np.linalg.norm(made, axis=1, keepdims=True)
        unit: Floats = made / np.where(lengths == 0, 1, lengths)
        return unit


def nearest(of: Floats, among: Floats, count: int) -> list[list[int]]:
    """For each vector the indices of its nearest by cosine, best first, equal ones by index.

    Args:
        of: unit vectors (N, W).
        among: unit vectors (M, W).
        count: how many.

    Returns:
        N lists of at most ``count`` indices.
    """
    return [np.argsort(-(among @ vector), kind="stable")[:count].tolist() for vector in of]


def clusters_of(vectors: Floats, count: int, seed: int = 0) -> list[int]:
    """Spherical k-means: a cluster number for each unit vector, the largest cluster first.

    Args:
        vectors: (N, W), of length 1 or 0.
        count: of clusters, at most N.
        seed: decides the first centres, which are drawn far from each other.

    Returns:
        N numbers in [0, count).
    """
    rng, centres = np.random.default_rng(seed), [vectors[0]]
    while len(centres) < count:
        distance = np.maximum(1 - (vectors @ np.array(centres).T).max(1), 0)
        chance = distance / distance.sum() if distance.sum() > 1e-12 else np.full(len(vectors), 1 / len(vectors))
        centres.append(vectors[rng.choice(len(vectors), p=chance)])
    middle, chosen = np.array(centres), np.full(len(vectors), -1)
    for _ in range(_ROUNDS):
        before, chosen = chosen, (vectors @ middle.T).argmax(1)
        if (before == chosen).all():
            break
        for k in range(count):
            if (chosen == k).any():
                total = vectors[chosen == k].sum(0)
                middle[k] = total / (np.linalg.norm(total) or 1)
    rank = {k: place for place, (k, _) in enumerate(Counter(chosen.tolist()).most_common())}
    return [rank[k] for k in chosen.tolist()]


def over_represented(inside: Sequence[str], outside: Sequence[str], count: int = 5) -> list[tuple[str, float]]:
    """Words that texts ``inside`` have more often, with z: the log-odds ratio under a Dirichlet prior over its error.

    The prior has the frequencies of all texts and weighs as much as one word in ten of them, so a rare word needs more
    evidence.

    Args:
        inside, outside: two groups of texts.
        count: how many words.

    Returns:
        (word, z) with z above 1.96, the clearest first.

    Ref: Monroe, Colaresi, Quinn 2008, "Fightin' Words", Polit. Anal. 16(4), eq. 16-22.
    """
    a, b = (Counter(word for text in texts for word in words_of(text)) for texts in (inside, outside))
    both = a + b
    total_a, total_b, prior_total = a.total(), b.total(), PRIOR * both.total()
    found = []
    for word, times in both.items():
        prior = PRIOR * times
        odds_a = (a[word] + prior) / (total_a + prior_total - a[word] - prior or 1)
        odds_b = (b[word] + prior) / (total_b + prior_total - b[word] - prior or 1)
        error = math.sqrt(1 / (a[word] + prior) + 1 / (b[word] + prior))
        found.append((word, (math.log(odds_a) - math.log(odds_b)) / error))
    found.sort(key=lambda pair: (-pair[1], pair[0]))
    return [(word, z) for word, z in found[:count] if z > 1.96]
