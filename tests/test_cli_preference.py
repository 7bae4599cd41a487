"""``minisft dpo`` and ``minisft grpo`` through the real command line: bad input, resuming, and what they share with ``train``.

Bad input: one clear line, the right exit status, and no run folder left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli_bad_input import Shop
from tiny_folder import CONFIG, TIMES, digest, write_model, write_rows

from minisft.cli.main import main
from minisft.config import LoRAConfig
from minisft.formats import load_adapter_, load_model, save_adapter
from minisft.surgery import apply_lora_, lora_modules
from minisft.training.runlog import read_metrics

pytestmark = pytest.mark.slow

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
PAIRS = [{"prompt": f"say {chr(97 + i)}", "chosen": chr(65 + i), "rejected": chr(66 + i) * 2} for i in range(12)]
PROMPTS = [{"prompt": f"say {chr(97 + i)}", "completion": chr(97 + i)} for i in range(8)]
REWARD = "def reward(answer, row):\n    return sum(ord(c) < 128 for c in answer) / 6\n"


class Preference(Shop):
    """The shop with pairs, prompts and a reward, and short runs of the two commands."""

    @property
    def reward(self) -> str:
        return f"{self.folder / 'reward.py'}:reward"

    def write(self, *rows: object) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def dpo(self, *more: object) -> list[object]:
        return self._words("dpo", "pairs.jsonl", "--batch-size", 4, *more)

    def grpo(self, *more: object) -> list[object]:
        options = ("--prompts-per-step", 2, "--num-generations", 3, "--max-new-tokens", 4, "--reward", self.reward)
        return self._words("grpo", "prompts.jsonl", *options, *more)

    def _words(self, command: str, rows: str, *more: object) -> list[object]:
        words = [
            command, "--model", self.model, "--data", self.folder / rows, "--out", self.out, "--dtype", "fp32", "--steps", 3,
            "--lr", 1e-2, "--seed", 3, *(() if "--method" in more else ("--rank", 2, "--alpha", 3)),
        ]  # fmt: skip
        return [*words, *more]

    def refused(self, exit_code: int, code: str, *said: str, argv: list[object]) -> str:
        """As for every command, and no run folder is left behind."""
        there = self.out.exists()
        message = super().refused(exit_code, code, *said, argv=argv)
        assert self.out.exists() == there
        return message

    def run(self, *argv: object) -> str:
        """What a command prints that ends well."""
        assert main([str(word) for word in argv]) == 0
        return self.capsys.readouterr().out

    def log(self, out: Path | None = None) -> list[dict[str, object]]:
        rows = read_metrics((out or self.out) / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference-shop")
    write_model(folder / "model", folder / "scratch")
    write_rows(folder / "rows.jsonl")
    for name, rows in (("pairs", PAIRS), ("prompts", PROMPTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    model, _ = load_model(folder / "model")
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    with torch.no_grad():
        for adapter in lora_modules(model).values():
            adapter.lora_B.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    save_adapter(model, folder / "adapter")
    return folder


@pytest.fixture
def shop(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Preference:
    shutil.copytree(pristine, tmp_path / "shop")
    return Preference(tmp_path / "shop", capsys)


Command = Callable[..., list[object]]


@pytest.fixture(params=["dpo", "grpo"])
def command(request: pytest.FixtureRequest, shop: Preference) -> Command:
    found: Command = getattr(shop, request.param)
    return found


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--beta", "0"), "bad-value", "--beta"),
        (("--beta", "nan"), "bad-value", "--beta"),
        (("--label-smoothing", "0.5", "--loss", "robust"), "bad-value", "--label-smoothing"),
        (("--label-smoothing", "0.1", "--loss", "ipo"), "bad-value", "--loss sigmoid or robust"),
        (("--rpo-alpha", "-1"), "bad-value", "--rpo-alpha"),
        (("--loss", "dpo"), "usage", "--loss"),
        (("--turns", "last"), "unknown-flag", "dpo has no use for a flag of train"),
        (("--micro-batch-size", "2"), "unknown-flag", "--micro-batch-size"),
        (("--reward", "json"), "unknown-flag", "--reward"),
        (("--dropout", "0.1"), "bad-value", "the reference is computed without dropout"),
        (("--method", "full", "--quant", "nf4"), "bad-value", "--quant with --method full"),
        (("--method", "full", "--init-adapter", "adapter"), "bad-value", "--init-adapter with --method full"),
    ],
)
def test_a_bad_setting_of_dpo(shop: Preference, words: tuple[str, ...], code: str, said: str) -> None:
    shop.refused(2, f"config/{code}", said, argv=shop.dpo(*words))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--num-generations", "1"), "bad-value", "--num-generations"),
        (("--prompts-per-step", "0"), "bad-value", "--prompts-per-step"),
        (("--max-new-tokens", "0"), "bad-value", "--max-new-tokens"),
        (("--max-new-tokens", "64", "--max-length", "64"), "bad-value", "the prompt needs tokens too"),
        (("--max-new-tokens", "600"), "bad-value", "less than --max-length 512"),  # the model's context
        (("--temperature", "0"), "bad-value", "--temperature"),
        (("--beta", "-0.1"), "bad-value", "--beta"),
        (("--epsilon", "1"), "bad-value", "--epsilon"),
        (("--epsilon-high", "inf"), "bad-value", "--epsilon-high"),
        (("--loss", "bnpo"), "usage", "--loss"),
        (("--top-p", "0.9"), "unknown-flag", "--top-p"),
        (("--batch-size", "4"), "unknown-flag", "grpo has no use for a flag of train"),
        (("--dropout", "0.1"), "bad-value", "sampled without dropout"),
        (("--method", "full", "--quant", "nf4"), "bad-value", "--quant with --method full"),
        (("--reward", ""), "bad-value", "--reward"),
        (("--reward", "exact"), "bad-reward", "exact_match, json"),
        (("--reward", "regex:("), "bad-reward", "no regular expression"),
        (("--reward", "absent.py:reward"), "bad-reward", "absent.py:reward"),
    ],
)
def test_a_bad_setting_of_grpo(shop: Preference, words: tuple[str, ...], code: str, said: str) -> None:
    shop.refused(2, f"config/{code}", said, argv=shop.grpo(*words))


def test_a_reward_that_is_not_given_is_the_rewards_own_error(shop: Preference) -> None:
    words = [str(word) for word in shop.grpo()]
    at = words.index("--reward")
    message = shop.refused(2, "config/bad-value", "--reward", argv=[*words[:at], *words[at + 2 :]])
    assert "give exact_match, json, regex:PATTERN or FILE.py:function" in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1", "no such function"),
        ("def reward(answer): return 1", "takes other arguments"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_reward_file_that_cannot_be_used(shop: Preference, body: str, said: str) -> None:
    (shop.folder / "reward.py").write_text(body)
    shop.refused(2, "config/bad-reward", said, argv=shop.grpo())


@pytest.mark.parametrize("settings", ["turns = 'last'", "packing = false", "batch_size = 4", "allow_control_tokens = true"])
def test_a_setting_of_a_file_that_grpo_does_not_read_is_refused(shop: Preference, settings: str) -> None:
    (shop.folder / "run.toml").write_text(settings + "\n")
    name = settings.split(" ")[0]
    message = shop.refused(2, "config/bad-value", argv=shop.grpo("--config", shop.folder / "run.toml"))
    assert name in message or name.replace("_", "-") in message


def test_an_adapter_that_the_settings_contradict(shop: Preference, command: Command) -> None:
    shop.refused(2, "config/contradicts-adapter", "--rank", argv=command("--init-adapter", shop.adapter, "--rank", 4))


# ---- rows ------------------------------------------------------------------------------------------------------------

CONTRADICTION = ({"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "a", "chosen": "y", "rejected": "x"})


def test_a_missing_file(shop: Preference, command: Command) -> None:
    shop.refused(3, "data/no-file", "absent.jsonl", argv=command("--data", shop.folder / "absent.jsonl"))


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, "no-rows", "1 equal"),
        ({"prompt": "a", "chosen": "x", "rejected": " "}, "no-rows", "1 empty"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "3+3?"}, BAD]}, "different-prompts", "message 1 differs"),
        (
            {"chosen": [{"role": "system", "content": "s"}, USER, GOOD], "rejected": [USER, BAD]},
            "different-prompts",
            "message 1",
        ),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD, USER]}, "no-assistant", "rows.jsonl:1"),
        ({"prompt": "a", "chosen": None, "rejected": "x"}, "", "rows.jsonl:1"),
        ({"instruction": "x", "completions": [{"response": "a", "overall_score": 3}]}, "unknown-form", "best and the worst"),
        ({"messages": [USER, GOOD]}, "unknown-form", "--map"),
        ({"prompt": "a", "chosen": "x" * 600, "rejected": "y"}, "no-rows", "no pair fits"),
    ],
)
def test_a_row_that_is_no_pair(shop: Preference, row: object, code: str, said: str) -> None:
    shop.write(row)
    shop.refused(3, f"data/{code}" if code else "data/not-a-message", said, argv=shop.dpo("--data", shop.data))


def test_a_bad_row_of_the_validation_file_is_named_there(shop: Preference) -> None:
    shop.write({"prompt": "a", "chosen": "x"})
    shop.refused(3, "data/unknown-form", "rows.jsonl:1", argv=shop.dpo("--eval-data", shop.data))


def test_what_dpo_drops_or_cuts_is_counted_and_said(shop: Preference) -> None:
    long = {"prompt": "b" * 150, "chosen": "x", "rejected": "y" * 60}
    lost = {"prompt": "c", "chosen": "x", "rejected": "y" * 200}
    shop.write(*PAIRS, {"prompt": "a", "chosen": "x", "rejected": "x"}, *CONTRADICTION, long, lost)
    said = shop.run(*shop.dpo("--data", shop.data, "--max-length", 160, "--validation-share", 0))
    assert "dropped 1 of 17 rows: chosen and rejected are equal" in said
    assert "2 rows contradict another row (same answers, the other one chosen): 14, 15" in said
    assert "1 pairs lost the start of their prompt to --max-length 160, both sides alike" in said
    assert "1 pairs dropped: an answer does not fit --max-length 160: rows 17" in said
    assert "15 pairs to train on, 0 to validate on" in said


@pytest.mark.parametrize(
    ("row", "reward", "code", "said"),
    [
        ({"prompt": "a"}, "exact_match", "no-answer", "another --reward"),
        ({"text": "a"}, "regex:x", "unknown-form", "--map prompt=COLUMN"),
        ({"messages": [GOOD]}, "regex:x", "no-prompt", "rows.jsonl:1"),
        ({"prompt": "a" * 600}, "regex:x", "no-rows", "lower --max-new-tokens"),
    ],
)
def test_a_row_that_cannot_be_asked(shop: Preference, row: object, reward: str, code: str, said: str) -> None:
    shop.write(row)
    shop.refused(3, f"data/{code}", said, argv=shop.grpo("--data", shop.data, "--reward", reward))


@pytest.mark.parametrize("returned", ["'1'", "1 / 0", "10 ** 400", "row['absent']", "__import__('sys').exit(0)"])
def test_a_reward_that_fails_says_where_and_for_which_answer(shop: Preference, returned: str) -> None:
    (shop.folder / "reward.py").write_text(f"def reward(answer, row):\n    return {returned}\n")
    assert main([str(word) for word in shop.grpo()]) == 3  # the run has begun by then: its folder stays, without a result
    printed = shop.capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error[data/reward]")
    assert "prompts.jsonl:" in printed
    assert "for the answer" in printed
    assert not (shop.out / "adapter").exists()
    assert not list(shop.out.glob("checkpoints/*"))


def test_a_reward_without_an_opinion_is_not_0(shop: Preference) -> None:
    """All None: no reward is logged, no weight moves, and nothing claims that the answers were bad."""
    (shop.folder / "reward.py").write_text("def reward(answer, row):\n    return None\n")
    shop.run(*shop.grpo())
    assert all(row["reward"] is None for row in shop.log())
    samples = [json.loads(line) for line in (shop.out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 2 * 3
    assert all(sample["reward"] is None for sample in samples)
    tensors = load_file(shop.out / "adapter" / "adapter_model.safetensors")
    assert all(not bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_answers_of_rows_that_the_reward_does_not_read_are_said(shop: Preference) -> None:
    said = shop.run(*shop.grpo("--reward", "regex:[a-z]*"))
    assert "8 rows have an answer of their own, which --reward regex:[a-z]* does not read" in said
    shutil.rmtree(shop.out)
    assert "answer of their own" not in shop.run(*shop.grpo("--reward", "exact_match"))


# ---- what they share with train --------------------------------------------------------------------------------------

OPTIONS = {
    "checkpointing": ("--checkpointing", "selective"),
    "checkpointing-full": ("--checkpointing", "full"),
    "full": ("--method", "full"),
    "nf4": ("--quant", "nf4"),
    "dora": ("--use-dora",),
    "rslora": ("--use-rslora",),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_train_works(shop: Preference, command: Command, option: str) -> None:
    """The run learns; recomputing activations changes no logged number beyond rounding."""
    kl = ("--beta", 0.05)
    shop.run(*command(*OPTIONS[option], *kl))
    rows = shop.log()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 for row in rows)  # type: ignore[operator]
    assert (shop.out / ("model" if option == "full" else "adapter")).is_dir()
    if option.startswith("checkpointing"):
        shop.run(*command(*kl, "--out", shop.folder / "plain"))
        for found, wanted in zip(rows, shop.log(shop.folder / "plain"), strict=True):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert found[name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name


def test_a_warm_start_goes_on_from_the_adapter(shop: Preference, command: Command) -> None:
    """At a learning rate of nearly nothing the written adapter is the one that it started from."""
    words = [str(word) for word in command("--init-adapter", shop.adapter, "--lr", 1e-12)]
    for flag in ("--rank", "--alpha"):
        at = words.index(flag)
        del words[at : at + 2]
    shop.run(*words)
    found, start = (load_file(folder / "adapter_model.safetensors") for folder in (shop.out / "adapter", shop.adapter))
    assert found.keys() == start.keys()
    for name, tensor in start.items():
        assert torch.allclose(found[name], tensor, atol=1e-9), name


def test_resume_needs_no_other_flag(shop: Preference, command: Command) -> None:
    """Stopped after the first step, the run goes on with the settings of its folder and ends as the whole run does."""
    whole = shop.folder / "whole"
    words = command("--save-every", 1, "--eval-every", 1, "--keep-last", 9)
    shop.run(*words, "--out", whole)
    shutil.copytree(whole, shop.out, ignore=shutil.ignore_patterns("step-[23]"))
    shutil.rmtree(shop.out / "adapter")
    said = shop.run(words[0], "--resume", "--out", shop.out)
    assert "resuming after step 1" in said
    assert digest(shop.out) == digest(whole)
    assert shop.log() == shop.log(whole)
    if words[0] == "grpo":
        assert (shop.out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_a_run_is_resumed_by_its_own_command_alone(shop: Preference, command: Command) -> None:
    words = [str(word) for word in command("--save-every", 1)]
    shop.run(*words)
    for other in ("train", "dpo", "grpo"):
        if other != words[0]:
            argv = [other, "--resume", "--out", shop.out]
            before = digest(shop.out)
            shop.refused(2, "config/other-command", f"minisft {words[0]} --resume", argv=argv)
            assert digest(shop.out) == before


def test_a_run_of_train_is_not_resumed_by_dpo(shop: Preference, command: Command) -> None:
    shop.run(*shop.train())
    argv = [command()[0], "--resume", "--out", shop.out]
    shop.refused(2, "config/other-command", "minisft train --resume", argv=argv)


def test_a_changed_setting_or_file_is_refused_when_resuming(shop: Preference, command: Command) -> None:
    words = command("--save-every", 1)
    shop.run(*words)
    resume = (words[0], "--resume", "--out", shop.out)
    shop.refused(5, "checkpoint/changed", "beta", argv=[*resume, "--steps", 5, "--beta", 0.3])
    rows = shop.folder / ("pairs.jsonl" if words[0] == "dpo" else "prompts.jsonl")
    rows.write_text(rows.read_text().replace("say a", "say z"))
    shop.refused(5, "checkpoint/changed", "data.train", argv=[*resume, "--steps", 5])


def test_a_reference_of_other_rows_is_refused(shop: Preference) -> None:
    """Also where there is no checkpoint yet that could tell."""
    shop.run(*shop.dpo("--save-every", 1))
    shutil.rmtree(shop.out / "checkpoints")
    shutil.rmtree(shop.out / "adapter")
    rows = shop.folder / "pairs.jsonl"
    rows.write_text(rows.read_text().replace("say a", "say z"))
    shop.refused(5, "checkpoint/reference", "other data", argv=["dpo", "--resume", "--out", shop.out])


def test_a_changed_reward_is_refused_when_resuming_and_a_moved_one_is_not(shop: Preference) -> None:
    shop.run(*shop.grpo("--save-every", 1))
    moved = shop.folder / "moved.py"
    moved.write_text(REWARD)
    resume = ["grpo", "--resume", "--out", shop.out]
    shop.run(*resume, "--reward", f"{moved}:reward")
    Path(shop.reward.rpartition(":")[0]).write_text(REWARD.replace("128", "127"))
    for changed in (shop.reward, "exact_match"):
        shop.refused(5, "checkpoint/changed", "reward: ", "reward of a file", argv=[*resume, "--reward", changed])


def test_a_signal_saves_and_the_message_names_the_command(
    shop: Preference, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of step 2: the step is finished and saved, and the run goes on as if nothing had happened."""
    from minisft.training.trainer import Trainer

    whole = shop.folder / "whole"
    words = [str(word) for word in command("--save-every", 3, "--eval-every", 3)]
    shop.run(*words, "--out", whole)
    step = Trainer.step

    def interrupted(self: Trainer[object], number: int, *rest: object) -> object:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert main(words) == 128 + signal.SIGTERM
    said = shop.capsys.readouterr().out
    assert f"stopped by signal {signal.SIGTERM:d} after step 2; to go on: minisft {words[0]} --out" in said
    assert [path.name for path in (shop.out / "checkpoints").glob("step-*")] == ["step-2"]
    assert not (shop.out / "adapter").exists()
    shop.run(words[0], "--resume", "--out", shop.out)
    assert digest(shop.out) == digest(whole)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_the_adapter_gives_the_same_logits_in_peft(shop: Preference, command: Command, warm: bool) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    words = [str(word) for word in command("--lr", 0.05)]
    if warm:
        words += ["--init-adapter", str(shop.adapter)]
    shop.run(*words)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    base = transformers.AutoModelForCausalLM.from_pretrained(shop.model, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, shop.out / "adapter")(ids).logits
        model, _ = load_model(shop.model)
        load_adapter_(model, shop.out / "adapter")
        ours = model(ids)
    assert (theirs - before).abs().max() > 1e-3  # the run has moved it
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
