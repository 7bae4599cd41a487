"""Run a command and print its seconds, CPU seconds and peak memory as JSON: ``python measured_child.py COMMAND...``.

A process of its own, without torch: Linux counts into a child's peak (``ru_maxrss``) what its parent had resident when the
child was started, so a large parent would hide what a small child needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main(command: list[str]) -> int:
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime  # of all threads: what the machine's other work cannot stretch by making it wait
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": usage.ru_maxrss * 1024}))  # ru_maxrss is in KiB
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
