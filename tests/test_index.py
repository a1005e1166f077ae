"""BlockIndex and its eviction policy: no vLLM, no memory, no streams."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_tier.eviction import LeastRecentlyUsed
from async_tier.index import FREE, READY, BlockIndex


def names(text: str) -> list[bytes]:
    """One key for each word."""
    return [word.encode() for word in text.split()]


class Order:
    """The order of a sequence, told."""

    def __init__(self, text: str) -> None:
        self.names = names(text)

    def position(self, key: bytes) -> int | None:
        return self.names.index(key) if key in self.names else None

    def before(self, keys: list[bytes]) -> list[bytes]:
        return self.names[: min((self.names.index(key) for key in keys if key in self.names), default=0)]


def put(index: BlockIndex, text: str, sequence: str | None = None, order: Order | None = None) -> dict[bytes, int]:
    """Store, and be done."""
    new, rows = index.reserve(names(text), sequence, order)
    index.fill(rows)
    return dict(zip(new, rows, strict=True))


def here(index: BlockIndex, text: str) -> str:
    return " ".join(word for word in text.split() if index.state(word.encode()) == READY)


def eviction_order(index: BlockIndex, text: str) -> str:
    """The words of `text` in the order in which they go when others are stored one by one."""
    gone: list[str] = []
    for turn in range(len(text.split())):
        put(index, f"other{turn}")
        gone += [word for word in text.split() if word not in gone and not here(index, word)]
    return " ".join(gone)


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


def test_pinned_blocks_are_passed_over():
    index = BlockIndex(3)
    put(index, "a")
    put(index, "b")
    put(index, "c")
    assert index.pin_hit(b"a")
    put(index, "d")
    assert here(index, "a b c d") == "a c d"
    index.end_step()
    put(index, "e")
    assert here(index, "a c d e") == "c d e"


def test_a_pinned_end_of_a_sequence_does_not_protect_the_rest_of_the_tier():
    index = BlockIndex(3)
    put(index, "a b c", "r")
    index.pin_hit(b"c")
    put(index, "d")
    assert here(index, "a b c d") == "a c d"


def test_out_of_order_jobs_are_put_in_order_by_position():
    index = BlockIndex(4)
    order = Order("a b c d")
    put(index, "c d", "r", order)
    put(index, "a b", "r", order)
    assert eviction_order(index, "a b c d") == "d c b a"


def test_a_prefix_used_by_another_sequence_stays_newer_than_what_follows_it():
    index = BlockIndex(6)
    put(index, "a b c", "r1")
    put(index, "x y")
    index.use(names("a b"), "r2", None)
    put(index, "d", "r1")
    assert eviction_order(index, "a b c d x y") == "y x d c b a"


def test_a_prefix_moved_away_whole_is_found_by_the_order():
    index = BlockIndex(6)
    order = Order("a b c d")
    put(index, "a b", "r1", order)
    put(index, "x y")
    index.use(names("a b"), "r2", order)
    put(index, "c d", "r1", order)
    assert eviction_order(index, "a b c d x y") == "y x d c b a"


def test_prefixes_that_point_at_each_other_end():
    index = BlockIndex(8)
    put(index, "a b", "r1")
    put(index, "c d", "r2")
    index.use(names("a"), "r2", None)
    index.use(names("c"), "r1", None)
    put(index, "e", "r1")
    put(index, "f", "r2")
    index.use(names("b"), "r1", None)
    assert len(index) == 6


@pytest.mark.parametrize("other", ["", "x"])
def test_a_full_tier_does_not_give_up_a_prefix_for_what_follows_it(other):
    index = BlockIndex(4 if not other else 5)
    order = Order("a b c d e f")
    put(index, "a b c d", "turn 1", Order("a b c d"))
    index.finish("turn 1")
    if other:
        put(index, other)
    put(index, "e f", "turn 2", order)
    assert here(index, "a b c d e f x") == ("a b c d e" if other else "a b c d")


def test_blocks_offered_again_are_not_evicted_for_the_rest_of_their_job():
    index = BlockIndex(2)
    order = Order("a b c")
    put(index, "a b", "turn 1", order)
    index.finish("turn 1")
    put(index, "a b c", "turn 2", order)
    assert here(index, "a b c") == "a b"


def test_a_block_offered_again_counts_as_used_also_without_an_order():
    index = BlockIndex(2)
    put(index, "a", "turn 1")
    index.finish("turn 1")
    put(index, "x", "other")
    put(index, "a c", "turn 2")
    assert here(index, "a c x") == "a c"


def test_a_shared_beginning_does_not_keep_the_rest_of_another_sequence():
    index = BlockIndex(4)
    put(index, "s a1 a2", "a", Order("s a1 a2"))
    index.finish("a")
    put(index, "b1 b2 b3", "b", Order("s b1 b2 b3"))
    assert here(index, "s a1 a2 b1 b2 b3") == "s b1 b2 b3"


def test_the_search_for_a_victim_is_bounded_when_everything_is_pinned(monkeypatch):
    monkeypatch.setattr(LeastRecentlyUsed, "_MAX_PINNED_SEEN", 3)
    index = BlockIndex(9)
    for name in names("a b c d e"):
        put(index, name.decode())
    put(index, "f g h i", "long")
    for name in names("a b c d e"):
        index.pin_hit(name)
    assert put(index, "j") == {}
    index.end_step()
    assert len(put(index, "j")) == 1


def test_stale_entries_do_not_pile_up():
    index = BlockIndex(100)
    put(index, " ".join(f"k{at}" for at in range(100)), "long")
    for turn in range(200):
        index.use([f"k{at}".encode() for at in range(1, 100)], f"r{turn}", None)
        index.finish(f"r{turn}")
    policy = index._policy
    assert sum(len(run.keys) for run in policy._runs) <= 2 * 100 + len(policy._runs) * policy._STALE_SLACK
    assert len(policy._runs) <= 100
    assert policy._open.keys() <= {"long"}


def test_a_finished_sequence_gives_its_name_back():
    index = BlockIndex(4)
    put(index, "a b", "r")
    index.finish("r")
    put(index, "c d", "r")
    put(index, "e")
    assert here(index, "a b c d e") == "a c d e"


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least 1 row, not 0"):
        BlockIndex(0)


KEYS = st.lists(st.integers(0, 30).map(lambda number: b"%d" % number), max_size=6)
SEQUENCES = st.sampled_from([None, "r1", "r2", "r3"])


class IndexMachine(RuleBasedStateMachine):
    """Any order of calls, as a tier makes them, against a plain account of who holds what."""

    CAPACITY = 7

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(self.CAPACITY)
        self.stores: list[dict[bytes, int]] = []
        self.loads: list[list[int]] = []

    @rule(keys=KEYS, sequence=SEQUENCES)
    def reserve(self, keys, sequence):
        pinned = [row for row, pins in enumerate(self.index._pins) if pins]
        pins = list(self.index._pins)
        here = {key: self.index.state(key) for key in keys}
        taken = dict(zip(*self.index.reserve(keys, sequence, None), strict=True))
        assert not set(taken.values()) & set(pinned), "a pinned row was reused"
        assert all(here[key] == FREE for key in taken)
        assert len(set(taken.values())) == len(taken)
        assert all(self.index._pins[row] == pins[row] for row in pinned)
        self.stores.append(taken)

    @precondition(lambda self: self.stores)
    @rule(data=st.data(), well=st.booleans())
    def end_store(self, data, well):
        taken = self.stores.pop(data.draw(st.integers(0, len(self.stores) - 1)))
        if well:
            self.index.fill(taken.values())
        else:
            self.index.drop_filling(list(taken), list(taken.values()))
            assert all(self.index._row_of.get(key) != row for key, row in taken.items())

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
            assert self.index.pin_hit(key) == (self.index.state(key) == READY)

    @rule()
    def end_step(self):
        self.index.end_step()

    @rule(sequence=st.sampled_from(["r1", "r2", "r3"]))
    def finish(self, sequence):
        self.index.finish(sequence)

    @rule()
    def clear(self):
        self.index.clear()
        assert len(self.index) == 0

    @invariant()
    def accounts_agree(self):
        index = self.index
        held = list(index._row_of.values())
        assert len(set(held)) == len(held)
        assert len(set(index._free)) == len(index._free)
        assert not set(held) & set(index._free)
        expected = [0] * self.CAPACITY
        for rows in [*(taken.values() for taken in self.stores), *self.loads, index._step_pins]:
            for row in rows:
                expected[row] += 1
        assert index._pins == expected
        filling = sum(1 for key in index._row_of if index.state(key) != READY)
        assert index.filling == filling
        used = set(held) | {row for row, pins in enumerate(expected) if pins}
        assert index.rows_used == len(used)
        policy = index._policy
        assert sum(run.live for run in policy._runs) == len(held)
        assert all(run.live > 0 for run in policy._runs)
        for key, row in index._row_of.items():
            assert key in policy._run_of[row].keys


IndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestIndexMachine = IndexMachine.TestCase
