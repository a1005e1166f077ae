"""How much host memory a tier can have: what the machine and the container have left, less what other tiers were given.

A tier's memory is mapped at once and gets its pages later, so for a while the system counts as available what somebody
has already. A tier therefore claims its addresses where others see it: by a socket bound to an abstract name.
/proc/net/unix lists these names, and the system drops one with its process, however that ends. For how much of them
there are pages by now is in the process's smaps.

Seen are tiers of processes in this PID and network namespace that this user may look into: not those of other users,
nor of other containers.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from async_tier import machine
from async_tier.text import format_size

logger = logging.getLogger(__name__)

# How names of claims begin. Tests have their own.
NAME = "async-tier"

# The first line of a mapping in smaps.
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Others that ask for memory wait, in this process and in all that see the same /proc.

    What is found to be available in here is so until it is claimed.
    """
    folder = os.open(machine.ROOT / "proc", os.O_RDONLY)  # a lock on what is there already leaves no file
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor as well
        os.close(folder)


def claim(address: int, size: int) -> int | None:
    """Claim `size` bytes of memory at `address`, until the descriptor that is returned is closed.

    None, with a warning, where no socket can be had: then others see only what of the memory has pages.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claimed:
            descriptor = claimed.fileno()
            # The inode makes the name one of its own also where a forked child still has an older one.
            inode = os.fstat(descriptor).st_ino
            claimed.bind(f"\0{NAME}/{os.getpid()}/{descriptor}/{inode}/{address}/{size}")
            return claimed.detach()
    except OSError as error:
        logger.warning("Other tiers may be given the memory of this one until it is in use: %s", error)
        return None


def refuse_if_unavailable(size: int) -> None:
    """Raise MemoryError if `size` bytes are more than can be had: an error in words now, not an out-of-memory kill."""
    holders = list(find_holders())  # first: what gets its pages in between then counts twice, and not as available
    for limit, available, group in machine.available_memory():
        under = [
            holder for holder in holders if group is None or group in machine.cgroups(str(holder.process), "memory")
        ]
        promised = sum(holder.without_pages for holder in under)
        if size > available - promised:
            words = f"the tier asks for {_told(size)}, but {limit} has {_told(available)} available"
            if promised:
                words += f", of which {_told(promised)} are promised to tiers that do not use it yet"
            for holder in under:
                words += f"; process {holder.process} ({holder.name}) has {format_size(holder.size)} for its tiers"
            raise MemoryError(f"{words}; set bytes_to_use to less")


@dataclass(frozen=True)
class Holder:
    """A process with tiers: bytes that they were given, and for how many of those there are no pages yet."""

    process: int
    name: str
    size: int
    without_pages: int


def find_holders() -> Iterator[Holder]:
    """The processes that have claims, as far as they can be seen."""
    pattern = re.compile(rf"@{NAME}/(\d+)/(\d+)/(\d+)/(\d+)/(\d+)$", re.MULTILINE)
    claims: dict[int, list[tuple[int, int]]] = {}
    with contextlib.suppress(OSError):
        for match in pattern.finditer((machine.ROOT / "proc/net/unix").read_text(errors="replace")):
            process, descriptor, inode, address, size = map(int, match.groups())
            with contextlib.suppress(OSError):  # not there any more, or not to be looked into
                # A claim that only a forked child still has is none.
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
    """Bytes of these ranges of addresses (start, end) that are mapped, but not in memory yet."""
    missing = claimed = 0
    with (machine.ROOT / f"proc/{process}/smaps").open(errors="replace") as lines:
        for line in lines:
            if match := _MAPPING.match(line):  # the system makes one of neighbours, so it may hold several ranges
                first, last = (int(text, 16) for text in match.groups())
                claimed = sum(max(0, min(end, last) - max(start, first)) for start, end in ranges)
            elif claimed and line.startswith("Rss:"):
                missing += max(0, claimed - int(line.split()[1]) * 1024)
    return missing


def _told(size: int) -> str:
    return f"{format_size(size)} ({size} bytes)"
