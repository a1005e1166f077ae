"""Eviction policies: what every one must do, and R13 of the tier's own, also against a slow model of it."""

from __future__ import annotations

import heapq
import random
import sys
from collections.abc import Iterable, Sequence

import pytest

from async_tier.eviction import LeastRecentlyUsed
from async_tier.index import READY, BlockIndex
from async_tier.order import SequenceOrder
from benchmarks.bench.plain_lru import PlainLru

POLICIES = [LeastRecentlyUsed, PlainLru]


def names(text: str) -> list[bytes]:
    """One key for each word."""
    return [word.encode() for word in text.split()]


def blocks(name: str, *numbers: int) -> list[bytes]:
    """Keys of a request's own blocks: so many, or from one number up to another."""
    return [b"%s %d" % (name.encode(), number) for number in range(*numbers)]


def order_of(keys: str | Sequence[bytes]) -> SequenceOrder:
    """The order of a sequence of these blocks."""
    return SequenceOrder({key: place for place, key in enumerate(names(keys) if isinstance(keys, str) else keys)})


class Tier:
    """An index, of which requests are told by name; what a request stores is READY at once."""

    def __init__(self, capacity: int, policy: type = LeastRecentlyUsed) -> None:
        self.index = BlockIndex(capacity, policy)
        self.orders: dict[str, SequenceOrder] = {}

    def begin(self, request: str, keys: str | Sequence[bytes]) -> None:
        self.orders[request] = order_of(keys)

    def store(self, keys: str | Sequence[bytes], request: str | None = None) -> int:
        """Store those of `keys` that are not here; how many that were."""
        keys = names(keys) if isinstance(keys, str) else keys
        order, keys = self.orders.get(request or ""), list(keys)
        if order is not None:  # as BlockStore does
            keys = [keys[at] for at in order.permutation(keys)]
        new, rows = self.index.reserve(keys, request, order)
        self.index.mark_ready(rows)
        return len(new)

    def hit(self, keys: Sequence[bytes], request: str) -> int:
        """Look up until the first miss, to the end of the step; the hits."""
        hits = 0
        while hits < len(keys) and self.index.pin_hit(keys[hits]):
            hits += 1
        self.index.use(keys[:hits], request, self.orders.get(request))
        self.index.end_step()
        return hits

    def finish(self, request: str) -> None:
        self.index.finish(request, self.orders.pop(request, None))

    def run(self, request: str, keys: str | Sequence[bytes]) -> int:
        """A whole request, of which the tier is told only what it does not have; what it stored."""
        self.begin(request, keys)
        keys = names(keys) if isinstance(keys, str) else keys
        stored = self.store([key for key in keys if not self.index.state(key)], request)
        self.finish(request)
        return stored

    def holds(self, keys: Iterable[bytes]) -> int:
        return sum(self.index.state(key) == READY for key in keys)

    def here(self, text: str) -> str:
        return " ".join(word for word in text.split() if self.index.state(word.encode()))

    def eviction_order(self, text: str) -> str:
        """The words of `text` in the order in which they go when others are stored one by one."""
        gone: list[str] = []
        for turn in range(len(text.split())):
            self.store([b"other %d" % turn])
            gone += [word for word in text.split() if word not in gone and not self.here(word)]
        return " ".join(gone)


# ---------------------------------------------------------------------------------------- what every policy has to do


@pytest.fixture(params=POLICIES, ids=lambda policy: policy.__name__)
def policy(request):
    return request.param


def test_pinned_blocks_are_passed_over(policy):
    tier = Tier(3, policy)
    for name in names("a b c"):
        tier.store([name])
    assert tier.index.pin_hit(b"a")
    tier.store("d")
    assert tier.here("a b c d") == "a c d"
    tier.index.end_step()
    tier.store("e")
    assert tier.here("a c d e") == "c d e"


def test_pinned_blocks_do_not_hide_others(policy):
    tier = Tier(10_000, policy)
    old, young = blocks("old", 5000), blocks("young", 5000)
    for key in (*old, *young):
        tier.store([key])
    rows = tier.index.pin_ready(old)
    assert [tier.store([key]) for key in blocks("new", 20)] == [1] * 20
    assert tier.holds(old) == 5000
    tier.index.unpin(rows)
    tier.store(blocks("more", 40))
    assert tier.holds(old) == 4960, "they are the oldest again, once nothing pins them"


def test_when_everything_is_pinned_nothing_goes(policy):
    tier = Tier(4, policy)
    tier.store("a b c d")
    for name in names("a b c d"):
        tier.index.pin_hit(name)
    assert tier.store("e") == 0
    tier.index.end_step()
    assert tier.store("e") == 1


def test_for_a_request_nothing_goes_that_its_order_knows(policy):
    tier = Tier(5, policy)
    tier.run("turn 1", "a b c d")
    tier.store("x")
    tier.begin("turn 2", "a b c d e f g")
    assert tier.store("e f g", "turn 2") == 1
    assert tier.here("a b c d e f g x") == "a b c d e"


def test_blocks_offered_again_do_not_go_for_the_rest_of_their_job(policy):
    tier = Tier(2, policy)
    tier.store("a b")
    assert tier.store("a b c") == 0
    assert tier.here("a b c") == "a b"


def test_a_block_offered_again_counts_as_used(policy):
    tier = Tier(2, policy)
    tier.store("a", "turn 1")
    tier.store("x", "other")
    tier.store("a c", "turn 2")
    assert tier.here("a c x") == "a c"


def test_of_a_job_the_last_block_goes_first(policy):
    tier = Tier(4, policy)
    tier.begin("r", "a b c d")
    tier.store(set(names("c a d b")), "r")
    tier.finish("r")
    assert tier.eviction_order("a b c d") == "d c b a"


def test_unrelated_requests_go_by_their_end(policy):
    tier = Tier(6, policy)
    for request, keys in {"a": "a1 a2", "b": "b1 b2", "c": "c1 c2"}.items():
        tier.begin(request, keys)
        tier.store(keys, request)
    for request in "bca":
        tier.finish(request)
    assert tier.eviction_order("a1 a2 b1 b2 c1 c2") == "b2 b1 c2 c1 a2 a1"


def test_what_a_request_knows_counts_as_used_wherever_it_was_served_from(policy):
    tier = Tier(4, policy)
    tier.run("first", "a b")
    tier.store("x")
    tier.store("y")
    tier.run("again", "a b")  # the primary has it: the tier hears of its beginning and its end
    assert tier.eviction_order("a b x y") == "x y b a"


def test_a_finished_request_gives_its_name_back(policy):
    tier = Tier(4, policy)
    tier.store("a b", "r")
    tier.finish("r")
    tier.store("c d", "r")
    tier.store("e")
    assert tier.here("a b c d e") in ("a c d e", "b c d e")


def test_rows_of_blocks_that_are_forgotten_come_back(policy):
    tier = Tier(4, policy)
    tier.store("a b c d", "r")
    tier.index.drop(names("b d"))
    assert tier.store("e f g", "s") == 3
    tier.index.clear()
    assert tier.store("a b c d", "r") == 4
    assert tier.store("e f g h", "s") == 4


@pytest.mark.parametrize("method", ["store", "evict", "use"])
def test_a_policy_that_fails_loses_no_row_and_no_pin(monkeypatch, method):
    """It may be somebody else's."""
    tier = Tier(4, PlainLru)
    tier.store("a")

    def fail(*arguments):
        raise LookupError("out of luck")

    with monkeypatch.context() as broken:
        broken.setattr(PlainLru, method, fail)
        for _ in range(3):
            with pytest.raises(LookupError):
                tier.store("a b c d e")
    assert tier.index.rows_used == len(tier.index) == 1
    assert tier.store("f g h i") == 4


def test_what_is_kept_of_requests_that_never_end_is_bounded(policy, monkeypatch):
    monkeypatch.setattr(LeastRecentlyUsed, "MAX_SEQUENCES", 8)
    tier = Tier(4, policy)
    for number in range(100):
        tier.store(blocks("r", number, number + 1), f"request {number}")
        tier.hit(blocks("r", number, number + 1), f"request {number}")
    if policy is LeastRecentlyUsed:
        assert tier.index.policy.sequences <= LeastRecentlyUsed.MAX_SEQUENCES


def test_what_is_kept_of_a_block_that_is_left_bare_again_and_again_is_bounded(monkeypatch):
    kept, push = [], heapq.heappush
    monkeypatch.setattr(heapq, "heappush", lambda heap, entry: (push(heap, entry), kept.append(len(heap))))
    tier = Tier(4)
    tier.begin("r", "a b")
    tier.store("a", "r")
    for _ in range(50):
        tier.store("b", "r")
        tier.index.drop(names("b"))  # the store has failed
    assert len(kept) >= 50
    assert max(kept) <= 4 + 1


# ------------------------------------------------------------------- what only follows from "nothing that continues it"


def test_of_a_request_later_jobs_go_first():
    tier = Tier(6)
    tier.begin("r", "a b c d")
    tier.store("a b", "r")
    tier.store("x y")
    tier.store("c d", "r")
    assert tier.eviction_order("a b c d x y") == "y x d c b a"


def test_jobs_out_of_order_are_put_in_order():
    tier = Tier(4)
    tier.begin("r", "a b c d")
    tier.store("c d", "r")
    tier.store("a b", "r")
    assert tier.eviction_order("a b c d") == "d c b a"


def test_without_an_order_a_request_goes_by_its_jobs():
    tier = Tier(6)
    tier.store("a b", "r")
    tier.store("x y")
    tier.store("c d", "r")
    assert tier.eviction_order("a b c d x y") == "y x d c b a"


def test_a_request_without_an_order_is_used_when_it_ends_from_what_it_stored_last():
    tier = Tier(4)
    tier.store("a", "r")
    tier.store("b", "r")
    tier.store("x y")
    tier.finish("r")
    assert tier.eviction_order("a b x y") == "y x b a"


def test_for_a_request_without_an_order_its_earlier_jobs_do_not_go():
    tier = Tier(2)
    tier.store("a", "r")
    tier.store("b", "r")
    assert tier.store("c", "r") == 0
    assert tier.here("a b c") == "a b"


def test_a_gap_does_not_part_what_follows_from_what_comes_before():
    tier = Tier(5)
    tier.begin("r", "a b c d e")
    tier.store("a b", "r")
    tier.store("x y")
    tier.store("e", "r")  # the rest was refused
    assert tier.eviction_order("a b e x y") == "y x e b a"


def test_several_kv_groups_are_one_sequence():
    tier = Tier(8)
    tier.orders["r"] = SequenceOrder({b"a1": 16, b"a2": 32, b"a3": 48, b"b1": 16, b"b2": 32, b"b3": 48})
    tier.store("a1 b1", "r")
    tier.store("x y")
    tier.store("a2 b2", "r")
    tier.store("a3 b3", "r")
    gone = tier.eviction_order("a1 b1 a2 b2 a3 b3 x y").split()
    assert gone[:2] == ["y", "x"]
    assert [set(gone[at : at + 2]) for at in (2, 4, 6)] == [{"a3", "b3"}, {"a2", "b2"}, {"a1", "b1"}]


def test_a_running_request_takes_room_from_a_stranger_that_shares_its_beginning():
    tier = Tier(100)
    shared = blocks("system", 2)
    mine = [*shared, *blocks("A", 40)]
    theirs = [*shared, *blocks("B", 96)]
    tier.begin("A", mine)
    tier.store(mine[:4], "A")
    assert tier.run("B", theirs) == 96
    assert tier.store(mine[4:], "A") == 38
    tier.finish("A")
    assert tier.holds(theirs) == 2 + 58
    tier.begin("A, turn 2", mine)
    assert tier.hit(mine, "A, turn 2") == 42


def test_a_running_request_takes_room_from_many_strangers_that_share_its_beginning():
    tier = Tier(100)
    shared = blocks("system", 2)
    mine = [*shared, *blocks("mine", 22)]
    tier.begin("mine", mine)
    tier.store(mine[:4], "mine")
    for number in range(48):
        assert tier.run(f"stranger {number}", [*shared, *blocks(f"stranger {number}", 2)]) == 2
    assert tier.store(mine[4:], "mine") == 20
    assert tier.holds(mine) == 24


def test_a_long_request_keeps_no_stranger_alive():
    tier = Tier(200)
    shared = blocks("system", 2)
    mine = [*shared, *blocks("long", 18)]
    tier.begin("long", mine)
    tier.store(mine[:2], "long")
    strangers = [[*shared, *blocks(f"stranger {number}", 9)] for number in range(10)]
    for number, keys in enumerate(strangers):
        tier.run(f"stranger {number}", keys)
    talks = [blocks(f"conversation {number}", 9) for number in range(10)]
    for number, keys in enumerate(talks):
        tier.run(f"conversation {number}", keys)
    for at in range(2, 20):
        assert tier.store(mine[at : at + 1], "long") == 1
    tier.store(blocks("new", 90))
    assert sum(map(tier.holds, strangers)) == 10 * 2, "used before, so they went before; the system prompt is in use"
    assert sum(map(tier.holds, talks)) == 90
    assert tier.holds(mine) == 20


def test_a_prefix_hit_in_the_primary_outlives_what_was_hit_in_the_tier():
    tier = Tier(12)
    prompt = blocks("prompt", 8)
    tier.run("turn 1", prompt)
    tier.begin("turn 2", [*prompt, b"question"])
    assert tier.hit(prompt[4:], "turn 2") == 4  # those before are in the primary
    tier.store(blocks("other", 4))
    tier.store(blocks("more", 6))
    assert [tier.holds([key]) for key in prompt] == [1] * 2 + [0] * 6


def test_a_start_that_a_second_turn_takes_over_outlives_what_the_first_goes_on_with():
    tier = Tier(6)
    tier.begin("turn 1", "a b c d e f")
    tier.store("a b c", "turn 1")
    tier.run("turn 2", "a b x")
    tier.store("d e", "turn 1")
    assert tier.eviction_order("a b c d e") == "e d c b"


@pytest.mark.parametrize("sharers", [2, 65, 300])
def test_a_beginning_outlives_what_follows_it_however_many_share_it(sharers):
    tier = Tier(2 + 2 * sharers)
    shared = blocks("system", 2)
    for number in range(sharers):
        tier.begin(f"r{number}", [*shared, *blocks(f"r{number}", 2)])
        tier.store([*shared, *blocks(f"r{number}", 1)], f"r{number}")
    for number in range(sharers):
        tier.store(blocks(f"r{number}", 1, 2), f"r{number}")
    assert tier.store(blocks("new", 2 * sharers)) == 2 * sharers
    assert tier.holds(shared) == 2


def test_a_prompt_that_the_primary_always_serves_outlives_what_is_used_once():
    tier = Tier(50)
    prompt = blocks("prompt", 5)
    tier.run("first", prompt)
    for number in range(25):
        tier.run(f"again {number}", prompt)
        tier.run(f"once {number}", blocks(f"once {number}", 10))
    assert tier.holds(prompt) == 5


def test_of_a_job_of_which_the_middle_is_gone_the_end_still_goes_first():
    tier = Tier(4)
    tier.begin("r", "a b c")
    tier.store("a b c", "r")
    tier.index.drop(names("b"))
    tier.store("x")
    tier.store("y")
    assert tier.eviction_order("a c") == "c a"


def test_a_name_that_comes_again_without_an_end_has_nothing_of_the_request_before():
    tier = Tier(4)
    tier.begin("r", "x")
    tier.store("x", "r")
    tier.begin("r", "a b")
    tier.store("b", "r")
    tier.store("y")
    assert tier.eviction_order("x b y") == "x b"


def test_a_parent_that_is_gone_is_no_parent_in_its_next_life():
    tier = Tier(4)
    tier.store("a b", "r")
    tier.index.drop(names("a"))
    tier.store("x")  # has the row that was a's
    tier.store("a c")
    assert tier.eviction_order("a b c x") == "b x c a"


def test_what_is_left_bare_twice_goes_once():
    tier = Tier(4)
    tier.begin("r", "a b c")
    tier.store("a", "r")
    tier.store("x y")
    for name in names("b c"):  # their stores fail
        tier.store([name], "r")
        tier.index.drop([name])
    tier.store("z")
    assert tier.store("new1 new2 new3 new4") == 4
    assert tier.index.rows_used == 4


def test_a_pinned_end_keeps_what_comes_before_it():
    tier = Tier(4)
    tier.store("x")
    tier.store("a b c", "r")
    tier.index.pin_hit(b"c")
    assert tier.store("d") == 1
    assert tier.store("e") == 1
    assert tier.here("a b c d e x") == "a b c e"
    tier.index.end_step()
    assert tier.eviction_order("a b c e") == "c b a e"


def test_orders_that_contradict_each_other_keep_no_block_for_ever():
    tier = Tier(6)
    tier.begin("r1", "a b c d")
    tier.begin("r2", "d c b a")
    tier.store("a c", "r1")
    tier.store("d b", "r2")
    tier.index.use(names("b a"), "r1", tier.orders["r1"])
    tier.store("a b", "r2")
    assert tier.store(blocks("new", 6)) == 6


# ------------------------------------------------------------------------------------------- R1: what a call depends on


def calls_of(call) -> int:
    """The calls of functions that `call` makes, Python's and C's."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


class Counted(dict):
    """Notes how many of its keys were looked at from the end."""

    seen = 0

    def __reversed__(self):
        for key in super().__reversed__():
            self.seen += 1
            yield key


def test_r1_what_comes_before_the_end_of_a_sequence_is_known_without_looking_at_all_of_it():
    places = Counted({key: 16 * at for at, key in enumerate(blocks("r", 1000), start=1)})
    order = SequenceOrder(places)
    assert next(order.preceding(b"r 999")) == b"r 998"
    assert places.seen < 10
    assert list(order)[:3] == blocks("r", 3)
    assert next(order.following(b"r 5")) == b"r 5"
    assert places.seen < 10


def test_an_order_is_right_as_vllm_notes_places():
    """One KV group after the other, more when the request grows, and now and then a boundary within a block."""
    draw = random.Random(1)
    for _ in range(300):
        groups = draw.choice([1, 1, 2, 3])
        tokens = [draw.choice([16, 16, 32]) for _ in range(groups)]
        places: dict[bytes, int] = {}
        order = SequenceOrder(places)
        length = 0
        for _ in range(draw.randint(1, 4)):
            length += draw.randint(1, 200)
            for group in range(groups):
                for end in range(tokens[group], length + 1, tokens[group]):
                    places.setdefault(b"%04d %d" % (end, group), end)
            if draw.random() < 0.2:
                for group in range(groups):
                    places[b"%04d boundary %d" % (length, group)] = length
            expected = sorted(places, key=lambda key: (places[key], key))
            assert list(order) == expected
            for at, key in enumerate(expected):
                assert list(order.preceding(key)) == expected[:at][::-1]
                assert list(order.following(key)) == expected[at:]
    assert list(order.preceding(b"unknown")) == []
    assert list(order.following(b"unknown")) == [b"unknown"]


def test_an_order_is_right_whatever_way_its_places_are_noted():
    draw = random.Random(2)
    for _ in range(300):
        noted = blocks("r", draw.randint(1, 12))
        draw.shuffle(noted)
        places: dict[bytes, int] = {}
        order = SequenceOrder(places)
        for key in noted:
            places[key] = draw.choice([draw.randint(0, 6), 2 * len(places)])
            if draw.random() < 0.3:
                list(order)
        expected = sorted(places, key=lambda key: (places[key], key))
        assert list(order) == expected
        for key in noted:  # nothing raises, and what comes before is before
            assert all(order.precedes(each, key) for each in order.preceding(key))
            assert next(order.following(key)) == key


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_r1_a_store_of_one_block_takes_as_much_behind_any_prefix(held, is_full):
    def measure(prefix: int) -> int:
        tier = Tier(prefix + 200)
        keys = blocks("r", prefix + 1)
        if held:
            tier.run("before", keys[:-1])
        if is_full:
            tier.store(blocks("other", prefix + 200))
        tier.begin("r", keys)
        return calls_of(lambda: tier.index.reserve(keys[-1:], "r", tier.orders["r"]))

    assert measure(20_000) <= 2 * measure(100)


def test_r1_a_store_that_is_refused_takes_as_much_behind_any_prefix():
    def measure(prefix: int) -> int:
        tier = Tier(prefix)
        keys = blocks("r", prefix + 1)
        tier.begin("r", keys)
        tier.store(keys[:-1], "r")
        counts = [calls_of(lambda: tier.store(keys[-1:], "r")) for _ in range(3)]
        assert tier.holds(keys[-1:]) == 0
        return max(counts)

    assert measure(20_000) <= measure(100) + 4


def test_r1_pins_are_met_once():
    tier = Tier(2000)
    for key in blocks("pinned", 1000):
        tier.store([key])
    for key in blocks("other", 1000):
        tier.store([key])
    rows = tier.index.pin_ready(blocks("pinned", 1000))
    first, *later = (calls_of(lambda key=key: tier.store([key])) for key in blocks("new", 20))
    assert max(later) < 100 < first
    tier.index.unpin(rows)


# ------------------------------------------------------------------------------------------------- R13, a slow model


class Block:
    def __init__(self, behind: bytes | None, used: tuple[int, int]) -> None:
        self.behind = behind
        self.used = used


class Model:
    """R13, as plainly as can be: every question is answered by looking at all blocks."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[bytes, Block] = {}
        self.pins: dict[bytes, int] = {}
        self.last: dict[str, bytes] = {}
        self.time = 0

    def now(self, keys: Sequence[bytes]) -> Iterable[tuple[bytes, tuple[int, int]]]:
        """`keys`, in order, with when each is used from now on: the first is the newest."""
        self.time += 1
        return [(key, (self.time, -at)) for at, key in enumerate(keys)]

    def store(self, keys: list[bytes], request: str, order: list[bytes]) -> list[bytes]:
        keys = sorted(keys, key=order.index)  # `order`: by place, then by key
        present = [key for key in keys if key in self.held]
        new = [key for key in keys if key not in self.held]
        if present:
            self.use(present, request)
        room = self.capacity - len(self.held)
        while room < len(new) and (victim := self.victim({*order, *present})) is not None:
            del self.held[victim]
            room += 1
        new = new[:room]
        if not new:
            return []
        before = [key for key in order[: order.index(new[0])] if key in self.held]
        behind = before[-1] if before else None
        for key, used in self.now(new):
            self.held[key] = Block(behind, used)
            behind = key
        return new

    def victim(self, kept: set[bytes]) -> bytes | None:
        continued = {block.behind for block in self.held.values()}
        candidates = [key for key in self.held if key not in continued and key not in kept and not self.pins.get(key)]
        return min(candidates, key=lambda key: self.held[key].used, default=None)

    def use(self, keys: Sequence[bytes], request: str) -> None:
        for key, used in self.now(keys):
            self.held[key].used = used

    def finish(self, order: list[bytes]) -> None:
        for key, used in self.now([key for key in order if key in self.held]):
            self.held[key].used = used

    def drop(self, key: bytes) -> None:
        """A block that is stored again is not what others were stored behind."""
        if self.held.pop(key, None) is not None:
            for block in self.held.values():
                if block.behind == key:
                    block.behind = None


class History:
    """Random requests: they share beginnings, go on with others' turns, are preempted, or never end."""

    GROUPS = 2

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        capacity = self.draw.choice([8, 20, 60])
        self.groups = self.draw.choice([1, self.GROUPS])
        self.index = BlockIndex(capacity)
        self.model = Model(capacity)
        self.prompts: list[list[int]] = [[]]
        self.fresh = iter(range(1 << 30))
        self.open: dict[str, tuple[list[bytes], dict[bytes, int]]] = {}
        self.progress: dict[str, int] = {}
        self.loads: list[tuple[list[bytes], list[int]]] = []
        self.evictions = self.refusals = 0

    def begin(self) -> None:
        prompt = self.draw.choice(self.prompts[-12:])
        prompt = prompt[: self.draw.randint(0, len(prompt))] if self.draw.random() < 0.5 else list(prompt)
        prompt += [next(self.fresh) for _ in range(self.draw.randint(0 if prompt else 1, 8))]
        self.prompts.append(prompt)
        name = f"request {next(self.fresh)}"
        order = [b"%d of group %d" % (number, group) for number in prompt for group in range(self.groups)]
        # As vLLM notes them: one group after the other.
        places = {key: at // self.groups for at, key in enumerate(order)}
        noted = sorted(order, key=lambda key: order.index(key) % self.groups)
        self.open[name] = (order, {key: places[key] for key in noted})
        self.orders[name] = SequenceOrder(self.open[name][1])
        # What the GPU or the primary has of it is not told to the tier.
        self.progress[name] = self.draw.randint(0, len(prompt)) if self.draw.random() < 0.5 else 0

    orders: dict[str, SequenceOrder]

    def store(self) -> None:
        name = self.draw.choice(list(self.open))
        order, _ = self.open[name]
        start = self.progress[name] * self.groups
        end = min(len(order), start + self.draw.randint(1, 5) * self.groups)
        if start >= end:
            return
        keys = order[start:end]
        if self.draw.random() < 0.2:  # the primary had some of them
            keys = [key for key in keys if self.draw.random() < 0.6] or keys
        self.progress[name] = end // self.groups
        before = set(self.model.held)
        expected = self.model.store(keys, name, order)
        self.draw.shuffle(keys)
        keys = [keys[at] for at in self.orders[name].permutation(keys)]
        new, rows = self.index.reserve(keys, name, self.orders[name], True)
        assert sorted(new) == sorted(expected)
        self.index.mark_ready(rows)
        gone = before - set(self.model.held)
        assert not gone & set(order), "R13: a request lost what its own order knows to its own store"
        self.evictions += len(gone)
        self.refusals += len(keys) > len(new) + len(before & set(keys))

    def hit(self) -> None:
        """The tier is asked from some block on: those before it are in the primary."""
        name = self.draw.choice(list(self.open))
        order, _ = self.open[name]
        start = self.draw.randint(0, len(order)) if self.draw.random() < 0.5 else 0
        hits = []
        for key in order[start:]:
            if key not in self.model.held:
                break
            hits.append(key)
        if hits:
            self.model.use(hits, name)
            self.index.use(hits, name, self.orders[name])
        self.progress[name] = max(self.progress[name], (start + len(hits)) // self.groups)

    def resume(self) -> None:
        """A preempted request begins again, and offers what it has offered."""
        self.progress[self.draw.choice(list(self.open))] = 0

    def finish(self) -> None:
        name = self.draw.choice(list(self.open))
        order, _ = self.open.pop(name)
        self.model.finish(order)
        self.index.finish(name, self.orders.pop(name))

    def load(self) -> None:
        if not self.model.held:
            return
        keys = self.draw.sample(sorted(self.model.held), self.draw.randint(1, min(4, len(self.model.held))))
        self.loads.append((keys, self.index.pin_ready(keys)))
        for key in keys:
            self.model.pins[key] = self.model.pins.get(key, 0) + 1

    def end_load(self) -> None:
        if not self.loads:
            return
        keys, rows = self.loads.pop(self.draw.randrange(len(self.loads)))
        for key in keys:
            self.model.pins[key] -= 1
        self.index.unpin(rows)
        if self.draw.random() < 0.1 and not any(self.model.pins.get(key) for key in keys):
            for key in keys:  # it failed
                self.model.drop(key)
            self.index.drop(keys)

    def drop(self) -> None:
        """A load of blocks has failed, in the middle of a sequence, perhaps."""
        free = sorted(key for key in self.model.held if not self.model.pins.get(key))
        if free and self.draw.random() < 0.5:
            keys = self.draw.sample(free, min(len(free), self.draw.randint(1, 3)))
            for key in keys:
                self.model.drop(key)
            self.index.drop(keys)

    def run(self, steps: int) -> None:
        self.orders = {}
        actions = [self.store] * 8 + [self.hit] * 4 + [self.finish] * 2
        actions += [self.load, self.end_load, self.resume, self.drop]
        for _ in range(steps):
            if not self.open or (len(self.open) < 6 and self.draw.random() < 0.3):
                self.begin()
            self.draw.choice(actions)()
            assert all(map(self.index.state, self.model.held))
            assert len(self.index) + self.index.filling == len(self.model.held)


@pytest.mark.parametrize("seed", range(60))
def test_r13_holds_over_random_histories_against_a_slow_model(seed):
    History(seed).run(600)


def test_the_histories_reach_what_they_are_for():
    histories = [History(seed) for seed in range(20)]
    for history in histories:
        history.run(300)
    assert {history.groups for history in histories} == {1, 2}
    assert sum(history.evictions for history in histories) > 1000
    assert sum(history.refusals for history in histories) > 20
