"""The tier's rows where copies are CUDA's: pinned host memory, or device memory. Both are an `engines.RowMemory`."""

from __future__ import annotations

import logging
import mmap
import threading

from async_tier.memory.host import Arena
from async_tier.memory.registration import PIN_RANGE_BYTES, Registration
from async_tier.streams import _native
from async_tier.streams.cuda import CudaEngine
from async_tier.streams.cuda_driver import CudaError
from async_tier.streams.rows import Rows

logger = logging.getLogger(__name__)

# How long the end of a tier waits for the range that is being pinned.
PINNER_TIMEOUT_S = 5.0


class PinnedArena:
    """Host memory, pinned range by range by a background thread (`registration`); `ready` rows are pinned so far.

    An `Arena`, and not torch's pinned memory: freeing that after an error that the context does not survive can abort
    the process. Raises MemoryError as Arena does, and as `Registration.register_next` if the first range is refused.
    """

    def __init__(self, engine: CudaEngine, count: int, row_bytes: int) -> None:
        self._arena = Arena(count, row_bytes)
        self.rows = self._arena.rows
        _move_near(engine, self.rows)
        self.registration = Registration(engine.driver, engine.context, self.rows, PIN_RANGE_BYTES, is_new=True)
        self._stop = threading.Event()
        self._pinner = threading.Thread(target=self._pin, name="async-tier-pin", daemon=True)
        try:
            while not self.ready:  # a row may be larger than a range
                self.registration.register_next()
            self._pinner.start()
        except BaseException:
            if not self.registration.give_up():
                self._arena.keep_for_ever()
            self._arena.close()
            raise
        engine.add_rows(self.rows, self.registration)
        engine.own(self)

    @property
    def ready(self) -> int:
        return self.registration.rows_ready

    def close(self) -> None:
        """Free the memory, unless it had to be left. The engine is closed. Idempotent."""
        self._arena.close()

    def unpin(self) -> None:
        """See cuda.Pinned."""
        self._stop.set()
        # Bounded, because the garbage collector may run the end of a tier on this very thread, which then waits for it.
        self._pinner.join(PINNER_TIMEOUT_S)
        if self._pinner.is_alive():
            raise RuntimeError("its memory is still being pinned")
        self.registration.unpin()

    def leave(self) -> None:
        """See cuda.Pinned."""
        self._stop.set()
        self.registration.leave()
        self._arena.keep_for_ever()

    def _pin(self) -> None:
        try:
            while not self.registration.is_complete and not self._stop.wait(self.registration.seconds):
                self.registration.register_next()
        except RuntimeError as error:
            logger.warning(
                "The tier holds %d blocks and not %d, because CUDA refused to pin more of its memory: %s",
                self.ready,
                self.rows.count,
                error,
            )


def _move_near(engine: CudaEngine, rows: Rows) -> None:
    """Have new rows come from the memory next to the GPU: another socket's is reached at half the rate or less."""
    try:
        node = engine.driver.host_node(engine.context.ordinal)
        if node >= 0:
            _native.prefer_node(rows.address, -(-rows.count * rows.stride // mmap.PAGESIZE) * mmap.PAGESIZE, node)
    except (CudaError, OSError) as error:  # an older driver; a sandbox that refuses it
        logger.info("The tier's memory is taken where the system likes, not next to the GPU: %s", error)
