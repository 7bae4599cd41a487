"""Runs ``kernel_cases.py`` in a process of its own, and keeps Triton out of ``import minisft.kernels``.

Whether Triton interprets or compiles is settled when it is first imported, for the whole process: other tests compile, so the
interpreter gets its own. To see one case by itself: ``TRITON_INTERPRET=1 pytest tests/kernel_cases.py -k name``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def _environment() -> dict[str, str]:
    """Ours, without what ties a process to this pytest run; with the interpreter where there is no GPU to compile for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    return kept if torch.cuda.is_available() else {**kept, "TRITON_INTERPRET": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "least"), [("not exhaustive", 100), pytest.param("exhaustive", 19, marks=pytest.mark.exhaustive)]
)
def test_every_kernel_agrees_with_its_twin(chosen: str, least: int) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(HERE / "kernel_cases.py"), "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", chosen]
    run = subprocess.run(command, env=_environment(), cwd=HERE.parent, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > least, run.stdout[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-2000:]


@pytest.mark.slow
def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, minisft.kernels, minisft.matmul; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, timeout=120).returncode == 0
