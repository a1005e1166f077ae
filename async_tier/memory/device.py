"""DeviceArena: the tier's rows in the memory of a GPU."""

from __future__ import annotations

from async_tier.streams.cuda import CudaEngine
from async_tier.streams.cuda_driver import OUT_OF_MEMORY, CudaError
from async_tier.streams.rows import Rows
from async_tier.text import format_size


class DeviceArena:
    """Memory of a GPU. Raises MemoryError for more than it has free, CudaError if the driver refuses otherwise."""

    def __init__(self, engine: CudaEngine, count: int, row_bytes: int) -> None:
        size = count * row_bytes
        with engine.context:
            try:
                address = engine.allocate(size)
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
        self.pool = None
        engine.add_rows(self.rows, None)

    def close(self) -> None:
        """Nothing to do: the engine's `close` frees the memory when no copy touches it any more."""
