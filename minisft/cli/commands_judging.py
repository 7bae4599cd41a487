"""The commands that judge from files: ``compare``, ``ab``, ``arena`` and ``feedback``.

Each is a few lines over the modules below; see ``main`` for errors and output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.cli.libraries import load_libraries
from minisft.common.atomic_files import disk_errors, require_unused, write_durably
from minisft.common.errors import visible

if TYPE_CHECKING:
    from minisft.judging.arena_models import Contestant


def compare_command(arguments: argparse.Namespace) -> int:
    """Compare two models' rows; the exit status is the verdict's."""
    from minisft.judging.compare_report import PAGE, summary, write_comparison
    from minisft.judging.comparison import compare_files
    from minisft.judging.gates import EXIT_STATUS, parse_gate

    gates = [parse_gate(text) for text in arguments.gate]
    require_unused(Path(arguments.out))
    comparison = compare_files(
        *arguments.rows,
        data=arguments.data,
        train=arguments.train,
        embedding=arguments.embedding,
        general=[(first, second) for first, second in arguments.general],
        business=arguments.business,
        gates=gates,
        margin=arguments.margin,
        cluster=arguments.cluster,
        seed=arguments.seed,
    )
    out = write_comparison(comparison, arguments.out)
    print(summary(comparison))
    if arguments.data is None and comparison.cases:
        print("bad_cases.jsonl has no prompts: give --data with the rows that were scored, and they are ready for labelling")
    print(visible(out / PAGE))
    return EXIT_STATUS[comparison.verdict]


def ab_command(arguments: argparse.Namespace) -> int:
    """Plan an A/B test, or judge one."""
    return _ab_plan(arguments) if arguments.action == "plan" else _ab_analyze(arguments)


def _ab_plan(arguments: argparse.Namespace) -> int:
    from minisft.judging.ab_plan import parse_effect, plan_ab, write_plan

    plan = plan_ab(
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
    from minisft.judging.ab_test import analyze_ab, parse_guardrail, summary

    report = analyze_ab(
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


def arena_command(arguments: argparse.Namespace) -> int:
    """Let people compare two models on a page on this machine."""
    from minisft.cli.commands_answers import read_compressed_
    from minisft.common.extras import require_extra
    from minisft.common.local_server import check_port
    from minisft.evaluation.evaluate import terminal_progress
    from minisft.judging.arena import (
        VOTES,
        check_arena_access,
        make_arena,
        open_arena,
        prepare,
        serve_arena,
        split_name,
        summary,
    )
    from minisft.judging.arena_app import Answer
    from minisft.judging.arena_models import answerer
    from minisft.judging.arena_store import Side

    require_extra("arena", "starlette", "uvicorn")
    out, port, names = Path(arguments.out), check_port(arguments.port), (arguments.a, arguments.b)
    check_arena_access(arguments.host, arguments.token)
    for name in names:
        split_name(name)
    store = open_arena(out, names, arguments.prompts, arguments.system)
    load_libraries()
    sides: tuple[Side, Side] = ("a", "b")
    contestants = [_contestant(name, arguments) for name in names]
    read_compressed_(*(contestant.model for contestant in contestants))
    answers: dict[Side, Answer] = {
        side: answerer(contestant, arguments.max_new_tokens) for side, contestant in zip(sides, contestants, strict=True)
    }
    if not arguments.live:
        with terminal_progress("answers") as progress:
            prepare(store, answers, progress)
    arena = make_arena(store, answers, live=arguments.live, host=arguments.host, port=port, token=arguments.token)
    try:
        result = serve_arena(arena, arguments.host, port, out, lambda text: print(text, flush=True))
    finally:
        store.close()
    print(summary(result, names))
    print(visible(out / VOTES))
    return 0


def _contestant(name: str, arguments: argparse.Namespace) -> Contestant:
    from minisft.cli.commands_answers import load_adapted
    from minisft.judging.arena import split_name
    from minisft.judging.arena_models import Contestant

    model, adapter = split_name(name)
    given = argparse.Namespace(**{**vars(arguments), "model": model, "adapter": adapter, "scale": 1.0})
    return Contestant(name, *load_adapted(given, writes=False))


def feedback_command(arguments: argparse.Namespace) -> int:
    """Turn votes and thumbs into rates and rows."""
    from minisft.judging.feedback import BAD, PAIRS, SFT, eval_hashes, make_feedback_rows, read_guard, write_feedback
    from minisft.judging.feedback_file import read_feedback

    require_unused(Path(arguments.out))
    feedback = read_feedback(arguments.feedback)
    trained = {digest for path in arguments.trained for digest in read_guard(path)}
    evaluated = {digest for path in arguments.eval for digest in eval_hashes(path)}
    made = make_feedback_rows(feedback, trained, evaluated)
    result = write_feedback(feedback, made, arguments.out)
    print(result["selection_bias"])
    for name, counts in (("sft candidates", made.sft), ("preference pairs", made.pairs), ("bad cases", made.bad)):
        file = {"sft candidates": SFT, "preference pairs": PAIRS, "bad cases": BAD}[name]
        print(f"{len(counts)} {name}: {visible(Path(arguments.out) / file)}")
    for reason, count in made.left_out.items():
        if count:
            print(f"{count} {reason}")
    if isinstance(agreed := result.get("rater_agreement"), dict):
        alpha = agreed["krippendorff_alpha"]
        shown = (
            f", alpha {alpha['estimate']:.2f} ({alpha['low']:.2f} to {alpha['high']:.2f})" if isinstance(alpha, dict) else ""
        )
        print(
            f"{agreed['raters']} people judged {agreed['pairs']} pairs that another had judged: "
            f"{agreed['share_of_equal_verdicts']:.0%} equal verdicts{shown}"
        )
    if result["pii_rows"]:
        print(f"{result['pii_rows']} rows look as if they held an address, a phone or a card number: see the column pii")
    return 0
