"""GRPO on one, two and three processes: the same answers, gradients, files and stops, whoever computes which prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from ranks import on_ranks
from torch import Tensor

from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.parallel.world import ALONE, World
from minisft.surgery import lora_modules
from minisft.training import grpo_run
from minisft.training.grpo_run import SAMPLES, GRPOTrainer
from minisft.training.preference_config import GRPOConfig
from minisft.training.preference_data import EncodedPrompt
from minisft.training.rewards import Reward
from minisft.training.run_data import RunData
from minisft.training.several import check_start, check_world

SIZES = (2, 3)
END = range(7)  # of 29 tokens: answers of all lengths, some that do not stop
G = 3


def pays(answer: str, row: Mapping[str, JSON]) -> float | None:
    """A number that follows from the answer; for some rows always the same one, for some now and then none."""
    total = sum(map(int, answer.split()))
    if row["kind"] == "mute" and total % 3 == 0:
        return None
    return 1.0 if row["kind"] == "equal" else (total % 7) / 3


def prompts(kinds: str, first_row: int = 1) -> tuple[EncodedPrompt, ...]:
    draw, names = torch.Generator().manual_seed(first_row), {"d": "different", "e": "equal", "m": "mute"}
    lengths = [5, 1, 9, 3, 4, 12, 2][: len(kinds)]
    return tuple(
        EncodedPrompt(torch.randint(0, tiny.VOCAB, (n,), generator=draw).tolist(), {"kind": names[kind]}, row, f"row {row}")
        for row, (kind, n) in enumerate(zip(kinds, lengths, strict=True), first_row)
    )


@dataclass(frozen=True)
class Case:
    """The kinds of a step's prompts, settings beside the usual ones, and the losses and advantages to be computed."""

    kinds: str = "dde"
    settings: dict[str, object] = field(default_factory=dict)
    losses: tuple[tuple[str, str], ...] = (("dapo", "mean"),)


CASES = {
    "all losses": Case("ddemd", losses=tuple(itertools.product(("dapo", "dr_grpo", "grpo"), ("mean", "zscore")))),
    "truncated answers left out": Case(settings={"mask_truncated": True}, losses=(("grpo", "mean"), ("dr_grpo", "mean"))),
    "KL": Case(settings={"beta": 0.05}),
    "a process without prompts": Case("dm"),
    "a process without gradients": Case("de"),
}
LONG = "all losses"  # the case that takes three steps


def trainer(case: Case, world: World, out: Path) -> GRPOTrainer:
    run = GRPOConfig(
        "m", "d", str(out), reward="r", prompts_per_step=len(case.kinds), num_generations=G, max_new_tokens=5, steps=9,
        lr=1e-2, weight_decay=0.1, rank=2, alpha=3.0, **case.settings,
    )  # fmt: skip
    tokenizer = SimpleNamespace(pad_id=0, new_ids=(), decode=lambda ids: " ".join(map(str, ids)))
    data = RunData(prompts(case.kinds), prompts("dmd", 8), {}, {})
    model, template = tiny.build(tiny.LLAMA), SimpleNamespace(source="")
    made = GRPOTrainer(run, model, tokenizer, template, data, lambda text: None, world, reward=Reward("r", pays))
    made.prepare()
    draw = torch.Generator().manual_seed(7)
    for adapter in lora_modules(model).values():  # after the KL term's reference
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.data = 0.4 * torch.randn(factor.shape, generator=draw, dtype=torch.float64)
    return made


@dataclass(frozen=True)
class Found:
    """What one process knows of a step, by loss and advantage; and after three steps, the second with equal rewards alone."""

    mine: list[int]
    loss: list[float]
    norm: list[float]
    gradients: list[dict[str, Tensor]]
    stats: list[tuple[float, ...]]
    facts: dict[str, JSON]
    validation: tuple[float, dict[str, JSON]]
    counted: list[tuple[int, int]]
    trained: list[dict[str, Tensor]]
    constant: list[float]


def compute(case: Case, world: World, out: Path) -> Found:
    made = trainer(case, world, out)
    batches = made.batches(1)
    mine, optimizer = [group.row for group in made.groups], made.optimizer
    loss, norm, gradients, stats, counted, trained = [], [], [], [], [], []
    for name, advantage in case.losses:
        made.settings = replace(made.settings, loss=name, advantage=advantage)
        optimizer.zero_grad()
        loss.append(made._summed_gradients(1, batches))
        norm.append(optimizer.grad_norm())
        gradients.append({name: p.grad.clone() for name, p in optimizer.parameters.items() if p.grad is not None})
        stats.append(astuple(made.stats))
    facts, validation = made.facts(), made.evaluate()
    for step in (1, 2, 3) if case is CASES[LONG] else ():
        made.reward = Reward("r", pays if step != 2 else lambda answer, row: 5.0)
        result = made.step(step, made.batches(step) if step > 1 else batches, 1e-2)
        counted.append((result.num_targets, result.num_tokens))
        trained.append({name: p.detach().clone() for name, p in optimizer.parameters.items()})
    return Found(mine, loss, norm, gradients, stats, facts, validation, counted, trained, made.state.constant_groups)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo")


@pytest.fixture(scope="module")
def found(out: Path) -> dict[int, list[dict[str, Found]]]:
    """Number of processes -> what each of them computed, by case; each case's samples are in ``out / size / case``."""

    def all_cases(world: World) -> dict[str, Found]:
        return {name: compute(case, world, out / str(world.size) / name) for name, case in CASES.items()}

    for size in (1, *SIZES):
        for name in CASES:
            (out / str(size) / name).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_run, "stop_ids", lambda tokenizer, template: tuple(END))
        return {1: [all_cases(ALONE)]} | {size: on_ranks(size, all_cases) for size in SIZES}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_computes_the_same_step(found: dict[int, list[dict[str, Found]]], name: str, size: int) -> None:
    expected = found[1][0][name]
    assert sorted(row for one in found[size] for row in one[name].mine) == sorted(expected.mine)
    for one in (process[name] for process in found[size]):
        for mine, theirs in zip(one.gradients, expected.gradients, strict=True):
            tiny.assert_same(mine, theirs)
        assert one.norm == pytest.approx(expected.norm, rel=1e-12)
        assert one.loss == pytest.approx(expected.loss, rel=1e-9, abs=1e-12)
        for mine, theirs in zip(one.stats, expected.stats, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)
        for mine, theirs in ((one.facts, expected.facts), (one.validation[1], expected.validation[1])):
            assert mine == {key: pytest.approx(value, rel=1e-9) for key, value in theirs.items()}
        assert one.validation[0] == pytest.approx(expected.validation[0], rel=1e-12)
        assert (one.counted, one.constant) == (expected.counted, expected.constant)
        for mine, theirs in zip(one.trained, expected.trained, strict=True):
            tiny.assert_same(mine, theirs, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_first_process_keeps_all_answers_in_the_order_of_prompts(
    found: dict[int, list[dict[str, Found]]], out: Path, size: int
) -> None:
    for name, case in CASES.items():
        text = (out / str(size) / name / SAMPLES).read_text()
        assert text == (out / "1" / name / SAMPLES).read_text()
        first = [line for line in map(json.loads, text.splitlines()) if line["step"] == 1]
        assert [line["answer"] for line in first] == [*range(G)] * len(case.kinds)
        assert [line["row"] for line in first[::G]] == found[1][0][name].mine
        if name == LONG:
            assert found[size][0][name].counted[0][0] == sum(line["tokens"] for line in first)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_all_processes_train_the_same_bits(found: dict[int, list[dict[str, Found]]], size: int) -> None:
    first, *others = (one[LONG].trained for one in found[size])
    for other in others:
        assert all(torch.equal(theirs[k], v) for mine, theirs in zip(first, other, strict=True) for k, v in mine.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *SIZES])
def test_a_step_without_anything_to_learn_moves_nothing(found: dict[int, list[dict[str, Found]]], size: int) -> None:
    """Not even by the moments of the step before it, or by weight decay."""
    for one in found[size]:
        before, after, later = one[LONG].trained
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not all(torch.equal(later[name], value) for name, value in before.items())


@pytest.mark.slow
def test_the_cases_are_what_they_are_called(found: dict[int, list[dict[str, Found]]]) -> None:
    one, two, three = (found[size] for size in (1, 2, 3))
    assert [len(process["a process without prompts"].mine) for process in three] == [1, 1, 0]
    assert 0 < one[0][LONG].facts["frac_reward_zero_std"] == one[0][LONG].constant[0] < 1
    assert 0.1 < one[0][LONG].facts["completions/clipped_ratio"] < 0.9
    assert sorted(process["a process without gradients"].mine for process in two) == [[1], [2]]
    *_, kl, scored, counted = one[0]["a process without gradients"].stats[0]
    assert scored < counted
    assert (kl, one[0]["KL"].stats[0][3] > 0) == (0, True)


@pytest.mark.parametrize("settings", [{"beta": 0.05}, {"mask_truncated": True}])
def test_a_first_step_without_anything_to_learn_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, object]
) -> None:
    """All rewards are equal, or differ among the answers alone that are left out."""
    monkeypatch.setattr(grpo_run, "stop_ids", lambda tokenizer, template: tuple(END))
    made = trainer(Case("ddemd", settings), ALONE, tmp_path)
    with torch.no_grad():
        for name, p in made.optimizer.parameters.items():  # as a run starts: the KL term's reference is the model itself
            p.copy_(made.start[name] if made.start else p)
    made.reward = Reward("r", lambda answer, row: float("mask_truncated" in settings and answer.count(" ") == 4))
    result = made.step(1, made.batches(1), 1e-2)
    assert (result.skipped, result.grad_norm, made.stats.num_tokens > 0) == (False, 0.0, True)
    assert any(len(set(scored.rewards)) > 1 for scored in made.sampled) == ("mask_truncated" in settings)


# ---- what is refused and said -------------------------------------------------------------------------------------------


def test_more_processes_than_prompts_are_refused_and_idle_ones_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    check_world(GRPOConfig("m", "d", "o", reward="r", prompts_per_step=2), World(0, 3, 0, 3), dry_run=False, log=said.append)
    assert "warning: a step has 2 prompts (--prompts-per-step) for 3 processes; some have none" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_run, "stop_ids", lambda tokenizer, template: tuple(END))
        made = trainer(Case("dm"), World(0, 3, 0, 3), tmp_path)
    with pytest.raises(UserError, match=r"config/world.*found 3 processes; expected at most 2"):
        check_start(made)


def test_a_shared_base_is_refused() -> None:
    run = GRPOConfig("m", "d", "o", reward="r", parallel="shard")
    with pytest.raises(UserError, match=r"config/shard.*fix: --parallel replicate"):
        check_world(run, World(0, 2, 0, 2), dry_run=False, log=print)


def test_a_full_disk_is_an_error_of_its_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(grpo_run, "stop_ids", lambda tokenizer, template: tuple(END))
    made = trainer(Case("d"), ALONE, tmp_path / "missing")
    with pytest.raises(UserError, match=r"disk/write-failed.*samples\.jsonl"):
        made.batches(1)
