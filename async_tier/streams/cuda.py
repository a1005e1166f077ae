"""CudaEngine: CUDA streams and events, for a process that lives with its GPU.

`_native.CudaEngine` has the streams, the events and the thread that queues on them: native/cuda.c says how. Here live
what it is given (a context, staging memory, bounds), and the end of all that.

Ownership: every field belongs to the thread that calls. Memory that is pinned or on the device is given back when it is
known that no copy touches it any more, and else left for good.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from async_tier.streams import _native
from async_tier.streams.cuda_driver import CudaError, DeviceContext, Driver
from async_tier.streams.row_stream import RowStream
from async_tier.streams.rows import Rows

logger = logging.getLogger(__name__)

# What two legs overlap by, and what a load may find ahead of it per slot: at 50 GB/s 80 us. (An H100 moves 53.4 GB/s in
# pieces of 4 MiB, and 54.8 in one.)
MAX_PIECE_BYTES = 4 << 20
# Pieces under way in a direction, at most: some three calls a stream each, of the thousand that a launch queue takes.
MAX_PIECES = 64
# Slots of staging in a direction, at least. Two keep both legs busy; four even out pieces of different sizes.
MIN_SLOTS = 4
# Device addresses of slots: what cuMemAlloc aligns to, at least.
_SLOT_ALIGNMENT = 256
# Loads under way: at 50 GB/s 1.3 ms. The thread looks after them every 0.1.
MAX_INFLIGHT_LOAD_BYTES = 64 << 20
# How long `close` waits for copies under way, which take milliseconds, and then as long for the driver to unpin memory.
CLOSE_TIMEOUT_S = 10.0
# How long it waits for the driver to free device memory, which waits for the work of everybody on the device.
FREE_TIMEOUT_S = 1.0


class Pinned(Protocol):
    """Host memory that an engine's copies go to and come from."""

    def unpin(self) -> None:
        """No copy is under way any more. Raises RuntimeError, of which CudaError is one, where something stays."""

    def leave(self) -> None:
        """It stays pinned, and mapped as far as that is up to us. Never blocks, and may come after `unpin`."""


class Registered(Protocol):
    """How host memory was pinned.

    step: registrations begin at its multiples from the page of the first row on, and a copy must not span two.
    """

    @property
    def step(self) -> int: ...


class CudaStream(RowStream):
    """One direction of a CudaEngine. handles: its CUDA streams, one a leg, for a profiler to name."""

    def __init__(self, engine: _native.CudaEngine, queue: int, steps: Callable[[Rows], int]) -> None:
        super().__init__(engine, queue, steps)
        self.handles = engine.handles(queue)


class CudaEngine:
    """A store stream and a load stream of CUDA on one device, which go on by themselves.

    Rows are to be made known first (`add_rows`).

    staging_bytes: device memory for staging, half of it a direction; 0 where the arena is on the device.
    max_inflight_store_bytes: stores on the device's streams, at most. A load waits for as much, whatever is queued:
    copy engines serve in order of submission. batch_copies: whether to use the driver's batch call, where it is safe.
    Raises RuntimeError, of which CudaError is one, or OSError where there is no usable device.
    """

    name = "cuda"

    def __init__(
        self, ordinal: int, *, staging_bytes: int, max_inflight_store_bytes: int, batch_copies: bool = True
    ) -> None:
        torch.cuda.init()
        self.driver = Driver()
        self.context = DeviceContext(self.driver, ordinal)
        # Whether it is known that no copy is under way any more; without that, memory must stay where it is.
        self.is_quiet = True
        self._closed = False
        # By address of the rows; None for device memory. To be read by anyone, changed here only.
        self.registrations: dict[int, Registered | None] = {}
        # What `close` gives back.
        self._pinned: list[Pinned] = []
        self._memory: list[int] = []
        try:
            half = min(staging_bytes // 2, MAX_PIECES * MAX_PIECE_BYTES)
            slots = min(MAX_PIECES, max(MIN_SLOTS, -(-half // MAX_PIECE_BYTES))) if half else MAX_PIECES
            piece_bytes = half // slots // _SLOT_ALIGNMENT * _SLOT_ALIGNMENT if half else MAX_PIECE_BYTES
            with self.context:
                staging = self.allocate(2 * slots * piece_bytes) if half else 0
            self._native = _native.CudaEngine(
                self.context.handle,
                batch_copies and self.driver.takes_host_pointers(ordinal),
                piece_bytes,
                (MAX_INFLIGHT_LOAD_BYTES, slots, staging),
                (max_inflight_store_bytes, slots, staging and staging + slots * piece_bytes),
            )
        except BaseException:
            self.give_back(threading.Event(), None)
            raise
        self.has_batch = self._native.has_batch
        self.load_stream = CudaStream(self._native, 0, self.step_of)
        self.store_stream = CudaStream(self._native, 1, self.step_of)

    @property
    def broken(self) -> str | None:
        """See CopyEngine: the driver's error that the context does not survive."""
        return self._native.broken

    @property
    def seconds_under_way(self) -> float:
        """See CopyEngine."""
        return self._native.seconds_under_way

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory, which `close` frees. Raises CudaError. In the context."""
        address = self.driver.allocate(size)
        self._memory.append(address)
        return address

    def own(self, pinned: Pinned) -> None:
        """`close` sees to it, the last given first."""
        self._pinned.append(pinned)

    def add_rows(self, rows: Rows, registration: Registered | None) -> None:
        """Make rows known to the streams. `registration`: None for device memory."""
        self.registrations[rows.address] = registration

    def step_of(self, rows: Rows) -> int:
        """See RowStream: where registrations begin. 0 for device memory. KeyError for rows that were not added."""
        registration = self.registrations[rows.address]
        return 0 if registration is None else registration.step

    def signal(self, fd: int) -> None:
        """See CopyEngine.signal."""
        self._native.signal(fd)

    def close(self) -> None:
        """See CopyEngine.close. Every wait in it is bounded: for copies, for unpinning, for freeing.

        If copies do not end, or the context is lost, memory that they may touch stays as it is: `is_quiet`.
        """
        if self._closed:
            return
        try:
            self.is_quiet = self._native.close(CLOSE_TIMEOUT_S)
            self._closed = True
            if self.context.is_forked:  # all of it is the parent's, whose copies go on
                return
            if self.is_quiet:
                self._give_back_soon()
            else:
                logger.error("The CUDA engine ends with copies that may be under way; its memory is left as it is")
                self._leave()
        except BaseException:  # Ctrl-C
            self._leave()
            raise

    # ------------------------------------------------------------------------------------------------------- details

    def _give_back_soon(self) -> None:
        """`give_back` in a thread, because unpinning has been seen to hang (pytorch/pytorch#132520)."""
        unpinned = threading.Event()
        arguments = (unpinned, self._native.refusal)
        thread = threading.Thread(target=self.give_back, args=arguments, name="async-tier-close", daemon=True)
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

    def give_back(self, unpinned: threading.Event, refusal: str | None) -> None:
        """Give back all that can be, whatever of it is refused, and say so once. Sets `unpinned` in between.

        For whoever knows that copies have ended which `close` could not wait for; otherwise `close` does it."""
        refusals: list[object] = [] if refusal is None else [refusal]

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
        for pinned in self._pinned:
            pinned.leave()
