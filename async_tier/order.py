"""SequenceOrder: what is known of the order of a sequence's blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from itertools import islice


class SequenceOrder:
    """The order of a sequence's blocks: by place, and of one place (blocks of several KV groups) by key.

    places: key -> its place in the sequence (vLLM: the end token's). Kept, not copied: whoever owns it adds to it.

    Of one KV group vLLM notes all blocks in order, at even places. A dict whose ends say so is taken as it is, and then
    nothing here takes longer for a longer sequence, but for some ns a block to get to its middle. Else keys are sorted,
    each once.
    """

    def __init__(self, places: dict[bytes, int]) -> None:
        self._places = places
        # The place of a key, or None if it is not known.
        self.position = places.get
        # All keys as far as they were sorted, and their places.
        self._keys: list[bytes] = []
        self._sorted_places: list[int] = []

    def note(self, keys: Collection[bytes]) -> None:
        """`keys` are all of a KV group so far, from the start of the sequence on."""
        self._places.update(zip(keys, range(len(keys)), strict=True))

    @property
    def last_noted(self) -> bytes | None:
        """The key that was added last: of several KV groups, one of the last group."""
        return next(reversed(self._places), None)

    def __iter__(self) -> Iterator[bytes]:
        """All keys, from the start of the sequence on."""
        step, places = self._step(), self._places.values()
        if step and list(places) == list(range(next(iter(places)), next(reversed(places)) + 1, step)):
            return iter(self._places)
        self._sort()
        return iter(self._keys)

    def precedes(self, one: bytes, other: bytes) -> bool:
        """Whether `one` is known to come before `other`."""
        place, other_place = self.position(one), self.position(other)
        return place is not None and other_place is not None and (place, one) < (other_place, other)

    def preceding(self, key: bytes) -> Iterator[bytes]:
        """The keys that come before `key`, the nearest first; none if its place is not known."""
        place = self.position(key)
        if place is None:
            return iter(())
        if step := self._step():
            behind = (next(reversed(self._places.values())) - place) // step
            return islice(reversed(self._places), behind + 1, None)
        return map(self._keys.__getitem__, range(self._index(place, key) - 1, -1, -1))

    def following(self, key: bytes) -> Iterator[bytes]:
        """`key` and those that come after it, in order; `key` alone if its place is not known."""
        place = self.position(key)
        if place is None:
            return iter((key,))
        if step := self._step():
            return islice(self._places, (place - next(iter(self._places.values()))) // step, None)
        return map(self._keys.__getitem__, range(self._index(place, key), len(self._keys)))

    def sort(self, keys: Sequence[bytes], rows: Sequence[int] = ()) -> tuple[Sequence[bytes], Sequence[int]]:
        """`keys` in order, those of unknown place last as they are given, and as many `rows`, or none, with them."""
        if len(keys) == 1:
            return keys, rows
        triples = list(zip(map(self.position, keys), keys, rows or keys, strict=True))
        try:
            triples.sort()
        except TypeError:  # None does not compare
            known = sorted(triple for triple in triples if triple[0] is not None)
            triples = known + [triple for triple in triples if triple[0] is None]
        if triples[0][0] is None:  # nothing is known
            return keys, rows
        _, sorted_keys, sorted_rows = zip(*triples, strict=True)
        return sorted_keys, sorted_rows

    def _step(self) -> int:
        """The distance of neighbours if the dict is in order, at even places; else 0."""
        places = self._places.values()
        if len(places) < 2:
            return len(places)
        last, before = islice(reversed(places), 2)
        step = last - before
        return step if step > 0 and last - next(iter(places)) == step * (len(places) - 1) else 0

    def _index(self, place: int, key: bytes) -> int:
        """Where `key` is among all keys, sorted."""
        self._sort()
        at = bisect_left(self._sorted_places, place)
        while at < len(self._keys) and self._sorted_places[at] == place and self._keys[at] < key:
            at += 1
        return at

    def _sort(self) -> None:
        """Take in the keys that are new since the last time."""
        new = len(self._places) - len(self._keys)
        if not new:
            return
        added = sorted(
            zip(islice(reversed(self._places.values()), new), islice(reversed(self._places), new), strict=True)
        )
        if self._keys and added[0] < (self._sorted_places[-1], self._keys[-1]):
            added = sorted([*zip(self._sorted_places, self._keys, strict=True), *added])
            self._sorted_places, self._keys = [], []
        self._sorted_places += [place for place, _ in added]
        self._keys += [key for _, key in added]
