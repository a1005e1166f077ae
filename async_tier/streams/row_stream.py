"""RowStream: a stream of rows on the native core, for both engines."""

from __future__ import annotations

from collections.abc import Callable

from async_tier.streams import _native
from async_tier.streams.base import CopyEvent
from async_tier.streams.rows import Rows

# For `RowStream.limit`: no limit.
UNLIMITED = -1


class RowStream:
    """One queue of `engine`. alignment_of: for rows, the `dst_alignment` or `src_alignment` that `_native` takes."""

    def __init__(
        self,
        engine: _native.HostEngine | _native.CudaEngine,
        queue: int,
        alignment_of: Callable[[Rows], int] | None = None,
    ) -> None:
        self.engine = engine
        self._queue = queue
        self._alignment_of = alignment_of

    def copy_rows(
        self, destination: Rows, destination_rows: list[int], source: Rows, source_rows: list[int]
    ) -> CopyEvent:
        """See CopyStream.copy_rows. Raises RuntimeError in a forked child: the threads stayed with the parent."""
        return self.engine.submit_rows(
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
            *(map(self._alignment_of, (destination, source)) if self._alignment_of else ()),
        )

    def limit(self, pieces: int) -> None:
        """Let at most `pieces` more pieces of this queue start; UNLIMITED: any number. See `testing.Gate`."""
        self.engine.limit(self._queue, pieces)
