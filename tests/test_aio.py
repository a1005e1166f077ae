"""The tier for asyncio programs, on every engine."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch

from async_tier import block_store
from async_tier.aio import AsyncBlockStore, TransferError
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.streams.rows import Rows
from async_tier.testing import load_gate, store_gate
from tests import helpers
from tests.helpers import key, keys
from tests.rows import primary_rows

pytestmark = pytest.mark.each_engine

ROW_BYTES = 256


@pytest.fixture
def primary() -> np.ndarray:
    return primary_rows(64, ROW_BYTES)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A test that awaits what never comes fails, and does not hang; nor does the look after late copies rescue it."""
    monkeypatch.setattr(block_store, "LATE_S", 10 * helpers.PATIENCE_S)

    def give_up(number: int, frame: object) -> None:
        helpers.close_stores()  # which are waited for when the loop ends
        raise SystemExit("awaited for ever")  # asyncio hands other errors to its log

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(2 * helpers.PATIENCE_S)  # later than `until` and `turns` give up, which say what they waited for
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def config(size: int) -> TierConfig:
    return TierConfig.parse({**helpers.engine_options(), "bytes_to_use": size})


def open_store(primary: np.ndarray, blocks: int = 64) -> AsyncBlockStore:
    store = AsyncBlockStore(Rows.of_view(memoryview(primary)), config(blocks * primary.shape[1]))
    helpers.remember(store.block_store, primary)
    return store


async def begun(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that has had its first turn."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    return task


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


@pytest.mark.parametrize("name", [7, None, "name", bytearray(key(0)), [key(0)]], ids=str)
async def test_a_lookup_of_what_is_no_key_is_refused_in_words(primary, name):
    async with open_store(primary) as store:
        with pytest.raises(TypeError, match=f"keys must be bytes, not {type(name).__name__}"):
            store.lookup(name)


async def test_a_load_is_a_use(primary):
    async with open_store(primary, blocks=3) as store:
        for at in range(3):
            await store.store(keys(at), [at])
        await store.load(keys(0), [9])
        await store.store(keys(3), [3])
        assert [store.lookup(key(at)) for at in range(4)] == [True, False, True, True]


async def test_what_a_sequence_stores_continues_what_it_has_loaded(primary):
    async with open_store(primary, blocks=2) as store:
        await store.store(keys(0), [0])
        await store.load(keys(0), [9], "request")
        await store.store(keys(1), [1], "request")
        await store.store(keys(2), [2])
        assert store.lookup(key(0)), "though nothing was used less recently"
        assert not store.lookup(key(1))


async def test_a_sequence_longer_than_the_tier_keeps_its_start_and_goes_when_it_is_finished(primary):
    async with open_store(primary, blocks=8) as store:
        for at in range(8):
            assert await store.store(keys(at), [at], "request") == ROW_BYTES
        assert await store.store(keys(8), [8], "request") == 0
        assert all(store.lookup(key(at)) for at in range(8))
        store.finish_sequence("request")
        for at in range(20, 28):
            assert await store.store(keys(at), [at], "request") == ROW_BYTES


async def test_a_sequence_may_be_finished_while_it_is_stored(primary):
    async with open_store(primary, blocks=4) as store:
        with store_gate(store):
            storing = await begun(store.store(keys(0, 1, 2, 3), [0, 1, 2, 3], "request"))
            store.finish_sequence("request")
        assert await storing == 4 * ROW_BYTES
        assert await store.load(keys(0, 1, 2, 3), [8, 9, 10, 11]) == tuple(keys(0, 1, 2, 3))
        assert await store.store(keys(4, 5, 6, 7), [4, 5, 6, 7], "request") == 4 * ROW_BYTES


async def test_tasks_that_share_a_name_share_the_sequence_and_leave_nothing_behind(primary):
    async with open_store(primary, blocks=8) as store:

        async def use(first: int) -> None:
            try:
                for at in range(first, first + 4):
                    await store.store(keys(at), [at], "request")
            finally:
                store.finish_sequence("request")

        with store_gate(store):
            tasks = [asyncio.ensure_future(use(first)) for first in (0, 10, 20)]
            await asyncio.sleep(0)
            tasks[2].cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [type(None), type(None), asyncio.CancelledError]
        await store.drain()
        assert store.is_idle
        assert await store.store(keys(*range(30, 38)), range(8), "request") == 8 * ROW_BYTES


async def test_a_sequence_may_be_finished_at_any_time(primary):
    store = open_store(primary)
    store.finish_sequence("never begun")
    await store.store(keys(0), [0], "request")
    store.finish_sequence("request")
    store.finish_sequence("request")
    with store_gate(store):
        storing = await begun(store.store(keys(1), [1], "request"))
        closing = await begun(store.close())
        store.finish_sequence("request")
    await closing
    assert await storing == ROW_BYTES
    store.finish_sequence("request")


def eventfds() -> set[int]:
    """Those that this process has."""
    names = os.listdir("/proc/self/fd")
    return {int(name) for name in names if "eventfd" in os.path.realpath(f"/proc/self/fd/{name}")}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "rows must be as many as the 1 keys, not 0"),
        ([9, 10], "rows must be as many as the 1 keys, not 2"),
        ([64], "rows must be from 0 to 63, not 64"),
        ([-1], "rows must be from 0 to 63, not -1"),
        ([2**63], "rows must be from 0 to 63, not 9223372036854775808"),
        ([9.0], r"rows must be row numbers in a list, not float64 of shape \(1,\)"),
        ([True], "not bool of shape"),
        (["9"], "not <U1 of shape"),
        ([[9]], r"not int64 of shape \(1, 1\)"),
        (9, r"not int64 of shape \(\)"),
        (None, "not object of shape"),
    ],
)
async def test_rows_that_are_wrong_are_refused_in_words_and_nothing_is_lost(primary, rows, words):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        for call in (store.store(keys(1), rows), store.load(keys(0), rows)):
            with pytest.raises(ValueError, match=words):
                await call
        assert store.is_idle
        assert await store.load(keys(0), [9]) == (key(0),)
        assert store.statistics().failed_jobs == store.statistics().faults == 0


@pytest.mark.parametrize(
    ("names", "words"), [(None, "not iterable"), ([1], "keys must be bytes, not int"), (key(0)[:1], "not int")]
)
async def test_keys_that_are_none_leave_nothing_behind(primary, names, words):
    async with open_store(primary) as store:
        for call in (store.store(names, [0]), store.load(names, [0])):
            with pytest.raises(TypeError, match=words):
                await call
        assert store.is_idle


@pytest.mark.parametrize(
    "rows", [[np.int64(5), np.uint8(6)], np.array([5, 6], dtype=np.uint16), (5, 6), range(5, 7)], ids=str
)
async def test_row_numbers_may_be_numpys(primary, rows):
    before = primary.copy()
    async with open_store(primary) as store:
        assert await store.store(keys(0, 1), rows) == 2 * ROW_BYTES
        primary[:] = 0
        assert await store.load(keys(0, 1), rows) == tuple(keys(0, 1))
        assert np.array_equal(primary[5:7], before[5:7])


async def test_keys_may_come_in_any_collection(primary):
    async with open_store(primary) as store:
        assert await store.store(dict.fromkeys(keys(0, 1)).keys(), [0, 1]) == 2 * ROW_BYTES
        assert await store.load(iter(keys(0, 1)), [2, 3]) == tuple(keys(0, 1))


@pytest.mark.host_only
async def test_a_failed_store_of_keys_from_an_iterator_says_so(primary):
    async with open_store(primary) as store:
        store_gate(store).hold()
        storing = await begun(store.store(iter(keys(0, 1)), [0, 1]))
        store.block_store.engine.close()
        with pytest.raises(TransferError, match="the store of 2 blocks failed"):
            await storing


@pytest.mark.parametrize("waits_for_its_store", [False, True])
async def test_keys_and_rows_may_be_changed_while_awaited(primary, waits_for_its_store):
    before = primary.copy()
    async with open_store(primary) as store:
        names, rows = keys(0, 1), np.array([0, 1])
        store_gate(store).hold()
        storing = await begun(store.store(names, rows))
        names[:], rows[:] = keys(2, 3), [2, 3]
        if not waits_for_its_store:
            store_gate(store).release()
            await storing
        names, rows = keys(0, 1), np.array([8, 9])
        loading = await begun(store.load(names, rows))
        names[:], rows[:] = keys(2, 3), [2, 3]
        store_gate(store).release()
        assert await loading == tuple(keys(0, 1))
        assert np.array_equal(primary[8:10], before[0:2])
        assert np.array_equal(primary[:8], before[:8])


async def test_a_load_waits_for_a_store_of_its_keys(primary):
    before = primary.copy()
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        with store_gate(store):
            storing = [
                asyncio.ensure_future(store.store(names, rows))
                for names, rows in ((keys(1), [1]), (keys(1, 2), [1, 2]), (keys(3), [3]))
            ]
            await asyncio.sleep(0)
            loading = await begun(store.load(keys(0, 1, 2, 77), [10, 11, 12, 13]))
            assert await store.load(keys(0), [20]) == (key(0),), "what waits for no store passes it"
            assert not loading.done()
        assert await loading == tuple(keys(0, 1, 2))
        assert np.array_equal(primary[10:13], before[0:3])
        assert await asyncio.gather(*storing) == [ROW_BYTES] * 3
        assert store.num_blocks == store.statistics().rows_used == 4
        assert store.is_idle


@pytest.mark.host_only
async def test_a_load_of_what_could_not_be_stored_finds_nothing(primary):
    async with open_store(primary) as store:
        store_gate(store).hold()
        storing = await begun(store.store(keys(0), [0]))
        loading = await begun(store.load(keys(0), [9]))
        store.block_store.engine.close()
        with pytest.raises(TransferError):
            await storing
        assert await loading == ()


@pytest.mark.parametrize("ends_by", ["drain", "close"])
async def test_a_load_that_waits_for_its_store_is_waited_for(primary, ends_by):
    async with open_store(primary) as store:
        with store_gate(store):
            storing = await begun(store.store(keys(0), [0]))
            loading = await begun(store.load(keys(0), [9]))
            ending = await begun(getattr(store, ends_by)())
        await ending
        assert await storing == ROW_BYTES
        assert await loading == (key(0),)


async def test_a_load_that_waits_for_its_store_can_be_withdrawn(primary):
    before = primary.copy()
    async with open_store(primary) as store:
        with store_gate(store):
            storing = await begun(store.store(keys(0), [0]))
            loading = await begun(store.load(keys(0), [9]))
            draining = await begun(store.drain())
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert not storing.done()
        await draining
        assert await storing == ROW_BYTES
        assert np.array_equal(primary[9], before[9])
        assert store.is_idle


@pytest.mark.host_only
async def test_copies_that_fail_reach_whoever_waits(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        load_gate(store).hold()
        store_gate(store).hold()
        storing = asyncio.ensure_future(store.store(keys(1), [1]))
        loading = await begun(store.load(keys(0), [9]))
        store.block_store.engine.close()  # cuts them off
        with pytest.raises(TransferError, match="the store of 1 blocks failed: its copies were not made"):
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
        assert store.is_idle


async def test_stores_and_loads_go_on_while_others_wait(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        with store_gate(store):
            waiting = await begun(store.store(keys(1), [1]))
            assert await store.load(keys(0), [9]) == (key(0),)
            assert not waiting.done()
        assert await waiting == ROW_BYTES


@pytest.mark.parametrize("is_load", [False, True])
async def test_cancelling_an_await_cancels_no_copy_and_leaks_no_row(primary, is_load):
    before = primary.copy()
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        gate = load_gate(store) if is_load else store_gate(store)
        with gate:
            call = store.load(keys(0), [9]) if is_load else store.store(keys(1), [1])
            task = await begun(call)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert store.statistics().jobs_in_flight == 1
        await store.drain()
        assert store.statistics().jobs_in_flight == 0
        assert store.is_idle
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
        with store_gate(store):
            tasks = [asyncio.ensure_future(store.store(keys(at), [at])) for at in range(3)]
            await asyncio.sleep(0)
            draining = await begun(store.drain())
            assert not draining.done()
        await draining
        assert await asyncio.gather(*tasks) == [ROW_BYTES] * 3


async def test_drain_waits_for_jobs_that_later_ones_have_passed(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        with store_gate(store):
            storing = asyncio.ensure_future(store.store(keys(1), [1]))
            loading = await begun(store.load(keys(0), [9]))
            draining = asyncio.ensure_future(store.drain())
            await loading
            await asyncio.sleep(0)
            assert not draining.done()
        await draining
        assert await storing == ROW_BYTES


async def test_drain_does_not_wait_for_what_was_submitted_after_it(primary):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        with load_gate(store):
            with store_gate(store):
                before = await begun(store.store(keys(1), [1]))
                draining = await begun(store.drain())
                after = await begun(store.load(keys(0), [9]))
            await draining
            assert before.done()
            assert not after.done()
        assert await after == (key(0),)


async def test_what_a_drain_costs_does_not_grow_with_the_jobs_in_flight(primary, monkeypatch):
    async with open_store(primary, blocks=200) as store:
        with store_gate(store):
            tasks = [asyncio.ensure_future(store.store([key(at)], [0])) for at in range(200)]
            await asyncio.sleep(0)
            calls: list[object] = []
            loop, soon = asyncio.get_running_loop(), asyncio.get_running_loop().call_soon
            monkeypatch.setattr(loop, "call_soon", lambda *call, **more: calls.append(call) or soon(*call, **more))
            draining = [asyncio.ensure_future(store.drain()) for _ in range(100)]
            await asyncio.sleep(0)
            draining[7].cancel()
        ends = await asyncio.gather(*draining, return_exceptions=True)
        assert [at for at, end in enumerate(ends) if end is not None] == [7]
        assert len(calls) < 10 * (len(tasks) + len(draining)), "nobody is told of each job but who awaits it"
        assert all(task.done() for task in tasks)


async def test_closing_waits_for_jobs_in_flight(primary):
    store = open_store(primary)
    with store_gate(store):
        task = await begun(store.store(keys(0), [0]))
        closing = await begun(store.close())
        assert not closing.done()
    await closing
    assert await task == ROW_BYTES
    await store.close()


async def test_closing_goes_on_when_its_await_is_cancelled(primary):
    store = open_store(primary)
    with store_gate(store):
        task = await begun(store.store(keys(0), [0]))
        closing = await begun(store.close())
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    assert await task == ROW_BYTES
    await turns(lambda: store.block_store.is_closed, "it is closed all the same")


def let_go_in_drain(store: AsyncBlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held store stream goes on when the loop's thread waits for it."""
    drain = store.block_store.drain

    def wait() -> None:
        monkeypatch.setattr(store.block_store, "drain", drain)
        store_gate(store).release()
        drain()

    monkeypatch.setattr(store.block_store, "drain", wait)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_closing_waits_for_jobs_also_where_the_loop_ends_before_them(primary, monkeypatch, turns):
    made: list[AsyncBlockStore] = []

    async def main() -> None:
        made.append(store := open_store(primary))
        store_gate(store).hold()
        let_go_in_drain(store, monkeypatch)
        jobs = [asyncio.ensure_future(store.store(keys(0), [0])), asyncio.ensure_future(store.close())]
        for _ in range(turns):
            await asyncio.sleep(0)
        assert not any(job.done() for job in jobs)

    asyncio.run(main())
    (store,) = made
    assert store.block_store.is_closed
    assert store.statistics().blocks_stored == 1
    assert store.is_idle


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_task_that_is_cancelled_when_the_loop_ends_closes_its_store(primary, turns):
    before = eventfds()
    made: list[AsyncBlockStore] = []

    async def use() -> None:
        async with open_store(primary) as store:
            made.append(store)
            store_gate(store).hold()
            await store.store(keys(0), [0])

    async def main() -> None:
        task = asyncio.create_task(use())
        await asyncio.sleep(0)
        task.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        store_gate(made[0]).release()

    asyncio.run(main())
    (store,) = made
    assert store.block_store.is_closed
    assert store.statistics().blocks_stored == 1
    assert store.is_idle
    assert eventfds() <= before


def test_a_load_that_waits_when_the_loop_ends_is_withdrawn(primary):
    complaints: list[dict[str, Any]] = []
    made: list[AsyncBlockStore] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        made.append(store := open_store(primary))
        with store_gate(store):
            jobs = [asyncio.ensure_future(call) for call in (store.store(keys(0), [0]), store.load(keys(0), [9]))]
            jobs.append(asyncio.ensure_future(store.close()))
            await asyncio.sleep(0)
            assert not any(job.done() for job in jobs)

    asyncio.run(main())
    (store,) = made
    assert store.block_store.is_closed
    assert store.is_idle
    assert complaints == []


def test_a_store_that_nobody_closes_says_so_and_leaves_nothing(primary):
    async def main() -> list[BlockStore]:
        stores = [AsyncBlockStore(primary, config(4 * ROW_BYTES)) for _ in range(3)]
        for store in stores:
            await store.store(keys(0), [0])
        return [store.block_store for store in stores]

    before = set(os.listdir("/proc/self/fd"))
    with pytest.warns(ResourceWarning, match="an AsyncBlockStore was not closed") as warned:
        left = asyncio.run(main())
    assert len(warned) == 3
    assert all(store.is_closed for store in left)
    del left
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_a_store_that_cannot_close_gives_its_eventfd_back(primary, monkeypatch):
    before = eventfds()
    store = open_store(primary)

    signals: list[int] = []
    real = store.block_store.signal

    def close():
        raise OSError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(store.block_store, "signal", lambda fd: signals.append(fd) or real(fd))
        patch.setattr(store.block_store, "close", close)
        with pytest.raises(OSError, match="out of luck"):
            await store.close()
    assert signals == [-1], "its number may be another file's soon"
    assert eventfds() <= before


@pytest.mark.parametrize("view", [lambda rows: rows, memoryview], ids=["array", "memoryview"])
async def test_the_primarys_memory_is_kept_until_the_store_is_closed(view):
    pages = mmap.mmap(-1, 4 * ROW_BYTES)
    is_alive = weakref.ref(pages)
    store = AsyncBlockStore(view(np.frombuffer(pages, dtype=np.uint8).reshape(4, ROW_BYTES)), config(4 * ROW_BYTES))
    del pages
    gc.collect()
    assert is_alive()
    assert await store.store(keys(0), [0]) == ROW_BYTES
    await store.close()
    assert not is_alive()


async def test_a_primary_that_is_none_is_refused_in_words(primary):
    primary.flags.writeable = False
    with pytest.raises(ValueError, match="must be writable"):
        AsyncBlockStore(primary)
    with pytest.raises(ValueError, match="must hold plain values, not Python objects"):
        AsyncBlockStore(np.array([[None], [None]]))
    for other in ([[0], [0]], "rows", None, 7):
        with pytest.raises(TypeError, match=f"the primary must be an array, .*, not {type(other).__name__}"):
            AsyncBlockStore(other)


async def moves_its_rows(primary: Any, as_bytes: np.ndarray) -> None:
    """A store over `primary` moves rows 0 and 1 to the last two. as_bytes: its memory, shape (rows, bytes)."""
    as_bytes[:] = np.random.default_rng(1).integers(0, 256, as_bytes.shape, dtype=np.uint8)
    expected = as_bytes.copy()
    expected[-2:] = expected[:2]
    store = AsyncBlockStore(primary, config(4 * as_bytes.shape[1]))
    helpers.remember(store.block_store, as_bytes)
    assert store.statistics().row_bytes == as_bytes.shape[1]
    assert await store.store(keys(0, 1), [0, 1]) == 2 * as_bytes.shape[1]
    last = len(as_bytes) - 1
    assert await store.load(keys(0, 1), [last - 1, last]) == tuple(keys(0, 1))
    await store.close()
    assert np.array_equal(as_bytes, expected)


def tensor_on(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows)


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "bool", "int64", "float16", "float32", "complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint16"],
)
@pytest.mark.parametrize("shape", [(8, 256), (8, 2, 128), (2048,)], ids=str)
async def test_a_tensor_of_any_type_may_be_the_primary(dtype, shape):
    memory = helpers.zero_rows(shape[0], 2048 // shape[0])
    size = getattr(torch, dtype).itemsize
    tensor = tensor_on(memory.reshape(-1)).view(getattr(torch, dtype))
    shape = (len(tensor),) if len(shape) == 1 else (*shape[:-1], shape[-1] // size)
    await moves_its_rows(tensor.view(shape), memory.reshape(shape[0], -1))


@pytest.mark.parametrize("rows", [slice(2, None), slice(None, None, 3), slice(1, 9, 2)], ids=str)
async def test_a_tensor_may_be_a_part_of_another(rows):
    memory = helpers.zero_rows(16, 1024)
    tensor = tensor_on(memory).view(torch.bfloat16).view(16, 2, 256)
    await moves_its_rows(tensor[rows, 1], memory[rows, 512:])


async def test_a_tensor_made_in_inference_mode_may_be_the_primary():
    with torch.inference_mode():
        tensor = tensor_on(helpers.zero_rows(8, ROW_BYTES))
        as_bytes = tensor.numpy()
    await moves_its_rows(tensor, as_bytes)


async def test_where_tensors_are_made_by_default_does_not_matter():
    memory = helpers.zero_rows(8, ROW_BYTES)
    tensor = tensor_on(memory)
    with torch.device("meta"):
        await moves_its_rows(tensor, memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch pins memory with CUDA")
async def test_a_pinned_tensor_may_be_the_primary():
    tensor = torch.zeros(8, ROW_BYTES, dtype=torch.uint8, pin_memory=True)
    await moves_its_rows(tensor, tensor.numpy())
    assert tensor.is_pinned()


async def test_an_array_of_a_type_that_memoryviews_lack_may_be_the_primary():
    memory = helpers.zero_rows(8, ROW_BYTES)
    await moves_its_rows(memory.view("datetime64[s]"), memory)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as torch's distributed ones are."""

    @staticmethod
    def __new__(cls) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(4)


def fake() -> torch.Tensor:
    with torch._subclasses.FakeTensorMode():
        return torch.zeros(4, 4)


NOT_DENSE = "the primary must be a dense tensor, not a %s one"
NO_MEMORY = "the primary must have memory of its own, which this %s has not"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(4, 4).to_sparse(), NOT_DENSE % "sparse_coo"),
        (lambda: torch.zeros(4, 4).to_sparse_csr(), NOT_DENSE % "sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8), NOT_DENSE % "quantized"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), NOT_DENSE % "nested"),
        (
            lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            NOT_DENSE % "nested",
        ),
        (lambda: torch.zeros(4, 4, device="meta"), "must be a tensor in host memory, not on meta"),
        pytest.param(
            lambda: torch.zeros(4, 4, device="cuda"),
            "must be a tensor in host memory, not on cuda:0",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ),
        (lambda: torch.zeros(4, 4, requires_grad=True), "must not require gradients, .*; pass its detach"),
        (lambda: torch.zeros(4, 4, requires_grad=True) * 2, "must not require gradients"),
        (lambda: torch.zeros(()), r"must hold at least one row, not shape \(\)"),
        (lambda: torch.zeros(0, 4), r"must hold at least one row, not shape \(0, 4\)"),
        (lambda: torch.zeros(4, 0), r"must hold at least one row, not shape \(4, 0\)"),
        (lambda: torch.zeros(4, 6).t(), r"rows of the primary must be contiguous, not strides \(1, 6\)"),
        (lambda: torch.zeros(4, 8)[:, ::2], r"must be contiguous, not strides \(8, 2\)"),
        (lambda: torch.zeros(1, 4).expand(3, 4), "must not overlap"),
        (fake, NO_MEMORY % "FakeTensor"),
        (Wrapper, NO_MEMORY % "Wrapper"),
    ],
)
@pytest.mark.filterwarnings("ignore")
async def test_tensors_that_cannot_be_the_primary_are_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        AsyncBlockStore(make())


async def test_a_tensors_memory_is_kept_until_the_store_is_closed():
    pages = mmap.mmap(-1, 4 * ROW_BYTES)
    is_alive = weakref.ref(pages)
    tensor = torch.frombuffer(pages, dtype=torch.bfloat16).view(4, -1)
    store = AsyncBlockStore(tensor, config(4 * ROW_BYTES))
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(1000, 1000)
    del pages, tensor
    gc.collect()
    assert is_alive()
    assert await store.store(keys(0), [0]) == ROW_BYTES
    await store.close()
    assert not is_alive()


@pytest.mark.host_only
@pytest.mark.starts_process
def test_torch_is_not_imported_for_those_who_have_no_tensor():
    program = """
import asyncio, sys
import numpy as np
from async_tier.aio import AsyncBlockStore

async def main():
    async with AsyncBlockStore(np.zeros((2, 4096))) as store:
        await store.store([b"first"], [0])

asyncio.run(main())
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=helpers.PATIENCE_S)


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
        with pytest.raises(RuntimeError, match="the store belongs to another event loop"):
            store.finish_sequence("request")

    first = asyncio.new_event_loop()
    store = first.run_until_complete(make())
    asyncio.run(use(store))
    first.run_until_complete(store.close())
    first.close()


def polls_of(store: AsyncBlockStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each poll of the store's."""
    polls: list[int] = []
    poll = store.block_store.poll
    monkeypatch.setattr(store.block_store, "poll", lambda: polls.append(1) or poll())
    return polls


async def stay_idle(polls: list[int]) -> None:
    """What must not happen has no event to wait for."""
    for _ in range(1000):
        await asyncio.sleep(0)
    assert polls == []


async def test_an_idle_store_does_nothing(primary, monkeypatch):
    monkeypatch.setattr("async_tier.aio.RETRY_S", 0.0)
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        await store.load(keys(77), [0])
        with monkeypatch.context() as patch:
            await stay_idle(polls_of(store, patch))


async def test_a_closed_store_is_not_asked_any_more(primary, monkeypatch):
    store = open_store(primary)
    task = await begun(store.store(keys(0), [0]))
    store.block_store.stores_in_flight[0].synchronize()
    await store.store([], [])  # ends at once, and takes the end of the other along, which has signalled
    await store.close()
    await stay_idle(polls_of(store, monkeypatch))
    assert await task == ROW_BYTES


async def test_the_engine_wakes_the_loop_and_is_not_asked(primary, monkeypatch):
    async with open_store(primary) as store:
        polls = polls_of(store, monkeypatch)
        with monkeypatch.context() as patch:
            loop, later = asyncio.get_running_loop(), asyncio.get_running_loop().call_later
            patch.setattr(
                loop,
                "call_later",
                lambda delay, *rest: (
                    later(delay, *rest) if delay == block_store.LATE_S else pytest.fail("a timer was set")
                ),
            )
            with store_gate(store):
                task = asyncio.ensure_future(store.store(keys(0), [0]))
                await stay_idle(polls)
            await task
            assert len(polls) == 1


async def test_what_does_not_end_is_looked_after_all_the_same(primary, monkeypatch):
    """Nobody is woken by it, and the log is to say so."""
    monkeypatch.setattr("async_tier.block_store.LATE_S", 0.0)
    async with open_store(primary) as store:
        polls = polls_of(store, monkeypatch)
        with store_gate(store):
            task = await begun(store.store(keys(0), [0]))
            await turns(lambda: len(polls) > 2, "it is looked after")
        await task
        await asyncio.sleep(0)  # the last look
        polls.clear()
        await stay_idle(polls)


async def test_jobs_that_ended_since_are_one_wakeup(primary, monkeypatch):
    async with open_store(primary) as store:
        polls = polls_of(store, monkeypatch)
        tasks = [asyncio.ensure_future(store.store(keys(at), [at])) for at in range(50)]
        await asyncio.sleep(0)
        store.block_store.engine.close()  # waits for the threads, and the loop is not run meanwhile
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(polls) == 1


async def test_a_forked_child_leaves_the_eventfd_to_its_parent(primary):
    before = eventfds()
    async with open_store(primary) as store:
        (eventfd,) = eventfds() - before
        assert not os.get_inheritable(eventfd)
        with store_gate(store):
            task = await begun(store.store(keys(0), [0]))
            child = os.fork()
            if child == 0:
                try:
                    asyncio.run(store.close())
                except RuntimeError as error:
                    os.close(eventfd)
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
        assert await task == ROW_BYTES


@pytest.mark.host_only
async def test_what_ends_while_it_is_asked_wakes_the_loop_again(primary, monkeypatch):
    async with open_store(primary) as store:
        store_gate(store).hold()
        tasks = [asyncio.ensure_future(store.store(keys(at), [at])) for at in range(2)]
        await asyncio.sleep(0)
        first, second = store.block_store.stores_in_flight
        poll = store.block_store.poll

        def ask() -> list[Any]:
            ends = poll()
            store_gate(store).release()
            second.synchronize()  # it has signalled, and nobody has asked
            monkeypatch.setattr(store.block_store, "poll", poll)
            return ends

        monkeypatch.setattr(store.block_store, "poll", ask)
        store_gate(store).step()
        first.synchronize()
        assert await asyncio.gather(*tasks) == [ROW_BYTES] * 2


async def test_a_load_of_what_is_not_there_is_an_answer_and_no_failure(primary, caplog):
    async with open_store(primary) as store:
        await store.store(keys(0), [0])
        assert await store.load(keys(5, 0, 6), [8, 9, 10]) == tuple(keys(0))
        assert await store.load(keys(5), [8]) == ()
        assert store.statistics().failed_jobs == 0
        assert store.statistics().blocks_loaded == 1
    assert not caplog.records


async def test_an_error_while_asking_reaches_whoever_waits(primary, monkeypatch):
    async with open_store(primary) as store:
        with store_gate(store):
            calls = [store.store(keys(0), [0]), store.store(keys(1), [1]), store.load(keys(1), [9]), store.drain()]
            tasks = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0)
            with monkeypatch.context() as patch:
                patch.setattr(store.block_store, "poll", fails)
                tasks.append(asyncio.ensure_future(store.store([], [])))  # ends at once, and so all are asked
                for task in tasks:
                    with pytest.raises(OSError, match="out of luck"):
                        await task
            assert store.statistics().load_jobs == 0, "its stores go on"
            draining = await begun(store.drain())
            assert not draining.done(), "the copies go on, and are waited for"
        await draining
        assert store.statistics().blocks_stored == 2
        assert store.is_idle
        assert await store.load(keys(0, 1), [8, 9]) == tuple(keys(0, 1))


async def test_what_ended_when_it_could_not_be_asked_is_found_later(primary, monkeypatch):
    async with open_store(primary) as store:
        store_gate(store).hold()
        task = await begun(store.store(keys(0), [0]))
        with monkeypatch.context() as patch:
            patch.setattr(store.block_store, "poll", fails)
            store_gate(store).release()
            with pytest.raises(OSError, match="out of luck"):
                await task  # the engine has signalled, and will not again
        await store.drain()
        assert store.lookup(key(0))


@pytest.mark.parametrize("still_fails", [False, True])
async def test_closing_waits_for_jobs_that_could_not_be_asked(primary, monkeypatch, still_fails):
    monkeypatch.setattr("async_tier.aio.RETRY_S", 0.0)
    store = open_store(primary)
    store_gate(store).hold()
    task = await begun(store.store(keys(0), [0]))
    with monkeypatch.context() as patch:
        patch.setattr(store.block_store, "poll", fails)
        for call in (store.store([], []), task):  # the first ends at once, and so all are asked
            with pytest.raises(OSError, match="out of luck"):
                await call
        if still_fails:
            let_go_in_drain(store, patch)
            await store.close()
    if not still_fails:
        closing = await begun(store.close())
        assert not closing.done()
        store_gate(store).release()
        await closing
    assert store.statistics().blocks_stored == 1
    await stay_idle(polls_of(store, monkeypatch))


def fails() -> None:
    raise OSError("out of luck")


async def test_opening_and_closing_leaks_nothing(primary):
    async def once() -> None:
        async with open_store(primary, blocks=4) as store:
            await store.store(keys(0), [0])

    await once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        await once()
    assert len(os.listdir("/proc/self/fd")) == before
