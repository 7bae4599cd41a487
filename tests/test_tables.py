"""Rows from CSV, TSV, Parquet and compressed JSON lines: the same rows in every form, and each broken file's one error."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.data.messages import read_dataset

ROWS = [
    {"prompt": 'Say, please:\n"hello"', "completion": "hello\tthere, you"},
    {"prompt": "Größe?", "completion": "drei"},
    {"prompt": "  spaces  ", "completion": "42"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def as_lines(path: Path) -> None:
    path.write_bytes(LINES)


def as_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES, mtime=0))


def as_table(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def as_zstd(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(LINES)


def as_parquet(path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), str(path))


FORMS: dict[str, Callable[[Path], None]] = {
    "rows.jsonl.gz": as_gzip, "rows.jsonl": as_gzip, "rows.csv": as_table, "rows.tsv": as_table, "rows.jsonl.zst": as_zstd,
    "rows.parquet": as_parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    plain = tmp_path / "plain.jsonl"
    as_lines(plain)
    FORMS[name](tmp_path / name)
    dataset, expected = read_dataset(tmp_path / name), read_dataset(plain)
    assert [example.messages for example in dataset.examples] == [example.messages for example in expected.examples]
    assert [example.row for example in dataset.examples] == [1, 2, 3]
    assert len(dataset.sha256) == 64


@pytest.mark.parametrize("name", FORMS)
def test_select_writes_lines_of_json_from_every_form(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name)
    out = tmp_path / "out" / "picked.jsonl"
    assert main(["select", "--data", str(tmp_path / name), "--out", str(out), "--rows", "3"]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == ROWS
    if name.startswith("rows.jsonl"):
        assert out.read_bytes() == LINES


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("a.csv", b"prompt,completion\na,b\nc\n", "data/csv-cells", "a.csv:3"),
        ("a.csv", b"prompt,completion\na,b,c\n", "data/csv-cells", "3 cells"),
        ("a.csv", b"prompt,prompt\na,b\n", "data/csv-header", "prompt twice"),
        ("a.csv", b"prompt,\na,b\n", "data/csv-header", "without a name"),
        ("a.csv", b'prompt,completion\na,"b\n', "data/bad-csv", "a.csv:2"),
        ("a.csv", b"prompt,completion\na,\xff\n", "data/bad-utf8", "a.csv"),
        ("a.csv", b"question,answer\na,b\n", "data/unknown-form", "question, answer"),
        ("a.csv", b"", "data/no-rows", "empty"),
        ("a.csv", b"prompt,completion\n", "data/no-rows", "empty"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "data/unreadable", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": }', mtime=0), "data/bad-json", "a.jsonl.gz:1"),
        ("a.parquet", b"PAR1 and nothing more", "data/bad-parquet", "a.parquet"),
    ],
)  # fmt: skip
def test_a_broken_file_has_one_error(tmp_path: Path, name: str, content: bytes, code: str, said: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_dataset(tmp_path / name)
    assert caught.value.code == code
    assert said in str(caught.value)


def test_a_parquet_cell_that_json_has_no_form_for(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for value in (datetime.date(2024, 1, 1), b"bytes", float("nan")):
        table = pyarrow.Table.from_pylist([{**ROWS[0], "extra": value}])
        pyarrow.parquet.write_table(table, str(tmp_path / "a.parquet"))
        with pytest.raises(UserError, match=r"data/bad-value.*row 1.*extra"):
            read_dataset(tmp_path / "a.parquet")


def test_typed_cells_of_parquet_stay_typed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "quality": 2.5, "n": 3}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), str(tmp_path / "a.parquet"))
    (example,) = read_dataset(tmp_path / "a.parquet").examples
    assert example.reference == {"quality": 2.5, "n": 3}
    assert [m.content for m in example.messages] == ["a", "b"]


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.parquet").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"data/needs-pyarrow.*minisft\[data\]"):
        read_dataset(tmp_path / "a.parquet")
