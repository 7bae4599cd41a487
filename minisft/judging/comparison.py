"""Two models on the same rows, in three dimensions: task, general ability, business. Files in, a verdict and a report out.

No model is loaded: everything is computed from rows that ``minisft eval`` wrote. What could have been found at all comes before
what was found; bad cases come with the numbers, because a mean hides which rows changed.

The idea to take home: decide the gates before looking, and accept "not shown" as an answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from minisft.common import safe_json
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.json_rows import json_type
from minisft.data.messages import Example, read_dataset
from minisft.evaluation.paired import PairedResult, compare_paired
from minisft.evaluation.statistics import DRAWS, MIN_TEST_ROWS, Floats, Interval
from minisft.judging.bad_cases import (
    BadCase,
    Cluster,
    cluster_cases,
    confusions,
    error_class,
    find_bad_cases,
    is_right,
    prompt_of,
    with_neighbours,
)
from minisft.judging.gates import Gate, GateResult, Verdict, judge_gates, verdict_of
from minisft.judging.rows_file import RowId, RowsFile, ScoredRow, read_prompts, read_rows, require_comparable
from minisft.judging.slices import Slice, find_slices
from minisft.selection.ranking import column_vectors

NEIGHBOURS_FOR = 100  # regressions that get their nearest training rows


@dataclass(frozen=True)
class Measured:
    """One metric of one dimension; scores are as the metric has them, the result's difference counts gains as positive."""

    dimension: str
    metric: str
    form: str
    sign: int
    result: PairedResult

    @property
    def name(self) -> str:
        """``dimension.metric``, as a gate names it."""
        return f"{self.dimension}.{self.metric}"

    def to_json(self) -> dict[str, JSON]:
        """Every number, with the scores in the metric's own direction."""
        r = self.result
        return {
            "dimension": self.dimension, "metric": self.metric, "form": self.form, "n": r.n, "clusters": r.num_clusters,
            "detectable_difference": r.detectable, "base": self.sign * r.mean_a, "tuned": self.sign * r.mean_b,
            "gain": dict(r.difference.to_json()), "gain_bootstrap": dict(r.bootstrap.to_json()), "table": _table(r),
            "mcnemar_exact": r.mcnemar.exact if r.mcnemar else None, "mcnemar_mid_p": r.mcnemar.mid_p if r.mcnemar else None,
            "permutation_p": r.permutation, "p_value": r.p_value,
            "non_inferiority": {**asdict(r.non_inferiority), "shown": r.non_inferiority.shown},
        }  # fmt: skip


def _cluster_json(cluster: Cluster) -> dict[str, JSON]:
    return {"size": cluster.size, "regressions": cluster.regressions, "words": [word for word, _ in cluster.words]}


def _table(result: PairedResult) -> dict[str, JSON] | None:
    if result.table is None:
        return None
    names = {"both": "both right", "only_b": "fixed", "only_a": "broken", "neither": "both wrong"}
    return {names[key]: result.table[key] for key in names}


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows."""

    base: str
    tuned: str
    seed: int
    measured: list[Measured]
    business: dict[str, JSON] | None
    gates: list[GateResult]
    verdict: Verdict
    cases: list[BadCase] = field(default_factory=list)
    errors: dict[str, tuple[int, int]] = field(default_factory=dict)
    confusions: list[dict[str, JSON]] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    examples: Mapping[RowId, Example] | None = None

    def to_json(self) -> dict[str, JSON]:
        """The report without the cases, which have a file of their own."""
        errors: dict[str, JSON] = {name: {"base": a, "tuned": b} for name, (a, b) in self.errors.items()}
        slices: list[JSON] = [
            {"name": s.name, "n": s.n, "base": s.mean_a, "tuned": s.mean_b, "gain": dict(s.difference.to_json()),
             "error_rate": dict(s.error_rate.to_json()) if s.error_rate else None, "p_holm": s.p_holm}
            for s in self.slices
        ]  # fmt: skip
        gates: list[JSON] = [
            {"gate": f"{g.gate.name}>={g.gate.limit:+g}", "measured": g.measured, "limit": g.gate.limit, "status": g.status,
             "gain": dict(g.interval.to_json())}
            for g in self.gates
        ]  # fmt: skip
        return {
            "verdict": self.verdict, "gates": gates, "base": self.base, "tuned": self.tuned, "seed": self.seed,
            "measured": [m.to_json() for m in self.measured], "business": self.business,
            "regressions": sum(case.kind == "regression" for case in self.cases), "bad_cases": len(self.cases),
            "errors": errors, "confusions": list(self.confusions),
            "clusters": [_cluster_json(c) for c in self.clusters],
            "slices_exploratory": slices,
        }  # fmt: skip


def measure(
    dimension: str,
    a: RowsFile,
    b: RowsFile,
    *,
    margin: float = 0.02,
    clusters: Mapping[RowId, Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Measured:
    """B against A on one metric; gains are positive, whatever the metric's direction.

    Args:
        dimension: task or general.
        a: base.
        b: tuned.
        margin: of non-inferiority.
        clusters: of each row.
        draws, seed: of bootstrap and permutation.

    Returns:
        the comparison; the order of rows in the files changes nothing.

    Raises:
        UserError: the files differ in more than the model.
    """
    require_comparable(a, b)
    numbers = sorted(a.rows, key=lambda number: (str(type(number)), number))
    scores = [[file.sign * file.rows[number].score for number in numbers] for file in (a, b)]
    grouped = None if clusters is None else [clusters[number] for number in numbers]
    result = compare_paired(scores[0], scores[1], clusters=grouped, margin=margin, draws=draws, seed=seed)
    if b.sign < 0:  # a loss of 0 or 1 is neither right nor wrong
        result = _without_table(result)
    return Measured(dimension, a.metric, str(a.head.get("form", "")), b.sign, result)


def _without_table(result: PairedResult) -> PairedResult:
    return result if result.table is None else PairedResult(**{**vars(result), "table": None, "mcnemar": None})


def compare_files(
    base: str | Path,
    tuned: str | Path,
    *,
    data: str | Path | None = None,
    train: str | Path | None = None,
    embedding: str | None = None,
    general: Sequence[tuple[str, str]] = (),
    business: str | Path | None = None,
    gates: Sequence[Gate] = (),
    margin: float = 0.02,
    cluster: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Compare two rows files, and what else is known about the two models.

    Args:
        base, tuned: rows of the task.
        data: what was scored: prompts and columns for bad cases, slices and clusters.
        train: rows that the tuned model was trained on, to show those near a regression.
        embedding: a column of both ``data`` and ``train`` with a list of numbers a row; near is by words without it.
        general: pairs of rows files of general ability, base first.
        business: what ``minisft ab analyze``, ``arena`` or ``feedback`` wrote.
        gates: none stands for task>=0 and, where it was measured, general>=-margin.
        margin: of non-inferiority.
        cluster: column of ``data`` whose equal values belong together.
        draws, seed: of bootstrap and permutation.

    Returns:
        the comparison.

    Raises:
        UserError: files that cannot be read or compared, a gate without data, a column that is not there.
    """
    a, b = read_rows(base), read_rows(tuned)
    require_comparable(a, b)
    examples = None if data is None else read_prompts(data, a.rows.values())
    clusters = None if cluster is None else _clusters(cluster, a, examples)
    measured = [measure("task", a, b, margin=margin, clusters=clusters, draws=draws, seed=seed)]
    for first, second in general:
        measured.append(measure("general", read_rows(first), read_rows(second), margin=margin, draws=draws, seed=seed))
    outcome = None if business is None else _read_business(Path(business))
    limits = list(gates) or [Gate("task", 0.0), *([Gate("general", -margin)] if general else [])]
    held = judge_gates(limits, _intervals(measured, outcome))
    cases, groups = _cases(a, b, examples, train, embedding, seed)
    return Comparison(
        str(base), str(tuned), seed, measured, outcome, held, verdict_of(held), cases, _errors(a, b, examples),
        confusions([*b.rows.values()]) if b.sign > 0 else [], groups, find_slices(a, b, examples), examples,
    )  # fmt: skip


def _clusters(column: str, a: RowsFile, examples: Mapping[RowId, Example] | None) -> dict[RowId, Hashable]:
    found: dict[RowId, Hashable] = {}
    for number, row in a.rows.items():
        columns = {**row.extra, **(examples[number].reference if examples else {})}
        if column not in columns:
            fix = "name a column of the rows or of --data"
            where = f"row {visible(number)}"
            raise UserError("config/no-column", "there is no such column", where=where, found=visible(column), fix=fix)
        found[number] = json.dumps(columns[column], sort_keys=True)
    return found


def _read_business(path: Path) -> dict[str, JSON]:
    fix = "give the JSON that minisft ab analyze, arena or feedback wrote"
    try:
        value = safe_json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            "data/bad-business", "the result cannot be read", where=visible(path), found=visible(error), fix=fix
        ) from None
    headline = value.get("headline") if isinstance(value, dict) else None
    numbers = headline if isinstance(headline, dict) else {}
    if not isinstance(value, dict) or not all(isinstance(numbers.get(k), (int, float)) for k in ("estimate", "low", "high")):
        found = json_type(value)
        raise UserError("data/bad-business", "the result has no headline", where=visible(path), found=found, fix=fix)
    return value


def _intervals(measured: Sequence[Measured], business: dict[str, JSON] | None) -> dict[str, tuple[Interval, bool]]:
    found = {m.name: (m.result.difference, m.result.num_clusters >= MIN_TEST_ROWS) for m in measured}
    if business is not None:
        headline = business["headline"]
        assert isinstance(headline, dict)
        found["business"] = (Interval.from_json(headline), bool(headline.get("enough", True)))
    return found


def _cases(
    a: RowsFile,
    b: RowsFile,
    examples: Mapping[RowId, Example] | None,
    train: str | Path | None,
    embedding: str | None,
    seed: int,
) -> tuple[list[BadCase], list[Cluster]]:
    cases = find_bad_cases(a, b, examples)
    wrong = {case.row for case in cases}
    others = [prompt_of(examples[n]) if examples else row.reference for n, row in b.rows.items() if n not in wrong]
    cases, clusters = cluster_cases(cases, others, seed)
    if train is not None and examples is not None:
        training = read_dataset(train).examples
        vectors = None if embedding is None else _embeddings(embedding, cases[:NEIGHBOURS_FOR], examples, training, str(train))
        cases = with_neighbours(cases, training, NEIGHBOURS_FOR, vectors)
    return cases, clusters


def _embeddings(
    column: str, cases: Sequence[BadCase], examples: Mapping[RowId, Example], training: Sequence[Example], train: str
) -> tuple[Floats, Floats]:
    """Directions of the cases' rows and of the training rows."""
    near = column_vectors(training, column, train)
    of = column_vectors([examples[case.row] for case in cases], column, "--data") if cases else near[:0]
    if of.shape[1] != near.shape[1]:
        found, fix = f"{of.shape[1]} and {near.shape[1]} numbers", "embed --data and --train with one model"
        raise UserError("data/bad-embedding", "the embeddings of data and training differ", found=found, fix=fix)
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30) for v in (of.astype(float), near.astype(float))]
    return unit[0], unit[1]


def _errors(a: RowsFile, b: RowsFile, examples: Mapping[RowId, Example] | None) -> dict[str, tuple[int, int]]:
    """How often each kind of error occurs under both models, the commonest of the tuned one first; labels are one kind."""
    if b.sign < 0:
        return {}

    def count(rows: Mapping[RowId, ScoredRow]) -> Counter[str]:
        wrong = [row for row in rows.values() if not is_right(row)]
        prompts = {row.row: prompt_of(examples[row.row]) if examples else "" for row in wrong}
        kinds = [error_class(row.prediction, row.reference, prompts[row.row], row.extra) for row in wrong]
        return Counter("wrong label" if kind.startswith("label ") else kind for kind in kinds)

    before, after = count(a.rows), count(b.rows)
    names = sorted({*before, *after}, key=lambda name: (-after[name], -before[name], name))
    return {name: (before[name], after[name]) for name in names}
