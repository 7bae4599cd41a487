"""The benchmark scripts run to their end and write what the tables need. What they measure is not looked at here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench_step
import exp_peft_full
import exp_preference
import gemm_share
import harness
from harness import add_cell, read_cells

from minisft.kernels import cpu_nf4
from minisft.lora import LoRALinear

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_here(
    program: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The same in this process: starting one with PyTorch costs more than these programs do."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    program()
    return capsys.readouterr().out


def test_a_cell_after_a_half_written_line_is_kept_and_all_others_too(tmp_path: Path) -> None:
    """What a killed run leaves is no cell, and must not swallow the next one; U+2028 is a line break to ``splitlines``."""
    path, cells = tmp_path / "new" / "cells.jsonl", [{"key": "a"}, {"key": "b", "text": "\u2028\n\ud800"}, {"key": "c"}]
    assert read_cells(path) == []
    for cell in cells[:2]:
        add_cell(path, cell)
    with path.open("a") as file:
        file.write('{"key": "killed", "lo')
    assert read_cells(path) == cells[:2]
    add_cell(path, cells[2])
    assert read_cells(path) == cells


def test_the_preference_results_belong_to_the_settings_of_today() -> None:
    """Each published line is found again by its key, or the experiment would run again and mix two settings in one file."""
    lines = (BENCHMARKS / "results" / "preference.jsonl").read_text().splitlines()
    keys = {row["key"]: (row["cell"], row["seed"]) for row in map(json.loads, lines)}
    assert len(keys) == len(lines) >= 9
    assert keys == {exp_preference.key_of(*cell, exp_preference.Sizes()): cell for cell in keys.values()}


def test_a_results_file_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench_x.py", "--out", str(tmp_path / "out"), "--rounds", "5", "a/b"])
    assert harness.provenance()["command"] == "python benchmarks/bench_x.py --out out --rounds 5 a/b"


def test_the_products_of_a_step_are_counted_both_ways_and_narrow_ones_are_not() -> None:
    layer = LoRALinear(torch.nn.Linear(64, 96), rank=4, alpha=8.0)
    x = torch.randn(32, 64, requires_grad=True)
    found = gemm_share.measure(lambda: layer(x).sum().backward(), rounds=2, narrow=4)
    large = 2 * (2 * 32 * 64 * 96)  # x W^T and grad W: the weight is frozen
    thin = 3 * (2 * 32 * 4 * (64 + 96))  # each factor's product forward, and its two backward
    assert found["gflops"] == large / 1e9
    assert found["ceiling"] == pytest.approx(large / (large + thin))
    assert all(share > 0 for share in found["shares"])
    assert len(found["shares"]) == 2


@pytest.mark.exhaustive
@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2_path")
def test_bench_step_times_a_step_its_products_and_its_functions() -> None:
    printed = run("bench_step.py", "--steps", "1", "--rounds", "1")
    assert "'least'" in printed
    assert " GFLOP at " in printed
    assert run("bench_step.py", "--functions").count(" us by PyTorch, ") == 10
    assert "ratio" in run("bench_step.py", "--turns", "1", "--dtype", "bf16-in-fp32")


def test_bench_step_says_that_products_by_tiles_need_tiles(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cpu_nf4, "USE_TILES", False)
    with pytest.raises(SystemExit, match="2"):
        run_here(bench_step.main, monkeypatch, capsys, "--products")
    assert "needs a CPU with AMX" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_bench_nf4_measures_every_case_and_writes_results_and_plot(tmp_path: Path) -> None:
    for oracle in ("bitsandbytes", "peft", "matplotlib"):
        pytest.importorskip(oracle)
    printed = run("bench_nf4.py", "--quick", "--mallocs", "tuned", "--rounds", "2", "--out", str(tmp_path))
    result = json.loads((tmp_path / "nf4_cpu.json").read_text())
    assert (tmp_path / "nf4_cpu.svg").read_text().count("tuned malloc") >= 1
    assert set(result) >= {
        "command",
        "commit",
        "date",
        "cpu",
        "cpu_features",
        "cores",
        "versions",
        "torchao",
        "threads",
        "native",
    }
    peers: dict[str, set[str]] = {}
    for cell in result["cells"]:
        peers.setdefault(cell["group"], set()).add(cell["peer"])
        assert cell["setting"] == "tuned malloc"
        assert cell["ratio"]["n"] == 2
        assert 0 < cell["ratio"]["q1"] <= cell["ratio"]["median"] <= cell["ratio"]["q3"] < math.inf
        assert cell["ours_ms"]["median"] > 0
        assert cell["ours_bytes"] > 0
        assert cell["ours_path"]
        assert cell["ours_error"] is None or cell["ours_error"] <= cell["error_bound"] < 0.01
        assert cell["case"] in printed
    assert {"bitsandbytes"} <= peers["dequantize"] & peers["quantize"]
    assert peers["QLoRA linear, forward + backward"] == {"peft + bitsandbytes"}
    assert peers["decode product"] == {"bitsandbytes", "dense bf16", "dense fp32"}


@pytest.mark.exhaustive
def test_bench_wait_policy_measures_both_policies_alone_and_beside(tmp_path: Path, smollm2_path: Path) -> None:
    printed = run("bench_wait_policy.py", "--quick", "--out", str(tmp_path))
    result = json.loads((tmp_path / "wait_policy.json").read_text())
    cells = {(cell["setting"], cell["policy"]): cell for cell in result["cells"]}
    assert set(cells) == {(s, p) for s in ("alone", "beside") for p in ("default", "passive")}
    for (setting, policy), cell in cells.items():
        assert f"{setting:7} {policy:8}" in printed
        assert cell["busy_processes"] == (setting == "beside")
        assert 0 < cell["tokens_per_s"]["median"] < math.inf


@pytest.mark.exhaustive
def test_bench_preference_steps_both_contestants_through_both_kinds(tmp_path: Path, smollm2_path: Path) -> None:
    """The first losses of DPO, and entropy and length of GRPO's answers, have agreed, or the script would have stopped."""
    pytest.importorskip("trl")
    run("bench_preference.py", "--quick", "--out", str(tmp_path))
    cells = {cell["kind"]: cell for cell in json.loads((tmp_path / "preference_speed.json").read_text())["cells"]}
    assert {kind: set(cell["ratio"]) for kind, cell in cells.items()} == {
        "dpo": {"tokens"},
        "grpo": {"samples", "sampled_tokens"},
    }
    for cell in cells.values():
        assert set(cell["peak_bytes"]) == set(cell["speed"]) == {"minisft", "trl+peft"}
        assert all(0 < ratio["median"] < math.inf for ratio in cell["ratio"].values())


@pytest.mark.slow
def test_exp_judging_simulates_peeking_and_skips_what_needs_data(tmp_path: Path) -> None:
    printed = run("exp_judging.py", "c", "--quick", "--out", str(tmp_path))
    result = json.loads((tmp_path / "judging_c.json").read_text())
    assert result["runs"] == 100
    assert len(result["no_effect"]["fixed, every look"]) == result["looks"] == 20
    assert result["no_effect"]["fixed, every look"][-1] > result["no_effect"]["always valid, tau 0.02"][-1]
    assert "always valid" in printed
    assert (tmp_path / "judging_c.svg").read_text().startswith("<?xml")
    assert "skipped" in run("exp_judging.py", "a", "--data", str(tmp_path))


@pytest.mark.slow
def test_exp_peft_full_goes_on_where_it_stopped_and_draws_from_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two cells on a tiny model of its own; a broken last line of the results is a killed run's."""
    where = ("--out", str(tmp_path), "--root", str(tmp_path / "root"))
    chosen = ("--tiny", "--seeds", "0", "--cells", "P0", *where)
    run("exp_peft_full.py", *chosen)
    file = tmp_path / "peft_full.jsonl"
    lines = file.read_text().splitlines()
    (row,) = map(json.loads, lines)
    assert row["cell"] == "P0/theory/closed forms/0"
    for spectrum in row["gaps"].values():
        assert all(reached >= bound - 1e-9 for reached, bound in zip(spectrum["reached"], spectrum["bound"], strict=True))
    file.write_text(lines[0] + "\n" + lines[0][:100])
    assert run_here(exp_peft_full.main, monkeypatch, capsys, "--list", *chosen).startswith("done  P0/theory")
    assert "claim" in run_here(exp_peft_full.main, monkeypatch, capsys, "--figures", *where)
    assert (tmp_path / "peft_full_p0.svg").is_file()
