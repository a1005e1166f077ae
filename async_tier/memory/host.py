"""Arena: the tier's own rows in host memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

from async_tier.memory.claims import claim, claim_lock, refuse_if_unavailable
from async_tier.streams.rows import Rows
from async_tier.text import format_size

_HUGE_PAGE = 2 << 20
# Raw calls and not Python's mmap, because the copy of a mmap object in a forked child would unmap the memory, too.
_MAP_FAILED = ctypes.c_void_p(-1).value
# Of Linux's mman.h; Python does not name them.
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_memory(size: int, fd: int = -1, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    """Map new memory of the process, or a file that is shared. Returns the address; raises OSError.

    A file's first byte is at the boundary of a huge page, so that it can be mapped by huge pages. The memory will hold
    users' conversations, so it is kept out of core dumps and forked children.
    """
    if fd < 0:
        address = _map(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    else:
        page = max(_HUGE_PAGE, os.fstatvfs(fd).f_frsize)
        start = _map(None, size + page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        address = -(-start // page) * page
        end = start + size + page
        try:
            _map(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
        except OSError:
            _libc.munmap(start, end - start)
            raise
        after = address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        for first, last in ((start, address), (after, end)):
            if first < last:
                _libc.munmap(first, last - first)
    for advice in (mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE):
        _libc.madvise(address, size, advice)  # MADV_HUGEPAGE is refused by kernels built without them
    return address


def _map(at: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    address: int = _libc.mmap(at, size, protection, flags, fd, 0)
    if address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address


def collapse_memory(address: int, size: int) -> None:
    """Have the system put memory that it has allocated into huge pages, as far as it can. Takes 3 s per GiB.

    Also where the file system gives small ones, as /dev/shm mostly does, with which copies run at three quarters of the
    rate. Does nothing before Linux 6.1.
    """
    _libc.madvise(address, size, _MADV_COLLAPSE)


def unmap_memory(address: int, size: int) -> None:
    """Unmap what `map_memory` has mapped."""
    _libc.munmap(address, size)


class Arena:
    """Anonymous host memory for `count` rows of `row_bytes` bytes, with huge pages if the system has them.

    The memory is only mapped here; the engine populates it (HostEngine.populate, memory.pinned.PinnedArena). It has no
    name that could outlive the process.

    Raises MemoryError for more than the machine or the container has left, see `memory.claims`.
    """

    def __init__(self, count: int, row_bytes: int) -> None:
        size = count * row_bytes
        # Room to start on the boundary of a huge page.
        length = size + (_HUGE_PAGE if size >= _HUGE_PAGE else 0)
        length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        with claim_lock():
            refuse_if_unavailable(size)
            try:
                start = map_memory(length)
            except OSError as error:  # a limit on address space, or no overcommitment
                raise MemoryError(
                    f"the system refuses the tier {format_size(size)} ({size} bytes): {error.strerror}"
                ) from error
            address = -(-start // _HUGE_PAGE) * _HUGE_PAGE if size >= _HUGE_PAGE else start
            self._release = weakref.finalize(self, _release, start, length, claim(address, size), os.getpid())
        self.rows = Rows(address=address, count=count, row_bytes=row_bytes, stride=row_bytes)
        # See RowMemory: copies may touch all rows at once.
        self.ready = count
        self.pool = None

    def close(self) -> None:
        """Free the memory. All copies that touch it must have ended. Idempotent."""
        self._release()

    def abandon_memory(self) -> None:
        """Never free the memory, because a copy may still touch it; `close` then does nothing."""
        self._release.detach()


def _release(start: int, length: int, claimed: int | None, owner: int) -> None:
    """Unmap the memory, but only in the process that mapped it: a forked child may have other memory there."""
    if os.getpid() == owner:
        unmap_memory(start, length)
        if claimed is not None:
            os.close(claimed)
