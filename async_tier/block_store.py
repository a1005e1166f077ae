"""BlockStore: the index, the arena, the streams and the jobs in flight, put together. No vLLM.

Ownership, before any code:

- Every field belongs to the thread that calls (vLLM: whoever holds the manager's lock). There is no lock here: copy
  threads know addresses only, and what they have done is asked of events.
- Rows of the arena belong to the index. While copies of a job touch a row, the job holds a pin on it.
- Memory of the primary belongs to the caller, who keeps it valid until the job is reported or the store is closed.
- A job is in `_stores` or `_loads` from its first queued copy until its event is done, else in `_finished`.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from async_tier.config import TierConfig, load_policy
from async_tier.engines import RowMemory, open_engine
from async_tier.index import READY, BlockIndex
from async_tier.observe.faults import FaultLog, one_line
from async_tier.observe.trace import Submitted, TierTrace, TraceWriter
from async_tier.order import SequenceOrder
from async_tier.streams.base import CopyEngine, CopyEvent
from async_tier.streams.rows import Rows
from async_tier.text import format_size, shown

logger = logging.getLogger(__name__)

# A copy takes milliseconds; one that takes as long has met a fault of the driver or the device.
LATE_S = 30


class Finished(NamedTuple):
    """The end of a job.

    success: whether every block arrived, or did not need to.
    loaded_keys: of a load that failed in part, the keys that did arrive; else None.
    bytes: bytes moved. seconds: from the first copy's start to the last one's end.
    reason: why it failed, in words; None for a success. kind: "store" or "load".
    """

    job_id: int
    success: bool
    loaded_keys: tuple[bytes, ...] | None = None
    bytes: int = 0
    seconds: float = 0.0
    reason: str | None = None
    kind: str = "store"


@dataclass(frozen=True)
class Statistics:
    """Counts since construction, and how things stand. Bytes are `row_bytes` a block.

    engine: "cuda" or "host", what copies. capacity, rows_used: rows of the arena, and those not free. blocks: READY.
    jobs_in_flight: queued and not yet polled to their end. store_jobs, load_jobs: submitted, whatever came of them.
    failed_jobs: reported as failed; of loads, also those that lacked a block. blocks_stored, blocks_loaded: copied
    well. blocks_present: offered for storing, but already here or on their way. blocks_refused: offered, but without a
    row to be had. evictions. hits, misses: of `lookup`. faults: unexpected errors that calls met, and what they could
    not take.
    """

    engine: str
    capacity: int
    row_bytes: int
    rows_used: int
    blocks: int
    jobs_in_flight: int
    store_jobs: int
    load_jobs: int
    failed_jobs: int
    blocks_stored: int
    blocks_loaded: int
    blocks_present: int
    blocks_refused: int
    evictions: int
    hits: int
    misses: int
    faults: int


class _RefusedError(Exception):
    """Why a job is not taken, in words."""


class _Job:
    __slots__ = ("blocks", "event", "job_id", "keys", "kind", "missing", "rows", "sequence", "traced")

    event: CopyEvent

    def __init__(self, job_id: int, kind: str, sequence: str | None, keys: Collection[bytes]) -> None:
        """kind: "store" or "load". keys: what was asked for, from which those are left out that need no copy."""
        self.job_id = job_id
        self.kind = kind
        self.sequence = sequence
        self.blocks = len(keys)
        self.keys: Sequence[bytes] = ()
        self.rows: Sequence[int] = ()  # of the arena, one a key
        self.missing = 0  # loads: other keys of the job, which were not here
        self.traced: Submitted | None = None

    def __str__(self) -> str:
        request = "" if self.sequence is None else f", request {shown(self.sequence)}"
        return f"job {self.job_id} ({self.kind}{request}, {self.blocks} block{'s' * (self.blocks != 1)})"


class BlockStore:
    """Stores rows of a primary tier by key and loads them back, asynchronously.

    Call `submit_store` and `submit_load` to queue jobs and `poll` for their ends; none of them waits for bytes to
    move. `lookup` says what can be loaded. Keys are bytes; rows are row numbers of the primary.

        store = BlockStore(Rows.of_view(memoryview(primary)))
        store.submit_store(1, [b"first", b"second"], [0, 1])
        store.drain()  # or poll() until job 1 is reported
        if store.lookup(b"first"):  # pins nothing: the load says what it found
            store.submit_load(2, [b"first"], [7])

    A sequence is a name for blocks of which each continues those before it, such as a prompt's. Name it where blocks
    are stored and looked up, and call `finish_sequence` at its end: a prefix then stays for longer than what continues
    it, and the sequence makes no room for its later blocks at the cost of its earlier ones. One that is longer than the
    tier keeps its start, and the rest is left out. Blocks that do not continue each other need no name.

    `engine` and `arena`, both or neither, are for tests and for other engines; by default the configuration says, as
    in `engines.open_engine`. Raises MemoryError or ValueError, in words, when they cannot be had.
    """

    def __init__(
        self,
        primary: Rows,
        config: TierConfig | None = None,
        *,
        engine: CopyEngine | None = None,
        arena: RowMemory | None = None,
    ) -> None:
        config = config or TierConfig()
        self.primary = primary
        capacity = _capacity(primary, config)
        policy = load_policy(config.eviction_policy)
        writer = TraceWriter(config.trace_path) if config.trace_path is not None else None
        if engine is None or arena is None:
            try:
                engine, arena = open_engine(primary, config, capacity)
            except BaseException:
                if writer is not None:
                    writer.close()
                raise
        self.engine, self.arena = engine, arena
        # Also when nobody calls close().
        self._log = FaultLog(logger)
        self._release = weakref.finalize(self, _release, self.engine, self.arena, writer, self._log)
        try:
            self.index = BlockIndex(self.arena.rows.count, policy)
        except Exception as error:  # whatever a policy raises that is made
            self._release()
            if isinstance(error, MemoryError):
                raise
            raise ValueError(
                f"eviction_policy must be one that can be made ({type(error).__name__}: {shown(str(error))}), not "
                f"{shown(config.eviction_policy)}"
            ) from error
        self.index.usable = arena.ready
        self._loads: deque[_Job] = deque()
        self._stores: deque[_Job] = deque()
        self._finished: list[Finished] = []
        # Of the sequences that have begun and are not finished. To be read by anyone, changed here only.
        self.orders: dict[str | None, SequenceOrder] = {}
        # Sequence -> its keys hit this step.
        self._step_hits: dict[str | None, list[bytes]] = {}
        self._store_jobs = self._load_jobs = self._failed_jobs = 0
        self._blocks_stored = self._blocks_loaded = self._blocks_present = self._blocks_refused = 0
        self._hits = self._misses = self._faults = 0
        self._closed = False
        self._broken = False
        self._is_late = False
        self._trace: TierTrace | None = None
        if writer is not None:
            self._trace = TierTrace(writer)

    # ------------------------------------------------------------------------------------------------- the contract

    def begin_sequence(self, sequence: str, order: SequenceOrder) -> None:
        """What is known of the order of a sequence's blocks, until `finish_sequence`."""
        self.orders[sequence] = order

    def has(self, key: bytes) -> bool:
        """Whether `key` can be loaded now; nobody asks for it."""
        return self.index.state(key) == READY

    def lookup(self, key: bytes, sequence: str | None = None, pin: bool = False) -> bool:
        """Whether `key` can be loaded now. Counts as a use by `sequence` (a request's name), which a load does not.

        It may be evicted before it is loaded, and the load then fails for it. Not with `pin`: a hit stays loadable
        until the next `end_step`, which whoever pins has to call.
        """
        if not self.index.pin_hit(key):
            self._misses += 1
            return False
        self._hits += 1
        if not pin:
            self.index.withdraw_hit()
            self.touch((key,), sequence)
            return True
        try:
            self._step_hits[sequence].append(key)
        except KeyError:
            self._step_hits[sequence] = [key]
        return True

    def withdraw_hit(self, sequence: str | None = None) -> None:
        """The last lookup, the sequence's, a hit and pinned, is not answered with it: neither a use nor a pin."""
        self.index.withdraw_hit()
        self._step_hits[sequence].pop()
        self._hits -= 1

    def end_step(self) -> None:
        """The end of a scheduler step: release the pins of its hits."""
        self._look_after()
        if self._trace is not None:
            self._trace.scheduled()
        if self._step_hits:
            self._note_hits()
        self.index.end_step()
        if self._log.is_holding:
            self._log.flush()

    def note_results(self) -> None:
        """The model's results of the oldest step under way have arrived: for the trace, if there is one."""
        if self._trace is not None:
            self._trace.results()

    def submit_store(
        self,
        job_id: int,
        keys: Collection[bytes],
        rows: np.ndarray | Sequence[int],
        sequence: str | None = None,
        order: SequenceOrder | None = None,
    ) -> None:
        """Queue the copy of primary rows `rows` (shape (n,), any integer type) into the tier, under `keys` (n of them).

        Keys that are here or on their way are not copied again. When no row can be had, keys are left out, the last
        of the sequence first; that is a success of fewer bytes. Unequal lengths and rows out of range fail the job.
        `order` is for a sequence that was not begun.
        """
        self._store_jobs += 1
        self._look_after()
        distinct = isinstance(keys, (set, frozenset))  # as vLLM's are
        keys = list(keys)
        job = _Job(job_id, "store", sequence, keys)
        try:
            sources = self._checked(keys, rows)
        except _RefusedError as refusal:
            self._refuse(job, refusal)
            return
        if self._step_hits:
            self._note_hits()
        order = order or self.orders.get(sequence)
        if order is not None and len(keys) > 1:  # vLLM hands over a set
            places = order.permutation(keys)
            keys = [keys[at] for at in places]
            sources = [sources[at] for at in places]
        new, arena_rows = self.index.reserve(keys, sequence, order, distinct)
        if len(new) < len(keys):
            self._count_left_out(keys, new)
            row_of = dict(zip(reversed(keys), reversed(sources), strict=True))  # of a key offered twice, the first
            sources = [row_of[key] for key in new]
        if not new:
            self._finish(job)
            return
        try:
            job.event = self.engine.store_stream.copy_rows(self.arena.rows, arena_rows, self.primary, sources)
        except Exception as error:
            self.index.drop_filling(new, arena_rows)
            self._fault(job, error)
            return
        job.keys, job.rows = new, arena_rows
        self._stores.append(job)
        if self._trace is not None:
            self._trace_begin(self._trace, job)

    def submit_load(
        self,
        job_id: int,
        keys: Collection[bytes],
        rows: np.ndarray | Sequence[int],
        sequence: str | None = None,
    ) -> None:
        """Queue the copy of the blocks under `keys` (n of them) into primary rows `rows` (shape (n,)).

        Keys that are not here, or only on their way, fail and the rest loads: `Finished.loaded_keys`. A key whose
        load failed is gone from the tier before the failure is reported. Unequal lengths and rows out of range fail
        the whole job. `sequence` is whom it is for, in the log.
        """
        self._load_jobs += 1
        self._look_after()
        keys = list(keys)
        job = _Job(job_id, "load", sequence, keys)
        try:
            targets = self._checked(keys, rows)
        except _RefusedError as refusal:
            self.index.drop(keys)
            self._refuse(job, refusal)
            return
        arena_rows = self.index.pin_ready(keys)
        job.missing = arena_rows.count(-1)
        if job.missing:
            self.index.drop([key for key, row in zip(keys, arena_rows, strict=True) if row < 0])
            found = [at for at, row in enumerate(arena_rows) if row >= 0]
            keys = [keys[at] for at in found]
            arena_rows = [arena_rows[at] for at in found]
            targets = [targets[at] for at in found]
        if not keys:
            self._finish(job, self._why_incomplete(job))
            return
        try:
            job.event = self.engine.load_stream.copy_rows(self.primary, targets, self.arena.rows, arena_rows)
        except Exception as error:
            self.index.unpin(arena_rows)
            self.index.drop(keys)
            self._fault(job, error)
            return
        job.keys, job.rows = keys, arena_rows
        self._loads.append(job)
        if self._trace is not None:
            self._trace_begin(self._trace, job)

    def poll(self) -> list[Finished]:
        """The jobs that ended since the last call, each once. Never blocks."""
        self._look_after()
        if self._loads:
            self._collect(self._loads, self._end_load)
        if self._stores:
            self._collect(self._stores, self._end_store)
        if self._log.is_holding:
            self._log.flush()
        finished, self._finished = self._finished, []
        return finished

    def drain(self) -> None:
        """Block until every submitted job has ended. Nothing is lost; the next `poll` reports them."""
        for queue, end in ((self._loads, self._end_load), (self._stores, self._end_store)):
            for job in queue:
                while not job.event.synchronize(LATE_S):
                    self._look_after()
            self._look_after()
            self._collect(queue, end)

    def clear(self) -> None:
        """Forget every block. Copies in flight go on, and their jobs are reported."""
        self._step_hits.clear()
        self.index.clear()

    def touch(self, keys: Collection[bytes], sequence: str | None = None) -> None:
        """The sequence used `keys`, in this order; those not here are passed over."""
        self.index.use(list(keys), sequence, self.orders.get(sequence))

    def finish_sequence(self, sequence: str) -> None:
        """Nothing more will be stored for the sequence; its name may come again for another. Idempotent.

        Until then no store of the sequence evicts its last block. Copies go on, and hits that are pinned stay so
        until the step ends.
        """
        order = self.orders.pop(sequence, None)
        hits = self._step_hits.pop(sequence, None)
        if hits and (order is None or any(order.position(key) is None for key in hits)):
            self.index.use(hits, sequence, None)  # else its end is a use of these as well
        self.index.finish(sequence, order)

    def fault(self, doing: str, reason: object) -> None:
        """Count something that went wrong, and say so in the log; an exception's traceback, too, the first time."""
        self._faults += 1
        error = reason if isinstance(reason, BaseException) else None
        self._log.report(doing, f"The tier could not {doing}: {_said(reason)}", error, _said(reason))

    def fail(
        self, job_id: int, kind: str, reason: BaseException, keys: object = (), sequence: str | None = None
    ) -> None:
        """Report a "store" or "load", of which no copy is under way, as failed. A load's keys are forgotten."""
        names = keys if isinstance(keys, Collection) else ()
        if kind == "load":
            self.index.drop(key for key in names if isinstance(key, bytes))
        self._fault(_Job(job_id, kind, sequence, names), reason)

    def close(self) -> None:
        """End the engine and free the memory; jobs not finished have failed, and `poll` still says so. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.engine.close()
        self.drain()
        self.index.clear()
        self._release()

    @property
    def num_blocks(self) -> int:
        """Blocks that can be loaded."""
        return len(self.index)

    @property
    def has_pending_work(self) -> bool:
        """Whether a job is in flight or not yet reported."""
        return bool(self._loads or self._stores or self._finished)

    @property
    def has_results(self) -> bool:
        """Whether `poll` has something to report without asking an event: jobs that had nothing to copy."""
        return bool(self._finished)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called. Jobs that are submitted from then on fail."""
        return self._closed

    @property
    def stores_in_flight(self) -> tuple[CopyEvent, ...]:
        """The ends of the copies of stores that are queued and not yet polled to their end, the oldest first."""
        return tuple(job.event for job in self._stores)

    @property
    def loads_in_flight(self) -> tuple[CopyEvent, ...]:
        """The same of loads."""
        return tuple(job.event for job in self._loads)

    def signal(self, fd: int) -> None:
        """See CopyEngine.signal. Jobs that had nothing to copy are not signalled: see `has_results`."""
        self.engine.signal(fd)

    def statistics(self) -> Statistics:
        """A snapshot; see Statistics."""
        return Statistics(
            engine=self.engine.name,
            capacity=self.index.capacity,
            row_bytes=self.primary.row_bytes,
            rows_used=self.index.rows_used,
            blocks=len(self.index),
            jobs_in_flight=len(self._loads) + len(self._stores),
            store_jobs=self._store_jobs,
            load_jobs=self._load_jobs,
            failed_jobs=self._failed_jobs,
            blocks_stored=self._blocks_stored,
            blocks_loaded=self._blocks_loaded,
            blocks_present=self._blocks_present,
            blocks_refused=self._blocks_refused,
            evictions=self.index.evictions,
            hits=self._hits,
            misses=self._misses,
            faults=self._faults,
        )

    # ----------------------------------------------------------------------------------------------------- job ends

    def _collect(self, queue: deque[_Job], end: Callable[[_Job], None]) -> None:
        # In order of submission: behind a job that is not done nothing needs to be asked.
        while queue and queue[0].event.is_done:
            job = queue.popleft()
            try:
                end(job)
            except Exception as error:  # not reported yet: that is the last thing that `end` does
                self.index.drop(job.keys)
                self._fault(job, error)

    def _trace_begin(self, trace: TierTrace, job: _Job) -> None:
        try:
            blocks = len(job.keys)
            job.traced = trace.submitted(job.kind, blocks, blocks * self.primary.row_bytes)
        except Exception as error:  # a job must not be lost for its picture
            self._stop_tracing(error)

    def _trace_end(self, trace: TierTrace, job: _Job, reason: str | None) -> None:
        try:
            if job.traced is not None:
                trace.ended(job.traced, job.job_id, job.event, self.index.rows_used, reason)
            else:
                trace.without_copies(job.kind, job.blocks, job.job_id, reason)
        except Exception as error:  # nor must its end
            self._stop_tracing(error)

    def _stop_tracing(self, reason: object) -> None:
        self._trace = None
        self.fault("trace jobs any more", reason)

    def _end_store(self, job: _Job) -> None:
        if job.event.failed:
            self.index.drop_filling(job.keys, job.rows)
            self._finish(job, self._why_failed(job))
            return
        self.index.fill(job.rows)
        self._blocks_stored += len(job.rows)
        self._finish(job, None, None, len(job.rows) * self.primary.row_bytes, job.event.seconds)

    def _end_load(self, job: _Job) -> None:
        self.index.unpin(job.rows)
        if job.event.failed:
            self.index.drop(job.keys)
            self._finish(job, self._why_failed(job))
            return
        self._blocks_loaded += len(job.rows)
        loaded = tuple(job.keys) if job.missing else None
        size = len(job.rows) * self.primary.row_bytes
        self._finish(job, self._why_incomplete(job), loaded, size, job.event.seconds)

    def _why_failed(self, job: _Job) -> str:
        if self.engine.broken is not None:
            return self.engine.broken
        if self._closed:
            return "the tier was closed before its copies were made"
        return job.event.reason or "its copies were not made"

    def _why_incomplete(self, job: _Job) -> str | None:
        if not job.missing:
            return None
        return f"the tier lacks {job.missing} of its blocks"

    def _refuse(self, job: _Job, refusal: _RefusedError) -> None:
        """The job is not taken. Where the engine is broken that was counted when it broke."""
        self._faults += not self._broken
        self._finish(job, str(refusal))

    def _fault(self, job: _Job, error: BaseException) -> None:
        """The job met an unexpected error, and no copy of it is under way."""
        self._faults += 1
        self._finish(job, _said(error), error=error)

    def _finish(
        self,
        job: _Job,
        reason: str | None = None,
        loaded_keys: tuple[bytes, ...] | None = None,
        size: int = 0,
        seconds: float = 0.0,
        error: BaseException | None = None,
    ) -> None:
        """The last of a job. reason: why it failed; None for a success."""
        if self._trace is not None:
            self._trace_end(self._trace, job, reason)
        if reason is not None:
            self._failed_jobs += 1
            line = str(job)
            self._log.report(job.kind, f"{line[0].upper()}{line[1:]} failed: {reason}", error, reason)
        self._finished.append(Finished(job.job_id, reason is None, loaded_keys, size, seconds, reason, job.kind))

    # ------------------------------------------------------------------------------------------------------- details

    def _look_after(self) -> None:
        """What every call sees to first: that a broken engine empties the tier, and that more rows may be ready."""
        if self.engine.broken is not None and not self._broken:
            self._broken = True
            self.clear()
            self.fault("go on copying; it is empty and takes nothing more", self.engine.broken)
        if self.engine.seconds_under_way > LATE_S and not self._is_late:
            self._is_late = True
            logger.error("A copy of the tier has been under way for %d s, and has not ended; its jobs wait", LATE_S)
        if self.index.usable < self.index.capacity:
            self.index.usable = self.arena.ready

    def _note_hits(self) -> None:
        """Tell the index of this step's hits as uses. Together, in the order of lookup: cheaper than one by one."""
        hits, self._step_hits = self._step_hits, {}
        for sequence, keys in hits.items():
            order = self.orders.get(sequence)
            if order is not None and len(keys) > 1:  # a sliding window is looked for from its end
                keys = [keys[at] for at in order.permutation(keys)]
            self.index.use(keys, sequence, order)

    def _checked(self, keys: list[bytes], rows: np.ndarray | Sequence[int]) -> list[int]:
        """The row numbers as a list. Raises _RefusedError where they do not fit the keys or the primary."""
        if self._closed:
            raise _RefusedError("the tier is shut down")
        if self._broken:
            raise _RefusedError(f"the tier can copy no more: {self.engine.broken}")
        # vLLM's are numpy arrays; as a list they are quicker to check and to hand on, for jobs of up to thousands.
        numbers: list[int] = rows.tolist() if isinstance(rows, np.ndarray) else list(rows)
        if len(numbers) != len(keys):
            raise _RefusedError(f"{len(keys)} keys but {len(numbers)} row numbers")
        # An array's are all of one type; of more dimensions, its list has lists. A loop, for any() makes a generator,
        # which takes longer than the one look.
        for number in numbers[:1] if isinstance(rows, np.ndarray) else numbers:
            if type(number) is not int:
                raise _RefusedError("row numbers must be integers")
        if numbers and not (min(numbers) >= 0 and max(numbers) < self.primary.count):
            raise _RefusedError(f"a row number is not from 0 to {self.primary.count - 1}")
        return numbers

    def _count_left_out(self, keys: list[bytes], new: Sequence[bytes]) -> None:
        taken = set(new)
        present = sum(1 for key in keys if key not in taken and self.index.state(key))
        self._blocks_present += present
        self._blocks_refused += len(keys) - len(taken) - present


def _capacity(primary: Rows, config: TierConfig) -> int:
    """Rows that the configured size holds; by default twice the primary's."""
    if config.bytes_to_use is None:
        return 2 * primary.count
    count = config.bytes_to_use // primary.row_bytes
    if count < 1:
        raise ValueError(
            f"bytes_to_use must hold at least one block of {format_size(primary.row_bytes)} "
            f"({primary.row_bytes} bytes), not {config.bytes_to_use} bytes"
        )
    return count


def _said(reason: object) -> str:
    """An error as a log line says it."""
    text = one_line(reason)
    if isinstance(reason, BaseException):
        text = f"{type(reason).__name__}: {text}" if text else type(reason).__name__
    return text


def _release(engine: CopyEngine, arena: RowMemory, writer: TraceWriter | None, log: FaultLog) -> None:
    """Engine before arena: no copy may touch freed memory. What one cannot do must not keep the others from it."""
    with contextlib.ExitStack() as ends:
        ends.callback(log.flush, now=True)
        if writer is not None:
            ends.callback(writer.close)
        ends.callback(arena.close)
        ends.callback(engine.close)
