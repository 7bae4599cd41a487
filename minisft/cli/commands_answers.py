"""The commands that ask a model: ``sweep``, ``generate`` and ``chat``; ``eval`` has a module of its own.

Each loads the model and its adapter the same way and is a few lines over the modules below; see ``cli.main`` for errors and
output.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.cli.libraries import load_libraries
from minisft.common.atomic_files import require_new_folder
from minisft.common.errors import UserError, visible
from minisft.config import QuantConfig

if TYPE_CHECKING:
    from minisft.data.messages import Message
    from minisft.data.template import ChatTemplate
    from minisft.data.tokenizer import Tokenizer
    from minisft.generation import Sampling
    from minisft.model import CausalLM


def load_adapted(arguments: argparse.Namespace, writes: bool = True) -> tuple[CausalLM, Tokenizer, ChatTemplate]:
    """The model with its adapter, its tokenizer and its chat template, as the flags name them.

    Args:
        arguments: of the command.
        writes: text, alone: then ``read_compressed_``, unless it is to read 8.
    """
    from minisft.common.device import answering_dtype, pick_device
    from minisft.data.chat import resolve_template
    from minisft.formats import load_adapter_, load_model
    from minisft.formats.adapter import saved_template
    from minisft.formats.adapter_rows import saved_tokenizer
    from minisft.surgery import scale_adapters_

    device = pick_device(arguments.device)
    quant = QuantConfig(arguments.quant, double_quant=arguments.double_quant) if arguments.quant != "none" else None
    model, tokenizer = load_model(arguments.model, answering_dtype(arguments.dtype, device), device, quant)
    choice = arguments.template
    if arguments.adapter is not None:
        load_adapter_(model, arguments.adapter)
        choice, tokenizer = choice or saved_template(arguments.adapter), saved_tokenizer(arguments.adapter, tokenizer)
    if arguments.scale != 1.0:
        scale_adapters_(model, arguments.scale)
    if writes and not getattr(arguments, "fast_decode", False):
        read_compressed_(model)
    return model.eval(), tokenizer, resolve_template(tokenizer, choice)


def read_compressed_(*models: CausalLM) -> None:
    """``decode_compressed_if_memory_allows_`` of all models that will write; where it does not, standard error says so."""
    from minisft.evaluation.compressed import decode_compressed_if_memory_allows_

    decode_compressed_if_memory_allows_(models, lambda line: print(line, file=sys.stderr))


def sweep_command(arguments: argparse.Namespace) -> int:
    """Task score against general score, at several scales of the adapter."""
    out, model_path = Path(arguments.out), Path(arguments.model)
    require_new_folder(out, model_path)
    _check_scaled(arguments)
    load_libraries()
    from minisft.data.messages import Example, read_dataset
    from minisft.evaluation.evaluate import EvalResult, Metric, evaluate, terminal_progress
    from minisft.evaluation.interpolate import interpolated
    from minisft.evaluation.sweep import REPORT, heading, line, scaled, sweep

    task = read_dataset(arguments.data, tuple(arguments.map), keep_duplicates=True)
    general = read_dataset(arguments.general, keep_duplicates=True)
    at = scaled if arguments.tuned is None else interpolated(arguments.model, arguments.tuned)
    model, tokenizer, template = load_adapted(arguments)
    for note in (*(f"{visible(d.path)}: {note}" for d in (task, general) for note in d.notes), *tokenizer.notes):
        print(note)

    def score(examples: Sequence[Example], metric: Metric) -> Callable[[CausalLM], EvalResult]:
        def ask(model: CausalLM) -> EvalResult:
            with terminal_progress(metric) as progress:
                return evaluate(
                    model,
                    tokenizer,
                    template,
                    examples,
                    metric,
                    max_new_tokens=arguments.max_new_tokens,
                    limit=arguments.limit,
                    batch_size=arguments.batch_size,
                    system=arguments.system,
                    progress=progress,
                )

        return ask

    print(heading(arguments.metric, "choice"))
    asked = score(task.examples, arguments.metric), score(general.examples, "choice")
    points = sweep(model, arguments.scales, *asked, out, lambda point: print(line(point), flush=True), at)
    print(visible(out))
    if errors := [point.error for point in points if point.error]:
        what = f"{len(errors)} of {len(points)} scales could not be scored"
        raise UserError("numeric/sweep-incomplete", what, where=visible(out / REPORT), found=errors[0])
    return 0


def _check_scaled(arguments: argparse.Namespace) -> None:
    """What is scaled is an adapter or the difference of two models, one of them."""
    if arguments.adapter is None and arguments.tuned is None:
        fix = "give the adapter's folder, or with --tuned that of a full fine-tune"
        raise UserError("adapter/none", "there is no adapter to scale", where="--adapter", fix=fix)
    if arguments.tuned is None:
        return
    for flag, is_given in (("--adapter", arguments.adapter is not None), ("--quant", arguments.quant != "none")):
        if is_given:
            what, fix = "two flags contradict each other", f"leave {flag} away, or --tuned"
            raise UserError("config/usage", what, where="minisft sweep", found=f"--tuned and {flag}", fix=fix)


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from minisft.generation import Sampling

    return Sampling(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed)


def _prompt_messages(arguments: argparse.Namespace, text: str) -> tuple[Message, ...]:
    from minisft.data.messages import Message

    system = () if arguments.system is None else (Message("system", arguments.system),)
    return (*system, Message("user", text))


def generate_command(arguments: argparse.Namespace) -> int:
    """Answer one prompt, token by token."""
    load_libraries()
    _answerer(arguments)(_prompt_messages(arguments, arguments.prompt))
    return 0


def _answerer(arguments: argparse.Namespace) -> Callable[[Sequence[Message]], str]:
    """Loads the model; what answers messages as they come, knows what it has read before, and gives the whole answer."""
    from minisft.data.chat import encode_chat, stop_ids
    from minisft.generation import ChatCache, stream_chat

    sampling, kept = _sampling(arguments), ChatCache()
    model, tokenizer, template = load_adapted(arguments)
    settings = {"max_new_tokens": arguments.max_new_tokens, "eos_ids": stop_ids(tokenizer, template), "sampling": sampling}
    _show_notes(tokenizer)
    if arguments.fast_decode:
        from minisft.evaluation.fast_decode import fast_decode_
        from minisft.merging.golden import prompts

        print(fast_decode_(model, [prompt.ids for prompt in prompts(tokenizer, template)]), file=sys.stderr)

    def answer(messages: Sequence[Message]) -> str:
        prompt = encode_chat(tokenizer, template, messages, add_generation_prompt=True).input_ids
        said = stream_chat(model, tokenizer, prompt, _show, **settings, kept=kept)
        print()
        return said

    return answer


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _show_notes(tokenizer: Tokenizer) -> None:
    """What was guessed of the tokenizer, beside the answer: only that is on standard output."""
    for note in tokenizer.notes:
        print(note, file=sys.stderr)


def chat_command(arguments: argparse.Namespace) -> int:
    """Answer on and on, until an empty line."""
    load_libraries()
    from minisft.data.messages import Message

    answer = _answerer(arguments)
    print("An empty line or Ctrl-D ends the chat.", file=sys.stderr)
    history: tuple[Message, ...] = ()
    while text := _ask():
        history = (*history, Message("user", text)) if history else _prompt_messages(arguments, text)
        history = (*history, Message("assistant", answer(history)))
    return 0


def _ask() -> str:
    with contextlib.suppress(EOFError):
        return input("> " if sys.stdin.isatty() else "").strip()
    return ""
