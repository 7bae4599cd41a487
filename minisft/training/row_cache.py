"""Encoded rows kept from one run to the next, in the user's cache folder: reading and encoding a large file takes minutes.

An entry is named by a hash of all that decides what is in it: the bytes of the data files, the tokenizer, the template, the
settings that matter, and the code that reads and encodes. What a template wrote of the time is compared when the entry is
found. It appears whole, in one step, and every byte of it is hashed before it is used. A broken entry is made again, and a
folder that cannot be written to costs time and nothing else: nothing here ends a run.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minisft.common.atomic_files import remove_folder, staged_folder
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.common.user_cache import cache_folder
from minisft.config import RunConfig
from minisft.data.sources import parse_sources
from minisft.data.template import ChatTemplate
from minisft.data.token_rows import TokenRows
from minisft.data.tokenizer import Tokenizer
from minisft.formats.source import file_sha256
from minisft.training.manifest import MANIFEST, Manifest, UnusableError, as_object, read_manifest, record

MIN_BYTES = 4 * 2**20  # of the data; less is encoded in a few seconds
MAX_ENTRIES = 8
_FORMAT = 1
_STALE_S = 24 * 3600.0
_PARTS = ("train", "validation")
_FILES = tuple(f"{name}.{part}" for name in _PARTS for part in ("tokens", "offsets", "facts"))
_SETTINGS = ("map", "turns", "max_length", "strict", "allow_control_tokens", "validation_share", "seed")
_PACKAGE = Path(__file__).parents[1]
_CODE = ("data/*.py", "quality/*.py", "common/seeds.py", "common/safe_json.py", "training/run_data.py", "training/row_cache.py")
Log = Callable[[str], None]


@dataclass(frozen=True)
class PreparedRows:
    """What a run learns from, encoded: the rows, and ``record``, all that is said and kept about them, as JSON."""

    train: TokenRows
    validation: TokenRows
    record: dict[str, JSON]


class RowCache:
    """One entry, there or not.

    Args:
        folder: where it lies.
        dates: what its template would write of the time, given a form.
        log: told in one sentence what went wrong.
    """

    def __init__(self, folder: Path, dates: Callable[[str], str], log: Log) -> None:
        self.folder, self._date, self._log = folder, dates, log

    def load(self) -> PreparedRows | None:
        """The rows, if they are there and whole."""
        if not self.folder.is_dir():
            return None
        try:
            manifest = read_manifest(self.folder / MANIFEST)
            if set(manifest.files) != set(_FILES):
                raise UnusableError("it lists other files")
            manifest.check_files(self.folder)
            train, validation = (TokenRows.load(self.folder, name) for name in _PARTS)
            dates = as_object(manifest.identity["dates"])
        except (UnusableError, OSError, ValueError, KeyError) as error:
            self._log(f"the rows kept in {visible(self.folder)} are broken ({visible(error, 120)}): they are encoded again")
            return None
        if any(self._date(form) != text for form, text in dates.items()):
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder)  # the least recently used go first
        return PreparedRows(train, validation, manifest.identity)

    def store(self, build: Callable[[Path | None], PreparedRows]) -> PreparedRows:
        """Make the rows and keep them.

        Args:
            build: makes them; their tokens go into files of the folder that it is given, or stay in memory.

        Returns:
            The rows.
        """
        rows: PreparedRows | None = None
        try:
            if self.folder.is_dir():
                remove_folder(self.folder)
            with staged_folder(self.folder) as staging:
                rows = build(staging)
                _write(staging, rows)
            _prune(self.folder.parent)
        except UserError:
            if rows is None:
                raise  # about the data; else another process was faster and made the same
        except (OSError, ValueError) as error:
            self._log(f"the encoded rows are not kept for the next run: {visible(error, 160)}")
        return build(None) if rows is None else rows


def _write(folder: Path, rows: PreparedRows) -> None:
    for name, part in zip(_PARTS, (rows.train, rows.validation), strict=True):
        part.save(folder, name)
    manifest = Manifest(0, rows.record, (), {name: record(folder / name) for name in _FILES})
    (folder / MANIFEST).write_bytes(manifest.render())


def _prune(parent: Path) -> None:
    """Keep the entries that were used last, and clear away what killed runs left half made."""
    ages = {path: path.stat().st_mtime for path in parent.iterdir() if path.is_dir()}
    entries = sorted((path for path in ages if not path.name.startswith(".")), key=lambda path: -ages[path])
    for path in entries[MAX_ENTRIES:]:
        remove_folder(path)
    for path in (path for path in ages if path.name.startswith(".") and time.time() - ages[path] > _STALE_S):
        shutil.rmtree(path, ignore_errors=True)


def open_cache(
    run: RunConfig, tokenizer: Tokenizer, template: ChatTemplate, context: int | None, now: datetime.datetime, log: Log
) -> RowCache | None:
    """The entry for a run.

    Args:
        run: the settings.
        tokenizer: the model's.
        template: of the run.
        context: the most tokens that the model is made for.
        now: the time that the template writes.
        log: told what went wrong.

    Returns:
        The entry; None where nothing is kept: small data, ``--no-cache``, or no folder for it.
    """
    sources = parse_sources(run.data)
    files = [Path(path) for path in (*(source.path for source in sources), *([run.eval_data] if run.eval_data else []))]
    if not run.cache or not all(path.is_file() for path in files) or sum(path.stat().st_size for path in files) < MIN_BYTES:
        return None
    weights = [source.weight for source in sources]
    names = [path.suffix.lower() for path in files] if len(sources) == 1 else list(map(str, files))
    facts: Mapping[str, JSON] = {
        "format": _FORMAT,
        "files": [[name, file_sha256(path)] for name, path in zip(names, files, strict=True)],
        "weights": list(weights),
        "eval": run.eval_data is not None,
        "tokenizer": tokenizer.sha256,
        "template": [template.source, template.has_generation_blocks],
        "settings": {name: value for name, value in run.to_dict().items() if name in _SETTINGS},
        "context": context,
        "code": _code_sha256(),
        "libraries": [importlib.metadata.version(name) for name in ("tokenizers", "jinja2", "numpy")],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    try:
        return RowCache(cache_folder() / "rows" / key, now.strftime, log)
    except (OSError, RuntimeError) as error:
        log(f"the encoded rows are not kept for the next run: {visible(error, 160)}")
        return None


def _code_sha256() -> str:
    """Hash of the code that an entry depends on: a change to it makes new entries."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _CODE for path in _PACKAGE.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
