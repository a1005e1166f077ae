"""CopyStream and CopyEvent: what the tier asks of an engine.

The contract, for every engine:

- Queueing returns at once. What it costs depends on the number of copies, never on the number of bytes.
- The copies of a stream may run in any order, also at the same time. Only an event says that they have ended, and
  whoever reuses memory waits for the events of all copies that touch it.
- Asking an event never blocks and never needs a lock that a copy holds.
- A thread of the engine never needs the GIL.
"""

from __future__ import annotations

from typing import Protocol

from async_tier.arena import Rows


class CopyEvent(Protocol):
    """The end of the copies queued by one call. It may have a `reason` and a `traceback`, both text: why it failed."""

    @property
    def is_done(self) -> bool:
        """Whether all of them have ended, well or not."""

    @property
    def failed(self) -> bool:
        """Whether the bytes did not all arrive. Only meaningful once `is_done`."""

    @property
    def seconds(self) -> float:
        """From the start of the first copy to the end of the last, in seconds. Only meaningful once `is_done`."""

    def synchronize(self) -> None:
        """Block until `is_done`, without the GIL."""


class CopyStream(Protocol):
    """A queue of copies."""

    def copy_rows(
        self, destination: Rows, destination_rows: list[int], source: Rows, source_rows: list[int]
    ) -> CopyEvent:
        """Queue copies of row `source_rows[i]` of `source` to row `destination_rows[i]` of `destination`.

        The lists are of one length and free to be changed when the call returns. Raises, and queues nothing, where
        the engine cannot take the job (RuntimeError) or a row is not one (ValueError, OverflowError, TypeError).
        """

    def keep_times(self) -> None:
        """From now on note when copies start and end, for `spans`."""

    def spans(self, event: CopyEvent) -> list[tuple[str, int, int]]:
        """When the copies of an event of this stream, which is done, were made: (leg, start, end) of each leg.

        Times in ns of CLOCK_MONOTONIC. Empty for copies that were never made, and for those from before `keep_times`.
        """


class CopyEngine(Protocol):
    """The owner of a tier's streams. Loads go before stores: see each engine for how.

    name: "host" or "cuda". broken: why the engine can copy no more, in words; else None. All its jobs have failed then.
    """

    name: str
    broken: str | None

    @property
    def load_stream(self) -> CopyStream: ...

    @property
    def store_stream(self) -> CopyStream: ...

    def advance(self) -> None:
        """Queue on the device what had to wait for room. To be called often; never blocks."""

    def signal(self, fd: int) -> bool:
        """Write to this eventfd, which is non-blocking, whenever a job has ended; -1: no more. It stays the caller's.

        False where the engine cannot, and its events have to be asked.
        """

    def close(self) -> None:
        """End the engine. When it returns no copy touches memory any more; those not finished have failed. Where copies
        do not end, the engine says so in the log and keeps its own memory for good.

        Idempotent."""
