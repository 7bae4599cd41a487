"""Tokenizers: GGUF against transformers, folders there and back, control tokens only where they are meant."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from machine import cpu_unit_s
from texts import CONTROL, byte_metadata, byte_tokenizer, smollm2_metadata, smollm2_tokenizer
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from minisft.common.errors import UserError
from minisft.data.gguf_vocabulary import RULES, build_bpe
from minisft.data.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    "price 12345.67 €",
    "it's  we'll\tTabs\n\n\nlines  \n end ",
    "naïve café Ünïcödé ß",
    "日本語のテキスト",
    "Привет",
    "def f(x):\n    return x**2  # ²³ ½ Ⅷ",
    "👩‍👩‍👧 emoji 🎉",
    "\u200bzero\ufeffwidth",
    "a" * 300,
    " leading",
    "trailing ",
    "٣٤٥",
    "\x00\x1b",
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
marked_text = st.lists(st.one_of(unicode_text, st.sampled_from(CONTROL), st.sampled_from(["<|im", "_end|>", "<", "|>"]))).map(
    "".join
)


@given(marked_text)
def test_text_never_becomes_a_control_token_and_survives(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special=False) == text


@given(marked_text)
def test_offsets_cover_the_text_without_gaps(text: str) -> None:
    for control in (False, True):
        _, offsets = byte_tokenizer().encode_with_offsets(text, control)
        covered = {i for start, end in offsets for i in range(start, end)}
        assert covered == set(range(len(text)))
        assert offsets == sorted(offsets)


def test_control_tokens_are_read_only_on_request() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("<|im_end|>", control=True) == [2]
    assert len(tokenizer.encode("<|im_end|>")) == 10
    assert tokenizer.encode("<|im_end|>", control=True) == [2]  # the calls do not disturb each other


@pytest.mark.smollm2
def test_smollm2_is_built_quickly_and_knows_its_special_tokens(smollm2_path: Path) -> None:
    metadata = smollm2_metadata(smollm2_path)
    unit, started = cpu_unit_s(), time.process_time()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert time.process_time() - started < 20 * unit  # 3 measured
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (49152, 1, (2,), 2)
    assert len(tokenizer.special_tokens) == 17
    assert tokenizer.chat_template is not None
    assert not tokenizer.adds_bos


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_equals_transformers_own_conversion(smollm2_path: Path) -> None:
    """transformers drops the 'smollm' rule (single numerals are cut off first), so the rule is put back before comparing."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    backend = theirs.backend_tokenizer
    ours = smollm2_tokenizer(smollm2_path)
    without_numerals = [t for t in TEXTS if not any(c.isnumeric() for c in t)]
    for text in without_numerals:
        assert ours.encode(text, control=True) == theirs.encode(text, add_special_tokens=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    for text in [*TEXTS, "a   1", "1  2\n\n3", "x<|im_end|>\n<|im_start|>user"]:
        assert ours.encode(text, control=True) == theirs.encode(text, add_special_tokens=False)
    assert theirs.all_special_tokens == list(
        dict.fromkeys(ours.special_names[n] for n in ("bos_token", "eos_token", "unk_token"))
    )


@pytest.mark.smollm2
def test_numerals_are_cut_off_before_white_space_is_grouped(smollm2_path: Path) -> None:
    """llama.cpp's rule for 'smollm': \\p{N} first, then GPT-2's expression; so three spaces before a digit stay together."""
    tokenizer = smollm2_tokenizer(smollm2_path)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("a   12")]
    assert pieces == ["a", "   ", "1", "2"]


@pytest.mark.parametrize("pre", RULES)
@given(text=unicode_text)
def test_every_splitting_rule_loses_nothing(pre: str, text: str) -> None:
    expected = normalizers.NFC().normalize_str(text) if pre == "qwen2" else text
    backend = _backends.setdefault(pre, build_bpe(byte_metadata(pre)))
    assert backend.decode(backend.encode(text).ids) == expected


_backends: dict[str, tokenizers.Tokenizer] = {}


def test_splitting_rules_differ_where_they_should() -> None:
    def pieces(pre: str, text: str) -> list[str]:
        splitter = build_bpe(byte_metadata(pre)).pre_tokenizer
        assert splitter is not None
        return [text[a:b] for _, (a, b) in splitter.pre_tokenize_str(text)]

    assert pieces("gpt-2", "a 1234") == ["a", " 1234"]
    assert pieces("smollm", "a 1234") == ["a", " ", "1", "2", "3", "4"]
    assert pieces("llama-bpe", "a 1234\n\nI'LL") == ["a", " ", "123", "4", "\n\n", "I", "'LL"]
    assert pieces("qwen2", "a 1234") == ["a", " ", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "llama"}, "byte-level BPE"),
        ({"pre": "falcon"}, "smollm"),
        ({"tokens": ["a", "a"]}, "repeats"),
        ({"tokens": 3}, "list of strings"),
        ({"token_type": [1]}, "integers"),
        ({"merges": ["a b c"]}, "pair"),
        ({"merges": ["no such"]}, "out of vocabulary"),
        ({"eos_token_id": 10**6}, "eos_token_id"),
    ],
)
def test_a_contradictory_gguf_vocabulary_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Tokenizer.from_gguf(byte_metadata(**changes))
    assert caught.value.code.startswith("tokenizer/")


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    ours = byte_tokenizer()
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id", "special_tokens", "special_names", "adds_bos", "chat_template"):
        assert getattr(again, name) == getattr(ours, name), name
    for text in TEXTS:
        assert again.encode(text + "<|im_end|>", control=True) == ours.encode(text + "<|im_end|>", control=True)


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = byte_tokenizer()
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert theirs.chat_template == ours.chat_template
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == text


# ---- folders ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def rewrite(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | changes))


def test_special_tokens_come_as_strings_or_objects_and_eos_as_a_list(folder: Path) -> None:
    rewrite(
        folder,
        "tokenizer_config.json",
        eos_token={"content": "<|im_end|>", "special": True},
        pad_token={"content": "<|endoftext|>"},
    )
    rewrite(folder, "generation_config.json", eos_token_id=[0, 2, 5])
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((2, 0, 5), 0)


@pytest.mark.slow
def test_the_template_file_goes_before_the_config(folder: Path) -> None:
    rewrite(
        folder,
        "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    )
    assert Tokenizer.from_folder(folder).chat_template == "d"
    rewrite(folder, "tokenizer_config.json", chat_template="string")
    assert Tokenizer.from_folder(folder).chat_template == "string"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).chat_template == "file"


def test_added_tokens_of_the_config_are_control_tokens_too(folder: Path) -> None:
    rewrite(folder, "tokenizer_config.json", added_tokens_decoder={"7": {"content": "es", "special": True}})
    tokenizer = Tokenizer.from_folder(folder)
    assert "es" in tokenizer.special_tokens
    # Here plain text spells a control token by merging, so it is refused rather than forged.
    with pytest.raises(UserError, match="tokenizer/control-from-text"):
        tokenizer.encode("es")


@pytest.mark.slow
def test_missing_pad_and_eos_state_the_choice(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.pad_id == 2
    assert "id 2 pads" in tokenizer.notes[0]
    (folder / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_folder(folder)
    assert bare.eos_ids == ()
    assert "no eos token" in bare.notes[0]


@pytest.mark.slow
def test_a_template_processor_that_writes_bos_is_noticed_but_not_applied(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.adds_bos
    assert tokenizer.encode("a", control=True) == byte_tokenizer().encode("a")
    tokenizer.save(folder / "again")
    assert Tokenizer.from_folder(folder / "again").adds_bos
    assert tokenizer.encode("a", control=True) == byte_tokenizer().encode("a")


@pytest.mark.slow
def test_broken_folders_are_refused(folder: Path) -> None:
    good = (folder / "tokenizer.json").read_text()
    cases = [("{}", "tokenizer/unreadable"), ("not json", "tokenizer/unreadable"), (None, "tokenizer/no-file")]
    for text, code in cases:
        (folder / "tokenizer.json").unlink() if text is None else (folder / "tokenizer.json").write_text(text)
        with pytest.raises(UserError) as caught:
            Tokenizer.from_folder(folder)
        assert (caught.value.code, caught.value.exit_code) == (code, 4)
    (folder / "tokenizer.json").write_text(good)
    rewrite(folder, "tokenizer_config.json", eos_token="<gone>")
    with pytest.raises(UserError, match="<gone>"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="tokenizer/bad-json"):
        Tokenizer.from_folder(folder)


def save_with_regex(folder: Path, pattern: str) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "!": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    backend.add_special_tokens([AddedToken("<e>", special=True)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.slow
def test_a_regular_expression_that_explodes_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_with_regex(tmp_path, "(a+)+$")
    with pytest.raises(UserError, match="tokenizer/probe"):
        Tokenizer.from_folder(tmp_path)
    assert capfd.readouterr().err == ""  # the panic's own words stay in the child


def test_tokens_without_an_embedding_row_are_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.check_embedding(tokenizer.vocab_size)
    with pytest.raises(UserError, match=r"261 'Ġyes'.*expected ids below 261"):
        tokenizer.check_embedding(261)


@pytest.mark.parametrize(("pre", "guessed"), [(None, True), ("default", True), ("smollm", False), ("llama-bpe", False)])
def test_a_gguf_that_names_no_splitting_rule_is_reported(pre: str | None, guessed: bool) -> None:
    metadata = {key: value for key, value in byte_metadata(pre or "smollm").items() if pre or key != "tokenizer.ggml.pre"}
    notes = [note for note in Tokenizer.from_gguf(metadata).notes if "tokenizer.ggml.pre" in note]
    assert len(notes) == guessed
    assert all(len(note) < 200 for note in notes)  # or the end, which says what helps, is cut where notes are shown
