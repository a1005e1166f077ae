"""CopyStream and CopyEvent: what the tier asks of an engine.

The contract, for every engine:

- Queueing returns at once. What it costs depends on the number of copies, never on the number of bytes.
- What is queued goes on by itself: no call of anybody's moves it, and no thread of the engine needs the GIL.
- The copies of a stream may run in any order, also at the same time. Only an event says that they have ended, and
  whoever reuses memory waits for the events of all copies that touch it.
- Asking an event never blocks and never needs a lock that a copy holds.
"""

from __future__ import annotations

from typing import Protocol

from async_tier.streams.rows import Rows


class CopyEvent(Protocol):
    """The end of the copies queued by one call."""

    @property
    def is_done(self) -> bool:
        """Whether all of them have ended, well or not. Raises RuntimeError in a forked child, where they never do."""

    @property
    def failed(self) -> bool:
        """Whether the bytes did not all arrive. Only meaningful once `is_done`."""

    @property
    def reason(self) -> str | None:
        """Why it failed, in words, where the engine knows."""

    @property
    def seconds(self) -> float:
        """From the start of the first copy to the end of the last, in seconds. Only meaningful once `is_done`."""

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """When the copies were made: (leg, start, end) of each leg, "in" and "out", or of the one, "copy".

        Times in ns of CLOCK_MONOTONIC. Empty before they have ended, and where they failed.
        """

    def synchronize(self, seconds: float = ...) -> bool:
        """Block, without the GIL, until `is_done`, or for so many seconds; whether it is."""


class CopyStream(Protocol):
    """A queue of copies."""

    def copy_rows(
        self, destination: Rows, destination_rows: list[int], source: Rows, source_rows: list[int]
    ) -> CopyEvent:
        """Queue copies of row `source_rows[i]` of `source` to row `destination_rows[i]` of `destination`.

        The lists are of one length and free to be changed when the call returns. Raises, and queues nothing, where
        the engine cannot take the job (RuntimeError) or a row is not one (ValueError, OverflowError, TypeError).
        """


class CopyEngine(Protocol):
    """The owner of a tier's streams. Loads go before stores, which wait while more are queued: see each engine for how.

    name: "host" or "cuda". broken: why the engine can copy no more, in words; else None. All its jobs have failed then.
    seconds_under_way: how long the oldest copy has been under way where that is known; else 0.0.
    """

    name: str

    @property
    def broken(self) -> str | None: ...

    @property
    def seconds_under_way(self) -> float: ...

    @property
    def load_stream(self) -> CopyStream: ...

    @property
    def store_stream(self) -> CopyStream: ...

    def signal(self, fd: int) -> None:
        """Write to this non-blocking eventfd whenever a job has ended; -1: no more. It stays the caller's."""

    def close(self) -> None:
        """End the engine. When it returns no copy touches memory any more; those not finished have failed. Where copies
        do not end, the engine says so in the log and keeps its own memory for good.

        Idempotent."""
