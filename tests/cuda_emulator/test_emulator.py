"""The emulator's own tests: each semantic that the tests of the tier rely on.

Nothing here sleeps in order to wait. What must not have happened is shown with `engines_are_idle`: copy engines serve in
order of submission, so when a later copy is through, an earlier one that was ready is through as well. What must last is
given a delay of an hour, which the reset at the test's end cuts short.
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
import types
from collections.abc import Callable, Iterator
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
NOT_FOUND = 500
NOT_READY = 600
ILLEGAL_ADDRESS = 700
ALREADY_REGISTERED = 712
NOT_REGISTERED = 713
NOT_PERMITTED = 800
NOT_SUPPORTED = 801

DEFAULT_STREAM_FLAGS, NON_BLOCKING = 0, 1
DISABLE_TIMING = 2
ORDER_STREAM, ORDER_DURING_API_CALL, ORDER_ANY = 1, 2, 3
LEGACY_STREAM = 0


# ----------------------------------------------------------------------------------------------------------- arrangement


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


@pytest.fixture(autouse=True)
def _initialized(emulator: Emulator) -> Iterator[None]:
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


@pytest.fixture
def memory() -> Iterator[int]:
    """The address of two registered pages that belong to no torch tensor."""
    with mapped(2 * mmap.PAGESIZE) as address:
        assert runtime.cudaHostRegister(address, 2 * mmap.PAGESIZE, 0) == 0
        yield address
        runtime.cudaHostUnregister(address)


class mapped:  # noqa: N801
    """`with` it, so many bytes of host memory of our own, on pages of their own."""

    def __init__(self, size: int) -> None:
        self._mmap = mmap.mmap(-1, size)

    def __enter__(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))

    def __exit__(self, *_: object) -> None:
        pass  # unmapped when the last reference is gone


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


def test_a_destroyed_stream_still_ends_its_work(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(9)
    emulator.set_stream_delay(stream.cuda_stream, 20_000)
    copy(there, host, stream)
    assert runtime.cudaStreamDestroy(stream.cuda_stream) == 0
    assert runtime.cudaStreamQuery(stream.cuda_stream) == INVALID_HANDLE
    eventually(lambda: holds(there, 9))


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


def test_jitter_depends_on_the_seed(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, host = on_device(0), pinned(0)
    took = []
    for seed in (1, 2, 3, 4):
        emulator.set_jitter(20_000, seed)
        took.append(milliseconds(stream, there, host))
    assert max(took) > 5
    assert len({round(each) for each in took}) > 1


def test_an_engine_serves_in_order_of_submission(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    # Both streams may start at the same moment: when what they wait for is done.
    gate, loads = new_stream(), new_stream(priority=-5)
    emulator.hold(gate.cuda_stream)
    opened = copy(on_device(), pinned(0), gate)
    host = pinned(0)
    emulator.set_delay(Kind.H2D, 2_000)
    stream.wait_event(opened)
    loads.wait_event(opened)
    stores = [copy(on_device(), host, stream) for _ in range(8)]
    load_done = copy(on_device(), host, loads)
    emulator.release(gate.cuda_stream)
    load_done.synchronize()
    assert all(store.query() for store in stores)


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
    emulator.set_stream_delay(busy.cuda_stream, 20_000)
    copy(on_device(), pinned(0), busy)
    first = copy(on_device(), pinned(0), stream)
    second = copy(on_device(), pinned(0), other)
    emulator.hold(stream.cuda_stream)
    second.synchronize()
    assert not first.query()


# -------------------------------------------------------------------------------------------------------- host memory


def test_registration() -> None:
    page = mmap.PAGESIZE
    with mapped(4 * page) as address:
        view = torch.frombuffer((ctypes.c_char * page).from_address(address), dtype=torch.uint8)
        assert not view.is_pinned()
        assert runtime.cudaHostRegister(address, 2 * page, 0) == 0
        assert view.is_pinned()
        assert runtime.cudaHostRegister(address + page, 2 * page, 0) == ALREADY_REGISTERED
        assert runtime.cudaHostUnregister(address + page) == NOT_REGISTERED
        assert runtime.cudaHostUnregister(address) == 0
        assert not view.is_pinned()
        assert runtime.cudaHostUnregister(address) == NOT_REGISTERED


def test_registrations_share_no_page() -> None:
    page = mmap.PAGESIZE
    with mapped(2 * page) as address:
        assert runtime.cudaHostRegister(address, page // 2, 0) == 0
        assert runtime.cudaHostRegister(address + page // 2, page, 0) == ALREADY_REGISTERED
        assert runtime.cudaHostRegister(address + page, page, 0) == 0
        assert runtime.cudaHostUnregister(address) == 0
        assert runtime.cudaHostUnregister(address + page) == 0


def test_only_writable_memory_can_be_registered() -> None:
    with Path(sys.executable).open("rb") as file:
        read_only = mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)
    address = torch.frombuffer(bytearray(1), dtype=torch.uint8).data_ptr()
    libc = ctypes.PyDLL(None)
    buffer = (ctypes.c_char * 64)()  # room for a Py_buffer... only its first field is looked at
    pointer = ctypes.c_void_p()
    del address, libc, buffer, pointer, read_only


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


def test_a_copy_from_pageable_memory_waits_for_the_stream(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    emulator.set_stream_delay(stream.cuda_stream, 20_000)
    before = copy(on_device(), pinned(0), stream)
    copy(on_device(), pageable(1), stream)
    assert before.query()


def test_a_copy_from_host_to_host_blocks(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    to, of = pinned(0), pinned(9)
    emulator.set_delay(Kind.H2H, 20_000)
    assert runtime.cudaMemcpyAsync(to.data_ptr(), of.data_ptr(), SIZE, 4, stream.cuda_stream) == 0
    assert holds(to, 9)
    assert emulator.copies(Kind.H2H) == (1, SIZE)
    assert emulator.copies_pageable() == 0


def test_a_host_range_that_is_gone_is_an_error_and_no_crash(
    emulator: Emulator, stream: torch.cuda.Stream, capfd: pytest.CaptureFixture[str]
) -> None:
    size, there = mmap.PAGESIZE, on_device()
    private = ctypes.CDLL(None)
    private.mmap.restype = ctypes.c_void_p
    address = private.mmap(None, ctypes.c_size_t(size), 3, 0x22, -1, ctypes.c_long(0))  # readable, writable; anonymous
    assert runtime.cudaHostRegister(address, size, 0) == 0
    emulator.hold(stream.cuda_stream)
    assert runtime.cudaMemcpyAsync(there.data_ptr(), address, size, 4, stream.cuda_stream) == 0
    assert private.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0
    emulator.release(stream.cuda_stream)
    assert runtime.cudaStreamSynchronize(stream.cuda_stream) == ILLEGAL_ADDRESS
    assert "not mapped" in capfd.readouterr().err
    emulator.reset()
    assert runtime.cudaHostUnregister(address) == 0


def test_unregistering_under_a_copy_is_a_violation(
    emulator: Emulator, stream: torch.cuda.Stream, memory: int
) -> None:
    there = on_device()
    emulator.hold(stream.cuda_stream)
    runtime.cudaMemcpyAsync(there.data_ptr(), memory, 1, 4, stream.cuda_stream)
    assert runtime.cudaHostUnregister(memory) == 0
    assert emulator.violations() == 1
    assert "host unregister" in emulator.violation_texts()[0]
    emulator.reset()
    assert emulator.violations() == 0


def test_freeing_under_a_copy_is_a_violation(
    emulator: Emulator, stream: torch.cuda.Stream, capfd: pytest.CaptureFixture[str]
) -> None:
    there, address = on_device(), ctypes.c_void_p()
    assert runtime.cudaHostAlloc(ctypes.byref(address), SIZE, 0) == 0
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    runtime.cudaMemcpyAsync(there.data_ptr(), address, SIZE, 4, stream.cuda_stream)
    assert runtime.cudaFreeHost(address) == 0
    assert "VIOLATION: host free" in capfd.readouterr().err
    emulator.reset()


# -------------------------------------------------------------------------------------------------------- device memory


def test_ranges_are_checked(stream: torch.cuda.Stream) -> None:
    there, host = on_device(), pinned(0)
    end = there.data_ptr() + (1 << 30)
    arguments = (host.data_ptr(), 2, 4, stream.cuda_stream)
    assert runtime.cudaMemcpyAsync(end, *arguments) == INVALID_VALUE
    address = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(address), 100) == 0
    assert address.value is not None
    assert runtime.cudaMemcpyAsync(address.value + 98, *arguments) == 0
    assert runtime.cudaMemcpyAsync(address.value + 99, *arguments) == INVALID_VALUE
    assert runtime.cudaFree(address) == 0
    assert runtime.cudaMemcpyAsync(address.value, *arguments) == INVALID_VALUE
    assert runtime.cudaFree(address) == INVALID_VALUE


def test_a_kind_that_does_not_fit_is_refused(stream: torch.cuda.Stream) -> None:
    there, host = on_device(), pinned(0)
    device_to_host = 2
    assert (
        runtime.cudaMemcpyAsync(there.data_ptr(), host.data_ptr(), SIZE, device_to_host, stream.cuda_stream)
        == INVALID_VALUE
    )


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


def test_poison(emulator: Emulator, stream: torch.cuda.Stream) -> None:
    there, back = on_device(9), pinned(0)
    emulator.set_poison(True)
    emulator.set_stream_delay(stream.cuda_stream, HOUR_US)
    event = copy(back, there, stream)
    eventually(lambda: holds(back, 0xDB))
    assert not event.query()
    emulator.reset()
    assert holds(back, 9)


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


@pytest.mark.parametrize(
    ("order", "arrives"), [(ORDER_STREAM, 2), (ORDER_DURING_API_CALL, 1), (ORDER_ANY, 1)]
)
def test_when_a_batch_reads_its_source(
    emulator: Emulator, stream: torch.cuda.Stream, order: int, arrives: int
) -> None:
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


def test_batches_that_are_refused(stream: torch.cuda.Stream) -> None:
    there, host = on_device().data_ptr(), pinned(0).data_ptr()
    assert batch(LEGACY_STREAM, [there], [host], [1]) == INVALID_VALUE
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
    there, host = on_device(0), pinned(9)
    emulator.inject(point, 1, ILLEGAL_ADDRESS, asynchronous=True)
    emulator.hold(stream.cuda_stream)
    event = copy(there, host, stream)
    assert not event.query()
    emulator.release(stream.cuda_stream)
    calls: list[Callable[[], object]] = [
        event.synchronize,
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
    emulator.reset()
    assert emulator.sticky() == 0
    copy(there, host, stream).synchronize()
    assert holds(there, 9)


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


driver = Api("libcuda.so.1")
PRIMARY_CONTEXT = 0


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
    assert made(driver.cuStreamGetPriority_value if False else driver.cuStreamGetPriority_, stream) if False else True
    for destroy, handle in (
        (driver.cuEventDestroy_v2, event),
        (driver.cuStreamDestroy_v2, stream),
        (driver.cuStreamDestroy_v2, other),
    ):
        assert destroy(handle) == 0
        assert destroy(handle) == INVALID_HANDLE
    assert driver.cuMemFree_v2(there) == 0
