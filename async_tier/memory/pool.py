"""PoolArena: the tier's rows in a file of a folder that the user named, which outlives the process.

An engine owns its file by a lock on its first byte, which ends with the process, however that ends. Others may read it
(`memory.peers`). A new engine takes over a file that has its digest and geometry, and that nobody owns.

    0 ........... description: what is in the file and whose it is; written once, before the file has a name
    2048 ........ the table: which row holds which block; streams/native/table.c owns all of it
    rows_offset . the rows

The mapping, and not a descriptor, keeps the lock: a forked child inherits descriptors, but not this mapping.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import logging
import os
import re
import stat
import struct
import threading
import time
import weakref
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from async_tier import machine
from async_tier.file_locks import is_locked, lock
from async_tier.memory.claims import claim, claim_lock, refuse_if_unavailable
from async_tier.memory.host import collapse_memory, map_memory, unmap_memory
from async_tier.streams import _native
from async_tier.streams.rows import Rows
from async_tier.text import brief, format_size

logger = logging.getLogger(__name__)

VERSION = 1
SUFFIX = ".pool"
_MAGIC = b"async-tier pool\n"
# Magic, version, digest, rows, bytes of a row, start of the rows, size of the file, boot, length of the text after it.
_FIELDS = struct.Struct("<16sI32sQQQQ36sI")
_SUM = struct.Struct("<I")  # a CRC of all of the above, and of the text
_TEXT_BYTES = 1408
# The owner's process, or 0 if it has closed the file in good order; its PID namespace; when it came (time.time).
OWNER = struct.Struct("<QQd")
OWNER_OFFSET = 1536
DESCRIPTION_BYTES = 2048
_HUGE_PAGE = 2 << 20
# Memory is allocated so many bytes at a time, each of which takes some 20 ms.
ALLOCATION_BYTES = 64 << 20
# What is put into huge pages at a time, some 50 ms.
COLLAPSED_BYTES = 16 << 20
# How long the end of its thread is waited for, at most.
RELEASE_TIMEOUT_S = 5.0
# How long a file is left to a process that is ending. A large one takes seconds.
ENDING_S = 30.0
# Of /proc/self/mountinfo. Others keep their files on a disk, or on other machines.
HUGE = "hugetlbfs"
_IN_MEMORY = ("tmpfs", HUGE)
# What Identity.prefix and a number make, of any version.
_NAME = re.compile(rf"[0-9a-f]{{16}}-\d+-\d+{re.escape(SUFFIX)}")


@dataclass(frozen=True)
class Identity:
    """What a pool is for. digest: 32 bytes, of all that its blocks' meaning depends on. about: shown to people."""

    digest: bytes
    about: dict[str, str]

    @property
    def prefix(self) -> str:
        """How the names of its files begin."""
        return f"{self.digest.hex()[:16]}-{VERSION}-"


@dataclass(frozen=True)
class Description:
    """The part of a file that never changes."""

    digest: bytes
    capacity: int
    row_bytes: int
    rows_offset: int
    size: int
    boot: str
    about: dict[str, str]

    def pack(self) -> bytes:
        text = json.dumps(self.about, ensure_ascii=False).encode(errors="replace")[:_TEXT_BYTES]
        numbers = (self.capacity, self.row_bytes, self.rows_offset, self.size)
        fields = _FIELDS.pack(_MAGIC, VERSION, self.digest, *numbers, self.boot.encode(), len(text)) + text
        return fields + _SUM.pack(zlib.crc32(fields))

    @classmethod
    def read(cls, fd: int) -> Description:
        """The description in an open file. Raises ValueError with what is wrong, OSError if it cannot be read."""
        data = os.pread(fd, DESCRIPTION_BYTES, 0)
        if len(data) < DESCRIPTION_BYTES:
            raise ValueError("it is too short")
        magic, version, digest, *numbers, boot, length = _FIELDS.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("it is no pool")
        if version != VERSION:
            raise ValueError(f"it has version {version} of the format, not {VERSION}")
        end = _FIELDS.size + min(length, _TEXT_BYTES)
        if _SUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
            raise ValueError("its description is damaged")
        capacity, row_bytes, rows_offset, size = numbers
        table_end = _native.Table.bytes(capacity) if capacity < 1 << 31 else size
        if not (capacity >= 1 and row_bytes >= 1 and table_end <= rows_offset <= size - capacity * row_bytes):
            raise ValueError("its description is damaged")
        if (real := os.fstat(fd).st_size) != size:
            raise ValueError(f"it has {real} bytes and not {size}")
        if (started := boot.decode(errors="replace")) != _boot():
            raise ValueError("it is from before the machine was started, and may lack what was not written")
        try:
            about = json.loads(data[_FIELDS.size : end])
        except ValueError:  # longer than there is room for
            about = {}
        return cls(digest, capacity, row_bytes, rows_offset, size, started, about)


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a file that belongs to this user. Raises OSError, or ValueError for another user's."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    owner = os.fstat(fd).st_uid
    if owner == os.geteuid():
        return fd
    os.close(fd)
    raise ValueError(f"it belongs to another user (number {owner})")


def check_folder(folder: Path, on_disk: bool, *, make: bool = True) -> None:
    """Make the folder if only its last part is missing. Raises ValueError if it cannot be a pool's.

    make: False changes nothing, and only says what would be refused.
    """
    name = f"pool {brief(str(folder))}"
    try:
        if not folder.exists():
            _check_file_system(name, folder.parent.stat().st_dev, on_disk)
            if not os.access(folder.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not make:
                return
            folder.mkdir(0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ValueError(f"{name} must be a folder, or one that can be made ({error.strerror})") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{name} must be a folder")
    if status.st_uid != os.geteuid():
        raise ValueError(
            f"{name} must be a folder of this user (number {os.geteuid()}), not of number {status.st_uid}; name a "
            "folder in it, which is then made"
        )
    if status.st_mode & 0o022:
        raise ValueError(
            f"{name} must be a folder that nobody else may write to, but its mode is {stat.S_IMODE(status.st_mode):o}; "
            "chmod it to 700, or name a folder in it, which is then made"
        )
    _check_file_system(name, status.st_dev, on_disk)


def _check_file_system(name: str, device: int, on_disk: bool) -> None:
    kind = file_system(device)
    if kind not in _IN_MEMORY and not on_disk:
        raise ValueError(
            f"{name} must be on {' or '.join(_IN_MEMORY)}, such as /dev/shm, but is on {kind}; for a file system on a "
            "disk, whose writes would slow copies down, set pool_on_disk to true"
        )


def _refuse_if_unavailable(folder: Path, size: int) -> None:
    """Raise MemoryError if the machine has no such memory left. Huge pages of hugetlbfs are set aside already."""
    if file_system(os.stat(folder).st_dev) != HUGE:
        refuse_if_unavailable(size)


def find_mount(device: int) -> tuple[str, str]:
    """(kind, options) of the file system with this number (st_dev), as ("tmpfs", "rw,size=4194304k")."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in (machine.ROOT / "proc/self/mountinfo").read_text(errors="replace").splitlines():
            if line.split()[2] == wanted:
                kind, _, options = line.rpartition(" - ")[2].split(" ", 2)
                return kind, options
    return "an unknown file system", ""


def file_system(device: int) -> str:
    """The kind of the file system with this number (st_dev), as in "tmpfs"."""
    return find_mount(device)[0]


def room_in(folder: Path) -> int | None:
    """The bytes that the folder's mount has left; None if it has no limit but memory's. Raises OSError."""
    status, limits = os.statvfs(folder), []
    if status.f_blocks:  # otherwise it has no limit of its own, and says 0 for all
        limits.append(status.f_bavail * status.f_frsize)
    if file_system(os.stat(folder).st_dev) == HUGE:
        pages = machine.ROOT / f"sys/kernel/mm/hugepages/hugepages-{status.f_frsize // 1024}kB"
        free, promised = (int((pages / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
        limits.append((free - promised) * status.f_frsize)
    return min(limits, default=None)


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
        rows_offset = -(-table_bytes // page) * page
        size = rows_offset + -(-count * row_bytes // page) * page
        wanted = Description(identity.digest, count, row_bytes, rows_offset, size, _boot(), identity.about)
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
        ctypes.memmove(address, data := wanted.pack(), len(data))
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


def pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _boot() -> str:
    """A number of its own for each start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


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


@dataclass(frozen=True)
class FoundPool:
    """A file in a folder.

    allocated: the bytes of the mount that it takes. problem: why it cannot be used; None if it can. owner: which engine
    owns it; None if none does. since: when its last owner took it (time.time). blocks: how many can be loaded, none
    after a reset that the owner has not got over. idle_s: the time since the last use of one, in seconds.
    """

    path: Path
    allocated: int = 0
    problem: str | None = None
    owner: str | None = None
    description: Description | None = None
    since: float = 0.0
    blocks: int = 0
    idle_s: float | None = None
    is_reset: bool = False


def find_pools(folder: Path) -> list[FoundPool]:
    """The pools' files in a folder, by their names. Changes and locks nothing. Raises OSError if it cannot be read."""
    found = [_examine(folder / name) for name in sorted(os.listdir(folder)) if _NAME.fullmatch(name)]
    return [file for file in found if file is not None]


def _examine(path: Path) -> FoundPool | None:
    """What there is to say of a file; None if it is gone by now.

    Its table is read, not mapped: to touch mapped memory of a file that is being truncated would end the process.
    """
    found = FoundPool(path)
    with contextlib.ExitStack() as ends:
        try:
            status = path.lstat()
            found = replace(found, allocated=status.st_blocks * 512)
            if status.st_uid != os.geteuid():
                raise ValueError(f"it belongs to another user (number {status.st_uid})")
            fd = open_file(path, os.O_RDONLY)
            ends.callback(os.close, fd)
            if is_locked(fd, 0, 1):
                found = replace(found, owner="an engine")
            description = Description.read(fd)
            memory = _read(fd, _native.Table.bytes(description.capacity))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return replace(found, problem=getattr(error, "strerror", None) or str(error))
    process, namespace, since = OWNER.unpack_from(memory.data, OWNER_OFFSET)
    table = _native.Table(memory.ctypes.data, description.capacity, -1, 0)
    is_reset = bool(table.epoch & 1)
    used_at = [] if is_reset else table.restore()[3]  # of what was read: the file stays as it is
    return replace(
        found,
        owner=found.owner and _owner(process, namespace),
        description=description,
        since=since,
        blocks=len(used_at),
        idle_s=time.monotonic() - max(used_at) * 1e-6 if used_at else None,
        is_reset=is_reset,
    )


def _read(fd: int, size: int) -> np.ndarray:
    """The first bytes of a file: uint8, shape (size,). Raises ValueError if it has not so many, OSError."""
    data, done = np.empty(size, dtype=np.uint8), 0
    while done < size:
        count = os.preadv(fd, [data.data[done:]], done)
        if not count:
            raise ValueError(f"it has {done} bytes, less than its table")
        done += count
    return data


def _owner(process: int, namespace: int) -> str:
    """Who holds a file. process, namespace: what is written in it, by its last owner until a new one has started."""
    if process and namespace != pid_namespace():
        return "an engine in another container"
    try:
        name = (machine.ROOT / f"proc/{process}/comm").read_text(errors="replace").strip()
    except OSError:
        return "an engine that is starting"
    return f"process {process} ({name})"


def remove_pool(path: Path) -> bool:
    """Remove a file, unless an engine owns it. Whether it is gone; an engine that reads it forgets its blocks when
    its next request comes.

    Raises OSError if it cannot be removed, ValueError if it is no file, or another user's.
    """
    try:
        fd = open_file(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        lock(fd, 0)
        if os.fstat(fd).st_nlink:  # else it was just removed, and its name may be that of another one
            path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
