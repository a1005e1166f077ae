"""Which block goes when a row is needed: the interface, and least-recently-used by sequence.

A policy knows keys and rows, no memory and no jobs. Another policy is one small class over `EvictionPolicy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol


class SequenceOrder(Protocol):
    """What is known of the order of a sequence's blocks."""

    def position(self, key: bytes) -> int | None:
        """The place of `key` in the sequence, or None if it is not known. Only compared, within one sequence."""

    def before(self, keys: Sequence[bytes]) -> Iterable[bytes]:
        """The keys known to come before all of `keys`, in order."""


class EvictionPolicy(ABC):
    """Told what is stored and used, asked what to evict.

    `rows` maps the keys held to their rows, `pins` counts by row what forbids to evict it. The index owns both; a
    policy only takes out of `rows` what it evicts. A `sequence` is a request's name, or None for blocks of none.
    """

    def __init__(self, rows: dict[bytes, int], pins: Sequence[int]) -> None:
        self._rows = rows
        self._pins = pins

    @abstractmethod
    def prepare(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        """`keys`, at least one and all new, are about to be stored: what they are of use with counts as used."""

    @abstractmethod
    def store(
        self, keys: Sequence[bytes], rows: Sequence[int], sequence: str | None, order: SequenceOrder | None
    ) -> None:
        """`keys`, at least one and all new, are being stored into `rows` for the sequence."""

    @abstractmethod
    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        """`keys`, all in `rows`, were used by the sequence."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """The block in `row` is leaving `rows`, not by `evict`."""

    @abstractmethod
    def evict(self, count: int, sequence: str | None) -> list[int]:
        """Take at most `count` keys without a pin out of `rows`, worst first; the rows they had.

        To make room for blocks of the sequence, which are stored into these rows next.
        """

    @abstractmethod
    def finish(self, sequence: str) -> None:
        """No more will be stored for the sequence; its name may come again for another."""

    @abstractmethod
    def clear(self) -> None:
        """Every key is leaving `rows`."""


class _Run:
    """Blocks of one sequence, from its start on. Entries whose row has another run are stale, and skipped."""

    __slots__ = ("keys", "live", "prefix", "sequence")

    def __init__(self, sequence: str | None) -> None:
        self.sequence = sequence
        self.keys: list[bytes] = []
        self.live = 0
        # The run that holds what comes before this one's blocks, if they are not all here.
        self.prefix: _Run | None = None


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts the sequence that was used least recently, from its end.

    A prefix is of use only from its start, so order within a sequence is by position and recency is a property of
    whole sequences:

        oldest run                    newest run
        [a0 a1 a2 a3]  [b0 b1 b2]  [c0 c1]
                   ^ evicted first

    - A block belongs to the run of the sequence that stored or used it last.
    - A later job of a sequence puts its blocks behind the earlier ones and makes the whole run the newest; it never
      evicts blocks of its own sequence or of its prefix.
    - When a run becomes the newest, the run that holds its prefix becomes newer still.

    Cost per block: an append and a few list accesses; moving a run is O(1).
    """

    # Pinned blocks were used just now and are among the newest, so a search that has met this many of them has seen
    # what there is. It bounds what a store costs the scheduler while everything is in flight: some 0.2 ms.
    _MAX_PINNED_SEEN = 4096
    # A run is rid of its stale entries when they are as many as the live ones and more than this.
    _STALE_SLACK = 32
    # How far a chain of prefixes is followed: turns of a conversation, in practice a few.
    _MAX_PREFIX_CHAIN = 64

    def __init__(self, rows: dict[bytes, int], pins: Sequence[int]) -> None:
        super().__init__(rows, pins)
        self._runs: OrderedDict[_Run, None] = OrderedDict()
        self._open: dict[str, _Run] = {}
        self._run_of: list[_Run | None] = [None] * len(pins)

    def prepare(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        if not sequence or order is None or sequence in self._open:
            return
        # The first we hear of the sequence. What comes before these blocks was used, but the primary or the GPU had it.
        here = [key for key in order.before(keys) if key in self._rows]
        if here:
            self.use(here, sequence, order)

    def store(
        self, keys: Sequence[bytes], rows: Sequence[int], sequence: str | None, order: SequenceOrder | None
    ) -> None:
        run = self._run(sequence)
        self._append(run, keys, order)
        run_of = self._run_of
        for row in rows:
            run_of[row] = run
        run.live += len(keys)
        self._renew(run)

    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        run = self._run(sequence)
        rows, run_of = self._rows, self._run_of
        moved = []
        left: dict[_Run, int] = {}
        for key in keys:
            row = rows[key]
            old = run_of[row]
            if old is not run:
                run_of[row] = run
                moved.append(key)
                if old is not None:
                    left[old] = left.get(old, 0) + 1
        for old, count in left.items():
            old.prefix = run  # what stays there comes after what moved
            self._leave(old, count)
        if moved:
            self._append(run, moved, order)
            run.live += len(moved)
        self._renew(run)

    def remove(self, row: int) -> None:
        run = self._run_of[row]
        if run is not None:
            self._run_of[row] = None
            self._leave(run)

    def evict(self, count: int, sequence: str | None) -> list[int]:
        own = self._chain(self._open.get(sequence) if sequence else None)
        freed: list[int] = []
        emptied = []
        pinned_seen = 0
        rows, pins, run_of = self._rows, self._pins, self._run_of
        for run in self._runs:
            if len(freed) >= count or pinned_seen > self._MAX_PINNED_SEEN:
                break
            if run in own:
                continue
            keys = run.keys
            if run.live == len(keys) and (end := self._pop_end(keys, count - len(freed))):
                freed += end
                run.live -= len(end)
                if run.live == 0:
                    emptied.append(run)
                continue
            pinned: list[bytes] = []  # evictable later, and then in the same order
            before = len(freed)
            while keys and len(freed) < count and pinned_seen + len(pinned) <= self._MAX_PINNED_SEEN:
                key = keys.pop()
                row = rows.pop(key, -1)  # almost always a victim: one access instead of two
                if row < 0:
                    continue
                if run_of[row] is run and not pins[row]:
                    freed.append(row)
                    continue
                rows[key] = row
                if run_of[row] is run:
                    pinned.append(key)
            keys.extend(reversed(pinned))
            pinned_seen += len(pinned)
            run.live -= len(freed) - before
            if run.live == 0:
                emptied.append(run)
        for run in emptied:
            self._drop(run)
        return freed

    def _pop_end(self, keys: list[bytes], most: int) -> list[int]:
        """Take the last of a run's keys, none of them stale, out of `rows`: their rows, or none if one has a pin.

        What nearly every victim is, in a few calls and not a few for each.
        """
        end = keys[: -most - 1 : -1]
        freed = list(map(self._rows.pop, end))
        if any(map(self._pins.__getitem__, freed)):
            self._rows.update(zip(end, freed, strict=True))
            return []
        del keys[-len(end) :]
        return freed

    def finish(self, sequence: str) -> None:
        run = self._open.pop(sequence, None)
        if run is not None:
            run.sequence = None

    def clear(self) -> None:
        for run in self._runs:  # break cycles of prefixes
            run.prefix = None
        self._runs.clear()
        self._open.clear()
        self._run_of = [None] * len(self._pins)

    def _run(self, sequence: str | None) -> _Run:
        """The open run of the sequence; a new one for None, or if there is none."""
        run = self._open.get(sequence) if sequence else None
        if run is None:
            run = _Run(sequence)
            self._runs[run] = None
            if sequence:
                self._open[sequence] = run
        return run

    def _append(self, run: _Run, keys: Sequence[bytes], order: SequenceOrder | None) -> None:
        """Put `keys` where they belong in `run`: by position if all are known, else behind what is there."""
        if order is None:
            run.keys.extend(keys)
            return
        try:
            keys = sorted(keys, key=order.position)  # type: ignore[arg-type]
        except TypeError:  # None does not compare: not all are known
            run.keys.extend(keys)
            return
        if not run.keys:
            run.keys = keys
            return
        last = order.position(run.keys[-1])
        run.keys.extend(keys)
        if last is not None and (first := order.position(keys[0])) is not None and first < last:
            # Out of order, as with sliding windows. Keys of unknown place keep to the start.
            run.keys.sort(key=lambda key: -1 if (place := order.position(key)) is None else place)

    def _renew(self, run: _Run) -> None:
        """Make `run` the newest, and what it follows newer than it."""
        if run.live == 0:
            self._drop(run)
            return
        for link in self._chain(run) if run.prefix is not None else (run,):
            self._runs.move_to_end(link)

    def _chain(self, run: _Run | None) -> dict[_Run, None]:
        """`run`, the run that holds what comes before it, and so on, in this order."""
        chain: dict[_Run, None] = {}
        while run is not None and run in self._runs and run not in chain and len(chain) < self._MAX_PREFIX_CHAIN:
            chain[run] = None
            run = run.prefix
        return chain

    def _leave(self, run: _Run, count: int = 1) -> None:
        """So many blocks of `run` are its no more; their entries are stale."""
        run.live -= count
        if run.live == 0:
            self._drop(run)
        elif len(run.keys) > 2 * run.live + self._STALE_SLACK:
            rows, run_of = self._rows, self._run_of
            run.keys = [key for key in run.keys if (row := rows.get(key)) is not None and run_of[row] is run]

    def _drop(self, run: _Run) -> None:
        del self._runs[run]
        run.prefix = None
        run.keys.clear()
        if run.sequence is not None and self._open.get(run.sequence) is run:
            del self._open[run.sequence]
