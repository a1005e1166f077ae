"""The tier for asyncio programs, on every engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from async_tier import aio
from async_tier.aio import AsyncBlockStore, TransferError
from async_tier.arena import Rows
from async_tier.config import TierConfig
from tests import helpers
from tests.helpers import key, keys, primary_rows

pytestmark = pytest.mark.each_engine

ROW_BYTES = 256


@pytest.fixture
def primary() -> np.ndarray:
    return primary_rows(64, ROW_BYTES)


def open_store(primary: np.ndarray, blocks: int = 64) -> AsyncBlockStore:
    options = {**helpers.ENGINE_OPTIONS, "bytes_to_use": blocks * primary.shape[1]}
    store = AsyncBlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    helpers.remember(store._store, primary)
    return store


async def turns(until: Callable[[], object], what: str) -> None:
    """Let the loop run until something is so."""
    deadline = time.monotonic() + helpers.PATIENCE_S
    while not until():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0)


async def test_blocks_come_back_into_other_rows(primary):
    before = primary.copy()
    async with open_store(primary) as store:
        assert await store.store(keys(0, 1, 2), [5, 6, 7]) == 3 * ROW_BYTES
        assert store.num_blocks == 3
        assert store.lookup(key(1))
        primary[:] = 0
        assert await store.load(keys(2, 0, 1), [20, 21, 22]) == tuple(keys(2, 0, 1))
        assert np.array_equal(primary[[20, 21, 22]], before[[7, 5, 6]])
        assert store.statistics().blocks_loaded == 3


async def test_what_is_there_already_is_not_copied_again(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        assert await store.store(keys(0), [0]) == 0
        assert await store.store([], []) == 0


async def test_a_load_says_which_keys_it_found(primary):
    async with open_store(primary) as store:
        await store.store(keys(0, 1), [0, 1])
        assert await store.load(keys(1, 77, 0), [10, 11, 12]) == tuple(keys(1, 0))
        assert await store.load(keys(78), [10]) == ()
        assert await store.load([], []) == ()
        assert not store.lookup(key(77))


async def test_a_hit_is_not_pinned_for_longer_than_the_question(primary):
    async with open_store(primary, blocks=2) as store:
        await store.store(keys(0, 1), [0, 1])
        assert store.lookup(key(0))
        assert store.lookup(key(1))
        assert await store.store(keys(2, 3), [2, 3]) == 2 * ROW_BYTES
        assert not store.lookup(key(0))


@pytest.mark.parametrize("rows", [[0, 1], [64], [-1]])
async def test_a_store_that_fails_says_so(primary, rows):
    async with open_store(primary) as store:
        with pytest.raises(TransferError, match="the store of 1 blocks failed"):
            await store.store(keys(0), rows)
        assert await store.load(keys(0), rows) == ()


async def test_keys_that_are_none_leave_nothing_behind(primary):
    async with open_store(primary) as store:
        with pytest.raises(TypeError):
            await store.store(None, [0])
        assert store._waiting == {}


@pytest.mark.host_only
async def test_copies_that_fail_reach_whoever_waits(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        for stream in (store._store._load_stream, store._store._store_stream):
            stream.hold()
        storing = asyncio.ensure_future(store.store(keys(1), [1]))
        loading = asyncio.ensure_future(store.load(keys(0), [9]))
        await asyncio.sleep(0)
        store._store._engine.close()  # cuts them off
        with pytest.raises(TransferError, match="the store of 1 blocks failed"):
            await storing
        assert await loading == ()
        assert store.statistics().rows_used == store.num_blocks == 0


async def test_thousands_of_jobs_at_once(primary):
    before = primary.copy()
    async with open_store(primary, blocks=5000) as store:
        moved = await asyncio.gather(*(store.store([key(at)], [at % 64]) for at in range(5000)))
        assert set(moved) == {ROW_BYTES}
        assert store.num_blocks == 5000
        primary[:] = 0
        found = await asyncio.gather(*(store.load([key(at)], [at % 64]) for at in range(5000)))
        assert found == [(key(at),) for at in range(5000)]
        assert np.array_equal(primary, before)
        assert store._waiting == {}


async def test_stores_and_loads_go_on_while_others_wait(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        store._store._store_stream.hold()
        waiting = asyncio.ensure_future(store.store(keys(1), [1]))
        await asyncio.sleep(0)
        assert await store.load(keys(0), [9]) == (key(0),)
        assert not waiting.done()
        store._store._store_stream.release()
        assert await waiting == ROW_BYTES


@pytest.mark.parametrize("is_load", [False, True])
async def test_cancelling_an_await_cancels_no_copy_and_leaks_no_row(primary, is_load):
    before = primary.copy()
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        stream = store._store._load_stream if is_load else store._store._store_stream
        stream.hold()
        call = store.load(keys(0), [9]) if is_load else store.store(keys(1), [1])
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.statistics().jobs_in_flight == 1
        stream.release()
        await store.drain()
        assert store.statistics().jobs_in_flight == 0
        assert store._waiting == {}
        if is_load:
            assert np.array_equal(primary[9], before[0])
        else:
            assert store.lookup(key(1))
        assert store.statistics().rows_used == store.num_blocks
        # No pin is left: every row can be had.
        assert await store.store(keys(*range(100, 164)), range(64)) == 64 * ROW_BYTES
        assert complaints == []


async def test_drain_waits_for_what_was_submitted(primary):
    async with open_store(primary) as store:
        await store.drain()
        store._store._store_stream.hold()
        tasks = [asyncio.ensure_future(store.store(keys(at), [at])) for at in range(3)]
        await asyncio.sleep(0)
        draining = asyncio.ensure_future(store.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        store._store._store_stream.release()
        await draining
        assert await asyncio.gather(*tasks) == [ROW_BYTES] * 3


async def test_drain_does_not_wait_for_what_was_submitted_after_it(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        for stream in (store._store._load_stream, store._store._store_stream):
            stream.hold()
        before = asyncio.ensure_future(store.store(keys(1), [1]))
        await asyncio.sleep(0)
        draining = asyncio.ensure_future(store.drain())
        await asyncio.sleep(0)
        after = asyncio.ensure_future(store.load(keys(0), [9]))
        await asyncio.sleep(0)
        store._store._store_stream.release()
        await draining
        assert before.done()
        assert not after.done()
        store._store._load_stream.release()
        assert await after == (key(0),)


async def test_closing_waits_for_jobs_in_flight(primary):
    store = open_store(primary)
    store._store._store_stream.hold()
    task = asyncio.ensure_future(store.store(keys(0), [0]))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    assert not closing.done()
    store._store._store_stream.release()
    await closing
    assert await task == ROW_BYTES
    await store.close()


async def test_closing_goes_on_when_its_await_is_cancelled(primary):
    store = open_store(primary)
    store._store._store_stream.hold()
    task = asyncio.ensure_future(store.store(keys(0), [0]))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    store._store._store_stream.release()
    assert await task == ROW_BYTES
    await turns(lambda: store._store._closed, "it is closed all the same")


def test_closing_waits_for_jobs_also_where_the_loop_ends_before_them(primary, monkeypatch):
    made: list[AsyncBlockStore] = []

    async def main() -> None:
        made.append(store := open_store(primary))
        stream = store._store._store_stream
        stream.hold()
        drain = store._store.drain

        def wait() -> None:  # the loop's thread is in here
            monkeypatch.setattr(store._store, "drain", drain)
            stream.release()
            drain()

        monkeypatch.setattr(store._store, "drain", wait)
        jobs = [asyncio.ensure_future(store.store(keys(0), [0])), asyncio.ensure_future(store.close())]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not any(job.done() for job in jobs)

    asyncio.run(main())
    (store,) = made
    assert store._store._closed
    assert store.statistics().blocks_stored == 1
    assert store._waiting == {}


async def test_a_store_that_cannot_close_gives_its_eventfd_back(primary, monkeypatch):
    store = open_store(primary)

    signals: list[int] = []
    signal = store._store.signal

    def close():
        raise OSError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(store._store, "signal", lambda fd: signals.append(fd) or signal(fd))
        patch.setattr(store._store, "close", close)
        with pytest.raises(OSError, match="out of luck"):
            await store.close()
    assert signals == ([-1] if store._is_signalled else []), "its number may be another file's soon"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(store._eventfd)


async def test_a_closed_store_says_so(primary):
    store = open_store(primary)
    await store.close()
    for call in (store.store(keys(0), [0]), store.load(keys(0), [0]), store.drain()):
        with pytest.raises(RuntimeError, match="the store is closed"):
            await call
    with pytest.raises(RuntimeError, match="the store is closed"):
        store.lookup(key(0))
    assert store.statistics().jobs_in_flight == 0


def test_another_event_loop_is_refused_in_words(primary):
    async def make() -> AsyncBlockStore:
        return open_store(primary)

    async def use(store: AsyncBlockStore) -> None:
        with pytest.raises(RuntimeError, match="the store belongs to another event loop"):
            await store.store(keys(0), [0])

    first = asyncio.new_event_loop()
    store = first.run_until_complete(make())
    asyncio.run(use(store))
    first.run_until_complete(store.close())
    first.close()


def polls_of(store: AsyncBlockStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each poll of the store's."""
    polls: list[int] = []
    poll = store._store.poll
    monkeypatch.setattr(store._store, "poll", lambda: polls.append(1) or poll())
    return polls


async def test_an_idle_store_does_nothing(primary, monkeypatch):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        await store.load(keys(77), [0])
        with monkeypatch.context() as patch:
            polls = polls_of(store, patch)
            until = time.monotonic() + 10 * aio.LONGEST_POLL_S
            while time.monotonic() < until:  # what must not happen has no event to wait for
                await asyncio.sleep(0)
            assert polls == []
            assert store._timer is None


async def test_a_closed_store_is_not_asked_any_more(primary, monkeypatch):
    store = open_store(primary)
    task = asyncio.ensure_future(store.store(keys(0), [0]))
    await asyncio.sleep(0)
    store._store._stores[0].event.synchronize()
    await store.store([], [])  # ends at once, and takes the end of the other along: its timer is still set
    polls = polls_of(store, monkeypatch)
    await store.close()
    until = time.monotonic() + 10 * aio.LONGEST_POLL_S
    while time.monotonic() < until:
        await asyncio.sleep(0)
    assert len(polls) == 1, "the last one is close's own"
    assert await task == ROW_BYTES


@pytest.mark.host_only
async def test_the_host_engine_wakes_the_loop_and_is_not_asked(primary, monkeypatch):
    async with open_store(primary) as store:
        polls = polls_of(store, monkeypatch)
        with monkeypatch.context() as patch:
            for name in ("call_later", "call_at"):
                patch.setattr(store._loop, name, lambda *_, **__: pytest.fail("a timer was set"))
            store._store._store_stream.hold()
            task = asyncio.ensure_future(store.store(keys(0), [0]))
            for _ in range(100):
                await asyncio.sleep(0)
            assert polls == []
            store._store._store_stream.release()
            await task
            assert len(polls) == 1


@pytest.mark.host_only
async def test_jobs_that_ended_since_are_one_wakeup(primary, monkeypatch):
    async with open_store(primary) as store:
        polls = polls_of(store, monkeypatch)
        tasks = [asyncio.ensure_future(store.store(keys(at), [at])) for at in range(50)]
        await asyncio.sleep(0)
        store._store._engine.close()  # waits for the threads, and the loop is not run meanwhile
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(polls) == 1


@pytest.mark.host_only
async def test_a_forked_child_leaves_the_eventfd_to_its_parent(primary):
    async with open_store(primary) as store:
        assert not os.get_inheritable(store._eventfd)
        store._store._store_stream.hold()
        task = asyncio.ensure_future(store.store(keys(0), [0]))
        await asyncio.sleep(0)
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(store.close())
            except RuntimeError as error:
                os.close(store._eventfd)
                os._exit(0 if "another event loop" in str(error) else 1)
            finally:
                os._exit(2)
        ends: list[int] = []

        def has_ended() -> bool:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                ends.append(os.waitstatus_to_exitcode(status))
            return bool(ends)

        await turns(has_ended, "the child ends")
        assert ends == [0]
        store._store._store_stream.release()
        assert await task == ROW_BYTES


async def test_where_it_can_only_be_asked_the_pauses_grow(primary, monkeypatch):
    store = open_store(primary)
    if store._is_signalled:
        await store.close()
        return  # the test above
    pauses: list[float] = []
    timers: list[asyncio.TimerHandle] = []
    real = store._loop.call_later

    def call_later(pause: float, *rest: Any, **more: Any) -> asyncio.TimerHandle:
        pauses.append(pause)
        timers.append(real(pause, *rest, **more))
        return timers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(store._loop, "call_later", call_later)
        store._store._store_stream.hold()
        task = asyncio.ensure_future(store.store(keys(0), [0]))
        await turns(lambda: pauses and pauses[-1] == aio.LONGEST_POLL_S, "the longest pause")
        assert pauses[0] == aio.FIRST_POLL_S
        assert pauses == sorted(pauses)
        del pauses[:]
        more = [asyncio.ensure_future(store.store(keys(at), [at])) for at in (1, 2)]
        await asyncio.sleep(0)
        assert pauses == [aio.FIRST_POLL_S], "a submission is soon asked after, however long the others have taken"
        assert timers[-2].cancelled(), "there is one timer"
        store._store._store_stream.release()
        await asyncio.gather(task, *more)
        assert store._timer is None
    await store.close()


async def test_an_error_while_asking_reaches_whoever_waits(primary, monkeypatch):
    store = open_store(primary)
    store._store._store_stream.hold()
    tasks = [asyncio.ensure_future(store.store(keys(at), [at])) for at in range(2)]
    await asyncio.sleep(0)
    real = store._store.poll

    def poll():
        raise OSError("out of luck")

    monkeypatch.setattr(store._store, "poll", poll)
    store._collect()
    for task in tasks:
        with pytest.raises(OSError, match="out of luck"):
            await task
    monkeypatch.setattr(store._store, "poll", real)
    store._store._store_stream.release()
    await store.close()


async def test_opening_and_closing_leaks_nothing(primary):
    async def once() -> None:
        async with open_store(primary, blocks=4) as store:
            await store.store(keys(0), [0])

    await once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        await once()
    assert len(os.listdir("/proc/self/fd")) == before
