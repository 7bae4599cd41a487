"""A full fine-tune at a scale: both ends bit for bit, the middle by the formula, and nothing forgotten at scale 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_folder
import torch

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import QuantConfig
from minisft.evaluation.interpolate import interpolated
from minisft.evaluation.plain_text import bits_per_byte, kl_per_token
from minisft.evaluation.sweep import REPORT
from minisft.formats import load_model, save_model, save_quantized

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny_folder.write_model(folder / "base", folder / "scratch")
    model, tokenizer = load_model(folder / "base")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * tiny.randn(*parameter.shape, seed=i, dtype=torch.float32))
    save_model(model, tokenizer, folder / "tuned")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_ends_bit_for_bit_and_the_middle_by_the_formula(pair: Path, dtype: torch.dtype) -> None:
    base, tuned = (load_model(pair / name, dtype)[0] for name in ("base", "tuned"))
    exact = [load_model(pair / name, torch.float64)[0] for name in ("base", "tuned")]
    model = load_model(pair / "base", dtype)[0]
    at = interpolated(pair / "base", pair / "tuned")
    for scale, end in ((1.0, tuned), (0.0, base)):
        with at(model, scale):
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), end.parameters(), strict=True))
    with at(model, 0.3):
        for found, w, v in zip(model.parameters(), *(m.parameters() for m in exact), strict=True):
            tiny.assert_close(found, w + 0.3 * (v - w), {torch.bfloat16: 2**-8, torch.float32: 1e-6}.get(dtype, 1e-14))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


def test_nothing_is_forgotten_at_scale_0(pair: Path) -> None:
    model, tokenizer = load_model(pair / "base")
    base, _ = load_model(pair / "base")
    texts = ["A parcel left Basel on Monday.", "It is in Brussels by Thursday."]
    before = bits_per_byte(base, tokenizer, texts)
    for scale, is_same in ((0.0, True), (0.5, False)):
        with interpolated(pair / "base", pair / "tuned")(model, scale):
            assert (bits_per_byte(model, tokenizer, texts) == before) is is_same
            assert (kl_per_token(base, model, tokenizer, texts) == [0.0, 0.0]) is is_same


def test_the_command_sweeps_a_full_fine_tune(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_folder.write_rows(tmp_path / "rows.jsonl", 3)
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"prompt": "1 + 1", "completion": "2", "choices": ["2", "3"]}) + "\n")
    words = ["--data", str(data), "--general", str(general), "--metric", "loss", "--model", str(pair / "base")]
    out = tmp_path / "out"
    assert main(["sweep", *words, "--tuned", str(pair / "tuned"), "--scales", "0,1", "--out", str(out)]) == 0
    points = json.loads((out / REPORT).read_text())
    for point, name in zip(points, ("base", "tuned"), strict=True):
        score = tmp_path / f"{name}.json"
        assert main(["eval", "--model", str(pair / name), "--data", str(data), "--metric", "loss", "--out", str(score)]) == 0
        assert point["task"]["score"] == json.loads(score.read_text())["score"]
    capsys.readouterr()
    for more in (["--adapter", "a"], ["--quant", "nf4"]):
        assert main(["sweep", *words, "--tuned", str(pair / "tuned"), "--out", str(tmp_path / "two"), *more]) == 2
        assert capsys.readouterr().err.startswith("error[config/usage]")


def test_weights_in_4_bits_and_scales_that_are_no_number_are_refused(pair: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(pair / "tuned", quant=QuantConfig())
    save_quantized(model, tokenizer, tmp_path / "four")
    with pytest.raises(UserError, match="4 bits cannot be scaled"):
        interpolated(pair / "base", tmp_path / "four")
    at = interpolated(pair / "base", pair / "tuned")
    with pytest.raises(UserError, match="finite"), at(load_model(pair / "base")[0], float("nan")):
        pass
    with pytest.raises(UserError, match="plain model"), at(model, 0.5):
        pass
