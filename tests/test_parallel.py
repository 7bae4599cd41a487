"""One, two and three processes compute the same: gradients, losses, validation, whatever the rows and whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor, nn

from minisft.common.errors import UserError
from minisft.config import QuantConfig, RunConfig
from minisft.data.chat import Encoded
from minisft.parallel import world as world_module
from minisft.parallel.world import ALONE, World
from minisft.surgery import lora_modules, quantize_
from minisft.training.dpo import EncodedPair
from minisft.training.dpo_run import DPOTrainer
from minisft.training.preference_config import DPOConfig
from minisft.training.run_data import RunData
from minisft.training.sft import SFTTrainer

pytestmark = pytest.mark.slow

SIZES = (2, 3)
RAGGED = [9, 3, 14, 2, 7, 11, 5, 8]


def rows(lengths: list[int], prefix: int = 0, untrained: tuple[int, ...] = ()) -> list[Encoded]:
    """Random rows that begin with ``prefix`` equal tokens; the second half is learned, but for the rows in ``untrained``."""
    draw = torch.Generator().manual_seed(5)
    same = torch.randint(0, tiny.VOCAB, (prefix,), generator=draw).tolist()
    made = []
    for row, length in enumerate(lengths, 1):
        ids = same + torch.randint(0, tiny.VOCAB, (length,), generator=draw).tolist()
        first = prefix + max(1, length // 2) if prefix or length > 1 else 1
        made.append(Encoded(ids, [row not in untrained and i >= first for i in range(len(ids))], row, 0, first))
    return made


@dataclass(frozen=True)
class Case:
    """A step: its rows, settings beside the usual ones, and whether the base is in 4 bits."""

    rows: list[Encoded] = field(default_factory=lambda: rows(RAGGED))
    settings: dict[str, object] = field(default_factory=dict)
    in_4_bits: bool = False


CASES = {
    "packed": Case(),
    "padded": Case(settings={"packing": False}),
    "micro-batches": Case(settings={"micro_batch_size": 2, "packing": False}),
    "not divisible": Case(rows(RAGGED[:5])),
    "a process without rows": Case(rows([6, 9])),
    "a process without targets": Case(
        rows([20, 3, 4, 19, 18], untrained=(1, 4))
    ),  # those of rank 0 of two, or of ranks 0 and 1
    "shared prefix": Case(rows(RAGGED, prefix=12)),
    "dropout": Case(settings={"dropout": 0.5}),
    "noise": Case(settings={"neftune_alpha": 5.0}),
    "dora": Case(settings={"use_dora": True}),
    "embeddings": Case(settings={"targets": ("embed_tokens", "q_proj")}),
    "4 bits": Case(in_4_bits=True),
    "full": Case(settings={"method": "full"}),
    "recomputed": Case(settings={"checkpointing": "full", "dropout": 0.3}),
}


def trainer(case: Case, world: World = ALONE) -> SFTTrainer:
    settings = {"batch_size": len(case.rows), "lr": 1e-2, "steps": 20} | case.settings
    if settings.get("method") != "full":
        settings |= {"rank": 2, "alpha": 3.0}
    run = RunConfig("m", "d", "o", **settings)
    model = tiny.build(replace(tiny.LLAMA, tie_word_embeddings=False))
    if case.in_4_bits:
        quantize_(model, QuantConfig(block_size=64))
    data = RunData(case.rows, rows([4, 9, 6, 3, 12]), {}, {})
    made = SFTTrainer(
        run, model, SimpleNamespace(pad_id=0, new_ids=()), SimpleNamespace(source=""), data, lambda text: None, world
    )
    draw = torch.Generator().manual_seed(7)
    for adapter in lora_modules(model).values():  # as if trained for a while: at B = 0 the other factor has no gradient
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.data = 0.4 * torch.randn(factor.shape, generator=draw, dtype=torch.float64).to(factor.dtype)
    return made


@dataclass(frozen=True)
class Found:
    """What one process knows after the backward of a step, and what it trains after three steps."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float
    validation: float
    losses: list[float]
    trained: dict[str, Tensor]
    counted: tuple[int, int]


def compute(case: Case, world: World) -> Found:
    made = trainer(case, world)
    loss = made._summed_gradients(1, made.batches(1))
    norm, gradients = made.optimizer.grad_norm(), {name: p.grad.clone() for name, p in made.optimizer.parameters.items()}
    made.optimizer.zero_grad()
    validation, _ = made.evaluate()
    results = [made.step(step, made.batches(step), 1e-2) for step in (1, 2, 3)]
    trained = {name: p.detach().clone() for name, p in made.optimizer.parameters.items()}
    return Found(
        loss, gradients, norm, validation, [r.loss for r in results], trained, (results[0].num_targets, results[0].num_tokens)
    )


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Found]]]:
    """Number of processes -> what each of them computed, by case."""

    def all_cases(world: World) -> dict[str, Found]:
        return {name: compute(case, world) for name, case in CASES.items()}

    return {1: [all_cases(ALONE)]} | {size: on_ranks(size, all_cases) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_computes_the_same_step(found: dict[int, list[dict[str, Found]]], name: str, size: int) -> None:
    expected = found[1][0][name]
    for one in found[size]:
        assert one[name].loss == pytest.approx(expected.loss, rel=1e-12)
        assert one[name].norm == pytest.approx(expected.norm, rel=1e-12)
        assert one[name].validation == pytest.approx(expected.validation, rel=1e-12)
        assert one[name].counted == expected.counted == (
            sum(row.num_targets for row in CASES[name].rows), sum(len(row.input_ids) for row in CASES[name].rows)
        )  # fmt: skip
        tiny.assert_same(one[name].gradients, expected.gradients)
        assert one[name].losses == pytest.approx(expected.losses, rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_all_processes_train_the_same_bits(found: dict[int, list[dict[str, Found]]], size: int) -> None:
    for name in CASES:
        first, *others = (one[name].trained for one in found[size])
        for other in others:
            assert all(torch.equal(other[key], value) for key, value in first.items()), name


@given(lengths=st.lists(st.integers(1, 50), max_size=20), size=st.integers(1, 5))
def test_shares_are_all_items_once_and_nearly_alike(lengths: list[int], size: int) -> None:
    items = list(enumerate(lengths))
    shares = [World(rank, size).share(items, lambda item: item[1]) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    tokens = [sum(length for _, length in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_are_dealt_there_and_back(size: int) -> None:
    """There and back gives each process two of the same sum; dealt one way, the first would always get the longer one."""
    lengths = range(1, 6 * size + 1)
    sums = [sum(World(rank, size).share(lengths, lambda length: length)) for rank in range(size)]
    assert sums == [sum(lengths) / size] * size


def test_one_process_runs_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a collective in a run of one process")

    for name in ("all_reduce", "all_gather", "broadcast", "barrier", "init_process_group"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    compute(CASES["packed"], ALONE)
    ALONE.barrier()
    done: list[int] = []
    ALONE.on_first(lambda: done.append(1))
    ALONE.require_same_weights({"a": torch.ones(2)}, 1)
    assert ALONE.from_all("x") == ["x"]
    assert (done, ALONE.from_first("x"), ALONE.differing({"a": b"1"}), ALONE.any_signal(15)) == ([1], "x", None, 15)


def dpo(world: World, out: str) -> tuple[float, dict[str, Tensor], tuple[float, ...], float]:
    """Loss, gradient, means over the step's pairs, and the validation loss of a DPO run's second look at its pairs."""
    sides = rows([6, 9, 4, 12, 5, 7, 8, 3, 11, 10, 2, 5], prefix=3)
    pairs = [EncodedPair(a, replace(b, row=a.row)) for a, b in zip(sides[::2], sides[1::2], strict=True)]
    run = DPOConfig("m", "d", out, batch_size=5, steps=9, rank=2, alpha=3.0, lr=1e-2, rpo_alpha=0.3)
    model = tiny.build(tiny.LLAMA)
    data = RunData(pairs[:5], pairs[3:], {}, {})
    made = DPOTrainer(
        run, model, SimpleNamespace(pad_id=0, new_ids=()), SimpleNamespace(source=""), data, lambda text: None, world
    )
    made.prepare()
    draw = torch.Generator().manual_seed(7)
    for adapter in lora_modules(model).values():  # after the reference, so that pairs have margins
        adapter.lora_B.data = 0.4 * torch.randn(adapter.lora_B.shape, generator=draw, dtype=torch.float64)
    loss = made._summed_gradients(1, made.batches(1))
    gradients = {name: p.grad.clone() for name, p in made.optimizer.parameters.items()}
    return loss, gradients, astuple(made.stats), made.evaluate()[0]


def test_any_number_of_processes_computes_the_same_dpo_step(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        (tmp_path / name).mkdir()
    loss, gradients, stats, validation = dpo(ALONE, str(tmp_path / "1"))
    for size in SIZES:
        for found in on_ranks(size, lambda world, size=size: dpo(world, str(tmp_path / str(size)))):
            assert found[0] == pytest.approx(loss, rel=1e-12)
            tiny.assert_same(found[1], gradients)
            assert found[2] == pytest.approx(stats, rel=1e-9)
            assert found[3] == pytest.approx(validation, rel=1e-12)
    references = [(tmp_path / name / "reference.safetensors").stat().st_size for name in ("1", "2", "3")]
    assert len(set(references)) == 1


# ---- agreement ---------------------------------------------------------------------------------------------------------


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing"


def test_the_processes_agree_on_everything_that_decides() -> None:
    def facts(world: World) -> dict[str, object]:
        last = world.rank == world.size - 1

        def fails() -> None:
            raise UserError("disk/full", "the disk is full", where="out", fix="free some space")

        weights = {"same": torch.arange(3.0), "other": torch.tensor([1.0, -0.0 if last else 0.0])}
        return {
            "signal": [world.any_signal(15 if last else None), world.any_signal(None)],
            "text": world.from_first("ü" * 300 if world.is_first else "") == "ü" * 300,
            "empty": world.from_first(""),
            "texts": [world.from_all("ü" * world.rank), world.from_all("")],
            "failed": refusal(lambda: world.on_first(fails)),
            "start": refusal(lambda: world.require_same_start({"data": b"1", "base": b"2" if last else b"3"})),
            "diverged": refusal(lambda: world.require_same_weights(weights, 7)),
            "sums": (world.sum_ints(2**60 + 1, world.rank), world.sum_floats(0.5), world.largest(world.rank)),
        }

    found = on_ranks(3, facts)
    assert found[0] == found[1] == found[2]
    assert found[0]["signal"] == [15, None]
    assert found[0]["text"]
    assert found[0]["empty"] == ""
    assert found[0]["texts"] == [["", "ü", "üü"], ["", "", ""]]
    assert found[0]["failed"] == "error[disk/full] the disk is full: out; fix: free some space"
    assert "config/other-start" in found[0]["start"]
    assert "base; found rank 2" in found[0]["start"]
    assert "numeric/diverged" in found[0]["diverged"]
    assert "step 7: other; found rank 2" in found[0]["diverged"]
    assert found[0]["sums"] == ((3 * 2**60 + 3, 3), (1.5,), 2)


def test_large_gradients_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "FLAT_BYTES", 100)

    def summed(world: World) -> list[Tensor]:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (30,), (2, 2), (1,))]
        for i, p in enumerate(parameters[: 3 + world.rank]):
            p.grad = torch.full_like(p, 10.0**i * (world.rank + 1))
        world.sum_gradients_(parameters)
        return [p.grad for p in parameters]

    for gradients in on_ranks(2, summed):
        assert [g.unique().tolist() for g in gradients] == [[3.0], [30.0], [300.0], [2000.0]]
        assert [tuple(g.shape) for g in gradients] == [(3, 4), (30,), (2, 2), (1,)]


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all() -> None:
    def step(world: World) -> tuple[bool, bool]:
        made = trainer(CASES["packed"], world)
        before = {name: p.detach().clone() for name, p in made.optimizer.parameters.items()}
        made.gradients, whole = lambda step, batches: whole(step, batches) * (float("nan") if world.rank else 1), made.gradients
        result = made.step(1, made.batches(1), 1e-2)
        return result.skipped, all(torch.equal(p, before[name]) for name, p in made.optimizer.parameters.items())

    assert on_ranks(2, step) == [(True, True)] * 2
