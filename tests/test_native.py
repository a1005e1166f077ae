"""The native copy threads: kernels, streams, events, and the life of an engine.

No test sleeps or measures. What has to be simultaneous is held; what has to come after is shown by data: a copy that
reads what another one writes tells by its bytes which of the two came first.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import mmap
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_tier.memory.host import Arena
from async_tier.streams import _native
from async_tier.streams.base import CopyEvent
from async_tier.streams.host import HostEngine, HostStream
from async_tier.streams.rows import Rows
from async_tier.testing import Gate
from async_tier.vllm.openmp import cpus_before_openmp

# Far beyond what anything here takes; only a failure waits that long.
PATIENCE_S = 20
PAGE = mmap.PAGESIZE
PIECE = 2 << 20
KERNELS = _native.kernels()

GUARD = 128
FILL = 0xA5


def around(*sizes: int) -> list[int]:
    return [size + step for size in sizes for step in (-1, 0, 1)]


def random_sizes(count: int, most: int, seed: int) -> list[int]:
    """Of every order of magnitude alike."""
    return [int(size) for size in np.exp2(np.random.default_rng(seed).uniform(0, np.log2(most), count))]


SMALL_SIZES = [0, *around(1, 32, 64, 128, PAGE, PAGE + 64, 4 * PAGE, 8 * PAGE), *random_sizes(16, 16 * PAGE, seed=1)]
LARGE_SIZES = [*around(PIECE), 2 * PIECE + 1, *random_sizes(2, 2 * PIECE, seed=2)]
OFFSETS = (0, 1, 31, 32, 63)


def aligned(size: int) -> np.ndarray:
    """`size` bytes that start on a page's boundary, all FILL."""
    memory = np.full(size + PAGE, FILL, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size]


def randomised(*shape: int, seed: int = 1) -> np.ndarray:
    memory = aligned(int(np.prod(shape)))
    memory[:] = np.random.default_rng(seed).integers(0, 256, memory.size, dtype=np.uint8)
    return memory.reshape(shape)


SOURCE = randomised(2 * PIECE + PAGE)
# Where copies go whose bytes nobody looks at. Not freed while a copy is under way, as an array made for it would be.
SCRATCH = aligned(SOURCE.size)
ONES = np.ones(PAGE, np.uint8)


def at(*arrays: np.ndarray) -> np.ndarray:
    """The addresses of arrays."""
    return np.array([array.ctypes.data for array in arrays], np.uint64)


def rows_of(array: np.ndarray, which: Iterable[int] | None = None) -> np.ndarray:
    """The addresses of the rows of a two-dimensional array, all of them or some."""
    numbers = np.arange(len(array)) if which is None else np.asarray(which)
    return numbers.astype(np.uint64) * np.uint64(array.strides[0]) + np.uint64(array.ctypes.data)


def rows(array: np.ndarray) -> Rows:
    return Rows.of_view(memoryview(array))


def move(stream: HostStream, destination: np.ndarray, source: np.ndarray) -> CopyEvent:
    """Queue one copy of all bytes of `source`."""
    return stream.copy(at(destination), at(source), source.nbytes)


def fresh_pages(count: int = 1023) -> np.ndarray:
    """Pages that nobody has touched, shape (count, PAGE): slow to copy to, as each one faults."""
    return np.frombuffer(mmap.mmap(-1, count * PAGE), np.uint8).reshape(count, PAGE)


def slow_piece(stream: HostStream, pages: np.ndarray, target: np.ndarray, source: np.ndarray) -> CopyEvent:
    """Queue a single piece that takes a millisecond: ones into fresh `pages`, and at the end `source` to `target`."""
    sizes = np.full(len(pages) + 1, PAGE // 4, np.uint64)
    sizes[-1] = source.nbytes
    ones = np.full(len(pages), ONES.ctypes.data, np.uint64)
    return stream.copy(np.append(rows_of(pages), at(target)), np.append(ones, at(source)), sizes)


def check_exact(copy: Callable[[int, int, int], None], size: int, dst_offset: int, src_offset: int) -> None:
    """`copy(dst, src, size)` copies these bytes and leaves those around them."""
    source = SOURCE[src_offset : src_offset + size]
    area = aligned(size + dst_offset + 2 * GUARD)
    expected = area.copy()
    expected[GUARD + dst_offset :][:size] = source
    copy(area.ctypes.data + GUARD + dst_offset, source.ctypes.data, size)
    assert np.array_equal(area, expected), f"{size} bytes to offset {dst_offset} from offset {src_offset}"


def eventually(condition: Callable[[], bool]) -> bool:
    """For what the kernel does soon after: a joined thread is listed for some microseconds more."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        os.sched_yield()
    return True


def thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def gone(threads: Iterable[int]) -> bool:
    return eventually(lambda: not thread_ids() & set(threads))


def run_python(code: str, cpus: set[int] | None = None) -> subprocess.CompletedProcess[str]:
    """The end of a process that ran the code, started on these CPUs as taskset would."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        preexec_fn=cpus and (lambda: os.sched_setaffinity(0, cpus)),
    )


# For run_python.
PRELUDE = """
import os, sys, threading, json
import numpy as np
from async_tier.streams.host import HostEngine
from async_tier.testing import Gate
source, target = np.ones(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
def copy(stream, times=1):
    one = np.ones(times, np.uint64)
    return stream.copy(one * target.ctypes.data, one * source.ctypes.data, source.nbytes)
"""


@pytest.fixture
def engine() -> Iterator[HostEngine]:
    """With one thread."""
    engine = HostEngine(1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[HostEngine]:
    """One for all of Hypothesis's examples."""
    engine = HostEngine(2)
    yield engine
    engine.close()


@pytest.fixture
def streams() -> Iterator[list[HostStream]]:
    """Four streams served by one thread, the first one first. The last one serves as a fence: its copies come when
    nothing else can."""
    core = _native.HostEngine(1, queues=4)
    yield [HostStream(core, queue) for queue in range(4)]
    core.close()


def fence(streams: list[HostStream]) -> None:
    """Block until the one thread has done all that it may do on the streams above the last one."""
    move(streams[-1], SCRATCH[:1], SOURCE[:1]).synchronize()


# ------------------------------------------------------------------------------------------------------------ kernels


def test_there_is_always_a_portable_kernel():
    assert KERNELS[-1] == "portable"
    assert len(set(KERNELS)) == len(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_copies_exactly_the_bytes_asked_for(kernel: str):
    for size in SMALL_SIZES:
        for dst_offset in OFFSETS:
            for src_offset in OFFSETS:
                check_exact(lambda *job: _native.copy(*job, kernel), size, dst_offset, src_offset)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_copies_exactly_the_bytes_asked_for_at_the_size_of_a_piece(kernel: str):
    for size in LARGE_SIZES:
        for dst_offset, src_offset in ((0, 0), (1, 0), (31, 63), (63, 1)):
            check_exact(lambda *job: _native.copy(*job, kernel), size, dst_offset, src_offset)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_engine_copies_exactly_the_bytes_asked_for_with_each_kernel(kernel: str):
    engine = HostEngine(2, kernel=kernel)
    assert engine.kernel == kernel

    def copy(dst: int, src: int, size: int) -> None:
        words = np.array([dst, src], np.uint64)
        engine.load_stream.copy(words[:1], words[1:], size).synchronize()

    for size in SMALL_SIZES + LARGE_SIZES:
        for dst_offset, src_offset in ((0, 0), (0, 31), (63, 1)):
            check_exact(copy, size, dst_offset, src_offset)
    engine.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_neither_reads_nor_writes_past_the_end(kernel: str):
    """Both ends lie against a page that faults when touched."""
    pages = 10

    def fenced() -> tuple[mmap.mmap, np.ndarray]:
        memory = mmap.mmap(-1, (pages + 1) * PAGE)
        array = np.frombuffer(memory, np.uint8)[: pages * PAGE]
        libc = ctypes.CDLL(None, use_errno=True)
        protect = (ctypes.c_void_p(array.ctypes.data + array.size), ctypes.c_size_t(PAGE), ctypes.c_int(0))
        assert libc.mprotect(*protect) == 0
        return memory, array

    (_, source), (_, target) = fenced(), fenced()
    source[:] = SOURCE[: source.size]
    for size in [size for size in SMALL_SIZES if 0 < size <= source.size]:
        target[:] = FILL
        _native.copy(target[-size:].ctypes.data, source[-size:].ctypes.data, size, kernel)
        assert np.array_equal(target[-size:], source[-size:])
        assert (target[:-size] == FILL).all()


def test_copy_takes_the_fastest_kernel_by_default():
    check_exact(_native.copy, 3 * PAGE + 5, 1, 2)
    engine = HostEngine(1)
    assert engine.kernel in KERNELS
    engine.close()


def test_an_unknown_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match="'avx9' is unknown or not supported"):
        _native.copy(0, 0, 0, "avx9")
    with pytest.raises(ValueError, match="'avx9' is unknown or not supported"):
        HostEngine(1, kernel="avx9")


# --------------------------------------------------------------------------------------------------------------- jobs


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("row_bytes", [1, 100, 4096, 70_001])
def test_rows_arrive_in_the_order_asked_for(threads: int, row_bytes: int):
    count = min(4000, (16 << 20) // row_bytes)
    source, target = randomised(count, row_bytes), randomised(count, row_bytes, seed=2)
    order = np.random.default_rng(3).permutation(count)
    engine = HostEngine(threads)
    engine.load_stream.copy(rows_of(target), rows_of(source, order), row_bytes).synchronize()
    assert np.array_equal(target, source[order])
    engine.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("row_bytes", [1, 100, 4096, 70_001])
def test_rows_named_by_number_arrive_in_the_order_asked_for(threads: int, row_bytes: int):
    """Rows of both sides lie apart, each with its own stride."""
    count = min(3000, (8 << 20) // row_bytes)
    source = randomised(count, row_bytes + 24)[:, 8 : 8 + row_bytes]
    whole = aligned((count + 5) * (row_bytes + 3)).reshape(count + 5, -1)
    random = np.random.default_rng(6)
    order, places = random.permutation(count), random.permutation(count + 5)[:count]
    expected = whole.copy()
    expected[places, :row_bytes] = source[order]
    engine = HostEngine(threads)
    target, lists = whole[:, :row_bytes], (places.tolist(), order.tolist())
    engine.store_stream.copy_rows(rows(target), lists[0], rows(source), lists[1]).synchronize()
    assert np.array_equal(whole, expected)
    engine.close()


def test_the_lists_of_rows_are_free_when_copy_rows_returns(engine: HostEngine):
    source, target = randomised(8, 64), aligned(8 * 64).reshape(8, 64)
    places, order = list(range(8)), list(range(8))[::-1]
    with Gate(engine.load_stream):
        event = engine.load_stream.copy_rows(rows(target), places, rows(source), order)
        places.clear()
        order[:] = [99] * 8
    event.synchronize()
    assert np.array_equal(target, source[::-1])


def test_rows_beside_each_other_on_both_sides_are_as_apart(engine: HostEngine):
    source, target = randomised(16, 64), aligned(16 * 64).reshape(16, 64)
    places, order = [4, 5, 6, 7, 0, 1, 9, 8, 10, 11], [2, 3, 4, 9, 10, 11, 12, 13, 13, 14]
    expected = target.copy()
    expected[places] = source[order]
    engine.load_stream.copy_rows(rows(target), places, rows(source), order).synchronize()
    assert np.array_equal(target, expected)


def test_no_rows_are_done_at_once(engine: HostEngine):
    Gate(engine.load_stream).hold()
    assert engine.load_stream.copy_rows(rows(SOURCE.reshape(2, -1)), [], rows(SOURCE.reshape(2, -1)), []).is_done


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_each_copy_has_its_own_size_also_none(threads: int):
    random = np.random.default_rng(4)
    source, target = randomised(600, 20_000), aligned(600 * 20_000).reshape(600, 20_000)
    sizes = random.integers(0, 20_001, 600).astype(np.uint64)
    sizes[random.permutation(600)[:100]] = 0
    engine = HostEngine(threads)
    engine.store_stream.copy(rows_of(target), rows_of(source), sizes).synchronize()
    reached = np.arange(20_000) < sizes[:, None]
    assert np.array_equal(target, np.where(reached, source, FILL))
    engine.close()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.none() | st.integers(0, 100),  # where the source is; None: right after the one before
            st.booleans(),  # whether the target is right after the one before
            st.integers(0, 7),
        ),
        max_size=30,
    )
)
def test_copies_beside_each_other_are_as_apart(shared_engine: HostEngine, copies: list[tuple[int | None, bool, int]]):
    """Neighbours on both sides, which are joined, on one side and on none, against copies one by one."""
    target = aligned(30 * 8)
    expected = target.copy()
    jobs, source_at, target_at = [], 0, 0
    for place, beside, size in copies:
        source_at = source_at if place is None else place
        target_at += 0 if beside else 1
        jobs.append((target.ctypes.data + target_at, SOURCE.ctypes.data + source_at, size))
        expected[target_at : target_at + size] = SOURCE[source_at : source_at + size]
        source_at, target_at = source_at + size, target_at + size
    words = np.array(jobs, np.uint64).reshape(-1, 3).T.copy()
    shared_engine.load_stream.copy(words[0], words[1], words[2]).synchronize()
    assert np.array_equal(target, expected)


def test_neighbours_on_one_side_only_are_not_joined(engine: HostEngine):
    source, target = randomised(4, 64), aligned(4 * 64).reshape(4, 64)
    engine.load_stream.copy(rows_of(target), rows_of(source, [0, 2, 1, 3]), 64).synchronize()
    assert np.array_equal(target, source[[0, 2, 1, 3]])
    engine.load_stream.copy(rows_of(target, [0, 2, 1, 3]), rows_of(source), 64).synchronize()
    assert np.array_equal(target[[0, 2, 1, 3]], source)


def test_a_job_without_bytes_is_done_at_once(engine: HostEngine):
    Gate(engine.load_stream).hold()
    none = np.array([], np.uint64)
    for event in (
        engine.load_stream.copy(none, none, 64),
        engine.load_stream.copy(none, none, none),
        engine.load_stream.copy(at(SOURCE), at(SOURCE), 0),
        engine.load_stream.copy(at(SOURCE), at(SOURCE), np.zeros(1, np.uint64)),
    ):
        assert event.is_done
        assert not event.failed
        assert event.seconds == 0.0
        event.synchronize()


def test_the_arrays_of_addresses_are_free_when_copy_returns(engine: HostEngine):
    source, target = randomised(8, 64), aligned(8 * 64).reshape(8, 64)
    sizes, destinations, sources = np.full(8, 64, np.uint64), rows_of(target), rows_of(source)
    with Gate(engine.load_stream):
        event = engine.load_stream.copy(destinations, sources, sizes)
        for array in (destinations, sources, sizes):
            array[:] = 1
    event.synchronize()
    assert np.array_equal(target, source)


def test_jobs_of_several_python_threads_all_arrive():
    engine = HostEngine(2)
    source, target = randomised(400, 5000), aligned(400 * 5000).reshape(400, 5000)
    order = np.random.default_rng(5).permutation(400)
    events: list[CopyEvent] = []

    def submit(part: range) -> None:
        for row in part:
            stream = engine.load_stream if row % 2 else engine.store_stream
            events.append(move(stream, target[row], source[order[row]]))

    threads = [threading.Thread(target=submit, args=(range(start, 400, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for event in events:
        event.synchronize()
    assert len(events) == 400
    assert np.array_equal(target, source[order])
    engine.close()


def test_an_event_says_done_only_when_every_piece_has_arrived():
    """Threads finish their pieces in any order; whoever sees the event sees the bytes."""
    engine = HostEngine(4)
    source, target = randomised(40, PIECE // 8 + 7), aligned(40 * (PIECE // 8 + 7)).reshape(40, -1)
    for _ in range(20):
        target[:, -1] = source[:, -1] + 1
        event = engine.load_stream.copy(rows_of(target), rows_of(source), source.shape[1])
        assert eventually(lambda event=event: event.is_done)
        assert np.array_equal(target[:, -1], source[:, -1])
    assert np.array_equal(target, source)
    engine.close()


# ------------------------------------------------------------------------------------------------------- nothing waits


def test_copy_returns_while_its_stream_is_held(engine: HostEngine):
    target = aligned(SOURCE.size)
    with Gate(engine.store_stream):
        event = move(engine.store_stream, target, SOURCE)
        assert event.is_done is False
        assert event.failed is False
        assert event.seconds == 0.0
        move(engine.load_stream, SCRATCH[:64], SOURCE[:64]).synchronize()
        assert event.is_done is False
        assert (target == FILL).all()
    event.synchronize()
    assert event.is_done is True
    assert event.failed is False
    assert np.array_equal(target, SOURCE)


def test_seconds_are_those_of_the_copies(engine: HostEngine):
    before = time.monotonic_ns()
    event = move(engine.load_stream, SCRATCH, SOURCE)
    event.synchronize()
    assert 0 < event.seconds * 1e9 <= time.monotonic_ns() - before


def test_seconds_leave_out_the_time_in_the_queue(streams: list[HostStream]):
    """The clock starts with the first copy."""
    with Gate(streams[1]):
        waiting = move(streams[1], SCRATCH[:64], SOURCE[:64])
        move(streams[2], SCRATCH, SOURCE).synchronize()
        queued = time.monotonic_ns()
    waiting.synchronize()
    assert waiting.seconds * 1e9 <= time.monotonic_ns() - queued


def test_synchronize_returns_at_once_when_done(engine: HostEngine):
    event = move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
    event.synchronize()
    Gate(engine.load_stream).hold()
    event.synchronize()
    assert event.is_done


def test_an_event_has_the_times_of_its_copies(engine: HostEngine):
    with Gate(engine.store_stream):
        event = move(engine.store_stream, SCRATCH, SOURCE)
        assert event.spans == []
        released = time.monotonic_ns()
    event.synchronize()
    ((leg, start, end),) = event.spans
    assert leg == "copy"
    assert released <= start < end <= time.monotonic_ns()
    assert event.seconds == pytest.approx((end - start) / 1e9)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_the_end_of_a_job_is_signalled(engine: HostEngine, eventfd: int):
    engine.signal(eventfd)
    event = move(engine.store_stream, SCRATCH, SOURCE)
    assert select.select([eventfd], [], [], PATIENCE_S)[0]
    assert event.is_done, "the signal comes after the end"
    event.synchronize()
    assert os.eventfd_read(eventfd) == 1
    engine.signal(-1)


def test_also_of_jobs_that_are_cut_off(eventfd: int):
    engine = HostEngine(1)
    engine.signal(eventfd)
    Gate(engine.store_stream).hold()
    move(engine.store_stream, SCRATCH, SOURCE)
    engine.close()
    assert os.eventfd_read(eventfd) == 1


def test_also_of_jobs_without_copies(engine: HostEngine, eventfd: int):
    engine.signal(eventfd)
    engine.store_stream.copy(*[np.empty(0, dtype=np.uint64)] * 2, 1)
    assert os.eventfd_read(eventfd) == 1
    engine.signal(-1)


def test_but_not_of_population_which_nobody_awaits(engine: HostEngine, eventfd: int):
    arena = Arena(1, PAGE)
    engine.signal(eventfd)
    engine.populate(arena.rows).synchronize()
    engine.signal(-1)  # after the lock in which a job ends
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)
    arena.close()


def test_nothing_is_signalled_any_more_when_it_is_turned_off(engine: HostEngine, eventfd: int):
    engine.signal(eventfd)
    engine.signal(-1)
    move(engine.store_stream, SCRATCH, SOURCE).synchronize()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_an_engine_starts_without_a_signal(eventfd: int):
    standard_input = os.dup(0)
    os.dup2(eventfd, 0)  # where a descriptor that was never set would point
    try:
        engine = HostEngine(1)
        move(engine.store_stream, SCRATCH, SOURCE).synchronize()
        engine.close()
    finally:
        os.dup2(standard_input, 0)
        os.close(standard_input)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_a_signal_that_nobody_reads_blocks_no_thread(engine: HostEngine, eventfd: int):
    os.eventfd_write(eventfd, 2**64 - 2)  # full
    engine.signal(eventfd)
    move(engine.store_stream, SCRATCH, SOURCE).synchronize()
    move(engine.store_stream, SCRATCH, SOURCE).synchronize()
    engine.signal(-1)


# ------------------------------------------------------------------------------------------------------- pieces, steps


def test_a_step_lets_one_piece_of_a_large_copy_go(streams: list[HostStream]):
    source, target = randomised(4 * PIECE), aligned(4 * PIECE)
    Gate(streams[1]).hold()
    event = move(streams[1], target, source)
    for done in (1, 3):
        Gate(streams[1]).step(1 if done == 1 else 2)
        fence(streams)
        assert np.array_equal(target[: done * PIECE], source[: done * PIECE])
        assert (target[done * PIECE :] == FILL).all()
        assert not event.is_done
    Gate(streams[1]).step()
    event.synchronize()
    assert np.array_equal(target, source)


def test_a_piece_takes_as_many_rows_as_make_up_its_bytes(streams: list[HostStream]):
    count = PIECE // (512 << 10)
    source, target = randomised(2 * count + 1, 512 << 10), aligned((2 * count + 1) * (512 << 10)).reshape(-1, 512 << 10)
    order = np.arange(len(target))[::-1]
    Gate(streams[1]).hold()
    event = streams[1].copy(rows_of(target, order), rows_of(source, order), source.shape[1])
    Gate(streams[1]).step()
    fence(streams)
    assert np.array_equal(target[count + 1 :], source[count + 1 :])
    assert (target[: count + 1] == FILL).all()
    Gate(streams[1]).step(2)
    event.synchronize()
    assert np.array_equal(target, source)


def test_a_piece_of_very_small_copies_is_bounded_by_their_number(streams: list[HostStream]):
    """So that no thread holds the lock for long."""
    source, target = randomised(3000, 2), aligned(3000 * 2).reshape(3000, 2)
    with Gate(streams[1]) as gate:
        event = streams[1].copy(rows_of(target), rows_of(source), 1)
        gate.step()
        fence(streams)
        assert np.array_equal(target[:1024, 0], source[:1024, 0])
        assert (target[1024:] == FILL).all()
    event.synchronize()
    assert np.array_equal(target[:, 0], source[:, 0])


def test_holding_one_stream_leaves_the_others(engine: HostEngine):
    Gate(engine.load_stream).hold()
    held = move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
    move(engine.store_stream, SCRATCH[:64], SOURCE[:64]).synchronize()
    assert not held.is_done


def resident(memory: Rows) -> int:
    """Bytes of the rows' pages that are backed with memory."""
    pages = (ctypes.c_ubyte * (memory.count * memory.stride // PAGE))()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    assert mincore(ctypes.c_void_p(memory.address), ctypes.c_size_t(len(pages) * PAGE), pages) == 0
    return sum(page & 1 for page in pages) * PAGE


def test_r1_population_goes_by_the_piece(streams: list[HostStream]):
    """It holds the lock of the memory map: the scheduler's thread, which may need it for malloc, waits that long."""
    arena = Arena(4, PIECE)
    with Gate(streams[1]) as gate:
        event = streams[1].engine.populate(1, arena.rows.address, 4 * PIECE)
        for done in (1, 2, 3):
            gate.step()
            fence(streams)
            assert resident(arena.rows) == done * PIECE
            assert not event.is_done
    event.synchronize()
    assert resident(arena.rows) == 4 * PIECE
    arena.close()


# ---------------------------------------------------------------------------------------------------------- priorities


def test_a_load_is_copied_while_a_store_before_it_is_half_done(streams: list[HostStream]):
    """The load reads what the store writes, so its bytes tell how far the store was."""
    load_stream, store_stream = streams[1], streams[2]
    before, stored, loaded = randomised(4 * PIECE, seed=7), randomised(4 * PIECE, seed=8), aligned(4 * PIECE)
    row = before.copy()
    with Gate(store_stream) as gate:
        store = move(store_stream, row, stored)
        gate.step()
        fence(streams)
        move(load_stream, loaded, row).synchronize()
        assert not store.is_done
        assert np.array_equal(loaded[:PIECE], stored[:PIECE])
        assert np.array_equal(loaded[PIECE:], before[PIECE:])
    store.synchronize()
    assert np.array_equal(row, stored)


def test_a_load_ends_while_a_store_before_it_is_held_half_done(engine: HostEngine):
    target, source = aligned(4 * PIECE), randomised(4 * PIECE)
    with Gate(engine.store_stream) as gate:
        with Gate(engine.load_stream):
            store, load = move(engine.store_stream, target, source), move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
            gate.step(2)
        load.synchronize()
        assert not store.is_done
    store.synchronize()
    assert np.array_equal(target, source)


def first_of(sooner: HostStream, later: HostStream) -> str:
    """Which of two streams the only thread serves when both have work: "sooner", "later".

    A long job on `later` keeps the thread busy while one job is queued behind it and one on `sooner`. The one on
    `sooner` reads what the other one writes, so its bytes tell which came first. That both were queued in time is
    seen from the long job, which must not have ended by then.
    """
    filler, tries = aligned(PIECE), 0
    while tries < 10:
        tries += 1
        repeats = np.ones(32 * tries, np.uint64)  # milliseconds
        written, read, new = aligned(64), aligned(64), SOURCE[:64]
        long = later.copy(repeats * at(filler), repeats * at(SOURCE), PIECE)
        behind = move(later, written, new)
        ahead = move(sooner, read, written)
        in_time = not long.is_done
        for event in (long, behind, ahead):
            event.synchronize()
        if in_time:
            return "later" if np.array_equal(read, new) else "sooner"
    pytest.fail("the long job was never long enough")


def test_a_free_thread_takes_loads_before_stores(engine: HostEngine):
    assert first_of(engine.load_stream, engine.store_stream) == "sooner"


def test_a_free_thread_does_not_take_stores_before_loads(engine: HostEngine):
    """The other way round, which also shows that the test above could fail."""
    assert first_of(engine.store_stream, engine.load_stream) == "later"


def test_r7_population_comes_last(engine: HostEngine):
    population = HostStream(engine.load_stream.engine, 2)
    assert first_of(engine.store_stream, population) == "sooner"
    arena = Arena(4, PIECE)
    with Gate(population):
        event = engine.populate(arena.rows)
        move(engine.store_stream, SCRATCH[:64], SOURCE[:64]).synchronize()
        assert not event.is_done
        assert resident(arena.rows) == 0
    event.synchronize()
    assert resident(arena.rows) == 4 * PIECE
    arena.close()


# -------------------------------------------------------------------------------------------------------------- ordered


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_of_two_jobs_to_one_place_on_an_ordered_stream_the_last_one_wins(threads: int):
    engine = HostEngine(threads, ordered=True)
    target, first, last = (np.full(1, value, np.uint8) for value in (0, 1, 2))
    for _ in range(20):
        pages = fresh_pages()
        slow_piece(engine.store_stream, pages, target, first)
        event = move(engine.store_stream, target, last)
        event.synchronize()
        assert target[0] == 2
    engine.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_job_on_an_ordered_stream_reads_what_the_one_before_it_wrote(threads: int):
    engine = HostEngine(threads, ordered=True)
    places = [randomised(3 * PIECE // 4096, 4096, seed=seed) for seed in range(8)]
    expected = places[0].copy()
    order = np.arange(len(expected))
    with Gate(engine.load_stream):
        for source, target in itertools.pairwise(places):
            order = order[::-1]  # begin with what the one before ends with
            event = engine.load_stream.copy(rows_of(target, order), rows_of(source, order), 4096)
    event.synchronize()
    assert np.array_equal(places[-1], expected)
    engine.close()


def test_ordered_streams_do_not_wait_for_each_other():
    engine = HostEngine(1, ordered=True)
    Gate(engine.load_stream).hold()
    held = move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
    move(engine.store_stream, SCRATCH[:64], SOURCE[:64]).synchronize()
    assert not held.is_done
    engine.close()


# -------------------------------------------------------------------------------------------------------------- the GIL


def test_synchronize_lets_other_python_threads_run():
    done = run_python("""
        engine = HostEngine(1)
        Gate(engine.load_stream).hold()
        event = copy(engine.load_stream)
        waiting = threading.Event()
        def release():
            waiting.wait()
            Gate(engine.load_stream).release()
        threading.Thread(target=release).start()
        sys.setswitchinterval(1000)  # from here on the thread gets the GIL from synchronize or not at all
        waiting.set()
        event.synchronize()
        assert event.is_done and target.all()
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_copies_go_on_while_a_python_thread_keeps_the_gil(engine: HostEngine):
    """With an endless switch interval, who has the GIL keeps it: the witness, who wants it, never gets it."""
    before = sys.getswitchinterval()
    gate, seen = threading.Event(), []
    witness = threading.Thread(target=lambda: (gate.wait(), seen.append("ran")))
    target = aligned(SOURCE.size)
    sys.setswitchinterval(10 * PATIENCE_S)
    try:
        witness.start()  # it runs until it waits at the gate
        gate.set()
        event = move(engine.load_stream, target, SOURCE)
        deadline = time.monotonic() + PATIENCE_S
        while not event.is_done and time.monotonic() < deadline:
            pass
        done, witnessed = event.is_done, list(seen)
    finally:
        sys.setswitchinterval(before)
    witness.join(PATIENCE_S)
    assert done
    assert not witnessed
    assert np.array_equal(target, SOURCE)


def test_synchronize_hears_ctrl_c():
    code = PRELUDE + textwrap.dedent("""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run without Ctrl-C
        engine = HostEngine(1)
        Gate(engine.load_stream).hold()
        event = copy(engine.load_stream)
        print("waiting", flush=True)
        event.synchronize()
    """)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in child.communicate(timeout=PATIENCE_S)[1]
    finally:
        child.kill()
        child.communicate()
    assert child.returncode != 0


# ------------------------------------------------------------------------------------------------------------- threads


CPUS = os.sched_getaffinity(0)
needs_two_cpus = pytest.mark.skipif(len(CPUS) == 1, reason="needs a second CPU to leave")
# What the copy threads may run on, each once, in the kernel's words. For run_python.
PRINT_CPUS = """
tasks = [f"/proc/self/task/{thread}/status" for thread in os.listdir("/proc/self/task")]
status = [dict(line.split(":\\t", 1) for line in open(task).read().splitlines()) for task in tasks]
print({one["Cpus_allowed_list"] for one in status if one["Name"] == "async-tier-copy"})
"""


@needs_two_cpus
@pytest.mark.parametrize("given", [min, max])
def test_copy_threads_stay_on_the_cpus_that_the_process_was_given(given: Callable[[set[int]], int]):
    """As by taskset and numactl; the process that starts this one has more."""
    engine = "engine = HostEngine(3)"
    done = run_python(engine + PRINT_CPUS, cpus={given(CPUS)})
    assert (done.stdout, done.stderr) == (f"{{'{given(CPUS)}'}}\n", "")


@needs_two_cpus
def test_copy_threads_stay_on_the_cpus_that_the_thread_was_given():
    done = run_python(f"os.sched_setaffinity(0, {{ {max(CPUS)} }}); engine = HostEngine(3)" + PRINT_CPUS)
    assert (done.stdout, done.stderr) == (f"{{'{max(CPUS)}'}}\n", "")


def worker_cpus(parent: set[int], environment: str = "", listed: str = "OMP_PLACES={0,1}") -> set[int]:
    """What the copy threads of a worker of vLLM's CPU backend may run on that was started on the CPUs `parent`, with
    variables such as "NAME=value", and whose first thread was bound to the first CPU of these afterwards. `listed` is
    OpenMP's variable with all that its threads are bound to."""
    variables = f"VLLM_CPU_OMP_THREADS_BIND=auto {listed} {environment}"
    done = run_python(
        f"""
        import multiprocessing
        from async_tier.vllm.openmp import cpus_before_openmp
        def work():
            os.environ.update(pair.split("=", 1) for pair in {variables!r}.split())
            os.sched_setaffinity(0, {{ {min(parent)} }})
            engine = HostEngine(3, cpus=cpus_before_openmp())
            assert os.sched_getaffinity(0) == {{ {min(parent)} }}
            print(json.dumps([sorted(os.sched_getaffinity(thread)) for thread in engine.thread_ids]))
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join()
        """,
        cpus=parent,
    )
    assert done.stderr == ""
    first, *others = json.loads(done.stdout)
    assert others == [first] * 2
    return set(first)


@needs_two_cpus
def test_a_worker_of_vllms_cpu_backend_may_copy_where_its_engine_process_may_run():
    assert worker_cpus(CPUS) == CPUS


@needs_two_cpus
@pytest.mark.parametrize("given", [min, max])
def test_a_worker_of_vllms_cpu_backend_stays_on_the_cpus_of_its_engine_process(given: Callable[[set[int]], int]):
    assert worker_cpus({given(CPUS)}) == {given(CPUS)}


@needs_two_cpus
@pytest.mark.parametrize("environment", ["VLLM_CPU_OMP_THREADS_BIND=nobind", "_VLLM_INTERNAL_NUMACTL_ARGS=--membind=0"])
def test_what_vllms_cpu_backend_has_not_narrowed_stays_narrow(environment: str):
    assert worker_cpus(CPUS, environment) == {min(CPUS)}


@needs_two_cpus
def test_a_process_that_vllm_has_not_bound_stays_narrow():
    """Such as a user's own worker, that was started by multiprocessing as well."""
    assert worker_cpus(CPUS, listed="") == {min(CPUS)}


@needs_two_cpus
@pytest.mark.parametrize("variable", ["OMP_PLACES={0}", "GOMP_CPU_AFFINITY=0", "KMP_AFFINITY=explicit,proclist=[0]"])
def test_a_worker_is_bound_by_whichever_variable_openmp_reads(variable: str):
    """A list of the user's is of the CPUs for OpenMP's threads: others are for copies."""
    assert worker_cpus(CPUS, listed=variable) == CPUS
    assert worker_cpus(CPUS, "VLLM_CPU_OMP_THREADS_BIND=0", listed=variable) == CPUS


@needs_two_cpus
def test_a_process_that_vllm_did_not_start_has_the_cpus_of_its_thread():
    done = run_python(f"""
        from async_tier.vllm.openmp import cpus_before_openmp
        os.sched_setaffinity(0, {{ {min(CPUS)} }})
        print(cpus_before_openmp())
    """)
    assert (done.stdout, done.stderr) == (f"{{{min(CPUS)}}}\n", "")


def test_a_worker_whose_engine_process_may_not_be_asked_has_the_cpus_of_its_thread(monkeypatch):
    def ask(process: int) -> set[int]:
        if process != 0:
            raise PermissionError(1, "Operation not permitted")
        return {5}

    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=1))
    monkeypatch.setattr(os, "sched_getaffinity", ask)
    monkeypatch.setenv("OMP_PLACES", "{5}")
    assert cpus_before_openmp() == {5}


def test_copy_threads_are_named_and_leave_signals_to_python():
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    engine = HostEngine(3)
    assert len(set(engine.thread_ids)) == 3
    for thread in engine.thread_ids:
        task = Path(f"/proc/self/task/{thread}")
        assert (task / "comm").read_text() == "async-tier-copy\n"
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        blocked = int(status["SigBlk"], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
            assert blocked >> (number - 1) & 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mine
    engine.close()


# ---------------------------------------------------------------------------------------------------------------- fork


def in_child(function: Callable[[], object]) -> str:
    """What `function` returns or raises in a forked child, in text; "hangs" if the child does not end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                text = repr(function())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
        finally:
            os._exit(0)
    os.close(write)
    handle = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([handle], [], [], PATIENCE_S)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not ended:
            return "hangs"
        assert status == 0, f"the child ended with status {status}"
        return os.read(read, 65536).decode()
    finally:
        os.close(handle)
        os.close(read)


@pytest.fixture
def open_event(engine: HostEngine) -> CopyEvent:
    Gate(engine.store_stream).hold()
    return move(engine.store_stream, SCRATCH[:64], SOURCE[:64])


def test_a_child_is_told_that_it_cannot_copy(engine: HostEngine):
    told = in_child(lambda: move(engine.load_stream, SCRATCH[:64], SOURCE[:64]))
    assert told.startswith("RuntimeError: this copy engine belongs to the parent process")
    assert "fork" in told
    both = rows(SOURCE.reshape(2, -1))
    assert in_child(lambda: engine.load_stream.copy_rows(both, [0], both, [0])) == told
    assert in_child(lambda: engine.populate(rows(SOURCE.reshape(2, -1)))) == told


def test_a_child_is_told_that_an_open_event_never_ends(open_event: CopyEvent):
    for ask in (lambda: open_event.is_done, open_event.synchronize):
        told = in_child(ask)
        assert told.startswith("RuntimeError")
        assert "fork" in told


def test_a_child_is_told_that_it_cannot_hold(engine: HostEngine):
    assert in_child(Gate(engine.load_stream).hold).startswith("RuntimeError")


def test_a_child_can_ask_an_event_that_had_ended(engine: HostEngine):
    event = move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
    event.synchronize()
    assert in_child(lambda: (event.is_done, event.failed, event.synchronize())) == "(True, False, True)"


def test_close_returns_in_a_child_and_leaves_the_parents_engine(engine: HostEngine, open_event: CopyEvent):
    assert in_child(lambda: (engine.close(), engine.close())) == "(None, None)"
    Gate(engine.store_stream).release()
    open_event.synchronize()
    assert not open_event.failed
    check_exact(lambda *job: copy_with(engine, *job), 5000, 1, 2)


def copy_with(engine: HostEngine, dst: int, src: int, size: int) -> None:
    words = np.array([dst, src], np.uint64)
    engine.load_stream.copy(words[:1], words[1:], size).synchronize()


def test_a_child_can_drop_the_parents_engine_and_have_its_own(open_event: CopyEvent):
    holder = [_native.HostEngine(2, queues=1)]

    def own() -> str:
        holder.clear()
        gc.collect()
        engine = HostEngine(2)
        check_exact(lambda *job: copy_with(engine, *job), PIECE + 1, 1, 2)
        engine.close()
        return "copied"

    assert in_child(own) == "'copied'"
    holder[0].close()


def test_what_is_dropped_in_a_child_ends_nothing_there(engine: HostEngine, open_event: CopyEvent):
    holder = [_native.HostEngine(1, queues=1)]
    holder[0].limit(0, 0)
    other_event = holder[0].submit(0, at(SCRATCH), at(SOURCE), 64)

    def drop() -> bool:
        holder.clear()
        gc.collect()
        return other_event.is_done

    told = in_child(lambda: (open_event.synchronize(), open_event.is_done, open_event.failed))
    assert told.startswith("RuntimeError")
    assert in_child(drop).startswith("RuntimeError")
    holder[0].close()


def test_what_is_closed_in_a_child_has_failed_there(engine: HostEngine, open_event: CopyEvent):
    told = in_child(lambda: (engine.close(), open_event.synchronize(), open_event.is_done, open_event.failed))
    assert told == "(None, True, True, True)"
    assert not open_event.is_done
    Gate(engine.store_stream).release()
    open_event.synchronize()
    assert not open_event.failed


def test_a_child_of_a_child_is_told_too():
    def child() -> str:
        engine = HostEngine(1)
        return in_child(lambda: move(engine.load_stream, SCRATCH[:64], SOURCE[:64]))

    assert "fork" in in_child(child)


# --------------------------------------------------------------------------------------------------------------- close


def test_close_fails_what_is_queued():
    engine = HostEngine(2)
    target = aligned(64)
    Gate(engine.load_stream).hold()
    Gate(engine.store_stream).hold()
    events = [move(stream, target, SOURCE[:64]) for stream in (engine.load_stream, engine.store_stream) * 2]
    engine.close()
    for event in events:
        assert event.is_done
        assert event.failed
        assert event.seconds == 0.0
        event.synchronize()
    assert (target == FILL).all()


def test_close_fails_what_is_half_done():
    engine = HostEngine(2)
    target, repeats = aligned(PIECE), np.ones(4000, np.uint64)  # far more than is copied before close
    target[0] = ~SOURCE[0]
    event = engine.store_stream.copy(repeats * at(target), repeats * at(SOURCE), PIECE)
    assert eventually(lambda: target[0] == SOURCE[0])
    engine.close()
    assert event.is_done
    assert event.failed


def test_close_waits_for_the_piece_that_is_being_copied():
    engine = HostEngine(1)
    pages, target = fresh_pages(), np.full(1, FILL, np.uint8)
    event = slow_piece(engine.store_stream, pages, target, ONES[:1])
    assert eventually(lambda: pages[0, 0] == 1)
    engine.close()
    assert event.is_done
    assert not event.failed
    assert target[0] == 1


def test_close_fails_a_stepped_job_with_its_first_piece_there(streams: list[HostStream]):
    target, source = aligned(2 * PIECE), SOURCE[: 2 * PIECE]
    Gate(streams[1]).hold()
    event = move(streams[1], target, source)
    Gate(streams[1]).step()
    fence(streams)
    streams[1].engine.close()
    assert event.failed
    assert np.array_equal(target[:PIECE], source[:PIECE])
    assert (target[PIECE:] == FILL).all()


def test_close_leaves_what_is_done():
    engine = HostEngine(1)
    event = move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
    event.synchronize()
    engine.close()
    assert event.is_done
    assert not event.failed


def test_close_cuts_population_off(streams: list[HostStream]):
    arena = Arena(4, PIECE)
    Gate(streams[1]).hold()
    event = streams[1].engine.populate(1, arena.rows.address, 4 * PIECE)
    Gate(streams[1]).step()
    fence(streams)
    streams[1].engine.close()
    assert event.failed
    assert resident(arena.rows) == PIECE
    arena.close()


def test_close_wakes_a_thread_in_synchronize():
    engine = HostEngine(1)
    Gate(engine.load_stream).hold()
    event = move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
    waiter = threading.Thread(target=event.synchronize, daemon=True)
    waiter.start()
    engine.close()
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive()
    assert event.failed


def test_close_ends_the_threads_and_can_be_called_again():
    engine = HostEngine(3)
    assert set(engine.thread_ids) <= thread_ids()
    for _ in range(3):
        engine.close()
        assert gone(engine.thread_ids)


@pytest.mark.parametrize("bytes_asked", [64, 0])
def test_a_copy_after_close_has_failed(bytes_asked: int):
    engine = HostEngine(1)
    engine.close()
    event = engine.load_stream.copy(at(SOURCE), at(SOURCE), bytes_asked)
    assert event.is_done
    assert event.failed
    event.synchronize()


def test_an_engine_that_is_dropped_ends_its_threads():
    engine = HostEngine(2)
    threads, stream = engine.thread_ids, engine.load_stream
    Gate(stream).hold()
    event = move(stream, SCRATCH[:64], SOURCE[:64])
    del engine
    gc.collect()
    assert gone(threads)
    assert event.failed


def test_a_core_that_is_dropped_ends_its_threads_and_its_events_stay():
    core = _native.HostEngine(2, queues=1)
    threads = core.thread_ids
    core.limit(0, 0)
    event = core.submit(0, at(SCRATCH), at(SOURCE), 64)
    del core
    gc.collect()
    assert gone(threads)
    assert event.is_done
    assert event.failed
    event.synchronize()


def test_an_event_may_be_dropped_before_its_copies_end(engine: HostEngine):
    target = aligned(SOURCE.size)
    with Gate(engine.load_stream):
        move(engine.load_stream, target, SOURCE)
        gc.collect()
        last = move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
    last.synchronize()
    assert np.array_equal(target, SOURCE)


def test_engines_leave_neither_threads_nor_files_behind():
    HostEngine(1).close()
    threads, files = thread_ids(), len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        engine = HostEngine(4)
        move(engine.load_stream, SCRATCH[:64], SOURCE[:64])
        engine.close()
    assert eventually(lambda: thread_ids() <= threads)
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("held", [False, True])
def test_the_interpreter_ends_well_with_copies_under_way(held: bool):
    done = run_python(f"""
        engine = HostEngine(2)
        if {held}:
            Gate(engine.store_stream).hold()
        event = copy(engine.store_stream, 10**6)  # minutes
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("threads", [-1, 0, 257])
def test_a_wrong_number_of_threads_is_refused(threads: int):
    with pytest.raises(ValueError, match=f"threads must be 1 to 256 .*not {threads} "):
        HostEngine(threads)


@pytest.mark.parametrize("queues", [0, 9])
def test_a_wrong_number_of_queues_is_refused(queues: int):
    with pytest.raises(ValueError, match=f"queues 1 to 8, not 1 and {queues}"):
        _native.HostEngine(1, queues=queues)


@pytest.mark.parametrize("queue", [-1, 3])
def test_a_queue_that_is_not_there_is_refused(queue: int):
    core = _native.HostEngine(1, queues=3)
    with pytest.raises(ValueError, match=f"queue must be 0 to 2, not {queue}"):
        core.submit(queue, at(SOURCE), at(SOURCE), 0)
    with pytest.raises(ValueError, match=f"queue must be 0 to 2, not {queue}"):
        core.limit(queue, 0)
    with pytest.raises(ValueError, match=f"queue must be 0 to 2, not {queue}"):
        core.populate(queue, PAGE, PAGE)
    core.close()


WORDS = np.zeros(2, np.uint64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((WORDS[:1], WORDS, 64), ValueError, "dst, src and size must be of one length"),
        ((WORDS, WORDS[:1], 64), ValueError, "dst, src and size must be of one length"),
        ((WORDS, WORDS, WORDS[:1]), ValueError, "dst, src and size must be of one length"),
        ((WORDS.astype(np.uint32), WORDS, 64), TypeError, "dst must hold native 8-byte integers, not 4-byte items"),
        ((WORDS, WORDS.astype(np.int16), 64), TypeError, "src must hold native 8-byte integers, not 2-byte items"),
        ((WORDS, WORDS, WORDS.astype(np.uint8)), TypeError, "size must hold native 8-byte integers, not 1-byte items"),
        ((WORDS, WORDS.astype(np.float64), 64), TypeError, "src must hold native 8-byte integers, .* format 'd'"),
        ((np.zeros(4, np.uint64)[::2], WORDS, 64), ValueError, "contiguous"),
        (([0, 0], WORDS, 64), TypeError, "list"),
        ((WORDS, WORDS, 64.0), TypeError, "float"),
        ((WORDS, WORDS, None), TypeError, "NoneType"),
        ((WORDS, WORDS, -1), OverflowError, "negative"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(engine: HostEngine, arguments: tuple, error: type, message: str):
    with pytest.raises(error, match=message):
        engine.load_stream.copy(*arguments)
    check_exact(lambda *job: copy_with(engine, *job), 64, 0, 0)


@pytest.mark.parametrize(
    ("destination_rows", "source_rows", "error", "message"),
    [
        ([0, 1], [0], ValueError, "the two lists of rows must be of one length"),
        ([4], [0], ValueError, "row 4 is not below 4"),
        ([0], [6], ValueError, "row 6 is not below 6"),
        ([0, 1, 4], [0, 1, 2], ValueError, "row 4 is not below 4"),
        ([-1], [0], OverflowError, "negative"),
        ([0], [1 << 64], OverflowError, "too big|too large"),
        ([0.0], [0], TypeError, "int"),
        ([0], [None], TypeError, "int"),
        ((0,), [0], TypeError, "rows must be lists"),
        ([0], np.zeros(1, np.uint64), TypeError, "rows must be lists"),
    ],
)
def test_rows_that_are_not_there_are_refused_and_nothing_is_copied(
    engine: HostEngine, destination_rows: list, source_rows: list, error: type, message: str
):
    target, source = aligned(4 * 64).reshape(4, 64), randomised(6, 64)
    with pytest.raises(error, match=message):
        engine.load_stream.copy_rows(rows(target), destination_rows, rows(source), source_rows)
    engine.load_stream.copy_rows(rows(target), [3], rows(source), [5]).synchronize()
    assert (target[:3] == FILL).all()
    assert np.array_equal(target[3], source[5])


def test_events_come_from_engines_only():
    with pytest.raises(TypeError, match="cannot create"):
        _native.Job()


def test_copy_threads_do_not_preempt_who_wakes_them_up():
    engine = HostEngine(2)
    assert {os.sched_getscheduler(thread) for thread in engine.thread_ids} == {os.SCHED_BATCH}
    engine.close()


def test_addresses_in_the_other_byte_order_are_refused():
    engine = HostEngine(1)
    addresses = np.zeros(1, dtype=">u8")
    with pytest.raises(TypeError, match="native 8-byte integers"):
        engine.load_stream.copy(addresses, addresses, 1)
    engine.close()


def test_an_engine_works_where_the_system_denies_where_its_threads_run(monkeypatch, caplog):
    def denied(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", denied)
    engine = HostEngine(2, cpus=CPUS)
    source, destination = np.arange(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    addresses = [np.array([array.ctypes.data], dtype=np.uint64) for array in (destination, source)]
    engine.load_stream.copy(*addresses, 64).synchronize()
    assert np.array_equal(source, destination)
    assert caplog.text.count("Operation not permitted") == 1
    engine.close()
