"""The flags of the commands that look into training: ``lr-find``, ``diff`` and ``card``."""

from __future__ import annotations

import argparse

# Of a run, nothing that lr-find would use.
NOT_SEARCHED = (
    "lr", "out", "patience", "save_every", "keep_last", "log_every", "eval_metric", "eval_rows", "eval_new_tokens", "best_by",
    "report", "parallel",
)  # fmt: skip


def lr_find_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that ``lr-find`` has beside those of a run."""
    parser.add_argument("--config", metavar="F.toml", help="settings of the run as a flat TOML table; flags override them")
    parser.add_argument(
        "--lrs", type=float, nargs="+", required=True, metavar="LR", help="at least three rates, best a factor of about 3 apart"
    )
    parser.add_argument(
        "--share", type=float, default=0.25, metavar="S", help="share of the run's steps for each (default %(default)s)"
    )
    parser.add_argument(
        "--out", dest="search_out", default=None, metavar="DIR",
        help="a folder for lr.json, lr.svg and the cells; goes on with an earlier search in it (default: the run's, with -lr)",
    )  # fmt: skip


def diff_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``diff``."""
    parser.add_argument("--a", required=True, metavar="M", help="the base: model folder, GGUF file, hub id or name")
    parser.add_argument("--b", required=True, metavar="M", help="a fine-tune of the same shape, or an adapter's folder")
    parser.add_argument(
        "--energy", type=float, default=0.9, metavar="E", help="share of the update that its rank holds (default %(default)s)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.6, metavar="C", help="cosine below which a direction is new (default %(default)s)"
    )
    parser.add_argument(
        "--top",
        type=int,
        default=10,
        metavar="K",
        help="how many of the largest directions are looked at (default %(default)s)",
    )
    parser.add_argument("--out", default=None, metavar="F.json", help="write every tensor and a summary")


def card_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``card``."""
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--license", default=None, metavar="ID", help="the hub's identifier; a run does not know it")
    parser.add_argument("--base-model", default=None, metavar="ORG/NAME", help="hub id of the base, where --model was none")
    parser.add_argument("--results", nargs="+", default=(), metavar="F.json", help="what minisft eval wrote, to be shown")
    parser.add_argument("--force", action="store_true", default=False, help="replace a card that is there")
