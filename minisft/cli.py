"""The front door: ``minisft`` and a command (``minisft --help`` lists them), each a few lines over the rooms below.

An error that the user can mend is one line on standard error and an exit status from its family; ``--debug`` shows where it
came from. Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minisft import __version__
from minisft.config import QuantConfig, read_toml, run_config
from minisft.durable import require_outside, require_unused
from minisft.errors import UserError, visible
from minisft.flags import parse
from minisft.machine import DTYPES, pick_device, tune_allocator
from minisft.messages import Message

if TYPE_CHECKING:
    from minisft.combine import Combined
    from minisft.generate import Sampling
    from minisft.model import CausalLM
    from minisft.template import ChatTemplate
    from minisft.tokenizer import Tokenizer

MEMORY_ADVICE = (
    "use a smaller --micro-batch-size (same result), then --checkpointing selective or full, a shorter --max-length, "
    "fewer --targets"
)


def process() -> int:
    """``main`` in a process of its own, which may decide how that ends."""
    # The libraries stay until the end: collections need not walk through them, nor the last one through anything.
    gc.freeze()
    atexit.register(gc.freeze)
    return main()


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
    from minisft.surgery import scale_adapters_

    device = pick_device(arguments.device)
    wide = arguments.dtype == "fp32" or (arguments.dtype == "auto" and device.type == "cpu")
    quant = QuantConfig(arguments.quant, double_quant=arguments.double_quant) if arguments.quant != "none" else None
    model, tokenizer = load_model(arguments.model, torch.float32 if wide else torch.bfloat16, device, quant)
    choice = arguments.template
    if arguments.adapter is not None:
        load_adapter_(model, arguments.adapter)
        saved = Path(arguments.adapter) / "chat_template.jinja"  # an adapter is used with the template it was trained with
        choice = choice or (str(saved) if saved.is_file() else None)
    if arguments.scale != 1.0:
        scale_adapters_(model, arguments.scale)
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


def _sweep(arguments: argparse.Namespace) -> int:
    from minisft.evaluate import EvalResult, Metric, evaluate, terminal_progress
    from minisft.messages import Example, read_dataset
    from minisft.sweep import REPORT, heading, line, sweep

    _check_positive(arguments, "max_new_tokens", "limit", "batch_size")
    out, model_path = Path(arguments.out), Path(arguments.model)
    _check_new_folder(out, model_path)
    if arguments.adapter is None:
        raise UserError("adapter/none", "there is no adapter to scale", where="--adapter", fix="give the adapter's folder")
    task = read_dataset(arguments.data, tuple(arguments.map), keep_duplicates=True).examples
    general = read_dataset(arguments.general, keep_duplicates=True).examples
    model, tokenizer, template = _load(arguments)

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
    asked = score(task, arguments.metric), score(general, "choice")
    points = sweep(model, arguments.scales, *asked, out, lambda point: print(line(point), flush=True))
    print(visible(out))
    if errors := [point.error for point in points if point.error]:
        what = f"{len(errors)} of {len(points)} scales could not be scored"
        raise UserError("numeric/sweep-incomplete", what, where=visible(out / REPORT), found=errors[0])
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


def _quantize(arguments: argparse.Namespace) -> int:
    from minisft.formats import base_fingerprint, load_model, save_quantized

    dtype = DTYPES[arguments.dtype]
    quant = QuantConfig(block_size=arguments.block_size, double_quant=arguments.double_quant)
    _check_new_folder(Path(arguments.out), Path(arguments.model))
    model, tokenizer = load_model(arguments.model, dtype, quant=quant)
    sizes = save_quantized(model, tokenizer, arguments.out, quantized_from=base_fingerprint(model))
    print(
        f"{visible(arguments.out)}: {sizes.num_quantized} linears in 4 bits, {sizes.num_dense} dense; "
        f"{sizes.dense_bytes / 1e6:,.1f} MB in {arguments.dtype}, {sizes.stored_bytes / 1e6:,.1f} MB as stored"
    )
    return 0


def _check_new_folder(out: Path, model: Path) -> None:
    """Refuse a folder that cannot be written before minutes are spent on what would go into it."""
    require_outside(out, model)
    require_unused(out)


def _plan(arguments: argparse.Namespace) -> int:
    from minisft.plan import plan, render

    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "version", "debug", "json")}
    bill = plan(run_config({"data": "", "out": "", **given}, "command line"))
    print(json.dumps(bill.to_dict(), indent=2) if arguments.json else render(bill))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from minisft.certificate import REPORT, certify, check
    from minisft.merge_stream import merge_folder
    from minisft.messages import read_dataset

    out, data = Path(arguments.out), arguments.data
    _check_new_folder(out, Path(arguments.model or arguments.adapter))
    for path in (data, arguments.calibration):
        if path is not None:
            read_dataset(path)  # what is wrong with it is said before minutes are spent
    merged = merge_folder(
        arguments.adapter,
        out,
        arguments.model,
        arguments.onto,
        DTYPES.get(arguments.dtype),  # None: auto
        scale=arguments.scale,
        force=arguments.force,
        calibration=arguments.calibration,
    )
    verdict = certify(merged, None)
    print(merged.summary)
    models = check(merged, data) if arguments.check else None
    verdict = certify(merged, models) if models is not None else verdict
    print(f"{verdict}{'' if models is not None else ', the models were not compared'}; {visible(out / REPORT)}")
    return 0


def _combine(arguments: argparse.Namespace) -> int:
    from minisft.combine import combine_folders

    out = Path(arguments.out)
    combined = combine_folders([_weighted(word) for word in arguments.adapter], out, arguments.rank)
    ranks = sorted({update.rank for update in combined.updates.values()})
    shown = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    print(f"{visible(out)}: {len(combined.updates)} modules of {shown}, {_loss_words(combined)}")
    return 0


def _weighted(word: str) -> tuple[str, float]:
    """``DIR:WEIGHT`` or ``DIR``, whose name may hold a colon too."""
    folder, colon, weight = word.rpartition(":")
    if not colon or Path(word).is_dir():
        return word, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise UserError(
            "config/bad-value", "an adapter's weight is no number", where="--adapter", found=visible(word),
            expected="DIR or DIR:WEIGHT",
        ) from None  # fmt: skip


def _loss_words(combined: Combined) -> str:
    if not combined.errors:
        return "the exact sum"
    worst = max(combined.errors, key=lambda path: combined.errors[path])
    most = f"at most {combined.errors[worst]:.3g} in {visible(worst)}"
    return f"the nearest of this rank: relative error {combined.error:.3g} in all, {most}"


def _verify(arguments: argparse.Namespace) -> int:
    from minisft.certificate import compare_models, judge
    from minisft.verify_merge import verify

    onto = arguments.onto
    found = verify(arguments.merged, arguments.adapter, arguments.model, onto, arguments.scale, arguments.calibration)
    print(found.summary)
    found.require()
    asked = arguments.data is not None or onto == "compensated"  # there only the answers can tell
    models = compare_models(found.files, Path(arguments.merged), arguments.data) if asked else None
    verdict = judge(found.adapted, models, onto)
    print(verdict)
    if not verdict.good:
        where = visible(found.merged)
        raise UserError("numeric/not-this-merge", "the folder is not this merge", where=where, found=str(verdict))
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
    "quantize": _quantize,
    "plan": _plan,
    "merge": _merge,
    "combine": _combine,
    "sweep": _sweep,
    "verify": _verify,
    "quickstart": _quickstart,
}


if __name__ == "__main__":
    sys.exit(process())
