"""CudaEngine: streams and events of CUDA, for a process that lives with its GPU.

A copy between two places in host memory blocks its caller in CUDA, pinned or not, so no copy here is one:

    pool "host"     primary  --in-->  staging ring (device)  --out-->  arena        and back, on a ring of its own
    pool "cuda:N"   primary  ------------------------------------>  arena (device)  and back

Each arrow is a CUDA stream that nobody else has; the two legs of a piece are joined by an event, so that both
directions of PCIe are busy at once. A job is cut into *pieces*, each queued with a handful of driver calls. What does
not fit into the bytes that may be in flight waits in a software queue, which moves on at every call.

Ownership, before any code:

- Every field belongs to the thread that calls (vLLM: whoever holds the manager's lock). The device is asked by events
  only; no function of ours ever runs on a thread of CUDA's.
- A slot of a staging ring belongs to the piece that was queued into it last, until that piece's last event is done. The
  next piece waits for that event on the device; the host never waits for a slot.
- An event belongs to one piece until it was seen complete; then it goes back to the pool.
- Memory that is being copied belongs to the job until the job is done; a job that failed is done only when nothing of
  it is on a stream any more.

Failures: where a call is refused, only that job fails. Part of it may be queued, perhaps without an event to ask, so
its stream takes nothing more until all that it has was seen to end. Where the context itself is lost (the driver
answers a plain question about a stream with an error that none survives), nothing can be asked any more: the engine is
`broken`, all its jobs have failed, and it calls CUDA no more. Where a question is refused because somebody captures a
graph, it is asked again.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from async_tier.arena import Rows
from async_tier.faults import one_line
from async_tier.streams.base import CopyEvent
from async_tier.streams.cuda_driver import CudaError, DeviceContext, Driver, asks_again
from async_tier.streams.registration import Registration
from async_tier.streams.segments import Segments, segments

logger = logging.getLogger(__name__)

# A piece is what a load may find ahead of it per slot, and what two legs overlap by: at 25 GB/s 0.3 ms.
MAX_PIECE_BYTES = 16 << 20
# Of a staging ring, at least. Two keep both directions busy; four even out pieces of different sizes.
MIN_SLOTS = 4
# Device addresses of slots: what cuMemAlloc aligns to, at least.
_SLOT_ALIGNMENT = 256
# Loads in flight. Bounded as well, because a full launch queue makes a call of 2 us block (vLLM #29013); at 50 GB/s
# this is 10 ms, a scheduler step, of work.
MAX_INFLIGHT_LOAD_BYTES = 512 << 20
# Pieces in flight, at most: each takes some six calls, so that a small staging ring cannot make one submit cost
# thousands of them.
MAX_PIECES = 64
# How long `close` waits for copies in flight, which take milliseconds, and then as long for the driver to unpin memory.
CLOSE_TIMEOUT_S = 10.0
# How long it waits for the driver to free device memory, which waits for the work of everybody on the device.
FREE_TIMEOUT_S = 1.0
_CLOSE_POLL_S = 0.0005
# How far the clocks of host and device may be apart, and how often that is tried for.
_CLOCK_ERROR_NS = 200_000
_CLOCK_TRIES = 5


class EventPool:
    """Events of one device, used again once they were seen complete: creating one costs more than all its uses."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self.created: list[torch.cuda.Event] = []

    def take(self) -> torch.cuda.Event:
        if self._free:
            return self._free.pop()
        event = torch.cuda.Event(enable_timing=True)
        self.created.append(event)
        return event

    def give_back(self, *events: torch.cuda.Event) -> None:
        """`events` were seen complete, and nothing waits for them."""
        self._free.extend(events)

    def destroy(self) -> None:
        """Destroy them now, while the context is sound, and not whenever the garbage collector comes by."""
        self._free.clear()
        self.created.clear()

    def keep_for_ever(self) -> None:
        """Never destroy an event of this pool: in a context that is lost, torch's destructor aborts the process."""
        for event in self.created:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(event))


class StagingRing:
    """Device memory in slots, taken in turn."""

    def __init__(self, address: int, size: int) -> None:
        count = max(MIN_SLOTS, -(-size // MAX_PIECE_BYTES))
        self.slot_bytes = size // count // _SLOT_ALIGNMENT * _SLOT_ALIGNMENT
        self._addresses = [address + slot * self.slot_bytes for slot in range(count)]
        # By slot, the event after which it may be overwritten; None once that was seen complete.
        self._busy: list[torch.cuda.Event | None] = [None] * count
        self._next = 0

    def next_slot(self) -> tuple[int, int, torch.cuda.Event | None]:
        """(slot, its address, the event to wait for before writing to it)."""
        slot = self._next
        self._next = (slot + 1) % len(self._addresses)
        return slot, self._addresses[slot], self._busy[slot]

    def occupy(self, slot: int, until: torch.cuda.Event) -> None:
        self._busy[slot] = until

    def seen(self, slot: int, event: torch.cuda.Event) -> None:
        """The event was seen complete and is about to be used for something else."""
        if self._busy[slot] is event:
            self._busy[slot] = None


class DeviceClock:
    """The host's time (ns of CLOCK_MONOTONIC) of events on a stream.

    An event is placed by its distance from the one before it, which is short: distances are floats of milliseconds.
    """

    def __init__(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        for _ in range(_CLOCK_TRIES):
            before = time.monotonic_ns()
            event.record(stream)
            event.synchronize()
            after = time.monotonic_ns()
            if after - before < _CLOCK_ERROR_NS:  # else this thread was not running in between
                break
        self._last = event
        self._last_ns = (before + after) // 2

    def at(self, event: torch.cuda.Event) -> int:
        """When `event`, which is complete, was."""
        return self._last_ns + int(self._last.elapsed_time(event) * 1e6)

    def go_on_from(self, event: torch.cuda.Event) -> torch.cuda.Event:
        """Place events by this one from now on; the one used before."""
        self._last_ns, before, self._last = self.at(event), self._last, event
        return before


class CudaJob:
    """The event of one `copy_rows`: see CopyEvent."""

    __slots__ = (
        "_stream",
        "bytes",
        "done",
        "failed",
        "legs",
        "pieces_in_flight",
        "pieces_queued",
        "reason",
        "seconds",
        "spans",
        "started",
        "traceback",
    )

    def __init__(self, stream: CudaStream, legs: list[Segments], size: int) -> None:
        self._stream = stream
        self.legs = legs
        self.bytes = size
        self.pieces_queued = 0
        self.pieces_in_flight = 0
        self.started: torch.cuda.Event | None = None
        self.done = False
        self.failed = False
        self.reason: str | None = None
        self.traceback: str | None = None
        self.seconds = 0.0
        # By leg, (first start, last end): see CudaStream.spans.
        self.spans: dict[str, tuple[int, int]] = {}

    @property
    def is_queued(self) -> bool:
        """Whether all pieces have left the software queue."""
        return self.failed or self.pieces_queued == len(self.legs[0].pieces) - 1

    @property
    def is_done(self) -> bool:
        if not self.done:
            self._stream.advance()
        return self.done

    def synchronize(self) -> None:
        while not self.is_done:
            self._stream.wait()


class _Piece:
    """Some bytes of a job on their way."""

    __slots__ = ("bytes", "ended", "events", "job", "joined", "slot")

    def __init__(self, job: CudaJob, size: int) -> None:
        self.job = job
        self.bytes = size
        self.slot = -1
        # All that it took from the pool.
        self.events: list[torch.cuda.Event] = []
        # Recorded between the legs, and at the end; None until then.
        self.joined: torch.cuda.Event | None = None
        self.ended: torch.cuda.Event | None = None

    def take_event(self, pool: EventPool) -> torch.cuda.Event:
        event = pool.take()
        self.events.append(event)
        return event


class CudaStream:
    """One direction of a CudaEngine: a CUDA stream a leg, and the pieces on them.

    ring: the staging between two legs, None for one leg. limit: bytes in flight, at most (but one piece always goes);
    never more than MAX_PIECES pieces.
    """

    def __init__(self, engine: CudaEngine, ring: StagingRing | None, limit: int) -> None:
        self._engine = engine
        self._ring = ring
        self._limit = limit
        self._piece_bytes = MAX_PIECE_BYTES if ring is None else ring.slot_bytes
        self.handles = [engine.create_stream() for _ in range(1 if ring is None else 2)]
        device = torch.device("cuda", engine.context.ordinal)
        legs = [torch.cuda.ExternalStream(handle, device=device) for handle in self.handles]
        # Where a piece begins, and where it ends.
        self._in, self._out = legs[0], legs[-1]
        self._queue: deque[CudaJob] = deque()
        self._pieces: deque[_Piece] = deque()
        # Something of unknown extent was queued: see "Failures" above.
        self._stalled = False
        self._clock: DeviceClock | None = None
        self.bytes_in_flight = 0

    def copy_rows(
        self, destination: Rows, destination_rows: list[int], source: Rows, source_rows: list[int]
    ) -> CudaJob:
        """See CopyStream.copy_rows. Both sides are known to the engine (`add_rows`)."""
        self._engine.check_usable()
        if len(destination_rows) != len(source_rows):
            raise ValueError(f"{len(destination_rows)} destination rows but {len(source_rows)} source rows")
        to = (destination, _row_numbers(destination, destination_rows))
        of = (source, _row_numbers(source, source_rows))
        legs: list[Segments] = []
        if source_rows:
            # The staging between two legs has no rows: each leg merges by its own side.
            for sides in [(to, of)] if self._ring is None else [(of,), (to,)]:
                starts = [self._engine.range_starts(rows) for rows, _ in sides]
                legs.append(segments(sides, self._piece_bytes, starts))
        job = CudaJob(self, legs, len(source_rows) * source.row_bytes)
        if source_rows:
            self._queue.append(job)
            self.advance()
        else:
            job.done = True
        return job

    def keep_times(self) -> None:
        """See CopyStream.keep_times."""
        try:
            with self._engine.context:
                self._clock = DeviceClock(self._out, self._engine.events.take())
        except Exception as error:  # a lost context shows at the next question
            logger.warning("CUDA refused to say what time it is; there are no times of copies: %s", error)

    def spans(self, event: CopyEvent) -> list[tuple[str, int, int]]:
        """See CopyStream.spans. The legs are "in" and "out", or the one is "copy"."""
        assert isinstance(event, CudaJob)
        return [(leg, start, end) for leg, (start, end) in event.spans.items()]

    def advance(self) -> None:
        """Take note of the pieces that have ended, and queue more where there is room. Never blocks."""
        if not (self._pieces or self._queue) or not self._engine.is_usable:
            return
        try:
            with self._engine.context:
                self._collect()
                while self._queue and not self._stalled and self._has_room():
                    self._queue_piece(self._queue[0])
        except CudaError as error:  # what is refused inside is dealt with there; it was the context itself
            self._engine.lose(error)

    def wait(self) -> None:
        """Block, without the GIL, until the oldest piece in flight has ended, or all that a refusal has left."""
        if self._engine.context.is_forked:  # of the parent's copies nothing is ever known here
            self.abandon()
            return
        try:
            with self._engine.context:
                try:
                    ended = self._pieces[0].ended
                    if self._stalled or ended is None:
                        self._in.synchronize()
                        self._out.synchronize()
                    else:
                        ended.synchronize()
                except Exception as error:
                    if not asks_again(error):
                        self._refused("wait for copies", error)
        except CudaError as error:  # as in `advance`
            self._engine.lose(error)

    def is_idle(self) -> bool:
        """Whether nothing is on the CUDA streams. Raises CudaError where the context is lost."""
        return all(self._engine.driver.is_idle(handle) for handle in self.handles)

    def cancel(self) -> None:
        """Drop what is in the software queue. A job is done when its pieces in flight have ended."""
        while self._queue:
            job = self._queue.popleft()
            job.failed = True
            job.done = job.pieces_in_flight == 0

    def abandon(self) -> None:
        """Nothing can be asked any more: all jobs have failed."""
        for job in (*self._queue, *(piece.job for piece in self._pieces)):
            job.failed = job.done = True
        self._queue.clear()
        self._pieces.clear()
        self._clock = None

    # ------------------------------------------------------------------------------------------------------- details

    def _has_room(self) -> bool:
        return not self._pieces or (
            len(self._pieces) < MAX_PIECES and self.bytes_in_flight + self._piece_bytes <= self._limit
        )

    def _collect(self) -> None:
        try:
            if self._stalled:
                if not self.is_idle():
                    return
                self._stalled = False
                ended = len(self._pieces)
            else:
                ended = 0
                for piece in self._pieces:
                    if piece.ended is None or not piece.ended.query():
                        break
                    ended += 1
        except Exception as error:
            if asks_again(error):
                return
            if self._queue and self._queue[0] is self._pieces[0].job:
                self._queue.popleft()  # nothing more of it: it ends when the streams are empty
            # Whether its bytes arrived cannot be known.
            self._refused("ask for the end of a copy", error, self._pieces[0].job)
            return
        for _ in range(ended):
            self._settle(self._pieces.popleft())

    def _queue_piece(self, job: CudaJob) -> None:
        start = job.pieces_queued * self._piece_bytes
        piece = _Piece(job, min(self._piece_bytes, job.bytes - start))
        self._pieces.append(piece)
        self.bytes_in_flight += piece.bytes
        job.pieces_in_flight += 1
        try:
            self._queue_legs(job, piece)
        except Exception as error:
            self._refused("queue a copy", error, job)
        job.pieces_queued += 1
        if job.is_queued and self._queue:  # else the context is lost, and all was given up
            self._queue.popleft()

    def _queue_legs(self, job: CudaJob, piece: _Piece) -> None:
        """The only place where copies are queued. Whatever it raises, part of the piece may be under way."""
        engine = self._engine
        if job.started is None:
            job.started = engine.events.take()
            job.started.record(self._in)
        leg = job.legs[0]
        part = slice(*leg.pieces[job.pieces_queued : job.pieces_queued + 2])
        if self._ring is None:
            engine.driver.copy(leg.addresses[0][part], leg.addresses[1][part], leg.sizes[part], self.handles[0])
        else:
            slot, address, busy = self._ring.next_slot()
            if busy is not None:
                self._in.wait_event(busy)
            staged = leg.offsets[part] + np.uint64(address)
            engine.driver.copy(staged, leg.addresses[0][part], leg.sizes[part], self.handles[0])
            piece.joined = piece.take_event(engine.events)
            piece.joined.record(self._in)
            self._out.wait_event(piece.joined)
            leg = job.legs[1]
            part = slice(*leg.pieces[job.pieces_queued : job.pieces_queued + 2])
            staged = leg.offsets[part] + np.uint64(address)
            engine.driver.copy(leg.addresses[0][part], staged, leg.sizes[part], self.handles[1])
        ended = piece.take_event(engine.events)
        ended.record(self._out)
        piece.ended = ended
        if self._ring is not None:
            piece.slot = slot
            self._ring.occupy(slot, until=ended)

    def _refused(self, doing: str, error: Exception, job: CudaJob | None = None) -> None:
        """A call was refused: find out whether the context is lost, else fail the job and let the streams run empty."""
        self._stalled = True
        if job is not None:
            job.failed = True
            job.reason = f"CUDA refused to {doing}: {one_line(error)}"
            job.traceback = _traceback(error)
        try:
            self.is_idle()
        except CudaError as lost:  # whoever asks for the engine's health says so
            self._engine.lose(lost)
        else:
            if job is None:
                logger.error("CUDA refused to %s: %s", doing, error)

    def _settle(self, piece: _Piece) -> None:
        """The piece was seen to end."""
        job = piece.job
        self.bytes_in_flight -= piece.bytes
        job.pieces_in_flight -= 1
        if piece.slot >= 0 and self._ring is not None and piece.ended is not None:
            self._ring.seen(piece.slot, piece.ended)
        events = piece.events
        if self._clock is not None and piece.ended is not None:
            events.remove(piece.ended)
            events.append(self._note_times(self._clock, piece))
        if job.is_queued and not job.pieces_in_flight:
            if job.started is not None:
                if piece.ended is not None and not job.failed:
                    job.seconds = _seconds(job.started, piece.ended)
                events.append(job.started)
            job.done = True
        self._engine.events.give_back(*events)

    def _note_times(self, clock: DeviceClock, piece: _Piece) -> torch.cuda.Event:
        """Note when the legs of a piece were under way. Returns an event that is free now, in place of its last."""
        job, joined, ended = piece.job, piece.joined, piece.ended
        assert job.started is not None
        assert ended is not None
        try:
            start, end = clock.at(job.started), clock.at(ended)
            if joined is None:
                job.spans["copy"] = start, end
            else:
                between = clock.at(joined)
                job.spans["in"] = start, between
                job.spans["out"] = job.spans["out"][0] if "out" in job.spans else between, end
            return clock.go_on_from(ended)
        except Exception as error:
            logger.warning("CUDA refused to say when a copy was made; there are no more times: %s", error)
            self._clock = None
            return ended


class Pinned(Protocol):
    """Host memory that an engine's copies go to and come from."""

    def unpin(self) -> None:
        """No copy is under way any more. Raises RuntimeError, of which CudaError is one, where something stays."""

    def leave(self) -> None:
        """It stays pinned, and mapped as far as that is up to us. Never blocks, and may come after `unpin`."""


class CudaEngine:
    """A store stream and a load stream of CUDA on one device.

    staging_bytes: device memory for staging, half of it a direction; 0 where the arena is on the device.
    max_inflight_store_bytes: stores on the device's streams, at most. A load waits for as much, whatever is queued:
    copy engines serve in order of submission. batch_copies: whether to use the driver's batch call, where it is safe.
    Raises CudaError or OSError where there is no usable device.
    """

    name = "cuda"

    def __init__(
        self, ordinal: int, *, staging_bytes: int, max_inflight_store_bytes: int, batch_copies: bool = True
    ) -> None:
        torch.cuda.init()
        self.driver = Driver()
        if not batch_copies or not self.driver.takes_host_pointers(ordinal):
            self.driver.forget_batch()
        self.context = DeviceContext(self.driver, ordinal)
        self.events = EventPool()
        self.broken: str | None = None
        self.traceback: str | None = None  # of the error that broke it
        # Whether it is known that no copy is under way any more; without that, memory must stay where it is.
        self.is_quiet = True
        self._closed = False
        self._registrations: dict[int, Registration | None] = {}
        # What `close` gives back.
        self._pinned: list[Pinned] = []
        self._streams: list[int] = []
        self._memory: list[int] = []
        try:
            with self.context:
                rings: list[StagingRing | None] = [None, None]
                if staging_bytes:
                    half = staging_bytes // 2 // _SLOT_ALIGNMENT * _SLOT_ALIGNMENT
                    staging = self.allocate(2 * half)
                    rings = [StagingRing(staging, half), StagingRing(staging + half, half)]
                self.load_stream = CudaStream(self, rings[0], MAX_INFLIGHT_LOAD_BYTES)
                self.store_stream = CudaStream(self, rings[1], max_inflight_store_bytes)
        except BaseException:
            self._give_back(threading.Event())
            raise

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory, which `close` frees. Raises CudaError. In the context."""
        address = self.driver.allocate(size)
        self._memory.append(address)
        return address

    def create_stream(self) -> int:
        """The handle of a new stream, which `close` destroys. Raises CudaError. In the context."""
        handle = self.driver.create_stream()
        self._streams.append(handle)
        return handle

    def own(self, pinned: Pinned) -> None:
        """`close` sees to it, the last given first."""
        self._pinned.append(pinned)

    @property
    def is_usable(self) -> bool:
        return self.broken is None and not self._closed and not self.context.is_forked

    def check_usable(self) -> None:
        """Raise RuntimeError, in words, where CUDA must not be called."""
        if self.context.is_forked:
            raise RuntimeError("a forked child cannot use its parent's CUDA streams")
        if self.broken is not None:
            raise RuntimeError(f"the CUDA context is lost: {self.broken}")
        if self._closed:
            raise RuntimeError("the CUDA engine is closed")

    def add_rows(self, rows: Rows, registration: Registration | None) -> None:
        """Make rows known to the streams. `registration`: None for device memory."""
        self._registrations[rows.address] = registration

    def range_starts(self, rows: Rows) -> np.ndarray | None:
        registration = self._registrations[rows.address]
        return None if registration is None else registration.cuts

    def advance(self) -> None:
        """See CopyEngine.advance."""
        self.load_stream.advance()
        self.store_stream.advance()

    def signal(self, fd: int) -> bool:
        """See CopyEngine.signal. A host function on the stream could write to it, and would hold up what is behind."""
        return False

    def lose(self, error: Exception) -> None:
        """The context is lost, and with it every job."""
        if self.broken is None:
            self.broken, self.traceback = one_line(error), _traceback(error)
            self.is_quiet = False
            self.events.keep_for_ever()
            for stream in (self.load_stream, self.store_stream):
                stream.abandon()

    def close(self) -> None:
        """See CopyEngine.close. Every wait in it is bounded: for copies, for unpinning, for freeing.

        If copies do not end, or the context is lost, memory that they may touch stays as it is: `is_quiet`.
        """
        if self._closed:
            return
        streams = (self.load_stream, self.store_stream)
        if self.context.is_forked:  # the parent's copies go on; in this process there are none
            self._closed = True
            self.events.keep_for_ever()
            for stream in streams:
                stream.abandon()
            return
        try:
            for stream in streams:
                stream.cancel()
            if self.broken is None:
                self.is_quiet = self._wait_until_idle()
            self._closed = True
            for stream in streams:
                stream.abandon()
            if self.is_quiet:
                self.events.destroy()
                self._give_back_soon()
            else:
                logger.error("The CUDA engine ends with copies that may be under way; its memory is left as it is")
                self._leave()
        except BaseException:  # Ctrl-C
            self._leave()
            raise

    # ------------------------------------------------------------------------------------------------------- details

    def _wait_until_idle(self) -> bool:
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        streams = (self.load_stream, self.store_stream)
        while True:
            self.advance()
            if self.broken is not None:
                return False
            try:
                with self.context:
                    if all(stream.is_idle() for stream in streams):
                        self.advance()
                        return True
            except CudaError as error:
                self.lose(error)
                return False
            if time.monotonic() > deadline:
                return False
            time.sleep(_CLOSE_POLL_S)

    def _give_back_soon(self) -> None:
        """`_give_back` in a thread, because unpinning has been seen to hang (pytorch/pytorch#132520)."""
        unpinned = threading.Event()
        thread = threading.Thread(target=self._give_back, args=(unpinned,), name="async-tier-close", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # from Python 3.12 on, when the process is ending, which gives everything back
            logger.warning("The CUDA engine's memory is left as it is until the process ends: %s", error)
            self._leave()
            return
        if unpinned.wait(CLOSE_TIMEOUT_S):
            thread.join(FREE_TIMEOUT_S)
        else:
            logger.error("CUDA has not unpinned the CUDA engine's memory in time, which is left as it is")
            self._leave()

    def _give_back(self, unpinned: threading.Event) -> None:
        """Give back all that can be, whatever of it is refused, and say so once. Sets `unpinned` in between."""
        refusals: list[Exception] = []

        def attempt(action: Callable[..., None], *arguments: int) -> bool:
            try:
                action(*arguments)
            except RuntimeError as error:
                refusals.append(error)
                return False
            return True

        try:
            with self.context:
                for pinned in reversed(self._pinned):
                    if not attempt(pinned.unpin):
                        pinned.leave()
                unpinned.set()
                for handle in self._streams:
                    attempt(self.driver.destroy_stream, handle)
                for address in self._memory:
                    attempt(self.driver.free, address)
        except CudaError as error:  # the context cannot even be entered
            refusals.append(error)
            self._leave()
            unpinned.set()
        self.context.release()
        if refusals:
            logger.error("CUDA refused to take back what the engine had, in %d calls: %s", len(refusals), refusals[0])

    def _leave(self) -> None:
        self.events.keep_for_ever()
        for pinned in self._pinned:
            pinned.leave()


def _row_numbers(rows: Rows, numbers: list[int]) -> np.ndarray:
    """`numbers` as an array, checked to be rows."""
    array = np.array(numbers, dtype=np.int64 if not numbers else None)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError("row numbers must be integers")
    if len(array) and not (array.min() >= 0 and array.max() < rows.count):
        raise ValueError(f"a row number is not from 0 to {rows.count - 1}")
    return array.astype(np.int64, copy=False)


def _traceback(error: Exception) -> str:
    """As text: an error that was kept would keep events, whose end must not be left to the garbage collector."""
    return "".join(traceback.format_exception(error, chain=False)).rstrip()


def _seconds(started: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    try:
        return float(started.elapsed_time(ended)) / 1000
    except Exception as error:
        # The bytes are there all the same; a lost context shows at the next question.
        logger.warning("CUDA refused to say how long a copy took: %s", error)
        return 0.0
