"""The search for a learning rate: a planted optimum, edges, divergence, and a grid that was killed and went on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_folder

from minisft.cli.main import main
from minisft.common.errors import ConfigError, UserError
from minisft.training.lr_find import PLOT, REPORT, lr_find
from minisft.training.lr_grid import Cell, check_rates, choose
from minisft.training.runlog import read_metrics
from minisft.training.train import train


def descent(lr: float, curvature: float = 4.0, steps: int = 3) -> Cell:
    """Gradient descent on (h/2) x^2 from 1: after t steps x = (1 - lr h)^t, best at lr = 1/h, divergent beyond 2/h."""
    x = 1.0
    for _ in range(steps):
        x -= lr * curvature * x
    loss = curvature / 2 * x * x
    return Cell(lr, "", "done" if abs(x) <= 1 else "diverged", loss if abs(x) <= 1 else None, steps)


@pytest.mark.parametrize("curvature", [0.5, 4.0, 40.0])
def test_a_planted_optimum_is_found_in_any_order_of_the_grid(curvature: float) -> None:
    best = 1 / curvature
    rates = [best * 3**k for k in (2, -1, 0, 1, -2)]
    choice = choose([descent(lr, curvature) for lr in rates])
    assert choice.lr == best
    assert choice.bracket == (rates[1], rates[3])
    assert choice.resolution == pytest.approx(3)
    assert choice.loss == 0


def test_an_optimum_at_an_edge_is_refused_with_the_side_and_the_next_rate() -> None:
    cases = (((0.01, 0.03, 0.09), "above", "0.27"), ((0.25, 0.3, 0.36), "below", "0.21"))
    for rates, side, more in cases:
        with pytest.raises(UserError) as error:
            choose([descent(lr) for lr in rates])
        assert error.value.code == "numeric/lr-at-edge"
        assert f"extend the grid {side} it: add {more}" in str(error.value)


def test_a_diverged_rate_is_worse_than_every_number() -> None:
    cells = [Cell(1.0, "", "done", 9.0, 1), Cell(2.0, "", "done", 8.0, 1), Cell(3.0, "", "diverged", None, 1)]
    assert choose(cells).lr == 2.0
    with pytest.raises(UserError, match="all-diverged"):
        choose([Cell(lr, "", "diverged", None, 1) for lr in (1.0, 2.0, 3.0)])


@pytest.mark.parametrize(
    ("rates", "share"),
    [((1e-3,), 0.5), ((1e-3, 1e-2), 0.5), ((1e-3, 1e-3, 1e-2), 0.5), ((1e-3, 0.0, 1e-2), 0.5), ((1e-3, -1.0, 1e-2), 0.5),
     ((1e-3, math.nan, 1e-2), 0.5), ((1e-3, 3e-3, 1e-2), 0.0), ((1e-3, 3e-3, 1e-2), 1.5)],
)  # fmt: skip
def test_a_grid_without_an_inside_is_refused(rates: tuple[float, ...], share: float) -> None:
    with pytest.raises(ConfigError):
        check_rates(rates, share)


# ---- real runs -------------------------------------------------------------------------------------------------------

RATES = (1e-2, 3e-2, 1e-1)  # of the tiny model, the middle one is the best


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.write_shop(tmp_path_factory.mktemp("shop"))


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_ends_in_the_same_bytes(shop: Path, tmp_path: Path) -> None:
    run = tiny_folder.run_config(shop, tmp_path / "run", steps=40)
    whole = lr_find(run, RATES, 0.5, tmp_path / "whole")
    assert whole.choice is not None
    assert (whole.choice.lr, whole.steps, whole.total_steps) == (3e-2, 20, 40)
    assert not (tmp_path / "run").exists()
    computed: list[float] = []

    def kill(cell: Cell) -> None:
        computed.append(cell.lr)
        if len(computed) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lr_find(run, RATES, 0.5, tmp_path / "killed", callback=kill)
    folder = tmp_path / "killed"
    (folder / "unfinished").mkdir()  # what a process that was killed within a cell leaves
    (folder / "unfinished" / "config.json").write_text("{}")
    first = next((folder / "cells").iterdir())
    before = first.stat().st_mtime_ns
    lr_find(run, RATES, 0.5, folder)
    assert first.stat().st_mtime_ns == before  # read, not trained again
    for name in (REPORT, PLOT):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["began.json", "cells", REPORT, PLOT]
    # Another rate of the run, where it is written and how often it logs decide nothing.
    calls: list[Cell] = []
    again = tiny_folder.run_config(shop, tmp_path / "other", steps=40, lr=7.0, log_every=3)
    lr_find(again, RATES, 0.5, folder, callback=calls.append)
    assert len(list((folder / "cells").iterdir())) == 3
    assert [cell.loss for cell in calls] == [cell.loss for cell in whole.cells]


@pytest.mark.slow
def test_a_cell_is_the_run_itself_and_a_diverged_one_a_result(shop: Path, tmp_path: Path) -> None:
    run = tiny_folder.run_config(shop, tmp_path / "run", steps=8, lr=3e-2, eval_every=4)
    with pytest.raises(UserError, match="lr-at-edge"):  # 1e-2 is the largest that does not diverge, but not the largest
        lr_find(run, (1e-3, 3e-2, 1e-30), 1.0, tmp_path / "edge")
    report = json.loads((tmp_path / "edge" / REPORT).read_text())
    assert report["lr"] is None
    assert "lr-at-edge" in report["refused"]
    cell = report["cells"][-1]
    train(run, log=tiny_folder.quiet)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert cell["curve"] == [[row["step"], row["eval_loss"]] for row in rows if "eval_loss" in row]
    assert cell["train"] == [[row["step"], row["loss"]] for row in rows]
    found = lr_find(run, (1e-3, 3e-2, 1e38), 1.0, tmp_path / "edge")
    assert [each.status for each in found.cells] == ["done", "done", "diverged"]
    assert found.choice is not None
    assert found.choice.lr == 3e-2
    assert found.cells[-1].loss is None


@pytest.mark.slow
def test_the_command_prints_a_table_and_refuses_runs_without_validation(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    words = [f'model = "{shop / "model"}"', f'data = "{shop / "rows.jsonl"}"', "rank = 2", "batch_size = 4", 'dtype = "fp32"']
    config.write_text("\n".join([*words, "steps = 20", "validation_share = 0.2", f'out = "{tmp_path / "run"}"']))
    rates = [f"{rate:g}" for rate in RATES]
    assert main(["lr-find", "--config", str(config), "--lrs", *rates, "--share", "0.5", "--alpha", "3"]) in (0, 6)
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[1:4]] == ["0.01", "0.03", "0.1"]
    assert "step" not in printed.err  # progress is for terminals
    assert (tmp_path / "run-lr" / REPORT).is_file()
    for more in (["--validation-share", "0"], ["--share", "0.05"], ["--out", str(shop)]):
        assert main(["lr-find", "--config", str(config), "--lrs", *rates, *more]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error[config/")
