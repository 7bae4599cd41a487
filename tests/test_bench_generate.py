"""The benchmark of decoding: who takes part, what is counted, its verdicts, and one run from end to end.

What it measures is not looked at here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from minisft.config import ModelConfig
from minisft.surgery import adapters_off

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_generate  # noqa: E402
import decode_adapter  # noqa: E402
from decode_contestants import (  # noqa: E402
    BEFORE,
    COMPRESSED,
    FAST,
    FP32,
    HALF,
    LLAMA_CPP,
    MINISFT,
    READABLE,
    TRANSFORMERS,
    Contestant,
    contestants_of,
)


def answers(*steps: float) -> list[dict]:
    """A turn for each step; CPU time is half of wall time."""
    parts = {"native_s": 0.0, "peak_bytes": 7}
    return [{**parts, "step_s": s, "cpu_step_s": s / 2, "seconds": 9 * s, "cpu_seconds": 9 * s / 2} for s in steps]


def cell(weights: str, streams: int, **steps: float) -> dict:
    """As ``compete`` makes one, of contestants by name and their steps, on a machine that reads 10 bytes a second."""
    found = {name.replace("_", " "): answers(step) for name, step in steps.items()}
    who = {
        "before": BEFORE,
        "llama": LLAMA_CPP,
        "half": HALF,
        "fp32": FP32,
        "fast": FAST,
        "compressed": COMPRESSED,
    }
    found = {who.get(name, name): mine for name, mine in found.items()}
    reads = [{"wall": 10.0, "cpu": 20.0}]
    for mine in found.get(LLAMA_CPP, []):
        mine["own_step_s"] = 1.0
    rows = [bench_generate.row(Contestant(name, name, weights), found, reads, 70, streams) for name in found]
    return {"weights": weights, "streams": streams, "contestants": rows}


def adapter_cell(weights: str, compressed: bool, *steps: float) -> dict:
    """As ``adapter_costs`` makes one, of one process and one turn: seconds beside, off and merged."""
    times = {
        kind: {clock: [s] for clock in ("wall", "cpu")} for kind, s in zip(("beside", "off", "merged"), steps, strict=True)
    }
    return {"weights": weights, "compressed": compressed, **bench_generate.adapter_row([times])}


def test_an_adapter_costs_the_median_of_its_turns_in_each_process() -> None:
    def times(beside: list[float], off: list[float], merged: list[float]) -> dict:
        return {k: {"wall": v, "cpu": [x / 2 for x in v]} for k, v in {"beside": beside, "off": off, "merged": merged}.items()}

    row = bench_generate.adapter_row([times([2, 4, 9], [1, 4, 3], [8, 8, 9]), times([3, 3, 3], [1, 2, 3], [3, 3, 3])])
    assert (row["over_off"]["wall"]["median"], row["over_off"]["wall"]["n"]) == (1.75, 2)  # of 2 (2, 1, 3) and 1.5 (3, 1.5, 1)
    assert row["over_merged"]["cpu"]["median"] == 0.75  # of 0.5 (0.25, 0.5, 1) and 1
    assert row["step_ms"]["beside"]["cpu"]["median"] == 1750  # of 2 and 1.5 seconds


def test_steps_with_an_adapter_and_without_take_their_turns() -> None:
    model = tiny.build(ModelConfig("llama", 64, 32, 64, 1, 2, 1, 16), torch.float32).eval()
    base = decode_adapter.step_of(model, [5, 6, 7])()
    num_bytes = decode_adapter.adapt_(model)
    steps = {"beside": decode_adapter.step_of(model, [5, 6, 7])}
    with adapters_off(model):
        steps["off"] = decode_adapter.step_of(model, [5, 6, 7])
    steps["merged"] = decode_adapter.step_of(decode_adapter.merged(model, False), [5, 6, 7])
    for _ in range(2):  # each is the same step again
        decode_adapter.check(base, {name: step() for name, step in steps.items()})
    assert num_bytes == 4 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    for wrong, reason in (("off", "changes the logits"), ("merged", "merging is")):
        logits = {name: step() for name, step in steps.items()}
        logits[wrong] = logits["beside" if wrong == "off" else "off"]
        with pytest.raises(AssertionError, match=reason):
            decode_adapter.check(base, logits)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_and_the_base_exchange_their_memory(tied: bool) -> None:
    config = ModelConfig("llama", 64, 32, 64, 1, 2, 1, 16, tie_word_embeddings=tied)
    model = tiny.build(config, torch.float32).eval()
    decode_adapter.adapt_(model)
    merged = decode_adapter.merged(model, False)
    logits = [decode_adapter.step_of(each, [5, 6, 7])() for each in (model, merged)]

    def memory() -> tuple[list[int], list[int]]:
        own = {name.replace(".base.", "."): weight.data_ptr() for name, weight in model.named_parameters()}
        theirs = {name: weight.data_ptr() for name, weight in merged.named_parameters()}
        return [own[name] for name in theirs], list(theirs.values())

    before = memory()
    decode_adapter.exchange_memory(model, merged)
    assert memory() == before[::-1]
    for each, same in zip((model, merged), logits, strict=True):
        assert torch.equal(decode_adapter.step_of(each, [5, 6, 7])(), same)


def test_who_takes_part_where() -> None:
    cells = [(weights, streams) for weights in ("fp32", "bf16", "nf4", "file") for streams in (1, 8)]
    names = {at: [c.name for c in contestants_of(*at, True, False)] for at in cells}
    assert names == {
        ("fp32", 1): [TRANSFORMERS, READABLE, MINISFT, LLAMA_CPP, COMPRESSED, FAST],
        ("fp32", 8): [TRANSFORMERS, MINISFT, LLAMA_CPP, COMPRESSED, FAST],
        ("bf16", 1): [TRANSFORMERS, READABLE, MINISFT, LLAMA_CPP, COMPRESSED, FAST],
        ("bf16", 8): [TRANSFORMERS, MINISFT, LLAMA_CPP, COMPRESSED, FAST],
        ("nf4", 1): [READABLE, MINISFT, LLAMA_CPP, COMPRESSED, FAST, HALF, FP32],
        ("nf4", 8): [MINISFT, LLAMA_CPP, COMPRESSED, FAST, HALF],
        ("file", 1): [TRANSFORMERS, READABLE, MINISFT, LLAMA_CPP, COMPRESSED],
        ("file", 8): [TRANSFORMERS, MINISFT, LLAMA_CPP, COMPRESSED],
    }
    assert LLAMA_CPP not in [c.name for c in contestants_of("nf4", 1, False, False)]
    with_before = [at for at in cells if BEFORE in [c.name for c in contestants_of(*at, False, True)]]
    assert with_before == [("fp32", 1), ("bf16", 1), ("nf4", 1)]


def test_without_the_wheel_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not bench_generate.has_llama_cpp()
    assert capsys.readouterr().err == "  llama.cpp is left out: pip install 'minisft[llamacpp]' (Linux)\n"


def test_tokens_are_compared_up_to_the_first_difference_or_our_end_token() -> None:
    mine, other = [5, 6, 7, 2, 8], [5, 6, 9, 2, 8]
    tokens = {MINISFT: [mine, mine], LLAMA_CPP: [other, mine]}
    found = bench_generate.agreement(tokens, {2})
    assert found[MINISFT] == {"same_tokens": [3, 3], "of": [3, 3]}
    assert found[LLAMA_CPP] == {"same_tokens": [2, 3], "of": [3, 3]}
    assert bench_generate.agreement(tokens, set())[LLAMA_CPP] == {"same_tokens": [2, 5], "of": [5, 5]}


def test_a_row_pairs_turns_and_holds_the_step_to_reading_its_weights() -> None:
    found = {MINISFT: answers(10.0, 20.0, 40.0), TRANSFORMERS: answers(40.0, 40.0, 40.0)}
    reads = [{"wall": speed, "cpu": speed} for speed in (10.0, 10.0, 5.0)]
    row = bench_generate.row(Contestant(TRANSFORMERS, TRANSFORMERS, "fp32"), found, reads, 200, 8)
    assert row["ratio"]["wall"]["median"] == 2.0  # of 4, 2, 1
    assert row["ratio"] == {"wall": row["ratio"]["wall"], "cpu": row["ratio"]["wall"]}
    assert row["step_ms"]["cpu"]["median"] == 20_000
    assert row["tokens_per_s"]["wall"]["median"] == 8 / 40
    assert row["memory_share"]["wall"]["q3"] == 0.75  # of 0.5, 0.5, 1
    assert row["memory_share"]["cpu"]["median"] == 1.0
    assert row["seconds"]["cpu"] == [180.0] * 3
    assert row["peak_bytes"] == 7


def test_targets_are_met_or_missed_by_the_numbers() -> None:
    found = [
        cell(
            "fp32",
            1,
            transformers=31.0,
            readable=20.0,
            before=31.0,
            minisft=10.0,
            compressed=5.0,
            llama=8.0,
        ),
        cell("nf4", 1, readable=20.0, minisft=4.0, llama=3.7, half=3.0, fast=2.0, fp32=9.0),
        cell("nf4", 8, minisft=4.0, compressed=2.0, llama=3.7),
        cell("fp32", 8, transformers=30.0, minisft=10.0, llama=8.0),
        cell("file", 1, transformers=31.0, readable=20.0, minisft=20.0, compressed=5.0, llama=4.0),
        cell("file", 8, transformers=31.0, minisft=20.0, compressed=11.0, llama=11.0),
    ]
    adapters = [adapter_cell("fp32", False, 10.6, 10.0, 12.0), adapter_cell("fp32", True, 4.5, 4.5, 3.0)]
    adapters.append(adapter_cell("nf4", False, 3.0, 2.0, 9.0))
    verdicts = {v["target"]: (v["value"]["median"], v["met"]) for v in bench_generate.targets(found, adapters, "wall")}
    assert verdicts == {
        "fp32, one stream: share of what reading the weights allows": (0.7, True),
        "fp32, one stream: times as fast as readable": (2.0, False),
        "fp32, compressed, one stream: times as fast as readable": (4.0, True),
        "fp32, one stream: times as fast as minisft, before": (3.1, True),
        "fp32, compressed, one stream: times as fast as minisft, before": (6.2, True),
        "fp32, one stream: times as fast as transformers": (3.1, True),
        "fp32, compressed, one stream: times as fast as transformers": (6.2, True),
        "nf4, one stream: times as fast as llama.cpp": (0.925, True),
        "nf4, rest bf16, one stream: times as fast as llama.cpp": (3.7 / 3.0, True),
        "nf4, one stream: times as fast as minisft, fp32": (2.25, False),
        "nf4, rest bf16, one stream: times as fast as minisft, fp32": (3.0, True),
        "nf4, fast decode, one stream: times as fast as llama.cpp": (3.7 / 2.0, True),
        "nf4, fast decode, one stream: times as fast as minisft, fp32": (4.5, True),
        "nf4, eight streams: times as fast as llama.cpp": (0.925, False),
        "nf4, compressed, eight streams: times as fast as llama.cpp": (1.85, True),
        "fp32, eight streams: times as fast as transformers": (3.0, True),
        "file, compressed, one stream: times as fast as readable": (4.0, True),
        "file, compressed, one stream: times as fast as transformers": (6.2, True),
        "file, compressed, one stream: times as fast as llama.cpp": (0.8, False),
        "file, compressed, eight streams: times as fast as transformers": (31 / 11, False),
        "file, compressed, eight streams: times as fast as llama.cpp": (1.0, True),
        "fp32, one stream: an adapter over merged": (10.6 / 12.0, True),
        "fp32, one stream: an adapter over off": (1.06, False),
        "fp32, compressed, one stream: an adapter over merged": (1.5, False),
        "fp32, compressed, one stream: an adapter over off": (1.0, True),
        "nf4, one stream: an adapter over off": (1.5, False),  # merged, it reads dense weights
    }
    without = [cell("nf4", 1, readable=20.0, minisft=4.0, fp32=9.0)]
    assert not [v for v in bench_generate.targets(without, [], "cpu") if "llama" in v["target"]]


def test_the_table_has_a_row_a_contestant_and_a_line_a_target() -> None:
    found = [cell("fp32", 1, transformers=30.0, minisft=10.0), cell("fp32", 8, transformers=45.0, minisft=10.0)]
    adapters = [adapter_cell("fp32", True, 0.3, 0.2, 0.1) | {"weight_bytes": 203e6, "adapter_bytes": 19.53e6}]
    result = {"clock": "cpu", "decoding": found, "adapters": adapters, "targets": bench_generate.targets(found, [], "cpu")}
    lines = list(bench_generate.table(result))
    values = "300.0, 200.0, 100.0 | 1.500 (1.500 to 1.500) | 3.000 (3.000 to 3.000)"
    assert f"| fp32, compressed | 203, 19.5 | {values} |" in lines
    assert lines[2:7] == [
        "| fp32, one | transformers | 0 | 15000.0 (15000.0 to 15000.0) | 0.1 | 3.00 (3.00 to 3.00) | 0.23 | 0.00 |",
        "|  | **minisft** | 0 | 5000.0 (5000.0 to 5000.0) | 0.2 |  | **0.70** | 0.00 |",
        "| fp32, eight | transformers | 0 | 22500.0 (22500.0 to 22500.0) | 0.4 | 4.50 (4.50 to 4.50) |  | 0.00 |",
        "|  | **minisft** | 0 | 5000.0 (5000.0 to 5000.0) | 1.6 |  |  | 0.00 |",
        "",
    ]
    assert lines[-1] == "- fp32, eight streams: times as fast as transformers: 4.50 (4.50 to 4.50); 3.0 or more"


@pytest.mark.parametrize("option", ["--table", "--adapters"])
def test_without_results_one_line_says_where_they_were_looked_for(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", option, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no generate\.json"):
        bench_generate.main()


def test_reading_is_timed_by_both_clocks() -> None:
    found = bench_generate.read_bytes_per_s(torch.ones(2**20))
    assert set(found) == {"wall", "cpu"}
    assert all(1e6 < speed < 1e13 for speed in found.values())


def test_weights_of_a_gguf_file_are_counted_without_a_table_that_is_not_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from minisft.formats import gguf_header
    from minisft.formats.gguf_header import GGUF, TensorInfo

    tensors = {name: TensorInfo("F32", (1,), 0, size) for name, size in (("token_embd.weight", 100), ("blk.0.x", 20))}
    for more, expected in (({}, 120), ({"output.weight": TensorInfo("F32", (1,), 0, 3)}, 23)):
        header = GGUF(tmp_path, {}, tensors | more)
        monkeypatch.setattr(gguf_header, "read_gguf", lambda _, header=header: header)
        assert bench_generate.gguf_bytes(tmp_path) == expected


@pytest.mark.exhaustive
@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2_path")
def test_the_benchmark_runs_to_its_end_and_writes_results_and_plot(tmp_path: Path) -> None:
    script = [sys.executable, "-W", "ignore", str(BENCHMARKS / "bench_generate.py"), "--quick", "--weights", "nf4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*script, "--out", str(tmp_path)], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "generate.json").read_text())
    llama_cpp = importlib.util.find_spec("xllamacpp") is not None
    assert (result["clock"], result["threads"], result["new_tokens"]) == ("cpu", 1, 4)
    assert bool(result["versions"]["xllamacpp"]) == llama_cpp
    for cell in result["decoding"]:
        rows = {row["name"]: row for row in cell["contestants"]}
        assert list(rows) == [c.name for c in contestants_of("nf4", cell["streams"], llama_cpp, False)]
        assert rows[MINISFT]["same_tokens"] == rows[MINISFT]["of"] != []
        assert rows[MINISFT]["weight_bytes"] > rows[HALF]["weight_bytes"] > rows[COMPRESSED]["weight_bytes"] > 90e6
        less = rows[MINISFT]["weight_bytes"] - rows[COMPRESSED]["weight_bytes"]
        assert 2.3 * 49152 * 576 < less < 2.5 * 49152 * 576  # the head alone is dense
        assert all(len(row["same_tokens"]) == cell["streams"] for row in rows.values())
        assert all(0 < row["seconds"][clock][0] < math.inf for row in rows.values() for clock in ("wall", "cpu"))
        assert all(row["peak_bytes"] > row["weight_bytes"] for row in rows.values())
        if llama_cpp:
            assert rows[LLAMA_CPP]["own_step_ms"]["median"] > 0
            assert rows[LLAMA_CPP]["same_tokens"] != []
    assert [cell["streams"] for cell in result["decoding"]] == [1, 8]
    assert (tmp_path / "generate.svg").read_text().startswith("<?xml")
    adapted = [cell["compressed"] for cell in result["adapters"]]
    assert adapted == [False]
    assert all(cell["weight_bytes"] > 5 * cell["adapter_bytes"] for cell in result["adapters"])
    assert "wanted 1.05 or less" in done.stdout
