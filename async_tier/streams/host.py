"""HostEngine: streams and events made of native copy threads, for processes without a CUDA context.

Ownership: `_native.HostEngine` owns the threads and the queues; native/core.h names the owner of every field. This file
only chooses the queues and the CPUs of the threads, and ends the engine. Events are `_native.Job` objects.
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

# The number of the queue that is served last.
_POPULATION = 2


class HostStream(RowStream):
    """One queue of a HostEngine. A piece is at most 2 MiB."""

    engine: _native.HostEngine

    def copy(self, destinations: np.ndarray, sources: np.ndarray, size: int | np.ndarray) -> CopyEvent:
        """Queue copies from address `sources[i]` to address `destinations[i]`, arrays of shape (n,) and dtype uint64.

        `size` is the bytes of each copy: one number, or an array (n,) of uint64. The arrays may be changed once the
        call returns. Raises as `copy_rows` does.
        """
        return self.engine.submit(self._queue, destinations, sources, size)


class HostEngine:
    """`threads` native threads that serve three queues: loads before stores before population.

    A thread that becomes free takes the next piece (at most 2 MiB) of the first queue that has one. So a load waits
    for at most one piece per thread, whatever is queued. With `ordered`, the jobs of a stream run one after the other,
    as on a CUDA stream. `kernel` names a copy kernel (`_native.kernels()`); by default the fastest one is measured.

    The threads inherit the CPUs and the NUMA policy of the thread that constructs the engine, as set by taskset,
    numactl or a cgroup. `cpus` gives them other CPUs, for a constructing thread that is bound itself.

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
        except OSError as error:  # in a sandbox; copies are still correct
            logger.warning("Copy threads keep the CPUs of the thread that started them: %s", error)
        # Runs at the interpreter's exit, too, before the memory that copies touch is freed.
        self._close = weakref.finalize(self, engine.close)

    def populate(self, rows: Rows) -> CopyEvent:
        """Populate new memory, adjoining rows that start on a page, whenever there is nothing to copy.

        The copy threads do it: a thread of its own would share a core with the scheduler's thread while they are busy,
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
    """The default number of copy threads: two, or one if there are fewer than three cores. The scheduler needs a core.

    Cores are those that the calling thread may run on, or the whole ones that the container's CPU quota pays for, if
    these are fewer. A copy thread (class SCHED_BATCH) that shares a core with a busy thread waits for its time slice:
    loads of 0.3 ms then take 4 to 8 ms (seen on two cores). A copy thread beyond the quota stops the scheduler, too,
    until the quota's next period.
    """
    cores = min([len(os.sched_getaffinity(0)), *machine.cpu_quotas()])
    return max(1, min(2, cores - 1))
