"""The flags of the commands that judge data: ``inspect --quality`` and ``select``."""

from __future__ import annotations

from argparse import ArgumentParser

SCORES = "ifd, pmi, loss, length, random or column:NAME"


def quality_flags(parser: ArgumentParser) -> None:
    """Flags that ``inspect`` has for ``--quality``."""
    parser.add_argument(
        "--quality", action="store_true", default=False, help="report copies, defects and leaks; needs no model"
    )
    _shared_flags(parser)
    parser.add_argument(
        "--out", default=None, metavar="DIR", help="with --quality: a new folder for report.json and report.html"
    )


def _shared_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--against", nargs="+", action="extend", default=[], metavar="F", help="test files to look for in the rows"
    )
    parser.add_argument("--near", type=float, default=0.8, metavar="J", help="similarity of near copies (default %(default)s)")


def select_flags(parser: ArgumentParser) -> None:
    """Flags of ``select``."""
    parser.add_argument("--data", required=True, metavar="F", help="the pool of rows to pick from")
    parser.add_argument("--out", required=True, metavar="F.jsonl", help="the picked rows; report, scores and page go beside it")
    parser.add_argument("--model", default=None, metavar="M", help="for scores and diversity: whose losses and states to use")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rows", type=int, default=None, metavar="N", help="pick at most N rows")
    size.add_argument("--tokens", type=int, default=None, metavar="T", help="pick at most T tokens (words without --model)")
    parser.add_argument("--score", default="random", metavar="S", help=f"{SCORES} (default %(default)s)")
    parser.add_argument("--ifd", choices=("ratio", "ppl"), default="ratio", help="quotient of losses, or of perplexities")
    parser.add_argument("--drop-defects", action="store_true", default=False, help="drop rows with a defect")
    parser.add_argument("--dedup", choices=("exact", "near"), default=None, help="of copies keep the best scored one")
    _shared_flags(parser)
    parser.add_argument("--diverse", choices=("greedy", "kcenter", "facility", "none"), default="none", help="after the score")
    parser.add_argument(
        "--keep-rate", type=float, default=None, metavar="R", help="with --diverse greedy: share that is far enough"
    )
    parser.add_argument("--within-length-bins", type=int, default=1, metavar="K", help="pick the same share of K length bins")
    parser.add_argument(
        "--embedding", default=None, metavar="NAME", help="for --diverse: a column of numbers instead of the model"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides --score random (default 0)")
    parser.add_argument("--scores", default=None, metavar="F", help="reuse the .scores.jsonl of an earlier selection")
    parser.add_argument(
        "--max-length", type=int, default=1024, metavar="N", help="longest row that is scored (default %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows scored at once (default %(default)s)")
    parser.add_argument("--map", nargs="+", default=(), metavar="FIELD=COLUMN", help="column of your file for a field of ours")
    parser.add_argument("--template", default=None, metavar="T", help="chat template: a .jinja file, chatml or plain")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
