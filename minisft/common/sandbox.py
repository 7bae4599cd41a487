"""Run something untrusted once, in a child process that cannot do harm.

A chat template or a tokenizer's regular expression comes with an untrusted file and can loop, allocate without end or abort the
process. So its first run happens in a forked child with hard limits on CPU time and memory; only when the child comes back
is the same thing done here. The one idea: what the operating system limits cannot be argued out of, a ``try`` can.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable
from typing import NoReturn

CPU_SECONDS = 2
MEMORY_BYTES = 512 * 2**20
# The child may share its core with others, so the wall clock is generous; it only catches a child that sleeps.
WALL_SECONDS = 60.0
_MAX_REPORT = 4096


class TrialError(Exception):
    """Raised by a task to report a failure in its own words."""


def failure(task: Callable[[], object], cpu_seconds: int = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES) -> str | None:
    """Run ``task`` in a limited child: None when it returned, else one line on how it failed.

    Args:
        task: what to try. Its result is dropped, and so is all it changed: the child is a copy.
        cpu_seconds: CPU time, enforced by the kernel (RLIMIT_CPU), C code included.
        memory_bytes: address space beyond what this process already has (RLIMIT_AS).

    Returns:
        None, or what went wrong: too long, too much memory, an exception, or how the process died.
    """
    reader, writer = os.pipe()
    child = _fork()
    if child == 0:
        os.close(reader)
        _run_in_child(task, writer, cpu_seconds, memory_bytes)
    os.close(writer)
    report, in_time = _read_report(reader)
    os.close(reader)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if report:
        return None if report == "ok" else report
    if not in_time or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return f"it ran longer than {cpu_seconds} s"
    return f"the process died with status {status}"


def _fork() -> int:
    # Once its threads have worked, ``tokenizers`` warns at every fork that they will not be there; the child needs none.
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        return os.fork()
    os.environ[name] = "false"
    try:
        return os.fork()
    finally:
        del os.environ[name]


def _run_in_child(task: Callable[[], object], writer: int, cpu_seconds: int, memory_bytes: int) -> NoReturn:
    # Whatever happens, the child must end here and never run on in its copy of the parent's stack: hence BaseException,
    # which also holds the PanicException of Rust extensions.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        memory = _address_space() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        task()
        report = "ok"
    except TrialError as error:
        report = str(error)
    except MemoryError:
        report = f"it needed more than {memory_bytes >> 20} MiB"
    except BaseException as error:
        report = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    finally:
        # A report of at most one page fits in the pipe's buffer: this write never blocks.
        os.write(writer, report.encode("utf-8", "replace")[:_MAX_REPORT])
        os._exit(0)


def _read_report(reader: int) -> tuple[str, bool]:
    ready, _, _ = select.select([reader], [], [], WALL_SECONDS)
    return (os.read(reader, _MAX_REPORT).decode("utf-8", "replace"), True) if ready else ("", False)


def _address_space() -> int:
    """Bytes of address space this process has now (field 1 of statm counts pages)."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
