"""Registration: rows of host memory, pinned for CUDA range by range."""

from __future__ import annotations

import logging
import mmap

from async_tier.arena import Rows
from async_tier.streams.cuda_driver import ALREADY_REGISTERED, CudaError, DeviceContext, Driver
from async_tier.streams.segments import range_starts

logger = logging.getLogger(__name__)

# Registering 512 GiB at once was seen to fail (vLLM #51080).
MAX_RANGE_BYTES = 64 << 30


class Registration:
    """The pinning of `rows`, in ranges of at most `largest` bytes that start at rows and on pages.

    `register_next` pins one range after the other; `close` unpins those that are ours. What somebody else has
    registered already is as good, and not ours to unpin.
    """

    def __init__(self, driver: Driver, context: DeviceContext, rows: Rows, largest: int = MAX_RANGE_BYTES) -> None:
        self._driver = driver
        self._context = context
        self._rows = rows
        self.range_starts = range_starts(rows, largest, mmap.PAGESIZE)
        self._end = rows.address + (rows.count - 1) * rows.stride + rows.row_bytes
        self._done = 0
        self._ours: list[int] = []

    @property
    def is_complete(self) -> bool:
        return self._done == len(self.range_starts)

    @property
    def rows_ready(self) -> int:
        """Rows from the first on that are pinned."""
        if self.is_complete:
            return self._rows.count
        return (self.range_starts[self._done] - self._rows.address) // self._rows.stride

    def register_all(self) -> None:
        """Pin all ranges, or none: raises CudaError."""
        try:
            while not self.is_complete:
                self.register_next()
        except CudaError:
            self.close()
            raise

    def register_next(self) -> None:
        """Pin the next range. Raises CudaError if the driver refuses."""
        start = self.range_starts[self._done]
        end = self.range_starts[self._done + 1] if self._done + 1 < len(self.range_starts) else self._end
        with self._context:
            try:
                self._driver.register(start, end - start)
            except CudaError as error:
                # The code says "part or all": copies to the rest would block, as all copies to pageable memory do.
                if error.code != ALREADY_REGISTERED or not all(map(self._driver.is_pinned, (start, end - 1))):
                    raise
            else:
                self._ours.append(start)
        self._done += 1

    def close(self) -> None:
        """Unpin what is ours. No copy may be under way. Raises CudaError if the driver refuses. Idempotent."""
        with self._context:
            while self._ours:
                self._driver.unregister(self._ours[-1])
                self._ours.pop()
