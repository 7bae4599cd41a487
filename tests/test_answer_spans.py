"""Where answers lie when the prompt is no prefix of the whole; what a model has to write for an answer."""

from __future__ import annotations

import pytest
import tokenizers
from texts import byte_tokenizer

from minisft.common.errors import UserError
from minisft.data.answer_text import answer_text
from minisft.data.chat import encode_chat, resolve_template, stop_ids
from minisft.data.encoding import encode_dataset
from minisft.data.inspect_data import inspect_dataset, render
from minisft.data.messages import Dataset, Example, Message
from minisft.data.template import ChatTemplate, Turns
from minisft.data.tokenizer import SpecialTokens, Tokenizer

END = "<|im_end|>"
NAMES = {"bos_token": "<|im_start|>", "eos_token": END}
OPEN = "<|im_start|>assistant\n"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As DeepSeek-R1's: the prompt opens a thinking block, a past answer is written without its thoughts.
PREFILLED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Qwen3's: an empty thinking block before the last answer.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}" + PROMPT
)
DEFAULT_SYSTEM = (  # as SmolLM2's: written inside the loop, so an empty chat has none
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
)
FIRST_ROLE = (  # as Qwen2.5's: cannot render an empty chat at all
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + TURNS + PROMPT
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% endfor %}" + TURNS + PROMPT
)

DATASET = Dataset((), "messages", "f.jsonl", "", {"rows": 1}, ())


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, NAMES)


def parts(source: str, *chat: Message) -> list[str]:
    """The runs of context and targets in turn, context first."""
    encoded = encode_chat(byte_tokenizer(), compiled(source), chat)
    runs: list[list[int]] = [[]]
    for token, flag, before in zip(encoded.input_ids, encoded.supervised, [False, *encoded.supervised], strict=False):
        if flag != before:
            runs.append([])
        runs[-1].append(token)
    return [byte_tokenizer().decode(run, skip_special=False) for run in runs]


Q, A = Message("user", "q"), Message("assistant", "<b> a")


@pytest.mark.parametrize("content", ["<b> a", "<think>why</think><b> a", "<thi", "assistant\n<"])
def test_a_prompt_that_opens_a_thinking_block_is_cut_where_the_answer_starts(content: str) -> None:
    """The answer may itself start like the rest of the prompt: only what stands before the content counts."""
    rendered = content.split("</think>")[-1]
    found = parts(PREFILLED, Q, Message("assistant", content), Q, A)
    asked = "<|im_start|>user\nq<|im_end|>" + OPEN
    assert found == [asked, rendered + END, asked, f"<b> a{END}"]


@pytest.mark.parametrize("source", [DEFAULT_SYSTEM, FIRST_ROLE])
def test_the_assistant_may_speak_first(source: str) -> None:
    system = "<|im_start|>system\nBe kind.<|im_end|>\n" + OPEN
    assert parts(source, A)[:2] == [system, f"<b> a{END}"]
    greeting = parts(source, A, Q, Message("assistant", "b"))
    assert greeting[:2] == [system, f"<b> a{END}"]
    assert greeting[3] == f"b{END}"


def test_an_answer_that_cannot_be_placed_says_what_helps() -> None:
    shouting = compiled(PREFILLED.replace("{{ m.content.split('</think>')[-1] }}", "{{ m.content[:1] }}"))
    with pytest.raises(UserError, match=r"f.jsonl:9: message 2 of 2.*fix: --template FILE.jinja") as caught:
        encode_chat(byte_tokenizer(), shouting, (Q, A), where="f.jsonl:9")
    assert "--turns last" not in str(caught.value)


def test_every_error_about_a_row_names_it() -> None:
    examples = [Example((Q, A), 1, {}, "f.jsonl:1"), Example((Q, Q, A), 2, {}, "f.jsonl:2")]
    with pytest.raises(
        UserError, match=r"f\.jsonl:2; found template line 1: TemplateError: roles must alternate.*drop the row"
    ) as e:
        encode_dataset(examples, byte_tokenizer(), compiled(STRICT), 99)
    assert "MiB" not in str(e.value)
    with pytest.raises(UserError, match=r"roles must alternate") as e:
        answer_text(byte_tokenizer(), compiled(STRICT), examples[1])
    assert "f.jsonl:2" in str(e.value)


@pytest.mark.parametrize("source", [PREFILLED, THINKING, DEFAULT_SYSTEM, FIRST_ROLE, STRICT])
def test_what_ends_an_answer_needs_no_span(source: str) -> None:
    assert stop_ids(byte_tokenizer(), compiled(source)) == (2,)
    assert stop_ids(byte_tokenizer(), compiled(source.replace("<|im_end|>", "<|endoftext|>"))) == (2, 0)


def test_a_template_that_takes_no_answer_is_stopped_by_eos() -> None:
    questions = compiled("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}")
    assert stop_ids(byte_tokenizer(), questions) == (2,)


# ---- texts to compare ----


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (THINKING, "red", "<think>\n\n</think>\n\nred"),
        (THINKING, "<think>x</think>red", "<think>\n\n</think>\n\nred"),
        (PREFILLED, "<think>x</think>red", "red"),
        (TURNS + PROMPT, f"a{END}b{END}", f"a{END}b{END}"),
        (TURNS + PROMPT, "<|im_", "<|im_"),
    ],
)
def test_an_answer_is_what_the_template_writes(source: str, content: str, expected: str) -> None:
    example = Example((Q, Message("assistant", content, train=False)), 1)
    assert answer_text(byte_tokenizer(), compiled(source), example) == expected


def normalizing(form: tokenizers.normalizers.Normalizer) -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.normalizer = form
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", END)])
    return Tokenizer(backend, SpecialTokens({"eos_token": END}, (257,), None, False), TURNS + PROMPT)


def test_an_answer_is_what_the_tokenizer_can_write() -> None:
    tokenizer = normalizing(tokenizers.normalizers.NFC())
    example = Example((Q, Message("assistant", "cafe\u0301")), 1)
    assert answer_text(tokenizer, resolve_template(tokenizer), example) == "caf\u00e9"


def test_reasoning_reaches_the_template_as_in_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    answer = Message("assistant", "12", fields=(("reasoning_content", f"3 x 4 {END}"),))
    dicts = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "12", "reasoning_content": f"3 x 4 {END}"}]
    texts, _ = utils.render_jinja_template([dicts], chat_template=THINKING, **NAMES)
    encoded = encode_chat(byte_tokenizer(), compiled(THINKING), (Q, answer))
    assert byte_tokenizer().decode(encoded.input_ids, skip_special=False) == texts[0]
    assert encoded.control_tokens_in_text == 1
    assert encoded.input_ids.count(2) == 2  # the two turns' own: the data's is plain text


def test_reasoning_that_no_template_reads_is_refused() -> None:
    answer = Message("assistant", "12", fields=(("thinking", "3 x 4"),))
    with pytest.raises(UserError, match=r"data/unread-field.*f.jsonl:3: message 2: thinking"):
        encode_dataset([Example((Q, answer), 3, {}, "f.jsonl:3")], byte_tokenizer(), compiled(TURNS + PROMPT), 99)


@pytest.mark.parametrize(
    ("source", "contents", "turns", "lost"),
    [
        (PREFILLED, ("<think>why so</think>red",), "all", True),
        (PREFILLED, ("why so</think>red",), "all", True),
        (PREFILLED, ("<think>\n\n</think>red",), "all", False),  # nothing was thought
        (PREFILLED, ("red </thinking>",), "all", False),
        (TURNS + PROMPT, ("<think>why so</think>red",), "all", False),
        (PREFILLED, ("<think>why so</think>red", "blue"), "last", False),  # context is as the model will see it
        (PREFILLED, ("red", "<think>why so</think>blue"), "last", True),
    ],
)
def test_reasoning_that_the_template_leaves_out_of_the_content_is_counted(
    source: str, contents: tuple[str, ...], turns: Turns, lost: bool
) -> None:
    chat = tuple(message for content in contents for message in (Q, Message("assistant", content)))
    data = encode_dataset([Example(chat, 7)], byte_tokenizer(), compiled(source), 99, turns=turns)
    assert data.lost_reasoning == ((7,) if lost else ())
    said = "reasoning lost       1: row 7" in render(inspect_dataset(DATASET, data, byte_tokenizer(), 99), color=False)
    assert said is lost
