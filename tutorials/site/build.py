"""Build the site: ``python tutorials/site/build.py build/site``. ``make site`` does it with everything installed.

Sphinx wants its sources under one root, so they are gathered in a temporary folder first: the pages of this folder, the
executed notebooks beside it, the map of CONTRIBUTING.md and the plots that the landing page shows. Notebooks are shown as they
were committed and never run again. A warning is an error.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
from sphinx.cmd.build import build_main

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent.parent
PAGES = "[0-9][0-9]_*.ipynb"


def gather(pages: Path, source: Path) -> None:
    """Lay everything that the site is made of under ``source``."""
    shutil.copytree(SITE, source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "build.py"))
    (source / "tutorials").mkdir()
    for notebook in sorted(pages.glob(PAGES)):
        shutil.copy(notebook, source / "tutorials")
    shutil.copy(ROOT / "CONTRIBUTING.md", source)
    (source / "fonts").mkdir()
    shutil.copy(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSerif.ttf"), source / "fonts")
    plot = ROOT / "benchmarks/results/merge_cpu.svg"
    if plot.exists():
        shutil.copy(plot, source)


def build(out: Path, pages: Path = SITE.parent) -> int:
    """Write the site to ``out``, which is emptied first; the exit status of Sphinx."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        gather(pages, source)
        strict = ["-W", "--keep-going", "--quiet"]
        return build_main(["-b", "html", *strict, "-j", "2", "-d", f"{scratch}/doctrees", str(source), str(out)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("out", type=Path, help="where the HTML goes; emptied first")
    parser.add_argument("--pages", type=Path, default=SITE.parent, help="folder of the executed notebooks")
    arguments = parser.parse_args()
    return build(arguments.out, arguments.pages)


if __name__ == "__main__":
    sys.exit(main())
