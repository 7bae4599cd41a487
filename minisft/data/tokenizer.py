"""Text to token ids and back: a thin wrapper on the ``tokenizers`` library.

Reads a Hugging Face folder or builds the same byte-level BPE from GGUF metadata. A *control token* is one that the
tokenizer marks as special: ``<|im_end|>`` and its kin, which structure a chat. ``encode(text)`` never yields one, however
the text is spelt; only ``encode(text, control=True)``, meant for rendered templates, does.

It refuses vocabularies larger than the embedding, regular expressions that panic or hang, and GGUF vocabularies other than
byte-level BPE. The one idea: what is text and what is structure is decided by who wrote it, never by how it looks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tokenizers

from minisft.common import safe_json
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.common.sandbox import failure
from minisft.data.gguf_vocabulary import build_bpe, special_ids, splitting_notes

T = TypeVar("T")
Tokenized = tokenizers.Encoding  # ``ids`` and ``offsets``
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Long runs are what makes a careless regular expression explode.
PROBE_TEXTS = tuple(run * 400 + end for run in ("a", " ", "1", "\n", ".", "é", "aA ", "中") for end in ("!", "\x00", "b1"))
MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_CONFIG_BYTES = 8 * 2**20


@dataclass(frozen=True)
class SpecialTokens:
    """What a model folder says about its special tokens.

    Args:
        names: ``bos_token``, ``eos_token``... to the token's text, as chat templates name them.
        eos_ids: every id that ends a generation, the tokenizer's own first.
        pad_id: the named padding token, if any.
        adds_bos: whether plain text is meant to begin with the bos token.
    """

    names: dict[str, str]
    eos_ids: tuple[int, ...]
    pad_id: int | None
    adds_bos: bool


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
        vocab_size: highest id + 1.
        bos_id: begin-of-text id, or None.
        eos_ids: ids that end a generation (may be empty; ``notes`` says so).
        pad_id: id that fills padded positions; padding is masked by length, so any id will do, and without one of its
            own it is the tokenizer's first eos.
        special_tokens: every control token's text and id.
        special_names: ``bos_token``, ``eos_token``, ... to the token's text.
        adds_bos: whether plain text is meant to begin with the bos token.
        chat_template: Jinja2 source, or None.
        added_ids: ids of the tokens beside the vocabulary proper: control tokens and others like ``<think>``.
        notes: choices made for want of a setting, to be reported.
        new_ids: ids of the tokens that a run has added; empty for a tokenizer as it was read.
    """

    new_ids: range = range(0)

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None) -> None:
        # The post-processor adds bos and trims spaces off offsets; templates write bos, and masks need true offsets.
        self._post_processor = backend.post_processor
        backend.post_processor = None
        self._with_control, self._special = backend, special
        self._text_only = _without_control_tokens(backend)
        added = backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.control_ids = frozenset(self.special_tokens.values())
        self.added_ids = frozenset(added)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special_names = special.names
        self.bos_id: int | None = self.special_tokens.get(special.names.get("bos_token", ""))
        self.eos_ids = special.eos_ids
        self.adds_bos = special.adds_bos
        self.pad_id, self.notes = _choose_padding(special)
        self.chat_template = chat_template

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids, without bos or eos.

        Args:
            text: any text.
            control: read control tokens written in the text as such. False: they are ordinary characters.
        """
        return self.encode_with_offsets(text, control)[0]

    def encode_with_offsets(self, text: str, control: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and each token's (start, end) characters in ``text``.

        Raises:
            UserError: ``tokenizer/control-from-text``: the vocabulary spells a control token out of plain text, so that
                data could inject it.
        """
        if control:
            tokenized = self.tokenized(text)
            return tokenized.ids, tokenized.offsets
        encoding = self._text_only.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not self.control_ids.isdisjoint(ids):
            injected = [
                token for token, i in self.special_tokens.items() if i in ids and token != self.special_names.get("unk_token")
            ]
            if injected:
                fix = "--allow-control-tokens, if the data is your own"
                raise UserError(
                    "tokenizer/control-from-text", "plain text becomes a control token", found=listing(injected), fix=fix
                )
        return ids, encoding.offsets

    def tokenized(self, text: str) -> Tokenized:
        """The library's own result for a text, control tokens read as such."""
        return self._with_control.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokenized]:
        """``tokenized`` of each text, in the library's own threads."""
        return self._with_control.encode_batch(list(texts), add_special_tokens=False)

    @property
    def sha256(self) -> str:
        """Hash of all that decides how text becomes tokens."""
        facts = json.dumps([self.special_names, self.eos_ids, self.adds_bos, self.notes])
        return hashlib.sha256(self._with_control.to_str().encode() + facts.encode()).hexdigest()

    @property
    def definition(self) -> str:
        """The vocabulary and its rules, as ``tokenizer.json`` has them; without a post-processor."""
        return str(self._with_control.to_str())

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``, without control tokens unless asked."""
        text: str = self._with_control.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def check_embedding(self, num_rows: int) -> None:
        """Every token needs a row in the embedding.

        Raises:
            UserError: ``tokenizer/vocabulary``, naming the tokens without a row.
        """
        if self.vocab_size <= num_rows:
            return
        vocabulary: dict[str, int] = self._with_control.get_vocab(with_added_tokens=True)
        homeless = sorted((i, token) for token, i in vocabulary.items() if i >= num_rows)
        raise UserError(
            "tokenizer/vocabulary",
            "the tokenizer has more tokens than the embedding has rows",
            found=f"{self.vocab_size} tokens: {listing(f'{i} {token!r}' for i, token in homeless)}",
            expected=f"ids below {num_rows}",
            fix="take the tokenizer that came with this model",
        )

    def extended(self, tokens: Sequence[tokenizers.AddedToken]) -> Tokenizer:
        """A tokenizer that knows more tokens; special names, ends and template are this one's."""
        backend = tokenizers.Tokenizer.from_str(self._with_control.to_str())
        backend.add_tokens(list(tokens))
        if self._post_processor is not None:
            backend.post_processor = self._post_processor
        made = Tokenizer(backend, self._special, self.chat_template)
        made.notes, made.new_ids = self.notes, range(self.vocab_size, made.vocab_size)
        return made

    def extends(self, base: Tokenizer) -> bool:
        """Whether every token of ``base`` is here under the same id."""
        own, theirs = (t._with_control.get_vocab(with_added_tokens=True) for t in (self, base))
        return theirs.items() <= own.items()

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json`` and ``chat_template.jinja``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._with_control.post_processor = self._post_processor
        try:
            whole = self._with_control.to_str(pretty=True)
        finally:
            self._with_control.post_processor = None
        (folder / "tokenizer.json").write_text(whole, encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos,
            "clean_up_tokenization_spaces": False,
            **self.special_names,
        }
        _write_json(folder / "tokenizer_config.json", settings)
        _write_json(folder / "special_tokens_map.json", self.special_names)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Read a Hugging Face folder.

        ``tokenizer.json`` holds the vocabulary; special tokens come from ``tokenizer_config.json`` and
        ``special_tokens_map.json`` (strings or objects), further eos ids from ``generation_config.json``, the chat template
        from ``chat_template.jinja`` or else the config.

        Raises:
            UserError: ``tokenizer/...`` with the file at fault.
        """
        backend = _read_backend(path / "tokenizer.json")
        config = _read_object(path / "tokenizer_config.json")
        names = _special_names(config, _read_object(path / "special_tokens_map.json"))
        _mark_special(backend, names, config.get("added_tokens_decoder"), path)
        writes_bos = backend.encode("", add_special_tokens=True).tokens[:1] == [names.get("bos_token")]
        adds_bos = writes_bos or config.get("add_bos_token") is True
        ids = {name: i for name, token in names.items() if (i := backend.token_to_id(token)) is not None}
        own_eos = [ids["eos_token"]] if "eos_token" in ids else []
        configs = (_read_object(path / name) for name in ("generation_config.json", "config.json"))
        eos_ids = tuple(dict.fromkeys([*own_eos, *(i for c in configs for i in _id_list(c.get("eos_token_id")))]))
        special = SpecialTokens(names, eos_ids, ids.get("pad_token"), adds_bos)
        return cls(backend, special, _folder_template(path, config))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes under ``tokenizer.ggml.*``.

        Raises:
            UserError: ``tokenizer/...``: a vocabulary that is not byte-level BPE, an unknown splitting rule, or lists that
                contradict each other.
        """
        backend = guarded(lambda: build_bpe(metadata), "the GGUF vocabulary")
        ids = special_ids(metadata, backend.get_vocab_size())
        named = {name: backend.id_to_token(i) for name, i in ids.items() if name != "eot"}
        names = {f"{name}_token": token for name, token in named.items() if token is not None}
        eos_ids = tuple(dict.fromkeys(ids[name] for name in ("eos", "eot") if name in ids))
        template = metadata.get("tokenizer.chat_template")
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe") is True
        special = SpecialTokens(names, eos_ids, ids.get("pad"), adds_bos)
        tokenizer = cls(backend, special, template if isinstance(template, str) else None)
        tokenizer.notes += splitting_notes(metadata)
        return tokenizer


def guarded(call: Callable[[], T], where: str) -> T:
    """Run a call into ``tokenizers``, whose errors are bare ``Exception`` and Rust panics (a BaseException)."""
    try:
        return call()
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise UserError(
                "tokenizer/unreadable", "the tokenizer cannot be built", where=where, found=visible(error)
            ) from None
        raise


def _without_control_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer that shares the vocabulary but reads control tokens as plain characters."""
    plain = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, part) is not None:
            setattr(plain, part, getattr(backend, part))
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    plain.add_tokens(added)
    plain.encode_special_tokens = True
    return plain


def _choose_padding(special: SpecialTokens) -> tuple[int, tuple[str, ...]]:
    notes = [] if special.eos_ids else ["the tokenizer names no eos token: generation stops at its token limit only"]
    if special.pad_id is not None:
        return special.pad_id, tuple(notes)
    pad_id = special.eos_ids[0] if special.eos_ids else 0
    notes.append(f"the tokenizer names no padding token: id {pad_id} pads; padding is masked by length, never by id")
    return pad_id, tuple(notes)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path, MAX_TOKENIZER_BYTES)
    if text is None:
        fix = "convert the tokenizer: minisft reads the fast format, tokenizer.json"
        raise UserError("tokenizer/no-file", "the model folder has no tokenizer.json", where=visible(path), fix=fix)
    backend = guarded(lambda: tokenizers.Tokenizer.from_str(text), visible(path))
    backend.no_truncation()
    backend.no_padding()

    def trial() -> None:
        for probe in PROBE_TEXTS:
            backend.encode(probe)

    problem = failure(trial)
    if problem is not None:
        what, fix = "the tokenizer fails on plain text", "take the tokenizer.json that its authors published"
        raise UserError(
            "tokenizer/probe", what, where=visible(path), found=visible(problem), expected="an encoding in 2 s", fix=fix
        )
    return backend


def _read_text(path: Path, limit: int) -> str | None:
    """A file's text, or None where there is no such file."""
    try:
        with path.open("rb") as file:
            raw = safe_json.read_at_most(file, limit)
        if len(raw) > limit:
            raise UserError(
                "tokenizer/too-large", "the file is too large", where=visible(path), expected=f"at most {limit} bytes"
            )
        return raw.decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("tokenizer/unreadable", "cannot read the file", where=visible(path), found=visible(error)) from None


def _read_object(path: Path) -> dict[str, JSON]:
    """A JSON object from a file; empty where there is no such file."""
    text = _read_text(path, MAX_CONFIG_BYTES)
    if text is None:
        return {}
    try:
        value = safe_json.loads(text)
    except ValueError as error:
        raise UserError("tokenizer/bad-json", "the file is not JSON", where=visible(path), found=visible(error)) from None
    if not isinstance(value, dict):
        raise UserError("tokenizer/bad-json", "the file is not a JSON object", where=visible(path))
    return value


def _special_names(*sources: dict[str, JSON]) -> dict[str, str]:
    """Token texts by name; the first source that has a name wins. A token is a string or ``{"content": ...}``."""
    names: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_NAMES:
            entry = source.get(name)
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text:
                names.setdefault(name, text)
    return names


def _mark_special(backend: tokenizers.Tokenizer, names: dict[str, str], decoder: JSON, path: Path) -> None:
    """Make control tokens of all that the config files call special, beyond what ``tokenizer.json`` marks."""
    listed = [e for e in decoder.values() if isinstance(e, dict)] if isinstance(decoder, dict) else []
    from_config = [e["content"] for e in listed if e.get("special") is True and isinstance(e.get("content"), str)]
    wanted = dict.fromkeys([*names.values(), *map(str, from_config)])
    missing = [token for token in wanted if backend.token_to_id(token) is None]
    if missing:
        where, fix = visible(path / "tokenizer_config.json"), "take config and vocabulary from the same release"
        raise UserError(
            "tokenizer/unknown-special",
            "special tokens are not in tokenizer.json",
            where=where,
            found=listing(missing),
            fix=fix,
        )
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in wanted if t not in marked])


def _id_list(value: JSON) -> list[int]:
    """``eos_token_id`` is one id, a list of ids or null."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _folder_template(path: Path, config: dict[str, JSON]) -> str | None:
    text = _read_text(path / "chat_template.jinja", MAX_CONFIG_BYTES)
    if text is not None:
        return text
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates by name
        named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
