"""SequenceOrder: what is known about the order of a sequence's blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from itertools import islice


class SequenceOrder:
    """The order of a sequence's blocks: by place, and at the same place (blocks of several KV groups) by key.

    places: for each key its place in the sequence (in vLLM, that of its last token). The dict is kept, not copied: its
    owner adds to it.

    With one KV group, vLLM notes all blocks in order, at evenly spaced places. If the ends of the dict look like
    that, it is used as it is, and no method takes longer for a longer sequence, except some ns per block to walk to the
    middle. Otherwise the keys are sorted, each once.
    """

    _CHUNK = 128  # keys that `preceding` takes at once from the middle of the dict
    _MAX_INSERTS = 8  # late keys that are inserted one by one; more are sorted in together

    def __init__(self, places: dict[bytes, int]) -> None:
        self._places = places
        # position(key): its place, or None if unknown.
        self.position = places.get
        self._is_one_group = False
        # The keys that were sorted so far, and their places.
        self._keys: list[bytes] = []
        self._sorted_places: list[int] = []

    def note(self, keys: Collection[bytes]) -> None:
        """Learn the order from `keys`: all blocks of one KV group so far, from the start of the sequence."""
        self._places.update(zip(keys, range(len(keys)), strict=True))

    @property
    def last_noted(self) -> bytes | None:
        """The key that was added last: with several KV groups, one of the last group."""
        return next(reversed(self._places), None)

    def __iter__(self) -> Iterator[bytes]:
        """All keys, from the start of the sequence."""
        spacing, places = self._spacing(), self._places.values()
        if spacing and list(places) == list(range(next(iter(places)), next(reversed(places)) + 1, spacing)):
            return iter(self._places)
        self._sort()
        return iter(self._keys)

    def precedes(self, one: bytes, other: bytes) -> bool:
        """Whether `one` is known to come before `other`."""
        place, other_place = self.position(one), self.position(other)
        return place is not None and other_place is not None and (place, one) < (other_place, other)

    def begins_with(self, key: bytes) -> bool:
        """Whether nothing comes before `key`; False may also mean that this is unknown."""
        return key == next(iter(self._places), None) and self._spacing() > 0

    def is_next(self, one: bytes, other: bytes) -> bool:
        """Whether `other` comes right after `one`; False may also mean that this is unknown."""
        place, spacing = self.position(one), self._spacing()
        return place is not None and spacing > 0 and self.position(other) == place + spacing

    def preceding(self, key: bytes) -> Iterator[bytes]:
        """The keys that come before `key`, the nearest first; none if its place is unknown."""
        place, spacing = self.position(key), self._spacing()
        if place is None:
            return
        expected = place
        if spacing:
            count, first = len(self._places), next(iter(self._places.values()))
            at = (place - first) // spacing
            if 0 <= at < count // 2:  # from the nearer end of the dict
                nearest = reversed(list(islice(self._places, max(0, at - self._CHUNK), at + 1)))
            else:
                nearest = islice(reversed(self._places), max(0, count - 1 - at), None)
            for each in nearest:
                if self._places[each] != expected or (each == key) != (expected == place):
                    break  # not evenly spaced, although the ends looked like it
                if each != key:
                    yield each
                expected -= spacing
            if expected < first:
                return
        for at in range(self._index(place, key) - 1, -1, -1):
            if not spacing or self._sorted_places[at] <= expected:
                yield self._keys[at]

    def following(self, key: bytes) -> Iterator[bytes]:
        """`key` and the keys after it, in order; `key` alone if its place is unknown."""
        place, spacing = self.position(key), self._spacing()
        if place is None:
            return iter((key,))
        if spacing:
            at = max(0, (place - next(iter(self._places.values()))) // spacing)
            if next(islice(self._places, at, None), None) == key:
                return islice(self._places, at, None)
        return map(self._keys.__getitem__, range(self._index(place, key), len(self._keys)))

    def permutation(self, keys: Sequence[bytes]) -> Sequence[int]:
        """Indexes into `keys` in the order of the sequence; keys of unknown place last, in the order given."""
        places = list(map(self.position, keys))
        if self._is_one_group or (self._spacing() and not self._keys):
            self._is_one_group = True  # no two blocks will ever share a place
            if None not in places:
                return sorted(range(len(keys)), key=places.__getitem__)  # type: ignore[arg-type]

        def place(at: int) -> tuple[object, ...]:
            return (True,) if places[at] is None else (False, places[at], keys[at])

        return sorted(range(len(keys)), key=place)

    def _spacing(self) -> int:
        """The distance between neighbours if the dict's ends look evenly spaced; otherwise 0."""
        places = self._places.values()
        if len(places) < 2:
            return len(places)
        last, before = islice(reversed(places), 2)
        spacing = last - before
        return spacing if spacing > 0 and last - next(iter(places)) == spacing * (len(places) - 1) else 0

    def _index(self, place: int, key: bytes) -> int:
        """The index of `key` among all keys, sorted."""
        self._sort()
        return self._place_of(place, key)

    def _place_of(self, place: int, key: bytes) -> int:
        """The index that `key` has, or would have, among the keys sorted so far."""
        at = bisect_left(self._sorted_places, place)
        while at < len(self._keys) and self._sorted_places[at] == place and self._keys[at] < key:
            at += 1
        return at

    def _sort(self) -> None:
        """Sort in the keys that were added since the last call."""
        new = len(self._places) - len(self._keys)
        if not new:
            return
        added = sorted(
            zip(islice(reversed(self._places.values()), new), islice(reversed(self._places), new), strict=True)
        )
        if self._keys and added[0] < (self._sorted_places[-1], self._keys[-1]):
            if len(added) > self._MAX_INSERTS:
                added = sorted([*zip(self._sorted_places, self._keys, strict=True), *added])
                self._sorted_places, self._keys = [], []
            else:
                for place, key in added:
                    at = self._place_of(place, key)
                    self._sorted_places.insert(at, place)
                    self._keys.insert(at, key)
                return
        self._sorted_places += [place for place, _ in added]
        self._keys += [key for _, key in added]
