"""``--dry-run``: the plan and the checks of a run through the real command line, and a folder that stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_folder import write_shop

from minisft.cli.main import main
from minisft.training.grpo_run import GRPOTrainer
from minisft.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write_shop(tmp_path)


def words(shop: Path, command: str, rows: str, *more: object) -> list[str]:
    fixed = ["--dtype", "fp32", "--rank", 2, "--steps", 7, "--dry-run"]
    return [str(w) for w in (command, "--model", shop / "model", "--data", shop / rows, "--out", shop / "run", *fixed, *more)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_dry_run_checks_everything_and_writes_nothing(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, built = files(shop), []
    init = Trainer.__init__

    def remember(self: Trainer, *arguments: object) -> None:
        init(self, *arguments)
        built.append((self, [p.detach().clone() for p in self.model.parameters()]))

    monkeypatch.setattr(Trainer, "__init__", remember)
    assert main(words(shop, "train", "rows.jsonl", "--neftune-alpha", 5, "--micro-batch-size", 4)) == 0
    assert files(shop) == before
    assert not (shop / "run").exists()
    said = capsys.readouterr().out
    for text in (
        "needed: ",  # the memory bill
        "rows to train on, 2 to validate on",
        "would take 7 steps of 8 rows from 28: 1 of warm-up, then cosine from 0.0002",
        "nothing was written to",
    ):
        assert text in said
    ((trainer, start),) = built
    longest = sorted(len(row.input_ids) for row in trainer.data.train)[-4:]
    assert f"longest micro-batch: {sum(longest):,} tokens, loss " in said
    assert all(torch.equal(p, value) for p, value in zip(trainer.model.parameters(), start, strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("content", "more", "code", "said"),
    [
        ('{"prompt": "a"}\n', (), 3, "error[data/"),
        (None, ("--targets", "q_porj"), 2, "error[config/no-such-target]"),
        (None, ("--resume",), 2, "error[config/bad-value] a resumed run has been checked when it started: --dry-run"),
    ],
)
def test_what_the_run_would_refuse_the_dry_run_refuses(
    shop: Path, content: str | None, more: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (shop / "rows.jsonl").write_text(content)
    before = files(shop)
    assert main(words(shop, "train", "rows.jsonl", *more)) == code
    assert said in capsys.readouterr().err
    assert files(shop) == before


def test_a_folder_in_use_is_refused(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "run").mkdir()
    (shop / "run" / "notes.txt").write_text("mine")
    assert main(words(shop, "train", "rows.jsonl")) != 0
    assert "--resume" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_found(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    path = shop / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, path, {"format": "pt"})
    assert main(words(shop, "train", "rows.jsonl")) == 6
    assert "error[numeric/non-finite] the loss or its gradient is not finite: the longest rows" in capsys.readouterr().err


def test_dpo_and_grpo_stop_before_anything_is_computed_or_written(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"prompt": f"say {chr(97 + i)}", "chosen": chr(65 + i), "rejected": chr(66 + i) * 2} for i in range(12)]
    (shop / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.setattr(GRPOTrainer, "_sample", lambda *_: pytest.fail("it sampled"))
    before = files(shop)
    assert main(words(shop, "dpo", "pairs.jsonl", "--batch-size", 4)) == 0
    assert main(words(shop, "grpo", "rows.jsonl", "--reward", "exact_match", "--max-new-tokens", 4)) == 0
    assert capsys.readouterr().out.count("nothing was written") == 2
    assert files(shop) == before
