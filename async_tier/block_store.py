"""BlockStore: combines the index, the arena, the streams and the jobs in flight. It does not import vLLM.

Ownership, before any code:

- Every field belongs to the calling thread (in vLLM: the one that holds the manager's lock), so there is no lock here.
  Copy threads are given addresses only, and events tell when their copies have ended.
- Rows of the arena belong to the index. While copies of a job touch a row, the job holds a pin on it.
- Memory of the primary belongs to the caller, who keeps it valid until the job is reported or the store is closed.
- A job is in `_stores` or `_loads` from its first queued copy until its event is done, then in `_finished`.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from async_tier.config import TierConfig, load_policy
from async_tier.engines import RowMemory, open_engine
from async_tier.eviction import EvictionPolicy
from async_tier.index import READY, BlockIndex
from async_tier.jobs import Finished, Job, Statistics
from async_tier.memory.peers import Borrowed, JoinedEvent, Peers
from async_tier.memory.pool_files import Identity
from async_tier.observe.faults import FaultLog, error_text
from async_tier.observe.trace import TierTrace, TraceWriter
from async_tier.order import SequenceOrder
from async_tier.streams._native import TABLE_KEY_BYTES
from async_tier.streams.base import CopyEngine, CopyEvent
from async_tier.streams.rows import Rows
from async_tier.text import brief, format_size

logger = logging.getLogger(__name__)

# A copy takes milliseconds. One that takes this long has met a fault of the driver or the device.
LATE_S = 30


class _RefusedError(Exception):
    """A job is refused; the message says why."""


class BlockStore:
    """Stores rows of a primary tier by key and loads them back, asynchronously.

    `submit_store` and `submit_load` queue jobs, and `poll` reports those that have ended; none of them waits for bytes
    to move. `lookup` tells whether a block can be loaded. Keys are bytes; rows are row numbers of the primary.

        store = BlockStore(Rows.of_view(memoryview(primary)))
        store.submit_store(1, [b"first", b"second"], [0, 1])
        store.drain()  # or poll() until job 1 is reported
        if store.lookup(b"first"):  # pins nothing: the load reports what it found
            store.submit_load(2, [b"first"], [7])

    A sequence is a name for blocks that continue each other, such as a prompt's. Pass it when blocks are stored and
    looked up, and call `finish_sequence` at its end. A prefix then stays longer than the blocks that continue it, and
    later blocks of the sequence never evict its earlier ones: a sequence longer than the tier keeps its start, and the
    rest is left out. Blocks that do not continue each other need no name.

    `engine` and `arena`, both or neither, are for tests and for other engines; by default the configuration decides
    (`engines.open_engine`). With a pool that is a folder, the store begins with the blocks that are in it, and also
    finds those of other processes. `identity` then says what the blocks belong to. By default that is the
    configuration's namespace and the size of a row; all else that their bytes depend on is left to the caller.

    Raises ValueError for a bad configuration, MemoryError if the memory is not available.
    """

    def __init__(
        self,
        primary: Rows,
        config: TierConfig | None = None,
        *,
        engine: CopyEngine | None = None,
        arena: RowMemory | None = None,
        identity: Identity | None = None,
    ) -> None:
        config = config or TierConfig()
        self.primary = primary
        capacity = _capacity(primary, config)
        policy = load_policy(config.eviction_policy)
        self._log = FaultLog(logger)
        # What ends in this order reversed, even if nobody calls close(): no copy may touch memory that is freed.
        ends = contextlib.ExitStack()
        self._release = weakref.finalize(self, ends.close)
        ends.callback(self._log.flush, now=True)
        try:
            self._trace: TierTrace | None = None
            if config.trace_path is not None:
                writer = TraceWriter(config.trace_path)
                ends.callback(writer.close)
                self._trace = TierTrace(writer)
            if engine is None or arena is None:
                engine, arena = open_engine(primary, config, capacity, identity)
            ends.callback(arena.close)
            ends.callback(engine.close)
            self.engine, self.arena = engine, arena
            self.index, restored = _open_index(arena, policy, config)
            # The other files of the pool. Others may read it.
            self.peers = Peers(arena.pool, engine.load_stream if engine.name == "host" else None)
        except BaseException:
            self._release()
            raise
        self._elsewhere = self.peers.places  # by key, what peers hold
        self._loads: deque[Job] = deque()
        self._stores: deque[Job] = deque()
        # Rows of the jobs in each, so that `statistics` takes no longer for a longer queue.
        self._rows_in_flight = {"store": 0, "load": 0}
        self._finished: list[Finished] = []
        # By sequence, from `begin_sequence` to `finish_sequence`. Others may read it; only this class changes it.
        self.orders: dict[str | None, SequenceOrder] = {}
        # By sequence, its keys that were hit in this step.
        self._step_hits: dict[str | None, list[bytes]] = {}
        # The state in it is that of the last call of `statistics`. `lookup` has to be quick, and counts beside it.
        self._counts = Statistics(engine.name, self.index.capacity, primary.row_bytes)
        self._counts.restored = restored
        self._hits = self._misses = 0
        self._closed = False
        self._broken = False
        self._is_late = False

    # ------------------------------------------------------------------------------------------------- the contract

    def begin_sequence(self, sequence: str, order: SequenceOrder) -> None:
        """Use this order of the sequence's blocks until `finish_sequence`."""
        self.orders[sequence] = order
        self.peers.look()

    def has(self, key: bytes) -> bool:
        """Whether `key` can be loaded now. Unlike `lookup`, this counts neither as a hit nor as a use."""
        return self.index.state(key) == READY or key in self._elsewhere

    def lookup(self, key: bytes, sequence: str | None = None, pin: bool = False) -> bool:
        """Whether `key` can be loaded now. A hit counts as a use by `sequence` (a request's name); a load does not.

        The block may be evicted before it is loaded, and the load then fails for it. With `pin` a hit stays loadable
        until the next `end_step`, which the caller then has to call; unless a peer holds it, which may evict it.
        """
        if not self.index.pin_hit(key):
            if key not in self._elsewhere and (pin or not self._look_for(key)):
                self._misses += 1
                return False
            self._hits += 1
            if pin:
                self._step_hits.setdefault(sequence, []).append(key)
            return True
        self._hits += 1
        if not pin:
            self.index.undo_last_hit()
            self.touch((key,), sequence)
            return True
        try:
            self._step_hits[sequence].append(key)
        except KeyError:
            self._step_hits[sequence] = [key]
        return True

    def undo_last_hit(self, sequence: str | None = None) -> None:
        """Undo the last lookup, which was a hit of this sequence with `pin`: no hit is counted, no use, no pin."""
        if self.index.state(self._step_hits[sequence].pop()) == READY:  # it was not a peer's
            self.index.undo_last_hit()
        self._hits -= 1

    def end_step(self) -> None:
        """End a scheduler step: release the pins of its hits, and count them as uses."""
        self._check_engine(with_file=False)
        if self._trace is not None:
            self._trace.scheduled()
        if self._step_hits:
            self._note_hits()
        self.index.end_step()
        if self.peers.count:
            self.peers.refresh()
        if self._log.has_held_back:
            self._log.flush()

    def note_results(self) -> None:
        """Record in the trace, if there is one, that the results of the oldest step under way have arrived."""
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

        Keys that are stored or being stored are not copied again. When rows run out, keys are left out, the last of
        the sequence first; the job is then a success with fewer bytes. Unequal lengths and rows out of range fail the
        job. `order` is for a sequence without `begin_sequence`.
        """
        self._counts.store_jobs += 1
        self._check_engine()
        distinct = isinstance(keys, (set, frozenset))  # vLLM passes a set
        keys = list(keys)
        job = Job(job_id, "store", sequence, keys)
        try:
            sources = self._checked(keys, rows)
            pool = self.arena.pool
            if pool is not None and not pool.table.fits(keys):
                raise _RefusedError(f"a key in a pool is 1 to {TABLE_KEY_BYTES} bytes")
        except _RefusedError as refusal:
            self._refuse(job, refusal)
            return
        if self._step_hits:
            self._note_hits()
        order = order or self.orders.get(sequence)
        if order is not None and len(keys) > 1:  # a set has no order
            places = order.permutation(keys)
            keys = [keys[at] for at in places]
            sources = [sources[at] for at in places]
        if not self._elsewhere.keys().isdisjoint(keys):
            keys, sources = self._not_elsewhere(keys, sources)
        new, arena_rows = self.index.reserve(keys, sequence, order, distinct)
        if len(new) < len(keys):
            self._count_left_out(keys, new, sequence)
            row_of = dict(zip(reversed(keys), reversed(sources), strict=True))  # the first row of a key given twice
            sources = [row_of[key] for key in new]
        if not new:
            self._finish(job)
            return
        job.keys, job.rows = new, arena_rows
        try:
            job.event = self.engine.store_stream.copy_rows(self.arena.rows, arena_rows, self.primary, sources)
        except Exception as error:
            self.index.drop_filling(new, arena_rows)
            self._fail_job(job, error)
            return
        self._stores.append(job)
        self._rows_in_flight["store"] += len(job.keys)
        if self._trace is not None:
            self._trace_begin(self._trace, job)

    def submit_load(
        self, job_id: int, keys: Collection[bytes], rows: np.ndarray | Sequence[int], sequence: str | None = None
    ) -> None:
        """Queue the copy of the blocks under `keys` (n of them) into primary rows `rows` (shape (n,)).

        Keys that are not here, or still being stored, fail, and the rest is loaded: see `Finished.loaded_keys`. A key
        whose load failed is gone from the tier before the failure is reported. Unequal lengths and rows out of range
        fail the whole job. `sequence` is named in the log, and is no use of the blocks.
        """
        self._counts.load_jobs += 1
        self._check_engine()
        keys = list(keys)
        job = Job(job_id, "load", sequence, keys)
        try:
            targets = self._checked(keys, rows)
        except _RefusedError as refusal:
            self._forget(keys)
            self._refuse(job, refusal)
            return
        arena_rows = self.index.pin_ready(keys)
        if -1 in arena_rows:
            absent = [at for at, row in enumerate(arena_rows) if row < 0]
            self.index.drop([keys[at] for at in absent])
            job.borrowed = self._borrow([keys[at] for at in absent], [targets[at] for at in absent])
            found = [at for at, row in enumerate(arena_rows) if row >= 0]
            keys = [keys[at] for at in found]
            arena_rows = [arena_rows[at] for at in found]
            targets = [targets[at] for at in found]
        borrowed = [key for part in job.borrowed for key in part.keys]
        job.missing = job.blocks - len(keys) - len(borrowed)
        if not keys and not borrowed:
            self._finish(job, self._why_incomplete(job))
            return
        event = None
        if keys:
            try:
                event = self.engine.load_stream.copy_rows(self.primary, targets, self.arena.rows, arena_rows)
            except Exception as error:
                self.index.unpin(arena_rows)
                self.index.drop(keys)
                if not borrowed:
                    self._fail_job(job, error)
                    return
                job.missing += len(keys)
                keys, arena_rows = [], []
        job.keys, job.rows = [*keys, *borrowed], arena_rows
        if borrowed or event is None:
            event = JoinedEvent(event, [part.event for part in job.borrowed if part.event is not None])
        job.event = event
        self._loads.append(job)
        self._rows_in_flight["load"] += len(job.keys)
        if self._trace is not None:
            self._trace_begin(self._trace, job)

    def poll(self) -> list[Finished]:
        """The jobs that ended since the last call, each once. Never blocks."""
        self._check_engine()
        if self._loads:
            self._collect(self._loads, self._end_load)
        if self._stores:
            self._collect(self._stores, self._end_store)
        if self._log.has_held_back:
            self._log.flush()
        finished, self._finished = self._finished, []
        return finished

    def drain(self) -> None:
        """Block until every submitted job has ended. The next `poll` reports them."""
        for queue, end in ((self._loads, self._end_load), (self._stores, self._end_store)):
            for job in queue:
                while not job.event.synchronize(LATE_S):
                    self._check_engine()
            self._check_engine()
            self._collect(queue, end)

    def clear(self) -> None:
        """Forget every block. Copies in flight continue, and their jobs are reported."""
        self._check_engine()
        if self.arena.pool is not None and not self._counts.resets:
            logger.info(
                "The tier was reset, after which weights may be others: from now on it keeps its blocks to itself, and "
                "they end with this process. Set keep_on_reset where a reset does not mean that"
            )
        self._empty()

    def touch(self, keys: Collection[bytes], sequence: str | None = None) -> None:
        """Count `keys`, in this order, as used by the sequence; those not here are ignored."""
        self.index.use(list(keys), sequence, self.orders.get(sequence))

    def finish_sequence(self, sequence: str) -> None:
        """Declare that nothing more will be stored for the sequence. Its name may then be used for another. Idempotent.

        Before this call, stores of the sequence do not evict its last block. Copies in flight go on, and pinned hits
        stay pinned until the step ends.
        """
        order = self.orders.pop(sequence, None)
        hits = self._step_hits.pop(sequence, None)
        if hits and (order is None or any(order.position(key) is None for key in hits)):
            self.index.use(hits, sequence, None)  # otherwise `finish` counts these as used, too
        self.index.finish(sequence, order)

    def report_fault(self, doing: str, reason: object) -> None:
        """Count a fault, and log it as "The tier could not <doing>"; an exception's traceback, too, the first time."""
        self._counts.faults += 1
        error = reason if isinstance(reason, BaseException) else None
        self._log.report(doing, f"The tier could not {doing}: {error_text(reason)}", error, error_text(reason))

    def fail(
        self, job_id: int, kind: str, reason: BaseException, keys: object = (), sequence: str | None = None
    ) -> None:
        """Report as failed a "store" or "load" that has no copies under way. A load's keys are forgotten."""
        self._check_engine()
        names = keys if isinstance(keys, Collection) else ()
        if kind == "load":
            self._forget([key for key in names if isinstance(key, bytes)])
        self._fail_job(Job(job_id, kind, sequence, names), reason)

    def close(self) -> None:
        """End the engine and free the memory. Unfinished jobs fail, and `poll` still reports them. Idempotent."""
        if self._closed:
            return
        self._check_engine()
        self._closed = True
        self.engine.close()
        self.peers.close()
        self.drain()
        if not self._broken:
            self.index.leave_table()
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
        """Whether `poll` would report jobs that ended without copies: no event or signal tells about these."""
        return bool(self._finished)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called. Jobs that are submitted from then on fail."""
        return self._closed

    @property
    def stores_in_flight(self) -> tuple[CopyEvent, ...]:
        """The events of the stores whose end was not polled yet, the oldest first."""
        return tuple(job.event for job in self._stores)

    @property
    def loads_in_flight(self) -> tuple[CopyEvent, ...]:
        """The events of the loads whose end was not polled yet, the oldest first."""
        return tuple(job.event for job in self._loads)

    def signal(self, fd: int) -> None:
        """See CopyEngine.signal. Jobs that had nothing to copy are not signalled: see `has_results`."""
        self.engine.signal(fd)
        self.peers.signal(fd)

    def statistics(self) -> Statistics:
        """A snapshot; see Statistics."""
        counts, row_bytes = self._counts, self.primary.row_bytes
        storing, loading = self._rows_in_flight.values()
        return replace(
            counts,
            rows_ready=self.index.usable,
            rows_used=self.index.rows_used,
            rows_pinned=storing + loading + self.index.step_pins,
            blocks=len(self.index),
            peers=self.peers.count,
            peer_blocks=len(self.peers),
            stores_in_flight=len(self._stores),
            loads_in_flight=len(self._loads),
            store_bytes_in_flight=storing * row_bytes,
            load_bytes_in_flight=loading * row_bytes,
            refused=dict(counts.refused),
            evictions=self.index.evictions,
            hits=self._hits,
            misses=self._misses,
        )

    # ----------------------------------------------------------------------------------------------------- job ends

    def _collect(self, queue: deque[Job], end: Callable[[Job], None]) -> None:
        # Jobs are reported in order of submission, so none behind an unfinished one needs to be asked.
        while queue and queue[0].event.is_done:
            job = queue.popleft()
            self._rows_in_flight[job.kind] -= len(job.keys)
            try:
                end(job)
            except Exception as error:  # `end` reports last, so the job is not reported yet
                self._forget(job.keys)
                self._fail_job(job, error)

    def _trace_begin(self, trace: TierTrace, job: Job) -> None:
        try:
            blocks = len(job.keys)
            job.traced = trace.submitted(job.kind, blocks, blocks * self.primary.row_bytes)
        except Exception as error:  # no job may be lost because of tracing
            self._stop_tracing(error)

    def _trace_end(self, trace: TierTrace, job: Job, reason: str | None) -> None:
        try:
            if job.traced is not None:
                trace.ended(job.traced, job.job_id, job.event, self.index.rows_used, reason)
            else:
                trace.ended_without_copies(job.kind, job.blocks, job.job_id, reason)
        except Exception as error:  # nor its end
            self._stop_tracing(error)

    def _stop_tracing(self, reason: object) -> None:
        self._trace = None
        self.report_fault("trace jobs any more", reason)

    def _end_store(self, job: Job) -> None:
        if job.event.failed:
            self.index.drop_filling(job.keys, job.rows)
            self._finish(job, self._why_failed(job))
            return
        self.index.mark_ready(job.rows)
        self._counts.blocks_stored += len(job.rows)
        self._finish(job, None, None, len(job.rows) * self.primary.row_bytes, job.event.seconds)

    def _end_load(self, job: Job) -> None:
        self.index.unpin(job.rows)
        if job.event.failed:
            self._forget(job.keys)
            self._finish(job, self._why_failed(job))
            return
        if job.borrowed:
            self._end_borrowing(job)
        self._counts.blocks_loaded += len(job.keys)
        loaded = tuple(job.keys) if job.missing else None
        size = len(job.keys) * self.primary.row_bytes
        self._finish(job, self._why_incomplete(job), loaded, size, job.event.seconds)

    def _forget(self, keys: Collection[bytes]) -> None:
        """A load of `keys` failed: they are not to be asked for again, here or at a peer."""
        self.index.drop(keys)
        self.peers.drop(keys)

    def _borrow(self, keys: list[bytes], targets: list[int]) -> list[Borrowed]:
        """Queue copies of those blocks that peers hold."""
        borrowed = []
        for part in self.peers.borrow(keys, targets):
            try:
                part.event = self.peers.stream.copy_rows(self.primary, part.targets, part.peer.rows, part.rows)
                borrowed.append(part)
            except Exception as error:
                self.peers.drop(part.keys)
                self.report_fault("copy a peer's blocks", error)
        return borrowed

    def _end_borrowing(self, job: Job) -> None:
        """Take out of a load those of its keys whose peer had changed, or lost, them before their copies ended."""
        for part in job.borrowed:
            lost = part.lost()
            self._counts.blocks_borrowed += len(part.keys) - len(lost)
            if lost:
                self.peers.drop(lost)
                gone = set(lost)
                job.keys = [key for key in job.keys if key not in gone]
                job.missing += len(lost)

    def _why_failed(self, job: Job) -> str:
        if (broken := self._broken_by()) is not None:
            return broken
        if self._closed:
            return "the tier was closed before its copies were made"
        return job.event.reason or "its copies were not made"

    def _why_incomplete(self, job: Job) -> str | None:
        if not job.missing:
            return None
        return f"the tier lacks {job.missing} of its blocks"

    def _refuse(self, job: Job, refusal: _RefusedError) -> None:
        """Report the job as failed. Counts a fault, unless the engine is broken, which was counted when it broke."""
        self._counts.faults += not self._broken
        self._finish(job, str(refusal))

    def _fail_job(self, job: Job, error: BaseException) -> None:
        """Report the job as failed by an unexpected error. None of its copies is under way."""
        self._counts.faults += 1
        self._finish(job, error_text(error), error=error)

    def _finish(
        self,
        job: Job,
        reason: str | None = None,
        loaded_keys: tuple[bytes, ...] | None = None,
        size: int = 0,
        seconds: float = 0.0,
        error: BaseException | None = None,
    ) -> None:
        """Trace, log and report the end of a job. reason: why it failed; None for a success."""
        if self._trace is not None:
            self._trace_end(self._trace, job, reason)
        if reason is not None:
            self._count_failure(job, size // self.primary.row_bytes)
            line = str(job)
            self._log.report(job.kind, f"{line[0].upper()}{line[1:]} failed: {reason}", error, reason)
        queued = max(0, job.event.spans[0][1] - job.submitted_ns) * 1e-9 if seconds else 0.0
        self._finished.append(
            Finished(job.job_id, reason is None, loaded_keys, size, seconds, reason, job.kind, queued)
        )

    def _count_failure(self, job: Job, arrived: int) -> None:
        """arrived: how many of a load's blocks did."""
        if job.kind == "load":
            self._counts.failed_loads += 1
            self._counts.blocks_lost += job.blocks - arrived
        else:
            self._counts.failed_stores += 1
            self._counts.refused["failed"] += len(job.keys) or job.blocks

    # ------------------------------------------------------------------------------------------------------- details

    def _check_engine(self, with_file: bool = True) -> None:
        """First in most calls: empty the tier if the engine broke, log a late copy, use rows that became ready."""
        broken = self._broken_by() if with_file else self.engine.broken
        if not self._broken and broken is not None:
            self._broken = True
            self._empty()
            self.report_fault("go on copying; it is empty and takes nothing more", broken)
        if self.engine.seconds_under_way > LATE_S and not self._is_late:
            self._is_late = True
            logger.error("A copy of the tier has been under way for %d s, and has not ended; its jobs wait", LATE_S)
        if self.index.usable < self.index.capacity:
            self.index.usable = self.arena.ready

    def _look_for(self, key: bytes) -> bool:
        """Whether a peer has `key` by now. For those who have no steps, in which that would be seen."""
        self.peers.look()
        return key in self._elsewhere

    def _empty(self) -> None:
        self._counts.resets += 1
        self._step_hits.clear()
        self.index.clear()
        self.peers.clear()  # theirs are from before, too, or of weights that this engine has no more

    def _not_elsewhere(self, keys: list[bytes], sources: list[int]) -> tuple[list[bytes], list[int]]:
        """Those keys that no peer holds, and their rows of the primary. The others are not stored again."""
        held = {key for key in self.peers.held(keys) if not self.index.state(key)}
        self._counts.blocks_present += sum(key in held for key in keys)
        kept = [at for at, key in enumerate(keys) if key not in held]
        return [keys[at] for at in kept], [sources[at] for at in kept]

    def _broken_by(self) -> str | None:
        """Why nothing can be copied any more; None if it can."""
        pool = self.arena.pool
        if pool is not None and not self._closed and not pool.table.is_intact():
            self.index.lose_table()  # touching memory that the file has not any more would end the process
            return f"{pool.path} was truncated"
        return self.engine.broken

    def _note_hits(self) -> None:
        """Pass this step's hits to the index as uses, in the order of lookup; together, which costs less."""
        hits, self._step_hits = self._step_hits, {}
        for sequence, keys in hits.items():
            order = self.orders.get(sequence)
            if order is not None and len(keys) > 1:  # vLLM looks a sliding window up from its end
                keys = [keys[at] for at in order.permutation(keys)]
            self.index.use(keys, sequence, order)

    def _checked(self, keys: list[bytes], rows: np.ndarray | Sequence[int]) -> list[int]:
        """The row numbers as a list. Raises _RefusedError if they do not fit the keys or the primary."""
        if self._closed:
            raise _RefusedError("the tier is shut down")
        if self._broken:
            raise _RefusedError(f"the tier can copy no more: {self._broken_by()}")
        # vLLM passes numpy arrays. A list is quicker to check and to pass on, up to thousands of rows.
        numbers: list[int] = rows.tolist() if isinstance(rows, np.ndarray) else list(rows)
        if len(numbers) != len(keys):
            raise _RefusedError(f"{len(keys)} keys but {len(numbers)} row numbers")
        # The items of an array have one type, so its first tells: a list, if the array has more dimensions. A loop,
        # because any() would make a generator, which takes longer.
        for number in numbers[:1] if isinstance(rows, np.ndarray) else numbers:
            if type(number) is not int:
                raise _RefusedError("row numbers must be integers")
        if numbers and not (min(numbers) >= 0 and max(numbers) < self.primary.count):
            raise _RefusedError(f"a row number is not from 0 to {self.primary.count - 1}")
        return numbers

    def _count_left_out(self, keys: list[bytes], new: Sequence[bytes], sequence: str | None) -> None:
        """Count those of `keys` that `reserve` did not return: those that are here, and those without a row."""
        taken = set(new)
        left_out = [key for key in keys if key not in taken]
        refused = sum(1 for key in left_out if not self.index.state(key))
        self._counts.blocks_present += len(keys) - len(taken) - refused
        if refused:
            # Blocks that would have been evicted, but for their pins. Pins of the request's own are not in the way.
            pinned = self.index.step_pins + sum(
                len(job.rows)
                for job in (*self._stores, *self._loads)
                if job.sequence is None or job.sequence != sequence
            )
            why = "in_use" if pinned >= refused else "own_request"
            self._counts.refused["not_ready" if self.index.usable < self.index.capacity else why] += refused


def _capacity(primary: Rows, config: TierConfig) -> int:
    """The rows that fit in the configured size, by default twice the primary's. Raises ValueError for none."""
    if config.bytes_to_use is None:
        return 2 * primary.count
    count = config.bytes_to_use // primary.row_bytes
    if count < 1:
        raise ValueError(
            f"bytes_to_use must hold at least one block of {format_size(primary.row_bytes)} "
            f"({primary.row_bytes} bytes), not {config.bytes_to_use} bytes"
        )
    return count


def _open_index(arena: RowMemory, policy: type[EvictionPolicy], config: TierConfig) -> tuple[BlockIndex, int]:
    """The index of the memory's rows, and how many blocks it begins with: those in the tier's own file, if it has one.

    Raises ValueError for a policy that cannot be made.
    """
    try:
        index = BlockIndex(arena.rows.count, policy)
        index.usable = arena.ready
        if (pool := arena.pool) is None:
            return index, 0
        restored, pool.restored = pool.restored, ([], [], [], [])
        index.keep_in(pool.table, *restored)
        return index, len(restored[0])
    except MemoryError:
        raise
    except Exception as error:  # whatever the policy's methods raise
        raise ValueError(
            f"eviction_policy must be one that can be made ({type(error).__name__}: {brief(str(error))}), not "
            f"{brief(config.eviction_policy)}"
        ) from error
