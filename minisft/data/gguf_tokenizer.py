"""A tokenizer and its chat template as GGUF metadata: the way back from ``gguf_vocabulary``.

A GGUF file names the rule that cuts text before BPE. The name is found by comparing the rule itself with the table, and a rule
without a name there is refused: a wrong name gives plausible, silently different ids. Refused, too, is all that the metadata
cannot express: other kinds of vocabularies, tokens that take the spaces beside them along, chats without an end. Control
tokens are written as such, so that they are read in a prompt. The one idea: what cannot be written exactly is not written.

Ref: llama.cpp, ``llama-vocab.cpp``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.data.answer_text import closing_ids, stop_ids
from minisft.data.examples import Message
from minisft.data.gguf_vocabulary import CONTROL, NORMAL, RULES, UNUSED, USER_DEFINED, Rule
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer

Keys = dict[str, str | int | float | bool | list[str | int | float | bool]]
CONVERTER = "write a folder with minisft merge and try llama.cpp's own convert_hf_to_gguf.py, which knows more kinds"
_GENERATION = re.compile(r"\{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%\}")
PROBES = (
    (Message("user", "Hello?"),),
    (Message("system", "Be brief."), Message("user", " two\nlines "), Message("assistant", "Yes."), Message("user", "Why?")),
    (Message("user", "Hello?"), Message("assistant", "Hello!")),
)  # chats on which a rewritten template must agree with the original


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a file says of its tokenizer.

    Args:
        keys: the metadata.
        stops: the texts of all tokens that end an answer, the end of a turn first.
        notes: what the file cannot express, to be reported.
    """

    keys: Keys
    stops: tuple[str, ...]
    notes: tuple[str, ...]


def gguf_tokenizer(tokenizer: Tokenizer, template: ChatTemplate | None, num_rows: int) -> GGUFTokenizer:
    """The metadata of a tokenizer.

    Args:
        tokenizer: the model's.
        template: the one that the model is used with; None for a base model without any.
        num_rows: of the embedding; rows past the vocabulary become unused tokens.

    Returns:
        keys, and what they cannot express.

    Raises:
        UserError: ``tokenizer/no-gguf...``.
    """
    definition: dict[str, JSON] = json.loads(tokenizer.definition)
    rule = _rule(definition)
    added = _added(definition)
    vocabulary = _vocabulary(definition)
    names = {**{i: token for token, i in vocabulary.items()}, **{i: str(token["content"]) for i, token in added.items()}}
    kinds = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    rows = range(num_rows)
    types = [kinds.get(i, NORMAL if i in names else UNUSED) for i in rows]
    keys: Keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in rows],
        "tokenizer.ggml.token_type": [*types],
        "tokenizer.ggml.merges": [*_merges(definition)],
    }
    ends = _ends(tokenizer, template)
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    notes = [f"{listing(texts[i] for i in ends[2:])}: the file holds two ends of an answer"] if ends[2:] else []
    if RULES[rule].nfc:
        notes.append(
            "llama.cpp does not compose accents (NFC) as this tokenizer does: send composed text, as keyboards write it"
        )
    keys |= _special(tokenizer, ends)
    # A chat gets its bos from the template or not at all, as in training; llama.cpp would put one before it.
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos and template is None
    if template is not None:
        keys["tokenizer.chat_template"] = _portable(template, tokenizer, keys)
    return GGUFTokenizer(keys, tuple(texts[i] for i in ends), tuple(notes))


def _refusal(slug: str, what: str, found: object, expected: str = "", fix: str = CONVERTER) -> UserError:
    return UserError(f"tokenizer/{slug}", what, where="GGUF metadata", found=visible(found), expected=expected, fix=fix)


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def _rule(definition: Mapping[str, JSON]) -> str:
    """The name of the rule that cuts text.

    Raises:
        UserError: ``tokenizer/no-gguf-rule``.
    """
    model = definition["model"]
    assert isinstance(model, dict)
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    if model.get("type") != "BPE" or (odd := [name for name in plain if model.get(name)]):
        found = model.get("type") if model.get("type") != "BPE" else listing(odd)
        raise _refusal("no-gguf-model", "this kind of vocabulary is not exported to GGUF", found, "plain byte-level BPE")
    splitter, normalizer = definition.get("pre_tokenizer"), definition.get("normalizer")
    rule = _read_rule(splitter, normalizer, model.get("ignore_merges") is True)
    name = next((name for name, known in RULES.items() if known == rule and name != "default"), None)
    if name is None:
        shown = json.dumps({"pre_tokenizer": splitter, "normalizer": normalizer})
        raise _refusal(
            "no-gguf-rule", "llama.cpp's name for the tokenizer's splitting rule is not known", shown, listing(RULES)
        )
    return name


def _read_rule(splitter: JSON, normalizer: JSON, ignore_merges: bool) -> Rule | None:
    """The rule that a ``tokenizer.json`` spells out; None for one of another form."""
    if normalizer is not None and not (isinstance(normalizer, dict) and normalizer.get("type") == "NFC"):
        return None
    nested = splitter.get("pretokenizers") if isinstance(splitter, dict) and splitter.get("type") == "Sequence" else [splitter]
    steps = [step for step in nested if isinstance(step, dict)] if isinstance(nested, list) else []
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space") is not False:
        return None
    nfc, by_bytes = normalizer is not None, steps[-1].get("use_regex", True)
    match steps[:-1]:
        case [] if by_bytes:
            return Rule(ignore_merges=ignore_merges, nfc=nfc)
        case [{"type": "Digits", "individual_digits": True}] if by_bytes:
            return Rule(single_digits=True, ignore_merges=ignore_merges, nfc=nfc)
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}] if not by_bytes:
            return Rule(pattern=pattern, ignore_merges=ignore_merges, nfc=nfc)
    return None


def _vocabulary(definition: Mapping[str, JSON]) -> dict[str, int]:
    model = definition["model"]
    assert isinstance(model, dict)
    tokens = model["vocab"]
    assert isinstance(tokens, dict)
    return {token: i for token, i in tokens.items() if isinstance(i, int)}


def _merges(definition: Mapping[str, JSON]) -> list[str]:
    model = definition["model"]
    assert isinstance(model, dict)
    merges = model["merges"]
    assert isinstance(merges, list)
    return [
        merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges if isinstance(merge, (str, list))
    ]


def _added(definition: Mapping[str, JSON]) -> dict[int, dict[str, JSON]]:
    """The tokens beside the vocabulary proper, by id.

    Raises:
        UserError: ``tokenizer/no-gguf-token``, for settings of a token that a GGUF file has no word for.
    """
    listed = definition.get("added_tokens")
    found = [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []
    odd = [str(token["content"]) for token in found if any(token.get(name) for name in ("single_word", "lstrip", "rstrip"))]
    if odd:
        what = "a GGUF file cannot express that a token takes the spaces beside it along, or stands alone"
        raise _refusal("no-gguf-token", what, listing(odd), "tokens without lstrip, rstrip and single_word")
    return {token["id"]: token for token in found if isinstance(token["id"], int)}


# ---- ends and template -----------------------------------------------------------------------------------------------


def _ends(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[int, ...]:
    """Ids that end an answer, the one that the template writes behind it first.

    Raises:
        UserError: ``tokenizer/no-gguf-eos``: then llama.cpp would take id 11 for the end, whatever that is.
    """
    closing = () if template is None else closing_ids(tokenizer, template)
    ends = tokenizer.eos_ids if template is None else stop_ids(tokenizer, template)
    known = tuple(i for i in dict.fromkeys([*closing[:1], *ends]) if i in tokenizer.control_ids)
    if not known:
        what, fix = "the tokenizer names no token that ends an answer", "name its eos_token in tokenizer_config.json"
        raise _refusal("no-gguf-eos", what, "no eos token", fix=fix)
    return known


def _special(tokenizer: Tokenizer, ends: Sequence[int]) -> Keys:
    named = {name: tokenizer.special_tokens.get(text) for name, text in tokenizer.special_names.items()}
    ids = {
        "bos": named.get("bos_token"), "eos": ends[0], "eot": ends[1] if len(ends) > 1 else None,
        "padding": named.get("pad_token"), "unknown": named.get("unk_token"),
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}


def _portable(template: ChatTemplate, tokenizer: Tokenizer, keys: Keys) -> str:
    """The template for llama.cpp, which knows no ``{% generation %}``; it must write the same chats with the file's names.

    The marks become comments, which trim the lines around them in the same way. The file's eos may be another token than the
    tokenizer's own, so a template that names ``eos_token`` gets that token's text.
    """
    source = _GENERATION.sub(lambda mark: f"{{#{mark[1]} {mark[2]} {mark[3]}#}}", template.source)
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    ids = {name: keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    theirs = {f"{name}_token": texts[i] for name, i in ids.items() if isinstance(i, int)}
    for name in ("bos_token", "eos_token"):
        ours = tokenizer.special_names.get(name, "")
        if name in template.source and theirs.get(name) != ours:
            source = f"{{%- set {name} = {json.dumps(ours)} -%}}{source}"
    portable = ChatTemplate(source, theirs, trusted=False)
    for probe in PROBES:
        try:
            written = template.render(probe, add_generation_prompt=probe[-1].role == "user").text
        except UserError:
            continue  # it does not take this chat, for instance one with a system turn
        if portable.render(probe, add_generation_prompt=probe[-1].role == "user").text != written:
            what = "the chat template writes another chat with the names that a GGUF file has"
            raise _refusal("no-gguf-template", what, written[:200], fix="give the model a template without generation blocks")
    return source
