"""The commands that judge from files: ``compare``, ``ab``, ``arena`` and ``feedback``.

Each is a few lines over the modules below; see ``main`` for errors and output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minisft.common.atomic_files import require_unused
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
