"""The Python calls: every public name is what it says whatever was imported before, and each does what its command does."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_architecture import MODULES, PACKAGE, kernel_files
from tiny_folder import write_model, write_rows

import minisft
from minisft.common.errors import UserError
from minisft.data.chat import encode_chat, resolve_template, stop_ids
from minisft.data.messages import Message, read_dataset
from minisft.evaluation.evaluate import evaluate
from minisft.generation import generate

AFTER_EVERYTHING = """
import importlib, json, sys, types
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import minisft
from minisft import *
public = {name: getattr(minisft, name) for name in minisft.__all__}
assert all(globals()[name] is thing for name, thing in public.items())
print(json.dumps({name: [thing.__name__, isinstance(thing, types.ModuleType)] for name, thing in public.items()}))
"""


@pytest.mark.slow
def test_a_public_name_is_its_function_whatever_was_imported_before() -> None:
    """A module of the same name would take its place as soon as anybody imports it."""
    command = [sys.executable, "-c", AFTER_EVERYTHING, json.dumps(sorted(set(MODULES) - kernel_files()))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found == {name: [name, False] for name in minisft.__all__}


def _names_for_type_checkers() -> set[str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_every_list_of_public_names_is_the_same() -> None:
    from minisft import api

    at_once = {name for name in minisft.__all__ if name in vars(minisft)}
    assert sorted({*api.__all__, *at_once}) == minisft.__all__
    assert _names_for_type_checkers() == set(api.__all__)
    assert set(minisft.__all__) <= set(dir(minisft))


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'generat'"):
        minisft.generat  # type: ignore[attr-defined]  # noqa: B018


Loaded = tuple[minisft.CausalLM, minisft.Tokenizer]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("api")
    write_model(folder / "model", folder / "scratch")
    return minisft.load_model(folder / "model")


@pytest.mark.slow
def test_ids_are_continued_with_ids(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.encode("one two three")
    stops = stop_ids(tokenizer, resolve_template(tokenizer))
    assert (
        minisft.generate(model, tokenizer, prompt, max_new_tokens=9)
        == (generate(model, [prompt], max_new_tokens=9, eos_ids=stops)[0])
    )
    drawn = minisft.generate(model, tokenizer, prompt, max_new_tokens=9, temperature=2.0, top_k=5, seed=3)
    assert drawn == generate(model, [prompt], max_new_tokens=9, eos_ids=stops, temperature=2.0, top_k=5, seed=3)[0]


def test_messages_are_answered_with_text(loaded: Loaded) -> None:
    model, tokenizer = loaded
    template = resolve_template(tokenizer)
    messages = (Message("system", "Be brief."), Message("user", "one two"))
    ids = encode_chat(tokenizer, template, messages, add_generation_prompt=True).input_ids
    (new,) = generate(model, [ids], max_new_tokens=9, eos_ids=stop_ids(tokenizer, template))
    as_dicts = [{"role": message.role, "content": message.content} for message in messages]
    for prompt in (messages, as_dicts):
        assert minisft.generate(model, tokenizer, prompt, max_new_tokens=9) == tokenizer.decode(new)


def test_a_string_is_one_user_message(loaded: Loaded) -> None:
    model, tokenizer = loaded
    answer = minisft.generate(model, tokenizer, "one two", max_new_tokens=9)
    assert answer == minisft.generate(model, tokenizer, [{"role": "user", "content": "one two"}], max_new_tokens=9)


def test_the_end_token_is_no_part_of_an_answer(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisft import api

    model, tokenizer = loaded
    first = minisft.generate(model, tokenizer, tokenizer.encode("one"), max_new_tokens=2)
    monkeypatch.setattr(api, "stop_ids", lambda *_: (7,))
    monkeypatch.setattr(api.generation, "generate", lambda *_, **__: [[*first, 7]])
    assert minisft.generate(model, tokenizer, "one") == tokenizer.decode(first)
    assert minisft.generate(model, tokenizer, tokenizer.encode("one")) == [*first, 7]


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "user"}],
        [{"role": "boss", "content": "do"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "a", "images": "b"}],
        ["one", "two"],
    ],
)
def test_what_is_no_message_is_refused(loaded: Loaded, prompt: list[object]) -> None:
    with pytest.raises(minisft.DataError):
        minisft.generate(*loaded, prompt)  # type: ignore[call-overload]


def test_evaluate_reads_the_file_that_the_command_reads(loaded: Loaded, tmp_path: Path) -> None:
    model, tokenizer = loaded
    write_rows(tmp_path / "rows.jsonl")
    examples = read_dataset(tmp_path / "rows.jsonl", keep_duplicates=True).examples
    result = minisft.evaluate(model, tokenizer, tmp_path / "rows.jsonl", "loss", limit=3)
    assert result == evaluate(model, tokenizer, resolve_template(tokenizer), examples, "loss", limit=3)
    assert result == minisft.evaluate(model, tokenizer, examples, "loss", limit=3)
    with pytest.raises(UserError):
        minisft.evaluate(model, tokenizer, tmp_path / "no.jsonl", "loss")


def test_inspect_lists_rows(loaded: Loaded, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    report = minisft.inspect_rows(tmp_path / "rows.jsonl", loaded[1], rows=1)
    assert len(report.shown) == 1


@pytest.mark.slow
def test_merging_files_from_python(tmp_path: Path) -> None:
    """``merge_folder`` and ``merge_and_certify`` give the weights of ``merge``; the latter the files of the command too."""
    write_model(tmp_path / "model", tmp_path / "scratch")
    model, _ = minisft.load_model(tmp_path / "model")
    minisft.apply_lora_(model, minisft.LoRAConfig(rank=2))
    with torch.no_grad():
        for adapter in minisft.lora_modules(model).values():
            adapter.lora_B.normal_(std=0.1)
    minisft.save_adapter(model, tmp_path / "adapter")
    minisft.merge_folder(tmp_path / "adapter", tmp_path / "plain", dtype=torch.float32)
    assert not (tmp_path / "plain" / "merge_report.json").exists()
    for name, compare in (("merged", True), ("unchecked", False)):
        found = minisft.merge_and_certify(tmp_path / "adapter", tmp_path / name, dtype=torch.float32, compare=compare)
        assert str(found.verdict).startswith("equivalent")
        report = json.loads((tmp_path / name / "merge_report.json").read_text())
        assert (report["model"] != "not checked") == compare
    in_memory, _ = minisft.merge(model)
    for folder in ("plain", "merged", "unchecked"):
        again, _ = minisft.load_model(tmp_path / folder)
        for name, weight in in_memory.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), (folder, name)
    minisft.verify(tmp_path / "merged", tmp_path / "adapter").require()


def test_every_command_is_a_call() -> None:
    """The list in ``api.py`` names every command, and every call in it is a public name."""
    from minisft import api
    from minisft.cli.main import COMMANDS

    rows = [line[2:].split(": ", 1) for line in (api.__doc__ or "").splitlines() if line.startswith("- ``")]
    assert {name for commands, _ in rows for name in re.findall(r"``([\w-]+)``", commands)} == set(COMMANDS)
    for _, calls in rows:
        assert set(re.findall(r"``(\w+)", calls)) <= set(minisft.__all__)
