"""Chat templates: the text of a chat, rendered by the model's own Jinja2 program in a sandbox.

A template is code from a stranger. It runs in Jinja2's immutable sandbox, which reaches no attribute with an underscore and
changes nothing it is given; before it runs here for the first time, it is compiled and rendered once in a child process with
limits on CPU time and memory; its size and its output are capped. The rendering equals transformers' ``apply_chat_template``.

It refuses templates that fail any of this, naming the template's line. The one idea: ``{% generation %}`` blocks report the
character spans that the assistant writes, so that what is trained is read off the rendering, never searched for afterwards.
"""

from __future__ import annotations

import datetime
import functools
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from minisft.common.errors import UserError, visible
from minisft.common.sandbox import TrialError, failure
from minisft.data.messages import Message
from minisft.data.special_tokens import ControlText, Span

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
    """A compiled chat template. One rendering at a time: it is not for several threads.

    Args:
        source: Jinja2 source, at most 64 KiB.
        special: what the template may name, for instance ``{"eos_token": "<|im_end|>"}``.
        trusted: True for minisft's own templates only: skips the trial run in a limited child process.

    Raises:
        UserError: ``tokenizer/template...`` for a template that is too large, is not Jinja2, loops, or raises.
    """

    def __init__(self, source: str, special: Mapping[str, str], *, trusted: bool = False) -> None:
        self.source = source
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            found, expected = f"{len(source)} characters", f"at most {MAX_TEMPLATE_BYTES} bytes"
            raise UserError("tokenizer/template-too-large", "the chat template is too large", found=found, expected=expected)
        if not trusted:
            _probe(source, tuple(sorted(special.items())))
        try:
            self._program = _Program(source, special)
        except TEMPLATE_FAILURES as error:
            raise _template_error(_diagnosis(error)) from None
        self.has_generation_blocks = self._program.has_generation_blocks

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The chat as text.

        Args:
            messages: the chat; the template sees role and content of each.
            add_generation_prompt: end with the words that open an assistant's turn.

        Raises:
            UserError: ``tokenizer/template``: the template raised (its own words and line), or wrote over 1 MiB of its own.
        """
        try:
            return self._program.render(messages, add_generation_prompt)
        except TEMPLATE_FAILURES as error:
            raise _template_error(_diagnosis(error)) from None


class _Program:
    """The compiled template itself; whatever its code raises comes through."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace, "dict": _dict}
        )
        recorder = environment.extensions[_GenerationBlock.identifier]
        assert isinstance(recorder, _GenerationBlock)
        self._blocks = recorder
        self._special = dict(special)
        self._template = environment.from_string(source)
        calls = environment.parse(source).find_all(jinja2.nodes.ExtensionAttribute)
        self.has_generation_blocks = any(call.name == "note_block" for call in calls)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        chat = [{"role": m.role, "content": m.content} for m in messages]
        pieces: list[str] = []
        room = MAX_OUTPUT_CHARACTERS + sum(len(m.content) for m in messages)
        self._blocks.open(pieces)
        variables = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        for piece in self._template.generate({**variables, **self._special}):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise jinja2.TemplateError("it writes more than 1 MiB beside the messages")
        text = "".join(pieces)
        return Rendered(text, self._blocks.spans(text))


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: renders its body and notes where it lies in the output."""

    tags = {"generation"}  # noqa: RUF012  (Jinja2 declares it so)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.open([])

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("note_block"), [], [], body).set_lineno(line)

    def open(self, pieces: list[str]) -> None:
        """Begin a rendering whose output is collected in ``pieces``."""
        self._pieces = pieces
        self._blocks: list[tuple[int, str]] = []

    def note_block(self, caller: Callable[[], str]) -> str:
        # All that precedes the block has been yielded by now, unless the block stands inside a macro or a {% set %}.
        text = caller()
        self._blocks.append((sum(map(len, self._pieces)), text))
        return text

    def spans(self, rendered: str) -> tuple[tuple[int, int], ...]:
        """The spans of the blocks, checked against the finished text."""
        if not all(rendered.startswith(text, start) for start, text in self._blocks):
            raise jinja2.TemplateError("a generation block stands inside a macro or a set block")
        return tuple((start, start + len(text)) for start, text in self._blocks)


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


def _template_error(problem: str) -> UserError:
    return UserError(
        "tokenizer/template",
        "the chat template failed",
        found=visible(problem),
        expected="a rendering within 2 s and 512 MiB",
        fix="mend the template, or give another one: --template chatml, plain or a .jinja file",
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _dict(*pairs: Mapping[str, object], **items: object) -> dict[str, object]:
    return dict(*pairs, **items)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's own filter escapes HTML characters, which a model would then learn.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- where the answers lie ----


def render_with_answers(
    template: ChatTemplate, messages: Sequence[Message], turns: Turns, add_generation_prompt: bool, control: ControlText
) -> tuple[str, list[Span]]:
    """The chat's text and the character spans of the answers to train, in order, each with its end-of-turn token.

    Args:
        turns: every assistant turn, or only the last; those with ``train`` False are left out.
        add_generation_prompt: end where the assistant would begin to write; there are no answers then.
        control: the tokenizer's control tokens: an answer ends with the one that closes it.

    Raises:
        UserError: ``tokenizer/template-spans``, ``tokenizer/template-prefix``: the rendering does not show where answers lie.
    """
    rendered = template.render(messages, add_generation_prompt)
    wanted = [] if add_generation_prompt else _wanted_turns(messages, turns)
    if not wanted:
        return rendered.text, []
    if template.has_generation_blocks:
        spans = _block_spans(rendered, messages, wanted, control)
    else:
        spans = [_prefix_span(template, messages, i, rendered.text) for i in wanted]
    return rendered.text, [_without_trailing_space(rendered.text, span, control) for span in spans]


def _wanted_turns(messages: Sequence[Message], turns: Turns) -> list[int]:
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    return [i for i in (answers[-1:] if turns == "last" else answers) if messages[i].train]


def _block_spans(rendered: Rendered, messages: Sequence[Message], wanted: list[int], control: ControlText) -> list[Span]:
    """The generation blocks of the wanted turns; a control token right behind a block closes the turn and belongs to it."""
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    blocks = rendered.generation_spans
    if len(blocks) != len(answers):
        found, expected = f"{len(blocks)} generation blocks", f"{len(answers)}, one for each assistant turn"
        raise UserError(
            "tokenizer/template-spans", "the chat template does not mark every answer", found=found, expected=expected
        )
    spans = []
    for start, end in (blocks[answers.index(i)] for i in wanted):
        closing = control.pattern.match(rendered.text, end)
        is_closed = rendered.text[start:end].rstrip().endswith(control.tokens)
        spans.append((start, closing.end() if closing and not is_closed else end))
    return spans


def _prefix_span(template: ChatTemplate, messages: Sequence[Message], i: int, text: str) -> Span:
    """Turn i lies between the rendering of all before it, with the generation prompt, and the rendering up to it."""
    before = template.render(messages[:i], add_generation_prompt=True).text
    until = text if i == len(messages) - 1 else template.render(messages[: i + 1]).text
    if not (text.startswith(until) and until.startswith(before)):
        raise UserError(
            "tokenizer/template-prefix",
            "the chat template renders part of a chat differently from the whole, so the answers cannot be told apart",
            where=f"message {i + 1} of {len(messages)}",
            expected="each part to be the beginning of the whole",
            fix="--turns last, or --template FILE.jinja with {% generation %} blocks",
        )
    return len(before), len(until)


def _without_trailing_space(text: str, span: Span, control: ControlText) -> Span:
    """Cut what follows the end-of-turn token: the newline before the next turn is not the assistant's."""
    start, end = span
    visible_end = start + len(text[start:end].rstrip())
    return (start, visible_end) if text.endswith(control.tokens, start, visible_end) else span
