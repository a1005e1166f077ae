"""Eviction policies: which block is evicted when a row is needed. The interface, and the default, LeastRecentlyUsed.

A policy knows keys and rows, but neither memory nor jobs. The configuration may name another one as "module:Class".
"""

from __future__ import annotations

import heapq
import time
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import islice

from async_tier.order import SequenceOrder


class EvictionPolicy(ABC):
    """Learns what is stored and used, and decides what to evict.

    rows: the keys held, and their rows. pins: by row, the number of pins; a pinned row must not be evicted. The index
    owns both; a policy only removes from `rows` what it evicts. In the methods, `sequence` is a request's name, or None
    for blocks without one, and `order`, unless None, is the order of all the sequence's blocks.

    Every policy must evict neither a row with a pin nor a key that the given sequence's order knows.
    """

    def __init__(self, rows: dict[bytes, int], pins: Sequence[int]) -> None:
        self._rows = rows
        self._pins = pins

    @abstractmethod
    def store(
        self, keys: Sequence[bytes], rows: Sequence[int], sequence: str | None, order: SequenceOrder | None
    ) -> None:
        """`keys`, at least one, in the sequence's order, none held, are being stored into `rows`, often a range."""

    @abstractmethod
    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        """The sequence has used `keys`, which are all held and in its order."""

    @abstractmethod
    def evict(self, count: int, sequence: str | None, order: SequenceOrder | None) -> list[int]:
        """Remove up to `count` unpinned keys from `rows`, worst first, to make room for the sequence; their rows."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """The block in `row` is about to be removed from `rows`, but not evicted."""

    @abstractmethod
    def finish(self, sequence: str, order: SequenceOrder | None) -> None:
        """Nothing more will be stored for the sequence; the name may be used again for another one."""

    @abstractmethod
    def clear(self) -> None:
        """Every key is about to be removed from `rows`."""

    def unpinned(self, rows: Collection[int]) -> None:  # noqa: B027 - not every policy needs to know
        """Each of `rows` has lost a pin; some may have none now."""

    def parent(self, row: int) -> int:
        """The row of the block that the one in `row` continues; -1 if there is none, or if it is unknown."""
        return -1

    @property
    def used_at(self) -> array[int] | None:
        """By row, the time of the last use in us of CLOCK_MONOTONIC, as array("q"). None if it is not known."""
        return None

    def restore(
        self, keys: Sequence[bytes], rows: Sequence[int], parents: Sequence[int], used_at: Sequence[int]
    ) -> None:
        """`keys`, at least one, are held in `rows`: an earlier process stored them. Called once, before all else.

        parents: for each, what `parent` has said, while that block is held. used_at: for each, the time of its last
        use; without `used_at`, when it was stored.
        """
        for at in sorted(range(len(keys)), key=used_at.__getitem__):
            self.store(keys[at : at + 1], rows[at : at + 1], None, None)

    def oldest_age(self) -> float | None:
        """Seconds since the last use of the block that would be evicted next. None if there is none, or if unknown."""
        return None


_NO_ORDER = SequenceOrder({})
_NEVER = 1 << 100  # later than any last use, and larger than any entry of the heap


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts the least recently used leaf: a block that no held block continues.

    A prefix is useful only from its start, so a block stays while a block stored behind it is held. That takes two
    numbers per row, the parent and the number of children, where radix caches keep a tree.

        system prompt --- document --- question 1       leaves: question 1, question 2, chat.
                      |            `-- question 2       The least recently used one is evicted; if its parent
                      `-- chat                          has no other child, the parent is then a leaf, too

    - The parent of a block is the nearest block before it in its sequence that is held when it is stored; without an
      order, the last block that the sequence has stored or used. Parents were stored earlier, so there are no cycles.
    - A block is used when a sequence stores or hits it. When a sequence ends, all blocks that its order knows are used,
      wherever they were served from, and its start is the newest. Nothing else renews a block: neither a use of its
      children nor a use by a request that does not have this block.
    - Leaves are in a list by their last use. Those that would enter it in the middle are in a heap beside it: a parent
      that became a leaf, a leaf that was pinned, or one that belonged to the sequence that needed rows.
    """

    # Blocks tried as a parent. Not all are held: of a group with a sliding window vLLM stores only the last ones.
    _MAX_PARENT_DISTANCE = 128
    # Far more sequences than run at a time. A bound is needed, because a caller may never finish its sequences.
    MAX_SEQUENCES = 1 << 14

    def __init__(self, rows: dict[bytes, int], pins: Sequence[int]) -> None:
        super().__init__(rows, pins)
        self.clear()

    @property
    def sequences(self) -> int:
        """The number of sequences whose last block it remembers: at most MAX_SEQUENCES."""
        return len(self._last)

    def clear(self) -> None:
        count = len(self._pins)
        # The time of the last use in us of CLOCK_MONOTONIC, or more: each use has a time of its own.
        self._clock = 0
        # What follows is by row.
        self._key_of: list[bytes] = [b""] * count
        self._used_at: array[int] = array("q", [0]) * count  # in a list, each number would be an object
        self._stored_at = [0] * count
        self._children = [0] * count
        # The parent's row or -1. The parent is gone if its row is free by now, or has a block that was stored later.
        self._parent = [-1] * count
        # A linked list of leaves, closed by `_end`, which is no row. `_newer` of rows that are not in it is -1.
        self._end = count
        self._older = array("i", [-1]) * count + array("i", [count])
        self._newer = array("i", [-1]) * count + array("i", [count])
        # Entries are used_at * number of rows + row. Current while the row is a leaf outside the list, not used since.
        self._heap: list[int] = []
        # Leaves that were pinned when `evict` came to them: neither in the list nor in the heap.
        self._met_pinned: set[int] = set()
        # By sequence, the last block that it has stored or used.
        self._last: OrderedDict[str, bytes] = OrderedDict()

    def store(
        self, keys: Sequence[bytes], rows: Sequence[int], sequence: str | None, order: SequenceOrder | None
    ) -> None:
        above = self._find_parent(keys[0], sequence, order)
        now = self._advance(len(keys))
        before = now - len(keys)
        if isinstance(rows, range):
            run = slice(rows.start, rows.stop)
            self._key_of[run] = keys
            self._used_at[run] = array("q", range(now, before, -1))  # the start is the newest
            self._stored_at[run] = [now] * len(rows)
            self._children[run] = [1] * len(rows)
            self._parent[run] = [above, *rows[:-1]]
        else:
            for key, row, used_at, parent in zip(keys, rows, range(now, before, -1), [above, *rows[:-1]], strict=True):
                self._key_of[row] = key
                self._used_at[row] = used_at
                self._stored_at[row] = now
                self._children[row] = 1
                self._parent[row] = parent
        self._children[rows[-1]] = 0
        self._put_newest(rows[-1])
        if above >= 0:
            self._remove_from_list(above)
            self._children[above] += 1
        self._note_last(sequence, keys[-1])

    def parent(self, row: int) -> int:
        return self._parent[row]

    @property
    def used_at(self) -> array[int]:
        return self._used_at

    def restore(
        self, keys: Sequence[bytes], rows: Sequence[int], parents: Sequence[int], used_at: Sequence[int]
    ) -> None:
        for row, key, parent in zip(rows, keys, parents, strict=True):
            self._key_of[row] = key
            self._parent[row] = parent
            if parent >= 0:
                self._children[parent] += 1
        late = max(0, max(used_at) - self._advance(0))  # uses are later than now if the system's clock has begun anew
        for row, at in zip(rows, used_at, strict=True):
            self._used_at[row] = at - late
        leaves = [row for row in rows if not self._children[row]]
        leaves.sort(key=self._used_at.__getitem__)
        for older, row, newer in zip([self._end, *leaves], leaves, [*leaves[1:], self._end], strict=False):
            self._older[row], self._newer[row] = older, newer
        self._newer[self._end], self._older[self._end] = leaves[0], leaves[-1]

    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        self._mark_used([self._rows[key] for key in keys])
        self._note_last(sequence, keys[-1])

    def finish(self, sequence: str, order: SequenceOrder | None) -> None:
        last = self._rows.get(self._last.pop(sequence, b""), -1)
        if order is not None:
            self._mark_used([row for row in map(self._rows.get, order) if row is not None])
        elif last >= 0:  # the blocks behind which it was stored
            lineage = [last]
            while (parent := self._parent_of(lineage[-1])) >= 0:
                lineage.append(parent)
            self._mark_used(lineage[::-1])

    def evict(self, count: int, sequence: str | None, order: SequenceOrder | None) -> list[int]:
        rows, pins, key_of, used_at, children = self._rows, self._pins, self._key_of, self._used_at, self._children
        parents, stored_at = self._parent, self._stored_at
        known = (order or _NO_ORDER).position
        last = self._last.get(sequence) if sequence is not None else None
        freed: list[int] = []
        spared: list[int] = []
        while len(freed) < count and (entry := self._oldest()) < _NEVER:
            if self._heap and self._heap[0] == entry:
                heapq.heappop(self._heap)
            self._remove_from_list(row := entry % self._end)
            others = self._oldest() // self._end
            # The leaf, then its parent as long as that is the oldest leaf, and so on.
            while True:
                key = key_of[row]
                if pins[row]:
                    self._met_pinned.add(row)
                    break
                if known(key) is not None or key == last:
                    spared.append(row)
                    break
                if used_at[row] > others or len(freed) == count:
                    self._put_in_heap(row)
                    break
                del rows[key]
                if self._heap:
                    used_at[row] = -1  # entries of it are not current any more
                freed.append(row)
                parent = parents[row]
                if parent < 0 or stored_at[parent] > stored_at[row]:
                    break
                children[parent] -= 1
                if children[parent]:
                    break
                row = parent
        for row in spared:
            self._put_in_heap(row)
        return freed

    def remove(self, row: int) -> None:
        self._remove_from_list(row)
        self._met_pinned.discard(row)
        if (parent := self._parent_of(row)) >= 0:
            self._children[parent] -= 1
            if not self._children[parent]:
                self._put_in_heap(parent)
        self._used_at[row], self._stored_at[row] = -1, _NEVER

    def unpinned(self, rows: Collection[int]) -> None:
        if self._met_pinned:
            for row in self._met_pinned.intersection(rows):
                if not self._pins[row]:
                    self._met_pinned.remove(row)
                    self._put_in_heap(row)

    def oldest_age(self) -> float | None:
        entry = self._oldest()
        return None if entry == _NEVER else max(0.0, time.monotonic() - entry // self._end * 1e-6)

    def _advance(self, uses: int) -> int:
        """The time of the last of so many uses, which are being made now, 1 us apart."""
        self._clock = max(self._clock + uses, time.monotonic_ns() // 1000)
        return self._clock

    def _find_parent(self, key: bytes, sequence: str | None, order: SequenceOrder | None) -> int:
        """The row of the parent of a new block `key`; -1 if it is unknown or not held."""
        last = self._last.get(sequence, b"") if sequence is not None else b""
        if order is not None and order.position(key) is not None:
            if order.begins_with(key):
                return -1
            if last in self._rows and order.is_next(last, key):
                return self._rows[last]
            for before in islice(order.preceding(key), self._MAX_PARENT_DISTANCE):
                if before in self._rows:
                    return self._rows[before]
            if not order.precedes(last, key):
                return -1
        return self._rows.get(last, -1)

    def _parent_of(self, row: int) -> int:
        """The row of the parent of the block in `row`; -1 if it has none or it is not held any more."""
        parent = self._parent[row]
        return parent if parent >= 0 and self._stored_at[parent] <= self._stored_at[row] else -1

    def _mark_used(self, rows: Sequence[int]) -> None:
        """Mark the blocks in `rows` as used now, the first as the newest."""
        used_at, children = self._used_at, self._children
        now = self._advance(len(rows))
        leaves = []
        for row in rows:
            used_at[row] = now
            now -= 1
            if not children[row]:
                leaves.append(row)
        for row in reversed(leaves):
            self._put_newest(row)

    def _note_last(self, sequence: str | None, key: bytes) -> None:
        if sequence is not None:
            self._last[sequence] = key
            if len(self._last) > self.MAX_SEQUENCES:
                self._last.popitem(last=False)

    # --------------------------------------------------------------------------------------- leaves, by their last use

    def _put_newest(self, row: int) -> None:
        """Put a leaf that was just used at the new end of the list."""
        self._remove_from_list(row)
        newest = self._older[self._end]
        self._older[row], self._newer[row] = newest, self._end
        self._newer[newest] = self._older[self._end] = row
        self._met_pinned.discard(row)

    def _remove_from_list(self, row: int) -> None:
        older, newer = self._older[row], self._newer[row]
        if newer >= 0:
            self._newer[older], self._older[newer] = newer, older
            self._newer[row] = -1

    def _put_in_heap(self, row: int) -> None:
        """Put a leaf that was not used just now into the heap."""
        if len(self._heap) > self._end:  # most entries are not current any more
            self._heap = list(filter(self._is_current, set(self._heap)))
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, self._used_at[row] * self._end + row)

    def _is_current(self, entry: int) -> bool:
        used_at, row = divmod(entry, self._end)
        is_leaf = not self._children[row] and self._newer[row] < 0 and row not in self._met_pinned
        return is_leaf and self._used_at[row] == used_at

    def _oldest(self) -> int:
        """The entry of the least recently used leaf, as in `_heap`; _NEVER if there is none."""
        while self._heap and not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        row = self._newer[self._end]
        listed = _NEVER if row == self._end else self._used_at[row] * self._end + row
        return min(listed, self._heap[0]) if self._heap else listed
