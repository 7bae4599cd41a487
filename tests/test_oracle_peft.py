"""``make oracle-peft``: a law that PEFT keeps is reported as kept, one that it breaks as broken, by how much."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
import oracle_peft


def test_every_test_that_it_names_exists() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in oracle_peft.EQUIVALENCE.glob("test_*.py")]
    tests = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert oracle_peft.LAWS.keys() | oracle_peft.BESIDE.keys() <= tests


@pytest.mark.exhaustive
def test_it_tells_kept_from_broken() -> None:
    asked = [
        "test_delta_is_linear_in_alpha",
        "test_on_gaussian_data_they_agree_within_four_times_the_expected",
        "test_an_adapter_combined_alone_is_itself",
    ]
    command = [sys.executable, Path(__file__).with_name("oracle_peft.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "kept    the update is linear in alpha" in lines
    assert any(
        line.startswith("BROKEN  on Gaussian data") and line.endswith("(4 failed, 4 passed)") for line in lines
    )  # the dense bases
    assert any("failed: nf4: merged: " in line and line.endswith("times what rounding allows") for line in lines)
    assert lines[-1].startswith("BROKEN  one adapter combined alone")
