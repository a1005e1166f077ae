"""The jobs of a BlockStore: what it keeps of one, what it reports at its end, and what it counts."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from async_tier.memory.peers import Borrowed
from async_tier.observe.trace import Submitted
from async_tier.streams.base import CopyEvent
from async_tier.text import brief

# Why blocks that were offered to a store were not stored, and what helps.
REFUSALS = {
    "own_request": "requests have more blocks than the tier; set bytes_to_use to more",
    "in_use": "copies and hits need the blocks that would be evicted; set bytes_to_use to more",
    "not_ready": "the tier's memory is still being pinned, which ends by itself",
    "failed": "stores fail; the log has the reason of each kind",
}


class Finished(NamedTuple):
    """The end of a job.

    success: whether every block arrived or needed no copy.
    loaded_keys: the keys that did arrive, if a load failed in part; otherwise None.
    bytes: bytes moved. seconds: from the start of the first copy to the end of the last one. queued_seconds: from the
        submission to the start of the first copy. Both are 0 for a job without copies, and for one whose copies failed.
    reason: why the job failed; None for a success. kind: "store" or "load".
    """

    job_id: int
    success: bool
    loaded_keys: tuple[bytes, ...] | None = None
    bytes: int = 0
    seconds: float = 0.0
    reason: str | None = None
    kind: str = "store"
    queued_seconds: float = 0.0


@dataclass
class Statistics:
    """The current state, and counts since construction. A block has `row_bytes` bytes.

    engine: the copy engine, "cuda" or "host". capacity: rows of the arena. rows_ready: those that may be used by now.
    rows_used: those that are not free. rows_pinned: those that copies or hits of this step need (twice, if both do).
    blocks: those that can be loaded. stores_in_flight, loads_in_flight: jobs whose copies were not seen to end.
    store_bytes_in_flight, load_bytes_in_flight: their bytes.

    store_jobs, load_jobs: jobs submitted, whatever their outcome. failed_stores, failed_loads: jobs reported as failed,
    including loads that lacked a block. blocks_stored, blocks_loaded: blocks copied successfully. blocks_present:
    offered to a store, but already stored or being stored, here or by a peer. blocks_borrowed: those of blocks_loaded
    that were copied from a peer's rows. restored: blocks that were found in the pool at start. peers: other files of
    the pool. peer_blocks: blocks in these. refused: offered to a store, but not stored, by the reason
    (see REFUSALS). blocks_lost: blocks of loads that did not arrive. evictions: blocks evicted. resets: how often
    everything was forgotten. hits, misses: results of `lookup`. faults: unexpected errors, and jobs refused for bad
    arguments or after `close`.
    """

    engine: str
    capacity: int
    row_bytes: int
    rows_ready: int = 0
    rows_used: int = 0
    rows_pinned: int = 0
    blocks: int = 0
    stores_in_flight: int = 0
    loads_in_flight: int = 0
    store_bytes_in_flight: int = 0
    load_bytes_in_flight: int = 0
    store_jobs: int = 0
    load_jobs: int = 0
    failed_stores: int = 0
    failed_loads: int = 0
    blocks_stored: int = 0
    blocks_loaded: int = 0
    blocks_present: int = 0
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REFUSALS, 0))
    blocks_borrowed: int = 0
    restored: int = 0
    peers: int = 0
    peer_blocks: int = 0
    blocks_lost: int = 0
    evictions: int = 0
    resets: int = 0
    hits: int = 0
    misses: int = 0
    faults: int = 0

    @property
    def jobs_in_flight(self) -> int:
        return self.stores_in_flight + self.loads_in_flight

    @property
    def failed_jobs(self) -> int:
        return self.failed_stores + self.failed_loads

    @property
    def blocks_refused(self) -> int:
        return sum(self.refused.values())

    @property
    def bytes_stored(self) -> int:
        return self.blocks_stored * self.row_bytes

    @property
    def bytes_loaded(self) -> int:
        return self.blocks_loaded * self.row_bytes


class Job:
    """A job that is not reported yet."""

    __slots__ = (
        *("blocks", "borrowed", "event", "job_id", "keys", "kind", "missing", "rows", "sequence", "submitted_ns"),
        "traced",
    )

    event: CopyEvent

    def __init__(self, job_id: int, kind: str, sequence: str | None, keys: Collection[bytes]) -> None:
        """kind: "store" or "load". keys: all that the caller passed; only their number is kept."""
        self.job_id = job_id
        self.kind = kind
        self.sequence = sequence
        self.blocks = len(keys)
        self.keys: Sequence[bytes] = ()  # those that are copied
        self.rows: Sequence[int] = ()  # of the arena, one per key
        self.borrowed: Sequence[Borrowed] = ()  # loads: what is copied from peers
        self.missing = 0  # loads: how many of the caller's keys the tier lacked
        self.submitted_ns = time.monotonic_ns()
        self.traced: Submitted | None = None

    def __str__(self) -> str:
        request = "" if self.sequence is None else f", request {brief(self.sequence)}"
        return f"job {self.job_id} ({self.kind}{request}, {self.blocks} block{'s' * (self.blocks != 1)})"
