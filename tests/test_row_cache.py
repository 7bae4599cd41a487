"""Encoded rows from the cache are the rows that would have been encoded, and only those; a broken cache is no cache."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from texts import byte_tokenizer
from tiny_folder import write_rows

from minisft.config import RunConfig
from minisft.training import row_cache, run_data
from minisft.training.run_data import RunData, prepare_data

Prepare = Callable[..., tuple[RunData, list[str]]]
NOON = datetime.datetime(2025, 3, 1, 12)
DATED = "{{ strftime_now('%d %b %Y') }}" + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepares a run's rows; (rows, what was said)."""
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_cache, "MIN_BYTES", 0)
    write_rows(tmp_path / "rows.jsonl", 30)
    write_rows(tmp_path / "other.jsonl", 31)

    def prepared(now: datetime.datetime = NOON, **changes: object) -> tuple[RunData, list[str]]:
        settings = {"model": "m", "out": "o", "data": str(tmp_path / "rows.jsonl"), "template": "chatml", "max_length": 64}
        said: list[str] = []
        _, data = prepare_data(RunConfig(**settings | changes), byte_tokenizer(), said.append, now)
        return data, said

    return prepared


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "rows").iterdir())


def encoded_anew(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Filled once for each time that rows are encoded."""
    calls: list[object] = []
    real = run_data.encode_dataset

    def counted(*arguments: object, **named: object) -> object:
        calls.append(named["path"])
        return real(*arguments, **named)

    monkeypatch.setattr(run_data, "encode_dataset", counted)
    return calls


def same(a: RunData, b: RunData) -> bool:
    return (list(a.train), list(a.validation), a.identity, a.facts, a.shares) == (
        list(b.train), list(b.validation), b.identity, b.facts, b.shares,
    )  # fmt: skip


def test_the_second_time_nothing_is_read_and_all_is_the_same(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, plain_notes = prepare(cache=False)
    assert not (tmp_path / "cache").exists()
    calls = encoded_anew(monkeypatch)
    fresh, fresh_notes = prepare()
    assert len(calls) == 2  # rows to train on, and those held out
    again, again_notes = prepare()
    assert len(calls) == 2
    assert same(plain, fresh)
    assert same(plain, again)
    assert again_notes[0] == f"encoded rows: taken from {entries(tmp_path)[0]}"
    assert plain_notes == fresh_notes[1:] == again_notes[1:]
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    moved, _ = prepare(data=str(tmp_path / "moved.jsonl"))
    assert len(calls) == 2
    assert moved.facts["train"] == plain.facts["train"] | {"path": str(tmp_path / "moved.jsonl")}


@pytest.mark.parametrize(
    "change",
    [
        {"data": "other.jsonl"}, {"eval_data": "other.jsonl"}, {"max_length": 32}, {"turns": "last"}, {"seed": 1},
        {"validation_share": 0.5}, {"template": "plain"}, {"allow_control_tokens": True}, {"strict": True},
        {"data": ("rows.jsonl:1", "other.jsonl:2")},
    ],
)  # fmt: skip
def test_whatever_decides_the_rows_makes_another_entry(change: dict, prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    for name in change.keys() & {"data", "eval_data"}:
        value = change[name]
        change[name] = str(tmp_path / value) if isinstance(value, str) else tuple(str(tmp_path / entry) for entry in value)
    changed, _ = prepare(**change)
    assert len(entries(tmp_path)) == 2
    assert same(changed, prepare(**change)[0])
    assert same(changed, prepare(**change, cache=False)[0])


def test_what_decides_nothing_finds_the_same_entry(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    prepare(out="elsewhere", lr=1.0, batch_size=2, steps=9)
    assert len(entries(tmp_path)) == 1


@pytest.mark.slow
def test_another_day_is_another_text_only_where_the_template_writes_it(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    dated = str(tmp_path / "dated.jinja")
    evening, tomorrow = NOON.replace(hour=20), NOON.replace(day=2)
    calls = encoded_anew(monkeypatch)
    today = prepare(NOON, template=dated)[0]
    assert list(prepare(evening, template=dated)[0].train) == list(today.train)
    assert len(calls) == 2
    after = prepare(tomorrow, template=dated)[0]
    assert list(after.train) != list(today.train)
    assert same(after, prepare(tomorrow, template=dated, cache=False)[0])
    assert len(entries(tmp_path)) == 1  # the day before is replaced
    prepare(NOON)
    assert prepare(tomorrow)[1][0].startswith("encoded rows: taken from")


@pytest.mark.parametrize("name", ["train.tokens", "validation.facts", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_broken_entry_is_made_again(name: str, how: str, prepare: Prepare, tmp_path: Path) -> None:
    whole, _ = prepare()
    path = entries(tmp_path)[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if how != "gone":
        path.write_bytes(content if how == "flipped" else content[:-4])
    again, said = prepare()
    assert same(whole, again)
    assert said[0].startswith(f"the rows kept in {entries(tmp_path)[0]} are broken (")
    assert said[0].endswith("): they are encoded again")
    assert prepare()[1][0].startswith("encoded rows: taken from")


def test_a_folder_that_cannot_be_used_costs_nothing_but_time(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = prepare(cache=False)
    monkeypatch.setenv("MINISFT_CACHE", "/dev/null/cache")
    data, said = prepare()
    assert same(plain, data)
    assert said[0].startswith("the encoded rows are not kept for the next run: ")
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_cache, "_write", full)
    data, said = prepare()
    assert same(plain, data)
    assert "the encoded rows are not kept for the next run: [Errno 28] No space left on device" in said
    assert entries(tmp_path) == []


def test_the_oldest_entries_go(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "MAX_ENTRIES", 2)
    for seed in range(4):
        prepare(seed=seed)
    assert len(entries(tmp_path)) == 2
    assert prepare(seed=3)[1][0].startswith("encoded rows: taken from")


def test_small_data_is_not_kept(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "MIN_BYTES", 1 << 20)
    prepare()
    assert not (tmp_path / "cache").exists()
