"""The tier's rows where copies are CUDA's: pinned host memory, or device memory. Both are an `engines.RowMemory`."""

from __future__ import annotations

import logging
import threading

from async_tier.arena import Arena, Rows
from async_tier.config import format_size
from async_tier.streams.cuda import CudaEngine
from async_tier.streams.cuda_driver import OUT_OF_MEMORY, CudaError
from async_tier.streams.registration import Registration

logger = logging.getLogger(__name__)

# What is pinned at a time: some 0.1 s of the driver's time, in which other calls into it may have to wait.
PIN_RANGE_BYTES = 256 << 20


class PinnedArena:
    """Host memory, pinned range by range by a background thread; `ready` rows are pinned so far.

    An `Arena`, and not torch's pinned memory: freeing that after an error that the context does not survive can abort
    the process. Raises MemoryError as Arena does, and CudaError if the driver refuses the first range.
    """

    def __init__(self, engine: CudaEngine, count: int, row_bytes: int) -> None:
        self._engine = engine
        self._arena = Arena(count, row_bytes)
        self.rows = self._arena.rows
        self._registration = Registration(engine.driver, engine.context, self.rows, PIN_RANGE_BYTES)
        try:
            self._registration.register_next()
        except CudaError:
            self._arena.close()
            raise
        engine.add_rows(self.rows, self._registration.range_starts)
        self._stop = threading.Event()
        self._pinner = threading.Thread(target=self._pin, name="async-tier-pin", daemon=True)
        self._pinner.start()
        engine.call_on_close(self._unpin)

    @property
    def ready(self) -> int:
        return self._registration.rows_ready

    def close(self) -> None:
        """Free the memory, if the engine is closed and knows that no copy touches it any more. Idempotent."""
        if self._engine.is_quiet:
            self._arena.close()

    def _pin(self) -> None:
        try:
            while not self._registration.is_complete and not self._stop.is_set():
                self._registration.register_next()
        except CudaError as error:
            logger.warning(
                "The tier holds %d blocks and not %d, because CUDA refused to pin more of its memory: %s",
                self.ready,
                self.rows.count,
                error,
            )

    def _unpin(self) -> None:
        self._stop.set()
        self._pinner.join()
        self._registration.close()


class DeviceArena:
    """Device memory. Raises MemoryError, in words, for more than the device has."""

    def __init__(self, engine: CudaEngine, count: int, row_bytes: int) -> None:
        size = count * row_bytes
        with engine.context:
            try:
                address = engine.driver.allocate(size)
            except CudaError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
                free, _ = engine.driver.memory()
                raise MemoryError(
                    f"the tier asks for {format_size(size)} ({size} bytes) of device memory, but cuda:"
                    f"{engine.context.ordinal} has {format_size(free)} ({free} bytes) free; set bytes_to_use to less"
                ) from error
        self.rows = Rows(address=address, count=count, row_bytes=row_bytes, stride=row_bytes)
        self.ready = count
        engine.add_rows(self.rows, None)
        engine.call_on_close(lambda: engine.driver.free(address))

    def close(self) -> None:
        """Nothing to do: the engine's `close` frees the memory, when no copy touches it any more."""
