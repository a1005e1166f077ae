"""BlockIndex: no vLLM, no memory, no streams. What policies do is in test_eviction.py."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_tier.eviction import LeastRecentlyUsed
from async_tier.index import FREE, READY, BlockIndex
from async_tier.order import SequenceOrder
from benchmarks.bench.plain_lru import PlainLru


def names(text: str) -> list[bytes]:
    """One key for each word."""
    return [word.encode() for word in text.split()]


def Order(text: str) -> SequenceOrder:
    """The order of a sequence."""
    return SequenceOrder({key: place for place, key in enumerate(names(text))})


def put(index: BlockIndex, text: str, sequence: str | None = None, order: Order | None = None) -> dict[bytes, int]:
    """Store, and be done."""
    keys = names(text)
    if order is not None:  # as BlockStore does
        keys = [keys[at] for at in order.permutation(keys)]
    new, rows = index.reserve(keys, sequence, order)
    index.mark_ready(rows)
    return dict(zip(new, rows, strict=True))


def here(index: BlockIndex, text: str) -> str:
    return " ".join(word for word in text.split() if index.state(word.encode()) == READY)


def test_rows_are_used_once_and_come_back():
    index = BlockIndex(4)
    rows = put(index, "a b c d")
    assert sorted(rows.values()) == [0, 1, 2, 3]
    index.drop(names("b"))
    assert put(index, "e") == {b"e": rows[b"b"]}
    assert len(index) == 4
    assert index.evictions == 0


def test_a_key_offered_twice_in_one_job_takes_one_row():
    index = BlockIndex(4)
    assert len(put(index, "a a b")) == 2
    assert index.rows_used == 2


def test_keys_here_or_on_their_way_are_not_reserved_again():
    index = BlockIndex(4)
    put(index, "a")
    index.reserve(names("b"), None, None)
    assert index.reserve(names("a b c"), None, None)[0] == names("c")


def test_a_prefix_is_kept_where_not_all_fits():
    index = BlockIndex(2)
    assert set(put(index, "c a d b", "r", Order("a b c d"))) == set(names("a b"))


def test_keys_of_unknown_place_are_left_out_first():
    index = BlockIndex(2)
    assert set(put(index, "x b a", "r", Order("a b"))) == set(names("a b"))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least 1 row, not 0"):
        BlockIndex(0)


KEYS = st.lists(st.integers(0, 30).map(lambda number: b"%d" % number), max_size=6)
SEQUENCES = st.sampled_from([None, "r1", "r2", "r3"])


class IndexMachine(RuleBasedStateMachine):
    """Any order of calls, as a tier makes them, against a plain account of who holds what."""

    CAPACITY = 7

    policy = LeastRecentlyUsed

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(self.CAPACITY, self.make_policy)
        self.stores: list[dict[bytes, int]] = []
        self.loads: list[list[int]] = []
        self.hits: list[int] = []

    def make_policy(self, row_of, pins):
        """The policy, which is handed the index's own account."""
        self.row_of, self.pins = row_of, pins
        return self.policy(row_of, pins)

    @rule(keys=KEYS, sequence=SEQUENCES)
    def reserve(self, keys, sequence):
        pins = list(self.pins)
        pinned = [row for row, count in enumerate(pins) if count]
        here = {key: self.index.state(key) for key in keys}
        taken = dict(zip(*self.index.reserve(keys, sequence, None), strict=True))
        assert not set(taken.values()) & set(pinned), "a pinned row was reused"
        assert all(here[key] == FREE for key in taken)
        assert len(set(taken.values())) == len(taken)
        assert all(self.pins[row] == pins[row] for row in pinned)
        self.stores.append(taken)

    @precondition(lambda self: self.stores)
    @rule(data=st.data(), well=st.booleans())
    def end_store(self, data, well):
        taken = self.stores.pop(data.draw(st.integers(0, len(self.stores) - 1)))
        if well:
            self.index.mark_ready(taken.values())
        else:
            self.index.drop_filling(list(taken), list(taken.values()))
            assert all(self.row_of.get(key) != row for key, row in taken.items())

    @rule(keys=KEYS)
    def start_load(self, keys):
        rows = self.index.pin_ready(keys)
        for key, row in zip(keys, rows, strict=True):
            assert (row >= 0) == (self.index.state(key) == READY)
        self.loads.append([row for row in rows if row >= 0])

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def end_load(self, data):
        self.index.unpin(self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1))))

    @rule(keys=KEYS)
    def drop(self, keys):
        self.index.drop(keys)
        assert all(self.index.state(key) == FREE for key in keys)

    @rule(keys=KEYS, sequence=SEQUENCES)
    def use(self, keys, sequence):
        self.index.use(keys, sequence, None)

    @rule(keys=KEYS)
    def hit(self, keys):
        for key in keys:
            is_hit = self.index.pin_hit(key)
            assert is_hit == (self.index.state(key) == READY)
            if is_hit:
                self.hits.append(self.row_of[key])

    @rule()
    def end_step(self):
        self.index.end_step()
        self.hits.clear()

    @rule(sequence=st.sampled_from(["r1", "r2", "r3"]))
    def finish(self, sequence):
        self.index.finish(sequence, None)

    @rule()
    def clear(self):
        self.index.clear()
        assert len(self.index) == 0

    @invariant()
    def accounts_agree(self):
        index = self.index
        held = list(self.row_of.values())
        assert len(set(held)) == len(held)
        expected = [0] * self.CAPACITY
        for rows in [*(taken.values() for taken in self.stores), *self.loads, self.hits]:
            for row in rows:
                expected[row] += 1
        assert self.pins == expected
        filling = sum(1 for key in self.row_of if index.state(key) != READY)
        assert index.filling == filling
        used = set(held) | {row for row, pins in enumerate(expected) if pins}
        assert index.rows_used == len(used)

    def teardown(self):
        """No block is lost to the policy: with nothing pinned, all rows can be had."""
        self.index.end_step()
        for rows in self.loads:
            self.index.unpin(rows)
        for taken in self.stores:
            self.index.mark_ready(taken.values())
        _, rows = self.index.reserve([b"new %d" % at for at in range(self.CAPACITY)], None, None)
        assert sorted(rows) == list(range(self.CAPACITY))


class PlainIndexMachine(IndexMachine):
    policy = PlainLru


IndexMachine.TestCase.settings = PlainIndexMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
TestIndexMachine = IndexMachine.TestCase
TestPlainIndexMachine = PlainIndexMachine.TestCase
