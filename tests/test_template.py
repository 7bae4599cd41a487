"""Chat templates: equal to transformers, spans where the assistant writes, and hostile templates refused."""

from __future__ import annotations

import datetime
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import cpu_unit_s
from texts import GENERATION, LLAMA3

from minisft.common.errors import UserError
from minisft.data.messages import Message
from minisft.data.template import CHATML, PLAIN, ChatTemplate, Rendered

pytestmark = pytest.mark.slow

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FEATURES = """
{%- set ns = namespace(count=0) %}{% set seen = dict(a=1) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if tools is not none %}{{ raise_exception('tools') }}{% endif %}
  {{ ns.count }}:{{ m | tojson }}{{ seen.a }}{{ m.content[:3] | upper }}
{%- endfor %}
"""
TEMPLATES = {
    "chatml": CHATML, "plain": PLAIN, "llama3": LLAMA3, "generation": GENERATION, "system": DEFAULT_SYSTEM, "features": FEATURES
}  # fmt: skip

chats = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text(st.characters(exclude_categories=["Cs"]))),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(chat=chats, add_generation_prompt=st.booleans())
def test_rendering_equals_transformers(name: str, chat: list[Message], add_generation_prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = TEMPLATES[name]
    dicts = [{"role": m.role, "content": m.content} for m in chat]
    texts, spans = utils.render_jinja_template(
        [dicts],
        chat_template=source,
        return_assistant_tokens_mask="generation" in source,
        add_generation_prompt=add_generation_prompt,
        **SPECIAL,
    )
    rendered = _compiled(source).render(chat, add_generation_prompt)
    assert rendered.text == texts[0]
    assert list(rendered.generation_spans) == (spans[0] if spans else [])


_cache: dict[str, ChatTemplate] = {}


def _compiled(source: str) -> ChatTemplate:
    if source not in _cache:
        _cache[source] = ChatTemplate(source, SPECIAL)
    return _cache[source]


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (messages|attr('__class__')).mro() }}",
    "{{ '{0.__class__.__base__}'.format(messages) }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(UserError, match=r"error\[tokenizer/template\].*template line 1"):
        ChatTemplate(source, SPECIAL)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**11 }}",
        "{{ strftime_now('%Y' * 10**9) }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "x" * 70_000,
    ],
)
def test_a_template_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises(UserError, match="tokenizer/template"):
        ChatTemplate(source, SPECIAL)


def test_a_template_cannot_loop() -> None:
    started = time.process_time()
    with pytest.raises(UserError, match="ran longer than 2 s"):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", SPECIAL)
    assert time.process_time() - started < 1  # all the time was the child's


def test_errors_name_the_line_and_the_template_s_own_words() -> None:
    with pytest.raises(UserError, match="template line 3: TemplateError: roles must alternate") as caught:
        ChatTemplate("a\nb\n{{ raise_exception('roles must alternate') }}", SPECIAL)
    assert caught.value.exit_code == 4
    with pytest.raises(UserError, match="template line 2: TemplateSyntaxError"):
        ChatTemplate("a\n{% if %}", SPECIAL)


def test_a_row_that_the_template_refuses_is_an_error_of_ours() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content[1000] if m.content == 'x' else 1 / m.content|length }}{% endfor %}", {}
    )
    with pytest.raises(UserError, match="ZeroDivisionError"):
        template.render([Message("user", "")])


def test_a_generation_block_inside_a_macro_is_refused_not_misplaced() -> None:
    macro = "{% macro say(m) %}>{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    with pytest.raises(UserError, match="macro"):
        ChatTemplate(macro + "{% for m in messages %}{{ say(m) }}{% endfor %}", {})


def test_a_template_is_rendered_in_several_threads_at_once() -> None:
    """A second rendering begins and ends while the first is in the middle of a generation block."""
    others: list[Rendered] = []

    class Meanwhile(datetime.datetime):
        def strftime(self, form: str) -> str:
            other = threading.Thread(target=lambda: others.append(template.render([Message("assistant", "another")])))
            other.start()
            other.join()
            return form

    source = (
        "{% for m in messages %}{{ m.role }}:"
        "{% generation %}{{ strftime_now(m.content) if m.role == 'user' else m.content }}{% endgeneration %}{% endfor %}"
    )
    template = ChatTemplate(source, {}, trusted=True, now=Meanwhile(2026, 1, 1))
    first = template.render([Message("user", "a"), Message("assistant", "b")])
    assert first == Rendered("user:aassistant:b", ((5, 6), (16, 17)))
    assert others == [Rendered("assistant:another", ((10, 17),))]


def test_rendering_is_fast() -> None:
    template, chat = ChatTemplate(CHATML, {}, trusted=True), [Message("user", "q" * 80), Message("assistant", "a")]
    unit_s, started = cpu_unit_s(), time.process_time()
    for _ in range(500):
        template.render(chat)
    assert time.process_time() - started < 5 * unit_s  # 2 000 rows a second of CPU time; 20 000 measured
