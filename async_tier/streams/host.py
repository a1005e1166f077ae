"""HostEngine: streams and events made of native copy threads, for processes without a CUDA context.

Ownership: `_host_copy.Engine` owns the threads and the queues; its header comment names the owner of every field.
Here live only the choice of queues, where the threads may run, and the life of the engine. Events are
`_host_copy.Job` objects, handed out as they are.
"""

from __future__ import annotations

import logging
import os
import weakref

import numpy as np

from async_tier import _host_copy
from async_tier.arena import Rows
from async_tier.streams.base import CopyEvent

logger = logging.getLogger(__name__)

# For `limit`: no limit.
_UNLIMITED = -1
# The queue that is served last.
_POPULATION = 2


class HostStream:
    """One queue of a HostEngine."""

    def __init__(self, engine: _host_copy.Engine, queue: int) -> None:
        self._engine = engine
        self._queue = queue

    def copy_rows(
        self, destination: Rows, destination_rows: list[int], source: Rows, source_rows: list[int]
    ) -> CopyEvent:
        """See CopyStream.copy_rows. Raises RuntimeError in a forked child: the threads stayed with the parent."""
        return self._engine.submit_rows(
            self._queue,
            destination.address,
            destination.stride,
            destination.count,
            destination_rows,
            source.address,
            source.stride,
            source.count,
            source_rows,
            source.row_bytes,
        )

    def copy(self, destinations: np.ndarray, sources: np.ndarray, size: int | np.ndarray) -> CopyEvent:
        """Queue copies from address `sources[i]` to address `destinations[i]`, arrays of shape (n,) and dtype uint64.

        `size` is the bytes of each copy: one number, or an array (n,) of uint64. The arrays are free to be changed
        when the call returns. Raises as `copy_rows` does.
        """
        return self._engine.submit(self._queue, destinations, sources, size)

    def keep_times(self) -> None:
        """Nothing to do: the threads always do."""

    def spans(self, event: CopyEvent) -> list[tuple[str, int, int]]:
        """See CopyStream.spans. There is one leg."""
        assert isinstance(event, _host_copy.Job)
        return [("copy", event.started_ns, event.ended_ns)] if event.started_ns else []

    def hold(self) -> None:
        """For tests: start no further piece of this queue. A piece is at most 2 MiB."""
        self._engine.limit(self._queue, 0)

    def step(self, pieces: int = 1) -> None:
        """For tests: of a held queue, let that many pieces go, from now on; what is left of an earlier step is void."""
        self._engine.limit(self._queue, pieces)

    def release(self) -> None:
        """For tests: end a `hold`."""
        self._engine.limit(self._queue, _UNLIMITED)


class HostEngine:
    """`threads` native threads that serve three queues: loads before stores before population.

    A thread that becomes free takes the next piece (at most 2 MiB) of the first queue that has one, so a load waits
    for at most one piece a thread, whatever is queued. With `ordered`, the jobs of a stream run one after the other,
    as on a CUDA stream. `kernel` names a copy kernel (`_host_copy.kernels()`); by default the fastest is measured.

    Raises ValueError for a number of threads outside 1 to 256, RuntimeError if the system refuses them.
    """

    name = "host"
    broken: str | None = None  # threads do not break

    def __init__(self, threads: int, *, ordered: bool = False, kernel: str | None = None) -> None:
        self._engine = engine = _host_copy.Engine(threads, queues=3, ordered=ordered, kernel=kernel)
        self.load_stream = HostStream(engine, 0)
        self.store_stream = HostStream(engine, 1)
        self.kernel = engine.kernel
        self.thread_ids = tuple(engine.thread_ids)
        try:
            cpus = _allowed_cpus()
            for thread in self.thread_ids:
                os.sched_setaffinity(thread, cpus)
                # A thread of this class does not preempt whoever wakes it up, which is the scheduler's thread in a
                # submit. Seen on two cores, both idle before: 200 us a submit, a whole piece of the copy, not 50.
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        except OSError as error:  # a sandbox; copies are right all the same
            logger.warning("Copy threads run as the thread that made them does: %s", error)
        # Also at the interpreter's exit, before the memory under the copies goes.
        self._close = weakref.finalize(self, engine.close)

    def populate(self, rows: Rows) -> CopyEvent:
        """Back new memory of adjoining rows that starts on a page, when there is nothing to copy.

        By the copy threads and not one more: that would share a core with the scheduler's thread when these are busy,
        for some milliseconds at a time.
        """
        return self._engine.populate(_POPULATION, rows.address, rows.count * rows.stride)

    def advance(self) -> None:
        """Nothing waits here: the threads see to their queues."""

    def signal(self, fd: int) -> bool:
        """See CopyEngine.signal."""
        self._engine.signal(fd)
        return True

    def close(self) -> None:
        """See CopyEngine.close."""
        self._close()


def default_threads() -> int:
    """Two copy threads, but one core is left to the scheduler.

    A copy thread of class SCHED_BATCH that has to share a core with a busy one waits for a slice of the system's: loads
    of 0.3 ms take 4 to 8 (seen on two cores). Cores that the parent process may use count: see `_allowed_cpus`.
    """
    return max(1, min(2, len(_allowed_cpus()) - 1))


def _allowed_cpus() -> set[int]:
    """Where copy threads may run: not only where the calling thread may.

    vLLM's CPU backend binds the thread that constructs us to one core, and a new thread would inherit that. What the
    user allowed (taskset, numactl) still stands in the parent process, which vLLM does not bind.
    """
    cpus = os.sched_getaffinity(0)
    parent = os.getppid()
    try:
        if parent:
            return cpus | os.sched_getaffinity(parent)
    except OSError:  # one that may not be asked
        pass
    return cpus | set(range(os.cpu_count() or 1))  # the first process of a container has no parent
