"""Promises (R15): what lookups may tell vLLM of at once. No vLLM; under its engine they are in test_pressure.py."""

from __future__ import annotations

import random

import pytest

from async_tier.order import SequenceOrder
from async_tier.vllm import promises
from async_tier.vllm.promises import (
    KEEP,
    MAX_RENEWALS,
    PATIENCE_STEPS,
    REFUSE,
    RESUMED_STEPS,
    STALE_STEPS,
    WAIT,
    Promises,
)


def blocks(request: str, count: int, group: int = 0) -> list[bytes]:
    return [b"%s %06d %d" % (request.encode(), number, group) for number in range(count)]


def group_of(key: bytes) -> int:
    return int(key.rsplit(b" ", 1)[1])


class Scheduler:
    """vLLM, as far as promises see it: a primary of rows, requests that are asked about and loaded step by step."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.here: set[bytes] = set()
        self.promises = Promises(rows, self.here.__contains__, group_of)
        self.orders: dict[str, SequenceOrder] = {}
        self.primary: list[bytes] = []  # oldest first
        self.moved = 0
        self.jobs = 0
        self.asked: dict[str, tuple[int, bool]] = {}

    def add(self, request: str, keys: list[bytes], held: int | None = None) -> list[bytes]:
        """A request, of which the tier has so many blocks."""
        self.here.update(keys[:held])
        places = sorted(keys, key=lambda key: (group_of(key), key))
        self.orders[request] = SequenceOrder({key: int(key.split()[-2]) for key in places})
        return keys

    def ask(self, request: str, keys: list[bytes]) -> tuple[int, bool]:
        """(blocks of the prefix that were found, whether the request has to be asked about again) in this step."""
        found, again, promoted = 0, False, []
        for key in keys:
            if key in self.primary:
                found += 1
                again = again or key in self.loading
                continue
            answer = self.promises.ask(request, key, self.orders[request]) if key in self.here else REFUSE
            if answer == REFUSE:
                break
            again = True
            if answer == KEEP:
                found += 1
                promoted.append(key)
                self.promote(key)
        if promoted:
            self.jobs += 1
            self.promises.note_load(self.jobs, request, promoted)
            self.ended.append(self.jobs)
        return found, again

    def promote(self, key: bytes) -> None:
        self.moved += 1
        if len(self.primary) == self.rows:
            del self.primary[0]
        self.primary.append(key)
        self.loading.add(key)

    loading: set[bytes]
    ended: list[int]

    def step(self, waiting: dict[str, list[bytes]], take_up: bool = True) -> dict[str, int]:
        """One step; what the requests found that were scheduled in it."""
        self.loading, self.ended = set(), []
        scheduled = {}
        for request, keys in waiting.items():
            found, again = self.asked[request] = self.ask(request, keys)
            if not again and take_up:
                scheduled[request] = found
        for job in self.ended:
            self.promises.note_end(job, True)
        self.promises.end_step(scheduled)
        assert self.promises.total == sum(self.promises.by_request.values()) <= self.rows
        return scheduled

    def run(self, waiting: dict[str, list[bytes]], most: int = 1000) -> dict[str, int]:
        """Until all have been scheduled; what each found."""
        waiting, done = dict(waiting), {}
        for _ in range(most):
            for request, found in self.step(waiting).items():
                done[request] = found
                del waiting[request]
            if not waiting:
                return done
        raise AssertionError(f"after {most} steps {sorted(waiting)} still wait")


def test_what_fits_is_promised_at_once():
    scheduler = Scheduler(10)
    assert scheduler.run({"a": scheduler.add("a", blocks("a", 4)), "b": scheduler.add("b", blocks("b", 6))}) == {
        "a": 4,
        "b": 6,
    }
    assert scheduler.moved == 10


def test_of_a_prompt_longer_than_the_primary_as_much_is_promised_as_that_holds():
    scheduler = Scheduler(20)
    assert scheduler.run({"a": scheduler.add("a", blocks("a", 300))}) == {"a": 20}
    assert scheduler.moved == 20


@pytest.mark.parametrize(("rows", "each"), [(26, 20), (25, 18), (20, 20), (45, 20), (200, 20)])
def test_waiting_requests_get_all_of_their_blocks_each_moved_once(rows, each):
    scheduler = Scheduler(rows)
    waiting = {name: scheduler.add(name, blocks(name, each)) for name in "abcdefgh"}
    assert scheduler.run(waiting) == dict.fromkeys("abcdefgh", each)
    assert scheduler.moved == 8 * each


def test_a_request_is_promised_all_of_its_blocks_or_none():
    scheduler = Scheduler(10)
    waiting = {name: scheduler.add(name, blocks(name, 6)) for name in "ab"}
    scheduler.step(waiting, take_up=False)
    assert scheduler.moved == 6


def test_blocks_that_are_not_here_are_not_waited_for():
    scheduler = Scheduler(10)
    waiting = {"a": scheduler.add("a", blocks("a", 6)), "b": scheduler.add("b", blocks("b", 6), held=4)}
    scheduler.step(waiting, take_up=False)
    assert scheduler.moved == 10


def test_blocks_behind_one_that_is_not_here_are_not_waited_for():
    scheduler = Scheduler(10)
    waiting = {"a": scheduler.add("a", blocks("a", 6)), "b": scheduler.add("b", blocks("b", 12))}
    scheduler.here.remove(blocks("b", 12)[4])
    scheduler.step(waiting, take_up=False)
    assert scheduler.moved == 10


def test_whoever_is_over_within_a_step_has_nothing_when_that_ends():
    scheduler = Scheduler(10)
    a, b = scheduler.add("a", blocks("a", 8)), scheduler.add("b", blocks("b", 10))
    for key in a:
        scheduler.promises.ask("a", key, scheduler.orders["a"])
    scheduler.promises.note_load(1, "a", a)
    scheduler.promises.void("a")
    scheduler.promises.end_step()
    assert [scheduler.promises.ask("b", key, scheduler.orders["b"]) for key in b] == [KEEP] * 10


def test_who_asks_first_has_precedence():
    scheduler = Scheduler(10)
    waiting = {"a": scheduler.add("a", blocks("a", 6)), "b": scheduler.add("b", blocks("b", 8))}
    small = {f"s{number}": scheduler.add(f"s{number}", blocks(f"s{number}", 2)) for number in range(20)}
    done = scheduler.run(waiting | small)
    assert list(done) == ["a", "b", *small]
    assert scheduler.moved == 6 + 8 + 40


def test_part_of_the_prompt_that_is_in_the_primary_already_is_not_lost_to_the_rest():
    scheduler = Scheduler(20)
    keys = scheduler.add("a", blocks("a", 25))
    scheduler.primary = [*blocks("other", 10), *keys[:10]]
    assert scheduler.run({"a": keys}) == {"a": 20}
    scheduler = Scheduler(20)
    keys = scheduler.add("a", blocks("a", 25))
    scheduler.primary = [*keys[:10], *blocks("other", 10)]
    assert scheduler.run({"a": keys}) == {"a": 20}


def test_several_kv_groups_share_the_primary():
    scheduler = Scheduler(10)
    both = [blocks("a", 30, group) for group in (0, 1)]
    scheduler.add("a", both[0] + both[1])
    scheduler.loading, scheduler.ended = set(), []
    assert [scheduler.ask("a", keys)[0] for keys in both] == [5, 5]


def test_of_what_was_promised_only_what_is_loaded_stays_so():
    scheduler = Scheduler(10)
    keys = scheduler.add("a", blocks("a", 6))
    other = scheduler.add("b", blocks("b", 10))
    for key in keys:
        assert scheduler.promises.ask("a", key, scheduler.orders["a"]) == KEEP
    assert scheduler.promises.ask("b", other[0], scheduler.orders["b"]) == WAIT
    scheduler.promises.end_step()  # vLLM had no row to load it to
    assert scheduler.promises.ask("b", other[0], scheduler.orders["b"]) == KEEP


@pytest.mark.parametrize("end", ["finished", "scheduled", "stored"])
def test_whoever_is_over_or_runs_holds_nobody_up(end):
    scheduler = Scheduler(10)
    waiting = {"a": scheduler.add("a", blocks("a", 8)), "b": scheduler.add("b", blocks("b", 8))}
    scheduler.step(waiting, take_up=False)
    scheduler.step(waiting, take_up=False)
    assert scheduler.moved == 8
    if end == "scheduled":
        scheduler.promises.end_step(["a"])
    else:
        scheduler.promises.void("a")
    scheduler.step({"b": waiting["b"]}, take_up=False)
    assert scheduler.moved == 16


def test_the_last_of_a_long_queue_loses_nothing_for_its_patience():
    scheduler = Scheduler(26)
    names = [f"r{number}" for number in range(PATIENCE_STEPS)]
    waiting = {name: scheduler.add(name, blocks(name, 20)) for name in names}
    assert scheduler.run(waiting, most=4 * PATIENCE_STEPS) == dict.fromkeys(names, 20)
    assert scheduler.moved == 20 * len(names)


def test_no_wait_is_longer_than_the_longest(monkeypatch):
    """Whoever is always asked before may be scheduled all the time."""
    monkeypatch.setattr(promises, "MAX_WAIT_STEPS", 100)
    scheduler = Scheduler(10)
    low = scheduler.add("low", blocks("low", 8))
    steps = 0
    while scheduler.asked.get("low") != (0, False) and steps < 1000:
        name = f"high{steps // 2}"
        scheduler.step({name: scheduler.add(name, blocks(name, 8)), "low": low})
        steps += 1
    assert 100 <= steps <= 102


def test_who_waits_is_asked_no_more_than_it_takes_to_defer_it():
    scheduler = Scheduler(10)
    a, b = scheduler.add("a", blocks("a", 8)), scheduler.add("b", blocks("b", 8))
    scheduler.step({"a": a}, take_up=False)
    ask = scheduler.promises.ask
    assert [ask("b", key, scheduler.orders["b"]) for key in b] == [WAIT] + [REFUSE] * 7
    assert ask("b", b[0], scheduler.orders["b"]) == WAIT, "vLLM may ask for it again in the step"


def test_who_runs_out_of_room_beside_others_waits():
    """vLLM looks for a sliding window from its end on: what it needs is not known from the first block."""
    scheduler = Scheduler(10)
    a, b = scheduler.add("a", blocks("a", 6)), scheduler.add("b", blocks("b", 8))
    scheduler.step({"a": a}, take_up=False)
    answers = [scheduler.promises.ask("b", key, scheduler.orders["b"]) for key in reversed(b)]
    assert answers == [KEEP] * 4 + [WAIT] + [REFUSE] * 3


def test_a_promise_that_nobody_asks_about_any_more_is_void():
    scheduler = Scheduler(10)
    a, b = scheduler.add("a", blocks("a", 8)), scheduler.add("b", blocks("b", 8))
    scheduler.step({"a": a}, take_up=False)
    steps = 0
    while scheduler.moved == 8 and steps < 3 * STALE_STEPS:
        scheduler.step({"b": b}, take_up=False)
        steps += 1
    assert STALE_STEPS <= steps <= STALE_STEPS + RESUMED_STEPS + 1
    assert scheduler.moved == 16


def test_a_promise_to_a_request_that_was_preempted_is_void_sooner():
    scheduler = Scheduler(10)
    a, b = scheduler.add("a", blocks("a", 8)), scheduler.add("b", blocks("b", 8))
    scheduler.promises.end_step(preempted=["a"])
    scheduler.step({"a": a}, take_up=False)
    steps = 0
    while scheduler.moved == 8 and steps < STALE_STEPS:
        scheduler.step({"b": b}, take_up=False)
        steps += 1
    assert RESUMED_STEPS <= steps <= 2 * RESUMED_STEPS + 1
    assert scheduler.moved == 16
    scheduler.promises.void("a")  # a store of it that was under way ends
    assert "a" in scheduler.promises.known_requests
    scheduler.promises.finish("a")
    assert "a" not in scheduler.promises.known_requests


def test_who_has_waited_too_long_is_refused():
    scheduler = Scheduler(10)
    waiting = {"a": scheduler.add("a", blocks("a", 8)), "b": scheduler.add("b", blocks("b", 8))}
    steps = 0
    while scheduler.asked.get("b") != (0, False) and steps < 2 * PATIENCE_STEPS:
        scheduler.primary.clear()  # so that a keeps asking
        scheduler.step(waiting, take_up=False)
        steps += 1
    assert PATIENCE_STEPS <= steps <= PATIENCE_STEPS + 2 * MAX_RENEWALS
    assert scheduler.moved == 8 * (1 + MAX_RENEWALS), "b was promised what a has not taken up"


def test_while_promised_blocks_are_on_their_way_patience_lasts_longer_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(promises, "PATIENCE_STEPS", 4)
    scheduler = Scheduler(10)
    a, b = scheduler.add("a", blocks("a", 8)), scheduler.add("b", blocks("b", 8))
    for key in a:
        scheduler.promises.ask("a", key, scheduler.orders["a"])
    scheduler.promises.note_load(1, "a", a)  # and never ends
    answers = []
    while len(answers) < 1000 and WAIT in (answers or [WAIT])[-1:]:
        scheduler.promises.end_step()
        answers.append(scheduler.promises.ask("b", b[0], scheduler.orders["b"]))
    assert len(answers) == 4 * 16 + 1
    assert answers[-1] == REFUSE


def test_what_the_primary_gave_away_is_promised_again_but_not_for_ever():
    scheduler = Scheduler(10)
    keys = scheduler.add("a", blocks("a", 8))
    for _ in range(1 + MAX_RENEWALS):
        found, again = scheduler.step({"a": keys}, take_up=False), True
        scheduler.primary.clear()
    assert scheduler.moved == 8 * (1 + MAX_RENEWALS)
    found, again = scheduler.ask("a", keys)
    assert (found, again) == (0, False)
    assert scheduler.moved == 8 * (1 + MAX_RENEWALS)


def test_blocks_whose_load_failed_are_not_promised_any_more():
    scheduler = Scheduler(10)
    keys, other = scheduler.add("a", blocks("a", 8)), scheduler.add("b", blocks("b", 8))
    for key in keys:
        scheduler.promises.ask("a", key, scheduler.orders["a"])
    scheduler.promises.note_load(1, "a", keys)
    scheduler.here.difference_update(keys)
    scheduler.promises.note_end(1, False)
    scheduler.promises.end_step()
    assert scheduler.promises.ask("b", other[0], scheduler.orders["b"]) == KEEP


def test_a_reset_ends_all_promises():
    scheduler = Scheduler(10)
    keys, other = scheduler.add("a", blocks("a", 8)), scheduler.add("b", blocks("b", 8))
    scheduler.step({"a": keys}, take_up=False)
    scheduler.promises.clear()
    assert scheduler.promises.ask("b", other[0], scheduler.orders["b"]) == KEEP


def test_without_an_order_blocks_are_promised_one_by_one():
    account = Promises(3, lambda key: True, group_of)
    assert [account.ask("a", key, None) for key in blocks("a", 4)] == [KEEP] * 3 + [REFUSE]


def test_nothing_is_kept_of_requests_that_never_end():
    account = Promises(1, lambda key: True, group_of)
    for number in range(4 * STALE_STEPS):
        account.ask(f"r{number}", blocks("a", 1)[0], None)
        account.end_step()
    assert len(account.known_requests) <= 2 * STALE_STEPS


@pytest.mark.parametrize("seed", range(40))
def test_everybody_is_scheduled_whatever_others_do(seed):
    """Requests come, are aborted or starve, loads take long, running ones take rows; the account always fits."""
    draw = random.Random(seed)
    scheduler = Scheduler(draw.choice([5, 12, 30]))
    waiting: dict[str, list[bytes]] = {}
    since: dict[str, int] = {}
    starved: set[str] = set()
    shared = blocks("shared", 40)
    for step in range(3000):
        if len(waiting) < 8 and draw.random() < 0.3:
            name = f"r{step}"
            keys = shared[: draw.randint(0, 10)] + blocks(name, draw.randint(1, 20))
            keys = [b"%s %06d 0" % (key.rsplit(b" ", 2)[0], at) for at, key in enumerate(keys)]
            waiting[name] = scheduler.add(name, keys, held=draw.randint(0, len(keys)))
            since[name] = step
            if draw.random() < 0.05:
                starved.add(name)
        if waiting and draw.random() < 0.05:
            name = draw.choice(list(waiting))
            waiting.pop(name)
            starved.discard(name)
            scheduler.promises.void(name)
        order = list(waiting)
        if draw.random() < 0.3:  # priorities
            draw.shuffle(order)
        if draw.random() < 0.2:  # a step that gets no further than some
            order = order[: draw.randint(0, len(order))]
        if draw.random() < 0.3:  # running requests store
            del scheduler.primary[: draw.randint(0, 4)]
        scheduler.loading, scheduler.ended = set(), []
        done = []
        for name in order:
            _, again = scheduler.ask(name, waiting[name])
            if not again and name not in starved:
                done.append(name)
        for job in scheduler.ended:
            scheduler.promises.note_end(job, draw.random() < 0.95)
        scheduler.promises.end_step(done)
        for name in done:
            assert step - since[name] < 6 * PATIENCE_STEPS
            del waiting[name]
        assert scheduler.promises.total == sum(scheduler.promises.by_request.values()) <= scheduler.rows
    assert all(step - since[name] < 2 * PATIENCE_STEPS for name in waiting if name not in starved)
