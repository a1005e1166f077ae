"""BlockIndex: which row holds which block. Bookkeeping only: it touches neither the rows' memory nor streams.

    reserve        FILLING   a row is taken and its copy is queued; a lookup does not find it
    mark_ready     READY     the bytes are there
    drop, evict    FREE      the key is gone; the row is free once nothing pins it (ORPHAN until then)

Where the rows are in a pool, the same is kept in its table (streams/native/table.c), which outlives the process.

A *pin* is a reason not to reuse a row: the store that fills it, a load that reads it, a hit of this step. A row is
never reused while it is pinned, even if its key is gone.

Memory grows with the number of blocks by one dict of bytes to int and by flat lists, without an object per block:
a full garbage collection then has only the lists to walk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from async_tier.eviction import EvictionPolicy, LeastRecentlyUsed
from async_tier.order import SequenceOrder
from async_tier.streams import _native

FREE, FILLING, READY, ORPHAN = range(4)
# The last uses of so many rows are copied to the table in every so many steps: it takes 1 us.
_USES, _USES_STEPS = 4096, 16


class Change(NamedTuple):
    """`keys` have become READY (is_stored), or are READY no more."""

    is_stored: bool
    keys: list[bytes]


class BlockIndex:
    """Maps keys (bytes) to rows (0 to `capacity` - 1), with pins and a policy. ValueError if `capacity` is below 1."""

    def __init__(self, capacity: int, policy: Callable[..., EvictionPolicy] = LeastRecentlyUsed) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 row, not {capacity}")
        self.capacity = capacity
        self._usable = capacity
        self.evictions = 0
        self.filling = 0
        self._orphans = 0
        self._row_of: dict[bytes, int] = {}
        self._state = bytearray(capacity)
        self._pins = [0] * capacity
        # Rows from `_fresh` on were never used. `_free`: rows that were used and are free again.
        self._fresh = 0
        self._free: list[int] = []
        self._step_pins: list[int] = []
        self._policy = policy(self._row_of, self._pins)
        # See `note_changes`. By row, the key that it has or had.
        self._changes: list[Change] | None = None
        self._key_of: list[bytes] = []
        # See `keep_in`. Rows from `_asleep` up to `_restored` were in the table, and are not usable yet.
        self._table: _native.Table | None = None
        self._asleep = self._restored = 0
        self._steps = 0

    def __len__(self) -> int:
        """The number of READY blocks."""
        return len(self._row_of) - self.filling

    @property
    def rows_used(self) -> int:
        """Rows that are not free: READY, FILLING, or ORPHAN and still pinned."""
        return self._fresh - len(self._free)

    @property
    def policy(self) -> EvictionPolicy:
        """The policy that decides which block is evicted."""
        return self._policy

    @property
    def step_pins(self) -> int:
        """The number of hits that are pinned until `end_step`."""
        return len(self._step_pins)

    @property
    def usable(self) -> int:
        """The first so many rows may be taken. Grows up to the capacity, where memory becomes ready bit by bit."""
        return self._usable

    @usable.setter
    def usable(self, rows: int) -> None:
        self._usable = rows
        if self._asleep < min(rows, self._restored):
            self._wake()

    def note_changes(self) -> None:
        """From now on keep what becomes READY, and what is READY no more. The first change is what is READY now."""
        self._changes, self._key_of = [], [b""] * self.capacity
        for key, row in self._row_of.items():
            self._key_of[row] = key
        self._note_change(True, [row for row in self._row_of.values() if self._state[row] == READY])

    def keep_in(
        self,
        table: _native.Table,
        rows: Sequence[int],
        keys: Sequence[bytes],
        parents: Sequence[int],
        used_at: Sequence[int],
    ) -> None:
        """From now on keep the index in `table`, too. What it has restored is READY where rows are usable.

        The others are parallel: rows, ascending, and for each its key, the row of the block that this one continues or
        -1, and its last use in us of CLOCK_MONOTONIC.
        """
        self._table = table
        if not rows:
            return
        row_of = self._row_of
        row_of.update(zip(keys, rows, strict=True))
        if len(row_of) < len(rows):  # no owner stores a key twice
            twice = [row for row, key in zip(rows, keys, strict=True) if row_of[key] != row]
            table.withdraw(twice)
            row_of.clear()
            self.keep_in(table, *table.restore())
            return
        self._restored = self._fresh = rows[-1] + 1
        self._policy.restore(keys, rows, parents, used_at)
        for row in rows:
            self._state[row] = FILLING
            self._pins[row] = 1
        self.filling = len(rows)
        self._wake()

    def lose_table(self) -> None:
        """Touch the table no more."""
        self._table = None

    def leave_table(self) -> None:
        """Keep the table no longer. What is in it stays, for the next owner."""
        if self._table is not None and self._policy.used_at is not None:
            self._table.note_uses(self._policy.used_at, 0, self.capacity)
        self._table = None

    def take_changes(self) -> list[Change]:
        """What has changed since the last call, in order. `clear` is no change, and forgets those before it."""
        changes, self._changes = self._changes or [], None if self._changes is None else []
        return changes

    def state(self, key: bytes) -> int:
        """FREE (not here), FILLING or READY."""
        row = self._row_of.get(key, -1)
        return FREE if row < 0 else self._state[row]

    def pin_hit(self, key: bytes) -> bool:
        """Whether `key` is READY. If so, pin its row until `end_step`."""
        row = self._row_of.get(key, -1)
        if row < 0 or self._state[row] != READY:
            return False
        self._pins[row] += 1
        self._step_pins.append(row)
        return True

    def undo_last_hit(self) -> None:
        """Release the pin of the last `pin_hit` that returned True."""
        self.unpin([self._step_pins.pop()])

    def end_step(self) -> None:
        """Release the pins of this step's hits."""
        if self._step_pins:
            pinned, self._step_pins = self._step_pins, []
            self.unpin(pinned)
        self._steps += 1
        if self._table is not None and self._steps % _USES_STEPS == 0:
            self._note_uses(self._table)

    def _note_uses(self, table: _native.Table) -> None:
        """Copy some of the last uses to the table."""
        if self._policy.used_at is not None and table.is_intact():
            first = self._steps // _USES_STEPS * _USES % (-(-self.capacity // _USES) * _USES)
            table.note_uses(self._policy.used_at, first, min(_USES, self.capacity - first))

    def reserve(
        self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None, distinct: bool = False
    ) -> tuple[Sequence[bytes], list[int]]:
        """(new keys, their rows): those of `keys` that are not in the index; they are now FILLING and pinned once.

        `keys` are in the order of the sequence, as far as it is known. Takes free rows, then evicts. If rows run out,
        keys are left out, the last first: a prefix is useful without its end, but not the end without its prefix.
        Returns `keys` itself if all are new. distinct: the caller knows that no key comes twice.
        """
        row_of = self._row_of
        new = keys
        present: list[int] = []
        if not row_of.keys().isdisjoint(keys) or not (distinct or len(set(keys)) == len(keys)):
            new = [key for key in dict.fromkeys(keys) if key not in row_of]
            self.use([key for key in keys if key in row_of], sequence, order)
            present = [row_of[key] for key in keys if key in row_of]
            for row in present:  # so that they are not evicted for the rest of their job
                self._pins[row] += 1
        rows: list[int] | range = []
        try:  # a policy of the user's may raise
            rows = self._take_rows(len(new), sequence, order)
            if len(rows) < len(new):
                new = new[: len(rows)]
            if rows:
                self._policy.store(new, rows, sequence, order)
                if self._table is not None:  # before any byte changes
                    self._table.take(list(rows), new, self._policy.parent(rows[0]))
        except BaseException:
            for row in rows:
                self._free_row(row)
            raise
        finally:
            if present:
                self.unpin(present)
        if not rows:
            return new, []
        row_of.update(zip(new, rows, strict=True))
        if self._changes is not None:
            for key, row in zip(new, rows, strict=True):
                self._key_of[row] = key
        self.filling += len(rows)
        state, pins = self._state, self._pins
        if isinstance(rows, range):
            state[rows.start : rows.stop] = bytes([FILLING]) * len(rows)
            pins[rows.start : rows.stop] = [1] * len(rows)
            return new, list(rows)
        for row in rows:
            state[row] = FILLING
            pins[row] = 1
        return new, rows

    def mark_ready(self, rows: Collection[int]) -> None:
        """Mark `rows`, whose store succeeded, READY, and unpin them. A row whose key was dropped meanwhile is freed."""
        state = self._state
        filled = rows
        if self._orphans:
            filled = [row for row in rows if state[row] == FILLING]
            self.unpin([row for row in rows if state[row] != FILLING])
        if self._table is not None:
            self._table.publish(filled)
        pins, ready = self._pins, READY
        for row in filled:
            state[row] = ready
            pins[row] = 0  # a FILLING row has no pin but its store's
        self.filling -= len(filled)
        self._note_change(True, filled)
        self._policy.unpinned(filled)

    def pin_ready(self, keys: Sequence[bytes]) -> list[int]:
        """The rows of `keys` in order, pinned once each; -1 for a key that is not READY."""
        get, state, pins = self._row_of.get, self._state, self._pins
        rows = [get(key, -1) for key in keys]
        for at, row in enumerate(rows):
            if row >= 0 and state[row] == READY:
                pins[row] += 1
            else:
                rows[at] = -1
        return rows

    def unpin(self, rows: Collection[int]) -> None:
        """Take one pin off each of `rows`."""
        state, pins = self._state, self._pins
        for row in rows:
            pins[row] -= 1
        if self._orphans:
            for row in rows:
                if state[row] == ORPHAN and not pins[row]:
                    self._orphans -= 1
                    self._free_row(row)
        self._policy.unpinned(rows)

    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        """Count those of `keys` that are here as used by the sequence, in this order."""
        if not all(map(self._row_of.__contains__, keys)):
            keys = [key for key in keys if key in self._row_of]
        if keys:
            self._policy.use(keys, sequence, order)

    def finish(self, sequence: str, order: SequenceOrder | None = None) -> None:
        """Tell the policy that the sequence has ended; see EvictionPolicy.finish."""
        self._policy.finish(sequence, order)

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget `keys`; those not here are ignored."""
        for key in keys:
            row = self._row_of.get(key)
            if row is not None:
                if self._state[row] == READY:
                    self._note_change(False, (row,))
                    if self._table is not None:
                        self._table.withdraw([row])
                self._policy.remove(row)
                del self._row_of[key]
                self._orphan(row)

    def drop_filling(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """The store of `keys` into `rows` failed: forget the keys that still have these rows, and unpin the rows."""
        self.drop([key for key, row in zip(keys, rows, strict=True) if self._row_of.get(key) == row])
        self.unpin(rows)

    def clear(self) -> None:
        """Forget every key, and all that is in the table, for good. Pinned rows become free when they are unpinned."""
        if self._table is not None:
            self._table.begin_reset()
            self._table = None
        self._policy.clear()
        if self._changes is not None:
            self._changes.clear()
        rows = list(self._row_of.values())
        self._row_of.clear()
        for row in rows:
            self._orphan(row)

    def _take_rows(self, count: int, sequence: str | None, order: SequenceOrder | None) -> list[int] | range:
        """At most `count` rows: free ones, then fresh ones, then evicted ones. Adjoining rows are returned as a range,
        which costs less. Most are: sequences are stored from their start and evicted from their end.
        """
        rows: list[int] = []
        if self._free:
            rows = self._free[-count:] if count else []
            del self._free[len(self._free) - len(rows) :]
        fresh = range(self._fresh, self._fresh + max(0, min(count - len(rows), self.usable - self._fresh)))
        self._fresh = fresh.stop
        if len(fresh) == count:
            return fresh
        rows.extend(fresh)
        if len(rows) < count:
            try:
                evicted = self._policy.evict(count - len(rows), sequence, order)
            except BaseException:
                for row in rows:
                    self._free_row(row)
                raise
            self._note_change(False, evicted)
            rows.extend(reversed(evicted))
            self.evictions += len(evicted)
        adjoining = range(rows[0], rows[0] + len(rows)) if rows else range(0)
        return adjoining if rows == list(adjoining) else rows

    def _wake(self) -> None:
        """Make the restored blocks READY, and the rows between them free, that are usable by now."""
        rows = range(self._asleep, min(self._usable, self._restored))
        self._asleep = rows.stop
        self._free.extend(row for row in reversed(rows) if self._state[row] == FREE)
        self.mark_ready([row for row in rows if self._state[row] != FREE])

    def _note_change(self, is_stored: bool, rows: Collection[int]) -> None:
        if self._changes is not None and rows:
            self._changes.append(Change(is_stored, [self._key_of[row] for row in rows]))

    def _orphan(self, row: int) -> None:
        """The key of `row` was just removed: free the row, or make it an ORPHAN while it is pinned."""
        if self._state[row] == FILLING:
            self.filling -= 1
        if self._pins[row]:
            self._state[row] = ORPHAN
            self._orphans += 1
        else:
            self._free_row(row)

    def _free_row(self, row: int) -> None:
        self._state[row] = FREE
        self._free.append(row)
