"""``manifest.json``: what a folder must hold to be whole.

It lists every other file with size and sha256, says what the folder is (step, identity of the run, which files are groups of
tensors) and is sealed by a sha256 of its own, so that one flipped bit anywhere, in the manifest too, is noticed. It protects
against broken disks and interrupted copies, not against somebody who writes a manifest on purpose: what is read after it is
still read as hostile.

The one idea: a manifest is genuine when writing its values again gives the same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from minisft.common import safe_json
from minisft.common.atomic_files import FileRecord
from minisft.common.errors import visible
from minisft.common.safe_json import JSON

FORMAT = 1
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 2**20


class UnusableError(Exception):
    """Why one folder cannot be used; the text is shown to the user."""


class NewerFormatError(UnusableError):
    """Whole, but written by a later minisft."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. ``files``: relative name -> record; ``groups``: the tensor files among them, no suffix."""

    step: int
    identity: dict[str, JSON]
    groups: tuple[str, ...]
    files: dict[str, FileRecord]

    def render(self) -> bytes:
        """The file's content.

        Raises:
            ValueError: ``identity`` holds what JSON cannot (NaN, a lone surrogate).
        """
        files: dict[str, JSON] = {name: {"bytes": r.num_bytes, "sha256": r.sha256} for name, r in self.files.items()}
        head: dict[str, JSON] = {"format": FORMAT, "step": self.step, "identity": self.identity}
        return _seal({**head, "groups": list(self.groups), "files": files})

    def check_files(self, folder: Path) -> None:
        """Read every byte of every file.

        Raises:
            UnusableError: the first file that is missing, has another size or another sha256.
        """
        for name, expected in self.files.items():
            path = folder / name
            if "\0" in name or not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
                raise UnusableError(f"{visible(name)} is missing")
            found = path.stat().st_size
            if found != expected.num_bytes:
                raise UnusableError(f"{visible(name)} has {found:,} bytes, the manifest says {expected.num_bytes:,}")
            if record(path) != expected:
                raise UnusableError(f"{visible(name)} is damaged: its sha256 differs")


def read_manifest(path: Path) -> Manifest:
    """Read and check one manifest (not yet the files it names).

    Raises:
        UnusableError: missing, damaged; ``NewerFormatError`` for a whole one of a later format.
    """
    if not path.is_file():
        raise UnusableError(f"{MANIFEST} is missing")
    raw = read_small(path)
    try:
        document = as_object(safe_json.loads(raw))
        if _seal({key: value for key, value in document.items() if key != "sha256"}) != raw:
            raise ValueError("it does not match its own sha256")
        number = document["format"]
        if isinstance(number, int) and number > FORMAT:
            raise NewerFormatError(f"format {number}; this minisft reads up to {FORMAT}")
        return _parse(document)
    except (ValueError, KeyError) as error:
        raise UnusableError(f"{MANIFEST} is damaged: {visible(error, 80)}") from None


def _parse(document: dict[str, JSON]) -> Manifest:
    entries = {name: as_object(entry) for name, entry in as_object(document["files"]).items()}
    files = {name: FileRecord(int(str(entry["bytes"])), str(entry["sha256"])) for name, entry in entries.items()}
    groups = document["groups"]
    if not isinstance(groups, list) or not {f"{name}.safetensors" for name in groups} <= files.keys():
        raise ValueError("a group has no file")
    return Manifest(int(str(document["step"])), as_object(document["identity"]), tuple(map(str, groups)), files)


def _seal(document: dict[str, JSON]) -> bytes:
    """JSON text with its own sha256 as the last key.

    Later formats must keep this rule: only a whole manifest may claim to be of a newer format (a flipped bit may not).
    """
    digest = hashlib.sha256(json_bytes(document)).hexdigest()
    return json_bytes({**document, "sha256": digest})


def json_bytes(document: dict[str, JSON]) -> bytes:
    """Indented JSON that ``safe_json`` reads back (checked now, not at the resume that would need it).

    Raises:
        ValueError: NaN, infinity, a lone surrogate, too deep.
    """
    text = (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
    safe_json.loads(text)
    return text


def record(path: Path) -> FileRecord:
    """Size and sha256 of a file as it is now; constant memory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(os.fstat(file.fileno()).st_size, digest)


def read_small(path: Path) -> bytes:
    """The content of a JSON file, at most ``MAX_JSON_BYTES``."""
    with path.open("rb") as file:
        raw = safe_json.read_at_most(file, MAX_JSON_BYTES)
    if len(raw) > MAX_JSON_BYTES:
        raise UnusableError(f"{path.name} is larger than {MAX_JSON_BYTES:,} bytes")
    return raw


def as_object(value: JSON) -> dict[str, JSON]:
    """``value`` if it is a JSON object; ``ValueError`` otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value
