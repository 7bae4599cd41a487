"""What a base's folder says beside its weights, kept in a folder that is made from it.

A merge changes weights. Sampling defaults, tokenizer settings, templates by name, vocabulary files of other programs and
licences stay what they were, key by key. From these files nothing is computed here. Left behind are code, what names code, and
files that this library does not know; the caller gets their names. A README and other forms of the weights are not settings.

Ref: transformers 5, ``save_pretrained`` of models and tokenizers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from minisft.common.errors import UserError, listing
from minisft.common.safe_json import JSON
from minisft.data.tokenizer import Tokenizer
from minisft.formats.fields import read_json_object, write_json
from minisft.formats.source import PICKLES, regular_file

GENERATION, TOKENIZER, SPECIAL, CONFIG = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "config.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
CODE = "auto_map"  # names Python files in the folder
MAX_BYTES = 2**26  # of one file that is copied
_WRITTEN = {GENERATION, TOKENIZER, SPECIAL, CONFIG, "tokenizer.json", "chat_template.jinja"}
_COPIED = {"tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "spiece.model"}
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")  # a derived model has to carry them
# What a folder holds of a model beside its settings: weights in any form, and what is said about them.
_NO_SETTINGS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".md", ".png", ".svg", ".html")
_OWN = {"merge_report.json", "training_args.json"}


def folder_of(base: str | Path | None) -> Path | None:
    """The folder whose settings can be kept; None for a GGUF file, which has none, and for one that is gone."""
    return Path(base) if base is not None and Path(base).is_dir() else None


def kept_config(base: Path | None) -> dict[str, JSON]:
    """The keys of the base's ``config.json`` that a model made from it still has, unless it writes them itself."""
    values = _read(base, CONFIG)
    return {name: value for name, value in values.items() if name not in (CODE, "quantization_config")}


def keep_settings(folder: Path, base: Path | None, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Add what the base says to the settings that were written into ``folder``.

    Args:
        folder: holds the model's own ``generation_config.json`` and the tokenizer's files.
        base: the folder of the base; None keeps nothing.
        tokenizer: what was written; its template decides over one in the base's settings.

    Returns:
        what was not kept, for people: files, and keys as ``file: key``.

    Raises:
        UserError: a settings file of the base that is no JSON object.
    """
    if base is None:
        return ()
    lost = [f"{CONFIG}: {CODE}"] if _read(base, CONFIG).get(CODE) is not None else []
    own = _read(folder, GENERATION)  # bos, eos and pad
    write_json(folder / GENERATION, {**_read(base, GENERATION), **own})
    lost += _keep_tokenizer(folder, base, tokenizer)
    return (*lost, *_keep_files(folder, base))


def _read(folder: Path | None, name: str) -> dict[str, JSON]:
    if folder is None or not (folder / name).exists():
        return {}
    return read_json_object(regular_file(folder, name), "model/bad-config", MAX_BYTES)


def _write(path: Path, value: Mapping[str, JSON]) -> None:
    """In the form that ``Tokenizer.save`` writes, where keys keep their order: nothing new gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _keep_tokenizer(folder: Path, base: Path, tokenizer: Tokenizer) -> list[str]:
    """The base's settings win over the few that were written, as long as they describe the same special tokens."""
    theirs = _read(base, TOKENIZER)
    special = {**_read(base, SPECIAL), **{name: theirs[name] for name in tokenizer.special_names if name in theirs}}
    texts = {name: _text(special.get(name)) for name in tokenizer.special_names}
    if not theirs or any(text not in (None, tokenizer.special_names[name]) for name, text in texts.items()):
        return [TOKENIZER] if theirs else []
    lost = [name for name in (CODE, "chat_template") if name in theirs]
    if _default(theirs.get("chat_template")) == tokenizer.chat_template and "chat_template" in lost:
        lost.remove("chat_template")
    dropped = {*lost, *(["tokenizer_class"] if CODE in lost else [])}
    kept = {name: value for name, value in theirs.items() if name not in dropped and value is not None}
    _write(folder / TOKENIZER, {**_read(folder, TOKENIZER), **kept})
    _write(folder / SPECIAL, {**_read(folder, SPECIAL), **{k: v for k, v in _read(base, SPECIAL).items() if v is not None}})
    return [f"{TOKENIZER}: {name}" for name in lost]


def _text(token: JSON) -> str | None:
    """A special token is a string or ``{"content": ...}``."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _default(template: JSON) -> str | None:
    """The template that is used unless another one is asked for by name."""
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def replace_template(folder: Path, template: bytes, file: str) -> tuple[str, ...]:
    """Put another template into a written folder, and take the one that its tokenizer settings hold away.

    Args:
        folder: a model folder that is being written.
        template: Jinja source.
        file: its name in the folder.

    Returns:
        what was taken away, as ``keep_settings`` names it.
    """
    (folder / file).write_bytes(template)
    settings = _read(folder, TOKENIZER)
    if "chat_template" not in settings or _default(settings["chat_template"]) == template.decode("utf-8", "replace"):
        return ()
    del settings["chat_template"]
    _write(folder / TOKENIZER, settings)
    return (f"{TOKENIZER}: chat_template",)


def _keep_files(folder: Path, base: Path) -> list[str]:
    """Copy the files that belong to the model; the names of the others."""
    lost = []
    for entry in sorted(base.iterdir()):
        name = entry.name
        if name in _WRITTEN or name in _OWN or name.startswith("."):
            continue
        if entry.is_dir():
            lost += _copy_templates(entry, folder) if name == TEMPLATES else []
        elif name in _COPIED or name.split(".")[0].upper() in _LEGAL:
            lost += _copy(base, name, folder)
        elif not name.endswith(_NO_SETTINGS):
            lost.append(name)
    return lost


def _copy_templates(source: Path, folder: Path) -> list[str]:
    (folder / TEMPLATES).mkdir()
    names = [entry.name for entry in sorted(source.iterdir()) if entry.suffix == ".jinja"]
    return [f"{TEMPLATES}/{name}" for each in names for name in _copy(source, each, folder / TEMPLATES)]


def _copy(source: Path, name: str, folder: Path) -> list[str]:
    """Copy a file; its name if it is none that can be copied (a link that leads elsewhere, or too large)."""
    try:
        path = regular_file(source, name)
    except UserError:
        return [name]
    if path.stat().st_size > MAX_BYTES:
        return [name]
    shutil.copyfile(path, folder / name)
    return []


def not_kept(names: Collection[str]) -> str:
    """What was left behind, as the end of a summary; empty if nothing was."""
    return f"; not kept of the base: {listing(names, 6)}" if names else ""
