"""``minisft card``: the hub's own reader takes the head, every number stands in a record, and nothing unknown is claimed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_folder import quiet, run_config, stopped_copy, write_shop

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.training.card import write_card
from minisft.training.card_records import read_records
from minisft.training.runlog import read_metrics
from minisft.training.train import train


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shop(tmp_path_factory.mktemp("card"))
    train(run_config(folder, folder / "run", steps=4, eval_every=2, neftune_alpha=5.0), log=quiet)
    return folder


def copied(shop: Path, tmp_path: Path) -> Path:
    shutil.copytree(shop / "run", tmp_path / "run")
    return tmp_path / "run"


def result_file(path: Path, **changes: JSON) -> Path:
    head = {"score": 0.8125, "n": 16, "metric": "exact_match", "interval_95": [0.57, 0.934], "form": "held/chat"}
    path.write_text(json.dumps({**head, "decoding": "greedy, at most 64 tokens", **changes}))
    return path


def leaves(value: JSON) -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [str(value)]


@pytest.mark.slow
def test_the_hub_s_reader_takes_the_head(shop: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'minisft[hub]'")
    path = write_card(copied(shop, tmp_path), "apache-2.0", "org/base", [result_file(tmp_path / "score.json")])
    assert path == tmp_path / "run" / "adapter" / "README.md"
    data = hub.ModelCard.load(path).data
    assert (data.base_model, data.library_name, data.pipeline_tag, data.license) == (
        "org/base", "peft", "text-generation", "apache-2.0",
    )  # fmt: skip
    assert data.tags == ["minisft", "sft", "lora"]
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data.data_sha256 == {part: recorded[part]["sha256"] for part in ("train", "validation")}


def test_every_number_stands_in_a_record_and_no_path_does(shop: Path, tmp_path: Path) -> None:
    run = copied(shop, tmp_path)
    score = result_file(tmp_path / "score.json")
    text = write_card(run, results=[score]).read_text()
    metrics = read_metrics(run / "metrics.jsonl")
    known = [json.loads((run / f"{name}.json").read_text()) for name in ("config", "data", "env")]
    known += [json.loads(score.read_text()), json.loads((run / "adapter" / "minisft.json").read_text()), *metrics]
    words = " ".join(leaf for record in known for leaf in leaves(record))
    there = set(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", words))
    there |= {f"{float(number):.6g}" for number in there}
    sums = (sum(row[key] for row in metrics) for key in ("tokens", "supervised_tokens"))
    there |= {str(int(n)) for n in sums} | {"95", "256", str(round(max(row["peak_memory_bytes"] for row in metrics) / 2**20))}
    body = re.sub(r"`[0-9a-f]{16,}`", "", text.replace(",", ""))
    assert set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])", body)) <= there
    assert "0.8125 | 0.57 to 0.934 | 16" in text
    assert "`neftune_alpha` | `5.0`" in text
    for part in shop.parts[1:]:
        assert part not in text


def test_the_kept_step_is_the_one_whose_numbers_are_shown(shop: Path, tmp_path: Path) -> None:
    run = copied(shop, tmp_path)
    for state in run.glob("checkpoints/step-*/state.json"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "best_step": 2}))
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row}
    text = write_card(run).read_text()
    assert "Step 2 of 4, on rows held out (6 rows):" in text
    assert f"`eval_loss` | {losses[2]:.6g} |" in text
    assert "step of the weights | 2 |" in text
    assert "a little too good" in text


def test_what_is_not_known_is_not_claimed(shop: Path, tmp_path: Path) -> None:
    run = copied(shop, tmp_path)
    text = write_card(run).read_text()
    head = text.split("---")[1]
    assert "license:" not in head
    assert "base_model:" not in head  # a folder on this machine is no hub id
    assert "License: not stated here." in text
    assert "No task score" in text
    rows = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in read_metrics(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "validated on no rows" in write_card(run, force=True).read_text()


def test_hostile_names_stay_text(shop: Path, tmp_path: Path) -> None:
    run = copied(shop, tmp_path)
    facts = json.loads((run / "data.json").read_text())
    facts["train"]["path"] = "a|b`<script>\x1b[2J.jsonl"
    (run / "data.json").write_text(json.dumps(facts))
    renamed = run.rename(tmp_path / "[x](http:evil) <b>")
    text = write_card(renamed).read_text()
    assert "`a\\|b'<script>\\x1b[2J.jsonl`" in text
    assert r"# \[x\](http:evil) \<b\>" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--license", "Apache 2"], 2, "config/bad-value the hub would refuse this: --license; found Apache 2"),
        (["--base-model", "one two"], 2, "config/bad-value the hub would refuse this: --base-model; found one two"),
        (["--results", "RUN/config.json"], 2, "config/bad-result this is no result of minisft eval"),
        (["--results", "RUN/nothing.json"], 5, "checkpoint/bad-record a record cannot be read"),
    ],
)
def test_misuse(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, said: str
) -> None:
    run = copied(shop, tmp_path)
    assert main(["card", str(run), *(word.replace("RUN", str(run)) for word in words)]) == status
    assert said.replace(" ", "] ", 1) in capsys.readouterr().err
    assert not (run / "adapter" / "README.md").exists()


def test_a_card_is_not_replaced_unasked_and_an_unfinished_run_has_none(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(shop, tmp_path)
    assert main(["card", str(run)]) == 0
    first = (run / "adapter" / "README.md").read_bytes()
    assert main(["card", str(run), "--license", "mit"]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert (run / "adapter" / "README.md").read_bytes() == first
    assert main(["card", str(run), "--license", "mit", "--force"]) == 0
    stopped_copy(shop / "run", tmp_path / "stopped", 2)
    assert main(["card", str(tmp_path / "stopped")]) == 5
    assert "checkpoint/no-result" in capsys.readouterr().err
    assert main(["card", str(tmp_path / "nowhere")]) == 5


def test_kinds_of_runs_are_told_apart_by_their_settings(shop: Path, tmp_path: Path) -> None:
    from minisft.training.preference_config import DPOConfig, GRPOConfig

    run = copied(shop, tmp_path)
    assert read_records(run).kind == "sft"
    for kind, config in (("dpo", DPOConfig("m", "d", "o")), ("grpo", GRPOConfig("m", "d", "o", reward="exact_match"))):
        (run / "config.json").write_text(json.dumps(config.to_dict()))
        assert read_records(run).kind == kind
    (run / "config.json").write_text(json.dumps({**config.to_dict(), "rang": 4}))
    with pytest.raises(UserError, match="config/unknown-key"):
        read_records(run)
