"""Plan an A/B test before its data, keep the plan in a file, and refuse what the plan does not allow.

A fixed horizon is one look when the planned units are there; a sequential test may be looked at whenever one likes. Which of
the two it is has to be decided before the data, because the choice after it is a look.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from minisft.common import safe_json
from minisft.common.atomic_files import disk_errors, write_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.judging.ab_file import Trial, require_ordered
from minisft.judging.ab_statistics import sample_size

Design = Literal["fixed", "sequential"]


@dataclass(frozen=True)
class Plan:
    """A test as it was planned: rates are absolute, ``tau`` is the size of effects that the sequential test expects."""

    baseline: float
    effect: float
    alpha: float
    power: float
    design: Design
    tau: float
    units_per_arm: int
    traffic: float | None
    days: int | None
    # What was analysed so far: sha256 of the file and its units.
    analyses: list[dict[str, JSON]] = field(default_factory=list)


def plan_ab(
    baseline: float, effect: float, design: Design, *, alpha: float = 0.05, power: float = 0.8, traffic: float | None = None
) -> Plan:
    """How many units and days a test takes.

    Args:
        baseline: the rate today.
        effect: the smallest absolute change worth finding.
        design: fixed, or sequential with tau = |effect|.
        alpha: chance of a false alarm.
        power: chance to find the effect, for a fixed horizon.
        traffic: units a day, both arms together.

    Returns:
        the plan; a sequential test may end earlier, or need more units.

    Raises:
        UserError: rates or chances outside (0, 1), no effect, no traffic.
    """
    if not (0 < alpha < 1 and 0 < power < 1) or (traffic is not None and not 0 < traffic < math.inf):
        found = f"alpha {alpha:g}, power {power:g}, traffic {traffic}"
        fix = "give chances between 0 and 1, and units a day above 0"
        raise UserError("config/bad-value", "a setting is out of range", found=found, fix=fix)
    try:
        units = sample_size(baseline, effect, alpha=alpha, power=power)
    except ValueError as error:
        fix = "give --baseline and --effect so that both rates lie between 0 and 1 and differ"
        raise UserError("config/bad-value", "no test can show that", found=str(error), fix=fix) from None
    days = None if traffic is None else math.ceil(2 * units / traffic)
    return Plan(baseline, effect, alpha, power, design, abs(effect), units, traffic, days)


def parse_effect(text: str, baseline: float) -> float:
    """``+0.02`` is absolute, ``10%rel`` a tenth of the baseline; a bare ``10%`` is refused, because it may mean either.

    Raises:
        UserError: ``config/bad-value``.
    """
    relative = text.endswith("rel")
    number = text.removesuffix("rel").strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (number.endswith("%") and not relative):
        fix = "write 0.02 for two points, or 10%rel for a tenth of the baseline"
        raise UserError("config/bad-value", "an effect cannot be read", where="--effect", found=visible(text, 40), fix=fix)
    return value * baseline if relative else value


# --- the plan's file


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write the plan as JSON; ``analyze`` notes every look in it."""
    with disk_errors(Path(path).absolute().parent):
        write_durably(path, (json.dumps(asdict(plan), indent=2) + "\n").encode())


def read_plan(path: str | Path) -> Plan:
    """Read what ``write_plan`` wrote.

    Raises:
        UserError: ``data/bad-plan``.
    """
    try:
        values = safe_json.loads(Path(path).read_bytes())
        if not isinstance(values, dict):
            raise TypeError("no object")
        plan = Plan(**values)  # type: ignore[arg-type]  # _require_sound looks at every value that is read
        _require_sound(plan)
    except (OSError, ValueError, TypeError) as error:
        fix, what = "give the file that minisft ab plan --out wrote", "the plan cannot be read"
        raise UserError("data/bad-plan", what, where=visible(path), found=visible(error, 80), fix=fix) from None
    return plan


def _require_sound(plan: Plan) -> None:
    numbers = (plan.baseline, plan.effect, plan.alpha, plan.power, plan.tau, plan.units_per_arm)
    typed = all(type(n) in (int, float) for n in numbers) and plan.design in ("fixed", "sequential")
    if not typed or not 0 < plan.alpha < 1 or plan.tau <= 0 or plan.units_per_arm < 1:
        raise TypeError("a value is out of range")
    if not isinstance(plan.analyses, list) or not all(isinstance(entry, dict) for entry in plan.analyses):
        raise TypeError("the analyses are no list of objects")


# --- what an analysis may do


@dataclass(frozen=True)
class Chosen:
    """The design that an analysis follows; ``tau`` counts for the sequential one."""

    name: Design
    tau: float


def choose_design(planned: Plan | None, design: Design | None, looks: int | None, tau: float | None, trial: Trial) -> Chosen:
    """The design that was fixed before the data, and whether this data may be analysed by it.

    Args:
        planned: the plan, if there is one.
        design, looks, tau: what is given without a plan.
        trial: the data.

    Returns:
        the design.

    Raises:
        UserError: ``config/...``: none or another design, no tau, a look too many; ``data/...``: times out of order.
    """
    name = planned.design if planned else design
    if planned and design and design != planned.design:
        fix = "keep to the plan, or plan a new test"
        raise UserError(
            "config/other-design", "the design was fixed before the data", found=design, expected=planned.design, fix=fix
        )
    if name is None:
        fix = "give --plan FILE, or --design fixed --looks 1, or --design sequential --tau T"
        raise UserError("config/no-design", "how may this data be looked at?", expected="fixed or sequential", fix=fix)
    if name == "sequential":
        size = planned.tau if planned else tau
        if size is None:
            fix = "give --tau: the effect that you expected before the data, for instance 0.02"
            raise UserError("config/no-tau", "the sequential test needs the size of the effects it expects", fix=fix)
        require_ordered(trial)
        return Chosen("sequential", size)
    _refuse_peeking(planned, looks, trial)
    return Chosen("fixed", 0.0)


def _refuse_peeking(planned: Plan | None, looks: int | None, trial: Trial) -> None:
    """A fixed horizon is one look, when the planned units are there."""
    fix = "plan a sequential test (ab plan --design sequential), or analyse with --design sequential --tau T"
    what = "a p-value for one look is wrong on data that was looked at before"
    if planned is None:
        if looks is None:
            fix = "give --looks N: how often this data was looked at while it grew, this time included"
            raise UserError("config/no-looks", "a fixed horizon allows one look", expected="--looks 1", fix=fix)
        if looks != 1:
            raise UserError("config/peeked", what, found=f"{looks} looks", expected="one", fix=fix)
        return
    if any(entry.get("sha256") != trial.sha256 for entry in planned.analyses):
        raise UserError(
            "config/peeked", what, found=f"{len(planned.analyses)} analyses of other data", expected="none", fix=fix
        )
    fewest = min(len(trial.of(name)) for name in trial.variants)
    if fewest < planned.units_per_arm:
        found, expected = f"{fewest} units in the smallest arm", f"{planned.units_per_arm}, as planned"
        raise UserError("config/too-early", "the test is not at its end", found=found, expected=expected, fix=fix)


def note_look(planned: Plan, path: Path, trial: Trial) -> None:
    """Write down in the plan that this data was analysed.

    Args:
        planned: the plan.
        path: its file.
        trial: the data.
    """
    if any(entry.get("sha256") == trial.sha256 for entry in planned.analyses):
        return
    planned.analyses.append({"sha256": trial.sha256, "units": len(trial.units)})
    write_plan(planned, path)
