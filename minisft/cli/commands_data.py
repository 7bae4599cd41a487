"""The commands that judge data: ``inspect --quality`` and ``select``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from minisft.cli.libraries import load_libraries
from minisft.common.atomic_files import disk_errors, require_unused, staged_folder
from minisft.common.errors import UserError, visible
from minisft.selection.settings import Settings


def require_model(arguments: argparse.Namespace) -> None:
    """``inspect`` needs a model for its tokens; what belongs to ``--quality`` is refused, not ignored.

    Raises:
        UserError: ``config/usage``.
    """
    given = [flag for flag, value in (("--against", arguments.against), ("--out", arguments.out)) if value]
    if given:
        fix = "add --quality"
        raise UserError("config/usage", "this flag needs another one", where="minisft inspect", found=given[0], fix=fix)
    if arguments.model is None:
        fix = "--model M, or --quality for a report that needs none"
        raise UserError("config/usage", "inspect shows a model's tokens", where="minisft inspect", found="no --model", fix=fix)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quality_command(arguments: argparse.Namespace) -> int:
    """Report what is wrong with a pool of rows."""
    load_libraries()
    from minisft.quality.page import quality_page, render
    from minisft.quality.pool import read_pool
    from minisft.quality.report import inspect_quality, to_json
    from minisft.selection.model_scores import token_sizes

    out = Path(arguments.out) if arguments.out is not None else None
    if out is not None:
        require_unused(out)
    pool = read_pool(arguments.data, tuple(arguments.map))
    tests = [read_pool(path, tuple(arguments.map)) for path in dict.fromkeys(arguments.against)]
    report = inspect_quality(pool, tests, arguments.near, _log)
    print(render(report))
    if out is not None:
        lengths = token_sizes(pool, arguments.model, arguments.template).tokens if arguments.model is not None else None
        with disk_errors(out), staged_folder(out) as staging:
            text = json.dumps(to_json(report), indent=1, ensure_ascii=False) + "\n"
            (staging / "report.json").write_text(text, encoding="utf-8")
            (staging / "report.html").write_text(quality_page(report, lengths), encoding="utf-8")
        print(f"\n{visible(out / 'report.html')}")
    return 0


def select_command(arguments: argparse.Namespace) -> int:
    """Pick rows, and write them, every score, every reason and a page."""
    settings = Settings(
        score=arguments.score,
        ifd=arguments.ifd,
        rows=arguments.rows,
        tokens=arguments.tokens,
        drop_defects=arguments.drop_defects,
        dedup=arguments.dedup,
        near=arguments.near,
        diverse=arguments.diverse,
        keep_rate=arguments.keep_rate,
        bins=arguments.within_length_bins,
        embedding=arguments.embedding,
        seed=arguments.seed,
    )
    load_libraries()
    from minisft.selection.model_scores import ModelSettings
    from minisft.selection.report import warnings_of
    from minisft.selection.run import select_rows

    names = ("model", "template", "device", "max_length", "batch_size")
    chosen = select_rows(
        arguments.data,
        arguments.out,
        settings,
        ModelSettings(**{name: getattr(arguments, name) for name in names}) if arguments.model is not None else None,
        against=arguments.against,
        mapping=tuple(arguments.map),
        reuse=arguments.scores,
        log=_log,
    )
    for step, left in chosen.funnel.items():
        print(f"{left:>9,}  {visible(step)}")
    if settings.score != "random":
        print(f"Spearman of {visible(settings.score)} with the answer's length: {chosen.correlation:+.2f}")
    for text in warnings_of(chosen):
        print(f"warning: {text}", file=sys.stderr)
    if chosen.threshold is not None:
        print(f"kept below a cosine of {chosen.threshold:.4f}")
    print(f"{visible(arguments.out)}; report.json, scores.jsonl and a page are beside it")
    return 0
