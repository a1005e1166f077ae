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

    # Keys taken at once from the middle of the dict; and late ones that are put in one by one.
    _NEAR = 128
    _FEW = 8

    def __init__(self, places: dict[bytes, int]) -> None:
        self._places = places
        # The place of a key, or None if it is not known.
        self.position = places.get
        self._is_one_group = False
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

    def begins_with(self, key: bytes) -> bool:
        """Whether nothing comes before `key`; False may also mean that it is not known."""
        return key == next(iter(self._places), None) and self._step() > 0

    def is_next(self, one: bytes, other: bytes) -> bool:
        """Whether `other` is known to come right behind `one`; False may also mean that it is not known."""
        place, step = self.position(one), self._step()
        return place is not None and step > 0 and self.position(other) == place + step

    def preceding(self, key: bytes) -> Iterator[bytes]:
        """The keys that come before `key`, the nearest first; none if its place is not known."""
        place, step = self.position(key), self._step()
        if place is None:
            return
        expected = place
        if step:
            count, first = len(self._places), next(iter(self._places.values()))
            at = (place - first) // step
            if 0 <= at < count // 2:  # from the nearer end of the dict
                nearest = reversed(list(islice(self._places, max(0, at - self._NEAR), at + 1)))
            else:
                nearest = islice(reversed(self._places), max(0, count - 1 - at), None)
            for each in nearest:
                if self._places[each] != expected or (each == key) != (expected == place):
                    break  # its ends have deceived us
                if each != key:
                    yield each
                expected -= step
            if expected < first:
                return
        for at in range(self._index(place, key) - 1, -1, -1):
            if not step or self._sorted_places[at] <= expected:
                yield self._keys[at]

    def following(self, key: bytes) -> Iterator[bytes]:
        """`key` and those that come after it, in order; `key` alone if its place is not known."""
        place, step = self.position(key), self._step()
        if place is None:
            return iter((key,))
        if step:
            at = max(0, (place - next(iter(self._places.values()))) // step)
            if next(islice(self._places, at, None), None) == key:
                return islice(self._places, at, None)
        return map(self._keys.__getitem__, range(self._index(place, key), len(self._keys)))

    def permutation(self, keys: Sequence[bytes]) -> Sequence[int]:
        """The numbers of `keys` as they come in the sequence, those of unknown place last as they are given."""
        places = list(map(self.position, keys))
        if self._is_one_group or (self._step() and not self._keys):
            self._is_one_group = True  # no two blocks have one place, whatever is added
            if None not in places:
                return sorted(range(len(keys)), key=places.__getitem__)  # type: ignore[arg-type]

        def place(at: int) -> tuple[object, ...]:
            return (True,) if places[at] is None else (False, places[at], keys[at])

        return sorted(range(len(keys)), key=place)

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
        return self._place_of(place, key)

    def _place_of(self, place: int, key: bytes) -> int:
        """Where `key` is, or would be, among those that are sorted."""
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
            if len(added) > self._FEW:
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
