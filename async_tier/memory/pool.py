"""PoolArena: the tier's rows in a file of a folder that the user named, which outlives the process.

An engine owns its file by a lock on its first byte, which ends with the process, however that ends. Others may read it
(`memory.peers`). A new engine takes over a file that has its digest and geometry, and that nobody owns. What is in a
file: see `memory.pool_files`.

The mapping, and not a descriptor, keeps the lock: a forked child inherits descriptors, but not this mapping.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import threading
import time
import weakref
from pathlib import Path

from async_tier.file_locks import lock
from async_tier.memory.claims import claim, claim_lock, refuse_if_unavailable
from async_tier.memory.host import collapse_memory, map_memory, unmap_memory
from async_tier.memory.pool_files import (
    HUGE,
    OWNER,
    OWNER_OFFSET,
    SUFFIX,
    TEXT_BYTES,
    Description,
    Identity,
    boot_number,
    check_folder,
    file_system,
    open_file,
    pid_namespace,
    room_in,
)
from async_tier.streams import _native
from async_tier.streams.rows import Rows
from async_tier.text import format_size

logger = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20
# Memory is allocated so many bytes at a time, each of which takes some 20 ms.
ALLOCATION_BYTES = 64 << 20
# What is put into huge pages at a time, some 50 ms.
COLLAPSED_BYTES = 16 << 20
# How long the end of its thread is waited for, at most.
RELEASE_TIMEOUT_S = 5.0
# How long a file is left to a process that is ending. A large one takes seconds.
ENDING_S = 30.0


def _refuse_if_unavailable(folder: Path, size: int) -> None:
    """Raise MemoryError if the machine has no such memory left. Huge pages of hugetlbfs are set aside already."""
    if file_system(os.stat(folder).st_dev) != HUGE:
        refuse_if_unavailable(size)


class PoolArena:
    """Memory for `count` rows of `row_bytes` bytes in a file of `folder`: one that was left behind, or a new one.

    table: of its rows. restored: the blocks in it, as `_native.Table.restore` gives them. `ready` rows have memory;
    with `allocate` a thread sees to the rest, and where the file system has no more room, fewer stay.

    Raises ValueError for a folder that cannot be used, MemoryError if it or the machine has no room.
    """

    def __init__(
        self, folder: Path, identity: Identity, count: int, row_bytes: int, *, on_disk: bool = False, allocate: bool
    ) -> None:
        check_folder(folder, on_disk)
        table_bytes = _native.Table.bytes(count)
        page = max(_HUGE_PAGE, os.statvfs(folder).f_frsize)
        rows_offset = -(-(table_bytes + TEXT_BYTES) // page) * page
        size = rows_offset + -(-count * row_bytes // page) * page
        geometry = (count, row_bytes, rows_offset, size)
        wanted = Description(identity.digest, *geometry, boot_number(), identity.about, identity.facts)
        # A claim of memory that is not allocated yet, as one descriptor or none. Huge pages were set aside before.
        self._claimed: list[int] = []
        with claim_lock():
            found = _take_over(folder, identity.prefix, wanted) or _create(folder, identity.prefix, wanted)
            self.path, fd, self.is_new = found
            try:
                address = map_memory(size, fd)
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)  # without the lock
            finally:
                os.close(fd)
            if file_system(os.fstat(self._fd).st_dev) != HUGE:
                claimed = claim(address + rows_offset, count * row_bytes)
                self._claimed += [] if claimed is None else [claimed]
        self._stop = threading.Event()
        # Set when all rows have the memory that they will have, with `allocate`.
        self.settled = threading.Event()
        self._threads: list[threading.Thread] = []
        self._release = weakref.finalize(
            self, _release, address, size, self._claimed, self._fd, self._stop, self._threads, os.getpid()
        )
        self.identity = identity
        self.size = size
        self.inode = os.fstat(self._fd).st_ino
        self.rows = Rows(address=address + rows_offset, count=count, row_bytes=row_bytes, stride=row_bytes)
        self.table = _native.Table(address, count, self._fd, size)
        if self.table.epoch & 1:
            self.table.end_reset()
        self.restored = self.table.restore()
        owner = OWNER.pack(os.getpid(), pid_namespace(), time.time())
        ctypes.memmove(address + OWNER_OFFSET, owner, len(owner))
        # Rows up to the last one with a block have memory already. Others may.
        self._ready = self.restored[0][-1] + 1 if self.restored[0] else 0
        self._rows_offset = rows_offset
        if allocate:
            try:
                self._allocate_next()  # so that the first blocks can be stored at once
            except OSError as error:
                self._release()
                raise MemoryError(f"pool {folder} has no room for the tier: {error.strerror}") from error
            self._threads.append(threading.Thread(target=self._allocate, name="async-tier-pool", daemon=True))
            self._threads[0].start()

    @property
    def pool(self) -> PoolArena:
        """See RowMemory."""
        return self

    @property
    def ready(self) -> int:
        """See RowMemory."""
        return self._ready

    def close(self) -> None:
        """Unmap the memory, and give up the file. All copies that touch it must have ended. Idempotent."""
        self._release()

    def abandon_memory(self) -> None:
        """Never unmap the memory nor give up the file, because a copy may still touch it; `close` does nothing."""
        self._stop.set()
        self._release.detach()

    def allocate(self, size: int) -> None:
        """Give the first `size` bytes of the rows memory. Raises OSError if the file system has no more room."""
        while self._ready * self.rows.row_bytes < size:
            self._allocate_next()

    def _allocate(self) -> None:
        try:
            while self._ready < self.rows.count and not self._stop.is_set():
                self._allocate_next()
            # A copy may go on meanwhile. It waits at most for the huge page that it touches.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            room = self.size - self._rows_offset
            for at in range(0, room, COLLAPSED_BYTES):
                if self._stop.is_set():
                    break
                collapse_memory(self.rows.address + at, min(COLLAPSED_BYTES, room - at))
            self.settled.set()
        except OSError as error:
            if not self._stop.is_set():
                logger.warning(
                    "The tier holds %d blocks and not %d, because %s has no more room: %s",
                    self._ready,
                    self.rows.count,
                    self.path.parent,
                    error.strerror,
                )

    def _allocate_next(self) -> None:
        first = self._ready * self.rows.row_bytes
        size = min(max(ALLOCATION_BYTES, self.rows.row_bytes), self.rows.count * self.rows.row_bytes - first)
        if size:
            try:
                os.posix_fallocate(self._fd, self._rows_offset + first, size)
            except OSError:
                if self.is_new and not first:  # of no use to anybody
                    self.path.unlink(missing_ok=True)
                raise
            self._ready = (first + size) // self.rows.row_bytes
        if self._ready == self.rows.count:
            _end_claim(self._claimed)


def _missing(fd: int, wanted: Description) -> int:
    """The bytes of a file that have no memory yet."""
    return wanted.rows_offset + wanted.capacity * wanted.row_bytes - os.fstat(fd).st_blocks * 512


def _end_claim(claimed: list[int]) -> None:
    while claimed:
        os.close(claimed.pop())


def _take_over(folder: Path, prefix: str, wanted: Description) -> tuple[Path, int, bool] | None:
    """(path, descriptor with the lock, False) of a file that was left behind; None if there is none."""
    for path in sorted(folder.glob(f"{prefix}*{SUFFIX}")):
        try:
            fd = open_file(path, os.O_RDWR)
        except (OSError, ValueError) as error:
            logger.warning("%s is passed over: %s", path, error)
            continue
        with contextlib.ExitStack() as ends:
            ends.callback(os.close, fd)
            try:
                lock(fd, 0)
            except (BlockingIOError, PermissionError):
                continue  # its owner lives
            except OSError as error:
                raise ValueError(f"pool {folder} must be where files can be locked ({error.strerror})") from error
            if not os.fstat(fd).st_nlink:
                continue  # it was just removed
            try:
                found = Description.read(fd)
            except OSError as error:
                logger.warning("%s is passed over: %s", path, error.strerror)
                continue
            except ValueError as error:
                logger.warning("%s is removed, and its blocks are lost: %s", path, error)
                path.unlink(missing_ok=True)
                continue
            if not _has_ended(fd):
                logger.warning("%s is passed over: its owner has not ended in %d s", path, ENDING_S)
                continue
            # The digest and the geometry; what is shown to people may differ.
            if (found.digest, found.capacity, found.rows_offset, found.size) != (
                *(wanted.digest, wanted.capacity, wanted.rows_offset, wanted.size),
            ):
                continue
            if (missing := _missing(fd, wanted)) > 0:
                _refuse_if_unavailable(folder, missing)
            ends.pop_all()
            return path, fd, False
    return None


def _create(folder: Path, prefix: str, wanted: Description) -> tuple[Path, int, bool]:
    """(path, descriptor with the lock, True) of a new file. It has a name only when it is whole."""
    _refuse_if_unavailable(folder, wanted.size)
    room = room_in(folder)
    if room is not None and wanted.size > room:
        raise MemoryError(
            f"the tier asks for {format_size(wanted.size)} ({wanted.size} bytes), but pool {folder} has "
            f"{format_size(room)} ({room} bytes) left; set bytes_to_use to less, mount it with more, or see what "
            f"`async-tier pool list {folder}` shows"
        )
    try:
        fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(f"pool {folder} cannot hold files without a name ({error.strerror})") from error
    with contextlib.ExitStack() as ends:
        ends.callback(os.close, fd)
        try:
            lock(fd, 0)
            os.ftruncate(fd, wanted.size)
            os.posix_fallocate(fd, 0, wanted.rows_offset)
            address = map_memory(wanted.rows_offset, fd)  # hugetlbfs has no write()
        except OSError as error:
            raise MemoryError(f"pool {folder} has no room for the tier: {error.strerror}") from error
        fields, text = wanted.pack()
        ctypes.memmove(address, fields, len(fields))
        ctypes.memmove(address + _native.Table.bytes(wanted.capacity), text, len(text))
        unmap_memory(address, wanted.rows_offset)
        # With a folder's descriptor Python calls linkat, which follows this link.
        try:
            there = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.ExitStack() as after:
                after.callback(os.close, there)
                for number in itertools.count():
                    name = f"{prefix}{number}{SUFFIX}"
                    with contextlib.suppress(FileExistsError):
                        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=there, follow_symlinks=True)
                        break
        except OSError as error:
            raise ValueError(f"pool {folder} cannot have new files ({error.strerror})") from error
        ends.pop_all()
        return folder / name, fd, True


def _has_ended(fd: int) -> bool:
    """Wait until the process that owned a file has ended, at most for ENDING_S. Whether it has.

    A dying process first gives up its memory, and the lock with it, and only then its GPU, which may still be copying
    into a row. In another container it cannot be seen.
    """
    process, namespace, since = OWNER.unpack(os.pread(fd, OWNER.size, OWNER_OFFSET))
    deadline = time.monotonic() + ENDING_S
    while process and namespace == pid_namespace() and _is_running(process, since):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_running(process: int, since: float) -> bool:
    """Whether a process that was running at that time has not ended. A zombie has, once its last thread has."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        has_threads = len(os.listdir(f"/proc/{process}/task")) > 1
    except OSError:
        return False
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return started < since + 1 and (state != "Z" or has_threads)


def _release(
    address: int,
    size: int,
    claimed: list[int],
    fd: int,
    stop: threading.Event,
    threads: list[threading.Thread],
    owner: int,
) -> None:
    stop.set()
    for thread in threads if os.getpid() == owner else ():
        if thread is not threading.current_thread():  # its call of some 50 ms keeps the file open, and so the lock
            thread.join(RELEASE_TIMEOUT_S)
    is_intact = os.fstat(fd).st_size >= size
    os.close(fd)
    if os.getpid() == owner:  # a forked child may have other memory there
        if is_intact:
            ctypes.memset(address + OWNER_OFFSET, 0, 8)
        unmap_memory(address, size)
        _end_claim(claimed)
