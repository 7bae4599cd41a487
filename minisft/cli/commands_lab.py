"""The commands that look into training: ``lr-find``, ``diff`` and ``card``.

Each is a few lines over the modules below; see ``cli.main`` for errors and output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minisft.cli.libraries import load_libraries
from minisft.common.checks import check_comparison
from minisft.common.errors import visible
from minisft.common.settings import config_of, read_toml
from minisft.config import RunConfig
from minisft.training.lr_grid import Cell, check_search, heading, line


def lr_find_command(arguments: argparse.Namespace) -> int:
    """Try learning rates on a share of a run's steps."""
    run = _run_of(arguments)
    check_search(run, arguments.lrs, arguments.share)
    load_libraries()
    from minisft.training.lr_find import PLOT, REPORT, lr_find

    print(heading())

    def show(cell: Cell) -> None:
        print(line(cell), flush=True)

    found = lr_find(run, arguments.lrs, arguments.share, arguments.search_out, log=_log, callback=show)
    if found.signal is not None:
        print(f"stopped after {len(found.cells)} rates; the same command goes on", file=sys.stderr)
        return 128 + found.signal
    choice = found.choice
    assert choice is not None  # or lr_find had raised
    print(
        f"\nlearning rate {choice.lr:g} (between {choice.bracket[0]:g} and {choice.bracket[1]:g}), "
        f"from {found.steps} of {found.total_steps} steps\n{visible(found.out / REPORT)}, {visible(found.out / PLOT)}"
    )
    return 0


def _run_of(arguments: argparse.Namespace) -> RunConfig:
    """The settings of the run whose rate is looked for: ``--config``, then the flags."""
    own = ("command", "version", "debug", "config", "lrs", "share", "search_out")
    values: dict[str, object] = {}
    if config := getattr(arguments, "config", None):
        values = {key.replace("-", "_"): value for key, value in read_toml(Path(config)).items()}
    values |= {key: value for key, value in vars(arguments).items() if key not in own}
    if arguments.search_out is not None:
        values.setdefault("out", arguments.search_out)  # the run itself needs none yet
    return config_of(RunConfig, values, visible(config) if config else "command line")


def diff_command(arguments: argparse.Namespace) -> int:
    """Compare two models of one shape, tensor by tensor."""
    check_comparison(arguments.energy, arguments.threshold, arguments.top)
    load_libraries()
    from minisft.evaluation.results import terminal_progress
    from minisft.merging.diff import diff_models, render, write_diff

    with terminal_progress("tensors") as progress:
        diff = diff_models(
            arguments.a,
            arguments.b,
            energy=arguments.energy,
            threshold=arguments.threshold,
            top=arguments.top,
            callback=progress or (lambda done, total: None),
        )
    print(render(diff))
    if arguments.out is not None:
        write_diff(diff, arguments.out)
        print(f"\n{visible(arguments.out)}")
    return 0


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def card_command(arguments: argparse.Namespace) -> int:
    """Write the model card of a run."""
    load_libraries()
    from minisft.training.card import write_card

    path = write_card(arguments.run, arguments.license, arguments.base_model, arguments.results, arguments.force)
    print(visible(path))
    return 0
