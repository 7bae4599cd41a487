"""The command line's flags: ``train``'s are generated from ``RunConfig``, the others are listed here.

Nothing here needs PyTorch. An unknown flag is answered with the nearest known one, and every message goes through
``UserError``, so the exit status is 2 and there is no usage dump to search through.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NoReturn, get_args

from minisft.cli.flags_data import quality_flags, select_flags
from minisft.cli.flags_export import export_flags, verify_gguf_flags
from minisft.cli.flags_judging import eval_metric_flags, judging_flags
from minisft.cli.flags_lab import NOT_SEARCHED, card_flags, diff_flags, lr_find_flags
from minisft.cli.flags_serve import fast_decode_flag, serve_flags
from minisft.common.checks import check_calibration, check_sampling, require
from minisft.common.errors import UserError, nearest, visible
from minisft.common.settings import field_type, flag_name
from minisft.config import RunConfig
from minisft.evaluation.metrics import Metric
from minisft.training.preference_config import UNUSED_BY_DPO, UNUSED_BY_GRPO, DPOConfig, GRPOConfig

# The settings of a run that decide its memory, or what it learns from.
PLANNED = (
    "model", "data", "eval_data", "map", "template", "turns", "max_length", "method", "init_adapter",
    "rank", "dropout", "use_dora", "optim", "targets", "init", "add_tokens", "train_tokens", "quant", "double_quant",
    "batch_size", "micro_batch_size", "dtype", "checkpointing", "device", "parallel",
)  # fmt: skip
COUNTS = ("max_new_tokens", "limit", "batch_size", "micro_batch_size", "max_length", "rank", "world_size")
METRICS = get_args(Metric)


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` that raises ``UserError`` instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line: ``config/usage``."""
        raise UserError("config/usage", visible(message), where=self.prog, fix=f"{self.prog} --help")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        UserError: an unknown command or flag (names the nearest), a missing or malformed value, flags that contradict.
    """
    parser, commands = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(
            "config/unknown-command", "unknown command", found=visible(argv[0]), expected=" or ".join(commands),
            fix=nearest(argv[0], commands),
        )  # fmt: skip
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands.get(getattr(arguments, "command", ""), parser)
        known = _flags_of(command)
        flag = unknown[0].split("=", 1)[0]
        if arguments.command in ("dpo", "grpo") and flag in _flags_of(commands["train"]):
            raise UserError(
                "config/unknown-flag", f"{arguments.command} has no use for a flag of train", where=command.prog,
                found=visible(flag), fix="leave it away",
            )  # fmt: skip
        raise UserError(
            "config/unknown-flag", "unknown flag", where=command.prog, found=visible(flag),
            fix=nearest(flag, known) or f"{command.prog} --help",
        )  # fmt: skip
    _check_values(arguments)
    return arguments


def _flags_of(command: Parser) -> list[str]:
    return [flag for action in command._actions for flag in action.option_strings]


def _check_values(arguments: argparse.Namespace) -> None:
    """Refuse values that no command could use; the settings of a run are checked by ``RunConfig``."""
    given = vars(arguments)
    for name in COUNTS:
        value = given.get(name)
        require(not isinstance(value, int) or value >= 1, flag_name(name), value, "at least 1", "give a larger number")
    device = given.get("device", "auto")
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is not None
    require(known, "--device", device, "cpu, cuda or auto", "--device auto takes a GPU where there is one")
    scale = given.get("scale", 1.0)
    require(math.isfinite(scale), "--scale", scale, "a finite number", "1 merges the adapter as it was trained")
    if "top_p" in given:
        check_sampling(given["temperature"], given["top_p"], given["top_k"], "--")
    if "calibration" in given and (given["calibration"] is not None or given["command"] != "verify"):  # verify can do without
        check_calibration(given["onto"], given["calibration"])


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and each command's own by name."""
    parser = Parser(prog="minisft", description="Supervised fine-tuning of language models with LoRA.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    made = {
        name: commands.add_parser(name, help=text, description=text, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for name, text in (
            ("train", "fine-tune a model on your rows"),
            ("dpo", "teach a model which of two answers is preferred"),
            ("grpo", "train a model on its own answers and a reward that a program can check"),
            ("eval", "score a model on a file"),
            ("generate", "answer one prompt"),
            ("chat", "talk to a model"),
            ("inspect", "show what would be trained, token by token"),
            ("select", "pick rows to train on: clean, score, keep the diverse ones; every dropped row with its reason"),
            ("quantize", "write a model in 4 bits, as transformers and bitsandbytes load it"),
            ("plan", "print the memory a training run needs, and the bits it can hold, before anything is loaded"),
            ("merge", "fold an adapter into its base and certify the result"),
            ("export", "write a model or an adapter for other programs: GGUF for llama.cpp and Ollama, plain PEFT for vLLM"),
            ("combine", "add several adapters of one base up to one adapter"),
            ("sweep", "score a model at several scales of its update: what the task gains, what general knowledge loses"),
            ("lr-find", "try learning rates on a share of a run and choose by validation loss"),
            ("card", "write a finished run's model card: base, data, settings, results, limits, as they were recorded"),
            ("diff", "what separates two models of one shape: size, rank and new directions of the update, layer by layer"),
            (
                "verify",
                "check that a folder is a base with an adapter merged in, or ask llama.cpp about an exported file",
            ),
            ("compare", "judge two models by the rows that eval wrote: gates, bad cases, a report"),
            ("ab", "plan an A/B test, or judge one from a file"),
            ("arena", "let people compare two models blind, on a page on this machine"),
            ("serve", "answer other programs over HTTP as OpenAI's API does, with adapters by name"),
            ("feedback", "turn votes and thumbs into rates, preference pairs and bad cases"),
            ("quickstart", "generate a task, fine-tune a small model on it, show what it learned and kept"),
        )
    }
    for command in made.values():
        command.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
    _train_flags(made["train"])
    _train_flags(made["dpo"], DPOConfig, UNUSED_BY_DPO)
    _train_flags(made["grpo"], GRPOConfig, UNUSED_BY_GRPO)
    for name in ("eval", "generate", "chat"):
        _model_flags(made[name])
    _eval_flags(made["eval"])
    _scale_flag(made["eval"])
    _sweep_flags(made["sweep"])
    for name in ("generate", "chat"):
        fast_decode_flag(made[name])
        _scale_flag(made[name])
        _sampling_flags(made[name])
    made["generate"].add_argument("--prompt", required=True, metavar="TEXT", help="the user's message")
    _inspect_flags(made["inspect"])
    quality_flags(made["inspect"])
    select_flags(made["select"])
    _quantize_flags(made["quantize"])
    _merge_flags(made["merge"])
    _combine_flags(made["combine"])
    _verify_flags(made["verify"])
    export_flags(made["export"])
    _plan_flags(made["plan"])
    judging_flags(made)
    serve_flags(made["serve"])
    lr_find_flags(made["lr-find"])
    _run_flags(made["lr-find"], [f.name for f in dataclasses.fields(RunConfig) if f.name not in NOT_SEARCHED])
    diff_flags(made["diff"])
    card_flags(made["card"])
    quickstart = made["quickstart"]
    quickstart.add_argument(
        "--out", default="runs/quickstart", metavar="DIR", help="where everything goes (default %(default)s)"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="decides the generated rows and the training (default 0)")
    return parser, made


def _train_flags(parser: Parser, of: type[RunConfig] = RunConfig, unused: Sequence[str] = ()) -> None:
    parser.add_argument("--config", metavar="F.toml", help="settings as a flat TOML table; flags override them")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out; its settings are read from there")
    parser.add_argument("--dry-run", action="store_true", default=False, help="check everything, print the plan, write nothing")
    _run_flags(parser, [field.name for field in dataclasses.fields(of) if field.name not in unused], of)


def _run_flags(parser: Parser, names: Sequence[str], of: type[RunConfig] = RunConfig) -> None:
    """Flags for these fields of a run's settings."""
    for field in (field for field in dataclasses.fields(of) if field.name in names):
        kind, is_tuple, choices = field_type(field.name, of)
        shown = "" if field.default in (dataclasses.MISSING, None, (), "") else f" (default {_shown(field.default)})"
        text, metavar = field.metadata["help"] + shown, field.metadata["metavar"]
        if kind is bool:
            parser.add_argument(flag_name(field.name), action=argparse.BooleanOptionalAction, help=text)
        elif is_tuple:
            parser.add_argument(flag_name(field.name), nargs="+", metavar=metavar, help=text)
        elif choices:
            parser.add_argument(flag_name(field.name), choices=choices, help=text)
        else:
            parser.add_argument(flag_name(field.name), type=kind, metavar=metavar, help=text)


def _plan_flags(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", default=False, help="print the bill as JSON, in bytes")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes that share a step; the bill of one")
    _run_flags(parser, PLANNED)


def _shown(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default).replace("%", "%%")


def _model_flags(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="model folder, GGUF file, hub id or smollm2-135m-instruct")
    parser.add_argument("--adapter", default=None, metavar="DIR", help="adapter folder (PEFT layout)")
    parser.add_argument("--template", default=None, metavar="T", help="chat template: a .jinja file, chatml or plain")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--quant", choices=("none", "nf4"), default="none", help="hold the model's linears in 4 bits")
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --quant: scales in 8 bits (default yes)",
    )
    parser.add_argument("--system", default=None, metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default %(default)s)")


def _scale_flag(parser: Parser) -> None:
    parser.add_argument("--scale", type=float, default=1.0, help="how much of the adapter takes part (default 1)")


def _sweep_flags(parser: Parser) -> None:
    _model_flags(parser)
    parser.set_defaults(scale=1.0)
    parser.add_argument(
        "--tuned",
        default=None,
        metavar="DIR",
        help="instead of --adapter: a full fine-tune of --model, to scale their difference",
    )
    parser.add_argument("--data", required=True, metavar="F", help="rows of the task")
    parser.add_argument("--metric", choices=METRICS, default="exact_match", help="of the task (default %(default)s)")
    parser.add_argument("--general", required=True, metavar="F", help="multiple choice questions, judged by --metric choice")
    parser.add_argument(
        "--scales",
        type=scales,
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        metavar="S,S,...",
        help="of the adapter, or of the difference (default 0,0.25,0.5,0.75,1)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for sweep.json and sweep.svg")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first N rows of each file")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows computed at once (default %(default)s)")
    parser.add_argument("--map", nargs="+", default=(), metavar="FIELD=COLUMN", help="column of --data for a field of ours")


def scales(text: str) -> tuple[float, ...]:
    """``0,0.5,1``; an empty or repeated number is none that was meant."""
    numbers = tuple(float(part) for part in text.split(","))
    if len(set(numbers)) < len(numbers) or not all(map(math.isfinite, numbers)):
        raise ValueError(text)
    return numbers


def _eval_flags(parser: Parser) -> None:
    eval_metric_flags(parser)
    parser.add_argument("--out", required=True, metavar="F.json", help="result; rows go to F.rows.jsonl beside it")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first N rows")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows computed at once (default %(default)s)")
    parser.add_argument("--map", nargs="+", default=(), metavar="FIELD=COLUMN", help="column of your file for a field of ours")


def _sampling_flags(parser: Parser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold this share")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the K likeliest tokens; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")


def _inspect_flags(parser: Parser) -> None:
    parser.add_argument("--model", default=None, metavar="M", help="whose tokenizer and template to use")
    parser.add_argument("--data", required=True, metavar="F", help="rows to look at")
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="longest row in tokens (default %(default)s)")
    parser.add_argument("--map", nargs="+", default=(), metavar="FIELD=COLUMN", help="column of your file for a field of ours")
    parser.add_argument("--template", default=None, metavar="T", help="chat template: a .jinja file, chatml or plain")
    parser.add_argument("--turns", choices=("all", "last"), default="all", help="which assistant turns are trained")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="how many rows to show token by token (default 2)")
    parser.add_argument(
        "--allow-control-tokens", action="store_true", default=False, help="let control tokens in the data act as such"
    )


def _merge_flags(parser: Parser) -> None:
    _merge_source_flags(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="of the written weights; auto: as the base is stored, bf16 for a base in 4 bits",
    )
    parser.add_argument("--data", default=None, metavar="F", help="rows to compare the models on; else a few sentences of ours")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load both models afterwards and compare their answers (default yes)",
    )
    parser.add_argument("--force", action="store_true", default=False, help="write a merge that lost its adapter")


def _combine_flags(parser: Parser) -> None:
    parser.add_argument(
        "--adapter", required=True, nargs="+", metavar="DIR[:WEIGHT]", help="adapter folders, each with its weight (default 1)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the new adapter folder")
    parser.add_argument("--rank", type=int, default=None, metavar="R", help="bring the sum down to this rank")


def _verify_flags(parser: Parser) -> None:
    parser.add_argument("--merged", default=None, metavar="DIR", help="the folder to check")
    verify_gguf_flags(parser)
    _merge_source_flags(parser, needs_adapter=False)
    parser.add_argument("--data", default=None, metavar="F", help="rows to compare the models on, too")


def _merge_source_flags(parser: Parser, needs_adapter: bool = True) -> None:
    parser.add_argument("--adapter", required=needs_adapter, default=None, metavar="DIR", help="adapter folder (PEFT layout)")
    parser.add_argument("--model", default=None, metavar="M", help="the base; by default the one that the adapter names")
    parser.add_argument(
        "--onto",
        choices=("dequantized", "original", "requantized", "compensated"),
        default="dequantized",
        help="for a base trained on in 4 bits: the weights as trained on (default), those before, or 4 bits again, which loses "
        "small updates; compensated: 4 bits with codes fitted to --calibration, for any base, with the model in memory",
    )
    parser.add_argument(
        "--calibration",
        default=None,
        metavar="F",
        help="for --onto compensated: rows like those that will be asked",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="how much of the adapter to merge (default 1)")


def _quantize_flags(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="model folder, GGUF file, hub id or smollm2-135m-instruct")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of what stays dense (default %(default)s)"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store the scales in 8 bits too (default yes)",
    )
    parser.add_argument(
        "--block-size", type=int, default=64, metavar="N", help="weights that share a scale (default %(default)s)"
    )
