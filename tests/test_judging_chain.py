"""From two models to pairs that ``dpo`` trains on, by the commands alone: eval, compare, arena in a browser, feedback, dpo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from machine import free_port
from rows_files import write_jsonl
from test_arena import person, until
from tiny_folder import rows, write_shop

from minisft.cli.main import main

NUM_PROMPTS = 4


@pytest.mark.slow
def test_two_models_are_compared_voted_on_and_the_votes_train(tmp_path, browser, capsys):
    shop = write_shop(tmp_path)
    model, adapter = shop / "model", shop / "run" / "adapter"
    test = write_jsonl(tmp_path / "test.jsonl", rows(24))
    run(f"train --model {model} --data {shop / 'rows.jsonl'} --out {shop / 'run'} --steps 6 --batch-size 4 --rank 2 --lr 0.05")
    for name, more in (("base", ""), ("tuned", f"--adapter {adapter}")):
        run(f"eval --model {model} {more} --data {test} --metric loss --out {tmp_path / name}.json")
    pair = f"{tmp_path / 'base.rows.jsonl'} {tmp_path / 'tuned.rows.jsonl'}"
    run(f"compare {pair} --data {test} --gate task>=-10 --out {tmp_path / 'report'}")
    assert "SHIP" in capsys.readouterr().out

    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {letter * 3}"} for letter in "abcd"[:NUM_PROMPTS]])
    votes = tmp_path / "votes"
    port = free_port()
    command = f"arena --a {model} --b {model}+{adapter} --prompts {prompts} --out {votes} --port {port} --max-new-tokens 6"
    with serving(command) as address:
        vote_for_all(browser, address)
    result = json.loads((votes / "arena.json").read_text())
    assert result["headline"]["enough"] is False  # a handful of votes

    run(f"feedback --in {votes / 'votes.sqlite'} --eval {test} --out {tmp_path / 'made'}")
    pairs = [json.loads(line) for line in (tmp_path / "made" / "pairs.jsonl").read_text().splitlines()]
    assert 1 <= len(pairs) <= NUM_PROMPTS
    assert {p["source"] for p in pairs} == {"vote"}
    assert all(p["chosen"] != p["rejected"] for p in pairs)
    dpo = f"dpo --model {model} --init-adapter {adapter} --data {tmp_path / 'made' / 'pairs.jsonl'} --out {tmp_path / 'dpo'}"
    run(f"{dpo} --steps 1 --batch-size {len(pairs)} --validation-share 0")
    assert (tmp_path / "dpo" / "adapter" / "adapter_model.safetensors").is_file()
    # What was trained on may not be judged by: the guard's hashes keep those prompts out of the next evaluation.
    assert len((tmp_path / "made" / "trained_prompts.sha256").read_text().split()) == len(pairs)


def run(command: str) -> None:
    assert main(command.split()) == 0, command


class serving:  # noqa: N801  # a context manager reads as one word
    """The command ``minisft arena`` in a process of its own, ended as a person ends it."""

    def __init__(self, command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-m", "minisft", *command.split()]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "http://" in line:  # said once the page can be opened
                return "http://" + line.split("http://")[1].split()[0]
        raise AssertionError("the arena said no address")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)


def vote_for_all(browser, address: str) -> None:
    """Always for the longer answer, by key (1 is left, 4 is right): a person with a taste, whichever side it stands on."""
    problems: list[str] = []
    page = person(browser, address, problems)
    for _ in range(NUM_PROMPTS):
        until(page, "ready")
        lengths = [len(text) for text in page.locator(".answer").all_inner_texts()]
        ticket = page.evaluate("current.ticket")
        page.keyboard.press("1" if lengths[0] >= lengths[1] else "4")
        until(page, f"current === null || current.ticket !== {json.dumps(ticket)}")
    page.context.close()
    assert problems == []
