"""The commands that judge from files: ``compare``, ``ab``, ``arena`` and ``feedback``.

Each is a few lines over the modules below; see ``main`` for errors and output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minisft.common.atomic_files import disk_errors, require_unused, write_durably
from minisft.common.errors import visible


def compare_command(arguments: argparse.Namespace) -> int:
    """Compare two models' rows; the exit status is the verdict's."""
    from minisft.judging.compare_report import PAGE, summary, write_report
    from minisft.judging.comparison import compare_files
    from minisft.judging.gates import EXIT_STATUS, parse_gate

    gates = [parse_gate(text) for text in arguments.gate]
    require_unused(Path(arguments.out))
    comparison = compare_files(
        *arguments.rows,
        data=arguments.data,
        train=arguments.train,
        general=[(first, second) for first, second in arguments.general],
        business=arguments.business,
        gates=gates,
        margin=arguments.margin,
        cluster=arguments.cluster,
        seed=arguments.seed,
    )
    out = write_report(comparison, arguments.out)
    print(summary(comparison))
    if arguments.data is None and comparison.cases:
        print("bad_cases.jsonl has no prompts: give --data with the rows that were scored, and they are ready for labelling")
    print(visible(out / PAGE))
    return EXIT_STATUS[comparison.verdict]


def ab_command(arguments: argparse.Namespace) -> int:
    """Plan an A/B test, or judge one."""
    return _ab_plan(arguments) if arguments.action == "plan" else _ab_analyze(arguments)


def _ab_plan(arguments: argparse.Namespace) -> int:
    from minisft.judging.ab_plan import make_plan, parse_effect, write_plan

    plan = make_plan(
        arguments.baseline,
        parse_effect(arguments.effect, arguments.baseline),
        arguments.design,
        alpha=arguments.alpha,
        power=arguments.power,
        traffic=arguments.traffic,
    )
    days = "" if plan.days is None else f", {plan.days} days at {plan.traffic:g} units a day"
    print(
        f"{plan.units_per_arm} units an arm{days}: {plan.baseline:g} to {plan.baseline + plan.effect:g}, power {plan.power:g}"
    )
    if plan.design == "sequential":
        print(f"sequential, tau {plan.tau:g}: look whenever you like; it may end earlier, and has less power at the same size")
    if arguments.out is not None:
        write_plan(plan, arguments.out)
        print(visible(arguments.out))
    return 0


def _ab_analyze(arguments: argparse.Namespace) -> int:
    from minisft.judging.ab_test import analyze, parse_guardrail, summary

    report = analyze(
        arguments.data,
        plan=arguments.plan,
        design=arguments.design,
        looks=arguments.looks,
        tau=arguments.tau,
        control=arguments.control,
        shares=arguments.split,
        guardrails=[parse_guardrail(text) for text in arguments.guardrail],
        covariate=arguments.covariate,
        seed=arguments.seed,
    )
    notes = report["notes"]
    for note in notes if isinstance(notes, list) else []:
        print(note)
    print(summary(report))
    if arguments.out is not None:
        with disk_errors(Path(arguments.out).absolute().parent):
            write_durably(arguments.out, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
        print(visible(arguments.out))
    return 0
