"""The front door: ``minisft train | eval | generate | chat | inspect | quickstart``.

Each command is a few lines over the rooms below. An error that the user can mend is one line on standard error and an exit
status from its family; ``--debug`` shows where it came from. Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minisft import __version__
from minisft.config import read_toml, run_config
from minisft.errors import UserError, visible
from minisft.flags import parse
from minisft.machine import pick_device, tune_allocator
from minisft.messages import Message

if TYPE_CHECKING:
    from minisft.generate import Sampling
    from minisft.model import CausalLM
    from minisft.template import ChatTemplate
    from minisft.tokenizer import Tokenizer

MEMORY_ADVICE = (
    "use a smaller --micro-batch-size (same result), then --checkpointing selective or full, a shorter --max-length, "
    "fewer --targets"
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    warnings.showwarning = _show_warning
    try:
        arguments = parse(words)
        if arguments.version or arguments.command is None:
            print(f"minisft {__version__}" if arguments.version else "minisft: give a command; minisft --help lists them")
            return 0 if arguments.version else 2
        tune_allocator()
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        return _report(error, words)
    except torch.OutOfMemoryError as error:
        return _report(UserError("memory/device", "the GPU's memory is full", found=visible(error), fix=MEMORY_ADVICE), words)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        return _report(UserError("memory/host", "the memory is full", found=visible(error), fix=MEMORY_ADVICE), words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away: not our error
        sys.stderr.close()
        return 141


def _report(error: UserError, words: list[str]) -> int:
    if "--debug" in words:
        raise error
    print(error, file=sys.stderr)
    return error.exit_code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {visible(message, 500)}", file=sys.stderr)


def _train(arguments: argparse.Namespace) -> int:
    from minisft.train import train

    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "version", "debug", "config", "resume")}
    resume = getattr(arguments, "resume", False)
    values: dict[str, object] = {}
    if resume and "out" in given:
        values |= _saved_settings(Path(str(given["out"])))
    where = "command line"
    if config := getattr(arguments, "config", None):
        values |= {key.replace("-", "_"): value for key, value in read_toml(Path(config)).items()}
        where = visible(config)
    result = train(run_config(values | given, where), resume)
    return 0 if result.signal is None else 128 + result.signal


def _saved_settings(out: Path) -> dict[str, object]:
    """The settings that a run was started with; none when it never got that far."""
    path = out / "config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            "checkpoint/bad-config", "the run's settings cannot be read", where=visible(path), found=visible(error)
        ) from None
    return dict(values)


def _load(arguments: argparse.Namespace) -> tuple[CausalLM, Tokenizer, ChatTemplate]:
    from minisft.chat import resolve_template
    from minisft.formats import load_adapter_, load_model

    device = pick_device(arguments.device)
    wide = arguments.dtype == "fp32" or (arguments.dtype == "auto" and device.type == "cpu")
    model, tokenizer = load_model(arguments.model, dtype=torch.float32 if wide else torch.bfloat16, device=device)
    choice = arguments.template
    if arguments.adapter is not None:
        load_adapter_(model, arguments.adapter)
        saved = Path(arguments.adapter) / "chat_template.jinja"  # an adapter is used with the template it was trained with
        choice = choice or (str(saved) if saved.is_file() else None)
    return model.eval(), tokenizer, resolve_template(tokenizer, choice)


def _eval(arguments: argparse.Namespace) -> int:
    from minisft.evaluate import evaluate, write
    from minisft.messages import read_dataset

    _check_positive(arguments, "max_new_tokens", "limit", "batch_size")
    dataset = read_dataset(arguments.data, tuple(arguments.map), keep_duplicates=True)
    for note in dataset.notes:
        print(note)
    model, tokenizer, template = _load(arguments)
    result = evaluate(
        model,
        tokenizer,
        template,
        dataset.examples,
        arguments.metric,
        max_new_tokens=arguments.max_new_tokens,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        system=arguments.system,
    )
    rows = write(result, arguments.out)
    print(f"{result.metric} {result.score:.4f} over {result.n} rows; {visible(arguments.out)}, rows in {visible(rows)}")
    return 0


def _check_positive(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(
                "config/bad-value",
                "a setting is out of range",
                where="--" + name.replace("_", "-"),
                found=str(value),
                expected="at least 1",
            )


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from minisft.generate import Sampling

    return Sampling(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed)


def _prompt_messages(arguments: argparse.Namespace, text: str) -> tuple[Message, ...]:
    system = () if arguments.system is None else (Message("system", arguments.system),)
    return (*system, Message("user", text))


def _generate(arguments: argparse.Namespace) -> int:
    from minisft.chat import encode_chat, stop_ids
    from minisft.generate import stream_chat

    sampling = _sampling(arguments)
    model, tokenizer, template = _load(arguments)
    prompt = encode_chat(tokenizer, template, _prompt_messages(arguments, arguments.prompt), add_generation_prompt=True)
    stream_chat(
        model,
        tokenizer,
        prompt.input_ids,
        _show,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        eos_ids=stop_ids(tokenizer, template),
    )
    print()
    return 0


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _chat(arguments: argparse.Namespace) -> int:
    from minisft.chat import encode_chat, stop_ids
    from minisft.generate import stream_chat

    sampling = _sampling(arguments)
    model, tokenizer, template = _load(arguments)
    stops = stop_ids(tokenizer, template)
    print("An empty line or Ctrl-D ends the chat.", file=sys.stderr)
    history: tuple[Message, ...] = ()
    while text := _ask():
        history = (*history, Message("user", text)) if history else _prompt_messages(arguments, text)
        prompt = encode_chat(tokenizer, template, history, add_generation_prompt=True)
        answer = stream_chat(
            model, tokenizer, prompt.input_ids, _show, max_new_tokens=arguments.max_new_tokens, sampling=sampling, eos_ids=stops
        )
        print()
        history = (*history, Message("assistant", answer))
    return 0


def _ask() -> str:
    with contextlib.suppress(EOFError):
        return input("> " if sys.stdin.isatty() else "").strip()
    return ""


def _inspect(arguments: argparse.Namespace) -> int:
    from minisft.chat import encode_dataset, resolve_template
    from minisft.formats import load_tokenizer
    from minisft.inspect_data import check, inspect_dataset, render
    from minisft.messages import read_dataset

    dataset = read_dataset(arguments.data, tuple(arguments.map))
    tokenizer = load_tokenizer(arguments.model)
    template = resolve_template(tokenizer, arguments.template)
    encoded = encode_dataset(
        dataset.examples,
        tokenizer,
        template,
        arguments.max_length,
        turns=arguments.turns,
        allow_control_tokens=arguments.allow_control_tokens,
        path=arguments.data,
    )
    report = inspect_dataset(dataset, encoded, tokenizer, arguments.max_length, arguments.rows)
    print(render(report, color=sys.stdout.isatty()))
    check(encoded, tokenizer, arguments.max_length)
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from minisft.quickstart import run_quickstart

    run_quickstart(Path(arguments.out), arguments.seed)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "chat": _chat,
    "inspect": _inspect,
    "quickstart": _quickstart,
}


if __name__ == "__main__":
    sys.exit(main())
