"""The CUDA engine: what it queues, when it waits, and what becomes of a job when CUDA refuses something.

With CUDA emulated all of it runs; on a GPU those marked `emulated` are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from async_tier import block_store, engines
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig
from async_tier.memory import pinned, registration
from async_tier.streams import _native, cuda, cuda_driver
from async_tier.streams.cuda import CudaEngine
from async_tier.streams.row_stream import UNLIMITED, RowStream
from async_tier.streams.rows import Rows
from async_tier.testing import Gate, load_gate, store_gate
from tests import helpers
from tests.cuda_emulator import Kind
from tests.helpers import keys, make_tier, returns, until
from tests.rows import map_anew, primary_rows

ROW_BYTES = 4096
POOLS = ["host", "cuda:0"]
# CUresult
OUT_OF_MEMORY, ILLEGAL_ADDRESS, NOT_SUPPORTED, UNKNOWN = 2, 700, 801, 999

emulated = pytest.mark.emulated
each_pool = pytest.mark.parametrize("pool", POOLS)


def make_store(primary: np.ndarray, blocks: int = 64, **options) -> BlockStore:
    """A BlockStore on the CUDA engine. Pieces of pool "host" are 8 KiB, two rows, unless the options say otherwise."""
    options = {"engine": "cuda", "bytes_to_use": blocks * primary.shape[1], "staging_bytes": "64KiB", **options}
    store = BlockStore(Rows.of_view(memoryview(primary)), TierConfig.parse(options))
    helpers.remember(store, primary)
    return store


@pytest.fixture
def primary() -> np.ndarray:
    return primary_rows(128, ROW_BYTES)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of two rows, also of one leg."""
    monkeypatch.setattr(cuda, "MAX_PIECE_BYTES", 2 * ROW_BYTES)


def under_way(store: BlockStore, stream: cuda.CudaStream, emulator) -> None:
    """Wait until the engine has queued all that it may on a held stream: it has asked for the end of it since."""
    until(lambda: store.engine.seconds_under_way > 0, "a copy was queued")
    asked = emulator.count("event_query")
    until(lambda: emulator.count("event_query") >= asked + 3, "the thread has looked after the stream")


def pending(emulator, stream: cuda.CudaStream) -> int:
    return sum(emulator.pending(handle) for handle in stream.handles)


def names(count: int, first: int = 0) -> list[bytes]:
    return keys(*range(first, first + count))


def finish(store: BlockStore) -> dict[int, bool]:
    """Whether each job succeeded, when all have ended."""
    returns(lambda: store.drain() or True)
    ends = store.poll()
    assert len({end.job_id for end in ends}) == len(ends), "a job was reported twice"
    return {end.job_id: end.success for end in ends}


def assert_round_trip(store: BlockStore, primary: np.ndarray, count: int = 40) -> None:
    """Blocks come back into other rows, to the byte."""
    before = primary.copy()
    store.submit_store(1001, names(count, 5000), range(count))
    assert finish(store) == {1001: True}
    primary[:] = 0
    store.submit_load(1002, names(count, 5000)[::-1], range(64, 64 + count))
    assert finish(store) == {1002: True}
    assert np.array_equal(primary[64 : 64 + count], before[:count][::-1])
    primary[:] = before


# ------------------------------------------------------------------------------------------------------------- streams


@each_pool
def test_streams_are_none_that_torch_hands_out(primary, pool):
    store = make_store(primary, pool=pool)
    ours = {*store.engine.load_stream.handles, *store.engine.store_stream.handles}
    assert len(ours) == (4 if pool == "host" else 2)
    # Its pool has 32 a priority, handed out in turn.
    theirs = {torch.cuda.Stream(priority=priority).cuda_stream for priority in (0, -1) for _ in range(40)}
    assert len(theirs) < 80, "torch no longer hands out the same streams again"
    assert not ours & theirs
    assert 0 not in ours


@each_pool
def test_bytes_come_back_in_jobs_of_many_pieces(primary, pool):
    store = make_store(primary, pool=pool)
    assert_round_trip(store, primary)
    assert_round_trip_of_large_rows(pool)


def assert_round_trip_of_large_rows(pool: str) -> None:
    """Rows larger than a piece go in parts."""
    large = primary_rows(128, 3 * ROW_BYTES + 40, seed=2)
    assert_round_trip(make_store(large, pool=pool), large, count=10)


@emulated
@each_pool
def test_events_are_used_again(primary, pool, emulator):
    store = make_store(primary, pool=pool)

    def jobs(turns: range) -> int:
        for turn in turns:
            store.submit_store(turn, names(40, 100 * turn), range(40))
            finish(store)
        return emulator.count("event_create")

    created = jobs(range(10))
    assert 0 < created < 30
    assert jobs(range(10, 40)) - created < 10


@emulated
@each_pool
def test_an_event_is_used_again_only_when_it_was_seen_complete(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    store.submit_store(1, names(2, 900), [0, 1])
    assert finish(store) == {1: True}
    stream = store.engine.store_stream
    with Gate(stream):
        store.submit_store(2, names(2), [0, 1])
        under_way(store, stream, emulator)
        for turn in range(3, 10):  # recorded by one of these, it would say that the store has ended
            store.submit_load(turn, names(2, 900), [5, 6])
            store.loads_in_flight[0].synchronize()
            assert [(end.job_id, end.success) for end in store.poll()] == [(turn, True)]
    assert finish(store) == {2: True}


# --------------------------------------------------------------------------------------------------- R1: nothing waits


@emulated
@each_pool
def test_r1_nothing_waits_while_a_stream_is_held(primary, pool):
    store = make_store(primary, pool=pool)
    store.submit_store(1, names(4), range(4))
    finish(store)
    load_gate(store).hold()
    store_gate(store).hold()

    def a_step() -> list:
        store.submit_load(2, names(4), range(10, 14))
        store.submit_store(3, names(40, 100), range(40))
        hit = store.lookup(names(1)[0])
        ended = store.poll()
        store.end_step()
        store.finish_sequence("r")
        return [hit, ended]

    assert returns(a_step) == [True, []]
    assert store.statistics().jobs_in_flight == 2


@emulated
@each_pool
def test_r1_what_is_queued_costs_the_scheduler_less_than_two_milliseconds(primary, pool):
    store = make_store(primary, pool=pool)
    store.submit_store(0, names(2, 900), [0, 1])
    finish(store)
    with load_gate(store), store_gate(store):
        # The best of many, because the machine is shared: a call that waits does so every time.
        times: dict[str, list[float]] = {}
        turns = range(1, 11)
        for turn in turns:
            for what, call in {
                "submit_store": lambda turn=turn: store.submit_store(turn, names(4, 10 * turn), range(4)),
                "submit_load": lambda turn=turn: store.submit_load(100 + turn, names(2, 900), [9, 10]),
                "poll": store.poll,
                "lookup": lambda: store.lookup(names(1)[0]),
                "end of step": store.end_step,
            }.items():
                started = time.perf_counter()
                call()
                times.setdefault(what, []).append(time.perf_counter() - started)
        assert all(min(took) < 0.002 for took in times.values()), times
    assert finish(store) == dict.fromkeys([*turns, *(100 + turn for turn in turns)], True)


@emulated
@each_pool
def test_r1_drain_is_what_waits(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    with store_gate(store):
        store.submit_store(1, names(8), range(8))
        draining = threading.Thread(target=store.drain, daemon=True)
        draining.start()
        under_way(store, store.engine.store_stream, emulator)
        assert draining.is_alive()
    draining.join(helpers.PATIENCE_S)
    assert not draining.is_alive()
    assert [end.job_id for end in store.poll()] == [1]


@emulated
@each_pool
def test_no_copy_is_between_two_places_in_host_memory_nor_to_pageable_memory(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    assert_round_trip(store, primary)
    assert emulator.copies(Kind.H2D)[1] >= 40 * ROW_BYTES
    assert emulator.copies(Kind.D2H)[1] >= 40 * ROW_BYTES
    assert emulator.copies(Kind.H2H) == (0, 0)
    assert emulator.copies_pageable() == 0


# --------------------------------------------------------------------------------------------------------- driver calls


def driver_calls(emulator) -> int:
    return sum(
        emulator.count(name) for name in ("memcpy_batch_async", "memcpy_async", "event_record", "stream_wait_event")
    )


@emulated
@each_pool
def test_a_thousand_rows_go_in_at_most_20_driver_calls(pool, emulator):
    primary = primary_rows(2000, ROW_BYTES)
    store = make_store(primary, blocks=1000, pool=pool, staging_bytes="64MiB")
    scattered = list(range(0, 2000, 2))
    for submit in (store.submit_store, store.submit_load):
        before = driver_calls(emulator)
        submit(1, names(1000), scattered)
        assert finish(store) == {1: True}
        assert 0 < driver_calls(emulator) - before <= 20


@emulated
def test_neighbouring_rows_are_one_copy(emulator):
    primary = primary_rows(200, ROW_BYTES)
    store = make_store(primary, blocks=100, pool="cuda:0")
    store.submit_store(1, names(100), range(100, 200))
    assert finish(store) == {1: True}
    assert emulator.copies(Kind.H2D) == (1, 100 * ROW_BYTES)


@emulated
@each_pool
@pytest.mark.parametrize("why", ["an old driver", "WSL2", "the key"])
def test_without_the_batch_call_rows_go_one_by_one(primary, pool, why, emulator):
    if why == "an old driver":
        emulator.hide("cuMemcpyBatchAsync")
    elif why == "WSL2":
        emulator.set_attribute(91, 0)  # CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    store = make_store(primary, pool=pool, batch_copies=why != "the key")
    assert not store.engine.has_batch
    before = primary.copy()
    rows = list(range(0, 80, 2))
    store.submit_store(1, names(40), rows)
    assert finish(store) == {1: True}
    primary[:] = 0
    store.submit_load(2, names(40), rows[::-1])
    assert finish(store) == {2: True}
    assert np.array_equal(primary[rows[::-1]], before[rows])
    assert emulator.count("memcpy_batch_async") == 0
    assert emulator.count("memcpy_async") >= 80


@emulated
@each_pool
def test_a_batch_has_a_bounded_number_of_entries(pool, monkeypatch, emulator):
    """A row that is pinned in several ranges is as many copies."""
    monkeypatch.setattr(registration.Registration.__init__, "__defaults__", (ROW_BYTES,))
    primary = primary_rows(128, 16 * ROW_BYTES)
    store = make_store(primary, pool=pool, staging_bytes="64MiB")
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    before = emulator.count("memcpy_batch_async")
    store.submit_store(1, names(64), range(0, 128, 2))
    assert finish(store) == {1: True}
    # 4 MiB is one piece, of 1024 copies from the primary; and 64 or 1 to the arena, or 1 to the staging.
    assert emulator.copies(Kind.H2D) == (1024, 1024 * ROW_BYTES)
    assert emulator.count("memcpy_batch_async") - before == 2
    assert_round_trip(store, primary, count=30)


# -------------------------------------------------------------------------------------------------------- order, R7, R6


@emulated
@each_pool
def test_jobs_of_a_stream_end_in_order_and_one_by_one(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    stream = store.engine.store_stream
    Gate(stream).hold()
    for job_id in range(3):
        store.submit_store(job_id, names(2, 10 * job_id), [0, 1])
    assert store.poll() == []
    ended: list[int] = []

    def step() -> bool:
        for handle in stream.handles:
            emulator.step(handle)
        ended.extend(end.job_id for end in store.poll())
        return len(ended) == 3

    until(step, "all jobs ended")
    assert ended == [0, 1, 2]


@emulated
@each_pool
def test_r7_stores_in_flight_are_bounded(primary, pool, small_pieces, emulator):
    limit = 4 * 2 * ROW_BYTES
    store = make_store(primary, pool=pool, max_inflight_store_bytes=limit, staging_bytes="256KiB")
    stream = store.engine.store_stream
    for turn in range(2):  # as many the second time
        with Gate(stream):
            moved = emulator.copies(Kind.H2D)[1]
            store.submit_store(turn, names(60, 100 * turn), range(60))
            under_way(store, stream, emulator)
            assert emulator.copies(Kind.H2D)[1] - moved == limit
        assert finish(store) == {turn: True}


@emulated
@each_pool
def test_what_is_queued_goes_on_though_nobody_calls(primary, pool, small_pieces, emulator):
    store = make_store(primary, pool=pool, max_inflight_store_bytes=2 * ROW_BYTES)
    before = primary.copy()
    store.submit_store(1, names(20, 900), range(20))
    assert finish(store) == {1: True}
    streams = (store.engine.load_stream, store.engine.store_stream)
    for stream in streams:
        RowStream.limit(stream, 0)
    primary[100:120] = 0
    store.submit_store(2, names(40), range(40))
    store.submit_load(3, names(20, 900), range(100, 120))
    store.submit_store(4, names(4, 100), range(4))
    events = [*store.stores_in_flight, *store.loads_in_flight]
    for stream in streams:
        RowStream.limit(stream, UNLIMITED)
    until(lambda: all(event.is_done for event in events), "all of it has ended")
    assert np.array_equal(primary[100:120], before[:20])
    assert sorted((end.job_id, end.success) for end in store.poll()) == [(2, True), (3, True), (4, True)]


@emulated
@each_pool
def test_copies_go_on_while_a_python_thread_keeps_the_gil(primary, pool, small_pieces, emulator):
    """With an endless switch interval, who has the GIL keeps it: the witness, who wants it, never gets it."""
    store = make_store(primary, pool=pool, max_inflight_store_bytes=2 * ROW_BYTES)
    before = sys.getswitchinterval()
    gate, seen = threading.Event(), []
    witness = threading.Thread(target=lambda: (gate.wait(), seen.append("ran")))
    sys.setswitchinterval(10 * helpers.PATIENCE_S)
    try:
        witness.start()  # it runs until it waits at the gate
        gate.set()
        store.submit_store(1, names(40), range(40))
        store.submit_store(2, names(20, 100), range(20))
        last = store.stores_in_flight[-1]
        deadline = time.monotonic() + helpers.PATIENCE_S
        while not last.is_done and time.monotonic() < deadline:
            pass
        done, witnessed = last.is_done, list(seen)
    finally:
        sys.setswitchinterval(before)
    witness.join(helpers.PATIENCE_S)
    assert done
    assert not witnessed
    assert finish(store) == {1: True, 2: True}


@emulated
@each_pool
def test_the_end_of_a_job_is_signalled(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        store.signal(fd)
        stream = store.engine.store_stream
        with Gate(stream):
            store.submit_store(1, names(4), range(4))
            under_way(store, stream, emulator)
            assert not select.select([fd], [], [], 0)[0]
        assert select.select([fd], [], [], helpers.PATIENCE_S)[0]
        assert [(end.job_id, end.success) for end in store.poll()] == [(1, True)], "the signal comes after the end"
        assert os.eventfd_read(fd) == 1
    finally:
        store.signal(-1)
        os.close(fd)


@emulated
@each_pool
def test_r7_a_load_overtakes_queued_stores(primary, pool, small_pieces, emulator):
    # On a GPU copies of one direction share an engine, in order of submission: only what is in flight is ahead.
    store = make_store(primary, pool=pool, max_inflight_store_bytes=2 * 2 * ROW_BYTES, staging_bytes="64KiB")
    store.submit_store(1, names(2, 900), [0, 1])
    assert finish(store) == {1: True}
    emulator.set_delay(None, 2000.0)
    moved = emulator.copies(Kind.H2D)[1]
    store.submit_store(2, names(60), range(60))
    store.submit_load(3, names(2, 900), [100, 101])
    returns(lambda: store.loads_in_flight[0].synchronize() or True)
    assert not store.stores_in_flight[0].is_done
    assert emulator.copies(Kind.H2D)[1] - moved < 30 * ROW_BYTES, "the load waited for most of the stores"
    emulator.set_delay(None, 0.0)
    assert finish(store) == {2: True, 3: True}


@emulated
def test_r7_loads_that_wait_for_room_go_before_stores(primary, emulator):
    """Both legs of a store would take their turns with theirs, and halve what they make."""
    store = make_store(primary, blocks=80, pool="host")
    store.submit_store(1, names(40, 900), range(40))
    assert finish(store) == {1: True}
    for stream in (store.engine.load_stream, store.engine.store_stream):
        RowStream.limit(stream, 0)
    moved = emulator.copies(Kind.H2D)[1]
    emulator.set_delay(None, 1000.0)
    store.submit_store(2, names(40), range(40))
    store.submit_load(3, names(40, 900), range(64, 104))
    for stream in (store.engine.store_stream, store.engine.load_stream):
        RowStream.limit(stream, UNLIMITED)
    returns(lambda: store.loads_in_flight[0].synchronize() or True)
    of_stores = emulator.copies(Kind.H2D)[1] - moved - 40 * ROW_BYTES
    assert of_stores <= 20 * ROW_BYTES, "they began long before the last piece of the load"
    emulator.set_delay(None, 0.0)
    assert finish(store) == {2: True, 3: True}


@emulated
def test_stores_go_on_where_loads_are_stalled(primary, emulator):
    """After a refusal a direction takes nothing more until its streams are empty: the other one does."""
    store = make_store(primary, pool="host")
    store.submit_store(1, names(4, 900), range(4))
    assert finish(store) == {1: True}
    with load_gate(store):
        emulator.inject("memcpy_async", 2, UNKNOWN)
        store.submit_load(2, names(2, 900), [10, 11])
        until(lambda: emulator.count("stream_query") > 4, "it is asked whether the streams are empty")
        store.submit_load(3, names(2, 902), [12, 13])
        store.submit_store(4, names(2), [0, 1])
        ends = []
        until(lambda: ends.extend(store.poll()) or ends, "the store ended")
        assert [(end.job_id, end.success) for end in ends] == [(4, True)]
    assert finish(store) == {2: False, 3: True}


@emulated
def test_a_staging_slot_is_overwritten_only_when_its_second_leg_has_read_it(primary, emulator):
    # The first legs of all pieces could run at once; the second legs are held, and have a slot each.
    store = make_store(primary, pool="host")
    before = primary.copy()
    second = store.engine.store_stream.handles[1]
    emulator.hold(second)
    store.submit_store(1, names(40), range(40))
    under_way(store, store.engine.store_stream, emulator)
    emulator.release(second)
    assert finish(store) == {1: True}
    primary[:] = 0
    store.submit_load(2, names(40), range(40))
    assert finish(store) == {2: True}
    assert np.array_equal(primary[:40], before[:40])


@emulated
@each_pool
def test_pieces_in_flight_are_bounded_in_number_as_well(primary, pool, small_pieces, monkeypatch, emulator):
    # Each piece costs some six driver calls, and a launch queue takes a thousand.
    monkeypatch.setattr(cuda, "MAX_PIECES", 5)
    store = make_store(primary, pool=pool, staging_bytes="1MiB")
    piece = 2 * ROW_BYTES if pool != "host" else (512 << 10) // 5 // 256 * 256
    stream = store.engine.store_stream
    before = primary.copy()
    with Gate(stream):
        calls = driver_calls(emulator)
        store.submit_store(1, names(60), range(60))
        store.submit_store(2, names(60, 100), range(60))
        store.submit_store(3, names(8, 200), range(60))
        under_way(store, stream, emulator)
        assert emulator.copies(Kind.H2D)[1] <= 5 * piece
        assert driver_calls(emulator) - calls <= 5 * 6 + 3
    assert finish(store)[1]
    primary[:] = 0
    store.submit_load(4, names(60), range(60))
    assert finish(store) == {4: True}
    assert np.array_equal(primary[:60], before[:60])


@emulated
@pytest.mark.parametrize("batch", [True, False])
def test_copies_in_flight_are_bounded_in_number_as_well(batch, emulator):
    """Rows that are no neighbours are a copy each; a launch queue takes a thousand of them, or 26,000 in batches."""
    primary = primary_rows(40_000, 64)
    store = make_store(primary, blocks=20_000, pool="cuda:0", batch_copies=batch)
    stream = store.engine.store_stream
    most, calls = (8192 + 512, 100) if batch else (512 + 128, 700)
    for turn in range(2):  # as many the second time
        with Gate(stream):
            copies = emulator.copies(Kind.H2D)[0]
            store.submit_store(turn, names(20_000, 50_000 * turn), range(0, 40_000, 2))
            under_way(store, stream, emulator)
            assert most // 2 < emulator.copies(Kind.H2D)[0] - copies <= most
            assert emulator.pending(stream.handles[0]) <= calls
        assert finish(store) == {turn: True}
        assert store.num_blocks == 20_000


def test_staging_is_cut_into_slots_that_do_not_overlap(primary, monkeypatch):
    made = []

    real = _native.CudaEngine
    monkeypatch.setattr(_native, "CudaEngine", lambda *arguments: made.append(arguments) or real(*arguments))
    for staging_bytes, slots, piece_bytes in (
        (64 << 20, 8, 4 << 20),
        (2000 << 10, 4, 250 << 10),
        (1 << 30, 64, 4 << 20),
    ):
        make_store(primary, staging_bytes=staging_bytes)
        _, _, size, loads, stores = made[-1]
        assert (size, loads[1], stores[1]) == (piece_bytes, slots, slots)
        assert stores[2] - loads[2] == slots * piece_bytes


@emulated
def test_loads_do_not_wait_for_the_staging_of_stores(primary):
    store = make_store(primary, pool="host")
    store.submit_store(1, names(2, 900), [0, 1])
    finish(store)
    store_gate(store).hold()
    store.submit_store(2, names(60), range(60))
    store.submit_load(3, names(2, 900), [100, 101])
    job = store.loads_in_flight[0]
    assert returns(lambda: job.synchronize() or True)
    assert np.array_equal(primary[100:102], primary[0:2])


# --------------------------------------------------------------------------------------------------------- registration


@emulated
@each_pool
def test_the_primary_is_registered_and_given_back(primary, pool, emulator):
    before = emulator.count("host_register"), emulator.count("host_unregister")
    store = make_store(primary, pool=pool)
    assert store.engine.driver.is_pinned(primary.ctypes.data)
    registered = emulator.count("host_register") - before[0]
    assert registered == (2 if pool == "host" else 1)
    driver, context = store.engine.driver, store.engine.context
    store.close()
    store.close()
    assert emulator.count("host_unregister") - before[1] == registered
    with context:
        assert not driver.is_pinned(primary.ctypes.data)


@emulated
def test_the_primary_is_registered_before_the_arena_is_allocated(primary, monkeypatch):
    order = []
    real = cuda_driver.Driver.register

    def register(driver, address, size):
        order.append(address)
        real(driver, address, size)

    monkeypatch.setattr(cuda_driver.Driver, "register", register)
    store = make_store(primary, pool="host")
    assert order == [primary.ctypes.data, store.arena.rows.address]


def test_what_somebody_else_has_registered_is_used_and_left_to_them(primary):
    torch.cuda.init()
    context = cuda_driver.DeviceContext(driver := cuda_driver.Driver(), 0)
    with context:
        driver.register(primary.ctypes.data, primary.nbytes)
        store = make_store(primary)
        assert store.statistics().engine == "cuda"
        assert_round_trip(store, primary)
        store.close()
        assert driver.is_pinned(primary.ctypes.data)
        driver.unregister(primary.ctypes.data)
    context.release()


@emulated
@each_pool
def test_tiers_on_one_primary_unpin_it_with_the_last_of_them(primary, pool, emulator):
    first, second = make_store(primary, pool=pool), make_store(primary, pool=pool)
    assert second.statistics().engine == "cuda"
    first.close()
    assert_round_trip(second, primary)
    assert emulator.copies_pageable() == 0
    third = make_store(primary, pool=pool)
    second.close()
    assert_round_trip(third, primary)
    assert emulator.copies_pageable() == 0
    driver, context = third.engine.driver, third.engine.context
    third.close()
    with context:
        assert not driver.is_pinned(primary.ctypes.data)
    assert not registration.in_use()


@emulated
def test_what_a_tier_has_left_pinned_is_not_used_by_the_next(primary, emulator, caplog):
    store = make_store(primary)
    stream = store.engine.store_stream
    with Gate(stream):
        store.submit_store(1, names(2), [0, 1])
        under_way(store, store.engine.store_stream, emulator)
        store.close()
        assert not store.engine.is_quiet
    until(lambda: all(emulator.pending(handle) == 0 for handle in stream.handles), "the copies ended")
    # Other memory at the same addresses: copies would go to the pages that were pinned.
    map_anew(primary)
    primary[:] = primary_rows(128, ROW_BYTES, seed=3)
    later = make_store(primary)
    assert later.statistics().engine == "host"
    assert "a tier that ended badly has left memory pinned" in caplog.text
    assert_round_trip(later, primary)
    helpers.free_primaries()  # unpins it: what is pinned now is what is there
    helpers.remember(later, primary)
    again = make_store(primary)
    assert again.statistics().engine == "cuda"
    assert_round_trip(again, primary)
    assert not registration.abandoned() & registration.in_use()


@each_pool
def test_what_a_tier_has_pinned_is_not_used_where_other_memory_is_by_now(primary, pool, caplog):
    """Its copies would go to pages that nobody sees any more: wrong bytes, all reported as right."""
    forgotten = make_store(primary, pool=pool)
    map_anew(primary)
    primary[:] = primary_rows(128, ROW_BYTES, seed=3)
    later = make_store(primary, pool=pool)
    assert later.statistics().engine == "host"
    assert "a tier that was not shut down has pinned other memory" in caplog.text
    assert_round_trip(later, primary)
    forgotten.close()
    again = make_store(primary, pool=pool)
    assert again.statistics().engine == "cuda"
    assert_round_trip(again, primary)
    again.close()
    assert not registration.in_use()


@emulated
def test_what_is_unpinned_late_may_be_used_again(primary, monkeypatch):
    gate = threading.Event()
    real = cuda_driver.Driver.unregister

    def unregister(driver, address):
        assert gate.wait(helpers.PATIENCE_S)
        real(driver, address)

    monkeypatch.setattr(cuda_driver.Driver, "unregister", unregister)
    store = make_store(primary)
    store.close()
    gate.set()
    until(lambda: not registration.in_use(), "it was unpinned after all")
    driver, context = store.engine.driver, store.engine.context
    with context:
        driver.register(primary.ctypes.data, primary.nbytes)  # somebody else
        later = make_store(primary)
        assert later.statistics().engine == "cuda"
        later.close()
        driver.unregister(primary.ctypes.data)


@emulated
def test_what_the_driver_pins_is_what_is_there(primary):
    # Whatever was left at these addresses, somebody has unpinned it since.
    first = make_store(primary)
    first.engine.registrations[primary.ctypes.data].abandon_memory()
    with first.engine.context:
        first.engine.driver.unregister(primary.ctypes.data)
    make_store(primary)
    assert make_store(primary).statistics().engine == "cuda"


@emulated
def test_new_memory_that_counts_as_registered_is_not_what_was(primary, monkeypatch, caplog):
    # Somebody's registration has outlived the memory that was at these addresses before the arena.
    real = cuda_driver.Driver.register

    stale = []

    def register(driver, address, size):
        real(driver, address, size)
        if address != primary.ctypes.data:
            stale.append(address)
            real(driver, address, size)  # 712

    with monkeypatch.context() as patched:
        patched.setattr(cuda_driver.Driver, "register", register)
        store = make_store(primary)
    assert store.statistics().engine == "host"
    assert "has left memory pinned at these addresses" in caplog.text
    assert_round_trip(store, primary)
    context = cuda_driver.DeviceContext(driver := cuda_driver.Driver(), 0)
    with context:
        (address,) = stale
        driver.unregister(address)
    context.release()


@emulated
def test_a_tier_does_not_wait_for_ever_for_anothers_pinning(primary, monkeypatch, caplog):
    monkeypatch.setattr(registration, "LOCK_TIMEOUT_S", 0.05)
    with registration.locked():
        store = returns(lambda: make_store(primary))
    assert store.statistics().engine == "host"
    assert "takes too long to pin" in caplog.text


def test_rows_that_are_pinned_are_counted_while_another_thread_pins_them():
    class Pinning(registration.Registration):
        """Another thread pins the last range between two readings of `_done`."""

        _done = property(lambda self: next(counts), lambda self, value: None)
        _rows = Rows(address=0, count=4, row_bytes=16, stride=16)

    pinning = Pinning.__new__(Pinning)
    pinning.range_starts = [0, 32]
    counts = iter([1, 2])
    assert pinning.rows_ready == 2
    counts = iter([2])
    assert pinning.rows_ready == 4


@emulated
def test_what_is_registered_in_part_is_refused(primary, caplog):
    torch.cuda.init()
    context = cuda_driver.DeviceContext(driver := cuda_driver.Driver(), 0)
    with context:
        driver.register(primary.ctypes.data, primary.nbytes // 2)
        store = make_store(primary)
        assert store.statistics().engine == "host"
        driver.unregister(primary.ctypes.data)
    assert "already" in caplog.text
    context.release()


@emulated
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("nth", [1, 2])
def test_where_pinning_is_refused_copy_threads_copy(primary, pool, nth, emulator, caplog):
    if pool != "host" and nth == 2:
        nth = 1  # there is one registration, of the primary
    emulator.inject("host_register", nth, NOT_SUPPORTED)
    store = make_store(primary, pool=pool)
    assert store.statistics().engine == "host"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "copy threads and host memory" in caplog.text
    assert emulator.count("host_unregister") == nth - 1
    assert_round_trip(store, primary)
    # Nothing is left pending for whoever calls CUDA next.
    assert torch.zeros(4, device="cuda").cpu().sum() == 0


@emulated
def test_large_memory_is_registered_in_ranges_and_no_copy_crosses_them(primary, monkeypatch, emulator):
    monkeypatch.setattr(registration.Registration.__init__, "__defaults__", (8 * ROW_BYTES,))
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    store = make_store(primary, staging_bytes="256KiB")  # pieces of eight rows
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    assert emulator.count("host_register") == 128 // 8 + 64 // 8
    before = primary.copy()
    store.submit_store(1, names(3, 900), range(3))  # so that neither side's rows begin with a range
    store.submit_store(2, names(40), range(5, 45))
    assert finish(store) == {1: True, 2: True}
    store.submit_load(3, names(40), range(70, 110))
    assert finish(store) == {3: True}
    assert np.array_equal(primary[70:110], before[5:45])
    # To the driver a copy that leaves its registration is one to pageable memory.
    assert emulator.copies_pageable() == 0
    store.close()
    assert emulator.count("host_unregister") == emulator.count("host_register")


@emulated
def test_rows_are_taken_as_their_memory_is_pinned(primary, monkeypatch):
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    gate = threading.Event()
    real = registration.Registration.register_next

    def register_next(self):
        if self._done and self._rows.count == 64:
            assert gate.wait(helpers.PATIENCE_S)
        real(self)

    monkeypatch.setattr(registration.Registration, "register_next", register_next)
    store = make_store(primary)
    store.submit_store(1, names(20), range(20))
    assert finish(store) == {1: True}
    assert store.num_blocks == 8
    assert store.statistics().blocks_refused == 12
    gate.set()
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    store.submit_store(2, names(64, 100), range(64))
    assert finish(store) == {2: True}
    assert store.num_blocks == 64


@emulated
def test_memory_is_populated_before_it_is_pinned(primary, monkeypatch):
    """Else the driver does it, and keeps others out meanwhile."""
    monkeypatch.setattr(registration.Registration.__init__, "__defaults__", (8 * ROW_BYTES,))
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    done = []
    populate, register = _native.populate, cuda_driver.Driver.register

    def note(kind, call):
        def noted(*arguments):
            done.append((kind, *arguments[-2:]))
            return call(*arguments)

        return noted

    monkeypatch.setattr(_native, "populate", note("populate", populate))
    monkeypatch.setattr(cuda_driver.Driver, "register", note("register", register))
    store = make_store(primary)
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    rows = [(primary.ctypes.data, 128), (store.arena.rows.address, 64)]
    ranges = [(first + at * ROW_BYTES, 8 * ROW_BYTES) for first, count in rows for at in range(0, count, 8)]
    assert done == [(kind, *each) for each in ranges for kind in ("populate", "register")]
    store.close()


@emulated
def test_between_two_ranges_others_have_their_turn(primary, monkeypatch):
    """As long as pinning one took: meanwhile calls into CUDA wait, also those of other processes."""
    monkeypatch.setattr(registration.Registration.__init__, "__defaults__", (32 * ROW_BYTES,))
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 16 * ROW_BYTES)
    done: list[object] = []
    real = cuda_driver.Driver.register
    clock = iter(range(0, 10_000, 7))

    def register(driver, address, size):
        real(driver, address, size)
        done.append("register")

    class Stop(threading.Event):
        def wait(self, timeout=None):
            done.append(timeout)
            return super().wait(0 if timeout == 7 else timeout)

    fake = SimpleNamespace(monotonic=lambda: next(clock), sleep=done.append)
    monkeypatch.setattr(registration, "time", fake)
    monkeypatch.setattr(pinned, "threading", SimpleNamespace(Event=Stop, Thread=threading.Thread))
    monkeypatch.setattr(cuda_driver.Driver, "register", register)
    store = make_store(primary)
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    assert done == [0, *["register", 7] * 3, "register", *["register", 7] * 3, "register"]


@emulated
@pytest.mark.parametrize("pool", POOLS)
def test_a_range_that_is_refused_is_halved_and_tried_again(primary, pool, monkeypatch, emulator, caplog):
    """Down to a size. What is larger than the rest is in one place, not below the row's size: rows are cut as well."""
    monkeypatch.setattr(registration.Registration.__init__, "__defaults__", (16 * ROW_BYTES,))
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 16 * ROW_BYTES)
    monkeypatch.setattr(registration, "MIN_RANGE_BYTES", 4 * ROW_BYTES)
    sizes: dict[int, list[int]] = {}
    real = cuda_driver.Driver.register

    def register(driver, address, size):
        at = sizes.setdefault(size // ROW_BYTES, [])
        at.append(address)
        if size > 4 * ROW_BYTES and len(at) > 1:
            raise cuda_driver.CudaError("cuMemHostRegister", OUT_OF_MEMORY, "no", "no")
        real(driver, address, size)

    monkeypatch.setattr(cuda_driver.Driver, "register", register)
    store = make_store(primary, staging_bytes="256KiB", pool=pool)
    assert store.statistics().engine == "cuda"
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    # Of the primary the first 16 rows, of the rest the first 8, then 4 at a time.
    of_primary = store.engine.registrations[primary.ctypes.data]
    assert of_primary.range_starts == [primary.ctypes.data + row * ROW_BYTES for row in (0, 16, *range(24, 128, 4))]
    assert store.engine.range_alignment_of(store.primary) == 4 * ROW_BYTES
    before = primary.copy()
    store.submit_store(1, names(3, 900), range(3))
    store.submit_store(2, names(40), range(5, 45))
    assert finish(store) == {1: True, 2: True}
    store.submit_load(3, names(40), range(70, 110))
    assert finish(store) == {3: True}
    assert np.array_equal(primary[70:110], before[5:45])
    assert emulator.copies_pageable() == 0
    # A tier that comes later is not refused, but told that the memory is registered: it has the same ranges in the end.
    monkeypatch.setattr(cuda_driver.Driver, "register", real)
    later = make_store(primary, staging_bytes="256KiB", pool=pool)
    assert later.statistics().engine == "cuda"
    assert later.engine.registrations[primary.ctypes.data].range_starts == of_primary.range_starts
    until(lambda: later.arena.ready == 64, "all of the arena is pinned")
    assert_round_trip(later, primary)
    assert emulator.copies_pageable() == 0
    assert not caplog.records
    later.close()
    store.close()
    assert not registration.in_use()


@emulated
@pytest.mark.parametrize("pool", POOLS)
def test_what_is_still_refused_at_1_mib_is_not_pinned(pool, monkeypatch, caplog):
    primary = primary_rows(24, 1 << 20)
    sizes = []
    real = cuda_driver.Driver.register

    def register(driver, address, size):
        sizes.append(size >> 20)
        if len(sizes) > 1:
            raise cuda_driver.CudaError("cuMemHostRegister", OUT_OF_MEMORY, "no", "no")
        real(driver, address, size)

    with monkeypatch.context() as patched:
        patched.setattr(cuda_driver.Driver, "register", register)
        store = make_store(primary, pool=pool, blocks=4)
    assert store.statistics().engine == "host"
    assert sizes == [16, 8, 4, 2, 1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not registration.in_use()


@emulated
@each_pool
@pytest.mark.parametrize("seed", range(15))
def test_random_jobs_are_cut_and_merged_rightly(pool, seed, monkeypatch, emulator):
    """Rows of any size, in any order, neighbours among them; ranges and pieces that end anywhere in them."""
    draw = np.random.default_rng(seed)
    row_bytes = int(draw.integers(1, 5 * ROW_BYTES))
    range_bytes = ROW_BYTES << int(draw.integers(0, 4))
    monkeypatch.setattr(registration.Registration.__init__, "__defaults__", (range_bytes,))
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", range_bytes)
    monkeypatch.setattr(cuda, "MAX_PIECE_BYTES", int(draw.integers(256, 4 * ROW_BYTES)))
    primary = primary_rows(128, row_bytes, seed=seed)
    options = {"bytes_to_use": 64 * row_bytes, "staging_bytes": 64 << 10, "batch_copies": bool(seed % 3)}
    store = make_store(primary, pool=pool, **options)
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    for turn in range(3):
        before = primary.copy()
        count, first = int(draw.integers(1, 64)), int(draw.integers(0, 60))
        sources = draw.permutation(128)[:count] if turn else np.arange(first, first + count)
        targets = draw.permutation(128)[:count]
        store.submit_store(1, names(count, 100 * turn), sources)
        assert finish(store) == {1: True}
        primary[:] = 0
        store.submit_load(2, names(count, 100 * turn), targets)
        assert finish(store) == {2: True}
        assert np.array_equal(primary[targets], before[sources])
        others = np.setdiff1d(np.arange(128), targets)
        assert not primary[others].any(), "a row that is none of the job's"
        primary[:] = before
    assert emulator.copies_pageable() == 0


@emulated
@each_pool
def test_rows_may_be_larger_than_a_range(pool, monkeypatch, emulator):
    monkeypatch.setattr(registration.Registration.__init__, "__defaults__", (2 * ROW_BYTES,))
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 2 * ROW_BYTES)
    large = primary_rows(128, 3 * ROW_BYTES + 40, seed=2)
    store = make_store(large, pool=pool, staging_bytes="256KiB")
    assert store.arena.ready >= 1
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    assert_round_trip(store, large)
    assert emulator.copies_pageable() == 0


@emulated
def test_an_arena_that_cannot_be_pinned_whole_is_used_as_far_as_it_is(primary, monkeypatch, emulator, caplog):
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    emulator.inject("host_register", 4, OUT_OF_MEMORY)
    store = make_store(primary)
    until(lambda: "holds 16 blocks and not 64" in caplog.text, "the rest is refused")
    assert store.arena.ready == 16
    store.submit_store(1, names(40), range(40))
    assert finish(store) == {1: True}
    assert store.num_blocks == 16


def policy_of(address: int) -> str:
    """The NUMA policy of the mapping that begins there, as the kernel says it."""
    with open("/proc/self/numa_maps") as lines:
        return next(line.split()[1] for line in lines if int(line.split()[0], 16) == address)


@emulated
@pytest.mark.parametrize(("node", "policy"), [(0, "prefer:0"), (-1, "default"), (1000, "default")])
def test_the_tiers_memory_is_next_to_the_gpu(primary, node, policy, emulator, caplog):
    emulator.set_attribute(134, node)  # HOST_NUMA_ID; 1000 is none that the system has
    store = make_store(primary)
    assert policy_of(store.arena.rows.address) == policy
    assert_round_trip(store, primary)
    assert not caplog.records


@emulated
def test_a_policy_that_the_user_has_given_holds(primary, emulator):
    libc = ctypes.CDLL(None, use_errno=True)
    nodes = ctypes.c_ulong(1)

    def with_a_policy() -> str:
        set_mempolicy, bind = {"x86_64": 238, "aarch64": 237}[os.uname().machine], 2
        assert libc.syscall(set_mempolicy, bind, ctypes.byref(nodes), 64) == 0
        return policy_of(make_store(primary).arena.rows.address)

    emulator.set_attribute(134, 0)
    assert returns(with_a_policy) == "default"


@emulated
def test_a_driver_that_does_not_know_its_node_is_no_failure(primary, monkeypatch, caplog):
    refusal = cuda_driver.CudaError("cuDeviceGetAttribute", 1, "CUDA_ERROR_INVALID_VALUE", "invalid argument")
    monkeypatch.setattr(cuda_driver.Driver, "host_node", lambda *_: (_ for _ in ()).throw(refusal))
    store = make_store(primary)
    assert store.statistics().engine == "cuda"
    assert_round_trip(store, primary)
    assert not caplog.records


# ---------------------------------------------------------------------------------------------- which engine, and where


def spec(workers: int, **more: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(parallel=SimpleNamespace(world_size=workers, **more)))


def test_auto_is_cuda_where_torch_has_a_context(primary):
    torch.cuda.init()
    store = make_store(primary, engine="auto")
    assert store.statistics().engine == "cuda"


@pytest.mark.parametrize(
    ("initialized", "workers", "expected"), [(True, 1, "cuda"), (True, 2, "host"), (False, 1, "host")]
)
def test_auto_is_cuda_where_the_only_worker_lives_in_this_process(primary, monkeypatch, initialized, workers, expected):
    from async_tier.manager import AsyncSecondaryTierManager

    torch.cuda.init()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_initialized", lambda: initialized)
        patched.setattr("async_tier.vllm.compat.node_count", lambda spec: 1)
        tier = AsyncSecondaryTierManager(spec(workers), memoryview(primary), "async", staging_bytes="64KiB")
    helpers.remember(tier.block_store, primary)
    assert tier.statistics().engine == expected


def test_auto_with_a_pool_on_the_device_is_cuda(primary):
    assert make_store(primary, engine="auto", pool="cuda:0").statistics().engine == "cuda"


def test_a_device_that_is_not_there_is_refused_in_words(primary):
    with pytest.raises(ValueError, match=r"^pool 'cuda:99' names a GPU that is not there: this process has cuda:0 to "):
        make_store(primary, pool="cuda:99")


@pytest.mark.parametrize("size", [1 << 50, (1 << 64) + (1 << 20)])
def test_more_than_the_device_has_is_refused_in_words(primary, size):
    """Also what is more than the driver's 64 bits, of which the lower ones would ask for 1 MiB."""
    words = r"^the tier asks for .* TiB \(.* bytes\) of device memory, but cuda:0 has .* set bytes_to_use to less$"
    with pytest.raises(MemoryError, match=words):
        make_store(primary, pool="cuda:0", bytes_to_use=size)


def test_more_than_the_machine_has_is_refused_in_words_and_unpins(primary):
    with pytest.raises(MemoryError, match="set bytes_to_use to less"):
        make_store(primary, bytes_to_use=1 << 50)
    store = make_store(primary)
    assert store.engine.name == "cuda"
    assert store.engine.driver.is_pinned(primary.ctypes.data)


@emulated
@pytest.mark.parametrize("point", ["malloc", "stream_create", "host_register"])
def test_where_the_engine_cannot_be_had_copy_threads_copy_and_nothing_is_left(primary, point, emulator, caplog):
    torch.cuda.init()
    free_before = torch.cuda.mem_get_info()[0]
    emulator.inject(point, 1, UNKNOWN if point == "stream_create" else OUT_OF_MEMORY)
    store = make_store(primary)
    assert store.statistics().engine == "host"
    assert len(caplog.records) == 1
    assert_round_trip(store, primary)
    assert torch.cuda.mem_get_info()[0] == free_before


@emulated
@each_pool
@pytest.mark.parametrize(
    ("point", "nth"), [("stream_create", 1), ("stream_create", 2), ("malloc", 1), ("host_register", 1)]
)
def test_an_engine_that_cannot_be_had_leaves_no_stream_and_no_context(primary, pool, point, nth, emulator):
    if pool == "cuda:0" and point == "malloc":
        return  # in words: test_more_than_the_device_has_is_refused_in_words
    torch.cuda.init()
    created, destroyed = emulator.count("stream_create"), emulator.count("stream_destroy")
    emulator.inject(point, nth, UNKNOWN)
    store = make_store(primary, pool=pool)
    assert store.statistics().engine == "host"
    refused = point == "stream_create"
    assert emulator.count("stream_create") - created - refused == emulator.count("stream_destroy") - destroyed
    assert emulator.count("primary_context_retain") == emulator.count("primary_context_release") == 1


@pytest.mark.parametrize("function", ["torch.cuda.init", "torch.cuda.current_device"])
def test_where_torch_cannot_start_copy_threads_copy(primary, function, monkeypatch, caplog):
    torch.cuda.init()

    def refuse(*_, **__):
        raise RuntimeError("no CUDA today")

    monkeypatch.setattr(function, refuse)
    store = make_store(primary)
    assert store.statistics().engine == "host"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no CUDA today" in caplog.text
    assert_round_trip(store, primary)


@emulated
@pytest.mark.starts_process
def test_another_device_than_the_current_one():
    script = """
from tests import cuda_emulator
emulator = cuda_emulator.load()
import torch
from tests.test_cuda_engine import ROW_BYTES, assert_round_trip, make_store
from tests.helpers import returns
from tests.rows import primary_rows
primary = primary_rows(128, ROW_BYTES)
torch.cuda.init()
free = [torch.cuda.mem_get_info(device)[0] for device in (0, 1)]
store = make_store(primary, pool="cuda:1")
assert store.statistics().engine == "cuda"
assert torch.cuda.mem_get_info(0)[0] == free[0]
assert torch.cuda.mem_get_info(1)[0] == free[1] - 64 * ROW_BYTES
returns(lambda: assert_round_trip(store, primary) or True)
torch.zeros(4, device="cuda:0")
assert_round_trip(store, primary)
assert torch.cuda.current_device() == 0
torch.cuda.set_device(1)
other = primary_rows(128, ROW_BYTES, seed=2)
assert_round_trip(make_store(other, pool="cuda:0"), other)
store.close()
"""
    environment = {**os.environ, "CUDAEMU_DEVICES": "2"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@emulated
@pytest.mark.starts_process
def test_every_engine_of_a_node_uses_a_gpu_of_its_own():
    script = """
from tests import cuda_emulator
cuda_emulator.load()
import sys
import torch
from tests.test_cuda_engine import ROW_BYTES, spec
from tests.helpers import remember, returns
from tests.rows import primary_rows
from async_tier.manager import AsyncSecondaryTierManager
primary = primary_rows(128, ROW_BYTES)

def tier_of(workers, rank, **options):
    of = spec(workers, data_parallel_rank_local=rank, data_parallel_index=rank, data_parallel_size=4 // workers)
    options = {"staging_bytes": "64MiB", "bytes_to_use": "1MiB", **options}
    return AsyncSecondaryTierManager(of, memoryview(primary), "async", **options)

def gpu_of(*args, **options):
    free = [torch.cuda.mem_get_info(device)[0] for device in range(4)]
    tier = tier_of(*args, **options)
    taken = [device for device in range(4) if torch.cuda.mem_get_info(device)[0] < free[device]]
    engine = tier.statistics().engine
    tier.shutdown()
    return engine, taken

torch.cuda.init()
assert [gpu_of(1, rank, engine="cuda") for rank in range(4)] == [("cuda", [rank]) for rank in range(4)]
assert [gpu_of(2, rank, engine="cuda") for rank in range(2)] == [("cuda", [0]), ("cuda", [2])]
assert gpu_of(2, 1, engine="cuda", device="cuda:3") == ("cuda", [3])
assert gpu_of(2, 1, engine="cuda", pool="cuda:1") == ("cuda", [1])
assert gpu_of(2, 1) == gpu_of(1, 1) == gpu_of(2, 1, device="cuda:3") == ("host", [])
try:
    tier_of(2, 2, engine="cuda")
except ValueError as error:
    assert str(error) == "device 'cuda:4' names a GPU that is not there: this process has cuda:0 to cuda:3", error
else:
    raise AssertionError
"""
    environment = {**os.environ, "CUDAEMU_DEVICES": "4"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_an_engines_first_gpu_is_the_one_that_vllms_worker_takes():
    from vllm.config import ParallelConfig

    from async_tier.vllm.compat import first_gpu

    for workers, index, local in ((1, 0, None), (4, 1, 1), (2, 5, 1), (2, 3, None)):
        parallel = SimpleNamespace(
            world_size=workers,
            data_parallel_index=index,
            data_parallel_rank_local=local,
            distributed_executor_backend="mp",
            data_parallel_backend="mp",
            nnodes_within_dp=1,
        )
        config = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
        assert first_gpu(config) == ParallelConfig.get_local_gpu_index(parallel, 0)


@each_pool
def test_any_thread_may_call(primary, pool):
    # A thread that has called nothing of CUDA's before has no context.
    store = make_store(primary, pool=pool)
    assert returns(lambda: assert_round_trip(store, primary) or True)


@emulated
def test_nothing_of_cuda_is_called_in_a_forked_child(primary):
    store = make_store(primary)
    store.submit_store(1, names(2), [0, 1])
    assert finish(store) == {1: True}
    with store_gate(store):
        store.submit_store(2, names(2, 5), [0, 1])
        child = os.fork()
        if child == 0:
            code = 1
            called = []
            cuda_driver.Driver.push_context = lambda *_: called.append("CUDA")
            try:
                store.submit_store(3, names(2, 10), [0, 1])
                with pytest.raises(RuntimeError, match="fork"):
                    store.drain()
                store.close()
                refused = [(end.job_id, end.success) for end in store.poll()] == [(3, False), (2, False)]
                # A call would have been refused, which is how a lost context looks.
                code = 0 if refused and not called and store.engine.is_quiet and store.engine.broken is None else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert finish(store) == {2: True}
    assert_round_trip(store, primary)


@emulated
@pytest.mark.starts_process
def test_importing_and_parsing_call_nothing_of_cuda():
    script = """
from tests import cuda_emulator
emulator = cuda_emulator.load()
import async_tier.manager, async_tier.engines, async_tier.memory.pinned, async_tier.streams.cuda
from async_tier.config import TierConfig
TierConfig.parse({"engine": "cuda"})
import torch
assert not torch.cuda.is_initialized()
assert emulator.count("cuDevicePrimaryCtxRetain") == emulator.count("stream_create") == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@emulated
@each_pool
def test_a_job_says_how_long_its_copies_took(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    emulator.set_delay(None, 5000.0)
    store.submit_store(1, names(1), [0])
    returns(lambda: store.drain() or True)
    (end,) = store.poll()
    assert 0.005 <= end.seconds < helpers.PATIENCE_S


@emulated
@each_pool
def test_nobody_elses_stream_waits_for_ours(primary, pool):
    # Not even the legacy default stream, which waits for every stream that was not made "non-blocking".
    store = make_store(primary, pool=pool)
    store_gate(store).hold()
    store.submit_store(1, names(2), [0, 1])
    assert returns(lambda: torch.zeros(4, device="cuda").cpu().tolist()) == [0.0] * 4


@emulated
@each_pool
def test_the_callers_context_is_left_as_it_was(primary, pool, emulator):
    def calls() -> bool:
        library = ctypes.CDLL("libcuda.so.1")
        before, after = ctypes.c_void_p(), ctypes.c_void_p()
        library.cuCtxGetCurrent(ctypes.byref(before))
        store = make_store(primary, pool=pool)
        torch_made = ctypes.c_void_p()
        library.cuCtxGetCurrent(ctypes.byref(torch_made))
        assert_round_trip(store, primary)
        library.cuCtxGetCurrent(ctypes.byref(after))
        return torch_made.value == after.value

    assert returns(calls)


@emulated
@each_pool
def test_loads_in_flight_are_bounded_as_well(primary, pool, small_pieces, monkeypatch, emulator):
    monkeypatch.setattr(cuda, "MAX_INFLIGHT_LOAD_BYTES", 8 * ROW_BYTES)
    store = make_store(primary, pool=pool, staging_bytes="256KiB")
    stream = store.engine.load_stream
    before = primary.copy()
    store.submit_store(1, names(60), range(60))
    assert finish(store) == {1: True}
    with Gate(stream):
        moved = emulator.copies(Kind.D2H)[1]
        store.submit_load(2, names(60), range(64, 124))
        under_way(store, stream, emulator)
        assert emulator.copies(Kind.D2H)[1] - moved == 8 * ROW_BYTES
    assert finish(store) == {2: True}
    assert np.array_equal(primary[64:124], before[:60])


@each_pool
def test_one_piece_goes_however_small_the_bound(primary, pool):
    store = make_store(primary, pool=pool, max_inflight_store_bytes=1)
    assert_round_trip(store, primary)


@emulated
@each_pool
def test_loads_and_stores_at_once_do_not_meet(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    before = primary.copy()
    store.submit_store(1, names(20), range(20))
    assert finish(store) == {1: True}
    for turn in range(5):
        emulator.set_jitter(300.0, turn)
        primary[100:120] = 0
        with load_gate(store), store_gate(store):
            store.submit_load(2, names(20), range(100, 120))
            store.submit_store(3, names(20, 1000 + 20 * turn), range(30, 50))
        assert finish(store) == {2: True, 3: True}
        assert np.array_equal(primary[100:120], before[:20])
        primary[60:80] = 0
        store.submit_load(4, names(20, 1000 + 20 * turn), range(60, 80))
        assert finish(store) == {4: True}
        assert np.array_equal(primary[60:80], before[30:50])
        store.index.drop(names(20, 1000 + 20 * turn))


# ------------------------------------------------------------------------------------------------------------- failures

# What a job of two pieces calls: of (what, pool), (point, the how manieth call of it).
CALLS = {
    ("the start", "host"): ("event_record", 1),
    ("the first leg", "host"): ("memcpy_async", 1),
    ("the end of the first leg", "host"): ("event_record", 2),
    ("the wait between the legs", "host"): ("stream_wait_event", 1),
    ("the second leg", "host"): ("memcpy_async", 2),
    ("the end", "host"): ("event_record", 3),
    ("the second piece", "host"): ("memcpy_async", 3),
    ("the end of the second piece", "host"): ("event_record", 5),
    ("the start", "cuda:0"): ("event_record", 1),
    ("the copy", "cuda:0"): ("memcpy_async", 1),
    ("the end", "cuda:0"): ("event_record", 2),
    ("the second piece", "cuda:0"): ("memcpy_async", 2),
    ("the end of the second piece", "cuda:0"): ("event_record", 3),
    **{("the question for the end", pool): ("event_query", 1) for pool in POOLS},
    # Rows that are no neighbours go in a batch, one a piece.
    **{("a batch", pool): ("memcpy_batch_async", 1) for pool in POOLS},
    **{("a batch of the second piece", pool): ("memcpy_batch_async", 2) for pool in POOLS},
}


@emulated
@pytest.mark.parametrize("is_load", [False, True])
@pytest.mark.parametrize(
    ("pool", "point", "nth"), [pytest.param(pool, *call, id=f"{what}, {pool}") for (what, pool), call in CALLS.items()]
)
def test_a_refused_call_fails_that_job_alone(primary, pool, is_load, point, nth, small_pieces, emulator, caplog):
    step = 2 if point == "memcpy_batch_async" else 1
    store = make_store(primary, pool=pool)
    before = primary.copy()
    store.submit_store(1, names(8, 900), range(8))
    assert finish(store) == {1: True}
    streams = (store.engine.load_stream, store.engine.store_stream)
    for stream in streams:
        RowStream.limit(stream, 0)
    emulator.inject(point, nth, UNKNOWN)
    if is_load:
        store.submit_load(2, names(4, 900), range(100, 100 + 4 * step, step))
    else:
        store.submit_store(2, names(4), range(0, 4 * step, step))
    store.submit_load(3, names(4, 904), range(110, 114))
    store.submit_store(4, names(4, 50), range(50, 54))
    failing = (store.loads_in_flight if is_load else store.stores_in_flight)[0]
    for stream in streams if is_load else streams[::-1]:
        RowStream.limit(stream, UNLIMITED)
        until(lambda: failing.is_done, "the job whose call is refused is the first")
    assert finish(store) == {2: False, 3: True, 4: True}
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.getMessage().startswith(f"Job 2 ({'load' if is_load else 'store'}, 4 blocks) failed: CUDA refused to ")
    assert re.search(r": cu[A-Za-z]+: unknown error \(CUDA_ERROR_UNKNOWN, 999\)$", line.getMessage())
    if is_load:
        assert not any(store.lookup(name) for name in names(4, 900)), "a key whose load failed is gone (R4)"
    else:
        assert not any(store.lookup(name) for name in names(4))
    store.end_step()
    assert np.array_equal(primary[110:114], before[4:8])
    assert store.engine.broken is None
    assert_round_trip(store, primary)
    assert store.statistics().rows_used == store.num_blocks
    store.close()
    assert emulator.count("event_destroy") == emulator.count("event_create"), "one was lost"


@emulated
@each_pool
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_event_that_cannot_be_had_fails_that_job_alone(primary, pool, nth, emulator, caplog):
    if pool != "host" and nth == 3:
        return  # a piece of one leg takes two
    store = make_store(primary, pool=pool)
    emulator.inject("event_create", nth, OUT_OF_MEMORY)
    store.submit_store(1, names(2), [0, 1])
    assert finish(store) == {1: False}
    assert "cuEventCreate: out of memory" in caplog.text
    assert_round_trip(store, primary)
    store.close()
    assert emulator.count("event_destroy") == emulator.count("event_create") - 1, "the one that was refused"


@emulated
@pytest.mark.parametrize("is_load", [False, True])
@pytest.mark.parametrize(("point", "nth"), [("memcpy_async", 2), ("event_record", 2), ("event_record", 3)])
def test_r6_a_failed_job_is_reported_only_when_what_was_queued_has_ended(primary, is_load, point, nth, emulator):
    store = make_store(primary, pool="host")
    store.submit_store(1, names(2, 900), [0, 1])
    assert finish(store) == {1: True}
    stream = store.engine.load_stream if is_load else store.engine.store_stream
    with Gate(stream):
        emulator.inject(point, nth, UNKNOWN)
        if is_load:
            store.submit_load(2, names(2, 900), [10, 11])
        else:
            store.submit_store(2, names(2), [0, 1])
        until(lambda: emulator.count("stream_query") > 4, "it is asked whether the streams are empty")
        for _ in range(5):
            assert store.poll() == [], "a leg of it is in flight"
            store.end_step()
        assert store.statistics().jobs_in_flight == 1
    assert finish(store) == {2: False}
    assert_round_trip(store, primary)


@emulated
def test_r6_what_cannot_be_known_fails(primary, emulator):
    # An event that cannot be asked says nothing of whether the bytes arrived.
    store = make_store(primary)
    with store_gate(store):
        store.submit_store(1, names(2), [0, 1])
        emulator.inject("event_query", 1, UNKNOWN)
        until(lambda: emulator.count("stream_query") > 4, "it is asked whether the streams are empty")
        assert store.poll() == []
    assert finish(store) == {1: False}
    assert store.num_blocks == 0


@emulated
@each_pool
def test_nothing_of_a_failed_job_is_copied_after_its_report(primary, pool, small_pieces, emulator):
    # Its first pieces are in flight and the rest waits for room when its event cannot be asked.
    store = make_store(primary, pool=pool, max_inflight_store_bytes=1)
    stream = store.engine.store_stream
    with Gate(stream):
        store.submit_store(1, names(20), range(20))
        under_way(store, stream, emulator)
        emulator.inject("event_query", 1, UNKNOWN)
        until(lambda: emulator.count("stream_query") > 2, "it is asked whether the streams are empty")
        assert store.poll() == []
    assert finish(store) == {1: False}
    reported = emulator.copies(Kind.H2D)
    assert reported == (1, 2 * ROW_BYTES)
    # The rows are free again: others' bytes must stay in them.
    assert_round_trip(store, primary, count=8)
    store.submit_store(2, names(64, 200), range(64))
    assert finish(store) == {2: True}


@emulated
@each_pool
def test_a_stream_that_cannot_be_asked_has_lost_its_context(primary, pool, emulator):
    # After a refusal its emptiness is asked of the stream; the driver refuses that for one reason only.
    store = make_store(primary, pool=pool)
    emulator.inject("memcpy_async", 1, UNKNOWN)
    emulator.inject("stream_query", 1, ILLEGAL_ADDRESS)
    store.submit_store(1, names(4), range(4))
    assert finish(store) == {1: False}
    assert "illegal memory access" in store.engine.broken
    assert store.num_blocks == 0


@emulated
@each_pool
def test_a_stream_that_never_says_whether_it_is_empty_loses_the_tier(primary, pool, emulator):
    """The code is none that is known to mean that; but nothing will ever be known of the job."""
    store = make_store(primary, pool=pool)
    store.submit_store(1, names(4, 900), range(4))
    assert finish(store) == {1: True}
    for _ in range(1100):
        emulator.inject("stream_query", 1, 806)
    emulator.inject("memcpy_async", 1, UNKNOWN)
    store.submit_store(2, names(4), range(4))
    assert finish(store) == {2: False}
    assert "806" in store.engine.broken
    assert store.num_blocks == 0


@emulated
@each_pool
@pytest.mark.parametrize(
    ("code", "is_lost"),
    [
        *((code, True) for code in (214, 700, 702, 710, 714, 716, 719, 721, 999)),  # no context survives them
        *((code, True) for code in (201, 400, 709)),  # it is not there, or its stream is not
        *((code, False) for code in (1, 2, 801, 900, 901, 906, 907)),
    ],
)
def test_only_what_the_context_does_not_survive_loses_the_tier(primary, pool, code, is_lost, emulator):
    store = make_store(primary, pool=pool)
    store.submit_store(1, names(4, 900), range(4))
    assert finish(store) == {1: True}
    emulator.inject("memcpy_async", 1, UNKNOWN)
    emulator.inject("stream_query", 1, code)
    store.submit_store(2, names(4), range(4))
    assert finish(store) == {2: False}
    assert (store.engine.broken is not None) == is_lost
    assert store.num_blocks == (0 if is_lost else 4)
    if not is_lost:
        assert_round_trip(store, primary)


@emulated
@each_pool
@pytest.mark.parametrize("code", [900, 901, 906, 907])
def test_what_is_refused_because_somebody_captures_is_asked_again(primary, pool, code, emulator, caplog):
    store = make_store(primary, pool=pool)
    with store_gate(store):
        store.submit_store(1, names(4), range(4))
        emulator.inject("event_query", 1, code)
        under_way(store, store.engine.store_stream, emulator)
        assert store.poll() == []
    assert finish(store) == {1: True}
    assert not caplog.records
    assert_round_trip(store, primary)


@emulated
@each_pool
def test_graphs_that_others_capture_are_not_in_the_way_nor_spoilt(primary, pool, monkeypatch, emulator, caplog):
    """F38. torch captures in mode GLOBAL, in which other threads' questions and allocations would be refused."""
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    torch.cuda.init()
    driver = ctypes.CDLL("libcuda.so.1")
    theirs = torch.cuda.Stream()
    handle, graph = ctypes.c_void_p(theirs.cuda_stream), ctypes.c_void_p()
    with ThreadPoolExecutor(1) as capturing:

        def there(call):
            return capturing.submit(call).result()

        there(lambda: torch.cuda.set_device(0))
        assert there(lambda: driver.cuStreamBeginCapture_v2(handle, 0)) == 0
        store = make_store(primary, pool=pool)
        assert store.statistics().engine == "cuda"
        until(lambda: store.arena.ready == 64, "all of the arena is pinned")
        assert_round_trip(store, primary)
        store.submit_store(1, names(4, 900), range(4))
        until(lambda: store.poll(), "it ended without a wait")
        returns(lambda: store.close() or True)
        assert there(lambda: driver.cuStreamEndCapture(handle, ctypes.byref(graph))) == 0
    assert not caplog.records
    assert emulator.count("host_unregister") == emulator.count("host_register")


@emulated
def test_a_threads_mode_towards_captures_is_left_as_it_was(primary):
    store = make_store(primary)
    driver, context = store.engine.driver, store.engine.context
    assert driver.exchange_capture_mode(1) == 0
    with context:
        with context:
            assert driver.exchange_capture_mode(2) == 2
        assert driver.exchange_capture_mode(2) == 2
        with ThreadPoolExecutor(1) as other:
            assert other.submit(lambda: driver.exchange_capture_mode(0)).result() == 0
    assert driver.exchange_capture_mode(0) == 1


STICKY = ["exec_h2d", "exec_d2h", "event_record"]


@emulated
@each_pool
@pytest.mark.parametrize("point", STICKY)
@pytest.mark.parametrize("is_load", [False, True])
def test_a_lost_context_ends_the_tier_and_nothing_else(primary, pool, point, is_load, emulator, caplog):
    store = make_store(primary, pool=pool)
    store.submit_store(1, names(4, 900), range(4))
    assert finish(store) == {1: True}
    with store_gate(store), load_gate(store):
        if is_load and pool != "host" and point == "exec_h2d":
            point = "exec_d2h"
        if not is_load and pool != "host" and point == "exec_d2h":
            point = "exec_h2d"
        emulator.inject(point, 1, ILLEGAL_ADDRESS, asynchronous=True)
        if is_load:
            store.submit_load(2, names(4, 900), range(10, 14))
            store.submit_store(3, names(4), range(20, 24))
        else:
            store.submit_store(3, names(4), range(20, 24))
            store.submit_load(2, names(4, 900), range(10, 14))
    until(emulator.sticky, "the context is lost")
    ends: dict[int, bool] = {}
    until(lambda: ends.update((end.job_id, end.success) for end in store.poll()) or len(ends) == 2, "both jobs ended")
    assert not all(ends.values())
    assert store.num_blocks == 0
    assert not store.lookup(names(1, 900)[0])
    # Later jobs fail at once, drain and close return, and that it is lost is said once.
    store.submit_store(4, names(2), [0, 1])
    store.submit_load(5, names(2), [0, 1])
    assert [(end.job_id, end.success) for end in store.poll()] == [(4, False), (5, False)]
    assert returns(lambda: store.drain() or True)
    assert store.statistics().faults == 1
    lines = [record.getMessage() for record in caplog.records]
    assert sum("go on copying" in line for line in lines) == 1
    assert all(line.startswith(("The tier could not go on", "Job ")) for line in lines)
    assert len(lines) <= 1 + 2 * 2, "before and after it was known, a kind of job"
    assert returns(lambda: store.close() or True)
    assert store.poll() == []


@emulated
def test_jobs_in_flight_when_the_context_is_lost_are_reported_as_failed_once(primary, emulator):
    store = make_store(primary, pool="host")
    for stream in (store.engine.load_stream, store.engine.store_stream):
        Gate(stream).hold()
    for job_id in range(5):
        store.submit_store(job_id, names(4, 10 * job_id), range(4))
    until(lambda: any(map(emulator.pending, store.engine.store_stream.handles)), "copies are on the stream")
    # A kind of copy that the engine's thread does not make: what it still queues must not meet the error first.
    emulator.inject("exec_d2d", 1, ILLEGAL_ADDRESS, asynchronous=True)
    with contextlib.suppress(RuntimeError):
        torch.empty(4, device="cuda").copy_(torch.empty(4, device="cuda"))
    until(emulator.sticky, "the context is lost")
    ends = []
    until(lambda: ends.extend(store.poll()) or len(ends) >= 5, "every job is reported")
    assert sorted((end.job_id, end.success) for end in ends) == [(job_id, False) for job_id in range(5)]
    assert store.poll() == []


@emulated
@each_pool
def test_nothing_of_cuda_is_called_once_the_context_is_lost(primary, pool, emulator):
    """Events and streams are gone with it, and memory that is pinned stays."""
    store = make_store(primary, pool=pool)
    emulator.inject("exec_h2d", 1, ILLEGAL_ADDRESS, asynchronous=True)
    store.submit_store(2, names(4), range(4))
    until(emulator.sticky, "the context is lost")
    assert finish(store) == {2: False}
    names_of_calls = ("event_destroy", "stream_destroy", "event_query", "stream_query", "host_unregister", "free")
    before = [emulator.count(name) for name in names_of_calls]
    store.close()
    assert [emulator.count(name) for name in names_of_calls] == before
    assert not store.engine.is_quiet


@emulated
@each_pool
@pytest.mark.parametrize("when", ["at the start", "at the end"])
def test_a_context_that_cannot_be_made_current(primary, pool, when, monkeypatch, emulator, caplog):
    store = make_store(primary, pool=pool)
    refusal = cuda_driver.CudaError("cuCtxPushCurrent", 709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "destroyed")
    with monkeypatch.context() as patched:
        patched.setattr(cuda_driver.Driver, "push_context", lambda *_: (_ for _ in ()).throw(refusal))
        if when == "at the start":
            assert make_store(primary, pool=pool).statistics().engine == "host"
            assert "CONTEXT_IS_DESTROYED" in caplog.text
        else:
            store.close()
            assert "CUDA refused to take back what the engine had" in caplog.text
            assert emulator.count("host_unregister") == 0
            store.engine.is_quiet = False  # for the end of the test, where it can be again


@emulated
def test_the_manager_survives_a_lost_context(primary, emulator, caplog):
    tier = make_tier(primary, blocks=8, engine="cuda", staging_bytes="64KiB")
    helpers.store(tier, 1, keys(0), [0])
    emulator.inject("exec_h2d", 1, ILLEGAL_ADDRESS, asynchronous=True)
    tier.submit_store(helpers.job(2, keys(1), [1]))
    until(emulator.sticky, "the context is lost")
    tier.drain_jobs()
    assert [result.success for result in tier.get_finished_jobs()] == [False]
    assert tier.get_num_blocks() == 0
    tier.submit_load(helpers.job(3, keys(0), [1], load=True))
    tier.submit_store(helpers.job(4, keys(0), [1]))
    assert [result.success for result in tier.get_finished_jobs()] == [False, False]
    tier.shutdown()
    tier.shutdown()
    assert tier.statistics().faults == 1


# ----------------------------------------------------------------------------------------------------------- closing


@pytest.fixture
def device_memory(monkeypatch) -> dict[int, int]:
    """Address -> bytes of what the tier has on the device; what is free there depends on other processes too."""
    memory: dict[int, int] = {}
    allocate, free = cuda_driver.Driver.allocate, cuda_driver.Driver.free

    def count(driver, size):
        address = allocate(driver, size)
        memory[address] = size
        return address

    def discount(driver, address):
        free(driver, address)
        del memory[address]

    monkeypatch.setattr(cuda_driver.Driver, "allocate", count)
    monkeypatch.setattr(cuda_driver.Driver, "free", discount)
    return memory


@each_pool
def test_close_gives_everything_back(primary, pool, device_memory):
    store = make_store(primary, pool=pool, blocks=4096, staging_bytes="4MiB")
    assert sum(device_memory.values()) == (4 << 20 if pool == "host" else 4096 * ROW_BYTES)
    store.submit_store(1, names(40), range(40))
    store.close()
    store.close()
    assert not device_memory
    assert {end.job_id: end.success for end in store.poll()}.keys() == {1}


@each_pool
def test_a_store_that_nobody_closes_ends_with_its_object(primary, pool, device_memory):
    store = make_store(primary, pool=pool)
    assert device_memory
    engine = weakref.ref(store.engine)
    helpers.forget()
    del store
    gc.collect()
    assert not device_memory
    assert engine() is None


@emulated
@each_pool
def test_events_and_streams_are_destroyed_by_close(primary, pool, emulator, tmp_path):
    store = make_store(primary, pool=pool, trace_path=str(tmp_path / "trace.json"))
    assert_round_trip(store, primary)
    store.close()
    assert emulator.count("event_create") == emulator.count("event_destroy") >= 3
    assert emulator.count("stream_create") == emulator.count("stream_destroy") == (4 if pool == "host" else 2)


@emulated
@each_pool
def test_events_and_streams_of_copies_that_may_be_under_way_are_left(primary, pool, emulator):
    store = make_store(primary, pool=pool)
    store_gate(store).hold()
    store.submit_store(1, names(2), [0, 1])
    under_way(store, store.engine.store_stream, emulator)
    store.close()
    assert emulator.count("event_destroy") == emulator.count("stream_destroy") == 0


@emulated
@each_pool
def test_close_waits_for_copies_in_flight_and_drops_the_rest(primary, pool, small_pieces, emulator):
    store = make_store(primary, pool=pool, max_inflight_store_bytes=2 * ROW_BYTES)
    emulator.set_delay(None, 3000.0)
    store.submit_store(1, names(20), range(20))
    store.submit_store(2, names(20, 100), range(20))
    store.close()
    assert {end.job_id: end.success for end in store.poll()} == {1: False, 2: False}
    assert store.engine.is_quiet
    assert emulator.violations() == 0


@emulated
@each_pool
def test_close_is_bounded_and_leaves_memory_that_may_be_written_to(primary, pool, emulator, caplog):
    store = make_store(primary, pool=pool)
    store_gate(store).hold()
    store.submit_store(1, names(2), [0, 1])
    under_way(store, store.engine.store_stream, emulator)
    assert returns(lambda: store.close() or True)
    assert {end.job_id: end.success for end in store.poll()} == {1: False}
    assert not store.engine.is_quiet
    assert "may be under way" in caplog.text
    assert store.engine.driver.is_pinned(primary.ctypes.data)
    stream = store.engine.store_stream
    Gate(stream).release()
    until(lambda: all(emulator.pending(handle) == 0 for handle in stream.handles), "the copies ended")
    assert emulator.sticky() == 0, "they found their memory gone"


@emulated
def test_memory_under_copies_stays_where_it_is_when_all_objects_are_gone(primary, emulator):
    store = make_store(primary)
    handles = store.engine.store_stream.handles
    rows, engine, pinned = store.arena.rows, weakref.ref(store.engine), list(store.engine.registrations.values())
    store_gate(store).hold()
    store.submit_store(1, names(2), [0, 1])
    under_way(store, store.engine.store_stream, emulator)
    store.close()
    helpers.forget()
    del store
    gc.collect()
    assert engine() is None
    for handle in handles:
        emulator.release(handle)
    until(lambda: all(emulator.pending(handle) == 0 for handle in handles), "the copies ended")
    assert emulator.sticky() == 0, "they found their memory gone"
    assert ctypes.string_at(rows.address, rows.row_bytes) == primary[0].tobytes()
    assert all(each.unpin_or_abandon() for each in pinned)


@emulated
@each_pool
@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("host_unregister", 1),
        ("host_unregister", 2),
        ("stream_destroy", 1),
        ("free", 1),
        ("primary_context_release", 1),
    ],
)
def test_what_close_is_refused_keeps_nothing_else_from_being_given_back(
    primary, pool, point, nth, monkeypatch, emulator, caplog
):
    if pool != "host" and nth == 2:
        return  # one range is pinned, of the primary
    torch.cuda.init()
    free_before = torch.cuda.mem_get_info()[0]
    allocated, real = [], cuda_driver.Driver.allocate
    monkeypatch.setattr(cuda_driver.Driver, "allocate", lambda *of: allocated.append(real(*of)) or allocated[-1])
    store = make_store(primary, pool=pool)
    assert_round_trip(store, primary)
    rows, driver, context = store.arena.rows, store.engine.driver, store.engine.context
    emulator.inject(point, nth, UNKNOWN)
    assert returns(lambda: store.close() or True)
    assert store.engine.is_quiet
    if point != "primary_context_release":
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "refused to take back what the engine had, in 1 calls" in caplog.text
    assert emulator.count("stream_destroy") == (4 if pool == "host" else 2)
    assert emulator.count("free") == 1
    assert emulator.count("host_unregister") == (2 if pool == "host" else 1)
    held = free_before - torch.cuda.mem_get_info()[0]
    assert bool(held) == (point == "free")
    with context:
        left = [address for address in (rows.address, primary.ctypes.data) if driver.is_pinned(address)]
        if pool == "host" and point == "host_unregister" and nth == 1:
            assert left == [rows.address]
            assert ctypes.string_at(rows.address, 1), "what is pinned stays mapped"
        else:
            assert left == ([primary.ctypes.data] if point == "host_unregister" else [])
        for address in allocated if held else ():
            driver.free(address)
    assert all(each.unpin_or_abandon() for each in store.engine.registrations.values() if each is not None)


@emulated
def test_what_another_tier_has_kept_from_being_unpinned_can_be_later(primary, monkeypatch):
    store = make_store(primary)
    pinned = store.arena.registration
    monkeypatch.setattr(registration, "LOCK_TIMEOUT_S", 0.05)
    with registration.locked():
        assert not pinned.unpin_or_abandon()
    assert pinned.unpin_or_abandon()
    assert pinned.unpin_or_abandon()


@emulated
def test_a_range_that_cannot_be_unpinned_keeps_no_other_pinned(primary, monkeypatch, emulator):
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    store = make_store(primary)
    until(lambda: store.arena.ready == 64, "all of the arena is pinned")
    driver, context, of_arena = store.engine.driver, store.engine.context, store.arena.registration
    starts = list(of_arena.range_starts)
    emulator.inject("host_unregister", 3, UNKNOWN)
    store.close()
    with context:
        assert [driver.is_pinned(address) for address in starts] == [at == 2 for at in range(8)]
        assert not driver.is_pinned(primary.ctypes.data)
    assert of_arena.unpin_or_abandon()


@emulated
@each_pool
@pytest.mark.parametrize("unpinning_waits", [False, True])
def test_close_does_not_wait_for_the_work_of_others_on_the_device(
    primary, pool, unpinning_waits, emulator, monkeypatch, caplog
):
    # To free device memory waits for all of it, and so may unpinning.
    monkeypatch.setattr(cuda, "FREE_TIMEOUT_S", 0.05)
    emulator.set_unregister_waits(unpinning_waits)
    torch.cuda.init()
    free_before = torch.cuda.mem_get_info()[0]
    store = make_store(primary, pool=pool)
    driver, context = store.engine.driver, store.engine.context
    theirs = torch.cuda.Stream()
    emulator.hold(theirs.cuda_stream)
    torch.cuda.Event().record(theirs)
    assert returns(lambda: store.close() or True)
    assert store.engine.is_quiet
    with context:
        assert driver.is_pinned(primary.ctypes.data) == unpinning_waits
    assert len(caplog.records) == unpinning_waits, "it has not unpinned the memory in time"
    emulator.release(theirs.cuda_stream)
    until(lambda: torch.cuda.mem_get_info()[0] == free_before, "device memory was freed")


@emulated
def test_close_is_bounded_where_unpinning_hangs(primary, monkeypatch, caplog):
    gate = threading.Event()
    real = cuda_driver.Driver.unregister

    def unregister(driver, address):
        assert gate.wait(helpers.PATIENCE_S)
        real(driver, address)

    monkeypatch.setattr(cuda_driver.Driver, "unregister", unregister)
    store = make_store(primary)
    rows, driver, context = store.arena.rows, store.engine.driver, store.engine.context
    assert returns(lambda: store.close() or True)
    assert "has not unpinned" in caplog.text
    assert ctypes.string_at(rows.address, 1), "what is pinned stays mapped"
    gate.set()
    with context:
        until(lambda: not driver.is_pinned(primary.ctypes.data), "it went on when it could")


@emulated
@each_pool
def test_close_is_bounded_also_where_a_signal_comes_at_its_end(primary, pool, emulator):
    """Whoever waits for the GIL, or handles a signal, is back when the time is over: then no job may be left open."""
    store = make_store(primary, pool=pool)
    store_gate(store).hold()
    store.submit_store(1, names(2), [0, 1])
    under_way(store, store.engine.store_stream, emulator)
    event = store.stores_in_flight[0]
    until_over = time.monotonic() + 0.3

    def handler(*_: object) -> None:
        while time.monotonic() < until_over:
            pass

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        quiet = store.engine.store_stream.engine.close(0.15)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not quiet
    assert event.is_done
    assert event.failed
    store.close()
    assert not store.engine.is_quiet, "its thread has ended, and the copies have not"


@emulated
def test_an_interrupted_close_leaves_memory_under_copies(primary, emulator, monkeypatch):
    monkeypatch.setattr(cuda, "CLOSE_TIMEOUT_S", helpers.PATIENCE_S)
    store = make_store(primary)
    stream = store.engine.store_stream
    with Gate(stream):
        store.submit_store(1, names(2), [0, 1])
        under_way(store, stream, emulator)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            for close in (store.close, store._release):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(KeyboardInterrupt):
                    close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert registration.abandoned()
    assert store.engine.store_stream.engine.close(helpers.PATIENCE_S), "the copies ended"
    assert emulator.sticky() == 0, "they found their memory gone"
    store.engine.close()


@emulated
def test_memory_that_is_left_is_pinned_no_further(primary, emulator, monkeypatch, caplog):
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    gate = threading.Event()
    real = registration.Registration.register_next

    def register_next(self):
        if primary.ctypes.data not in self.range_starts and self.rows_ready:
            assert gate.wait(helpers.PATIENCE_S)
        real(self)

    monkeypatch.setattr(registration.Registration, "register_next", register_next)
    store = make_store(primary)
    store_gate(store).hold()
    store.submit_store(1, names(2), [0, 1])
    under_way(store, store.engine.store_stream, emulator)
    store.close()
    gate.set()
    until(lambda: not helpers.threads("async-tier-pin"), "its thread has ended")
    assert store.arena.ready <= 16


@emulated
def test_where_no_thread_can_be_started_the_process_is_ending_and_all_is_left_to_it(primary, monkeypatch, caplog):
    # Python 3.12 and later refuse new threads at exit.
    store = make_store(primary)
    real = threading.Thread.start

    def start(thread):
        if thread.name == "async-tier-close":
            raise RuntimeError("can't create new thread at interpreter shutdown")
        real(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        store.close()
    assert store.engine.is_quiet
    assert "left as it is until the process ends" in caplog.text
    assert store.engine.driver.is_pinned(primary.ctypes.data)
    assert ctypes.string_at(store.arena.rows.address, 1), "what is pinned stays mapped"
    store.engine.free_all(threading.Event(), None)


@emulated
def test_a_tier_may_end_on_the_thread_that_pins_its_memory(primary, monkeypatch, caplog):
    # The garbage collector runs wherever it likes.
    monkeypatch.setattr(pinned, "PIN_RANGE_BYTES", 8 * ROW_BYTES)
    monkeypatch.setattr(pinned, "PINNER_TIMEOUT_S", 0.05)
    made = threading.Event()
    closed = threading.Event()
    real = registration.Registration.register_next

    def register_next(self):
        if primary.ctypes.data not in self.range_starts and self.rows_ready and not closed.is_set():
            assert made.wait(helpers.PATIENCE_S)
            store.close()
            closed.set()
        real(self)

    monkeypatch.setattr(registration.Registration, "register_next", register_next)
    store = make_store(primary)
    made.set()
    assert closed.wait(helpers.PATIENCE_S)
    assert "still being pinned" in caplog.text
    assert ctypes.string_at(store.arena.rows.address, 1), "what is pinned stays mapped"
    until(lambda: not helpers.threads("async-tier-pin"), "its thread has ended")
    with store.engine.context:
        assert not store.engine.driver.is_pinned(primary.ctypes.data), "the rest was given back"
    store.arena.registration.unpin()


@emulated
@each_pool
def test_where_the_driver_does_not_say_how_long_copies_took_they_are_made_all_the_same(
    primary, pool, emulator, tmp_path
):
    path = tmp_path / "trace.json"
    for _ in range(100):
        emulator.inject("event_elapsed", 1, UNKNOWN)
    store = make_store(primary, pool=pool, trace_path=str(path))
    assert_round_trip(store, primary)
    store.close()
    assert '"store queued"' in path.read_text()


@emulated
@each_pool
def test_times_of_copies_are_between_submission_and_report(primary, pool, small_pieces, emulator):
    store = make_store(primary, pool=pool)
    emulator.set_delay(None, 2000.0)
    last = 0
    for turn in range(10):
        submitted = time.monotonic_ns()
        store.submit_store(turn, names(8, 10 * turn), range(8))  # in four pieces
        event = store.stores_in_flight[0]
        assert event.spans == []
        event.synchronize()
        seen = time.monotonic_ns()
        assert finish(store) == {turn: True}
        legs = {leg: (start, end) for leg, start, end in event.spans}
        assert list(legs) == (["in", "out"] if pool == "host" else ["copy"])
        first, *_, end = sorted(at for span in legs.values() for at in span)
        # Clocks of host and device differ by what a thread has to wait for a processor.
        assert max(submitted, last) <= first + 1_000_000
        assert first < end <= seen
        assert all(start + 4 * 1_900_000 <= end for start, end in legs.values())
        assert event.seconds == pytest.approx((end - first) / 1e9)
        last = end


@emulated
@each_pool
def test_a_tier_that_is_refused_at_the_last_moment_gives_everything_back(primary, pool, monkeypatch, tmp_path):
    from async_tier import block_store

    torch.cuda.init()
    free_before = torch.cuda.mem_get_info()[0]

    def refuse(*_):
        raise ValueError("no trace today")

    monkeypatch.setattr(block_store, "TierTrace", refuse)
    with pytest.raises(ValueError, match="no trace today"):
        make_store(primary, pool=pool, trace_path=str(tmp_path / "trace.json"))
    gc.collect()
    assert torch.cuda.mem_get_info()[0] == free_before
    assert not registration.in_use()
    assert (tmp_path / "trace.json").read_text().endswith("]\n")


@emulated
@each_pool
def test_the_end_of_one_thing_does_not_depend_on_that_of_another(primary, pool, monkeypatch, tmp_path):
    path = tmp_path / "trace.json"
    real = CudaEngine.close

    def close(engine: CudaEngine) -> None:
        real(engine)
        raise RuntimeError("badly")

    monkeypatch.setattr(CudaEngine, "close", close)
    store = make_store(primary, pool=pool, trace_path=str(path))
    helpers.forget()
    with pytest.raises(RuntimeError, match="badly"):
        store._release()
    if pool == "host":
        assert ctypes.CDLL(None).msync(ctypes.c_void_p(store.arena.rows.address), 1, 1) == -1, "it is unmapped"
    assert path.read_text().endswith("]\n")


def test_the_engine_says_what_it_is(primary):
    store = make_store(primary)
    assert isinstance(store.engine, CudaEngine)
    assert engines.uses_cuda(TierConfig(engine="cuda"))
    with pytest.raises(KeyError):
        store.engine.range_alignment_of(Rows(0, 1, 1, 1))
    with pytest.raises(ValueError, match="must be of one length"):
        store.engine.store_stream.copy_rows(store.arena.rows, [0, 1], store.primary, [0])
    with pytest.raises(ValueError, match="row 64 is not below 64"):
        store.engine.store_stream.copy_rows(store.arena.rows, [64], store.primary, [0])
    with pytest.raises(TypeError):
        store.engine.store_stream.copy_rows(store.arena.rows, [0.5], store.primary, [0])
    job = store.engine.store_stream.copy_rows(store.arena.rows, [], store.primary, [])
    assert job.is_done
    assert not job.failed
    store.close()
    late = store.engine.store_stream.copy_rows(store.arena.rows, [0], store.primary, [0])
    assert late.is_done
    assert late.failed


def test_the_engines_thread_is_punctual(primary):
    make_store(primary)
    ours = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as name:
            if name.read().startswith("async-tier-cuda"):
                with open(f"/proc/{task}/timerslack_ns") as slack:
                    ours.append((os.sched_getscheduler(int(task)), int(slack.read())))
    assert ours
    assert set(ours) == {(os.SCHED_OTHER, 1000)}


@emulated
@each_pool
def test_a_copy_that_does_not_end_is_told_while_somebody_waits_for_it(primary, pool, monkeypatch, emulator, caplog):
    monkeypatch.setattr(block_store, "LATE_S", 0.02)
    store = make_store(primary, pool=pool)
    with store_gate(store):
        store.submit_store(1, names(2), [0, 1])
        draining = threading.Thread(target=store.drain, daemon=True)
        draining.start()
        until(lambda: caplog.records, "it is told")
    draining.join(helpers.PATIENCE_S)
    assert "has not ended" in caplog.text
    assert [(end.job_id, end.success) for end in store.poll()] == [(1, True)]


@emulated
@each_pool
def test_a_copy_that_does_not_end_is_told_once(primary, pool, small_pieces, monkeypatch, emulator, caplog):
    monkeypatch.setattr(cuda, "MAX_PIECES", 4)
    store = make_store(primary, pool=pool)
    store.submit_store(0, names(60, 900), range(60))  # the places of pieces are taken in turn
    assert finish(store) == {0: True}
    until(lambda: store.engine.seconds_under_way == 0.0, "nothing is under way")
    monkeypatch.setattr(block_store, "LATE_S", 0.02)
    with store_gate(store):
        store.submit_store(1, names(2), [0, 1])
        until(lambda: store.poll() or caplog.records, "it is told")
        for _ in range(3):
            store.poll()
            store.end_step()
        assert len(caplog.records) == 1
        assert "has not ended" in caplog.text
    assert finish(store) == {1: True}
    until(lambda: store.engine.seconds_under_way == 0.0, "nothing is under way")
    assert len(caplog.records) == 1
