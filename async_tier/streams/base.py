"""CopyEngine, CopyStream and CopyEvent: the interface of copy engines.

The contract, for every engine:

- Queueing returns at once. Its cost depends on the number of copies, never on the number of bytes.
- Queued copies run without further calls, and no thread of the engine needs the GIL.
- The copies of a stream may run in any order, and at the same time. Only an event tells that they have ended. Memory
  must not be reused before the events of all copies that touch it.
- Querying an event never blocks, and never needs a lock that is held during a copy.
"""

from __future__ import annotations

from typing import Protocol

from async_tier.streams.rows import Rows


class CopyEvent(Protocol):
    """The end of the copies queued by one call."""

    @property
    def is_done(self) -> bool:
        """Whether all of them have ended or failed. Raises RuntimeError in a forked child, where they never end."""

    @property
    def failed(self) -> bool:
        """Whether some bytes did not arrive. Only meaningful once `is_done`."""

    @property
    def reason(self) -> str | None:
        """Why it failed; None if it did not, or if the engine does not know."""

    @property
    def seconds(self) -> float:
        """From the start of the first copy to the end of the last, in seconds. Only meaningful once `is_done`."""

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """When the copies were made: (leg, start, end), for the legs "in" and "out", or the only one, "copy".

        Times are in ns of CLOCK_MONOTONIC. Empty until they have ended, and if they failed.
        """

    def synchronize(self, seconds: float = ...) -> bool:
        """Block, without the GIL, until `is_done`, but at most for these seconds. Returns `is_done`."""


class CopyStream(Protocol):
    """A queue of copies."""

    def copy_rows(
        self, destination: Rows, destination_rows: list[int], source: Rows, source_rows: list[int]
    ) -> CopyEvent:
        """Queue copies of row `source_rows[i]` of `source` to row `destination_rows[i]` of `destination`.

        The lists must have the same length, and may be changed once the call returns. Raises RuntimeError if the
        engine cannot take the job, and ValueError, OverflowError or TypeError for a bad row; then nothing is queued.
        """


class CopyEngine(Protocol):
    """The owner of a tier's streams. Loads go before queued stores; each engine documents how.

    name: "host" or "cuda". broken: why the engine can copy no more; then all its jobs have failed. None while it can.
    seconds_under_way: how long the oldest copy has been under way; 0.0 if there is none, or if that is unknown.
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
        """Write to this non-blocking eventfd whenever a job has ended; -1 to stop. The caller still owns it."""

    def close(self) -> None:
        """End the engine. Unfinished jobs fail, and no copy touches memory any more when this returns. If copies do not
        end, the engine logs that and never frees its own memory. Idempotent.
        """
