"""Data sets of the Hugging Face hub by id: ``hf:org/name[:config][@revision][#split]``, from the offline cache first.

Which files belong to a configuration and a split stands in the ``configs`` of the README's head, or else in the names of
folders and files, as on the hub. Files of rows only: a loading script is never run, and a shard that is missing is an error, no
smaller data set. The network is asked only for what the cache does not have, and never with ``HF_HUB_OFFLINE`` set. Looking
into the cache and downloading is ``huggingface_hub``'s work.

Ref: https://huggingface.co/docs/hub/datasets-data-files-configuration.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON

PREFIX = "hf:"
FORM = "hf:org/name[:config][@revision][#split]"
_SPEC = re.compile(r"hf:([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::([\w .-]+))?(?:@([\w./-]+))?(?:#([\w.-]+))?")
_DATA = re.compile(r".+\.(jsonl|ndjson|json|csv|tsv|parquet|(jsonl|ndjson|json)\.(gz|zst))", re.IGNORECASE)
_SHARD = re.compile(r"(?:.*/)?([^/]+?)-(\d{5})-of-(\d{5})[.-][^/]*")
_WORDS = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip
_NO_DATA = {"dataset_infos.json", "dataset_info.json", "state.json", "config.json"}
README, MAX_README = "README.md", 2**22


@dataclass(frozen=True)
class HubData:
    """What an entry of ``--data`` asks the hub for; None where it leaves the choice open."""

    repo: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Chosen:
    """Names of files in the repository, sorted, and the configuration and split that they are."""

    names: tuple[str, ...]
    config: str | None
    split: str


def is_hub(entry: str) -> bool:
    """Whether an entry of ``--data`` names a data set of the hub; a file of that name wins."""
    return entry.startswith(PREFIX) and not Path(entry).exists()


def parse_hub(entry: str) -> HubData:
    """Take an entry apart.

    Raises:
        UserError: ``config/bad-hub-id``.
    """
    match = _SPEC.fullmatch(entry)
    if match is None or ".." in entry:
        fix = "for instance hf:org/name, or hf:org/name:config#validation"
        raise UserError(
            "config/bad-hub-id", "no data set can be named so", where="--data", found=visible(entry), expected=FORM, fix=fix
        )
    return HubData(*match.groups())


# ---- which files -----------------------------------------------------------------------------------------------------


def choose(names: Sequence[str], head: Mapping[str, JSON], asked: HubData) -> Chosen:
    """The files of a configuration and a split.

    Args:
        names: of all files in the repository, with their folders.
        head: of its README.
        asked: what is wanted. Without a configuration the default one or the only one; without a split ``train``, or the
            only one.

    Returns:
        The files.

    Raises:
        UserError: ``data/hub-config`` or ``data/hub-split``, with what there is; ``data/hub-script``; ``data/hub-files``.
    """
    where = visible(f"{PREFIX}{asked.repo}")
    data = sorted(name for name in names if _is_data(name))
    if not data:
        what, fix = "the data set has no files of rows", "convert it to JSON lines or Parquet, and name that file"
        scripts = [name for name in names if name.endswith(".py")]
        if scripts:
            what = "the data set is made by a script, which is not run"
        found = listing(map(visible, scripts or names), 6) or "no files"
        raise UserError(f"data/hub-{'script' if scripts else 'files'}", what, where=where, found=found, fix=fix)
    config, splits = _splits(data, head, asked.config, where)
    name = asked.split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if name is None or not splits.get(name):
        what = "no such split" if name else "there are several splits, and none is named train"
        there = listing(map(visible, sorted(splits)), 20)
        fix = "name one of them: hf:org/name#split"
        raise UserError("data/hub-split", what, where=where, found=visible(name or "no #split"), expected=there, fix=fix)
    _require_all_shards(splits[name], where)
    return Chosen(tuple(splits[name]), config, name)


def _is_data(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(_DATA.fullmatch(name)) and parts[-1] not in _NO_DATA and not any(part.startswith((".", "_")) for part in parts)


def _splits(
    data: list[str], head: Mapping[str, JSON], config: str | None, where: str
) -> tuple[str | None, dict[str, list[str]]]:
    """The configuration, and its files by split."""
    listed = head.get("configs")
    configs = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not configs:
        return config, _by_name(data if config is None else _in_folder(data, config, where))
    known = {str(entry.get("config_name", "default")): entry for entry in configs}
    default = next(
        (name for name, entry in known.items() if entry.get("default") is True), "default" if "default" in known else None
    )
    name = config or default or (next(iter(known)) if len(known) == 1 else None)
    if name not in known:
        raise UserError(
            "data/hub-config", "no such configuration" if config else "the data set has several configurations", where=where,
            found=visible(config or "none"), expected=listing(map(visible, known), 20), fix="name one: hf:org/name:config",
        )  # fmt: skip
    entry = known[name]
    folder = str(entry.get("data_dir") or "").strip("/")
    inside = [each for each in data if not folder or each.startswith(f"{folder}/")]
    if entry.get("data_files") is None:
        return name, _by_name(inside)
    found: dict[str, list[str]] = {}
    for split, pattern in _patterns(entry["data_files"]):
        expression = re.compile(_regex(f"{folder}/{pattern}" if folder else pattern))
        found.setdefault(split, []).extend(each for each in data if expression.fullmatch(each))
    return name, {split: sorted(set(each)) for split, each in found.items()}


def _patterns(files: JSON) -> Iterator[tuple[str, str]]:
    """(split, pattern): one pattern, several, or ``{split, path}`` each, with one path or several; or splits to paths."""
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    for entry in files if isinstance(files, list) else [files]:
        paths = entry.get("path") if isinstance(entry, dict) else entry
        split = str(entry.get("split", "train")) if isinstance(entry, dict) else "train"
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                yield split, path.removeprefix("./")


def _regex(pattern: str) -> str:
    """A glob of paths as a regular expression: ``*`` stays in its folder, ``**`` does not."""
    forms = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return "".join(forms.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def _in_folder(data: list[str], config: str, where: str) -> list[str]:
    """Without a list of configurations, a folder is one."""
    for folder in (config, f"data/{config}"):
        if inside := [name for name in data if name.startswith(f"{folder}/")]:
            return inside
    folders = sorted({str(PurePosixPath(name).parent) for name in data})
    raise UserError(
        "data/hub-config", "no such configuration", where=where, found=visible(config),
        expected=f"a folder of the data set: {listing(map(visible, folders), 20)}", fix="leave the configuration away",
    )  # fmt: skip


def _by_name(data: Sequence[str]) -> dict[str, list[str]]:
    """Files by split, by the words in their names; if no file has one, all of them are for training."""
    found: dict[str, list[str]] = {}
    for name in data:
        if split := _split_of(name):
            found.setdefault(split, []).append(name)
    return found or {"train": list(data)}


def _split_of(name: str) -> str | None:
    """The split in a path: in the file's name, or else in the nearest folder."""
    for part in reversed(PurePosixPath(name).parts):
        words = re.split(r"[^A-Za-z0-9]+", part)
        for split, spellings in _WORDS.items():
            if not set(words).isdisjoint(spellings):
                return split
    shard = _SHARD.fullmatch(name)
    return shard[1] if shard else None


def _require_all_shards(names: Sequence[str], where: str) -> None:
    """A shard that is not there would make a smaller data set without a word."""
    there: dict[tuple[str, int], set[int]] = {}  # by folder and stem: each folder has its own
    for match in filter(None, map(_SHARD.fullmatch, names)):
        there.setdefault((match.string[: match.start(2) - 1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), found in sorted(there.items()):
        if missing := [i for i in range(count) if i not in found]:
            raise UserError(
                "data/hub-incomplete", f"{len(missing)} of {count} files are missing", where=where,
                found=f"no {visible(stem)}-{missing[0]:05d}-of-{count:05d}",
                fix="download it whole: hf download --repo-type dataset org/name",
            )  # fmt: skip


# ---- where they are --------------------------------------------------------------------------------------------------


def hub_files(entry: str) -> tuple[list[Path], str]:
    """The files of an entry on this machine, in order, and a sentence about what was chosen.

    Raises:
        UserError: what ``parse_hub`` and ``choose`` refuse; ``data/not-cached``; ``data/download``; ``data/bad-file`` for a
            link that leads out of the cache.
    """
    from huggingface_hub import constants

    asked = parse_hub(entry)
    folder, chosen = _cached(asked, offline := bool(constants.HF_HUB_OFFLINE))
    if folder is None or chosen is None:
        if offline:
            raise UserError(
                "data/not-cached", "the data set is not in the cache, and HF_HUB_OFFLINE is set", where=visible(entry),
                found=f"nothing in {visible(constants.HF_HUB_CACHE)}", expected="a snapshot of it",
                fix=f"hf download --repo-type dataset {asked.repo} while there is a network, or name a file",
            )  # fmt: skip
        folder, chosen = _download(asked)
    config = f"configuration {chosen.config}, " if chosen.config else ""
    what = f"{PREFIX}{asked.repo}: {config}split {chosen.split}, revision {folder.name[:12]}, {listing(chosen.names, 3)}"
    return [_inside(folder, name) for name in chosen.names], visible(what, 500)


def _cached(asked: HubData, offline: bool) -> tuple[Path | None, Chosen | None]:
    """The snapshot in the cache and what it has of this; with a network, an unfitting one is as good as none."""
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(asked.repo, repo_type="dataset", revision=asked.revision, local_files_only=True)
        )
    except (OSError, ValueError):  # its own errors are both
        return None, None
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    try:
        return folder, choose(names, _head(folder / README, asked), asked)
    except UserError:
        if offline:
            raise
        return None, None


def _download(asked: HubData) -> tuple[Path, Chosen]:
    """Fetch README and the chosen files."""
    import huggingface_hub

    repo, revision = asked.repo, asked.revision
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        readme = Path()
        if README in names:
            readme = Path(huggingface_hub.hf_hub_download(repo, README, repo_type="dataset", revision=revision))
        chosen = choose(names, _head(readme, asked), asked)
        wanted = [*map(glob.escape, chosen.names), README]
        found = huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted)
        return Path(found), chosen
    except UserError:
        raise
    except Exception as error:  # a listing passes on whatever the HTTP library raises, which is no OSError
        raise UserError(
            "data/download", "the data set is not in the cache, and the download failed", where=visible(f"{PREFIX}{repo}"),
            found=visible(error, 300), fix="check the name and the connection, or download it yourself and name the file",
        ) from None  # fmt: skip


def _head(readme: Path, asked: HubData) -> Mapping[str, JSON]:
    """The README's YAML; empty without one."""
    import huggingface_hub

    if not readme.is_file():
        return {}
    where, fix = visible(f"{PREFIX}{asked.repo}"), "name a file of the data set instead"
    if (size := readme.stat().st_size) > MAX_README:
        what, found, most = "the README is too large to look for its head", f"{size:,} bytes", f"at most {MAX_README:,}"
        raise UserError("data/hub-readme", what, where=where, found=found, expected=most, fix=fix)
    try:
        head = huggingface_hub.metadata_load(readme)
    except Exception as error:  # whatever its reader of YAML raises
        what = "the head of the README is no YAML"
        raise UserError("data/hub-readme", what, where=where, found=visible(error, 200), fix=fix) from None
    return head if isinstance(head, dict) else {}


def _inside(folder: Path, name: str) -> Path:
    """``folder/name``; the cache links it to its blobs, and to nothing else."""
    path, real = folder / name, (folder / name).resolve()
    roots = folder.resolve(), folder.resolve().parent.parent / "blobs"
    if real.is_file() and any(real.is_relative_to(root) for root in roots):
        return path
    raise UserError(
        "data/bad-file", "a link leads out of the cache", where=visible(path), found=visible(real), expected="a file in it"
    )
