"""The sweep over an adapter's scale: every point is what an evaluation of its own gives, and nothing measured is lost."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from tiny import LLAMA, build_with_lora
from tiny_folder import write_model, write_rows

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig
from minisft.evaluation.evaluate import EvalResult
from minisft.evaluation.sweep import PLOT, REPORT, Point, draw, line, scaled, sweep
from minisft.formats import load_model, save_adapter
from minisft.model import CausalLM
from minisft.surgery import apply_lora_, lora_modules

pytestmark = pytest.mark.slow

QUESTIONS = [("1 + 1", "2"), ("2 + 1", "3"), ("2 + 2", "4"), ("4 + 1", "5"), ("first letter", "a"), ("second letter", "b")]


class Shop:
    """A model, an adapter that changes it a lot, task rows and questions; ``--metric loss`` tells all scales apart."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.base = write_model(folder / "base", folder / "scratch")
        self.data = write_rows(folder / "rows.jsonl", 5)
        self.general = folder / "general.jsonl"
        options = [answer for _, answer in QUESTIONS]
        rows = [{"prompt": prompt, "completion": answer, "choices": options} for prompt, answer in QUESTIONS]
        self.general.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model, _ = load_model(self.base)
        apply_lora_(model, LoRAConfig(rank=2, alpha=8.0))
        for i, layer in enumerate(lora_modules(model).values()):
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(i))
        self.adapter = folder / "adapter"
        save_adapter(model, self.adapter)

    def sweep(self, *more: object, **changes: object) -> int:
        named = {"--data": self.data, "--general": self.general, "--out": self.out, "--metric": "loss", **changes}
        words = ["sweep", "--model", self.base, "--adapter", self.adapter, *(w for pair in named.items() for w in pair), *more]
        return main([str(word) for word in words])

    def eval(self, data: Path, metric: str, *more: object) -> float:
        out = self.out.with_name("score.json")
        words = ["eval", "--model", self.base, "--data", data, "--metric", metric, "--out", out, *more]
        assert main([str(word) for word in words]) == 0
        return json.loads(out.read_text())["score"]

    def points(self) -> list[dict]:
        return json.loads((self.out / REPORT).read_text())


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_every_point_is_an_evaluation_of_its_own(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    """Scale 0 is the base, scale 1 the adapter as it is; after 0 comes another, so none builds upon the one before it."""
    assert shop.sweep("--scales", "1,0,0.3") == 0
    printed = capsys.readouterr()
    points = shop.points()
    assert [point["scale"] for point in points] == [1, 0, 0.3]
    adapted = ("--adapter", shop.adapter)
    alone: tuple[tuple[object, ...], ...] = (adapted, (), (*adapted, "--scale", 0.3))
    for data, metric, name in ((shop.data, "loss", "task"), (shop.general, "choice", "general")):
        for point, words in zip(points, alone, strict=True):
            assert point[name]["score"] == pytest.approx(shop.eval(data, metric, *words), rel=1e-6)
            assert point[name]["metric"] == metric
    losses = [point["task"]["score"] for point in points]
    assert len({round(loss, 4) for loss in losses}) == 3
    notes = printed.out.partition("scale")[0]
    assert f"{shop.data}: columns not used: id" in notes
    assert f"{shop.general}: form: prompt" in notes
    table = printed.out.removeprefix(notes).lstrip().splitlines()
    assert [row.split()[0] for row in table[:4]] == ["scale", "1", "0", "0.3"]
    assert f"{losses[1]:.4f}" in table[2]
    assert printed.err == ""  # progress is for terminals
    assert ElementTree.fromstring((shop.out / PLOT).read_text()).tag.endswith("svg")


def test_text_is_compared_by_default_and_the_scales_run_from_0_to_1(shop: Shop) -> None:
    words = ["sweep", "--model", shop.base, "--adapter", shop.adapter, "--data", shop.data, "--general", shop.general]
    assert main([*map(str, words), "--out", str(shop.out), "--max-new-tokens", "2", "--limit", "2"]) == 0
    points = shop.points()
    assert [point["scale"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    assert {(point["task"]["metric"], point["task"]["n"], point["general"]["n"]) for point in points} == {("exact_match", 2, 2)}


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def result(score: float, metric: str = "choice") -> EvalResult:
    extra = {} if metric == "loss" else {"interval_95": [max(0.0, score - 0.1), min(1.0, score + 0.1)]}
    return EvalResult(score, 10, metric, extra, [])


def test_a_scale_that_fails_loses_nothing(tmp_path: Path) -> None:
    """What is on the disk when a scale fails is all that came before; the others follow, and the numbers are put back."""
    model, seen = build_with_lora(LLAMA, LoRAConfig(rank=2, alpha=3.0)), []
    before = {path: (layer.scaling, layer.alpha) for path, layer in lora_modules(model).items()}

    def task(asked: CausalLM) -> EvalResult:
        scale = next(iter(lora_modules(asked).values())).scaling / 1.5
        if scale == 0.5:
            raise UserError("numeric/non-finite-loss", "the loss is not finite")
        return result(scale / 2)

    def tell(point: Point) -> None:
        seen.append((point.scale, len(json.loads((tmp_path / "out" / REPORT).read_text()))))

    points = sweep(model, (0.0, 0.5, 1.0), task, lambda _: result(0.5), tmp_path / "out", tell)
    assert seen == [(0.0, 1), (0.5, 2), (1.0, 3)]
    stored = json.loads((tmp_path / "out" / REPORT).read_text())
    assert [point.get("task", {}).get("score") for point in stored] == [0.0, None, 0.5]
    assert "not finite" in stored[1]["error"]
    assert "not scored: error[numeric/non-finite-loss]" in line(points[1])
    assert {path: (layer.scaling, layer.alpha) for path, layer in lora_modules(model).items()} == before
    assert (tmp_path / "out" / PLOT).is_file()


def test_an_interrupt_leaves_what_was_measured(tmp_path: Path) -> None:
    def task(asked: CausalLM) -> EvalResult:
        if next(iter(lora_modules(asked).values())).scaling == 1.5:
            raise KeyboardInterrupt
        return result(0.5)

    model = build_with_lora(LLAMA, LoRAConfig(rank=2, alpha=3.0))
    with pytest.raises(KeyboardInterrupt):
        sweep(model, (0.0, 1.0), task, task, tmp_path / "out", lambda _: None)
    assert [point["scale"] for point in json.loads((tmp_path / "out" / REPORT).read_text())] == [0.0]


def test_what_is_refused(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(status: int, code: str, *more: object, **changes: object) -> None:
        assert shop.sweep(*more, **changes) == status
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error[{code}]")

    for words in ("0,x", "0,0", "", "nan", "1,inf"):
        refused(2, "config/usage", "--scales", words)
    refused(3, "data/no-file", **{"--general": shop.data.with_name("none.jsonl")})
    refused(2, "config/out-exists", **{"--out": shop.base.parent})
    refused(2, "config/bad-value", "--limit", 0)
    assert not shop.out.exists()
    words = ["sweep", "--model", shop.base, "--data", shop.data, "--general", shop.general, "--out", shop.out]
    assert main([*map(str, words)]) == 4
    assert capsys.readouterr().err.startswith("error[adapter/none]")


def test_when_no_scale_can_be_scored_the_message_says_why(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    long = json.dumps({"prompt": "a", "completion": "b" * 600})  # an answer is never cut
    shop.data.write_text(long + "\n")
    assert shop.sweep("--scales", "0,1") == 6
    message = capsys.readouterr().err.strip()
    assert message.startswith("error[numeric/sweep-incomplete] 2 of 2 scales")
    assert "no row fits the model's context" in message
    assert not (shop.out / PLOT).exists()


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_scaling_is_put_back_to_the_bit_even_from_zero() -> None:
    model = build_with_lora(LLAMA, LoRAConfig(rank=3, alpha=0.7))
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids)
    for scale in (0.0, 1 / 3):
        with scaled(model, scale):
            assert not torch.equal(model(ids), before)
        assert torch.equal(model(ids), before)


def test_the_drawing_has_every_scale_once_and_repeats() -> None:
    points = [Point(0.0, result(0.1), result(0.6)), Point(1.0, result(0.9), result(0.5)), Point(0.5, result(0.9), result(0.5))]
    svg = draw(points)
    texts = ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
    assert "0.5, 1" in texts  # at one place
    assert {"task, choice", "general, choice", "scale of the update"} <= set(texts)
    assert draw(points) == svg
    assert draw([*points, Point(2.0, error="error")]) == svg
    assert result(0.3, "loss").interval is None
