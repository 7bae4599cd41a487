"""A minisft model for lm-evaluation-harness: its tasks, with the same numbers as its own Hugging Face backend.

``MinisftLM(model, tokenizer)`` is what ``lm_eval.simple_evaluate(model=...)`` takes. Adapters and 4-bit weights take part as
they are, so a fine-tune is scored before it is merged or exported:

    import lm_eval, minisft
    from minisft.evaluation.lm_eval_adapter import MinisftLM

    model, tokenizer = minisft.load_model("smollm2-135m-instruct")
    minisft.load_adapter_(model, "runs/a/adapter")
    found = lm_eval.simple_evaluate(model=MinisftLM(model, tokenizer), tasks=["arc_easy"], limit=100)

Texts are read as the harness's backend reads them: special tokens spelt out in a prompt are special tokens (chat templates
write them so), and a begin token is added where the tokenizer adds one and the text has none. ``MinisftLM`` is made when it is
first asked for, because it is a subclass of a class of the harness (extra ``eval-harness``).

It refuses beam search, penalties and what else the harness may pass on to a generator that minisft does not have.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from minisft.common.errors import UserError, listing, visible
from minisft.common.extras import require_extra
from minisft.data.chat import resolve_template
from minisft.data.examples import Message
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.plain_text import prefix_id, token_windows
from minisft.evaluation.results import terminal_progress
from minisft.generation import generate, no_dropout
from minisft.loss import CHUNK_ELEMENTS
from minisft.model import CausalLM

if TYPE_CHECKING:
    MinisftLM: Any  # see __getattr__

LogLikelihood = tuple[float, bool]
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # what was asked, context ids, continuation ids
DEFAULT_NEW_TOKENS = 256  # the harness's own, where a task names none
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_READ = ("until", "do_sample", "temperature", "top_p", "top_k", *_LENGTH_NAMES)
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}  # said by some tasks, changes nothing


class Request(Protocol):
    """What the harness asks: an ``lm_eval.api.instance.Instance``."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Texts, and for generation the settings behind them."""


class HarnessModel:
    """What ``MinisftLM`` adds to ``lm_eval.api.model.TemplateLM``; the harness calls its methods.

    Args:
        model: any, with or without adapters; dropout is off meanwhile.
        tokenizer: the model's.
        template: its chat template, for ``simple_evaluate(apply_chat_template=True)``; by default the model's own, if any.
        batch_size: requests computed at once; never changes a number (but for rounding).
        max_length: tokens of context; the model's own by default. Longer requests are cut on the left.
        add_bos: whether texts begin with the begin token; by default as the tokenizer says.
    """

    cache_hook: Any

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos: bool | None = None,
    ) -> None:
        super().__init__()
        context = model.config.max_position_embeddings
        length = context if max_length is None else max_length
        if not 2 <= length <= context or batch_size < 1:
            found, fix = f"max_length {length}, batch_size {batch_size}", "leave max_length out for the model's own"
            expected = f"max_length of 2 to {context}, batch_size of 1 or more"
            raise UserError("config/bad-value", "a setting is out of range", found=found, expected=expected, fix=fix)
        self.model, self.text_tokenizer, self.batch_size, self.max_length = model, tokenizer, batch_size, length
        self._add_bos = tokenizer.adds_bos if add_bos is None else add_bos
        if isinstance(template, str) or (template is None and tokenizer.chat_template is not None):
            template = resolve_template(tokenizer, template)
        self._template = template

    # --- texts and ids

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.text_tokenizer.eos_ids[0] if self.text_tokenizer.eos_ids else self.text_tokenizer.pad_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text follows."""
        return prefix_id(self.text_tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text in which special tokens may be spelt out.

        Args:
            string: the text.
            add_special_tokens: put the begin token before it; None: as the tokenizer does, unless the text has it.

        Returns:
            the ids.
        """
        ids = self.text_tokenizer.encode(string, control=True)
        if add_special_tokens is None:
            spelt_out = self.text_tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = self._add_bos and not string.startswith(spelt_out)
        begin = self.text_tokenizer.bos_id
        return [begin, *ids] if add_special_tokens and begin is not None else ids

    @property
    def tokenizer_name(self) -> str:
        """A name that changes with the chat template and the special tokens, for the harness's cache of requests."""
        source = "" if self._template is None else self._template.source
        said = repr((source, sorted(self.text_tokenizer.special_tokens.items()), self.text_tokenizer.vocab_size))
        return f"minisft-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source for the harness's records, None when no template is asked for."""
        return self._require_template().source if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text; without the generation prompt it ends with the last message's own words, to be continued."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]  # checked by the template
        text = self._require_template().render(messages, add_generation_prompt).text
        if add_generation_prompt:
            return text
        whole, last = messages[-1].content.lstrip(), messages[-1].content.strip()
        at = text.rindex(last)
        return text[:at] + (whole if text.startswith(whole, at) else last)

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            fix = "MinisftLM(..., template='chatml'), or apply_chat_template=False"
            raise UserError("tokenizer/no-template", "the model has no chat template", fix=fix)
        return self._template

    # --- scoring

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: object
    ) -> list[LogLikelihood]:
        """Each continuation's log-probability after its context, and whether greedy decoding would write it.

        Requests that differ only in their last token, as letters of one question do, are read once.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_asked, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                found, expected = f"{len(continuation)} tokens", f"1 to {self.max_length}"
                raise UserError("data/continuation-length", "a continuation cannot be scored", found=found, expected=expected)
            rows.setdefault(tuple([*context, *continuation][-self.max_length - 1 : -1]), []).append(index)
        order = sorted(rows, key=lambda ids: -len(ids))
        scores: dict[int, LogLikelihood] = {}
        with no_dropout(self.model), terminal_progress("requests") as progress:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                hidden_BTD = self._hidden(batch)
                for hidden_TD, ids in zip(hidden_BTD, batch, strict=True):
                    for index in rows[ids]:
                        scores[index] = self._score(hidden_TD[: len(ids)], requests[index][2])
                        self._remember("loglikelihood", requests[index][0], scores[index])
                if progress is not None and not disable_tqdm:
                    progress(len(scores), len(requests))
        return [scores[index] for index in range(len(requests))]

    def _hidden(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Hidden states (B, T, D) of rows that are padded on the right."""
        longest, pad, device = max(map(len, rows)), self.text_tokenizer.pad_id, self.model.device
        input_ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return self.model.hidden(input_ids, segment_ids=(torch.arange(longest, device=device) < lengths[:, None]).long())

    def _score(self, hidden_TD: Tensor, continuation: Sequence[int]) -> LogLikelihood:
        """sum_t log p(c_t) of tokens that the last hidden states predict; logits in slices, in fp32 at least."""
        targets_N = torch.tensor(continuation, device=hidden_TD.device)
        total, is_greedy, size = 0.0, True, max(1, CHUNK_ELEMENTS // self.model.config.vocab_size)
        parts = zip(hidden_TD[-len(continuation) :].split(size), targets_N.split(size), strict=True)
        for hidden_ND, targets in parts:
            logits_NV = self.model.head(hidden_ND)
            log_probs_NV = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
            total += float(log_probs_NV.gather(-1, targets[:, None]).sum())
            is_greedy &= bool((log_probs_NV.argmax(-1) == targets).all())
        return total, is_greedy

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows as long as the context, every token once."""
        texts: list[str] = [request.args[0] for request in requests]
        parts = [list(token_windows([self.prefix_token_id, *self.tok_encode(text)], self.max_length)) for text in texts]
        windows: list[TokenRequest] = [(None, part.context, part.target) for each in parts for part in each]
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in each) for each in parts]
        for text, total in zip(texts, totals, strict=True):
            self._remember("loglikelihood_rolling", (text,), total)
        return totals

    # --- writing

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first of its stop texts, which is cut off."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=lambda item: item[0])), []).append(index)
        found: dict[int, str] = {}
        with terminal_progress("requests") as progress:
            for indices in groups.values():
                settings = dict(requests[indices[0]].args[1])
                texts = self._continue([requests[index].args[0] for index in indices], settings)
                for index, text in zip(indices, texts, strict=True):
                    found[index] = text
                    self._remember("generate_until", tuple(requests[index].args), text)
                if progress is not None and not disable_tqdm:
                    progress(len(found), len(requests))
        return [found[index] for index in range(len(requests))]

    def _continue(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        limit, until, sampling = _generation_settings(settings)
        if not 0 < limit < self.max_length:
            found, expected, fix = f"{limit} new tokens", f"1 to {self.max_length - 1}", "set max_gen_toks in gen_kwargs"
            raise UserError(
                "config/bad-value", "the new tokens leave no place for a prompt", found=found, expected=expected, fix=fix
            )
        prompts = [self._prompt(text)[-(self.max_length - limit) :] for text in contexts]
        written: list[list[int]] = [[] for _ in prompts]
        reach = max((len(stop.encode()) for stop in until), default=0) + 2  # tokens that can hold the end of a stop text

        def is_over(index: int, token: int) -> bool:
            written[index].append(token)
            tail = self.text_tokenizer.decode(written[index][-reach:]) if until else ""
            return any(stop in tail for stop in until)

        ids = generate(
            self.model, prompts, max_new_tokens=limit, eos_ids=self.text_tokenizer.eos_ids, batch_size=self.batch_size,
            on_token=is_over, **sampling,
        )  # fmt: skip
        return [_cut(self.text_tokenizer.decode(row), until) for row in ids]

    def _prompt(self, text: str) -> list[int]:
        """The context's ids; of an empty one the token that a text follows."""
        return self.tok_encode(text) or [self.prefix_token_id]

    def _remember(self, kind: str, asked: tuple[Any, ...] | None, answer: object) -> None:
        if asked is not None:
            self.cache_hook.add_partial(kind, asked, answer)


def _generation_settings(given: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """(most new tokens, stop texts, settings of ``generate``) from a task's generation settings.

    Raises:
        UserError: settings that minisft does not have.
    """
    other = [name for name in given if name not in _READ and (name not in _NEUTRAL or given[name] != _NEUTRAL[name])]
    if other:
        found, expected = f"{listing(other)}: {visible({name: given[name] for name in other}, 80)}", listing(_READ)
        fix = "set them in gen_kwargs, or score the merged model with the harness's own backend"
        raise UserError("config/generation-setting", "no such setting here", found=found, expected=expected, fix=fix)
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else [stop for stop in until if stop]
    limit = next((int(given[name]) for name in _LENGTH_NAMES if given.get(name) is not None), DEFAULT_NEW_TOKENS)
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample", temperature > 0):
        sampling = {name: given[name] for name in ("top_p", "top_k") if given.get(name) is not None}
        return limit, until, {"temperature": temperature or 1.0, **sampling}
    return limit, until, {}


def _cut(text: str, stops: Iterable[str]) -> str:
    """The text before the first of the stop texts."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@functools.cache
def _harness_class() -> type:
    require_extra("eval-harness", "lm_eval")
    from lm_eval.api.model import TemplateLM

    class MinisftLM(HarnessModel, TemplateLM):
        """A minisft model as lm-evaluation-harness sees it; see ``HarnessModel``."""

    return MinisftLM


def __getattr__(name: str) -> type:
    """``MinisftLM``, made when it is asked for.

    Raises:
        AttributeError: another name.
        UserError: lm-evaluation-harness is not installed.
    """
    if name == "MinisftLM":
        return _harness_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
