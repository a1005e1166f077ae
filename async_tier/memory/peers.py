"""Peers: the blocks in the other files of a pool, which other engines of this node own, or have left behind.

Nothing here locks or writes. Each owner's table says what changed (streams/native/table.c), and `refresh` reads that.
What a peer holds may be gone at any moment, so a copy is made first and asked for afterwards: `Borrowed.lost`.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import operator
import os
import time
import weakref
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from async_tier.memory.host import map_memory, unmap_memory
from async_tier.memory.pool import PoolArena
from async_tier.memory.pool_files import SUFFIX, Description, open_file
from async_tier.streams import _native
from async_tier.streams.base import CopyEvent, CopyStream
from async_tier.streams.host import HostEngine, default_threads
from async_tier.streams.rows import Rows

logger = logging.getLogger(__name__)

# Records read by one `refresh`, at most: some 300 us.
REFRESH_RECORDS = 512
# More than the coarsest clock of a kernel, whose ticks are 1 to 10 ms.
COARSE_NS = 100_000_000
_ROW = (1 << 32) - 1


class Peer:
    """A file of the pool, mapped to be read until nobody has this object any more. number: of this one among all."""

    def __init__(self, number: int, fd: int, description: Description) -> None:
        size, offset = description.size, description.rows_offset
        count, row_bytes = description.capacity, description.row_bytes
        address = map_memory(size, fd, mmap.PROT_READ)
        self.number = number
        self.table = _native.Table(address, count, fd, size)
        self.rows = Rows(address=address + offset, count=count, row_bytes=row_bytes, stride=row_bytes)
        # Not at the interpreter's exit, which ends the engine that may be copying only afterwards.
        weakref.finalize(self, _release, address, size, fd, os.getpid()).atexit = False
        # What was read of its table: of which epoch, how many of its changes, and the records up to `scanned`. Both go
        # on side by side, as each only tells that a record is to be read.
        self.epoch = self.seen = self.scanned = 0
        # By row, the key of its block and the word of its record; None and 0 without a block.
        self.keys: list[bytes | None] = [None] * count
        self.words = array("Q", bytes(8 * count))


@dataclass
class Borrowed:
    """Blocks of one peer that a load copies. targets: rows of the primary. event: of the copies."""

    peer: Peer
    epoch: int
    keys: list[bytes]
    rows: list[int]
    words: list[int]
    targets: list[int]
    event: CopyEvent | None = None

    def lost(self) -> list[bytes]:
        """After the copies: the keys of which other bytes, or not all, may have been copied."""
        if self.event is not None and self.event.failed:
            return self.keys
        return [self.keys[at] for at in self.peer.table.stale(self.rows, self.words, self.epoch)]


class JoinedEvent:
    """The CopyEvent of a load from several memories. own: of the tier's own rows, if there are any among them.

    Whether copies of peers' rows failed is asked of their own events.
    """

    def __init__(self, own: CopyEvent | None, borrowed: Sequence[CopyEvent]) -> None:
        self._own = own
        self._events = [*borrowed] if own is None else [own, *borrowed]

    @property
    def failed(self) -> bool:
        return self._own is not None and self._own.failed

    @property
    def reason(self) -> str | None:
        return None if self._own is None else self._own.reason

    @property
    def is_done(self) -> bool:
        return all(event.is_done for event in self._events)

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        return sorted((span for event in self._events for span in event.spans), key=operator.itemgetter(1))

    @property
    def seconds(self) -> float:
        spans = self.spans
        return (max(end for _, _, end in spans) - spans[0][1]) * 1e-9 if spans else 0.0

    def synchronize(self, seconds: float = 1e9) -> bool:
        return all(event.synchronize(seconds) for event in self._events)


class Peers:
    """The blocks of the other files of a pool. own: the engine's own file; without one there are no peers.

    stream: copies what is borrowed; without one, threads of their own do.
    """

    def __init__(self, own: PoolArena | None, stream: CopyStream | None = None) -> None:
        self._is_over = own is None
        self._engine: HostEngine | None = None
        self._gone: list[Peer] = []
        self._refused: set[int] = set()  # inodes of files that cannot be used, each of which was logged
        self._looked_at = -1  # the folder's time of change, when its files were looked at
        self._peers: dict[int, Peer] = {}  # by inode
        self._numbers = itertools.count()
        self._by_number: dict[int, Peer] = {}
        self.count = 0  # of files
        # By key, the number of its peer << 32 | its row. Others may read it. Where several peers hold it, the others.
        self.places: dict[bytes, int] = {}
        self._others: dict[bytes, list[int]] = {}
        if own is None:
            return
        if stream is None:
            # CUDA's engine only touches memory that is pinned, which takes long for what may never be read.
            self._engine = HostEngine(default_threads())
            weakref.finalize(self, self._engine.close)
            stream = self._engine.load_stream
        self.stream: CopyStream = stream
        self._folder, self._own, self._path = str(own.path.parent), own.inode, own.path
        self._is_removed = False
        self._prefix, self._digest, self._row_bytes = own.identity.prefix, own.identity.digest, own.rows.row_bytes
        self.look()
        self.refresh(limit=1 << 60)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.places)

    def look(self) -> None:
        """Find the files that came, and those that went, and `refresh`. Raises nothing."""
        if self._is_over:
            return
        try:
            changed = os.stat(self._folder).st_mtime_ns
            # The clock of these times is coarse: soon after a change there may be another one with the same time.
            if changed != self._looked_at or abs(time.time_ns() - changed) < COARSE_NS:
                self._look()
                self._looked_at = changed
        except FileNotFoundError:  # the folder was removed: what is mapped stays
            self._note_removed()
        except OSError:
            pass  # it cannot be read: as before
        self.refresh()

    def refresh(self, limit: int = REFRESH_RECORDS) -> None:
        """Read what has changed in the known files, at most `limit` records. Never blocks, and raises nothing."""
        for left, peer in zip(range(len(self._peers), 0, -1), self._peers.values(), strict=True):
            has_news = peer.table.news(peer.epoch, peer.seen)
            if has_news is None:
                logger.warning("The blocks of a file in %s are not used any more: it was truncated", self._folder)
                self._gone.append(peer)
            elif has_news or peer.scanned < peer.rows.count:
                limit -= self._follow(peer, -(-limit // left))  # what it leaves is for the others
        while self._gone:
            self._remove(self._gone.pop())

    def borrow(self, keys: Sequence[bytes], targets: Sequence[int]) -> list[Borrowed]:
        """What to copy, by peer, for those of `keys` that are held. targets: a row of the primary for each key."""
        borrowed: dict[Peer, Borrowed] = {}
        for key, target in zip(keys, targets, strict=True):
            place = self.places.get(key)
            if place is None:
                continue
            peer, row = self._by_number[place >> 32], place & _ROW
            part = borrowed.setdefault(peer, Borrowed(peer, peer.epoch, [], [], [], []))
            part.keys.append(key)
            part.rows.append(row)
            part.words.append(peer.words[row])
            part.targets.append(target)
        for part in borrowed.values():
            self._drop_lost(part)
        return [part for part in borrowed.values() if part.keys]

    def held(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of `keys` that are held, which was just looked up in the peers' tables."""
        return {key for part in self.borrow(keys, range(len(keys))) for key in part.keys}

    def drop(self, keys: Collection[bytes]) -> None:
        """Forget `keys`, until their peers store them again."""
        for key in keys:
            place = self.places.get(key)
            if place is not None:
                self._note(self._by_number[place >> 32], [place & _ROW], [None], [0])

    def signal(self, fd: int) -> None:
        """See CopyEngine.signal; for the threads of its own."""
        if self._engine is not None:
            self._engine.signal(fd)

    def close(self) -> None:
        """End the threads of its own, and unmap the peers' files once no copy touches them. Idempotent."""
        if self._engine is not None:
            self._engine.close()
        self.clear()

    def clear(self) -> None:
        """Forget all peers, for good. What is being copied is still copied."""
        self._peers.clear()
        self._by_number.clear()
        self.places.clear()
        self._others.clear()
        self.count = 0
        self._is_over = True

    def _drop_lost(self, part: Borrowed) -> None:
        lost = part.lost()
        if lost:
            self.drop(lost)
            gone = set(lost)
            kept = [at for at, key in enumerate(part.keys) if key not in gone]
            for name in ("keys", "rows", "words", "targets"):
                values = getattr(part, name)
                setattr(part, name, [values[at] for at in kept])

    def _look(self) -> None:
        """Find the files that came, and those that went. Raises OSError if the folder cannot be read."""
        found: set[int] = set()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not (entry.name.startswith(self._prefix) and entry.name.endswith(SUFFIX)):
                    continue
                inode = entry.inode()
                found.add(inode)
                if inode != self._own and inode not in self._peers and inode not in self._refused:
                    self._attach(Path(entry.path), inode)
        if self._own not in found:
            self._note_removed()
        self._refused &= found
        for inode in self._peers.keys() - found:
            self._remove(self._peers[inode])

    def _note_removed(self) -> None:
        """Say once that the engine's own file is gone from the folder."""
        if not self._is_removed:
            self._is_removed = True
            logger.warning(
                "%s was removed while its engine runs: the blocks in it end with this process, and other engines that "
                "start do not find them. Start the engine again to keep blocks",
                self._path,
            )

    def _attach(self, path: Path, inode: int) -> None:
        try:
            fd = open_file(path, os.O_RDONLY)
            try:
                description = Description.read(fd)
                if (description.digest, description.row_bytes) != (self._digest, self._row_bytes):
                    raise ValueError("it is for other blocks")
                peer = Peer(next(self._numbers), fd, description)
            except BaseException:
                os.close(fd)
                raise
            self._peers[inode] = self._by_number[peer.number] = peer
            self.count = len(self._peers)
        except (OSError, ValueError) as error:
            self._refused.add(inode)
            logger.warning("The blocks in %s are not used: %s", path, error)

    def _remove(self, peer: Peer) -> None:
        """Forget a file that is gone."""
        self._forget(peer)
        self._peers = {inode: each for inode, each in self._peers.items() if each is not peer}
        del self._by_number[peer.number]
        self.count = len(self._peers)

    def _follow(self, peer: Peer, limit: int) -> int:
        """Read what has changed in a peer's table, and the next part of it. Returns how many records were read."""
        table = peer.table
        epoch = table.epoch
        if epoch != peer.epoch:
            self._forget(peer)
            peer.epoch = epoch
        if epoch & 1:
            return 0
        if peer.scanned == 0:
            peer.seen = table.changes
        news = table.changes_since(peer.seen, limit)
        if news is None:  # lapped: read all of it again
            peer.scanned = 0
            return 0
        self._note(peer, *news)
        read = len(news[0])
        peer.seen += read
        part = range(peer.scanned, min(peer.scanned + limit - read, peer.rows.count))
        if part:
            rows, keys, words = table.scan(part.start, len(part))
            gone = {row for row in part if peer.keys[row] is not None}.difference(rows)
            self._note(peer, list(gone), [None] * len(gone), [0] * len(gone))
            self._note(peer, rows, keys, words)
            peer.scanned = part.stop
        return read + len(part)

    def _note(self, peer: Peer, rows: Sequence[int], keys: Sequence[bytes | None], words: Sequence[int]) -> None:
        """A peer's rows now hold these blocks, or none."""
        base, places, held, of_rows = peer.number << 32, self.places, peer.keys, peer.words
        for row, key, word in zip(rows, keys, words, strict=True):
            before = held[row]
            if before is not None and before != key:
                self._take_away(before, base + row)
            held[row] = key
            of_rows[row] = word
            if key is not None and places.setdefault(key, base + row) != base + row:
                others = self._others.setdefault(key, [])
                if base + row not in others:
                    others.append(base + row)

    def _take_away(self, key: bytes, place: int) -> None:
        """A key is not held at this place any more. Another peer may hold it, too."""
        others = self._others.get(key, [])
        if self.places[key] != place:
            others.remove(place)
        elif others:
            self.places[key] = others.pop()
        else:
            del self.places[key]
        if not others:
            self._others.pop(key, None)

    def _forget(self, peer: Peer) -> None:
        """Forget a peer's blocks. Its table is read from the start again."""
        rows = [row for row, key in enumerate(peer.keys) if key is not None]
        self._note(peer, rows, [None] * len(rows), [0] * len(rows))
        peer.scanned = 0


def _release(address: int, size: int, fd: int, owner: int) -> None:
    os.close(fd)
    if os.getpid() == owner:
        unmap_memory(address, size)
