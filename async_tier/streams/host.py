"""HostEngine: streams and events made of native copy threads, for processes without a CUDA context.

Ownership: `_native.HostEngine` owns the threads and the queues; native/core.h names the owner of every field. Here live
only the choice of queues, where the threads may run, and the life of the engine. Events are `_native.Job` objects,
handed out as they are.
"""

from __future__ import annotations

import logging
import os
import weakref

import numpy as np

from async_tier import machine
from async_tier.streams import _native
from async_tier.streams.base import CopyEvent
from async_tier.streams.row_stream import RowStream
from async_tier.streams.rows import Rows

logger = logging.getLogger(__name__)

# The queue that is served last.
_POPULATION = 2


class HostStream(RowStream):
    """One queue of a HostEngine. A piece is at most 2 MiB."""

    engine: _native.HostEngine

    def copy(self, destinations: np.ndarray, sources: np.ndarray, size: int | np.ndarray) -> CopyEvent:
        """Queue copies from address `sources[i]` to address `destinations[i]`, arrays of shape (n,) and dtype uint64.

        `size` is the bytes of each copy: one number, or an array (n,) of uint64. The arrays are free to be changed
        when the call returns. Raises as `copy_rows` does.
        """
        return self.engine.submit(self._queue, destinations, sources, size)


class HostEngine:
    """`threads` native threads that serve three queues: loads before stores before population.

    A thread that becomes free takes the next piece (at most 2 MiB) of the first queue that has one, so a load waits
    for at most one piece a thread, whatever is queued. With `ordered`, the jobs of a stream run one after the other,
    as on a CUDA stream. `kernel` names a copy kernel (`_native.kernels()`); by default the fastest is measured.

    The threads inherit the CPUs and the NUMA policy of the thread that constructs the engine: what it was given by
    taskset, numactl or a cgroup holds for them. `cpus` names other CPUs, for a thread that is bound itself.

    Raises ValueError for a number of threads outside 1 to 256, RuntimeError if the system refuses them.
    """

    name = "host"
    # Threads do not break, and copy as soon as they are scheduled.
    broken: str | None = None
    seconds_under_way = 0.0

    def __init__(
        self, threads: int, *, ordered: bool = False, kernel: str | None = None, cpus: set[int] | None = None
    ) -> None:
        self._engine = engine = _native.HostEngine(threads, queues=3, ordered=ordered, kernel=kernel)
        self.load_stream = HostStream(engine, 0)
        self.store_stream = HostStream(engine, 1)
        self.kernel = engine.kernel
        self.thread_ids = tuple(engine.thread_ids)
        try:
            if cpus is not None:
                for thread in self.thread_ids:
                    os.sched_setaffinity(thread, cpus)
        except OSError as error:  # a sandbox; copies are right all the same
            logger.warning("Copy threads run where the thread that made them does: %s", error)
        # Also at the interpreter's exit, before the memory under the copies goes.
        self._close = weakref.finalize(self, engine.close)

    def populate(self, rows: Rows) -> CopyEvent:
        """Back new memory of adjoining rows that starts on a page, when there is nothing to copy.

        By the copy threads and not one more: that would share a core with the scheduler's thread when these are busy,
        for some milliseconds at a time.
        """
        return self._engine.populate(_POPULATION, rows.address, rows.count * rows.stride)

    def signal(self, fd: int) -> None:
        """See CopyEngine.signal."""
        self._engine.signal(fd)

    def close(self) -> None:
        """See CopyEngine.close."""
        self._close()


def default_threads() -> int:
    """Two copy threads, but one core is left to the scheduler.

    Cores are those that the calling thread may run on, or fewer where a CPU quota of the container pays for fewer whole
    ones. A copy thread of class SCHED_BATCH that has to share a core with a busy one waits for a slice of the system's:
    loads of 0.3 ms take 4 to 8 (seen on two cores). One that the quota does not pay for stops the scheduler as well,
    until the quota's next period.
    """
    cores = min([len(os.sched_getaffinity(0)), *machine.cpu_quotas()])
    return max(1, min(2, cores - 1))
