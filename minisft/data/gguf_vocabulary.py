"""A byte-level BPE tokenizer from the lists in a GGUF file's metadata.

GGUF stores tokens, merges and token types, but names its splitting rule (``tokenizer.ggml.pre``) instead of writing it
down; the rules known here are spelt out below. It refuses every other rule and every other kind of vocabulary: a wrong
split gives plausible, silently different ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minisft.common.errors import UserError, visible

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Values of tokenizer.ggml.token_type (llama.cpp's llama_token_type).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Rule:
    """How text is cut before BPE: single numerals first, GPT-2's own expression, or a longer one."""

    single_digits: bool = False
    pattern: str | None = None
    ignore_merges: bool = False
    nfc: bool = False


_GPT2 = Rule()
RULES = {
    "gpt-2": _GPT2,
    # What converters wrote before there was a key; the file leaves no better guess than GPT-2's rule (``splitting_notes``).
    "default": _GPT2,
    "smollm": Rule(single_digits=True),
    "llama-bpe": Rule(pattern=f"{_CONTRACTIONS}|{_WORDS_AND_SPACES}".replace("NUMBER", r"\p{N}{1,3}"), ignore_merges=True),
    "qwen2": Rule(pattern=f"{_CONTRACTIONS}|{_WORDS_AND_SPACES}".replace("NUMBER", r"\p{N}"), nfc=True),
}


def build_bpe(metadata: Mapping[str, object]) -> Tokenizer:
    """The ``tokenizers`` object for ``tokenizer.ggml.{model,pre,tokens,merges,token_type}``.

    Raises:
        UserError: ``tokenizer/gguf...`` for an unsupported or contradictory vocabulary.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        fix = "take the model's Hugging Face folder, which has a tokenizer.json"
        raise _bad("gguf-model", "this kind of GGUF vocabulary is not supported", visible(kind), "gpt2 (byte-level BPE)", fix)
    if not isinstance(pre, str) or pre not in RULES:
        fix = "take the model's Hugging Face folder, which has a tokenizer.json"
        raise _bad("gguf-pre", "unknown GGUF splitting rule", visible(pre), f"one of {', '.join(RULES)}", fix)
    rule = RULES[pre]
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _bad("gguf-vocabulary", "the GGUF vocabulary repeats tokens", f"{len(tokens) - len(vocabulary)} repeated", "none")
    model = models.BPE(vocab=vocabulary, merges=_merges(metadata), ignore_merges=rule.ignore_merges)
    tokenizer = Tokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splitters(rule))
    tokenizer.decoder = decoders.ByteLevel()
    types = _integers(metadata, "tokenizer.ggml.token_type", len(tokens))
    added = [(t, kind) for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, special=kind == CONTROL, normalized=False) for t, kind in added])
    return tokenizer


def splitting_notes(metadata: Mapping[str, object]) -> tuple[str, ...]:
    """What to report where the file does not name its splitting rule."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in (None, "default"):
        return ()
    return (
        "the GGUF file names no splitting rule (tokenizer.ggml.pre): GPT-2's is guessed, so token ids may be wrong; "
        "use the model's Hugging Face folder, or convert it anew",
    )


def special_ids(metadata: Mapping[str, object], vocab_size: int) -> dict[str, int]:
    """Ids by name (bos, eos, eot, unk, pad), each checked against the vocabulary's size."""
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}
    found: dict[str, int] = {}
    for name, key in keys.items():
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            continue
        if not isinstance(value, int) or not 0 <= value < vocab_size:
            raise _bad("gguf-special", f"{key}_token_id is not a token", visible(value), f"0 to {vocab_size - 1}")
        found[name] = value
    return found


def _splitters(rule: Rule) -> list[pre_tokenizers.PreTokenizer]:
    if rule.pattern is not None:
        split = pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated")
        return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if rule.single_digits else []
    return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _merges(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    # Tuples at once: lists would be long-lived objects that the garbage collector walks through, half of this function's time.
    pairs = [tuple(merge.split(" ")) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in pairs):
        odd = next(" ".join(pair) for pair in pairs if len(pair) != 2)
        raise _bad("gguf-merges", "a GGUF merge is not a pair", visible(odd), "two tokens separated by a space")
    return cast(list[tuple[str, str]], pairs)


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise _bad("gguf-vocabulary", f"{key} is not a list of strings", type(value).__name__, "a list of strings")
    return cast(list[str], value)


def _integers(metadata: Mapping[str, object], key: str, length: int) -> list[int]:
    value = metadata.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != length or not all(isinstance(item, int) for item in value):
        found = f"{len(value)} entries" if isinstance(value, (list, tuple)) else type(value).__name__
        raise _bad("gguf-vocabulary", f"{key} does not go with the tokens", found, f"{length} integers")
    return cast(list[int], value)


def _bad(slug: str, what: str, found: str, expected: str, fix: str = "") -> UserError:
    return UserError(f"tokenizer/{slug}", what, where="GGUF metadata", found=found, expected=expected, fix=fix)
