"""Replay: exact counts in every stretch of a run, each stream once an epoch, plain text, refusals, and resuming."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_folder import digest, losses, quiet, rows, run_config, stopped_copy, write_shop

from minisft.batching import Batch, Share, step_rows
from minisft.common.errors import UserError
from minisft.config import RunConfig
from minisft.training.preference_config import DPOConfig
from minisft.training.replay import mixed_rows, num_replayed, steps_of_epochs
from minisft.training.sft import SFTTrainer
from minisft.training.train import train

TEXTS = ["The quick brown fox. " * 9, "A short one.", "Ends with <|im_end|> as text."]


@given(
    batch=st.integers(1, 9), own=st.integers(1, 40), other=st.integers(1, 40), seed=st.integers(0, 99),
    share=st.fractions(Fraction(1, 50), Fraction(49, 50), max_denominator=50), steps=st.integers(1, 30),
)  # fmt: skip
def test_counts_are_exact_and_each_stream_goes_on_where_it_was(
    batch: int, own: int, other: int, seed: int, share: Fraction, steps: int
) -> None:
    taken: dict[bool, list[int]] = {False: [], True: []}
    for step in range(1, steps + 1):
        mixed = mixed_rows(step, batch, own, other, share, seed)
        assert len(mixed) == batch
        for is_replayed, i in mixed:
            taken[is_replayed].append(i)
        assert len(taken[True]) == (step * batch * share.numerator) // share.denominator
    for stream, size in ((taken[False], own), (taken[True], other)):
        for start in range(0, len(stream) - size + 1, size):  # whole epochs
            assert sorted(stream[start : start + size]) == list(range(size))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99), st.integers(1, 20))
def test_the_run_s_own_rows_come_in_the_order_that_they_have_without_replay(batch: int, n: int, seed: int, steps: int) -> None:
    own = [i for s in range(1, steps + 1) for replayed, i in mixed_rows(s, batch, n, 7, Fraction(1, 3), seed) if not replayed]
    alone = [i for s in range(1, steps + 1) for i in step_rows(s, batch, n, seed)]
    assert own == alone[: len(own)]


@given(st.integers(1, 9), st.integers(2, 9), st.integers(1, 9), st.integers(0, 99), st.integers(1, 20))
def test_a_mixture_s_rows_come_in_the_order_that_they_have_without_replay(
    batch: int, first: int, second: int, seed: int, steps: int
) -> None:
    n, numbers, shares = first + second, range(1, steps + 1), (Share(0, first, 1), Share(first, second, first + second - 1))
    mixed = [pair for s in numbers for pair in mixed_rows(s, batch, n, 7, Fraction(1, 3), seed, shares)]
    own = [i for replayed, i in mixed if not replayed]
    assert own == [i for s in numbers for i in step_rows(s, batch, n, seed, shares)][: len(own)]
    for start in range(0, len(own) - n + 1, n):  # whole epochs
        assert sum(i < first for i in own[start : start + n]) == 1


@given(st.floats(0.01, 5), st.integers(1, 60), st.integers(1, 9), st.fractions(0, Fraction(9, 10), max_denominator=20))
@example(1.0, 1, 1, Fraction(1, 2))  # two steps once, of which the first had the only row
def test_epochs_count_the_run_s_own_rows(epochs: float, n: int, batch: int, share: Fraction) -> None:
    steps = steps_of_epochs(epochs, n, batch, share)
    own = [s * batch - num_replayed(s, batch, share) for s in (steps - 1, steps)]
    assert own[1] >= epochs * n
    assert steps == 1 or own[0] < epochs * n


# ---- refused ----


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replay_share": 0.1}, "--replay-share; found 0.1; expected --replay F with it; fix: name the file"),
        ({"replay": "f", "replay_share": 0.0}, "--replay-share; found 0.0; expected a share in (0, 1); fix: 0.05 to 0.2"),
        ({"replay": "f", "replay_share": 1.0}, "--replay-share; found 1.0; expected a share in (0, 1)"),
        ({"replay": "f", "replay_share": float("nan")}, "--replay-share; found nan; expected a share in (0, 1)"),
    ],
)
def test_bad_shares_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig("m", "d", "o", **values)
    assert said in str(caught.value)


def test_dpo_has_no_use_for_it() -> None:
    with pytest.raises(UserError, match=r"--replay; found f; expected nothing: dpo has no use for it"):
        DPOConfig("m", "d", "o", replay="f")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    write_shop(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS))
    chats = [{"prompt": f"old {i}", "completion": f"answer {i}"} for i in range(5)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return tmp_path


def replayed(shop: Path, name: str = "run", file: str = "texts.jsonl", **changes: object) -> RunConfig:
    settings = {"replay": str(shop / file), "replay_share": 0.3, "steps": 4, "save_every": 2, "eval_every": 4, "lr": 1e-3}
    return run_config(shop, shop / name, **{**settings, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        (None, {}, "error[data/"),
        ("", {}, "error[data/no-rows]"),
        ('{"text": "a"}\n{"text": 3}\n', {}, "error[data/no-text] a row to replay has no text"),
        ('{"title": "a"}\n', {}, "error[data/unknown-form]"),
        ('{"text": "abc"}\n', {"replay_share": 0.01}, "error[config/no-replay] the share is too small for a single row"),
        ("".join(json.dumps(row) + "\n" for row in rows(30)), {}, "error[config/replay-is-data] the rows to replay are those"),
    ],
)
def test_bad_files_are_one_error_and_leave_no_folder(
    shop: Path, content: str | None, changes: dict[str, object], said: str
) -> None:
    path = shop / "texts.jsonl"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError) as caught:
        train(replayed(shop, **changes), log=quiet)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (shop / "run").exists()


# ---- runs ----


@pytest.mark.slow
def test_plain_text_is_replayed_by_the_share_and_resumes_to_the_same_bits(shop: Path) -> None:
    run, said = replayed(shop, max_length=64), []
    train(run, log=said.append)
    facts = json.loads((shop / "run" / "data.json").read_text())
    sizes = [len(text.encode()) for text in TEXTS]  # one token a byte, and each is learned once, behind the begin of its text
    windows = [-(-size // 63) for size in sizes]
    assert facts["replay"]["form"] == "plain text"
    assert facts["replay"]["rows"] == sum(windows)
    assert facts["replay"]["supervised_tokens"] == sum(sizes)
    assert facts["validation"]["rows"] == 6  # as without it
    own = facts["train"]["supervised_tokens"] / facts["train"]["rows"]
    share = 0.3 * sum(sizes) / sum(windows) / (0.3 * sum(sizes) / sum(windows) + 0.7 * own)
    assert any(f"30.0% of the rows and {share:.1%} of the supervised tokens" in line for line in said)
    log = losses(shop / "run")
    assert [row["replay_tokens"] > 0 for row in log] == [True] * 4  # 4 rows a step: 1.2 replayed on average
    assert all(row["replay_tokens"] < row["supervised_tokens"] for row in log)
    again = replace(run, out=stopped_copy(shop / "run", shop / "again", 2))
    for changes, named in (
        ({"replay_share": 0.4}, r"config\.replay_share"),
        ({"replay": None, "replay_share": None}, r"config\.replay_share, replay\.sha256, replay\.tokens"),
        ({"replay": str(shop / "chats.jsonl")}, r"replay\.sha256, replay\.tokens"),
    ):
        with pytest.raises(UserError, match=rf"checkpoint/changed.*: {named};"):
            train(replace(again, **changes), resume=True, log=quiet)
    moved = shop / "elsewhere.jsonl"
    (shop / "texts.jsonl").rename(moved)
    train(replace(again, replay=str(moved)), resume=True, log=quiet)  # by content, not by name
    assert digest(shop / "again") == digest(shop / "run")
    assert losses(shop / "again") == log


@pytest.mark.slow
def test_rows_that_are_validated_on_too_are_reported(shop: Path) -> None:
    said: list[str] = []
    (shop / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(31)))  # the data and one more row
    train(replayed(shop, file="chats.jsonl", steps=1, eval_every=99, save_every=99), log=said.append)
    assert [line for line in said if "are validated on too" in line] == [
        "warning: 6 rows to replay are validated on too: the validation loss is too good"
    ]


@pytest.mark.slow
def test_chats_are_replayed_and_the_tenth_is_the_default(shop: Path) -> None:
    run = replayed(shop, file="chats.jsonl", replay_share=None, steps=5)
    train(run, log=quiet)
    log = losses(shop / "run")
    assert json.loads((shop / "run" / "data.json").read_text())["replay"]["form"] == "prompt/completion"
    assert Counter(row["replay_tokens"] > 0 for row in log) == {True: 2, False: 3}  # floor(5 * 4 * 0.1) rows


@pytest.mark.slow
def test_a_mixture_with_replay_draws_each_file_by_its_weight_and_refuses_to_replay_one_of_them(shop: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in rows(16)]
    for name, part in (("a", lines[:12]), ("b", lines[12:])):
        (shop / f"{name}.jsonl").write_text("".join(part))
    data = (f"{shop}/a.jsonl:1", f"{shop}/b.jsonl:3")
    settings = {"data": data, "validation_share": 0.0, "batch_size": 4, "replay_share": 0.5, "steps": 8}
    run = replayed(shop, file="chats.jsonl", save_every=99, **settings)
    taken: list[int] = []
    batches = SFTTrainer.batches

    def noted(self: SFTTrainer, step: int) -> list[Batch]:
        taken.extend(row.row for row in self.step_rows(step))
        return batches(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTTrainer, "batches", noted)
        train(run, log=quiet)
    own = [row for row in taken if row > 0]
    assert len(own) == len(taken) / 2 == 16  # an epoch: a gives 1 / 4 of its rows, b the rest
    assert sum(row <= 12 for row in own) == 4
    with pytest.raises(UserError, match="config/replay-is-data"):
        train(replayed(shop, name="other", file="b.jsonl", **settings), log=quiet)
