"""One thread that computes, one bounded queue before it.

Requests wait in the order in which they came. Between two steps the first of them join the rows of their model, as long as
there are free rows; models with rows take turns, a step each. Who finds the queue full is refused at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from minisft.common.errors import visible
from minisft.serving.batch import Batch, Job
from minisft.serving.lanes import Lane
from minisft.serving.prefix_cache import PrefixCache

IDLE_S = 0.2  # how often an idle thread looks whether the server is stopping


class QueueFullError(Exception):
    """As many requests wait as may."""


class StoppingError(Exception):
    """The server is stopping and takes no more requests."""


class Engine:
    """Owns the models while the server runs.

    Args:
        lanes: the models by name.
        max_rows: answers that are written at once, all models together.
        max_waiting: requests that may wait.
        log: called with one line when a request fails.
        max_cache_bytes: memory for what earlier requests have read, see ``PrefixCache``.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        max_rows: int,
        max_waiting: int,
        log: Callable[[str], None],
        max_cache_bytes: int = 0,
    ) -> None:
        self.lanes, self.max_rows, self.max_waiting = lanes, max_rows, max_waiting
        self._log = log
        kept = PrefixCache(max_cache_bytes)
        self._batches = {name: Batch(lane.model, kept) for name, lane in lanes.items()}
        self._waiting: deque[Job] = deque()
        self._reserved = 0  # while prompts are read: rows that are written or joining, each counted once
        self._changed = threading.Condition()
        self._ended = False
        self.stopping = False  # set by a signal handler, which may take no lock
        self._thread = threading.Thread(target=self._run, name="minisft-engine", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: too many wait.
            StoppingError: the server is stopping.
        """
        with self._changed:
            if self.stopping:
                raise StoppingError
            if len(self._waiting) >= self.max_waiting + self._free_rows():  # those with free rows wait for the thread only
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for ``job`` any more: its place is free at once, its rows after the step in progress."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def counts(self) -> tuple[int, int]:
        """(answers being written, requests waiting)."""
        return sum(len(batch.rows) for batch in self._batches.values()), len(self._waiting)

    def _free_rows(self) -> int:
        return self.max_rows - (self._reserved or self.counts()[0])

    def end(self) -> None:
        """Stop after the step in progress; what was not answered fails."""
        self.stopping = self._ended = True
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            self._turn()
        for batch in self._batches.values():
            _fail(batch.clear())
        self._fail_waiting()

    def _turn(self) -> None:
        """Let requests join, then one step for every model that has rows."""
        if self.stopping:
            self._fail_waiting()
        jobs = self._next_jobs()
        for name, batch in self._batches.items():
            joining = [job for job in jobs if job.lane.name == name]
            with self._failing_alone(batch, joining):
                batch.admit(joining)
        self._reserved = 0
        for batch in self._batches.values():
            with self._failing_alone(batch):
                batch.step()

    @contextlib.contextmanager
    def _failing_alone(self, batch: Batch, joining: Sequence[Job] = ()) -> Iterator[None]:
        """An error within fails the rows of this model and those that are joining them, and no others."""
        try:
            yield
        except Exception as error:  # whatever one request causes, the server and the answers of other models live
            self._log(f"requests failed: {type(error).__name__}: {visible(error)}")
            _fail([*joining, *batch.clear()])

    def _next_jobs(self) -> list[Job]:
        """The first that wait, as many as fit; waits a moment when there is nothing at all to do."""
        with self._changed:
            free = self._free_rows()
            if free == self.max_rows and not self._waiting and not self._ended:
                self._changed.wait(IDLE_S)
            jobs: list[Job] = []
            while self._waiting and self._waiting[0].num_choices <= free:
                jobs.append(self._waiting.popleft())
                free -= jobs[-1].num_choices
            self._reserved = self.max_rows - free
            return jobs

    def _fail_waiting(self) -> None:
        with self._changed:
            jobs = list(self._waiting)
            self._waiting.clear()
        _fail(jobs)


def _fail(jobs: Iterable[Job]) -> None:
    """Tell those who wait, once each."""
    for job in dict.fromkeys(jobs):
        if not job.cancelled:
            job.emit(None)
