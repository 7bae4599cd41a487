"""What happens before PyTorch is loaded: ``import minisft``, ``--help``, and every misuse of the command line."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# Runs each command line in one process in which PyTorch cannot be imported, and prints (status, last line, first line).
WITHOUT_TORCH = """
import contextlib, io, json, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise SystemError(f"PyTorch was asked for")

sys.meta_path.insert(0, NoTorch())
from minisft.cli.main import main

for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        except SystemError as error:
            status = str(error)
    print(json.dumps([status, err.getvalue().strip(), out.getvalue().strip()]))
assert "torch" not in sys.modules
"""

TRAIN = ["train", "--model", "m", "--data", "d", "--out", "o"]
EVAL = ["eval", "--model", "m", "--data", "d", "--metric", "f1", "--out", "o"]
MERGE = ["merge", "--adapter", "a", "--out", "no-such-folder/out"]
GENERATE = ["generate", "--model", "m", "--prompt", "p"]
SWEEP = ["sweep", "--model", "m", "--data", "d", "--general", "g", "--out", "no-such-folder/s"]
LR_FIND = ["lr-find", "--model", "m", "--data", "d", "--out", "no-such-folder/l"]
MISUSES: list[tuple[list[str], str]] = [
    (["trian"], "config/unknown-command"),
    (["train", "--lerning-rate", "1"], "config/unknown-flag"),
    (["train"], "config/missing"),
    (["eval"], "config/usage"),
    (["plan"], "config/missing"),
    ([*TRAIN, "--schedule", "round"], "config/usage"),
    ([*TRAIN, "--rank", "many"], "config/usage"),
    ([*TRAIN, "--rank", "0"], "config/bad-value"),
    ([*TRAIN, "--dropout", "2"], "config/bad-value"),
    ([*TRAIN, "--device", "tpu"], "config/bad-value"),
    ([*TRAIN, "--steps", "3", "--epochs", "1"], "config/bad-value"),
    ([*TRAIN, "--quant", "nf4", "--method", "full"], "config/bad-value"),
    ([*TRAIN, "--batch-size", "3", "--micro-batch-size", "2"], "config/bad-value"),
    ([*TRAIN, "--config", "BROKEN.toml"], "config/bad-toml"),
    ([*TRAIN, "--config", "UNKNOWN.toml"], "config/unknown-key"),
    ([*TRAIN, "--config", "MISSING.toml"], "config/no-file"),
    (["plan", "--model", "m", "--batch-size", "0"], "config/bad-value"),
    (["export", "--out", "m.gguf"], "config/missing"),
    (["export", "--model", "m", "--out", "m.bin"], "config/bad-value"),
    (["export", "--format", "peft", "--adapter", "a", "--out", "no-such-folder/p"], "config/bad-value"),
    (["verify", "--gguf", "m.gguf", "--merged", "d"], "config/bad-value"),
    (["serve", "--model", "m", "--adapter", "red"], "config/bad-adapter"),
    (["serve", "--model", "m", "--api-key-file", "no-such-file"], "config/bad-key"),
    (["serve", "--model", "m", "--max-new-tokens", "0"], "config/bad-value"),
    ([*EVAL, "--metric", "blue"], "config/usage"),
    ([*EVAL, "--limit", "0"], "config/bad-value"),
    ([*EVAL, "--scale", "nan"], "config/bad-value"),
    ([*GENERATE, "--temperature", "-1"], "config/bad-value"),
    ([*GENERATE, "--top-p", "0"], "config/bad-value"),
    ([*GENERATE, "--device", "cuda:x"], "config/bad-value"),
    ([*MERGE, "--onto", "compensated"], "config/no-calibration"),
    ([*MERGE, "--calibration", "c"], "config/unused-calibration"),
    (["combine", "--adapter", "a:b", "--out", "o"], "config/bad-value"),
    (["quantize", "--model", "m", "--out", "o", "--block-size", "7"], "config/bad-value"),
    (SWEEP, "adapter/none"),
    ([*SWEEP, "--tuned", "t", "--adapter", "a"], "config/usage"),
    ([*LR_FIND, "--lrs", "1e-3"], "config/bad-value"),
    ([*LR_FIND, "--lrs", "1e-3", "-1", "1e-2"], "config/bad-value"),
    ([*LR_FIND, "--lrs", "1e-3", "3e-3", "1e-2", "--validation-share", "0"], "config/no-validation"),
    ([*LR_FIND, "--lrs", "1e-3", "3e-3", "1e-2", "--share", "2"], "config/bad-value"),
    ([*LR_FIND, "--lrs", "1e-3", "3e-3", "1e-2", "--lr", "1"], "config/unknown-flag"),
    (["diff", "--a", "a", "--b", "b", "--top", "0"], "config/bad-value"),
]


def child(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment})


def test_every_misuse_is_answered_without_pytorch(tmp_path: Path) -> None:
    (tmp_path / "BROKEN.toml").write_text("rank = ")
    (tmp_path / "UNKNOWN.toml").write_text("rnak = 3")
    argv = [[str(tmp_path / word) if word.endswith(".toml") else word for word in words] for words, _ in MISUSES]
    run = child(WITHOUT_TORCH, json.dumps(argv))
    assert run.returncode == 0, run.stderr
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    for (words, code), (status, err, _) in zip(MISUSES, answers, strict=True):
        assert (status, err.partition("]")[0]) == (4 if code.startswith("adapter") else 2, f"error[{code}"), words
        assert "\n" not in err


def test_help_and_version_need_no_pytorch() -> None:
    argv = [["--version"], ["--help"], *([name, "--help"] for name in ("train", "eval", "merge", "quickstart"))]
    run = child(WITHOUT_TORCH, json.dumps(argv))
    assert run.returncode == 0, run.stderr
    for status, err, out in map(json.loads, run.stdout.splitlines()):
        assert (status, err) == (0, "")
        assert out.startswith(("minisft 0.", "usage: minisft"))


def cpu_seconds(*words: str) -> float:
    """Of a Python process with these arguments, system time included; no wall time, because a test machine is a busy one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, timeout=120, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [["--help"], ["train", "--rank", "0"]], ids=" ".join)
def test_the_answer_comes_at_once(words: list[str]) -> None:
    with_pytorch = cpu_seconds("-c", "import torch")
    assert cpu_seconds("-m", "minisft", *words) < with_pytorch / 3  # a tenth measured


def test_importing_minisft_imports_no_library() -> None:
    heavy = ["torch", "numpy", "safetensors", "tokenizers", "jinja2", "matplotlib", "triton", "gguf"]
    code = f"import minisft, sys; minisft.RunConfig; minisft.UserError; print([m for m in {heavy} if m in sys.modules])"
    assert child(code).stdout == "[]\n"


# Stops at the import of PyTorch and prints what OpenMP would read.
POLICY = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
from minisft.cli.main import main
main(["quickstart", "--out", "never"])
"""


@pytest.mark.parametrize(("given", "used"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_waiting_threads_sleep_unless_the_user_chose(given: dict[str, str], used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert child(POLICY, **given).stdout == f"{used}\n"


def test_an_import_leaves_the_environment_alone() -> None:
    code = "import os; e = dict(os.environ); import minisft, minisft.cli.main; print(e == dict(os.environ))"
    assert child(code).stdout == "True\n"
