"""A resumed run is the same run: contents decide, not names or memory settings; and a run may start from an adapter."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import digest, losses, quiet, run_config, write_rows, write_shop

import minisft.data.template
from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import RunConfig
from minisft.formats import load_adapter_, load_model
from minisft.schedule import learning_rate
from minisft.surgery import lora_modules
from minisft.training.identity import require_same_run, run_identity, tokens_sha256
from minisft.training.runlog import read_metrics
from minisft.training.train import train

pytestmark = pytest.mark.slow
STOP, STEPS = 2, 4
DATED = (
    "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write_shop(tmp_path)


def config(shop: Path, out: Path, **changes: object) -> RunConfig:
    return run_config(shop, out, **{"steps": STEPS, "eval_every": STEPS, "save_every": 1, "keep_last": 9, **changes})


def stopped(shop: Path, run: RunConfig, stop: int = STOP) -> RunConfig:
    """The whole run, and a copy that stopped after ``stop`` steps; returns the copy's settings."""
    train(run, log=quiet)
    whole, out = Path(run.out), shop / "stopped"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("adapter", "step-*"))
    shutil.copytree(whole / "checkpoints" / f"step-{stop}", out / "checkpoints" / f"step-{stop}")
    return replace(run, out=str(out))


def refused(run: RunConfig, *named: str) -> None:
    before = digest_of(Path(run.out))
    with pytest.raises(UserError) as caught:
        train(run, resume=True, log=quiet)
    assert caught.value.code == "checkpoint/changed"
    assert f": {', '.join(named)};" in str(caught.value)
    assert digest_of(Path(run.out)) == before


def digest_of(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name != ".lock"}


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"checkpointing": "full"}, {"packing": True}, {"device": "auto"}])
def test_what_only_decides_how_a_step_is_computed_may_change(shop: Path, change: dict[str, object]) -> None:
    run = stopped(shop, config(shop, shop / "whole", packing=False, device="cpu"))
    notes: list[str] = []
    train(replace(run, **change), resume=True, log=notes.append)
    expected, found = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (shop / "whole", Path(run.out)))
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-5), name
    is_noted = any("the result is the same up to rounding" in note for note in notes)
    assert is_noted == (change != {"device": "auto"})  # which is the CPU here, as before


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"checkpointing": "full"}, {"packing": True}])
def test_dropout_masks_belong_to_rows_wherever_they_are_computed(shop: Path, change: dict[str, object]) -> None:
    run = stopped(shop, config(shop, shop / "whole", dropout=0.2, packing=False))
    train(replace(run, **change), resume=True, log=quiet)
    expected, found = losses(shop / "whole"), losses(Path(run.out))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


def test_a_run_whose_masks_were_drawn_by_micro_batch_is_not_gone_on_with(shop: Path) -> None:
    run = stopped(shop, config(shop, shop / "whole", dropout=0.2))
    identity = run_identity(run, {}, None, torch.device("cpu"))
    assert identity["dropout"] == "by row"
    with pytest.raises(UserError, match="dropout: absent before"):
        require_same_run({k: v for k, v in identity.items() if k != "dropout"} | {"template": 0}, identity | {"template": 0})


def test_moved_files_are_the_same_files(shop: Path) -> None:
    write_rows(shop / "eval.jsonl", 4)
    (shop / "t.jinja").write_text(DATED)
    names = {"model": "model", "data": "rows.jsonl", "eval_data": "eval.jsonl", "template": "t.jinja"}
    run = stopped(shop, config(shop, shop / "whole", **{key: str(shop / name) for key, name in names.items()}))
    (shop / "disk2").mkdir()
    for name in names.values():
        shutil.move(shop / name, shop / "disk2" / name)
    moved = {key: str(shop / "disk2" / name) for key, name in names.items()}
    train(replace(run, **moved), resume=True, log=quiet)
    found, expected = digest(Path(run.out)), digest(shop / "whole")
    changed = {name for name in expected if found[name] != expected[name]}
    assert changed == {f"{folder}/adapter_config.json" for folder in ("adapter",)}  # which names the base's path
    assert losses(Path(run.out)) == losses(shop / "whole")


@pytest.mark.parametrize("changed", ["data.train", "data.eval", "template", "tokenizer", "base"])
def test_changed_contents_are_refused_by_name(shop: Path, changed: str) -> None:
    write_rows(shop / "eval.jsonl", 4)
    run = stopped(shop, config(shop, shop / "whole", eval_data=str(shop / "eval.jsonl")))
    if changed.startswith("data."):
        path = shop / {"data.train": "rows.jsonl", "data.eval": "eval.jsonl"}[changed]
        path.write_text(path.read_text() + "\n")
    elif changed == "base":
        path = shop / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif changed == "template":
        (path,) = (p for p in (shop / "model").iterdir() if "{{ message.content }}" in p.read_text("latin-1"))
        prefix = "{% if message.role == 'user' %}Q: {% endif %}"
        path.write_text(path.read_text().replace("{{ message.content }}", prefix + "{{ message.content }}"))
    else:
        path = shop / "model" / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(tokenizer))
    refused(run, changed)


def test_white_space_in_the_tokenizers_settings_changes_nothing(shop: Path) -> None:
    run = stopped(shop, config(shop, shop / "whole"))
    path = shop / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    train(run, resume=True, log=quiet)
    assert digest(Path(run.out)) == digest(shop / "whole")


def test_a_template_that_writes_the_date_goes_on_with_the_first_one(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "t.jinja").write_text(DATED)
    run = stopped(shop, config(shop, shop / "whole", template=str(shop / "t.jinja")))

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + datetime.timedelta(days=30)

    class Module:
        datetime = Later

    monkeypatch.setattr(minisft.data.template, "datetime", Module)
    assert (minisft.data.template.current_time() - datetime.datetime.now()).days >= 29
    train(run, resume=True, log=quiet)
    assert digest(Path(run.out)) == digest(shop / "whole")


def test_a_flag_or_a_token_changes_the_hash_of_the_rows(shop: Path) -> None:
    from minisft.data.chat import Encoded

    row = Encoded([1, 2, 3], [False, True, True], 1, 0, 1)
    variants = [row, replace(row, input_ids=[1, 2, 4]), replace(row, supervised=[False, True, False])]
    hashes = {tokens_sha256([v], []) for v in variants} | {tokens_sha256([], [row]), tokens_sha256([row, row], [])}
    assert len(hashes) == 5
    assert tokens_sha256([replace(row, row=9)], []) == tokens_sha256([row], [])


# ---- more steps ----


def test_a_finished_run_can_be_given_more_steps(shop: Path) -> None:
    run = config(shop, shop / "run")
    train(run, log=quiet)
    first = (shop / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    notes: list[str] = []
    result = train(replace(run, steps=7), resume=True, log=notes.append)
    assert any("4 steps before, 7 now" in note for note in notes)
    assert (result.steps, result.total_steps) == (7, 7)
    rates = [row["lr"] for row in read_metrics(shop / "run" / "metrics.jsonl")]
    assert rates[:4] == [learning_rate(step, 4, 1e-2, 1, "cosine") for step in range(1, 5)]
    assert rates[4:] == [learning_rate(step, 7, 1e-2, 1, "cosine") for step in range(5, 8)]
    assert (shop / "run" / "adapter-step-4" / "adapter_model.safetensors").read_bytes() == first
    assert (shop / "run" / "adapter" / "adapter_model.safetensors").read_bytes() != first


def test_steps_replace_epochs_on_the_command_line(shop: Path) -> None:
    out = str(shop / "run")
    flags = ["--model", str(shop / "model"), "--data", str(shop / "rows.jsonl"), "--dtype", "fp32", "--rank", "2"]
    assert main(["train", *flags, "--out", out, "--epochs", "0.2", "--validation-share", "0"]) == 0
    assert main(["train", "--out", out, "--resume", "--steps", "3"]) == 0
    assert len(read_metrics(shop / "run" / "metrics.jsonl")) == 3
    saved = json.loads((shop / "run" / "config.json").read_text())
    assert (saved["steps"], saved["epochs"]) == (3, None)


def test_fewer_steps_than_are_done_and_other_settings_are_refused(shop: Path) -> None:
    run = stopped(shop, config(shop, shop / "whole"))
    with pytest.raises(UserError, match="config/too-few-steps") as caught:
        train(replace(run, steps=1), resume=True, log=quiet)
    assert "found 1 steps; expected at least 2" in str(caught.value)
    for name, value in {"lr": 2e-2, "seed": 1, "rank": 3, "batch_size": 2}.items():
        with pytest.raises(UserError, match=rf"checkpoint/changed.*config\.{name}"):
            train(replace(run, **{name: value}), resume=True, log=quiet)


def test_a_run_of_an_older_minisft_is_refused_with_a_way_on(shop: Path) -> None:
    from minisft.common.safe_json import loads
    from minisft.training.manifest import _seal

    run = stopped(shop, config(shop, shop / "whole"))
    path = Path(run.out) / "checkpoints" / f"step-{STOP}" / "manifest.json"
    document = loads(path.read_bytes())
    assert isinstance(document, dict)
    document.pop("sha256")
    document["identity"] = {"config": {}, "data": {}, "base": None}
    path.write_bytes(_seal(document))
    with pytest.raises(UserError, match=r"checkpoint/older-format.*--init-adapter"):
        train(run, resume=True, log=quiet)


# ---- starting from an adapter ----


@pytest.fixture
def adapter(shop: Path) -> Path:
    return Path(str(train(config(shop, shop / "first", alpha=5.0, targets=("q_proj", "up_proj")), log=quiet).weights))


def start(shop: Path, adapter: Path, **changes: object) -> RunConfig:
    values = {"rank": None, "alpha": None, "init_adapter": str(adapter), "steps": 2, **changes}
    return config(shop, shop / "second", **values)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_training_goes_on_from_the_numbers_of_an_adapter(shop: Path, quant: str) -> None:
    settings = {"alpha": 5.0, "targets": ("q_proj", "up_proj"), "quant": quant}
    first = train(config(shop, shop / "first", **settings), log=quiet)
    assert first.weights is not None
    train(start(shop, first.weights, quant=quant, schedule="constant", lr=1e-12), log=quiet)
    before, after = (load_file(shop / name / "adapter" / "adapter_model.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # a rate of nothing leaves the numbers where they were
        assert torch.allclose(after[name], tensor, atol=1e-9), name
    assert any(bool(t.any()) for name, t in after.items() if "lora_B" in name)
    saved = json.loads((shop / "second" / "config.json").read_text())
    assert (saved["rank"], saved["alpha"], saved["init_adapter"]) == (2, 5.0, str(first.weights))
    model, _ = load_model(shop / "model")
    load_adapter_(model, shop / "second" / "adapter")
    assert {path.rsplit(".", 1)[1] for path in lora_modules(model)} == {"q_proj", "up_proj"}
    assert {layer.alpha for layer in lora_modules(model).values()} == {5.0}


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"rank": 16}, "--rank"), ({"alpha": 32.0}, "--alpha"), ({"use_rslora": True}, "--use-rslora"),
     ({"use_dora": True}, "--use-dora"), ({"targets": ("q_proj",)}, "--targets"), ({"targets": ("all-linear",)}, "--targets")],
)  # fmt: skip
def test_a_setting_that_contradicts_the_adapter_is_refused(
    shop: Path, adapter: Path, change: dict[str, object], flag: str
) -> None:
    with pytest.raises(UserError, match="config/contradicts-adapter") as caught:
        train(start(shop, adapter, **change), log=quiet)
    assert f": {flag}; found" in str(caught.value)
    assert not (shop / "second").exists()


def test_what_agrees_with_the_adapter_may_be_said(shop: Path, adapter: Path) -> None:
    targets = (r".*\.(q|up)_proj",)  # other words for the same layers
    train(start(shop, adapter, rank=2, alpha=5.0, use_dora=False, targets=targets, dropout=0.5), log=quiet)
    settings = json.loads((shop / "second" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (2, 5, 0.5)


def test_a_run_from_an_adapter_resumes_from_the_same_one_wherever_it_lies(shop: Path, adapter: Path) -> None:
    run = stopped(shop, start(shop, adapter), stop=1)
    shutil.move(adapter, shop / "elsewhere")
    train(replace(run, init_adapter=str(shop / "elsewhere")), resume=True, log=quiet)
    assert digest(Path(run.out)) == digest(shop / "second")


def test_another_init_adapter_is_refused_on_resume(shop: Path, adapter: Path) -> None:
    run = stopped(shop, start(shop, adapter), stop=1)
    other = shop / "whole" if (shop / "whole").exists() else shop / "second"
    refused(replace(run, init_adapter=str(other / "adapter")), "init_adapter")


def test_full_training_has_no_adapter_to_start_from(shop: Path) -> None:
    with pytest.raises(UserError, match=r"config/bad-value.*--init-adapter with --method full"):
        config(shop, shop / "run", method="full", init_adapter="x")


def test_plan_counts_the_adapter_that_a_run_starts_from(shop: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model", str(shop / "model"), "--max-length", "32", "--dtype", "fp32", "--json"]
    assert main(["plan", *settings, "--init-adapter", str(adapter)]) == 0
    found = json.loads(capsys.readouterr().out)["items"]["adapters, fp32"]["whole"]
    tensors = load_file(adapter / "adapter_model.safetensors").values()
    assert found == sum(4 * tensor.numel() for tensor in tensors)
