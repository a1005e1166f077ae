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

# What is pinned at a time, under locks that calls of other threads and processes into CUDA wait for: on an H100 0.7 ms,
# where 256 MiB are 9. (And 512 GiB at once were seen to fail, vLLM #51080.)
PIN_RANGE_BYTES = 16 << 20
# A range that is refused is halved and tried again, but not below this.
MIN_RANGE_BYTES = 1 << 20
# How long one tier waits for another that pins or unpins, which has been seen to hang (pytorch/pytorch#132520).
LOCK_TIMEOUT_S = 60.0

Range = tuple[int, int]  # address of the first byte, address after the last one
Mapping = tuple[str, str, int]  # device, inode, offset

# What registrations of this process have pinned, with the number of them that use it: two tiers may be on one primary.
_users: dict[Range, int] = {}
# What was mapped there then.
_mappings: dict[Range, Mapping] = {}
# What was not given back. The driver knows pages, not addresses: if others are mapped there by now, it says "already
# registered", and copies go to the old ones.
_left: set[Range] = set()
# Held over the driver's calls as well: a range that somebody is about to unpin must not look pinned to anybody else.
_lock = threading.Lock()


class Registration:
    """The pinning of `rows`, in ranges of at most `largest` bytes; all but the first start on pages.

    `register_next` pins one range after the other; `unpin` unpins those that nobody else here uses. What somebody else
    in the process has registered already is as good, and not ours to unpin; but not where the memory `is_new`, which
    nobody can have registered since it was mapped.

    step: ranges begin at its multiples from the page of the first row on, and at the first row; a copy must not go on
    there. It is halved before the rows are ready that were refused with a larger one, and has more multiples than
    there are ranges then. range_starts: the addresses of all ranges, as they are planned now. seconds: what the driver
    took to pin the last range; as long a pause before the next one leaves others half of the time.
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
        self.seconds = 0.0
        self._plan(rows.address, largest)

    @property
    def is_complete(self) -> bool:
        return self._done == len(self.range_starts)

    @property
    def next_range(self) -> Range:
        """What `register_next` will pin. Not when all is."""
        start, *later = self.range_starts[self._done : self._done + 2]
        return start, later[0] if later else self._end

    @property
    def rows_ready(self) -> int:
        """Rows from the first on that are pinned. For any thread."""
        done = self._done  # once: another thread counts it up
        if done == len(self.range_starts):
            return self._rows.count
        rows = self._rows
        return (self.range_starts[done] - rows.address + rows.stride - rows.row_bytes) // rows.stride

    def register_all(self) -> None:
        """Pin all ranges, or none: raises as `register_next` does."""
        try:
            while not self.is_complete:
                time.sleep(self.seconds)
                self.register_next()
        except BaseException:
            self.give_up()
            raise

    def register_next(self) -> None:
        """Pin the next range. If the driver refuses, it is halved, and so are those after it, down to 1 MiB.

        Raises CudaError if the driver still refuses, RuntimeError where it goes by what was pinned and never given
        back, or where another tier does not get done with pinning.
        """
        start, end = self.next_range
        page = start - start % mmap.PAGESIZE
        _native.populate(page, end - page)  # or pinning does, and takes eight times as long under its locks
        while True:
            try:
                self._pin(start, end)
                break
            except CudaError:
                if end - start <= MIN_RANGE_BYTES:
                    raise
                step = self.step
                while step >= end - start:
                    step //= 2
                self._plan(start, max(MIN_RANGE_BYTES, step))
                start, end = self.next_range
        self._done += 1

    def _plan(self, start: int, step: int) -> None:
        """The ranges from `start` on, the next one to be pinned."""
        self.step = step
        origin = self._rows.address - self._rows.address % mmap.PAGESIZE
        later = range(start + step - (start - origin) % step, self._end, step)
        self.range_starts = [*self.range_starts[: self._done], start, *later]

    def _pin(self, start: int, end: int) -> None:
        with self._context, locked():
            began = time.monotonic()
            try:
                self._driver.register(start, end - start)
            except CudaError as error:
                # The code says "part or all": copies to the rest would block, as all copies to pageable memory do.
                if error.code != ALREADY_REGISTERED or not all(map(self._driver.is_pinned, (start, end - 1))):
                    raise
                if self._is_new or _overlapping(_left, start, end):
                    raise RuntimeError("a tier that ended badly has left memory pinned at these addresses") from error
                used = [(start, end)] if (start, end) in _users else _overlapping(_users, start, end)
                if any(_mappings[each] != self._mapping_at(each[0]) for each in used):
                    raise RuntimeError(
                        "a tier that was not shut down has pinned other memory that was at these addresses"
                    ) from error
                if len(used) > 1:  # copies must not go from one to the next: ours are to be as small
                    raise
            else:
                _left.difference_update(_overlapping(_left, start, end))
                used = [(start, end)]
                _mappings[start, end] = self._mapping_at(start)
            self.seconds = time.monotonic() - began
            for each in used:
                _users[each] = _users.get(each, 0) + 1
            self._used.extend(used)

    def _mapping_at(self, address: int) -> Mapping:
        """Which memory is at an address of these rows, which are in one mapping."""
        device, inode, offset = self._mapping
        return device, inode, offset + address - self._rows.address if inode != "0" else 0

    def unpin(self) -> None:
        """Unpin what only this one uses. No copy may be under way. Idempotent.

        Raises RuntimeError, of which CudaError is one, if some of it stays: all the rest is unpinned.
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
        _left.discard(each)  # of an end that was given up, and came late

    def give_up(self) -> bool:
        """Whether all is unpinned; what is not is left."""
        try:
            self.unpin()
        except RuntimeError as error:
            logger.error("CUDA refused to unpin memory, which is left as it is: %s", error)
            self.leave()
        return not self._used

    def leave(self) -> None:
        """It stays pinned for good, because copies may be under way, or the driver has refused to unpin it."""
        _left.update(self._used)  # without the lock, which a call that hangs may hold


def in_use() -> set[Range]:
    """What registrations of this process have pinned and not unpinned: a copy."""
    return {*_users, *_mappings}


def left() -> set[Range]:
    """What of that was left as it is, because copies may be under way: a copy."""
    return set(_left)


@contextmanager
def locked() -> Iterator[None]:
    """While nobody else in this process pins or unpins. RuntimeError after LOCK_TIMEOUT_S."""
    if not _lock.acquire(timeout=LOCK_TIMEOUT_S):
        raise RuntimeError("another tier of this process does not get done with pinning or unpinning its memory")
    try:
        yield
    finally:
        _lock.release()


def _mapping(address: int) -> Mapping:
    """Which memory is at an address: the file or shared memory behind it, and the place in that.

    A primary is shared memory, of which each has a number of its own. The process's own memory all looks alike.
    """
    with open("/proc/self/maps") as lines:
        for line in lines:
            first, last = (int(number, 16) for number in line.split(maxsplit=1)[0].split("-"))
            if first <= address < last:
                _, _, offset, device, inode = line.split(maxsplit=5)[:5]
                return device, inode, int(offset, 16) + address - first
    return "", "0", 0


def _overlapping(ranges: Iterable[Range], start: int, end: int) -> list[Range]:
    # A copy, made in one step: `leave` may add to the ranges meanwhile.
    return [each for each in tuple(ranges) if each[0] < end and start < each[1]]
