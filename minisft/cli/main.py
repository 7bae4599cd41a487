"""The command line: ``minisft`` and a command (``minisft --help`` lists them), each a few lines over the modules below.

Everything that can be checked without PyTorch is checked before it is loaded, so that a mistyped flag is answered at once.
An error that the user can correct is one line on standard error and an exit status from its family; ``--debug`` shows where it
came from. Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from minisft import __version__
from minisft.cli import (
    commands_answers,
    commands_data,
    commands_eval,
    commands_export,
    commands_judging,
    commands_lab,
    commands_serve,
    commands_weights,
)
from minisft.cli.flags import parse
from minisft.cli.libraries import load_libraries
from minisft.common.errors import UserError, visible
from minisft.common.settings import config_of, read_toml
from minisft.config import RunConfig, run_config
from minisft.parallel.launch import num_processes, reports
from minisft.training.preference_config import DPOConfig, GRPOConfig

if TYPE_CHECKING:
    from minisft.training.trainer import TrainResult

Config = TypeVar("Config", bound=RunConfig)

MEMORY_ADVICE = (
    "use a smaller --micro-batch-size (same result), then --checkpointing selective or full, a shorter --max-length, "
    "fewer --targets"
)


def process() -> int:
    """``main`` with the words that this process was started with: what the installed command calls."""
    return main(sys.argv[1:])


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    warnings.showwarning = _show_warning
    try:
        arguments = parse(words)
        _require_one_process(arguments.command)
        if arguments.version or arguments.command is None:
            print(f"minisft {__version__}" if arguments.version else "minisft: give a command; minisft --help lists them")
            return 0 if arguments.version else 2
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        return _report(error, words)
    except (MemoryError, RuntimeError) as error:
        full = _memory_error(error)
        if full is None:
            raise
        return _report(full, words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away: not our error
        sys.stderr.close()
        return 141
    except OSError as error:  # a path that cannot even be looked up: too long, a ring of links, a folder closed to us
        if error.filename is None:
            raise
        return _report(_path_error(error), words)


SEVERAL_PROCESSES = ("train", "dpo", "grpo")  # what torchrun may start more than once


def _require_one_process(command: str | None) -> None:
    """Refuse what processes cannot share: each would do all of it, and write to the same files."""
    if command not in SEVERAL_PROCESSES and (number := num_processes()) > 1:
        raise UserError(
            "config/one-process", f"{command} runs in one process", where="torchrun", found=f"WORLD_SIZE {number}",
            expected=" or ".join(SEVERAL_PROCESSES), fix="start it without torchrun",
        )  # fmt: skip


def _path_error(error: OSError) -> UserError:
    found, fix = error.strerror or type(error).__name__, "check the path and its permissions"
    return UserError("config/path", "a path cannot be used", where=visible(error.filename), found=visible(found), fix=fix)


def _memory_error(error: MemoryError | RuntimeError) -> UserError | None:
    """The user's error for one that means full memory; None for any other."""
    if isinstance(error, RuntimeError):
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return UserError("memory/device", "the GPU's memory is full", found=visible(error), fix=MEMORY_ADVICE)
        if "can't allocate memory" not in str(error):
            return None
    return UserError("memory/host", "the memory is full", found=visible(error), fix=MEMORY_ADVICE)


def _report(error: UserError, words: list[str]) -> int:
    if "--debug" in words:
        raise error
    if reports(error):
        print(error, file=sys.stderr)
    return error.exit_code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if os.environ.get("RANK", "0") == "0":  # one process of several
        print(f"warning: {visible(message, 500)}", file=sys.stderr)


def _train(arguments: argparse.Namespace) -> int:
    run = _run_settings(arguments, RunConfig)
    load_libraries()
    from minisft.training.train import train

    return _ended(train(run, _resumes(arguments), dry_run=arguments.dry_run))


def _dpo(arguments: argparse.Namespace) -> int:
    run = _run_settings(arguments, DPOConfig)
    load_libraries()
    from minisft.training.preference import dpo

    return _ended(dpo(run, _resumes(arguments), dry_run=arguments.dry_run))


def _grpo(arguments: argparse.Namespace) -> int:
    run = _run_settings(arguments, GRPOConfig)
    load_libraries()
    from minisft.training.preference import grpo

    return _ended(grpo(run, resume=_resumes(arguments), dry_run=arguments.dry_run))


def _resumes(arguments: argparse.Namespace) -> bool:
    return bool(getattr(arguments, "resume", False))


def _ended(result: TrainResult) -> int:
    if num_processes() > 1:  # the others end too: torchrun's SIGTERM for the first that has must not change our status
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0 if result.signal is None else 128 + result.signal


def _run_settings(arguments: argparse.Namespace, kind: type[Config]) -> Config:
    """The settings of a run: those it was started with, then ``--config``, then the flags."""
    ours = ("command", "version", "debug", "config", "resume", "dry_run")
    given = {k: v for k, v in vars(arguments).items() if k not in ours}
    resume = _resumes(arguments)
    values: dict[str, object] = {}
    if resume and "out" in given:
        values |= _saved_settings(Path(str(given["out"])), kind)
    where = "command line"
    if config := getattr(arguments, "config", None):
        values |= _config_file(Path(config), kind)
        where = visible(config)
    if resume and given.keys() & {"steps", "epochs"}:  # one of them replaces whichever the run was started with
        values |= {"steps": None, "epochs": None}
    return config_of(kind, values | given, where)


def _config_file(path: Path, kind: type[RunConfig]) -> dict[str, object]:
    values = {key.replace("-", "_"): value for key, value in read_toml(path).items()}
    if kind is GRPOConfig and "batch_size" in values:
        raise UserError(
            "config/bad-value", "grpo counts prompts, not rows", where=f"{visible(path)}: batch_size",
            found=visible(values["batch_size"]), expected="prompts_per_step", fix="call it prompts_per_step",
        )  # fmt: skip
    return values


def _saved_settings(out: Path, kind: type[RunConfig]) -> dict[str, object]:
    """The settings that a run was started with; none when it never got that far."""
    path = out / "config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            "checkpoint/bad-config",
            "the run's settings cannot be read",
            where=visible(path),
            found=visible(error),
            fix="start a new run in another folder",
        ) from None
    command, expected = _command_of(dict(values)), RUNS[kind]
    if command != expected:
        raise UserError(
            "config/other-command", "the run was started by another command", where=visible(out),
            found=f"minisft {expected} --resume", expected=f"minisft {command} --resume",
            fix=f"go on with minisft {command}, or choose another --out",
        )  # fmt: skip
    return dict(values)


RUNS: dict[type[RunConfig], str] = {DPOConfig: "dpo", GRPOConfig: "grpo", RunConfig: "train"}


def _command_of(values: dict[str, object]) -> str:
    """Which command's settings these are: the first one all of whose settings are there."""
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in RUNS}
    own = {kind: fields - names[RunConfig] for kind, fields in names.items()}
    return next(RUNS[kind] for kind in RUNS if own[kind] <= values.keys())


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.quality:
        return commands_data.quality_command(arguments)
    commands_data.require_model(arguments)
    load_libraries()
    from minisft.data.chat import resolve_template
    from minisft.data.encoding import encode_dataset
    from minisft.data.inspect_data import check, inspect_dataset, render
    from minisft.data.messages import read_dataset
    from minisft.formats import context_length, load_tokenizer
    from minisft.training.untrained_tokens import untrained_tokens_of

    dataset = read_dataset(arguments.data, tuple(arguments.map), allow_tokens=True)
    tokenizer = load_tokenizer(arguments.model)
    template = resolve_template(tokenizer, arguments.template)
    context = context_length(arguments.model)
    max_length = min(arguments.max_length, context or arguments.max_length)
    encoded = encode_dataset(
        dataset.examples,
        tokenizer,
        template,
        max_length,
        turns=arguments.turns,
        allow_control_tokens=arguments.allow_control_tokens,
        path=arguments.data,
    )
    report = inspect_dataset(dataset, encoded, tokenizer, max_length, arguments.rows)
    print(render(report, color=sys.stdout.isatty()))
    for note in untrained_tokens_of(arguments.model, tokenizer, encoded.rows):
        print(f"note: {note}\n")
    if max_length < arguments.max_length and (longer := sum(n > max_length for n in encoded.lengths)):
        print(f"{longer} rows are longer than the model's context of {max_length} tokens: cut or dropped, as above")
    check(encoded, tokenizer, max_length, context)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "version", "debug", "json", "world_size")}
    run = run_config({"data": "", "out": "", **given}, "command line")
    load_libraries()
    from minisft.training.capacity import capacity
    from minisft.training.capacity import render as render_capacity
    from minisft.training.plan import plan, render

    bill, bits = plan(run, arguments.world_size), capacity(run)
    if arguments.json:
        print(json.dumps({**bill.to_dict(), "capacity": bits.to_dict()}, indent=2))
    else:
        print(f"{render(bill)}\n\n{render_capacity(bits)}")
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    load_libraries()
    from minisft.quickstart.run import run_quickstart

    run_quickstart(Path(arguments.out), arguments.seed)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "dpo": _dpo,
    "grpo": _grpo,
    "eval": commands_eval.eval_command,
    "generate": commands_answers.generate_command,
    "chat": commands_answers.chat_command,
    "inspect": _inspect,
    "select": commands_data.select_command,
    "quantize": commands_weights.quantize_command,
    "plan": _plan,
    "merge": commands_weights.merge_command,
    "export": commands_export.export_command,
    "combine": commands_weights.combine_command,
    "sweep": commands_answers.sweep_command,
    "lr-find": commands_lab.lr_find_command,
    "diff": commands_lab.diff_command,
    "card": commands_lab.card_command,
    "verify": commands_weights.verify_command,
    "compare": commands_judging.compare_command,
    "ab": commands_judging.ab_command,
    "arena": commands_judging.arena_command,
    "serve": commands_serve.serve_command,
    "feedback": commands_judging.feedback_command,
    "quickstart": _quickstart,
}


if __name__ == "__main__":
    sys.exit(process())
