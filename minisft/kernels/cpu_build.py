"""Compiles the package's C++ files on the machine that runs it, once, and loads it; or says why it did not.

The compiler is ``$CXX``, else c++, g++ or clang++. The result is kept in a folder of the user's own: ``$MINISFT_CACHE``, else
``$XDG_CACHE_HOME/minisft``, else ``~/.cache/minisft``. Its name is made of everything that it depends on, so a new source,
compiler or CPU makes a new file. ``MINISFT_NATIVE=0`` turns all of it off.

A library runs with all our rights, so one that somebody else owns or may write to is refused. It ends in the hash of what
stands before, because the dynamic loader does not survive a file that was cut short. A newcomer leaves with one idea: nothing
here raises. A missing or strange compiler costs speed, never the run: every caller has the same function in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch

from minisft import nf4
from minisft.common.user_cache import cache_folder, is_private

_HERE = Path(__file__).parent
_NAMES = ("decode", "nf4", "attention", "twelve_bit", "adapter", "elementwise", "split", "gguf")
SOURCES = [_HERE / f"cpu_{name}.cpp" for name in _NAMES]
HEADERS = [_HERE / name for name in ("cpu_lanes.h", "cpu_twelve_bit.h", "cpu_products.h", "cpu_tiles.h", "cpu_elementwise.h")]
# -ffp-contract=off: a fused multiply-add has other bits. -fno-math-errno: a square root is an instruction, no call.
# -nodefaultlibs: no C++ runtime, no second OpenMP runtime.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fno-exceptions", "-fno-math-errno", "-Wno-psabi"]
FLAGS += ["-fPIC", "-shared", "-nodefaultlibs"]
FLAGS += [f"-DNESTED_BLOCK_SIZE={nf4.NESTED_BLOCK_SIZE}", f"-DMAX_RECIPROCAL={nf4.MAX_RECIPROCAL}f"]
LINK = ["-lc", "-lgcc", "-Wl,-z,defs"]  # defs: a symbol that nobody has must fail here, not at the first call
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")  # named, because GCC 12 takes newer AMD CPUs for ones without
DIGEST_BYTES = hashlib.sha256().digest_size
BUILD_SECONDS = 300  # eight files, about twenty-two on an idle core, sixteen on two


class Native(NamedTuple):
    """``handle``, the loaded library, or None, and ``reason``: why it is None, else empty."""

    handle: ctypes.CDLL | None
    reason: str


class _NoLibraryError(Exception):
    """Never leaves this file; its text is the reason."""


@functools.cache
def load() -> Native:
    """The library, compiled now if it has to be (some 20 seconds). The answer stands for the rest of the process."""
    try:
        return Native(_library(), "")
    except (_NoLibraryError, OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        # OSError: a folder or program that cannot be used; ValueError: $CXX with an open quote; RuntimeError: no home folder
        return Native(None, str(error) or type(error).__name__)


def _library() -> ctypes.CDLL:
    if os.environ.get("MINISFT_NATIVE") == "0":
        raise _NoLibraryError("MINISFT_NATIVE=0")
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        raise _NoLibraryError("native code is for Linux on little-endian CPUs")
    folder, problem = cache_folder(), "the compiled library does not load"
    ways = [(folder / f"nf4-{_fingerprint(command)}.so", command) for command in _commands(_compiler())]
    for path, _ in ways:
        if path.exists() and (library := _open(path)):
            return library
    if sys.stderr.isatty():  # or a newcomer's first command stands still without a word
        print("compiling minisft's C++ for this CPU, once: about 20 seconds", file=sys.stderr, flush=True)
    for path, command in ways:
        problem = _build(command, path) or problem
        if path.exists() and (library := _open(path)):
            return library
    raise _NoLibraryError(problem)


# ---- the compiler ----------------------------------------------------------------------------------------------------


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise _NoLibraryError("no C++ compiler found")


def _commands(compiler: list[str]) -> Iterator[list[str]]:
    """Ways to compile, best first, without the output: on PyTorch's own threads, and on one thread."""
    has = set(_cpu_features().split())
    vectors = [f"-m{name}" for name in AVX512] if has.issuperset(AVX512) else []
    start = [*compiler, *FLAGS, *vectors, *map(str, SOURCES)]
    if openmp := _openmp_of_torch():
        yield [*start, "-fopenmp", openmp, *LINK]
    yield [*start, "-Wno-unknown-pragmas", *LINK]


def _openmp_of_torch() -> str | None:
    """The libgomp that PyTorch has loaded: a second copy would bring a second pool of threads, to fight for the cores."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in maps}
    copies = sorted(path for path in mapped if Path(path).name.startswith("libgomp"))
    packages = Path(torch.__file__).parent.parent
    ours = [path for path in copies if Path(path).is_relative_to(packages / "torch")]
    ours += [path for path in copies if Path(path).is_relative_to(packages / "torch.libs")]
    return next(iter(ours or copies), None)


def _cpu_features() -> str:
    """What this CPU can do, in the kernel's words; a home folder may be shared by several machines."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(("flags", "Features"))), "")


def _fingerprint(command: list[str]) -> str:
    compiler = command[: command.index(FLAGS[0])]
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS, check=False).stdout
    source = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    parts = [source, shlex.join(command).encode(), version, _cpu_features().encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]


def _build(command: list[str], path: Path) -> str:
    """Compiles to ``path``; a process that builds the same at the same time does no harm. Returns what went wrong, or ""."""
    start = command.index(str(SOURCES[0]))
    before, after = command[:start], command[start + len(SOURCES) :]

    def run(*files: str) -> int:
        full, quiet = [*before, *files[:-1], *after, "-o", files[-1]], subprocess.DEVNULL
        return subprocess.run(full, stdin=quiet, stdout=quiet, stderr=quiet, timeout=BUILD_SECONDS, check=False).returncode

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        output = Path(scratch) / "library.so"
        objects = [f"{scratch}/{source.stem}.o" for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # files at once; the one that takes longest is the first
            statuses = list(pool.map(run, repeat("-c"), map(str, SOURCES), objects))
        status = max(statuses, key=abs) or run(*objects, str(output))
        if status or not output.exists():
            return f"{command[0]} failed with status {status}"
        content = output.read_bytes()
        output.write_bytes(content + hashlib.sha256(content).digest())
        output.chmod(0o700)
        output.replace(path)
    return ""


# ---- the file --------------------------------------------------------------------------------------------------------


def _open(path: Path) -> ctypes.CDLL | None:
    """The library, or None for a file that is cut short, does not load, or could be somebody else's work."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or not is_private(status):
        raise _NoLibraryError(f"{path} is not a file that only this user can write to")
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None
