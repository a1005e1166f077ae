"""Locks on bytes of a file. A lock belongs to an open file, and ends with its last descriptor and mapping.

So it ends with a process, however that ends, and means the same in every container. Asking takes no lock.
"""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length (0: to the end), process


def lock(fd: int, start: int, *, kind: int = fcntl.F_WRLCK, wait: bool = False) -> None:
    """Lock a byte, which may lie beyond the file's end. Raises OSError if it is locked and `wait` is false."""
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    fcntl.fcntl(fd, command, struct.pack(_FLOCK, kind, os.SEEK_SET, start, 1, 0))


def is_locked(fd: int, start: int, length: int) -> bool:
    """Whether another open file has locked any of these bytes. A length of 0 means to the end."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
    return struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK
