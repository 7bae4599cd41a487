"""Chat templates: the text of a chat, rendered by the model's own Jinja2 program in a sandbox.

A template is untrusted code. It runs in Jinja2's immutable sandbox, which reaches no attribute with an underscore and
changes nothing it is given; before it runs here for the first time, it is compiled and rendered once in a child process with
limits on CPU time and memory; its size and its output are capped. The rendering equals transformers' ``apply_chat_template``.
``{% generation %}`` blocks report the character spans that the assistant writes.

It refuses templates that fail any of this, naming the template's line.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from minisft.common.errors import UserError, visible
from minisft.common.sandbox import CPU_SECONDS, MEMORY_BYTES, TrialError, failure
from minisft.data.examples import Message
from minisft.data.special_tokens import Span
from minisft.data.tokenizer import Tokenizer

Turns = Literal["all", "last"]
MAX_TEMPLATE_BYTES = 64 * 1024
# What a rendering may add to the text of the messages themselves.
MAX_OUTPUT_CHARACTERS = 2**20
# Everything a Jinja2 program can raise at run time; MemoryError and RecursionError from loops that grow.
TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    MemoryError,
    RecursionError,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# No markup at all, for base models: the contents one after the other, each answer closed by the end token.
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Rendered:
    """A chat's text, and the (start, end) character spans of its ``{% generation %}`` blocks, in order."""

    text: str
    generation_spans: tuple[Span, ...]


class ChatTemplate:
    """A compiled chat template. Several threads may render it at once, as a server does.

    Args:
        source: Jinja2 source, at most 64 KiB.
        special: what the template may name, for instance ``{"eos_token": "<|im_end|>"}``.
        trusted: True for minisft's own templates only: skips the trial run in a limited child process.
        now: the time that ``strftime_now`` writes; by default that of each rendering.

    Raises:
        UserError: ``tokenizer/template...`` for a template that is too large, is not Jinja2, loops, or raises.
    """

    def __init__(
        self, source: str, special: Mapping[str, str], *, trusted: bool = False, now: datetime.datetime | None = None
    ) -> None:
        self.source = source
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            found, expected = f"{len(source)} characters", f"at most {MAX_TEMPLATE_BYTES} bytes"
            raise UserError("tokenizer/template-too-large", "the chat template is too large", found=found, expected=expected)
        if not trusted:
            _probe(source, tuple(sorted(special.items())))
        try:
            self._program = _Program(source, special, now)
        except TEMPLATE_FAILURES as error:
            raise _template_error(_diagnosis(error)) from None
        self.has_generation_blocks = self._program.has_generation_blocks

    @functools.cached_property
    def generation_prompt(self) -> str:
        """The words that open an assistant's turn, as a chat of one question shows them; empty where there are none."""
        question = [Message("user", "Hello?")]
        try:
            without, whole = self.render(question).text, self.render(question, add_generation_prompt=True).text
        except UserError:
            return ""
        return whole.removeprefix(without) if whole.startswith(without) else ""

    @property
    def sha256(self) -> str:
        """Hash of the source, as it is kept with runs and results."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def dates(self) -> dict[str, str]:
        """What the template has written of the time so far, by the form it asked for."""
        return dict(self._program.dates)

    def reads(self, name: str) -> bool:
        """Whether the template names this field of a message at all."""
        return name in self.source

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The chat as text.

        Args:
            messages: the chat; the template sees role, content and further ``fields`` of each.
            add_generation_prompt: end with the words that open an assistant's turn.

        Raises:
            UserError: ``tokenizer/template``: the template raised (its own words and line), or wrote over 1 MiB of its own.
        """
        try:
            return self._program.render(messages, add_generation_prompt)
        except TEMPLATE_FAILURES as error:
            what, fix = "the chat template refuses these messages", f"change or drop the row, or {_OTHER_TEMPLATE}"
            raise UserError("tokenizer/template", what, found=visible(_diagnosis(error)), fix=fix) from None


class _Program:
    """The compiled template itself; whatever its code raises comes through."""

    def __init__(self, source: str, special: Mapping[str, str], now: datetime.datetime | None = None) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        self.dates: dict[str, str] = {}
        environment.globals.update(
            {
                "raise_exception": _raise_exception,
                "strftime_now": _clock(now, self.dates),
                "namespace": _Namespace,
                "dict": _dict,
            }
        )
        recorder = environment.extensions[_GenerationBlock.identifier]
        assert isinstance(recorder, _GenerationBlock)
        self._blocks = recorder
        self._special = dict(special)
        self._template = environment.from_string(source)
        calls = environment.parse(source).find_all(jinja2.nodes.ExtensionAttribute)
        self.has_generation_blocks = any(call.name == "note_block" for call in calls)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        chat = [{"role": m.role, "content": m.content, **dict(m.fields)} for m in messages]
        pieces: list[str] = []
        left = MAX_OUTPUT_CHARACTERS + sum(len(text) for m in messages for text in m.texts)
        self._blocks.open(pieces)
        variables = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        for piece in self._template.generate({**variables, **self._special}):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise jinja2.TemplateError("it writes more than 1 MiB beside the messages")
        text = "".join(pieces)
        return Rendered(text, self._blocks.spans(text))


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: renders its body and notes where it lies in the output."""

    tags = {"generation"}  # noqa: RUF012  (Jinja2 declares it so)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._rendering = threading.local()  # a rendering stays in its thread, and there may be several at once

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("note_block"), [], [], body).set_lineno(line)

    def open(self, pieces: list[str]) -> None:
        """Start a rendering whose output is collected in ``pieces``."""
        self._rendering.pieces, self._rendering.blocks = pieces, []

    def note_block(self, caller: Callable[[], str]) -> str:
        # All that precedes the block has been yielded by now, unless the block stands inside a macro or a {% set %}.
        text = caller()
        self._rendering.blocks.append((sum(map(len, self._rendering.pieces)), text))
        return text

    def spans(self, rendered: str) -> tuple[tuple[int, int], ...]:
        """The spans of the blocks, checked against the finished text."""
        blocks: list[tuple[int, str]] = self._rendering.blocks
        if not all(rendered.startswith(text, start) for start, text in blocks):
            raise jinja2.TemplateError("a generation block stands inside a macro or a set block")
        return tuple((start, start + len(text)) for start, text in blocks)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` without underscore names, which could lead to Python's internals."""

    def __init__(self, **values: object) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")
        super().__setitem__(name, value)


@functools.lru_cache(maxsize=64)
def _probe(source: str, special: tuple[tuple[str, str], ...]) -> None:
    # Compiling is part of the trial: Jinja2 folds constants, so {{ 'x' * 10**12 }} already runs at compile time.
    def trial() -> None:
        question, answer = Message("user", "Hello?"), Message("assistant", "Hello!")
        try:
            program = _Program(source, dict(special))
            program.render([question, answer], add_generation_prompt=False)
            program.render([question], add_generation_prompt=True)
        except TEMPLATE_FAILURES as error:
            raise TrialError(_diagnosis(error)) from None

    problem = failure(trial)
    if problem is not None:
        raise _template_error(problem)


def _diagnosis(error: BaseException) -> str:
    """The template's line, the kind of error and its words."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else lines[-1] if lines else None
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"template line {line}: {words}" if line else words


_OTHER_TEMPLATE = "give another template: --template chatml, plain or a .jinja file"


def _template_error(problem: str) -> UserError:
    limits = {
        "it ran longer than": f"a rendering within {CPU_SECONDS} s",
        "it needed more than": f"at most {MEMORY_BYTES >> 20} MiB",
    }
    expected = next((limit for words, limit in limits.items() if problem.startswith(words)), "")
    return UserError(
        "tokenizer/template",
        "the chat template failed",
        found=visible(problem),
        expected=expected,
        fix=f"correct the template, or {_OTHER_TEMPLATE}",
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _dict(*pairs: Mapping[str, object], **items: object) -> dict[str, object]:
    return dict(*pairs, **items)


def _clock(now: datetime.datetime | None, written: dict[str, str]) -> Callable[[str], str]:
    def write(form: str) -> str:
        written[form] = (now or current_time()).strftime(form)
        return written[form]

    return write


def current_time() -> datetime.datetime:
    """Local time, as templates write it."""
    return datetime.datetime.now()


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's own filter escapes HTML characters, which a model would then learn.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- which template ----


def resolve_template(tokenizer: Tokenizer, choice: str | None = None, now: datetime.datetime | None = None) -> ChatTemplate:
    """The chat template to use: the model's own, ``chatml``, ``plain`` (for base models), or a ``.jinja`` file.

    Args:
        tokenizer: the model's.
        choice: ``chatml``, ``plain`` or the path of a file; None for the model's own.
        now: the time for templates that write it; by default that of each rendering.

    Returns:
        The compiled template.

    Raises:
        UserError: ``tokenizer/no-template`` when the model has none and none is chosen; ``tokenizer/no-eos`` for ``plain``
            without an end token; ``tokenizer/template`` for one that fails.
    """
    special = tokenizer.special_names
    if choice == "chatml":
        return ChatTemplate(CHATML, special, trusted=True)
    if choice == "plain":
        if "eos_token" not in special:
            fix = "take a tokenizer whose config names its eos_token"
            raise UserError("tokenizer/no-eos", "plain needs an end token to close the answers", found="no eos_token", fix=fix)
        bos = "{{ bos_token }}" if tokenizer.adds_bos and "bos_token" in special else ""
        return ChatTemplate(bos + PLAIN, special, trusted=True)
    if choice is not None:
        return ChatTemplate(_read_template(Path(choice)), special, now=now)
    if tokenizer.chat_template is None:
        expected = "a chat template in the model folder"
        fix = "--template plain for a base model, --template chatml, or a .jinja file"
        raise UserError("tokenizer/no-template", "the model has no chat template", expected=expected, fix=fix)
    return ChatTemplate(tokenizer.chat_template, special, now=now)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else visible(error)
        expected = "chatml, plain or a .jinja file"
        fix = f"--template {expected}"
        raise UserError(
            "config/bad-template", "cannot read the template", where=visible(path), found=found, expected=expected, fix=fix
        ) from None
