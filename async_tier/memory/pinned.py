"""PinnedArena: the tier's rows in host memory that is pinned for CUDA."""

from __future__ import annotations

import logging
import mmap
import threading

from async_tier.memory.host import Arena
from async_tier.memory.pool import PoolArena
from async_tier.memory.registration import PIN_RANGE_BYTES, Registration
from async_tier.streams import _native
from async_tier.streams.cuda import CudaEngine
from async_tier.streams.cuda_driver import CudaError
from async_tier.streams.rows import Rows

logger = logging.getLogger(__name__)

# How long `unpin` waits for the range that is just being pinned.
PINNER_TIMEOUT_S = 5.0


class PinnedArena:
    """Host memory that a background thread pins range by range (`registration`). `ready` rows are pinned so far.

    The memory is `arena`'s and not torch's pinned memory, because freeing that can abort the process if the CUDA
    context is lost. Raises as `Registration.register_next` does if the first ranges are refused, OSError if there
    is no room for them, and closes `arena`.
    """

    def __init__(self, engine: CudaEngine, arena: Arena | PoolArena) -> None:
        self._arena = arena
        self.rows = arena.rows
        self.pool = arena.pool
        _prefer_near_node(engine, self.rows)
        self.registration = Registration(engine.driver, engine.context, self.rows, PIN_RANGE_BYTES, is_new=True)
        self._stop = threading.Event()
        self._pinner = threading.Thread(target=self._pin, name="async-tier-pin", daemon=True)
        try:
            while not self.ready:  # a row may be larger than a range
                self._pin_next()
            self._pinner.start()
        except BaseException:
            if not self.registration.unpin_or_abandon():
                self._arena.abandon_memory()
            self._arena.close()
            raise
        engine.add_rows(self.rows, self.registration)
        engine.add_pinned(self)

    @property
    def ready(self) -> int:
        return self.registration.rows_ready

    def close(self) -> None:
        """Free the memory, after the engine was closed, unless it was abandoned. Idempotent."""
        self._arena.close()

    def unpin(self) -> None:
        """See cuda.Pinned."""
        self._stop.set()
        # Bounded, because the garbage collector may end the tier on the pinning thread, which then waits for this call.
        self._pinner.join(PINNER_TIMEOUT_S)
        if self._pinner.is_alive():
            raise RuntimeError("its memory is still being pinned")
        self.registration.unpin()

    def abandon_memory(self) -> None:
        """See cuda.Pinned."""
        self._stop.set()
        self.registration.abandon_memory()
        self._arena.abandon_memory()

    def _pin_next(self) -> None:
        if self.pool is not None:  # whose memory the file system may refuse
            self.pool.allocate(self.registration.next_range[1] - self.rows.address)
        self.registration.register_next()

    def _pin(self) -> None:
        try:
            while not self.registration.is_complete and not self._stop.wait(self.registration.range_seconds):
                self._pin_next()
        except (RuntimeError, OSError) as error:
            logger.warning(
                "The tier holds %d blocks and not %d, because no more of its memory could be pinned: %s",
                self.ready,
                self.rows.count,
                error,
            )


def _prefer_near_node(engine: CudaEngine, rows: Rows) -> None:
    """Have new rows take memory from the GPU's NUMA node: copies to another node's run at half the rate or less."""
    try:
        node = engine.driver.host_node(engine.context.ordinal)
        if node >= 0:
            _native.prefer_node(rows.address, -(-rows.count * rows.stride // mmap.PAGESIZE) * mmap.PAGESIZE, node)
    except (CudaError, OSError) as error:  # an older driver; a sandbox that refuses it
        logger.info("The tier's memory may come from any NUMA node, not from the one next to the GPU: %s", error)
