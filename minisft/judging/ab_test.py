"""Judge an A/B test from a file of units: nothing here splits traffic.

The order is fixed. First the split: if it is not the planned one, no effect can be believed and the analysis ends. Then the
effect with its interval, by the design that was chosen before the data: one look at the end, or any number of looks with the
always-valid test. A p-value for one look is refused on data that was looked at before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minisft.common.errors import UserError, listing, nearest, visible
from minisft.common.safe_json import JSON
from minisft.evaluation.statistics import Floats, Interval, holm, newcombe_interval
from minisft.judging.ab_file import Trial, Unit, read_trial, time_key
from minisft.judging.ab_plan import Chosen, Design, choose_design, note_look, read_plan
from minisft.judging.ab_statistics import (
    SPLIT_ALPHA,
    Look,
    bootstrap_difference,
    cuped,
    rates_p,
    relative_lift,
    sample_ratio_p,
    sequential,
    welch,
)

MAX_LOOKS, MIN_SEGMENT = 100, 20
_GUARDRAIL = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([+-]?\d*\.?\d+)\s*")


@dataclass(frozen=True)
class Guardrail:
    """B - A of ``column`` has to stay on the right side of ``limit``: ``sign`` 1 for at most, -1 for at least."""

    column: str
    sign: int
    limit: float


def parse_guardrail(text: str) -> Guardrail:
    """``latency<=0.05``: B may be at most 0.05 above A; ``value>=-1``: at most 1 below.

    Raises:
        UserError: ``config/bad-guardrail``.
    """
    match = _GUARDRAIL.fullmatch(text)
    if match is None:
        fix = 'write "latency<=0.05" or "value>=-1", in quotes'
        raise UserError("config/bad-guardrail", "a guardrail cannot be read", found=visible(text, 60), fix=fix)
    return Guardrail(match[1], 1 if match[2] == "<=" else -1, float(match[3]))


# --- analysis


def analyze_ab(
    data: str | Path,
    *,
    plan: str | Path | None = None,
    design: Design | None = None,
    looks: int | None = None,
    tau: float | None = None,
    control: str | None = None,
    shares: Sequence[float] | None = None,
    guardrails: Sequence[Guardrail] = (),
    covariate: str | None = None,
    seed: int = 0,
) -> dict[str, JSON]:
    """Judge a test.

    Args:
        data: the units.
        plan: a plan's file, which brings design and tau, and where this look is noted.
        design: without a plan: fixed or sequential.
        looks: without a plan, for a fixed horizon: how often the data was looked at, this time included.
        tau: without a plan, for the sequential test.
        control: the variant that the others are held against; the first by name.
        shares: planned split, in the order of the variants' names; equal.
        guardrails: what must not become worse, with Holm over all of them.
        covariate: a column from before the test that explains ``value`` (CUPED).
        seed: of the bootstrap.

    Returns:
        the analysis as JSON; ``headline`` is what ``compare --business`` reads.

    Raises:
        UserError: a broken split, a look too many, data that does not fit.
    """
    planned = None if plan is None else read_plan(plan)
    numeric = [*dict.fromkeys([g.column for g in guardrails if g.column != "value"] + ([covariate] if covariate else []))]
    trial = read_trial(data, numeric)
    _require_guardrails(guardrails, trial)
    variants = _ordered_variants(trial, control)
    split = _check_split(trial, shares)
    alpha = planned.alpha if planned else 0.05
    chosen = choose_design(planned, design, looks, tau, trial)
    effects = [_effect(trial.of(variants[0]), trial.of(name), chosen, covariate, seed, alpha) for name in variants[1:]]
    if chosen.name == "fixed":
        for effect, p in zip(effects, holm([float(str(e["p_value"])) for e in effects]), strict=True):
            effect["p_holm"] = p
    notes = list(trial.notes)
    if chosen.name == "sequential" and "value" in trial.numeric and not guardrails:
        notes.append("value is not judged by a sequential test of rates: make it a guardrail")
    report: dict[str, JSON] = {
        "design": chosen.name, "alpha": alpha, "control": variants[0], "split": split, "notes": list(notes),
        "effects": dict(zip(variants[1:], effects, strict=True)),
        "guardrails": _guardrails(trial, variants, guardrails, chosen, alpha),
        "segments_exploratory": _segments(trial, variants),
        "headline": _headline(variants[1], variants[0], effects[0]),
    }  # fmt: skip
    if planned is not None and plan is not None:
        note_look(planned, Path(plan), trial)
    return report


def _require_guardrails(guardrails: Sequence[Guardrail], trial: Trial) -> None:
    for guardrail in guardrails:
        if guardrail.column not in trial.numeric:
            fix = nearest(guardrail.column, trial.numeric) or "name a column of numbers"
            what = "a guardrail has no column"
            raise UserError("config/no-column", what, found=guardrail.column, expected=listing(trial.numeric), fix=fix)


def _ordered_variants(trial: Trial, control: str | None) -> list[str]:
    first = trial.variants[0] if control is None else control
    if first not in trial.variants:
        fix = nearest(first, trial.variants) or "name one of them"
        expected = listing(trial.variants)
        what = "no such variant"
        raise UserError("config/no-variant", what, where="--control", found=visible(first), expected=expected, fix=fix)
    return [first, *(name for name in trial.variants if name != first)]


def _check_split(trial: Trial, shares: Sequence[float] | None) -> dict[str, JSON]:
    counts = [len(trial.of(name)) for name in trial.variants]
    planned = list(shares or [1.0] * len(counts))
    if len(planned) != len(counts) or min(planned) <= 0:
        fix = f"give one share above 0 for each of {listing(trial.variants)}, in this order"
        raise UserError("config/bad-split", "the split does not fit the variants", found=str(planned), fix=fix)
    p = sample_ratio_p(counts, planned)
    if p < SPLIT_ALPHA:
        found = f"{', '.join(f'{visible(n, 40)} {k}' for n, k in zip(trial.variants, counts, strict=True))}; p {p:.2g}"
        expected = "shares " + ", ".join(f"{share / sum(planned):.3g}" for share in planned)
        fix = "find out which units were lost on one side; no effect can be read from this data"
        what = "the split is not the planned one"
        raise UserError("data/sample-ratio-mismatch", what, found=found, expected=expected, fix=fix)
    if min(counts) < 2:
        raise UserError("data/empty-arm", "an arm has fewer than two units", found=str(counts), expected="at least 2 each")
    by_name: dict[str, JSON] = dict(zip(trial.variants, counts, strict=True))
    return {"units": by_name, "p_value": p}


def _converted(units: Sequence[Unit]) -> Floats:
    return np.array([unit.converted for unit in units], dtype=np.float64)


def _numbers(units: Sequence[Unit], column: str) -> Floats:
    return np.array([unit.numbers[column] for unit in units], dtype=np.float64)


def _effect(a: list[Unit], b: list[Unit], chosen: Chosen, covariate: str | None, seed: int, alpha: float) -> dict[str, JSON]:
    k_a, k_b, level = int(_converted(a).sum()), int(_converted(b).sum()), 1 - alpha
    lift = relative_lift(k_a, len(a), k_b, len(b), level)
    found: dict[str, JSON] = {"units": [len(a), len(b)], "rates": [k_a / len(a), k_b / len(b)]}
    if chosen.name == "sequential":
        looks = _looks(a, b, _converted(a), _converted(b), chosen.tau, level)
        return found | _sequential_json(looks, chosen.tau, alpha)
    p, test = rates_p(k_a, len(a), k_b, len(b))
    found |= {"difference": dict(newcombe_interval(k_a, len(a), k_b, len(b), level).to_json()), "p_value": p, "test": test}
    found["relative_lift"] = None if lift is None else dict(lift.to_json())
    if "value" in a[0].numbers:
        found["value"] = _value(a, b, covariate, seed, level)
    return found


def _value(a: list[Unit], b: list[Unit], covariate: str | None, seed: int, level: float) -> dict[str, JSON]:
    values, split = _numbers([*a, *b], "value"), len(a)
    adjusted = cuped(values, _numbers([*a, *b], covariate)) if covariate else values
    t, boot = (
        welch(adjusted[:split], adjusted[split:], level),
        bootstrap_difference(adjusted[:split], adjusted[split:], seed=seed),
    )
    variance = float(adjusted.var() / values.var()) if values.var() > 0 else 1.0
    return {
        "means": [float(values[:split].mean()), float(values[split:].mean())], "welch": dict(t.difference.to_json()),
        "p_value": t.p_value, "bootstrap": dict(boot.to_json()), "variance_left_by_covariate": variance,
    }  # fmt: skip


def _looks(a: list[Unit], b: list[Unit], values_a: Floats, values_b: Floats, tau: float, level: float) -> list[Look]:
    """The sequential test after each of at most 100 equal shares of the units, in the order in which they came."""
    merged = sorted(
        [(unit.time, 0, i) for i, unit in enumerate(a)] + [(unit.time, 1, i) for i, unit in enumerate(b)],
        key=lambda entry: time_key(entry[0]),
    )
    arms = np.array([arm for _, arm, _ in merged])
    values = np.concatenate([values_a, values_b])[[i + arm * len(a) for _, arm, i in merged]]
    parts = np.array_split(np.arange(len(merged)), min(MAX_LOOKS, len(merged) // 4 or 1))
    return sequential([values[p][arms[p] == 0] for p in parts], [values[p][arms[p] == 1] for p in parts], tau, level)


def _sequential_json(looks: Sequence[Look], tau: float, alpha: float) -> dict[str, JSON]:
    last = looks[-1]
    difference = last.interval.clipped(-1.0, 1.0)  # of two rates; where nobody has converted yet the bounds are infinite
    first = next((look for look in looks if look.p_value <= alpha), None)
    return {
        "difference": dict(difference.to_json()), "p_value": last.p_value, "test": f"always valid, tau {tau:g}",
        "looks": len(looks), "shown_after_units": None if first is None else first.n_a + first.n_b,
    }  # fmt: skip


def _guardrails(
    trial: Trial, variants: Sequence[str], guardrails: Sequence[Guardrail], chosen: Chosen, alpha: float
) -> list[JSON]:
    """Each guardrail is a claim of non-inferiority: kept when its adjusted p-value is at most alpha."""
    found: list[dict[str, JSON]] = []
    for name in variants[1:]:
        a, b = trial.of(variants[0]), trial.of(name)
        for guardrail in guardrails:
            values_a, values_b = (guardrail.sign * _numbers(units, guardrail.column) for units in (a, b))
            limit = guardrail.sign * guardrail.limit
            test = welch(-values_a, -values_b)
            p = test.p_above(-limit)
            if chosen.name == "sequential":  # the same claim at every look: the difference from its limit
                centre, tau = values_a.mean(), abs(limit) or chosen.tau
                looks = _looks(a, b, values_a - centre, values_b - centre - limit, tau, 1 - alpha)
                p = looks[-1].p_value if looks[-1].interval.estimate < 0 else 1.0
            difference = guardrail.sign * float(values_b.mean() - values_a.mean())
            entry: dict[str, JSON] = {"variant": name, "column": guardrail.column, "limit": guardrail.limit}
            found.append({**entry, "difference": difference, "p_value": p})
    for entry, p in zip(found, holm([float(str(entry["p_value"])) for entry in found]), strict=True):
        entry |= {"p_holm": p, "kept": p <= alpha}
    return list(found)


def _segments(trial: Trial, variants: Sequence[str]) -> list[JSON]:
    """Rates by segment, for hypotheses only."""
    found: list[JSON] = []
    for segment in sorted({unit.segment for unit in trial.units if unit.segment}):
        arms = [[u for u in trial.of(name) if u.segment == segment] for name in variants[:2]]
        if min(map(len, arms)) >= MIN_SEGMENT:
            counts = [int(_converted(arm).sum()) for arm in arms]
            interval = newcombe_interval(counts[0], len(arms[0]), counts[1], len(arms[1]))
            found.append({"segment": segment, "units": [len(arm) for arm in arms], "difference": dict(interval.to_json())})
    return found


def _headline(name: str, control: str, effect: dict[str, JSON]) -> dict[str, JSON]:
    difference = effect["difference"]
    assert isinstance(difference, dict)
    return {"name": f"conversion, {name} - {control}, {effect['test']}", **difference, "enough": True}


def summary(report: dict[str, JSON]) -> str:
    """What the terminal shows."""
    split, effects = report["split"], report["effects"]
    assert isinstance(split, dict)
    assert isinstance(effects, dict)
    lines = [f"split: {split['units']}, p {float(str(split['p_value'])):.3g}: as planned"]
    for name, effect in effects.items():
        assert isinstance(effect, dict)
        lines += _effect_lines(name, str(report["control"]), effect)
    for entry in _objects(report["guardrails"]):
        kept = "kept" if entry["kept"] else "not shown to be kept"
        difference, p = float(str(entry["difference"])), float(str(entry["p_holm"]))
        column = f"guardrail {visible(entry['column'], 40)} of {visible(entry['variant'], 40)}"
        lines.append(f"{column}: {difference:+.4g}, limit {float(str(entry['limit'])):g}, adjusted p {p:.3g}: {kept}")
    for entry in _objects(report["segments_exploratory"]):
        lines.append(f"segment {visible(entry['segment'], 40)} (exploratory): {_shown(entry['difference'])}")
    return "\n".join(lines)


def _objects(value: JSON) -> list[dict[str, JSON]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _effect_lines(name: str, control: str, effect: dict[str, JSON]) -> list[str]:
    p, test = float(str(effect["p_value"])), effect["test"]
    head = f"{visible(name, 40)} - {visible(control, 40)}: conversion {_shown(effect['difference'])}, p {p:.3g} ({test})"
    if effect.get("shown_after_units"):
        head += f", shown after {effect['shown_after_units']} units"
    value = effect.get("value")
    if not isinstance(value, dict):
        return [head]
    p = float(str(value["p_value"]))
    return [head, f"  value {_shown(value['welch'])}, p {p:.3g} (Welch); bootstrap {_shown(value['bootstrap'])}"]


def _shown(value: JSON) -> str:
    return str(Interval.from_json(value))
