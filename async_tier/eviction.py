"""Which block goes when a row is needed: the interface, and the least recently used block that nothing continues.

A policy knows keys and rows, no memory and no jobs. The configuration may name another one as "module:Class".
"""

from __future__ import annotations

import heapq
import sys
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import islice

from async_tier.order import SequenceOrder


class EvictionPolicy(ABC):
    """Told what is stored and used, asked what to evict.

    `rows` maps the keys held to their rows, `pins` counts by row what forbids to evict it. The index owns both; a
    policy only takes out of `rows` what it evicts. A `sequence` is a request's name, or None for blocks of none. An
    `order`, if there is one, is that of all the sequence's blocks.

    Of any policy it is expected that `evict` takes no row with a pin, and nothing that the sequence's order knows.
    """

    def __init__(self, rows: dict[bytes, int], pins: Sequence[int]) -> None:
        self._rows = rows
        self._pins = pins

    @abstractmethod
    def store(
        self, keys: Sequence[bytes], rows: Sequence[int], sequence: str | None, order: SequenceOrder | None
    ) -> None:
        """`keys`, at least one, none held, as they come in the sequence, will be stored into `rows`, often a range."""

    @abstractmethod
    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        """`keys`, all in `rows`, as they come in the sequence, were used by it."""

    @abstractmethod
    def evict(self, count: int, sequence: str | None, order: SequenceOrder | None) -> list[int]:
        """Take at most `count` keys without a pin out of `rows`, worst first, for the sequence; the rows they had."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """The block in `row` is leaving `rows`, not by `evict`."""

    @abstractmethod
    def finish(self, sequence: str, order: SequenceOrder | None) -> None:
        """No more will be stored for the sequence; its name may come again for another."""

    @abstractmethod
    def clear(self) -> None:
        """Every key is leaving `rows`."""

    def unpinned(self, rows: Collection[int]) -> None:  # noqa: B027 - not every policy needs to know
        """Pins were taken off `rows`, of which some may have none now."""


_NO_ORDER = SequenceOrder({})
_NEVER = sys.maxsize


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts the block used least recently among those that no block held continues.

    A prefix is of use only from its start, so a block stays while one stored behind it is held. That takes two numbers
    a row, its parent and how many children, where radix caches keep a tree.

        system prompt --- document --- question 1       leaves: question 1, question 2, chat;
                      |            `-- question 2       the one used least recently goes, then what it leaves bare
                      `-- chat                          is a leaf as well

    - The parent of a block is the nearest before it in its sequence that is held when it is stored; without an order,
      the last that the sequence has stored or used. It was stored before, so there are no cycles, whatever orders say.
    - A block is used when a sequence stores it, hits it or, wherever it was served from, ends: all that the sequence's
      order knows, its start the newest. Nothing else renews a block: not its children, and not a stranger's use.
    - Leaves are in a list by their last use. What enters it in the middle (a parent that becomes a leaf, a leaf that
      was pinned or belonged to who asked) waits in a heap beside it.
    """

    # Blocks looked at for a parent. Not all are held: of a sliding window's group vLLM stores only the last ones.
    _NEAREST = 128
    # Far more than run at a time: a caller may never say that one has ended.
    MOST_SEQUENCES = 1 << 14

    def __init__(self, rows: dict[bytes, int], pins: Sequence[int]) -> None:
        super().__init__(rows, pins)
        self.clear()

    @property
    def sequences(self) -> int:
        """How many sequences it knows the last block of: at most MOST_SEQUENCES."""
        return len(self._last)

    def clear(self) -> None:
        count = len(self._pins)
        self._clock = 0  # by row from here on
        self._key_of: list[bytes] = [b""] * count
        self._used_at = array("q", [0]) * count  # in a list each would be an object of its own
        self._stored_at = [0] * count
        self._children = [0] * count
        # Still there unless its row has another block, which was stored later, or none.
        self._parent = [-1] * count
        # The list of leaves, closed by an end that is no row. A row that is not in it has no newer one: -1.
        self._end = count
        self._older = array("i", [-1]) * count + array("i", [count])
        self._newer = array("i", [-1]) * count + array("i", [count])
        # Used at, times the number of rows, plus row: counts while that is a leaf outside the list, not used since.
        self._heap: list[int] = []
        # Leaves that `evict` has met with a pin: neither in the list nor in the heap.
        self._met_pinned: set[int] = set()
        # By sequence, the last block that it has stored or used.
        self._last: OrderedDict[str, bytes] = OrderedDict()

    def store(
        self, keys: Sequence[bytes], rows: Sequence[int], sequence: str | None, order: SequenceOrder | None
    ) -> None:
        above = self._parent_for(keys[0], sequence, order)
        before = self._clock
        self._clock = now = before + len(keys)
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
            self._take_out(above)
            self._children[above] += 1
        self._note_last(sequence, keys[-1])

    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        self._renew([self._rows[key] for key in keys])
        self._note_last(sequence, keys[-1])

    def finish(self, sequence: str, order: SequenceOrder | None) -> None:
        last = self._rows.get(self._last.pop(sequence, b""), -1)
        if order is not None:
            self._renew([row for row in map(self._rows.get, order) if row is not None])
        elif last >= 0:  # what it was stored behind, from the end on
            lineage = [last]
            while (parent := self._parent_of(lineage[-1])) >= 0:
                lineage.append(parent)
            self._renew(lineage[::-1])

    def evict(self, count: int, sequence: str | None, order: SequenceOrder | None) -> list[int]:
        rows, pins, key_of, used_at, children = self._rows, self._pins, self._key_of, self._used_at, self._children
        parents, stored_at = self._parent, self._stored_at
        known = (order or _NO_ORDER).position
        last = self._last.get(sequence) if sequence is not None else None
        freed: list[int] = []
        own: list[int] = []
        while len(freed) < count and (entry := self._oldest()) < _NEVER:
            if self._heap and self._heap[0] == entry:
                heapq.heappop(self._heap)
            self._take_out(row := entry % self._end)
            others = self._oldest() // self._end
            # The leaf, and then what it leaves bare as long as that is the oldest leaf.
            while True:
                key = key_of[row]
                if pins[row]:
                    self._met_pinned.add(row)
                    break
                if known(key) is not None or key == last:
                    own.append(row)
                    break
                if used_at[row] > others or len(freed) == count:
                    self._put_by_use(row)
                    break
                del rows[key]
                if self._heap:
                    used_at[row] = -1  # what that may have of it does not count any more
                freed.append(row)
                parent = parents[row]
                if parent < 0 or stored_at[parent] > stored_at[row]:
                    break
                children[parent] -= 1
                if children[parent]:
                    break
                row = parent
        for row in own:
            self._put_by_use(row)
        return freed

    def remove(self, row: int) -> None:
        self._take_out(row)
        self._met_pinned.discard(row)
        if (parent := self._parent_of(row)) >= 0:
            self._children[parent] -= 1
            if not self._children[parent]:
                self._put_by_use(parent)
        self._used_at[row], self._stored_at[row] = -1, _NEVER

    def unpinned(self, rows: Collection[int]) -> None:
        if self._met_pinned:
            for row in self._met_pinned.intersection(rows):
                if not self._pins[row]:
                    self._met_pinned.remove(row)
                    self._put_by_use(row)

    def _parent_for(self, key: bytes, sequence: str | None, order: SequenceOrder | None) -> int:
        """The row of what a new block `key` comes behind; -1 if that is not known or not held."""
        last = self._last.get(sequence, b"") if sequence is not None else b""
        if order is not None and order.position(key) is not None:
            if order.begins_with(key):
                return -1
            if last in self._rows and order.is_next(last, key):
                return self._rows[last]
            for before in islice(order.preceding(key), self._NEAREST):
                if before in self._rows:
                    return self._rows[before]
            if not order.precedes(last, key):
                return -1
        return self._rows.get(last, -1)

    def _parent_of(self, row: int) -> int:
        """The row of what the block in `row` was stored behind; -1 if that is not held any more."""
        parent = self._parent[row]
        return parent if parent >= 0 and self._stored_at[parent] <= self._stored_at[row] else -1

    def _renew(self, rows: Sequence[int]) -> None:
        """The blocks in `rows` are used now, the first the newest."""
        used_at, children = self._used_at, self._children
        self._clock = now = self._clock + len(rows)
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
            if len(self._last) > self.MOST_SEQUENCES:
                self._last.popitem(last=False)

    # --------------------------------------------------------------------------------------- leaves, by their last use

    def _put_newest(self, row: int) -> None:
        """A leaf was used, wherever it was before."""
        self._take_out(row)
        newest = self._older[self._end]
        self._older[row], self._newer[row] = newest, self._end
        self._newer[newest] = self._older[self._end] = row
        self._met_pinned.discard(row)

    def _take_out(self, row: int) -> None:
        older, newer = self._older[row], self._newer[row]
        if newer >= 0:
            self._newer[older], self._older[newer] = newer, older
            self._newer[row] = -1

    def _put_by_use(self, row: int) -> None:
        """A leaf comes back that was not used just now."""
        if len(self._heap) > self._end:  # most of these do not count any more
            self._heap = list(filter(self._counts, set(self._heap)))
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, self._used_at[row] * self._end + row)

    def _counts(self, entry: int) -> bool:
        used_at, row = divmod(entry, self._end)
        is_leaf = not self._children[row] and self._newer[row] < 0 and row not in self._met_pinned
        return is_leaf and self._used_at[row] == used_at

    def _oldest(self) -> int:
        """The leaf used least recently, as the heap has them; _NEVER if there is none."""
        while self._heap and not self._counts(self._heap[0]):
            heapq.heappop(self._heap)
        row = self._newer[self._end]
        listed = _NEVER if row == self._end else self._used_at[row] * self._end + row
        return min(listed, self._heap[0]) if self._heap else listed
