"""Conditions that a fine-tune has to meet, and the verdict: SHIP, HOLD or NOT SHOWN.

A gate ``task>=0.05`` is met when the whole 95 % interval of the difference lies at or above 0.05, failed when the whole
interval lies below, and not shown otherwise. All must be met, so nothing has to be adjusted for their number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minisft.common.errors import UserError, listing, nearest, visible
from minisft.evaluation.statistics import Interval

Status = Literal["met", "failed", "not shown"]
Verdict = Literal["SHIP", "HOLD", "NOT SHOWN"]
EXIT_STATUS: dict[Verdict, int] = {"SHIP": 0, "HOLD": 8, "NOT SHOWN": 9}
DIMENSIONS = ("task", "general", "business")
_GATE = re.compile(r"\s*([\w.]+)\s*>=\s*([+-]?\d*\.?\d+)\s*")


@dataclass(frozen=True)
class Gate:
    """``name``: a dimension, or dimension.metric; ``limit``: the least difference tuned - base."""

    name: str
    limit: float


@dataclass(frozen=True)
class GateResult:
    """A gate, the interval that it was held against and what came out."""

    gate: Gate
    measured: str
    interval: Interval
    status: Status

    def __str__(self) -> str:
        return f"{self.measured} {self.interval}, limit {self.gate.limit:+g}: {self.status}"


def parse_gate(text: str) -> Gate:
    """``task>=+0.05``.

    Raises:
        UserError: ``config/bad-gate``.
    """
    match = _GATE.fullmatch(text)
    if match is None or match[1].split(".")[0] not in DIMENSIONS:
        fix = nearest(text.split(">")[0], DIMENSIONS) or 'write "task>=+0.05" "general>=-0.02", in quotes'
        raise UserError(
            "config/bad-gate", "a gate cannot be read", where="--gate", found=visible(text, 60),
            expected=f"NAME>=NUMBER with {' or '.join(DIMENSIONS)}", fix=fix,
        )  # fmt: skip
    return Gate(match[1], float(match[2]))


def judge_gates(gates: Sequence[Gate], measured: Mapping[str, tuple[Interval, bool]]) -> list[GateResult]:
    """Hold each gate against every measurement that it names.

    Args:
        gates: one dimension may have several measurements; its gate applies to each.
        measured: ``dimension.metric`` -> (difference, whether there are enough rows to judge).

    Returns:
        a result for each pair.

    Raises:
        UserError: a gate that nothing measures.
    """
    results = []
    for gate in gates:
        names = [name for name in measured if name == gate.name or name.split(".")[0] == gate.name]
        if not names:
            fix = "drop the gate, or give the files: two rows files for task, --general BASE TUNED, --business FILE"
            what = "a gate has no data"
            raise UserError("config/gate-without-data", what, found=visible(gate.name), expected=listing(measured), fix=fix)
        for name in names:
            interval, enough = measured[name]
            results.append(GateResult(gate, name, interval, _status(gate, interval, enough)))
    return results


def _status(gate: Gate, interval: Interval, enough: bool) -> Status:
    if not enough:
        return "not shown"
    if interval.low >= gate.limit:
        return "met"
    return "failed" if interval.high < gate.limit else "not shown"


def verdict_of(results: Sequence[GateResult]) -> Verdict:
    """SHIP when all are met, HOLD when one is failed, else NOT SHOWN."""
    statuses = {result.status for result in results}
    return "HOLD" if "failed" in statuses else "SHIP" if statuses == {"met"} else "NOT SHOWN"
