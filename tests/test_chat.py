"""Chats as tokens: the right ids, the right targets, nothing forged by the data, nothing cut that matters."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from machine import cpu_unit_s
from texts import CONTROL, GENERATION, LLAMA3, byte_tokenizer, smollm2_tokenizer

from minisft.common.errors import UserError
from minisft.data.chat import Encoded, Turns, _flags, _flags_by_lookup, encode_chat, fit, resolve_template, stop_ids
from minisft.data.encoding import encode_dataset
from minisft.data.messages import Example, Message
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import SpecialTokens, Tokenizer

END = "<|im_end|>"
NAMES = {"bos_token": "<|im_start|>", "eos_token": END}
# Chatml without generation blocks: answers are found by rendering ever longer parts.
PREFIX = GENERATION.replace("{%- generation %}{{", "{{-").replace("{% endgeneration %}", "")
SOURCES = {"generation": GENERATION, "prefix": PREFIX, "llama3": LLAMA3}
TEMPLATES = {name: ChatTemplate(source, NAMES) for name, source in SOURCES.items()} | {
    name: resolve_template(byte_tokenizer(), name) for name in ("chatml", "plain")
}


def targets(encoded: Encoded, tokenizer: Tokenizer | None = None) -> str:
    chosen = [i for i, flag in zip(encoded.input_ids, encoded.supervised, strict=True) if flag]
    return (tokenizer or byte_tokenizer()).decode(chosen, skip_special=False)


def text_of(encoded: Encoded) -> str:
    return byte_tokenizer().decode(encoded.input_ids, skip_special=False)


def controls(encoded: Encoded) -> list[int]:
    return [i for i in encoded.input_ids if i in byte_tokenizer().control_ids]


CHAT = [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_tokens_are_the_targets(name: str) -> None:
    def trained(chat: list[Message], turns: Turns = "all") -> str:
        return targets(encode_chat(byte_tokenizer(), TEMPLATES[name], chat, turns=turns))

    assert trained(CHAT) == f"a1{END}a2{END}"
    assert trained(CHAT, "last") == f"a2{END}"
    assert trained([*CHAT[:3], replace(CHAT[3], train=False)]) == f"a1{END}"
    assert trained([*CHAT[:3], replace(CHAT[3], train=False)], "last") == ""


def test_a_generation_prompt_ends_where_the_answer_would_begin() -> None:
    for template in TEMPLATES.values():
        prompt = encode_chat(byte_tokenizer(), template, CHAT[:3], add_generation_prompt=True)
        whole = encode_chat(byte_tokenizer(), template, CHAT, turns="last")
        assert whole.input_ids[: whole.prompt_length] == prompt.input_ids
        assert (any(prompt.supervised), prompt.prompt_length) == (False, len(prompt.input_ids))


def test_the_token_on_the_border_is_a_target() -> None:
    """'Answer: ' + 'yes' merge into one token ' yes': it holds the answer, so it is trained."""
    chat = [Message("user", "Answer: "), Message("assistant", "yes")]
    encoded = encode_chat(byte_tokenizer(), TEMPLATES["plain"], chat)
    assert targets(encoded) == f" yes{END}"
    assert (encoded.straddling, text_of(encoded)) == (1, f"Answer: yes{END}")


def lowering_tokenizer() -> Tokenizer:
    """Takes spaces away, makes one character of two and lowers what is left: offsets have gaps."""
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer().definition)
    steps = [tokenizers.normalizers.NFC(), tokenizers.normalizers.Replace(" ", ""), tokenizers.normalizers.Lowercase()]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    return Tokenizer(backend, SpecialTokens(NAMES, (2,), None, False), None)


@pytest.mark.parametrize("make", [byte_tokenizer, lowering_tokenizer])
@given(data=st.data())
def test_tokens_at_the_ends_of_spans_are_those_of_all_offsets(make: Callable[[], Tokenizer], data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from([*"aéÅ中e\u0301 yes:\n", "\U0001f600", " yes", END]), min_size=1)))
    places = st.integers(0, len(text))
    ends = sorted(data.draw(st.lists(st.tuples(places, places).map(sorted).map(tuple), max_size=3)))
    spans = [span for i, span in enumerate(ends) if not i or span[0] >= ends[i - 1][1]]
    tokenized = make().tokenized(text)
    inside = [[a < end and b > start for start, end in spans] for a, b in tokenized.offsets]
    outside = [
        any(i and (a < start or b > end) for i, (start, end) in zip(row, spans, strict=True))
        for row, (a, b) in zip(inside, tokenized.offsets, strict=True)
    ]
    expected = [any(row) for row in inside], sum(outside)
    if all(start < end for start, end in spans):
        assert _flags(tokenized.offsets, spans) == expected
    looked_up = _flags_by_lookup(tokenized, spans)
    if looked_up is None:
        assert make is lowering_tokenizer or any(start == end for start, end in spans)
    else:
        assert looked_up == expected


def test_a_last_character_of_several_tokens_is_learned_whole() -> None:
    tokenized = byte_tokenizer().tokenized("a中b\U0001f600")
    assert _flags_by_lookup(tokenized, [(0, 2)]) == ([True] * 4 + [False] * 5, 0)
    assert _flags_by_lookup(tokenized, [(2, 4)]) == ([False] * 4 + [True] * 5, 0)


def test_padding_equal_to_the_end_token_hides_nothing() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_id in tokenizer.eos_ids
    encoded = encode_chat(tokenizer, TEMPLATES["chatml"], CHAT)
    assert [f for i, f in zip(encoded.input_ids, encoded.supervised, strict=True) if i == 2] == [False, True, False, True]


pieces = st.sampled_from([*CONTROL, "<|im_", "_end|>", "end", "<", ">", "|>", "<|", "yes", " ", "\n", "é", "中", "\U000f0000"])
content = st.lists(pieces, max_size=6).map("".join)
chats = st.lists(content, min_size=2, max_size=6).map(
    lambda texts: [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts[: len(texts) // 2 * 2])]
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(chat=chats)
def test_text_forges_no_control_token(name: str, chat: list[Message]) -> None:
    """Whatever the messages say, the control tokens are those that the template writes around harmless messages."""
    encoded = encode_chat(byte_tokenizer(), TEMPLATES[name], chat)
    harmless = encode_chat(byte_tokenizer(), TEMPLATES[name], [replace(m, content="x") for m in chat])
    assert controls(encoded) == controls(harmless)
    assert text_of(encoded) == TEMPLATES[name].render(chat).text
    if name in ("chatml", "generation", "prefix"):
        assert targets(encoded) == "".join(m.content + END for m in chat if m.role == "assistant")
    if name == "plain" and not encoded.straddling:
        assert targets(encoded) == "".join(m.content + END for m in chat if m.role == "assistant")


def test_forged_control_tokens_are_counted_or_let_through() -> None:
    chat = [Message("user", f"a{END}b<|im_start|>"), Message("assistant", "c")]
    encoded = encode_chat(byte_tokenizer(), TEMPLATES["chatml"], chat)
    assert encoded.control_tokens_in_text == 2
    allowed = encode_chat(byte_tokenizer(), TEMPLATES["chatml"], chat, allow_control_tokens=True)
    assert allowed.control_tokens_in_text == 0
    assert len(controls(allowed)) == len(controls(encoded)) + 2
    halves = [Message("user", "<|im_"), Message("assistant", "end|>")]
    joined = encode_chat(byte_tokenizer(), TEMPLATES["plain"], halves)
    assert (joined.control_tokens_in_text, controls(joined)) == (1, [2])


# ---- against transformers ----


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_chats_have_transformers_ids_for_smollm2(count: int, smollm2_path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = smollm2_tokenizer(smollm2_path)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = resolve_template(ours)
    dice = random.Random(0)
    words = ["hello", " world", "\n\n", "  ", "12 345", "don't", "naïve", "中文", "🎉", "{", "<b>", "y  # why", "\t", "<", "|>"]
    for _ in range(count):
        roles = [*dice.choice([["system"], []]), *["user", "assistant"] * dice.randint(1, 3)]
        chat = [Message(role, "".join(dice.choices(words, k=dice.randint(0, 8)))) for role in roles]
        dicts = [{"role": m.role, "content": m.content} for m in chat]
        expected = theirs.apply_chat_template(dicts, tokenize=True, return_dict=False)
        encoded = encode_chat(ours, template, chat)
        assert encoded.input_ids == expected
        answers = "".join(m.content + END for m in chat if m.role == "assistant")
        assert targets(encoded, ours) == answers or encoded.straddling  # "\n" of the prompt and "\t" of an answer are one token
        prompt = encode_chat(ours, template, chat[:-1], add_generation_prompt=True)
        expected = theirs.apply_chat_template(dicts[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
        assert prompt.input_ids == expected


@given(chat=chats)
def test_forged_tokens_are_encoded_as_transformers_sanitizes_them(
    chat: list[Message], tmp_path_factory: pytest.TempPathFactory
) -> None:
    transformers = pytest.importorskip("transformers")
    if not _theirs:
        folder = tmp_path_factory.mktemp("tokenizer")
        byte_tokenizer().save(folder)
        _theirs.append(transformers.AutoTokenizer.from_pretrained(folder))
    # transformers' own private marker is struck from what it encodes.
    chat = [replace(m, content=m.content.replace("\U000f0000", "")) for m in chat]
    dicts = [{"role": m.role, "content": m.content} for m in chat]
    expected = _theirs[0].apply_chat_template(dicts, tokenize=True, return_dict=False, sanitize_control_tokens=True)
    assert encode_chat(byte_tokenizer(), TEMPLATES["generation"], chat).input_ids == expected


_theirs: list[object] = []


@pytest.mark.smollm2
def test_smollm2_s_own_border_trap(smollm2_path: Path) -> None:
    tokenizer = smollm2_tokenizer(smollm2_path)
    assert [*tokenizer.encode("Answer: ")[-1:], *tokenizer.encode("yes")] == [216, 10407]
    chat = [Message("user", "Answer: "), Message("assistant", "yes")]
    encoded = encode_chat(tokenizer, resolve_template(tokenizer, "plain"), chat)
    assert encoded.input_ids[-2:] == [9805, 2]
    assert encoded.supervised[-2:] == [True, True]


@pytest.mark.smollm2
def test_encoding_is_fast(smollm2_path: Path) -> None:
    tokenizer = smollm2_tokenizer(smollm2_path)
    chat = (Message("user", "I ordered a card over a week ago; where is it?"), Message("assistant", "card_arrival"))
    examples = [Example(chat, i) for i in range(500)]
    unit, started = cpu_unit_s(), time.process_time()
    encode_dataset(examples, tokenizer, resolve_template(tokenizer), 1024)
    assert time.process_time() - started < 10 * unit  # 1 000 rows a second of CPU time where the unit is 0.05; 3 measured


# ---- choosing and refusing templates ----


@pytest.mark.slow
def test_templates_are_chosen_by_name_file_or_model(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert resolve_template(tokenizer).source == GENERATION
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    assert resolve_template(tokenizer, str(tmp_path / "t.jinja")).render(CHAT).text == "q1"
    with pytest.raises(UserError, match="config/bad-template"):
        resolve_template(tokenizer, "chatlm")


def test_a_model_without_a_template_is_offered_some(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="--template plain") as caught:
        resolve_template(Tokenizer.from_folder(tmp_path))
    assert caught.value.code == "tokenizer/no-template"


def test_a_template_whose_parts_differ_from_the_whole_is_refused() -> None:
    template = ChatTemplate("{{ messages|length }}" + PREFIX, NAMES)
    with pytest.raises(UserError, match="tokenizer/template-prefix"):
        encode_chat(byte_tokenizer(), template, CHAT)


def test_a_template_that_rewrites_history_still_trains_the_last_turn() -> None:
    """As Qwen3's: earlier answers lose their thoughts, so only the last is a beginning of the whole."""
    source = PREFIX.replace("{{- message.content }}", "{{- message.content if loop.last else message.content[0] }}")
    template = ChatTemplate(source, NAMES)
    assert targets(encode_chat(byte_tokenizer(), template, CHAT, turns="last")) == f"a2{END}"
    with pytest.raises(UserError, match="--turns last"):
        encode_chat(byte_tokenizer(), template, CHAT)


def test_a_template_that_marks_some_answers_only_is_refused() -> None:
    last_only = "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    template = ChatTemplate("{% for m in messages %}" + last_only + "{% endfor %}", {})
    with pytest.raises(UserError, match="tokenizer/template-spans"):
        encode_chat(byte_tokenizer(), template, CHAT)


def test_the_template_s_own_end_token_stops_a_generation_too() -> None:
    tokenizer = byte_tokenizer()
    assert stop_ids(tokenizer, TEMPLATES["chatml"]) == (2,)
    other = ChatTemplate(GENERATION.replace(END, "<|endoftext|>"), NAMES)
    assert stop_ids(tokenizer, other) == (2, 0)


# ---- length ----


def row(prompt: int, answer: int, tail: int = 0) -> Encoded:
    flags = [False] * prompt + [True] * answer + [False] * tail
    return Encoded(list(range(len(flags))), flags, 1, 0, prompt)


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 3), st.integers(1, 20))
def test_fit_cuts_prompts_and_tails_but_never_targets(prompt: int, answer: int, tail: int, limit: int) -> None:
    before = row(prompt, answer, tail)
    after = fit(before, limit)
    needed = answer + min(1, prompt)
    if after is None:
        assert len(before.input_ids) > limit
        assert needed > limit or answer == 0
        return
    assert len(after.input_ids) <= limit
    assert sum(after.supervised) == answer
    assert after.supervised[: after.prompt_length] == [False] * after.prompt_length
    assert after.input_ids == before.input_ids[after.input_ids[0] : after.input_ids[-1] + 1] if after.input_ids else True
    assert after.prompt_length >= min(1, prompt) or not answer


def test_a_data_set_counts_what_it_loses() -> None:
    def example(number: int, question: str, answer: str, train: bool = True) -> Example:
        return Example((Message("user", question), Message("assistant", answer, train)), number)

    examples = [
        example(1, "q", "a"),
        example(2, "q" * 99, "a"),
        example(3, "q", "a" * 99),
        example(4, END, "a"),
        example(5, "q", "a", False),
    ]
    data = encode_dataset(examples, byte_tokenizer(), TEMPLATES["plain"], 20)
    assert [r.row for r in data.rows] == [1, 2, 4]
    assert (data.truncated, data.too_long, data.untrained, data.control_tokens) == ((2,), (3,), (5,), 1)
    assert data.lengths == (3, 101, 101, 12, 3)
    assert targets(data.rows[1]) == f"a{END}"
    assert data.counts["supervised_tokens"] == 6
    with pytest.raises(UserError, match=r"f\.jsonl:2.*101 tokens.*at most 20"):
        encode_dataset(examples, byte_tokenizer(), TEMPLATES["plain"], 20, strict=True, path="f.jsonl")


@pytest.mark.parametrize(
    ("max_length", "context", "says", "silent"),
    [
        (20, None, "--max-length 101", "context"),
        (20, 101, "--max-length 101", "context"),
        (20, 100, "--max-length 100, the model's context", "--max-length 101"),
        (20, 20, "the model's context of 20 tokens", "--max-length"),
    ],
)
def test_no_error_advises_a_length_beyond_the_models_context(
    max_length: int, context: int | None, says: str, silent: str
) -> None:
    long = Example((Message("user", "q" * 99), Message("assistant", "a")), 1)  # with the end token 101 tokens
    with pytest.raises(UserError) as caught:
        encode_dataset([long], byte_tokenizer(), TEMPLATES["plain"], max_length, strict=True, context=context)
    assert says in str(caught.value)
    assert silent not in str(caught.value)
