"""Scores of a classification, from one table of counts: accuracy, F1 in three averages, MCC, each class by itself.

The label set is fixed beforehand and reported. A prediction outside of it is wrong for its reference and counts in a column
of its own, so nothing is dropped. Macro F1 is the mean of the classes' F1, not the F1 of mean precision and recall.

Ref: Opitz and Burst 2019, arXiv:1911.03347 (two macro F1); Gorodkin 2004, Comput. Biol. Chem. 28 (MCC for several classes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minisft.common.safe_json import JSON

OTHER = "(other)"
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassScore:
    """One label: how often it was right when given, how often it was given when right, and how many rows have it."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True)
class LabelScores:
    """All scores of a table of counts ``confusion`` (labels, labels + 1): reference by prediction, the last column other."""

    labels: tuple[str, ...]
    confusion: Counts
    accuracy: float
    macro_f1: float
    micro_f1: float
    weighted_f1: float
    mcc: float
    classes: tuple[ClassScore, ...]

    def to_json(self) -> dict[str, JSON]:
        """Every number; of the table the cells that are not 0."""
        cells: list[JSON] = [
            {"reference": self.labels[i], "prediction": (*self.labels, OTHER)[j], "count": int(self.confusion[i, j])}
            for i, j in zip(*np.nonzero(self.confusion), strict=True)
        ]
        classes: list[JSON] = [dict(vars(each)) for each in self.classes]
        return {
            "accuracy": self.accuracy, "macro_f1": self.macro_f1, "micro_f1": self.micro_f1, "weighted_f1": self.weighted_f1,
            "mcc": self.mcc, "labels": list(self.labels), "outside_labels": int(self.confusion[:, -1].sum()),
            "classes": classes, "confusion": cells,
        }  # fmt: skip


def confusion_codes(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> Counts:
    """The cell of each row in the flattened table (labels, labels + 1); texts are compared without white space around them.

    Args:
        references: right labels, each one of ``labels``.
        predictions: given labels.
        labels: the label set.

    Returns:
        (N,) int64.

    Raises:
        ValueError: a reference outside the label set, or lists of different length.
    """
    index = {label.strip(): i for i, label in enumerate(labels)}
    rows = []
    for reference, prediction in zip(references, predictions, strict=True):
        if reference.strip() not in index:
            raise ValueError(f"reference {reference!r} is not in the label set")
        rows.append(index[reference.strip()] * (len(labels) + 1) + index.get(prediction.strip(), len(labels)))
    return np.array(rows, dtype=np.int64)


def table_of(codes: Counts, num_labels: int) -> Counts:
    """Counts (labels, labels + 1) of the cells of ``confusion_codes``."""
    shape = (num_labels, num_labels + 1)
    table: Counts = np.bincount(codes, minlength=shape[0] * shape[1]).reshape(shape).astype(np.int64)
    return table


def label_scores(confusion: Counts, labels: Sequence[str]) -> LabelScores:
    """Every score of a table of counts; 0 where a denominator is 0, as scikit-learn's ``zero_division=0``."""
    total, support, predicted = int(confusion.sum()), confusion.sum(1), confusion[:, :-1].sum(0)
    right = np.diagonal(confusion)
    f1 = _ratio(2 * right, support + predicted)
    classes = tuple(
        ClassScore(label, float(p), float(r), float(f), int(s), int(n))
        for label, p, r, f, s, n in zip(
            labels, _ratio(right, predicted), _ratio(right, support), f1, support, predicted, strict=True
        )
    )
    hits = int(right.sum())
    micro = float(_ratio(np.array([2 * hits]), np.array([total + int(predicted.sum())]))[0])
    weighted = float((f1 * support).sum() / total)
    return LabelScores(tuple(labels), confusion, hits / total, float(f1.mean()), micro, weighted, matthews(confusion), classes)


def _ratio(top: npt.NDArray[np.int64], bottom: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    made: npt.NDArray[np.float64] = np.divide(top, bottom, out=np.zeros(len(top)), where=bottom > 0)
    return made


def matthews(confusion: Counts) -> float:
    """Matthews correlation: the correlation of reference and prediction as indicator vectors; 0 if either never varies."""
    references = np.append(confusion.sum(1), 0).astype(np.float64)
    predictions = confusion.sum(0).astype(np.float64)
    total, hits = float(confusion.sum()), float(np.diagonal(confusion).sum())
    covariance = hits * total - float(references @ predictions)
    spread = (total**2 - float(references @ references)) * (total**2 - float(predictions @ predictions))
    return covariance / math.sqrt(spread) if spread > 0 else 0.0
