"""PlainLru: the least recently used block goes, whatever continues it. What the tier's own policy is measured against.

Named in a tier's configuration as "benchmarks.bench.plain_lru:PlainLru".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from async_tier.eviction import EvictionPolicy
from async_tier.order import SequenceOrder


class PlainLru(EvictionPolicy):
    """Blocks by their last use: when a sequence stores them, hits them or, wherever they came from, ends.

    Of one use the last block of the sequence is the oldest: tail first.
    """

    def __init__(self, rows: dict[bytes, int], pins: Sequence[int]) -> None:
        super().__init__(rows, pins)
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._key_of: list[bytes | None] = [None] * len(pins)

    def store(
        self, keys: Sequence[bytes], rows: Sequence[int], sequence: str | None, order: SequenceOrder | None
    ) -> None:
        for key, row in zip(keys, rows, strict=True):
            self._key_of[row] = key
        for key in reversed(keys):
            self._keys[key] = None

    def use(self, keys: Sequence[bytes], sequence: str | None, order: SequenceOrder | None) -> None:
        for key in reversed(keys):
            self._keys.move_to_end(key)

    def evict(self, count: int, sequence: str | None, order: SequenceOrder | None) -> list[int]:
        known = order.position if order is not None else dict[bytes, int]().get
        victims: list[bytes] = []
        for key in self._keys:
            if len(victims) == count:
                break
            if not self._pins[self._rows[key]] and known(key) is None:
                victims.append(key)
        for key in victims:
            del self._keys[key]
        return [self._rows.pop(key) for key in victims]

    def remove(self, row: int) -> None:
        key = self._key_of[row]
        assert key is not None
        del self._keys[key]

    def finish(self, sequence: str, order: SequenceOrder | None) -> None:
        for key in reversed(list(order or ())):
            if key in self._keys:
                self._keys.move_to_end(key)

    def clear(self) -> None:
        self._keys.clear()
