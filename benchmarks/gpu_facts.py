"""The facts that the CUDA engine and its emulator take from NVIDIA's documentation, each as a question to the device.

The numbers are those of tests/cuda_emulator/README.md, which also says why some are not asked. A fact is a function of
a Bench that returns (whether it is as expected, what was seen).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from async_tier.arena import Rows
from async_tier.block_store import BlockStore
from async_tier.config import TierConfig, format_size
from async_tier.streams.cuda_driver import CudaError, DeviceContext, Driver
from tests.rows import zero_rows

EMULATED = os.environ.get("ASYNC_TIER_CUDA") == "emulated"
ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
# Bytes that a copy under observation moves: a good part of a second on a GPU that others use, too.
VOLUME = 16 * MIB if EMULATED else 1 << 30
COPY_CHUNK = 16 * MIB
# A call that returns within this share of the time its copies take has not waited for them.
ASYNCHRONOUS = 0.2
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 0, 1, 2, 3
INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 201, 400, 500, 600
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
_DISABLE_TIMING = 2


class Bench:
    """A device, a stream, and pinned memory, by the driver alone."""

    def __init__(self) -> None:
        torch.cuda.init()
        self.driver = Driver()
        self.context = DeviceContext(self.driver, torch.cuda.current_device())
        self._library = ctypes.CDLL("libcuda.so.1")

    def ask(self, function: str, *arguments: object) -> int:
        """The code that a driver function returns. Integers are pointers, handles and sizes: 64 bits."""
        converted = [ctypes.c_uint64(each) if isinstance(each, int) else each for each in arguments]
        return int(getattr(self._library, function)(*converted))

    def do(self, function: str, *arguments: object) -> None:
        """`ask`, expecting success."""
        code = self.ask(function, *arguments)
        if code != SUCCESS:
            raise RuntimeError(f"{function} returned {code}")

    @contextmanager
    def pinned(self, size: int) -> Iterator[np.ndarray]:
        """`size` bytes of registered host memory."""
        memory = zero_rows(1, size)[0]
        self.driver.register(memory.ctypes.data, size)
        try:
            yield memory
        finally:
            self.driver.unregister(memory.ctypes.data)

    @contextmanager
    def device(self, size: int) -> Iterator[int]:
        """The address of `size` bytes of device memory."""
        address = self.driver.allocate(size)
        try:
            yield address
        finally:
            self.driver.free(address)

    @contextmanager
    def stream(self) -> Iterator[int]:
        handle = self.driver.create_stream()
        try:
            yield handle
        finally:
            self.synchronize(handle)
            self.driver.destroy_stream(handle)

    def synchronize(self, stream: int) -> None:
        self.do("cuStreamSynchronize", stream)

    def copy(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queue one copy."""
        self.do("cuMemcpyAsync", destination, source, size, stream)

    def copy_in_chunks(self, destination: int, source: int, size: int, stream: int) -> None:
        """Queue one copy in parts, between which a copy engine may turn to another stream."""
        for at in range(0, size, COPY_CHUNK):
            self.copy(destination + at, source + at, min(COPY_CHUNK, size - at), stream)

    def timed(self, call: Callable[[], None], stream: int) -> tuple[float, float]:
        """(seconds until `call` returned, seconds until the stream was empty)."""
        started = time.perf_counter()
        call()
        returned = time.perf_counter() - started
        self.synchronize(stream)
        return returned, time.perf_counter() - started


def small_store(row_bytes: int = 64 << 10) -> tuple[BlockStore, np.ndarray]:
    """A store of a few rows, and its primary."""
    primary = zero_rows(16, row_bytes)
    config = TierConfig.parse({"engine": "cuda", "bytes_to_use": 16 * row_bytes, "staging_bytes": 8 * row_bytes})
    return BlockStore(Rows.of_view(memoryview(primary)), config), primary


def fact_pinned_copies_do_not_wait(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        bench.timed(lambda: bench.copy(device, host.ctypes.data, VOLUME, stream), stream)
        took = [
            bench.timed(lambda: bench.copy(device, host.ctypes.data, VOLUME, stream), stream),
            bench.timed(lambda: bench.copy(host.ctypes.data, device, VOLUME, stream), stream),
        ]
    shares = [returned / done for returned, done in took]
    return max(shares) < ASYNCHRONOUS or EMULATED, f"returned after {max(shares):.1%} of the copy's time"


def fact_host_to_host_blocks(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as one, bench.pinned(VOLUME) as other, bench.stream() as stream:
        returned, done = bench.timed(lambda: bench.copy(one.ctypes.data, other.ctypes.data, VOLUME, stream), stream)
    return returned > done / 2, f"returned after {returned / done:.1%} of the copy's time"


def fact_pageable_blocks(bench: Bench) -> tuple[bool, str]:
    pageable = np.zeros(VOLUME, dtype=np.uint8)
    with bench.device(VOLUME) as device, bench.stream() as stream:
        returned, done = bench.timed(lambda: bench.copy(pageable.ctypes.data, device, VOLUME, stream), stream)
    return returned > done / 2, f"device to host returned after {returned / done:.1%} of the copy's time"


def fact_batch_refuses_the_legacy_stream(bench: Bench) -> tuple[bool, str]:
    if not bench.driver.has_batch:
        return True, "this driver has no batch call"
    with bench.pinned(MIB) as host, bench.device(MIB) as device:
        half = MIB // 2
        sizes = np.array([half, half], dtype=np.uint64)
        to = np.array([device, device + half], dtype=np.uint64)
        of = np.array([host.ctypes.data, host.ctypes.data + half], dtype=np.uint64)
        code = _code(lambda: bench.driver.copy(to, of, sizes, 0))
    return code == INVALID_VALUE, f"code {code}"


def fact_batch_copies_bytes(bench: Bench) -> tuple[bool, str]:
    if not bench.driver.has_batch:
        return True, "this driver has no batch call"
    count, size = 256, 4096
    with bench.pinned(2 * count * size) as host, bench.device(count * size) as device, bench.stream() as stream:
        host[: count * size] = np.random.default_rng(1).integers(0, 256, count * size, dtype=np.uint8)
        order = np.random.default_rng(2).permutation(count)
        sizes = np.full(count, size, dtype=np.uint64)
        near = (device + order * size).astype(np.uint64)
        bench.driver.copy(near, (host.ctypes.data + np.arange(count) * size).astype(np.uint64), sizes, stream)
        back = (host.ctypes.data + (count + np.arange(count)) * size).astype(np.uint64)
        bench.driver.copy(back, near, sizes, stream)
        bench.synchronize(stream)
        right = np.array_equal(host[: count * size], host[count * size :])
    return right, "the call of version 12080, with failIdx"


def fact_registered_twice(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(4 * MIB) as host:
        again = _code(lambda: bench.driver.register(host.ctypes.data, 4 * MIB))
        part = _code(lambda: bench.driver.register(host.ctypes.data + MIB, MIB))
    return again == part == ALREADY_REGISTERED, f"codes {again} and {part}"


def fact_one_page_in_two_registrations(bench: Bench) -> tuple[bool, str]:
    memory = zero_rows(1, 4 * MIB)[0]
    bench.driver.register(memory.ctypes.data, MIB + 100)
    code = _code(lambda: bench.driver.register(memory.ctypes.data + MIB + 100, MIB))
    bench.driver.unregister(memory.ctypes.data)
    if code == 0:
        bench.driver.unregister(memory.ctypes.data + MIB + 100)
    return True, f"code {code}; the tier's ranges share no page, so either is fine"


def fact_no_context(bench: Bench) -> tuple[bool, str]:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(_code(lambda: bench.driver.allocate(MIB))))
    thread.start()
    thread.join()
    return codes == [INVALID_CONTEXT], f"code {codes[0]}"


def fact_events_capture_when_recorded(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        side = torch.cuda.ExternalStream(stream)
        event = torch.cuda.Event()
        event.record(side)
        for _ in range(4):
            bench.copy(device, host.ctypes.data, VOLUME, stream)
        event.synchronize()
        busy = not bench.driver.is_idle(stream)
    return busy or EMULATED, "complete before what was queued after it"


def fact_streams_overlap_and_order_by_events(bench: Bench) -> tuple[bool, str]:
    with (
        bench.pinned(2 * VOLUME) as host,
        bench.device(VOLUME) as device,
        bench.stream() as one,
        bench.stream() as two,
    ):
        host[:VOLUME] = 7
        event = torch.cuda.Event()
        bench.copy_in_chunks(device, host.ctypes.data, VOLUME, one)
        event.record(torch.cuda.ExternalStream(one))
        torch.cuda.ExternalStream(two).wait_event(event)
        bench.copy(host.ctypes.data + VOLUME, device, VOLUME, two)
        bench.synchronize(two)
        right = bool((host[VOLUME:] == 7).all())
    return right, "the second leg read what the first one wrote"


def fact_free_waits(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.stream() as stream:
        device = bench.driver.allocate(VOLUME)
        for _ in range(2):
            bench.copy(device, host.ctypes.data, VOLUME, stream)
        bench.driver.free(device)
        idle = bench.driver.is_idle(stream)
    return True, f"cuMemFree {'waited' if idle else 'did not wait'} for the copies; the tier frees only what is idle"


def fact_loads_wait_behind_stores_in_flight(bench: Bench) -> tuple[bool, str]:
    with (
        bench.pinned(VOLUME + MIB) as host,
        bench.device(VOLUME + MIB) as device,
        bench.stream() as stores,
        bench.stream() as loads,
    ):
        alone = bench.timed(lambda: bench.copy(device + VOLUME, host.ctypes.data + VOLUME, MIB, loads), loads)[1]
        started = time.perf_counter()
        bench.copy_in_chunks(device, host.ctypes.data, VOLUME, stores)
        behind = bench.timed(lambda: bench.copy(device + VOLUME, host.ctypes.data + VOLUME, MIB, loads), loads)[1]
        bench.synchronize(stores)
        whole = time.perf_counter() - started
    seen = f"1 MiB took {alone * 1e3:.2f} ms alone, {behind * 1e3:.2f} ms behind {format_size(VOLUME)} "
    return True, seen + f"({whole * 1e3:.2f} ms); the tier bounds what is ahead, so either is fine"


def fact_pageable_source_is_staged(bench: Bench) -> tuple[bool, str]:
    pageable = np.full(MIB, 7, dtype=np.uint8)
    with bench.pinned(MIB) as back, bench.device(MIB) as device, bench.stream() as stream:
        bench.copy(device, pageable.ctypes.data, MIB, stream)
        pageable[:] = 8
        bench.copy(back.ctypes.data, device, MIB, stream)
        bench.synchronize(stream)
        right = bool((back == 7).all())
    return right, "the source was read before the call returned" if right else "the source was read after the call"


def fact_codes_of_registration(bench: Bench) -> tuple[bool, str]:
    memory = zero_rows(1, MIB)[0]
    codes = {
        "unregister what is not": bench.ask("cuMemHostUnregister", memory.ctypes.data),
        "unregister null": bench.ask("cuMemHostUnregister", 0),
        "register null": bench.ask("cuMemHostRegister_v2", 0, MIB, 1),
    }
    return list(codes.values()) == [NOT_REGISTERED, INVALID_VALUE, INVALID_VALUE], _said(codes)


def fact_codes_of_memory(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(2 * MIB) as host, bench.device(MIB) as device, bench.stream() as stream:
        codes = {
            "a copy beyond the end": bench.ask("cuMemcpyAsync", device, host.ctypes.data, 1 << 40, stream),
            "free of what is no start": bench.ask("cuMemFree_v2", device + 256),
            "too much": _code(lambda: bench.driver.allocate(1 << 50)),
        }
    return list(codes.values()) == [INVALID_VALUE, INVALID_VALUE, OUT_OF_MEMORY], _said(codes)


def fact_batches_of_nothing_are_refused(bench: Bench) -> tuple[bool, str]:
    if not bench.driver.has_batch:
        return True, "this driver has no batch call"
    with bench.pinned(MIB) as host, bench.device(MIB) as device, bench.stream() as stream:
        two = np.array([4096, 0], dtype=np.uint64)
        to = np.array([device, device + 8192], dtype=np.uint64)
        of = np.array([host.ctypes.data, host.ctypes.data + 8192], dtype=np.uint64)
        code = _code(lambda: bench.driver.copy(to, of, two, stream))
    return True, f"an entry of 0 bytes: code {code}; the tier makes none"


def fact_destroyed_streams_finish(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device:
        host[:] = 9
        stream = bench.driver.create_stream()
        bench.copy(device, host.ctypes.data, VOLUME, stream)
        started = time.perf_counter()
        bench.driver.destroy_stream(stream)
        returned = time.perf_counter() - started
        torch.cuda.synchronize()
        host[:] = 0
        with bench.stream() as other:
            bench.copy(host.ctypes.data, device, VOLUME, other)
        right = bool((host == 9).all())
    return right, f"destroying returned after {returned * 1e3:.2f} ms, and the copy was made"


def fact_contexts_are_a_stack(bench: Bench) -> tuple[bool, str]:
    codes: list[int] = []

    def run() -> None:
        popped = ctypes.c_void_p()
        with bench.context:
            with bench.context:
                pass
            codes.append(_code(bench.driver.memory))
        codes.append(_code(bench.driver.memory))
        codes.append(bench.ask("cuCtxPopCurrent_v2", ctypes.byref(popped)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return codes == [
        SUCCESS,
        INVALID_CONTEXT,
        INVALID_CONTEXT,
    ], f"inside {codes[0]}, outside {codes[1]}, empty {codes[2]}"


def fact_nothing_works_in_a_forked_child(bench: Bench) -> tuple[bool, str]:
    child = os.fork()
    if child == 0:
        os._exit(min(bench.ask("cuInit", 0), 200))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code == NOT_INITIALIZED, f"cuInit: code {code}; the tier calls nothing there"


def fact_registered_memory_is_known(bench: Bench) -> tuple[bool, str]:
    pageable = zero_rows(1, MIB)[0]
    with bench.pinned(MIB) as host:
        pinned = bench.driver.is_pinned(host.ctypes.data) and bench.driver.is_pinned(host.ctypes.data + MIB - 1)
    return pinned and not bench.driver.is_pinned(pageable.ctypes.data), "registered: yes; pageable: no"


def fact_both_directions_at_once(bench: Bench) -> tuple[bool, str]:
    with (
        bench.pinned(VOLUME) as up,
        bench.pinned(VOLUME) as down,
        bench.device(2 * VOLUME) as device,
        bench.stream() as one,
        bench.stream() as two,
    ):

        def both() -> None:
            bench.copy_in_chunks(device, up.ctypes.data, VOLUME, one)
            bench.copy_in_chunks(down.ctypes.data, device + VOLUME, VOLUME, two)
            bench.synchronize(one)

        bench.timed(both, two)
        alone = bench.timed(lambda: bench.copy_in_chunks(device, up.ctypes.data, VOLUME, one), one)[1]
        alone += bench.timed(lambda: bench.copy_in_chunks(down.ctypes.data, device + VOLUME, VOLUME, two), two)[1]
        together = bench.timed(both, two)[1]
    return together < 0.9 * alone or EMULATED, f"together {together / alone:.2f} of one after the other"


def fact_events_without_timing_have_no_times(bench: Bench) -> tuple[bool, str]:
    events = [ctypes.c_void_p() for _ in range(2)]
    milliseconds = ctypes.c_float()
    for event in events:
        bench.do("cuEventCreate", ctypes.byref(event), _DISABLE_TIMING)
    code = bench.ask("cuEventElapsedTime_v2", ctypes.byref(milliseconds), events[0], events[1])
    for event in events:
        bench.do("cuEventDestroy_v2", event)
    return code == INVALID_HANDLE, f"code {code}"


def fact_the_default_stream_does_not_wait_for_ours(bench: Bench) -> tuple[bool, str]:
    with bench.pinned(VOLUME) as host, bench.device(VOLUME) as device, bench.stream() as stream:
        for _ in range(4):
            bench.copy_in_chunks(device, host.ctypes.data, VOLUME, stream)
        torch.zeros(4, device="cuda").fill_(1)
        torch.cuda.default_stream().synchronize()
        busy = not bench.driver.is_idle(stream)
    return busy or EMULATED, "the default stream was done first" if busy else "our stream was done first"


_LOST = """
import os, sys
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    from tests import cuda_emulator
    emulator = cuda_emulator.load()
import torch
from benchmarks.gpu_facts import small_store
from async_tier.streams.cuda_driver import CudaError
store, primary = small_store()
store.submit_store(1, [b"a"], [0]); store.drain(); assert [end.success for end in store.poll()] == [True]
if os.environ.get("ASYNC_TIER_CUDA") == "emulated":
    emulator.inject("exec_h2d", 1, 700, asynchronous=True)
    pinned = torch.zeros(4).pin_memory()  # kept: freed once the copy has failed, it would end the process
    try:
        pinned.to("cuda", non_blocking=True); torch.cuda.synchronize()
    except RuntimeError:
        pass
else:
    try:  # an index out of range: a device-side assertion, which the context does not survive
        torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")]; torch.cuda.synchronize()
    except RuntimeError:
        pass
with store._engine.context:
    try:
        store._engine.driver.is_idle(store._engine.load_stream.handles[0]); print("cuStreamQuery says nothing")
    except CudaError as error:
        print("cuStreamQuery says", error.code)
store.submit_load(2, [b"a"], [1]); store.drain()
assert [end.success for end in store.poll()] == [False], "the job was not reported as failed"
assert not store.lookup(b"a")
store.close()
assert store.statistics().faults == 1
print("alive")
sys.stdout.flush(); os._exit(0)
"""


def fact_the_process_survives_a_lost_context(bench: Bench) -> tuple[bool, str]:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", _LOST], cwd=ROOT, capture_output=True, text=True)
    said = ran.stdout.strip().splitlines()
    alive = ran.returncode == 0 and said[-1:] == ["alive"]
    return alive, "; ".join(said) if alive else f"exit status {ran.returncode}: {ran.stderr.strip()[-300:]}"


def _code(call: Callable[[], object]) -> int:
    """The driver's code for a call: 0 if it was taken."""
    try:
        call()
    except CudaError as error:
        return error.code
    return SUCCESS


def _said(codes: dict[str, int]) -> str:
    return ", ".join(f"{what}: {code}" for what, code in codes.items())


FACTS: dict[str, tuple[str, Callable[[Bench], tuple[bool, str]]]] = {
    "F0": ("pinned copies do not wait", fact_pinned_copies_do_not_wait),
    "F1-3": ("a lost context answers with its error, and the process lives", fact_the_process_survives_a_lost_context),
    "F5": ("a page in two registrations", fact_one_page_in_two_registrations),
    "F6": ("what is registered cannot be registered again", fact_registered_twice),
    "F7-8": ("codes of registration", fact_codes_of_registration),
    "F9-10": ("codes of memory", fact_codes_of_memory),
    "F11": ("freeing waits for copies", fact_free_waits),
    "F12": ("host to host blocks", fact_host_to_host_blocks),
    "F13": ("a copy to pageable memory blocks", fact_pageable_blocks),
    "F14": ("a copy from pageable memory reads it first", fact_pageable_source_is_staged),
    "F15": ("a batch refuses the legacy default stream", fact_batch_refuses_the_legacy_stream),
    "F16": ("a batch refuses an entry of no bytes", fact_batches_of_nothing_are_refused),
    "F18": ("legs joined by an event read in order", fact_streams_overlap_and_order_by_events),
    "F20-21": ("the batch call of version 12080", fact_batch_copies_bytes),
    "F22": ("a load behind stores in flight", fact_loads_wait_behind_stores_in_flight),
    "F23": ("both directions at once", fact_both_directions_at_once),
    "F24": ("events capture when they are recorded", fact_events_capture_when_recorded),
    "F25": ("a destroyed stream finishes", fact_destroyed_streams_finish),
    "F26": ("a thread without a context is refused", fact_no_context),
    "F27": ("contexts are a stack", fact_contexts_are_a_stack),
    "F29": ("nothing works in a forked child", fact_nothing_works_in_a_forked_child),
    "F30-31": ("registered memory is known as such", fact_registered_memory_is_known),
    "F33": ("the default stream does not wait for ours", fact_the_default_stream_does_not_wait_for_ours),
    "F34": ("events without timing have no times", fact_events_without_timing_have_no_times),
}
