"""The flags of the commands that judge: ``compare``, ``ab``, ``arena`` and ``feedback``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping


def judging_flags(made: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add them to the commands' parsers, by name."""
    _compare_flags(made["compare"])


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
