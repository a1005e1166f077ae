"""BlockIndex: which row holds which block. Pure Python: no memory, no streams.

    reserve        FILLING   a row is taken and its copy is on the way; not found by `lookup`
    fill           READY     the bytes are there
    drop, evict    FREE      the key is gone; the row comes back when nothing pins it (ORPHAN until then)

A *pin* is a reason not to reuse a row: the store that fills it, a load that reads it, a hit of this step. A row is
reused only without a pin, whatever becomes of its key.

What grows with the number of blocks is one dict of bytes to int and flat lists, no object a block: a full garbage
collection walks references, and the dict not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from async_tier.eviction import EvictionPolicy, LeastRecentlyUsed
from async_tier.order import SequenceOrder

FREE, FILLING, READY, ORPHAN = range(4)


class BlockIndex:
    """Keys (bytes) to rows (0 to `capacity` - 1), with pins and an eviction policy."""

    def __init__(self, capacity: int, policy: Callable[..., EvictionPolicy] = LeastRecentlyUsed) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 row, not {capacity}")
        self.capacity = capacity
        # Rows from the first on that may be taken. Grows up to the capacity, where memory is made ready bit by bit.
        self.usable = capacity
        self.evictions = 0
        self.filling = 0
        self._orphans = 0
        self._row_of: dict[bytes, int] = {}
        self._state = bytearray(capacity)
        self._pins = [0] * capacity
        # Rows never used yet, from here on; then rows given back.
        self._fresh = 0
        self._free: list[int] = []
        self._step_pins: list[int] = []
        self._policy = policy(self._row_of, self._pins)

    def __len__(self) -> int:
        """The number of READY blocks."""
        return len(self._row_of) - self.filling

    @property
    def rows_used(self) -> int:
        """Rows that are not free: READY, FILLING, or orphaned and still being copied."""
        return self._fresh - len(self._free)

    @property
    def policy(self) -> EvictionPolicy:
        """What decides which block goes."""
        return self._policy

    def state(self, key: bytes) -> int:
        """FREE (not here), FILLING or READY."""
        row = self._row_of.get(key, -1)
        return FREE if row < 0 else self._state[row]

    def pin_hit(self, key: bytes) -> bool:
        """Whether `key` is READY; then it stays loadable until `end_step`."""
        row = self._row_of.get(key, -1)
        if row < 0 or self._state[row] != READY:
            return False
        self._pins[row] += 1
        self._step_pins.append(row)
        return True

    def withdraw_hit(self) -> None:
        """The last `pin_hit` that answered yes is not to be."""
        self.unpin([self._step_pins.pop()])

    def end_step(self) -> None:
        """Release the pins of this step's hits."""
        if self._step_pins:
            pinned, self._step_pins = self._step_pins, []
            self.unpin(pinned)

    def reserve(
        self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None, distinct: bool = False
    ) -> tuple[Sequence[bytes], list[int]]:
        """(new keys, their rows): those of `keys` that are neither here nor on their way, now FILLING and pinned once.

        `keys` come as in the sequence, as far as that is known. Takes free rows, then evicts. Keys for which there is
        no row are left out, the last first: a prefix without its end is of use, an end without its prefix is not. The
        new keys are `keys` itself where all are new. distinct: no key is known to come twice.
        """
        row_of = self._row_of
        new = keys
        present: list[int] = []
        if not row_of.keys().isdisjoint(keys) or not (distinct or len(set(keys)) == len(keys)):
            new = [key for key in dict.fromkeys(keys) if key not in row_of]
            self.use([key for key in keys if key in row_of], sequence, order)
            present = [row_of[key] for key in keys if key in row_of]
            for row in present:  # not to go for the rest of their job
                self._pins[row] += 1
        rows: list[int] | range = []
        try:  # the policy may be somebody else's
            rows = self._take(len(new), sequence, order)
            if len(rows) < len(new):
                new = new[: len(rows)]
            if rows:
                self._policy.store(new, rows, sequence, order)
        except BaseException:
            for row in rows:
                self._give_back(row)
            raise
        finally:
            if present:
                self.unpin(present)
        if not rows:
            return new, []
        row_of.update(zip(new, rows, strict=True))
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

    def fill(self, rows: Collection[int]) -> None:
        """The store that filled `rows` has ended well: READY, unless the key was dropped meanwhile."""
        state = self._state
        filled = rows
        if self._orphans:
            filled = [row for row in rows if state[row] == FILLING]
            self.unpin([row for row in rows if state[row] != FILLING])
        pins, ready = self._pins, READY
        for row in filled:
            state[row] = ready
            pins[row] = 0  # only its store pins a row that is FILLING
        self.filling -= len(filled)
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
                    self._give_back(row)
        self._policy.unpinned(rows)

    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        """Those of `keys` that are here were used by the sequence, in the order given if `order` does not say."""
        if not all(map(self._row_of.__contains__, keys)):
            keys = [key for key in keys if key in self._row_of]
        if keys:
            self._policy.use(keys, sequence, order)

    def finish(self, sequence: str, order: SequenceOrder | None = None) -> None:
        """The sequence is over; see EvictionPolicy.finish."""
        self._policy.finish(sequence, order)

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget `keys`; those not here are passed over."""
        for key in keys:
            row = self._row_of.get(key)
            if row is not None:
                self._policy.remove(row)
                del self._row_of[key]
                self._orphan(row)

    def drop_filling(self, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """The store of `keys` into `rows` has ended badly: forget those that are still its, and unpin the rows."""
        self.drop([key for key, row in zip(keys, rows, strict=True) if self._row_of.get(key) == row])
        self.unpin(rows)

    def clear(self) -> None:
        """Forget every key. Rows with a pin come back when it is taken off."""
        self._policy.clear()
        rows = list(self._row_of.values())
        self._row_of.clear()
        for row in rows:
            self._orphan(row)

    def _take(self, count: int, sequence: str | None, order: SequenceOrder | None) -> list[int] | range:
        """At most `count` rows: given back, fresh, evicted. As a range if they adjoin each other, which is written to
        as a slice: fresh ones do, and most that go, because a sequence is stored from its start and goes from its end.
        """
        rows: list[int] = []
        if self._free:
            rows = self._free[-count:] if count else []
            del self._free[len(self._free) - len(rows) :]
        fresh = range(self._fresh, self._fresh + min(count - len(rows), self.usable - self._fresh))
        self._fresh = fresh.stop
        if len(fresh) == count:
            return fresh
        rows.extend(fresh)
        if len(rows) < count:
            try:
                evicted = self._policy.evict(count - len(rows), sequence, order)
            except BaseException:
                for row in rows:
                    self._give_back(row)
                raise
            rows.extend(reversed(evicted))
            self.evictions += len(evicted)
        adjoining = range(rows[0], rows[0] + len(rows)) if rows else range(0)
        return adjoining if rows == list(adjoining) else rows

    def _orphan(self, row: int) -> None:
        """The key of `row` has just left."""
        if self._state[row] == FILLING:
            self.filling -= 1
        if self._pins[row]:
            self._state[row] = ORPHAN
            self._orphans += 1
        else:
            self._give_back(row)

    def _give_back(self, row: int) -> None:
        self._state[row] = FREE
        self._free.append(row)
