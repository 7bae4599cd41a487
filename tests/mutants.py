"""Plants known bugs one at a time and sees that a named test fails for each: ``python tests/mutants.py [NAME ...]``.

The bugs stand in ``mutants.toml``. Each is planted in a copy of the package and its tests in a temporary folder, never in the
working tree, and a child process (``forking.py``) runs the one test that must notice it there. First all these tests have to
pass on an untouched copy. A test that passes on a mutant too, or breaks before it has judged anything, makes this program fail.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import py_compile
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import forking

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("minisft", "tests", "benchmarks", "pyproject.toml")
AT_ONCE = 2
MUTANT_LIMIT_S, CLEAN_LIMIT_S = 240.0, 900.0
PASSED, FAILED = 0, 1  # pytest's exit statuses
LIBRARIES = ("torch", "numpy", "pytest", "hypothesis", "tokenizers", "jinja2", "triton", "transformers", "peft", "scipy.stats")


@dataclass(frozen=True)
class Mutant:
    """One bug: ``old``, which stands once in ``file``, becomes ``new``, and ``test`` has to fail; ``why`` it matters.

    ``needs`` names what a CPU must be able to do for that, in the words of /proc/cpuinfo; nothing for most.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    why: str
    needs: str = ""

    def plant(self, root: Path) -> None:
        """Write the bug into the copy of the project at ``root``.

        Raises:
            ValueError: ``old`` does not stand in the file exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} holds the text to replace {found} times")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: ``killed``, ``hung`` (killed too), ``SURVIVED`` or ``BROKEN``; and why, in a line."""

    verdict: str
    reason: str
    seconds: float = 0.0

    @property
    def is_killed(self) -> bool:
        return self.verdict in ("killed", "hung")


def read_mutants() -> list[Mutant]:
    text = (ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8")
    return [Mutant(name, **fields) for name, fields in tomllib.loads(text).items()]


@contextlib.contextmanager
def copy_of(source: Path, *ignored: str) -> Iterator[Path]:
    """What tests need of the project, without what is called ``ignored``."""
    with tempfile.TemporaryDirectory(prefix="minisft-mutants-") as folder:
        target = Path(folder).resolve()
        for part in PARTS:
            if (source / part).is_dir():
                shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns(*ignored))
            else:
                shutil.copy(source / part, target)
        yield target


@contextlib.contextmanager
def compiled_copy() -> Iterator[Path]:
    """A copy of the project whose compiled files name the content of their source, not its age: no mutant hides behind one."""
    with copy_of(ROOT, "__pycache__") as clean:
        compileall.compile_dir(clean / "minisft", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        yield clean


class Runner:
    """A process that has imported the libraries and forks a child for each run of pytest."""

    def __init__(self, libraries: Sequence[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
        # The same on every machine: kernels run in Triton's interpreter and everything else on the CPU, without a network.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
        # The default number of examples, but the smallest that fails is not looked for; and plugins would only cost time.
        environment |= {"MINISFT_HYPOTHESIS": "mutants", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.process = subprocess.Popen(
            [sys.executable, forking.__file__, *libraries],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )  # nothing is buffered: ``select`` must see what has not been read

    def _answer(self, limit_s: float | None = None) -> int | None:
        """The next number that it prints, None if it takes longer."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], limit_s)[0]:
            return None
        return int(self.process.stdout.readline())

    def run(self, root: Path, tests: Sequence[str], limit_s: float) -> tuple[int | None, str]:
        """The exit status of pytest on the copy at ``root``, None if it took longer than ``limit_s``, and what it printed."""
        assert self.process.stdin is not None
        with tempfile.TemporaryDirectory(prefix="minisft-mutants-") as folder:
            output = Path(folder) / "output"
            options = ("-x", "-rfEs", "--tb=short", "-m", "", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp")
            asked = {"root": str(root), "arguments": [*options, *tests], "output": str(output)}
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            child = self._answer()
            assert child is not None
            try:
                status = self._answer(limit_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # the child that hangs, and whatever any child left behind
            if status is None:
                self._answer()
                return None, ""
            return status, output.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Runners:
    """As many as may run at once; each run takes one that has nothing to do."""

    def __init__(self, count: int = AT_ONCE, libraries: Sequence[str] = LIBRARIES) -> None:
        self.all = [Runner(libraries) for _ in range(count)]
        self.free: SimpleQueue[Runner] = SimpleQueue()
        for runner in self.all:
            self.free.put(runner)

    def run(self, root: Path, tests: Sequence[str], limit_s: float) -> tuple[int | None, str]:
        """``Runner.run``."""
        runner = self.free.get()
        try:
            return runner.run(root, tests, limit_s)
        finally:
            self.free.put(runner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for runner in self.all:
            runner.close()


def judge(status: int | None, output: str) -> tuple[str, str]:
    """Verdict and reason: only a test that ran and failed kills, a file that cannot be imported proves nothing."""
    failure = re.search(r"^FAILED .*", output, re.MULTILINE)
    if status is None:
        return "hung", f"over {MUTANT_LIMIT_S:.0f} s"
    if status == FAILED and failure:
        return "killed", failure[0].split(" - ", 1)[-1]
    if status == PASSED:
        return "SURVIVED", output.strip().rsplit("\n", 1)[-1]
    if status == forking.OTHER_PACKAGE:
        return "BROKEN", "the child would import another minisft than the copy"
    return "BROKEN", f"pytest ended with {status}: {output[-300:]}"


def try_mutant(mutant: Mutant, clean: Path, runners: Runners) -> Outcome:
    """Plant it in a copy of the project at ``clean`` and run its test there."""
    began = time.monotonic()
    with copy_of(clean) as root:
        try:
            mutant.plant(root)
        except (ValueError, FileNotFoundError) as error:
            return Outcome("BROKEN", str(error))
        verdict, reason = judge(*runners.run(root, [mutant.test], MUTANT_LIMIT_S))
    return Outcome(verdict, reason, time.monotonic() - began)


def check_clean(mutants: Sequence[Mutant], clean: Path, runners: Runners) -> str | None:
    """What is wrong with the tests where there is no bug; None when all of them pass."""
    files = sorted({mutant.test.partition("::")[0] for mutant in mutants})
    shares = [set(files[i::AT_ONCE]) for i in range(min(AT_ONCE, len(files)))]  # whole files: they share fixtures
    parts = [sorted({mutant.test for mutant in mutants if mutant.test.partition("::")[0] in share}) for share in shares]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for status, output in pool.map(lambda part: runners.run(clean, part, CLEAN_LIMIT_S), parts):
            if status != PASSED or " skipped" in output:
                return f"without any bug, pytest ended with {status}: {output[-4000:]}"
    return None


def try_all(mutants: Sequence[Mutant], clean: Path, runners: Runners) -> dict[str, Outcome]:
    """Every mutant's outcome, two at a time, told as they come."""
    from tqdm import tqdm

    outcomes: dict[str, Outcome] = {}
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        futures = {pool.submit(try_mutant, mutant, clean, runners): mutant for mutant in mutants}
        for future in tqdm(as_completed(futures), total=len(futures), unit="mutant", disable=None, leave=False):
            name, outcome = futures[future].name, future.result()
            outcomes[name] = outcome
            tqdm.write(f"{outcome.verdict:<8} {outcome.seconds:5.1f} s  {name:<38} {outcome.reason[:100]}")
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C too
    return outcomes


def chosen_mutants(names: Sequence[str]) -> list[Mutant]:
    """The mutants called ``names``, all of them for none. Raises: ValueError: an unknown name."""
    mutants = {mutant.name: mutant for mutant in read_mutants()}
    if unknown := [name for name in names if name not in mutants]:
        raise ValueError(f"no mutant is called {', '.join(unknown)}; --list names them all")
    return [mutants[name] for name in names or mutants]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="plant known bugs one at a time and see that a named test fails for each")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which mutants; all by default")
    parser.add_argument("--list", action="store_true", help="only say what they are and why they matter")
    options = parser.parse_args(arguments)
    try:
        mutants = chosen_mutants(options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name}: {mutant.why}\n    {mutant.file}, killed by {mutant.test}")
        return 0
    cpu = Path("/proc/cpuinfo")
    features = set(cpu.read_text(encoding="utf-8").split()) if cpu.exists() else set()
    if left_out := [mutant.name for mutant in mutants if mutant.needs and mutant.needs not in features]:
        print(f"left out, for this CPU cannot do it: {', '.join(left_out)}")
        mutants = [mutant for mutant in mutants if mutant.name not in left_out]
    # Whoever goes on editing meanwhile changes nothing in the copy.
    with compiled_copy() as clean, Runners() as runners:
        if problem := check_clean(mutants, clean, runners):
            print(problem)
            return 1
        return report(try_all(mutants, clean, runners))


def report(outcomes: Mapping[str, Outcome]) -> int:
    """The last lines, and the exit status: 1 if any mutant lives."""
    alive = [name for name, outcome in outcomes.items() if not outcome.is_killed]
    print(f"{len(outcomes) - len(alive)} of {len(outcomes)} mutants killed")
    if alive:
        print(f"not killed: {', '.join(alive)}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
