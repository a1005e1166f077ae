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
# Raw calls, because a mapping that a Python object owns is also unmapped by the copy of that object in a forked child.
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Arena:
    """Anonymous host memory for `count` rows of `row_bytes` bytes.

    Reserved only, huge pages advised: whoever copies populates it (HostEngine.populate, cuda_arena.PinnedArena). It
    holds users' conversations: kept out of core dumps and of forked children, and without a name that could outlive the
    process.

    Raises MemoryError, in words, for more than the machine or the container has left, see `memory`.
    """

    def __init__(self, count: int, row_bytes: int) -> None:
        size = count * row_bytes
        # Room to start on a huge page's boundary.
        length = size + (_HUGE_PAGE if size >= _HUGE_PAGE else 0)
        length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        with claim_lock():
            refuse_if_unavailable(size)
            start = _libc.mmap(
                None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
            )
            if start == _MAP_FAILED:  # an address-space limit, or no overcommitment
                reason = os.strerror(ctypes.get_errno())
                raise MemoryError(f"the system refuses the tier {format_size(size)} ({size} bytes): {reason}")
            for advice in (mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE):
                _libc.madvise(start, length, advice)  # MADV_HUGEPAGE is refused by kernels built without them
            address = -(-start // _HUGE_PAGE) * _HUGE_PAGE if size >= _HUGE_PAGE else start
            self._release = weakref.finalize(self, _release, start, length, claim(address, size), os.getpid())
        self.rows = Rows(address=address, count=count, row_bytes=row_bytes, stride=row_bytes)
        # Rows from the first on that copies may touch: all, here.
        self.ready = count

    def close(self) -> None:
        """Free the memory. Every copy that touches it must have ended. Idempotent."""
        self._release()

    def abandon_memory(self) -> None:
        """Never free the memory, because a copy may touch it at any time; `close` does nothing any more."""
        self._release.detach()


def _release(start: int, length: int, claimed: int | None, owner: int) -> None:
    """Give the mapping back, in the process that made it: a forked child may have something else at its addresses."""
    if os.getpid() == owner:
        _libc.munmap(start, length)
        if claimed is not None:
            os.close(claimed)
