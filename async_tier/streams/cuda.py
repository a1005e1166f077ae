"""CudaEngine: CUDA streams and events, for a process that also has the GPU worker.

`_native.CudaEngine` has the streams, the events and the thread that queues on them; see native/cuda.c. This file gives
it a context, staging memory and limits, and frees them at the end.

Ownership: every field belongs to the calling thread. Pinned memory and device memory are released once it is known
that no copy touches them any more; otherwise they are left as they are for good.
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

# Bytes of a piece, at most. Two legs overlap piece by piece, and a load may wait for the pieces ahead of it: at 50 GB/s
# 80 us each. (An H100 moves 53.4 GB/s in pieces of 4 MiB, and 54.8 in a single one.)
MAX_PIECE_BYTES = 4 << 20
# Pieces under way per direction, at most. Each takes some three calls per stream; a launch queue takes some thousand.
MAX_PIECES = 64
# Staging slots per direction, at least. Two keep both legs busy; four even out pieces of different sizes.
MIN_SLOTS = 4
# In bytes, for the device addresses of slots: cuMemAlloc aligns to at least that.
_SLOT_ALIGNMENT = 256
# Bytes of loads under way, at most: 1.3 ms at 50 GB/s. The thread polls them every 0.1 ms.
MAX_INFLIGHT_LOAD_BYTES = 64 << 20
# How long `close` waits for copies under way, which take milliseconds, and then again for the driver to unpin memory.
CLOSE_TIMEOUT_S = 10.0
# How long it waits for the driver to free device memory, which waits for all work on the device.
FREE_TIMEOUT_S = 1.0


class Pinned(Protocol):
    """Pinned host memory that an engine's copies read and write."""

    def unpin(self) -> None:
        """Unpin it; no copy is under way any more. Raises RuntimeError (CudaError is one) if some stays pinned."""

    def abandon_memory(self) -> None:
        """Leave it pinned, and mapped if the memory is ours. Never blocks, and may be called after `unpin`."""


class Registered(Protocol):
    """How host memory was pinned.

    range_alignment: ranges begin at multiples of these bytes from the first row's page; no copy may cross them.
    """

    @property
    def range_alignment(self) -> int: ...


class CudaStream(RowStream):
    """One direction of a CudaEngine. handles: its CUDA streams, one per leg, to name them for a profiler."""

    def __init__(self, engine: _native.CudaEngine, queue: int, alignment_of: Callable[[Rows], int]) -> None:
        super().__init__(engine, queue, alignment_of)
        self.handles = engine.handles(queue)


class CudaEngine:
    """A store stream and a load stream of CUDA on one device. A native thread keeps them busy.

    Call `add_rows` for all rows before they are copied.

    ordinal: the device's number. staging_bytes: device memory for staging, half per direction; 0 if the arena is on the
    device. max_inflight_store_bytes: bytes of stores on the device's streams, at most. A load waits for at most that
    many, because copy engines serve in order of submission. batch_copies: use the driver's batch call if it is safe.
    Raises RuntimeError (CudaError is one) or OSError if there is no usable device.
    """

    name = "cuda"

    def __init__(
        self, ordinal: int, *, staging_bytes: int, max_inflight_store_bytes: int, batch_copies: bool = True
    ) -> None:
        torch.cuda.init()
        self.driver = Driver()
        self.context = DeviceContext(self.driver, ordinal)
        # After `close`: whether all copies are known to have ended. If not, memory must stay as it is.
        self.is_quiet = True
        self._closed = False
        # By address of the rows; None for device memory. To be read by anyone, changed here only.
        self.registrations: dict[int, Registered | None] = {}
        # What `close` unpins and frees.
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
            self.free_all(threading.Event(), None)
            raise
        self.has_batch = self._native.has_batch
        self.load_stream = CudaStream(self._native, 0, self.range_alignment_of)
        self.store_stream = CudaStream(self._native, 1, self.range_alignment_of)

    @property
    def broken(self) -> str | None:
        """See CopyEngine: the driver's error that the context does not survive."""
        return self._native.broken

    @property
    def seconds_under_way(self) -> float:
        """See CopyEngine."""
        return self._native.seconds_under_way

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory, which `close` frees. Needs the context. Raises CudaError."""
        address = self.driver.allocate(size)
        self._memory.append(address)
        return address

    def add_pinned(self, pinned: Pinned) -> None:
        """Have `close` unpin it, the last added first."""
        self._pinned.append(pinned)

    def add_rows(self, rows: Rows, registration: Registered | None) -> None:
        """Make rows known to the streams. registration: how they were pinned; None for device memory."""
        self.registrations[rows.address] = registration

    def range_alignment_of(self, rows: Rows) -> int:
        """See Registered.range_alignment; 0 for device memory. Raises KeyError for rows that were not added."""
        registration = self.registrations[rows.address]
        return 0 if registration is None else registration.range_alignment

    def signal(self, fd: int) -> None:
        """See CopyEngine.signal."""
        self._native.signal(fd)

    def close(self) -> None:
        """See CopyEngine.close. Every wait is bounded: for copies, for unpinning, for freeing.

        If copies do not end, or the context is lost, `is_quiet` is False, and memory that they may touch stays.
        """
        if self._closed:
            return
        try:
            self.is_quiet = self._native.close(CLOSE_TIMEOUT_S)
            self._closed = True
            if self.context.is_forked:  # all of it is the parent's, whose copies go on
                return
            if self.is_quiet:
                self._free_all_in_thread()
            else:
                logger.error("The CUDA engine ends with copies that may be under way; its memory is left as it is")
                self._abandon_memory()
        except BaseException:  # Ctrl-C
            self._abandon_memory()
            raise

    # ------------------------------------------------------------------------------------------------------- details

    def _free_all_in_thread(self) -> None:
        """`free_all` in a thread, because unpinning was seen to hang (pytorch/pytorch#132520)."""
        unpinned = threading.Event()
        arguments = (unpinned, self._native.refusal)
        thread = threading.Thread(target=self.free_all, args=arguments, name="async-tier-close", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # from Python 3.12 on, if the process is ending, which frees everything
            logger.warning("The CUDA engine's memory is left as it is until the process ends: %s", error)
            self._abandon_memory()
            return
        if unpinned.wait(CLOSE_TIMEOUT_S):
            thread.join(FREE_TIMEOUT_S)
        else:
            logger.error("CUDA has not unpinned the CUDA engine's memory in time, which is left as it is")
            self._abandon_memory()

    def free_all(self, unpinned: threading.Event, refusal: str | None) -> None:
        """Unpin, set `unpinned`, then free. Goes on after a refusal, and logs the first. refusal: an earlier one.

        `close` calls it. Others may call it only once copies have ended for which `close` could not wait.
        """
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
                        pinned.abandon_memory()
                unpinned.set()
                for address in self._memory:
                    attempt(self.driver.free, address)
        except CudaError as error:  # even entering the context was refused
            refusals.append(error)
            self._abandon_memory()
            unpinned.set()
        self.context.release()
        if refusals:
            logger.error("CUDA refused to take back what the engine had, in %d calls: %s", len(refusals), refusals[0])

    def _abandon_memory(self) -> None:
        for pinned in self._pinned:
            pinned.abandon_memory()
