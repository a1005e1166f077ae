"""How much host memory a tier can have: what the machine and the container have left, less what other tiers claimed.

A tier maps its memory at once, but the memory gets its pages later. Until then the system counts it as available. So
each tier claims its addresses where other tiers can see it: in the abstract name of a socket. /proc/net/unix lists
these names, and a name disappears with its process, however that ends. The smaps of the process tell
how many pages the claimed memory has by now.

Only tiers in the same PID and network namespace are seen, in processes that this user may inspect: not those of other
users or of other containers.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from async_tier import machine
from async_tier.text import format_size

logger = logging.getLogger(__name__)

# The prefix of the names of claims. Tests replace it.
NAME = "async-tier"

# The start of a mapping's first line in smaps: its first address, and the address after its last one.
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@contextlib.contextmanager
def claim_lock() -> Iterator[None]:
    """A lock for all tiers that allocate memory, in this process and in all others that see the same /proc.

    Memory that is found available under the lock stays available until it is claimed.
    """
    folder = os.open(machine.ROOT / "proc", os.O_RDONLY)  # locking an existing folder leaves no file behind
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)  # explicitly, because a child forked meanwhile keeps the descriptor open
        os.close(folder)


def claim(address: int, size: int) -> int | None:
    """Claim `size` bytes of memory at `address`, until the returned descriptor is closed.

    If no socket can be made, logs a warning and returns None. Other tiers then count only the pages the memory has.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claimed:
            descriptor = claimed.fileno()
            # The inode makes the name unique even if a forked child still has an older one open.
            inode = os.fstat(descriptor).st_ino
            claimed.bind(f"\0{NAME}/{os.getpid()}/{descriptor}/{inode}/{address}/{size}")
            return claimed.detach()
    except OSError as error:
        logger.warning("Other tiers may be given the memory of this one until it is in use: %s", error)
        return None


def refuse_if_unavailable(size: int) -> None:
    """Raise MemoryError if `size` bytes are more than is available: better now than an out-of-memory kill later."""
    for limit in find_limits():
        if size > limit.available - limit.promised:
            raise MemoryError(f"the tier asks for {_size_text(size)}, but {limit}; set bytes_to_use to less")


@dataclass(frozen=True)
class Holder:
    """A process with tiers. size: bytes that they claimed. without_pages: those of them that have no pages yet."""

    process: int
    name: str
    size: int
    without_pages: int


@dataclass(frozen=True)
class Limit:
    """What the machine, or a memory cgroup around this process, has left: `available` bytes.

    promised: bytes of these that are claimed by the tiers of `holders` and have no pages yet.
    """

    name: str
    available: int
    holders: Sequence[Holder]

    @property
    def promised(self) -> int:
        return sum(holder.without_pages for holder in self.holders)

    def __str__(self) -> str:
        words = f"{self.name} has {_size_text(self.available)} available"
        if self.promised:
            words += f", of which {_size_text(self.promised)} are promised to tiers that do not use it yet"
        for holder in self.holders:
            words += f"; process {holder.process} ({holder.name}) has {format_size(holder.size)} for its tiers"
        return words


def find_limits() -> Iterator[Limit]:
    """What limits the memory that a tier of this process can have."""
    holders = list(find_holders())  # read first, so that pages that come in between count twice and never as available
    for name, available, group in machine.available_memory():
        under = [
            holder for holder in holders if group is None or group in machine.cgroups(str(holder.process), "memory")
        ]
        yield Limit(name, available, under)


def find_holders() -> Iterator[Holder]:
    """The processes with claims, as far as they can be seen."""
    pattern = re.compile(rf"@{NAME}/(\d+)/(\d+)/(\d+)/(\d+)/(\d+)$", re.MULTILINE)
    claims: dict[int, list[tuple[int, int]]] = {}
    with contextlib.suppress(OSError):
        for match in pattern.finditer((machine.ROOT / "proc/net/unix").read_text(errors="replace")):
            process, descriptor, inode, address, size = map(int, match.groups())
            with contextlib.suppress(OSError):  # it has ended, or must not be inspected
                # A claim that only a forked child still has open is void.
                if os.readlink(machine.ROOT / f"proc/{process}/fd/{descriptor}") == f"socket:[{inode}]":
                    claims.setdefault(process, []).append((address, address + size))
    for process, ranges in claims.items():
        with contextlib.suppress(OSError):
            yield Holder(
                process=process,
                name=(machine.ROOT / f"proc/{process}/comm").read_text(errors="replace").strip(),
                size=sum(end - start for start, end in ranges),
                without_pages=_without_pages(process, ranges),
            )


def _without_pages(process: int, ranges: list[tuple[int, int]]) -> int:
    """Bytes of these ranges of addresses (start, end) that are mapped, but have no pages yet."""
    missing = claimed = 0
    with (machine.ROOT / f"proc/{process}/smaps").open(errors="replace") as lines:
        for line in lines:
            if match := _MAPPING.match(line):  # may hold several ranges: the system merges neighbours
                first, last = (int(text, 16) for text in match.groups())
                claimed = sum(max(0, min(end, last) - max(start, first)) for start, end in ranges)
            elif claimed and line.startswith("Rss:"):
                missing += max(0, claimed - int(line.split()[1]) * 1024)
    return missing


def _size_text(size: int) -> str:
    return f"{format_size(size)} ({size} bytes)"
