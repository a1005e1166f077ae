"""SequenceOrder: what is known of the order of a sequence's blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from operator import itemgetter


class SequenceOrder:
    """The order of a sequence's blocks: by place, and of one place (blocks of several KV groups) by key.

    places: key -> its place in the sequence (vLLM: the end token's). Kept, not copied: whoever owns it adds to it.
    """

    # Of an order with more keys than this that were not sorted yet, the last ones are looked at first: a request stores
    # what it has just computed, and sorting its keys takes some 50 ns for each.
    _LONG, _NEAR = 1024, 64

    def __init__(self, places: dict[bytes, int]) -> None:
        self._places = places
        # The place of a key, or None if it is not known.
        self.position = places.get
        # All keys as far as they were needed, sorted, and their places.
        self._keys: list[bytes] = []
        self._sorted_places: list[int] = []

    def __iter__(self) -> Iterator[bytes]:
        """All keys, from the start of the sequence on."""
        self._sort()
        return iter(self._keys)

    def note(self, keys: Collection[bytes]) -> None:
        """`keys` are all of a KV group so far, from the start of the sequence on."""
        self._places.update(zip(keys, range(len(keys)), strict=True))

    def precedes(self, one: bytes, other: bytes) -> bool:
        """Whether `one` is known to come before `other`."""
        place, other_place = self.position(one), self.position(other)
        return place is not None and other_place is not None and (place, one) < (other_place, other)

    def preceding(self, key: bytes) -> Iterator[bytes]:
        """The keys that come before `key`, the nearest first; none if its place is not known.

        For a key near the end, what that takes does not depend on the number of keys; else they are sorted once.
        """
        place = self.position(key)
        if place is None:
            return
        if len(self._places) - len(self._keys) > self._LONG:
            last = [(at, each) for each, at in islice(reversed(self._places.items()), self._NEAR)]
            before = sorted([each for each in last if each < (place, key)])
            if before and (place, key) in last:
                yield from map(itemgetter(1), reversed(before))
                return
        self._sort()
        yield from map(self._keys.__getitem__, range(self._index(place, key) - 1, -1, -1))

    @property
    def last_noted(self) -> bytes | None:
        """The key that was added last: of several KV groups, one of the last group."""
        return next(reversed(self._places), None)

    def following(self, key: bytes) -> Iterator[bytes]:
        """`key` and those that come after it, in order; `key` alone if its place is not known."""
        place = self.position(key)
        if place is None:
            return iter((key,))
        self._sort()
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
        if triples[-1][0] is None and triples[0][0] is None:  # nothing is known
            return keys, rows
        _, sorted_keys, sorted_rows = zip(*triples, strict=True)
        return sorted_keys, sorted_rows

    def _index(self, place: int, key: bytes) -> int:
        """Where `key` is among all that are sorted."""
        at = bisect_left(self._sorted_places, place)
        while at < len(self._keys) and self._sorted_places[at] == place and self._keys[at] < key:
            at += 1
        return at

    def _sort(self) -> None:
        """Take in the keys that are new since the last time."""
        new = len(self._places) - len(self._keys)
        if not new:
            return
        keys = list(islice(reversed(self._places), new))[::-1]
        places = [self._places[key] for key in keys]
        if places != sorted(set(places)):  # of several KV groups, one's keys are noted after the other's
            places, keys = map(list, zip(*sorted(zip(places, keys, strict=True)), strict=True))
        if self._keys and (places[0], keys[0]) < (self._sorted_places[-1], self._keys[-1]):
            places, keys = self._sorted_places + places, self._keys + keys
            self._sorted_places, self._keys = map(list, zip(*sorted(zip(places, keys, strict=True)), strict=True))
        else:
            self._keys += keys
            self._sorted_places += places
