"""The files of a pool: what is in one, in which folders they may be, and how they are found and removed.

    0 ........... description: what is in the file and whose it is; written once, before the file has a name
    2048 ........ the table: which row holds which block; streams/native/table.c owns all of it
    after it .... a text, as JSON, for people; it belongs to the description
    rows_offset . the rows

Who owns a file has a lock on its first byte: see `memory.pool`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from async_tier import machine
from async_tier.file_locks import is_locked, lock
from async_tier.streams import _native
from async_tier.text import brief

VERSION = 1
SUFFIX = ".pool"
_MAGIC = b"async-tier pool\n"
# Magic, version, digest, rows, bytes of a row, start of the rows, size of the file, boot, length of the text.
_FIELDS = struct.Struct("<16sI32sQQQQ36sI")
_SUM = struct.Struct("<I")  # a CRC of all of the above, and of the text
TEXT_BYTES = 64 << 10
# The owner's process, or 0 if it has closed the file in good order; its PID namespace; when it came (time.time).
OWNER = struct.Struct("<QQd")
OWNER_OFFSET = 1536
DESCRIPTION_BYTES = 2048
# How a fact begins of which only a digest is kept.
DIGEST_MARK = "#"
# Of /proc/self/mountinfo. Others keep their files on a disk, or on other machines.
HUGE = "hugetlbfs"
_IN_MEMORY = ("tmpfs", HUGE)
# What Identity.prefix and a number make, of any version.
_NAME = re.compile(rf"[0-9a-f]{{16}}-\d+-\d+{re.escape(SUFFIX)}")


@dataclass(frozen=True)
class Identity:
    """What a pool is for. digest: 32 bytes, of all that its blocks' meaning depends on.

    about: shown to people. facts: what the digest is made of, so that people can be told why two pools are different.
    """

    digest: bytes
    about: dict[str, str]
    facts: Mapping[str, str] = field(default_factory=dict)

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
    facts: Mapping[str, str]

    def pack(self) -> tuple[bytes, bytes]:
        """The bytes at the start of the file, and those after the table."""
        text = b""
        for facts in (self.facts, {}):
            text = json.dumps([self.about, facts], ensure_ascii=False).encode(errors="replace")
            if len(text) <= TEXT_BYTES:
                break
        text = text[:TEXT_BYTES]
        numbers = (self.capacity, self.row_bytes, self.rows_offset, self.size)
        fields = _FIELDS.pack(_MAGIC, VERSION, self.digest, *numbers, self.boot.encode(), len(text))
        return fields + _SUM.pack(zlib.crc32(fields + text)), text

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
        capacity, row_bytes, rows_offset, size = numbers
        table_end = _native.Table.bytes(capacity) if capacity < 1 << 31 else size
        text = os.pread(fd, min(length, TEXT_BYTES), table_end) if table_end < 1 << 62 else b""
        if _SUM.unpack_from(data, _FIELDS.size)[0] != zlib.crc32(data[: _FIELDS.size] + text):
            raise ValueError("its description is damaged")
        if not (capacity >= 1 and row_bytes >= 1 and table_end <= rows_offset <= size - capacity * row_bytes):
            raise ValueError("its description is damaged")
        if (real := os.fstat(fd).st_size) != size:
            raise ValueError(f"it has {real} bytes and not {size}")
        if (started := boot.decode(errors="replace")) != boot_number():
            raise ValueError("it is from before the machine was started, and may lack what was not written")
        try:
            about, facts = json.loads(text)
        except ValueError:  # longer than there is room for
            about, facts = {}, {}
        return cls(digest, capacity, row_bytes, rows_offset, size, started, about, facts)


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
        missing = f"; {brief(str(folder.parent))} has to be there" if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"{name} must be a folder, or one that can be made ({error.strerror}){missing}") from error
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


def pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def boot_number() -> str:
    """A number of its own for each start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


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


def other_pools(folder: Path, identity: Identity) -> list[tuple[Path, Description]]:
    """The files of other pools in a folder, and what they are for. Raises OSError if it cannot be read."""
    found = []
    for name in sorted(os.listdir(folder)):
        if not _NAME.fullmatch(name) or name.startswith(identity.prefix):
            continue
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as ends:
            fd = open_file(folder / name, os.O_RDONLY)
            ends.callback(os.close, fd)
            found.append((folder / name, Description.read(fd)))
    return found


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Why two pools are different, by their facts, in words. Nothing, if the facts of one are not known."""
    if not here or not there:
        return []
    found = []
    for name in sorted(here.keys() | there.keys()):
        values = here.get(name, "absent"), there.get(name, "absent")
        if values[0] != values[1]:
            has_digest = any(value.startswith(DIGEST_MARK) for value in values)
            found.append(name if has_digest else f"{name} ({brief(values[0])} here, {brief(values[1])} there)")
    return found


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
