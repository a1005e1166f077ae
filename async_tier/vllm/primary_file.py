"""PrimaryFile: decides which processes may use the file in /dev/shm that a primary tier lies in.

The workers of an engine and its scheduler each open /dev/shm/vllm_offload_{engine_id}.mmap. vLLM takes any file of that
name for its own engine's, whoever made it, and waits half a minute for it to grow if it is too small.

So each of these processes, a *member*, locks one byte of the file, from before it uses the file until its mapping ends.
The lock belongs to an open file and not to a process (F_OFD_SETLK), and the mapping keeps that file open. So the lock
ends with the mapping, or with the process however that ends, and it means the same in every container. A member first
locks byte 0, which only one can hold at a time, and then decides by the locks on the other bytes:

    its own byte, or one of an engine with another number of workers:   the file belongs to another engine
    none, and no process has mapped the file:                           the file was left behind, and is replaced
    only other bytes of its own engine:                                 it joins the other members
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from async_tier import machine
from async_tier.file_locks import is_locked, lock
from async_tier.text import brief

if TYPE_CHECKING:  # and at run time only where it is called: `async-tier doctor` works without vLLM
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

logger = logging.getLogger(__name__)

_DECISION = 0


def _users(status: os.stat_result) -> list[str]:
    """The processes that have mapped a file, as far as they can be seen from here."""
    device = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino} ".encode()
    users = []
    for process in (machine.ROOT / "proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or must not be inspected
            if device in (process / "maps").read_bytes():
                name = (process / "comm").read_text(errors="replace").strip()
                own = ", this one" if process.name == str(os.getpid()) else ""
                users.append(f"process {process.name} ({name}{own})")
    return users


@dataclass(frozen=True)
class FoundFile:
    """A primary's file. state: one of the four below. why: who uses it, or why that cannot be known; may be empty."""

    path: Path
    size: int
    state: str
    why: str


IN_USE, LEFT_BEHIND, REMOVED, UNKNOWN = "in use", "left behind", "removed", "unknown"


def find_files(remove: bool = False) -> Iterator[FoundFile]:
    """The primaries' files in /dev/shm. remove: also remove those that were left behind."""
    for path in sorted((machine.ROOT / "dev/shm").glob("vllm_offload_*.mmap")):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            yield FoundFile(path, status.st_blocks * 512, *_examine(path, status, remove))


def _examine(path: Path, status: os.stat_result, remove: bool) -> tuple[str, str]:
    """The state of a file, and why. remove: also remove it, if it was left behind."""
    if status.st_uid != os.geteuid():
        return UNKNOWN, f"it belongs to another user (number {status.st_uid})"
    if not stat.S_ISREG(status.st_mode):
        return UNKNOWN, "it is not a file"
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        users = _users(os.fstat(fd))
        if users:
            return IN_USE, " and ".join(users)
        try:
            # The kernel grants a lease only if nobody else has the file open or mapped, in whichever container. Who
            # opens it from now on waits until we close it. We are told by a signal, and the default one would end us.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return IN_USE, "a process that cannot be seen from here"
        except OSError as error:
            return UNKNOWN, f"this system does not tell who has it open ({error.strerror})"
        if not remove:
            return LEFT_BEHIND, ""
        os.unlink(path)
        return REMOVED, ""
    finally:
        os.close(fd)


class PrimaryFile:
    """A member's claim to the file: a context manager, in which the member maps the file and calls `hand_over`.

    engine_id: names the file. size: of the file in bytes, the same for all members. world_size: the number of the
    engine's workers. rank: the worker's, or None for the scheduler.

    Creates the file if there is none. Raises ValueError if it belongs to another engine or cannot be opened,
    RuntimeError if /dev/shm has no room. A member that fails within the context removes a file that it created.
    """

    def __init__(self, engine_id: str, size: int, world_size: int, rank: int | None) -> None:
        self.path = f"/dev/shm/vllm_offload_{engine_id}.mmap"
        self.created = False
        self._engine_id = engine_id
        self._pid = os.getpid()
        # Engines with different numbers of workers use different bytes.
        self._first, self._last = world_size << 32, (world_size << 32) + world_size
        self._byte = self._first if rank is None else self._first + 1 + rank
        self._fd = self._open_locked(size)
        self._inode = os.fstat(self._fd).st_ino

    def __enter__(self) -> PrimaryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if kind is not None and self.created:
            self.unlink()

    def hand_over(self, region: SharedOffloadRegion) -> None:
        """Move the lock to the file that `region`, vLLM's view, has mapped, so that it ends with the mapping."""
        assert region.fd is not None
        lock(self._fd, _DECISION, wait=True)  # until the context ends: nobody must see the file unlocked
        lock(self._fd, self._byte, kind=fcntl.F_UNLCK)
        lock(region.fd, self._byte)
        # The mapping keeps the file open. vLLM would close this descriptor only in `cleanup`, not if it is dropped.
        os.close(region.fd)
        region.fd = None

    def unlink(self) -> None:
        """Remove the name, so that other engines can use it; the first member that ends does. Idempotent.

        Does nothing if the name belongs to another file by now, or in a forked child of the member.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.getpid() != self._pid:
                return
            fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                lock(fd, _DECISION, wait=True)
                status = os.fstat(fd)
                if status.st_ino == self._inode and status.st_nlink:
                    os.unlink(self.path)
            finally:
                os.close(fd)

    def _open_locked(self, size: int) -> int:
        """A descriptor of the file, with the member's byte locked."""
        while True:
            fd = self._open()
            if fd is None:
                continue
            try:
                lock(fd, _DECISION, wait=True)
                if self._join(fd, size):
                    lock(fd, _DECISION, kind=fcntl.F_UNLCK)
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _open(self) -> int | None:
        """A descriptor of the file, created if there is none; None if it was removed in between."""
        try:
            try:
                return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    return os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
                return None
        except (OSError, ValueError) as error:  # such as a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"the primary's file {brief(self.path)}, named after engine_id {brief(self._engine_id)}, cannot be "
                f"opened: {reason}"
            ) from error

    def _join(self, fd: int, size: int) -> bool:
        """Lock the member's byte, and size the file if it is new. False if the file is gone, or removed here."""
        status = os.fstat(fd)
        if not status.st_nlink:
            return False
        if not is_locked(fd, _DECISION + 1, 0):
            if status.st_size:
                self._remove_left_behind(status)
                return False
            lock(fd, self._byte)
            self.created = True
            try:
                from vllm.distributed.device_communicators.shm_broadcast import check_shm_free_space

                check_shm_free_space(size)
                os.ftruncate(fd, size)
            except BaseException:
                os.unlink(self.path)
                raise
            return True
        others = is_locked(fd, _DECISION + 1, self._first - _DECISION - 1) or is_locked(fd, self._last + 1, 0)
        if others or is_locked(fd, self._byte, 1) or status.st_size != size:
            raise self._in_use_error(_users(status))
        lock(fd, self._byte)
        return True

    def _remove_left_behind(self, status: os.stat_result) -> None:
        # vLLM's own spec uses the file without our locks.
        users = _users(status)
        if users:
            raise self._in_use_error(users)
        logger.warning(
            "Replaced %s: an engine with engine_id %r has left it behind, and no process uses it any more",
            self.path,
            self._engine_id,
        )
        os.unlink(self.path)

    def _in_use_error(self, users: list[str]) -> ValueError:
        return ValueError(
            f"the primary's file {self.path} is in use by {' and '.join(users) or 'a process not seen from here'}: "
            f"another engine, or another connector of this one, has engine_id {self._engine_id!r}. Give each engine an "
            "engine_id of its own, and have one connector with several secondary_tiers, not two"
        )
