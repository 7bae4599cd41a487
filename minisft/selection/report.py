"""What ``select`` leaves behind: a report with every dropped row, and a page that shows what was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from minisft.common.errors import visible
from minisft.common.safe_json import JSON
from minisft.quality.html import Cell, bars, charts, document, escape, heading, histogram, scatter, table
from minisft.quality.pool import answer_text, prompt_text
from minisft.quality.report import excerpt
from minisft.quality.text import Integers, distinct_share, even_sample
from minisft.selection.diversity import mean_nearest_cosine, principal_plane, vendi_score
from minisft.selection.ranking import MAX_CORRELATION, best_first, random_values
from minisft.selection.scores import RowScore
from minisft.selection.select import Selection

NUM_WORST = 20
MAX_COMPARED = 2_000
MAX_MAPPED = 8_000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def to_json(chosen: Selection, facts: Mapping[str, JSON]) -> dict[str, JSON]:
    """The whole report; rows by their number in the file.

    Args:
        chosen: a completed selection.
        facts: what identifies data, model and settings.
    """
    pool = chosen.pool
    return {
        **facts,
        "funnel": dict(chosen.funnel),
        "threshold": chosen.threshold,
        "cosine_quantiles": dict(cosine_quantiles(chosen)),
        "spearman_with_length": round(chosen.correlation, 4),
        "unit": chosen.sizes.unit,
        "comparison": [dict(row) for row in comparison(chosen)],
        "picked": [pool.row(int(i)) for i in chosen.picked],
        "scores": {str(pool.row(int(i))): float(v) for i, v in zip(chosen.scored, chosen.values, strict=True)},
        "dropped": [
            {"row": pool.row(drop.row), "reason": visible(drop.reason), "partner": visible(drop.partner)}
            for _, drop in sorted(chosen.drops.items())
        ],
    }


def comparison(chosen: Selection) -> list[dict[str, JSON]]:
    """The picked rows beside as many random and as many of the longest rows, from what cleaning left; computed once."""
    if chosen.compared is None:
        chosen.compared = _comparison(chosen)
    return chosen.compared


def _comparison(chosen: Selection) -> list[dict[str, JSON]]:
    dropped_later = ("beyond the budget", "too near")
    alive = [
        p for p, i in enumerate(chosen.scored)
        if int(i) not in chosen.drops or chosen.drops[int(i)].reason.startswith(dropped_later)
    ]  # fmt: skip
    candidates = np.array(alive, np.int64)
    rows = chosen.scored[candidates]
    lengths = chosen.sizes.targets[rows].astype(float)
    random = best_first(random_values([chosen.pool.row(int(i)) for i in rows], chosen.settings.seed + 1), lengths)
    at = {int(i): p for p, i in enumerate(chosen.scored)}
    picked = np.array([at[int(i)] for i in chosen.picked], np.int64)
    budget = int(chosen.sizes.tokens[chosen.picked].sum())
    sets = {
        "picked": picked,
        "random": _filled(chosen, candidates[random], budget),
        "longest": _filled(chosen, candidates[best_first(lengths, lengths)], budget),
    }
    return [_described(chosen, name, positions) for name, positions in sets.items()]


def _filled(chosen: Selection, order: Integers, budget: int) -> Integers:
    """Positions from the front of ``order`` until they hold as many tokens as were picked."""
    tokens = np.cumsum(chosen.sizes.tokens[chosen.scored[order]])
    return order[: max(1, int(np.searchsorted(tokens, budget, side="right")))]


def _described(chosen: Selection, name: str, positions: Integers) -> dict[str, JSON]:
    rows = chosen.scored[positions]
    sample = positions[even_sample(len(positions), MAX_COMPARED)]
    row: dict[str, JSON] = {
        "set": name,
        "rows": len(rows),
        "tokens": int(chosen.sizes.tokens[rows].sum()),
        "mean_score": float(chosen.values[positions].mean()),
        "mean_length": float(chosen.sizes.targets[rows].mean()),
        "distinct_2": distinct_share(chosen.pool.words, rows, 2),
    }
    if chosen.vectors is not None:
        row |= {
            "nearest_cosine": mean_nearest_cosine(chosen.vectors[sample]),
            "vendi": vendi_score(chosen.vectors[sample]),
        }
    return row | {"answer_entropy": _answer_entropy(chosen, rows)}


def _answer_entropy(chosen: Selection, rows: Integers) -> float:
    """Of the distribution of equal answers, in nats: the log of the number of labels when they are even."""
    counts = np.array(list(Counter(chosen.pool.answer_keys[int(i)] for i in rows).values()), float)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def cosine_quantiles(chosen: Selection) -> dict[str, float]:
    """Of the cosines between pairs of an even sample of the scored rows: what a threshold has to be read against."""
    if chosen.vectors is None:
        return {}
    sample = chosen.vectors[even_sample(len(chosen.vectors), 1000)]
    cosine = (sample @ sample.T)[np.triu_indices(len(sample), 1)]
    return {f"{share:g}": round(float(np.quantile(cosine, share)), 4) for share in _QUANTILES}


def warnings_of(chosen: Selection) -> list[str]:
    """What a reader must know before trusting the picked rows."""
    found = []
    if abs(chosen.correlation) > MAX_CORRELATION and chosen.settings.score != "length":
        found.append(
            f"the score follows the length of the answer (Spearman {chosen.correlation:+.2f}): --within-length-bins 5 picks "
            "the same share of short and long rows"
        )
    return found


def selection_page(chosen: Selection, scores: Mapping[int, RowScore]) -> str:
    """The selection as an offline HTML page."""
    name = chosen.settings.score
    kept = np.isin(chosen.scored, chosen.picked)
    lengths = chosen.sizes.targets[chosen.scored].astype(float)
    reasons = Counter(_short(drop.reason) for drop in chosen.drops.values())
    figures = [histogram(f"score: {name}; orange is not picked", chosen.values, kept)]
    figures += [_spread(chosen, scores, "loss", "loss of the answer, nats a token")] if scores else []
    figures += [_spread(chosen, scores, "pmi", "what the prompt explains (pmi), nats a token")] if scores else []
    figures.append(
        scatter(f"score (up) against length in {chosen.sizes.unit} (log)", np.log10(lengths + 1), chosen.values, kept)
    )
    if chosen.vectors is not None:
        shown = even_sample(len(kept), MAX_MAPPED)
        plane = principal_plane(chosen.vectors[shown])
        figures.append(scatter("map: the two main directions; blue is picked", plane[:, 0], plane[:, 1], kept[shown]))
    parts = [
        f'<p class="quiet">{len(chosen.picked):,} of {len(chosen.pool.examples):,} rows picked.</p>',
        *(f"<p><strong>Note:</strong> {escape(text)}.</p>" for text in warnings_of(chosen)),
        heading("Funnel", "Rows left after each step."),
        bars(chosen.funnel),
        heading("Why rows were not picked"),
        bars(dict(reasons.most_common()), reasons) if reasons else "<p>All rows were picked.</p>",
        heading(
            "The picked rows beside others", "Random and longest: the same number of tokens, from the rows that cleaning left."
        ),
        _comparison_table(chosen),
        heading("Scores"),
        charts(figures),
        heading("The worst rows", "Of those with a score: the 20 with the lowest rank, and whether they were picked."),
        _worst(chosen, kept),
    ]
    return document(f"Selection from {chosen.pool.path}", parts)


def _spread(chosen: Selection, scores: Mapping[int, RowScore], name: str, title: str) -> str:
    values = [(getattr(scores[int(i)], name), int(i)) for i in chosen.scored if int(i) in scores]
    there = [(value, i) for value, i in values if value is not None]
    kept = np.isin([i for _, i in there], chosen.picked)
    return histogram(f"{title}; orange is not picked", np.array([value for value, _ in there], float), kept)


def _short(reason: str) -> str:
    """A reason without what differs from row to row."""
    if reason.startswith(("ifd", "too near")):
        return reason.split()[0] + (" above 1" if reason.startswith("ifd") else " near to a kept row")
    return (
        reason.partition(" (")[0].partition(" row ")[0].removesuffix(" of").partition(" above ")[0].partition(": too long")[0]
    )


def _comparison_table(chosen: Selection) -> str:
    rows = comparison(chosen)
    titles = {
        "set": "set", "rows": "rows", "tokens": chosen.sizes.unit, "mean_score": "mean score", "mean_length": "mean answer",
        "distinct_2": "distinct-2", "nearest_cosine": "nearest cosine", "vendi": "Vendi", "answer_entropy": "answer entropy",
    }  # fmt: skip
    names = [name for name in titles if name in rows[0]]
    cells: list[list[Cell]] = [[v if isinstance(v := row[name], str | int | float) else "" for name in names] for row in rows]
    return table([titles[name] for name in names], cells)


def _worst(chosen: Selection, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
    order = best_first(-chosen.values, chosen.values)[:NUM_WORST]
    rows = []
    for p in order:
        example = chosen.pool.examples[int(chosen.scored[p])]
        row: tuple[Cell, ...] = (
            example.row, float(chosen.values[p]), "picked" if kept[p] else "not", excerpt(prompt_text(example)),
            excerpt(answer_text(example)),
        )  # fmt: skip
        rows.append(row)
    return table(("row", "score", "picked", "prompt", "answer"), rows, excerpts=True)
