"""The Python calls: everything that a command of ``minisft`` does, one function each.

Most stand where they are made and are only listed here; ``generate``, ``evaluate`` and ``inspect_rows`` join what a command
joins: template, tokens, model. ``import minisft`` gives all of them and loads this module when one is first used.

The commands, and the calls that do the same:

- ``train``: ``train(RunConfig(...))``
- ``dpo``: ``dpo(DPOConfig(...))``
- ``grpo``: ``grpo(GRPOConfig(...), reward=None)``
- ``eval``: ``evaluate``
- ``generate``, ``chat``: ``generate``, after ``decode_compressed_``, or ``fast_decode_`` for ``--fast-decode``
- ``inspect``: ``inspect_rows``, and ``inspect_quality`` for ``--quality``
- ``select``: ``select_rows``
- ``quantize``: ``quantize_folder``; step by step ``load_model(..., quant=QuantConfig())`` and ``save_quantized``
- ``plan``: ``plan(RunConfig(...))`` and ``capacity(RunConfig(...))``
- ``merge``: ``merge_and_certify``; without a certificate ``merge_folder``, in memory ``merge``, ``merge_`` and ``unmerge_``
- ``verify``: ``verify_merge``; the tensors alone ``verify``; ``verify_gguf`` for ``--gguf``
- ``export``: ``export_gguf``, and ``export_peft`` for ``--format peft``
- ``combine``: ``combine_folders``
- ``sweep``: ``sweep``, with ``interpolated`` for ``--tuned``
- ``lr-find``: ``lr_find(RunConfig(...), lrs)``
- ``diff``: ``diff_models``
- ``card``: ``write_card``
- ``compare``: ``compare_files`` and ``write_comparison``
- ``ab``: ``plan_ab`` and ``analyze_ab``
- ``arena``: ``open_arena`` and ``serve_arena``
- ``serve``: ``serve``
- ``feedback``: ``read_feedback``, ``make_feedback_rows`` and ``write_feedback``
- ``quickstart``: ``run_quickstart``

``eval``, ``sweep`` and ``arena`` call ``decode_compressed_`` too, and ``serve`` does it by itself, where memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast, get_args, overload

from minisft import generation
from minisft.common.errors import UserError, visible
from minisft.data.chat import Turns, encode_chat, resolve_template, stop_ids
from minisft.data.encoding import encode_dataset
from minisft.data.examples import Example, Message, Role
from minisft.data.inspect_data import Report, inspect_dataset
from minisft.data.messages import read_dataset
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.dora import DoRALinear
from minisft.effect import MergeReport
from minisft.evaluation import evaluate as evaluation
from minisft.evaluation.compressed import decode_compressed_, free_compressed_
from minisft.evaluation.evaluate import EvalResult, Metric
from minisft.evaluation.fast_decode import exact_decode_, fast_decode_
from minisft.evaluation.interpolate import interpolated
from minisft.evaluation.sweep import sweep
from minisft.formats import load_adapter_, load_model, load_tokenizer, save_adapter, save_model, save_quantized
from minisft.judging.ab_plan import plan_ab
from minisft.judging.ab_test import analyze_ab
from minisft.judging.arena import open_arena, serve_arena
from minisft.judging.compare_report import write_comparison
from minisft.judging.comparison import compare_files
from minisft.judging.feedback import make_feedback_rows, write_feedback
from minisft.judging.feedback_file import read_feedback
from minisft.lora import LoRAEmbedding, LoRALinear
from minisft.loss import token_log_probs
from minisft.merge_weights import merge, merge_, unmerge_
from minisft.merging.certified import merge_and_certify, quantize_folder, verify_merge
from minisft.merging.combine_files import combine_folders
from minisft.merging.diff import diff_models
from minisft.merging.export_gguf import export_gguf
from minisft.merging.export_peft import export_peft
from minisft.merging.streaming import merge_folder
from minisft.merging.verify import verify
from minisft.merging.verify_gguf import verify_gguf
from minisft.model import CausalLM
from minisft.nf4_linear import NF4Linear
from minisft.preference import dpo_loss, grpo_loss
from minisft.quality.pool import read_pool
from minisft.quality.report import inspect_quality
from minisft.quickstart.run import run_quickstart
from minisft.selection.run import select_rows
from minisft.serving.server import serve
from minisft.surgery import adapters_off, apply_lora_, lora_modules, quantize_, scale_adapters_
from minisft.training.capacity import capacity
from minisft.training.card import write_card
from minisft.training.lr_find import lr_find
from minisft.training.plan import plan
from minisft.training.preference import dpo, grpo
from minisft.training.train import TrainResult, train

__all__ = [
    "CausalLM",
    "DoRALinear",
    "EvalResult",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "NF4Linear",
    "Tokenizer",
    "TrainResult",
    "adapters_off",
    "analyze_ab",
    "apply_lora_",
    "capacity",
    "combine_folders",
    "compare_files",
    "decode_compressed_",
    "diff_models",
    "dpo",
    "dpo_loss",
    "evaluate",
    "exact_decode_",
    "export_gguf",
    "export_peft",
    "fast_decode_",
    "free_compressed_",
    "generate",
    "grpo",
    "grpo_loss",
    "inspect_quality",
    "inspect_rows",
    "interpolated",
    "load_adapter_",
    "load_model",
    "load_tokenizer",
    "lora_modules",
    "lr_find",
    "make_feedback_rows",
    "merge",
    "merge_",
    "merge_and_certify",
    "merge_folder",
    "open_arena",
    "plan",
    "plan_ab",
    "quantize_",
    "quantize_folder",
    "read_feedback",
    "read_pool",
    "run_quickstart",
    "save_adapter",
    "save_model",
    "save_quantized",
    "scale_adapters_",
    "select_rows",
    "serve",
    "serve_arena",
    "sweep",
    "token_log_probs",
    "train",
    "unmerge_",
    "verify",
    "verify_gguf",
    "verify_merge",
    "write_card",
    "write_comparison",
    "write_feedback",
]

Turn = Message | Mapping[str, str]
ROLES: tuple[Role, ...] = get_args(Role)


def _template(tokenizer: Tokenizer, template: str | ChatTemplate | None) -> ChatTemplate:
    return template if isinstance(template, ChatTemplate) else resolve_template(tokenizer, template)


@overload
def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Turn],
    *,
    template: str | ChatTemplate | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> str: ...


@overload
def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    template: str | ChatTemplate | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]: ...


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Turn] | Sequence[int],
    *,
    template: str | ChatTemplate | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> str | list[int]:
    """Answer a chat with text, or continue token ids with token ids.

    Args:
        model: with or without adapters; its mode stays as it is, and dropout is off meanwhile.
        tokenizer: the model's.
        prompt: token ids; or chat messages, ``{"role": "user", "content": "..."}`` or ``Message``; or a string, which is one
            user message. Special tokens spelt out in a message stay text.
        template: the chat template: ``chatml``, ``plain``, a ``.jinja`` file or a ``ChatTemplate``; by default the model's own.
            For token ids it decides only which tokens end the text; a model without a template ends at its eos.
        max_new_tokens: the most tokens to write.
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it and a token is drawn.
        top_p, top_k: draw only from the likeliest tokens; see ``generation.Sampling``.
        seed: decides every draw.

    Returns:
        For messages the text of the answer, without its end token; for token ids the new ids, where the last one is an end
        token if and only if the text ended by itself.

    Raises:
        UserError: a setting is out of range, a message is none, the model has no chat template, the prompt is empty or
            fills the context.
    """
    is_ids = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], int)
    if is_ids:
        ids = cast("Sequence[int]", prompt)
        needs_template = template is not None or tokenizer.chat_template is not None
        stops = stop_ids(tokenizer, _template(tokenizer, template)) if needs_template else tuple(tokenizer.eos_ids)
    else:
        chosen = _template(tokenizer, template)
        messages = _messages(cast("str | Sequence[Turn]", prompt))
        ids, stops = encode_chat(tokenizer, chosen, messages, add_generation_prompt=True).input_ids, stop_ids(tokenizer, chosen)
    (new,) = generation.generate(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        eos_ids=stops,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    return new if is_ids else tokenizer.decode(new[:-1] if new[-1] in stops else new)


def _messages(prompt: str | Sequence[Turn]) -> tuple[Message, ...]:
    turns: Sequence[Turn] = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    if not turns:
        raise UserError("data/no-messages", "the prompt is empty", expected="token ids, chat messages or a text")
    return tuple(turn if isinstance(turn, Message) else _message(turn, i) for i, turn in enumerate(turns, 1))


def _message(turn: Mapping[str, str], number: int) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    known = next((name for name in ROLES if name == role), None)
    if known is None or not isinstance(content, str) or set(turn) != {"role", "content"}:
        raise UserError(
            "data/not-a-message",
            "a message is not one",
            where=f"message {number}",
            found=visible(repr(turn)),
            expected=f'{{"role": {" or ".join(ROLES)}, "content": text}}',
        )
    return Message(known, content)


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    data: str | Path | Sequence[Example],
    metric: Metric,
    *,
    template: str | ChatTemplate | None = None,
    max_new_tokens: int = 256,
    limit: int | None = None,
    batch_size: int = 16,
    system: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score a model on rows whose last assistant turn is the right answer, as ``minisft eval`` does.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        data: a file of rows in any form that training reads, or ``Example`` values. Rows that occur twice count twice.
        metric: ``exact_match``, ``json``, ``f1``, ``choice`` or ``loss``; see ``minisft.evaluation.evaluate``.
        template: the chat template, as for ``generate``.
        max_new_tokens: longest answer.
        limit: only the first rows; None for all.
        batch_size: rows computed at once; never changes a result (but for rounding).
        system: put before rows that have no system turn.
        progress: called with (rows done, rows in all).

    Returns:
        the score, the number of rows and every row; ``minisft.evaluation.evaluate.write`` writes them.

    Raises:
        UserError: a file that cannot be read, no rows, a row without an answer or too long for the model, an unknown metric.
    """
    examples = read_dataset(data, keep_duplicates=True).examples if isinstance(data, (str, Path)) else data
    return evaluation.evaluate(
        model,
        tokenizer,
        _template(tokenizer, template),
        examples,
        metric,
        max_new_tokens=max_new_tokens,
        limit=limit,
        batch_size=batch_size,
        system=system,
        progress=progress,
    )


def inspect_rows(
    data: str | Path,
    tokenizer: Tokenizer,
    *,
    template: str | ChatTemplate | None = None,
    max_length: int = 1024,
    turns: Turns = "all",
    rows: int = 2,
) -> Report:
    """What training would learn from a file, token by token, as ``minisft inspect`` shows it.

    Args:
        data: the file.
        tokenizer: the model's, see ``load_tokenizer``.
        template: the chat template, as for ``generate``.
        max_length: longest row in tokens.
        turns: which assistant turns are trained, ``all`` or ``last``.
        rows: how many rows to list token by token.

    Returns:
        the report; ``minisft.data.inspect_data.render`` makes lines of it.

    Raises:
        UserError: a file that cannot be read, rows of no known form, a template that fails.
    """
    dataset = read_dataset(data)
    encoded = encode_dataset(
        dataset.examples, tokenizer, _template(tokenizer, template), max_length, turns=turns, path=str(data)
    )
    return inspect_dataset(dataset, encoded, tokenizer, max_length, rows)
