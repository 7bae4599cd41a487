"""The flags of the commands that judge: ``compare``, ``ab``, ``arena`` and ``feedback``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

from minisft.config import EVAL_METRICS


def judging_flags(made: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add them to the commands' parsers, by name."""
    _compare_flags(made["compare"])
    _ab_flags(made["ab"])
    _arena_flags(made["arena"])
    _feedback_flags(made["feedback"])


def positive(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(text)
    return number


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs=2, metavar="F.rows.jsonl", help="rows of the base, then of the tuned model")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder for compare.json, report.html, bad_cases.jsonl"
    )
    parser.add_argument("--data", default=None, metavar="F", help="the rows that were scored: prompts, columns, slices")
    parser.add_argument("--train", default=None, metavar="F", help="the training rows, to show those near a regression")
    parser.add_argument(
        "--general", nargs=2, action="append", default=[], metavar=("BASE", "TUNED"),
        help="two rows files of general ability; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--embedding", default=None, metavar="COLUMN",
        help="of --data and --train: lists of numbers, near training rows point the same way (default: shared words)",
    )  # fmt: skip
    parser.add_argument("--business", default=None, metavar="F.json", help="what ab analyze, arena or feedback wrote")
    parser.add_argument(
        "--gate", nargs="+", default=[], metavar="NAME>=X",
        help='what must hold, for instance "task>=+0.05" "general>=-0.02" (default task>=0 and general>=-margin)',
    )  # fmt: skip
    parser.add_argument(
        "--margin", type=positive, default=0.02, metavar="M", help="how much counts as nothing lost (default 0.02)"
    )
    parser.add_argument("--cluster", default=None, metavar="COLUMN", help="rows with equal values belong together")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw (default 0)")


def _ab_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="plan|analyze", required=True, parser_class=type(parser))
    plan, analyze = (
        actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        for name, text in (("plan", "how many units and days a test takes"), ("analyze", "judge a test from a file"))
    )
    plan.add_argument("--baseline", type=float, required=True, metavar="P", help="the rate today, for instance 0.10")
    plan.add_argument(
        "--effect", required=True, metavar="E", help="smallest change worth finding: 0.02, or 20%%rel of the baseline"
    )
    plan.add_argument(
        "--design", choices=("fixed", "sequential"), default="fixed", help="one look at the end (default), or many"
    )
    plan.add_argument("--alpha", type=float, default=0.05, metavar="A", help="chance of a false alarm (default 0.05)")
    plan.add_argument("--power", type=float, default=0.8, metavar="P", help="chance to find the effect (default 0.8)")
    plan.add_argument("--traffic", type=float, default=None, metavar="N", help="units a day, all arms together")
    plan.add_argument(
        "--out", default=None, metavar="F.json", help="keep the plan; analyze reads it and notes every look in it"
    )
    analyze.add_argument(
        "--data", required=True, metavar="F", help="CSV or JSONL: unit, variant, converted[, value, time, segment]"
    )
    analyze.add_argument("--plan", default=None, metavar="F.json", help="the plan: design, tau, units")
    analyze.add_argument("--design", choices=("fixed", "sequential"), default=None, help="without a plan")
    analyze.add_argument(
        "--looks", type=int, default=None, metavar="N", help="fixed: how often the data was looked at; must be 1"
    )
    analyze.add_argument("--tau", type=positive, default=None, metavar="T", help="sequential: effect expected before the data")
    analyze.add_argument(
        "--control", default=None, metavar="NAME", help="variant to hold the others against (default: first by name)"
    )
    analyze.add_argument(
        "--split", type=positive, nargs="+", default=None, metavar="S", help="planned shares by name (default equal)"
    )
    analyze.add_argument(
        "--guardrail", nargs="+", default=[], metavar="COL<=X", help='must not get worse: "latency<=0.05" "value>=-1"'
    )
    analyze.add_argument(
        "--covariate", default=None, metavar="COL", help="column from before the test that explains value (CUPED)"
    )
    analyze.add_argument("--seed", type=int, default=0, help="decides every draw (default 0)")
    analyze.add_argument("--out", default=None, metavar="F.json", help="the analysis, for compare --business")


def _arena_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--a", required=True, metavar="MODEL[+ADAPTER]", help="first model: folder, GGUF file or hub id")
    parser.add_argument("--b", required=True, metavar="MODEL[+ADAPTER]", help="second model")
    parser.add_argument("--prompts", required=True, metavar="F", help="rows to answer; their own last answer is not used")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for votes.sqlite and arena.json; may be gone on with"
    )
    parser.add_argument("--port", type=int, default=8765, metavar="P", help="of the page (default %(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="another address needs --token (default this machine only)"
    )
    parser.add_argument("--token", default=None, metavar="T", help="what others have to know, at least 16 characters")
    parser.add_argument("--live", action="store_true", default=False, help="answer when a prompt is shown, not all beforehand")
    parser.add_argument("--system", default=None, metavar="TEXT", help="system message")
    parser.add_argument("--template", default=None, metavar="T", help="chat template: a .jinja file, chatml or plain")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--quant", choices=("none", "nf4"), default="none", help="hold the models' linears in 4 bits")
    parser.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="with --quant: scales in 8 bits"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default %(default)s)")


def _feedback_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--in", dest="feedback", required=True, metavar="F", help="an arena's votes.sqlite, or thumbs as JSON lines"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for rows and rates")
    parser.add_argument(
        "--trained", nargs="+", default=[], metavar="F.sha256", help="hashes of prompts that were trained on before"
    )
    parser.add_argument("--eval", nargs="+", default=[], metavar="F", help="evaluation rows, which never become training rows")


def eval_metric_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``eval`` that choose what is scored: rows by metrics, or a suite."""
    parser.add_argument("--data", default=None, metavar="F", help="rows whose last assistant turn is the right answer")
    parser.add_argument(
        "--metric", nargs="+", default=None, choices=EVAL_METRICS, metavar="M",
        help=f"how an answer is judged: {', '.join(EVAL_METRICS)}; several share one pass",
    )  # fmt: skip
    parser.add_argument(
        "--cluster", default=None, metavar="COLUMN", help="rows with equal values belong together, for intervals"
    )
    parser.add_argument(
        "--normalize", choices=("none", "squad"), default="none",
        help="of exact_match: as they stand (default), or without case, punctuation and English articles",
    )  # fmt: skip
    parser.add_argument("--bleu-tokenize", default="13a", metavar="T", help="of bleu: 13a (default), zh, char, intl or none")
    parser.add_argument("--suite", choices=("general",), default=None, help="general ability instead of --data and --metric")
    parser.add_argument("--mmlu", default=None, metavar="F", help="of the suite: four-choice questions, asked in cloze form")
    parser.add_argument("--texts", default=None, metavar="F", help="of the suite: {text} rows for bits per byte")
    parser.add_argument(
        "--base", default=None, metavar="M", help="of the suite: the model before, for KL(base || tuned) a token"
    )
