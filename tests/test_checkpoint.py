"""Checkpoints: bit-exact, and whole or absent whatever happens while they are written."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from crashing import Shim, Tree, crash_states, install, materialize, snapshot
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from minisft.common import safe_json
from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.training import checkpoint
from minisft.training.checkpoint import Checkpoint, RunLock, load_latest, load_step, save_checkpoint
from minisft.training.identity import check_identity
from minisft.training.manifest import UnusableError
from minisft.training.runlog import MetricsLog

pytestmark = pytest.mark.slow

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
IDENTITY: dict[str, JSON] = {"config": {"lr": 1e-4, "targets": ["q_proj"]}, "data": "ab" * 32, "base": None}


def message_of(body: Callable[[], object]) -> str:
    """The text of the ``UserError`` that ``body`` raised, or ``ok``."""
    try:
        body()
    except UserError as error:
        return str(error)
    return "ok"


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: some tests write tens of thousands of small files."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    folder = shared / f"minisft-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def groups_of(step: int, size: int = 40) -> dict[str, dict[str, Tensor]]:
    """Tensors that differ at every step."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(step))
    adapter = {"q.lora_A": values, "q.lora_B": values.bfloat16()}
    return {"adapter": adapter, "optimizer": {"m": values**2, "n": torch.tensor(step)}}


def save(run: Path, step: int, **options: object) -> Path:
    keywords: dict[str, object] = {"keep_last": 2, **options}
    return save_checkpoint(run, step, groups_of(step), {"step": step, "best": None}, IDENTITY, **keywords)


def bits(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, tuple[torch.dtype, torch.Size, bytes]]]:
    """The tensors as values that ``==`` compares bit for bit."""
    return {
        group: {
            name: (t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, t in named.items()
        }
        for group, named in groups.items()
    }


def is_exactly(found: Checkpoint | None, step: int) -> bool:
    return (
        found is not None
        and (found.step, found.state, found.identity) == (step, {"step": step, "best": None}, IDENTITY)
        and bits(found.groups) == bits(groups_of(step))
    )


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# --- what goes in comes out -----------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype, any bits (NaN payloads too), any small shape, sometimes not contiguous."""
    dtype = draw(st.sampled_from([*FLOATS, *INTEGERS, torch.bool]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        flat = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype)
    else:
        size = count * dtype.itemsize
        flat = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size)) + bytes(8)), dtype=torch.uint8)
        flat = flat[:size].view(dtype)
    tensor = flat.reshape(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and tensor.dim() > 1 else tensor


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
FLAT_JSON = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | NAMES
ANY_JSON = st.recursive(
    FLAT_JSON, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)


@given(
    st.dictionaries(st.sampled_from(["adapter", "optimizer", "ema-1"]), st.dictionaries(NAMES, tensors(), max_size=4)),
    st.dictionaries(NAMES, ANY_JSON, max_size=3),
    st.dictionaries(NAMES, ANY_JSON, max_size=3),
)
def test_round_trip_is_bit_exact(
    tmp_path_factory: pytest.TempPathFactory,
    groups: dict[str, dict[str, Tensor]],
    state: dict[str, JSON],
    identity: dict[str, JSON],
) -> None:
    run = tmp_path_factory.mktemp("run")
    path = save_checkpoint(run, 7, groups, state, identity)
    found = load_latest(run)
    assert found is not None
    assert (found.step, found.state, found.identity, found.skipped, found.path) == (7, state, identity, (), path)
    assert bits(found.groups) == bits(groups)
    assert bits({name: load_file(path / f"{name}.safetensors") for name in groups}) == bits(groups)


def test_parameters_and_large_tensors(tmp_path: Path) -> None:
    big = torch.nn.Parameter(torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0)))  # more than one chunk
    save_checkpoint(tmp_path, 1, {"a": {"w": big}}, {}, {})
    found = load_latest(tmp_path)
    assert found is not None
    assert torch.equal(found.groups["a"]["w"], big.detach())
    assert not found.groups["a"]["w"].requires_grad


def test_tensors_are_aligned(tmp_path: Path) -> None:
    """Each starts at a multiple of its element size, so that the file can be mapped."""
    group = {
        f"{i}": torch.zeros(3, dtype=dtype) for i, dtype in enumerate([torch.uint8, torch.float64, torch.bfloat16, torch.int32])
    }
    content = (save_checkpoint(tmp_path, 1, {"a": group}, {}, {}) / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        assert (start + entry["data_offsets"][0]) % group[name].element_size() == 0


def test_loaded_tensors_do_not_hold_the_file(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = load_latest(tmp_path)
    maps = Path("/proc/self/maps").read_text()
    assert found is not None
    assert str(found.path) not in maps


def test_extra_files_are_kept_and_guarded(tmp_path: Path) -> None:
    def adapter(staging: Path) -> None:
        (staging / "adapter").mkdir()
        (staging / "adapter" / "adapter_config.json").write_text("{}")

    save(tmp_path, 1)
    path = save(tmp_path, 2, write_extra=adapter)
    extra = path / "adapter" / "adapter_config.json"
    assert extra.read_text() == "{}"
    extra.write_text("[]")
    found = load_latest(tmp_path)
    assert is_exactly(found, 1)
    assert found is not None
    assert "adapter/adapter_config.json is damaged" in found.skipped[0]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    (tmp_path / "checkpoints" / ".tmp-step-1.ab").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-x").mkdir()
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize(
    ("groups", "state"),
    [
        ({"../a": {}}, {}),
        ({"a": {"__metadata__": torch.zeros(1)}}, {}),
        ({"a": {"w": torch.zeros(1, dtype=torch.complex64)}}, {}),
        ({"a": {}}, {"best": float("inf")}),
        ({"a": {}}, {"name": "\udc80"}),
    ],
)
def test_what_could_not_be_read_back_is_not_saved(
    tmp_path: Path, groups: Mapping[str, dict[str, Tensor]], state: dict[str, JSON]
) -> None:
    with pytest.raises(ValueError, match=r"group|cannot be saved|JSON|surrogate"):
        save_checkpoint(tmp_path, 1, groups, state, {})
    assert steps(tmp_path) == []


# --- rotation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_keep_last(tmp_path: Path, keep_last: int) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep_last=keep_last)
        assert steps(tmp_path) == [f"step-{s}" for s in range(max(1, step - keep_last + 1), step + 1)]


def test_best_and_last_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=1, protect=[2])
    assert steps(tmp_path) == ["step-2", "step-5"]
    save(tmp_path, 6, keep_last=1, protect=[5])  # a new best: the old one may go
    assert steps(tmp_path) == ["step-5", "step-6"]


def test_a_broken_checkpoint_never_counts_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=2, protect=[1])
    (tmp_path / "checkpoints" / "step-3" / "state.json").write_text("{}")
    save(tmp_path, 4, keep_last=2)
    assert steps(tmp_path) == ["step-2", "step-3", "step-4"]  # 4 and 2 are whole; 1 has two whole ones after it
    save(tmp_path, 5, keep_last=2)
    assert steps(tmp_path) == ["step-4", "step-5"]


def test_the_newest_save_stays_below_higher_old_numbers(tmp_path: Path) -> None:
    for step in (100, 200, 3):
        save(tmp_path, step, keep_last=1)
    assert steps(tmp_path) == ["step-200", "step-3"]


def test_a_whole_step_is_not_saved_twice_but_a_broken_one_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    with pytest.raises(UserError, match="checkpoint/exists"):
        save(tmp_path, 2)
    (path / "manifest.json").unlink()
    assert is_exactly(load_latest(tmp_path), 1)
    save(tmp_path, 2)
    assert is_exactly(load_latest(tmp_path), 2)
    assert steps(tmp_path) == ["step-1", "step-2"]


# --- damage ---------------------------------------------------------------------------------------------------------------


def _two_checkpoints(run: Path) -> Path:
    save(run, 1)
    return save(run, 2)


def _falls_back(run: Path, what: str) -> None:
    found = load_latest(run)
    assert is_exactly(found, 1), what
    assert found is not None
    assert len(found.skipped) == 1, what
    assert found.skipped[0].startswith("step-2: "), what


def _header_bytes(path: Path) -> int:
    """All of a JSON file, the header of a safetensors file."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else path.stat().st_size


def test_every_flipped_byte_is_noticed(ram: Path, record_property: Callable[[str, object], None]) -> None:
    newest = _two_checkpoints(ram)
    rng, num_flips = random.Random(0), 0
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        header = _header_bytes(path)
        places = [*range(header), *rng.sample(range(header, len(whole)), k=min(60, len(whole) - header))]
        for place in places:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :])
            _falls_back(ram, f"{path.name} byte {place}")
        path.write_bytes(whole)
        num_flips += len(places)
    assert is_exactly(load_latest(ram), 2)
    record_property("flips", num_flips)


def test_every_truncation_addition_and_absence_is_noticed(ram: Path, record_property: Callable[[str, object], None]) -> None:
    newest, num_lengths = _two_checkpoints(ram), 0
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            _falls_back(ram, f"{path.name} cut to {length}")
        path.write_bytes(whole + b"\n")
        _falls_back(ram, f"{path.name} longer")
        path.unlink()
        _falls_back(ram, f"{path.name} missing")
        path.write_bytes(whole)
        num_lengths += len(whole) + 2
    assert is_exactly(load_latest(ram), 2)
    record_property("truncations", num_lengths)


def test_none_valid_lists_every_reason(tmp_path: Path) -> None:
    newest = _two_checkpoints(tmp_path)
    (newest / "manifest.json").unlink()
    adapter = tmp_path / "checkpoints" / "step-1" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint/none-valid") as caught:
        load_latest(tmp_path)
    assert caught.value.exit_code == 5
    assert "step-2: manifest.json is missing | step-1: adapter.safetensors has 100 bytes, the manifest" in str(caught.value)


def _reseal(newest: Path, change: Callable[[dict[str, JSON]], object]) -> None:
    """Rewrite a manifest with a valid seal, as a later version or somebody hostile would."""
    from minisft.training.manifest import _seal

    document = safe_json.loads((newest / "manifest.json").read_bytes())
    assert isinstance(document, dict)
    document.pop("sha256")
    change(document)
    (newest / "manifest.json").write_bytes(_seal(document))


def test_a_newer_format_is_refused_by_load_and_left_by_save(tmp_path: Path) -> None:
    newest = _two_checkpoints(tmp_path)
    _reseal(newest, lambda document: document.update(format=2))
    with pytest.raises(UserError, match="checkpoint/newer-format"):
        load_latest(tmp_path)
    with pytest.raises(UserError, match="checkpoint/newer-format"):
        save(tmp_path, 2)
    assert newest.is_dir()


HOSTILE: list[dict[str, JSON]] = [
    {"files": []},
    {"files": {"state.json": []}},
    {"files": {"state.json": {"bytes": "x", "sha256": "y"}}},
    {"files": {"../step-1/state.json": {"bytes": 1, "sha256": ""}}},
    {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
    {"files": {"a\0b": {"bytes": 1, "sha256": ""}}},
    {"files": {}, "groups": []},
    {"files": {}, "groups": ["adapter"]},
    {"groups": "adapter"},
    {"groups": ["../x"]},
    {"identity": 3},
    {"step": 1},
    {"step": None},
    {"format": "1", "step": []},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_manifests_are_skipped(tmp_path: Path, change: dict[str, JSON]) -> None:
    newest = _two_checkpoints(tmp_path)
    _reseal(newest, lambda document: document.update(change))
    _falls_back(tmp_path, str(change))


def test_sealed_nonsense_is_skipped(tmp_path: Path) -> None:
    """Files that match the manifest but are not what they are called."""
    for name in ("adapter.safetensors", "state.json"):
        run = tmp_path / name
        newest = _two_checkpoints(run)
        (newest / name).write_bytes(b"[1, 2]")
        record = checkpoint.record(newest / name)
        entry: JSON = {"bytes": record.num_bytes, "sha256": record.sha256}
        _reseal(newest, lambda document, name=name, entry=entry: document["files"].update({name: entry}))
        _falls_back(run, name)


def test_a_fifo_or_an_outside_link_is_not_read(tmp_path: Path) -> None:
    newest = _two_checkpoints(tmp_path)
    content = (newest / "state.json").read_bytes()
    (tmp_path / "outside").write_bytes(content)
    (newest / "state.json").unlink()
    (newest / "state.json").symlink_to(tmp_path / "outside")
    _falls_back(tmp_path, "link")
    (newest / "state.json").unlink()
    os.mkfifo(newest / "state.json")
    _falls_back(tmp_path, "fifo")


# --- crashes, enumerated --------------------------------------------------------------------------------------------------


def _record_save(ram: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int) -> tuple[Path, Tree, Shim]:
    """A run with its old checkpoints, and the calls of saving step 3."""
    run = ram / "run"
    for step in (1, 2):
        save(run, step, keep_last=keep_last)
    start, shim = snapshot(run), Shim()
    with monkeypatch.context() as patch:
        install(patch, shim)
        save(run, 3, keep_last=keep_last)
    return run, start, shim


def _step_after_crash(run: Path) -> int:
    """The step that loads, 0 for none; only bit-exact steps count."""
    try:
        found = load_latest(run)
    except UserError:
        return 0
    assert found is not None
    return found.step if is_exactly(found, found.step) else 0


@pytest.mark.parametrize("keep_last", [1, 2])
def test_after_every_possible_crash_old_or_new_loads(
    ram: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int, record_property: Callable[[str, object], None]
) -> None:
    run, start, shim = _record_save(ram, monkeypatch, keep_last)
    committed = next(i for i, op in enumerate(shim.ops) if op.kind == "rename") + 2  # the rename and the parent's fsync
    num_states, loaded = 0, set()
    for end in range(len(shim.ops) + 1):
        for state in crash_states(start, shim.ops[:end]):
            step = _step_after_crash(materialize(state, run, ram / "state"))
            assert step == 3 or (step == 2 and end < committed), f"after {end} of {len(shim.ops)} calls: step {step}"
            loaded.add(step)
            num_states += 1
    assert loaded == {2, 3}
    assert num_states > 100
    record_property("states", num_states)


@pytest.mark.parametrize("left_out", ["fsync", "manifest last"])
def test_the_enumeration_catches_a_worse_protocol(ram: Path, monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    """Negative control: the same states of a save without fsync, or of one that writes under the final name."""
    run, start, shim = _record_save(ram, monkeypatch, keep_last=1)
    if left_out == "fsync":
        ops = [op for op in shim.ops if op.kind != "fsync"]
        states = (state for end in range(len(ops) + 1) for state in crash_states(start, ops[:end]))
        assert any(_step_after_crash(materialize(state, run, ram / "state")) == 0 for state in states)
        return
    staging = next(op.path for op in shim.ops if op.kind == "mkdir")
    end = next(i for i, op in enumerate(shim.ops) if op.kind == "create" and op.path.endswith("state.json"))
    state = next(crash_states(start, shim.ops[:end]))
    final = str(run / "checkpoints" / "step-3")
    direct = materialize({path.replace(staging, final): c for path, c in state.items()}, run, ram / "state")
    found = load_latest(direct)
    assert is_exactly(found, 2)
    assert found is not None
    assert found.skipped == ("step-3: manifest.json is missing",)  # an invalid final folder: what staging never leaves


def test_after_every_kill_the_run_goes_on(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, start, shim = _record_save(ram, monkeypatch, keep_last=1)
    for end in range(len(shim.ops) + 1):
        state = next(crash_states(start, shim.ops[:end]))
        again = materialize(state, run, ram / "state")
        with RunLock(again):
            assert all(not name.startswith(".") for name in steps(again))
            found = load_latest(again)
            assert found is not None
            save(again, found.step + 1, keep_last=1)
        assert is_exactly(load_latest(again), found.step + 1)
        assert steps(again) == [f"step-{found.step + 1}"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_every_call_may_fail(
    ram: Path, monkeypatch: pytest.MonkeyPatch, code: int, record_property: Callable[[str, object], None]
) -> None:
    _, _, counting = _record_save(ram, monkeypatch, keep_last=1)
    expected = "disk/full" if code == errno.ENOSPC else "disk/write-failed"
    committed = next(i for i, op in enumerate(counting.ops) if op.kind == "rename")
    for fail_at in range(len(counting.ops)):
        run = ram / str(fail_at)
        save(run, 2)
        with monkeypatch.context() as patch:
            install(patch, Shim(fail_at, code))
            text = message_of(lambda run=run: save(run, 3, keep_last=1))
        if text == "ok":
            assert fail_at > committed  # only clearing away the old one may fail unnoticed
        else:
            assert text.startswith(f"error[{expected}]")
            assert "is untouched" in text
        assert not [name for name in steps(run) if name.startswith(".tmp-")]
        assert is_exactly(load_latest(run), 2 if fail_at <= committed else 3)
        shutil.rmtree(run)
    record_property("failed calls", len(counting.ops))


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    shim = Shim()
    install(monkeypatch, shim)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    huge = torch.empty(1).expand(free // 4)  # as many bytes as the disk has left, in none of memory
    with pytest.raises(UserError, match="disk/full") as caught:
        save_checkpoint(tmp_path, 2, {"a": {"w": huge}}, {}, {})
    assert shim.ops == []
    assert "step-1 is the last good checkpoint" in str(caught.value)
    assert "MB free" in str(caught.value)
    assert caught.value.exit_code == 7


def in_child(body: Callable[[], object]) -> str:
    """``message_of(body)`` run in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, message_of(body).encode())
        except BaseException:
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


def test_a_file_size_limit_is_a_user_error(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        save(tmp_path, 2)

    assert in_child(limited).startswith("error[disk/write-failed]")
    assert steps(tmp_path) == ["step-1"]


def test_a_read_only_folder_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    for code in (errno.EROFS, errno.EACCES):
        install(monkeypatch, Shim(0, code))
        with pytest.raises(UserError, match="disk/write-failed"):
            save(tmp_path, 2)


def test_a_folder_of_someone_else_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for body in (lambda: save(tmp_path / "file", 1), lambda: RunLock(tmp_path / "file").__enter__()):
        with pytest.raises(UserError, match="disk/write-failed"):
            body()


# --- the lock -------------------------------------------------------------------------------------------------------------


def test_second_process_is_refused_with_the_pid(tmp_path: Path) -> None:
    def second() -> None:
        with RunLock(tmp_path):
            pass

    with RunLock(tmp_path):
        text = in_child(second)
    assert text.startswith("error[checkpoint/locked]")
    assert f"process {os.getpid()}" in text
    assert in_child(second) == "ok"
    (tmp_path / ".lock").write_text("123456789012345\n")  # of an earlier holder
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_clears_what_interrupted_saves_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".tmp-step-2.ab", ".del-step-0.cd"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "x").write_text("x")
    with RunLock(tmp_path):
        assert steps(tmp_path) == ["step-1"]


def test_loading_changes_nothing(tmp_path: Path) -> None:
    newest = _two_checkpoints(tmp_path)
    (newest / "state.json").unlink()
    (tmp_path / "checkpoints" / ".tmp-step-9.ab").mkdir()
    before = snapshot(tmp_path)
    load_latest(tmp_path)
    assert snapshot(tmp_path) == before


# --- kills ----------------------------------------------------------------------------------------------------------------


def _child_saves(run: Path, acknowledge: int, save_one: Callable[[Path, int], object], first: int) -> None:
    try:
        with RunLock(run):
            os.write(acknowledge, b"0\n")
            for step in itertools.count(first):
                save_one(run, step)
                os.write(acknowledge, f"{step}\n".encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _kill_once(run: Path, save_one: Callable[[Path, int], object], first: int, wait_s: float) -> int:
    """Let a child save in a loop, kill it after ``wait_s``; the last step it acknowledged (0: none)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _child_saves(run, write, save_one, first)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert select.select([pipe], [], [], 60)[0], "the child never started"
        time.sleep(wait_s)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        lines = pipe.read().split()
    assert os.WIFSIGNALED(status), "the child ended by itself"
    return int(lines[-1])


def _invalid_finals(run: Path) -> list[str]:
    invalid = []
    for step, path in checkpoint._step_folders(run / "checkpoints"):
        try:
            checkpoint._verify(path, step)
        except UnusableError as reason:
            invalid.append(f"{path.name}: {reason}")
    return invalid


@dataclass
class Kills:
    """What came of killing a saving process many times."""

    kills: int = 0
    acknowledged: int = 0  # checkpoints whose save had returned
    lost: int = 0  # kills after which the newest acknowledged one, or its bits, could not be loaded
    invalid: int = 0  # kills after which a folder under its final name did not verify


def kill_many(
    run: Path, num_kills: int, seed: int = 1, done: Callable[[Kills], object] = lambda _: None, most: int = 0
) -> Kills:
    """Kill a process that saves one checkpoint after the other, at ``num_kills`` random instants; the next one goes on.

    It is killed up to ``most`` times, until more than ``num_kills`` saves have returned: a busy machine saves slowly.
    """
    rng, newest, found = random.Random(seed), 0, Kills()
    longest_s = 0.25
    while found.kills < max(num_kills, most if found.acknowledged <= num_kills else 0):
        acknowledged = _kill_once(run, save, newest + 1, rng.uniform(0, longest_s))
        loaded = load_latest(run)
        reached = loaded.step if loaded else 0
        found.kills += 1
        found.invalid += bool(_invalid_finals(run))
        found.lost += reached < max(acknowledged, newest) or not (loaded is None or is_exactly(loaded, reached))
        found.acknowledged += max(0, acknowledged - newest)
        newest = reached
        if found.acknowledged <= found.kills:  # a busy machine saves slowly
            longest_s = min(1.5 * longest_s, 4.0)
        done(found)
    return found


def _require_harmless(run: Path, num_kills: int) -> None:
    found = kill_many(run, num_kills, most=100)
    assert found.lost == found.invalid == 0
    assert found.acknowledged > num_kills


def test_ten_kills_lose_nothing(ram: Path) -> None:
    _require_harmless(ram, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("syncing")
def test_many_kills_lose_nothing(tmp_path: Path) -> None:
    """On the real disk; ``benchmarks/scorecard.py --lines 10`` kills a thousand times."""
    _require_harmless(tmp_path, 20)


def _save_directly(run: Path, step: int) -> None:
    """What most trainers do: the same files, written straight into the final folder. 16 MB, so that it takes a while."""
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    checkpoint._fill(folder, step, groups_of(step, size=2**20), {}, {}, None)
    for old, path in checkpoint._step_folders(run / "checkpoints"):
        if old < step:
            shutil.rmtree(path)


def kill_a_direct_writer(folder: Path, num_kills: int) -> int:
    """After how many of these kills an invalid final folder is left where nothing is staged and renamed."""
    rng, failed = random.Random(2), 0
    for trial in range(num_kills):
        run = folder / str(trial)
        _kill_once(run, _save_directly, 1, rng.uniform(0.02, 0.15))
        failed += bool(_invalid_finals(run))
        shutil.rmtree(run)
    return failed


def test_the_kill_harness_catches_a_direct_writer(ram: Path) -> None:
    """Negative control: without staging and rename, at least 3 kills in 10 leave an invalid final folder."""
    assert kill_a_direct_writer(ram, 10) >= 3


# --- long runs ------------------------------------------------------------------------------------------------------------


def _process_sizes() -> tuple[int, int, int]:
    """(anonymous resident bytes, open files, threads) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["RssAnon"].split()[0]) * 1024, len(os.listdir("/proc/self/fd")), int(status["Threads"])


def save_three_hundred_times(ram: Path) -> None:
    groups = groups_of(0, size=10_000)
    with RunLock(ram), MetricsLog(ram / "metrics.jsonl") as log:
        for step in range(1, 401):
            log.append({"step": step, "loss": 1 / step, "lr": 1e-4})
            log.sync()
            save_checkpoint(ram, step, groups, {"step": step}, IDENTITY, keep_last=2, protect=[1])
            load_latest(ram)
            if step == 100:
                gc.collect()
                before = _process_sizes()
        gc.collect()
        after = _process_sizes()
    assert after[0] - before[0] <= 2**20, (before, after)
    assert after[1] <= before[1]
    assert after[2] <= before[2]
    assert steps(ram) == ["step-1", "step-399", "step-400"]


def test_three_hundred_saves_leak_nothing(ram: Path) -> None:
    """In a process of its own: in the gaps of what earlier tests left, memory grows without a leak."""
    code = "import pathlib, sys, test_checkpoint; test_checkpoint.save_three_hundred_times(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(ram)]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# --- is it the same run? --------------------------------------------------------------------------------------------------


def test_identity_survives_a_save_and_tuples(tmp_path: Path) -> None:
    identity = json.loads(json.dumps({"config": {"targets": ("q", "v"), "map": {}}}))
    save_checkpoint(tmp_path, 1, {}, {}, identity)
    found = load_latest(tmp_path)
    assert found is not None
    check_identity(found.identity, {"config": {"targets": ("q", "v"), "map": {}}})  # asdict gives tuples


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        ({"config": {"lr": 2e-4, "targets": ["q_proj"]}}, "config.lr: 0.0001 before, 0.0002 now"),
        ({"config": {"lr": 1e-4, "targets": ["q_proj", "v"]}}, 'config.targets: ["q_proj"] before, ["q_proj", "v"] now'),
        ({"config": {"targets": ["q_proj"]}}, "config.lr: 0.0001 before, absent now"),
        ({"config": {"lr": 1e-4, "targets": ["q_proj"], "new": True}}, "config.new: absent before, true now"),
        ({"data": "cd" * 32}, "data: "),
        ({"base": "x\x1b[2J"}, r"base: null before, "),
    ],
)
def test_a_changed_run_is_refused_by_name(current: dict[str, JSON], expected: str) -> None:
    with pytest.raises(UserError, match="checkpoint/changed") as caught:
        check_identity(IDENTITY, {**IDENTITY, **current})
    assert expected in str(caught.value)
    assert caught.value.exit_code == 5
    assert "\x1b" not in str(caught.value)


def test_allowed_changes() -> None:
    current: dict[str, JSON] = {**IDENTITY, "config": {"lr": 9.0, "targets": ["q_proj"]}}
    check_identity(IDENTITY, current, allowed=["config.lr"])
    check_identity(IDENTITY, current, allowed=["config"])
    with pytest.raises(UserError, match="checkpoint/changed"):
        check_identity(IDENTITY, current, allowed=["config.l", "data"])


def test_long_values_that_differ_late_are_told_apart() -> None:
    with pytest.raises(UserError, match="checkpoint/changed"):
        check_identity({"a": "x" * 300}, {"a": "x" * 299 + "y"})


def test_one_step_by_number(tmp_path: Path) -> None:
    newest = _two_checkpoints(tmp_path)
    assert is_exactly(load_step(tmp_path, 1), 1)
    (newest / "state.json").unlink()
    for step, reason in ((2, "state.json is missing"), (7, "manifest.json is missing")):
        with pytest.raises(UserError, match="checkpoint/unusable") as caught:
            load_step(tmp_path, step)
        assert reason in str(caught.value)
