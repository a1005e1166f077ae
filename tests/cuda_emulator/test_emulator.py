"""The emulator's own tests: each semantic that the tests of the tier rely on.

Nothing here sleeps in order to wait. What must not have happened is shown with `engines_are_idle`: copy engines serve
in order of submission, so when a later copy is through, an earlier one that was ready is through as well. What must
last is given a delay of an hour, which the reset at the test's end cuts short.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda_emulator import Emulator, Kind, load

SIZE = 1 << 16
HOUR_US = 3600e6
PATIENCE_S = 30

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
ILLEGAL_STATE = 401
NOT_READY = 600
ILLEGAL_ADDRESS = 700
ALREADY_REGISTERED = 712
NOT_REGISTERED = 713
NOT_PERMITTED = 800
NOT_SUPPORTED = 801

BLOCKING, NON_BLOCKING = 0, 1
DISABLE_TIMING = 2
ORDER_STREAM, ORDER_DURING_API_CALL, ORDER_ANY = 1, 2, 3
LEGACY_STREAM = 0
LEGACY_STREAM_BY_NAME = 1
COPY_DEVICE_TO_HOST, COPY_DEFAULT = 2, 4


# ---------------------------------------------------------------------------------------------------------- arrangement


def on_device(value: int | None = None) -> torch.Tensor:
    """Bytes in device memory."""
    tensor = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    if value is not None:
        load().poke(tensor.data_ptr(), bytes([value]) * SIZE)
    return tensor


def pinned(value: int) -> torch.Tensor:
    """Bytes in pinned host memory."""
    return torch.empty(SIZE, dtype=torch.uint8, pin_memory=True).fill_(value)


def pageable(value: int) -> torch.Tensor:
    return torch.full((SIZE,), value, dtype=torch.uint8)


def copy(destination: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Queue a copy; the event after it."""
    event = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        destination.copy_(source, non_blocking=True)
        event.record(stream)
    return event


def holds(tensor: torch.Tensor, value: int) -> bool:
    """Whether all bytes have the value, past all streams."""
    if tensor.is_cuda:
        return load().peek(tensor.data_ptr(), SIZE) == bytes([value]) * SIZE
    return bool((tensor == value).all())


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"


def error_code(call: Callable[[], object]) -> int:
    """What torch raises for the CUDA error of a call, 0 for none."""
    try:
        call()
    except torch.AcceleratorError as error:
        return error.error_code
    return 0


class Api:
    """A C library whose functions take addresses, handles and numbers, and return a CUDA error code."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)

    def __getattr__(self, name: str) -> Callable[..., int]:
        return self.wrap(getattr(self._library, name))

    @staticmethod
    def wrap(function: Any) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            # As wide as a register: where the function wants less it takes the lower part.
            return function(*(ctypes.c_int64(x) if isinstance(x, int) else x for x in arguments))

        return call


class BatchAttributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (("order", ctypes.c_int), ("locations", ctypes.c_int * 4), ("flags", ctypes.c_uint))


def batch_arguments(to: list[int], of: list[int], sizes: list[int], order: int = ORDER_STREAM) -> list[Any]:
    """The arguments of a batch of copies, up to the number of attributes."""
    count = len(to)
    pointers, numbers = ctypes.c_void_p * count, ctypes.c_size_t * count
    attributes, first = BatchAttributes(order), ctypes.c_size_t(0)
    return [pointers(*to), pointers(*of), numbers(*sizes), count, ctypes.byref(attributes), ctypes.byref(first), 1]


runtime = Api("libcudart.so.13")
driver = Api("libcuda.so.1")


@pytest.fixture(autouse=True)
def _initialized(emulator: Emulator) -> Iterator[None]:
    """Nothing is set but what a test sets itself."""
    emulator.reset()
    torch.cuda.init()
    yield
    runtime.cudaGetLastError()


@pytest.fixture
def stream() -> torch.cuda.Stream:
    return new_stream()


@pytest.fixture
def other() -> torch.cuda.Stream:
    return new_stream()


def new_stream(priority: int = 0) -> torch.cuda.Stream:
    """One that no other test has: torch's are dealt out in turn."""
    handle = ctypes.c_void_p()
    assert runtime.cudaStreamCreateWithPriority(ctypes.byref(handle), NON_BLOCKING, priority) == 0
    assert handle.value is not None
    return torch.cuda.ExternalStream(handle.value)


@pytest.fixture
def engines_are_idle() -> Callable[..., None]:
    """Wait until every copy that is ready now has been made; of some kinds only."""
    device = [on_device(), on_device()]
    host = pinned(0)
    stream = new_stream()

    def wait(*kinds: Kind) -> None:
        for kind in kinds or (Kind.H2D, Kind.D2H, Kind.D2D):
            to = host if kind == Kind.D2H else device[0]
            of = host if kind == Kind.H2D else device[1]
            copy(to, of, stream).synchronize()

    return wait


libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
READABLE, WRITABLE = 1, 2


PRIVATE, SHARED, FIXED, ANONYMOUS = 0x2, 0x1, 0x10, 0x20


def map_pages(count: int, protection: int = READABLE | WRITABLE, flags: int = PRIVATE, at: int | None = None) -> int:
    """The address of pages of host memory that nothing else lies on; `at`: instead of what is mapped there."""
    size = ctypes.c_size_t(count * mmap.PAGESIZE)
    flags |= ANONYMOUS | (FIXED if at else 0)
    address: int = libc.mmap(ctypes.c_void_p(at), size, protection, flags, -1, ctypes.c_long(0))
    return address


def unmap_pages(address: int, count: int) -> None:
    assert libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(count * mmap.PAGESIZE)) == 0


@pytest.fixture
def pages() -> Iterator[int]:
    """The address of four pages of host memory, pageable."""
    address = map_pages(4)
    yield address
    unmap_pages(address, 4)


@pytest.fixture
def memory(pages: int) -> Iterator[int]:
    """The address of two pages of host memory, pinned."""
    assert runtime.cudaHostRegister(pages, 2 * mmap.PAGESIZE, 0) == 0
    yield pages
    runtime.cudaHostUnregister(pages)


@pytest.fixture
def context() -> Iterator[int]:
    """The primary context, current on this thread."""
    handle = ctypes.c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(handle), 0) == 0
    assert driver.cuCtxPushCurrent_v2(handle) == 0
    assert handle.value is not None
    yield handle.value
    assert driver.cuCtxPopCurrent_v2(None) == 0
    assert driver.cuDevicePrimaryCtxRelease_v2(0) == 0


def made(function: Callable[..., int], *arguments: Any) -> int:
    """What a function puts behind its first argument."""
    result = ctypes.c_void_p()
    assert function(ctypes.byref(result), *arguments) == 0
    return result.value or 0


# ----------------------------------------------------------------------------------------------------- streams, events


def test_torch_finds_the_device() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.get_device_name(0) == "Emulated CUDA device"
    assert torch.cuda.get_device_capability(0) == (9, 0)


def test_a_copy_happens_after_the_call(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, back, host = on_device(0), pinned(0), pinned(9)
    emulator.hold(stream.cuda_stream)
    first = copy(there, host, stream)
    second = copy(back, there, stream)
    assert emulator.pending(stream.cuda_stream) == 4
    assert not first.query()
    assert not stream.query()
    assert holds(there, 0)
    emulator.release(stream.cuda_stream)
    second.synchronize()
    assert first.query()
    assert holds(there, 9)
    assert holds(back, 9)


def test_steps_run_one_operation_each(
    emulator: Emulator, stream: torch.cuda.Stream, engines_are_idle: Callable[..., None]
) -> None:
    there, back, host = on_device(0), pinned(0), pinned(9)
    emulator.hold(stream.cuda_stream)
    first = copy(there, host, stream)
    second = copy(back, there, stream)
    emulator.step(stream.cuda_stream, 2)
    first.synchronize()
    engines_are_idle()
    assert emulator.pending(stream.cuda_stream) == 2
    assert holds(there, 9)
    assert holds(back, 0)
    emulator.step(stream.cuda_stream)
    eventually(lambda: holds(back, 9))
    assert not second.query()


def test_new_streams_may_be_held(emulator: Emulator, engines_are_idle: Callable[..., None]) -> None:
    there, host = on_device(0), pinned(9)
    emulator.hold_new_streams(True)
    stream = new_stream()
    copy(there, host, stream)
    engines_are_idle()
    assert holds(there, 0)
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    assert holds(there, 9)


def test_controls_refuse_what_is_no_stream(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    for control in (emulator.hold, emulator.release, emulator.pending, emulator.step):
        with pytest.raises(ValueError, match="no stream"):
            control(0x123457)
    with pytest.raises(ValueError, match="no stream"):
        emulator.step(stream.cuda_stream)


def test_a_source_is_read_when_the_copy_runs(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(1)
    emulator.hold(stream.cuda_stream)
    copy(there, host, stream)
    host.fill_(2)
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    assert holds(there, 2)


def test_streams_do_not_wait_for_each_other(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    host = pinned(1)
    emulator.hold(stream.cuda_stream)
    held = copy(on_device(), host, stream)
    copy(on_device(), host, other).synchronize()
    assert not held.query()


def test_a_stream_waits_for_an_event(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream, engines_are_idle: Callable[..., None]
) -> None:
    there, back, host = on_device(0), pinned(0), pinned(9)
    emulator.hold(stream.cuda_stream)
    event = copy(there, host, stream)
    other.wait_event(event)
    copy(back, there, other)
    engines_are_idle()
    assert holds(back, 0)
    emulator.release(stream.cuda_stream)
    other.synchronize()
    assert holds(back, 9)


def test_a_wait_is_for_what_was_recorded_then(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream, engines_are_idle: Callable[..., None]
) -> None:
    there, back, host = on_device(0), pinned(0), pinned(9)
    emulator.hold(stream.cuda_stream)
    event = copy(there, host, stream)
    other.wait_event(event)
    event.record(new_stream())
    event.synchronize()
    copy(back, there, other)
    engines_are_idle()
    assert holds(back, 0)
    emulator.release(stream.cuda_stream)


def test_an_event_does_not_cover_what_comes_after_it(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(), pinned(9)
    emulator.hold(stream.cuda_stream)
    event = copy(there, host, stream)
    copy(there, host, stream)
    emulator.step(stream.cuda_stream, 2)
    event.synchronize()
    assert emulator.pending(stream.cuda_stream) == 2


def test_an_event_that_was_never_recorded_is_done(stream: torch.cuda.Stream) -> None:
    event = torch.cuda.Event()
    assert event.query()
    stream.wait_event(event)
    stream.synchronize()


def test_a_destroyed_stream_still_ends_its_work(emulator: Emulator, context: int, memory: int) -> None:
    there = made(driver.cuMemAlloc_v2, 1)
    stream = made(driver.cuStreamCreate, NON_BLOCKING)
    ctypes.memset(memory, 9, 1)
    emulator.set_stream_delay(stream, 20_000)
    assert driver.cuMemcpyHtoDAsync_v2(there, memory, 1, stream) == 0
    assert driver.cuStreamDestroy_v2(stream) == 0
    assert driver.cuStreamQuery(stream) == INVALID_HANDLE
    eventually(lambda: emulator.peek(there, 1) == b"\x09")
    assert driver.cuMemFree_v2(there) == 0
    emulator.reset()


def test_each_use_of_a_destroyed_stream_is_a_violation(emulator: Emulator, context: int, memory: int) -> None:
    """F2, and all other calls with one."""
    there, event = made(driver.cuMemAlloc_v2, 1), made(driver.cuEventCreate, DISABLE_TIMING)
    stream, out = made(driver.cuStreamCreate, NON_BLOCKING), ctypes.byref(ctypes.c_uint64())
    assert driver.cuStreamDestroy_v2(stream) == 0
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    calls = [
        lambda: driver.cuStreamQuery(stream),
        lambda: driver.cuStreamSynchronize(stream),
        lambda: driver.cuStreamDestroy_v2(stream),
        lambda: driver.cuStreamGetFlags(stream, out),
        lambda: driver.cuStreamBeginCapture_v2(stream, 0),
        lambda: driver.cuEventRecord(event, stream),
        lambda: driver.cuStreamWaitEvent(stream, event, 0),
        lambda: driver.cuMemcpyAsync(there, memory, 1, stream),
        lambda: driver.cuMemcpyBatchAsync_v2(*batch_arguments([there], [memory], [1]), stream),
        lambda: driver.cuMemsetD8Async(there, 0, 1, stream),
        lambda: driver.cuLaunchHostFunc(stream, function, 0),
        lambda: runtime.cudaStreamQuery(stream),
    ]
    assert [call() for call in calls] == [INVALID_HANDLE] * len(calls)
    assert emulator.violations() == len(calls)
    assert all(f"stream {stream:#x} used" in text for text in emulator.violation_texts())
    assert driver.cuMemFree_v2(there) == 0
    emulator.reset()


def test_a_query_leaves_no_error(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    """F35: that something is not ready is no error."""
    emulator.hold(stream.cuda_stream)
    event = copy(on_device(), pinned(0), stream)
    assert runtime.cudaStreamQuery(stream.cuda_stream) == NOT_READY
    assert runtime.cudaGetLastError() == 0
    assert runtime.cudaEventQuery(event.cuda_event) == NOT_READY
    assert runtime.cudaGetLastError() == 0
    assert runtime.cudaEventQuery(0) == INVALID_HANDLE
    assert runtime.cudaEventQuery(event.cuda_event) == NOT_READY
    assert runtime.cudaGetLastError() == INVALID_HANDLE, "nor does it clear one"


# -------------------------------------------------------------------------------------------------------- time, engines


def milliseconds(stream: torch.cuda.Stream, destination: torch.Tensor, source: torch.Tensor) -> float:
    """What a copy takes."""
    start = torch.cuda.Event(enable_timing=True)
    start.record(stream)
    end = copy(destination, source, stream)
    end.synchronize()
    return start.elapsed_time(end)


def test_delays(emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(0)
    emulator.set_delay(Kind.D2H, HOUR_US)
    emulator.set_delay(Kind.H2D, 20_000)
    assert milliseconds(stream, there, host) >= 20
    emulator.set_delay(None, 0)
    emulator.set_stream_delay(stream.cuda_stream, 20_000)
    assert milliseconds(stream, there, host) >= 20
    emulator.set_delay(None, HOUR_US)
    emulator.set_stream_delay(other.cuda_stream, 0)
    assert milliseconds(other, there, host) < 1000 * PATIENCE_S


def test_bandwidth(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    emulator.set_bandwidth(SIZE / 1e9 / 20e-3)  # SIZE in 20 ms
    assert milliseconds(stream, on_device(0), pinned(0)) >= 20


def test_both_directions_share_a_bandwidth(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    """At a half each: both together take as long as one after the other, however much of them overlaps."""
    emulator.set_bandwidth(SIZE / 1e9 / 50e-3)  # SIZE in 50 ms
    emulator.set_shared_bandwidth(0.5)
    started = time.monotonic()
    for event in copy(on_device(), pinned(0), stream), copy(pinned(0), on_device(), other):
        event.synchronize()
    assert time.monotonic() - started >= 0.1


POISON = 0xDB


def begin(destination: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Queue a copy and see its engine busy with it; the event after it."""
    load().set_poison(True)
    event = copy(destination, source, stream)
    eventually(lambda: event.query() or holds(destination, POISON))
    return event


@pytest.mark.parametrize("kind", [Kind.H2D, Kind.D2H, Kind.D2D])
def test_a_copy_keeps_its_bandwidth_unless_the_other_direction_is_busy(
    emulator: Emulator, stream: torch.cuda.Stream, kind: Kind
) -> None:
    """One of each kind, alone; then beside the others that do not share with it."""
    ends = {
        Kind.H2D: (on_device(), pinned(0)),
        Kind.D2H: (pinned(0), on_device()),
        Kind.D2D: (on_device(), on_device()),
    }
    emulator.set_bandwidth(SIZE / 1e9 / 1e-3)
    emulator.set_shared_bandwidth(1e-8)  # a day for SIZE
    eventually(copy(*ends[kind], stream).query)
    for other in (Kind.H2D, Kind.D2H) if kind == Kind.D2D else (Kind.D2D,):
        busy = new_stream()
        emulator.set_stream_delay(busy.cuda_stream, HOUR_US)
        begin(*ends[other], busy)
    eventually(copy(*ends[kind], stream).query)


@pytest.mark.parametrize("kind", [Kind.H2D, Kind.D2H])
def test_a_copy_is_fast_again_when_the_other_direction_ends(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream, kind: Kind
) -> None:
    there, host = on_device(), pinned(0)
    emulator.set_bandwidth(SIZE / 1e9 / 1e-3)
    emulator.set_shared_bandwidth(1e-7)  # hours for SIZE; 150 ms for a byte
    ends = [(there, host), (host[:1], there[:1])] if kind == Kind.H2D else [(host, there), (there[:1], host[:1])]
    emulator.set_stream_delay(other.cuda_stream, 20_000)
    copy(*ends[1], other)
    eventually(copy(*ends[0], stream).query)


def test_a_copy_is_slow_while_the_other_direction_is_busy(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    """Which begins later and ends sooner: unless it does, once more."""
    there, back, host, source = on_device(), pinned(0)[:1], pinned(0), on_device()
    emulator.set_bandwidth(SIZE / 1e9 / 200e-3)
    emulator.set_shared_bandwidth(0.01)
    emulator.set_stream_delay(other.cuda_stream, 100_000)
    while True:
        start = torch.cuda.Event(enable_timing=True)
        start.record(stream)
        slow = begin(there, host, stream)
        between = copy(back, source[:1], other)
        between.synchronize()
        slow.synchronize()
        if between.elapsed_time(slow) > 0:
            break
    assert start.elapsed_time(slow) >= 250, "not 299: one may find out late that the other has begun"


def test_another_share_is_for_copies_under_way_as_well(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    emulator.set_bandwidth(SIZE / 1e9 / 1e-3)
    emulator.set_shared_bandwidth(1e-8)
    emulator.set_stream_delay(other.cuda_stream, HOUR_US)
    begin(pinned(0), on_device(), other)
    event = begin(on_device(0), pinned(9), stream)
    assert not event.query()
    emulator.set_shared_bandwidth(1)
    eventually(event.query)


@pytest.mark.parametrize("fraction", [0, -1, 1.5, float("nan")])
def test_a_share_is_a_part(emulator: Emulator, fraction: float) -> None:
    with pytest.raises(ValueError, match="no part"):
        emulator.set_shared_bandwidth(fraction)


def test_jitter_depends_on_the_seed(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(0)
    took = []
    for seed in (1, 2, 3, 4):
        emulator.set_jitter(20_000, seed)
        took.append(milliseconds(stream, there, host))
    assert max(took) > 5
    assert len({round(each) for each in took}) > 1


@pytest.mark.parametrize("kind", [Kind.H2D, Kind.D2H, Kind.D2D])
def test_an_engine_serves_in_order_of_submission(emulator: Emulator, kind: Kind) -> None:
    """Not by priority, and not one stream after the other, although all of them may start at the same moment."""
    to = pinned(0) if kind == Kind.D2H else on_device()
    of = pinned(0) if kind == Kind.H2D else on_device()
    gate, streams = new_stream(), [new_stream(priority) for priority in (-5, 0, -1)]
    emulator.hold(gate.cuda_stream)
    opened = copy(on_device(), pinned(0), gate)
    emulator.set_delay(kind, 500)
    for stream in streams:
        stream.wait_event(opened)
    order = [1, 1, 1, 1, 0, 2, 0, 1, 2, 2, 1, 0, 0, 2, 1, 1, 1, 1, 1, 0]
    events = [copy(to, of, streams[number]) for number in order]
    emulator.release(gate.cuda_stream)
    torch.cuda.synchronize()
    times = [opened.elapsed_time(event) for event in events]
    assert times == sorted(times)
    assert times[-1] >= len(order) * 0.5


def test_an_engine_is_busy_in_one_direction(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream, engines_are_idle: Callable[..., None]
) -> None:
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    busy = copy(on_device(), pinned(0), stream)
    waits = copy(on_device(), pinned(0), other)
    engines_are_idle(Kind.D2H, Kind.D2D)
    assert not busy.query()
    assert not waits.query()
    emulator.reset()
    assert busy.query()
    assert waits.query()


def test_a_held_stream_occupies_no_engine(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    emulator.hold(stream.cuda_stream)
    held = copy(on_device(), pinned(0), stream)
    copy(on_device(), pinned(0), other).synchronize()
    assert not held.query()


def test_holding_a_stream_gives_up_its_turn(
    emulator: Emulator, stream: torch.cuda.Stream, other: torch.cuda.Stream
) -> None:
    busy = new_stream()
    emulator.set_stream_delay(busy.cuda_stream, 300_000)
    copy(on_device(), pinned(0), busy)
    first = copy(on_device(), pinned(0), stream)
    second = copy(on_device(), pinned(0), other)
    emulator.hold(stream.cuda_stream)
    second.synchronize()
    assert not first.query()


# -------------------------------------------------------------------------------------------------------- host memory


def test_registration(pages: int) -> None:
    page = mmap.PAGESIZE
    view = torch.frombuffer((ctypes.c_char * page).from_address(pages), dtype=torch.uint8)
    assert not view.is_pinned()
    assert runtime.cudaHostRegister(pages, 2 * page, 0) == 0
    assert view.is_pinned()
    assert runtime.cudaHostRegister(pages + page, 2 * page, 0) == ALREADY_REGISTERED
    assert runtime.cudaHostUnregister(pages + page) == NOT_REGISTERED
    assert runtime.cudaHostUnregister(pages) == 0
    assert not view.is_pinned()
    assert runtime.cudaHostUnregister(pages) == NOT_REGISTERED


@pytest.mark.parametrize(
    ("there", "tried"),
    [
        ((0.0, 0.25), (0.5, 0.25)),
        ((0.5, 0.25), (0.0, 0.25)),
        ((0.5, 0.75), (1.5, 0.25)),
        ((1.5, 0.25), (0.5, 0.75)),
        ((0.0, 0.5), (0.75, 1.0)),
    ],
)
def test_registrations_may_share_a_page_but_no_byte(
    pages: int, stream: torch.cuda.Stream, emulator: Emulator, there: tuple[float, float], tried: tuple[float, float]
) -> None:
    """F5. Both are (start, length) in pages. Either outlives the other."""
    ranges = [[int(each * mmap.PAGESIZE) for each in there], [int(each * mmap.PAGESIZE) for each in tried]]
    device, before = on_device(), locked_pages()
    for gone, left in (ranges, ranges[::-1]):
        for start, length in ranges:
            assert runtime.cudaHostRegister(pages + start, length, 0) == 0
        for start, length in ranges:
            assert runtime.cudaHostRegister(pages + start + length - 1, 1, 0) == ALREADY_REGISTERED
        assert runtime.cudaHostUnregister(pages + gone[0]) == 0
        assert locked_pages() == before + (sum(left) - 1) // mmap.PAGESIZE - left[0] // mmap.PAGESIZE + 1
        ctypes.memset(pages + left[0], 7, left[1])
        arguments = device.data_ptr(), pages + left[0], left[1], COPY_DEFAULT, stream.cuda_stream
        assert runtime.cudaMemcpyAsync(*arguments) == 0
        stream.synchronize()
        assert emulator.peek(device.data_ptr(), left[1]) == b"\7" * left[1]
        assert runtime.cudaHostUnregister(pages + left[0]) == 0
        assert locked_pages() == before
    assert emulator.violations() == 0


def test_only_mapped_and_writable_memory_can_be_registered() -> None:
    read_only = 8
    address = map_pages(1, READABLE)
    assert runtime.cudaHostRegister(address, mmap.PAGESIZE, 0) == INVALID_VALUE
    assert runtime.cudaHostRegister(address, mmap.PAGESIZE, read_only) == 0
    assert runtime.cudaHostUnregister(address) == 0
    unmap_pages(address, 1)
    assert runtime.cudaHostRegister(address, mmap.PAGESIZE, read_only) == INVALID_VALUE


def test_a_copy_to_pageable_memory_blocks(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, back = on_device(9), pageable(0)
    emulator.set_delay(Kind.D2H, 20_000)
    copy(back, there, stream)
    assert holds(back, 9)
    assert emulator.copies_pageable() == 1


def test_a_copy_from_pageable_memory_reads_it_before_it_returns(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pageable(1)
    emulator.hold(stream.cuda_stream)
    copy(there, host, stream)
    host.fill_(2)
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    assert holds(there, 1)
    assert emulator.copies_pageable() == 1


def test_little_pageable_memory_goes_to_the_device_without_a_wait(
    emulator: Emulator, stream: torch.cuda.Stream
) -> None:
    """F14: its bytes are read at once, and arrive in the stream's order."""
    there, host = on_device(0), pageable(2)
    emulator.set_stream_delay(stream.cuda_stream, 10e6)  # cut short by the reset
    before = copy(there, pinned(1), stream)
    after = copy(there, host, stream)
    assert not before.query()
    host.fill_(3)
    emulator.reset()
    assert after.query()
    assert holds(there, 2)


@pytest.mark.parametrize("sizes", [(SIZE + 1,), (SIZE // 2, SIZE // 2 + 1)], ids=["one copy", "a batch"])
def test_more_of_it_waits_for_the_stream(emulator: Emulator, stream: torch.cuda.Stream, sizes: tuple[int, ...]) -> None:
    """F14."""
    to = [torch.empty(size, dtype=torch.uint8, device="cuda").data_ptr() for size in sizes]
    of = torch.zeros(SIZE + 1, dtype=torch.uint8).data_ptr()
    emulator.set_stream_delay(stream.cuda_stream, 20_000)
    before = copy(on_device(), pinned(0), stream)
    if len(sizes) == 1:
        assert runtime.cudaMemcpyAsync(to[0], of, sizes[0], COPY_DEFAULT, stream.cuda_stream) == 0
    else:
        arguments = batch_arguments(to, [of] * len(to), list(sizes))
        assert runtime.cudaMemcpyBatchAsync(*arguments, stream.cuda_stream) == 0
    assert before.query()


def test_little_pageable_memory_goes_to_the_host_after_what_is_before(
    emulator: Emulator, stream: torch.cuda.Stream
) -> None:
    """F12: unlike a copy to the device it is read in the stream's order."""
    between, back, there = pageable(0), pageable(0), on_device()

    def write(_: object) -> None:
        between.fill_(9)

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(write)
    emulator.set_stream_delay(stream.cuda_stream, 20_000)
    copy(there, pinned(0), stream)
    assert runtime.cudaLaunchHostFunc(stream.cuda_stream, function, None) == 0
    arguments = back.data_ptr(), between.data_ptr(), SIZE, COPY_DEFAULT, stream.cuda_stream
    assert runtime.cudaMemcpyAsync(*arguments) == 0
    assert holds(back, 9)


def test_a_copy_from_host_to_host_blocks(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    to, of = pinned(0), pinned(9)
    emulator.set_delay(Kind.H2H, 20_000)
    assert runtime.cudaMemcpyAsync(to.data_ptr(), of.data_ptr(), SIZE, COPY_DEFAULT, stream.cuda_stream) == 0
    assert holds(to, 9)
    assert emulator.copies(Kind.H2H) == (1, SIZE)
    assert emulator.copies_pageable() == 0


def test_a_host_range_that_is_gone_is_an_error_and_no_crash(
    emulator: Emulator, stream: torch.cuda.Stream, capfd: pytest.CaptureFixture[str]
) -> None:
    there, address = on_device(), map_pages(1)
    assert runtime.cudaHostRegister(address, mmap.PAGESIZE, 0) == 0
    emulator.hold(stream.cuda_stream)
    assert runtime.cudaMemcpyAsync(there.data_ptr(), address, mmap.PAGESIZE, COPY_DEFAULT, stream.cuda_stream) == 0
    unmap_pages(address, 1)
    emulator.release(stream.cuda_stream)
    assert runtime.cudaStreamSynchronize(stream.cuda_stream) == ILLEGAL_ADDRESS
    assert "not mapped" in capfd.readouterr().err
    emulator.reset()
    assert runtime.cudaHostUnregister(address) == 0


def test_unregistering_under_a_copy_is_a_violation(emulator: Emulator, stream: torch.cuda.Stream, memory: int) -> None:
    there = on_device()
    emulator.hold(stream.cuda_stream)
    runtime.cudaMemcpyAsync(there.data_ptr(), memory, 1, COPY_DEFAULT, stream.cuda_stream)
    assert runtime.cudaHostUnregister(memory) == 0
    assert emulator.violations() == 1
    assert "host unregister" in emulator.violation_texts()[0]
    emulator.reset()
    assert emulator.violations() == 0


def test_unregistering_what_a_copy_writes_is_a_violation(
    emulator: Emulator, stream: torch.cuda.Stream, memory: int
) -> None:
    there = on_device()
    emulator.hold(stream.cuda_stream)
    runtime.cudaMemcpyAsync(memory + mmap.PAGESIZE, there.data_ptr(), 1, COPY_DEFAULT, stream.cuda_stream)
    assert runtime.cudaHostUnregister(memory) == 0
    assert emulator.violations() == 1
    emulator.reset()


def test_unregistering_before_and_after_a_copy_is_no_violation(
    emulator: Emulator, stream: torch.cuda.Stream, pages: int
) -> None:
    there, page = on_device(), mmap.PAGESIZE
    for address in (pages, pages + page, pages + 2 * page):
        assert runtime.cudaHostRegister(address, page, 0) == 0
    emulator.hold(stream.cuda_stream)
    runtime.cudaMemcpyAsync(there.data_ptr(), pages + page, page, COPY_DEFAULT, stream.cuda_stream)
    for address in (pages, pages + 2 * page):
        assert runtime.cudaHostUnregister(address) == 0
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    assert runtime.cudaHostUnregister(pages + page) == 0
    assert emulator.violations() == 0


class TestUnregisteringMayWait:
    """F42, for work that does not touch the memory."""

    def test_it_waits_for_the_device(self, emulator: Emulator, pages: int) -> None:
        streams = [new_stream() for _ in range(3)]
        assert runtime.cudaHostRegister(pages, mmap.PAGESIZE, 0) == 0
        kinds = [(on_device(), pinned(0)), (pinned(0), on_device()), (on_device(), on_device())]
        for number, stream in enumerate(streams):
            emulator.set_stream_delay(stream.cuda_stream, 60_000 - number * 20_000)
        events = [copy(to, of, stream) for (to, of), stream in zip(kinds, streams, strict=True)]
        emulator.set_unregister_waits(True)
        assert runtime.cudaHostUnregister(pages) == 0
        assert [event.query() for event in events] == [True] * len(events)

    @pytest.mark.parametrize("undo", [Emulator.reset, lambda emulator: emulator.set_unregister_waits(False)])
    def test_it_does_not_unless_that_is_set(
        self, emulator: Emulator, stream: torch.cuda.Stream, pages: int, undo: Callable[[Emulator], None]
    ) -> None:
        emulator.set_unregister_waits(True)
        undo(emulator)
        assert runtime.cudaHostRegister(pages, mmap.PAGESIZE, 0) == 0
        emulator.set_stream_delay(stream.cuda_stream, 10e6)
        event = copy(on_device(), pinned(0), stream)
        assert runtime.cudaHostUnregister(pages) == 0
        assert not event.query()

    def test_it_does_not_under_a_copy_of_the_memory(
        self, emulator: Emulator, stream: torch.cuda.Stream, memory: int
    ) -> None:
        """F4: then the copy finds it gone."""
        there = on_device()
        emulator.set_unregister_waits(True)
        emulator.set_stream_delay(stream.cuda_stream, 10e6)
        assert runtime.cudaMemcpyAsync(there.data_ptr(), memory, 1, COPY_DEFAULT, stream.cuda_stream) == 0
        assert runtime.cudaHostUnregister(memory) == 0
        assert runtime.cudaStreamQuery(stream.cuda_stream) == NOT_READY
        assert emulator.violations() == 1
        emulator.reset()

    def test_it_does_nothing_where_the_context_is_lost_meanwhile(
        self, emulator: Emulator, stream: torch.cuda.Stream, pages: int
    ) -> None:
        """F1."""
        there, host = on_device(), pinned(0)
        assert runtime.cudaHostRegister(pages, mmap.PAGESIZE, 0) == 0
        emulator.set_unregister_waits(True)
        emulator.set_stream_delay(stream.cuda_stream, 20_000)
        emulator.inject("exec_h2d", 1, ILLEGAL_ADDRESS, asynchronous=True)
        arguments = there.data_ptr(), host.data_ptr(), 1, COPY_DEFAULT, stream.cuda_stream
        assert runtime.cudaMemcpyAsync(*arguments) == 0
        assert runtime.cudaHostUnregister(pages) == ILLEGAL_ADDRESS
        emulator.reset()
        assert runtime.cudaHostUnregister(pages) == 0

    def test_only_one_of_two_threads_unregisters(
        self, emulator: Emulator, stream: torch.cuda.Stream, pages: int
    ) -> None:
        assert runtime.cudaHostRegister(pages, mmap.PAGESIZE, 0) == 0
        emulator.set_unregister_waits(True)
        emulator.hold(stream.cuda_stream)
        copy(on_device(), pinned(0), stream)
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(runtime.cudaHostUnregister, pages) for _ in range(2)]
            eventually(lambda: emulator.count("host_unregister") == 2)
            emulator.release(stream.cuda_stream)
        assert sorted(answer.result() for answer in answers) == [0, NOT_REGISTERED]


def test_freeing_under_a_copy_is_a_violation(
    emulator: Emulator, stream: torch.cuda.Stream, capfd: pytest.CaptureFixture[str]
) -> None:
    there, address = on_device(), ctypes.c_void_p()
    assert runtime.cudaHostAlloc(ctypes.byref(address), SIZE, 0) == 0
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    runtime.cudaMemcpyAsync(there.data_ptr(), address, SIZE, COPY_DEFAULT, stream.cuda_stream)
    assert runtime.cudaFreeHost(address) == 0
    assert "VIOLATION: host free" in capfd.readouterr().err
    assert emulator.violations() == 1
    emulator.reset()


@pytest.mark.parametrize("kind", [PRIVATE, SHARED])
class TestRegisteredMemoryThatIsMappedAnew:
    """F36: the registration stays, with the pages that it was made for."""

    @pytest.fixture
    def anew(self, kind: int) -> Iterator[int]:
        """The address of a page that was registered, and is another one now, full of 7."""
        address = map_pages(1, flags=kind)
        assert runtime.cudaHostRegister(address, mmap.PAGESIZE, 0) == 0
        self.map_another(address, kind)
        yield address
        runtime.cudaHostUnregister(address)
        unmap_pages(address, 1)

    @staticmethod
    def map_another(address: int, kind: int) -> None:
        assert map_pages(1, flags=kind, at=address) == address
        ctypes.memset(address, 7, mmap.PAGESIZE)

    def test_it_counts_as_registered(self, anew: int, context: int) -> None:
        memory_type, on_host = 2, 1
        assert runtime.cudaHostRegister(anew, mmap.PAGESIZE, 0) == ALREADY_REGISTERED
        assert made(driver.cuPointerGetAttribute, memory_type, anew) == on_host

    def test_a_copy_does_not_reach_it(self, emulator: Emulator, stream: torch.cuda.Stream, anew: int) -> None:
        there = on_device(1)
        emulator.set_poison(True)
        assert runtime.cudaMemcpyAsync(anew, there.data_ptr(), 4, COPY_DEFAULT, stream.cuda_stream) == 0
        stream.synchronize()
        assert ctypes.string_at(anew, 4) == b"\7" * 4
        assert "mapped anew" in emulator.violation_texts()[0]
        emulator.reset()

    @pytest.mark.parametrize("order", [ORDER_STREAM, ORDER_DURING_API_CALL])
    def test_a_copy_does_not_read_it(
        self, emulator: Emulator, stream: torch.cuda.Stream, anew: int, order: int
    ) -> None:
        there = on_device(1)
        assert batch(stream.cuda_stream, [there.data_ptr()], [anew], [4], order) == 0
        stream.synchronize()
        assert emulator.peek(there.data_ptr(), 4) == b"\xdb" * 4
        assert emulator.violations() == 1
        emulator.reset()

    def test_a_copy_that_was_queued_before_does_not_reach_it(
        self, emulator: Emulator, stream: torch.cuda.Stream, memory: int, kind: int
    ) -> None:
        there = on_device(1)
        emulator.hold(stream.cuda_stream)
        assert runtime.cudaMemcpyAsync(memory, there.data_ptr(), 4, COPY_DEFAULT, stream.cuda_stream) == 0
        self.map_another(memory, kind)
        emulator.release(stream.cuda_stream)
        stream.synchronize()
        assert ctypes.string_at(memory, 4) == b"\7" * 4
        assert emulator.violations() == 1
        emulator.reset()

    def test_a_copy_does_not_reach_it_either_where_it_ends(
        self, emulator: Emulator, stream: torch.cuda.Stream, memory: int, kind: int
    ) -> None:
        there, second = on_device(1), memory + mmap.PAGESIZE
        self.map_another(second, kind)
        assert (
            runtime.cudaMemcpyAsync(memory, there.data_ptr(), 2 * mmap.PAGESIZE, COPY_DEFAULT, stream.cuda_stream) == 0
        )
        stream.synchronize()
        assert ctypes.string_at(second, 4) == b"\7" * 4
        assert emulator.violations() == 1
        emulator.reset()

    def test_it_can_be_registered_once_the_first_registration_is_gone(
        self, emulator: Emulator, stream: torch.cuda.Stream, anew: int
    ) -> None:
        there = on_device(1)
        assert runtime.cudaHostUnregister(anew) == 0
        assert runtime.cudaHostRegister(anew, mmap.PAGESIZE, 0) == 0
        assert runtime.cudaMemcpyAsync(anew, there.data_ptr(), 4, COPY_DEFAULT, stream.cuda_stream) == 0
        stream.synchronize()
        assert ctypes.string_at(anew, 4) == b"\1" * 4
        assert emulator.violations() == 0


def locked_pages() -> int:
    return int(Path("/proc/self/status").read_text().split("VmLck:")[1].split()[0]) * 1024 // mmap.PAGESIZE


def test_memory_is_locked_while_it_is_registered(pages: int) -> None:
    before = locked_pages()
    assert runtime.cudaHostRegister(pages, mmap.PAGESIZE, 0) == 0
    assert locked_pages() == before + 1
    assert runtime.cudaHostUnregister(pages) == 0
    assert locked_pages() == before


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_memory_is_copied_if_all_or_none_of_it_is_registered(
    emulator: Emulator, stream: torch.cuda.Stream, first: int
) -> None:
    """F37. Of eight pages those from 2 to 5 are registered, in two halves; a copy has three."""
    pages, page = map_pages(8), mmap.PAGESIZE
    ctypes.memset(pages, 7, 8 * page)
    for half in (2, 4):
        assert runtime.cudaHostRegister(pages + half * page, 2 * page, 0) == 0
    there, host = on_device(1).data_ptr(), pages + first * page
    whole = first in (2, 3)
    for to, of in ((there, host), (host, there)):
        arguments = (to, of, 3 * page, COPY_DEFAULT, stream.cuda_stream)
        assert runtime.cudaMemcpyAsync(*arguments) == (0 if whole else INVALID_VALUE)
        # In a batch not even all of it, if it was registered apart.
        batch = batch_arguments([there + 8 * page, to], [pages + 2 * page, of], [page, 3 * page])
        assert runtime.cudaMemcpyBatchAsync(*batch, stream.cuda_stream) == INVALID_VALUE
    stream.synchronize()
    assert emulator.peek(there, 3 * page) == (b"\7" if whole else b"\1") * (3 * page)
    assert emulator.peek(there + 8 * page, page) == b"\1" * page, "a batch that is refused copies nothing"
    for half in (2, 4):
        assert runtime.cudaHostUnregister(pages + half * page) == 0
    unmap_pages(pages, 8)


def test_batches_need_the_host_pointers_of_registered_memory(
    emulator: Emulator, context: int, stream: torch.cuda.Stream, memory: int
) -> None:
    there, allocated, value = on_device(1).data_ptr(), pinned(0).data_ptr(), ctypes.c_int()
    attribute = 91
    assert driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
    assert value.value == 1
    emulator.set_attribute(attribute, 0)
    assert driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
    assert value.value == 0
    assert runtime.cudaMemcpyAsync(there, memory, 2, COPY_DEFAULT, stream.cuda_stream) == 0
    batch = batch_arguments([there, there + 8], [allocated, allocated + 8], [1, 1])
    assert runtime.cudaMemcpyBatchAsync(*batch, stream.cuda_stream) == 0
    stream.synchronize()
    batch = batch_arguments([there, there + 8], [allocated, memory], [1, 1])
    assert runtime.cudaMemcpyBatchAsync(*batch, stream.cuda_stream) == 0
    assert driver.cuStreamSynchronize(stream.cuda_stream) == ILLEGAL_ADDRESS
    assert emulator.sticky() == ILLEGAL_ADDRESS
    emulator.reset()
    assert driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
    assert value.value == 1


# ------------------------------------------------------------------------------------------------------- device memory


def test_ranges_are_checked(stream: torch.cuda.Stream) -> None:
    there, host = on_device(), pinned(0)
    end = there.data_ptr() + (1 << 30)
    arguments = (host.data_ptr(), 2, COPY_DEFAULT, stream.cuda_stream)
    assert runtime.cudaMemcpyAsync(end, *arguments) == INVALID_VALUE
    address = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(address), 100) == 0
    assert address.value is not None
    assert runtime.cudaMemcpyAsync(address.value + 98, *arguments) == 0
    assert runtime.cudaMemcpyAsync(address.value + 99, *arguments) == INVALID_VALUE
    assert runtime.cudaFree(address) == 0
    assert runtime.cudaMemcpyAsync(address.value, *arguments) == INVALID_VALUE
    assert runtime.cudaFree(address) == INVALID_VALUE


def test_a_copy_from_outside_an_allocation_is_refused_at_once(
    emulator: Emulator, context: int, stream: torch.cuda.Stream
) -> None:
    """F9, whatever the call and the other side."""
    handle, host, size = stream.cuda_stream, pinned(0).data_ptr(), 100
    kept, freed = made(driver.cuMemAlloc_v2, size), made(driver.cuMemAlloc_v2, size)
    assert driver.cuMemFree_v2(freed) == 0
    emulator.hold(handle)
    for outside in (kept + size - 1, freed):
        for to, of in ((host, outside), (outside, host), (kept, outside), (outside, kept)):
            assert driver.cuMemcpyAsync(to, of, 2, handle) == INVALID_VALUE
            assert runtime.cudaMemcpyAsync(to, of, 2, COPY_DEFAULT, handle) == INVALID_VALUE
            assert batch(handle, [kept, to], [host, of], [1, 2]) == INVALID_VALUE
        assert driver.cuMemcpyDtoHAsync_v2(host, outside, 2, handle) == INVALID_VALUE
        assert driver.cuMemcpyHtoDAsync_v2(outside, host, 2, handle) == INVALID_VALUE
        assert driver.cuMemsetD8Async(outside, 0, 2, handle) == INVALID_VALUE
    assert emulator.pending(handle) == 0
    assert emulator.sticky() == 0
    assert driver.cuMemFree_v2(kept) == 0


def test_a_kind_that_does_not_fit_is_refused(stream: torch.cuda.Stream) -> None:
    there, host = on_device(), pinned(0)
    arguments = (there.data_ptr(), host.data_ptr(), SIZE, COPY_DEVICE_TO_HOST, stream.cuda_stream)
    assert runtime.cudaMemcpyAsync(*arguments) == INVALID_VALUE


def test_peek_and_poke(emulator: Emulator) -> None:
    there = on_device(0)
    emulator.poke(there.data_ptr() + 1, b"abc")
    assert emulator.peek(there.data_ptr(), 5) == b"\0abc\0"
    with pytest.raises(ValueError, match="not within"):
        emulator.peek(pinned(0).data_ptr(), 1)


def test_freed_memory_comes_back(emulator: Emulator) -> None:
    free, _ = torch.cuda.mem_get_info()
    address = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(address), 1 << 30) == 0
    assert torch.cuda.mem_get_info()[0] == free - (1 << 30)
    assert runtime.cudaFree(address) == 0
    assert torch.cuda.mem_get_info()[0] == free
    assert runtime.cudaMalloc(ctypes.byref(address), 1 << 40) == OUT_OF_MEMORY


@pytest.mark.parametrize("kind", [Kind.H2D, Kind.D2H, Kind.D2D])
def test_a_destination_is_poison_while_it_is_written(
    emulator: Emulator, stream: torch.cuda.Stream, engines_are_idle: Callable[..., None], kind: Kind
) -> None:
    of = pinned(9) if kind == Kind.H2D else on_device(9)
    to = pinned(1) if kind == Kind.D2H else on_device(1)
    emulator.set_poison(True)
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    emulator.hold(stream.cuda_stream)
    event = copy(to, of, stream)
    engines_are_idle()
    assert holds(to, 1)
    emulator.release(stream.cuda_stream)
    eventually(lambda: holds(to, 0xDB))
    assert not event.query()
    assert holds(of, 9)
    emulator.reset()
    assert holds(to, 9)


def test_all_of_a_large_destination_is_poison(emulator: Emulator, context: int, stream: torch.cuda.Stream) -> None:
    size = 5 * SIZE // 2
    there, host = made(driver.cuMemAlloc_v2, size), torch.zeros(size, dtype=torch.uint8).pin_memory()
    emulator.set_poison(True)
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    assert driver.cuMemcpyHtoDAsync_v2(there, host.data_ptr(), size, stream.cuda_stream) == 0
    eventually(lambda: emulator.peek(there, size) == b"\xdb" * size)
    emulator.reset()
    assert emulator.peek(there, size) == bytes(size)
    assert driver.cuMemFree_v2(there) == 0


def test_a_destination_is_as_it_was_without_poison(
    emulator: Emulator, stream: torch.cuda.Stream, engines_are_idle: Callable[..., None]
) -> None:
    there, back = on_device(9), pinned(1)
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    event = copy(back, there, stream)
    engines_are_idle(Kind.H2D, Kind.D2D)
    assert holds(back, 1)
    assert not event.query()
    emulator.reset()
    assert holds(back, 9)


def test_poison_spares_a_source_that_overlaps(emulator: Emulator, context: int, stream: torch.cuda.Stream) -> None:
    there = made(driver.cuMemAlloc_v2, 8)
    emulator.poke(there, b"abcdefgh")
    emulator.set_poison(True)
    assert driver.cuMemcpyDtoDAsync_v2(there + 1, there, 7, stream.cuda_stream) == 0
    stream.synchronize()
    assert emulator.peek(there, 8) == b"aabcdefg"
    assert driver.cuMemFree_v2(there) == 0


# -------------------------------------------------------------------------------------------------------------- batches


def batch(stream: int, to: list[int], of: list[int], sizes: list[int], order: int = ORDER_STREAM) -> int:
    return runtime.cudaMemcpyBatchAsync(*batch_arguments(to, of, sizes, order), stream)


def test_a_batch(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    count, there, host = 256, on_device(0), pinned(0)
    piece = SIZE // count
    host.view(count, piece).copy_(torch.arange(count, dtype=torch.uint8)[:, None])
    to = [there.data_ptr() + i * piece for i in range(count)]
    of = [host.data_ptr() + (count - 1 - i) * piece for i in range(count)]
    emulator.hold(stream.cuda_stream)
    assert batch(stream.cuda_stream, to, of, [piece] * count) == 0
    assert emulator.pending(stream.cuda_stream) == 1
    assert emulator.copies(Kind.H2D) == (count, SIZE)
    assert emulator.count("memcpy_batch_async") == 1
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    expected = b"".join(bytes([count - 1 - i]) * piece for i in range(count))
    assert emulator.peek(there.data_ptr(), SIZE) == expected


def test_the_entries_of_a_batch_have_no_order(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(), pinned(0)
    host[:16] = torch.arange(16, dtype=torch.uint8)
    last = set()
    for _ in range(8):
        batch(stream.cuda_stream, [there.data_ptr()] * 16, [host.data_ptr() + i for i in range(16)], [1] * 16)
        stream.synchronize()
        last.add(emulator.peek(there.data_ptr(), 1))
    assert len(last) > 1


@pytest.mark.parametrize(("order", "arrives"), [(ORDER_STREAM, 2), (ORDER_DURING_API_CALL, 1), (ORDER_ANY, 1)])
def test_when_a_batch_reads_its_source(emulator: Emulator, stream: torch.cuda.Stream, order: int, arrives: int) -> None:
    there, host = on_device(0), pinned(1)
    emulator.hold(stream.cuda_stream)
    assert batch(stream.cuda_stream, [there.data_ptr()], [host.data_ptr()], [SIZE], order) == 0
    host.fill_(2)
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    assert holds(there, arrives)


def test_a_batch_in_any_order_overtakes_what_writes_its_source(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, back, host = on_device(0), pinned(7), pinned(9)
    emulator.hold(stream.cuda_stream)
    copy(there, host, stream)
    assert batch(stream.cuda_stream, [back.data_ptr()], [there.data_ptr()], [SIZE], ORDER_ANY) == 0
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    assert holds(back, 0)


def test_attributes_hold_from_their_first_entry_on(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(1)
    emulator.hold(stream.cuda_stream)
    arguments = batch_arguments([there.data_ptr() + i for i in range(4)], [host.data_ptr()] * 4, [1] * 4)
    attributes = (BatchAttributes * 2)(BatchAttributes(ORDER_STREAM), BatchAttributes(ORDER_ANY))
    first = (ctypes.c_size_t * 2)(0, 2)
    assert runtime.cudaMemcpyBatchAsync(*arguments[:4], attributes, first, 2, stream.cuda_stream) == 0
    host.fill_(2)
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    assert emulator.peek(there.data_ptr(), 4) == bytes([2, 2, 1, 1])


def test_batches_that_are_refused(stream: torch.cuda.Stream) -> None:
    there, host = on_device().data_ptr(), pinned(0).data_ptr()
    for legacy in (LEGACY_STREAM, LEGACY_STREAM_BY_NAME):
        assert batch(legacy, [there], [host], [1]) == INVALID_VALUE
    assert batch(stream.cuda_stream, [there], [host], [0]) == INVALID_VALUE
    assert batch(stream.cuda_stream, [there], [host], [1], order=0) == INVALID_VALUE
    assert batch(stream.cuda_stream, [], [], []) == INVALID_VALUE
    assert batch(stream.cuda_stream, [there, there], [host, host], [1, 1 << 33]) == INVALID_VALUE
    stream.synchronize()


# -------------------------------------------------------------------------------------------------------------- errors


def test_an_injected_refusal_is_for_one_call(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(9)
    emulator.inject("memcpy_async", 2, INVALID_VALUE)
    copy(there, host, stream)
    assert error_code(lambda: copy(there, host, stream)) == INVALID_VALUE
    copy(there, host, stream).synchronize()
    assert emulator.sticky() == 0
    assert emulator.count("memcpy_async") == 3
    assert emulator.copies(Kind.H2D)[0] == 2


def test_out_of_memory(emulator: Emulator) -> None:
    for _ in range(2):  # torch tries again after it has given back what it had cached
        emulator.inject("malloc", 1, OUT_OF_MEMORY)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("point", ["exec_h2d", "exec_copy"])
def test_an_asynchronous_error_loses_the_context(emulator: Emulator, stream: torch.cuda.Stream, point: str) -> None:
    there, too, host = on_device(0), on_device(0), pinned(9)
    emulator.inject(point, 1, ILLEGAL_ADDRESS, asynchronous=True)
    emulator.hold(stream.cuda_stream)
    event = copy(there, host, stream)
    last = copy(too, host, stream)
    assert not event.query()
    emulator.release(stream.cuda_stream)
    calls: list[Callable[[], object]] = [
        last.synchronize,
        event.query,
        stream.query,
        stream.synchronize,
        torch.cuda.synchronize,
        lambda: event.record(stream),
        lambda: torch.empty(1 << 27, device="cuda"),
    ]
    assert [error_code(call) for call in calls] == [ILLEGAL_ADDRESS] * len(calls)
    assert emulator.sticky() == ILLEGAL_ADDRESS
    assert holds(there, 0)
    assert holds(too, 0)
    emulator.reset()
    assert emulator.sticky() == 0
    copy(there, host, stream).synchronize()
    assert holds(there, 9)


@pytest.mark.filterwarnings("ignore:uncheckedSetDevice")
@pytest.mark.parametrize("point", ["exec_d2h", "exec_d2d", "event_record"])
def test_where_asynchronous_errors_happen(emulator: Emulator, stream: torch.cuda.Stream, point: str) -> None:
    there, other, host = on_device(0), on_device(0), pinned(9)
    emulator.inject(point, 1, ILLEGAL_ADDRESS, asynchronous=True)
    emulator.hold(stream.cuda_stream)
    with torch.cuda.stream(stream):
        there.copy_(host, non_blocking=True)
    emulator.step(stream.cuda_stream)
    eventually(lambda: holds(there, 9))
    assert emulator.sticky() == 0
    with torch.cuda.stream(stream):
        if point == "exec_d2h":
            host.copy_(there, non_blocking=True)
        elif point == "exec_d2d":
            other.copy_(there, non_blocking=True)
        else:
            torch.cuda.Event().record(stream)
    emulator.release(stream.cuda_stream)
    assert error_code(stream.synchronize) == ILLEGAL_ADDRESS
    emulator.reset()


def test_an_unknown_point_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="exec_h2d"):
        emulator.inject("h2d", 1, ILLEGAL_ADDRESS, asynchronous=True)


def test_cuda_in_a_host_function_is_refused(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    seen: list[tuple[int, int]] = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: seen.append((threading.get_ident(), runtime.cudaStreamQuery(stream.cuda_stream)))
    )
    emulator.hold(stream.cuda_stream)
    assert runtime.cudaLaunchHostFunc(stream.cuda_stream, function, None) == 0
    assert not seen
    emulator.release(stream.cuda_stream)
    stream.synchronize()
    ((thread, code),) = seen
    assert thread != threading.get_ident()
    assert code == NOT_PERMITTED
    assert emulator.violations() == 1
    emulator.reset()


def test_each_call_in_a_host_function_is_a_violation(
    emulator: Emulator, context: int, stream: torch.cuda.Stream
) -> None:
    """F28, whatever is called."""
    calls = [
        lambda: runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), 1),
        lambda: driver.cuEventQuery(None),
        lambda: driver.cuMemHostUnregister(None),
    ]
    codes: list[int] = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: codes.extend(call() for call in calls))
    assert driver.cuLaunchHostFunc(stream.cuda_stream, function, None) == 0
    stream.synchronize()
    assert codes == [NOT_PERMITTED] * len(calls)
    assert emulator.violations() == len(calls)
    assert all("host function" in text for text in emulator.violation_texts())
    emulator.reset()


def test_reset_forgets_everything(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(9)
    emulator.set_delay(None, HOUR_US)
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    emulator.set_jitter(HOUR_US)
    emulator.set_bandwidth(1e-12)
    emulator.set_poison(True)
    emulator.ignore_kernels(True)
    emulator.hold_new_streams(True)
    emulator.inject("memcpy_async", 2, INVALID_VALUE)
    emulator.inject("exec_copy", 1, ILLEGAL_ADDRESS, asynchronous=True)
    emulator.hide("cuMemcpyBatchAsync")
    copy(there, host, stream)
    emulator.hold(stream.cuda_stream)
    emulator.reset()
    assert holds(there, 9)
    assert (emulator.sticky(), emulator.count("memcpy_async"), emulator.copies(Kind.H2D)) == (0, 0, (0, 0))
    for _ in range(2):
        copy(there, host, stream).synchronize()
    copy(there, host, new_stream()).synchronize()
    with pytest.raises(torch.AcceleratorError):
        there + there


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.int64])
def test_fills(dtype: torch.dtype) -> None:
    assert torch.equal(torch.zeros(1000, dtype=dtype, device="cuda").cpu(), torch.zeros(1000, dtype=dtype))
    assert torch.equal(torch.ones(1000, dtype=dtype, device="cuda").cpu(), torch.ones(1000, dtype=dtype))


def test_sleep_is_asynchronous(stream: torch.cuda.Stream) -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        start.record()
        torch.cuda._sleep(50_000_000)
        end.record()
    assert not end.query()
    end.synchronize()
    assert start.elapsed_time(end) >= 50


def test_other_kernels_are_refused(emulator: Emulator, capfd: pytest.CaptureFixture[str]) -> None:
    there = on_device(1)
    assert error_code(lambda: there + there) == NOT_SUPPORTED
    assert "is not emulated" in capfd.readouterr().err
    emulator.ignore_kernels(True)
    _ = there + there


# ----------------------------------------------------------------------------------------------------------- the driver


def test_copies_by_the_driver(emulator: Emulator, context: int, memory: int) -> None:
    size = mmap.PAGESIZE
    there = made(driver.cuMemAlloc_v2, size)
    stream = made(driver.cuStreamCreateWithPriority, NON_BLOCKING, -1)
    other = made(driver.cuStreamCreate, NON_BLOCKING)
    event = made(driver.cuEventCreate, DISABLE_TIMING)
    ctypes.memset(memory, 5, size)
    emulator.hold(stream)
    assert driver.cuMemcpyHtoDAsync_v2(there, memory, size, stream) == 0
    assert driver.cuEventRecord(event, stream) == 0
    assert driver.cuStreamWaitEvent(other, event, 0) == 0
    assert driver.cuMemcpyDtoHAsync_v2(memory + size, there, size, other) == 0
    assert driver.cuEventQuery(event) == NOT_READY
    assert driver.cuStreamQuery(other) == NOT_READY
    emulator.release(stream)
    assert driver.cuStreamSynchronize(other) == 0
    assert driver.cuEventQuery(event) == 0
    assert ctypes.string_at(memory + size, size) == b"\5" * size
    for destroy, handle in (
        (driver.cuEventDestroy_v2, event),
        (driver.cuStreamDestroy_v2, stream),
        (driver.cuStreamDestroy_v2, other),
    ):
        assert destroy(handle) == 0
        assert destroy(handle) == INVALID_HANDLE
    assert driver.cuMemFree_v2(there) == 0
    assert emulator.violations() == 2, "streams are not used any more"
    emulator.reset()


def test_batches_of_two_versions(emulator: Emulator, context: int, memory: int) -> None:
    """Before 13.0 cuMemcpyBatchAsync has a parameter more, and before 12.8 there is none."""
    there, stream = made(driver.cuMemAlloc_v2, 2), made(driver.cuStreamCreate, NON_BLOCKING)
    failed = ctypes.c_size_t(7)
    for version, more in ((12080, [ctypes.byref(failed)]), (13000, [])):
        find = Api.wrap(ctypes.CFUNCTYPE(ctypes.c_int)(made(lookup, b"cuMemcpyBatchAsync", version)))
        ctypes.memset(memory, version % 256, 2)
        arguments = batch_arguments([there + 1, there], [memory, memory + 1], [1, 1])
        assert find(*arguments, *more, stream) == 0
        assert driver.cuStreamSynchronize(stream) == 0
        assert emulator.peek(there, 2) == bytes([version % 256]) * 2
    assert failed.value == ctypes.c_size_t(-1).value
    assert driver.cuMemFree_v2(there) == 0


def lookup(found: Any, name: bytes, version: int, status: Any = None) -> int:
    return driver.cuGetProcAddress_v2(name, found, version, 0, status)


def test_functions_that_there_are_not(emulator: Emulator) -> None:
    """F20: not finding one is no error; a version later than the driver's is."""
    no_such_name, too_low = 1, 2

    def find(name: bytes, version: int) -> tuple[int, int | None, int]:
        found, status = ctypes.c_void_p(7), ctypes.c_int(7)
        code = lookup(ctypes.byref(found), name, version, ctypes.byref(status))
        assert lookup(ctypes.byref(ctypes.c_void_p()), name, version) == code
        return code, found.value, status.value

    assert find(b"cuMemcpyBatchAsync", 12070) == (0, None, too_low)
    assert find(b"cuNoSuchThing", 13000) == (0, None, no_such_name)
    assert find(b"cuMemcpyBatchAsync", 13010)[:2] == (INVALID_VALUE, None)
    emulator.hide("cuMemcpyBatchAsync")
    assert find(b"cuMemcpyBatchAsync", 12080) == (0, None, no_such_name)


CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_WRONG_THREAD = 900, 901, 908
CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED = 0, 1, 2


def exchange_capture_mode(mode: int) -> int:
    """Sets the calling thread's mode; the one it had."""
    exchanged = ctypes.c_int(mode)
    assert driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(exchanged)) == 0
    return exchanged.value


def end_capture(stream: torch.cuda.Stream) -> int:
    graph = ctypes.c_void_p(7)
    code = driver.cuStreamEndCapture(stream.cuda_stream, ctypes.byref(graph))
    assert (graph.value is None) == (code != 0)
    assert code or driver.cuGraphDestroy(graph) == 0
    return code


def capture_status(stream: torch.cuda.Stream) -> int:
    status = ctypes.c_int(7)
    assert driver.cuStreamIsCapturing(stream.cuda_stream, ctypes.byref(status)) == 0
    return status.value


@pytest.fixture
def other_thread(context: int) -> Iterator[Callable[[Callable[[], int]], int]]:
    """Calls functions, all of them on the same other thread."""
    with ThreadPoolExecutor(1, initializer=lambda: driver.cuCtxPushCurrent_v2(context)) as executor:
        yield lambda function: executor.submit(function).result()


@pytest.mark.parametrize("theirs", [CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED])
@pytest.mark.parametrize("ours", [CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_unsafe_calls_are_refused_while_somebody_captures(
    other_thread: Callable[[Callable[[], int]], int],
    stream: torch.cuda.Stream,
    other: torch.cuda.Stream,
    pages: int,
    theirs: int,
    ours: int,
    elsewhere: bool,
) -> None:
    """F38: which mode and which thread a capture has, and which mode a thread has that calls something."""
    on_capturing_thread = other_thread if elsewhere else lambda function: function()
    refused = theirs == ours == CAPTURE_GLOBAL if elsewhere else CAPTURE_RELAXED not in (theirs, ours)
    there, host = on_device().data_ptr(), pinned(0).data_ptr()
    event, out = made(driver.cuEventCreate, DISABLE_TIMING), ctypes.byref(ctypes.c_void_p())
    unsafe: list[Callable[[], int]] = [
        lambda: driver.cuEventQuery(event),
        lambda: driver.cuMemHostRegister_v2(pages, mmap.PAGESIZE, 0),
        lambda: driver.cuMemHostUnregister(pages),
        lambda: driver.cuMemAlloc_v2(out, 1),
    ]
    safe: list[Callable[[], int]] = [
        lambda: driver.cuMemcpyAsync(there, host, 1, other.cuda_stream),
        lambda: driver.cuEventRecord(event, other.cuda_stream),
        lambda: driver.cuStreamWaitEvent(other.cuda_stream, event, 0),
    ]
    for call in safe + unsafe:
        assert on_capturing_thread(lambda: driver.cuStreamBeginCapture_v2(stream.cuda_stream, theirs)) == 0
        assert exchange_capture_mode(ours) == CAPTURE_GLOBAL
        code = call()
        assert exchange_capture_mode(CAPTURE_GLOBAL) == ours
        lost = refused and call in unsafe
        assert code == (CAPTURE_UNSUPPORTED if lost else 0)
        assert capture_status(stream) == (2 if lost else 1)
        assert on_capturing_thread(lambda: end_capture(stream)) == (CAPTURE_INVALIDATED if lost else 0)
        assert capture_status(stream) == 0
        assert not lost or call() == 0, "afterwards nothing is in the way"
        other.synchronize()


def test_captures_begin_and_end(
    emulator: Emulator, other_thread: Callable[[Callable[[], int]], int], stream: torch.cuda.Stream
) -> None:
    def begin(stream: int, mode: int = CAPTURE_GLOBAL) -> int:
        return driver.cuStreamBeginCapture_v2(stream, mode)

    assert begin(LEGACY_STREAM) == CAPTURE_UNSUPPORTED
    assert begin(stream.cuda_stream, 3) == driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(3))) == 1
    assert begin(0x123457) == INVALID_HANDLE
    assert end_capture(stream) == ILLEGAL_STATE
    assert begin(stream.cuda_stream) == 0
    assert begin(stream.cuda_stream) == ILLEGAL_STATE
    assert other_thread(lambda: end_capture(stream)) == CAPTURE_WRONG_THREAD
    assert end_capture(stream) == 0
    assert begin(stream.cuda_stream, CAPTURE_RELAXED) == 0
    assert other_thread(lambda: end_capture(stream)) == 0
    assert begin(stream.cuda_stream) == 0
    emulator.reset()
    assert capture_status(stream) == 0


def test_contexts_are_a_stack() -> None:
    context = made(driver.cuDevicePrimaryCtxRetain, 0)

    def use() -> list[int]:
        steps = [current()]
        driver.cuCtxPushCurrent_v2(context)
        driver.cuCtxPushCurrent_v2(context)
        driver.cuCtxPopCurrent_v2(None)
        steps.append(current())
        driver.cuCtxPopCurrent_v2(None)
        steps.append(current())
        driver.cuCtxSetCurrent(context)
        driver.cuCtxSetCurrent(context)  # replaces the top
        steps.append(current())
        driver.cuCtxPopCurrent_v2(None)
        steps.append(current())
        return steps

    assert on_thread(use) == [0, context, 0, context, 0]
    assert on_thread(lambda: driver.cuCtxPopCurrent_v2(None)) == INVALID_CONTEXT
    assert on_thread(lambda: driver.cuCtxPushCurrent_v2(context + 1)) == INVALID_CONTEXT
    assert driver.cuDevicePrimaryCtxRelease_v2(0) == 0


def current() -> int:
    """The current context, 0 for none."""
    return made(driver.cuCtxGetCurrent)


def on_thread(function: Callable[[], Any]) -> Any:
    """What a function returns on a thread that never used CUDA."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_the_driver_wants_a_current_context(stream: torch.cuda.Stream, memory: int) -> None:
    there, handle, out = on_device().data_ptr(), stream.cuda_stream, ctypes.byref(ctypes.c_uint64())
    event = torch.cuda.Event()
    event.record(stream)
    event.synchronize()
    calls = [
        lambda: driver.cuStreamCreate(out, 0),
        lambda: driver.cuStreamQuery(handle),
        lambda: driver.cuStreamSynchronize(handle),
        lambda: driver.cuStreamDestroy_v2(handle),
        lambda: driver.cuMemAlloc_v2(out, 1),
        lambda: driver.cuMemFree_v2(there),
        lambda: driver.cuMemGetInfo_v2(out, out),
        lambda: driver.cuMemHostRegister_v2(memory + 2 * mmap.PAGESIZE, 1, 0),
        lambda: driver.cuMemHostUnregister(memory),
        lambda: driver.cuMemcpyAsync(there, memory, 1, handle),
        lambda: driver.cuMemcpyBatchAsync_v2(*batch_arguments([there], [memory], [1]), handle),
        lambda: driver.cuEventCreate(out, 0),
        lambda: driver.cuEventRecord(event.cuda_event, handle),
        lambda: driver.cuEventQuery(event.cuda_event),
    ]
    assert [on_thread(call) for call in calls] == [INVALID_CONTEXT] * len(calls)
    # The runtime makes one current by itself.
    assert on_thread(lambda: (runtime.cudaStreamQuery(handle), bool(current()))) == (0, True)


def test_what_the_driver_knows_of_pointers(context: int, memory: int) -> None:
    there = made(driver.cuMemAlloc_v2, 100)
    memory_type, start, size = 2, 11, 12
    on_host, on_the_device = 1, 2
    assert made(driver.cuPointerGetAttribute, memory_type, there + 99) == on_the_device
    assert made(driver.cuPointerGetAttribute, memory_type, memory + 1) == on_host
    assert made(driver.cuPointerGetAttribute, start, there + 99) == there
    assert made(driver.cuPointerGetAttribute, size, there + 99) == 100
    out = ctypes.c_void_p()
    unknown = memory + 2 * mmap.PAGESIZE
    assert driver.cuPointerGetAttribute(ctypes.byref(out), memory_type, unknown) == INVALID_VALUE
    kinds, values = (ctypes.c_int * 1)(memory_type), (ctypes.c_void_p * 1)(ctypes.addressof(out))
    assert driver.cuPointerGetAttributes(1, kinds, values, memory) == 0
    assert out.value == on_host
    assert driver.cuPointerGetAttributes(1, kinds, values, unknown) == 0
    assert not out.value
    assert driver.cuMemFree_v2(there) == 0


@pytest.mark.parametrize(
    ("attribute", "width"),
    [(1, 8), (2, 4), (3, 8), (4, 8), (8, 4), (9, 4), (11, 8), (12, 8)],
    ids=["context", "type", "device pointer", "host pointer", "is managed", "ordinal", "start", "size"],
)
def test_attributes_of_pageable_memory_are_zero_as_wide_as_they_are(pages: int, attribute: int, width: int) -> None:
    """F30: every byte of a value is written, and none beside it."""
    out = (ctypes.c_ubyte * 16)(*[0xAA] * 16)
    kinds, values = (ctypes.c_int * 1)(attribute), (ctypes.c_void_p * 1)(ctypes.addressof(out))
    assert driver.cuPointerGetAttributes(1, kinds, values, pages) == 0
    assert bytes(out) == b"\0" * width + b"\xaa" * (16 - width)


def test_attributes_that_are_not_emulated_are_refused(pages: int, capfd: pytest.CaptureFixture[str]) -> None:
    buffer_id = 7
    out = ctypes.c_uint64()
    kinds, values = (ctypes.c_int * 1)(buffer_id), (ctypes.c_void_p * 1)(ctypes.addressof(out))
    assert driver.cuPointerGetAttributes(1, kinds, values, pages) == NOT_SUPPORTED
    assert "is not emulated" in capfd.readouterr().err


@pytest.mark.parametrize("free", [driver.cuMemFree_v2, runtime.cudaFree], ids=["cuMemFree", "cudaFree"])
def test_freeing_waits_for_the_device(emulator: Emulator, context: int, free: Callable[[int], int]) -> None:
    """F11: for all streams, of which the last made is done first."""
    there, streams = made(driver.cuMemAlloc_v2, 100), [new_stream() for _ in range(3)]
    kinds = [(on_device(), pinned(0)), (pinned(0), on_device()), (on_device(), on_device())]
    for number, stream in enumerate(streams):
        emulator.set_stream_delay(stream.cuda_stream, 60_000 - number * 20_000)
    events = [copy(to, of, stream) for (to, of), stream in zip(kinds, streams, strict=True)]
    assert free(there) == 0
    assert [event.query() for event in events] == [True] * len(events)


@pytest.mark.parametrize("free", [driver.cuMemFree_v2, runtime.cudaFree], ids=["cuMemFree", "cudaFree"])
def test_freed_memory_is_written_by_what_was_queued_before(
    emulator: Emulator, context: int, stream: torch.cuda.Stream, free: Callable[[int], int]
) -> None:
    """F11: the memory is given back after the work, not before."""
    there, back = made(driver.cuMemAlloc_v2, SIZE), pinned(0)
    emulator.poke(there, b"\x09" * SIZE)
    emulator.set_stream_delay(stream.cuda_stream, 20_000)
    assert driver.cuMemcpyDtoHAsync_v2(back.data_ptr(), there, SIZE, stream.cuda_stream) == 0
    assert free(there) == 0
    assert holds(back, 9)


def test_the_legacy_stream_orders_blocking_streams(
    emulator: Emulator, context: int, engines_are_idle: Callable[..., None]
) -> None:
    blocking, non_blocking = made(driver.cuStreamCreate, BLOCKING), made(driver.cuStreamCreate, NON_BLOCKING)
    there, host = on_device(), pinned(0)
    events = {stream: made(driver.cuEventCreate, DISABLE_TIMING) for stream in (blocking, LEGACY_STREAM, non_blocking)}
    emulator.hold(blocking)
    for stream, event in events.items():
        assert driver.cuMemcpyHtoDAsync_v2(there.data_ptr(), host.data_ptr(), SIZE, stream) == 0
        assert driver.cuEventRecord(event, stream) == 0
    eventually(lambda: driver.cuEventQuery(events[non_blocking]) == 0)
    engines_are_idle()
    assert driver.cuEventQuery(events[LEGACY_STREAM]) == NOT_READY
    emulator.release(blocking)
    assert driver.cuEventSynchronize(events[LEGACY_STREAM]) == 0
    assert driver.cuEventQuery(events[blocking]) == 0


def test_blocking_streams_wait_for_the_legacy_stream(
    emulator: Emulator, context: int, engines_are_idle: Callable[..., None]
) -> None:
    """F33, the other way round; other streams go on."""
    blocking, non_blocking = made(driver.cuStreamCreate, BLOCKING), made(driver.cuStreamCreate, NON_BLOCKING)
    there, host = on_device(), pinned(0)
    events = {stream: made(driver.cuEventCreate, DISABLE_TIMING) for stream in (LEGACY_STREAM, blocking, non_blocking)}
    emulator.hold(LEGACY_STREAM)
    for stream, event in events.items():
        assert driver.cuMemcpyHtoDAsync_v2(there.data_ptr(), host.data_ptr(), SIZE, stream) == 0
        assert driver.cuEventRecord(event, stream) == 0
    eventually(lambda: driver.cuEventQuery(events[non_blocking]) == 0)
    engines_are_idle()
    assert driver.cuEventQuery(events[blocking]) == NOT_READY
    emulator.release(LEGACY_STREAM)
    assert driver.cuEventSynchronize(events[blocking]) == 0
    assert driver.cuEventQuery(events[LEGACY_STREAM]) == 0


def test_the_legacy_stream_does_not_wait_for_non_blocking_streams(emulator: Emulator, context: int) -> None:
    """F33."""
    non_blocking, event = made(driver.cuStreamCreate, NON_BLOCKING), made(driver.cuEventCreate, DISABLE_TIMING)
    there, host = on_device(), pinned(0)
    emulator.hold(non_blocking)
    for stream in (non_blocking, LEGACY_STREAM):
        assert driver.cuMemcpyHtoDAsync_v2(there.data_ptr(), host.data_ptr(), SIZE, stream) == 0
    assert driver.cuEventRecord(event, LEGACY_STREAM) == 0
    eventually(lambda: driver.cuEventQuery(event) == 0)
    assert driver.cuStreamQuery(non_blocking) == NOT_READY


def test_elapsed_times_that_there_are_not(emulator: Emulator, context: int, stream: torch.cuda.Stream) -> None:
    """F34."""
    timed = [made(driver.cuEventCreate, 0) for _ in range(2)]
    untimed, unrecorded = made(driver.cuEventCreate, DISABLE_TIMING), made(driver.cuEventCreate, 0)

    def elapsed(start: int, end: int) -> list[int]:
        out = ctypes.byref(ctypes.c_float())
        return [driver.cuEventElapsedTime_v2(out, start, end), runtime.cudaEventElapsedTime(out, start, end)]

    emulator.hold(stream.cuda_stream)
    for event in (timed[0], untimed, timed[1]):
        assert driver.cuEventRecord(event, stream.cuda_stream) == 0
    first, last = timed
    assert elapsed(first, last) == [NOT_READY] * 2
    emulator.step(stream.cuda_stream)
    assert driver.cuEventSynchronize(first) == 0
    assert elapsed(first, last) == [NOT_READY] * 2
    assert elapsed(last, first) == [NOT_READY] * 2
    emulator.release(stream.cuda_stream)
    assert driver.cuEventSynchronize(last) == 0
    assert elapsed(first, last) == [0] * 2
    for other in (untimed, unrecorded, 0):
        assert elapsed(first, other) == [INVALID_HANDLE] * 2
        assert elapsed(other, last) == [INVALID_HANDLE] * 2


def test_errors_have_names() -> None:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    assert driver.cuGetErrorName(ALREADY_REGISTERED, ctypes.byref(name)) == 0
    assert driver.cuGetErrorString(ALREADY_REGISTERED, ctypes.byref(text)) == 0
    assert name.value == b"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
    assert text.value == b"part or all of the requested memory range is already mapped"
    assert driver.cuGetErrorName(123456, ctypes.byref(name)) == INVALID_VALUE
    assert name.value is None


def test_what_is_not_emulated_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    assert driver.cuModuleLoad(None, None) == NOT_SUPPORTED
    assert runtime.cudaStreamBeginCapture(None, 0) == NOT_SUPPORTED
    assert runtime.cudaGetLastError() == NOT_SUPPORTED
    said = capfd.readouterr().err
    assert "cuModuleLoad is not emulated" in said
    assert "cudaStreamBeginCapture is not emulated" in said


# ------------------------------------------------------------------------------------------------------- random streams


SEEDS = range(6)


def copies_are_right(emulator: Emulator, seed: int, ordered: bool) -> bool:
    """Copy among buffers on random streams. Whether they end up as if one copy had followed the other.

    ordered: each waits for those that it depends on.
    """
    choose = random.Random(seed)
    emulator.set_jitter(100, seed)
    emulator.set_poison(True)
    streams = [new_stream(choose.choice([0, -1, -2])) for _ in range(6)]
    buffers = [on_device(i) for i in range(8)] + [pinned(i) for i in range(8, 16)]
    expected = list(range(16))
    written: dict[int, torch.cuda.Event] = {}
    read: dict[int, list[torch.cuda.Event]] = {}
    for _ in range(200):
        to, of = choose.sample(range(16), 2)
        if to >= 8 and of >= 8:  # would block
            continue
        stream = choose.choice(streams)
        if ordered:
            for event in (written.get(of), written.get(to), *read.get(to, [])):
                if event is not None:
                    stream.wait_event(event)
        done = copy(buffers[to], buffers[of], stream)
        expected[to] = expected[of]
        written[to] = done
        read[to] = []
        read.setdefault(of, []).append(done)
    torch.cuda.synchronize()
    return all(map(holds, buffers, expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_copies_that_wait_for_each_other_are_right(emulator: Emulator, seed: int) -> None:
    assert copies_are_right(emulator, seed, ordered=True)


def test_random_copies_that_do_not_wait_go_wrong(emulator: Emulator) -> None:
    assert not all(copies_are_right(emulator, seed, ordered=False) for seed in SEEDS)


# ----------------------------------------------------------------------------------------------- processes, the loader


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, without torch, which has the emulator's libraries as `driver` and `runtime`."""
    start = """
import ctypes, os, sys, types
from tests.cuda_emulator import load
def both():
    emulator = load()
    return emulator, ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libcudart.so.13")
"""
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_forked_child_has_no_cuda() -> None:
    done = run("""
emulator, driver, runtime = both()
assert driver.cuInit(0) == 0
if (child := os.fork()) == 0:
    answers = driver.cuInit(0), runtime.cudaDeviceSynchronize(), driver.cuMemHostUnregister(None)
    os._exit(answers != (3, 3, 3))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert runtime.cudaDeviceSynchronize() == 0
""")
    assert done.returncode == 0, done.stderr


def test_every_function_refuses_in_a_forked_child_without_waiting() -> None:
    """F29, while another thread of the parent holds the emulator's lock: it says a violation into a pipe that is full.

    Each is called without arguments that it could use, so that it has to refuse before anything else.
    """
    done = run(r"""
import re, signal, subprocess, threading, time
from tests.cuda_emulator import _BUILD
emulator, driver, runtime = both()
PATIENCE_S = 10
WORK_ANYWHERE = re.compile(r"cu(da)?(GetError(Name|String)|(Driver|Runtime)GetVersion)")
functions = []
for library in driver, runtime:
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", _BUILD / library._name], text=True)
    names = {line.split()[-1].partition("@")[0] for line in symbols.splitlines()}
    names = sorted(name for name in names if re.match(r"cu(da)?[A-Z]", name) and not WORK_ANYWHERE.fullmatch(name))
    functions += [getattr(library, name) for name in names]

device = ctypes.c_void_p()
assert runtime.cudaMalloc(ctypes.byref(device), ctypes.c_size_t(8)) == 0
host = ctypes.create_string_buffer(1 << 16)
assert runtime.cudaHostRegister(host, ctypes.c_size_t(1 << 16), 0) == 0
emulator.hold(0)
assert runtime.cudaMemcpyAsync(device, host, ctypes.c_size_t(8), 4, None) == 0

error_output = os.dup(2)
full, end = os.pipe()
os.set_blocking(end, False)
try:
    while True:
        os.write(end, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(end, True)
os.dup2(end, 2)
thread = threading.Thread(target=lambda: runtime.cudaHostUnregister(host))
thread.start()
deadline = time.monotonic() + PATIENCE_S
while True:  # until it is in write(2, ...)
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        if file.read().split()[1:2] == ["0x2"]:
            break
    assert time.monotonic() < deadline

if (child := os.fork()) == 0:
    os.dup2(error_output, 2)
    wrong = []
    for function in functions:
        signal.alarm(PATIENCE_S)  # ends the process
        print(function.__name__, file=sys.stderr)
        if (code := function(*[None] * 10)) != 3:
            wrong.append((function.__name__, code))
    try:
        emulator.violations()
    except RuntimeError:
        print("so far", wrong, len(functions) > 200, flush=True)
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
os.dup2(error_output, 2)
os.close(end)
os.read(full, 1 << 20)
thread.join()
assert emulator.violations() == 1
sys.exit(code)
""")
    assert done.stdout == "so far [] True\n", done.stderr
    assert done.returncode == 0, done.stderr


def test_a_primary_context_is_active_while_somebody_retains_it() -> None:
    done = run(
        """
emulator, driver, runtime = both()
def active(device):
    flags, is_active = ctypes.c_uint(7), ctypes.c_int(7)
    code = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(is_active))
    assert code or flags.value == 0
    return code or bool(is_active.value)
def both_active():
    return active(0), active(1)
retain = lambda: driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)
release = lambda: driver.cuDevicePrimaryCtxRelease_v2(0)

assert active(0) == 3
assert driver.cuInit(0) == 0
assert both_active() == (False, False)
assert release() == 201
assert retain() == retain() == 0
assert both_active() == (True, False)
assert release() == 0
assert both_active() == (True, False)
assert release() == 0
assert both_active() == (False, False)
assert release() == 201
assert active(2) == driver.cuDevicePrimaryCtxRelease_v2(2) == 101

# Asking the runtime about devices makes no context; all else does, and nobody takes it back.
assert runtime.cudaGetDeviceCount(ctypes.byref(ctypes.c_int())) == 0
assert runtime.cudaGetDevice(ctypes.byref(ctypes.c_int())) == 0
assert both_active() == (False, False)
assert runtime.cudaSetDevice(1) == 0
assert both_active() == (False, True)
assert runtime.cudaSetDevice(0) == 0
assert both_active() == (True, True)
assert retain() == release() == 0
assert release() == 201
assert both_active() == (True, True)
""",
        CUDAEMU_DEVICES="2",
    )
    assert done.returncode == 0, done.stderr


def test_a_call_of_the_runtime_makes_the_first_context_active() -> None:
    done = run("""
emulator, driver, runtime = both()
is_active = ctypes.c_int()
assert runtime.cudaFree(None) == 0
assert driver.cuDevicePrimaryCtxGetState(0, None, ctypes.byref(is_active)) == 0
assert is_active.value == 1
""")
    assert done.returncode == 0, done.stderr


def test_the_host_cannot_touch_device_memory() -> None:
    done = run("""
emulator, driver, runtime = both()
pointer = ctypes.c_void_p()
assert runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(8)) == 0
emulator.poke(pointer.value, b"12345678")
assert emulator.peek(pointer.value, 8) == b"12345678"
print("so far", flush=True)
ctypes.string_at(pointer.value, 1)
""")
    assert done.stdout == "so far\n"
    assert done.returncode < 0


def test_nothing_works_before_initialization() -> None:
    done = run("""
emulator, driver, runtime = both()
emulator.reset()
assert driver.cuDeviceGet(ctypes.byref(ctypes.c_int()), 0) == driver.cuStreamQuery(None) == 3
assert driver.cuInit(0) == 0
assert driver.cuDeviceGet(ctypes.byref(ctypes.c_int()), 0) == 0
""")
    assert done.returncode == 0, done.stderr


def test_the_environment() -> None:
    done = run(
        """
emulator, driver, runtime = both()
count, free, total = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
assert runtime.cudaGetDeviceCount(ctypes.byref(count)) == 0
assert runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
print(count.value, total.value >> 20)
calls = [runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1)) for _ in range(3)]
print(calls, runtime.cudaSetDevice(1), runtime.cudaSetDevice(2))
print(runtime.cudaMemset(None, 0, ctypes.c_size_t(0)), runtime.cudaDeviceSynchronize())
""",
        CUDAEMU_DEVICES="2",
        CUDAEMU_MEM_MB="64",
        CUDAEMU_FAIL="malloc@2=2; nonsense",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 64", "[0, 2, 0] 0 101", "0 0"]
    assert "nonsense" in done.stderr


def test_rates_and_waits_from_the_environment() -> None:
    done = run(
        """
import mmap, time
emulator, driver, runtime = both()
size, up, down = ctypes.c_size_t(50_000), ctypes.c_void_p(), ctypes.c_void_p()
streams = [ctypes.c_void_p() for _ in range(2)]
there = ctypes.c_void_p()
for stream in streams:
    assert runtime.cudaStreamCreateWithFlags(ctypes.byref(stream), 1) == 0
for host in (up, down):
    assert runtime.cudaHostAlloc(ctypes.byref(host), size, 0) == 0
assert runtime.cudaMalloc(ctypes.byref(there), size) == 0
memory = mmap.mmap(-1, mmap.PAGESIZE)
registered = ctypes.byref(ctypes.c_char.from_buffer(memory))
assert runtime.cudaHostRegister(registered, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
started = time.monotonic()
assert runtime.cudaMemcpyAsync(there, up, size, 4, streams[0]) == 0
assert runtime.cudaMemcpyAsync(down, there, size, 4, streams[1]) == 0
assert runtime.cudaHostUnregister(registered) == 0
print([runtime.cudaStreamQuery(stream) for stream in streams], time.monotonic() - started >= 0.1)
""",
        CUDAEMU_BW_GBPS="0.001",
        CUDAEMU_SHARED_BW="0.5",
        CUDAEMU_UNREGISTER_WAITS="1",
    )
    assert done.stdout.splitlines() == ["[0, 0] True"], done.stderr
    assert not done.stderr
    done = run("both()", CUDAEMU_SHARED_BW="1.5")
    assert done.returncode == 0
    assert "CUDAEMU_SHARED_BW" in done.stderr


def test_loading_twice(emulator: Emulator) -> None:
    assert load() is emulator


def test_loading_too_late_or_from_nowhere(tmp_path: Path) -> None:
    done = run(f"""
for torch_there, folder, expected in ((True, None, RuntimeError), (False, {str(tmp_path)!r}, FileNotFoundError)):
    sys.modules.pop("torch", None)
    if torch_there:
        sys.modules["torch"] = types.ModuleType("torch")
    try:
        load(folder)
    except expected as error:
        print(error)
""")
    assert done.returncode == 0, done.stderr
    late, nowhere = done.stdout.splitlines()
    assert "imported already" in late
    assert "make -C tests/cuda_emulator" in nowhere
