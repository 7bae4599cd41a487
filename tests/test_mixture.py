"""Several data files: their names and weights, one numbering, and the rows that each gives to an epoch."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_folder import quiet, rows, run_config, write_shop

from minisft.batching import Share, step_rows
from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import RunConfig
from minisft.config import run_config as config_from
from minisft.data.mixture import read_sources, rows_of_epoch
from minisft.data.sources import Source, parse_sources
from minisft.training.train import train


def write(path: Path, first: int, count: int) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(first + count)[first:]))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path / "a.jsonl", 0, 12), write(tmp_path / "b.jsonl", 12, 4)


# ---- names and weights ----


def test_a_weight_stands_behind_the_last_colon(files: tuple[str, str], tmp_path: Path) -> None:
    a, b = files
    assert parse_sources(a) == (Source(a),)
    assert parse_sources([f"{a}:0.7", f"{b}:3"]) == (Source(a, 0.7), Source(b, 3.0))
    assert parse_sources(r"C:\data\rows.jsonl") == (Source(r"C:\data\rows.jsonl"),)
    assert parse_sources(r"C:\data\rows.jsonl:2") == (Source(r"C:\data\rows.jsonl", 2.0),)
    odd = write(tmp_path / "rows:2", 0, 1)  # a file of this name
    assert parse_sources(odd) == (Source(odd),)
    assert parse_sources(f"{odd}:1") == (Source(odd, 1.0),)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "half", ""])
def test_a_bad_weight_is_one_error(weight: str, files: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="no positive number") as caught:
        parse_sources([f"{files[0]}:{weight}", f"{files[1]}:1"])
    assert caught.value.code == "config/bad-weight"


def test_other_misuse_is_one_error_each(files: tuple[str, str], tmp_path: Path) -> None:
    a, b = files
    (tmp_path / "link.jsonl").symlink_to(a)
    for entries, code in (
        ([f"{a}:1", b], "config/bad-weight"),
        ([a, b, a], "config/file-twice"),
        ([f"{a}:1", f"{tmp_path}/link.jsonl:1"], "config/file-twice"),
        ([], "config/no-data"),
    ):
        with pytest.raises(UserError) as caught:
            parse_sources(entries)
        assert caught.value.code == code


def test_the_command_line_says_it_before_anything_is_loaded(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--data", f"{files[0]}:1", f"{files[1]}:-1"]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error[config/bad-weight] the weight of a data file is no positive number")
    assert not (tmp_path / "out").exists()


def test_settings_take_one_file_or_several() -> None:
    for value, expected in (("a", "a"), (["a"], "a"), (["a", "b"], ("a", "b"))):
        run = config_from({"model": "m", "out": "o", "data": value})
        assert run.data == expected
    assert RunConfig(model="m", out="o", data=("a:1",)).data == "a:1"
    with pytest.raises(UserError, match="wrong type"):
        config_from({"model": "m", "out": "o", "data": 3})
    with pytest.raises(UserError, match="wrong type"):
        config_from({"model": "m", "out": "o", "data": "a", "map": "prompt=q"})


# ---- rows ----


def test_files_without_weights_are_one_after_the_other(files: tuple[str, str], tmp_path: Path) -> None:
    a, b = files
    Path(b).write_text(Path(b).read_text() + Path(a).read_text().splitlines()[2] + "\n")  # row 3 of the first again
    both, known = read_sources(parse_sources([a, b]))
    assert [example.row for example in both.examples] == [*range(1, 13), *range(13, 17)]
    assert [file.last for file in known] == [12, 17]
    assert both.counts["duplicates"] == 1
    assert both.examples[12].where == f"{b}:1"
    weighted, _ = read_sources(parse_sources([f"{a}:1", f"{b}:1"]))
    assert len(weighted.examples) == 17  # with weights each file is a source of its own


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 10)), min_size=2, max_size=4))
def test_the_rows_of_an_epoch_add_up(parts: list[tuple[int, float]]) -> None:
    sources = [Source(str(i), weight) for i, (_, weight) in enumerate(parts)]
    there = [count for count, _ in parts]
    total, sum_of_weights = sum(there), sum(weight for _, weight in parts)
    if min(weight for _, weight in parts) / sum_of_weights * total < 1:  # such a share may be rounded to no row
        return
    drawn = rows_of_epoch(sources, there)
    assert sum(drawn) == total
    for number, source in zip(drawn, sources, strict=True):
        assert abs(number - total * source.weight / sum_of_weights) < 1


def test_a_share_of_no_row_and_a_file_without_rows_are_refused() -> None:
    for weights, there, code in (((1.0, 99.0), (5, 5), "config/bad-weight"), ((1.0, 1.0), (5, 0), "data/no-rows")):
        with pytest.raises(UserError) as caught:
            rows_of_epoch([Source(str(i), weight) for i, weight in enumerate(weights)], there)
        assert caught.value.code == code


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.integers(1, 7))
def test_a_mixture_passes_over_each_file_evenly(first: int, second: int, seed: int, batch: int) -> None:
    total = first + second
    shares = (Share(0, first, total - 1), Share(first, second, 1)) if total > 1 else ()
    epochs = 6
    steps = range(1, -(-epochs * total // batch) + 1)
    series = list(itertools.chain.from_iterable(step_rows(step, batch, total, seed, shares) for step in steps))
    series = series[: epochs * total]
    for epoch in range(epochs):
        part = series[epoch * total : (epoch + 1) * total]
        assert sum(row < first for row in part) == total - 1
    for rows_of_file in (range(first), range(first, total)):
        seen = Counter(row for row in series if row in rows_of_file)
        assert set(seen) <= set(rows_of_file)
        assert max(seen.values()) - min(seen.get(row, 0) for row in rows_of_file) <= 1


@pytest.mark.slow
def test_a_mixture_is_trained_reported_and_resumed(tmp_path: Path) -> None:
    shop = write_shop(tmp_path)
    a, b = write(tmp_path / "a.jsonl", 0, 12), write(tmp_path / "b.jsonl", 12, 4)
    said: list[str] = []
    settings = {"data": (f"{a}:1", f"{b}:3"), "steps": 4, "batch_size": 4, "save_every": 1, "validation_share": 0.0}
    run = run_config(shop, tmp_path / "mixed", **settings)
    result = train(run, log=said.append)
    assert f"{a}: 12 rows to train on; 4 rows of an epoch (25.0%), 0.33 passes" in said
    assert f"{b}: 4 rows to train on; 12 rows of an epoch (75.0%), 3.00 passes" in said
    facts = json.loads((result.out / "data.json").read_text())["files"]["files"]
    assert [(f["path"], f["rows"], f["weight"], f["rows_in_an_epoch"]) for f in facts] == [(a, 12, 1.0, 4), (b, 4, 3.0, 12)]
    more = run_config(shop, tmp_path / "mixed", **settings | {"data": (f"{a}:2", f"{b}:6"), "steps": 5})  # the same shares
    assert train(more, resume=True, log=quiet).steps == 5
    other = run_config(shop, tmp_path / "mixed", **settings | {"data": (f"{a}:1", f"{b}:1"), "steps": 6})
    with pytest.raises(UserError) as caught:
        train(other, resume=True, log=quiet)
    assert caught.value.code == "checkpoint/changed"
    assert "mixture" in str(caught.value)
