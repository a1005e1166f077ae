"""Registration: rows of host memory, pinned for CUDA range by range."""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from async_tier.streams import _native
from async_tier.streams.cuda_driver import ALREADY_REGISTERED, CudaError, DeviceContext, Driver
from async_tier.streams.rows import Rows

logger = logging.getLogger(__name__)

# Bytes pinned by one call. Meanwhile CUDA calls of other threads and processes wait: on an H100 for 0.7 ms, with
# 256 MiB for 9 ms. (A call for 512 GiB was seen to fail, vLLM #51080.)
PIN_RANGE_BYTES = 16 << 20
# A range that is refused is halved and tried again, down to this size.
MIN_RANGE_BYTES = 1 << 20
# How long a tier waits while another one pins or unpins, which was seen to hang (pytorch/pytorch#132520).
LOCK_TIMEOUT_S = 60.0

Range = tuple[int, int]  # address of the first byte, address after the last one
Mapping = tuple[str, str, int]  # device, inode, offset

# The ranges that this process has pinned, each with the number of its users: two tiers may share a primary.
_users: dict[Range, int] = {}
# By range, the memory that was mapped there when it was pinned.
_mappings: dict[Range, Mapping] = {}
# Ranges that were never unpinned. The driver holds pages, not addresses: if other memory is mapped there by now, it
# still reports "already registered", and copies go to the old pages.
_abandoned: set[Range] = set()
# Held during the driver's calls, too: nobody may rely on a range that another thread is about to unpin.
_lock = threading.Lock()


class Registration:
    """Pins `rows` in ranges of at most `largest` bytes. All ranges but the first start on a page.

    `register_next` pins the next range; `unpin` unpins those that no other registration uses. Memory that other code of
    this process has registered is used as it is, and never unpinned here. For memory that was just mapped (`is_new`)
    that is an error: it can only be a leftover.

    range_alignment: ranges begin at the first row, and at multiples of this many bytes from the first row's page. No
    copy may cross these multiples. If a range is refused, it is halved before its rows become ready; earlier ranges
    may then hold several multiples. range_starts: the first addresses of all ranges, as planned now. range_seconds: how
    long the driver took to pin the last range. A pause as long before the next one leaves others half of the time.
    """

    def __init__(
        self,
        driver: Driver,
        context: DeviceContext,
        rows: Rows,
        largest: int = PIN_RANGE_BYTES,
        *,
        is_new: bool = False,
    ) -> None:
        self._is_new = is_new
        self._driver = driver
        self._context = context
        self._rows = rows
        self._mapping = _mapping(rows.address)
        self._end = rows.address + (rows.count - 1) * rows.stride + rows.row_bytes
        self._done = 0
        self._used: list[Range] = []
        self.range_starts: list[int] = []
        self.range_seconds = 0.0
        self._plan(rows.address, largest)

    @property
    def is_complete(self) -> bool:
        return self._done == len(self.range_starts)

    @property
    def next_range(self) -> Range:
        """The range that `register_next` will pin; only while not `is_complete`."""
        start, *later = self.range_starts[self._done : self._done + 2]
        return start, later[0] if later else self._end

    @property
    def rows_ready(self) -> int:
        """How many rows, counted from the first, are pinned. May be read by any thread."""
        done = self._done  # read once: another thread increases it
        if done == len(self.range_starts):
            return self._rows.count
        rows = self._rows
        return (self.range_starts[done] - rows.address + rows.stride - rows.row_bytes) // rows.stride

    def register_all(self) -> None:
        """Pin all ranges, or none if one is refused. Raises as `register_next` does."""
        try:
            while not self.is_complete:
                time.sleep(self.range_seconds)
                self.register_next()
        except BaseException:
            self.unpin_or_abandon()
            raise

    def register_next(self) -> None:
        """Pin the next range. If the driver refuses, halve it and those after it, down to 1 MiB.

        Raises CudaError if the driver still refuses. Raises RuntimeError if the range is already registered only
        because an earlier tier never unpinned it, and if another tier takes too long to pin or unpin.
        """
        start, end = self.next_range
        page = start - start % mmap.PAGESIZE
        _native.populate(page, end - page)  # otherwise the driver does, and holds its locks eight times as long
        while True:
            try:
                self._pin(start, end)
                break
            except CudaError:
                if end - start <= MIN_RANGE_BYTES:
                    raise
                alignment = self.range_alignment
                while alignment >= end - start:
                    alignment //= 2
                self._plan(start, max(MIN_RANGE_BYTES, alignment))
                start, end = self.next_range
        self._done += 1

    def _plan(self, start: int, alignment: int) -> None:
        """Plan the ranges from `start` on, where the next one begins."""
        self.range_alignment = alignment
        origin = self._rows.address - self._rows.address % mmap.PAGESIZE
        later = range(start + alignment - (start - origin) % alignment, self._end, alignment)
        self.range_starts = [*self.range_starts[: self._done], start, *later]

    def _pin(self, start: int, end: int) -> None:
        with self._context, locked():
            began = time.monotonic()
            try:
                self._driver.register(start, end - start)
            except CudaError as error:
                # The code means part or all of the range. If only part is pinned, copies to the rest would block.
                if error.code != ALREADY_REGISTERED or not all(map(self._driver.is_pinned, (start, end - 1))):
                    raise
                if self._is_new or _overlapping(_abandoned, start, end):
                    raise RuntimeError("a tier that ended badly has left memory pinned at these addresses") from error
                used = [(start, end)] if (start, end) in _users else _overlapping(_users, start, end)
                if any(_mappings[each] != self._mapping_at(each[0]) for each in used):
                    raise RuntimeError(
                        "a tier that was not shut down has pinned other memory that was at these addresses"
                    ) from error
                if len(used) > 1:  # no copy may cross from one to the next, so our ranges must be as small
                    raise
            else:
                _abandoned.difference_update(_overlapping(_abandoned, start, end))
                used = [(start, end)]
                _mappings[start, end] = self._mapping_at(start)
            self.range_seconds = time.monotonic() - began
            for each in used:
                _users[each] = _users.get(each, 0) + 1
            self._used.extend(used)

    def _mapping_at(self, address: int) -> Mapping:
        """The memory at an address of these rows, all of which are in one mapping."""
        device, inode, offset = self._mapping
        return device, inode, offset + address - self._rows.address if inode != "0" else 0

    def unpin(self) -> None:
        """Unpin the ranges that no other registration uses. No copy may be under way. Idempotent.

        Raises RuntimeError (CudaError is one) if some ranges could not be unpinned; all others are.
        """
        refusal: RuntimeError | None = None
        kept = []
        with self._context:
            for each in self._used:
                try:
                    with locked():
                        self._unpin_range(each)
                except RuntimeError as error:
                    refusal = refusal or error
                    kept.append(each)
        self._used = kept
        if refusal is not None:
            raise refusal

    def _unpin_range(self, each: Range) -> None:
        if _users[each] > 1:
            _users[each] -= 1
            return
        self._driver.unregister(each[0])
        del _users[each], _mappings[each]
        _abandoned.discard(each)  # if it was abandoned while this call took too long

    def unpin_or_abandon(self) -> bool:
        """Unpin, and abandon the ranges that cannot be unpinned. Whether all were unpinned."""
        try:
            self.unpin()
        except RuntimeError as error:
            logger.error("CUDA refused to unpin memory, which is left as it is: %s", error)
            self.abandon_memory()
        return not self._used

    def abandon_memory(self) -> None:
        """Leave the memory pinned for good: copies may be under way, or the driver refused to unpin it."""
        _abandoned.update(self._used)  # without the lock, which a hanging call may hold


def in_use() -> set[Range]:
    """The ranges that registrations of this process have pinned and not unpinned. The set is a copy."""
    return {*_users, *_mappings}


def abandoned() -> set[Range]:
    """The ranges that were abandoned, because copies may be under way or CUDA refused to unpin them. A copy."""
    return set(_abandoned)


@contextmanager
def locked() -> Iterator[None]:
    """Keep others in this process from pinning and unpinning. Raises RuntimeError after LOCK_TIMEOUT_S."""
    if not _lock.acquire(timeout=LOCK_TIMEOUT_S):
        raise RuntimeError("another tier of this process takes too long to pin or unpin its memory")
    try:
        yield
    finally:
        _lock.release()


def _mapping(address: int) -> Mapping:
    """The memory at an address: the file or shared memory that is mapped there, and the offset in it.

    A primary is shared memory, which has an inode of its own. Private memory of the process always looks the same.
    """
    with open("/proc/self/maps") as lines:
        for line in lines:
            first, last = (int(number, 16) for number in line.split(maxsplit=1)[0].split("-"))
            if first <= address < last:
                _, _, offset, device, inode = line.split(maxsplit=5)[:5]
                return device, inode, int(offset, 16) + address - first
    return "", "0", 0


def _overlapping(ranges: Iterable[Range], start: int, end: int) -> list[Range]:
    # From a copy, which is made at once, because `abandon_memory` may add to the ranges meanwhile.
    return [each for each in tuple(ranges) if each[0] < end and start < each[1]]
